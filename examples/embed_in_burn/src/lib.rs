//! voxgrad's fused Dice + cross-entropy as an operation of [Burn](https://burn.dev) with a gradient of its own.
//!
//! ```no_run
//! use burn::tensor::{DType, Device, Int, Tensor, TensorData};
//! use embed_in_burn::DiceEntropy;
//! use voxgrad_kernels::loss::{LossSettings, Target};
//!
//! # fn main() -> Result<(), embed_in_burn::LossError> {
//! let device = Device::cpu();
//! let settings = LossSettings::new(Target::Labels { classes: 4 }, Some(4), false); // label 4: not annotated
//! let loss = DiceEntropy::new(&device, &settings, 2, [32, 32, 32])?;
//!
//! let tracked = device.clone().autodiff();
//! let logits = Tensor::<5>::zeros([2, 32, 32, 32, 4], &tracked).require_grad(); // [batch, depth, height, width, class]
//! let labels = TensorData::new(vec![4u8; 2 * 32 * 32 * 32], [2, 32, 32, 32]);
//! let labels = Tensor::<4, Int>::from_data(labels, (&device, DType::U8));
//! let gradients = loss.forward(logits.clone(), labels)?.backward();
//! let gradient = logits.grad(&gradients);
//! # Ok(()) }
//! ```
//!
//! Nothing is copied on the way: the kernels read Burn's buffers through Burn's client, and the value and the gradient
//! that they write become Burn tensors. So layouts must be voxgrad's own. Logits are *channels-last*,
//! `[batch, depth, height, width, class]`, and contiguous; a network of channels-first layers ends in [`channels_last`],
//! which is one copy in either direction, or in a last layer that is a matrix product over `[voxels, channels]`, which is
//! none. A tensor that is not contiguous is refused with [`LossError::NotContiguous`], and never rearranged silently.
//!
//! How it works, top-down: [`DiceEntropy::forward`] checks what can be checked without touching data and asks Burn to
//! find the backend; `Autodiff<Cube>` is then given the gradient in the forward pass, since the kernels compute it from
//! the same sums, and multiplies it by the incoming one in the backward pass. Burn's `Cube` backend queues operations to
//! fuse them: taking a tensor's buffer out of that queue runs what is queued before it, and does not wait for the device.

mod composed;

pub use composed::composed_loss;

use burn::backend::autodiff::checkpoint::{base::Checkpointer, strategy::CheckpointStrategy};
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, Ops, OpsKind, unary};
use burn::backend::fusion::{NoOp, get_client};
use burn::backend::ir::{BackendIr, InitOperationIr, OperationIr, OperationOutput};
use burn::backend::ops::FloatTensorOps;
use burn::backend::tensor::{FloatTensor, IntTensor};
use burn::backend::{
    Autodiff, Backend, Cube, Dispatch, DispatchDevice, ExtensionType, StreamId, TensorMetadata, backend_extension,
};
use burn::tensor::{DType, Device, Int, Shape, Tensor};
use burn_cubecl::{CubeBackend, CubeDevice, tensor::CubeTensor};
use std::sync::Arc;
use voxgrad_kernels::loss::{self, Gradient, Level, LossSettings, Problem};
use voxgrad_kernels::{Buffer, Context, Dtype, KernelError, Scale};

/// Why a loss was not computed.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum LossError {
    /// Burn has other backends too.
    #[error("voxgrad's kernels run on Burn's CubeCL devices (cpu, vulkan, cuda, ..), and this is {0}")]
    NotCubeCl(String),
    /// A tensor lies elsewhere than the loss that was made.
    #[error("the loss was made for {expected}, but the {what} are on {actual}")]
    OtherDevice {
        /// Which tensor.
        what: &'static str,
        /// The device of the loss.
        expected: String,
        /// The device of the tensor.
        actual: String,
    },
    /// A tensor has another shape than the loss that was made.
    #[error("the loss was made for {what} of shape {expected:?}, got {actual:?}")]
    Shape {
        /// Which tensor.
        what: &'static str,
        /// The shape that it has to have.
        expected: Vec<usize>,
        /// Its shape.
        actual: Vec<usize>,
    },
    /// The kernels have no such element type.
    #[error("{what} of type {actual:?}: logits are f32, f16 or bf16, labels U8")]
    ElementType {
        /// Which tensor.
        what: &'static str,
        /// Its element type.
        actual: DType,
    },
    /// A tensor is a view that is not laid out in the order of its axes.
    #[error("the {what} are not contiguous (shape {shape:?}, strides {strides:?}): see channels_last")]
    NotContiguous {
        /// Which tensor.
        what: &'static str,
        /// Its shape.
        shape: Vec<usize>,
        /// Its strides in elements.
        strides: Vec<usize>,
    },
    /// The kernels' own checks.
    #[error(transparent)]
    Kernel(#[from] KernelError),
}

/// nnU-Net's Dice + (binary) cross-entropy for tensors of one shape. Made once, used for every step; clones share it.
#[derive(Clone, Debug)]
pub struct DiceEntropy(Arc<Prepared>);

