//! Cases that nnU-Net has preprocessed, once more in chunks: an archive cannot be read in parts, a copy in voxgrad's own
//! format can.

use super::folder::{case_path, cases_folder, files_seen};
use super::{PreprocessedCase, Preprocessor, StoredCase, store};
use crate::compat::Compat;
use crate::dataset::CaseFiles;
use crate::error::{Error, Result};
use std::path::{Path, PathBuf};

/// Where the copy of a case lies: in a folder of its own, as it must not be taken for what `preprocess` makes.
fn copy_path(prepared: &Path, data_identifier: &str, case: &str) -> PathBuf {
    case_path(&cases_folder(prepared, &format!("{data_identifier}_converted")), case)
}

/// What a copy says it was made from: the original's name, size and time, and how its labels were read.
pub(super) fn origin(original: &Path, preprocessor: &Preprocessor) -> Result<String> {
    let beside = original.with_file_name(match (original.file_stem(), original.extension()) {
        (Some(stem), Some(ending)) => format!("{}_seg.{}", stem.to_string_lossy(), ending.to_string_lossy()),
        _ => String::new(),
    });
    // Labels lie beside a .b2nd, and in an .npz.
    let label = Some(beside).filter(|path| path.is_file());
    let files = CaseFiles { name: String::new(), images: vec![original.into()], label };
    let preprocessor = Preprocessor { compat: Compat::Nnunet, ..preprocessor.clone() };
    Ok(format!("{preprocessor:?}; converted{}", files_seen(&files)?))
}

/// The copy of a case, if there is one of the original as it is now.
pub(super) fn copy_of(
    prepared: &Path,
    data_identifier: &str,
    case: &str,
    original: &Path,
    preprocessor: &Preprocessor,
) -> Option<StoredCase> {
    let copy = StoredCase::open(&copy_path(prepared, data_identifier, case)).ok()?;
    (copy.recipe() == origin(original, preprocessor).ok()?).then_some(copy)
}

/// Makes the copy of a case. An older one is replaced.
pub(super) fn convert(
    prepared: &Path,
    data_identifier: &str,
    case: &PreprocessedCase,
    origin: &str,
) -> Result<StoredCase> {
    let path = copy_path(prepared, data_identifier, &case.name);
    if let Some(folder) = path.parent() {
        std::fs::create_dir_all(folder).map_err(Error::io(folder, "create"))?;
    }
    store::write(&path, case, origin)?;
    StoredCase::open(&path)
}
