//! The innermost product: a tile of at most [`MR`] rows and [`NR`] columns in registers.

use super::super::simd::Level;

/// Rows of a tile.
pub const MR: usize = 12;
/// Columns of a tile, and of a panel of the right operand.
pub const NR: usize = 32;
/// Most of the inner dimension that one tile takes at once.
pub const KC: usize = 384;
/// From row to row of a left operand in scratch memory: off the powers of two,
/// so that rows do not fall on the same cache lines.
pub const LEFT_STRIDE: usize = KC + 16;

/// How the left operand lies in its scratch memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Left {
    /// Element (row i, inner index k) at `i · LEFT_STRIDE + k`.
    Rows,
    /// Element (row i, inner index k) at `k · MR + i`.
    Columns,
    /// Element (row i, inner index k) at `k · LEFT_STRIDE + i`: the transpose of `Rows`.
    Transposed,
}

impl Left {
    /// Distance of rows and of inner indices.
    #[inline(always)]
    const fn strides(self) -> (usize, usize) {
        match self {
            Self::Rows => (LEFT_STRIDE, 1),
            Self::Columns => (1, MR),
            Self::Transposed => (1, LEFT_STRIDE),
        }
    }
}

/// One tile's operands: `c` [rows, columns] = or += left [rows, depth] · panel [depth, columns].
///
/// `panel` has [`NR`] columns, of which those from `columns` on are not stored.
#[derive(Clone, Copy)]
pub struct Tile<T> {
    pub rows: usize,
    pub columns: usize,
    pub depth: usize,
    pub left: *const T,
    pub panel: *const T,
    pub c: *mut T,
    pub c_stride: usize,
    pub accumulate: bool,
}

/// Rows of a panel that are asked for before they are needed.
const AHEAD: usize = 16;

/// A vector register of one instruction set.
trait Register<T>: Copy {
    const LANES: usize;
    /// Rows of `2 · LANES` columns that fit the registers.
    const ROWS: usize;
    /// Asks for memory to be brought near; any address will do.
    fn prefetch(_: *const T) {}
    unsafe fn zero() -> Self;
    unsafe fn splat(value: *const T) -> Self;
    unsafe fn load(from: *const T) -> Self;
    unsafe fn store(self, to: *mut T);
    unsafe fn add(self, other: Self) -> Self;
    /// self + a · b
    unsafe fn fused(self, a: Self, b: Self) -> Self;
}

/// `ROWS` x (`VECTORS` registers) of a tile.
///
/// # Safety
/// The pointers of `t` reach as far as its sizes say.
#[inline(always)]
unsafe fn block<T: Copy, R: Register<T>, const ROWS: usize, const VECTORS: usize>(
    t: &Tile<T>,
    layout: Left,
) {
    let (row, inner) = layout.strides();
    unsafe {
        let mut sums = [[R::zero(); VECTORS]; ROWS];
        let (mut left, mut panel) = (t.left, t.panel);
        for _ in 0..t.depth {
            let mut b = [R::zero(); VECTORS];
            for (v, b) in b.iter_mut().enumerate() {
                R::prefetch(panel.wrapping_add(AHEAD * NR + v * R::LANES));
                *b = R::load(panel.add(v * R::LANES));
            }
            for (i, sums) in sums.iter_mut().enumerate() {
                let a = R::splat(left.add(i * row));
                for (sum, b) in sums.iter_mut().zip(&b) {
                    *sum = sum.fused(a, *b);
                }
            }
            left = left.add(inner);
            panel = panel.add(NR);
        }
        for (i, sums) in sums.into_iter().enumerate() {
            for (v, sum) in sums.into_iter().enumerate() {
                store::<T, R>(t, i, v * R::LANES, sum);
            }
        }
    }
}

