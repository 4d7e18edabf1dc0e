//! A preprocessed case on disk: compressed in chunks, so that a patch is read without the rest of the volume.
//!
//! One file per case, all integers little-endian:
//!
//! | bytes | content |
//! |---|---|
//! | 8 | `VOXGRAD` and a zero |
//! | 4 | version, 1 |
//! | 4 | H, length of the header |
//! | 4 | B, number of blocks |
//! | 4 | CRC-32 of the 20 bytes above, the header and the table |
//! | H | header, JSON: name, shape, chunk, properties, class names, label counts, recipe |
//! | 8 B | table: length and CRC-32 of every block |
//! | rest | the blocks without gaps: class locations, chunks of the image channel by channel, chunks of the labels |
//!
//! A block is LZ4 of its values with their bytes regrouped (all lowest bytes first, then the next), which is what makes
//! floats compressible. Every byte of the file is under a checksum or a magic number, and no length is believed beyond
//! what LZ4 can expand the file's bytes to.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::ops::Range;
use std::path::{Path, PathBuf};

use ndarray::{Array3, Array4, ArrayViewMut3, Axis, s};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use super::chunks::{Chunk, Chunks, compress, cut, interleave};
use super::label_counts::label_counts;
use super::{BoundingBox, ClassLocations, PreprocessedCase, Properties};
use crate::dataset::LabelGroup;
use crate::error::{Error, FileError, PreprocessError, Result};
use crate::io::{self, Geometry};

/// Ending of a stored case's file name.
pub const ENDING: &str = ".vxg";

const MAGIC: &[u8; 8] = b"VOXGRAD\0";
const VERSION: u32 = 1;
const PREAMBLE: usize = 24;
/// Edge of a chunk. A patch of 128³ then reads at most twice the voxels that it needs; blocks are around 100 kB.
const CHUNK: usize = 32;
/// LZ4 cannot expand a byte to more than this many.
const LZ4_MAX_RATIO: u64 = 255;

