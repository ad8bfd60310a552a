//! acquire: ask the registry, and open what it names.

use std::collections::hash_map::Entry;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::{Arc, Weak};

use rustix::io::Errno;

use super::held::Held;
use super::process;
use super::view::View;
use super::{Store, check_key, object_id};
use crate::registry::request::{AcquireRequest, Acquired, Holder, LeaseId, Ticket};
use crate::registry::{Session, now};
use crate::segment::reader::{self, Contents};
use crate::sys::failpoint::{reached, verb};
use crate::sys::object::{self, Missing, SegmentFd};
use crate::sys::room;
use crate::words::{Backend, Constructor, Content, Identity, Key, SegmentFacts};
use crate::{Error, Result};

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
    /// In huge pages when it was published.
    pub huge_bytes: u64,
    pub content: Content,
}

/// More rounds than any honest table needs; a hostile one ends here.
const MAX_CANDIDATES: usize = 2048;

impl Store {
    /// Asks once. `waited`: the episode in which the caller began to wait.
    pub fn acquire(self: &Arc<Self>, ask: &Ask, waited: Option<u64>) -> Result<Step> {
        check_key(&ask.key)?;
        verb("acquire");
        process::current().catch_up();
        let found = self.registry.transact(|session| {
            let mut request = AcquireRequest {
                me: session.me(),
                key: ask.key.clone(),
                constructor: ask.constructor.clone(),
                // Under the lock: what others wrote before is in the past.
                now: now(),
                // The same: a kill is counted before its victim is seen to be dead.
                oom_kills: room::oom_kills(),
                waited,
                may_load: ask.may_load,
                skip: 0,
            };
            let mut refused = None;
            // A holder or a named object that proves gone is dropped from the table, and the question asked again.
            for _ in 0..MAX_CANDIDATES {
                let answer = session.acquire(&request)?;
                let Acquired::Attach { segment, content, holders, foreign } = answer else {
                    return Ok(Found::Answer(answer));
                };
                match self.stage(&content.facts) {
                    Own::Held => return Ok(Found::Own(content.facts.uuid)),
                    // Another thread of ours has said READY, and is about to note its lease.
                    Own::Publishing => return Ok(Found::Dying),
                    Own::Nothing => {}
                }
                match self.open_segment(session, segment, &content.facts, &holders)? {
                    Opened::Fd(fd) => {
                        reached("opened");
                        let lease = session.take_lease(segment, fd.as_raw_fd())?;
                        return Ok(Found::Segment { fd, lease, content });
                    }
                    Opened::LookAgain => {}
                    Opened::Dying => return Ok(Found::Dying),
                    // The others may be open to us.
                    Opened::Refused(why) => {
                        refused = Some(why);
                        request.skip += holders.len();
                        if holders.is_empty() || content.facts.backend == Backend::Posix {
                            break;
                        }
                    }
                    _ if refused.is_some() => break,
                    Opened::OnlyForeign if foreign => {
                        let why = match crate::sys::process::identity().pid_namespace {
                            0 => "its holders cannot be reached: /proc is not mounted here; backend=\"posix\" does without",
                            _ => "its holders live in other PID namespaces; backend=\"posix\" reaches across",
                        };
                        refused = Some(why.into());
                        break;
                    }
                    Opened::OnlyForeign => {}
                }
            }
            let why = refused.unwrap_or_else(|| "none of its holders could be opened".into());
            Ok(Found::Refused(why))
        })?;
        let step = self.answer(ask, found);
        process::current().sweep_soon(self);
        step
    }

