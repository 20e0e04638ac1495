"Kernels in whole models, and as CUDA where its compiler is at hand."
import os
import re
import shutil
import subprocess
from functools import partial
from itertools import islice
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_lm.models.cache import ArraysCache

import xlstm_metal as xm
from xlstm_metal import metal
from xlstm_metal.cells import conv, norms, mlstm_chunk_gradients as sequence_gradients, mlstm_chunk_kernels as sequence_kernels, slstm, mlstm_step_kernel as step_kernel
from xlstm_metal.cells.mlstm_chunks import mlstm_chunkwise
from xlstm_metal.generation.generate import Sampling, tokens
from xlstm_metal.generation.state import State
from xlstm_metal.host import run
from xlstm_metal.metal import source
from xlstm_metal.model.config import xLSTMConfig
from xlstm_metal.model.model import Model
from xlstm_metal.train.train import fit, init_weights, lm_loss, make_optimizer

KERNELS = Path(__file__).parents[1] / "kernels"
LAUNCHED = {k for m in (conv, norms, step_kernel, sequence_kernels, sequence_gradients, slstm) for k in vars(m).values() if isinstance(k, metal.Kernel)}
# name -> inputs by type, outputs, constants: what a CUDA compiler must be told
TYPES = {
    "soft_cap": (dict(x="float", cap="float"), dict(y="float"), {}),
    "running_max": (dict(x="float"), dict(y="float"), {}),
    "mlstm_step": (dict(q="__nv_bfloat16", k="__half", v="float", i="float", f="float", C="float", n="float", m="float", keep="bool", numbers="float"),
                   dict(h="float", C_out="float", n_out="float", m_out="float"), dict(SLICES=8)),
    "mlstm_recurrent": (dict(q="__nv_bfloat16", k="__half", v="float", i="float", log_f="float", C="float", n="float", m="float", numbers="float"),
                        dict(h="float", C_out="float", n_out="float", m_out="float"), dict(SLICES=8, ROWS=32)),
    "mlstm_chunk_state": (dict(k="__nv_bfloat16", v="__half", i="float", log_f="float", C="float", n="float", m="float"),
                          dict(states="float", totals="float", scales="float"), {}),
    "mlstm_chunk_weights": (dict(q="__nv_bfloat16", k="__half", i="float", log_f="float", totals="float", scales="float", numbers="float"),
                            dict.fromkeys(["weights", "marks", "carries", "dens", "signs", "stays"], "float"), {}),
    "mlstm_chunk_output": (dict(x="__nv_bfloat16", w="float", y="__half", states="float", a="float", dens="float"), dict(out="float"), dict(TURN=1)),
    "mlstm_chunk_state_grad": (dict(q="__nv_bfloat16", dnum="float", dden="float", carries="float", log_f="float", scales="float", states="float",
                                    totals="float", dC="float", dn="float"), dict(dstates="float", dtotals="float", kept="float"), {}),
    "mlstm_chunk_weights_grad": (dict(v="__half", dnum="float", dden="float", weights="float", i="float", log_f="float", marks="float", numbers="float"),
                                 dict(dweights="float", di="float", dlog_f="float"), {}),
    "mlstm_chunk_input_grad": (dict(x="float", one="float", states="float", totals="float", a="float", w="float", y="__nv_bfloat16", own="__half"),
                               dict(out="float", dots="float"), dict(TURN=0)),
    "slstm_sequence": (dict(x="__nv_bfloat16", R="float", b="float", y_in="float", c_in="float", n_in="float", m_in="float", keep="bool", fresh="bool"),
                       dict(y="float", c="float", n="float", m="float"), dict(DH=64, THREADS=256, PER=1, RESIDENT=1)),
    "slstm_sequence_grad": (dict(raw="float", R="float", c="float", n="float", m="float", c_in="float", n_in="float", m_in="float", keep="bool",
                                 dy="float", dc="float", dn="float", dm="float"), dict.fromkeys(["dx", "dy_in", "dc_in", "dn_in", "dm_in"], "float"),
                            dict(DH=130, THREADS=256, PER=3, RESIDENT=0)),
    "causal_conv1d": (dict(x="__nv_bfloat16", w="float", b="__half", state="__nv_bfloat16"), dict(y="__nv_bfloat16", kept="__nv_bfloat16"),
                      dict(K=4, T="__nv_bfloat16")),
    "causal_conv1d_grad": (dict(x="__half", w="float", state="__half", dy="__half", dkept="__half"),
                           dict(dx="__half", dstate="float", dw="float", db="float"), dict(K=4, T="__half")),
    "head_norm_gate": (dict(h="float", o="__nv_bfloat16", w="__nv_bfloat16", b="__nv_bfloat16", eps="float"), dict(y="__nv_bfloat16"),
                       dict(T="__nv_bfloat16", BIAS=1)),
    "head_norm_gate_grad": (dict(h="float", o="__half", w="__half", b="__half", eps="float", dy="__half"),
                            dict(dh="float", d_o="float", gated="float", normed="float"), dict(BIAS=1)),
}


