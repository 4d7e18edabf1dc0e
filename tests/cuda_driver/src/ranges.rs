//! Accesses of whole ranges: rows of matrices, and asynchronous copies.

use crate::access::{Does, from_generic, lanes};
use crate::cube::{Cube, Stop};
use crate::program::{Slot, Space};
use crate::report::Fault;
use crate::shared::Who;
use crate::warp::{LANES, Pending, Warp};

impl Cube<'_> {
    /// A range that the warp reads as a whole, for tensor cores: the host's pointer to it.
    pub fn read_range(
        &mut self,
        warp: &Warp,
        lane: usize,
        space: Space,
        address: u64,
        bytes: usize,
    ) -> Result<*const u8, Stop> {
        let (space, address) = self.space_of(space, address);
        if space == Space::Shared {
            self.check_shared(warp, lane, address, bytes)?;
            let offset = address as usize;
            if !self.shared.is_written(offset, bytes) {
                let detail = "in shared memory of this cube".to_string();
                self.note(Fault::NeverWritten, warp.number, lane, Some(address), detail);
            }
            let who = Who::Warp(warp.number as u16);
            if let Some(conflict) = self.shared.read(offset, bytes, who, &warp.stamps) {
                let detail = format!("read after {}", self.describe(conflict));
                self.note(Fault::SharedRace, warp.number, lane, Some(address), detail);
            }
            return Ok(self.shared.data.as_ptr().wrapping_add(offset));
        }
        self.global_range(warp, lane, address, bytes, Does::Read).map(|p| p.cast_const())
    }

    /// A range that the warp writes as a whole.
    pub fn write_range(
        &mut self,
        warp: &Warp,
        lane: usize,
        space: Space,
        address: u64,
        data: &[u8],
    ) -> Result<(), Stop> {
        let (space, address) = self.space_of(space, address);
        if space == Space::Shared {
            self.check_shared(warp, lane, address, data.len())?;
            let offset = address as usize;
            let who = Who::Warp(warp.number as u16);
            let changes = self.shared.data[offset..][..data.len()] != *data;
            if let Some(conflict) = self.shared.write(offset, data.len(), who, &warp.stamps, changes) {
                let detail = format!("written after {}", self.describe(conflict));
                self.note(Fault::SharedRace, warp.number, lane, Some(address), detail);
            }
            self.shared.data[offset..][..data.len()].copy_from_slice(data);
            return Ok(());
        }
        let to = self.global_range(warp, lane, address, data.len(), Does::Write)?;
        // SAFETY: as in `load`.
        unsafe { std::ptr::copy_nonoverlapping(data.as_ptr(), to, data.len()) };
        Ok(())
    }

    fn global_range(
        &mut self,
        warp: &Warp,
        lane: usize,
        address: u64,
        bytes: usize,
        does: Does,
    ) -> Result<*mut u8, Stop> {
        let launch = self.launch;
        let found = launch.view.find(address).and_then(|number| launch.view.allocation(number));
        let Some(allocation) = found.filter(|allocation| allocation.holds(address, bytes)) else {
            let (fault, detail) = launch.memory.explain(address, bytes);
            return Err(self.fatal(fault, warp.number, lane, Some(address), detail));
        };
        let offset = (address - allocation.base) as usize;
        let mut addresses = [0; LANES];
        addresses[0] = address;
        self.count_sectors(allocation, bytes, &addresses, 1, does);
        let clean = if does == Does::Read {
            if let Some(byte) = allocation.never_written(offset, bytes) {
                let detail = format!("byte {} of an allocation of {}", offset + byte, allocation.bytes);
                self.note(Fault::NeverWritten, warp.number, lane, Some(address), detail);
            }
            allocation.read_by(self.who, offset, bytes, false)
        } else {
            allocation.mark_written(offset, bytes);
            allocation.written_by(self.who, offset, bytes, false)
        };
        if !clean {
            let detail = "also accessed by another cube of the launch".to_string();
            self.note(Fault::GlobalRace, warp.number, lane, Some(address), detail);
        }
        Ok(allocation.pointer(offset))
    }

    /// `cp.async`: what it reads is read now, and arrives when it is waited for.
    pub fn copy_async(
        &mut self,
        warp: &mut Warp,
        bytes: usize,
        offsets: [i64; 2],
        o: &[Slot],
        mask: u32,
    ) -> Result<(), Stop> {
        let to = Self::addresses(warp, o[0], offsets[0]);
        let from = Self::addresses(warp, o[1], offsets[1]);
        let read = warp.get::<u32>(o[2]);
        for lane in lanes(mask) {
            let (_, to) = from_generic(to[lane]);
            for address in [to, from[lane]] {
                if address % bytes as u64 != 0 {
                    let detail = format!("{bytes} bytes are copied together, and need addresses that they divide");
                    return Err(self.fatal(Fault::Misaligned, warp.number, lane, Some(address), detail));
                }
            }
            self.check_shared(warp, lane, to, bytes)?;
            let mut data = [0; 16];
            let read = (read[lane] as usize).min(bytes);
            if read > 0 {
                let p = self.global_range(warp, lane, from[lane], read, Does::Read)?;
                // SAFETY: as in `load`.
                unsafe { std::ptr::copy_nonoverlapping(p, data.as_mut_ptr(), read) };
            }
            // It may arrive at any time from now on.
            let who = Who::Thread(warp.number as u16 * 32 + lane as u16);
            if let Some(conflict) = self.shared.write(to as usize, bytes, who, &warp.stamps, true) {
                let detail = format!("asynchronous copy started after {}", self.describe(conflict));
                self.note(Fault::SharedRace, warp.number, lane, Some(to), detail);
            }
            self.shared.forget_write(to as usize, bytes);
            warp.pending.push(Pending { group: None, lane: lane as u8, to, bytes: bytes as u8, data });
        }
        Ok(())
    }

    /// `cp.async.wait_group`: all but the last groups arrive.
    pub fn copy_wait(&mut self, warp: &mut Warp, outstanding: u32, mask: u32) {
        let before = warp.groups.saturating_sub(outstanding);
        let pending = std::mem::take(&mut warp.pending);
        for copy in pending {
            let arrives = mask >> copy.lane & 1 == 1 && copy.group.is_some_and(|group| group < before);
            if !arrives {
                warp.pending.push(copy);
                continue;
            }
            let bytes = copy.bytes as usize;
            self.store_shared(warp, copy.lane as usize, copy.to as usize, &copy.data[..bytes]);
            self.shared.data[copy.to as usize..][..bytes].copy_from_slice(&copy.data[..bytes]);
        }
    }
}
