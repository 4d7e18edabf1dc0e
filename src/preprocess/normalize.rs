//! Intensity normalisation, one scheme per channel.

use ndarray::{Array3, ArrayViewMut3};

use crate::dataset::plans::IntensityProperties;
use crate::error::{Error, PreprocessError, Result};

/// Guards divisions, as upstream.
const SMALLEST_DIVISOR: f64 = 1e-8;

/// nnU-Net's normalisation schemes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Normalization {
    /// Zero mean, unit variance; of the image or, masked, of its non-zero part.
    ZScore,
    /// Clip to the dataset's foreground percentiles, then subtract its mean and divide by its deviation.
    Ct,
    /// Minimum to 0, then divide by the maximum.
    RescaleTo01,
    /// 0..=255 to 0..=1.
    RgbTo01,
    /// Values as they are.
    None,
}

impl Normalization {
    /// The scheme that a channel name of `dataset.json` selects (case does not matter; unknown names mean z-score).
    pub fn of_channel_name(name: &str) -> Self {
        match name.to_lowercase().as_str() {
            "ct" => Normalization::Ct,
            "nonorm" => Normalization::None,
            "rescale_to_0_1" => Normalization::RescaleTo01,
            "rgb_to_0_1" => Normalization::RgbTo01,
            _ => Normalization::ZScore,
        }
    }

    /// Class name in plans files.
    pub fn class_name(self) -> &'static str {
        match self {
            Normalization::ZScore => "ZScoreNormalization",
            Normalization::Ct => "CTNormalization",
            Normalization::RescaleTo01 => "RescaleTo01Normalization",
            Normalization::RgbTo01 => "RGBTo01Normalization",
            Normalization::None => "NoNormalization",
        }
    }

    /// Inverse of [`class_name`](Self::class_name).
    ///
    /// # Errors
    /// [`Error::Setting`] for a class this crate does not know.
    pub fn of_class_name(name: &str) -> Result<Self> {
        [
            Normalization::ZScore,
            Normalization::Ct,
            Normalization::RescaleTo01,
            Normalization::RgbTo01,
            Normalization::None,
        ]
        .into_iter()
        .find(|scheme| scheme.class_name() == name)
        .ok_or_else(|| Error::Setting {
            setting: "normalization_schemes",
            value: name.into(),
            expected: "expected a normalization class of nnU-Net",
        })
    }
}

/// How one channel is normalised.
#[derive(Debug, Clone, PartialEq)]
pub struct ChannelNormalization {
    /// The scheme.
    pub scheme: Normalization,
    /// Whether z-score looks at and changes only masked voxels.
    pub use_mask: bool,
    /// The dataset's statistics of this channel, for CT.
    pub intensity: Option<IntensityProperties>,
}

impl ChannelNormalization {
    /// Normalises one channel in place. `mask` is the part of the image that counts if `use_mask` is set; voxels outside
    /// keep their values.
    ///
    /// # Errors
    /// [`PreprocessError::IntensityMissing`] for CT without statistics, [`PreprocessError::NotRgb`] for values outside 0..=255.
    pub fn apply(&self, channel: usize, mut data: ArrayViewMut3<f32>, mask: &Array3<bool>) -> Result<()> {
        match self.scheme {
            Normalization::None => {}
            Normalization::ZScore if self.use_mask => {
                let masked = data.iter().zip(mask).filter(|(_, inside)| **inside);
                let (mean, std) = mean_and_deviation(masked.map(|(value, _)| *value));
                data.zip_mut_with(mask, |value, &inside| {
                    if inside {
                        *value = (*value - mean) / std;
                    }
                });
            }
            Normalization::ZScore => {
                let (mean, std) = mean_and_deviation(data.iter().copied());
                data.mapv_inplace(|value| (value - mean) / std);
            }
            Normalization::Ct => {
                let p = self.intensity.ok_or(Error::Preprocess(PreprocessError::IntensityMissing { channel }))?;
                let (low, high) = (p.percentile_00_5 as f32, p.percentile_99_5 as f32);
                let (mean, std) = (p.mean as f32, p.std.max(SMALLEST_DIVISOR) as f32);
                // Not f32::clamp, which panics on statistics whose percentiles are out of order.
                data.mapv_inplace(|value| (value.max(low).min(high) - mean) / std);
            }
            Normalization::RescaleTo01 => {
                let low = data.iter().copied().fold(f32::INFINITY, f32::min);
                data.mapv_inplace(|value| value - low);
                let high = data.iter().copied().fold(0.0, f32::max);
                let divisor = high.max(SMALLEST_DIVISOR as f32);
                data.mapv_inplace(|value| value / divisor);
            }
            Normalization::RgbTo01 => {
                if let Some(&value) = data.iter().find(|v| !(0.0..=255.0).contains(*v)) {
                    return Err(Error::Preprocess(PreprocessError::NotRgb { channel, value }));
                }
                data.mapv_inplace(|value| value / 255.0);
            }
        }
        Ok(())
    }
}

/// Mean and population standard deviation, accumulated in f64; (0, 1e-8) of nothing.
fn mean_and_deviation(values: impl Iterator<Item = f32> + Clone) -> (f32, f32) {
    let (mut count, mut sum) = (0usize, 0.0);
    for value in values.clone() {
        count += 1;
        sum += f64::from(value);
    }
    let count = count.max(1) as f64;
    let mean = sum / count;
    let squares: f64 = values.map(|value| (f64::from(value) - mean).powi(2)).sum();
    let std = (squares / count).sqrt().max(SMALLEST_DIVISOR);
    (mean as f32, std as f32)
}
