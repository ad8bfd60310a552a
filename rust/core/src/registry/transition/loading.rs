//! What a loader does on its way: reserve, discard, end_loading.

use super::super::request::{Ended, ProcessId, Ticket};
use super::super::table::{Oracle, Table};
use super::{Transition, segment};
use crate::Result;
use crate::layout::registry::rows::{FILLING, UNSHAREABLE, WITNESSES};
use crate::layout::registry::text::Text;
use crate::layout::registry::{Entry, Lease, Segment};
use crate::words::{Backend, Key};

/// Constructors that may raise in one episode: the first loader's and one waiter's.
const FAILURES: u32 = 2;

impl<T: Table, O: Oracle> Transition<'_, T, O> {
    /// A row for a segment that `me` is about to make: should it die, others know what to remove.
    pub fn reserve(&mut self, me: ProcessId, key: &Key, uuid: [u8; 16], backend: Backend, bytes: u64) -> Result<u32> {
        let entry = self.find_or_create(key)?;
        if Self::loads(&self.entry(entry)?, me) {
            self.table.edit(entry, |entry: &mut Entry| entry.need = bytes)?;
        }
        let filling = Segment {
            uuid,
            bytes,
            backend: segment::stored_backend(backend),
            owner_generation: me.generation,
            owner_slot: me.slot,
            since: self.now,
            state: FILLING,
            ..Segment::BLANK
        };
        self.add_segment(entry, filling)
    }

    /// Gives a reserved segment up.
    pub fn discard(&mut self, me: ProcessId, segment: u32) -> Result<()> {
        if let Some(row) = self.filling(me, segment)? {
            self.free_segment(segment)?;
            self.settle(row.entry)?;
        }
        Ok(())
    }

    /// The entry this ticket still is the right one for.
    pub(super) fn ticket_holds(&mut self, me: ProcessId, ticket: Ticket) -> Result<bool> {
        if ticket.entry >= self.table.heads().entries.high {
            return Ok(false);
        }
        let entry: Entry = self.table.get(ticket.entry)?;
        Ok(Self::loads(&entry, me) && (entry.episode, entry.attempt) == (ticket.episode, ticket.attempt))
    }

    /// The loader ends without READY. With a ticket that was overtaken, only `segment` is discarded.
    pub fn end_loading(&mut self, me: ProcessId, ticket: Ticket, ended: &Ended, segment: Option<u32>) -> Result<()> {
        let holds = self.ticket_holds(me, ticket)?;
        if holds {
            self.wake(ticket.entry)?;
        }
        if let Some(segment) = segment {
            self.discard(me, segment)?;
        }
        if !holds {
            return Ok(());
        }
        // A loader must be able to end, whatever is full: then the next one finds out for itself.
        let room = !matches!(ended, Ended::Unshareable { .. }) || self.room_for_witness()?;
        let ended = if room { ended } else { &Ended::GaveUp };
        self.vacate(ticket.entry)?;
        match ended {
            Ended::Failed { reason } => self.table.edit(ticket.entry, |entry: &mut Entry| {
                entry.oom_deaths = 0;
                entry.reason = Text::new(reason);
                entry.failures = entry.failures.saturating_add(1);
                if entry.failures >= FAILURES {
                    (entry.failed_episode, entry.episode, entry.failures) = (entry.episode, 0, 0);
                }
            }),
            Ended::Unshareable { reason } => self.unshareable(me, ticket.entry, reason),
            Ended::GaveUp => self.settle(ticket.entry),
        }
    }

    fn room_for_witness(&mut self) -> Result<bool> {
        if self.has_room::<Segment>() && self.has_room::<Lease>() {
            return Ok(true);
        }
        self.sweep()?;
        Ok(self.has_room::<Segment>() && self.has_room::<Lease>())
    }

    fn unshareable(&mut self, me: ProcessId, index: u32, reason: &str) -> Result<()> {
        let witnesses = self.add_segment(index, Segment { state: WITNESSES, since: self.now, ..Segment::BLANK })?;
        self.forget(index)?;
        self.table.edit(index, |entry: &mut Entry| {
            entry.state = UNSHAREABLE;
            entry.current = witnesses;
            entry.reason = Text::new(reason);
        })?;
        self.add_lease(me, witnesses, -1).map(drop)
    }
}
