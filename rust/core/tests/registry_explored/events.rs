//! What can happen next.

use onecopy_core::registry::request::Ended;
use onecopy_core::words::Backend;
use stateright::{Model, Property};

use crate::faults::Fault;
use crate::properties;
use crate::world::{Left, Owed, Phase, Stage, World};

#[derive(Clone, Copy, Debug)]
pub struct Machine {
    pub processes: usize,
    pub tags: usize,
    pub left: Left,
    pub fault: Fault,
}

/// One step of one process. `dies`: killed inside of it, after names were removed and before the commit.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Event {
    Start(usize),
    Acquire {
        p: usize,
        tag: usize,
        dies: bool,
    },
    Ask {
        p: usize,
        dies: bool,
    },
    Fail(usize),
    Unshareable(usize),
    GiveUp(usize),
    Reserve {
        p: usize,
        backend: Backend,
    },
    /// The verb `publish`, which needs no ticket.
    Put {
        p: usize,
        tag: usize,
        backend: Backend,
        pin: bool,
    },
    Make(usize),
    Publish {
        p: usize,
        dies: bool,
    },
    Release {
        p: usize,
        which: usize,
        dies: bool,
    },
    Remove {
        p: usize,
        tag: usize,
        dies: bool,
    },
    Sweep {
        p: usize,
        dies: bool,
    },
    Leave {
        p: usize,
        dies: bool,
    },
    /// The registry is stuck: who waits, or wants to, loads privately.
    Stuck(usize),
    Pay(usize),
    Stop(usize),
    Continue,
    Die {
        p: usize,
        life_first: bool,
        of_memory: bool,
    },
    Dead(usize),
    /// Ten minutes pass.
    Later,
}

impl Model for Machine {
    type State = World;
    type Action = Event;

    fn init_states(&self) -> Vec<World> {
        vec![World::new(self.processes, self.tags, self.left, self.fault)]
    }

    fn actions(&self, world: &World, events: &mut Vec<Event>) {
        for p in 0..self.processes {
            match &world.processes[p].phase {
                Phase::Absent if world.left.starts > 0 && world.lock.is_none() => events.push(Event::Start(p)),
                Phase::Dying => events.push(Event::Dead(p)),
                Phase::Absent => {}
                _ if world.lock == Some(p) => self.death(world, p, events),
                _ => self.of_running(world, p, events),
            }
        }
        if world.lock.is_some() {
            events.push(Event::Continue);
        }
        if world.left.later > 0 && world.lock.is_none() {
            events.push(Event::Later);
        }
    }

    fn next_state(&self, before: &World, event: Event) -> Option<World> {
        let mut world = before.clone();
        world.swept = false;
        match event {
            Event::Start(p) => world.join(p),
            Event::Acquire { p, tag, dies } => {
                world.left.verbs -= 1;
                world.acquire(p, tag, None, dies);
            }
            Event::Ask { p, dies } => {
                let Phase::Waiting { tag, episode, .. } = world.processes[p].phase else { return None };
                world.acquire(p, tag, Some(episode), dies);
            }
            Event::Fail(p) => {
                world.left.failures -= 1;
                end(&mut world, p, Ended::Failed { reason: String::new() });
            }
            Event::Unshareable(p) => {
                world.left.failures -= 1;
                end(&mut world, p, Ended::Unshareable { reason: String::new() });
            }
            Event::GiveUp(p) => end(&mut world, p, Ended::GaveUp),
            Event::Reserve { p, backend } => {
                let Phase::Loading(load) = world.processes[p].phase else { return None };
                world.reserve(p, load.tag, Some(load), backend, false, false);
            }
            Event::Put { p, tag, backend, pin } => {
                world.left.verbs -= 1;
                world.reserve(p, tag, None, backend, true, pin);
            }
            Event::Make(p) => world.make_and_seal(p),
            Event::Publish { p, dies } => world.publish(p, dies),
            Event::Release { p, which, dies } => world.release(p, which, dies),
            Event::Remove { p, tag, dies } => {
                world.left.verbs -= 1;
                world.remove(p, tag, dies);
            }
            Event::Sweep { p, dies } => world.sweep(p, dies),
            Event::Leave { p, dies } => world.leave(p, dies),
            Event::Stuck(p) => world.processes[p].phase = Phase::Idle,
            Event::Pay(p) => world.pay(p),
            Event::Stop(p) => {
                world.left.stops -= 1;
                world.lock = Some(p);
            }
            Event::Continue => world.lock = None,
            Event::Die { p, life_first, of_memory } => world.die(p, life_first, of_memory),
            Event::Dead(p) => world.dead(p),
            Event::Later => world.later(),
        }
        if self.fault == Fault::DebtsAreForgotten {
            world.processes.iter_mut().for_each(|process| process.owed.clear());
        }
        (!world.same_as_before).then_some(world)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        properties::all()
    }
}

