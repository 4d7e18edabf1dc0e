//! nnU-Net's older preprocessed cases: `<case>.npz`, a zip archive of the numpy arrays `data` and `seg`.
//!
//! The pickle beside it is not read: class locations are sampled anew, which gives what nnU-Net 2.8 would store, and
//! the way back to the raw grid, which training does not need, is that of an uncropped volume.

use std::fs;
use std::io::Read;
use std::path::Path;

use ndarray::{Array4, ArrayView3, Axis};

use super::{ClassLocations, PreprocessedCase, Properties};
use crate::dataset::LabelManager;
use crate::error::{Error, PreprocessError, Result};
use crate::io::Geometry;

/// Deflate cannot expand a byte to more than this many.
const DEFLATE_MAX_RATIO: u64 = 1032;

/// Reads a case that was preprocessed to `spacing` (transposed axes).
///
/// # Errors
/// [`FileError::Io`](crate::error::FileError::Io), or [`PreprocessError::StoredCase`] for a damaged archive or arrays of other types or shapes.
pub fn read_npz(path: &Path, labels: &LabelManager, spacing: [f64; 3]) -> Result<PreprocessedCase> {
    let bad =
        |problem: &str| Error::Preprocess(PreprocessError::StoredCase { path: path.into(), problem: problem.into() });
    let bytes = fs::read(path).map_err(Error::io(path, "read"))?;
    let array = |name: &str| -> Result<Array4<f32>> {
        let npy = member(&bytes, name).map_err(|problem| bad(&format!("{name}: {problem}")))?;
        parse(&npy).map_err(|problem| bad(&format!("{name}: {problem}")))
    };
    let (data, seg) = (array("data.npy")?, array("seg.npy")?);
    let name = path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
    from_arrays(path, name, data, seg, labels, spacing)
}

/// The case of nnU-Net's arrays: image `(c, z, y, x)`, labels `(1, z, y, x)`.
pub(super) fn from_arrays(
    path: &Path,
    name: String,
    data: Array4<f32>,
    seg: Array4<f32>,
    labels: &LabelManager,
    spacing: [f64; 3],
) -> Result<PreprocessedCase> {
    let bad =
        |problem: &str| Error::Preprocess(PreprocessError::StoredCase { path: path.into(), problem: problem.into() });
    let (channels, depth, height, width) = data.dim();
    if channels == 0 || seg.dim() != (1, depth, height, width) {
        return Err(bad("`data` and `seg` differ in shape"));
    }
    let shape = [depth, height, width];
    let seg: ArrayView3<f32> = seg.index_axis(Axis(0), 0);
    if seg.iter().any(|v| v.fract() != 0.0 || v.abs() > 32767.0) {
        return Err(bad("`seg` holds something that is not a label"));
    }
    let seg = seg.mapv(|label| label as i16);
    Ok(PreprocessedCase {
        name,
        class_locations: ClassLocations::sample(seg.view(), labels),
        data,
        seg,
        properties: Properties {
            spacing,
            shape_before_cropping: shape,
            bbox: shape.map(|n| [0, n]),
            shape_after_cropping: shape,
        },
        geometry: Geometry::new(spacing),
    })
}

fn word(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_le_bytes(bytes.get(at..at.checked_add(4)?)?.try_into().ok()?))
}

fn short(bytes: &[u8], at: usize) -> Option<usize> {
    Some(usize::from(u16::from_le_bytes(bytes.get(at..at.checked_add(2)?)?.try_into().ok()?)))
}

/// What the central directory says about a file.
struct Entry {
    method: usize,
    crc: u32,
    stored: usize,
    length: u32,
    header: usize,
}

/// Finds an entry through the central directory at the archive's end.
fn entry(zip: &[u8], name: &str) -> Option<Entry> {
    let end = zip.windows(4).rposition(|w| w == b"PK\x05\x06")?;
    let mut at = word(zip, end + 16)? as usize;
    for _ in 0..short(zip, end + 10)? {
        let name_length = short(zip, at + 28)?;
        if zip.get(at + 46..at + 46 + name_length)? == name.as_bytes() {
            return Some(Entry {
                method: short(zip, at + 10)?,
                crc: word(zip, at + 16)?,
                stored: word(zip, at + 20)? as usize,
                length: word(zip, at + 24)?,
                header: word(zip, at + 42)? as usize,
            });
        }
        at += 46 + name_length + short(zip, at + 30)? + short(zip, at + 32)?;
    }
    None
}

/// Unpacks a file of the archive and checks its checksum.
fn member(zip: &[u8], name: &str) -> Result<Vec<u8>, &'static str> {
    let entry = entry(zip, name).ok_or("not in the archive, or the archive is damaged")?;
    let lengths = short(zip, entry.header + 26).zip(short(zip, entry.header + 28)).ok_or("the archive is damaged")?;
    let start = entry.header + 30 + lengths.0 + lengths.1;
    let stored = zip.get(start..start + entry.stored).ok_or("the archive is truncated")?;
    let length = u64::from(entry.length);
    if length > (stored.len() as u64).saturating_mul(DEFLATE_MAX_RATIO) {
        return Err("it promises more bytes than the archive can hold");
    }
    let mut bytes = Vec::new();
    let read = match entry.method {
        0 => stored.take(length).read_to_end(&mut bytes),
        8 => flate2::read::DeflateDecoder::new(stored).take(length).read_to_end(&mut bytes),
        _ => return Err("compressed in another way than numpy does"),
    };
    if read.is_err() || bytes.len() as u64 != length || crc32fast::hash(&bytes) != entry.crc {
        return Err("damaged: length or checksum are wrong");
    }
    Ok(bytes)
}

/// A C-ordered array of four axes.
fn parse(npy: &[u8]) -> Result<Array4<f32>, &'static str> {
    let damaged = "not a numpy array";
    let start = match npy.get(..8) {
        Some(b"\x93NUMPY\x01\x00") => 10 + short(npy, 8).ok_or(damaged)?,
        Some(b"\x93NUMPY\x02\x00") => 12usize.saturating_add(word(npy, 8).ok_or(damaged)? as usize),
        _ => return Err(damaged),
    };
    let header = npy.get(..start).and_then(|bytes| bytes.get(10..)).ok_or(damaged)?;
    let header = String::from_utf8_lossy(header);
    let between = |key: &str, end: char| Some(header.split_once(key)?.1.split_once(end)?.0.to_owned());
    if !header.contains("'fortran_order': False") {
        return Err("stored in Fortran order");
    }
    let axes = between("'shape': (", ')').ok_or(damaged)?;
    let axes: Vec<usize> = axes.split(',').filter_map(|n| n.trim().parse().ok()).collect();
    let shape: [usize; 4] = axes.try_into().map_err(|_| "expected four axes")?;
    let body = &npy[start..];
    let values: Vec<f32> = match between("'descr': '", '\'').as_deref() {
        Some("<f4") => body.as_chunks().0.iter().map(|&b| f32::from_le_bytes(b)).collect(),
        Some("<i2") => body.as_chunks().0.iter().map(|&b| f32::from(i16::from_le_bytes(b))).collect(),
        Some("|i1") => body.iter().map(|&b| f32::from(b as i8)).collect(),
        _ => return Err("expected float32, int16 or int8"),
    };
    Array4::from_shape_vec(shape, values).map_err(|_| "its length is not what its shape asks for")
}
