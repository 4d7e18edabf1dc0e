//! `nnUNetPlans.json`: everything that planning decided, as training and inference need it.
//!
//! Configurations may inherit from each other; [`Plans::configuration`] resolves that. Unknown keys are kept, so that a
//! plans file can be read and written without loss.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::error::{Error, FileError, PlanError, Result};
use crate::io;

/// A plans file.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Plans {
    /// Name of the dataset planned for, `DatasetXXX_Name`.
    pub dataset_name: String,
    /// Name of these plans.
    pub plans_name: String,
    /// Median spacing of the dataset after transposition.
    #[serde(default)]
    pub original_median_spacing_after_transp: Vec<f64>,
    /// Median shape of the dataset after transposition.
    #[serde(default)]
    pub original_median_shape_after_transp: Vec<i64>,
    /// Class that reads images upstream.
    #[serde(default)]
    pub image_reader_writer: Value,
    /// Axis order after transposition.
    #[serde(default = "identity_transpose")]
    pub transpose_forward: [usize; 3],
    /// Its inverse.
    #[serde(default = "identity_transpose")]
    pub transpose_backward: [usize; 3],
    /// Configurations as written; resolve with [`Plans::configuration`].
    pub configurations: Map<String, Value>,
    /// Planner upstream.
    #[serde(default)]
    pub experiment_planner_used: Value,
    /// Label manager upstream.
    #[serde(default)]
    pub label_manager: Value,
    /// Intensity statistics by channel index.
    #[serde(default)]
    pub foreground_intensity_properties_per_channel: BTreeMap<String, IntensityProperties>,
    /// Keys this crate does not know.
    #[serde(flatten)]
    pub other: Map<String, Value>,
}

/// Statistics of foreground intensities of one channel over the dataset.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct IntensityProperties {
    /// Largest value.
    pub max: f64,
    /// Mean.
    pub mean: f64,
    /// Median.
    pub median: f64,
    /// Smallest value.
    pub min: f64,
    /// 0.5th percentile.
    pub percentile_00_5: f64,
    /// 99.5th percentile.
    pub percentile_99_5: f64,
    /// Population standard deviation.
    pub std: f64,
}

/// One configuration (`3d_fullres`, ...) with inheritance resolved.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Configuration {
    /// Folder of preprocessed data.
    pub data_identifier: String,
    /// Preprocessor upstream.
    pub preprocessor_name: String,
    /// Patches per step.
    pub batch_size: usize,
    /// Patch along the transposed axes; two entries for a 2-D configuration.
    pub patch_size: Vec<usize>,
    /// Median image size after resampling.
    #[serde(default)]
    pub median_image_size_in_voxels: Vec<f64>,
    /// Target spacing along the transposed axes.
    pub spacing: Vec<f64>,
    /// Normalisation class of each channel.
    pub normalization_schemes: Vec<String>,
    /// Whether each channel is normalised inside the non-zero mask.
    pub use_mask_for_norm: Vec<bool>,
    /// The network.
    pub architecture: Architecture,
    /// Whether Dice is computed over the batch as one volume.
    #[serde(default)]
    pub batch_dice: bool,
    /// Configuration whose predictions this one refines.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub previous_stage: Option<String>,
    /// Configuration that refines this one's predictions.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub next_stage: Option<String>,
    /// Resampling functions and keys this crate does not know.
    #[serde(flatten)]
    pub other: Map<String, Value>,
}

impl Configuration {
    /// Patch and spacing of a 3-D configuration.
    ///
    /// # Errors
    /// [`Error::Setting`] for a 2-D configuration.
    pub fn three_dimensional(&self) -> Result<([usize; 3], [f64; 3])> {
        match (self.patch_size.as_slice().try_into(), self.spacing.as_slice().try_into()) {
            (Ok(patch), Ok(spacing)) => Ok((patch, spacing)),
            _ => Err(Error::Setting {
                setting: "configuration",
                value: self.data_identifier.clone(),
                expected: "expected a 3-D configuration such as 3d_fullres",
            }),
        }
    }
}

