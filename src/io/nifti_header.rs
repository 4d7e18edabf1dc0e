//! Validation of a NIfTI-1 header before a single voxel is read.
//!
//! The `nifti` crate parses fields but trusts them: it reads RGB or complex data into a panic, ignores `vox_offset` and
//! accepts any `sizeof_hdr`. So the raw bytes are judged here first, and the crate only names the fields.

use std::path::Path;

use nifti::NiftiHeader;

use crate::error::{Error, FileError, Result};

/// Bytes of a NIfTI-1 header.
pub(super) const HEADER_BYTES: usize = 348;
/// First voxel of a single file without extensions: the header and four extension flag bytes.
const FIRST_VOXEL: u64 = 352;
/// Spacings outside this range (in mm) are a broken header, not a microscope or a planet.
const PLAUSIBLE_SPACING: std::ops::RangeInclusive<f64> = 1e-5..=1e5;

/// The scalar types NIfTI-1 knows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Scalar {
    U8,
    I8,
    I16,
    U16,
    I32,
    U32,
    I64,
    U64,
    F32,
    F64,
}

impl Scalar {
    fn from_code(code: i16) -> Option<Self> {
        Some(match code {
            2 => Scalar::U8,
            4 => Scalar::I16,
            8 => Scalar::I32,
            16 => Scalar::F32,
            64 => Scalar::F64,
            256 => Scalar::I8,
            512 => Scalar::U16,
            768 => Scalar::U32,
            1024 => Scalar::I64,
            1280 => Scalar::U64,
            _ => return None,
        })
    }

    pub(super) fn bytes(self) -> usize {
        match self {
            Scalar::U8 | Scalar::I8 => 1,
            Scalar::I16 | Scalar::U16 => 2,
            Scalar::I32 | Scalar::U32 | Scalar::F32 => 4,
            Scalar::I64 | Scalar::U64 | Scalar::F64 => 8,
        }
    }
}

/// A header whose every used field has been checked.
#[derive(Debug, Clone)]
pub(super) struct Header {
    /// Axes of the file, x first; at least three entries, higher axes of length 1 removed.
    pub axes: Vec<usize>,
    pub scalar: Scalar,
    pub big_endian: bool,
    /// Byte of the first voxel.
    pub first_voxel: u64,
    /// Bytes of all voxels; `first_voxel + voxel_bytes` does not overflow.
    pub voxel_bytes: u64,
    /// Stored value times slope plus intercept is the voxel's value.
    pub slope: f64,
    pub intercept: f64,
    /// Millimetres along (z, y, x).
    pub spacing: [f64; 3],
    pub fields: NiftiHeader,
}

impl Header {
    /// Judges the first 348 bytes of a (decompressed) file.
    pub(super) fn parse(path: &Path, bytes: &[u8; HEADER_BYTES]) -> Result<Self> {
        let big_endian = byte_order(path, bytes)?;
        check_magic(path, bytes)?;
        let mut fields = NiftiHeader::from_reader(&bytes[..])
            .map_err(|error| Error::File(FileError::NotNifti { path: path.into(), problem: error.to_string() }))?;
        fields.endianness = nifti::Endianness::Little; // what we write back

        let short = |offset: usize| {
            let pair = [bytes[offset], bytes[offset + 1]];
            if big_endian { i16::from_be_bytes(pair) } else { i16::from_le_bytes(pair) }
        };
        let axes = axes(path, std::array::from_fn(|i| short(40 + 2 * i)))?;
        let (datatype, bitpix) = (short(70), short(72));
        let scalar = Scalar::from_code(datatype)
            .ok_or_else(|| Error::File(FileError::NiftiDatatype { path: path.into(), datatype }))?;
        if usize::try_from(bitpix).ok() != Some(8 * scalar.bytes()) {
            return Err(invalid(path, "bitpix", bitpix, "it must match datatype"));
        }

        let first_voxel = first_voxel(path, fields.vox_offset)?;
        let voxel_bytes = axes
            .iter()
            .try_fold(scalar.bytes() as u64, |product, &n| product.checked_mul(n as u64))
            .filter(|bytes| bytes.checked_add(first_voxel).is_some())
            .ok_or_else(|| invalid(path, "dim", format!("{axes:?}"), "no file can hold that many voxels"))?;

        let (slope, intercept) = scaling(fields.scl_slope, fields.scl_inter);
        let spacing = spacing(path, &fields, axes[2])?;
        right_angles(path, &fields)?;
        Ok(Header { axes, scalar, big_endian, first_voxel, voxel_bytes, slope, intercept, spacing, fields })
    }

    /// Voxels along (z, y, x), of one channel.
    pub(super) fn shape(&self) -> [usize; 3] {
        [self.axes[2], self.axes[1], self.axes[0]]
    }

    /// Number of 3-D volumes in the file.
    pub(super) fn channels(&self) -> usize {
        self.axes[3..].iter().product()
    }
}

/// The byte order is the one in which the header's own size reads 348.
fn byte_order(path: &Path, bytes: &[u8; HEADER_BYTES]) -> Result<bool> {
    let size = [bytes[0], bytes[1], bytes[2], bytes[3]];
    let (little, big) = (i32::from_le_bytes(size), i32::from_be_bytes(size));
    match (little, big) {
        (348, _) => Ok(false),
        (_, 348) => Ok(true),
        (540, _) | (_, 540) => {
            Err(Error::File(FileError::NotNifti { path: path.into(), problem: "it is a NIfTI-2 file".into() }))
        }
        _ => Err(Error::File(FileError::NotNifti {
            path: path.into(),
            problem: format!("sizeof_hdr is {little}, not 348"),
        })),
    }
}

