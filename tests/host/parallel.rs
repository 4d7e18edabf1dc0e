//! Messages between ranks of one process, their shares of a batch, and what they must have alike.

use std::thread;
use voxgrad::Error;
use voxgrad::error::ParallelError;
use voxgrad::parallel::{
    InProcess, Share, Transport, agree, gather_numbers, in_process, reduce_in_buckets, shared_out,
};
use voxgrad::sample::PatchSampler;

/// What each of `size` ranks comes to.
fn on_ranks<T: Send>(size: usize, rank: impl Fn(InProcess) -> T + Sync) -> Vec<T> {
    thread::scope(|scope| {
        let threads: Vec<_> = in_process(size).into_iter().map(|member| scope.spawn(|| rank(member))).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    })
}

#[test]
fn all_ranks_have_the_same_sums_in_the_order_of_ranks() {
    for size in [1, 2, 3, 5] {
        // Sums of these depend on their order; more than a bucket of them.
        let value =
            |rank: usize, i: usize| 1e3f32.powi((rank % 2) as i32) * (1.0 + (rank * 31 + i % 1000) as f32 * 0.37);
        let expected: Vec<f32> = (0..300_000).map(|i| (0..size).fold(0.0, |sum, rank| sum + value(rank, i))).collect();
        let sums = on_ranks(size, |member| {
            assert_eq!(member.size(), size);
            let mut values: Vec<f32> = (0..300_000).map(|i| value(member.rank(), i)).collect();
            reduce_in_buckets(&member, &mut values).unwrap();
            values
        });
        assert!(sums.iter().all(|sum| *sum == expected), "{size} ranks");
    }
}

#[test]
fn bytes_are_gathered_and_broadcast() {
    let found = on_ranks(3, |member| {
        let rank = member.rank();
        let mut word = if rank == 1 { *b"one" } else { [0; 3] };
        member.broadcast(&mut word, 1).unwrap();
        assert_eq!(word, *b"one");
        member.barrier().unwrap();
        // Not equally many.
        let numbers: Vec<u64> = (0..rank as u64).collect();
        let all = gather_numbers(&member, &numbers).unwrap();
        assert_eq!(all, [vec![], vec![0], vec![0, 1]]);
        // Many small rounds, with ranks that hurry and ranks that do not.
        for round in 0..200u8 {
            if (usize::from(round) + rank).is_multiple_of(7) {
                thread::yield_now();
            }
            let all = member.all_gather(&[round, rank as u8]).unwrap();
            assert!(all.iter().enumerate().all(|(other, bytes)| *bytes == [round, other as u8]), "{all:?}");
        }
        rank
    });
    assert_eq!(found, [0, 1, 2]);
}

#[test]
fn a_rank_that_ends_is_named_to_those_that_wait() {
    let found = on_ranks(3, |member| {
        member.barrier().unwrap();
        if member.rank() == 1 {
            return None;
        }
        Some(member.all_reduce(&mut [1.0]).unwrap_err())
    });
    let lost = ParallelError::RankLost { rank: 1, size: 3 };
    assert!(lost.to_string().contains("rank 1 of 3 has ended"));
    assert_eq!(found, [Some(lost.clone()), None, Some(lost)]);
    // A panic is an end too.
    let [first, second] = in_process(2).try_into().unwrap();
    thread::spawn(move || {
        let _second = second;
        std::panic::resume_unwind(Box::new("killed"));
    })
    .join()
    .unwrap_err();
    assert_eq!(first.barrier(), Err(ParallelError::RankLost { rank: 1, size: 2 }));
    // Who has given what a round needs may go.
    let found = on_ranks(3, |member| member.all_gather(&[7]));
    assert!(found.iter().all(|all| all.as_ref().unwrap().len() == 3));
}

