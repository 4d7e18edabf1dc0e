//! Which plans are followed: what a plans file asks for beyond that is refused by field and value, all of it at once.

use serde_json::{Map, Value, json};

use super::plans::{ArchitectureArguments, Configuration, Plans};
use crate::error::{Error, PlanError, Result};

/// What is not supported, in words.
#[derive(Default)]
struct Faults(Vec<String>);

impl Faults {
    fn unless(&mut self, supported: bool, field: &str, found: &Value, expected: &str) {
        if !supported {
            self.0.push(format!("`{field}` is {found}, supported is {expected}"));
        }
    }

    /// Keyword arguments: each key with its value when it is absent, and the value that is supported. Keys that are not
    /// listed are refused.
    fn arguments(&mut self, field: &str, found: &Value, known: &[(&str, Value, Value)]) {
        let empty = Map::new();
        let given = match found {
            Value::Null => &empty,
            Value::Object(given) => given,
            other => return self.unless(false, field, other, "an object"),
        };
        for (key, absent, supported) in known {
            let value = given.get(*key).unwrap_or(absent);
            self.unless(same(value, supported), &format!("{field}.{key}"), value, &supported.to_string());
        }
        for (key, value) in given.iter().filter(|(key, _)| known.iter().all(|(name, ..)| name != key)) {
            self.unless(false, &format!("{field}.{key}"), value, "no such argument");
        }
    }

    fn into_result(self, plans: &Plans) -> Result<()> {
        match self.0.is_empty() {
            true => Ok(()),
            false => Err(Error::Plan(PlanError::PlansUnsupported {
                plans: plans.plans_name.clone(),
                faults: self.0.join("; "),
            })),
        }
    }
}

impl Plans {
    /// Whether voxgrad preprocesses as a configuration of these plans asks for.
    ///
    /// # Errors
    /// [`PlanError::PlansUnsupported`] with every field that asks for something else.
    pub fn check_preprocessing(&self, configuration: &Configuration) -> Result<()> {
        let mut faults = Faults::default();
        self.preprocessing(configuration, &mut faults);
        faults.into_result(self)
    }

    /// Whether voxgrad has the network that a configuration of these plans describes.
    ///
    /// # Errors
    /// As [`check_preprocessing`](Self::check_preprocessing).
    pub fn check_network(&self, configuration: &Configuration) -> Result<()> {
        let mut faults = Faults::default();
        network(configuration, &mut faults);
        faults.into_result(self)
    }

    /// Both, for training.
    ///
    /// # Errors
    /// As [`check_preprocessing`](Self::check_preprocessing).
    pub fn check_training(&self, configuration: &Configuration) -> Result<()> {
        let mut faults = Faults::default();
        self.preprocessing(configuration, &mut faults);
        network(configuration, &mut faults);
        faults.into_result(self)
    }

    fn preprocessing(&self, configuration: &Configuration, faults: &mut Faults) {
        let name = &configuration.preprocessor_name;
        faults.unless(name == "DefaultPreprocessor", "preprocessor_name", &json!(name), "DefaultPreprocessor");
        for (kind, is_seg, order) in [("data", false, 3), ("seg", true, 1), ("probabilities", false, 1)] {
            let field = format!("resampling_fn_{kind}");
            // Without the field nnU-Net does not run at all: there is nothing to differ from.
            let Some(function) = configuration.other.get(&field) else { continue };
            faults.unless(
                function == "resample_data_or_seg_to_shape",
                &field,
                function,
                "resample_data_or_seg_to_shape",
            );
            let field = format!("{field}_kwargs");
            if let Some(given) = configuration.other.get(&field) {
                // Absent ones have the values that the function declares upstream.
                let known = [
                    ("is_seg", json!(false), json!(is_seg)),
                    ("order", json!(3), json!(order)),
                    ("order_z", json!(0), json!(0)),
                    ("force_separate_z", json!(false), Value::Null),
                    ("separate_z_anisotropy_threshold", json!(3), json!(3)),
                ];
                faults.arguments(&field, given, &known);
            }
        }
        // These two read the same axes in the same order; others reorient or read other formats.
        let reader = &self.image_reader_writer;
        let known = reader.is_null() || ["SimpleITKIO", "NibabelIO"].iter().any(|name| reader == name);
        faults.unless(known, "image_reader_writer", reader, "SimpleITKIO or NibabelIO");
        let manager = &self.label_manager;
        faults.unless(manager.is_null() || manager == "LabelManager", "label_manager", manager, "LabelManager");
        let backward = self.transpose_backward;
        let inverse = (0..3).all(|axis| self.transpose_forward.get(backward[axis]) == Some(&axis));
        faults.unless(inverse, "transpose_backward", &json!(backward), "the inverse of `transpose_forward`");
    }
}

/// Whether two values are equal, numbers by value: 3 is 3.0.
fn same(a: &Value, b: &Value) -> bool {
    match (a.as_f64(), b.as_f64()) {
        (Some(a), Some(b)) => a == b,
        _ => a == b,
    }
}

/// Whether a class, by its full name, is the one of this short name.
fn is_class(value: &Value, name: &str) -> bool {
    value.as_str().is_some_and(|full| full.rsplit('.').next() == Some(name))
}

