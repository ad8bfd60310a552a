//! `Store`: the verbs, as Python calls them.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use onecopy_core::registry::request::{Ended, Listed, State};
use onecopy_core::store::{self, Announced, Ask, Step, Swept};
use onecopy_core::words::{Backend, Constructor, Huge, Key};
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyDict, PyList};

use crate::errors::detached;
use crate::gil;
use crate::publishing::Publishing;
use crate::steps::{self, Loading, Waiting, backend_name};

/// One namespace in one directory. Opening the same place again in a process gives the same store.
#[pyclass(frozen, module = "onecopy._core")]
pub struct Store {
    store: Arc<store::Store>,
}

#[pymethods]
impl Store {
    #[new]
    fn new(py: Python<'_>, directory: PathBuf, namespace: String) -> PyResult<Self> {
        let store = detached(py, || store::Store::open(&directory, &namespace))?;
        Ok(Self { store })
    }

    /// The registry's file.
    #[getter]
    fn path(&self) -> String {
        self.store.registry_path()
    }

    /// Memory that a model may take now: (bytes, the limit in words).
    #[staticmethod]
    fn room(py: Python<'_>) -> (u64, String) {
        let room = gil::released(py, store::Store::room);
        (room.free, room.limit)
    }

    /// Asks once: `Attached`, `Loading`, `Waiting`, `Again` or `Private`. `key`: (tag, version, compatibility);
    /// `constructor`: (name, code hash); `waited`: the episode in which the caller began to wait.
    #[pyo3(signature = (key, constructor, *, may_load, waited=None))]
    fn acquire(
        &self,
        py: Python<'_>,
        key: (String, String, String),
        constructor: (String, u64),
        may_load: bool,
        waited: Option<u64>,
    ) -> PyResult<Py<PyAny>> {
        let ask = ask(key, constructor, may_load);
        let step: Step = detached(py, || self.store.acquire(&ask, waited))?;
        steps::to_python(py, &self.store, step)
    }

    /// Sleeps until the entry changes, at most `seconds`; may wake early.
    fn wait(&self, py: Python<'_>, waiting: &Waiting, seconds: f64) {
        let limit = Duration::try_from_secs_f64(seconds).unwrap_or_default();
        gil::released(py, || self.store.wait(waiting.word, waiting.value, limit));
    }

    /// What can be said before an object is made or taken apart: raises BadNameError for a backend that cannot pin,
    /// ModelExistsError for a tag that is taken.
    fn refuse(
        &self,
        py: Python<'_>,
        key: (String, String, String),
        backend: &str,
        pin: bool,
        replace: bool,
    ) -> PyResult<()> {
        let (key, backend) = (self::key(key), one_backend(backend)?);
        detached(py, || self.store.refuse(&key, backend, pin, replace))
    }

    /// Looks for room and takes it. `buffers`: (offset in the data area, bytes) in order; `excess`: the most that is
    /// written and not yet freed at any moment of the fill, in bytes; `backend`: "auto", "memfd" or "posix";
    /// `huge`: "auto", "always" or "never".
    #[pyo3(signature = (key, constructor, *, skeleton, buffers, data_bytes, excess, backend, huge, pin, replace, loading=None))]
    #[expect(clippy::too_many_arguments, reason = "keyword-only in Python, where it is a record")]
    fn announce(
        &self,
        py: Python<'_>,
        key: (String, String, String),
        constructor: (String, u64),
        skeleton: &Bound<'_, PyBytes>,
        buffers: Vec<(u64, u64)>,
        data_bytes: u64,
        excess: u64,
        backend: &str,
        huge: &str,
        pin: bool,
        replace: bool,
        loading: Option<&Loading>,
    ) -> PyResult<Publishing> {
        let (backend, huge) = (one_backend(backend)?, one_huge(huge)?);
        let bytes = skeleton.as_bytes();
        let mut skeleton = Vec::new();
        skeleton.try_reserve_exact(bytes.len()).map_err(|_| steps::no_memory(py, bytes.len()))?;
        skeleton.extend_from_slice(bytes);
        let announced = Announced {
            skeleton,
            buffers,
            data_bytes,
            excess,
            backend,
            huge,
            pin,
            replace,
            ticket: loading.map(|loading| loading.ticket),
        };
        let ask = ask(key, constructor, true);
        let publishing = detached(py, || self.store.announce(&ask, announced))?;
        Ok(Publishing::new(publishing, loading.map(|loading| loading.ended.clone())))
    }

    /// The loader ends without a model; `how`: "failed", "unshareable" or "gave up".
    fn end_loading(&self, py: Python<'_>, loading: &Loading, how: &str, reason: String) -> PyResult<()> {
        let ended = ended(how, reason)?;
        detached(py, || self.store.end_loading(loading.ticket, ended))?;
        loading.ended.store(true, Ordering::Relaxed);
        Ok(())
    }

    #[pyo3(signature = (tag, version=None))]
    fn remove(&self, py: Python<'_>, tag: &str, version: Option<&str>) -> PyResult<u32> {
        detached(py, || self.store.remove(tag, version))
    }

