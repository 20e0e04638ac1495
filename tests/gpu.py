"""The kernels on this machine's GPU: how far from float64, and how fast against the plain form.

    python tests/gpu.py [norm] [ffn] [gates] [update] [step] [sequence] [gradient] [chunks] [conv] [slstm] [long] [decode] [bits] [wiring] [training] [--quick] [--report FOLDER]

Without names all parts. A row is a kernel and a size: worst relative error of the kernel and of the plain form against float64 on
the same inputs, and the time of both (ten calls in flight together, median over rounds, compiled except for chunks). Exits with 1
if a kernel is further than 1e-5 from float64, or 1e-2 where the result has 16 bits. Sizes named 7B are those of one block of
xLSTM 7B. In the rows of `wiring` the two times are those of a wiring and of a loop over the same blocks; in those of `bits`, of
quantised weights and of bfloat16. `--quick` takes the small sizes only; with XLSTM_METAL_KERNELS=host it runs anywhere. A row that
cannot be measured says why, and the others follow. `--report` also writes them into a folder, as gpu.json and as a page, gpu.md:
what `make gpu-report` does, and what to attach to an issue.
"""
import argparse
import json
import os
import platform
import sys
import time
import warnings
from contextlib import contextmanager
from copy import deepcopy
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

os.environ.setdefault("XLSTM_METAL_KERNELS", "on")
import mlx.core as mx  # noqa: E402
import numpy as np  # noqa: E402
from mlx.utils import tree_flatten, tree_map  # noqa: E402

import xlstm_metal as xm  # noqa: E402
from xlstm_metal import metal  # noqa: E402
from xlstm_metal.cells import (  # noqa: E402
    add_rms_norm, add_rms_norm_plain, causal_conv1d, causal_conv1d_plain, gate_maps, gate_maps_plain, head_norm_gate, head_norm_gate_plain, mlstm_chunkwise, mlstm_chunkwise_plain,
    mlstm_log_read, mlstm_log_read_plain, mlstm_long_chunks, mlstm_long_chunks_plain, mlstm_step, mlstm_step_plain, rms_norm_gates, rms_norm_gates_plain,
    slstm_sequence, slstm_sequence_plain)
from xlstm_metal.blocks.ffn import gated_silu, gated_silu_plain  # noqa: E402
from xlstm_metal.model.config import xLSTMConfig  # noqa: E402
from xlstm_metal.model.convert import convert  # noqa: E402
from xlstm_metal.model.quantize import bit_allocation, quantize_modules  # noqa: E402
from xlstm_metal.model.model import Model  # noqa: E402
from xlstm_metal.blocks.block import make_block  # noqa: E402
from xlstm_metal.wiring.wiring import Neuron  # noqa: E402
from xlstm_metal.train.train import fit, init_weights, make_optimizer  # noqa: E402
from xlstm_metal.train.training_kernels import (  # noqa: E402
    adamw, adamw_plain, add_squares, add_squares_plain, capped_cross_entropy, capped_cross_entropy_plain)


def cell_case(B, NH, S, DQK, DV, dtype, seed=0, writes=-3.):
    "Inputs of an mLSTM with gates like those of xLSTM 7B, as mlx arrays (q, k, v in `dtype`); `writes`: mean of the input gates."
    r = np.random.default_rng(seed)
    a = lambda *s, mean=0., std=1.: mx.array((mean + std * r.normal(size=s)).astype(np.float32))
    q, k, v = (a(B, NH, S, d).astype(dtype) for d in (DQK, DQK, DV))
    return q, k, v, a(B, NH, S, mean=writes, std=2), a(B, NH, S, mean=4, std=1), (a(B, NH, DQK, DV), a(B, NH, DQK), a(B, NH, 1))


def cell64(q, k, v, i, f, state):
    "The definition in float64, token by token."
    q, k, v, i, f, C, n, m = (np.array(x.astype(mx.float32), np.float64) for x in (q, k, v, i, f, *state))
    m, h, log_f = m[..., 0], [], -np.logaddexp(0, -f)
    for t in range(q.shape[2]):
        m1 = np.maximum(log_f[..., t] + m, i[..., t])
        F, I = np.exp(log_f[..., t] + m - m1), np.exp(i[..., t] - m1)
        C = F[..., None, None] * C + I[..., None, None] * k[:, :, t, :, None] * v[:, :, t, None]
        n, m, x = F[..., None] * n + I[..., None] * k[:, :, t], m1, q[:, :, t] / np.sqrt(q.shape[-1])
        h.append(np.einsum("bhd,bhdv->bhv", x, C) / (np.maximum(np.abs((x * n).sum(-1)), np.exp(-m)) + 1e-6)[..., None])
    return [np.stack(h, 2), C, n, m[..., None]]


def log_case(B, NH, T, DQK, DV, dtype, seed=0):
    "A token beside a log of T places, of which the first is a hole."
    q, k, v, i, f, state = cell_case(B, NH, T + 1, DQK, DV, dtype, seed)
    one, log = ([a[:, :, s] for a in (q, k, v, i, f)] for s in (slice(T, None), slice(T)))
    return *one, (*state, *log[1:], mx.broadcast_to(mx.arange(T) > 0, (B, T)))


