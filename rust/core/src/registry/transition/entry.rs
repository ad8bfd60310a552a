//! Entries: found by the hash of their key, freed when there is nothing left to remember.

use std::hash::Hasher;

use siphasher::sip128::{Hasher128, SipHasher13};

use super::super::request::ProcessId;
use super::super::table::{Oracle, Table};
use super::{Steps, Transition};
use crate::layout::registry::rows::{FREE, LOADING, VACANT};
use crate::layout::registry::text::Text;
use crate::layout::registry::{Bucket, Entry, NONE, TableId, Word};
use crate::words::{Constructor, Key};
use crate::{Error, Result};

/// Names the key in the table: 128 bits over the whole texts, however much of them a row has room for.
pub fn key_hash(key: &Key) -> [u8; 16] {
    let mut hasher = SipHasher13::new();
    for text in [&key.tag, &key.version, &key.compatibility] {
        hasher.write_u64(text.len() as u64);
        hasher.write(text.as_bytes());
    }
    hasher.finish128().as_bytes()
}

/// Where an entry with this hash belongs, of so many buckets (or futex words).
pub fn bucket_of(hash: [u8; 16], buckets: u32) -> u32 {
    let [a, b, c, d, ..] = hash;
    u32::from_ne_bytes([a, b, c, d]) % buckets.max(1)
}

pub(super) fn key(entry: &Entry) -> Key {
    Key { tag: entry.tag.to_text(), version: entry.version.to_text(), compatibility: entry.compatibility.to_text() }
}

pub(super) fn loader(entry: &Entry) -> ProcessId {
    ProcessId { slot: entry.loader_slot, generation: entry.loader_generation }
}

pub(super) fn set_loader(entry: &mut Entry, loader: Option<ProcessId>) {
    (entry.loader_slot, entry.loader_generation) = loader.map_or((NONE, 0), |id| (id.slot, id.generation));
}

pub(super) fn set_constructor(entry: &mut Entry, constructor: &Constructor) {
    entry.constructor = Text::new(&constructor.name);
    entry.code_hash = constructor.code_hash;
}

impl<T: Table, O: Oracle> Transition<'_, T, O> {
    pub(super) fn entry(&mut self, index: u32) -> Result<Entry> {
        let entry: Entry = self.table.get(index)?;
        if entry.state == FREE {
            return Err(self.table.corrupt("entry", "a free row", "one in use"));
        }
        Ok(entry)
    }

    fn place(&self, hash: [u8; 16], kind: TableId) -> u32 {
        bucket_of(hash, self.table.capacity(kind))
    }

    pub(super) fn find(&mut self, key: &Key) -> Result<Option<u32>> {
        let hash = key_hash(key);
        let first: Bucket = self.table.get(self.place(hash, TableId::Buckets))?;
        let mut at = first.first;
        let mut steps = Steps::over(self.table, TableId::Entries);
        while at != NONE {
            steps.next(self.table, "entries of a bucket")?;
            let entry = self.entry(at)?;
            if entry.hash == hash {
                return Ok(Some(at));
            }
            at = entry.next;
        }
        Ok(None)
    }

    pub(super) fn find_or_create(&mut self, key: &Key) -> Result<u32> {
        match self.find(key)? {
            Some(index) => Ok(index),
            None => self.create(key),
        }
    }

    fn create(&mut self, key: &Key) -> Result<u32> {
        let tag = Text::new(&key.tag);
        if key.tag.is_empty() || tag.to_text() != key.tag {
            return Err(Error::BadName(format!(
                "a tag has 1 to 255 bytes of UTF-8, this one has {}: '{}'",
                key.tag.len(),
                tag.to_text()
            )));
        }
        let hash = key_hash(key);
        let index = self.allocate::<Entry>()?;
        let bucket = self.place(hash, TableId::Buckets);
        let first: Bucket = self.table.get(bucket)?;
        self.table.put(bucket, Bucket { first: index })?;
        let entry = Entry {
            hash,
            state: VACANT,
            since: self.now,
            next: first.first,
            word: self.place(hash, TableId::Words),
            tag,
            version: Text::new(&key.version),
            compatibility: Text::new(&key.compatibility),
            ..Entry::BLANK
        };
        self.table.put(index, entry)?;
        Ok(index)
    }

    /// Frees an entry that has nothing to say.
    pub(super) fn settle(&mut self, index: u32) -> Result<()> {
        let entry = self.entry(index)?;
        let remembers = entry.failures != 0 || entry.oom_deaths != 0 || entry.failed_episode != 0;
        if entry.state != VACANT || entry.segments != NONE || remembers {
            return Ok(());
        }
        let bucket = self.place(entry.hash, TableId::Buckets);
        let first: Bucket = self.table.get(bucket)?;
        if first.first == index {
            self.table.put(bucket, Bucket { first: entry.next })?;
            return self.free::<Entry>(index);
        }
        let mut at = first.first;
        let mut steps = Steps::over(self.table, TableId::Entries);
        loop {
            steps.next(self.table, "entries of a bucket")?;
            let mut before = self.entry(at)?;
            if before.next == index {
                before.next = entry.next;
                self.table.put(at, before)?;
                return self.free::<Entry>(index);
            }
            at = before.next;
        }
    }

    /// Those who wait for this entry are to look again.
    pub(super) fn wake(&mut self, index: u32) -> Result<()> {
        let word = self.entry(index)?.word;
        self.table.edit(word, |word: &mut Word| word.value = word.value.wrapping_add(1))
    }

    /// Nothing named, nobody loading; failures and deaths stay remembered.
    pub(super) fn vacate(&mut self, index: u32) -> Result<()> {
        let now = self.now;
        self.table.edit(index, |entry: &mut Entry| {
            entry.state = VACANT;
            entry.since = now;
            entry.current = NONE;
            entry.need = 0;
            set_loader(entry, None);
        })
    }

    /// Failures, deaths and episodes older than `MEMORY` are forgotten.
    pub(super) fn forget(&mut self, index: u32) -> Result<()> {
        self.table.edit(index, |entry: &mut Entry| {
            (entry.failures, entry.failed_episode, entry.episode) = (0, 0, 0);
            (entry.oom_deaths, entry.oom_since) = (0, 0);
            entry.reason = Text::EMPTY;
        })
    }

    /// The numbers of all entries in use.
    pub(super) fn all_entries(&mut self) -> Result<Vec<u32>> {
        let high = self.table.heads().entries.high;
        self.table.ahead::<Entry>(0, high)?;
        let mut found = Vec::new();
        for index in 0..high {
            let entry: Entry = self.table.get(index)?;
            if entry.state != FREE {
                found.push(index);
            }
        }
        Ok(found)
    }

    /// `state` is LOADING, and by this very loader.
    pub(super) fn loads(entry: &Entry, me: ProcessId) -> bool {
        entry.state == LOADING && loader(entry) == me
    }
}
