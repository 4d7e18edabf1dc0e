//! The memory of a training step, counted from shapes alone: the walk below allocates and drops what forward and backward
//! allocate and drop, in the same order.

use super::UNetShape;
use crate::error::{Error, Result};
use crate::kernels::conv3d::{self, Pass, Problem};
use crate::kernels::{Caps, Context, Dtype, conv_transpose3d};
use crate::loss::deep_supervision_weights;
use crate::tape::Fusion;

/// Bytes of one training step. All but `parameters` are gone when the step is over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemoryPlan {
    /// Weights, their gradients and momenta.
    pub parameters: u64,
    /// The image and the label map.
    pub batch: u64,
    /// What forward keeps for backward.
    pub activations: u64,
    /// What the fullest moment holds beyond these: gradients, values computed again, packed weights, partial sums.
    pub temporaries: u64,
    /// The largest single buffer.
    pub largest_buffer: u64,
    /// The most that is held at once.
    pub total: u64,
}

impl MemoryPlan {
    /// Refuses what the device cannot hold, before anything is launched.
    ///
    /// # Errors
    /// [`Error::DeviceMemory`].
    pub fn check(&self, caps: &Caps) -> Result<()> {
        let too_large = |what, needed, limit| Err(Error::DeviceMemory { what, needed, limit });
        if self.largest_buffer > caps.max_buffer {
            return too_large("its largest tensor", self.largest_buffer, caps.max_buffer);
        }
        match caps.memory {
            Some(memory) if self.total > memory => too_large("a training step", self.total, memory),
            _ => Ok(()),
        }
    }
}

/// The memory of a training step on `batch` patches of `patch` voxels (depth, height, width) with activations of type
/// `dtype`, with the algorithms that `context` chooses. Small buffers are counted with their largest size.
pub fn planned_memory(
    context: &Context,
    shape: &UNetShape,
    batch: usize,
    patch: [usize; 3],
    dtype: Dtype,
    fusion: Fusion,
) -> MemoryPlan {
    let sizes = Sizes { batch, element: dtype.size() };
    let mut walk = Walk::new(context, dtype, fusion, true);
    let image = walk.allocate(sizes.tensor(patch, shape.channels_in));
    let labels = walk.allocate(Sizes { batch, element: 1 }.tensor(patch, 1));
    let batch_bytes = walk.now;

    let weights = deep_supervision_weights(shape.levels());
    let levels = weights.iter().filter(|&&weight| weight > 0.0).count();
    let logits = forward(&mut walk, shape, sizes, patch, image, levels);
    let activations = walk.now - batch_bytes - logits.iter().map(|l| walk.tensors[l.tensor].bytes).sum::<u64>();

    // Loss and backward.
    for output in &logits {
        let gradient = walk.allocate(walk.tensors[output.tensor].bytes);
        walk.arrive(output, gradient);
    }
    walk.touch(WORKSPACE);
    logits.iter().for_each(|output| walk.release(output.tensor));
    walk.backward();
    walk.release(labels);
    walk.release(image);

    let parameters = 3 * parameter_bytes(shape);
    let peak = walk.peak;
    MemoryPlan {
        parameters,
        batch: batch_bytes,
        activations,
        temporaries: peak - batch_bytes - activations,
        largest_buffer: walk.largest.max(parameters / 3),
        total: parameters + peak,
    }
}

/// Bytes that predicting one case takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PredictionMemory {
    /// The most that the device holds at once: weights, and one pass over a window.
    pub device: u64,
    /// The largest single buffer of the device.
    pub largest_buffer: u64,
    /// The logits that are added up on the host for the whole case, and their copy when they are averaged.
    pub host: u64,
}

impl PredictionMemory {
    /// Refuses what the device, or the memory that a CPU shares with it, cannot hold.
    ///
    /// # Errors
    /// [`Error::PredictionMemory`], which says what to reduce.
    pub fn check(&self, caps: &Caps) -> Result<()> {
        let too_large = |what, needed, limit, remedy| Err(Error::PredictionMemory { what, needed, limit, remedy });
        let window = "a configuration with a smaller patch, --precision f16, or another device";
        if self.largest_buffer > caps.max_buffer {
            return too_large("the largest tensor of a window", self.largest_buffer, caps.max_buffer, window);
        }
        let Some(memory) = caps.memory else { return Ok(()) };
        if self.device > memory {
            return too_large("a window", self.device, memory, window);
        }
        // Only a CPU's own memory is known here.
        let shared = self.device.saturating_add(self.host);
        if caps.cores.is_some() && shared > memory {
            let remedy = "fewer classes, a configuration with a larger voxel spacing, or an image cut into parts";
            return too_large("a window and the logits of the whole image", shared, memory, remedy);
        }
        Ok(())
    }
}

