//! The memory of a training step, counted from shapes alone: the walk below allocates and drops what forward and backward
//! allocate and drop, in the same order.

use super::UNetShape;
use crate::error::{Error, Result};
use crate::kernels::{Caps, Dtype};
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
/// `dtype`. Partial sums and packed weights depend a little on the device: they are counted with their largest size.
pub fn planned_memory(shape: &UNetShape, batch: usize, patch: [usize; 3], dtype: Dtype, fusion: Fusion) -> MemoryPlan {
    let sizes = Sizes { batch, element: dtype.size() };
    let mut walk = Walk { fusion, ..Walk::default() };
    let image = walk.allocate(sizes.tensor(patch, shape.channels_in));
    let labels = walk.allocate(Sizes { batch, element: 1 }.tensor(patch, 1));
    let batch_bytes = walk.now;

    // Forward.
    let mut dims = patch;
    let mut dims_of = Vec::with_capacity(shape.stages.len());
    let mut value = Value { tensor: image, raw: None, gradient: None };
    let mut inputs = shape.channels_in;
    let mut skips = Vec::new();
    for stage in &shape.stages {
        dims = std::array::from_fn(|a| dims[a].div_ceil(stage.stride[a]));
        dims_of.push(dims);
        let output = sizes.tensor(dims, stage.features);
        for _ in 0..stage.encoder_blocks {
            let weights = weight_bytes(stage.kernel, inputs, stage.features);
            value = walk.block(vec![value], output, weights);
            inputs = stage.features;
        }
        walk.hold(value.tensor);
        skips.push(value);
    }
    // The bottleneck is no skip.
    skips.pop().into_iter().for_each(|bottleneck| walk.release(bottleneck.tensor));
    let weights = deep_supervision_weights(shape.levels());
    let levels = weights.iter().filter(|&&weight| weight > 0.0).count();
    let mut logits = Vec::new();
    for s in (0..shape.levels()).rev() {
        let (stage, below) = (&shape.stages[s], &shape.stages[s + 1]);
        let output = sizes.tensor(dims_of[s], stage.features);
        value = walk.convolution(vec![value], output, weight_bytes(below.stride, below.features, stage.features));
        let mut skip = skips.pop();
        let mut inputs = 2 * stage.features;
        for _ in 0..stage.decoder_blocks {
            let from = std::iter::once(value).chain(skip.take()).collect();
            value = walk.block(from, output, weight_bytes(stage.kernel, inputs, stage.features));
            inputs = stage.features;
        }
        if s < levels {
            walk.hold(value.tensor);
            let output = sizes.tensor(dims_of[s], shape.heads);
            logits.push(walk.convolution(vec![value], output, weight_bytes([1; 3], stage.features, shape.heads)));
        }
    }
    walk.release(value.tensor);
    let activations = walk.now - batch_bytes - logits.iter().map(|l| walk.tensors[l.tensor].0).sum::<u64>();

    // Loss and backward.
    for output in &logits {
        let gradient = walk.allocate(walk.tensors[output.tensor].0);
        walk.arrive(output, gradient);
    }
    walk.touch(WORKSPACE);
    logits.iter().for_each(|output| walk.release(output.tensor));
    walk.backward();
    walk.release(labels);
    walk.release(image);

    let padded = |len: usize| 4 * len.next_multiple_of(64) as u64;
    let parameters = 3 * shape.parameter_lengths().map(padded).sum::<u64>();
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

fn weight_bytes(kernel: [usize; 3], inputs: usize, outputs: usize) -> u64 {
    4 * (kernel.iter().product::<usize>() * inputs * outputs) as u64
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

/// What backward does for one operation.
enum Step {
    Convolution { inputs: Vec<(Value, u64)>, output: usize, weights: u64 },
    Norm { raw: usize, input: usize, output: usize },
}

#[derive(Default)]
struct Walk {
    fusion: Fusion,
    /// Bytes, and how many hold it.
    tensors: Vec<(u64, u32)>,
    gradients: Vec<Option<usize>>,
    steps: Vec<Step>,
    now: u64,
    peak: u64,
    largest: u64,
}

impl Walk {
    fn allocate(&mut self, bytes: u64) -> usize {
        self.tensors.push((bytes, 1));
        self.now += bytes;
        self.largest = self.largest.max(bytes);
        self.touch(0);
        self.tensors.len() - 1
    }

    fn hold(&mut self, tensor: usize) {
        self.tensors[tensor].1 += 1;
    }

    fn release(&mut self, tensor: usize) {
        let (bytes, holders) = &mut self.tensors[tensor];
        *holders -= 1;
        if *holders == 0 {
            self.now -= *bytes;
        }
    }

    /// Something of this size lives for a moment.
    fn touch(&mut self, bytes: u64) {
        self.peak = self.peak.max(self.now + bytes);
    }

    fn variable(&mut self) -> usize {
        self.gradients.push(None);
        self.gradients.len() - 1
    }

    /// The tensor that backward keeps of a value, and whether it has to be computed again.
    fn kept(&self, value: &Value) -> (usize, bool) {
        match value.raw {
            Some(raw) if self.fusion.recompute_activations => (raw, true),
            _ => (value.tensor, false),
        }
    }

    /// A convolution or transposed convolution. The inputs are dropped behind it.
    fn convolution(&mut self, inputs: Vec<Value>, output_bytes: u64, weights: u64) -> Value {
        let tensor = self.allocate(output_bytes);
        self.touch(weights + WORKSPACE);
        let output = self.variable();
        for input in &inputs {
            let (kept, _) = self.kept(input);
            self.hold(kept);
            self.release(input.tensor);
        }
        let inputs = inputs.into_iter().map(|input| (input, self.tensors[input.tensor].0)).collect();
        self.steps.push(Step::Convolution { inputs, output, weights });
        Value { tensor, raw: None, gradient: Some(output) }
    }

    /// Convolution, norm, activation. The inputs are dropped behind all three.
    fn block(&mut self, inputs: Vec<Value>, output_bytes: u64, weights: u64) -> Value {
        inputs.iter().for_each(|input| self.hold(input.tensor));
        let raw = self.convolution(inputs.clone(), output_bytes, weights);
        let tensor = self.allocate(output_bytes);
        self.touch(WORKSPACE);
        let output = self.variable();
        if let Some(input) = raw.gradient {
            self.steps.push(Step::Norm { raw: raw.tensor, input, output });
        }
        inputs.iter().for_each(|input| self.release(input.tensor));
        Value { tensor, raw: Some(raw.tensor), gradient: Some(output) }
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
        while let Some(step) = self.steps.pop() {
            match step {
                Step::Convolution { inputs, output, weights } => {
                    let Some(dy) = self.gradients[output].take() else { continue };
                    let again: u64 = inputs.iter().filter(|i| self.kept(&i.0).1).map(|i| i.1).sum();
                    self.largest = self.largest.max(weights);
                    // Values computed again, and the parts that a weight gradient is added up from.
                    self.touch(again + weights + WORKSPACE);
                    for (input, _) in &inputs {
                        let (kept, _) = self.kept(input);
                        self.release(kept);
                    }
                    if inputs.iter().any(|(input, _)| input.gradient.is_some()) {
                        let gradients: Vec<usize> = inputs.iter().map(|&(_, bytes)| self.allocate(bytes)).collect();
                        self.touch(weights);
                        self.release(dy);
                        for ((input, _), gradient) in inputs.iter().zip(gradients) {
                            self.arrive(input, gradient);
                        }
                    } else {
                        self.release(dy);
                    }
                }
                Step::Norm { raw, input, output } => {
                    let Some(dy) = self.gradients[output].take() else { continue };
                    let dx = self.allocate(self.tensors[raw].0);
                    self.touch(WORKSPACE);
                    self.release(dy);
                    self.release(raw);
                    self.gradients[input] = Some(dx);
                }
            }
        }
    }
}
