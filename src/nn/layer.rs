//! What linear layers and convolutions share: one operation with bias, low-rank adapter,
//! time shift and residual, its backward, and the packed form of weights that stay.

use std::any::Any;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};

use candle_core::{DType, Device, Result, Shape, Tensor, bail};

use super::affine::{Map, Prepared, column_sums};
use super::autograd::{attach, deferred, wanted};
use super::gemm::{Finish, Plain, Rows, product};
use super::kernel::{Real, View, dispatch, uninitialised};

/// A low-rank update (LoRA, arXiv 2106.09685): `W' = W + scale · up · down`,
/// `scale = alpha / rank`.
#[derive(Clone, Debug)]
pub struct LowRank {
    /// [rank, in], or [rank, in, kh, kw] for a convolution.
    pub down: Tensor,
    /// [out, rank], or [out, rank, 1, 1].
    pub up: Tensor,
    pub scale: f64,
}

/// What is added to the outputs of a layer.
#[derive(Clone, Copy, Debug, Default)]
pub struct Added<'a> {
    /// [images, out]: to every row of an image.
    pub shift: Option<&'a Tensor>,
    /// The output's shape.
    pub residual: Option<&'a Tensor>,
}

/// A layer's weights.
#[derive(Clone, Copy)]
pub(super) struct Weights<'a> {
    pub weight: &'a Tensor,
    pub bias: Option<&'a Tensor>,
    pub adapter: Option<&'a LowRank>,
    pub packed: &'a PackedWeight,
}

/// A weight in the forms that products are fastest with, made by the first call and shared by
/// clones of the layer: for the forward pass, with an adapter that is not being trained merged
/// in, and for the input's gradient.
///
/// Only weights without gradient tracking are packed, and they are taken never to change.
#[derive(Clone, Debug, Default)]
pub struct PackedWeight(Arc<[OnceLock<Held>; 2]>);

/// The forms of a [`PackedWeight`].
const FORWARD: usize = 0;
const ADJOINT: usize = 1;

#[derive(Debug)]
struct Held {
    packed: Box<dyn Any + Send + Sync>,
    _claim: Claim,
}

/// Bytes that count towards the limit for as long as this lives.
#[derive(Debug)]
struct Claim(usize);

impl Claim {
    fn of(bytes: usize) -> Self {
        HELD.fetch_add(bytes, Ordering::Relaxed);
        Self(bytes)
    }
}

/// Bytes of packed weights in this process.
static HELD: AtomicUsize = AtomicUsize::new(0);

impl Drop for Claim {
    fn drop(&mut self) {
        HELD.fetch_sub(self.0, Ordering::Relaxed);
    }
}

/// Most bytes of packed weights that training makes: a large network has enough rows for
/// packing anew to cost little, and its memory is short.
const TRAINING_LIMIT: usize = 96 << 20;

/// Most bytes of packed weights in this process: `DS_PACKED_MIB`, or 4 GiB. Layers beyond it
/// work from their plain weights, a little slower.
fn limit() -> usize {
    static LIMIT: OnceLock<usize> = OnceLock::new();
    *LIMIT.get_or_init(|| {
        let given = std::env::var("DS_PACKED_MIB").ok();
        let mib = given.as_ref().and_then(|v| v.parse::<u32>().ok());
        if let (Some(given), None) = (given, mib) {
            tracing::warn!("DS_PACKED_MIB: expected a whole number of MiB, got '{given}'");
        }
        mib.unwrap_or(4096) as usize * (1 << 20)
    })
}

impl PackedWeight {
    /// One form of the packed weight, made now if `limit` bytes of all of them allow.
    fn get<P: Any + Send + Sync>(
        &self,
        form: usize,
        bytes: usize,
        limit: usize,
        make: impl FnOnce() -> Result<P>,
    ) -> Result<Option<&P>> {
        let place = &self.0[form];
        if place.get().is_none() {
            // Counted from here on, whatever happens to it.
            let claim = Claim::of(bytes);
            if HELD.load(Ordering::Relaxed) <= limit {
                let held = Held { packed: Box::new(make()?), _claim: claim };
                // Another thread may have been first.
                drop(place.set(held));
            }
        }
        Ok(place.get().and_then(|held| held.packed.downcast_ref()))
    }

    /// On a GPU: the weight with the adapter merged in, made now if the limit allows.
    #[cfg(feature = "cuda")]
    pub(super) fn merged(
        &self,
        weight: &Tensor,
        make: impl FnOnce() -> Result<Tensor>,
    ) -> Result<Option<&Tensor>> {
        let bytes = weight.elem_count() * weight.dtype().size_in_bytes();
        self.get(FORWARD, bytes, limit(), make)
    }
}

