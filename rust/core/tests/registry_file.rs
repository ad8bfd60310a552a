//! The registry on its file, in one process: trust, removal under live users, descriptors closed behind our back.

mod registry_support;

use std::fs::{self, File, OpenOptions, Permissions};
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt, symlink};

use onecopy_core::Error;
use onecopy_core::registry::request::{Acquired, Ended, Holding, Published, State};
use onecopy_core::words::{Backend, Content};
use registry_support::{Actor, NAMESPACE, Room, content, facts, key, lease, random_uuid};

#[test]
fn one_loads_the_others_attach_and_the_last_frees() {
    let room = Room::new();
    let (one, two) = (Actor::new(&room.path), Actor::new(&room.path));
    let ticket = one.load("t");
    let Acquired::Wait { loader, futex_word, futex_value, episode, .. } = two.acquire("t") else { panic!() };
    assert_eq!((loader.pid, episode), (std::process::id(), ticket.episode));
    let (row, facts) = one.reserve("t", Backend::Posix);
    let first = lease(one.publish("t", Some(ticket), row, facts));
    // The word has moved on: this returns at once, or the test never ends.
    two.registry.wait(futex_word, futex_value, std::time::Duration::from_secs(3600));
    let second = two.attach("t").unwrap();
    assert_eq!(one.check().leases, 2);
    one.release(first);
    one.release(first);
    assert!(room.object(&facts.uuid).exists());
    two.release(second);
    assert!(!room.object(&facts.uuid).exists());
    let census = two.check();
    assert_eq!((census.entries, census.segments, census.leases, census.processes), (0, 0, 0, 2));
}

#[test]
fn a_transaction_that_fails_or_changes_nothing_writes_nothing() {
    let room = Room::new();
    let actor = Actor::new(&room.path);
    actor.provide("t", Backend::Memfd);
    let before = fs::read(room.registry()).unwrap();
    let failed = actor.registry.transact(|session| {
        session.remove("t", None)?;
        Err::<(), _>(Error::BadName("on purpose".to_owned()))
    });
    assert!(matches!(failed, Err(Error::BadName(_))));
    actor.transact(|session| session.list());
    actor.transact(|session| session.sweep(true));
    assert!(matches!(actor.acquire("t"), Acquired::Attach { .. }));
    assert!(before == fs::read(room.registry()).unwrap(), "the file changed");
}

#[test]
fn replaced_content_lives_until_its_last_lease() {
    let room = Room::new();
    let (one, two) = (Actor::new(&room.path), Actor::new(&room.path));
    let old = one.provide("t", Backend::Posix);
    let (row, newer) = two.reserve("t", Backend::Posix);
    assert!(matches!(two.publish("t", None, row, newer), Published::Exists { loading: false, .. }));
    let Published::Ready { generation: 2, .. } = two.publish_as("t", None, row, newer, true, false) else { panic!() };
    let listed = one.transact(|session| session.list());
    assert_eq!(listed.iter().map(|row| (row.unnamed, row.generation)).collect::<Vec<_>>(), [(false, 2), (true, 1)]);
    one.release(old);
    assert_eq!(one.check().segments, 1);
    assert_eq!(room.objects().len(), 1);
    assert_eq!(one.transact(|session| session.remove("t", None)), 1);
    assert!(matches!(one.acquire("t"), Acquired::Load { .. }));
    assert_eq!(one.check().segments, 1, "removed, and still held");
}

#[test]
fn pinned_content_stays_without_leases_until_removed() {
    let room = Room::new();
    let one = Actor::new(&room.path);
    let (row, facts) = one.reserve("t", Backend::Posix);
    let held = lease(one.publish_as("t", None, row, facts, false, true));
    one.release(held);
    one.registry.leave();
    let two = Actor::new(&room.path);
    assert_eq!(two.check_swept(&room).segments, 1);
    assert!(!two.registry.remove_file_if_unused().unwrap());
    assert!(matches!(two.acquire("t"), Acquired::Attach { holders, .. } if holders.is_empty()));
    assert_eq!(two.transact(|session| session.remove("t", None)), 1);
    assert!(room.objects().is_empty());
    assert!(two.registry.remove_file_if_unused().unwrap());
    assert!(!room.registry().exists());
}

