//! The allocator of the programs, and files as memory.

use std::path::Path;

use candle_core::Result;
use candle_core::safetensors::MmapedSafetensors;

/// Keeps freed memory for later instead of giving it back to the system. A training step frees
/// and takes the same gigabytes again and again, and pages from the system have to be cleared
/// anew. The peak stays what it is. For programs that use mimalloc, before they begin.
pub fn keep_freed() {
    // SAFETY: sets a number inside the allocator; at start, before other threads.
    unsafe { libmimalloc_sys::mi_option_set(PURGE_DELAY, -1) };
}

/// `mi_option_purge_delay` of mimalloc 2 and 3: milliseconds until freed memory is given back.
const PURGE_DELAY: libmimalloc_sys::mi_option_t = 15;

/// The tensors of a file, read from it when they are asked for.
///
/// # Errors
/// When the file cannot be read or is not of the safetensors format.
pub fn map_tensors(path: &Path) -> Result<MmapedSafetensors> {
    // SAFETY: a mapping shows what others write to the file meanwhile. Checkpoints are replaced
    // by renaming, which leaves an open file as it is; cutting one short while it is being
    // loaded ends the program, as with every loader of this format.
    unsafe { MmapedSafetensors::new(path) }
}
