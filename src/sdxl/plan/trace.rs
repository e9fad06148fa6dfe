//! A forward pass as a list of operations on values that have sizes and no contents.

use serde::Serialize;

use crate::{Error, Result};

/// What an operation is, and with that how it is computed and what its backward keeps.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    Linear,
    Convolution,
    SelfAttention,
    CrossAttention,
    /// With the SiLU that follows it in the networks, where one does.
    GroupNorm,
    LayerNorm,
    Geglu,
    Activation,
    Add,
    Concatenate,
    /// Rows of a table by token or by position.
    Embedding,
    /// Between [B, C, H, W] and [B, H, W, C].
    Layout,
}

/// A tensor [batch, height, width, channels]; tokens are positions of height 1.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Value {
    /// Its place in [`Trace::values`].
    pub id: usize,
    pub batch: u64,
    pub height: u64,
    pub width: u64,
    pub channels: u64,
}

impl Value {
    /// Rows of `channels` values.
    pub fn rows(&self) -> u64 {
        self.batch * self.height * self.width
    }

    pub fn elements(&self) -> u64 {
        self.rows() * self.channels
    }

    fn tokens(&self) -> u64 {
        self.height * self.width
    }
}

/// The matrix of a linear layer or convolution.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Matrix {
    /// Inputs of one output: of a convolution, channels times taps.
    pub inner: u64,
    pub outer: u64,
    /// Products with it in one pass: tokens, or the output's positions.
    pub rows: u64,
}

/// One operation.
#[derive(Clone, Debug)]
pub struct Op {
    /// The module's name in the checkpoint; of operations without weights, the nearest one's.
    pub name: String,
    pub kind: Kind,
    /// Places in [`Trace::values`]; the first is what a layer maps, the others are added to it.
    pub inputs: Vec<usize>,
    pub output: usize,
    /// Elements of weight and bias.
    pub parameters: u64,
    pub matrix: Option<Matrix>,
    /// Multiplications and additions of matrix products: 2 per multiply-add.
    pub flops: u64,
    /// Queries times heads, of attention.
    pub normalisers: u64,
    /// Whether bias, shift or residual are added to the matrix product.
    pub finished: bool,
    /// Whether the convolution reads its input enlarged.
    pub enlarged: bool,
    /// The block that it is computed anew with, see [`Trace::next_segment`]; 0 is never
    /// computed anew.
    pub segment: usize,
}

/// The operations of one forward pass in their order.
#[derive(Clone, Debug, Default)]
pub struct Trace {
    pub ops: Vec<Op>,
    /// Elements of every value.
    pub values: Vec<u64>,
    /// Values and the operations up to which the networks' functions hold them, though nothing
    /// reads them any more.
    pub(super) held: Vec<(usize, usize)>,
    segment: usize,
}

/// The window of a convolution.
#[derive(Clone, Copy, Debug)]
pub(super) struct Window {
    pub outer: u64,
    pub kernel: u64,
    pub stride: u64,
    /// Zeros before and after together.
    pub padding: u64,
    /// Height and width that the input is enlarged to first.
    pub enlarged: Option<(u64, u64)>,
}

impl Window {
    /// A convolution that keeps the size.
    pub fn same(outer: usize, kernel: u64) -> Self {
        let outer = outer as u64;
        Self { outer, kernel, stride: 1, padding: kernel - 1, enlarged: None }
    }
}

impl Trace {
    /// A value from outside.
    pub(super) fn input(
        &mut self,
        batch: u64,
        (height, width): (u64, u64),
        channels: u64,
    ) -> Value {
        let value = Value { id: self.values.len(), batch, height, width, channels };
        self.values.push(value.elements());
        value
    }

    /// Operations from here on form the next block of recomputation: what goes into it is
    /// kept, what is made in it is computed again when its gradients are.
    pub(super) fn next_segment(&mut self) {
        self.segment = self.ops.iter().map(|op| op.segment).max().unwrap_or(0) + 1;
    }

    /// The functions of the networks hold `values` at least until now.
    pub(super) fn hold(&mut self, values: &[Value]) {
        let now = self.ops.len().saturating_sub(1);
        self.held.extend(values.iter().map(|value| (value.id, now)));
    }

    fn op(&mut self, name: &str, kind: Kind, inputs: &[Value], output: Value) -> &mut Op {
        let at = self.ops.len();
        self.ops.push(Op {
            name: name.to_owned(),
            kind,
            inputs: inputs.iter().map(|v| v.id).collect(),
            output: output.id,
            parameters: 0,
            matrix: None,
            flops: 0,
            normalisers: 0,
            finished: false,
            enlarged: false,
            segment: self.segment,
        });
        &mut self.ops[at]
    }

