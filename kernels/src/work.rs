//! How much a launch has to do, and in how many cubes.

use crate::KernelError;
use cubecl::prelude::CubeDim;

/// The work of one launch.
#[derive(Clone, Copy, Debug)]
pub enum Work {
    /// So many items, which the kernel shares out in strips: on a GPU a unit for each, on a CPU one cube of a unit a core.
    Items(usize),
    /// So many cubes of this shape.
    Cubes(usize, CubeDim),
}

impl Work {
    /// At least so many units, in cubes of `of_cube`. Kernels guard the last cube.
    pub fn units(units: usize, of_cube: u32) -> Self {
        Self::Cubes(units.div_ceil(of_cube as usize), CubeDim::new_1d(of_cube))
    }

    /// The same, declared to compute so many floating-point operations, see [`Launched::flops`](crate::Launched::flops).
    pub fn of_flops(self, flops: u64) -> Declared {
        Declared { work: self, flops }
    }
}

/// Work, and what a launch declares of it for those who record launches.
#[derive(Clone, Copy, Debug)]
pub struct Declared {
    pub(crate) work: Work,
    pub(crate) flops: u64,
}

impl From<Work> for Declared {
    /// Nothing declared.
    fn from(work: Work) -> Self {
        work.of_flops(0)
    }
}

/// At least so many cubes along x and y, and few more: an axis has a limit.
pub(crate) fn layout(operation: &'static str, cubes: u64, most: [u32; 2]) -> Result<[u32; 2], KernelError> {
    let [max_x, max_y] = most.map(u64::from);
    let limit = max_x.saturating_mul(max_y);
    if cubes > limit {
        return Err(KernelError::Limit { operation, what: "number of cubes", actual: cubes, limit });
    }
    let y = cubes.div_ceil(max_x).max(1);
    Ok([cubes.div_ceil(y) as u32, y as u32])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn more_cubes_than_an_axis_holds_are_laid_out_in_two() {
        let most = [65_535, 65_535];
        for cubes in [0, 1, 65_535, 65_536, 58_720_256, 65_535 * 65_535] {
            let [x, y] = layout("test", cubes, most).expect("fits");
            let laid_out = u64::from(x) * u64::from(y);
            assert!(x <= most[0] && y <= most[1] && y >= 1, "{cubes}: {x} {y}");
            assert!(laid_out >= cubes && laid_out < cubes + u64::from(y), "{cubes}: {x} {y}");
        }
        let limit = 65_535 * 65_535;
        let refused = layout("test", limit + 1, most);
        let actual = limit + 1;
        assert_eq!(refused, Err(KernelError::Limit { operation: "test", what: "number of cubes", actual, limit }));
    }
}
