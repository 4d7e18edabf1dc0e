//! Random cases of losses, and running the kernels on them.

use super::loss_reference::reference;
use super::{assert_close, context, device, is_slow, read, uniform};
use half::{bf16, f16};
use voxgrad::kernels::loss::{Annotation, Gradient, Level, LossSettings, Problem, Target, value, value_and_gradient};
use voxgrad::kernels::{Buffer, Context, Dtype, KernelError, Scale};

/// Weights of the voxels, `[batch, depth, height, width]`.
#[derive(Clone, Debug)]
pub enum Weights {
    None,
    U8(Vec<u8>),
    F16(Vec<f16>),
    F32(Vec<f32>),
}

#[derive(Clone, Debug)]
pub struct Case {
    pub name: String,
    pub settings: LossSettings,
    pub batch: usize,
    /// Of the label map.
    pub dims: [usize; 3],
    pub levels: Vec<Level>,
    /// `[batch, depth, height, width]`.
    pub labels: Vec<u16>,
    pub weights: Weights,
    /// `[batch, ceil(channels / 32)]`.
    pub missing: Option<Vec<u32>>,
    /// `[batch, depth, height, width, channels]` of each level.
    pub logits: Vec<Vec<f32>>,
    seed: u64,
}

impl Case {
    /// One level of random logits in [-4, 4). The labels come in runs, so that there are whole groups of annotated and
    /// of ignored voxels beside mixed ones; all are annotated if no ignore label is declared.
    pub fn new(name: impl Into<String>, settings: LossSettings, batch: usize, dims: [usize; 3], seed: u64) -> Self {
        let voxels = batch * dims.iter().product::<usize>();
        let declared = settings.target.labels();
        let (which, runs) = (uniform(seed, voxels), uniform(seed + 1, voxels / 11 + 1));
        let label = |v: usize| {
            let ignored = !settings.ignore.is_empty() && (runs[v / 11] > 0.1 || which[v] > 0.8);
            match ignored {
                true => settings.ignore[v % settings.ignore.len()],
                false => (((which[v] + 1.0) / 2.0 * declared as f32) as usize).min(declared - 1) as u16,
            }
        };
        let mut case = Self {
            name: name.into(),
            labels: (0..voxels).map(label).collect(),
            settings,
            batch,
            dims,
            levels: Vec::new(),
            weights: Weights::None,
            missing: None,
            logits: Vec::new(),
            seed,
        };
        case.set_levels(&[(dims, 1.0)]);
        case
    }

    /// Other levels, with new logits.
    pub fn set_levels(&mut self, levels: &[([usize; 3], f32)]) {
        self.levels = levels.iter().map(|&(dims, weight)| Level { dims, weight }).collect();
        let logits = |(i, level): (usize, &Level)| {
            let len = self.batch * level.dims.iter().product::<usize>() * self.channels();
            uniform(self.seed + 100 + i as u64, len).iter().map(|z| 4.0 * z).collect()
        };
        self.logits = self.levels.iter().enumerate().map(logits).collect();
    }

    /// Random weights in [0, 1], a quarter of them 0.
    pub fn weigh(&mut self, dtype: Dtype) {
        let values: Vec<f32> =
            uniform(self.seed + 50, self.voxels()).iter().map(|w| (w + 0.5).max(0.0) / 1.5).collect();
        self.weights = match dtype {
            Dtype::U8 => Weights::U8(values.iter().map(|w| (255.0 * w) as u8).collect()),
            Dtype::F16 => Weights::F16(values.iter().map(|w| f16::from_f32(*w)).collect()),
            _ => Weights::F32(values),
        };
    }

    /// Declares that nobody annotated a class (region) in a sample.
    pub fn miss(&mut self, sample: usize, class: usize) {
        let words = self.channels().div_ceil(32);
        let missing = self.missing.get_or_insert_with(|| vec![0; self.batch * words]);
        missing[sample * words + class / 32] |= 1 << (class % 32);
    }

    pub fn channels(&self) -> usize {
        self.settings.target.channels()
    }

    /// Of the label map, with all samples.
    pub fn voxels(&self) -> usize {
        self.batch * self.dims.iter().product::<usize>()
    }

    pub fn is_missing(&self, sample: usize, class: usize) -> bool {
        let words = self.channels().div_ceil(32);
        self.missing.as_ref().is_some_and(|m| m[sample * words + class / 32] >> (class % 32) & 1 == 1)
    }

    fn weight(&self, voxel: usize) -> f64 {
        match &self.weights {
            Weights::None => 1.0,
            Weights::U8(w) => f64::from(w[voxel]) / 255.0,
            Weights::F16(w) => w[voxel].to_f64(),
            Weights::F32(w) => f64::from(w[voxel]),
        }
    }

    /// Weight of a voxel of the label map; 0 where it is ignored.
    pub fn counts(&self, voxel: usize) -> f64 {
        let (label, sample) = (usize::from(self.labels[voxel]), voxel / (self.voxels() / self.batch));
        let exclusive = matches!(self.settings.target, Target::Labels { .. });
        let ignored = label >= self.settings.target.labels() || (exclusive && self.is_missing(sample, label));
        if ignored { 0.0 } else { self.weight(voxel).max(0.0) }
    }

