//! Value and gradient equal those of the same loss made of Burn's operations, and misuse is a typed error.
//!
//! `VOXGRAD_TEST_DEVICE` chooses the device: cpu (default) or vulkan, as far as this build has it.

use burn::tensor::{DType, Device, Int, Tensor, TensorData};
use embed_in_burn::{DiceEntropy, LossError, channels_last, composed_loss};
use voxgrad_kernels::loss::{LossSettings, Target};

const BATCH: usize = 2;
/// Ragged on purpose: no multiple of any vector.
const DIMS: [usize; 3] = [5, 7, 9];
const CLASSES: usize = 4;
const IGNORE: u8 = 4;

fn device() -> Device {
    match std::env::var("VOXGRAD_TEST_DEVICE").as_deref().unwrap_or("cpu") {
        #[cfg(feature = "cpu")]
        "cpu" => Device::cpu(),
        #[cfg(feature = "vulkan")]
        "vulkan" => Device::vulkan(burn::tensor::DeviceKind::DefaultDevice),
        other => panic!("this build has no device {other}"),
    }
}

fn settings() -> LossSettings {
    LossSettings::new(Target::Labels { classes: CLASSES }, Some(u16::from(IGNORE)), false)
}

/// Numbers in [0, 1), always the same.
fn uniform(len: usize) -> impl Iterator<Item = f32> {
    let mut state = 0x9E37_79B9_7F4A_7C15u64;
    (0..len).map(move |_| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 40) as f32 / (1u64 << 24) as f32
    })
}

/// Logits in [-3, 3) of shape `[batch, depth, height, width, class]`, and labels of which a third is "ignore".
fn case() -> (TensorData, Vec<u8>) {
    let [depth, height, width] = DIMS;
    let voxels = BATCH * depth * height * width;
    let logits = uniform(voxels * CLASSES).map(|u| 6.0 * u - 3.0).collect();
    let labels = uniform(voxels).map(|u| ((6.0 * u) as u8).min(IGNORE)).collect();
    (TensorData::new::<f32, _>(logits, [BATCH, depth, height, width, CLASSES]), labels)
}

fn bytes(labels: &[u8], device: &Device) -> Tensor<4, Int> {
    let [depth, height, width] = DIMS;
    Tensor::from_data(TensorData::new(labels.to_vec(), [BATCH, depth, height, width]), (device, DType::U8))
}

fn integers(labels: &[u8], device: &Device) -> Tensor<4, Int> {
    let [depth, height, width] = DIMS;
    let labels: Vec<i32> = labels.iter().map(|label| i32::from(*label)).collect();
    Tensor::from_data(TensorData::new(labels, [BATCH, depth, height, width]), device)
}

fn values<const D: usize>(tensor: Tensor<D>) -> Vec<f32> {
    tensor.into_data().convert::<f32>().try_to_vec().unwrap()
}

/// Value, and gradient of `5 * loss` with respect to the logits: the factor shows that the incoming gradient counts.
fn differentiate(logits: &TensorData, device: &Device, loss: impl Fn(Tensor<5>) -> Tensor<1>) -> (f32, Vec<f32>) {
    let logits = Tensor::<5>::from_data(logits.clone(), &device.clone().autodiff()).require_grad();
    let value = loss(logits.clone());
    let gradients = (value.clone() * 5.0).backward();
    (values(value)[0], values(logits.grad(&gradients).unwrap()))
}

fn assert_close(actual: &[f32], expected: &[f32], tolerance: f32) {
    assert_eq!(actual.len(), expected.len());
    let largest = expected.iter().fold(0.0f32, |top, x| top.max(x.abs()));
    assert!(largest > 0.0);
    for (i, (a, e)) in actual.iter().zip(expected).enumerate() {
        assert!((a - e).abs() <= tolerance * largest, "{i}: {a} instead of {e}");
    }
}

