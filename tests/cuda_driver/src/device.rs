//! The device behind the driver's functions: what it is, its modules, and how kernels get to run.

use crate::decode::decode;
use crate::launch::Launch;
use crate::memory::Memory;
use crate::parse::{Module, parse};
use crate::program::Program;
use crate::report::{Fault, Report};
use crate::warp::Shape;
use std::collections::HashMap;
use std::io::Write;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, OnceLock};

/// What `cuda.h` calls these.
#[allow(missing_docs)]
pub mod code {
    pub const SUCCESS: i32 = 0;
    pub const INVALID_VALUE: i32 = 1;
    pub const OUT_OF_MEMORY: i32 = 2;
    pub const INVALID_DEVICE: i32 = 101;
    pub const INVALID_IMAGE: i32 = 200;
    pub const INVALID_PTX: i32 = 218;
    pub const NOT_FOUND: i32 = 500;
    pub const NOT_SUPPORTED: i32 = 801;
    pub const UNKNOWN: i32 = 999;
}

/// Options, from the environment.
#[derive(Clone, Debug)]
pub struct Options {
    /// `CUDA_SOFTWARE_SM`: 80 (an A100, unless given) or 90 (an H100).
    pub architecture: u32,
    /// `CUDA_SOFTWARE_LIMIT`: instructions that a warp may execute.
    pub limit: u64,
    /// `CUDA_SOFTWARE_THREADS`: that cubes run on; all of the machine's unless given.
    pub threads: usize,
    /// `CUDA_SOFTWARE_REPORT`: a file that reports are appended to; the standard error output unless given.
    pub report: Option<String>,
    /// `CUDA_SOFTWARE_COUNTERS`: a file that gets a line of JSON for each launch.
    pub counters: Option<String>,
    /// `CUDA_SOFTWARE_PTX`: a folder that gets the PTX of each module that is loaded.
    pub ptx: Option<String>,
    /// `CUDA_SOFTWARE_BREAK`, as `this=>that`: in each module, before it is read, that stands for this. What then still
    /// passes proves nothing.
    pub replaced: Option<(String, String)>,
}

/// Of a multiprocessor, and of the chip: what the architecture allows.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Shared memory of a cube in bytes.
    pub shared: u32,
    /// Shared memory of a cube that did not ask for more.
    pub shared_without_asking: u32,
    /// How many there are.
    pub multiprocessors: u32,
    /// Shared memory of a multiprocessor.
    pub shared_of_multiprocessor: u32,
}

impl Options {
    fn read() -> Self {
        let text = |name: &str| std::env::var(name).ok().filter(|value| !value.is_empty());
        let number = |name: &str| {
            let value = text(name)?;
            let parsed = value.parse::<u64>().ok();
            if parsed.is_none() {
                eprintln!("cuda_driver: {name}={value} is no number and is left out");
            }
            parsed
        };
        let cores = std::thread::available_parallelism().map_or(1, |cores| cores.get() as u64);
        let mut architecture = number("CUDA_SOFTWARE_SM").unwrap_or(80) as u32;
        if ![80, 90].contains(&architecture) {
            eprintln!("cuda_driver: CUDA_SOFTWARE_SM={architecture} is neither 80 nor 90; it is an sm_80");
            architecture = 80;
        }
        Self {
            architecture,
            limit: number("CUDA_SOFTWARE_LIMIT").unwrap_or(1 << 30),
            threads: number("CUDA_SOFTWARE_THREADS").unwrap_or(cores).max(1) as usize,
            report: text("CUDA_SOFTWARE_REPORT"),
            counters: text("CUDA_SOFTWARE_COUNTERS"),
            ptx: text("CUDA_SOFTWARE_PTX"),
            replaced: text("CUDA_SOFTWARE_BREAK").and_then(|value| {
                let parts = value.split_once("=>").map(|(this, that)| (this.to_string(), that.to_string()));
                if parts.is_none() {
                    eprintln!("cuda_driver: CUDA_SOFTWARE_BREAK={value} is not this=>that and is left out");
                }
                parts
            }),
        }
    }

