//! The directory that holds registries and named segments: `/dev/shm`, or `ONECOPY_DIR`.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::{PoisonError, RwLock};

use rustix::fs::{self, Mode, OFlags};

use crate::{Error, Result};

/// A directory opened once, checked, and used relative to its descriptor from then on.
#[derive(Debug)]
pub struct Directory {
    path: PathBuf,
    /// (device, inode)
    id: (u64, u64),
    /// Leaked: a descriptor that somebody closed behind our back cannot be closed again, and a store lives as long as
    /// its process.
    fd: RwLock<&'static OwnedFd>,
}

impl Directory {
    /// # Errors
    /// `Os` where it cannot be opened, `Untrusted` where another user could rename our files in it.
    pub fn open(path: &Path) -> Result<Self> {
        let shown = path.display().to_string();
        let fd = open(path).map_err(|errno| Error::os("open", &shown, errno))?;
        let stat = fs::fstat(&fd).map_err(|errno| Error::os("fstat", &shown, errno))?;
        let me = rustix::process::geteuid().as_raw();
        let others_may_write = stat.st_mode & 0o022 != 0;
        let sticky = stat.st_mode & 0o1000 != 0;
        if (stat.st_uid != me && stat.st_uid != 0) || (others_may_write && !sticky) {
            return Err(Error::Untrusted {
                place: shown,
                why: format!(
                    "owner {}, mode {:o}: others could replace files in it",
                    stat.st_uid,
                    stat.st_mode & 0o7777
                ),
                remedy: "Use a directory that you or root own, private or with the sticky bit",
            });
        }
        let id = (stat.st_dev, stat.st_ino);
        Ok(Self { path: path.to_owned(), id, fd: RwLock::new(Box::leak(Box::new(fd))) })
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// `path/name`, for messages.
    pub fn shown(&self, name: &str) -> String {
        self.path.join(name).display().to_string()
    }

    fn leads_here(&self, fd: &OwnedFd) -> bool {
        fs::fstat(fd).is_ok_and(|stat| (stat.st_dev, stat.st_ino) == self.id)
    }
}

impl AsFd for Directory {
    /// The descriptor, opened again where daemons closed it. Where even that fails, the caller's call says why.
    fn as_fd(&self) -> BorrowedFd<'_> {
        let fd: &'static OwnedFd = *self.fd.read().unwrap_or_else(PoisonError::into_inner);
        if self.leads_here(fd) {
            return fd.as_fd();
        }
        match open(&self.path) {
            Ok(again) if self.leads_here(&again) => {
                let again: &'static OwnedFd = Box::leak(Box::new(again));
                *self.fd.write().unwrap_or_else(PoisonError::into_inner) = again;
                again.as_fd()
            }
            _ => fd.as_fd(),
        }
    }
}

fn open(path: &Path) -> rustix::io::Result<OwnedFd> {
    fs::open(path, OFlags::DIRECTORY | OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())
}
