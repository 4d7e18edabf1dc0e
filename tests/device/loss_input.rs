//! Settings, buffers, weights and sets of missing classes that make no loss: refused with a typed error before anything is
//! launched.

use crate::common::device;
use crate::common::loss_case::{Case, is_possible, overlapping};
use voxgrad::kernels::loss::{
    Annotation, Entropy, Gradient, Level, LossSettings, Problem, Target, value, value_and_gradient,
};
use voxgrad::kernels::{Buffer, Context, Dtype, KernelError, Scale};

fn labels(classes: usize) -> LossSettings {
    LossSettings::new(Target::Labels { classes }, Some(classes as u16), false)
}

/// Whole tumour, core, enhancing core; label 4 is ignored.
fn nested_regions() -> LossSettings {
    let regions = vec![vec![1, 2, 3], vec![2, 3], vec![3]];
    LossSettings::new(Target::Regions { labels: 4, regions }, Some(4), false)
}

struct Inputs {
    problem: Problem,
    labels: Buffer,
    logits: Buffer,
    gradient: Buffer,
    loss: Buffer,
}

impl Inputs {
    fn new(context: &Context, settings: &LossSettings) -> Self {
        let case = Case::new("inputs", settings.clone(), 2, [2, 3, 4], 1);
        let problem = Problem::new(context, settings, 2, case.dims, &case.levels).expect("shape");
        let narrow: Vec<u8> = case.labels.iter().map(|l| *l as u8).collect();
        Self {
            labels: context.upload(&narrow, Dtype::U8).expect("upload"),
            logits: context.upload_f32(&case.logits[0]).expect("upload"),
            gradient: context.empty(case.logits[0].len(), Dtype::F32).expect("memory"),
            loss: context.empty(problem.loss_len(), Dtype::F32).expect("memory"),
            problem,
        }
    }

    fn run(&self, context: &Context, annotation: &Annotation) -> Result<(), KernelError> {
        let gradients = [Gradient::Into(&self.gradient)];
        let logits = [&self.logits];
        value(context, &self.problem, annotation, &logits, &self.loss)?;
        value_and_gradient(context, &self.problem, annotation, &logits, &gradients, Scale::ONE, &self.loss)
    }
}

fn is_shape(result: Result<(), KernelError>) {
    assert!(matches!(result, Err(KernelError::Shape { .. })), "{result:?}");
}

fn is_dtype(result: Result<(), KernelError>) {
    assert!(matches!(result, Err(KernelError::Dtype { .. })), "{result:?}");
}

#[test]
fn settings_that_make_no_sense_are_refused() {
    let (context, _guard) = device();
    let refuse = |settings: &LossSettings| {
        let dims = [2, 3, 4];
        let result = Problem::new(context, settings, 1, dims, &[Level { dims, weight: 1.0 }]).map(|_| ());
        is_shape(result);
    };
    let base = labels(4);
    let target = |target| LossSettings { target, ..base.clone() };
    let dice = |change: fn(&mut LossSettings)| {
        let mut settings = base.clone();
        change(&mut settings);
        settings
    };
    refuse(&target(Target::Labels { classes: 0 }));
    refuse(&target(Target::Labels { classes: 1025 }));
    refuse(&target(Target::Labels { classes: usize::MAX }));
    refuse(&target(Target::Regions { labels: 4, regions: Vec::new() }));
    refuse(&target(Target::Regions { labels: 0, regions: vec![vec![]] }));
    refuse(&target(Target::Regions { labels: 4, regions: vec![vec![1], vec![4]] }));
    refuse(&target(Target::Regions { labels: 65537, regions: vec![vec![1]] }));
    // The ignore label is also a class.
    refuse(&LossSettings { ignore: vec![3], ..base.clone() });
    refuse(&LossSettings { ignore: vec![4, 255, 0], ..base.clone() });
    for percent in [0.0, -1.0, 100.5, f32::NAN, f32::INFINITY] {
        refuse(&LossSettings { entropy: Entropy::TopK { percent }, ..base.clone() });
    }
    refuse(&LossSettings { entropy: Entropy::MeanOverRegions, ..base.clone() });
    refuse(&LossSettings { entropy: Entropy::TopK { percent: 10.0 }, ..nested_regions() });
    refuse(&dice(|s| s.dice.smooth = -1.0));
    refuse(&dice(|s| s.dice.smooth = f32::NAN));
    refuse(&dice(|s| s.dice.clip_tp = Some(-1.0)));
    refuse(&dice(|s| s.dice.clip_tp = Some(f32::INFINITY)));
    refuse(&dice(|s| (s.weight_ce, s.weight_dice) = (0.0, 0.0)));
    refuse(&dice(|s| s.weight_ce = f32::NAN));
    refuse(&dice(|s| s.weight_dice = f32::INFINITY));
}