fn pack<T: Real>(operands: &Operands) -> Result<Prepared<T>> {
    let map = &operands.map;
    let weight = operands.weight.to_dtype(T::DTYPE)?;
    let weight = View::<T>::of(&weight)?;
    let Some(adapter) = operands.adapter.as_ref().filter(|a| a.is_constant()) else {
        return Ok(map.pack(&weight));
    };
    let (down, up) = (View::<T>::of(&adapter.down)?, View::<T>::of(&adapter.up)?);
    let up: Vec<T> = up.iter().map(|v| *v * T::from_f64(adapter.scale)).collect();
    let left = Rows { data: &up, stride: adapter.rank };
    let right = Plain { data: &down, stride: map.inner, columns: map.inner };
    let mut merged = weight.to_vec();
    let sizes = (map.outer, map.inner, adapter.rank);
    product(sizes, &left, &right, &mut merged, true, &Finish::default());
    Ok(map.pack(&merged))
}

/// An adapter's matrices, contiguous and of the layer's type.
#[derive(Clone)]
pub(super) struct Factors {
    pub down: Tensor,
    pub up: Tensor,
    pub scale: f64,
    pub rank: usize,
}

impl Factors {
    fn of(adapter: &LowRank, dtype: DType) -> Result<Self> {
        Ok(Self {
            down: adapter.down.to_dtype(dtype)?.contiguous()?,
            up: adapter.up.to_dtype(dtype)?.contiguous()?,
            scale: adapter.scale,
            rank: adapter.down.dim(0)?,
        })
    }

    /// Neither matrix is being trained.
    pub fn is_constant(&self) -> bool {
        !self.down.track_op() && !self.up.track_op()
    }

    pub fn detached(&self) -> Self {
        Self { down: self.down.detach(), up: self.up.detach(), ..self.clone() }
    }
}

/// `W ∗ x + scale · up · (down ∗ x) + bias + shift + residual`, of shape `shape`. Weights of
/// another type than `x` are converted to its type for the time of the call.
pub(super) fn apply(
    map: Map,
    x: &Tensor,
    layer: Weights,
    added: Added,
    shape: impl Into<Shape>,
) -> Result<Tensor> {
    let like = |t: &Tensor| t.to_dtype(x.dtype())?.contiguous();
    let strided = |t: &Tensor| t.to_dtype(x.dtype());
    let operands = Operands {
        map,
        x: x.contiguous()?,
        weight: match (x.device().is_cpu(), layer.weight.track_op()) {
            // Converted where it is read, which it is not where there is a packed form.
            (true, false) => layer.weight.contiguous()?,
            (true, true) => like(layer.weight)?,
            // GPUs have convolutions' weights in another order of dimensions.
            (false, _) => strided(layer.weight)?,
        },
        bias: layer.bias.map(like).transpose()?,
        adapter: layer.adapter.map(|a| Factors::of(a, x.dtype())).transpose()?,
        shift: added.shift.map(like).transpose()?,
        residual: added.residual.map(like).transpose()?,
    };
    operands.check()?;
    #[cfg(feature = "cuda")]
    if super::cuda::takes(x) {
        return super::cuda::apply(operands, layer.packed, shape);
    }
    dispatch!(x.dtype(), T => run::<T>(operands, &layer, shape))
}

fn run<T: Real>(operands: Operands, layer: &Weights, shape: impl Into<Shape>) -> Result<Tensor> {
    let map = operands.map;
    let training = deferred() || operands.all().any(wanted);
    let limit = if training { limit().min(TRAINING_LIMIT) } else { limit() };
    let packed = if layer.weight.track_op() {
        None
    } else {
        let make = || pack::<T>(&operands);
        layer.packed.get(FORWARD, map.packed_bytes::<T>(), limit, make)?
    };
    let packed = packed.filter(|packed| map.takes(packed));
    let merged = packed.is_some() && operands.adapter.as_ref().is_none_or(Factors::is_constant);
    let (y, low) = operands.forward::<T>(packed, merged)?;
    let backward = Gradients::of(&operands, low, layer.packed);
    let inputs: Vec<Tensor> = operands.all().cloned().collect();
    drop(operands);
    attach(y, shape, &inputs.iter().collect::<Vec<_>>(), move |dy| backward.all(dy))
}

