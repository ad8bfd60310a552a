//! A descriptor that a lock hangs on: close-on-exec, closed in a fork's child, and used only while it is ours.
//!
//! Daemons close every descriptor, and a fork's child inherits every one. So each kept descriptor is written down in
//! a table of atomics: the fork handler closes what it finds there and does nothing else (no lock, no memory), and an
//! owner looks at its own row before it uses or closes the number.
#![allow(unsafe_code)]

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, IntoRawFd, OwnedFd, RawFd};
use std::sync::Once;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use rustix::fs;

/// Which file a descriptor is of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct FileId {
    pub device: u64,
    pub inode: u64,
}

impl FileId {
    pub fn of(fd: BorrowedFd<'_>) -> io::Result<Self> {
        Ok(Self::from_stat(&fs::fstat(fd)?))
    }

    pub fn from_stat(stat: &fs::Stat) -> Self {
        Self { device: stat.st_dev, inode: stat.st_ino }
    }
}

/// One kept descriptor. `word`: 0, or its owner's number (upper half) and the descriptor plus one (lower half).
struct Slot {
    word: AtomicU64,
    device: AtomicU64,
    inode: AtomicU64,
}

/// Two a registry: more namespaces than any process has.
const SLOTS: usize = 256;

static TABLE: [Slot; SLOTS] =
    [const { Slot { word: AtomicU64::new(0), device: AtomicU64::new(0), inode: AtomicU64::new(0) } }; SLOTS];
/// Held from before a descriptor exists until it is in the table, and across a fork: no child inherits one that its
/// handler would not find.
static OPENING: AtomicBool = AtomicBool::new(false);
static OWNERS: AtomicU64 = AtomicU64::new(1);
static HANDLERS: Once = Once::new();

#[derive(Debug)]
pub struct Kept {
    slot: usize,
    word: u64,
    id: FileId,
}

impl Kept {
    /// Keeps what `open` opens, at the lowest free number that is at least `lowest` (any other where the process
    /// may not have such numbers).
    pub fn open(lowest: RawFd, open: impl FnOnce() -> io::Result<OwnedFd>) -> io::Result<Self> {
        prepare_for_forks();
        let _opening = Opening::begin();
        let fd = open()?;
        let fd = match rustix::io::fcntl_dupfd_cloexec(&fd, lowest) {
            _ if fd.as_raw_fd() >= lowest => fd,
            Ok(moved) => moved,
            Err(_) => fd,
        };
        let id = FileId::of(fd.as_fd())?;
        // A row with this number is stale: somebody closed it behind its owner's back.
        for slot in &TABLE {
            let word = slot.word.load(Ordering::Relaxed);
            if number(word) == Some(fd.as_raw_fd()) {
                let _ = slot.word.compare_exchange(word, 0, Ordering::Relaxed, Ordering::Relaxed);
            }
        }
        let free = TABLE.iter().position(|slot| slot.word.load(Ordering::Relaxed) == 0);
        let slot = free.ok_or_else(|| io::Error::other("more than 128 registries are open in this process"))?;
        TABLE[slot].device.store(id.device, Ordering::Relaxed);
        TABLE[slot].inode.store(id.inode, Ordering::Relaxed);
        let owner = OWNERS.fetch_add(1, Ordering::Relaxed);
        #[allow(clippy::cast_sign_loss)]
        let word = owner << 32 | (fd.into_raw_fd() as u64 + 1);
        TABLE[slot].word.store(word, Ordering::Release);
        Ok(Self { slot, word, id })
    }

    /// The file it was opened on.
    pub fn id(&self) -> FileId {
        self.id
    }

    /// The descriptor, if its number still leads to the file that we opened.
    pub fn fd(&self) -> Option<BorrowedFd<'_>> {
        if TABLE[self.slot].word.load(Ordering::Acquire) != self.word {
            return None;
        }
        // SAFETY: the table says that we opened this number and did not close it. Should somebody else have closed it,
        // fstat reports that or another file, and nothing but fstat is done with it.
        let fd = unsafe { BorrowedFd::borrow_raw(number(self.word)?) };
        (FileId::of(fd).ok()? == self.id).then_some(fd)
    }
}

impl Drop for Kept {
    fn drop(&mut self) {
        let _opening = Opening::begin();
        let ours = self.fd().map(|fd| fd.as_raw_fd());
        let row = &TABLE[self.slot].word;
        if row.compare_exchange(self.word, 0, Ordering::AcqRel, Ordering::Relaxed).is_ok() {
            // SAFETY: it was still our file a moment ago, nobody else owns the number, and the row is gone.
            drop(ours.map(|fd| unsafe { OwnedFd::from_raw_fd(fd) }));
        }
    }
}

fn number(word: u64) -> Option<RawFd> {
    #[allow(clippy::cast_possible_truncation)]
    RawFd::try_from((word as u32).checked_sub(1)?).ok()
}

/// Done before a process has threads that fork: half done, it would never be done in a child.
pub fn prepare_for_forks() {
    HANDLERS.call_once(|| {
        // SAFETY: the handlers touch only atomics and make async-signal-safe calls; they live as long as the program,
        // because a library with Python code over it is never unloaded.
        unsafe {
            libc::pthread_atfork(Some(before_fork), Some(in_parent), Some(in_child));
        }
    });
}

