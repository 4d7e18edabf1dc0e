//! One case: read and checked, then preprocessed as nnU-Net's `DefaultPreprocessor` does.

use ndarray::{Array3, Array4, ArrayView3, Axis, s};
use rayon::prelude::*;

use super::crop::{BoundingBox, crop_to_nonzero, nonzero_mask};
use super::normalize::{ChannelNormalization, Normalization};
use super::{ClassLocations, resample};
use crate::compat::Compat;
use crate::dataset::plans::{Configuration, Plans};
use crate::dataset::{CaseFiles, LabelManager};
use crate::error::{Error, Result};
use crate::io::{self, Geometry};

/// Images and labels of a case as stored, on one grid.
#[derive(Debug, Clone)]
pub struct RawCase {
    /// Case identifier.
    pub name: String,
    /// Channels in (channel, z, y, x) order.
    pub data: Array4<f32>,
    /// Labels, if the case has them.
    pub labels: Option<Array3<i16>>,
    /// The grid, taken from the first channel.
    pub geometry: Geometry,
    /// What looks odd but does not stop anything, such as a label map placed elsewhere than its image.
    pub warnings: Vec<String>,
}

impl RawCase {
    /// Reads a case and checks that its files belong together.
    ///
    /// # Errors
    /// [`Error::ChannelShape`], [`Error::ChannelSpacing`], [`Error::NonFiniteVoxel`], [`Error::LabelShape`],
    /// [`Error::LabelSpacing`], [`Error::UnexpectedLabel`], and the errors of reading NIfTI.
    pub fn read(files: &CaseFiles, labels: &LabelManager) -> Result<Self> {
        match Self::inspect(files, labels) {
            (Some(raw), _) => Ok(raw),
            (None, failures) => Err(failures.into_iter().next().unwrap_or(Error::ChannelCount {
                case: files.name.clone(),
                found: 0,
                expected: 1,
            })),
        }
    }

    /// As [`read`](Self::read), but with everything that is wrong with the files. The case is there if nothing is.
    pub fn inspect(files: &CaseFiles, labels: &LabelManager) -> (Option<Self>, Vec<Error>) {
        let read: Vec<Result<io::Image>> = files.images.par_iter().map(|path| io::read_image(path)).collect();
        let (mut images, mut failures) = (Vec::with_capacity(read.len()), Vec::new());
        for (path, image) in files.images.iter().zip(read) {
            match image {
                Ok(image) => images.push((path, image)),
                Err(error) => failures.push(error),
            }
        }
        let Some((_, first)) = images.first() else {
            failures.extend(files.label.as_ref().and_then(|path| io::read_labels(path).err()));
            return (None, failures);
        };
        let shape: [usize; 3] = first.data.dim().into();
        let geometry = first.geometry.clone();
        let mut raw = RawCase {
            name: files.name.clone(),
            data: Array4::zeros((images.len(), shape[0], shape[1], shape[2])),
            labels: None,
            geometry,
            warnings: Vec::new(),
        };
        for (channel, (path, image)) in images.into_iter().enumerate() {
            failures.extend(raw.attach_channel(channel, path, image).err());
        }
        if let Some(path) = &files.label {
            failures.extend(raw.attach_labels(path, labels).err());
        }
        (failures.is_empty().then_some(raw), failures)
    }

    fn attach_channel(&mut self, channel: usize, path: &std::path::Path, image: io::Image) -> Result<()> {
        let (_, depth, height, width) = self.data.dim();
        let expected = [depth, height, width];
        let case = || self.name.clone();
        let found: [usize; 3] = image.data.dim().into();
        if found != expected {
            return Err(Error::ChannelShape { case: case(), path: path.into(), found, expected });
        }
        if !close(image.geometry.spacing, self.geometry.spacing) {
            return Err(Error::ChannelSpacing {
                case: case(),
                path: path.into(),
                found: image.geometry.spacing,
                expected: self.geometry.spacing,
            });
        }
        if let Some((voxel, value)) = find(image.data.view(), |v| !v.is_finite()) {
            return Err(Error::NonFiniteVoxel { case: case(), path: path.into(), value, voxel });
        }
        if !image.geometry.same_placement(&self.geometry, expected) {
            self.warnings.push(format!(
                "case {}: {} lies elsewhere in the world than the first channel",
                self.name,
                path.display()
            ));
        }
        self.data.index_axis_mut(Axis(0), channel).assign(&image.data);
        Ok(())
    }

    fn attach_labels(&mut self, path: &std::path::Path, labels: &LabelManager) -> Result<()> {
        let map = io::read_labels(path)?;
        let (_, depth, height, width) = self.data.dim();
        let expected = [depth, height, width];
        let found: [usize; 3] = map.data.dim().into();
        if found != expected {
            return Err(Error::LabelShape { case: self.name.clone(), path: path.into(), found, expected });
        }
        if !close(map.geometry.spacing, self.geometry.spacing) {
            return Err(Error::LabelSpacing {
                case: self.name.clone(),
                path: path.into(),
                found: map.geometry.spacing,
                expected: self.geometry.spacing,
            });
        }
        if !map.geometry.same_placement(&self.geometry, expected) {
            self.warnings.push(format!(
                "case {}: label map {} lies elsewhere in the world than the image; is an axis flipped?",
                self.name,
                path.display()
            ));
        }
        let declared = labels.expected_labels();
        if let Some((voxel, value)) = find(map.data.view(), |label| !declared.contains(&label)) {
            return Err(Error::UnexpectedLabel {
                case: self.name.clone(),
                path: path.into(),
                value,
                voxel,
                expected: declared,
            });
        }
        self.labels = Some(map.data);
        Ok(())
    }
}

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
    /// [`Error::PlansUnsupported`] for another preprocessor, other resampling or another reader.
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
    /// [`Error::ChannelCount`], [`Error::ResampledTooLarge`], and the errors of [`ChannelNormalization::apply`].
    pub fn run(&self, raw: RawCase) -> Result<PreprocessedCase> {
        if raw.data.dim().0 != self.channels.len() {
            return Err(Error::ChannelCount { case: raw.name, found: raw.data.dim().0, expected: self.channels.len() });
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

/// numpy's `allclose` with its default tolerances.
fn close(a: [f64; 3], b: [f64; 3]) -> bool {
    a.iter().zip(b).all(|(a, b)| (a - b).abs() <= 1e-8 + 1e-5 * b.abs())
}

/// First voxel (z, y, x) with a property.
fn find<T: Copy>(data: ArrayView3<T>, wanted: impl Fn(T) -> bool) -> Option<([usize; 3], T)> {
    // Usually there is none: a plain walk finds that out sooner than one that keeps its place.
    if !data.iter().any(|&value| wanted(value)) {
        return None;
    }
    data.indexed_iter().find(|(_, value)| wanted(**value)).map(|((z, y, x), value)| ([z, y, x], *value))
}
