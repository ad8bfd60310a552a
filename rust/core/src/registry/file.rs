//! The registry's file: opened and trusted, made where there is none, its head checked.

use std::io as stdio;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::{self, AtFlags, FileType, Mode, OFlags};
use rustix::io::Errno;
use rustix::process::{Resource, getrlimit};
use zerocopy::{FromBytes, IntoBytes};

use super::commit::{corrupt, recover};
use super::io;
use crate::layout::registry::head::{self, COMMITTED, Counters, HEAD_BYTES, HEADS, MAGIC, Stamp, TURNS};
use crate::layout::registry::{Bucket, FILE_BYTES, FORMAT, Heads, PAGE, REDO, TableId, decode, encode};
use crate::sys::directory::Directory;
use crate::sys::lock::FileId;
use crate::{Error, Result};

/// What page 0 says.
#[derive(Clone, Copy, Debug)]
pub struct Head {
    pub uuid: [u8; 16],
    pub counters: Counters,
    pub heads: Heads,
}

/// Opens the registry, making an empty file where there is none. Its owner, mode, type and links are checked before
/// anything of it is read: in a directory that others may write to, anybody can put a file under our name. Not even opening
/// it waits for them: who has a lease on a file (F_SETLEASE, fcntl(2)) keeps whoever opens it waiting for 45 s.
pub fn open(directory: &Directory, name: &str) -> stdio::Result<OwnedFd> {
    let flags = OFlags::RDWR | OFlags::CREATE | OFlags::NOFOLLOW | OFlags::CLOEXEC | OFlags::NOCTTY | OFlags::NONBLOCK;
    loop {
        let fd = fs::openat(directory.as_fd(), name, flags, Mode::RUSR | Mode::WUSR)?;
        let stat = fs::fstat(&fd)?;
        match untrusted(&stat) {
            None => return Ok(fd),
            Some(_) if stat.st_nlink == 0 => {} // removed between the two calls
            Some(why) => return Err(stdio::Error::other(Mistrust(why))),
        }
    }
}

/// Carries the reason through `io::Error`, in which a kept descriptor's opener reports.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct Mistrust(String);

fn untrusted(stat: &fs::Stat) -> Option<String> {
    let me = rustix::process::geteuid().as_raw();
    if stat.st_uid != me {
        return Some(format!("it belongs to user {}, not to you ({me})", stat.st_uid));
    }
    if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
        return Some("it is not a regular file".to_owned());
    }
    if stat.st_mode & 0o077 != 0 {
        return Some(format!("its mode is {:o}: others may use it", stat.st_mode & 0o7777));
    }
    (stat.st_nlink != 1).then(|| format!("it has {} names", stat.st_nlink))
}

/// What `open` met, as the error that its caller can decide on.
pub fn explain(directory: &Directory, name: &str, error: stdio::Error) -> Error {
    let place = directory.shown(name);
    let remedy = "Remove it, or use another directory (ONECOPY_DIR)";
    if let Some(Mistrust(why)) = error.get_ref().and_then(|inner| inner.downcast_ref()) {
        return Error::Untrusted { place, why: why.clone(), remedy };
    }
    // The kernel may refuse to open another user's file before we can look at it (protected_regular), a link, a folder.
    let stat = fs::statat(directory.as_fd(), name, AtFlags::SYMLINK_NOFOLLOW).ok();
    if let Some(why) = stat.as_ref().and_then(untrusted) {
        return Error::Untrusted { place, why, remedy };
    }
    Error::os("open", place, error)
}

/// The file that has the name now.
pub fn named(directory: &Directory, name: &str) -> Result<Option<FileId>> {
    match fs::statat(directory.as_fd(), name, AtFlags::SYMLINK_NOFOLLOW) {
        Ok(stat) => Ok(Some(FileId::from_stat(&stat))),
        Err(Errno::NOENT) => Ok(None),
        Err(errno) => Err(Error::os("stat", directory.shown(name), errno)),
    }
}

/// The commit counter and the turns, read without the lock: only to see whether anything moves.
pub fn progress(file: BorrowedFd<'_>) -> Option<[u64; 3]> {
    const { assert!(TURNS == COMMITTED + 16) };
    let mut bytes = [0; 24];
    let length = io::read(file, "", &mut bytes, COMMITTED).ok()?;
    (length == bytes.len()).then(|| zerocopy::transmute!(bytes))
}

/// Tells those who still wait that somebody got the lock; a transaction that changes nothing would not. Best effort.
pub fn take_turn(file: BorrowedFd<'_>) {
    let turns = progress(file).map_or(0, |[_, _, turns]| turns);
    let _ = io::write(file, "", turns.wrapping_add(1).as_bytes(), TURNS);
}

