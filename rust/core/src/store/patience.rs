//! How long a waiter believes in the loader it waits for.

use std::time::{Duration, Instant};

use crate::sys::process::Activity;
use crate::words::Identity;

/// A stopped process may be continued; this long it is given.
const STOPPED: Duration = Duration::from_secs(2);
/// CPU and I/O counters that have not moved for this long: the loader hangs.
const UNMOVED: Duration = Duration::from_secs(600);

/// Watches one loader; a new one is given new patience.
#[derive(Debug)]
pub struct Patience {
    loader: Identity,
    last: Option<Activity>,
    moved: Instant,
    stopped: Option<Instant>,
}

impl Patience {
    pub fn with(loader: &Identity) -> Self {
        Self { loader: loader.clone(), last: None, moved: Instant::now(), stopped: None }
    }

    pub fn loader(&self) -> &Identity {
        &self.loader
    }

    /// Why the loader is waited for no longer, if so. Its death is the kernel's word, not ours to guess: where nothing can
    /// be seen of the process, waiting goes on.
    pub fn exhausted(&mut self) -> Option<String> {
        let seen = Activity::of(self.loader.pid, self.loader.start_time)?;
        let now = Instant::now();
        let who = format!("process {} ({})", self.loader.pid, self.loader.name);
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