#[derive(Debug)]
struct Prepared {
    device: CubeDevice,
    context: Context,
    problem: Problem,
    logits: [usize; 5],
}

impl DiceEntropy {
    /// A loss for label maps `[batch, depth, height, width]`.
    ///
    /// # Errors
    /// [`LossError::NotCubeCl`] for a device of another backend, [`LossError::Kernel`] for settings or shapes that make
    /// no sense.
    pub fn new(device: &Device, settings: &LossSettings, batch: usize, dims: [usize; 3]) -> Result<Self, LossError> {
        let device = cube_device(device).ok_or_else(|| LossError::NotCubeCl(format!("{device:?}")))?;
        let context = Context::new(device.client());
        let problem = Problem::new(&context, settings, batch, dims, &[Level { dims, weight: 1.0 }])?;
        let logits = [batch, dims[0], dims[1], dims[2], settings.target.channels()];
        Ok(Self(Arc::new(Prepared { device, context, problem, logits })))
    }

    /// The loss, of shape `[1]` in f32, and differentiable with respect to the logits.
    ///
    /// * `logits`: `[batch, depth, height, width, class or region]`, contiguous, in f32, f16 or bf16.
    /// * `labels`: `[batch, depth, height, width]`, contiguous, of type U8.
    ///
    /// # Errors
    /// All of [`LossError`].
    pub fn forward(&self, logits: Tensor<5>, labels: Tensor<4, Int>) -> Result<Tensor<1>, LossError> {
        self.check("logits", &logits.device(), &logits.dims(), &self.0.logits)?;
        self.check("labels", &labels.device(), &labels.dims(), &self.0.logits[..4])?;
        let outcome = Dispatch::dice_entropy(logits.into_dispatch(), labels.into_dispatch(), self.clone());
        match outcome {
            Outcome::Computed(value) => Ok(Tensor::from_dispatch(value)),
            Outcome::Refused(error) => Err(error),
        }
    }

    /// Checks that Burn would answer with a panic, because its dispatch and backward pass return no errors.
    fn check(&self, what: &'static str, device: &Device, shape: &[usize], expected: &[usize]) -> Result<(), LossError> {
        let here = cube_device(device).ok_or_else(|| LossError::NotCubeCl(format!("{device:?}")))?;
        if here != self.0.device {
            let (expected, actual) = (format!("{:?}", self.0.device), format!("{here:?}"));
            return Err(LossError::OtherDevice { what, expected, actual });
        }
        if shape != expected {
            return Err(LossError::Shape { what, expected: expected.to_vec(), actual: shape.to_vec() });
        }
        Ok(())
    }

    fn value(&self, logits: FloatTensor<Cube>, labels: IntTensor<Cube>) -> Result<FloatTensor<Cube>, LossError> {
        let Prepared { context, problem, .. } = &*self.0;
        let (logits, labels) = (cube_float(logits), cube_int(labels));
        let value = context.empty(problem.loss_len(), Dtype::F32)?;
        let labels = buffer(&labels, "labels")?;
        loss::value(context, problem, &(&labels).into(), &[&buffer(&logits, "logits")?], &value)?;
        Ok(self.first_of(&value))
    }

    fn value_and_gradient(
        &self,
        logits: FloatTensor<Cube>,
        labels: IntTensor<Cube>,
    ) -> Result<(FloatTensor<Cube>, FloatTensor<Cube>), LossError> {
        let Prepared { context, problem, .. } = &*self.0;
        let (logits, labels) = (cube_float(logits), cube_int(labels));
        let (source, labels) = (buffer(&logits, "logits")?, buffer(&labels, "labels")?);
        let gradient = context.empty(source.len(), source.dtype())?;
        let value = context.empty(problem.loss_len(), Dtype::F32)?;
        let into = [Gradient::Into(&gradient)];
        loss::value_and_gradient(context, problem, &(&labels).into(), &[&source], &into, Scale::ONE, &value)?;
        Ok((self.first_of(&value), self.burn_tensor(&gradient, Shape::new(self.0.logits), logits.dtype)))
    }

    /// The total, which is the first of the numbers that the kernels report.
    fn first_of(&self, value: &Buffer) -> FloatTensor<Cube> {
        let behind = (value.len() - 1) * value.dtype().size();
        let handle = value.handle().clone().offset_end(behind as u64);
        self.burn_handle(handle, Shape::new([1]), DType::F32)
    }

    fn burn_tensor(&self, buffer: &Buffer, shape: Shape, dtype: DType) -> FloatTensor<Cube> {
        self.burn_handle(buffer.handle().clone(), shape, dtype)
    }

    /// A Burn tensor over memory that the kernels wrote.
    fn burn_handle(
        &self,
        handle: burn_cubecl::cubecl::server::Handle,
        shape: Shape,
        dtype: DType,
    ) -> FloatTensor<Cube> {
        let Prepared { device, context, .. } = &*self.0;
        let tensor = CubeTensor::new_contiguous(context.client().clone(), device.clone(), shape.clone(), handle, dtype);
        let queue = get_client::<CubeBackend>(device);
        let known = CubeBackend::float_tensor_handle(tensor);
        let description = InitOperationIr::create(shape, dtype, || queue.register_tensor_handle(known));
        queue.register(StreamId::current(), OperationIr::Init(description), NoOp::<CubeBackend>::new()).output()
    }
}

