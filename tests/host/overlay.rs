//! Pictures of cases: complete, of what they must show, never failing on odd input. `VOXGRAD_KEEP_FIGURES` names a folder to
//! look at them.

use crate::common::place::Place;
use ndarray::{Array3, s};
use std::fs;
use std::path::PathBuf;
use voxgrad::Error;
use voxgrad::error::FileError;
use voxgrad::io::{Geometry, write_labels};
use voxgrad::report::{Planes, write_planes};

const SHAPE: [usize; 3] = [12, 30, 24];

/// A block that is annotated in part, and a shifted prediction with another class.
fn volumes() -> (Array3<f32>, Array3<i16>, Array3<i16>) {
    let image = Array3::from_shape_fn(SHAPE, |(z, y, x)| (z * 30 + y * 7 + x * 3) as f32 - 200.0);
    let mut annotation = Array3::<i16>::zeros(SHAPE);
    annotation.slice_mut(s![3..9, 8..20, 6..16]).fill(1);
    annotation.slice_mut(s![5..7, 10..14, 8..12]).fill(2);
    annotation.slice_mut(s![.., 22.., ..]).fill(3);
    let mut prediction = Array3::<i16>::zeros(SHAPE);
    prediction.slice_mut(s![3..9, 10..22, 6..16]).fill(1);
    (image, annotation, prediction)
}

fn planes<'a>(
    image: &'a Array3<f32>,
    annotation: &'a Array3<i16>,
    prediction: &'a Array3<i16>,
    labels: &'a [(i16, String)],
) -> Planes<'a> {
    Planes {
        case: "病例 with blanks",
        image: image.view(),
        annotation: Some(annotation.view()),
        prediction: Some(prediction.view()),
        ignore: Some(3),
        labels,
        spacing: [3.0, 1.0, 1.0],
        at: [6, 12, 10],
        window: None,
    }
}

fn folder() -> (PathBuf, tempfile::TempDir) {
    let dir = tempfile::tempdir().unwrap();
    let kept = std::env::var_os("VOXGRAD_KEEP_FIGURES").map(PathBuf::from);
    (kept.unwrap_or_else(|| dir.path().into()), dir)
}

#[test]
fn three_planes_show_errors_and_what_is_not_annotated() {
    let (folder, _guard) = folder();
    let (image, annotation, prediction) = volumes();
    let labels: Vec<(i16, String)> = (1..40).map(|label| (label, format!("class {label}"))).collect();
    let all = planes(&image, &annotation, &prediction, &labels);
    let draw = |planes: &Planes, name: &str| {
        let path = folder.join(name);
        write_planes(&path, planes).unwrap();
        image::open(&path).unwrap().to_rgb8()
    };
    let picture = draw(&all, "planes.png");
    let exactly = |picture: &image::RgbImage, colour: [u8; 3]| picture.pixels().filter(|p| p.0 == colour).count();
    // The map of errors has borders in full colour: agreement, invented, missed, other class.
    for colour in [[60, 190, 130], [225, 70, 85], [86, 180, 233], [240, 228, 66]] {
        assert!(exactly(&picture, colour) > 100, "{colour:?}");
    }
    // Lines of the hatching are of one brightness where the image is dark.
    let hatching = [(0.55f32 * 255.0).round() as u8; 3];
    let all_annotated = draw(&Planes { ignore: None, ..all.clone() }, "annotated.png");
    assert!(exactly(&picture, hatching) > exactly(&all_annotated, hatching) + 300);
    let without = draw(&Planes { annotation: None, ..all.clone() }, "prediction.png");
    assert_eq!(exactly(&without, [225, 70, 85]), 0);
    assert!(without.width() < picture.width() && without.height() == picture.height());

    // Everything below the window is black, everything above it white.
    let dark =
        draw(&Planes { window: Some([1e4, 2e4]), annotation: None, prediction: None, ..all.clone() }, "dark.png");
    let bright =
        draw(&Planes { window: Some([-2e4, -1e4]), annotation: None, prediction: None, ..all.clone() }, "bright.png");
    assert!(exactly(&dark, [0; 3]) > 50_000 && exactly(&dark, [255; 3]) == 0);
    assert!(exactly(&bright, [255; 3]) > 50_000 && exactly(&bright, [0; 3]) == 0);
}

