//! The process's own memory: giving it back, and who dies first where it runs out.
#![allow(unsafe_code)]

use std::fs;
use std::sync::{Mutex, MutexGuard, TryLockError};
use std::thread::sleep;
use std::time::Duration;

/// Gives freed heap memory back to the system (malloc_trim(3)): without it all that was freed stays resident.
pub fn trim() {
    #[cfg(target_env = "gnu")]
    // SAFETY: no precondition; glibc locks its arenas itself.
    unsafe {
        libc::malloc_trim(0);
    }
}

/// While one lives, this process is the OOM killer's first choice: a memory cgroup kills instead of failing, and the pages
/// of an object are in nobody's RSS, so an innocent neighbour would go first. proc(5), `oom_score_adj`.
#[derive(Debug)]
pub struct Victim(());

const OOM_SCORE: &str = "/proc/self/oom_score_adj";

/// How many live, and what the score was before the first.
static VICTIMS: Mutex<(u32, String)> = Mutex::new((0, String::new()));

/// Held for two system calls; in a forked child for ever, by a thread that does not exist there.
fn victims() -> Option<MutexGuard<'static, (u32, String)>> {
    for _ in 0..100 {
        match VICTIMS.try_lock() {
            Ok(victims) => return Some(victims),
            Err(TryLockError::Poisoned(error)) => return Some(error.into_inner()),
            Err(TryLockError::WouldBlock) => sleep(Duration::from_millis(1)),
        }
    }
    None
}

impl Victim {
    /// None where the kernel does not let us.
    pub fn offer() -> Option<Self> {
        let mut victims = victims()?;
        if victims.0 == 0 {
            victims.1 = fs::read_to_string(OOM_SCORE).ok()?.trim().to_owned();
            fs::write(OOM_SCORE, "1000").ok()?;
        }
        victims.0 += 1;
        Some(Self(()))
    }

    /// In a forked child: what its parent fills is not the child's offer.
    pub fn forget_parents() {
        let Some(mut victims) = victims() else { return };
        if std::mem::take(&mut victims.0) > 0 {
            let _ = fs::write(OOM_SCORE, &victims.1);
        }
    }
}

impl Drop for Victim {
    fn drop(&mut self) {
        let Some(mut victims) = victims() else { return };
        if victims.0 == 1 {
            let _ = fs::write(OOM_SCORE, &victims.1);
        }
        victims.0 = victims.0.saturating_sub(1);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_score_is_put_back() {
        let before = fs::read_to_string(OOM_SCORE).unwrap();
        if let Some(victim) = Victim::offer() {
            assert_eq!(fs::read_to_string(OOM_SCORE).unwrap().trim(), "1000");
            let second = Victim::offer();
            drop(victim);
            assert_eq!(fs::read_to_string(OOM_SCORE).unwrap().trim(), "1000");
            drop(second);
        }
        assert_eq!(fs::read_to_string(OOM_SCORE).unwrap(), before);
    }
}
