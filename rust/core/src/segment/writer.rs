//! Filling a segment. Nobody else can see it before the registry says READY.

use std::os::fd::OwnedFd;
use std::thread;

use rustix::rand::{GetRandomFlags, getrandom};
use zerocopy::IntoBytes;

use crate::layout::segment::{ALIGNMENT, BufferRow, Header, MAGIC, PAGE, Plan, VERSION};
use crate::sys::directory::Directory;
use crate::sys::huge::Window;
use crate::sys::object::{self, ObjectId};
use crate::words::{Backend, Huge, SegmentFacts};
use crate::{Error, Result};

/// Short enough that a piece is still in the cache when what was just checksummed is copied.
const PIECE: usize = 256 << 10;
/// From here on a buffer's checksum is made in a thread beside the copy: it would take a third of the time again.
const BESIDE: usize = 4 << 20;

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
    pub fn reserve(
        self,
        backend: Backend,
        huge: Huge,
        directory: &Directory,
        name: &str,
        skeleton: &[u8],
    ) -> Result<Filling> {
        let fd = match backend {
            Backend::Memfd => object::create_memfd(name, self.total_bytes())?,
            Backend::Posix => object::create_named(directory, name, self.total_bytes())?,
        };
        let id = object::identify(&fd)?;
        // A named file could be cut short by its owner's other processes, and writing to a mapping of it would be SIGBUS.
        let window =
            if backend == Backend::Memfd { Window::open(&fd, self.total_bytes() as usize, huge) } else { None };
        let mut filling =
            Filling { outline: self, backend, fd, id, window, skeleton_crc: crc32fast::hash(skeleton), next: 0 };
        let offset = filling.outline.plan.skeleton_offset;
        filling.put(offset, skeleton)?;
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
    /// Where the kernel gives huge pages, filling goes through this mapping.
    window: Option<Window>,
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
        let crc = if source.len() < BESIDE {
            let mut crc = crc32fast::Hasher::new();
            for (index, part) in source.chunks(PIECE).enumerate() {
                crc.update(part);
                self.put(row.offset + (index * PIECE) as u64, part)?;
            }
            crc.finalize()
        } else {
            thread::scope(|scope| {
                let checksum = || crc32fast::hash(source);
                let other = thread::Builder::new().name("onecopy-checksum".into()).spawn_scoped(scope, checksum);
                self.put(row.offset, source)?;
                Ok(other.ok().and_then(|thread| thread.join().ok()).unwrap_or_else(checksum))
            })?
        };
        self.outline.rows[self.next].crc = crc;
        self.next += 1;
        Ok(row.offset)
    }

    fn put(&mut self, offset: u64, bytes: &[u8]) -> Result<()> {
        match &mut self.window {
            Some(window) => window.write(&self.fd, offset, bytes),
            None => object::write_all(&self.fd, offset, bytes),
        }
    }

    /// Writes manifest and header, then forbids every further write.
    pub fn seal(mut self) -> Result<Sealed> {
        if self.next != self.outline.rows.len() {
            return Err(Error::Unshareable(format!(
                "{} of {} buffers were filled",
                self.next,
                self.outline.rows.len()
            )));
        }
        let rows = std::mem::take(&mut self.outline.rows);
        let manifest = rows.as_bytes();
        let Outline { uuid, plan, data_bytes, skeleton_bytes, .. } = self.outline;
        self.put(plan.manifest_offset, manifest)?;
        let huge_bytes = self.window.as_ref().map_or(0, Window::huge_bytes) as u64;
        let header = Header {
            magic: MAGIC,
            version: VERSION,
            header_crc: 0,
            uuid,
            total_bytes: plan.total_bytes,
            manifest_offset: plan.manifest_offset,
            buffer_count: rows.len() as u64,
            skeleton_offset: plan.skeleton_offset,
            skeleton_bytes,
            data_offset: plan.data_offset,
            data_bytes,
            huge_bytes,
            manifest_crc: crc32fast::hash(manifest),
            skeleton_crc: self.skeleton_crc,
        }
        .sealed();
        self.put(0, header.as_bytes())?;
        // F_SEAL_WRITE is refused (EBUSY) while a writable shared mapping lives.
        self.window = None;
        object::seal(&self.fd, self.backend == Backend::Memfd)?;
        let facts = SegmentFacts {
            uuid,
            backend: self.backend,
            bytes: self.id.bytes,
            device: self.id.device,
            inode: self.id.inode,
        };
        Ok(Sealed { fd: self.fd, facts, huge_bytes })
    }
}

/// Complete and immutable; not yet published.
#[derive(Debug)]
pub struct Sealed {
    pub fd: OwnedFd,
    pub facts: SegmentFacts,
    pub huge_bytes: u64,
}
