//! Convolutions to test, their definition, and buffers of every type.

use super::{is_slow, read};
use voxgrad::kernels::conv3d::Problem;
use voxgrad::kernels::{Buffer, Context, Dtype, elementwise};

pub const CUBE: [usize; 3] = [3; 3];
pub const ONE: [usize; 3] = [1; 3];

/// A convolution: extents of the input, channels of both inputs and of the output, kernel, stride.
#[derive(Clone, Copy, Debug)]
pub struct Case {
    pub batch: usize,
    pub dims: [usize; 3],
    pub channels: (usize, usize, usize),
    pub kernel: [usize; 3],
    pub stride: [usize; 3],
}

impl Case {
    pub fn problem(&self) -> Problem {
        let (first, second, out) = self.channels;
        let problem = Problem::new(self.batch, self.dims, first, out, self.kernel, self.stride).unwrap();
        if second > 0 { problem.with_second_input(second).unwrap() } else { problem }
    }

    pub fn inputs(&self) -> usize {
        self.channels.0 + self.channels.1
    }

    pub fn out_dims(&self) -> [usize; 3] {
        // As PyTorch states it: (in + 2 * padding - kernel) / stride + 1 with padding (kernel - 1) / 2.
        std::array::from_fn(|a| (self.dims[a] + 2 * ((self.kernel[a] - 1) / 2) - self.kernel[a]) / self.stride[a] + 1)
    }

    /// Calls `f(input position, output position, tap)` for every product of one channel pair.
    pub fn for_each_product(&self, mut f: impl FnMut(usize, usize, usize)) {
        let (out, pad) = (self.out_dims(), self.kernel.map(|k| (k - 1) / 2));
        for n in 0..self.batch {
            for o in positions(out) {
                for k in positions(self.kernel) {
                    let i: [isize; 3] =
                        std::array::from_fn(|a| (o[a] * self.stride[a] + k[a]) as isize - pad[a] as isize);
                    if (0..3).all(|a| i[a] >= 0 && (i[a] as usize) < self.dims[a]) {
                        let i = i.map(|p| p as usize);
                        f(flat(n, i, self.dims), flat(n, o, out), flat(0, k, self.kernel));
                    }
                }
            }
        }
    }
}

pub fn positions(dims: [usize; 3]) -> impl Iterator<Item = [usize; 3]> {
    (0..dims[0]).flat_map(move |d| (0..dims[1]).flat_map(move |h| (0..dims[2]).map(move |w| [d, h, w])))
}

fn flat(n: usize, p: [usize; 3], dims: [usize; 3]) -> usize {
    ((n * dims[0] + p[0]) * dims[1] + p[1]) * dims[2] + p[2]
}

/// Both algorithms, partial sums of channels in a register, every tile width, edges, samples that end inside of a block,
/// and samples of one voxel.
pub fn cases() -> Vec<Case> {
    let case = |batch, dims, channels, kernel, stride| Case { batch, dims, channels, kernel, stride };
    let mut cases = vec![
        case(2, [3, 4, 5], (1, 0, 8), CUBE, ONE),
        case(3, [1, 1, 1], (16, 0, 16), CUBE, ONE),
        case(2, [2, 3, 7], (8, 0, 12), [1, 3, 3], ONE),
        case(2, [4, 5, 13], (16, 16, 24), CUBE, ONE),
        case(3, [5, 6, 7], (16, 0, 32), CUBE, [2; 3]),
        case(2, [2, 5, 9], (32, 0, 3), ONE, ONE),
        case(2, [3, 4, 5], (32, 0, 32), CUBE, ONE),
        case(3, [2, 3, 7], (32, 32, 32), CUBE, ONE),
        case(2, [5, 6, 7], (32, 0, 64), [1, 3, 3], ONE),
        case(2, [1, 1, 1], (32, 0, 32), CUBE, ONE),
    ];
    if !is_slow() {
        cases.push(case(2, [20, 28, 20], (32, 0, 64), CUBE, ONE));
        cases.push(case(2, [20, 28, 20], (16, 0, 16), CUBE, ONE));
        cases.push(case(2, [5, 7, 5], (256, 0, 256), CUBE, ONE));
    }
    cases
}

/// The types that the device under test stores.
pub fn types(context: &Context) -> Vec<Dtype> {
    let caps = context.caps();
    let all = [(Dtype::F32, true), (Dtype::F16, caps.f16), (Dtype::Bf16, caps.bf16)];
    all.into_iter().filter_map(|(dtype, there)| there.then_some(dtype)).collect()
}

pub fn put(context: &Context, values: &[f32], dtype: Dtype) -> Buffer {
    let exact = context.upload_f32(values).unwrap();
    let buffer = context.empty(values.len(), dtype).unwrap();
    elementwise::cast(context, &exact, &buffer).unwrap();
    buffer
}

pub fn get(context: &Context, buffer: &Buffer) -> Vec<f32> {
    let wide = context.empty(buffer.len(), Dtype::F32).unwrap();
    elementwise::cast(context, buffer, &wide).unwrap();
    read(context, &wide)
}
