//! A table on a file: what was changed in this transaction, over what is stored.

use std::collections::{BTreeMap, HashMap};
use std::ops::Range;
use std::os::fd::BorrowedFd;

use super::io;
use super::table::{Stored, Table};
use crate::Result;
use crate::layout::registry::{Heads, TableId, decode, encode};

/// Bytes read at once where rows are read in turn.
const AHEAD: usize = 64 * 1024;

pub struct FileTable<'f> {
    file: BorrowedFd<'f>,
    place: &'f str,
    stored: Heads,
    changes: Changes,
    /// Rows read before: nobody else writes while we have the lock.
    known: HashMap<(TableId, u32), Vec<u8>>,
    ahead: Option<Ahead>,
}

/// Everything a transaction wants done: kept apart so that it can be set aside and taken back.
#[derive(Clone, Debug)]
pub struct Changes {
    pub heads: Heads,
    pub rows: BTreeMap<(TableId, u32), Vec<u8>>,
    /// Named objects whose names go before the commit.
    pub unlinked: Vec<[u8; 16]>,
}

struct Ahead {
    table: TableId,
    rows: Range<u32>,
    bytes: Vec<u8>,
}

impl<'f> FileTable<'f> {
    pub fn new(file: BorrowedFd<'f>, place: &'f str, heads: Heads) -> Self {
        Self { file, place, stored: heads, changes: Changes::none(heads), known: HashMap::new(), ahead: None }
    }

    pub fn changes(&self) -> &Changes {
        &self.changes
    }

    /// Everything since `before` did not happen.
    pub fn take_back(&mut self, before: Changes) {
        self.changes = before;
    }

    pub fn stored_heads(&self) -> Heads {
        self.stored
    }

    /// After a commit: what was changed is stored.
    pub fn committed(&mut self) {
        self.stored = self.changes.heads;
        self.changes = Changes::none(self.stored);
        self.known.clear();
        self.ahead = None;
    }

    fn stored_row(&mut self, table: TableId, index: u32) -> Result<Vec<u8>> {
        if let Some(ahead) = self.ahead.as_mut().filter(|ahead| ahead.table == table) {
            if !ahead.rows.contains(&index) {
                ahead.fill(self.file, self.place, index)?;
            }
            if let Some(row) = ahead.row(index) {
                return Ok(row.to_vec());
            }
        }
        if let Some(row) = self.known.get(&(table, index)) {
            return Ok(row.clone());
        }
        let mut bytes = vec![0; table.stride()];
        let length = io::read(self.file, self.place, &mut bytes, table.place(index))?;
        bytes.truncate(length);
        self.known.insert((table, index), bytes.clone());
        Ok(bytes)
    }
}

impl Changes {
    fn none(heads: Heads) -> Self {
        Self { heads, rows: BTreeMap::new(), unlinked: Vec::new() }
    }
}

impl Ahead {
    fn fill(&mut self, file: BorrowedFd<'_>, place: &str, from: u32) -> Result<()> {
        let stride = self.table.stride();
        let wanted = (AHEAD / stride).min((self.table.capacity().saturating_sub(from)) as usize);
        self.bytes.resize(wanted * stride, 0);
        let length = io::read(file, place, &mut self.bytes, self.table.place(from))?;
        #[allow(clippy::cast_possible_truncation)]
        let rows = (length / stride) as u32;
        self.rows = from..from + rows;
        Ok(())
    }

    fn row(&self, index: u32) -> Option<&[u8]> {
        let stride = self.table.stride();
        let at = index.checked_sub(self.rows.start).filter(|_| self.rows.contains(&index))? as usize * stride;
        self.bytes.get(at..at + stride)
    }
}

impl Table for FileTable<'_> {
    fn place(&self) -> String {
        self.place.to_owned()
    }

    fn capacity(&self, table: TableId) -> u32 {
        table.capacity()
    }

    fn heads(&self) -> Heads {
        self.changes.heads
    }

    fn set_heads(&mut self, heads: Heads) {
        self.changes.heads = heads;
    }

    fn get<R: Stored>(&mut self, index: u32) -> Result<R> {
        let limit = self.changes.heads.limit(R::TABLE);
        if index >= limit {
            return Err(self.corrupt("row number", index, format!("below {limit} ({})", R::TABLE.name())));
        }
        let bytes = match self.changes.rows.get(&(R::TABLE, index)) {
            Some(bytes) => bytes.clone(),
            // A row handed out in this transaction was not written yet, and may hold anything.
            None if index >= self.stored.limit(R::TABLE) => return Ok(R::new_zeroed()),
            None => self.stored_row(R::TABLE, index)?,
        };
        decode(index, &bytes).map_err(|(found, expected)| {
            let what = "checksum of a row";
            self.corrupt(what, format!("{found:08x} in row {index} of {}", R::TABLE.name()), format!("{expected:08x}"))
        })
    }

    fn put<R: Stored>(&mut self, index: u32, row: R) -> Result<()> {
        let limit = self.changes.heads.limit(R::TABLE);
        if index >= limit {
            return Err(self.corrupt("row number", index, format!("below {limit} ({})", R::TABLE.name())));
        }
        self.changes.rows.insert((R::TABLE, index), encode(index, &row));
        Ok(())
    }

    fn ahead<R: Stored>(&mut self, first: u32, count: u32) -> Result<()> {
        if count > 1 {
            self.ahead = Some(Ahead { table: R::TABLE, rows: first..first, bytes: Vec::new() });
        }
        Ok(())
    }

    fn unlink(&mut self, uuid: [u8; 16]) {
        self.changes.unlinked.push(uuid);
    }
}
