//! What a context that counts instead of computing has instead of memory.

use cubecl::server::Handle;
use std::any::Any;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

/// Handles without memory, and what a dry context remembers.
pub(crate) struct Dry {
    /// Whose device and stream the handles without memory name.
    like: Handle,
    notes: Mutex<Vec<Box<dyn Any + Send>>>,
    /// Whether kernels are compiled, for as long as this is true.
    compiles: Option<Arc<AtomicBool>>,
}

impl Dry {
    pub(crate) fn new(like: Handle) -> Self {
        Self { like, notes: Mutex::default(), compiles: None }
    }

    /// The same, where kernels are compiled for as long as `wanted`.
    pub(crate) fn compiling(self, wanted: Arc<AtomicBool>) -> Self {
        Self { compiles: Some(wanted), ..self }
    }

    /// Whether a kernel that is launched is to be compiled.
    pub(crate) fn compiles(&self) -> bool {
        self.compiles.as_ref().is_some_and(|wanted| wanted.load(Ordering::Relaxed))
    }

    /// A handle of a size behind which there is no memory, not even another buffer's.
    pub(crate) fn handle(&self, bytes: u64) -> Handle {
        Handle::new(self.like.service, self.like.stream, bytes)
    }

    /// Remembers what an operation was asked for.
    pub(crate) fn note(&self, what: Box<dyn Any + Send>) {
        self.notes.lock().unwrap_or_else(PoisonError::into_inner).push(what);
    }

    /// What was noted of a type, in order.
    pub(crate) fn noted<T: Any + Clone>(&self) -> Vec<T> {
        let notes = self.notes.lock().unwrap_or_else(PoisonError::into_inner);
        notes.iter().filter_map(|note| note.downcast_ref::<T>().cloned()).collect()
    }
}
