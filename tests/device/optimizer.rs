//! SGD, AdamW and the gradient's norm against loops written from torch's documentation, in f64.

use crate::common::{assert_close, device, is_slow, read, uniform};
use voxgrad::kernels::optimizer::{AdamW, Gradient, Guard, Sgd, adamw_step, gradient_norm, sgd_step};
use voxgrad::kernels::{Buffer, Context, KernelError, LossScale, LossScaleState, Scale, elementwise};

const SGD: Sgd = Sgd { learning_rate: 0.01, momentum: 0.99, weight_decay: 3e-5, nesterov: true };

fn to_f64(values: &[f32]) -> Vec<f64> {
    values.iter().map(|&v| f64::from(v)).collect()
}

/// The gradient of one step: another one every step.
fn gradient_of(step: usize, len: usize) -> Vec<f32> {
    uniform(100 + step as u64, len)
}

fn zeros(context: &Context, len: usize) -> Buffer {
    let buffer = context.empty(len, voxgrad::kernels::Dtype::F32).unwrap();
    elementwise::fill(context, &buffer, 0.0).unwrap();
    buffer
}

/// torch.optim.SGD: the momentum of the first step is the gradient itself.
struct SgdReference {
    parameters: Vec<f64>,
    momentum: Option<Vec<f64>>,
}

impl SgdReference {
    fn step(&mut self, sgd: &Sgd, gradient: &[f64]) {
        let (lr, mu, decay) = (f64::from(sgd.learning_rate), f64::from(sgd.momentum), f64::from(sgd.weight_decay));
        let g: Vec<f64> = gradient.iter().zip(&self.parameters).map(|(g, p)| g + decay * p).collect();
        let momentum = match self.momentum.take() {
            None => g.clone(),
            Some(m) => m.iter().zip(&g).map(|(m, g)| mu * m + g).collect(),
        };
        for (i, p) in self.parameters.iter_mut().enumerate() {
            *p -= lr * if sgd.nesterov { g[i] + mu * momentum[i] } else { momentum[i] };
        }
        self.momentum = Some(momentum);
    }
}

/// torch's clip_grad_norm_.
fn clipped(gradient: &[f64], max_norm: f64) -> Vec<f64> {
    let norm = gradient.iter().map(|g| g * g).sum::<f64>().sqrt();
    let factor = (max_norm / (norm + 1e-6)).min(1.0);
    gradient.iter().map(|g| g * factor).collect()
}

#[test]
fn norm_equals_f64_and_names_broken_gradients() {
    let (context, _guard) = device();
    let mut lengths = vec![1, 5, 64, 1003, 100_000];
    if !is_slow() {
        lengths.push(30_000_064);
    }
    for len in lengths {
        let mut values = uniform(9, len);
        let gradient = context.upload_f32(&values).unwrap();
        let norm = context.upload_f32(&[f32::NAN; 66]).unwrap();
        let out = norm.part(0, 2).unwrap();
        let expected = values.iter().map(|&g| f64::from(g) * f64::from(g)).sum::<f64>().sqrt() / 8.0;
        let mut runs = Vec::new();
        for _ in 0..2 {
            gradient_norm(context, &gradient, Scale::Fixed(8.0), &out).unwrap();
            let got = read(context, &norm);
            assert!((f64::from(got[0]) / expected - 1.0).abs() < 1e-6, "{len}: {} instead of {expected}", got[0]);
            assert_eq!(got[1], 0.0, "{len}");
            assert!(got[2..].iter().all(|v| v.is_nan()));
            runs.push(got[0].to_bits());
        }
        assert_eq!(runs[0], runs[1]);
        for (place, broken) in [(0, f32::NAN), (len - 1, f32::INFINITY), (len / 2, f32::NEG_INFINITY)] {
            let kept = std::mem::replace(&mut values[place], broken);
            context.write(&gradient, &values).unwrap();
            gradient_norm(context, &gradient, Scale::Fixed(8.0), &out).unwrap();
            assert_eq!(read(context, &norm)[1], 1.0, "{len}: {broken} at {place} went unnoticed");
            values[place] = kept;
            if len > 1_000_000 {
                break;
            }
        }
    }
}

