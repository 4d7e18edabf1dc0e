//! For each check a kernel that it has to find something in, and its like that is clean.

mod common;

use common::{Size, device, download, kernel, run, upload};
use cuda::device::Device;
use cuda::report::{Fault, Report};

const ONE: Size = Size { cubes: 1, units: 32, shared: 0 };

/// Runs a body on four buffers of 64 words that were written.
fn reports(size: Size, body: &str) -> Vec<Report> {
    let device = device(80);
    let buffers = [0; 4].map(|_| upload(&device, &[1u32; 64]));
    on(&device, size, buffers, body)
}

fn on(device: &Device, size: Size, buffers: [u64; 4], body: &str) -> Vec<Report> {
    let arguments = buffers.map(u64::to_le_bytes);
    run(device, &kernel(body), "k", size, &arguments.each_ref().map(|a| &a[..])).1
}

fn assert_found(reports: &[Report], fault: Fault, line_of_body: u32, thread: u32) {
    let header = common::HEADER.lines().count() as u32;
    let found = reports.iter().find(|report| report.fault == fault && report.line == header + line_of_body);
    let found = found.unwrap_or_else(|| panic!("{fault:?} in line {line_of_body} is not among {reports:?}"));
    assert_eq!(found.thread[0], thread, "{found}");
    assert!(found.to_string().contains("kernel k, PTX line"), "{found}");
}

const LANE_ADDRESS: &str = "mov.u32 %r1, %tid.x;\nmul.wide.u32 %rd4, %r1, 4;\nadd.u64 %rd5, %rd0, %rd4;\n";

#[test]
fn access_out_of_bounds() {
    assert_eq!(reports(ONE, &format!("{LANE_ADDRESS}st.global.u32 [%rd5+128], %r1;")), []);
    let beyond = reports(ONE, &format!("{LANE_ADDRESS}st.global.u32 [%rd5+136], %r1;"));
    assert_found(&beyond, Fault::OutOfBounds, 4, 30);
    assert!(beyond[0].detail.contains("4 bytes at 256 of an allocation of 256"), "{}", beyond[0]);
    let before = reports(ONE, &format!("{LANE_ADDRESS}ld.global.u32 %r2, [%rd5+-4];"));
    assert_found(&before, Fault::OutOfBounds, 4, 0);
    let far = reports(ONE, "mov.u64 %rd6, 274877906944;\nadd.u64 %rd6, %rd0, %rd6;\nst.u32 [%rd6], 1;");
    assert_found(&far, Fault::OutOfBounds, 3, 0);
    let shared = Size { shared: 128, ..ONE };
    let body = "mov.u32 %r1, %tid.x;\nshl.b32 %r1, %r1, 2;\nst.shared.u32 [%r1+4], %r1;";
    assert_found(&reports(shared, body), Fault::OutOfBounds, 3, 31);
    let local = ".local .align 4 .b8 stack[16];\nmov.u64 %rd6, stack;\nst.local.u32 [%rd6+16], 1;";
    assert_found(&reports(ONE, local), Fault::OutOfBounds, 3, 0);
    assert_found(&reports(ONE, "ld.param.u64 %rd6, [p3+8];"), Fault::OutOfBounds, 1, 0);
}

#[test]
fn access_of_freed_memory() {
    let device = device(80);
    let buffers = [0; 4].map(|_| upload(&device, &[1u32; 64]));
    device.memory.free(buffers[0]);
    let found = on(&device, ONE, buffers, "ld.global.u32 %r1, [%rd0];");
    assert_found(&found, Fault::Freed, 1, 0);
}

#[test]
fn misaligned_access() {
    assert_eq!(reports(ONE, "ld.global.v2.u32 {%r1, %r2}, [%rd0+8];"), []);
    assert_found(&reports(ONE, "ld.global.v2.u32 {%r1, %r2}, [%rd0+4];"), Fault::Misaligned, 1, 0);
    let shared = Size { shared: 128, ..ONE };
    assert_found(&reports(shared, "mov.u32 %r1, 2;\nst.shared.u32 [%r1], %r1;"), Fault::Misaligned, 2, 0);
}

