"""What follows a convolution in a block, for all tasks at once: the kernels, two for each direction.

The formulas are those of `cpu_kernels/norm_relu_pool.cpp`. Images are `[n, C, H, W]`, contiguous or channels-last;
`C` counts the channels of all tasks. A program has a tile of `BLOCK_C` channels and, one after another, tiles of
`BLOCK_W` windows of 2x2 places; an odd last row or column has windows of which some places are missing. Each direction
is a pass that leaves partial sums, `[sums, programs, C]`, and one that adds these up in a fixed order and writes.

Imported where Triton is there and wanted alone. With `TRITON_INTERPRET=1` before, the kernels run on a CPU's tensors.
"""

from __future__ import annotations

import triton
import triton.language as tl

INACTIVE = tl.constexpr(4)
single, double = tl.float32, tl.float64


@triton.jit
def _windows(tile, n, H: tl.constexpr, W: tl.constexpr, BLOCK_W: tl.constexpr):
    """Of the windows of a tile: image, row and column of the first place, and which of the four places are there."""
    rows: tl.constexpr = (H + 1) // 2
    cols: tl.constexpr = (W + 1) // 2
    i = tile * BLOCK_W + tl.arange(0, BLOCK_W)
    image = i // (rows * cols)
    row = i // cols % rows
    col = i % cols
    there = i < n * rows * cols
    right = there & (2 * col + 1 < W)
    below = there & (2 * row + 1 < H)
    return image, row, col, there, right, below, right & below


@triton.jit
def _channels(C, BLOCK_C: tl.constexpr):
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    return c, c < C


@triton.jit
def _four(x, image, row, col, c, there, right, below, full, in_c, sn, sc, sh, sw, real: tl.constexpr):
    """The four places of each window `[BLOCK_C, BLOCK_W]`, 0 where there is none."""
    at = x + (image * sn + 2 * row * sh + 2 * col * sw)[None, :] + (c * sc)[:, None]
    keep = in_c[:, None]
    x0 = tl.load(at, mask=keep & there[None, :], other=0).to(real)
    x1 = tl.load(at + sw, mask=keep & right[None, :], other=0).to(real)
    x2 = tl.load(at + sh, mask=keep & below[None, :], other=0).to(real)
    x3 = tl.load(at + sh + sw, mask=keep & full[None, :], other=0).to(real)
    return x0, x1, x2, x3


@triton.jit
def _put(x, image, row, col, c, there, right, below, full, in_c, sn, sc, sh, sw, x0, x1, x2, x3):
    at = x + (image * sn + 2 * row * sh + 2 * col * sw)[None, :] + (c * sc)[:, None]
    keep = in_c[:, None]
    tl.store(at, x0, mask=keep & there[None, :])
    tl.store(at + sw, x1, mask=keep & right[None, :])
    tl.store(at + sh, x2, mask=keep & below[None, :])
    tl.store(at + sh + sw, x3, mask=keep & full[None, :])


@triton.jit
def _added(partial, which, c, in_c, C, PROGRAMS: tl.constexpr, PADDED: tl.constexpr, real: tl.constexpr):
    """The partial sums of a tile of channels `[BLOCK_C, PADDED]`."""
    p = tl.arange(0, PADDED)
    at = partial + (which * PROGRAMS + p)[None, :] * C + c[:, None]
    return tl.load(at, mask=in_c[:, None] & (p < PROGRAMS)[None, :], other=0).to(real)


