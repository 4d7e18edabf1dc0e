//! The page about a dataset: what it says must be what the files hold.

use crate::common::sparse::{LABELS, Place, labels};
use ndarray::{Array3, ArrayView3};
use std::fs;
use voxgrad::io::{Geometry, write_labels};
use voxgrad::report::{InspectSettings, Intensities, inspect, page};

#[test]
fn counts_shares_and_intensities() {
    let place = Place::new();
    place.dataset(&["a", "b", "c"], LABELS);
    place.succeeds(&["sparsify", "dense", "-o", "sparse", "--scheme", "slices", "--axes", "z", "--fraction", "0.3"]);
    let sparse = place.path("sparse");
    let settings = InspectSettings { pictures: 2, workers: 2 };
    let inspection = inspect(&sparse, &settings, |_| {}).unwrap();
    assert_eq!((inspection.ignore, inspection.labels.len(), inspection.cases.len()), (Some(3), 3, 3));
    for case in &inspection.cases {
        let map = labels(&sparse, &case.name);
        let count = |label: i16| map.iter().filter(|&&found| found == label).count() as u64;
        assert_eq!(case.voxels, [count(0), count(1), count(2)]);
        let slices = |label: i16| map.outer_iter().filter(|slice| slice.iter().any(|&l| l == label)).count() as u64;
        assert_eq!(case.slices, [slices(0), slices(1), slices(2)]);
        assert_eq!(case.share(), (map.len() as u64 - count(3)) as f64 / map.len() as f64);
        assert_eq!((case.spacing, case.shape), ([2.0, 1.0, 0.5], map.dim().into()));
    }
    assert_eq!(inspection.cases.iter().filter(|case| case.picture.is_some()).count(), 2);
}

#[test]
fn intensities_are_those_of_numpy() {
    // numpy: a = np.arange(1000) ** 1.5; np.percentile(a, [0, .5, 50, 99.5, 100], method="nearest"), a.mean(), a.std()
    let values: Vec<f32> = (0..1000).map(|value| (value as f32).powf(1.5)).chain([f32::NAN]).collect();
    let found = Intensities::of(ArrayView3::from_shape((1, 7, 143), &values).unwrap());
    let close =
        |found: f64, wanted: f64| assert!((found - wanted).abs() <= 1e-6 * wanted.max(1.0), "{found} for {wanted}");
    let wanted = [0.0, 11.18033989, 11180.33989, 31338.59894, 31575.35076];
    found.quantiles.iter().zip(wanted).for_each(|(found, wanted)| close(*found, wanted));
    close(found.mean, 12633.30318);
    close(found.deviation, 9481.55582);
}

#[test]
fn the_page_needs_nothing_else_and_marks_nothing_up() {
    let place = Place::new();
    place.dataset(&["a", "b"], r#"{"background": 0, "<b>&\"": 1, "Posterior": 2}"#);
    let said = place.succeeds(&["inspect", "dense", "-o", "page.html", "--pictures", "1"]);
    assert!(said.contains("2 cases"), "{said}");
    let text = fs::read_to_string(place.path("page.html")).unwrap();
    assert!(text.contains("&lt;b&gt;&amp;&quot;") && !text.contains("<b>"));
    assert!(!text.contains("http") && !text.contains("<script") && !text.contains("src=\"/"));
    let encoded = text.split("data:image/png;base64,").nth(1).unwrap().split('"').next().unwrap();
    let picture = image::load_from_memory(&decoded(encoded)).unwrap();
    assert!(picture.width() > 300 && picture.height() > 100);
    assert_eq!(text.matches("data:image/png").count(), 1);
    place.refuses(&["inspect", "dense", "-o", "page.html"], &["page.html", "exists", "--overwrite"]);
    place.succeeds(&["inspect", "dense", "-o", "page.html", "--overwrite"]);
}

/// Base64, the slow way.
fn decoded(text: &str) -> Vec<u8> {
    let digits = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let (mut bits, mut count, mut bytes) = (0u32, 0, Vec::new());
    for digit in text.trim_end_matches('=').chars() {
        bits = (bits << 6) | digits.find(digit).unwrap() as u32;
        count += 6;
        if count >= 8 {
            count -= 8;
            bytes.push((bits >> count) as u8);
        }
    }
    bytes
}

#[test]
fn what_is_ignored_is_hatched() {
    let place = Place::new();
    let sparse = place.dataset(&["a", "b"], r#"{"background": 0, "Anterior": 1, "Posterior": 2, "ignore": 3}"#);
    // Nothing annotated in b: it is said, and its picture is hatched all over.
    let dense = labels(&sparse, "b");
    let nothing = Array3::from_elem(dense.dim(), 3u8);
    write_labels(&sparse.join("labelsTr/b.nii.gz"), nothing.view(), &Geometry::new([2.0, 1.0, 0.5])).unwrap();
    let inspection = inspect(&sparse, &InspectSettings { pictures: 2, workers: 1 }, |_| {}).unwrap();
    assert!(inspection.warnings.iter().any(|line| line.contains("nothing is annotated in 1 case: b")));
    let hatched = |case: usize| {
        let picture = image::load_from_memory(inspection.cases[case].picture.as_ref().unwrap()).unwrap().to_rgb8();
        let pixels = picture.pixels().filter(|pixel| pixel.0 == [122, 128, 140]).count();
        pixels as f64 / (picture.width() * picture.height()) as f64
    };
    assert_eq!(hatched(0), 0.0);
    assert!(hatched(1) > 0.1, "{}", hatched(1));
    assert!(page(&inspection).contains("nothing is annotated in 1 case: b"));
}

#[test]
fn faults_are_named_all_at_once() {
    let place = Place::new();
    let dense = place.dataset(&["a", "b", "c"], LABELS);
    fs::write(dense.join("labelsTr/a.nii.gz"), b"nothing").unwrap();
    let map = labels(&dense, "b").mapv(|label| label as u8 * 4);
    write_labels(&dense.join("labelsTr/b.nii.gz"), map.view(), &Geometry::new([2.0, 1.0, 0.5])).unwrap();
    place.refuses(&["inspect", "dense", "-o", "page.html"], &["a.nii.gz", "b.nii.gz", "8"]);
}
