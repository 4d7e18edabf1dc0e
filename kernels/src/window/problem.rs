//! The shapes of a case and its windows.

use crate::reduce::check_count;
use crate::{Buffer, Context, Dtype, KernelError};

pub(super) const OPERATION: &str = "sliding window";

/// The shapes of a case and its windows. Axes are depth, height, width.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    pub(super) image: [usize; 3],
    pub(super) before: [usize; 3],
    pub(super) padded: [usize; 3],
    pub(super) window: [usize; 3],
    pub(super) channels: usize,
    pub(super) heads: usize,
    pub(super) slices: usize,
}

impl Problem {
    /// Windows of `window` voxels over a case of `image` voxels, which is padded to `padded` with `before` voxels in front;
    /// of `channels` channels `heads` logits are made, whose sums are held for `slices` slices at a time.
    ///
    /// # Errors
    /// [`KernelError::Shape`] for empty extents, a padded volume smaller than a window or the case, or fewer slices than a
    /// window has.
    pub fn new(
        (image, before, padded): ([usize; 3], [usize; 3], [usize; 3]),
        window: [usize; 3],
        channels: usize,
        heads: usize,
        slices: usize,
    ) -> Result<Self, KernelError> {
        let wrong = |what, expected: &str, actual: &dyn std::fmt::Debug| {
            Err(KernelError::shape(OPERATION, what, format_args!("{expected}"), format_args!("{actual:?}")))
        };
        if image.contains(&0) || window.contains(&0) || channels == 0 || heads == 0 {
            return wrong("shape", "at least 1 along every axis", &(image, window, channels, heads));
        }
        let holds = |a: usize| padded[a] >= window[a] && padded[a] >= image[a].saturating_add(before[a]);
        if !(0..3).all(holds) {
            return wrong("padded volume", "at least the window, and the case with what is before it", &padded);
        }
        if slices < window[0] {
            return wrong("slices", "at least those of a window", &slices);
        }
        let of = |extents: &[usize], channels: usize| extents.iter().try_fold(channels, |n, &e| n.checked_mul(e));
        let sums = [slices, padded[1], padded[2]];
        if [of(&image, channels), of(&padded, 1), of(&sums, heads), of(&window, heads), of(&window, channels)]
            .contains(&None)
        {
            return wrong("shape", "countable", &(padded, heads));
        }
        Ok(Self { image, before, padded, window, channels, heads, slices })
    }

    /// Elements of the case, `[channels, depth, height, width]`.
    pub fn case_len(&self) -> usize {
        self.channels * product(self.image)
    }

    /// Elements of one window of the case, `[depth, height, width, channels]`.
    pub fn window_len(&self) -> usize {
        product(self.window) * self.channels
    }

    /// Elements of the logits of one window, `[depth, height, width, heads]`.
    pub fn logits_len(&self) -> usize {
        product(self.window) * self.heads
    }

    /// Weights of one window, `[depth, height, width]`.
    pub fn weights_len(&self) -> usize {
        product(self.window)
    }

    /// Elements of the sums, `[slices, padded height, padded width, heads]`.
    pub fn sums_len(&self) -> usize {
        self.slices * self.slice_len() * self.heads
    }

    /// The same windows for the sums of the weights themselves: logits of one head, all 1.
    pub fn of_weights(&self) -> Self {
        Self { heads: 1, ..self.clone() }
    }

    /// Sums of one head in a slice.
    pub(super) fn slice_len(&self) -> usize {
        self.padded[1] * self.padded[2]
    }

    /// Checks that a window begins inside the padded volume.
    pub(super) fn check_start(&self, start: [usize; 3]) -> Result<(), KernelError> {
        let fits = |a: usize| start[a].checked_add(self.window[a]).is_some_and(|end| end <= self.padded[a]);
        if (0..3).all(fits) {
            return Ok(());
        }
        let expected = format_args!("a window of {:?} inside {:?}", self.window, self.padded);
        Err(KernelError::shape(OPERATION, "start of a window", expected, start))
    }

    /// Checks sums before a launch.
    pub(super) fn check_sums(&self, context: &Context, sums: &Buffer) -> Result<(), KernelError> {
        sums.check(OPERATION, "sums", self.sums_len(), Dtype::F32)?;
        check_count(context, OPERATION, self.sums_len())
    }
}

fn product(extents: [usize; 3]) -> usize {
    extents.into_iter().product()
}
