//! The bytes of a NIfTI file, plain or gzipped, to their very end.
//!
//! Two promises: memory never exceeds what both the header and the file's length can justify, and a damaged gzip stream
//! is noticed even when the damage lies behind the last voxel (a reader that stops there never sees the checksum).

use std::fs::File;
use std::io::{self, BufRead, BufReader, Read};
use std::path::Path;

use flate2::bufread::MultiGzDecoder;

use super::nifti_header::{HEADER_BYTES, Header};
use crate::error::{Error, FileError, Result};

/// Deflate cannot expand a byte to more than this many.
const DEFLATE_MAX_RATIO: u64 = 1032;
/// Bytes that may follow the voxels in a gzipped file before it is called corrupt.
const TRAILING_BYTES: u64 = 1 << 20;

/// Reads header and voxels. Whether the file is compressed is decided by its first bytes, not by its name.
pub(super) fn read(path: &Path) -> Result<(Header, Vec<u8>)> {
    let file = File::open(path).map_err(Error::io(path, "open"))?;
    let length = file.metadata().map_err(Error::io(path, "read"))?.len();
    let mut file = BufReader::with_capacity(1 << 16, file);
    let gzipped = file.fill_buf().map_err(Error::io(path, "read"))?.starts_with(&[0x1f, 0x8b]);
    if !gzipped {
        return read_volume(path, &mut file, length, |e| Error::io(path, "read")(e));
    }
    let damaged = |source| Error::File(FileError::Gzip { path: path.into(), source });
    let mut stream = MultiGzDecoder::new(file);
    let at_most = length.saturating_mul(DEFLATE_MAX_RATIO);
    let (header, voxels) = read_volume(path, &mut stream, at_most, damaged)?;
    let expected = header.first_voxel + header.voxel_bytes;
    let allowed = header.voxel_bytes.max(TRAILING_BYTES);
    let surplus = io::copy(&mut stream.take(allowed + 1), &mut io::sink()).map_err(damaged)?;
    if surplus > allowed {
        return Err(Error::File(FileError::NiftiTooLong {
            path: path.into(),
            expected,
            limit: expected.saturating_add(allowed),
        }));
    }
    Ok((header, voxels))
}

/// Reads the header only, and whether the file is compressed.
pub(super) fn read_header(path: &Path) -> Result<(Header, bool)> {
    let file = File::open(path).map_err(Error::io(path, "open"))?;
    let length = file.metadata().map_err(Error::io(path, "read"))?.len();
    let mut file = BufReader::new(file);
    let gzipped = file.fill_buf().map_err(Error::io(path, "read"))?.starts_with(&[0x1f, 0x8b]);
    let damaged = |source| Error::File(FileError::Gzip { path: path.into(), source });
    let (header, at_most) = match gzipped {
        false => (header(path, &mut file, |e| Error::io(path, "read")(e))?, length),
        true => (header(path, &mut MultiGzDecoder::new(file), damaged)?, length.saturating_mul(DEFLATE_MAX_RATIO)),
    };
    let expected = header.first_voxel + header.voxel_bytes;
    if expected > at_most {
        return Err(Error::File(FileError::NiftiTruncated { path: path.into(), expected, found: at_most }));
    }
    Ok((header, gzipped))
}

fn header(path: &Path, stream: &mut impl Read, failed: impl Fn(io::Error) -> Error) -> Result<Header> {
    let mut first = Vec::with_capacity(HEADER_BYTES);
    stream.by_ref().take(HEADER_BYTES as u64).read_to_end(&mut first).map_err(failed)?;
    let (expected, found) = (HEADER_BYTES as u64, first.len() as u64);
    match <&[u8; HEADER_BYTES]>::try_from(first.as_slice()) {
        Ok(bytes) => Header::parse(path, bytes),
        Err(_) => Err(Error::File(FileError::NiftiTruncated { path: path.into(), expected, found })),
    }
}

/// Reads up to the last voxel of a stream that cannot be longer than `at_most` bytes.
fn read_volume(
    path: &Path,
    stream: &mut impl Read,
    at_most: u64,
    failed: impl Fn(io::Error) -> Error,
) -> Result<(Header, Vec<u8>)> {
    let truncated =
        |expected: u64, found: u64| Error::File(FileError::NiftiTruncated { path: path.into(), expected, found });
    let header = header(path, stream, &failed)?;
    let end = header.first_voxel + header.voxel_bytes;
    if end > at_most {
        return Err(truncated(end, at_most));
    }
    let gap = header.first_voxel - HEADER_BYTES as u64;
    let skipped = io::copy(&mut stream.by_ref().take(gap), &mut io::sink()).map_err(&failed)?;
    // A gzipped file may promise a thousand times what it holds: grow with the data instead of trusting it.
    let mut voxels = Vec::with_capacity(header.voxel_bytes.min(1 << 26) as usize);
    stream.by_ref().take(header.voxel_bytes).read_to_end(&mut voxels).map_err(&failed)?;
    if (voxels.len() as u64) < header.voxel_bytes {
        let found = HEADER_BYTES as u64 + skipped + voxels.len() as u64;
        return Err(truncated(end, found));
    }
    Ok((header, voxels))
}