/// The memory of predicting an image of `image` voxels, padded to at least one window, in windows of `patch` voxels with
/// activations of type `dtype`.
pub fn planned_prediction(
    context: &Context,
    shape: &UNetShape,
    image: [usize; 3],
    patch: [usize; 3],
    dtype: Dtype,
) -> PredictionMemory {
    let sizes = Sizes { batch: 1, element: dtype.size() };
    let floats = Sizes { batch: 1, element: 4 };
    let mut walk = Walk::new(context, dtype, Fusion::default(), false);
    let uploaded = walk.allocate(floats.tensor(patch, shape.channels_in));
    let input = walk.allocate(if dtype == Dtype::F32 { 0 } else { sizes.tensor(patch, shape.channels_in) });
    walk.release(if dtype == Dtype::F32 { input } else { uploaded });
    let input = if dtype == Dtype::F32 { uploaded } else { input };
    walk.hold(input);
    forward(&mut walk, shape, sizes, patch, input, 1);
    if dtype != Dtype::F32 {
        walk.allocate(floats.tensor(patch, shape.heads));
    }
    let parameters = parameter_bytes(shape);
    let padded = std::array::from_fn(|a| image[a].max(patch[a]));
    let sums = floats.tensor(padded, shape.heads).saturating_add(floats.tensor(padded, 1));
    PredictionMemory {
        // Values, gradients and momenta are allocated together.
        device: 3 * parameters + walk.peak,
        largest_buffer: walk.largest.max(parameters),
        host: sums.saturating_add(floats.tensor(image, shape.heads)),
    }
}

/// Bytes of all weights, each padded to a whole number of lines.
fn parameter_bytes(shape: &UNetShape) -> u64 {
    shape.parameter_lengths().map(|len| 4 * len.next_multiple_of(64) as u64).sum()
}

/// The network's forward pass; returns the logits of the `levels` finest resolutions, lowest first.
fn forward(
    walk: &mut Walk,
    shape: &UNetShape,
    sizes: Sizes,
    patch: [usize; 3],
    image: usize,
    levels: usize,
) -> Vec<Value> {
    let mut dims = patch;
    let mut dims_of = Vec::with_capacity(shape.stages.len());
    let mut value = Value { tensor: image, raw: None, gradient: None };
    let mut inputs = shape.channels_in;
    let mut skips = Vec::new();
    for stage in &shape.stages {
        for block in 0..stage.encoder_blocks {
            let stride = if block == 0 { stage.stride } else { [1; 3] };
            let work = walk.work(sizes.batch, dims, [inputs, 0], stage.features, stage.kernel, stride);
            dims = std::array::from_fn(|a| dims[a].div_ceil(stride[a]));
            value = walk.block(vec![value], sizes.tensor(dims, stage.features), work);
            inputs = stage.features;
        }
        dims_of.push(dims);
        walk.hold_value(&value);
        skips.push(value);
    }
    // The bottleneck is no skip.
    skips.pop().into_iter().for_each(|bottleneck| walk.release_value(&bottleneck));
    let mut logits = Vec::new();
    for s in (0..shape.levels()).rev() {
        let (stage, below) = (&shape.stages[s], &shape.stages[s + 1]);
        let output = sizes.tensor(dims_of[s], stage.features);
        let work = walk.upsampling(sizes.batch, dims_of[s + 1], below.features, stage.features, below.stride);
        value = walk.convolution(vec![value], output, work);
        let mut skip = skips.pop();
        for block in 0..stage.decoder_blocks {
            let from = std::iter::once(value).chain(skip.take()).collect();
            let inputs = [stage.features, if block == 0 { stage.features } else { 0 }];
            let work = walk.work(sizes.batch, dims_of[s], inputs, stage.features, stage.kernel, [1; 3]);
            value = walk.block(from, output, work);
        }
        if s < levels {
            walk.hold_value(&value);
            let output = sizes.tensor(dims_of[s], shape.heads);
            let work = walk.work(sizes.batch, dims_of[s], [stage.features, 0], shape.heads, [1; 3], [1; 3]);
            logits.push(walk.convolution(vec![value], output, work));
        }
    }
    walk.release_value(&value);
    logits
}

