//! One model's memory. `writer`: plan > reserve > fill > seal, a type per step. `reader`: validate once, then read.

pub mod reader;
pub mod writer;
