//! How far work has come.

use indicatif::{ProgressBar, ProgressStyle};
use std::sync::OnceLock;
use std::time::Instant;

/// The moment at which the program began.
pub(super) static BEGAN: OnceLock<Instant> = OnceLock::new();

/// A bar for `length` pieces of work; invisible where the output is no terminal.
pub(super) fn progress_bar(what: &'static str, length: usize) -> ProgressBar {
    let style = ProgressStyle::with_template("{prefix:<11} [{bar:32}] {pos}/{len}  {msg}  {elapsed} done, {eta} left")
        .unwrap_or_else(|_| ProgressStyle::default_bar())
        .progress_chars("=> ");
    ProgressBar::new(length as u64).with_style(style).with_prefix(what)
}

/// Prints above the bar on a terminal, plainly into a file.
pub(super) fn print_above(bar: &ProgressBar, line: &str) {
    if bar.is_hidden() { println!("{line}") } else { bar.println(line) }
}
