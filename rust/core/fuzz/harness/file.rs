//! A hostile file under the whole registry: page 0, redo record and rows of a real one overwritten, their checksums made
//! right again where the input asks for that, the file cut or lengthened; then verbs of newcomers through
//! `Registry`, as in production.
//!
//! Every verb must answer or say what is wrong; and what is answered must be in the file.

use std::fs::{self, File, Permissions};
use std::os::fd::AsFd;
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};

use arbitrary::{Arbitrary, Unstructured};
use onecopy_core::layout::registry::head::{APPLIED, COMMITTED};
use onecopy_core::layout::registry::rows::SEALED;
use onecopy_core::layout::registry::{FILE_BYTES, LIFE, PAGE, REDO, Segment, TABLES, TableId, decode, file_name, redo};
use onecopy_core::registry::request::{AcquireRequest, Acquired, Ended, PublishRequest, Published};
use onecopy_core::registry::{Registry, Session, now};
use onecopy_core::sys::directory::Directory;
use onecopy_core::sys::lock::try_lock;
use onecopy_core::words::{Backend, Constructor, Content, Key, SegmentFacts};
use onecopy_core::{Error, Result};

use super::lies::{Lie, told};

const NAMESPACE: &str = "fuzz";
/// Process rows whose life bytes are locked while the file is looked at.
const LIVING: u64 = 2;

#[derive(Arbitrary, Debug)]
struct Story {
    lies: Vec<Told>,
    /// A redo record that somebody did not live to apply, and how far the counters are apart.
    redo: Option<Redo>,
    length: Option<Length>,
    verbs: Vec<(bool, u8, Verb)>,
}

#[derive(Arbitrary, Debug)]
struct Told {
    lie: Lie,
    /// The row's checksum does not follow.
    raw: bool,
}

#[derive(Arbitrary, Debug)]
struct Redo {
    rows: Vec<(u8, u16, Lie)>,
    tail: Vec<u8>,
    ahead: i8,
    /// Added to the length, the number and the checksum of its head.
    wrong: Option<(i32, i8, bool)>,
}

#[derive(Arbitrary, Debug)]
enum Length {
    Cut(u16),
    CutPages(u16),
    Longer(u16),
    Huge,
}

#[derive(Arbitrary, Debug)]
enum Verb {
    Acquire { may_load: bool, finish: u8 },
    Publish { posix: bool, replace: bool },
    Remove,
    List,
    Sweep { dry: bool },
    Check,
    Leave,
    RemoveFile,
}

/// A directory, and the pages of a registry that real verbs have filled.
struct Room {
    path: PathBuf,
    directory: Arc<Directory>,
    pages: Vec<(u64, Vec<u8>)>,
}

static ROOM: OnceLock<Room> = OnceLock::new();

impl Room {
    fn new() -> Self {
        // A fuzzer ends without a word: who starts it names a folder, and removes it.
        let folder = std::env::var_os("ONECOPY_FUZZ_FOLDER").unwrap_or_else(|| "/dev/shm".into());
        let path = Path::new(&folder).join(format!("onecopy-fuzz-{}", std::process::id()));
        let _ = fs::remove_dir_all(&path);
        fs::create_dir(&path).unwrap();
        fs::set_permissions(&path, Permissions::from_mode(0o700)).unwrap();
        let directory = Arc::new(Directory::open(&path).unwrap());
        let room = Self { pages: Vec::new(), directory, path };
        let actors: Vec<Registry> = (0..3).map(|_| room.registry()).collect();
        for number in 0..5 {
            provide(&actors[0], number, number % 2 == 0, number == 4);
            actors[1].transact(|session| acquire(session, number, true, 0)).unwrap();
        }
        provide(&actors[2], 0, false, false);
        actors[2].transact(|session| acquire(session, 5, true, 0)).unwrap();
        actors[1].transact(|session| acquire(session, 6, true, 2)).unwrap();
        let bytes = fs::read(room.file()).unwrap();
        let number = |page: usize| page as u64 * PAGE;
        let pages = bytes.chunks(4096).enumerate().filter(|(_, page)| page.iter().any(|&byte| byte != 0));
        Self { pages: pages.map(|(page, bytes)| (number(page), bytes.to_vec())).collect(), ..room }
    }

    fn registry(&self) -> Registry {
        Registry::open(self.directory.clone(), NAMESPACE, Box::new(Vec::new), Box::new(|_, _| ())).unwrap()
    }

    fn file(&self) -> PathBuf {
        self.path.join(file_name(rustix::process::geteuid().as_raw(), NAMESPACE))
    }

    /// The registry as it was, in a new file.
    fn furnish(&self) -> File {
        let _ = fs::remove_file(self.file());
        let file = File::options().read(true).write(true).create_new(true).open(self.file()).unwrap();
        file.set_permissions(Permissions::from_mode(0o600)).unwrap();
        self.pages.iter().for_each(|(at, page)| file.write_all_at(page, *at).unwrap());
        file.set_len(FILE_BYTES).unwrap();
        file
    }
}

