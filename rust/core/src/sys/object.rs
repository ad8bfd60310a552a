//! The memory object of a segment: an anonymous memfd, or a named file in the registry's directory.
//!
//! A memfd is reopened through `/proc/<pid>/fd/<n>` of any living holder (proc(5)). Descriptor numbers and pids are
//! reused, so what is found there is believed only after device, inode, owner, length and seals agree.

use std::mem::ManuallyDrop;
use std::ops::Deref;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};

use rustix::fs::{self, FallocateFlags, FileType, MemfdFlags, Mode, OFlags, SealFlags};
use rustix::io::Errno;

use super::directory::Directory;
use crate::{Error, Result};

/// The seals of a published memfd: nobody, its publisher included, writes, grows or shrinks it again (F_ADD_SEALS, fcntl(2)).
const SEALS: SealFlags = SealFlags::SEAL.union(SealFlags::SHRINK).union(SealFlags::GROW).union(SealFlags::WRITE);

/// Which object a descriptor refers to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ObjectId {
    pub device: u64,
    pub inode: u64,
    pub bytes: u64,
}

/// Why an object could not be opened through a holder or a name.
#[derive(Debug)]
pub enum Missing {
    /// The holder's descriptor is closed, or is something else by now; or the name leads nowhere.
    Gone,
    /// `/proc/<pid>` itself is gone: the process is dying, or hidden from us.
    NoProcess,
    /// The kernel forbids it (other gid, not dumpable, user namespace, fewer capabilities: proc(5), ptrace(2)).
    Refused(Errno),
}

pub fn create_memfd(name: &str, bytes: u64) -> Result<OwnedFd> {
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    // NOEXEC_SEAL: Linux 6.3; before it the kernel says EINVAL.
    let fd = match fs::memfd_create(name, flags | MemfdFlags::NOEXEC_SEAL) {
        Err(Errno::INVAL) => fs::memfd_create(name, flags),
        other => other,
    }
    .map_err(|errno| Error::os("memfd_create", name, errno))?;
    fs::ftruncate(&fd, bytes).map_err(|errno| Error::os("ftruncate", name, errno))?;
    // While it is filled through a mapping nobody cuts it short: that would be SIGBUS.
    fs::fcntl_add_seals(&fd, SealFlags::SHRINK | SealFlags::GROW)
        .map_err(|errno| Error::os("fcntl(F_ADD_SEALS)", name, errno))?;
    Ok(fd)
}

/// A named object with all its room taken: `fallocate` fails as a whole and gives everything back (no SIGBUS later).
pub fn create_named(directory: &Directory, name: &str, bytes: u64) -> Result<OwnedFd> {
    let shown = directory.shown(name);
    let flags = OFlags::CREATE | OFlags::EXCL | OFlags::RDWR | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let fd = fs::openat(directory, name, flags, Mode::RUSR | Mode::WUSR)
        .map_err(|errno| Error::os("open", &shown, errno))?;
    let taken = loop {
        match fs::fallocate(&fd, FallocateFlags::empty(), 0, bytes) {
            Err(Errno::INTR) => {}
            other => break other,
        }
    };
    taken.map_err(|errno| {
        // The name is ours (O_EXCL): nothing else can be lost by removing it.
        let _ = fs::unlinkat(directory, name, fs::AtFlags::empty());
        Error::os("fallocate", &shown, errno)
    })?;
    Ok(fd)
}

/// No more writes: seals for a memfd, mode 0400 for a named file (which its owner can change back: SECURITY.md).
pub fn seal(fd: &OwnedFd, memfd: bool) -> Result<()> {
    if memfd {
        fs::fcntl_add_seals(fd, SEALS).map_err(|errno| Error::os("fcntl(F_ADD_SEALS)", "memfd", errno))
    } else {
        fs::fchmod(fd, Mode::RUSR).map_err(|errno| Error::os("fchmod", "segment", errno))
    }
}

