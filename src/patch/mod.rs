//! Patches: boxes of voxels in channels-last buffers, cut out of cases in memory or on disk.

mod source;
mod stored;

pub use source::PatchSource;
pub(crate) use source::copy_image;
pub use stored::{ChunkCache, StoredPatches, patches_of};
