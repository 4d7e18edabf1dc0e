//! PTX text to statements. Nothing is understood here yet beyond the grammar: what an instruction means, and whether its
//! operands fit, is `decode`'s business.

use crate::lexer::{Token, tokens};

/// Where a text stopped being PTX that is known here.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("line {line}: {reason}")]
pub struct PtxError {
    /// Line of the PTX, from 1.
    pub line: u32,
    /// What is wrong, and with what.
    pub reason: String,
}

impl PtxError {
    pub(crate) fn new(line: u32, reason: impl Into<String>) -> Self {
        Self { line, reason: reason.into() }
    }
}

/// The newest PTX whose meaning is implemented.
pub const NEWEST_VERSION: (u32, u32) = (9, 5);

/// One PTX text.
#[derive(Clone, Debug, Default)]
pub struct Module {
    /// `.version`
    pub version: (u32, u32),
    /// `.target`, `sm_80` for example.
    pub target: String,
    /// Variables outside of all functions.
    pub variables: Vec<Variable>,
    /// Kernels and functions.
    pub functions: Vec<Function>,
}

/// `.entry` or `.func`
#[derive(Clone, Debug)]
pub struct Function {
    /// As in the text.
    pub name: String,
    /// A kernel.
    pub is_entry: bool,
    /// What a `.func` returns.
    pub results: Vec<Variable>,
    /// In order.
    pub parameters: Vec<Variable>,
    /// `.reqntid`: units of a cube.
    pub required: Option<[u32; 3]>,
    /// Empty for a declaration of something that is elsewhere.
    pub body: Option<Vec<Statement>>,
    /// Of its name.
    pub line: u32,
}

/// A variable in memory, or a parameter.
#[derive(Clone, Debug)]
pub struct Variable {
    /// As in the text.
    pub name: String,
    /// `.global`, `.shared`, `.local`, `.const` or `.param`, without the point.
    pub space: String,
    /// Of its first byte.
    pub align: usize,
    /// All elements together; 0 for `name[]`.
    pub bytes: usize,
    /// What is in it before a kernel runs; zeros if empty.
    pub initial: Vec<u8>,
    /// Of its name.
    pub line: u32,
}

/// A line of a function.
#[derive(Clone, Debug)]
pub enum Statement {
    /// `name:`
    Label(String, u32),
    /// `.reg .b32 %r<10>;` or `.reg .b32 a, b;`: type, name, count (none: a single register of just that name).
    Register(String, String, Option<u32>),
    /// `.shared`, `.local`, `.param` inside a function.
    Variable(Variable),
    /// `name: .branchtargets a, b;`
    BranchTargets(String, Vec<String>),
    /// Anything that executes.
    Instruction(Instruction),
    /// `{`
    Open,
    /// `}`
    Close,
}

/// What executes.
#[derive(Clone, Debug)]
pub struct Instruction {
    /// In the PTX, from 1.
    pub line: u32,
    /// `@%p` or `@!%p`: the predicate, and whether it is inverted.
    pub guard: Option<(String, bool)>,
    /// With all its suffixes.
    pub opcode: String,
    /// In order.
    pub operands: Vec<Operand>,
}

/// What an instruction works on.
#[derive(Clone, Debug, PartialEq)]
pub enum Operand {
    /// A register, a variable, a label or a function.
    Name(String),
    /// `!name`
    Not(String),
    /// An integer, negative ones as their two's complement.
    Integer(u64),
    /// `0f3F800000`
    F32(u32),
    /// `0d3FF0000000000000`
    F64(u64),
    /// `[name+4]`; the name is empty for `[4]`.
    Address(String, i64),
    /// `{a, b}`
    Vector(Vec<Operand>),
    /// `(a, b)`, in calls.
    List(Vec<Operand>),
    /// `a|b`
    Pair(Box<Operand>, Box<Operand>),
}

/// Reads a whole module.
///
/// # Errors
///
/// At the first line that is no PTX, or PTX of a version after [`NEWEST_VERSION`].
pub fn parse(text: &str) -> Result<Module, PtxError> {
    let mut parser = Parser { tokens: tokens(text)?, at: 0 };
    parser.module()
}

struct Parser {
    tokens: Vec<(Token, u32)>,
    at: usize,
}

impl Parser {
    fn peek(&self) -> &Token {
        &self.tokens[self.at].0
    }

    fn line(&self) -> u32 {
        self.tokens[self.at].1
    }

