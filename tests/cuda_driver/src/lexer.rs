//! PTX text to words, numbers and signs.

use crate::parse::PtxError;
use std::fmt;

/// What a text is made of.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Token {
    Word(String),
    Integer(u64),
    F32(u32),
    F64(u64),
    Text(String),
    Sign(char),
    End,
}

impl fmt::Display for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Word(word) => write!(f, "`{word}`"),
            Self::Integer(value) => write!(f, "`{value}`"),
            Self::F32(bits) => write!(f, "`0f{bits:08X}`"),
            Self::F64(bits) => write!(f, "`0d{bits:016X}`"),
            Self::Text(text) => write!(f, "\"{text}\""),
            Self::Sign(sign) => write!(f, "`{sign}`"),
            Self::End => write!(f, "the end of the text"),
        }
    }
}

/// Each with its line.
pub(crate) fn tokens(text: &str) -> Result<Vec<(Token, u32)>, PtxError> {
    let bytes = text.as_bytes();
    let (mut at, mut line) = (0, 1);
    let mut tokens = Vec::new();
    let is_name = |byte: u8| byte.is_ascii_alphanumeric() || b"_$%.".contains(&byte);
    while at < bytes.len() {
        let byte = bytes[at];
        let start = at;
        match byte {
            b'\n' => (line, at) = (line + 1, at + 1),
            _ if byte.is_ascii_whitespace() => at += 1,
            b'/' if bytes.get(at + 1) == Some(&b'/') => {
                while at < bytes.len() && bytes[at] != b'\n' {
                    at += 1;
                }
            }
            b'/' if bytes.get(at + 1) == Some(&b'*') => {
                while at < bytes.len() && !bytes[at..].starts_with(b"*/") {
                    line += u32::from(bytes[at] == b'\n');
                    at += 1;
                }
                at += 2;
            }
            b'"' => {
                at += 1;
                while at < bytes.len() && bytes[at] != b'"' {
                    at += 1;
                }
                tokens.push((Token::Text(text[start + 1..at].to_string()), line));
                at += 1;
            }
            _ if byte.is_ascii_digit() => {
                while at < bytes.len() && (bytes[at].is_ascii_alphanumeric() || bytes[at] == b'.') {
                    at += 1;
                }
                tokens.push((number(&text[start..at], line)?, line));
            }
            _ if is_name(byte) => {
                loop {
                    while at < bytes.len() && is_name(bytes[at]) {
                        at += 1;
                    }
                    // `.L2::128B` is one word, `label:` is not.
                    let joined = bytes[at..].starts_with(b"::") && bytes.get(at + 2).is_some_and(|b| is_name(*b));
                    if !joined {
                        break;
                    }
                    at += 2;
                }
                tokens.push((Token::Word(text[start..at].to_string()), line));
            }
            _ => {
                let Some(sign) = text[at..].chars().next() else { break };
                at += sign.len_utf8();
                tokens.push((Token::Sign(sign), line));
            }
        }
    }
    tokens.push((Token::End, line));
    Ok(tokens)
}

fn number(text: &str, line: u32) -> Result<Token, PtxError> {
    let wrong = || PtxError::new(line, format!("`{text}` is no number"));
    let lower = text.to_ascii_lowercase();
    if let Some(digits) = lower.strip_prefix("0f").filter(|digits| digits.len() == 8) {
        return u32::from_str_radix(digits, 16).map(Token::F32).map_err(|_| wrong());
    }
    if let Some(digits) = lower.strip_prefix("0d").filter(|digits| digits.len() == 16) {
        return u64::from_str_radix(digits, 16).map(Token::F64).map_err(|_| wrong());
    }
    if lower.contains('.') {
        return lower.parse::<f64>().map(|value| Token::F64(value.to_bits())).map_err(|_| wrong());
    }
    let (digits, radix) = match lower.as_bytes() {
        [b'0', b'x', ..] => (&lower[2..], 16),
        [b'0', b'b', ..] => (&lower[2..], 2),
        _ => (&lower[..], 10),
    };
    u64::from_str_radix(digits.trim_end_matches('u'), radix).map(Token::Integer).map_err(|_| wrong())
}
