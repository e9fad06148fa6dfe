//! Gradient checkpointing (arXiv 1604.06174): a segment of a network keeps its inputs alone, and
//! runs a second time when its gradients are wanted.

use candle_core::{Tensor, Var, bail};

use super::autograd::{Graph, attach_storage, recording, summed, wanted};
use crate::Result;

/// What a network keeps for its gradients.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Recompute {
    /// Everything that they need.
    #[default]
    Off,
    /// The inputs of its blocks, which run a second time in the backward pass.
    Blocks,
}

/// `f(inputs)`, with the same bits. Where a gradient of an input is wanted, `f` runs without a
/// graph, and again in the backward pass.
///
/// Gradients of the variables inside `f` that are not among the inputs go to the sums of
/// [`summing`](super::autograd::summing), which the backward pass must run in. (If no input is
/// wanted, `f` is not a segment and runs once, as it is.)
///
/// # Errors
/// `f`'s. In the backward pass also: a variable inside `f` whose gradient has no sum to go to.
pub fn checkpoint(
    inputs: &[&Tensor],
    f: impl Fn(&[Tensor]) -> Result<Tensor> + Send + Sync + 'static,
) -> Result<Tensor> {
    let owned = |x: &&Tensor| (*x).clone();
    if !inputs.iter().any(|x| wanted(x)) {
        return f(&inputs.iter().map(owned).collect::<Vec<_>>());
    }
    let kept: Vec<Tensor> = inputs.iter().map(|x| x.detach()).collect();
    let wants: Vec<bool> = inputs.iter().map(|x| wanted(x)).collect();
    let y = recording(Graph::Later, || f(&kept))?;
    Ok(attached(&y, inputs, move |dy| gradients(&kept, &wants, &f, dy))?)
}

/// The gradients of the inputs that `wants` names.
fn gradients(
    inputs: &[Tensor],
    wants: &[bool],
    f: &dyn Fn(&[Tensor]) -> Result<Tensor>,
    dy: &Tensor,
) -> candle_core::Result<Vec<Tensor>> {
    let (mut own, mut given) = (Vec::new(), Vec::with_capacity(inputs.len()));
    for (x, wanted) in inputs.iter().zip(wants) {
        if *wanted {
            let var = Var::from_tensor(x)?;
            given.push(var.as_tensor().clone());
            own.push(var);
        } else {
            given.push(x.clone());
        }
    }
    let (variables, mut found) = recording(Graph::Now, || {
        let y = f(&given)?;
        let dy = dy.clone();
        // A scalar whose gradient with respect to y is dy.
        let zero = Tensor::zeros((), y.dtype(), y.device())?;
        let loss = attached(&zero, &[&y], move |_| Ok(vec![dy.clone()]))?;
        let nodes = loss.sorted_nodes().into_iter().filter(|node| node.is_variable());
        let variables: Vec<Tensor> = nodes.cloned().collect();
        Ok::<_, candle_core::Error>((variables, loss.backward()?))
    })?;
    let take = |var: Var| match found.remove(&var) {
        Some(gradient) => Ok(gradient.detach()),
        None => var.zeros_like(),
    };
    let gradients = own.into_iter().map(take).collect::<candle_core::Result<Vec<_>>>()?;
    // What layers found for other variables is in the sums; this is the rest.
    for variable in variables {
        if let Some(gradient) = found.remove(&variable)
            && summed(variable.id(), gradient.detach())?.is_some()
        {
            bail!(
                "a checkpointed segment uses a variable of shape {:?} that no gradients are \
                 summed for: run the backward pass through `Gradients::backward` with this \
                 variable among its own, or do without checkpoints",
                variable.dims()
            );
        }
    }
    Ok(gradients)
}

/// [`attach_storage`] for values that a tensor holds, which are copied.
fn attached(
    values: &Tensor,
    inputs: &[&Tensor],
    backward: impl Fn(&Tensor) -> candle_core::Result<Vec<Tensor>> + Send + Sync + 'static,
) -> candle_core::Result<Tensor> {
    let values = values.contiguous()?;
    let storage = values.storage_and_layout().0.try_clone(values.layout())?;
    attach_storage(storage, values.shape(), inputs, backward)
}
