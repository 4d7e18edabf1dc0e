//! The shape of a U-Net for a patch: how often each axis is halved, with which kernels, and how much memory that takes.

/// Axes are halved while they have at least twice this many voxels.
const MINIMUM_EDGE: f64 = 4.0;

/// Strides and kernels per stage, and the patch rounded up so that every stride divides it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Topology {
    /// Stride into each stage; the first is all ones.
    pub strides: Vec<Vec<usize>>,
    /// Kernel of each stage.
    pub kernel_sizes: Vec<Vec<usize>>,
    /// The patch, each axis a multiple of its divisor.
    pub patch: Vec<usize>,
    /// Product of all strides along each axis.
    pub divisors: Vec<usize>,
}

impl Topology {
    /// nnU-Net's rule: halve the axes that are long enough and not much coarser than the finest of these; an axis gets
    /// kernel 3 as soon as its spacing is within a factor two of the finest.
    ///
    /// A patch of 20 x 320 x 256 voxels of 3.6 x 0.625 x 0.625 mm is first halved in-plane twice, with kernels 1 x 3 x 3.
    pub fn new(spacing: &[f64], patch: &[f64]) -> Self {
        let axes = spacing.len();
        let (mut spacing, mut size) = (spacing.to_vec(), patch.to_vec());
        let mut kernel = vec![1; axes];
        let mut divisors = vec![1; axes];
        let mut strides = vec![vec![1; axes]];
        let mut kernel_sizes = Vec::new();
        let least = |values: &mut dyn Iterator<Item = f64>| values.fold(f64::INFINITY, f64::min);
        loop {
            let long: Vec<usize> = (0..axes).filter(|&a| size[a] >= 2.0 * MINIMUM_EDGE).collect();
            let finest = least(&mut long.iter().map(|&a| spacing[a]));
            let halved: Vec<usize> = long.into_iter().filter(|&a| spacing[a] / finest < 2.0).collect();
            match halved.as_slice() {
                [] => break,
                [only] if size[*only] < 3.0 * MINIMUM_EDGE => break,
                _ => {}
            }
            let finest = least(&mut spacing.iter().copied());
            for axis in 0..axes {
                if spacing[axis] / finest < 2.0 {
                    kernel[axis] = 3;
                }
            }
            let mut stride = vec![1; axes];
            for axis in halved {
                stride[axis] = 2;
                divisors[axis] *= 2;
                spacing[axis] *= 2.0;
                size[axis] = (size[axis] / 2.0).ceil();
            }
            strides.push(stride);
            kernel_sizes.push(kernel.clone());
        }
        kernel_sizes.push(vec![3; axes]);
        let rounded = patch.iter().zip(&divisors);
        Topology {
            patch: rounded.map(|(&length, &divisor)| (length / divisor as f64).ceil() as usize * divisor).collect(),
            strides,
            kernel_sizes,
            divisors,
        }
    }

    /// Number of encoder stages, bottleneck included.
    pub fn stages(&self) -> usize {
        self.strides.len()
    }

    /// Voxels of the feature maps of each stage.
    fn stage_voxels(&self) -> Vec<f64> {
        let mut size: Vec<usize> = self.patch.clone();
        let shrink = |stride: &Vec<usize>| {
            for (length, stride) in size.iter_mut().zip(stride) {
                *length /= stride;
            }
            size.iter().map(|&length| length as f64).product()
        };
        self.strides.iter().map(shrink).collect()
    }

    /// Elements of all feature maps, nnU-Net's estimate of memory: encoder blocks, decoder with its up-convolutions, and
    /// the full-resolution output.
    pub fn feature_map_elements(&self, features: &[usize], encoder: &Encoder, outputs: usize) -> f64 {
        let voxels = self.stage_voxels();
        let maps: Vec<f64> = features.iter().zip(&voxels).map(|(&f, v)| f as f64 * v).collect();
        let bottleneck = maps.len() - 1;
        let (encoder, decoder_maps) = match encoder {
            Encoder::Plain => (maps.iter().map(|map| 2.0 * map).sum::<f64>(), 3.0),
            Encoder::Residual { blocks } => {
                let stem = maps[0];
                let stages = maps.iter().enumerate().map(|(stage, map)| {
                    let changes =
                        stage > 0 && (features[stage] != features[stage - 1] || self.strides[stage].contains(&2));
                    let skip = if changes { 1.0 } else { 0.0 };
                    (2.0 * blocks[stage.min(blocks.len() - 1)] as f64 + skip) * map
                });
                (stem + stages.sum::<f64>(), 2.0)
            }
        };
        let decoder: f64 = maps[..bottleneck].iter().map(|map| decoder_maps * map).sum();
        encoder + decoder + outputs as f64 * voxels[0]
    }
}

/// Kind of encoder, as far as its memory is concerned.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Encoder {
    /// Two convolutions per stage.
    Plain,
    /// Residual blocks of two convolutions, so many per stage; the last number holds for all further stages.
    Residual {
        /// Blocks per stage.
        blocks: Vec<usize>,
    },
}