fn network(configuration: &Configuration, faults: &mut Faults) {
    if let Some(stage) = &configuration.previous_stage {
        let found = json!(stage);
        faults.unless(false, "previous_stage", &found, "no cascade: train 3d_fullres, or 3d_lowres on its own");
    }
    let class = json!(configuration.architecture.network_class_name);
    let (plain, residual) = (is_class(&class, "PlainConvUNet"), is_class(&class, "ResidualEncoderUNet"));
    let known = "PlainConvUNet or ResidualEncoderUNet";
    faults.unless(plain || residual, "architecture.network_class_name", &class, known);
    let arguments = &configuration.architecture.arch_kwargs;
    let field = |name: &str| format!("architecture.arch_kwargs.{name}");
    for (count, name, is_due) in [
        (&arguments.n_conv_per_stage, "n_conv_per_stage", plain),
        (&arguments.n_blocks_per_stage, "n_blocks_per_stage", residual),
    ] {
        let expected = if is_due { "a number for each stage" } else { "no such argument of this class" };
        let fits = count.is_some() == is_due || !(plain || residual);
        faults.unless(fits, &field(name), &json!(count), expected);
    }
    let convolution = json!(arguments.conv_op);
    faults.unless(is_class(&convolution, "Conv3d"), &field("conv_op"), &convolution, "Conv3d");
    extents(configuration, arguments, faults);

    // What is absent upstream is left out of the network, or has PyTorch's default.
    let given = |name: &str| arguments.other.get(name).cloned().unwrap_or(Value::Null);
    let norm = given("norm_op");
    faults.unless(is_class(&norm, "InstanceNorm3d"), &field("norm_op"), &norm, "InstanceNorm3d");
    let known = [
        ("eps", json!(1e-5), json!(1e-5)),
        ("affine", json!(false), json!(true)),
        ("track_running_stats", json!(false), json!(false)),
    ];
    faults.arguments(&field("norm_op_kwargs"), &given("norm_op_kwargs"), &known);
    let dropout = given("dropout_op");
    let never = given("dropout_op_kwargs").get("p").is_some_and(|p| p.as_f64() == Some(0.0));
    faults.unless(dropout.is_null() || never, &field("dropout_op"), &dropout, "null");
    let activation = given("nonlin");
    faults.unless(is_class(&activation, "LeakyReLU"), &field("nonlin"), &activation, "LeakyReLU");
    let mut activation = given("nonlin_kwargs");
    if let Some(activation) = activation.as_object_mut() {
        // Changes memory, not values.
        activation.remove("inplace");
    }
    faults.arguments(&field("nonlin_kwargs"), &activation, &[("negative_slope", json!(0.01), json!(0.01))]);
    if residual {
        residual_arguments(arguments, faults);
    } else {
        let first = given("nonlin_first");
        faults.unless(first.is_null() || first == false, &field("nonlin_first"), &first, "false");
    }
    let read: &[&str] = if residual { &["block", "bottleneck_channels", "stem_channels"] } else { &["nonlin_first"] };
    let both = [
        "norm_op",
        "norm_op_kwargs",
        "dropout_op",
        "dropout_op_kwargs",
        "nonlin",
        "nonlin_kwargs",
        // Set by the trainer upstream.
        "deep_supervision",
    ];
    let is_read = |name: &str| read.contains(&name) || both.contains(&name);
    for (name, value) in arguments.other.iter().filter(|(name, _)| !is_read(name)) {
        faults.unless(false, &field(name), value, "no such argument");
    }
}

/// What ResidualEncoderUNet takes beside the plain network's arguments.
fn residual_arguments(arguments: &ArchitectureArguments, faults: &mut Faults) {
    let given = |name: &str| arguments.other.get(name).cloned().unwrap_or(Value::Null);
    let field = |name: &str| format!("architecture.arch_kwargs.{name}");
    let block = given("block");
    faults.unless(block.is_null() || is_class(&block, "BasicBlockD"), &field("block"), &block, "BasicBlockD");
    let bottleneck = given("bottleneck_channels");
    let none = bottleneck.is_null() || bottleneck.as_array().is_some_and(|list| list.iter().all(Value::is_null));
    faults.unless(none, &field("bottleneck_channels"), &bottleneck, "null");
    let stem = given("stem_channels");
    let first = arguments.features_per_stage.first().map_or(Value::Null, |&features| json!(features));
    let expected = format!("null or the features of the first stage, {first}");
    faults.unless(stem.is_null() || same(&stem, &first), &field("stem_channels"), &stem, &expected);
}

/// Kernels, strides, and a patch that the strides divide.
fn extents(configuration: &Configuration, arguments: &ArchitectureArguments, faults: &mut Faults) {
    let all = |lists: &[Vec<usize>], allowed: [usize; 2]| lists.iter().flatten().all(|n| allowed.contains(n));
    let field = |name: &str| format!("architecture.arch_kwargs.{name}");
    let (kernels, strides) = (&arguments.kernel_sizes, &arguments.strides);
    faults.unless(all(kernels, [1, 3]), &field("kernel_sizes"), &json!(kernels), "1 and 3");
    let first_is_one = strides.first().is_none_or(|stride| stride.iter().all(|&n| n == 1));
    faults.unless(
        all(strides, [1, 2]) && first_is_one,
        &field("strides"),
        &json!(strides),
        "1 and 2, and in the first stage 1",
    );
    let patch = &configuration.patch_size;
    let divisors: Vec<usize> =
        (0..patch.len()).map(|axis| strides.iter().filter_map(|stride| stride.get(axis)).product()).collect();
    let divides = patch.iter().zip(&divisors).all(|(length, divisor)| length % divisor == 0);
    let expected = format!("multiples of {divisors:?}, the products of the strides");
    faults.unless(divides, "patch_size", &json!(patch), &expected);
}
