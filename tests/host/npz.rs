//! numpy's archives of arrays, as numpy writes them and as it reads them.

use crate::common::{data, npz, pickles};
use ndarray::{Array4, Ix4};
use std::fs;
use std::io::Read;
use std::path::Path;
use voxgrad::Error;
use voxgrad::error::FileError;
use voxgrad::io::{read_npz_array, write_npz_array};

/// An archive of one stored array, whose header and elements are given.
fn archive(path: &Path, name: &str, header: &str, elements: &[u8]) {
    let length = (header.len() as u16).to_le_bytes();
    pickles::zip(path, &[(name, &[b"\x93NUMPY\x01\x00", &length[..], header.as_bytes(), elements].concat())]);
}

fn header(kind: &str, fortran: &str, shape: &str) -> String {
    format!("{{'descr': '{kind}', 'fortran_order': {fortran}, 'shape': {shape}, }}\n")
}

fn problem(path: &Path) -> String {
    match read_npz_array(path, "probabilities") {
        Err(Error::File(FileError::Npz { path: named, problem })) => {
            assert_eq!(named, path);
            problem
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn what_nnunet_wrote_is_read() {
    for name in ["brats_regions", "brats_labels_anisotropic"] {
        let path = data(name).join("predictions/case_010.npz");
        let expected = npz::read(&path, "probabilities").into_dimensionality::<Ix4>().unwrap();
        assert_eq!(read_npz_array(&path, "probabilities").unwrap().mapv(f64::from), expected);
        assert!(problem_of(&path, "softmax").contains("softmax.npy: it is not in the archive"));
    }
}

fn problem_of(path: &Path, name: &str) -> String {
    read_npz_array(path, name).unwrap_err().to_string()
}

#[test]
fn what_is_written_is_read_by_others() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("case.npz");
    // Not in standard layout: axes of a transposed image.
    let array = Array4::from_shape_fn((2, 3, 4, 5), |(c, z, y, x)| (c * 1000 + z * 100 + y * 10 + x) as f32 / 7.0);
    let array = array.permuted_axes([0, 3, 1, 2]);
    write_npz_array(&path, "probabilities", array.view()).unwrap();
    let found = npz::read(&path, "probabilities").into_dimensionality::<Ix4>().unwrap();
    assert_eq!(found, array.mapv(f64::from));
    assert_eq!(read_npz_array(&path, "probabilities").unwrap(), array);
    // The first element lies where numpy puts it.
    let bytes = fs::read(&path).unwrap();
    let start = 30 + usize::from(u16::from_le_bytes([bytes[26], bytes[27]])) + usize::from(bytes[28]);
    let mut inflated = Vec::new();
    flate2::read::DeflateDecoder::new(&bytes[start..]).read_to_end(&mut inflated).unwrap();
    let header = 10 + usize::from(u16::from_le_bytes([inflated[8], inflated[9]]));
    assert!(header.is_multiple_of(64) && inflated[header - 1] == b'\n', "{header}");
    assert_eq!(inflated.len(), header + 4 * 120);
    // What is there is replaced, and nothing is left beside it.
    write_npz_array(&path, "probabilities", Array4::zeros((1, 1, 1, 1)).view()).unwrap();
    assert_eq!(read_npz_array(&path, "probabilities").unwrap().len(), 1);
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
}

#[test]
fn elements_of_every_kind_and_order() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("case.npz");
    let expected = Array4::from_shape_vec((1, 2, 1, 2), vec![0.0, 1.0, 2.0, 3.0]).unwrap();
    let halves: Vec<u8> = (0..4).flat_map(|n| half::f16::from_f32(n as f32).to_le_bytes()).collect();
    let singles: Vec<u8> = (0..4).flat_map(|n| (n as f32).to_le_bytes()).collect();
    let doubles: Vec<u8> = (0..4).flat_map(|n| f64::from(n).to_le_bytes()).collect();
    let shorts: Vec<u8> = (0..4).flat_map(|n| (n as i16).to_le_bytes()).collect();
    let kinds: [(&str, &[u8]); 6] = [
        ("<f2", &halves),
        ("<f4", &singles),
        ("<f8", &doubles),
        ("<i2", &shorts),
        ("|u1", &[0, 1, 2, 3]),
        ("|i1", &[0, 1, 2, 3]),
    ];
    for (kind, elements) in kinds {
        archive(&path, "probabilities.npy", &header(kind, "False", "(1, 2, 1, 2)"), elements);
        assert_eq!(read_npz_array(&path, "probabilities").unwrap(), expected, "{kind}");
    }
    // The first axis runs fastest: numpy keeps the order of a transposed array of one region.
    archive(&path, "probabilities.npy", &header("|u1", "True", "(1, 2, 1, 2)"), &[0, 2, 1, 3]);
    assert_eq!(read_npz_array(&path, "probabilities").unwrap(), expected);
}

#[test]
fn other_archives_are_refused_by_name() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("case.npz");
    let bytes = [0; 16];
    let cases: [(String, &[u8], &str); 6] = [
        (header("<f4", "False", "(1, 2, 2)"), &bytes, "expected four axes"),
        (header("<f4", "False", "(1, 2, 2, 2)"), &bytes, "not what its shape"),
        (header("<f4", "False", "(9999999999, 9999999999, 9, 9)"), &bytes, "not what its shape"),
        (header("<f4", "False", "(1, 1, 1, 1)"), &bytes, "not what its shape"),
        (header("<c8", "False", "(1, 1, 1, 2)"), &bytes, "its type is <c8"),
        ("nothing".into(), &bytes, "no numpy array"),
    ];
    for (header, elements, word) in cases {
        archive(&path, "probabilities.npy", &header, elements);
        let problem = problem(&path);
        assert!(problem.contains(word), "{word}: {problem}");
    }
    // Bytes that stand nowhere else in the archive.
    let bytes = [7; 16];
    archive(&path, "probabilities.npy", &header("<f4", "False", "(1, 2, 1, 2)"), &bytes);
    let whole = fs::read(&path).unwrap();
    for cut in [0, 20, whole.len() / 2, whole.len() - 30] {
        fs::write(&path, &whole[..cut]).unwrap();
        problem(&path);
    }
    // An element: the checksum tells.
    let mut changed = whole.clone();
    let element = changed.windows(16).position(|part| part == bytes).unwrap();
    changed[element] = 1;
    fs::write(&path, &changed).unwrap();
    problem(&path);
    let missing = folder.path().join("missing.npz");
    assert!(matches!(read_npz_array(&missing, "a"), Err(Error::File(FileError::Io { .. }))));
}
