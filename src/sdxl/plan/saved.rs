//! What stays in memory between a forward pass and its backward, and what is alive during
//! either.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use super::trace::{Kind, Op, Trace};

/// What is being trained.
#[derive(Clone, Copy, Debug)]
pub enum Trained<'a> {
    Nothing,
    /// Low-rank adapters on modules whose names end in one of `targets`.
    Adapters {
        rank: u64,
        targets: &'a [String],
    },
    Everything,
}

impl Trained<'_> {
    /// Whether the operation's own weights are trained.
    pub fn weights(self, op: &Op) -> bool {
        matches!(self, Self::Everything) && op.parameters > 0
    }

    fn rank(self, op: &Op) -> u64 {
        let Self::Adapters { rank, targets } = self else { return 0 };
        let named = |target: &String| {
            op.name.strip_suffix(target).is_some_and(|rest| rest.is_empty() || rest.ends_with('.'))
        };
        if op.matrix.is_some() && targets.iter().any(named) { rank } else { 0 }
    }

    /// Parameters of the operation's adapter.
    pub fn adapter(self, op: &Op) -> u64 {
        op.matrix.map_or(0, |matrix| self.rank(op) * (matrix.inner + matrix.outer))
    }

    /// Parameters of all adapters.
    pub fn adapters(self, trace: &Trace) -> u64 {
        trace.ops.iter().map(|op| self.adapter(op)).sum()
    }

    fn any(self, op: &Op) -> bool {
        self.weights(op) || self.rank(op) > 0
    }
}

/// Which tensors count as kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rule {
    /// Those that some gradient is computed from.
    Needed,
    /// Those that exist: besides, every tracked input of an operation, which candle's graph
    /// holds for as long as it lives, and attention's own copy of its output.
    Held,
}

/// Which values have gradients.
pub(super) fn tracked(trace: &Trace, trained: Trained) -> Vec<bool> {
    let mut tracked = vec![false; trace.values.len()];
    for op in &trace.ops {
        tracked[op.output] = trained.any(op) || op.inputs.iter().any(|id| tracked[*id]);
    }
    tracked
}

/// The kept tensors of some operations: values, each once, and bytes besides.
#[derive(Default)]
struct Kept {
    values: BTreeSet<usize>,
    bytes: u64,
}

impl Kept {
    fn add(&mut self, trace: &Trace, op: &Op, tracked: &[bool], saving: &Saving) {
        if !tracked[op.output] {
            return;
        }
        let Saving { trained, rule, element } = *saving;
        match op.kind {
            Kind::Linear | Kind::Convolution => {
                if trained.any(op) {
                    self.values.extend(op.inputs.first());
                }
                let rows = op.matrix.map_or(0, |matrix| matrix.rows);
                self.bytes += trained.rank(op) * rows * element;
            }
            Kind::SelfAttention | Kind::CrossAttention => {
                self.values.extend(&op.inputs);
                self.bytes += op.normalisers * NORMALISER;
                match rule {
                    Rule::Needed => self.values.extend([op.output]),
                    Rule::Held => self.bytes += trace.values[op.output] * element,
                }
            }
            Kind::GroupNorm | Kind::LayerNorm | Kind::Geglu | Kind::Activation => {
                self.values.extend(&op.inputs);
            }
            Kind::Add | Kind::Concatenate if rule == Rule::Held => self.values.extend(&op.inputs),
            Kind::Add | Kind::Concatenate | Kind::Embedding | Kind::Layout => {}
        }
        if rule == Rule::Held {
            self.values.extend(op.inputs.iter().filter(|id| tracked[**id]));
        }
    }

    fn bytes(&self, trace: &Trace, element: u64) -> u64 {
        self.bytes + element * self.values.iter().map(|id| trace.values[*id]).sum::<u64>()
    }
}

/// Bytes of attention's logarithm of a sum of exponentials: f32 whatever the model's type.
const NORMALISER: u64 = 4;

/// What [`Trace`] is asked about.
#[derive(Clone, Copy, Debug)]
pub struct Saving<'a> {
    pub trained: Trained<'a>,
    pub rule: Rule,
    /// Bytes of a value.
    pub element: u64,
}

impl Trace {
    /// Bytes kept from a forward pass for its backward, parameters left out.
    pub fn saved(&self, saving: &Saving) -> u64 {
        let tracked = tracked(self, saving.trained);
        let mut kept = Kept::default();
        self.ops.iter().for_each(|op| kept.add(self, op, &tracked, saving));
        kept.bytes(self, saving.element)
    }

