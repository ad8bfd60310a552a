//! The transition function on a table in memory: random verbs of a few processes that die at random, and what must
//! hold after each. It is the code that runs on the file, verb by verb.

mod registry_support;

use std::collections::{HashMap, HashSet};

use onecopy_core::Error;
use onecopy_core::registry::check::check;
use onecopy_core::registry::request::{
    AcquireRequest, Acquired, Ended, Holding, LeaseId, ProcessId, PublishRequest, Published, State, Ticket,
};
use onecopy_core::registry::table::{MemTable, Oracle, Table};
use onecopy_core::registry::transition::{MEMORY, Transition};
use onecopy_core::words::{Backend, Content, Identity, Key, SegmentFacts};
use proptest::prelude::*;

use registry_support::{constructor, content, facts};

const PROCESSES: usize = 4;
const KEYS: usize = 3;

struct Locks(Vec<bool>);

impl Oracle for Locks {
    fn holds(&mut self, slot: u32) -> onecopy_core::Result<bool> {
        Ok(self.0[slot as usize])
    }
}

#[derive(Clone, Debug)]
enum Step {
    Join,
    Die,
    Leave,
    Acquire { key: usize, oom: bool },
    Reserve { key: usize, posix: bool },
    Publish { with_ticket: bool, replace: bool, pin: bool },
    End(u8),
    Discard,
    Release,
    HolderGone { other: usize },
    Lost { key: usize },
    Remove { key: usize },
    Restore { from: usize },
    Sweep,
    Wait(bool),
}

fn steps() -> impl Strategy<Value = Vec<(usize, Step)>> {
    let key = 0..KEYS;
    let step = prop_oneof![
        4 => Just(Step::Join),
        2 => Just(Step::Die),
        1 => Just(Step::Leave),
        12 => (key.clone(), any::<bool>()).prop_map(|(key, oom)| Step::Acquire { key, oom }),
        6 => (key.clone(), any::<bool>()).prop_map(|(key, posix)| Step::Reserve { key, posix }),
        8 => (prop::bool::weighted(0.7), prop::bool::weighted(0.3), prop::bool::weighted(0.2))
            .prop_map(|(with_ticket, replace, pin)| Step::Publish { with_ticket, replace, pin }),
        3 => (0..3u8).prop_map(Step::End),
        1 => Just(Step::Discard),
        4 => Just(Step::Release),
        1 => (0..PROCESSES).prop_map(|other| Step::HolderGone { other }),
        1 => key.clone().prop_map(|key| Step::Lost { key }),
        1 => key.prop_map(|key| Step::Remove { key }),
        1 => (0..PROCESSES).prop_map(|from| Step::Restore { from }),
        1 => Just(Step::Sweep),
        1 => any::<bool>().prop_map(Step::Wait),
    ];
    prop::collection::vec((0..PROCESSES, step), 1..120)
}

/// What a process knows by itself.
#[derive(Default)]
struct Process {
    me: Option<ProcessId>,
    ticket: Option<(usize, Ticket)>,
    reserved: Option<(usize, u32, SegmentFacts)>,
    leases: Vec<(usize, SegmentFacts, LeaseId)>,
    waited: HashMap<usize, u64>,
}

struct World {
    table: MemTable,
    locks: Locks,
    processes: Vec<Process>,
    published: HashSet<[u8; 16]>,
    /// Named objects that exist.
    objects: HashSet<[u8; 16]>,
    now: u64,
    oom_kills: u64,
    uuids: u8,
}

fn key(number: usize) -> Key {
    registry_support::key(&format!("t{number}"))
}

impl World {
    fn new() -> Self {
        Self {
            table: MemTable::new(1000, PROCESSES, KEYS, 7, 9),
            locks: Locks(vec![false; PROCESSES]),
            processes: (0..PROCESSES).map(|_| Process::default()).collect(),
            published: HashSet::new(),
            objects: HashSet::new(),
            now: 1 << 60,
            oom_kills: 5,
            uuids: 0,
        }
    }

