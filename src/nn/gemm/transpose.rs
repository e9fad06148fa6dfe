//! Columns of a row-major matrix into a panel.

use super::micro::NR;
use crate::nn::simd::Level;

/// Types whose matrices can be transposed into panels.
pub trait Transpose: Copy + Default {
    /// `to` [depth, NR] from `from` [columns, depth], rows `stride` apart; zeros beyond `columns`.
    fn transpose(level: Level, from: &[Self], stride: usize, columns: usize, to: &mut [Self]);
}

fn portable<T: Copy + Default>(from: &[T], stride: usize, columns: usize, to: &mut [T]) {
    const BLOCK: usize = 16;
    // Blocks of rows of the panel, so that the lines of all columns stay in the cache.
    for (b, to) in to.chunks_mut(BLOCK * NR).enumerate() {
        for j in 0..NR {
            if j < columns {
                let from = &from[j * stride + b * BLOCK..];
                to[j..].iter_mut().step_by(NR).zip(from).for_each(|(to, from)| *to = *from);
            } else {
                to[j..].iter_mut().step_by(NR).for_each(|to| *to = T::default());
            }
        }
    }
}

impl Transpose for f64 {
    fn transpose(_: Level, from: &[Self], stride: usize, columns: usize, to: &mut [Self]) {
        portable(from, stride, columns, to);
    }
}

impl Transpose for f32 {
    fn transpose(level: Level, from: &[Self], stride: usize, columns: usize, to: &mut [Self]) {
        #[cfg(target_arch = "x86_64")]
        if level >= Level::Avx2 && columns >= NR {
            let depth = to.len() / NR;
            assert!(from.len() >= (NR - 1) * stride + depth);
            // SAFETY: the level has AVX2, and the assertion bounds what is read: NR rows of
            // `depth` values `stride` apart.
            unsafe { x86::transpose(from.as_ptr(), stride, depth, to.as_mut_ptr()) };
            return;
        }
        let _ = level;
        portable(from, stride, columns, to);
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;

    use super::NR;

    /// `to` [depth, NR] from `from` [NR, depth], rows `stride` apart.
    ///
    /// # Safety
    /// AVX2 is there, and both pointers reach that far.
    #[target_feature(enable = "avx2")]
    pub unsafe fn transpose(from: *const f32, stride: usize, depth: usize, to: *mut f32) {
        let whole = depth / 8 * 8;
        for p in (0..whole).step_by(8) {
            for j in (0..NR).step_by(8) {
                unsafe { block(from.add(j * stride + p), stride, to.add(p * NR + j)) };
            }
        }
        for p in whole..depth {
            for j in 0..NR {
                unsafe { *to.add(p * NR + j) = *from.add(j * stride + p) };
            }
        }
    }

    /// 8 x 8.
    #[target_feature(enable = "avx2")]
    unsafe fn block(from: *const f32, stride: usize, to: *mut f32) {
        let r = |i: usize| unsafe { _mm256_loadu_ps(from.add(i * stride)) };
        let (a, b) = (pairs(r(0), r(1), r(2), r(3)), pairs(r(4), r(5), r(6), r(7)));
        for i in 0..4 {
            unsafe {
                _mm256_storeu_ps(to.add(i * NR), _mm256_permute2f128_ps::<0x20>(a[i], b[i]));
                _mm256_storeu_ps(to.add((i + 4) * NR), _mm256_permute2f128_ps::<0x31>(a[i], b[i]));
            }
        }
    }

    /// Four rows to columns 0 to 3 (low halves) and 4 to 7 (high halves).
    #[target_feature(enable = "avx2")]
    fn pairs(a: __m256, b: __m256, c: __m256, d: __m256) -> [__m256; 4] {
        let (ab, cd) = (_mm256_unpacklo_ps(a, b), _mm256_unpacklo_ps(c, d));
        let (ab_high, cd_high) = (_mm256_unpackhi_ps(a, b), _mm256_unpackhi_ps(c, d));
        [
            _mm256_shuffle_ps::<0x44>(ab, cd),
            _mm256_shuffle_ps::<0xee>(ab, cd),
            _mm256_shuffle_ps::<0x44>(ab_high, cd_high),
            _mm256_shuffle_ps::<0xee>(ab_high, cd_high),
        ]
    }
}
