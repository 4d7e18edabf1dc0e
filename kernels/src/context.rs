//! A device to launch on, and flat buffers on it.

use crate::dry::Dry;
use crate::held::{Held, Kind, Lease};
use crate::profile::{Launched, Recorder};
use crate::work::{Declared, Work, layout};
use crate::{Caps, Dtype, KernelError};
use cubecl::bytes::Bytes;
use cubecl::dry_run::{DryRun, RealRun};
use cubecl::launched::LaunchedKernels;
use cubecl::prelude::*;
use cubecl::server::Handle;
use std::any::Any;
use std::panic::Location;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::Instant;

/// Launches are handed to the device in groups of at most this many. A queue of 32 that runs full makes
/// the caller spin, which on the CPU runtime takes the cores from the kernels.
const LAUNCHES_PER_FLUSH: u32 = 24;

/// A contiguous array in device memory. Clones share the memory.
#[derive(Clone, Debug)]
pub struct Buffer {
    handle: Handle,
    len: usize,
    dtype: Dtype,
    /// Counts the memory as held until the last clone or part is dropped; `None` for somebody else's memory.
    lease: Option<Arc<Lease>>,
}

impl Buffer {
    /// The first `len` elements of memory of somebody else's CubeCL program, without a copy. What lies behind them is
    /// neither read nor written.
    ///
    /// # Errors
    /// [`KernelError::Shape`] if `handle` is smaller than `len` elements, or does not begin at a multiple of
    /// [`ALIGNMENT`](Self::ALIGNMENT) bytes of its allocation.
    pub fn from_handle(handle: Handle, len: usize, dtype: Dtype) -> Result<Self, KernelError> {
        let (first, available) = (handle.offset_start.unwrap_or(0), handle.size_in_used());
        if !first.is_multiple_of(Self::ALIGNMENT) {
            return Err(KernelError::shape("buffer", "first byte of the handle", "a multiple of 256", first));
        }
        let Some(behind) = available.checked_sub((len as u64).saturating_mul(dtype.size() as u64)) else {
            let expected = format_args!("room for {len} of {dtype:?}");
            return Err(KernelError::shape("buffer", "bytes of the handle", expected, available));
        };
        // Kernels take a slice's length from the handle.
        Ok(Self { handle: handle.offset_end(behind), len, dtype, lease: None })
    }

    /// Buffers begin at multiples of this many bytes of an allocation: the strictest demand among the runtimes.
    pub const ALIGNMENT: u64 = 256;

    /// The memory itself.
    pub fn handle(&self) -> &Handle {
        &self.handle
    }

    /// Number of elements.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are no elements.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Element type.
    pub fn dtype(&self) -> Dtype {
        self.dtype
    }

    /// Part of the buffer, sharing its memory. `start` times the element size must be a multiple of
    /// [`ALIGNMENT`](Self::ALIGNMENT).
    ///
    /// # Errors
    /// [`KernelError::Shape`] if the part does not lie inside the buffer or is not aligned.
    pub fn part(&self, start: usize, len: usize) -> Result<Self, KernelError> {
        let end = start.saturating_add(len);
        if end > self.len {
            return Err(KernelError::shape("buffer part", "end", format_args!("<= {}", self.len), end));
        }
        let (first, behind) = (start * self.dtype.size(), (self.len - end) * self.dtype.size());
        if !(first as u64).is_multiple_of(Self::ALIGNMENT) {
            return Err(KernelError::shape("buffer part", "first byte", "a multiple of 256", first));
        }
        let handle = self.handle.clone().offset_start(first as u64).offset_end(behind as u64);
        Ok(Self { handle, len, dtype: self.dtype, lease: self.lease.clone() })
    }

    /// The buffer as a kernel's slice argument.
    pub fn arg(&self) -> BufferArg {
        if let Some(lease) = &self.lease {
            lease.give(self.handle.offset_start.unwrap_or(0), bytes_of(self.len, self.dtype));
        }
        // SAFETY: `len` elements lie inside the handle: both constructors made sure of it.
        unsafe { BufferArg::from_raw_parts(self.handle.clone(), self.len) }
    }

    /// Checks length and element type before a launch.
    ///
    /// # Errors
    /// [`KernelError::Shape`] or [`KernelError::Dtype`], naming `operation` and `what`.
    pub fn check(
        &self,
        operation: &'static str,
        what: &'static str,
        len: usize,
        dtype: Dtype,
    ) -> Result<(), KernelError> {
        if self.len != len {
            return Err(KernelError::shape(operation, what, format_args!("{len} elements"), self.len));
        }
        if self.dtype != dtype {
            let expected = match dtype {
                Dtype::F32 => "f32",
                Dtype::F16 => "f16",
                Dtype::Bf16 => "bf16",
                Dtype::U8 => "u8",
                Dtype::U16 => "u16",
                Dtype::U32 => "u32",
                Dtype::I32 => "i32",
            };
            return Err(KernelError::Dtype { operation, what, expected, actual: self.dtype });
        }
        Ok(())
    }
}

