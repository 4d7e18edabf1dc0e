//! The rooms of both packages: in `src` a room imports only from those below it, and no files of `src` or `kernels` import
//! each other in a circle.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

/// Rooms of `src`, those that may see the most first. What stands on one line knows nothing of each other.
const ORDER: &[&[&str]] = &[
    &["cli"],
    &["annotate", "benchmark", "simulate"],
    &["exchange"],
    &["train"],
    &["tune"],
    &["predict"],
    &["augment", "infer", "eval", "report"],
    &["sample"],
    &["patch", "plan", "import", "history"],
    &["sparsify"],
    &["preprocess", "loss"],
    &["nn"],
    &["optim", "ops"],
    &["tape"],
    &["normalised", "fusion"],
    &["parameters"],
    &["tensor"],
    &["dataset"],
    &["io", "numpy_random", "compat", "parallel"],
    &["error"],
    &["device", "compilation"],
];

/// What a file imports by `crate::` or `super::`, as paths of module names from the root of its package.
fn imports(text: &str, module: &[String]) -> BTreeSet<Vec<String>> {
    let mut found = BTreeSet::new();
    // Comments and doc links are no imports.
    let code: String = text.lines().map(|line| line.split("//").next().unwrap_or("")).collect::<Vec<_>>().join(" ");
    for (start, above) in [("crate::", None), ("super::super::", Some(2)), ("super::", Some(1))] {
        for (place, _) in code.match_indices(start) {
            let before = code[..place].chars().next_back().unwrap_or(' ');
            if before.is_alphanumeric() || before == '_' || before == ':' || before == '$' {
                continue;
            }
            let base = match above {
                None => Vec::new(),
                Some(levels) if levels <= module.len() => module[..module.len() - levels].to_vec(),
                Some(_) => continue,
            };
            expand(&code[place + start.len()..], base, &mut found);
        }
    }
    found
}

/// `a::{b, c::d}` as `a::b` and `a::c::d`.
fn expand(text: &str, base: Vec<String>, found: &mut BTreeSet<Vec<String>>) {
    let text = text.trim_start();
    if let Some(inside) = text.strip_prefix('{') {
        let (mut depth, mut start) = (0, 0);
        for (place, letter) in inside.char_indices() {
            match letter {
                '{' => depth += 1,
                '}' if depth > 0 => depth -= 1,
                ',' | '}' if depth == 0 => {
                    expand(&inside[start..place], base.clone(), found);
                    start = place + 1;
                    if letter == '}' {
                        return;
                    }
                }
                _ => {}
            }
        }
        return;
    }
    let end = text.find(|c: char| !(c.is_alphanumeric() || c == '_')).unwrap_or(text.len());
    if end == 0 {
        return;
    }
    let mut path = base;
    path.push(text[..end].into());
    match text[end..].strip_prefix("::") {
        Some(rest) if rest.starts_with(|c: char| c.is_alphanumeric() || c == '_' || c == '{') => {
            expand(rest, path, found);
        }
        _ => {
            found.insert(path);
        }
    }
}

/// Files of a package by their modules: `conv3d/run.rs` is `conv3d::run`, `conv3d/mod.rs` is `conv3d`.
fn files(root: &Path) -> BTreeMap<Vec<String>, PathBuf> {
    let (mut found, mut folders) = (BTreeMap::new(), vec![root.to_path_buf()]);
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()) {
            if entry.is_dir() {
                folders.push(entry);
            } else if entry.extension().is_some_and(|ending| ending == "rs") {
                let inside = entry.strip_prefix(root).unwrap().with_extension("");
                let mut module: Vec<String> = inside.iter().map(|part| part.to_string_lossy().into_owned()).collect();
                if module.last().is_some_and(|name| name == "mod") {
                    module.pop();
                }
                found.insert(module, entry);
            }
        }
    }
    found
}

/// The file that a path names something in: its longest beginning that is a module, or where the face of a folder (or of the
/// package) has the name from.
fn file_of(path: &[String], files: &BTreeMap<Vec<String>, PathBuf>, faces: &Faces) -> Option<Vec<String>> {
    let mut path = path.to_vec();
    // A face may hand on what another face hands on.
    for _ in 0..8 {
        let module = (0..=path.len())
            .rev()
            .map(|len| path[..len].to_vec())
            .find(|module| files.contains_key(module) || module.is_empty())?;
        let Some(name) = path.get(module.len()) else { return Some(module) };
        match faces.get(&module).and_then(|names| names.get(name)) {
            Some(origin) if *origin != path => path = origin.clone(),
            _ => return (!module.is_empty()).then_some(module),
        }
    }
    None
}

/// For each `mod.rs`, and `lib.rs` as the empty path: the names that it hands on, with where they are from.
type Faces = BTreeMap<Vec<String>, BTreeMap<String, Vec<String>>>;

fn faces(files: &BTreeMap<Vec<String>, PathBuf>) -> Faces {
    let mut faces = Faces::new();
    for (module, path) in files.iter().filter(|(_, path)| is_face(path)) {
        let module = if path.ends_with("lib.rs") { Vec::new() } else { module.clone() };
        let names = handed_on(&std::fs::read_to_string(path).unwrap(), &module);
        faces.insert(module, names);
    }
    faces
}

fn is_face(path: &Path) -> bool {
    path.ends_with("mod.rs") || path.ends_with("lib.rs")
}

