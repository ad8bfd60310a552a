//! A segment that anybody could have written: header, manifest, skeleton and data as the input says, the checksums made
//! right again where it asks for that.
//!
//! What is accepted must be what docs/format.md says, computed here a second time in 128 bits; and the reader, on a file,
//! must answer as the parser does on bytes.

use std::io::Write;
use std::os::fd::OwnedFd;

use onecopy_core::Error;
use onecopy_core::layout::segment::{ALIGNMENT, BufferRow, Header, MAGIC, MAX_BUFFERS, MAX_SKELETON, PAGE, VERSION};
use onecopy_core::segment::reader;
use onecopy_core::words::{Backend, SegmentFacts};
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use zerocopy::{FromBytes, IntoBytes};

use super::lies::told;

const HEADER: usize = size_of::<Header>();
const ROW: usize = size_of::<BufferRow>();
pub const UUID: [u8; 16] = [5; 16];
/// A reader may take as much memory as the object is long: here, not more than this.
const LARGE: u64 = 1 << 20;

/// What is made right before it is read.
#[derive(Clone, Copy, Debug)]
struct Mend {
    stamp: bool,
    /// The offsets and the total follow from the sizes.
    plan: bool,
    /// The sizes follow from what there is.
    sizes: bool,
    manifest_crc: bool,
    skeleton_crc: bool,
    buffer_crcs: bool,
    header_crc: bool,
    /// Bytes by which the object is shorter than the registry says.
    cut: u16,
}

/// The input: how to mend, how long skeleton and manifest are, then header, manifest, skeleton and data without the
/// zeros between them.
pub fn pack(mend: &[u8; 9], header: &Header, manifest: &[u8], skeleton: &[u8], data: &[u8]) -> Vec<u8> {
    let mut packed = mend.to_vec();
    packed.push(u8::try_from(manifest.len() / ROW).unwrap());
    packed.extend_from_slice(&u16::try_from(skeleton.len()).unwrap().to_le_bytes());
    for part in [header.as_bytes(), manifest, skeleton, data] {
        packed.extend_from_slice(part);
    }
    packed
}

#[derive(Debug)]
struct Input {
    mend: Mend,
    header: Header,
    rows: Vec<BufferRow>,
    skeleton: Vec<u8>,
    data: Vec<u8>,
}

fn unpack(bytes: &[u8]) -> Option<Input> {
    let (mend, bytes) = bytes.split_at_checked(9)?;
    let flag = |at: usize| mend[at] & 1 == 1;
    let mend = Mend {
        stamp: flag(0),
        plan: flag(1),
        sizes: flag(2),
        manifest_crc: flag(3),
        skeleton_crc: flag(4),
        buffer_crcs: flag(5),
        header_crc: flag(6),
        cut: u16::from_le_bytes([mend[7], mend[8]]),
    };
    let ([rows, low, high], bytes) = bytes.split_first_chunk()?;
    let (header, bytes) = Header::read_from_prefix(bytes).ok()?;
    let (manifest, bytes) = bytes.split_at(bytes.len().min(usize::from(*rows) * ROW));
    let (skeleton, data) = bytes.split_at(bytes.len().min(usize::from(u16::from_le_bytes([*low, *high]))));
    let rows = manifest.chunks_exact(ROW).map(|row| BufferRow::read_from_bytes(row).unwrap()).collect();
    Some(Input { mend, header, rows, skeleton: skeleton.to_vec(), data: data.to_vec() })
}

impl Input {
    fn mend(&mut self) {
        let Self { mend, header, rows, skeleton, data } = self;
        if mend.stamp {
            (header.magic, header.version, header.uuid) = (MAGIC, VERSION, UUID);
        }
        if mend.sizes {
            header.buffer_count = rows.len() as u64;
            header.skeleton_bytes = skeleton.len() as u64;
        }
        if mend.plan {
            header.manifest_offset = PAGE;
            header.skeleton_offset = PAGE.wrapping_add(header.buffer_count.wrapping_mul(ROW as u64));
            let end = header.skeleton_offset.wrapping_add(header.skeleton_bytes);
            header.data_offset = end.checked_next_multiple_of(PAGE).unwrap_or(0);
            let end = header.data_offset.wrapping_add(header.data_bytes);
            header.total_bytes = end.checked_next_multiple_of(PAGE).unwrap_or(0);
        }
        if mend.buffer_crcs {
            for row in rows.iter_mut() {
                row.crc = buffer(data, header.data_offset, row).map_or(0, |bytes| crc32fast::hash(&bytes));
            }
        }
        if mend.manifest_crc {
            header.manifest_crc = crc32fast::hash(rows.as_slice().as_bytes());
        }
        if mend.skeleton_crc {
            header.skeleton_crc = crc32fast::hash(skeleton);
        }
        if mend.header_crc {
            *header = header.sealed();
        }
    }

