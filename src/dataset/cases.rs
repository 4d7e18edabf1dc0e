//! Which files of a folder belong to which case, and which to none.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use super::case_files::CaseFiles;
use super::json::DatasetJson;
use crate::error::{DatasetError, Error, Result};
use crate::io::{self, Listing};

/// What was found in a folder of images.
#[derive(Debug, Default)]
pub struct Cases {
    /// Complete cases, sorted by name.
    pub complete: Vec<CaseFiles>,
    /// What is wrong with the other files, each kind of fault in one error.
    pub failures: Vec<Error>,
    /// Number of cases that somebody meant, whatever is wrong with their files.
    pub meant: usize,
    /// What was ignored, to be told to the user.
    pub notes: Vec<String>,
}

/// Cases of a folder of images, sorted by name, each with its label map where `labels` names a folder.
///
/// nnU-Net's rule: a case is everything before `_` + four digits + ending.
///
/// # Errors
/// As [`list_cases`]; its failures too, all of them together.
pub fn cases_in(images: &Path, labels: Option<&Path>, json: &DatasetJson) -> Result<Vec<CaseFiles>> {
    let found = list_cases(images, labels, json)?;
    Error::all(found.failures)?;
    Ok(found.complete)
}

/// The complete cases of a folder of images, each with its label map where `labels` names a folder, and what is wrong with
/// all other files. Files of other kinds (a text, say) are ignored and noted.
///
/// # Errors
/// [`DatasetError::DatasetEmpty`], [`FileError::Io`](crate::error::FileError::Io).
pub fn list_cases(images: &Path, labels: Option<&Path>, json: &DatasetJson) -> Result<Cases> {
    let (ending, declared) = (json.file_ending.as_str(), json.channel_names.len());
    let image_names = io::list_folder(images)?;
    let image_files = ByEnding::new(&image_names, ending);
    if image_files.stems.is_empty() {
        return Err(Error::Dataset(DatasetError::DatasetEmpty {
            path: images.into(),
            ending: ending.into(),
            other_ending: other_ending(ending),
            others: image_files.other_ending.len(),
        }));
    }
    let label_names = labels.filter(|folder| folder.is_dir()).map(io::list_folder).transpose()?;
    let label_files = label_names.as_ref().map(|names| ByEnding::new(names, ending)).unwrap_or_default();
    let numbers = CaseNumbers::read(&image_files, &label_files.stems, declared);
    let faults = LabelFaults::find(&label_files.stems, &numbers);

    let mut found = Cases { meant: numbers.cases(), ..Cases::default() };
    let file = |stem: &str| format!("{stem}{ending}");
    let files = |stems: &[String]| stems.iter().map(|stem| file(stem)).collect::<Vec<_>>();
    if !numbers.missing.is_empty() {
        found.failures.push(Error::Dataset(DatasetError::ChannelNumberMissing {
            folder: images.into(),
            files: files(&numbers.missing),
        }));
    }
    if !numbers.nameless.is_empty() {
        let (files, ending) = (files(&numbers.nameless), ending.into());
        found.failures.push(Error::Dataset(DatasetError::ImageNames { folder: images.into(), files, ending }));
    }
    for (&case, channels) in &numbers.channels {
        let image = |&channel: &usize| file(&format!("{case}_{channel:04}"));
        let surplus: Vec<String> = channels.range(declared..).map(image).collect();
        if !surplus.is_empty() {
            let (case, folder) = (case.into(), images.into());
            found.failures.push(Error::Dataset(DatasetError::ChannelUndeclared {
                case,
                folder,
                files: surplus,
                declared,
            }));
        }
        let missing: Vec<usize> = (0..declared).filter(|channel| !channels.contains(channel)).collect();
        found.failures.extend(missing.iter().map(|&channel| {
            Error::Dataset(DatasetError::ChannelMissing {
                case: case.into(),
                channel,
                name: json.channel_names[channel].clone(),
                path: images.join(image(&channel)),
            })
        }));
        let label = labels.map(|folder| folder.join(file(case)));
        let labelled = label.is_none() || label_files.stems.contains(case);
        if let (false, Some(path)) = (labelled || faults.numbered_cases.contains(case), &label)
            && !label_files.other_ending.contains_key(case)
        {
            found.failures.push(Error::Dataset(DatasetError::LabelMissing { case: case.into(), path: path.clone() }));
        }
        if missing.is_empty() && labelled {
            let images = (0..declared).map(|channel| images.join(image(&channel))).collect();
            found.complete.push(CaseFiles { name: case.into(), images, label });
        }
    }
    if let Some(folder) = labels {
        let folder = || folder.to_path_buf();
        if !faults.numbered.is_empty() {
            found
                .failures
                .push(Error::Dataset(DatasetError::LabelNumbered { folder: folder(), files: files(&faults.numbered) }));
        }
        if !faults.strays.is_empty() {
            found.failures.push(Error::Dataset(DatasetError::LabelWithoutImage {
                folder: folder(),
                files: files(&faults.strays),
            }));
        }
    }
    for (names, files) in [(Some(&image_names), &image_files), (label_names.as_ref(), &label_files)] {
        let Some(names) = names else { continue };
        found.notes.extend(names.note());
        found.notes.extend(files.note(&names.folder));
        if !files.other_ending.is_empty() {
            found.failures.push(Error::Dataset(DatasetError::OtherEnding {
                folder: names.folder.clone(),
                ending: ending.into(),
                fitting: files.stems.len(),
                other_ending: other_ending(ending),
                files: files.other_ending.values().cloned().collect(),
            }));
        }
    }
    Ok(found)
}

