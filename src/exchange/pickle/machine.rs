//! The machine that a pickle is a program for: a stack, a memo, and instructions that push plain values, fill
//! containers and, of calls, make only what [`Global`] lists.
//!
//! Objects live in one list and refer to each other by place, as a pickle may fill a container after it was used. At
//! the end what the program leaves is copied out as a tree, within bounds: a few bytes can describe a tree without
//! end.

use super::fault::{Fault, damaged};
use super::globals::{Global, Numpy, latin1, tensor};
use super::value::{Element, Value};

/// Objects that a pickle may make, and that the tree it describes may have; nnU-Net's have tens of thousands.
const MOST_OBJECTS: usize = 4 << 20;
/// Bytes of text in that tree.
const MOST_TEXT: usize = 256 << 20;
/// Containers inside of each other.
const DEEPEST: usize = 100;

/// Reads a pickle of protocol 2 to 5.
pub(crate) fn read(bytes: &[u8]) -> Result<Value, Fault> {
    let mut machine =
        Machine { bytes, at: 0, objects: Vec::new(), stack: Vec::new(), marks: Vec::new(), memo: Vec::new() };
    let root = machine.run()?;
    let mut left = Left { objects: MOST_OBJECTS, text: MOST_TEXT };
    machine.tree(root, DEEPEST, &mut left)
}

/// An object that exists while the program runs.
enum Object {
    Plain(Value),
    List(Vec<usize>),
    Tuple(Vec<usize>),
    Dict(Vec<(usize, usize)>),
    Global(Global),
    Numpy(Numpy),
    Storage(String, Element, usize),
}

struct Left {
    objects: usize,
    text: usize,
}

struct Machine<'a> {
    bytes: &'a [u8],
    at: usize,
    objects: Vec<Object>,
    stack: Vec<usize>,
    /// Heights of the stack at which marks stand.
    marks: Vec<usize>,
    memo: Vec<Option<usize>>,
}

impl<'a> Machine<'a> {
    fn run(&mut self) -> Result<usize, Fault> {
        loop {
            let opcode = self.take(1)?[0];
            if opcode == b'.' {
                return self.pop();
            }
            self.step(opcode)?;
        }
    }

    fn step(&mut self, opcode: u8) -> Result<(), Fault> {
        match opcode {
            // PROTO and FRAME: nothing to do.
            0x80 => match self.take(1)?[0] {
                2..=5 => Ok(()),
                other => Err(damaged(format!("protocol {other}"))),
            },
            0x95 => self.take(8).map(|_| ()),
            b'(' => {
                self.marks.push(self.stack.len());
                Ok(())
            }
            b'0' => self.pop().map(|_| ()),
            b'1' => self.above_mark().map(|_| ()),
            b'N' | 0x88 | 0x89 | b'J' | b'K' | b'M' | 0x8a | b'G' | b'X' | 0x8c | 0x8d | b'B' | b'C' | 0x8e => {
                self.value(opcode)
            }
            b']' | b'}' | b')' | b't' | 0x85..=0x87 | b'a' | b'e' | b's' | b'u' => self.container(opcode),
            b'h' | b'j' => {
                let place = self.length(if opcode == b'h' { 1 } else { 4 })?;
                let object = self.memo.get(place).copied().flatten();
                self.stack.push(object.ok_or_else(|| damaged(format!("memo {place} is empty")))?);
                Ok(())
            }
            b'q' | b'r' => {
                let place = self.length(if opcode == b'q' { 1 } else { 4 })?;
                self.remember(place)
            }
            0x94 => self.remember(self.memo.len()),
            b'c' => {
                let (module, name) = (self.line()?, self.line()?);
                self.push(Object::Global(Global::of(&module, &name)?))
            }
            0x93 => {
                let (name, module) = (self.pop()?, self.pop()?);
                let (module, name) = (self.as_text(module)?, self.as_text(name)?);
                self.push(Object::Global(Global::of(&module, &name)?))
            }
            b'Q' => {
                let identity = self.pop()?;
                self.storage(identity)
            }
            b'R' => {
                let arguments = self.pop()?;
                let called = self.pop()?;
                self.call(called, arguments)
            }
            b'b' => {
                let state = self.pop()?;
                let object = *self.stack.last().ok_or_else(empty_stack)?;
                self.build(object, state)
            }
            other => Err(self.unknown(other)),
        }
    }

