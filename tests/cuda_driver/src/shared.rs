//! Shared memory of the cube at hand, and who accessed what since the last barrier.

/// Who accessed a granule.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Who {
    /// One thread of the cube.
    Thread(u16),
    /// A warp as a whole, or several of its threads.
    Warp(u16),
    /// Several warps.
    Many,
}

impl Who {
    fn warp(self) -> Option<u16> {
        match self {
            Self::Thread(thread) => Some(thread / 32),
            Self::Warp(warp) => Some(warp),
            Self::Many => None,
        }
    }
}

#[derive(Clone, Copy)]
struct Last {
    /// The barrier it came after; 0 if nobody.
    epoch: u32,
    /// The warp's synchronisations that it came after.
    stamp: u32,
    who: Who,
}

const NOBODY: Last = Last { epoch: 0, stamp: 0, who: Who::Many };

#[derive(Clone, Copy)]
struct Granule {
    write: Last,
    read: Last,
    /// The cube's first epoch, if this cube wrote it.
    written: u32,
}

/// What an access conflicts with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Conflict {
    /// Of the earlier access.
    pub who: Who,
    /// It wrote.
    pub wrote: bool,
}

/// Reused from cube to cube.
pub struct Shared {
    /// The bytes.
    pub data: Vec<u8>,
    granules: Vec<Granule>,
    granule: usize,
    epoch: u32,
    first_epoch: u32,
}

/// The synchronisations that the lanes of a warp took part in.
#[derive(Clone, Copy, Debug)]
pub struct Stamps {
    lanes: [u32; 32],
    least: u32,
    newest: u32,
}

impl Default for Stamps {
    fn default() -> Self {
        Self { lanes: [1; 32], least: 1, newest: 1 }
    }
}

impl Stamps {
    /// The lanes of a mask synchronise.
    pub fn advance(&mut self, mask: u32) {
        self.newest += 1;
        for (lane, stamp) in self.lanes.iter_mut().enumerate() {
            if mask >> lane & 1 == 1 {
                *stamp = self.newest;
            }
        }
        self.least = self.lanes.iter().copied().min().unwrap_or_default();
    }

    #[inline]
    fn of(&self, who: Who) -> u32 {
        match who {
            Who::Thread(thread) => self.lanes[thread as usize % 32],
            _ => self.newest,
        }
    }
}

impl Default for Shared {
    fn default() -> Self {
        Self { data: Vec::new(), granules: Vec::new(), granule: 4, epoch: 1, first_epoch: 1 }
    }
}

impl Shared {
    /// For a new cube: nothing is written, nobody accessed anything.
    pub fn start(&mut self, bytes: usize, granule: usize) {
        let records = bytes.div_ceil(granule);
        if self.granule != granule || self.granules.len() != records || self.epoch > u32::MAX - (1 << 20) {
            self.granule = granule;
            self.epoch = 0;
            self.granules.clear();
            self.granules.resize(records, Granule { write: NOBODY, read: NOBODY, written: 0 });
            self.data.clear();
            self.data.resize(bytes.next_multiple_of(16), 0xa5);
        }
        self.epoch += 1;
        self.first_epoch = self.epoch;
    }

    /// Whether a range is within the bytes that the cube has.
    #[inline]
    pub fn holds(&self, offset: u64, bytes: usize, of: usize) -> bool {
        offset < of as u64 && offset + bytes as u64 <= of as u64
    }

    /// All threads met.
    pub fn barrier(&mut self) {
        self.epoch += 1;
    }

    fn range(&self, offset: usize, bytes: usize) -> std::ops::Range<usize> {
        offset / self.granule..(offset + bytes - 1) / self.granule + 1
    }

    /// Whether somebody in this cube wrote all of a range.
    #[inline]
    pub fn is_written(&self, offset: usize, bytes: usize) -> bool {
        let range = self.range(offset, bytes);
        self.granules[range].iter().all(|granule| granule.written == self.first_epoch)
    }

    /// Whether an earlier access is over before one of `who` now.
    #[inline]
    fn is_over(&self, last: Last, who: Who, stamps: &Stamps) -> bool {
        if last.epoch != self.epoch || last.who == who && matches!(who, Who::Thread(_)) {
            return true;
        }
        if last.who.warp().is_none() || last.who.warp() != who.warp() {
            return false;
        }
        let synchronised = |who: Who| match who {
            Who::Thread(thread) => stamps.lanes[thread as usize % 32] > last.stamp,
            _ => stamps.least > last.stamp,
        };
        synchronised(last.who) && synchronised(who)
    }

    /// Notes a read.
    #[inline]
    pub fn read(&mut self, offset: usize, bytes: usize, who: Who, stamps: &Stamps) -> Option<Conflict> {
        let mut conflict = None;
        let (epoch, stamp) = (self.epoch, stamps.of(who));
        for at in self.range(offset, bytes) {
            let Granule { write, read, .. } = self.granules[at];
            if write.epoch != epoch && read.epoch != epoch {
                self.granules[at].read = Last { epoch, stamp, who };
                continue;
            }
            if write.epoch == epoch && !self.is_over(write, who, stamps) {
                conflict = Some(Conflict { who: write.who, wrote: true });
            }
            // Nothing new.
            if read.epoch == epoch && (read.who == Who::Many || read.who == who && read.stamp == stamp) {
                continue;
            }
            let who = match self.is_over(read, who, stamps) {
                true => who,
                false if read.who.warp().is_some() && read.who.warp() == who.warp() => {
                    Who::Warp(who.warp().unwrap_or_default())
                }
                false => Who::Many,
            };
            self.granules[at].read = Last { epoch, stamp: stamps.of(who), who };
        }
        conflict
    }

    /// Notes a write. One that changes nothing disturbs nobody.
    #[inline]
    pub fn write(&mut self, offset: usize, bytes: usize, who: Who, stamps: &Stamps, changes: bool) -> Option<Conflict> {
        let mut conflict = None;
        for at in self.range(offset, bytes) {
            let Granule { write, read, written } = self.granules[at];
            let changes = changes || written != self.first_epoch;
            if changes && !self.is_over(write, who, stamps) {
                conflict = Some(Conflict { who: write.who, wrote: true });
            } else if changes && !self.is_over(read, who, stamps) {
                conflict = Some(Conflict { who: read.who, wrote: false });
            }
            let write = Last { epoch: self.epoch, stamp: stamps.of(who), who };
            self.granules[at] = Granule { write, read, written: self.first_epoch };
        }
        conflict
    }

    /// What is on its way to a range has not arrived yet.
    pub fn forget_write(&mut self, offset: usize, bytes: usize) {
        let range = self.range(offset, bytes);
        self.granules[range].iter_mut().for_each(|granule| granule.written = 0);
    }
}
