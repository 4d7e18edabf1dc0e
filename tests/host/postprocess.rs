//! Postprocessing: components by hand, and what nnU-Net 2.8.1 decides on the same predictions.

use crate::common::place::{peak_memory, text};
use crate::common::{data, uniform};
use ndarray::{Array3, arr3};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use voxgrad::Error;
use voxgrad::dataset::{DatasetJson, LabelGroup, LabelManager};
use voxgrad::error::{ExchangeError, FileError};
use voxgrad::eval::postprocess::determine;
use voxgrad::eval::{Components, Postprocessing, keep_largest};
use voxgrad::exchange::{read_postprocessing, write_postprocessing};
use voxgrad::io::{Geometry, read_labels, write_labels};

const SETS: [&str; 2] = ["labels", "regions"];

fn folder(name: &str) -> PathBuf {
    data("evaluation").join(name)
}

fn labels(name: &str) -> LabelManager {
    LabelManager::new(&DatasetJson::read(&folder(name).join("dataset.json")).unwrap()).unwrap()
}

fn names(folder: &Path) -> Vec<String> {
    let entries = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
    let mut names: Vec<String> = entries.filter(|name| name.ends_with(".nii.gz")).collect();
    names.sort();
    names
}

fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for name in names(from) {
        fs::copy(from.join(&name), to.join(&name)).unwrap();
    }
}

#[test]
fn components_and_the_largest_by_hand() {
    // Two voxels that touch at a corner, two more apart in the same slice, one alone.
    let map = arr3(&[[[1, 0, 0, 2], [0, 0, 0, 2], [0, 0, 0, 0]], [[0, 0, 0, 0], [0, 1, 0, 0], [0, 0, 0, 1]]]);
    let found = Components::of(map.mapv(|label| label == 1).view());
    assert_eq!(found.sizes, [2, 1]);
    assert_eq!(found.numbers, arr3(&[[[1, 0, 0, 0], [0; 4], [0; 4]], [[0; 4], [0, 1, 0, 0], [0, 0, 0, 2]]]));
    assert_eq!(found.middle_of_largest(), Some([0, 0, 0]));
    let empty = Components::of(Array3::from_elem((1, 2, 3), false).view());
    assert_eq!((empty.largest(), empty.middle_of_largest()), (0, None));

    let mut kept = map.clone();
    assert_eq!(keep_largest(&mut kept, &LabelGroup::Label(1)), 1);
    assert_eq!(kept[[1, 2, 3]], 0);
    assert_eq!(kept.iter().filter(|&&label| label == 2).count(), 2);
    // Of equally large ones all stay.
    let mut equal = map.clone();
    equal[[1, 2, 2]] = 1;
    equal[[1, 1, 1]] = 0;
    equal[[0, 0, 1]] = 1;
    assert_eq!(keep_largest(&mut equal, &LabelGroup::Label(1)), 0);
    // Together they are one mask: the pair of 2 and the 1 that touches it are three.
    let mut together = map.clone();
    assert_eq!(keep_largest(&mut together, &LabelGroup::Region(vec![1, 2])), 2);
    assert_eq!(together.iter().filter(|&&label| label > 0).count(), 3);
}

/// The definition: from every voxel to all that can be reached over neighbours.
fn reached(mask: &Array3<bool>) -> Components {
    let mut found = Components { numbers: Array3::zeros(mask.dim()), sizes: Vec::new() };
    for (seed, &inside) in mask.indexed_iter() {
        if !inside || found.numbers[seed] != 0 {
            continue;
        }
        found.sizes.push(0);
        let mut pending = vec![seed];
        found.numbers[seed] = found.sizes.len() as u32;
        while let Some((z, y, x)) = pending.pop() {
            found.sizes[found.numbers[(z, y, x)] as usize - 1] += 1;
            for (neighbour, &inside) in mask.indexed_iter() {
                let near = |a: usize, b: usize| a.abs_diff(b) <= 1;
                let touches = near(neighbour.0, z) && near(neighbour.1, y) && near(neighbour.2, x);
                if inside && touches && found.numbers[neighbour] == 0 {
                    found.numbers[neighbour] = found.sizes.len() as u32;
                    pending.push(neighbour);
                }
            }
        }
    }
    found
}

