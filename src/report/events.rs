//! TensorBoard's event files: records of TensorFlow's `TFRecord` format, each an `Event` message of protocol buffers
//! (tensorflow/core/lib/io/record_writer.h, tensorflow/core/util/event.proto). Scalars only.

use crate::error::{Error, Result};
use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};

/// An event file that scalars are added to.
#[derive(Debug)]
pub struct EventFile {
    path: PathBuf,
    file: File,
}

/// Fields of the messages: number and wire type in one byte.
mod field {
    pub const WALL_TIME: u8 = 1 << 3 | 1;
    pub const STEP: u8 = 2 << 3;
    pub const FILE_VERSION: u8 = 3 << 3 | 2;
    pub const SUMMARY: u8 = 5 << 3 | 2;
    pub const SESSION_LOG: u8 = 7 << 3 | 2;
    /// Of a summary.
    pub const VALUE: u8 = 1 << 3 | 2;
    /// Of a value.
    pub const TAG: u8 = 1 << 3 | 2;
    pub const SIMPLE_VALUE: u8 = 2 << 3 | 5;
    /// Of a session log.
    pub const STATUS: u8 = 1 << 3;
}

/// `SessionLog.START`: TensorBoard then forgets what older files say about this step and later ones.
const START: u8 = 1;

impl EventFile {
    /// Makes a file in the folder, for a training that goes on at `step` or begins at 0. `now`: seconds since 1970.
    ///
    /// # Errors
    /// [`FileError::Io`](crate::error::FileError::Io).
    pub fn create(folder: &Path, now: f64, step: usize) -> Result<Self> {
        fs::create_dir_all(folder).map_err(Error::io(folder, "create"))?;
        let path = folder.join(format!("events.out.tfevents.{}.voxgrad.{}", now as u64, std::process::id()));
        let file = OpenOptions::new().create(true).append(true).open(&path).map_err(Error::io(&path, "open"))?;
        let mut events = Self { path, file };
        events.record(&[time(now), message(field::FILE_VERSION, b"brain.Event:2")].concat())?;
        if step > 0 {
            let log = message(field::SESSION_LOG, &[field::STATUS, START]);
            events.record(&[time(now), number(field::STEP, step as u64), log].concat())?;
        }
        Ok(events)
    }

    /// Adds scalars of a step, each with its tag. What is no number is left out.
    ///
    /// # Errors
    /// [`FileError::Io`](crate::error::FileError::Io).
    pub fn add(&mut self, now: f64, step: usize, scalars: &[(String, f64)]) -> Result<()> {
        let mut summary = Vec::new();
        for (tag, value) in scalars.iter().filter(|(_, value)| value.is_finite()) {
            let mut content = message(field::TAG, tag.as_bytes());
            content.push(field::SIMPLE_VALUE);
            content.extend((*value as f32).to_le_bytes());
            summary.extend(message(field::VALUE, &content));
        }
        self.record(&[time(now), number(field::STEP, step as u64), message(field::SUMMARY, &summary)].concat())
    }

    fn record(&mut self, event: &[u8]) -> Result<()> {
        let length = (event.len() as u64).to_le_bytes();
        let mut record = length.to_vec();
        record.extend(masked_crc(&length).to_le_bytes());
        record.extend(event);
        record.extend(masked_crc(event).to_le_bytes());
        // In one piece: a reader sees a whole record or none, but for the moment of a crash.
        self.file.write_all(&record).map_err(Error::io(&self.path, "write"))
    }
}

fn time(now: f64) -> Vec<u8> {
    let mut bytes = vec![field::WALL_TIME];
    bytes.extend(now.to_le_bytes());
    bytes
}

fn number(field: u8, value: u64) -> Vec<u8> {
    let mut bytes = vec![field];
    varint(value, &mut bytes);
    bytes
}

fn message(field: u8, content: &[u8]) -> Vec<u8> {
    let mut bytes = number(field, content.len() as u64);
    bytes.extend(content);
    bytes
}

fn varint(mut value: u64, bytes: &mut Vec<u8>) {
    while value >= 0x80 {
        bytes.push(value as u8 | 0x80);
        value >>= 7;
    }
    bytes.push(value as u8);
}

/// CRC-32C, rotated and shifted as TFRecord has it: a sum over bytes that hold sums would be weak.
fn masked_crc(bytes: &[u8]) -> u32 {
    let crc = !bytes.iter().fold(!0u32, |mut crc, &byte| {
        crc ^= u32::from(byte);
        for _ in 0..8 {
            crc = (crc >> 1) ^ (if crc & 1 == 1 { 0x82F6_3B78 } else { 0 });
        }
        crc
    });
    crc.rotate_right(15).wrapping_add(0xA282_EAD8)
}
