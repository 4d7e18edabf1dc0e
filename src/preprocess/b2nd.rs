//! nnU-Net's preprocessed cases: `<case>.b2nd` and `<case>_seg.b2nd`, arrays in contiguous frames of Blosc2.
//!
//! Read from the format's public description (frame version 2, chunk version 5, the `b2nd` metalayer): a frame is a header,
//! compressed chunks, and a chunk with their offsets. A chunk is a part of the array, padded to whole blocks; a block is
//! compressed on its own, as one stream or one per byte of the values, after its bytes were regrouped (shuffled).
//!
//! The pickle beside the arrays is not read, as with [`read_npz`](super::read_npz).

use std::fs;
use std::io::Read;
use std::path::Path;

use ndarray::{Array4, ArrayView4, Axis, Slice};

use super::PreprocessedCase;
use super::npz::from_arrays;
use crate::dataset::LabelManager;
use crate::error::{Error, PreprocessError, Result};

/// An image that is compressed to less than this share is none: nothing larger is allocated for a file.
const HIGHEST_RATIO: u64 = 4096;
/// A chunk is padded to whole blocks, along each axis to less than twice its extent.
const HIGHEST_PADDING: u64 = 16;
const CHUNK_HEADER: usize = 32;
const AXES: usize = 4;

type Parsed<T> = Result<T, &'static str>;

const DAMAGED: &str = "the frame is damaged or truncated";

/// Reads a case that was preprocessed to `spacing` (transposed axes); `path` is the image, the labels lie beside it.
///
/// # Errors
/// [`FileError::Io`](crate::error::FileError::Io), or [`PreprocessError::StoredCase`] for damaged frames and for filters or compressors that nnU-Net does not use.
pub fn read_b2nd(path: &Path, labels: &LabelManager, spacing: [f64; 3]) -> Result<PreprocessedCase> {
    let name = path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
    let seg_path = path.with_file_name(format!("{name}_seg.b2nd"));
    let image = read(path, None)?;
    let (_, depth, height, width) = image.dim();
    let seg = read(&seg_path, Some([1, depth, height, width]))?;
    from_arrays(path, name, image, seg, labels, spacing)
}

/// Reads an array; one whose shape is known already may be compressed to nothing.
fn read(path: &Path, shape: Option<[usize; AXES]>) -> Result<Array4<f32>> {
    let bytes = fs::read(path).map_err(Error::io(path, "read"))?;
    let allowed = match shape {
        Some(shape) => bytes_of(&shape).saturating_mul(HIGHEST_PADDING),
        None => (bytes.len() as u64).saturating_mul(HIGHEST_RATIO),
    };
    let array = Frame::parse(&bytes, shape, allowed).and_then(|frame| frame.array());
    array.map_err(|problem| {
        Error::Preprocess(PreprocessError::StoredCase { path: path.into(), problem: problem.into() })
    })
}

/// Bytes of so many values as f32.
fn bytes_of(extent: &[usize; AXES]) -> u64 {
    extent.iter().fold(4u64, |n, &m| n.saturating_mul(m as u64))
}

/// What a frame says about its array, and its chunks.
struct Frame<'a> {
    shape: [usize; AXES],
    chunk: [usize; AXES],
    block: [usize; AXES],
    decode: Decode,
    /// Everything from the first chunk on.
    data: &'a [u8],
    offsets: Vec<i64>,
}

/// Types of values.
#[derive(Clone, Copy)]
enum Decode {
    F32,
    I16,
    I8,
}

impl Decode {
    fn bytes(self) -> usize {
        match self {
            Decode::F32 => 4,
            Decode::I16 => 2,
            Decode::I8 => 1,
        }
    }

    fn values(self, bytes: &[u8]) -> Vec<f32> {
        match self {
            Decode::F32 => bytes.as_chunks().0.iter().map(|&b| f32::from_le_bytes(b)).collect(),
            Decode::I16 => bytes.as_chunks().0.iter().map(|&b| f32::from(i16::from_le_bytes(b))).collect(),
            Decode::I8 => bytes.iter().map(|&b| f32::from(b as i8)).collect(),
        }
    }
}

