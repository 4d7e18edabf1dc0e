//! NRRD files of label maps, as 3D Slicer writes segmentations: attached, raw or gzipped integers on a grid in space.
//!
//! The format is that of teem.sourceforge.net/nrrd/format.html. What this reader does not take is refused by the name of its
//! field: data in other files or other encodings, types that are no integers of up to 32 bits, grids without a place in
//! space.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::path::Path;

use flate2::bufread::MultiGzDecoder;
use ndarray::Array3;

use crate::error::{Error, FileError, Result};

/// Longest line of a header: 3D Slicer writes long lists of tags and parameters.
const LONGEST_LINE: u64 = 1 << 20;
/// Most lines of a header.
const MOST_LINES: usize = 1 << 16;
/// Deflate cannot expand a byte to more than this many.
const DEFLATE_MAX_RATIO: u64 = 1032;

/// Fields that say nothing about where a voxel lies or what it holds.
const WITHOUT_MEANING: [&str; 13] = [
    "content",
    "number",
    "min",
    "max",
    "old min",
    "oldmin",
    "old max",
    "oldmax",
    "labels",
    "units",
    "thicknesses",
    "centers",
    "centerings",
];

/// A file of one or several label maps on one grid.
#[derive(Debug, Clone, PartialEq)]
pub struct Nrrd {
    /// The label maps, each (z, y, x), x the fastest axis of the file.
    pub layers: Vec<Array3<i32>>,
    /// Rows of the affine map from voxel index (x, y, z, 1) to millimetres in NIfTI's world: right, anterior, superior.
    pub affine: [[f64; 4]; 3],
    /// The header's `key:=value` pairs.
    pub pairs: BTreeMap<String, String>,
}

/// Reads a file.
///
/// # Errors
/// [`FileError::NotNrrd`], [`FileError::NrrdField`] naming the field; [`FileError::Gzip`], [`FileError::Io`].
pub fn read_nrrd(path: &Path) -> Result<Nrrd> {
    let file = File::open(path).map_err(Error::io(path, "open"))?;
    let length = file.metadata().map_err(Error::io(path, "read"))?.len();
    let mut file = BufReader::with_capacity(1 << 16, file);
    let header = Header::read(path, &mut file)?;
    let grid = Grid::of(&header)?;
    let kind = Kind::of(&header)?;
    let bytes = grid.bytes(&header, kind)?;
    let data = header.data(&mut file, bytes, length)?;
    let values: Vec<i32> = data.chunks_exact(kind.bytes).map(|value| kind.value(value)).collect();
    let layers = (0..grid.layers()).map(|layer| grid.layer(&values, layer)).collect();
    Ok(Nrrd { layers, affine: grid.affine, pairs: header.pairs })
}

/// The text before the data.
struct Header<'a> {
    path: &'a Path,
    fields: BTreeMap<String, String>,
    pairs: BTreeMap<String, String>,
}

impl<'a> Header<'a> {
    fn read(path: &'a Path, file: &mut impl BufRead) -> Result<Self> {
        let not = |problem: &str| Error::File(FileError::NotNrrd { path: path.into(), problem: problem.into() });
        let mut header = Header { path, fields: BTreeMap::new(), pairs: BTreeMap::new() };
        for number in 0..MOST_LINES {
            let mut line = Vec::new();
            file.by_ref().take(LONGEST_LINE).read_until(b'\n', &mut line).map_err(Error::io(path, "read"))?;
            let version = line.strip_prefix(b"NRRD000").and_then(|rest| rest.first());
            if number == 0 && !version.is_some_and(|digit| (b'1'..=b'5').contains(digit)) {
                return Err(not("it does not begin with NRRD0001 to NRRD0005"));
            }
            if !line.ends_with(b"\n") {
                return Err(not("its header does not end with an empty line"));
            }
            let line = String::from_utf8(line).map_err(|_| not("its header is no text"))?;
            let line = line.trim_end_matches(['\n', '\r']);
            if line.is_empty() {
                return Ok(header);
            }
            if number > 0 && !line.starts_with('#') {
                header.add(line).ok_or_else(|| not(&format!("line {} of its header is no field", number + 1)))??;
            }
        }
        Err(not("its header does not end"))
    }