/// What a file says about itself before any array is read.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
struct Header {
    name: String,
    /// Channels, depth, height, width.
    shape: [usize; 4],
    chunk: [usize; 3],
    spacing: [f64; 3],
    shape_before_cropping: [usize; 3],
    bbox: BoundingBox,
    shape_after_cropping: [usize; 3],
    grid_spacing: [f64; 3],
    geometry: Vec<u32>,
    /// Labels of every entry of the class locations and the number of its locations; a single label is one value.
    classes: Vec<(StoredGroup, usize)>,
    annotated: Option<usize>,
    /// How many voxels have each label, as (label, voxels).
    label_counts: Vec<(i16, u64)>,
    recipe: String,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
enum StoredGroup {
    Label(i16),
    Region(Vec<i16>),
}

/// Writes a case. `recipe` is any text that says how and from what the case was made; [`StoredCase::recipe`] returns it,
/// so that a later run can tell whether the case is still what it would make.
///
/// # Errors
/// [`FileError::Io`]; the target is then as it was before.
pub fn write(path: &Path, case: &PreprocessedCase, recipe: &str) -> Result<()> {
    let (channels, depth, height, width) = case.data.dim();
    let shape = [depth, height, width];
    let chunk = shape.map(|n| n.clamp(1, CHUNK));
    let locations = &case.class_locations;
    let group = |group: &LabelGroup| match group {
        LabelGroup::Label(label) => StoredGroup::Label(*label),
        LabelGroup::Region(labels) => StoredGroup::Region(labels.clone()),
    };
    let header = Header {
        name: case.name.clone(),
        shape: [channels, depth, height, width],
        chunk,
        spacing: case.properties.spacing,
        shape_before_cropping: case.properties.shape_before_cropping,
        bbox: case.properties.bbox,
        shape_after_cropping: case.properties.shape_after_cropping,
        grid_spacing: case.geometry.spacing,
        geometry: case.geometry.to_words(),
        classes: locations.foreground.iter().map(|(labels, list)| (group(labels), list.len())).collect(),
        annotated: locations.annotated.as_ref().map(Vec::len),
        label_counts: label_counts(case.seg.view()).into_iter().collect(),
        recipe: recipe.into(),
    };

    let voxels = locations.foreground.iter().flat_map(|(_, list)| list).chain(locations.annotated.iter().flatten());
    let coordinates: Vec<u8> = voxels.flatten().flat_map(|n| n.to_le_bytes()).collect();
    let mut blocks = vec![compress::<4>(&coordinates)];
    let chunks = Chunks { shape, chunk };
    let all: Vec<usize> = (0..chunks.count()).collect();
    for channel in case.data.axis_iter(Axis(0)) {
        blocks.par_extend(all.par_iter().map(|&index| {
            let part = cut(channel, &chunks.range(index));
            compress::<4>(&part.iter().flat_map(|v| v.to_le_bytes()).collect::<Vec<u8>>())
        }));
    }
    blocks.par_extend(all.par_iter().map(|&index| {
        let part = cut(case.seg.view(), &chunks.range(index));
        compress::<2>(&part.iter().flat_map(|v| v.to_le_bytes()).collect::<Vec<u8>>())
    }));
    io::write_atomically(path, &assemble(path, &header, &blocks)?)
}

fn assemble(path: &Path, header: &Header, blocks: &[Vec<u8>]) -> Result<Vec<u8>> {
    let header =
        serde_json::to_vec(header).map_err(|source| Error::File(FileError::Json { path: path.into(), source }))?;
    let mut bytes = Vec::with_capacity(PREAMBLE + header.len() + blocks.iter().map(|b| b.len() + 8).sum::<usize>());
    bytes.extend_from_slice(MAGIC);
    bytes.extend_from_slice(&VERSION.to_le_bytes());
    bytes.extend_from_slice(&(header.len() as u32).to_le_bytes());
    bytes.extend_from_slice(&(blocks.len() as u32).to_le_bytes());
    bytes.extend_from_slice(&[0; 4]);
    bytes.extend_from_slice(&header);
    for block in blocks {
        bytes.extend_from_slice(&(block.len() as u32).to_le_bytes());
        bytes.extend_from_slice(&crc32fast::hash(block).to_le_bytes());
    }
    let sum = checksum(&bytes);
    bytes[PREAMBLE - 4..PREAMBLE].copy_from_slice(&sum.to_le_bytes());
    blocks.iter().for_each(|block| bytes.extend_from_slice(block));
    Ok(bytes)
}

/// Of everything before the blocks but the checksum itself.
fn checksum(front: &[u8]) -> u32 {
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(&front[..PREAMBLE - 4]);
    hasher.update(&front[PREAMBLE..]);
    hasher.finalize()
}

/// A stored case, of which only the header is in memory.
#[derive(Debug, Clone)]
pub struct StoredCase {
    path: PathBuf,
    header: Header,
    geometry: Geometry,
    blocks: Vec<Block>,
}

#[derive(Debug, Clone, Copy)]
struct Block {
    offset: u64,
    length: u32,
    crc: u32,
}

impl StoredCase {
    /// Reads and checks the header. The arrays are checked when they are read.
    ///
    /// # Errors
    /// [`FileError::Io`], or [`PreprocessError::StoredCase`] for a file that is damaged, truncated, or of another version.
    pub fn open(path: &Path) -> Result<Self> {
        let bad = |problem: String| Error::Preprocess(PreprocessError::StoredCase { path: path.into(), problem });
        let mut file = File::open(path).map_err(Error::io(path, "open"))?;
        let length = file.metadata().map_err(Error::io(path, "read"))?.len();
        if length < PREAMBLE as u64 {
            return Err(bad(format!("it has {length} bytes, too few for a header")));
        }
        let mut front = vec![0; PREAMBLE];
        file.read_exact(&mut front).map_err(Error::io(path, "read"))?;
        let word = |at: usize| u32::from_le_bytes([front[at], front[at + 1], front[at + 2], front[at + 3]]);
        if &front[..8] != MAGIC {
            return Err(bad("it does not begin as one".into()));
        }
        let (version, header_length, count, sum) = (word(8), word(12), word(16), word(20));
        if version != VERSION {
            return Err(bad(format!("version {version}, this program reads version {VERSION}")));
        }
        let rest = u64::from(header_length) + 8 * u64::from(count);
        if PREAMBLE as u64 + rest > length {
            return Err(bad("it ends inside its header".into()));
        }
        front.resize(PREAMBLE + rest as usize, 0);
        file.read_exact(&mut front[PREAMBLE..]).map_err(Error::io(path, "read"))?;
        if checksum(&front) != sum {
            return Err(bad("the checksum of its header is wrong".into()));
        }
        let (text, table) = front[PREAMBLE..].split_at(header_length as usize);
        let header: Header = serde_json::from_slice(text).map_err(|error| bad(error.to_string()))?;
        let mut offset = PREAMBLE as u64 + rest;
        let mut blocks = Vec::with_capacity(count as usize);
        for entry in table.as_chunks::<8>().0 {
            let [a, b, c, d, e, f, g, h] = *entry;
            let (length, crc) = (u32::from_le_bytes([a, b, c, d]), u32::from_le_bytes([e, f, g, h]));
            blocks.push(Block { offset, length, crc });
            offset += u64::from(length);
        }
        if offset != length {
            return Err(bad(format!("it has {length} bytes where its table promises {offset}")));
        }
        let geometry = header.check(&blocks).map_err(bad)?;
        Ok(StoredCase { path: path.into(), header, geometry, blocks })
    }

