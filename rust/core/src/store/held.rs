//! What this process has open of one store: descriptor, lease and views of each segment.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use super::view::View;
use crate::registry::request::{Holding, LeaseId};
use crate::sys::object::SegmentFd;
use crate::words::{Backend, Content, Key, SegmentFacts};

#[derive(Debug)]
pub struct Held {
    pub fd: Arc<SegmentFd>,
    pub key: Key,
    /// None until READY, and for a segment that was never published.
    pub published: Option<(Content, LeaseId)>,
    /// Mappings of it in this process; the last one to go takes the lease along.
    pub views: usize,
    /// The view to build over again; the others are the publisher's, from filling.
    pub view: Weak<View>,
}

impl Held {
    /// What another process, or another table, must know of it. `None` where it is not published.
    pub(super) fn holding(&self) -> Option<Holding> {
        let (content, _) = self.published.as_ref()?;
        Some(Holding { key: self.key.clone(), content: content.clone(), fd: self.fd.number(), named: true })
    }

    /// The same; `None` with a closed descriptor, too, through which nobody could attach. A named one needs none.
    fn offered(&self) -> Option<Holding> {
        self.holding().filter(|holding| holding.content.facts.backend == Backend::Posix || self.fd.open())
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

    /// `reachable`: others could open it.
    pub fn all(&self, reachable: impl Fn(&SegmentFacts) -> bool) -> Vec<Holding> {
        let mut all: Vec<_> = self.lock().values().filter_map(Held::offered).collect();
        all.iter_mut().for_each(|holding| holding.named = reachable(&holding.content.facts));
        all
    }

    /// Whether there is anything that others could want.
    pub fn any(&self) -> bool {
        self.lock().values().any(|held| held.published.is_some())
    }

    /// Those that this process inherited and has no lease for yet.
    pub fn without_lease(&self) -> Vec<Holding> {
        let waits = |held: &&Held| matches!(held.published, Some((_, LeaseId::NONE)));
        self.lock().values().filter(waits).filter_map(Held::offered).collect()
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
