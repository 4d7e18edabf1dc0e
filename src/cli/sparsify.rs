//! `voxgrad sparsify`.

use super::progress::progress_bar;
use anyhow::{Context as _, bail};
use std::path::{Path, PathBuf};
use std::str::FromStr;
use voxgrad::dataset::Dataset;
use voxgrad::io;
use voxgrad::report::{Overlay, write_annotation};
use voxgrad::sparsify::{
    Blocks, Budget, Mask, MaskRule, Mix, Report, Scheme, Scribbles, Selection, Settings, Slices, Transfer,
    sparsify_dataset, table,
};

/// Share of slices, or of voxels in blocks, unless another is asked for.
const FRACTION: f64 = 0.1;

/// What was typed.
#[derive(clap::Args)]
pub struct Sparsify {
    /// The densely labelled dataset: dataset.json, imagesTr, labelsTr.
    dataset: PathBuf,
    /// Folder of the new dataset.
    #[arg(short, long, value_name = "FOLDER")]
    output: PathBuf,
    /// What is left annotated: scribbles, slices, blocks, mask (everything but what is taken away), mix (different schemes
    /// for different cases).
    #[arg(long, value_name = "SCHEME", value_parser = ["scribbles", "slices", "blocks", "mask", "mix"])]
    scheme: String,
    /// Share of the slices (slices), or of the voxels of every case (blocks, scribbles); 0.1 unless given, and for
    /// scribbles all slices.
    #[arg(long, value_name = "SHARE")]
    fraction: Option<f64>,
    /// Start of the random numbers; the same seed gives the same files.
    #[arg(long, default_value_t = 1, value_name = "N")]
    seed: u64,
    /// Replace a dataset that this command made before.
    #[arg(long)]
    overwrite: bool,
    /// Copy images instead of giving the files a second name (hard link).
    #[arg(long)]
    copy: bool,
    /// Cases that are worked on at a time; all processor cores unless given.
    #[arg(long, visible_alias = "np", value_name = "N")]
    workers: Option<usize>,
    /// Draw image, sparse annotation and dense labels of every case, as <case>.png in this folder.
    #[arg(long, value_name = "FOLDER")]
    pictures: Option<PathBuf>,
    #[command(flatten, next_help_heading = "Scribbles (defaults are ScribbleBench's)")]
    scribbles: ScribbleOptions,
    #[command(flatten, next_help_heading = "Slices")]
    slices: SliceOptions,
    #[command(flatten, next_help_heading = "Blocks")]
    blocks: BlockOptions,
    #[command(flatten, next_help_heading = "Mask")]
    mask: MaskOptions,
    /// Schemes and their weights, for example scribbles=2,slices=1,dense=1.
    #[arg(long, value_name = "SCHEME=WEIGHT,...", value_delimiter = ',', help_heading = "Mix")]
    mix: Vec<String>,
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
    /// Blocks in every case, instead of a share of its voxels.
    #[arg(long, value_name = "N", conflicts_with = "fraction")]
    count: Option<usize>,
    /// Probability that a block is centred on foreground [0.5].
    #[arg(long, value_name = "SHARE")]
    foreground: Option<f64>,
    /// The share is one of the whole dataset's voxels: some cases get several blocks, some none.
    #[arg(long, conflicts_with = "count")]
    pool: bool,
}

#[derive(clap::Args)]
struct MaskOptions {
    /// Take these classes or regions away.
    #[arg(long, value_name = "NAME", value_delimiter = ',')]
    mask_class: Vec<String>,
    /// Take everything away in these cases; with other conditions, only what meets them too.
    #[arg(long, value_name = "CASE", value_delimiter = ',')]
    mask_case: Vec<String>,
    /// Take this box away: first voxel and the one after the last, along z, y and x.
    #[arg(long, value_name = "Z:Z,Y:Y,X:X", value_delimiter = ',')]
    mask_box: Vec<Range<usize>>,
    /// A file of rules: [{"cases": ["a"], "classes": ["tumour"], "box": [[0, 10], [0, 64], [0, 64]]}].
    #[arg(long, value_name = "FILE")]
    mask_rules: Option<PathBuf>,
    /// A folder of label maps, one for each case that it concerns, not 0 where labels are taken away.
    #[arg(long, value_name = "FOLDER")]
    mask_folder: Option<PathBuf>,
}

/// `LOW:HIGH`, or one value for both.
#[derive(Debug, Clone, Copy)]
struct Range<T>([T; 2]);

impl<T: FromStr + Copy> FromStr for Range<T> {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (low, high) = text.split_once(':').unwrap_or((text, text));
        let number = |text: &str| text.trim().parse().map_err(|_| format!("`{text}` is not a number; give LOW:HIGH"));
        Ok(Range([number(low)?, number(high)?]))
    }
}

