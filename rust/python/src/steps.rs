//! What an acquire answers, one class each.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use onecopy_core::Error;
use onecopy_core::registry::request::Ticket;
use onecopy_core::store::{self, Step, Store};
use onecopy_core::words::{Backend, Identity};
use pyo3::prelude::*;
use pyo3::types::PyBytes;

use crate::errors::raise;
use crate::gil;
use crate::mapping::Mapping;

/// A segment mapped into this process.
#[pyclass(frozen, get_all, module = "onecopy._core")]
pub struct Attached {
    pub mapping: Py<Mapping>,
    pub skeleton: Py<PyBytes>,
    /// Start of the data area in the mapping, in bytes.
    pub data_offset: u64,
    /// In huge pages when it was published.
    pub huge_bytes: u64,
    pub generation: u64,
    pub shared_bytes: u64,
    /// "memfd" or "posix".
    pub backend: &'static str,
    /// Qualified name and code hash of the constructor that published it.
    pub constructor: (String, u64),
}

impl Attached {
    pub fn new(py: Python<'_>, attached: store::Attached) -> PyResult<Self> {
        Ok(Self {
            mapping: Py::new(py, Mapping { view: attached.view })?,
            // `new` panics where there is no memory.
            skeleton: PyBytes::new_with(py, attached.skeleton.len(), |bytes| {
                bytes.copy_from_slice(&attached.skeleton);
                Ok(())
            })
            .map_err(|_| no_memory(py, attached.skeleton.len()))?
            .unbind(),
            data_offset: attached.data_offset,
            huge_bytes: attached.huge_bytes,
            generation: attached.content.generation,
            shared_bytes: attached.content.shared_bytes,
            backend: backend_name(attached.content.facts.backend),
            constructor: (attached.content.constructor.name, attached.content.constructor.code_hash),
        })
    }
}

/// Of a skeleton: a process with a limit on its addresses goes without sharing.
pub fn no_memory(py: Python<'_>, bytes: usize) -> PyErr {
    let refused = std::io::Error::from(std::io::ErrorKind::OutOfMemory);
    raise(py, Error::os("malloc", format!("{bytes} bytes of a skeleton"), refused))
}

/// The caller is the loader: it publishes, or says how it ended.
#[pyclass(frozen, module = "onecopy._core")]
pub struct Loading {
    pub ticket: Ticket,
    store: Arc<Store>,
    /// The registry knows how it ended. Asked again, it would enter a process that has left, and a file that is removed.
    pub ended: Arc<AtomicBool>,
}

impl Drop for Loading {
    fn drop(&mut self) {
        if !self.ended.load(Ordering::Relaxed) {
            store::current().give_up(self.store.clone(), self.ticket);
        }
    }
}

/// Another process loads.
#[pyclass(frozen, module = "onecopy._core")]
pub struct Waiting {
    loader: Identity,
    /// Seconds since the epoch.
    #[pyo3(get)]
    since: f64,
    #[pyo3(get)]
    episode: u64,
    pub word: u32,
    pub value: u32,
}

#[pymethods]
impl Waiting {
    #[getter]
    fn pid(&self) -> u32 {
        self.loader.pid
    }

    #[getter]
    fn name(&self) -> &str {
        &self.loader.name
    }
}

/// Those who hold it are dying: ask again in a moment.
#[pyclass(frozen, module = "onecopy._core")]
pub struct Again {}

/// Load privately, for this reason.
#[pyclass(frozen, get_all, module = "onecopy._core")]
pub struct Private {
    pub reason: String,
    pub unshareable: bool,
}

#[pymethods]
impl Private {
    #[new]
    #[pyo3(signature = (reason, unshareable=false))]
    fn new(reason: String, unshareable: bool) -> Self {
        Self { reason, unshareable }
    }
}

/// How long a waiter believes in its loader; one for each wait.
#[pyclass(frozen, module = "onecopy._core")]
#[derive(Default)]
pub struct Patience(Mutex<Option<store::Patience>>);

#[pymethods]
impl Patience {
    #[new]
    fn new() -> Self {
        Self::default()
    }

    /// Why the loader is waited for no longer (it is stopped, or hangs), or None.
    fn exhausted(&self, py: Python<'_>, waiting: &Waiting) -> Option<String> {
        gil::released(py, || {
            let mut patience = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            match patience.as_mut() {
                Some(patience) if *patience.loader() == waiting.loader => patience.exhausted(),
                _ => patience.insert(store::Patience::with(&waiting.loader)).exhausted(),
            }
        })
    }
}

pub fn backend_name(backend: Backend) -> &'static str {
    match backend {
        Backend::Memfd => "memfd",
        Backend::Posix => "posix",
    }
}

pub fn to_python(py: Python<'_>, store: &Arc<Store>, step: Step) -> PyResult<Py<PyAny>> {
    Ok(match step {
        Step::Attached(attached) => Py::new(py, Attached::new(py, attached)?)?.into_any(),
        Step::Load { ticket } => {
            Py::new(py, Loading { ticket, store: store.clone(), ended: Arc::default() })?.into_any()
        }
        Step::Wait { loader, since, word, value, episode } => {
            let since = Duration::from_nanos(since).as_secs_f64();
            Py::new(py, Waiting { loader, since, episode, word, value })?.into_any()
        }
        Step::Again => Py::new(py, Again {})?.into_any(),
        Step::Private { reason, unshareable } => Py::new(py, Private { reason, unshareable })?.into_any(),
    })
}
