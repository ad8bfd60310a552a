//! Hostile rows under the transition function: a table as the verbs leave it, with fields overwritten between verbs.
//!
//! Whatever the rows say, every verb must end within so many looks at rows, say nothing but "corrupt", "full" or
//! "refused", and give no answer that the rows do not back. A table that held together before a verb must do so after it.

use std::sync::OnceLock;

use arbitrary::{Arbitrary, Unstructured};
use onecopy_core::layout::registry::rows::{HELD, LIVE, LOADING, POSIX, READY, SEALED, UNSHAREABLE, WITNESSES};
use onecopy_core::layout::registry::{Heads, Lease, NONE, Segment, TABLES, TableId};
use onecopy_core::registry::check::check;
use onecopy_core::registry::request::{
    AcquireRequest, Acquired, Ended, Holder, Holding, LeaseId, ProcessId, PublishRequest, Published, Ticket,
};
use onecopy_core::registry::table::{MemTable, Oracle, Stored, Table};
use onecopy_core::registry::transition::{MEMORY, Transition, key_hash};
use onecopy_core::words::{Backend, Constructor, Content, Identity, Key, SegmentFacts};
use onecopy_core::{Error, Result};
use zerocopy::IntoBytes;

use super::lies::{Lie, told};

const PLAYERS: usize = 3;
const PROCESSES: usize = 5;
const ENTRIES: usize = 6;
const SEGMENTS: usize = 10;
const LEASES: usize = 14;
/// Looks at rows that one verb may take: a walk of everything for each of everything would take more.
const LOOKS: u32 = 40 * (PROCESSES + ENTRIES + SEGMENTS + LEASES) as u32;

#[derive(Arbitrary, Clone, Debug)]
pub enum Op {
    Lie(Lie),
    Verb { player: u8, key: u8, verb: Verb },
}

#[derive(Arbitrary, Clone, Debug)]
pub enum Verb {
    Acquire { may_load: bool, oom: bool, waited: u8, skip: u8, take: bool },
    Reserve { posix: bool },
    Publish { with_ticket: bool, replace: bool, pin: bool },
    End(u8),
    Discard { any: Option<u8> },
    Release,
    HolderGone { row: u8 },
    Lost { segment: u8 },
    Remove { version: bool },
    Restore { segment: u8, named: bool, pinned: bool },
    Sweep,
    MakeRoom,
    List,
    Look,
    Leave,
    Die,
    Later { long: bool },
}

#[derive(Clone)]
struct Locks([bool; PROCESSES]);

impl Oracle for Locks {
    fn holds(&mut self, slot: u32) -> Result<bool> {
        Ok(self.0.get(slot as usize).copied().unwrap_or(false))
    }
}

/// A table that counts how often it is looked at.
struct Counted<'t> {
    rows: &'t mut MemTable,
    looks: u32,
}

impl Table for Counted<'_> {
    fn place(&self) -> String {
        self.rows.place()
    }
    fn capacity(&self, table: TableId) -> u32 {
        self.rows.capacity(table)
    }
    fn heads(&self) -> Heads {
        self.rows.heads()
    }
    fn set_heads(&mut self, heads: Heads) {
        self.rows.set_heads(heads);
    }
    fn get<R: Stored>(&mut self, index: u32) -> Result<R> {
        self.looks += 1;
        assert!(self.looks < LOOKS, "a verb that looks at rows {LOOKS} times");
        self.rows.get(index)
    }
    fn put<R: Stored>(&mut self, index: u32, row: R) -> Result<()> {
        self.rows.put(index, row)
    }
    fn unlink(&mut self, uuid: [u8; 16]) {
        self.rows.unlink(uuid);
    }
}

/// What a process knows by itself.
#[derive(Clone, Default)]
struct Player {
    me: Option<ProcessId>,
    ticket: Option<Ticket>,
    reserved: Option<(u32, SegmentFacts)>,
    leases: Vec<LeaseId>,
}

#[derive(Clone)]
struct World {
    table: MemTable,
    locks: Locks,
    players: [Player; PLAYERS],
    now: u64,
    oom_kills: u64,
    uuids: u8,
    /// The table held together after the last lie, or since.
    whole: bool,
}

fn key(number: u8) -> Key {
    let number = number % 4;
    Key { tag: format!("t{number}"), version: "1".to_owned(), compatibility: "fuzz".to_owned() }
}

