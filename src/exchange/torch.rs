//! Files that `torch.save` writes: a zip archive of one pickle and an entry of raw bytes for each storage of the
//! tensors in it. <https://github.com/pytorch/pytorch/blob/main/torch/serialization.py>

use super::archive::Archive;
use super::pickle::{self, Element, Fault, Tensor, Value};
use crate::error::{Error, ExchangeError, Result};
use crate::io::write_aside;
use half::{bf16, f16};
use rawzip::extra_fields::ExtraFieldId;
use rawzip::{Header, ZipArchiveWriter};
use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

/// Bytes that a pickle may have; nnU-Net's have tens of thousands.
const LARGEST_PICKLE: u64 = 64 << 20;
/// Storages begin at multiples of this, as in PyTorch's own files, so that they can be mapped into memory.
const ALIGNMENT: u64 = 64;
/// The field by which PyTorch pads an entry's header.
const PADDING: ExtraFieldId = ExtraFieldId::new(u16::from_le_bytes(*b"FB"));
/// Signature, versions, sizes and lengths of an entry's header.
const HEADER: u64 = 30;

/// An opened file.
pub struct TorchFile {
    path: PathBuf,
    archive: Archive,
    /// Folder of the archive that everything lies in, with its slash.
    root: String,
    /// What was saved.
    pub content: Value,
}

