//! Publishing: announce > fill > seal > look at it > publish.

use std::sync::{Arc, Weak};

use rustix::io::Errno;

use super::held::Held;
use super::process;
use super::{Ask, Attached, Store, check_key};
use crate::registry::now;
use crate::registry::request::{PublishRequest, Published, Ticket};
use crate::segment::writer::{Filling, Outline, Sealed};
use crate::store::View;
use crate::sys::failpoint::{reached, verb};
use crate::sys::huge;
use crate::sys::memory::Victim;
use crate::sys::object::{self, SegmentFd};
use crate::sys::room;
use crate::words::{Backend, Content, Huge, Key, SegmentFacts};
use crate::{Error, Result};

/// Where room is tighter than this beyond the need, the filler offers itself to the OOM killer.
const TIGHT: u64 = 512 << 20;
const REMEDY: &str = "Free memory, raise the limit, or use a smaller model";

/// What is to be published, and how.
#[derive(Clone, Debug)]
pub struct Announced {
    pub skeleton: Vec<u8>,
    /// (offset from the start of the data area, bytes), in order.
    pub buffers: Vec<(u64, u64)>,
    pub data_bytes: u64,
    /// Most that is written and not yet freed at any moment of the fill, in bytes.
    pub excess: u64,
    /// None: memfd, posix for pinned models, where other PID namespaces share the directory, and where there is no /proc;
    /// and the other one for lack of room.
    pub backend: Option<Backend>,
    pub huge: Huge,
    pub pin: bool,
    pub replace: bool,
    /// The loader's ticket; None for the verb `publish`.
    pub ticket: Option<Ticket>,
}

/// What became of it.
#[derive(Debug)]
pub enum Outcome {
    Ready {
        generation: u64,
    },
    /// The tag was replaced while we loaded: attach to what is there now.
    Superseded,
}

/// A segment on its way. Dropped before `publish`, its row and its name go; views of it stay usable.
#[derive(Debug)]
pub struct Publishing {
    store: Arc<Store>,
    ask: Ask,
    announced: Arc<Announced>,
    backend: Backend,
    row: u32,
    uuid: [u8; 16],
    stage: Stage,
    /// All that were made: a forked child that has one takes a lease for it.
    views: Vec<Weak<View>>,
    victim: Option<Victim>,
    /// In huge pages when it was sealed.
    huge_bytes: u64,
}

#[derive(Debug)]
enum Stage {
    Filling(Filling),
    Sealed(SegmentFacts),
    /// Neither of use nor published: dropped, its row and name go.
    Failed,
    Over,
}

impl Store {
    /// What can be said before an object is made or taken apart; publishing looks again.
    pub fn refuse(&self, key: &Key, backend: Option<Backend>, pin: bool, replace: bool) -> Result<()> {
        check_key(key)?;
        if pin && backend == Some(Backend::Memfd) {
            return Err(Error::BadName(
                "a pinned model outlives its holders, and no memfd does: backend=\"posix\" or \"auto\", not \"memfd\""
                    .into(),
            ));
        }
        if replace {
            return Ok(());
        }
        // What this process dropped just now is not there any more.
        process::current().catch_up();
        match self.registry.visit(false, |session| session.holder_of(key))?.flatten() {
            Some(holder) => Err(self.exists(key, &holder)),
            None => Ok(()),
        }
    }

    /// Looks whether the model fits, takes the room, and enters the segment's name into the table before it exists.
    pub fn announce(self: &Arc<Self>, ask: &Ask, announced: Announced) -> Result<Publishing> {
        check_key(&ask.key)?;
        verb("announce");
        if announced.ticket.is_none() {
            self.refuse(&ask.key, announced.backend, announced.pin, announced.replace)?;
        }
        let announced = Arc::new(announced);
        let outline = Outline::new(announced.skeleton.len() as u64, &announced.buffers, announced.data_bytes)?;
        let mut failed = None;
        for backend in self.backends(&announced)? {
            match self.reserve(ask, &announced, outline.clone(), backend) {
                Ok(publishing) => return Ok(publishing),
                // Whatever one backend fails of, the other may do. A lack of room is what can be told with figures and a
                // remedy; else the first one's words are the ones to tell.
                Err(error) => {
                    let no_room = |error: &Error| matches!(error, Error::NoRoom { .. });
                    if failed.as_ref().is_none_or(|first| no_room(&error) && !no_room(first)) {
                        failed = Some(error);
                    }
                }
            }
        }
        Err(failed.unwrap_or_else(|| Error::os("announce", "segment", Errno::INVAL)))
    }

    fn exists(&self, key: &Key, holder: &str) -> Error {
        Error::Exists { key: key.to_string(), namespace: self.place.namespace.clone(), holder: holder.to_owned() }
    }

    fn backends(&self, announced: &Announced) -> Result<Vec<Backend>> {
        Ok(match announced.backend {
            Some(backend) => vec![backend],
            None if announced.pin => vec![Backend::Posix],
            None if self.out_of_reach()? => vec![Backend::Posix, Backend::Memfd],
            None => vec![Backend::Memfd, Backend::Posix],
        })
    }

