//! One run: an annotation, a network trained on it, and its score on cases that it has not seen.

use std::fs;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use serde_json::Value;

use super::annotate::{Annotated, annotate};
use super::design::{Event, Study};
use super::kept::{self, Outcome};
use super::strategy::Strategy;
use crate::compat::Compat;
use crate::dataset::plans::Plans;
use crate::dataset::splits::{Fold, Split};
use crate::dataset::{CaseFiles, Dataset};
use crate::error::{Error, FileError, Result, SimulateError};
use crate::eval::{CaseResult, Classes, Summary, evaluate_case};
use crate::io::{self, grid_difference};
use crate::kernels::Context;
use crate::plan::fingerprint::Fingerprint;
use crate::plan::planner::Planner;
use crate::predict;
use crate::preprocess::{Preprocessor, RawCase, cases_folder, preprocess_folder, remove_stored};
use crate::sparsify::Scheme;
use crate::train::run::{self as training, Newest, Saving};
use crate::train::{self, DataSource, Model, Trainer};

/// What [`annotate`] says.
const ANNOTATED: &str = "annotated.json";

/// A strategy with a seed.
pub(super) struct Run<'a> {
    pub study: &'a Study<'a>,
    pub strategy: &'a Strategy,
    pub name: String,
    pub seed: u64,
    pub folder: PathBuf,
    /// Everything that its outcome depends on.
    pub settings: Value,
}

/// The observer of a study.
type Observer<'o> = dyn FnMut(Event) -> Result<ControlFlow<()>> + 'o;

