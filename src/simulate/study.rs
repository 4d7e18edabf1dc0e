//! The comparison as a whole: which runs there are, in which order, and what is kept of them.

use std::collections::BTreeMap;
use std::collections::BTreeSet;
use std::fs::{self, File, TryLockError};
use std::ops::ControlFlow;
use std::path::PathBuf;

use serde_json::{Value, json};

use super::design::{Ended, Event, Study};
use super::kept::{self, Outcome};
use super::run::Run;
use super::strategy::Strategy;
use super::table::{csv, markdown};
use crate::dataset::CaseFiles;
use crate::error::{Error, Result, SimulateError};
use crate::io;
use crate::kernels::Context;
use crate::preprocess::files_seen;
use crate::train;

impl Study<'_> {
    /// Makes all runs that are not there yet, `results.csv` and `results.md` after each. The observer is told what is going
    /// on and may stop; it is asked after every iteration and every predicted case.
    ///
    /// # Errors
    /// [`SimulateError`]; those of [`sparsify_dataset`](crate::sparsify::sparsify_dataset), planning, training and
    /// prediction. What is finished stays.
    pub fn run(&self, context: &Context, mut observe: impl FnMut(Event) -> Result<ControlFlow<()>>) -> Result<Ended> {
        self.check()?;
        let (held_out, training) = self.sides()?;
        let _alone = self.lock()?;
        let runs = self.runs(&training, &held_out)?;
        self.refuse_other_settings(&runs)?;
        let source = self.write_training_dataset(&training)?;

        let mut outcomes = Vec::with_capacity(runs.len());
        // Annotations first: a share that cannot be met is known before hours of training.
        let missing: Vec<&Run> = runs.iter().filter(|run| !kept::finished(&run.folder)).collect();
        for (index, run) in missing.iter().enumerate() {
            run.annotate(&source)?;
            if observe(Event::Drawn(index + 1, missing.len()))?.is_break() {
                return Ok(Ended::Stopped);
            }
        }
        for (index, run) in runs.iter().enumerate() {
            let begun = Event::Begun { strategy: &run.name, seed: run.seed, place: (index + 1, runs.len()) };
            let outcome = match Outcome::read(&run.folder)? {
                Some(outcome) => outcome,
                None => {
                    if observe(begun)?.is_break() {
                        return Ok(Ended::Stopped);
                    }
                    match run.make(context, &source, &held_out, &mut observe)? {
                        ControlFlow::Continue(outcome) => outcome,
                        ControlFlow::Break(()) => return Ok(Ended::Stopped),
                    }
                }
            };
            outcomes.push(outcome);
            self.write_tables(&outcomes)?;
            if observe(Event::Finished(&outcomes))?.is_break() && index + 1 < runs.len() {
                return Ok(Ended::Stopped);
            }
        }
        Ok(Ended::Finished(outcomes))
    }

    /// Two calls at a time would write the same files. The lock ends with the process, however that ends.
    fn lock(&self) -> Result<File> {
        fs::create_dir_all(self.folder).map_err(Error::io(self.folder, "create"))?;
        let path = self.folder.join("lock");
        let file = File::create(&path).map_err(Error::io(&path, "create"))?;
        match file.try_lock() {
            Ok(()) => Ok(file),
            Err(TryLockError::WouldBlock) => Err(SimulateError::InUse { folder: self.folder.into() }.into()),
            Err(TryLockError::Error(error)) => Err(Error::io(&path, "lock")(error)),
        }
    }

    /// Whether there is something to compare, and each once.
    fn check(&self) -> Result<()> {
        let demand = |fine: bool, setting, expected| {
            let value = "none".into();
            if fine { Ok(()) } else { Err(Error::Setting { setting, value, expected }) }
        };
        demand(!self.strategies.is_empty(), "strategies", "at least one is needed")?;
        demand(!self.seeds.is_empty(), "seeds", "at least one is needed")?;
        demand(self.training.epochs > 0, "epochs", "at least one is needed")?;
        let (mut names, mut seeds) = (BTreeSet::new(), BTreeSet::new());
        let strategies = self.strategies.iter().map(Strategy::name).filter(|name| !names.insert(name.clone()));
        let seeds = self.seeds.iter().filter(|seed| !seeds.insert(**seed));
        let twice = strategies.map(|name| ("strategy", name)).chain(seeds.map(|seed| ("seed", seed.to_string())));
        Error::all(twice.map(|(what, name)| SimulateError::Twice { what, name }.into()).collect())
    }

    /// The cases to evaluate on, and those to annotate.
    fn sides(&self) -> Result<(Vec<&CaseFiles>, Vec<&CaseFiles>)> {
        let failed = |problem: String| Error::Simulate(SimulateError::HeldOut { problem });
        let known: BTreeSet<&str> = self.dataset.cases.iter().map(|case| case.name.as_str()).collect();
        let strangers: Vec<&str> =
            self.held_out.iter().map(String::as_str).filter(|name| !known.contains(name)).collect();
        if !strangers.is_empty() {
            return Err(failed(format!("the dataset has no {}", strangers.join(", "))));
        }
        let (held_out, training): (Vec<&CaseFiles>, Vec<&CaseFiles>) =
            self.dataset.cases.iter().partition(|case| self.held_out.contains(&case.name));
        match (held_out.is_empty(), training.is_empty()) {
            (true, _) => Err(failed("none; some are needed to compare on".into())),
            (_, true) => Err(failed("all cases; none is left to train on".into())),
            _ => Ok((held_out, training)),
        }
    }

    fn runs(&self, training: &[&CaseFiles], held_out: &[&CaseFiles]) -> Result<Vec<Run<'_>>> {
        let seen = |cases: &[&CaseFiles]| -> Result<Vec<String>> {
            cases.iter().map(|case| Ok(format!("{}{}", case.name, files_seen(case)?))).collect()
        };
        let cases = json!({ "training": seen(training)?, "held_out": seen(held_out)? });
        let all = self.seeds.iter().flat_map(|seed| self.strategies.iter().map(move |strategy| (*seed, strategy)));
        Ok(all
            .map(|(seed, strategy)| {
                let name = strategy.name();
                let folder = self.folder.join(&name).join(format!("seed_{seed}"));
                let settings = self.settings(strategy, seed, &cases);
                Run { study: self, strategy, name, seed, folder, settings }
            })
            .collect())
    }

    /// Everything that a run's result depends on.
    fn settings(&self, strategy: &Strategy, seed: u64, cases: &Value) -> Value {
        let network = &self.network;
        let described = ["labels", "channel_names", "modality", "regions_class_order"]
            .map(|field| (field, self.dataset.json.source().get(field)));
        let described: BTreeMap<&str, Option<&Value>> = described.into_iter().collect();
        json!({
            "strategy": strategy.scheme,
            "share": strategy.share,
            "seed": seed,
            "dataset": described,
            "network": {
                "plans": network.plans,
                "configuration": network.configuration,
                "features": network.features,
                "batch_size": network.batch_size,
                "patch_size": network.patch_size,
            },
            "training": train::Settings { seed, ..self.training },
            "prediction": {
                "step_size": self.prediction.step_size,
                "mirror": self.prediction.mirror,
                "dtype": format!("{:?}", self.prediction.dtype),
            },
            "cases": cases,
        })
    }

    /// A table must not mix what was made in different ways.
    fn refuse_other_settings(&self, runs: &[Run]) -> Result<()> {
        let mut differences = Vec::new();
        for run in runs {
            let found = kept::differences(&run.folder, &run.settings)?;
            if found.is_empty() {
                continue;
            }
            match self.again {
                true => fs::remove_dir_all(&run.folder).map_err(Error::io(&run.folder, "remove"))?,
                false => differences.push(format!("{} seed {}: {}", run.name, run.seed, found.join(", "))),
            }
        }
        match differences.is_empty() {
            true => Ok(()),
            false => Err(SimulateError::OtherSettings { folder: self.folder.into(), differences }.into()),
        }
    }

    /// The description of the dense dataset without the held-out cases; its files stay where they are.
    fn write_training_dataset(&self, training: &[&CaseFiles]) -> Result<PathBuf> {
        let folder = self.folder.join("training_cases");
        fs::create_dir_all(&folder).map_err(Error::io(&folder, "create"))?;
        let place = |path: &PathBuf| -> Result<Value> {
            Ok(fs::canonicalize(path).map_err(Error::io(path, "find"))?.to_string_lossy().into_owned().into())
        };
        let mut listed = serde_json::Map::new();
        for case in training {
            let images = case.images.iter().map(place).collect::<Result<Vec<_>>>()?;
            let label = case.label.as_ref().map(place).transpose()?;
            listed.insert(case.name.clone(), json!({ "images": images, "label": label }));
        }
        let mut description = self.dataset.json.source().clone();
        description.insert("numTraining".into(), training.len().into());
        description.insert("dataset".into(), listed.into());
        io::write_json(&folder.join("dataset.json"), &description)?;
        Ok(folder)
    }

    fn write_tables(&self, outcomes: &[Outcome]) -> Result<()> {
        io::write_atomically(&self.folder.join("results.csv"), csv(outcomes).as_bytes())?;
        io::write_atomically(&self.folder.join("results.md"), markdown(outcomes).as_bytes())
    }
}
