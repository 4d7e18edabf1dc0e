//! Sparse annotations from dense ones: what holds for every scheme, distributions against ScribbleBench's rules, slices drawn
//! by numpy (`numpy.random.seed(1234)`, `choice(size, n, replace=False)`), whole datasets, and bad input.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use ndarray::{Array2, Array3, ArrayView2, ArrayView3, Axis};
use proptest::prelude::*;
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use voxgrad::dataset::Dataset;
use voxgrad::io::{Geometry, read_labels, write_labels, write_labels_as_stored};
use voxgrad::numpy_random::NumpyRandom;
use voxgrad::sparsify::{
    Annotation, Blocks, Budget, Mask, MaskRule, Mix, Report, Scheme, Scribbles, Selection, Settings, Slices, draw,
    slices, sparsify_dataset,
};

const IGNORE: i16 = 3;

// ---- volumes -----------------------------------------------------------------------------------------------------------

/// A volume of background with balls of classes 1 and 2.
fn balls(shape: (usize, usize, usize), seeds: &[(usize, usize, usize, usize)]) -> Array3<i16> {
    Array3::from_shape_fn(shape, |(z, y, x)| {
        let inside = |&&(cz, cy, cx, r): &&(usize, usize, usize, usize)| {
            z.abs_diff(cz).pow(2) + y.abs_diff(cy).pow(2) + x.abs_diff(cx).pow(2) <= r * r
        };
        seeds.iter().enumerate().filter(|(_, ball)| inside(ball)).map(|(i, _)| 1 + (i % 2) as i16).max().unwrap_or(0)
    })
}

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
fn assert_scribbles(dense: &Array3<i16>, drawn: &Annotation, axis: usize) {
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
        let check = |drawn: &Annotation| {
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

/// Slices along an axis without any ignored voxel.
fn kept(sparse: ArrayView3<i16>, axis: usize) -> Vec<usize> {
    let slices = sparse.axis_iter(Axis(axis)).enumerate();
    slices.filter(|(_, slice)| slice.iter().all(|&l| l != 3)).map(|(i, _)| i).collect()
}

fn nnunet() -> Slices {
    Slices { axes: [true; 3], fraction: 0.1, selection: Selection::Nnunet }
}

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

// ---- datasets ----------------------------------------------------------------------------------------------------------

struct Place(tempfile::TempDir);

impl Place {
    fn new() -> Self {
        Place(tempfile::tempdir().unwrap())
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// A dense dataset of balls, with labels as `labels` says.
    fn dataset(&self, cases: &[&str], labels: &str) -> PathBuf {
        let folder = self.path("dense");
        for part in ["imagesTr", "labelsTr"] {
            fs::create_dir_all(folder.join(part)).unwrap();
        }
        let json = format!(
            r#"{{"channel_names": {{"0": "MRI"}}, "labels": {labels}, "numTraining": {}, "file_ending": ".nii.gz",
                "licence": "kept"}}"#,
            cases.len()
        );
        fs::write(folder.join("dataset.json"), json).unwrap();
        for (index, case) in cases.iter().enumerate() {
            let map = balls((12 + index, 14, 13), &[(4, 5, 4, 3), (8, 8, 8 + index % 3, 3)]);
            for file in [format!("imagesTr/{case}_0000.nii.gz"), format!("labelsTr/{case}.nii.gz")] {
                let geometry = Geometry::new([2.0, 1.0, 0.5]);
                write_labels(&folder.join(file), map.mapv(|l| l as u8).view(), &geometry).unwrap();
            }
        }
        folder
    }

    fn run(&self, arguments: &[&str]) -> Output {
        let mut command = Command::new(env!("CARGO_BIN_EXE_voxgrad"));
        command.current_dir(self.0.path()).arg("sparsify").args(arguments).output().unwrap()
    }

    fn succeeds(&self, arguments: &[&str]) -> String {
        let result = self.run(arguments);
        let said = String::from_utf8_lossy(&[&result.stdout[..], &result.stderr[..]].concat()).into_owned();
        assert!(result.status.success(), "{arguments:?}: {said}");
        said
    }

    /// Runs, expects a refusal that mentions all of `words`, and that leaves nothing behind.
    fn refuses(&self, arguments: &[&str], words: &[&str]) {
        let before = files(self.0.path());
        let result = self.run(arguments);
        let said = String::from_utf8_lossy(&result.stderr).into_owned();
        assert_eq!(result.status.code(), Some(2), "{arguments:?}: {said}");
        for word in words {
            assert!(said.contains(word), "{arguments:?}: no `{word}` in: {said}");
        }
        assert!(!said.contains("panicked"), "{said}");
        assert_eq!(files(self.0.path()), before, "{arguments:?}");
    }
}

/// All files below a folder with their bytes.
fn files(folder: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let mut found = BTreeMap::new();
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        match path.is_dir() {
            true => found.extend(files(&path)),
            false => drop(found.insert(path.clone(), fs::read(&path).unwrap())),
        }
    }
    found
}