/// A lock that a fork handler may wait for: it is held over a few system calls only.
struct Opening;

impl Opening {
    fn begin() -> Self {
        while OPENING.compare_exchange_weak(false, true, Ordering::Acquire, Ordering::Relaxed).is_err() {
            std::thread::yield_now();
        }
        Self
    }
}

impl Drop for Opening {
    fn drop(&mut self) {
        OPENING.store(false, Ordering::Release);
    }
}

extern "C" fn before_fork() {
    std::mem::forget(Opening::begin());
}

extern "C" fn in_parent() {
    drop(Opening);
}

extern "C" fn in_child() {
    for slot in &TABLE {
        let word = slot.word.swap(0, Ordering::Relaxed);
        let Some(fd) = number(word) else { continue };
        // SAFETY: `stat` is plain integers; fstat and close are async-signal-safe and take any number. The file is
        // compared first: the number may belong to somebody else by now.
        unsafe {
            let mut stat: libc::stat = std::mem::zeroed();
            if libc::fstat(fd, &raw mut stat) == 0
                && stat.st_dev == slot.device.load(Ordering::Relaxed)
                && stat.st_ino == slot.inode.load(Ordering::Relaxed)
            {
                libc::close(fd);
            }
        }
    }
    drop(Opening);
}

#[cfg(test)]
pub mod tests {
    use std::cell::RefCell;
    use std::fs::File;

    use super::*;
    use crate::sys::lock::{is_locked, try_lock};

    /// Whether `child` says so in a forked child. It should do little: other threads' locks are copied as they are.
    #[allow(clippy::disallowed_methods)] // a test's own process may fork
    pub fn in_forked_child(child: impl FnOnce() -> bool) -> bool {
        // SAFETY: the child calls `child` and ends without unwinding or running anybody's destructors.
        let pid = unsafe { libc::fork() };
        if pid == 0 {
            let code = i32::from(!std::panic::catch_unwind(std::panic::AssertUnwindSafe(child)).unwrap_or(false));
            // SAFETY: ends the process, now.
            unsafe { libc::_exit(code) }
        }
        assert!(pid > 0);
        let mut status = 0;
        // SAFETY: our child, and a place for its status.
        assert_eq!(unsafe { libc::waitpid(pid, &raw mut status, 0) }, pid);
        libc::WIFEXITED(status) && libc::WEXITSTATUS(status) == 0
    }

    /// An unnamed file, and another description of it.
    fn file() -> (OwnedFd, File) {
        let path =
            std::env::temp_dir().join(format!("onecopy-kept-{}-{:?}", std::process::id(), std::thread::current().id()));
        let one = File::options().create(true).truncate(true).read(true).write(true).open(&path).unwrap();
        let two = File::options().read(true).write(true).open(&path).unwrap();
        std::fs::remove_file(path).unwrap();
        (one.into(), two)
    }

    #[test]
    fn a_forked_child_closes_and_does_not_unlock() {
        let (one, two) = file();
        let kept = Kept::open(512, || Ok(one)).unwrap();
        let number = kept.fd().unwrap().as_raw_fd();
        assert!(number >= 512);
        assert!(try_lock(kept.fd().unwrap(), 7).unwrap());
        let kept = RefCell::new(Some(kept));
        assert!(in_forked_child(|| {
            // SAFETY: only asks whether the number is open.
            let closed = unsafe { libc::fcntl(number, libc::F_GETFD) } == -1;
            let kept = kept.take().unwrap();
            let blind = kept.fd().is_none();
            // As when the child opens a registry of its own, and then the parent's is dropped.
            let (three, _) = file();
            let own = Kept::open(number, || Ok(three)).unwrap();
            let same_number = own.fd().unwrap().as_raw_fd() == number;
            drop(kept);
            closed && blind && same_number && own.fd().is_some() && is_locked(two.as_fd(), 7).unwrap()
        }));
        assert!(is_locked(two.as_fd(), 7).unwrap(), "the parent's lock is kept");
        drop(kept);
        assert!(!is_locked(two.as_fd(), 7).unwrap());
    }

    #[test]
    fn a_number_that_somebody_else_has_by_now_is_left_alone() {
        let (one, two) = file();
        let kept = Kept::open(600, || Ok(one)).unwrap();
        let number = kept.fd().unwrap().as_raw_fd();
        // SAFETY: a daemon closes everything.
        unsafe { libc::close(number) };
        assert!(kept.fd().is_none());
        let (stranger, _) = file();
        let stranger = rustix::io::fcntl_dupfd_cloexec(&stranger, number).unwrap();
        assert_eq!(stranger.as_raw_fd(), number);
        assert!(kept.fd().is_none());
        drop(kept);
        assert!(FileId::of(stranger.as_fd()).is_ok(), "closed what was not ours");

        // The same file under the same number, kept by another: only the table tells.
        let first = Kept::open(number, || Ok(two.into())).unwrap();
        let number = first.fd().unwrap().as_raw_fd();
        let copy = first.fd().unwrap().try_clone_to_owned().unwrap();
        // SAFETY: as above.
        unsafe { libc::close(number) };
        let second = Kept::open(number, || Ok(copy)).unwrap();
        assert_eq!((second.fd().unwrap().as_raw_fd(), second.id()), (number, first.id()));
        assert!(first.fd().is_none());
        drop(first);
        assert!(second.fd().is_some());
    }
}
