//! Which vector instructions the processor has, found at run time.

use std::cell::Cell;
use std::sync::OnceLock;

/// A set of vector instructions that kernels are compiled for. Every kernel
/// exists at every level; [`Level::Plain`] is portable Rust.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Level {
    Plain,
    /// x86-64 with AVX2 and FMA.
    Avx2,
    /// x86-64 with AVX-512 (F, BW, DQ, VL).
    Avx512,
}

thread_local! {
    static FORCED: Cell<Option<Level>> = const { Cell::new(None) };
}

impl Level {
    /// The best level of this processor; the environment variable `DS_SIMD`
    /// (`plain`, `avx2`, `avx512`) lowers it.
    pub fn detect() -> Self {
        static DETECTED: OnceLock<Level> = OnceLock::new();
        *DETECTED.get_or_init(|| {
            let limit = match std::env::var("DS_SIMD").as_deref() {
                Ok("plain") => Self::Plain,
                Ok("avx2") => Self::Avx2,
                Ok("avx512") | Err(_) => Self::Avx512,
                Ok(other) => {
                    tracing::warn!("DS_SIMD: expected plain, avx2 or avx512, got '{other}'");
                    Self::Avx512
                }
            };
            Self::supported().into_iter().filter(|l| *l <= limit).max().unwrap_or(Self::Plain)
        })
    }

    /// Every level that this processor can run.
    pub fn supported() -> Vec<Self> {
        let mut levels = vec![Self::Plain];
        levels.extend(Self::vector_levels());
        levels
    }

    #[cfg(target_arch = "x86_64")]
    fn vector_levels() -> Vec<Self> {
        if !is_x86_feature_detected!("avx2") || !is_x86_feature_detected!("fma") {
            return Vec::new();
        }
        let avx512 = is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512dq")
            && is_x86_feature_detected!("avx512vl");
        if avx512 { vec![Self::Avx2, Self::Avx512] } else { vec![Self::Avx2] }
    }

    #[cfg(not(target_arch = "x86_64"))]
    fn vector_levels() -> Vec<Self> {
        Vec::new()
    }

    /// The level that kernels called from this thread use.
    pub fn current() -> Self {
        FORCED.get().unwrap_or_else(Self::detect)
    }

    /// Runs `f` with the kernels that it calls at this level (at most the
    /// processor's best), so that tests can compare levels.
    pub fn run<R>(self, f: impl FnOnce() -> R) -> R {
        let usable = Self::supported().into_iter().filter(|l| *l <= self).max();
        struct Restore(Option<Level>);
        impl Drop for Restore {
            fn drop(&mut self) {
                FORCED.set(self.0);
            }
        }
        let _restore = Restore(FORCED.replace(usable));
        f()
    }
}

/// Compiles a function for every [`Level`] and picks one at run time: its
/// loops are plain Rust that the compiler vectorises for each. The generated
/// function takes the level as its first argument; its body sees a constant
/// `FMA`, whether the target multiplies and adds in one instruction.
macro_rules! vectorised {
    ($(#[$meta:meta])* $vis:vis fn $name:ident<T: Real $(, $g:ident : $bound:path)*>(
        $($arg:ident : $ty:ty),* $(,)?
    ) $(-> $ret:ty)? $body:block) => {
        $(#[$meta])*
        #[allow(clippy::too_many_arguments)]
        $vis fn $name<T: Real $(, $g: $bound)*>(
            level: $crate::nn::simd::Level, $($arg: $ty),*
        ) $(-> $ret)? {
            #[inline(always)]
            #[allow(clippy::too_many_arguments)]
            #[allow(clippy::extra_unused_type_parameters)]
            fn body<const FMA: bool, T: Real $(, $g: $bound)*>($($arg: $ty),*) $(-> $ret)? $body
            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx2,fma")]
            #[allow(clippy::too_many_arguments)]
            fn avx2<T: Real $(, $g: $bound)*>($($arg: $ty),*) $(-> $ret)? {
                body::<true, T $(, $g)*>($($arg),*)
            }
            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")]
            #[allow(clippy::too_many_arguments)]
            fn avx512<T: Real $(, $g: $bound)*>($($arg: $ty),*) $(-> $ret)? {
                body::<true, T $(, $g)*>($($arg),*)
            }
            match level {
                // SAFETY: a level is only ever made where the processor has its instructions.
                #[cfg(target_arch = "x86_64")]
                $crate::nn::simd::Level::Avx512 => unsafe { avx512::<T $(, $g)*>($($arg),*) },
                // SAFETY: as above.
                #[cfg(target_arch = "x86_64")]
                $crate::nn::simd::Level::Avx2 => unsafe { avx2::<T $(, $g)*>($($arg),*) },
                _ => body::<{ cfg!(target_arch = "aarch64") }, T $(, $g)*>($($arg),*),
            }
        }
    };
}
pub(crate) use vectorised;
