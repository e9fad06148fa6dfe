//! Backward passes for what the kernels compute.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use candle_core::backend::{BackendDevice, BackendStorage};
use candle_core::cpu_backend::CpuDevice;
use candle_core::op::BackpropOp;
use candle_core::{
    CpuStorage, CudaStorage, CustomOp1, CustomOp2, CustomOp3, Layout, Result, Shape, Storage,
    Tensor, TensorId, WithDType, bail,
};

use super::adamw::add_scaled;

thread_local! {
    static GRAPH: Cell<Graph> = const { Cell::new(Graph::Now) };
    static SUMS: RefCell<Sums> = RefCell::default();
}

/// Whether the layers of this floor record a graph on this thread.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Graph {
    Now,
    /// Not now; what runs is going to run again, for its gradients.
    Later,
    Never,
}

/// Sums of gradients by variable.
pub type Sums = HashMap<TensorId, Sum>;

/// The sum of one variable's gradients.
#[derive(Clone, Debug, Default)]
pub struct Sum {
    /// None before the first gradient.
    pub total: Option<Tensor>,
    /// Whether [`summing`] added any.
    pub found: bool,
}

/// Runs `f`, which calls `backward` on this thread, and adds the gradients that the layers of
/// this floor find for the variables of `sums` there, in place, as they are found: candle's
/// own sums begin with zeros and make a new tensor for each addition.
///
/// What other operations find for these variables stays in `backward`'s result.
pub fn summing<R>(sums: &mut Sums, f: impl FnOnce() -> R) -> R {
    struct Restore<'a>(&'a mut Sums, Option<Sums>);
    impl Drop for Restore<'_> {
        fn drop(&mut self) {
            *self.0 = SUMS.replace(self.1.take().unwrap_or_default());
        }
    }
    let before = SUMS.replace(std::mem::take(sums));
    let _restore = Restore(sums, Some(before));
    f()
}

/// Adds to the sum of a variable, where there is one; gives the gradient back where not.
pub(super) fn summed(id: TensorId, gradient: Tensor) -> Result<Option<Tensor>> {
    SUMS.with_borrow_mut(|sums| {
        let Some(sum) = sums.get_mut(&id) else { return Ok(Some(gradient)) };
        sum.found = true;
        sum.total = Some(match sum.total.take() {
            Some(total) => add_scaled(total, &gradient, 1.0)?,
            None => gradient,
        });
        Ok(None)
    })
}

/// Runs `f` without recording a graph for the layers of this floor that it calls on this
/// thread, whatever their weights: their outputs are constants.
pub fn no_grad<R>(f: impl FnOnce() -> R) -> R {
    recording(Graph::Never, f)
}

/// Runs `f` with this setting for the layers that it calls on this thread.
pub(super) fn recording<R>(graph: Graph, f: impl FnOnce() -> R) -> R {
    struct Restore(Graph);
    impl Drop for Restore {
        fn drop(&mut self) {
            GRAPH.set(self.0);
        }
    }
    let _restore = Restore(GRAPH.replace(graph));
    f()
}

/// Whether gradients of this tensor are wanted.
pub fn wanted(x: &Tensor) -> bool {
    x.track_op() && GRAPH.get() == Graph::Now
}

/// Whether what runs is going to run again, for its gradients.
pub(super) fn deferred() -> bool {
    GRAPH.get() == Graph::Later
}

/// The gradients of some inputs, in their order.
type Backward = dyn Fn(&Tensor) -> Result<Vec<Tensor>> + Send + Sync;

/// [`attach_storage`] of values on the CPU.
///
/// # Errors
/// candle's.
pub fn attach<T: WithDType>(
    values: Vec<T>,
    shape: impl Into<Shape>,
    inputs: &[&Tensor],
    backward: impl Fn(&Tensor) -> Result<Vec<Tensor>> + Send + Sync + 'static,
) -> Result<Tensor> {
    attach_storage(Storage::Cpu(T::to_cpu_storage_owned(values)), shape, inputs, backward)
}

/// A tensor of values that are on a device already.
pub fn constant(storage: Storage, shape: impl Into<Shape>) -> Tensor {
    Tensor::from_storage(storage, shape, BackpropOp::none(), false)
}

