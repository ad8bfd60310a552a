//! The verbs. The only place where registry and segments meet.
//!
//! Lock order: the registry's lock, then `Holdings`. Neither is held while user code runs, while memory is copied or
//! freed, or while anything waits for another process.

mod held;
mod patience;
mod process;
mod publish;
mod view;

use std::collections::hash_map::Entry;
use std::os::fd::AsRawFd;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use held::{Held, Holdings};
pub use patience::Patience;
pub use process::{Process, current};
pub use publish::{Announced, Outcome, Publishing};
pub use view::{Inherited, Place, View};

use crate::layout::registry::segment_name;
use crate::registry::request::{
    AcquireRequest, Acquired, Backend, Constructor, Ended, Holder, Holding, Identity, Key, LeaseId, Listed,
    SegmentFacts, Ticket,
};
use crate::registry::{self, Registry, Session, SweepReport};
use crate::segment::reader;
use crate::sys::directory::Directory;
use crate::sys::mapping::Mapping;
use crate::sys::object::{self, Missing, ObjectId, SegmentFd};
use crate::sys::{fork, room};
use crate::{Error, Result};

/// Where segments and registry live, if neither the caller nor `ONECOPY_DIR` says otherwise.
pub const DIRECTORY: &str = "/dev/shm";
const MAX_NAME: usize = 255;

/// One namespace in one directory, as this process uses it.
pub struct Store {
    place: Arc<Place>,
    directory: Arc<Directory>,
    registry: Registry,
    holdings: Holdings,
    /// The fork generation of the process that opened it: in a child its locks may be held for ever.
    forks: u64,
}

impl std::fmt::Debug for Store {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        out.debug_struct("Store").field("place", &self.place).finish_non_exhaustive()
    }
}

/// What a caller asks for.
#[derive(Clone, Debug)]
pub struct Ask {
    pub key: Key,
    pub constructor: Constructor,
    /// False for `attach`: an unknown tag is an error, not a reason to load.
    pub may_load: bool,
}

/// One answer to `Ask`; `Wait` is the only one after which the same is asked again.
#[derive(Debug)]
pub enum Step {
    Attached(Attached),
    Load {
        ticket: Ticket,
    },
    Wait {
        loader: Identity,
        since: u64,
        word: u32,
        value: u32,
        episode: u64,
    },
    /// All who hold it are going away right now: look again in a moment.
    Again,
    /// Load privately. `quiet`: the reason was told before, or is none that a person needs to hear.
    Private {
        reason: String,
        unshareable: bool,
    },
}

/// A segment mapped into this process, and what to rebuild the object from.
#[derive(Debug)]
pub struct Attached {
    pub view: Arc<View>,
    pub skeleton: Vec<u8>,
    pub data_offset: u64,
    pub generation: u64,
    pub shared_bytes: u64,
    pub facts: SegmentFacts,
    /// The constructor that published it.
    pub constructor: Constructor,
}

impl Store {
    /// The process's store for this place; opened once.
    pub fn open(directory: &Path, namespace: &str) -> Result<Arc<Self>> {
        let place = Place { directory: directory.to_owned(), namespace: namespace.to_owned() };
        let process = process::current();
        let mut stores = process.stores();
        if let Some(store) = stores.get(&place) {
            return Ok(store.clone());
        }
        registry::check_namespace(namespace)?;
        let directory = Arc::new(Directory::open(directory)?);
        let holdings = Holdings::default();
        let (all, restored) = (holdings.clone(), holdings.clone());
        let registry = Registry::open(
            directory.clone(),
            namespace,
            Box::new(move || all.all()),
            Box::new(move |uuid, lease| restored.restored(uuid, lease)),
        )?;
        let store =
            Arc::new(Self { place: Arc::new(place.clone()), directory, registry, holdings, forks: fork::generation() });
        stores.insert(place, store.clone());
        Ok(store)
    }

    pub fn registry_path(&self) -> String {
        self.registry.path()
    }