    /// A dict per model, unnamed and loading ones too.
    fn list<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyList>> {
        let rows = detached(py, || self.store.list())?;
        let rows = rows.iter().map(|row| listed(py, row)).collect::<PyResult<Vec<_>>>()?;
        PyList::new(py, rows)
    }

    /// Removes what the dead left; (kind, what, why) each.
    fn sweep(&self, py: Python<'_>, dry_run: bool) -> PyResult<Vec<(String, String, String)>> {
        let Swept { report, orphans } = detached(py, || self.store.sweep(dry_run))?;
        let processes = report
            .processes
            .iter()
            .map(|who| ("process".to_owned(), format!("{} ({})", who.pid, who.name), "dead".to_owned()));
        let removed = report.removed.iter().map(|swept| {
            let kind = if swept.segment.is_some() { "segment" } else { "entry" };
            (kind.to_owned(), swept.key.to_string(), swept.why.to_owned())
        });
        let orphans = orphans.into_iter().map(|(name, bytes)| {
            (
                "orphan".to_owned(),
                format!("{name} ({bytes} bytes)"),
                "no registry knows it, and nobody has it open".to_owned(),
            )
        });
        Ok(processes.chain(removed).chain(orphans).collect())
    }

    /// Checks the buffers of an attached segment; the number of bytes that were checked.
    fn verify(&self, py: Python<'_>, mapping: &crate::mapping::Mapping) -> PyResult<u64> {
        detached(py, || self.store.verify(&mapping.view))
    }

    /// Removes the registry's file if nobody uses it.
    fn remove_registry_if_unused(&self, py: Python<'_>) -> PyResult<bool> {
        detached(py, || self.store.remove_registry_if_unused())
    }

    /// Clean exit: our leases and our place in the table go.
    fn leave(&self, py: Python<'_>) {
        gil::released(py, || self.store.leave());
    }
}

/// `None`: whichever has room.
fn one_backend(name: &str) -> PyResult<Option<Backend>> {
    match name {
        "auto" => Ok(None),
        "memfd" => Ok(Some(Backend::Memfd)),
        "posix" => Ok(Some(Backend::Posix)),
        other => Err(PyValueError::new_err(format!("backend {other:?}: \"auto\", \"memfd\" or \"posix\""))),
    }
}

fn one_huge(name: &str) -> PyResult<Huge> {
    match name {
        "auto" => Ok(Huge::Auto),
        "always" => Ok(Huge::Always),
        "never" => Ok(Huge::Never),
        other => Err(PyValueError::new_err(format!("huge {other:?}: \"auto\", \"always\" or \"never\""))),
    }
}

fn ended(how: &str, reason: String) -> PyResult<Ended> {
    match how {
        "failed" => Ok(Ended::Failed { reason }),
        "unshareable" => Ok(Ended::Unshareable { reason }),
        "gave up" => Ok(Ended::GaveUp),
        other => Err(PyValueError::new_err(format!("how {other:?}: \"failed\", \"unshareable\" or \"gave up\""))),
    }
}

fn key((tag, version, compatibility): (String, String, String)) -> Key {
    Key { tag, version, compatibility }
}

fn ask(key: (String, String, String), (name, code_hash): (String, u64), may_load: bool) -> Ask {
    Ask { key: self::key(key), constructor: Constructor { name, code_hash }, may_load }
}

fn listed<'py>(py: Python<'py>, row: &Listed) -> PyResult<Bound<'py, PyDict>> {
    let entry = PyDict::new(py);
    entry.set_item("tag", &row.key.tag)?;
    entry.set_item("version", &row.key.version)?;
    entry.set_item("compatibility", &row.key.compatibility)?;
    let state = match row.state {
        State::Loading => "loading",
        State::Ready => "ready",
        State::Unshareable => "unshareable",
        State::Stale => "stale",
        State::Vacant => "vacant",
    };
    entry.set_item("state", state)?;
    entry.set_item("generation", row.generation)?;
    entry.set_item("unnamed", row.unnamed)?;
    entry.set_item("pinned", row.pinned)?;
    entry.set_item("backend", row.segment.map(|facts| backend_name(facts.backend)))?;
    entry.set_item("file", row.segment.map(|facts| (facts.device, facts.inode)))?;
    entry.set_item("uuid", row.segment.map(|facts| PyBytes::new(py, &facts.uuid)))?;
    entry.set_item("segment_bytes", row.segment.map(|facts| facts.bytes))?;
    entry.set_item("shared_bytes", row.shared_bytes)?;
    entry.set_item("constructor", &row.constructor.name)?;
    entry.set_item("publisher", row.publisher.as_ref().map(|who| (who.pid, who.name.as_str())))?;
    entry.set_item("since", Duration::from_nanos(row.since).as_secs_f64())?;
    let holders = row.holders.iter().map(|holder| {
        (holder.identity.pid, holder.identity.name.as_str(), Duration::from_nanos(holder.since).as_secs_f64())
    });
    entry.set_item("holders", holders.collect::<Vec<_>>())?;
    entry.set_item("reason", &row.reason)?;
    Ok(entry)
}