pub fn run(bytes: &[u8]) {
    let mut input = Unstructured::new(bytes);
    // More than a story needs.
    story((0..32).map_while(|_| if input.is_empty() { None } else { Op::arbitrary(&mut input).ok() }));
}

pub fn story(ops: impl IntoIterator<Item = Op>) {
    static FURNISHED: OnceLock<World> = OnceLock::new();
    let mut world = FURNISHED.get_or_init(World::furnished).clone();
    for op in ops {
        told(&op);
        world.step(&op);
    }
}

impl World {
    /// Something of every kind in the table: named, pinned, superseded, loading, not shareable, of the dead.
    fn furnished() -> Self {
        let mut world = Self {
            table: MemTable::new(1000, PROCESSES, ENTRIES, SEGMENTS, LEASES),
            locks: Locks([false; PROCESSES]),
            players: Default::default(),
            now: 1 << 60,
            oom_kills: 5,
            uuids: 0,
            whole: true,
        };
        let load = Verb::Acquire { may_load: true, oom: false, waited: 0, skip: 0, take: true };
        let publish = |pin| Verb::Publish { with_ticket: true, replace: false, pin };
        for (player, key, verb) in [
            (0, 0, load.clone()),
            (0, 0, Verb::Reserve { posix: false }),
            (0, 0, publish(false)),
            (1, 0, load.clone()),
            (0, 0, Verb::Reserve { posix: false }),
            (0, 0, Verb::Publish { with_ticket: false, replace: true, pin: false }),
            (0, 1, load.clone()),
            (0, 1, Verb::Reserve { posix: true }),
            (0, 1, publish(true)),
            (1, 1, load.clone()),
            (1, 2, load.clone()),
            (1, 2, Verb::End(1)),
            (2, 0, load.clone()),
            (2, 2, load.clone()),
            (2, 2, Verb::Die),
            (2, 3, load.clone()),
            (2, 3, Verb::Reserve { posix: true }),
        ] {
            world.verb(player, key, &verb);
            assert!(world.whole);
        }
        world
    }

    fn step(&mut self, op: &Op) {
        match op {
            Op::Lie(lie) => self.lie(*lie),
            Op::Verb { player, key, verb } => self.verb(*player, *key, verb),
        }
    }

    fn lie(&mut self, lie: Lie) {
        let before = self.table.heads;
        let rows = &mut self.table;
        match TABLES[usize::from(lie.table) % TABLES.len()] {
            TableId::Heads => lie.tell(rows.heads.as_mut_bytes()),
            TableId::Words => overwrite(&mut rows.words, lie),
            TableId::Buckets => overwrite(&mut rows.buckets, lie),
            TableId::Processes => overwrite(&mut rows.processes, lie),
            TableId::Leases => overwrite(&mut rows.leases, lie),
            TableId::Segments => overwrite(&mut rows.segments, lie),
            TableId::Entries => overwrite(&mut rows.entries, lie),
        }
        // Page 0 is refused where a mark lies beyond its table.
        if TABLES.into_iter().any(|table| self.table.heads.limit(table) > self.table.capacity(table)) {
            self.table.heads = before;
        }
        self.whole = check(&mut self.table).is_ok();
    }

    /// As a session does it: all of a verb or nothing, and once more where something was full.
    fn transact<R>(&mut self, verb: impl Fn(&mut Transition<'_, Counted<'_>, Locks>) -> Result<R>) -> Option<R> {
        let before = self.table.clone();
        let mut done = self.once(&verb);
        if matches!(done, Err(Error::Full { .. })) {
            self.table = before.clone();
            done = self.once(&|transition| transition.make_room()).and_then(|()| self.once(&verb));
        }
        match done {
            Ok(answer) => {
                for uuid in std::mem::take(&mut self.table.unlinked) {
                    let named = before.segments.iter().any(|row| row.uuid == uuid && row.backend == POSIX);
                    assert!(named, "the name of no segment is given up");
                }
                if self.whole {
                    check(&mut self.table).expect("a whole table stays whole");
                }
                Some(answer)
            }
            Err(error) => {
                let corrupt = matches!(error, Error::Corrupt { .. });
                assert!(corrupt || matches!(error, Error::Full { .. } | Error::Refused(_)), "{error:?}");
                assert!(!corrupt || !self.whole, "a table that holds together: {error}");
                self.table = before;
                None
            }
        }
    }