#[test]
fn ranks_that_do_not_do_the_same_are_told_so() {
    let found = on_ranks(3, |member| member.all_reduce(&mut vec![0.0; if member.rank() == 2 { 4 } else { 5 }]));
    for error in found {
        let said = error.unwrap_err().to_string();
        assert!(said.contains("rank 2 asks for the sum of 4 values where rank 0 asks for the sum of 5"), "{said}");
    }
    let found = on_ranks(2, |member| match member.rank() {
        0 => member.barrier(),
        _ => member.broadcast(&mut [0; 2], 0),
    });
    assert!(found.iter().all(|error| matches!(error, Err(ParallelError::OutOfStep { rank: 1, .. }))), "{found:?}");
    let found = on_ranks(2, |member| member.broadcast(&mut [0; 2], 2));
    assert!(found.iter().all(|error| matches!(error, Err(ParallelError::Message { rank: 2, .. }))), "{found:?}");
}

#[test]
fn everything_that_differs_is_named_on_every_rank() {
    let found = on_ranks(3, |member| {
        let version = if member.rank() == 2 { "0.0" } else { "0.1" };
        let seed = if member.rank() > 0 { "5" } else { "4" };
        agree(&member, &[("version", version.into()), ("plans", "x".into()), ("seed", seed.into())])
    });
    for error in found {
        let error = error.unwrap_err();
        let said = error.to_string();
        let Error::Several { faults } = error else { panic!("{said}") };
        assert_eq!(faults.len(), 3, "{said}");
        for words in ["rank 1 has seed: 5, rank 0 has 4", "rank 2 has version: 0.0, rank 0 has 0.1"] {
            assert!(said.contains(words), "{said}");
        }
        assert!(!said.contains("plans"), "{said}");
    }
    let found = on_ranks(2, |member| {
        let of_another_version = [("beyond", "1".to_owned())];
        agree(&member, if member.rank() == 1 { &of_another_version } else { &[] })
    });
    assert!(found[0].as_ref().unwrap_err().to_string().contains("rank 1 has beyond: 1, rank 0 has nothing"));
    assert!(on_ranks(3, |member| agree(&member, &[("same", "1".into())])).iter().all(Result::is_ok));
}

/// What `_set_batch_size_and_oversample` of nnU-Net 2.8.1's trainer computes: batch sizes and oversampling of all ranks.
fn upstream(batch: usize, ranks: usize) -> Vec<(usize, f64)> {
    let each = batch / ranks;
    let sizes: Vec<usize> = (0..ranks).map(|i| if each * ranks + i < batch { each + 1 } else { each }).collect();
    let free = 1.0 - 0.33;
    let oversample: Vec<bool> = (0..batch).map(|i| i as f64 >= (batch as f64 * free).round_ties_even()).collect();
    let share = |rank: usize| {
        let low: usize = sizes[..rank].iter().sum();
        let high = low + sizes[rank];
        let forced = oversample[low..high].iter().filter(|&&forced| forced).count();
        if (high as f64 / batch as f64) < free {
            0.0
        } else if low as f64 / batch as f64 > free {
            1.0
        } else {
            forced as f64 / sizes[rank] as f64
        }
    };
    (0..ranks).map(|rank| (sizes[rank], share(rank))).collect()
}

#[test]
fn batches_and_oversampling_are_shared_out_as_nnunet_does() {
    for batch in 1..=24 {
        let sampler = PatchSampler::new(batch, [8; 3]);
        for ranks in 1..=batch {
            let mut first = 0;
            for (rank, (size, oversampled)) in upstream(batch, ranks).into_iter().enumerate() {
                let share = Share::of_batch(batch, rank, ranks).unwrap();
                assert_eq!(share, Share { first, len: size, batch });
                let forced = (0..batch).filter(|&i| share.contains(i) && sampler.is_forced(i)).count();
                // The last ones of a rank's own batch, as its loader rounds them.
                let free = (size as f64 * (1.0 - oversampled)).round_ties_even();
                let forced_there = (0..size).filter(|&i| i as f64 >= free).count();
                assert_eq!(forced, forced_there, "rank {rank} of {ranks}, batch {batch}");
                first += size;
            }
            assert_eq!(first, batch);
        }
        let refused = Share::of_batch(batch, 0, batch + 1).unwrap_err();
        assert_eq!(refused, ParallelError::TooManyRanks { ranks: batch + 1, batch });
    }
    assert_eq!(shared_out(&[1, 2, 3, 4, 5], 1, 2), [2, 4]);
    assert_eq!([0, 1, 2].map(|rank| shared_out(&["a", "b"], rank, 3).len()), [1, 1, 0]);
}
