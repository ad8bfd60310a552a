//! Who holds what.
//!
//! `request` is what can be asked; `transition` answers, a pure function of (table, who is alive, request);
//! `table` is what it works on; `file`, `overlay`, `commit` and `door` put it on a shared file so that a process may
//! die at any instruction. `check` tells whether a table holds together.
//!
//! A transaction is: lock, look whether it is still the right file, finish what a dead committer began, work, commit,
//! unlock, wake. It never runs its caller's caller's code: constructors and pickles stay outside.

pub mod check;
mod commit;
mod door;
mod file;
mod io;
mod member;
mod overlay;
pub mod request;
mod session;
pub mod table;
pub mod transition;

use std::os::fd::BorrowedFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use rustix::fs::{AtFlags, unlinkat};

use crate::layout::registry::{LOCK, NAMESPACE_MAX, PAGE, file_name, namespace_fits};
use crate::sys::directory::Directory;
use crate::sys::failpoint::{during, reached};
use crate::sys::futex::FutexPage;
use crate::sys::lock::{self, FileId, Kept};
use crate::{Error, Result};

use commit::{Aftermath, Names};
use door::Door;
use file::Head;
use member::{Home, Member};
use overlay::FileTable;
use request::{Holding, LeaseId, ProcessId};
use session::LifeLocks;
use table::Table;

pub use check::Census;
pub use session::{Session, now};
use transition::Transition;
pub use transition::{SweepReport, Swept};

/// How often the file may be replaced under one transaction.
const MOVES: u32 = 16;

type Holdings = Box<dyn Fn() -> Vec<Holding> + Send + Sync>;
type Restored = Box<dyn Fn([u8; 16], LeaseId) + Send + Sync>;

/// The registry of a namespace, as this process uses it. After a fork the child opens one of its own.
pub struct Registry {
    directory: Arc<Directory>,
    namespace: String,
    name: String,
    place: String,
    uid: u32,
    pid: u32,
    holdings: Holdings,
    restored: Restored,
    door: Door,
    /// Our own threads do not see each other's file lock; this one keeps them apart.
    inner: Mutex<Inner>,
    /// The process is going: no thread that is still at work enters the table again.
    closed: AtomicBool,
    /// Apart from `inner`: a waiter must not wait for a transaction.
    page: Mutex<Option<(FileId, Arc<FutexPage>)>>,
}

/// # Errors
/// `BadName`: a namespace becomes part of a file name.
pub fn check_namespace(namespace: &str) -> Result<()> {
    if namespace_fits(namespace) {
        return Ok(());
    }
    Err(Error::BadName(format!(
        "namespace '{namespace}': 1 to {NAMESPACE_MAX} letters, digits, '.', '_' and '-', not ending like a segment's \
         name ('-' and 32 hexadecimal digits)"
    )))
}

#[derive(Debug, Default)]
struct Inner {
    lock: Option<Kept>,
    /// The file that had the name before, as it was when somebody removed it.
    before: Option<Kept>,
    member: Option<Member>,
}

impl Registry {
    /// Opens nothing yet: the first transaction does.
    ///
    /// `holdings` says what this process holds, `restored` hears the new lease of each, when the process has to enter
    /// a table that does not know it (the file was removed, its descriptors were closed). Both are called under the
    /// registry's lock: they must not call the registry, nor wait for a lock that is held while it is called.
    pub fn open(
        directory: Arc<Directory>,
        namespace: &str,
        holdings: Box<dyn Fn() -> Vec<Holding> + Send + Sync>,
        restored: Box<dyn Fn([u8; 16], LeaseId) + Send + Sync>,
    ) -> Result<Self> {
        check_namespace(namespace)?;
        let uid = rustix::process::geteuid().as_raw();
        let name = file_name(uid, namespace);
        Ok(Self {
            place: directory.shown(&name),
            directory,
            namespace: namespace.to_owned(),
            name,
            uid,
            pid: std::process::id(),
            holdings,
            restored,
            door: Door::default(),
            inner: Mutex::default(),
            closed: AtomicBool::new(false),
            page: Mutex::new(None),
        })
    }