const LABELS: &str = r#"{"background": 0, "Anterior": 1, "Posterior": 2}"#;
const REGIONS: &str = r#"{"background": 0, "hippocampus": [1, 2], "anterior": 1}, "regions_class_order": [2, 1]"#;

fn settings(scheme: Scheme) -> Settings {
    Settings { scheme, seed: 7, copy_images: false, overwrite: false, workers: 1 }
}

fn labels(folder: &Path, case: &str) -> Array3<i16> {
    read_labels(&folder.join(format!("labelsTr/{case}.nii.gz"))).unwrap().data
}

#[test]
fn nnunets_integration_dataset() {
    let place = Place::new();
    let source = place.dataset(&["a", "b"], REGIONS);
    let target = place.path("sparse");
    let nnunets = Settings { seed: 1234, ..settings(Scheme::Slices(nnunet())) };
    sparsify_dataset(&source, &target, &nnunets, |_| {}).unwrap();
    let dataset = Dataset::open(&target).unwrap();
    let keys: Vec<String> = dataset.labels.foreground().iter().map(|g| g.to_string()).collect();
    assert_eq!(keys, ["(1, 2)", "1"]);
    assert_eq!(dataset.labels.regions_class_order(), Some([2, 1].as_slice()));
    assert_eq!(dataset.labels.ignore_label(), Some(3));
    // The stream goes on from case to case.
    let mut random = NumpyRandom::new(1234);
    for case in ["a", "b"] {
        let dense = labels(&source, case);
        let planes = nnunet().nnunets(dense.dim().into(), &mut random);
        assert_eq!(labels(&target, case), slices::keep(dense.view(), 3, &planes).labels);
    }
}

#[test]
fn a_case_depends_on_seed_and_name_alone() {
    let place = Place::new();
    let source = place.dataset(&["a", "b", "c"], LABELS);
    let schemes = [
        Scheme::Scribbles(Scribbles::default()),
        Scheme::Blocks(Blocks { size: [4; 3], budget: Budget::Count(2), foreground: 0.5 }),
        Scheme::Slices(Slices { axes: [true; 3], fraction: 0.2, selection: Selection::Random }),
    ];
    for (index, scheme) in schemes.into_iter().enumerate() {
        let made = |name: &str, seed: u64, workers: usize, source: &Path| {
            let target = place.path(&format!("{index}-{name}"));
            let settings = Settings { seed, workers, ..settings(scheme.clone()) };
            sparsify_dataset(source, &target, &settings, |_| {}).unwrap();
            target
        };
        let (one, three) = (made("one", 5, 1, &source), made("three", 5, 3, &source));
        let relative = |folder: &Path| -> BTreeMap<PathBuf, Vec<u8>> {
            files(folder).into_iter().map(|(path, bytes)| (path.strip_prefix(folder).unwrap().into(), bytes)).collect()
        };
        assert_eq!(relative(&one), relative(&three));
        let other = made("other", 6, 1, &source);
        assert_ne!(labels(&one, "b"), labels(&other, "b"));

        // Without its neighbours the case is the same.
        let fewer = Place::new();
        let alone = fewer.dataset(&["b"], LABELS);
        for part in ["imagesTr/b_0000.nii.gz", "labelsTr/b.nii.gz"] {
            fs::copy(source.join(part), alone.join(part)).unwrap();
        }
        assert_eq!(labels(&made("alone", 5, 1, &alone), "b"), labels(&one, "b"));
    }
}

