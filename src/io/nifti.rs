//! NIfTI volumes as arrays.
//!
//! NIfTI stores x fastest, so the file's bytes read in order are a C-ordered (z, y, x) array: no transposition anywhere.

use std::fs;
use std::path::Path;

use ndarray::{Array3, ArrayView3};
use nifti::DataElement;
use nifti::writer::WriterOptions;

use super::Geometry;
use super::atomic::write_aside;
use super::nifti_header::{Header, Scalar};
use super::nifti_stream;
use crate::error::{Error, FileError, Result, ValueSummary};

/// How far a label stored as a float may lie from an integer.
const LABEL_TOLERANCE: f64 = 1e-3;

/// A scalar volume.
#[derive(Debug, Clone, PartialEq)]
pub struct Image {
    /// Values in (z, y, x) order, scaled by the header's slope and intercept.
    pub data: Array3<f32>,
    /// Where the grid lies.
    pub geometry: Geometry,
}

/// A volume of label values.
#[derive(Debug, Clone, PartialEq)]
pub struct LabelMap {
    /// Labels in (z, y, x) order.
    pub data: Array3<i16>,
    /// Where the grid lies.
    pub geometry: Geometry,
}

/// Types in which a label map can be written.
pub trait LabelVoxel: DataElement + bytemuck::Pod {}
impl LabelVoxel for u8 {}
impl LabelVoxel for u16 {}
impl LabelVoxel for i8 {}
impl LabelVoxel for i16 {}
impl LabelVoxel for i32 {}
impl LabelVoxel for u32 {}
impl LabelVoxel for i64 {}
impl LabelVoxel for u64 {}
impl LabelVoxel for f32 {}
impl LabelVoxel for f64 {}

/// What a file's header says about its volume, before any voxel is read.
#[derive(Debug, Clone, PartialEq)]
pub struct Overview {
    /// Voxels along (z, y, x).
    pub shape: [usize; 3],
    /// Where the grid lies.
    pub geometry: Geometry,
    /// What is contradictory but stops nothing, each with the file's name.
    pub warnings: Vec<String>,
}

/// Reads the header of a 3-D volume and nothing else.
///
/// # Errors
/// As [`read_image`], as far as a header shows it.
pub fn read_overview(path: &Path) -> Result<Overview> {
    let (header, gzipped) = nifti_stream::read_header(path)?;
    if header.channels() != 1 {
        return Err(not_three_dimensional(path, &header.axes));
    }
    let shape = header.shape();
    let geometry = Geometry::from_header(header.spacing, header.fields);
    let mut warnings = geometry.contradictions(shape);
    match (path.extension().is_some_and(|ending| ending == "gz"), gzipped) {
        (true, false) => warnings.push("not compressed, although its name ends in .gz".into()),
        (false, true) => warnings.push("compressed, although its name does not end in .gz".into()),
        _ => {}
    }
    let warnings = warnings.into_iter().map(|warning| format!("{}: {warning}", path.display())).collect();
    Ok(Overview { shape, geometry, warnings })
}

/// Reads a 3-D image; trailing axes of length 1 are dropped.
///
/// Non-finite voxels are passed on: whether they matter is decided where the case is known.
///
/// # Errors
/// [`FileError::NotThreeDimensional`] for several volumes in one file; the `Nifti*`, [`FileError::NotNifti`] and
/// [`FileError::Gzip`] variants for files that are not what they claim.
pub fn read_image(path: &Path) -> Result<Image> {
    let (header, bytes) = nifti_stream::read(path)?;
    if header.channels() != 1 {
        return Err(not_three_dimensional(path, &header.axes));
    }
    image(path, &header, &bytes)
}

/// Reads a file of one or more volumes, such as the 4-D images of the Medical Segmentation Decathlon, as one image per
/// channel.
///
/// # Errors
/// As [`read_image`], without the limit to one volume.
pub fn read_channels(path: &Path) -> Result<Vec<Image>> {
    let (header, bytes) = nifti_stream::read(path)?;
    bytes.chunks_exact(bytes.len() / header.channels()).map(|bytes| image(path, &header, bytes)).collect()
}

fn image(path: &Path, header: &Header, bytes: &[u8]) -> Result<Image> {
    let data = match header.scalar {
        // The usual types without the detour through a call for every voxel.
        Scalar::U8 => scaled(header, bytes.iter().map(|&v| f64::from(v))),
        Scalar::I16 if !header.big_endian => {
            scaled(header, bytes.as_chunks().0.iter().map(|&b| f64::from(i16::from_le_bytes(b))))
        }
        Scalar::F32 if !header.big_endian => {
            scaled(header, bytes.as_chunks().0.iter().map(|&b| f64::from(f32::from_le_bytes(b))))
        }
        _ => values(header, bytes).map(|v| v as f32).collect(),
    };
    Ok(Image {
        data: array(path, header.shape(), data)?,
        geometry: Geometry::from_header(header.spacing, header.fields.clone()),
    })
}

