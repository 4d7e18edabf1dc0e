//! The bookkeeping of buffers: what a context has handed out, and what a kernel was given.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

/// Bytes of buffers that a context has handed out.
#[derive(Debug, Default)]
pub(crate) struct Held {
    now: AtomicU64,
    peak: AtomicU64,
    largest: AtomicU64,
    /// Of `now`, what is of [`Kind::Tensor`], and what of `peak` was.
    tensors: AtomicU64,
    tensors_at_peak: AtomicU64,
    /// Parts of buffers that were made arguments of kernels since the last [`Held::take_given`]; kept where launches are
    /// recorded only.
    given: Option<Mutex<Vec<Part>>>,
}

/// A part of a buffer: the lease of its memory by address, the first byte, and how many.
type Part = (usize, u64, u64);

/// Counts memory as held until it is dropped.
#[derive(Debug)]
pub(crate) struct Lease {
    held: Arc<Held>,
    bytes: u64,
    kind: Kind,
}

/// Whose a buffer is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// A tensor that the caller keeps.
    Tensor,
    /// Anything else, kernels' scratch among it.
    Other,
}

impl Held {
    /// One that also keeps account of what kernels are given.
    pub fn recording() -> Self {
        Self { given: Some(Mutex::default()), ..Self::default() }
    }

    pub fn now(&self) -> u64 {
        self.now.load(Ordering::Relaxed)
    }

    pub fn peak(&self) -> u64 {
        self.peak.load(Ordering::Relaxed)
    }

    pub fn largest(&self) -> u64 {
        self.largest.load(Ordering::Relaxed)
    }

    pub fn tensors(&self) -> u64 {
        self.tensors.load(Ordering::Relaxed)
    }

    pub fn tensors_at_peak(&self) -> u64 {
        self.tensors_at_peak.load(Ordering::Relaxed)
    }

    pub fn reset_peak(&self) {
        self.peak.store(self.now(), Ordering::Relaxed);
        self.tensors_at_peak.store(self.tensors(), Ordering::Relaxed);
    }

    /// Bytes of what kernels were given since the last call, each part of a buffer once.
    pub fn take_given(&self) -> u64 {
        let Some(given) = &self.given else { return 0 };
        let mut parts = std::mem::take(&mut *given.lock().unwrap_or_else(PoisonError::into_inner));
        parts.sort_unstable();
        parts.dedup();
        parts.iter().map(|(_, _, bytes)| bytes).sum()
    }
}

impl Lease {
    pub fn new(held: &Arc<Held>, bytes: u64, kind: Kind) -> Arc<Self> {
        let tensors = if kind == Kind::Tensor { bytes } else { 0 };
        let tensors = held.tensors.fetch_add(tensors, Ordering::Relaxed) + tensors;
        let now = held.now.fetch_add(bytes, Ordering::Relaxed) + bytes;
        if held.peak.fetch_max(now, Ordering::Relaxed) < now {
            held.tensors_at_peak.store(tensors, Ordering::Relaxed);
        }
        held.largest.fetch_max(bytes, Ordering::Relaxed);
        Arc::new(Self { held: held.clone(), bytes, kind })
    }

    /// A kernel is given `bytes` of the memory from `first` on.
    pub fn give(self: &Arc<Self>, first: u64, bytes: u64) {
        if let Some(given) = &self.held.given {
            let part = (Arc::as_ptr(self) as usize, first, bytes);
            given.lock().unwrap_or_else(PoisonError::into_inner).push(part);
        }
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        self.held.now.fetch_sub(self.bytes, Ordering::Relaxed);
        if self.kind == Kind::Tensor {
            self.held.tensors.fetch_sub(self.bytes, Ordering::Relaxed);
        }
    }
}
