//! The functions of `cuda.h` that CubeCL 0.11.3's CUDA runtime calls, with the signatures of the driver's reference
//! manual. All others that it could find here say that they are not supported.
//!
//! Everything is done before a call returns, which is one of the orders that streams allow.
#![allow(non_snake_case, clippy::missing_safety_doc, missing_docs, clippy::not_unsafe_ptr_arg_deref)]

use crate::device::{code, device};
use crate::driver_kernels::unsupported;
use crate::memory::SECTOR;
use std::ffi::{CStr, c_char, c_int, c_uint, c_void};
use std::sync::Mutex;
use std::time::Instant;

pub(crate) type Result = c_int;

/// Stands for the only context.
static CONTEXT: u8 = 0;

fn context() -> *mut c_void {
    (&raw const CONTEXT).cast_mut().cast()
}

/// Writes a result through a pointer of the caller's.
pub(crate) fn give<T>(to: *mut T, value: T) -> Result {
    if to.is_null() {
        return code::INVALID_VALUE;
    }
    // SAFETY: the caller's pointer to a place for a result, as the driver's manual has it.
    unsafe { to.write(value) };
    code::SUCCESS
}

/// Copies a name, cut to what there is room for.
fn give_text(to: *mut c_char, length: c_int, text: &str) -> Result {
    if to.is_null() || length < 1 {
        return code::INVALID_VALUE;
    }
    let count = text.len().min(length as usize - 1);
    // SAFETY: the caller has room for `length` bytes.
    unsafe {
        std::ptr::copy_nonoverlapping(text.as_ptr().cast(), to, count);
        to.add(count).write(0);
    }
    code::SUCCESS
}

// ---- devices and contexts ----

#[unsafe(no_mangle)]
pub extern "C" fn cuInit(_flags: c_uint) -> Result {
    code::SUCCESS
}

#[unsafe(no_mangle)]
pub extern "C" fn cuDriverGetVersion(version: *mut c_int) -> Result {
    give(version, 12080)
}

#[unsafe(no_mangle)]
pub extern "C" fn cuDeviceGetCount(count: *mut c_int) -> Result {
    give(count, 1)
}

#[unsafe(no_mangle)]
pub extern "C" fn cuDeviceGet(id: *mut c_int, ordinal: c_int) -> Result {
    if ordinal == 0 { give(id, 0) } else { code::INVALID_DEVICE }
}

#[unsafe(no_mangle)]
pub extern "C" fn cuDeviceTotalMem_v2(bytes: *mut usize, _device: c_int) -> Result {
    give(bytes, 80 << 30)
}

#[unsafe(no_mangle)]
pub extern "C" fn cuMemGetInfo_v2(free: *mut usize, total: *mut usize) -> Result {
    let used = device().memory.in_use();
    give(free, (80usize << 30).saturating_sub(used)).max(give(total, 80 << 30))
}

#[unsafe(no_mangle)]
pub extern "C" fn cuDeviceGetName(name: *mut c_char, length: c_int, _device: c_int) -> Result {
    give_text(name, length, &format!("software CUDA driver, sm_{}", device().options.architecture))
}

#[unsafe(no_mangle)]
pub extern "C" fn cuDeviceGetPCIBusId(id: *mut c_char, length: c_int, _device: c_int) -> Result {
    give_text(id, length, "0000:00:00.0")
}

#[unsafe(no_mangle)]
pub extern "C" fn cuDeviceGetUuid_v2(uuid: *mut [u8; 16], _device: c_int) -> Result {
    give(uuid, *b"software driver ")
}

#[unsafe(no_mangle)]
pub extern "C" fn cuDeviceGetAttribute(value: *mut c_int, attribute: c_int, _device: c_int) -> Result {
    let (options, limits) = (&device().options, device().options.limits());
    let answer = match attribute {
        // Units of a cube, and along x, y, z.
        1..=3 => 1024,
        4 => 64,
        // Cubes along x, y, z.
        5 => i32::MAX,
        6 | 7 => 65535,
        8 => limits.shared_without_asking as i32,
        9 => 64 << 10,
        // Lanes of a warp.
        10 => 32,
        // Registers of a cube and of a multiprocessor.
        12 | 82 => 65536,
        16 => limits.multiprocessors as i32,
        // Concurrent kernels, unified addressing, managed memory.
        31 | 41 => 1,
        38 => {
            if options.architecture >= 90 {
                50 << 20
            } else {
                40 << 20
            }
        }
        39 => 2048,
        75 => options.architecture as i32 / 10,
        76 => options.architecture as i32 % 10,
        81 => limits.shared_of_multiprocessor as i32,
        97 => limits.shared as i32,
        // Cubes of a multiprocessor.
        106 => 32,
        // Memory pools.
        115 => 1,
        _ => 0,
    };
    give(value, answer)
}

