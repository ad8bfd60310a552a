//! Reading a segment: everything but the buffers is copied to private memory and checked there.

use std::os::fd::OwnedFd;

use crate::layout::segment::{Header, wrong};
use crate::sys::object;
use crate::words::SegmentFacts;
use crate::{Error, Result};

#[derive(Clone, Debug)]
pub struct Contents {
    pub skeleton: Vec<u8>,
    /// Start of the data area, from the start of the object.
    pub data_offset: u64,
    pub huge_bytes: u64,
}

/// Checks header, manifest and skeleton of an object that is already known to be the right one.
pub fn read(fd: &OwnedFd, facts: &SegmentFacts, place: &str) -> Result<Contents> {
    let header = read_header(fd, facts, place)?;
    let manifest = read_exact(fd, header.manifest_offset, header.manifest_bytes() as usize, place)?;
    header.parse_manifest(&manifest, place)?;
    let skeleton = read_exact(fd, header.skeleton_offset, header.skeleton_bytes as usize, place)?;
    header.check_skeleton(&skeleton, place)?;
    Ok(Contents { skeleton, data_offset: header.data_offset, huge_bytes: header.huge_bytes })
}

/// What ends too early is damaged; every other failure is the kernel's to explain.
fn read_exact(fd: &OwnedFd, offset: u64, bytes: usize, place: &str) -> Result<Vec<u8>> {
    object::read_exact(fd, offset, bytes).map_err(|error| match error {
        Error::Os { ref source, .. } if source.raw_os_error() == Some(libc::ENODATA) => {
            wrong(place, "cut short", format!("less than {bytes} bytes at {offset}"), bytes)
        }
        other => other,
    })
}

fn read_header(fd: &OwnedFd, facts: &SegmentFacts, place: &str) -> Result<Header> {
    let bytes = read_exact(fd, 0, size_of::<Header>(), place)?;
    Header::parse(&bytes, place, facts.bytes, &facts.uuid)
}

/// Checks every buffer against its checksum as well; the number of bytes that were checked.
pub fn verify(fd: &OwnedFd, facts: &SegmentFacts, place: &str) -> Result<u64> {
    read(fd, facts, place)?;
    let header = read_header(fd, facts, place)?;
    let manifest = read_exact(fd, header.manifest_offset, header.manifest_bytes() as usize, place)?;
    let mut checked = 0;
    for (index, row) in header.parse_manifest(&manifest, place)?.iter().enumerate() {
        let mut crc = crc32fast::Hasher::new();
        let mut done = 0;
        while done < row.bytes {
            let step = (row.bytes - done).min(4 << 20);
            crc.update(&read_exact(fd, row.offset + done, step as usize, place)?);
            done += step;
        }
        let found = crc.finalize();
        if found != row.crc {
            return Err(Error::Corrupt {
                place: place.to_owned(),
                what: "buffer checksum",
                found: format!("{found} in buffer {index} at {}+{}", row.offset, row.bytes),
                expected: row.crc.to_string(),
                remedy: "Remove the model with `onecopy rm`; the next acquire loads it again",
            });
        }
        checked += row.bytes;
    }
    Ok(checked)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::segment::writer::Outline;
    use crate::sys::directory::Directory;
    use crate::words::{Backend, Huge};
    use std::path::Path;

    fn sealed() -> (OwnedFd, SegmentFacts) {
        let directory = Directory::open(Path::new("/dev/shm")).unwrap();
        let outline = Outline::new(5, &[(0, 100), (128, 3 << 20)], 128 + (3 << 20)).unwrap();
        let mut filling = outline.reserve(Backend::Memfd, Huge::Auto, &directory, "onecopy-test", b"hello").unwrap();
        filling.fill(&[1; 100]).unwrap();
        assert!(filling.fill(&[2; 7]).is_err());
        filling.fill(&vec![2; 3 << 20]).unwrap();
        let sealed = filling.seal().unwrap();
        (sealed.fd, sealed.facts)
    }

    #[test]
    fn what_was_filled_is_read_and_verified() {
        let (fd, facts) = sealed();
        let contents = read(&fd, &facts, "here").unwrap();
        assert_eq!(contents.skeleton, b"hello");
        assert_eq!(object::read_exact(&fd, contents.data_offset + 128, 3).unwrap(), [2; 3]);
        assert_eq!(verify(&fd, &facts, "here").unwrap(), 100 + (3 << 20));
        let other = SegmentFacts { uuid: [0; 16], ..facts };
        assert!(read(&fd, &other, "here").unwrap_err().to_string().contains("another model"));
    }

    #[test]
    fn a_segment_that_is_not_full_is_not_sealed() {
        let directory = Directory::open(Path::new("/dev/shm")).unwrap();
        let outline = Outline::new(0, &[(0, 64)], 64).unwrap();
        let filling = outline.reserve(Backend::Memfd, Huge::Auto, &directory, "onecopy-test", b"").unwrap();
        assert!(filling.seal().is_err());
    }

    #[test]
    fn a_gap_of_a_page_or_an_overlap_is_refused() {
        assert!(Outline::new(0, &[(0, 64), (8192, 64)], 9000).is_err());
        assert!(Outline::new(0, &[(0, 100), (64, 64)], 9000).is_err());
        assert!(Outline::new(0, &[(0, u64::MAX)], 9000).is_err());
    }
}
