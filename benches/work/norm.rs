//! Instance norm and leaky ReLU.

use super::{Amount, Item, Place, pattern, suffix, upload, upload_as};
use voxgrad::kernels::Dtype;
use voxgrad::kernels::instance_norm::{self, Norm, NormGradient, Problem};

pub fn items(place: &Place) -> Vec<Item> {
    let dtypes = place.dtypes();
    dtypes.into_iter().flat_map(|dtype| [[32, 32, 36], [32, 32, 32]].map(|dims| item(dims, dtype))).collect()
}

fn item(dims: [usize; 3], dtype: Dtype) -> Item {
    let channels = 32;
    let voxels: usize = dims.iter().product();
    let [d, h, w] = dims;
    // Forward reads x twice and writes y; backward reads x and dy twice and writes dx.
    let bytes = (voxels * channels * dtype.size() * 8) as u64;
    Item {
        id: format!("norm/32-{d}x{h}x{w}{}/forward_backward", suffix(dtype)),
        amount: Amount::Bytes(bytes),
        prepare: Box::new(move |context| {
            let context = context.clone();
            let problem = Problem::new(1, voxels, channels, dtype, Some(0.01)).expect("shape");
            let [x, dy] = [1, 2].map(|seed| upload_as(&context, &pattern(problem.elements(), seed), dtype));
            let (gamma, beta) = (upload(&context, channels, 3), upload(&context, channels, 4));
            let [y, dx] = [(); 2].map(|()| context.empty(problem.elements(), dtype).expect("allocation"));
            let empty = |len| context.empty(len, Dtype::F32).expect("allocation");
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
    }
}