/// Writes one register, of which columns beyond the tile's are dropped.
///
/// # Safety
/// As for [`block`].
#[inline(always)]
unsafe fn store<T: Copy, R: Register<T>>(t: &Tile<T>, row: usize, column: usize, sum: R) {
    unsafe {
        let to = t.c.add(row * t.c_stride + column);
        if column + R::LANES <= t.columns {
            let sum = if t.accumulate { sum.add(R::load(to)) } else { sum };
            sum.store(to);
        } else if column < t.columns {
            let kept = t.columns - column;
            let mut lanes = [*t.panel; NR];
            if t.accumulate {
                std::ptr::copy_nonoverlapping(to, lanes.as_mut_ptr(), kept);
                sum.add(R::load(lanes.as_ptr())).store(lanes.as_mut_ptr());
            } else {
                sum.store(lanes.as_mut_ptr());
            }
            std::ptr::copy_nonoverlapping(lanes.as_ptr(), to, kept);
        }
    }
}

/// A whole tile in blocks that fit the registers.
///
/// # Safety
/// As for [`block`].
#[inline(always)]
unsafe fn blocks<T: Copy, R: Register<T>>(tile: &Tile<T>, layout: Left) {
    let (row, _) = layout.strides();
    let (wide, mut from) = (2 * R::LANES, 0);
    while from < tile.columns {
        let mut done = 0;
        while done < tile.rows {
            // Equal blocks keep the arithmetic units as busy as full ones do.
            let left = tile.rows - done;
            let rows = left.div_ceil(left.div_ceil(R::ROWS));
            unsafe {
                let t = Tile {
                    left: tile.left.add(done * row),
                    panel: tile.panel.add(from),
                    c: tile.c.add(done * tile.c_stride + from),
                    columns: (tile.columns - from).min(wide),
                    ..*tile
                };
                macro_rules! of {
                    ($vectors:literal: $($rows:literal)*) => {
                        match rows {
                            $($rows => block::<T, R, $rows, $vectors>(&t, layout),)*
                            _ => unreachable!("a block has at most {MR} rows"),
                        }
                    };
                }
                if t.columns <= R::LANES {
                    of!(1: 1 2 3 4 5 6 7 8 9 10 11 12);
                } else {
                    of!(2: 1 2 3 4 5 6 7 8 9 10 11 12);
                }
            }
            done += rows;
        }
        from += wide;
    }
}

/// Portable lanes; the compiler makes of them what the target has.
#[derive(Clone, Copy)]
struct Lanes<T, const N: usize>([T; N]);

