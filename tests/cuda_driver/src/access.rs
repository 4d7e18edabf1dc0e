//! Loads, stores and atomics of a warp, with all checks.

use crate::arithmetic as numbers;
use crate::cube::{Cube, Stop};
use crate::memory::{Allocation, SECTOR};
use crate::program::{Access, Atomic, File, Slot, Space};
use crate::report::Fault;
use crate::shared::Who;
use crate::warp::{LANES, Warp, each};

/// Where shared memory is in the generic address space.
pub const SHARED_WINDOW: u64 = 0x0e00_0000_0000;
/// Where local memory is.
pub const LOCAL_WINDOW: u64 = 0x0d00_0000_0000;
/// Where parameters are.
pub const PARAM_WINDOW: u64 = 0x0c00_0000_0000;
const WINDOW_BYTES: u64 = 1 << 32;

/// The space of a generic address, and the address in it.
#[inline]
pub fn from_generic(address: u64) -> (Space, u64) {
    for (space, window) in [(Space::Shared, SHARED_WINDOW), (Space::Local, LOCAL_WINDOW), (Space::Param, PARAM_WINDOW)]
    {
        if address.wrapping_sub(window) < WINDOW_BYTES {
            return (space, address - window);
        }
    }
    (Space::Global, address)
}

/// What is added to an address of a space to make it generic.
pub fn window(space: Space) -> u64 {
    match space {
        Space::Shared => SHARED_WINDOW,
        Space::Local => LOCAL_WINDOW,
        Space::Param => PARAM_WINDOW,
        _ => 0,
    }
}

/// The lanes of a mask.
#[inline]
pub fn lanes(mut mask: u32) -> impl Iterator<Item = usize> {
    std::iter::from_fn(move || {
        let lane = (mask != 0).then(|| mask.trailing_zeros() as usize)?;
        mask &= mask - 1;
        Some(lane)
    })
}

/// What is done to memory.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Does {
    Read,
    Write,
    Update,
}

/// The host's addresses of what the lanes access; null for lanes that do not.
type Pointers = [*mut u8; LANES];

