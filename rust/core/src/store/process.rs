//! What belongs to this process, and not to the one that forked it: its stores and its housekeeping thread.
//!
//! The thread unmaps, closes, leaves the table, times the linger and collapses: whatever takes long (freeing 3 GiB takes
//! 0.4 s) or needs a lock. It is started on first need, and again after a fork. What others give it goes through a
//! lock-free queue.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak};
use std::thread::{self, Thread};
use std::time::{Duration, Instant};

use crossbeam_queue::SegQueue;

use super::Store;
use super::publish::Publishing;
use super::view::{Place, Retired, View};
use crate::registry::request::{Ended, LeaseId, Ticket};
use crate::sys::fork;
use crate::sys::lock::prepare_for_forks;
use crate::sys::mapping::Ahead;
use crate::sys::memory::Victim;
use crate::sys::thread::yield_to_others;
use crate::words::Huge;

#[derive(Debug)]
pub struct Process {
    forks: u64,
    stores: Mutex<HashMap<Place, Arc<Store>>>,
    queue: SegQueue<Task>,
    lingering: Mutex<Vec<(Arc<View>, Option<Instant>)>>,
    starting: AtomicBool,
    thread: OnceLock<Thread>,
    child: OnceLock<Box<Process>>,
}

#[derive(Debug)]
enum Task {
    Unmap(Retired),
    /// Keep the view until then; None: for the rest of the process.
    Linger(Arc<View>, Option<Instant>),
    /// One step of mapping these pages. The thread keeps nothing of the view: in a child forked meanwhile that would stay.
    Prefault(Weak<View>, Ahead),
    /// One step of making its pages huge, from this offset on.
    Collapse(Arc<Store>, [u8; 16], Huge, usize),
    /// Lingering views of this segment end now: a newer one took its place.
    EndLinger([u8; 16]),
    /// A publication that was let go of unfinished.
    Abandon(Box<Publishing>),
    /// A loader that was let go of; if its entry knows the end already, this says nothing new.
    GiveUp(Arc<Store>, Ticket),
    Release(Arc<Store>, LeaseId),
    /// A row that was reserved in vain.
    Discard(Arc<Store>, u32),
    /// Others may have died.
    Sweep(Arc<Store>),
}

/// Between two tries where the registry does not answer.
const RETRY: Duration = Duration::from_secs(5);
/// Stores to be swept, when, and the sweep of somebody else's that was seen at the first look.
type Sweeps = Vec<(Arc<Store>, Instant, Option<u32>)>;
/// Between two looks for what dead processes left.
const SWEEP: Duration = Duration::from_millis(500);

/// Between two looks whether a registry's file is still there, in a process that holds something.
const LOOK: Duration = Duration::from_secs(1);

static FIRST: OnceLock<Process> = OnceLock::new();

/// This process's own state. After a fork the child gets a new one; the parent's, whose locks may be held for ever by
/// threads that do not exist here, is left alone.
pub fn current() -> &'static Process {
    let forks = fork::generation();
    let mut process = FIRST.get_or_init(|| Process::new(forks));
    while process.forks != forks {
        process = process.child.get_or_init(|| Box::new(Process::new(forks)));
    }
    process
}

impl Process {
    fn new(forks: u64) -> Self {
        prepare_for_forks();
        Self {
            forks,
            stores: Mutex::default(),
            queue: SegQueue::new(),
            lingering: Mutex::default(),
            starting: AtomicBool::new(false),
            thread: OnceLock::new(),
            child: OnceLock::new(),
        }
    }