#[test]
fn components_are_what_neighbours_reach() {
    for (seed, dense) in (0..60).flat_map(|seed| [0.05, 0.1, 0.2].map(|dense| (seed, dense))) {
        let (depth, height, width) = (1 + seed as usize % 4, 9, 11);
        let values = uniform(seed + 1, depth * height * width);
        let inside = values.iter().map(|value| f64::from(*value) < 2.0 * dense - 1.0).collect();
        let mask = Array3::from_shape_vec((depth, height, width), inside).unwrap();
        let expected = reached(&mask);
        assert_eq!(Components::of(mask.view()), expected, "{seed} {dense}");
        // In another order of memory.
        let turned = mask.view().permuted_axes([2, 1, 0]);
        assert_eq!(Components::of(turned), reached(&turned.to_owned()), "{seed} {dense}");
    }
    // Arms of a comb that meet at their ends, and arms within arms.
    let comb = Array3::from_shape_fn((1, 40, 41), |(_, y, x)| x % 2 == 0 || y == 39);
    assert_eq!(Components::of(comb.view()).sizes, [21 * 40 + 20]);
    let rings = Array3::from_shape_fn((1, 41, 41), |(_, y, x)| {
        let ring = [y, x, 40 - y, 40 - x].into_iter().min().unwrap();
        ring % 2 == 0 && !(ring < 20 && y == 40 - ring && x == 20)
    });
    let found = Components::of(rings.view());
    assert_eq!(found.sizes.len(), 11);
    assert_eq!(found, reached(&rings));
}

/// Volumes of whole bodies have a billion voxels: what is searched takes few bytes of each.
#[test]
fn a_search_takes_few_bytes_a_voxel() {
    if !cfg!(target_os = "linux") {
        return eprintln!("skipped: peak memory is read from /proc");
    }
    let dir = tempfile::tempdir().unwrap();
    let (input, output) = (dir.path().join("in"), dir.path().join("out"));
    let file = dir.path().join("postprocessing.json");
    fs::write(
        &file,
        r#"{"postprocessing_fns": ["remove_all_but_largest_component_from_segmentation"],
            "postprocessing_kwargs": [{"labels_or_regions": 1}]}"#,
    )
    .unwrap();
    fs::create_dir(&input).unwrap();
    let peak = |side: usize| {
        let solid = Array3::<u8>::ones((side, side, side));
        write_labels(&input.join("a.nii.gz"), solid.view(), &Geometry::new([1.0; 3])).unwrap();
        let mut command = Command::new(env!("CARGO_BIN_EXE_voxgrad"));
        command.arg("apply-postprocessing").arg("-i").arg(&input).arg("-o").arg(&output).arg("-pp_pkl_file").arg(&file);
        let (exit, peak) = peak_memory(command.arg("--overwrite"));
        assert!(exit.success());
        peak
    };
    let (small, side) = (peak(64), 160);
    let per_voxel = (peak(side) - small) as f64 / (side * side * side) as f64;
    eprintln!("{per_voxel:.1} bytes a voxel");
    assert!(per_voxel < 20.0, "{per_voxel} bytes a voxel");
}

#[test]
fn decisions_are_nnunets() {
    for name in SETS {
        let here = folder(name);
        let labels = labels(name);
        let found =
            determine(&here.join("references"), &here.join("predictions"), ".nii.gz", &labels, &|_| ()).unwrap();
        assert_eq!(found.missing, 0);
        assert_eq!(found.trials.len(), 1 + labels.foreground().len());
        assert_eq!(found.to_json(), fs::read_to_string(here.join("postprocessing.json")).unwrap(), "{name}");
        for file in ["postprocessing.json", "postprocessing.pkl"] {
            let theirs = read_postprocessing(&here.join(file)).unwrap();
            let members = |postprocessing: &Postprocessing| -> Vec<Vec<i16>> {
                postprocessing.keep_largest.iter().map(|group| group.members().to_vec()).collect()
            };
            assert_eq!(members(&theirs), members(&found.postprocessing), "{name} {file}");
            let dir = tempfile::tempdir().unwrap();
            let predictions = here.join("predictions");
            let written = theirs.apply_to_folder(&predictions, dir.path(), ".nii.gz", false, &|_| ()).unwrap();
            assert_eq!(written, 6);
            for case in names(&here.join("postprocessed")) {
                let [ours, theirs] = [dir.path(), &here.join("postprocessed")].map(|f| read_labels(&f.join(&case)));
                assert_eq!(ours.unwrap(), theirs.unwrap(), "{name} {case}");
            }
            let again = theirs.apply_to_folder(&predictions, dir.path(), ".nii.gz", false, &|_| ());
            assert!(again.unwrap_err().to_string().contains("case 1 with blanks.nii.gz"));
        }
    }
}

