//! The machine as a program sees it: modules of PTX, memory, launches.

use cuda::counters::Counters;
use cuda::device::{Device, Options};
use cuda::launch::Launch;
use cuda::report::Report;
use cuda::warp::Shape;

/// A device of its own for each test.
pub fn device(architecture: u32) -> Device {
    let (limit, threads) = (1 << 20, 2);
    Device::new(Options { architecture, limit, threads, report: None, counters: None, ptx: None })
}

/// A buffer with values in it.
pub fn upload<T: Copy>(device: &Device, values: &[T]) -> u64 {
    let address = device.memory.allocate(size_of_val(values)).unwrap();
    // SAFETY: plain numbers are bytes.
    let bytes = unsafe { std::slice::from_raw_parts(values.as_ptr().cast::<u8>(), size_of_val(values)) };
    device.write(address, bytes).unwrap();
    address
}

/// What is in a buffer.
pub fn download<T: Copy + Default>(device: &Device, address: u64, count: usize) -> Vec<T> {
    let (allocation, offset) = device.memory.find(address, count * size_of::<T>()).unwrap();
    let mut values = vec![T::default(); count];
    // SAFETY: the range was just checked.
    unsafe {
        std::ptr::copy_nonoverlapping(allocation.pointer(offset), values.as_mut_ptr().cast(), size_of_val(&values[..]))
    };
    values
}

/// Runs the only kernel of a module.
pub fn run(
    device: &Device,
    ptx: &str,
    kernel: &str,
    cubes: [u32; 3],
    units: [u32; 3],
    shared: u32,
    arguments: &[&[u8]],
) -> (Counters, Vec<Report>) {
    let loaded = device.load(ptx).unwrap();
    let program = &loaded.kernels[kernel].program;
    let mut parameters = vec![0; program.parameter_bytes];
    for ((offset, bytes), argument) in program.parameters.iter().zip(arguments) {
        parameters[*offset..][..*bytes].copy_from_slice(argument);
    }
    let total_shared = (program.dynamic_shared_offset as u32 + shared).max(program.static_shared as u32);
    let shape = Shape { units, cubes, dynamic_shared: shared, total_shared, multiprocessors: 108 };
    Launch::new(program, shape, parameters, &device.memory, 1, device.options.limit).run(2)
}

#[test]
fn kernels_from_cuda_c() {
    let device = device(80);
    let ptx = include_str!("ptx/cuda_c.ptx");
    let n = 1000i32;
    let x: Vec<f32> = (0..n).map(|i| i as f32 / 100.0).collect();
    let y: Vec<f32> = (0..n).map(|i| (i % 7) as f32 / 10.0).collect();
    let (dx, dy) = (upload(&device, &x), upload(&device, &y));
    let arguments: [&[u8]; 4] = [&n.to_le_bytes(), &2.0f32.to_le_bytes(), &dx.to_le_bytes(), &dy.to_le_bytes()];
    let (_, reports) = run(&device, ptx, "saxpy", [8, 1, 1], [128, 1, 1], 0, &arguments);
    assert_eq!(reports, []);
    for (i, result) in download::<f32>(&device, dy, n as usize).iter().enumerate() {
        let wanted = 2.0 * x[i] + y[i].exp();
        assert!((result - wanted).abs() <= 1e-6 * wanted.abs(), "{i}: {result} for {wanted}");
    }
    let out = upload(&device, &[0f32]);
    let arguments: [&[u8]; 3] = [&n.to_le_bytes(), &dx.to_le_bytes(), &out.to_le_bytes()];
    let (_, reports) = run(&device, ptx, "reduce", [3, 1, 1], [256, 1, 1], 0, &arguments);
    assert_eq!(reports, []);
    let wanted: f64 = x.iter().map(|x| f64::from(x * 1e3).sin()).sum();
    let result = f64::from(download::<f32>(&device, out, 1)[0]);
    assert!((result - wanted).abs() < 1e-3, "{result} for {wanted}");
}
