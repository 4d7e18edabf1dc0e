//! Choosing by measurement: which route is the fastest for each convolution of a network on this device. What was
//! measured is kept in a small file for later runs.
//!
//! Routes round differently, so results of a tuned run repeat bit for bit with the same file only. Untuned runs follow
//! a fixed rule.

use crate::device::Device;
use crate::error::{Error, FileError, NetworkError, Result};
use crate::io::write_atomically;
use crate::kernels::conv3d::{self, Pass, Policy, Problem, Route};
use crate::kernels::{Buffer, Context, Dtype, elementwise};
use crate::loss::deep_supervision_weights;
use crate::nn::{Network, UNetShape};
use crate::tape::{Tape, Var};
use crate::tensor::{Shape, Tensor};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Instant;

/// Each route is timed this often, and the shortest time counts.
const RUNS: usize = 5;
/// Measurements of another version are not used: its kernels may be others.
const MADE_BY: &str = concat!("voxgrad ", env!("CARGO_PKG_VERSION"));

const PASSES: [(Pass, &str); 3] =
    [(Pass::Forward, "forward"), (Pass::DataGradient, "data gradient"), (Pass::WeightGradient, "weight gradient")];
const DTYPES: [(Dtype, &str); 3] = [(Dtype::F32, "f32"), (Dtype::F16, "f16"), (Dtype::Bf16, "bf16")];

/// What was measured on one device.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Table {
    made_by: String,
    device: String,
    measured: Vec<Entry>,
}

/// One pass of one convolution.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Entry {
    batch: usize,
    /// Depth, height, width of the input.
    extent: [usize; 3],
    /// Of the first input, of the second, of the output.
    channels: [usize; 3],
    kernel: [usize; 3],
    stride: [usize; 3],
    dtype: String,
    pass: String,
    milliseconds: BTreeMap<String, f64>,
}

impl Table {
    /// Nothing measured yet on the device that [`identity`] names.
    pub fn new(device: &str) -> Self {
        Self { made_by: MADE_BY.into(), device: device.into(), measured: Vec::new() }
    }

    /// Reads what [`Table::write`] has written; an empty table if there is no file.
    ///
    /// # Errors
    /// [`NetworkError::Tuning`] for a file that is damaged, or of another device or version.
    pub fn read(path: &Path, device: &str) -> Result<Self> {
        let text = match std::fs::read_to_string(path) {
            Ok(text) => text,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Self::new(device)),
            Err(error) => return Err(Error::io(path, "read")(error)),
        };
        let unusable = |problem: String| Error::Network(NetworkError::Tuning { path: path.into(), problem });
        let table: Self = serde_json::from_str(&text).map_err(|error| unusable(error.to_string()))?;
        for (what, found, expected) in [("program", &*table.made_by, MADE_BY), ("device", &*table.device, device)] {
            if found != expected {
                return Err(unusable(format!("the {what} is `{found}`, not `{expected}`")));
            }
        }
        match table.measured.iter().position(|entry| entry.key().is_none() || entry.fastest().is_none()) {
            Some(entry) => Err(unusable(format!("measurement {entry} is not one of this program"))),
            None => Ok(table),
        }
    }

    /// Writes a measurement a line, and makes the folder.
    ///
    /// # Errors
    /// [`FileError::Io`].
    pub fn write(&self, path: &Path) -> Result<()> {
        let json = |value: &dyn Fn() -> serde_json::Result<String>| {
            value().map_err(|source| Error::File(FileError::Json { path: path.into(), source }))
        };
        let lines = (self.measured.iter())
            .map(|entry| json(&|| serde_json::to_string(entry)))
            .collect::<Result<Vec<_>>>()?
            .join(",\n");
        let made_by = json(&|| serde_json::to_string(&self.made_by))?;
        let device = json(&|| serde_json::to_string(&self.device))?;
        if let Some(folder) = path.parent() {
            std::fs::create_dir_all(folder).map_err(Error::io(folder, "create"))?;
        }
        let text = format!("{{\"made_by\": {made_by},\n\"device\": {device},\n\"measured\": [\n{lines}\n]}}\n");
        write_atomically(path, text.as_bytes())
    }

    /// Measures what is missing of `problems` with tensors of `dtype`, where there is more than one route. `observe` is
    /// told the shape, the pass, and the routes with their milliseconds. Returns how many were measured.
    ///
    /// # Errors
    /// If the device fails.
    pub fn complete(
        &mut self,
        context: &Context,
        problems: &[Problem],
        dtype: Dtype,
        mut observe: impl FnMut(&Problem, &str, &BTreeMap<String, f64>),
    ) -> Result<usize> {
        let known = self.policy();
        let mut count = 0;
        for problem in problems {
            for (pass, name) in PASSES {
                let routes = Route::applicable(problem, pass, dtype, context.caps());
                let is_known = known.choice(problem, pass, dtype).is_some_and(|route| routes.contains(&route));
                if routes.len() < 2 || is_known {
                    continue;
                }
                let milliseconds = measure(context, problem, pass, dtype, &routes)?;
                observe(problem, name, &milliseconds);
                self.measured.push(Entry {
                    batch: problem.batch(),
                    extent: problem.in_dims(),
                    channels: [problem.channels_in(), problem.second_channels(), problem.channels_out()],
                    kernel: problem.kernel(),
                    stride: problem.stride(),
                    dtype: name_of(&DTYPES, dtype).into(),
                    pass: name.into(),
                    milliseconds,
                });
                count += 1;
            }
        }
        Ok(count)
    }

    /// The policy that chooses the fastest routes.
    pub fn policy(&self) -> Policy {
        let mut policy = Policy::default();
        for entry in &self.measured {
            if let (Some((problem, pass, dtype)), Some(route)) = (entry.key(), entry.fastest()) {
                policy.choose(problem, pass, dtype, route);
            }
        }
        policy
    }
}

