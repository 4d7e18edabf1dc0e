//! nnU-Net's experiment planner: from a fingerprint to spacing, patch, network and batch size.

use serde_json::{Map, Value, json};

use super::budget::Budget;
pub use super::budget::PlannerKind;
use super::fingerprint::{Fingerprint, percentile};
use super::topology::{Encoder, Topology};
use crate::dataset::plans::Plans;
use crate::dataset::{Dataset, DatasetJson};
use crate::error::{DatasetError, Error, PlanError, Result};
use crate::io;
use crate::preprocess::Normalization;

/// How much coarser an axis must be to count as anisotropic.
const ANISOTROPY_THRESHOLD: f64 = 3.0;
/// A low-resolution configuration is made if the patch covers less than this share of the median image.
const LOWRES_THRESHOLD: f64 = 0.25;
/// Growth of the spacing while looking for the low resolution.
const SPACING_GROWTH: f64 = 1.03;
/// Masked normalisation is used if cropping keeps less than this share.
const MASK_THRESHOLD: f64 = 0.75;
const SMALLEST_BATCH: f64 = 2.0;
const BASE_FEATURES: usize = 32;

/// A planner and its options.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Planner {
    /// Which planner.
    pub kind: PlannerKind,
    /// GPU memory to plan for; the planner's own default if absent.
    pub gpu_memory_gigabytes: Option<f64>,
    /// Target spacing (z, y, x) instead of the dataset's.
    pub target_spacing: Option<[f64; 3]>,
    /// Name of the plans instead of the planner's.
    pub plans_name: Option<String>,
}

impl Planner {
    /// Plans a dataset called `name` (`DatasetXXX_Name`).
    ///
    /// # Errors
    /// [`DatasetError::NoCases`] for an empty fingerprint, [`Error::Setting`] for a target spacing that is not positive or plans
    /// whose name cannot be that of a file, [`PlanError::ImagesTooSmall`] if no 3-D network of two stages fits the images.
    pub fn plan(&self, name: &str, dataset: &Dataset, fingerprint: &Fingerprint) -> Result<Plans> {
        self.plan_from_json(name, &dataset.json, fingerprint)
    }

    /// As [`plan`](Self::plan), for a dataset whose files are elsewhere.
    ///
    /// # Errors
    /// As [`plan`](Self::plan).
    pub fn plan_from_json(&self, name: &str, json: &DatasetJson, fingerprint: &Fingerprint) -> Result<Plans> {
        if fingerprint.spacings.is_empty() || fingerprint.spacings.len() != fingerprint.shapes_after_crop.len() {
            return Err(Error::Dataset(DatasetError::NoCases));
        }
        if let Some(name) = self.plans_name.as_deref().filter(|name| !io::is_file_name(name)) {
            return Err(Error::Setting {
                setting: "plans name",
                value: format!("{name:?}"),
                expected: "expected the name of a file, without `/`",
            });
        }
        let spacing = self.target_spacing.unwrap_or_else(|| target_spacing(fingerprint));
        if !spacing.iter().all(|s| s.is_finite() && *s > 0.0) {
            return Err(Error::Setting {
                setting: "target spacing",
                value: format!("{spacing:?}"),
                expected: "expected three positive numbers of millimetres",
            });
        }
        let transpose_forward = transpose(spacing);
        let transposed = |v: [f64; 3]| transpose_forward.map(|axis| v[axis]);
        let mut transpose_backward = [0; 3];
        for (to, &from) in transpose_forward.iter().enumerate() {
            transpose_backward[from] = to;
        }
        let shapes = fingerprint.shapes_after_crop.iter().map(|s| s.map(|n| n as f64));
        let resampled = shapes
            .clone()
            .zip(&fingerprint.spacings)
            .map(|(shape, from)| std::array::from_fn(|a| (from[a] / spacing[a] * shape[a]).round_ties_even()));
        let work = Planning {
            planner: self,
            budget: self.kind.budget(),
            json,
            fingerprint,
            spacing: transposed(spacing),
            median: transposed(medians(resampled)),
        };
        let median_spacing = transposed(medians(fingerprint.spacings.iter().copied()));
        let median_shape = transposed(medians(shapes));
        let properties = &fingerprint.foreground_intensity_properties_per_channel;
        Ok(Plans {
            dataset_name: name.into(),
            plans_name: work.plans_name().into(),
            original_median_spacing_after_transp: median_spacing.to_vec(),
            original_median_shape_after_transp: median_shape.map(|n| n.round_ties_even() as i64).to_vec(),
            image_reader_writer: "SimpleITKIO".into(),
            transpose_forward,
            transpose_backward,
            configurations: work.configurations()?,
            experiment_planner_used: work.budget.planner.into(),
            label_manager: "LabelManager".into(),
            foreground_intensity_properties_per_channel: properties.clone(),
            other: Map::new(),
        })
    }
}

