//! Bytes of a segment: one header page, then manifest, skeleton and buffers. `docs/format.md` says it in prose.
//!
//! ```text
//! 0        4096             manifest_offset      skeleton_offset       data_offset                 total_bytes
//! | header | (zero)         | BufferRow * n      | pickle              | buffers, 64-byte aligned  |
//! ```
//! The header is written last. No page is left unwritten: reading a hole would allocate it for the reader.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::{Error, Result};

pub const MAGIC: [u8; 8] = *b"ONECOPYS";
pub const VERSION: u32 = 1;
pub const PAGE: u64 = 4096;
/// TensorFlow aborts and JAX copies where a buffer is aligned to less.
pub const ALIGNMENT: u64 = 64;
/// A skeleton is copied to private memory: more than this is not a skeleton.
pub const MAX_SKELETON: u64 = 4 << 30;
pub const MAX_BUFFERS: u64 = 1 << 24;

#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct Header {
    pub magic: [u8; 8],
    pub version: u32,
    /// CRC-32 of this struct with this field zero.
    pub header_crc: u32,
    pub uuid: [u8; 16],
    /// Length of the object, a multiple of `PAGE`.
    pub total_bytes: u64,
    pub manifest_offset: u64,
    pub buffer_count: u64,
    pub skeleton_offset: u64,
    pub skeleton_bytes: u64,
    pub data_offset: u64,
    pub data_bytes: u64,
    /// Of the object, in huge pages already when it was sealed. Told, not relied on: the kernel may change it at any time.
    pub huge_bytes: u64,
    pub manifest_crc: u32,
    pub skeleton_crc: u32,
}
const _: () = assert!(size_of::<Header>() == 104);

/// One buffer: where it lies in the object, and its CRC-32, which `onecopy verify` checks.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct BufferRow {
    /// From the start of the object.
    pub offset: u64,
    pub bytes: u64,
    pub crc: u32,
    pub zero: u32,
}
const _: () = assert!(size_of::<BufferRow>() == 24);

/// Where everything lies, computed once from the sizes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Plan {
    pub manifest_offset: u64,
    pub skeleton_offset: u64,
    pub data_offset: u64,
    pub total_bytes: u64,
}

impl Plan {
    /// None where the sizes overflow or exceed the format's limits.
    pub fn new(buffer_count: u64, skeleton_bytes: u64, data_bytes: u64) -> Option<Self> {
        if buffer_count > MAX_BUFFERS || skeleton_bytes > MAX_SKELETON {
            return None;
        }
        let manifest_offset = PAGE;
        let skeleton_offset = manifest_offset + buffer_count * size_of::<BufferRow>() as u64;
        let data_offset = (skeleton_offset + skeleton_bytes).next_multiple_of(PAGE);
        let total_bytes = data_offset.checked_add(data_bytes)?.checked_next_multiple_of(PAGE)?;
        (total_bytes <= i64::MAX as u64).then_some(Self { manifest_offset, skeleton_offset, data_offset, total_bytes })
    }
}

impl Header {
    /// The header's own bytes, checksum included.
    pub fn sealed(mut self) -> Self {
        self.header_crc = 0;
        self.header_crc = crc32fast::hash(self.as_bytes());
        self
    }

    /// Reads a header that came out of an object of `object_bytes` and should carry `uuid`.
    ///
    /// # Errors
    /// `Corrupt`, naming what was found and what was expected.
    pub fn parse(bytes: &[u8], place: &str, object_bytes: u64, uuid: &[u8; 16]) -> Result<Self> {
        let (header, _) =
            Header::read_from_prefix(bytes).map_err(|_| wrong(place, "cut short", bytes.len(), size_of::<Header>()))?;
        if header.magic != MAGIC {
            return Err(wrong(place, "not a segment", hex(&header.magic), hex(&MAGIC)));
        }
        if header.version != VERSION {
            return Err(wrong(place, "segment of another format version", header.version, VERSION));
        }
        if header.sealed().header_crc != header.header_crc {
            return Err(wrong(place, "header checksum", header.header_crc, header.sealed().header_crc));
        }
        if header.uuid != *uuid {
            return Err(wrong(place, "segment of another model", hex(&header.uuid), hex(uuid)));
        }
        let plan = Plan::new(header.buffer_count, header.skeleton_bytes, header.data_bytes)
            .ok_or_else(|| wrong(place, "sizes beyond the format's limits", header.skeleton_bytes, MAX_SKELETON))?;
        let found = Plan {
            manifest_offset: header.manifest_offset,
            skeleton_offset: header.skeleton_offset,
            data_offset: header.data_offset,
            total_bytes: header.total_bytes,
        };
        if found != plan || header.total_bytes != object_bytes {
            return Err(wrong(place, "offsets", format!("{found:?}"), format!("{plan:?} in {object_bytes} bytes")));
        }
        Ok(header)
    }

    pub fn manifest_bytes(&self) -> u64 {
        self.buffer_count * size_of::<BufferRow>() as u64
    }