/// What the `use` lines of a face name, by the name that it has there.
fn handed_on(text: &str, module: &[String]) -> BTreeMap<String, Vec<String>> {
    let code: String = text.lines().map(|line| line.split("//").next().unwrap_or("")).collect::<Vec<_>>().join(" ");
    let mut names = BTreeMap::new();
    for statement in code.split(';') {
        let Some(start) =
            statement.rfind("use ").filter(|&start| !statement[..start].contains('(') || statement.contains("pub("))
        else {
            continue;
        };
        let (path, base) = match statement[start + 4..].trim() {
            path if path.starts_with("crate::") => (&path["crate::".len()..], Vec::new()),
            path => (path.strip_prefix("self::").unwrap_or(path), module.to_vec()),
        };
        let mut found = BTreeSet::new();
        expand(path, base, &mut found);
        names.extend(found.into_iter().filter_map(|path| Some((path.last()?.clone(), path))));
    }
    names
}

fn root(package: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(package)
}

#[test]
fn rooms_import_from_those_below_them() {
    let rank = |room: &str| ORDER.iter().position(|rooms| rooms.contains(&room));
    let mut wrong = Vec::new();
    for (module, path) in files(&root("src")) {
        let Some(room) = module.first().filter(|room| !["lib", "main"].contains(&room.as_str())) else { continue };
        let own = rank(room).unwrap_or_else(|| panic!("room {room} has no place in the order of this test"));
        for import in imports(&std::fs::read_to_string(&path).unwrap(), &module) {
            let other = &import[0];
            // What is defined in lib.rs, the kernels among it, stands below everything.
            let Some(below) = rank(other) else { continue };
            if other != room && below <= own {
                wrong.push(format!("{} imports {}", path.display(), import.join("::")));
            }
        }
    }
    assert!(wrong.is_empty(), "upwards:\n{}", wrong.join("\n"));
}

#[test]
fn no_files_import_each_other_in_a_circle() {
    for package in ["src", "kernels/src"] {
        let files = files(&root(package));
        let faces = faces(&files);
        let arrows: BTreeMap<Vec<String>, BTreeSet<Vec<String>>> = files
            .iter()
            // The faces of folders hand names on: whoever names one means where it is from.
            .filter(|(module, path)| !is_face(path) && module[0] != "main")
            .map(|(module, path)| {
                let found = imports(&std::fs::read_to_string(path).unwrap(), module);
                let to = found.iter().filter_map(|import| file_of(import, &files, &faces));
                (module.clone(), to.filter(|to| to != module && !is_face(&files[to])).collect())
            })
            .collect();
        let mut left: BTreeSet<&Vec<String>> = arrows.keys().collect();
        // Whoever imports nothing that is left goes; a circle stays.
        loop {
            let gone: Vec<&Vec<String>> =
                left.iter().filter(|module| arrows[**module].iter().all(|to| !left.contains(to))).copied().collect();
            if gone.is_empty() {
                break;
            }
            left.retain(|module| !gone.contains(module));
        }
        let names: Vec<String> = left
            .iter()
            .map(|module| {
                let to: Vec<String> =
                    arrows[*module].iter().filter(|to| left.contains(to)).map(|to| to.join("::")).collect();
                format!("{} -> {}", module.join("::"), to.join(", "))
            })
            .collect();
        assert!(names.is_empty(), "{package}: a circle among, or above,\n{}", names.join("\n"));
    }
}

#[test]
fn the_faces_of_folders_hold_no_code() {
    let mut wrong = Vec::new();
    for package in ["src", "kernels/src"] {
        for path in files(&root(package)).into_values().filter(|path| path.ends_with("mod.rs")) {
            let text = std::fs::read_to_string(&path).unwrap();
            let code = |line: &&str| {
                let line = line.trim_start_matches("pub(crate) ").trim_start_matches("pub ");
                ["fn ", "struct ", "enum ", "impl", "trait ", "const ", "static ", "#[cube"]
                    .iter()
                    .any(|word| line.starts_with(word))
            };
            wrong.extend(text.lines().filter(code).map(|line| format!("{}: {line}", path.display())));
        }
    }
    assert!(wrong.is_empty(), "code in mod.rs:\n{}", wrong.join("\n"));
}

/// Buffers, numbers and structs of them; what a kernel is compiled for is not counted.
#[test]
fn kernels_take_no_more_than_twelve_arguments() {
    let mut seen = 0;
    for path in files(&root("kernels/src")).values() {
        let text = std::fs::read_to_string(path).unwrap();
        for kernel in text.split("#[cube(launch").skip(1) {
            let head = kernel.split("{\n").next().unwrap();
            let count = head.lines().filter(|line| line.starts_with("    ") && !line.contains("#[")).count();
            let name = head.split("fn ").nth(1).and_then(|rest| rest.split(['<', '(']).next()).unwrap();
            assert!(count <= 12, "{name} in {}: {count} arguments", path.display());
            seen += count;
        }
    }
    assert!(seen > 300, "{seen} arguments are seen");
}

#[test]
fn imports_are_found() {
    let text = "use crate::{Buffer, conv3d::{self, run::forward as f}};\nuse super::plan::Plan; // crate::not\nlet x = crate::io::read(1);";
    let module = ["loss", "pass"].map(String::from);
    let found: Vec<String> = imports(text, &module).iter().map(|path| path.join("::")).collect();
    assert_eq!(found, ["Buffer", "conv3d::run::forward", "conv3d::self", "io::read", "loss::plan::Plan"]);
}
