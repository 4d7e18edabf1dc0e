//! nnU-Net's losses, one level. In the first items a tenth of the slices is annotated; in the others everything, or about
//! 5 % in slices, scribbles or blocks.

use super::{Amount, Item, sparse_labels, upload};
use half::f16;
use voxgrad::kernels::Context;
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

pub fn items(context: &Context) -> Vec<Item> {
    tenths().into_iter().chain(masks(context)).collect()
}

/// One slice in ten, with parts of the work.
fn tenths() -> Vec<Item> {
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

/// What is annotated. `benches/peers/loss.py` has the same patterns.
#[derive(Clone, Copy, PartialEq)]
enum Annotated {
    /// Every voxel, and no ignore label is declared.
    Dense,
    /// Every twentieth slice.
    Slices,
    /// In every slice a band along a slanted line, a twentieth as wide as the slice.
    Scribbles,
    /// One in twenty cubes of 8 voxels.
    Blocks,
    /// About four in five voxels, as if at random: hardly a run of voxels that are all ignored.
    Scattered,
}

impl Annotated {
    fn name(self) -> &'static str {
        match self {
            Self::Dense => "dense",
            Self::Slices => "slices",
            Self::Scribbles => "scribbles",
            Self::Blocks => "blocks",
            Self::Scattered => "scattered",
        }
    }

    fn contains(self, side: usize, [z, y, x]: [usize; 3]) -> bool {
        match self {
            Self::Dense => true,
            Self::Slices => z % 20 == 7,
            Self::Scribbles => (y + 2 * side - (x / 2 + 7 * z) % side) % side < side.div_ceil(20),
            Self::Blocks => (3 * (x / 8) + 7 * (y / 8) + 11 * (z / 8)) % 20 == 7,
            Self::Scattered => ((((z * side + y) * side + x) as u32).wrapping_mul(2_654_435_761) >> 16) % 5 != 4,
        }
    }

    /// Labels in cubes of 8 voxels, `[batch, side, side, side]`; `declared` where nothing is annotated.
    fn labels(self, side: usize, declared: usize) -> Vec<u8> {
        let label = |i: usize| {
            let place = [i / side / side % side, i / side % side, i % side];
            let [z, y, x] = place;
            let label = (x / 8 + 3 * (y / 8) + 5 * (z / 8)) % declared;
            if self.contains(side, place) { label as u8 } else { declared as u8 }
        };
        (0..BATCH * side * side * side).map(label).collect()
    }
}

/// All kinds of annotation, numbers of classes and types of logits.
fn masks(context: &Context) -> Vec<Item> {
    // A GPU has room, and needs it to be busy.
    let large = context.caps().cores.is_none() && context.caps().memory.is_none_or(|bytes| bytes > 16 << 30);
    let nested = Target::Regions { labels: 4, regions: vec![vec![1, 2, 3], vec![2, 3], vec![3]] };
    let targets: Vec<(String, Target)> = [2, 4, 14, 62, 118]
        .map(|classes| (format!("dice_ce-b{BATCH}-c{classes}"), Target::Labels { classes }))
        .into_iter()
        .chain([(format!("dice_bce-b{BATCH}-r3"), nested)])
        .collect();
    let mut items = Vec::new();
    for dtype in [Dtype::F32, Dtype::F16] {
        if dtype == Dtype::F16 && !context.caps().f16 {
            continue;
        }
        for (name, target) in &targets {
            let side = match (large, target.channels() < 62) {
                (true, _) => 128,
                (false, true) => 64,
                (false, false) => 32,
            };
            for annotated in [Annotated::Dense, Annotated::Slices, Annotated::Scribbles, Annotated::Blocks] {
                items.push(mask(name, target, dtype, side, annotated));
            }
        }
    }
    // What `benches/peers/burn` has too.
    let four = Target::Labels { classes: 4 };
    items.push(mask(&format!("dice_ce-b{BATCH}-c4"), &four, Dtype::F32, 32, Annotated::Scattered));
    items
}

fn mask(name: &str, target: &Target, dtype: Dtype, side: usize, annotated: Annotated) -> Item {
    let (target, dims) = (target.clone(), [side; 3]);
    let voxels = BATCH * side * side * side;
    let kind = if dtype == Dtype::F16 { "f16" } else { "f32" };
    Item {
        id: format!("loss/{name}-{side}x{side}x{side}-{kind}-{}/forward_backward", annotated.name()),
        // Logits twice, their gradient once, labels twice.
        amount: Amount::Bytes((voxels * (3 * target.channels() * dtype.size() + 2)) as u64),
        prepare: Box::new(move |context| {
            let (context, declared) = (context.clone(), target.labels());
            let ignore = (annotated != Annotated::Dense).then_some(declared as u16);
            let settings = LossSettings::new(target.clone(), ignore, false);
            let problem =
                Problem::new(&context, &settings, BATCH, dims, &[Level { dims, weight: 1.0 }]).expect("shape");
            let labels = context.upload(&annotated.labels(side, declared), Dtype::U8).expect("upload");
            // Evenly spread over [-4, 4), and simple to repeat in other languages.
            let logit = |i: usize| (((i as u32).wrapping_mul(2_654_435_761) >> 8) as f32 / (1 << 21) as f32) - 4.0;
            let logits = match dtype {
                Dtype::F16 => {
                    let values: Vec<f16> = (0..problem.logits_len(0)).map(|i| f16::from_f32(logit(i))).collect();
                    context.upload(&values, dtype)
                }
                _ => context.upload(&(0..problem.logits_len(0)).map(logit).collect::<Vec<f32>>(), dtype),
            };
            let logits = logits.expect("upload");
            let gradient = context.empty(logits.len(), dtype).expect("allocation");
            let value = context.empty(problem.loss_len(), Dtype::F32).expect("allocation");
            Box::new(move || {
                let annotation = (&labels).into();
                let gradients = [Gradient::Into(&gradient)];
                loss::value_and_gradient(&context, &problem, &annotation, &[&logits], &gradients, 1.0, &value)
                    .expect("loss");
                context.finish([&value, &gradient]).expect("finish");
            })
        }),
    }
}
