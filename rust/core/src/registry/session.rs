//! What a transaction's work sees: the verbs, on the table as it will be committed.

use std::collections::HashSet;
use std::os::fd::BorrowedFd;
use std::time::{SystemTime, UNIX_EPOCH};

use super::check::{self, Census};
use super::overlay::FileTable;
use super::request::{
    AcquireRequest, Acquired, Ended, Holding, LeaseId, Listed, ProcessId, PublishRequest, Published, Ticket,
};
use super::table::Oracle;
use super::transition::{SweepReport, Transition};
use crate::layout::registry::{LIFE, TableId};
use crate::sys::lock;
use crate::words::{Backend, Identity, Key};
use crate::{Error, Result};

/// The verbs, under the registry's lock. A verb that fails leaves nothing behind; work that fails is not committed.
pub struct Session<'s> {
    table: FileTable<'s>,
    oracle: LifeLocks<'s>,
    me: ProcessId,
    now: u64,
}

/// Asks the kernel whose life lock is held, once per transaction and process.
pub struct LifeLocks<'f> {
    file: BorrowedFd<'f>,
    place: &'f str,
    known: [Option<bool>; TableId::Processes.capacity() as usize],
}

impl<'f> LifeLocks<'f> {
    pub fn new(file: BorrowedFd<'f>, place: &'f str) -> Self {
        Self { file, place, known: [None; TableId::Processes.capacity() as usize] }
    }

    pub fn know(&mut self, slot: u32, held: bool) {
        if let Some(known) = self.known.get_mut(slot as usize) {
            *known = Some(held);
        }
    }
}

impl Oracle for LifeLocks<'_> {
    fn holds(&mut self, slot: u32) -> Result<bool> {
        let Some(known) = self.known.get_mut(slot as usize) else { return Ok(false) };
        if let Some(held) = *known {
            return Ok(held);
        }
        let held = lock::is_locked(self.file, LIFE + u64::from(slot))
            .map_err(|error| Error::os("look for a lock on", self.place, error))?;
        *known = Some(held);
        Ok(held)
    }
}

/// CLOCK_REALTIME, nanoseconds.
pub fn now() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_nanos()).unwrap_or(u64::MAX)
}

impl<'s> Session<'s> {
    pub(super) fn new(table: FileTable<'s>, oracle: LifeLocks<'s>, me: ProcessId) -> Self {
        Self { table, oracle, me, now: now() }
    }

    pub(super) fn table(&mut self) -> &mut FileTable<'s> {
        &mut self.table
    }

    /// This process in the table.
    pub fn me(&self) -> ProcessId {
        self.me
    }

    pub fn acquire(&mut self, request: &AcquireRequest) -> Result<Acquired> {
        self.verb(|transition| transition.acquire(request))
    }

    /// # Errors
    /// `Full`: nobody's leases could be swept away.
    pub fn take_lease(&mut self, segment: u32, fd: i32) -> Result<LeaseId> {
        let me = self.me;
        self.verb(|transition| transition.take_lease(me, segment, fd))
    }

    /// The holder's descriptor is not there, or is of another file.
    pub fn holder_gone(&mut self, lease: LeaseId) -> Result<()> {
        self.verb(|transition| transition.holder_gone(lease))
    }

    /// The segment's name leads nowhere, or to something else.
    pub fn segment_lost(&mut self, segment: u32) -> Result<()> {
        self.verb(|transition| transition.segment_lost(segment))
    }

    /// A row for a segment about to be made, so that what we leave when killed is found.
    pub fn reserve(&mut self, key: &Key, uuid: [u8; 16], backend: Backend, bytes: u64) -> Result<u32> {
        let me = self.me;
        self.verb(|transition| transition.reserve(me, key, uuid, backend, bytes))
    }

    pub fn publish(&mut self, request: &PublishRequest) -> Result<Published> {
        self.verb(|transition| transition.publish(request))
    }

    /// The loader ends without READY; `segment` is what it had reserved.
    #[allow(clippy::needless_pass_by_value)] // the end of it
    pub fn end_loading(&mut self, ticket: Ticket, ended: Ended, segment: Option<u32>) -> Result<()> {
        let me = self.me;
        self.verb(|transition| transition.end_loading(me, ticket, &ended, segment))
    }

    /// Gives a reserved segment up.
    pub fn discard(&mut self, segment: u32) -> Result<()> {
        let me = self.me;
        self.verb(|transition| transition.discard(me, segment))
    }

    pub fn release(&mut self, lease: LeaseId) -> Result<()> {
        if lease.owner != self.me {
            return Ok(()); // from before a fork, or of a table that is gone: swept with its process row
        }
        self.verb(|transition| transition.release(lease))
    }

    /// Unnames every content of the tag (of one version, if given); returns how many there were.
    pub fn remove(&mut self, tag: &str, version: Option<&str>) -> Result<u32> {
        self.verb(|transition| transition.remove(tag, version))
    }

    pub fn restore(&mut self, holding: &Holding) -> Result<LeaseId> {
        let me = self.me;
        self.verb(|transition| transition.restore(me, holding))
    }

    /// Who has the key, in words; `None` if nobody has.
    pub fn holder_of(&mut self, key: &Key) -> Result<Option<String>> {
        self.verb(|transition| transition.holder_of(key))
    }

    pub fn list(&mut self) -> Result<Vec<Listed>> {
        self.verb(|transition| transition.list())
    }

    /// Everybody alive in this registry, us included. Asks the kernel about each: a millisecond for 512.
    pub fn living(&mut self) -> Result<Vec<Identity>> {
        self.verb(|transition| transition.everybody())
    }

    /// Removes what only the dead hold; with `dry_run` only tells.
    pub fn sweep(&mut self, dry_run: bool) -> Result<SweepReport> {
        let before = dry_run.then(|| self.table.changes().clone());
        let report = self.verb(|transition| transition.sweep())?;
        if let Some(before) = before {
            self.table.take_back(before);
        }
        Ok(report)
    }

    /// When it was, in the table's own count, and whether the next one is due.
    pub fn last_sweep(&mut self) -> (u32, bool) {
        self.transition().last_sweep()
    }

    /// Of every segment in the table: what else lies in the directory is nobody's.
    pub fn segments(&mut self) -> Result<HashSet<[u8; 16]>> {
        self.verb(|transition| transition.segments())
    }

    /// Looks whether the tables hold together; counts what is in them.
    pub fn check(&mut self) -> Result<Census> {
        check::check(&mut self.table)
    }

    pub(super) fn leave(&mut self) -> Result<()> {
        let me = self.me;
        self.verb(|transition| transition.leave(me))
    }

    /// All of a verb or nothing. Where a table is full, everything dead is swept away and the verb tried again.
    fn verb<R>(&mut self, verb: impl Fn(&mut Transition<'_, FileTable<'s>, LifeLocks<'s>>) -> Result<R>) -> Result<R> {
        let before = self.table.changes().clone();
        let mut done = verb(&mut self.transition());
        if matches!(done, Err(Error::Full { .. })) {
            self.table.take_back(before.clone());
            done = self.transition().make_room().and_then(|()| verb(&mut self.transition()));
        }
        if done.is_err() {
            self.table.take_back(before);
        }
        done
    }

    fn transition(&mut self) -> Transition<'_, FileTable<'s>, LifeLocks<'s>> {
        Transition { table: &mut self.table, oracle: &mut self.oracle, now: self.now }
    }
}
