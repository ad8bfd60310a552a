//! Named places at which tests kill this process. Without the feature `failpoints` there is nothing here.
//!
//! `ONECOPY_FAILPOINT="publish: flipped"` kills with SIGKILL where the verb `publish` reaches `flipped` ("publish: flipped (2)":
//! for the second time in this process);
//! `ONECOPY_FAILPOINTS=path` writes down every place on the way, one a line.

/// What this thread does from here on; a place by itself.
#[cfg(not(feature = "failpoints"))]
#[inline]
pub fn verb(_name: &'static str) {}

/// A step of it.
#[cfg(not(feature = "failpoints"))]
#[inline]
pub fn reached(_step: &'static str) {}

/// What belongs to a verb of its own, whatever this thread is about.
#[cfg(not(feature = "failpoints"))]
#[inline]
pub fn during<R>(_name: &'static str, work: impl FnOnce() -> R) -> R {
    work()
}

#[cfg(feature = "failpoints")]
pub use armed::{during, reached, verb};

#[cfg(feature = "failpoints")]
mod armed {
    use std::cell::Cell;
    use std::collections::BTreeMap;
    use std::fs::OpenOptions;
    use std::io::Write;
    use std::sync::{Mutex, PoisonError};

    use rustix::process::{Signal, getpid, kill_process};

    thread_local! {
        static VERB: Cell<&'static str> = const { Cell::new("none") };
    }
    /// How often each place was reached in this process: the second time it is another one.
    static TIMES: Mutex<BTreeMap<String, u32>> = Mutex::new(BTreeMap::new());

    pub fn verb(name: &'static str) {
        VERB.set(name);
        reached("begun");
    }

    pub fn during<R>(name: &'static str, work: impl FnOnce() -> R) -> R {
        let before = VERB.get();
        verb(name);
        let done = work();
        VERB.set(before);
        done
    }

    fn numbered(place: String) -> String {
        let mut times = TIMES.lock().unwrap_or_else(PoisonError::into_inner);
        let count = times.entry(place.clone()).or_insert(0);
        *count += 1;
        if *count == 1 { place } else { format!("{place} ({count})") }
    }

    pub fn reached(step: &'static str) {
        let place = numbered(format!("{}: {step}", VERB.get()));
        if let Some(path) = std::env::var_os("ONECOPY_FAILPOINTS") {
            let file = OpenOptions::new().append(true).create(true).open(path);
            // At once: threads write at the same time.
            let _ = file.and_then(|mut file| file.write_all(format!("{place}\n").as_bytes()));
        }
        if std::env::var("ONECOPY_FAILPOINT").is_ok_and(|wanted| wanted == place) {
            let _ = kill_process(getpid(), Signal::KILL);
        }
    }
}
