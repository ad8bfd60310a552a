//! An errno instead of every system call of every verb: ENOSPC, EMFILE, ENOMEM, EIO and their kin.
//!
//! A child does a verb of the store under ptrace; its k-th call that can fail does not happen and returns an errno that the
//! call can have. The verb must end, well or with an error that says where. Then, without faults, the same process must get
//! the model, the table must hold together, a newcomer must get it too, and in the end nothing may be left.
//! `ONECOPY_FAULTS=lasting`: the call fails from that step on, as everything on a full disk (`make test-odd`).
//!
//! `harness = false`: the children are this program again. Faults are made for x86-64 alone: registers are its own.

mod registry_support;

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use nix::sys::ptrace;
use nix::sys::signal::{Signal, raise};
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::Pid;

use onecopy_core::Result;
use onecopy_core::registry::Registry;
use onecopy_core::registry::request::Ticket;
use onecopy_core::store::{self, Announced, Ask, Attached, Outcome, Step, Store};
use onecopy_core::sys::directory::Directory;
use onecopy_core::words::{Backend, Constructor, Huge, Key};
use registry_support::{NAMESPACE, Room};

/// Far longer than anything here takes: for hangs.
const HANGS: Duration = Duration::from_secs(60);
/// More calls than any verb makes: it goes round in circles.
const ENDLESS: usize = 20_000;

/// A verb, and whether this process has the model before.
const VERBS: [(&str, bool); 9] = [
    ("load", false),
    ("attach", true),
    ("ask while it is loaded", false),
    ("replace", true),
    ("remove", true),
    ("list", true),
    ("sweep", true),
    ("verify", true),
    ("exit", true),
];
const BACKENDS: [Backend; 2] = [Backend::Memfd, Backend::Posix];

fn main() {
    let arguments: Vec<String> = std::env::args().collect();
    if let [_, verb, room, backend] = &arguments[..] {
        return child(verb, Path::new(room), if backend == "posix" { Backend::Posix } else { Backend::Memfd });
    }
    if arguments.iter().any(|argument| argument == "--list") {
        return;
    }
    if !cfg!(target_arch = "x86_64") {
        println!("skipped: faults are made for x86-64 alone");
        return;
    }
    let cases: Vec<_> = VERBS.iter().flat_map(|verb| BACKENDS.map(|backend| (*verb, backend))).collect();
    let lasting = std::env::var("ONECOPY_FAULTS").is_ok_and(|how| how == "lasting");
    let (next, seen) = (AtomicUsize::new(0), Mutex::new(BTreeMap::new()));
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                while let Some(&((verb, held), backend)) = cases.get(next.fetch_add(1, Ordering::Relaxed)) {
                    let (mut run, mut beyond) = (0, 0);
                    let mut fault = Fault { call: 0, which: 0, lasting };
                    // Not every run makes as many calls: a lock is waited for, a sweep is due.
                    while beyond < 3 {
                        let suffered = suffers(verb, held, backend, fault, &seen);
                        run += usize::from(suffered.is_some());
                        beyond = if suffered.is_some() { 0 } else { beyond + 1 };
                        fault = match suffered {
                            Some(false) => Fault { which: fault.which + 1, ..fault },
                            Some(true) | None => Fault { call: fault.call + 1, which: 0, ..fault },
                        };
                    }
                    assert!(run > 5, "{verb}: it was not watched");
                    println!("{verb}, {backend:?}: {run} faults");
                }
            });
        }
    });
    let seen = seen.into_inner().unwrap();
    println!(
        "{} faults; verbs ended well {} times, else with:",
        seen.values().sum::<usize>(),
        seen.get("ok").unwrap_or(&0)
    );
    for (message, count) in seen.iter().filter(|(message, _)| *message != "ok") {
        println!("{count:6}  {message}");
    }
}

#[derive(Clone, Copy, Debug)]
struct Fault {
    /// Of those that can fail, counted from 0.
    call: usize,
    /// Of the errnos that it can have.
    which: usize,
    /// From there on every call that can have this errno has it.
    lasting: bool,
}

