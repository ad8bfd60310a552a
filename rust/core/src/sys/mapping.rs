//! Mappings of a segment: private views for use, and shared ones for filling.
//!
//! # Safety
//! A `Mapping` owns its address range: it is unmapped once, by `Drop`, and nobody else unmaps or moves it. No Rust
//! reference is formed over mapped bytes; they leave as an address and a length, owned by what holds the `Mapping`.
#![allow(unsafe_code)]

use std::ffi::c_void;
use std::os::fd::OwnedFd;
use std::ptr::{self, NonNull};
use std::time::{Duration, Instant};

use rustix::io::Errno;
use rustix::mm::{self, Advice, MapFlags, MprotectFlags, ProtFlags};

use super::huge::HUGE;
use crate::{Error, Result};

/// Bytes per call: one call of 2 GiB blocks other threads' mmap for 0.2 s, and the thread that rebuilds the object needs it.
const STEP: usize = HUGE;
/// The most, where calls are short: pages that are huge take a microsecond each.
const LONG_STEP: usize = 16 * STEP;
const SHORT: Duration = Duration::from_micros(50);

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

    /// A view of the object itself.
    pub fn shared(fd: &OwnedFd, bytes: usize, protection: ProtFlags) -> Result<Self> {
        Self::map(fd, bytes, protection, MapFlags::SHARED)
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

    /// `offset` bytes after the start, for those who look after the bounds themselves.
    pub fn pointer(&self, offset: usize) -> *mut u8 {
        self.address.as_ptr().wrapping_byte_add(offset).cast()
    }

    pub fn bytes(&self) -> usize {
        self.bytes
    }

    pub fn advise_all(&self, advice: Advice) -> Result<()> {
        // SAFETY: the whole of our own range; none of the advices used here (DONTDUMP, DONTFORK, HUGEPAGE) changes content.
        unsafe { mm::madvise(self.address.as_ptr(), self.range, advice) }
            .map_err(|errno| Error::os("madvise", "segment", errno))
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the range is ours alone, and whoever drops us says that no view of it is left.
        let _ = unsafe { mm::munmap(self.address.as_ptr(), self.range) };
    }
}

/// Pages to be mapped into the page table ahead of use.
#[derive(Debug)]
pub struct Ahead {
    address: usize,
    bytes: usize,
    /// Bytes a call.
    step: usize,
}

impl Ahead {
    pub fn new(address: usize, bytes: usize) -> Self {
        Self { address, bytes, step: STEP }
    }

    /// Maps the next pages, and says what is left; None: done, or the kernel cannot (Linux before 5.14). Copies nothing
    /// (MADV_POPULATE_READ).
    pub fn step(self) -> Option<Self> {
        let Self { address, bytes, step } = self;
        let length = step.min(bytes.next_multiple_of(4096));
        let start = ptr::without_provenance_mut(address);
        let began = Instant::now();
        // SAFETY: populating for reading changes no content, and fails where nothing is mapped. Should the mapping go in
        // the middle of a step, and another one come, some pages of that one are mapped ahead of use.
        let done = unsafe { mm::madvise(start, length, Advice::LinuxPopulateRead) };
        let step = if began.elapsed() < SHORT { LONG_STEP.min(step * 2) } else { STEP };
        (done.is_ok() && bytes > length).then(|| Self { address: address + length, bytes: bytes - length, step })
    }
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
    fn prefaulting_copies_nothing_and_keeps_the_bytes() {
        let bytes = 5 << 20;
        let fd = object::create_memfd("onecopy-test", bytes as u64).unwrap();
        object::write_all(&fd, 0, &vec![3; bytes]).unwrap();
        object::seal(&fd, true).unwrap();
        let view = Mapping::private(&fd, bytes).unwrap();
        let mut rest = Some(Ahead::new(view.address(), bytes));
        while let Some(ahead) = rest {
            rest = ahead.step();
        }
        assert_eq!((peek(&view, 0), peek(&view, bytes - 1)), (3, 3));
    }
}
