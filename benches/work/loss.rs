//! nnU-Net's losses with an ignore label, one level, a tenth of the slices annotated.

use super::{Amount, Item, sparse_labels, upload};
use voxgrad::kernels::loss::{self, Gradient, Level, LossSettings, Problem, Target};
use voxgrad::kernels::{Dtype, elementwise};

const BATCH: usize = 2;

/// What is timed.
#[derive(Clone, Copy, PartialEq)]
enum Pass {
    Forward,
    ForwardBackward,
    /// The same kernels unfused: cross-entropy alone, Dice alone, and the sum of their gradients.
    Unfused,
}

pub fn items() -> Vec<Item> {
    let labels = [(4, 64), (14, 64), (62, 32)].map(|(classes, side)| {
        (format!("loss/dice_ce-b2-c{classes}-{side}x{side}x{side}"), Target::Labels { classes }, side)
    });
    let nested = vec![vec![1, 2, 3], vec![2, 3], vec![3]];
    let regions = ("loss/dice_bce-b2-r3-64x64x64".to_string(), Target::Regions { labels: 4, regions: nested }, 64);
    let mut items = Vec::new();
    for (id, target, side) in labels.into_iter().chain([regions]) {
        for pass in [Pass::Forward, Pass::ForwardBackward, Pass::Unfused] {
            let (target, dims) = (target.clone(), [side; 3]);
            let voxels = BATCH * side * side * side;
            let (name, passes) = match pass {
                Pass::Forward => ("forward", 1),
                Pass::ForwardBackward => ("forward_backward", 3),
                Pass::Unfused => ("forward_backward_unfused", 3),
            };
            items.push(Item {
                id: format!("{id}/{name}"),
                // Logits are read once a pass and the gradient is written; labels are read once a pass.
                amount: Amount::Bytes((voxels * (passes * 4 * target.channels() + passes.min(2))) as u64),
                prepare: Box::new(move |context| {
                    let context = context.clone();
                    let declared = match &target {
                        Target::Labels { classes } => *classes,
                        Target::Regions { labels, .. } => *labels,
                    };
                    let settings = LossSettings::new(target.clone(), Some(declared as u16), false);
                    let level = Level { dims, weight: 1.0 };
                    let problem = |weight_ce, weight_dice| {
                        let settings = LossSettings { weight_ce, weight_dice, ..settings.clone() };
                        Problem::new(&context, &settings, BATCH, dims, &[level]).expect("shape")
                    };
                    let parts = [problem(1.0, 0.0), problem(0.0, 1.0)];
                    let problem = problem(1.0, 1.0);
                    let labels = context.upload(&sparse_labels(BATCH, dims, declared), Dtype::U8).expect("upload");
                    let logits = upload(&context, problem.logits_len(0), 1);
                    let into = context.empty(logits.len(), Dtype::F32).expect("allocation");
                    let second = context.empty(logits.len(), Dtype::F32).expect("allocation");
                    let value = context.empty(problem.loss_len(), Dtype::F32).expect("allocation");
                    Box::new(move || {
                        let both = |problem: &Problem, gradient| {
                            let gradient = [Gradient::Into(gradient)];
                            loss::value_and_gradient(
                                &context,
                                problem,
                                &(&labels).into(),
                                &[&logits],
                                &gradient,
                                1.0,
                                &value,
                            )
                            .expect("loss");
                        };
                        match pass {
                            Pass::Forward => {
                                loss::value(&context, &problem, &(&labels).into(), &[&logits], &value).expect("loss");
                            }
                            Pass::ForwardBackward => both(&problem, &into),
                            Pass::Unfused => {
                                both(&parts[0], &into);
                                both(&parts[1], &second);
                                elementwise::add_assign(&context, &into, &second).expect("sum");
                            }
                        }
                        context.finish([&value, &into]).expect("finish");
                    })
                }),
            });
        }
    }
    items
}