/// An opened device: CubeCL's client, what the device can do, and the bookkeeping of launches.
/// Clones are the same device.
#[derive(Clone)]
pub struct Context {
    client: Client,
    caps: Arc<Caps>,
    launches: Arc<AtomicU32>,
    policy: Option<Arc<dyn Any + Send + Sync>>,
    held: Arc<Held>,
    dry: Option<Arc<Dry>>,
    recorder: Option<Arc<Recorder>>,
}

impl std::fmt::Debug for Context {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Context").field("caps", &self.caps).finish_non_exhaustive()
    }
}

impl Context {
    /// Launches on an existing client, one's own or another engine's, see [`embedding`](crate::embedding).
    pub fn new(client: Client) -> Self {
        let caps = Arc::new(Caps::of(&client));
        Self { client, caps, launches: Arc::default(), policy: None, held: Arc::default(), dry: None, recorder: None }
    }

    /// The same device, with the same algorithms, on which nothing happens: buffers have no memory behind them but are
    /// counted from 0 on as if they had, also those that no device could hold; launches are counted and not made; uploads
    /// and writes are dropped, and there is nothing to download. So code that runs on it tells what it would take.
    pub fn dry(&self) -> Self {
        let dry = Some(Arc::new(Dry::new(self.client.empty(1))));
        Self { dry, held: Arc::default(), launches: Arc::default(), recorder: None, ..self.clone() }
    }

    /// The same device, with the same algorithms, on which every launch is waited for and timed. Buffers are counted from 0 on.
    /// What is made on it, and clones of it, record into the same list, which [`Context::take_launched`] empties.
    pub fn profiled(&self) -> Self {
        let (held, recorder) = (Arc::new(Held::recording()), Some(Arc::default()));
        Self { held, launches: Arc::default(), recorder, ..self.clone() }
    }

    /// The launches since the last call on a [`Context::profiled`] context, in order; none on another.
    pub fn take_launched(&self) -> Vec<Launched> {
        self.recorder.as_ref().map_or_else(Vec::new, |recorder| recorder.take())
    }

    /// A [`Context::dry`] one on which kernels that are launched are compiled, if they are not yet, and not run: for as long as
    /// `wanted` is true. Each launch waits for it. So another thread finds them compiled later.
    ///
    /// Launches through other contexts of this package run as always meanwhile; those that another CubeCL program makes in this
    /// process without one may be left out, since CubeCL decides that for a whole process.
    pub fn compiling(&self, wanted: Arc<AtomicBool>) -> Self {
        let dry = Some(Arc::new(Dry::new(self.client.empty(1)).compiling(wanted)));
        Self { dry, ..self.dry() }
    }

    /// Whether this is a [`Context::dry`] one.
    pub fn is_dry(&self) -> bool {
        self.dry.is_some()
    }

    /// On a dry context, remembers what an operation was asked for.
    pub(crate) fn note<T: Any + Send>(&self, what: impl FnOnce() -> T) {
        if let Some(dry) = &self.dry {
            dry.note(Box::new(what()));
        }
    }

    /// What was noted of a type, in order.
    pub(crate) fn noted<T: Any + Clone>(&self) -> Vec<T> {
        self.dry.as_ref().map_or_else(Vec::new, |dry| dry.noted())
    }

    /// The same device with what an operation's choices between kernels obey: see [`conv3d::Policy`](crate::conv3d::Policy).
    pub(crate) fn with_policy(self, policy: Arc<dyn Any + Send + Sync>) -> Self {
        Self { policy: Some(policy), ..self }
    }

    /// What [`Context::with_policy`] was given.
    pub(crate) fn policy(&self) -> Option<&(dyn Any + Send + Sync)> {
        self.policy.as_deref()
    }

    /// CubeCL's client.
    pub fn client(&self) -> &Client {
        &self.client
    }

    /// What the device can do.
    pub fn caps(&self) -> &Caps {
        &self.caps
    }

    /// Number of kernels launched so far through this context.
    pub fn launches(&self) -> u32 {
        self.launches.load(Ordering::Relaxed)
    }

    /// Bytes of all buffers of this context that are alive. What the runtime keeps in its pools is not counted.
    pub fn held_bytes(&self) -> u64 {
        self.held.now()
    }

    /// The most bytes that were alive at once since the last [`Context::reset_peak`].
    pub fn peak_bytes(&self) -> u64 {
        self.held.peak()
    }

    /// Of [`Context::held_bytes`], those of [`Context::tensor`].
    pub fn tensor_bytes(&self) -> u64 {
        self.held.tensors()
    }