@triton.jit
def choose(
    y, gamma, best, place, partial, n, C, tiles: tl.constexpr, sn, sc, sh, sw, pn, pc, ph, pw,
    H: tl.constexpr, W: tl.constexpr, PROGRAMS: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_W: tl.constexpr,
    real: tl.constexpr,
):  # fmt: skip
    """The place that pooling takes in each window; of each program's part count, mean and squared deviations."""
    c, in_c = _channels(C, BLOCK_C)
    sign = tl.where(tl.load(gamma + c, mask=in_c, other=1) < 0, -1.0, 1.0).to(real)[:, None]
    count = tl.zeros([BLOCK_C], real)
    mean = tl.zeros([BLOCK_C], real)
    squares = tl.zeros([BLOCK_C], real)
    for t in range(tiles):
        image, row, col, there, right, below, full = _windows(tl.program_id(1) * tiles + t, n, H, W, BLOCK_W)
        y0, y1, y2, y3 = _four(y, image, row, col, c, there, right, below, full, in_c, sn, sc, sh, sw, real)
        more = tl.sum(there.to(tl.int32) + right.to(tl.int32) + below.to(tl.int32) + full.to(tl.int32), 0).to(real)
        centre = tl.sum((y0 + y1) + (y2 + y3), 1) / tl.maximum(more, 1)
        d0 = tl.where(there[None, :], y0 - centre[:, None], 0)
        d1 = tl.where(right[None, :], y1 - centre[:, None], 0)
        d2 = tl.where(below[None, :], y2 - centre[:, None], 0)
        d3 = tl.where(full[None, :], y3 - centre[:, None], 0)
        part = more / tl.maximum(count + more, 1)
        shift = centre - mean
        squares += tl.sum((d0 * d0 + d1 * d1) + (d2 * d2 + d3 * d3), 1) + shift * shift * count * part
        mean += shift * part
        count += more
        v0, v1, v2, v3 = sign * y0, sign * y1, sign * y2, sign * y3
        upper, lower = tl.where(v1 > v0, v1, v0), tl.where(v3 > v2, v3, v2)
        chosen = tl.where(lower > upper, tl.where(v3 > v2, 3, 2), tl.where(v1 > v0, 1, 0))
        value = sign * tl.where(lower > upper, lower, upper)
        to = (image * pn + row * ph + col * pw)[None, :] + (c * pc)[:, None]
        kept = in_c[:, None] & full[None, :]
        tl.store(best + to, value, mask=kept)
        tl.store(place + to, chosen.to(tl.uint8), mask=kept)
    at = partial + tl.program_id(1) * C + c
    tl.store(at, count, mask=in_c)
    tl.store(at + PROGRAMS * C, mean, mask=in_c)
    tl.store(at + 2 * PROGRAMS * C, squares, mask=in_c)


@triton.jit
def normalise(
    gamma, beta, partial, best, place, out, statistics, n, C, tiles: tl.constexpr, pn, pc, ph, pw,
    H: tl.constexpr, W: tl.constexpr, EPS: tl.constexpr, PROGRAMS: tl.constexpr, PADDED: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_W: tl.constexpr, real: tl.constexpr,
):  # fmt: skip
    """The block's result, its statistics `[2, C]` (mean and 1 / deviation), and INACTIVE where the ReLU is off."""
    c, in_c = _channels(C, BLOCK_C)
    counts = _added(partial, 0, c, in_c, C, PROGRAMS, PADDED, real)
    means = _added(partial, 1, c, in_c, C, PROGRAMS, PADDED, real)
    squares = _added(partial, 2, c, in_c, C, PROGRAMS, PADDED, real)
    N = tl.maximum(tl.sum(counts, 1), 1)
    mean = tl.sum(counts * means, 1) / N
    apart = means - mean[:, None]
    rstd = 1 / tl.sqrt(tl.sum(squares + counts * apart * apart, 1) / N + EPS)
    if tl.program_id(1) == 0:
        tl.store(statistics + c, mean, mask=in_c)
        tl.store(statistics + C + c, rstd, mask=in_c)
    scale = (tl.load(gamma + c, mask=in_c, other=0).to(real) * rstd)[:, None]
    bias = tl.load(beta + c, mask=in_c, other=0).to(real)[:, None]
    for t in range(tiles):
        image, row, col, _there, _right, _below, full = _windows(tl.program_id(1) * tiles + t, n, H, W, BLOCK_W)
        to = (image * pn + row * ph + col * pw)[None, :] + (c * pc)[:, None]
        kept = in_c[:, None] & full[None, :]
        value = (tl.load(best + to, mask=kept, other=0).to(real) - mean[:, None]) * scale + bias
        tl.store(out + to, tl.where(value < 0, 0, value), mask=kept)
        tl.store(place + to, tl.full(value.shape, INACTIVE, tl.uint8), mask=kept & (value <= 0))


@triton.jit
def gather(
    g, place, best, statistics, partial, n, C, tiles: tl.constexpr, pn, pc, ph, pw,
    H: tl.constexpr, W: tl.constexpr, PROGRAMS: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_W: tl.constexpr,
    real: tl.constexpr,
):  # fmt: skip
    """Partial sums of `g` at active places and of `g * (p - mean)` there."""
    c, in_c = _channels(C, BLOCK_C)
    mean = tl.load(statistics + c, mask=in_c, other=0).to(real)[:, None]
    first = tl.zeros([BLOCK_C], real)
    second = tl.zeros([BLOCK_C], real)
    for t in range(tiles):
        image, row, col, _there, _right, _below, full = _windows(tl.program_id(1) * tiles + t, n, H, W, BLOCK_W)
        to = (image * pn + row * ph + col * pw)[None, :] + (c * pc)[:, None]
        kept = in_c[:, None] & full[None, :]
        active = kept & (tl.load(place + to, mask=kept, other=4) != INACTIVE)
        value = tl.load(g + to, mask=active, other=0).to(real)
        first += tl.sum(value, 1)
        second += tl.sum(tl.where(active, value * (tl.load(best + to, mask=active, other=0).to(real) - mean), 0), 1)
    at = partial + tl.program_id(1) * C + c
    tl.store(at, first, mask=in_c)
    tl.store(at + PROGRAMS * C, second, mask=in_c)