    /// Reads the manifest: rows in order, inside the data area, not overlapping.
    pub fn parse_manifest(&self, bytes: &[u8], place: &str) -> Result<Vec<BufferRow>> {
        if bytes.len() as u64 != self.manifest_bytes() {
            return Err(wrong(place, "manifest cut short", bytes.len(), self.manifest_bytes()));
        }
        let crc = crc32fast::hash(bytes);
        if crc != self.manifest_crc {
            return Err(wrong(place, "manifest checksum", crc, self.manifest_crc));
        }
        let mut free_from = self.data_offset;
        let end = self.data_offset + self.data_bytes;
        let mut rows = Vec::with_capacity(bytes.len() / size_of::<BufferRow>());
        for chunk in bytes.chunks_exact(size_of::<BufferRow>()) {
            let row = BufferRow::read_from_bytes(chunk).map_err(|_| wrong(place, "manifest row", chunk.len(), 24))?;
            let stop = row.offset.checked_add(row.bytes).filter(|stop| *stop <= end);
            let (true, true, Some(stop)) = (row.offset >= free_from, row.offset.is_multiple_of(ALIGNMENT), stop) else {
                let expected = format!("aligned to {ALIGNMENT}, in {free_from}..{end}");
                return Err(wrong(
                    place,
                    "buffer outside its place",
                    format!("{}+{}", row.offset, row.bytes),
                    expected,
                ));
            };
            free_from = stop;
            rows.push(row);
        }
        Ok(rows)
    }

    /// Checks the skeleton's checksum. Nothing is unpickled before.
    pub fn check_skeleton(&self, bytes: &[u8], place: &str) -> Result<()> {
        let crc = crc32fast::hash(bytes);
        if bytes.len() as u64 != self.skeleton_bytes || crc != self.skeleton_crc {
            return Err(wrong(place, "skeleton checksum", crc, self.skeleton_crc));
        }
        Ok(())
    }
}

pub fn wrong(place: &str, what: &'static str, found: impl ToString, expected: impl ToString) -> Error {
    Error::Corrupt {
        place: place.to_owned(),
        what,
        found: found.to_string(),
        expected: expected.to_string(),
        remedy: "Remove the model with `onecopy rm`; the next acquire loads it again",
    }
}

pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const UUID: [u8; 16] = [5; 16];

    fn header(skeleton: &[u8], rows: &[BufferRow], data_bytes: u64) -> Header {
        let plan = Plan::new(rows.len() as u64, skeleton.len() as u64, data_bytes).unwrap();
        Header {
            magic: MAGIC,
            version: VERSION,
            header_crc: 0,
            uuid: UUID,
            total_bytes: plan.total_bytes,
            manifest_offset: plan.manifest_offset,
            buffer_count: rows.len() as u64,
            skeleton_offset: plan.skeleton_offset,
            skeleton_bytes: skeleton.len() as u64,
            data_offset: plan.data_offset,
            data_bytes,
            huge_bytes: 0,
            manifest_crc: crc32fast::hash(rows.as_bytes()),
            skeleton_crc: crc32fast::hash(skeleton),
        }
        .sealed()
    }

    fn two_rows() -> Vec<BufferRow> {
        let start = Plan::new(2, 3, 1024).unwrap().data_offset;
        let row = |offset, bytes| BufferRow { offset: start + offset, bytes, crc: 0, zero: 0 };
        vec![row(0, 100), row(128, 896)]
    }

    #[test]
    fn what_was_written_is_read() {
        let rows = two_rows();
        let header = header(b"abc", &rows, 1024);
        let read = Header::parse(header.as_bytes(), "here", header.total_bytes, &UUID).unwrap();
        assert_eq!(read.parse_manifest(rows.as_bytes(), "here").unwrap(), rows);
        read.check_skeleton(b"abc", "here").unwrap();
        assert!(read.check_skeleton(b"abd", "here").is_err());
    }

    #[test]
    fn each_damage_is_named() {
        let good = header(b"abc", &two_rows(), 1024);
        let said = |header: Header, bytes: u64, uuid: &[u8; 16]| {
            Header::parse(header.as_bytes(), "/dev/shm/x", bytes, uuid).unwrap_err().to_string()
        };
        assert!(said(Header { magic: *b"notours!", ..good }, good.total_bytes, &UUID).contains("not a segment"));
        assert!(said(Header { version: 9, ..good }, good.total_bytes, &UUID).contains("format version"));
        assert!(said(Header { data_bytes: 9, ..good }, good.total_bytes, &UUID).contains("header checksum"));
        assert!(said(good, good.total_bytes, &[6; 16]).contains("another model"));
        assert!(said(good, good.total_bytes + 4096, &UUID).contains("offsets"));
        assert!(said(Header { data_offset: 1 << 40, ..good }.sealed(), good.total_bytes, &UUID).contains("offsets"));
        let huge = Header { skeleton_bytes: u64::MAX, ..good }.sealed();
        assert!(said(huge, good.total_bytes, &UUID).contains("limits"));
    }

    #[test]
    fn buffers_that_overlap_or_leave_the_data_area_are_refused() {
        let mut rows = two_rows();
        rows[1].offset = rows[0].offset + 64;
        assert!(header(b"abc", &rows, 1024).parse_manifest(rows.as_bytes(), "here").is_err());
        let mut rows = two_rows();
        rows[1].bytes = u64::MAX;
        assert!(header(b"abc", &rows, 1024).parse_manifest(rows.as_bytes(), "here").is_err());
    }

    proptest! {
        #[test]
        fn no_bytes_make_it_panic(bytes in proptest::collection::vec(any::<u8>(), 0..256), length in any::<u64>()) {
            let _ = Header::parse(&bytes, "here", length, &UUID);
        }

        #[test]
        fn a_flipped_bit_is_found(bit in 0usize..size_of::<Header>() * 8) {
            let good = header(b"abc", &two_rows(), 1024);
            let mut bytes = good.as_bytes().to_vec();
            bytes[bit / 8] ^= 1 << (bit % 8);
            prop_assert!(Header::parse(&bytes, "here", good.total_bytes, &UUID).is_err());
        }
    }
}
