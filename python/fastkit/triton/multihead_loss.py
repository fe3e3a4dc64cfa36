"""multihead_loss and orthogonality_penalty in Triton: losses of heads, their gradients, slopes of pairs.

With z the logits of head h, g the gradient to its loss, and dz that of the loss to z (see
``fastkit.ops.multihead_loss_products``)::

    forward    z = x W[h]^T + bias[h]; loss, correct, and dz (H, C, B) without g
    weights    gW[h] = g dz x,  gbias[h] = g sum of dz
    inputs     gx = sum over h of g dz^T W[h]
    slopes     of a row of a Gram matrix the sum of rho to the right of the diagonal, and rho' in place

Decomposition. ``multihead_loss_forward`` owns a head, and passes through the rows of the batch; of a head
that is not active it writes zeros and ends. A head's classes fit one tile, or are passed through twice, with
z in the place of dz between. ``multihead_loss_weights`` owns a tile of a head's gradient, and
``multihead_loss_inputs`` one of gx, over all heads and classes in one sum. ``multihead_loss_slopes`` owns a
row of a Gram matrix, which a product of PyTorch's has made, and another takes. Nothing is read back.

Bytes. forward: the element sizes of x for each head (from a cache), W and, with a gradient, 4 C B a head
written; weights: dz, x and W's size written; inputs: dz and W; slopes: 4 read and 4 written a pair.

Numerics. Factors are raised to float32, and products are float32 without TF32: what takes longest here is to
launch. Softmax and all sums are float32, in one order. A head with NaN has NaN, and a row with NaN is not
right.
"""

# Triton's annotations know nothing of launches, nor of what is constant while a kernel is compiled.
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# pyright: reportPossiblyUnboundVariable=false, reportReturnType=false

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

PROBLEMS = {"single_label": 0, "multi_label": 1, "regression": 2}
KINDS = {"abs": 0, "squared": 1, "huber": 2}
LEAST = tl.constexpr(-3.4028234663852886e38)  # of finite numbers


