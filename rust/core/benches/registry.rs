//! What attaching costs without the skeleton, what a transaction costs, and how soon a waiter is woken.
//!
//! ```text
//! cargo bench -p onecopy-core --bench registry
//! ```
//!
//! * attach: lock, look-up, a holder's descriptor opened and verified, lease row, unlock; mapping. Nothing is touched.
//! * let go: unmapping, lease row, closing.
//! * cold: attach, after 5 ms of something else: what a process pays that does not attach again and again.
//! * acquire: `Store::acquire` right after an attach. It does the same, keeps its own books, and reads and checks header,
//!   manifest and an empty skeleton.
//! * lease: the transaction of `attach` alone, without the descriptor; wait: that of who finds a loader; sweep: a dry one.
//!
//! Medians. `harness = false`: the processes that hold leases are this program again.

#[path = "../tests/registry_support/mod.rs"]
mod registry_support;

use std::io::{BufRead, BufReader, Read, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use onecopy_core::registry::request::{AcquireRequest, Acquired, LeaseId};
use onecopy_core::store::{Announced, Ask, Outcome, Step, Store};
use onecopy_core::sys::mapping::Mapping;
use onecopy_core::sys::object::{self, ObjectId};
use onecopy_core::sys::room;
use onecopy_core::words::{Backend, Huge};
use registry_support::{Actor, NAMESPACE, Room, ask, constructor, key, lease, now};

const ROUNDS: usize = 2000;
/// Of `Store::acquire`, which is let go of by another thread. That one is waited for.
const ACQUIRES: usize = 200;
const SETTLED: Duration = Duration::from_millis(5);
const COLUMNS: [&str; 7] = ["attach", "let go", "cold", "acquire", "lease", "wait", "sweep"];
const PAGE: usize = 4096;

fn main() {
    let arguments: Vec<String> = std::env::args().collect();
    match &arguments[..] {
        [_, role, room] if role == "publisher" => return publisher(Path::new(room)),
        [_, role, room] if role == "holder" => return holder(Path::new(room)),
        [_, role, room] if role == "waiter" => return waiter(Path::new(room)),
        _ => {}
    }
    println!("{:>8}{}", "leases", COLUMNS.map(|column| format!("{:>12}", format!("{column} us"))).concat());
    for leases in [1, 64, 512] {
        transactions(leases);
    }
    wake();
}

fn transactions(leases: usize) {
    let room = Room::new();
    let mut children = vec![start("publisher", &room)];
    wait_for(&mut children[0]);
    children.extend((1..leases).map(|_| start("holder", &room)));
    children.iter_mut().skip(1).for_each(wait_for);
    let other = Actor::new(&room.path);
    other.load("loading");
    let newcomer = Actor::new(&room.path);
    assert_eq!(newcomer.check().leases as usize, leases);
    let (mut attached, mut gone, mut leased, mut wait) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    for _ in 0..ROUNDS {
        let (held, spent) = timed(|| attach(&newcomer));
        attached.push(spent);
        gone.push(timed(|| let_go(&newcomer, held)).1);
        let (held, spent) = timed(|| newcomer.attach("t").unwrap());
        leased.push(spent);
        newcomer.release(held);
        wait.push(timed(|| newcomer.acquire("loading")).1);
    }
    let store = Store::open(&room.path, NAMESPACE).unwrap();
    let (mut cold, mut acquired) = (Vec::new(), Vec::new());
    for _ in 0..ACQUIRES {
        let (held, spent) = timed(|| attach(&newcomer));
        cold.push(spent);
        let_go(&newcomer, held);
        let (held, spent) = timed(|| store.acquire(&asked(), None).unwrap());
        acquired.push(spent);
        assert!(matches!(held, Step::Attached(_)), "{held:?}");
        drop(held);
        // That thread looks at the table once more afterwards, and who comes then waits for its lock. Awake: the CPU's own
        // waking is nobody's cost.
        loop {
            let dropped = Instant::now();
            while dropped.elapsed() < SETTLED {
                std::hint::spin_loop();
            }
            if newcomer.check().leases as usize == leases {
                break;
            }
        }
    }
    let sweep = (0..50).map(|_| timed(|| newcomer.transact(|session| session.sweep(true))).1).collect();
    let medians = [attached, gone, cold, acquired, leased, wait, sweep].map(|times| format!("{:>12.1}", median(times)));
    println!("{leases:>8}{}", medians.concat());
    for mut child in children {
        drop(child.stdin.take());
        child.wait().unwrap();
    }
}

/// What a store does with the registry, the descriptor and the mapping.
fn attach(newcomer: &Actor) -> (LeaseId, OwnedFd, Mapping) {
    let (lease, fd, bytes) = newcomer.transact(|session| {
        let request = AcquireRequest { oom_kills: room::oom_kills(), ..ask(session, "t", None) };
        let Acquired::Attach { segment, content, holders, .. } = session.acquire(&request)? else {
            panic!("nobody has it")
        };
        let (facts, newest) = (content.facts, &holders[0]);
        let id = ObjectId { device: facts.device, inode: facts.inode, bytes: facts.bytes };
        let fd = object::open_through_holder(newest.identity.pid, newest.fd, id).unwrap();
        Ok((session.take_lease(segment, fd.as_raw_fd())?, fd, facts.bytes))
    });
    let mapping = Mapping::private(&fd, bytes as usize).unwrap();
    (lease, fd, mapping)
}

fn let_go(newcomer: &Actor, (lease, fd, mapping): (LeaseId, OwnedFd, Mapping)) {
    drop(mapping);
    newcomer.release(lease);
    drop(fd);
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

fn timed<T>(work: impl FnOnce() -> T) -> (T, Duration) {
    let began = Instant::now();
    let done = work();
    (done, began.elapsed())
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

fn wait_for(child: &mut Child) {
    let mut line = String::new();
    BufReader::new(child.stdout.as_mut().unwrap()).read_line(&mut line).unwrap();
    assert_eq!(line, "holds\n");
}

fn say(text: &str) {
    println!("{text}");
    std::io::stdout().flush().unwrap();
}

fn asked() -> Ask {
    Ask { key: key("t"), constructor: constructor(), may_load: false }
}

/// One page, and an empty skeleton.
fn publisher(room: &Path) {
    let store = Store::open(room, NAMESPACE).unwrap();
    let announced = Announced {
        skeleton: Vec::new(),
        buffers: vec![(0, PAGE as u64)],
        data_bytes: PAGE as u64,
        excess: PAGE as u64,
        backend: Some(Backend::Memfd),
        huge: Huge::Auto,
        pin: false,
        replace: false,
        ticket: None,
    };
    let mut publishing = store.announce(&asked(), announced).unwrap();
    publishing.fill(&[1; PAGE]).unwrap();
    publishing.seal().unwrap();
    let _model = publishing.inspect().unwrap();
    assert!(matches!(publishing.publish().unwrap(), Outcome::Ready { .. }));
    hold();
}

fn holder(room: &Path) {
    let store = Store::open(room, NAMESPACE).unwrap();
    let step = store.acquire(&asked(), None).unwrap();
    assert!(matches!(step, Step::Attached(_)), "{step:?}");
    hold();
}

fn hold() {
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
