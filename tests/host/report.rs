//! Figures are looked at by people; here only that they are complete, show what they must, and never fail on odd input.
//!
//! Set `VOXGRAD_KEEP_FIGURES` to a folder to look at what is drawn.

use std::path::PathBuf;
use voxgrad::error::FileError;

use ndarray::{Array3, s};
use voxgrad::dataset::Dataset;
use voxgrad::history::{EpochRecord, History};
use voxgrad::io::{read_image, read_labels};
use voxgrad::report::{Overlay, write_overlay, write_progress};
use voxgrad::{Compat, Error};

use crate::common::data;

/// Where figures of a test go; the guard deletes them unless they are kept.
fn folder() -> (PathBuf, tempfile::TempDir) {
    let dir = tempfile::tempdir().unwrap();
    let kept = std::env::var_os("VOXGRAD_KEEP_FIGURES").map(PathBuf::from);
    (kept.unwrap_or_else(|| dir.path().into()), dir)
}

fn history(epochs: usize) -> History {
    let mut history = History::default();
    for e in 0..epochs {
        let t = e as f64 / 120.0;
        let noise = ((e * 7919) % 97) as f64 / 97.0 - 0.5;
        let dice = 0.86 * (1.0 - (-5.0 * t).exp()) + 0.08 * noise;
        history.push(
            EpochRecord {
                train_loss: 0.9 * (-4.0 * t).exp() - 0.75 + 0.04 * noise,
                val_loss: 0.85 * (-3.5 * t).exp() - 0.66 - 0.06 * noise,
                dice_per_class: vec![if e == 3 { f64::NAN } else { dice.max(0.0) }],
                learning_rate: 0.01 * (1.0 - e as f64 / 120.0).powf(0.9),
                started: 100.0 * e as f64,
                ended: 100.0 * e as f64 + 42.0 + 6.0 * noise,
                times: Default::default(),
            },
            Compat::Corrected,
        );
    }
    history
}

#[test]
fn progress_shows_every_line() {
    let (folder, _guard) = folder();
    let path = folder.join("progress.png");
    write_progress(&path, &history(120)).unwrap();
    let picture = image::open(&path).unwrap().to_rgb8();
    assert_eq!(picture.dimensions(), (1200, 1320));
    let near = |r: u8, g: u8, b: u8| {
        let close = |p: &image::Rgb<u8>| p.0.iter().zip([r, g, b]).all(|(a, b)| a.abs_diff(b) < 12);
        picture.pixels().filter(|p| close(p)).count()
    };
    // Blue, red, green, violet and orange lines have pixels of their own.
    for (r, g, b) in [(31, 98, 189), (207, 54, 60), (30, 140, 78), (116, 75, 172), (204, 112, 18)] {
        assert!(near(r, g, b) > 200, "{r} {g} {b}");
    }
    // Nothing else is left in the folder.
    let names = std::fs::read_dir(&folder).unwrap().map(|f| f.unwrap().file_name());
    assert!(names.into_iter().all(|name| !name.to_string_lossy().starts_with("writing")));
}

#[test]
fn progress_of_few_or_odd_epochs() {
    let (folder, _guard) = folder();
    write_progress(&folder.join("none.png"), &History::default()).unwrap();
    write_progress(&folder.join("one.png"), &history(1)).unwrap();
    let mut odd = history(4);
    odd.train_losses = vec![f64::NAN; 4];
    odd.val_losses = vec![f64::INFINITY, 1.0, 1.0, 1.0];
    odd.lrs = vec![0.0; 4];
    write_progress(&folder.join("odd.png"), &odd).unwrap();
    let missing = folder.join("missing/progress.png");
    assert!(matches!(write_progress(&missing, &odd), Err(Error::File(FileError::Io { .. }))));
}

#[test]
fn overlay_of_a_case() {
    let (folder, _guard) = folder();
    let dataset = Dataset::open(&data("brats_regions/raw")).unwrap();
    let files = &dataset.cases[1];
    let image = read_image(&files.images[3]).unwrap();
    let annotation = read_labels(files.label.as_ref().unwrap()).unwrap().data;
    // A stand-in for prediction and dense reference: the annotation with its gaps closed.
    let dense = annotation.mapv(|l| if l == 4 { 0 } else { l });
    let mut predicted = dense.clone();
    predicted.slice_mut(s![.., ..20, ..]).fill(0);
    let path = folder.join("overlay.png");
    let names = [(1, "edema".to_string()), (2, "core".into()), (3, "enhancing".into())];
    let overlay = Overlay {
        case: &files.name,
        image: image.data.view(),
        annotation: Some(annotation.view()),
        prediction: predicted.view(),
        reference: Some(dense.view()),
        ignore: Some(4),
        labels: &names,
        spacing: image.geometry.spacing,
    };
    write_overlay(&path, &overlay).unwrap();
    let picture = image::open(&path).unwrap().to_rgb8();
    let (width, height) = picture.dimensions();
    let panel = (width - 20) / 4 - 20;
    assert!(panel > 300 && height > 400, "{width} x {height}");
    // Colour appears in the panels of labels, not in that of the image.
    let coloured = |index: u32| {
        let left = 20 + index * (panel + 20);
        let columns = left..left + panel;
        let rows = 64..height - 88;
        let all = columns.flat_map(|x| rows.clone().map(move |y| (x, y)));
        all.filter(|&(x, y)| {
            let [r, g, b] = picture.get_pixel(x, y).0;
            r.abs_diff(g).max(g.abs_diff(b)) > 20
        })
        .count()
    };
    assert_eq!(coloured(0), 0);
    assert!(coloured(3) > coloured(2) && coloured(2) > 0);

    let without = Overlay { annotation: None, reference: None, ..overlay.clone() };
    let path = folder.join("two_panels.png");
    write_overlay(&path, &without).unwrap();
    assert!(image::open(&path).unwrap().width() < width / 2 + 100);

    let other = Array3::zeros((2, 2, 2));
    let mismatched = Overlay { prediction: other.view(), ..overlay };
    assert!(matches!(write_overlay(&folder.join("bad.png"), &mismatched), Err(Error::File(FileError::Figure { .. }))));
}
