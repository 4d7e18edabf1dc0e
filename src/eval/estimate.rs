//! A mean over cases, and how sure one may be of it.

use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// How often the cases are drawn anew.
const RESAMPLES: usize = 2000;

/// Mean of a metric over the cases that have it.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Estimate {
    /// The mean; NaN if no case has a value.
    pub mean: f64,
    /// 95 % confidence interval of the mean over cases; `None` for fewer than two cases.
    pub interval: Option<[f64; 2]>,
    /// Cases with a value.
    pub cases: usize,
}

impl Estimate {
    /// Mean of the finite values: what is NaN or infinite counts as no value.
    ///
    /// The interval is the percentile bootstrap's (Efron and Tibshirani, 1993): as many cases as there are are drawn with
    /// replacement 2000 times, and it reaches from the 2.5th to the 97.5th percentile of the means, interpolated
    /// linearly. The seed is fixed, so that the same cases have the same interval. It says what other cases of the same
    /// kind would give, not what another training would; of few cases it is too narrow.
    pub fn of(values: impl IntoIterator<Item = f64>) -> Self {
        let values: Vec<f64> = values.into_iter().filter(|value| value.is_finite()).collect();
        let cases = values.len();
        let mean = values.iter().sum::<f64>() / cases as f64;
        let interval = (cases > 1).then(|| {
            let mut random = ChaCha8Rng::seed_from_u64(0);
            let mut draw = |_| {
                let drawn = (0..cases).map(|_| values[random.random_range(0..cases)]);
                drawn.sum::<f64>() / cases as f64
            };
            let mut means: Vec<f64> = (0..RESAMPLES).map(&mut draw).collect();
            means.sort_unstable_by(f64::total_cmp);
            [0.025, 0.975].map(|share| percentile(&means, share))
        });
        Estimate { mean, interval, cases }
    }
}

/// A quantile of sorted values, at least one, linear between neighbours as numpy's.
pub(super) fn percentile(sorted: &[f64], share: f64) -> f64 {
    let position = share * (sorted.len() - 1) as f64;
    let (below, above) = (sorted[position.floor() as usize], sorted[position.ceil() as usize]);
    below + (above - below) * position.fract()
}
