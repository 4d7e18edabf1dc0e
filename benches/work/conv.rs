//! Convolutions of the shapes that nnU-Net's networks are made of, batch 1.

use super::{Amount, Item, Place, pattern, suffix, upload, upload_as};
use voxgrad::kernels::conv3d::{self, Problem};
use voxgrad::kernels::{Dtype, conv_transpose3d, reduce};

struct Shape {
    channels: (usize, usize),
    kernel: [usize; 3],
    stride: usize,
    dims: [usize; 3],
}

const SHAPES: [Shape; 8] = [
    Shape { channels: (32, 32), kernel: [3, 3, 3], stride: 1, dims: [32, 32, 36] },
    Shape { channels: (32, 32), kernel: [3, 3, 3], stride: 1, dims: [32, 32, 32] },
    Shape { channels: (8, 8), kernel: [3, 3, 3], stride: 1, dims: [40, 56, 40] },
    Shape { channels: (4, 32), kernel: [3, 3, 3], stride: 1, dims: [48, 48, 48] },
    Shape { channels: (64, 64), kernel: [3, 3, 3], stride: 1, dims: [16, 16, 16] },
    Shape { channels: (128, 128), kernel: [3, 3, 3], stride: 1, dims: [8, 8, 8] },
    Shape { channels: (32, 32), kernel: [1, 3, 3], stride: 1, dims: [20, 64, 64] },
    Shape { channels: (32, 64), kernel: [3, 3, 3], stride: 2, dims: [32, 32, 32] },
];

pub fn items(place: &Place) -> Vec<Item> {
    place.dtypes().into_iter().flat_map(of_type).collect()
}

/// Activations and their gradients are of `dtype`; parameters and theirs are f32.
fn of_type(dtype: Dtype) -> Vec<Item> {
    let mut items = Vec::new();
    for Shape { channels: (ci, co), kernel, stride, dims } in SHAPES {
        let problem = Problem::new(1, dims, ci, co, kernel, [stride; 3]).expect("shape");
        let [kd, kh, kw] = kernel;
        let [d, h, w] = dims;
        let id = format!("conv/{ci}-{co}-k{kd}{kh}{kw}-s{stride}-{d}x{h}x{w}{}", suffix(dtype));
        let flops = problem.flops();
        for backward in [false, true] {
            let problem = problem.clone();
            items.push(Item {
                id: format!("{id}/{}", if backward { "forward_backward" } else { "forward" }),
                amount: Amount::Flops(if backward { 3 * flops } else { flops }),
                prepare: Box::new(move |context| {
                    let (context, problem) = (context.clone(), problem.clone());
                    let x = upload_as(&context, &pattern(problem.input_len(), 1), dtype);
                    let weights = upload(&context, problem.weight_len(), 2);
                    let bias = upload(&context, problem.channels_out(), 3);
                    let dy = upload_as(&context, &pattern(problem.output_len(), 4), dtype);
                    let empty = |len, dtype| context.empty(len, dtype).expect("allocation");
                    let (y, dx) = (empty(problem.output_len(), dtype), empty(problem.input_len(), dtype));
                    let dw = empty(problem.weight_len(), Dtype::F32);
                    let db = empty(problem.channels_out(), Dtype::F32);
                    Box::new(move || {
                        conv3d::forward(&context, &problem, &x, None, &weights, Some(&bias), &y).expect("forward");
                        if backward {
                            conv3d::backward_data(&context, &problem, &weights, &dy, &dx, None).expect("data");
                            conv3d::backward_weight(&context, &problem, &x, None, &dy, &dw).expect("weight");
                            let channels = problem.channels_out();
                            reduce::channel_sum(&context, dy.len() / channels, channels, &dy, &db).expect("bias");
                        }
                        context.finish([&y, &dx, &dw, &db]).expect("finish");
                    })
                }),
            });
        }
    }
    let problem = conv_transpose3d::Problem::new(1, [16; 3], 64, 32, [2; 3]).expect("shape");
    for backward in [false, true] {
        let problem = problem.clone();
        items.push(Item {
            id: format!(
                "conv/t64-32-k222-s2-16x16x16{}/{}",
                suffix(dtype),
                if backward { "forward_backward" } else { "forward" }
            ),
            amount: Amount::Flops(if backward { 3 * problem.flops() } else { problem.flops() }),
            prepare: Box::new(move |context| {
                let (context, problem) = (context.clone(), problem.clone());
                let x = upload_as(&context, &pattern(problem.input_len(), 1), dtype);
                let (weights, bias) = (upload(&context, problem.weight_len(), 2), upload(&context, 32, 3));
                let dy = upload_as(&context, &pattern(problem.output_len(), 4), dtype);
                let empty = |len, dtype| context.empty(len, dtype).expect("allocation");
                let (y, dx) = (empty(problem.output_len(), dtype), empty(problem.input_len(), dtype));
                let (dw, db) = (empty(problem.weight_len(), Dtype::F32), empty(32, Dtype::F32));
                Box::new(move || {
                    conv_transpose3d::forward(&context, &problem, &x, &weights, Some(&bias), &y).expect("forward");
                    if backward {
                        conv_transpose3d::backward_data(&context, &problem, &weights, &dy, &dx).expect("data");
                        conv_transpose3d::backward_weight(&context, &problem, &x, &dy, &dw).expect("weight");
                        reduce::channel_sum(&context, dy.len() / 32, 32, &dy, &db).expect("bias");
                    }
                    context.finish([&y, &dx, &dw, &db]).expect("finish");
                })
            }),
        });
    }
    items
}