    /// Somebody could not reach a memfd: processes of other PID namespaces use this registry, or `/proc` is not ours.
    fn out_of_reach(&self) -> Result<bool> {
        let living = self.registry.transact(|session| session.living())?;
        let own = crate::sys::process::identity().pid_namespace;
        Ok(own == 0 || living.iter().any(|other| other.pid_namespace != own))
    }

    fn reserve(
        self: &Arc<Self>,
        ask: &Ask,
        announced: &Arc<Announced>,
        outline: Outline,
        backend: Backend,
    ) -> Result<Publishing> {
        let bytes = outline.total_bytes();
        let victim = self.check_room(announced, backend, bytes)?;
        let uuid = outline.uuid;
        let row = self.registry.transact(|session| session.reserve(&ask.key, uuid, backend, bytes))?;
        let name = self.segment_name(&uuid);
        let reserved = outline.reserve(backend, announced.huge, &self.directory, &name, &announced.skeleton);
        let filling = match reserved {
            // At the interpreter's end, while daemon threads work: our rows went before this name came.
            Ok(_) if self.registry.is_closed() => {
                object::remove_name(&self.directory, &name);
                return Err(Error::Refused("this process is about to exit".into()));
            }
            Ok(filling) => filling,
            Err(error) => {
                self.discard(row);
                return Err(self.no_room(error, backend, bytes));
            }
        };
        let fd = match filling.fd().try_clone() {
            Ok(fd) => fd,
            Err(error) => {
                self.discard(row);
                return Err(Error::os("dup", &name, error));
            }
        };
        reached("made");
        let held = Held {
            fd: Arc::new(SegmentFd::new(fd, filling.id())),
            key: ask.key.clone(),
            published: None,
            // Ours, until `Publishing` is dropped: the descriptor must not go with the first view.
            views: 1,
            view: Weak::new(),
        };
        self.holdings.lock().insert(uuid, held);
        Ok(Publishing {
            store: self.clone(),
            ask: ask.clone(),
            announced: announced.clone(),
            backend,
            row,
            uuid,
            stage: Stage::Filling(filling),
            views: Vec::new(),
            victim,
            huge_bytes: 0,
        })
    }

    /// What does not fit is refused here, with figures: inside a memory cgroup the kernel would kill instead of failing.
    fn check_room(&self, announced: &Announced, backend: Backend, bytes: u64) -> Result<Option<Victim>> {
        let (place, remedy) = (self.room_of(backend), REMEDY);
        if let Some(limit) = room::file_size_limit()
            && bytes > limit
        {
            let remedy = "Raise it: ulimit -f unlimited";
            return Err(Error::NoRoom { need: bytes, free: limit, place, limit: "RLIMIT_FSIZE".into(), remedy });
        }
        let file_system = room::file_system(&self.directory);
        if backend == Backend::Posix && bytes > file_system.free {
            return Err(Error::NoRoom { need: bytes, free: file_system.free, place, limit: file_system.limit, remedy });
        }
        let memory = room::memory();
        let need = announced.excess + announced.skeleton.len() as u64;
        if need > memory.free {
            return Err(Error::NoRoom { need, free: memory.free, place, limit: memory.limit, remedy });
        }
        let tight = memory.cgroup && memory.free - need < TIGHT;
        Ok(if tight || room::limits_may_be_hidden() { Victim::offer() } else { None })
    }

    fn no_room(&self, error: Error, backend: Backend, need: u64) -> Error {
        let full = matches!(&error, Error::Os { source, .. } if matches!(
            source.raw_os_error(),
            Some(libc::ENOSPC | libc::ENOMEM | libc::EFBIG | libc::EDQUOT)
        ));
        if !full {
            return error;
        }
        let room = if backend == Backend::Posix { room::file_system(&self.directory) } else { room::memory() };
        Error::NoRoom {
            need,
            free: room.free,
            place: self.room_of(backend),
            limit: format!("{}; {error}", room.limit),
            remedy: REMEDY,
        }
    }

    /// Where a segment's memory is, for messages.
    fn room_of(&self, backend: Backend) -> String {
        match backend {
            Backend::Memfd => "memory (memfd)".to_owned(),
            Backend::Posix => self.directory.path().display().to_string(),
        }
    }

    /// Where the registry does not answer now, the housekeeping thread tries again.
    fn discard(self: &Arc<Self>, row: u32) {
        if self.try_discard(row).is_err() {
            process::current().discard_later(self.clone(), row);
        }
    }

    pub(super) fn try_discard(&self, row: u32) -> Result<()> {
        self.registry.transact(|session| session.discard(row))
    }
}

impl Publishing {
    /// Copies the next buffer; its offset from the start of the object.
    pub fn fill(&mut self, source: &[u8]) -> Result<u64> {
        let need = self.announced.data_bytes;
        match &mut self.stage {
            Stage::Filling(filling) => {
                verb("fill");
                let filled = filling.fill(source).map_err(|error| self.store.no_room(error, self.backend, need));
                reached("filled");
                filled
            }
            _ => Err(Error::Unshareable("the segment is sealed".into())),
        }
    }

