//! Ranks that are threads of one process, over its memory.

use super::transport::Transport;
use crate::error::ParallelError;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

/// One of several ranks of a process. A rank that is dropped is lost to the others: those that wait for it, or will, are told.
#[derive(Debug)]
pub struct InProcess {
    rank: usize,
    meeting: Arc<Meeting>,
}

/// `size` ranks, to be handed to a thread each. Sums are taken in the order of ranks.
pub fn in_process(size: usize) -> Vec<InProcess> {
    let state = State { given: vec![None; size], taken_by: 0, gone: vec![false; size], round: 0, all: Arc::default() };
    let meeting = Arc::new(Meeting { state: Mutex::new(state), changed: Condvar::new() });
    (0..size).map(|rank| InProcess { rank, meeting: meeting.clone() }).collect()
}

/// Where the ranks meet: one exchange after the other.
#[derive(Debug)]
struct Meeting {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug)]
struct State {
    /// What each rank has given in the current round.
    given: Vec<Option<Message>>,
    /// What all have given in the last complete one, and how many ranks have not taken it yet.
    all: Arc<Vec<Message>>,
    taken_by: usize,
    /// Complete rounds.
    round: u64,
    gone: Vec<bool>,
}

/// What a rank asks for, and gives.
#[derive(Clone, Debug)]
struct Message {
    asked: Asked,
    bytes: Vec<u8>,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Asked {
    Broadcast { root: usize, bytes: usize },
    Sum { values: usize },
    Gather,
}

impl std::fmt::Display for Asked {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Broadcast { root, bytes } => write!(f, "{bytes} bytes of rank {root}"),
            Self::Sum { values } => write!(f, "the sum of {values} values"),
            Self::Gather => f.write_str("the bytes of all ranks"),
        }
    }
}

impl Meeting {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait<'a>(&self, state: MutexGuard<'a, State>) -> MutexGuard<'a, State> {
        self.changed.wait(state).unwrap_or_else(PoisonError::into_inner)
    }

    /// Gives a message and waits for those of all ranks.
    fn exchange(&self, rank: usize, message: Message) -> Result<Arc<Vec<Message>>, ParallelError> {
        let mut state = self.lock();
        // Some are still busy with the round before.
        while state.taken_by > 0 {
            state = self.wait(state);
        }
        let round = state.round;
        state.given[rank] = Some(message);
        if state.given.iter().all(Option::is_some) {
            state.all = Arc::new(state.given.iter_mut().filter_map(Option::take).collect());
            state.taken_by = state.given.len();
            state.round += 1;
            self.changed.notify_all();
        }
        while state.round == round {
            // Who has given and gone is no loss to this round.
            let lost = (0..state.gone.len()).find(|&other| state.gone[other] && state.given[other].is_none());
            if let Some(lost) = lost {
                return Err(ParallelError::RankLost { rank: lost, size: state.gone.len() });
            }
            state = self.wait(state);
        }
        let all = state.all.clone();
        state.taken_by -= 1;
        if state.taken_by == 0 {
            state.all = Arc::default();
            self.changed.notify_all();
        }
        Ok(all)
    }
}

impl InProcess {
    fn exchange(&self, asked: Asked, bytes: &[u8]) -> Result<Arc<Vec<Message>>, ParallelError> {
        let all = self.meeting.exchange(self.rank, Message { asked, bytes: bytes.to_vec() })?;
        let expected = all[0].asked;
        match all.iter().position(|message| message.asked != expected) {
            Some(rank) => Err(ParallelError::OutOfStep {
                rank,
                found: all[rank].asked.to_string(),
                expected: expected.to_string(),
            }),
            None => Ok(all),
        }
    }
}

impl Transport for InProcess {
    fn rank(&self) -> usize {
        self.rank
    }

    fn size(&self) -> usize {
        self.meeting.lock().gone.len()
    }

    fn broadcast(&self, bytes: &mut [u8], root: usize) -> Result<(), ParallelError> {
        let given = if self.rank == root { &*bytes } else { &[] };
        let all = self.exchange(Asked::Broadcast { root, bytes: bytes.len() }, given)?;
        match all.get(root).filter(|message| message.bytes.len() == bytes.len()) {
            Some(message) => bytes.copy_from_slice(&message.bytes),
            None => {
                let problem = format!("it broadcasts nothing, of {} ranks", all.len());
                return Err(ParallelError::Message { rank: root, problem });
            }
        }
        Ok(())
    }

    fn all_reduce(&self, values: &mut [f32]) -> Result<(), ParallelError> {
        let all = self.exchange(Asked::Sum { values: values.len() }, bytemuck::cast_slice(values))?;
        values.fill(0.0);
        for message in all.iter() {
            for (sum, value) in values.iter_mut().zip(message.bytes.as_chunks::<4>().0) {
                *sum += f32::from_ne_bytes(*value);
            }
        }
        Ok(())
    }

    fn all_gather(&self, bytes: &[u8]) -> Result<Vec<Vec<u8>>, ParallelError> {
        let all = self.exchange(Asked::Gather, bytes)?;
        Ok(all.iter().map(|message| message.bytes.clone()).collect())
    }
}

impl Drop for InProcess {
    fn drop(&mut self) {
        self.meeting.lock().gone[self.rank] = true;
        self.meeting.changed.notify_all();
    }
}
