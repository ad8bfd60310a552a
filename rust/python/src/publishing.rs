//! `Publishing`: one segment on its way to READY.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use onecopy_core::store::{self, Outcome};
use pyo3::exceptions::PyRuntimeError;
use pyo3::prelude::*;

use crate::buffer::Source;
use crate::errors::detached;
use crate::gil;
use crate::mapping::Mapping;
use crate::steps::{Attached, backend_name};

/// Fill every buffer in order, seal, inspect, publish; dropped before that, nothing of it stays.
#[pyclass(frozen, module = "onecopy._core")]
pub struct Publishing {
    inner: Mutex<Option<store::Publishing>>,
    /// Of the loader that publishes.
    loading_ended: Option<Arc<AtomicBool>>,
}

impl Publishing {
    pub fn new(publishing: store::Publishing, loading_ended: Option<Arc<AtomicBool>>) -> Self {
        Self { inner: Mutex::new(Some(publishing)), loading_ended }
    }

    /// Only ever taken with the GIL released, so that no thread waits for it while holding the GIL.
    fn lock(&self) -> MutexGuard<'_, Option<store::Publishing>> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn with<T: Send>(
        &self,
        py: Python<'_>,
        work: impl FnOnce(&mut store::Publishing) -> onecopy_core::Result<T> + Send,
    ) -> PyResult<T> {
        let done = detached(py, || self.lock().as_mut().map(work).transpose())?;
        done.ok_or_else(|| PyRuntimeError::new_err("this segment was published or abandoned already"))
    }
}

impl Drop for Publishing {
    fn drop(&mut self) {
        let inner = self.inner.get_mut().unwrap_or_else(PoisonError::into_inner);
        if let Some(publishing) = inner.take() {
            store::current().abandon(publishing);
        }
    }
}

#[pymethods]
impl Publishing {
    /// Start of the data area in the mapping, in bytes.
    fn data_offset(&self, py: Python<'_>) -> PyResult<u64> {
        self.with(py, |publishing| Ok(publishing.data_offset()))
    }

    fn backend(&self, py: Python<'_>) -> PyResult<&'static str> {
        self.with(py, |publishing| Ok(backend_name(publishing.backend())))
    }

    /// Copies the next buffer; its offset in the mapping.
    fn fill(&self, py: Python<'_>, source: &Bound<'_, PyAny>) -> PyResult<u64> {
        let source = Source::of(source)?;
        self.with(py, |publishing| publishing.fill(source.bytes()))
    }

    /// A mapping of the unsealed segment, for re-pointing what was filled.
    fn mapping(&self, py: Python<'_>) -> PyResult<Mapping> {
        Ok(Mapping { view: self.with(py, |publishing| publishing.view())? })
    }

    fn seal(&self, py: Python<'_>) -> PyResult<()> {
        self.with(py, store::Publishing::seal)
    }

    /// The sealed segment over a fresh mapping, as an attacher sees it.
    fn inspect(&self, py: Python<'_>) -> PyResult<Attached> {
        let attached = self.with(py, |publishing| publishing.inspect())?;
        Attached::new(py, attached)
    }

    /// READY: the generation; None where the tag was replaced meanwhile.
    fn publish(&self, py: Python<'_>) -> PyResult<Option<u64>> {
        let outcome = self.with(py, store::Publishing::publish)?;
        if let Some(ended) = &self.loading_ended {
            ended.store(true, Ordering::Relaxed);
        }
        match outcome {
            Outcome::Ready { generation } => Ok(Some(generation)),
            Outcome::Superseded => Ok(None),
        }
    }

    /// Lets go of what filling needed. Call it when done; dropping the object without it does the same.
    fn close(&self, py: Python<'_>) {
        gil::released(py, || drop(self.lock().take()));
    }
}
