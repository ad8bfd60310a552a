//! Segments: in the list of their entry, held by their leases, freed when neither name nor lease is left.

use super::super::request::ProcessId;
use super::super::table::{Oracle, Table};
use super::{Steps, Transition};
use crate::layout::registry::rows::{FILLING, FREE, HELD, MEMFD, POSIX, READY, SEALED, UNSHAREABLE, WITNESSES};
use crate::layout::registry::text::Text;
use crate::layout::registry::{Entry, Lease, NONE, Segment, TableId};
use crate::words::{Backend, Constructor, Content, SegmentFacts};
use crate::{Error, Result};

pub(super) fn owner(segment: &Segment) -> ProcessId {
    ProcessId { slot: segment.owner_slot, generation: segment.owner_generation }
}

pub(super) fn constructor(segment: &Segment) -> Constructor {
    Constructor { name: segment.constructor.to_text(), code_hash: segment.code_hash }
}

pub(super) fn backend(segment: &Segment) -> Backend {
    if segment.backend == POSIX { Backend::Posix } else { Backend::Memfd }
}

pub(super) fn stored_backend(backend: Backend) -> u32 {
    match backend {
        Backend::Memfd => MEMFD,
        Backend::Posix => POSIX,
    }
}

pub(super) fn facts(segment: &Segment) -> SegmentFacts {
    SegmentFacts {
        uuid: segment.uuid,
        backend: backend(segment),
        bytes: segment.bytes,
        device: segment.device,
        inode: segment.inode,
    }
}

pub(super) fn content(segment: &Segment) -> Content {
    Content {
        facts: facts(segment),
        shared_bytes: segment.shared_bytes,
        generation: segment.generation,
        since: segment.since,
        pinned: segment.pinned != 0,
        constructor: constructor(segment),
    }
}

/// Filled and complete. Pinning waits for the name: what has none is not pinned.
pub(super) fn seal(row: &mut Segment, content: &Content) {
    let Content { facts, shared_bytes, generation, since, pinned: _, constructor } = content;
    *row = Segment {
        uuid: facts.uuid,
        bytes: facts.bytes,
        device: facts.device,
        inode: facts.inode,
        backend: stored_backend(facts.backend),
        shared_bytes: *shared_bytes,
        generation: *generation,
        since: *since,
        constructor: Text::new(&constructor.name),
        code_hash: constructor.code_hash,
        state: SEALED,
        ..*row
    };
}

