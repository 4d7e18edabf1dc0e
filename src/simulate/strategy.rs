//! What is compared: ways of annotating, and the network that is trained on each.

use crate::dataset::plans::Plans;
use crate::sparsify::Scheme;

/// A way of annotating, at a price.
#[derive(Debug, Clone, PartialEq)]
pub struct Strategy {
    /// What is annotated; [`Scheme::Dense`] leaves the labels as they are.
    pub scheme: Scheme,
    /// Share of the voxels that has to come out, to a quarter of itself; `None` takes what comes out.
    pub share: Option<f64>,
}

impl Strategy {
    /// Its name: that of its folder too.
    pub fn name(&self) -> String {
        match self.share {
            Some(share) => format!("{}-{share}", self.scheme.name()),
            None => self.scheme.name().into(),
        }
    }
}

/// The network that is trained on every annotation.
#[derive(Debug, Clone, PartialEq)]
pub struct NetworkPlan {
    /// Plans for all runs; without them each run is planned by nnU-Net's rules from its own annotation, as its annotator
    /// would have it.
    pub plans: Option<Plans>,
    /// Configuration of the plans.
    pub configuration: String,
    /// Channels of each stage, instead of the plans'.
    pub features: Option<Vec<usize>>,
    /// Patches of a step, instead of the plans'.
    pub batch_size: Option<usize>,
    /// Extent of a patch along the plans' axes, instead of the plans'.
    pub patch_size: Option<[usize; 3]>,
}