    /// Of the architecture.
    pub fn limits(&self) -> Limits {
        let hopper = self.architecture >= 90;
        Limits {
            shared: if hopper { 227 } else { 163 } << 10,
            shared_without_asking: 48 << 10,
            multiprocessors: if hopper { 132 } else { 108 },
            shared_of_multiprocessor: if hopper { 228 } else { 164 } << 10,
        }
    }
}

/// A kernel that a program has asked for.
pub struct Kernel {
    /// What runs.
    pub program: Program,
    /// Dynamic shared memory that it may be launched with.
    pub most_dynamic: AtomicU32,
}

/// A module that a program has loaded.
pub struct Loaded {
    /// Its kernels.
    pub kernels: HashMap<String, Kernel>,
    /// Address and size of its variables.
    pub variables: HashMap<String, (u64, usize)>,
}

/// The only device there is.
pub struct Device {
    /// From the environment.
    pub options: Options,
    /// Global memory.
    pub memory: Memory,
    launches: Mutex<u32>,
    modules: AtomicU32,
}

/// The device, made at the first call.
pub fn device() -> &'static Device {
    static DEVICE: OnceLock<Device> = OnceLock::new();
    DEVICE.get_or_init(|| Device::new(Options::read()))
}

impl Device {
    /// With nothing allocated.
    pub fn new(options: Options) -> Self {
        Self { options, memory: Memory::default(), launches: Mutex::new(0), modules: AtomicU32::new(0) }
    }

    /// Tells the user something.
    pub fn say(&self, text: &str) {
        if let Some(path) = &self.options.report {
            let file = std::fs::OpenOptions::new().create(true).append(true).open(path);
            match file.and_then(|mut file| writeln!(file, "{text}")) {
                Ok(()) => return,
                Err(error) => eprintln!("cuda_driver: {path}: {error}"),
            }
        }
        // Not `eprintln`, whose lock a dying process may never give back.
        let _ = std::io::stderr().write_all(format!("cuda_driver: {text}\n").as_bytes());
    }

    /// Takes a module in.
    ///
    /// # Errors
    ///
    /// The driver's code, after it has said why.
    pub fn load(&self, text: &str) -> Result<Loaded, i32> {
        let number = self.modules.fetch_add(1, Ordering::Relaxed);
        let refuse = |reason: String| {
            self.say(&format!("a module is refused: {reason}"));
            code::INVALID_PTX
        };
        let text = match &self.options.replaced {
            Some((this, that)) => &text.replace(this, that),
            None => text,
        };
        let module = parse(text).map_err(|error| refuse(error.to_string()))?;
        let name = module.functions.iter().find(|function| function.is_entry).map_or("", |kernel| &kernel.name);
        if let Some(folder) = &self.options.ptx {
            let path = format!("{folder}/{number:04}_{}.ptx", &name[..name.len().min(120)]);
            if let Err(error) = std::fs::write(&path, text) {
                self.say(&format!("{path}: {error}"));
            }
        }
        let built_for = module.target.trim_start_matches("sm_").trim_end_matches(['a', 'f']).parse::<u32>().ok();
        if built_for.is_none_or(|built_for| built_for > self.options.architecture) {
            return Err(refuse(format!(
                "it is for {}, the device is an sm_{}",
                module.target, self.options.architecture
            )));
        }
        let variables = self.place_variables(&module).ok_or_else(|| refuse("its variables do not fit".to_string()))?;
        let addresses = variables.iter().map(|(name, (at, _))| (name.clone(), *at)).collect();
        let mut kernels = HashMap::new();
        for function in module.functions.iter().filter(|function| function.is_entry) {
            let program = decode(&module, function, &addresses)
                .map_err(|error| refuse(format!("kernel {}, {error}", function.name)))?;
            let most = self.options.limits().shared_without_asking;
            if program.static_shared > most as usize {
                return Err(refuse(format!(
                    "kernel {} declares {} bytes of shared memory, of {most}",
                    function.name, program.static_shared
                )));
            }
            kernels.insert(function.name.clone(), Kernel { program, most_dynamic: AtomicU32::new(most) });
        }
        Ok(Loaded { kernels, variables })
    }

