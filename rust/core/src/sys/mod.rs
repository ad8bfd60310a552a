//! What the kernel offers, one thing per file. The only room of the core with `unsafe`.

pub mod directory;
pub mod failpoint;
pub mod fork;
pub mod futex;
pub mod huge;
pub mod lock;
pub mod mapping;
pub mod memory;
pub mod object;
pub mod process;
pub mod room;
pub mod thread;
