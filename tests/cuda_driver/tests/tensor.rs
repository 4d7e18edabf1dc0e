//! Tensor cores and asynchronous copies, in kernels compiled from CUDA C by NVIDIA's compiler with its own headers.

mod common;

use common::{device, download, upload};
use cuda::launch::Launch;
use cuda::report::Report;
use cuda::warp::Shape;
use half::{bf16, f16};

const M: usize = 64;
const N: usize = 96;
const K: usize = 80;
const PTX: &str = include_str!("ptx/tensor_cores.ptx");

fn value(i: usize) -> f32 {
    ((i * 7919 + 13) % 1021) as f32 / 1021.0 - 0.5
}

/// C + A B, the largest difference to a sum in f64, and the reports.
fn product(ptx: &str, kernel: &str, tile: [usize; 2], bfloat: bool, b_by_columns: bool) -> (f64, Vec<Report>) {
    let device = device(80);
    let round = |x: f32| if bfloat { bf16::from_f32(x).to_f32() } else { f16::from_f32(x).to_f32() };
    let bits = |x: &f32| if bfloat { bf16::from_f32(*x).to_bits() } else { f16::from_f32(*x).to_bits() };
    let a: Vec<f32> = (0..M * K).map(|i| round(value(i))).collect();
    let b: Vec<f32> = (0..K * N).map(|i| round(value(i + 5000))).collect();
    let c: Vec<f32> = (0..M * N).map(|i| value(i + 9000)).collect();
    let at_b = |k: usize, n: usize| if b_by_columns { b[n * K + k] } else { b[k * N + n] };
    let upload_16 = |values: &[f32]| upload(&device, &values.iter().map(bits).collect::<Vec<u16>>());
    let (da, db, dc) = (upload_16(&a), upload_16(&b), upload(&device, &c));
    let loaded = device.load(ptx).unwrap();
    let program = &loaded.kernels[kernel].program;
    let mut parameters = vec![0; program.parameter_bytes];
    let sizes = [M, N, K].map(|size| (size as u32).to_le_bytes());
    let addresses = [da, db, dc].map(u64::to_le_bytes);
    let arguments = addresses.iter().map(|a| &a[..]).chain(sizes.iter().map(|s| &s[..]));
    for ((offset, bytes), argument) in program.parameters.iter().zip(arguments) {
        parameters[*offset..][..*bytes].copy_from_slice(argument);
    }
    let cubes = [(N / tile[1]) as u32, (M / tile[0]) as u32, 1];
    let total_shared = program.static_shared as u32;
    let shape = Shape { units: [32, 1, 1], cubes, dynamic_shared: 0, total_shared, multiprocessors: 108 };
    let (counters, reports) = Launch::new(program, shape, parameters, &device.memory, 1, 1 << 20).run(2);
    assert_eq!(counters.tensor_multiply_adds, (M * N * K) as u64, "{kernel}");
    let result = download::<f32>(&device, dc, M * N);
    let error = |i: usize| {
        let (m, n) = (i / N, i % N);
        let terms = (0..K).map(|k| f64::from(a[m * K + k]) * f64::from(at_b(k, n)));
        (f64::from(result[i]) - terms.sum::<f64>() - f64::from(c[i])).abs()
    };
    ((0..M * N).map(error).fold(0.0, f64::max), reports)
}

#[test]
fn tiles_of_all_shapes() {
    for (name, bfloat) in [("f16", false), ("bf16", true)] {
        for (shape, tile) in [("16x16", [16, 16]), ("32x8", [32, 8]), ("8x32", [8, 32])] {
            let by_columns = shape != "16x16";
            let (error, reports) = product(PTX, &format!("{name}_{shape}"), tile, bfloat, by_columns);
            assert_eq!(reports, [], "{name} {shape}");
            assert!(error < 1e-5, "{name} {shape}: {error}");
        }
    }
}

#[test]
fn documented_fragments_with_asynchronous_copies() {
    let (error, reports) = product(PTX, "f16_mma", [16, 8], false, true);
    assert_eq!(reports, []);
    assert!(error < 1e-5, "{error}");
}

/// Fragments that are put together in another way than PTX says are noticed, and so is a wait that is missing.
#[test]
fn fragments_out_of_place_are_noticed() {
    let transposed = PTX.replace("ldmatrix.sync.aligned.m8n8.x2.shared", "ldmatrix.sync.aligned.m8n8.x2.trans.shared");
    assert!(product(&transposed, "f16_mma", [16, 8], false, true).0 > 0.1);
    let too_early =
        PTX.replace("cp.async.wait_group \t0", "cp.async.wait_group \t1").replace("wait_group 0", "wait_group 1");
    assert!(!product(&too_early, "f16_mma", [16, 8], false, true).1.is_empty());
    let unsynchronised = PTX.replace("bar.warp.sync", "//");
    assert!(!product(&unsynchronised, "f16_mma", [16, 8], false, true).1.is_empty());
}