@triton.jit
def spread(
    g, place, y, gamma, statistics, partial, gy, sums, n, C, tiles: tl.constexpr, sn, sc, sh, sw, pn, pc, ph, pw,
    H: tl.constexpr, W: tl.constexpr, PROGRAMS: tl.constexpr, PADDED: tl.constexpr, BLOCK_C: tl.constexpr,
    BLOCK_W: tl.constexpr, real: tl.constexpr,
):  # fmt: skip
    """`gy = s * (G - A/N - x * B/N)`, and `sums [2, C]`: A and B, the gradients of beta and gamma."""
    c, in_c = _channels(C, BLOCK_C)
    mean = tl.load(statistics + c, mask=in_c, other=0).to(real)
    rstd = tl.load(statistics + C + c, mask=in_c, other=0).to(real)
    A = tl.sum(_added(partial, 0, c, in_c, C, PROGRAMS, PADDED, real), 1)
    B = tl.sum(_added(partial, 1, c, in_c, C, PROGRAMS, PADDED, real), 1) * rstd
    if tl.program_id(1) == 0:
        tl.store(sums + c, A, mask=in_c)
        tl.store(sums + C + c, B, mask=in_c)
    N = (n * H * W).to(real)
    scale = tl.load(gamma + c, mask=in_c, other=0).to(real) * rstd
    slope = (-scale * rstd * B / N)[:, None]
    constant = (-scale * A / N)[:, None]
    for t in range(tiles):
        image, row, col, there, right, below, full = _windows(tl.program_id(1) * tiles + t, n, H, W, BLOCK_W)
        y0, y1, y2, y3 = _four(y, image, row, col, c, there, right, below, full, in_c, sn, sc, sh, sw, real)
        to = (image * pn + row * ph + col * pw)[None, :] + (c * pc)[:, None]
        kept = in_c[:, None] & full[None, :]
        chosen = tl.load(place + to, mask=kept, other=4)
        spike = scale[:, None] * tl.load(g + to, mask=kept, other=0).to(real)
        m = mean[:, None]
        x0 = constant + slope * (y0 - m) + tl.where(chosen == 0, spike, 0)
        x1 = constant + slope * (y1 - m) + tl.where(chosen == 1, spike, 0)
        x2 = constant + slope * (y2 - m) + tl.where(chosen == 2, spike, 0)
        x3 = constant + slope * (y3 - m) + tl.where(chosen == 3, spike, 0)
        _put(gy, image, row, col, c, there, right, below, full, in_c, sn, sc, sh, sw, x0, x1, x2, x3)


@triton.jit
def project(
    h, y, g, place, statistics, partial, n, C, tiles: tl.constexpr, sn, sc, sh, sw, pn, pc, ph, pw,
    H: tl.constexpr, W: tl.constexpr, PROGRAMS: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_W: tl.constexpr,
    real: tl.constexpr,
):  # fmt: skip
    """Partial sums of `h`, of `h * (y - mean)` and of `h * G`."""
    c, in_c = _channels(C, BLOCK_C)
    m = tl.load(statistics + c, mask=in_c, other=0).to(real)[:, None]
    sum_h = tl.zeros([BLOCK_C], real)
    sum_hy = tl.zeros([BLOCK_C], real)
    sum_hg = tl.zeros([BLOCK_C], real)
    for t in range(tiles):
        image, row, col, there, right, below, full = _windows(tl.program_id(1) * tiles + t, n, H, W, BLOCK_W)
        h0, h1, h2, h3 = _four(h, image, row, col, c, there, right, below, full, in_c, sn, sc, sh, sw, real)
        y0, y1, y2, y3 = _four(y, image, row, col, c, there, right, below, full, in_c, sn, sc, sh, sw, real)
        sum_h += tl.sum((h0 + h1) + (h2 + h3), 1)
        sum_hy += tl.sum((h0 * (y0 - m) + h1 * (y1 - m)) + (h2 * (y2 - m) + h3 * (y3 - m)), 1)
        to = (image * pn + row * ph + col * pw)[None, :] + (c * pc)[:, None]
        kept = in_c[:, None] & full[None, :]
        chosen = tl.load(place + to, mask=kept, other=4)
        at_place = tl.where(chosen < 2, tl.where(chosen == 0, h0, h1), tl.where(chosen == 2, h2, h3))
        active = kept & (chosen != INACTIVE)
        value = tl.load(g + to, mask=active, other=0).to(real)
        sum_hg += tl.sum(tl.where(active, at_place * value, 0), 1)
    at = partial + tl.program_id(1) * C + c
    tl.store(at, sum_h, mask=in_c)
    tl.store(at + PROGRAMS * C, sum_hy, mask=in_c)
    tl.store(at + 2 * PROGRAMS * C, sum_hg, mask=in_c)


