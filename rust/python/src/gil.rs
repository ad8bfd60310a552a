//! Work with the GIL released, and a way back into the interpreter that its end cannot break.
#![allow(unsafe_code)]

use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};

use pyo3::ffi::PyThreadState;
use pyo3::prelude::*;

// pyo3 declares them as functions that never unwind; before Python 3.14 the second one does.
unsafe extern "C-unwind" {
    fn PyEval_SaveThread() -> *mut PyThreadState;
    fn PyEval_RestoreThread(state: *mut PyThreadState);
}

/// A thread that is asked to unwind by the end of the interpreter stays here instead, as it does from Python 3.14 on.
struct Stay;

impl Drop for Stay {
    fn drop(&mut self) {
        loop {
            std::thread::park();
        }
    }
}

/// `Python::detach`, for threads that may outlive the interpreter too: while it ends, PyEval_RestoreThread ends every
/// daemon thread by pthread_exit(3), whose unwinding may not pass through Rust ("FATAL: exception not rethrown", abort;
/// github.com/python/cpython/issues/87135). pyo3 guards PyGILState_Ensure in this way, and not this call.
pub fn released<T: Send>(_py: Python<'_>, work: impl FnOnce() -> T + Send) -> T {
    // SAFETY: `_py` says that this thread has the GIL. Until it is restored nothing of Python is touched: `work` is Send,
    // so it cannot hold a `Python` token or a `Bound`, and nothing in this crate attaches inside of it.
    let state = unsafe { PyEval_SaveThread() };
    let done = catch_unwind(AssertUnwindSafe(work));
    let stay = Stay;
    // SAFETY: the state that was saved just now, by this thread.
    unsafe { PyEval_RestoreThread(state) };
    std::mem::forget(stay);
    done.unwrap_or_else(|panic| resume_unwind(panic))
}