/// For whoever runs this in a process that goes on.
pub fn clean() {
    if let Some(room) = ROOM.get() {
        let _ = fs::remove_dir_all(&room.path);
    }
}

pub fn run(bytes: &[u8]) {
    let Ok(story) = Story::arbitrary_take_rest(Unstructured::new(bytes)) else { return };
    told(&story);
    let room = ROOM.get_or_init(Room::new);
    let file = room.furnish();
    for slot in 0..LIVING {
        assert!(try_lock(file.as_fd(), LIFE + slot).unwrap());
    }
    story.lies.iter().take(16).for_each(|told| tell(&file, told));
    if let Some(redo) = &story.redo {
        record(&file, redo);
    }
    match story.length {
        None => {}
        Some(Length::Cut(length)) => file.set_len(u64::from(length)).unwrap(),
        Some(Length::CutPages(pages)) => file.set_len(FILE_BYTES.min(u64::from(pages) * PAGE)).unwrap(),
        Some(Length::Longer(bytes)) => file.set_len(FILE_BYTES + u64::from(bytes)).unwrap(),
        Some(Length::Huge) => file.set_len(1 << 39).unwrap(),
    }
    let newcomers = [room.registry(), room.registry()];
    for (second, key, verb) in story.verbs.iter().take(16) {
        if let Err(error) = ask(&newcomers[usize::from(*second)], *key, verb) {
            let known = matches!(
                error,
                Error::Corrupt { .. } | Error::Full { .. } | Error::Refused(_) | Error::Untrusted { .. }
            );
            assert!(known, "{error:?}");
        }
    }
    newcomers.iter().for_each(Registry::leave);
}

fn tell(file: &File, Told { lie, raw }: &Told) {
    // 7: page 0 before the heads; 8: the redo record that lies there.
    let (at, length) = match usize::from(lie.table % 9) {
        7 => (0, 96),
        8 => (REDO, 96),
        table => (TABLES[table].place(row_of(TABLES[table], lie.row)), TABLES[table].stride()),
    };
    let mut bytes = vec![0; length];
    file.read_exact_at(&mut bytes, at).unwrap();
    let sealed = usize::from(lie.table % 9) < 7 && length > 4;
    let body = if sealed && !raw { length - 4 } else { length };
    lie.tell(&mut bytes[..body]);
    if sealed && !raw {
        let table = TABLES[usize::from(lie.table % 9)];
        seal(table, row_of(table, lie.row), &mut bytes);
    }
    if !raw && at == 0 && length == 96 {
        let sum = crc32fast::hash(&bytes[..60]);
        bytes[60..64].copy_from_slice(&sum.to_ne_bytes());
    }
    file.write_all_at(&bytes, at).unwrap();
}

fn row_of(table: TableId, row: u8) -> u32 {
    u32::from(row) % table.capacity().min(16)
}

fn seal(table: TableId, index: u32, row: &mut [u8]) {
    let (body, sum) = row.split_at_mut(row.len() - 4);
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(&(table as u32).to_ne_bytes());
    hasher.update(&index.to_ne_bytes());
    hasher.update(body);
    sum.copy_from_slice(&hasher.finalize().to_ne_bytes());
}

fn record(file: &File, asked: &Redo) {
    let mut counter = [0; 8];
    file.read_exact_at(&mut counter, APPLIED).unwrap();
    let number = u64::from_ne_bytes(counter).wrapping_add_signed(i64::from(asked.ahead));
    let rows: Vec<(TableId, u32, Vec<u8>)> = asked
        .rows
        .iter()
        .take(16)
        .map(|(table, index, lie)| {
            let table = TABLES[usize::from(*table) % TABLES.len()];
            let index = u32::from(*index) % (table.capacity() + 1);
            let mut bytes = vec![0; table.stride()];
            let _ = file.read_exact_at(&mut bytes, table.place(index));
            let body = if bytes.len() > 4 { bytes.len() - 4 } else { bytes.len() };
            lie.tell(&mut bytes[..body]);
            if body < bytes.len() {
                seal(table, index, &mut bytes);
            }
            (table, index, bytes)
        })
        .collect();
    let mut bytes = redo::encode(number, rows.iter().map(|(table, index, bytes)| (*table, *index, &bytes[..])));
    bytes.extend_from_slice(&asked.tail);
    let mut head = [number as i64, (bytes.len() - redo::HEAD) as i64];
    if let Some((length, other, _)) = asked.wrong {
        head[0] = head[0].wrapping_add(i64::from(other));
        head[1] += i64::from(length);
    }
    bytes[..8].copy_from_slice(&(head[0] as u64).to_ne_bytes());
    bytes[8..12].copy_from_slice(&(head[1] as u32).to_ne_bytes());
    if !asked.wrong.is_some_and(|(_, _, checksum)| checksum) {
        let length = (head[1] as u32 as usize).min(bytes.len() - redo::HEAD);
        let sum = redo::checksum(head[0] as u64, &bytes[redo::HEAD..][..length]);
        bytes[12..16].copy_from_slice(&sum.to_ne_bytes());
    }
    file.write_all_at(&bytes, REDO).unwrap();
    file.write_all_at(&number.to_ne_bytes(), COMMITTED).unwrap();
}