/// Bytes that PyTorch keeps for the backward pass of the same network, counted by its rules: a convolution saves its
/// input; an instance norm saves its input, the convolution's output; the leaky ReLU works in place and saves its output,
/// which is the next convolution's input; the decoder's concatenation is a tensor of its own, behind which the upsampled
/// half is dropped. `element` is the size of an activation in bytes: 4, or 2 under mixed precision. Logits are left out,
/// on both sides.
pub fn pytorch_kept_bytes(shape: &UNetShape, batch: usize, patch: [usize; 3], element: usize) -> u64 {
    let sizes = Sizes { batch, element };
    let mut dims = patch;
    let mut kept = 0;
    for (s, stage) in shape.stages.iter().enumerate() {
        dims = std::array::from_fn(|a| dims[a].div_ceil(stage.stride[a]));
        let tensor = sizes.tensor(dims, stage.features);
        kept += 2 * tensor * stage.encoder_blocks as u64;
        if s < shape.levels() {
            kept += 2 * tensor * (1 + stage.decoder_blocks as u64);
        }
    }
    kept
}

/// Bound for partial sums and small buffers of a launch.
const WORKSPACE: u64 = 1 << 20;

#[derive(Clone, Copy)]
struct Sizes {
    batch: usize,
    element: usize,
}

impl Sizes {
    fn tensor(&self, dims: [usize; 3], channels: usize) -> u64 {
        // No plan, however absurd, may overflow a sum of a network's tensors.
        let product = |bytes: u64, factor: usize| bytes.saturating_mul(factor as u64);
        let bytes = dims.into_iter().chain([self.batch, channels, self.element]).fold(1, product);
        bytes.min(u64::MAX >> 20)
    }
}

/// A tensor that an operation has put out: the tape's `Var`.
#[derive(Clone, Copy)]
struct Value {
    tensor: usize,
    /// The tensor before norm and activation.
    raw: Option<usize>,
    /// Where its gradient goes; `None` for the image.
    gradient: Option<usize>,
}

/// Bytes that a convolution takes beside its operands.
#[derive(Clone, Copy)]
struct Work {
    forward: u64,
    data_gradient: u64,
    weight_gradient: u64,
}

/// What backward does for a convolution, and the norm behind it if there is one.
struct Step {
    inputs: Vec<(Value, u64)>,
    /// What the norm reads.
    raw: Option<usize>,
    output: usize,
    work: Work,
}

struct Held {
    bytes: u64,
    holders: u32,
}

struct Walk<'a> {
    context: &'a Context,
    dtype: Dtype,
    fusion: Fusion,
    /// Whether backward will follow.
    recording: bool,
    tensors: Vec<Held>,
    gradients: Vec<Option<usize>>,
    steps: Vec<Step>,
    now: u64,
    peak: u64,
    largest: u64,
}

impl<'a> Walk<'a> {
    fn new(context: &'a Context, dtype: Dtype, fusion: Fusion, recording: bool) -> Self {
        let (tensors, gradients, steps) = (Vec::new(), Vec::new(), Vec::new());
        Self { context, dtype, fusion, recording, tensors, gradients, steps, now: 0, peak: 0, largest: 0 }
    }

    /// What a convolution takes. A shape that no kernel takes is refused when it is launched.
    fn work(
        &self,
        batch: usize,
        dims: [usize; 3],
        inputs: [usize; 2],
        outputs: usize,
        kernel: [usize; 3],
        stride: [usize; 3],
    ) -> Work {
        let problem = Problem::new(batch, dims, inputs[0], outputs, kernel, stride);
        let problem = match inputs[1] {
            0 => problem,
            second => problem.and_then(|problem| problem.with_second_input(second)),
        };
        let bytes = |pass| problem.as_ref().map_or(0, |p| conv3d::scratch_bytes(self.context, p, pass, self.dtype));
        Work {
            forward: bytes(Pass::Forward),
            data_gradient: bytes(Pass::DataGradient),
            weight_gradient: bytes(Pass::WeightGradient),
        }
    }

    /// The same of a transposed convolution.
    fn upsampling(&self, batch: usize, dims: [usize; 3], inputs: usize, outputs: usize, stride: [usize; 3]) -> Work {
        let problem = conv_transpose3d::Problem::new(batch, dims, inputs, outputs, stride);
        let bytes =
            |pass| problem.as_ref().map_or(0, |p| conv_transpose3d::scratch_bytes(self.context, p, pass, self.dtype));
        Work {
            forward: bytes(Pass::Forward),
            data_gradient: bytes(Pass::DataGradient),
            weight_gradient: bytes(Pass::WeightGradient),
        }
    }

    fn allocate(&mut self, bytes: u64) -> usize {
        self.tensors.push(Held { bytes, holders: 1 });
        self.now += bytes;
        self.largest = self.largest.max(bytes);
        self.touch(0);
        self.tensors.len() - 1
    }

