//! What predicting a case demands of memory, and how it is predicted within what there is: decided by a pass on a dry context,
//! before anything is launched.

use super::device_sums::{DeviceSums, Wanted};
use super::memory::{planned_case, planned_host};
use super::window::SlidingWindow;
use crate::device::host_memory;
use crate::error::{Error, PredictError, Result};
use crate::kernels::{Caps, Context, Dtype};
use crate::nn::{Network, PredictionMemory, UNetShape, planned_prediction};
use crate::preprocess::resample::{Grid, Taps};

/// Windows of one pass on a GPU, where small ones leave units idle; on a CPU one keeps all cores busy, and the caches warm.
const MOST_AT_ONCE: usize = 4;

/// A prediction in numbers.
#[derive(Clone, Copy, Debug)]
pub struct Demand<'a> {
    /// The windows over the preprocessed case.
    pub window: &'a SlidingWindow,
    /// Channels of the case.
    pub channels: usize,
    /// Extents of the whole image (depth, height, width).
    pub raw: [usize; 3],
    /// What the networks are.
    pub shape: &'a UNetShape,
    /// How many of them lie on the device.
    pub networks: usize,
    /// Type of activations.
    pub dtype: Dtype,
    /// What comes out.
    pub wanted: Wanted<'a>,
    /// What of all heads the host keeps for the whole case, if anything.
    pub kept: Option<Kept>,
}

/// Values of all heads that the host keeps for a whole case.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Kept {
    /// What they are, in one word.
    pub what: &'static str,
    /// Their bytes.
    pub bytes: u64,
}

/// What a device and its host have.
#[derive(Clone, Debug, PartialEq)]
pub struct Budget {
    /// The device. One with cores shares its memory with the host.
    pub caps: Caps,
    /// Bytes of the host, where they are known.
    pub host: Option<u64>,
}

impl Budget {
    /// What there is here.
    pub fn of(context: &Context) -> Self {
        Self { caps: context.caps().clone(), host: host_memory() }
    }
}

/// How a case is predicted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Planned {
    /// Windows of one pass if all happens on the device; `None` where they are cut and added up on the host.
    pub at_once: Option<usize>,
    /// What that takes at most.
    pub memory: PredictionMemory,
}

impl Demand<'_> {
    /// The fastest way that fits into memory, for logits that are resampled from the case's grid to `cropped` voxels.
    ///
    /// # Errors
    /// [`PredictError::PredictionMemory`], or [`PredictError::KeptMemory`] where nothing but what the host keeps is too
    /// large; if the network cannot be run on a window.
    pub fn plan(&self, context: &Context, cropped: [usize; 3], budget: &Budget) -> Result<Planned> {
        let grid = Grid::between(self.window.image, cropped, [1.0; 3], [1.0; 3])?;
        self.plan_resampled(context, &std::array::from_fn(|axis| grid.taps(axis)), budget)
    }

    /// As [`plan`](Self::plan), by where the voxels of the result lie.
    ///
    /// # Errors
    /// As [`plan`](Self::plan).
    pub(crate) fn plan_resampled(&self, context: &Context, taps: &[Vec<Taps>; 3], budget: &Budget) -> Result<Planned> {
        let without = Demand { kept: None, ..*self };
        match (self.fitting(context, taps, budget), self.kept) {
            (Err(Error::Predict(PredictError::PredictionMemory { needed, limit, .. })), Some(Kept { what, bytes }))
                if without.fitting(context, taps, budget).is_ok() =>
            {
                let (heads, voxels) = (self.shape.heads, self.raw);
                Err(PredictError::KeptMemory { what, bytes, heads, voxels, needed, limit }.into())
            }
            (planned, _) => planned,
        }
    }

    fn fitting(&self, context: &Context, taps: &[Vec<Taps>; 3], budget: &Budget) -> Result<Planned> {
        let (caps, beside) = (&budget.caps, self.kept.map_or(0, |kept| kept.bytes));
        let weights = Network::new(&context.dry(), self.shape.clone(), 0)?.parameters().count() as u64;
        // The other folds lie on the device too: weights, and room for gradients and momenta that every network has.
        let others = (self.networks as u64).saturating_sub(1).saturating_mul(weights * 3 * 4);
        let fewest = |at_once: &usize| *at_once == 1 || *at_once < 2 * self.window.starts.len();
        for at_once in if caps.cores.is_some() { vec![1] } else { vec![MOST_AT_ONCE, 2, 1] }.into_iter().filter(fewest)
        {
            let Ok(mut memory) = self.on_device(context, taps, at_once) else { continue };
            let host = planned_case(self.window.image, self.channels, self.raw);
            memory.host = memory.host.saturating_add(host).saturating_add(beside);
            memory.device = memory.device.saturating_add(others);
            // Others use the device too, and its memory is counted whole: several windows leave a quarter of it.
            let room = if at_once > 1 { memory.device / 3 } else { 0 };
            let padded = PredictionMemory { device: memory.device.saturating_add(room), ..memory };
            if padded.check(caps, budget.host).is_ok() {
                return Ok(Planned { at_once: Some(at_once), memory });
            }
        }
        let threads = rayon::current_num_threads();
        let host = planned_host(self.window, self.channels, self.shape.heads, self.raw, threads).saturating_add(beside);
        let mut memory = planned_prediction(context, self.shape, self.window.patch, self.dtype, host)?;
        memory.device = memory.device.saturating_add(others);
        memory.check(caps, budget.host)?;
        Ok(Planned { at_once: None, memory })
    }

    /// What a pass over so many windows and all that lies beside it take, on a dry context.
    fn on_device(&self, context: &Context, taps: &[Vec<Taps>; 3], at_once: usize) -> Result<PredictionMemory> {
        let dry = context.dry();
        let network = Network::new(&dry, self.shape.clone(), 0)?;
        let voxels = self.window.image.iter().fold(self.channels, |product, &extent| product.saturating_mul(extent));
        let case = dry.empty(voxels, Dtype::F32)?;
        let sums =
            DeviceSums::new(&dry, self.window.clone(), (case, self.channels), self.shape.heads, taps, self.wanted)?;
        sums.pass(std::slice::from_ref(&network), &vec![[0; 3]; at_once], [false; 3], 1.0, self.dtype)?;
        let results = sums.result_bytes();
        let device = dry.peak_bytes().saturating_add(results);
        Ok(PredictionMemory { device, largest_buffer: dry.largest_bytes().max(results), host: results })
    }
}
