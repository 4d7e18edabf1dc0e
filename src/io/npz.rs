//! numpy's `.npz`: a zip archive of arrays, each an entry `NAME.npy`. Arrays of four axes are read and written, which is
//! what nnU-Net keeps in such files: preprocessed cases, and probabilities.
//! <https://numpy.org/doc/stable/reference/generated/numpy.lib.format.html>

use super::atomic::write_aside;
use crate::error::{Error, FileError, Result};
use flate2::Compression;
use flate2::write::DeflateEncoder;
use half::f16;
use ndarray::{Array4, ArrayView4, Axis};
use rawzip::{CompressionMethod, RECOMMENDED_BUFFER_SIZE, ZipArchive, ZipArchiveWriter};
use std::fs::File;
use std::io::{BufWriter, Read, Write};
use std::path::Path;

/// Deflate cannot expand a byte to more than this many.
const DEFLATE_MAX_RATIO: u64 = 1032;
/// Bytes that an array's header may have; numpy's have 118.
const LONGEST_HEADER: usize = 1 << 16;
/// Bytes that are converted at a time: a multiple of every element's size.
const BLOCK: usize = 1 << 16;
/// numpy aligns the first element to this many bytes.
const ALIGNMENT: usize = 64;

/// Reads the array `name` of four axes, in f32 whatever its type: floats of 2, 4 or 8 bytes, integers of 1 or 2.
///
/// # Errors
/// [`FileError::Io`], and [`FileError::Npz`] if the archive is damaged or has no such array.
pub fn read_npz_array(path: &Path, name: &str) -> Result<Array4<f32>> {
    let bad =
        |problem: String| Error::File(FileError::Npz { path: path.into(), problem: format!("{name}.npy: {problem}") });
    let file = File::open(path).map_err(Error::io(path, "read"))?;
    let mut buffer = vec![0; RECOMMENDED_BUFFER_SIZE];
    let damaged = |error: rawzip::Error| bad(error.to_string());
    let archive = ZipArchive::from_file(file, &mut buffer).map_err(damaged)?;
    let mut listed = archive.entries(&mut buffer);
    let wanted = format!("{name}.npy");
    let entry = loop {
        let Some(entry) = listed.next_entry().map_err(damaged)? else {
            return Err(bad("it is not in the archive".into()));
        };
        if entry.file_path().as_bytes() == wanted.as_bytes() {
            break entry;
        }
    };
    let size = entry.uncompressed_size_hint();
    if size > entry.compressed_size_hint().saturating_mul(DEFLATE_MAX_RATIO) {
        return Err(bad("it promises more bytes than the archive can hold".into()));
    }
    let method = entry.compression_method();
    let found = archive.get_entry(entry.wayfinder()).map_err(damaged)?;
    let packed = found.reader();
    let unpacked: Box<dyn Read> = match method {
        CompressionMethod::STORE => Box::new(packed),
        CompressionMethod::DEFLATE => Box::new(flate2::read::DeflateDecoder::new(packed)),
        other => return Err(bad(format!("it is compressed by {other}, which numpy does not do"))),
    };
    let mut unpacked = found.verifying_reader(unpacked);
    let array = parse(&mut unpacked, size).map_err(bad)?;
    // At the end, length and checksum are compared with the archive's table.
    match unpacked.read(&mut [0]) {
        Ok(0) => Ok(array),
        Ok(_) => Err(bad("it is longer than its shape asks for".into())),
        Err(error) => Err(bad(error.to_string())),
    }
}

