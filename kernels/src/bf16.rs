//! bf16 on the CPU runtime: which machines have it, and the routine that makes more of them have it.
//!
//! LLVM rounds f32 to bf16 with an instruction where the CPU has one (AVX512-BF16), and else calls `__truncsfbf2`, which
//! the compiler's support library has only since GCC 13. Where the call cannot be resolved a kernel is silently not run,
//! so [`Caps`](crate::Caps) must not promise bf16 there. With the feature `cpu` this crate defines the routine; the
//! just-in-time compiler finds it if the executable exports it, see the [guide](crate::embedding).

/// Whether kernels with bf16 can be compiled for this machine's CPU.
pub(crate) fn on_cpu() -> bool {
    has_instruction() || routine_is_exported()
}

#[cfg(target_arch = "x86_64")]
fn has_instruction() -> bool {
    std::arch::is_x86_feature_detected!("avx512bf16")
}

#[cfg(target_arch = "aarch64")]
fn has_instruction() -> bool {
    std::arch::is_aarch64_feature_detected!("bf16")
}

#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
fn has_instruction() -> bool {
    false
}

/// Asks as the just-in-time compiler will.
#[cfg(all(feature = "cpu", unix))]
fn routine_is_exported() -> bool {
    // Named here so that the linker takes it out of the library.
    std::hint::black_box(truncate as extern "C" fn(f32) -> f32);
    // SAFETY: both arguments are valid, and the address that comes back is compared with null only.
    unsafe { !libc::dlsym(libc::RTLD_DEFAULT, c"__truncsfbf2".as_ptr()).is_null() }
}

#[cfg(not(all(feature = "cpu", unix)))]
fn routine_is_exported() -> bool {
    false
}

/// The nearest bf16. Its ABI returns the 16 bits in the low half of the register of an f32.
#[cfg(all(feature = "cpu", unix))]
// SAFETY: the name belongs to compilers' support libraries, and this does what they define it to do.
#[unsafe(export_name = "__truncsfbf2")]
extern "C" fn truncate(value: f32) -> f32 {
    f32::from_bits(u32::from(half::bf16::from_f32(value).to_bits()))
}
