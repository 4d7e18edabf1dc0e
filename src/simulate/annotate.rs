//! The annotation of a run, and what of it there is.

use std::path::Path;

use serde::{Deserialize, Serialize};

use super::strategy::Strategy;
use crate::dataset::Dataset;
use crate::error::{Error, Result, SimulateError};
use crate::io;
use crate::sparsify::{self, CaseReport, Scheme, report_dense, sparsify_dataset};

/// What is annotated of the cases that are trained on.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Annotated {
    /// Share of their voxels.
    pub share: f64,
    /// Voxels.
    pub voxels: u64,
    /// Strokes that drawing them would take, roughly.
    pub strokes: u64,
    /// Cases with any annotation: only these are trained on.
    pub cases: Vec<String>,
    /// What the scheme warned of.
    pub warnings: Vec<String>,
}

impl Annotated {
    fn new(cases: &[CaseReport], warnings: Vec<String>) -> Self {
        let voxels = cases.iter().map(|case| case.annotated).sum();
        let all: u64 = cases.iter().map(CaseReport::voxels).sum();
        Annotated {
            share: voxels as f64 / all.max(1) as f64,
            voxels,
            strokes: cases.iter().flat_map(|case| &case.classes).map(|class| class.strokes).sum(),
            cases: cases.iter().filter(|case| case.annotated > 0).map(|case| case.case.clone()).collect(),
            warnings,
        }
    }
}

/// Largest difference of a share from the one asked for, as a part of that.
const TOLERANCE: f64 = 0.25;

/// Annotates the cases of `source` in `target`, unless the labels stay as they are, and says in `record` what is annotated:
/// written last, it means that the annotation is complete.
pub(super) fn annotate(
    source: &Path,
    target: &Path,
    record: &Path,
    strategy: &Strategy,
    seed: u64,
    workers: usize,
) -> Result<Annotated> {
    let annotated = match &strategy.scheme {
        Scheme::Dense => Annotated::new(&report_dense(&Dataset::open(source)?, workers)?, Vec::new()),
        scheme => {
            let settings =
                sparsify::Settings { scheme: scheme.clone(), seed, copy_images: false, overwrite: true, workers };
            let report = sparsify_dataset(source, target, &settings, |_| {})?;
            Annotated::new(&report.cases, report.warnings)
        }
    };
    if let Some(asked) = strategy.share
        && (annotated.share - asked).abs() > TOLERANCE * asked
    {
        let reached = annotated.share;
        return Err(Error::Simulate(SimulateError::ShareMissed { strategy: strategy.name(), seed, asked, reached }));
    }
    io::write_json(record, &annotated)?;
    Ok(annotated)
}