/// A network by class name and arguments.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Architecture {
    /// Full name of the class upstream; its last part tells plain from residual encoders.
    pub network_class_name: String,
    /// Constructor arguments.
    pub arch_kwargs: ArchitectureArguments,
    /// Arguments that upstream imports by name.
    #[serde(rename = "_kw_requires_import", default)]
    pub kw_requires_import: Vec<String>,
}

/// Shape of a U-Net. Lists have one entry per stage, highest resolution first.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ArchitectureArguments {
    /// Number of encoder stages, bottleneck included.
    pub n_stages: usize,
    /// Channels of each stage.
    pub features_per_stage: Vec<usize>,
    /// Convolution class upstream.
    pub conv_op: String,
    /// Kernel of each stage.
    pub kernel_sizes: Vec<Vec<usize>>,
    /// Stride into each stage.
    pub strides: Vec<Vec<usize>>,
    /// Convolutions of each encoder stage (plain encoder).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub n_conv_per_stage: Option<Counts>,
    /// Residual blocks of each encoder stage (residual encoder).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub n_blocks_per_stage: Option<Counts>,
    /// Convolutions of each decoder stage.
    pub n_conv_per_stage_decoder: Counts,
    /// Whether convolutions have a bias; upstream's network has none unless told so.
    #[serde(default)]
    pub conv_bias: bool,
    /// Norm, dropout and nonlinearity, which [`Plans::check_network`] requires to be nnU-Net's defaults.
    #[serde(flatten)]
    pub other: Map<String, Value>,
}

/// One number for all stages, or one per stage.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Counts {
    /// The same for every stage.
    Same(usize),
    /// One per stage.
    Each(Vec<usize>),
}

impl Counts {
    /// The number for a stage, if it is listed.
    pub fn of_stage(&self, stage: usize) -> Option<usize> {
        match self {
            Counts::Same(count) => Some(*count),
            Counts::Each(counts) => counts.get(stage).copied(),
        }
    }
}

impl Plans {
    /// Reads a plans file.
    ///
    /// # Errors
    /// [`FileError::Io`], [`FileError::Json`] naming a missing or mistyped field, or [`FileError::NotAFileName`].
    pub fn read(path: &Path) -> Result<Self> {
        let text = fs::read_to_string(path).map_err(Error::io(path, "read"))?;
        let plans: Self =
            serde_json::from_str(&text).map_err(|source| Error::File(FileError::Json { path: path.into(), source }))?;
        plans.check_names(path)?;
        Ok(plans)
    }

    /// Refuses names that files and folders get, and that would lead out of the folder they belong to. `path` is where
    /// the plans come from.
    ///
    /// # Errors
    /// [`FileError::NotAFileName`] with all such names.
    pub fn check_names(&self, path: &Path) -> Result<()> {
        let plans = std::iter::once(("plans_name".to_owned(), self.plans_name.as_str()));
        let configurations = self.configurations.keys().map(|name| ("configurations".to_owned(), name.as_str()));
        let identifiers = self.configurations.iter().filter_map(|(name, fields)| {
            let identifier = fields.get("data_identifier")?.as_str()?;
            Some((format!("configurations.{name}.data_identifier"), identifier))
        });
        let wrong: Vec<String> = plans
            .chain(configurations)
            .chain(identifiers)
            .filter(|(_, name)| !io::is_file_name(name))
            .map(|(field, name)| format!("`{field}` has {name:?}"))
            .collect();
        match wrong.is_empty() {
            true => Ok(()),
            false => Err(Error::File(FileError::NotAFileName { path: path.into(), names: wrong.join(", ") })),
        }
    }

    /// Writes the plans with nnU-Net's indentation.
    ///
    /// # Errors
    /// [`FileError::Io`].
    pub fn write(&self, path: &Path) -> Result<()> {
        io::write_json(path, self)
    }