impl Sparsify {
    /// Makes the dataset and says what is in it.
    pub fn run(self) -> anyhow::Result<()> {
        let scheme = match self.scheme.as_str() {
            "mix" => self.mixture()?,
            name => self.part(name)?,
        };
        self.refuse_what_is_not_used()?;
        let cores = || std::thread::available_parallelism().map_or(1, usize::from);
        let settings = Settings {
            scheme,
            seed: self.seed,
            copy_images: self.copy,
            overwrite: self.overwrite,
            workers: self.workers.filter(|&n| n > 0).unwrap_or_else(cores),
        };
        let bar =
            progress_bar("sparsify", Dataset::inspect(&self.dataset).map_or(0, |(dataset, _)| dataset.cases.len()));
        let report = sparsify_dataset(&self.dataset, &self.output, &settings, |case| {
            bar.set_message(case.to_owned());
            bar.inc(1);
        })?;
        bar.finish_and_clear();
        print!("{}", table(&report.cases));
        report.warnings.iter().for_each(|warning| eprintln!("warning: {warning}"));
        println!("\n{}", came_along(report.images));
        println!("ignore label: {}", report.ignore);
        println!("wrote {} (what was done: sparsify.json)", self.output.display());
        if let Some(folder) = &self.pictures {
            self.draw(&report, folder)?;
            println!("pictures in {}", folder.display());
        }
        Ok(())
    }

    fn draw(&self, report: &Report, folder: &Path) -> anyhow::Result<()> {
        std::fs::create_dir_all(folder).with_context(|| format!("creating {}", folder.display()))?;
        let dense = Dataset::inspect(&self.dataset)?.0;
        for (files, case) in dense.cases.iter().zip(&report.cases) {
            let (Some(image), Some(labels)) = (files.images.first(), &files.label) else { continue };
            let image = io::read_image(image)?;
            let (labels, ending) = (io::read_labels(labels)?, &dense.json.file_ending);
            let sparse = io::read_labels(&self.output.join(format!("labelsTr/{}{ending}", case.case)))?;
            let foreground = case.classes.iter().filter(|class| class.label != 0);
            let overlay = Overlay {
                case: &case.case,
                image: image.data.view(),
                annotation: Some(sparse.data.view()),
                prediction: labels.data.view(),
                reference: None,
                ignore: Some(report.ignore),
                labels: &foreground.map(|class| (class.label, class.name.clone())).collect::<Vec<_>>(),
                spacing: image.geometry.spacing,
            };
            write_annotation(&folder.join(format!("{}.png", case.case)), &overlay)?;
        }
        Ok(())
    }

    fn mixture(&self) -> anyhow::Result<Scheme> {
        if self.mix.is_empty() {
            bail!("--scheme mix needs --mix, for example --mix scribbles=2,slices=1,dense=1");
        }
        let part = |text: &String| -> anyhow::Result<(Scheme, f64)> {
            let (name, weight) = text.split_once('=').unwrap_or((text, "1"));
            let weight = weight.parse().with_context(|| format!("--mix {text}: the weight is not a number"))?;
            Ok((self.part(name)?, weight))
        };
        Ok(Scheme::Mix(Mix { parts: self.mix.iter().map(part).collect::<anyhow::Result<_>>()? }))
    }

    fn part(&self, name: &str) -> anyhow::Result<Scheme> {
        Ok(match name {
            "scribbles" => Scheme::Scribbles(self.scribbles()?),
            "slices" => Scheme::Slices(self.slices()?),
            "blocks" => Scheme::Blocks(self.blocks()?),
            "mask" => Scheme::Mask(self.mask()?),
            "dense" => Scheme::Dense,
            other => bail!("`{other}` cannot be part of a mixture; scribbles, slices, blocks, mask and dense can"),
        })
    }

