//! nnU-Net's augmentation of training patches: each function changes one sample, with parameters that the caller has
//! drawn.
//!
//! ```text
//! spatial          y(i) = x(A (i - (size - 1) / 2) + (source size - 1) / 2), trilinear, 0 outside; labels by a vote
//! noise            y = x + deviation * normal(counter)
//! blur             one axis at a time, normalised Gaussian taps, reflected at the borders
//! brightness       y = factor x
//! contrast         y = clamp(factor (x - mean) + mean, min, max)
//! low resolution   nearest voxel down, linear up
//! gamma            y = ((x - min) / (max - min))^exponent (max - min) + min, then the mean and deviation of before
//! finish           mirrors, sets masked channels to 0 outside of the annotated box, and stores the batch
//! ```
//!
//! The operations are those of batchgeneratorsv2 0.3.6 as nnU-Net 2.8.1 calls them.
//!
//! Layouts: a [`Patch`] is `[depth, height, width, channels]` in f32. Labels are *codes*: the label plus one, so that
//! code 0 is nnU-Net's label -1 (outside of the image, or of its non-zero part); u8, or u16 where labels exceed 254.
//! A batch holds samples one after the other, and `sample` is the index of one. Only [`finish`] turns codes into labels.
//!
//! Everything is memory-bound but the spatial sampling. On the CPU a unit owns rows along width, on a GPU a voxel.

mod blur;
mod finish;
mod intensity;
mod low_resolution;
mod noise;
mod patch;
mod range;
mod spatial;

pub use blur::{blur, gaussian_taps};
pub use finish::{Finish, finish};
pub use intensity::{brightness, contrast, gamma};
pub use low_resolution::low_resolution;
pub use noise::noise;
pub use patch::{Patch, Sample};
pub use spatial::{LabelRule, Movement, Region, spatial};