impl<'a> Frame<'a> {
    /// Reads what comes before the chunks. Nothing is allocated before the frame's extent, which must be `expected` where
    /// that is known, is found to take no more than `allowed` bytes.
    fn parse(bytes: &'a [u8], expected: Option<[usize; AXES]>, allowed: u64) -> Parsed<Self> {
        if bytes.get(2..10) != Some(b"b2frame\0") {
            return Err("not a Blosc2 frame");
        }
        if bytes.get(26) != Some(&0) {
            return Err("a sparse Blosc2 frame, whose chunks lie in other files");
        }
        let header_length = big::<4>(bytes, 11)?;
        let compressed = big::<8>(bytes, 39)?;
        let (shape, chunk, block, decode) = layout(metalayer(bytes.get(..header_length).ok_or(DAMAGED)?)?)?;
        let mut frame = Frame { shape, chunk, block, decode, data: &bytes[header_length..], offsets: Vec::new() };
        if expected.is_some_and(|expected| expected != shape) {
            return Err("image and labels differ in shape");
        }
        if bytes_of(&shape).max(bytes_of(&frame.padded())) > allowed {
            return Err("it promises more values than the file can hold");
        }
        let count = frame.grid().iter().try_fold(1usize, |n, &m| n.checked_mul(m)).ok_or(DAMAGED)?;
        let index = frame.data.get(compressed..).ok_or(DAMAGED)?;
        let length = count.checked_mul(8).filter(|&n| n / LZ_MAX_RATIO <= index.len()).ok_or(DAMAGED)?;
        frame.offsets = unpack(index, length)?.as_chunks().0.iter().map(|&b| i64::from_le_bytes(b)).collect();
        Ok(frame)
    }

    fn grid(&self) -> [usize; AXES] {
        std::array::from_fn(|axis| self.shape[axis].div_ceil(self.chunk[axis]))
    }

    /// A chunk's extent in whole blocks.
    fn padded(&self) -> [usize; AXES] {
        std::array::from_fn(|axis| self.chunk[axis].next_multiple_of(self.block[axis]))
    }

    fn array(&self) -> Parsed<Array4<f32>> {
        let mut array = Array4::zeros(self.shape);
        let length = self.padded().iter().try_fold(self.decode.bytes(), |n, &m| n.checked_mul(m)).ok_or(DAMAGED)?;
        for (place, &offset) in places(self.grid(), self.chunk).zip(&self.offsets) {
            let values = if offset < 0 {
                self.decode.values(&special((offset >> 56) as u8 & 7, &[], length)?)
            } else {
                let chunk = usize::try_from(offset).ok().and_then(|at| self.data.get(at..)).ok_or(DAMAGED)?;
                self.decode.values(&unpack(chunk, length)?)
            };
            self.scatter(&mut array, place, &values)?;
        }
        Ok(array)
    }

    /// Puts the blocks of a chunk where they belong; what is padding falls away.
    fn scatter(&self, array: &mut Array4<f32>, place: [usize; AXES], values: &[f32]) -> Parsed<()> {
        let blocks = std::array::from_fn(|axis| self.chunk[axis].div_ceil(self.block[axis]));
        let voxels = self.block.iter().product();
        for (start, block) in places(blocks, self.block).zip(values.chunks_exact(voxels)) {
            let mut from = ArrayView4::from_shape(self.block, block).map_err(|_| DAMAGED)?;
            let mut to = array.view_mut();
            for axis in 0..AXES {
                // A block may hang over its chunk, and both over the array.
                let first = (place[axis] + start[axis]).min(self.shape[axis]);
                let end = (place[axis] + self.chunk[axis]).min(self.shape[axis]).min(first + self.block[axis]);
                let count = end.saturating_sub(first);
                to.slice_axis_inplace(Axis(axis), Slice::from(first..first + count));
                from.slice_axis_inplace(Axis(axis), Slice::from(0..count));
            }
            to.assign(&from);
        }
        Ok(())
    }
}

/// First voxels of the cells of a grid in C order.
fn places(grid: [usize; AXES], cell: [usize; AXES]) -> impl Iterator<Item = [usize; AXES]> {
    (0..grid.iter().product()).map(move |mut index: usize| {
        let mut place = [0; AXES];
        for axis in (0..AXES).rev() {
            place[axis] = index % grid[axis] * cell[axis];
            index /= grid[axis];
        }
        place
    })
}

/// A big-endian integer of the frame's header.
fn big<const N: usize>(bytes: &[u8], at: usize) -> Parsed<usize> {
    let bytes = at.checked_add(N).and_then(|end| bytes.get(at..end)).ok_or(DAMAGED)?;
    let value = bytes.iter().fold(0u64, |value, &byte| value << 8 | u64::from(byte));
    usize::try_from(value).map_err(|_| DAMAGED)
}

