//! `voxgrad import`.

use super::progress::progress_bar;
use super::sparsify::came_along;
use anyhow::{Context as _, bail};
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use voxgrad::dataset::{DatasetJson, cases_in};
use voxgrad::import::{Annotations, Overlap, Report, Segments, Settings, import};

/// What was typed.
#[derive(clap::Args)]
pub struct Import {
    /// Images and their description: dataset.json and imagesTr.
    dataset: PathBuf,
    /// Folder of the new dataset.
    #[arg(short, long, value_name = "FOLDER")]
    output: PathBuf,
    /// Folder of label maps (case_1.nii.gz) or segmentations of 3D Slicer (case_1.seg.nrrd) named as their cases; give it
    /// once for each annotator. The dataset's labelsTr
    /// unless given. Where annotators disagree voxels are ignored.
    #[arg(long, value_name = "FOLDER")]
    labels: Vec<PathBuf>,
    /// Folder of one binary mask a class: case_1/liver.nii.gz, or case_1/segmentations/liver.nii.gz.
    #[arg(long, value_name = "FOLDER", conflicts_with_all = ["labels", "unlabelled", "map"])]
    masks: Option<PathBuf>,
    /// The value of voxels that nobody labelled, which become ignored; often 0 or 255.
    #[arg(long, value_name = "VALUE", allow_negative_numbers = true)]
    unlabelled: Option<i16>,
    /// Values that stand for another label, by its name or value, for example 4=background; or names of segments that are no
    /// names of labels, for example Segment_1=tumour.
    #[arg(long, value_name = "VALUE|SEGMENT=LABEL,...", value_delimiter = ',', allow_hyphen_values = true)]
    map: Vec<String>,
    /// Where masks or segments of several classes overlap: ignore the voxel, or take the class that comes first or last in `labels`
    /// [ignore].
    #[arg(long, value_name = "RULE", value_parser = ["ignore", "first", "last"])]
    overlap: Option<String>,
    /// What voxels in no mask are: background or ignore [background].
    #[arg(long, value_name = "WHAT", value_parser = ["background", "ignore"])]
    outside: Option<String>,
    /// A class without a mask file is not in the case; refused unless given.
    #[arg(long)]
    missing_is_empty: bool,
    /// Lay annotations on the images voxel by voxel although their headers place them elsewhere.
    #[arg(long)]
    by_index: bool,
    /// Replace a dataset that this command made before.
    #[arg(long)]
    overwrite: bool,
    /// Copy images instead of giving the files a second name (hard link).
    #[arg(long)]
    copy: bool,
    /// Cases that are worked on at a time; all processor cores unless given.
    #[arg(long, visible_alias = "np", value_name = "N")]
    workers: Option<usize>,
}

impl Import {
    /// Makes the dataset and says what was turned into what.
    pub fn run(self) -> anyhow::Result<()> {
        let mut map: Vec<(i16, String)> = Vec::new();
        let mut names: Vec<(String, String)> = Vec::new();
        for text in &self.map {
            let (from, label) =
                text.split_once('=').with_context(|| format!("--map {text}: give VALUE=LABEL or SEGMENT=LABEL"))?;
            match from.parse() {
                Ok(value) => map.push((value, label.to_owned())),
                Err(_) => names.push((from.to_owned(), label.to_owned())),
            }
        }
        let values: BTreeSet<i16> = map.iter().map(|(value, _)| *value).collect();
        let segments: BTreeSet<&String> = names.iter().map(|(segment, _)| segment).collect();
        if values.len() + segments.len() < self.map.len() {
            bail!("--map {}: a value or segment is mapped twice", self.map.join(","));
        }
        let of_masks = [("--outside", self.outside.is_some()), ("--missing-is-empty", self.missing_is_empty)];
        if let (None, Some((option, _))) = (&self.masks, of_masks.iter().find(|(_, given)| *given)) {
            bail!("{option} means nothing without --masks");
        }
        let overlap = match self.overlap.as_deref() {
            Some("first") => Overlap::First,
            Some("last") => Overlap::Last,
            _ => Overlap::Ignore,
        };
        let folders = match self.labels.is_empty() {
            true => vec![self.dataset.join("labelsTr")],
            false => self.labels,
        };
        if self.masks.is_none() && self.overlap.is_some() && !folders.iter().any(|folder| has_segmentations(folder)) {
            bail!("--overlap means nothing without --masks or segmentations of 3D Slicer (.seg.nrrd)");
        }
        let annotations = match self.masks {
            Some(folder) => Annotations::Masks {
                folder,
                overlap,
                outside_ignored: self.outside.as_deref() == Some("ignore"),
                missing_empty: self.missing_is_empty,
            },
            None => Annotations::LabelMaps(folders),
        };
        let cores = || std::thread::available_parallelism().map_or(1, usize::from);
        let settings = Settings {
            annotations,
            unlabelled: self.unlabelled,
            map,
            segments: Segments { names, overlap },
            by_index: self.by_index,
            copy_images: self.copy,
            overwrite: self.overwrite,
            workers: self.workers.filter(|&n| n > 0).unwrap_or_else(cores),
        };
        let images = DatasetJson::read(&self.dataset.join("dataset.json"))
            .and_then(|json| cases_in(&self.dataset.join("imagesTr"), None, &json))
            .map_or(0, |cases| cases.len());
        let bar = progress_bar("import", images);
        let report = import(&self.dataset, &self.output, &settings, |case| {
            bar.set_message(case.to_owned());
            bar.inc(1);
        })?;
        bar.finish_and_clear();
        print(&report);
        println!("wrote {} (what was done: import.json)", self.output.display());
        Ok(())
    }
}

