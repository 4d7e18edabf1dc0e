//! The values of a volume, in words: whether it looks like labels or like an image.

/// What a volume holds, in words.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct ValueSummary {
    /// Smallest finite value.
    pub min: f64,
    /// Largest finite value.
    pub max: f64,
    /// Number of distinct values, counted up to [`ValueSummary::COUNTED`].
    pub distinct: usize,
}

impl ValueSummary {
    /// Distinct values are counted up to here.
    pub const COUNTED: usize = 10_000;
    /// Label maps hold fewer distinct values than this, most images more.
    pub const FEW: usize = 64;

    /// Looks at all values of a volume.
    pub fn of(values: impl Iterator<Item = f64>) -> Self {
        let (mut min, mut max) = (f64::INFINITY, f64::NEG_INFINITY);
        let mut distinct = std::collections::HashSet::new();
        for value in values {
            if value.is_finite() {
                (min, max) = (min.min(value), max.max(value));
            }
            if distinct.len() < Self::COUNTED {
                distinct.insert(value.to_bits());
            }
        }
        Self { min, max, distinct: distinct.len() }
    }
}

impl std::fmt::Display for ValueSummary {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let least = if self.distinct >= Self::COUNTED { "at least " } else { "" };
        write!(f, "{least}{} distinct values from {} to {}", self.distinct, self.min, self.max)?;
        if self.distinct >= Self::FEW { f.write_str(": it looks like an image") } else { Ok(()) }
    }
}