    /// Asks once. `waited`: the episode in which the caller began to wait.
    pub fn acquire(&self, ask: &Ask, waited: Option<u64>) -> Result<Step> {
        check_key(&ask.key)?;
        let oom_kills = room::oom_kills();
        let found = self.registry.transact(|session| {
            let request = AcquireRequest {
                me: session.me(),
                key: ask.key.clone(),
                constructor: ask.constructor.clone(),
                // Under the lock: what others wrote before is in the past.
                now: now(),
                oom_kills,
                waited,
                may_load: ask.may_load,
            };
            let mut refused = None;
            // A holder or a named object that proves gone is dropped from the table, and the question asked again.
            for _ in 0..MAX_CANDIDATES {
                let answer = session.acquire(&request)?;
                let Acquired::Attach { segment, facts, generation, holders, foreign, constructor } = answer else {
                    return Ok(Found::Answer(answer));
                };
                match self.stage(&facts) {
                    Own::Held => return Ok(Found::Own { facts, constructor }),
                    // Another thread of ours has said READY, and is about to note its lease.
                    Own::Publishing => return Ok(Found::Dying),
                    Own::Nothing => {}
                }
                match self.open_segment(session, segment, &facts, &holders)? {
                    Opened::Fd(fd) => {
                        let lease = session.take_lease(segment, fd.as_raw_fd())?;
                        return Ok(Found::Segment { fd, lease, facts, generation, constructor });
                    }
                    Opened::LookAgain => {}
                    Opened::Dying => return Ok(Found::Dying),
                    Opened::Refused(why) => {
                        refused = Some(why);
                        break;
                    }
                    Opened::OnlyForeign if foreign => {
                        refused =
                            Some("its holders live in other PID namespaces; backend=\"posix\" reaches across".into());
                        break;
                    }
                    Opened::OnlyForeign => {}
                }
            }
            let why = refused.unwrap_or_else(|| "none of its holders could be opened".into());
            Ok(Found::Refused(why))
        })?;
        self.answer(ask, found)
    }

    fn answer(&self, ask: &Ask, found: Found) -> Result<Step> {
        Ok(match found {
            Found::Segment { fd, lease, facts, generation, constructor } => {
                self.hold(ask, fd, lease, facts, generation, &constructor);
                self.view(facts.uuid, constructor)?
            }
            Found::Own { facts, constructor } => self.view(facts.uuid, constructor)?,
            Found::Dying => Step::Again,
            Found::Refused(why) => Step::Private { reason: why, unshareable: false },
            Found::Answer(Acquired::Load { ticket, .. }) => {
                // A loader that is let go of unfinished is ended by the housekeeping thread.
                process::current().keep_house();
                Step::Load { ticket }
            }
            Found::Answer(Acquired::Wait { loader, since, episode, futex_word, futex_value }) => {
                Step::Wait { loader, since, word: futex_word, value: futex_value, episode }
            }
            Found::Answer(Acquired::Unshareable { reason }) => Step::Private { reason, unshareable: true },
            Found::Answer(Acquired::GoPrivate { reason }) => Step::Private {
                reason: format!("its constructor failed twice elsewhere: {reason}"),
                unshareable: false,
            },
            Found::Answer(Acquired::OutOfMemory { deaths, need }) => return Err(self.killed(&ask.key, deaths, need)),
            Found::Answer(Acquired::NotFound | Acquired::Attach { .. }) => return Err(self.not_found(&ask.key)),
        })
    }

    /// Sleeps until the entry changes, at most `limit`. Spurious wake-ups are fine: the caller asks again.
    pub fn wait(&self, word: u32, value: u32, limit: Duration) {
        self.registry.wait(word, value, limit);
    }

    /// The loader ends without READY.
    pub fn end_loading(&self, ticket: Ticket, ended: Ended) -> Result<()> {
        self.registry.transact(|session| session.end_loading(ticket, ended, None))
    }

    /// Unnames every model of this tag (of this version, if one is given); how many there were.
    pub fn remove(&self, tag: &str, version: Option<&str>) -> Result<u32> {
        self.registry.transact(|session| session.remove(tag, version))
    }

    pub fn list(&self) -> Result<Vec<Listed>> {
        self.registry.transact(|session| session.list())
    }

