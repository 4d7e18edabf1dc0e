//! Items that are prepared, worked on and finished at the same time: how many of them there are, and what errors leave.

use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;
use voxgrad::preprocess::in_stages;

/// Counts what exists of it.
struct Held<'a>(&'a AtomicUsize, usize);

impl<'a> Held<'a> {
    fn new(held: &'a AtomicUsize, most: &AtomicUsize, item: usize) -> Self {
        most.fetch_max(held.fetch_add(1, Ordering::SeqCst) + 1, Ordering::SeqCst);
        Held(held, item)
    }
}

impl Drop for Held<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

/// The most items at a time, what was worked on and what was finished, and the result.
fn run(
    alone: bool,
    fails_at: usize,
    delay: impl Fn(usize) -> [u64; 3] + Sync,
) -> (usize, Vec<usize>, Vec<usize>, bool) {
    let (held, most) = (AtomicUsize::new(0), AtomicUsize::new(0));
    let (worked, finished) = (Mutex::new(Vec::new()), Mutex::new(Vec::new()));
    let pause = |item: usize, stage: usize| std::thread::sleep(Duration::from_millis(delay(item)[stage]));
    let items: Vec<usize> = (0..8).collect();
    let result = in_stages(
        &items,
        |&item| {
            let prepared = Held::new(&held, &most, item);
            pause(item, 0);
            prepared
        },
        |_| !alone,
        |&item, prepared| {
            assert_eq!(prepared.1, item);
            pause(item, 1);
            worked.lock().unwrap().push(item);
            if item == fails_at { Err(()) } else { Ok(prepared) }
        },
        |&item, done| {
            pause(item, 2);
            finished.lock().unwrap().push(item);
            drop(done);
        },
    );
    assert_eq!(held.load(Ordering::SeqCst), 0);
    (most.load(Ordering::SeqCst), worked.into_inner().unwrap(), finished.into_inner().unwrap(), result.is_ok())
}

#[test]
fn three_at_a_time_in_order() {
    let all: Vec<usize> = (0..8).collect();
    for slow in 0..3 {
        let delay = |_| std::array::from_fn(|stage| if stage == slow { 6 } else { 1 });
        let (most, worked, finished, is_ok) = run(false, 99, delay);
        assert!((2..=3).contains(&most), "{most} at a time, stage {slow} slow");
        assert!(is_ok && worked == all && finished == all);
    }
    let uneven = |item: usize| [item % 3 * 4, (item + 1) % 3 * 4, (item + 2) % 3 * 4].map(|n| n as u64);
    let (most, worked, finished, is_ok) = run(false, 99, uneven);
    assert!(most <= 3 && is_ok && worked == all && finished == all);
}

#[test]
fn one_at_a_time_where_memory_is_short() {
    let (most, worked, finished, is_ok) = run(true, 99, |item| [1, 1, 3 * (item as u64 % 2)]);
    assert_eq!(most, 1);
    assert!(is_ok && worked.len() == 8 && finished == worked);
}

#[test]
fn an_error_leaves_what_was_worked_on_finished() {
    for alone in [false, true] {
        let (_, worked, finished, is_ok) = run(alone, 4, |_| [1, 1, 5]);
        assert!(!is_ok);
        assert_eq!((worked, finished), ((0..5).collect(), (0..4).collect()));
    }
    let nothing: [usize; 0] = [];
    in_stages(&nothing, |_| (), |_| true, |_, ()| Ok::<(), ()>(()), |_, ()| ()).unwrap();
}