/// Median spacing; a very coarse axis is refined towards the finest of its spacings in the dataset.
fn target_spacing(fingerprint: &Fingerprint) -> [f64; 3] {
    let mut target = medians(fingerprint.spacings.iter().copied());
    let shapes = fingerprint.shapes_after_crop.iter().map(|s| s.map(|n| n as f64));
    let size = medians(shapes);
    let worst = first_largest(target);
    let others = [0, 1, 2].into_iter().filter(|&axis| axis != worst);
    let coarsest_other = others.clone().map(|axis| target[axis]).fold(0.0, f64::max);
    let shortest_other = others.map(|axis| size[axis]).fold(f64::INFINITY, f64::min);
    let anisotropic =
        target[worst] > ANISOTROPY_THRESHOLD * coarsest_other && size[worst] * ANISOTROPY_THRESHOLD < shortest_other;
    if anisotropic {
        let spacings: Vec<f64> = fingerprint.spacings.iter().map(|s| s[worst]).collect();
        let fine = percentile(&spacings, 10.0);
        target[worst] = if fine < coarsest_other { coarsest_other + 1e-5 } else { fine };
    }
    target
}

/// The coarsest axis comes first, the others keep their order.
fn transpose(spacing: [f64; 3]) -> [usize; 3] {
    match first_largest(spacing) {
        0 => [0, 1, 2],
        1 => [1, 0, 2],
        _ => [2, 0, 1],
    }
}

fn first_largest(values: [f64; 3]) -> usize {
    let largest = values.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    values.iter().position(|&v| v == largest).unwrap_or(0)
}

fn medians(values: impl Iterator<Item = [f64; 3]>) -> [f64; 3] {
    let values: Vec<[f64; 3]> = values.collect();
    std::array::from_fn(|axis| {
        let along: Vec<f64> = values.iter().map(|v| v[axis]).collect();
        percentile(&along, 50.0)
    })
}

/// One planning run; axes are transposed.
struct Planning<'a> {
    planner: &'a Planner,
    budget: Budget,
    json: &'a DatasetJson,
    fingerprint: &'a Fingerprint,
    spacing: [f64; 3],
    /// Median shape at that spacing.
    median: [f64; 3],
}

/// What planning decides for one configuration.
struct Decision {
    spacing: Vec<f64>,
    median: Vec<f64>,
    topology: Topology,
    features: Vec<usize>,
    batch_size: usize,
}

