//! The command line. Exit codes: 0 done, 1 something failed, 2 the user can put it right, 128 and a signal's number (130
//! for Ctrl-C, 143 for SIGTERM) stopped by that signal.

mod cli;

use std::process::ExitCode;

fn main() -> ExitCode {
    match cli::run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            if let Some(cli::Interrupted(signal)) = error.downcast_ref() {
                return ExitCode::from(128 + signal);
            }
            eprintln!("error: {error:#}");
            let device_failed = error.chain().any(|cause| {
                matches!(
                    cause.downcast_ref::<voxgrad::kernels::KernelError>(),
                    Some(voxgrad::kernels::KernelError::Device { .. })
                )
            });
            ExitCode::from(if device_failed { 1 } else { 2 })
        }
    }
}
