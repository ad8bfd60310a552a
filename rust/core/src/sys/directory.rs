//! The directory that holds registries and named segments: `/dev/shm`, or `ONECOPY_DIR`.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::fs::{self, Mode, OFlags};

use crate::{Error, Result};

/// A directory opened once, checked, and used relative to its descriptor from then on.
#[derive(Debug)]
pub struct Directory {
    fd: OwnedFd,
    path: PathBuf,
}

impl Directory {
    /// # Errors
    /// `Os` where it cannot be opened, `Untrusted` where another user could rename our files in it.
    pub fn open(path: &Path) -> Result<Self> {
        let shown = path.display().to_string();
        let fd = fs::open(path, OFlags::DIRECTORY | OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())
            .map_err(|errno| Error::os("open", &shown, errno))?;
        let stat = fs::fstat(&fd).map_err(|errno| Error::os("fstat", &shown, errno))?;
        let me = rustix::process::geteuid().as_raw();
        let others_may_write = stat.st_mode & 0o022 != 0;
        let sticky = stat.st_mode & 0o1000 != 0;
        if (stat.st_uid != me && stat.st_uid != 0) || (others_may_write && !sticky) {
            return Err(Error::Untrusted {
                place: shown,
                why: format!("owner {}, mode {:o}: others could replace files in it", stat.st_uid, stat.st_mode & 0o7777),
                remedy: "Use a directory that you or root own, private or with the sticky bit",
            });
        }
        Ok(Self { fd, path: path.to_owned() })
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// `path/name`, for messages.
    pub fn shown(&self, name: &str) -> String {
        self.path.join(name).display().to_string()
    }
}

impl AsFd for Directory {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}