/// Reads a 3-D label map of any scalar type; floats count as labels when they are integers to within a thousandth.
///
/// # Errors
/// [`FileError::LabelNotInteger`] for other values; otherwise as [`read_image`].
pub fn read_labels(path: &Path) -> Result<LabelMap> {
    let (header, bytes) = nifti_stream::read(path)?;
    if header.channels() != 1 {
        return Err(not_three_dimensional(path, &header.axes));
    }
    let shape = header.shape();
    if let Some(data) = unscaled_labels(&header, &bytes) {
        let geometry = Geometry::from_header(header.spacing, header.fields);
        return Ok(LabelMap { data: array(path, shape, data)?, geometry });
    }
    let mut data = Vec::with_capacity(shape.iter().product());
    let mut wrong: Option<(usize, f64, usize)> = None;
    for (index, value) in values(&header, &bytes).enumerate() {
        let label = value.round();
        let integral = (value - label).abs() <= LABEL_TOLERANCE;
        let in_range = (f64::from(i16::MIN)..=f64::from(i16::MAX)).contains(&label);
        if !(integral && in_range) {
            wrong.get_or_insert((index, value, 0)).2 += 1;
        } else if wrong.is_none() {
            data.push(label as i16);
        }
    }
    if let Some((index, value, voxels)) = wrong {
        return Err(Error::File(FileError::LabelNotInteger {
            path: path.into(),
            value,
            voxel: [index / (shape[1] * shape[2]), index / shape[2] % shape[1], index % shape[2]],
            voxels,
            values: ValueSummary::of(values(&header, &bytes)),
        }));
    }
    Ok(LabelMap { data: array(path, shape, data)?, geometry: Geometry::from_header(header.spacing, header.fields) })
}

/// Labels in the types that label maps usually have, without the detour through a call for every voxel; `None` where
/// values are scaled, or might be no labels.
fn unscaled_labels(header: &Header, bytes: &[u8]) -> Option<Vec<i16>> {
    if (header.slope, header.intercept) != (1.0, 0.0) {
        return None;
    }
    let words = || bytes.as_chunks::<2>().0.iter();
    match header.scalar {
        Scalar::U8 => Some(bytes.iter().map(|&label| label.into()).collect()),
        Scalar::I8 => Some(bytes.iter().map(|&label| (label as i8).into()).collect()),
        Scalar::I16 if !header.big_endian => Some(words().map(|&word| i16::from_le_bytes(word)).collect()),
        Scalar::U16 if !header.big_endian && words().all(|&word| u16::from_le_bytes(word) <= i16::MAX as u16) => {
            Some(words().map(|&word| i16::from_le_bytes(word)).collect())
        }
        _ => None,
    }
}

/// Writes a label map onto the grid of `geometry`, gzipped if the name ends in `.gz`.
///
/// The file appears under its name only when it is complete: it is written elsewhere in the folder first and renamed.
///
/// # Errors
/// [`FileError::Io`] or [`FileError::NiftiWrite`]; the target is then as it was before.
pub fn write_labels<T: LabelVoxel>(path: &Path, labels: ArrayView3<T>, geometry: &Geometry) -> Result<()> {
    let gzipped = path.extension().is_some_and(|ending| ending == "gz");
    // A name without further dots: the writer cuts names at their last dots.
    let name = if gzipped { "volume.nii.gz" } else { "volume.nii" };
    write_aside(path, name, |file| write_volume(path, file, labels, geometry, gzipped))
}

/// Writes an image of 32-bit floats onto the grid of `geometry`, as [`write_labels`] does.
///
/// # Errors
/// As [`write_labels`].
pub fn write_image(path: &Path, image: ArrayView3<f32>, geometry: &Geometry) -> Result<()> {
    write_labels(path, image, geometry)
}

/// Writes a label map in the voxel type of the file that `geometry` was read from, where that type holds all labels; else
/// in nnU-Net's, of one byte below 255 and of two from there on.
///
/// # Errors
/// As [`write_labels`]; [`FileError::NiftiWrite`] for negative labels that no type of label maps holds.
pub fn write_labels_as_stored(path: &Path, labels: ArrayView3<i16>, geometry: &Geometry) -> Result<()> {
    let (lowest, highest) = labels.iter().fold((0, 0), |(low, high), &label| (label.min(low), label.max(high)));
    let in_byte = lowest >= 0 && highest <= 255;
    match geometry.header().datatype {
        2 if in_byte => write_labels(path, labels.mapv(|l| l as u8).view(), geometry),
        4 => write_labels(path, labels, geometry),
        8 => write_labels(path, labels.mapv(i32::from).view(), geometry),
        16 => write_labels(path, labels.mapv(f32::from).view(), geometry),
        64 => write_labels(path, labels.mapv(f64::from).view(), geometry),
        256 if lowest >= -128 && highest <= 127 => write_labels(path, labels.mapv(|l| l as i8).view(), geometry),
        512 if lowest >= 0 => write_labels(path, labels.mapv(|l| l as u16).view(), geometry),
        768 if lowest >= 0 => write_labels(path, labels.mapv(|l| l as u32).view(), geometry),
        1024 => write_labels(path, labels.mapv(i64::from).view(), geometry),
        1280 if lowest >= 0 => write_labels(path, labels.mapv(|l| l as u64).view(), geometry),
        _ if lowest >= 0 && highest < 255 => write_labels(path, labels.mapv(|l| l as u8).view(), geometry),
        _ if lowest >= 0 => write_labels(path, labels.mapv(|l| l as u16).view(), geometry),
        _ => Err(Error::File(FileError::NiftiWrite {
            path: path.into(),
            problem: format!("label {lowest} is negative"),
        })),
    }
}

