//! Whole verbs in real processes, each killed by SIGKILL at every step of its way, beside 0, 1 and 8 others. Afterwards the
//! others still have right bytes, a newcomer has them too, there were as many loads as there had to be, and nothing is left.
//!
//! `harness = false`: the children are this program again. Needs `--features failpoints`. `ONECOPY_MATRIX=write` writes the
//! table in docs/protocol.md; without it the steps are compared with those that are written there.

mod registry_support;

use std::io::{BufRead, BufReader, Write};
use std::ops::RangeInclusive;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use onecopy_core::registry::request::{Holder, Ticket};
use onecopy_core::registry::{Census, Registry};
use onecopy_core::store::{self, Announced, Ask, Attached, Outcome, Step, Store};
use onecopy_core::sys::directory::Directory;
use onecopy_core::words::{Backend, Constructor, Huge, Key};
use registry_support::{NAMESPACE, Room};

const TABLE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../docs/protocol.md");
const BEGIN: &str = "<!-- begin: printed by ONECOPY_MATRIX=write cargo test -p onecopy-core --features failpoints --test store_killed -->";
const END: &str = "<!-- end -->";
const OTHERS: [usize; 3] = [0, 1, 8];
const BACKENDS: [Backend; 2] = [Backend::Memfd, Backend::Posix];
/// Far longer than anything here takes: for hangs.
const HANGS: Duration = Duration::from_secs(60);

fn main() {
    let arguments: Vec<String> = std::env::args().collect();
    if let [_, role, room, backend] = &arguments[..] {
        return child(role, Path::new(room), if backend == "posix" { Backend::Posix } else { Backend::Memfd });
    }
    if arguments.iter().any(|argument| argument == "--list") {
        return;
    }
    let cells = cells();
    let next = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                while let Some(cell) = cells.get(next.fetch_add(1, Ordering::Relaxed)) {
                    killed_at(cell);
                }
            });
        }
    });
    println!("{} deaths at {} steps of {} roles", cells.len(), steps(&cells).len(), ROLES.len());
    let table = table(&cells);
    let document = std::fs::read_to_string(TABLE).unwrap();
    let (before, rest) = document.split_once(BEGIN).expect("the table's place in docs/protocol.md");
    let (written, after) = rest.split_once(END).unwrap();
    if std::env::var("ONECOPY_MATRIX").is_ok_and(|how| how == "write") {
        std::fs::write(TABLE, format!("{before}{BEGIN}\n{table}{END}{after}")).unwrap();
    } else {
        let named = |text: &str| -> Vec<String> {
            text.lines().filter_map(|line| Some(line.rsplit_once(" | ")?.0.split(" | ").take(2).collect())).collect()
        };
        let known = named(written);
        let missing: Vec<_> =
            named(&table).into_iter().filter(|step| !step.contains('(') && !known.contains(step)).collect();
        assert!(missing.is_empty(), "not in docs/protocol.md: {missing:?}; run it with ONECOPY_MATRIX=write");
    }
}

/// Who is killed, and what has happened before.
const ROLES: [(&str, &str); 7] = [
    ("loader", "finds nothing, loads and publishes; the others wait for it"),
    ("attacher", "attaches to what is READY"),
    ("waiter", "waits for a loader, then attaches"),
    ("replacer", "publishes over what is held"),
    ("leaver", "lets go of what it attached"),
    ("remover", "removes the name of what is held"),
    ("sweeper", "sweeps after a holder was killed"),
];

#[derive(Clone, Debug)]
struct Cell {
    role: &'static str,
    step: String,
    /// How far on its way the step is: those who come later than READY have published.
    number: usize,
    published: bool,
    loaded: bool,
    removed: bool,
    backend: Backend,
    others: usize,
}

