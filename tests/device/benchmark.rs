//! Recorded launches, what they declare, and the profile of a step.

use super::memory::check_plan;
use crate::common::device;
use std::ops::ControlFlow;
use std::time::Instant;
use voxgrad::Error;
use voxgrad::benchmark::{Length, Profile, Workload, without_loading};
use voxgrad::kernels::conv3d::{self, Problem};
use voxgrad::kernels::{Dtype, elementwise};
use voxgrad::train::Precision;

fn small() -> Workload {
    Workload::of_features(&[8, 16], 1, 3, [16; 3], 2, Precision::F32).unwrap()
}

#[test]
fn launches_are_recorded_where_that_was_asked_for_only() {
    let (context, _guard) = device();
    let profiled = context.profiled();
    let before = context.held_bytes();
    let (x, y) = (profiled.upload_f32(&[1.0; 640]).unwrap(), profiled.empty(640, Dtype::F32).unwrap());
    elementwise::copy(&profiled, &x, &y).unwrap();
    // On a clone, as networks have them; and a part.
    elementwise::fill(&profiled.clone(), &y.part(64, 100).unwrap(), 2.0).unwrap();
    elementwise::copy(context, &x, &y).unwrap();
    let [copy, fill] = profiled.take_launched().try_into().unwrap();
    assert_eq!((copy.operation, copy.bytes, copy.flops), ("copy", 2 * 640 * 4, 0));
    assert_eq!((fill.operation, fill.bytes), ("fill", 100 * 4));
    assert!(copy.kernel().starts_with("elementwise.rs:") && copy.place != fill.place, "{}", copy.kernel());
    assert!(copy.began + copy.took <= fill.began && copy.form != fill.form);
    assert!(profiled.take_launched().is_empty() && context.take_launched().is_empty());
    assert_eq!((profiled.held_bytes(), context.held_bytes()), (2 * 640 * 4, before));
    assert_eq!(profiled.launches(), 2);
}

/// A launch reads its weights once, also where they fill the place of a bias that there is not.
#[test]
fn a_convolution_declares_its_products_and_counts_each_buffer_once() {
    let (context, _guard) = device();
    let profiled = context.profiled();
    for stride in [1, 2] {
        let problem = Problem::new(2, [8, 6, 4], 8, 8, [3; 3], [stride; 3]).unwrap();
        let buffer = |len| profiled.empty(len, Dtype::F32).unwrap();
        let (x, y, w) = (buffer(problem.input_len()), buffer(problem.output_len()), buffer(problem.weight_len()));
        for buffer in [&x, &y, &w] {
            elementwise::fill(&profiled, buffer, 1.0).unwrap();
        }
        for pass in 0..3 {
            profiled.take_launched();
            match pass {
                0 => conv3d::forward(&profiled, &problem, &x, None, &w, None, &y),
                1 => conv3d::backward_data(&profiled, &problem, &w, &y, &x, None),
                _ => conv3d::backward_weight(&profiled, &problem, &x, None, &y, &w),
            }
            .unwrap();
            let launched = profiled.take_launched();
            let flops: u64 = launched.iter().map(|launch| launch.flops).sum();
            assert_eq!(flops, 2 * 2 * (8 * 6 * 4 / stride.pow(3)) as u64 * 27 * 64, "stride {stride}, pass {pass}");
            // The three and a vector of nothing; beside a gradient of weights also its parts.
            let bytes = launched.iter().filter(|launch| launch.flops > 0).map(|launch| launch.bytes).max().unwrap();
            let all = 4 * (problem.input_len() + problem.output_len() + problem.weight_len()) as u64;
            assert!(pass == 2 || bytes <= all + 4 * 64, "stride {stride}, pass {pass}: {bytes} of {all}");
        }
    }
}

