//! Linear layers and convolutions with bias, low-rank adapter, shift and residual.

use candle_core::{Result, Shape, Tensor, bail};

use super::conv::{Conv, nearest, nearest_gradient};
use super::elementwise::{column_sums, finish};
use super::gemm::{Matrix, gemm};
use super::memory::{Fresh, address, device};
use crate::nn::affine::Map;
use crate::nn::autograd::{attach_storage, wanted};
use crate::nn::layer::{Factors, Operands, PackedWeight};
use crate::nn::window::Window;

/// `W ∗ x + scale · up · (down ∗ x) + bias + shift + residual`, of shape `shape`.
pub fn apply(operands: Operands, packed: &PackedWeight, shape: impl Into<Shape>) -> Result<Tensor> {
    let map = operands.map;
    let x = enlarged(&map, &operands.x)?;
    let adapter = operands.adapter.as_ref();
    let merged = match adapter.filter(|a| a.is_constant() && !operands.weight.track_op()) {
        Some(adapter) => {
            packed.merged(&operands.weight, || merge(&map, &operands.weight, adapter))?
        }
        None => None,
    };
    let weight = merged.unwrap_or(&operands.weight);
    let y = Fresh::new(device(&x)?, x.dtype(), map.rows * map.outer)?;
    product(&map, &x, weight, y.address)?;
    let mut low = None;
    if let Some(adapter) = adapter.filter(|_| merged.is_none()) {
        let down = map.with_outer(adapter.rank);
        let values = Fresh::new(device(&x)?, x.dtype(), map.rows * adapter.rank)?;
        product(&down, &x, &adapter.down, values.address)?;
        let values = values.into_tensor((map.rows, adapter.rank));
        let up = Matrix::new(address(&adapter.up)?, adapter.rank).t();
        let sizes = (map.rows, map.outer, adapter.rank);
        let from = Matrix::new(address(&values)?, adapter.rank);
        let to = Matrix::new(y.address, map.outer);
        gemm(device(&x)?, x.dtype(), sizes, (from, up, to), (adapter.scale as f32, 1.0))?;
        low = Some(values);
    }
    let added = (operands.bias.as_ref(), operands.shift.as_ref(), operands.residual.as_ref());
    finish(y.address, &x, (map.rows, map.outer), added)?;
    let backward = Gradients::of(&operands, low);
    let inputs: Vec<Tensor> = operands.all().cloned().collect();
    drop(operands);
    attach_storage(y.into_storage(), shape, &inputs.iter().collect::<Vec<_>>(), move |dy| {
        backward.all(dy)
    })
}

/// The images that the window slides over.
fn enlarged(map: &Map, x: &Tensor) -> Result<Tensor> {
    map.window.as_ref().map_or(Ok(x.clone()), |window| nearest(x, window))
}

/// The map over images that are enlarged already.
fn plain(window: &Window) -> Window {
    Window { height: window.enlarged.0, width: window.enlarged.1, ..*window }
}

fn conv<'a>(map: &Map, like: &'a Tensor) -> Result<Option<Conv<'a>>> {
    let Some(window) = &map.window else { return Ok(None) };
    let window = plain(window);
    Ok(Some(Conv { device: device(like)?, dtype: like.dtype(), window, outer: map.outer }))
}

/// A weight [out, in, kh, kw] as [out, kh, kw, in]: free for weights that lie so in memory.
fn ordered(weight: &Tensor) -> Result<Tensor> {
    match weight.rank() {
        4 => weight.permute((0, 2, 3, 1))?.contiguous(),
        _ => weight.contiguous(),
    }
}

/// y = W ∗ x.
fn product(map: &Map, x: &Tensor, weight: &Tensor, y: u64) -> Result<()> {
    let weight = ordered(weight)?;
    if let Some(conv) = conv(map, x)? {
        return conv.forward(address(x)?, address(&weight)?, y);
    }
    let x_rows = Matrix::new(address(x)?, map.inner);
    let weight = Matrix::new(address(&weight)?, map.inner).t();
    let operands = (x_rows, weight, Matrix::new(y, map.outer));
    gemm(device(x)?, x.dtype(), (map.rows, map.outer, map.inner), operands, (1.0, 0.0))
}

