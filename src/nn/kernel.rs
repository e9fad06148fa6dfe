//! What the CPU kernels share: the real number types and slices of tensors.

use candle_core::{CpuStorage, DType, Layout, Result, Storage, Tensor, WithDType, bail};

/// f32 and f64: f32 is what models run in, f64 is for gradient checks.
pub trait Real: WithDType + std::ops::Neg<Output = Self> + std::iter::Sum {
    const ZERO: Self;
    const ONE: Self;
    /// Within 2 units in the last place for f32; branch-free, so that loops over it vectorise.
    fn exponential(self) -> Self;
}

impl Real for f64 {
    const ZERO: Self = 0.0;
    const ONE: Self = 1.0;
    fn exponential(self) -> Self {
        self.exp()
    }
}

impl Real for f32 {
    const ZERO: Self = 0.0;
    const ONE: Self = 1.0;

    /// 2^n · e^f with a degree-7 polynomial on |f| ≤ ln 2 / 2 (Cephes' coefficients).
    #[expect(clippy::excessive_precision, reason = "Cephes' constants as published")]
    #[inline(always)]
    fn exponential(self) -> Self {
        const ROUND: f32 = 12_582_912.0; // 1.5 · 2^23: adding it rounds to an integer
        let x = self.clamp(-87.3, 88.3);
        let n = (x * std::f32::consts::LOG2_E + ROUND) - ROUND;
        let f = x - n * 0.693_359_375 + n * 2.121_944_4e-4;
        let mut p = 1.987_569_15e-4_f32;
        for c in [1.398_199_95e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_55e-1, 0.5] {
            p = p * f + c;
        }
        let power = f32::from_bits(((n as i32 + 127) as u32) << 23);
        (p * f * f + f + 1.0) * power
    }
}

/// 1 / (1 + e^-x).
#[inline(always)]
pub fn sigmoid<T: Real>(x: T) -> T {
    T::ONE / (T::ONE + (-x).exponential())
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

/// Whether the fused CPU kernels apply to this tensor.
pub fn fused(x: &Tensor) -> bool {
    x.device().is_cpu() && matches!(x.dtype(), DType::F32 | DType::F64)
}

/// The elements of a contiguous CPU storage.
pub fn slice<'a, T: WithDType>(storage: &'a CpuStorage, layout: &Layout) -> Result<&'a [T]> {
    let Some((from, to)) = layout.contiguous_offsets() else {
        bail!("expected a contiguous tensor")
    };
    Ok(&T::cpu_storage_as_slice(storage)?[from..to])
}

/// Calls `f` with the elements of a CPU tensor, made contiguous first if need be.
pub fn with_slice<T: WithDType, R>(x: &Tensor, f: impl FnOnce(&[T]) -> Result<R>) -> Result<R> {
    let x = x.contiguous()?;
    let (storage, layout) = x.storage_and_layout();
    match &*storage {
        Storage::Cpu(storage) => f(slice(storage, layout)?),
        _ => bail!("expected a tensor on the CPU"),
    }
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
