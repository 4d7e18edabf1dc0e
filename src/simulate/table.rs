//! The comparison as tables.

use std::fmt::Write as _;

use super::kept::Outcome;

/// A strategy over its seeds.
#[derive(Debug, Clone, PartialEq)]
pub struct Row {
    /// Its name.
    pub strategy: String,
    /// Name of its scheme.
    pub scheme: String,
    /// Mean share of the voxels that are annotated.
    pub share: f64,
    /// Mean number of strokes.
    pub strokes: f64,
    /// Mean number of cases with annotation.
    pub cases: f64,
    /// Mean Dice of every seed, those without one left out.
    pub dice: Vec<f64>,
    /// Class or region and its mean Dice over the seeds that have one.
    pub classes: Vec<(String, f64)>,
}

impl Row {
    /// Mean over the seeds; NaN without any.
    pub fn mean(&self) -> f64 {
        mean(self.dice.iter().copied())
    }

    /// Standard deviation over the seeds (of the sample, n - 1); `None` with fewer than two.
    pub fn deviation(&self) -> Option<f64> {
        let mean = self.mean();
        let squares: f64 = self.dice.iter().map(|dice| (dice - mean).powi(2)).sum();
        (self.dice.len() > 1).then(|| (squares / (self.dice.len() - 1) as f64).sqrt())
    }
}

/// A row for each strategy, in the order in which they come first.
pub fn rows(outcomes: &[Outcome]) -> Vec<Row> {
    let mut names: Vec<&str> = Vec::new();
    for outcome in outcomes {
        if !names.contains(&outcome.strategy.as_str()) {
            names.push(&outcome.strategy);
        }
    }
    let row = |name: &str| {
        let mine: Vec<&Outcome> = outcomes.iter().filter(|outcome| outcome.strategy == name).collect();
        let over = |value: fn(&Outcome) -> f64| mean(mine.iter().map(|outcome| value(outcome)));
        let classes = mine.first().map_or(&[][..], |outcome| &outcome.dice).iter().map(|(class, _)| {
            let dice = mine.iter().flat_map(|outcome| &outcome.dice).filter(|(name, _)| name == class);
            (class.clone(), mean(dice.filter_map(|(_, dice)| *dice)))
        });
        Row {
            strategy: name.into(),
            scheme: mine.first().map_or_else(String::new, |outcome| outcome.scheme.clone()),
            share: over(|outcome| outcome.annotated.share),
            strokes: over(|outcome| outcome.annotated.strokes as f64),
            cases: over(|outcome| outcome.annotated.cases.len() as f64),
            dice: mine.iter().filter_map(|outcome| outcome.mean_dice).collect(),
            classes: classes.collect(),
        }
    };
    names.into_iter().map(row).collect()
}

/// A line for every run, with headings.
pub fn csv(outcomes: &[Outcome]) -> String {
    let mut text =
        String::from("strategy,scheme,seed,annotated_share,annotated_voxels,strokes,annotated_cases,mean_dice");
    let classes: Vec<&str> =
        outcomes.first().map_or(&[][..], |outcome| &outcome.dice).iter().map(|(name, _)| name.as_str()).collect();
    // Writing to a string cannot fail.
    classes.iter().for_each(|class| _ = write!(text, ",{}", field(&format!("dice_{class}"))));
    text += ",evaluated_cases,training_seconds\n";
    let number = |value: Option<f64>| value.map_or_else(String::new, |value| value.to_string());
    for outcome in outcomes {
        let Outcome { strategy, scheme, seed, annotated, .. } = outcome;
        let _ = write!(
            text,
            "{strategy},{scheme},{seed},{},{},{},{},{}",
            annotated.share,
            annotated.voxels,
            annotated.strokes,
            annotated.cases.len(),
            number(outcome.mean_dice)
        );
        for class in &classes {
            let dice = outcome.dice.iter().find(|(name, _)| name == class).and_then(|(_, dice)| *dice);
            let _ = write!(text, ",{}", number(dice));
        }
        let _ = writeln!(text, ",{},{:.0}", outcome.cases, outcome.training_seconds);
    }
    text
}

/// A field of CSV (RFC 4180): in quotes where it has to be.
fn field(text: &str) -> String {
    match text.contains([',', '"', '\n', '\r']) {
        true => format!("\"{}\"", text.replace('"', "\"\"")),
        false => text.into(),
    }
}

/// A line for every strategy, in Markdown.
pub fn markdown(outcomes: &[Outcome]) -> String {
    let rows = rows(outcomes);
    let classes = rows.first().map_or(&[][..], |row| &row.classes);
    let mut text =
        String::from("| strategy | voxels annotated | strokes | cases annotated | seeds | mean Dice | spread |");
    classes.iter().for_each(|(class, _)| _ = write!(text, " {} |", class.replace('|', "\\|")));
    text += "\n|---|---:|---:|---:|---:|---:|---:|";
    text += &"---:|".repeat(classes.len());
    text.push('\n');
    let dice = |value: f64| if value.is_nan() { "-".to_owned() } else { format!("{value:.3}") };
    for row in &rows {
        let spread = row.deviation().map_or_else(|| "-".into(), dice);
        let _ = write!(
            text,
            "| {} | {:.2} % | {:.0} | {:.0} | {} | {} | {spread} |",
            row.strategy,
            100.0 * row.share,
            row.strokes,
            row.cases,
            row.dice.len(),
            dice(row.mean())
        );
        row.classes.iter().for_each(|(_, value)| _ = write!(text, " {} |", dice(*value)));
        text.push('\n');
    }
    text
}

fn mean(values: impl Iterator<Item = f64>) -> f64 {
    let (sum, count) = values.fold((0.0, 0), |(sum, count), value| (sum + value, count + 1));
    sum / f64::from(count)
}