/// All foreground together is taken when no class falls; what single classes would gain then is gone.
#[test]
fn all_foreground_comes_first() {
    let dir = tempfile::tempdir().unwrap();
    let write = |kind: &str, scattered: &[[usize; 3]]| {
        let mut map = Array3::<u8>::zeros((6, 6, 6));
        map.slice_mut(ndarray::s![1..4, 1..4, 1..3]).fill(1);
        map.slice_mut(ndarray::s![1..4, 1..4, 3..5]).fill(2);
        scattered.iter().enumerate().for_each(|(place, &at)| map[at] = 1 + place as u8 % 2);
        fs::create_dir_all(dir.path().join(kind)).unwrap();
        write_labels(&dir.path().join(kind).join("a.nii.gz"), map.view(), &Geometry::new([1.0; 3])).unwrap();
    };
    write("references", &[]);
    write("predictions", &[[5, 5, 5], [5, 5, 0]]);
    let json = r#"{"channel_names": {"0": "a"}, "numTraining": 1, "file_ending": ".nii.gz",
        "labels": {"background": 0, "a": 1, "b": 2}}"#;
    let labels = LabelManager::new(&DatasetJson::parse("d".as_ref(), json).unwrap()).unwrap();
    let folder = |name: &str| dir.path().join(name);
    let found = determine(&folder("references"), &folder("predictions"), ".nii.gz", &labels, &|_| ()).unwrap();
    assert_eq!(found.postprocessing.keep_largest, [LabelGroup::Region(vec![1, 2])]);
    assert_eq!(found.trials.iter().map(|trial| trial.accepted).collect::<Vec<_>>(), [true, false, false]);
    assert_eq!((found.trials[0].after, found.after.foreground_dice()), (1.0, 1.0));
}

