//! Expected values were printed by numpy 2 (`numpy.random.RandomState`).

use voxgrad::numpy_random::NumpyRandom;

#[test]
fn raw_words() {
    let mut random = NumpyRandom::new(12345);
    let words: Vec<u32> = (0..5).map(|_| random.next_u32()).collect();
    assert_eq!(words, [3992670690, 3823185381, 1358822685, 561383553, 789925284]);
}

#[test]
fn one_stream_of_permutations_choices_and_integers() {
    let mut random = NumpyRandom::new(1234);
    assert_eq!(random.permutation(10), [7, 2, 9, 1, 0, 8, 4, 5, 6, 3]);
    assert_eq!(random.permutation(70000)[..5], [29938, 68239, 39043, 18187, 25876]);
    assert_eq!(random.choice(1000, 5), [41, 615, 295, 821, 943]);
    let integers: Vec<u32> = (0..5).map(|_| random.up_to(4999)).collect();
    assert_eq!(integers, [917, 1061, 1337, 544, 4372]);
    let integers: Vec<u32> = (0..5).map(|_| random.up_to(76)).collect();
    assert_eq!(integers, [1, 33, 7, 65, 72]);
}

#[test]
fn empty_and_single_intervals_draw_nothing() {
    let mut random = NumpyRandom::new(1);
    let mut untouched = random.clone();
    assert_eq!(random.permutation(0), [0u32; 0]);
    assert_eq!(random.permutation(1), [0]);
    assert_eq!(random.up_to(0), 0);
    assert_eq!(random.next_u32(), untouched.next_u32());
}

#[test]
fn tallies_are_counted_draws() {
    for size in [1u32, 2, 77, 625, 5000] {
        let mut tallied = NumpyRandom::new(size);
        let mut drawn = tallied.clone();
        let mut counts = vec![0; size as usize];
        for draws in [3usize, 1000, 0, 4321] {
            tallied.tally(draws, &mut counts);
            for _ in 0..draws {
                counts[drawn.up_to(size - 1) as usize] -= 1;
            }
            assert!(counts.iter().all(|&count| count == 0), "{size} {draws}");
        }
        assert_eq!(tallied.next_u32(), drawn.next_u32());
    }
}
