//! The verbs. The only place where registry and segments meet.
//!
//! Lock order: the registry's lock, then `Holdings`. Neither is held while user code runs, while memory is copied or
//! freed, or while anything waits for another process.

mod acquire;
mod held;
mod patience;
mod process;
mod publish;
mod view;

use std::collections::HashSet;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

pub use acquire::{Ask, Attached, Step};
use held::{Held, Holdings};
pub use patience::Patience;
pub use process::{Process, current};
pub use publish::{Announced, Outcome, Publishing};
pub use view::{Place, View};

use crate::layout::registry::{hex, segment_name, segment_prefix, uuid_of};
use crate::registry::request::{Ended, Holding, LeaseId, Listed, State, Ticket};
use crate::registry::{self, Registry, SweepReport};
use crate::segment::reader;
use crate::sys::directory::Directory;
use crate::sys::failpoint::{reached, verb};
use crate::sys::fork;
use crate::sys::huge;
use crate::sys::mapping::Mapping;
use crate::sys::object::{self, ObjectId, SegmentFd};
use crate::sys::room::{self, Room};
use crate::words::{Backend, Huge, Key, SegmentFacts};
use crate::{Error, Result};

/// Where segments and registry live, if neither the caller nor `ONECOPY_DIR` says otherwise.
pub const DIRECTORY: &str = "/dev/shm";
const MAX_NAME: usize = 255;

