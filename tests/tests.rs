//! Behaviour against references, through the public API only. One binary: the heavy stack links once.

mod common;

/// What runs kernels, or trains and predicts with them: once for each device.
mod device {
    /// Buffers, grids and the errors of a device.
    mod context;

    /// 3D convolution and its gradients.
    mod conv3d;

    /// Convolutions of 16-bit activations.
    mod conv_half;

    /// Winograd's convolution beside the direct one.
    mod winograd;

    /// Transposed convolution and its gradients.
    mod conv_transpose3d;

    /// Sums over rows.
    mod reduce;

    /// Exponential and logarithm of vectors.
    mod vector_math;

    /// Filling, copying, converting, scaling, adding.
    mod elementwise;

    /// Instance norm with leaky ReLU.
    mod instance_norm;

    /// Average pooling against its definition.
    mod average_pool;

    /// The end of a residual block, fused, against the formulas and its parts.
    mod residual_norm;

    /// SGD, AdamW, the gradient's norm.
    mod optimizer;

    /// Labels above 255, from dataset to evaluation.
    mod many_labels;

    /// Patches cut ahead of training.
    mod loader;

    /// Dice and cross-entropy under an ignore mask.
    mod loss;

    /// Every variant of the losses against an f64 reference.
    mod loss_reference;

    /// What holds for the losses whatever they are given.
    mod loss_properties;

    /// Edge cases of losses on sparse annotations.
    mod loss_edges;

    /// Input that makes no loss.
    mod loss_input;

    /// Logits, losses, gradients and weights of a real nnU-Net run.
    mod golden;

    /// Networks with a residual encoder: names, memory, plans, training.
    mod residual;

    /// Augmentation kernels against their definitions.
    mod augment;

    /// Augmentation against batchgeneratorsv2.
    mod augment_upstream;

    /// What is drawn for augmentation, and whole batches.
    mod augment_distributions;

    /// Sliding windows on the device: cut, added up, resolved.
    mod window;

    /// Predicting folders of cases on the command line: what is kept, what fails, what it takes of memory.
    mod predict;

    /// What the best configuration is, as its commands make it.
    mod best;

    /// Completing annotated cases, and suggesting what to annotate.
    mod annotate;

    /// Models of nnU-Net, read and predicted with, and models for nnU-Net.
    mod exchange;

    /// Training, interruption, continuation.
    mod train;

    /// Trainings that are killed, find the disk full, or their checkpoint damaged.
    mod killed;

    /// nnU-Net's command line for training, and the files beside the checkpoints.
    mod train_cli;

    /// Ways of annotating, compared.
    mod simulate;

    /// Planted errors for compute-sanitizer.
    mod sanitizer;

    /// Compilation for CUDA, without a device.
    mod ptx;

    /// The memory of a training step, counted and real.
    mod memory;

    /// Kernels that are compiled on another thread, before they are needed.
    mod compilation;

    /// Recorded launches, and the profile of a step.
    mod benchmark;

    /// Algorithms chosen by shape.
    mod tune;

    /// The sums of the norm that data gradients take, against unfused operations.
    mod fused_norm;

    /// The moments that convolutions take, and whole fused steps, against unfused operations.
    mod fusion;
}

/// Files, rules, numbers and the command line: alike whatever the device.
mod host {
    /// Evaluation on the command line, beside nnU-Net's files.
    mod evaluate_cli;

    /// Folds as one, ensembles, the best configuration, beside nnU-Net's files.
    mod crossval;

    /// Pictures of cases in three planes.
    mod overlay;

    /// Connected components, and what nnU-Net decides by them.
    mod postprocess;

    /// Reading and writing NIfTI, including files made to break readers.
    mod nifti;

    /// The legacy numpy generator against numbers drawn by numpy.
    mod numpy_random;

    /// Dataset description, label rules, case files.
    mod dataset;

    /// Which files belong to which case.
    mod dataset_names;

    /// What is found in a dataset before any work begins.
    mod dataset_verify;

    /// Reading plans and resolving configurations.
    mod plans;

    /// Cross-validation splits.
    mod splits;

    /// Cropping, normalisation, class locations and whole cases, against nnU-Net's own preprocessed data.
    mod preprocess;

    /// Resampling against scikit-image and scipy.
    mod resample;

    /// Patch placement and batch buffers.
    mod sample;

    /// Mirroring.
    mod mirror;

    /// Sliding windows, accumulation and export.
    mod infer;

    /// Files that appear when they are complete.
    mod atomic;

    /// Checkpoints and archives of models that are damaged, or made to do harm.
    mod exchange_hostile;

    /// Metrics and `summary.json`, byte for byte against nnU-Net's.
    mod eval;

    /// Distances between surfaces, lesions, volumes.
    mod measures;

    /// The command line and its errors.
    mod cli;

    /// Benchmarks on the command line.
    mod benchmark;

    /// What a training that goes on remembers, and what it is told again.
    mod continuing;

    /// Preprocessed cases: where they lie, what makes them stale, what deletion leaves.
    mod prepared;

    /// The record of epochs.
    mod history;

    /// Pictures of progress and of cases.
    mod report;

    /// Making dense labels sparse: what holds for every scheme.
    mod sparsify;

    /// Making dense datasets sparse.
    mod sparsify_dataset;

    /// A page about a dataset.
    mod inspect;

    /// Segmentations of 3D Slicer.
    mod segments;

    /// Annotations as people draw them.
    mod import;

    /// Certainty, completed labels, and the order of suggestions.
    mod annotate;

    /// Fingerprints and planned configurations, field by field against nnU-Net's.
    mod planner;

    /// Preprocessed cases on disk, and damage to them.
    mod store;

    /// nnU-Net's own preprocessed cases.
    mod b2nd;

    /// Items in three stages.
    mod stages;

    /// numpy's archives, which probabilities are kept in.
    mod npz;

    /// Patches of cases on disk.
    mod patches;

    /// Mutated NIfTI files, for as long as one likes.
    mod fuzz;

    /// From a raw dataset to preprocessed cases on the command line.
    mod dataset_cli;

    /// Messages between ranks, their shares, and what they must have alike.
    mod parallel;

    /// Which room may import from which.
    mod imports;
}
