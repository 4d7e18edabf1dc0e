//! What each launch took: a recorder that a context carries, see [`Context::profiled`](crate::Context::profiled).

use std::panic::Location;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// One launch of a kernel, which ran alone: the device had nothing else to do, and was waited for.
#[derive(Clone, Debug)]
pub struct Launched {
    /// What it belongs to.
    pub operation: &'static str,
    /// Where in the source it was launched: every kernel has a place of its own.
    pub place: &'static Location<'static>,
    /// The compiled form of the kernel that was launched: as many forms as a kernel is launched in are compiled.
    pub form: u128,
    /// When it began.
    pub began: Instant,
    /// From then until its results were there. The first launch of a form in a process also compiles it.
    pub took: Duration,
    /// Floating-point operations: those of a convolution's definition, a multiply-add counted as two, whatever the algorithm;
    /// 0 for kernels that memory limits.
    pub flops: u64,
    /// Bytes of the buffers that it was given, each counted once, scratch among them, whether it reads or writes all of it
    /// or both. Memory of other programs is not counted.
    pub bytes: u64,
}

impl Launched {
    /// The kernel: file and line of its launch, from the package's folder of sources on.
    pub fn kernel(&self) -> String {
        let file = self.place.file().replace('\\', "/");
        let file = file.rsplit_once("src/").map_or(file.as_str(), |(_, file)| file);
        format!("{file}:{}", self.place.line())
    }

    /// When its results were there.
    pub fn ended(&self) -> Instant {
        self.began + self.took
    }
}

/// The launches so far.
#[derive(Debug, Default)]
pub(crate) struct Recorder {
    launched: Mutex<Vec<Launched>>,
}

impl Recorder {
    pub fn push(&self, launched: Launched) {
        self.launched.lock().unwrap_or_else(PoisonError::into_inner).push(launched);
    }

    pub fn take(&self) -> Vec<Launched> {
        std::mem::take(&mut *self.launched.lock().unwrap_or_else(PoisonError::into_inner))
    }
}
