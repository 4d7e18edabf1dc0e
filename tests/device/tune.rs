//! Routes chosen by shape: a choice is obeyed, an impossible one is not, and what was measured survives in its file.

use crate::common::{assert_no_device_panic, device, read, uniform};
use voxgrad::Error;
use voxgrad::error::NetworkError;
use voxgrad::kernels::conv3d::{self, Pass, Policy, Problem, Route};
use voxgrad::kernels::{Context, Dtype};
use voxgrad::nn::{Encoder, Stage, UNetShape};
use voxgrad::tune::{Table, convolutions};

fn results(context: &Context, problem: &Problem) -> [Vec<f32>; 3] {
    let upload = |seed, len| context.upload_f32(&uniform(seed, len)).unwrap();
    let (x, w) = (upload(1, problem.input_len()), upload(2, problem.weight_len()));
    let dy = upload(3, problem.output_len());
    let [y, dx, dw] = [problem.output_len(), problem.input_len(), problem.weight_len()]
        .map(|len| context.empty(len, Dtype::F32).unwrap());
    conv3d::forward(context, problem, &x, None, &w, None, &y).unwrap();
    conv3d::backward_data(context, problem, &w, &dy, &dx, None).unwrap();
    conv3d::backward_weight(context, problem, &x, None, &dy, &dw).unwrap();
    [y, dx, dw].map(|buffer| read(context, &buffer))
}

fn with(context: &Context, problem: &Problem, route: Route) -> Context {
    let mut policy = Policy::of(context).clone();
    for pass in [Pass::Forward, Pass::DataGradient, Pass::WeightGradient] {
        policy.choose(problem.clone(), pass, Dtype::F32, route);
    }
    policy.on(context)
}

#[test]
fn choices_are_obeyed_where_they_are_possible() {
    let (context, _guard) = device();
    let exact = Policy::default().with_exact(true).on(context);
    // The rule takes Winograd's algorithm for 32 channels on a CPU, and the direct one for 16.
    for channels in [16, 32] {
        let problem = Problem::new(1, [6, 7, 8], channels, channels, [3; 3], [1; 3]).unwrap();
        let direct = results(&exact, &problem);
        let by_definition = Route::choose(&problem, Pass::Forward, Dtype::F32, context.caps(), Policy::of(&exact));
        assert_eq!(results(&with(context, &problem, by_definition), &problem), direct);
        let winograd = results(&with(context, &problem, Route::Winograd), &problem);
        let possible = Route::applicable(&problem, Pass::Forward, Dtype::F32, context.caps());
        assert_eq!(possible.contains(&Route::Winograd), context.caps().cores.is_some());
        for (direct, winograd) in direct.iter().zip(&winograd) {
            assert_eq!(direct != winograd, possible.contains(&Route::Winograd), "{channels} channels");
        }
        // An exact context is exact whatever was chosen.
        assert_eq!(results(&with(&exact, &problem, Route::Winograd), &problem), direct);
        // Choices for other shapes say nothing about this one.
        let other = Problem::new(2, [6, 7, 8], channels, channels, [3; 3], [1; 3]).unwrap();
        assert_eq!(results(&with(context, &other, Route::Direct), &problem), results(context, &problem));
    }
    assert_no_device_panic();
}

#[test]
fn impossible_choices_follow_the_rule() {
    let (context, _guard) = device();
    let strided = Problem::new(1, [6, 8, 8], 32, 32, [3; 3], [2; 3]).unwrap();
    let applicable = |problem: &Problem, pass, dtype| Route::applicable(problem, pass, dtype, context.caps());
    let possible = applicable(&strided, Pass::Forward, Dtype::F32);
    assert!(matches!(possible[..], [Route::Direct | Route::Tiled]), "{possible:?}");
    let ruled = results(context, &strided);
    for route in [Route::Winograd, Route::TensorCores] {
        assert_eq!(results(&with(context, &strided, route), &strided), ruled, "{route:?}");
    }
    // The rule's own choice is always possible.
    for (channels, dtype) in [(32, Dtype::F32), (16, Dtype::F16), (4, Dtype::F16)] {
        let problem = Problem::new(1, [8; 3], channels, 32, [3; 3], [1; 3]).unwrap();
        for pass in [Pass::Forward, Pass::DataGradient, Pass::WeightGradient] {
            let ruled = Route::choose(&problem, pass, dtype, context.caps(), &Policy::default());
            assert!(applicable(&problem, pass, dtype).contains(&ruled));
        }
    }
    assert_no_device_panic();
}

#[test]
fn measurements_survive_in_their_file_and_foreign_files_are_refused() {
    let (context, _guard) = device();
    let stage = |features, stride, decoder_blocks| Stage {
        features,
        kernel: [3; 3],
        stride: [stride; 3],
        encoder_blocks: 2,
        decoder_blocks,
    };
    let stages = vec![stage(8, 1, 2), stage(16, 2, 0)];
    let shape = UNetShape { channels_in: 1, heads: 2, encoder: Encoder::Plain, stages, bias: true };
    let problems = convolutions(context, &shape, 1, [8, 8, 8]).unwrap();
    // 1-8, 8-8 (once for encoder and decoder), 8-16 with stride 2, 16-16, 8+8-8, and the head.
    let shapes = problems.iter().map(|p| (p.in_dims(), p.channels_in(), p.second_channels(), p.channels_out()));
    let (full, half) = ([8; 3], [4; 3]);
    let expected =
        [(full, 1, 0, 8), (full, 8, 0, 8), (full, 8, 0, 16), (half, 16, 0, 16), (full, 8, 8, 8), (full, 8, 0, 2)];
    assert_eq!(shapes.collect::<Vec<_>>(), expected);

    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("deep/choices.json");
    let mut table = Table::read(&path, "cpu, test").unwrap();
    assert_eq!(table, Table::new("cpu, test"));
    let mut seen = 0;
    let measured = table.complete(context, &problems, Dtype::F32, |_, _, times| {
        assert!(times.len() >= 2 && times.values().all(|ms| ms.is_finite() && *ms > 0.0), "{times:?}");
        seen += 1;
    });
    // Winograd's algorithm is for CPUs, stride 1, and channels that are multiples of 8.
    let expected = if context.caps().cores.is_some() { 9 } else { 0 };
    assert_eq!((measured.unwrap(), seen, table.policy().choices()), (expected, expected, expected));
    assert_eq!(table.complete(context, &problems, Dtype::F32, |_, _, _| ()).unwrap(), 0, "measured twice");
    table.write(&path).unwrap();
    assert_eq!(Table::read(&path, "cpu, test").unwrap(), table);

    let refused = |text: &str, device: &str, word: &str| {
        std::fs::write(&path, text).unwrap();
        let error = Table::read(&path, device).unwrap_err();
        assert!(
            matches!(error, Error::Network(NetworkError::Tuning { .. })) && error.to_string().contains(word),
            "{error}"
        );
    };
    let text = std::fs::read_to_string(&path).unwrap();
    refused(&text, "cpu, another", "device");
    refused(&text.replace("\"voxgrad ", "\"voxgrad 9"), "cpu, test", "program");
    refused(&text[..text.len() / 2], "cpu, test", "not usable");
    refused("not JSON", "cpu, test", "not usable");
    if expected > 0 {
        refused(&text.replace("\"forward\"", "\"sideways\""), "cpu, test", "measurement");
    }
    assert_no_device_panic();
}
