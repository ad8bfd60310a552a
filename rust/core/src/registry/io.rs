//! Reading and writing the registry's file, at places, whole.

use std::os::fd::BorrowedFd;

use rustix::fs::{FallocateFlags, fallocate};
use rustix::io::{Errno, pread, pwrite, retry_on_intr};

use crate::{Error, Result};

/// Reads until the buffer is full or the file ends; returns how much there was.
pub fn read(file: BorrowedFd<'_>, place: &str, buffer: &mut [u8], offset: u64) -> Result<usize> {
    let mut done = 0;
    while done < buffer.len() {
        let rest = &mut buffer[done..];
        match retry_on_intr(|| pread(file, &mut *rest, offset + done as u64)) {
            Ok(0) => break,
            Ok(count) => done += count,
            Err(errno) => return Err(Error::os("pread", place, errno)),
        }
    }
    Ok(done)
}

pub fn write(file: BorrowedFd<'_>, place: &str, bytes: &[u8], offset: u64) -> Result<()> {
    let mut done = 0;
    while done < bytes.len() {
        match retry_on_intr(|| pwrite(file, &bytes[done..], offset + done as u64)) {
            Ok(0) => return Err(Error::os("pwrite", place, Errno::IO)),
            Ok(count) => done += count,
            Err(errno) => return Err(no_room(errno, "pwrite", place, bytes.len() as u64)),
        }
    }
    Ok(())
}

pub fn no_room(errno: Errno, call: &'static str, place: &str, need: u64) -> Error {
    if errno == Errno::NOSPC || errno == Errno::DQUOT {
        Error::NoRoom {
            need,
            free: 0,
            place: place.to_owned(),
            limit: "its file system is full".to_owned(),
            remedy: "Models load privately until something is removed there",
        }
    } else {
        Error::os(call, place, errno)
    }
}

/// Memory for a range of the file, so that writing it later cannot fail for lack of any.
pub fn allocate(file: BorrowedFd<'_>, place: &str, offset: u64, length: u64) -> Result<()> {
    match retry_on_intr(|| fallocate(file, FallocateFlags::empty(), offset, length)) {
        // Not a tmpfs; then there is no such promise to be had.
        Ok(()) | Err(Errno::OPNOTSUPP) => Ok(()),
        Err(errno) => Err(no_room(errno, "fallocate", place, length)),
    }
}
