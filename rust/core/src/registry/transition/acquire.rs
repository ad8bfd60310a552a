//! acquire: attach, wait, load, or go another way.

use super::super::request::{AcquireRequest, Acquired, Holder, ProcessId, Ticket};
use super::super::table::{Oracle, Table};
use super::{Steps, Transition, entry, lease, process, segment};
use crate::Result;
use crate::layout::registry::rows::{LOADING, POSIX, READY, UNSHAREABLE};
use crate::layout::registry::{Entry, Lease, NONE, Process, Segment, TableId, Word};

/// Holders named at a time: one to open, and others where it refuses. Each costs a question to the kernel.
const HOLDERS: usize = 4;
/// This many loaders in a row killed for lack of memory, and callers are told instead of killed.
const DEATHS: u32 = 2;

impl<T: Table, O: Oracle> Transition<'_, T, O> {
    pub fn acquire(&mut self, request: &AcquireRequest) -> Result<Acquired> {
        self.now = request.now;
        let Some(index) = self.find(&request.key)? else {
            if !request.may_load {
                return Ok(Acquired::NotFound);
            }
            let index = self.find_or_create(&request.key)?;
            return self.load(index, request);
        };
        match self.entry(index)?.state {
            READY => {
                if let Some(attach) = self.attach(index, request.me, request.skip)? {
                    return Ok(attach);
                }
            }
            UNSHAREABLE if self.refresh(index)? => {
                self.witness(index, request.me)?;
                return Ok(Acquired::Unshareable { reason: self.entry(index)?.reason.to_text() });
            }
            LOADING => {
                if let Some(wait) = self.wait(index, request)? {
                    return Ok(wait);
                }
                self.loader_died(index, request.oom_kills)?;
            }
            _ => {}
        }
        self.vacant(index, request)
    }

    /// Nobody has it and nobody loads it.
    fn vacant(&mut self, index: u32, request: &AcquireRequest) -> Result<Acquired> {
        let entry = self.entry(index)?;
        if let Some(private) = gone_private(&entry, request) {
            return Ok(private);
        }
        if entry.oom_deaths >= DEATHS {
            if !self.expired(entry.oom_since) {
                return Ok(Acquired::OutOfMemory { deaths: entry.oom_deaths, need: entry.need });
            }
            self.table.edit(index, |entry: &mut Entry| (entry.oom_deaths, entry.oom_since) = (0, 0))?;
        }
        if !request.may_load {
            self.settle(index)?;
            return Ok(Acquired::NotFound);
        }
        self.load(index, request)
    }

    fn load(&mut self, index: u32, request: &AcquireRequest) -> Result<Acquired> {
        let mut entry = self.entry(index)?;
        if entry.episode == 0 {
            entry.episode = self.table.serial();
            entry.failures = 0;
        }
        entry.state = LOADING;
        entry.since = self.now;
        entry.attempt = entry.attempt.wrapping_add(1);
        entry.oom_kills = request.oom_kills;
        entry::set_loader(&mut entry, Some(request.me));
        entry::set_constructor(&mut entry, &request.constructor);
        self.table.put(index, entry)?;
        let ticket = Ticket { entry: index, episode: entry.episode, attempt: entry.attempt };
        Ok(Acquired::Load { ticket, retry: entry.failures > 0 })
    }

    /// `None`: the loader is dead.
    fn wait(&mut self, index: u32, request: &AcquireRequest) -> Result<Option<Acquired>> {
        let entry = self.entry(index)?;
        let Some(loader) = self.identity(entry::loader(&entry))? else { return Ok(None) };
        if let Some(private) = gone_private(&entry, request) {
            return Ok(Some(private));
        }
        let word: Word = self.table.get(entry.word)?;
        Ok(Some(Acquired::Wait {
            loader,
            since: entry.since,
            episode: entry.episode,
            futex_word: entry.word,
            futex_value: word.value,
        }))
    }

    /// The dead loader's episode goes on with another loader. `oom_kills`: the counter as it is now.
    pub(super) fn loader_died(&mut self, index: u32, oom_kills: u64) -> Result<()> {
        let dead = self.entry(index)?;
        self.free_filling(index, Some(entry::loader(&dead)))?;
        self.vacate(index)?;
        let now = self.now;
        self.table.edit(index, |entry: &mut Entry| {
            if oom_kills > dead.oom_kills {
                entry.oom_deaths = entry.oom_deaths.saturating_add(1);
                entry.oom_since = now;
                entry.need = dead.need;
            } else {
                (entry.oom_deaths, entry.oom_since) = (0, 0);
            }
        })
    }

    /// `None`: it was READY, and no living process holds it any more.
    fn attach(&mut self, index: u32, me: ProcessId, skip: usize) -> Result<Option<Acquired>> {
        let Some((current, row)) = self.current(index)? else { return Ok(None) };
        let mine: Process = self.table.get(me.slot)?;
        let mut holders = Vec::new();
        let mut foreign = false;
        let mut skipped = 0;
        let mut at = row.leases;
        let mut steps = Steps::over(self.table, TableId::Leases);
        while at != NONE && holders.len() < HOLDERS {
            steps.next(self.table, "leases of a segment")?;
            let found: Lease = self.lease_of(at, current)?;
            match self.living(lease::owner(&found))? {
                None => self.drop_lease(at)?,
                Some(holder) if holder.pid_namespace == mine.pid_namespace && mine.pid_namespace != 0 => {
                    if skipped < skip {
                        skipped += 1;
                        at = found.next;
                        continue;
                    }
                    holders.push(Holder {
                        lease: lease::id(at, &found),
                        identity: process::identity(&holder),
                        fd: found.fd,
                        since: found.since,
                    });
                }
                Some(_) => foreign = true,
            }
            if row.backend == POSIX && (foreign || !holders.is_empty()) {
                break; // it is opened by its name: one living holder is enough to know that it is wanted
            }
            at = found.next;
        }
        if holders.is_empty() && skipped == 0 && !foreign && row.pinned == 0 {
            self.refresh(index)?;
            return Ok(None);
        }
        Ok(Some(Acquired::Attach { segment: current, content: segment::content(&row), holders, foreign }))
    }

    /// `me` now counts among those who know that the entry cannot be shared.
    pub(super) fn witness(&mut self, index: u32, me: ProcessId) -> Result<()> {
        let Some((witnesses, row)) = self.current(index)? else { return Ok(()) };
        let mut at = row.leases;
        let mut steps = Steps::over(self.table, TableId::Leases);
        while at != NONE {
            steps.next(self.table, "leases of a segment")?;
            let found = self.lease_of(at, witnesses)?;
            if lease::owner(&found) == me {
                return Ok(());
            }
            at = found.next;
        }
        self.add_lease(me, witnesses, -1).map(drop)
    }

    /// The name leads nowhere, or to something else: the next `acquire` loads. Who has it mapped keeps it.
    pub fn segment_lost(&mut self, index: u32) -> Result<()> {
        if index >= self.table.heads().segments.high {
            return Ok(());
        }
        let row: Segment = self.segment(index)?;
        let owner = self.entry(row.entry)?;
        if owner.state == READY && owner.current == index {
            self.unname(row.entry)?;
            self.settle(row.entry)?;
        }
        Ok(())
    }
}

/// The episode this caller waited in has failed twice.
fn gone_private(entry: &Entry, request: &AcquireRequest) -> Option<Acquired> {
    let failed = request.waited.is_some_and(|waited| waited <= entry.failed_episode);
    failed.then(|| Acquired::GoPrivate { reason: entry.reason.to_text() })
}