impl Run<'_> {
    /// Draws the annotation, unless an earlier call has. The settings are kept first, so that nobody goes on with others.
    pub fn annotate(&self, source: &Path) -> Result<Annotated> {
        let record = self.folder.join(ANNOTATED);
        if record.is_file() {
            let text = fs::read_to_string(&record).map_err(Error::io(&record, "read"))?;
            return serde_json::from_str(&text)
                .map_err(|source| Error::File(FileError::Json { path: record.clone(), source }));
        }
        // Whatever a killed call has left: the record would be the first thing of worth.
        if self.folder.is_dir() {
            fs::remove_dir_all(&self.folder).map_err(Error::io(&self.folder, "remove"))?;
        }
        kept::write_settings(&self.folder, &self.settings)?;
        annotate(source, &self.folder.join("dataset"), &record, self.strategy, self.seed, self.study.workers)
    }

    /// Trains, predicts and scores.
    pub fn make(
        &self,
        context: &Context,
        source: &Path,
        held_out: &[&CaseFiles],
        observe: &mut Observer,
    ) -> Result<ControlFlow<(), Outcome>> {
        let annotated = self.annotate(source)?;
        if observe(Event::Annotated(&annotated))?.is_break() {
            return Ok(ControlFlow::Break(()));
        }
        for warning in &annotated.warnings {
            let _ = observe(Event::Note(warning))?;
        }
        let sparse = self.folder.join("dataset");
        let mut dataset = Dataset::open(if self.strategy.scheme == Scheme::Dense { source } else { &sparse })?;
        // From the others nothing can be learned, and every patch of theirs would be lost.
        dataset.cases.retain(|case| annotated.cases.contains(&case.name));

        let Some(trainer) = self.train(context, &dataset, observe)? else { return Ok(ControlFlow::Break(())) };
        let Some(summary) = self.predict(&trainer, held_out, observe)? else { return Ok(ControlFlow::Break(())) };
        summary.write(&self.folder.join("summary.json"))?;
        let outcome = self.outcome(annotated, &trainer, &summary);
        outcome.write(&self.folder)?;
        remove_stored(&cases_folder(&self.folder, &trainer.model().configuration.data_identifier))?;
        Ok(ControlFlow::Continue(outcome))
    }

    fn outcome(&self, annotated: Annotated, trainer: &Trainer, summary: &Summary) -> Outcome {
        let defined = |dice: f64| (!dice.is_nan()).then_some(dice);
        let names = trainer.model().labels.foreground_names();
        let dice = names.into_iter().enumerate();
        let history = &trainer.progress().history;
        let spans = history.epoch_end_timestamps.iter().zip(&history.epoch_start_timestamps);
        Outcome {
            strategy: self.name.clone(),
            scheme: self.strategy.scheme.name().into(),
            seed: self.seed,
            annotated,
            dice: dice.map(|(group, name)| (name.to_owned(), defined(summary.mean(group)[0]))).collect(),
            mean_dice: defined(summary.foreground_dice()),
            cases: summary.cases.len(),
            training_seconds: spans.map(|(end, start)| end - start).sum(),
            voxgrad: env!("CARGO_PKG_VERSION").into(),
        }
    }

    /// The trained network; `None` if the observer has stopped it.
    fn train(&self, context: &Context, dataset: &Dataset, observe: &mut Observer) -> Result<Option<Trainer>> {
        let folder = self.folder.join("training");
        fs::create_dir_all(&folder).map_err(Error::io(&folder, "create"))?;
        let newest = training::newest(&folder)?;
        for damaged in newest.iter().flat_map(|newest| &newest.damaged) {
            let _ = observe(Event::Note(&format!("{damaged}; passed over")))?;
        }
        let mut trainer = match newest {
            Some(Newest { checkpoint, .. }) => Trainer::resume(context, checkpoint)?,
            None => {
                let settings = train::Settings { seed: self.seed, ..self.study.training };
                Trainer::new(context, self.model(dataset)?, settings)?
            }
        };
        if trainer.is_finished() {
            return Ok(Some(trainer));
        }
        self.preprocess(dataset, trainer.model())?;
        // Held-out cases have no part in training, so there is nothing to validate with.
        let split = Split { train: dataset.case_names(), val: Vec::new() };
        let source = DataSource {
            dataset,
            prepared: &self.folder,
            fold: Fold::Index(0),
            split: &split,
            compat: Some(Compat::Corrected),
            skip_unreadable: false,
        };
        let data = source.open(trainer.model(), |_| {})?;
        for note in &data.notes {
            let _ = observe(Event::Note(note))?;
        }
        let _ = observe(Event::Training { epoch: trainer.progress().epoch })?;
        let mut failed = None;
        let ended = training::train(
            &mut trainer,
            &data.cases,
            &folder,
            Saving::Every(self.study.save_every),
            [&data.training, &data.validation],
            |report| {
                observe(Event::Iteration(report)).unwrap_or_else(|error| {
                    failed = Some(error);
                    ControlFlow::Break(())
                })
            },
            |_| Ok(()),
        )?;
        match (failed, ended) {
            (Some(error), _) => Err(error),
            (None, training::Ended::Stopped(_)) => Ok(None),
            (None, training::Ended::Finished(_)) => Ok(Some(trainer)),
        }
    }

    /// What is trained: by the study's plans, or planned from the annotation.
    fn model(&self, dataset: &Dataset) -> Result<Model> {
        let network = &self.study.network;
        let mut plans = match &network.plans {
            Some(plans) => plans.clone(),
            None => {
                let fingerprint = Fingerprint::extract(dataset, Compat::Corrected, self.study.workers, |_| {})?;
                Planner::default().plan(&self.name, dataset, &fingerprint)?
            }
        };
        self.change(&mut plans)?;
        plans.write(&self.folder.join("nnUNetPlans.json"))?;
        let model = Model::new(plans, &network.configuration, dataset.json.clone())?;
        model.check()?;
        Ok(model)
    }

    /// Writes what the study has instead of the plans' own into the configuration.
    fn change(&self, plans: &mut Plans) -> Result<()> {
        let network = &self.study.network;
        let mut configuration = plans.configuration(&network.configuration)?;
        if let Some(features) = &network.features {
            if features.len() != configuration.architecture.arch_kwargs.n_stages {
                return Err(Error::Setting {
                    setting: "features",
                    value: format!("{features:?}, for {} stages", configuration.architecture.arch_kwargs.n_stages),
                    expected: "one number for each stage of the planned network is needed",
                });
            }
            configuration.architecture.arch_kwargs.features_per_stage.clone_from(features);
        }
        configuration.batch_size = network.batch_size.unwrap_or(configuration.batch_size);
        if let Some(patch) = network.patch_size {
            configuration.patch_size = patch.to_vec();
        }
        let value = serde_json::to_value(configuration)
            .map_err(|source| Error::File(FileError::Json { path: self.folder.clone(), source }))?;
        plans.configurations.insert(network.configuration.clone(), value);
        // What was written is checked as what is read.
        plans.configuration(&network.configuration).map(drop)
    }

    /// Stores the cases beside the plans; those that an earlier call has stored stay.
    fn preprocess(&self, dataset: &Dataset, model: &Model) -> Result<()> {
        let preprocessor =
            Preprocessor::from_plans(&model.plans, &model.configuration, model.labels.clone(), Compat::Corrected)?;
        let folder = cases_folder(&self.folder, &model.configuration.data_identifier);
        let reports = preprocess_folder(dataset, &preprocessor, &folder, self.study.workers, |_| {})?;
        Error::all(reports.into_iter().filter_map(Result::err).collect())
    }

    /// Predicts the held-out cases and scores them; `None` if the observer has stopped it.
    fn predict(&self, trainer: &Trainer, held_out: &[&CaseFiles], observe: &mut Observer) -> Result<Option<Summary>> {
        let model = trainer.model();
        let folder = self.folder.join("predictions");
        fs::create_dir_all(&folder).map_err(Error::io(&folder, "create"))?;
        io::remove_leftovers(&folder)?;
        let preprocessor =
            Preprocessor::from_plans(&model.plans, &model.configuration, model.labels.clone(), Compat::Corrected)?;
        let (patch, _) = model.configuration.three_dimensional()?;
        // The dense dataset's rules: annotations may have brought an ignore label that references do not have.
        let labels = &self.study.dataset.labels;
        let classes = Classes::of(labels);
        let mut cases = Vec::with_capacity(held_out.len());
        for (index, case) in held_out.iter().enumerate() {
            let file = folder.join(format!("{}{}", case.name, model.dataset.file_ending));
            if !file.is_file() {
                let image_only = CaseFiles { label: None, ..(*case).clone() };
                let prepared = preprocessor.run(RawCase::read(&image_only, &model.labels)?)?;
                let labels = predict::segmentation(
                    trainer.context(),
                    std::slice::from_ref(trainer.network()),
                    &prepared,
                    &preprocessor,
                    patch,
                    &self.study.prediction,
                    |_, _| (),
                )?;
                io::write_segmentation(&file, labels.view(), &prepared.geometry)?;
            }
            let reference_file = case.label.clone().unwrap_or_default();
            let (prediction, reference) = (io::read_labels(&file)?, io::read_labels(&reference_file)?);
            let grid = |map: &io::LabelMap| map.data.dim().into();
            let (ours, theirs) = (grid(&prediction), grid(&reference));
            if let Some(problem) = grid_difference((&reference.geometry, theirs), (&prediction.geometry, ours)) {
                return Err(SimulateError::Grid { reference: reference_file, problem }.into());
            }
            let (found, wanted) = (prediction.data.view(), reference.data.view());
            let counts = evaluate_case(found, wanted, &classes.groups, classes.ignore);
            let annotated = wanted.iter().filter(|&&label| Some(label) != classes.ignore).count() as f64;
            let annotated = annotated / wanted.len() as f64;
            cases.push(CaseResult { counts, annotated, prediction_file: file, reference_file });
            if observe(Event::Predicted(index + 1, held_out.len()))?.is_break() {
                return Ok(None);
            }
        }
        Ok(Some(Summary { classes, cases, warnings: Vec::new(), passed_over: Vec::new() }))
    }
}
