//! restore: what a process holds comes along into a table that is new to it (the file was removed, or it forked).

use super::super::request::{Holding, LeaseId, ProcessId};
use super::super::table::{Oracle, Table};
use super::{Steps, Transition, entry, segment};
use crate::Result;
use crate::layout::registry::rows::{SEALED, VACANT};
use crate::layout::registry::{NONE, Segment, TableId};

impl<T: Table, O: Oracle> Transition<'_, T, O> {
    /// Where the key is free, or names what was published earlier, it becomes READY with our segment; else the segment
    /// stays unnamed, with our lease.
    /// Several processes may bring the same one.
    pub fn restore(&mut self, me: ProcessId, holding: &Holding) -> Result<LeaseId> {
        let index = self.find_or_create(&holding.key)?;
        let content = &holding.content;
        if let Some(known) = self.find_segment(index, content.facts.uuid)? {
            return self.add_lease(me, known, holding.fd);
        }
        let mut brought = Segment::BLANK;
        segment::seal(&mut brought, content);
        let current = self.add_segment(index, brought)?;
        let lease = self.add_lease(me, current, holding.fd)?;
        if holding.named && self.free_to_take(index, content.since)? {
            self.unname(index)?;
            self.table.edit(current, |row: &mut Segment| row.pinned = u32::from(content.pinned))?;
            let generation = self.entry(index)?.generation.max(content.generation);
            self.name(index, current, generation)?;
        }
        Ok(lease)
    }

    /// Of two contents that both had the name once, the one published later has it.
    fn free_to_take(&mut self, index: u32, since: u64) -> Result<bool> {
        if self.refresh(index)? {
            let earlier = self.current(index)?.is_some_and(|(_, row)| row.state == SEALED && row.since < since);
            return Ok(earlier);
        }
        let found = self.entry(index)?;
        if found.state == VACANT {
            return Ok(true);
        }
        let abandoned = !self.alive(entry::loader(&found))?;
        if abandoned {
            self.free_filling(index, Some(entry::loader(&found)))?;
        }
        Ok(abandoned)
    }

    fn find_segment(&mut self, index: u32, uuid: [u8; 16]) -> Result<Option<u32>> {
        let mut at = self.entry(index)?.segments;
        let mut steps = Steps::over(self.table, TableId::Segments);
        while at != NONE {
            steps.next(self.table, "segments of an entry")?;
            let row = self.segment_of(at, index)?;
            if row.state == SEALED && row.uuid == uuid {
                return Ok(Some(at));
            }
            at = row.next;
        }
        Ok(None)
    }
}
