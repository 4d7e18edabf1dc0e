//! Three numbers, one for each axis, as kernels take them.

use cubecl::prelude::*;

/// Numbers along depth, height and width.
#[derive(CubeType, CubeLaunch, Clone, Copy)]
pub(crate) struct Axes {
    pub depth: usize,
    pub height: usize,
    pub width: usize,
}

pub(crate) fn axes([depth, height, width]: [usize; 3]) -> AxesLaunch {
    AxesLaunch::new(depth, height, width)
}
