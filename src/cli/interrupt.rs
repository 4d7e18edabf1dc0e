//! Ctrl-C, and the signals by which schedulers end programs.

use anyhow::Context as _;
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::flag;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

/// What a program that was stopped ends with: the exit code is 128 and the signal's number.
#[derive(Debug, thiserror::Error)]
#[error("stopped by signal {0}")]
pub struct Interrupted(pub u8);

/// Notes the first signal that asks to stop, so that work can be saved. A second one ends the program at once.
pub struct Interrupt {
    signal: Arc<AtomicUsize>,
    at_once: Arc<AtomicBool>,
}

impl Interrupt {
    /// Takes over the signals.
    pub fn install() -> anyhow::Result<Self> {
        let interrupt = Interrupt { signal: Arc::default(), at_once: Arc::default() };
        let mut signals = vec![SIGINT, SIGTERM];
        #[cfg(unix)]
        signals.push(signal_hook::consts::SIGHUP);
        for signal in signals {
            // Called in this order: the first signal finds the flag unset, and sets it.
            flag::register_conditional_shutdown(signal, 128 + signal, interrupt.at_once.clone())
                .and_then(|_| flag::register(signal, interrupt.at_once.clone()))
                .and_then(|_| flag::register_usize(signal, interrupt.signal.clone(), signal as usize))
                .with_context(|| format!("listening for signal {signal}"))?;
        }
        Ok(interrupt)
    }

    /// The signal that has asked to stop.
    pub fn asked(&self) -> Option<Interrupted> {
        match self.signal.load(Ordering::SeqCst) {
            0 => None,
            signal => Some(Interrupted(signal as u8)),
        }
    }

    /// From now on there is nothing to save: already the first signal ends the program.
    pub fn end_at_once(&self) {
        self.at_once.store(true, Ordering::SeqCst);
    }
}