    /// A line of the header; `None` if it is none.
    fn add(&mut self, line: &str) -> Option<Result<()>> {
        // `:=` within a value belongs to it: a field's name ends at the first colon.
        let (name, rest) = line.split_once(':')?;
        let (twice, key) = match rest.strip_prefix('=') {
            Some(value) => (self.pairs.insert(unescaped(name), unescaped(value)), name.to_owned()),
            None => {
                let key = name.trim().to_ascii_lowercase();
                (self.fields.insert(key.clone(), rest.trim().to_owned()), key)
            }
        };
        Some(match twice {
            None => Ok(()),
            Some(_) => Err(self.fault(&key, "is there twice")),
        })
    }

    fn fault(&self, field: &str, problem: impl Into<String>) -> Error {
        let (path, field) = (self.path.into(), field.into());
        Error::File(FileError::NrrdField { path, field, problem: problem.into() })
    }

    fn required(&self, field: &str) -> Result<&str> {
        self.fields.get(field).map(String::as_str).ok_or_else(|| self.fault(field, "is missing"))
    }

    /// The data: so many bytes and no more.
    fn data(&self, file: &mut impl BufRead, bytes: u64, length: u64) -> Result<Vec<u8>> {
        let read = |stream: &mut dyn Read, at_most: u64, failed: &dyn Fn(std::io::Error) -> Error| {
            if bytes > at_most {
                return Err(self.fault("sizes", format!("promises {bytes} bytes, which the file cannot hold")));
            }
            // What a header promises is believed up to here; more is made room for as it comes.
            let mut data = Vec::with_capacity(bytes.min(1 << 26) as usize);
            // One more, to notice what is too much.
            stream.take(bytes + 1).read_to_end(&mut data).map_err(failed)?;
            match (data.len() as u64).cmp(&bytes) {
                std::cmp::Ordering::Equal => Ok(data),
                std::cmp::Ordering::Less => {
                    Err(self.fault("sizes", format!("promises {bytes} bytes, the file holds {}", data.len())))
                }
                std::cmp::Ordering::Greater => {
                    Err(self.fault("sizes", format!("promises {bytes} bytes, the file goes on for longer")))
                }
            }
        };
        match self.required("encoding")?.to_ascii_lowercase().as_str() {
            "raw" => read(file, length, &|error| Error::io(self.path, "read")(error)),
            "gzip" | "gz" => {
                read(&mut MultiGzDecoder::new(file), length.saturating_mul(DEFLATE_MAX_RATIO), &|source| {
                    Error::File(FileError::Gzip { path: self.path.into(), source })
                })
            }
            other => Err(self.fault("encoding", format!("{other} is not read; save with encoding raw or gzip"))),
        }
    }
}

/// Backslash and line feed are escaped in pairs.
fn unescaped(text: &str) -> String {
    let mut plain = String::with_capacity(text.len());
    let mut letters = text.chars();
    while let Some(letter) = letters.next() {
        if letter != '\\' {
            plain.push(letter);
            continue;
        }
        match letters.next() {
            Some('n') => plain.push('\n'),
            Some('\\') | None => plain.push('\\'),
            Some(other) => plain.extend(['\\', other]),
        }
    }
    plain
}

/// The type of the values.
#[derive(Clone, Copy)]
struct Kind {
    bytes: usize,
    signed: bool,
    big_endian: bool,
}

