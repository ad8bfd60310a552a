//! A small machine: the registry's table in memory, a few processes, and the objects that they have open. What decides
//! is the code that runs (`registry::transition`); this file plays the store around it, step by step.

use onecopy_core::layout::registry::rows::HELD;
use onecopy_core::layout::registry::{Lease, TableId};
use onecopy_core::registry::request::{
    AcquireRequest, Acquired, Ended, Holder, LeaseId, ProcessId, PublishRequest, Published, Ticket,
};
use onecopy_core::registry::table::{MemTable, Oracle, Stored, Table};
use onecopy_core::registry::transition::Transition;
use onecopy_core::words::{Backend, Constructor, Content, Identity, Key, SegmentFacts};
use onecopy_core::{Error, Result};

use crate::faults::Fault;
use crate::properties::{ALL_WAKE, HOLDS_TOGETHER, NOT_BEING_FREED, NOT_KILLED_AGAIN};

/// Fixed: what depends on time is behind it (`Event::Later`).
pub const NOW: u64 = 1 << 60;

#[derive(Clone, Debug)]
pub struct World {
    pub table: MemTable,
    /// By number; the number is in the uuid.
    pub objects: Vec<Object>,
    pub processes: Vec<Process>,
    /// Who is stopped inside the registry's lock.
    pub lock: Option<usize>,
    pub now: u64,
    pub oom_kills: u64,
    /// Loaders of a tag in a row that were killed for lack of memory.
    pub oom_in_a_row: Vec<u32>,
    pub left: Left,
    pub fault: Fault,
    /// The first thing that went wrong where it happened, not in a state that can be looked at afterwards.
    pub wrong: Option<&'static str>,
    pub said: Option<String>,
    /// The step is another one under another name.
    pub same_as_before: bool,
    /// A sweep was the last step.
    pub swept: bool,
}

/// What may still happen, so that the machine is finite.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Left {
    pub starts: u8,
    pub verbs: u8,
    pub deaths: u8,
    pub stops: u8,
    pub failures: u8,
    pub later: u8,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Object {
    pub backend: Backend,
    pub named: bool,
    /// Filled and sealed.
    pub sealed: bool,
}

#[derive(Clone, Debug, Default)]
pub struct Process {
    pub me: Option<ProcessId>,
    /// Its life lock is held.
    pub life: bool,
    pub phase: Phase,
    pub held: Vec<Held>,
    /// Objects that it has open.
    pub open: Vec<usize>,
    /// What the registry did not take while it was stuck; the housekeeping thread tries again.
    pub owed: Vec<Owed>,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Held {
    pub tag: usize,
    pub object: usize,
    pub lease: LeaseId,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Owed {
    Release(LeaseId),
    Discard(u32),
    GiveUp(Ticket),
}

/// Where a process is between two steps.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Phase {
    #[default]
    Absent,
    Idle,
    Waiting {
        tag: usize,
        word: u32,
        value: u32,
        episode: u64,
    },
    /// In the constructor.
    Loading(Load),
    /// On its way to READY, with a loader's ticket or by the verb `publish`.
    Publishing {
        tag: usize,
        load: Option<Load>,
        replace: bool,
        pin: bool,
        row: u32,
        object: usize,
        stage: Stage,
    },
    /// Killed: the kernel has let go of the life lock or of the descriptors, not of both yet.
    Dying,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Load {
    pub tag: usize,
    pub ticket: Ticket,
    /// Somebody took the tag away from it meanwhile: `remove`, or `publish` with `replace`.
    pub overtaken: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Stage {
    /// The row is there, the object is not.
    Reserved,
    Sealed,
}

/// Who lives, as the kernel says it; and what a broken kernel would say.
pub struct Locks<'w> {
    held: &'w [(u32, bool)],
    fault: Fault,
    loaders: &'w [u32],
}

impl Oracle for Locks<'_> {
    fn holds(&mut self, slot: u32) -> Result<bool> {
        if self.fault == Fault::LoadersLookDead && self.loaders.contains(&slot) {
            return Ok(false);
        }
        Ok(self.held.contains(&(slot, true)))
    }
}

pub fn key(tag: usize) -> Key {
    Key { tag: format!("t{tag}"), version: String::new(), compatibility: String::new() }
}

pub fn uuid(object: usize) -> [u8; 16] {
    let mut uuid = [7; 16];
    uuid[0] = u8::try_from(object).unwrap();
    uuid
}

impl World {
    pub fn new(processes: usize, tags: usize, left: Left, fault: Fault) -> Self {
        Self {
            table: MemTable::new(0, processes + 1, tags + 1, 8, 12),
            objects: Vec::new(),
            processes: vec![Process::default(); processes],
            lock: None,
            now: NOW,
            oom_kills: 0,
            oom_in_a_row: vec![0; tags],
            left,
            fault,
            wrong: None,
            said: None,
            same_as_before: false,
            swept: false,
        }
    }

