//! What people add to overlap by hand: distances, volumes and lesions of every case and class, and a table of them.

use std::fmt::Write as _;
use std::path::Path;

use rayon::prelude::*;

use super::lesions::{Lesions, lesions};
use super::summary::{CaseResult, Summary, read_pair};
use super::surface::{SurfaceDistances, SurfaceSettings, surface_distances};
use crate::error::{Error, Result};

/// Measures of one label or region in one case.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Measures {
    /// Distances between the surfaces.
    pub surfaces: SurfaceDistances,
    /// Connected components.
    pub lesions: Lesions,
    /// Volume of the prediction in millilitres, in the whole image.
    pub predicted_volume: f64,
    /// The same, where the reference is annotated.
    pub predicted_volume_annotated: f64,
    /// Volume of the reference in millilitres, where it is annotated.
    pub reference_volume: f64,
}

/// Measures of one case.
#[derive(Debug, Clone, PartialEq)]
pub struct CaseMeasures {
    /// One entry for each evaluated label or region.
    pub groups: Vec<Measures>,
}

impl Summary {
    /// Measures every case again, beyond its counts. `observe` is called after each case with the number of cases.
    ///
    /// # Errors
    /// Those of reading NIfTI, all of them together; [`Error::Setting`] for a tolerance that is no distance.
    pub fn measure(&self, settings: SurfaceSettings, observe: &(dyn Fn(usize) + Sync)) -> Result<Vec<CaseMeasures>> {
        if !(settings.tolerance >= 0.0 && settings.tolerance.is_finite()) {
            return Err(Error::Setting {
                setting: "tolerance",
                value: settings.tolerance.to_string(),
                expected: "expected a distance in millimetres, 0 or larger",
            });
        }
        let measured: Vec<Result<CaseMeasures>> = self
            .cases
            .par_iter()
            .map(|case| {
                let measures = self.measure_case(case, self.classes.ignore, settings);
                observe(self.cases.len());
                measures
            })
            .collect();
        let (mut cases, mut faults) = (Vec::with_capacity(measured.len()), Vec::new());
        for case in measured {
            match case {
                Ok(case) => cases.push(case),
                Err(error) => faults.push(error),
            }
        }
        Error::several(faults).map_or(Ok(cases), Err)
    }

    fn measure_case(&self, case: &CaseResult, ignore: Option<i16>, settings: SurfaceSettings) -> Result<CaseMeasures> {
        let [prediction, reference] = read_pair(&case.prediction_file, &case.reference_file)?;
        let spacing = reference.geometry.spacing;
        let millilitres = spacing.iter().product::<f64>() / 1000.0;
        let (predicted, truth) = (prediction.data.view(), reference.data.view());
        let groups = self.classes.groups.iter().zip(&case.counts).map(|(group, counts)| {
            let voxels = predicted.iter().filter(|&&label| group.contains(label)).count() as u64;
            Measures {
                surfaces: surface_distances(predicted, truth, group, ignore, spacing, settings),
                lesions: lesions(predicted, truth, group, ignore),
                predicted_volume: voxels as f64 * millilitres,
                predicted_volume_annotated: (counts.true_positives + counts.false_positives) as f64 * millilitres,
                reference_volume: (counts.true_positives + counts.false_negatives) as f64 * millilitres,
            }
        });
        Ok(CaseMeasures { groups: groups.collect() })
    }

    /// A table in CSV, a line for each case and each label or region. Numbers that do not exist are `NaN`, distances to
    /// nothing `inf`.
    pub fn csv(&self, measures: &[CaseMeasures], settings: SurfaceSettings) -> String {
        let (tolerance, kind) = (settings.tolerance, settings.kind.name());
        let mut text = format!(
            "case,class,annotated_share,dice,iou,hd95_mm,assd_mm,nsd_{tolerance}mm,predicted_ml,predicted_annotated_ml,\
             reference_ml,reference_lesions,found_lesions,predicted_lesions,invented_lesions,surfaces\n"
        );
        for (case, measured) in self.cases.iter().zip(measures) {
            let name = case.prediction_file.file_name().map(Path::new).unwrap_or(&case.prediction_file);
            let name = quoted(&name.to_string_lossy());
            for ((class, counts), group) in self.classes.names.iter().zip(&case.counts).zip(&measured.groups) {
                let Measures { surfaces, lesions, .. } = group;
                let numbers = [
                    case.annotated,
                    counts.dice(),
                    counts.iou(),
                    surfaces.hausdorff_95,
                    surfaces.average,
                    surfaces.within_tolerance,
                    group.predicted_volume,
                    group.predicted_volume_annotated,
                    group.reference_volume,
                ];
                let counted = [lesions.reference, lesions.found, lesions.predicted, lesions.invented];
                // Writing to a String cannot fail.
                let _ = write!(text, "{name},{}", quoted(class));
                numbers.iter().for_each(|number| _ = write!(text, ",{number}"));
                counted.iter().for_each(|count| _ = write!(text, ",{count}"));
                let _ = writeln!(text, ",{kind}");
            }
        }
        text
    }
}

/// A field of a CSV file.
fn quoted(field: &str) -> String {
    match field.contains([',', '"', '\n', '\r']) {
        true => format!("\"{}\"", field.replace('"', "\"\"")),
        false => field.into(),
    }
}
