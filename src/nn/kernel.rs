//! What the CPU kernels share: the real number types and slices of tensors.

use std::marker::PhantomData;
use std::ops::Deref;

use candle_core::{
    CpuStorage, DType, Layout, Result, Storage, StorageRef, Tensor, WithDType, bail,
};

/// f32 and f64: f32 is what models run in, f64 is for gradient checks.
pub trait Real:
    WithDType
    + std::ops::Neg<Output = Self>
    + std::iter::Sum
    + super::gemm::Micro
    + super::gemm::Number
    + super::gemm::Transpose
{
    const ZERO: Self;
    const ONE: Self;
    /// self · a + b; in one rounding if `FMA`, which without the instruction is slow.
    fn times_plus<const FMA: bool>(self, a: Self, b: Self) -> Self;
    /// e^self, within 2 units in the last place for f32; branch-free, so that loops over it
    /// vectorise.
    fn exponential<const FMA: bool>(self) -> Self;
    /// The error function; within 4e-7 of it for f32, and branch-free there.
    fn error_function<const FMA: bool>(self) -> Self;
}

impl Real for f64 {
    const ZERO: Self = 0.0;
    const ONE: Self = 1.0;

    #[inline(always)]
    fn times_plus<const FMA: bool>(self, a: Self, b: Self) -> Self {
        if FMA { self.mul_add(a, b) } else { self * a + b }
    }

    fn exponential<const FMA: bool>(self) -> Self {
        self.exp()
    }

    fn error_function<const FMA: bool>(self) -> Self {
        libm::erf(self)
    }
}

/// Horner's rule, highest coefficient first.
#[inline(always)]
fn polynomial<const FMA: bool, const N: usize>(x: f32, coefficients: [f32; N]) -> f32 {
    let mut sum = 0.0;
    for (i, c) in coefficients.into_iter().enumerate() {
        sum = if i == 0 { c } else { sum.times_plus::<FMA>(x, c) };
    }
    sum
}

impl Real for f32 {
    const ZERO: Self = 0.0;
    const ONE: Self = 1.0;

    #[inline(always)]
    fn times_plus<const FMA: bool>(self, a: Self, b: Self) -> Self {
        if FMA { self.mul_add(a, b) } else { self * a + b }
    }

    /// 2^n · e^f with a degree-7 polynomial on |f| ≤ ln 2 / 2 (Cephes' coefficients).
    #[expect(clippy::excessive_precision, reason = "Cephes' constants as published")]
    #[inline(always)]
    fn exponential<const FMA: bool>(self) -> Self {
        // 1.5 · 2^23: adding it rounds to an integer, which the low bits then hold.
        const ROUND: f32 = 12_582_912.0;
        let x = self.clamp(-87.3, 88.3);
        let shifted = x.times_plus::<FMA>(std::f32::consts::LOG2_E, ROUND);
        let n = shifted - ROUND;
        let f = n.times_plus::<FMA>(-0.693_359_375, x);
        let f = n.times_plus::<FMA>(2.121_944_4e-4, f);
        let p = polynomial::<FMA, 6>(
            f,
            [1.987_569_15e-4, 1.398_199_95e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_55e-1, 0.5],
        );
        let power = f32::from_bits((shifted.to_bits() << 23).wrapping_add(127 << 23));
        (p * f).times_plus::<FMA>(f, f + 1.0) * power
    }

    /// x · P(x²) / Q(x²) on |x| ≤ 4, where it reaches 1 (Eigen's coefficients).
    #[expect(clippy::excessive_precision, reason = "constants as published")]
    #[inline(always)]
    fn error_function<const FMA: bool>(self) -> Self {
        let x = self.clamp(-4.0, 4.0);
        let p = polynomial::<FMA, 7>(
            x * x,
            [
                -2.726_142_258_013_06e-10,
                2.770_681_424_959_02e-8,
                -2.101_024_020_825_08e-6,
                -5.692_506_394_623_46e-5,
                -7.349_906_303_268_55e-4,
                -2.954_599_808_540_25e-3,
                -1.609_603_332_624_15e-2,
            ],
        );
        let q = polynomial::<FMA, 5>(
            x * x,
            [
                -1.456_607_184_649_96e-5,
                -2.133_740_552_789_05e-4,
                -1.682_826_974_382_03e-3,
                -7.373_329_167_204_68e-3,
                -1.426_473_905_141_89e-2,
            ],
        );
        x * p / q
    }
}

