//! How much memory may still be taken, as far as it can be seen, before a byte is written.
//!
//! Advice, not a guarantee: parents of a container are invisible, and others take memory at the same time. What does not
//! fit by these figures is refused with them; what fits is then taken by calls that fail cleanly.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicPtr, Ordering};

use rustix::process::Resource;

use super::directory::Directory;

/// The tightest limit that was found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Room {
    pub free: u64,
    /// In words, with the file it was read from.
    pub limit: String,
    /// A memory cgroup is the limit: there the kernel kills instead of failing.
    pub cgroup: bool,
}

/// Memory that may still be taken: the tightest of the machine's and of the memory cgroups in sight.
pub fn memory() -> Room {
    let machine =
        memory_available().map(|free| Room { free, limit: "MemAvailable in /proc/meminfo".into(), cgroup: false });
    machine.into_iter().chain(cgroups()).min_by_key(|room| room.free).unwrap_or_else(unlimited)
}

/// Room in the file system of `directory`, which bounds named objects besides.
pub fn file_system(directory: &Directory) -> Room {
    let Ok(stat) = rustix::fs::statvfs(directory.path()) else { return unlimited() };
    let limit = format!("file system of {}", directory.path().display());
    Room { free: stat.f_bavail.saturating_mul(stat.f_frsize), limit, cgroup: false }
}

fn unlimited() -> Room {
    Room { free: u64::MAX, limit: "no limit is visible".into(), cgroup: false }
}

/// The longest object that RLIMIT_FSIZE lets us make: beyond it the kernel sends SIGXFSZ.
pub fn file_size_limit() -> Option<u64> {
    rustix::process::getrlimit(Resource::Fsize).current
}

/// The `oom_kill` counter of our memory cgroup; 0 where there is none.
pub fn oom_kills() -> u64 {
    // Nothing that a forked child could find half made, by a thread that does not exist there: whoever loses the race leaks a
    // path.
    static COUNTER: AtomicPtr<Option<PathBuf>> = AtomicPtr::new(std::ptr::null_mut());
    let mut counter = COUNTER.load(Ordering::Acquire);
    if counter.is_null() {
        counter = Box::into_raw(Box::new(oom_counter()));
        COUNTER.store(counter, Ordering::Release);
    }
    // SAFETY: it comes from `Box::into_raw`, is never changed and never freed.
    #[allow(unsafe_code)]
    let counter = unsafe { &*counter };
    let text = counter.as_ref().and_then(|file| fs::read_to_string(file).ok()).unwrap_or_default();
    text.lines().find_map(|line| line.strip_prefix("oom_kill ")?.trim().parse().ok()).unwrap_or(0)
}

fn oom_counter() -> Option<PathBuf> {
    let group = memory_cgroups().into_iter().next()?;
    ["memory.events", "memory.oom_control"].iter().map(|name| group.join(name)).find(|file| file.exists())
}

fn memory_available() -> Option<u64> {
    let text = fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok().map(|kib| kib * 1024)
}

/// Whether there may be memory cgroups above ours that cannot be seen, as in a container: of a limit there nothing is known
/// before it kills.
pub fn limits_may_be_hidden() -> bool {
    /// The first cgroup namespace (linux/proc_ns.h): in any other the hierarchy seems to begin at its own group.
    const FIRST: &str = "cgroup:[4026531835]";
    let first = fs::read_link("/proc/self/ns/cgroup").is_ok_and(|link| link.as_os_str() == FIRST);
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    let whole = |v2: bool| mount_of(&mounts, v2).is_none_or(|(root, _)| root == "/");
    !(first && whole(false) && whole(true))
}

fn cgroups() -> Vec<Room> {
    memory_cgroups().iter().filter_map(|group| cgroup_room(group)).collect()
}

fn cgroup_room(group: &Path) -> Option<Room> {
    let number = |name: &str| fs::read_to_string(group.join(name)).ok()?.trim().parse::<u64>().ok();
    let (file, limit, usage) = match number("memory.max") {
        Some(limit) => ("memory.max", limit, number("memory.current")?),
        None => ("memory.limit_in_bytes", number("memory.limit_in_bytes")?, number("memory.usage_in_bytes")?),
    };
    // File pages are given back under pressure; shared memory is not counted among them.
    let cache: u64 = fs::read_to_string(group.join("memory.stat"))
        .unwrap_or_default()
        .lines()
        .filter_map(|line| line.split_once(' '))
        .filter(|(name, _)| {
            let v1 = file == "memory.limit_in_bytes";
            let (active, inactive) =
                if v1 { ("total_active_file", "total_inactive_file") } else { ("active_file", "inactive_file") };
            *name == active || *name == inactive
        })
        .filter_map(|(_, value)| value.trim().parse::<u64>().ok())
        .sum();
    let free = limit.saturating_sub(usage.saturating_sub(cache));
    Some(Room { free, limit: format!("{} = {limit}", group.join(file).display()), cgroup: true })
}

/// Our memory cgroup and those of its parents that are visible here, innermost first (cgroups(7); v1 and v2).
fn memory_cgroups() -> Vec<PathBuf> {
    let Ok(own) = fs::read_to_string("/proc/self/cgroup") else { return Vec::new() };
    let Ok(mounts) = fs::read_to_string("/proc/self/mountinfo") else { return Vec::new() };
    let mut found = Vec::new();
    for line in own.lines() {
        let mut fields = line.splitn(3, ':');
        let (Some(_), Some(controllers), Some(path)) = (fields.next(), fields.next(), fields.next()) else { continue };
        let v2 = controllers.is_empty();
        if !v2 && !controllers.split(',').any(|name| name == "memory") {
            continue;
        }
        let Some((root, point)) = mount_of(&mounts, v2) else { continue };
        // Inside a container the group's path may be shown from the host's root: what the mount shows is the group itself.
        let below = path.strip_prefix(root.as_str()).unwrap_or(path).trim_start_matches('/');
        let mut group = PathBuf::from(&point).join(below);
        if !group.is_dir() {
            group = PathBuf::from(&point);
        }
        while group.starts_with(&point) {
            found.push(group.clone());
            if !group.pop() {
                break;
            }
        }
    }
    found
}

/// (root, mount point) of the memory controller in `/proc/self/mountinfo`.
fn mount_of(mounts: &str, v2: bool) -> Option<(String, String)> {
    mounts.lines().find_map(|line| {
        let (left, right) = line.split_once(" - ")?;
        let mut right = right.split(' ');
        let kind = right.next()?;
        let options = right.next_back()?;
        let fits =
            if v2 { kind == "cgroup2" } else { kind == "cgroup" && options.split(',').any(|name| name == "memory") };
        let mut left = left.split(' ').skip(3);
        fits.then_some((left.next()?.to_owned(), left.next()?.to_owned()))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_tightest_limit_is_named() {
        let directory = Directory::open(Path::new("/dev/shm")).unwrap();
        for room in [memory(), file_system(&directory)] {
            assert!(room.free > 0 && !room.limit.is_empty());
        }
    }

    #[test]
    fn both_versions_of_the_mount_table_are_read() {
        let mounts = "30 24 0:26 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw,nsdelegate\n\
                      31 24 0:27 /job /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n";
        assert_eq!(mount_of(mounts, true), Some(("/".into(), "/sys/fs/cgroup".into())));
        assert_eq!(mount_of(mounts, false), Some(("/job".into(), "/sys/fs/cgroup/memory".into())));
    }
}