@triton.jit
def spread_again(
    h, hgamma, hbeta, y, g, place, best, gamma, statistics, sums, partial, gg, ggamma, gy,
    n, C, tiles: tl.constexpr, sn, sc, sh, sw, pn, pc, ph, pw,
    H: tl.constexpr, W: tl.constexpr, PROGRAMS: tl.constexpr, PADDED: tl.constexpr, BLOCK_C: tl.constexpr,
    BLOCK_W: tl.constexpr, real: tl.constexpr,
):  # fmt: skip
    """The derivative of `(gy, B, A)` with cotangents `(h, hgamma, hbeta)`: by `g`, `gamma` and `y` (`SecondOrder`)."""
    c, in_c = _channels(C, BLOCK_C)
    mean = tl.load(statistics + c, mask=in_c, other=0).to(real)
    r = tl.load(statistics + C + c, mask=in_c, other=0).to(real)
    A = tl.load(sums + c, mask=in_c, other=0).to(real)
    B = tl.load(sums + C + c, mask=in_c, other=0).to(real)
    sum_h = tl.sum(_added(partial, 0, c, in_c, C, PROGRAMS, PADDED, real), 1)
    K = tl.sum(_added(partial, 1, c, in_c, C, PROGRAMS, PADDED, real), 1) * r
    sum_hg = tl.sum(_added(partial, 2, c, in_c, C, PROGRAMS, PADDED, real), 1)
    weight = tl.load(gamma + c, mask=in_c, other=0).to(real)
    N = (n * H * W).to(real)
    scale = weight * r
    M = sum_hg - (A * sum_h + B * K) / N
    c1 = tl.load(hgamma + c, mask=in_c, other=0).to(real) - scale * K / N
    c2 = -scale * B / N
    along_h = (r * c2)[:, None]
    along_g = (r * c1)[:, None]
    along_y = (-r * (r * (c1 * B + c2 * K) / N + weight * M * r * r / N))[:, None]
    constant = (-r * (c1 * A + c2 * sum_h) / N)[:, None]
    from_one = (tl.load(hbeta + c, mask=in_c, other=0).to(real) - scale * sum_h / N)[:, None]
    if tl.program_id(1) == 0:
        tl.store(ggamma + c, (r * M), mask=in_c)
    m = mean[:, None]
    for t in range(tiles):
        image, row, col, there, right, below, full = _windows(tl.program_id(1) * tiles + t, n, H, W, BLOCK_W)
        h0, h1, h2, h3 = _four(h, image, row, col, c, there, right, below, full, in_c, sn, sc, sh, sw, real)
        y0, y1, y2, y3 = _four(y, image, row, col, c, there, right, below, full, in_c, sn, sc, sh, sw, real)
        to = (image * pn + row * ph + col * pw)[None, :] + (c * pc)[:, None]
        kept = in_c[:, None] & full[None, :]
        chosen = tl.load(place + to, mask=kept, other=4)
        at_place = tl.where(chosen < 2, tl.where(chosen == 0, h0, h1), tl.where(chosen == 2, h2, h3))
        p = tl.load(best + to, mask=kept, other=0).to(real)
        value = scale[:, None] * at_place + from_one + along_g * (p - m)
        tl.store(gg + to, tl.where(chosen == INACTIVE, 0, value), mask=kept)
        spike = along_g * tl.load(g + to, mask=kept, other=0).to(real)
        x0 = constant + along_y * (y0 - m) + along_h * h0 + tl.where(chosen == 0, spike, 0)
        x1 = constant + along_y * (y1 - m) + along_h * h1 + tl.where(chosen == 1, spike, 0)
        x2 = constant + along_y * (y2 - m) + along_h * h2 + tl.where(chosen == 2, spike, 0)
        x3 = constant + along_y * (y3 - m) + along_h * h3 + tl.where(chosen == 3, spike, 0)
        _put(gy, image, row, col, c, there, right, below, full, in_c, sn, sc, sh, sw, x0, x1, x2, x3)