#[test]
fn sgd_follows_torch_over_several_steps() {
    let (context, _guard) = device();
    // Lengths with and without whole vectors; clipping active (the norm of 1003 uniform values is about 18),
    // inactive, absent; a loss scale; plain momentum.
    let cases = [
        (1003, Some(12.0f32), 1.0f32, true),
        (1024, Some(12.0), 65536.0, true),
        (1024, Some(1000.0), 1.0, true),
        (7, None, 1.0, true),
        (1000, None, 128.0, false),
        (1, Some(12.0), 1.0, true),
    ];
    for (len, max_norm, loss_scale, nesterov) in cases {
        let sgd = Sgd { nesterov, ..SGD };
        let start = uniform(11, len);
        let mut padded = start.clone();
        padded.resize(len.next_multiple_of(64) + 64, 0.25);
        let all = context.upload_f32(&padded).unwrap();
        let parameters = all.part(0, len).unwrap();
        let momentum = zeros(context, len);
        let norm = zeros(context, 2);
        let mut reference = SgdReference { parameters: to_f64(&start), momentum: None };
        for step in 0..6 {
            let gradient = gradient_of(step, len);
            let scaled: Vec<f32> = gradient.iter().map(|g| g * loss_scale).collect();
            let values = context.upload_f32(&scaled).unwrap();
            gradient_norm(context, &values, Scale::Fixed(loss_scale), &norm).unwrap();
            let guard = max_norm.map(|max_norm| Guard { norm: &norm, max_norm, skip_non_finite: true });
            let used = Gradient { values: &values, scale: Scale::Fixed(loss_scale), guard };
            sgd_step(context, &sgd, &used, &parameters, &momentum).unwrap();
            let exact = to_f64(&gradient);
            reference.step(&sgd, &max_norm.map_or(exact.clone(), |m| clipped(&exact, f64::from(m))));
        }
        let what = format!("SGD, {len} parameters, clip {max_norm:?}, scale {loss_scale}");
        assert_close(&what, &read(context, &parameters), &reference.parameters, 3e-7);
        assert_close(&what, &read(context, &momentum), &reference.momentum.unwrap(), 3e-7);
        assert!(read(context, &all)[len..].iter().all(|&v| v == 0.25), "{what}: wrote behind the parameters");
    }
}

/// torch.optim.AdamW: decay, moments, bias correction, epsilon beside the corrected root.
fn adamw_reference(adamw: &AdamW, start: &[f32], gradients: &[Vec<f64>]) -> Vec<f64> {
    let [b1, b2] = adamw.betas.map(f64::from);
    let (lr, eps, decay) = (f64::from(adamw.learning_rate), f64::from(adamw.epsilon), f64::from(adamw.weight_decay));
    let mut p = to_f64(start);
    let (mut m, mut v) = (vec![0.0; p.len()], vec![0.0; p.len()]);
    for (t, gradient) in gradients.iter().enumerate() {
        let t = t as i32 + 1;
        for i in 0..p.len() {
            p[i] -= lr * decay * p[i];
            m[i] = b1 * m[i] + (1.0 - b1) * gradient[i];
            v[i] = b2 * v[i] + (1.0 - b2) * gradient[i] * gradient[i];
            let (m_hat, v_hat) = (m[i] / (1.0 - b1.powi(t)), v[i] / (1.0 - b2.powi(t)));
            p[i] -= lr * m_hat / (v_hat.sqrt() + eps);
        }
    }
    p
}

#[test]
fn adamw_follows_torch_over_several_steps() {
    let (context, _guard) = device();
    for (len, max_norm) in [(1003, None), (1024, Some(5.0f32)), (3, Some(100.0))] {
        let adamw = AdamW { learning_rate: 0.01, ..AdamW::default() };
        let start = uniform(21, len);
        let parameters = context.upload_f32(&start).unwrap();
        let moments = [zeros(context, len), zeros(context, len)];
        let norm = zeros(context, 2);
        let mut gradients = Vec::new();
        for step in 0..8 {
            let gradient = gradient_of(step, len);
            let values = context.upload_f32(&gradient).unwrap();
            gradient_norm(context, &values, Scale::Fixed(1.0), &norm).unwrap();
            let guard = max_norm.map(|max_norm| Guard { norm: &norm, max_norm, skip_non_finite: false });
            let used = Gradient { values: &values, scale: Scale::Fixed(1.0), guard };
            adamw_step(context, &adamw, step as u32 + 1, &used, &parameters, [&moments[0], &moments[1]]).unwrap();
            let exact = to_f64(&gradient);
            gradients.push(max_norm.map_or(exact.clone(), |m| clipped(&exact, f64::from(m))));
        }
        let expected = adamw_reference(&adamw, &start, &gradients);
        assert_close(&format!("AdamW, {len} parameters"), &read(context, &parameters), &expected, 2e-6);
    }
}

