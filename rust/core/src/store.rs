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
use std::os::fd::AsRawFd;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

pub use acquire::{Ask, Attached, Step};
use held::{Held, Holdings};
pub use patience::Patience;
pub use process::{Process, current};
pub use publish::{Announced, Outcome, Publishing};
pub use view::{Place, View};

use crate::layout::registry::{segment_name, segment_prefix};
use crate::registry::request::{Ended, Holding, LeaseId, Listed, Ticket};
use crate::registry::{self, Registry, SweepReport};
use crate::segment::reader;
use crate::sys::directory::Directory;
use crate::sys::fork;
use crate::sys::mapping::Mapping;
use crate::sys::object::{self, ObjectId, SegmentFd};
use crate::words::{Backend, Key, SegmentFacts};
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
        Ok(self.registry.visit(false, |session| session.list())?.unwrap_or_default())
    }

    /// Removes what only the dead hold, and named segments that no table knows (the registry's file was removed by hand) and
    /// nobody has open. `dry_run`: only tells.
    pub fn sweep(&self, dry_run: bool) -> Result<Swept> {
        let prefix = segment_prefix(self.registry.uid(), &self.place.namespace);
        let found = object::list_named(&self.directory, &prefix)?;
        let orphans = |known: &HashSet<[u8; 16]>| {
            found
                .iter()
                .filter(|name| !known.iter().any(|uuid| self.segment_name(uuid) == **name))
                .filter_map(|name| {
                    object::remove_unused(&self.directory, name, dry_run).map(|bytes| (name.clone(), bytes))
                })
                .collect()
        };
        let swept = self.registry.visit(!dry_run, |session| {
            let report = session.sweep(dry_run)?;
            // Looked at after the directory: a segment's row is older than its name. Under the lock nobody opens by name.
            let orphans = orphans(&session.segments()?);
            Ok(Swept { report, orphans })
        })?;
        Ok(swept.unwrap_or_else(|| Swept { report: SweepReport::default(), orphans: orphans(&HashSet::new()) }))
    }

    /// What dead processes left goes, if nobody has looked in this half second; false where somebody has.
    fn sweep_if_due(&self) -> Result<bool> {
        let swept = self.registry.visit(true, |session| {
            let due = session.sweep_is_due();
            if due {
                session.sweep(false)?;
            }
            Ok(due)
        })?;
        Ok(swept.unwrap_or(true))
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
            (held.fd.clone(), held.published.as_ref().ok_or_else(missing)?.0.facts)
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
        let holding = Holding { fd: fd.as_raw_fd(), ..inherited.clone() };
        let lease = store.registry.transact(|session| session.restore(&holding))?;
        let held = Held {
            fd: Arc::new(SegmentFd::new(fd, object_id(&holding.content.facts))),
            key: holding.key,
            published: Some((holding.content, lease)),
            views: 1,
            // For what is built from now on there will be a new one: this one may show what the parent wrote in place.
            view: std::sync::Weak::new(),
        };
        store.holdings.lock().insert(view.uuid(), held);
        view.count_here();
        process::current().keep_house();
        Ok(true)
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
}

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