    /// The same when every block is computed anew in the backward pass: what goes into each,
    /// and what the largest keeps besides while it is live.
    pub fn saved_recomputing(&self, saving: &Saving) -> u64 {
        let tracked = tracked(self, saving.trained);
        let made: HashMap<usize, usize> =
            self.ops.iter().map(|op| (op.output, op.segment)).collect();
        let mut segments: BTreeMap<usize, Vec<&Op>> = BTreeMap::new();
        for op in &self.ops {
            segments.entry(op.segment).or_default().push(op);
        }
        let (mut always, mut live) = (Kept::default(), Vec::new());
        for (segment, ops) in segments {
            if segment == 0 {
                ops.iter().for_each(|op| always.add(self, op, &tracked, saving));
                continue;
            }
            if !ops.iter().any(|op| tracked[op.output]) {
                continue;
            }
            let inputs = ops.iter().flat_map(|op| &op.inputs);
            always.values.extend(inputs.filter(|id| made.get(*id) != Some(&segment)));
            let mut inside = Kept::default();
            ops.iter().for_each(|op| inside.add(self, op, &tracked, saving));
            live.push(inside);
        }
        let largest = live.into_iter().map(|mut inside| {
            inside.values = inside.values.difference(&always.values).copied().collect();
            inside.bytes(self, saving.element)
        });
        largest.max().unwrap_or(0) + always.bytes(self, saving.element)
    }

    /// Most bytes of gradients of values, and of the one weight at work, that exist at a time
    /// in the backward pass. candle adds a value's first gradient to zeros and makes a new
    /// tensor for every sum. Weights' gradients are 4 bytes each.
    pub fn gradients_in_flight(&self, saving: &Saving) -> u64 {
        let tracked = tracked(self, saving.trained);
        let size = |id: &usize| self.values[*id] * saving.element;
        let mut alive: BTreeSet<usize> =
            self.ops.last().map(|op| op.output).filter(|id| tracked[*id]).into_iter().collect();
        let mut most = 0;
        for op in self.ops.iter().rev().filter(|op| tracked[op.output]) {
            let before: u64 = alive.iter().map(size).sum();
            let inputs = op.inputs.iter().filter(|id| tracked[**id]);
            let made: u64 = inputs.clone().map(size).sum();
            let added = |id: &usize| if alive.contains(id) { size(id) } else { 2 * size(id) };
            let adding = inputs.clone().map(added).max().unwrap_or(0);
            let weights = if saving.trained.weights(op) { op.parameters } else { 0 };
            most = most.max(before + made + adding + 4 * (weights + saving.trained.adapter(op)));
            alive.remove(&op.output);
            alive.extend(inputs);
        }
        most
    }

    /// Most bytes of values alive at a time without gradients.
    pub fn live(&self, element: u64) -> u64 {
        let mut last = vec![None; self.values.len()];
        let reads = self.ops.iter().enumerate();
        let reads = reads.flat_map(|(at, op)| op.inputs.iter().map(move |id| (*id, at)));
        for (id, at) in reads.chain(self.held.iter().copied()) {
            last[id] = last[id].max(Some(at));
        }
        let mut spent: BTreeMap<usize, u64> = BTreeMap::new();
        for (size, last) in self.values.iter().zip(last) {
            *spent.entry(last.unwrap_or(usize::MAX)).or_default() += size;
        }
        let made: u64 = self.ops.iter().map(|op| self.values[op.output]).sum();
        let mut now = self.values.iter().sum::<u64>() - made;
        let mut most = now;
        for (at, op) in self.ops.iter().enumerate() {
            now += self.values[op.output];
            most = most.max(now);
            now -= spent.get(&at).copied().unwrap_or(0);
        }
        most * element
    }

    /// Bytes that the largest attention works with besides its operands: a sum per query and
    /// head forwards, and backwards (`training`) another and its queries' gradient, all f32.
    pub fn attention_workspace(&self, training: bool) -> u64 {
        let work = |op: &Op| match training {
            false => op.normalisers * NORMALISER,
            true => 2 * op.normalisers * NORMALISER + 4 * self.values[op.output],
        };
        self.ops.iter().filter(|op| op.normalisers > 0).map(work).max().unwrap_or(0)
    }
}