    fn next(&mut self) -> Token {
        let token = self.tokens[self.at].0.clone();
        if self.at + 1 < self.tokens.len() {
            self.at += 1;
        }
        token
    }

    fn unexpected<T>(&self, wanted: &str) -> Result<T, PtxError> {
        Err(PtxError::new(self.line(), format!("{wanted} was expected, but here is {}", self.peek())))
    }

    fn takes(&mut self, sign: char) -> bool {
        let found = *self.peek() == Token::Sign(sign);
        if found {
            self.next();
        }
        found
    }

    fn expect(&mut self, sign: char) -> Result<(), PtxError> {
        if self.takes(sign) { Ok(()) } else { self.unexpected(&format!("`{sign}`")) }
    }

    fn word(&mut self) -> Result<String, PtxError> {
        match self.peek() {
            Token::Word(_) => match self.next() {
                Token::Word(word) => Ok(word),
                _ => unreachable!("looked at above"),
            },
            _ => self.unexpected("a name"),
        }
    }

    fn integer(&mut self) -> Result<u64, PtxError> {
        let negative = self.takes('-');
        match *self.peek() {
            Token::Integer(value) => {
                self.next();
                Ok(if negative { value.wrapping_neg() } else { value })
            }
            _ => self.unexpected("an integer"),
        }
    }

    fn skip_to(&mut self, sign: char) {
        while *self.peek() != Token::Sign(sign) && *self.peek() != Token::End {
            self.next();
        }
        self.next();
    }

    fn module(&mut self) -> Result<Module, PtxError> {
        let mut module = Module::default();
        let mut is_extern = false;
        loop {
            let line = self.line();
            if *self.peek() == Token::End {
                return Ok(module);
            }
            let directive = self.word()?;
            match directive.as_str() {
                ".version" => {
                    module.version = match self.next() {
                        Token::F64(bits) => {
                            let text = f64::from_bits(bits).to_string();
                            let (major, minor) = text.split_once('.').unwrap_or((&text, "0"));
                            (major.parse().unwrap_or(0), minor.parse().unwrap_or(0))
                        }
                        _ => return Err(PtxError::new(line, "`.version` needs a number")),
                    };
                    if module.version > NEWEST_VERSION {
                        let (is, most) = (module.version, NEWEST_VERSION);
                        return Err(PtxError::new(
                            line,
                            format!("PTX {}.{} is newer than {}.{}, which is implemented", is.0, is.1, most.0, most.1),
                        ));
                    }
                }
                ".target" => {
                    module.target = self.word()?;
                    while self.takes(',') {
                        self.word()?;
                    }
                }
                ".address_size" => {
                    if self.integer()? != 64 {
                        return Err(PtxError::new(line, "only addresses of 64 bits are implemented"));
                    }
                }
                ".visible" | ".weak" | ".common" => {}
                ".extern" => is_extern = true,
                ".file" => {
                    while matches!(self.peek(), Token::Integer(_) | Token::Text(_) | Token::Sign(',')) {
                        self.next();
                    }
                }
                ".section" => self.skip_to('}'),
                ".global" | ".const" | ".shared" => {
                    let variables = self.variables(&directive[1..])?;
                    module.variables.extend(variables);
                    is_extern = false;
                }
                ".entry" | ".func" => {
                    let function = self.function(directive == ".entry")?;
                    module.functions.push(function);
                    is_extern = false;
                }
                _ => return Err(PtxError::new(line, format!("`{directive}` is not known outside of a function"))),
            }
            let _ = is_extern;
        }
    }

    fn function(&mut self, is_entry: bool) -> Result<Function, PtxError> {
        let mut results = Vec::new();
        if !is_entry && self.takes('(') {
            results = self.parameters()?;
        }
        let line = self.line();
        let name = self.word()?;
        let parameters = if self.takes('(') { self.parameters()? } else { Vec::new() };
        let mut function = Function { name, is_entry, results, parameters, required: None, body: None, line };
        loop {
            match self.peek().clone() {
                Token::Sign(';') => {
                    self.next();
                    return Ok(function);
                }
                Token::Sign('{') => {
                    self.next();
                    function.body = Some(self.body()?);
                    return Ok(function);
                }
                Token::Word(word) if word == ".reqntid" => {
                    self.next();
                    let mut sizes = [1; 3];
                    for (i, size) in sizes.iter_mut().enumerate() {
                        if i > 0 && !self.takes(',') {
                            break;
                        }
                        *size = self.integer()? as u32;
                    }
                    function.required = Some(sizes);
                }
                Token::Word(word)
                    if [".maxntid", ".minnctapersm", ".maxnctapersm", ".maxnreg", ".noreturn", ".pragma"]
                        .contains(&&word[..]) =>
                {
                    self.next();
                    while matches!(self.peek(), Token::Integer(_) | Token::Text(_) | Token::Sign(',')) {
                        self.next();
                    }
                    if word == ".pragma" {
                        self.takes(';');
                    }
                }
                _ => return self.unexpected("the body of the function"),
            }
        }
    }

