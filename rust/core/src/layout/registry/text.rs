//! Text inside a row: a length byte and a fixed number of bytes.

use std::fmt;

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// At most `N` (< 256) bytes of UTF-8, zeros after them.
#[derive(Clone, Copy, PartialEq, Eq, Hash, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct Text<const N: usize> {
    length: u8,
    bytes: [u8; N],
}

impl<const N: usize> Text<N> {
    pub const EMPTY: Self = Self { length: 0, bytes: [0; N] };

    /// As much of `text` as fits, cut between characters.
    pub fn new(text: &str) -> Self {
        let mut length = text.len().min(N).min(usize::from(u8::MAX));
        while !text.is_char_boundary(length) {
            length -= 1;
        }
        let mut bytes = [0; N];
        bytes[..length].copy_from_slice(&text.as_bytes()[..length]);
        #[allow(clippy::cast_possible_truncation)]
        Self { length: length as u8, bytes }
    }

    /// Never fails: a length or bytes that no writer of ours made show as replacement characters.
    pub fn to_text(self) -> String {
        let length = usize::from(self.length).min(N);
        String::from_utf8_lossy(&self.bytes[..length]).into_owned()
    }
}

impl<const N: usize> fmt::Debug for Text<N> {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&self.to_text(), out)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cuts_between_characters() {
        assert_eq!(Text::<4>::new("abcdef").to_text(), "abcd");
        assert_eq!(Text::<4>::new("abcé").to_text(), "abc");
        assert_eq!(Text::<4>::new("").to_text(), "");
    }

    #[test]
    fn a_wrong_length_is_harmless() {
        let bytes = [200, b'a', 0xff, b'c', b'd'];
        assert_eq!(Text::<4>::read_from_bytes(&bytes).unwrap().to_text(), "a\u{fffd}cd");
    }
}