    fn scribbles(&self) -> anyhow::Result<Scribbles> {
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
            fraction: self.fraction,
        })
    }

    fn slices(&self) -> anyhow::Result<Slices> {
        let typed = &self.slices;
        let axes = ["z", "y", "x"].map(|axis| typed.axes.is_empty() || typed.axes.iter().any(|name| name == axis));
        let selection = match (typed.select.as_deref(), &typed.planes) {
            (None, Some(path)) => Slices::read_list(path)?,
            (Some(how), Some(_)) => bail!("--select {how} and --planes are two ways to choose slices; give one"),
            (None | Some("random"), None) => Selection::Random,
            (Some("even"), None) => Selection::Even,
            (Some("nnunet"), None) => {
                if u32::try_from(self.seed).is_err() {
                    bail!("--seed {}: numpy's generator takes seeds up to {}", self.seed, u32::MAX);
                }
                Selection::Nnunet
            }
            (Some(_), None) => Selection::Change,
        };
        if matches!(selection, Selection::List(_)) && (!typed.axes.is_empty() || self.fraction.is_some()) {
            bail!("--planes says which slices of which axes to take; leave --axes and --fraction away");
        }
        Ok(Slices { axes, fraction: self.fraction.unwrap_or(FRACTION), selection })
    }

    fn blocks(&self) -> anyhow::Result<Blocks> {
        let typed = &self.blocks;
        let size = match typed.block[..] {
            [] => [20; 3],
            [side] => [side; 3],
            [z, y, x] => [z, y, x],
            _ => bail!("--block {:?}: give one number, or three along z,y,x", typed.block),
        };
        let fraction = self.fraction.unwrap_or(FRACTION);
        let budget = match (typed.count, typed.pool) {
            (Some(count), _) => Budget::Count(count),
            (None, true) => Budget::Pooled(fraction),
            (None, false) => Budget::Fraction(fraction),
        };
        Ok(Blocks { size, budget, foreground: typed.foreground.unwrap_or(0.5) })
    }

    fn mask(&self) -> anyhow::Result<Mask> {
        let typed = &self.mask;
        let bounds = match typed.mask_box[..] {
            [] => None,
            [z, y, x] => Some([z.0, y.0, x.0]),
            _ => bail!("--mask-box: give three ranges, along z,y,x, such as 0:10,0:64,0:64"),
        };
        let rule = MaskRule { cases: typed.mask_case.clone(), classes: typed.mask_class.clone(), bounds };
        let mut rules = match &typed.mask_rules {
            Some(path) => Mask::read_rules(path)?,
            None => Vec::new(),
        };
        if rule != MaskRule::default() {
            rules.push(rule);
        }
        Ok(Mask { rules, folder: typed.mask_folder.clone() })
    }

    /// An option that the scheme does not look at is a misunderstanding.
    fn refuse_what_is_not_used(&self) -> anyhow::Result<()> {
        let active: Vec<&str> = match self.scheme.as_str() {
            "mix" => self.mix.iter().map(|part| part.split('=').next().unwrap_or(part)).collect(),
            scheme => vec![scheme],
        };
        let (drawn, sliced, blocks, mask) = (&self.scribbles, &self.slices, &self.blocks, &self.mask);
        const SCRIBBLES: &[&str] = &["scribbles"];
        const SLICES: &[&str] = &["slices"];
        const BLOCKS: &[&str] = &["blocks"];
        const MASK: &[&str] = &["mask"];
        let options: [(&str, bool, &[&str]); 22] = [
            ("--fraction", self.fraction.is_some(), &["scribbles", "slices", "blocks"]),
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
            ("--count", blocks.count.is_some(), BLOCKS),
            ("--foreground", blocks.foreground.is_some(), BLOCKS),
            ("--pool", blocks.pool, BLOCKS),
            ("--mask-class", !mask.mask_class.is_empty(), MASK),
            ("--mask-case", !mask.mask_case.is_empty(), MASK),
            ("--mask-box", !mask.mask_box.is_empty(), MASK),
            ("--mask-rules", mask.mask_rules.is_some(), MASK),
            ("--mask-folder", mask.mask_folder.is_some(), MASK),
        ];
        let mut unused: Vec<&str> = options
            .into_iter()
            .filter(|(_, given, schemes)| *given && !schemes.iter().any(|scheme| active.contains(scheme)))
            .map(|(option, ..)| option)
            .collect();
        if self.scheme != "mix" && !self.mix.is_empty() {
            unused.push("--mix");
        }
        let by_slices = self.fraction.is_some()
            && (drawn.foreground_slices.is_some() || drawn.background_slices.is_some())
            && active.contains(&"scribbles");
        if by_slices {
            bail!(
                "--fraction draws scribbles until so many voxels are annotated; leave --foreground-slices and \
                   --background-slices away"
            );
        }
        if !unused.is_empty() {
            bail!("{} mean nothing for --scheme {}", unused.join(", "), self.scheme);
        }
        Ok(())
    }
}

/// How images came along.
pub fn came_along(transfer: Transfer) -> String {
    match transfer {
        Transfer { linked, copied: 0 } => {
            format!("images: {linked} files are hard links to the source's (--copy makes copies)")
        }
        Transfer { linked: 0, copied } => format!("images: {copied} files copied"),
        Transfer { linked, copied } => {
            format!("images: {linked} files are hard links to the source's, {copied} copied")
        }
    }
}
