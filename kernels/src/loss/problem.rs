//! A loss of given shapes: everything that is checked once.

use super::plan::LossPlan;
use super::settings::{DiceSettings, Entropy, Level, LossSettings, OPERATION, Target};
use super::top_k::start_of_search;
use super::walk::LevelRow;
use crate::{Buffer, Context, Dtype, KernelError};

/// Shapes of a loss, checked, with its small tables on the device. Made once and used for every step.
#[derive(Clone, Debug)]
pub struct Problem {
    pub(super) settings: LossSettings,
    pub(super) batch: usize,
    pub(super) dims: [usize; 3],
    pub(super) levels: Vec<Level>,
    /// Levels of a weight above 0.
    pub(super) active: Vec<usize>,
    /// For annotations of labels alone.
    pub(super) plan: LossPlan,
    /// Of the active levels: [`LevelRow`], coordinates, and `(weight, number of largest cross-entropies)`.
    pub(super) level_table: Buffer,
    pub(super) axes: Buffer,
    pub(super) level_numbers: Buffer,
    /// Where only the largest cross-entropies count: the beginning of every level's search.
    pub(super) searches: Vec<u32>,
    /// Bit sets of regions by label, with an empty one for ignored voxels.
    pub(super) regions: Buffer,
    /// Chunks and voxels of all active levels and samples.
    pub(super) chunks: usize,
    pub(super) voxels: usize,
    /// How rows of partial sums, one a chunk, become one for each level and sample.
    pub(super) reduction: Vec<Reduction>,
}

/// One step of a reduction: runs of rows that become a row each.
#[derive(Clone, Debug)]
pub(super) struct Reduction {
    /// First row and end of each run.
    pub(super) ranges: Buffer,
    pub(super) count: usize,
}

impl Problem {
    /// Checks a loss for `batch` label maps of `dims` and the levels of a network, first the finest.
    ///
    /// # Errors
    /// [`KernelError::Shape`] for what does not fit together, [`KernelError::Limit`] for more elements than the
    /// kernels can index, [`KernelError::Unsupported`] for more than 16 classes or regions on a GPU whose shared memory
    /// does not work.
    pub fn new(
        context: &Context,
        settings: &LossSettings,
        batch: usize,
        dims: [usize; 3],
        levels: &[Level],
    ) -> Result<Self, KernelError> {
        check_settings(settings)?;
        if batch == 0 || dims.contains(&0) {
            return Err(KernelError::shape(OPERATION, "batch and dims", "at least 1", (batch, dims)));
        }
        for level in levels {
            if (0..3).any(|a| level.dims[a] == 0 || level.dims[a] > dims[a]) {
                return Err(KernelError::shape(OPERATION, "dims of a level", format!("1 to {dims:?}"), level.dims));
            }
            if !(level.weight.is_finite() && level.weight >= 0.0) {
                return Err(KernelError::shape(OPERATION, "weight of a level", "finite and >= 0", level.weight));
            }
        }
        let active: Vec<usize> = (0..levels.len()).filter(|level| levels[*level].weight > 0.0).collect();
        if active.is_empty() {
            return Err(KernelError::shape(OPERATION, "levels", "at least one of a weight > 0", levels));
        }
        check_count("voxels of the label map", batch, &[dims], 1)?;
        let sizes: Vec<[usize; 3]> = active.iter().map(|level| levels[*level].dims).collect();
        check_count("logits of all levels", batch, &sizes, settings.target.channels())?;

        let coarse = sizes.iter().any(|size| *size != dims);
        let plan = LossPlan::new(settings, active.len(), coarse, context.caps())?;
        let (mut rows, mut axes, mut numbers, mut searches) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        let mut of_sample = Vec::new();
        let (mut chunks, mut voxels) = (0, 0);
        for (size, level) in sizes.iter().zip(&active) {
            let count: usize = size.iter().product();
            rows.extend(
                LevelRow {
                    first_chunk: chunks as u32,
                    first_voxel: voxels as u32,
                    chunks: count.div_ceil(plan.chunk) as u32,
                    voxels: count as u32,
                    dims: size.map(|d| d as u32),
                    axes: axes.len() as u32,
                    full: *size == dims,
                }
                .words(),
            );
            axes.extend(axis_table(dims, *size));
            let largest = match settings.entropy {
                Entropy::TopK { percent } => ((batch * count) as f64 * f64::from(percent) / 100.0) as usize,
                Entropy::Mean | Entropy::MeanOverRegions => 0,
            };
            numbers.extend([levels[*level].weight, largest.max(1) as f32]);
            searches.extend(start_of_search(largest.max(1) as u32));
            of_sample.extend(vec![count.div_ceil(plan.chunk); batch]);
            chunks += batch * count.div_ceil(plan.chunk);
            voxels += batch * count;
        }
        Ok(Self {
            settings: settings.clone(),
            batch,
            dims,
            levels: levels.to_vec(),
            active,
            plan,
            level_table: context.upload(&rows, Dtype::U32)?,
            axes: context.upload(&axes, Dtype::U32)?,
            level_numbers: context.upload_f32(&numbers)?,
            searches,
            regions: context.upload(&region_table(&settings.target), Dtype::U32)?,
            chunks,
            voxels,
            reduction: reduction(context, &of_sample)?,
        })
    }

    /// Length of the loss vector, see [`value_and_gradient`](super::value_and_gradient).
    pub fn loss_len(&self) -> usize {
        3 + self.settings.dice_classes() + self.settings.target.channels()
    }