/// An array of four axes from its `size` bytes.
fn parse(source: &mut impl Read, size: u64) -> Result<Array4<f32>, String> {
    let (text, header) = read_header(source)?;
    let between = |key: &str, end: char| Some(text.split_once(key)?.1.split_once(end)?.0.to_owned());
    let axes = between("'shape': (", ')').ok_or("it is no numpy array")?;
    let axes: Vec<usize> = axes.split(',').filter_map(|n| n.trim().parse().ok()).collect();
    let mut shape: [usize; 4] =
        axes.as_slice().try_into().map_err(|_| format!("its shape is {axes:?}, expected four axes"))?;
    let (bytes, number): (usize, fn(&[u8]) -> f32) = match between("'descr': '", '\'').as_deref() {
        Some("<f2") => (2, |b| b.try_into().map_or(f32::NAN, |b| f16::from_le_bytes(b).to_f32())),
        Some("<f4") => (4, |b| b.try_into().map_or(f32::NAN, f32::from_le_bytes)),
        Some("<f8") => (8, |b| b.try_into().map_or(f32::NAN, |b| f64::from_le_bytes(b) as f32)),
        Some("<i2") => (2, |b| b.try_into().map_or(f32::NAN, |b| f32::from(i16::from_le_bytes(b)))),
        Some("|i1") => (1, |b| f32::from(b[0] as i8)),
        Some("|u1") => (1, |b| f32::from(b[0])),
        other => {
            let found = other.unwrap_or("something else");
            return Err(format!("its type is {found}, expected float16 to float64, int16, int8 or uint8"));
        }
    };
    let count = shape.iter().try_fold(1usize, |count, &n| count.checked_mul(n));
    let expected = count.and_then(|count| (count as u64).checked_mul(bytes as u64)?.checked_add(header));
    let (Some(count), true) = (count, expected == Some(size)) else {
        return Err(format!("its length of {size} bytes is not what its shape {shape:?} asks for"));
    };
    let is_fortran = match between("'fortran_order': ", ',').as_deref() {
        Some("False") => false,
        Some("True") => true,
        _ => return Err("it is no numpy array".into()),
    };
    let mut values = Vec::new();
    values.try_reserve_exact(count).map_err(|_| format!("there is no memory for its {count} elements"))?;
    let mut block = vec![0; BLOCK];
    while values.len() < count {
        let part = &mut block[..BLOCK.min((count - values.len()) * bytes)];
        source.read_exact(part).map_err(|error| format!("damaged or cut off: {error}"))?;
        values.extend(part.chunks_exact(bytes).map(number));
    }
    if is_fortran {
        shape.reverse();
    }
    let array = Array4::from_shape_vec(shape, values).map_err(|error| error.to_string())?;
    Ok(if is_fortran { array.reversed_axes().as_standard_layout().into_owned() } else { array })
}

/// The description of an array, and the bytes before its first element.
fn read_header(source: &mut impl Read) -> Result<(String, u64), String> {
    let mut take = |length: usize| {
        let mut bytes = vec![0; length];
        source.read_exact(&mut bytes).map(|()| bytes).map_err(|error| format!("it is no numpy array: {error}"))
    };
    let begin = take(8)?;
    let (field, length) = match &begin[..] {
        b"\x93NUMPY\x01\x00" => (2, take(2)?),
        b"\x93NUMPY\x02\x00" | b"\x93NUMPY\x03\x00" => (4, take(4)?),
        _ => return Err("it is no numpy array".into()),
    };
    let length = length.iter().rev().fold(0, |length, &byte| length << 8 | usize::from(byte));
    if length > LONGEST_HEADER {
        return Err(format!("its header has {length} bytes"));
    }
    Ok((String::from_utf8_lossy(&take(length)?).into_owned(), (8 + field + length) as u64))
}

/// Writes one array as float32, compressed, atomically. What is in its place is replaced.
///
/// # Errors
/// [`FileError::Io`], [`FileError::Npz`].
pub fn write_npz_array(path: &Path, name: &str, array: ArrayView4<f32>) -> Result<()> {
    let failed = |error: rawzip::Error| Error::File(FileError::Npz { path: path.into(), problem: error.to_string() });
    write_aside(path, "array", |place| {
        let written = || Error::io(path, "write");
        let mut archive = ZipArchiveWriter::new(BufWriter::new(File::create(place).map_err(written())?));
        let name = format!("{name}.npy");
        let entry = archive.new_file(name.as_str()).compression_method(CompressionMethod::DEFLATE);
        let (mut entry, config) = entry.start().map_err(failed)?;
        // Floats shrink little, however long one looks for repetitions.
        let mut data = config.wrap(DeflateEncoder::new(&mut entry, Compression::fast()));
        data.write_all(&header(array.dim())).map_err(written())?;
        let mut row = Vec::with_capacity(array.dim().3 * 4);
        for channel in array.axis_iter(Axis(0)) {
            for line in channel.rows() {
                row.clear();
                line.iter().for_each(|value| row.extend(value.to_le_bytes()));
                data.write_all(&row).map_err(written())?;
            }
        }
        let (encoder, descriptor) = data.finish().map_err(failed)?;
        encoder.finish().map_err(written())?;
        entry.finish(descriptor).map_err(failed)?;
        archive.finish().map_err(failed)?.flush().map_err(written())
    })
}

/// Everything before the first element of an array of f32.
fn header(shape: (usize, usize, usize, usize)) -> Vec<u8> {
    // A tuple is shown here as in Python.
    let mut text = format!("{{'descr': '<f4', 'fortran_order': False, 'shape': {shape:?}, }}").into_bytes();
    let begin = b"\x93NUMPY\x01\x00\x00\x00".len();
    // Ends with a line break, before which blanks align what follows.
    text.resize((begin + text.len() + 1).next_multiple_of(ALIGNMENT) - begin - 1, b' ');
    text.push(b'\n');
    let mut bytes = b"\x93NUMPY\x01\x00".to_vec();
    bytes.extend((text.len() as u16).to_le_bytes());
    bytes.extend(text);
    bytes
}
