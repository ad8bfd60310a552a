//! SIGKILL after every system call of every verb.
//!
//! A child does its preparations, then one verb under ptrace; it is killed after its k-th system call, for every k
//! until the verb is through. Each time the parent, a living process of the same registry, then checks that the tables
//! hold together, that no object is without a row, and that the key can be loaded, published, attached and freed.
//!
//! `harness = false`: the children are this program again.

mod registry_support;

use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command};

use nix::sys::ptrace;
use nix::sys::signal::{Signal, kill, raise};
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::Pid;

use onecopy_core::registry::request::{Acquired, Ended, Holding, LeaseId};
use onecopy_core::words::Backend;
use registry_support::{Actor, Room, ask, content, facts, key, lease};

/// What the parent does before the child starts, in an empty room; it keeps the actors alive.
type Before = fn(&Room) -> Vec<Actor>;
/// What the child does before it is watched; returns the verb itself.
type Verb = fn(&Path) -> Box<dyn FnOnce()>;

struct Case {
    name: &'static str,
    before: Before,
    verb: Verb,
}

const CASES: &[Case] = &[
    Case { name: "first join makes the file", before: |_| Vec::new(), verb: join },
    Case { name: "join", before: bystander, verb: join },
    Case { name: "join sweeps the dead", before: leavings, verb: join },
    Case { name: "join brings holdings", before: bystander, verb: join_with_holdings },
    Case { name: "acquire, to load", before: bystander, verb: |room| with(room, |actor| see(actor.acquire("t"))) },
    Case { name: "acquire, to attach", before: ready, verb: |room| with(room, |actor| see(actor.attach("t"))) },
    Case { name: "acquire, to wait", before: loading, verb: |room| with(room, |actor| see(actor.acquire("t"))) },
    Case {
        name: "acquire, after the dead",
        before: leavings,
        verb: |room| with(room, |actor| see(actor.acquire("t"))),
    },
    Case {
        name: "acquire what is unshareable",
        before: unshareable,
        verb: |room| with(room, |actor| see(actor.acquire("t"))),
    },
    Case { name: "holder_gone", before: ready, verb: holder_gone },
    Case { name: "segment_lost", before: ready, verb: segment_lost },
    Case { name: "reserve and make", before: bystander, verb: reserve },
    Case { name: "discard", before: bystander, verb: discard },
    Case { name: "publish what was loaded", before: bystander, verb: publish },
    Case { name: "publish over a held one", before: ready, verb: replace },
    Case { name: "publish over a pinned one", before: pinned, verb: replace },
    Case {
        name: "end loading: failed",
        before: bystander,
        verb: |room| end(room, Ended::Failed { reason: "r".into() }),
    },
    Case {
        name: "end loading: unshareable",
        before: bystander,
        verb: |room| end(room, Ended::Unshareable { reason: "r".into() }),
    },
    Case { name: "end loading: gave up", before: bystander, verb: |room| end(room, Ended::GaveUp) },
    Case { name: "release the last lease", before: bystander, verb: release_last },
    Case { name: "release one of two", before: ready, verb: release_one },
    Case {
        name: "remove a held one",
        before: ready,
        verb: |room| with(room, |actor| see(actor.transact(|session| session.remove("t", None)))),
    },
    Case {
        name: "remove a pinned one",
        before: pinned,
        verb: |room| with(room, |actor| see(actor.transact(|session| session.remove("t", None)))),
    },
    Case { name: "restore", before: bystander, verb: restore },
    Case { name: "sweep", before: leavings_later, verb: sweep },
    Case { name: "leave", before: ready, verb: leave },
    Case { name: "remove the file", before: |_| Vec::new(), verb: remove_file },
    Case { name: "many leases of a dead process", before: crowd_of_leases, verb: join },
];

fn main() {
    let arguments: Vec<String> = std::env::args().collect();
    if let [_, role, case, room] = &arguments[..]
        && role == "child"
    {
        return child(case, Path::new(room));
    }
    if arguments.iter().any(|argument| argument == "--list") {
        return;
    }
    let mut kills = 0;
    for case in CASES {
        let mut after = 1;
        while killed(case, after) {
            after += 1;
        }
        println!("{}: killed after each of {} system calls", case.name, after - 1);
        assert!(after > 5, "the verb was not watched");
        kills += after - 1;
    }
    println!("{kills} kills of {} verbs", CASES.len());
    killed_while_recovering();
}

