//! Mappings of a segment: private views for use, and the temporary ones for filling, prefaulting and huge pages.
//!
//! # Safety
//! A `Mapping` owns its address range: it is unmapped once, by `Drop`, and nobody else unmaps or moves it. No Rust
//! reference is formed over mapped bytes; they leave as an address and a length, owned by what holds the `Mapping`.
#![allow(unsafe_code)]

use std::ffi::c_void;
use std::os::fd::OwnedFd;
use std::ptr::{self, NonNull};

use rustix::io::Errno;
use rustix::mm::{self, Advice, MapFlags, MprotectFlags, ProtFlags};

use crate::{Error, Result};

/// Size and alignment of a huge page on x86-64 and on arm64 with 4 KiB pages.
pub const HUGE: usize = 2 << 20;
/// Bytes per call of a long madvise: one call of 2 GiB blocks other threads' mmap for 0.2 s.
pub const STEP: usize = 16 << 20;
/// MADV_COLLAPSE (Linux 6.1), missing in rustix.
const MADV_COLLAPSE: i32 = 25;

#[derive(Debug)]
pub struct Mapping {
    address: NonNull<c_void>,
    /// Length of the range, a multiple of `HUGE`; bytes beyond the object's end must not be touched.
    range: usize,
    bytes: usize,
}

// SAFETY: the range is plain memory of the process; nothing about it belongs to one thread.
unsafe impl Send for Mapping {}
// SAFETY: as above, and no method gives a Rust reference to the bytes.
unsafe impl Sync for Mapping {}

/// Makes a fresh mapping usable. Where the process locks all its memory (mlockall(2), MCL_FUTURE), a writable private
/// mapping would be filled with copies at once: it is made without rights, unlocked, and only then opened.
fn allow(address: *mut c_void, range: usize, protection: ProtFlags) -> rustix::io::Result<()> {
    // SAFETY: the range was mapped just now, whole; nobody has a reference into it.
    unsafe {
        // Without locked memory this does nothing.
        let _ = mm::munlock(address, range);
        mm::mprotect(address, range, MprotectFlags::from_bits_retain(protection.bits()))
    }
}

impl Mapping {
    /// The view that users get: reads share the object's pages, a write copies one page for this process alone
    /// (MAP_PRIVATE, mmap(2)). Not counted against overcommit, not in core dumps, 2 MiB aligned.
    pub fn private(fd: &OwnedFd, bytes: usize) -> Result<Self> {
        Self::map(fd, bytes, ProtFlags::READ | ProtFlags::WRITE, MapFlags::PRIVATE | MapFlags::NORESERVE)
    }

    /// The view through which huge pages are filled at once. Not inherited by fork: a child would keep F_SEAL_WRITE busy.
    pub fn shared_for_filling(fd: &OwnedFd, bytes: usize) -> Result<Self> {
        let mapping = Self::map(fd, bytes, ProtFlags::READ | ProtFlags::WRITE, MapFlags::SHARED)?;
        mapping.advise_all(Advice::LinuxDontFork)?;
        mapping.advise_all(Advice::LinuxHugepage)?;
        Ok(mapping)
    }

    fn map(fd: &OwnedFd, bytes: usize, protection: ProtFlags, flags: MapFlags) -> Result<Self> {
        let range = bytes.div_ceil(HUGE).max(1) * HUGE;
        let reserved = range + HUGE;
        let failed = |errno: Errno| Error::os("mmap", format!("{bytes} bytes of a segment"), errno);
        // SAFETY: a fresh anonymous range chosen by the kernel; nothing can lie in it.
        let base = unsafe {
            mm::mmap_anonymous(ptr::null_mut(), reserved, ProtFlags::empty(), MapFlags::PRIVATE | MapFlags::NORESERVE)
        }
        .map_err(failed)?;
        let skip = base.addr().wrapping_neg() % HUGE;
        let start = base.wrapping_byte_add(skip);
        // SAFETY: [start, start + range) lies inside the reservation just made, which nobody else knows: MAP_FIXED
        // replaces our own PROT_NONE pages only.
        let mapped = unsafe { mm::mmap(start, range, ProtFlags::empty(), flags | MapFlags::FIXED, fd, 0) }
            .and_then(|address| allow(address, range, protection).map(|()| address));
        let trim = |from: *mut c_void, length: usize| {
            if length > 0 {
                // SAFETY: a part of the reservation outside of the mapped range; no address in it was ever given out.
                let _ = unsafe { mm::munmap(from, length) };
            }
        };
        match mapped {
            Ok(address) => {
                trim(base, skip);
                trim(start.wrapping_byte_add(range), HUGE - skip);
                let address = NonNull::new(address).ok_or_else(|| failed(Errno::NOMEM))?;
                let mapping = Self { address, range, bytes };
                mapping.advise_all(Advice::LinuxDontDump)?;
                Ok(mapping)
            }
            Err(errno) => {
                trim(base, reserved);
                Err(failed(errno))
            }
        }
    }

    pub fn address(&self) -> usize {
        self.address.as_ptr().addr()
    }

    pub fn bytes(&self) -> usize {
        self.bytes
    }

    fn advise_all(&self, advice: Advice) -> Result<()> {
        // SAFETY: the whole of our own range; none of the advices used here (DONTDUMP, DONTFORK, HUGEPAGE) changes content.
        unsafe { mm::madvise(self.address.as_ptr(), self.range, advice) }
            .map_err(|errno| Error::os("madvise", "segment", errno))
    }

