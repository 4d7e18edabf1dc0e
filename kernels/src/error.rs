//! What can go wrong between a caller and a kernel.

/// Why an operation was refused or has failed.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum KernelError {
    /// The shapes of one operation do not fit together.
    #[error("{operation}: {what} must be {expected}, got {actual}")]
    Shape {
        /// The operation's name.
        operation: &'static str,
        /// The argument or the relation that is wrong.
        what: &'static str,
        /// What it has to be.
        expected: String,
        /// What it is.
        actual: String,
    },
    /// A buffer has another element type than the operation reads or writes.
    #[error("{operation}: {what} must hold {expected}, got {actual:?}")]
    Dtype {
        /// The operation's name.
        operation: &'static str,
        /// The argument that is wrong.
        what: &'static str,
        /// The accepted element types.
        expected: &'static str,
        /// The buffer's element type.
        actual: crate::Dtype,
    },
    /// The work is larger than the device or the index arithmetic allows.
    #[error("{operation}: {what} is {actual}, the limit of this device is {limit}; use a smaller patch or batch")]
    Limit {
        /// The operation's name.
        operation: &'static str,
        /// The quantity that is too large.
        what: &'static str,
        /// Its size.
        actual: u64,
        /// The largest size allowed.
        limit: u64,
    },
    /// The device lacks something that the operation needs.
    #[error("{operation}: this device has no {feature}")]
    Unsupported {
        /// The operation's name.
        operation: &'static str,
        /// The missing feature.
        feature: &'static str,
    },
    /// The device reported a failure: of a compilation, an allocation or a launch.
    #[error("the device failed while {doing}: {reason}")]
    Device {
        /// What the host was doing when it heard of the failure.
        doing: &'static str,
        /// The runtime's own words.
        reason: String,
    },
}

impl KernelError {
    /// A [`KernelError::Shape`] from anything that prints.
    pub fn shape(
        operation: &'static str,
        what: &'static str,
        expected: impl std::fmt::Debug,
        actual: impl std::fmt::Debug,
    ) -> Self {
        Self::Shape { operation, what, expected: format!("{expected:?}"), actual: format!("{actual:?}") }
    }
}
