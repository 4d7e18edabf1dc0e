//! The device under test, comparisons with references, seeded test data, and where test data lies.

pub mod augmentation;
pub mod convolution;
pub mod loss_case;
pub mod loss_reference;
pub mod network;
pub mod npz;
pub mod phantom;
pub mod pickles;
pub mod place;
pub mod plans;
pub mod six_cases;
pub mod sparse;

use std::path::PathBuf;
use std::sync::{Mutex, MutexGuard, OnceLock};
use voxgrad::device::{self, Device, DeviceChoice};
use voxgrad::kernels::Context;

static PANICKED: OnceLock<Mutex<Vec<String>>> = OnceLock::new();

/// The device that `VOXGRAD_TEST_DEVICE` names (cpu unless set). Tests that use it run one after the other: a
/// device has one queue, and timings and memory of one test must not leak into another.
pub fn device() -> (&'static Context, MutexGuard<'static, ()>) {
    static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());
    let guard = ONE_AT_A_TIME.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    (context(), guard)
}

/// The device of [`device`], for those who neither launch nor allocate on it.
pub fn context() -> &'static Context {
    &opened().context
}

fn opened() -> &'static Device {
    static DEVICE: OnceLock<Device> = OnceLock::new();
    DEVICE.get_or_init(|| {
        watch_device_threads();
        let choice = std::env::var("VOXGRAD_TEST_DEVICE").unwrap_or_else(|_| "cpu".into());
        let choice: DeviceChoice = choice.parse().expect("VOXGRAD_TEST_DEVICE");
        let device = device::open(choice).expect("the device under test");
        eprintln!("device under test: {} ({})", device.found.choice, device.found.name);
        device
    })
}

/// Whether the device under test is a GPU that the processor imitates: test volumes must be tiny there.
pub fn is_slow() -> bool {
    std::env::var_os("CUDA_SOFTWARE_SM").is_some() || opened().found.software
}

/// A panic on a device's own thread is logged and otherwise lost, and the read after it returns old bytes: so
/// it is recorded here, and [`assert_no_device_panic`] fails the test that it belongs to.
fn watch_device_threads() {
    let panics = PANICKED.get_or_init(Mutex::default);
    let default = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        let test_thread = std::thread::current().name().is_some_and(|n| n.contains("::") || n == "main");
        if !test_thread {
            panics.lock().unwrap_or_else(std::sync::PoisonError::into_inner).push(info.to_string());
        }
        default(info);
    }));
}

/// Fails if a device thread has panicked.
pub fn assert_no_device_panic() {
    let panics = PANICKED.get_or_init(Mutex::default).lock().unwrap();
    assert!(panics.is_empty(), "a device thread panicked: {panics:?}");
}

/// Downloads and fails on device panics: what every kernel test reads its results with.
pub fn read(context: &Context, buffer: &voxgrad::kernels::Buffer) -> Vec<f32> {
    let values = context.download_f32(buffer).expect("download");
    assert_no_device_panic();
    values
}

/// `len` repeatable values, uniform in [-1, 1).
pub fn uniform(seed: u64, len: usize) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    };
    for _ in 0..16 {
        next();
    }
    (0..len).map(|_| next()).collect()
}

/// Fails unless `actual` is within `tolerance` of `expected`: norm-wise, and no single value by more than ten
/// times that share of the largest expected magnitude. Names the worst value.
pub fn assert_close(what: &str, actual: &[f32], expected: &[f64], tolerance: f64) {
    assert_eq!(actual.len(), expected.len(), "{what}: length");
    let (mut square, mut norm, mut largest, mut worst) = (0.0, 0.0, 0.0f64, (0, 0.0));
    for (i, (&a, &e)) in actual.iter().zip(expected).enumerate() {
        let error = (f64::from(a) - e).abs();
        assert!(error.is_finite(), "{what}[{i}]: {a} where {e} was expected");
        square += error * error;
        norm += e * e;
        largest = largest.max(e.abs());
        if error > worst.1 {
            worst = (i, error);
        }
    }
    let floor = 1e-30;
    let relative = (square / norm.max(floor)).sqrt();
    let (i, error) = worst;
    let share = error / largest.max(floor);
    assert!(
        relative <= tolerance && share <= 10.0 * tolerance || square == 0.0,
        "{what}: relative error {relative:.3e} (allowed {tolerance:.1e}); worst at {i}: {} instead of {} ({share:.3e})",
        actual[i],
        expected[i],
    );
}

/// A file or folder under `tests/data`.
pub fn data(path: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/data").join(path)
}
