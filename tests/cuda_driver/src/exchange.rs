//! What lanes of a warp tell one another.

use crate::access::lanes;
use crate::cube::{Cube, Stop};
use crate::program::{Op, Shuffle, Slot, Vote};
use crate::report::Fault;
use crate::warp::{FULL, LANES, Warp};

impl Cube<'_> {
    /// `vote`, `match`, `redux`
    pub(crate) fn agree(&mut self, warp: &mut Warp, op: Op, o: &[Slot], mask: u32) -> Result<(), Stop> {
        match op {
            Op::Vote(vote) => {
                let members = warp.get::<u32>(o[2]);
                self.check_members(warp, &members, mask)?;
                let brought = warp.predicate(o[1]) & mask;
                match vote {
                    Vote::Ballot => warp.put(o[0], &[brought; LANES], mask),
                    _ => {
                        let holds = match vote {
                            Vote::All => brought == mask,
                            Vote::Any => brought != 0,
                            _ => brought == mask || brought == 0,
                        };
                        warp.put_predicate(o[0], if holds { FULL } else { 0 }, mask);
                    }
                }
            }
            Op::Match { all, .. } => {
                let members = warp.get::<u32>(o[3]);
                self.check_members(warp, &members, mask)?;
                let values = warp.get_bits(o[2]);
                let equal = |lane: usize| lanes(mask).filter(|l| values[*l] == values[lane]).fold(0, |m, l| m | 1 << l);
                let masks: [u32; LANES] = std::array::from_fn(equal);
                let same = masks[mask.trailing_zeros() as usize] == mask;
                let result = if all { [if same { mask } else { 0 }; LANES] } else { masks };
                warp.put(o[0], &result, mask);
                warp.put_predicate(o[1], if same { FULL } else { 0 }, mask);
            }
            Op::Reduce(atomic, ty) => {
                let members = warp.get::<u32>(o[2]);
                self.check_members(warp, &members, mask)?;
                let values = warp.get_bits(o[1]);
                let all = lanes(mask).map(|lane| values[lane]);
                let all = all.reduce(|a, b| crate::arithmetic::atomic(atomic, ty, a, b, 0)).unwrap_or_default();
                warp.put_bits(o[0], &[all; LANES], mask);
            }
            _ => {}
        }
        Ok(())
    }

    /// That the lanes here are just the ones that the instruction says.
    pub(crate) fn check_members(&self, warp: &Warp, members: &[u32; LANES], mask: u32) -> Result<(), Stop> {
        let live = Self::live(warp);
        for lane in lanes(mask) {
            let wanted = members[lane];
            if wanted >> lane & 1 == 0 || wanted & live & !mask != 0 {
                let detail = format!("lanes {mask:#010x} are here, its mask is {wanted:#010x}, {live:#010x} are alive");
                return Err(self.fatal(Fault::MissingLanes, warp.number, lane, None, detail));
            }
        }
        Ok(())
    }

    /// `shfl`
    pub(crate) fn shuffle(&mut self, warp: &mut Warp, shuffle: Shuffle, o: &[Slot], mask: u32) -> Result<(), Stop> {
        let (values, by, clamp) = (warp.get::<u32>(o[2]), warp.get::<u32>(o[3]), warp.get::<u32>(o[4]));
        let members = warp.get::<u32>(o[5]);
        self.check_members(warp, &members, mask)?;
        let mut inside = 0;
        let result = std::array::from_fn(|lane| {
            let (lane, by) = (lane as u32, by[lane] & 31);
            let (segment, clamp) = (clamp[lane as usize] >> 8 & 31, clamp[lane as usize] & 31);
            let most = lane & segment | clamp & !segment;
            let least = lane & segment;
            let (from, valid) = match shuffle {
                Shuffle::Up => (lane.wrapping_sub(by), lane as i32 - by as i32 >= most as i32),
                Shuffle::Down => (lane + by, lane + by <= most),
                Shuffle::Xor => (lane ^ by, lane ^ by <= most),
                Shuffle::Index => (least | by & !segment, (least | by & !segment) <= most),
            };
            inside |= u32::from(valid) << lane;
            let from = if valid { from } else { lane };
            // What a lane has that is not here is anything: this is easy to see.
            if mask >> from & 1 == 1 { values[from as usize] } else { 0xdead_beef }
        });
        warp.put(o[0], &result, mask);
        warp.put_predicate(o[1], inside, mask);
        Ok(())
    }
}
