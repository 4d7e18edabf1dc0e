//! Which kernels compute a convolution: the only place where that is decided.
//!
//! Another route is a folder beside `direct`; here a variant of [`Route`], where it applies, how it packs weights, and into
//! how many parts it sums moments and gradients (`moment_parts`, `gradient_parts`, `block_parts`; `None` if it does not); an
//! arm in `run.rs`; and its name among the routes that are measured, [`Route::ALL`].

use super::direct::Tile;
use super::gather::Gather;
use super::pack::Packing;
use super::problem::{Pass, Problem};
use super::{direct, igemm, tiled, winograd};
use crate::{Caps, Context, Dtype};
use std::collections::HashMap;
use std::sync::{Arc, LazyLock};

/// How a convolution is computed. All passes of a network may go by different routes; each gives the same numbers but for
/// rounding.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Route {
    /// The products of the definition, added up in f32 in registers of each unit: any shape, on any device.
    Direct,
    /// The same on GPUs, by cubes that share their input.
    Tiled,
    /// The products of the definition, from 16-bit factors on tensor cores.
    TensorCores,
    /// Winograd's F(4, 3) along the width and F(2, 3) along the other axes of three taps: fewer products, other rounding.
    Winograd,
}

impl Route {
    /// Every route with its name in measurements.
    pub const ALL: [(Route, &str); 4] = [
        (Route::Direct, "direct"),
        (Route::Tiled, "tiled"),
        (Route::Winograd, "winograd"),
        (Route::TensorCores, "tensor cores"),
    ];

    /// Its name in measurements.
    pub const fn name(self) -> &'static str {
        // Without a wildcard: a route that is missing in `ALL` does not compile.
        let place = match self {
            Route::Direct => 0,
            Route::Tiled => 1,
            Route::Winograd => 2,
            Route::TensorCores => 3,
        };
        Self::ALL[place].1
    }
}

/// What the choice of routes obeys: by default a fixed rule.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Policy {
    exact: bool,
    choices: HashMap<(Problem, Pass, Dtype), Route>,
}

impl Policy {
    /// Only routes that add up the products of the definition, where `exact` is true: then no choice is obeyed. By default
    /// convolutions may go by [`Route::Winograd`], which is faster and rounds a little more.
    pub fn with_exact(mut self, exact: bool) -> Self {
        self.exact = exact;
        self
    }

    /// Whether [`Policy::with_exact`] was set.
    pub fn is_exact(&self) -> bool {
        self.exact
    }

    /// Chooses for tensors of `dtype`: the fastest as measured on the device, for example. A route that a device cannot go is
    /// ignored there, see [`Route::applicable`]; shapes without a choice follow the rule.
    pub fn choose(&mut self, problem: Problem, pass: Pass, dtype: Dtype, route: Route) {
        self.choices.insert((problem, pass, dtype), route);
    }

    /// What was chosen.
    pub fn choice(&self, problem: &Problem, pass: Pass, dtype: Dtype) -> Option<Route> {
        self.choices.get(&(problem.clone(), pass, dtype)).copied()
    }

    /// Number of choices.
    pub fn choices(&self) -> usize {
        self.choices.len()
    }

    /// What convolutions on this context obey.
    pub fn of(context: &Context) -> &Self {
        static RULE: LazyLock<Policy> = LazyLock::new(Policy::default);
        context.policy().and_then(|policy| policy.downcast_ref()).unwrap_or(&RULE)
    }

    /// The same device, where convolutions obey this.
    pub fn on(self, context: &Context) -> Context {
        context.clone().with_policy(Arc::new(self))
    }
}

/// The products that an operation adds up, as far as a route depends on them.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Products {
    /// Sums over the gathered channels of up to two inputs, for `results` channels.
    Gather { gathered: [usize; 2], results: usize },
    /// Sums over voxels, for all pairs of channels.
    Weights { rows: usize, columns: usize },
}

impl Products {
    /// Of a pass, one an operation.
    fn of(problem: &Problem, pass: Pass) -> Vec<Self> {
        let columns = problem.channels_out();
        match pass {
            Pass::Forward => {
                vec![Self::Gather { gathered: [problem.channels_in(), problem.second_channels()], results: columns }]
            }
            Pass::DataGradient => {
                problem.inputs().map(|results| Self::Gather { gathered: [columns, 0], results }).collect()
            }
            Pass::WeightGradient => problem.inputs().map(|rows| Self::Weights { rows, columns }).collect(),
        }
    }

    fn fit_tensor_cores(&self, dtype: Dtype, caps: &Caps) -> bool {
        match *self {
            Self::Gather { gathered, results } => igemm::BlockPlan::gather(caps, dtype, gathered, results).is_some(),
            Self::Weights { rows, columns } => igemm::BlockPlan::weights(caps, dtype, rows, columns).is_some(),
        }
    }

