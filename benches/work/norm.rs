//! Instance norm and leaky ReLU.

use super::{Amount, Item, upload};
use voxgrad::kernels::Dtype;
use voxgrad::kernels::instance_norm::{self, Norm, NormGradient, Problem};

pub fn items() -> Vec<Item> {
    let (channels, dims) = (32, [32, 32, 36]);
    let voxels: usize = dims.iter().product();
    // Forward reads x twice and writes y; backward reads x and dy twice and writes dx.
    let bytes = (voxels * channels * 4 * 8) as u64;
    vec![Item {
        id: "norm/32-32x32x36/forward_backward".into(),
        amount: Amount::Bytes(bytes),
        prepare: Box::new(move |context| {
            let context = context.clone();
            let problem = Problem::new(1, voxels, channels, Dtype::F32, Some(0.01)).expect("shape");
            let (x, dy) = (upload(&context, problem.elements(), 1), upload(&context, problem.elements(), 2));
            let (gamma, beta) = (upload(&context, channels, 3), upload(&context, channels, 4));
            let empty = |len| context.empty(len, Dtype::F32).expect("allocation");
            let (y, dx) = (empty(problem.elements()), empty(problem.elements()));
            let statistics = empty(problem.statistics_len());
            let (dgamma, dbeta) = (empty(channels), empty(channels));
            Box::new(move || {
                let norm = Norm { statistics: &statistics, gamma: &gamma, beta: &beta };
                let gradient = NormGradient { gamma: &dgamma, beta: &dbeta };
                instance_norm::forward(&context, &problem, &x, &norm, &y).expect("forward");
                instance_norm::backward(&context, &problem, &x, &norm, &dy, &dx, &gradient).expect("backward");
                context.finish([&y, &dx, &dgamma, &dbeta]).expect("finish");
            })
        }),
    }]
}
