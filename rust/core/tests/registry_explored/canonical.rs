//! When two states are the same: when nothing that can be done tells them apart. Which row something lies in, which number
//! an episode or a futex word has, and which of two processes in the same position is which, decides nothing. So a state is
//! compared by what it looks like when one walks from the entries to their segments to their leases.

use std::hash::{Hash, Hasher};

use onecopy_core::layout::registry::rows::LIVE;
use onecopy_core::layout::registry::{Entry, NONE};
use onecopy_core::registry::request::{LeaseId, ProcessId, Ticket};
use onecopy_core::registry::transition::{MEMORY, key_hash};

use crate::world::{Owed, Phase, Process, World, key};

impl PartialEq for World {
    fn eq(&self, other: &Self) -> bool {
        self.canonical() == other.canonical()
    }
}

impl Eq for World {}

impl Hash for World {
    fn hash<H: Hasher>(&self, hasher: &mut H) {
        self.canonical().hash(hasher);
    }
}

const GONE: u32 = 99;

/// The order in which rows are met.
#[derive(Default)]
struct Walk {
    leases: Vec<u32>,
    segments: Vec<u32>,
    objects: Vec<usize>,
}

impl Walk {
    fn lease(&self, world: &World, lease: &LeaseId) -> u32 {
        let row = &world.table.leases[lease.row as usize];
        let owner = ProcessId { slot: row.owner_slot, generation: row.owner_generation };
        if row.serial == lease.serial && owner == lease.owner { place(&self.leases, &lease.row) } else { GONE }
    }
}

fn place<T: PartialEq>(list: &[T], what: &T) -> u32 {
    list.iter().position(|one| one == what).map_or(GONE, |position| u32::try_from(position).unwrap_or(GONE))
}

impl World {
    fn canonical(&self) -> Vec<u32> {
        let entries: Vec<Option<&Entry>> = (0..self.oom_in_a_row.len())
            .map(|tag| {
                let hash = key_hash(&key(tag));
                self.table.entries.iter().find(|entry| entry.state != 0 && entry.hash == hash)
            })
            .collect();
        let mut walk = Walk::default();
        for entry in entries.iter().flatten() {
            let mut at = entry.segments;
            while at != NONE {
                let segment = &self.table.segments[at as usize];
                walk.segments.push(at);
                walk.objects.push(segment.uuid[0] as usize);
                let mut lease = segment.leases;
                while lease != NONE {
                    walk.leases.push(lease);
                    lease = self.table.leases[lease as usize].next;
                }
                at = segment.next;
            }
        }
        let mut processes: Vec<(Vec<u32>, usize)> =
            (0..self.processes.len()).map(|p| (self.process(p, &entries, &walk), p)).collect();
        processes.sort();
        let order: Vec<usize> = processes.iter().map(|(_, p)| *p).collect();

        let left = self.left;
        let mut out: Vec<u32> =
            [left.starts, left.verbs, left.deaths, left.stops, left.failures, left.later].map(u32::from).to_vec();
        out.push(self.lock.map_or(GONE, |p| place(&order, &p)));
        out.push(u32::from(self.swept));
        out.push(self.wrong.map_or(0, |wrong| u32::try_from(wrong.len()).unwrap_or(GONE)));
        out.push(self.unburied());
        for (tag, entry) in entries.iter().enumerate() {
            out.push(self.oom_in_a_row[tag]);
            self.entry(tag, *entry, &order, &mut out);
        }
        for (&at, &object) in walk.segments.iter().zip(&walk.objects) {
            let row = &self.table.segments[at as usize];
            let named = entries.iter().flatten().any(|entry| entry.current == at);
            let object = self.objects.get(object).filter(|_| row.state < 3);
            let known = object.map_or(0, |object| u32::from(object.named) | u32::from(object.sealed) << 1);
            let owner = ProcessId { slot: row.owner_slot, generation: row.owner_generation };
            let filler = if row.state == 1 { self.whose(owner, &order) } else { 0 };
            out.extend([GONE, row.state, row.backend, row.pinned, u32::from(named), known, filler]);
            let mut lease = row.leases;
            while lease != NONE {
                let row = &self.table.leases[lease as usize];
                out.push(self.whose(ProcessId { slot: row.owner_slot, generation: row.owner_generation }, &order));
                lease = row.next;
            }
        }
        for (signature, _) in processes {
            out.push(GONE);
            out.extend(signature);
        }
        out
    }

