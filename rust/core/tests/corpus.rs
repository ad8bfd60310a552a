//! What fuzzing has found interesting, and every crash it found, run again without a fuzzer (`make fuzz`,
//! rust/core/fuzz/README.md).

#[allow(dead_code)]
#[path = "../fuzz/harness/mod.rs"]
mod harness;

use std::fs;
use std::path::{Path, PathBuf};

use onecopy_core::layout::segment::{BufferRow, Header};
use onecopy_core::segment::reader;
use onecopy_core::segment::writer::Outline;
use onecopy_core::sys::directory::Directory;
use onecopy_core::sys::object::read_exact;
use onecopy_core::words::Backend;
use zerocopy::FromBytes;

fn inputs(target: &str) -> Vec<PathBuf> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz");
    let files = |kind: &str| {
        let listed = fs::read_dir(folder.join(kind).join(target)).into_iter().flatten();
        listed.map(|entry| entry.unwrap().path()).collect::<Vec<_>>()
    };
    let (corpus, crashes) = (files("corpus"), files("crashes"));
    assert!(!corpus.is_empty(), "no corpus of {target} in {}", folder.display());
    corpus.into_iter().chain(crashes).collect()
}

fn replay(target: &str, run: impl Fn(&[u8])) {
    for path in inputs(target) {
        println!("{}", path.display()); // seen where it fails
        run(&fs::read(path).unwrap());
    }
}

#[test]
fn segment() {
    replay("segment", harness::segment::run);
}

#[test]
fn registry() {
    replay("registry", harness::registry::run);
}

#[test]
fn file() {
    replay("file", harness::file::run);
    harness::file::clean();
}

/// The fuzzer begins with what the code writes; it must be taken as what it is. `ONECOPY_FUZZ_SEEDS` names a folder to put
/// it into.
#[test]
fn real_segments_pass() {
    let directory = Directory::open(Path::new("/dev/shm")).unwrap();
    for (number, sizes) in [&[][..], &[0], &[100], &[64, 1, 4096], &[5000, 0, 64, 63]].into_iter().enumerate() {
        let mut end = 0;
        let buffers: Vec<(u64, u64)> = sizes
            .iter()
            .map(|&bytes| {
                let start = u64::next_multiple_of(end, 64);
                end = start + bytes;
                (start, bytes)
            })
            .collect();
        let skeleton = vec![b'.'; number * 700];
        let outline = Outline::new(skeleton.len() as u64, &buffers, end).unwrap();
        let mut filling = outline.reserve(Backend::Memfd, &directory, "onecopy-test", &skeleton).unwrap();
        for (kind, (_, bytes)) in (1..).zip(&buffers) {
            filling.fill(&vec![kind; usize::try_from(*bytes).unwrap()]).unwrap();
        }
        let sealed = filling.seal().unwrap();
        reader::verify(&sealed.fd, &sealed.facts, "memfd").unwrap();

        let part = |offset: u64, bytes: u64| read_exact(&sealed.fd, offset, usize::try_from(bytes).unwrap()).unwrap();
        let header = Header::read_from_bytes(&part(0, 96)).unwrap();
        let manifest = part(header.manifest_offset, header.manifest_bytes());
        let rows: Vec<BufferRow> =
            manifest.chunks_exact(24).map(|row| BufferRow::read_from_bytes(row).unwrap()).collect();
        let data = part(header.data_offset, header.data_bytes);
        // Only the uuid and the checksum over it are not its own: the harness asks for the same one always.
        let own = Header { uuid: harness::segment::UUID, ..header }.sealed();
        let packed = harness::segment::pack(&[0; 9], &own, &manifest, &skeleton, &data);
        assert_eq!(harness::segment::accepted(&packed), Some(rows.len()));
        for mend in [[0; 9], [1, 1, 1, 1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1, 1, 9, 0]] {
            let packed = harness::segment::pack(&mend, &own, &manifest, &skeleton, &data);
            harness::segment::run(&packed);
            if let Some(folder) = std::env::var_os("ONECOPY_FUZZ_SEEDS") {
                fs::write(Path::new(&folder).join(format!("real-{number}-{}", mend[0] + mend[7])), packed).unwrap();
            }
        }
    }
}
