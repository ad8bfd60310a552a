//! A mapping of a segment that somebody uses: the owner at the end of every array's base chain.

use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

use rustix::mm::Advice;

use super::process;
use crate::registry::request::Holding;
use crate::sys::mapping::{Ahead, Mapping};
use crate::sys::{fork, object};

/// Where a store lives: its directory and namespace.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Place {
    pub directory: std::path::PathBuf,
    pub namespace: String,
}

/// Dropped anywhere, by garbage collection inside our own call or by a C++ thread: it takes no lock and waits for
/// nothing, the housekeeping thread unmaps and gives the lease back.
#[derive(Debug)]
pub struct View {
    mapping: Option<Mapping>,
    uuid: [u8; 16],
    place: Arc<Place>,
    /// What a forked child must know to take a lease of its own; set once the segment is known to be published. Read
    /// there without a lock: the parent's may be held for ever.
    inherited: OnceLock<Holding>,
    /// The fork generation of the process that counts this view.
    counted_in: AtomicU64,
}

/// What is left of a dropped view, on its way to the housekeeping thread.
#[derive(Debug)]
pub struct Retired {
    pub mapping: Mapping,
    pub uuid: [u8; 16],
    pub place: Arc<Place>,
    /// False for a view that a forked child inherited and did not adopt.
    pub counted: bool,
}

impl View {
    pub(super) fn new(mapping: Mapping, uuid: [u8; 16], place: Arc<Place>) -> Self {
        Self {
            mapping: Some(mapping),
            uuid,
            place,
            inherited: OnceLock::new(),
            counted_in: AtomicU64::new(fork::generation()),
        }
    }

    pub fn uuid(&self) -> [u8; 16] {
        self.uuid
    }

    pub fn place(&self) -> &Place {
        &self.place
    }

    pub(super) fn count_here(&self) {
        self.counted_in.store(fork::generation(), Ordering::Relaxed);
    }

    pub(super) fn counted_here(&self) -> bool {
        self.counted_in.load(Ordering::Relaxed) == fork::generation()
    }

    pub(super) fn inherits(&self, what: Holding) {
        let _ = self.inherited.set(what);
    }

    pub(super) fn inherited(&self) -> Option<&Holding> {
        self.inherited.get()
    }

    /// In a forked child: the parent's descriptor of the segment, if it came along.
    pub(super) fn inherited_fd(&self) -> Option<OwnedFd> {
        let Holding { fd, content, .. } = self.inherited.get().filter(|_| !self.counted_here())?;
        object::take_inherited(*fd, super::object_id(&content.facts))
    }

    /// Start of the mapping, and the bytes of the object.
    pub fn span(&self) -> (usize, usize) {
        self.mapping.as_ref().map_or((0, 0), |mapping| (mapping.address(), mapping.bytes()))
    }

    /// Maps the object's pages ahead of use, in the housekeeping thread: until it is done or nobody has the view any more.
    pub fn prefault(self: &Arc<Self>) {
        let (address, bytes) = self.span();
        process::current().prefault(Arc::downgrade(self), Ahead::new(address, bytes));
    }
}

impl Drop for View {
    fn drop(&mut self) {
        if let Some(mapping) = self.mapping.take() {
            // A child forked before it is unmapped would have it for ever: this process's thread does not exist there.
            let _ = mapping.advise_all(Advice::LinuxDontFork);
            let (uuid, place, counted) = (self.uuid, self.place.clone(), self.counted_here());
            process::current().retire(Retired { mapping, uuid, place, counted });
        }
    }
}