def log64(q, k, v, i, f, state):
    "The definition goes through the log."
    *state, old_k, old_v, old_i, old_f, _ = state
    def both(old, new): return mx.concatenate([old[:, :, 1:], new], axis=2)
    h = cell64(both(mx.zeros(old_k.shape, q.dtype), q), both(old_k, k), both(old_v, v), both(old_i, i), both(old_f, f), state)[0]
    return [h[:, :, -1:]]


def read_out(f):
    "What is read, without the new log."
    return lambda *args: f(*args)[0]


def long_form(f, L, q, k, v, i, f_gate, state): return f(q, k, v, i, f_gate, state, None, L)


def norm_case(B, NH, S, DV, dtype, seed=0):
    r = np.random.default_rng(seed)
    a = lambda *s, mean=0., std=1.: mx.array((mean + std * r.normal(size=s)).astype(np.float32))
    return a(B, NH, S, DV, mean=1, std=2), a(B, S, NH * DV).astype(dtype), a(NH * DV, mean=1, std=.2).astype(dtype)


def norm64(h, o, w):
    h, o, w = (np.array(x.astype(mx.float32), np.float64) for x in (h, o, w))
    z = (h - h.mean(-1, keepdims=True)) / np.sqrt(h.var(-1, keepdims=True) + 1e-6)
    return [z.swapaxes(1, 2).reshape(o.shape) * w / (1 + np.exp(-o))]


def conv_case(B, S, C, dtype, seed=0):
    r = np.random.default_rng(seed)
    a = lambda *s: mx.array(r.normal(size=s).astype(np.float32))
    return a(B, S, C).astype(dtype), a(C, 1, 4), a(C), a(B, 3, C).astype(dtype)


def conv64(x, w, b, state):
    x, w, b, state = (np.array(a.astype(mx.float32), np.float64) for a in (x, w, b, state))
    z = np.concatenate([state, x], 1)
    return [b + sum(w[:, 0, j] * z[:, j:j + x.shape[1]] for j in range(4)), z[:, x.shape[1]:]]


def rms_case(R, D, dtype, seed=0):
    r = np.random.default_rng(seed)
    return mx.array(r.normal(size=(R, D)).astype(np.float32)).astype(dtype), mx.array(1 + .1 * r.normal(size=D).astype(np.float32)).astype(dtype)


def rms64(x, w):
    x, w = (np.array(a.astype(mx.float32), np.float64) for a in (x, w))
    return [x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-6) * w]


def one_token_case(D, G, dtype, seed=0):
    r = np.random.default_rng(seed)
    a = lambda *s, mean=0., std=1.: mx.array((mean + std * r.normal(size=s)).astype(np.float32))
    return a(1, 1, D).astype(dtype), a(1, 1, D).astype(dtype), a(D, mean=1, std=.1).astype(dtype), a(G, D, std=.02), a(G)


def add_norm64(x, y, w, W, b):
    s = (x + y).astype(mx.float32) # rounded as the sum of the block is
    return [np.array(s, np.float64).reshape(-1), rms64(s, w)[0].reshape(-1)]


def norm_gates64(x, y, w, W, b):
    z = rms64(x, w)[0]
    gates = 15 * np.tanh((z @ np.array(W, np.float64).T + np.array(b, np.float64)) / 15)
    return [z, *np.split(gates.swapaxes(-1, -2), 2, -2)]


def silu_case(n, dtype, seed=0):
    r = np.random.default_rng(seed)
    return [mx.array(r.normal(size=(1, n, 2752)).astype(np.float32)).astype(dtype) for _ in range(2)]


def silu64(a, b):
    a, b = (np.array(x.astype(mx.float32), np.float64) for x in (a, b))
    return [a / (1 + np.exp(-a)) * b]


def gates_case(B, S, D, NH, dtype, seed=0):
    r = np.random.default_rng(seed)
    a = lambda *s, mean=0., std=1.: mx.array((mean + std * r.normal(size=s)).astype(np.float32))
    return a(B, S, D).astype(dtype), a(NH, D, std=D**-.5), a(NH), a(NH, D, std=D**-.5), a(NH, mean=3)


def gates64(x, *maps):
    x, Wi, bi, Wf, bf = (np.array(a.astype(mx.float32), np.float64) for a in (x, *maps))
    return [15 * np.tanh((x @ W.T + b) / 15).swapaxes(1, 2) for W, b in ((Wi, bi), (Wf, bf))]


def logits_case(N, V, dtype, seed=0):
    r = np.random.default_rng(seed)
    return mx.array(4 * r.normal(size=(N, V)).astype(np.float32)).astype(dtype), mx.array(r.integers(0, V, N).astype(np.int32))


def loss64(x, y):
    x, y = 30 * np.tanh(np.array(x.astype(mx.float32), np.float64) / 30), np.array(y)
    return [np.log(np.exp(x).sum(1)) - x[np.arange(len(y)), y]]


