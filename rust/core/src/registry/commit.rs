//! How a change gets on the file so that a process may die at any instruction.
//!
//! 1. names of freed objects go (a row that leads nowhere is found out; an object without a row would never be)
//! 2. rows never written before get their memory, so that step 5 cannot run out of it
//! 3. the redo record: every changed row
//! 4. the flip: one small write of the commit counter; before it nothing happened, after it everything did
//! 5. the rows, each to its place
//! 6. `applied` follows the commit counter
//!
//! Whoever takes the lock next and finds the counters apart does steps 5 and 6 again: they may be done any number of
//! times. So an error in step 5 or 6 is none of the change's: it happened. The counters and the record are read and written under the lock alone.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::{self, AtFlags, FallocateFlags, Mode, OFlags};
use rustix::io::Errno;
use zerocopy::{FromBytes, IntoBytes};

use super::overlay::{Changes, FileTable};
use super::table::{REMEDY, Stored};
use super::{io, table::Table};
use crate::layout::registry::head::{APPLIED, COMMITTED, Counters};
use crate::layout::registry::redo::{self, RedoHead};
use crate::layout::registry::{
    Entry, Lease, PAGE, Process, REDO, REDO_BYTES, Segment, TABLES, TableId, encode, segment_name,
};
use crate::sys::directory::Directory;
use crate::sys::failpoint::reached;
use crate::{Error, Result};

/// A record longer than this gives its memory back after use.
const KEPT_REDO: u64 = 4 * PAGE;

/// Where a registry's names are.
pub struct Names<'n> {
    pub directory: &'n Directory,
    pub namespace: &'n str,
    pub uid: u32,
}

/// What is to be done after the lock is released: freeing gigabytes takes a while, and happens when the last
/// descriptor of an object is closed.
#[derive(Debug, Default)]
pub struct Aftermath {
    pub wake: Vec<u32>,
    #[allow(dead_code)] // kept only to be closed late
    pub freed: Vec<OwnedFd>,
}

/// Commits what `table` has changed; nothing changed is nothing written. After an error it happened nonetheless if
/// `counters.committed` has moved; the tables must not be read before they are brought up to it.
pub fn commit(
    file: BorrowedFd<'_>,
    place: &str,
    names: &Names<'_>,
    counters: &mut Counters,
    table: &mut FileTable<'_>,
    after: &mut Aftermath,
) -> Result<()> {
    let changes = table.changes();
    let moved = changes.heads != table.stored_heads();
    if changes.rows.is_empty() && !moved {
        return Ok(());
    }
    for uuid in &changes.unlinked {
        after.freed.extend(unlink(names, uuid)?);
    }
    reached("names removed");
    allocate_new::<Process>(file, place, table)?;
    allocate_new::<Lease>(file, place, table)?;
    allocate_new::<Segment>(file, place, table)?;
    allocate_new::<Entry>(file, place, table)?;

    let number = counters.committed.wrapping_add(1);
    let heads = encode(0, &changes.heads);
    let rows = changes.rows.iter().map(|(&(table, index), bytes)| (table, index, &bytes[..]));
    let rows = moved.then_some((TableId::Heads, 0, &heads[..])).into_iter().chain(rows);
    let record = redo::encode(number, rows.clone());
    io::write(file, place, &record, REDO)?;
    reached("recorded");
    io::write(file, place, number.as_bytes(), COMMITTED)?;
    counters.committed = number;
    after.wake.extend(woken(changes));
    reached("flipped");
    apply(file, place, rows)?;
    reached("written");
    finish(file, place, counters, record.len() as u64)?;
    reached("applied");

    table.committed();
    Ok(())
}

