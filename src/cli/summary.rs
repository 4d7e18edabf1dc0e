//! What there is to learn from in a preprocessed dataset, and what is missing.

use voxgrad::dataset::plans::Configuration;
use voxgrad::dataset::{Dataset, LabelManager};
use voxgrad::preprocess::CaseReport;

/// Prints patch, batch, spacing and the annotated share of every case and class, with warnings.
pub fn print(title: &str, dataset: &Dataset, configuration: &Configuration, cases: &[CaseReport]) {
    let labels = &dataset.labels;
    let resumed = cases.iter().filter(|case| case.resumed).count();
    println!("{title}: {} cases ({resumed} of them from an earlier run)", cases.len());
    println!(
        "  patch {:?}, batch {}, spacing {:?} mm",
        configuration.patch_size, configuration.batch_size, configuration.spacing
    );
    cases.iter().flat_map(|case| &case.warnings).for_each(|warning| eprintln!("warning: {warning}"));
    if cases.is_empty() {
        return;
    }
    table(labels, cases);
    warnings(labels, cases).iter().for_each(|warning| eprintln!("warning: {warning}"));
}

/// Name and label values of background and of every class or region.
fn classes(labels: &LabelManager) -> Vec<(String, Vec<i16>)> {
    let names = labels.foreground_names().into_iter().map(String::from);
    let foreground = names.zip(labels.foreground()).map(|(name, group)| (name, group.members().to_vec()));
    std::iter::once(("background".to_owned(), vec![0])).chain(foreground).collect()
}

fn voxels(case: &CaseReport, members: &[i16]) -> u64 {
    members.iter().filter_map(|label| case.label_counts.get(label)).sum()
}

/// Prints the annotated share of every case and class.
pub fn table(labels: &LabelManager, cases: &[CaseReport]) {
    let classes = classes(labels);
    let width = cases.iter().map(|case| case.name.len()).max().unwrap_or(0).max(8);
    let heading: String = classes.iter().map(|(name, _)| format!("  {name:>11}")).collect();
    println!("  {:<width$}  annotated{heading}", "% of voxels");
    for case in cases {
        let all = case.label_counts.values().sum::<u64>().max(1) as f64;
        let shares: String = classes
            .iter()
            .map(|(name, members)| {
                format!("  {:>1$.3}", 100.0 * voxels(case, members) as f64 / all, name.len().max(11))
            })
            .collect();
        println!("  {:<width$}  {:>9.3}{shares}", case.name, 100.0 * case.annotated(labels));
    }
    let mean = cases.iter().map(|case| case.annotated(labels)).sum::<f64>() / cases.len() as f64;
    println!("  {:<width$}  {:>9.3}", "mean", 100.0 * mean);
}

/// Cases and classes from which nothing can be learned.
pub fn warnings(labels: &LabelManager, cases: &[CaseReport]) -> Vec<String> {
    let mut found = Vec::new();
    for case in cases {
        // Air outside the image (-1) is known without anybody having drawn it.
        if voxels(case, labels.all_labels()) == 0 {
            found.push(format!("case {} has no annotated voxel: nothing is learned from it", case.name));
        }
    }
    for (name, members) in classes(labels) {
        if cases.iter().all(|case| voxels(case, &members) == 0) {
            found.push(match name.as_str() {
                "background" => {
                    "background is never annotated: nothing tells the network where the classes end; annotate some"
                        .into()
                }
                class => format!("class {class} is never annotated: it cannot be learned"),
            });
        }
    }
    found
}
