//! A CUDA driver in software: a `libcuda.so.1` that executes PTX on the CPU, checks every access of memory, and counts
//! what a GPU's profiler would count. With it, a program that runs on CubeCL's CUDA runtime (0.11.3) runs on any machine:
//!
//! ```text
//! cargo build --release && cp target/release/libcuda.so $folder/libcuda.so.1
//! LD_LIBRARY_PATH=$folder CUDA_SOFTWARE_SM=90 program
//! ```
//!
//! `scripts/cuda_software.sh` does that with this project's device tests.
//!
//! # What it executes
//!
//! The PTX that LLVM's and NVIDIA's compilers write for kernels like these, up to version 9.5: arithmetic on integers,
//! f32, f64, f16, bf16 and packed pairs with PTX's rounding modes and NaN, memory in all state spaces, atomics, shuffles,
//! votes, barriers, indexed branches, calls (expanded), `wmma`, `mma.sync`, `ldmatrix`, asynchronous copies. An instruction
//! that is not known refuses the module, with its line; a driver's function that is not known returns
//! `CUDA_ERROR_NOT_SUPPORTED` and is named once.
//!
//! A text goes through [`parse`] (statements), [`decode`] and [`opcode`] (numbered instructions on numbered registers;
//! immediate values are registers too), and [`flow`] (where lanes that part meet again: at the immediate post-dominator;
//! registers that can share a place). [`launch`] spreads cubes over the cores; in a [`cube`] warps take turns until they
//! wait at barriers; a [`warp`] executes an instruction for its 32 lanes at once in loops that the compiler turns into
//! vector code ([`alu`], with [`arithmetic`] for numbers). [`access`], [`memory`] and [`shared`] are memory, [`tensor_core`]
//! matrix products, [`device`] and [`driver`] what a program calls.
//!
//! # What it checks, always
//!
//! | finding | how |
//! | --- | --- |
//! | out of bounds, freed | each allocation has 64 KiB of nothing around it, addresses are never used again |
//! | misaligned | by the width of the whole access |
//! | never written | a flag for each byte of global and local memory and each granule of shared memory; copies to the host too |
//! | race in shared memory | another thread's access since the last barrier; in a warp, since the last `bar.warp.sync` |
//! | race in global memory | an access of a place that another cube of the launch writes; atomics may meet atomics |
//! | barrier in divergent code, deadlock | not all lanes of a warp arrive; no warp can go on |
//! | missing lanes | a shuffle, vote, `bar.warp.sync` or matrix product without lanes that its mask names |
//! | limits | shared memory, units and cubes of a launch; machine instructions that a warp executes |
//!
//! Granules are as large as the kernel's smallest access of that memory, at most four bytes. A write that leaves shared
//! memory as it is disturbs nobody. Each report names the kernel, the line of its PTX, cube, thread and address; the launch
//! then returns an error, after all of its cubes where they can go on.
//!
//! # Options
//!
//! `CUDA_SOFTWARE_SM` (80, an A100, or 90, an H100), `CUDA_SOFTWARE_REPORT` (a file for reports instead of the standard
//! error output), `CUDA_SOFTWARE_COUNTERS` (a file that gets a line of JSON for each launch, see [`counters`]),
//! `CUDA_SOFTWARE_PTX` (a folder that gets each module), `CUDA_SOFTWARE_BREAK` (`this=>that`: a piece of text to replace in
//! each module, so that kernels are wrong on purpose), `CUDA_SOFTWARE_LIMIT` (instructions of a warp, 2^30 unless given),
//! `CUDA_SOFTWARE_THREADS`.
//!
//! # What only a GPU can show
//!
//! Time. Whether the assembler, which turns PTX into machine code, keeps its meaning. The order in which a GPU's cubes and
//! warps run, of which this is one: what depends on it is found if it is a race, not if it goes through atomics. The
//! rounding inside of tensor cores, and the last bits of `ex2`, `sin` and the like, which PTX leaves open; where an element
//! of a `wmma` fragment lies, which it leaves open too. Registers: an assembler knows how many a kernel needs.
//! Synchronisation through fences and flags in global memory counts as a race here, and what comes before a fence is
//! seen at once. Sectors and wavefronts are counted for an access as a whole; caches are not modelled.
pub mod access;
pub mod alu;
pub mod arithmetic;
pub mod counters;
pub mod cube;
pub mod decode;
pub mod device;
pub mod driver;
pub mod driver_kernels;
pub mod exchange;
pub mod flow;
pub mod integer;
pub mod launch;
mod lexer;
pub mod memory;
pub mod opcode;
mod opcode_control;
pub mod opcode_memory;
pub mod parse;
pub mod program;
pub mod ranges;
pub mod report;
pub mod shared;
pub mod tensor_core;
pub mod types;
pub mod warp;
