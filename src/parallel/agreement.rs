//! What all ranks must have alike before they begin.

use super::transport::Transport;
use crate::error::{Error, ParallelError, Result};

/// Compares named values of all ranks with those of rank 0. Every rank comes to the same result.
///
/// # Errors
/// [`ParallelError::Differs`] for every rank and value that differs, all at once; those of [`Transport::all_gather`].
pub fn agree(transport: &dyn Transport, named: &[(&str, String)]) -> Result<()> {
    let text = serde_json::to_vec(named).map_err(|error| unreadable(transport.rank(), error))?;
    let all: Vec<Vec<(String, String)>> = transport
        .all_gather(&text)?
        .iter()
        .enumerate()
        .map(|(rank, bytes)| serde_json::from_slice(bytes).map_err(|error| unreadable(rank, error)))
        .collect::<Result<_, _>>()?;
    let mut faults = Vec::new();
    for rank in 1..all.len() {
        // Another version may compare other things.
        let beyond = all[rank].iter().filter(|(name, _)| value(&all[0], name).is_none());
        for (what, _) in all[0].iter().chain(beyond) {
            let [expected, found] = [0, rank].map(|rank| value(&all[rank], what).unwrap_or("nothing"));
            if expected != found {
                let (expected, found) = (expected.into(), found.into());
                faults.push(ParallelError::Differs { rank, what: what.clone(), found, expected }.into());
            }
        }
    }
    Error::all(faults)
}

fn value<'a>(named: &'a [(String, String)], what: &str) -> Option<&'a str> {
    named.iter().find(|(name, _)| name == what).map(|(_, value)| value.as_str())
}

fn unreadable(rank: usize, error: serde_json::Error) -> ParallelError {
    ParallelError::Message { rank, problem: error.to_string() }
}
