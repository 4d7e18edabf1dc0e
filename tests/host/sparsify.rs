//! Sparse annotations of dense volumes: what holds for every scheme, distributions against ScribbleBench's rules, and slices
//! drawn by numpy (`numpy.random.seed(1234)`, `choice(size, n, replace=False)`).

use crate::common::sparse::{balls, kept, nnunet};
use ndarray::{Array2, Array3, ArrayView2, Axis};
use proptest::prelude::*;
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use std::collections::{BTreeMap, BTreeSet};
use voxgrad::numpy_random::NumpyRandom;
use voxgrad::sparsify::{Blocks, Budget, Drawn, Scheme, Scribbles, Selection, Slices, draw, slices};

const IGNORE: i16 = 3;

// ---- volumes -----------------------------------------------------------------------------------------------------------

fn dense() -> Array3<i16> {
    balls((24, 30, 26), &[(8, 9, 9, 6), (14, 20, 17, 7), (20, 6, 20, 4)])
}

fn random(seed: u64) -> ChaCha8Rng {
    ChaCha8Rng::seed_from_u64(seed)
}

fn annotated(labels: &Array3<i16>) -> usize {
    labels.iter().filter(|&&label| label != IGNORE).count()
}

/// Connected parts of equal pixels that touch at sides or corners: for every pixel the number of its part.
fn parts(plane: ArrayView2<i16>) -> Array2<usize> {
    let mut part = Array2::from_elem(plane.dim(), usize::MAX);
    let mut count = 0;
    for start in plane.indexed_iter().map(|(at, _)| at) {
        if part[start] != usize::MAX {
            continue;
        }
        let mut open = vec![start];
        part[start] = count;
        while let Some((y, x)) = open.pop() {
            for (ny, nx) in (y.max(1) - 1..=y + 1).flat_map(|ny| (x.max(1) - 1..=x + 1).map(move |nx| (ny, nx))) {
                if plane.get((ny, nx)) == Some(&plane[start]) && part[(ny, nx)] == usize::MAX {
                    part[(ny, nx)] = count;
                    open.push((ny, nx));
                }
            }
        }
        count += 1;
    }
    part
}

// ---- scribbles ---------------------------------------------------------------------------------------------------------