impl Planning<'_> {
    fn plans_name(&self) -> &str {
        let name = self.planner.plans_name.as_deref();
        name.unwrap_or(self.budget.plans)
    }

    fn configurations(&self) -> Result<Map<String, Value>> {
        let training_cases = self.json.num_training as f64;
        let voxels = product(&self.median) * training_cases;
        let mut all = Map::new();
        let flat = self.decide(&self.spacing[1..], &self.median[1..], voxels);
        all.insert("2d".into(), self.describe("2d", &flat, true));
        // Upstream looks at the first axis only, and plans a volume for a slice that lies along another.
        if self.median.contains(&1.0) {
            return Ok(all);
        }
        let full = self.decide(&self.spacing, &self.median, voxels);
        full.check("3d_fullres")?;
        let low = self.low_resolution(&full);
        if let Some(low) = &low {
            let mut low = self.describe("3d_lowres", low, false);
            low["next_stage"] = "3d_cascade_fullres".into();
            all.insert("3d_lowres".into(), low);
        }
        let full = self.describe("3d_fullres", &full, low.is_some());
        all.insert("3d_fullres".into(), full);
        if low.is_some() {
            let cascade = json!({"inherits_from": "3d_fullres", "previous_stage": "3d_lowres"});
            all.insert("3d_cascade_fullres".into(), cascade);
        }
        Ok(all)
    }

    /// Coarsens the image until a patch covers a quarter of it; `None` if that is the case already, or if it takes less
    /// than halving the voxels.
    fn low_resolution(&self, full: &Decision) -> Option<Decision> {
        let full_voxels = product(&self.median);
        let mut spacing = self.spacing;
        let mut voxels = full_voxels;
        let mut patch_voxels = full.patch_voxels();
        let mut low = None;
        while patch_voxels / voxels < LOWRES_THRESHOLD {
            let coarsest = spacing.iter().copied().fold(0.0, f64::max);
            let fine = spacing.map(|s| coarsest / s > 2.0);
            let any_fine = fine.contains(&true);
            for (spacing, fine) in spacing.iter_mut().zip(fine) {
                if fine || !any_fine {
                    *spacing *= SPACING_GROWTH;
                }
            }
            let median: [f64; 3] = std::array::from_fn(|a| self.spacing[a] / spacing[a] * self.median[a]);
            voxels = product(&median);
            let dataset_voxels = voxels * self.json.num_training as f64;
            let rounded = median.map(f64::round_ties_even);
            let decision = self.decide(&spacing, &rounded, dataset_voxels);
            patch_voxels = decision.patch_voxels();
            low = Some(decision);
        }
        low.filter(|low| full_voxels / voxels >= 2.0 && low.check("3d_lowres").is_ok())
    }

    /// Patch, network and batch size for images of this spacing and median shape.
    fn decide(&self, spacing: &[f64], median: &[f64], dataset_voxels: f64) -> Decision {
        let three_d = spacing.len() == 3;
        let (reference, reference_batch) =
            if three_d { (self.budget.elements[0], 2.0) } else { (self.budget.elements[1], 12.0) };
        let gigabytes = self.planner.gpu_memory_gigabytes.unwrap_or(self.budget.gigabytes);
        let reference = reference * (gigabytes / self.budget.gigabytes);
        // Upstream scales the plain network's budget to its reference batch, the residual one's it does not.
        let allowed = match self.budget.encoder {
            Encoder::Plain => reference * reference_batch / 2.0,
            Encoder::Residual { .. } => reference,
        };
        let estimate = |topology: &Topology| {
            let features = features(topology.stages(), three_d);
            let outputs = self.json.labels.len();
            topology.feature_map_elements(&features, &self.budget.encoder, outputs)
        };

        let mut topology = Topology::new(spacing, &initial_patch(spacing, median));
        let mut elements = estimate(&topology);
        while elements > allowed {
            // The axis that covers most of the image is shortened by the divisor it has after shortening.
            let cover = |axis: usize| topology.patch[axis] as f64 / median[axis];
            let widest = (0..spacing.len()).fold(0, |best, axis| if cover(axis) >= cover(best) { axis } else { best });
            let mut patch: Vec<f64> = topology.patch.iter().map(|&n| n as f64).collect();
            let mut trial = patch.clone();
            trial[widest] -= topology.divisors[widest] as f64;
            let divisor = Topology::new(spacing, &trial).divisors[widest] as f64;
            patch[widest] -= divisor;
            if patch[widest] < 1.0 {
                break; // nothing left to shorten: the budget is smaller than any network
            }
            topology = Topology::new(spacing, &patch);
            elements = estimate(&topology);
        }
        let patch_voxels: f64 = topology.patch.iter().map(|&n| n as f64).product();
        let fitting = (reference / elements * reference_batch).round_ties_even();
        let covering = (dataset_voxels * self.budget.dataset_share / patch_voxels).round_ties_even();
        Decision {
            spacing: spacing.to_vec(),
            median: median.to_vec(),
            features: features(topology.stages(), three_d),
            topology,
            batch_size: fitting.min(covering).max(SMALLEST_BATCH) as usize,
        }
    }

    /// The configuration as plans files hold it.
    fn describe(&self, name: &str, decision: &Decision, batch_dice: bool) -> Value {
        let names = &self.json.channel_names;
        let schemes: Vec<_> = names.iter().map(|n| Normalization::of_channel_name(n)).collect();
        let crops = self.fingerprint.median_relative_size_after_cropping < MASK_THRESHOLD;
        let masked = schemes.iter().map(|&scheme| crops && scheme == Normalization::ZScore);
        let dims = decision.spacing.len();
        let stages = decision.topology.stages();
        let (class, blocks_key, blocks, decoder) = match &self.budget.encoder {
            Encoder::Plain => ("PlainConvUNet", "n_conv_per_stage", vec![2; stages], 2),
            Encoder::Residual { blocks } => {
                let last = blocks.len() - 1;
                let blocks = (0..stages).map(|stage| blocks[stage.min(last)]).collect();
                ("ResidualEncoderUNet", "n_blocks_per_stage", blocks, 1)
            }
        };
        // Residual planners share preprocessed data with the default one.
        let data_owner = match (&self.budget.encoder, name) {
            (Encoder::Residual { .. }, "2d" | "3d_fullres") => "nnUNetPlans",
            _ => self.plans_name(),
        };
        let resampling =
            |is_seg: bool, order: u8| json!({"is_seg": is_seg, "order": order, "order_z": 0, "force_separate_z": null});
        let function = "resample_data_or_seg_to_shape";
        json!({
            "data_identifier": format!("{data_owner}_{name}"),
            "preprocessor_name": "DefaultPreprocessor",
            "batch_size": decision.batch_size,
            "patch_size": decision.topology.patch,
            "median_image_size_in_voxels": decision.median,
            "spacing": decision.spacing,
            "normalization_schemes": schemes.iter().map(|s| s.class_name()).collect::<Vec<_>>(),
            "use_mask_for_norm": masked.collect::<Vec<_>>(),
            "resampling_fn_data": function,
            "resampling_fn_seg": function,
            "resampling_fn_data_kwargs": resampling(false, 3),
            "resampling_fn_seg_kwargs": resampling(true, 1),
            "resampling_fn_probabilities": function,
            "resampling_fn_probabilities_kwargs": resampling(false, 1),
            "architecture": {
                "network_class_name":
                    format!("dynamic_network_architectures.architectures.unet.{class}"),
                "arch_kwargs": {
                    "n_stages": stages,
                    "features_per_stage": decision.features,
                    "conv_op": format!("torch.nn.modules.conv.Conv{dims}d"),
                    "kernel_sizes": decision.topology.kernel_sizes,
                    "strides": decision.topology.strides,
                    blocks_key: blocks,
                    "n_conv_per_stage_decoder": vec![decoder; stages - 1],
                    "conv_bias": true,
                    "norm_op": format!("torch.nn.modules.instancenorm.InstanceNorm{dims}d"),
                    "norm_op_kwargs": {"eps": 1e-5, "affine": true},
                    "dropout_op": null,
                    "dropout_op_kwargs": null,
                    "nonlin": "torch.nn.LeakyReLU",
                    "nonlin_kwargs": {"inplace": true},
                },
                "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
            },
            "batch_dice": batch_dice,
        })
    }
}