    fn parameters(&mut self) -> Result<Vec<Variable>, PtxError> {
        let mut parameters = Vec::new();
        while !self.takes(')') {
            let space = self.word()?;
            if space != ".param" && space != ".reg" {
                return Err(PtxError::new(self.line(), format!("`{space}` is no kind of parameter")));
            }
            parameters.push(self.variable(&space[1..])?);
            self.takes(',');
        }
        Ok(parameters)
    }

    fn variables(&mut self, space: &str) -> Result<Vec<Variable>, PtxError> {
        let first = self.variable(space)?;
        self.expect(';')?;
        Ok(vec![first])
    }

    /// From after the state space to before the `;`, `,` or `)`.
    fn variable(&mut self, space: &str) -> Result<Variable, PtxError> {
        let (mut align, mut width, mut vector) = (0, 0, 1);
        let (line, name) = loop {
            let line = self.line();
            let word = self.word()?;
            match word.as_str() {
                ".align" => align = self.integer()? as usize,
                // A pointer's target, which nothing here depends on.
                ".ptr" | ".global" | ".shared" | ".const" | ".local" if width > 0 => {}
                ".v2" => vector = 2,
                ".v4" => vector = 4,
                _ if word.starts_with('.') => width = bytes_of(&word[1..], line)?,
                _ => break (line, word),
            }
        };
        // `.align` after `.ptr` is that of the target.
        let align = if space == "param" && align > 16 { width } else { align.max(width * vector).max(1) };
        let mut count = 1;
        while self.takes('[') {
            count *= if self.takes(']') {
                0
            } else {
                let count = self.integer()? as usize;
                self.expect(']')?;
                count
            };
        }
        let mut initial = Vec::new();
        if self.takes('=') {
            self.initial_value(width, &mut initial)?;
            initial.resize(count * width * vector, 0);
        }
        Ok(Variable { name, space: space.to_string(), align, bytes: count * width * vector, initial, line })
    }

    fn initial_value(&mut self, width: usize, bytes: &mut Vec<u8>) -> Result<(), PtxError> {
        if self.takes('{') {
            while !self.takes('}') {
                self.initial_value(width, bytes)?;
                self.takes(',');
            }
            return Ok(());
        }
        let value = match *self.peek() {
            Token::F32(bits) => u64::from(bits),
            Token::F64(bits) => bits,
            Token::Word(_) => return self.unexpected("a number (addresses as initial values are not implemented)"),
            _ => {
                bytes.extend_from_slice(&self.integer()?.to_le_bytes()[..width]);
                return Ok(());
            }
        };
        self.next();
        bytes.extend_from_slice(&value.to_le_bytes()[..width]);
        Ok(())
    }

    fn body(&mut self) -> Result<Vec<Statement>, PtxError> {
        let mut statements = Vec::new();
        let mut depth = 0;
        loop {
            match self.peek().clone() {
                Token::End => return self.unexpected("`}`"),
                Token::Sign('{') => {
                    self.next();
                    depth += 1;
                    statements.push(Statement::Open);
                }
                Token::Sign('}') => {
                    self.next();
                    if depth == 0 {
                        return Ok(statements);
                    }
                    depth -= 1;
                    statements.push(Statement::Close);
                }
                Token::Word(word) if word == ".loc" => {
                    self.next();
                    while matches!(self.peek(), Token::Integer(_) | Token::Sign(',' | '+' | '-')) || self.is_inlining()
                    {
                        self.next();
                    }
                }
                Token::Word(word) if word == ".pragma" => self.skip_to(';'),
                Token::Word(word) if word == ".reg" => {
                    self.next();
                    let ty = self.word()?;
                    loop {
                        let name = self.word()?;
                        let count = match self.takes('<') {
                            true => {
                                let count = self.integer()? as u32;
                                self.expect('>')?;
                                Some(count)
                            }
                            false => None,
                        };
                        statements.push(Statement::Register(ty[1..].to_string(), name, count));
                        if !self.takes(',') {
                            break;
                        }
                    }
                    self.expect(';')?;
                }
                Token::Word(word) if [".shared", ".local", ".param", ".const", ".global"].contains(&&word[..]) => {
                    self.next();
                    let variables = self.variables(&word[1..])?;
                    statements.extend(variables.into_iter().map(Statement::Variable));
                }
                Token::Word(word) if self.tokens[self.at + 1].0 == Token::Sign(':') => {
                    let line = self.line();
                    self.next();
                    self.next();
                    match self.peek().clone() {
                        Token::Word(next) if next == ".branchtargets" => {
                            self.next();
                            let mut targets = vec![self.word()?];
                            while self.takes(',') {
                                targets.push(self.word()?);
                            }
                            self.expect(';')?;
                            statements.push(Statement::BranchTargets(word, targets));
                        }
                        Token::Word(next) if next == ".callprototype" => self.skip_to(';'),
                        _ => statements.push(Statement::Label(word, line)),
                    }
                }
                _ => statements.push(Statement::Instruction(self.instruction()?)),
            }
        }
    }