#[unsafe(no_mangle)]
pub extern "C" fn cuDevicePrimaryCtxRetain(to: *mut *mut c_void, _device: c_int) -> Result {
    give(to, context())
}

#[unsafe(no_mangle)]
pub extern "C" fn cuDevicePrimaryCtxRelease_v2(_device: c_int) -> Result {
    code::SUCCESS
}

#[unsafe(no_mangle)]
pub extern "C" fn cuDevicePrimaryCtxSetFlags_v2(_device: c_int, _flags: c_uint) -> Result {
    code::SUCCESS
}

#[unsafe(no_mangle)]
pub extern "C" fn cuCtxSetCurrent(_context: *mut c_void) -> Result {
    code::SUCCESS
}

#[unsafe(no_mangle)]
pub extern "C" fn cuCtxGetCurrent(to: *mut *mut c_void) -> Result {
    give(to, context())
}

#[unsafe(no_mangle)]
pub extern "C" fn cuCtxGetDevice(to: *mut c_int) -> Result {
    give(to, 0)
}

#[unsafe(no_mangle)]
pub extern "C" fn cuCtxSynchronize() -> Result {
    code::SUCCESS
}

#[unsafe(no_mangle)]
pub extern "C" fn cuCtxGetStreamPriorityRange(least: *mut c_int, greatest: *mut c_int) -> Result {
    give(least, 0).max(give(greatest, 0))
}

#[unsafe(no_mangle)]
pub extern "C" fn cuGetErrorName(error: c_int, to: *mut *const c_char) -> Result {
    give(to, name_of(error).as_ptr())
}

#[unsafe(no_mangle)]
pub extern "C" fn cuGetErrorString(error: c_int, to: *mut *const c_char) -> Result {
    give(to, name_of(error).as_ptr())
}

fn name_of(error: c_int) -> &'static CStr {
    match error {
        code::SUCCESS => c"CUDA_SUCCESS",
        code::INVALID_VALUE => c"CUDA_ERROR_INVALID_VALUE",
        code::OUT_OF_MEMORY => c"CUDA_ERROR_OUT_OF_MEMORY",
        code::INVALID_DEVICE => c"CUDA_ERROR_INVALID_DEVICE",
        code::INVALID_IMAGE => c"CUDA_ERROR_INVALID_IMAGE",
        code::INVALID_PTX => c"CUDA_ERROR_INVALID_PTX",
        code::NOT_FOUND => c"CUDA_ERROR_NOT_FOUND",
        code::NOT_SUPPORTED => c"CUDA_ERROR_NOT_SUPPORTED",
        700 => c"CUDA_ERROR_ILLEGAL_ADDRESS: the software driver's report says where",
        702 => c"CUDA_ERROR_LAUNCH_TIMEOUT: the software driver's report says where",
        715 => c"CUDA_ERROR_ILLEGAL_INSTRUCTION: the software driver's report says where",
        716 => c"CUDA_ERROR_MISALIGNED_ADDRESS: the software driver's report says where",
        719 => c"CUDA_ERROR_LAUNCH_FAILED: the software driver's report says where and why",
        _ => c"CUDA_ERROR_UNKNOWN",
    }
}

// ---- memory ----

#[unsafe(no_mangle)]
pub extern "C" fn cuMemAlloc_v2(to: *mut u64, bytes: usize) -> Result {
    if bytes == 0 {
        return code::INVALID_VALUE;
    }
    match device().memory.allocate(bytes) {
        Some(address) => give(to, address),
        None => {
            let used = device().memory.in_use();
            device().say(&format!("{bytes} bytes beside {used} are more than a quarter of this machine's memory"));
            code::OUT_OF_MEMORY
        }
    }
}

#[unsafe(no_mangle)]
pub extern "C" fn cuMemFree_v2(address: u64) -> Result {
    if address == 0 || device().memory.free(address) {
        return code::SUCCESS;
    }
    device().say(&format!("there is nothing to free at {address:#x}"));
    code::INVALID_VALUE
}

#[unsafe(no_mangle)]
pub extern "C" fn cuMemAllocAsync(to: *mut u64, bytes: usize, _stream: *mut c_void) -> Result {
    cuMemAlloc_v2(to, bytes)
}

#[unsafe(no_mangle)]
pub extern "C" fn cuMemFreeAsync(address: u64, _stream: *mut c_void) -> Result {
    cuMemFree_v2(address)
}