    /// The object: as long as the header says, if that is possible; what does not fit in it is not there.
    fn object(&self) -> (OwnedFd, u64) {
        let length = self.header.total_bytes.clamp(HEADER as u64, 1 << 45);
        let fd = memfd_create("onecopy-fuzz", MemfdFlags::CLOEXEC).unwrap();
        ftruncate(&fd, length).unwrap();
        let put = |offset: u64, bytes: &[u8]| {
            let room = length.saturating_sub(offset).min(bytes.len() as u64);
            let mut file = std::fs::File::from(fd.try_clone().unwrap());
            std::io::Seek::seek(&mut file, std::io::SeekFrom::Start(offset)).unwrap();
            file.write_all(&bytes[..usize::try_from(room).unwrap()]).unwrap();
        };
        put(0, self.header.as_bytes());
        put(PAGE, self.rows.as_slice().as_bytes());
        put(PAGE + (self.rows.len() * ROW) as u64, &self.skeleton);
        if self.header.data_offset < length {
            put(self.header.data_offset, &self.data);
        }
        let there = if length > LARGE && self.header.data_offset > LARGE { LARGE } else { length };
        ftruncate(&fd, there.saturating_sub(u64::from(self.mend.cut))).unwrap();
        (fd, length)
    }
}

/// A small buffer's bytes: those that are there, zeros behind them.
fn buffer(data: &[u8], data_offset: u64, row: &BufferRow) -> Option<Vec<u8>> {
    let start = usize::try_from(row.offset.checked_sub(data_offset)?).ok()?;
    let bytes = usize::try_from(row.bytes).ok().filter(|&bytes| bytes as u64 <= LARGE)?;
    let there = data.get(start.min(data.len())..).unwrap_or_default();
    let mut buffer = there[..there.len().min(bytes)].to_vec();
    buffer.resize(bytes, 0);
    Some(buffer)
}

pub fn run(bytes: &[u8]) {
    if let Some(mut input) = unpack(bytes) {
        input.mend();
        told(&input);
        read(&input);
    }
    // A header cut short.
    let _ = Header::parse(bytes, "bytes", bytes.len() as u64, &UUID);
}

/// How many buffers a reader finds in it, where it is a segment.
pub fn accepted(bytes: &[u8]) -> Option<usize> {
    let mut input = unpack(bytes)?;
    input.mend();
    read(&input).then_some(input.rows.len())
}

/// Parses the bytes, then reads the file, and compares. Whether it is a segment.
fn read(input: &Input) -> bool {
    let (fd, length) = input.object();
    let facts = SegmentFacts { uuid: UUID, backend: Backend::Memfd, bytes: length, device: 0, inode: 0 };
    let parsed = Header::parse(input.header.as_bytes(), "bytes", length, &UUID);
    if let Ok(header) = &parsed {
        place(header);
        let small = header.data_offset <= LARGE;
        if small && header.manifest_bytes() == (input.rows.len() * ROW) as u64 {
            let rows = header.parse_manifest(input.rows.as_slice().as_bytes(), "bytes");
            rows.iter().for_each(|rows| rows_in_place(header, rows));
        }
    } else {
        wrong(parsed.as_ref().map(drop));
    }
    let contents = reader::read(&fd, &facts, "memfd");
    wrong(contents.as_ref().map(drop));
    let Ok(contents) = contents else { return false };
    let header = parsed.expect("the reader accepts what the parser refuses");
    assert_eq!(contents.data_offset, header.data_offset);
    assert_eq!(contents.skeleton.len() as u64, header.skeleton_bytes);
    assert_eq!(crc32fast::hash(&contents.skeleton), header.skeleton_crc);
    if header.data_bytes <= LARGE {
        let verified = reader::verify(&fd, &facts, "memfd");
        wrong(verified.as_ref().map(drop));
        if let Ok(bytes) = verified {
            assert!(bytes <= header.data_bytes, "{bytes} bytes of buffers in {}", header.data_bytes);
            for row in input.rows.iter().take(usize::try_from(header.buffer_count).unwrap()) {
                let found = buffer(&input.data, header.data_offset, row).expect("a buffer in the data area");
                assert_eq!(crc32fast::hash(&found), row.crc, "a buffer that is not what its row says");
            }
        }
    }
    true
}

/// Damage is the only thing that may be said of hostile bytes.
fn wrong(answer: Result<(), &Error>) {
    if let Err(error) = answer {
        assert!(matches!(error, Error::Corrupt { .. }), "{error:?}");
    }
}

fn place(header: &Header) {
    assert!(header.buffer_count <= MAX_BUFFERS && header.skeleton_bytes <= MAX_SKELETON);
    let wide = u128::from;
    let rows = wide(PAGE) + wide(header.buffer_count) * ROW as u128;
    assert_eq!((wide(header.manifest_offset), wide(header.skeleton_offset)), (wide(PAGE), rows));
    let data = (rows + wide(header.skeleton_bytes)).next_multiple_of(wide(PAGE));
    assert_eq!(wide(header.data_offset), data);
    assert_eq!(wide(header.total_bytes), (data + wide(header.data_bytes)).next_multiple_of(wide(PAGE)));
    assert!(i64::try_from(header.total_bytes).is_ok(), "longer than a file can be");
}

fn rows_in_place(header: &Header, rows: &[BufferRow]) {
    let mut free_from = u128::from(header.data_offset);
    for row in rows {
        let (start, bytes) = (u128::from(row.offset), u128::from(row.bytes));
        assert!(start >= free_from && start % u128::from(ALIGNMENT) == 0, "{row:?} overlaps, or is not aligned");
        free_from = start + bytes;
    }
    assert!(free_from <= u128::from(header.data_offset) + u128::from(header.data_bytes), "a buffer beyond the data");
}
