//! This process in a table: its row, and the lock that says it lives.

use super::file;
use super::overlay::FileTable;
use super::request::{Holding, LeaseId, ProcessId};
use super::session::{LifeLocks, now};
use super::table::Table;
use super::transition::Transition;
use crate::layout::registry::rows::LIVE;
use crate::layout::registry::{LIFE, Process, TableId};
use crate::sys::directory::Directory;
use crate::sys::lock::{self, FileId, Kept};
use crate::sys::process;
use crate::{Error, Result};

/// A segment that came along, by its uuid, and its new lease.
pub type Restored = ([u8; 16], LeaseId);

/// The file to enter, which is locked.
pub struct Home<'h> {
    pub directory: &'h Directory,
    pub name: &'h str,
    pub id: FileId,
    pub uuid: [u8; 16],
}

#[derive(Debug)]
pub struct Member {
    /// Of the table that `me` is a row of.
    table: [u8; 16],
    pub me: ProcessId,
    life: Kept,
}

impl Member {
    /// As far as others can see: our life lock's descriptor was not closed (daemons close everything).
    pub fn looks_alive(&self) -> bool {
        self.life.fd().is_some()
    }

    /// Still in this table: our row says so, and we look alive.
    pub fn valid(&self, uuid: [u8; 16], table: &mut FileTable<'_>, oracle: &mut LifeLocks<'_>) -> Result<bool> {
        if self.table != uuid || self.me.slot >= table.heads().processes || !self.looks_alive() {
            return Ok(false);
        }
        let row: Process = table.get(self.me.slot)?;
        let ours = row.state == LIVE && row.generation == self.me.generation;
        if ours {
            oracle.know(self.me.slot, true);
        }
        Ok(ours)
    }

    /// Enters this process and what it holds. The caller commits, then sweeps; the leases are for those who hold.
    pub fn join(
        home: &Home<'_>,
        holdings: &[Holding],
        table: &mut FileTable<'_>,
        oracle: &mut LifeLocks<'_>,
    ) -> Result<(Self, Vec<Restored>)> {
        let Home { directory, name, id, uuid } = *home;
        let place = directory.shown(name);
        let life = Kept::open(process::high_descriptor(), || file::open(directory, name))
            .map_err(|error| file::explain(directory, name, error))?;
        let moved = || Error::os("open", &place, std::io::Error::other("it was replaced just now; try again"));
        let fd = life.fd().filter(|_| life.id() == id).ok_or_else(moved)?;

        let mut transition = Transition { table, oracle, now: now() };
        let mut from = 0;
        let mut swept = false;
        let slot = loop {
            match transition.free_slot(from)? {
                Some(slot) => {
                    // Held by somebody who is not in the table: it was written anew under him. He will come back.
                    if lock::try_lock(fd, LIFE + u64::from(slot)).map_err(|error| Error::os("lock", &place, error))? {
                        break slot;
                    }
                    from = slot + 1;
                }
                None if !swept => {
                    transition.bury_dead()?;
                    (swept, from) = (true, 0);
                }
                None => {
                    let kind = TableId::Processes;
                    return Err(Error::Full { place, table: kind.name(), capacity: kind.capacity() });
                }
            }
        };
        let me = transition.join(slot, &process::identity())?;
        transition.oracle.know(slot, true);
        // Before anybody sweeps: where we come back, our old leases are a dead process's, and what they hold would go.
        let mut leases = Vec::new();
        for holding in holdings {
            match transition.restore(me, holding) {
                Ok(lease) => leases.push((holding.content.facts.uuid, lease)),
                Err(Error::Full { .. }) => {}
                Err(error) => return Err(error),
            }
        }
        Ok((Self { table: uuid, me, life }, leases))
    }
}
