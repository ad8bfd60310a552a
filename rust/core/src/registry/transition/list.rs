//! list and remove: what a person asks about names.

use std::collections::HashSet;

use super::super::request::{Holder, Listed, State};
use super::super::table::{Oracle, Table};
use super::{Steps, Transition, entry, lease, process, segment};
use crate::Result;
use crate::layout::registry::rows::{FILLING, FREE, LOADING, READY, SEALED, UNSHAREABLE, VACANT, WITNESSES};
use crate::layout::registry::{Entry, NONE, Segment, TableId};
use crate::words::{Constructor, Key};

impl<T: Table, O: Oracle> Transition<'_, T, O> {
    /// Changes nothing. What only the dead hold is listed as stale.
    pub fn list(&mut self) -> Result<Vec<Listed>> {
        let mut all = Vec::new();
        for index in self.all_entries()? {
            let found = self.entry(index)?;
            if let Some(named) = self.named(index, &found)? {
                all.push(named);
            }
            let mut at = found.segments;
            let mut steps = Steps::over(self.table, TableId::Segments);
            while at != NONE {
                steps.next(self.table, "segments of an entry")?;
                let row = self.segment_of(at, index)?;
                if at != found.current && row.state != FILLING {
                    let unnamed = Listed { unnamed: true, ..self.content(at, &row, &found)? };
                    all.push(unnamed);
                }
                at = row.next;
            }
        }
        Ok(all)
    }

    /// Whether a content has its key's name, and is pinned; `None` where it has no row.
    pub fn name_of(&mut self, uuid: [u8; 16]) -> Result<Option<(bool, bool)>> {
        for index in 0..self.table.heads().segments.high {
            let row: Segment = self.table.get(index)?;
            if row.state == SEALED && row.uuid == uuid {
                return Ok(Some((self.entry(row.entry)?.current == index, row.pinned != 0)));
            }
        }
        Ok(None)
    }

    /// The uuids of all that have a row, those still being filled too.
    pub fn segments(&mut self) -> Result<HashSet<[u8; 16]>> {
        let high = self.table.heads().segments.high;
        self.table.ahead::<Segment>(0, high)?;
        let mut found = HashSet::new();
        for index in 0..high {
            let row: Segment = self.table.get(index)?;
            if row.state != FREE {
                found.insert(row.uuid);
            }
        }
        Ok(found)
    }

    fn named(&mut self, index: u32, found: &Entry) -> Result<Option<Listed>> {
        let bare = Listed {
            key: entry::key(found),
            state: State::Vacant,
            generation: found.generation,
            unnamed: false,
            pinned: false,
            segment: None,
            shared_bytes: 0,
            constructor: Constructor { name: found.constructor.to_text(), code_hash: found.code_hash },
            publisher: None,
            since: found.since,
            holders: Vec::new(),
            reason: found.reason.to_text(),
        };
        Ok(match found.state {
            READY | UNSHAREABLE => match self.current(index)? {
                Some((current, row)) if row.state == WITNESSES => {
                    let holders = self.holders(current)?;
                    let state = if holders.is_empty() { State::Stale } else { State::Unshareable };
                    Some(Listed { state, holders, ..bare })
                }
                Some((current, row)) => Some(self.content(current, &row, found)?),
                None => None,
            },
            LOADING => match self.identity(entry::loader(found))? {
                Some(loader) => Some(Listed { state: State::Loading, publisher: Some(loader), ..bare }),
                None => Some(Listed { state: State::Stale, reason: "its loader died".to_owned(), ..bare }),
            },
            _ if found.failures != 0 || found.failed_episode != 0 || found.oom_deaths != 0 => Some(bare),
            _ => None,
        })
    }

    fn content(&mut self, at: u32, row: &Segment, found: &Entry) -> Result<Listed> {
        let holders = self.holders(at)?;
        let stale = holders.is_empty() && row.pinned == 0;
        Ok(Listed {
            key: entry::key(found),
            state: if stale { State::Stale } else { State::Ready },
            generation: row.generation,
            unnamed: false,
            pinned: row.pinned != 0,
            segment: Some(segment::facts(row)),
            shared_bytes: row.shared_bytes,
            constructor: segment::constructor(row),
            publisher: self.identity(segment::owner(row))?,
            since: row.since,
            holders,
            reason: if stale { "no living process holds it".to_owned() } else { String::new() },
        })
    }

    fn holders(&mut self, index: u32) -> Result<Vec<Holder>> {
        let mut holders = Vec::new();
        let mut at = self.segment(index)?.leases;
        let mut steps = Steps::over(self.table, TableId::Leases);
        while at != NONE {
            steps.next(self.table, "leases of a segment")?;
            let found = self.lease_of(at, index)?;
            if let Some(holder) = self.living(lease::owner(&found))? {
                holders.push(Holder {
                    lease: lease::id(at, &found),
                    identity: process::identity(&holder),
                    fd: found.fd,
                    since: found.since,
                });
            }
            at = found.next;
        }
        Ok(holders)
    }

    /// Takes the names away, at once; the next `acquire` loads. `version` None: every version.
    /// Returns how many names went.
    pub fn remove(&mut self, tag: &str, version: Option<&str>) -> Result<u32> {
        let mut removed = 0;
        for index in self.all_entries()? {
            let found = self.entry(index)?;
            // A row has room for the beginning of a long version; its hash is of all of it.
            let asked = |version: &str| Key { version: version.to_owned(), ..entry::key(&found) };
            let meant = version.is_none_or(|version| entry::key_hash(&asked(version)) == found.hash);
            if found.tag.to_text() != tag || !meant {
                continue;
            }
            removed += u32::from(found.state != VACANT);
            self.unname(index)?;
            self.forget(index)?;
            self.wake(index)?;
            self.settle(index)?;
        }
        Ok(removed)
    }
}