/// 1 / (1 + e^-x).
#[inline(always)]
pub fn sigmoid<const FMA: bool, T: Real>(x: T) -> T {
    T::ONE / (T::ONE + (-x).exponential::<FMA>())
}

/// Σ f(v) in sixteen partial sums, so that the loop vectorises.
#[inline(always)]
pub fn sum_by<T: Real>(values: &[T], f: impl Fn(T) -> T) -> T {
    const LANES: usize = 16;
    let mut lanes = [T::ZERO; LANES];
    let chunks = values.chunks_exact(LANES);
    let rest: T = chunks.remainder().iter().map(|v| f(*v)).sum();
    for chunk in chunks {
        for (lane, v) in lanes.iter_mut().zip(chunk) {
            *lane += f(*v);
        }
    }
    lanes.into_iter().sum::<T>() + rest
}

/// Whose kernels apply to a tensor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// Those of this floor for f32 and f64.
    Cpu,
    /// Those of `nn::cuda`.
    #[cfg(feature = "cuda")]
    Gpu,
    /// candle's own operations.
    Other,
}

/// Whose kernels apply to this tensor.
pub fn place(x: &Tensor) -> Place {
    #[cfg(feature = "cuda")]
    if super::cuda::takes(x) {
        return Place::Gpu;
    }
    if x.device().is_cpu() && matches!(x.dtype(), DType::F32 | DType::F64) {
        Place::Cpu
    } else {
        Place::Other
    }
}

/// The elements of a contiguous CPU storage.
pub fn slice<'a, T: WithDType>(storage: &'a CpuStorage, layout: &Layout) -> Result<&'a [T]> {
    let Some((from, to)) = layout.contiguous_offsets() else {
        bail!("expected a contiguous tensor")
    };
    Ok(&T::cpu_storage_as_slice(storage)?[from..to])
}

/// The elements of a contiguous CPU tensor, for as long as this lives.
pub struct View<'a, T> {
    storage: StorageRef<'a>,
    range: (usize, usize),
    number: PhantomData<T>,
}

impl<'a, T: WithDType> View<'a, T> {
    /// # Errors
    /// When the tensor is not contiguous, not on the CPU or of another type.
    pub fn of(x: &'a Tensor) -> Result<Self> {
        let (storage, layout) = x.storage_and_layout();
        let Some(range) = layout.contiguous_offsets() else {
            bail!("expected a contiguous tensor")
        };
        if x.dtype() != T::DTYPE || !x.device().is_cpu() {
            bail!("expected {:?} on the CPU, got {:?}", T::DTYPE, x.dtype());
        }
        Ok(Self { storage, range, number: PhantomData })
    }
}

impl<T: WithDType> Deref for View<'_, T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        let all = match &*self.storage {
            Storage::Cpu(storage) => T::cpu_storage_as_slice(storage).unwrap_or_default(),
            _ => &[],
        };
        &all[self.range.0..self.range.1]
    }
}

/// Memory for values that are all written before any is read.
#[expect(clippy::uninit_vec, reason = "zeroing costs as much as a pass of a kernel")]
pub fn uninitialised<T: Real>(length: usize) -> Vec<T> {
    let mut values = Vec::with_capacity(length);
    // SAFETY: the capacity is there, any bits are a value of the two number types, and the
    // kernels write every element first.
    unsafe { values.set_len(length) };
    values
}

/// Runs `$call` with `$t` bound to f32 or f64 after the dtype `$dtype`.
macro_rules! dispatch {
    ($dtype:expr, $t:ident => $call:expr) => {
        match $dtype {
            candle_core::DType::F32 => {
                type $t = f32;
                $call
            }
            candle_core::DType::F64 => {
                type $t = f64;
                $call
            }
            other => candle_core::bail!("no CPU kernel for {other:?}"),
        }
    };
}
pub(crate) use dispatch;

/// Below this many elements a loop is not worth spreading over threads.
pub const PARALLEL_FROM: usize = 1 << 15;
