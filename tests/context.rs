//! Buffers, grids and the errors of a device.

use crate::common::device;
use voxgrad::kernels::{Dtype, KernelError};

#[test]
fn upload_and_download_are_inverse() {
    let (context, _guard) = device();
    let values: Vec<f32> = (0..1001).map(|i| i as f32 * 0.5 - 3.0).collect();
    let buffer = context.upload_f32(&values).unwrap();
    assert_eq!(context.download_f32(&buffer).unwrap(), values);
    let tail = buffer.part(64, 937).unwrap();
    assert_eq!(context.download_f32(&tail).unwrap(), &values[64..]);
    let bytes = [1u8, 2, 255, 4, 5];
    let buffer = context.upload(&bytes, Dtype::U8).unwrap();
    assert_eq!(context.download::<u8>(&buffer).unwrap(), bytes);
}

#[test]
fn a_buffer_beyond_the_device_is_refused_before_anything_happens() {
    let (context, _guard) = device();
    let len = (context.caps().max_buffer / 4 + 1) as usize;
    let error = context.empty(len, Dtype::F32).unwrap_err();
    assert!(matches!(error, KernelError::Limit { .. }), "{error}");
    assert!(error.to_string().contains("smaller patch or batch"));
}

#[test]
fn misuse_is_a_typed_error() {
    let (context, _guard) = device();
    let buffer = context.upload_f32(&[0.0; 100]).unwrap();
    assert!(matches!(buffer.part(64, 37).unwrap_err(), KernelError::Shape { .. }));
    assert!(matches!(buffer.part(1, 3).unwrap_err(), KernelError::Shape { .. }));
    assert!(matches!(buffer.expect("test", "x", 100, Dtype::F16).unwrap_err(), KernelError::Dtype { .. }));
    assert!(matches!(context.download::<u8>(&buffer).unwrap_err(), KernelError::Shape { .. }));
}

#[test]
fn large_grids_spread_over_two_axes_and_cover_everything() {
    let (context, _guard) = device();
    for items in [0usize, 1, 63, 64, 65, 70_000 * 64, 5_000_000 * 64] {
        let cubecl::CubeCount::Static(x, y, z) = context.grid("test", items, 64).unwrap() else { panic!() };
        let [max_x, max_y] = context.caps().max_cubes;
        assert!(x <= max_x && y <= max_y && z == 1);
        assert!(u64::from(x) * u64::from(y) * 64 >= items as u64);
    }
}
