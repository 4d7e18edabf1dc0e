//! What is made of an ensemble's opinion: certainty of a voxel, completed labels, which folds look, what is suggested.

use crate::common::uniform;
use ndarray::{Array3, s};
use proptest::prelude::*;
use voxgrad::Error;
use voxgrad::annotate::voxel::{Certainty, entropy, probabilities};
use voxgrad::annotate::{Assessment, Candidate, Unit, candidates, completed_labels, rank, spread};
use voxgrad::dataset::{DatasetJson, LabelManager};

fn labels(entries: &str) -> LabelManager {
    let text = format!(
        r#"{{"channel_names": {{"0": "MRI"}}, "numTraining": 1, "file_ending": ".nii.gz", "labels": {entries}}}"#
    );
    LabelManager::new(&DatasetJson::parse("dataset.json".as_ref(), &text).unwrap()).unwrap()
}

fn classes() -> LabelManager {
    labels(r#"{"background": 0, "a": 1, "b": 2, "ignore": 3}"#)
}

/// Whole 1, 2, 3 is written as 1, core 2, 3 as 2, enhancing 3 as 3.
fn regions() -> LabelManager {
    labels(
        r#"{"background": 0, "whole": [1, 2, 3], "core": [2, 3], "enhancing": 3, "ignore": 4},
           "regions_class_order": [1, 2, 3]"#,
    )
}

/// What the members of an ensemble say together: mean logits, mean probabilities, mean entropy.
fn together(labels: &LabelManager, members: &[Vec<f32>]) -> (Vec<f32>, Vec<f32>, f32) {
    let heads = members[0].len();
    let (mut logits, mut mean, mut mean_entropy) = (vec![0.0; heads], vec![0.0; heads], 0.0);
    let mut member = vec![0.0; heads];
    for values in members {
        probabilities(labels, values, &mut member);
        for head in 0..heads {
            logits[head] += values[head] / members.len() as f32;
            mean[head] += member[head] / members.len() as f64;
        }
        mean_entropy += entropy(labels, member.iter().copied()) / members.len() as f64;
    }
    (logits, mean.iter().map(|&p| p as f32).collect(), mean_entropy as f32)
}

/// Entropy as the logarithm of the partition function less the mean logit; disagreement as the mean Kullback-Leibler
/// divergence of the members from their mean: other formulas than the program's.
#[test]
fn certainty_of_classes_is_what_f64_gives() {
    let labels = classes();
    for seed in 0..50 {
        let members: Vec<Vec<f32>> =
            (0..3).map(|m| uniform(3 * seed + m, 3).iter().map(|v| 6.0 * v).collect()).collect();
        let softmax = |logits: &[f32]| -> Vec<f64> {
            let sum: f64 = logits.iter().map(|&l| f64::from(l).exp()).sum();
            logits.iter().map(|&l| f64::from(l).exp() / sum).collect()
        };
        let all: Vec<Vec<f64>> = members.iter().map(|member| softmax(member)).collect();
        let mean: Vec<f64> = (0..3).map(|c| all.iter().map(|p| p[c]).sum::<f64>() / 3.0).collect();
        let divergence = |p: &Vec<f64>| p.iter().zip(&mean).map(|(p, q)| p * (p / q).ln()).sum::<f64>();
        let disagreement = all.iter().map(divergence).sum::<f64>() / 3.0;
        let own: f64 = members
            .iter()
            .zip(&all)
            .map(|(logits, p)| {
                let sum: f64 = logits.iter().map(|&l| f64::from(l).exp()).sum();
                sum.ln() - logits.iter().zip(p).map(|(&l, p)| f64::from(l) * p).sum::<f64>()
            })
            .sum::<f64>()
            / 3.0;
        let (logits, means, mean_entropy) = together(&labels, &members);
        let found = Certainty::of(&labels, &logits, &means, mean_entropy);
        assert!((f64::from(mean_entropy) - own).abs() < 1e-6, "{mean_entropy} {own}");
        assert!((f64::from(found.disagreement) - disagreement).abs() < 1e-6, "{found:?} {disagreement}");
        assert!((f64::from(found.entropy) - (own + disagreement)).abs() < 1e-6, "{found:?}");
        let label = (0..3).max_by(|&a, &b| logits[a].total_cmp(&logits[b])).unwrap();
        let next = (0..3).filter(|&c| c != label).map(|c| mean[c]).fold(0.0, f64::max);
        assert!((f64::from(found.margin) - (mean[label] - next).max(0.0)).abs() < 1e-6, "{found:?}");
    }
}

#[test]
fn certainty_of_regions() {
    let labels = regions();
    let of = |p: [f32; 3]| {
        let logits = p.map(|p| (p / (1.0 - p)).ln());
        Certainty::of(&labels, &logits, &p, 0.0)
    };
    // Core is the last predicted one: it and enhancing decide, whole does not matter.
    let found = of([0.55, 0.9, 0.2]);
    assert!((found.margin - 0.6).abs() < 1e-6, "{found:?}");
    assert!((of([0.55, 0.7, 0.1]).margin - 0.4).abs() < 1e-6);
    // Nothing is predicted: all three decide.
    assert!((of([0.4, 0.1, 0.1]).margin - 0.2).abs() < 1e-6);
    let binary = |p: f64| -p * p.ln() - (1.0 - p) * (1.0 - p).ln();
    let expected: f64 = [0.55f32, 0.9, 0.2].map(|p| binary(p.into())).iter().sum();
    assert!((f64::from(found.entropy) - expected).abs() < 1e-6, "{found:?} {expected}");
    // Mean logits decide for the region, mean probabilities against it.
    assert_eq!(Certainty::of(&labels, &[1.0, -9.0, -9.0], &[0.4, 0.0, 0.0], 0.0).margin, 0.0);
    assert_eq!(Certainty::of(&labels, &[-9.0; 3], &[0.0; 3], 0.0), Certainty::FULL);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    /// No annotated voxel changes; all others have the predicted label, or are ignored below the least margin.
    #[test]
    fn annotated_voxels_are_kept(seed in 0u64..1000, least in prop::option::of(0.05f32..1.0)) {
        let shape = (3, 4, 5);
        let draw = |seed: u64| uniform(seed, 60);
        let volume = |seed: u64, f: fn(f32) -> i16| Array3::from_shape_vec(shape, draw(seed).into_iter().map(f).collect()).unwrap();
        let annotation = volume(3 * seed, |v| ((v + 1.0) * 2.0) as i16);
        let assessment = Assessment {
            labels: volume(3 * seed + 1, |v| ((v + 1.0) * 1.5) as i16).mapv(|label| label as u16),
            margin: Array3::from_shape_vec(shape, draw(3 * seed + 2)).unwrap().mapv(f32::abs),
            entropy: Array3::zeros(shape),
            disagreement: Array3::zeros(shape),
        };
        let completed = completed_labels(annotation.view(), &assessment, 3, least);
        for (place, &label) in completed.indexed_iter() {
            let sure = least.is_none_or(|least| assessment.margin[place] >= least);
            let expected = match annotation[place] {
                3 if sure => assessment.labels[place] as i16,
                annotated => annotated,
            };
            prop_assert_eq!(label, expected);
        }
        prop_assert!(least.is_some() || completed.iter().all(|&label| label != 3));
    }
}

#[test]
fn candidates_are_the_means_over_what_is_not_annotated() {
    let shape = (7, 9, 8);
    let uncertainty = Array3::from_shape_vec(shape, uniform(1, 7 * 9 * 8)).unwrap().mapv(f32::abs);
    let mut annotated = uncertainty.mapv(|value| value < 0.1);
    annotated.slice_mut(s![3, .., ..]).fill(true);
    for unit in [Unit::Slices { axis: 0 }, Unit::Slices { axis: 2 }, Unit::Blocks { size: [3, 4, 20] }] {
        let found = candidates(unit, uncertainty.view(), annotated.view());
        for candidate in &found {
            let [z, y, x] = candidate.start;
            let [depth, height, width] = candidate.extent;
            let part = s![z..z + depth, y..y + height, x..x + width];
            let (mut sum, mut open) = (0.0, 0);
            for (&value, &annotated) in uncertainty.slice(part).iter().zip(annotated.slice(part)) {
                if !annotated {
                    sum += f64::from(value);
                    open += 1;
                }
            }
            assert_eq!(candidate.open, open);
            assert!((candidate.score - sum / candidate.voxels() as f64).abs() < 1e-12, "{candidate:?}");
        }
        let expected = match unit {
            // The slice that is annotated throughout is left out.
            Unit::Slices { axis: 0 } => 6,
            Unit::Slices { .. } => 8,
            // Half a block apart or a little less: starts 0, 1, 3, 4 and 0, 2, 3, 5, and everything along x.
            Unit::Blocks { .. } => 16,
        };
        assert_eq!(found.len(), expected, "{unit:?}");
    }
}

fn slice(z: usize, score: f64) -> Candidate {
    Candidate { start: [z, 0, 0], extent: [1, 10, 10], score, open: 100 }
}

/// Neighbours of what is taken wait for the next round, however uncertain they are.
#[test]
fn neighbours_come_after_everything_else() {
    let scores = [1.0, 9.0, 8.0, 7.0, 2.0, 3.0, 3.0];
    let all = || scores.iter().enumerate().map(|(z, &score)| slice(z, score)).collect::<Vec<_>>();
    let order = |spacing: usize, count: usize| -> Vec<(usize, usize)> {
        spread(all(), count, spacing).iter().map(|(place, round)| (place.start[0], *round)).collect()
    };
    assert_eq!(order(1, 7), [(1, 1), (3, 1), (5, 1), (2, 2), (6, 2), (4, 2), (0, 2)]);
    assert_eq!(order(3, 3), [(1, 1), (5, 1), (2, 2)]);
    assert_eq!(order(0, 4), [(1, 1), (2, 1), (3, 1), (5, 1)], "of equals the first");
    let block = |start, score| Candidate { start, extent: [4; 3], score, open: 64 };
    let blocks = vec![block([0; 3], 3.0), block([2, 2, 2], 2.5), block([4, 0, 0], 2.0)];
    let taken: Vec<usize> = spread(blocks, 3, 0).iter().map(|(_, round)| *round).collect();
    assert_eq!(taken, [1, 1, 2], "blocks that touch are no neighbours, blocks that overlap are");
}

#[test]
fn cases_take_turns() {
    let case = |name: &str, scores: &[f64]| {
        let places = scores.iter().enumerate().map(|(i, &score)| (slice(10 * i, score), 1)).collect::<Vec<_>>();
        (name.to_owned(), places)
    };
    let order = |diversity: f64| -> String {
        let mut cases = vec![case("a", &[9.0, 8.0, 7.0]), case("b", &[5.0, 4.0]), case("c", &[4.1])];
        cases[1].1[1].1 = 2;
        let ranked = rank(cases, 10, diversity);
        assert!(ranked.iter().enumerate().all(|(index, one)| one.rank == index + 1));
        ranked.iter().map(|one| one.case.clone()).collect()
    };
    // 9; then 5 before 8 / 2 and 4.1 before that; the second round last.
    assert_eq!(order(1.0), "abcaab");
    assert_eq!(order(0.0), "aaabcb");
}

#[test]
fn messages_name_what_differs() {
    use voxgrad::annotate::check_same_dataset;
    use voxgrad::dataset::plans::Plans;
    use voxgrad::train::Model;
    let folder = tempfile::tempdir().unwrap();
    crate::common::phantom::write(folder.path(), 1);
    let plans = Plans::read(&folder.path().join("nnUNetPlans.json")).unwrap();
    let json = DatasetJson::read(&folder.path().join("dataset.json")).unwrap();
    let model = Model::new(plans, "3d_fullres", json.clone()).unwrap();
    let of = |channels: &str, labels: &str| {
        let text = format!(
            r#"{{"channel_names": {channels}, "labels": {labels}, "numTraining": 1, "file_ending": ".nii.gz"}}"#
        );
        let json = DatasetJson::parse("other.json".as_ref(), &text).unwrap();
        check_same_dataset(&model, &json, &LabelManager::new(&json).unwrap()).map_err(|error| match error {
            Error::Annotation(error) => error.to_string(),
            error => panic!("{error}"),
        })
    };
    let (mri, sphere) = (r#"{"0": "MRI"}"#, r#"{"background": 0, "sphere": 1}"#);
    assert_eq!(of(mri, sphere), Ok(()), "an ignore label makes no difference");
    let said = of(r#"{"0": "CT", "1": "MRI"}"#, r#"{"background": 0, "cube": 1, "b": 2, "ignore": 3}"#).unwrap_err();
    for word in ["other.json", "channels", "CT", "labels: the model has sphere 1, the dataset cube 1, b 2", "[0, 1, 2]"]
    {
        assert!(said.contains(word), "{word}: {said}");
    }
}