    pub fn sweep(&self, dry_run: bool) -> Result<SweepReport> {
        self.registry.transact(|session| session.sweep(dry_run))
    }

    /// Removes the registry's file if nobody uses it; false if somebody does.
    pub fn remove_registry_if_unused(&self) -> Result<bool> {
        self.registry.remove_file_if_unused()
    }

    fn is_ours(&self) -> bool {
        self.forks == fork::generation()
    }

    /// Clean exit: drops our leases and our place in the table. What is mapped stays usable until the process is gone.
    pub fn leave(&self) {
        self.registry.leave();
        let held = std::mem::take(&mut *self.holdings.lock());
        drop(held);
    }

    /// Checks the buffers of an attached segment against their checksums; the number of bytes checked.
    pub fn verify(&self, view: &View) -> Result<u64> {
        let missing = || Error::os("verify", "segment", rustix::io::Errno::BADF);
        let (fd, facts) = {
            let holdings = self.holdings.lock();
            let held = holdings.get(&view.uuid()).ok_or_else(missing)?;
            (held.fd.clone(), held.published.ok_or_else(missing)?.0)
        };
        reader::verify(&fd, &facts, &self.shown(&facts))
    }

    /// In a forked child: takes a lease of its own for a view that came along, else the parent's end would free the tag
    /// and a second copy would be loaded. False where there is nothing to take.
    pub fn adopt(view: &Arc<View>) -> Result<bool> {
        let Some(inherited) = view.inherited() else { return Ok(false) };
        let store = Self::open(&view.place().directory, &view.place().namespace)?;
        if view.counted_here() {
            return Ok(true);
        }
        if let Some(held) = store.holdings.lock().get_mut(&view.uuid()) {
            held.views += 1;
            view.count_here();
            return Ok(true);
        }
        let Some(fd) = view.inherited_fd() else { return Ok(false) };
        let holding = Holding {
            key: inherited.key.clone(),
            constructor: inherited.constructor.clone(),
            generation: inherited.generation,
            pinned: false,
            facts: inherited.facts,
            shared_bytes: inherited.shared_bytes,
            fd: fd.as_raw_fd(),
        };
        let lease = store.registry.transact(|session| session.restore(&holding))?;
        let held = Held {
            fd: Arc::new(SegmentFd::new(fd, object_id(&inherited.facts))),
            key: holding.key,
            constructor: holding.constructor,
            generation: holding.generation,
            pinned: false,
            shared_bytes: holding.shared_bytes,
            published: Some((holding.facts, lease)),
            views: 1,
            // For what is built from now on there will be a new one: this one may show what the parent wrote in place.
            view: std::sync::Weak::new(),
        };
        store.holdings.lock().insert(view.uuid(), held);
        view.count_here();
        process::current().keep_house();
        Ok(true)
    }

    /// What this process has of the segment, behind a descriptor that is still open.
    fn stage(&self, facts: &SegmentFacts) -> Own {
        match self.holdings.lock().get(&facts.uuid).filter(|held| held.fd.open()) {
            Some(held) if held.published.is_some() => Own::Held,
            Some(_) => Own::Publishing,
            None => Own::Nothing,
        }
    }