#[test]
fn the_kernels_of_a_profile_and_the_time_between_make_the_step() {
    let (context, _guard) = device();
    let workload = small();
    let began = Instant::now();
    let profile = Profile::measure(context, &workload, |_| ()).unwrap();
    let wall = began.elapsed().as_secs_f64();
    let kernels: f64 = profile.kernels.iter().map(|times| times.seconds).sum();
    let launches: f64 = profile.launches.iter().map(|launch| launch.seconds).sum();
    assert!((kernels - launches).abs() < 1e-9);
    assert!(
        (kernels + profile.between - profile.step).abs() < 1e-6,
        "{kernels} + {} of {}",
        profile.between,
        profile.step
    );
    // The step was measured, not made up of its parts: the first and six more took place, and the queue is no slower.
    assert!(profile.between > 0.0 && kernels > profile.between / 10.0, "{kernels} {}", profile.between);
    assert!(profile.first_step + 5.0 * profile.step < wall, "{} {} {wall}", profile.first_step, profile.step);
    assert!(profile.unrecorded_step > 0.0 && profile.ceilings.copy > 1e6 && profile.ceilings.flops > 1e6);

    let calls: usize = profile.kernels.iter().map(|times| times.calls).sum();
    let forms: usize = profile.kernels.iter().map(|times| times.forms).sum();
    assert_eq!(calls, profile.launches.len());
    assert_eq!(forms, 1 + profile.launches.iter().map(|launch| launch.form).max().unwrap());
    assert!(forms < calls && profile.kernels.iter().all(|times| times.compile.is_some()));

    // Two convolutions a stage, the upsampling, two behind it, and the head: forward, and twice as much backward but for the
    // gradient of the image.
    let (fine, coarse) = (2 * 16u64.pow(3), 2 * 8u64.pow(3));
    let conv = |voxels: u64, taps: u64, from: u64, to: u64| 2 * voxels * taps * from * to;
    let image = conv(fine, 27, 1, 8);
    let forward = image
        + conv(fine, 27, 8, 8)
        + conv(coarse, 27, 8, 16)
        + conv(coarse, 27, 16, 16)
        + conv(fine, 1, 16, 8)
        + conv(fine, 27, 16, 8)
        + conv(fine, 27, 8, 8)
        + conv(fine, 1, 8, 3);
    assert_eq!(profile.kernels.iter().map(|times| times.flops).sum::<u64>(), 3 * forward - image);

    let memory = profile.memory;
    let sum = memory.parameters + memory.batch + memory.activations + memory.gradients + memory.scratch;
    assert_eq!(sum, memory.planned);
    check_plan("profile", memory.held, memory.planned);
}

/// Of the temporaries of a step, Winograd's algorithm has more for itself.
#[test]
fn scratch_is_told_from_gradients() {
    let (context, _guard) = device();
    let workload = Workload::of_features(&[16, 32], 1, 3, [16; 3], 2, Precision::F32).unwrap();
    let plan = |exact| {
        let context = voxgrad::kernels::conv3d::Policy::default().with_exact(exact).on(context);
        workload.memory(&context).unwrap()
    };
    let exact = plan(true);
    assert!(exact.scratch > 0 && exact.scratch < exact.temporaries, "{exact:?}");
    if context.caps().cores.is_some() {
        let plan = plan(false);
        assert!(plan.scratch > exact.scratch && plan.scratch < plan.temporaries, "{plan:?} {exact:?}");
    }
}

#[test]
fn epochs_on_random_data_are_timed_and_can_be_stopped() {
    let (context, _guard) = device();
    let length = Length { epochs: 2, iterations: 3, validation_iterations: 2 };
    let mut seen = Vec::new();
    let epochs = without_loading(context, &small(), length, |report| {
        seen.push((report.epoch, report.iteration, report.validation, report.loss.is_some_and(f32::is_finite)));
        ControlFlow::Continue(())
    });
    let epochs = epochs.unwrap();
    assert!(epochs.len() == 2 && epochs.iter().all(|times| times.wall > 0.0 && times.load == 0.0));
    let of_epoch = |epoch| {
        [(1, false, false), (2, false, false), (3, false, true), (1, true, true), (2, true, true)]
            .map(|(iteration, validation, loss)| (epoch, iteration, validation, loss))
    };
    assert_eq!(seen, [of_epoch(0), of_epoch(1)].concat());
    let stopped = without_loading(context, &small(), length, |report| match report.epoch {
        0 => ControlFlow::Continue(()),
        _ => ControlFlow::Break(()),
    });
    assert_eq!(stopped.unwrap().len(), 1);
}

#[test]
fn numbers_that_make_no_workload_are_refused_together() {
    let error = Workload::of_features(&[8], 0, 1, [16; 3], 0, Precision::F32).unwrap_err();
    assert!(matches!(&error, Error::Several { faults } if faults.len() == 4), "{error}");
    let error = Workload::of_features(&[8, 16, 32], 1, 3, [16, 16, 18], 1, Precision::F32).unwrap_err();
    assert!(matches!(error, Error::Setting { setting: "patch", .. }), "{error}");
    let (context, _guard) = device();
    let large = Workload::of_features(&[32, 64], 1, 3, [2000, 2000, 200], 8, Precision::F32).unwrap();
    assert!(without_loading(context, &large, Length::default(), |_| ControlFlow::Break(())).is_err());
}