fn check_magic(path: &Path, bytes: &[u8; HEADER_BYTES]) -> Result<()> {
    let problem = match &bytes[344..348] {
        b"n+1\0" => return Ok(()),
        b"ni1\0" => "magic says that header and voxels are two files (.hdr and .img)".into(),
        [0, 0, 0, 0] => "no magic, as in an Analyze 7.5 file".into(),
        other => format!("magic is {:?}", String::from_utf8_lossy(other)),
    };
    Err(Error::File(FileError::NotNifti { path: path.into(), problem }))
}

/// Axes in use, x first, padded to three; axes beyond `dim[0]` may hold junk and are not looked at.
fn axes(path: &Path, dim: [i16; 8]) -> Result<Vec<usize>> {
    let count = usize::try_from(dim[0])
        .ok()
        .filter(|n| (1..=7).contains(n))
        .ok_or_else(|| invalid(path, "dim[0]", dim[0], "it must be 1 to 7"))?;
    let mut axes = Vec::with_capacity(7);
    for &length in &dim[1..=count] {
        match usize::try_from(length) {
            Ok(n) if n > 0 => axes.push(n),
            _ => return Err(invalid(path, "dim", length, "axes must be positive")),
        }
    }
    while axes.len() > 3 && axes.last() == Some(&1) {
        axes.pop();
    }
    axes.resize(axes.len().max(3), 1);
    Ok(axes)
}

fn first_voxel(path: &Path, vox_offset: f32) -> Result<u64> {
    // 0 in a single file cannot be meant; some writers leave it and put the voxels where they belong.
    if vox_offset == 0.0 {
        return Ok(FIRST_VOXEL);
    }
    if vox_offset.is_finite() && vox_offset.fract() == 0.0 && vox_offset >= FIRST_VOXEL as f32 {
        // Saturates far beyond any file; the length check that follows then rejects it.
        return Ok((vox_offset as u64).min(u64::MAX / 2));
    }
    Err(invalid(path, "vox_offset", vox_offset, "it must be a whole number from 352"))
}

/// Slope 0 means "not scaled" by the standard; readers treat non-finite values the same way.
fn scaling(slope: f32, intercept: f32) -> (f64, f64) {
    if slope == 0.0 || !slope.is_finite() {
        return (1.0, 0.0);
    }
    let intercept = if intercept.is_finite() { intercept } else { 0.0 };
    (f64::from(slope), f64::from(intercept))
}

/// Cosine of the angle between two axes of an sform above which voxels are no boxes: rounding stays far below.
const SHEAR_TOLERANCE: f64 = 1e-3;

/// The pair of axes of the sform, x y z, that is furthest from a right angle, and the angle in degrees; `None` if all are
/// right. An axis of no length stands at no angle to any other (0 degrees).
pub(super) fn shear(fields: &NiftiHeader) -> Option<(&'static str, f64)> {
    let rows = [fields.srow_x, fields.srow_y, fields.srow_z];
    let column = |axis: usize| rows.map(|row| f64::from(row[axis]));
    let product = |a: [f64; 3], b: [f64; 3]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
    let pairs = [("x and y", 0, 1), ("x and z", 0, 2), ("y and z", 1, 2)];
    let cosines = pairs.map(|(axes, a, b)| {
        let (a, b) = (column(a), column(b));
        let cosine = product(a, b) / (product(a, a) * product(b, b)).sqrt();
        (axes, if cosine.is_finite() { cosine.clamp(-1.0, 1.0) } else { 1.0 })
    });
    let (axes, cosine) =
        cosines.into_iter().fold(cosines[0], |worst, pair| if pair.1.abs() > worst.1.abs() { pair } else { worst });
    (cosine.abs() > SHEAR_TOLERANCE).then(|| (axes, cosine.acos().to_degrees()))
}

/// A sheared sform is refused unless a qform says where the grid lies: a rotation, which cannot shear.
fn right_angles(path: &Path, fields: &NiftiHeader) -> Result<()> {
    if fields.sform_code <= 0 || fields.qform_code > 0 {
        return Ok(());
    }
    match shear(fields) {
        Some((axes, angle)) => Err(Error::File(FileError::NiftiShear { path: path.into(), axes, angle })),
        None => Ok(()),
    }
}

/// Millimetres in the header's unit of length; files that name none mean millimetres.
pub(super) fn millimetres(fields: &NiftiHeader) -> f64 {
    match fields.xyzt_units & 7 {
        1 => 1e3,
        3 => 1e-3,
        _ => 1.0,
    }
}

fn spacing(path: &Path, fields: &NiftiHeader, depth: usize) -> Result<[f64; 3]> {
    let mut spacing = [3, 2, 1].map(|i| f64::from(fields.pixdim[i]).abs() * millimetres(fields));
    if fields.dim[0] == 2 && depth == 1 {
        // nnU-Net's convention for a flat image: the slice axis is never the one to be resampled.
        spacing[0] = 999.0 * spacing[1].max(spacing[2]);
    }
    for (axis, &value) in spacing.iter().enumerate() {
        if !PLAUSIBLE_SPACING.contains(&value) {
            return Err(invalid(
                path,
                ["pixdim[3]", "pixdim[2]", "pixdim[1]"][axis],
                value,
                "the voxel spacing in mm must be positive, finite and plausible",
            ));
        }
    }
    Ok(spacing)
}

fn invalid(path: &Path, field: &'static str, value: impl ToString, expected: &'static str) -> Error {
    Error::File(FileError::NiftiHeader { path: path.into(), field, value: value.to_string(), expected })
}
