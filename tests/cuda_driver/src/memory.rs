//! Global memory: allocations with guard zones between them, and what is known of each of their bytes.

use crate::report::Fault;
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU8, AtomicU16, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

/// Where the first allocation is. Below lie the windows of the other spaces.
const FIRST_ADDRESS: u64 = 0x1000_0000_0000;
/// At least so many bytes between two allocations. Addresses are never given out twice.
const GUARD: u64 = 1 << 16;
/// Bytes of a sector, the unit in which a GPU reads and writes its memory.
pub const SECTOR: usize = 32;

/// Readers or writers of a place: more than one cube.
const MANY: u64 = (1 << 23) - 1;

/// One allocation. Each byte has a flag that says whether somebody wrote it; each granule (up to four bytes, by the
/// kernel's smallest access) has the last cubes that read and wrote it, of the launch that is on:
/// launch 17 bits, written by an atomic 1, writer 23, reader 23.
pub struct Allocation {
    /// Its address.
    pub base: u64,
    /// Its size.
    pub bytes: usize,
    map: *mut u8,
    map_bytes: usize,
    data: *mut u8,
    written: *mut u8,
    races: *mut u8,
    loaded: *mut u8,
    stored: *mut u8,
}

// SAFETY: the pointers are to a mapping that lives as long as the allocation. What threads do to it at the same time,
// the kernel does: data is accessed like a GPU's memory, and the records beside it are atomics.
unsafe impl Send for Allocation {}
// SAFETY: as above.
unsafe impl Sync for Allocation {}

impl Drop for Allocation {
    fn drop(&mut self) {
        // SAFETY: the mapping was made in `new` and nobody else can reach it any more.
        unsafe { libc::munmap(self.map.cast(), self.map_bytes) };
    }
}

