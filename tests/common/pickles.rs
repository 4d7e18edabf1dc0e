//! Files of `torch.save` made by hand, for what PyTorch itself would not write.

use rawzip::ZipArchiveWriter;
use std::io::Write;
use std::path::Path;

/// A zip archive of stored entries.
pub fn zip(path: &Path, entries: &[(&str, &[u8])]) {
    let mut archive = ZipArchiveWriter::new(Vec::new());
    for (name, bytes) in entries {
        // As they are, however they lead out of a folder.
        let name = rawzip::path::EntryPath::verbatim(name.as_bytes());
        let (mut entry, config) = archive.new_file(name).start().unwrap();
        let mut data = config.wrap(&mut entry);
        data.write_all(bytes).unwrap();
        let (_, descriptor) = data.finish().unwrap();
        entry.finish(descriptor).unwrap();
    }
    std::fs::write(path, archive.finish().unwrap()).unwrap();
}

/// A file of one pickle and one storage, called 0.
pub fn torch(path: &Path, pickle: &[u8], storage: &[u8]) {
    zip(path, &[("a/data.pkl", pickle), ("a/byteorder", b"little"), ("a/data/0", storage), ("a/version", b"3\n")]);
}

/// The pickle of a tensor that views storage 0.
pub fn tensor(class: &str, stored: u8, offset: u8, shape: &[u8], strides: &[u8]) -> Vec<u8> {
    let mut bytes = b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n((X\x07\x00\x00\x00storage".to_vec();
    bytes.extend(format!("ctorch\n{class}\n").bytes());
    bytes.extend(b"X\x01\x00\x00\x000X\x03\x00\x00\x00cpuK");
    bytes.push(stored);
    bytes.extend(b"tQK");
    bytes.push(offset);
    for list in [shape, strides] {
        bytes.push(b'(');
        list.iter().for_each(|&n| bytes.extend([b'K', n]));
        bytes.push(b't');
    }
    bytes.extend(b"\x89ccollections\nOrderedDict\n)RtR.");
    bytes
}
