//! Splits against scikit-learn's (through nnU-Net) and against damaged files.

use voxgrad::Error;
use voxgrad::dataset::splits::{self, Fold, Split};
use voxgrad::error::{FileError, PlanError};

use crate::common::data;

fn cases(count: usize) -> Vec<String> {
    (0..count).map(|i| format!("case_{i:03}")).collect()
}

fn validation_indices(count: usize) -> Vec<Vec<usize>> {
    let cases = cases(count);
    let folds = splits::k_fold(&cases).unwrap();
    folds
        .iter()
        .map(|fold| {
            assert_eq!(fold.train.len() + fold.val.len(), count);
            assert!(fold.train.is_sorted() && fold.val.iter().all(|c| !fold.train.contains(c)));
            let index = |case| cases.iter().position(|c| c == case).unwrap();
            fold.val.iter().map(index).collect()
        })
        .collect()
}

#[test]
fn folds_are_scikit_learns() {
    assert_eq!(validation_indices(5), [[0], [4], [3], [1], [2]]);
    assert_eq!(validation_indices(10), [[0, 7], [3, 9], [4, 6], [1, 8], [2, 5]]);
    let twelve: [&[usize]; 5] = [&[0, 3, 8], &[7, 10, 11], &[6, 9], &[1, 4], &[2, 5]];
    assert_eq!(validation_indices(12), twelve);
}

#[test]
fn folds_are_those_of_a_real_file() {
    for dataset in ["brats_regions", "brats_labels_anisotropic"] {
        let path = data(dataset).join("preprocessed/splits_final.json");
        let mut shuffled = cases(10);
        shuffled.reverse();
        assert_eq!(splits::read(&path, &cases(10)).unwrap(), splits::k_fold(&shuffled).unwrap());
    }
}

#[test]
fn special_folds() {
    let folds = splits::k_fold(&cases(10)).unwrap();
    let of = |fold| splits::cases_of_fold(&folds, fold, &cases(10)).unwrap();
    assert_eq!(of(Fold::All).train, of(Fold::All).val);
    assert_eq!(of(Fold::Index(1)), folds[1]);
    // numpy: RandomState(12345 + 5).choice(10, 8, replace=False) = [0 8 4 5 3 9 7 6]
    let beyond = of(Fold::Index(5));
    let expected = [0, 8, 4, 5, 3, 9, 7, 6].map(|i| format!("case_{i:03}"));
    assert_eq!(beyond.train, expected);
    assert_eq!(beyond.val, ["case_001", "case_002"]);
    assert_eq!("all".parse::<Fold>().unwrap(), Fold::All);
    assert_eq!("3".parse::<Fold>().unwrap(), Fold::Index(3));
    assert!("-1".parse::<Fold>().is_err());
}

#[test]
fn bad_splits_are_rejected() {
    assert!(matches!(splits::k_fold(&cases(4)), Err(Error::Plan(PlanError::TooFewCases { cases: 4, folds: 5 }))));
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("splits_final.json");
    let mut folds = splits::k_fold(&cases(10)).unwrap();
    splits::write(&path, &folds).unwrap();
    assert_eq!(splits::read(&path, &cases(10)).unwrap(), folds);
    assert!(matches!(
        splits::read(&path, &cases(9)),
        Err(Error::Plan(PlanError::SplitUnknownCase { case, .. })) if case == "case_009"
    ));
    folds[2] = Split { train: cases(2), val: vec![] };
    splits::write(&path, &folds).unwrap();
    assert!(matches!(
        splits::read(&path, &cases(10)),
        Err(Error::Plan(PlanError::SplitEmpty { fold: 2, part: "validation", .. }))
    ));
    folds[2] = Split { train: cases(2), val: cases(1) };
    splits::write(&path, &folds).unwrap();
    let overlap = splits::read(&path, &cases(10));
    assert!(matches!(overlap, Err(Error::Plan(PlanError::SplitOverlap { fold: 2, case, .. })) if case == "case_000"));
    std::fs::write(&path, "[{}]").unwrap();
    assert!(matches!(splits::read(&path, &cases(10)), Err(Error::File(FileError::Json { .. }))));
}
