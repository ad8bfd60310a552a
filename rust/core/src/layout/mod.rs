//! Bytes that several processes read, as pure functions: no system call here.

pub mod registry;
pub mod segment;
