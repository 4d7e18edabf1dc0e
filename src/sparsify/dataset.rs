//! A dataset's sparse twin.
//!
//! A case's draws depend on the seed and the case's name alone, so neither the number of workers nor other cases change
//! them (pooled budgets, mixtures and nnU-Net's slices are shared out over the whole dataset first). All label files are
//! read and judged before anything is written; the new dataset appears under its name when it is complete.

use std::path::{Path, PathBuf};

use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use rayon::prelude::*;
use serde::Serialize;

use super::blocks::{self, Blocks, Budget};
use super::check::check;
use super::output::{NewDataset, Transfer, with_ignore};
use super::report::{self, CaseReport};
use super::scheme::{Scheme, draw};
use super::scribbles::Scribbles;
use super::slices::{self, Planes, Selection, Slices};
use crate::dataset::json::LabelEntry;
use crate::dataset::{CaseFiles, Dataset, DatasetJson};
use crate::error::{AnnotationError, DatasetError, Error, Result};
use crate::io;
use crate::numpy_random::NumpyRandom;
use crate::preprocess::undeclared;

/// How to make a sparse dataset.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Settings {
    /// What is left annotated.
    pub scheme: Scheme,
    /// Start of all draws.
    pub seed: u64,
    /// Give images bytes of their own instead of a second name.
    #[serde(skip)]
    pub copy_images: bool,
    /// Replace a dataset that this function made before.
    #[serde(skip)]
    pub overwrite: bool,
    /// Cases that are worked on at a time.
    #[serde(skip)]
    pub workers: usize,
}

/// What was made.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Report {
    /// Version of this program.
    pub voxgrad: &'static str,
    /// The dense dataset.
    pub source: PathBuf,
    /// What was asked for.
    pub settings: Settings,
    /// The ignore label.
    pub ignore: i16,
    /// How images came along.
    pub images: Transfer,
    /// From what nothing can be learned.
    pub warnings: Vec<String>,
    /// Cases in the order of their names.
    pub cases: Vec<CaseReport>,
}

/// Makes the sparse twin of a dense dataset in `target`: labels, `dataset.json` with the ignore label (one above the highest
/// label), images, test cases and splits, and `sparsify.json` with the report. `on_case` is called after each case, from
/// several threads.
///
/// # Errors
/// [`Error::Several`] with all that is wrong with settings and label files; [`FileError::OutputExists`](crate::error::FileError::OutputExists); the errors of
/// [`Dataset::inspect`], of NIfTI input and output. Nothing is left in `target` then.
pub fn sparsify_dataset(
    source: &Path,
    target: &Path,
    settings: &Settings,
    on_case: impl Fn(&str) + Sync,
) -> Result<Report> {
    check(&settings.scheme)?;
    let (dataset, mut failures) = Dataset::inspect(source)?;
    let ignore = dataset.labels.all_labels().last().copied().unwrap_or(0) + 1;
    let description = with_ignore(&dataset.json, ignore)?;
    let pool =
        rayon::ThreadPoolBuilder::new().num_threads(settings.workers).build().map_err(|error| Error::Setting {
            setting: "workers",
            value: format!("{}: {error}", settings.workers),
            expected: "as many threads as the system gives",
        })?;
    let work = Sparsifying { dataset: &dataset, ignore, settings, classes: classes(&dataset.json) };

    let judged: Vec<Result<Judged>> = pool.install(|| dataset.cases.par_iter().map(|case| work.judge(case)).collect());
    let mut cases = Vec::with_capacity(judged.len());
    for result in judged {
        match result {
            Ok(case) => cases.push(case),
            Err(failure) => failures.push(failure),
        }
    }
    if failures.is_empty() {
        failures.extend(work.empty_classes(&cases));
    }
    let shapes: Vec<[usize; 3]> = cases.iter().map(|case| case.shape).collect();
    let jobs = if failures.is_empty() { work.share_out(&shapes, &mut failures)? } else { Vec::new() };
    Error::all(failures)?;

    let new = NewDataset::begin(target, source, "sparsify.json", settings.overwrite)?;
    let made: Vec<Result<(CaseReport, Transfer)>> = pool.install(|| {
        let work_on = |(case, job): (&CaseFiles, &Job)| {
            let made = work.make(case, job, &new);
            on_case(&case.name);
            made
        };
        dataset.cases.par_iter().zip(&jobs).map(work_on).collect()
    });
    let mut images = new.take_the_rest(source, settings.copy_images)?;
    let (mut cases, mut failures) = (Vec::with_capacity(made.len()), Vec::new());
    for result in made {
        match result {
            Ok((case, transfer)) => {
                cases.push(case);
                images += transfer;
            }
            Err(failure) => failures.push(failure),
        }
    }
    Error::all(failures)?;
    let mut warnings = report::warnings(&cases);
    warnings.extend(short_of_budget(&settings.scheme, &cases));
    let report = Report {
        voxgrad: env!("CARGO_PKG_VERSION"),
        source: source.into(),
        settings: settings.clone(),
        ignore,
        images,
        warnings,
        cases,
    };
    io::write_json(&new.path("dataset.json"), &description)?;
    io::write_json(&new.path("sparsify.json"), &report)?;
    new.commit()?;
    Ok(report)
}

