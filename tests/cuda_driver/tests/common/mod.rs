//! A device of its own for each test, and kernels of a single instruction.
#![allow(dead_code)]

use cuda::counters::Counters;
use cuda::device::{Device, Options};
use cuda::launch::Launch;
use cuda::report::Report;
use cuda::warp::Shape;

pub fn device(architecture: u32) -> Device {
    let (limit, threads) = (1 << 20, 2);
    Device::new(Options { architecture, limit, threads, report: None, counters: None, ptx: None, replaced: None })
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
    let to = values.as_mut_ptr().cast();
    // SAFETY: the range was just checked.
    unsafe { std::ptr::copy_nonoverlapping(allocation.pointer(offset), to, size_of_val(&values[..])) };
    values
}

/// How much is launched.
pub struct Size {
    pub cubes: u32,
    pub units: u32,
    pub shared: u32,
}

/// Runs a kernel whose arguments are addresses.
pub fn run(device: &Device, ptx: &str, kernel: &str, size: Size, arguments: &[&[u8]]) -> (Counters, Vec<Report>) {
    let loaded = device.load(ptx).unwrap_or_else(|code| panic!("error {code} for\n{ptx}"));
    let program = &loaded.kernels[kernel].program;
    let mut parameters = vec![0; program.parameter_bytes];
    for ((offset, bytes), argument) in program.parameters.iter().zip(arguments) {
        parameters[*offset..][..*bytes].copy_from_slice(argument);
    }
    let Size { cubes, units, shared } = size;
    let total_shared = (program.dynamic_shared_offset as u32 + shared).max(program.static_shared as u32);
    let (units, cubes) = ([units, 1, 1], [cubes, 1, 1]);
    let shape = Shape { units, cubes, dynamic_shared: shared, total_shared, multiprocessors: 108 };
    Launch::new(program, shape, parameters, &device.memory, 1, device.options.limit).run(2)
}

pub const HEADER: &str = ".version 8.7\n.target sm_80\n.address_size 64\n.visible .entry k(.param .u64 p0, .param .u64 p1, \
                          .param .u64 p2, .param .u64 p3)\n{\n.reg .b64 %rd<40>;\n.reg .b32 %r<40>;\n.reg .f32 %f<40>;\n\
                          .reg .b16 %h<40>;\n.reg .pred %p<9>;\nld.param.u64 %rd0, [p0];\nld.param.u64 %rd1, [p1];\n\
                          ld.param.u64 %rd2, [p2];\nld.param.u64 %rd3, [p3];\n";

/// A kernel of four pointers `%rd0` to `%rd3`.
pub fn kernel(body: &str) -> String {
    format!("{HEADER}{body}\nret;\n}}\n")
}

/// Register type of a size in bits; 1 for a predicate.
fn declare(name: &str, bits: u32) -> String {
    match bits {
        1 => format!(".reg .pred {name};\n"),
        _ => format!(".reg .b{bits} {name};\n"),
    }
}

/// What one instruction on `a`, `b`, `c` leaves in `d`: bits of the operands and of the result, then values of the
/// operands, one set a lane.
pub fn apply(instruction: &str, bits: [u32; 4], values: &[[u64; 3]]) -> Vec<u64> {
    let device = device(80);
    let mut body = String::from(
        "mov.u32 %r1, %tid.x;\nmov.u32 %r2, %ctaid.x;\nmad.lo.u32 %r1, %r2, 256, %r1;\nmul.wide.u32 %rd4, %r1, 24;\n\
         add.u64 %rd4, %rd0, %rd4;\nmul.wide.u32 %rd5, %r1, 8;\nadd.u64 %rd5, %rd1, %rd5;\ncvt.u32.u64 %r3, %rd2;\n\
         setp.ge.u32 %p1, %r1, %r3;\n@%p1 ret;\n",
    );
    for (i, (name, bits)) in ["a", "b", "c"].iter().zip(bits).enumerate() {
        body += &declare(name, bits);
        body += &format!("ld.global.u64 %rd{}, [%rd4+{}];\n", 10 + i, 8 * i);
        body += &match bits {
            1 => format!("setp.ne.u64 {name}, %rd{}, 0;\n", 10 + i),
            64 => format!("mov.b64 {name}, %rd{};\n", 10 + i),
            _ => format!("cvt.u{bits}.u64 {name}, %rd{};\n", 10 + i),
        };
    }
    body += &declare("d", bits[3]);
    body += &format!("{instruction}\n");
    body += &match bits[3] {
        1 => "selp.u64 %rd9, 1, 0, d;\n".to_string(),
        64 => "mov.b64 %rd9, d;\n".to_string(),
        bits => format!("cvt.u64.u{bits} %rd9, d;\n"),
    };
    body += "st.global.u64 [%rd5], %rd9;";
    let (from, to) = (upload(&device, values), device.memory.allocate(values.len() * 8).unwrap());
    let count = values.len() as u64;
    let size = Size { cubes: values.len().div_ceil(256) as u32, units: 256, shared: 0 };
    let arguments = [from, to, count, 0].map(u64::to_le_bytes);
    let (_, reports) = run(&device, &kernel(&body), "k", size, &arguments.each_ref().map(|a| &a[..]));
    assert_eq!(reports, []);
    download(&device, to, values.len())
}
