//! The driver's functions for modules and kernels, and those that are not there.
#![allow(non_snake_case, clippy::missing_safety_doc, missing_docs, clippy::not_unsafe_ptr_arg_deref)]

use crate::device::{Kernel, Loaded, code, device};
use crate::driver::{Result, give, handle};
use std::collections::HashSet;
use std::ffi::{CStr, c_char, c_int, c_uint, c_void};
use std::sync::Mutex;
use std::sync::atomic::Ordering;

// ---- kernels ----

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuModuleLoadData(to: *mut *mut c_void, image: *const c_void) -> Result {
    // SAFETY: the caller's image: text that ends in 0, or begins with the number of a binary format.
    let bytes = unsafe { CStr::from_ptr(image.cast()) };
    let Ok(text) = bytes.to_str().map(str::to_string) else {
        device().say("a module is refused: it is no PTX, and machine code cannot be executed here");
        return code::INVALID_IMAGE;
    };
    if !text.contains(".version") {
        device().say("a module is refused: it is no PTX, and machine code cannot be executed here");
        return code::INVALID_IMAGE;
    }
    match device().load(&text) {
        Ok(loaded) => handle(to, loaded),
        Err(code) => code,
    }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuModuleLoadDataEx(
    to: *mut *mut c_void,
    image: *const c_void,
    _count: c_uint,
    _options: *mut c_int,
    _values: *mut *mut c_void,
) -> Result {
    // SAFETY: the caller's promise is the same.
    unsafe { cuModuleLoadData(to, image) }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuModuleUnload(module: *mut c_void) -> Result {
    // SAFETY: from `cuModuleLoadData`, and given back once.
    let loaded = unsafe { Box::from_raw(module.cast::<Loaded>()) };
    for (address, _) in loaded.variables.values() {
        device().memory.free(*address);
    }
    code::SUCCESS
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuModuleGetFunction(to: *mut *mut c_void, module: *mut c_void, name: *const c_char) -> Result {
    // SAFETY: a module that is loaded, and a name that ends in 0.
    let (loaded, name) = unsafe { (&*module.cast::<Loaded>(), CStr::from_ptr(name)) };
    match loaded.kernels.get(name.to_string_lossy().as_ref()) {
        Some(kernel) => give(to, std::ptr::from_ref(kernel).cast_mut().cast()),
        None => code::NOT_FOUND,
    }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuModuleGetGlobal_v2(
    address: *mut u64,
    bytes: *mut usize,
    module: *mut c_void,
    name: *const c_char,
) -> Result {
    // SAFETY: a module that is loaded, and a name that ends in 0.
    let (loaded, name) = unsafe { (&*module.cast::<Loaded>(), CStr::from_ptr(name)) };
    let Some((at, size)) = loaded.variables.get(name.to_string_lossy().as_ref()) else { return code::NOT_FOUND };
    if !bytes.is_null() {
        give(bytes, *size);
    }
    give(address, *at)
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuFuncSetAttribute(function: *mut c_void, attribute: c_int, value: c_int) -> Result {
    const MOST_DYNAMIC_SHARED: c_int = 8;
    // SAFETY: from `cuModuleGetFunction`, of a module that is loaded.
    let kernel = unsafe { &*function.cast::<Kernel>() };
    if attribute == MOST_DYNAMIC_SHARED {
        let most = device().options.limits().shared as usize;
        if value < 0 || value as usize + kernel.program.static_shared > most {
            device().say(&format!("{value} bytes of shared memory for {}, of {most}", kernel.program.name));
            return code::INVALID_VALUE;
        }
        // Asking for less takes nothing away that is there without asking.
        let least = device().options.limits().shared_without_asking;
        kernel.most_dynamic.store((value as u32).max(least), Ordering::Relaxed);
    }
    code::SUCCESS
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuFuncGetAttribute(value: *mut c_int, attribute: c_int, function: *mut c_void) -> Result {
    // SAFETY: from `cuModuleGetFunction`, of a module that is loaded.
    let kernel = unsafe { &*function.cast::<Kernel>() };
    let answer = match attribute {
        0 => 1024,
        1 => kernel.program.static_shared as i32,
        3 => kernel.program.local_bytes as i32,
        5 | 6 => device().options.architecture as i32,
        8 => kernel.most_dynamic.load(Ordering::Relaxed) as i32,
        _ => return unsupported("this attribute of cuFuncGetAttribute"),
    };
    give(value, answer)
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuOccupancyMaxActiveBlocksPerMultiprocessor(
    to: *mut c_int,
    function: *mut c_void,
    units: c_int,
    shared: usize,
) -> Result {
    // SAFETY: from `cuModuleGetFunction`, of a module that is loaded.
    let kernel = unsafe { &*function.cast::<Kernel>() };
    let by_units = 2048 / (units.max(1) as usize).next_multiple_of(32);
    // Each cube has 1 KiB more. Registers, which only an assembler knows, are not looked at.
    let by_shared =
        device().options.limits().shared_of_multiprocessor as usize / (shared + kernel.program.static_shared + 1024);
    give(to, by_units.min(by_shared).min(32) as c_int)
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuLaunchKernel(
    function: *mut c_void,
    grid_x: c_uint,
    grid_y: c_uint,
    grid_z: c_uint,
    block_x: c_uint,
    block_y: c_uint,
    block_z: c_uint,
    shared: c_uint,
    _stream: *mut c_void,
    parameters: *mut *mut c_void,
    extra: *mut *mut c_void,
) -> Result {
    if !extra.is_null() {
        return unsupported("cuLaunchKernel with `extra`");
    }
    // SAFETY: from `cuModuleGetFunction`, of a module that is loaded.
    let kernel = unsafe { &*function.cast::<Kernel>() };
    let argument = |(i, (_, bytes)): (usize, &(usize, usize))| {
        // SAFETY: the caller passes a pointer to each of the kernel's parameters.
        unsafe { std::slice::from_raw_parts((*parameters.add(i)).cast::<u8>(), *bytes) }
    };
    let arguments: Vec<&[u8]> = kernel.program.parameters.iter().enumerate().map(argument).collect();
    let (cubes, units) = ([grid_x, grid_y, grid_z], [block_x, block_y, block_z]);
    let run = || device().launch(kernel, cubes, units, shared, &arguments);
    std::panic::catch_unwind(std::panic::AssertUnwindSafe(run)).unwrap_or_else(|_| {
        device().say(&format!("kernel {}: the software driver itself failed", kernel.program.name));
        code::UNKNOWN
    })
}

// ---- everything else ----

/// Says once that something is not there.
pub(crate) fn unsupported(name: &'static str) -> Result {
    static SAID: Mutex<Option<HashSet<&'static str>>> = Mutex::new(None);
    let mut said = SAID.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    if said.get_or_insert_default().insert(name) {
        device().say(&format!("{name} is not supported"));
    }
    code::NOT_SUPPORTED
}

macro_rules! unsupported {
    ($($name:ident)*) => {$(
        #[unsafe(no_mangle)]
        pub extern "C" fn $name() -> Result {
            unsupported(stringify!($name))
        }
    )*};
}

unsupported! {
    cuArray3DCreate_v2 cuArrayCreate_v2 cuArrayDestroy cuCtxCreate_v2 cuCtxCreate_v4 cuCtxDestroy_v2 cuCtxEnablePeerAccess
    cuCtxGetLimit cuCtxSetLimit cuDeviceCanAccessPeer cuDeviceGetMemPool cuGetProcAddress_v2 cuGraphAddKernelNode_v2
    cuGraphCreate cuGraphDestroy cuGraphExecDestroy cuGraphGetNodes cuGraphInstantiateWithFlags cuGraphKernelNodeGetParams_v2
    cuGraphLaunch cuGraphNodeGetType cuGraphUpload cuLaunchCooperativeKernel cuLaunchHostFunc cuLaunchKernelEx
    cuLibraryGetKernel cuLibraryLoadData cuLibraryUnload cuLinkAddData_v2 cuLinkComplete cuLinkCreate_v2 cuLinkDestroy
    cuMemAllocManaged cuMemAllocPitch_v2 cuMemHostAlloc cuMemHostGetDevicePointer_v2 cuMemHostRegister_v2
    cuMemHostUnregister cuMemPoolCreate cuMemPoolDestroy cuMemPoolSetAttribute cuMemPrefetchAsync cuMemcpy3DAsync_v2
    cuMemcpyPeerAsync cuMemsetD16Async cuMemsetD32Async cuModuleLoad cuModuleLoadFatBinary
    cuOccupancyMaxPotentialBlockSize cuPointerGetAttribute cuProfilerStart cuProfilerStop cuStreamAddCallback
    cuStreamBeginCapture_v2 cuStreamEndCapture cuStreamGetCaptureInfo_v2 cuStreamIsCapturing cuTensorMapEncodeIm2col
    cuTensorMapEncodeIm2colWide cuTensorMapEncodeTiled
}