impl Allocation {
    fn new(base: u64, bytes: usize) -> Option<Self> {
        let rounded = bytes.next_multiple_of(64);
        let sectors = rounded.div_ceil(SECTOR) * 4;
        // Pages that nobody touches cost nothing, so the records have room for granules of a single byte.
        let map_bytes = rounded * 10 + sectors * 2;
        // SAFETY: a new anonymous mapping, which is checked.
        let map = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                map_bytes,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
                -1,
                0,
            )
        };
        if map == libc::MAP_FAILED {
            return None;
        }
        let map: *mut u8 = map.cast();
        let at = |offset: usize| map.wrapping_add(offset);
        Some(Self {
            base,
            bytes,
            map,
            map_bytes,
            data: map,
            written: at(rounded),
            races: at(rounded * 2),
            loaded: at(rounded * 10),
            stored: at(rounded * 10 + sectors),
        })
    }

    /// Whether some bytes from an address on are all in here.
    #[inline(always)]
    pub fn holds(&self, address: u64, bytes: usize) -> bool {
        address >= self.base && address + bytes as u64 <= self.base + self.bytes as u64
    }

    /// The host's pointer to a byte.
    ///
    /// # Panics
    ///
    /// If it is not in here.
    #[inline(always)]
    pub fn pointer(&self, offset: usize) -> *mut u8 {
        assert!(offset <= self.bytes, "offsets are checked before");
        self.data.wrapping_add(offset)
    }

    fn flags(&self, offset: usize, bytes: usize) -> &[AtomicU8] {
        assert!(offset + bytes <= self.bytes, "offsets are checked before");
        // SAFETY: within the mapping, which is as old as `self`; atomics may be shared.
        unsafe { std::slice::from_raw_parts(self.written.add(offset).cast(), bytes) }
    }

    /// The first byte of a range that nobody wrote.
    #[inline]
    pub fn never_written(&self, offset: usize, bytes: usize) -> Option<usize> {
        let flags = self.flags(offset, bytes);
        let all = match bytes {
            // SAFETY: `flags` are four bytes, which may be read at any alignment; a flag that changes meanwhile is a
            // race of the kernel's, and one value is as good as the other.
            4 => unsafe { flags.as_ptr().cast::<u32>().read_unaligned() == 0x0101_0101 },
            // SAFETY: the same with sixteen bytes.
            16 => unsafe { flags.as_ptr().cast::<u128>().read_unaligned() == u128::MAX / 255 },
            _ => false,
        };
        if all { None } else { flags.iter().position(|flag| flag.load(Ordering::Relaxed) == 0) }
    }

    /// Notes that a range was written.
    #[inline]
    pub fn mark_written(&self, offset: usize, bytes: usize) {
        for flag in self.flags(offset, bytes) {
            flag.store(1, Ordering::Relaxed);
        }
    }

    /// Takes over another range's flags, as a copy does.
    pub fn copy_written(&self, offset: usize, from: &Self, from_offset: usize, bytes: usize) {
        for (to, from) in self.flags(offset, bytes).iter().zip(from.flags(from_offset, bytes)) {
            to.store(from.load(Ordering::Relaxed), Ordering::Relaxed);
        }
    }

    fn races(&self, offset: usize, bytes: usize, granule: usize) -> &[AtomicU64] {
        let (first, last) = (offset / granule, (offset + bytes - 1) / granule);
        // SAFETY: there are as many records as bytes, and the mapping is aligned to a page.
        unsafe { std::slice::from_raw_parts(self.races.cast::<AtomicU64>().add(first), last - first + 1) }
    }

    /// Notes that a cube read a range; false if another one wrote it in the same launch.
    #[inline]
    pub fn read_by(&self, cube: Cube, offset: usize, bytes: usize, atomically: bool) -> bool {
        let mut clean = true;
        for record in self.races(offset, bytes, cube.granule) {
            let mut old = record.load(Ordering::Relaxed);
            loop {
                let (mut reader, mut writer, mut atomic) = (0, 0, false);
                if old >> 47 == cube.launch {
                    (reader, writer, atomic) = (old & MANY, old >> 23 & MANY, old >> 46 & 1 == 1);
                }
                if writer != 0 && writer != cube.number && !(atomic && atomically) {
                    clean = false;
                }
                // What atomics read is no reader that a later atomic could disturb.
                let reader = match reader {
                    _ if atomically => reader,
                    0 => cube.number,
                    same if same == cube.number => same,
                    _ => MANY,
                };
                let new = cube.launch << 47 | u64::from(atomic) << 46 | writer << 23 | reader;
                if new == old {
                    break;
                }
                match record.compare_exchange_weak(old, new, Ordering::Relaxed, Ordering::Relaxed) {
                    Ok(_) => break,
                    Err(other) => old = other,
                }
            }
        }
        clean
    }

    /// Notes that a cube wrote a range; false if another one read or wrote it in the same launch.
    #[inline]
    pub fn written_by(&self, cube: Cube, offset: usize, bytes: usize, atomically: bool) -> bool {
        let mut clean = true;
        for record in self.races(offset, bytes, cube.granule) {
            let mut old = record.load(Ordering::Relaxed);
            loop {
                let (mut reader, mut writer, mut atomic) = (0, 0, atomically);
                if old >> 47 == cube.launch {
                    (reader, writer, atomic) = (old & MANY, old >> 23 & MANY, old >> 46 & 1 == 1);
                }
                let others = |who: u64| who != 0 && who != cube.number;
                if others(reader) || others(writer) && !(atomic && atomically) {
                    clean = false;
                }
                let both_atomic = atomically && (atomic || writer == 0);
                let writer = if others(writer) { MANY } else { cube.number };
                let new = cube.launch << 47 | u64::from(both_atomic) << 46 | writer << 23 | reader;
                if new == old {
                    break;
                }
                match record.compare_exchange_weak(old, new, Ordering::Relaxed, Ordering::Relaxed) {
                    Ok(_) => break,
                    Err(other) => old = other,
                }
            }
        }
        clean
    }

    /// Notes that a launch touched a sector; whether it is the first time.
    #[inline]
    pub fn touch_sector(&self, sector: usize, launch: u32, store: bool) -> bool {
        assert!(sector * SECTOR < self.bytes, "offsets are checked before");
        let records = if store { self.stored } else { self.loaded };
        // SAFETY: there is a record for each sector, aligned as the mapping is.
        let record = unsafe { &*records.cast::<AtomicU32>().add(sector) };
        record.load(Ordering::Relaxed) != launch && record.swap(launch, Ordering::Relaxed) != launch
    }

    /// Forgets all cubes: the numbers of launches start over.
    fn forget_races(&self) {
        let offset = self.races as usize - self.map as usize;
        // SAFETY: whole pages inside of the mapping, which then read as zeros again; no kernel runs.
        unsafe {
            let first = (offset.next_multiple_of(4096)).min(self.map_bytes);
            std::ptr::write_bytes(self.races, 0, first - offset);
            let end = (offset + self.bytes * 8).max(first);
            libc::madvise(self.map.add(first).cast(), end - first, libc::MADV_DONTNEED);
        }
    }

    /// An atomic operation on a value of 2, 4 or 8 bytes; the value before.
    pub fn update(&self, offset: usize, bytes: usize, f: impl Fn(u64) -> u64) -> u64 {
        assert!(offset + bytes <= self.bytes && offset % bytes == 0, "offsets are checked before");
        let at = self.data.wrapping_add(offset);
        // SAFETY: within the mapping and aligned, both checked above; kernels' plain accesses of it at the same time
        // are races that are reported.
        unsafe {
            match bytes {
                2 => {
                    let atomic = AtomicU16::from_ptr(at.cast());
                    let f = |old| Some(f(u64::from(old)) as u16);
                    u64::from(atomic.fetch_update(Ordering::AcqRel, Ordering::Acquire, f).unwrap_or_else(|old| old))
                }
                4 => {
                    let atomic = AtomicU32::from_ptr(at.cast());
                    let f = |old| Some(f(u64::from(old)) as u32);
                    u64::from(atomic.fetch_update(Ordering::AcqRel, Ordering::Acquire, f).unwrap_or_else(|old| old))
                }
                _ => {
                    let atomic = AtomicU64::from_ptr(at.cast());
                    atomic
                        .fetch_update(Ordering::AcqRel, Ordering::Acquire, |old| Some(f(old)))
                        .unwrap_or_else(|old| old)
                }
            }
        }
    }
}

