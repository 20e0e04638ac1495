"""NX-AI's own kernels beside ours, at the sizes of xLSTM 7B, on one GPU.

    pip install mlstm_kernels (without its dependencies), PyTorch for CUDA, Triton
    python tests/originals.py

A row is a form and a size: worst relative error against float64 on the same bf16 inputs, and the time of a call (ten in flight
together, median over rounds), forward or with the backward pass of a random loss of h.
"""
import time

import gpu
import mlx.core as mx
import numpy as np
import torch
from mlstm_kernels.torch.chunkwise.triton_limit_chunk import mlstm_chunkwise__limit_chunk
from mlstm_kernels.torch.recurrent.triton_step import mlstm_recurrent_step__triton
from xlstm_metal.cells import mlstm_chunkwise, mlstm_chunkwise_plain, mlstm_step, mlstm_step_plain


def seconds(work, wait, calls=10, budget=1.0):
    "Median time of a call over rounds of `calls`."
    for _ in range(3): wait(work())
    times, end = [], time.perf_counter() + budget
    while len(times) < 5 or time.perf_counter() < end and len(times) < 50:
        start = time.perf_counter()
        wait([work() for _ in range(calls)])
        times.append((time.perf_counter() - start) / calls)
    return float(np.median(times))


def wait_torch(_): torch.cuda.synchronize()
def wait_mlx(x): mx.eval(x)


def to_torch(x, dtype):
    return torch.tensor(np.array(x.astype(mx.float32)), device="cuda").to(dtype)


def row(name, h, want, work, wait):
    error = "" if want is None else f"{np.linalg.norm(h() - want) / np.linalg.norm(want):.1e}"
    print(f"{name:<58}{error:>10}{1e3 * seconds(work, wait):>10.3f} ms", flush=True)


def sequence(B, NH, S, DQK, DV):
    x = gpu.cell_case(B, NH, S, DQK, DV, mx.bfloat16)
    want = gpu.cell64(*x)[0]
    dh = mx.random.normal(want.shape)
    def ours(form): return lambda: form(*x)
    def with_grad(form): return lambda: mx.vjp(lambda *a: [form(*a[:5], a[5:])[0]], [*x[:5], *x[5]], [dh])
    for name, form in (("kernels of ours", mlstm_chunkwise), ("plain MLX form", mlstm_chunkwise_plain)):
        row(f"{name}, {S} tokens", lambda: np.array(form(*x)[0]), want, ours(form), wait_mlx)
        row(f"{name}, {S} tokens, there and back", None, None, with_grad(form), wait_mlx)
    for dtype in (torch.bfloat16, torch.float32):
        t = [to_torch(a, dtype if j < 3 else torch.float32).requires_grad_() for j, a in enumerate((*x[:5], *x[5]))]
        w = to_torch(dh, dtype)
        def form():
            return mlstm_chunkwise__limit_chunk(*t[:5], c_initial=t[5], n_initial=t[6], m_initial=t[7], return_last_states=True,
                                                chunk_size=64, autocast_kernel_dtype=dtype)[0]
        def back(): return torch.autograd.grad(form(), t[:5], w)
        def no_grad():
            with torch.no_grad(): return form()
        kind = f"NX-AI's triton_limit_chunk in {str(dtype)[6:]}"
        row(f"{kind}, {S} tokens", lambda: no_grad().float().cpu().numpy(), want, no_grad, wait_torch)
        row(f"{kind}, there and back", None, None, back, wait_torch)


def step(B, NH, DQK, DV):
    x = gpu.cell_case(B, NH, 1, DQK, DV, mx.bfloat16)
    want = gpu.cell64(*x)[0]
    for name, form in (("kernel of ours", mlstm_step), ("plain MLX form", mlstm_step_plain)):
        compiled = mx.compile(lambda *a: form(*a[:5], a[5:]))
        row(f"{name}, compiled, a step of {B}", lambda: np.array(form(*x)[0]), want, lambda: compiled(*x[:5], *x[5]), wait_mlx)
    t = [to_torch(a, torch.bfloat16 if j < 3 else torch.float32) for j, a in enumerate((*x[:5], *x[5]))]
    q, k, v = (a[:, :, 0] for a in t[:3])
    def form(): return mlstm_recurrent_step__triton(q, k, v, *t[3:5], *t[5:], dtype_state=torch.float32)[0]
    row(f"NX-AI's triton step, a step of {B}", lambda: form().float().cpu().numpy()[:, :, None], want, form, wait_torch)


if __name__ == "__main__":
    print(f"{torch.cuda.get_device_name()}, MLX {mx.__version__}, PyTorch {torch.__version__}")
    for B in (1, 32): step(B, 8, 256, 512)
    sequence(1, 8, 2048, 256, 512)