@triton.jit
def _logits(
    x, weight, bias, rows, classes, counts, c_in, D, x_row,
    BB: tl.constexpr, BC: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    # (BB, BC), of rows that count and of classes that there are; others have 0, and the bias.
    z = tl.zeros([BB, BC], tl.float32)
    lane = tl.arange(0, BD)
    for d in range(0, D, BD):
        inside = lane < D - d
        a = tl.load(
            x + rows[:, None] * x_row + d + lane[None, :],
            mask=counts[:, None] & inside[None, :], other=0.0,
        ).to(tl.float32)  # fmt: skip
        w = tl.load(
            weight + classes[:, None] * D + d + lane[None, :],
            mask=c_in[:, None] & inside[None, :], other=0.0,
        ).to(tl.float32)  # fmt: skip
        z = tl.dot(a, tl.trans(w), acc=z, input_precision="ieee")
    return z + tl.load(bias + classes, mask=c_in, other=0.0).to(tl.float32)[None, :]


@triton.jit
def multihead_loss_forward(
    loss, correct, count, dz, x, weight, bias, target, class_weight, active, B, C, D, x_row, ignore_index,
    eps,
    PROBLEM: tl.constexpr, MASKED: tl.constexpr, WEIGHTED: tl.constexpr, GRADIENT: tl.constexpr,
    SINGLE: tl.constexpr, BB: tl.constexpr, BC: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    # SINGLE: all classes are one tile, whose logits stay in registers.
    h = tl.program_id(0).to(tl.int64)
    if h == 0:
        counted = tl.zeros([BB], tl.int64)
        if PROBLEM == 0:
            for b in range(0, B, BB):
                inside = tl.arange(0, BB) < B - b
                t = tl.load(target + b + tl.arange(0, BB), mask=inside, other=ignore_index)
                counted += (t != ignore_index).to(tl.int64)
            tl.store(count, tl.sum(counted, axis=0))
        else:
            tl.store(count, B * C)
    on = True
    if MASKED:
        on = tl.load(active + h) != 0
    if on:
        weight += h * C * D
        bias += h * C
        dz += h * C * B
        row, lane = tl.arange(0, BB), tl.arange(0, BC)
        cw_total = C * 1.0
        if WEIGHTED:
            parts = tl.zeros([BC], tl.float32)
            for c in range(0, C, BC):
                parts += tl.load(class_weight + c + lane, mask=lane < C - c, other=0.0)
            cw_total = tl.sum(parts, axis=0)
        divisor = tl.zeros([BB], tl.float32)
        if PROBLEM == 0:  # of which all heads' programs compute the same
            for b in range(0, B, BB):
                t = tl.load(target + b + row, mask=row < B - b, other=ignore_index)
                w = tl.where(t != ignore_index, 1.0, 0.0)
                if WEIGHTED:
                    w *= tl.load(class_weight + t, mask=(t != ignore_index) & (t >= 0) & (t < C), other=0.0)
                divisor += w
        total = tl.sum(divisor, axis=0)
        share = 1.0 / tl.where(total > 0.0, total, 1.0)
        if PROBLEM == 1:
            share = 1.0 / (B * C * 1.0)
        if PROBLEM == 2:
            share = 1.0 / (B * 1.0)

        losses = tl.zeros([BB], tl.float32)
        rights = tl.zeros([BB], tl.int32)
        for b in range(0, B, BB):
            rows = (b + row).to(tl.int64)
            inside = row < B - b
            counts = inside
            t = tl.zeros([BB], tl.int64)
            wanted = tl.zeros([BB], tl.float32)
            if PROBLEM == 0:
                t = tl.load(target + rows, mask=inside, other=ignore_index).to(tl.int64)
                counts = inside & (t != ignore_index)
            if PROBLEM == 2:
                wanted = tl.load(target + rows, mask=inside, other=0.0).to(tl.float32)
            known = counts & (t >= 0) & (t < C)
            t = tl.where(known, t, -1).to(tl.int32)
            of_row = tl.where(counts, 1.0, 0.0)
            if WEIGHTED and PROBLEM == 0:
                of_row = tl.load(class_weight + t, mask=known, other=0.0)
            m = tl.full([BB], LEAST, tl.float32)
            s = tl.zeros([BB], tl.float32)
            best = tl.full([BB], -float("inf"), tl.float32)
            place = tl.zeros([BB], tl.int32)
            target_z = tl.full([BB], float("nan"), tl.float32)
            weighted = tl.zeros([BB], tl.float32)
            z = tl.zeros([BB, BC], tl.float32)
            for c in range(0, C, BC):
                classes = c + lane
                c_in = lane < C - c
                z = _logits(x, weight, bias, rows, classes, counts, c_in, D, x_row, BB, BC, BD)
                both = counts[:, None] & c_in[None, :]
                at = dz + classes[None, :].to(tl.int64) * B + rows[:, None]
                if PROBLEM == 0:
                    value = tl.where(c_in[None, :], z, -float("inf"))
                    top = tl.max(value, axis=1)
                    first = tl.argmax(value, axis=1, tie_break_left=True) + c
                    place = tl.where(top > best, first, place)
                    best = tl.where(top > best, top, best)
                    shift = tl.where(top > m, top, m)
                    s = s * tl.exp(m - shift) + tl.sum(tl.exp(value - shift[:, None]), axis=1)
                    m = shift
                    is_target = classes[None, :] == t[:, None]
                    found = tl.sum(tl.where(is_target, z, 0.0), axis=1)
                    target_z = tl.where((t >= c) & (t < c + BC) & known, found, target_z)
                    if eps > 0.0:
                        cw = tl.where(c_in, 1.0, 0.0)
                        if WEIGHTED:
                            cw = tl.load(class_weight + classes, mask=c_in, other=0.0)
                        weighted += tl.sum(tl.where(c_in[None, :], z * cw[None, :], 0.0), axis=1)
                    if GRADIENT and not SINGLE:
                        tl.store(at, z, mask=both)
                else:
                    cw = tl.where(c_in, 1.0, 0.0)
                    if WEIGHTED:
                        cw = tl.load(class_weight + classes, mask=c_in, other=0.0)
                    if PROBLEM == 1:
                        y = tl.load(target + rows[:, None] * C + classes[None, :], mask=both, other=0.0).to(
                            tl.float32
                        )
                        e = tl.exp(-tl.abs(z))
                        above = tl.where(z > 0.0, 1.0, 0.0)
                        each = (above - y) * z + tl.log(1.0 + e)
                        slope = tl.where(z > 0.0, 1.0, e) / (1.0 + e) - y
                        slope = tl.where(z == z, slope, z)
                        right = ((z > 0.0) == (y > 0.5)) & (z == z) & both
                        rights += tl.sum(right.to(tl.int32), axis=1)
                    else:
                        far = z - wanted[:, None]
                        each = far * far
                        slope = 2.0 * far
                    losses += tl.sum(tl.where(both, each * cw[None, :], 0.0), axis=1)
                    if GRADIENT:
                        tl.store(at, slope * cw[None, :] * share, mask=both)
            if PROBLEM == 0:
                lse = m + tl.log(s)
                of_target = (1.0 - eps) * of_row
                of_each = tl.where(counts, eps / C, 0.0)
                each = of_target * (lse - target_z) + of_each * (cw_total * lse - weighted)
                each = tl.where(known, each, float("nan"))
                losses += tl.where(counts, each, 0.0)
                right = known & (place == t) & (s == s)
                rights += right.to(tl.int32)
                if GRADIENT:
                    of_p = of_target + of_each * cw_total
                    if not SINGLE:
                        tl.debug_barrier()  # what other threads of this program have written is read
                    for c in range(0, C, BC):
                        classes = c + lane
                        c_in = lane < C - c
                        both = counts[:, None] & c_in[None, :]
                        at = dz + classes[None, :].to(tl.int64) * B + rows[:, None]
                        if not SINGLE:
                            z = tl.load(at, mask=both, other=0.0)
                        cw = tl.where(c_in, 1.0, 0.0)
                        if WEIGHTED:
                            cw = tl.load(class_weight + classes, mask=c_in, other=0.0)
                        g = of_p[:, None] * tl.exp(z - lse[:, None]) - of_each[:, None] * cw[None, :]
                        g -= tl.where(classes[None, :] == t[:, None], of_target[:, None], 0.0)
                        g = tl.where(known[:, None], g, float("nan")) * share
                        g = tl.where(counts[:, None], g, 0.0)
                        tl.store(at, g, mask=inside[:, None] & c_in[None, :])
        tl.store(loss + h, tl.sum(losses, axis=0) * share)
        tl.store(correct + h, tl.sum(rights, axis=0).to(tl.int64))
    else:
        tl.store(loss + h, 0.0)
        tl.store(correct + h, 0)


@triton.jit
def multihead_loss_weights(
    g_weight, g_bias, g_loss, dz, x, target, active, B, C, D, x_row, ignore_index,
    PROBLEM: tl.constexpr, MASKED: tl.constexpr, BB: tl.constexpr, BC: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    tiles_c, tiles_d = tl.cdiv(C, BC), tl.cdiv(D, BD)
    h = (tl.program_id(0) // (tiles_c * tiles_d)).to(tl.int64)
    rest = tl.program_id(0) % (tiles_c * tiles_d)
    classes = rest // tiles_d * BC + tl.arange(0, BC)
    columns = rest % tiles_d * BD + tl.arange(0, BD)
    row = tl.arange(0, BB)
    on = True
    if MASKED:
        on = tl.load(active + h) != 0
    total = tl.zeros([BC, BD], tl.float32)
    of_bias = tl.zeros([BC], tl.float32)
    if on:
        for b in range(0, B, BB):
            inside = row < B - b
            counts = inside
            if PROBLEM == 0:
                counts = inside & (tl.load(target + b + row, mask=inside, other=ignore_index) != ignore_index)
            d = tl.load(
                dz + (h * C + classes[:, None]) * B + b + row[None, :],
                mask=(classes < C)[:, None] & counts[None, :], other=0.0,
            )  # fmt: skip
            a = tl.load(
                x + (b + row).to(tl.int64)[:, None] * x_row + columns[None, :],
                mask=counts[:, None] & (columns < D)[None, :], other=0.0,
            ).to(tl.float32)  # fmt: skip
            total = tl.dot(d, a, acc=total, input_precision="ieee")
            of_bias += tl.sum(d, axis=1)
        g = tl.load(g_loss + h)
        total *= g
        of_bias *= g
    at = g_weight + (h * C + classes[:, None]) * D + columns[None, :]
    tl.store(at, total, mask=(classes < C)[:, None] & (columns < D)[None, :])
    tl.store(g_bias + h * C + classes, of_bias, mask=(classes < C) & (rest % tiles_d == 0))


@triton.jit
def multihead_loss_inputs(
    g_x, g_loss, dz, weight, target, active, B, H, C, D, ignore_index,
    PROBLEM: tl.constexpr, MASKED: tl.constexpr, BB: tl.constexpr, BK: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    # One sum over heads and classes, k = h C + c.
    tiles_d = tl.cdiv(D, BD)
    rows = tl.program_id(0) // tiles_d * BB + tl.arange(0, BB)
    columns = tl.program_id(0) % tiles_d * BD + tl.arange(0, BD)
    lane = tl.arange(0, BK)
    counts = rows < B
    if PROBLEM == 0:
        counts &= tl.load(target + rows, mask=rows < B, other=ignore_index) != ignore_index
    total = tl.zeros([BB, BD], tl.float32)
    for k in range(0, H * C, BK):
        places = (k + lane).to(tl.int64)
        used = places < H * C
        heads = places // C
        if MASKED:
            used &= tl.load(active + heads, mask=used, other=0) != 0
        g = tl.load(g_loss + heads, mask=used, other=0.0)
        d = tl.load(dz + places[None, :] * B + rows[:, None], mask=counts[:, None] & used[None, :], other=0.0)
        w = tl.load(
            weight + places[:, None] * D + columns[None, :],
            mask=used[:, None] & (columns < D)[None, :], other=0.0,
        ).to(tl.float32)  # fmt: skip
        total = tl.dot(d * g[None, :], w, acc=total, input_precision="ieee")
    at = g_x + rows.to(tl.int64)[:, None] * D + columns[None, :]
    tl.store(at, total, mask=(rows < B)[:, None] & (columns < D)[None, :])


@triton.jit
def multihead_loss_slopes(
    sums, gram, n, H, begin, width, KIND: tl.constexpr, GRADIENT: tl.constexpr, BH: tl.constexpr
):
    # gram (C, n, H), of the heads from `begin` on: a program owns a row.
    program = tl.program_id(0).to(tl.int64)
    r = begin + program % n
    gram += program * H
    lane = tl.arange(0, BH)
    total = tl.zeros([BH], tl.float32)
    for j in range(0, H, BH):
        inside = lane < H - j
        t = tl.load(gram + j + lane, mask=inside, other=0.0)
        sign = tl.where(t > 0.0, 1.0, tl.where(t < 0.0, -1.0, t))  # 0 and NaN are their own
        if KIND == 0:
            value, slope = t * sign, sign
        elif KIND == 1:
            value, slope = t * t, t + t
        else:
            size = t * sign
            small = size <= width
            value = tl.where(small, size * (size / (2.0 * width)), size - width / 2.0)
            slope = tl.where(small, t / width, sign)
        total += tl.where(inside & (j + lane > r), value, 0.0)
        if GRADIENT:
            tl.store(gram + j + lane, tl.where(j + lane == r, 0.0, slope), mask=inside)
    tl.store(sums + program, tl.sum(total, axis=0))


# Launches


def forward_options(classes: int) -> dict[str, Any]:
    """Classes are one tile where they fit 64."""
    tile = max(16, min(triton.next_power_of_2(classes), 64))
    return {"BB": 16, "BC": tile, "BD": 64, "SINGLE": classes <= tile, "num_warps": 4}


def weights_options(classes: int) -> dict[str, Any]:
    return {"BB": 16, "BC": max(16, min(triton.next_power_of_2(classes), 64)), "BD": 64, "num_warps": 4}


def inputs_options() -> dict[str, Any]:
    return {"BB": 16, "BK": 16, "BD": 64, "num_warps": 8}


def slopes_options() -> dict[str, Any]:
    return {"BH": 1024, "num_warps": 4}


def forward(
    x: Tensor, weight: Tensor, bias: Tensor, target: Tensor, active: Tensor | None,
    class_weight: Tensor | None, problem: str, label_smoothing: float, ignore_index: int, gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Loss and correct (H,), count, and dz (H C B); of heads that are not active dz is not written."""
    (B, D), (H, C, _) = x.shape, weight.shape
    x = _rows(x)
    loss, correct = x.new_empty(H, dtype=torch.float32), x.new_empty(H, dtype=torch.int64)
    dz = x.new_empty(H * C * B if gradient else 0, dtype=torch.float32)
    count = x.new_empty((), dtype=torch.int64)
    with torch.cuda.device_of(x):
        multihead_loss_forward[(H,)](
            loss, correct, count, dz, x, weight.contiguous(), bias.contiguous(), target.contiguous(),
            _or(class_weight, loss).float().contiguous(), _or(active, loss).contiguous(), B, C, D,
            x.stride(0), ignore_index, label_smoothing, PROBLEM=PROBLEMS[problem], MASKED=active is not None,
            WEIGHTED=class_weight is not None, GRADIENT=gradient, **forward_options(C),
        )  # fmt: skip
    return loss, correct, count, dz


def backward(
    g_loss: Tensor, dz: Tensor, x: Tensor, weight: Tensor, target: Tensor, active: Tensor | None,
    problem: str, ignore_index: int, needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradients to x, weight and bias, float32; empty unless needed."""
    (B, D), (H, C, _) = x.shape, weight.shape
    of_x, of_weight, of_bias = (dz.new_empty(0) for _ in range(3))
    g_loss, target, mask = g_loss.float().contiguous(), target.contiguous(), _or(active, dz).contiguous()
    flags = {"PROBLEM": PROBLEMS[problem], "MASKED": active is not None}
    with torch.cuda.device_of(x):
        if needs[0]:
            of_x, options = dz.new_empty(B, D), inputs_options()
            grid = (triton.cdiv(B, options["BB"]) * triton.cdiv(D, options["BD"]),)
            multihead_loss_inputs[grid](
                of_x, g_loss, dz, weight.contiguous(), target, mask, B, H, C, D, ignore_index,
                **flags, **options,
            )  # fmt: skip
        if needs[1] or needs[2]:
            of_weight, of_bias, options = dz.new_empty(H, C, D), dz.new_empty(H, C), weights_options(C)
            grid = (H * triton.cdiv(C, options["BC"]) * triton.cdiv(D, options["BD"]),)
            rows = _rows(x)
            multihead_loss_weights[grid](
                of_weight, of_bias, g_loss, dz, rows, target, mask, B, C, D, rows.stride(0), ignore_index,
                **flags, **options,
            )  # fmt: skip
    return (
        of_x,
        of_weight if needs[1] else dz.new_empty(0),
        of_bias if needs[2] else dz.new_empty(0),
    )


def penalty(rows: Tensor, kind: str, width: float, sums: Tensor, gradient: Tensor | None, most: int) -> None:
    """Of float32 rows (H, C, D): sums (C, H) of rho, and the gradient (H, C, D), by at most so many bytes."""
    H, C, _ = rows.shape
    by_class = rows.transpose(0, 1)
    step = max(1, min(H, most // (4 * C * H)))
    with torch.cuda.device_of(rows):
        for begin in range(0, H, step):
            here = by_class[:, begin : begin + step]
            gram = torch.bmm(here, by_class.transpose(1, 2))
            part = sums if step == H else sums.new_empty(C, here.shape[1])
            multihead_loss_slopes[(C * here.shape[1],)](
                part, gram, here.shape[1], H, begin, width, KIND=KINDS[kind], GRADIENT=gradient is not None,
                **slopes_options(),
            )  # fmt: skip
            if part is not sums:
                sums[:, begin : begin + step] = part
            if gradient is not None:
                torch.bmm(gram, by_class, out=gradient[begin : begin + step].transpose(0, 1))
            del gram  # before the next is made


def _rows(x: Tensor) -> Tensor:
    return x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()


def _or(tensor: Tensor | None, other: Tensor) -> Tensor:
    """What is not there is read nowhere."""
    return other if tensor is None else tensor
