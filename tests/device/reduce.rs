//! Sums over rows against f64.

use crate::common::{assert_close, assert_no_device_panic, device, is_slow, read, uniform};
use voxgrad::kernels::{Dtype, KernelError, reduce};

/// Rows and channels, and what they are here for.
fn cases() -> Vec<(usize, usize)> {
    let mut cases = Vec::new();
    for channels in [1, 2, 3, 4, 5, 8, 12, 20, 32, 33, 320] {
        for rows in [1, 2, 7, 64, 1000] {
            cases.push((rows, channels));
        }
    }
    // Several blocks a part, the tree of parts on a GPU, odd lengths.
    cases.extend([(20_000, 4), (32_768, 3), (32_767, 2)]);
    if !is_slow() {
        cases.extend([(300_000, 32), (70_001, 5), (5_000, 320)]);
    }
    cases
}

#[test]
fn channel_sum_equals_the_f64_sum() {
    let (context, _guard) = device();
    for (rows, channels) in cases() {
        // Off centre, so that a sum does not cancel to nothing.
        let x: Vec<f32> = uniform(7, rows * channels).iter().map(|v| v + 0.5).collect();
        let mut expected = vec![0.0f64; channels];
        for row in x.chunks(channels) {
            row.iter().zip(&mut expected).for_each(|(&v, e)| *e += f64::from(v));
        }
        let x = context.upload_f32(&x).unwrap();
        let mut runs = Vec::new();
        for _ in 0..2 {
            // 64 elements behind the output must keep their values.
            let padded = context.upload_f32(&vec![f32::NAN; channels.next_multiple_of(64) + 64]).unwrap();
            let out = padded.part(0, channels).unwrap();
            reduce::channel_sum(context, rows, channels, &x, &out).unwrap();
            assert_close(&format!("sum of {rows} x {channels}"), &read(context, &out), &expected, 3e-7);
            let all = read(context, &padded);
            assert!(all[channels..].iter().all(|v| v.is_nan()), "wrote behind the output: {rows} x {channels}");
            runs.push(all[..channels].to_vec());
        }
        assert_eq!(runs[0], runs[1], "not the same bits twice: {rows} x {channels}");
    }
}

#[test]
fn channel_sum_of_16_bit_storage_accumulates_in_f32() {
    let (context, _guard) = device();
    let (rows, channels) = (5000, 6);
    let values = uniform(3, rows * channels);
    let mut expected = vec![0.0f64; channels];
    for (i, v) in values.iter().enumerate() {
        expected[i % channels] += f64::from(half::f16::from_f32(v + 1.0));
    }
    if !context.caps().f16 {
        println!("skipped: no f16 on this device");
        return;
    }
    let x: Vec<half::f16> = values.iter().map(|v| half::f16::from_f32(v + 1.0)).collect();
    let x = context.upload(&x, Dtype::F16).unwrap();
    let out = context.empty(channels, Dtype::F32).unwrap();
    reduce::channel_sum(context, rows, channels, &x, &out).unwrap();
    assert_close("f16 sum", &read(context, &out), &expected, 3e-7);
}

#[test]
fn channel_sum_refuses_what_does_not_fit() {
    let (context, _guard) = device();
    let x = context.upload_f32(&[0.0; 12]).unwrap();
    let out = context.upload_f32(&[0.0; 4]).unwrap();
    let shape = |rows, channels| reduce::channel_sum(context, rows, channels, &x, &out).unwrap_err();
    assert!(matches!(shape(4, 4), KernelError::Shape { .. }));
    assert!(matches!(shape(4, 3), KernelError::Shape { .. }));
    assert!(matches!(shape(0, 4), KernelError::Shape { .. }));
    let bytes = context.upload(&[0u8; 12], Dtype::U8).unwrap();
    let error = reduce::channel_sum(context, 3, 4, &bytes, &out).unwrap_err();
    assert!(matches!(error, KernelError::Dtype { .. }));
    assert_no_device_panic();
}