    /// For each voxel of a level, with all samples, the voxel of the label map that nearest-exact interpolation takes.
    pub fn sources(&self, level: usize) -> Vec<usize> {
        let (from, to) = (self.dims, self.levels[level].dims);
        let source = |i: usize, axis: usize| (2 * i + 1) * from[axis] / (2 * to[axis]);
        let mut sources = Vec::new();
        for sample in 0..self.batch {
            for z in 0..to[0] {
                for y in 0..to[1] {
                    for x in 0..to[2] {
                        let row = (sample * from[0] + source(z, 0)) * from[1] + source(y, 1);
                        sources.push(row * from[2] + source(x, 2));
                    }
                }
            }
        }
        sources
    }
}

/// `count` overlapping regions over `labels` labels; label 0 lies in some of them too.
pub fn overlapping(count: usize, labels: usize) -> Target {
    let regions = (0..count).map(|r| (0..labels).filter(|l| (l * 7 + r * 3) % 5 < 2).map(|l| l as u16).collect());
    Target::Regions { labels, regions: regions.collect() }
}

/// Whether the device under test computes such a loss. Where it has too many channels for the device, that is said.
pub fn is_possible(settings: &LossSettings) -> bool {
    let dims = [1; 3];
    // Of its own: tests beside this one count what is allocated on the other.
    let context = Context::new(context().client().clone());
    match Problem::new(&context, settings, 1, dims, &[Level { dims, weight: 1.0 }]) {
        Err(error @ KernelError::Unsupported { .. }) => {
            println!("skipped: {} channels: {error}", settings.target.channels());
            false
        }
        _ => true,
    }
}

// ---------------------------------------------------------------------------------------------------------
// Running the kernels.

const CANARY: f32 = -7.25;

#[derive(Clone, Debug)]
pub struct Outcome {
    pub loss: Vec<f32>,
    pub gradients: Vec<Vec<f32>>,
}

impl Outcome {
    /// All numbers, to compare runs bit for bit.
    pub fn bits(&self) -> Vec<u32> {
        self.loss.iter().chain(self.gradients.iter().flatten()).map(|v| v.to_bits()).collect()
    }
}

/// The case's annotation on the device.
pub struct Uploaded {
    labels: Buffer,
    weights: Option<Buffer>,
    missing: Option<Vec<u32>>,
}

impl Uploaded {
    pub fn new(context: &Context, case: &Case) -> Self {
        let narrow: Vec<u8> = case.labels.iter().filter_map(|l| u8::try_from(*l).ok()).collect();
        let labels = match narrow.len() == case.labels.len() && case.settings.target.labels() <= 256 {
            true => context.upload(&narrow, Dtype::U8),
            false => context.upload(&case.labels, Dtype::U16),
        };
        let weights = match &case.weights {
            Weights::None => None,
            Weights::U8(w) => Some(context.upload(w, Dtype::U8)),
            Weights::F16(w) => Some(context.upload(w, Dtype::F16)),
            Weights::F32(w) => Some(context.upload(w, Dtype::F32)),
        };
        Self {
            labels: labels.expect(&case.name),
            weights: weights.map(|w| w.expect(&case.name)),
            missing: case.missing.clone(),
        }
    }

    pub fn annotation(&self) -> Annotation<'_> {
        Annotation { labels: &self.labels, missing: self.missing.as_deref(), weights: self.weights.as_ref() }
    }
}

/// Value and gradient in f32, with NaN in all outputs before and canaries behind them, and the value alone.
pub fn run(context: &Context, case: &Case) -> Outcome {
    try_run(context, case).unwrap_or_else(|error| panic!("{}: {error}", case.name))
}

/// As [`run`], for cases that the kernels may refuse.
pub fn try_run(context: &Context, case: &Case) -> Result<Outcome, KernelError> {
    let problem = Problem::new(context, &case.settings, case.batch, case.dims, &case.levels)?;
    let guarded = |len: usize| {
        let mut values = vec![f32::NAN; len];
        values.extend([CANARY; 64]);
        let buffer = context.upload_f32(&values).expect("upload");
        (buffer.part(0, len).expect("part"), buffer)
    };
    let (loss, whole_loss) = guarded(problem.loss_len());
    let (loss_alone, whole_loss_alone) = guarded(problem.loss_len());
    let uploaded = Uploaded::new(context, case);
    let logits: Vec<Buffer> = case.logits.iter().map(|z| context.upload_f32(z).expect("upload")).collect();
    let logits: Vec<&Buffer> = logits.iter().collect();
    let (parts, wholes): (Vec<Buffer>, Vec<Buffer>) =
        (0..case.levels.len()).map(|level| guarded(problem.logits_len(level))).unzip();
    let gradients: Vec<Gradient> = parts.iter().map(Gradient::Into).collect();
    value_and_gradient(context, &problem, &uploaded.annotation(), &logits, &gradients, Scale::ONE, &loss)?;
    value(context, &problem, &uploaded.annotation(), &logits, &loss_alone)?;
    for whole in wholes.iter().chain([&whole_loss, &whole_loss_alone]) {
        let values = read(context, whole);
        assert!(values[values.len() - 64..].iter().all(|v| *v == CANARY), "{}: wrote behind an output", case.name);
    }
    let outcome =
        Outcome { loss: read(context, &loss), gradients: parts.iter().map(|part| read(context, part)).collect() };
    let alone = Outcome { loss: read(context, &loss_alone), gradients: outcome.gradients.clone() };
    assert_eq!(outcome.bits(), alone.bits(), "{}: the value alone differs", case.name);
    Ok(outcome)
}