#[test]
fn memory_that_nobody_wrote() {
    let device = device(80);
    let mut buffers = [0; 4].map(|_| upload(&device, &[1u32; 64]));
    buffers[1] = device.memory.allocate(256).unwrap();
    let body = format!(
        "{LANE_ADDRESS}add.u64 %rd6, %rd1, %rd4;\nst.global.u32 [%rd6], %r1;\nld.global.u32 %r2, [%rd6];\n\
         ld.global.u32 %r2, [%rd6+4];"
    );
    assert_found(&on(&device, ONE, buffers, &body), Fault::NeverWritten, 7, 31);
    let shared = || Size { shared: 256, ..ONE };
    let body = "mov.u32 %r1, %tid.x;\nshl.b32 %r1, %r1, 2;\nst.shared.u32 [%r1], 1;\nld.shared.u32 %r2, [%r1];\n\
                ld.shared.u32 %r2, [%r1+128];";
    assert_found(&reports(shared(), body), Fault::NeverWritten, 5, 0);
    // What the cube before wrote counts for nothing.
    let body = "mov.u32 %r1, %ctaid.x;\nsetp.ne.u32 %p1, %r1, 0;\nmov.u32 %r2, 0;\n@!%p1 st.shared.u32 [%r2], 1;\n\
                @%p1 ld.shared.u32 %r3, [%r2];";
    assert_found(&reports(Size { cubes: 9, ..shared() }, body), Fault::NeverWritten, 5, 0);
    let local = ".local .align 4 .b8 stack[16];\nmov.u64 %rd6, stack;\nst.local.u32 [%rd6], 1;\n\
                 ld.local.u32 %r1, [%rd6];\nld.local.u32 %r1, [%rd6+4];";
    assert_found(&reports(ONE, local), Fault::NeverWritten, 5, 0);
}

#[test]
fn races_in_shared_memory() {
    let size = || Size { cubes: 1, units: 64, shared: 256 };
    let exchange = |between: &str, partner: u32| {
        format!(
            "mov.u32 %r1, %tid.x;\nshl.b32 %r2, %r1, 2;\nxor.b32 %r3, %r1, {partner};\nshl.b32 %r3, %r3, 2;\n\
             st.shared.u32 [%r2], %r1;\n{between}\nld.shared.u32 %r4, [%r3];"
        )
    };
    assert_eq!(reports(size(), &exchange("bar.sync 0;", 32)), []);
    assert_eq!(reports(size(), &exchange("bar.sync 0;", 1)), []);
    assert_eq!(reports(size(), &exchange("bar.warp.sync -1;", 1)), []);
    // Between warps, and between lanes of one warp that nothing keeps together.
    assert_found(&reports(size(), &exchange("bar.warp.sync -1;", 32)), Fault::SharedRace, 7, 32);
    assert_found(&reports(size(), &exchange("", 1)), Fault::SharedRace, 7, 0);
    // Read, then written by others.
    let body = "mov.u32 %r1, %tid.x;\nshl.b32 %r2, %r1, 2;\nxor.b32 %r3, %r2, 128;\nst.shared.u32 [%r2], 7;\nbar.sync 0;\n\
                ld.shared.u32 %r4, [%r3];\nst.shared.u32 [%r2], %r1;";
    assert_found(&reports(size(), body), Fault::SharedRace, 7, 32);
    // Two threads write different values to the same place.
    let body = "mov.u32 %r1, %tid.x;\nmov.u32 %r2, 0;\nst.shared.u32 [%r2], %r1;";
    assert_found(&reports(size(), body), Fault::SharedRace, 3, 1);
    // Neighbours in one word, by bytes, do not disturb one another.
    assert_eq!(reports(size(), "mov.u32 %r1, %tid.x;\nst.shared.u8 [%r1], %r1;\nld.shared.u8 %r2, [%r1];"), []);
}

#[test]
fn races_between_cubes() {
    let size = || Size { cubes: 4, units: 1, shared: 0 };
    let own = "mov.u32 %r1, %ctaid.x;\nmul.wide.u32 %rd4, %r1, 4;\nadd.u64 %rd5, %rd0, %rd4;\nst.global.u32 [%rd5], %r1;\n\
               ld.global.u32 %r2, [%rd5];";
    assert_eq!(reports(size(), own), []);
    let fault = |body: &str| reports(size(), body).iter().map(|report| report.fault).collect::<Vec<_>>();
    assert_eq!(fault("mov.u32 %r1, %ctaid.x;\nst.global.u32 [%rd0], %r1;"), [Fault::GlobalRace]);
    assert_eq!(fault("red.global.add.u32 [%rd0], 1;"), []);
    assert!(fault("red.global.add.u32 [%rd0], 1;\nld.global.u32 %r1, [%rd0];").contains(&Fault::GlobalRace));
    // By bytes of one word.
    let bytes = "mov.u32 %r1, %ctaid.x;\ncvt.u64.u32 %rd4, %r1;\nadd.u64 %rd5, %rd0, %rd4;\nst.global.u8 [%rd5], %r1;";
    assert_eq!(fault(bytes), []);
    // One writes what another one reads.
    let body = "mov.u32 %r1, %ctaid.x;\nsetp.eq.u32 %p1, %r1, 2;\n@%p1 st.global.u32 [%rd0], 5;\n\
                @!%p1 ld.global.u32 %r2, [%rd0];";
    assert!(fault(body).contains(&Fault::GlobalRace));
}

