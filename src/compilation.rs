//! Kernels that are compiled on a thread of their own, while the program reads what they are to work on.

use crate::kernels::Context;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{Builder, JoinHandle};

/// Kernels that are being compiled. When it is dropped, the kernel that is in work is waited for, and no other is compiled.
#[derive(Debug)]
pub struct Compilation {
    wanted: Arc<AtomicBool>,
    hurried: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Compilation {
    /// Lets `work` launch on a context that compiles and does nothing else ([`Context::compiling`]). It ends early where it is
    /// told that there is no time any more. What fails in it fails again, and is told, when it is launched in earnest.
    pub fn start<E>(
        context: &Context,
        work: impl FnOnce(&Context, &dyn Fn() -> bool) -> Result<(), E> + Send + 'static,
    ) -> Self {
        let (wanted, hurried) = (Arc::new(AtomicBool::new(true)), Arc::<AtomicBool>::default());
        let (compiling, hurry) = (context.compiling(wanted.clone()), hurried.clone());
        let has_time = move || !hurry.load(Ordering::Relaxed);
        let work = move || {
            let _ = work(&compiling, &has_time);
        };
        // Without a thread kernels are compiled when they are needed.
        let thread = Builder::new().name("compiling".into()).spawn(work).ok();
        Self { wanted, hurried, thread }
    }

    /// Waits for what the work compiles in any event, and no longer than that.
    pub fn finish(mut self) {
        self.hurried.store(true, Ordering::Relaxed);
        self.join();
    }

    fn join(&mut self) {
        if let Some(thread) = self.thread.take() {
            // A panic in it was told by the panic hook, and is no harm to those who launch in earnest.
            let _ = thread.join();
        }
    }
}

impl Drop for Compilation {
    fn drop(&mut self) {
        self.hurried.store(true, Ordering::Relaxed);
        self.wanted.store(false, Ordering::Relaxed);
        self.join();
    }
}