@pytest.fixture
def host(monkeypatch):
    monkeypatch.setenv("XLSTM_METAL_KERNELS", "host")
    metal.ran.clear()


def test_generation_with_kernels_is_the_same_text(host, monkeypatch):
    model, tokenizer = xm.load(dtype=mx.float32)
    ids = tokenizer.encode("class Queue:\n")
    def write(): return [t for t, _ in islice(tokens(State(model).read([0, *ids]), Sampling()), 12)]
    with_kernels = write()
    report = metal.kernel_report()
    assert report["mlstm_step"] == {"host": 6 * 12} and report["head_norm_gate"] == {"host": 6 * 13} # six blocks; the prompt is one pass
    monkeypatch.setenv("XLSTM_METAL_KERNELS", "off")
    assert write() == with_kernels
    assert metal.kernel_report()["mlstm_step"]["plain"] == 6 * 12


def test_training_with_kernels_is_the_same_curve(host, monkeypatch):
    c = xLSTMConfig(vocab_size=40, hidden_size=32, num_hidden_layers=2, num_heads=2)
    def curve():
        rng = np.random.default_rng(0)
        batches = (rng.integers(0, 40, (2, 71)) for _ in range(6))
        return fit(init_weights(Model(c)), batches, make_optimizer(6, 1e-2, 2), 6, every=1, report=None)
    with_kernels = curve()
    assert metal.kernel_report()["mlstm_chunk_output"]["host"] == 2 * 6 * 2 and metal.kernel_report()["head_norm_gate_grad"]["host"] == 2 * 6
    monkeypatch.setenv("XLSTM_METAL_KERNELS", "off")
    assert np.allclose(with_kernels, curve(), rtol=1e-4)


@pytest.mark.parametrize("what", ["step", "few tokens", "chunks", "masked", "training"])
def test_no_host_synchronisation(what, monkeypatch):
    "As on a GPU, but with launches that compute nothing: a trace of MLX stops at whatever wants a value."
    def launch(inputs, output_shapes, output_dtypes, **how): return [mx.zeros(s, t) for s, t in zip(output_shapes, output_dtypes)]
    monkeypatch.setattr(metal, "backend", lambda: "cuda")
    monkeypatch.setattr(metal, "compile_kernel", lambda kernel, text, where: launch)
    metal.ran.clear()
    model = init_weights(Model(xLSTMConfig(vocab_size=40, hidden_size=32, num_hidden_layers=2, num_heads=2)))
    for k in LAUNCHED: monkeypatch.setattr(k, "compiled", {})
    ids = mx.array(np.random.default_rng(0).integers(0, 40, (2, {"step": 1, "few tokens": 5}.get(what, 70))))
    def forward(ids):
        cache = [ArraysCache(3, left_padding=[0, 3]) for _ in model.layers] if what == "masked" else model.make_cache()
        return model(ids, cache), *(a for slot in cache for a in slot.cache)
    f = nn.value_and_grad(model, partial(lm_loss, model)) if what == "training" else forward
    mx.enable_compile()
    try:
        mx.compile(f)(ids)
        with pytest.raises(ValueError, match="Attempting to eval"): mx.compile(lambda x: x * x.max().item())(ids)
    finally:
        if os.environ.get("MLX_DISABLE_COMPILE"): mx.disable_compile()
    expected = {"step": "mlstm_step", "few tokens": "mlstm_recurrent", "training": "mlstm_chunk_input_grad"}.get(what, "mlstm_chunk_output")
    assert "cuda" in metal.kernel_report()[expected]