macro_rules! portable {
    ($t:ty, $n:literal, $rows:literal) => {
        impl Register<$t> for Lanes<$t, $n> {
            const LANES: usize = $n;
            const ROWS: usize = $rows;
            #[inline(always)]
            unsafe fn zero() -> Self {
                Self([0.0; $n])
            }
            #[inline(always)]
            unsafe fn splat(value: *const $t) -> Self {
                Self([unsafe { *value }; $n])
            }
            #[inline(always)]
            unsafe fn load(from: *const $t) -> Self {
                Self(unsafe { from.cast::<[$t; $n]>().read_unaligned() })
            }
            #[inline(always)]
            unsafe fn store(self, to: *mut $t) {
                unsafe { to.cast::<[$t; $n]>().write_unaligned(self.0) }
            }
            #[inline(always)]
            unsafe fn add(self, other: Self) -> Self {
                Self(std::array::from_fn(|i| self.0[i] + other.0[i]))
            }
            #[inline(always)]
            unsafe fn fused(self, a: Self, b: Self) -> Self {
                // Without the instruction, mul_add is a call.
                if cfg!(any(target_feature = "fma", target_arch = "aarch64")) {
                    Self(std::array::from_fn(|i| a.0[i].mul_add(b.0[i], self.0[i])))
                } else {
                    Self(std::array::from_fn(|i| a.0[i] * b.0[i] + self.0[i]))
                }
            }
        }
    };
}
portable!(f32, 8, 4);
portable!(f64, 4, 4);

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;

    use super::{Left, Register, Tile, blocks};

    macro_rules! register {
        ($t:ty, $v:ty, $lanes:literal, $rows:literal, $zero:ident, $splat:ident, $load:ident,
         $store:ident, $add:ident, $fused:ident) => {
            impl Register<$t> for $v {
                const LANES: usize = $lanes;
                const ROWS: usize = $rows;
                #[inline(always)]
                fn prefetch(at: *const $t) {
                    // SAFETY: a prefetch never faults.
                    unsafe { _mm_prefetch::<_MM_HINT_T0>(at.cast()) };
                }
                #[inline(always)]
                unsafe fn zero() -> Self {
                    unsafe { $zero() }
                }
                #[inline(always)]
                unsafe fn splat(value: *const $t) -> Self {
                    unsafe { $splat(*value) }
                }
                #[inline(always)]
                unsafe fn load(from: *const $t) -> Self {
                    unsafe { $load(from) }
                }
                #[inline(always)]
                unsafe fn store(self, to: *mut $t) {
                    unsafe { $store(to, self) }
                }
                #[inline(always)]
                unsafe fn add(self, other: Self) -> Self {
                    unsafe { $add(self, other) }
                }
                #[inline(always)]
                unsafe fn fused(self, a: Self, b: Self) -> Self {
                    unsafe { $fused(a, b, self) }
                }
            }
        };
    }
    register!(
        f32,
        __m512,
        16,
        12,
        _mm512_setzero_ps,
        _mm512_set1_ps,
        _mm512_loadu_ps,
        _mm512_storeu_ps,
        _mm512_add_ps,
        _mm512_fmadd_ps
    );
    register!(
        f64,
        __m512d,
        8,
        12,
        _mm512_setzero_pd,
        _mm512_set1_pd,
        _mm512_loadu_pd,
        _mm512_storeu_pd,
        _mm512_add_pd,
        _mm512_fmadd_pd
    );
    register!(
        f32,
        __m256,
        8,
        6,
        _mm256_setzero_ps,
        _mm256_set1_ps,
        _mm256_loadu_ps,
        _mm256_storeu_ps,
        _mm256_add_ps,
        _mm256_fmadd_ps
    );
    register!(
        f64,
        __m256d,
        4,
        6,
        _mm256_setzero_pd,
        _mm256_set1_pd,
        _mm256_loadu_pd,
        _mm256_storeu_pd,
        _mm256_add_pd,
        _mm256_fmadd_pd
    );

    macro_rules! entry {
        ($name:ident, $t:ty, $v:ty, $features:literal) => {
            /// # Safety
            /// The processor has the instructions, and the tile's pointers reach far enough.
            #[target_feature(enable = $features)]
            pub unsafe fn $name(tile: &Tile<$t>, layout: Left) {
                unsafe {
                    match layout {
                        Left::Rows => blocks::<$t, $v>(tile, Left::Rows),
                        Left::Columns => blocks::<$t, $v>(tile, Left::Columns),
                        Left::Transposed => blocks::<$t, $v>(tile, Left::Transposed),
                    }
                }
            }
        };
    }
    entry!(f32_avx512, f32, __m512, "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma");
    entry!(f64_avx512, f64, __m512d, "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma");
    entry!(f32_avx2, f32, __m256, "avx2,fma");
    entry!(f64_avx2, f64, __m256d, "avx2,fma");
}

/// Types that tiles can be computed in.
pub trait Micro: Copy + Send + Sync + 'static {
    /// Computes one tile.
    ///
    /// # Safety
    /// `left` holds `rows` x `depth` values in the layout, `panel` `depth` x [`NR`], and `c`
    /// `rows` rows of `columns` values `c_stride` apart that nothing else touches meanwhile;
    /// `rows` is at most [`MR`], `columns` at most [`NR`].
    unsafe fn tile(level: Level, tile: &Tile<Self>, layout: Left);
}

macro_rules! micro {
    ($t:ty, $avx512:ident, $avx2:ident, $lanes:literal) => {
        impl Micro for $t {
            #[inline]
            unsafe fn tile(level: Level, tile: &Tile<Self>, layout: Left) {
                debug_assert!(tile.rows <= MR && tile.columns <= NR);
                // SAFETY: the caller's promise; a level is only made where the processor has it.
                unsafe {
                    match level {
                        #[cfg(target_arch = "x86_64")]
                        Level::Avx512 => x86::$avx512(tile, layout),
                        #[cfg(target_arch = "x86_64")]
                        Level::Avx2 => x86::$avx2(tile, layout),
                        _ => blocks::<$t, Lanes<$t, $lanes>>(tile, layout),
                    }
                }
            }
        }
    };
}
micro!(f32, f32_avx512, f32_avx2, 8);
micro!(f64, f64_avx512, f64_avx2, 4);
