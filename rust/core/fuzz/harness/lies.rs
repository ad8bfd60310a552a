//! A field of a row, overwritten: with what a damaged or lying file could say.

use std::fmt::Debug;
use std::sync::LazyLock;

use arbitrary::Arbitrary;

/// Shows what an input does, where `ONECOPY_FUZZ_TELL` is set: for whoever looks into a crash.
pub fn told(step: &impl Debug) {
    static TELL: LazyLock<bool> = LazyLock::new(|| std::env::var_os("ONECOPY_FUZZ_TELL").is_some());
    if *TELL {
        eprintln!("{step:?}");
    }
}

/// Mostly numbers that could be row numbers or states, and the ends of the range.
#[derive(Arbitrary, Clone, Copy, Debug)]
pub enum Value {
    Small(u8),
    Any(u32),
    None,
    AlmostNone,
    Sign,
}

#[derive(Arbitrary, Clone, Copy, Debug)]
pub struct Lie {
    pub table: u8,
    pub row: u8,
    /// In words of four bytes.
    pub field: u8,
    pub value: Value,
    /// The next word too: a number of eight bytes.
    pub wide: bool,
}

impl Lie {
    /// Overwrites a row's bytes, its checksum not among them.
    pub fn tell(self, row: &mut [u8]) {
        let value = match self.value {
            Value::Small(value) => u32::from(value % 20),
            Value::Any(value) => value,
            Value::None => u32::MAX,
            Value::AlmostNone => u32::MAX - 1,
            Value::Sign => 1 << 31,
        };
        // Behind these words lie texts, of which no verb thinks anything.
        let at = usize::from(self.field) % (row.len() / 4).min(36) * 4;
        let words = if self.wide { 2 } else { 1 };
        for word in row[at..].chunks_exact_mut(4).take(words) {
            word.copy_from_slice(&value.to_ne_bytes());
        }
    }
}
