//! Surface distances against their definitions, by brute force; lesions and volumes by hand; the table of all of them.

use approx::assert_relative_eq;
use ndarray::Array3;
use voxgrad::dataset::{DatasetJson, LabelGroup, LabelManager};
use voxgrad::eval::{
    Estimate, Lesions, SurfaceDistances, SurfaceKind, SurfaceSettings, evaluate_folder, lesions, surface_distances,
};
use voxgrad::io::{Geometry, read_labels, write_labels};

use crate::common::data;

type Voxel = [usize; 3];

fn voxels(tolerance: f64) -> SurfaceSettings {
    SurfaceSettings { kind: SurfaceKind::Voxels, tolerance }
}

fn elements(tolerance: f64) -> SurfaceSettings {
    SurfaceSettings { kind: SurfaceKind::Elements, tolerance }
}

/// Voxels of a group, seen by an annotation.
fn members(map: &Array3<i16>, reference: &Array3<i16>, group: &LabelGroup, ignore: Option<i16>) -> Vec<Voxel> {
    let inside = map.indexed_iter().filter(|(at, label)| group.contains(**label) && Some(reference[*at]) != ignore);
    inside.map(|((z, y, x), _)| [z, y, x]).collect()
}

/// The definition of a surface, voxel by voxel.
fn surface(map: &Array3<i16>, reference: &Array3<i16>, group: &LabelGroup, ignore: Option<i16>) -> Vec<Voxel> {
    let inside = members(map, reference, group, ignore);
    let shape: [usize; 3] = map.dim().into();
    let outside = |at: Voxel, axis: usize, step: isize| {
        let place = at[axis] as isize + step;
        if place < 0 || place >= shape[axis] as isize {
            return true;
        }
        let mut neighbour = at;
        neighbour[axis] = place as usize;
        !inside.contains(&neighbour) && Some(reference[neighbour]) != ignore
    };
    let on = |at: &Voxel| (0..3).any(|axis| outside(*at, axis, -1) || outside(*at, axis, 1));
    inside.iter().copied().filter(on).collect()
}

/// Every distance of one surface's voxels to the other, sorted.
fn distances(from: &[Voxel], to: &[Voxel], spacing: [f64; 3]) -> Vec<f64> {
    let distance = |a: &Voxel, b: &Voxel| {
        let along = (0..3).map(|axis| ((a[axis] as f64 - b[axis] as f64) * spacing[axis]).powi(2));
        along.sum::<f64>().sqrt()
    };
    let mut all: Vec<f64> =
        from.iter().map(|a| to.iter().map(|b| distance(a, b)).fold(f64::INFINITY, f64::min)).collect();
    all.sort_by(f64::total_cmp);
    all
}

fn by_definition(
    prediction: &Array3<i16>,
    reference: &Array3<i16>,
    group: &LabelGroup,
    ignore: Option<i16>,
    spacing: [f64; 3],
    tolerance: f64,
) -> SurfaceDistances {
    let [a, b] = [prediction, reference].map(|map| surface(map, reference, group, ignore));
    let [there, back] = [distances(&a, &b, spacing), distances(&b, &a, spacing)];
    let percentile = |sorted: &[f64]| {
        let position = 0.95 * (sorted.len() - 1) as f64;
        let (low, high) = (sorted[position as usize], sorted[(position as usize + 1).min(sorted.len() - 1)]);
        low * (1.0 - position.fract()) + high * position.fract()
    };
    let all = [&there[..], &back[..]].concat();
    SurfaceDistances {
        hausdorff_95: percentile(&there).max(percentile(&back)),
        average: all.iter().sum::<f64>() / all.len() as f64,
        within_tolerance: all.iter().filter(|&&d| d <= tolerance).count() as f64 / all.len() as f64,
    }
}

fn assert_same(found: SurfaceDistances, expected: SurfaceDistances) {
    assert_relative_eq!(found.hausdorff_95, expected.hausdorff_95, epsilon = 1e-9);
    assert_relative_eq!(found.average, expected.average, epsilon = 1e-9);
    assert_relative_eq!(found.within_tolerance, expected.within_tolerance, epsilon = 1e-12);
}

