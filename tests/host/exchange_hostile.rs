//! Checkpoints and archives that are damaged, or made to do harm: each is refused with the name of what is wrong.

use crate::common::{data, pickles};
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use voxgrad::Error;
use voxgrad::error::ExchangeError;
use voxgrad::exchange::pickle::Value;
use voxgrad::exchange::torch::{self, TorchFile};
use voxgrad::exchange::{TrainedModel, install_zip};

const MODEL: &str = "exchange/nnUNetTrainer__nnUNetPlans__3d_fullres";

fn fold_0() -> PathBuf {
    data(MODEL).join("fold_0/checkpoint_final.pth")
}

/// What reading a pickle fails with.
fn refused(folder: &Path, pickle: &[u8]) -> Error {
    let path = folder.join("hostile.pth");
    pickles::torch(&path, pickle, &[0; 16]);
    TorchFile::open(&path).err().unwrap_or_else(|| panic!("{pickle:?} was read"))
}

#[test]
fn a_pickle_that_asks_for_code_is_refused_by_name() {
    let folder = tempfile::tempdir().unwrap();
    let canary = folder.path().join("canary");
    let command = format!("touch {}", canary.display());
    let mut system = b"\x80\x02cos\nsystem\nX".to_vec();
    system.extend((command.len() as u32).to_le_bytes());
    system.extend(command.bytes());
    system.extend(b"\x85R.");
    let short = |text: &str| [&[0x8c, text.len() as u8], text.as_bytes()].concat();
    let stacked = [b"\x80\x04".as_slice(), &short("builtins"), &short("eval"), b"\x93."].concat();
    let cases: [(&[u8], &str); 8] = [
        (&system, "os.system"),
        (&stacked, "builtins.eval"),
        (b"\x80\x02cposix\nsystem\n.", "posix.system"),
        (b"\x80\x02ctorch\nload\n.", "torch.load"),
        (b"\x80\x02ctorch.nn.modules.linear\nLinear\n)\x81.", "torch.nn.modules.linear.Linear"),
        (b"\x80\x02cnumpy.core.multiarray\n_reconstruct\n.", "numpy.core.multiarray._reconstruct"),
        (b"\x80\x02ccollections\ndefaultdict\n.", "collections.defaultdict"),
        (b"\x80\x02ctorch.storage\n_load_from_bytes\n.", "torch.storage._load_from_bytes"),
    ];
    for (pickle, expected) in cases {
        match refused(folder.path(), pickle) {
            Error::Exchange(ExchangeError::PickleGlobal { name, .. }) => assert_eq!(name, expected),
            other => panic!("{expected}: {other}"),
        }
    }
    assert!(!canary.exists());
}

#[test]
fn pickles_that_checkpoints_do_not_have() {
    let folder = tempfile::tempdir().unwrap();
    // Ten lists inside of each other ten times over, nine deep: a billion.
    let mut laughs = b"\x80\x02]q\x00".to_vec();
    for level in 0..9u8 {
        laughs.extend(b"](");
        (0..10).for_each(|_| laughs.extend([b'h', level]));
        laughs.extend([b'e', b'q', level + 1]);
    }
    laughs.push(b'.');
    let deep = [b"\x80\x02".as_slice(), &b"]".repeat(5000), &b"a".repeat(4999), b"."].concat();
    let cases: [(&[u8], &str); 14] = [
        (b"", "ends"),
        (b"\x80\x01N.", "protocol 1"),
        (b"\x80\x02", "ends"),
        (b"\x80\x02.", "stack is empty"),
        (b"\x80\x02X\xff\xff\xff\xffabc.", "ends"),
        (b"\x80\x02h\x07.", "memo 7"),
        (b"\x80\x02Nr\xff\xff\xff\x7f.", "memo"),
        (b"\x80\x02t.", "mark"),
        (b"\x80\x02K\x01K\x01a.", "no list"),
        (b"\x80\x02I12\n.", "0x49"),
        (b"\x80\x02K\x01K\x02R.", "no function"),
        (b"\x80\x02]q\x00h\x00a.", "hold each other"),
        (&laughs, "hold each other"),
        (&deep, "hold each other"),
    ];
    for (pickle, expected) in cases {
        let error = refused(folder.path(), pickle).to_string();
        assert!(error.contains(expected), "{expected}: {error}");
    }
}

