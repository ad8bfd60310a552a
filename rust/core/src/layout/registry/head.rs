//! Page 0: whose file this is, how far the commits are, and where each table's free rows begin.

use std::mem::size_of;

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use super::{FORMAT, NONE, Row, TABLES, TableId};

pub const MAGIC: [u8; 8] = *b"onecopyR";

/// Written once, as the last step of making a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Stamp {
    pub magic: [u8; 8],
    pub format: u32,
    /// Checksum over the tables' places, sizes and capacities: another build of the same format is told apart.
    pub layout: u32,
    /// Of this file: tells a process that its file was made anew under the same name.
    pub uuid: [u8; 16],
    pub reserved: [u8; 28],
    pub checksum: u32,
}
const _: () = assert!(size_of::<Stamp>() == 64);

/// Behind the stamp, each written alone.
pub const COMMITTED: u64 = 64;
pub const APPLIED: u64 = 72;
/// Counts those who had to wait for the lock and got it: the only thing that is no part of a commit. It only says that
/// something moves.
pub const TURNS: u64 = 80;
pub const HEADS: u64 = 128;
/// What one read at offset 0 has to cover.
pub const HEAD_BYTES: usize = 256;
const _: () = assert!(HEADS as usize + TableId::Heads.stride() <= HEAD_BYTES);

/// `committed == applied`: nothing to do. `committed == applied + 1`: the redo record is to be applied.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Counters {
    pub committed: u64,
    pub applied: u64,
}

/// Free rows of a table: a chain of rows used before, then those above the high-water mark.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Pool {
    pub free: u32,
    pub high: u32,
}

impl Pool {
    pub const EMPTY: Self = Self { free: NONE, high: 0 };
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Heads {
    /// Source of every generation, episode and lease number of this file; starts at random, so that a number
    /// from another file means nothing here.
    pub serial: u64,
    pub leases: Pool,
    pub segments: Pool,
    pub entries: Pool,
    /// Process rows ever used; free ones are found by looking.
    pub processes: u32,
    /// When everything dead was swept away last: CLOCK_REALTIME in half seconds, its low bits.
    pub swept: u32,
}
const _: () = assert!(size_of::<Heads>() == 40);

impl Row for Heads {
    const TABLE: TableId = TableId::Heads;
}

impl Heads {
    pub fn new(serial: u64) -> Self {
        Self { serial, leases: Pool::EMPTY, segments: Pool::EMPTY, entries: Pool::EMPTY, processes: 0, swept: 0 }
    }

    /// Rows of a table that may be read.
    pub fn limit(&self, table: TableId) -> u32 {
        match table {
            TableId::Heads | TableId::Words | TableId::Buckets => table.capacity(),
            TableId::Processes => self.processes,
            TableId::Leases => self.leases.high,
            TableId::Segments => self.segments.high,
            TableId::Entries => self.entries.high,
        }
    }

    /// The table whose mark lies beyond its capacity, if one does.
    pub fn beyond(&self) -> Option<TableId> {
        TABLES.into_iter().find(|&table| self.limit(table) > table.capacity())
    }
}

impl Stamp {
    pub fn new(uuid: [u8; 16]) -> Self {
        let mut stamp = Self { magic: MAGIC, format: FORMAT, layout: layout(), uuid, reserved: [0; 28], checksum: 0 };
        stamp.checksum = stamp.sum();
        stamp
    }

    pub fn sum(&self) -> u32 {
        let bytes = self.as_bytes();
        crc32fast::hash(&bytes[..bytes.len() - size_of::<u32>()])
    }
}

pub fn layout() -> u32 {
    let mut sum = crc32fast::Hasher::new();
    for table in TABLES {
        sum.update(&table.offset().to_ne_bytes());
        sum.update(&(table.stride() as u64).to_ne_bytes());
        sum.update(&u64::from(table.capacity()).to_ne_bytes());
    }
    sum.finalize()
}
