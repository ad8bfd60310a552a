//! Who we are, and whether another process gets anywhere.

use std::fs;
use std::os::unix::fs::MetadataExt;

use crate::words::Identity;

/// This process, as others will want to know it.
pub fn identity() -> Identity {
    let stat = fs::read_to_string("/proc/self/stat").unwrap_or_default();
    Identity {
        pid: std::process::id(),
        pid_namespace: pid_namespace(),
        start_time: Stat::parse(&stat).map_or(0, |stat| stat.start_time),
        name: fs::read_to_string("/proc/self/comm").map_or_else(|_| String::new(), |name| name.trim_end().to_owned()),
    }
}

/// Inode of our PID namespace; 0 where `/proc` is another namespace's: the pids in it are not those that we know.
fn pid_namespace() -> u64 {
    let own = fs::read_link("/proc/self").is_ok_and(|link| link.as_os_str() == std::process::id().to_string().as_str());
    if own { fs::metadata("/proc/self/ns/pid").map_or(0, |data| data.ino()) } else { 0 }
}

/// A high descriptor number for the life lock. At exit descriptors are closed from the top: above a model's descriptor the
/// life lock is let go of first, and a holder that looks alive still has its descriptor open. Not above the process's
/// present descriptor table, though: to make that larger, the kernel lets a process with threads wait 5 to 15 ms.
pub fn high_descriptor() -> i32 {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let size = status.lines().find_map(|line| line.strip_prefix("FDSize:")?.trim().parse::<i32>().ok());
    size.map_or(0, |size| (size - 8).max(0))
}

/// What a process has done so far. Two equal ones some minutes apart: it does not move.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Activity {
    /// proc(5): R running, S asleep, D in the disk, T stopped, Z dead but not reaped, ...
    pub state: char,
    /// Of all its threads, in clock ticks.
    pub cpu_ticks: u64,
    /// Read and written through system calls; 0 where it may not be known.
    pub io_bytes: u64,
}

impl Activity {
    /// `None`: no such process, or a later one with its number.
    pub fn of(pid: u32, start_time: u64) -> Option<Self> {
        let text = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        let stat = Stat::parse(&text)?;
        if start_time != 0 && stat.start_time != start_time {
            return None;
        }
        let io = fs::read_to_string(format!("/proc/{pid}/io")).unwrap_or_default();
        let counted = |line: &str| line.strip_prefix("rchar: ").or_else(|| line.strip_prefix("wchar: "))?.parse().ok();
        let io_bytes = io.lines().filter_map(counted).fold(0, u64::wrapping_add);
        Some(Self { state: stat.state, cpu_ticks: stat.cpu_ticks, io_bytes })
    }

    pub fn stopped(&self) -> bool {
        matches!(self.state, 'T' | 't')
    }
}

struct Stat {
    state: char,
    cpu_ticks: u64,
    start_time: u64,
}

impl Stat {
    /// `/proc/<pid>/stat`: the name may contain blanks and parentheses, so counting starts after the last one.
    fn parse(text: &str) -> Option<Self> {
        let fields: Vec<&str> = text.get(text.rfind(')')? + 1..)?.split_ascii_whitespace().collect();
        let number = |field: usize| fields.get(field - 3)?.parse::<u64>().ok();
        Some(Self {
            state: fields.first()?.chars().next()?,
            cpu_ticks: number(14)?.wrapping_add(number(15)?),
            start_time: number(22)?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_with_parentheses() {
        let text = "7 (a) b (c) T 1 7 7 0 -1 4 0 0 0 0 30 12 0 0 20 0 1 0 987 0";
        let stat = Stat::parse(text).unwrap();
        assert_eq!((stat.state, stat.cpu_ticks, stat.start_time), ('T', 42, 987));
    }

    #[test]
    fn ourselves() {
        let me = identity();
        assert!(me.pid != 0 && me.pid_namespace != 0 && me.start_time != 0 && !me.name.is_empty(), "{me:?}");
        let before = Activity::of(me.pid, me.start_time).unwrap();
        assert!(!before.stopped());
        let bytes = fs::read("/proc/self/exe").unwrap();
        let after = Activity::of(me.pid, me.start_time).unwrap();
        assert!(after.io_bytes >= before.io_bytes + bytes.len() as u64);
        assert_eq!(Activity::of(me.pid, me.start_time + 1), None);
    }
}
