//! Files that appear under their name when they are complete, and what is left of those that never were.

use std::fs::{self, File};
use voxgrad::io::{remove_leftovers, write_atomically};

#[test]
fn a_file_is_replaced_and_nothing_else_stays() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("summary.json");
    for content in ["first", "second"] {
        write_atomically(&path, content.as_bytes()).unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), content);
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }
    // A folder in the place of the file.
    let occupied = dir.path().join("occupied");
    fs::create_dir(&occupied).unwrap();
    let error = write_atomically(&occupied, b"x").unwrap_err().to_string();
    assert!(error.contains("occupied"), "{error}");
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 2);
}

#[test]
fn leftovers_of_the_dead_are_removed() {
    let dir = tempfile::tempdir().unwrap();
    let folder = |name: &str| {
        let folder = dir.path().join(name);
        fs::create_dir(&folder).unwrap();
        fs::write(folder.join("volume.nii.gz"), "cut").unwrap();
        folder
    };
    let (dead, living) = (folder(".voxgrad-1-0.partial"), folder(".voxgrad-1-1.partial"));
    let foreign = [folder("voxgrad-1-0.partial"), folder(".voxgrad-1-0"), folder(".other-1-0.partial")];
    let lock = File::open(&living).unwrap();
    lock.lock().unwrap();
    assert_eq!(remove_leftovers(dir.path()).unwrap(), 1);
    assert!(!dead.exists() && living.exists() && foreign.iter().all(|folder| folder.exists()));
    drop(lock);
    assert_eq!(remove_leftovers(dir.path()).unwrap(), 1);
    assert!(!living.exists());
    assert_eq!(remove_leftovers(&dir.path().join("missing")).unwrap(), 0);
}

/// Whatever command writes there next, its first file takes the leftovers along.
#[test]
fn the_first_write_to_a_folder_removes_leftovers() {
    let dir = tempfile::tempdir().unwrap();
    fs::create_dir(dir.path().join(".voxgrad-1-0.partial")).unwrap();
    write_atomically(&dir.path().join("plans.json"), b"{}").unwrap();
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
}

/// While one thread looks for leftovers, others write: no file may get lost.
#[test]
fn what_is_being_written_is_no_leftover() {
    let dir = tempfile::tempdir().unwrap();
    let done = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !done.load(std::sync::atomic::Ordering::Relaxed) {
                remove_leftovers(dir.path()).unwrap();
            }
        });
        for file in 0..100 {
            write_atomically(&dir.path().join(format!("{file}.txt")), b"content").unwrap();
        }
        done.store(true, std::sync::atomic::Ordering::Relaxed);
    });
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 100);
}
