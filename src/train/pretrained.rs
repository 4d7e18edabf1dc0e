//! Weights of a trained network that another training begins with.

use super::Checkpoint;
use super::checkpoint::Stored;
use crate::error::{Error, Result, TrainError};
use crate::kernels::Context;
use crate::parameters::{Parameters, Slot};
use std::collections::HashMap;
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

/// Part of the names of parameters that belong to a dataset's labels and are not taken over, as in nnU-Net.
const SEGMENTATION_LAYERS: &str = ".seg_layers.";
/// What PyTorch's files begin with: they are zip archives.
const ZIP: [u8; 4] = *b"PK\x03\x04";

/// The weights of a file, by nnU-Net's names of parameters, in PyTorch's layout.
#[derive(Clone, Debug)]
pub struct Pretrained {
    path: PathBuf,
    weights: Stored,
}

impl Pretrained {
    /// Reads a checkpoint of voxgrad. This is the place where kinds of files are told apart.
    ///
    /// # Errors
    /// [`FileError::Io`](crate::error::FileError::Io), [`NetworkError::Checkpoint`](crate::error::NetworkError::Checkpoint)
    /// for a damaged file, [`TrainError::Pretrained`] for one of PyTorch's.
    pub fn read(path: &Path) -> Result<Self> {
        let mut first = Vec::new();
        File::open(path)
            .and_then(|file| file.take(ZIP.len() as u64).read_to_end(&mut first))
            .map_err(Error::io(path, "read"))?;
        if first == ZIP {
            let problem = "it is a file of PyTorch (.pth), which is not read here; give a checkpoint of voxgrad";
            return Err(TrainError::Pretrained { path: path.into(), problem: problem.into() }.into());
        }
        Ok(Self { path: path.into(), weights: Checkpoint::read(path)?.into_network() })
    }

    /// Overwrites all parameters but those of the layers that make the segmentation, and returns their number.
    ///
    /// # Errors
    /// [`TrainError::Pretrained`] with all parameters that are missing or of another shape.
    pub fn load_into(&self, context: &Context, parameters: &Parameters) -> Result<usize> {
        let (mut loaded, mut faults) = (0, Vec::new());
        let mut all = HashMap::new();
        for (name, shape, fresh) in parameters.to_torch(context, Slot::Value)? {
            let given = (!name.contains(SEGMENTATION_LAYERS)).then(|| self.weights.get(&name));
            let values = match given {
                None => fresh,
                Some(Some((found, values))) if *found == shape => {
                    loaded += 1;
                    values.clone()
                }
                Some(Some((found, _))) => {
                    faults.push(format!("{name} has shape {found:?}, this network has {shape:?}"));
                    continue;
                }
                Some(None) => {
                    faults.push(format!("{name} is missing"));
                    continue;
                }
            };
            all.insert(name, (shape, values));
        }
        if let Some(first) = faults.first() {
            let problem = match faults.len() {
                1 => format!("another architecture: {first}"),
                n => format!("another architecture: {first}, and {} more such parameters", n - 1),
            };
            return Err(TrainError::Pretrained { path: self.path.clone(), problem }.into());
        }
        let find = |name: &str| all.get(name).map(|(shape, values)| (&shape[..], &values[..]));
        parameters.load_torch(context, Slot::Value, find)?;
        Ok(loaded)
    }
}
