//! The moving average, the best epoch, and storing NaN.

use approx::assert_relative_eq;
use voxgrad::Compat;
use voxgrad::history::{EpochRecord, History};
use voxgrad::train::EpochTimes;

fn epoch(dice: &[f64]) -> EpochRecord {
    EpochRecord {
        train_loss: -0.5,
        val_loss: -0.4,
        dice_per_class: dice.to_vec(),
        learning_rate: 0.01,
        started: 100.0,
        ended: 130.0,
        times: Default::default(),
    }
}

const NAN: f64 = f64::NAN;

#[test]
fn moving_average_and_best() {
    let mut history = History::default();
    assert!(history.push(epoch(&[0.2, NAN]), Compat::Corrected));
    assert_relative_eq!(history.mean_fg_dice[0], 0.2);
    assert!(history.push(epoch(&[0.4, 0.8]), Compat::Corrected));
    assert_relative_eq!(history.ema_fg_dice[1], 0.24, epsilon = 1e-12);
    assert!(!history.push(epoch(&[0.0, 0.0]), Compat::Corrected));
    assert_relative_eq!(history.best_ema().unwrap(), 0.24, epsilon = 1e-12);
    assert_eq!(history.epochs(), 3);
}

#[test]
fn an_epoch_without_dice_is_harmless_unless_upstream_is_asked_for() {
    let run = |compat| {
        let mut history = History::default();
        let best: Vec<bool> = [NAN, 0.5, NAN, 0.9].map(|dice| history.push(epoch(&[dice]), compat)).to_vec();
        (history.ema_fg_dice, best)
    };
    let (ema, best) = run(Compat::Corrected);
    assert!(ema[0].is_nan());
    assert_eq!(ema[1..3], [0.5, 0.5]);
    assert_relative_eq!(ema[3], 0.54, epsilon = 1e-12);
    assert_eq!(best[1..], [true, false, true]);
    assert!(run(Compat::Nnunet).0.iter().all(|ema| ema.is_nan()));
}

#[test]
fn storing_keeps_nan() {
    let mut history = History::default();
    history.push(epoch(&[NAN, 0.1 + 0.2]), Compat::Corrected);
    let text = serde_json::to_string(&history).unwrap();
    assert!(text.contains("\"dice_per_class_or_region\":[[null,0.30000000000000004]]"), "{text}");
    let read: History = serde_json::from_str(&text).unwrap();
    assert!(read.dice_per_class_or_region[0][0].is_nan());
    assert_eq!(read.mean_fg_dice, history.mean_fg_dice);
    // Histories of earlier versions and of nnU-Net say nothing of where the time went.
    let mut earlier = History { times: Vec::new(), ..read };
    let text = serde_json::to_string(&earlier).unwrap();
    assert!(!text.contains("\"times\""), "{text}");
    earlier = serde_json::from_str(&text).unwrap();
    earlier.push(epoch(&[0.5]), Compat::Corrected);
    assert_eq!(earlier.times, [None, Some(EpochTimes::default())]);
}
