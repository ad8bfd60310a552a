//! Sleeping on words of a page that other processes map too.
//!
//! The mapping is never read or written here: its address is only handed to `futex(2)`, which reports a page that is
//! gone as EFAULT where a load would be SIGBUS. The page's values are changed by `pwrite`, under the registry's lock.
#![allow(unsafe_code)]

use std::io;
use std::os::fd::BorrowedFd;
use std::ptr::NonNull;
use std::time::Duration;

use rustix::mm::{self, Advice, MapFlags, ProtFlags};

const PAGE: usize = 4096;
/// Words of the page.
pub const WORDS: u32 = 1024;

#[derive(Debug)]
pub struct FutexPage {
    address: NonNull<libc::c_void>,
    pid: u32,
}

// SAFETY: the address is a number for the kernel; no memory is accessed through it.
unsafe impl Send for FutexPage {}
// SAFETY: as above.
unsafe impl Sync for FutexPage {}

impl FutexPage {
    /// Maps the page at `offset`. `fd` must be of an `open` of its own: the mapping keeps its description, and with
    /// it any lock, alive.
    pub fn map(fd: BorrowedFd<'_>, offset: u64) -> io::Result<Self> {
        // SAFETY: a new mapping at an address of the kernel's choice; nobody forms a reference into it.
        let address = unsafe { mm::mmap(std::ptr::null_mut(), PAGE, ProtFlags::READ, MapFlags::SHARED, fd, offset) }?;
        // SAFETY: our mapping, whole. A fork's child goes without: it opens a registry of its own.
        unsafe { mm::madvise(address, PAGE, Advice::LinuxDontFork) }?;
        let address = NonNull::new(address).ok_or_else(|| io::Error::other("mmap returned address 0"))?;
        Ok(Self { address, pid: std::process::id() })
    }

    /// Sleeps while `word` has `value`: at most `timeout`, and less for many reasons (woken, a signal, another value,
    /// a page that is gone). The caller looks again in any case.
    pub fn wait(&self, word: u32, value: u32, timeout: Duration) {
        let limit = libc::timespec {
            tv_sec: libc::time_t::try_from(timeout.as_secs()).unwrap_or(libc::time_t::MAX),
            tv_nsec: libc::c_long::from(timeout.subsec_nanos()),
        };
        // SAFETY: the kernel checks the address itself; `limit` lives through the call.
        unsafe {
            libc::syscall(libc::SYS_futex, self.word(word), libc::FUTEX_WAIT, value, &raw const limit);
        }
    }

    /// Wakes everyone who sleeps on `word`.
    pub fn wake(&self, word: u32) {
        // SAFETY: the kernel checks the address itself.
        unsafe {
            libc::syscall(libc::SYS_futex, self.word(word), libc::FUTEX_WAKE, i32::MAX);
        }
    }

    fn word(&self, word: u32) -> *mut u32 {
        self.address.as_ptr().cast::<u32>().wrapping_add((word % WORDS) as usize)
    }
}

impl Drop for FutexPage {
    fn drop(&mut self) {
        // In a fork's child something else may lie at this address.
        if self.pid == std::process::id() {
            // SAFETY: our mapping, whole; nobody has a reference into it.
            let _ = unsafe { mm::munmap(self.address.as_ptr(), PAGE) };
        }
    }
}