#[test]
fn tensors_outside_of_their_storage_or_of_another_type() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("tensor.pth");
    let read = |pickle: &[u8], storage: &[u8]| -> Result<Vec<f32>, Error> {
        pickles::torch(&path, pickle, storage);
        let file = TorchFile::open(&path)?;
        let Value::Tensor(tensor) = &file.content else { panic!("no tensor") };
        file.values(tensor)
    };
    let storage: Vec<u8> = [1.0f32, 2.0, 3.0, 4.0].iter().flat_map(|value| value.to_le_bytes()).collect();
    let good = pickles::tensor("FloatStorage", 4, 1, &[3], &[1]);
    assert_eq!(read(&good, &storage).unwrap(), [2.0, 3.0, 4.0]);
    let cases = [
        (pickles::tensor("FloatStorage", 4, 2, &[3], &[1]), storage.clone(), "beyond its storage"),
        (pickles::tensor("FloatStorage", 4, 0, &[2, 2], &[3, 1]), storage.clone(), "beyond its storage"),
        // The same element again and again: endless memory from a few bytes.
        (
            pickles::tensor("FloatStorage", 4, 0, &[200, 200, 200, 200], &[0, 0, 0, 0]),
            storage.clone(),
            "beyond its storage",
        ),
        (pickles::tensor("FloatStorage", 4, 0, &[4], &[1, 1]), storage.clone(), "strides"),
        (pickles::tensor("FloatStorage", 4, 0, &[4], &[1]), storage[..15].to_vec(), "15 bytes instead of 16"),
        (pickles::tensor("FloatStorage", 200, 0, &[4], &[1]), storage.clone(), "16 bytes instead of 800"),
        (pickles::tensor("IntStorage", 4, 0, &[4], &[1]), storage.clone(), "expected floats"),
    ];
    for (pickle, storage, expected) in cases {
        let error = read(&pickle, &storage).unwrap_err().to_string();
        assert!(error.contains(expected), "{expected}: {error}");
    }
    pickles::zip(&path, &[("a/data.pkl", &good), ("a/byteorder", b"big")]);
    assert!(TorchFile::open(&path).err().unwrap().to_string().contains("little-endian"));
    pickles::zip(&path, &[("a/data.pkl", &good)]);
    let file = TorchFile::open(&path).unwrap();
    let Value::Tensor(tensor) = &file.content else { panic!("no tensor") };
    assert!(file.values(tensor).unwrap_err().to_string().contains("\"a/data/0\" is missing"));
    pickles::zip(&path, &[("a/data", &good)]);
    assert!(TorchFile::open(&path).err().unwrap().to_string().contains("data.pkl"));
}

/// Cut off anywhere, or with any byte changed, a real checkpoint is read or refused; it never panics.
#[test]
fn a_damaged_checkpoint_does_not_panic() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("damaged.pth");
    let whole = fs::read(fold_0()).unwrap();
    let read = |bytes: &[u8]| {
        fs::write(&path, bytes).unwrap();
        TrainedModel::of_file(&path, true).is_ok()
    };
    assert!(read(&whole));
    for end in (0..whole.len()).step_by(997) {
        assert!(!read(&whole[..end]), "cut off at {end}");
    }
    // The pickle alone, so that no checksum stands before it.
    let mut pickle = voxgrad_pickle(&fold_0());
    for place in (0..pickle.len()).step_by(37) {
        let byte = std::mem::replace(&mut pickle[place], 0xff);
        pickles::torch(&path, &pickle, &[0; 16]);
        let _ = TrainedModel::of_file(&path, true);
        pickle[place] = byte;
    }
}

/// The bytes of a checkpoint's pickle, which is stored.
fn voxgrad_pickle(path: &Path) -> Vec<u8> {
    let bytes = fs::read(path).unwrap();
    let archive = rawzip::ZipArchive::from_slice(&bytes).unwrap();
    let pickle =
        archive.entries().map(Result::unwrap).find(|entry| entry.file_path().as_bytes().ends_with(b"data.pkl"));
    archive.get_entry(pickle.unwrap().wayfinder()).unwrap().data().to_vec()
}

/// The checkpoint of the test data with its weights changed.
fn edited(path: &Path, edit: impl FnOnce(&mut Vec<(Value, Value)>)) {
    let file = TorchFile::open(&fold_0()).unwrap();
    let mut content = file.content.clone();
    let Value::Dict(fields) = &mut content else { panic!("no dict") };
    fields.retain(|(key, _)| key.as_text() != Some("optimizer_state"));
    let weights = fields.iter_mut().find(|(key, _)| key.as_text() == Some("network_weights"));
    let Some((_, Value::Dict(weights))) = weights else { panic!("no weights") };
    // Each tensor once more, with a storage of its own.
    let mut values: Vec<Vec<f32>> = Vec::new();
    for (_, value) in weights.iter_mut() {
        let Value::Tensor(tensor) = value else { panic!("no tensor") };
        values.push(file.values(tensor).unwrap());
        *value =
            Value::Tensor(voxgrad::exchange::pickle::Tensor::contiguous((values.len() - 1).to_string(), &tensor.shape));
    }
    edit(weights);
    let storages: Vec<(String, &[f32])> =
        values.iter().enumerate().map(|(i, v)| (i.to_string(), v.as_slice())).collect();
    torch::write(path, &content, &storages).unwrap();
}

