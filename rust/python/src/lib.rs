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

    /// With the GIL held, so that no thread forks meanwhile: what is made once must not be half made in a child.
    #[pymodule_init]
    fn init(_module: &Bound<'_, PyModule>) -> PyResult<()> {
        onecopy_core::store::current();
        Ok(())
    }

    /// In a forked child, before anything else: takes leases of its own for what it inherited.
    #[pyfunction]
    fn adopt(py: Python<'_>, mappings: Vec<Bound<'_, Mapping>>) -> PyResult<()> {
        let views: Vec<_> = mappings.iter().map(|mapping| mapping.get().view.clone()).collect();
        super::errors::detached(py, || onecopy_core::store::Store::adopt(&views))
    }

    /// In a forked child that has adopted its mappings: lets go of what its parent's threads kept.
    #[pyfunction]
    fn forget_parent(py: Python<'_>) {
        super::gil::released(py, || onecopy_core::store::current().forget_parent());
    }

    /// Clean exit: this process's leases and its places in the tables go.
    #[pyfunction]
    fn leave(py: Python<'_>) {
        super::gil::released(py, || onecopy_core::store::current().leave());
    }

    /// Why this kernel makes no huge pages; None where it does.
    #[pyfunction]
    fn no_huge_pages(py: Python<'_>) -> Option<String> {
        super::gil::released(py, onecopy_core::sys::huge::available).err().map(|error| error.to_string())
    }

    /// Gives freed heap memory back to the system (malloc_trim(3)).
    #[pyfunction]
    fn trim(py: Python<'_>) {
        super::gil::released(py, onecopy_core::sys::memory::trim);
    }
}
