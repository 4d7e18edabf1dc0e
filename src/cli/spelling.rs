//! nnU-Net's flags of several letters after one dash, which a parser of short flags would take apart.

use std::ffi::OsString;

/// nnU-Net's spelling and this program's.
const SPELLINGS: &[(&str, &str)] = &[
    ("-np", "--workers"),
    ("-npfp", "--workers"),
    ("-pl", "--planner"),
    ("-fpe", "--fingerprint-extractor"),
    ("-preprocessor_name", "--preprocessor-name"),
    ("-gpu_memory_target", "--gpu-memory-target"),
    ("-overwrite_target_spacing", "--overwrite-target-spacing"),
    ("-overwrite_plans_name", "--overwrite-plans-name"),
    ("-plans_name", "--plans-name"),
    ("--verify_dataset_integrity", "--verify-dataset-integrity"),
    ("--no_pp", "--no-preprocessing"),
    ("--no_pbar", "--no-progress-bar"),
    ("-device", "--device"),
    ("-tr", "--trainer"),
    ("--disable_tta", "--disable-tta"),
    ("-step_size", "--step-size"),
    ("-chk", "--checkpoint-name"),
    ("-num_parts", "--num-parts"),
    ("-part_id", "--part-id"),
    ("-npp", "--preprocessing-workers"),
    ("-nps", "--export-workers"),
    ("-prev_stage_predictions", "--prev-stage-predictions"),
    ("--save_probabilities", "--save-probabilities"),
    ("--continue_prediction", "--continue-prediction"),
    ("--disable_progress_bar", "--no-progress-bar"),
    ("--not_on_device", "--not-on-device"),
    ("-pretrained_weights", "--pretrained-weights"),
    ("-num_gpus", "--num-gpus"),
    ("--val_best", "--val-best"),
    ("--disable_checkpointing", "--disable-checkpointing"),
    ("-djfile", "--dataset-json"),
    ("-pfile", "--plans"),
    ("-il", "--ignore-label"),
    ("-ref", "--references"),
    ("-channel_idx", "--channel"),
    ("-plans_json", "--plans"),
    ("-dataset_json", "--dataset-json"),
    ("--remove_postprocessed", "--remove-postprocessed"),
    ("-pp_pkl_file", "--postprocessing"),
    ("--save_npz", "--save-npz"),
    ("--disable_ensembling", "--disable-ensembling"),
    ("--no_overwrite", "--no-overwrite"),
];

/// The arguments with nnU-Net's spellings replaced; all others are passed on as they are.
pub fn long_flags(arguments: impl Iterator<Item = OsString>) -> impl Iterator<Item = OsString> {
    arguments.map(|argument| {
        let known = SPELLINGS.iter().find(|(theirs, _)| argument == *theirs);
        known.map_or(argument.clone(), |(_, ours)| OsString::from(ours))
    })
}
