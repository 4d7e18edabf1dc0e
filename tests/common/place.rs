//! nnU-Net's three folders, and the program run in them.

use super::phantom;
use serde_json::Value;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Output, Stdio};
use std::time::Duration;

/// nnU-Net's three folders in a temporary place.
pub struct Place(tempfile::TempDir);

impl Place {
    pub fn new() -> Self {
        let place = Place(tempfile::tempdir().unwrap());
        for name in ["raw", "preprocessed", "results"] {
            fs::create_dir(place.path(name)).unwrap();
        }
        place
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// A dataset of spheres, with plans where preprocessing looks for them.
    pub fn with_spheres(name: &str, cases: usize) -> Self {
        let place = Place::new();
        let folder = place.path("raw").join(name);
        fs::create_dir(&folder).unwrap();
        phantom::write(&folder, cases);
        let preprocessed = place.path("preprocessed").join(name);
        fs::create_dir(&preprocessed).unwrap();
        fs::rename(folder.join("nnUNetPlans.json"), preprocessed.join("nnUNetPlans.json")).unwrap();
        place
    }

    pub fn run(&self, arguments: &[&str]) -> Output {
        Command::new(env!("CARGO_BIN_EXE_voxgrad"))
            .args(arguments)
            .env("nnUNet_raw", self.path("raw"))
            .env("nnUNet_preprocessed", self.path("preprocessed"))
            .env("nnUNet_results", self.path("results"))
            .output()
            .unwrap()
    }

    pub fn succeeds(&self, arguments: &[&str]) -> String {
        let result = self.run(arguments);
        assert!(result.status.success(), "{arguments:?}: {}", text(&result.stderr));
        text(&result.stdout) + &text(&result.stderr)
    }

    /// Runs, expects a refusal that mentions all of `words`, and returns what was said.
    pub fn refuses(&self, arguments: &[&str], words: &[&str]) -> String {
        let result = self.run(arguments);
        let said = text(&result.stderr);
        assert_eq!(result.status.code(), Some(2), "{arguments:?}: {said}");
        for word in words {
            assert!(said.contains(word), "no `{word}` in: {said}");
        }
        assert!(!said.contains("panicked"), "{said}");
        said
    }
}

/// Runs a program, and returns how it ended and the most bytes of memory that it had. Linux only.
pub fn peak_memory(command: &mut Command) -> (ExitStatus, u64) {
    let mut child = command.stdout(Stdio::null()).spawn().unwrap();
    let status = format!("/proc/{}/status", child.id());
    // The peak only grows: the last value before the end counts.
    let mut peak = 0;
    loop {
        let text = fs::read_to_string(&status).unwrap_or_default();
        let line = text.lines().find_map(|line| line.strip_prefix("VmHWM:"));
        peak = line.and_then(|line| line.trim().strip_suffix(" kB")?.parse::<u64>().ok()).unwrap_or(peak);
        if let Some(exit) = child.try_wait().unwrap() {
            return (exit, peak << 10);
        }
        std::thread::sleep(Duration::from_millis(2));
    }
}

pub fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

pub fn copy_folder(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let target = to.join(entry.file_name());
        if entry.path().is_dir() {
            copy_folder(&entry.path(), &target);
        } else {
            fs::copy(entry.path(), target).unwrap();
        }
    }
}

pub fn json(path: &Path) -> Value {
    serde_json::from_str(&fs::read_to_string(path).unwrap()).unwrap()
}

/// Equal structure and texts; numbers equal as numbers, within a relative tolerance.
pub fn assert_same(found: &Value, expected: &Value, tolerance: f64, at: &str) {
    match (found, expected) {
        (Value::Number(a), Value::Number(b)) => {
            let (a, b) = (a.as_f64().unwrap(), b.as_f64().unwrap());
            assert!((a - b).abs() <= tolerance * b.abs(), "{at}: {a} is not {b}");
        }
        (Value::Array(a), Value::Array(b)) => {
            assert_eq!(a.len(), b.len(), "{at}");
            for (i, (a, b)) in a.iter().zip(b).enumerate() {
                assert_same(a, b, tolerance, &format!("{at}[{i}]"));
            }
        }
        (Value::Object(a), Value::Object(b)) => {
            let keys = |map: &serde_json::Map<String, Value>| -> Vec<String> { map.keys().cloned().collect() };
            assert_eq!(keys(a), keys(b), "{at}");
            for (key, value) in a {
                assert_same(value, &b[key], tolerance, &format!("{at}.{key}"));
            }
        }
        _ => assert_eq!(found, expected, "{at}"),
    }
}
