//! Statements to a program: names become registers and addresses, calls are expanded, labels become targets.

use crate::counters::Kind;
use crate::flow;
use crate::opcode;
use crate::parse::{self, Function, Module, Operand, PtxError, Statement, Variable};
use crate::program::{File, Instruction, Op, Program, Slot, Space, Special, Type};
use std::collections::HashMap;

/// Expansions of functions within one another: beyond this it is recursion.
const DEEPEST_CALL: usize = 32;

/// A kernel of a module.
///
/// `addresses`: where the module's `.global` and `.const` variables are.
///
/// # Errors
///
/// The first instruction that is unknown, or that does not fit its operands.
pub fn decode(module: &Module, kernel: &Function, addresses: &HashMap<String, u64>) -> Result<Program, PtxError> {
    let mut decoder = Decoder::new(module, addresses);
    decoder.program.name.clone_from(&kernel.name);
    decoder.program.required = kernel.required;
    decoder.kernel(kernel)?;
    let mut program = decoder.program;
    flow::reconverge(&mut program);
    flow::allocate_registers(&mut program);
    Ok(program)
}

/// What a name in a function stands for.
#[derive(Clone)]
struct Scope {
    registers: HashMap<String, Slot>,
    /// `.reg .b32 %r<10>`: prefix to type and count.
    families: HashMap<String, (Type, u32)>,
    variables: HashMap<String, (Space, u64)>,
    tables: HashMap<String, usize>,
}

impl Scope {
    fn new() -> Self {
        Self { registers: HashMap::new(), families: HashMap::new(), variables: HashMap::new(), tables: HashMap::new() }
    }
}

/// The state of decoding.
pub struct Decoder<'a> {
    module: &'a Module,
    /// What has been decoded so far.
    pub program: Program,
    scopes: Vec<Scope>,
    /// Of the module.
    globals: HashMap<String, (Space, u64)>,
    constants: HashMap<(File, u64), Slot>,
    specials: HashMap<Special, Slot>,
    counts: [usize; 3],
    /// Labels of the function at hand (each expansion has its own), and what waits for them.
    labels: HashMap<(usize, String), u32>,
    waiting: Vec<(usize, usize, String)>,
    waiting_tables: Vec<(usize, usize, Vec<String>, u32)>,
    expansions: usize,
    /// The expansions that the current position is inside of; the kernel itself is 0.
    instances: Vec<usize>,
    guard: (Slot, bool),
    line: u32,
    carry: Option<Slot>,
}

impl<'a> Decoder<'a> {
    fn new(module: &'a Module, addresses: &HashMap<String, u64>) -> Self {
        let globals = addresses.iter().map(|(name, address)| (name.clone(), (Space::Global, *address))).collect();
        Self {
            module,
            program: Program { shared_granule: 4, global_granule: 4, ..Program::default() },
            scopes: Vec::new(),
            globals,
            constants: HashMap::new(),
            specials: HashMap::new(),
            counts: [0; 3],
            labels: HashMap::new(),
            waiting: Vec::new(),
            waiting_tables: Vec::new(),
            expansions: 0,
            instances: vec![0],
            guard: (Slot::SINK, false),
            line: 0,
            carry: None,
        }
    }

    /// An error at the instruction at hand.
    pub fn error<T>(&self, reason: impl Into<String>) -> Result<T, PtxError> {
        Err(PtxError::new(self.line, reason))
    }

    fn kernel(&mut self, kernel: &Function) -> Result<(), PtxError> {
        let Some(body) = &kernel.body else {
            return Err(PtxError::new(kernel.line, format!("`{}` has no body", kernel.name)));
        };
        let mut scope = Scope::new();
        for parameter in &kernel.parameters {
            let offset = self.program.parameter_bytes.next_multiple_of(parameter.align);
            scope.variables.insert(parameter.name.clone(), (Space::Param, offset as u64));
            self.program.parameters.push((offset, parameter.bytes));
            self.program.parameter_bytes = offset + parameter.bytes;
        }
        self.shared_variables(body);
        self.scopes.push(scope);
        self.body(body)?;
        self.emit(Op::Return, &[], &[], Kind::Branch);
        for (index, instance, label) in std::mem::take(&mut self.waiting) {
            let line = self.program.instructions[index].line;
            let target = self.target(instance, &label, line)?;
            if let Op::Branch { target: unknown, .. } = &mut self.program.instructions[index].op {
                *unknown = target;
            }
        }
        for (table, instance, labels, line) in std::mem::take(&mut self.waiting_tables) {
            self.program.tables[table] =
                labels.iter().map(|label| self.target(instance, label, line)).collect::<Result<_, _>>()?;
        }
        let [words, wides, predicates] = self.counts;
        (self.program.words, self.program.wides, self.program.predicates) = (words, wides, predicates);
        self.program.variables = self.globals.iter().map(|(name, (_, at))| (name.clone(), *at)).collect();
        Ok(())
    }

