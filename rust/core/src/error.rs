//! Every way a verb can fail, a variant per caller's decision.

use std::io;

use rustix::io::Errno;

pub type Result<T, E = Error> = std::result::Result<T, E>;

#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A tag, namespace or directory that cannot be used as given.
    #[error("{0}")]
    BadName(String),

    /// Nothing is published under this key.
    #[error("no model {key} in namespace '{namespace}' ({place}): `onecopy ls` shows what is there")]
    NotFound { key: String, namespace: String, place: String },

    /// The key is taken, and `replace` was not asked for.
    #[error("{key} exists in namespace '{namespace}': {holder}. Pass replace=True to supersede it")]
    Exists { key: String, namespace: String, holder: String },

    /// Bytes that are not what they claim to be: a foreign or damaged file.
    #[error("{place}: {what} (found {found}, expected {expected}). {remedy}")]
    Corrupt { place: String, what: &'static str, found: String, expected: String, remedy: &'static str },

    /// Owner, mode or type of an object forbids its use.
    #[error("{place}: {why}. {remedy}")]
    Untrusted { place: String, why: String, remedy: &'static str },

    /// The model does not fit where it was to go.
    #[error("no room for {need} bytes in {place}: {free} bytes free ({limit}). {remedy}")]
    NoRoom { need: u64, free: u64, place: String, limit: String, remedy: &'static str },

    /// A table of the registry is full, after a sweep.
    #[error("{place}: table of {table} is full ({capacity} rows). `onecopy sweep` removes the dead")]
    Full { place: String, table: &'static str, capacity: u32 },

    /// The registry's lock did not move for the deadline: its holder is stopped, or stuck.
    #[error(
        "{place}: the registry's lock was not released for {waited:.1} s ({holder}). Models load privately meanwhile"
    )]
    Stuck { place: String, waited: f64, holder: String },

    /// Loaders of this key were killed for lack of memory.
    #[error("{0}")]
    OutOfMemory(String),

    /// The object cannot be shared, for a reason.
    #[error("{0}")]
    Unshareable(String),

    /// A living holder has it, and this process may not open it.
    #[error("{0}")]
    Refused(String),

    /// The kernel refused a call.
    #[error("{call} {object}: {source}{}", remedy(source))]
    Os { call: &'static str, object: String, source: io::Error },
}

/// What helps, where the kernel's word alone does not say it.
fn remedy(refused: &io::Error) -> &'static str {
    match refused.kind() {
        io::ErrorKind::ReadOnlyFilesystem => ". Set ONECOPY_DIR to another directory on a tmpfs",
        io::ErrorKind::FileTooLarge => ". Raise the limit on the size of files: ulimit -f unlimited",
        io::ErrorKind::OutOfMemory => ". Raise the limit on addresses (ulimit -v), or free memory",
        _ if refused.raw_os_error() == Some(Errno::MFILE.raw_os_error()) => {
            ". Raise the limit on descriptors: ulimit -n"
        }
        _ => "",
    }
}

impl Error {
    pub fn os(call: &'static str, object: impl Into<String>, source: impl Into<io::Error>) -> Self {
        Error::Os { call, object: object.into(), source: source.into() }
    }
}