impl Decision {
    /// A network without a lower resolution has nothing to decode from.
    fn check(&self, configuration: &'static str) -> Result<()> {
        match self.topology.stages() {
            stages @ ..2 => {
                Err(Error::Plan(PlanError::ImagesTooSmall { configuration, median: self.median.clone(), stages }))
            }
            _ => Ok(()),
        }
    }

    fn patch_voxels(&self) -> f64 {
        self.topology.patch.iter().map(|&n| n as f64).product()
    }
}

/// A patch of 256³ (2048²) voxels' worth with the proportions of a cube in millimetres, no larger than the median image.
fn initial_patch(spacing: &[f64], median: &[f64]) -> Vec<f64> {
    let dims = spacing.len() as f64;
    let whole: f64 = if spacing.len() == 3 { 256.0 } else { 2048.0 };
    let density: Vec<f64> = spacing.iter().map(|s| 1.0 / s).collect();
    let scale = (whole.powf(dims) / product(&density)).powf(1.0 / dims);
    let patch = density.iter().map(|d| (d * scale).round_ties_even());
    patch.zip(median).map(|(length, &median)| length.min(median)).collect()
}

fn features(stages: usize, three_d: bool) -> Vec<usize> {
    let most = if three_d { 320 } else { 512 };
    (0..stages).map(|s| (BASE_FEATURES << s.min(16)).min(most)).collect()
}

fn product(values: &[f64]) -> f64 {
    values.iter().product()
}
