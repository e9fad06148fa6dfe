//! The allocator of the programs.

/// Keeps freed memory for later instead of giving it back to the system. A training step frees
/// and takes the same gigabytes again and again, and pages from the system have to be cleared
/// anew. The peak stays what it is. For programs that use mimalloc, before they begin.
pub fn keep_freed() {
    // SAFETY: sets a number inside the allocator; at start, before other threads.
    unsafe { libmimalloc_sys::mi_option_set(PURGE_DELAY, -1) };
}

/// `mi_option_purge_delay` of mimalloc 2 and 3: milliseconds until freed memory is given back.
const PURGE_DELAY: libmimalloc_sys::mi_option_t = 15;