impl<T: Table, O: Oracle> Transition<'_, T, O> {
    pub(super) fn segment(&mut self, index: u32) -> Result<Segment> {
        let segment: Segment = self.table.get(index)?;
        if segment.state == FREE || segment.state > WITNESSES {
            return Err(self.table.corrupt("segment", format!("state {}", segment.state), "one in use"));
        }
        Ok(segment)
    }

    /// Puts `segment` into the list of `entry`.
    pub(super) fn add_segment(&mut self, entry: u32, segment: Segment) -> Result<u32> {
        let index = self.allocate::<Segment>()?;
        let next = self.entry(entry)?.segments;
        self.table.put(index, Segment { entry, previous: NONE, next, leases: NONE, ..segment })?;
        if next != NONE {
            self.table.edit(next, |after: &mut Segment| after.previous = index)?;
        }
        self.table.edit(entry, |entry: &mut Entry| entry.segments = index)?;
        Ok(index)
    }

    /// Frees a segment and its leases; the entry stays, without naming it.
    pub(super) fn free_segment(&mut self, index: u32) -> Result<()> {
        let segment = self.segment(index)?;
        let mut at = segment.leases;
        let mut steps = Steps::over(self.table, TableId::Leases);
        while at != NONE {
            steps.next(self.table, "leases of a segment")?;
            let lease = self.lease_of(at, index)?;
            self.free::<Lease>(at)?;
            at = lease.next;
        }
        if segment.previous == NONE {
            self.table.edit(segment.entry, |entry: &mut Entry| entry.segments = segment.next)?;
        } else {
            self.table.edit(segment.previous, |before: &mut Segment| before.next = segment.next)?;
        }
        if segment.next != NONE {
            self.table.edit(segment.next, |after: &mut Segment| after.previous = segment.previous)?;
        }
        if self.entry(segment.entry)?.current == index {
            self.table.edit(segment.entry, |entry: &mut Entry| entry.current = NONE)?;
        }
        if segment.backend == POSIX && segment.state != WITNESSES {
            self.table.unlink(segment.uuid);
        }
        self.free::<Segment>(index)
    }

    /// A segment that must be in use and be of this entry: a list that two entries share would be walked for each.
    pub(super) fn segment_of(&mut self, at: u32, entry: u32) -> Result<Segment> {
        let segment = self.segment(at)?;
        if segment.entry != entry {
            return Err(self.table.corrupt("segment", format!("of entry {}", segment.entry), entry));
        }
        Ok(segment)
    }

    /// A lease that must be held and be of this segment.
    pub(super) fn lease_of(&mut self, at: u32, segment: u32) -> Result<Lease> {
        let lease: Lease = self.table.get(at)?;
        if lease.state != HELD || lease.segment != segment {
            return Err(self.table.corrupt("lease", format!("of segment {}", lease.segment), segment));
        }
        Ok(lease)
    }

    /// Whether a living process has a lease on it. Leases of the dead met on the way are dropped.
    pub(super) fn held(&mut self, index: u32) -> Result<bool> {
        let mut at = self.segment(index)?.leases;
        let mut steps = Steps::over(self.table, TableId::Leases);
        while at != NONE {
            steps.next(self.table, "leases of a segment")?;
            let lease = self.lease_of(at, index)?;
            if self.alive(super::lease::owner(&lease))? {
                return Ok(true);
            }
            self.drop_lease(at)?;
            at = lease.next;
        }
        Ok(false)
    }

    /// The content an entry names, checked to be one. `None` where it names none.
    pub(super) fn current(&mut self, index: u32) -> Result<Option<(u32, Segment)>> {
        let entry = self.entry(index)?;
        let wanted = match entry.state {
            READY => SEALED,
            UNSHAREABLE => WITNESSES,
            _ => return Ok(None),
        };
        let segment = self.segment(entry.current)?;
        if segment.state != wanted || segment.entry != index {
            return Err(self.table.corrupt(
                "content of an entry",
                format!("segment in state {} of entry {}", segment.state, segment.entry),
                format!("state {wanted} of entry {index}"),
            ));
        }
        Ok(Some((entry.current, segment)))
    }

    /// READY and UNSHAREABLE end with their last living holder; pinned content stays.
    /// Says whether the entry still names something.
    pub(super) fn refresh(&mut self, index: u32) -> Result<bool> {
        let Some((current, segment)) = self.current(index)? else { return Ok(false) };
        if segment.pinned != 0 || self.held(current)? {
            return Ok(true);
        }
        self.free_segment(current)?;
        self.vacate(index)?;
        Ok(false)
    }

    /// After a lease went: the segment goes with the last one, unless it is pinned and named, or being filled.
    pub(super) fn settle_segment(&mut self, index: u32) -> Result<()> {
        let segment = self.segment(index)?;
        let entry = self.entry(segment.entry)?;
        if entry.current == index {
            if !self.refresh(segment.entry)? {
                self.settle(segment.entry)?;
            }
        } else if segment.state != FILLING && !self.held(index)? {
            self.free_segment(index)?;
            self.settle(segment.entry)?;
        }
        Ok(())
    }

    /// Takes the name from what an entry names; it lives on while it is held. The entry is left VACANT.
    pub(super) fn unname(&mut self, index: u32) -> Result<()> {
        if let Some((current, segment)) = self.current(index)? {
            self.table.edit(current, |segment: &mut Segment| segment.pinned = 0)?;
            if segment.state == WITNESSES || !self.held(current)? {
                self.free_segment(current)?;
            }
        }
        self.vacate(index)
    }

    /// Frees what `owner` was filling for this entry; with `None`, what any dead process was.
    pub(super) fn free_filling(&mut self, index: u32, of: Option<ProcessId>) -> Result<()> {
        let mut at = self.entry(index)?.segments;
        let mut steps = Steps::over(self.table, TableId::Segments);
        while at != NONE {
            steps.next(self.table, "segments of an entry")?;
            let segment = self.segment_of(at, index)?;
            if segment.state == FILLING {
                let filler = owner(&segment);
                let goes = match of {
                    Some(process) => filler == process,
                    None => !self.alive(filler)?,
                };
                if goes {
                    self.free_segment(at)?;
                }
            }
            at = segment.next;
        }
        Ok(())
    }

    /// `segment` if `me` is filling it.
    pub(super) fn filling(&mut self, me: ProcessId, index: u32) -> Result<Option<Segment>> {
        if index >= self.table.heads().segments.high {
            return Ok(None);
        }
        let segment: Segment = self.table.get(index)?;
        Ok((segment.state == FILLING && owner(&segment) == me).then_some(segment))
    }

    pub(super) fn refused(&self, what: impl std::fmt::Display) -> Error {
        Error::Refused(format!("{}: {what}", self.table.place()))
    }
}