    fn entry(&self, tag: usize, entry: Option<&Entry>, order: &[usize], out: &mut Vec<u32>) {
        let Some(entry) = entry else { return out.push(GONE) };
        let loader = ProcessId { slot: entry.loader_slot, generation: entry.loader_generation };
        let age = |since: u64| u32::try_from((self.now - since.min(self.now)) / MEMORY).unwrap_or(GONE);
        let episodes = self.episodes(tag, entry);
        out.extend([entry.state, entry.failures, entry.oom_deaths, age(entry.since), age(entry.oom_since)]);
        out.push(self.whose(loader, order));
        out.push(u32::from(self.oom_kills > entry.oom_kills));
        out.extend([entry.episode, entry.failed_episode].map(|number| rank(&episodes, number)));
    }

    /// In order: `acquire` asks which of two is the later one.
    fn episodes(&self, tag: usize, entry: &Entry) -> Vec<u64> {
        let waiting = self.processes.iter().filter_map(|process| match process.phase {
            Phase::Waiting { tag: other, episode, .. } if other == tag => Some(episode),
            _ => None,
        });
        let mut all: Vec<u64> = waiting.chain([entry.episode, entry.failed_episode]).filter(|&one| one != 0).collect();
        all.sort_unstable();
        all.dedup();
        all
    }

    /// Process rows of the dead that nobody has buried.
    fn unburied(&self) -> u32 {
        let rows = self.table.processes.iter().enumerate().filter(|(slot, row)| {
            let me = ProcessId { slot: u32::try_from(*slot).unwrap_or(NONE), generation: row.generation };
            row.state == LIVE && !self.processes.iter().any(|process| process.me == Some(me))
        });
        u32::try_from(rows.count()).unwrap_or(GONE)
    }

    fn whose(&self, id: ProcessId, order: &[usize]) -> u32 {
        let owner = self.processes.iter().position(|process| process.me == Some(id));
        owner.map_or(GONE, |p| place(order, &p))
    }

    /// What a process is, without its number.
    fn process(&self, p: usize, entries: &[Option<&Entry>], walk: &Walk) -> Vec<u32> {
        let process = &self.processes[p];
        let mut out = vec![u32::from(process.life), u32::from(process.me.is_some())];
        self.phase(process, entries, walk, &mut out);
        let mut held: Vec<_> = process
            .held
            .iter()
            .map(|held| (held.tag, walk.lease(self, &held.lease), place(&walk.objects, &held.object)))
            .collect();
        held.sort_unstable();
        out.push(GONE);
        out.extend(held.iter().flat_map(|(tag, lease, object)| [u32::try_from(*tag).unwrap_or(GONE), *lease, *object]));
        out.push(GONE);
        // What is open and nobody can come to any more is gone with its descriptor.
        let mut open: Vec<_> = process.open.iter().map(|object| place(&walk.objects, object)).collect();
        open.sort_unstable();
        out.extend(open);
        out.push(GONE);
        for owed in &process.owed {
            out.extend(match owed {
                Owed::Release(lease) => [1, walk.lease(self, lease)],
                Owed::Discard(row) => [2, place(&walk.segments, row)],
                Owed::GiveUp(ticket) => [3, self.valid(process, ticket)],
            });
        }
        out
    }

    /// Of its entry, if it still is the right one; a ticket that is not never becomes it again.
    fn valid(&self, process: &Process, ticket: &Ticket) -> u32 {
        let entry = &self.table.entries[ticket.entry as usize];
        let loader = ProcessId { slot: entry.loader_slot, generation: entry.loader_generation };
        let holds = entry.episode == ticket.episode && entry.attempt == ticket.attempt && process.me == Some(loader);
        u32::from(entry.state == 2 && holds)
    }

    fn phase(&self, process: &Process, entries: &[Option<&Entry>], walk: &Walk, out: &mut Vec<u32>) {
        let number = |tag: usize| u32::try_from(tag).unwrap_or(GONE);
        let load = |load: &crate::world::Load| {
            [number(load.tag), self.valid(process, &load.ticket), u32::from(load.overtaken)]
        };
        match &process.phase {
            Phase::Absent => out.push(0),
            Phase::Idle => out.push(1),
            Phase::Waiting { tag, word, value, episode } => {
                let woken = self.table.words[*word as usize].value != *value;
                let rank = entries[*tag].map_or(0, |entry| rank(&self.episodes(*tag, entry), *episode));
                out.extend([2, number(*tag), u32::from(woken), rank]);
            }
            Phase::Loading(it) => {
                out.push(3);
                out.extend(load(it));
            }
            Phase::Publishing { tag, load: it, replace, pin, row, object: _, stage } => {
                out.extend([4, number(*tag), u32::from(*replace), u32::from(*pin), place(&walk.segments, row)]);
                out.push(*stage as u32);
                out.extend(it.as_ref().map_or([GONE; 3], load));
            }
            Phase::Dying => out.push(5),
        }
    }
}

fn rank(episodes: &[u64], number: u64) -> u32 {
    if number == 0 { 0 } else { 1 + place(episodes, &number) }
}
