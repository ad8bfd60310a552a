//! Whether a table holds together: every row in exactly the lists it belongs to, every state with what it needs.
//!
//! For tests and for `onecopy doctor`; transitions check only what they touch.

use std::collections::HashSet;

use super::table::{Pooled, Stored, Table};
use super::transition::{bucket_of, key_hash};
use crate::Result;
use crate::layout::registry::rows::{
    FILLING, FREE, HELD, LIVE, LOADING, READY, SEALED, UNSHAREABLE, VACANT, WITNESSES,
};
use crate::layout::registry::{Bucket, Entry, Lease, NONE, Process, Segment, TableId};
use crate::words::Key;

/// Rows in use.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Census {
    pub processes: u32,
    pub entries: u32,
    pub loading: u32,
    pub segments: u32,
    pub leases: u32,
}

/// # Errors
/// `Corrupt`, with what does not fit.
pub fn check<T: Table>(table: &mut T) -> Result<Census> {
    let mut census = Census::default();
    for slot in 0..table.heads().processes {
        let row: Process = table.get(slot)?;
        expect(table, row.state <= LIVE, "process", slot, "a state it may have")?;
        census.processes += u32::from(row.state == LIVE);
    }
    let free_entries = free_rows::<Entry, T>(table)?;
    let free_segments = free_rows::<Segment, T>(table)?;
    let free_leases = free_rows::<Lease, T>(table)?;
    let mut seen = Seen::default();
    table.ahead::<Bucket>(0, table.capacity(TableId::Buckets))?;
    for bucket in 0..table.capacity(TableId::Buckets) {
        let mut at = table.get::<Bucket>(bucket)?.first;
        while at != NONE {
            expect(table, seen.entries.insert(at), "entry", at, "in one bucket, once")?;
            let entry: Entry = table.get(at)?;
            let home = bucket_of(entry.hash, table.capacity(TableId::Buckets));
            expect(table, home == bucket, "entry", at, "in the bucket of its hash")?;
            check_entry(table, at, &entry, &mut seen)?;
            census.loading += u32::from(entry.state == LOADING);
            at = entry.next;
        }
    }
    let heads = table.heads();
    complete(table, TableId::Entries, seen.entries.len(), free_entries, heads.entries.high)?;
    complete(table, TableId::Segments, seen.segments.len(), free_segments, heads.segments.high)?;
    complete(table, TableId::Leases, seen.leases.len(), free_leases, heads.leases.high)?;
    census.entries = count(seen.entries.len());
    census.segments = count(seen.segments.len());
    census.leases = count(seen.leases.len());
    Ok(census)
}

#[derive(Default)]
struct Seen {
    entries: HashSet<u32>,
    segments: HashSet<u32>,
    leases: HashSet<u32>,
}

fn check_entry<T: Table>(table: &mut T, index: u32, entry: &Entry, seen: &mut Seen) -> Result<()> {
    let key = Key {
        tag: entry.tag.to_text(),
        version: entry.version.to_text(),
        compatibility: entry.compatibility.to_text(),
    };
    // Longer texts are cut in the row.
    if key.version.len() < 150 && key.compatibility.len() < 100 {
        expect(table, key_hash(&key) == entry.hash, "entry", index, "the hash of its key")?;
    }
    let word = bucket_of(entry.hash, table.capacity(TableId::Words));
    expect(table, entry.word == word, "entry", index, "the futex word of its hash")?;
    let wanted = match entry.state {
        READY => Some(SEALED),
        UNSHAREABLE => Some(WITNESSES),
        VACANT | LOADING => None,
        _ => return expect(table, false, "entry", index, "a state it may have"),
    };
    expect(table, (entry.state == LOADING) == (entry.loader_slot != NONE), "entry", index, "a loader while LOADING")?;
    expect(table, wanted.is_some() == (entry.current != NONE), "entry", index, "content while READY")?;
    if entry.state == VACANT {
        let remembers = entry.failures != 0 || entry.failed_episode != 0 || entry.oom_deaths != 0;
        expect(table, remembers || entry.segments != NONE, "entry", index, "a reason to be there")?;
    }
    let mut named = false;
    let (mut previous, mut at) = (NONE, entry.segments);
    while at != NONE {
        expect(table, seen.segments.insert(at), "segment", at, "in one list, once")?;
        let segment: Segment = table.get(at)?;
        expect(table, segment.entry == index && segment.previous == previous, "segment", at, "links both ways")?;
        if at == entry.current {
            named = true;
            expect(table, Some(segment.state) == wanted, "segment", at, "what its entry says")?;
        } else {
            expect(table, matches!(segment.state, FILLING | SEALED), "segment", at, "a state it may have")?;
            expect(table, segment.pinned == 0, "segment", at, "a name while pinned")?;
        }
        check_leases(table, at, &segment, seen)?;
        (previous, at) = (at, segment.next);
    }
    expect(table, named == (entry.current != NONE), "entry", index, "its content in its list")
}

fn check_leases<T: Table>(table: &mut T, index: u32, segment: &Segment, seen: &mut Seen) -> Result<()> {
    let mut owners = HashSet::new();
    let (mut previous, mut at) = (NONE, segment.leases);
    while at != NONE {
        expect(table, seen.leases.insert(at), "lease", at, "in one list, once")?;
        let lease: Lease = table.get(at)?;
        expect(table, lease.state == HELD, "lease", at, "HELD")?;
        expect(table, lease.segment == index && lease.previous == previous, "lease", at, "links both ways")?;
        expect(table, segment.state != FILLING, "lease", at, "none while FILLING")?;
        if segment.state == WITNESSES {
            expect(table, lease.fd == -1, "lease", at, "no descriptor")?;
            expect(table, owners.insert((lease.owner_slot, lease.owner_generation)), "lease", at, "one a witness")?;
        }
        (previous, at) = (at, lease.next);
    }
    Ok(())
}

/// Length of the chain of free rows, each free and in it once.
fn free_rows<R: Pooled + Stored, T: Table>(table: &mut T) -> Result<usize> {
    let mut heads = table.heads();
    let pool = *R::pool(&mut heads);
    let mut seen = HashSet::new();
    let mut at = pool.free;
    while at != NONE {
        expect(table, seen.insert(at), R::TABLE.name(), at, "free once")?;
        let row: R = table.get(at)?;
        match row.free_link() {
            Some(next) => at = next,
            None => expect(table, false, R::TABLE.name(), at, "free")?,
        }
    }
    Ok(seen.len())
}

fn complete<T: Table>(table: &T, kind: TableId, used: usize, free: usize, high: u32) -> Result<()> {
    if used + free == high as usize {
        return Ok(());
    }
    Err(table.corrupt(kind.name(), format!("{used} in use, {free} free"), format!("{high} together")))
}

fn expect<T: Table>(table: &T, holds: bool, what: &'static str, index: u32, wanted: &'static str) -> Result<()> {
    if holds { Ok(()) } else { Err(table.corrupt(what, format!("row {index} without"), wanted)) }
}

fn count(length: usize) -> u32 {
    u32::try_from(length).unwrap_or(NONE)
}

const _: () = assert!(FREE == 0, "a blank row is a free one");