/// A tensor of `storage`, whose gradient `backward` (given a contiguous tensor of `shape`)
/// turns into the gradients of `inputs`: exactly of those that [`wanted`] names, in order. A
/// variable's gradient must have memory of its own, to which others may be added.
///
/// candle's custom operations take at most three inputs, so more are chained: every link
/// hands the gradient on to the one before.
///
/// # Errors
/// candle's.
pub fn attach_storage(
    storage: Storage,
    shape: impl Into<Shape>,
    inputs: &[&Tensor],
    backward: impl Fn(&Tensor) -> Result<Vec<Tensor>> + Send + Sync + 'static,
) -> Result<Tensor> {
    let shape = shape.into();
    let inputs: Vec<&Tensor> = inputs.iter().copied().filter(|x| wanted(x)).collect();
    if inputs.is_empty() {
        return Ok(constant(storage, shape));
    }
    let shared = Arc::new(Shared { backward: Box::new(backward), rest: Mutex::default() });
    let mut storage = Some(storage);
    // The first link takes up to three inputs, each further one the link before and two more.
    let mut links = vec![inputs[..inputs.len().min(3)].to_vec()];
    links.extend(inputs[inputs.len().min(3)..].chunks(2).map(<[_]>::to_vec));
    let (count, mut before): (usize, Option<Tensor>) = (links.len(), None);
    for (i, own) in links.into_iter().enumerate() {
        // Only the last link's values are ever looked at.
        let values = if i + 1 == count {
            storage.take()
        } else {
            storage.as_ref().map(empty_like).transpose()?
        };
        let link = Link {
            output: Mutex::new(values.map(|values| (values, shape.clone()))),
            shared: shared.clone(),
            own: own.iter().map(|x| x.is_variable().then(|| x.id())).collect(),
            first: i == 0,
            last: i + 1 == count,
        };
        let mut all: Vec<&Tensor> = before.iter().collect();
        all.extend(own);
        before = Some(match all.as_slice() {
            [a] => a.apply_op1(link)?,
            [a, b] => a.apply_op2(b, link)?,
            [a, b, c] => a.apply_op3(b, c, link)?,
            _ => bail!("an operation of {} inputs", all.len()),
        });
    }
    before.map_or_else(|| bail!("an operation without inputs"), Ok)
}

/// Of the same type on the same device, with no values or hardly any.
fn empty_like(storage: &Storage) -> Result<Storage> {
    Ok(match storage {
        Storage::Cpu(s) => Storage::Cpu(CpuDevice.zeros_impl(&Shape::from(0), s.dtype())?),
        // A device gives no empty memory.
        Storage::Cuda(s) => Storage::Cuda(s.device().zeros_impl(&Shape::from(1), s.dtype())?),
        Storage::Metal(_) => bail!("layers do not run on Metal"),
    })
}

struct Shared {
    backward: Box<Backward>,
    /// Gradients that earlier links still have to hand out.
    rest: Mutex<Vec<Tensor>>,
}

/// One custom operation of candle's graph.
struct Link {
    output: Mutex<Option<(Storage, Shape)>>,
    shared: Arc<Shared>,
    /// Inputs other than the link before, and which of them are variables.
    own: Vec<Option<TensorId>>,
    first: bool,
    last: bool,
}

impl Link {
    fn forward(&self) -> Result<(Storage, Shape)> {
        let output = self.output.lock().unwrap_or_else(PoisonError::into_inner).take();
        output.map_or_else(|| bail!("an operation runs once"), Ok)
    }

    /// Gradients of the link before (if any) and of this link's own inputs.
    fn gradients(&self, gradient: &Tensor) -> Result<[Option<Tensor>; 3]> {
        let mut rest = self.shared.rest.lock().unwrap_or_else(PoisonError::into_inner);
        if self.last {
            *rest = (self.shared.backward)(&gradient.contiguous()?)?;
        }
        let count = self.own.len();
        if rest.len() < count {
            bail!("a backward pass gave {} gradients, expected {count}", rest.len());
        }
        let at = rest.len() - count;
        let mut found = [const { None }; 3];
        let mut places = found.iter_mut();
        if !self.first
            && let Some(place) = places.next()
        {
            *place = Some(gradient.clone());
        }
        for ((place, gradient), id) in places.zip(rest.split_off(at)).zip(&self.own) {
            *place = match id {
                Some(id) => summed(*id, gradient)?,
                None => Some(gradient),
            };
        }
        Ok(found)
    }
}

macro_rules! custom_op {
    ($trait:ident, $result:ty, $pick:expr, $($storage:ident $layout:ident),*; $($arg:ident),*) => {
        impl $trait for Link {
            fn name(&self) -> &'static str {
                "layer"
            }

            fn cpu_fwd(&self, $($storage: &CpuStorage, $layout: &Layout),*) -> Result<(CpuStorage, Shape)> {
                match self.forward()? {
                    (Storage::Cpu(storage), shape) => Ok((storage, shape)),
                    _ => bail!("a layer's inputs and output are on different devices"),
                }
            }

            fn cuda_fwd(&self, $($storage: &CudaStorage, $layout: &Layout),*) -> Result<(CudaStorage, Shape)> {
                match self.forward()? {
                    (Storage::Cuda(storage), shape) => Ok((storage, shape)),
                    _ => bail!("a layer's inputs and output are on different devices"),
                }
            }

            fn bwd(&self, $($arg: &Tensor,)* _res: &Tensor, gradient: &Tensor) -> Result<$result> {
                let pick: fn([Option<Tensor>; 3]) -> $result = $pick;
                self.gradients(gradient).map(pick)
            }
        }
    };
}
custom_op!(CustomOp1, Option<Tensor>, |[a, _, _]| a, _s1 _l1; _a1);
custom_op!(CustomOp2, (Option<Tensor>, Option<Tensor>), |[a, b, _]| (a, b), _s1 _l1, _s2 _l2; _a1, _a2);
custom_op!(
    CustomOp3,
    (Option<Tensor>, Option<Tensor>, Option<Tensor>),
    |[a, b, c]| (a, b, c),
    _s1 _l1, _s2 _l2, _s3 _l3; _a1, _a2, _a3
);