#[test]
fn all_tensors_that_do_not_fit_are_named_together() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("edited.pth");
    let (context, _guard) = crate::common::device();
    edited(&path, |_| ());
    TrainedModel::of_file(&path, false).unwrap().networks(context).unwrap();
    edited(&path, |weights| {
        weights.retain(|(key, _)| !key.as_text().unwrap().contains("transpconvs.0.bias"));
        for (key, value) in weights.iter_mut() {
            let Value::Tensor(tensor) = value else { panic!("no tensor") };
            if key.as_text() == Some("decoder.seg_layers.1.weight") {
                tensor.shape.reverse();
                tensor.strides = vec![6, 6, 6, 3, 1];
            }
        }
        let another = weights[0].1.clone();
        weights.push(("encoder.stages.9.0.convs.0.conv.weight".into(), another));
    });
    let error = TrainedModel::of_file(&path, false).unwrap().networks(context).unwrap_err().to_string();
    for word in [
        "3 tensors",
        "decoder.transpconvs.0.bias is missing",
        "decoder.seg_layers.1.weight has shape",
        "encoder.stages.9",
    ] {
        assert!(error.contains(word), "{word}: {error}");
    }
}

#[test]
fn names_of_one_tensor_must_agree() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("edited.pth");
    edited(&path, |weights| {
        let find = |name: &str| weights.iter().position(|(key, _)| key.as_text() == Some(name)).unwrap();
        let places = [
            find("decoder.encoder.stages.0.0.convs.0.all_modules.1.bias"),
            find("encoder.stages.0.0.convs.0.norm.weight"),
        ];
        let other = weights[places[1]].1.clone();
        weights[places[0]].1 = other;
    });
    let error = TrainedModel::of_file(&path, false).err().unwrap().to_string();
    assert!(error.contains("encoder.stages.0.0.convs.0.norm.bias and decoder.encoder.stages.0.0.convs.0"), "{error}");
}

#[test]
fn archives_that_leave_their_folder_or_fill_the_disk() {
    let folder = tempfile::tempdir().unwrap();
    let (archive, results) = (folder.path().join("a.zip"), folder.path().join("deep/results"));
    let plans = ("Dataset001_A/t__p__c/plans.json", b"{}".as_slice());
    let install = || install_zip(&archive, &results, false);
    for name in
        ["../evil", "/absolute/evil", "Dataset001_A/../../evil", "Dataset001_A\\..\\..\\evil", "C:/evil", "a//b", "."]
    {
        pickles::zip(&archive, &[plans, (name, b"evil")]);
        let error = install().unwrap_err().to_string();
        assert!(error.contains("outside of the folder"), "{name}: {error}");
    }
    pickles::zip(&archive, &[("notes.txt", b"no model")]);
    assert!(install().unwrap_err().to_string().contains("no archive of nnU-Net models"));
    pickles::zip(&archive, &[plans, plans]);
    assert!(install().unwrap_err().to_string().contains("is there twice"));

    // 64 MiB of zeros in 64 KiB.
    let mut zip = rawzip::ZipArchiveWriter::new(Vec::new());
    let entry = zip.new_file(plans.0).compression_method(rawzip::CompressionMethod::DEFLATE);
    let (mut entry, config) = entry.start().unwrap();
    let mut data = config.wrap(flate2::write::DeflateEncoder::new(&mut entry, flate2::Compression::fast()));
    (0..64).for_each(|_| data.write_all(&[0; 1 << 20]).unwrap());
    let (encoder, descriptor) = data.finish().unwrap();
    encoder.finish().unwrap();
    entry.finish(descriptor).unwrap();
    let mut bytes = zip.finish().unwrap();
    fs::write(&archive, &bytes).unwrap();
    assert!(install().unwrap_err().to_string().contains("a hundred times its size"));
    // The same with a table that says 2 bytes: it unpacks to no more.
    let size = (64u32 << 20).to_le_bytes();
    let table = bytes.len() - 22 - (46 + plans.0.len());
    assert_eq!(bytes[table + 24..table + 28], size);
    bytes[table + 24..table + 28].copy_from_slice(&2u32.to_le_bytes());
    fs::write(&archive, &bytes).unwrap();
    let error = install().unwrap_err().to_string();
    assert!(error.contains("longer") || error.contains("size"), "{error}");
    let left = fs::read_dir(&results).map_or(0, |entries| entries.count());
    assert_eq!(left, 0, "nothing is left");
    assert!(!folder.path().join("evil").exists() && !folder.path().join("deep/evil").exists());
}