#[test]
fn failures_send_those_who_waited_their_own_way() {
    let room = Room::new();
    let [one, two, three] = [(); 3].map(|()| Actor::new(&room.path));
    let ticket = one.load("t");
    let Acquired::Wait { episode, .. } = two.acquire("t") else { panic!() };
    one.fail(ticket, "first");
    let Acquired::Load { ticket: again, retry: true } = two.acquire_after("t", Some(episode)) else { panic!() };
    assert!(matches!(three.acquire_after("t", Some(episode)), Acquired::Wait { .. }));
    one.fail(ticket, "too late: the ticket was overtaken");
    two.fail(again, "second");
    assert!(matches!(three.acquire_after("t", Some(episode)), Acquired::GoPrivate { reason } if reason == "second"));
    let Acquired::Load { ticket: fresh, retry: false } = one.acquire("t") else { panic!() };
    assert!(fresh.episode > episode);
    assert!(matches!(three.acquire_after("t", Some(episode)), Acquired::GoPrivate { .. }));
    one.transact(|session| session.end_loading(fresh, Ended::GaveUp, None));
    assert!(matches!(two.acquire("t"), Acquired::Load { retry: false, .. }));
}

#[test]
fn unshareable_until_the_last_who_saw_it_left() {
    let room = Room::new();
    let (one, two) = (Actor::new(&room.path), Actor::new(&room.path));
    let ticket = one.load("t");
    let ended = Ended::Unshareable { reason: "a generator".to_owned() };
    one.transact(|session| session.end_loading(ticket, ended, None));
    for _ in 0..2 {
        assert!(matches!(two.acquire("t"), Acquired::Unshareable { reason } if reason == "a generator"));
    }
    assert_eq!(two.check().leases, 2);
    one.registry.leave();
    assert!(matches!(two.acquire("t"), Acquired::Unshareable { .. }));
    two.registry.leave();
    assert!(matches!(one.acquire("t"), Acquired::Load { .. }));
}

#[test]
fn who_joins_sweeps_what_the_dead_left() {
    let room = Room::new();
    let dead = Actor::new(&room.path);
    dead.provide("t", Backend::Posix);
    dead.load("u");
    dead.reserve("u", Backend::Posix);
    assert_eq!(room.objects().len(), 2);
    // Its descriptors close: to the others that is its death.
    drop(dead);
    let census = Actor::new(&room.path).check();
    assert_eq!((census.processes, census.segments, census.leases), (1, 0, 0));
    assert!(room.objects().is_empty());
}

#[test]
fn whoever_had_to_wait_counts_as_progress() {
    let room = Room::new();
    let (one, two) = (Actor::new(&room.path), Actor::new(&room.path));
    one.check();
    two.check();
    let file = File::open(room.registry()).unwrap();
    let turns = || {
        let mut bytes = [0; 8];
        file.read_exact_at(&mut bytes, 80).unwrap();
        u64::from_ne_bytes(bytes)
    };
    assert_eq!(turns(), 0);
    // The second may come too late to wait; then they meet again.
    while turns() == 0 {
        let meet = std::sync::Barrier::new(2);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                meet.wait();
                two.transact(|session| session.list())
            });
            one.transact(|session| {
                meet.wait();
                std::thread::sleep(std::time::Duration::from_millis(2));
                session.list()
            });
        });
    }
}

#[test]
fn a_dropped_lease_is_not_mistaken_for_its_successor() {
    let room = Room::new();
    let (one, two) = (Actor::new(&room.path), Actor::new(&room.path));
    one.provide("t", Backend::Memfd);
    let stale = two.attach("t").unwrap();
    one.transact(|session| session.holder_gone(stale));
    let fresh = two.attach("t").unwrap();
    assert_eq!(stale.row, fresh.row);
    two.release(stale);
    assert_eq!(one.check().leases, 2);
}

#[test]
fn what_is_held_comes_along_into_a_new_file() {
    let room = Room::new();
    let facts = facts(random_uuid(), Backend::Memfd);
    let content = Content { generation: 3, ..content(facts) };
    let holding = Holding { key: key("t"), content, fd: 7, named: true };
    let [one, two] = [(); 2].map(|()| Actor::holding(&room.path, vec![holding.clone()]));
    let three = Actor::new(&room.path);
    assert_eq!(one.check().leases, 1);
    assert_eq!(two.check().leases, 2);
    // Into an empty one with the name.
    fs::remove_file(room.registry()).unwrap();
    assert_eq!(two.check().leases, 1);
    assert!(
        matches!(three.acquire("t"), Acquired::Attach { content: Content { generation: 3, facts: known, .. }, .. } if known == facts)
    );
    assert_eq!(one.check().leases, 2);

    fs::remove_file(room.registry()).unwrap();
    // A newcomer finds nothing and loads; who comes back later keeps its lease, without the name.
    let ticket = three.load("t");
    let listed = one.transact(|session| session.list());
    let states: Vec<_> = listed.iter().map(|row| (row.state, row.unnamed, row.holders.len())).collect();
    assert_eq!(states, [(State::Loading, false, 0), (State::Ready, true, 1)]);
    three.transact(|session| session.end_loading(ticket, Ended::GaveUp, None));
    assert_eq!(two.check().leases, 2);

    // Emptied under everybody, not removed.
    File::options().write(true).open(room.registry()).unwrap().set_len(0).unwrap();
    assert_eq!(two.check().leases, 1);
    assert_eq!(one.check().leases, 2);
    assert_eq!(three.check().processes, 3);
}

