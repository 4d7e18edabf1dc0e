//! A sparse label map.

use super::plane::Components;
use ndarray::{Array3, ArrayView2, Axis};
use std::collections::BTreeMap;

/// A sparse label map, and what drawing it would take.
#[derive(Debug, Clone, PartialEq)]
pub struct Drawn {
    /// Labels, the ignore label wherever nothing is annotated.
    pub labels: Array3<i16>,
    /// Strokes for each label.
    pub strokes: BTreeMap<i16, u64>,
    /// Whether there was nothing left to annotate before the share asked for was reached.
    pub exhausted: bool,
}

impl Drawn {
    /// Nothing annotated.
    pub(super) fn none(shape: (usize, usize, usize), ignore: i16) -> Self {
        Drawn { labels: Array3::from_elem(shape, ignore), strokes: BTreeMap::new(), exhausted: false }
    }

    /// Everything that `labels` has, drawn slice by slice across z.
    pub(crate) fn whole(labels: Array3<i16>, ignore: i16) -> Self {
        let mut strokes = BTreeMap::new();
        strokes_of_planes(labels.axis_iter(Axis(0)), ignore, &mut strokes);
        Drawn { labels, strokes, exhausted: false }
    }
}

/// Adds one stroke for every connected part of a class in each plane.
pub(super) fn strokes_of_planes<'a>(
    planes: impl IntoIterator<Item = ArrayView2<'a, i16>>,
    ignore: i16,
    strokes: &mut BTreeMap<i16, u64>,
) {
    for plane in planes {
        for component in Components::find(plane).list.iter().filter(|c| c.label != ignore) {
            *strokes.entry(component.label).or_default() += 1;
        }
    }
}