pub fn identify(fd: impl AsFd) -> Result<ObjectId> {
    let stat = fs::fstat(fd).map_err(|errno| Error::os("fstat", "segment", errno))?;
    Ok(ObjectId { device: stat.st_dev, inode: stat.st_ino, bytes: stat.st_size as u64 })
}

/// Opens what `pid` has under `fd`, if it is the sealed memfd that `expected` names.
pub fn open_through_holder(pid: u32, fd: i32, expected: ObjectId) -> Result<OwnedFd, Missing> {
    let link = link_to(pid, fd)?;
    check(&link, expected)?;
    let own = format!("/proc/self/fd/{}", link.as_raw_fd());
    let opened = fs::open(&own, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty()).map_err(Missing::Refused)?;
    check(&opened, expected)?;
    match fs::fcntl_get_seals(&opened) {
        Ok(seals) if seals.contains(SEALS) => Ok(opened),
        _ => Err(Missing::Gone),
    }
}

/// O_PATH: opening a FIFO or a terminal that got the number meanwhile could block, or have effects.
fn link_to(pid: u32, fd: i32) -> Result<OwnedFd, Missing> {
    let open = |path: &str| fs::open(path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty());
    match open(&format!("/proc/{pid}/fd/{fd}")) {
        Ok(link) => Ok(link),
        Err(Errno::NOENT) if !process_visible(pid) => Err(Missing::NoProcess),
        // A process whose first thread has ended shows its descriptors under the others.
        Err(Errno::NOENT) => {
            let threads = std::fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
            let mut paths = threads.map(|thread| thread.path().join(format!("fd/{fd}")));
            paths.find_map(|path| open(path.to_str()?).ok()).ok_or(Missing::Gone)
        }
        Err(Errno::SRCH) => Err(Missing::Gone),
        Err(other) => Err(Missing::Refused(other)),
    }
}

pub fn open_named(directory: &Directory, name: &str, expected: ObjectId) -> Result<OwnedFd, Missing> {
    // NONBLOCK: where somebody took the name away, another user may have put a FIFO there, or a file with a lease on it.
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::NOCTTY;
    let fd = fs::openat(directory, name, flags, Mode::empty()).map_err(|errno| {
        let there = fs::statat(directory, name, fs::AtFlags::SYMLINK_NOFOLLOW);
        match there {
            Ok(stat) if (stat.st_dev, stat.st_ino) == (expected.device, expected.inode) => Missing::Refused(errno),
            Err(other) if other != Errno::NOENT => Missing::Refused(errno),
            _ => Missing::Gone,
        }
    })?;
    check(&fd, expected)?;
    Ok(fd)
}

/// The names in the directory that are `prefix` and 32 hexadecimal digits.
pub fn list_named(directory: &Directory, prefix: &str) -> Result<Vec<String>> {
    let failed = |errno| Error::os("read", directory.path().display().to_string(), errno);
    let mut found = Vec::new();
    for entry in fs::Dir::read_from(directory).map_err(failed)? {
        let entry = entry.map_err(failed)?;
        let Ok(name) = entry.file_name().to_str() else { continue };
        let digits = name.strip_prefix(prefix).unwrap_or_default();
        if digits.len() == 32 && digits.bytes().all(|byte| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte)) {
            found.push(name.to_owned());
        }
    }
    Ok(found)
}

/// Removes a named object of ours that no process has open or mapped, wherever it lives. `None` where one has. `keep`: only
/// looks. Returns its bytes, and its last descriptor: whoever closes that frees the memory, which may take a while.
pub fn remove_unused(directory: &Directory, name: &str, keep: bool) -> Option<(u64, OwnedFd)> {
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::NOCTTY;
    let fd = fs::openat(directory, name, flags, Mode::empty()).ok()?;
    let stat = fs::fstat(&fd).ok()?;
    let ours = stat.st_uid == rustix::process::geteuid().as_raw() && FileType::from_raw_mode(stat.st_mode).is_file();
    if !ours || !is_only_user(&fd) {
        return None;
    }
    if !keep {
        fs::unlinkat(directory, name, fs::AtFlags::empty()).ok()?;
    }
    Some((stat.st_size as u64, fd))
}

