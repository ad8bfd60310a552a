//! The answer to every request, as a function of (table, who is alive, time). No system call, no clock, no chance.
//!
//! What holds between any two verbs (and is checked by `registry::check`):
//!
//! * An entry owns a list of segments; a segment owns a list of leases; a lease names the process that holds it.
//!   Whether a segment is in use is found out by walking its leases, never stored.
//! * READY names a sealed segment, UNSHAREABLE a list of witnesses, LOADING a process; VACANT remembers failures, or
//!   has segments that lost their name and are still held. An entry with nothing to remember is freed.
//! * A process is alive if its row says so and its life lock is held. Rows of the dead stay until somebody looks.
//!
//! A row is a value: functions that change others' rows take numbers, not rows, so no stale copy is written back.

mod acquire;
mod entry;
mod lease;
mod list;
mod loading;
mod process;
mod publish;
mod restore;
mod segment;
mod sweep;

use super::request::ProcessId;
use super::table::{Oracle, Pooled, Table};
use crate::layout::registry::rows::LIVE;
use crate::layout::registry::{Process, TableId};
use crate::words::Identity;
use crate::{Error, Result};

pub use entry::{bucket_of, key_hash};
pub use sweep::{SweepReport, Swept};

/// What a failure, an OOM death or an abandoned load is remembered for, in nanoseconds.
pub const MEMORY: u64 = 600 * 1_000_000_000;

/// One verb's work on a table.
#[derive(Debug)]
pub struct Transition<'t, T, O> {
    pub table: &'t mut T,
    pub oracle: &'t mut O,
    /// CLOCK_REALTIME, nanoseconds.
    pub now: u64,
}

impl<T: Table, O: Oracle> Transition<'_, T, O> {
    pub fn alive(&mut self, id: ProcessId) -> Result<bool> {
        Ok(self.living(id)?.is_some())
    }

    /// Its row, if it is alive.
    fn living(&mut self, id: ProcessId) -> Result<Option<Process>> {
        if id.slot >= self.table.heads().processes {
            return Ok(None);
        }
        let row: Process = self.table.get(id.slot)?;
        if row.state != LIVE || row.generation != id.generation {
            return Ok(None);
        }
        Ok(self.oracle.holds(id.slot)?.then_some(row))
    }

    fn identity(&mut self, id: ProcessId) -> Result<Option<Identity>> {
        Ok(self.living(id)?.map(|row| process::identity(&row)))
    }

    /// A free row, blank but for its link.
    fn allocate<R: Pooled>(&mut self) -> Result<u32> {
        let mut heads = self.table.heads();
        let pool = R::pool(&mut heads);
        let index = pool.free;
        if index < pool.high {
            let row: R = self.table.get(index)?;
            pool.free =
                row.free_link().ok_or_else(|| self.table.corrupt("list of free rows", "a row in use", "a free one"))?;
            self.table.set_heads(heads);
            return Ok(index);
        }
        let index = pool.high;
        let capacity = self.table.capacity(R::TABLE);
        if index >= capacity {
            return Err(self.full(R::TABLE));
        }
        pool.high += 1;
        self.table.set_heads(heads);
        self.table.put(index, R::freed(crate::layout::registry::NONE))?;
        Ok(index)
    }

    fn has_room<R: Pooled>(&self) -> bool {
        let mut heads = self.table.heads();
        let pool = R::pool(&mut heads);
        pool.free < pool.high || pool.high < self.table.capacity(R::TABLE)
    }

    fn free<R: Pooled>(&mut self, index: u32) -> Result<()> {
        let mut heads = self.table.heads();
        let pool = R::pool(&mut heads);
        let next = pool.free;
        pool.free = index;
        self.table.put(index, R::freed(next))?;
        self.table.set_heads(heads);
        Ok(())
    }

    fn full(&self, table: TableId) -> Error {
        Error::Full { place: self.table.place(), table: table.name(), capacity: self.table.capacity(table) }
    }

    /// Whether something remembered since then may be forgotten. A clock that was set back forgets at once.
    fn expired(&self, since: u64) -> bool {
        since > self.now || self.now - since >= MEMORY
    }
}

/// A walk along stored links that cannot go on for ever.
struct Steps {
    left: u32,
}

impl Steps {
    fn over<T: Table>(table: &T, kind: TableId) -> Self {
        Self { left: table.capacity(kind) }
    }

    fn next<T: Table>(&mut self, table: &T, list: &'static str) -> Result<()> {
        self.left =
            self.left.checked_sub(1).ok_or_else(|| table.corrupt(list, "a list that does not end", "an end"))?;
        Ok(())
    }
}
