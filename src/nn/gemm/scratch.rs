//! Memory that a thread keeps between calls: fresh pages cost more than many a product.

use std::cell::Cell;

thread_local! {
    static KEPT: Cell<Vec<u64>> = const { Cell::new(Vec::new()) };
}

/// Most bytes that a thread keeps.
const KEEP: usize = 16 << 20;

/// Calls `f` with `length` values of unspecified content. Calls may nest; the
/// inner one then has memory of its own.
pub fn with_scratch<T: bytes::Number, R>(length: usize, f: impl FnOnce(&mut [T]) -> R) -> R {
    let words = (length * size_of::<T>()).div_ceil(size_of::<u64>());
    let mut kept = KEPT.take();
    if kept.len() < words {
        kept.resize(words, 0);
    }
    // SAFETY: any bytes are a valid f32 or f64, and u64 is aligned for both.
    let (_, values, _) = unsafe { kept.align_to_mut::<T>() };
    let result = f(&mut values[..length]);
    if kept.len() * size_of::<u64>() <= KEEP {
        KEPT.set(kept);
    }
    result
}

/// Types of which any bits are a value.
mod bytes {
    pub trait Number: Copy {}
    impl Number for f32 {}
    impl Number for f64 {}
}
pub use bytes::Number;
