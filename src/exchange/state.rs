//! nnU-Net's state dicts. PyTorch lists a tensor under every path that leads to it: the encoder belongs to the
//! decoder too, and each block is also a sequence of its modules. So a tensor of the encoder has four names.

use super::pickle::{Tensor, Value};
use super::torch::TorchFile;
use crate::error::{Error, ExchangeError, Result};
use crate::parameters::Parameters;
use crate::train::Stored;
use std::collections::BTreeMap;
use std::path::Path;

/// Names of modules and parameters in the order in which PyTorch lists them.
const ORDER: [&str; 15] = [
    "encoder",
    "decoder",
    "stem",
    "stages",
    "transpconvs",
    "seg_layers",
    "blocks",
    "convs",
    "conv1",
    "conv2",
    "skip",
    "conv",
    "norm",
    "weight",
    "bias",
];

/// A part of the names of the layers that make segmentations, which are the only ones that know the labels.
const HEADS: &str = ".seg_layers.";

/// The name under which a parameter is known here, of all that it has in a state dict.
pub fn canonical(key: &str) -> String {
    // Of networks trained on several GPUs.
    let key = key.strip_prefix("module.").unwrap_or(key);
    let key = if key.starts_with("decoder.encoder.") { &key["decoder.".len()..] } else { key };
    key.replace(".all_modules.0.", ".conv.").replace(".all_modules.1.", ".norm.")
}

/// Sorts parameters as PyTorch's optimiser lists them.
pub fn sorted<'a>(names: impl Iterator<Item = &'a String>) -> Vec<&'a str> {
    let rank = |part: &'a str| match part.parse::<usize>() {
        Ok(number) => (ORDER.len() + 1, number, ""),
        Err(_) => match ORDER.iter().position(|known| *known == part) {
            Some(place) => (place, 0, ""),
            None => (ORDER.len(), 0, part),
        },
    };
    let mut names: Vec<&str> = names.map(String::as_str).collect();
    names.sort_by_cached_key(|name| name.split('.').map(rank).collect::<Vec<_>>());
    names
}

/// Every key of the state dict of a network with these parameters, in PyTorch's order, beside the parameter's own name.
pub fn keys<'a>(names: &[&'a str]) -> Vec<(String, &'a str)> {
    let (encoder, decoder): (Vec<&str>, Vec<&str>) = names.iter().partition(|name| name.starts_with("encoder."));
    let listed = |prefix: &str, names: &[&'a str]| -> Vec<(String, &'a str)> {
        let blocks = names.chunk_by(|a, b| block(a).is_some() && block(a) == block(b));
        let of_block = |block: &[&'a str]| {
            let own = block.iter().map(|&name| (format!("{prefix}{name}"), name));
            let sequence = block.iter().filter_map(|&name| Some((format!("{prefix}{}", in_sequence(name)?), name)));
            own.chain(sequence).collect::<Vec<_>>()
        };
        blocks.flat_map(of_block).collect()
    };
    [listed("", &encoder), listed("decoder.", &encoder), listed("", &decoder)].concat()
}

/// The block of a convolution or norm.
fn block(name: &str) -> Option<&str> {
    let (module, _) = name.rsplit_once('.')?;
    let (block, layer) = module.rsplit_once('.')?;
    ["conv", "norm"].contains(&layer).then_some(block)
}

/// Its name as a member of the block's sequence.
fn in_sequence(name: &str) -> Option<String> {
    let (module, parameter) = name.rsplit_once('.')?;
    let (block, layer) = module.rsplit_once('.')?;
    let place = ["conv", "norm"].iter().position(|known| *known == layer)?;
    Some(format!("{block}.all_modules.{place}.{parameter}"))
}

/// The weights in a state dict, each once. All names of a tensor must agree to the bit.
///
/// # Errors
/// [`ExchangeError::StateDict`] with all that is no tensor of floats, and all names that disagree.
pub fn weights(file: &TorchFile, state: &Value) -> Result<Stored> {
    let Value::Dict(entries) = state else {
        return Err(Error::Exchange(ExchangeError::StateDict {
            path: file.path().into(),
            faults: vec!["the state dict is no dict".into()],
        }));
    };
    let (mut named, mut faults) = (BTreeMap::<String, Vec<(&str, &Tensor)>>::new(), Vec::new());
    for (key, value) in entries {
        match (key, value) {
            (Value::Text(key), Value::Tensor(tensor)) => named.entry(canonical(key)).or_default().push((key, tensor)),
            _ => faults.push(format!("{key:?} is no tensor under a name")),
        }
    }
    let mut weights = Stored::new();
    for (name, places) in named {
        let [(first, tensor), others @ ..] = places.as_slice() else { continue };
        let values = match file.values(tensor) {
            Ok(values) => values,
            Err(Error::Exchange(ExchangeError::TorchFile { problem, .. })) => {
                faults.push(format!("{first}: {problem}"));
                continue;
            }
            Err(other) => return Err(other),
        };
        for (other, place) in others.iter().filter(|(_, place)| place != tensor) {
            let same_bits = |a: &[f32]| a.iter().map(|v| v.to_bits()).eq(values.iter().map(|v| v.to_bits()));
            if place.shape != tensor.shape || !same_bits(&file.values(place)?) {
                faults.push(format!("{first} and {other} are the same tensor in nnU-Net's network, but differ here"));
            }
        }
        weights.insert(name, (tensor.shape.clone(), values));
    }
    match faults.is_empty() {
        true => Ok(weights),
        false => Err(Error::Exchange(ExchangeError::StateDict { path: file.path().into(), faults })),
    }
}

/// Whether weights are those of a network, name by name and shape by shape.
///
/// # Errors
/// [`ExchangeError::StateDict`] with all that are missing, misshapen, or not in the network.
pub fn check(path: &Path, weights: &Stored, parameters: &Parameters) -> Result<()> {
    let mut faults = misfits(weights, parameters, |_| true);
    let surplus = sorted(weights.keys()).into_iter().filter(|name| parameters.get(name).is_none());
    faults.extend(surplus.map(|name| format!("{name} is in the file, but not in the network")));
    match faults.is_empty() {
        true => Ok(()),
        false => Err(Error::Exchange(ExchangeError::StateDict { path: path.into(), faults })),
    }
}

/// As [`check`], but for all layers except the segmentation heads, and whatever else there is.
pub(super) fn check_body(path: &Path, weights: &Stored, parameters: &Parameters) -> Result<()> {
    let faults = misfits(weights, parameters, |name| !is_head(name));
    match faults.is_empty() {
        true => Ok(()),
        false => Err(Error::Exchange(ExchangeError::StateDict { path: path.into(), faults })),
    }
}

pub(super) fn is_head(name: &str) -> bool {
    name.contains(HEADS)
}

fn misfits(weights: &Stored, parameters: &Parameters, wanted: impl Fn(&str) -> bool) -> Vec<String> {
    let misfit = |name: &str, expected: Vec<usize>| match weights.get(name) {
        None => Some(format!("{name} is missing")),
        Some((shape, _)) if *shape != expected => Some(format!("{name} has shape {shape:?} instead of {expected:?}")),
        Some(_) => None,
    };
    let wanted = parameters.iter().filter(|parameter| wanted(parameter.name()));
    wanted.filter_map(|parameter| misfit(parameter.name(), parameter.kind().torch_shape())).collect()
}
