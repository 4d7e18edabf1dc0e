//! One item read while another is worked on and a third is written.

use std::sync::mpsc::{channel, sync_channel};
use std::thread;

/// Takes items through three stages, in order: `prepare` on a thread, `work` on the caller's, `finish` on another thread. At
/// most one item is in each stage, and none waits between two of them: at most three are in memory. Where `may_overlap` says
/// of a prepared item that it may not be beside others, the next one is not prepared before it is finished.
///
/// # Errors
/// The first of `work`. Items that were worked on before are finished all the same, and the others are left out.
pub fn in_stages<Item: Sync, Prepared: Send, Done: Send, Problem>(
    items: &[Item],
    prepare: impl Fn(&Item) -> Prepared + Sync,
    may_overlap: impl Fn(&Prepared) -> bool,
    mut work: impl FnMut(&Item, Prepared) -> Result<Done, Problem>,
    mut finish: impl FnMut(&Item, Done) + Send,
) -> Result<(), Problem> {
    thread::scope(|scope| {
        let (permit, permits) = channel();
        let (give, prepared) = sync_channel(0);
        let (hand_on, done) = sync_channel(0);
        let (tell, finished) = channel();
        let prepare = &prepare;
        scope.spawn(move || {
            for item in items {
                // Nobody wants it any more once the caller has met with an error.
                if permits.recv().is_err() || give.send(prepare(item)).is_err() {
                    return;
                }
            }
        });
        scope.spawn(move || {
            for (item, result) in done {
                finish(item, result);
                // The caller waits for it only where items may not overlap.
                let _ = tell.send(());
            }
        });
        // A thread that is gone has panicked, which the end of the scope passes on.
        let _ = permit.send(());
        let (mut handed_on, mut told) = (0, 0);
        for item in items {
            let Ok(ready) = prepared.recv() else { break };
            let is_alone = !may_overlap(&ready);
            if !is_alone {
                let _ = permit.send(());
            }
            let result = work(item, ready)?;
            if hand_on.send((item, result)).is_err() {
                break;
            }
            handed_on += 1;
            if is_alone {
                while told < handed_on && finished.recv().is_ok() {
                    told += 1;
                }
                let _ = permit.send(());
            }
        }
        Ok(())
    })
}
