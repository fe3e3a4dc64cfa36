"""Shapes, layouts and steps that tests of ``mtadam_update_`` and ``mtadam_square_sums`` share."""

import torch

from fastkit import ops
from fastkit.testing.mtadam import Options, check, make_grads

DTYPES = torch.float32, torch.float64, torch.bfloat16, torch.float16

# Around vectors (4 to 16), what is summed at a time (16 to 64), blocks (16384); no axes and several.
SHAPES = [
    (),
    (1,),
    (7,),
    (8,),
    (9,),
    (31,),
    (33,),
    (3, 5),
    (2, 3, 4),
    (4097,),
    (16383,),
    (16384,),
    (16385,),
    (40000,),
]
# Enough for two threads, of which large tensors are shared.
SHARED = [(5,)] * 25 + [(40000,), (3000,), (9000,), (3, 4099)]

LAYOUTS = {
    "dense": lambda t: t.clone(),
    "transposed": lambda t: t.transpose(0, 2).contiguous().transpose(0, 2),
    "channels_last": lambda t: t.contiguous(memory_format=torch.channels_last),
    "columns_of_more": lambda t: torch.cat([t + 1, t, t - 1], 3)[..., t.shape[3] : 2 * t.shape[3]],
    "every_other": lambda t: torch.stack([t, t + 1], -1)[..., 0],
    "rows_of_more": lambda t: torch.cat([t + 1, t, t - 1])[len(t) : 2 * len(t)],
    "repeated": lambda t: t[:, :1].clone().expand_as(t),
}


def update(inputs, op=ops.mtadam_update_, **options):
    *tensors, maxima = inputs
    op(*tensors, max_exp_avg_sqs=maxima, **{**Options()._asdict(), **options})
    return inputs


def check_steps(inputs, count, *, missing=(), **options):
    """Each from what the one before has left."""
    for step in range(count):
        check(inputs, **options)
        grads = make_grads(inputs.params, inputs.terms, seed=100 + step, missing=missing)
        inputs = inputs._replace(grads=grads)


def assert_same_bits(inputs, others, names=None):
    """Of all results; a NaN is equal to itself."""
    of_others = others.results()
    for name, got in inputs.results().items():
        if names is None or name.partition("[")[0] in names:
            torch.testing.assert_close(got.detach(), of_others[name].detach(), rtol=0, atol=0, equal_nan=True)
