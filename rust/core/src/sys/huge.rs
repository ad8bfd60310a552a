//! Huge pages for an object, whatever `shmem_enabled` says: MADV_COLLAPSE (Linux 6.1, madvise(2)) needs no setting.
//!
//! Collapsing what is full copies every page once more. Collapsing what is empty but for its first page copies one in 512,
//! and the bytes are then copied into a huge page: three times as fast as write(2) fills small ones
//! (docs/design/2026-11-23-huge-pages-first.md).
#![allow(unsafe_code)]

use std::os::fd::OwnedFd;
use std::ptr;
use std::time::{Duration, Instant};

use rustix::io::Errno;
use rustix::mm::{Advice, ProtFlags};

use super::mapping::Mapping;
use super::object;
use crate::words::Huge;
use crate::{Error, Result};

/// Size and alignment of a huge page on x86-64 and on arm64 with 4 KiB pages.
pub const HUGE: usize = 2 << 20;
/// Missing in rustix.
const MADV_COLLAPSE: i32 = 25;
/// Bytes made huge at once, ahead of being filled: so few that they are still in the cache then.
const AHEAD: usize = 4 << 20;
/// Bytes a nanosecond below which huge pages are left for later: with the copy, write(2) makes about as many.
const SLOWEST: u64 = 3;
/// For a processor that is busy with something else.
const SLACK: Duration = Duration::from_millis(25);
/// Bytes after which the rate is asked for.
const TRIED: usize = 16 << 20;
/// Bytes per call where nobody waits for it.
const STEP: usize = 16 << 20;

/// What of an object may be in huge pages.
pub fn eligible(bytes: usize, huge: Huge) -> usize {
    match huge {
        Huge::Never => 0,
        Huge::Auto => bytes / HUGE * HUGE,
        Huge::Always => bytes.next_multiple_of(HUGE),
    }
}

/// The mapping through which a fresh memfd is filled. Not inherited by fork: a child would keep F_SEAL_WRITE busy.
#[derive(Debug)]
pub struct Window {
    mapping: Mapping,
    /// Whether a stretch of `AHEAD` bytes is in huge pages, as far as filling has come.
    stretches: Vec<Stretch>,
    /// Where the last huge page may end.
    end: usize,
    refused: bool,
    /// On making pages huge, in vain included.
    spent: Duration,
    huge_bytes: usize,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stretch {
    Empty,
    Huge,
    Small,
}

impl Window {
    /// None where nothing of the object may be huge, or where there is no address space for it.
    pub fn open(fd: &OwnedFd, bytes: usize, huge: Huge) -> Option<Self> {
        let end = eligible(bytes, huge);
        if end == 0 {
            return None;
        }
        let mapping = Mapping::shared(fd, bytes, ProtFlags::READ | ProtFlags::WRITE).ok()?;
        mapping.advise_all(Advice::LinuxDontFork).ok()?;
        let stretches = vec![Stretch::Empty; end.div_ceil(AHEAD)];
        Some(Self { mapping, stretches, end, refused: false, spent: Duration::ZERO, huge_bytes: 0 })
    }

    /// Writes into an object that nobody else can cut short, through huge pages where there are any.
    pub fn write(&mut self, fd: &OwnedFd, mut offset: u64, mut bytes: &[u8]) -> Result<()> {
        while !bytes.is_empty() {
            let from = offset as usize;
            let eligible = from < self.end;
            let stop = if eligible { self.end.min((from / AHEAD + 1) * AHEAD) } else { usize::MAX };
            let (first, rest) = bytes.split_at(bytes.len().min(stop - from));
            if eligible && self.is_huge(fd, from / AHEAD)? {
                self.copy(from, first);
            } else {
                object::write_all(fd, offset, first)?;
            }
            offset += first.len() as u64;
            bytes = rest;
        }
        Ok(())
    }

    pub fn huge_bytes(&self) -> usize {
        self.huge_bytes
    }

    fn is_huge(&mut self, fd: &OwnedFd, index: usize) -> Result<bool> {
        if self.stretches[index] == Stretch::Empty {
            self.stretches[index] = self.make(fd, index * AHEAD, AHEAD.min(self.end - index * AHEAD))?;
        }
        Ok(self.stretches[index] == Stretch::Huge)
    }

    fn make(&mut self, fd: &OwnedFd, from: usize, length: usize) -> Result<Stretch> {
        if self.refused || !self.keeps_up() {
            return Ok(Stretch::Small);
        }
        let began = Instant::now();
        // What is all hole is refused; and where there is no room, this fails cleanly.
        for page in (from..from + length).step_by(HUGE) {
            object::write_all(fd, page as u64, &[0])?;
        }
        let made = collapse(&self.mapping, from, length);
        self.spent += began.elapsed();
        Ok(match made {
            Ok(()) => {
                self.huge_bytes += length;
                Stretch::Huge
            }
            Err(errno) => {
                self.refused = lasting(errno);
                Stretch::Small
            }
        })
    }

    /// A virtual machine may have given its free memory back to the host, and huge pages are made of free memory: then they
    /// cost several times what writing to small ones costs. They can be made after READY as well.
    fn keeps_up(&self) -> bool {
        self.huge_bytes < TRIED || self.spent <= SLACK + Duration::from_nanos(self.huge_bytes as u64 / SLOWEST)
    }

