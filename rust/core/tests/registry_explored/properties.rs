//! What must hold in every state.

use onecopy_core::layout::registry::Entry;
use onecopy_core::layout::registry::rows::{FILLING, LOADING, READY, SEALED, WITNESSES};
use onecopy_core::registry::check;
use onecopy_core::registry::request::ProcessId;
use onecopy_core::registry::transition::key_hash;
use stateright::Property;

use crate::events::{Machine, owes};
use crate::world::{Phase, World, key};

pub const HOLDS_TOGETHER: &str = "the tables hold together";
pub const ONE_LOADER: &str = "at most one living loader per tag";
pub const READY_IS_COMPLETE: &str = "READY only for complete segments";
pub const LEASES_ARE_OPEN: &str = "a lease only for what can be attached";
pub const KEPT: &str = "what a living process holds is not freed";
pub const NOT_BEING_FREED: &str = "no attach to a segment being freed";
pub const NOTHING_LEFT: &str = "nothing held by nobody, once the living have looked";
pub const ALL_WAKE: &str = "no waiter sleeps forever";
pub const NOT_KILLED_AGAIN: &str = "no third loader after two were killed for lack of memory";

pub fn all() -> Vec<Property<Machine>> {
    vec![
        Property::<Machine>::always(HOLDS_TOGETHER, |_, world| {
            world.wrong != Some(HOLDS_TOGETHER) && check::check(&mut world.table.clone()).is_ok()
        }),
        Property::<Machine>::always(ONE_LOADER, |machine, world| (0..machine.tags).all(|tag| one_loader(world, tag))),
        Property::<Machine>::always(READY_IS_COMPLETE, |_, world| ready_is_complete(world)),
        Property::<Machine>::always(LEASES_ARE_OPEN, |_, world| world.unknown_leases().is_empty()),
        Property::<Machine>::always(KEPT, |_, world| kept(world)),
        Property::<Machine>::always(NOT_BEING_FREED, |_, world| world.wrong != Some(NOT_BEING_FREED)),
        Property::<Machine>::always(NOTHING_LEFT, |_, world| nothing_left(world)),
        Property::<Machine>::always(ALL_WAKE, |_, world| all_wake(world)),
        Property::<Machine>::always(NOT_KILLED_AGAIN, |_, world| world.wrong != Some(NOT_KILLED_AGAIN)),
    ]
}

fn one_loader(world: &World, tag: usize) -> bool {
    let loads = |load: crate::world::Load| load.tag == tag && !load.overtaken;
    world.processes.iter().filter(|process| process.load().is_some_and(loads)).count() <= 1
}

fn ready_is_complete(world: &World) -> bool {
    world.table.entries.iter().filter(|entry| entry.state == READY).all(|entry| {
        let segment = &world.table.segments[entry.current as usize];
        segment.state == SEALED && world.objects[segment.uuid[0] as usize].sealed
    })
}

/// The row of everything that somebody living has a lease on is there, and so is the lease.
fn kept(world: &World) -> bool {
    world.processes.iter().all(|process| {
        process.held.iter().all(|held| {
            let lease = &world.table.leases[held.lease.row as usize];
            lease.serial == held.lease.serial
                && world.table.segments[lease.segment as usize].uuid[0] as usize == held.object
        })
    })
}

/// A name without a row is never found again. After a sweep only the living have rows, and every segment a holder, a
/// name that is pinned, or a living filler.
fn nothing_left(world: &World) -> bool {
    let rows = || world.table.segments.iter().filter(|row| row.state != 0);
    let orphan = world
        .objects
        .iter()
        .enumerate()
        .any(|(number, object)| object.named && !rows().any(|row| row.uuid[0] as usize == number));
    if orphan || world.lock.is_some() {
        return !orphan;
    }
    if !world.swept || owes(world).next().is_some() {
        return true;
    }
    let living = |slot: u32, generation: u64| {
        world.processes.iter().any(|process| process.life && process.me == Some(ProcessId { slot, generation }))
    };
    rows().all(|row| {
        let leased = world.table.leases.iter().any(|lease| {
            lease.state != 0
                && world.table.segments[lease.segment as usize].uuid == row.uuid
                && living(lease.owner_slot, lease.owner_generation)
        });
        match row.state {
            FILLING => living(row.owner_slot, row.owner_generation),
            WITNESSES => world.table.leases.iter().any(|lease| lease.state != 0),
            _ => leased || row.pinned != 0,
        }
    })
}

/// Who sleeps on a word that has not changed waits for an entry that is still being loaded; by whom is looked at in slices.
fn all_wake(world: &World) -> bool {
    let sleeps_well = world.processes.iter().all(|process| {
        let Phase::Waiting { tag, word, value, .. } = process.phase else { return true };
        let entry: Option<&Entry> =
            world.table.entries.iter().find(|entry| entry.state != 0 && entry.hash == key_hash(&key(tag)));
        world.table.words[word as usize].value != value || entry.is_some_and(|entry| entry.state == LOADING)
    });
    sleeps_well && world.wrong != Some(ALL_WAKE)
}
