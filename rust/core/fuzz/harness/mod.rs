//! What the fuzz targets run, and `tests/corpus.rs` runs again without a fuzzer: one function a target, from bytes to
//! nothing or a panic.

pub mod file;
pub mod lies;
pub mod registry;
pub mod segment;
