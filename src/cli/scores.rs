//! Scores as a table on the terminal.

use voxgrad::eval::{CaseMeasures, Estimate, Lesions, Measures, Summary, SurfaceSettings};

/// Surface distances and lesions of every case, and how they were measured.
pub type Measured<'a> = (&'a [CaseMeasures], SurfaceSettings);

/// Prints a line for each class and metric: the mean, its confidence interval over cases, the cases that have a value, and
/// the share of their voxels that is annotated, which is all that a metric looks at.
pub fn print(summary: &Summary, measured: Option<Measured>) {
    let (names, cases) = (&summary.classes.names, summary.cases.len());
    println!("mean foreground Dice {:.4} over {} classes in {cases} cases", summary.foreground_dice(), names.len());
    let width = names.iter().map(|name| name.chars().count()).max().unwrap_or(0).max(5);
    let heading = ("class", "metric", "mean", "95 % interval", "cases", "annotated");
    println!(
        "  {:<width$}  {:<9}  {:>8}  {:>19}  {:>9}  {:>9}",
        heading.0, heading.1, heading.2, heading.3, heading.4, heading.5
    );
    let (mut with_dice, mut infinite) = (Vec::new(), 0);
    for (group, name) in names.iter().enumerate() {
        for (metric, values) in metrics(summary, measured, group) {
            let estimate = Estimate::of(values.iter().copied());
            infinite += values.iter().filter(|value| value.is_infinite()).count();
            if metric == "Dice" && estimate.cases > 0 {
                with_dice.push(estimate.mean);
            }
            println!("  {name:<width$}  {metric:<9}  {}", line(&estimate, &values, summary));
        }
    }
    if with_dice.len() < names.len() && !with_dice.is_empty() {
        let mean = with_dice.iter().sum::<f64>() / with_dice.len() as f64;
        println!("  mean Dice without the {} classes that have none: {mean:.4}", names.len() - with_dice.len());
    }
    println!("  interval: bootstrap over cases, 2000 draws; a case with neither prediction nor truth has no value");
    if infinite > 0 {
        println!(
            "  {infinite} distances to a class that only prediction or reference has are infinite, and in no mean; such a \
             case has Dice and NSD 0"
        );
    }
    if let Some((measures, settings)) = measured {
        println!("  surfaces are made of {}; distances to nothing are infinite", settings.kind.name());
        lesions(summary, measures);
    }
}

/// The metrics of a class with their values in all cases.
fn metrics(summary: &Summary, measured: Option<Measured>, group: usize) -> Vec<(String, Vec<f64>)> {
    let dice = summary.cases.iter().map(|case| case.counts.get(group).map_or(f64::NAN, |counts| counts.dice()));
    let mut metrics = vec![("Dice".into(), dice.collect())];
    if let Some((measures, settings)) = measured {
        let mut add = |name: String, measure: fn(&Measures) -> f64| {
            let values = measures.iter().map(|case| case.groups.get(group).map_or(f64::NAN, measure));
            metrics.push((name, values.collect()));
        };
        add("HD95 mm".into(), |measures| measures.surfaces.hausdorff_95);
        add("ASSD mm".into(), |measures| measures.surfaces.average);
        add(format!("NSD {} mm", settings.tolerance), |measures| measures.surfaces.within_tolerance);
    }
    metrics
}

fn line(estimate: &Estimate, values: &[f64], summary: &Summary) -> String {
    let mean = if estimate.cases == 0 { "none".into() } else { format!("{:.4}", estimate.mean) };
    let interval = estimate.interval.map_or("-".into(), |[low, high]| format!("{low:.4} to {high:.4}"));
    let share = Estimate::of(
        summary.cases.iter().zip(values).filter(|(_, value)| value.is_finite()).map(|(case, _)| case.annotated),
    );
    let annotated = if share.cases == 0 { "-".into() } else { format!("{:.2} %", 100.0 * share.mean) };
    let cases = format!("{}/{}", estimate.cases, summary.cases.len());
    format!("{mean:>8}  {interval:>19}  {cases:>9}  {annotated:>9}")
}

/// Prints how many lesions were found and how many invented.
fn lesions(summary: &Summary, measures: &[CaseMeasures]) {
    for (group, name) in summary.classes.names.iter().enumerate() {
        let count = |lesions: fn(&Lesions) -> usize| {
            measures.iter().filter_map(|case| case.groups.get(group)).map(|m| lesions(&m.lesions)).sum::<usize>()
        };
        println!(
            "  {name}: {} of {} lesions found, {} of {} predicted ones invented",
            count(|l| l.found),
            count(|l| l.reference),
            count(|l| l.invented),
            count(|l| l.predicted),
        );
    }
}