/// Every step that a role passes, as it writes them down itself.
fn cells() -> Vec<Cell> {
    let mut cells = Vec::new();
    for (role, _) in ROLES {
        for backend in BACKENDS {
            let way = way(role, backend);
            let first = |step: &str| way.iter().position(|one| one == step).unwrap_or(usize::MAX);
            for others in OTHERS {
                for (number, step) in way.iter().enumerate() {
                    cells.push(Cell {
                        role,
                        step: step.clone(),
                        number,
                        published: number >= first("publish: flipped"),
                        loaded: number >= first("announce: begun"),
                        removed: number >= first("remove: flipped"),
                        backend,
                        others,
                    });
                }
            }
        }
    }
    cells
}

fn way(role: &'static str, backend: Backend) -> Vec<String> {
    let room = Room::new();
    let log = outside(&room, "steps");
    let cell =
        Cell { role, step: String::new(), number: 0, published: true, loaded: true, removed: true, backend, others: 1 };
    let mut scene = Scene::set(&cell, &room, &[("ONECOPY_FAILPOINTS", log.to_str().unwrap())]);
    scene.play();
    scene.end();
    let text = std::fs::read_to_string(&log).unwrap();
    std::fs::remove_file(&log).unwrap();
    // The housekeeping thread's look at others may come at any time, or not at all; the test itself lists until it sees.
    // Whether there is something to sweep on entering is a matter of time, too.
    let swept = |line: &str| line.starts_with("enter: ") && line.ends_with(')');
    let steady = |line: &&str| !line.starts_with("sweep after use") && !line.starts_with("list") && !swept(line);
    text.lines().filter(steady).map(str::to_owned).collect()
}

/// A file that does not lie in the registry's directory.
fn outside(room: &Room, what: &str) -> PathBuf {
    let name = room.path.file_name().unwrap().to_str().unwrap();
    std::env::temp_dir().join(format!("{name}-{what}"))
}

fn killed_at(cell: &Cell) {
    let room = Room::new();
    let mut scene = Scene::set(cell, &room, &[("ONECOPY_FAILPOINT", &cell.step)]);
    scene.play();
    let how = scene.victim.take().unwrap().died();
    // How often a waiter asks is up to the machine.
    let passed_by = cell.role == "waiter" && cell.step.ends_with(')') && how.is_none();
    assert!(how == Some(9) || passed_by, "{cell:?}: not killed");
    scene.look(cell);
    let loads = std::fs::read_to_string(outside(&room, "loads")).unwrap_or_default().lines().count();
    assert!(expected(cell).contains(&loads), "{cell:?}: {loads} loads");
    scene.end();
    // Nothing is left, once somebody has touched it.
    let mut next = Process::start("toucher", cell.backend, &room, &[]);
    assert_eq!(next.line(), "have", "{cell:?}");
    next.end();
    assert!(room.objects().is_empty(), "{cell:?}: {:?}", room.objects());
    let census = census(&room);
    assert_eq!((census.processes, census.segments, census.leases), (0, 0, 0), "{cell:?}");
    let _ = std::fs::remove_file(outside(&room, "loads"));
}

/// One for whoever held it first, one more where nobody living held it when somebody asked. Between READY and letting go the
/// others come while the victim dies: both may be.
fn expected(cell: &Cell) -> RangeInclusive<usize> {
    match cell.role {
        "loader" if !cell.published => 1 + usize::from(cell.loaded)..=1 + usize::from(cell.loaded),
        "loader" if cell.others == 0 => 2..=2,
        "loader" if cell.step.starts_with("let go") => 1..=1,
        "loader" => 1..=2,
        "remover" => 1 + usize::from(cell.removed)..=1 + usize::from(cell.removed),
        // Its content had the name, and died with it.
        "replacer" => 1 + usize::from(cell.published)..=1 + usize::from(cell.published),
        "sweeper" => 2..=2,
        _ => 1..=1,
    }
}

struct Scene<'r> {
    room: &'r Room,
    role: &'static str,
    backend: Backend,
    /// Holds, or loads, before the victim comes.
    first: Option<Process>,
    others: Vec<Process>,
    count: usize,
    victim: Option<Process>,
    newcomer: Option<Process>,
    environment: Vec<(String, String)>,
}

