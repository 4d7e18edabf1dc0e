//! `voxgrad sparsify`.

use super::progress::progress_bar;
use super::schemes::{FRACTION, Range, SchemeOptions};
use anyhow::{Context as _, bail};
use std::path::{Path, PathBuf};
use voxgrad::dataset::Dataset;
use voxgrad::io;
use voxgrad::report::{Overlay, write_annotation};
use voxgrad::sparsify::{Budget, Mask, MaskRule, Mix, Report, Scheme, Settings, Transfer, sparsify_dataset, table};

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
    #[command(flatten)]
    schemes: SchemeOptions,
    /// Blocks in every case, instead of a share of its voxels.
    #[arg(long, value_name = "N", conflicts_with = "fraction", help_heading = "Blocks")]
    count: Option<usize>,
    /// The share is one of the whole dataset's voxels: some cases get several slices or blocks, some none.
    #[arg(long, conflicts_with = "count", help_heading = "Blocks")]
    pool: bool,
    #[command(flatten, next_help_heading = "Mask")]
    mask: MaskOptions,
    /// Schemes and their weights, for example scribbles=2,slices=1,dense=1.
    #[arg(long, value_name = "SCHEME=WEIGHT,...", value_delimiter = ',', help_heading = "Mix")]
    mix: Vec<String>,
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
            "scribbles" => Scheme::Scribbles(self.schemes.scribbles(self.fraction)?),
            "slices" => Scheme::Slices(self.schemes.slices(self.fraction, self.seed, self.pool)?),
            "blocks" => Scheme::Blocks(self.schemes.blocks(self.budget())?),
            "mask" => Scheme::Mask(self.mask()?),
            "dense" => Scheme::Dense,
            other => bail!("`{other}` cannot be part of a mixture; scribbles, slices, blocks, mask and dense can"),
        })
    }

    fn budget(&self) -> Budget {
        let fraction = self.fraction.unwrap_or(FRACTION);
        match (self.count, self.pool) {
            (Some(count), _) => Budget::Count(count),
            (None, true) => Budget::Pooled(fraction),
            (None, false) => Budget::Fraction(fraction),
        }
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
        let mask = &self.mask;
        const MASK: &[&str] = &["mask"];
        let options = [
            ("--fraction", self.fraction.is_some(), &["scribbles", "slices", "blocks"][..]),
            ("--count", self.count.is_some(), &["blocks"]),
            ("--pool", self.pool, &["slices", "blocks"]),
            ("--mask-class", !mask.mask_class.is_empty(), MASK),
            ("--mask-case", !mask.mask_case.is_empty(), MASK),
            ("--mask-box", !mask.mask_box.is_empty(), MASK),
            ("--mask-rules", mask.mask_rules.is_some(), MASK),
            ("--mask-folder", mask.mask_folder.is_some(), MASK),
        ];
        let options = options.into_iter().chain(self.schemes.typed());
        let mut unused: Vec<&str> = options
            .filter(|(_, given, schemes)| *given && !schemes.iter().any(|scheme| active.contains(scheme)))
            .map(|(option, ..)| option)
            .collect();
        if self.scheme != "mix" && !self.mix.is_empty() {
            unused.push("--mix");
        }
        if self.fraction.is_some() && self.schemes.slices_of_scribbles() && active.contains(&"scribbles") {
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