/// Brings the tables up to the commit counter, if the last committer did not live to. Says whether it did not.
pub fn recover(file: BorrowedFd<'_>, place: &str, counters: &mut Counters) -> Result<bool> {
    if counters.committed == counters.applied {
        return Ok(false);
    }
    let Counters { committed, applied } = *counters;
    if committed != applied.wrapping_add(1) {
        return Err(corrupt(
            place,
            "commit counters",
            format!("{committed} committed, {applied} applied"),
            "one apart",
        ));
    }
    let mut head = [0; redo::HEAD];
    let length = io::read(file, place, &mut head, REDO)?;
    let head = RedoHead::read_from_bytes(&head[..length])
        .map_err(|_| corrupt(place, "redo record", format!("{length} bytes"), format!("{} bytes", redo::HEAD)))?;
    if head.number != committed || u64::from(head.length) > REDO_BYTES - redo::HEAD as u64 {
        let found = format!("commit {} of {} bytes", head.number, head.length);
        return Err(corrupt(place, "redo record", found, format!("commit {committed}, at most {REDO_BYTES} bytes")));
    }
    let mut body = vec![0; head.length as usize];
    let length = io::read(file, place, &mut body, REDO + redo::HEAD as u64)?;
    let sum = redo::checksum(committed, &body[..length]);
    if sum != head.checksum {
        return Err(corrupt(
            place,
            "checksum of the redo record",
            format!("{sum:08x}"),
            format!("{:08x}", head.checksum),
        ));
    }
    let rows = redo::parse(&body).ok_or_else(|| corrupt(place, "redo record", "other bytes", "rows of the tables"))?;
    apply(file, place, rows.into_iter())?;
    finish(file, place, counters, u64::from(head.length))?;
    Ok(true)
}

/// Rows that follow each other in the file are written at once.
fn apply<'r>(file: BorrowedFd<'_>, place: &str, rows: impl Iterator<Item = (TableId, u32, &'r [u8])>) -> Result<()> {
    let mut run = Vec::new();
    let mut start = 0;
    for (table, index, bytes) in rows {
        let at = table.place(index);
        if start + run.len() as u64 != at {
            io::write(file, place, &run, start)?;
            run.clear();
            start = at;
        }
        run.extend_from_slice(bytes);
    }
    io::write(file, place, &run, start)
}

fn finish(file: BorrowedFd<'_>, place: &str, counters: &mut Counters, record: u64) -> Result<()> {
    io::write(file, place, counters.committed.as_bytes(), APPLIED)?;
    counters.applied = counters.committed;
    if record > KEPT_REDO {
        trim(file);
    }
    Ok(())
}

/// Gives back what a long redo record took. Best effort: it costs memory, not correctness.
pub fn trim(file: BorrowedFd<'_>) {
    let hole = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    let _ = fs::fallocate(file, hole, REDO + KEPT_REDO, REDO_BYTES - KEPT_REDO);
}

/// Rows above the old mark lie in a hole of the file.
fn allocate_new<R: Stored>(file: BorrowedFd<'_>, place: &str, table: &FileTable<'_>) -> Result<()> {
    let (before, now) = (table.stored_heads().limit(R::TABLE), table.heads().limit(R::TABLE));
    if now <= before {
        return Ok(());
    }
    let (start, end) = (R::TABLE.place(before), R::TABLE.place(now));
    // A page that an earlier row reaches into is there already.
    if before > 0 && (start - 1) / PAGE == (end - 1) / PAGE {
        return Ok(());
    }
    io::allocate(file, place, start, end - start)
}

fn unlink(names: &Names<'_>, uuid: &[u8; 16]) -> Result<Option<OwnedFd>> {
    let name = segment_name(names.uid, names.namespace, uuid);
    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let kept = fs::openat(names.directory.as_fd(), &name, flags, Mode::empty()).ok();
    match fs::unlinkat(names.directory.as_fd(), &name, AtFlags::empty()) {
        Ok(()) | Err(Errno::NOENT) => Ok(kept),
        // Somebody else's, or a directory, under our name: not what the row meant, and no reason to stop.
        Err(Errno::PERM | Errno::ACCESS | Errno::ISDIR) if !kept.as_ref().is_some_and(|fd| is_of(fd, names.uid)) => {
            Ok(None)
        }
        Err(errno) => Err(Error::os("unlink", names.directory.shown(&name), errno)),
    }
}

fn is_of(fd: &OwnedFd, uid: u32) -> bool {
    fs::fstat(fd).is_ok_and(|stat| stat.st_uid == uid && fs::FileType::from_raw_mode(stat.st_mode).is_file())
}

fn woken(changes: &Changes) -> impl Iterator<Item = u32> {
    changes.rows.keys().filter(|(table, _)| *table == TableId::Words).map(|&(_, index)| index)
}

pub fn corrupt(place: &str, what: &'static str, found: impl ToString, expected: impl ToString) -> Error {
    let (found, expected) = (found.to_string(), expected.to_string());
    Error::Corrupt { place: place.to_owned(), what, found, expected, remedy: REMEDY }
}

const _: () = assert!(TABLES.len() == 7, "a new table with a mark needs its line in `commit`");