fn view<T: Real>(x: &Option<Tensor>) -> Result<Option<View<'_, T>>> {
    x.as_ref().map(View::of).transpose()
}

/// A layer's operands, all of one type but a constant weight on the CPU.
pub(super) struct Operands {
    pub map: Map,
    pub x: Tensor,
    pub weight: Tensor,
    pub bias: Option<Tensor>,
    pub adapter: Option<Factors>,
    pub shift: Option<Tensor>,
    pub residual: Option<Tensor>,
}

impl Operands {
    /// In the order of their gradients.
    pub fn all(&self) -> impl Iterator<Item = &Tensor> {
        let adapter = self.adapter.iter().flat_map(|a| [&a.down, &a.up]);
        [Some(&self.x), Some(&self.weight), self.bias.as_ref()]
            .into_iter()
            .flatten()
            .chain(adapter)
            .chain(self.shift.as_ref())
            .chain(self.residual.as_ref())
    }

    fn check(&self) -> Result<()> {
        let map = &self.map;
        let sizes = [
            ("input", Some(&self.x), map.input()),
            ("weight", Some(&self.weight), map.outer * map.inner),
            ("bias", self.bias.as_ref(), map.outer),
            ("residual", self.residual.as_ref(), map.rows * map.outer),
        ];
        for (what, tensor, expected) in sizes {
            if let Some(tensor) = tensor
                && tensor.elem_count() != expected
            {
                bail!("layer of {} to {}: {what} {:?}", map.inner, map.outer, tensor.dims());
            }
        }
        if let Some(a) = &self.adapter
            && (a.down.elem_count() != a.rank * map.inner
                || a.up.elem_count() != a.rank * map.outer)
        {
            bail!("adapter {:?} and {:?} on {} to {}", a.down, a.up, map.inner, map.outer);
        }
        if let Some(shift) = &self.shift {
            let images = shift.dim(0)?;
            if images == 0
                || !map.rows.is_multiple_of(images)
                || shift.dims() != [images, map.outer]
            {
                bail!("layer of {} outputs: shift {:?}", map.outer, shift.dims());
            }
        }
        Ok(())
    }

    /// The output, and the scaled output of the adapter's first matrix.
    fn forward<T: Real>(
        &self,
        packed: Option<&Prepared<T>>,
        merged: bool,
    ) -> Result<(Vec<T>, Option<Vec<T>>)> {
        let map = &self.map;
        let x = View::<T>::of(&self.x)?;
        let weight = match packed {
            Some(_) => None,
            None => Some(self.weight.to_dtype(T::DTYPE)?),
        };
        let weight = view::<T>(&weight)?;
        let (bias, shift, residual) =
            (view(&self.bias)?, view(&self.shift)?, view(&self.residual)?);
        let finish = Finish {
            bias: bias.as_deref(),
            shift: shift.as_deref().map(|s| (s, map.rows * map.outer / s.len().max(1))),
            residual: residual.as_deref(),
        };
        let mut y = uninitialised(map.rows * map.outer);
        let mut low = None;
        if let Some(adapter) = self.adapter.as_ref().filter(|_| !merged) {
            let (down, up) = (View::<T>::of(&adapter.down)?, View::<T>::of(&adapter.up)?);
            let nothing = Finish::default();
            let mut scaled = uninitialised(map.rows * adapter.rank);
            map.with_outer(adapter.rank).forward(&x, &down, None, &mut scaled, false, &nothing);
            let scale = T::from_f64(adapter.scale);
            scaled.iter_mut().for_each(|v| *v *= scale);
            let second = Map::rows(map.rows, adapter.rank, map.outer);
            second.forward(&scaled, &up, None, &mut y, false, &nothing);
            low = Some(scaled);
        }
        let weight = weight.as_deref().unwrap_or_default();
        map.forward(&x, weight, packed, &mut y, low.is_some(), &finish);
        Ok((y, low))
    }
}

/// What the backward pass needs, and which gradients are wanted.
struct Gradients<T> {
    map: Map,
    /// Kept when a weight's gradient needs it.
    x: Option<Tensor>,
    input: Option<Shape>,
    weight: Tensor,
    /// Of a weight that stays.
    packed: Option<PackedWeight>,
    weight_wanted: bool,
    bias: bool,
    adapter: Option<Factors>,
    down: bool,
    up: bool,
    /// The scaled output of the adapter's first matrix.
    low: Option<Vec<T>>,
    /// Images.
    shift: Option<usize>,
    /// Its shape, and whether it is a variable.
    residual: Option<(Shape, bool)>,
}

