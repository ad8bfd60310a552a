//! What may be asked of the registry, and what it answers. Plain data: the pure part sees nothing else.

use crate::words::{Constructor, Content, Identity, Key, SegmentFacts};

/// A process of the table: its slot, and the slot's generation (a slot is used again after its process died).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ProcessId {
    pub slot: u32,
    pub generation: u64,
}

/// Row number of an entry plus its episode: one attempt (with its one retry) to load a key.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Ticket {
    pub entry: u32,
    pub episode: u64,
    /// Counts the loaders of an entry; tells this loader from the one that took over.
    pub attempt: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct LeaseId {
    pub row: u32,
    /// Of the process row that owns it.
    pub owner: ProcessId,
    /// Tells it from an earlier lease in the same row.
    pub serial: u64,
}

impl ProcessId {
    /// Who is not in the table: a row that no table has.
    pub const NOBODY: Self = Self { slot: u32::MAX, generation: 0 };
}

impl LeaseId {
    /// No lease: of a row that no table has.
    pub const NONE: Self = Self { row: u32::MAX, owner: ProcessId::NOBODY, serial: 0 };
}

/// A living process that says it has the segment open.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Holder {
    pub lease: LeaseId,
    pub identity: Identity,
    /// Its descriptor of the memfd (-1 for posix).
    pub fd: i32,
    /// When it took its lease, CLOCK_REALTIME nanoseconds.
    pub since: u64,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct AcquireRequest {
    pub me: ProcessId,
    pub key: Key,
    pub constructor: Constructor,
    /// CLOCK_REALTIME, nanoseconds.
    pub now: u64,
    /// `oom_kill` counter of the caller's memory cgroup (0: not known).
    pub oom_kills: u64,
    /// The episode in which the caller began to wait, if it waited.
    pub waited: Option<u64>,
    /// `attach` never loads: absent means NotFound.
    pub may_load: bool,
    /// Living holders to pass over: the caller may not open their descriptors.
    pub skip: usize,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Acquired {
    /// READY: open one of the holders' descriptors (or the posix name), then ask `take_lease`, in the same lock hold.
    /// `holders` are those of the caller's PID namespace, living, newest first, some at a time;
    /// `foreign`: living holders in other PID namespaces exist.
    Attach {
        segment: u32,
        content: Content,
        holders: Vec<Holder>,
        foreign: bool,
    },
    /// The caller loads. `retry`: somebody's constructor failed before.
    Load {
        ticket: Ticket,
        retry: bool,
    },
    /// Another process loads: sleep on the futex word, then ask again with `waited`.
    Wait {
        loader: Identity,
        since: u64,
        episode: u64,
        futex_word: u32,
        futex_value: u32,
    },
    /// Known not to be shareable (the caller now counts among those who saw it).
    Unshareable {
        reason: String,
    },
    /// The constructor failed twice in the episode the caller waited in: load by yourself.
    GoPrivate {
        reason: String,
    },
    /// Two loaders in a row died while the cgroup's OOM counter moved.
    OutOfMemory {
        deaths: u32,
        need: u64,
    },
    NotFound,
}

/// How a loader ends without READY.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Ended {
    /// The constructor raised, or the object could not be rebuilt.
    Failed {
        reason: String,
    },
    Unshareable {
        reason: String,
    },
    /// Nothing is wrong with the model; it just was not published (timeout, KeyboardInterrupt, no room here).
    GaveUp,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct PublishRequest {
    pub me: ProcessId,
    pub key: Key,
    /// The segment row that `reserve` gave.
    pub segment: u32,
    /// What was filled, sealed, and checked; its generation is given by `publish`.
    pub content: Content,
    /// The loader's ticket; None for the verb `publish`.
    pub ticket: Option<Ticket>,
    pub replace: bool,
    pub fd: i32,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Published {
    Ready {
        generation: u64,
        lease: LeaseId,
    },
    /// The tag was replaced while the caller loaded: discard the segment and acquire again.
    Superseded,
    /// Not asked to replace: who has it.
    Exists {
        holder: Option<Identity>,
        since: u64,
        loading: bool,
    },
}

/// A row of `list`.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Listed {
    pub key: Key,
    pub state: State,
    pub generation: u64,
    /// Superseded or removed, and still held.
    pub unnamed: bool,
    pub pinned: bool,
    pub segment: Option<SegmentFacts>,
    pub shared_bytes: u64,
    pub constructor: Constructor,
    pub publisher: Option<Identity>,
    /// When it got its state, CLOCK_REALTIME nanoseconds.
    pub since: u64,
    pub holders: Vec<Holder>,
    pub reason: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum State {
    Loading,
    Ready,
    Unshareable,
    /// All who had to do with it are dead: the next use, or a sweep, clears it away.
    Stale,
    /// No segment; remembers failures or deaths.
    Vacant,
}

/// What a process must take along into a registry that is new to it (the file was removed, or it forked).
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Holding {
    pub key: Key,
    pub content: Content,
    /// Our descriptor of it.
    pub fd: i32,
    /// It has its key's name, as far as is known; else it comes along without.
    pub named: bool,
}