/// `[batch, class, depth, height, width]` as contiguous `[batch, depth, height, width, class]`: one copy, and one of
/// the gradient on the way back.
pub fn channels_last(logits: Tensor<5>) -> Tensor<5> {
    let [batch, classes, depth, height, width] = logits.dims();
    // A permuted tensor is a view; a flat one cannot be, so that Burn lays it out anew.
    let flat: Tensor<1> = logits.permute([0, 2, 3, 4, 1]).reshape([batch * depth * height * width * classes]);
    flat.reshape([batch, depth, height, width, classes])
}

// ---------------------------------------------------------------------------------------------------------
// The operation, as Burn dispatches it.

/// Burn's dispatch passes tensors and structures of tensors, but no `Result` of them.
#[derive(ExtensionType)]
enum Outcome<B: Backend> {
    Computed(FloatTensor<B>),
    Refused(LossError),
}

#[backend_extension(Cube, Autodiff)]
trait DiceEntropyBackend: Backend {
    fn dice_entropy(logits: FloatTensor<Self>, labels: IntTensor<Self>, loss: DiceEntropy) -> Outcome<Self>;
}

impl DiceEntropyBackend for Cube {
    fn dice_entropy(logits: FloatTensor<Self>, labels: IntTensor<Self>, loss: DiceEntropy) -> Outcome<Self> {
        match loss.value(logits, labels) {
            Ok(value) => Outcome::Computed(value),
            Err(error) => Outcome::Refused(error),
        }
    }
}

impl<C: CheckpointStrategy> DiceEntropyBackend for Autodiff<Cube, C> {
    fn dice_entropy(logits: FloatTensor<Self>, labels: IntTensor<Self>, loss: DiceEntropy) -> Outcome<Self> {
        let outcome = match DiceEntropyBackward.prepare::<C>([logits.node()]).compute_bound().stateful() {
            OpsKind::Tracked(operation) => loss
                .value_and_gradient(logits.into_primitive(), labels)
                .map(|(value, gradient)| operation.finish(gradient, value)),
            OpsKind::UnTracked(operation) => {
                loss.value(logits.into_primitive(), labels).map(|value| operation.finish(value))
            }
        };
        match outcome {
            Ok(value) => Outcome::Computed(value),
            Err(error) => Outcome::Refused(error),
        }
    }
}

#[derive(Debug)]
struct DiceEntropyBackward;

impl Backward<Cube, 1> for DiceEntropyBackward {
    /// The gradient for an incoming one of 1.
    type State = FloatTensor<Cube>;

    fn backward(self, ops: Ops<Self::State, 1>, grads: &mut Gradients, _: &mut Checkpointer) {
        let gradient = ops.state;
        unary::<Cube, _>(ops.parents, ops.node, grads, |incoming| {
            let incoming = Cube::float_cast(incoming, gradient.dtype().into());
            Cube::float_mul(gradient, Cube::float_reshape(incoming, Shape::new([1; 5])))
        });
    }
}

// ---------------------------------------------------------------------------------------------------------
// From Burn's tensors to voxgrad's buffers.

fn cube_device(device: &Device) -> Option<CubeDevice> {
    fn find(device: &DispatchDevice) -> Option<CubeDevice> {
        match device {
            DispatchDevice::Cube(device) => Some(device.clone()),
            DispatchDevice::Autodiff(device) => find(device),
            #[allow(unreachable_patterns, reason = "Burn's other backends are features of it")]
            _ => None,
        }
    }
    find(device.as_dispatch())
}

/// Runs what is queued before this tensor, and takes its buffer.
fn cube_float(tensor: FloatTensor<Cube>) -> CubeTensor {
    tensor.client.clone().resolve_tensor_float::<CubeBackend>(tensor)
}

fn cube_int(tensor: IntTensor<Cube>) -> CubeTensor {
    tensor.client.clone().resolve_tensor_int::<CubeBackend>(tensor)
}

/// The memory of a tensor.
fn buffer(tensor: &CubeTensor, what: &'static str) -> Result<Buffer, LossError> {
    let dtype = match (tensor.dtype, what) {
        (DType::F32, "logits") => Dtype::F32,
        (DType::F16, "logits") => Dtype::F16,
        (DType::BF16, "logits") => Dtype::Bf16,
        (DType::U8, "labels") => Dtype::U8,
        (actual, _) => return Err(LossError::ElementType { what, actual }),
    };
    if !tensor.is_contiguous() {
        let (shape, strides) = (tensor.meta.shape().to_vec(), tensor.meta.strides().to_vec());
        return Err(LossError::NotContiguous { what, shape, strides });
    }
    Ok(Buffer::from_handle(tensor.handle.clone(), tensor.meta.shape().num_elements(), dtype)?)
}