    fn target(&self, instance: usize, label: &str, line: u32) -> Result<u32, PtxError> {
        let known = self.labels.get(&(instance, label.to_string())).copied();
        known.ok_or_else(|| PtxError::new(line, format!("there is no label `{label}`")))
    }

    /// Sized ones first; all dynamic ones share the rest.
    fn shared_variables(&mut self, body: &[Statement]) {
        let module = self.module;
        let inside = body.iter().filter_map(|statement| match statement {
            Statement::Variable(variable) => Some(variable),
            _ => None,
        });
        let all: Vec<&Variable> = module.variables.iter().chain(inside).filter(|v| v.space == "shared").collect();
        let mut end: usize = 0;
        for variable in all.iter().filter(|v| v.bytes > 0) {
            let offset = end.next_multiple_of(variable.align);
            self.globals.insert(variable.name.clone(), (Space::Shared, offset as u64));
            end = offset + variable.bytes;
        }
        self.program.static_shared = end;
        let align = all.iter().filter(|v| v.bytes == 0).map(|v| v.align).max().unwrap_or(1);
        self.program.dynamic_shared_offset = end.next_multiple_of(align.max(16));
        for variable in all.iter().filter(|v| v.bytes == 0) {
            self.globals.insert(variable.name.clone(), (Space::Shared, self.program.dynamic_shared_offset as u64));
        }
    }

    fn scope(&mut self) -> &mut Scope {
        if self.scopes.is_empty() {
            self.scopes.push(Scope::new());
        }
        let last = self.scopes.len() - 1;
        &mut self.scopes[last]
    }

    fn body(&mut self, body: &[Statement]) -> Result<(), PtxError> {
        // Tables may come after the branch that uses them.
        for statement in body {
            if let Statement::BranchTargets(name, targets) = statement {
                let table = self.program.tables.len();
                self.program.tables.push(Vec::new());
                self.scope().tables.insert(name.clone(), table);
                let instance = self.instance();
                self.waiting_tables.push((table, instance, targets.clone(), self.line));
            }
        }
        for statement in body {
            match statement {
                Statement::Open => self.scopes.push(Scope::new()),
                Statement::Close => {
                    self.scopes.pop();
                }
                Statement::Label(name, line) => {
                    let at = self.program.instructions.len() as u32;
                    let instance = self.instance();
                    if self.labels.insert((instance, name.clone()), at).is_some() {
                        return Err(PtxError::new(*line, format!("there are two labels `{name}`")));
                    }
                }
                Statement::Register(ty, name, count) => {
                    let Some(known) = Type::named(ty) else {
                        return self.error(format!("`.{ty}` is no type of a register"));
                    };
                    match count {
                        Some(count) => {
                            self.scope().families.insert(name.clone(), (known, *count));
                        }
                        None => {
                            let slot = self.fresh(known.file());
                            self.scope().registers.insert(name.clone(), slot);
                        }
                    }
                }
                Statement::Variable(variable) => self.variable(variable)?,
                Statement::BranchTargets(..) => {}
                Statement::Instruction(instruction) => self.instruction(instruction)?,
            }
        }
        Ok(())
    }

    fn instance(&self) -> usize {
        self.instances.last().copied().unwrap_or(0)
    }

    fn variable(&mut self, variable: &Variable) -> Result<(), PtxError> {
        match variable.space.as_str() {
            "shared" => {}
            "local" | "param" => {
                let offset = self.program.local_bytes.next_multiple_of(variable.align);
                self.program.local_bytes = offset + variable.bytes;
                self.scope().variables.insert(variable.name.clone(), (Space::Local, offset as u64));
            }
            other => {
                let reason = format!("`.{other}` variables inside functions are not implemented");
                return Err(PtxError::new(variable.line, reason));
            }
        }
        Ok(())
    }

    fn instruction(&mut self, instruction: &parse::Instruction) -> Result<(), PtxError> {
        self.line = instruction.line;
        self.guard = match &instruction.guard {
            Some((name, inverted)) => (self.register(name)?, *inverted),
            None => (Slot::SINK, false),
        };
        let base = instruction.opcode.split('.').next().unwrap_or_default();
        match (base, &instruction.operands[..]) {
            ("call", operands) => self.call(operands)?,
            ("bra", [Operand::Name(label)]) => self.branch(label.clone()),
            ("brx", [index, Operand::Name(table)]) => {
                let index = self.read(index, Type::U32)?;
                let Some(table) = self.scopes.iter().rev().find_map(|scope| scope.tables.get(table)).copied() else {
                    return self.error(format!("there is no table of targets `{table}`"));
                };
                let op = Op::BranchIndexed { table: table as u32, reconverge: u32::MAX };
                self.emit(op, &[], &[index], Kind::Branch);
            }
            ("ret", []) if self.instances.len() > 1 => self.branch(String::new()),
            _ => opcode::decode(self, &instruction.opcode, &instruction.operands)?,
        }
        self.guard = (Slot::SINK, false);
        Ok(())
    }

