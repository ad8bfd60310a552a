//! How long a waiter believes in the loader it waits for.

use std::time::{Duration, Instant};

use crate::sys::process::{Activity, identity};
use crate::words::Identity;

/// A stopped process may be continued; this long it is given.
const STOPPED: Duration = Duration::from_secs(2);
/// CPU and I/O counters that have not moved for this long: the loader hangs.
const UNMOVED: Duration = Duration::from_secs(600);

/// What a dead process had may take this long to be given back (60 ms for each private GiB, a core dump).
const DYING: Duration = Duration::from_secs(30);

/// Watches one loader; a new one is given new patience.
#[derive(Debug)]
pub struct Patience {
    loader: Identity,
    last: Option<Activity>,
    moved: Instant,
    stopped: Option<Instant>,
    gone: Option<Instant>,
}

impl Patience {
    pub fn with(loader: &Identity) -> Self {
        Self { loader: loader.clone(), last: None, moved: Instant::now(), stopped: None, gone: None }
    }

    pub fn loader(&self) -> &Identity {
        &self.loader
    }

    /// Why the loader is waited for no longer, if so. Its death is the kernel's word, not ours to guess: where nothing can
    /// be seen of the process, waiting goes on.
    pub fn exhausted(&mut self) -> Option<String> {
        let now = Instant::now();
        let who = format!("process {} ({})", self.loader.pid, self.loader.name);
        let Some(seen) = Activity::of(self.loader.pid, self.loader.start_time) else {
            if self.loader.pid_namespace == 0 || self.loader.pid_namespace != identity().pid_namespace {
                return None;
            }
            // A child that it made behind Python's back (a bare `clone`) has the lock by which the kernel says that it lives.
            let since = *self.gone.get_or_insert(now);
            return (now - since >= DYING)
                .then(|| format!("{who}, which loads it, is dead, and a child of it keeps its place"));
        };
        if seen.stopped() {
            let since = *self.stopped.get_or_insert(now);
            return (now - since >= STOPPED).then(|| format!("{who}, which loads it, is stopped"));
        }
        self.stopped = None;
        if self.last.as_ref() != Some(&seen) {
            self.last = Some(seen);
            self.moved = now;
        }
        (now - self.moved >= UNMOVED)
            .then(|| format!("{who}, which loads it, has used no CPU and done no I/O for {} s", UNMOVED.as_secs()))
    }
}