/// Runs the case once, with SIGKILL after so many system calls. `false`: the verb was through before.
fn killed(case: &Case, after: u32) -> bool {
    let room = Room::new();
    let actors = (case.before)(&room);
    let through = kill_in(case.name, &room, after);
    survives(&format!("{}, killed after {after} system calls", case.name), &room, actors);
    !through
}

/// A commit that was cut short is finished by another process, which is killed as well, after each system call.
fn killed_while_recovering() {
    let mut kills = 0;
    for first in 1.. {
        let mut second = 1;
        loop {
            let room = Room::new();
            let actors = bystander(&room);
            if kill_in("publish what was loaded", &room, first) {
                assert!(kills > 20, "no commit was cut short");
                println!("recovery: killed after each of {kills} system calls");
                return;
            }
            if !cut_short(&room) {
                break;
            }
            let through = kill_in("join", &room, second);
            survives(&format!("publish killed after {first}, recovery after {second}"), &room, actors);
            kills += 1;
            second += 1;
            if through {
                break;
            }
        }
    }
}

/// The counters of page 0 say that a commit was not applied.
fn cut_short(room: &Room) -> bool {
    let bytes = std::fs::read(room.registry()).unwrap();
    bytes[64..72] != bytes[72..80]
}

/// Runs a case's verb in a child until it was through (`true`) or killed after so many system calls.
fn kill_in(name: &str, room: &Room, after: u32) -> bool {
    let mut child = start(name, &room.path);
    let pid = Pid::from_raw(child.id().try_into().unwrap());
    assert_eq!(waitpid(pid, None).unwrap(), WaitStatus::Stopped(pid, Signal::SIGSTOP), "{name}");
    ptrace::setoptions(pid, ptrace::Options::PTRACE_O_TRACESYSGOOD | ptrace::Options::PTRACE_O_EXITKILL).unwrap();
    let mut stops = 0;
    let through = loop {
        ptrace::syscall(pid, None).unwrap();
        match waitpid(pid, None).unwrap() {
            WaitStatus::PtraceSyscall(_) => stops += 1,
            WaitStatus::Stopped(_, Signal::SIGSTOP) => break true,
            other => panic!("{name} after {stops} stops: {other:?}"),
        }
        if stops == 2 * after {
            break false; // an entry and an exit each
        }
    };
    kill(pid, Signal::SIGKILL).unwrap();
    assert_eq!(child.wait().unwrap().signal(), Some(Signal::SIGKILL as i32));
    through
}

/// Everything still works, for those who were there and for those who come.
fn survives(what: &str, room: &Room, mut actors: Vec<Actor>) {
    let newcomer = Actor::new(&room.path);
    newcomer.check();
    if actors.is_empty() {
        actors.push(Actor::new(&room.path));
    }
    let old = &actors[0];
    old.check();

    // Nobody waits for the dead: either it is there, or it is ours to load, or known not to be shareable.
    for tag in ["t", "fresh"] {
        match newcomer.acquire(tag) {
            Acquired::Load { ticket, .. } => {
                let (row, facts) = newcomer.reserve(tag, Backend::Posix);
                let held = lease(newcomer.publish(tag, Some(ticket), row, facts));
                let second = old.attach(tag).expect("published, so it can be attached");
                newcomer.release(held);
                assert!(room.object(&facts.uuid).exists(), "{what}: freed under its second holder");
                old.release(second);
                assert!(!room.object(&facts.uuid).exists(), "{what}: not freed with its last holder");
            }
            Acquired::Attach { segment, .. } => {
                let held = newcomer.transact(|session| session.take_lease(segment, 7));
                newcomer.release(held);
            }
            Acquired::Wait { loader, .. } => assert_eq!(loader.pid, std::process::id(), "{what}: waits for the dead"),
            Acquired::Unshareable { .. } => {}
            other => panic!("{what}: {other:?}"),
        }
    }
    let census = newcomer.check_swept(room);
    assert_eq!(census.processes as usize, actors.len() + 1, "{what}: rows of the dead are left");

    newcomer.transact(|session| session.remove("t", None));
    for actor in &actors {
        actor.registry.leave();
    }
    let census = newcomer.check_swept(room);
    assert!(census.segments == 0 && census.leases == 0 && census.processes == 1, "{what}: {census:?} after the last");
    assert!(room.objects().is_empty(), "{what}: {:?} is left", room.objects());
    assert!(newcomer.registry.remove_file_if_unused().unwrap(), "{what}");
    assert!(!room.registry().exists());
}