/// The names of a folder, told apart by their ending.
#[derive(Default)]
struct ByEnding<'a> {
    /// Names with the declared ending, without it.
    stems: BTreeSet<&'a str>,
    /// Names with the other of the two endings of NIfTI files, by the name without it.
    other_ending: BTreeMap<&'a str, String>,
    /// What is no NIfTI file at all.
    foreign: Vec<&'a str>,
}

impl<'a> ByEnding<'a> {
    fn new(listing: &'a Listing, ending: &str) -> Self {
        let mut all = ByEnding::default();
        for name in &listing.names {
            if let Some(stem) = name.strip_suffix(ending) {
                all.stems.insert(stem);
            } else if let Some(stem) = name.strip_suffix(other_ending(ending)) {
                all.other_ending.insert(stem, name.clone());
            } else {
                all.foreign.push(name);
            }
        }
        all
    }

    fn note(&self, folder: &Path) -> Option<String> {
        let folder = folder.display();
        (!self.foreign.is_empty()).then(|| format!("{folder}: ignored, as no images: {}", self.foreign.join(", ")))
    }
}

/// The ending that NIfTI files have as well.
fn other_ending(ending: &str) -> &'static str {
    if ending == ".nii" { ".nii.gz" } else { ".nii" }
}

/// What the four digits at the end of image names say.
#[derive(Default)]
struct CaseNumbers<'a> {
    /// Channels of each case.
    channels: BTreeMap<&'a str, BTreeSet<usize>>,
    /// Whole names of cases, as the labels show, without a channel number.
    missing: Vec<String>,
    /// Names without a number that belong to nothing.
    nameless: Vec<String>,
    /// Cases whose images have the other ending only.
    elsewhere: BTreeSet<&'a str>,
}

impl<'a> CaseNumbers<'a> {
    /// How many cases somebody meant.
    fn cases(&self) -> usize {
        self.channels.len() + self.missing.len() + self.nameless.len() + self.elsewhere.len()
    }

    fn is_case(&self, name: &str) -> bool {
        self.channels.contains_key(name)
            || self.elsewhere.contains(name)
            || self.missing.iter().any(|missing| missing == name)
    }

    fn read(images: &ByEnding<'a>, labels: &BTreeSet<&str>, declared: usize) -> Self {
        let mut numbers = CaseNumbers::default();
        for &stem in &images.stems {
            match channel_of(stem) {
                Some((case, channel)) => _ = numbers.channels.entry(case).or_default().insert(channel),
                None if labels.contains(stem) => numbers.missing.push(stem.into()),
                None => numbers.nameless.push(stem.into()),
            }
        }
        // Four digits may belong to the name: then there are more of them than channels, and labels are named so too.
        let stems = |case: &str, channels: &BTreeSet<usize>| -> Vec<String> {
            channels.iter().map(|channel| format!("{case}_{channel:04}")).collect()
        };
        let missing = &mut numbers.missing;
        numbers.channels.retain(|case, channels| {
            let names = stems(case, channels);
            let mistaken = channels.iter().any(|&channel| channel >= declared)
                && names.iter().any(|name| labels.contains(name.as_str()));
            if mistaken {
                missing.extend(names);
            }
            !mistaken
        });
        let elsewhere = images.other_ending.keys().filter_map(|&stem| Some(channel_of(stem)?.0));
        numbers.elsewhere = elsewhere.filter(|case| !numbers.channels.contains_key(case)).collect();
        numbers
    }
}

/// Label files that belong to no image.
#[derive(Default)]
struct LabelFaults<'a> {
    /// Names of a case with a channel number, which labels do not carry.
    numbered: Vec<String>,
    /// The cases of these.
    numbered_cases: BTreeSet<&'a str>,
    /// All others.
    strays: Vec<String>,
}

impl<'a> LabelFaults<'a> {
    fn find(labels: &BTreeSet<&'a str>, numbers: &CaseNumbers) -> Self {
        let mut faults = LabelFaults::default();
        for &stem in labels {
            match channel_of(stem) {
                _ if numbers.is_case(stem) => {}
                Some((case, _)) if numbers.channels.contains_key(case) && !labels.contains(case) => {
                    faults.numbered.push(stem.into());
                    faults.numbered_cases.insert(case);
                }
                _ => faults.strays.push(stem.into()),
            }
        }
        faults
    }
}

/// Splits `case_0001` into the case and its channel number.
fn channel_of(stem: &str) -> Option<(&str, usize)> {
    let (case, channel) = stem.rsplit_once('_')?;
    let four_digits = channel.len() == 4 && channel.bytes().all(|b| b.is_ascii_digit());
    if case.is_empty() || !four_digits {
        return None;
    }
    Some((case, channel.parse().ok()?))
}