impl<'r> Scene<'r> {
    fn set(cell: &Cell, room: &'r Room, environment: &[(&str, &str)]) -> Self {
        Self {
            room,
            role: cell.role,
            backend: cell.backend,
            first: None,
            others: Vec::new(),
            count: cell.others,
            victim: None,
            newcomer: None,
            environment: environment.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect(),
        }
    }

    fn start(&self, role: &str) -> Process {
        Process::start(role, self.backend, self.room, &[])
    }

    fn start_victim(&mut self, role: &str) {
        let environment: Vec<_> = self.environment.iter().map(|(a, b)| (a.as_str(), b.as_str())).collect();
        self.victim = Some(Process::start(role, self.backend, self.room, &environment));
    }

    fn start_others(&mut self, role: &str) {
        self.others = (0..self.count).map(|_| self.start(role)).collect();
    }

    /// Until the victim has done its work, or is dead.
    fn play(&mut self) {
        match self.role {
            "loader" => {
                self.start_victim("user");
                self.victim().line(); // "loading"
                self.start_others("user");
                let waiting: Vec<String> = self.others.iter_mut().map(Process::line).collect();
                // Where the victim died before it loaded, one of them does, and is told to go on as it was.
                self.others.iter_mut().zip(&waiting).filter(|(_, said)| *said == "loading").for_each(|(o, _)| o.go());
                self.victim().go();
                self.victim().line(); // "have"
                for (other, said) in self.others.iter_mut().zip(waiting) {
                    other.until_it_has(&said);
                }
            }
            "waiter" => {
                let mut first = self.start("user");
                assert_eq!(first.line(), "loading");
                self.start_others("user");
                let waiting: Vec<String> = self.others.iter_mut().map(Process::line).collect();
                self.start_victim("user");
                self.victim().line(); // "waiting"
                first.go();
                assert_eq!(first.line(), "have");
                self.victim().line(); // "have"
                for (other, said) in self.others.iter_mut().zip(waiting) {
                    other.until_it_has(&said);
                }
                self.first = Some(first);
            }
            "sweeper" => {
                let mut first = self.start("user");
                first.until_it_has("");
                first.child.kill().unwrap();
                first.died();
                self.start_victim("sweeper");
                self.victim().line();
                self.start_others("user");
                self.others.iter_mut().for_each(|other| other.until_it_has(""));
            }
            role => {
                let mut first = self.start("user");
                first.until_it_has("");
                self.first = Some(first);
                self.start_others("user");
                self.others.iter_mut().for_each(|other| other.until_it_has(""));
                self.start_victim(if role == "attacher" { "user" } else { role });
                self.victim().line();
                self.victim().go();
                self.victim().line();
            }
        }
    }

    fn victim(&mut self) -> &mut Process {
        self.victim.as_mut().unwrap()
    }