fn start(case: &str, room: &Path) -> Child {
    Command::new(std::env::current_exe().unwrap()).arg0("onecopy-test").args(["child", case]).arg(room).spawn().unwrap()
}

fn child(case: &str, room: &Path) {
    let case = CASES.iter().find(|known| known.name == case).unwrap();
    let verb = (case.verb)(room);
    ptrace::traceme().unwrap();
    raise(Signal::SIGSTOP).unwrap();
    verb();
    raise(Signal::SIGSTOP).unwrap();
}

// Before

fn bystander(room: &Room) -> Vec<Actor> {
    let actor = Actor::new(&room.path);
    actor.check();
    vec![actor]
}

fn ready(room: &Room) -> Vec<Actor> {
    let actor = Actor::new(&room.path);
    actor.provide("t", Backend::Posix);
    vec![actor]
}

fn loading(room: &Room) -> Vec<Actor> {
    let actor = Actor::new(&room.path);
    actor.load("t");
    vec![actor]
}

fn unshareable(room: &Room) -> Vec<Actor> {
    let actor = Actor::new(&room.path);
    let ticket = actor.load("t");
    actor.transact(|session| session.end_loading(ticket, Ended::Unshareable { reason: "r".into() }, None));
    vec![actor]
}

fn pinned(room: &Room) -> Vec<Actor> {
    let actor = Actor::new(&room.path);
    let (row, facts) = actor.reserve("t", Backend::Posix);
    let held = lease(actor.publish_as("t", None, row, facts, false, true));
    actor.release(held);
    vec![actor]
}

/// A process died holding two segments, filling a third and loading.
fn leavings(room: &Room) -> Vec<Actor> {
    leave_behind(room);
    Vec::new()
}

/// The same, and nobody has looked since: the witness joined before.
fn leavings_later(room: &Room) -> Vec<Actor> {
    let actors = bystander(room);
    leave_behind(room);
    actors
}

fn leave_behind(room: &Room) {
    let actor = Actor::new(&room.path);
    actor.provide("a", Backend::Posix);
    actor.provide("b", Backend::Memfd);
    actor.load("t");
    actor.reserve("t", Backend::Posix);
    let ticket = actor.load("u");
    actor.transact(|session| session.end_loading(ticket, Ended::Unshareable { reason: "r".into() }, None));
    // Its descriptors close: to the others that is its death.
    drop(actor);
}

fn crowd_of_leases(room: &Room) -> Vec<Actor> {
    let dead = Actor::new(&room.path);
    dead.provide("t", Backend::Posix);
    dead.transact(|session| {
        for _ in 0..100 {
            if let Acquired::Attach { segment, .. } = session.acquire(&ask(session, "t", None))? {
                session.take_lease(segment, 7)?;
            }
        }
        Ok(())
    });
    Vec::new()
}

// Verbs

/// The answer is not what is tested.
fn see<T>(_: T) {}

fn with(room: &Path, verb: impl FnOnce(&Actor) + 'static) -> Box<dyn FnOnce()> {
    let actor = Actor::new(room);
    actor.check();
    Box::new(move || {
        verb(&actor);
        std::mem::forget(actor); // its end is not part of the verb
    })
}

fn join(room: &Path) -> Box<dyn FnOnce()> {
    let actor = Actor::new(room);
    Box::new(move || {
        actor.transact(|session| session.list());
        std::mem::forget(actor);
    })
}

fn own_holding(room: &Path) -> Holding {
    let facts = facts([9; 16], Backend::Posix);
    Actor::new(room).make(&facts);
    Holding { key: key("t"), content: content(facts), fd: -1, named: true }
}

fn join_with_holdings(room: &Path) -> Box<dyn FnOnce()> {
    let facts = facts([9; 16], Backend::Memfd);
    let held = Holding { content: content(facts), ..own_holding(&PathBuf::from(room)) };
    let actor = Actor::holding(room, vec![held]);
    std::fs::remove_file(room_object(room)).unwrap();
    Box::new(move || {
        actor.transact(|session| session.list());
        std::mem::forget(actor);
    })
}