#[test]
fn value_and_gradient_equal_the_composed_loss() {
    let device = device();
    let (logits, labels) = case();
    let loss = DiceEntropy::new(&device, &settings(), BATCH, DIMS).unwrap();
    let fused = differentiate(&logits, &device, |l| loss.forward(l, bytes(&labels, &device)).unwrap());
    let composed = differentiate(&logits, &device, |l| composed_loss(l, integers(&labels, &device), i32::from(IGNORE)));
    println!("value {} and {}", fused.0, composed.0);
    assert_close(&[fused.0], &[composed.0], 2e-6);
    assert_close(&fused.1, &composed.1, 5e-6);
    // Voxels that nobody annotated have no gradient at all.
    for (gradient, label) in fused.1.chunks(CLASSES).zip(&labels) {
        assert_eq!(*label == IGNORE, gradient.iter().all(|g| *g == 0.0));
    }
}

#[test]
fn logits_that_burn_computed_are_read_where_they_are() {
    // The operations before the loss are still in Burn's queue when it is called, and those after it use its output.
    let device = device();
    let (logits, labels) = case();
    let loss = DiceEntropy::new(&device, &settings(), BATCH, DIMS).unwrap();
    let before = |l: Tensor<5>| (l * 0.5 + 0.25).tanh();
    let fused = differentiate(&logits, &device, |l| {
        loss.forward(before(l.clone()), bytes(&labels, &device)).unwrap() + l.powi_scalar(2).mean()
    });
    let composed = differentiate(&logits, &device, |l| {
        composed_loss(before(l.clone()), integers(&labels, &device), i32::from(IGNORE)) + l.powi_scalar(2).mean()
    });
    assert_close(&[fused.0], &[composed.0], 2e-6);
    assert_close(&fused.1, &composed.1, 5e-6);
}

#[test]
fn without_gradients_the_value_is_the_same() {
    let device = device();
    let (logits, labels) = case();
    let loss = DiceEntropy::new(&device, &settings(), BATCH, DIMS).unwrap();
    let plain = loss.forward(Tensor::from_data(logits.clone(), &device), bytes(&labels, &device)).unwrap();
    let tracked = differentiate(&logits, &device, |l| loss.forward(l, bytes(&labels, &device)).unwrap());
    assert_eq!(values(plain), [tracked.0]);
}

#[test]
fn channels_first_logits_are_refused_until_they_are_rearranged() {
    let device = device();
    let (logits, labels) = case();
    let loss = DiceEntropy::new(&device, &settings(), BATCH, DIMS).unwrap();
    let expected = differentiate(&logits, &device, |l| loss.forward(l, bytes(&labels, &device)).unwrap());

    let first = Tensor::<5>::from_data(logits, &device).permute([0, 4, 1, 2, 3]) * 1.0;
    let first = Tensor::<5>::from_data(first.into_data(), &device.clone().autodiff()).require_grad();
    let view = first.clone().permute([0, 2, 3, 4, 1]);
    let refused = loss.forward(view, bytes(&labels, &device)).unwrap_err();
    assert!(matches!(refused, LossError::NotContiguous { what: "logits", .. }), "{refused}");

    let value = loss.forward(channels_last(first.clone()), bytes(&labels, &device)).unwrap();
    let gradients = (value.clone() * 5.0).backward();
    let gradient = first.grad(&gradients).unwrap().permute([0, 2, 3, 4, 1]);
    assert_eq!(values(value), [expected.0]);
    assert_eq!(values(gradient), expected.1);
}

#[test]
fn misuse_is_a_typed_error() {
    let device = device();
    let (logits, labels) = case();
    let loss = DiceEntropy::new(&device, &settings(), BATCH, DIMS).unwrap();
    let tensor = || Tensor::<5>::from_data(logits.clone(), &device);
    let shape = loss.forward(tensor().permute([0, 4, 1, 2, 3]), bytes(&labels, &device)).unwrap_err();
    assert!(matches!(shape, LossError::Shape { what: "logits", .. }), "{shape}");
    let element = loss.forward(tensor(), integers(&labels, &device)).unwrap_err();
    assert!(matches!(element, LossError::ElementType { what: "labels", .. }), "{element}");
    let settings = LossSettings::new(Target::Labels { classes: CLASSES }, Some(0), false);
    let kernel = DiceEntropy::new(&device, &settings, BATCH, DIMS).unwrap_err();
    assert!(matches!(kernel, LossError::Kernel(_)), "{kernel}");
}