/// Does one verb with one fault, and looks at everything afterwards. `Some(true)`: that was the last errno of this call;
/// `None`: there are not so many calls.
fn suffers(
    verb: &str,
    held: bool,
    backend: Backend,
    fault: Fault,
    seen: &Mutex<BTreeMap<String, usize>>,
) -> Option<bool> {
    let what = format!("{verb}, {backend:?}, {fault:?}");
    let room = Room::new();
    let ours = Store::open(&room.path, NAMESPACE).unwrap();
    let mut model = held.then(|| acquire(&ours, backend).unwrap().unwrap());
    let loading = (verb == "ask while it is loaded").then(|| match ours.acquire(&ask(), None).unwrap() {
        Step::Load { ticket } => ticket,
        other => panic!("{what}: {other:?}"),
    });
    let mut process = Process::start(verb, backend, &room);
    let reached = process.watch(&what, fault);
    let said = process.line();
    let said = without_numbers(&said, &room);
    // The call and what it was for, in words.
    assert!(said == "ok" || said.starts_with("error: ") && said.split(' ').count() > 4, "{what}: {said:?}");

    // Without faults: the same process, then a newcomer.
    if let Some(ticket) = loading {
        model = load(&ours, backend, ticket).unwrap();
    }
    assert_eq!(process.line(), "good", "{what}: after {said:?}");
    check(&room);
    let newcomer = acquire(&ours, backend).unwrap();
    assert!(newcomer.as_ref().is_none_or(|newcomer| good(&ours, newcomer)), "{what}");
    let said = if newcomer.is_none() { format!("{said}; a newcomer is private") } else { said };
    if let Some(model) = &model {
        assert!(good(&ours, model), "{what}: what was held before");
    }
    process.end(&what);
    if reached.is_some() {
        *seen.lock().unwrap().entry(said).or_insert(0) += 1;
    }
    drop((newcomer, model));
    let began = Instant::now();
    // What a process did not get told to the table goes by a sweep, once it is dead.
    while {
        let _ = ours.sweep(false).unwrap();
        !ours.list().unwrap().is_empty()
    } {
        assert!(began.elapsed() < HANGS, "{what}: {:?} is left", ours.list().unwrap());
        std::thread::sleep(Duration::from_millis(1));
    }
    check(&room);
    ours.leave();
    assert!(room.objects().is_empty(), "{what}: {:?} is left", room.objects());
    assert!(ours.remove_registry_if_unused().unwrap(), "{what}");
    reached
}

fn check(room: &Room) {
    let directory = Arc::new(Directory::open(&room.path).unwrap());
    let registry = Registry::open(directory, NAMESPACE, Box::new(Vec::new), Box::new(|_, _| ())).unwrap();
    registry.visit(false, |session| session.check()).unwrap();
}

/// So that the same words are counted as the same.
fn without_numbers(said: &str, room: &Room) -> String {
    let mut words = said.replace(&room.path.display().to_string(), "ROOM");
    while let Some(at) = words.find("-test-") {
        words.replace_range(at + 5..(at + 38).min(words.len()), "");
    }
    let mut short = String::new();
    for letter in words.chars() {
        let letter = if letter.is_ascii_digit() { '#' } else { letter };
        if letter != '#' || !short.ends_with('#') {
            short.push(letter);
        }
    }
    short
}

struct Process {
    child: Child,
    told: BufReader<ChildStdout>,
    tell: ChildStdin,
}

impl Process {
    fn start(verb: &str, backend: Backend, room: &Room) -> Self {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .arg(verb)
            .arg(&room.path)
            .arg(if backend == Backend::Posix { "posix" } else { "memfd" })
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let (told, tell) = (BufReader::new(child.stdout.take().unwrap()), child.stdin.take().unwrap());
        Self { child, told, tell }
    }

    fn line(&mut self) -> String {
        let mut line = String::new();
        self.told.read_line(&mut line).unwrap();
        line.trim_end().to_owned()
    }

    fn end(mut self, what: &str) {
        drop(self.tell);
        let status = self.child.wait().unwrap();
        assert!(status.success(), "{what}: {status}");
    }

    /// From one SIGSTOP to the next. `Some`: the fault was reached; whether it has no more errnos.
    fn watch(&self, what: &str, fault: Fault) -> Option<bool> {
        let pid = Pid::from_raw(self.child.id().try_into().unwrap());
        assert_eq!(waitpid(pid, None).unwrap(), WaitStatus::Stopped(pid, Signal::SIGSTOP), "{what}");
        ptrace::setoptions(pid, ptrace::Options::PTRACE_O_TRACESYSGOOD | ptrace::Options::PTRACE_O_EXITKILL).unwrap();
        let (mut can_fail, mut stops, mut made) = (0, 0, None);
        let mut inside: Option<i32> = None;
        loop {
            ptrace::syscall(pid, None).unwrap();
            match waitpid(pid, None).unwrap() {
                WaitStatus::PtraceSyscall(_) => stops += 1,
                WaitStatus::Stopped(_, Signal::SIGSTOP) => break,
                other => panic!("{what} after {stops} stops: {other:?}"),
            }
            assert!(stops < ENDLESS, "{what}: it does not end");
            if stops % 2 == 0 {
                if let Some(errno) = inside.take() {
                    registers::returns(pid, errno);
                }
                continue;
            }
            let errnos = registers::errnos(pid);
            if errnos.is_empty() {
                continue;
            }
            let errno = match made {
                None if can_fail == fault.call => errnos.get(fault.which).inspect(|&&errno| {
                    made = Some((errno, fault.which + 1 == errnos.len()));
                }),
                Some((errno, _)) if fault.lasting => errnos.iter().find(|&&one| one == errno),
                _ => None,
            };
            can_fail += 1;
            if let Some(&errno) = errno {
                registers::skip(pid);
                inside = Some(errno);
            }
        }
        ptrace::detach(pid, None).unwrap();
        made.map(|(_, last)| last)
    }
}