    pub fn data_offset(&self) -> u64 {
        match &self.stage {
            Stage::Filling(filling) => filling.data_offset(),
            _ => 0,
        }
    }

    pub fn backend(&self) -> Backend {
        self.backend
    }

    /// A view of the segment as it is: what was filled can be read through it already.
    pub fn view(&mut self) -> Result<Arc<View>> {
        let (fd, bytes) = {
            let mut holdings = self.store.holdings.lock();
            let held = holdings.get_mut(&self.uuid).ok_or_else(|| Error::os("view", "segment", Errno::BADF))?;
            held.views += 1;
            (held.fd.clone(), held.fd.id.bytes)
        };
        let view = self.store.map_counted(&fd, self.uuid, bytes)?;
        self.views.push(Arc::downgrade(&view));
        Ok(view)
    }

    /// No write from here on.
    pub fn seal(&mut self) -> Result<()> {
        match std::mem::replace(&mut self.stage, Stage::Failed) {
            Stage::Filling(filling) => {
                verb("seal");
                let need = self.announced.data_bytes;
                let sealed = filling.seal().map_err(|error| self.store.no_room(error, self.backend, need));
                let Sealed { facts, huge_bytes, .. } = sealed?;
                self.huge_bytes = huge_bytes;
                reached("sealed");
                self.stage = Stage::Sealed(facts);
                Ok(())
            }
            other => {
                self.stage = other;
                Ok(())
            }
        }
    }

    /// The sealed segment as an attacher would see it, over a fresh mapping: what cannot be rebuilt is not published.
    pub fn inspect(&mut self) -> Result<Attached> {
        let Stage::Sealed(facts) = self.stage else {
            return Err(Error::Unshareable("the segment is not sealed".into()));
        };
        verb("inspect");
        let view = self.view()?;
        let fd = self.store.holdings.lock().get(&self.uuid).map(|held| held.fd.clone());
        let fd = fd.ok_or_else(|| Error::os("inspect", "segment", Errno::BADF))?;
        let contents = crate::segment::reader::read(&fd, &facts, &self.store.shown(&facts))?;
        if let Some(held) = self.store.holdings.lock().get_mut(&self.uuid) {
            held.view = Arc::downgrade(&view);
        }
        Ok(Attached {
            view,
            skeleton: contents.skeleton,
            data_offset: contents.data_offset,
            huge_bytes: contents.huge_bytes,
            content: self.content(facts, 0),
        })
    }

    fn content(&self, facts: SegmentFacts, since: u64) -> Content {
        Content {
            facts,
            shared_bytes: self.announced.data_bytes,
            generation: 0,
            since,
            pinned: self.announced.pin,
            constructor: self.ask.constructor.clone(),
        }
    }

    /// READY: from here on others attach, and this process holds a lease.
    pub fn publish(&mut self) -> Result<Outcome> {
        let Stage::Sealed(facts) = self.stage else {
            return Err(Error::Unshareable("the segment is not sealed".into()));
        };
        verb("publish");
        let fd = self.store.holdings.lock().get(&self.uuid).map(|held| held.fd.number());
        let fd = fd.ok_or_else(|| Error::os("publish", "segment", Errno::BADF))?;
        let (published, content) = self.store.registry.transact(|session| {
            let request = PublishRequest {
                me: session.me(),
                key: self.ask.key.clone(),
                segment: self.row,
                // Under the lock: what others wrote before is in the past.
                content: self.content(facts, now()),
                ticket: self.announced.ticket,
                replace: self.announced.replace,
                fd,
            };
            Ok((session.publish(&request)?, request.content))
        })?;
        match published {
            Published::Ready { generation, lease } => {
                self.stage = Stage::Over;
                let content = Content { generation, ..content };
                if let Some(held) = self.store.holdings.lock().get_mut(&self.uuid) {
                    held.published = Some((content, lease));
                    for view in self.views.iter().filter_map(Weak::upgrade) {
                        held.holding().into_iter().for_each(|holding| view.inherits(holding));
                    }
                }
                reached("held");
                let huge = self.announced.huge;
                if self.huge_bytes < huge::eligible(facts.bytes as usize, huge) as u64 {
                    process::current().collapse(self.store.clone(), self.uuid, huge);
                }
                process::current().sweep_soon(&self.store);
                Ok(Outcome::Ready { generation })
            }
            Published::Superseded => Ok(Outcome::Superseded),
            Published::Exists { holder, loading, .. } => {
                let who = holder.map_or("nobody living".into(), |who| format!("process {} ({})", who.pid, who.name));
                Err(self.store.exists(
                    &self.ask.key,
                    &if loading { format!("{who} is loading it") } else { format!("{who} has it") },
                ))
            }
        }
    }
}

impl Drop for Publishing {
    fn drop(&mut self) {
        if !self.store.is_ours() {
            // A forked child lets go of its parent's publication: there is nothing here to undo.
            std::mem::forget(self.victim.take());
            return;
        }
        if !matches!(self.stage, Stage::Over) {
            self.store.discard(self.row);
        }
        drop(self.victim.take());
        self.store.view_gone(self.uuid);
    }
}