/// No voxel of another label than the dense reference's, and in every slice one component of each class at most.
fn assert_scribbles(dense: &Array3<i16>, drawn: &Drawn, axis: usize) {
    for (plane, labels) in dense.axis_iter(Axis(axis)).zip(drawn.labels.axis_iter(Axis(axis))) {
        let part = parts(plane);
        let mut of_class: BTreeMap<i16, BTreeSet<usize>> = BTreeMap::new();
        for (at, &label) in labels.indexed_iter().filter(|(_, label)| **label != IGNORE) {
            assert_eq!(label, plane[at]);
            of_class.entry(label).or_default().insert(part[at]);
        }
        assert!(of_class.values().all(|parts| parts.len() == 1), "{of_class:?}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]

    #[test]
    fn scribbles_lie_in_one_component_and_are_right(
        shape in (2..14_usize, 2..20_usize, 2..20_usize),
        centres in prop::collection::vec((0..14_usize, 0..20_usize, 0..20_usize, 1..8_usize), 0..5),
        (axis, seed, thickness) in (0..3_usize, any::<u64>(), 0..3_usize),
    ) {
        let dense = balls(shape, &centres);
        let scribbles = Scribbles { axis, thickness: 2 * thickness + 1, ..Scribbles::default() };
        let drawn = scribbles.draw(dense.view(), IGNORE, &mut random(seed));
        assert_scribbles(&dense, &drawn, axis);
        // By default every slice gets a scribble for every class that it has.
        for (plane, labels) in dense.axis_iter(Axis(axis)).zip(drawn.labels.axis_iter(Axis(axis))) {
            let classes: BTreeSet<i16> = plane.iter().copied().collect();
            let drawn: BTreeSet<i16> = labels.iter().copied().filter(|&label| label != IGNORE).collect();
            prop_assert_eq!(classes, drawn);
        }
        prop_assert_eq!(&drawn, &scribbles.draw(dense.view(), IGNORE, &mut random(seed)));
    }

    #[test]
    fn blocks_and_slices_keep_their_share(
        shape in (8..24_usize, 8..24_usize, 8..24_usize),
        centres in prop::collection::vec((0..24_usize, 0..24_usize, 0..24_usize, 1..8_usize), 0..4),
        (seed, fraction, side) in (any::<u64>(), 0.05..0.6_f64, 1..6_usize),
    ) {
        let dense = balls(shape, &centres);
        let check = |drawn: &Drawn| {
            dense.iter().zip(&drawn.labels).all(|(dense, label)| *label == IGNORE || label == dense)
        };
        let blocks = Scheme::Blocks(Blocks { size: [side; 3], budget: Budget::Fraction(fraction), foreground: 0.5 });
        let drawn = draw(&blocks, dense.view(), IGNORE, &mut random(seed));
        let off = (annotated(&drawn.labels) as f64 - fraction * dense.len() as f64).abs();
        prop_assert!(check(&drawn) && (drawn.exhausted || off <= 0.5 * (side * side * side) as f64 + 1e-6), "{}", off);

        for selection in [Selection::Random, Selection::Even, Selection::Change] {
            let slices = Slices { axes: [true, false, false], fraction, selection };
            let drawn = draw(&Scheme::Slices(slices), dense.view(), IGNORE, &mut random(seed));
            let expected = ((shape.0 as f64 * fraction).round_ties_even() as usize).max(1);
            prop_assert!(check(&drawn));
            prop_assert_eq!(kept(drawn.labels.view(), 0).len(), expected);
        }
    }
}

#[test]
fn scribbles_reach_a_share_of_voxels() {
    let dense = dense();
    for fraction in [0.01, 0.03, 0.06] {
        let scribbles = Scribbles { fraction: Some(fraction), ..Scribbles::default() };
        for seed in 0..10 {
            let drawn = scribbles.draw(dense.view(), IGNORE, &mut random(seed));
            let most =
                drawn.labels.outer_iter().map(|plane| plane.iter().filter(|&&l| l != IGNORE).count()).max().unwrap();
            let off = annotated(&drawn.labels) as f64 - fraction * dense.len() as f64;
            // Half of the largest slice seen, and a half more: the slice that was left out may have been larger.
            assert!(
                !drawn.exhausted && off.abs() <= 0.75 * most as f64,
                "{fraction} seed {seed}: off by {off} of {most}"
            );
        }
    }
    let all = Scribbles { fraction: Some(0.9), ..Scribbles::default() };
    assert!(all.draw(dense.view(), IGNORE, &mut random(0)).exhausted);
}

/// A disc of class 1 in every slice.
fn discs(slices: usize, radius: usize) -> Array3<i16> {
    let (side, centre) = (2 * radius + 21, radius + 10);
    Array3::from_shape_fn((slices, side, side), |(_, y, x)| {
        i16::from(y.abs_diff(centre).pow(2) + x.abs_diff(centre).pow(2) <= radius * radius)
    })
}

/// Pixels of class 1 in each slice of class 1 alone.
fn lengths(labels: &Array3<i16>) -> Vec<usize> {
    labels.outer_iter().map(|plane| plane.iter().filter(|&&label| label == 1).count()).collect()
}

#[test]
fn border_scribbles_follow_a_tenth_of_the_outline() {
    // One pixel thick, two pixels inside: what is drawn can be counted beside the outline there.
    let dense = discs(300, 30);
    let scribbles = Scribbles { thickness: 1, interior: 0, border_depth: [2, 2], ..Scribbles::default() };
    let drawn = scribbles.draw(dense.view(), IGNORE, &mut random(1));
    let plane = dense.index_axis(Axis(0), 0);
    let (side, _) = plane.dim();
    let far = |(y, x): (usize, usize)| {
        plane.indexed_iter().all(|((oy, ox), &label)| label == 1 || y.abs_diff(oy).pow(2) + x.abs_diff(ox).pow(2) > 4)
    };
    let eroded = Array2::from_shape_fn((side, side), |at| plane[at] == 1 && far(at));
    let at_edge = |&((y, x), inside): &((usize, usize), &bool)| {
        *inside && [(y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)].iter().any(|&at| !eroded[at])
    };
    let outline: BTreeSet<(usize, usize)> = eroded.indexed_iter().filter(at_edge).map(|(at, _)| at).collect();
    let mut shares = Vec::new();
    for plane in drawn.labels.outer_iter() {
        let pixels: Vec<_> = plane.indexed_iter().filter(|(_, label)| **label == 1).map(|(at, _)| at).collect();
        assert!(pixels.iter().all(|at| outline.contains(at)), "off the outline");
        shares.push(pixels.len() as f64 / outline.len() as f64);
    }
    let mean = shares.iter().sum::<f64>() / shares.len() as f64;
    assert!((0.09..=0.13).contains(&mean), "mean share {mean}");
    // Lengths are counted in points between pixels, of which a slanting border has more than pixels: hence the margin.
    assert!(shares.iter().all(|share| (0.05..=0.18).contains(share)), "{shares:?}");
    // Every part of the border gets its turn.
    let seen: BTreeSet<(usize, usize)> =
        drawn.labels.indexed_iter().filter(|(_, label)| **label == 1).map(|((_, y, x), _)| (y, x)).collect();
    assert!(seen.len() > outline.len() * 9 / 10, "{} of {}", seen.len(), outline.len());
}

#[test]
fn border_scribbles_prefer_curved_borders() {
    // A stadium: straight sides, round ends.
    let dense = Array3::from_shape_fn((200, 50, 120), |(_, y, x)| {
        let along = x.clamp(30, 90);
        i16::from(y.abs_diff(25).pow(2) + x.abs_diff(along).pow(2) <= 16 * 16)
    });
    let scribbles = Scribbles { thickness: 1, interior: 0, ..Scribbles::default() };
    let drawn = scribbles.draw(dense.view(), IGNORE, &mut random(1));
    let (mut ends, mut sides) = (0.0, 0.0);
    for ((_, _, x), _) in drawn.labels.indexed_iter().filter(|(_, label)| **label == 1) {
        if (30..=90).contains(&x) { sides += 1.0 } else { ends += 1.0 }
    }
    // About 2 * pi * 13 pixels of round ends, 2 * 60 of straight sides.
    let (ends, sides) = (ends / 82.0, sides / 120.0);
    assert!(ends > 3.0 * sides, "{ends} against {sides}");
}

#[test]
fn interior_scribbles_are_about_as_long_as_the_component() {
    for radius in [12, 30] {
        let scribbles = Scribbles { thickness: 1, border: 0, ..Scribbles::default() };
        let drawn = scribbles.draw(discs(200, radius).view(), IGNORE, &mut random(1));
        let lengths = lengths(&drawn.labels);
        let mean = lengths.iter().sum::<usize>() as f64 / lengths.len() as f64 / (2 * radius) as f64;
        assert!((0.6..=1.4).contains(&mean), "radius {radius}: {mean} diameters");
    }
}

/// Real shapes: the hippocampi of the demo, each slice and class for itself.
#[test]
fn scribbles_on_hippocampi_have_scribblebenchs_lengths() {
    let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/data/hippocampus/labelsTr_dense");
    let mut files: Vec<_> = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.retain(|path| path.to_string_lossy().ends_with(".nii.gz"));
    files.sort();
    let (mut interior, mut border) = (Vec::new(), Vec::new());
    for path in files.iter().take(8) {
        let dense = voxgrad::io::read_labels(path).unwrap().data;
        let drawn = |scribbles: Scribbles| scribbles.draw(dense.view(), IGNORE, &mut random(7)).labels;
        let inside = drawn(Scribbles { thickness: 1, border: 0, ..Scribbles::default() });
        // One pixel thick along the outline itself: what is drawn can be counted beside the outline's pixels.
        let along = drawn(Scribbles { thickness: 1, interior: 0, border_depth: [0, 0], ..Scribbles::default() });
        for (plane, (inside, along)) in dense.outer_iter().zip(inside.outer_iter().zip(along.outer_iter())) {
            let part = parts(plane);
            for (scribbles, lengths, is_border) in [(inside, &mut interior, false), (along, &mut border, true)] {
                for label in [1, 2] {
                    let pixels: Vec<(usize, usize)> =
                        scribbles.indexed_iter().filter(|(_, found)| **found == label).map(|(at, _)| at).collect();
                    let Some(&first) = pixels.first() else { continue };
                    let component: BTreeSet<(usize, usize)> =
                        part.indexed_iter().filter(|(_, id)| **id == part[first]).map(|(at, _)| at).collect();
                    let span = |of: fn(&(usize, usize)) -> usize| {
                        component.iter().map(of).max().unwrap() - component.iter().map(of).min().unwrap() + 1
                    };
                    let extent = span(|at| at.0).max(span(|at| at.1));
                    let on_outline = |&&(y, x): &&(usize, usize)| {
                        let beside = [(y.wrapping_sub(1), x), (y + 1, x), (y, x.wrapping_sub(1)), (y, x + 1)];
                        beside.iter().any(|at| !component.contains(at))
                    };
                    let outline = component.iter().filter(on_outline).count();
                    // A stroke of a few pixels is a pixel longer or shorter by rounding alone.
                    match is_border {
                        true if outline >= 20 => lengths.push(pixels.len() as f64 / outline as f64),
                        false if extent >= 6 => lengths.push(pixels.len() as f64 / extent as f64),
                        _ => {}
                    }
                }
            }
        }
    }
    let mean = |shares: &[f64]| shares.iter().sum::<f64>() / shares.len() as f64;
    assert!(interior.len() > 100 && border.len() > 100, "{} and {}", interior.len(), border.len());
    assert!((0.5..=1.5).contains(&mean(&interior)), "interior: {} of the extent", mean(&interior));
    assert!((0.07..=0.15).contains(&mean(&border)), "border: {} of the outline", mean(&border));
}

#[test]
fn slices_that_are_not_chosen_stay_empty() {
    let dense = dense();
    let scribbles =
        Scribbles { foreground_slices: [0.5; 2], background_slices: [0.0; 2], axis: 1, ..Scribbles::default() };
    let drawn = scribbles.draw(dense.view(), IGNORE, &mut random(4));
    let counts = |volume: &Array3<i16>, used: fn(i16) -> bool| {
        volume.axis_iter(Axis(1)).map(|plane| plane.iter().any(|&label| used(label))).collect::<Vec<_>>()
    };
    let (foreground, touched) = (counts(&dense, |l| l > 0), counts(&drawn.labels, |l| l != IGNORE));
    assert!(foreground.iter().zip(&touched).all(|(foreground, touched)| *foreground || !touched));
    let of = |flags: &[bool]| flags.iter().filter(|&&flag| flag).count();
    assert_eq!(of(&touched), of(&foreground) / 2);
}

// ---- slices ------------------------------------------------------------------------------------------------------------

const FIRST: [&[usize]; 3] = [&[8], &[0, 26], &[13]];
const SECOND: [&[usize]; 3] = [&[21, 27], &[0], &[30]];

#[test]
fn slices_are_numpys() {
    let mut random = NumpyRandom::new(1234);
    for (shape, expected) in [([36, 50, 35], FIRST), ([60, 15, 44], SECOND)] {
        let dense = Array3::from_shape_fn(shape, |(z, y, x)| ((z + 2 * y + 3 * x) % 3) as i16);
        let sparse = slices::keep(dense.view(), 3, &nnunet().nnunets(shape, &mut random)).labels;
        for (axis, expected) in expected.iter().enumerate() {
            assert_eq!(kept(sparse.view(), axis), *expected, "{shape:?} axis {axis}");
        }
        for (found, dense) in sparse.iter().zip(&dense) {
            assert!(*found == 3 || found == dense);
        }
    }
}

#[test]
fn slices_where_labels_change() {
    // A block from 10 to 29: labels change between 9 and 10, and between 29 and 30.
    let dense = Array3::from_shape_fn((40, 8, 8), |(z, y, x)| i16::from((10..30).contains(&z) && y > 2 && x > 2));
    let chosen = |fraction, selection| {
        let slices = Slices { axes: [true, false, false], fraction, selection };
        kept(draw(&Scheme::Slices(slices), dense.view(), IGNORE, &mut random(0)).labels.view(), 0)
    };
    let [first, second] = chosen(0.05, Selection::Change)[..] else { panic!("two slices of 40") };
    assert!([9, 10].contains(&first) && [29, 30].contains(&second), "{first} {second}");
    assert_eq!(chosen(0.1, Selection::Even), [5, 15, 25, 35]);
    assert_ne!(chosen(0.1, Selection::Random), chosen(0.1, Selection::Even));
}