fn end(world: &mut World, p: usize, ended: Ended) {
    match world.processes[p].phase {
        Phase::Loading(load) => world.end(p, Some(load), ended),
        _ => world.abandon(p, ended),
    }
}

impl Machine {
    fn of_running(&self, world: &World, p: usize, events: &mut Vec<Event>) {
        let process = &world.processes[p];
        let free = world.lock.is_none();
        let deaths: &[bool] = if world.left.deaths > 0 { &[false, true] } else { &[false] };
        let verbs = world.left.verbs > 0 && free;
        for which in 0..process.held.len() {
            let dying = if free { deaths } else { &[false] };
            events.extend(dying.iter().map(|&dies| Event::Release { p, which, dies }));
        }
        match process.phase {
            Phase::Idle => {
                for tag in 0..self.tags {
                    if verbs {
                        events.extend(deaths.iter().map(|&dies| Event::Acquire { p, tag, dies }));
                        events.extend(deaths.iter().map(|&dies| Event::Remove { p, tag, dies }));
                        events.push(Event::Put { p, tag, backend: Backend::Posix, pin: true });
                        events.push(Event::Put { p, tag, backend: Backend::Memfd, pin: false });
                    }
                }
                if free {
                    events.extend(deaths.iter().map(|&dies| Event::Sweep { p, dies }));
                    if process.owed.is_empty() {
                        events.extend(deaths.iter().map(|&dies| Event::Leave { p, dies }));
                    }
                }
            }
            Phase::Waiting { .. } if free => events.extend(deaths.iter().map(|&dies| Event::Ask { p, dies })),
            Phase::Waiting { .. } => events.push(Event::Stuck(p)),
            Phase::Loading(_) => {
                if world.left.failures > 0 && free {
                    events.extend([Event::Fail(p), Event::Unshareable(p)]);
                }
                events.push(Event::GiveUp(p));
                if free {
                    events.push(Event::Reserve { p, backend: Backend::Memfd });
                    events.push(Event::Reserve { p, backend: Backend::Posix });
                }
            }
            Phase::Publishing { stage, .. } => {
                match stage {
                    Stage::Reserved => events.push(Event::Make(p)),
                    Stage::Sealed if free => events.extend(deaths.iter().map(|&dies| Event::Publish { p, dies })),
                    Stage::Sealed => {}
                }
                events.push(Event::GiveUp(p));
            }
            Phase::Absent | Phase::Dying => {}
        }
        if free && !process.owed.is_empty() {
            events.push(Event::Pay(p));
        }
        if world.left.stops > 0 && free {
            events.push(Event::Stop(p));
        }
        self.death(world, p, events);
    }

    fn death(&self, world: &World, p: usize, events: &mut Vec<Event>) {
        if world.left.deaths == 0 {
            return;
        }
        events.extend([true, false].map(|life_first| Event::Die { p, life_first, of_memory: false }));
        if world.processes[p].load().is_some() {
            events.push(Event::Die { p, life_first: true, of_memory: true });
        }
    }
}

/// So that a debt is not mistaken for a leak.
pub fn owes(world: &World) -> impl Iterator<Item = &Owed> {
    world.processes.iter().flat_map(|process| &process.owed)
}