#[test]
fn types_geometry_images_and_description_stay() {
    let place = Place::new();
    let source = place.dataset(&["a", "b"], LABELS);
    fs::create_dir_all(source.join("imagesTs")).unwrap();
    fs::copy(source.join("imagesTr/a_0000.nii.gz"), source.join("imagesTs/t_0000.nii.gz")).unwrap();
    fs::write(source.join("splits_final.json"), "[]").unwrap();
    // Labels as 16-bit integers.
    let geometry = read_labels(&source.join("labelsTr/a.nii.gz")).unwrap().geometry;
    write_labels(&source.join("labelsTr/b.nii.gz"), labels(&source, "b").mapv(|l| l as u16).view(), &geometry).unwrap();

    let target = place.path("sparse");
    let said = place.succeeds(&["dense", "-o", "sparse", "--scheme", "scribbles", "--seed", "3"]);
    assert!(
        said.contains("3 files are hard links") && said.contains("Posterior") && said.contains("% of it"),
        "{said}"
    );
    for (case, datatype) in [("a", 2_i16), ("b", 512)] {
        let file = target.join(format!("labelsTr/{case}.nii.gz"));
        assert_eq!(read_labels(&file).unwrap().geometry.affine(), geometry.affine());
        let mut bytes = Vec::new();
        let packed = fs::File::open(&file).unwrap();
        std::io::Read::read_to_end(&mut flate2::read::GzDecoder::new(packed), &mut bytes).unwrap();
        assert_eq!(i16::from_le_bytes([bytes[70], bytes[71]]), datatype, "{case}");
    }
    for file in ["imagesTr/a_0000.nii.gz", "imagesTr/b_0000.nii.gz", "imagesTs/t_0000.nii.gz", "splits_final.json"] {
        assert_eq!(fs::read(source.join(file)).unwrap(), fs::read(target.join(file)).unwrap());
    }
    let json: serde_json::Value = serde_json::from_slice(&fs::read(target.join("dataset.json")).unwrap()).unwrap();
    assert_eq!(json["labels"].to_string(), r#"{"background":0,"Anterior":1,"Posterior":2,"ignore":3}"#);
    assert_eq!(json["licence"], "kept");
    let record: serde_json::Value = serde_json::from_slice(&fs::read(target.join("sparsify.json")).unwrap()).unwrap();
    assert_eq!(record["settings"]["seed"], 3);
    let counted = labels(&target, "a").iter().filter(|&&label| label == 1).count();
    assert_eq!(record["cases"][0]["classes"][1]["annotated"], counted);
    assert_eq!(record["cases"][0]["annotated"], annotated(&labels(&target, "a")));

    // Nothing is replaced without being asked, and only what this command made.
    place.refuses(&["dense", "-o", "sparse", "--scheme", "slices"], &["sparse", "--overwrite"]);
    place.succeeds(&["dense", "-o", "sparse", "--scheme", "slices", "--overwrite", "--copy"]);
    fs::write(target.join("notes.txt"), "mine").unwrap();
    place.refuses(&["dense", "-o", "sparse", "--scheme", "slices", "--overwrite"], &["notes.txt"]);
    place.refuses(&["dense", "-o", "dense", "--scheme", "slices", "--overwrite"], &["source"]);
    place.refuses(&["dense", "-o", "dense/sparse", "--scheme", "slices"], &["source"]);
    fs::remove_file(target.join("notes.txt")).unwrap();
    fs::remove_file(target.join("sparsify.json")).unwrap();
    place.refuses(
        &["dense", "-o", "sparse", "--scheme", "slices", "--overwrite"],
        &["no dataset that this command made"],
    );
}

#[test]
fn every_stored_type_comes_back() {
    let place = Place::new();
    let map = Array3::from_shape_fn((2, 3, 4), |(z, y, x)| (z + y + x) as i16);
    let path = place.path("map.nii");
    macro_rules! stored {
        ($($voxel:ty),*) => {$(
            write_labels(&path, map.mapv(|label| label as $voxel).view(), &Geometry::new([1.0; 3])).unwrap();
            let before = fs::read(&path).unwrap();
            let read = read_labels(&path).unwrap();
            write_labels_as_stored(&path, read.data.view(), &read.geometry).unwrap();
            assert_eq!(fs::read(&path).unwrap(), before, stringify!($voxel));
        )*};
    }
    stored!(u8, i8, u16, i16, u32, i32, u64, i64, f32, f64);
    // A byte does not hold 300.
    write_labels(&path, map.mapv(|label| label as u8).view(), &Geometry::new([1.0; 3])).unwrap();
    let geometry = read_labels(&path).unwrap().geometry;
    let large = map.mapv(|label| 60 * label);
    write_labels_as_stored(&path, large.view(), &geometry).unwrap();
    assert_eq!(read_labels(&path).unwrap().data, large);
}

#[test]
fn masks_take_away_what_they_say() {
    let place = Place::new();
    let source = place.dataset(&["a", "b"], REGIONS);
    let rules = vec![
        MaskRule { cases: vec!["a".into()], classes: vec!["anterior".into()], bounds: None },
        MaskRule { cases: vec![], classes: vec![], bounds: Some([[0, 2], [0, 99], [3, 5]]) },
    ];
    let masks = place.path("masks");
    fs::create_dir(&masks).unwrap();
    let mask = Array3::from_shape_fn((13, 14, 13), |(z, y, _)| u8::from(z == 5 && y > 7));
    write_labels(&masks.join("b.nii.gz"), mask.view(), &Geometry::new([2.0, 1.0, 0.5])).unwrap();
    let scheme = Scheme::Mask(Mask { rules, folder: Some(masks.clone()) });
    let report = sparsify_dataset(&source, &place.path("sparse"), &settings(scheme), |_| {}).unwrap();
    for case in ["a", "b"] {
        let (dense, sparse) = (labels(&source, case), labels(&place.path("sparse"), case));
        for (at, &label) in dense.indexed_iter() {
            let (z, y, x) = at;
            let taken =
                (z < 2 && (3..5).contains(&x)) || (case == "a" && label == 1) || (case == "b" && z == 5 && y > 7);
            assert_eq!(sparse[at], if taken { 3 } else { label }, "{case} {at:?}");
        }
    }
    let without = report
        .warnings
        .iter()
        .any(|warning| warning.contains("1 (hippocampus, anterior)") && warning.contains("1 case: a"));
    assert!(without, "{:?}", report.warnings);

    // A mask that lies elsewhere, of another shape, or of no case.
    write_labels(&masks.join("b.nii.gz"), mask.view(), &Geometry::new([2.0, 1.0, 5.0])).unwrap();
    place.refuses(&["dense", "-o", "x", "--scheme", "mask", "--mask-folder", "masks"], &["case b", "same grid"]);
    write_labels(&masks.join("b.nii.gz"), mask.t(), &Geometry::new([2.0, 1.0, 0.5])).unwrap();
    fs::write(masks.join("nobody.nii.gz"), "").unwrap();
    place.refuses(&["dense", "-o", "x", "--scheme", "mask", "--mask-folder", "masks"], &["nobody.nii.gz"]);
    let names = ["--mask-class", "liver", "--mask-case", "z", "--mask-box", "0:4,5:5,0:4"];
    let words = ["class `liver`", "case `z`", "[5, 5]", "3 things"];
    place.refuses(&[&["dense", "-o", "x", "--scheme", "mask"], &names[..]].concat(), &words);
    place.refuses(&["dense", "-o", "x", "--scheme", "mask"], &["what to take away"]);
    fs::write(place.path("rules.json"), r#"[{"classes": ["anterior"], "case": "a"}]"#).unwrap();
    place.refuses(&["dense", "-o", "x", "--scheme", "mask", "--mask-rules", "rules.json"], &["rules.json", "`case`"]);
}

#[test]
fn mixtures_and_pooled_blocks_are_shared_out() {
    let place = Place::new();
    let names: Vec<String> = (0..9).map(|case| format!("case{case}")).collect();
    let source = place.dataset(&names.iter().map(String::as_str).collect::<Vec<_>>(), LABELS);
    let count = |report: &Report, name: &str| report.cases.iter().filter(|case| case.scheme == name).count();
    let pooled = Scheme::Blocks(Blocks { size: [6; 3], budget: Budget::Pooled(0.05), foreground: 0.0 });
    let parts = vec![(Scheme::Dense, 1.0), (Scheme::Scribbles(Scribbles::default()), 2.0), (pooled.clone(), 1.0)];
    let report = sparsify_dataset(&source, &place.path("mix"), &settings(Scheme::Mix(Mix { parts })), |_| {}).unwrap();
    assert_eq!(["dense", "scribbles", "blocks"].map(|name| count(&report, name)), [2, 5, 2]);
    assert!(report.cases.iter().all(|case| (case.scheme == "dense") == (case.annotated == case.voxels())));

    let report = sparsify_dataset(&source, &place.path("pool"), &settings(pooled), |_| {}).unwrap();
    let annotated = report.cases.iter().map(|case| case.annotated).sum::<u64>() as f64;
    let all = report.cases.iter().map(|case| case.voxels()).sum::<u64>() as f64;
    assert!((annotated / all - 0.05).abs() * all <= 108.0, "{}", annotated / all);
    assert!(report.warnings[0].contains("without any annotation"), "{:?}", report.warnings);
}

#[test]
fn listed_slices() {
    let place = Place::new();
    let source = place.dataset(&["a", "b"], LABELS);
    fs::write(place.path("planes.json"), r#"{"*": {"z": [5]}, "b": {"y": [1, 7], "x": [0]}}"#).unwrap();
    place.succeeds(&["dense", "-o", "sparse", "--scheme", "slices", "--planes", "planes.json"]);
    let kept_in = |case: &str| [0, 1, 2].map(|axis| kept(labels(&place.path("sparse"), case).view(), axis));
    assert_eq!(kept_in("a"), [vec![5], vec![], vec![]]);
    assert_eq!(kept_in("b"), [vec![], vec![1, 7], vec![0]]);
    assert_eq!(labels(&source, "a").dim().0, 12);
    fs::write(place.path("planes.json"), r#"{"a": {"z": [12]}, "c": {"z": [1]}}"#).unwrap();
    let words = ["3 things", "0 to 11", "[12]", "case `c`", "case b"];
    place.refuses(&["dense", "-o", "x", "--scheme", "slices", "--planes", "planes.json"], &words);
}

#[test]
fn bad_datasets_are_refused_before_anything_is_written() {
    let sparsify = ["dense", "-o", "x", "--scheme", "scribbles"];
    // Labels with a gap, and a class that no case has.
    let place = Place::new();
    place.dataset(&["a"], r#"{"background": 0, "Anterior": 1, "Posterior": 3}"#);
    place.refuses(&sparsify, &["consecutive"]);
    place.dataset(&["a"], r#"{"background": 0, "A": 1, "B": 2, "C": 3, "D": 4}"#);
    place.refuses(&sparsify, &["2 things", "C (label 3)", "D (label 4)"]);
    // The value that the ignore label must have is in use: all cases are named.
    place.dataset(&["a", "b"], r#"{"background": 0, "A": 1}"#);
    place.refuses(&sparsify, &["2 things", "case a", "case b", "label 2", "declares [0, 1]"]);
    // An image of one slice.
    let source = place.dataset(&["a", "b"], LABELS);
    let flat = Array3::from_elem((1, 8, 8), 1_u8);
    write_labels(&source.join("labelsTr/b.nii.gz"), flat.view(), &Geometry::new([1.0; 3])).unwrap();
    fs::remove_file(source.join("labelsTr/a.nii.gz")).unwrap();
    place.refuses(&sparsify, &["case b", "single slice", "case a: no label file"]);
}

#[test]
fn bad_settings_are_refused() {
    let place = Place::new();
    place.dataset(&["a", "b"], LABELS);
    let refuses = |scheme: &str, options: &[&str], words: &[&str]| {
        place.refuses(&[&["dense", "-o", "x", "--scheme", scheme], options].concat(), words);
    };
    refuses("blocks", &["--block", "10"], &["2 things", "10.000 %", "smaller blocks"]);
    refuses("scribbles", &["--fraction", "0.9"], &["case a", "case b", "90.000 %", "every slice"]);
    refuses("scribbles", &["--fraction", "0.0001"], &["raise the fraction"]);
    refuses("slices", &["--fraction", "1.5"], &["fraction", "1.5"]);
    refuses("slices", &["--fraction", "nan"], &["fraction", "NaN"]);
    refuses("scribbles", &["--thickness", "2", "--control-points", "2"], &["odd", "at least 3"]);
    refuses("scribbles", &["--border-length", "0.5:0.2"], &["0.5:0.2"]);
    refuses("scribbles", &["--border-depth", "a"], &["LOW:HIGH"]);
    refuses("blocks", &["--block", "0"], &["block"]);
    refuses("blocks", &["--count", "1", "--foreground", "2"], &["foreground share"]);
    // What would not be looked at is refused by its name.
    refuses("slices", &["--thickness", "3", "--pool"], &["--thickness", "--pool", "slices"]);
    refuses("mask", &["--mask-class", "Anterior", "--fraction", "0.1"], &["--fraction"]);
    refuses("scribbles", &["--mix", "dense=1"], &["--mix"]);
    refuses("scribbles", &["--fraction", "0.01", "--foreground-slices", "0.1"], &["--foreground-slices"]);
    refuses("mix", &[], &["--mix"]);
    refuses("mix", &["--mix", "scribbles=1,mix=1"], &["`mix`"]);
    refuses("mix", &["--mix", "scribbles=0,dense=1"], &["positive"]);
}
