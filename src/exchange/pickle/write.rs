//! Writes pickles of protocol 2, which `torch.save` writes too.

use super::globals::KEEP_LARGEST;
use super::value::{Element, Tensor, Value};

/// The pickle of a value.
pub(crate) fn write(value: &Value) -> Vec<u8> {
    let mut bytes = vec![0x80, 2];
    put(&mut bytes, value);
    bytes.push(b'.');
    bytes
}

fn put(bytes: &mut Vec<u8>, value: &Value) {
    match value {
        Value::None => bytes.push(b'N'),
        Value::Bool(true) => bytes.push(0x88),
        Value::Bool(false) => bytes.push(0x89),
        Value::Int(value) => integer(bytes, *value),
        Value::Float(value) => {
            bytes.push(b'G');
            bytes.extend(value.to_be_bytes());
        }
        Value::Text(value) => text(bytes, value),
        Value::Bytes(value) => {
            // Protocol 2 has no bytes of its own.
            bytes.extend(b"c_codecs\nencode\n");
            text(bytes, &value.iter().map(|&byte| char::from(byte)).collect::<String>());
            text(bytes, "latin1");
            bytes.extend([0x86, b'R']);
        }
        Value::List(items) => {
            bytes.extend(b"](");
            items.iter().for_each(|item| put(bytes, item));
            bytes.push(b'e');
        }
        Value::Tuple(items) => {
            bytes.push(b'(');
            items.iter().for_each(|item| put(bytes, item));
            bytes.push(b't');
        }
        Value::Dict(entries) => {
            bytes.extend(b"}(");
            for (key, value) in entries {
                put(bytes, key);
                put(bytes, value);
            }
            bytes.push(b'u');
        }
        Value::Device(name) => {
            bytes.extend(b"ctorch\ndevice\n");
            text(bytes, name);
            bytes.extend([0x85, b'R']);
        }
        Value::Tensor(value) => tensor(bytes, value),
        Value::KeepLargestComponent => bytes.extend(format!("c{}\n{}\n", KEEP_LARGEST[0], KEEP_LARGEST[1]).bytes()),
    }
}

fn integer(bytes: &mut Vec<u8>, value: i64) {
    match (u8::try_from(value), i32::try_from(value)) {
        (Ok(value), _) => bytes.extend([b'K', value]),
        (_, Ok(value)) => {
            bytes.push(b'J');
            bytes.extend(value.to_le_bytes());
        }
        _ => {
            bytes.extend([0x8a, 8]);
            bytes.extend(value.to_le_bytes());
        }
    }
}

fn text(bytes: &mut Vec<u8>, text: &str) {
    match u32::try_from(text.len()) {
        Ok(length) => {
            bytes.push(b'X');
            bytes.extend(length.to_le_bytes());
        }
        // Of protocol 4, and read all the same.
        Err(_) => {
            bytes.push(0x8d);
            bytes.extend((text.len() as u64).to_le_bytes());
        }
    }
    bytes.extend(text.as_bytes());
}

fn indices(bytes: &mut Vec<u8>, items: &[usize]) {
    bytes.push(b'(');
    items.iter().for_each(|&item| integer(bytes, item as i64));
    bytes.push(b't');
}

/// `_rebuild_tensor_v2(storage, offset, shape, strides, requires_grad, backward_hooks)`.
fn tensor(bytes: &mut Vec<u8>, tensor: &Tensor) {
    bytes.extend(b"ctorch._utils\n_rebuild_tensor_v2\n((");
    text(bytes, "storage");
    let class = Element::STORAGES.iter().find(|(_, element)| *element == tensor.element).map_or("", |(class, _)| class);
    bytes.extend(format!("ctorch\n{class}\n").bytes());
    text(bytes, &tensor.storage);
    text(bytes, "cpu");
    integer(bytes, tensor.stored as i64);
    bytes.extend(b"tQ");
    integer(bytes, tensor.offset as i64);
    indices(bytes, &tensor.shape);
    indices(bytes, &tensor.strides);
    bytes.push(0x89);
    bytes.extend(b"ccollections\nOrderedDict\n)RtR");
}
