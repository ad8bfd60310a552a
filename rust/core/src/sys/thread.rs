//! How the housekeeping thread is scheduled.
#![allow(unsafe_code)]

/// This thread does not interrupt others when it is woken (SCHED_BATCH, sched(7)): who wakes it is about to rebuild a model, and
/// the scheduler likes to put both on one CPU. Where a user has chosen another policy, that one stays.
pub fn yield_to_others() {
    // SAFETY: 0 is the calling thread; the call reads nothing of ours, and a policy changes no memory.
    unsafe {
        if libc::sched_getscheduler(0) == libc::SCHED_OTHER {
            let parameter = libc::sched_param { sched_priority: 0 };
            libc::sched_setscheduler(0, libc::SCHED_BATCH, &raw const parameter);
        }
    }
}
