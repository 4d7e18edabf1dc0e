//! Just enough of numpy's `.npz` to read reference arrays: a zip archive of `.npy` files.

use std::io::Read;
use std::path::Path;

use ndarray::ArrayD;

/// An array of the archive as f64, whatever its type.
pub fn read(path: &Path, name: &str) -> ArrayD<f64> {
    let bytes = std::fs::read(path).unwrap();
    npy(&member(&bytes, &format!("{name}.npy")))
}

/// Finds a file through the central directory at the archive's end and inflates it.
fn member(zip: &[u8], name: &str) -> Vec<u8> {
    let u16_at = |at: usize| usize::from(u16::from_le_bytes([zip[at], zip[at + 1]]));
    let u32_at = |at: usize| u32::from_le_bytes(zip[at..at + 4].try_into().unwrap()) as usize;
    let end = zip.windows(4).rposition(|w| w == b"PK\x05\x06").unwrap();
    let mut entry = u32_at(end + 16);
    for _ in 0..u16_at(end + 10) {
        let name_length = u16_at(entry + 28);
        if &zip[entry + 46..entry + 46 + name_length] == name.as_bytes() {
            let (method, size, local) = (u16_at(entry + 10), u32_at(entry + 20), u32_at(entry + 42));
            let start = local + 30 + u16_at(local + 26) + u16_at(local + 28);
            let stored = &zip[start..start + size];
            if method == 0 {
                return stored.to_vec();
            }
            let mut inflated = Vec::new();
            flate2::read::DeflateDecoder::new(stored).read_to_end(&mut inflated).unwrap();
            return inflated;
        }
        entry += 46 + name_length + u16_at(entry + 30) + u16_at(entry + 32);
    }
    panic!("no {name} in the archive");
}

fn npy(bytes: &[u8]) -> ArrayD<f64> {
    assert_eq!(&bytes[..7], b"\x93NUMPY\x01", "only version 1 of .npy");
    let data = 10 + usize::from(u16::from_le_bytes([bytes[8], bytes[9]]));
    let header = std::str::from_utf8(&bytes[10..data]).unwrap();
    assert!(header.contains("'fortran_order': False"));
    let after = |key: &str| header.split_once(key).unwrap().1;
    let shape: Vec<usize> =
        after("'shape': (").split_once(')').unwrap().0.split(',').filter_map(|n| n.trim().parse().ok()).collect();
    let kind = after("'descr': '").split_once('\'').unwrap().0;
    let body = &bytes[data..];
    let values = match kind {
        "<f4" => words(body, |b| f64::from(f32::from_le_bytes(b))),
        "<f8" => words(body, f64::from_le_bytes),
        "<i2" => words(body, |b| f64::from(i16::from_le_bytes(b))),
        "|i1" => words(body, |b: [u8; 1]| f64::from(b[0] as i8)),
        "|u1" => words(body, |b: [u8; 1]| f64::from(b[0])),
        other => panic!("array type {other}"),
    };
    ArrayD::from_shape_vec(shape, values).unwrap()
}

fn words<const N: usize>(bytes: &[u8], decode: impl Fn([u8; N]) -> f64) -> Vec<f64> {
    bytes.as_chunks::<N>().0.iter().map(|&word| decode(word)).collect()
}
