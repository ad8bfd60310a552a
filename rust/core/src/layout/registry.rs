//! The registry file: where each table lies, what a row is, and how rows become bytes.
//!
//! ```text
//! page 0       who wrote this file and how (`Stamp`), two commit counters, the heads of the tables
//! page 1       futex words: changed like any other row, mapped only to be slept on
//! ...          hash buckets, processes, leases, segments, entries
//! ...          the redo record of the last commit
//! ```
//!
//! Every row but a futex word is followed by a checksum over its table, its number and its bytes, so that a flipped
//! byte is an error and not a wrong decision. Native byte order: the file never leaves the machine.

pub mod head;
pub mod redo;
pub mod rows;
pub mod text;

use std::mem::size_of;

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

pub use head::{Counters, Heads, Pool, Stamp};
pub use rows::{Bucket, Entry, Lease, Process, Segment, Word};

/// Part of the file's name: other formats live beside it in files of their own.
pub const FORMAT: u32 = 1;

pub const PAGE: u64 = 4096;
/// No row.
pub const NONE: u32 = u32::MAX;

/// Locks on bytes far behind the end of the file: they need no memory.
pub const LIFE: u64 = 1 << 40;
pub const LOCK: u64 = LIFE - 1;

/// One kind of row: where its table lies and how many rows it may have.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u32)]
pub enum TableId {
    Heads = 0,
    Words = 1,
    Buckets = 2,
    Processes = 3,
    Leases = 4,
    Segments = 5,
    Entries = 6,
}

pub const TABLES: [TableId; 7] = [
    TableId::Heads,
    TableId::Words,
    TableId::Buckets,
    TableId::Processes,
    TableId::Leases,
    TableId::Segments,
    TableId::Entries,
];

const CRC: usize = size_of::<u32>();

impl TableId {
    pub fn from_number(number: u32) -> Option<Self> {
        TABLES.get(number as usize).copied()
    }

    pub const fn name(self) -> &'static str {
        match self {
            TableId::Heads => "heads",
            TableId::Words => "futex words",
            TableId::Buckets => "buckets",
            TableId::Processes => "processes",
            TableId::Leases => "leases",
            TableId::Segments => "segments",
            TableId::Entries => "tags",
        }
    }

    pub const fn capacity(self) -> u32 {
        match self {
            TableId::Heads => 1,
            TableId::Words | TableId::Buckets | TableId::Processes => 1024,
            TableId::Leases => 16_384,
            TableId::Segments => 8_192,
            TableId::Entries => 4_096,
        }
    }

    /// Bytes of a row as it is stored.
    pub const fn stride(self) -> usize {
        match self {
            TableId::Heads => size_of::<Heads>() + CRC,
            TableId::Words => size_of::<Word>(),
            TableId::Buckets => size_of::<Bucket>() + CRC,
            TableId::Processes => size_of::<Process>() + CRC,
            TableId::Leases => size_of::<Lease>() + CRC,
            TableId::Segments => size_of::<Segment>() + CRC,
            TableId::Entries => size_of::<Entry>() + CRC,
        }
    }

    /// Where row 0 lies in the file.
    pub const fn offset(self) -> u64 {
        match self {
            TableId::Heads => head::HEADS,
            TableId::Words => PAGE,
            TableId::Buckets => TableId::Words.end(),
            TableId::Processes => TableId::Buckets.end(),
            TableId::Leases => TableId::Processes.end(),
            TableId::Segments => TableId::Leases.end(),
            TableId::Entries => TableId::Segments.end(),
        }
    }

    const fn end(self) -> u64 {
        (self.offset() + self.stride() as u64 * self.capacity() as u64).next_multiple_of(PAGE)
    }

    pub const fn place(self, index: u32) -> u64 {
        self.offset() + self.stride() as u64 * index as u64
    }
}

/// The redo record has room for every row of every table: no transaction can be too large for it.
pub const REDO: u64 = TableId::Entries.end();
pub const REDO_BYTES: u64 = redo::bound().next_multiple_of(PAGE);
/// Length of the file. Sparse: only what is in use takes memory.
pub const FILE_BYTES: u64 = REDO + REDO_BYTES;

/// A row of a table: plain bytes, any value of which is a valid Rust value (not always a sensible one).
pub trait Row: Copy + Eq + std::fmt::Debug + FromBytes + IntoBytes + Immutable + KnownLayout {
    const TABLE: TableId;
}