#[test]
fn a_broken_gradient_is_skipped_when_asked() {
    let (context, _guard) = device();
    let len = 1003;
    let start = uniform(31, len);
    for broken in [f32::NAN, f32::INFINITY] {
        let parameters = context.upload_f32(&start).unwrap();
        let moments = [0, 1].map(|_| context.upload_f32(&start).unwrap());
        let mut gradient = gradient_of(0, len);
        gradient[500] = broken;
        let values = context.upload_f32(&gradient).unwrap();
        let norm = zeros(context, 2);
        gradient_norm(context, &values, Scale::Fixed(1.0), &norm).unwrap();
        let guard = Guard { norm: &norm, max_norm: 12.0, skip_non_finite: true };
        let used = Gradient { values: &values, scale: Scale::Fixed(1.0), guard: Some(guard) };
        sgd_step(context, &SGD, &used, &parameters, &moments[0]).unwrap();
        adamw_step(context, &AdamW::default(), 1, &used, &parameters, [&moments[0], &moments[1]]).unwrap();
        for buffer in [&parameters, &moments[0], &moments[1]] {
            assert_eq!(read(context, buffer), start, "{broken}: something moved");
        }
        // Not asked: it must show, as in torch, not vanish.
        let used = Gradient { guard: Some(Guard { skip_non_finite: false, ..guard }), ..used };
        sgd_step(context, &SGD, &used, &parameters, &moments[0]).unwrap();
        assert!(read(context, &parameters)[500].is_nan());
    }
}

#[test]
fn parameters_outside_of_the_part_do_not_move() {
    let (context, _guard) = device();
    let start = uniform(41, 256);
    let parameters = context.upload_f32(&start).unwrap();
    let momentum = zeros(context, 256);
    let values = context.upload_f32(&gradient_of(0, 256)).unwrap();
    // The parameters 64..128 get no gradient: neither decay nor momentum.
    for (first, len) in [(0, 64), (128, 128)] {
        let part = |buffer: &Buffer| buffer.part(first, len).unwrap();
        let used = Gradient { values: &part(&values), scale: Scale::Fixed(1.0), guard: None };
        sgd_step(context, &SGD, &used, &part(&parameters), &part(&momentum)).unwrap();
    }
    let (after, momentum) = (read(context, &parameters), read(context, &momentum));
    for i in 0..256 {
        let skipped = (64..128).contains(&i);
        assert_eq!(after[i] == start[i], skipped, "parameter {i}");
        assert_eq!(momentum[i] == 0.0, skipped, "momentum {i}");
    }
}

#[test]
fn misuse_is_a_typed_error() {
    let (context, _guard) = device();
    let (a, b, norm) = (zeros(context, 8), zeros(context, 7), zeros(context, 1));
    let used = Gradient { values: &a, scale: Scale::Fixed(1.0), guard: None };
    assert!(matches!(sgd_step(context, &SGD, &used, &b, &b), Err(KernelError::Shape { .. })));
    assert!(matches!(sgd_step(context, &SGD, &used, &a, &b), Err(KernelError::Shape { .. })));
    let guard = Some(Guard { norm: &norm, max_norm: 12.0, skip_non_finite: false });
    let guarded = Gradient { guard, ..used };
    assert!(matches!(sgd_step(context, &SGD, &guarded, &a, &a), Err(KernelError::Shape { .. })));
    assert!(matches!(gradient_norm(context, &a, Scale::Fixed(1.0), &norm), Err(KernelError::Shape { .. })));
    let zeroth = adamw_step(context, &AdamW::default(), 0, &used, &a, [&a, &a]);
    assert!(matches!(zeroth, Err(KernelError::Shape { .. })));
}