impl Kind {
    fn of(header: &Header) -> Result<Self> {
        let name = header.required("type")?;
        let (bytes, signed) = match name {
            "signed char" | "int8" | "int8_t" => (1, true),
            "uchar" | "unsigned char" | "uint8" | "uint8_t" => (1, false),
            "short" | "short int" | "signed short" | "signed short int" | "int16" | "int16_t" => (2, true),
            "ushort" | "unsigned short" | "unsigned short int" | "uint16" | "uint16_t" => (2, false),
            "int" | "signed int" | "int32" | "int32_t" => (4, true),
            "uint" | "unsigned int" | "uint32" | "uint32_t" => (4, false),
            other => {
                let problem = format!("{other} is no integer of 8, 16 or 32 bits; label maps hold such");
                return Err(header.fault("type", problem));
            }
        };
        let big_endian = match header.fields.get("endian").map(String::as_str) {
            Some("little") => false,
            Some("big") => true,
            None if bytes == 1 => false,
            None => return Err(header.fault("endian", format!("is missing, which {name} needs"))),
            Some(other) => return Err(header.fault("endian", format!("{other} is neither little nor big"))),
        };
        Ok(Kind { bytes, signed, big_endian })
    }

    /// A value; labels beyond 31 bits become negative, which no label is.
    fn value(self, stored: &[u8]) -> i32 {
        let byte = |index: usize| stored[if self.big_endian { stored.len() - 1 - index } else { index }];
        match (self.bytes, self.signed) {
            (1, false) => i32::from(byte(0)),
            (1, true) => i32::from(byte(0) as i8),
            (2, false) => i32::from(u16::from_le_bytes([byte(0), byte(1)])),
            (2, true) => i32::from(i16::from_le_bytes([byte(0), byte(1)])),
            _ => i32::from_le_bytes([byte(0), byte(1), byte(2), byte(3)]),
        }
    }
}

/// Extent and place of the label maps.
struct Grid {
    sizes: Vec<usize>,
    /// The axis along which label maps are listed.
    list: Option<usize>,
    affine: [[f64; 4]; 3],
}

impl Grid {
    fn of(header: &Header) -> Result<Self> {
        for (field, value) in &header.fields {
            let refused = match field.as_str() {
                "data file" | "datafile" => Some("data in a file of its own are not read; save as one file"),
                "line skip" | "lineskip" | "byte skip" | "byteskip" if value != "0" => {
                    Some("data that do not follow the header at once are not read")
                }
                "axis mins" | "axismins" | "axis maxs" | "axismaxs" | "spacings" => {
                    Some("a place in space is given by `space directions` and `space origin`")
                }
                "type" | "dimension" | "sizes" | "encoding" | "endian" | "space" | "space dimension"
                | "space directions" | "space origin" | "space units" | "kinds" | "measurement frame" | "line skip"
                | "lineskip" | "byte skip" | "byteskip" => None,
                name if WITHOUT_MEANING.contains(&name) => None,
                _ => Some("is no field of NRRD"),
            };
            if let Some(problem) = refused {
                return Err(header.fault(field, problem));
            }
        }
        let dimension = header.required("dimension")?;
        let axes = match dimension {
            "3" => 3,
            "4" => 4,
            other => {
                let problem = format!("{other} axes: label maps have 3, or 4 where segments overlap");
                return Err(header.fault("dimension", problem));
            }
        };
        let sizes: Vec<usize> = header
            .required("sizes")?
            .split_whitespace()
            .map(|size| size.parse::<usize>().ok().filter(|&size| size > 0))
            .collect::<Option<_>>()
            .filter(|sizes: &Vec<usize>| sizes.len() == axes)
            .ok_or_else(|| header.fault("sizes", format!("{axes} positive numbers are needed")))?;
        let directions = vectors(header, "space directions")?;
        let in_space: Vec<usize> = (0..directions.len()).filter(|&axis| directions[axis].is_some()).collect();
        if directions.len() != axes || in_space.len() != 3 {
            let problem = format!("three vectors are needed, and `none` for the others of {axes} axes");
            return Err(header.fault("space directions", problem));
        }
        let list = (0..axes).find(|axis| !in_space.contains(axis));
        kinds(header, axes, list)?;
        Ok(Grid { list, affine: affine(header, &directions)?, sizes })
    }

    fn layers(&self) -> usize {
        self.list.map_or(1, |axis| self.sizes[axis])
    }

    /// Length of the data.
    fn bytes(&self, header: &Header, kind: Kind) -> Result<u64> {
        let values = self.sizes.iter().try_fold(kind.bytes as u64, |product, &size| product.checked_mul(size as u64));
        values
            .filter(|&bytes| usize::try_from(bytes).is_ok_and(|bytes| bytes < isize::MAX as usize))
            .ok_or_else(|| header.fault("sizes", "more than memory can hold"))
    }