    /// One transaction: all or nothing, and what it unlinks is gone.
    fn transact<R>(
        &mut self,
        verb: impl Fn(&mut Transition<'_, MemTable, Locks>) -> onecopy_core::Result<R>,
    ) -> Option<R> {
        let before = self.table.clone();
        let mut done = verb(&mut Transition { table: &mut self.table, oracle: &mut self.locks, now: self.now });
        if matches!(done, Err(Error::Full { .. })) {
            self.table = before.clone();
            let mut transition = Transition { table: &mut self.table, oracle: &mut self.locks, now: self.now };
            transition.sweep().unwrap();
            done = verb(&mut transition);
        }
        match done {
            Ok(answer) => {
                for uuid in std::mem::take(&mut self.table.unlinked) {
                    assert!(self.objects.remove(&uuid), "unlinked twice, or never made");
                }
                Some(answer)
            }
            Err(Error::Full { .. } | Error::Refused(_)) => {
                self.table = before;
                None
            }
            Err(error) => panic!("{error}"),
        }
    }

    fn forget(&mut self, process: usize) {
        if let Some(me) = self.processes[process].me {
            self.locks.0[me.slot as usize] = false;
        }
        self.processes[process] = Process::default();
    }

    fn step(&mut self, process: usize, step: &Step) {
        let now = self.now;
        let Some(me) = self.processes[process].me else {
            if matches!(step, Step::Join) {
                self.join(process);
            }
            return;
        };
        match *step {
            Step::Join => {}
            Step::Die => self.forget(process),
            Step::Leave => {
                self.transact(|transition| transition.leave(me));
                self.forget(process);
            }
            Step::Acquire { key: number, oom } => self.acquire(process, me, number, oom),
            Step::Reserve { key: number, posix } => {
                if self.processes[process].reserved.is_some() {
                    return;
                }
                self.uuids = self.uuids.wrapping_add(1);
                let mut uuid = [0; 16];
                uuid[..8].copy_from_slice(&self.table.heads.serial.to_ne_bytes());
                uuid[8] = self.uuids;
                let facts = facts(uuid, if posix { Backend::Posix } else { Backend::Memfd });
                let row = self.transact(|transition| transition.reserve(me, &key(number), uuid, facts.backend, 1));
                if let Some(row) = row {
                    if posix {
                        self.objects.insert(uuid);
                    }
                    self.processes[process].reserved = Some((number, row, facts));
                }
            }
            Step::Publish { with_ticket, replace, pin } => self.publish(process, me, with_ticket, replace, pin),
            Step::End(how) => {
                let Some((_, ticket)) = self.processes[process].ticket.take() else { return };
                let segment = self.processes[process].reserved.take().map(|(_, row, _)| row);
                let reason = "reason".to_owned();
                let ended = match how {
                    0 => Ended::Failed { reason },
                    1 => Ended::Unshareable { reason },
                    _ => Ended::GaveUp,
                };
                let ended = self.transact(|transition| transition.end_loading(me, ticket, &ended, segment));
                assert!(ended.is_some(), "a loader must be able to end");
            }
            Step::Discard => {
                if let Some((_, row, _)) = self.processes[process].reserved.take() {
                    self.transact(|transition| transition.discard(me, row));
                }
            }
            Step::Release => {
                if let Some((_, _, lease)) = self.processes[process].leases.pop() {
                    self.transact(|transition| transition.release(lease));
                }
            }
            Step::HolderGone { other } => {
                if let Some((_, _, lease)) = self.processes[other].leases.pop() {
                    self.transact(|transition| transition.holder_gone(lease));
                }
            }
            Step::Lost { key: number } => {
                self.transact(|transition| {
                    let asked = request(me, number, None, now, 0, false);
                    if let Acquired::Attach { segment, .. } = transition.acquire(&asked)? {
                        transition.segment_lost(segment)?;
                    }
                    Ok(())
                });
            }
            Step::Remove { key: number } => {
                self.transact(|transition| transition.remove(&key(number).tag, None));
            }
            Step::Restore { from } => {
                // As a forked child does with what its parent has open.
                let Some(&(number, facts, _)) = self.processes[from].leases.last() else { return };
                let holding = Holding { key: key(number), content: content(facts), fd: 7, named: true };
                if let Some(lease) = self.transact(|transition| transition.restore(me, &holding)) {
                    self.processes[process].leases.push((number, facts, lease));
                }
            }
            Step::Sweep => {
                self.transact(|transition| transition.sweep());
            }
            Step::Wait(long) => self.now += if long { MEMORY } else { 1 },
        }
    }

    fn join(&mut self, process: usize) {
        let pid = u32::try_from(process).unwrap() + 100;
        // Half of them live in another PID namespace.
        let identity = Identity { pid, pid_namespace: u64::from(pid % 2), start_time: 0, name: "p".to_owned() };
        let locks = self.locks.0.clone();
        let me = self.transact(|transition| {
            let mut from = 0;
            loop {
                let Some(slot) = transition.free_slot(from)? else {
                    transition.bury_dead()?;
                    from = 0;
                    continue;
                };
                if !locks[slot as usize] {
                    return transition.join(slot, &identity);
                }
                from = slot + 1;
            }
        });
        let me = me.expect("as many rows as processes");
        self.locks.0[me.slot as usize] = true;
        self.processes[process].me = Some(me);
    }

    fn acquire(&mut self, process: usize, me: ProcessId, number: usize, oom: bool) {
        if self.processes[process].ticket.is_some() {
            return; // one constructor at a time
        }
        self.oom_kills += u64::from(oom);
        let waited = self.processes[process].waited.get(&number).copied();
        let asked = request(me, number, waited, self.now, self.oom_kills, true);
        let answer = self.transact(|transition| {
            let answer = transition.acquire(&asked)?;
            let lease = match answer {
                Acquired::Attach { segment, .. } => Some(transition.take_lease(me, segment, 7)?),
                _ => None,
            };
            Ok((answer, lease))
        });
        let Some((answer, lease)) = answer else { return };
        self.processes[process].waited.remove(&number);
        match answer {
            Acquired::Attach { content: Content { facts, .. }, holders, foreign, .. } => {
                assert!(self.published.contains(&facts.uuid), "READY without a published segment");
                let pinned = self.pinned(number);
                assert!(pinned || foreign || !holders.is_empty(), "attached to the dead");
                self.processes[process].leases.push((number, facts, lease.unwrap()));
            }
            Acquired::Load { ticket, .. } => self.processes[process].ticket = Some((number, ticket)),
            Acquired::Wait { loader, episode, .. } => {
                let alive = self.processes.iter().any(|other| {
                    other.me.is_some()
                        && other.ticket.is_some_and(|(key, ticket)| key == number && ticket.episode == episode)
                });
                assert!(alive, "waits for {loader:?}, who does not load");
                self.processes[process].waited.insert(number, episode);
            }
            Acquired::Unshareable { .. } | Acquired::GoPrivate { .. } | Acquired::OutOfMemory { .. } => {}
            Acquired::NotFound => panic!("it may load"),
        }
    }

    fn pinned(&mut self, number: usize) -> bool {
        let listed = self.transact(|transition| transition.list()).unwrap();
        listed.iter().any(|row| row.key == key(number) && row.pinned)
    }

    fn publish(&mut self, process: usize, me: ProcessId, with_ticket: bool, replace: bool, pin: bool) {
        let Some((number, segment, facts)) = self.processes[process].reserved else { return };
        let ticket = self.processes[process].ticket.filter(|(key, _)| with_ticket && *key == number);
        let asked = PublishRequest {
            me,
            key: key(number),
            segment,
            content: Content { since: self.now, pinned: pin, ..content(facts) },
            ticket: ticket.map(|(_, ticket)| ticket),
            replace,
            fd: 7,
        };
        let listed = self.transact(|transition| transition.list()).unwrap();
        let pid = u32::try_from(process).unwrap() + 100;
        let loads = listed.iter().any(|row| {
            row.key == key(number)
                && row.state == State::Loading
                && row.publisher.as_ref().is_some_and(|loader| loader.pid == pid)
        });
        match self.transact(|transition| transition.publish(&asked)) {
            Some(Published::Ready { lease, .. }) => {
                assert!(ticket.is_none() || loads, "published with a ticket that was overtaken");
                self.published.insert(facts.uuid);
                self.processes[process].reserved = None;
                self.processes[process].leases.push((number, facts, lease));
                if ticket.is_some() {
                    self.processes[process].ticket = None;
                }
            }
            Some(Published::Superseded) => self.processes[process].ticket = None,
            Some(Published::Exists { .. }) | None => {}
        }
    }

    /// What holds between any two transactions.
    fn holds(&mut self) {
        check(&mut self.table).unwrap();
        let listed = self.transact(|transition| transition.list()).unwrap();
        for number in 0..KEYS {
            let named = listed.iter().filter(|row| row.key == key(number) && !row.unnamed).count();
            assert!(named <= 1, "{named} names for one key");
        }
        for row in &listed {
            if row.state == State::Ready {
                assert!(self.published.contains(&row.segment.unwrap().uuid));
            }
        }
        // No more than one living process has a ticket that still counts.
        for number in 0..KEYS {
            let loads = listed.iter().filter(|row| row.key == key(number) && row.state == State::Loading);
            assert!(loads.count() <= 1);
        }
        let in_table: HashSet<[u8; 16]> = (0..self.table.heads.segments.high)
            .map(|index| self.table.segments[index as usize])
            .filter(|row| row.state != 0 && row.state != 3 && row.backend == 1)
            .map(|row| row.uuid)
            .collect();
        // Every object has a row: whoever sweeps next finds it.
        assert!(self.objects.is_subset(&in_table), "an object nobody will remove");
        // What the living hold is there.
        for holder in &self.processes {
            for (_, facts, lease) in &holder.leases {
                let row = self.table.leases[lease.row as usize];
                assert!(row.serial == lease.serial, "a living process's lease is gone");
                assert_eq!(self.table.segments[row.segment as usize].uuid, facts.uuid);
                assert!(facts.backend != Backend::Posix || in_table.contains(&facts.uuid));
            }
        }
    }

    /// Everybody dies; one newcomer must be able to go on, and nothing may stay but what is pinned.
    fn end(&mut self) {
        (0..PROCESSES).for_each(|process| self.forget(process));
        self.join(0);
        self.transact(|transition| transition.sweep());
        let census = check(&mut self.table).unwrap();
        assert_eq!((census.processes, census.leases), (1, 0));
        let listed = self.transact(|transition| transition.list()).unwrap();
        let pinned = listed.iter().filter(|row| row.pinned).count();
        assert_eq!(census.segments as usize, pinned, "{listed:?}");
        assert_eq!(self.objects.len(), pinned);
        let me = self.processes[0].me.unwrap();
        for number in 0..KEYS {
            let asked = request(me, number, None, self.now, 0, true);
            let answer = self.transact(|transition| transition.acquire(&asked)).unwrap();
            assert!(!matches!(answer, Acquired::Wait { .. } | Acquired::Unshareable { .. }), "{answer:?}");
        }
        self.transact(|transition| transition.leave(me));
        self.forget(0);
        self.now += MEMORY;
        self.transact(|transition| {
            for number in 0..KEYS {
                transition.remove(&key(number).tag, None)?;
            }
            transition.sweep()
        });
        let census = check(&mut self.table).unwrap();
        assert_eq!((census.entries, census.segments, self.objects.len()), (0, 0, 0));
        assert!(self.table.heads().limit(onecopy_core::layout::registry::TableId::Leases) <= 9);
    }
}

fn request(
    me: ProcessId,
    number: usize,
    waited: Option<u64>,
    now: u64,
    oom_kills: u64,
    may_load: bool,
) -> AcquireRequest {
    AcquireRequest { me, key: key(number), constructor: constructor(), now, oom_kills, waited, may_load, skip: 0 }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 10_000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn whatever_happens(steps in steps()) {
        let mut world = World::new();
        for (process, step) in &steps {
            world.step(*process, step);
            world.holds();
        }
        world.end();
    }
}

#[test]
fn two_deaths_for_lack_of_memory_are_enough() {
    let mut world = World::new();
    world.join(0);
    world.join(1);
    for _ in 0..2 {
        let me = world.processes[0].me.unwrap();
        world.acquire(0, me, 0, false);
        assert!(world.processes[0].ticket.is_some());
        world.forget(0);
        world.oom_kills += 1;
        world.join(0);
    }
    let me = world.processes[1].me.unwrap();
    let asked = request(me, 0, None, world.now, world.oom_kills, true);
    let answer = world.transact(|transition| transition.acquire(&asked)).unwrap();
    assert!(matches!(answer, Acquired::OutOfMemory { deaths: 2, .. }), "{answer:?}");
    let asked = AcquireRequest { now: world.now + MEMORY, ..asked };
    let answer = world.transact(|transition| transition.acquire(&asked)).unwrap();
    assert!(matches!(answer, Acquired::Load { .. }), "{answer:?}");
}
