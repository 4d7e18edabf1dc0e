//! Where each class is, so that patches can be centred on it without scanning the volume.
//!
//! Bit-identical to nnU-Net 2.8: at most 10 000 voxels of each class, or one per cent if that is more, drawn by one seeded
//! stream over all classes.

use ndarray::ArrayView3;

use crate::dataset::{LabelGroup, LabelManager};
use crate::numpy_random::NumpyRandom;

const SEED: u32 = 1234;
const SAMPLES: usize = 10_000;
const MINIMUM_FRACTION: f64 = 0.01;

/// Sampled voxels (z, y, x) of every class or region, and of the annotated part of the volume.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct ClassLocations {
    /// One entry per foreground label or region; the list is empty if the case has none of it.
    pub foreground: Vec<(LabelGroup, Vec<[u32; 3]>)>,
    /// Voxels with any annotation, background included; `None` if the dataset has no ignore label.
    pub annotated: Option<Vec<[u32; 3]>>,
}

impl ClassLocations {
    /// Samples the locations of a label map, in which -1 marks what lies outside the image.
    pub fn sample(seg: ArrayView3<i16>, labels: &LabelManager) -> Self {
        let mut groups = labels.foreground();
        let annotated = labels.ignore_label().map(|_| labels.annotated());
        groups.extend(annotated.clone());

        // Linear indices by label value, in C order; slot 0 is label -1.
        let highest = groups.iter().flat_map(LabelGroup::members).copied().max().unwrap_or(0);
        let slots = usize::from(highest.max(0) as u16) + 2;
        let slot = |label: i16| usize::try_from(i32::from(label) + 1).ok().filter(|&slot| slot < slots);
        let mut by_label: Vec<Vec<u32>> = vec![Vec::new(); slots];
        let mut wanted = vec![false; slots];
        for label in groups.iter().flat_map(LabelGroup::members) {
            if let Some(slot) = slot(*label) {
                wanted[slot] = true;
            }
        }
        for (index, &label) in seg.iter().enumerate() {
            if let Some(slot) = slot(label).filter(|&slot| wanted[slot]) {
                by_label[slot].push(index as u32);
            }
        }

        let (_, height, width) = seg.dim();
        let (height, width) = (height as u32, width as u32);
        let mut random = NumpyRandom::new(SEED);
        let mut draw = |group: &LabelGroup| -> Vec<[u32; 3]> {
            let slots = group.members().iter().filter_map(|&label| slot(label));
            let indices: Vec<u32> = slots.flat_map(|slot| &by_label[slot]).copied().collect();
            let total = indices.len();
            let at_least = (total as f64 * MINIMUM_FRACTION).ceil() as usize;
            let count = SAMPLES.min(total).max(at_least);
            random
                .choice(total as u32, count)
                .into_iter()
                .map(|chosen| {
                    let index = indices[chosen as usize];
                    [index / (width * height), index / width % height, index % width]
                })
                .collect()
        };
        let foreground = labels.foreground().into_iter();
        ClassLocations {
            foreground: foreground.map(|group| (group.clone(), draw(&group))).collect(),
            annotated: annotated.map(|group| draw(&group)),
        }
    }
}