    fn branch(&mut self, label: String) {
        let at = self.program.instructions.len();
        self.waiting.push((at, self.instance(), label));
        self.emit(Op::Branch { target: 0, reconverge: u32::MAX }, &[], &[], Kind::Branch);
    }

    /// Writes the function's instructions here; its parameters are the caller's variables.
    fn call(&mut self, operands: &[Operand]) -> Result<(), PtxError> {
        let names = |list: &[Operand]| -> Vec<String> {
            let name = |operand: &Operand| if let Operand::Name(name) = operand { name.clone() } else { String::new() };
            list.iter().map(name).collect()
        };
        let (results, name, arguments) = match operands {
            [Operand::List(results), Operand::Name(name), Operand::List(arguments), ..] => {
                (names(results), name, names(arguments))
            }
            [Operand::Name(name), Operand::List(arguments), ..] => (Vec::new(), name, names(arguments)),
            [Operand::List(results), Operand::Name(name)] => (names(results), name, Vec::new()),
            [Operand::Name(name)] => (Vec::new(), name, Vec::new()),
            _ => return self.error("this form of `call` is not implemented"),
        };
        let module = self.module;
        let Some(function) = module.functions.iter().find(|f| f.name == *name && f.body.is_some()) else {
            return self.error(format!("the function `{name}` is not in this module"));
        };
        if self.instances.len() > DEEPEST_CALL {
            return self.error(format!("`{name}` calls itself, which is not implemented"));
        }
        if self.guard.0 != Slot::SINK {
            return self.error("a `call` under a predicate is not implemented");
        }
        if results.len() != function.results.len() || arguments.len() != function.parameters.len() {
            return self.error(format!("`{name}` takes another number of arguments"));
        }
        let mut scope = Scope::new();
        let theirs = function.results.iter().chain(&function.parameters);
        for (variable, name) in theirs.zip(results.iter().chain(&arguments)) {
            let Some(at) = self.scopes.iter().rev().find_map(|scope| scope.variables.get(name)).copied() else {
                return self.error(format!("`{name}` is no `.param` variable"));
            };
            scope.variables.insert(variable.name.clone(), at);
        }
        self.expansions += 1;
        let instance = self.expansions;
        self.instances.push(instance);
        let outer = std::mem::replace(&mut self.scopes, vec![scope]);
        let line = self.line;
        self.body(function.body.as_deref().unwrap_or_default())?;
        self.line = line;
        self.scopes = outer;
        self.instances.pop();
        // Where its `ret` goes.
        self.labels.insert((instance, String::new()), self.program.instructions.len() as u32);
        Ok(())
    }

    /// A new register.
    pub fn fresh(&mut self, file: File) -> Slot {
        let count = &mut self.counts[file as usize];
        *count += 1;
        Slot::new(file, *count - 1)
    }

    /// A register by its name.
    pub fn register(&mut self, name: &str) -> Result<Slot, PtxError> {
        if let Some(slot) = self.scopes.iter().rev().find_map(|scope| scope.registers.get(name)) {
            return Ok(*slot);
        }
        let prefix = name.trim_end_matches(|c: char| c.is_ascii_digit());
        let index = name[prefix.len()..].parse::<u32>().ok();
        for at in (0..self.scopes.len()).rev() {
            if let (Some(&(ty, count)), Some(index)) = (self.scopes[at].families.get(prefix), index)
                && index < count
            {
                let slot = self.fresh(ty.file());
                self.scopes[at].registers.insert(name.to_string(), slot);
                return Ok(slot);
            }
        }
        self.error(format!("there is no register `{name}`"))
    }

    /// A register with a fixed value in it; of a predicate, all lanes have bit 0.
    pub fn constant(&mut self, file: File, value: u64) -> Slot {
        if let Some(slot) = self.constants.get(&(file, value)) {
            return *slot;
        }
        let slot = self.fresh(file);
        self.constants.insert((file, value), slot);
        self.program.constants.push((slot, value));
        slot
    }

    fn special(&mut self, special: Special) -> Slot {
        if let Some(slot) = self.specials.get(&special) {
            return *slot;
        }
        let slot = self.fresh(File::Word);
        self.specials.insert(special, slot);
        self.program.specials.push((slot, special));
        slot
    }