#[unsafe(no_mangle)]
pub extern "C" fn cuMemAllocHost_v2(to: *mut *mut c_void, bytes: usize) -> Result {
    // SAFETY: an allocation of the C library, which `cuMemFreeHost` gives back to it.
    let memory = unsafe { libc::calloc(bytes.max(1), 1) };
    if memory.is_null() { code::OUT_OF_MEMORY } else { give(to, memory) }
}

#[unsafe(no_mangle)]
pub extern "C" fn cuMemFreeHost(memory: *mut c_void) -> Result {
    // SAFETY: from `cuMemAllocHost_v2`, as the driver's manual has it.
    unsafe { libc::free(memory) };
    code::SUCCESS
}

/// Says why a copy is refused.
fn outside(what: &str, address: u64, bytes: usize) -> Result {
    let (_, detail) = device().memory.explain(address, bytes);
    device().say(&format!("{what}: {detail}, address {address:#x}"));
    code::INVALID_VALUE
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemcpyHtoDAsync_v2(
    to: u64,
    from: *const c_void,
    bytes: usize,
    _stream: *mut c_void,
) -> Result {
    if bytes == 0 {
        return code::SUCCESS;
    }
    // SAFETY: the caller has so many bytes there.
    let from = unsafe { std::slice::from_raw_parts(from.cast::<u8>(), bytes) };
    device().write(to, from).map_or_else(|| outside("a copy to the device", to, bytes), |()| code::SUCCESS)
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemcpyHtoD_v2(to: u64, from: *const c_void, bytes: usize) -> Result {
    // SAFETY: the caller's promise is the same.
    unsafe { cuMemcpyHtoDAsync_v2(to, from, bytes, std::ptr::null_mut()) }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemcpyDtoHAsync_v2(
    to: *mut c_void,
    from: u64,
    bytes: usize,
    _stream: *mut c_void,
) -> Result {
    if bytes == 0 {
        return code::SUCCESS;
    }
    let Some((allocation, offset)) = device().memory.find(from, bytes) else {
        return outside("a copy from the device", from, bytes);
    };
    // SAFETY: the range was just checked, and the caller has room for so many bytes.
    unsafe { std::ptr::copy_nonoverlapping(allocation.pointer(offset), to.cast::<u8>(), bytes) };
    if let Some(first) = allocation.never_written(offset, bytes) {
        device().say(&format!(
            "read of memory that nobody wrote: a copy of {bytes} bytes from the device, from byte {first} on, of an \
             allocation of {}, address {from:#x}",
            allocation.bytes
        ));
        return 719;
    }
    code::SUCCESS
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemcpyDtoH_v2(to: *mut c_void, from: u64, bytes: usize) -> Result {
    // SAFETY: the caller's promise is the same.
    unsafe { cuMemcpyDtoHAsync_v2(to, from, bytes, std::ptr::null_mut()) }
}

#[unsafe(no_mangle)]
pub extern "C" fn cuMemcpyDtoDAsync_v2(to: u64, from: u64, bytes: usize, _stream: *mut c_void) -> Result {
    if bytes == 0 {
        return code::SUCCESS;
    }
    let Some((source, from_offset)) = device().memory.find(from, bytes) else {
        return outside("a copy on the device", from, bytes);
    };
    let Some((target, to_offset)) = device().memory.find(to, bytes) else {
        return outside("a copy on the device", to, bytes);
    };
    // SAFETY: both ranges were just checked.
    unsafe { std::ptr::copy(source.pointer(from_offset), target.pointer(to_offset), bytes) };
    target.copy_written(to_offset, &source, from_offset, bytes);
    code::SUCCESS
}

#[unsafe(no_mangle)]
pub extern "C" fn cuMemsetD8Async(to: u64, value: u8, count: usize, _stream: *mut c_void) -> Result {
    if count == 0 {
        return code::SUCCESS;
    }
    let Some((target, offset)) = device().memory.find(to, count) else {
        return outside("a fill", to, count);
    };
    // SAFETY: the range was just checked.
    unsafe { std::ptr::write_bytes(target.pointer(offset), value, count) };
    target.mark_written(offset, count);
    code::SUCCESS
}

/// `CUDA_MEMCPY2D`
#[repr(C)]
pub struct Copy2d {
    from_x: usize,
    from_y: usize,
    from_type: c_uint,
    from_host: *const u8,
    from_device: u64,
    from_array: *const c_void,
    from_pitch: usize,
    to_x: usize,
    to_y: usize,
    to_type: c_uint,
    to_host: *mut u8,
    to_device: u64,
    to_array: *const c_void,
    to_pitch: usize,
    width: usize,
    height: usize,
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemcpy2DAsync_v2(copy: *const Copy2d, stream: *mut c_void) -> Result {
    const HOST: c_uint = 1;
    const DEVICE: c_uint = 2;
    // SAFETY: the caller's pointer to a description of the copy.
    let copy = unsafe { &*copy };
    for y in 0..copy.height {
        let from = (copy.from_y + y) * copy.from_pitch + copy.from_x;
        let to = (copy.to_y + y) * copy.to_pitch + copy.to_x;
        // SAFETY: a row of what the caller describes.
        let result = unsafe {
            match (copy.from_type, copy.to_type) {
                (HOST, DEVICE) => cuMemcpyHtoDAsync_v2(
                    copy.to_device + to as u64,
                    copy.from_host.add(from).cast(),
                    copy.width,
                    stream,
                ),
                (DEVICE, HOST) => cuMemcpyDtoHAsync_v2(
                    copy.to_host.add(to).cast(),
                    copy.from_device + from as u64,
                    copy.width,
                    stream,
                ),
                (DEVICE, DEVICE) => {
                    cuMemcpyDtoDAsync_v2(copy.to_device + to as u64, copy.from_device + from as u64, copy.width, stream)
                }
                _ => unsupported("cuMemcpy2DAsync_v2 of arrays"),
            }
        };
        if result != code::SUCCESS {
            return result;
        }
    }
    code::SUCCESS
}

// ---- streams and events ----

/// A new object behind a handle.
pub(crate) fn handle<T>(to: *mut *mut c_void, value: T) -> Result {
    give(to, Box::into_raw(Box::new(value)).cast())
}

#[unsafe(no_mangle)]
pub extern "C" fn cuStreamCreate(to: *mut *mut c_void, _flags: c_uint) -> Result {
    handle(to, 0u64)
}

#[unsafe(no_mangle)]
pub extern "C" fn cuStreamCreateWithPriority(to: *mut *mut c_void, flags: c_uint, _priority: c_int) -> Result {
    cuStreamCreate(to, flags)
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuStreamDestroy_v2(stream: *mut c_void) -> Result {
    // SAFETY: from `cuStreamCreate`, and given back once.
    drop(unsafe { Box::from_raw(stream.cast::<u64>()) });
    code::SUCCESS
}

#[unsafe(no_mangle)]
pub extern "C" fn cuStreamSynchronize(_stream: *mut c_void) -> Result {
    code::SUCCESS
}

#[unsafe(no_mangle)]
pub extern "C" fn cuStreamQuery(_stream: *mut c_void) -> Result {
    code::SUCCESS
}

#[unsafe(no_mangle)]
pub extern "C" fn cuStreamWaitEvent(_stream: *mut c_void, _event: *mut c_void, _flags: c_uint) -> Result {
    code::SUCCESS
}

#[unsafe(no_mangle)]
pub extern "C" fn cuEventCreate(to: *mut *mut c_void, _flags: c_uint) -> Result {
    handle(to, Mutex::new(Instant::now()))
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuEventDestroy_v2(event: *mut c_void) -> Result {
    // SAFETY: from `cuEventCreate`, and given back once.
    drop(unsafe { Box::from_raw(event.cast::<Mutex<Instant>>()) });
    code::SUCCESS
}

/// # Safety
///
/// An event that was not destroyed.
unsafe fn time(event: *mut c_void) -> std::sync::MutexGuard<'static, Instant> {
    // SAFETY: from `cuEventCreate`; the caller keeps it for the call.
    unsafe { &*event.cast::<Mutex<Instant>>() }.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuEventRecord(event: *mut c_void, _stream: *mut c_void) -> Result {
    // SAFETY: the caller's promise.
    *unsafe { time(event) } = Instant::now();
    code::SUCCESS
}

#[unsafe(no_mangle)]
pub extern "C" fn cuEventQuery(_event: *mut c_void) -> Result {
    code::SUCCESS
}

#[unsafe(no_mangle)]
pub extern "C" fn cuEventSynchronize(_event: *mut c_void) -> Result {
    code::SUCCESS
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuEventElapsedTime(to: *mut f32, from: *mut c_void, until: *mut c_void) -> Result {
    // SAFETY: the caller's promise.
    let (from, until) = unsafe { (*time(from), *time(until)) };
    give(to, until.saturating_duration_since(from).as_secs_f32() * 1e3)
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuEventElapsedTime_v2(to: *mut f32, from: *mut c_void, until: *mut c_void) -> Result {
    // SAFETY: the caller's promise is the same.
    unsafe { cuEventElapsedTime(to, from, until) }
}

/// Allocations begin at a sector, as those of CUDA do.
const _: () = assert!(512 % SECTOR == 0);
