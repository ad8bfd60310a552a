//! The one table from core errors to Python exceptions. No catch-all arm: a new variant must be placed here.
//! (What waits in Python, the timeout, is raised in Python.)

use onecopy_core::Error;
use pyo3::prelude::*;

use crate::gil;

pub fn raise(py: Python<'_>, error: Error) -> PyErr {
    let name = match &error {
        Error::BadName(_) => "BadNameError",
        Error::NotFound { .. } => "ModelNotFoundError",
        Error::Exists { .. } => "ModelExistsError",
        Error::Corrupt { .. } => "CorruptError",
        Error::Untrusted { .. } => "UntrustedError",
        Error::NoRoom { .. } => "NoRoomError",
        Error::Full { .. } => "StoreFullError",
        Error::Stuck { .. } => "StoreStuckError",
        Error::OutOfMemory(_) => "LoaderKilledError",
        Error::Unshareable(_) => "UnshareableError",
        Error::Refused(_) => "RefusedError",
        Error::Os { .. } => "SystemCallError",
    };
    let built = py.import("onecopy.errors").and_then(|errors| errors.getattr(name)).and_then(|class| match &error {
        Error::Os { source, .. } => class.call1((source.raw_os_error().unwrap_or(0), error.to_string())),
        _ => class.call1((error.to_string(),)),
    });
    built.map_or_else(|failure| failure, PyErr::from_value)
}

/// Work without the GIL, its error as a Python exception.
pub fn detached<T: Send>(py: Python<'_>, work: impl FnOnce() -> onecopy_core::Result<T> + Send) -> PyResult<T> {
    gil::released(py, work).map_err(|error| raise(py, error))
}
