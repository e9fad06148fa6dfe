//! Activations, and the gated GELU of the transformers.

use candle_core::{D, Device, Result, Tensor, bail};

use super::autograd::attach;
use super::kernel::{PARALLEL_FROM, Place, Real, View, dispatch, place, sigmoid, uninitialised};
use super::simd::{Level, vectorised};
use super::threads;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Activation {
    /// x · sigmoid(x)
    Silu,
    /// x · Φ(x) with the error function (`gelu` in transformers and diffusers).
    Gelu,
    /// x · sigmoid(1.702 x), as in CLIP.
    QuickGelu,
}

impl Activation {
    /// Reads transformers' `hidden_act` names.
    pub fn from_name(name: &str) -> Option<Self> {
        match name {
            "silu" | "swish" => Some(Self::Silu),
            "gelu" => Some(Self::Gelu),
            "quick_gelu" => Some(Self::QuickGelu),
            _ => None,
        }
    }

    pub fn forward(self, x: &Tensor) -> Result<Tensor> {
        match (place(x), self) {
            (Place::Cpu, _) => {
                let x = x.contiguous()?;
                dispatch!(x.dtype(), T => self.run::<T>(&x))
            }
            #[cfg(feature = "cuda")]
            (Place::Gpu, _) => super::cuda::activation(self, x),
            // Spelled out, exp(-x) overflows far below zero and its gradient is 0 · ∞.
            (Place::Other, Self::Gelu) => x.gelu_erf(),
            (Place::Other, Self::Silu) => x.silu(),
            (Place::Other, Self::QuickGelu) => (x * 1.702)?.silu()? / 1.702,
        }
    }

    fn run<T: Real>(self, x: &Tensor) -> Result<Tensor> {
        let y = map::<T>(&View::of(x)?, |level, x, y| values(level, self, x, y));
        let (shape, from) = (x.shape().clone(), x.detach());
        attach(y, shape, &[x], move |dy| {
            let (x, gradient) = (View::<T>::of(&from)?, View::<T>::of(dy)?);
            let mut dx = uninitialised(x.len());
            let level = Level::current();
            let each = |dx: &mut [T], (x, dy): (&[T], &[T])| slopes(level, self, x, dy, dx);
            spread(&mut dx, (&x[..], 1), (&gradient[..], 1), 1, each);
            Ok(vec![Tensor::from_vec(dx, dy.shape(), &Device::Cpu)?])
        })
    }

    #[inline(always)]
    fn value<const FMA: bool, T: Real>(self, x: T) -> T {
        match self {
            Self::Silu => x * sigmoid::<FMA, T>(x),
            Self::QuickGelu => x * sigmoid::<FMA, T>(T::from_f64(1.702) * x),
            Self::Gelu => x * normal_cdf::<FMA, T>(x),
        }
    }

    #[inline(always)]
    fn slope<const FMA: bool, T: Real>(self, x: T) -> T {
        let gate = |slope: T| {
            let s = sigmoid::<FMA, T>(slope * x);
            s * (T::ONE + slope * x * (T::ONE - s))
        };
        match self {
            Self::Silu => gate(T::ONE),
            Self::QuickGelu => gate(T::from_f64(1.702)),
            Self::Gelu => gelu_slope::<FMA, T>(x),
        }
    }
}

/// Φ(x)
#[inline(always)]
fn normal_cdf<const FMA: bool, T: Real>(x: T) -> T {
    let half = T::from_f64(0.5);
    half + half * (x * T::from_f64(std::f64::consts::FRAC_1_SQRT_2)).error_function::<FMA>()
}

/// Φ(x) + x · φ(x)
#[inline(always)]
fn gelu_slope<const FMA: bool, T: Real>(x: T) -> T {
    const DENSITY_AT_ZERO: f64 = 0.398_942_280_401_432_7;
    let density = (T::from_f64(-0.5) * x * x).exponential::<FMA>() * T::from_f64(DENSITY_AT_ZERO);
    normal_cdf::<FMA, T>(x) + x * density
}

vectorised! {
    fn values<T: Real>(activation: Activation, x: &[T], y: &mut [T]) {
        // One loop each, so that each vectorises.
        match activation {
            Activation::Silu => y.iter_mut().zip(x).for_each(|(y, x)| *y = Activation::Silu.value::<FMA, T>(*x)),
            Activation::Gelu => y.iter_mut().zip(x).for_each(|(y, x)| *y = Activation::Gelu.value::<FMA, T>(*x)),
            Activation::QuickGelu => {
                y.iter_mut().zip(x).for_each(|(y, x)| *y = Activation::QuickGelu.value::<FMA, T>(*x));
            }
        }
    }
}

vectorised! {
    fn slopes<T: Real>(activation: Activation, x: &[T], dy: &[T], dx: &mut [T]) {
        macro_rules! each {
            ($activation:expr) => {
                for ((dx, dy), x) in dx.iter_mut().zip(dy).zip(x) {
                    *dx = *dy * $activation.slope::<FMA, T>(*x);
                }
            };
        }
        match activation {
            Activation::Silu => each!(Activation::Silu),
            Activation::Gelu => each!(Activation::Gelu),
            Activation::QuickGelu => each!(Activation::QuickGelu),
        }
    }
}

