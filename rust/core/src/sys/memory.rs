//! The process's own memory: giving it back, and who dies first where it runs out.
#![allow(unsafe_code)]

use std::fs;

/// Gives freed heap memory back to the system (malloc_trim(3)): without it all that was freed stays resident.
pub fn trim() {
    #[cfg(target_env = "gnu")]
    // SAFETY: no precondition; glibc locks its arenas itself.
    unsafe {
        libc::malloc_trim(0);
    }
}

/// While it lives, this process is the OOM killer's first choice: a memory cgroup kills instead of failing, and the pages
/// of an object are in nobody's RSS, so an innocent neighbour would go first. proc(5), `oom_score_adj`.
#[derive(Debug)]
pub struct Victim {
    before: String,
}

const OOM_SCORE: &str = "/proc/self/oom_score_adj";

impl Victim {
    /// None where the kernel does not let us.
    pub fn offer() -> Option<Self> {
        let before = fs::read_to_string(OOM_SCORE).ok()?;
        fs::write(OOM_SCORE, "1000").ok()?;
        Some(Self { before: before.trim().to_owned() })
    }
}

impl Drop for Victim {
    fn drop(&mut self) {
        let _ = fs::write(OOM_SCORE, &self.before);
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
            drop(victim);
        }
        assert_eq!(fs::read_to_string(OOM_SCORE).unwrap(), before);
    }
}