/// Whether a folder has a segmentation of 3D Slicer.
fn has_segmentations(folder: &Path) -> bool {
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
    entries.into_iter().any(|entry| entry.file_name().to_string_lossy().ends_with(".seg.nrrd"))
}

fn print(report: &Report) {
    let all: u64 = report.cases.iter().map(|case| case.voxels()).sum();
    let percent = |part: u64| 100.0 * part as f64 / all.max(1) as f64;
    println!("{} cases", report.cases.len());
    if let Some(first) = report.cases.first() {
        for (index, class) in first.classes.iter().enumerate() {
            let voxels: u64 = report.cases.iter().map(|case| case.classes[index].annotated).sum();
            println!("  {voxels:>13} voxels ({:>7.3} %) are {} ({})", percent(voxels), class.name, class.label);
        }
    }
    let sum = |value: fn(&voxgrad::import::Turned) -> u64| report.turned.values().map(value).sum::<u64>();
    let (unlabelled, disagreeing) = (sum(|turned| turned.unlabelled), sum(|turned| turned.disagreeing));
    let overlapping = sum(|turned| turned.overlapping);
    println!(
        "  {unlabelled:>13} voxels ({:>7.3} %) were not labelled: ignored ({})",
        percent(unlabelled),
        report.ignore
    );
    if disagreeing > 0 {
        println!("  {disagreeing:>13} voxels on which annotators disagree: ignored");
    }
    if overlapping > 0 {
        println!("  {overlapping:>13} voxels in masks or segments of several classes (see the rule in dataset.json)");
    }
    for (value, label) in &report.settings.map {
        let count: u64 = report.turned.values().filter_map(|turned| turned.mapped.get(value)).sum();
        println!("  {count:>13} voxels of value {value} were turned into {label}");
    }
    let mut segments: BTreeMap<(&str, &str), u64> = BTreeMap::new();
    for (name, (label, voxels)) in report.turned.values().flat_map(|turned| &turned.segments) {
        *segments.entry((name.as_str(), label.as_str())).or_default() += voxels;
    }
    for ((name, label), count) in segments {
        println!("  {count:>13} voxels of segment {name} were turned into {label}");
    }
    let outside = sum(|turned| turned.outside);
    if outside > 0 {
        println!("  {outside:>13} voxels of segments lie outside the images: left out");
    }
    let by_index = report.turned.values().filter(|turned| turned.placed_by_index).count();
    if by_index > 0 {
        println!("in {by_index} cases headers disagree: annotations were laid on the images voxel by voxel");
    }
    let unused: BTreeSet<&String> = report.turned.values().flat_map(|turned| &turned.unused).collect();
    if !unused.is_empty() {
        eprintln!("warning: masks or segments of classes that `labels` does not declare were not used: {unused:?}");
    }
    report.warnings.iter().for_each(|warning| eprintln!("warning: {warning}"));
    println!("{}", came_along(report.images));
}
