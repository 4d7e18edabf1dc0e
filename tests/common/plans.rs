//! Plans of made-up datasets.

use voxgrad::dataset::DatasetJson;
use voxgrad::dataset::plans::{Configuration, Plans};
use voxgrad::plan::fingerprint::Fingerprint;
use voxgrad::plan::planner::{Planner, PlannerKind};

/// Plans of a made-up dataset in which all cases have the same shape and spacing.
pub fn plan(kind: PlannerKind, shape: [usize; 3], spacing: [f64; 3], cases: usize, labels: usize) -> Plans {
    let names: Vec<String> = (1..labels).map(|l| format!(r#""l{l}": {l}"#)).collect();
    let json = format!(
        r#"{{"channel_names": {{"0": "CT"}}, "labels": {{"background": 0, {}}}, "numTraining": {cases},
            "file_ending": ".nii.gz"}}"#,
        names.join(", ")
    );
    let json = DatasetJson::parse("d".as_ref(), &json).unwrap();
    let fingerprint = Fingerprint {
        foreground_intensity_properties_per_channel: Default::default(),
        median_relative_size_after_cropping: 1.0,
        shapes_after_crop: vec![shape; cases],
        spacings: vec![spacing; cases],
    };
    let planner = Planner { kind, ..Planner::default() };
    planner.plan_from_json("Dataset001_X", &json, &fingerprint).unwrap()
}

pub fn fullres(plans: &Plans) -> Configuration {
    plans.configuration("3d_fullres").unwrap()
}