/// The kernel grants a write lease (F_SETLEASE, fcntl(2)) to the only user of a file alone.
#[allow(unsafe_code)]
fn is_only_user(fd: &OwnedFd) -> bool {
    /// linux/fcntl.h, missing in libc.
    const F_SETSIG: i32 = 10;
    // SAFETY: integers only; the descriptor is open for the borrow's life.
    let control = |command: i32, value: i32| unsafe { libc::fcntl(fd.as_raw_fd(), command, value) };
    // Whoever opens the file meanwhile breaks the lease, and we are told by a signal: not by SIGIO, which kills, but by one
    // that is ignored where nobody asked for it.
    let granted = control(F_SETSIG, libc::SIGURG) == 0 && control(libc::F_SETLEASE, libc::F_WRLCK) == 0;
    let kept = granted && control(libc::F_GETLEASE, 0) == libc::F_WRLCK;
    if granted {
        control(libc::F_SETLEASE, libc::F_UNLCK);
    }
    kept
}

/// A new description of an object that this process has open under `fd` (its own descriptor, or one inherited by fork).
pub fn open_own(fd: i32, expected: ObjectId) -> Result<OwnedFd, Missing> {
    let opened = fs::open(format!("/proc/self/fd/{fd}"), OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())
        .map_err(|_| Missing::Gone)?;
    check(&opened, expected)?;
    Ok(opened)
}

/// Of an object that this process made and nobody else knows.
pub fn remove_name(directory: &Directory, name: &str) {
    let _ = fs::unlinkat(directory, name, fs::AtFlags::empty());
}

/// Takes over a descriptor that this process inherited by fork, if the number still leads to `expected`.
pub fn take_inherited(fd: i32, expected: ObjectId) -> Option<OwnedFd> {
    // SAFETY: the caller is a forked child, in which the parent's owner of this number was forgotten without closing it,
    // so nobody else here owns the number; that it is open and leads to the object is checked before it is returned, and
    // where it does not, the number is let go without closing.
    #[allow(unsafe_code)]
    let owned = unsafe { OwnedFd::from_raw_fd(fd) };
    if check(&owned, expected).is_ok() {
        Some(owned)
    } else {
        std::mem::forget(owned);
        None
    }
}

/// A descriptor of a segment. Daemons close everything: the number is used and closed only while it leads to the segment.
#[derive(Debug)]
pub struct SegmentFd {
    fd: ManuallyDrop<OwnedFd>,
    pub id: ObjectId,
}

impl SegmentFd {
    pub fn new(fd: OwnedFd, id: ObjectId) -> Self {
        Self { fd: ManuallyDrop::new(fd), id }
    }

    /// Whoever the process is by now: it opened it.
    pub fn open(&self) -> bool {
        matches!(check(&self.fd, self.id), Ok(()) | Err(Missing::Refused(_)))
    }

    pub fn number(&self) -> i32 {
        self.fd.as_raw_fd()
    }

    /// Lets the number go without closing it: it was closed behind our back, and is somebody else's by now.
    pub fn forget(mut self) {
        self.id = NOBODY;
    }
}

/// No object has it: inode 0 is never given out.
const NOBODY: ObjectId = ObjectId { device: 0, inode: 0, bytes: 0 };

impl Deref for SegmentFd {
    type Target = OwnedFd;

    fn deref(&self) -> &OwnedFd {
        &self.fd
    }
}

impl Drop for SegmentFd {
    #[allow(unsafe_code)]
    fn drop(&mut self) {
        if self.open() {
            // SAFETY: dropped once, here, and not used afterwards.
            unsafe { ManuallyDrop::drop(&mut self.fd) }
        }
    }
}

fn check(fd: &OwnedFd, expected: ObjectId) -> Result<(), Missing> {
    let stat = fs::fstat(fd).map_err(|_| Missing::Gone)?;
    let same = stat.st_dev == expected.device && stat.st_ino == expected.inode && stat.st_size as u64 == expected.bytes;
    let regular = FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile;
    let mine = stat.st_uid == rustix::process::geteuid().as_raw();
    match (same && regular, mine) {
        (true, true) => Ok(()),
        // The very object, and this process has become another user since.
        (true, false) => Err(Missing::Refused(Errno::PERM)),
        (false, _) => Err(Missing::Gone),
    }
}

