//! The one pool of threads that kernels run on.

use rayon::prelude::*;

use crate::{Error, Result};

/// Stack of a pool thread: candle's backward pass recurses as deep as the graph.
const STACK_BYTES: usize = 256 << 20;

/// Makes the pool, of as many threads as there are processors if `threads` is 0. For
/// programs, before any other work; without it the pool has its library's defaults.
///
/// # Errors
/// When the pool exists already, or threads cannot be made.
pub fn start(threads: usize) -> Result<()> {
    rayon::ThreadPoolBuilder::new()
        .num_threads(threads)
        .stack_size(STACK_BYTES)
        .thread_name(|i| format!("compute-{i}"))
        .build_global()
        .map_err(|e| Error::invalid("threads", e.to_string()))
}

/// Threads of the pool.
pub fn count() -> usize {
    rayon::current_num_threads()
}

/// Runs `f` on the pool, so that the kernels that it calls need not hand over to it each. What
/// is set for a thread (no gradients, an instruction set) does not go along.
pub fn within<R: Send>(f: impl FnOnce() -> R + Send) -> R {
    if count() == 1 { f() } else { rayon::scope(|_| f()) }
}

/// `each(0) .. each(tasks - 1)`, over threads if `parallel`.
pub fn each(tasks: usize, parallel: bool, each: impl Fn(usize) + Sync + Send) {
    if parallel && tasks > 1 && count() > 1 {
        (0..tasks).into_par_iter().for_each(each);
    } else {
        (0..tasks).for_each(each);
    }
}

/// As [`each`], with results in order.
pub fn map<R: Send>(
    tasks: usize,
    parallel: bool,
    each: impl Fn(usize) -> R + Sync + Send,
) -> Vec<R> {
    if parallel && tasks > 1 && count() > 1 {
        (0..tasks).into_par_iter().map(each).collect()
    } else {
        (0..tasks).map(each).collect()
    }
}

/// `each(i, i-th chunk)`, over threads if `parallel`.
pub fn chunks<T: Send>(
    values: &mut [T],
    size: usize,
    parallel: bool,
    each: impl Fn(usize, &mut [T]) + Sync + Send,
) {
    if parallel && values.len() > size && count() > 1 {
        values.par_chunks_mut(size).enumerate().for_each(|(i, chunk)| each(i, chunk));
    } else {
        values.chunks_mut(size.max(1)).enumerate().for_each(|(i, chunk)| each(i, chunk));
    }
}

/// The memory of a slice that tasks write disjoint elements of.
#[derive(Clone, Copy)]
pub struct Shared<T>(*mut T);
// SAFETY: writing through the pointer is unsafe, and its users' tasks share no element.
unsafe impl<T: Send> Send for Shared<T> {}
// SAFETY: as above.
unsafe impl<T: Send> Sync for Shared<T> {}

impl<T> Shared<T> {
    pub fn of(values: &mut [T]) -> Self {
        Self(values.as_mut_ptr())
    }

    /// The place of an element, which lies in the slice.
    pub fn at(&self, offset: usize) -> *mut T {
        self.0.wrapping_add(offset)
    }
}