    /// A configuration by name, with everything it inherits.
    ///
    /// # Errors
    /// [`PlanError::ConfigurationMissing`], [`PlanError::ConfigurationCycle`], or [`FileError::Field`] for mistyped fields.
    pub fn configuration(&self, name: &str) -> Result<Configuration> {
        let mut merged = Map::new();
        let mut visited: Vec<&str> = Vec::new();
        let mut next = Some(name);
        while let Some(current) = next {
            if visited.contains(&current) {
                return Err(Error::Plan(PlanError::ConfigurationCycle { name: current.into() }));
            }
            visited.push(current);
            let fields = self.configurations.get(current).and_then(Value::as_object).ok_or_else(|| {
                Error::Plan(PlanError::ConfigurationMissing {
                    name: current.into(),
                    available: self.configurations.keys().cloned().collect(),
                })
            })?;
            // Children are merged first, so what is there already wins over what is inherited.
            for (key, value) in fields {
                if key != "inherits_from" && !merged.contains_key(key) {
                    merged.insert(key.clone(), value.clone());
                }
            }
            next = fields.get("inherits_from").and_then(Value::as_str);
        }
        let configuration: Configuration = serde_json::from_value(Value::Object(merged)).map_err(|error| {
            Error::File(FileError::Field {
                path: self.plans_name.clone().into(),
                field: format!("configurations.{name}"),
                problem: error.to_string(),
            })
        })?;
        configuration.check(name, &self.plans_name)?;
        Ok(configuration)
    }
}

impl Configuration {
    /// Lists of one length where the network needs it, so that building it cannot run past an end.
    fn check(&self, name: &str, plans: &str) -> Result<()> {
        let error = |field: &str, problem: String| {
            Error::File(FileError::Field {
                path: plans.into(),
                field: format!("configurations.{name}.{field}"),
                problem,
            })
        };
        if !io::is_file_name(&self.data_identifier) {
            let problem =
                format!("{:?} cannot be the name of a folder; write a name without `/`", self.data_identifier);
            return Err(error("data_identifier", problem));
        }
        let dims = self.patch_size.len();
        if !(dims == 2 || dims == 3) || self.patch_size.contains(&0) {
            let problem = format!("{:?} is not a 2-D or 3-D patch", self.patch_size);
            return Err(error("patch_size", problem));
        }
        if self.batch_size == 0 {
            return Err(error("batch_size", "must be at least 1".into()));
        }
        let positive = |s: &f64| s.is_finite() && *s > 0.0;
        if self.spacing.len() != dims || !self.spacing.iter().all(positive) {
            let problem = format!("{:?} is not a spacing of {dims} axes", self.spacing);
            return Err(error("spacing", problem));
        }
        if self.use_mask_for_norm.len() != self.normalization_schemes.len() {
            let problem = "must have one entry per normalization scheme".into();
            return Err(error("use_mask_for_norm", problem));
        }
        let net = &self.architecture.arch_kwargs;
        let stages = net.n_stages;
        let axes_fit = |list: &[Vec<usize>]| {
            list.len() == stages && list.iter().all(|axes| axes.len() == dims && !axes.contains(&0))
        };
        let counts_fit = |counts: &Counts, stages: usize| match counts {
            Counts::Same(count) => *count > 0,
            Counts::Each(list) => list.len() == stages && !list.contains(&0),
        };
        let encoder = match (&net.n_conv_per_stage, &net.n_blocks_per_stage) {
            (None, Some(blocks)) => ("n_blocks_per_stage", counts_fit(blocks, stages)),
            (convolutions, _) => ("n_conv_per_stage", convolutions.as_ref().is_some_and(|c| counts_fit(c, stages))),
        };
        let fits = [
            ("n_stages", stages >= 2),
            ("features_per_stage", net.features_per_stage.len() == stages && !net.features_per_stage.contains(&0)),
            ("kernel_sizes", axes_fit(&net.kernel_sizes)),
            ("strides", axes_fit(&net.strides)),
            encoder,
            ("n_conv_per_stage_decoder", counts_fit(&net.n_conv_per_stage_decoder, stages.saturating_sub(1))),
        ];
        match fits.into_iter().find(|(_, fits)| !fits) {
            None => Ok(()),
            Some((field, _)) => Err(error(
                &format!("architecture.arch_kwargs.{field}"),
                format!("does not describe a {dims}-D network of {stages} stages"),
            )),
        }
    }
}

fn identity_transpose() -> [usize; 3] {
    [0, 1, 2]
}