    /// `.loc 1 2 3, function_name $info, inlined_at 1 2 3`
    fn is_inlining(&self) -> bool {
        let Token::Word(word) = self.peek() else { return false };
        word == "function_name"
            || word == "inlined_at"
            || word.starts_with("$L__info")
            || word.starts_with("info_string")
    }

    fn instruction(&mut self) -> Result<Instruction, PtxError> {
        let line = self.line();
        let guard = match self.takes('@') {
            true => {
                let inverted = self.takes('!');
                Some((self.word()?, inverted))
            }
            false => None,
        };
        let opcode = self.word()?;
        let mut operands = Vec::new();
        while !self.takes(';') {
            operands.push(self.operand()?);
            if !self.takes(',') && *self.peek() != Token::Sign(';') {
                return self.unexpected(&format!("`,` or `;` after an operand of `{opcode}`"));
            }
        }
        Ok(Instruction { line, guard, opcode, operands })
    }

    fn operands_until(&mut self, end: char) -> Result<Vec<Operand>, PtxError> {
        let mut operands = Vec::new();
        while !self.takes(end) {
            operands.push(self.operand()?);
            self.takes(',');
        }
        Ok(operands)
    }

    fn operand(&mut self) -> Result<Operand, PtxError> {
        if self.takes('{') {
            return Ok(Operand::Vector(self.operands_until('}')?));
        }
        if self.takes('(') {
            return Ok(Operand::List(self.operands_until(')')?));
        }
        if self.takes('!') {
            return Ok(Operand::Not(self.word()?));
        }
        if self.takes('[') {
            return self.address();
        }
        let simple = match self.peek().clone() {
            Token::F32(bits) => Operand::F32(bits),
            Token::F64(bits) => Operand::F64(bits),
            Token::Word(name) => {
                self.next();
                // `name+4`: an address as a value.
                if *self.peek() == Token::Sign('+') {
                    self.next();
                    let offset = self.integer()? as i64;
                    return Ok(Operand::Address(name, offset));
                }
                if self.takes('|') {
                    let second = self.operand()?;
                    return Ok(Operand::Pair(Box::new(Operand::Name(name)), Box::new(second)));
                }
                return Ok(Operand::Name(name));
            }
            _ => return Ok(Operand::Integer(self.integer()?)),
        };
        self.next();
        Ok(simple)
    }

    fn address(&mut self) -> Result<Operand, PtxError> {
        let base = match self.peek() {
            Token::Word(_) => self.word()?,
            _ => String::new(),
        };
        let mut offset = 0;
        if base.is_empty() {
            offset = self.integer()? as i64;
        } else if self.takes('+') || *self.peek() == Token::Sign('-') {
            offset = self.integer()? as i64;
        }
        self.expect(']')?;
        Ok(Operand::Address(base, offset))
    }
}

/// Bytes of one value of a type, `f32` for example.
pub(crate) fn bytes_of(ty: &str, line: u32) -> Result<usize, PtxError> {
    Ok(match ty {
        "pred" | "b8" | "u8" | "s8" => 1,
        "b16" | "u16" | "s16" | "f16" | "bf16" => 2,
        "b32" | "u32" | "s32" | "f32" | "f16x2" | "bf16x2" => 4,
        "b64" | "u64" | "s64" | "f64" => 8,
        "b128" => 16,
        _ => return Err(PtxError::new(line, format!("`.{ty}` is no type that is known"))),
    })
}