impl TorchFile {
    /// Reads the pickle of a file. Tensors are read later, by [`values`](Self::values).
    ///
    /// # Errors
    /// [`ExchangeError::PickleGlobal`] if the pickle names a class or function beyond tensors and plain containers,
    /// [`ExchangeError::TorchFile`] or [`ExchangeError::Archive`] if the file is damaged or something else,
    /// [`FileError::Io`](crate::error::FileError::Io).
    pub fn open(path: &Path) -> Result<Self> {
        let archive = Archive::open(path)?;
        let damaged = |problem: String| Error::Exchange(ExchangeError::TorchFile { path: path.into(), problem });
        let pickles: Vec<_> = archive
            .entries()
            .iter()
            .filter(|entry| entry.name.strip_suffix("/data.pkl").is_some_and(|root| !root.contains('/')))
            .collect();
        let [pickle] = pickles.as_slice() else {
            return Err(damaged(format!("it has {} entries FOLDER/data.pkl instead of one", pickles.len())));
        };
        let root = pickle.name.trim_end_matches("data.pkl").to_string();
        if let Some(order) = archive.entry(&format!("{root}byteorder"))
            && archive.read(order, 100)? != b"little"
        {
            return Err(damaged("its numbers are not little-endian; save it on a little-endian machine".into()));
        }
        let content = match pickle::read(&archive.read(pickle, LARGEST_PICKLE)?) {
            Ok(content) => content,
            Err(Fault::Global(name)) => {
                return Err(Error::Exchange(ExchangeError::PickleGlobal { path: path.into(), name }));
            }
            Err(Fault::Damaged(problem)) => return Err(damaged(problem)),
        };
        Ok(Self { path: path.into(), archive, root, content })
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// A tensor's values in the order of its axes, converted to f32.
    ///
    /// # Errors
    /// [`ExchangeError::TorchFile`] if its storage is missing, or has another size or type.
    pub fn values(&self, tensor: &Tensor) -> Result<Vec<f32>> {
        let damaged = |problem: String| Error::Exchange(ExchangeError::TorchFile { path: self.path.clone(), problem });
        let name = format!("{}data/{}", self.root, tensor.storage);
        let entry = self.archive.entry(&name).ok_or_else(|| damaged(format!("the entry {name:?} is missing")))?;
        let size = tensor.element.size();
        let expected = (tensor.stored as u64).saturating_mul(size as u64);
        if entry.deflated || entry.size != expected {
            let problem =
                format!("the entry {name:?} has {} bytes instead of {expected}, or is compressed", entry.size);
            return Err(damaged(problem));
        }
        let number: fn(&[u8]) -> f32 = match tensor.element {
            Element::Double => |b| b.try_into().map_or(f32::NAN, |b| f64::from_le_bytes(b) as f32),
            Element::Float => |b| b.try_into().map_or(f32::NAN, f32::from_le_bytes),
            Element::Half => |b| b.try_into().map_or(f32::NAN, |b| f16::from_le_bytes(b).to_f32()),
            Element::BFloat16 => |b| b.try_into().map_or(f32::NAN, |b| bf16::from_le_bytes(b).to_f32()),
            other => return Err(damaged(format!("the storage {name:?} holds {other:?}, expected floats"))),
        };
        let bytes = self.archive.read(entry, expected)?;
        // Whatever the other extents say.
        if tensor.shape.contains(&0) {
            return Ok(Vec::new());
        }
        let mut places = vec![tensor.offset];
        for (&extent, &stride) in tensor.shape.iter().zip(&tensor.strides) {
            places = places.iter().flat_map(|&place| (0..extent).map(move |index| place + index * stride)).collect();
        }
        let at = |place: usize| bytes.get(place * size..(place + 1) * size).map_or(f32::NAN, number);
        Ok(places.into_iter().map(at).collect())
    }

    /// Whether every storage begins where it can be mapped into memory.
    ///
    /// # Errors
    /// [`ExchangeError::Archive`].
    pub fn is_aligned(&self) -> Result<bool> {
        let storages =
            self.archive.entries().iter().filter(|entry| entry.name.starts_with(&format!("{}data/", self.root)));
        for entry in storages {
            if self.archive.start(entry)? % ALIGNMENT != 0 {
                return Ok(false);
            }
        }
        Ok(true)
    }
}

/// Writes a file that `torch.load` reads, atomically. `storages` are the values of the tensors in `content`, by the
/// names of their storages.
///
/// # Errors
/// [`FileError::Io`](crate::error::FileError::Io), [`ExchangeError::Archive`].
pub fn write(path: &Path, content: &Value, storages: &[(String, &[f32])]) -> Result<()> {
    let root = path.file_stem().map_or_else(|| "archive".into(), |name| name.to_string_lossy().into_owned());
    let failed = |problem: String| Error::Exchange(ExchangeError::Archive { path: path.into(), problem });
    write_aside(path, "checkpoint", |file| {
        let target = BufWriter::new(File::create(file).map_err(Error::io(path, "write"))?);
        let mut archive = ZipArchiveWriter::new(target);
        let mut add = |name: &str, bytes: &[u8]| -> Result<()> {
            let name = format!("{root}/{name}");
            // The header's padding has a header of its own.
            let start = archive.stream_offset() + HEADER + name.len() as u64 + 4;
            let padding = vec![b'Z'; (start.next_multiple_of(ALIGNMENT) - start) as usize];
            let entry = archive.new_file(name.as_str()).extra_field(PADDING, &padding, Header::LOCAL);
            let (mut entry, config) =
                entry.and_then(|entry| entry.start()).map_err(|error| failed(error.to_string()))?;
            let mut data = config.wrap(&mut entry);
            data.write_all(bytes).map_err(Error::io(path, "write"))?;
            let (_, descriptor) = data.finish().map_err(|error| failed(error.to_string()))?;
            entry.finish(descriptor).map_err(|error| failed(error.to_string()))?;
            Ok(())
        };
        add("data.pkl", &pickle::write(content))?;
        add(".format_version", b"1")?;
        add(".storage_alignment", ALIGNMENT.to_string().as_bytes())?;
        add("byteorder", b"little")?;
        for (name, values) in storages {
            // Little-endian on every machine that this runs on, as the rest of the program assumes.
            add(&format!("data/{name}"), bytemuck::cast_slice(values))?;
        }
        add("version", b"3\n")?;
        let mut target = archive.finish().map_err(|error| failed(error.to_string()))?;
        target.flush().map_err(Error::io(path, "write"))
    })
}
