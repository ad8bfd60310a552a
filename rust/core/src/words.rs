//! The words that rooms of the core speak to each other: plain types, without a system call.

/// Who a process is, for other processes: where to find its descriptors, and what to print.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Identity {
    pub pid: u32,
    /// Inode of `/proc/self/ns/pid`: a pid means nothing in another PID namespace. 0: not known (no `/proc`).
    pub pid_namespace: u64,
    /// Field 22 of `/proc/<pid>/stat`, in clock ticks since boot. 0: not known.
    pub start_time: u64,
    /// `comm`, at most 15 bytes.
    pub name: String,
}

/// One model: what must be equal for two processes to share bytes.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Key {
    pub tag: String,
    /// The user's name for a content; empty where none was given.
    pub version: String,
    /// Format, Python minor version, torch and numpy versions, in words.
    pub compatibility: String,
}

impl std::fmt::Display for Key {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        if self.version.is_empty() {
            write!(out, "'{}'", self.tag.escape_debug())
        } else {
            write!(out, "'{}' (version '{}')", self.tag.escape_debug(), self.version.escape_debug())
        }
    }
}

/// Name and code hash of a constructor, to warn when two share a key.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Constructor {
    pub name: String,
    pub code_hash: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Backend {
    Memfd,
    Posix,
}

/// Which pages a segment is made of, in the sense of tmpfs(5)'s `huge=`: none of them huge, those that lie wholly within
/// the object (`within_size`), or the last one too.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Huge {
    Never,
    Auto,
    Always,
}

/// What a segment is: enough to open it, and to know that it is the right one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct SegmentFacts {
    pub uuid: [u8; 16],
    pub backend: Backend,
    /// Length of the object in bytes.
    pub bytes: u64,
    pub device: u64,
    pub inode: u64,
}

/// A published model, as it goes from process to process.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Content {
    pub facts: SegmentFacts,
    /// Bytes of its buffers.
    pub shared_bytes: u64,
    pub generation: u64,
    /// When it was published, CLOCK_REALTIME nanoseconds.
    pub since: u64,
    pub pinned: bool,
    pub constructor: Constructor,
}