    /// Of [`Context::peak_bytes`], those of [`Context::tensor`].
    pub fn tensor_bytes_at_peak(&self) -> u64 {
        self.held.tensors_at_peak()
    }

    /// Bytes of the largest buffer so far.
    pub fn largest_bytes(&self) -> u64 {
        self.held.largest()
    }

    /// Begins a new measurement of [`Context::peak_bytes`].
    pub fn reset_peak(&self) {
        self.held.reset_peak();
    }

    /// Bytes that the runtime keeps of the device's memory for all programs that share it in this process: buffers that are
    /// alive, gaps between them, and what it holds in reserve.
    pub fn reserved_bytes(&self) -> u64 {
        self.client.memory_report(cubecl::MemoryScope::Device).usage().bytes_reserved
    }

    /// Memory for `len` elements, with whatever was in it before.
    ///
    /// # Errors
    /// [`KernelError::Limit`] if no buffer of the device can be that large.
    pub fn empty(&self, len: usize, dtype: Dtype) -> Result<Buffer, KernelError> {
        self.allocate(len, dtype, Kind::Other)
    }

    /// As [`Context::empty`], counted as activations or their gradients, beside what kernels have for themselves.
    ///
    /// # Errors
    /// As [`Context::empty`].
    pub fn tensor(&self, len: usize, dtype: Dtype) -> Result<Buffer, KernelError> {
        self.allocate(len, dtype, Kind::Tensor)
    }

    /// Copies plain old data to the device.
    ///
    /// # Errors
    /// As [`Context::empty`].
    pub fn upload<T: bytemuck::NoUninit>(&self, values: &[T], dtype: Dtype) -> Result<Buffer, KernelError> {
        self.create::<T>(values.len(), dtype, || Bytes::from_bytes_vec(bytemuck::cast_slice(values).to_vec()))
    }

    /// As [`Context::upload`], without the copy that a borrowed slice costs.
    ///
    /// # Errors
    /// As [`Context::empty`].
    pub fn upload_owned<T: bytemuck::NoUninit + Send + Sync>(
        &self,
        values: Vec<T>,
        dtype: Dtype,
    ) -> Result<Buffer, KernelError> {
        self.create::<T>(values.len(), dtype, || Bytes::from_elems(values))
    }

    /// A buffer of `len` values of `T`, whose bytes are asked for if they are needed.
    fn create<T>(&self, len: usize, dtype: Dtype, bytes: impl FnOnce() -> Bytes) -> Result<Buffer, KernelError> {
        if size_of::<T>() != dtype.size() {
            return Err(KernelError::shape("upload", "bytes of an element", dtype.size(), size_of::<T>()));
        }
        if self.is_dry() {
            return self.empty(len, dtype);
        }
        self.check_size(len, dtype)?;
        Ok(self.buffer(self.client.create(bytes()), len, dtype, Kind::Other))
    }

    /// Copies f32 values to the device.
    ///
    /// # Errors
    /// As [`Context::empty`].
    pub fn upload_f32(&self, values: &[f32]) -> Result<Buffer, KernelError> {
        self.upload(values, Dtype::F32)
    }

    /// Overwrites a buffer with new contents of the same length.
    ///
    /// # Errors
    /// [`KernelError::Shape`] if the lengths differ.
    pub fn write<T: bytemuck::NoUninit>(&self, buffer: &Buffer, values: &[T]) -> Result<(), KernelError> {
        let bytes: &[u8] = bytemuck::cast_slice(values);
        if bytes.len() != buffer.len * buffer.dtype.size() {
            return Err(KernelError::shape("write", "bytes", buffer.len * buffer.dtype.size(), bytes.len()));
        }
        if !self.is_dry() {
            self.client.write(&buffer.handle, Bytes::from_bytes_vec(bytes.to_vec()));
        }
        Ok(())
    }

    /// Waits for the device and copies a buffer back.
    ///
    /// # Errors
    /// [`KernelError::Device`] if a kernel that wrote the buffer failed or the context is dry, [`KernelError::Shape`] if
    /// `T` is not the size of an element.
    pub fn download<T: bytemuck::Pod>(&self, buffer: &Buffer) -> Result<Vec<T>, KernelError> {
        if size_of::<T>() != buffer.dtype.size() {
            return Err(KernelError::shape("download", "bytes of an element", buffer.dtype.size(), size_of::<T>()));
        }
        if self.is_dry() {
            let reason = "a dry context computes none".into();
            return Err(KernelError::Device { doing: "reading a result back", reason });
        }
        let bytes = self
            .client
            .read_one(buffer.handle.clone())
            .map_err(|e| KernelError::Device { doing: "reading a result back", reason: e.to_string() })?;
        // On the CPU runtime the bytes are the device's memory: copied before a later launch writes it.
        Ok(bytemuck::pod_collect_to_vec(&bytes[..buffer.len * buffer.dtype.size()]))
    }