    /// Case identifier.
    pub fn name(&self) -> &str {
        &self.header.name
    }

    /// Number of channels.
    pub fn channels(&self) -> usize {
        self.header.shape[0]
    }

    /// Depth, height, width.
    pub fn shape(&self) -> [usize; 3] {
        self.header.volume()
    }

    /// The text given to [`write()`].
    pub fn recipe(&self) -> &str {
        &self.header.recipe
    }

    /// How many voxels have each label that occurs.
    pub fn label_counts(&self) -> BTreeMap<i16, u64> {
        self.header.label_counts.iter().copied().collect()
    }

    /// What is needed to put a segmentation back onto the raw grid.
    pub fn properties(&self) -> Properties {
        let h = &self.header;
        Properties {
            spacing: h.spacing,
            shape_before_cropping: h.shape_before_cropping,
            bbox: h.bbox,
            shape_after_cropping: h.shape_after_cropping,
        }
    }

    /// The sampled voxels of each class.
    ///
    /// # Errors
    /// [`FileError::Io`], or [`PreprocessError::StoredCase`] for damaged bytes.
    pub fn class_locations(&self) -> Result<ClassLocations> {
        let bytes = self.block::<4>(&mut self.reader()?, 0, 12 * self.header.locations())?;
        let mut voxels = bytes.as_chunks::<12>().0.iter().map(|&[a, b, c, d, e, f, g, h, i, j, k, l]| {
            [u32::from_le_bytes([a, b, c, d]), u32::from_le_bytes([e, f, g, h]), u32::from_le_bytes([i, j, k, l])]
        });
        let inside = |voxel: &[u32; 3]| voxel.iter().zip(self.shape()).all(|(&at, n)| (at as usize) < n);
        if !voxels.clone().all(|voxel| inside(&voxel)) {
            return Err(self.bad("a class location lies outside the volume"));
        }
        let group = |group: &StoredGroup| match group {
            StoredGroup::Label(label) => LabelGroup::Label(*label),
            StoredGroup::Region(labels) => LabelGroup::Region(labels.clone()),
        };
        let classes = self.header.classes.iter();
        Ok(ClassLocations {
            foreground: classes.map(|(labels, n)| (group(labels), voxels.by_ref().take(*n).collect())).collect(),
            annotated: self.header.annotated.map(|n| voxels.by_ref().take(n).collect()),
        })
    }

    /// The whole case.
    ///
    /// # Errors
    /// [`FileError::Io`], or [`PreprocessError::StoredCase`] for damaged bytes.
    pub fn read(&self) -> Result<PreprocessedCase> {
        Ok(PreprocessedCase {
            name: self.header.name.clone(),
            data: self.data([0; 3], self.shape())?,
            seg: self.seg([0; 3], self.shape())?,
            class_locations: self.class_locations()?,
            properties: self.properties(),
            geometry: self.geometry.clone(),
        })
    }

