//! The rows. A `state` of 0 is a free row, whose link is the next free one.

use std::mem::size_of;

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use super::text::Text;
use super::{NONE, Row, TableId};

pub const FREE: u32 = 0;

/// `Process::state`
pub const LIVE: u32 = 1;
/// `Lease::state`
pub const HELD: u32 = 1;

/// `Segment::state`: being filled by its owner.
pub const FILLING: u32 = 1;
/// Filled and sealed; named while its entry's `current` says so.
pub const SEALED: u32 = 2;
/// No memory at all: its leases are the processes that know that the entry cannot be shared.
pub const WITNESSES: u32 = 3;

/// `Entry::state`
pub const VACANT: u32 = 1;
pub const LOADING: u32 = 2;
pub const READY: u32 = 3;
pub const UNSHAREABLE: u32 = 4;

pub const MEMFD: u32 = 0;
pub const POSIX: u32 = 1;

macro_rules! row {
    ($(#[$doc:meta])* $name:ident, $table:ident, $bytes:literal, { $($(#[$field_doc:meta])* $field:ident: $type:ty = $zero:expr,)* }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, FromBytes, IntoBytes, Immutable, KnownLayout)]
        #[repr(C)]
        pub struct $name { $($(#[$field_doc])* pub $field: $type,)* }

        const _: () = assert!(size_of::<$name>() == $bytes);

        impl $name {
            /// All zero, no links.
            pub const BLANK: Self = Self { $($field: $zero,)* };
        }

        impl Row for $name {
            const TABLE: TableId = TableId::$table;
        }
    };
}

row! {
    /// Slept on by those who wait for an entry of its number; the value says nothing, only that it changed.
    Word, Words, 4, { value: u32 = 0, }
}

row! {
    /// Entries whose key hash falls here.
    Bucket, Buckets, 4, { first: u32 = NONE, }
}

row! {
    /// Alive while somebody locks the byte `LIFE + row`.
    Process, Processes, 48, {
        /// Of the process that has, or last had, this row.
        generation: u64 = 0,
        pid_namespace: u64 = 0,
        /// Clock ticks since boot.
        start_time: u64 = 0,
        pid: u32 = 0,
        state: u32 = FREE,
        name: Text<15> = Text::EMPTY,
    }
}

row! {
    /// One process's claim on one segment.
    Lease, Leases, 48, {
        owner_generation: u64 = 0,
        /// Tells a lease from an earlier one in the same row.
        serial: u64 = 0,
        owner_slot: u32 = NONE,
        segment: u32 = NONE,
        /// The owner's descriptor of a memfd; -1 without one.
        fd: i32 = -1,
        previous: u32 = NONE,
        next: u32 = NONE,
        state: u32 = FREE,
        /// When it was taken, CLOCK_REALTIME nanoseconds.
        since: u64 = 0,
    }
}

row! {
    /// Belongs to one entry, whose list it is in.
    Segment, Segments, 256, {
        uuid: [u8; 16] = [0; 16],
        bytes: u64 = 0,
        device: u64 = 0,
        inode: u64 = 0,
        shared_bytes: u64 = 0,
        /// Who fills or filled it.
        owner_generation: u64 = 0,
        code_hash: u64 = 0,
        /// When it was published, CLOCK_REALTIME nanoseconds.
        since: u64 = 0,
        /// Which of the entry's contents it is.
        generation: u64 = 0,
        owner_slot: u32 = NONE,
        state: u32 = FREE,
        backend: u32 = MEMFD,
        pinned: u32 = 0,
        entry: u32 = NONE,
        previous: u32 = NONE,
        next: u32 = NONE,
        /// Head of the list of its leases, newest first.
        leases: u32 = NONE,
        constructor: Text<143> = Text::EMPTY,
    }
}

row! {
    /// One key.
    Entry, Entries, 1024, {
        /// Of tag, version and compatibility in full; the texts below may be cut.
        hash: [u8; 16] = [0; 16],
        loader_generation: u64 = 0,
        /// When it got its state, CLOCK_REALTIME nanoseconds.
        since: u64 = 0,
        /// Counts its published contents.
        generation: u64 = 0,
        /// 0: no episode is open.
        episode: u64 = 0,
        attempt: u64 = 0,
        /// Those who waited in it, or before, load by themselves. 0: none.
        failed_episode: u64 = 0,
        /// `oom_kill` of the loader's cgroup when it began.
        oom_kills: u64 = 0,
        oom_since: u64 = 0,
        /// Bytes the loader reserved.
        need: u64 = 0,
        code_hash: u64 = 0,
        state: u32 = FREE,
        loader_slot: u32 = NONE,
        /// Constructors that raised in the open episode.
        failures: u32 = 0,
        /// Loaders in a row that died while `oom_kill` moved.
        oom_deaths: u32 = 0,
        /// The segment that the key names: the content if READY, the witnesses if UNSHAREABLE.
        current: u32 = NONE,
        /// Head of the list of its segments.
        segments: u32 = NONE,
        /// Next entry of the bucket.
        next: u32 = NONE,
        word: u32 = 0,
        tag: Text<255> = Text::EMPTY,
        version: Text<191> = Text::EMPTY,
        compatibility: Text<127> = Text::EMPTY,
        constructor: Text<143> = Text::EMPTY,
        reason: Text<175> = Text::EMPTY,
    }
}

impl Lease {
    pub fn freed(next: u32) -> Self {
        Self { next, ..Self::BLANK }
    }
}

impl Segment {
    pub fn freed(next: u32) -> Self {
        Self { next, ..Self::BLANK }
    }
}

impl Entry {
    pub fn freed(next: u32) -> Self {
        Self { next, ..Self::BLANK }
    }
}
