//! The network's batches, made of the loader's.

use super::draw::Draw;
use super::recipe::{Geometry, Recipe, Transforms};
use crate::error::{Error, Result, TrainError};
use crate::kernels::augment::{self as kernels, Finish, Movement, Patch, Region, Sample};
use crate::kernels::{Buffer, Context, Dtype, KernelError};
use crate::sample::Batch;
use crate::tensor::{Shape, Tensor};
use rand_chacha::ChaCha8Rng;

/// Makes the network's batches of the loader's.
#[derive(Clone, Debug)]
pub struct Augmenter {
    recipe: Recipe,
    geometry: Geometry,
    mirror: [bool; 3],
    masked: Vec<bool>,
    largest_label: i16,
    dtype: Dtype,
}

impl Augmenter {
    /// For patches of `patch` voxels. `mirror` are the axes that may be mirrored, `masked` the channels that are 0 outside of
    /// the non-zero part of a case (nnU-Net's `use_mask_for_norm`), `largest_label` includes the ignore label, `dtype` is
    /// the images' on the device.
    pub fn new(
        recipe: Recipe,
        patch: [usize; 3],
        mirror: [bool; 3],
        masked: &[bool],
        largest_label: i16,
        dtype: Dtype,
    ) -> Self {
        // Without nnU-Net's transforms there is no masking either.
        let masked = if recipe.transforms == Transforms::Nnunet { masked.to_vec() } else { Vec::new() };
        Self { recipe, geometry: recipe.geometry(patch), mirror, masked, largest_label, dtype }
    }

    /// Sizes: what the loader has to cut out, and what comes of it.
    pub fn geometry(&self) -> &Geometry {
        &self.geometry
    }

    /// The most bytes of device memory at once, beside those of the batch that is made: one sample after the other.
    pub fn bytes(&self, channels: usize) -> u64 {
        let [source, patch] = [self.geometry.initial, self.geometry.patch].map(|dims| dims.iter().product::<usize>());
        let code = self.code_dtype().size();
        (source * (channels * 4 + code) + patch * (2 * channels * 4 + code)) as u64
    }

    /// Draws for every sample, and makes the batch: images `[batch, depth, height, width, channels]`, and labels in u8, or
    /// u16 where they exceed 255.
    ///
    /// # Errors
    /// What the device reports, or [`KernelError::Shape`](crate::kernels::KernelError::Shape) for a batch of other extents
    /// than [`Augmenter::geometry`].
    pub fn batch(&self, context: &Context, raw: &Batch, rng: &mut ChaCha8Rng) -> Result<(Tensor, Buffer)> {
        let draws = self.draw(raw, rng);
        self.apply(context, raw, &draws)
    }

    /// Parameters for every sample of a batch.
    pub fn draw(&self, raw: &Batch, rng: &mut ChaCha8Rng) -> Vec<Draw> {
        let draw = |_| Draw::new(self.recipe.transforms, &self.geometry, self.mirror, raw.channels, rng);
        (0..raw.size).map(draw).collect()
    }

    /// Uploads labels from 0 on as the loss takes them: u8, or u16 where declared labels exceed 255.
    ///
    /// # Errors
    /// [`TrainError::LabelBeyondDeclared`], or what the device reports.
    pub fn upload_labels(&self, context: &Context, labels: &[i16]) -> Result<Buffer> {
        self.check(labels)?;
        let labels = labels.iter().map(|&label| label.max(0) as u16);
        Ok(match self.label_dtype() {
            Dtype::U8 => context.upload(&labels.map(|label| label as u8).collect::<Vec<_>>(), Dtype::U8)?,
            _ => context.upload(&labels.collect::<Vec<_>>(), Dtype::U16)?,
        })
    }

    /// Makes the batch with these parameters, one for every sample.
    ///
    /// # Errors
    /// As [`Augmenter::batch`].
    pub fn apply(&self, context: &Context, raw: &Batch, draws: &[Draw]) -> Result<(Tensor, Buffer)> {
        let patch = Patch::new(self.geometry.patch, raw.channels)?;
        if raw.patch != self.geometry.initial {
            let problem = KernelError::shape("augmentation", "patch", self.geometry.initial, raw.patch);
            return Err(problem.into());
        }
        self.check(&raw.labels)?;
        let shape = Shape { batch: raw.size, dims: self.geometry.patch, channels: raw.channels };
        let out = Tensor::empty(context, shape, self.dtype)?;
        let target = context.empty(shape.voxels(), self.label_dtype())?;
        for (index, draw) in draws.iter().enumerate() {
            let to = Sample { patch, image: out.buffer(), labels: &target, index };
            let how = Finish { mirror: draw.mirror, masked: &self.masked };
            let (image, codes) = self.moved(context, raw, index, &patch, draw)?;
            let image = changed(context, &patch, image, draw)?;
            kernels::finish(context, &Sample { patch, image: &image, labels: &codes, index: 0 }, &to, how)?;
        }
        Ok((out, target))
    }