    /// The lock, a verb, the commit. All or nothing, as `Session::verb` has it; names go before the commit.
    /// `dies`: killed between the two.
    pub fn transact<R>(
        &mut self,
        dies: bool,
        verb: impl Fn(&mut Transition<'_, Wrapped<'_>, Locks<'_>>) -> Result<R>,
    ) -> Option<R> {
        let held: Vec<_> = self.processes.iter().filter_map(|p| Some((p.me?.slot, p.life))).collect();
        let loaders: Vec<_> = self
            .processes
            .iter()
            .filter(|p| matches!(p.phase, Phase::Loading(_) | Phase::Publishing { load: Some(_), .. }))
            .filter_map(|p| Some(p.me?.slot))
            .collect();
        let mut locks = Locks { held: &held, fault: self.fault, loaders: &loaders };
        let before = self.table.clone();
        let now = self.now;
        let fault = self.fault;
        let mut run = |table: &mut MemTable, sweep: bool| {
            let mut wrapped = Wrapped { rows: table, fault };
            let mut transition = Transition { table: &mut wrapped, oracle: &mut locks, now };
            if sweep {
                transition.sweep()?;
            }
            verb(&mut transition)
        };
        let mut done = run(&mut self.table, false);
        if matches!(done, Err(Error::Full { .. })) {
            self.table = before.clone();
            done = run(&mut self.table, true);
        }
        let freed = !self.table.unlinked.is_empty();
        let answer = match done {
            Ok(answer) => answer,
            Err(Error::Full { .. } | Error::Refused(_)) => {
                self.table = before;
                return None;
            }
            Err(error) => {
                self.table = before;
                self.wrong = Some(HOLDS_TOGETHER);
                self.said = Some(error.to_string());
                return None;
            }
        };
        for uuid in std::mem::take(&mut self.table.unlinked) {
            self.objects[uuid[0] as usize].named = false;
        }
        if dies {
            // Without a name that went, it is a death before the transaction, which is an event of its own.
            self.same_as_before = !freed;
            self.table = before;
            return None;
        }
        Some(answer)
    }

    pub fn join(&mut self, p: usize) {
        let free = self.transact(false, |transition| transition.free_slot(0));
        let Some(Some(slot)) = free else {
            self.transact(false, |transition| transition.bury_dead());
            return;
        };
        let pid = 100 + u32::try_from(p).unwrap();
        let identity = Identity { pid, pid_namespace: 1, start_time: 0, name: String::new() };
        // The life lock is taken first: nobody sees the row without it.
        self.processes[p] = Process { life: true, phase: Phase::Idle, ..Process::default() };
        self.processes[p].me = Some(ProcessId { slot, generation: 0 });
        let me = self.transact(false, |transition| {
            let me = transition.join(slot, &identity)?;
            transition.sweep()?;
            Ok(me)
        });
        self.processes[p].me = me;
        self.left.starts -= 1;
    }

    /// As `Store::acquire` does it: what proves gone is dropped and the question asked again, under one lock.
    pub fn acquire(&mut self, p: usize, tag: usize, waited: Option<u64>, dies: bool) {
        let me = self.processes[p].me.unwrap();
        let request = AcquireRequest {
            me,
            key: key(tag),
            constructor: Constructor::default(),
            now: self.now,
            oom_kills: self.oom_kills,
            waited,
            may_load: true,
            skip: 0,
        };
        let (opened, held): (Vec<_>, Vec<_>) =
            (self.processes.iter().map(|p| p.open.clone()).collect(), self.processes[p].held.clone());
        let objects = self.objects.clone();
        let fault = self.fault;
        let answer = self.transact(dies, |transition| {
            for _ in 0..16 {
                let answer = transition.acquire(&request)?;
                let Acquired::Attach { segment, ref content, ref holders, .. } = answer else {
                    return Ok((answer, None));
                };
                let object = content.facts.uuid[0] as usize;
                if held.iter().any(|held| held.object == object) {
                    return Ok((answer, None));
                }
                if content.facts.backend == Backend::Posix {
                    if objects[object].named || fault == Fault::LeaseWithoutOpening {
                        let lease = transition.take_lease(me, segment, -1)?;
                        return Ok((answer, Some((object, lease))));
                    }
                    transition.segment_lost(segment)?;
                    continue;
                }
                let works = |holder: &&Holder| {
                    opened[holder.identity.pid as usize - 100].contains(&object) || fault == Fault::LeaseWithoutOpening
                };
                if holders.iter().any(|holder| works(&holder)) {
                    let lease = transition.take_lease(me, segment, i32::try_from(object).unwrap())?;
                    return Ok((answer, Some((object, lease))));
                }
                for holder in holders {
                    transition.holder_gone(holder.lease)?;
                }
            }
            panic!("asked again and again");
        });
        if dies {
            return self.die(p, true, false);
        }
        self.processes[p].phase = Phase::Idle;
        let Some((answer, attached)) = answer else { return }; // a full table: private
        match answer {
            Acquired::Attach { .. } => {
                self.oom_in_a_row[tag] = 0;
                let Some((object, lease)) = attached else { return };
                let there = self.objects[object].sealed
                    && (self.objects[object].named || self.processes.iter().any(|p| p.open.contains(&object)));
                if !there {
                    self.wrong = Some(NOT_BEING_FREED);
                }
                self.processes[p].open.push(object);
                self.processes[p].held.push(Held { tag, object, lease });
            }
            Acquired::Load { ticket, .. } => {
                if self.oom_in_a_row[tag] >= 2 {
                    self.wrong = Some(NOT_KILLED_AGAIN);
                }
                self.processes[p].phase = Phase::Loading(Load { tag, ticket, overtaken: false });
            }
            Acquired::Wait { loader, episode, futex_word, futex_value, .. } => {
                let loader = loader.pid as usize - 100;
                if !self.loads(loader, tag) {
                    self.wrong = Some(ALL_WAKE);
                }
                self.processes[p].phase = Phase::Waiting { tag, word: futex_word, value: futex_value, episode };
            }
            _ => {} // private, or an error that its caller gets
        }
    }

    /// A living process that will end the load of this tag one way or the other, dying ones and those who owe the registry
    /// the end of it included.
    pub fn loads(&self, p: usize, tag: usize) -> bool {
        let process = &self.processes[p];
        let owes = process.owed.iter().any(|owed| matches!(owed, Owed::GiveUp(_)));
        process.life && (owes || process.phase == Phase::Dying || process.load().is_some_and(|load| load.tag == tag))
    }

    pub fn reserve(&mut self, p: usize, tag: usize, load: Option<Load>, backend: Backend, replace: bool, pin: bool) {
        let me = self.processes[p].me.unwrap();
        let object = self.free_object();
        let row = self.transact(false, |transition| transition.reserve(me, &key(tag), uuid(object), backend, 1));
        let Some(row) = row else {
            // No room in the table: the loader gives up, and loads privately.
            return self.end(p, load, Ended::GaveUp);
        };
        let fresh = Object { backend, named: false, sealed: false };
        if object == self.objects.len() {
            self.objects.push(fresh);
        } else {
            self.objects[object] = fresh;
        }
        let stage = Stage::Reserved;
        self.processes[p].phase = Phase::Publishing { tag, load, replace, pin, row, object, stage };
    }

    /// The number of an object that nothing leads to any more, or a new one.
    fn free_object(&self) -> usize {
        let rows = self.table.segments.iter().filter(|row| row.state != 0).map(|row| row.uuid[0] as usize);
        let used: Vec<usize> = rows.chain(self.processes.iter().flat_map(Process::objects)).collect();
        (0..self.objects.len())
            .find(|object| !used.contains(object) && !self.objects[*object].named)
            .unwrap_or(self.objects.len())
    }

    /// Nobody else can see what is between making and sealing it.
    pub fn make_and_seal(&mut self, p: usize) {
        let Phase::Publishing { object, ref mut stage, .. } = self.processes[p].phase else { return };
        *stage = Stage::Sealed;
        self.processes[p].open.push(object);
        self.objects[object].named = self.objects[object].backend == Backend::Posix;
        self.objects[object].sealed = self.fault != Fault::PublishBeforeSeal;
    }

    pub fn publish(&mut self, p: usize, dies: bool) {
        let Phase::Publishing { tag, load, replace, pin, row, object, .. } = self.processes[p].phase.clone() else {
            return;
        };
        let backend = self.objects[object].backend;
        let facts = SegmentFacts { uuid: uuid(object), backend, bytes: 1, device: 0, inode: 0 };
        let constructor = Constructor::default();
        let content = Content { facts, shared_bytes: 1, generation: 0, since: self.now, pinned: pin, constructor };
        let fd = if backend == Backend::Memfd { i32::try_from(object).unwrap() } else { -1 };
        let ticket = load.map(|load| load.ticket);
        let me = self.processes[p].me.unwrap();
        let request = PublishRequest { me, key: key(tag), segment: row, content, ticket, replace, fd };
        let published = self.transact(dies, |transition| transition.publish(&request));
        if dies {
            return self.die(p, true, false);
        }
        if let Some(Published::Ready { lease, .. }) = published {
            self.processes[p].phase = Phase::Idle;
            self.processes[p].held.push(Held { tag, object, lease });
            self.oom_in_a_row[tag] = 0;
            self.overtake(tag);
            return;
        }
        self.abandon(p, Ended::GaveUp);
    }

    /// Whoever loads this tag now does so for himself.
    fn overtake(&mut self, tag: usize) {
        for process in &mut self.processes {
            if let Some(load) = process.load_mut().filter(|load| load.tag == tag) {
                load.overtaken = true;
            }
        }
    }

    /// The publication is dropped, then the load ended, each in its own transaction. Stuck: both are owed.
    pub fn abandon(&mut self, p: usize, ended: Ended) {
        let Phase::Publishing { load, row, object, .. } = self.processes[p].phase.clone() else { return };
        let me = self.processes[p].me.unwrap();
        if self.lock.is_some() {
            self.processes[p].owed.push(Owed::Discard(row));
        } else {
            self.transact(false, |transition| transition.discard(me, row));
        }
        self.processes[p].open.retain(|open| *open != object);
        self.end(p, load, ended);
    }

    /// The loader ends without READY.
    pub fn end(&mut self, p: usize, load: Option<Load>, ended: Ended) {
        self.processes[p].phase = Phase::Idle;
        let (Some(load), Some(me)) = (load, self.processes[p].me) else { return };
        if self.lock.is_some() {
            self.processes[p].owed.push(Owed::GiveUp(load.ticket));
            return;
        }
        if matches!(ended, Ended::Failed { .. }) {
            self.oom_in_a_row[load.tag] = 0;
        }
        self.transact(false, |transition| transition.end_loading(me, load.ticket, &ended, None));
    }

    /// The row goes first, then the descriptor.
    pub fn release(&mut self, p: usize, which: usize, dies: bool) {
        let held = self.processes[p].held[which].clone();
        if self.fault == Fault::CloseBeforeRelease {
            return self.processes[p].open.retain(|open| *open != held.object);
        }
        self.processes[p].held.remove(which);
        if self.lock.is_some() {
            self.processes[p].owed.push(Owed::Release(held.lease));
        } else {
            self.transact(dies, |transition| transition.release(held.lease));
        }
        self.processes[p].open.retain(|open| *open != held.object);
        if dies {
            self.die(p, true, false);
        }
    }

    pub fn pay(&mut self, p: usize) {
        let me = self.processes[p].me.unwrap();
        match self.processes[p].owed.remove(0) {
            Owed::Release(lease) => self.transact(false, |transition| transition.release(lease)),
            Owed::Discard(row) => self.transact(false, |transition| transition.discard(me, row)),
            Owed::GiveUp(ticket) => {
                self.transact(false, |transition| transition.end_loading(me, ticket, &Ended::GaveUp, None))
            }
        };
    }

    pub fn remove(&mut self, p: usize, tag: usize, dies: bool) {
        self.transact(dies, |transition| transition.remove(&key(tag).tag, None));
        if dies {
            return self.die(p, true, false);
        }
        self.overtake(tag);
        self.oom_in_a_row[tag] = 0;
    }

    pub fn sweep(&mut self, p: usize, dies: bool) {
        self.transact(dies, |transition| transition.sweep());
        if dies {
            self.die(p, true, false);
        }
        self.swept = !dies;
    }

    pub fn leave(&mut self, p: usize, dies: bool) {
        let me = self.processes[p].me.unwrap();
        self.transact(dies, |transition| transition.leave(me));
        if dies {
            return self.die(p, true, false);
        }
        self.processes[p] = Process::default();
    }

    /// SIGKILL. The kernel closes one descriptor after another: `life_first` or the objects first.
    pub fn die(&mut self, p: usize, life_first: bool, of_memory: bool) {
        self.left.deaths = self.left.deaths.saturating_sub(1);
        if self.lock == Some(p) {
            self.lock = None;
        }
        let load = self.processes[p].load().filter(|load| !load.overtaken);
        if let Some(load) = load {
            self.oom_in_a_row[load.tag] = if of_memory { self.oom_in_a_row[load.tag] + 1 } else { 0 };
        }
        self.oom_kills += u64::from(of_memory);
        let process = &mut self.processes[p];
        process.phase = Phase::Dying;
        process.held.clear();
        process.owed.clear();
        if life_first {
            process.life = false;
        } else {
            process.open.clear();
        }
    }

    pub fn dead(&mut self, p: usize) {
        self.processes[p] = Process::default();
    }

    /// Ten minutes pass for what is remembered.
    pub fn later(&mut self) {
        self.now += onecopy_core::registry::transition::MEMORY;
        self.left.later -= 1;
        self.oom_in_a_row.iter_mut().for_each(|count| *count = 0);
    }

    /// Leases of the table that a living process does not know of, by row.
    pub fn unknown_leases(&self) -> Vec<u32> {
        let limit = self.table.heads().limit(TableId::Leases);
        (0..limit)
            .filter(|&row| {
                let lease: &Lease = &self.table.leases[row as usize];
                let segment = self.table.segments.get(lease.segment as usize);
                let witness = segment.is_some_and(|s| s.state == onecopy_core::layout::registry::rows::WITNESSES);
                lease.state == HELD && !witness && !self.known(row, lease)
            })
            .collect()
    }

    fn known(&self, row: u32, lease: &Lease) -> bool {
        let Some(owner) = self.processes.iter().find(|p| {
            p.me == Some(ProcessId { slot: lease.owner_slot, generation: lease.owner_generation })
                && p.life
                && p.phase != Phase::Dying
        }) else {
            return true; // a dead one's: swept
        };
        owner
            .held
            .iter()
            .any(|held| held.lease.row == row && held.lease.serial == lease.serial && owner.open.contains(&held.object))
            || owner.owed.iter().any(|owed| matches!(owed, Owed::Release(id) if id.row == row))
    }
}

impl Process {
    pub fn load(&self) -> Option<Load> {
        match self.phase {
            Phase::Loading(load) | Phase::Publishing { load: Some(load), .. } => Some(load),
            _ => None,
        }
    }

