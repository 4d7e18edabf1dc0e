//! Winograd's convolution beside the direct one, pass by pass, batch 1. FLOPs are the direct one's in both.

use super::{Amount, Item, upload};
use voxgrad::kernels::conv3d::{self, Pass, Policy, Problem};
use voxgrad::kernels::{Buffer, Context, Dtype};

struct Shape {
    channels: (usize, usize, usize), // first input, second input, output
    kernel: [usize; 3],
    dims: [usize; 3],
}

const fn shape(channels: (usize, usize, usize), kernel: [usize; 3], dims: [usize; 3]) -> Shape {
    Shape { channels, kernel, dims }
}

const SHAPES: [Shape; 10] = [
    shape((32, 0, 32), [3; 3], [32, 32, 36]),
    shape((32, 32, 32), [3; 3], [40, 56, 40]),
    shape((64, 0, 64), [3; 3], [16, 16, 16]),
    shape((128, 0, 128), [3; 3], [8, 8, 8]),
    shape((256, 0, 256), [3; 3], [5, 7, 5]),
    shape((8, 0, 8), [3; 3], [40, 56, 40]),
    shape((8, 8, 8), [3; 3], [40, 56, 40]),
    shape((16, 0, 16), [3; 3], [40, 56, 40]),
    shape((16, 16, 16), [3; 3], [20, 28, 20]),
    shape((32, 0, 32), [1, 3, 3], [20, 64, 64]),
];

pub fn items() -> Vec<Item> {
    let mut items = Vec::new();
    for Shape { channels: (first, second, out), kernel, dims } in SHAPES {
        let mut problem = Problem::new(1, dims, first, out, kernel, [1; 3]).expect("shape");
        if second > 0 {
            problem = problem.with_second_input(second).expect("shape");
        }
        let [[kd, kh, kw], [d, h, w]] = [kernel, dims];
        for (pass, name) in [(Pass::Forward, "forward"), (Pass::DataGradient, "data"), (Pass::WeightGradient, "weight")]
        {
            for (exact, algorithm) in [(true, "direct"), (false, "winograd")] {
                let problem = problem.clone();
                items.push(Item {
                    id: format!("winograd/{first}+{second}-{out}-k{kd}{kh}{kw}-{d}x{h}x{w}/{name}/{algorithm}"),
                    amount: Amount::Flops(problem.flops()),
                    prepare: Box::new(move |context| {
                        run(Policy::default().with_exact(exact).on(context), problem.clone(), pass, second > 0)
                    }),
                });
            }
        }
    }
    items
}

fn run(context: Context, problem: Problem, pass: Pass, two: bool) -> Box<dyn FnMut()> {
    let x = upload(&context, problem.input_len(), 1);
    let second = two.then(|| upload(&context, problem.second_len(), 2));
    let weights = upload(&context, problem.weight_len(), 3);
    let dy = upload(&context, problem.output_len(), 4);
    let empty = |len| -> Buffer { context.empty(len, Dtype::F32).expect("allocation") };
    let (y, dx, dw) = (empty(problem.output_len()), empty(problem.input_len()), empty(problem.weight_len()));
    let second_dx = two.then(|| empty(problem.second_len()));
    Box::new(move || {
        let (second, second_dx) = (second.as_ref(), second_dx.as_ref());
        match pass {
            Pass::Forward => conv3d::forward(&context, &problem, &x, second, &weights, None, &y),
            Pass::DataGradient => conv3d::backward_data(&context, &problem, &weights, &dy, &dx, second_dx),
            Pass::WeightGradient => conv3d::backward_weight(&context, &problem, &x, second, &dy, &dw),
        }
        .expect("launch");
        context.finish([&y, &dx, &dw]).expect("finish");
    })
}