@pytest.fixture
def as_if_metal(monkeypatch):
    "Kernels are asked for as on a Mac, and run on the host."
    def compile_on_host(kernel, text, where):
        def launch(inputs, output_shapes, output_dtypes, grid, threadgroup, template):
            outputs = dict(zip(kernel.outputs, zip(output_shapes, output_dtypes)))
            return run(kernel.name, text, dict(zip(kernel.inputs, inputs)), outputs, grid, threadgroup, dict(template))
        return launch
    monkeypatch.setattr(metal, "backend", lambda: "metal")
    monkeypatch.setattr(metal, "compile_kernel", compile_on_host)
    for k in LAUNCHED:
        monkeypatch.setattr(k, "compiled", {})
        monkeypatch.setattr(k, "agreed", None)
    metal.ran.clear()


def test_kernels_are_tried_once_on_a_mac(as_if_metal):
    tried = [k for k in LAUNCHED if k.trial]
    assert {k.name for k in tried} == {"head_norm_gate", "mlstm_step", "mlstm_recurrent", "mlstm_chunk_state", "causal_conv1d", "slstm_sequence"}
    assert all(k.use() == "metal" for k in tried)
    before = metal.kernel_report()
    assert {name for name, ran in before.items() if "metal" in ran} == {k.name for k in LAUNCHED} # trials launch every kernel
    assert all(k.use() == "metal" for k in tried) and metal.kernel_report() == before


def test_no_trials_where_the_kernels_were_measured(as_if_metal, monkeypatch):
    monkeypatch.setattr(metal, "backend", lambda: "cuda")
    assert {k.use() for k in LAUNCHED} == {"cuda"}
    assert not any(k.agreed for k in LAUNCHED)


@pytest.mark.parametrize("name, old, new", [("mlstm_chunk_input_grad", "l < length && c < DQK", "l < 7 && c < DQK"), ("mlstm_step", "F * total[j]", "total[j]"),
                                            ("slstm_sequence", "threadgroup float hidden[DH];", "no such text")])
def test_a_kernel_that_fails_its_trial_is_not_used(as_if_metal, monkeypatch, name, old, new):
    text = source(f"{name}.metal")
    monkeypatch.setitem(metal.live, f"{name}.metal", text.replace(old, new))
    assert text.count(old) == 1
    first = {"mlstm_chunk_input_grad": "mlstm_chunk_state"}.get(name, name)
    kernel = next(k for k in LAUNCHED if k.name == first)
    with pytest.warns(UserWarning, match=f"kernel {first} stays unused on this machine"): assert kernel.use() is None
    assert kernel.use() is None and metal.kernel_report()[first]["plain"] == 2
    x = mx.random.normal((1, 2, 70, 8))
    gates = x[..., 0], x[..., 1]
    with_it, _ = sequence_gradients.mlstm_chunkwise_dispatch(x, x, x, *gates) # and the plain form answers
    assert mx.allclose(with_it, mlstm_chunkwise(x, x, x, *gates)[0], atol=1e-3)


def test_every_kernel_is_known_here():
    assert {f.stem for f in KERNELS.glob("*.metal")} == TYPES.keys()


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no CUDA compiler")
@pytest.mark.parametrize("name", TYPES)
def test_the_text_is_cuda_too(name, tmp_path):
    inputs, outputs, constants = TYPES[name]
    # MLX compiles at run time with all functions on the device; nvcc wants to be told
    header = re.sub(r"^(\s*)(template <[^>]*> )?(inline )?(\w+\*? \w+\()(?=.*\{|$)", lambda m: m[1] + (m[2] or "") + "__device__ " + (m[3] or "") + m[4] if "return" not in m[0] else m[0],
                    source("cuda.h"), flags=re.M)
    text = source(f"{name}.metal")
    args = [f"const {t}* {n}" for n, t in inputs.items()] + [f"{t}* {n}" for n, t in outputs.items()]
    args += [f"const cuda::std::array<int, 10> {n}_shape" for n in inputs if f"{n}_shape" in text]
    whole = ["#include <cuda_fp16.h>", "#include <cuda_bf16.h>", "#include <cuda/std/array>", header,
             *[f"using {n} = {v};" if isinstance(v, str) else f"constexpr int {n} = {v};" for n, v in constants.items()], f"__global__ void {name}({', '.join(args)}) {{", text, "}"]
    (tmp_path / "k.cu").write_text("\n".join(whole))
    r = subprocess.run(["nvcc", "-std=c++17", "-arch=sm_90a", "-ptx", "-o", tmp_path / "k.ptx", tmp_path / "k.cu"], capture_output=True, text=True)
    assert r.returncode == 0, r.stdout + r.stderr