    fn lingering(&self) -> MutexGuard<'_, Vec<(Arc<View>, Option<Instant>)>> {
        self.lingering.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn stores(&self) -> MutexGuard<'_, HashMap<Place, Arc<Store>>> {
        self.stores.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// In a forked child, before it has threads: a linger is its parent's. The memory would stay as long as this process,
    /// which does not know it. What a thread of the parent had in its hands at that moment stays.
    pub fn forget_parent(&self) {
        Victim::forget_parents();
        let mut ancestor = FIRST.get();
        while let Some(parent) = ancestor.filter(|process| process.forks != self.forks) {
            // Held by a thread that does not exist here: never to be had.
            let lingering =
                parent.lingering.try_lock().map(|mut views| std::mem::take(&mut *views)).unwrap_or_default();
            for view in lingering.into_iter().filter_map(|(view, _)| Arc::into_inner(view)) {
                drop(view.inherited_fd());
            }
            ancestor = parent.child.get().map(|child| &**child);
        }
        while let Some(task) = self.queue.pop() {
            if let Task::Unmap(retired) = task {
                self.unmap(retired);
            }
        }
    }

    /// Clean exit: this process goes out of every table.
    pub fn leave(&self) {
        self.all_stores().iter().for_each(|store| store.close());
    }

    /// Lock-free, called from finalizers.
    pub(super) fn retire(&self, retired: Retired) {
        self.push(Task::Unmap(retired));
    }

    /// Lock-free, called from finalizers.
    pub fn linger(&self, view: Arc<View>, until: Option<Instant>) {
        self.push(Task::Linger(view, until));
    }

    /// Lingering views of this segment end now.
    pub fn end_linger(&self, uuid: [u8; 16]) {
        self.push(Task::EndLinger(uuid));
    }

    /// Lock-free, called from finalizers.
    pub fn abandon(&self, publishing: Publishing) {
        self.push(Task::Abandon(Box::new(publishing)));
    }

    /// Lock-free, called from finalizers.
    pub fn give_up(&self, store: Arc<Store>, ticket: Ticket) {
        self.push(Task::GiveUp(store, ticket));
    }

    pub(super) fn prefault(&self, view: Weak<View>, ahead: Ahead) {
        self.push(Task::Prefault(view, ahead));
    }

    /// What was not made huge while it was filled.
    pub(super) fn collapse(&self, store: Arc<Store>, uuid: [u8; 16], huge: Huge) {
        self.push(Task::Collapse(store, uuid, huge, 0));
    }

    pub(super) fn discard_later(&'static self, store: Arc<Store>, row: u32) {
        self.push(Task::Discard(store, row));
        self.keep_house();
    }

    pub(super) fn release_later(&self, place: &Place, lease: LeaseId) {
        let store = self.stores().get(place).cloned();
        if let Some(store) = store {
            self.push(Task::Release(store, lease));
        }
    }

    /// Where no thread could be made, what waits is done now.
    pub(super) fn catch_up(&'static self) {
        if self.thread.get().is_none() && !self.queue.is_empty() {
            self.keep_house();
        }
    }

    /// Where there is no thread, whoever enters next sweeps.
    pub(super) fn sweep_soon(&self, store: &Arc<Store>) {
        if self.thread.get().is_some() {
            self.push(Task::Sweep(store.clone()));
        }
    }

    fn push(&self, task: Task) {
        self.queue.push(task);
        if let Some(thread) = self.thread.get() {
            thread.unpark();
        }
    }

    /// Starts the housekeeping thread, once. Called wherever a view is made, never from a finalizer.
    pub(super) fn keep_house(&'static self) {
        if self.starting.swap(true, Ordering::AcqRel) {
            return;
        }
        match thread::Builder::new().name("onecopy".into()).spawn(move || self.housekeeping()) {
            Ok(handle) => {
                let _ = self.thread.set(handle.thread().clone());
                handle.thread().unpark();
            }
            // No thread may be made (RLIMIT_NPROC): the next view tries again, and what waits is done here and now.
            Err(_) => {
                self.starting.store(false, Ordering::Release);
                self.round(&mut Vec::new());
            }
        }
    }

