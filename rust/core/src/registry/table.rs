//! What a transition works on: rows by kind and number, and the answer to "is that process alive".

use crate::layout::registry::{Bucket, Entry, Heads, Lease, NONE, Process, Row, Segment, TableId, Word};
use crate::{Error, Result};

/// Rows of a registry. Reading checks the number against the heads, so a stored link may be followed as it is.
pub trait Table {
    /// For messages.
    fn place(&self) -> String;
    fn capacity(&self, table: TableId) -> u32;
    fn heads(&self) -> Heads;
    fn set_heads(&mut self, heads: Heads);
    /// # Errors
    /// `Corrupt` where there is no such row, or its bytes are damaged.
    fn get<R: Stored>(&mut self, index: u32) -> Result<R>;
    fn put<R: Stored>(&mut self, index: u32, row: R) -> Result<()>;
    /// A hint: the rows from `first` on will be read in turn.
    fn ahead<R: Stored>(&mut self, first: u32, count: u32) -> Result<()> {
        let _ = (first, count);
        Ok(())
    }
    /// A named object nobody will ask for again: its name goes before the commit, its memory after.
    fn unlink(&mut self, uuid: [u8; 16]);

    fn corrupt(&self, what: &'static str, found: impl ToString, expected: impl ToString) -> Error {
        Error::Corrupt {
            place: self.place(),
            what,
            found: found.to_string(),
            expected: expected.to_string(),
            remedy: REMEDY,
        }
    }

    fn edit<R: Stored>(&mut self, index: u32, change: impl FnOnce(&mut R)) -> Result<()> {
        let mut row = self.get(index)?;
        change(&mut row);
        self.put(index, row)
    }

    /// The next number of this registry; never 0, never given twice.
    fn serial(&mut self) -> u64 {
        let mut heads = self.heads();
        heads.serial = heads.serial.wrapping_add(1).max(1);
        self.set_heads(heads);
        heads.serial
    }
}

/// What to do about a registry that is not one.
pub const REMEDY: &str =
    "Models load privately meanwhile; when no process uses this namespace any more, remove that file";

/// Who lives. The table's row must agree as well; `Transition::alive` asks both.
pub trait Oracle {
    /// Somebody holds the life lock of this process row.
    fn holds(&mut self, slot: u32) -> Result<bool>;
}

/// A row that some table of `Rows` stores.
pub trait Stored: Row {
    fn of(rows: &mut Rows) -> &mut Vec<Self>;
}

/// A row that is handed out and given back.
pub trait Pooled: Stored {
    fn pool(heads: &mut Heads) -> &mut crate::layout::registry::Pool;
    fn freed(next: u32) -> Self;
    /// The next free row, if this one is free.
    fn free_link(&self) -> Option<u32>;
}

/// The tables in plain memory, as small as one likes: for tests, and for a model checker.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Rows {
    pub heads: Heads,
    pub words: Vec<Word>,
    pub buckets: Vec<Bucket>,
    pub processes: Vec<Process>,
    pub leases: Vec<Lease>,
    pub segments: Vec<Segment>,
    pub entries: Vec<Entry>,
    /// Objects whose names were given up; whoever steps the table empties it.
    pub unlinked: Vec<[u8; 16]>,
}

/// A table in memory. Its capacities are the lengths of its vectors.
pub type MemTable = Rows;

impl Rows {
    /// `serial`: where its numbers begin.
    pub fn new(serial: u64, processes: usize, entries: usize, segments: usize, leases: usize) -> Self {
        Self {
            heads: Heads::new(serial),
            words: vec![Word::BLANK; 2],
            buckets: vec![Bucket::BLANK; 2],
            processes: vec![Process::BLANK; processes],
            leases: vec![Lease::BLANK; leases],
            segments: vec![Segment::BLANK; segments],
            entries: vec![Entry::BLANK; entries],
            unlinked: Vec::new(),
        }
    }
}

impl Table for Rows {
    fn place(&self) -> String {
        "a table in memory".to_owned()
    }

    fn capacity(&self, table: TableId) -> u32 {
        let length = match table {
            TableId::Heads => 1,
            TableId::Words => self.words.len(),
            TableId::Buckets => self.buckets.len(),
            TableId::Processes => self.processes.len(),
            TableId::Leases => self.leases.len(),
            TableId::Segments => self.segments.len(),
            TableId::Entries => self.entries.len(),
        };
        u32::try_from(length).unwrap_or(NONE)
    }

    fn heads(&self) -> Heads {
        self.heads
    }

    fn set_heads(&mut self, heads: Heads) {
        self.heads = heads;
    }

    fn get<R: Stored>(&mut self, index: u32) -> Result<R> {
        let limit = self.heads.limit(R::TABLE).min(self.capacity(R::TABLE));
        if index >= limit {
            return Err(self.corrupt("row number", index, format!("below {limit} ({})", R::TABLE.name())));
        }
        Ok(R::of(self)[index as usize])
    }

    fn put<R: Stored>(&mut self, index: u32, row: R) -> Result<()> {
        self.get::<R>(index)?;
        R::of(self)[index as usize] = row;
        Ok(())
    }

    fn unlink(&mut self, uuid: [u8; 16]) {
        self.unlinked.push(uuid);
    }
}

macro_rules! stored {
    ($($row:ident in $field:ident),*) => {
        $(impl Stored for $row {
            fn of(rows: &mut Rows) -> &mut Vec<Self> {
                &mut rows.$field
            }
        })*
    };
}

stored!(Word in words, Bucket in buckets, Process in processes, Lease in leases, Segment in segments, Entry in entries);

macro_rules! pooled {
    ($($row:ident in $field:ident),*) => {
        $(impl Pooled for $row {
            fn pool(heads: &mut Heads) -> &mut crate::layout::registry::Pool {
                &mut heads.$field
            }

            fn freed(next: u32) -> Self {
                $row::freed(next)
            }

            fn free_link(&self) -> Option<u32> {
                (self.state == crate::layout::registry::rows::FREE).then_some(self.next)
            }
        })*
    };
}

pooled!(Lease in leases, Segment in segments, Entry in entries);
