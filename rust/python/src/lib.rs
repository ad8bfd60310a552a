//! The doorway: Python in, `onecopy-core` out. It registers and converts, and has no rules of its own.
//! Whatever waits or works runs with the GIL released.

#![deny(unsafe_code)]

mod buffer;
mod errors;
mod gil;
mod mapping;
mod publishing;
mod steps;
mod store;

use pyo3::prelude::*;

/// Native part of onecopy. Use `onecopy.Store` and `onecopy.Holder`.
#[pymodule]
mod _core {
    #[pymodule_export]
    use super::mapping::{Hold, Mapping};
    #[pymodule_export]
    use super::publishing::Publishing;
    #[pymodule_export]
    use super::steps::{Again, Attached, Loading, Patience, Private, Waiting};
    #[pymodule_export]
    use super::store::Store;

    use pyo3::prelude::*;

    /// Gives freed heap memory back to the system (malloc_trim(3)).
    #[pyfunction]
    fn trim(py: Python<'_>) {
        super::gil::released(py, onecopy_core::sys::memory::trim);
    }
}