/// dx, of the enlarged images; added to what is there when `onto`, for plain rows only.
fn input_gradient(map: &Map, dy: &Tensor, weight: &Tensor, dx: u64, onto: bool) -> Result<()> {
    let weight = ordered(weight)?;
    if let Some(conv) = conv(map, dy)? {
        if onto {
            bail!("an image's gradient is not added in place")
        }
        return conv.input_gradient(address(dy)?, address(&weight)?, dx);
    }
    let dy_rows = Matrix::new(address(dy)?, map.outer);
    let weight = Matrix::new(address(&weight)?, map.inner);
    let operands = (dy_rows, weight, Matrix::new(dx, map.inner));
    let beta = if onto { 1.0 } else { 0.0 };
    gemm(device(dy)?, dy.dtype(), (map.rows, map.inner, map.outer), operands, (1.0, beta))
}

/// dW, in the shape `shape` of the weight.
fn weight_gradient(map: &Map, x: &Tensor, dy: &Tensor, shape: &Shape) -> Result<Tensor> {
    let dw = Fresh::new(device(dy)?, dy.dtype(), shape.elem_count())?;
    if let Some(conv) = conv(map, dy)? {
        conv.weight_gradient(address(x)?, address(dy)?, dw.address)?;
        let (outer, inner, kh, kw) = shape.dims4()?;
        let dw = dw.into_tensor((outer, kh, kw, inner));
        return dw.permute((0, 3, 1, 2))?.contiguous();
    }
    let dy_rows = Matrix::new(address(dy)?, map.outer).t();
    let x_rows = Matrix::new(address(x)?, map.inner);
    let operands = (dy_rows, x_rows, Matrix::new(dw.address, map.inner));
    gemm(device(dy)?, dy.dtype(), (map.outer, map.inner, map.rows), operands, (1.0, 0.0))?;
    Ok(dw.into_tensor(shape))
}

/// A copy of the weight with the adapter added: the sum is rounded once.
fn merge(map: &Map, weight: &Tensor, adapter: &Factors) -> Result<Tensor> {
    let (base, down) = (ordered(weight)?.copy()?, ordered(&adapter.down)?);
    let up = Matrix::new(address(&adapter.up)?, adapter.rank);
    let operands =
        (up, Matrix::new(address(&down)?, map.inner), Matrix::new(address(&base)?, map.inner));
    let sizes = (map.outer, map.inner, adapter.rank);
    gemm(device(weight)?, weight.dtype(), sizes, operands, (adapter.scale as f32, 1.0))?;
    match weight.rank() {
        4 => base.permute((0, 3, 1, 2)),
        _ => Ok(base),
    }
}

/// What the backward pass needs, and which gradients are wanted.
struct Gradients {
    map: Map,
    /// Kept when a weight's gradient needs it.
    x: Option<Tensor>,
    /// Its shape, when its gradient is wanted.
    input: Option<Shape>,
    weight: Tensor,
    weight_wanted: bool,
    bias: bool,
    adapter: Option<Factors>,
    down: bool,
    up: bool,
    /// The output of the adapter's first matrix, not scaled.
    low: Option<Tensor>,
    /// Images.
    shift: Option<usize>,
    /// Its shape, and whether it is a variable.
    residual: Option<(Shape, bool)>,
}

impl Gradients {
    fn of(o: &Operands, low: Option<Tensor>) -> Self {
        let (weight_wanted, adapter) = (wanted(&o.weight), o.adapter.as_ref());
        let down = adapter.is_some_and(|a| wanted(&a.down));
        let up = adapter.is_some_and(|a| wanted(&a.up));
        Self {
            map: o.map,
            x: (weight_wanted || down).then(|| o.x.detach()),
            input: wanted(&o.x).then(|| o.x.shape().clone()),
            weight: o.weight.detach(),
            weight_wanted,
            bias: o.bias.as_ref().is_some_and(wanted),
            adapter: adapter.map(Factors::detached),
            down,
            up,
            low: low.filter(|_| up),
            shift: (o.shift.as_ref().filter(|s| wanted(s)))
                .map(|s| s.elem_count() / o.map.outer.max(1)),
            residual: (o.residual.as_ref().filter(|r| wanted(r)))
                .map(|r| (r.shape().clone(), r.is_variable())),
        }
    }

