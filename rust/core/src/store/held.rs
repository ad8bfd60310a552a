//! What this process has open of one store: descriptor, lease and views of each segment.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use super::view::View;
use crate::registry::request::{Holding, LeaseId};
use crate::sys::object::SegmentFd;
use crate::words::{Content, Key};

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
        Some(Holding { key: self.key.clone(), content: content.clone(), fd: self.fd.number() })
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
        // With a closed descriptor nobody could attach through us.
        self.lock().values().filter(|held| held.fd.open()).filter_map(Held::holding).collect()
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