fn ask(registry: &Registry, key: u8, verb: &Verb) -> Result<()> {
    match *verb {
        Verb::Acquire { may_load, finish } => registry.transact(|session| acquire(session, key, may_load, finish)),
        Verb::Publish { posix, replace } => publish(registry, key, posix, replace),
        Verb::Remove => registry.transact(|session| session.remove(&name(key).tag, None)).map(drop),
        Verb::List => registry.visit(false, |session| session.list()).map(drop),
        Verb::Sweep { dry } => registry.visit(!dry, |session| session.sweep(dry)).map(drop),
        Verb::Check => registry.visit(false, |session| session.check()).map(drop),
        Verb::Leave => {
            registry.leave();
            Ok(())
        }
        Verb::RemoveFile => registry.remove_file_if_unused().map(drop),
    }
}

fn name(key: u8) -> Key {
    Key { tag: format!("t{}", key % 8), version: "1".to_owned(), compatibility: "fuzz".to_owned() }
}

fn acquire(session: &mut Session<'_>, key: u8, may_load: bool, finish: u8) -> Result<()> {
    let constructor = Constructor { name: "fuzz.load".to_owned(), code_hash: 1 };
    let (me, key) = (session.me(), name(key));
    let asked = AcquireRequest { me, key, constructor, now: now(), oom_kills: 0, waited: None, may_load, skip: 0 };
    match session.acquire(&asked)? {
        Acquired::Attach { segment, holders, content, .. } => {
            in_the_file(segment, content.facts.uuid);
            let lease = session.take_lease(segment, 7)?;
            if let Some(holder) = holders.first().filter(|_| finish & 1 == 1) {
                session.holder_gone(holder.lease)?;
            }
            if finish & 2 == 2 {
                session.release(lease)?;
            }
            if finish & 4 == 4 {
                session.segment_lost(segment)?;
            }
        }
        Acquired::Load { ticket, .. } => {
            let reason = || "reason".to_owned();
            match finish % 5 {
                1 => session.end_loading(ticket, Ended::Failed { reason: reason() }, None)?,
                2 => session.end_loading(ticket, Ended::Unshareable { reason: reason() }, None)?,
                3 => session.end_loading(ticket, Ended::GaveUp, None)?,
                _ => {}
            }
        }
        _ => {}
    }
    Ok(())
}

/// A segment that was named to attach to is there, sealed, as its row says.
fn in_the_file(segment: u32, uuid: [u8; 16]) {
    // While the room is furnished there is nothing to compare with.
    let Some(room) = ROOM.get() else { return };
    let mut bytes = vec![0; TableId::Segments.stride()];
    File::open(room.file()).unwrap().read_exact_at(&mut bytes, TableId::Segments.place(segment)).unwrap();
    let row: Segment = decode(segment, &bytes).expect("attached to a damaged row");
    assert_eq!((row.state, row.uuid), (SEALED, uuid));
}

fn publish(registry: &Registry, number: u8, posix: bool, replace: bool) -> Result<()> {
    let backend = if posix { Backend::Posix } else { Backend::Memfd };
    let mut uuid = [0; 16];
    rustix::rand::getrandom(&mut uuid, rustix::rand::GetRandomFlags::empty()).unwrap();
    let facts = SegmentFacts { uuid, backend, bytes: 4096, device: 1, inode: 2 };
    registry.transact(|session| {
        let segment = session.reserve(&name(number), uuid, backend, facts.bytes)?;
        publish_reserved(session, number, segment, facts, replace, false).map(drop)
    })
}

fn publish_reserved(
    session: &mut Session<'_>,
    number: u8,
    segment: u32,
    facts: SegmentFacts,
    replace: bool,
    pinned: bool,
) -> Result<Published> {
    let constructor = Constructor { name: "fuzz.load".to_owned(), code_hash: 1 };
    let content = Content { facts, shared_bytes: 4096, generation: 0, since: now(), pinned, constructor };
    let me = session.me();
    let done =
        session.publish(&PublishRequest { me, key: name(number), segment, content, ticket: None, replace, fd: 7 })?;
    if !matches!(done, Published::Ready { .. }) {
        session.discard(segment)?;
    }
    Ok(done)
}

fn provide(registry: &Registry, number: u8, posix: bool, pinned: bool) {
    let backend = if posix { Backend::Posix } else { Backend::Memfd };
    let facts = SegmentFacts { uuid: [number + 1; 16], backend, bytes: 4096, device: 1, inode: 2 };
    registry
        .transact(|session| {
            let segment = session.reserve(&name(number), facts.uuid, backend, facts.bytes)?;
            publish_reserved(session, number, segment, facts, true, pinned)
        })
        .unwrap();
}