    /// A source; an immediate value is taken for one of the type.
    pub fn read(&mut self, operand: &Operand, ty: Type) -> Result<Slot, PtxError> {
        let file = ty.file();
        let slot = match operand {
            Operand::Integer(value) if file == File::Predicate => self.constant(file, u64::from(*value != 0)),
            Operand::Integer(value) if file == File::Word => self.constant(file, *value & 0xffff_ffff),
            Operand::Integer(value) => self.constant(file, *value),
            Operand::F32(bits) if ty == Type::F64 => self.constant(file, f64::from(f32::from_bits(*bits)).to_bits()),
            Operand::F32(bits) => self.constant(file, u64::from(*bits)),
            Operand::F64(bits) if file == File::Word => {
                self.constant(file, u64::from((f64::from_bits(*bits) as f32).to_bits()))
            }
            Operand::F64(bits) => self.constant(file, *bits),
            Operand::Name(name) if name == "WARP_SZ" => self.constant(file, 32),
            Operand::Name(name) => match Special::named(name) {
                Some(special) => self.special(special),
                None => match self.variable_named(name) {
                    Some((_, address)) => self.constant(file, address),
                    None => self.register(name)?,
                },
            },
            Operand::Address(name, offset) => match self.variable_named(name) {
                Some((_, address)) => self.constant(file, address.wrapping_add(*offset as u64)),
                None => return self.error(format!("`{name}` is no variable")),
            },
            Operand::Not(name) => {
                let (from, to) = (self.register(name)?, self.fresh(File::Predicate));
                // Also where the guard is false: only this instruction reads it.
                let guard = std::mem::replace(&mut self.guard, (Slot::SINK, false));
                self.emit(Op::Logic(crate::program::Logic::Not), &[to], &[from, from], Kind::Compare);
                self.guard = guard;
                to
            }
            _ => return self.error("this kind of operand does not fit here"),
        };
        if slot.file() != file {
            return self.error(format!("an operand is in a register of another size than {ty:?} needs"));
        }
        Ok(slot)
    }

    /// A source of whatever size its register has; an immediate value is taken for one of the type.
    pub fn read_any(&mut self, operand: &Operand, ty: Type) -> Result<Slot, PtxError> {
        match operand {
            Operand::Name(name) if Special::named(name).is_none() && self.variable_named(name).is_none() => {
                self.register(name)
            }
            _ => self.read(operand, ty),
        }
    }

    /// A result, in a register of the type's size.
    pub fn write(&mut self, operand: &Operand, ty: Type) -> Result<Slot, PtxError> {
        let slot = self.write_any(operand, ty)?;
        if slot.file() != ty.file() {
            return self.error(format!("the result is in a register of another size than {ty:?} needs"));
        }
        Ok(slot)
    }

    /// A result, in a register of any size.
    pub fn write_any(&mut self, operand: &Operand, ty: Type) -> Result<Slot, PtxError> {
        match operand {
            Operand::Name(name) if name == "_" => Ok(self.fresh(ty.file())),
            Operand::Name(name) => self.register(name),
            _ => self.error("a result can only be in a register"),
        }
    }

    /// A variable's space and address.
    pub fn variable_named(&self, name: &str) -> Option<(Space, u64)> {
        let inner = self.scopes.iter().rev().find_map(|scope| scope.variables.get(name));
        inner.or_else(|| self.globals.get(name)).copied()
    }

    /// `[a+4]`: the register with the address, what is to be added, and the space if that follows from a variable.
    pub fn address(&mut self, operand: &Operand) -> Result<(Slot, i64, Option<Space>), PtxError> {
        let Operand::Address(name, offset) = operand else {
            return self.error("an address in brackets is missing");
        };
        if name.is_empty() {
            return Ok((self.constant(File::Wide, 0), *offset, None));
        }
        match self.variable_named(name) {
            Some((space, address)) => Ok((self.constant(File::Wide, address), *offset, Some(space))),
            None => Ok((self.register(name)?, *offset, None)),
        }
    }

    /// Appends an instruction, under the guard of the one at hand.
    pub fn emit(&mut self, op: Op, results: &[Slot], sources: &[Slot], kind: Kind) {
        let first = self.program.operands.len() as u32;
        self.program.operands.extend(results.iter().chain(sources));
        self.program.instructions.push(Instruction {
            op,
            first,
            count: (results.len() + sources.len()) as u8,
            results: results.len() as u8,
            guard: self.guard.0,
            guard_inverted: self.guard.1,
            line: self.line,
            kind,
        });
    }

    /// The carry of `.cc` instructions.
    pub fn carry(&mut self) -> Slot {
        match self.carry {
            Some(slot) => slot,
            None => {
                let slot = self.fresh(File::Predicate);
                self.carry = Some(slot);
                slot
            }
        }
    }

    /// Of the instruction at hand.
    pub fn line(&self) -> u32 {
        self.line
    }
}