/// Names and label values of all entries of `labels` but the ignore label.
fn classes(json: &DatasetJson) -> Vec<(String, Vec<i16>)> {
    let members = |entry: &LabelEntry| match entry {
        LabelEntry::Label(label) => vec![*label as i16],
        LabelEntry::Region(labels) => labels.iter().map(|&label| label as i16).collect(),
    };
    let entries = json.labels.iter().filter(|(name, _)| name != "ignore");
    entries.map(|(name, entry)| (name.clone(), members(entry))).collect()
}

/// Says where blocks of a share of all voxels came out as less: they are drawn where others lie already.
fn short_of_budget(scheme: &Scheme, cases: &[CaseReport]) -> Option<String> {
    let Scheme::Blocks(Blocks { budget: Budget::Pooled(asked), .. }) = scheme else { return None };
    let (annotated, all) = cases.iter().fold((0, 0), |(a, b), case| (a + case.annotated, b + case.voxels()));
    let share = annotated as f64 / all as f64;
    let (got, asked_for) = (100.0 * share, 100.0 * asked);
    (share < 0.95 * asked)
        .then(|| format!("blocks overlap: {got:.2} % of the voxels are annotated, not {asked_for:.2} %"))
}

/// What a first look at a label file tells.
struct Judged {
    shape: [usize; 3],
    /// Whether each of the dataset's labels occurs.
    present: Vec<bool>,
}

/// What is to be done with a case.
struct Job<'a> {
    scheme: &'a Scheme,
    /// What the case got of what is shared out over the dataset.
    part: Part,
}

enum Part {
    Own,
    Blocks(usize),
    Planes(Planes),
}

struct Sparsifying<'a> {
    dataset: &'a Dataset,
    ignore: i16,
    settings: &'a Settings,
    classes: Vec<(String, Vec<i16>)>,
}

