//! What is typed about schemes of annotation: for one of them, or for several that are compared.

use anyhow::bail;
use std::path::PathBuf;
use std::str::FromStr;
use voxgrad::sparsify::{Blocks, Budget, Scribbles, Selection, Slices};

/// Share of slices, or of voxels in blocks, unless another is asked for.
pub const FRACTION: f64 = 0.1;

/// The options of scribbles, slices and blocks.
#[derive(clap::Args)]
pub struct SchemeOptions {
    #[command(flatten, next_help_heading = "Scribbles (defaults are ScribbleBench's)")]
    scribbles: ScribbleOptions,
    #[command(flatten, next_help_heading = "Slices")]
    slices: SliceOptions,
    #[command(flatten, next_help_heading = "Blocks")]
    blocks: BlockOptions,
}

#[derive(clap::Args)]
struct ScribbleOptions {
    /// Thickness in pixels, odd [3].
    #[arg(long, value_name = "PIXELS")]
    thickness: Option<usize>,
    /// Interior scribbles of a component [1].
    #[arg(long, value_name = "N")]
    interior: Option<usize>,
    /// Control points of an interior scribble [4].
    #[arg(long, value_name = "N")]
    control_points: Option<usize>,
    /// Border scribbles of a component [1].
    #[arg(long, value_name = "N")]
    border: Option<usize>,
    /// Distance of the scribble's edge from the border, in pixels [1:4].
    #[arg(long, value_name = "LOW:HIGH")]
    border_depth: Option<Range<usize>>,
    /// Share of the outline that a border scribble follows [0.07:0.15].
    #[arg(long, value_name = "LOW:HIGH")]
    border_length: Option<Range<f64>>,
    /// Components of fewer pixels are left out [1].
    #[arg(long, value_name = "PIXELS")]
    smallest_area: Option<usize>,
    /// Share of the slices with foreground that are scribbled on [1].
    #[arg(long, value_name = "SHARE|LOW:HIGH")]
    foreground_slices: Option<Range<f64>>,
    /// Share of the slices without foreground that are scribbled on [1].
    #[arg(long, value_name = "SHARE|LOW:HIGH")]
    background_slices: Option<Range<f64>>,
}

#[derive(clap::Args)]
struct SliceOptions {
    /// Axes across which slices lie, of z, y and x; all for slices, z for scribbles unless given.
    #[arg(long, value_name = "AXES", value_delimiter = ',', value_parser = ["z", "y", "x"])]
    axes: Vec<String>,
    /// How slices are chosen: random, even, change (where the labels change most), nnunet (as its integration test draws
    /// them, with --seed 1234) [random].
    #[arg(long, value_name = "HOW", value_parser = ["random", "even", "change", "nnunet"])]
    select: Option<String>,
    /// A file that lists the slices: {"*": {"z": [10, 20]}, "case_7": {"y": [3]}}.
    #[arg(long, value_name = "FILE")]
    planes: Option<PathBuf>,
}

#[derive(clap::Args)]
struct BlockOptions {
    /// Extent of a block: a number, or three along z,y,x [20].
    #[arg(long, value_name = "VOXELS", value_delimiter = ',')]
    block: Vec<usize>,
    /// Probability that a block is centred on foreground [0.5].
    #[arg(long, value_name = "SHARE")]
    foreground: Option<f64>,
}

/// `LOW:HIGH`, or one value for both.
#[derive(Debug, Clone, Copy)]
pub struct Range<T>(pub [T; 2]);

impl<T: FromStr + Copy> FromStr for Range<T> {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (low, high) = text.split_once(':').unwrap_or((text, text));
        let number = |text: &str| text.trim().parse().map_err(|_| format!("`{text}` is not a number; give LOW:HIGH"));
        Ok(Range([number(low)?, number(high)?]))
    }
}

impl SchemeOptions {
    /// The scribbles that were asked for.
    pub fn scribbles(&self, fraction: Option<f64>) -> anyhow::Result<Scribbles> {
        let (typed, default) = (&self.scribbles, Scribbles::default());
        let axis = match &self.slices.axes[..] {
            [] => 0,
            [axis] => ["z", "y", "x"].iter().position(|name| name == axis).unwrap_or(0),
            _ => bail!("--axes: scribbles are drawn on the slices of one axis"),
        };
        Ok(Scribbles {
            axis,
            thickness: typed.thickness.unwrap_or(default.thickness),
            interior: typed.interior.unwrap_or(default.interior),
            control_points: typed.control_points.unwrap_or(default.control_points),
            border: typed.border.unwrap_or(default.border),
            border_depth: typed.border_depth.map_or(default.border_depth, |range| range.0),
            border_length: typed.border_length.map_or(default.border_length, |range| range.0),
            smallest_area: typed.smallest_area.unwrap_or(default.smallest_area),
            foreground_slices: typed.foreground_slices.map_or(default.foreground_slices, |range| range.0),
            background_slices: typed.background_slices.map_or(default.background_slices, |range| range.0),
            fraction,
            saturate: false,
        })
    }

