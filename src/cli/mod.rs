//! The command line: a verb a file, and what several of them share.

mod advice;
mod best;
mod crossval;
mod device;
mod devices;
mod evaluate;
mod exchange;
mod import;
mod inspect;
mod interrupt;
mod job;
mod model;
mod options;
mod overlay;
mod postprocess;
mod predict;
mod prepare;
mod progress;
mod records;
mod schemes;
mod scores;
mod simulate;
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