    /// A box of the image, all channels, `(c, z, y, x)`.
    ///
    /// # Errors
    /// [`PreprocessError::StoredBox`] for a box that leaves the volume, else as [`read`](Self::read).
    pub fn data(&self, start: [usize; 3], size: [usize; 3]) -> Result<Array4<f32>> {
        let mut data = Array4::zeros((self.channels(), size_in(self, start, size)?[0], size[1], size[2]));
        for (channel, target) in data.axis_iter_mut(Axis(0)).enumerate() {
            self.fill(channel, start, target, f32::from_le_bytes)?;
        }
        Ok(data)
    }

    /// A box of the labels, `(z, y, x)`.
    ///
    /// # Errors
    /// As [`data`](Self::data).
    pub fn seg(&self, start: [usize; 3], size: [usize; 3]) -> Result<Array3<i16>> {
        let mut seg = Array3::zeros(size_in(self, start, size)?);
        self.fill(self.channels(), start, seg.view_mut(), i16::from_le_bytes)?;
        Ok(seg)
    }

    /// Copies the parts of all chunks that touch the box; the labels are the channel after the last.
    fn fill<T: Copy, const N: usize>(
        &self,
        channel: usize,
        start: [usize; 3],
        mut target: ArrayViewMut3<T>,
        decode: impl Fn([u8; N]) -> T,
    ) -> Result<()> {
        let (depth, height, width) = target.dim();
        let wanted = [start[0]..start[0] + depth, start[1]..start[1] + height, start[2]..start[2] + width];
        let mut file = self.reader()?;
        for chunk in self.touching(&wanted) {
            let (bytes, _) = self.chunk_from::<N>(&mut file, channel, &chunk)?;
            let values = bytes.as_chunks::<N>().0.iter().map(|&word| decode(word)).collect();
            let values =
                Array3::from_shape_vec(chunk.extent(), values).map_err(|_| self.bad("a chunk has another length"))?;
            let common: [Range<usize>; 3] = std::array::from_fn(|axis| {
                chunk.range[axis].start.max(wanted[axis].start)..chunk.range[axis].end.min(wanted[axis].end)
            });
            let relative = |from: &[Range<usize>; 3]| -> [Range<usize>; 3] {
                std::array::from_fn(|axis| common[axis].start - from[axis].start..common[axis].end - from[axis].start)
            };
            let [z, y, x] = relative(&wanted);
            target.slice_mut(s![z, y, x]).assign(&cut(values.view(), &relative(&chunk.range)));
        }
        Ok(())
    }

    /// The chunks that have voxels in a box inside the volume.
    pub(crate) fn touching(&self, wanted: &[Range<usize>; 3]) -> Vec<Chunk> {
        let chunks = self.header.chunks();
        let [_, height, width] = chunks.grid();
        let [z, y, x] = std::array::from_fn(|axis| {
            let Range { start, end } = wanted[axis];
            if start >= end { 0..0 } else { start / chunks.chunk[axis]..end.div_ceil(chunks.chunk[axis]) }
        });
        let mut touching = Vec::with_capacity(z.len() * y.len() * x.len());
        for plane in z {
            for row in y.clone() {
                let first = (plane * height + row) * width;
                touching.extend(x.clone().map(|x| Chunk { index: first + x, range: chunks.range(first + x) }));
            }
        }
        touching
    }

    /// The block that holds a chunk of a channel; the labels are the channel after the last.
    pub(crate) fn block_of(&self, channel: usize, chunk: &Chunk) -> usize {
        1 + channel * self.header.chunks().count() + chunk.index
    }

    /// The values of a chunk, `N` little-endian bytes each, and how many bytes were read for them.
    pub(crate) fn chunk<const N: usize>(&self, channel: usize, chunk: &Chunk) -> Result<(Vec<u8>, u64)> {
        self.chunk_from::<N>(&mut self.reader()?, channel, chunk)
    }

    fn chunk_from<const N: usize>(&self, file: &mut File, channel: usize, chunk: &Chunk) -> Result<(Vec<u8>, u64)> {
        let block = self.block_of(channel, chunk);
        let bytes = self.block::<N>(file, block, chunk.extent().iter().product::<usize>() * N)?;
        Ok((bytes, self.blocks.get(block).map_or(0, |block| u64::from(block.length))))
    }