#[test]
fn odd_input_is_refused() {
    let (folder, _guard) = folder();
    let (image, annotation, prediction) = volumes();
    let all = planes(&image, &annotation, &prediction, &[]);
    let path = folder.join("odd.png");
    let other = Array3::<i16>::zeros([12, 30, 23]);
    for odd in [
        Planes { annotation: Some(other.view()), ..all.clone() },
        Planes { at: [12, 0, 0], ..all.clone() },
        Planes { window: Some([1.0, 1.0]), ..all.clone() },
        Planes { window: Some([f32::NAN, 1.0]), ..all.clone() },
    ] {
        let error = write_planes(&path, &odd).unwrap_err();
        assert!(matches!(error, Error::File(FileError::Figure { .. })), "{error}");
    }
    let empty = Array3::<f32>::from_elem(SHAPE, f32::NAN);
    write_planes(&path, &Planes { image: empty.view(), spacing: [100.0, 1.0, 1.0], ..all }).unwrap();
}

#[test]
fn drawn_on_the_command_line() {
    let place = Place::new();
    let (image, annotation, prediction) = volumes();
    let geometry = Geometry::new([3.0, 1.0, 1.0]);
    for name in ["images", "labels", "predicted"] {
        fs::create_dir(place.path(name)).unwrap();
    }
    let values = image.mapv(|value| value as i16);
    for case in ["a b", "größe", "without"] {
        let file = |folder: &str, ending: &str| place.path(folder).join(format!("{case}{ending}.nii.gz"));
        write_labels(&file("images", "_0000"), values.view(), &geometry).unwrap();
        if case != "without" {
            write_labels(&file("labels", ""), annotation.view(), &geometry).unwrap();
            write_labels(&file("predicted", ""), prediction.view(), &geometry).unwrap();
        }
    }
    let json = place.path("dataset.json");
    let text = r#"{"channel_names": {"0": "CT"}, "numTraining": 1, "file_ending": ".nii.gz",
        "labels": {"background": 0, "organ": 1, "lesion": 2, "ignore": 3}}"#;
    fs::write(&json, text).unwrap();
    let paths = ["images", "labels", "predicted", "out", "dataset.json"].map(|name| place.path(name));
    let [images, labels, predicted, out, json] = paths.each_ref().map(|path| path.to_str().unwrap());
    let base = ["overlay", "-i", images, "--dataset-json", json, "-o", out];
    let both = ["--references", labels, "--predictions", predicted];
    let draw = [&base[..], &both, &["--window", "400", "--level", "-40", "--class", "lesion"]].concat();
    place.succeeds(&draw);
    assert_eq!(fs::read_dir(place.path("out")).unwrap().count(), 2);
    place.refuses(&draw, &["a b.png", "größe.png", "is there already", "--overwrite"]);
    place.succeeds(&[&draw[..], &["--overwrite", "--cases", "größe"]].concat());

    let refused = |extra: &[&str], words: &[&str]| {
        place.refuses(&[&base[..], &both, &["--overwrite"], extra].concat(), words);
    };
    refused(&["--class", "tumour"], &["--class tumour", "organ, lesion"]);
    refused(&["--cases", "nobody", "without"], &["nobody, without"]);
    refused(&["-channel_idx", "1"], &["--channel is 1", "1 channels"]);
    refused(&["--window", "400"], &["--level"]);
    refused(&["--window", "0", "--level", "0"], &["--window is no width"]);
    place.refuses(&base, &["--predictions"]);
    // One case that does not fit does not keep the others from being drawn.
    let moved = prediction.slice(s![1.., .., ..]);
    write_labels(&place.path("predicted").join("a b.nii.gz"), moved, &geometry).unwrap();
    fs::remove_dir_all(place.path("out")).unwrap();
    let said = place.refuses(&draw, &["a b.nii.gz", "grid of its image", "1 of 2 cases"]);
    assert!(place.path("out").join("größe.png").is_file(), "{said}");
}