impl Sparsifying<'_> {
    fn label_file<'c>(&self, case: &'c CaseFiles) -> Result<&'c Path> {
        let missing = || {
            Error::Dataset(DatasetError::LabelMissing {
                case: case.name.clone(),
                path: self.dataset.folder.join("labelsTr"),
            })
        };
        case.label.as_deref().ok_or_else(missing)
    }

    /// Reads a label file and finds out whether it can be used.
    fn judge(&self, case: &CaseFiles) -> Result<Judged> {
        let path = self.label_file(case)?;
        let map = io::read_labels(path)?;
        let shape: [usize; 3] = map.data.dim().into();
        if shape.contains(&1) {
            return Err(Error::Annotation(AnnotationError::FlatVolume {
                case: case.name.clone(),
                path: path.into(),
                shape,
            }));
        }
        // A label that is declared is expected, the ignore label only where the dataset has one already.
        let expected = self.dataset.labels.expected_labels();
        let mut present = vec![false; expected.len()];
        for ((z, y, x), &value) in map.data.indexed_iter() {
            // Labels are consecutive from 0.
            match usize::try_from(value).ok().and_then(|index| present.get_mut(index)) {
                Some(seen) => *seen = true,
                None => {
                    let (case, path) = (case.name.clone(), path.to_owned());
                    let found = undeclared(map.data.view(), &expected);
                    return Err(Error::Dataset(DatasetError::UnexpectedLabel {
                        case,
                        path,
                        value,
                        voxel: [z, y, x],
                        expected: expected.into(),
                        found: found.into(),
                    }));
                }
            }
        }
        Ok(Judged { shape, present })
    }

    /// Classes that no case has.
    fn empty_classes(&self, cases: &[Judged]) -> Vec<Error> {
        let names = report::label_names(&self.dataset.labels);
        let empty = names.into_iter().filter(|(label, _)| !cases.iter().any(|case| case.present[*label as usize]));
        let path = &self.dataset.json.path;
        empty
            .map(|(label, name)| Error::Dataset(DatasetError::ClassEmpty { path: path.clone(), name, label }))
            .collect()
    }

    /// Decides what depends on more than one case, and finds cases whose settings cannot be met.
    fn share_out(&self, shapes: &[[usize; 3]], failures: &mut Vec<Error>) -> Result<Vec<Job<'_>>> {
        let mut random = ChaCha8Rng::seed_from_u64(self.settings.seed);
        let cases = &self.dataset.cases;
        let mut schemes: Vec<&Scheme> = vec![&self.settings.scheme; cases.len()];
        if let Scheme::Mix(mix) = &self.settings.scheme {
            schemes = mix.assign(cases.len(), &mut random).into_iter().map(|part| &mix.parts[part].0).collect();
        }
        let mut jobs: Vec<Job> = schemes.iter().map(|&scheme| Job { scheme, part: Part::Own }).collect();
        let parts: Vec<&Scheme> = match &self.settings.scheme {
            Scheme::Mix(mix) => mix.parts.iter().map(|(scheme, _)| scheme).collect(),
            scheme => vec![scheme],
        };
        for scheme in parts {
            let mine: Vec<usize> = (0..cases.len()).filter(|&case| std::ptr::eq(jobs[case].scheme, scheme)).collect();
            let shapes: Vec<[usize; 3]> = mine.iter().map(|&case| shapes[case]).collect();
            match scheme {
                Scheme::Blocks(blocks) => {
                    failures.extend(
                        mine.iter()
                            .zip(&shapes)
                            .filter_map(|(&case, &shape)| blocks.check(&cases[case].name, shape).err()),
                    );
                    if let Budget::Pooled(fraction) = blocks.budget {
                        let counts = blocks::pool(blocks, fraction, &shapes, &mut random);
                        mine.iter().zip(counts).for_each(|(&case, count)| jobs[case].part = Part::Blocks(count));
                    }
                }
                Scheme::Slices(slices) => match &slices.selection {
                    Selection::Nnunet => {
                        let mut random = NumpyRandom::new(self.settings.seed as u32);
                        for (&case, &shape) in mine.iter().zip(&shapes) {
                            jobs[case].part = Part::Planes(slices.nnunets(shape, &mut random));
                        }
                    }
                    Selection::Pooled => {
                        let planes = slices.pool(&shapes, &mut random);
                        mine.iter().zip(planes).for_each(|(&case, planes)| jobs[case].part = Part::Planes(planes));
                    }
                    Selection::List(list) => {
                        let names: Vec<String> = cases.iter().map(|case| case.name.clone()).collect();
                        let strangers = list.keys().filter(|name| *name != "*" && !names.contains(name));
                        failures.extend(strangers.map(|name| {
                            Error::Annotation(AnnotationError::NameUnknown {
                                what: "case",
                                name: name.clone(),
                                available: names.clone(),
                            })
                        }));
                        for (&case, &shape) in mine.iter().zip(&shapes) {
                            match Slices::listed(list, &cases[case].name, shape) {
                                Ok(planes) => jobs[case].part = Part::Planes(planes),
                                Err(failure) => failures.push(failure),
                            }
                        }
                    }
                    _ => {}
                },
                Scheme::Mask(mask) => {
                    failures.extend(mask.check(cases, &self.classes, &self.dataset.json.file_ending)?);
                }
                _ => {}
            }
        }
        Ok(jobs)
    }

    /// Writes a case's sparse labels and brings its images along.
    fn make(&self, case: &CaseFiles, job: &Job, new: &NewDataset) -> Result<(CaseReport, Transfer)> {
        let map = io::read_labels(self.label_file(case)?)?;
        let dense = map.data.view();
        let annotation = match (job.scheme, &job.part) {
            (Scheme::Slices(_), Part::Planes(planes)) => slices::keep(dense, self.ignore, planes),
            (Scheme::Blocks(blocks), part) => {
                let pooled = if let Part::Blocks(count) = part { *count } else { 0 };
                blocks.draw(dense, self.ignore, pooled, &mut self.random(case))
            }
            (Scheme::Mask(mask), _) => {
                let ending = &self.dataset.json.file_ending;
                mask.apply(&map, &case.name, ending, &self.dataset.labels, &self.classes, self.ignore)?
            }
            (scheme, _) => draw(scheme, dense, self.ignore, &mut self.random(case)),
        };
        let names = report::label_names(&self.dataset.labels);
        let report = CaseReport::new(&case.name, job.scheme.name(), dense, &annotation, &names);
        self.met(job.scheme, &report, annotation.exhausted)?;
        let ending = &self.dataset.json.file_ending;
        let path = new.path(&format!("labelsTr/{}{ending}", case.name));
        io::write_labels_as_stored(&path, annotation.labels.view(), &map.geometry)?;
        Ok((report, new.take_images(case, ending, self.settings.copy_images)?))
    }

    /// Whether a share of voxels that was asked for was reached.
    fn met(&self, scheme: &Scheme, report: &CaseReport, exhausted: bool) -> Result<()> {
        let (fraction, too_little, too_much) = match scheme {
            Scheme::Scribbles(Scribbles { fraction: Some(fraction), saturate: false, .. }) => (
                *fraction,
                "every slice has scribbles already: draw thicker or more of them, or lower the fraction",
                "the scribbles of a single slice are more than twice as much: draw thinner or fewer, or raise the fraction",
            ),
            Scheme::Blocks(Blocks { budget: Budget::Fraction(fraction), .. }) => (
                *fraction,
                "no place for a block is left: lower the share of foreground blocks or the fraction",
                "a single block is more than twice as much: use smaller blocks",
            ),
            _ => return Ok(()),
        };
        let remedy = match (exhausted && report.share() < 0.95 * fraction, report.annotated == 0) {
            (true, _) => too_little,
            (_, true) => too_much,
            _ => return Ok(()),
        };
        Err(Error::Annotation(AnnotationError::BudgetUnmet {
            case: report.case.clone(),
            fraction,
            reached: report.share(),
            remedy,
        }))
    }

    /// The random numbers of a case: its own stream of the seed's.
    fn random(&self, case: &CaseFiles) -> ChaCha8Rng {
        let mut random = ChaCha8Rng::seed_from_u64(self.settings.seed);
        // FNV-1a: the same on every machine and for every version.
        let hash = case
            .name
            .bytes()
            .fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3));
        random.set_stream(hash);
        random
    }
}