    fn hold(&mut self, tensor: usize) {
        self.tensors[tensor].holders += 1;
    }

    fn release(&mut self, tensor: usize) {
        let Held { bytes, holders } = &mut self.tensors[tensor];
        *holders -= 1;
        if *holders == 0 {
            self.now -= *bytes;
        }
    }

    /// A variable holds its tensor and what that is computed from.
    fn hold_value(&mut self, value: &Value) {
        self.hold(value.tensor);
        value.raw.into_iter().for_each(|raw| self.hold(raw));
    }

    fn release_value(&mut self, value: &Value) {
        self.release(value.tensor);
        value.raw.into_iter().for_each(|raw| self.release(raw));
    }

    /// Something of this size lives for a moment.
    fn touch(&mut self, bytes: u64) {
        self.peak = self.peak.max(self.now + bytes);
    }

    /// The tensor that backward keeps of a value, and whether it has to be computed again.
    fn kept(&self, value: &Value) -> (usize, bool) {
        match value.raw {
            Some(raw) if self.fusion.recompute_activations => (raw, true),
            _ => (value.tensor, false),
        }
    }

    /// A convolution or transposed convolution. The inputs are dropped behind it.
    fn convolution(&mut self, inputs: Vec<Value>, output_bytes: u64, work: Work) -> Value {
        let tensor = self.convolve(output_bytes, work);
        let gradient = self.record(&inputs, None, work);
        inputs.iter().for_each(|input| self.release_value(input));
        Value { tensor, raw: None, gradient }
    }

    /// Convolution, norm, activation. The inputs are dropped behind all three.
    fn block(&mut self, inputs: Vec<Value>, output_bytes: u64, work: Work) -> Value {
        let raw = self.convolve(output_bytes, work);
        let tensor = self.allocate(output_bytes);
        self.touch(WORKSPACE);
        let gradient = self.record(&inputs, Some(raw), work);
        inputs.iter().for_each(|input| self.release_value(input));
        if self.recording {
            return Value { tensor, raw: Some(raw), gradient };
        }
        self.release(raw);
        Value { tensor, raw: None, gradient }
    }

    fn convolve(&mut self, output_bytes: u64, work: Work) -> usize {
        let output = self.allocate(output_bytes);
        self.touch(work.forward + WORKSPACE);
        output
    }

    /// What backward keeps, and the place of the gradient.
    fn record(&mut self, inputs: &[Value], raw: Option<usize>, work: Work) -> Option<usize> {
        if !self.recording {
            return None;
        }
        self.gradients.push(None);
        let output = self.gradients.len() - 1;
        let kept: Vec<usize> = inputs.iter().map(|input| self.kept(input).0).collect();
        kept.into_iter().for_each(|kept| self.hold(kept));
        raw.into_iter().for_each(|raw| self.hold(raw));
        let inputs = inputs.iter().map(|&input| (input, self.tensors[input.tensor].bytes)).collect();
        self.steps.push(Step { inputs, raw, output, work });
        Some(output)
    }

    /// A gradient is moved in, or added to the one that is there.
    fn arrive(&mut self, value: &Value, gradient: usize) {
        if let Some(variable) = value.gradient {
            match self.gradients[variable] {
                None => self.gradients[variable] = Some(gradient),
                Some(_) => self.release(gradient),
            }
        }
    }

    fn backward(&mut self) {
        while let Some(Step { inputs, raw, output, work }) = self.steps.pop() {
            let Some(mut dy) = self.gradients[output].take() else { continue };
            let needs_gradient = inputs.iter().any(|(input, _)| input.gradient.is_some());
            if let Some(raw) = raw {
                let before_norm = self.allocate(self.tensors[raw].bytes);
                self.touch(WORKSPACE);
                self.release(dy);
                self.release(raw);
                dy = before_norm;
            }
            // Values computed again, and what the weight gradient takes.
            let again: u64 = inputs.iter().filter(|(input, _)| self.kept(input).1).map(|input| input.1).sum();
            self.touch(again + work.weight_gradient + WORKSPACE);
            for (input, _) in &inputs {
                let (kept, _) = self.kept(input);
                self.release(kept);
            }
            let gradients: Vec<usize> = match needs_gradient {
                true => inputs.iter().map(|&(_, bytes)| self.allocate(bytes)).collect(),
                false => Vec::new(),
            };
            if needs_gradient {
                self.touch(work.data_gradient + WORKSPACE);
            }
            self.release(dy);
            for ((input, _), gradient) in inputs.iter().zip(gradients) {
                self.arrive(input, gradient);
            }
        }
    }
}
