//! One case, preprocessed as nnU-Net's `DefaultPreprocessor` does.

use ndarray::{Array3, Array4, Axis, s};

use super::crop::{BoundingBox, crop_to_nonzero, nonzero_mask};
use super::normalize::{ChannelNormalization, Normalization};
use super::{ClassLocations, RawCase, resample};
use crate::compat::Compat;
use crate::dataset::LabelManager;
use crate::dataset::plans::{Configuration, Plans};
use crate::error::{Error, PreprocessError, Result};
use crate::io::Geometry;

/// What is needed to put a segmentation back onto the raw grid.
#[derive(Debug, Clone, PartialEq)]
pub struct Properties {
    /// Spacing of the raw image in its own axis order.
    pub spacing: [f64; 3],
    /// Shape of the transposed image.
    pub shape_before_cropping: [usize; 3],
    /// The part that was kept, in transposed axes.
    pub bbox: BoundingBox,
    /// Its shape.
    pub shape_after_cropping: [usize; 3],
}

/// A case as training and inference see it.
#[derive(Debug, Clone)]
pub struct PreprocessedCase {
    /// Case identifier.
    pub name: String,
    /// Normalised channels, (channel, z, y, x).
    pub data: Array4<f32>,
    /// Labels; -1 is air outside the image. Without labels: 0 inside, -1 outside.
    pub seg: Array3<i16>,
    /// Sampled voxels of each class; empty without labels.
    pub class_locations: ClassLocations,
    /// The way back.
    pub properties: Properties,
    /// The raw grid.
    pub geometry: Geometry,
}

/// Preprocessing as one configuration of the plans prescribes it.
#[derive(Debug, Clone)]
pub struct Preprocessor {
    /// Target spacing along the transposed axes.
    pub spacing: [f64; 3],
    /// Axis order: transposed axis i is raw axis `transpose_forward[i]`.
    pub transpose_forward: [usize; 3],
    /// Normalisation of each channel.
    pub channels: Vec<ChannelNormalization>,
    /// Label rules.
    pub labels: LabelManager,
    /// Whether upstream's treatment of ignore-labelled air is reproduced.
    pub compat: Compat,
}

impl Preprocessor {
    /// Takes the settings from plans and one of their 3-D configurations.
    ///
    /// # Errors
    /// [`Error::Setting`] for a 2-D configuration, an unknown normalisation or an impossible axis order;
    /// [`PlanError::PlansUnsupported`](crate::error::PlanError::PlansUnsupported) for another preprocessor, other resampling or another reader.
    pub fn from_plans(
        plans: &Plans,
        configuration: &Configuration,
        labels: LabelManager,
        compat: Compat,
    ) -> Result<Self> {
        let (_, spacing) = configuration.three_dimensional()?;
        let mut axes = plans.transpose_forward;
        axes.sort_unstable();
        if axes != [0, 1, 2] {
            return Err(Error::Setting {
                setting: "transpose_forward",
                value: format!("{:?}", plans.transpose_forward),
                expected: "expected an order of the axes 0, 1, 2",
            });
        }
        plans.check_preprocessing(configuration)?;
        let properties = &plans.foreground_intensity_properties_per_channel;
        let channels = configuration.normalization_schemes.iter();
        let channels = channels
            .zip(&configuration.use_mask_for_norm)
            .enumerate()
            .map(|(channel, (class, &use_mask))| {
                Ok(ChannelNormalization {
                    scheme: Normalization::of_class_name(class)?,
                    use_mask,
                    intensity: properties.get(&channel.to_string()).copied(),
                })
            })
            .collect::<Result<_>>()?;
        Ok(Preprocessor { spacing, transpose_forward: plans.transpose_forward, channels, labels, compat })
    }

    /// Transpose, crop, normalise, resample, locate classes; in this order.
    ///
    /// # Errors
    /// [`PreprocessError::ChannelCount`], [`PreprocessError::ResampledTooLarge`], and the errors of [`ChannelNormalization::apply`].
    pub fn run(&self, raw: RawCase) -> Result<PreprocessedCase> {
        if raw.data.dim().0 != self.channels.len() {
            return Err(Error::Preprocess(PreprocessError::ChannelCount {
                case: raw.name,
                found: raw.data.dim().0,
                expected: self.channels.len(),
            }));
        }
        let [a, b, c] = self.transpose_forward;
        let data = raw.data.permuted_axes([0, a + 1, b + 1, c + 1]);
        let labels = raw.labels.map(|labels| labels.permuted_axes([a, b, c]));
        let (_, depth, height, width) = data.dim();

        let mask = nonzero_mask(data.view());
        let bbox = crop_to_nonzero(&mask);
        let [z, y, x] = bbox.map(|[start, end]| start..end);
        let mut data = data.slice(s![.., z.clone(), y.clone(), x.clone()]).as_standard_layout().into_owned();
        let mut mask = mask.slice(s![z.clone(), y.clone(), x.clone()]).to_owned();
        let labels = labels.map(|labels| labels.slice(s![z, y, x]).to_owned());
        let mut seg = labels.clone().unwrap_or_else(|| Array3::zeros(mask.dim()));
        seg.zip_mut_with(&mask, |label, &inside| {
            if *label == 0 && !inside {
                *label = -1;
            }
        });
        let properties = Properties {
            spacing: raw.geometry.spacing,
            shape_before_cropping: [depth, height, width],
            bbox,
            shape_after_cropping: mask.dim().into(),
        };

        self.normalization_mask(&mut mask, &seg);
        for (channel, normalization) in self.channels.iter().enumerate() {
            normalization.apply(channel, data.index_axis_mut(Axis(0), channel), &mask)?;
        }

        let spacing = self.transpose_forward.map(|axis| properties.spacing[axis]);
        let grid = resample::Grid::new(properties.shape_after_cropping, spacing, self.spacing)?;
        let data = resample::image(data, &grid);
        let seg = resample::segmentation(seg, &grid);
        let class_locations = match labels {
            Some(_) => ClassLocations::sample(seg.view(), &self.labels),
            None => ClassLocations::default(),
        };
        Ok(PreprocessedCase { name: raw.name, data, seg, class_locations, properties, geometry: raw.geometry })
    }

    /// Turns the non-zero mask into the mask of masked normalisation: everything labelled, and the image.
    ///
    /// Upstream takes `seg >= 0`, in which ignore-labelled air counts although it is outside at inference: mean,
    /// deviation and the air itself then differ between training and inference.
    fn normalization_mask(&self, mask: &mut Array3<bool>, seg: &Array3<i16>) {
        let ignore = match self.compat {
            Compat::Corrected => self.labels.ignore_label(),
            Compat::Nnunet => None,
        };
        mask.zip_mut_with(seg, |inside, &label| {
            *inside |= label >= 0 && Some(label) != ignore;
        });
    }
}