    fn open_segment(
        &self,
        session: &mut Session<'_>,
        segment: u32,
        facts: &SegmentFacts,
        holders: &[Holder],
    ) -> Result<Opened> {
        let id = object_id(facts);
        if facts.backend == Backend::Posix {
            let name = self.segment_name(&facts.uuid);
            return match object::open_named(&self.directory, &name, id) {
                Ok(fd) => Ok(Opened::Fd(fd)),
                Err(Missing::Gone | Missing::NoProcess) => {
                    session.segment_lost(segment)?;
                    Ok(Opened::LookAgain)
                }
                Err(Missing::Refused(errno)) => Ok(Opened::Refused(format!("{}: {errno}", self.shown(facts)))),
            };
        }
        let (mut gone, mut dying, mut refused) = (false, false, None);
        for holder in holders {
            match object::open_through_holder(holder.identity.pid, holder.fd, id) {
                Ok(fd) => return Ok(Opened::Fd(fd)),
                Err(Missing::Gone) => {
                    session.holder_gone(holder.lease)?;
                    gone = true;
                }
                Err(Missing::NoProcess) => dying = true,
                Err(Missing::Refused(errno)) => {
                    let who = &holder.identity;
                    refused = Some(format!(
                        "process {} ({}) has it, and /proc/{}/fd may not be opened: {errno} (other gid, not dumpable, \
                         another user namespace, or fewer capabilities; `onecopy doctor` looks which)",
                        who.pid, who.name, who.pid
                    ));
                }
            }
        }
        Ok(match (gone, dying, refused) {
            (true, ..) => Opened::LookAgain,
            (_, true, _) => Opened::Dying,
            (_, _, Some(why)) => Opened::Refused(why),
            _ => Opened::OnlyForeign,
        })
    }

    /// What was opened and leased is held. Where another thread was faster, its lease is enough: the spare one goes again,
    /// before its descriptor does, as a row always names an open one.
    fn hold(
        &self,
        ask: &Ask,
        fd: std::os::fd::OwnedFd,
        lease: LeaseId,
        facts: SegmentFacts,
        generation: u64,
        constructor: &Constructor,
    ) {
        let fd = SegmentFd::new(fd, object_id(&facts));
        let spare = match self.holdings.lock().entry(facts.uuid) {
            Entry::Occupied(held) if held.get().published.is_some() && held.get().fd.open() => {
                Some((lease, Arc::new(fd)))
            }
            Entry::Occupied(mut held) => {
                // Our descriptor was closed behind our back, and another holder gave us a new one: with the old number, maybe.
                let held = held.get_mut();
                let number = fd.number();
                let closed = std::mem::replace(&mut held.fd, Arc::new(fd));
                if closed.number() == number
                    && let Some(closed) = Arc::into_inner(closed)
                {
                    closed.forget();
                }
                held.published.replace((facts, lease)).map(|(_, before)| (before, held.fd.clone()))
            }
            Entry::Vacant(place) => {
                place.insert(Held {
                    fd: Arc::new(fd),
                    key: ask.key.clone(),
                    constructor: constructor.clone(),
                    generation,
                    pinned: false,
                    shared_bytes: 0,
                    published: Some((facts, lease)),
                    views: 0,
                    view: std::sync::Weak::new(),
                });
                None
            }
        };
        let Some((lease, fd)) = spare else { return };
        self.release(lease);
        drop(fd);
    }

    /// Where the registry does not answer now, the housekeeping thread tries again.
    fn release(&self, lease: LeaseId) {
        if self.registry.transact(|session| session.release(lease)).is_err() {
            process::current().release_later(&self.place, lease);
        }
    }

    fn try_release(&self, lease: LeaseId) -> Result<()> {
        self.registry.transact(|session| session.release(lease))
    }

    /// A view of a segment that this process holds: the one that is there, or a new mapping. `Again` where the last view
    /// of it went just now, and the lease with it.
    fn view(&self, uuid: [u8; 16], constructor: Constructor) -> Result<Step> {
        let (view, fd, facts, generation) = {
            let mut holdings = self.holdings.lock();
            let Some(held) = holdings.get_mut(&uuid) else { return Ok(Step::Again) };
            let Some((facts, _)) = held.published else { return Ok(Step::Again) };
            let view = held.view.upgrade();
            // Counted before it exists: the last view to go takes the lease along, and this one is on its way.
            if view.is_none() {
                held.views += 1;
            }
            (view, held.fd.clone(), facts, held.generation)
        };
        let view = match view {
            Some(view) => view,
            None => self.map_counted(&fd, facts.uuid, facts.bytes)?,
        };
        let contents = reader::read(&fd, &facts, &self.shown(&facts))?;
        let shared_bytes = facts.bytes - contents.data_offset;
        if let Some(held) = self.holdings.lock().get_mut(&uuid) {
            held.view = Arc::downgrade(&view);
            held.shared_bytes = shared_bytes;
            view.inherits(held.inherited(facts));
        }
        Ok(Step::Attached(Attached {
            view,
            skeleton: contents.skeleton,
            data_offset: contents.data_offset,
            generation,
            shared_bytes,
            facts,
            constructor,
        }))
    }