    fn reader(&self) -> Result<File> {
        File::open(&self.path).map_err(Error::io(&self.path, "open"))
    }

    /// Reads, checks and unpacks a block into exactly `expected` bytes.
    fn block<const N: usize>(&self, file: &mut File, index: usize, expected: usize) -> Result<Vec<u8>> {
        let block = self.blocks.get(index).ok_or_else(|| self.bad("a block is missing"))?;
        file.seek(SeekFrom::Start(block.offset)).map_err(Error::io(&self.path, "read"))?;
        let mut stored = vec![0; block.length as usize];
        file.read_exact(&mut stored).map_err(Error::io(&self.path, "read"))?;
        if crc32fast::hash(&stored) != block.crc {
            return Err(self.bad(&format!("the checksum of block {index} is wrong")));
        }
        let mut grouped = vec![0; expected];
        match lz4_flex::block::decompress_into(&stored, &mut grouped) {
            Ok(length) if length == expected => Ok(interleave::<N>(&grouped)),
            Ok(length) => Err(self.bad(&format!("block {index} holds {length} bytes where {expected} belong"))),
            Err(error) => Err(self.bad(&format!("block {index}: {error}"))),
        }
    }

    fn bad(&self, problem: &str) -> Error {
        Error::Preprocess(PreprocessError::StoredCase { path: self.path.clone(), problem: problem.into() })
    }
}

impl Header {
    fn volume(&self) -> [usize; 3] {
        let [_, depth, height, width] = self.shape;
        [depth, height, width]
    }

    fn chunks(&self) -> Chunks {
        Chunks { shape: self.volume(), chunk: self.chunk }
    }

    /// Number of class locations; never overflows after [`check`](Self::check).
    fn locations(&self) -> usize {
        self.classes.iter().map(|(_, n)| n).sum::<usize>() + self.annotated.unwrap_or(0)
    }

    /// Whether the blocks can hold what the header says, so that nothing larger is allocated later.
    fn check(&self, blocks: &[Block]) -> Result<Geometry, String> {
        let lists = self.classes.iter().map(|(_, n)| *n).chain(self.annotated);
        let locations = lists.fold(0usize, usize::saturating_add);
        if self.shape.contains(&0) || self.chunk.contains(&0) || self.chunk.iter().any(|&n| n > 1 << 10) {
            return Err("its header has an axis of no or too many voxels".into());
        }
        let expandable = |bytes: u64| bytes.saturating_mul(LZ4_MAX_RATIO);
        let stored: u64 = blocks.iter().map(|block| u64::from(block.length)).sum();
        let voxels = self.shape.iter().try_fold(1u64, |product, &n| product.checked_mul(n as u64));
        let fits = voxels.and_then(|n| n.checked_mul(4)).is_some_and(|bytes| bytes <= expandable(stored));
        let coordinates = (locations as u64).checked_mul(12);
        let listed = blocks.first().map_or(0, |block| expandable(u64::from(block.length)));
        if !fits || coordinates.is_none_or(|bytes| bytes > listed) {
            return Err("its header promises more values than the file can hold".into());
        }
        let expected = (self.shape[0] + 1).checked_mul(self.chunks().count()).and_then(|n| n.checked_add(1));
        if expected != Some(blocks.len()) {
            return Err(format!("it has {} blocks, which is not what its shape asks for", blocks.len()));
        }
        if !self.spacing.iter().chain(&self.grid_spacing).all(|s| s.is_finite() && *s > 0.0) {
            return Err("its spacing is not positive".into());
        }
        Geometry::from_words(self.grid_spacing, &self.geometry).ok_or_else(|| "its geometry is incomplete".into())
    }
}

fn size_in(case: &StoredCase, start: [usize; 3], size: [usize; 3]) -> Result<[usize; 3]> {
    let shape = case.shape();
    let inside = (0..3).all(|axis| start[axis].checked_add(size[axis]).is_some_and(|end| end <= shape[axis]));
    match inside {
        true => Ok(size),
        false => Err(Error::Preprocess(PreprocessError::StoredBox { path: case.path.clone(), start, size, shape })),
    }
}