    /// The slices that were asked for; with `pool` the fraction is one of the whole dataset's voxels.
    pub fn slices(&self, fraction: Option<f64>, seed: u64, pool: bool) -> anyhow::Result<Slices> {
        let typed = &self.slices;
        let axes = ["z", "y", "x"].map(|axis| typed.axes.is_empty() || typed.axes.iter().any(|name| name == axis));
        if pool && (typed.planes.is_some() || typed.select.as_deref().is_some_and(|how| how != "random")) {
            bail!("slices of a pooled budget are drawn at random over all cases: leave --select and --planes away");
        }
        let selection = match (typed.select.as_deref(), &typed.planes) {
            (None, Some(path)) => Slices::read_list(path)?,
            (Some(how), Some(_)) => bail!("--select {how} and --planes are two ways to choose slices; give one"),
            (None | Some("random"), None) if pool => Selection::Pooled,
            (None | Some("random"), None) => Selection::Random,
            (Some("even"), None) => Selection::Even,
            (Some("nnunet"), None) => {
                if u32::try_from(seed).is_err() {
                    bail!("--seed {seed}: numpy's generator takes seeds up to {}", u32::MAX);
                }
                Selection::Nnunet
            }
            (Some(_), None) => Selection::Change,
        };
        if matches!(selection, Selection::List(_)) && (!typed.axes.is_empty() || fraction.is_some()) {
            bail!("--planes says which slices of which axes to take; leave --axes and --fraction away");
        }
        Ok(Slices { axes, fraction: fraction.unwrap_or(FRACTION), selection })
    }

    /// Blocks as they were asked for, so many.
    pub fn blocks(&self, budget: Budget) -> anyhow::Result<Blocks> {
        let typed = &self.blocks;
        let size = match typed.block[..] {
            [] => [20; 3],
            [side] => [side; 3],
            [z, y, x] => [z, y, x],
            _ => bail!("--block {:?}: give one number, or three along z,y,x", typed.block),
        };
        Ok(Blocks { size, budget, foreground: typed.foreground.unwrap_or(0.5) })
    }

    /// Whether it was typed on which slices to scribble.
    pub fn slices_of_scribbles(&self) -> bool {
        self.scribbles.foreground_slices.is_some() || self.scribbles.background_slices.is_some()
    }

    /// Each option, whether it was typed, and the schemes that look at it.
    pub fn typed(&self) -> [(&'static str, bool, &'static [&'static str]); 14] {
        let (drawn, sliced, blocks) = (&self.scribbles, &self.slices, &self.blocks);
        const SCRIBBLES: &[&str] = &["scribbles"];
        const SLICES: &[&str] = &["slices"];
        const BLOCKS: &[&str] = &["blocks"];
        [
            ("--axes", !sliced.axes.is_empty(), &["scribbles", "slices"]),
            ("--thickness", drawn.thickness.is_some(), SCRIBBLES),
            ("--interior", drawn.interior.is_some(), SCRIBBLES),
            ("--control-points", drawn.control_points.is_some(), SCRIBBLES),
            ("--border", drawn.border.is_some(), SCRIBBLES),
            ("--border-depth", drawn.border_depth.is_some(), SCRIBBLES),
            ("--border-length", drawn.border_length.is_some(), SCRIBBLES),
            ("--smallest-area", drawn.smallest_area.is_some(), SCRIBBLES),
            ("--foreground-slices", drawn.foreground_slices.is_some(), SCRIBBLES),
            ("--background-slices", drawn.background_slices.is_some(), SCRIBBLES),
            ("--select", sliced.select.is_some(), SLICES),
            ("--planes", sliced.planes.is_some(), SLICES),
            ("--block", !blocks.block.is_empty(), BLOCKS),
            ("--foreground", blocks.foreground.is_some(), BLOCKS),
        ]
    }
}