#[cfg(target_arch = "x86_64")]
mod registers {
    use libc::{EAGAIN, EIO, EMFILE, ENOLCK, ENOMEM, ENOSPC, ENOSYS};
    use nix::sys::ptrace;
    use nix::unistd::Pid;

    /// What the call that is about to be made can fail of. Not here: what only frees, what the allocator asks for (Rust
    /// aborts without memory), and what waits.
    pub fn errnos(pid: Pid) -> &'static [i32] {
        let registers = ptrace::getregs(pid).unwrap();
        let anonymous = registers.r8 as i32 == -1;
        let readable = registers.rdx as i32 != libc::PROT_NONE;
        match registers.orig_rax as i64 {
            libc::SYS_openat if registers.rdx as i32 & libc::O_CREAT != 0 => &[EMFILE, ENOSPC],
            libc::SYS_openat | libc::SYS_open => &[EMFILE, ENOMEM],
            libc::SYS_memfd_create => &[EMFILE, ENOMEM],
            libc::SYS_ftruncate | libc::SYS_fallocate => &[ENOSPC, EIO],
            libc::SYS_pwrite64 | libc::SYS_write => &[ENOSPC, EIO],
            libc::SYS_pread64 | libc::SYS_read | libc::SYS_getdents64 => &[EIO],
            // By a descriptor it is fstat, which fails for one that is closed alone.
            libc::SYS_newfstatat if registers.r10 as i32 & libc::AT_EMPTY_PATH != 0 => &[],
            libc::SYS_newfstatat | libc::SYS_statx | libc::SYS_statfs => &[EIO],
            libc::SYS_readlink | libc::SYS_readlinkat => &[EIO],
            libc::SYS_unlinkat | libc::SYS_fchmod => &[EIO],
            libc::SYS_fcntl if registers.rsi as i32 == libc::F_DUPFD_CLOEXEC => &[EMFILE],
            libc::SYS_fcntl => &[ENOLCK, ENOMEM],
            libc::SYS_mmap if !(anonymous && readable) => &[ENOMEM],
            libc::SYS_mprotect | libc::SYS_madvise | libc::SYS_munlock => &[ENOMEM],
            libc::SYS_clone | libc::SYS_clone3 => &[EAGAIN],
            libc::SYS_getrandom => &[ENOSYS],
            _ => &[],
        }
    }

    /// There is no call with this number: nothing happens.
    pub fn skip(pid: Pid) {
        let mut registers = ptrace::getregs(pid).unwrap();
        registers.orig_rax = u64::MAX;
        ptrace::setregs(pid, registers).unwrap();
    }

    pub fn returns(pid: Pid, errno: i32) {
        let mut registers = ptrace::getregs(pid).unwrap();
        registers.rax = i64::from(-errno) as u64;
        ptrace::setregs(pid, registers).unwrap();
    }
}

#[cfg(not(target_arch = "x86_64"))]
mod registers {
    use nix::unistd::Pid;

    pub fn errnos(_: Pid) -> &'static [i32] {
        &[]
    }

    pub fn skip(_: Pid) {}

    pub fn returns(_: Pid, _: i32) {}
}

// -- What the children do.

fn child(verb: &str, room: &Path, backend: Backend) {
    // Where the verb needs it, this process has the model, and what it starts once is started.
    let before = (!matches!(verb, "load" | "attach" | "ask while it is loaded")).then(|| {
        let store = Store::open(room, NAMESPACE).unwrap();
        let model = acquire(&store, backend).unwrap().unwrap();
        (store, model)
    });
    ptrace::traceme().unwrap();
    raise(Signal::SIGSTOP).unwrap();
    let done = faulty(verb, room, backend, before.as_ref());
    raise(Signal::SIGSTOP).unwrap();
    match done {
        Ok(()) => say("ok"),
        Err(error) => say(&format!("error: {error}")),
    }
    if verb == "exit" {
        say("good"); // it does not come back
        return;
    }
    drop(before);
    let store = Store::open(room, NAMESPACE).unwrap();
    let model = acquire(&store, backend).unwrap();
    say(if model.as_ref().is_none_or(|model| good(&store, model)) { "good" } else { "bad" });
    std::io::stdin().read_line(&mut String::new()).unwrap();
    drop(model);
    store::current().leave();
}