    /// Number of logits of a level.
    pub fn logits_len(&self, level: usize) -> usize {
        let voxels: usize = self.levels[level].dims.iter().product();
        self.batch * voxels * self.settings.target.channels()
    }

    /// The levels.
    pub fn levels(&self) -> &[Level] {
        &self.levels
    }

    /// Voxels of all samples at full resolution.
    pub(super) fn label_len(&self) -> usize {
        self.batch * self.dims.iter().product::<usize>()
    }
}

/// Rows that a GPU's unit adds up; a thread adds up all of them.
const ROWS_PER_UNIT: usize = 128;

/// The steps in which the rows of every level and sample are added up, `rows` of them at first.
fn reduction(context: &Context, rows: &[usize]) -> Result<Vec<Reduction>, KernelError> {
    let group = if context.caps().cores.is_some() { usize::MAX } else { ROWS_PER_UNIT };
    let mut rows = rows.to_vec();
    let mut steps = Vec::new();
    while steps.is_empty() || rows.iter().any(|count| *count > 1) {
        let (mut ranges, mut first) = (Vec::new(), 0);
        for count in &mut rows {
            let end = first + *count;
            for start in (first..end).step_by(group) {
                ranges.extend([start as u32, end.min(start.saturating_add(group)) as u32]);
            }
            *count = count.div_ceil(group);
            first = end;
        }
        steps.push(Reduction { ranges: context.upload(&ranges, Dtype::U32)?, count: ranges.len() / 2 });
    }
    Ok(steps)
}

/// The most classes or regions.
const MOST_CHANNELS: usize = 1024;
/// The most labels: what 16 bits hold.
const MOST_LABELS: usize = 1 << 16;

fn check_settings(settings: &LossSettings) -> Result<(), KernelError> {
    let wrong = |what, expected: &str, actual: &dyn std::fmt::Debug| {
        Err(KernelError::shape(OPERATION, what, format_args!("{expected}"), actual))
    };
    let (channels, labels) = (settings.target.channels(), settings.target.labels());
    if !(1..=MOST_CHANNELS).contains(&channels) {
        return wrong("classes or regions", "1 to 1024", &channels);
    }
    if !(1..=MOST_LABELS).contains(&labels) {
        return wrong("labels", "1 to 65536", &labels);
    }
    if let Target::Regions { regions, .. } = &settings.target
        && let Some(label) = regions.iter().flatten().find(|label| usize::from(**label) >= labels)
    {
        return wrong("label of a region", "a declared label", label);
    }
    if let Some(label) = settings.ignore.iter().find(|label| usize::from(**label) < labels) {
        return wrong("ignored label", "none of the target's labels", label);
    }
    match (settings.entropy, &settings.target) {
        (Entropy::MeanOverRegions, Target::Labels { .. }) => {
            return wrong("entropy", "one of labels", &settings.entropy);
        }
        (Entropy::TopK { .. }, Target::Regions { .. }) => return wrong("entropy", "one of regions", &settings.entropy),
        (Entropy::TopK { percent }, _) if !(percent > 0.0 && percent <= 100.0) => {
            return wrong("percent of the largest cross-entropies", "above 0, at most 100", &percent);
        }
        _ => (),
    }
    let DiceSettings { smooth, clip_tp, .. } = settings.dice;
    if [smooth, clip_tp.unwrap_or(0.0)].iter().any(|s| !(s.is_finite() && *s >= 0.0)) {
        return wrong("smooth and clip_tp", "finite and >= 0", &(smooth, clip_tp));
    }
    let weights = [settings.weight_ce, settings.weight_dice];
    if weights.iter().any(|w| !w.is_finite()) || weights == [0.0; 2] {
        return wrong("weight_ce and weight_dice", "finite and not both 0", &weights);
    }
    Ok(())
}

/// Indices are 32 bits wide on a GPU.
fn check_count(what: &'static str, batch: usize, sizes: &[[usize; 3]], channels: usize) -> Result<(), KernelError> {
    // Cubes and chunks round up.
    let limit = u64::from(u32::MAX) - (1 << 20);
    let count =
        |size: &[usize; 3]| size.iter().chain([&batch, &channels]).fold(1u64, |n, d| n.saturating_mul(*d as u64));
    let actual = sizes.iter().map(count).fold(0u64, u64::saturating_add);
    if actual > limit {
        return Err(KernelError::Limit { operation: OPERATION, what, actual, limit });
    }
    Ok(())
}

/// For each coordinate of a level along depth, height and width: what it adds to the index of its label, by
/// `floor((i + 0.5) in / out)`.
fn axis_table(dims: [usize; 3], level: [usize; 3]) -> Vec<u32> {
    let strides = [dims[1] * dims[2], dims[2], 1];
    (0..3)
        .flat_map(|a| (0..level[a]).map(move |i| ((2 * i + 1) * dims[a] / (2 * level[a]) * strides[a]) as u32))
        .collect()
}

fn region_table(target: &Target) -> Vec<u32> {
    let Target::Regions { regions, .. } = target else { return vec![0] };
    let words = regions.len().div_ceil(32);
    let mut table = vec![0; (target.labels() + 1) * words];
    for (region, labels) in regions.iter().enumerate() {
        for label in labels {
            table[usize::from(*label) * words + region / 32] |= 1 << (region % 32);
        }
    }
    table
}
