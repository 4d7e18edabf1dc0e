//! What a way of annotating gains and costs, found out before anybody draws: dense labels are made sparse in several ways,
//! a network is trained on each, and all are scored on the complete labels of cases that none of them has seen.
//!
//! A comparison is a folder. Each of its runs (a strategy and a seed) has a folder of its own there, with the settings that
//! it was made with; what is finished is kept, what was stopped goes on from its checkpoint.

mod annotate;
mod design;
mod kept;
mod run;
mod strategy;
mod study;
mod table;

pub use annotate::Annotated;
pub use design::{Ended, Event, Study};
pub use kept::Outcome;
pub use strategy::{NetworkPlan, Strategy};
pub use table::{Row, csv, markdown, rows};
