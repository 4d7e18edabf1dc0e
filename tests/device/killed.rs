//! Nothing is lost: a training that is killed at any moment, that finds the disk full, or whose checkpoint is damaged.

use crate::common::place::{copy_folder, text};
use crate::common::{device, is_slow, phantom};
use std::fs;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use voxgrad::Error;
use voxgrad::augment::Recipe;
use voxgrad::dataset::Dataset;
use voxgrad::dataset::plans::Plans;
use voxgrad::dataset::splits::{self, Fold};
use voxgrad::error::NetworkError;
use voxgrad::kernels::Context;
use voxgrad::parameters::{NamedTensor, Slot};
use voxgrad::sample::Sampling;
use voxgrad::train::run::{self, Ended, Saving};
use voxgrad::train::{Checkpoint, DataSource, Model, Settings, Trainer};

const SETTINGS: Settings = Settings {
    epochs: 16,
    iterations: 2,
    validation_iterations: 1,
    learning_rate: 0.01,
    momentum: 0.99,
    mirror: [true; 3],
    augmentation: Recipe::MIRROR,
    sampling: Sampling::NNUNET,
    compat: voxgrad::Compat::Corrected,
    precision: voxgrad::train::Precision::F32,
    exact: false,
    tuned: false,
    seed: 0,
};

/// The same, as it is typed.
const TYPED: [&str; 9] =
    ["--fold", "all", "--epochs", "16", "--iterations", "2", "--validation-iterations", "1", "--augmentation=mirror"];

/// A dataset of two cases.
struct Place(tempfile::TempDir);

impl Place {
    fn new() -> Self {
        let place = Place(tempfile::tempdir().unwrap());
        fs::create_dir(place.data()).unwrap();
        phantom::write(&place.data(), 2);
        place
    }

    fn data(&self) -> PathBuf {
        self.0.path().join("data")
    }

    fn command(&self, output: &Path, extra: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_voxgrad"));
        command.arg("train").arg(self.data()).arg("-o").arg(output).args(TYPED).args(extra);
        let device = std::env::var("VOXGRAD_TEST_DEVICE").unwrap_or_else(|_| "cpu".into());
        command.args(["--device", &device, "--disable-tta", "--save-every", "1"]);
        command
    }

    /// Goes on with what is in the folder, or begins, until `epochs` are done; in this process, whose kernels are compiled.
    fn train(&self, context: &Context, folder: &Path, epochs: usize) -> Vec<Bits> {
        let dataset = Dataset::open(&self.data()).unwrap();
        let plans = Plans::read(&self.data().join("nnUNetPlans.json")).unwrap();
        let model = Model::new(plans, "3d_fullres", dataset.json.clone()).unwrap();
        let split = splits::cases_of_fold(&[], Fold::All, &dataset.case_names()).unwrap();
        let source = DataSource {
            dataset: &dataset,
            prepared: &self.data(),
            fold: Fold::All,
            split: &split,
            compat: None,
            skip_unreadable: false,
        };
        let data = source.open(&model, |_| ()).unwrap();
        let mut trainer = match run::newest(folder).unwrap() {
            Some(newest) => Trainer::resume(context, newest.checkpoint).unwrap(),
            None => Trainer::new(context, model, SETTINGS).unwrap(),
        };
        let mut left = epochs.saturating_sub(trainer.progress().epoch) * SETTINGS.iterations;
        let observe = |report: voxgrad::train::Report| {
            left -= usize::from(!report.validation);
            if left == 0 && epochs < SETTINGS.epochs { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        };
        let patches = [&data.training[..], &data.validation[..]];
        run::train(&mut trainer, &data.cases, folder, Saving::Every(1), patches, observe, |_| Ok(())).unwrap();
        bits(&trainer.checkpoint().unwrap(), context)
    }
}

/// Weights and momenta, and the course of training without its times, as bits.
#[derive(Debug, PartialEq)]
struct Bits(String, Vec<u64>);

fn bits(checkpoint: &Checkpoint, context: &Context) -> Vec<Bits> {
    let trainer = Trainer::resume(context, checkpoint.clone()).unwrap();
    let parameters = trainer.network().parameters();
    let mut all = Vec::new();
    for slot in [Slot::Value, Slot::Momentum] {
        let tensors: Vec<NamedTensor> = parameters.to_torch(context, slot).unwrap();
        let words = |values: Vec<f32>| values.iter().map(|value| value.to_bits().into()).collect();
        all.extend(tensors.into_iter().map(|(name, _, values)| Bits(format!("{slot:?} of {name}"), words(values))));
    }
    let history = &checkpoint.progress.history;
    for (name, list) in [
        ("training loss", &history.train_losses),
        ("validation loss", &history.val_losses),
        ("pseudo Dice", &history.mean_fg_dice),
    ] {
        all.push(Bits(name.into(), list.iter().map(|value| value.to_bits()).collect()));
    }
    all
}

fn success(result: Output) -> String {
    let said = text(&result.stdout) + &text(&result.stderr);
    assert!(result.status.success(), "{said}");
    said
}

#[cfg(target_os = "linux")]
mod signals {
    use std::path::Path;
    use std::time::{Duration, Instant};