    fn like(&mut self, x: Value, channels: u64) -> Value {
        self.input(x.batch, (x.height, x.width), channels)
    }

    /// `x` [.., in] → [.., outer], plus `added`.
    pub(super) fn linear(
        &mut self,
        name: &str,
        x: Value,
        outer: usize,
        bias: bool,
        added: Option<Value>,
    ) -> Value {
        let matrix = Matrix { inner: x.channels, outer: outer as u64, rows: x.rows() };
        let y = self.like(x, matrix.outer);
        let inputs: Vec<Value> = std::iter::once(x).chain(added).collect();
        self.product(name, Kind::Linear, &inputs, y, matrix, bias);
        y
    }

    fn product(
        &mut self,
        name: &str,
        kind: Kind,
        inputs: &[Value],
        y: Value,
        matrix: Matrix,
        bias: bool,
    ) -> &mut Op {
        let op = self.op(name, kind, inputs, y);
        op.parameters = matrix.inner * matrix.outer + if bias { matrix.outer } else { 0 };
        op.flops = 2 * matrix.inner * matrix.outer * matrix.rows;
        op.matrix = Some(matrix);
        op.finished = bias || inputs.len() > 1;
        op
    }

    /// With bias, plus `added`: shifts [B, 1, 1, outer] and residuals.
    ///
    /// # Errors
    /// When the input is smaller than the window.
    pub(super) fn conv(
        &mut self,
        name: &str,
        x: Value,
        window: Window,
        added: &[Value],
    ) -> Result<Value> {
        let Window { outer, kernel, stride, padding, enlarged } = window;
        let (height, width) = enlarged.unwrap_or((x.height, x.width));
        let side = |size: u64| match (size + padding).checked_sub(kernel) {
            Some(rest) if size > 0 => Ok(rest / stride.max(1) + 1),
            _ => {
                let message = format!("{size} positions are too few for '{name}'");
                Err(Error::invalid("width, height", message))
            }
        };
        let y = self.input(x.batch, (side(height)?, side(width)?), outer);
        let inner = x.channels * kernel * kernel;
        let inputs: Vec<Value> = std::iter::once(x).chain(added.iter().copied()).collect();
        let matrix = Matrix { inner, outer, rows: y.rows() };
        let op = self.product(name, Kind::Convolution, &inputs, y, matrix, true);
        op.enlarged = enlarged.is_some();
        Ok(y)
    }

    /// Group or layer normalisation: a weight and a bias per channel.
    pub(super) fn norm(&mut self, name: &str, kind: Kind, x: Value) -> Value {
        let y = self.like(x, x.channels);
        self.op(name, kind, &[x], y).parameters = 2 * x.channels;
        y
    }

    /// `q` [B, T, C], `k` and `v` [B, S, C].
    pub(super) fn attention(
        &mut self,
        name: &str,
        kind: Kind,
        [q, k, v]: [Value; 3],
        heads: usize,
    ) -> Value {
        let y = self.like(q, q.channels);
        let op = self.op(name, kind, &[q, k, v], y);
        op.flops = 4 * q.elements() * k.tokens();
        op.normalisers = q.rows() * heads as u64;
        y
    }

    pub(super) fn geglu(&mut self, name: &str, x: Value) -> Value {
        let y = self.like(x, x.channels / 2);
        self.op(name, Kind::Geglu, &[x], y);
        y
    }

    /// An operation that keeps the size and has no weights.
    pub(super) fn pointwise(&mut self, name: &str, kind: Kind, inputs: &[Value]) -> Value {
        let y = self.like(inputs[0], inputs[0].channels);
        self.op(name, kind, inputs, y);
        y
    }

    /// Side by side in their channels.
    pub(super) fn concatenate(&mut self, name: &str, a: Value, b: Value) -> Value {
        let y = self.like(a, a.channels + b.channels);
        self.op(name, Kind::Concatenate, &[a, b], y);
        y
    }

    /// `tokens` rows of a table of `rows`, for every sample.
    pub(super) fn embedding(
        &mut self,
        name: &str,
        rows: usize,
        (batch, tokens, width): (u64, u64, usize),
    ) -> Value {
        let y = self.input(batch, (1, tokens), width as u64);
        self.op(name, Kind::Embedding, &[], y).parameters = (rows * width) as u64;
        y
    }
}