    fn place_variables(&self, module: &Module) -> Option<HashMap<String, (u64, usize)>> {
        let mut variables = HashMap::new();
        for variable in module.variables.iter().filter(|v| v.space != "shared" && v.bytes > 0) {
            let address = self.memory.allocate(variable.bytes)?;
            let mut bytes = variable.initial.clone();
            bytes.resize(variable.bytes, 0);
            self.write(address, &bytes)?;
            variables.insert(variable.name.clone(), (address, variable.bytes));
        }
        Some(variables)
    }

    /// Copies into global memory; none if it is not all in one allocation.
    pub fn write(&self, address: u64, bytes: &[u8]) -> Option<()> {
        let (allocation, offset) = self.memory.find(address, bytes.len())?;
        // SAFETY: `find` has checked the range, and the allocation is held.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), allocation.pointer(offset), bytes.len()) };
        allocation.mark_written(offset, bytes.len());
        Some(())
    }

    /// Runs a kernel to its end; the driver's code.
    ///
    /// `arguments`: where each argument's bytes are.
    pub fn launch(&self, kernel: &Kernel, cubes: [u32; 3], units: [u32; 3], shared: u32, arguments: &[&[u8]]) -> i32 {
        let program = &kernel.program;
        let Limits { multiprocessors, .. } = self.options.limits();
        if let Err(detail) = self.fits(kernel, cubes, units, shared) {
            let (kernel, place) = (program.name.clone(), [0; 3]);
            let report =
                Report { fault: Fault::Launch, kernel, line: 0, cube: place, thread: place, address: None, detail };
            self.say(&report.to_string());
            return report.fault.code();
        }
        let mut parameters = vec![0; program.parameter_bytes];
        for ((offset, bytes), argument) in program.parameters.iter().zip(arguments) {
            parameters[*offset..][..*bytes].copy_from_slice(argument);
        }
        // Launches wait for one another, as in one stream.
        let mut launches = self.launches.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        *launches += 1;
        let total_shared = program.dynamic_shared_offset as u32 * u32::from(shared > 0) + shared;
        let total_shared = total_shared.max(program.static_shared as u32);
        let shape = Shape { units, cubes, dynamic_shared: shared, total_shared, multiprocessors };
        let launch = Launch::new(program, shape, parameters, &self.memory, *launches, self.options.limit);
        let (counters, reports) = launch.run(self.options.threads);
        if let Some(path) = &self.options.counters {
            let line = counters.json(&program.name, cubes, units, total_shared as usize);
            let file = std::fs::OpenOptions::new().create(true).append(true).open(path);
            if let Err(error) = file.and_then(|mut file| writeln!(file, "{line}")) {
                self.say(&format!("{path}: {error}"));
            }
        }
        reports.iter().for_each(|report| self.say(&report.to_string()));
        let fatal = reports.iter().find(|report| report.fault.is_fatal());
        fatal.or(reports.first()).map_or(code::SUCCESS, |report| report.fault.code())
    }

    /// Whether the architecture can run a launch.
    fn fits(&self, kernel: &Kernel, cubes: [u32; 3], units: [u32; 3], shared: u32) -> Result<(), String> {
        let all: u64 = units.iter().map(|count| u64::from(*count)).product();
        if all == 0 || all > 1024 || units[0] > 1024 || units[1] > 1024 || units[2] > 64 {
            return Err(format!("cubes of {units:?} units, of at most 1024, and [1024, 1024, 64]"));
        }
        if cubes.contains(&0) || cubes[0] > i32::MAX as u32 || cubes[1] > 65535 || cubes[2] > 65535 {
            return Err(format!("{cubes:?} cubes, of at most [2147483647, 65535, 65535] and at least one"));
        }
        if let Some(required) = kernel.program.required.filter(|required| *required != units) {
            return Err(format!("cubes of {units:?} units, the kernel is compiled for {required:?}"));
        }
        let most = self.options.limits().shared;
        let sum = shared as usize + kernel.program.static_shared;
        if sum > most as usize {
            return Err(format!("{sum} bytes of shared memory, of {most}"));
        }
        let asked = kernel.most_dynamic.load(Ordering::Relaxed);
        if shared > asked {
            return Err(format!("{shared} bytes of dynamic shared memory, of {asked} that were asked for"));
        }
        Ok(())
    }
}
