//! Process rows: join, leave, and who is there.

use super::super::request::ProcessId;
use super::super::table::{Oracle, Table};
use super::{Transition, entry, lease};
use crate::Result;
use crate::layout::registry::rows::{FREE, HELD, LIVE, LOADING};
use crate::layout::registry::text::Text;
use crate::layout::registry::{Lease, Process};
use crate::words::Identity;

pub(super) fn identity(row: &Process) -> Identity {
    Identity { pid: row.pid, pid_namespace: row.pid_namespace, start_time: row.start_time, name: row.name.to_text() }
}

impl<T: Table, O: Oracle> Transition<'_, T, O> {
    /// The first row from `from` on that no process is written in.
    pub fn free_slot(&mut self, from: u32) -> Result<Option<u32>> {
        let high = self.table.heads().processes;
        for slot in from..high {
            let row: Process = self.table.get(slot)?;
            if row.state != LIVE {
                return Ok(Some(slot));
            }
        }
        let above = from.max(high);
        Ok((above < self.table.capacity(<Process as crate::layout::registry::Row>::TABLE)).then_some(above))
    }

    /// `slot` is free, and the caller has its life lock.
    pub fn join(&mut self, slot: u32, identity: &Identity) -> Result<ProcessId> {
        let mut heads = self.table.heads();
        let high = heads.processes;
        if slot >= high {
            heads.processes = slot + 1;
            self.table.set_heads(heads);
            for skipped in high..slot {
                self.table.put(skipped, Process::BLANK)?;
            }
        }
        let generation = self.table.serial();
        let row = Process {
            generation,
            pid_namespace: identity.pid_namespace,
            start_time: identity.start_time,
            pid: identity.pid,
            state: LIVE,
            name: Text::new(&identity.name),
        };
        self.table.put(slot, row)?;
        Ok(ProcessId { slot, generation })
    }

    /// Everything of `me` goes: leases, what it fills, what it loads, its row.
    pub fn leave(&mut self, me: ProcessId) -> Result<()> {
        for row in 0..self.table.heads().leases.high {
            let lease: Lease = self.table.get(row)?;
            if lease.state == HELD && lease::owner(&lease) == me {
                self.drop_lease(row)?;
                self.settle_segment(lease.segment)?;
            }
        }
        for index in self.all_entries()? {
            self.free_filling(index, Some(me))?;
            let found = self.entry(index)?;
            if found.state == LOADING && entry::loader(&found) == me {
                self.wake(index)?;
                self.vacate(index)?;
            }
            self.settle(index)?;
        }
        self.bury(me.slot)
    }

    /// The slot may be used again; its generation tells the old claims from new ones.
    pub(super) fn bury(&mut self, slot: u32) -> Result<()> {
        self.table.edit(slot, |row: &mut Process| row.state = FREE)
    }

    /// Everybody who is alive, the caller included.
    pub fn everybody(&mut self) -> Result<Vec<Identity>> {
        let high = self.table.heads().processes;
        self.table.ahead::<Process>(0, high)?;
        let mut found = Vec::new();
        for slot in 0..high {
            let row: Process = self.table.get(slot)?;
            if row.state == LIVE && self.oracle.holds(slot)? {
                found.push(identity(&row));
            }
        }
        Ok(found)
    }
}
