//! One copy of a model's weights per machine.
//!
//! ```text
//! sys/       the only room with `unsafe`: shared-memory objects, mappings, locks, futexes, process identity
//! layout/    bytes of a segment and of the registry: pure functions over bytes, no system call
//! registry/  who holds what: a pure transition function, and around it the lock and the file
//! segment/   writing (plan > reserve > fill > seal) and reading (validate once, then views)
//! store      the verbs; the only place where registry and segment meet
//! words      plain types that every room may speak: key, constructor, identity, backend, facts
//! error      one enum, a variant per caller's decision
//! ```
//!
//! Trust: every byte that comes out of a shared object is parsed as hostile, after the object's owner, mode and
//! identity were checked. No Rust reference is ever formed over memory that another process can write.

#![deny(unsafe_code)]

pub mod error;
pub mod layout;
pub mod registry;
pub mod segment;
pub mod store;
pub mod sys;
pub mod words;

pub use error::{Error, Result};