/// Neither `remove` nor `pin` is forgotten with the file: what is held says how the old one knew it.
#[test]
fn a_name_that_was_taken_away_does_not_come_back_with_a_new_file() {
    let room = Room::new();
    let [removed, pinned] =
        [false, true].map(|pinned| Content { pinned, ..content(facts(random_uuid(), Backend::Memfd)) });
    let holdings = [("removed", &removed), ("pinned", &pinned)].map(|(tag, content)| Holding {
        key: key(tag),
        content: content.clone(),
        fd: 7,
        named: true,
    });
    let actor = Actor::holding(&room.path, holdings.to_vec());
    actor.transact(|session| session.remove("removed", None));
    fs::remove_file(room.registry()).unwrap();
    let listed = actor.transact(|session| session.list());
    let known: Vec<_> = listed.iter().map(|row| (&*row.key.tag, row.unnamed, row.pinned)).collect();
    assert_eq!(known, [("removed", true, false), ("pinned", false, true)]);
}

/// Whoever comes back first: the content published last has the name, and is as pinned as it was.
#[test]
fn the_newer_of_two_generations_keeps_the_name() {
    let [old, new] = [1, 2].map(|since| Content {
        since,
        generation: since,
        pinned: since == 2,
        ..content(facts(random_uuid(), Backend::Memfd))
    });
    for order in [[&old, &new], [&new, &old]] {
        let room = Room::new();
        let actors = order.map(|content| {
            let actor = Actor::holding(
                &room.path,
                vec![Holding { key: key("t"), content: content.clone(), fd: 7, named: true }],
            );
            actor.check();
            actor
        });
        let listed = actors[0].transact(|session| session.list());
        let named: Vec<_> = listed.iter().filter(|row| !row.unnamed).map(|row| (row.generation, row.pinned)).collect();
        assert_eq!(named, [(2, true)]);
        assert_eq!(actors[0].check().leases, 2);
    }
}

#[test]
fn descriptors_closed_behind_our_back() {
    let room = Room::new();
    let one = Actor::new(&room.path);
    let two = Actor::new(&room.path);
    let held = one.provide("t", Backend::Memfd);
    two.attach("t").unwrap();
    let registry = fs::metadata(room.registry()).unwrap();
    let ours: Vec<i32> = open_descriptors()
        .into_iter()
        .filter(|fd| fs::metadata(format!("/proc/self/fd/{fd}")).is_ok_and(|data| data.ino() == registry.ino()))
        .collect();
    assert_eq!(ours.len(), 4, "a lock and a life each: {ours:?}");
    for fd in ours {
        // As a daemon does; its owners notice. What comes next gets the numbers.
        nix::unistd::close(fd).unwrap();
    }
    let others: Vec<File> = (0..8).map(|_| File::open("/dev/null").unwrap()).collect();
    assert_eq!(two.check().processes, 1, "the dead were swept when we came back");
    assert!(matches!(two.acquire("t"), Acquired::Load { .. }));
    one.release(held);
    assert_eq!(one.check().processes, 2);
    for file in &others {
        assert!(file.metadata().is_ok(), "closed a descriptor that was not ours");
    }
}

fn open_descriptors() -> Vec<i32> {
    let names = fs::read_dir("/proc/self/fd").unwrap().map(|entry| entry.unwrap().file_name());
    names.map(|name| name.to_str().unwrap().parse().unwrap()).collect()
}

#[test]
fn another_ones_file_is_not_touched() {
    let refused = |prepare: &dyn Fn(&Room)| {
        let room = Room::new();
        prepare(&room);
        let error = Actor::new(&room.path).registry.transact(|session| session.list()).unwrap_err();
        assert!(matches!(error, Error::Untrusted { .. }), "{error}");
        assert!(error.to_string().contains(NAMESPACE), "{error}");
    };
    refused(&|room| {
        File::create(room.registry()).unwrap();
        fs::set_permissions(room.registry(), Permissions::from_mode(0o666)).unwrap();
    });
    refused(&|room| symlink("/dev/null", room.registry()).unwrap());
    refused(&|room| fs::create_dir(room.registry()).unwrap());
    refused(&|room| {
        File::create(room.path.join("other")).unwrap();
        fs::set_permissions(room.path.join("other"), Permissions::from_mode(0o600)).unwrap();
        fs::hard_link(room.path.join("other"), room.registry()).unwrap();
    });
    if rustix::process::geteuid().is_root() {
        refused(&|room| {
            File::create(room.registry()).unwrap();
            fs::set_permissions(room.registry(), Permissions::from_mode(0o600)).unwrap();
            std::os::unix::fs::chown(room.registry(), Some(65534), None).unwrap();
        });
    }
}