    fn once<R>(&mut self, verb: &impl Fn(&mut Transition<'_, Counted<'_>, Locks>) -> Result<R>) -> Result<R> {
        let mut table = Counted { rows: &mut self.table, looks: 0 };
        verb(&mut Transition { table: &mut table, oracle: &mut self.locks, now: self.now })
    }

    fn forget(&mut self, player: usize) {
        if let Some(me) = self.players[player].me {
            self.locks.0[me.slot as usize] = false;
        }
        self.players[player] = Player::default();
    }

    /// Who the player is in the table; it enters, first or again, where the table does not know it.
    fn me(&mut self, player: usize) -> Option<ProcessId> {
        if let Some(me) = self.players[player].me {
            let known = (me.slot < self.table.heads.processes).then(|| self.table.processes[me.slot as usize]);
            if known.is_some_and(|row| row.state == LIVE && row.generation == me.generation) {
                return Some(me);
            }
            self.forget(player);
        }
        // One lives in another PID namespace.
        let identity = Identity {
            pid: 100 + u32::try_from(player).unwrap(),
            pid_namespace: 1 + u64::from(player == 2),
            start_time: 0,
            name: "p".to_owned(),
        };
        let locks = self.locks.0;
        let me = self.transact(|transition| {
            let (mut from, mut buried) = (0, false);
            loop {
                match transition.free_slot(from)? {
                    Some(slot) if !locks[slot as usize] => return transition.join(slot, &identity).map(Some),
                    Some(slot) => from = slot + 1,
                    None if !buried => {
                        transition.bury_dead()?;
                        (from, buried) = (0, true);
                    }
                    None => return Ok(None),
                }
            }
        })??;
        self.locks.0[me.slot as usize] = true;
        self.players[player].me = Some(me);
        Some(me)
    }

    fn verb(&mut self, player: u8, number: u8, verb: &Verb) {
        let player = usize::from(player) % PLAYERS;
        let Some(me) = self.me(player) else { return };
        let key = key(number);
        match *verb {
            Verb::Acquire { may_load, oom, waited, skip, take } => {
                self.oom_kills += u64::from(oom);
                let waited = (waited > 0).then(|| 1000 + u64::from(waited));
                let asked = AcquireRequest {
                    may_load,
                    waited,
                    skip: usize::from(skip % 4),
                    ..request(me, &key, self.now, self.oom_kills)
                };
                self.acquire(player, &asked, take);
            }
            Verb::Reserve { posix } => {
                self.uuids = self.uuids.wrapping_add(1);
                let facts = facts(self.uuids, if posix { Backend::Posix } else { Backend::Memfd });
                let row = self.transact(|transition| transition.reserve(me, &key, facts.uuid, facts.backend, 1));
                if let Some(row) = row {
                    self.players[player].reserved = Some((row, facts));
                }
            }
            Verb::Publish { with_ticket, replace, pin } => self.publish(player, me, &key, with_ticket, replace, pin),
            Verb::End(how) => {
                let Some(ticket) = self.players[player].ticket.take() else { return };
                let segment = self.players[player].reserved.take().map(|(row, _)| row);
                let reason = "reason".to_owned();
                let ended = match how % 3 {
                    0 => Ended::Failed { reason },
                    1 => Ended::Unshareable { reason },
                    _ => Ended::GaveUp,
                };
                self.transact(|transition| transition.end_loading(me, ticket, &ended, segment));
            }
            Verb::Discard { any } => {
                let own = self.players[player].reserved.take().map(|(row, _)| row);
                if let Some(row) = any.map(u32::from).or(own) {
                    self.transact(|transition| transition.discard(me, row));
                }
            }
            Verb::Release => {
                if let Some(lease) = self.players[player].leases.pop() {
                    self.transact(|transition| transition.release(lease));
                }
            }
            Verb::HolderGone { row } => {
                let found: Lease = self.table.leases[usize::from(row) % LEASES];
                let owner = ProcessId { slot: found.owner_slot, generation: found.owner_generation };
                let lease = LeaseId { row: u32::from(row), owner, serial: found.serial };
                self.transact(|transition| transition.holder_gone(lease));
            }
            Verb::Lost { segment } => {
                let row = usize::from(segment) % SEGMENTS;
                // Asked of what `acquire` named in the same transaction.
                if self.table.segments[row].state == SEALED {
                    self.transact(|transition| transition.segment_lost(u32::try_from(row).unwrap()));
                }
            }
            Verb::Remove { version } => {
                let version = version.then_some(&*key.version);
                self.transact(|transition| transition.remove(&key.tag, version));
            }
            Verb::Restore { segment, named, pinned } => {
                let row = self.table.segments[usize::from(segment) % SEGMENTS];
                let backend = if row.backend == POSIX { Backend::Posix } else { Backend::Memfd };
                let facts = SegmentFacts { uuid: row.uuid, backend, ..facts(0, backend) };
                let pinned = pinned && backend == Backend::Posix;
                let content = Content { pinned, since: self.now, generation: row.generation, ..content(facts) };
                let holding = Holding { key, content, fd: 7, named };
                if let Some(lease) = self.transact(|transition| transition.restore(me, &holding)) {
                    self.held(lease, me);
                    self.players[player].leases.push(lease);
                }
            }
            Verb::Sweep => {
                if self.transact(|transition| transition.sweep()).is_some() {
                    self.nobody_dead_holds();
                }
            }
            Verb::MakeRoom => {
                self.transact(|transition| transition.make_room());
            }
            Verb::List => {
                if let Some(listed) = self.transact(|transition| transition.list()) {
                    let contents = listed.iter().filter(|row| row.segment.is_some()).count();
                    let rows = self.table.heads.segments.high as usize;
                    assert!(contents <= rows, "{contents} contents in {rows} rows");
                }
            }
            Verb::Look => {
                self.transact(|transition| {
                    transition.everybody()?;
                    transition.segments()?;
                    transition.name_of([1; 16])?;
                    transition.holder_of(&key)
                });
            }
            Verb::Leave => {
                if self.transact(|transition| transition.leave(me)).is_some() {
                    let left = self.table.leases.iter().take(self.table.heads.leases.high as usize);
                    let ours = |row: &&Lease| row.state == HELD && owner(row) == me;
                    assert_eq!(left.filter(ours).count(), 0, "who left holds nothing");
                }
                self.forget(player);
            }
            Verb::Die => self.forget(player),
            Verb::Later { long } => self.now += if long { MEMORY } else { 1 },
        }
    }