    fn housekeeping(&self) {
        yield_to_others();
        let mut sweeps = Sweeps::new();
        let mut look = Instant::now() + LOOK;
        loop {
            let next = self.round(&mut sweeps);
            if look <= Instant::now() {
                self.all_stores().iter().for_each(|store| store.come_along());
                look = Instant::now() + LOOK;
            }
            // Who holds nothing sleeps until there is something to do.
            let holds = self.all_stores().iter().any(|store| store.holdings.any());
            match next.into_iter().chain(holds.then_some(look)).min() {
                Some(next) => thread::park_timeout(next.saturating_duration_since(Instant::now())),
                None => thread::park(),
            }
        }
    }

    fn all_stores(&self) -> Vec<Arc<Store>> {
        self.stores().values().cloned().collect()
    }

    /// Does what there is to do; when to look again, if nothing comes before.
    fn round(&self, sweeps: &mut Sweeps) -> Option<Instant> {
        // What the registry did not take: others wait for it.
        let mut again: Vec<Task> = Vec::new();
        while let Some(task) = self.queue.pop() {
            match task {
                Task::Unmap(retired) => self.unmap(retired),
                Task::Linger(view, until) => self.keep_longer(view, until),
                Task::EndLinger(uuid) => self.lingering().retain(|(view, _)| view.uuid() != uuid),
                Task::Abandon(publishing) => drop(publishing),
                Task::GiveUp(store, ticket) => {
                    if store.end_loading(ticket, Ended::GaveUp).is_err() {
                        again.push(Task::GiveUp(store, ticket));
                    }
                }
                Task::Release(store, lease) => {
                    if store.try_release(lease).is_err() {
                        again.push(Task::Release(store, lease));
                    }
                }
                Task::Discard(store, row) => {
                    if store.try_discard(row).is_err() {
                        again.push(Task::Discard(store, row));
                    }
                }
                Task::Prefault(view, ahead) => {
                    if view.strong_count() > 0
                        && let Some(ahead) = ahead.step()
                    {
                        // Behind whatever came meanwhile.
                        self.queue.push(Task::Prefault(view, ahead));
                    }
                }
                Task::Collapse(store, uuid, huge, from) => {
                    if let Some(next) = store.collapse_step(uuid, huge, from) {
                        self.queue.push(Task::Collapse(store, uuid, huge, next));
                    }
                }
                Task::Sweep(store) => {
                    if !sweeps.iter().any(|(waiting, ..)| Arc::ptr_eq(waiting, &store)) {
                        sweeps.push((store, Instant::now(), None));
                    }
                }
            }
        }
        let now = Instant::now();
        sweeps.retain_mut(|(store, at, seen)| {
            if *at <= now {
                *at = now + SWEEP;
                *seen = store.sweep_after(*seen).unwrap_or_default();
                return seen.is_some();
            }
            true
        });
        let ends = {
            let mut lingering = self.lingering();
            lingering.retain(|(_, until)| until.is_none_or(|until| until > now));
            lingering.iter().filter_map(|(_, until)| *until).min()
        };
        let retry = (!again.is_empty()).then(|| now + RETRY);
        again.into_iter().for_each(|task| self.queue.push(task));
        ends.into_iter().chain(retry).chain(sweeps.iter().map(|(_, at, _)| *at)).min()
    }

    /// One linger a view, the longest.
    fn keep_longer(&self, view: Arc<View>, until: Option<Instant>) {
        let mut lingering = self.lingering();
        match lingering.iter_mut().find(|(other, _)| Arc::ptr_eq(other, &view)) {
            Some((_, known)) => *known = known.and_then(|known| until.map(|until| known.max(until))),
            None => lingering.push((view, until)),
        }
    }

    fn unmap(&self, retired: Retired) {
        let Retired { mapping, uuid, place, counted } = retired;
        drop(mapping);
        if !counted {
            return;
        }
        let store = self.stores().get(&*place).cloned();
        if let Some(store) = store {
            store.view_gone(uuid);
            self.sweep_soon(&store);
        }
    }
}