#[test]
fn foreign_and_cut_files_are_named() {
    let corrupt = |change: &dyn Fn(&File)| {
        let room = Room::new();
        Actor::new(&room.path).provide("t", Backend::Memfd);
        change(&OpenOptions::new().write(true).open(room.registry()).unwrap());
        let error = Actor::new(&room.path).registry.transact(|session| session.list()).unwrap_err();
        assert!(registry_support::is_corrupt(&error), "{error}");
        let told = error.to_string();
        assert!(told.contains(room.registry().to_str().unwrap()) && told.contains("found"), "{told}");
        told
    };
    assert!(corrupt(&|file| file.write_all_at(b"ELF", 0).unwrap()).contains("magic"));
    assert!(corrupt(&|file| file.write_all_at(&[9], 8).unwrap()).contains("format (found 9, expected 1)"));
    assert!(corrupt(&|file| file.write_all_at(&[9], 20).unwrap()).contains("checksum of the head"));
    assert!(corrupt(&|file| file.write_all_at(&[9], 64).unwrap()).contains("commit counters"));
    assert!(corrupt(&|file| file.write_all_at(&[9], 130).unwrap()).contains("checksum of the heads"));
    corrupt(&|file| file.set_len(100).unwrap());
    corrupt(&|file| file.set_len(4096).unwrap());
}

#[test]
fn a_tag_that_does_not_fit_is_refused() {
    let room = Room::new();
    let actor = Actor::new(&room.path);
    let long = "x".repeat(256);
    let refused = actor.registry.transact(|session| session.acquire(&registry_support::ask(session, &long, None)));
    assert!(matches!(refused, Err(Error::BadName(_))));
    assert_eq!(actor.check().entries, 0);
}

#[test]
fn full_tables_are_swept_before_they_refuse() {
    let room = Room::new();
    let actor = Actor::new(&room.path);
    for first in (0..4096).step_by(64) {
        actor.transact(|session| {
            for number in first..first + 64 {
                session.acquire(&registry_support::ask(session, &format!("t{number}"), None))?;
            }
            Ok(())
        });
    }
    let full = actor.registry.transact(|session| session.acquire(&registry_support::ask(session, "more", None)));
    assert!(matches!(full, Err(Error::Full { table: "tags", capacity: 4096, .. })), "{full:?}");
    assert_eq!(actor.check().entries, 4096);
    actor.registry.leave();
    let census = actor.check();
    assert_eq!((census.entries, census.processes), (0, 1));
}

/// Needs the right to mount; without it there is nothing to fill.
#[test]
fn a_full_file_system_is_a_clean_error_and_releasing_still_works() {
    let room = Room::new();
    let mount = std::process::Command::new("mount")
        .args(["-t", "tmpfs", "-o", "size=128k,mode=700", "onecopy-test"])
        .arg(&room.path)
        .stderr(std::process::Stdio::null())
        .status();
    if !mount.is_ok_and(|status| status.success()) {
        eprintln!("not run: this user may not mount a tmpfs");
        return;
    }
    let _mounted = Mounted(&room);
    let (one, two) = (Actor::new(&room.path), Actor::new(&room.path));
    let held = one.provide("t", Backend::Memfd);
    two.attach("t").unwrap();
    // Some other program fills the rest.
    let filler = File::create(room.path.join("filler")).unwrap();
    let mut at = 0;
    while filler.write_at(&[1; 4096], at).is_ok() {
        at += 4096;
    }
    // One by one, each small enough for the room that is kept: the rows themselves run out of it.
    let mut made = 1;
    let refused = loop {
        let tag = format!("t{made}");
        match one.registry.transact(|session| session.acquire(&registry_support::ask(session, &tag, None))) {
            Ok(_) => made += 1,
            Err(error) => break error,
        }
    };
    assert!(matches!(refused, Error::NoRoom { .. }), "{refused:?}");
    // And one that is too long for it.
    let refused = one.registry.transact(|session| {
        for number in 0..64 {
            session.acquire(&registry_support::ask(session, &format!("u{number}"), None))?;
        }
        Ok(())
    });
    assert!(matches!(refused, Err(Error::NoRoom { .. })), "{refused:?}");
    let census = two.check();
    assert_eq!((census.entries, census.leases), (made, 2), "as before");
    one.release(held);
    one.registry.leave();
    two.registry.leave();
    drop(filler);
    fs::remove_file(room.path.join("filler")).unwrap();
    let census = two.check();
    assert_eq!((census.entries, census.leases, census.processes), (0, 0, 1));
}

struct Mounted<'r>(&'r Room);

impl Drop for Mounted<'_> {
    fn drop(&mut self) {
        let _ = std::process::Command::new("umount").args(["-l"]).arg(&self.0.path).status();
    }
}
