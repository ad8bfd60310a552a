//! Many real processes on one registry: they join, lease, release and are killed; eight want the same model at once;
//! one is stopped inside the lock.
//!
//! `harness = false`: the children are this program again.

mod registry_support;

use std::io::{BufRead, BufReader, Read, Write};
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use proptest::prelude::Rng;
use proptest::test_runner::{RngAlgorithm, TestRng};

use onecopy_core::Error;
use onecopy_core::registry::request::Acquired;
use onecopy_core::words::Backend;
use registry_support::{Actor, Room, ask, lease};

fn main() {
    let arguments: Vec<String> = std::env::args().collect();
    if let [_, role, room] = &arguments[..]
        && let Some(child) = ROLES.iter().find(|(name, _)| name == role)
    {
        return child.1(Path::new(room));
    }
    if arguments.iter().any(|argument| argument == "--list") {
        return;
    }
    for (name, test) in TESTS {
        test();
        println!("{name}: ok");
    }
}

const TESTS: &[(&str, fn())] = &[
    ("a sleeper is woken by READY", woken),
    ("an election has one winner", election),
    ("a killed winner is replaced, and those who wait are woken", replaced_winner),
    ("512 processes come, lease, let go and are killed", crowd),
    ("stopped inside the lock", stopped),
];

type Role = fn(&Path);
const ROLES: &[(&str, Role)] =
    &[("waiter", waiter), ("elector", elector), ("winner", winner), ("member", member), ("sleeper", sleeper)];

/// A child that is told to go by a line, and tells what it did by lines.
struct Process {
    child: Child,
    told: BufReader<ChildStdout>,
    tell: ChildStdin,
}

impl Process {
    fn start(role: &str, room: &Room) -> Self {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .arg(role)
            .arg(&room.path)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let (told, tell) = (BufReader::new(child.stdout.take().unwrap()), child.stdin.take().unwrap());
        Self { child, told, tell }
    }

    fn go(&mut self) {
        self.tell.write_all(b"\n").unwrap();
    }

    fn line(&mut self) -> String {
        let mut line = String::new();
        self.told.read_line(&mut line).unwrap();
        line.trim_end().to_owned()
    }

    fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(self.child.id().try_into().unwrap()), signal).unwrap();
    }

    /// Closes its input and waits for its end.
    fn end(mut self) -> bool {
        drop(self.tell);
        self.child.wait().unwrap().success()
    }
}

/// In a child: waits for a line; `false` at the end of input.
fn told_to_go() -> bool {
    std::io::stdin().read_line(&mut String::new()).unwrap() > 0
}

fn say(text: &str) {
    println!("{text}");
    std::io::stdout().flush().unwrap();
}

/// Far longer than waking takes, so that the two cannot be taken for each other.
const NEVER: Duration = Duration::from_secs(60);

fn woken() {
    let room = Room::new();
    let actor = Actor::new(&room.path);
    let ticket = actor.load("t");
    let (row, facts) = actor.reserve("t", Backend::Posix);
    let mut sleepers: Vec<Process> = (0..4).map(|_| Process::start("waiter", &room)).collect();
    for sleeper in &mut sleepers {
        assert_eq!(sleeper.line(), "waits");
        while !asleep_on_futex(sleeper.child.id()) {
            std::thread::yield_now();
        }
    }
    lease(actor.publish("t", Some(ticket), row, facts));
    for mut sleeper in sleepers {
        assert_eq!(sleeper.line(), "woken");
        assert!(sleeper.end());
    }
}

fn asleep_on_futex(pid: u32) -> bool {
    let call = std::fs::read_to_string(format!("/proc/{pid}/syscall")).unwrap();
    call.split(' ').next() == Some(&libc::SYS_futex.to_string())
}

fn waiter(room: &Path) {
    let actor = Actor::new(room);
    let Acquired::Wait { futex_word, futex_value, .. } = actor.acquire("t") else { panic!("nobody loads") };
    say("waits");
    let began = Instant::now();
    actor.registry.wait(futex_word, futex_value, NEVER);
    say(if began.elapsed() < NEVER && actor.attach("t").is_some() { "woken" } else { "not woken" });
}

fn election() {
    let room = Room::new();
    let mut electors: Vec<Process> = (0..8).map(|_| Process::start("elector", &room)).collect();
    electors.iter_mut().for_each(|elector| assert_eq!(elector.line(), "here"));
    electors.iter_mut().for_each(Process::go);
    let roles: Vec<String> = electors.iter_mut().map(Process::line).collect();
    assert_eq!(roles.iter().filter(|role| *role == "loaded").count(), 1, "{roles:?}");
    assert_eq!(roles.iter().filter(|role| *role == "attached").count(), 7, "{roles:?}");
    let census = Actor::new(&room.path).check();
    assert_eq!((census.leases, census.segments, census.processes), (8, 1, 9));
    for elector in electors {
        assert!(elector.end());
    }
    assert_eq!(Actor::new(&room.path).check_swept(&room).segments, 0);
}

fn elector(room: &Path) {
    let actor = Actor::new(room);
    actor.check();
    say("here");
    told_to_go();
    say(take_part(&actor));
    told_to_go();
}

