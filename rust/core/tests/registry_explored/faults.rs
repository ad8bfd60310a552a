//! What could be broken, each caught by the property that it belongs to.

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Fault {
    None,
    /// The oracle takes living loaders for dead.
    LoadersLookDead,
    /// READY is said before the segment is filled and sealed.
    PublishBeforeSeal,
    /// A lease is taken, whether the segment could be opened or not.
    LeaseWithoutOpening,
    /// The descriptor is closed before the lease is given back, and the process may be interrupted between the two.
    CloseBeforeRelease,
    /// Names of freed objects are not removed.
    NamesStay,
    /// The futex word does not change.
    NobodyIsWoken,
    /// What a stuck registry did not take is forgotten.
    DebtsAreForgotten,
}
