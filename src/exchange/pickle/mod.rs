//! Python's pickles, as far as checkpoints of nnU-Net need them: plain values, containers, tensors. No code of a
//! pickle is ever run: the few classes and functions that `torch.save` names are known here, and every other one is
//! refused.

mod fault;
mod globals;
mod machine;
mod value;
mod write;

pub use value::{Element, Tensor, Value};

pub(super) use fault::Fault;
pub(super) use machine::read;
pub(super) use write::write;