/// Writes a predicted label map in nnU-Net's voxel type: one byte below 255, two from there on.
///
/// # Errors
/// As [`write_labels`].
pub fn write_segmentation(path: &Path, labels: ArrayView3<u16>, geometry: &Geometry) -> Result<()> {
    match labels.iter().all(|&label| label < 255) {
        true => write_labels(path, labels.mapv(|label| label as u8).view(), geometry),
        false => write_labels(path, labels, geometry),
    }
}

/// Writes the content of `path` to `file`.
fn write_volume<T: LabelVoxel>(
    path: &Path,
    file: &Path,
    labels: ArrayView3<T>,
    geometry: &Geometry,
    gzipped: bool,
) -> Result<()> {
    let failed = |problem: String| Error::File(FileError::NiftiWrite { path: path.into(), problem });
    if labels.shape().iter().any(|&n| n == 0 || n > i16::MAX as usize) {
        return Err(failed(format!("NIfTI-1 axes hold 1 to {} voxels, the volume has {:?}", i16::MAX, labels.shape())));
    }
    WriterOptions::new(file)
        .reference_header(geometry.header())
        .write_nifti(&labels.reversed_axes())
        .map_err(|error| failed(error.to_string()))?;
    // The writer lets a failing flush of an uncompressed file pass (a full disk, say); its length tells.
    if !gzipped {
        let expected = 352 + (labels.len() * size_of::<T>()) as u64;
        let found = fs::metadata(file).map_err(Error::io(path, "read"))?.len();
        if found != expected {
            return Err(failed(format!("only {found} of {expected} bytes were written")));
        }
    }
    Ok(())
}

fn scaled(header: &Header, stored: impl Iterator<Item = f64>) -> Vec<f32> {
    let (slope, intercept) = (header.slope, header.intercept);
    match (slope, intercept) == (1.0, 0.0) {
        true => stored.map(|v| v as f32).collect(),
        false => stored.map(|v| (v * slope + intercept) as f32).collect(),
    }
}

/// Scaled values of all voxels in file order.
fn values<'a>(header: &Header, bytes: &'a [u8]) -> Box<dyn Iterator<Item = f64> + 'a> {
    let big = header.big_endian;
    let stored: Box<dyn Iterator<Item = f64> + 'a> = match header.scalar {
        Scalar::U8 => Box::new(bytes.iter().map(|&v| f64::from(v))),
        Scalar::I8 => Box::new(bytes.iter().map(|&v| f64::from(v as i8))),
        Scalar::I16 => words(bytes, big, |b| f64::from(i16::from_le_bytes(b))),
        Scalar::U16 => words(bytes, big, |b| f64::from(u16::from_le_bytes(b))),
        Scalar::I32 => words(bytes, big, |b| f64::from(i32::from_le_bytes(b))),
        Scalar::U32 => words(bytes, big, |b| f64::from(u32::from_le_bytes(b))),
        Scalar::I64 => words(bytes, big, |b| i64::from_le_bytes(b) as f64),
        Scalar::U64 => words(bytes, big, |b| u64::from_le_bytes(b) as f64),
        Scalar::F32 => words(bytes, big, |b| f64::from(f32::from_le_bytes(b))),
        Scalar::F64 => words(bytes, big, f64::from_le_bytes),
    };
    let (slope, intercept) = (header.slope, header.intercept);
    if (slope, intercept) == (1.0, 0.0) {
        return stored;
    }
    Box::new(stored.map(move |v| v * slope + intercept))
}

fn words<'a, const N: usize>(
    bytes: &'a [u8],
    big_endian: bool,
    decode: impl Fn([u8; N]) -> f64 + 'a,
) -> Box<dyn Iterator<Item = f64> + 'a> {
    let (words, _) = bytes.as_chunks::<N>();
    Box::new(words.iter().map(move |&word| {
        let mut word = word;
        if big_endian {
            word.reverse();
        }
        decode(word)
    }))
}

fn array<T>(path: &Path, shape: [usize; 3], data: Vec<T>) -> Result<Array3<T>> {
    let (expected, found) = (shape.iter().product::<usize>(), data.len());
    Array3::from_shape_vec(shape, data).map_err(|_| {
        Error::File(FileError::NiftiTruncated { path: path.into(), expected: expected as u64, found: found as u64 })
    })
}

fn not_three_dimensional(path: &Path, axes: &[usize]) -> Error {
    Error::File(FileError::NotThreeDimensional { path: path.into(), shape: axes.to_vec() })
}