    pub fn send(process: u32, signal: i32) {
        // SAFETY: a number and a signal; the process is a child of this one that has not been waited for.
        assert_eq!(unsafe { libc::kill(process as i32, signal) }, 0);
    }

    /// Until the process stands still.
    pub fn stop(process: u32) {
        send(process, libc::SIGSTOP);
        let state = || {
            let stat = std::fs::read_to_string(format!("/proc/{process}/stat")).unwrap();
            stat.rsplit(')').next().and_then(|rest| rest.trim_start().chars().next())
        };
        while !matches!(state(), Some('T' | 'Z')) {
            std::thread::yield_now();
        }
    }

    /// Whether a file is being written in the folder, or was not finished.
    pub fn is_writing(folder: &Path) -> bool {
        let mut entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
        entries.any(|entry| entry.file_name().to_string_lossy().ends_with(".partial"))
    }

    /// Waits until a file is being written, but not for ever.
    pub fn wait_for_writing(folder: &Path) {
        let begin = Instant::now();
        while !is_writing(folder) && begin.elapsed() < Duration::from_millis(200) {}
    }
}

/// What a killed process leaves is what lies in its folder at that moment. So the program is held at random moments, half of
/// them while it writes, its folder is copied, and at the last one it is killed. Each copy is continued.
#[cfg(target_os = "linux")]
#[test]
fn killed_at_any_moment_and_continued_ends_in_the_same_bits() {
    use std::io::BufRead;
    use std::time::{Duration, SystemTime};
    const MOMENTS: usize = 30;
    let (context, _guard) = device();
    if is_slow() {
        return eprintln!("skipped: too slow a device to train on again and again");
    }
    let place = Place::new();
    let folder = |name: &str| place.0.path().join(name);
    let never = folder("never");
    fs::create_dir(&never).unwrap();
    let expected = place.train(context, &never, SETTINGS.epochs);

    let output = folder("out");
    let mut child = place
        .command(&output, &[])
        .stdout(std::process::Stdio::piped())
        .stderr(std::process::Stdio::null())
        .spawn()
        .unwrap();
    let mut lines = std::io::BufReader::new(child.stdout.take().unwrap()).lines();
    assert!(lines.by_ref().any(|line| line.unwrap().starts_with("first iteration")));
    let mut random = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap().as_nanos() as u64 | 1;
    let (mut copies, mut writing) = (Vec::new(), 0);
    for moment in 0..MOMENTS {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        std::thread::sleep(Duration::from_micros(random % 8000));
        if moment % 2 == 1 {
            signals::wait_for_writing(&output);
        }
        signals::stop(child.id());
        writing += usize::from(signals::is_writing(&output));
        copies.push(folder(&format!("killed{moment}")));
        copy_folder(&output, copies.last().unwrap());
        if moment + 1 < MOMENTS && child.try_wait().unwrap().is_none() {
            signals::send(child.id(), libc::SIGCONT);
        } else {
            break;
        }
    }
    child.kill().unwrap();
    child.wait().unwrap();
    let begun = |copy: &PathBuf| run::newest(copy).unwrap().map_or(0, |newest| newest.checkpoint.progress.epoch);
    let epochs: Vec<usize> = copies.iter().map(begun).collect();
    eprintln!("killed {} times, {writing} while it wrote, after epochs {epochs:?}", copies.len());
    assert!(copies.len() >= MOMENTS / 2 && writing > 0);
    for (copy, epoch) in copies.iter().zip(epochs) {
        assert_eq!(place.train(context, copy, SETTINGS.epochs), expected, "{}, epoch {epoch}", copy.display());
    }
    // The real one, by the real program.
    success(place.command(&output, &["--continue"]).output().unwrap());
    let last = Checkpoint::read(&output.join(run::FINAL)).unwrap();
    assert_eq!(bits(&last, context), expected);
    assert!(!signals::is_writing(&output));
    // No epoch is missing or told of twice.
    let told = fs::read_to_string(output.join("epochs.jsonl")).unwrap();
    let told: Vec<serde_json::Value> = told.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let numbers: Vec<u64> = told.iter().map(|line| line["epoch"].as_u64().unwrap()).collect();
    assert_eq!(numbers, (0..16).collect::<Vec<u64>>());
    assert_eq!(told[15]["train_loss"].as_f64().unwrap(), last.progress.history.train_losses[15]);
}

/// A small file system of its own, where that may be mounted.
#[cfg(target_os = "linux")]
struct SmallDisk(tempfile::TempDir);

#[cfg(target_os = "linux")]
impl SmallDisk {
    fn mount() -> Option<Self> {
        let folder = tempfile::tempdir().unwrap();
        let mount = Command::new("mount").args(["-t", "tmpfs", "-o", "size=1m", "tmpfs"]).arg(folder.path()).output();
        mount.is_ok_and(|result| result.status.success()).then_some(SmallDisk(folder))
    }

