"""The single operations that tools/bench_torch.py measures, at sizes of SDXL at 512 px and up.

Each runs on normal random f32 tensors, batch 1, written as diffusers writes it in eager mode:
forward without gradients, and under the name with `_train` the forward and the backward of
(y * fixed).sum() to the inputs and weights. `flop` counts 2 a multiplication-addition: one
forward, or for `_train` three times that (each product has one for either factor's gradient).
`bytes`, for what computes little, is 4 times the elements that must be read (inputs, weights,
`fixed`) and written (result, gradients), each once.
"""

from dataclasses import dataclass
from math import prod
from typing import Callable, Optional

from bench_timing import repeated, row

HEAD = 64
SETTLING_BYTES = 31 * 2**20


@dataclass
class Op:
    """What one operation computes from tensors of these shapes, and the shape of its result."""

    shapes: tuple
    result: tuple
    forward: Callable
    flop: Optional[int] = None

    def work(self, train):
        """`flop`, or `bytes` where that says more."""
        if self.flop is not None:
            return {"flop": self.flop * (3 if train else 1)}
        read, written = sum(map(prod, self.shapes)), prod(self.result)
        return {"bytes": 4 * (2 if train else 1) * (read + written)}


def linear(rows, inputs, outputs):
    import torch.nn.functional as F

    shapes = (1, rows, inputs), (outputs, inputs), (outputs,)
    return Op(shapes, (1, rows, outputs), F.linear, 2 * rows * inputs * outputs)


def conv3x3(inputs, outputs, side):
    import torch.nn.functional as F

    return Op(
        ((1, inputs, side, side), (outputs, inputs, 3, 3), (outputs,)), (1, outputs, side, side),
        lambda x, weight, bias: F.conv2d(x, weight, bias, padding=1), 2 * 9 * inputs * outputs * side**2,
    )


def attention(heads, tokens):
    """Self attention from projected queries, keys and values to what the output projection takes."""
    import torch.nn.functional as F

    def forward(*projected):
        q, k, v = (x.view(1, -1, heads, HEAD).transpose(1, 2) for x in projected)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False)
        return y.transpose(1, 2).reshape(1, -1, heads * HEAD)

    shape = (1, tokens, heads * HEAD)
    return Op((shape,) * 3, shape, forward, 2 * 2 * tokens**2 * heads * HEAD)


def group_norm_silu(channels, side):
    import torch.nn.functional as F

    shape = (1, channels, side, side)
    return Op(
        (shape, (channels,), (channels,)), shape,
        lambda x, weight, bias: F.silu(F.group_norm(x, 32, weight, bias, eps=1e-5)),
    )


def geglu(rows, width):
    import torch.nn.functional as F

    def forward(x):
        hidden, gate = x.chunk(2, dim=-1)
        return hidden * F.gelu(gate)

    return Op(((1, rows, width),), (1, rows, width // 2), forward)


def layer_norm(rows, width):
    import torch.nn.functional as F

    shape = (1, rows, width)
    return Op(
        (shape, (width,), (width,)), shape,
        lambda x, weight, bias: F.layer_norm(x, (width,), weight, bias, eps=1e-5),
    )


# Each has a second name with `_train` behind it.
OPS = {
    "op_linear_1024x640x5120": lambda: linear(1024, 640, 5120),
    "op_conv3x3_320_64": lambda: conv3x3(320, 320, 64),
    "op_conv3x3_640_32": lambda: conv3x3(640, 640, 32),
    "op_conv3x3_512_64": lambda: conv3x3(512, 512, 64),
    "op_conv3x3_1280_16": lambda: conv3x3(1280, 1280, 16),
    "op_conv3x3_2560to1280_16": lambda: conv3x3(2560, 1280, 16),
    "op_attention_h10_t1024": lambda: attention(10, 1024),
    "op_attention_h20_t256": lambda: attention(20, 256),
    "op_attention_h10_t4096": lambda: attention(10, 4096),
    "op_group_norm_silu_320_64": lambda: group_norm_silu(320, 64),
    "op_geglu_1024x5120": lambda: geglu(1024, 5120),
    "op_layer_norm_1024x640": lambda: layer_norm(1024, 640),
}
TRAIN = "_train"


def names():
    """All forwards, then all with gradients."""
    return [*OPS, *(name + TRAIN for name in OPS)]


class Operations:
    """The operations, with the measuring interface of bench_torch.Workload."""

    def __init__(self):
        import torch

        self.versions = {"torch": torch.__version__}
        # glibc returns freed memory to the system until a process has freed a block near 32 MiB
        # once, as any that has run a network has: without it, whether a small operation pays for
        # fresh pages on every run (up to five times its time) is left to chance.
        torch.empty(SETTLING_BYTES, dtype=torch.uint8)

    def prepare(self, name):
        """The operation, and what does it once and gives its result or gradients."""
        import torch

        train = name.endswith(TRAIN)
        op = OPS[name.removesuffix(TRAIN)]()
        generator = torch.Generator().manual_seed(0)

        def normal(shape):
            return torch.randn(shape, generator=generator)

        # Weights of unit gain, so that results are of the inputs' size.
        given = [normal(shape) / (prod(shape[1:]) ** 0.5 if i == 1 and len(shape) > 1 else 1)
                 for i, shape in enumerate(op.shapes)]
        if not train:
            return op, lambda: op.forward(*given)
        tracked, fixed = [x.requires_grad_() for x in given], normal(op.result)
        return op, lambda: torch.autograd.grad((op.forward(*tracked) * fixed).sum(), tracked)

    def measure(self, name, runs, seconds):
        """One JSON-able row."""
        import torch

        op, run = self.prepare(name)
        with torch.inference_mode(not name.endswith(TRAIN)):
            samples = repeated(run, runs, seconds)
        return row(name, samples, None, None, 0) | op.work(name.endswith(TRAIN)) | self.versions