fn process_visible(pid: u32) -> bool {
    fs::stat(format!("/proc/{pid}")).is_ok()
}

/// `pread` of exactly `bytes` at `offset`: never through a mapping, so a file cut short is an error and not a SIGBUS; nor is
/// memory taken for what is not there.
pub fn read_exact(fd: &OwnedFd, offset: u64, bytes: usize) -> Result<Vec<u8>> {
    let cut_short = || Error::os("pread", "segment: cut short", Errno::NODATA);
    let end = offset.checked_add(bytes as u64).ok_or_else(cut_short)?;
    if identify(fd)?.bytes < end {
        return Err(cut_short());
    }
    let mut buffer = Vec::new();
    buffer.try_reserve_exact(bytes).map_err(|_| Error::os("malloc", format!("{bytes} bytes"), Errno::NOMEM))?;
    buffer.resize(bytes, 0);
    let mut done = 0;
    while done < bytes {
        match rustix::io::pread(fd, &mut buffer[done..], offset + done as u64) {
            Ok(0) => return Err(cut_short()),
            Ok(count) => done += count,
            Err(Errno::INTR) => {}
            Err(errno) => return Err(Error::os("pread", "segment", errno)),
        }
    }
    Ok(buffer)
}

/// `pwrite` of all of `bytes`, in pieces short enough for Ctrl-C and SIGKILL to get between.
pub fn write_all(fd: &OwnedFd, mut offset: u64, mut bytes: &[u8]) -> Result<()> {
    while !bytes.is_empty() {
        match rustix::io::pwrite(fd, bytes, offset) {
            Ok(0) => return Err(Error::os("pwrite", "segment", Errno::NOSPC)),
            Ok(written) => {
                offset += written as u64;
                bytes = &bytes[written..];
            }
            Err(Errno::INTR) => {}
            Err(errno) => return Err(Error::os("pwrite", "segment", errno)),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sealed(bytes: &[u8]) -> (OwnedFd, ObjectId) {
        let fd = create_memfd("onecopy-test", bytes.len() as u64).unwrap();
        write_all(&fd, 0, bytes).unwrap();
        seal(&fd, true).unwrap();
        let id = identify(&fd).unwrap();
        (fd, id)
    }

    #[test]
    fn a_holder_gives_the_object_and_nobody_can_write_to_it() {
        let (fd, id) = sealed(b"weights");
        let opened = open_through_holder(std::process::id(), fd.as_raw_fd(), id).unwrap();
        assert_eq!(read_exact(&opened, 0, 7).unwrap(), b"weights");
        assert!(write_all(&fd, 0, b"W").is_err());
        assert!(fs::ftruncate(&fd, 0).is_err());
    }

    #[test]
    fn another_object_under_the_same_number_is_gone_not_opened() {
        let (fd, id) = sealed(b"weights");
        let other = ObjectId { inode: id.inode + 1, ..id };
        assert!(matches!(open_through_holder(std::process::id(), fd.as_raw_fd(), other), Err(Missing::Gone)));
    }

    #[test]
    fn an_unsealed_memfd_is_never_attached() {
        let fd = create_memfd("onecopy-test", 4096).unwrap();
        let id = identify(&fd).unwrap();
        assert!(matches!(open_through_holder(std::process::id(), fd.as_raw_fd(), id), Err(Missing::Gone)));
    }

    #[test]
    fn a_process_that_is_not_there_is_told_from_a_closed_descriptor() {
        let (_, id) = sealed(b"weights");
        assert!(matches!(open_through_holder(std::process::id(), 99_999, id), Err(Missing::Gone)));
        assert!(matches!(open_through_holder(4_194_999, 3, id), Err(Missing::NoProcess)));
    }
}