    fn load_mut(&mut self) -> Option<&mut Load> {
        match &mut self.phase {
            Phase::Loading(load) | Phase::Publishing { load: Some(load), .. } => Some(load),
            _ => None,
        }
    }

    fn objects(&self) -> Vec<usize> {
        let publishing = match self.phase {
            Phase::Publishing { object, .. } => Some(object),
            _ => None,
        };
        self.open.iter().copied().chain(self.held.iter().map(|held| held.object)).chain(publishing).collect()
    }
}

/// The table, and what a broken one would do.
pub struct Wrapped<'t> {
    rows: &'t mut MemTable,
    fault: Fault,
}

impl Table for Wrapped<'_> {
    fn place(&self) -> String {
        self.rows.place()
    }

    fn capacity(&self, table: TableId) -> u32 {
        self.rows.capacity(table)
    }

    fn heads(&self) -> onecopy_core::layout::registry::Heads {
        self.rows.heads()
    }

    fn set_heads(&mut self, heads: onecopy_core::layout::registry::Heads) {
        self.rows.set_heads(heads);
    }

    fn get<R: Stored>(&mut self, index: u32) -> Result<R> {
        self.rows.get(index)
    }

    fn put<R: Stored>(&mut self, index: u32, row: R) -> Result<()> {
        if self.fault == Fault::NobodyIsWoken && R::TABLE == TableId::Words {
            return Ok(());
        }
        self.rows.put(index, row)
    }

    fn unlink(&mut self, uuid: [u8; 16]) {
        if self.fault != Fault::NamesStay {
            self.rows.unlink(uuid);
        }
    }
}
