//! What a transaction costs, and how soon a waiter is woken.
//!
//! ```text
//! cargo bench -p onecopy-core --bench registry
//! ```
//!
//! `harness = false`: the processes that hold leases are this program again.

#[path = "../tests/registry_support/mod.rs"]
mod registry_support;

use std::io::{BufRead, BufReader, Read, Write};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use onecopy_core::registry::request::Acquired;
use onecopy_core::words::Backend;
use registry_support::{Actor, Room, ask, lease, now};

const ROUNDS: usize = 2000;

fn main() {
    let arguments: Vec<String> = std::env::args().collect();
    match &arguments[..] {
        [_, role, room] if role == "holder" => return holder(Path::new(room)),
        [_, role, room] if role == "waiter" => return waiter(Path::new(room)),
        _ => {}
    }
    println!("{:>8} {:>12} {:>12} {:>12} {:>12}", "leases", "attach us", "release us", "wait us", "sweep us");
    for leases in [1, 64, 512] {
        transactions(leases);
    }
    wake();
}

fn transactions(leases: usize) {
    let room = Room::new();
    let mut children: Vec<Child> = Vec::new();
    let actor = Actor::new(&room.path);
    actor.provide("t", Backend::Memfd);
    let other = Actor::new(&room.path);
    other.load("loading");
    for _ in 1..leases {
        children.push(start("holder", &room));
    }
    for child in &mut children {
        let mut line = String::new();
        BufReader::new(child.stdout.as_mut().unwrap()).read_line(&mut line).unwrap();
    }
    assert_eq!(actor.check().leases as usize, leases);
    let newcomer = Actor::new(&room.path);
    newcomer.check();
    let (mut attach, mut release, mut wait) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..ROUNDS {
        let began = Instant::now();
        let held = newcomer.attach("t").unwrap();
        attach.push(began.elapsed());
        let began = Instant::now();
        newcomer.release(held);
        release.push(began.elapsed());
        let began = Instant::now();
        newcomer.acquire("loading");
        wait.push(began.elapsed());
    }
    let mut sweep = Vec::new();
    for _ in 0..50 {
        let began = Instant::now();
        newcomer.transact(|session| session.sweep(true));
        sweep.push(began.elapsed());
    }
    let [attach, release, wait, sweep] = [attach, release, wait, sweep].map(median);
    println!("{leases:>8} {attach:>12.1} {release:>12.1} {wait:>12.1} {sweep:>12.1}");
    for mut child in children {
        drop(child.stdin.take());
        child.wait().unwrap();
    }
}

/// From the publisher's decision to publish until the waiter has its lease.
fn wake() {
    let mut latencies = Vec::new();
    for _ in 0..50 {
        let room = Room::new();
        let actor = Actor::new(&room.path);
        let ticket = actor.load("t");
        let (row, facts) = actor.reserve("t", Backend::Memfd);
        let mut child = start("waiter", &room);
        let mut told = BufReader::new(child.stdout.take().unwrap());
        let mut line = String::new();
        told.read_line(&mut line).unwrap();
        std::thread::sleep(Duration::from_millis(5));
        let began = now();
        lease(actor.publish("t", Some(ticket), row, facts));
        line.clear();
        told.read_line(&mut line).unwrap();
        let attached: u64 = line.trim().parse().unwrap();
        latencies.push(Duration::from_nanos(attached.saturating_sub(began)));
        child.wait().unwrap();
    }
    println!("publish to attached in a waiter: {:.1} us", median(latencies));
}

fn median(mut times: Vec<Duration>) -> f64 {
    times.sort();
    times[times.len() / 2].as_secs_f64() * 1e6
}

fn start(role: &str, room: &Room) -> Child {
    Command::new(std::env::current_exe().unwrap())
        .arg(role)
        .arg(&room.path)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap()
}

fn say(text: &str) {
    println!("{text}");
    std::io::stdout().flush().unwrap();
}

fn holder(room: &Path) {
    let actor = Actor::new(room);
    actor.attach("t").expect("published");
    say("holds");
    std::io::stdin().read_to_end(&mut Vec::new()).unwrap();
}

fn waiter(room: &Path) {
    let actor = Actor::new(room);
    let Acquired::Wait { futex_word, futex_value, .. } = actor.acquire("t") else { panic!("nobody loads") };
    say("waits");
    actor.registry.wait(futex_word, futex_value, Duration::from_secs(60));
    actor.transact(|session| match session.acquire(&ask(session, "t", None))? {
        Acquired::Attach { segment, .. } => session.take_lease(segment, 7).map(|_| ()),
        other => panic!("{other:?}"),
    });
    say(&now().to_string());
}