impl<T: Real> Gradients<T> {
    fn of(o: &Operands, low: Option<Vec<T>>, packed: &PackedWeight) -> Self {
        let (weight_wanted, adapter) = (wanted(&o.weight), o.adapter.as_ref());
        let down = adapter.is_some_and(|a| wanted(&a.down));
        let up = adapter.is_some_and(|a| wanted(&a.up));
        let is_wanted = |x: &Option<Tensor>| x.as_ref().is_some_and(wanted);
        Self {
            map: o.map,
            x: (weight_wanted || down).then(|| o.x.detach()),
            input: wanted(&o.x).then(|| o.x.shape().clone()),
            weight: o.weight.detach(),
            packed: (!o.weight.track_op()).then(|| packed.clone()),
            weight_wanted,
            bias: is_wanted(&o.bias),
            adapter: adapter.map(Factors::detached),
            down,
            up,
            low: low.filter(|_| up),
            shift: o
                .shift
                .as_ref()
                .filter(|s| wanted(s))
                .map(|s| s.elem_count() / o.map.outer.max(1)),
            residual: (o.residual.as_ref().filter(|r| wanted(r)))
                .map(|r| (r.shape().clone(), r.is_variable())),
        }
    }

    fn all(&self, gradient: &Tensor) -> Result<Vec<Tensor>> {
        let map = &self.map;
        let dy = View::<T>::of(gradient)?;
        let tensor = |values: Vec<T>, shape: &Shape| Tensor::from_vec(values, shape, &Device::Cpu);
        let x = self.x.as_ref().map(View::<T>::of).transpose()?;
        let missing = || candle_core::Error::Msg("a layer's input was not kept".into());
        let mut found = Vec::new();
        // The gradient of the adapter's first product.
        let mut dlow = None;
        if let Some(a) = self.adapter.as_ref().filter(|_| self.input.is_some() || self.down) {
            let up = View::<T>::of(&a.up)?;
            let mut low = uninitialised(map.rows * a.rank);
            let second = Map::rows(map.rows, a.rank, map.outer);
            second.input_gradient(&dy, &up, None, &mut low, false);
            let scale = T::from_f64(a.scale);
            low.iter_mut().for_each(|v| *v *= scale);
            dlow = Some((a, low, map.with_outer(a.rank)));
        }
        if let Some(shape) = &self.input {
            let weight = self.weight.to_dtype(T::DTYPE)?;
            let weight = View::<T>::of(&weight)?;
            let mut dx = uninitialised(map.input());
            let packed = match &self.packed {
                Some(packed) => {
                    let (bytes, limit) = (map.packed_bytes::<T>(), limit().min(TRAINING_LIMIT));
                    packed.get(ADJOINT, bytes, limit, || Ok(map.pack_adjoint(&weight)))?
                }
                None => None,
            };
            map.input_gradient(&dy, &weight, packed, &mut dx, false);
            if let Some((a, low, first)) = &dlow {
                first.input_gradient(low, &View::<T>::of(&a.down)?, None, &mut dx, true);
            }
            found.push(tensor(dx, shape)?);
        }
        if self.weight_wanted {
            let dw = map.weight_gradient(x.as_deref().ok_or_else(missing)?, &dy);
            found.push(tensor(dw, self.weight.shape())?);
        }
        if self.bias {
            found.push(tensor(column_sums(&dy, map.outer), &Shape::from(map.outer))?);
        }
        if let Some((a, low, first)) = dlow.as_ref().filter(|_| self.down) {
            let ddown = first.weight_gradient(x.as_deref().ok_or_else(missing)?, low);
            found.push(tensor(ddown, a.down.shape())?);
        }
        if let Some(a) = self.adapter.as_ref().filter(|_| self.up) {
            let second = Map::rows(map.rows, a.rank, map.outer);
            let low = self.low.as_ref().ok_or_else(missing)?;
            found.push(tensor(second.weight_gradient(low, &dy), a.up.shape())?);
        }
        if let Some(images) = self.shift {
            let image = dy.len() / images.max(1);
            let sums = dy.chunks(image.max(1)).flat_map(|rows| column_sums(rows, map.outer));
            found.push(tensor(sums.collect(), &Shape::from((images, map.outer)))?);
        }
        if let Some((shape, variable)) = &self.residual {
            let gradient = if *variable { gradient.copy()? } else { gradient.clone() };
            found.push(gradient.reshape(shape)?);
        }
        Ok(found)
    }
}
