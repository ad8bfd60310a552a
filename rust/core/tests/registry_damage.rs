//! Flipped bytes and cut files: always an answer or an error, never a panic, never a hang; and a damaged row is an
//! error, not another answer.

mod registry_support;

use std::fs;
use std::os::unix::fs::PermissionsExt;

use onecopy_core::layout::registry::{FILE_BYTES, REDO, TABLES, TableId};
use onecopy_core::registry::request::{Acquired, Ended};
use onecopy_core::words::Backend;
use onecopy_core::{Error, Result};
use proptest::prelude::*;

use registry_support::{Actor, Room, ask, key, random_uuid};

/// A registry with something in every table.
fn populated() -> Vec<u8> {
    let room = Room::new();
    let actors: Vec<Actor> = (0..3).map(|_| Actor::new(&room.path)).collect();
    for number in 0..6 {
        actors[0].provide(&format!("t{number}"), if number % 2 == 0 { Backend::Posix } else { Backend::Memfd });
        actors[1].attach(&format!("t{number}")).unwrap();
    }
    actors[2].load("loading");
    let ticket = actors[1].load("unshareable");
    actors[1].transact(|session| session.end_loading(ticket, Ended::Unshareable { reason: "r".into() }, None));
    let (row, facts) = actors[2].reserve("t0", Backend::Posix);
    actors[2].publish_as("t0", None, row, facts, true, true);
    fs::read(room.registry()).unwrap()
}

/// Every verb, as a newcomer; its answers do not matter.
fn every_verb(room: &Room) {
    let actor = Actor::new(&room.path);
    let tried = |work: &dyn Fn(&Actor) -> Result<()>| {
        if let Err(error) = work(&actor) {
            let expected = matches!(
                error,
                Error::Corrupt { .. } | Error::Full { .. } | Error::Refused(_) | Error::Untrusted { .. }
            );
            assert!(expected, "{error:?}");
        }
    };
    tried(&|actor| actor.registry.transact(|session| session.list()).map(drop));
    tried(&|actor| actor.registry.transact(|session| session.living()).map(drop));
    for tag in ["t0", "t1", "loading", "unshareable", "new"] {
        tried(&|actor| {
            actor.registry.transact(|session| {
                match session.acquire(&ask(session, tag, None))? {
                    Acquired::Attach { segment, holders, .. } => {
                        let lease = session.take_lease(segment, 7)?;
                        if let Some(holder) = holders.first() {
                            session.holder_gone(holder.lease)?;
                        }
                        session.release(lease)?;
                        session.segment_lost(segment)?;
                    }
                    Acquired::Load { ticket, .. } => {
                        let row = session.reserve(&key(tag), random_uuid(), Backend::Memfd, 1)?;
                        session.end_loading(ticket, Ended::GaveUp, Some(row))?;
                    }
                    _ => {}
                }
                Ok(())
            })
        });
    }
    tried(&|actor| actor.registry.transact(|session| session.sweep(false)).map(drop));
    tried(&|actor| actor.registry.transact(|session| session.remove("t3", None)).map(drop));
    tried(&|actor| actor.registry.transact(|session| session.check()).map(drop));
    actor.registry.leave();
}

fn with_file(bytes: &[u8], test: impl FnOnce(&Room)) {
    let room = Room::new();
    // Written sparsely: most of the file is zeros.
    let file = fs::File::create(room.registry()).unwrap();
    fs::set_permissions(room.registry(), fs::Permissions::from_mode(0o600)).unwrap();
    for (number, page) in bytes.chunks(4096).enumerate() {
        if page.iter().any(|&byte| byte != 0) {
            std::os::unix::fs::FileExt::write_all_at(&file, page, number as u64 * 4096).unwrap();
        }
    }
    file.set_len(bytes.len() as u64).unwrap();
    test(&room);
}

/// Where there is something to damage: the head, and the first rows of each table.
fn places() -> impl Strategy<Value = u64> {
    let mut ranges: Vec<std::ops::Range<u64>> =
        TABLES.into_iter().map(|table| table.offset()..table.place(table.capacity().min(12))).collect();
    ranges.push(0..128);
    ranges.push(REDO..REDO + 4096);
    prop::sample::select(ranges).prop_flat_map(|range| range)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn flipped_bytes(flips in prop::collection::vec((places(), 1..=255u8), 1..6)) {
        static POPULATED: std::sync::OnceLock<Vec<u8>> = std::sync::OnceLock::new();
        let mut bytes = POPULATED.get_or_init(populated).clone();
        for (place, flip) in flips {
            bytes[usize::try_from(place).unwrap()] ^= flip;
        }
        with_file(&bytes, every_verb);
    }

    #[test]
    fn cut_files(length in prop_oneof![0..200u64, 0..20_000u64, 0..FILE_BYTES]) {
        static POPULATED: std::sync::OnceLock<Vec<u8>> = std::sync::OnceLock::new();
        let mut bytes = POPULATED.get_or_init(populated).clone();
        bytes.truncate(usize::try_from(length).unwrap());
        with_file(&bytes, every_verb);
    }

    /// With the checksums made right again: only the checks of what a row says are left.
    #[test]
    fn lying_rows(lies in prop::collection::vec((0..6u32, 0..12u32, any::<u32>(), any::<u32>()), 1..6)) {
        static POPULATED: std::sync::OnceLock<Vec<u8>> = std::sync::OnceLock::new();
        let mut bytes = POPULATED.get_or_init(populated).clone();
        for (table, index, field, value) in lies {
            lie(&mut bytes, TableId::from_number(table + 1).unwrap(), index, field, value);
        }
        with_file(&bytes, every_verb);
    }
}

/// Sets one 32-bit field of a row to a plausible small number, or to anything, and its checksum to match.
fn lie(bytes: &mut [u8], table: TableId, index: u32, field: u32, value: u32) {
    let start = usize::try_from(table.place(index)).unwrap();
    let row = &mut bytes[start..start + table.stride()];
    let body = if table == TableId::Words { row.len() } else { row.len() - 4 };
    let at = (field as usize % (body / 4)) * 4;
    let value = if value.is_multiple_of(3) { value } else { value % 16 };
    row[at..at + 4].copy_from_slice(&value.to_ne_bytes());
    if body < row.len() {
        let mut sum = crc32fast::Hasher::new();
        sum.update(&(table as u32).to_ne_bytes());
        sum.update(&index.to_ne_bytes());
        sum.update(&row[..body]);
        let sum = sum.finalize();
        row[body..].copy_from_slice(&sum.to_ne_bytes());
    }
}

#[test]
fn every_single_byte_of_the_rows_in_use_matters() {
    let bytes = populated();
    for table in [TableId::Entries, TableId::Segments, TableId::Leases] {
        let place = usize::try_from(table.offset()).unwrap();
        for at in (0..table.stride()).step_by(7) {
            let mut damaged = bytes.clone();
            damaged[place + at] ^= 0x10;
            with_file(&damaged, |room| {
                let actor = Actor::new(&room.path);
                let error = actor.registry.transact(|session| session.check()).unwrap_err();
                assert!(registry_support::is_corrupt(&error), "{error}");
            });
        }
    }
}