fn room_object(room: &Path) -> PathBuf {
    use onecopy_core::layout::registry::segment_name;
    room.join(segment_name(rustix::process::geteuid().as_raw(), registry_support::NAMESPACE, &[9; 16]))
}

fn restore(room: &Path) -> Box<dyn FnOnce()> {
    let facts = facts([9; 16], Backend::Memfd);
    let holding = Holding { key: key("t"), content: content(facts), fd: 7, named: true };
    with(room, move |actor| see(actor.transact(|session| session.restore(&holding))))
}

fn holder_gone(room: &Path) -> Box<dyn FnOnce()> {
    with(room, |actor| {
        actor.transact(|session| {
            if let Acquired::Attach { holders, .. } = session.acquire(&ask(session, "t", None))? {
                session.holder_gone(holders[0].lease)?;
            }
            session.acquire(&ask(session, "t", None)).map(drop)
        });
    })
}

fn segment_lost(room: &Path) -> Box<dyn FnOnce()> {
    with(room, |actor| {
        actor.transact(|session| {
            if let Acquired::Attach { segment, .. } = session.acquire(&ask(session, "t", None))? {
                session.segment_lost(segment)?;
            }
            session.acquire(&ask(session, "t", None)).map(drop)
        });
    })
}

fn reserve(room: &Path) -> Box<dyn FnOnce()> {
    let actor = Actor::new(room);
    actor.load("t");
    Box::new(move || {
        actor.reserve("t", Backend::Posix);
        std::mem::forget(actor);
    })
}

fn discard(room: &Path) -> Box<dyn FnOnce()> {
    let actor = Actor::new(room);
    let (row, _) = actor.reserve("t", Backend::Posix);
    Box::new(move || {
        actor.transact(|session| session.discard(row));
        std::mem::forget(actor);
    })
}

fn publish(room: &Path) -> Box<dyn FnOnce()> {
    let actor = Actor::new(room);
    let ticket = actor.load("t");
    let (row, facts) = actor.reserve("t", Backend::Posix);
    Box::new(move || {
        actor.publish("t", Some(ticket), row, facts);
        std::mem::forget(actor);
    })
}

fn replace(room: &Path) -> Box<dyn FnOnce()> {
    let actor = Actor::new(room);
    let (row, facts) = actor.reserve("t", Backend::Posix);
    Box::new(move || {
        actor.publish_as("t", None, row, facts, true, false);
        std::mem::forget(actor);
    })
}

fn end(room: &Path, ended: Ended) -> Box<dyn FnOnce()> {
    let actor = Actor::new(room);
    let ticket = actor.load("t");
    let (row, _) = actor.reserve("t", Backend::Posix);
    Box::new(move || {
        actor.transact(|session| session.end_loading(ticket, ended, Some(row)));
        std::mem::forget(actor);
    })
}

fn release_last(room: &Path) -> Box<dyn FnOnce()> {
    let actor = Actor::new(room);
    let held: LeaseId = actor.provide("t", Backend::Posix);
    Box::new(move || {
        actor.release(held);
        std::mem::forget(actor);
    })
}

fn release_one(room: &Path) -> Box<dyn FnOnce()> {
    let actor = Actor::new(room);
    let held = actor.attach("t").unwrap();
    Box::new(move || {
        actor.release(held);
        std::mem::forget(actor);
    })
}

fn sweep(room: &Path) -> Box<dyn FnOnce()> {
    // Joining sweeps: what is dead must die afterwards.
    let actor = Actor::new(room);
    actor.check();
    let dead = Actor::new(room);
    dead.provide("c", Backend::Posix);
    drop(dead);
    Box::new(move || {
        actor.transact(|session| session.sweep(false));
        std::mem::forget(actor);
    })
}

fn leave(room: &Path) -> Box<dyn FnOnce()> {
    let actor = Actor::new(room);
    actor.attach("t").unwrap();
    actor.provide("mine", Backend::Posix);
    actor.load("more");
    actor.reserve("more", Backend::Posix);
    Box::new(move || {
        actor.registry.leave();
        std::mem::forget(actor);
    })
}

fn remove_file(room: &Path) -> Box<dyn FnOnce()> {
    let actor = Actor::new(room);
    actor.check();
    Box::new(move || {
        assert!(actor.registry.remove_file_if_unused().unwrap());
        std::mem::forget(actor);
    })
}