#[test]
fn pickles_come_back_and_others_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("postprocessing.pkl");
    let groups = vec![LabelGroup::Region(vec![1, 2, 300]), LabelGroup::Label(7), LabelGroup::Region(vec![3])];
    for keep_largest in [Vec::new(), groups[..1].to_vec(), groups] {
        let postprocessing = Postprocessing { keep_largest };
        write_postprocessing(&path, &postprocessing).unwrap();
        assert_eq!(read_postprocessing(&path).unwrap(), postprocessing);
    }
    fs::write(&path, b"\x80\x02(]cos\nsystem\na]}X\x01\x00\x00\x00aK\x01sat.").unwrap();
    let error = read_postprocessing(&path).unwrap_err();
    assert!(
        matches!(&error, Error::Exchange(ExchangeError::PickleGlobal { name, .. }) if name == "os.system"),
        "{error}"
    );
    for bytes in [&b"\x80\x02]."[..], b"\x80\x02(]K\x01a]}at.", b"\x80\x02(]]}at.", b""] {
        fs::write(&path, bytes).unwrap();
        let error = read_postprocessing(&path).unwrap_err();
        assert!(matches!(error, Error::Exchange(ExchangeError::Postprocessing { .. })), "{bytes:?}: {error}");
    }
    let json = dir.path().join("postprocessing.json");
    for (content, word) in [
        (
            r#"{"postprocessing_fns": ["fill_holes"], "postprocessing_kwargs": [{"labels_or_regions": 1}]}"#,
            "fill_holes",
        ),
        (r#"{"postprocessing_fns": [], "postprocessing_kwargs": [{"labels_or_regions": 1}]}"#, "1 entries for 0"),
        (r#"{"postprocessing_fns": []}"#, "postprocessing_kwargs"),
    ] {
        fs::write(&json, content).unwrap();
        let error = read_postprocessing(&json).unwrap_err();
        assert!(matches!(error, Error::File(FileError::Field { .. })), "{error}");
        assert!(error.to_string().contains(word), "{error}");
    }
    // Means may be NaN, which JSON proper has not; the word in a text stays.
    let content = r#"{"NaN \" NaN": [NaN, -Infinity, -1], "postprocessing_fns": [], "postprocessing_kwargs": []}"#;
    fs::write(&json, content).unwrap();
    assert_eq!(read_postprocessing(&json).unwrap(), Postprocessing::default());
}

fn voxgrad(arguments: &[&Path]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_voxgrad")).args(arguments).output().unwrap()
}

/// On the command line, in nnU-Net's spelling.
#[test]
fn determined_and_applied_on_the_command_line() {
    let dir = tempfile::tempdir().unwrap();
    let predictions = dir.path().join("predictions with blanks");
    copy(&folder("labels").join("predictions"), &predictions);
    let path = |text: &'static str| Path::new(text);
    let (references, dataset) = (folder("labels").join("references"), folder("labels").join("dataset.json"));
    let base =
        [path("determine-postprocessing"), path("-i"), &predictions, path("-ref"), &references, path("-dataset_json")];
    let result = voxgrad(&[&base[..], &[&dataset]].concat());
    assert!(result.status.success(), "{}", text(&result.stderr));
    let said = text(&result.stdout);
    assert!(said.contains("largest component of liver (1): Dice 0.77108 -> 0.82620, taken"), "{said}");
    let expected = fs::read_to_string(folder("labels").join("postprocessing.json")).unwrap();
    assert_eq!(fs::read_to_string(predictions.join("postprocessing.json")).unwrap(), expected);
    let kept = predictions.join("postprocessed");
    assert_eq!(names(&kept).len(), 6);

    // What an earlier decision has left is not mixed with this one's, and does not stay beside another.
    fs::copy(kept.join("case_0.nii.gz"), kept.join("long gone.nii.gz")).unwrap();
    assert!(voxgrad(&[&base[..], &[&dataset]].concat()).status.success());
    assert_eq!(names(&kept).len(), 6);
    fs::write(kept.join("notes.txt"), "mine").unwrap();
    let removing = [&base[..], &[&dataset, path("--remove_postprocessed")]].concat();
    let result = voxgrad(&removing);
    assert_eq!(result.status.code(), Some(2));
    assert!(text(&result.stderr).contains("notes.txt") && names(&kept).len() == 6, "{}", text(&result.stderr));
    fs::remove_file(kept.join("notes.txt")).unwrap();
    let result = voxgrad(&removing);
    assert!(result.status.success() && text(&result.stdout).contains("removed "), "{}", text(&result.stderr));
    assert!(!kept.exists() && predictions.join("postprocessing.pkl").is_file());

    let output = dir.path().join("output");
    let pickle = predictions.join("postprocessing.pkl");
    let apply =
        [path("apply-postprocessing"), path("-i"), &predictions, path("-o"), &output, path("-pp_pkl_file"), &pickle];
    let result = voxgrad(&apply);
    assert!(result.status.success(), "{}", text(&result.stderr));
    for case in names(&output) {
        let theirs = read_labels(&folder("labels").join("postprocessed").join(&case)).unwrap();
        assert_eq!(read_labels(&output.join(&case)).unwrap(), theirs, "{case}");
    }
    for (arguments, words) in [
        (apply.to_vec(), vec!["output/case_0.nii.gz", "is there already", "--overwrite"]),
        ([&apply[..4], &[&predictions], &apply[5..]].concat(), vec!["is input and output"]),
    ] {
        let result = voxgrad(&arguments);
        assert_eq!(result.status.code(), Some(2));
        words.iter().for_each(|word| assert!(text(&result.stderr).contains(word), "{}", text(&result.stderr)));
    }
    assert!(voxgrad(&[&apply[..], &[path("--overwrite")]].concat()).status.success());
}
