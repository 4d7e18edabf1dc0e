//! Several ranks that train one network together: what carries messages between them, and which part of the work each has.
//!
//! A rank is a process or a thread with a device of its own, or a share of one. All of them run the same program on the same
//! data; what they exchange are sums. [`in_process`] connects threads over host memory. A program that has another way between
//! its ranks, MPI for example, gives its own [`Transport`].

mod agreement;
mod memory;
mod share;
mod transport;

pub use agreement::agree;
pub use memory::{InProcess, in_process};
pub use share::{Share, shared_out};
pub use transport::{Transport, gather_numbers, reduce_in_buckets};