    fn fit_tiles(&self, caps: &Caps) -> bool {
        match *self {
            Self::Gather { gathered, results } => tiled::TiledPlan::choose(caps, gathered, results).is_some(),
            Self::Weights { .. } => false,
        }
    }
}

impl Route {
    /// The route of a pass over tensors of `dtype` on a device with `caps`. Where the policy says nothing it is the fastest by a
    /// rule. Measured on two cores with AVX-512: below 16 channels Winograd's transforms cost what the products save, and so
    /// they do in the gradients of a network's lowest stages, whose few voxels do not pay for transforming `256 x 256` weights.
    pub fn choose(problem: &Problem, pass: Pass, dtype: Dtype, caps: &Caps, policy: &Policy) -> Self {
        let by_definition = Self::by_definition(&Products::of(problem, pass), dtype, caps);
        if policy.exact {
            return by_definition;
        }
        let applicable = Self::applicable(problem, pass, dtype, caps);
        let chosen = policy.choice(problem, pass, dtype).filter(|route| applicable.contains(route));
        let least = problem.all_channels_in().min(problem.channels_out());
        let pays = least >= 16 && (pass == Pass::Forward || least < 256);
        chosen.unwrap_or(if pays && applicable.contains(&Self::Winograd) { Self::Winograd } else { by_definition })
    }

    /// The routes that a pass can go on a device with `caps`: what [`Route::choose`] chooses is one of them.
    pub fn applicable(problem: &Problem, pass: Pass, dtype: Dtype, caps: &Caps) -> Vec<Self> {
        let products = Products::of(problem, pass);
        let mut routes = vec![Self::in_f32(&products, caps)];
        if winograd::fits(problem, dtype, caps) {
            routes.push(Self::Winograd);
        }
        if products.iter().all(|products| products.fit_tensor_cores(dtype, caps)) {
            routes.push(Self::TensorCores);
        }
        routes
    }

    /// The fastest that adds up the products of the definition: tensor cores where all operations of a pass can use them.
    pub(crate) fn by_definition(products: &[Products], dtype: Dtype, caps: &Caps) -> Self {
        match products.iter().all(|products| products.fit_tensor_cores(dtype, caps)) {
            true => Self::TensorCores,
            false => Self::in_f32(products, caps),
        }
    }

    fn in_f32(products: &[Products], caps: &Caps) -> Self {
        if products.iter().all(|products| products.fit_tiles(caps)) { Self::Tiled } else { Self::Direct }
    }

    /// Whether one launch computes the data gradient at all positions inside the stride; else each parity is one, without a
    /// product with a zero between the strides either.
    pub(crate) fn gathers_at_once(self) -> bool {
        self == Self::Direct
    }

    /// Whether the gradient of the weights of both inputs is one operation.
    pub(super) fn joins_inputs(self) -> bool {
        self == Self::Winograd
    }

    /// The order in which the kernels read weights; `None` where they make something else of the stored ones.
    pub(super) fn packing(self, gather: &Gather, caps: &Caps) -> Option<Packing> {
        let all = gather.channels_out;
        match self {
            Self::Direct => {
                let tile = Tile::of(gather, caps);
                Some(Packing { block: tile.channels(), split: tile.split, dtype: Dtype::F32 })
            }
            Self::Tiled => Some(Packing { block: all, split: 1, dtype: Dtype::F32 }),
            Self::TensorCores => Some(Packing { block: all, split: 1, dtype: gather.input.dtype() }),
            Self::Winograd => None,
        }
    }

    /// The parts of each sample in which the moments of the outputs are taken. `None` where they cannot be: on tensor cores
    /// whose tile does not share out its columns evenly.
    pub(super) fn moment_parts(self, gather: &Gather, caps: &Caps) -> Option<usize> {
        match self {
            Self::Direct => Some(direct::moment_parts(gather, caps)),
            _ => self.block_parts(gather, caps),
        }
    }

    /// The parts of each sample in which the sums of a norm's gradient are taken: where one launch computes all of the
    /// gradient, and units can merge what they know of a channel. `None` where they cannot.
    pub(super) fn gradient_parts(self, gather: &Gather, caps: &Caps) -> Option<usize> {
        match self {
            Self::Direct => None,
            _ if gather.out_step != [1; 3] => None,
            _ => self.block_parts(gather, caps),
        }
    }

    fn block_parts(self, gather: &Gather, caps: &Caps) -> Option<usize> {
        let outputs = gather.outputs();
        match self {
            Self::Direct => None,
            Self::Tiled => tiled::TiledPlan::of(gather, caps).map(|plan| plan.row_blocks(outputs)),
            Self::TensorCores => igemm::BlockPlan::of(gather, caps)
                .filter(igemm::BlockPlan::merges_columns)
                .map(|plan| plan.row_blocks(outputs)),
            Self::Winograd => Some(caps.cube_units() as usize),
        }
    }
}
