//! JSON as Python writes and reads it: bare NaN, and Python's way to print floats. `serde_json` does neither.

use std::fmt::Write as _;

/// A value to write.
#[derive(Debug, Clone, PartialEq)]
pub enum Json {
    /// Entries in their order.
    Object(Vec<(String, Json)>),
    /// Values in their order.
    List(Vec<Json>),
    /// A string.
    Text(String),
    /// A count.
    Integer(u64),
    /// A number, which may be none.
    Float(f64),
    /// A truth value.
    Bool(bool),
}

impl Json {
    /// An object of these entries.
    pub fn object<'a>(entries: impl IntoIterator<Item = (&'a str, Json)>) -> Self {
        Json::Object(entries.into_iter().map(|(key, value)| (key.to_owned(), value)).collect())
    }

    /// A list of strings.
    pub fn texts<'a>(texts: impl IntoIterator<Item = &'a str>) -> Self {
        Json::List(texts.into_iter().map(|text| Json::Text(text.into())).collect())
    }

    /// Indented by four spaces, without a line break at the end, as nnU-Net's files are.
    pub fn to_text(&self) -> String {
        let mut text = String::new();
        self.write(&mut text, 0);
        text
    }

    fn write(&self, out: &mut String, depth: usize) {
        let line = |out: &mut String, depth: usize| {
            out.push('\n');
            out.extend(std::iter::repeat_n("    ", depth));
        };
        match self {
            Json::Object(entries) if entries.is_empty() => out.push_str("{}"),
            Json::Object(entries) => {
                out.push('{');
                for (index, (key, value)) in entries.iter().enumerate() {
                    out.push_str(if index == 0 { "" } else { "," });
                    line(out, depth + 1);
                    write_text(out, key);
                    out.push_str(": ");
                    value.write(out, depth + 1);
                }
                line(out, depth);
                out.push('}');
            }
            Json::List(values) if values.is_empty() => out.push_str("[]"),
            Json::List(values) => {
                out.push('[');
                for (index, value) in values.iter().enumerate() {
                    out.push_str(if index == 0 { "" } else { "," });
                    line(out, depth + 1);
                    value.write(out, depth + 1);
                }
                line(out, depth);
                out.push(']');
            }
            Json::Text(text) => write_text(out, text),
            // Writing to a String cannot fail.
            Json::Integer(value) => _ = write!(out, "{value}"),
            Json::Float(value) => write_float(out, *value),
            Json::Bool(value) => _ = write!(out, "{value}"),
        }
    }
}

/// As Python does by default: what is not ASCII is written in UTF-16 escapes.
fn write_text(out: &mut String, text: &str) {
    for letter in serde_json::Value::from(text).to_string().chars() {
        match letter.is_ascii() {
            true => out.push(letter),
            false => letter.encode_utf16(&mut [0; 2]).iter().for_each(|unit| _ = write!(out, "\\u{unit:04x}")),
        }
    }
}

/// As Python's `repr`: shortest digits that read back equal, exponents of at least two digits.
fn write_float(out: &mut String, value: f64) {
    if value.is_nan() {
        out.push_str("NaN");
        return;
    }
    let text = format!("{value:?}");
    match text.split_once("e-") {
        Some((digits, exponent)) if exponent.len() == 1 => {
            out.push_str(digits.trim_end_matches(".0"));
            out.push_str("e-0");
            out.push_str(exponent);
        }
        _ => out.push_str(&text),
    }
}

/// Reads JSON in which numbers may be NaN or infinite: those become null.
pub fn parse(text: &str) -> serde_json::Result<serde_json::Value> {
    let (mut strict, mut rest) = (String::with_capacity(text.len()), text);
    // Outside of strings these words stand for nothing else.
    while let Some(place) = rest.find(['"', 'N', 'I', '-']) {
        strict.push_str(&rest[..place]);
        rest = &rest[place..];
        if rest.starts_with('"') {
            let end = string_end(rest);
            strict.push_str(&rest[..end]);
            rest = &rest[end..];
        } else if let Some(after) = ["NaN", "Infinity", "-Infinity"].iter().find_map(|word| rest.strip_prefix(word)) {
            strict.push_str("null");
            rest = after;
        } else {
            strict.push_str(&rest[..1]);
            rest = &rest[1..];
        }
    }
    strict.push_str(rest);
    serde_json::from_str(&strict)
}

/// Where a string that begins with a quotation mark ends.
fn string_end(text: &str) -> usize {
    let mut escaped = false;
    for (place, letter) in text.char_indices().skip(1) {
        match letter {
            _ if escaped => escaped = false,
            '\\' => escaped = true,
            '"' => return place + 1,
            _ => {}
        }
    }
    text.len()
}
