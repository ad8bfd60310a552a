//! What this process has open of one store: descriptor, lease and views of each segment.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use super::view::{Inherited, View};
use crate::registry::request::{Constructor, Holding, Key, LeaseId, SegmentFacts};
use crate::sys::object::SegmentFd;

#[derive(Debug)]
pub struct Held {
    pub fd: Arc<SegmentFd>,
    pub key: Key,
    pub constructor: Constructor,
    pub generation: u64,
    pub pinned: bool,
    pub shared_bytes: u64,
    /// None until READY, and for a segment that was never published.
    pub published: Option<(SegmentFacts, LeaseId)>,
    /// Mappings of it in this process; the last one to go takes the lease along.
    pub views: usize,
    /// The view to build over again; the others are the publisher's, from filling.
    pub view: Weak<View>,
}

impl Held {
    pub(super) fn inherited(&self, facts: SegmentFacts) -> Inherited {
        Inherited {
            facts,
            fd: self.fd.number(),
            key: self.key.clone(),
            constructor: self.constructor.clone(),
            generation: self.generation,
            shared_bytes: self.shared_bytes,
        }
    }

    fn holding(&self) -> Option<Holding> {
        let (facts, _) = self.published?;
        // With a closed descriptor nobody could attach through us.
        let fd = if self.fd.open() { self.fd.number() } else { return None };
        Some(Holding {
            key: self.key.clone(),
            constructor: self.constructor.clone(),
            generation: self.generation,
            pinned: self.pinned,
            facts,
            shared_bytes: self.shared_bytes,
            fd,
        })
    }
}

/// Shared with the registry, which asks for the holdings when it has to enter a new file.
#[derive(Clone, Debug, Default)]
pub struct Holdings(Arc<Mutex<HashMap<[u8; 16], Held>>>);

impl Holdings {
    /// Lock order: the registry's lock may be held while this one is taken, never the other way round.
    pub fn lock(&self) -> MutexGuard<'_, HashMap<[u8; 16], Held>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn all(&self) -> Vec<Holding> {
        self.lock().values().filter_map(Held::holding).collect()
    }

    /// The lease of a segment got a new row: the registry's file is a new one, or we are a new process in it.
    pub fn restored(&self, uuid: [u8; 16], lease: LeaseId) {
        if let Some(held) = self.lock().get_mut(&uuid)
            && let Some((_, old)) = &mut held.published
        {
            *old = lease;
        }
    }
}