    /// Copies into a mapping made by `shared_for_filling`: pages are taken by MADV_POPULATE_WRITE first, which fails
    /// cleanly where touching them would be SIGBUS.
    pub fn fill(&self, offset: usize, source: &[u8]) -> Result<()> {
        let end = offset.checked_add(source.len()).filter(|end| *end <= self.bytes);
        let Some(end) = end else {
            return Err(Error::os("fill", "segment: beyond its end", Errno::INVAL));
        };
        let first = offset / 4096 * 4096;
        let length = end.div_ceil(4096) * 4096 - first;
        let failed = |errno| Error::os("madvise(MADV_POPULATE_WRITE)", "segment", errno);
        // SAFETY: whole pages of our range, none beyond the object's last page: it may be cut by nobody, as it is unnamed
        // or ours, and still unpublished.
        unsafe { mm::madvise(self.address.as_ptr().wrapping_byte_add(first), length, Advice::LinuxPopulateWrite) }
            .map_err(failed)?;
        // SAFETY: `source` is valid for its length; the destination [offset, end) was checked to lie in the range and its
        // pages are present; the two cannot overlap, as nobody has a reference into the mapping.
        unsafe {
            ptr::copy_nonoverlapping(
                source.as_ptr(),
                self.address.as_ptr().cast::<u8>().wrapping_add(offset),
                source.len(),
            );
        }
        Ok(())
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the range is ours alone, and whoever drops us says that no view of it is left.
        let _ = unsafe { mm::munmap(self.address.as_ptr(), self.range) };
    }
}

/// Maps the pages of an object at `address` into the page table, `STEP` at a time, while it is `wanted`. Copies nothing
/// (MADV_POPULATE_READ, Linux 5.14; elsewhere it does nothing). Keeps nothing: in a forked child a thread's references
/// would stay for ever.
pub fn prefault(address: usize, bytes: usize, wanted: impl Fn() -> bool) {
    let whole_pages = bytes.div_ceil(4096) * 4096;
    for from in (0..whole_pages).step_by(STEP) {
        if !wanted() {
            return;
        }
        let length = STEP.min(whole_pages - from);
        let start = ptr::without_provenance_mut(address + from);
        // SAFETY: populating for reading changes no content, and fails where nothing is mapped. Should the mapping go in the
        // middle of a step, and another one come, some pages of that one are mapped ahead of use.
        if unsafe { mm::madvise(start, length, Advice::LinuxPopulateRead) }.is_err() {
            return;
        }
    }
}

/// Turns one `STEP` of the object's pages, from `from` on, into huge ones, and says where the next step begins; None: done,
/// or the kernel does not want to. Through a PROT_NONE mapping of its own: a private page in a user's mapping would stop
/// it. Works on sealed objects and where `shmem_enabled` is `never`; Linux before 6.1 says EINVAL, and that is all right.
/// A tail of less than a huge page is left alone: it would become a whole one, up to 2 MiB that nobody asked for.
pub fn collapse_step(fd: &OwnedFd, bytes: usize, from: usize) -> Option<usize> {
    let whole = bytes / HUGE * HUGE;
    let length = STEP.min(whole.checked_sub(from).filter(|rest| *rest > 0)?);
    let mapping = Mapping::map(fd, bytes, ProtFlags::empty(), MapFlags::SHARED).ok()?;
    // A child forked in these seconds would keep the memory as long as it lives.
    mapping.advise_all(Advice::LinuxDontFork).ok()?;
    // SAFETY: inside our own temporary range; collapsing changes which pages hold the bytes, not the bytes.
    let done = unsafe { libc::madvise(mapping.address.as_ptr().wrapping_byte_add(from), length, MADV_COLLAPSE) };
    (done == 0 && from + length < whole).then_some(from + length)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::object;

    fn peek(mapping: &Mapping, offset: usize) -> u8 {
        // SAFETY: tests read inside the object.
        unsafe { (mapping.address() as *const u8).add(offset).read_volatile() }
    }

    fn poke(mapping: &Mapping, offset: usize, value: u8) {
        // SAFETY: tests write inside the object, through a private mapping.
        unsafe { (mapping.address() as *mut u8).add(offset).write_volatile(value) }
    }

    #[test]
    fn a_write_stays_in_its_mapping() {
        let fd = object::create_memfd("onecopy-test", 8192).unwrap();
        object::write_all(&fd, 0, &[7; 8192]).unwrap();
        let one = Mapping::private(&fd, 8192).unwrap();
        let two = Mapping::private(&fd, 8192).unwrap();
        object::seal(&fd, true).unwrap();
        poke(&one, 5000, 9);
        assert_eq!((peek(&one, 5000), peek(&two, 5000)), (9, 7));
        assert_eq!(object::read_exact(&fd, 5000, 1).unwrap(), [7]);
        assert_eq!(one.address() % HUGE, 0);
    }

    #[test]
    fn filling_through_a_mapping_leaves_the_object_sealable() {
        let fd = object::create_memfd("onecopy-test", 3 << 20).unwrap();
        let filling = Mapping::shared_for_filling(&fd, 3 << 20).unwrap();
        filling.fill(100, b"weights").unwrap();
        assert!(filling.fill((3 << 20) - 3, b"weights").is_err());
        assert!(object::seal(&fd, true).is_err());
        drop(filling);
        object::seal(&fd, true).unwrap();
        assert_eq!(object::read_exact(&fd, 100, 7).unwrap(), b"weights");
    }

    #[test]
    fn collapsing_and_prefaulting_keep_the_bytes() {
        let bytes = 5 << 20;
        let fd = object::create_memfd("onecopy-test", bytes as u64).unwrap();
        object::write_all(&fd, 0, &vec![3; bytes]).unwrap();
        object::seal(&fd, true).unwrap();
        let view = Mapping::private(&fd, bytes).unwrap();
        assert_eq!(collapse_step(&fd, bytes, 0), None);
        prefault(view.address(), bytes, || true);
        assert_eq!((peek(&view, 0), peek(&view, bytes - 1)), (3, 3));
    }
}
