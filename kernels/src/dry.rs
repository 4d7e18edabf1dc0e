//! A context that counts instead of computing.

use crate::Context;
use cubecl::server::Handle;
use std::any::Any;
use std::sync::{Arc, Mutex, PoisonError};

/// What a dry context has instead of memory, and what it remembers.
pub(crate) struct Dry {
    /// Whose device and stream the handles without memory name.
    like: Handle,
    notes: Mutex<Vec<Box<dyn Any + Send>>>,
}

impl Dry {
    /// A handle of a size behind which there is no memory, not even another buffer's.
    pub(crate) fn handle(&self, bytes: u64) -> Handle {
        Handle::new(self.like.service, self.like.stream, bytes)
    }
}

impl Context {
    /// The same device, with the same algorithms, on which nothing happens: buffers have no memory behind them but are
    /// counted from 0 on as if they had, also those that no device could hold; launches are counted and not made; uploads
    /// and writes are dropped, and there is nothing to download. So code that runs on it tells what it would take.
    pub fn dry(&self) -> Self {
        let dry = Dry { like: self.client().empty(1), notes: Mutex::default() };
        self.with_dry(Arc::new(dry))
    }

    /// Whether this is a [`Context::dry`] one.
    pub fn is_dry(&self) -> bool {
        self.dry_state().is_some()
    }

    /// On a dry context, remembers what an operation was asked for.
    pub(crate) fn note<T: Any + Send>(&self, what: impl FnOnce() -> T) {
        if let Some(dry) = self.dry_state() {
            dry.notes.lock().unwrap_or_else(PoisonError::into_inner).push(Box::new(what()));
        }
    }

    /// What was noted of a type, in order.
    pub(crate) fn noted<T: Any + Clone>(&self) -> Vec<T> {
        let Some(dry) = self.dry_state() else { return Vec::new() };
        let notes = dry.notes.lock().unwrap_or_else(PoisonError::into_inner);
        notes.iter().filter_map(|note| note.downcast_ref::<T>().cloned()).collect()
    }
}