    /// Maps; the caller has counted the view already.
    fn map_counted(&self, fd: &std::os::fd::OwnedFd, uuid: [u8; 16], bytes: u64) -> Result<Arc<View>> {
        process::current().keep_house();
        match Mapping::private(fd, bytes as usize) {
            Ok(mapping) => Ok(Arc::new(View::new(mapping, uuid, self.place.clone()))),
            Err(error) => {
                self.view_gone(uuid);
                Err(error)
            }
        }
    }

    /// One view less; with the last one the lease goes, and then the descriptor.
    fn view_gone(&self, uuid: [u8; 16]) {
        let last = {
            let mut holdings = self.holdings.lock();
            let Some(held) = holdings.get_mut(&uuid) else { return };
            held.views = held.views.saturating_sub(1);
            if held.views > 0 { None } else { holdings.remove(&uuid) }
        };
        let Some(held) = last else { return };
        if let Some((_, lease)) = held.published {
            self.release(lease);
        }
    }

    fn collapse_step(&self, uuid: [u8; 16], from: usize) -> Option<usize> {
        let (fd, bytes) = {
            let holdings = self.holdings.lock();
            let held = holdings.get(&uuid)?;
            (held.fd.clone(), held.fd.id.bytes)
        };
        crate::sys::mapping::collapse_step(&fd, bytes as usize, from)
    }

    fn segment_name(&self, uuid: &[u8; 16]) -> String {
        segment_name(self.registry.uid(), &self.place.namespace, uuid)
    }

    /// The segment's name, or what stands for it where it has none.
    fn shown(&self, facts: &SegmentFacts) -> String {
        match facts.backend {
            Backend::Posix => self.directory.shown(&self.segment_name(&facts.uuid)),
            Backend::Memfd => format!("memfd {}:{} (registry {})", facts.device, facts.inode, self.registry.path()),
        }
    }

    fn not_found(&self, key: &Key) -> Error {
        Error::NotFound { key: key.to_string(), namespace: self.place.namespace.clone(), place: self.registry.path() }
    }

    fn killed(&self, key: &Key, deaths: u32, need: u64) -> Error {
        let room = room::memory();
        Error::OutOfMemory(format!(
            "{deaths} loaders of {key} in a row were killed for lack of memory ({need} bytes were reserved, {} bytes are free: \
             {}). A third is not started for 10 minutes: raise the limit, or load a smaller model",
            room.free, room.limit
        ))
    }
}

/// More rounds than any honest table needs; a hostile one ends here.
const MAX_CANDIDATES: usize = 2048;

enum Found {
    Answer(Acquired),
    Segment { fd: std::os::fd::OwnedFd, lease: LeaseId, facts: SegmentFacts, generation: u64, constructor: Constructor },
    Own { facts: SegmentFacts, constructor: Constructor },
    Dying,
    Refused(String),
}

enum Own {
    Held,
    Publishing,
    Nothing,
}

enum Opened {
    Fd(std::os::fd::OwnedFd),
    LookAgain,
    Dying,
    Refused(String),
    OnlyForeign,
}

/// Closes a descriptor that nothing here uses any more, unless somebody closed it behind our back.
fn object_id(facts: &SegmentFacts) -> ObjectId {
    ObjectId { device: facts.device, inode: facts.inode, bytes: facts.bytes }
}

fn now() -> u64 {
    std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).map_or(0, |since| since.as_nanos() as u64)
}

fn check_key(key: &Key) -> Result<()> {
    let tag = &key.tag;
    if tag.is_empty() || tag.len() > MAX_NAME || tag.contains('\0') {
        let length = tag.len();
        return Err(Error::BadName(format!(
            "tag of {length} bytes: 1 to {MAX_NAME} bytes of UTF-8 without NUL are allowed. Put a long path into `version`"
        )));
    }
    Ok(())
}
