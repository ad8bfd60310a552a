//! `Mapping`: the base of every array over a segment.

use std::ffi::c_int;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use onecopy_core::store::{self, View};
use pyo3::ffi;
use pyo3::prelude::*;

use crate::buffer;

/// A private, writable view of one segment; arrays over it keep it alive, and with it the lease.
#[pyclass(frozen, weakref, module = "onecopy._core")]
pub struct Mapping {
    pub view: Arc<View>,
}

#[pymethods]
impl Mapping {
    #[getter]
    fn nbytes(&self) -> usize {
        self.view.span().1
    }

    #[getter]
    fn address(&self) -> usize {
        self.view.span().0
    }

    /// Identity of the segment: 16 bytes.
    #[getter]
    fn uuid(&self) -> [u8; 16] {
        self.view.uuid()
    }

    /// Something that keeps the mapping until it is dropped, and `linger` seconds longer (None: until the process exits).
    #[pyo3(signature = (linger))]
    fn hold(&self, linger: Option<f64>) -> Hold {
        Hold { view: self.view.clone(), linger, ended: AtomicBool::new(false) }
    }

    /// Maps the pages ahead of use, in the housekeeping thread.
    fn prefault(&self) {
        self.view.prefault();
    }

    #[allow(unsafe_code)]
    unsafe fn __getbuffer__(slf: Bound<'_, Self>, view: *mut ffi::Py_buffer, flags: c_int) -> PyResult<()> {
        let (address, length) = slf.get().view.span();
        // SAFETY: Python calls this slot with a valid `view`; the mapping lives as long as its `View`, which `slf` holds.
        unsafe { buffer::export(slf.as_any(), view, address, length, flags) }
    }
}

/// Keeps a mapping; when dropped, the housekeeping thread keeps it for the linger.
#[pyclass(frozen, module = "onecopy._core")]
pub struct Hold {
    view: Arc<View>,
    linger: Option<f64>,
    ended: AtomicBool,
}

#[pymethods]
impl Hold {
    /// Lets go without linger, and ends the linger of earlier holds of this segment: a newer one took its place.
    fn end(&self) {
        store::current().end_linger(self.view.uuid());
        self.ended.store(true, Ordering::Relaxed);
    }
}

impl Drop for Hold {
    fn drop(&mut self) {
        if *self.ended.get_mut() {
            return;
        }
        let until = match self.linger {
            None => None,
            Some(seconds) if seconds > 0.0 => match Duration::try_from_secs_f64(seconds) {
                Ok(linger) => Instant::now().checked_add(linger),
                Err(_) => None,
            },
            Some(_) => return,
        };
        store::current().linger(self.view.clone(), until);
    }
}