/// The metalayer `b2nd` of a frame's header: names with the places of their contents, then the contents.
fn metalayer(header: &[u8]) -> Parsed<&[u8]> {
    let count = big::<2>(header, 92)?;
    let mut at = 94;
    for _ in 0..count {
        let length = usize::from(header.get(at).ok_or(DAMAGED)? & 0x1f);
        let name = header.get(at + 1..at + 1 + length).ok_or(DAMAGED)?;
        let content = big::<4>(header, at + length + 2)?;
        if name == b"b2nd" {
            let length = big::<4>(header, content.checked_add(1).ok_or(DAMAGED)?)?;
            return header.get(content + 5..).and_then(|rest| rest.get(..length)).ok_or(DAMAGED);
        }
        at += length + 6;
    }
    Err("a Blosc2 frame without an array in it")
}

type Layout = ([usize; AXES], [usize; AXES], [usize; AXES], Decode);

/// Shape, chunk, block and type: a msgpack array of version, axes, three lists, and the type as numpy writes it.
fn layout(meta: &[u8]) -> Parsed<Layout> {
    if meta.get(2) != Some(&(AXES as u8)) {
        return Err("expected four axes");
    }
    let list = |start: usize, width: usize| -> Parsed<[usize; AXES]> {
        let mut values = [0; AXES];
        for (axis, value) in values.iter_mut().enumerate() {
            let at = start + 1 + axis * (width + 1) + 1;
            *value = if width == 8 { big::<8>(meta, at)? } else { big::<4>(meta, at)? };
            if *value == 0 || *value > i32::MAX as usize {
                return Err("an axis has no or too many voxels");
            }
        }
        Ok(values)
    };
    let (wide, narrow) = (1 + AXES * 9, 1 + AXES * 5);
    let shape = list(3, 8)?;
    let chunk = list(3 + wide, 4)?;
    let block = list(3 + wide + narrow, 4)?;
    let after = 3 + wide + 2 * narrow;
    let decode = match meta.get(after + 6..) {
        Some(b"<f4") => Decode::F32,
        Some(b"<i2") => Decode::I16,
        Some(b"|i1") => Decode::I8,
        _ => return Err("expected float32, int16 or int8"),
    };
    Ok((shape, chunk, block, decode))
}

/// No compressor of a chunk expands a byte to more than this many, long runs aside, which it marks as such.
const LZ_MAX_RATIO: usize = 1 << 16;

fn little(bytes: &[u8], at: usize) -> Parsed<i32> {
    let word = at.checked_add(4).and_then(|end| bytes.get(at..end)).and_then(|word| word.try_into().ok());
    Ok(i32::from_le_bytes(word.ok_or(DAMAGED)?))
}

fn length_at(bytes: &[u8], at: usize) -> Parsed<usize> {
    usize::try_from(little(bytes, at)?).map_err(|_| DAMAGED)
}

/// A chunk of one repeated value.
fn special(kind: u8, value: &[u8], length: usize) -> Parsed<Vec<u8>> {
    match kind {
        1 | 4 => Ok(vec![0; length]), // zeros; never written, which reads as zeros
        2 => Ok(f32::NAN.to_le_bytes().into_iter().cycle().take(length).collect()),
        3 if !value.is_empty() => Ok(value.iter().copied().cycle().take(length).collect()),
        _ => Err(DAMAGED),
    }
}

/// Unpacks a chunk into exactly `length` bytes.
fn unpack(chunk: &[u8], length: usize) -> Parsed<Vec<u8>> {
    let header: &[u8; CHUNK_HEADER] = chunk.first_chunk().ok_or(DAMAGED)?;
    let (flags, typesize) = (header[2], usize::from(header[3]));
    let (stored, block_length) = (length_at(chunk, 12)?, length_at(chunk, 8)?);
    let chunk = chunk.get(..stored).filter(|chunk| chunk.len() >= CHUNK_HEADER).ok_or(DAMAGED)?;
    if length_at(chunk, 4)? != length || typesize == 0 || flags & 5 != 5 {
        return Err(DAMAGED);
    }
    if header[31] & 1 != 0 {
        return Err("compressed with a dictionary, which nnU-Net does not use");
    }
    let kind = header[31] >> 4 & 7;
    if kind != 0 {
        return special(kind, chunk.get(CHUNK_HEADER..CHUNK_HEADER + typesize).unwrap_or(&[]), length);
    }
    if flags & 2 != 0 {
        let plain = chunk.get(CHUNK_HEADER..).and_then(|rest| rest.get(..length));
        return plain.map(<[u8]>::to_vec).ok_or(DAMAGED);
    }
    if block_length == 0 || length == 0 {
        return Err(DAMAGED);
    }
    let mut unpacked = vec![0; length];
    for (number, block) in unpacked.chunks_mut(block_length).enumerate() {
        let start = length_at(chunk, CHUNK_HEADER + 4 * number)?;
        // The last block, if it is shorter, is one stream.
        let split = flags & 0x10 == 0 && block.len() == block_length && typesize <= block_length;
        let streams = if split { typesize } else { 1 };
        unpack_block(chunk.get(start..).ok_or(DAMAGED)?, flags >> 5, streams, block)?;
        for &filter in header[16..22].iter().rev() {
            match filter {
                0 => {}
                1 => unshuffle(block, typesize),
                _ => return Err("filtered in another way than nnU-Net does"),
            }
        }
    }
    Ok(unpacked)
}