#[test]
fn buffers_of_other_lengths_and_types_are_refused() {
    let (context, _guard) = device();
    let inputs = Inputs::new(context, &labels(4));
    let run = |inputs: &Inputs| inputs.run(context, &(&inputs.labels).into());
    run(&inputs).expect("what fits");
    for len in [0usize, 1, 47, 49, 48 * 4] {
        let labels = context.upload(&vec![0u8; len.max(1)], Dtype::U8).expect("upload").part(0, len).expect("part");
        is_shape(inputs.run(context, &(&labels).into()));
    }
    for dtype in [Dtype::F32, Dtype::I32, Dtype::U32] {
        let labels = context.empty(48, dtype).expect("memory");
        is_dtype(inputs.run(context, &(&labels).into()));
    }
    for len in [1usize, 191, 193] {
        let logits = context.empty(len, Dtype::F32).expect("memory");
        is_shape(run(&Inputs { logits, ..Inputs::new(context, &labels(4)) }));
        let gradient = context.empty(len, Dtype::F32).expect("memory");
        is_shape(run(&Inputs { gradient, ..Inputs::new(context, &labels(4)) }));
        let loss = context.empty(len, Dtype::F32).expect("memory");
        is_shape(run(&Inputs { loss, ..Inputs::new(context, &labels(4)) }));
    }
    let logits = context.empty(192, Dtype::U32).expect("memory");
    is_dtype(run(&Inputs { logits, ..Inputs::new(context, &labels(4)) }));
    let gradient = context.empty(192, Dtype::F16).expect("memory");
    is_dtype(run(&Inputs { gradient, ..Inputs::new(context, &labels(4)) }));
    let loss = context.empty(inputs.problem.loss_len(), Dtype::U32).expect("memory");
    is_dtype(run(&Inputs { loss, ..Inputs::new(context, &labels(4)) }));
    // Labels that 8 bits cannot hold.
    if is_possible(&labels(300)) {
        let wide = Inputs::new(context, &labels(300));
        is_dtype(wide.run(context, &(&wide.labels).into()));
    }
    // Numbers of buffers.
    let annotation = (&inputs.labels).into();
    is_shape(value(context, &inputs.problem, &annotation, &[], &inputs.loss));
    let two = [&inputs.logits, &inputs.logits];
    is_shape(value(context, &inputs.problem, &annotation, &two, &inputs.loss));
    is_shape(value_and_gradient(context, &inputs.problem, &annotation, &two[..1], &[], Scale::ONE, &inputs.loss));
}

#[test]
fn weight_maps_that_do_not_fit_are_refused() {
    let (context, _guard) = device();
    let inputs = Inputs::new(context, &labels(4));
    let run = |weights: &Buffer| inputs.run(context, &Annotation { weights: Some(weights), ..(&inputs.labels).into() });
    for len in [1usize, 47, 49, 192] {
        is_shape(run(&context.empty(len, Dtype::F32).expect("memory")));
        is_shape(run(&context.empty(len, Dtype::U8).expect("memory")));
    }
    for dtype in [Dtype::U32, Dtype::I32, Dtype::U16] {
        is_dtype(run(&context.empty(48, dtype).expect("memory")));
    }
    run(&context.upload_f32(&[0.5; 48]).expect("upload")).expect("what fits");
}

#[test]
fn sets_of_missing_classes_that_do_not_fit_are_refused() {
    let (context, _guard) = device();
    let inputs = Inputs::new(context, &labels(4));
    let run = |missing: &[u32]| inputs.run(context, &Annotation { missing: Some(missing), ..(&inputs.labels).into() });
    is_shape(run(&[]));
    is_shape(run(&[0]));
    is_shape(run(&[0, 0, 0]));
    // A class beyond the fourth; the background; everything.
    is_shape(run(&[0, 1 << 4]));
    is_shape(run(&[1 << 31, 0]));
    is_shape(run(&[1, 0]));
    is_shape(run(&[0b1111, 0]));
    run(&[0b0110, 0b1000]).expect("what fits");
    // All classes but the background may be missing; of regions not all, but any.
    run(&[0b1110, 0]).expect("only background annotated");
    let inputs = Inputs::new(context, &nested_regions());
    let run = |missing: &[u32]| inputs.run(context, &Annotation { missing: Some(missing), ..(&inputs.labels).into() });
    is_shape(run(&[0b111, 0]));
    is_shape(run(&[0b1000, 0]));
    run(&[0b001, 0b110]).expect("what fits");
}

#[test]
fn many_channels_without_shared_memory_are_refused_with_the_remedy() {
    let (context, _guard) = device();
    let caps = context.caps();
    let without = caps.cores.is_none() && caps.shared_memory == 0;
    let (dims, levels) = ([2, 3, 4], [Level { dims: [2, 3, 4], weight: 1.0 }]);
    for settings in [labels(17), LossSettings::new(overlapping(17, 6), Some(6), false)] {
        match Problem::new(context, &settings, 1, dims, &levels) {
            Ok(_) => assert!(!without),
            Err(error) => {
                assert!(without && matches!(error, KernelError::Unsupported { .. }), "{error}");
                assert!(error.to_string().contains("use the CPU"), "{error}");
            }
        }
    }
    Problem::new(context, &labels(16), 1, dims, &levels).expect("16 classes");
}