/// Value and gradient in f32, with the gradient over the logits.
pub fn run_in_place(context: &Context, case: &Case) -> Outcome {
    let problem = Problem::new(context, &case.settings, case.batch, case.dims, &case.levels).expect(&case.name);
    let uploaded = Uploaded::new(context, case);
    let buffers: Vec<Buffer> = case.logits.iter().map(|z| context.upload_f32(z).expect("upload")).collect();
    let logits: Vec<&Buffer> = buffers.iter().collect();
    let loss = context.empty(problem.loss_len(), Dtype::F32).expect("memory");
    let in_place = vec![Gradient::InPlace; buffers.len()];
    value_and_gradient(context, &problem, &uploaded.annotation(), &logits, &in_place, Scale::ONE, &loss)
        .unwrap_or_else(|error| panic!("{}: {error}", case.name));
    Outcome { loss: read(context, &loss), gradients: buffers.iter().map(|buffer| read(context, buffer)).collect() }
}

/// What software Vulkan's `exp` and the f32 sums of the kernels are allowed to be off, relative.
pub fn tolerance() -> f64 {
    if is_slow() { 2e-5 } else { 2e-6 }
}

/// Holds the kernels to the reference: value, gradient, and that gradients of ignored voxels are exactly 0.
pub fn check(case: &Case) -> Outcome {
    let (context, _guard) = device();
    check_on(context, case)
}

/// As [`check`], for those who hold the device already.
pub fn check_on(context: &Context, case: &Case) -> Outcome {
    let outcome = run(context, case);
    let expected = reference(case);
    assert_close(&format!("{}: loss", case.name), &outcome.loss, &expected.loss, tolerance());
    for (level, (actual, expected)) in outcome.gradients.iter().zip(&expected.gradients).enumerate() {
        if case.levels[level].weight == 0.0 {
            assert!(actual.iter().all(|g| g.is_nan()), "{}: level {level} was touched", case.name);
            continue;
        }
        assert_close(&format!("{}: gradient {level}", case.name), actual, expected, tolerance());
        for (v, source) in case.sources(level).iter().enumerate().filter(|(_, s)| case.counts(**s) == 0.0) {
            let gradient = &actual[v * case.channels()..][..case.channels()];
            assert!(gradient.iter().all(|g| *g == 0.0), "{}: voxel {v} (label {source}) is ignored", case.name);
        }
    }
    outcome
}

/// The case with its logits rounded to f16 or bf16, and the gradient that the kernels compute from logits of that type.
pub fn run_narrow(context: &Context, case: &Case, dtype: Dtype, scale: f32) -> (Case, Outcome) {
    let mut rounded = case.clone();
    let narrow = |z: f32| if dtype == Dtype::F16 { f16::from_f32(z).to_bits() } else { bf16::from_f32(z).to_bits() };
    let wide = |z: u16| if dtype == Dtype::F16 { f16::from_bits(z).to_f32() } else { bf16::from_bits(z).to_f32() };
    rounded.logits.iter_mut().flatten().for_each(|z| *z = wide(narrow(*z)));
    let problem = Problem::new(context, &case.settings, case.batch, case.dims, &case.levels).expect(&case.name);
    let uploaded = Uploaded::new(context, case);
    let bits = |z: &Vec<f32>| z.iter().map(|z| narrow(*z)).collect::<Vec<u16>>();
    let logits: Vec<Buffer> = case.logits.iter().map(|z| context.upload(&bits(z), dtype).expect("upload")).collect();
    let logits: Vec<&Buffer> = logits.iter().collect();
    let into: Vec<Buffer> = logits.iter().map(|z| context.empty(z.len(), dtype).expect("memory")).collect();
    let gradients: Vec<Gradient> = into.iter().map(Gradient::Into).collect();
    let loss = context.empty(problem.loss_len(), Dtype::F32).expect("memory");
    value_and_gradient(context, &problem, &uploaded.annotation(), &logits, &gradients, Scale::Fixed(scale), &loss)
        .unwrap_or_else(|error| panic!("{}: {error}", case.name));
    let loss = read(context, &loss);
    let download = |g: &Buffer| {
        let bits: Vec<u16> = context.download(g).expect("download");
        bits.iter().map(|g| wide(*g) / scale).collect()
    };
    (rounded, Outcome { loss, gradients: into.iter().map(download).collect() })
}
