//! Exports one routine of voxgrad-kernels from the executables: the CPU runtime's just-in-time compiler looks it up there
//! to round to bf16 on processors that have no instruction for it. And tells the program which CubeCL it is built with.

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    let cpu = std::env::var_os("CARGO_FEATURE_CPU").is_some();
    if cpu && std::env::var("CARGO_CFG_TARGET_OS").is_ok_and(|os| os == "linux") {
        for kind in ["bins", "tests", "benches"] {
            println!("cargo::rustc-link-arg-{kind}=-Wl,--export-dynamic-symbol=__truncsfbf2");
        }
    }
    println!("cargo::rerun-if-changed=Cargo.toml");
    println!("cargo::rustc-env=VOXGRAD_CUBECL={}", cubecl().unwrap_or("unknown".into()));
}

/// The version that Cargo.toml pins.
fn cubecl() -> Option<String> {
    let manifest = std::fs::read_to_string("Cargo.toml").ok()?;
    let line = manifest.lines().find(|line| line.starts_with("cubecl = "))?;
    let (_, version) = line.split_once("version = \"=")?;
    Some(version.split_once('"')?.0.into())
}