    fn acquire(&mut self, player: usize, asked: &AcquireRequest, take: bool) {
        let me = asked.me;
        let Some(answer) = self.transact(|transition| transition.acquire(asked)) else { return };
        match answer {
            Acquired::Attach { segment, holders, foreign, content } => {
                self.backed(asked, segment, &content, &holders, foreign);
                if take && let Some(lease) = self.transact(|transition| transition.take_lease(me, segment, 7)) {
                    self.held(lease, me);
                    self.players[player].leases.push(lease);
                }
            }
            Acquired::Load { ticket, .. } => {
                assert!(asked.may_load);
                let entry = self.table.entries[ticket.entry as usize];
                assert_eq!((entry.state, entry.hash), (LOADING, key_hash(&asked.key)));
                assert_eq!((entry.loader_slot, entry.loader_generation), (me.slot, me.generation));
                self.players[player].ticket = Some(ticket);
            }
            Acquired::Wait { loader, .. } => {
                let lives = |slot: usize| {
                    let row = self.table.processes[slot];
                    row.state == LIVE && row.pid == loader.pid && self.locks.0[slot]
                };
                assert!((0..PROCESSES).any(lives), "waits for a dead loader");
            }
            Acquired::Unshareable { .. } => {
                let known = self.table.entries.iter().any(|row| {
                    row.hash == key_hash(&asked.key)
                        && row.state == UNSHAREABLE
                        && self.table.segments[row.current as usize].state == WITNESSES
                });
                assert!(known, "nobody says that it cannot be shared");
            }
            Acquired::GoPrivate { .. } => assert!(asked.waited.is_some()),
            Acquired::OutOfMemory { deaths, .. } => assert!(deaths >= 2),
            Acquired::NotFound => assert!(!asked.may_load),
        }
    }