/// Reads and checks page 0, and finishes what the last committer did not live to. A file that nobody finished making
/// is made. The caller has the lock.
pub fn read_head(file: BorrowedFd<'_>, place: &str) -> Result<Head> {
    let mut page = [0; HEAD_BYTES];
    let mut length = io::read(file, place, &mut page, 0)?;
    if page[..size_of::<Stamp>() + size_of::<Counters>()].iter().all(|&byte| byte == 0) {
        initialise(file, place)?;
        length = io::read(file, place, &mut page, 0)?;
    }
    let short = || corrupt(place, "head", format!("{length} bytes"), format!("{HEAD_BYTES} bytes"));
    if length < HEAD_BYTES {
        return Err(short());
    }
    let (stamp, _) = Stamp::read_from_prefix(&page).map_err(|_| short())?;
    check_stamp(&stamp, place)?;
    let (mut counters, _) = Counters::read_from_prefix(&page[COMMITTED as usize..]).map_err(|_| short())?;
    if recover(file, place, &mut counters)? {
        io::read(file, place, &mut page, 0)?;
    }
    let heads = decode_heads(&page[HEADS as usize..][..TableId::Heads.stride()], place)?;
    Ok(Head { uuid: stamp.uuid, counters, heads })
}

fn decode_heads(bytes: &[u8], place: &str) -> Result<Heads> {
    let heads: Heads = decode(0, bytes).map_err(|(found, expected)| {
        corrupt(place, "checksum of the heads", format!("{found:08x}"), format!("{expected:08x}"))
    })?;
    match heads.beyond() {
        None => Ok(heads),
        Some(table) => Err(corrupt(place, "rows in use", heads.limit(table), format!("at most {}", table.capacity()))),
    }
}

fn check_stamp(stamp: &Stamp, place: &str) -> Result<()> {
    if stamp.magic != MAGIC {
        let found = stamp.magic.escape_ascii().to_string();
        return Err(corrupt(place, "magic", found, MAGIC.escape_ascii()));
    }
    if stamp.format != FORMAT {
        return Err(corrupt(place, "format", stamp.format, FORMAT));
    }
    let sum = stamp.sum();
    if stamp.checksum != sum {
        return Err(corrupt(place, "checksum of the head", format!("{:08x}", stamp.checksum), format!("{sum:08x}")));
    }
    let layout = head::layout();
    if stamp.layout != layout {
        return Err(corrupt(place, "table layout", format!("{:08x}", stamp.layout), format!("{layout:08x}")));
    }
    Ok(())
}

/// Makes the tables. The stamp comes last: until it is there, whoever has the lock starts over.
fn initialise(file: BorrowedFd<'_>, place: &str) -> Result<()> {
    let mut random = [0; 24];
    rustix::rand::getrandom(&mut random, rustix::rand::GetRandomFlags::empty())
        .map_err(|errno| Error::os("getrandom", place, errno))?;
    let (uuid, serial) = random.split_at(16);
    let uuid: [u8; 16] = uuid.try_into().unwrap_or_default();
    // Far from the end, so that counting never wraps.
    let serial = u64::from_ne_bytes(serial.try_into().unwrap_or_default()) >> 8;
    let heads = Heads::new(serial);

    // Beyond this limit the kernel would send SIGXFSZ, which kills.
    if let Some(limit) = getrlimit(Resource::Fsize).current
        && limit < FILE_BYTES
    {
        return Err(Error::NoRoom {
            need: FILE_BYTES,
            free: limit,
            place: place.to_owned(),
            limit: "RLIMIT_FSIZE".to_owned(),
            remedy: "Raise it with `ulimit -f`",
        });
    }
    fs::ftruncate(file, 0).map_err(|errno| Error::os("ftruncate", place, errno))?;
    fs::ftruncate(file, FILE_BYTES).map_err(|errno| Error::os("ftruncate", place, errno))?;
    let buckets: Vec<u8> = (0..TableId::Buckets.capacity()).flat_map(|index| encode(index, &Bucket::BLANK)).collect();
    io::allocate(file, place, 0, PAGE)?;
    io::allocate(file, place, TableId::Words.offset(), PAGE)?;
    // Releasing must work on a full file system too: the room for an ordinary record is always there.
    io::allocate(file, place, REDO, 2 * PAGE)?;
    io::write(file, place, &buckets, TableId::Buckets.offset())?;
    io::write(file, place, &encode(0, &heads), HEADS)?;
    io::write(file, place, Stamp::new(uuid).as_bytes(), 0)
}
