//! Weights of another training to begin with.

use super::state::{self, canonical};
use super::torch::TorchFile;
use crate::error::{Error, ExchangeError, NetworkError, Result};
use crate::kernels::Context;
use crate::parameters::{Parameters, Slot};
use crate::train::{Checkpoint, Stored};
use half::{bf16, f16};
use safetensors::{Dtype, SafeTensors};
use std::fs::File;
use std::io::Read;
use std::path::Path;

/// How files of zip archives begin, those of `torch.save` among them.
const ZIP: &[u8] = b"PK\x03\x04";

/// Whether a file is a zip archive, by its first bytes.
///
/// # Errors
/// [`FileError::Io`](crate::error::FileError::Io).
pub(super) fn is_zip(path: &Path) -> Result<bool> {
    let mut begin = [0; ZIP.len()];
    let mut file = File::open(path).map_err(Error::io(path, "read"))?;
    let mut read = 0;
    while read < begin.len() {
        match file.read(&mut begin[read..]).map_err(Error::io(path, "read"))? {
            0 => return Ok(false),
            count => read += count,
        }
    }
    Ok(begin == ZIP)
}

/// Overwrites all weights of a network, except those of its segmentation heads, with the weights in a file: nnU-Net's
/// `checkpoint_*.pth`, voxgrad's safetensors, or safetensors of a state dict. Tensors that the network does not have
/// are left out, as nnU-Net does. Returns the number of parameters that were loaded.
///
/// # Errors
/// [`ExchangeError::StateDict`] with every parameter that is missing or has another shape: nothing is loaded then.
/// Those of [`TorchFile::open`], [`NetworkError::Checkpoint`], [`FileError::Io`](crate::error::FileError::Io).
pub fn load_pretrained(context: &Context, path: &Path, parameters: &Parameters) -> Result<usize> {
    let weights = weights_of(path)?;
    state::check_body(path, &weights, parameters)?;
    let own: Stored = (parameters.to_torch(context, Slot::Value)?.into_iter())
        .map(|(name, shape, values)| (name, (shape, values)))
        .collect();
    let chosen = |name: &str| if state::is_head(name) { own.get(name) } else { weights.get(name) };
    let find = |name: &str| chosen(name).map(|(shape, values)| (&shape[..], &values[..]));
    parameters.load_torch(context, Slot::Value, find)?;
    Ok(parameters.iter().filter(|parameter| !state::is_head(parameter.name())).count())
}

/// The weights in a file of any of the kinds.
fn weights_of(path: &Path) -> Result<Stored> {
    if !is_zip(path)? {
        return safetensors(path);
    }
    let file = TorchFile::open(path)?;
    let missing = || {
        Error::Exchange(ExchangeError::TorchFile { path: path.into(), problem: "it has no `network_weights`".into() })
    };
    state::weights(&file, file.content.get("network_weights").ok_or_else(missing)?)
}

fn safetensors(path: &Path) -> Result<Stored> {
    let failed = |problem: String| Error::Network(NetworkError::Checkpoint { path: path.into(), problem });
    let bytes = std::fs::read(path).map_err(Error::io(path, "read"))?;
    let file = SafeTensors::deserialize(&bytes)
        .map_err(|error| failed(format!("neither nnU-Net's .pth (a zip archive) nor safetensors: {error}")))?;
    if file.iter().any(|(name, _)| name.starts_with("network.")) {
        // voxgrad's own, whose checksum is looked at.
        return Ok(Checkpoint::read(path)?.network().clone());
    }
    let (mut weights, mut faults) = (Stored::new(), Vec::new());
    for (key, view) in file.iter() {
        let name = canonical(key);
        let data = view.data();
        let values: Vec<f32> = match view.dtype() {
            Dtype::F32 => data.as_chunks().0.iter().map(|&b| f32::from_le_bytes(b)).collect(),
            Dtype::F64 => data.as_chunks().0.iter().map(|&b| f64::from_le_bytes(b) as f32).collect(),
            Dtype::F16 => data.as_chunks().0.iter().map(|&b| f16::from_le_bytes(b).to_f32()).collect(),
            Dtype::BF16 => data.as_chunks().0.iter().map(|&b| bf16::from_le_bytes(b).to_f32()).collect(),
            other => {
                faults.push(format!("{key} holds {other:?}, expected floats"));
                continue;
            }
        };
        let found = (view.shape().to_vec(), values);
        if weights.get(&name).is_some_and(|other: &(Vec<usize>, Vec<f32>)| *other != found) {
            faults.push(format!("{key} and another name of the same tensor differ"));
        }
        weights.insert(name, found);
    }
    match faults.is_empty() {
        true => Ok(weights),
        false => Err(Error::Exchange(ExchangeError::StateDict { path: path.into(), faults })),
    }
}
