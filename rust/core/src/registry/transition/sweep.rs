//! sweep: everything that only the dead hold goes.

use super::super::request::ProcessId;
use super::super::table::{Oracle, Table};
use super::{Steps, Transition, entry, lease, process, segment};
use crate::Result;
use crate::layout::registry::rows::{FILLING, HELD, LIVE, LOADING, READY, UNSHAREABLE, VACANT};
use crate::layout::registry::{Entry, Lease, NONE, Process, TableId};
use crate::words::{Backend, Identity, Key};

/// What a sweep removed, or would remove.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SweepReport {
    pub processes: Vec<Identity>,
    pub leases: u32,
    pub removed: Vec<Swept>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Swept {
    pub key: Key,
    /// None: no segment, only what was remembered about the key.
    pub segment: Option<(Backend, u64)>,
    pub why: &'static str,
}

impl<T: Table, O: Oracle> Transition<'_, T, O> {
    /// When it was, in half seconds, and whether that is not the present one.
    pub fn last_sweep(&self) -> (u32, bool) {
        let swept = self.table.heads().swept;
        (swept, swept != self.half_second())
    }

    fn half_second(&self) -> u32 {
        #[allow(clippy::cast_possible_truncation)] // only compared for being equal
        let count = (self.now / 500_000_000) as u32;
        count
    }

    pub fn sweep(&mut self) -> Result<SweepReport> {
        let mut heads = self.table.heads();
        heads.swept = self.half_second();
        self.table.set_heads(heads);
        let mut report = SweepReport::default();
        self.sweep_processes(&mut report)?;
        self.sweep_leases(&mut report)?;
        for index in self.all_entries()? {
            self.sweep_entry(index, &mut report)?;
        }
        Ok(report)
    }

    /// For a table that is full: all that is dead goes, and what only remembers failures, however young.
    pub fn make_room(&mut self) -> Result<()> {
        self.sweep()?;
        for index in self.all_entries()? {
            if self.entry(index)?.state == VACANT {
                self.forget(index)?;
                self.settle(index)?;
            }
        }
        Ok(())
    }

    /// Frees the rows of dead processes, and leaves what they held to a sweep.
    pub fn bury_dead(&mut self) -> Result<()> {
        self.sweep_processes(&mut SweepReport::default())
    }

    fn sweep_processes(&mut self, report: &mut SweepReport) -> Result<()> {
        let high = self.table.heads().processes;
        self.table.ahead::<Process>(0, high)?;
        let mut buried = Vec::new();
        for slot in 0..high {
            let row: Process = self.table.get(slot)?;
            if row.state == LIVE && !self.oracle.holds(slot)? {
                report.processes.push(process::identity(&row));
                buried.push(ProcessId { slot, generation: row.generation });
                self.bury(slot)?;
            }
        }
        if buried.is_empty() { Ok(()) } else { self.note_loaders(&buried) }
    }

    /// What the next `acquire` is to know of a loader that died (that it was killed for lack of memory, perhaps) is
    /// remembered from now on, not from when it began to load.
    fn note_loaders(&mut self, dead: &[ProcessId]) -> Result<()> {
        let now = self.now;
        for index in self.all_entries()? {
            let found = self.entry(index)?;
            if found.state == LOADING && dead.contains(&entry::loader(&found)) {
                self.table.edit(index, |entry: &mut Entry| entry.since = now)?;
            }
        }
        Ok(())
    }

    fn sweep_leases(&mut self, report: &mut SweepReport) -> Result<()> {
        let high = self.table.heads().leases.high;
        self.table.ahead::<Lease>(0, high)?;
        for row in 0..high {
            let found: Lease = self.table.get(row)?;
            if found.state == HELD && !self.alive(lease::owner(&found))? {
                self.drop_lease(row)?;
                report.leases += 1;
            }
        }
        Ok(())
    }

    /// Its segments, then the entry itself.
    fn sweep_entry(&mut self, index: u32, report: &mut SweepReport) -> Result<()> {
        let found = self.entry(index)?;
        let key = entry::key(&found);
        let mut at = found.segments;
        let mut steps = Steps::over(self.table, TableId::Segments);
        while at != NONE {
            steps.next(self.table, "segments of an entry")?;
            let row = self.segment_of(at, index)?;
            let named = at == found.current;
            let why = if row.state == FILLING {
                (!self.alive(segment::owner(&row))?).then_some("its loader died while filling it")
            } else if named && row.pinned != 0 || self.held(at)? {
                None
            } else {
                Some(if found.state == UNSHAREABLE && named {
                    "nobody who knows it is alive"
                } else {
                    "no living process holds it"
                })
            };
            if let Some(why) = why {
                let memory = (row.bytes != 0).then(|| (segment::backend(&row), row.bytes));
                report.removed.push(Swept { key: key.clone(), segment: memory, why });
                self.free_segment(at)?;
            }
            at = row.next;
        }
        let after = self.entry(index)?;
        if matches!(after.state, READY | UNSHAREABLE) && after.current == NONE {
            self.vacate(index)?;
        }
        self.sweep_memory(index, key, report)
    }

    /// A dead loader's entry is left to the next `acquire`, which knows whether it was killed for lack of memory;
    /// it is forgotten with the rest.
    fn sweep_memory(&mut self, index: u32, key: Key, report: &mut SweepReport) -> Result<()> {
        let found = self.entry(index)?;
        let abandoned = found.state == LOADING && !self.alive(entry::loader(&found))?;
        if !self.expired(found.since) || !(abandoned || found.state == VACANT) {
            return self.settle(index);
        }
        if abandoned {
            self.wake(index)?;
            self.vacate(index)?;
        }
        if abandoned || remembers(&found) {
            report.removed.push(Swept { key, segment: None, why: "its failures are older than 10 minutes" });
        }
        self.forget(index)?;
        self.settle(index)
    }
}

fn remembers(entry: &Entry) -> bool {
    entry.failures != 0 || entry.failed_episode != 0 || entry.oom_deaths != 0
}
