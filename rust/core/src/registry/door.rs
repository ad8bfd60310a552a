//! Getting the registry's lock: at once if it is free, soon if others work, not at all if its holder is stuck.
//!
//! `F_OFD_SETLKW` has no timeout and a signal ends it only in the main thread, so waiting is trying again. The
//! deadline is by progress: hundreds of honest processes may keep a waiter longer than it, one stopped process moves
//! nothing. Progress is a commit, or a waiter's turn (which counts the transactions that commit nothing).

use std::os::fd::BorrowedFd;
use std::sync::{Mutex, PoisonError};
use std::thread::sleep;
use std::time::{Duration, Instant};

use super::file;
use crate::layout::registry::LOCK;
use crate::sys::directory::Directory;
use crate::sys::lock::{self, FileId};
use crate::sys::process::Activity;
use crate::{Error, Result};

/// A holder works for some 50 us, so a waiter looks again soon, then leaves the field to others.
const SPINS: [Duration; 5] = [
    Duration::from_micros(50),
    Duration::from_micros(100),
    Duration::from_micros(200),
    Duration::from_micros(400),
    Duration::from_micros(800),
];
const BACK_OFF: std::ops::Range<u64> = 5_000..25_000;
/// No progress for so long while the lock was never found free: its holder is stopped.
const DEADLINE: Duration = Duration::from_secs(2);
/// A store that is stuck is left alone for so long.
const LEFT_ALONE: Duration = Duration::from_secs(30);

/// Remembers that the lock was found stuck.
#[derive(Debug, Default)]
pub struct Door {
    stuck: Mutex<Option<(Instant, f64, String)>>,
}

/// The lock, until dropped.
pub struct Locked<'f> {
    pub file: BorrowedFd<'f>,
}

impl Drop for Locked<'_> {
    fn drop(&mut self) {
        // It fails only for a descriptor that somebody closed, and then the kernel has unlocked.
        let _ = lock::unlock(self.file, LOCK);
    }
}

impl Door {
    /// `Stuck` at once, while the store is left alone.
    pub fn check(&self, place: &str) -> Result<()> {
        let stuck = self.stuck.lock().unwrap_or_else(PoisonError::into_inner);
        match &*stuck {
            Some((since, waited, holder)) if since.elapsed() < LEFT_ALONE => {
                Err(Error::Stuck { place: place.to_owned(), waited: *waited, holder: holder.clone() })
            }
            _ => Ok(()),
        }
    }

    /// `None`: the name leads to another file by now, or to none.
    pub fn enter<'f>(
        &self,
        fd: BorrowedFd<'f>,
        id: FileId,
        directory: &Directory,
        name: &str,
    ) -> Result<Option<Locked<'f>>> {
        let try_lock = || lock::try_lock(fd, LOCK).map_err(|error| Error::os("lock", directory.shown(name), error));
        let still_named = || Ok::<_, Error>(file::named(directory, name)? == Some(id));
        if try_lock()? {
            let locked = Locked { file: fd };
            return Ok(still_named()?.then_some(locked));
        }
        let mut got = false;
        for pause in SPINS {
            sleep(pause);
            got = try_lock()?;
            if got {
                break;
            }
        }
        let (mut moved, mut seen) = (Instant::now(), file::progress(fd));
        while !got {
            sleep(back_off());
            got = try_lock()?;
            let now = file::progress(fd);
            if now != seen {
                (moved, seen) = (Instant::now(), now);
            }
            if !got && !still_named()? {
                return Ok(None);
            }
            if !got && moved.elapsed() >= DEADLINE {
                return Err(self.give_up(id, &directory.shown(name), moved.elapsed().as_secs_f64()));
            }
        }
        let locked = Locked { file: fd };
        file::take_turn(fd);
        Ok(still_named()?.then_some(locked))
    }

    fn give_up(&self, id: FileId, place: &str, waited: f64) -> Error {
        let holder = lock::owner(id, LOCK).map_or_else(
            || "its holder cannot be seen from here".to_owned(),
            |pid| {
                let name = std::fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
                let stopped = Activity::of(pid, 0).is_some_and(|activity| activity.stopped());
                format!(
                    "process {pid} ({}){}",
                    name.trim_end(),
                    if stopped { ", which is stopped, has it" } else { " has it" }
                )
            },
        );
        let mut stuck = self.stuck.lock().unwrap_or_else(PoisonError::into_inner);
        *stuck = Some((Instant::now(), waited, holder.clone()));
        Error::Stuck { place: place.to_owned(), waited, holder }
    }
}

/// At random, or waiters that started together would try together for ever.
fn back_off() -> Duration {
    let mut random = [0; 8];
    let _ = rustix::rand::getrandom(&mut random, rustix::rand::GetRandomFlags::empty());
    let span = BACK_OFF.end - BACK_OFF.start;
    Duration::from_micros(BACK_OFF.start + u64::from_ne_bytes(random) % span)
}
