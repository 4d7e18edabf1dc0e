//! Exports one routine of voxgrad-kernels from the executables: the CPU runtime's just-in-time compiler looks it up there
//! to round to bf16 on processors that have no instruction for it.

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    let cpu = std::env::var_os("CARGO_FEATURE_CPU").is_some();
    if cpu && std::env::var("CARGO_CFG_TARGET_OS").is_ok_and(|os| os == "linux") {
        for kind in ["bins", "tests", "benches"] {
            println!("cargo::rustc-link-arg-{kind}=-Wl,--export-dynamic-symbol=__truncsfbf2");
        }
    }
}