    /// Waits for the device and copies an f32 buffer back.
    ///
    /// # Errors
    /// As [`Context::download`].
    pub fn download_f32(&self, buffer: &Buffer) -> Result<Vec<f32>, KernelError> {
        self.download(buffer)
    }

    /// Waits until everything launched so far has run, and reports failures of what wrote `outputs`.
    ///
    /// # Errors
    /// [`KernelError::Device`] with the runtime's words.
    pub fn finish<'a>(&self, outputs: impl IntoIterator<Item = &'a Buffer>) -> Result<(), KernelError> {
        if self.is_dry() {
            return Ok(());
        }
        let handles: Vec<&Handle> = outputs.into_iter().map(Buffer::handle).collect();
        cubecl::future::block_on(self.client.sync_buffers(handles))
            .map_err(|e| KernelError::Device { doing: "waiting for results", reason: e.to_string() })
    }

    /// Launches a kernel: every launch goes through here. `launch` is given the client, the number of cubes and the units of
    /// a cube, and is not called if the device cannot count that many cubes. The queue is handed over to the device in time.
    ///
    /// # Errors
    /// [`KernelError::Limit`], naming the `operation`, for more cubes than the device counts. What fails later shows when an
    /// output is read.
    #[track_caller]
    pub fn launch(
        &self,
        operation: &'static str,
        work: impl Into<Declared>,
        launch: impl FnOnce(&Client, CubeCount, CubeDim),
    ) -> Result<(), KernelError> {
        let Declared { work, flops } = work.into();
        let (cubes, dim) = match work {
            Work::Cubes(cubes, dim) => (cubes, dim),
            Work::Items(items) => {
                let units = self.caps.cube_units();
                let cubes = if self.caps.cores.is_some() { 1 } else { items.div_ceil(units as usize) };
                (cubes, CubeDim::new_1d(units))
            }
        };
        let [x, y] = layout(operation, cubes as u64, self.caps.max_cubes)?;
        let count = self.launches.fetch_add(1, Ordering::Relaxed) + 1;
        let launch = || launch(&self.client, CubeCount::Static(x, y, 1), dim);
        if let Some(dry) = &self.dry {
            if dry.compiles() {
                let _compiled_only = DryRun::new();
                launch();
                let _ = self.client.flush();
            }
            return Ok(());
        }
        // Whatever a compiling context does on another thread.
        let _executed = RealRun::new();
        if let Some(recorder) = &self.recorder {
            return self.record(recorder, operation, Location::caller(), flops, launch);
        }
        launch();
        if count.is_multiple_of(LAUNCHES_PER_FLUSH) {
            // Nothing is lost by ignoring the result: a failed launch taints its outputs, and reading them tells.
            let _ = self.client.flush();
        }
        Ok(())
    }

    /// Launches and waits.
    fn record(
        &self,
        recorder: &Recorder,
        operation: &'static str,
        place: &'static Location<'static>,
        flops: u64,
        launch: impl FnOnce(),
    ) -> Result<(), KernelError> {
        // Uploads before it are not its own.
        self.wait()?;
        self.held.take_given();
        let forms = LaunchedKernels::new();
        let began = Instant::now();
        launch();
        self.wait()?;
        let took = began.elapsed();
        let (form, bytes) = (forms.finish().into_iter().next().unwrap_or_default(), self.held.take_given());
        recorder.push(Launched { operation, place, form, began, took, flops, bytes });
        Ok(())
    }

    fn wait(&self) -> Result<(), KernelError> {
        cubecl::future::block_on(self.client.sync())
            .map_err(|e| KernelError::Device { doing: "waiting for a kernel", reason: e.to_string() })
    }

    fn allocate(&self, len: usize, dtype: Dtype, kind: Kind) -> Result<Buffer, KernelError> {
        if let Some(dry) = &self.dry {
            return Ok(self.buffer(dry.handle(bytes_of(len, dtype)), len, dtype, kind));
        }
        self.check_size(len, dtype)?;
        Ok(self.buffer(self.client.empty(len * dtype.size()), len, dtype, kind))
    }

    fn buffer(&self, handle: Handle, len: usize, dtype: Dtype, kind: Kind) -> Buffer {
        let lease = Some(Lease::new(&self.held, bytes_of(len, dtype), kind));
        Buffer { handle, len, dtype, lease }
    }

    fn check_size(&self, len: usize, dtype: Dtype) -> Result<(), KernelError> {
        let (actual, limit) = (bytes_of(len, dtype), self.caps.max_buffer);
        if actual > limit {
            return Err(KernelError::Limit { operation: "allocation", what: "bytes of a buffer", actual, limit });
        }
        Ok(())
    }
}

fn bytes_of(len: usize, dtype: Dtype) -> u64 {
    (len as u64).saturating_mul(dtype.size() as u64)
}
