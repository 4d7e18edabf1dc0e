//! nnU-Net's losses and variants of them, one level. In the first items a tenth of the slices is annotated; in the others
//! everything, or about 5 % in slices, scribbles or blocks.

use super::{Amount, Item, Kind, Place, sparse_labels, suffix, upload, upload_as};
use voxgrad::kernels::loss::{self, Annotation, Entropy, Gradient, Level, LossSettings, Problem, Target};
use voxgrad::kernels::{Dtype, Scale, elementwise};

const BATCH: usize = 2;

/// What is timed.
#[derive(Clone, Copy, PartialEq)]
enum Pass {
    Forward,
    ForwardBackward,
    /// The same kernels unfused: cross-entropy alone, Dice alone, and the sum of their gradients.
    Unfused,
}

pub fn items(place: &Place) -> Vec<Item> {
    // Too large for a software driver, and measured on it in smaller items of `masks`.
    let tenths = if place.kind == Kind::Software { Vec::new() } else { tenths() };
    tenths.into_iter().chain(masks(place)).collect()
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
                                Scale::ONE,
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
            Self::Scattered => hash((z * side + y) * side + x) % 5 != 4,
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

/// nnU-Net's loss, or what differs from it.
#[derive(Clone, Copy, PartialEq)]
enum Variant {
    Plain,
    /// Of the cross-entropies only the largest 10 % of all voxels: nnU-Net's `DC_and_topk_loss`.
    TopK,
    /// Every voxel has a weight between 64 / 255 and 1, in u8.
    Weights,
    /// In each sample nobody looked for one of the classes.
    Missing,
    /// Every other ignored voxel has 255 instead of the first undeclared label.
    TwoIgnores,
    EntropyOnly,
    DiceOnly,
}

impl Variant {
    /// What follows the kind of annotation in an id.
    fn suffix(self) -> &'static str {
        match self {
            Self::Plain => "",
            Self::TopK => "-top_k",
            Self::Weights => "-weights",
            Self::Missing => "-missing",
            Self::TwoIgnores => "-two_ignores",
            Self::EntropyOnly => "-ce_only",
            Self::DiceOnly => "-dice_only",
        }
    }
}

/// One loss: what of, on which voxels and of which numbers.
#[derive(Clone)]
struct Case {
    name: String,
    target: Target,
    side: usize,
    dtype: Dtype,
    annotated: Annotated,
    variant: Variant,
}

/// All kinds of annotation, numbers of classes and types of logits; then variants of the loss.
fn masks(place: &Place) -> Vec<Item> {
    let labels = |classes| (format!("dice_ce-b{BATCH}-c{classes}"), Target::Labels { classes });
    let nested = Target::Regions { labels: 4, regions: vec![vec![1, 2, 3], vec![2, 3], vec![3]] };
    let targets =
        [labels(2), labels(4), labels(14), labels(62), labels(118), (format!("dice_bce-b{BATCH}-r3"), nested)];
    let caps = place.context.caps();
    let mut cases = Vec::new();
    for (dtype, offered) in [(Dtype::F32, true), (Dtype::F16, caps.f16), (Dtype::Bf16, caps.bf16)] {
        if !offered {
            continue;
        }
        let case = |(name, target): (String, Target), annotated, variant| {
            let side = side(place.kind, target.channels());
            Case { name, target, side, dtype, annotated, variant }
        };
        for target in &targets {
            for annotated in [Annotated::Dense, Annotated::Slices, Annotated::Scribbles, Annotated::Blocks] {
                cases.push(case(target.clone(), annotated, Variant::Plain));
            }
        }
        for classes in [4, 14] {
            let dense = [Variant::TopK, Variant::Weights, Variant::Missing, Variant::EntropyOnly, Variant::DiceOnly];
            cases.extend(dense.map(|variant| case(labels(classes), Annotated::Dense, variant)));
            cases.push(case(labels(classes), Annotated::Scattered, Variant::TwoIgnores));
        }
    }
    // What `benches/peers/burn` has too.
    let (name, target) = labels(4);
    let (annotated, variant) = (Annotated::Scattered, Variant::Plain);
    let burn = Case { name, target, side: 32, dtype: Dtype::F32, annotated, variant };
    cases.retain(|case| !(case.side == burn.side && case.id() == burn.id()));
    cases.push(burn);
    if caps.cores.is_none() && caps.shared_memory == 0 {
        eprintln!("# skipped: losses of more than 16 classes, which this device cannot compute without shared memory");
        cases.retain(|case| case.target.channels() <= 16);
    }
    cases.into_iter().map(item).collect()
}

