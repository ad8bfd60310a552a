//! Open-file-description locks on single bytes of a file.
//!
//! The kernel lets go of them when the last copy of the descriptor is closed, however its process ended. Two rules
//! follow: the descriptor that locks is never the one given to `mmap` (a mapping keeps it open), and a fork's child
//! closes its copies and never unlocks (that would drop its parent's lock). `Kept` keeps both.
//!
//! Locks taken through one description never conflict with each other: callers add a mutex for their own threads.

mod kept;
#[cfg(test)]
pub use kept::tests::in_forked_child;

use std::fs;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

pub use kept::{FileId, Kept, prepare_for_forks};

/// Takes the write lock on `byte`; `false` where another description has it.
pub fn try_lock(fd: BorrowedFd<'_>, byte: u64) -> io::Result<bool> {
    match control(fd, libc::F_OFD_SETLK, libc::F_WRLCK, byte) {
        Ok(_) => Ok(true),
        Err(error) if matches!(error.raw_os_error(), Some(libc::EAGAIN | libc::EACCES)) => Ok(false),
        Err(error) => Err(error),
    }
}

pub fn unlock(fd: BorrowedFd<'_>, byte: u64) -> io::Result<()> {
    control(fd, libc::F_OFD_SETLK, libc::F_UNLCK, byte).map(drop)
}

/// Whether another description than this one has a lock on `byte`.
pub fn is_locked(fd: BorrowedFd<'_>, byte: u64) -> io::Result<bool> {
    control(fd, libc::F_OFD_GETLK, libc::F_WRLCK, byte).map(|kind| kind != libc::F_UNLCK)
}

#[allow(unsafe_code)]
fn control(fd: BorrowedFd<'_>, command: i32, kind: i32, byte: u64) -> io::Result<i32> {
    let start = libc::off_t::try_from(byte).map_err(|_| io::Error::from_raw_os_error(libc::EOVERFLOW))?;
    // SAFETY: `flock` is plain integers, for which zero is a value; OFD commands want l_pid == 0.
    let mut range: libc::flock = unsafe { std::mem::zeroed() };
    range.l_type = i16::try_from(kind).unwrap_or(i16::MAX);
    range.l_whence = i16::try_from(libc::SEEK_SET).unwrap_or(0);
    range.l_start = start;
    range.l_len = 1;
    loop {
        // SAFETY: the descriptor is open for the borrow's life, and `range` lives through the call.
        if unsafe { libc::fcntl(fd.as_raw_fd(), command, &raw mut range) } == 0 {
            return Ok(i32::from(range.l_type));
        }
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
    }
}

/// A process of this user whose descriptors show the lock on `byte` of a file. For messages: it reads `/proc`,
/// costs milliseconds, and misses processes whose descriptors are hidden from us.
pub fn owner(file: FileId, byte: u64) -> Option<u32> {
    let wanted = format!(
        " {:02x}:{:02x}:{} {byte} {byte}",
        rustix::fs::major(file.device),
        rustix::fs::minor(file.device),
        file.inode
    );
    let processes = fs::read_dir("/proc").ok()?;
    processes.flatten().find_map(|process| {
        let pid: u32 = process.file_name().to_str()?.parse().ok()?;
        let shows = |entry: fs::DirEntry| {
            fs::read_to_string(entry.path()).is_ok_and(|text| {
                text.lines().any(|line| line.starts_with("lock:") && line.contains("OFDLCK") && line.ends_with(&wanted))
            })
        };
        fs::read_dir(process.path().join("fdinfo")).ok()?.flatten().any(shows).then_some(pid)
    })
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use super::*;

    #[test]
    fn two_descriptions_exclude_each_other() {
        let path = std::env::temp_dir().join(format!("onecopy-lock-{}", std::process::id()));
        let one = fs::File::create(&path).unwrap();
        let two = fs::File::options().write(true).open(&path).unwrap();
        fs::remove_file(&path).unwrap();
        let byte = 1 << 40;
        assert!(!is_locked(two.as_fd(), byte).unwrap());
        assert!(try_lock(one.as_fd(), byte).unwrap());
        assert!(try_lock(one.as_fd(), byte).unwrap(), "own locks never conflict");
        assert!(!is_locked(one.as_fd(), byte).unwrap(), "nor are they seen");
        assert!(!try_lock(two.as_fd(), byte).unwrap());
        assert!(is_locked(two.as_fd(), byte).unwrap() && !is_locked(two.as_fd(), byte + 1).unwrap());
        let id = FileId::of(one.as_fd()).unwrap();
        assert_eq!(owner(id, byte), Some(std::process::id()));
        assert_eq!(owner(id, byte + 1), None);
        unlock(one.as_fd(), byte).unwrap();
        assert!(try_lock(two.as_fd(), byte).unwrap());
        drop(two);
        assert!(try_lock(one.as_fd(), byte).unwrap(), "closing unlocks");
    }
}