/// Who accesses memory.
#[derive(Clone, Copy, Debug)]
pub struct Cube {
    /// From 1.
    pub number: u64,
    /// Of the device, modulo 2^17, never 0.
    pub launch: u64,
    /// Bytes of a record.
    pub granule: usize,
}

impl Cube {
    /// Cube `index` of a launch.
    pub fn new(index: u64, launch: u32, granule: usize) -> Self {
        Self { number: index % (MANY - 1) + 1, launch: u64::from(launch % LAUNCHES) + 1, granule }
    }
}

/// Launches until their numbers repeat.
pub const LAUNCHES: u32 = (1 << 17) - 2;

/// All memory of the device.
#[derive(Default)]
pub struct Memory {
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    live: BTreeMap<u64, Arc<Allocation>>,
    /// Addresses to sizes.
    freed: BTreeMap<u64, u64>,
    end: u64,
    in_use: usize,
}

/// What was allocated when a launch began.
pub struct View {
    live: Vec<Arc<Allocation>>,
}

impl View {
    /// The number of the allocation that holds an address.
    #[inline]
    pub fn find(&self, address: u64) -> Option<usize> {
        let after = self.live.partition_point(|allocation| allocation.base <= address);
        let at = after.checked_sub(1)?;
        self.live[at].holds(address, 1).then_some(at)
    }

    /// By the number that [`View::find`] gave.
    #[inline(always)]
    pub fn allocation(&self, number: usize) -> Option<&Allocation> {
        self.live.get(number).map(|allocation| &**allocation)
    }
}

impl Memory {
    fn state(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    /// New memory, which nobody wrote; none if the machine has not enough.
    pub fn allocate(&self, bytes: usize) -> Option<u64> {
        let mut state = self.state();
        // Data and flags, and two bytes a byte for the cubes.
        if (state.in_use + bytes).saturating_mul(4) > machine_bytes() {
            return None;
        }
        // Aligned to 512, as CUDA does it, and to no more.
        let base = (state.end.max(FIRST_ADDRESS) + GUARD).next_multiple_of(1024) + 512;
        let allocation = Allocation::new(base, bytes)?;
        state.end = base + bytes as u64;
        state.in_use += bytes;
        state.live.insert(base, Arc::new(allocation));
        Some(base)
    }

    /// Takes memory back; whether there was any at the address.
    pub fn free(&self, base: u64) -> bool {
        let mut state = self.state();
        let Some(allocation) = state.live.remove(&base) else { return false };
        state.in_use -= allocation.bytes;
        state.freed.insert(base, allocation.bytes as u64);
        true
    }

    /// The allocation that holds a range, and its offset in there.
    pub fn find(&self, address: u64, bytes: usize) -> Option<(Arc<Allocation>, usize)> {
        let state = self.state();
        let (_, allocation) = state.live.range(..=address).next_back()?;
        allocation.holds(address, bytes).then(|| (allocation.clone(), (address - allocation.base) as usize))
    }

    /// For a launch.
    pub fn view(&self, launch: u32) -> View {
        let state = self.state();
        if launch % LAUNCHES == 0 {
            state.live.values().for_each(|allocation| allocation.forget_races());
        }
        View { live: state.live.values().cloned().collect() }
    }

    /// What is wrong with an address that no allocation holds.
    pub fn explain(&self, address: u64, bytes: usize) -> (Fault, String) {
        let state = self.state();
        let size = if bytes == 1 { "1 byte".to_string() } else { format!("{bytes} bytes") };
        if let Some((base, freed)) = state.freed.range(..=address).next_back()
            && address < base + freed
        {
            return (Fault::Freed, format!("{size} in an allocation of {freed} that was freed"));
        }
        let before = state.live.range(..=address).next_back();
        let after = state.live.range(address..).next();
        let behind = before.map(|(base, allocation)| (address - base, allocation.bytes as u64));
        let ahead = after.map(|(base, allocation)| (base - address, allocation.bytes));
        let detail = match (behind, ahead) {
            (Some((offset, length)), _) if offset < length => {
                format!("{size} at {offset} of an allocation of {length}, beyond its end")
            }
            (Some((offset, length)), None) => format!("{size} at {offset} of an allocation of {length}"),
            (Some((offset, length)), Some((distance, _))) if offset - length <= distance => {
                format!("{size} at {offset} of an allocation of {length}")
            }
            (_, Some((distance, length))) => format!("{size} {distance} before an allocation of {length}"),
            (None, None) => format!("{size} where nothing is allocated"),
        };
        (Fault::OutOfBounds, detail)
    }

    /// Bytes allocated.
    pub fn in_use(&self) -> usize {
        self.state().in_use
    }
}

/// Physical memory.
fn machine_bytes() -> usize {
    // SAFETY: no arguments but a name.
    let (pages, size) = unsafe { (libc::sysconf(libc::_SC_PHYS_PAGES), libc::sysconf(libc::_SC_PAGESIZE)) };
    if pages > 0 && size > 0 { pages as usize * size as usize } else { usize::MAX }
}