def update_case(*shape, dtype, seed=0):
    r = np.random.default_rng(seed)
    g, w, m, v = (mx.array(r.normal(size=shape).astype(np.float32)).astype(dtype) for _ in range(4))
    return g, w, m, mx.abs(v), mx.array([.01, .02, 3., .9, .1, .95, .05, 1e-8, .1, .5, 9.])


def update64(*args):
    g, w, m, v, s = (np.array(a.astype(mx.float32), np.float64) for a in args)
    rate, step, correction, b1, new1, b2, new2, eps, decay, longest, squares = s
    g = min(1, longest / (squares**.5 + 1e-6)) * g
    m, v = b1 * m + new1 * g, b2 * v + new2 * g * g
    return [w * (1 - rate * decay) - step * m / (np.sqrt(v) * correction + eps), m, v]


def squares64(x, sums):
    rows = np.zeros(-(-x.size // 2**18) * 2**18)
    rows[:x.size] = np.array(x.astype(mx.float32), np.float64)**2
    return [np.array(sums, np.float64) + rows.reshape(-1, 256, 1024).sum((0, 2))]


# RMSNorm as a kernel of ours, to be compared with the one MLX has: eight SIMD groups for each row
metal.live_sources["rms_norm.metal"] = """
uint t = thread_index_in_threadgroup, row = threadgroup_position_in_grid.x, D = x_shape[1];
threadgroup float parts[8];
float sum = 0.0f;
for (uint c = t; c < D; c += 256) sum += static_cast<float>(x[row * D + c]) * static_cast<float>(x[row * D + c]);
sum = simd_sum(sum);
if (thread_index_in_simdgroup == 0) parts[simdgroup_index_in_threadgroup] = sum;
threadgroup_barrier(mem_flags::mem_threadgroup);
sum = 0.0f;
for (uint g = 0; g < 8; g++) sum += parts[g];
float scale = metal::rsqrt(sum / static_cast<float>(D) + 1e-6f);
for (uint c = t; c < D; c += 256) y[row * D + c] = static_cast<T>(static_cast<float>(x[row * D + c]) * scale * static_cast<float>(w[c]));
"""
rms_kernel = metal.Kernel("rms_norm", ["x", "w"], ["y"])


def rms(x, w): return rms_kernel(x, w, shapes=[x.shape], dtypes=[x.dtype], T=x.dtype, grid=(256 * x.shape[0], 1, 1), threads=(256, 1, 1))


def gradient(form):
    "The gradients of all inputs of a cell, for a fixed random loss of h and of the last C and n."
    def f(q, k, v, i, f_, state):
        def flat_form(*a):
            h, s = form(*a[:5], tuple(a[5:]))
            return h, *s[:2]
        B, NH, S, _ = q.shape
        weights = [mx.cos(mx.arange(s[2] * s[3], dtype=mx.float32)).reshape(1, 1, *s[2:]) + mx.zeros(s) for s in (v.shape, state[0].shape)]
        weights.append(mx.sin(mx.arange(state[1].shape[2], dtype=mx.float32)) + mx.zeros(state[1].shape))
        return mx.vjp(flat_form, [q, k, v, i, f_, *state], weights)[1]
    return f


def wide(x): return mx.array(np.array(x.astype(mx.float32)), mx.float64)


def exp(x):
    "MLX's own exp of a float64 is right to float32 only."
    return mx.power(mx.array(np.array(np.e), mx.float64), x) if x.dtype == mx.float64 else mx.exp(x)


def definition(q, k, v, i, f, state):
    "The mLSTM token by token in the dtype of its inputs, for MLX to differentiate."
    C, n, m = state
    m, h = m[..., 0], []
    log_f = -mx.log1p(exp(-f))
    for t in range(q.shape[2]):
        m1 = mx.maximum(log_f[..., t] + m, i[..., t])
        F, I = exp(log_f[..., t] + m - m1)[..., None], exp(i[..., t] - m1)[..., None]
        C = F[..., None] * C + (I * k[:, :, t])[..., None] * v[:, :, t, None]
        n, m, x = F * n + I * k[:, :, t], m1, q[:, :, t] * q.shape[-1]**-.5
        den = mx.maximum(mx.abs((x * n).sum(-1)), exp(-m)) + 1e-6
        h.append((x[..., None] * C).sum(2) / den[..., None])
    return mx.stack(h, 2), (C, n, m[..., None])


def gradient64(q, k, v, i, f, state):
    with mx.stream(mx.cpu):
        x = [wide(a) for a in (q, k, v, i, f, *state)]
        return [np.array(g) for g in gradient(definition)(*x[:5], tuple(x[5:]))]


def slstm_case(B, NH, S, DH, dtype=None, seed=0):
    r = np.random.default_rng(seed)
    a = lambda *s, mean=0., std=1.: mx.array((mean + std * r.normal(size=s)).astype(np.float32))
    return a(B, NH, S, 4, DH), a(NH, 4, DH, DH, std=DH**-.5), a(NH, 4, DH, mean=1), (*(a(B, NH, DH) for _ in range(2)), 1 + mx.abs(a(B, NH, DH)), a(B, NH, DH))


def slstm_definition(x, R, b, state):
    "The equations token by token, in the type of the inputs."
    y, c, n, m = state
    ys = []
    for j in range(x.shape[2]):
        i, f, z, o = (a[:, :, 0] for a in mx.split(x[:, :, j] + mx.einsum("bhe,hgde->bhgd", y, R) + b, 4, axis=2))
        log_f = -mx.log1p(exp(-f))
        m1 = mx.where((n == 0).all((1, 2), keepdims=True), i, mx.maximum(log_f + m, i)) # nothing was read before the first token
        F, I, m = exp(mx.minimum(log_f + m - m1, 0)), exp(i - m1), m1
        c, n = F * c + I * mx.tanh(z), F * n + I
        y = c / n / (1 + exp(-o))
        ys.append(y)
    return mx.stack(ys, 2), (y, c, n, m)


def slstm_gradient(form):
    def f(x, R, b, state):
        def flat_form(*a): return flat(form(*a[:3], tuple(a[3:])))
        outs = [x[..., 0, :], *state]
        return mx.vjp(flat_form, [x, R, b, *state], [mx.cos(mx.arange(a.size)).reshape(a.shape).astype(a.dtype) for a in outs])[1]
    return f


def slstm64(x, R, b, state, form=slstm_definition):
    with mx.stream(mx.cpu):
        x, R, b, *state = map(wide, (x, R, b, *state))
        return [np.array(a) for a in flat(form(x, R, b, tuple(state)))]


def flat(x):
    "All arrays in a nest of tuples and lists."
    return [x] if hasattr(x, "shape") else [a for part in x for a in flat(part)]


def error(got, want):
    "Worst relative error over all outputs; NaN counts as infinite."
    rel = [np.linalg.norm(np.array(a.astype(mx.float32), np.float64) - b) / np.linalg.norm(b) for a, b in zip(flat(got), want)]
    return max(x if np.isfinite(x) else np.inf for x in rel)


def seconds(f, make, compiled, calls=10, budget=1.0):
    "Time of a call: median over rounds of `calls` calls, each with inputs of its own, that are in flight together, as those of a model are."
    inputs = [make(seed=j) for j in range(calls if compiled else 1)]
    def work(inputs): return [f(*x) for x in inputs]
    if compiled: work = mx.compile(work)
    else: inputs *= calls
    mx.eval(inputs)
    def one_round(): mx.eval(flat(work(inputs)))
    one_round(), one_round()
    times, end = [], time.perf_counter() + budget
    while len(times) < 5 or time.perf_counter() < end and len(times) < 50:
        start = time.perf_counter()
        one_round()
        times.append((time.perf_counter() - start) / calls)
    return float(np.median(times))


def mixed_rows(case, sizes, seed=0, **how):
    "Inputs of a cell, the first row of which has read nothing."
    *x, state = case(*sizes, seed=seed, **how)
    return *x, tuple(a * mx.minimum(mx.arange(a.shape[0]), 1).reshape(-1, *[1] * (a.ndim - 1)) for a in state)


def last_head(f):
    "What a form computes for the last of the heads; the definition is given no other, since it would take hours."
    def g(*args):
        args = [[a[:, -1:] for a in x] if isinstance(x, tuple) else x[:, -1:] for x in args] if f is cell64 else args
        return [a[:, -1:] for a in flat(f(*args))]
    return g


def with_gradient(f, weights=(0, 1)):
    "Value and gradient of a form whose outputs look like its inputs number `weights`."
    def g(*args): return mx.vjp(lambda *a: flat(f(*a)), list(args), [args[j] for j in weights])
    return g


def cases(quick):
    "By part: name, kernel form, plain form, float64 form, inputs, tolerance, whether both are compiled first."
    f32, bf16 = mx.float32, mx.bfloat16
    norm = (head_norm_gate, head_norm_gate_plain, norm64)
    for sizes in ((2, 3, 5, 7), (1, 2, 70, 65)): yield "norm", f"norm and gate {sizes}", *norm, partial(norm_case, *sizes, f32), 1e-5, True
    step = (mlstm_step, mlstm_step_plain, cell64)
    for sizes in ((2, 3, 1, 5, 7), (1, 2, 1, 33, 65)): yield "step", f"step {sizes}", *step, partial(cell_case, *sizes, f32, writes=4.), 1e-5, True
    log = (read_out(mlstm_log_read), read_out(mlstm_log_read_plain), log64)
    for sizes in ((2, 3, 4, 5, 7), (1, 2, 12, 33, 65)): yield "log", f"log {sizes}", *log, partial(log_case, *sizes, f32), 1e-5, True
    chunks = (mlstm_chunkwise, mlstm_chunkwise_plain, cell64)
    for sizes in ((1, 2, 9, 33, 40), (2, 3, 70, 24, 40), (1, 2, 150, 65, 130), (2, 1, 300, 16, 65)):
        yield "sequence", f"sequence {sizes}", *chunks, partial(cell_case, *sizes, f32), 1e-5, False
    back = (gradient(mlstm_chunkwise), gradient(mlstm_chunkwise_plain), gradient64)
    for sizes in ((2, 3, 70, 24, 40), (1, 2, 150, 65, 130)): yield "gradient", f"gradient {sizes}", *back, partial(cell_case, *sizes, f32), 1e-5, False
    conv = (causal_conv1d, causal_conv1d_plain, conv64)
    for sizes in ((2, 9, 5), (3, 100, 130)): yield "conv", f"convolution {sizes}", *conv, partial(conv_case, *sizes, f32), 1e-5, True
    slstm = (slstm_sequence, slstm_sequence_plain, slstm64)
    for sizes in ((2, 3, 9, 5), (1, 2, 20, 64), (1, 1, 6, 130)): yield "slstm", f"sLSTM {sizes}", *slstm, partial(slstm_case, *sizes), 1e-5, False
    slstm_back = (*map(slstm_gradient, slstm[:2]), partial(slstm64, form=slstm_gradient(slstm_definition)))
    for sizes in ((2, 3, 9, 5), (1, 2, 20, 64), (1, 1, 6, 130)): yield "slstm", f"sLSTM gradient {sizes}", *slstm_back, partial(slstm_case, *sizes), 1e-5, False
    mixed = partial(mixed_rows, slstm_case, sizes=(3, 2, 40, 16))
    yield "long", "sLSTM, fresh and used rows", *slstm, mixed, 1e-5, False
    yield "long", "sLSTM gradient, fresh and used rows", *slstm_back, mixed, 1e-5, False
    rows = partial(mixed_rows, cell_case, sizes=(3, 2, 70, 24, 40), dtype=f32)
    yield "long", "sequence, fresh and used rows", *chunks, rows, 1e-5, False
    yield "long", "gradient, fresh and used rows", *back, rows, 1e-5, False
    if quick: return
    for S in (8192, 16384):
        yield "long", f"7B prompt of {S}, float32", *map(last_head, chunks), partial(cell_case, 1, 8, S, 256, 512, f32), 1e-5, False
        yield "long", f"7B prompt of {S}, bfloat16", *map(last_head, chunks), partial(cell_case, 1, 8, S, 256, 512, bf16), 1e-2, False
    for B, NH, S, DH in ((1, 4, 1, 64), (1, 8, 2048, 64), (8, 8, 2048, 64), (1, 4, 2048, 256)):
        yield "slstm", f"sLSTM {B} x {S}, {NH} heads of {DH}", *slstm, partial(slstm_case, B, NH, S, DH), 1e-5, False
    yield "slstm", "sLSTM there and back, 8 x 512", *slstm_back[:2], None, partial(slstm_case, 8, 8, 512, 64), 1e-5, False
    for S in (1, 2048): yield "norm", f"7B norm and gate, {S}", *norm, partial(norm_case, 1, 8, S, 512, bf16), 1e-2, True
    for S in (1, 2048): yield "norm", f"RMSNorm of ours and MLX's, {S}", rms, lambda x, w: mx.fast.rms_norm(x, w, 1e-6), rms64, partial(rms_case, S, 4096, bf16), 1e-2, True
    for name, f, plain, form in (("sum and norm", add_rms_norm, add_rms_norm_plain, add_norm64), ("norm and gates", rms_norm_gates, rms_norm_gates_plain, norm_gates64)):
        chosen = [(lambda x, y, w, W, b, f=f: f(x, y, w)) if form is add_norm64 else (lambda x, y, w, W, b, f=f: f(x, w, W, b)) for f in (f, plain)]
        yield "norm", f"{name}, a token of 7B", *chosen, form, partial(one_token_case, 4096, 16, bf16), 1e-2, True
    silu = (gated_silu, gated_silu_plain)
    for n in (1, 16384): yield "ffn", f"silu times up, {n} x 2752", *silu, silu64, partial(silu_case, n, bf16), 1e-2, n == 1
    yield "ffn", "silu times up, there and back", *(with_gradient(f, (0,)) for f in silu), None, partial(silu_case, 16384, bf16), 1e-2, False
    maps, loss = (gate_maps, gate_maps_plain), [lambda x, y, f=f: f(x, y, 30.) for f in (capped_cross_entropy, capped_cross_entropy_plain)]
    for B, S, D, NH in ((1, 2048, 4096, 8), (32, 512, 1024, 4)):
        yield "gates", f"gates of {NH} heads, {B} x {S} tokens of {D}", *maps, gates64, partial(gates_case, B, S, D, NH, bf16), 1e-5, False
        yield "gates", "there and back", *(with_gradient(f, (1, 3)) for f in [lambda *a, f=f: [(g @ a[0].astype(f32)).sum(0) for g in f(*a)] for f in maps]), None, partial(gates_case, B, S, D, NH, bf16), 1e-2, False
    yield "update", "loss of 4096 x 50304 logits", *loss, loss64, partial(logits_case, 4096, 50304, bf16), 1e-5, False
    yield "update", "sum of squares, 51 million", add_squares, add_squares_plain, squares64, lambda seed=0: (update_case(50304 * 1024, dtype=bf16, seed=seed)[0], mx.ones(256)), 1e-5, False
    yield "update", "AdamW, 51 million", adamw, adamw_plain, update64, partial(update_case, 50304, 1024, dtype=bf16), 1e-2, False
    yield "norm", "norm and gate, there and back", *(with_gradient(f, (1,)) for f in norm[:2]), None, partial(norm_case, 32, 4, 512, 256, bf16), 1e-2, False
    for B in (1, 8, 64): yield "step", f"7B step, batch {B}", *step, partial(cell_case, B, 8, 1, 256, 512, bf16), 1e-5, True
    for B, T in ((1, 12), (64, 6), (64, 12), (64, 24)): yield "log", f"7B step, batch {B}, beside a log of {T}", *log, partial(log_case, B, 8, T, 256, 512, bf16), 1e-5, True
    for S in (4, 16, 256): yield "sequence", f"7B prompt of {S}", *chunks, partial(cell_case, 1, 8, S, 256, 512, bf16), 1e-5, S <= 16
    for t in (f32, bf16): # long inputs of 16 bits are multiplied in 16 bits
        yield "sequence", f"7B prompt of 2048, {t}", *chunks, partial(cell_case, 1, 8, 2048, 256, 512, t), 1e-5 if t == f32 else 1e-2, False
    yield "sequence", "8 rows of 256, small heads", *chunks, partial(cell_case, 8, 4, 256, 32, 64, bf16), 1e-2, False
    yield "gradient", "7B gradient, 128", *back, partial(cell_case, 1, 2, 128, 256, 512, f32), 1e-4, False # dm is a small difference
    for sizes, name in (((1, 8, 2048, 256, 512), "7B"), ((8, 4, 256, 32, 64), "small heads")):
        yield "gradient", f"{name} there and back, {sizes[2]}", *back[:2], None, partial(cell_case, *sizes, bf16), 1e-5, False
    for sizes, L in (((1, 8, 2048, 256, 512), 256), ((1, 8, 16384, 256, 512), 256), ((32, 4, 512, 128, 256), 128)):
        long = [partial(long_form, f, L) for f in (mlstm_long_chunks, mlstm_long_chunks_plain)]
        name = f"{sizes[0]} x {sizes[2]}, {sizes[1]} heads of {sizes[3]} by {sizes[4]}"
        yield "chunks", name, *map(last_head, long), last_head(cell64) if sizes[:3] == (1, 8, 2048) else None, partial(cell_case, *sizes, bf16), 1e-2, False
        yield "chunks", f"{name}, and back", *map(gradient, long), None, partial(cell_case, *sizes, bf16), 1e-2, False
    for S in (1, 2048): yield "conv", f"4096 channels, {S}", *conv, partial(conv_case, 1, S, 4096, bf16), 1e-2, True
    yield "conv", "4096 channels there and back", with_gradient(causal_conv1d, (0, 3)), with_gradient(causal_conv1d_plain, (0, 3)), None, partial(conv_case, 1, 2048, 4096, bf16), 1e-2, True


def decoders(quick, blocks=8):
    "Models whose decode step is timed: the bundled one, and some blocks of the size of xLSTM 7B where they fit well into memory."
    yield "bundled model", xm.load(dtype=mx.bfloat16, quantize=False)[0]
    if quick or .45e9 * blocks > .4 * mx.device_info().get("memory_size", float("inf")): return
    model = Model(xLSTMConfig.from_dict(vocab_size=50304, hidden_size=4096, num_hidden_layers=blocks, num_heads=8))
    model.update(tree_map(lambda p: (.02 * mx.random.normal(p.shape)).astype(mx.bfloat16), model.parameters()))
    mx.eval(model.parameters()) # or a compiled step would draw them anew each time
    yield f"{blocks} blocks of 7B", model


def decode_step(model, forward):
    "One greedy token, as a function of arrays."
    def step(token, *state):
        cache = model.make_cache()
        for j, slot in enumerate(cache): slot.state = (list(state[3 * j:3 * j + 3]), None, None)
        logits = forward(token, cache)
        return mx.argmax(logits[:, -1:], -1), *(a for slot in cache for a in slot.cache)
    return step


def per_token(model, step, n):
    cache = model.make_cache()
    model(mx.array([[0, 5, 7]]), cache)
    values = (mx.array([[5]]), *(a for slot in cache for a in slot.cache))
    for _ in range(3): values = step(*values)
    mx.eval(values)
    start = time.perf_counter()
    for _ in range(n):
        values = step(*values)
        mx.async_eval(values)
    mx.eval(values)
    return (time.perf_counter() - start) / n


def decode(quick):
    "A whole decode step, uncompiled and compiled."
    n = 10 if quick else 50
    for name, model in decoders(quick):
        step = decode_step(model, model)
        for how, f in (("", lambda: step), (", compiled", lambda: mx.compile(step))):
            with kernels("off"): plain = per_token(model, f(), n)
            yield f"{name}{how}, a token", per_token(model, f(), n), plain


def bits(quick):
    "Fewer bits for each weight: a compiled step of a token, and a prompt."
    from mlx_lm.utils import dequantize_model
    ids = mx.random.randint(2, 4000, (1, 70 if quick else 2048))
    def prompt(model, n=5):
        def read(): mx.eval(xm.State(model).read(ids).logits)
        read()
        start = time.perf_counter()
        for _ in range(n): read()
        return (time.perf_counter() - start) / n
    with TemporaryDirectory() as folder: # in floats: its own file holds 4 bits and is not quantised again
        floats = xm.load(convert("bundled", Path(folder) / "floats", dequantize=True), dtype=mx.float32)[0]
    for choice in (8, "mixed", 4):
        packed = deepcopy(floats)
        quantize_modules(packed, bit_allocation(packed, choice))
        got, want = (xm.State(m).read(ids).logits for m in (packed, dequantize_model(deepcopy(packed))))
        far = (mx.abs(got - want).max() / mx.abs(want).max()).item()
        print(f"packed products, {choice}: {far:.1e} from those of the same weights unpacked", flush=True)
        assert far < 1e-2 # a GPU multiplies float32 in fewer bits
    for name, model in decoders(quick, 32):
        n = 10 if quick else 100
        rows = [("16 bits", model)]
        for choice in (8, "mixed", 4):
            packed = deepcopy(model)
            quantize_modules(packed, bit_allocation(packed, choice))
            mx.eval(packed.parameters())
            rows.append((f"{choice} bits".replace("mixed bits", "mixed"), packed))
        token = [per_token(m, mx.compile(decode_step(m, m)), n) for _, m in rows]
        whole = [prompt(m) for _, m in rows]
        for (what, m), t, p in zip(rows, token, whole):
            size = sum(w.nbytes for _, w in tree_flatten(m.parameters())) / 1e9
            yield f"{name}, {what}, {size:.3f} GB, a token", t, token[0]
            yield f"{name}, {what}, a prompt of {ids.shape[1]}", p, whole[0]


def wiring(quick):
    "The same models run by their wiring, beside a loop over their blocks; in turns, median of each."
    for name, model in decoders(quick):
        def loop(ids, cache):
            x = model.backbone.embeddings(ids)
            for block, slot in zip(model.layers, cache):
                x, state = block(x, tuple(slot.cache))
                slot.cache = list(state)
            return model.head(model.backbone.out_norm(x))
        ids, caches = mx.array([[3, 1, 4]]), [model.make_cache(), model.make_cache()]
        model(ids, caches[0]), model(ids, caches[1])
        assert mx.array_equal(model(ids, caches[0]), loop(ids, caches[1])), "the loop computes something else"
        for how, f in (("", lambda step: step), (", compiled", mx.compile)):
            steps = [f(decode_step(model, forward)) for forward in (model, loop)]
            times = [[], []]
            for turn in range(4 if quick else 40):
                for j in (0, 1) if turn % 2 else (1, 0): times[j].append(per_token(model, steps[j], 5 if quick else 100))
            yield f"wired, {name}{how}, a token", *np.median(times, axis=1)
    yield from stage(quick)


def stage(quick):
    "Four blocks that do not wait for each other: all on one stream, and each on its own."
    blocks = [make_block(Neuron("mlstm", j, 512)) for j in range(4)]
    streams = [mx.new_stream(mx.default_device()) for _ in blocks]
    def one(x): return sum(b(x)[0] for b in blocks)
    def own(x):
        out = []
        for b, s in zip(blocks, streams):
            with mx.stream(s): out.append(b(x)[0])
        return sum(out)
    for S in (1, 512):
        x = mx.random.normal((1, S, 512))
        mx.eval(x, [b.parameters() for b in blocks])
        def took(f):
            mx.eval(f(x))
            start = time.perf_counter()
            for _ in range(5 if quick else 30): mx.eval(f(x))
            return (time.perf_counter() - start) / (5 if quick else 30)
        yield f"4 blocks beside each other, {S}", *np.median([[took(own), took(one)] for _ in range(3 if quick else 9)], axis=0)


def training(quick):
    "Losses of the same small training with kernels and without, and the time of a step; nothing compiled."
    c = xLSTMConfig.from_dict(vocab_size=64, hidden_size=128, num_hidden_layers=2, num_heads=4)
    steps = 4 if quick else 40
    def curve():
        rng = np.random.default_rng(0)
        batches = [np.cumsum(rng.integers(0, 3, (8, 257)), 1) % 64 for _ in range(steps)]
        mx.random.seed(0)
        model = init_weights(Model(c))
        start = time.perf_counter()
        losses = fit(model, batches, make_optimizer(steps, 3e-3, 2), steps, every=1, report=None)
        return np.array(losses), (time.perf_counter() - start) / steps
    mx.disable_compile()
    curve() # the kernels themselves are compiled
    ours, k = curve()
    with kernels("off"): plain, s = curve()
    mx.enable_compile()
    return ours, plain, k, s


@contextmanager
def kernels(mode):
    before = os.environ["XLSTM_METAL_KERNELS"]
    os.environ["XLSTM_METAL_KERNELS"] = mode
    try: yield
    finally: os.environ["XLSTM_METAL_KERNELS"] = before


PARTS = "norm", "ffn", "gates", "update", "step", "log", "sequence", "gradient", "chunks", "conv", "slstm", "long", "decode", "bits", "wiring", "training"


def measure(case):
    "A row of a kernel: errors against float64, times, and whether the kernel is too far."
    part, name, kernel, plain, exact, make, bound, whole = case
    row, x = dict(part=part, name=name), make()
    if exact is not None:
        want = exact(*x)
        row |= dict(kernel_error=error(kernel(*x), want), plain_error=error(plain(*x), want))
        row["failed"] = not row["kernel_error"] < bound
    return row | dict(kernel_ms=1e3 * seconds(kernel, make, whole), plain_ms=1e3 * seconds(plain, make, whole))


def measure_training(quick):
    ours, plain, k, s = training(quick)
    print("losses with kernels:", *(f"{x:.4f}" for x in ours[::max(1, len(ours) // 8)]))
    print("losses without:     ", *(f"{x:.4f}" for x in plain[::max(1, len(plain) // 8)]))
    return dict(part="training", name="small model, a training step", kernel_ms=1e3 * k, plain_ms=1e3 * s,
                furthest_losses=float(np.abs(ours - plain).max()), failed=not np.abs(ours - plain).max() < 1e-2)


def rows(parts, quick):
    "All rows; one that cannot be measured has the reason."
    def tried(part, name, f):
        try: return f()
        except (RuntimeError, ValueError, AssertionError) as e: return dict(part=part, name=name, failed=True, error=f"{type(e).__name__}: {str(e)[:2000]}")
    for case in cases(quick):
        if case[0] in parts: yield tried(*case[:2], partial(measure, case))
        mx.clear_cache()
    for part, f in (("decode", decode), ("bits", bits), ("wiring", wiring)):
        more, row = f(quick) if part in parts else iter(()), True
        while row := tried(part, part, lambda: next(more, None)):
            yield row if isinstance(row, dict) else dict(part=part, name=row[0], kernel_ms=1e3 * row[1], plain_ms=1e3 * row[2])
    if "training" in parts: yield tried("training", "training", partial(measure_training, quick))


TITLES = dict(name="", kernel_error="kernel err", plain_error="plain err", kernel_ms="kernel ms", plain_ms="plain ms", speed_up="speed-up")


def written(row):
    "The cells of a row."
    if "error" in row: return [row["name"], row["error"]]
    def number(key, form): return form.format(row[key]) if key in row else ""
    return [row["name"], number("kernel_error", "{:.1e}"), number("plain_error", "{:.1e}"), number("kernel_ms", "{:.3f}"), number("plain_ms", "{:.3f}"),
            f"{row['plain_ms'] / row['kernel_ms']:.2f}" + "  FAIL" * row.get("failed", False)]


def write_report(folder, about, found):
    folder.mkdir(parents=True, exist_ok=True)
    about |= dict(failed=sum(r.get("failed", False) for r in found), launches=metal.kernel_report())
    (folder / "gpu.json").write_text(json.dumps(about | dict(rows=found), indent=1))
    lines = [f"# Kernels on {about['device'].get('device_name', about['kernels'])}", "", f"{len(found)} rows, {about['failed']} failed.", ""]
    lines += [f"- {k}: {json.dumps(v) if isinstance(v, dict) else v}" for k, v in about.items()]
    lines += ["", f"| {' | '.join(TITLES.values())} |", "| --- " * len(TITLES) + "|", *(f"| {' | '.join(c.replace(chr(10), ' ').replace('|', '/') for c in written(r))} |" for r in found)]
    (folder / "gpu.md").write_text("\n".join(lines) + "\n")
    print(f"written: {folder / 'gpu.json'} and {folder / 'gpu.md'}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", metavar="part", help=", ".join(PARTS))
    parser.add_argument("--quick", action="store_true", help="small sizes only")
    parser.add_argument("--report", type=Path, metavar="FOLDER", help="write gpu.json and gpu.md there")
    args = parser.parse_args()
    if unknown := set(args.parts) - set(PARTS): parser.error(f"there is no part {', '.join(sorted(unknown))}")
    where = metal.backend()
    if where is None: sys.exit("there is no GPU that MLX can use; XLSTM_METAL_KERNELS=host runs the kernels on the CPU")
    about = dict(kernels=where, device=dict(mx.device_info()), system=platform.platform(), macos=platform.mac_ver()[0], python=platform.python_version(),
                 mlx=mx.__version__, xlstm_metal=xm.__version__, command=" ".join(["tests/gpu.py", *args.parts, *["--quick"] * args.quick]))
    print(f"kernels on: {where}, {mx.device_info().get('device_name', mx.default_device())}, MLX {mx.__version__}")
    print(f"{'':<46}" + "".join(f"{title:>11}" for title in list(TITLES.values())[1:]))
    found, about["warnings"] = [], []
    def note(message, *where, **more):
        about["warnings"].append(str(message))
        print(message, file=sys.stderr, flush=True)
    warnings.showwarning = note
    for row in rows(args.parts or PARTS, args.quick):
        name, *rest = written(row)
        print(f"{name:<46}" + "".join(f"{cell:>11}" for cell in rest), flush=True)
        found.append(row)
    if args.report: write_report(args.report, about, found)
    return int(any(r.get("failed") for r in found))


if __name__ == "__main__":
    sys.exit(main())