    /// Instructions that push a plain value.
    fn value(&mut self, opcode: u8) -> Result<(), Fault> {
        match opcode {
            b'N' => self.plain(Value::None),
            0x88 => self.plain(Value::Bool(true)),
            0x89 => self.plain(Value::Bool(false)),
            b'J' => {
                let bytes = self.array()?;
                self.plain(Value::Int(i32::from_le_bytes(bytes).into()))
            }
            b'K' | b'M' => {
                let value = self.length(if opcode == b'K' { 1 } else { 2 })?;
                self.plain(Value::Int(value as i64))
            }
            0x8a => {
                let length = self.length(1)?;
                let bytes = self.take(length)?;
                self.plain(Value::Int(long(bytes)?))
            }
            b'G' => {
                let bytes = self.array()?;
                self.plain(Value::Float(f64::from_be_bytes(bytes)))
            }
            b'X' | 0x8c | 0x8d => {
                let length = self.length(match opcode {
                    b'X' => 4,
                    0x8c => 1,
                    _ => 8,
                })?;
                let text = self.text(length)?;
                self.plain(Value::Text(text))
            }
            b'B' | b'C' | 0x8e => {
                let length = self.length(match opcode {
                    b'B' => 4,
                    b'C' => 1,
                    _ => 8,
                })?;
                let bytes = self.take(length)?.to_vec();
                self.plain(Value::Bytes(bytes))
            }
            other => Err(self.unknown(other)),
        }
    }

    /// Instructions that make containers and fill them.
    fn container(&mut self, opcode: u8) -> Result<(), Fault> {
        match opcode {
            b']' => self.push(Object::List(Vec::new())),
            b'}' => self.push(Object::Dict(Vec::new())),
            b')' => self.push(Object::Tuple(Vec::new())),
            b't' => {
                let items = self.above_mark()?;
                self.push(Object::Tuple(items))
            }
            0x85..=0x87 => {
                let mut items = Vec::new();
                for _ in 0..opcode - 0x84 {
                    items.push(self.pop()?);
                }
                items.reverse();
                self.push(Object::Tuple(items))
            }
            b'a' => {
                let item = self.pop()?;
                self.append(vec![item])
            }
            b'e' => {
                let items = self.above_mark()?;
                self.append(items)
            }
            b's' => {
                let value = self.pop()?;
                let key = self.pop()?;
                self.set(&[key, value])
            }
            b'u' => {
                let items = self.above_mark()?;
                self.set(&items)
            }
            other => Err(self.unknown(other)),
        }
    }

    fn unknown(&self, opcode: u8) -> Fault {
        let at = self.at - 1;
        damaged(format!("instruction {opcode:#04x} at byte {at}, which checkpoints do not use"))
    }

    // ---- bytes -------------------------------------------------------------------------------------------------

