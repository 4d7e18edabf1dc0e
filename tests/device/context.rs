//! Buffers, grids and the errors of a device.

use crate::common::{device, read, uniform};
use half::bf16;
use voxgrad::kernels::loss::{Gradient, Level, LossSettings, Problem, Target, value_and_gradient};
use voxgrad::kernels::{Buffer, Dtype, KernelError, Scale, elementwise};

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
    assert!(matches!(buffer.check("test", "x", 100, Dtype::F16).unwrap_err(), KernelError::Dtype { .. }));
    assert!(matches!(context.download::<u8>(&buffer).unwrap_err(), KernelError::Shape { .. }));
}

#[test]
fn handles_of_another_program_become_buffers_if_they_fit() {
    let (context, _guard) = device();
    let values: Vec<f32> = (0..1000).map(|i| i as f32).collect();
    let handle = context.upload_f32(&values).unwrap().handle().clone();
    let wrap = |handle, len| Buffer::from_handle(handle, len, Dtype::F32);
    assert_eq!(context.download_f32(&wrap(handle.clone(), 1000).unwrap()).unwrap(), values);
    // A part of a longer handle is cut to its length: kernels ask the handle for it.
    let inner = wrap(handle.clone().offset_start(512), 100).unwrap();
    assert_eq!(inner.handle().size_in_used(), 400);
    assert_eq!(context.download_f32(&inner).unwrap(), &values[128..228]);
    elementwise::fill(context, &inner, -1.0).unwrap();
    let changed = context.download_f32(&wrap(handle.clone(), 1000).unwrap()).unwrap();
    assert!(changed.iter().enumerate().all(|(i, v)| *v == if (128..228).contains(&i) { -1.0 } else { i as f32 }));
    for (handle, len) in [(handle.clone(), 1001), (handle.clone(), usize::MAX), (handle.offset_start(4), 10)] {
        assert!(matches!(wrap(handle, len).unwrap_err(), KernelError::Shape { .. }));
    }
}

#[test]
fn bf16_logits_work_on_the_cpu_runtime_of_linux() {
    // This test program exports the routine that processors without an instruction for bf16 need.
    let (context, _guard) = device();
    if context.caps().cores.is_none() || !cfg!(target_os = "linux") {
        return println!("skipped: not the CPU runtime on Linux");
    }
    assert!(context.caps().bf16);
    let (dims, classes) = ([4, 5, 6], 3);
    let settings = LossSettings::new(Target::Labels { classes }, Some(3), false);
    let problem = Problem::new(context, &settings, 1, dims, &[Level { dims, weight: 1.0 }]).unwrap();
    let labels: Vec<u8> = (0..120).map(|v| v % 4).collect();
    let labels = context.upload(&labels, Dtype::U8).unwrap();
    let half: Vec<bf16> = uniform(1, 120 * classes).iter().map(|z| bf16::from_f32(4.0 * z)).collect();
    let exact: Vec<f32> = half.iter().map(|z| z.to_f32()).collect();
    let run = |logits: Buffer| {
        let gradient = context.empty(logits.len(), logits.dtype()).unwrap();
        let value = context.empty(problem.loss_len(), Dtype::F32).unwrap();
        let into = [Gradient::Into(&gradient)];
        value_and_gradient(context, &problem, &(&labels).into(), &[&logits], &into, Scale::ONE, &value).unwrap();
        (read(context, &value), gradient)
    };
    let (value, gradient) = run(context.upload_f32(&exact).unwrap());
    let (half_value, half_gradient) = run(context.upload(&half, Dtype::Bf16).unwrap());
    let totals = 5; // the total, its two parts, and a coefficient each of two foreground classes
    assert_eq!(value[..totals], half_value[..totals]);
    // The gradient is rounded once, to the nearest of 8 significant bits.
    let half_gradient = context.download::<bf16>(&half_gradient).unwrap();
    for (g, h) in read(context, &gradient).iter().zip(half_gradient) {
        assert_eq!(h, bf16::from_f32(*g));
    }
}

#[test]
fn a_dry_context_counts_and_does_nothing() {
    let (context, _guard) = device();
    let (launches, held) = (context.launches(), context.held_bytes());
    let dry = context.dry();
    assert!(dry.is_dry() && !context.is_dry());
    assert_eq!((dry.launches(), dry.held_bytes(), dry.largest_bytes()), (0, 0, 0));
    let first = dry.upload_f32(&[1.0; 100]).unwrap();
    {
        // More than any device has.
        let second = dry.empty(1 << 40, Dtype::F32).unwrap();
        elementwise::fill(&dry, &second.part(64, 100).unwrap(), 2.0).unwrap();
        dry.write(&first, &[3.0f32; 100]).unwrap();
        dry.finish([&first, &second]).unwrap();
    }
    assert_eq!((dry.launches(), dry.held_bytes()), (1, 400));
    assert_eq!((dry.peak_bytes(), dry.largest_bytes()), (400 + (4 << 40), 4 << 40));
    // What was refused before is refused here, and there is nothing to read.
    assert!(matches!(dry.write(&first, &[0.0f32]), Err(KernelError::Shape { .. })));
    assert!(matches!(dry.download_f32(&first), Err(KernelError::Device { .. })));
    assert_eq!((context.launches(), context.held_bytes()), (launches, held));
}
