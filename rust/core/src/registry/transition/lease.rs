//! Leases: take_lease, holder_gone, release.

use super::super::request::{LeaseId, ProcessId};
use super::super::table::{Oracle, Table};
use super::Transition;
use crate::Result;
use crate::layout::registry::rows::{HELD, SEALED};
use crate::layout::registry::{Lease, NONE, Segment};

pub(super) fn owner(lease: &Lease) -> ProcessId {
    ProcessId { slot: lease.owner_slot, generation: lease.owner_generation }
}

pub(super) fn id(row: u32, lease: &Lease) -> LeaseId {
    LeaseId { row, owner: owner(lease), serial: lease.serial }
}

impl<T: Table, O: Oracle> Transition<'_, T, O> {
    /// `fd`: the caller's open descriptor of the segment (-1 for posix).
    pub fn take_lease(&mut self, me: ProcessId, segment: u32, fd: i32) -> Result<LeaseId> {
        if self.segment(segment)?.state != SEALED {
            return Err(self.refused(format_args!("segment {segment} is not published: no lease can be taken on it")));
        }
        self.add_lease(me, segment, fd)
    }

    pub(super) fn add_lease(&mut self, me: ProcessId, segment: u32, fd: i32) -> Result<LeaseId> {
        let row = self.allocate::<Lease>()?;
        let next = self.segment(segment)?.leases;
        let lease = Lease {
            owner_generation: me.generation,
            owner_slot: me.slot,
            serial: self.table.serial(),
            segment,
            fd,
            next,
            state: HELD,
            since: self.now,
            ..Lease::BLANK
        };
        self.table.put(row, lease)?;
        if next != NONE {
            self.table.edit(next, |after: &mut Lease| after.previous = row)?;
        }
        self.table.edit(segment, |segment: &mut Segment| segment.leases = row)?;
        Ok(id(row, &lease))
    }

    /// Takes a lease out of its segment's list; what becomes of the segment is the caller's business.
    pub(super) fn drop_lease(&mut self, row: u32) -> Result<()> {
        let lease: Lease = self.table.get(row)?;
        if lease.previous == NONE {
            self.table.edit(lease.segment, |segment: &mut Segment| segment.leases = lease.next)?;
        } else {
            self.table.edit(lease.previous, |before: &mut Lease| before.next = lease.next)?;
        }
        if lease.next != NONE {
            self.table.edit(lease.next, |after: &mut Lease| after.previous = lease.previous)?;
        }
        self.free::<Lease>(row)
    }

    /// The owner lets go. A lease that somebody dropped meanwhile is no error.
    pub fn release(&mut self, lease: LeaseId) -> Result<()> {
        if let Some(segment) = self.find_lease(lease)? {
            self.drop_lease(lease.row)?;
            self.settle_segment(segment)?;
        }
        Ok(())
    }

    /// The holder's descriptor is not there, or is another file. The segment stays READY until the next `acquire`
    /// looks for another holder.
    pub fn holder_gone(&mut self, lease: LeaseId) -> Result<()> {
        if self.find_lease(lease)?.is_some() {
            self.drop_lease(lease.row)?;
        }
        Ok(())
    }

    fn find_lease(&mut self, wanted: LeaseId) -> Result<Option<u32>> {
        if wanted.row >= self.table.heads().leases.high {
            return Ok(None);
        }
        let lease: Lease = self.table.get(wanted.row)?;
        Ok((lease.state == HELD && id(wanted.row, &lease) == wanted).then_some(lease.segment))
    }
}