/// A row and its checksum, as stored.
pub fn encode<R: Row>(index: u32, row: &R) -> Vec<u8> {
    let mut bytes = row.as_bytes().to_vec();
    if R::TABLE.stride() > bytes.len() {
        let sum = checksum(R::TABLE, index, &bytes);
        bytes.extend_from_slice(&sum.to_ne_bytes());
    }
    bytes
}

/// `Err`: (checksum found, checksum expected).
pub fn decode<R: Row>(index: u32, bytes: &[u8]) -> Result<R, (u32, u32)> {
    let (row, rest) = R::read_from_prefix(bytes).map_err(|_| (0, 0))?;
    if R::TABLE.stride() > size_of::<R>() {
        let found = u32::read_from_bytes(rest).map_err(|_| (0, 0))?;
        let expected = checksum(R::TABLE, index, &bytes[..size_of::<R>()]);
        if found != expected {
            return Err((found, expected));
        }
    }
    Ok(row)
}

fn checksum(table: TableId, index: u32, bytes: &[u8]) -> u32 {
    let mut sum = crc32fast::Hasher::new();
    sum.update(&(table as u32).to_ne_bytes());
    sum.update(&index.to_ne_bytes());
    sum.update(bytes);
    sum.finalize()
}

/// The registry of a namespace of a user.
pub fn file_name(uid: u32, namespace: &str) -> String {
    format!("onecopy-v{FORMAT}-{uid}-{namespace}")
}

/// A named segment (backend posix) of that registry.
pub fn segment_name(uid: u32, namespace: &str, uuid: &[u8; 16]) -> String {
    segment_prefix(uid, namespace) + &hex(uuid)
}

pub fn hex(uuid: &[u8; 16]) -> String {
    uuid.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// The uuid that a segment's name ends with.
pub fn uuid_of(name: &str) -> Option<[u8; 16]> {
    let digits = name.get(name.len().checked_sub(32)?..)?;
    let mut uuid = [0; 16];
    for (byte, at) in uuid.iter_mut().zip((0..32).step_by(2)) {
        *byte = u8::from_str_radix(digits.get(at..at + 2)?, 16).ok()?;
    }
    Some(uuid)
}

/// What the names of all its segments begin with; no other namespace's names do, followed by 32 digits.
pub fn segment_prefix(uid: u32, namespace: &str) -> String {
    format!("{}-", file_name(uid, namespace))
}

/// Longest namespace in bytes.
pub const NAMESPACE_MAX: usize = 64;

/// A namespace is part of a file name, and must not read like the name of another namespace's segment.
pub fn namespace_fits(namespace: &str) -> bool {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"._-".contains(&byte);
    let like_a_segment = namespace.rsplit_once('-').is_some_and(|(_, last)| {
        last.len() == 32 && last.bytes().all(|byte| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte))
    });
    !namespace.is_empty() && namespace.len() <= NAMESPACE_MAX && namespace.bytes().all(plain) && !like_a_segment
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tables_do_not_overlap() {
        let mut end = 0;
        for table in TABLES {
            assert!(table.offset() >= end, "{table:?} starts at {} before {end}", table.offset());
            end = table.place(table.capacity());
        }
        assert!(end <= REDO);
    }

    #[test]
    fn a_row_out_of_place_is_refused() {
        let row = Lease::freed(7);
        let bytes = encode(3, &row);
        assert_eq!(bytes.len(), TableId::Leases.stride());
        assert_eq!(decode::<Lease>(3, &bytes), Ok(row));
        assert!(decode::<Lease>(4, &bytes).is_err());
        for at in 0..bytes.len() {
            let mut flipped = bytes.clone();
            flipped[at] ^= 1;
            assert!(decode::<Lease>(3, &flipped).is_err(), "byte {at}");
        }
    }

    #[test]
    fn namespaces() {
        assert!(namespace_fits("default") && namespace_fits("a.b_c-1"));
        assert!(!namespace_fits("") && !namespace_fits("a/b") && !namespace_fits(&"x".repeat(65)));
        assert!(!namespace_fits("a-0123456789abcdef0123456789abcdef"));
        assert_eq!(segment_name(7, "n", &[0xab; 16]), format!("onecopy-v1-7-n-{}", "ab".repeat(16)));
    }
}
