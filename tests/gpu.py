"""The kernels on this machine's GPU: how far from float64, and how fast against the plain form.

    python tests/gpu.py [--quick]

One row per kernel and size: relative error of the kernel and of the plain form against float64 on the same inputs, and the time
of both (median over repeated, evaluated calls). Exits with 1 if a kernel is further than 1e-5 from float64. Sizes named 7B are
those of one block of xLSTM 7B. `--quick` takes the small sizes only; with XLSTM_METAL_KERNELS=host it runs anywhere.
"""
import argparse
import os
import sys
import time
from functools import partial

os.environ.setdefault("XLSTM_METAL_KERNELS", "on")
import mlx.core as mx  # noqa: E402
import numpy as np  # noqa: E402

from xlstm_metal import metal  # noqa: E402
from xlstm_metal.blocks.chunkwise import mlstm_chunkwise  # noqa: E402
from xlstm_metal.blocks.norms import head_norm_gate, head_norm_gate_plain  # noqa: E402
from xlstm_metal.blocks.recurrent import mlstm_step  # noqa: E402
from xlstm_metal.blocks.sequence_kernels import mlstm_chunkwise_dispatch  # noqa: E402
from xlstm_metal.blocks.step_kernel import mlstm_step_dispatch  # noqa: E402


def cell_case(B, NH, S, DQK, DV, dtype, seed=0):
    "Inputs of an mLSTM with gates like those of xLSTM 7B, as mlx arrays (q, k, v in `dtype`)."
    r = np.random.default_rng(seed)
    a = lambda *s, mean=0., std=1.: mx.array((mean + std * r.normal(size=s)).astype(np.float32))
    q, k, v = (a(B, NH, S, d).astype(dtype) for d in (DQK, DQK, DV))
    return q, k, v, a(B, NH, S, mean=-3, std=2), a(B, NH, S, mean=4, std=1), (a(B, NH, DQK, DV), a(B, NH, DQK), a(B, NH, 1))


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


def norm_case(B, NH, S, DV, dtype, seed=0):
    r = np.random.default_rng(seed)
    a = lambda *s, mean=0., std=1.: mx.array((mean + std * r.normal(size=s)).astype(np.float32))
    return a(B, NH, S, DV, mean=1, std=2), a(B, S, NH * DV).astype(dtype), a(NH * DV, mean=1, std=.2).astype(dtype)


def norm64(h, o, w):
    h, o, w = (np.array(x.astype(mx.float32), np.float64) for x in (h, o, w))
    z = (h - h.mean(-1, keepdims=True)) / np.sqrt(h.var(-1, keepdims=True) + 1e-6)
    return [z.swapaxes(1, 2).reshape(o.shape) * w / (1 + np.exp(-o))]


def flat(x): return [x] if isinstance(x, mx.array) else [x[0], *x[1]]


def error(got, want):
    "Worst relative error over all outputs; NaN counts as infinite."
    rel = [np.linalg.norm(np.array(a.astype(mx.float32), np.float64) - b) / np.linalg.norm(b) for a, b in zip(flat(got), want)]
    return max(x if np.isfinite(x) else np.inf for x in rel)


def seconds(f, args, budget=1.0):
    "Median time of a call, evaluated; inputs stay the same, outputs are new each time."
    mx.eval(flat(f(*args))); mx.eval(flat(f(*args)))
    times, end = [], time.perf_counter() + budget
    while len(times) < 5 or time.perf_counter() < end and len(times) < 200:
        start = time.perf_counter()
        mx.eval(flat(f(*args)))
        times.append(time.perf_counter() - start)
    return float(np.median(times))


def cases(quick):
    "Name, kernel form, plain form, float64 form, inputs, tolerance."
    step = (mlstm_step_dispatch, mlstm_step, cell64)
    chunks = (mlstm_chunkwise_dispatch, mlstm_chunkwise, cell64)
    norm = (head_norm_gate, head_norm_gate_plain, norm64)
    f32, bf16 = mx.float32, mx.bfloat16
    for sizes in ((2, 3, 1, 5, 7), (1, 2, 1, 33, 65)): yield f"step {sizes}", *step, partial(cell_case, *sizes, f32), 1e-5
    for sizes in ((1, 2, 9, 33, 40), (2, 3, 70, 24, 40), (1, 2, 150, 65, 130)): yield f"sequence {sizes}", *chunks, partial(cell_case, *sizes, f32), 1e-5
    for sizes in ((2, 3, 5, 7), (1, 2, 70, 65)): yield f"norm and gate {sizes}", *norm, partial(norm_case, *sizes, f32), 1e-5
    if quick: return
    for B in (1, 8, 32): yield f"7B step, batch {B}", *step, partial(cell_case, B, 8, 1, 256, 512, bf16), 1e-5
    for S in (4, 16, 256, 2048): yield f"7B prompt of {S}", *chunks, partial(cell_case, 1, 8, S, 256, 512, bf16), 1e-5
    for S in (1, 2048): yield f"7B norm and gate, {S}", *norm, partial(norm_case, 1, 8, S, 512, bf16), 1e-2


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small sizes only")
    args = parser.parse_args()
    where = metal.backend()
    if where is None: sys.exit("there is no GPU that MLX can use; XLSTM_METAL_KERNELS=host runs the kernels on the CPU")
    print(f"kernels on: {where}, {mx.device_info().get('device_name', mx.default_device())}, MLX {mx.__version__}")
    print(f"{'':<32}{'kernel err':>11}{'plain err':>11}{'kernel ms':>11}{'plain ms':>11}{'speed-up':>10}")
    failed = 0
    for name, kernel, plain, exact, make, bound in cases(args.quick):
        x = make()
        want = exact(*x)
        e, p = error(kernel(*x), want), error(plain(*x), want)
        k, s = seconds(kernel, x), seconds(plain, x)
        bad = not e < bound
        print(f"{name:<32}{e:>11.1e}{p:>11.1e}{1e3 * k:>11.3f}{1e3 * s:>11.3f}{s / k:>10.2f}{'  FAIL' if bad else ''}", flush=True)
        failed += bad
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