    fn take(&mut self, length: usize) -> Result<&'a [u8], Fault> {
        let end = self.at.checked_add(length).filter(|&end| end <= self.bytes.len());
        let end = end.ok_or_else(|| damaged(format!("the pickle ends at byte {}", self.bytes.len())))?;
        let bytes = &self.bytes[self.at..end];
        self.at = end;
        Ok(bytes)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], Fault> {
        self.take(N)?.try_into().map_err(|_| damaged("a number is cut off".into()))
    }

    /// An unsigned number of a few bytes.
    fn length(&mut self, bytes: usize) -> Result<usize, Fault> {
        let value = self.take(bytes)?.iter().rev().fold(0u64, |value, &byte| value << 8 | u64::from(byte));
        usize::try_from(value).map_err(|_| damaged(format!("a length of {value}")))
    }

    fn text(&mut self, length: usize) -> Result<String, Fault> {
        let at = self.at;
        let bytes = self.take(length)?;
        String::from_utf8(bytes.to_vec()).map_err(|_| damaged(format!("the text at byte {at} is not UTF-8")))
    }

    fn line(&mut self) -> Result<String, Fault> {
        let rest = &self.bytes[self.at..];
        let end = rest.iter().take(1000).position(|&byte| byte == b'\n');
        let end = end.ok_or_else(|| damaged(format!("the name at byte {} does not end", self.at)))?;
        let text = self.text(end)?;
        self.at += 1;
        Ok(text)
    }

    // ---- the stack ---------------------------------------------------------------------------------------------

    fn push(&mut self, object: Object) -> Result<(), Fault> {
        if self.objects.len() >= MOST_OBJECTS {
            return Err(damaged(format!("more than {MOST_OBJECTS} objects")));
        }
        self.stack.push(self.objects.len());
        self.objects.push(object);
        Ok(())
    }

    fn plain(&mut self, value: Value) -> Result<(), Fault> {
        self.push(Object::Plain(value))
    }

    fn pop(&mut self) -> Result<usize, Fault> {
        // Below a mark lies what belongs to somebody else.
        if self.marks.last().is_some_and(|&mark| mark >= self.stack.len()) {
            return Err(empty_stack());
        }
        self.stack.pop().ok_or_else(empty_stack)
    }

    fn above_mark(&mut self) -> Result<Vec<usize>, Fault> {
        let mark = self.marks.pop().ok_or_else(|| damaged("a mark is missing".into()))?;
        Ok(self.stack.split_off(mark))
    }

    fn remember(&mut self, place: usize) -> Result<(), Fault> {
        let object = *self.stack.last().ok_or_else(empty_stack)?;
        // Places are handed out one after the other.
        if place > self.objects.len().max(self.memo.len()) {
            return Err(damaged(format!("memo {place} of {} objects", self.objects.len())));
        }
        if place >= self.memo.len() {
            self.memo.resize(place + 1, None);
        }
        self.memo[place] = Some(object);
        Ok(())
    }

    fn append(&mut self, mut items: Vec<usize>) -> Result<(), Fault> {
        let target = *self.stack.last().ok_or_else(empty_stack)?;
        match &mut self.objects[target] {
            Object::List(list) => {
                list.append(&mut items);
                Ok(())
            }
            _ => Err(damaged("items are added to something that is no list".into())),
        }
    }

    fn set(&mut self, items: &[usize]) -> Result<(), Fault> {
        let target = *self.stack.last().ok_or_else(empty_stack)?;
        match &mut self.objects[target] {
            Object::Dict(dict) if items.len().is_multiple_of(2) => {
                dict.extend(items.chunks_exact(2).map(|pair| (pair[0], pair[1])));
                Ok(())
            }
            _ => Err(damaged("entries are set in something that is no dict".into())),
        }
    }

    // ---- calls -------------------------------------------------------------------------------------------------

    fn as_text(&self, object: usize) -> Result<String, Fault> {
        match &self.objects[object] {
            Object::Plain(Value::Text(text)) => Ok(text.clone()),
            _ => Err(damaged("a name is no text".into())),
        }
    }

    fn tuple(&self, object: usize) -> Result<&[usize], Fault> {
        match &self.objects[object] {
            Object::Tuple(items) => Ok(items),
            _ => Err(damaged("arguments are no tuple".into())),
        }
    }

    /// A small value: arguments are no trees.
    fn small(&self, object: usize) -> Result<Value, Fault> {
        self.tree(object, 2, &mut Left { objects: 100, text: 1000 })
    }

    /// `('storage', class, name, device, elements)`.
    fn storage(&mut self, identity: usize) -> Result<(), Fault> {
        let wrong = || damaged("a storage is not described as torch.save does".into());
        let &[kind, class, name, _, elements] = self.tuple(identity)? else { return Err(wrong()) };
        let Object::Global(Global::Storage(element)) = self.objects[class] else { return Err(wrong()) };
        let elements = self.small(elements)?.as_index().ok_or_else(wrong)?;
        if self.as_text(kind)? != "storage" {
            return Err(wrong());
        }
        let name = self.as_text(name)?;
        // torch.save counts its storages; a long name would be copied for every tensor.
        if name.len() > 100 {
            return Err(wrong());
        }
        self.push(Object::Storage(name, element, elements))
    }

    fn call(&mut self, called: usize, arguments: usize) -> Result<(), Fault> {
        let Object::Global(global) = self.objects[called] else {
            return Err(damaged("something is called that is no function".into()));
        };
        let arguments = self.tuple(arguments)?.to_vec();
        let made = match (global, arguments.as_slice()) {
            (Global::OrderedDict, []) => Object::Dict(Vec::new()),
            (Global::RebuildTensor, &[storage, offset, shape, strides, ..]) if arguments.len() <= 7 => {
                let Object::Storage(name, element, stored) = &self.objects[storage] else {
                    return Err(damaged("a tensor has no storage".into()));
                };
                let of = (name.clone(), *element, *stored);
                let tensor = tensor(of, &self.small(offset)?, &self.small(shape)?, &self.small(strides)?)?;
                Object::Plain(Value::Tensor(tensor))
            }
            (Global::RebuildParameter, &[tensor, ..]) => match &self.objects[tensor] {
                Object::Plain(Value::Tensor(tensor)) => Object::Plain(Value::Tensor(tensor.clone())),
                _ => return Err(damaged("a parameter is no tensor".into())),
            },
            (Global::Device, &[kind]) => Object::Plain(Value::Device(self.as_text(kind)?)),
            (Global::Device, &[kind, index]) => {
                let index = self.small(index)?.as_index().ok_or_else(|| damaged("a device without number".into()))?;
                Object::Plain(Value::Device(format!("{}:{index}", self.as_text(kind)?)))
            }
            (Global::Size, &[items]) => Object::Tuple(self.tuple(items)?.to_vec()),
            (Global::NumpyDtype, &[code, ..]) => Object::Numpy(Numpy::of(&self.as_text(code)?)?),
            (Global::NumpyScalar, &[kind, bytes]) => match (&self.objects[kind], &self.objects[bytes]) {
                (Object::Numpy(kind), Object::Plain(Value::Bytes(bytes))) => Object::Plain(kind.scalar(bytes)?),
                _ => return Err(damaged("a numpy scalar without type or bytes".into())),
            },
            (Global::Encode, &[text, encoding]) => {
                Object::Plain(Value::Bytes(latin1(&self.as_text(text)?, &self.as_text(encoding)?)?))
            }
            _ => return Err(damaged(format!("{global:?} is called with {} arguments", arguments.len()))),
        };
        self.push(made)
    }

    /// Gives an object its state: a state dict has the versions of its modules, a numpy type its byte order.
    fn build(&mut self, object: usize, state: usize) -> Result<(), Fault> {
        match (&self.objects[object], &self.objects[state]) {
            (Object::Dict(_), Object::Dict(attributes)) => {
                for &(name, _) in attributes {
                    let name = self.as_text(name)?;
                    if name != "_metadata" {
                        return Err(damaged(format!("a dict is given the attribute {name:?}")));
                    }
                }
                Ok(())
            }
            (Object::Numpy(_), Object::Tuple(items)) => match items.get(1).map(|&order| self.as_text(order)) {
                Some(Ok(order)) if ["<", "|", "="].contains(&order.as_str()) => Ok(()),
                _ => Err(damaged("a numpy type that is not little-endian".into())),
            },
            _ => Err(damaged("an object is given a state that checkpoints do not have".into())),
        }
    }

    /// Copies an object out with all that it holds.
    fn tree(&self, object: usize, depth: usize, left: &mut Left) -> Result<Value, Fault> {
        let too_large = || damaged("its objects hold each other too often or too deeply".into());
        let text = match &self.objects[object] {
            Object::Plain(Value::Text(text)) => text.len(),
            Object::Plain(Value::Bytes(bytes)) => bytes.len(),
            Object::Plain(Value::Tensor(tensor)) => tensor.storage.len(),
            _ => 0,
        };
        left.objects = left.objects.checked_sub(1).ok_or_else(too_large)?;
        left.text = left.text.checked_sub(text).ok_or_else(too_large)?;
        let inside = |left: &mut Left, item: usize| -> Result<Value, Fault> {
            self.tree(item, depth.checked_sub(1).ok_or_else(too_large)?, left)
        };
        Ok(match &self.objects[object] {
            Object::Plain(value) => value.clone(),
            Object::List(items) => Value::List(items.iter().map(|&item| inside(left, item)).collect::<Result<_, _>>()?),
            Object::Tuple(items) => {
                Value::Tuple(items.iter().map(|&item| inside(left, item)).collect::<Result<_, _>>()?)
            }
            Object::Dict(entries) => {
                let pair = |&(key, value): &(usize, usize)| Ok((inside(left, key)?, inside(left, value)?));
                Value::Dict(entries.iter().map(pair).collect::<Result<_, Fault>>()?)
            }
            Object::Global(Global::KeepLargestComponent) => Value::KeepLargestComponent,
            Object::Global(_) | Object::Numpy(_) | Object::Storage(..) => {
                return Err(damaged("a class, a type or a bare storage is stored as a value".into()));
            }
        })
    }
}

fn empty_stack() -> Fault {
    damaged("the stack is empty".into())
}

/// Python's integer of any length, little-endian two's complement, if it fits.
fn long(bytes: &[u8]) -> Result<i64, Fault> {
    if bytes.len() > 8 {
        return Err(damaged(format!("an integer of {} bytes", bytes.len())));
    }
    let negative = bytes.last().is_some_and(|byte| byte & 0x80 != 0);
    let mut full = [if negative { 0xff } else { 0 }; 8];
    full[..bytes.len()].copy_from_slice(bytes);
    Ok(i64::from_le_bytes(full))
}