/// Side of the cubes of voxels: a GPU has room and needs it to be busy, a software driver of one is slow.
fn side(kind: Kind, channels: usize) -> usize {
    match kind {
        Kind::Cpu if channels < 62 => 64,
        Kind::Cpu | Kind::Software => 32,
        Kind::Gpu => 128,
    }
}

impl Case {
    fn id(&self) -> String {
        let Self { name, side, annotated, variant, .. } = self;
        let dtype = if self.dtype == Dtype::F32 { "-f32" } else { suffix(self.dtype) };
        let (annotated, variant) = (annotated.name(), variant.suffix());
        format!("loss/{name}-{side}x{side}x{side}{dtype}-{annotated}{variant}/forward_backward")
    }

    fn voxels(&self) -> usize {
        BATCH * self.side.pow(3)
    }

    fn settings(&self) -> LossSettings {
        let declared = self.target.labels() as u16;
        let ignore = (self.annotated != Annotated::Dense).then_some(declared);
        let mut settings = LossSettings::new(self.target.clone(), ignore, false);
        match self.variant {
            Variant::TopK => settings.entropy = Entropy::TopK { percent: 10.0 },
            Variant::TwoIgnores => settings.ignore = vec![declared, 255],
            Variant::EntropyOnly => settings.weight_dice = 0.0,
            Variant::DiceOnly => settings.weight_ce = 0.0,
            Variant::Plain | Variant::Weights | Variant::Missing => (),
        }
        settings
    }

    fn labels(&self) -> Vec<u8> {
        let declared = self.target.labels();
        let mut labels = self.annotated.labels(self.side, declared);
        if self.variant == Variant::TwoIgnores {
            labels
                .iter_mut()
                .step_by(2)
                .filter(|label| usize::from(**label) == declared)
                .for_each(|label| *label = 255);
        }
        labels
    }
}

fn item(case: Case) -> Item {
    let channels = case.target.channels();
    let weights = usize::from(case.variant == Variant::Weights);
    Item {
        id: case.id(),
        // Logits twice, their gradient once, labels and weights twice.
        amount: Amount::Bytes((case.voxels() * (3 * channels * case.dtype.size() + 2 + 2 * weights)) as u64),
        prepare: Box::new(move |context| {
            let (context, variant, dims) = (context.clone(), case.variant, [case.side; 3]);
            let level = Level { dims, weight: 1.0 };
            let problem = Problem::new(&context, &case.settings(), BATCH, dims, &[level]).expect("shape");
            let labels = context.upload(&case.labels(), Dtype::U8).expect("upload");
            let weights: Vec<u8> = (0..case.voxels()).map(|i| 64 + (hash(i) % 192) as u8).collect();
            let weights = (variant == Variant::Weights).then(|| context.upload(&weights, Dtype::U8).expect("upload"));
            // Class 1 of the first sample, and class 2 of the second.
            let missing = (variant == Variant::Missing).then_some([1 << 1, 1 << 2]);
            // Evenly spread over [-4, 4), and simple to repeat in other languages.
            let logits = (0..problem.logits_len(0)).map(|i| (hash(i) as f32 / (1 << 21) as f32) - 4.0);
            let logits = upload_as(&context, &logits.collect::<Vec<f32>>(), case.dtype);
            let gradient = context.empty(logits.len(), case.dtype).expect("allocation");
            let value = context.empty(problem.loss_len(), Dtype::F32).expect("allocation");
            Box::new(move || {
                let missing = missing.as_ref().map(|words| words.as_slice());
                let annotation = Annotation { labels: &labels, missing, weights: weights.as_ref() };
                let gradients = [Gradient::Into(&gradient)];
                loss::value_and_gradient(&context, &problem, &annotation, &[&logits], &gradients, Scale::ONE, &value)
                    .expect("loss");
                context.finish([&value, &gradient]).expect("finish");
            })
        }),
    }
}

/// 24 bits that look random; `benches/peers/loss.py` has the same.
fn hash(i: usize) -> u32 {
    (i as u32).wrapping_mul(2_654_435_761) >> 8
}