    fn all(&self, dy: &Tensor) -> Result<Vec<Tensor>> {
        let map = &self.map;
        let missing = || candle_core::Error::Msg("a layer's input was not kept".into());
        let x = self.x.as_ref().map(|x| enlarged(map, x)).transpose()?;
        let mut found = Vec::new();
        let mut dlow = None;
        if let Some(a) = self.adapter.as_ref().filter(|_| self.input.is_some() || self.down) {
            let values = Fresh::new(device(dy)?, dy.dtype(), map.rows * a.rank)?;
            let operands = (
                Matrix::new(address(dy)?, map.outer),
                Matrix::new(address(&a.up)?, a.rank),
                Matrix::new(values.address, a.rank),
            );
            let sizes = (map.rows, a.rank, map.outer);
            gemm(device(dy)?, dy.dtype(), sizes, operands, (a.scale as f32, 0.0))?;
            dlow = Some((a, values.into_tensor((map.rows, a.rank)), map.with_outer(a.rank)));
        }
        if let Some(shape) = &self.input {
            found.push(self.input_gradient(dy, dlow.as_ref(), shape)?);
        }
        if self.weight_wanted {
            let x = x.as_ref().ok_or_else(missing)?;
            found.push(weight_gradient(map, x, dy, self.weight.shape())?);
        }
        if self.bias {
            found.push(column_sums(dy, 1, map.outer)?.reshape(map.outer)?);
        }
        if let Some((a, low, first)) = dlow.as_ref().filter(|_| self.down) {
            let x = x.as_ref().ok_or_else(missing)?;
            found.push(weight_gradient(first, x, low, a.down.shape())?);
        }
        if let Some(a) = self.adapter.as_ref().filter(|_| self.up) {
            let low = self.low.as_ref().ok_or_else(missing)?;
            let second = Map::rows(map.rows, a.rank, map.outer);
            found.push((weight_gradient(&second, low, dy, a.up.shape())? * a.scale)?);
        }
        if let Some(images) = self.shift {
            found.push(column_sums(dy, images, map.outer)?);
        }
        if let Some((shape, variable)) = &self.residual {
            let gradient = if *variable { dy.copy()? } else { dy.clone() };
            found.push(gradient.reshape(shape)?);
        }
        Ok(found)
    }

    fn input_gradient(
        &self,
        dy: &Tensor,
        dlow: Option<&(&Factors, Tensor, Map)>,
        shape: &Shape,
    ) -> Result<Tensor> {
        let map = &self.map;
        let Some(window) = &map.window else {
            let dx = Fresh::new(device(dy)?, dy.dtype(), shape.elem_count())?;
            input_gradient(map, dy, &self.weight, dx.address, false)?;
            if let Some((a, low, first)) = dlow {
                input_gradient(first, low, &a.down, dx.address, true)?;
            }
            return Ok(dx.into_tensor(shape));
        };
        let of = |map: &Map, dy: &Tensor, weight: &Tensor| -> Result<Tensor> {
            let large = plain(window);
            let dx = Fresh::new(device(dy)?, dy.dtype(), large.input())?;
            input_gradient(map, dy, weight, dx.address, false)?;
            Ok(dx.into_tensor((large.batch, large.height, large.width, large.channels)))
        };
        let mut dx = of(map, dy, &self.weight)?;
        if let Some((a, low, first)) = dlow {
            dx = (dx + of(first, low, &a.down)?)?;
        }
        nearest_gradient(dx, window)?.reshape(shape)
    }
}
