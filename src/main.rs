//! The command line. Exit codes: 0 done, 1 something failed, 2 the user can put it right, 128 and a signal's number (130
//! for Ctrl-C, 143 for SIGTERM) stopped by that signal.

mod cli;

use std::process::ExitCode;
use voxgrad::Error;
use voxgrad::kernels::KernelError;

fn main() -> ExitCode {
    match cli::run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            if let Some(cli::Interrupted(signal)) = error.downcast_ref() {
                return ExitCode::from(128 + signal);
            }
            eprintln!("error: {error:#}");
            if let Some(options) = cli::advice(&error) {
                eprintln!("options: {options}");
            }
            ExitCode::from(if device_failed(&error) { 1 } else { 2 })
        }
    }
}

/// Whether a device failed, which no other input would change.
fn device_failed(error: &anyhow::Error) -> bool {
    error.chain().any(|cause| {
        // The library's error passes a kernel's through, which is then no link of the chain.
        let kernel = match cause.downcast_ref::<Error>() {
            Some(Error::Kernel(kernel)) => Some(kernel),
            _ => cause.downcast_ref::<KernelError>(),
        };
        matches!(kernel, Some(KernelError::Device { .. }))
    })
}