/// As a store does: load, attach, or sleep and ask again.
fn take_part(actor: &Actor) -> &'static str {
    let mut waited = None;
    loop {
        let answer = actor.transact(|session| {
            let answer = session.acquire(&ask(session, "t", waited))?;
            if let Acquired::Attach { segment, .. } = answer {
                session.take_lease(segment, -1)?;
            }
            Ok(answer)
        });
        match answer {
            Acquired::Attach { .. } => return "attached",
            Acquired::Load { ticket, .. } => {
                let (row, facts) = actor.reserve("t", Backend::Posix);
                lease(actor.publish("t", Some(ticket), row, facts));
                return "loaded";
            }
            Acquired::Wait { futex_word, futex_value, episode, .. } => {
                waited = Some(episode);
                actor.registry.wait(futex_word, futex_value, Duration::from_millis(100));
            }
            other => panic!("{other:?}"),
        }
    }
}

fn replaced_winner() {
    let room = Room::new();
    let mut first = Process::start("winner", &room);
    assert_eq!(first.line(), "loading");
    let mut electors: Vec<Process> = (0..4).map(|_| Process::start("elector", &room)).collect();
    electors.iter_mut().for_each(|elector| assert_eq!(elector.line(), "here"));
    electors.iter_mut().for_each(Process::go);
    let before = Actor::new(&room.path);
    assert_eq!(before.check().segments, 1, "half written");
    first.signal(Signal::SIGKILL);
    assert!(!first.end());
    let roles: Vec<String> = electors.iter_mut().map(Process::line).collect();
    assert_eq!(roles.iter().filter(|role| *role == "loaded").count(), 1, "{roles:?}");
    assert_eq!(before.check_swept(&room).segments, 1);
    electors.into_iter().for_each(|elector| assert!(elector.end()));
}

fn winner(room: &Path) {
    let actor = Actor::new(room);
    actor.load("t");
    actor.reserve("t", Backend::Posix);
    say("loading");
    told_to_go();
}

const CROWD: usize = 512;

fn crowd() {
    let room = Room::new();
    let actor = Actor::new(&room.path);
    let published = actor.provide("t", Backend::Posix);
    let mut random = TestRng::deterministic_rng(RngAlgorithm::ChaCha);
    let mut members: Vec<Process> = (0..CROWD).map(|_| Process::start("member", &room)).collect();
    members.iter_mut().for_each(|member| assert_eq!(member.line(), "leased"));
    let census = actor.check();
    assert_eq!((census.processes as usize, census.leases as usize), (CROWD + 1, CROWD + 1));

    // Half of them go on at once; of these some are killed at a random moment, anywhere in their work.
    let mut killed = Vec::new();
    let mut left = Vec::new();
    for mut member in members {
        if random.random_bool(0.5) {
            member.go();
            if random.random_bool(0.5) {
                std::thread::sleep(Duration::from_micros(random.random_range(0..2000)));
                member.signal(Signal::SIGKILL);
                killed.push(member);
                continue;
            }
        }
        left.push(member);
    }
    for member in killed {
        member.end();
    }
    actor.check();
    for member in left {
        assert!(member.end());
    }
    let census = actor.check_swept(&room);
    assert_eq!((census.processes, census.leases, census.segments), (1, 1, 1));
    actor.release(published);
    let census = actor.check_swept(&room);
    assert_eq!((census.leases, census.segments, census.entries), (0, 0, 0));
}

/// Leases; then leases and lets go on and on, until its input ends.
fn member(room: &Path) {
    let actor = Actor::new(room);
    let mut held = actor.attach("t").expect("published");
    say("leased");
    if !told_to_go() {
        return;
    }
    for _ in 0..20 {
        let next = actor.attach("t").expect("published");
        actor.release(held);
        held = next;
    }
    std::io::stdin().read_to_end(&mut Vec::new()).unwrap();
}

fn stopped() {
    let room = Room::new();
    let actor = Actor::new(&room.path);
    actor.check();
    let mut sleeper = Process::start("sleeper", &room);
    assert_eq!(sleeper.line(), "inside");
    let began = Instant::now();
    let error = actor.registry.transact(|session| session.list()).unwrap_err();
    let Error::Stuck { holder, waited, .. } = &error else { panic!("{error}") };
    assert!(*waited >= 2.0 && began.elapsed() >= Duration::from_secs(2));
    assert!(holder.contains(&format!("process {}", sleeper.child.id())), "{holder}");
    // Left alone: even the lock's release is not looked at.
    sleeper.signal(Signal::SIGKILL);
    sleeper.end();
    let again = actor.registry.transact(|session| session.list()).unwrap_err();
    assert!(matches!(again, Error::Stuck { .. }));
    // Who comes new finds it free, and the table as before.
    let newcomer = Actor::new(&room.path);
    assert_eq!(newcomer.check().entries, 0);

    // A stopped process and a removed file: the name decides.
    let mut sleeper = Process::start("sleeper", &room);
    assert_eq!(sleeper.line(), "inside");
    sleeper.signal(Signal::SIGSTOP);
    std::fs::remove_file(room.registry()).unwrap();
    assert_eq!(newcomer.check().processes, 1);
    sleeper.signal(Signal::SIGKILL);
    sleeper.end();
}

/// Never comes out of the lock again.
fn sleeper(room: &Path) {
    let actor = Actor::new(room);
    actor.transact(|session| {
        session.acquire(&ask(session, "never", None))?;
        say("inside");
        std::io::stdin().read_to_end(&mut Vec::new()).unwrap();
        Ok(())
    });
}