    /// Image and codes of a sample of the patch's size: the middle of what was cut out, or rotated and scaled. Only what is
    /// looked at is uploaded: a patch with its margins for every rotation is several times as large.
    fn moved(
        &self,
        context: &Context,
        raw: &Batch,
        index: usize,
        patch: &Patch,
        draw: &Draw,
    ) -> Result<(Buffer, Buffer)> {
        let Some(matrix) = draw.matrix() else {
            let centre = Region::centre(raw.patch, patch.dims()).ok_or_else(|| larger(raw.patch, patch.dims()))?;
            return self.upload(context, raw, index, centre);
        };
        let region = Region::touched(raw.patch, matrix, patch.dims());
        let (image, codes) = self.upload(context, raw, index, region)?;
        let source = Patch::new(region.dims, raw.channels)?;
        let from = Sample { patch: source, image: &image, labels: &codes, index: 0 };
        let movement = Movement { matrix, region, rule: self.recipe.label_rule() };
        let (image, codes) =
            (context.empty(patch.elements(), Dtype::F32)?, context.empty(patch.voxels(), codes.dtype())?);
        kernels::spatial(context, &from, &movement, patch, &image, &codes)?;
        Ok((image, codes))
    }

    /// The region of a sample on the device: image, and labels plus one.
    fn upload(&self, context: &Context, raw: &Batch, index: usize, region: Region) -> Result<(Buffer, Buffer)> {
        let image = context.upload_owned(cut(raw.image_of(index), &region, raw.channels, |value| value), Dtype::F32)?;
        let labels = raw.labels_of(index);
        // Preprocessing writes no label below -1.
        let code = |label: i16| label.max(-1).wrapping_add(1);
        let codes = match self.code_dtype() {
            Dtype::U8 => context.upload_owned(cut(labels, &region, 1, |label| code(label) as u8), Dtype::U8)?,
            _ => context.upload_owned(cut(labels, &region, 1, |label| code(label) as u16), Dtype::U16)?,
        };
        Ok((image, codes))
    }

    fn code_dtype(&self) -> Dtype {
        if self.largest_label > 254 { Dtype::U16 } else { Dtype::U8 }
    }

    fn label_dtype(&self) -> Dtype {
        if self.largest_label > 255 { Dtype::U16 } else { Dtype::U8 }
    }

    fn check(&self, labels: &[i16]) -> Result<()> {
        let found = labels.iter().copied().max().unwrap_or(0);
        match found > self.largest_label {
            true => Err(Error::Train(TrainError::LabelBeyondDeclared { found, largest: self.largest_label })),
            false => Ok(()),
        }
    }
}

/// The region's values of a volume `[depth, height, width, channels]`.
fn cut<T: Copy, U>(volume: &[T], region: &Region, channels: usize, convert: impl Fn(T) -> U) -> Vec<U> {
    let [depth, height, width] = region.dims;
    let mut values = Vec::with_capacity(depth * height * width * channels);
    for z in region.start[0]..region.start[0] + depth {
        for y in region.start[1]..region.start[1] + height {
            let first = (z * region.volume[1] + y) * region.volume[2] + region.start[2];
            values.extend(volume[first * channels..][..width * channels].iter().map(|&value| convert(value)));
        }
    }
    values
}

fn larger(cut_out: [usize; 3], patch: [usize; 3]) -> KernelError {
    KernelError::shape("augmentation", "patch", format_args!("inside of {cut_out:?}"), patch)
}

/// The image with its values changed, in nnU-Net's order.
fn changed(context: &Context, patch: &Patch, mut image: Buffer, draw: &Draw) -> Result<Buffer> {
    let mut scratch = None;
    let mut into_scratch = |image: &mut Buffer, write: &dyn Fn(&Buffer, &Buffer) -> Result<()>| -> Result<()> {
        let other = match scratch.take() {
            Some(buffer) => buffer,
            None => context.empty(patch.elements(), Dtype::F32)?,
        };
        write(image, &other)?;
        scratch = Some(std::mem::replace(image, other));
        Ok(())
    };
    if let Some((deviation, key)) = draw.noise {
        kernels::noise(context, patch, &image, deviation, key)?;
    }
    if let Some(sigmas) = draw.blur.as_ref().filter(|sigmas| sigmas.iter().any(Option::is_some)) {
        for axis in 0..3 {
            let taps = |sigma: &Option<[f64; 3]>| sigma.map_or(vec![1.0], |sigma| kernels::gaussian_taps(sigma[axis]));
            let taps: Vec<Vec<f32>> = sigmas.iter().map(taps).collect();
            into_scratch(&mut image, &|x, y| Ok(kernels::blur(context, patch, x, y, axis, &taps)?))?;
        }
    }
    if let Some(factors) = &draw.brightness {
        kernels::brightness(context, patch, &image, factors)?;
    }
    if let Some(factors) = &draw.contrast {
        kernels::contrast(context, patch, &image, factors)?;
    }
    if let Some(coarse) = draw.low_resolution.as_ref().filter(|coarse| coarse.iter().any(Option::is_some)) {
        into_scratch(&mut image, &|x, y| Ok(kernels::low_resolution(context, patch, x, y, coarse)?))?;
    }
    if let Some(exponents) = &draw.gamma_inverted {
        kernels::gamma(context, patch, &image, exponents, true)?;
    }
    if let Some(exponents) = &draw.gamma {
        kernels::gamma(context, patch, &image, exponents, false)?;
    }
    Ok(image)
}