/// What a sweep removed, or would remove.
#[derive(Debug, Default)]
pub struct Swept {
    pub report: SweepReport,
    /// Names and bytes of segments without a row.
    pub orphans: Vec<(String, u64)>,
}

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
        let (names, prefix) = (directory.clone(), segment_prefix(rustix::process::geteuid().as_raw(), namespace));
        let registry = Registry::open(
            directory.clone(),
            namespace,
            Box::new(move || all.all(|facts| facts.backend == Backend::Memfd || leads_to(&names, &prefix, facts))),
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

    /// Memory that a model may take now, and the tightest limit on it.
    pub fn room() -> Room {
        room::memory()
    }

    /// Sleeps until the entry changes, at most `limit`. Spurious wake-ups are fine: the caller asks again.
    pub fn wait(&self, word: u32, value: u32, limit: Duration) {
        verb("wait");
        self.registry.wait(word, value, limit);
        reached("awake");
    }

    /// The loader ends without READY.
    pub fn end_loading(&self, ticket: Ticket, ended: Ended) -> Result<()> {
        verb("end loading");
        self.registry.transact(|session| session.end_loading(ticket, ended, None))
    }

    /// Unnames every model of this tag (of this version, if one is given); how many there were.
    pub fn remove(&self, tag: &str, version: Option<&str>) -> Result<u32> {
        verb("remove");
        self.registry.transact(|session| session.remove(tag, version))
    }

    pub fn list(&self) -> Result<Vec<Listed>> {
        verb("list");
        process::current().catch_up();
        let mut listed = self.registry.visit(false, |session| session.list())?.unwrap_or_default();
        let prefix = segment_prefix(self.registry.uid(), &self.place.namespace);
        for row in listed.iter_mut().filter(|row| row.state == State::Ready) {
            let named = row.segment.filter(|facts| facts.backend == Backend::Posix);
            if named.is_some_and(|facts| !leads_to(&self.directory, &prefix, &facts)) && !row.unnamed {
                (row.state, row.reason) = (State::Stale, "its file is gone".to_owned());
            }
        }
        Ok(listed)
    }

    /// Removes what only the dead hold, and named segments that no table knows (the registry's file was removed by hand) and
    /// nobody has open. `dry_run`: only tells.
    pub fn sweep(&self, dry_run: bool) -> Result<Swept> {
        let prefix = segment_prefix(self.registry.uid(), &self.place.namespace);
        let found = object::list_named(&self.directory, &prefix)?;
        verb("sweep");
        // Their memory goes when they are closed, after the lock.
        let mut freed = Vec::new();
        let mut orphans = |known: &HashSet<[u8; 16]>| -> Vec<(String, u64)> {
            let unknown = found.iter().filter(|name| uuid_of(name).is_some_and(|uuid| !known.contains(&uuid)));
            let removed = unknown.filter_map(|name| {
                let (bytes, fd) = object::remove_unused(&self.directory, name, dry_run)?;
                freed.push(fd);
                Some((name.clone(), bytes))
            });
            removed.collect()
        };
        let swept = self.registry.visit(!dry_run, |session| {
            // Looked at after the directory: a segment's row is older than its name. Under the lock nobody opens by name.
            let known = session.segments()?;
            Ok(Swept { report: session.sweep(dry_run)?, orphans: orphans(&known) })
        })?;
        let swept = match swept {
            Some(swept) => swept,
            None => Swept { report: SweepReport::default(), orphans: orphans(&HashSet::new()) },
        };
        drop(freed);
        Ok(swept)
    }

    /// What dead processes left goes, unless somebody has swept in this half second, or since `before`. `Some`: when somebody
    /// did, perhaps before the death that is to be found; to be asked again with it.
    fn sweep_after(&self, before: Option<u32>) -> Result<Option<u32>> {
        verb("sweep after use");
        let looked = self.registry.visit(true, |session| {
            let (swept, due) = session.last_sweep();
            if due {
                session.sweep(false)?;
            }
            Ok((!due && before.is_none_or(|before| before == swept)).then_some(swept))
        })?;
        Ok(looked.flatten())
    }

    /// Removes the registry's file if nobody uses it; false if somebody does.
    pub fn remove_registry_if_unused(&self) -> Result<bool> {
        self.registry.remove_file_if_unused()
    }

    /// Where the registry's file was removed, what this process holds comes along into the new one.
    fn come_along(&self) {
        if self.holdings.any() && self.registry.lost() {
            verb("come along");
            // Where that fails, the next look tries again.
            let _ = self.registry.transact(|_| Ok(()));
        }
    }

    fn is_ours(&self) -> bool {
        self.forks == fork::generation()
    }

    /// Clean exit: drops our leases and our place in the table. What is mapped stays usable until the process is gone.
    pub fn leave(&self) {
        self.registry.leave();
        self.let_go();
    }

    /// The process exits: as `leave`, and no thread comes back.
    pub fn close(&self) {
        verb("leave");
        self.registry.close();
        self.let_go();
    }

    fn let_go(&self) {
        let held = std::mem::take(&mut *self.holdings.lock());
        drop(held);
    }

    /// Checks the buffers of an attached segment against their checksums; the number of bytes checked.
    pub fn verify(&self, view: &View) -> Result<u64> {
        let missing = || Error::os("verify", "segment", rustix::io::Errno::BADF);
        let (fd, facts) = {
            let holdings = self.holdings.lock();
            let held = holdings.get(&view.uuid()).ok_or_else(missing)?;
            (held.fd.clone(), held.published.as_ref().ok_or_else(missing)?.0.facts)
        };
        reader::verify(&fd, &facts, &self.shown(&facts))
    }

    /// In a forked child, before it does anything else: takes leases of its own for the views that came along, else the
    /// parent's end would free the tags, and second copies would be loaded.
    pub fn adopt(views: &[Arc<View>]) -> Result<()> {
        let mut stores: Vec<Arc<Self>> = Vec::new();
        for view in views.iter().filter(|view| !view.counted_here()) {
            let Some(inherited) = view.inherited() else { continue };
            let store = Self::open(&view.place().directory, &view.place().namespace)?;
            if store.hold_inherited(view, inherited) && !stores.iter().any(|known| Arc::ptr_eq(known, &store)) {
                stores.push(store);
            }
        }
        stores.iter().try_for_each(|store| store.lease_inherited())
    }

    /// False where its descriptor did not come along.
    fn hold_inherited(&self, view: &Arc<View>, inherited: &Holding) -> bool {
        let mut holdings = self.holdings.lock();
        if let Some(held) = holdings.get_mut(&view.uuid()) {
            held.views += 1;
        } else {
            let Some(fd) = view.inherited_fd() else { return false };
            let held = Held {
                fd: Arc::new(SegmentFd::new(fd, object_id(&inherited.content.facts))),
                key: inherited.key.clone(),
                published: Some((inherited.content.clone(), LeaseId::NONE)),
                views: 1,
                // For what is built from now on there will be a new one: this one may show what the parent wrote in place.
                view: std::sync::Weak::new(),
            };
            holdings.insert(view.uuid(), held);
        }
        view.count_here();
        true
    }

    /// All at once, as this process enters the table: entering sweeps, and the parent may be dead already.
    fn lease_inherited(&self) -> Result<()> {
        process::current().keep_house();
        self.registry.transact(|_| Ok(()))?;
        for holding in self.holdings.without_lease() {
            let lease = self.registry.transact(|session| session.restore(&holding))?;
            self.holdings.restored(holding.content.facts.uuid, lease);
        }
        Ok(())
    }

    /// Where the registry does not answer now, the housekeeping thread tries again.
    fn release(&self, lease: LeaseId) {
        if self.try_release(lease).is_err() {
            process::current().release_later(&self.place, lease);
        }
    }

    fn try_release(&self, lease: LeaseId) -> Result<()> {
        self.registry.transact(|session| session.release(lease))
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
        verb("let go");
        if let Some((_, lease)) = held.published {
            self.release(lease);
        }
        drop(held.fd);
        reached("closed");
    }

    fn collapse_step(&self, uuid: [u8; 16], huge: Huge, from: usize) -> Option<usize> {
        let (fd, bytes) = {
            let holdings = self.holdings.lock();
            let held = holdings.get(&uuid)?;
            (held.fd.clone(), held.fd.id.bytes)
        };
        huge::collapse_step(&fd, bytes as usize, huge, from)
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
}

/// A named segment whose name is there.
fn leads_to(directory: &Directory, prefix: &str, facts: &SegmentFacts) -> bool {
    object::open_named(directory, &(prefix.to_owned() + &hex(&facts.uuid)), object_id(facts)).is_ok()
}

fn object_id(facts: &SegmentFacts) -> ObjectId {
    ObjectId { device: facts.device, inode: facts.inode, bytes: facts.bytes }
}

fn check_key(key: &Key) -> Result<()> {
    let tag = &key.tag;
    if tag.is_empty() || tag.len() > MAX_NAME || tag.contains('\0') {
        let length = tag.len();
        let remedy = if length > MAX_NAME { ". Put a long path into `version`" } else { "" };
        return Err(Error::BadName(format!(
            "tag of {length} bytes: 1 to {MAX_NAME} bytes of UTF-8 without NUL are allowed{remedy}"
        )));
    }
    Ok(())
}