    /// Fills what is left of it.
    fn fill(&self) -> PathBuf {
        use std::io::Write;
        let path = self.0.path().join("filler");
        let mut file = fs::File::create(&path).unwrap();
        while file.write_all(&[0; 4096]).is_ok() {}
        path
    }
}

#[cfg(target_os = "linux")]
impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(self.0.path()).status();
    }
}

#[cfg(target_os = "linux")]
#[test]
fn a_full_disk_leaves_a_whole_checkpoint() {
    use std::io::BufRead;
    let (context, _guard) = device();
    if is_slow() {
        return eprintln!("skipped: too slow a device to train on again and again");
    }
    let Some(disk) = SmallDisk::mount() else {
        return eprintln!("skipped: no file system may be mounted here, so that none can be full");
    };
    let place = Place::new();
    let output = disk.0.path().join("out");
    let mut command = place.command(&output, &[]);
    command.stdout(std::process::Stdio::piped()).stderr(std::process::Stdio::piped());
    let mut child = command.spawn().unwrap();
    let mut lines = std::io::BufReader::new(child.stdout.take().unwrap()).lines();
    assert!(lines.by_ref().any(|line| line.unwrap().starts_with("epoch    1")));
    let filler = disk.fill();
    lines.for_each(drop);
    let result = child.wait_with_output().unwrap();
    let said = text(&result.stderr);
    assert_eq!(result.status.code(), Some(2), "{said}");
    assert!(said.contains("No space left") && said.contains("--continue goes on from"), "{said}");
    assert!(!signals::is_writing(&output));
    let newest = run::newest(&output).unwrap().unwrap();
    assert!(newest.damaged.is_empty() && newest.checkpoint.progress.epoch >= 1);
    fs::remove_file(filler).unwrap();
    let fresh = place.0.path().join("fresh");
    fs::create_dir(&fresh).unwrap();
    let expected = place.train(context, &fresh, SETTINGS.epochs);
    assert_eq!(place.train(context, &output, SETTINGS.epochs), expected);
}

#[test]
fn damage_is_seen_in_every_byte() {
    let (context, _guard) = device();
    let place = Place::new();
    let folder = place.0.path().join("out");
    fs::create_dir(&folder).unwrap();
    place.train(context, &folder, 1);
    let path = folder.join(run::LATEST);
    let whole = fs::read(&path).unwrap();
    Checkpoint::read(&path).unwrap();
    let header = 8 + u64::from_le_bytes(*whole.first_chunk().unwrap()) as usize;
    assert!(header < whole.len());
    let refused = |bytes: &[u8], what: &str| {
        fs::write(&path, bytes).unwrap();
        let error = Checkpoint::read(&path).expect_err(what);
        assert!(matches!(&error, Error::Network(NetworkError::Checkpoint { .. })), "{what}: {error}");
        assert!(error.to_string().contains(run::LATEST), "{error}");
    };
    // All of the header's beginning and every 37th byte of the rest.
    for at in (0..600.min(header)).chain((600..whole.len()).step_by(37)) {
        let mut bytes = whole.clone();
        bytes[at] ^= 1 << (at % 8);
        refused(&bytes, &format!("byte {at} of {}, header {header}", whole.len()));
    }
    for length in [0, 7, 8, 100, header, whole.len() - 1] {
        refused(&whole[..length], &format!("{length} bytes"));
    }
    refused(&[&whole[..], b"x"].concat(), "a byte more");
}