/// torch.amp.GradScaler: scale and usable steps after one more step.
fn scaler_reference((scale, good): (f32, u32), broken: bool) -> (f32, u32) {
    match broken {
        true => (scale * 0.5, 0),
        false if good + 1 == 2000 => (scale * 2.0, 0),
        false => (scale, good + 1),
    }
}

#[test]
fn the_loss_scale_follows_torch() {
    let (context, _guard) = device();
    let norms = [0.0, 1.0].map(|broken| context.upload_f32(&[1.0, broken]).unwrap());
    let mut expected = (65536.0, 0);
    let scale = LossScale::new(context, LossScaleState::default()).unwrap();
    // Grows twice, and in between breaks in a row, early, and one step before it would have grown.
    let mut steps = vec![false; 2000];
    steps.extend([true, true, false, true]);
    steps.extend([false; 1999]);
    steps.push(true);
    steps.extend([false; 2003]);
    for (i, broken) in steps.into_iter().enumerate() {
        scale.update(context, &norms[usize::from(broken)]).unwrap();
        expected = scaler_reference(expected, broken);
        if broken || expected.1 < 2 || i % 500 == 0 {
            let state = scale.state(context).unwrap();
            assert_eq!((state.scale, state.good_steps), expected, "after step {i}");
        }
    }
    // A state goes through a checkpoint as it is, and an infinite scale is never reached.
    let state = LossScaleState { scale: f32::MAX / 1.5, good_steps: 1999 };
    let scale = LossScale::new(context, state).unwrap();
    assert_eq!(scale.state(context).unwrap(), state);
    scale.update(context, &norms[0]).unwrap();
    assert_eq!(scale.state(context).unwrap(), LossScaleState { good_steps: 0, ..state });
    for scale in [0.0, f32::NAN, f32::INFINITY] {
        assert!(LossScale::new(context, LossScaleState { scale, good_steps: 0 }).is_err());
    }
}

#[test]
fn steps_with_a_dynamic_scale_are_those_with_the_same_fixed_one() {
    let (context, _guard) = device();
    let len = 1003;
    let scale = LossScale::new(context, LossScaleState { scale: 1024.0, good_steps: 7 }).unwrap();
    let start = uniform(51, len);
    let scaled: Vec<f32> = gradient_of(0, len).iter().map(|g| g * 1024.0).collect();
    let mut results = Vec::new();
    for scale in [Scale::Fixed(1024.0), Scale::Dynamic(&scale)] {
        let values = context.upload_f32(&scaled).unwrap();
        let parameters = context.upload_f32(&start).unwrap();
        let [sgd, first, second] = [0; 3].map(|_| zeros(context, len));
        let norm = zeros(context, 2);
        gradient_norm(context, &values, scale, &norm).unwrap();
        let guard = Guard { norm: &norm, max_norm: 12.0, skip_non_finite: true };
        let used = Gradient { values: &values, scale, guard: Some(guard) };
        sgd_step(context, &SGD, &used, &parameters, &sgd).unwrap();
        adamw_step(context, &AdamW::default(), 1, &used, &parameters, [&first, &second]).unwrap();
        results.push([&parameters, &sgd, &first, &second, &norm].map(|buffer| read(context, buffer)));
    }
    assert!(results[0][4][0] < 40.0, "the norm is of the scaled gradient");
    assert_eq!(results[0], results[1]);

    // An overflow: nothing moves, in no bit, and the scale is halved.
    let mut broken = scaled;
    broken[17] = f32::INFINITY;
    let values = context.upload_f32(&broken).unwrap();
    let [parameters, momentum] = [0; 2].map(|_| context.upload_f32(&start).unwrap());
    let norm = zeros(context, 2);
    gradient_norm(context, &values, Scale::Dynamic(&scale), &norm).unwrap();
    let guard = Guard { norm: &norm, max_norm: 12.0, skip_non_finite: true };
    let used = Gradient { values: &values, scale: Scale::Dynamic(&scale), guard: Some(guard) };
    sgd_step(context, &SGD, &used, &parameters, &momentum).unwrap();
    scale.update(context, &norm).unwrap();
    assert_eq!((read(context, &parameters), read(context, &momentum)), (start.clone(), start));
    assert_eq!(scale.state(context).unwrap(), LossScaleState { scale: 512.0, good_steps: 0 });
}
