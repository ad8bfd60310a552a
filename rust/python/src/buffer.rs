//! The buffer protocol, both ways: the only unsafe code of the doorway.
//!
//! # Safety
//! Python code may write into a buffer at any time, from another thread or through another view, so no promise about the
//! bytes is taken from it: what is read is copied, what is written lands in private pages of this process.
#![allow(unsafe_code)]

use std::ffi::{c_int, c_void};

use pyo3::buffer::PyBuffer;
use pyo3::exceptions::{PyBufferError, PyValueError};
use pyo3::ffi;
use pyo3::prelude::*;

/// Fills `view` with a writable export of `length` bytes at `address`, owned by `owner`.
///
/// # Safety
/// `view` is the pointer that Python handed to `__getbuffer__`, and the memory lives as long as `owner`.
pub unsafe fn export(
    owner: &Bound<'_, PyAny>,
    view: *mut ffi::Py_buffer,
    address: usize,
    length: usize,
    flags: c_int,
) -> PyResult<()> {
    if view.is_null() {
        return Err(PyBufferError::new_err("view is null"));
    }
    let length = isize::try_from(length).map_err(|_| PyBufferError::new_err("longer than isize"))?;
    // SAFETY: `view` is valid by this function's contract; PyBuffer_FillInfo takes its own reference to `owner`, so the
    // mapping outlives the export.
    let done = unsafe { ffi::PyBuffer_FillInfo(view, owner.as_ptr(), address as *mut c_void, length, 0, flags) };
    if done == 0 { Ok(()) } else { Err(PyErr::fetch(owner.py())) }
}

/// A contiguous source of bytes, pinned for as long as it lives.
pub struct Source {
    buffer: PyBuffer<u8>,
}

impl Source {
    pub fn of(object: &Bound<'_, PyAny>) -> PyResult<Self> {
        let buffer = PyBuffer::<u8>::get(object)?;
        if !buffer.is_c_contiguous() {
            return Err(PyValueError::new_err("a source must be contiguous"));
        }
        Ok(Self { buffer })
    }

    pub fn bytes(&self) -> &[u8] {
        let length = self.buffer.len_bytes();
        if length == 0 {
            return &[];
        }
        // SAFETY: the export keeps `buf_ptr` valid for `len_bytes` bytes while `self.buffer` lives, contiguous as checked.
        // Another thread may write meanwhile, as with any `bytes(buffer)` in Python: then some of its old and some of its
        // new values are copied, u8 has no invalid ones, and the object that is published is the copy.
        unsafe { std::slice::from_raw_parts(self.buffer.buf_ptr().cast::<u8>(), length) }
    }
}
