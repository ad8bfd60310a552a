//! What the registry's tests share: a directory of their own in /dev/shm, and a process that plays a store without
//! segments (its objects are empty files, its descriptors are numbers).
#![allow(dead_code)] // each test uses its part

use std::collections::BTreeSet;
use std::fs::{self, File, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{SystemTime, UNIX_EPOCH};

use onecopy_core::layout::registry::{file_name, segment_name};
use onecopy_core::registry::request::{
    AcquireRequest, Acquired, Ended, Holding, LeaseId, PublishRequest, Published, Ticket,
};
use onecopy_core::registry::{Census, Registry, Session};
use onecopy_core::sys::directory::Directory;
use onecopy_core::words::{Backend, Constructor, Content, Key, SegmentFacts};
use onecopy_core::{Error, Result};

pub const NAMESPACE: &str = "test";

/// A private directory, gone with the test.
pub struct Room {
    pub path: PathBuf,
}

impl Room {
    pub fn new() -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        // A directory's descriptor is kept as long as its process, and tests have many rooms.
        let limit = rustix::process::getrlimit(rustix::process::Resource::Nofile);
        let most = rustix::process::Rlimit { current: limit.maximum, ..limit };
        rustix::process::setrlimit(rustix::process::Resource::Nofile, most).unwrap();
        let name = format!("onecopy-test-{}-{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
        let path = Path::new("/dev/shm").join(name);
        fs::create_dir(&path).unwrap();
        fs::set_permissions(&path, Permissions::from_mode(0o700)).unwrap();
        Self { path }
    }

    pub fn registry(&self) -> PathBuf {
        self.path.join(file_name(rustix::process::geteuid().as_raw(), NAMESPACE))
    }

    /// Everything in it but the registry.
    pub fn objects(&self) -> BTreeSet<PathBuf> {
        let registry = self.registry();
        fs::read_dir(&self.path).unwrap().map(|entry| entry.unwrap().path()).filter(|path| *path != registry).collect()
    }

    pub fn object(&self, uuid: &[u8; 16]) -> PathBuf {
        self.path.join(segment_name(rustix::process::geteuid().as_raw(), NAMESPACE, uuid))
    }
}

impl Drop for Room {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.path);
    }
}

/// A process's registry, used as a store would.
pub struct Actor {
    pub registry: Registry,
    room: PathBuf,
}

pub fn key(tag: &str) -> Key {
    Key { tag: tag.to_owned(), version: "1".to_owned(), compatibility: "test".to_owned() }
}

pub fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_nanos().try_into().unwrap()
}

pub fn random_uuid() -> [u8; 16] {
    let mut uuid = [0; 16];
    rustix::rand::getrandom(&mut uuid, rustix::rand::GetRandomFlags::empty()).unwrap();
    uuid
}

pub fn facts(uuid: [u8; 16], backend: Backend) -> SegmentFacts {
    SegmentFacts { uuid, backend, bytes: 4096, device: 1, inode: 2 }
}

impl Actor {
    pub fn new(room: &Path) -> Self {
        Self::holding(room, Vec::new())
    }

    /// One that brings these along when it has to enter a table anew.
    pub fn holding(room: &Path, holdings: Vec<Holding>) -> Self {
        let directory = Arc::new(Directory::open(room).unwrap());
        let registry =
            Registry::open(directory, NAMESPACE, Box::new(move || holdings.clone()), Box::new(|_, _| ())).unwrap();
        Self { registry, room: room.to_owned() }
    }

