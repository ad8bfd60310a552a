//! Every order in which a few processes can do what they do, and die, explored by `stateright`. What decides is
//! `registry::transition`, the code that runs; `world.rs` plays the store around it.
//!
//! `cargo test -p onecopy-core --test registry_explored` explores the small machine, in less than a minute;
//! `ONECOPY_EXPLORE=large` (as `make soak` does) a larger one. Each property is shown to be able to fail: a fault is built
//! in that must be found.

mod canonical;
mod events;
mod faults;
mod properties;
mod world;

use std::time::Instant;

use stateright::{Checker, HasDiscoveries, Model};

use events::Machine;
use faults::Fault;
use world::Left;

fn main() {
    if std::env::args().any(|argument| argument == "--list") {
        return;
    }
    // A machine that grew too large is to end here, and not to take the memory of everybody else.
    let most = rustix::process::Rlimit { current: Some(MEMORY), maximum: Some(MEMORY) };
    rustix::process::setrlimit(rustix::process::Resource::As, most).unwrap();
    for (fault, property) in CAUGHT {
        let checker = machine(2, 1, Left { starts: 3, verbs: 4, deaths: 1, stops: 1, failures: 1, later: 0 }, fault)
            .checker()
            .threads(THREADS)
            .finish_when(HasDiscoveries::AnyOf([property].into()))
            .spawn_bfs()
            .join();
        let found = checker.discovery(property);
        assert!(found.is_some(), "{fault:?} is not found by: {property}");
        println!("{fault:?} breaks \"{property}\" in {} steps", found.map_or(0, |path| path.into_actions().len()));
    }
    let large = std::env::var("ONECOPY_EXPLORE").is_ok_and(|size| size == "large");
    for scenario in if large { LARGE } else { SMALL } {
        explore(scenario);
    }
}

fn explore((name, processes, tags, left): &Scenario) {
    let began = Instant::now();
    let checker = machine(*processes, *tags, *left, Fault::None).checker().threads(THREADS).spawn_bfs().join();
    if let Some((property, path)) = checker.discoveries().into_iter().next() {
        println!("broken: {property}");
        for (world, event) in path.into_vec().iter().take_while(|(world, _)| world.wrong.is_none()) {
            let phases: Vec<_> = world.processes.iter().map(|process| &process.phase).collect();
            println!("  {phases:?}{}\n{event:?}", world.said.as_deref().unwrap_or_default());
        }
        panic!("{name}: {property}");
    }
    println!(
        "{name}: {processes} processes, {tags} tags: {} states, {} transitions, depth {}, {:.0} s",
        checker.unique_state_count(),
        checker.state_count(),
        checker.max_depth(),
        began.elapsed().as_secs_f64()
    );
}

const THREADS: usize = 2;
const MEMORY: u64 = 12 << 30;

fn machine(processes: usize, tags: usize, left: Left, fault: Fault) -> Machine {
    Machine { processes, tags, left, fault }
}

const CAUGHT: [(Fault, &str); 7] = [
    (Fault::LoadersLookDead, properties::ONE_LOADER),
    (Fault::PublishBeforeSeal, properties::READY_IS_COMPLETE),
    (Fault::CloseBeforeRelease, properties::LEASES_ARE_OPEN),
    (Fault::LeaseWithoutOpening, properties::NOT_BEING_FREED),
    (Fault::NamesStay, properties::NOTHING_LEFT),
    (Fault::NobodyIsWoken, properties::ALL_WAKE),
    (Fault::DebtsAreForgotten, properties::ALL_WAKE),
];

/// Name, processes, tags, and how much may happen.
type Scenario = (&'static str, usize, usize, Left);

const SMALL: &[Scenario] = &[
    ("everything", 3, 2, Left { starts: 3, verbs: 3, deaths: 1, stops: 0, failures: 0, later: 0 }),
    ("deaths", 3, 1, Left { starts: 4, verbs: 2, deaths: 2, stops: 0, failures: 0, later: 1 }),
    ("failures", 3, 1, Left { starts: 3, verbs: 3, deaths: 1, stops: 0, failures: 2, later: 1 }),
    ("a stopped owner of the lock", 3, 1, Left { starts: 3, verbs: 2, deaths: 1, stops: 1, failures: 0, later: 0 }),
];

const LARGE: &[Scenario] = &[
    ("everything", 3, 2, Left { starts: 3, verbs: 4, deaths: 1, stops: 0, failures: 0, later: 0 }),
    ("deaths", 3, 1, Left { starts: 4, verbs: 3, deaths: 2, stops: 0, failures: 1, later: 1 }),
    ("a stopped owner of the lock", 3, 1, Left { starts: 3, verbs: 3, deaths: 1, stops: 1, failures: 0, later: 0 }),
    ("four processes", 4, 1, Left { starts: 4, verbs: 3, deaths: 1, stops: 0, failures: 0, later: 0 }),
];