/// A ball and a shifted, dented one, with scattered voxels; every fifth slice is not annotated where `sparse`.
fn pair(shape: Voxel, sparse: bool) -> [Array3<i16>; 2] {
    let depth = shape[0] as f64;
    let noise = crate::common::uniform(7, shape.iter().product());
    let ball = |centre: [f64; 3], radius: f64, scatter: f32| {
        let mut voxel = 0;
        Array3::from_shape_fn(shape, |(z, y, x)| {
            let square: f64 = [z, y, x].iter().zip(centre).map(|(&p, c)| (p as f64 - c).powi(2)).sum();
            voxel += 1;
            let label = if square < radius * radius { 1 } else { i16::from(noise[voxel - 1] > scatter) };
            label + i16::from(label == 1 && (x + y) % 7 == 0)
        })
    };
    let prediction = ball([0.4 * depth, 6.0, 5.5], 4.2, 0.985);
    let mut reference = ball([0.5 * depth, 5.0, 7.0], 3.8, 1.1);
    if sparse {
        reference.indexed_iter_mut().filter(|((z, _, _), _)| z % 5 == 2).for_each(|(_, label)| *label = 3);
    }
    [prediction, reference]
}

#[test]
fn surface_distances_are_what_they_are_defined_to_be() {
    for (shape, spacing) in [([11, 12, 13], [1.0; 3]), ([9, 13, 12], [3.0, 0.7, 0.9]), ([1, 12, 13], [5.0, 1.0, 1.0])] {
        for sparse in [false, true] {
            let [prediction, reference] = pair(shape, sparse);
            for group in [LabelGroup::Label(1), LabelGroup::Label(2), LabelGroup::Region(vec![1, 2])] {
                for tolerance in [0.0, 1.0, 2.5] {
                    let ignore = sparse.then_some(3);
                    let (p, r) = (prediction.view(), reference.view());
                    let found = surface_distances(p, r, &group, ignore, spacing, voxels(tolerance));
                    let expected = by_definition(&prediction, &reference, &group, ignore, spacing, tolerance);
                    assert!(shape[0] == 1 || found.average > 0.0);
                    assert_same(found, expected);
                }
            }
        }
    }
}

/// Two cubes of 2x2x2 voxels, 3 voxels of 2 mm apart along x: all voxels are surface, at 6 or 4 mm from the other cube.
#[test]
fn distances_by_hand() {
    let cube = |from: usize| {
        Array3::from_shape_fn((4, 4, 8), |(z, y, x)| {
            i16::from((1..3).contains(&z) && (1..3).contains(&y) && (from..from + 2).contains(&x))
        })
    };
    let (a, b) = (cube(1), cube(4));
    let one = LabelGroup::Label(1);
    let found = surface_distances(a.view(), b.view(), &one, None, [1.0, 1.0, 2.0], voxels(4.0));
    assert_same(found, SurfaceDistances { hausdorff_95: 6.0, average: 5.0, within_tolerance: 0.5 });
    let same = surface_distances(a.view(), a.view(), &one, None, [1.0; 3], voxels(0.0));
    assert_same(same, SurfaceDistances { hausdorff_95: 0.0, average: 0.0, within_tolerance: 1.0 });
    let empty = Array3::<i16>::zeros((4, 4, 8));
    let nothing = surface_distances(empty.view(), empty.view(), &one, None, [1.0; 3], voxels(1.0));
    assert!(nothing.hausdorff_95.is_nan() && nothing.average.is_nan() && nothing.within_tolerance.is_nan());
    for (p, r) in [(&a, &empty), (&empty, &a)] {
        let missed = surface_distances(p.view(), r.view(), &one, None, [1.0; 3], voxels(1.0));
        assert_eq!((missed.hausdorff_95, missed.average, missed.within_tolerance), (f64::INFINITY, f64::INFINITY, 0.0));
    }
}