#[test]
fn a_damaged_checkpoint_is_passed_over_for_the_one_before() {
    let (context, _guard) = device();
    if is_slow() {
        return eprintln!("skipped: too slow a device to train on again and again");
    }
    let place = Place::new();
    let output = place.0.path().join("out");
    fs::create_dir(&output).unwrap();
    let fresh = place.0.path().join("fresh");
    fs::create_dir(&fresh).unwrap();
    let expected = place.train(context, &fresh, SETTINGS.epochs);
    // Stopped in the fifth epoch: the latest is of there, the one before of the fourth's end.
    place.train(context, &output, 5);
    let (latest, previous) = (output.join(run::LATEST), output.join(run::PREVIOUS));
    let epoch = |path: &Path| Checkpoint::read(path).unwrap().progress.epoch;
    assert_eq!((epoch(&latest), epoch(&previous)), (4, 4));
    assert_eq!(Checkpoint::place(&latest), Some((4, 2)));
    fs::remove_file(output.join(run::BEST)).unwrap();
    let bytes = fs::read(&latest).unwrap();
    fs::write(&latest, &bytes[..bytes.len() / 2]).unwrap();

    let newest = run::newest(&output).unwrap().unwrap();
    assert_eq!((newest.path, newest.damaged.len()), (previous.clone(), 1));
    // A damaged latest does not take the place of the one before.
    let broken = fs::read(&latest).unwrap();
    let copied = place.0.path().join("copied");
    copy_folder(&output, &copied);
    place.train(context, &copied, 5);
    assert_eq!(epoch(&copied.join(run::PREVIOUS)), 4);

    // The program says so.
    let said = success(place.command(&output, &["--continue"]).output().unwrap());
    assert!(said.contains("warning:") && said.contains(run::LATEST) && said.contains("passed over"), "{said}");
    assert!(said.contains("continuing from") && said.contains(run::PREVIOUS), "{said}");
    assert_eq!(bits(&Checkpoint::read(&output.join(run::FINAL)).unwrap(), context), expected);
    assert!(!latest.exists() && !previous.exists());

    // None is whole: all are named, and nothing is begun again over them.
    let ruined = place.0.path().join("ruined");
    fs::create_dir(&ruined).unwrap();
    [run::LATEST, run::BEST].iter().for_each(|name| fs::write(ruined.join(name), &broken).unwrap());
    let result = place.command(&ruined, &["--continue"]).output().unwrap();
    let said = text(&result.stderr);
    assert_eq!(result.status.code(), Some(2), "{said}");
    assert!([run::LATEST, run::BEST, "no checkpoint is whole"].iter().all(|word| said.contains(word)), "{said}");
    assert_eq!(fs::read_dir(&ruined).unwrap().count(), 2);
}

/// Nothing is written where nothing is to be written.
#[test]
fn without_checkpoints() {
    let (context, _guard) = device();
    let place = Place::new();
    let dataset = Dataset::open(&place.data()).unwrap();
    let plans = Plans::read(&place.data().join("nnUNetPlans.json")).unwrap();
    let model = Model::new(plans, "3d_fullres", dataset.json.clone()).unwrap();
    let split = splits::cases_of_fold(&[], Fold::All, &dataset.case_names()).unwrap();
    let prepared = place.data();
    let source = DataSource {
        dataset: &dataset,
        prepared: &prepared,
        fold: Fold::All,
        split: &split,
        compat: None,
        skip_unreadable: false,
    };
    let data = source.open(&model, |_| ()).unwrap();
    let output = place.0.path().join("out");
    fs::create_dir(&output).unwrap();
    let settings = Settings { epochs: 1, ..SETTINGS };
    for stopped in [false, true] {
        let mut trainer = Trainer::new(context, model.clone(), settings).unwrap();
        let observe = |_| if stopped { ControlFlow::Break(()) } else { ControlFlow::Continue(()) };
        let patches = [&data.training[..], &data.validation[..]];
        let ended =
            run::train(&mut trainer, &data.cases, &output, Saving::Never, patches, observe, |_| Ok(())).unwrap();
        assert_eq!(ended, if stopped { Ended::Stopped(None) } else { Ended::Finished(None) });
        assert_eq!(fs::read_dir(&output).unwrap().count(), 0);
    }
}