impl Cube<'_> {
    /// Addresses of all lanes.
    #[inline]
    pub fn addresses(warp: &Warp, slot: Slot, offset: i64) -> [u64; LANES] {
        each(&warp.get_bits(slot), |address| address.wrapping_add(offset as u64))
    }

    /// `ld`
    pub fn load(&mut self, warp: &mut Warp, access: Access, o: &[Slot], mask: u32) -> Result<(), Stop> {
        let (results, base) = o.split_at(access.count as usize);
        let addresses = Self::addresses(warp, base[0], access.offset);
        let pointers = self.resolve(warp, access, addresses, mask, Does::Read)?;
        let bytes = access.ty.bytes();
        for (i, slot) in results.iter().enumerate() {
            let at = i * bytes;
            // SAFETY (all four): `resolve` checked that each lane's pointer, unless null, has `count * bytes` bytes
            // behind it that stay mapped during the launch. Another thread may write them at the same time, as on a
            // GPU: that is a race of the kernel, which is reported.
            if bytes == 4 && slot.file() == File::Word {
                let mut values = [0u32; LANES];
                for lane in lanes(mask) {
                    values[lane] = unsafe { pointers[lane].add(at).cast::<u32>().read_unaligned() };
                }
                warp.put(*slot, &values, mask);
                continue;
            }
            let mut values = [0; LANES];
            for lane in lanes(mask) {
                let p = pointers[lane].wrapping_add(at);
                // SAFETY: as above.
                values[lane] = unsafe {
                    match bytes {
                        1 => u64::from(p.read()),
                        2 => u64::from(p.cast::<u16>().read_unaligned()),
                        4 => u64::from(p.cast::<u32>().read_unaligned()),
                        _ => p.cast::<u64>().read_unaligned(),
                    }
                };
            }
            if access.ty.is_signed() {
                values = values.map(|value| numbers::extend(value, access.ty));
            }
            warp.put_bits(*slot, &values, mask);
        }
        Ok(())
    }

    /// `st`
    pub fn store(&mut self, warp: &mut Warp, access: Access, o: &[Slot], mask: u32) -> Result<(), Stop> {
        let addresses = Self::addresses(warp, o[0], access.offset);
        let pointers = self.resolve(warp, access, addresses, mask, Does::Write)?;
        let bytes = access.ty.bytes();
        let total = bytes * access.count as usize;
        let values: Vec<[u64; LANES]> = o[1..].iter().map(|slot| warp.get_bits(*slot)).collect();
        for lane in lanes(mask) {
            let mut data = [0; 32];
            for (i, value) in values.iter().enumerate() {
                data[i * bytes..][..bytes].copy_from_slice(&value[lane].to_le_bytes()[..bytes]);
            }
            let (space, address) = self.space_of(access.space, addresses[lane]);
            if space == Space::Shared {
                self.store_shared(warp, lane, address as usize, &data[..total]);
            }
            // SAFETY: as in `load`.
            unsafe { std::ptr::copy_nonoverlapping(data.as_ptr(), pointers[lane], total) };
        }
        Ok(())
    }

    /// Notes a write of shared memory, before it is done.
    pub(crate) fn store_shared(&mut self, warp: &Warp, lane: usize, offset: usize, data: &[u8]) {
        let who = Who::Thread(warp.number as u16 * 32 + lane as u16);
        let changes = self.shared.data[offset..][..data.len()] != *data;
        if let Some(conflict) = self.shared.write(offset, data.len(), who, &warp.stamps, changes) {
            let detail = format!("written after {}", self.describe(conflict));
            self.note(Fault::SharedRace, warp.number, lane, Some(offset as u64), detail);
        }
    }

    /// `atom`, `red`
    pub fn update(
        &mut self,
        warp: &mut Warp,
        atomic: Atomic,
        access: Access,
        o: &[Slot],
        mask: u32,
    ) -> Result<(), Stop> {
        let addresses = Self::addresses(warp, o[1], access.offset);
        self.resolve(warp, access, addresses, mask, Does::Update)?;
        let (b, c) = (warp.get_bits(o[2]), o.get(3).map_or([0; LANES], |slot| warp.get_bits(*slot)));
        let bytes = access.ty.bytes();
        let mut old = [0; LANES];
        for lane in lanes(mask) {
            let (space, address) = self.space_of(access.space, addresses[lane]);
            let f = |old| numbers::atomic(atomic, access.ty, old, b[lane], c[lane]);
            old[lane] = match space {
                Space::Shared => {
                    let at = &mut self.shared.data[address as usize..][..bytes];
                    let mut word = [0; 8];
                    word[..bytes].copy_from_slice(at);
                    let before = u64::from_le_bytes(word);
                    at.copy_from_slice(&f(before).to_le_bytes()[..bytes]);
                    before
                }
                _ => match self.allocation_of(address) {
                    Some(allocation) => allocation.update((address - allocation.base) as usize, bytes, f),
                    None => 0,
                },
            };
        }
        warp.put_bits(o[0], &old, mask);
        Ok(())
    }

    fn allocation_of(&self, address: u64) -> Option<&Allocation> {
        self.launch.view.find(address).and_then(|number| self.launch.view.allocation(number))
    }

    #[inline]
    pub(crate) fn space_of(&self, space: Space, address: u64) -> (Space, u64) {
        match space {
            Space::Generic => from_generic(address),
            Space::Const => (Space::Global, address),
            _ => (space, address),
        }
    }

    /// Checks an access and notes it.
    fn resolve(
        &mut self,
        warp: &mut Warp,
        access: Access,
        mut addresses: [u64; LANES],
        mask: u32,
        does: Does,
    ) -> Result<Pointers, Stop> {
        let total = access.ty.bytes() * access.count as usize;
        let mut pointers = [std::ptr::null_mut(); LANES];
        let misaligned = lanes(mask).find(|lane| addresses[*lane] & (total as u64 - 1) != 0);
        if let Some(lane) = misaligned.filter(|_| total.is_power_of_two()) {
            let detail = format!("{total} bytes are accessed together, and need an address that they divide");
            return Err(self.fatal(Fault::Misaligned, warp.number, lane, Some(addresses[lane]), detail));
        }
        let mut spaces = [(access.space, mask), (access.space, 0), (access.space, 0), (access.space, 0)];
        match access.space {
            Space::Generic => {
                spaces = [Space::Global, Space::Shared, Space::Local, Space::Param].map(|space| (space, 0));
                for lane in lanes(mask) {
                    let (space, address) = from_generic(addresses[lane]);
                    addresses[lane] = address;
                    spaces.iter_mut().filter(|(s, _)| *s == space).for_each(|(_, mask)| *mask |= 1 << lane);
                }
            }
            Space::Const => spaces[0].0 = Space::Global,
            _ => {}
        }
        for (space, mask) in spaces.into_iter().filter(|(_, mask)| *mask != 0) {
            match space {
                Space::Global => self.global(warp, access, total, &addresses, mask, does, &mut pointers)?,
                Space::Shared => self.in_shared(warp, total, &addresses, mask, does, &mut pointers)?,
                Space::Local => self.in_local(warp, total, &addresses, mask, does, &mut pointers)?,
                _ => self.in_parameters(warp, total, &addresses, mask, does, &mut pointers)?,
            }
        }
        Ok(pointers)
    }

    #[allow(clippy::too_many_arguments)]
    fn global(
        &mut self,
        warp: &Warp,
        access: Access,
        total: usize,
        addresses: &[u64; LANES],
        mask: u32,
        does: Does,
        pointers: &mut Pointers,
    ) -> Result<(), Stop> {
        let launch = self.launch;
        let strong = access.shared_between_cubes;
        let mut left = mask;
        while left != 0 {
            let first = left.trailing_zeros() as usize;
            let cached = self.cached[self.at as usize] as usize;
            let hit = launch.view.allocation(cached).is_some_and(|a| a.holds(addresses[first], total));
            let number = if hit { Some(cached) } else { launch.view.find(addresses[first]) };
            let found = number.and_then(|number| launch.view.allocation(number));
            let Some(allocation) = found.filter(|a| a.holds(addresses[first], total)) else {
                let (fault, detail) = launch.memory.explain(addresses[first], total);
                return Err(self.fatal(fault, warp.number, first, Some(addresses[first]), detail));
            };
            self.cached[self.at as usize] = number.unwrap_or_default() as u32;
            let mut group = 0;
            for lane in lanes(left) {
                if allocation.holds(addresses[lane], total) {
                    group |= 1 << lane;
                }
            }
            left &= !group;
            self.count_sectors(allocation, total, addresses, group, does);
            for lane in lanes(group) {
                let offset = (addresses[lane] - allocation.base) as usize;
                pointers[lane] = allocation.pointer(offset);
                if does != Does::Write
                    && let Some(byte) = allocation.never_written(offset, total)
                {
                    let detail = format!("byte {} of an allocation of {}", offset + byte, allocation.bytes);
                    self.note(Fault::NeverWritten, warp.number, lane, Some(addresses[lane]), detail);
                }
                let clean = match does {
                    Does::Read => allocation.read_by(self.who, offset, total, strong),
                    _ => {
                        allocation.mark_written(offset, total);
                        allocation.written_by(self.who, offset, total, strong)
                    }
                };
                if !clean {
                    let verb = if does == Does::Read { "read" } else { "written" };
                    let before = if does == Does::Read { "written" } else { "read or written" };
                    let detail = format!("{verb} here, {before} by another cube of the launch");
                    self.note(Fault::GlobalRace, warp.number, lane, Some(addresses[lane]), detail);
                }
            }
        }
        Ok(())
    }

    pub(crate) fn count_sectors(
        &mut self,
        allocation: &Allocation,
        total: usize,
        addresses: &[u64; LANES],
        mask: u32,
        does: Does,
    ) {
        let (mut sectors, mut distinct, mut unique) = (0, 0, 0);
        let store = does == Does::Write;
        let (mut last_sector, mut last_address) = (usize::MAX, u64::MAX);
        let mut seen = [usize::MAX; 8];
        for lane in lanes(mask) {
            let address = addresses[lane];
            if address == last_address {
                continue;
            }
            (last_address, distinct) = (address, distinct + 1);
            // Allocations start at a sector.
            let offset = (address - allocation.base) as usize;
            for sector in offset / SECTOR..(offset + total - 1) / SECTOR + 1 {
                if sector == last_sector || seen.contains(&sector) {
                    continue;
                }
                // A few are remembered: accesses that jump back further count once more, as they would in hardware
                // that handles a warp in parts.
                seen[sectors as usize % 8] = sector;
                (last_sector, sectors) = (sector, sectors + 1);
                unique += u64::from(allocation.touch_sector(sector, self.launch.number, store));
            }
        }
        let least = (distinct * total).div_ceil(SECTOR) as u64;
        let counters = &mut self.counters;
        if store {
            counters.store_sectors += sectors;
            counters.store_sectors_least += least.min(sectors);
            counters.store_sectors_unique += unique;
        } else {
            counters.load_sectors += sectors;
            counters.load_sectors_least += least.min(sectors);
            counters.load_sectors_unique += unique;
        }
    }

    fn in_shared(
        &mut self,
        warp: &Warp,
        total: usize,
        addresses: &[u64; LANES],
        mask: u32,
        does: Does,
        pointers: &mut Pointers,
    ) -> Result<(), Stop> {
        let first = mask.trailing_zeros() as usize;
        let (mut same, mut consecutive, mut next) = (true, true, addresses[first]);
        for lane in lanes(mask) {
            self.check_shared(warp, lane, addresses[lane], total)?;
            pointers[lane] = self.shared.data.as_mut_ptr().wrapping_add(addresses[lane] as usize);
            same &= addresses[lane] == addresses[first];
            consecutive &= addresses[lane] == next;
            next += total as u64;
        }
        if does == Does::Read && same && mask.count_ones() > 1 {
            self.read_shared(warp, first, Who::Warp(warp.number as u16), addresses[first] as usize, total, false);
        } else if does != Does::Write {
            for lane in lanes(mask) {
                let who = Who::Thread(warp.number as u16 * 32 + lane as u16);
                self.read_shared(warp, lane, who, addresses[lane] as usize, total, does == Does::Update);
            }
        }
        if same || consecutive {
            let bytes = if same { total } else { total * mask.count_ones() as usize };
            self.counters.shared_wavefronts += bytes.div_ceil(128) as u64;
            self.counters.shared_wavefronts_least += bytes.div_ceil(128) as u64;
            return Ok(());
        }
        let range = |lane: usize| addresses[lane] as usize / 4..(addresses[lane] as usize + total - 1) / 4 + 1;
        self.count_wavefronts(lanes(mask).flat_map(range), total.div_ceil(4));
        Ok(())
    }

    /// That a range is in the cube's shared memory.
    #[inline]
    pub fn check_shared(&self, warp: &Warp, lane: usize, address: u64, bytes: usize) -> Result<(), Stop> {
        let size = self.launch.shape.total_shared as usize;
        if self.shared.holds(address, bytes, size) {
            return Ok(());
        }
        let detail = format!("{bytes} bytes at {address} of the {size} bytes of shared memory");
        Err(self.fatal(Fault::OutOfBounds, warp.number, lane, Some(address), detail))
    }

    #[inline]
    pub(crate) fn read_shared(
        &mut self,
        warp: &Warp,
        lane: usize,
        who: Who,
        offset: usize,
        bytes: usize,
        update: bool,
    ) {
        if !self.shared.is_written(offset, bytes) {
            let detail = "in shared memory of this cube".to_string();
            self.note(Fault::NeverWritten, warp.number, lane, Some(offset as u64), detail);
        }
        // Atomics of different threads do not race with one another.
        if !update && let Some(conflict) = self.shared.read(offset, bytes, who, &warp.stamps) {
            let detail = format!("read after {}", self.describe(conflict));
            self.note(Fault::SharedRace, warp.number, lane, Some(offset as u64), detail);
        }
    }

    /// Words of four bytes in the order of the lanes, so many of each.
    pub fn count_wavefronts(&mut self, words: impl Iterator<Item = usize>, of_a_lane: usize) {
        let mut all = [0; 8 * LANES];
        let mut count = 0;
        for word in words.take(all.len()) {
            all[count] = word;
            count += 1;
        }
        let all = &mut all[..count];
        // Wider accesses are done for a half or a quarter of the lanes at a time.
        for part in all.chunks_mut(32 / of_a_lane.max(1) * of_a_lane.max(1)) {
            if part.windows(2).all(|pair| pair[0] == pair[1] || pair[0] + 1 == pair[1]) {
                self.counters.shared_wavefronts += 1;
                self.counters.shared_wavefronts_least += 1;
                continue;
            }
            part.sort_unstable();
            let mut banks = [0u8; 32];
            let mut last = usize::MAX;
            let mut distinct: u64 = 0;
            for word in part.iter().filter(|word| {
                let new = **word != last;
                last = **word;
                new
            }) {
                banks[word % 32] += 1;
                distinct += 1;
            }
            self.counters.shared_wavefronts += u64::from(banks.iter().copied().max().unwrap_or_default());
            self.counters.shared_wavefronts_least += distinct.div_ceil(32);
        }
    }

    fn in_local(
        &mut self,
        warp: &mut Warp,
        total: usize,
        addresses: &[u64; LANES],
        mask: u32,
        does: Does,
        pointers: &mut Pointers,
    ) -> Result<(), Stop> {
        let size = self.program.local_bytes;
        for lane in lanes(mask) {
            let address = addresses[lane];
            if address >= size as u64 || address as usize + total > size {
                let detail = format!("{total} bytes at {address} of the {size} bytes of a thread's local memory");
                return Err(self.fatal(Fault::OutOfBounds, warp.number, lane, Some(address), detail));
            }
            let at = lane * size + address as usize;
            if does == Does::Read && warp.local_written[at..at + total].contains(&0) {
                let detail = "in local memory of this thread".to_string();
                self.note(Fault::NeverWritten, warp.number, lane, Some(address), detail);
            } else if does != Does::Read {
                warp.local_written[at..at + total].fill(1);
            }
            pointers[lane] = warp.local.as_mut_ptr().wrapping_add(at);
        }
        Ok(())
    }

    fn in_parameters(
        &mut self,
        warp: &Warp,
        total: usize,
        addresses: &[u64; LANES],
        mask: u32,
        does: Does,
        pointers: &mut Pointers,
    ) -> Result<(), Stop> {
        let parameters = &self.launch.parameters;
        for lane in lanes(mask) {
            let address = addresses[lane];
            if does != Does::Read || address >= parameters.len() as u64 || address as usize + total > parameters.len() {
                let detail = format!("{total} bytes at {address} of the {} bytes of parameters", parameters.len());
                return Err(self.fatal(Fault::OutOfBounds, warp.number, lane, Some(address), detail));
            }
            pointers[lane] = parameters.as_ptr().wrapping_add(address as usize).cast_mut();
        }
        Ok(())
    }
}