#[test]
fn lesions_are_counted_through_corners() {
    let map = |set: &[Voxel]| {
        let mut map = Array3::<i16>::zeros((5, 5, 5));
        set.iter().for_each(|&at| map[at] = 1);
        map
    };
    // Two voxels that touch at a corner, one alone, one in a corner of the image.
    let reference = map(&[[0, 0, 0], [1, 1, 1], [0, 4, 0], [4, 4, 4]]);
    // Meets the first, and adds two that touch along an edge.
    let prediction = map(&[[1, 1, 1], [3, 0, 3], [4, 1, 3]]);
    let one = LabelGroup::Label(1);
    let found = lesions(prediction.view(), reference.view(), &one, None);
    assert_eq!(found, Lesions { reference: 3, found: 1, predicted: 2, invented: 1 });
    // Where nobody looked, nothing is invented and nothing is missed.
    let mut sparse = reference.clone();
    for at in [[3, 0, 3], [4, 1, 3], [4, 4, 4]] {
        sparse[at] = 2;
    }
    let found = lesions(prediction.view(), sparse.view(), &one, Some(2));
    assert_eq!(found, Lesions { reference: 2, found: 1, predicted: 1, invented: 0 });
}

#[test]
fn the_table_has_a_line_for_each_case_and_class() {
    let dir = tempfile::tempdir().unwrap();
    let json = r#"{"channel_names": {"0": "a"}, "numTraining": 1, "file_ending": ".nii.gz",
        "labels": {"background": 0, "liver": 1, "lesion, \"hot\"": 2, "ignore": 3}}"#;
    let labels = LabelManager::new(&DatasetJson::parse("d".as_ref(), json).unwrap()).unwrap();
    let [prediction, reference] = pair([10, 12, 13], true);
    let spacing = [2.0, 0.5, 1.0];
    for (folder, map) in [("prediction", &prediction), ("reference", &reference)] {
        std::fs::create_dir(dir.path().join(folder)).unwrap();
        let bytes = map.mapv(|label| label as u8);
        write_labels(&dir.path().join(folder).join("a,b.nii.gz"), bytes.view(), &Geometry::new(spacing)).unwrap();
    }
    let folder = |name: &str| dir.path().join(name);
    let summary = evaluate_folder(&folder("reference"), &folder("prediction"), ".nii.gz", &labels, false).unwrap();
    let measures = summary.measure(voxels(1.0), &|_| ()).unwrap();
    assert_relative_eq!(summary.cases[0].annotated, 0.8, epsilon = 1e-12);
    let all = prediction.iter().filter(|&&label| label == 1).count() as f64;
    let seen = members(&prediction, &reference, &LabelGroup::Label(1), Some(3)).len() as f64;
    let true_voxels = members(&reference, &reference, &LabelGroup::Label(1), Some(3)).len() as f64;
    let first = &measures[0].groups[0];
    assert_relative_eq!(first.predicted_volume, all / 1000.0, epsilon = 1e-12);
    assert_relative_eq!(first.predicted_volume_annotated, seen / 1000.0, epsilon = 1e-12);
    assert_relative_eq!(first.reference_volume, true_voxels / 1000.0, epsilon = 1e-12);
    let expected = by_definition(&prediction, &reference, &LabelGroup::Label(1), Some(3), spacing, 1.0);
    assert_same(first.surfaces, expected);

    let table = summary.csv(&measures, voxels(1.0));
    let lines: Vec<&str> = table.lines().collect();
    assert_eq!(lines.len(), 3);
    assert!(lines[0].starts_with("case,class,annotated_share,dice,iou,hd95_mm,assd_mm,nsd_1mm,"));
    assert!(lines[1].starts_with("\"a,b.nii.gz\",liver,0.8"), "{}", lines[1]);
    assert!(lines[2].starts_with("\"a,b.nii.gz\",\"lesion, \"\"hot\"\"\","), "{}", lines[2]);
    assert_eq!(lines[0].split(',').count(), lines[1].split(',').count() - 1, "the case's name holds a comma");
    assert!(summary.measure(voxels(f64::NAN), &|_| ()).is_err());
}