    fn answer(&self, ask: &Ask, found: Found) -> Result<Step> {
        Ok(match found {
            Found::Segment { fd, lease, content } => {
                let uuid = content.facts.uuid;
                verb("attach");
                self.hold(ask, fd, lease, content);
                reached("held");
                self.view(uuid)?
            }
            Found::Own(uuid) => self.view(uuid)?,
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
                reason: format!("it could not be loaded twice elsewhere: {reason}"),
                unshareable: false,
            },
            Found::Answer(Acquired::OutOfMemory { deaths, need }) => return Err(self.killed(&ask.key, deaths, need)),
            Found::Answer(Acquired::NotFound | Acquired::Attach { .. }) => return Err(self.not_found(&ask.key)),
        })
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
                Err(Missing::Refused(errno @ (Errno::MFILE | Errno::NFILE | Errno::NOMEM))) => {
                    let what = format!("/proc/{}/fd/{}", holder.identity.pid, holder.fd);
                    return Err(Error::os("open", what, errno));
                }
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
    fn hold(&self, ask: &Ask, fd: OwnedFd, lease: LeaseId, content: Content) {
        let fd = SegmentFd::new(fd, object_id(&content.facts));
        let spare = match self.holdings.lock().entry(content.facts.uuid) {
            Entry::Occupied(held)
                if held.get().published.is_some() && held.get().fd.number() != fd.number() && held.get().fd.open() =>
            {
                Some((lease, Arc::new(fd)))
            }
            Entry::Occupied(mut held) => {
                // Our descriptor was closed behind our back, and another holder gave us a new one: with the old number, maybe,
                // which seems to be open then.
                let held = held.get_mut();
                let number = fd.number();
                let closed = std::mem::replace(&mut held.fd, Arc::new(fd));
                if closed.number() == number
                    && let Some(closed) = Arc::into_inner(closed)
                {
                    closed.forget();
                }
                held.published.replace((content, lease)).map(|(_, before)| (before, held.fd.clone()))
            }
            Entry::Vacant(place) => {
                place.insert(Held {
                    fd: Arc::new(fd),
                    key: ask.key.clone(),
                    published: Some((content, lease)),
                    views: 0,
                    view: Weak::new(),
                });
                None
            }
        };
        let Some((lease, fd)) = spare else { return };
        self.release(lease);
        drop(fd);
    }

    /// A view of a segment that this process holds: the one that is there, or a new mapping. `Again` where the last view
    /// of it went just now, and the lease with it.
    fn view(&self, uuid: [u8; 16]) -> Result<Step> {
        let (view, fd, content) = {
            let mut holdings = self.holdings.lock();
            let Some(held) = holdings.get_mut(&uuid) else { return Ok(Step::Again) };
            let Some((content, _)) = held.published.clone() else { return Ok(Step::Again) };
            let view = held.view.upgrade();
            // Counted before it exists: the last view to go takes the lease along, and this one is on its way.
            if view.is_none() {
                held.views += 1;
            }
            (view, held.fd.clone(), content)
        };
        let view = match view {
            Some(view) => view,
            None => self.map_counted(&fd, uuid, content.facts.bytes)?,
        };
        reached("mapped");
        let contents = reader::read(&fd, &content.facts, &self.shown(&content.facts))?;
        if let Some(held) = self.holdings.lock().get_mut(&uuid) {
            held.view = Arc::downgrade(&view);
            held.holding().into_iter().for_each(|holding| view.inherits(holding));
        }
        reached("read");
        let Contents { skeleton, data_offset, huge_bytes } = contents;
        Ok(Step::Attached(Attached { view, skeleton, data_offset, huge_bytes, content }))
    }

    fn not_found(&self, key: &Key) -> Error {
        Error::NotFound { key: key.to_string(), namespace: self.place.namespace.clone(), place: self.registry.path() }
    }

    fn killed(&self, key: &Key, deaths: u32, need: u64) -> Error {
        let room = room::memory();
        let when = match need {
            0 => "in the constructor, before any was reserved".to_owned(),
            need => format!("{need} bytes were reserved"),
        };
        Error::OutOfMemory(format!(
            "{deaths} loaders of {key} in a row were killed for lack of memory ({when}; {} bytes are free: {}). A third is \
             not started for 10 minutes: raise the limit, or load a smaller model",
            room.free, room.limit
        ))
    }
}

enum Found {
    Answer(Acquired),
    Segment { fd: OwnedFd, lease: LeaseId, content: Content },
    Own([u8; 16]),
    Dying,
    Refused(String),
}

enum Own {
    Held,
    Publishing,
    Nothing,
}

enum Opened {
    Fd(OwnedFd),
    LookAgain,
    Dying,
    Refused(String),
    OnlyForeign,
}