#[test]
fn barriers_that_some_do_not_reach() {
    let size = || Size { cubes: 1, units: 64, shared: 0 };
    let divergent = "mov.u32 %r1, %tid.x;\nsetp.lt.u32 %p1, %r1, 16;\n@!%p1 bra over;\nbar.sync 0;\nover:";
    assert_found(&reports(size(), divergent), Fault::DivergentBarrier, 4, 0);
    // Each warp waits at another barrier.
    let body = "mov.u32 %r1, %tid.x;\nsetp.lt.u32 %p1, %r1, 32;\n@!%p1 bra other;\nbar.sync 1;\nbra over;\nother:\n\
                bar.sync 2;\nover:";
    assert_found(&reports(size(), body), Fault::Deadlock, 4, 0);
    // A whole warp that has returned is not waited for.
    let body = "mov.u32 %r1, %tid.x;\nsetp.lt.u32 %p1, %r1, 32;\n@%p1 ret;\nbar.sync 0;";
    assert_eq!(reports(size(), body), []);
    let body = "mov.u32 %r1, %tid.x;\nand.b32 %r2, %r1, 1;\nsetp.eq.u32 %p1, %r2, 0;\n@%p1 bra over;\n\
                shfl.sync.bfly.b32 %r3, %r1, 1, 31, -1;\nover:";
    assert_found(&reports(size(), body), Fault::MissingLanes, 5, 1);
    let body = body.replace("shfl.sync.bfly.b32 %r3, %r1, 1, 31, -1", "bar.warp.sync -1");
    assert_found(&reports(size(), &body), Fault::MissingLanes, 5, 1);
}

#[test]
fn kernels_that_never_end_and_kernels_that_give_up() {
    let found = reports(ONE, "again:\nbra again;");
    assert_eq!(found[0].fault, Fault::InstructionLimit);
    assert_found(&reports(ONE, "trap;"), Fault::Trap, 1, 0);
}

#[test]
fn what_is_not_known_is_said_with_its_line() {
    let device = device(80);
    let refused = |ptx: &str| device.load(ptx).err();
    assert_eq!(refused(&kernel("frobnicate.u32 %r1, %r2;")), Some(218));
    assert_eq!(refused(&kernel("add.u32.sideways %r1, %r1, %r2;")), Some(218));
    // Known words where they mean nothing.
    assert_eq!(refused(&kernel("min.relu.u32 %r1, %r1, %r2;")), Some(218));
    assert_eq!(refused(&kernel("add.ftz.s32 %r1, %r1, %r2;")), Some(218));
    assert_eq!(refused(&kernel("").replace("8.7", "99.0")), Some(218));
    assert_eq!(refused(&kernel("").replace("sm_80", "sm_90")), Some(218));
    let error = cuda::parse::parse("\n\n.version 99.0\n").unwrap_err();
    assert_eq!((error.line, error.to_string().contains("newer")), (3, true), "{error}");
}

#[test]
fn asynchronous_copies_arrive_when_they_are_waited_for() {
    let size = || Size { cubes: 1, units: 32, shared: 512 };
    let body = |wait: &str| {
        format!(
            "mov.u32 %r1, %tid.x;\nmul.wide.u32 %rd4, %r1, 4;\nadd.u64 %rd5, %rd0, %rd4;\nadd.u64 %rd6, %rd1, %rd4;\n\
             shl.b32 %r2, %r1, 2;\ncp.async.ca.shared.global [%r2], [%rd5], 4;\ncp.async.commit_group;\n{wait}\n\
             ld.shared.u32 %r3, [%r2];\nst.global.u32 [%rd6], %r3;"
        )
    };
    let device = device(80);
    let values: Vec<u32> = (100..164).collect();
    let buffers = [upload(&device, &values), upload(&device, &[0u32; 64]), 0, 0];
    assert_eq!(on(&device, size(), buffers, &body("cp.async.wait_group 0;")), []);
    assert_eq!(download::<u32>(&device, buffers[1], 32), values[..32]);
    assert_found(&on(&device, size(), buffers, &body("cp.async.wait_group 1;")), Fault::NeverWritten, 9, 0);
}

#[test]
fn launches_beyond_the_architecture() {
    let device = device(80);
    let loaded = device.load(&kernel("")).unwrap();
    let kernel = &loaded.kernels["k"];
    let argument: &[u8] = &[0; 8];
    let launch = |cubes, units, shared| device.launch(kernel, cubes, units, shared, &[argument; 4]);
    assert_eq!(launch([1, 1, 1], [1024, 1, 1], 48 << 10), 0);
    assert_eq!(launch([1, 1, 1], [1025, 1, 1], 0), 1);
    assert_eq!(launch([1, 65536, 1], [1, 1, 1], 0), 1);
    assert_eq!(launch([1, 1, 1], [1, 1, 1], (48 << 10) + 1), 1);
}