/// Every stream has its length before it; a negative one means a run of one byte, 0 a run of zeros.
fn unpack_block(mut rest: &[u8], compressor: u8, streams: usize, block: &mut [u8]) -> Parsed<()> {
    let each = block.len() / streams;
    for out in block.chunks_exact_mut(each.max(1)).take(streams) {
        let stored = little(rest, 0)?;
        rest = &rest[4..];
        let Ok(stored) = usize::try_from(stored) else {
            // A token follows that says so.
            let value = u8::try_from(-i64::from(stored)).map_err(|_| DAMAGED)?;
            if rest.first().is_none_or(|token| token & 1 == 0) {
                return Err(DAMAGED);
            }
            rest = &rest[1..];
            out.fill(value);
            continue;
        };
        let (stream, after) = rest.split_at_checked(stored).ok_or(DAMAGED)?;
        rest = after;
        match stored {
            0 => out.fill(0),
            n if n == out.len() => out.copy_from_slice(stream),
            _ => decompress(compressor, stream, out)?,
        }
    }
    Ok(())
}

fn decompress(compressor: u8, stream: &[u8], out: &mut [u8]) -> Parsed<()> {
    let whole = match compressor {
        0 => return blosclz(stream, out),
        1 => lz4_flex::block::decompress_into(stream, out).is_ok_and(|length| length == out.len()),
        3 => flate2::read::ZlibDecoder::new(stream).read_exact(out).is_ok(),
        4 => ruzstd::decoding::StreamingDecoder::new(stream).is_ok_and(|mut from| from.read_exact(out).is_ok()),
        _ => return Err("compressed in another way than nnU-Net does"),
    };
    if whole { Ok(()) } else { Err(DAMAGED) }
}

/// BloscLZ: a control byte below 32 announces that many literals plus one, any other a copy of what came before. Its
/// upper three bits are the copy's length, its lower five with the next byte the distance; 7 and 31 with 255 mean that
/// more follows.
fn blosclz(stream: &[u8], out: &mut [u8]) -> Parsed<()> {
    let mut input = stream.iter().copied();
    let mut at = 0;
    let mut first = true;
    while let Some(byte) = input.next() {
        // The first is never a copy: there is nothing before it.
        let control = usize::from(if first { byte & 31 } else { byte });
        first = false;
        if control < 32 {
            for slot in out.get_mut(at..at + control + 1).ok_or(DAMAGED)? {
                *slot = input.next().ok_or(DAMAGED)?;
            }
            at += control + 1;
            continue;
        }
        let mut length = (control >> 5) + 2;
        let mut next = || input.next().map(usize::from).ok_or(DAMAGED);
        if length == 9 {
            loop {
                let more = next()?;
                length = length.saturating_add(more);
                if more != 255 {
                    break;
                }
            }
        }
        let (high, low) = ((control & 31) << 8, next()?);
        let distance = if low == 255 && high == 31 << 8 { (next()? << 8) + next()? + 8191 } else { high + low } + 1;
        let end = at.checked_add(length).filter(|&end| end <= out.len()).ok_or(DAMAGED)?;
        let start = at.checked_sub(distance).ok_or(DAMAGED)?;
        // Byte by byte: a copy may repeat what it has just written.
        for to in at..end {
            out[to] = out[start + to - at];
        }
        at = end;
    }
    if at == out.len() { Ok(()) } else { Err(DAMAGED) }
}

/// All first bytes of the values, then all second ones, and so on, become values again; a rest shorter than a value stays.
fn unshuffle(block: &mut [u8], typesize: usize) {
    let values = block.len() / typesize;
    let grouped = block[..values * typesize].to_vec();
    for (byte, plane) in grouped.chunks_exact(values.max(1)).enumerate() {
        for (slot, &value) in block[byte..].iter_mut().step_by(typesize).zip(plane) {
            *slot = value;
        }
    }
}
