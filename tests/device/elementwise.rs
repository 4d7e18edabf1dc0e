//! Filling, copying, converting, scaling and adding.

use crate::common::{assert_no_device_panic, device, is_slow, read, uniform};
use half::{bf16, f16};
use voxgrad::kernels::{Buffer, Context, Dtype, KernelError, elementwise};

fn lengths() -> Vec<usize> {
    // One element, odd, a vector, strips with a ragged end, more than 65535 cubes' worth of scalars on a GPU.
    let mut lengths = vec![1, 7, 64, 1000, 1003, 32_768];
    if !is_slow() {
        lengths.extend([5_000_001, 4_194_304]);
    }
    lengths
}

/// A buffer of `values` with 64 NaN behind it.
fn with_canaries(context: &Context, values: &[f32]) -> (Buffer, Buffer) {
    let mut all = values.to_vec();
    all.resize(values.len() + 64, f32::NAN);
    let all = context.upload_f32(&all).unwrap();
    let part = all.part(0, values.len()).unwrap();
    (all, part)
}

fn check(context: &Context, what: &str, all: &Buffer, expected: &[f32]) {
    let got = read(context, all);
    for (i, (g, e)) in got.iter().zip(expected).enumerate() {
        assert!(g.to_bits() == e.to_bits(), "{what}, {} elements: [{i}] is {g}, not {e}", expected.len());
    }
    assert!(got[expected.len()..].iter().all(|v| v.is_nan()), "{what}: wrote behind {} elements", expected.len());
}

#[test]
fn f32_operations_are_exact() {
    let (context, _guard) = device();
    for len in lengths() {
        let (a, b) = (uniform(1, len), uniform(2, len));
        let x = context.upload_f32(&a).unwrap();

        let (all, y) = with_canaries(context, &b);
        elementwise::add_assign(context, &y, &x).unwrap();
        check(context, "add", &all, &a.iter().zip(&b).map(|(a, b)| a + b).collect::<Vec<_>>());

        elementwise::copy(context, &x, &y).unwrap();
        check(context, "copy", &all, &a);

        elementwise::scale(context, &y, -0.75).unwrap();
        check(context, "scale", &all, &a.iter().map(|a| a * -0.75).collect::<Vec<_>>());

        elementwise::fill(context, &y, 3.5).unwrap();
        check(context, "fill", &all, &vec![3.5; len]);
    }
}

#[test]
fn more_cubes_than_one_axis_holds() {
    let (context, _guard) = device();
    // On a GPU one cube more than 65535 of 64 units with 4 elements each.
    let len = 65_536 * 64 * 4 + 64;
    let (all, y) = with_canaries(context, &vec![f32::NAN; len]);
    elementwise::fill(context, &y, 1.5).unwrap();
    check(context, "fill", &all, &vec![1.5; len]);
}

#[test]
fn f16_and_bf16_are_rounded_once() {
    let (context, _guard) = device();
    let len = 1003;
    let values: Vec<f32> = uniform(5, len).iter().map(|v| v * 3.0).collect();
    let x = context.upload_f32(&values).unwrap();
    if context.caps().f16 {
        let y = context.empty(len, Dtype::F16).unwrap();
        let halves: Vec<f16> = values.iter().map(|&v| f16::from_f32(v)).collect();
        elementwise::cast(context, &x, &y).unwrap();
        assert_eq!(context.download::<f16>(&y).unwrap(), halves);
        elementwise::scale(context, &y, 0.3).unwrap();
        let scaled: Vec<f16> = halves.iter().map(|v| f16::from_f32(v.to_f32() * 0.3)).collect();
        assert_eq!(context.download::<f16>(&y).unwrap(), scaled);
        elementwise::add_assign(context, &y, &x).unwrap();
        let sums: Vec<f16> = scaled.iter().zip(&values).map(|(s, v)| f16::from_f32(s.to_f32() + v)).collect();
        assert_eq!(context.download::<f16>(&y).unwrap(), sums);
        let back = context.empty(len, Dtype::F32).unwrap();
        elementwise::cast(context, &y, &back).unwrap();
        assert_eq!(read(context, &back), sums.iter().map(|s| s.to_f32()).collect::<Vec<_>>());
        elementwise::fill(context, &y, 1.0 / 3.0).unwrap();
        assert_eq!(context.download::<f16>(&y).unwrap(), vec![f16::from_f32(1.0 / 3.0); len]);
        let twin = context.empty(len, Dtype::F16).unwrap();
        elementwise::copy(context, &y, &twin).unwrap();
        assert_eq!(context.download::<f16>(&twin).unwrap(), vec![f16::from_f32(1.0 / 3.0); len]);
    } else {
        println!("skipped: no f16 on this device");
    }
    if context.caps().bf16 {
        let y = context.empty(len, Dtype::Bf16).unwrap();
        let rounded: Vec<bf16> = values.iter().map(|&v| bf16::from_f32(v)).collect();
        elementwise::cast(context, &x, &y).unwrap();
        assert_eq!(context.download::<bf16>(&y).unwrap(), rounded);
        elementwise::add_assign(context, &y, &x).unwrap();
        let sums: Vec<bf16> = rounded.iter().zip(&values).map(|(r, v)| bf16::from_f32(r.to_f32() + v)).collect();
        assert_eq!(context.download::<bf16>(&y).unwrap(), sums);
    } else {
        println!("skipped: no bf16 on this device");
    }
    assert_no_device_panic();
}

#[test]
fn labels_can_be_filled_and_copied() {
    let (context, _guard) = device();
    for dtype in [Dtype::U8, Dtype::U32] {
        let x = context.empty(1001, dtype).unwrap();
        elementwise::fill(context, &x, 7.0).unwrap();
        let y = context.empty(1001, dtype).unwrap();
        elementwise::copy(context, &x, &y).unwrap();
        match dtype {
            Dtype::U8 => assert_eq!(context.download::<u8>(&y).unwrap(), vec![7; 1001]),
            _ => assert_eq!(context.download::<u32>(&y).unwrap(), vec![7; 1001]),
        }
    }
    assert_no_device_panic();
}

#[test]
fn misuse_is_a_typed_error() {
    let (context, _guard) = device();
    let x = context.upload_f32(&[1.0; 8]).unwrap();
    let short = context.upload_f32(&[1.0; 7]).unwrap();
    let bytes = context.upload(&[1u8; 8], Dtype::U8).unwrap();
    assert!(matches!(elementwise::add_assign(context, &short, &x), Err(KernelError::Shape { .. })));
    assert!(matches!(elementwise::copy(context, &x, &short), Err(KernelError::Shape { .. })));
    assert!(matches!(elementwise::copy(context, &x, &bytes), Err(KernelError::Dtype { .. })));
    assert!(matches!(elementwise::cast(context, &bytes, &x), Err(KernelError::Dtype { .. })));
    assert!(matches!(elementwise::scale(context, &bytes, 2.0), Err(KernelError::Dtype { .. })));
    let empty = context.empty(0, Dtype::F32).unwrap();
    elementwise::fill(context, &empty, 1.0).unwrap();
}