    pub fn transact<R>(&self, work: impl FnOnce(&mut Session<'_>) -> Result<R>) -> R {
        self.registry.transact(work).unwrap()
    }

    pub fn acquire(&self, tag: &str) -> Acquired {
        self.acquire_after(tag, None)
    }

    pub fn acquire_after(&self, tag: &str, waited: Option<u64>) -> Acquired {
        self.transact(|session| session.acquire(&ask(session, tag, waited)))
    }

    /// Acquires and, where it is READY, takes a lease in the same transaction.
    pub fn attach(&self, tag: &str) -> Option<LeaseId> {
        self.transact(|session| match session.acquire(&ask(session, tag, None))? {
            Acquired::Attach { segment, .. } => session.take_lease(segment, 7).map(Some),
            _ => Ok(None),
        })
    }

    pub fn load(&self, tag: &str) -> Ticket {
        match self.acquire(tag) {
            Acquired::Load { ticket, .. } => ticket,
            other => panic!("expected to load {tag}: {other:?}"),
        }
    }

    /// Reserves, and makes the object where it has a name.
    pub fn reserve(&self, tag: &str, backend: Backend) -> (u32, SegmentFacts) {
        let facts = facts(random_uuid(), backend);
        let row = self.transact(|session| session.reserve(&key(tag), facts.uuid, backend, facts.bytes));
        self.make(&facts);
        (row, facts)
    }

    pub fn make(&self, facts: &SegmentFacts) {
        if facts.backend == Backend::Posix {
            let name = segment_name(rustix::process::geteuid().as_raw(), NAMESPACE, &facts.uuid);
            File::create_new(self.room.join(name)).unwrap();
        }
    }

    pub fn publish(&self, tag: &str, ticket: Option<Ticket>, segment: u32, facts: SegmentFacts) -> Published {
        self.publish_as(tag, ticket, segment, facts, false, false)
    }

    pub fn publish_as(
        &self,
        tag: &str,
        ticket: Option<Ticket>,
        segment: u32,
        facts: SegmentFacts,
        replace: bool,
        pin: bool,
    ) -> Published {
        self.transact(|session| {
            session.publish(&PublishRequest {
                me: session.me(),
                key: key(tag),
                segment,
                content: Content { since: now(), pinned: pin, ..content(facts) },
                ticket,
                replace,
                fd: if facts.backend == Backend::Memfd { 7 } else { -1 },
            })
        })
    }

    /// Loads and publishes.
    pub fn provide(&self, tag: &str, backend: Backend) -> LeaseId {
        let ticket = self.load(tag);
        let (row, facts) = self.reserve(tag, backend);
        lease(self.publish(tag, Some(ticket), row, facts))
    }

    pub fn release(&self, lease: LeaseId) {
        self.transact(|session| session.release(lease));
    }

    pub fn fail(&self, ticket: Ticket, reason: &str) {
        self.transact(|session| session.end_loading(ticket, Ended::Failed { reason: reason.to_owned() }, None));
    }

    pub fn check(&self) -> Census {
        self.transact(|session| session.check())
    }

    /// The tables hold together, nothing of the dead is left, and every named object has its row.
    pub fn check_swept(&self, room: &Room) -> Census {
        self.transact(|session| session.sweep(false));
        let census = self.check();
        let named: BTreeSet<PathBuf> = self
            .transact(|session| session.list())
            .iter()
            .filter_map(|row| row.segment)
            .filter(|facts| facts.backend == Backend::Posix)
            .map(|facts| room.object(&facts.uuid))
            .collect();
        let strays: Vec<_> = room.objects().difference(&named).cloned().collect();
        assert!(strays.is_empty(), "objects without a row: {strays:?}");
        census
    }
}

pub fn ask(session: &Session<'_>, tag: &str, waited: Option<u64>) -> AcquireRequest {
    AcquireRequest {
        me: session.me(),
        key: key(tag),
        constructor: constructor(),
        now: now(),
        oom_kills: 0,
        waited,
        may_load: true,
        skip: 0,
    }
}

pub fn content(facts: SegmentFacts) -> Content {
    Content { facts, shared_bytes: 4096, generation: 0, since: 1, pinned: false, constructor: constructor() }
}

pub fn constructor() -> Constructor {
    Constructor { name: "test.load".to_owned(), code_hash: 1 }
}

pub fn lease(published: Published) -> LeaseId {
    match published {
        Published::Ready { lease, .. } => lease,
        other => panic!("expected READY: {other:?}"),
    }
}

pub fn is_corrupt(error: &Error) -> bool {
    matches!(error, Error::Corrupt { .. })
}