    fn copy(&self, offset: usize, source: &[u8]) {
        assert!(offset + source.len() <= self.mapping.bytes());
        // SAFETY: `source` is valid for its length; the destination lies within the object (checked above), whose pages are
        // there (a huge page that was made is whole, and the object, a memfd sealed against shrinking, cannot be cut); the
        // two cannot overlap, as no address of this mapping leaves it.
        unsafe {
            ptr::copy_nonoverlapping(source.as_ptr(), self.mapping.pointer(offset), source.len());
        }
    }
}

/// Turns one `STEP` of a filled object's pages, from `from` on, into huge ones, and says where the next step begins; None:
/// done, or the kernel does not want to. Through a mapping of its own, without rights: a private page in a user's mapping
/// would stop it.
pub fn collapse_step(fd: &OwnedFd, bytes: usize, huge: Huge, from: usize) -> Option<usize> {
    let end = eligible(bytes, huge);
    let length = STEP.min(end.checked_sub(from).filter(|rest| *rest > 0)?);
    let mapping = Mapping::shared(fd, bytes, ProtFlags::empty()).ok()?;
    // A child forked in these seconds would keep the memory as long as it lives.
    mapping.advise_all(Advice::LinuxDontFork).ok()?;
    let next = (from + length < end).then_some(from + length);
    collapse(&mapping, from, length).ok().and(next)
}

/// Whether this machine's kernel makes pages huge at all: tried with an object of one.
///
/// # Errors
/// What the kernel said.
pub fn available() -> Result<()> {
    let fd = object::create_memfd("onecopy-doctor", HUGE as u64)?;
    object::write_all(&fd, 0, &[0])?;
    collapse(&Mapping::shared(&fd, HUGE, ProtFlags::empty())?, 0, HUGE)
        .map_err(|errno| Error::os("madvise(MADV_COLLAPSE)", "memfd", errno))
}

fn collapse(mapping: &Mapping, from: usize, length: usize) -> Result<(), Errno> {
    // SAFETY: within our own mapping, whose range is whole huge pages; collapsing changes which pages hold the bytes, not
    // the bytes.
    if unsafe { libc::madvise(mapping.pointer(from).cast(), length, MADV_COLLAPSE) } == 0 {
        return Ok(());
    }
    Err(Errno::from_io_error(&std::io::Error::last_os_error()).unwrap_or(Errno::INVAL))
}

/// EINVAL: the kernel is too old, or was told never to. ENOMEM: memory is in pieces, and looking for more is slow. A memory
/// cgroup at its limit says EBUSY: what the source gives back in the meantime may be enough for the next one.
fn lasting(errno: Errno) -> bool {
    matches!(errno, Errno::INVAL | Errno::NOMEM | Errno::NOSYS | Errno::PERM)
}

#[cfg(test)]
mod tests {
    use super::*;

    const BYTES: usize = (9 << 20) + 4096;

    fn filled(huge: Huge) -> (OwnedFd, Option<Window>) {
        let fd = object::create_memfd("onecopy-test", BYTES as u64).unwrap();
        let mut window = Window::open(&fd, BYTES, huge);
        let source: Vec<u8> = (0..BYTES).map(|at| (at / 4099) as u8).collect();
        for (index, piece) in source.chunks(1_000_003).enumerate() {
            let offset = index * 1_000_003;
            match &mut window {
                Some(window) => window.write(&fd, offset as u64, piece).unwrap(),
                None => object::write_all(&fd, offset as u64, piece).unwrap(),
            }
        }
        assert!(object::read_exact(&fd, 0, BYTES).unwrap() == source);
        (fd, window)
    }

    /// None where this machine's kernel has none.
    fn huge_bytes(huge: Huge) -> Option<usize> {
        let (fd, window) = filled(huge);
        let found = window.as_ref().map_or(0, Window::huge_bytes);
        if window.is_some() {
            // F_SEAL_WRITE waits for the last mapping that could be written through.
            object::seal(&fd, true).unwrap_err();
        }
        drop(window);
        object::seal(&fd, true).unwrap();
        available().ok().map(|()| found)
    }

    #[test]
    fn what_is_filled_is_huge_at_once_as_far_as_it_may_be() {
        if let Some(found) = huge_bytes(Huge::Auto) {
            assert_eq!(found, 8 << 20);
            assert_eq!(huge_bytes(Huge::Always), Some(10 << 20));
            assert_eq!(huge_bytes(Huge::Never), Some(0));
        } else {
            println!("this kernel makes no huge pages: {:?}", available());
        }
    }

    #[test]
    fn where_the_kernel_refuses_bytes_are_written_all_the_same() {
        let fd = object::create_memfd("onecopy-test", BYTES as u64).unwrap();
        let mut window = Window::open(&fd, BYTES, Huge::Auto).unwrap();
        window.refused = true;
        window.write(&fd, 5 << 20, &[7; 6 << 20]).unwrap_err();
        window.write(&fd, 3 << 20, &[7; 6 << 20]).unwrap();
        assert_eq!(window.huge_bytes(), 0);
        assert!(object::read_exact(&fd, 3 << 20, 6 << 20).unwrap() == vec![7; 6 << 20]);
    }

    #[test]
    fn collapsing_later_keeps_the_bytes() {
        let fd = object::create_memfd("onecopy-test", BYTES as u64).unwrap();
        object::write_all(&fd, 0, &vec![3; BYTES]).unwrap();
        object::seal(&fd, true).unwrap();
        assert_eq!(collapse_step(&fd, BYTES, Huge::Auto, 0), None);
        assert_eq!(collapse_step(&fd, BYTES, Huge::Never, 0), None);
        assert!(object::read_exact(&fd, 0, BYTES).unwrap() == vec![3; BYTES]);
    }
}