    /// Everybody has right bytes; so has a newcomer; and the dead go from the table without being asked for.
    fn look(&mut self, cell: &Cell) {
        let mut newcomer = self.start("user");
        newcomer.until_it_has("");
        self.newcomer = Some(newcomer);
        let living: Vec<_> = self.first.iter_mut().chain(&mut self.others).chain(&mut self.newcomer).collect();
        let count = u32::try_from(living.len()).unwrap();
        for process in living {
            process.go();
            assert_eq!(process.line(), "good", "{cell:?}");
        }
        let began = Instant::now();
        loop {
            let census = census(self.room);
            if (census.processes, census.leases) == (count, count) {
                return;
            }
            assert!(began.elapsed() < HANGS, "{cell:?}: {census:?} with {count} living holders");
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    fn end(&mut self) {
        let all = self.first.take().into_iter().chain(self.others.drain(..)).chain(self.newcomer.take());
        all.chain(self.victim.take()).for_each(Process::end);
    }
}

fn census(room: &Room) -> Census {
    let directory = Arc::new(Directory::open(&room.path).unwrap());
    let registry = Registry::open(directory, NAMESPACE, Box::new(Vec::new), Box::new(|_, _| ())).unwrap();
    registry.visit(false, |session| session.check()).unwrap().unwrap_or_default()
}

fn steps(cells: &[Cell]) -> Vec<(&'static str, String)> {
    let mut all: Vec<_> = cells.iter().map(|cell| (cell.role, cell.step.clone())).collect();
    all.sort();
    all.dedup();
    all
}

fn shown(range: &RangeInclusive<usize>) -> String {
    if range.start() == range.end() {
        range.start().to_string()
    } else {
        format!("{} or {}", range.start(), range.end())
    }
}

/// A line for each step of each role, with the number of loads beside 0, 1 and 8 others, as it was found to be.
fn table(cells: &[Cell]) -> String {
    let mut text = String::new();
    for (role, does) in ROLES {
        let mut rows: Vec<(usize, &str)> =
            cells.iter().filter(|cell| cell.role == role).map(|cell| (cell.number, cell.step.as_str())).collect();
        rows.sort_unstable();
        rows.dedup_by_key(|(_, step)| *step);
        let mut seen = std::collections::BTreeSet::new();
        rows.retain(|(_, step)| seen.insert(*step));
        text += &format!(
            "\n**{role}**: {does}\n\n| role | killed at | memfd 0, 1, 8 | posix 0, 1, 8 |\n|---|---|---|---|\n"
        );
        for (_, step) in rows {
            let count = |backend: Backend| {
                let one = |others: usize| {
                    let at = cells.iter().position(|cell| {
                        cell.role == role && cell.step == *step && cell.backend == backend && cell.others == others
                    });
                    at.map_or("-".to_owned(), |at| shown(&expected(&cells[at])))
                };
                OTHERS.map(one).join(", ")
            };
            text += &format!("| {role} | {step} | {} | {} |\n", count(Backend::Memfd), count(Backend::Posix));
        }
    }
    text + "\n"
}

/// A child that is told to go on by a line, and tells what it did by lines.
struct Process {
    child: Child,
    told: BufReader<ChildStdout>,
    tell: ChildStdin,
}

impl Process {
    fn start(role: &str, backend: Backend, room: &Room, environment: &[(&str, &str)]) -> Self {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .arg(role)
            .arg(&room.path)
            .arg(if backend == Backend::Posix { "posix" } else { "memfd" })
            .envs(environment.iter().copied())
            .env("ONECOPY_LOADS", outside(room, "loads"))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let (told, tell) = (BufReader::new(child.stdout.take().unwrap()), child.stdin.take().unwrap());
        Self { child, told, tell }
    }

    /// To one that may be dead.
    fn go(&mut self) {
        let _ = self.tell.write_all(b"\n");
    }

    /// Empty where it is dead.
    fn line(&mut self) -> String {
        let mut line = String::new();
        self.told.read_line(&mut line).unwrap();
        line.trim_end().to_owned()
    }

    /// `said`: what it said before, if that was read already.
    fn until_it_has(&mut self, said: &str) {
        let mut said = if said.is_empty() { self.line() } else { said.to_owned() };
        while said != "have" {
            match &*said {
                "loading" => self.go(),
                "waiting" => {}
                other => panic!("it said {other:?}"),
            }
            said = self.line();
        }
    }

    /// The signal that ended it.
    fn died(mut self) -> Option<i32> {
        drop(self.tell);
        self.child.wait().unwrap().signal()
    }

    /// Closes its input and waits for its end.
    fn end(mut self) {
        drop(self.tell);
        assert!(self.child.wait().unwrap().success());
    }
}

// -- What the children do.

fn child(role: &str, room: &Path, backend: Backend) {
    let store = Store::open(room, NAMESPACE).unwrap();
    match role {
        "user" | "leaver" => {
            let model = acquire(&store, "t", backend);
            say("have");
            if role == "leaver" {
                told_to_go();
                let_go(&store, model);
                say("gone");
            } else {
                while told_to_go() {
                    say(if store.verify(&model.view).is_ok() && good(&model) { "good" } else { "bad" });
                }
                let_go(&store, model);
            }
        }
        "toucher" => {
            let_go(&store, acquire(&store, "another", backend));
            say("have");
        }
        "replacer" => {
            told_to_wait();
            let model = publish(&store, "t", backend, None, true);
            say("have");
            while told_to_go() {}
            let_go(&store, model);
        }
        "remover" => {
            told_to_wait();
            store.remove("t", None).unwrap();
            say("removed");
            while told_to_go() {}
        }
        "sweeper" => {
            store.sweep(false).unwrap();
            say("swept");
            while told_to_go() {}
        }
        other => panic!("no such role: {other}"),
    }
    store::current().leave();
}

/// The housekeeping thread does it: until it has.
fn let_go(store: &Arc<Store>, model: Attached) {
    drop(model);
    let ours = |holder: &Holder| holder.identity.pid == std::process::id();
    while store.list().unwrap().iter().any(|row| row.holders.iter().any(ours)) {
        std::thread::sleep(Duration::from_millis(1));
    }
    // Its last steps come after what can be seen from outside.
    if std::env::var("ONECOPY_FAILPOINT").is_ok_and(|place| place.starts_with("let go")) {
        std::thread::sleep(HANGS);
    }
}

fn told_to_wait() {
    say("there");
    told_to_go();
}

fn told_to_go() -> bool {
    std::io::stdin().read_line(&mut String::new()).unwrap() > 0
}

fn say(text: &str) {
    println!("{text}");
    std::io::stdout().flush().unwrap();
}

fn ask(tag: &str) -> Ask {
    let key = Key { tag: tag.to_owned(), version: String::new(), compatibility: String::new() };
    Ask { key, constructor: Constructor { name: "load".into(), code_hash: 1 }, may_load: true }
}

const SKELETON: &[u8] = b"what the model is";
const BUFFERS: usize = 2;
const BYTES: usize = 64 << 10;

fn buffer(number: usize) -> Vec<u8> {
    (0..BYTES).map(|at| u8::try_from((at * 7 + number) % 251).unwrap()).collect()
}

fn good(model: &Attached) -> bool {
    model.skeleton == SKELETON && model.content.shared_bytes == (BUFFERS * BYTES) as u64
}

fn acquire(store: &Arc<Store>, tag: &str, backend: Backend) -> Attached {
    let mut waited = None;
    loop {
        match store.acquire(&ask(tag), waited).unwrap() {
            Step::Attached(model) => return model,
            Step::Load { ticket } => {
                if tag == "t" {
                    let path = std::env::var("ONECOPY_LOADS").unwrap();
                    let others_loaded = std::fs::metadata(&path).is_ok_and(|file| file.len() > 0);
                    let mut file = std::fs::OpenOptions::new().append(true).create(true).open(path).unwrap();
                    writeln!(file, "{}", std::process::id()).unwrap();
                    say("loading");
                    // Who takes over from a dead one is told by nobody.
                    if !others_loaded {
                        told_to_go();
                    }
                }
                return publish(store, tag, backend, Some(ticket), false);
            }
            Step::Wait { word, value, episode, .. } => {
                if waited.is_none() {
                    say("waiting");
                }
                waited = Some(episode);
                store.wait(word, value, Duration::from_millis(100));
            }
            Step::Again => std::thread::sleep(Duration::from_millis(1)),
            Step::Private { reason, .. } => panic!("private: {reason}"),
        }
    }
}

fn publish(store: &Arc<Store>, tag: &str, backend: Backend, ticket: Option<Ticket>, replace: bool) -> Attached {
    let announced = Announced {
        skeleton: SKELETON.to_vec(),
        buffers: (0..BUFFERS).map(|number| ((number * BYTES) as u64, BYTES as u64)).collect(),
        data_bytes: (BUFFERS * BYTES) as u64,
        excess: (BUFFERS * BYTES) as u64,
        backend: Some(backend),
        huge: Huge::Auto,
        pin: false,
        replace,
        ticket,
    };
    let mut publishing = store.announce(&ask(tag), announced).unwrap();
    for number in 0..BUFFERS {
        publishing.fill(&buffer(number)).unwrap();
    }
    publishing.seal().unwrap();
    let model = publishing.inspect().unwrap();
    assert!(matches!(publishing.publish().unwrap(), Outcome::Ready { .. }));
    model
}
