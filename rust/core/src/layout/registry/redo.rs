//! The redo record: every row that a commit changes, so that whoever comes after a crash can finish it.

use std::mem::size_of;

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use super::{TABLES, TableId};

#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct RedoHead {
    /// The commit it belongs to.
    pub number: u64,
    /// Bytes behind this head.
    pub length: u32,
    /// Over those bytes and the number.
    pub checksum: u32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct Item {
    table: u32,
    index: u32,
}

pub const HEAD: usize = size_of::<RedoHead>();

pub(super) const fn bound() -> u64 {
    let mut bytes = size_of::<RedoHead>() as u64;
    let mut at = 0;
    while at < TABLES.len() {
        bytes += (size_of::<Item>() + TABLES[at].stride()) as u64 * TABLES[at].capacity() as u64;
        at += 1;
    }
    bytes
}

/// Rows as stored, with their places, in the order of the file.
pub fn encode<'r>(number: u64, rows: impl Iterator<Item = (TableId, u32, &'r [u8])>) -> Vec<u8> {
    let mut record = vec![0; HEAD];
    for (table, index, bytes) in rows {
        record.extend_from_slice(Item { table: table as u32, index }.as_bytes());
        record.extend_from_slice(bytes);
    }
    let body = &record[HEAD..];
    #[allow(clippy::cast_possible_truncation)] // REDO_BYTES fits, and no record is larger
    let head = RedoHead { number, length: body.len() as u32, checksum: checksum(number, body) };
    record[..HEAD].copy_from_slice(head.as_bytes());
    record
}

pub fn checksum(number: u64, body: &[u8]) -> u32 {
    let mut sum = crc32fast::Hasher::new();
    sum.update(&number.to_ne_bytes());
    sum.update(body);
    sum.finalize()
}

/// The rows of a record's body. `None` where it is not a sequence of rows that fit their tables.
pub fn parse(mut body: &[u8]) -> Option<Vec<(TableId, u32, &[u8])>> {
    let mut rows = Vec::new();
    while !body.is_empty() {
        let (item, rest) = Item::read_from_prefix(body).ok()?;
        let table = TableId::from_number(item.table)?;
        if item.index >= table.capacity() {
            return None;
        }
        let (bytes, rest) = rest.split_at_checked(table.stride())?;
        rows.push((table, item.index, bytes));
        body = rest;
    }
    Some(rows)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cut_or_foreign_record_is_refused() {
        let row = vec![1; TableId::Leases.stride()];
        let record = encode(9, [(TableId::Leases, 5, &row[..])].into_iter());
        let head = RedoHead::read_from_prefix(&record).unwrap().0;
        assert_eq!((head.number, head.length as usize), (9, record.len() - HEAD));
        let body = &record[HEAD..];
        assert_eq!(head.checksum, checksum(9, body));
        assert_eq!(parse(body), Some(vec![(TableId::Leases, 5, &row[..])]));
        assert_eq!(parse(&body[..body.len() - 1]), None);
        let beyond = encode(9, [(TableId::Leases, TableId::Leases.capacity(), &row[..])].into_iter());
        assert_eq!(parse(&beyond[HEAD..]), None);
    }
}
