//! publish: a filled segment gets the name.

use super::super::request::{ProcessId, PublishRequest, Published};
use super::super::table::{Oracle, Table};
use super::{Steps, Transition, entry, lease, segment};
use crate::Result;
use crate::layout::registry::rows::{LOADING, READY, WITNESSES};
use crate::layout::registry::{Entry, NONE, Segment, TableId};
use crate::words::{Backend, Content, Identity, Key};

impl<T: Table, O: Oracle> Transition<'_, T, O> {
    pub fn publish(&mut self, request: &PublishRequest) -> Result<Published> {
        let content = &request.content;
        self.now = content.since;
        let me = request.me;
        let Some(row) = self.filling(me, request.segment)? else {
            return Err(self.refused(format_args!("segment {} was not reserved by this process", request.segment)));
        };
        let index = row.entry;
        if self.entry(index)?.hash != entry::key_hash(&request.key)
            || row.uuid != content.facts.uuid
            || segment::backend(&row) != content.facts.backend
        {
            return Err(self.refused(format_args!("segment {} was reserved as another one", request.segment)));
        }
        if content.pinned && content.facts.backend != Backend::Posix {
            return Err(self.refused("only a named segment (backend posix) can be pinned"));
        }
        match request.ticket {
            Some(ticket) if ticket.entry != index || !self.ticket_holds(me, ticket)? => {
                return Ok(Published::Superseded);
            }
            Some(_) => {}
            None => {
                if let Some(taken) = self.taken(index, request)? {
                    return Ok(taken);
                }
            }
        }
        self.unname(index)?;
        let generation = self.entry(index)?.generation.wrapping_add(1);
        self.table.edit(request.segment, |row: &mut Segment| {
            segment::seal(row, &Content { generation, ..content.clone() });
            row.pinned = u32::from(content.pinned);
        })?;
        self.name(index, request.segment, generation)?;
        let lease = self.add_lease(me, request.segment, request.fd)?;
        Ok(Published::Ready { generation, lease })
    }

    /// READY, with everything that went wrong before forgotten.
    pub(super) fn name(&mut self, index: u32, segment: u32, generation: u64) -> Result<()> {
        self.forget(index)?;
        let now = self.now;
        self.table.edit(index, |entry: &mut Entry| {
            entry.state = READY;
            entry.current = segment;
            entry.generation = generation;
            entry.since = now;
            entry::set_loader(entry, None);
        })?;
        self.wake(index)
    }

    /// Who has the name that was asked for without `replace`. What the dead left is cleared away.
    fn taken(&mut self, index: u32, request: &PublishRequest) -> Result<Option<Published>> {
        let found = self.entry(index)?;
        match self.owner_of(index)? {
            Some(owner) if !request.replace => {
                Ok(Some(Published::Exists { holder: owner.who, since: found.since, loading: found.state == LOADING }))
            }
            Some(_) => Ok(None),
            None => {
                if found.state == LOADING {
                    self.free_filling(index, Some(entry::loader(&found)))?;
                }
                self.refresh(index)?;
                Ok(None)
            }
        }
    }

    /// Who has the key, in words for a person.
    pub fn holder_of(&mut self, key: &Key) -> Result<Option<String>> {
        let Some(index) = self.find(key)? else { return Ok(None) };
        let Some(owner) = self.owner_of(index)? else { return Ok(None) };
        let does = if self.entry(index)?.state == LOADING { "is loading it" } else { "has it" };
        Ok(Some(match owner.who {
            Some(who) => format!("process {} ({}) {does}", who.pid, who.name),
            None => "it is pinned".to_owned(),
        }))
    }

    /// `None`: the key is free, or known not to be shareable (somebody may have found a way after all).
    fn owner_of(&mut self, index: u32) -> Result<Option<Owner>> {
        let found = self.entry(index)?;
        if found.state == LOADING {
            let loader = self.identity(entry::loader(&found))?;
            return Ok(loader.map(|loader| Owner { who: Some(loader) }));
        }
        let Some((current, row)) = self.current(index)? else { return Ok(None) };
        if row.state == WITNESSES {
            return Ok(None);
        }
        let holder = self.holder_to_name(current, segment::owner(&row))?;
        Ok((holder.is_some() || row.pinned != 0).then_some(Owner { who: holder }))
    }

    /// A living holder: the publisher if it still is one.
    fn holder_to_name(&mut self, current: u32, publisher: ProcessId) -> Result<Option<Identity>> {
        let mut newest = None;
        let mut at = self.segment(current)?.leases;
        let mut steps = Steps::over(self.table, TableId::Leases);
        while at != NONE {
            steps.next(self.table, "leases of a segment")?;
            let row = self.lease_of(at, current)?;
            let owner = lease::owner(&row);
            if (newest.is_none() || owner == publisher)
                && let Some(holder) = self.identity(owner)?
            {
                if owner == publisher {
                    return Ok(Some(holder));
                }
                newest = Some(holder);
            }
            at = row.next;
        }
        Ok(newest)
    }
}

/// Who has a key; nobody living where it is pinned.
struct Owner {
    who: Option<Identity>,
}
