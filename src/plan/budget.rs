//! nnU-Net's planners differ in a handful of numbers only; here they are.

use super::topology::Encoder;

/// Which of nnU-Net's planners.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum PlannerKind {
    /// `ExperimentPlanner`: plain encoder, 8 GB.
    #[default]
    Default,
    /// `nnUNetPlannerResEncM`: residual encoder, 8 GB.
    ResEncM,
    /// `nnUNetPlannerResEncL`: residual encoder, 24 GB.
    ResEncL,
    /// `nnUNetPlannerResEncXL`: residual encoder, 40 GB.
    ResEncXl,
}

impl std::str::FromStr for PlannerKind {
    type Err = crate::Error;

    /// nnU-Net's class names, as `-pl` takes them.
    fn from_str(text: &str) -> crate::Result<Self> {
        use PlannerKind::{Default, ResEncL, ResEncM, ResEncXl};
        let kinds = [Default, ResEncM, ResEncL, ResEncXl];
        kinds.into_iter().find(|kind| kind.budget().planner == text).ok_or_else(|| crate::Error::Setting {
            setting: "planner",
            value: text.into(),
            expected: "expected ExperimentPlanner, nnUNetPlannerResEncM, nnUNetPlannerResEncL or nnUNetPlannerResEncXL",
        })
    }
}

/// Numbers in which the planners differ.
pub(super) struct Budget {
    pub planner: &'static str,
    pub plans: &'static str,
    /// Feature-map elements that fit the memory target, 3-D and 2-D.
    pub elements: [f64; 2],
    pub gigabytes: f64,
    /// Largest share of the dataset's voxels in a batch.
    pub dataset_share: f64,
    pub encoder: Encoder,
}

impl PlannerKind {
    pub(super) fn budget(self) -> Budget {
        let residual = || Encoder::Residual { blocks: vec![1, 3, 4, 6] };
        let (planner, plans, elements, gigabytes, dataset_share, encoder) = match self {
            PlannerKind::Default => ("ExperimentPlanner", "nnUNetPlans", [560e6, 85e6], 8.0, 0.05, Encoder::Plain),
            PlannerKind::ResEncM => {
                ("nnUNetPlannerResEncM", "nnUNetResEncUNetMPlans", [680e6, 135e6], 8.0, 1.0, residual())
            }
            PlannerKind::ResEncL => {
                ("nnUNetPlannerResEncL", "nnUNetResEncUNetLPlans", [2100e6, 380e6], 24.0, 1.0, residual())
            }
            PlannerKind::ResEncXl => {
                ("nnUNetPlannerResEncXL", "nnUNetResEncUNetXLPlans", [3600e6, 560e6], 40.0, 1.0, residual())
            }
        };
        Budget { planner, plans, elements, gigabytes, dataset_share, encoder }
    }
}