fn faulty(verb: &str, room: &Path, backend: Backend, before: Option<&(Arc<Store>, Attached)>) -> Result<()> {
    let Some((store, model)) = before else {
        let store = Store::open(room, NAMESPACE)?;
        return match store.acquire(&ask(), None)? {
            Step::Load { ticket } => load(&store, backend, ticket).map(drop),
            Step::Attached(_) | Step::Wait { .. } | Step::Again | Step::Private { .. } => Ok(()),
        };
    };
    match verb {
        "replace" => publish(store, backend, None).map(drop),
        "remove" => store.remove("t", None).map(drop),
        "list" => store.list().map(drop),
        "sweep" => store.sweep(false).map(drop),
        "verify" => store.verify(&model.view).map(drop),
        "exit" => {
            store.close();
            Ok(())
        }
        other => panic!("no such verb: {other}"),
    }
}

fn say(text: &str) {
    println!("{text}");
    std::io::stdout().flush().unwrap();
}

fn ask() -> Ask {
    let key = Key { tag: "t".to_owned(), version: String::new(), compatibility: String::new() };
    Ask { key, constructor: Constructor { name: "load".into(), code_hash: 1 }, may_load: true }
}

const SKELETON: &[u8] = b"what the model is";
const BYTES: usize = 64 << 10;

fn buffer(number: usize) -> Vec<u8> {
    (0..BYTES).map(|at| u8::try_from((at * 7 + number) % 251).unwrap()).collect()
}

fn good(store: &Store, model: &Attached) -> bool {
    model.skeleton == SKELETON && store.verify(&model.view).is_ok_and(|bytes| bytes == 2 * BYTES as u64)
}

fn acquire(store: &Arc<Store>, backend: Backend) -> Result<Option<Attached>> {
    let (began, mut waited) = (Instant::now(), None);
    loop {
        let step = store.acquire(&ask(), waited)?;
        let shown = format!("{step:?}");
        match step {
            Step::Attached(model) => return Ok(Some(model)),
            Step::Load { ticket } => {
                if let Some(model) = load(store, backend, ticket)? {
                    return Ok(Some(model));
                }
            }
            Step::Wait { word, value, episode, .. } => {
                waited = Some(episode);
                store.wait(word, value, Duration::from_millis(100));
            }
            Step::Again => std::thread::sleep(Duration::from_millis(1)),
            // It could not look at /proc when it entered the table, or its holder could not, who seems to be elsewhere then.
            Step::Private { reason, .. } if reason.contains("/proc is not mounted") => return Ok(None),
            Step::Private { reason, .. } if reason.contains("other PID namespaces") => return Ok(None),
            Step::Private { reason, .. } => panic!("private: {reason}"),
        }
        assert!(began.elapsed() < HANGS, "nothing comes of it: {shown}, {:?}", store.list());
    }
}

/// As the binding does: a loader that fails lets go of its ticket.
fn load(store: &Arc<Store>, backend: Backend, ticket: Ticket) -> Result<Option<Attached>> {
    publish(store, backend, Some(ticket)).inspect_err(|_| store::current().give_up(store.clone(), ticket))
}

/// `None`: it is not the loader any more, as where its life lock could not be looked at and it entered the table anew.
fn publish(store: &Arc<Store>, backend: Backend, ticket: Option<Ticket>) -> Result<Option<Attached>> {
    let announced = Announced {
        skeleton: SKELETON.to_vec(),
        buffers: vec![(0, BYTES as u64), (BYTES as u64, BYTES as u64)],
        data_bytes: 2 * BYTES as u64,
        excess: 2 * BYTES as u64,
        backend: Some(backend),
        huge: Huge::Auto,
        pin: false,
        replace: ticket.is_none(),
        ticket,
    };
    let mut publishing = store.announce(&ask(), announced)?;
    for number in 0..2 {
        publishing.fill(&buffer(number))?;
    }
    publishing.seal()?;
    let model = publishing.inspect()?;
    Ok(matches!(publishing.publish()?, Outcome::Ready { .. }).then_some(model))
}