    /// The rows back the answer to attach: the key's own sealed content, and holders that live.
    fn backed(&self, asked: &AcquireRequest, segment: u32, content: &Content, holders: &[Holder], foreign: bool) {
        let row: Segment = self.table.segments[segment as usize];
        let entry = self.table.entries[row.entry as usize];
        assert_eq!((row.state, entry.state, entry.current), (SEALED, READY, segment));
        assert_eq!(entry.hash, key_hash(&asked.key), "attached to another key's content");
        assert_eq!((row.uuid, row.bytes, row.inode), (content.facts.uuid, content.facts.bytes, content.facts.inode));
        assert!(foreign || row.pinned != 0 || asked.skip > 0 || !holders.is_empty(), "attached to the dead");
        let mine = self.table.processes[asked.me.slot as usize].pid_namespace;
        for holder in holders {
            let lease = self.table.leases[holder.lease.row as usize];
            assert_eq!((lease.state, lease.segment, lease.fd), (HELD, segment, holder.fd));
            let process = self.table.processes[lease.owner_slot as usize];
            assert!(self.lives(&lease) && process.pid == holder.identity.pid, "a holder that does not live");
            assert!(process.pid_namespace == mine && mine != 0, "a holder whose pid means nothing here");
        }
    }

    /// A lease that was given is in the table, and the segment's first.
    fn held(&self, lease: LeaseId, me: ProcessId) {
        let row = self.table.leases[lease.row as usize];
        assert_eq!((row.state, owner(&row), row.serial), (HELD, me, lease.serial));
        assert_eq!(self.table.segments[row.segment as usize].leases, lease.row);
    }

    fn nobody_dead_holds(&self) {
        let heads = self.table.heads;
        for row in self.table.leases.iter().take(heads.leases.high as usize) {
            assert!(row.state != HELD || self.lives(row), "a lease of the dead after a sweep: {row:?}");
        }
        for (slot, row) in self.table.processes.iter().enumerate().take(heads.processes as usize) {
            assert!(row.state != LIVE || self.locks.0[slot], "a dead process after a sweep");
        }
    }

    fn lives(&self, lease: &Lease) -> bool {
        let slot = lease.owner_slot as usize;
        self.table
            .processes
            .get(slot)
            .is_some_and(|row| row.state == LIVE && row.generation == lease.owner_generation && self.locks.0[slot])
    }

    fn publish(&mut self, player: usize, me: ProcessId, key: &Key, with_ticket: bool, replace: bool, pin: bool) {
        let Some((segment, facts)) = self.players[player].reserved else { return };
        let asked = PublishRequest {
            me,
            key: key.clone(),
            segment,
            content: Content { since: self.now, pinned: pin && facts.backend == Backend::Posix, ..content(facts) },
            ticket: self.players[player].ticket.filter(|_| with_ticket),
            replace,
            fd: 7,
        };
        let Some(Published::Ready { lease, .. }) = self.transact(|transition| transition.publish(&asked)) else {
            return;
        };
        let row = self.table.segments[segment as usize];
        let entry = self.table.entries[row.entry as usize];
        assert_eq!((row.state, entry.state, entry.current), (SEALED, READY, segment));
        assert_eq!(entry.hash, key_hash(key));
        self.held(lease, me);
        let known = &mut self.players[player];
        (known.reserved, known.ticket) = (None, None);
        known.leases.push(lease);
    }
}

fn owner(lease: &Lease) -> ProcessId {
    ProcessId { slot: lease.owner_slot, generation: lease.owner_generation }
}

fn overwrite<R: Stored>(rows: &mut [R], lie: Lie) {
    let row = usize::from(lie.row) % rows.len();
    lie.tell(rows[row].as_mut_bytes());
}

fn request(me: ProcessId, key: &Key, now: u64, oom_kills: u64) -> AcquireRequest {
    let constructor = Constructor { name: "fuzz.load".to_owned(), code_hash: 1 };
    AcquireRequest { me, key: key.clone(), constructor, now, oom_kills, waited: None, may_load: true, skip: 0 }
}

fn facts(number: u8, backend: Backend) -> SegmentFacts {
    SegmentFacts { uuid: [number; 16], backend, bytes: 4096, device: 1, inode: 2 }
}

fn content(facts: SegmentFacts) -> Content {
    let constructor = Constructor { name: "fuzz.load".to_owned(), code_hash: 1 };
    Content { facts, shared_bytes: 4096, generation: 0, since: 1, pinned: false, constructor }
}

const _: () = assert!(NONE == u32::MAX, "as the lies have it");
