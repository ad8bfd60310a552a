//! What fuzzing has found interesting, and every crash it found, run again without a fuzzer (`make fuzz`,
//! rust/core/fuzz/README.md).

#[allow(dead_code)]
#[path = "../fuzz/harness/mod.rs"]
mod harness;

use std::fs;
use std::mem::offset_of;
use std::path::{Path, PathBuf};

use harness::lies::{Lie, Value};
use harness::registry::{Op, Verb};
use onecopy_core::layout::registry::{Entry, Segment, TableId};
use onecopy_core::layout::segment::{BufferRow, Header};
use onecopy_core::segment::reader;
use onecopy_core::segment::writer::Outline;
use onecopy_core::sys::directory::Directory;
use onecopy_core::sys::object::read_exact;
use onecopy_core::words::{Backend, Huge};
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

/// Overwrites a word. In the furnished table entry 3 is being loaded by player 2, and five segments are in use.
fn lie(table: TableId, row: u8, field: usize, value: Value) -> Op {
    let (table, field) = (u8::try_from(table as u32).unwrap(), u8::try_from(field / 4).unwrap());
    Op::Lie(Lie { table, row, field, value, wide: false })
}

/// What was found by reading, not by the fuzzer.
#[test]
fn failures_at_the_end_of_their_range() {
    let failures = lie(TableId::Entries, 3, offset_of!(Entry, failures), Value::None);
    harness::registry::story([failures, Op::Verb { player: 2, key: 3, verb: Verb::End(0) }]);
}

/// This one the fuzzer found: `check` called such a table whole, and no verb could use it.
#[test]
fn a_futex_word_that_is_none() {
    let word = lie(TableId::Entries, 3, offset_of!(Entry, word), Value::None);
    let ask = Verb::Acquire { may_load: true, oom: false, waited: 0, skip: 0, take: true };
    harness::registry::story([word, Op::Verb { player: 0, key: 3, verb: ask }]);
}

#[test]
fn entries_that_share_a_list() {
    let share = (0..4).map(|row| lie(TableId::Entries, row, offset_of!(Entry, segments), Value::Small(0)));
    let chain = (0..3).map(|row| lie(TableId::Segments, row, offset_of!(Segment, next), Value::Small(row + 1)));
    harness::registry::story(share.chain(chain).chain([Op::Verb { player: 0, key: 0, verb: Verb::List }]));
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
        let mut filling = outline.reserve(Backend::Memfd, Huge::Auto, &directory, "onecopy-test", &skeleton).unwrap();
        for (kind, (_, bytes)) in (1..).zip(&buffers) {
            filling.fill(&vec![kind; usize::try_from(*bytes).unwrap()]).unwrap();
        }
        let sealed = filling.seal().unwrap();
        reader::verify(&sealed.fd, &sealed.facts, "memfd").unwrap();

        let part = |offset: u64, bytes: u64| read_exact(&sealed.fd, offset, usize::try_from(bytes).unwrap()).unwrap();
        let header = Header::read_from_bytes(&part(0, size_of::<Header>() as u64)).unwrap();
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