fn map<T: Real>(x: &[T], f: impl Fn(Level, &[T], &mut [T]) + Sync) -> Vec<T> {
    let (level, mut y) = (Level::current(), uninitialised(x.len()));
    spread(&mut y, (x, 1), (x, 1), 1, |y: &mut [T], (x, _): (&[T], &[T])| f(level, x, y));
    y
}

/// Runs `each` on pieces of rows: `to` has `unit` values a row, and each input its own number.
fn spread<T: Real>(
    to: &mut [T],
    (a, a_unit): (&[T], usize),
    (b, b_unit): (&[T], usize),
    unit: usize,
    each: impl Fn(&mut [T], (&[T], &[T])) + Sync,
) {
    const PIECE: usize = 1 << 14;
    let rows = (PIECE / unit.max(1)).max(1);
    let parallel = to.len() >= PARALLEL_FROM;
    threads::chunks(to, rows * unit, parallel, |i, to| {
        let (first, count) = (i * rows, to.len() / unit.max(1));
        let (a, b) =
            (&a[first * a_unit..][..count * a_unit], &b[first * b_unit..][..count * b_unit]);
        each(to, (a, b));
    });
}

/// `value · gelu(gate)` of [..., 2n] = (value, gate) → [..., n] (GEGLU, arXiv 2002.05202).
pub fn geglu(x: &Tensor) -> Result<Tensor> {
    let width = x.dim(D::Minus1)?;
    if width == 0 || !width.is_multiple_of(2) {
        bail!("geglu: an odd width of {width}");
    }
    let half = width / 2;
    match place(x) {
        Place::Cpu => {
            let x = x.contiguous()?;
            dispatch!(x.dtype(), T => run_geglu::<T>(&x, half))
        }
        #[cfg(feature = "cuda")]
        Place::Gpu => super::cuda::geglu(x, half),
        Place::Other => {
            let value = x.narrow(D::Minus1, 0, half)?.contiguous()?;
            let gate = x.narrow(D::Minus1, half, half)?.contiguous()?;
            value * Activation::Gelu.forward(&gate)?
        }
    }
}

fn run_geglu<T: Real>(x: &Tensor, half: usize) -> Result<Tensor> {
    let mut shape = x.dims().to_vec();
    if let Some(last) = shape.last_mut() {
        *last = half;
    }
    let from = View::<T>::of(x)?;
    let mut y = uninitialised(from.len() / 2);
    let level = Level::current();
    let each = |y: &mut [T], (x, _): (&[T], &[T])| gated(level, x, half, y);
    spread(&mut y, (&from[..], 2 * half), (&from[..], 2 * half), half, each);
    drop(from);
    let kept = x.detach();
    attach(y, shape, &[x], move |dy| {
        let (x, dy) = (View::<T>::of(&kept)?, View::<T>::of(dy)?);
        let mut dx = uninitialised(x.len());
        let level = Level::current();
        let each = |dx: &mut [T], (x, dy): (&[T], &[T])| gated_slopes(level, x, dy, half, dx);
        spread(&mut dx, (&x[..], 2 * half), (&dy[..], half), 2 * half, each);
        Ok(vec![Tensor::from_vec(dx, kept.shape(), &Device::Cpu)?])
    })
}

vectorised! {
    fn gated<T: Real>(x: &[T], half: usize, y: &mut [T]) {
        for (y, x) in y.chunks_exact_mut(half).zip(x.chunks_exact(2 * half)) {
            let (value, gate) = x.split_at(half);
            for ((y, v), g) in y.iter_mut().zip(value).zip(gate) {
                *y = *v * Activation::Gelu.value::<FMA, T>(*g);
            }
        }
    }
}

vectorised! {
    fn gated_slopes<T: Real>(x: &[T], dy: &[T], half: usize, dx: &mut [T]) {
        let rows = x.chunks_exact(2 * half).zip(dy.chunks_exact(half));
        for (dx, (x, dy)) in dx.chunks_exact_mut(2 * half).zip(rows) {
            let ((value, gate), (dvalue, dgate)) = (x.split_at(half), dx.split_at_mut(half));
            for (((dv, dg), (v, g)), dy) in
                dvalue.iter_mut().zip(dgate).zip(value.iter().zip(gate)).zip(dy)
            {
                *dv = *dy * Activation::Gelu.value::<FMA, T>(*g);
                *dg = *dy * *v * Activation::Gelu.slope::<FMA, T>(*g);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_error_function_is_accurate() {
        for i in -60_000..=60_000 {
            let x = i as f32 * 1e-4;
            for y in [x.error_function::<false>(), x.error_function::<true>()] {
                let error = (f64::from(y) - libm::erf(f64::from(x))).abs();
                assert!(error < 4e-7, "erf({x}) is off by {error:e}");
            }
        }
    }
}