    fn layer(&self, values: &[i32], layer: usize) -> Array3<i32> {
        let strides: Vec<usize> = (0..self.sizes.len()).map(|axis| self.sizes[..axis].iter().product()).collect();
        let space: Vec<usize> = (0..self.sizes.len()).filter(|&axis| Some(axis) != self.list).collect();
        let start = self.list.map_or(0, |axis| layer * strides[axis]);
        let [x, y, z] = [space[0], space[1], space[2]];
        Array3::from_shape_fn((self.sizes[z], self.sizes[y], self.sizes[x]), |(k, j, i)| {
            values[start + k * strides[z] + j * strides[y] + i * strides[x]]
        })
    }
}

/// Vectors such as `none (1,0,0) (0,1,0) (0,0,1)`.
fn vectors(header: &Header, field: &str) -> Result<Vec<Option<[f64; 3]>>> {
    let mut rest = header.required(field)?.trim();
    let mut found = Vec::new();
    let wrong = || header.fault(field, "vectors such as (1,0,0) are needed");
    while !rest.is_empty() {
        if let Some(after) = rest.strip_prefix("none") {
            found.push(None);
            rest = after.trim_start();
            continue;
        }
        let (inside, after) = rest.strip_prefix('(').and_then(|rest| rest.split_once(')')).ok_or_else(wrong)?;
        let numbers: Option<Vec<f64>> = inside
            .split(',')
            .map(|number| number.trim().parse().ok().filter(|value: &f64| value.is_finite()))
            .collect();
        let vector = numbers.and_then(|numbers| <[f64; 3]>::try_from(numbers).ok()).ok_or_else(wrong)?;
        found.push(Some(vector));
        rest = after.trim_start();
    }
    Ok(found)
}

/// An axis outside space must be one of separate label maps, not of colours or components of vectors.
fn kinds(header: &Header, axes: usize, list: Option<usize>) -> Result<()> {
    let Some(kinds) = header.fields.get("kinds") else { return Ok(()) };
    let kinds: Vec<&str> = kinds.split_whitespace().collect();
    let fine = |(axis, kind): (usize, &&str)| match list == Some(axis) {
        true => matches!(*kind, "list" | "none" | "???"),
        false => matches!(*kind, "domain" | "space" | "none" | "???"),
    };
    match kinds.len() == axes && kinds.iter().enumerate().all(fine) {
        true => Ok(()),
        false => Err(header.fault("kinds", format!("{kinds:?}: three axes `domain` and at most one `list` are read"))),
    }
}

/// Columns are the directions of the three axes in space, turned to right, anterior, superior.
fn affine(header: &Header, directions: &[Option<[f64; 3]>]) -> Result<[[f64; 4]; 3]> {
    let space = header.required("space")?.to_ascii_lowercase();
    let signs = match space.as_str() {
        "left-posterior-superior" | "lps" => [-1.0, -1.0, 1.0],
        "right-anterior-superior" | "ras" => [1.0, 1.0, 1.0],
        "left-anterior-superior" | "las" => [-1.0, 1.0, 1.0],
        other => return Err(header.fault("space", format!("{other}: one of LPS, RAS and LAS is needed"))),
    };
    if let Some(units) = header.fields.get("space units")
        && !units.split('"').filter(|part| !part.trim().is_empty()).all(|unit| unit == "mm")
    {
        return Err(header.fault("space units", format!("{units}: millimetres are needed")));
    }
    let origin = match vectors(header, "space origin")?[..] {
        [Some(origin)] => origin,
        _ => return Err(header.fault("space origin", "one vector is needed")),
    };
    let columns: Vec<[f64; 3]> = directions.iter().copied().flatten().collect();
    let affine: [[f64; 4]; 3] = std::array::from_fn(|row| {
        std::array::from_fn(|column| signs[row] * columns.get(column).map_or(origin[row], |vector| vector[row]))
    });
    Ok(affine)
}