impl Entry {
    fn key(&self) -> Option<(Problem, Pass, Dtype)> {
        let [first, second, out] = self.channels;
        let problem = Problem::new(self.batch, self.extent, first, out, self.kernel, self.stride).ok()?;
        let problem = if second > 0 { problem.with_second_input(second).ok()? } else { problem };
        Some((problem, named(&PASSES, &self.pass)?, named(&DTYPES, &self.dtype)?))
    }

    fn fastest(&self) -> Option<Route> {
        let (name, _) = self.milliseconds.iter().min_by(|a, b| a.1.total_cmp(b.1))?;
        named(&Route::ALL, name)
    }
}

fn name_of<T: PartialEq>(names: &[(T, &'static str)], value: T) -> &'static str {
    names.iter().find(|(v, _)| *v == value).map_or("?", |(_, name)| name)
}

fn named<T: Copy>(names: &[(T, &str)], name: &str) -> Option<T> {
    names.iter().find(|(_, n)| *n == name).map(|(value, _)| *value)
}

/// Milliseconds of each route: the shortest of a few runs, compilation not counted.
fn measure(
    context: &Context,
    problem: &Problem,
    pass: Pass,
    dtype: Dtype,
    routes: &[Route],
) -> Result<BTreeMap<String, f64>> {
    let filled = |len: usize, dtype: Dtype| -> Result<Buffer> {
        let ones = context.empty(len, Dtype::F32)?;
        elementwise::fill(context, &ones, 1.0)?;
        if dtype == Dtype::F32 {
            return Ok(ones);
        }
        let buffer = context.empty(len, dtype)?;
        elementwise::cast(context, &ones, &buffer)?;
        Ok(buffer)
    };
    let second_len = problem.second_len();
    let x = filled(problem.input_len(), dtype)?;
    let second = (second_len > 0).then(|| filled(second_len, dtype)).transpose()?;
    let w = filled(problem.weight_len(), Dtype::F32)?;
    let y = filled(problem.output_len(), dtype)?;
    let mut milliseconds = BTreeMap::new();
    for &route in routes {
        let mut only = Policy::default();
        only.choose(problem.clone(), pass, dtype, route);
        let context = &only.on(context);
        let run = || -> Result<f64> {
            let start = Instant::now();
            let written = match pass {
                Pass::Forward => {
                    conv3d::forward(context, problem, &x, second.as_ref(), &w, None, &y)?;
                    &y
                }
                Pass::DataGradient => {
                    conv3d::backward_data(context, problem, &w, &y, &x, second.as_ref())?;
                    &x
                }
                Pass::WeightGradient => {
                    conv3d::backward_weight(context, problem, &x, second.as_ref(), &y, &w)?;
                    &w
                }
            };
            context.finish([written])?;
            Ok(start.elapsed().as_secs_f64() * 1e3)
        };
        run()?;
        let mut shortest = f64::INFINITY;
        for _ in 0..RUNS {
            shortest = shortest.min(run()?);
        }
        milliseconds.insert(route.name().into(), shortest);
    }
    Ok(milliseconds)
}

/// The convolutions of a network in training on batches of `batch` patches of `patch` voxels, each shape once, as a forward
/// pass on a dry context asks for them.
///
/// # Errors
/// If the network cannot be run on such a patch, or a tensor is larger than the kernels can count.
pub fn convolutions(context: &Context, shape: &UNetShape, batch: usize, patch: [usize; 3]) -> Result<Vec<Problem>> {
    let dry = context.dry();
    let network = Network::new(&dry, shape.clone(), 0)?;
    let input = Shape { batch, dims: patch, channels: shape.channels_in };
    let image = Var::data(Tensor::empty(&dry, input, Dtype::F32)?);
    let levels = deep_supervision_weights(shape.levels()).iter().filter(|&&weight| weight > 0.0).count();
    network.forward(&mut Tape::new(&dry), &image, levels)?;
    Ok(conv3d::computed(&dry))
}

/// What measurements depend on: runtime, name, and on a CPU the number of cores.
pub fn identity(device: &Device) -> String {
    let choice = device.found.choice.to_string();
    let runtime = choice.split(':').next().unwrap_or_default();
    let cores = device.context.caps().cores.map_or(String::new(), |cores| format!(", {cores} cores"));
    format!("{runtime}, {}{cores}", device.found.name)
}

/// The file for a device in the user's cache folder (`XDG_CACHE_HOME`, `LOCALAPPDATA` or `HOME/.cache`); `None` without one.
pub fn cache_file(identity: &str) -> Option<PathBuf> {
    let folder = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    let cache = folder("XDG_CACHE_HOME")
        .or_else(|| folder("LOCALAPPDATA"))
        .or_else(|| folder("HOME").map(|home| home.join(".cache")))?;
    let name: String = identity.chars().map(|c| if c.is_ascii_alphanumeric() { c } else { '-' }).collect();
    Some(cache.join("voxgrad").join(format!("convolutions-{name}.json")))
}