/// MONAI 1.6.1 and surface-distance 0.1 on the same masks, some of which touch the border of the image.
#[test]
fn surface_distances_are_those_of_monai_and_surface_distance() {
    let folder = data("evaluation");
    let expected = std::fs::read_to_string(folder.join("surfaces.json")).unwrap();
    let expected: serde_json::Value = serde_json::from_str(&expected).unwrap();
    let cases = expected["cases"].as_array().unwrap();
    assert_eq!(cases.len(), 12);
    for row in cases {
        let read = |kind: &str| read_labels(&folder.join(format!("surfaces/{kind}_{}.nii.gz", row["case"]))).unwrap();
        let (prediction, reference) = (read("prediction"), read("reference"));
        let group = LabelGroup::Label(row["label"].as_i64().unwrap() as i16);
        let spacing = reference.geometry.spacing;
        let measure = |settings| {
            surface_distances(prediction.data.view(), reference.data.view(), &group, None, spacing, settings)
        };
        let number = |program: &str, field: &str| row[program][field].as_f64().unwrap();
        let same =
            |found: f64, expected: f64| assert_relative_eq!(found, expected, epsilon = 1e-6, max_relative = 1e-6);
        for tolerance in [0.5, 1.0, 2.5] {
            // MONAI computes in f32.
            let found = measure(voxels(tolerance));
            same(found.hausdorff_95, number("monai", "hd95"));
            same(found.average, number("monai", "assd"));
            same(found.within_tolerance, number("monai", &format!("nsd_{tolerance:?}")));
            let found = measure(elements(tolerance));
            let theirs = |field: &str| number("surface_distance", field);
            same(found.hausdorff_95, theirs("hd95"));
            same(found.within_tolerance, theirs(&format!("nsd_{tolerance:?}")));
            let areas = [theirs("area_of_reference"), theirs("area_of_prediction")];
            let sum = areas[0] * theirs("average_to_prediction") + areas[1] * theirs("average_to_reference");
            same(found.average, sum / (areas[0] + areas[1]));
        }
    }
}

/// Where the annotation ends is not where the object ends, whatever a surface is made of.
#[test]
fn no_surface_where_the_annotation_ends() {
    let reference = Array3::from_shape_fn((6, 6, 6), |(z, y, x)| {
        let inside = (1..5).contains(&z) && (1..5).contains(&y) && (1..5).contains(&x);
        if z > 2 { 9 } else { i16::from(inside) }
    });
    let prediction = reference.mapv(|label| if label == 9 { 0 } else { label });
    let one = LabelGroup::Label(1);
    for settings in [voxels(0.0), elements(0.0)] {
        let found = surface_distances(prediction.view(), reference.view(), &one, Some(9), [1.0; 3], settings);
        assert_same(found, SurfaceDistances { hausdorff_95: 0.0, average: 0.0, within_tolerance: 1.0 });
    }
    // A block of 2 x 2 x 2 voxels has corners cut off: 8 corners, 12 edges of one, 6 faces of one.
    let block = Array3::from_shape_fn((4, 4, 4), |(z, y, x)| i16::from([z, y, x].iter().all(|at| (1..3).contains(at))));
    let shifted = Array3::from_shape_fn((4, 4, 4), |(z, y, x)| {
        i16::from((1..3).contains(&z) && (1..3).contains(&y) && (2..4).contains(&x))
    });
    let found = surface_distances(shifted.view(), block.view(), &one, None, [1.0; 3], elements(1.0));
    assert_same(found, SurfaceDistances { within_tolerance: 1.0, hausdorff_95: 1.0, ..found });
}

#[test]
fn intervals_are_those_of_the_percentile_bootstrap() {
    let expected = std::fs::read_to_string(data("evaluation/surfaces.json")).unwrap();
    let expected: serde_json::Value = serde_json::from_str(&expected).unwrap();
    let bootstrap = &expected["bootstrap"];
    let sample: Vec<f64> = bootstrap["sample"].as_array().unwrap().iter().map(|v| v.as_f64().unwrap()).collect();
    let found = Estimate::of(sample.iter().copied().chain([f64::NAN, f64::INFINITY]));
    assert_eq!(found, Estimate::of(sample.iter().copied()));
    assert_eq!(found.cases, 10);
    assert_relative_eq!(found.mean, 0.785, epsilon = 1e-12);
    // scipy 1.17 with 200000 draws; 2000 draws scatter by a few thousandths.
    let [low, high] = found.interval.unwrap();
    assert!((low - bootstrap["low"].as_f64().unwrap()).abs() < 0.01, "{low}");
    assert!((high - bootstrap["high"].as_f64().unwrap()).abs() < 0.01, "{high}");
    assert_eq!(Estimate::of([0.5]).interval, None);
    assert!(Estimate::of([]).mean.is_nan());
}