    /// Does `work` under the lock and commits what it changed. If it fails, nothing is. `work` must not call the
    /// registry, and should be short: everybody else waits.
    ///
    /// # Errors
    /// Those of `work`; `Stuck`, `Corrupt`, `Untrusted`, `Full`, `NoRoom` and `Os` of the file.
    pub fn transact<R>(&self, work: impl FnOnce(&mut Session<'_>) -> Result<R>) -> Result<R> {
        let mut inner = self.enter()?;
        let mut after = Aftermath::default();
        let done = self.locked(&mut inner, |inner, file, id, mut head| {
            let mut oracle = LifeLocks::new(file, &self.place);
            let me = self.join(inner, file, id, &mut head, &mut oracle, &mut after)?;
            let mut session = Session::new(FileTable::new(file, &self.place, head.heads), oracle, me);
            let answer = work(&mut session)?;
            reached("decided");
            self.commit_last(file, &mut head, session.table(), &mut after)?;
            Ok(answer)
        });
        drop(inner);
        reached("unlocked");
        self.finish(after);
        reached("woken");
        done
    }

    /// As `transact`, for those who look or clear away: this process does not enter the table for it (entering sweeps), and
    /// no file is made. `None` where there is none. `keep`: what `work` changed is committed.
    pub fn visit<R>(&self, keep: bool, work: impl FnOnce(&mut Session<'_>) -> Result<R>) -> Result<Option<R>> {
        if file::named(&self.directory, &self.name)?.is_none() {
            return Ok(None);
        }
        let mut inner = self.enter()?;
        let mut after = Aftermath::default();
        let done = self.locked(&mut inner, |inner, file, id, mut head| {
            let mut oracle = LifeLocks::new(file, &self.place);
            // Whoever is in the table, or was, comes back first: else he would sweep away what he has.
            let me = match &inner.member {
                Some(_) if keep => self.join(inner, file, id, &mut head, &mut oracle, &mut after)?,
                _ => ProcessId::NOBODY,
            };
            let mut session = Session::new(FileTable::new(file, &self.place, head.heads), oracle, me);
            let answer = work(&mut session)?;
            if keep {
                self.commit_last(file, &mut head, session.table(), &mut after)?;
            }
            Ok(Some(answer))
        });
        drop(inner);
        self.finish(after);
        done
    }

    /// Somebody removed the file that we are in, put another one in its place, or closed the descriptor that says that we
    /// live.
    pub fn lost(&self) -> bool {
        // Who is inside sees it as well.
        let Ok(inner) = self.inner.try_lock() else { return false };
        let Some(member) = &inner.member else { return false };
        let entered = inner.lock.as_ref().map(Kept::id);
        !member.looks_alive()
            || entered.is_some() && file::named(&self.directory, &self.name).is_ok_and(|named| named != entered)
    }

    /// Sleeps while the word has this value, at most `timeout`, often less.
    pub fn wait(&self, word: u32, value: u32, timeout: Duration) {
        let page = self.page.lock().unwrap_or_else(PoisonError::into_inner).clone();
        match page {
            Some((_, page)) => page.wait(word, value, timeout),
            None => std::thread::sleep(timeout.min(Duration::from_millis(10))),
        }
    }

    /// The user whose registry it is: a process may change its own user later.
    pub fn uid(&self) -> u32 {
        self.uid
    }

    pub fn path(&self) -> String {
        self.place.clone()
    }

    pub fn namespace(&self) -> &str {
        &self.namespace
    }

    /// As `leave`, for good.
    pub fn close(&self) {
        // Before our rows go: who makes something for a row of ours, and finds this unset afterwards, made it in time.
        self.closed.store(true, Ordering::SeqCst);
        self.leave();
    }

    pub fn is_closed(&self) -> bool {
        self.closed.load(Ordering::SeqCst)
    }

    /// Takes this process out of the table. Where that fails it is swept away once it is dead.
    pub fn leave(&self) {
        let Ok(mut inner) = self.enter() else { return };
        let entered = inner.lock.as_ref().filter(|_| inner.member.is_some()).map(Kept::id);
        // A file that was removed, or replaced, does not know us; nor is one made only to be left.
        if entered.is_none() || entered != file::named(&self.directory, &self.name).ok().flatten() {
            inner.member = None;
            return;
        }
        let mut after = Aftermath::default();
        let _ = self.locked(&mut inner, |inner, file, _, mut head| {
            let Some(member) = inner.member.take() else { return Ok(()) };
            let mut table = FileTable::new(file, &self.place, head.heads);
            let mut oracle = LifeLocks::new(file, &self.place);
            if member.valid(head.uuid, &mut table, &mut oracle)? {
                let mut session = Session::new(table, oracle, member.me);
                session.leave()?;
                self.commit(file, &mut head, session.table(), &mut after)?;
            }
            Ok(())
        });
        drop(inner);
        self.finish(after);
    }

    /// Removes the registry's file if no other process lives in it and nothing is held or pinned. `true`: there is
    /// none any more.
    pub fn remove_file_if_unused(&self) -> Result<bool> {
        if file::named(&self.directory, &self.name)?.is_none() {
            return Ok(true);
        }
        let mut inner = self.enter()?;
        let mut after = Aftermath::default();
        let removed = self.locked(&mut inner, |inner, file, _, mut head| {
            let mut oracle = LifeLocks::new(file, &self.place);
            let mut table = FileTable::new(file, &self.place, head.heads);
            let ours = match &inner.member {
                Some(member) => member.valid(head.uuid, &mut table, &mut oracle)?,
                None => false,
            };
            let mut session = Session::new(table, oracle, ProcessId::NOBODY);
            session.sweep(false)?;
            let census = session.check()?;
            self.commit(file, &mut head, session.table(), &mut after)?;
            if census.processes > u32::from(ours) || census.segments > 0 {
                return Ok(false);
            }
            unlinkat(&*self.directory, &self.name, AtFlags::empty())
                .map_err(|errno| Error::os("unlink", &self.place, errno))?;
            inner.member = None;
            Ok(true)
        });
        if matches!(removed, Ok(true)) {
            inner.lock = None;
        }
        drop(inner);
        self.finish(after);
        removed
    }

    /// The mutex. A stuck store and a forked child do not get as far as that: nobody may ever unlock it there.
    fn enter(&self) -> Result<MutexGuard<'_, Inner>> {
        if self.pid != std::process::id() {
            let why = std::io::Error::other("opened before this process was forked; it needs one of its own");
            return Err(Error::os("use", &self.place, why));
        }
        self.door.check(&self.place)?;
        let inner = self.inner.lock().unwrap_or_else(PoisonError::into_inner);
        // Whoever was before us in the queue may have found it stuck: one deadline for all of us, not one each.
        self.door.check(&self.place)?;
        Ok(inner)
    }

    /// Under the lock of the file that has the name.
    fn locked<R>(
        &self,
        inner: &mut Inner,
        work: impl FnOnce(&mut Inner, BorrowedFd<'_>, FileId, Head) -> Result<R>,
    ) -> Result<R> {
        for _ in 0..MOVES {
            let kept = match inner.lock.take() {
                Some(kept) => kept,
                None => Kept::open(0, || file::open(&self.directory, &self.name))
                    .map_err(|error| file::explain(&self.directory, &self.name, error))?,
            };
            let Some(fd) = kept.fd() else { continue };
            let entered = self.door.enter(fd, kept.id(), &self.directory, &self.name);
            if matches!(entered, Ok(None)) {
                drop(entered);
                inner.before = Some(kept);
                continue;
            }
            let done = entered.and_then(|_locked| {
                reached("locked");
                let head = file::read_head(fd, &self.place)?;
                self.map_page(kept.id());
                work(inner, fd, kept.id(), head)
            });
            inner.lock = Some(kept);
            return done;
        }
        Err(Error::os("open", &self.place, std::io::Error::other("it is replaced again and again")))
    }

    /// Who we are in this table; entered first where it does not know us.
    fn join(
        &self,
        inner: &mut Inner,
        file: BorrowedFd<'_>,
        id: FileId,
        head: &mut Head,
        oracle: &mut LifeLocks<'_>,
        after: &mut Aftermath,
    ) -> Result<ProcessId> {
        let mut table = FileTable::new(file, &self.place, head.heads);
        if let Some(member) = &inner.member
            && member.valid(head.uuid, &mut table, oracle)?
        {
            return Ok(member.me);
        }
        inner.member = None;
        during("enter", || {
            if self.is_closed() {
                return Err(Error::Refused(format!("{}: this process is about to exit", self.place)));
            }
            let mut holdings = (self.holdings)();
            if let Some(before) = inner.before.take() {
                // Best effort: where it cannot be read, what we hold keeps the name that it had once.
                let _ = self.recall(&before, &mut holdings);
            }
            let mut table = FileTable::new(file, &self.place, head.heads);
            let home = Home { directory: &self.directory, name: &self.name, id, uuid: head.uuid };
            let (member, leases) = Member::join(&home, &holdings, &mut table, oracle)?;
            self.commit(file, head, &mut table, after)?;
            let me = member.me;
            inner.member = Some(member);
            leases.into_iter().for_each(|(uuid, lease)| (self.restored)(uuid, lease));
            // In a commit of its own: it may need more room than there is, and to enter needs next to none.
            match self.sweep(file, head, oracle, after) {
                Ok(()) | Err(Error::NoRoom { .. }) => Ok(me),
                Err(error) => Err(error),
            }
        })
    }

    fn sweep(
        &self,
        file: BorrowedFd<'_>,
        head: &mut Head,
        oracle: &mut LifeLocks<'_>,
        after: &mut Aftermath,
    ) -> Result<()> {
        let mut table = FileTable::new(file, &self.place, head.heads);
        Transition { table: &mut table, oracle, now: now() }.sweep()?;
        self.commit(file, head, &mut table, after)?;
        commit::trim(file);
        Ok(())
    }

    /// What the file that was removed said of our holdings: one may have lost its name in it, by `remove` or to a successor.
    fn recall(&self, before: &Kept, holdings: &mut [Holding]) -> Result<()> {
        let Some(file) = before.fd() else { return Ok(()) };
        if !lock::try_lock(file, LOCK).map_err(|error| Error::os("lock", &self.place, error))? {
            return Ok(());
        }
        let _locked = door::Locked { file };
        let head = file::read_head(file, &self.place)?;
        let mut table = FileTable::new(file, &self.place, head.heads);
        let mut oracle = LifeLocks::new(file, &self.place);
        let mut transition = Transition { table: &mut table, oracle: &mut oracle, now: 0 };
        for holding in holdings {
            if let Some((named, pinned)) = transition.name_of(holding.content.facts.uuid)? {
                holding.named &= named;
                holding.content.pinned = pinned;
            }
        }
        Ok(())
    }

    /// Without it waiters sleep a little instead: it is not worth failing for.
    fn map_page(&self, id: FileId) {
        let mut page = self.page.lock().unwrap_or_else(PoisonError::into_inner);
        if page.as_ref().is_some_and(|(mapped, _)| *mapped == id) {
            return;
        }
        // An `open` of its own: the mapping keeps its description, and would keep a lock taken through it.
        *page = Kept::open(0, || file::open(&self.directory, &self.name))
            .ok()
            .filter(|own| own.id() == id)
            .and_then(|own| FutexPage::map(own.fd()?, PAGE).ok())
            .map(|mapped| (id, Arc::new(mapped)));
    }

    fn commit(
        &self,
        file: BorrowedFd<'_>,
        head: &mut Head,
        table: &mut FileTable<'_>,
        after: &mut Aftermath,
    ) -> Result<()> {
        let names = Names { directory: &self.directory, namespace: &self.namespace, uid: self.uid };
        commit::commit(file, &self.place, &names, &mut head.counters, table, after)?;
        head.heads = table.heads();
        Ok(())
    }

    /// As `commit`, for the last one of a transaction: nothing is read after it. Once the commit counter has moved it
    /// happened, whatever became of the rows; an answer that was lost would leave a loader without its ticket.
    fn commit_last(
        &self,
        file: BorrowedFd<'_>,
        head: &mut Head,
        table: &mut FileTable<'_>,
        after: &mut Aftermath,
    ) -> Result<()> {
        let before = head.counters.committed;
        self.commit(file, head, table, after)
            .or_else(|error| if head.counters.committed == before { Err(error) } else { Ok(()) })
    }

    /// What may take its time, or would only make others run into the lock.
    fn finish(&self, after: Aftermath) {
        let page = self.page.lock().unwrap_or_else(PoisonError::into_inner).clone();
        if let Some((_, page)) = page {
            after.wake.iter().for_each(|&word| page.wake(word));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::lock::in_forked_child;

    #[test]
    fn a_forked_child_needs_a_registry_of_its_own() {
        let path = std::path::Path::new("/dev/shm").join(format!("onecopy-fork-{}", std::process::id()));
        std::fs::create_dir(&path).unwrap();
        let directory = Arc::new(Directory::open(&path).unwrap());
        let open = || Registry::open(directory.clone(), "fork", Box::new(Vec::new), Box::new(|_, _| ())).unwrap();
        let parents = open();
        let parent = parents.transact(|session| Ok(session.me())).unwrap();
        // Even while the parent is inside: the child waits for nothing of its parent's.
        let inside = parents.transact(|session| {
            let me = session.me();
            Ok(in_forked_child(|| parents.transact(|_| Ok(())).is_err() && me == parent))
        });
        assert!(inside.unwrap());
        assert!(in_forked_child(|| {
            let own = open();
            let apart = own.transact(|session| Ok(session.me() != parent && session.living()?.len() == 2));
            drop(parents.transact(|_| Ok(())));
            own.leave();
            apart.unwrap()
        }));
        let living = parents.transact(|session| Ok((session.me(), session.living()?.len())));
        assert_eq!(living.unwrap(), (parent, 1), "the parent lives on in its row");
        drop(parents);
        std::fs::remove_dir_all(path).unwrap();
    }
}
