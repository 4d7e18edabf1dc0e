//! The command line: a verb a file, and what several of them share.

mod advice;
mod device;
mod devices;
mod evaluate;
mod exchange;
mod import;
mod interrupt;
mod job;
mod model;
mod options;
mod predict;
mod prepare;
mod progress;
mod records;
mod sparsify;
mod spelling;
mod steps;
mod summary;
mod train;
mod tuning;
mod typed;
mod validation;
mod verbs;
mod verify;

pub use advice::advice;
pub use interrupt::Interrupted;
pub use verbs::run;
