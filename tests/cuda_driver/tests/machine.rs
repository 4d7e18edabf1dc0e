//! Programs that nobody here wrote: kernels compiled from CUDA C by NVIDIA's compiler (nvcc 13.5, `-arch=sm_80 -ptx`).

mod common;

use common::{Size, device, download, run, upload};

#[test]
fn kernels_from_cuda_c() {
    let device = device(80);
    let ptx = include_str!("ptx/cuda_c.ptx");
    let n = 1000i32;
    let x: Vec<f32> = (0..n).map(|i| i as f32 / 100.0).collect();
    let y: Vec<f32> = (0..n).map(|i| (i % 7) as f32 / 10.0).collect();
    let (dx, dy) = (upload(&device, &x), upload(&device, &y));
    let arguments: [&[u8]; 4] = [&n.to_le_bytes(), &2.0f32.to_le_bytes(), &dx.to_le_bytes(), &dy.to_le_bytes()];
    let (_, reports) = run(&device, ptx, "saxpy", Size { cubes: 8, units: 128, shared: 0 }, &arguments);
    assert_eq!(reports, []);
    for (i, result) in download::<f32>(&device, dy, n as usize).iter().enumerate() {
        let wanted = 2.0 * x[i] + y[i].exp();
        assert!((result - wanted).abs() <= 1e-6 * wanted.abs(), "{i}: {result} for {wanted}");
    }
    let out = upload(&device, &[0f32]);
    let arguments: [&[u8]; 3] = [&n.to_le_bytes(), &dx.to_le_bytes(), &out.to_le_bytes()];
    let (_, reports) = run(&device, ptx, "reduce", Size { cubes: 3, units: 256, shared: 0 }, &arguments);
    assert_eq!(reports, []);
    let wanted: f64 = x.iter().map(|x| f64::from(x * 1e3).sin()).sum();
    let result = f64::from(download::<f32>(&device, out, 1)[0]);
    assert!((result - wanted).abs() < 1e-3, "{result} for {wanted}");
}
