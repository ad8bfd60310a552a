//! Filling a segment. Nobody else can see it before the registry says READY.

use std::os::fd::OwnedFd;

use rustix::rand::{GetRandomFlags, getrandom};
use zerocopy::IntoBytes;

use crate::layout::segment::{ALIGNMENT, BufferRow, Header, MAGIC, PAGE, Plan, VERSION};
use crate::sys::directory::Directory;
use crate::sys::mapping::{Mapping, STEP};
use crate::sys::object::{self, ObjectId};
use crate::words::{Backend, SegmentFacts};
use crate::{Error, Result};

/// Short enough that a piece is still in the cache when the kernel copies what was just checksummed.
const PIECE: usize = 1 << 20;

/// What will be written, before any memory is taken.
#[derive(Clone, Debug)]
pub struct Outline {
    pub uuid: [u8; 16],
    plan: Plan,
    rows: Vec<BufferRow>,
    data_bytes: u64,
    skeleton_bytes: u64,
}

impl Outline {
    /// `buffers`: (offset from the start of the data area, bytes), in order.
    pub fn new(skeleton_bytes: u64, buffers: &[(u64, u64)], data_bytes: u64) -> Result<Self> {
        let count = buffers.len() as u64;
        let plan = Plan::new(count, skeleton_bytes, data_bytes).ok_or_else(|| {
            Error::Unshareable(format!(
                "{count} buffers, a skeleton of {skeleton_bytes} bytes: beyond the format's limits"
            ))
        })?;
        let mut rows = Vec::with_capacity(buffers.len());
        let mut end = 0;
        for &(offset, bytes) in buffers {
            let stop = offset.checked_add(bytes).filter(|stop| *stop <= data_bytes);
            let gap = offset.checked_sub(end);
            match (gap, stop) {
                // A gap of a page would be a hole, and reading a hole allocates it for the reader.
                (Some(0..PAGE), Some(stop)) if offset.is_multiple_of(ALIGNMENT) => {
                    rows.push(BufferRow { offset: plan.data_offset + offset, bytes, crc: 0, zero: 0 });
                    end = stop;
                }
                _ => {
                    return Err(Error::Unshareable(format!("buffer {offset}+{bytes} out of place (free from {end})")));
                }
            }
        }
        let mut uuid = [0; 16];
        getrandom(&mut uuid, GetRandomFlags::empty()).map_err(|errno| Error::os("getrandom", "uuid", errno))?;
        Ok(Self { uuid, plan, rows, data_bytes, skeleton_bytes })
    }

    pub fn total_bytes(&self) -> u64 {
        self.plan.total_bytes
    }

    pub fn data_offset(&self) -> u64 {
        self.plan.data_offset
    }

    /// Takes the object, and all its room where the backend is bounded by a file system.
    pub fn reserve(self, backend: Backend, directory: &Directory, name: &str, skeleton: &[u8]) -> Result<Filling> {
        let fd = match backend {
            Backend::Memfd => object::create_memfd(name, self.total_bytes())?,
            Backend::Posix => object::create_named(directory, name, self.total_bytes())?,
        };
        let id = object::identify(&fd)?;
        let huge = huge_pages_by_advice().then(|| Mapping::shared_for_filling(&fd, self.total_bytes() as usize).ok());
        let filling = Filling {
            outline: self,
            backend,
            fd,
            id,
            window: huge.flatten(),
            skeleton_crc: crc32fast::hash(skeleton),
            next: 0,
        };
        filling.put(filling.outline.plan.skeleton_offset, skeleton)?;
        Ok(filling)
    }
}

/// An object that is being filled; dropped without `seal`, it is gone (a named one is unlinked by the registry).
#[derive(Debug)]
pub struct Filling {
    outline: Outline,
    backend: Backend,
    fd: OwnedFd,
    id: ObjectId,
    /// Where the system gives huge pages on advice, filling goes through this mapping.
    window: Option<Mapping>,
    skeleton_crc: u32,
    next: usize,
}

impl Filling {
    pub fn uuid(&self) -> [u8; 16] {
        self.outline.uuid
    }

    pub fn id(&self) -> ObjectId {
        self.id
    }

    pub fn fd(&self) -> &OwnedFd {
        &self.fd
    }

    pub fn data_offset(&self) -> u64 {
        self.outline.plan.data_offset
    }

    /// Copies the next buffer in, and returns its offset from the start of the object.
    pub fn fill(&mut self, source: &[u8]) -> Result<u64> {
        let row = self.outline.rows.get(self.next).copied();
        let Some(row) = row.filter(|row| row.bytes == source.len() as u64) else {
            return Err(Error::Unshareable(format!(
                "buffer {} has {} bytes, announced were {:?}",
                self.next,
                source.len(),
                row.map(|row| row.bytes)
            )));
        };
        let mut crc = crc32fast::Hasher::new();
        let mut offset = row.offset;
        let piece = if self.window.is_some() { STEP } else { PIECE };
        for part in source.chunks(piece) {
            crc.update(part);
            self.put(offset, part)?;
            offset += part.len() as u64;
        }
        self.outline.rows[self.next].crc = crc.finalize();
        self.next += 1;
        Ok(row.offset)
    }

    fn put(&self, offset: u64, bytes: &[u8]) -> Result<()> {
        match &self.window {
            Some(window) => window.fill(offset as usize, bytes),
            None => object::write_all(&self.fd, offset, bytes),
        }
    }

    /// Writes manifest and header, then forbids every further write.
    pub fn seal(mut self) -> Result<Sealed> {
        let outline = &self.outline;
        if self.next != outline.rows.len() {
            return Err(Error::Unshareable(format!("{} of {} buffers were filled", self.next, outline.rows.len())));
        }
        let manifest = outline.rows.as_bytes();
        let header = Header {
            magic: MAGIC,
            version: VERSION,
            header_crc: 0,
            uuid: outline.uuid,
            total_bytes: outline.plan.total_bytes,
            manifest_offset: outline.plan.manifest_offset,
            buffer_count: outline.rows.len() as u64,
            skeleton_offset: outline.plan.skeleton_offset,
            skeleton_bytes: outline.skeleton_bytes,
            data_offset: outline.plan.data_offset,
            data_bytes: outline.data_bytes,
            manifest_crc: crc32fast::hash(manifest),
            skeleton_crc: self.skeleton_crc,
        }
        .sealed();
        self.put(outline.plan.manifest_offset, manifest)?;
        self.put(0, header.as_bytes())?;
        // F_SEAL_WRITE is refused (EBUSY) while a writable shared mapping lives.
        self.window = None;
        object::seal(&self.fd, self.backend == Backend::Memfd)?;
        let facts = SegmentFacts {
            uuid: self.outline.uuid,
            backend: self.backend,
            bytes: self.id.bytes,
            device: self.id.device,
            inode: self.id.inode,
        };
        Ok(Sealed { fd: self.fd, facts })
    }
}

/// Complete and immutable; not yet published.
#[derive(Debug)]
pub struct Sealed {
    pub fd: OwnedFd,
    pub facts: SegmentFacts,
}

/// `advise`: huge pages at once for a mapping that asks; in every other mode plain writes are as good or better, and
/// `never` gets its huge pages by collapsing afterwards.
fn huge_pages_by_advice() -> bool {
    std::fs::read_to_string("/sys/kernel/mm/transparent_hugepage/shmem_enabled")
        .is_ok_and(|modes| modes.contains("[advise]"))
}
