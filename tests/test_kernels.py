"Kernels in whole models, and as CUDA where its compiler is at hand."
import os
import re
import shutil
import subprocess
import sys
from functools import partial
from itertools import islice
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models.cache import ArraysCache

import xlstm_metal as xm
from xlstm_metal import cells, host as host_module, metal, nvrtc
from xlstm_metal.blocks import ffn
from xlstm_metal.cells import conv, mlstm_chunk_gradients, mlstm_chunk_kernels, mlstm_gates, mlstm_long_kernels, mlstm_replay, mlstm_step_kernel, norms, slstm
from xlstm_metal.generation.generate import Sampling, tokens
from xlstm_metal.generation.state import State
from xlstm_metal.host import run
from xlstm_metal.metal import kernel_source
from xlstm_metal.model.config import xLSTMConfig
from xlstm_metal.model.model import Model
from xlstm_metal.train import training_kernels
from xlstm_metal.train.train import fit, init_weights, lm_loss, make_optimizer

FOLDER = Path(__file__).parents[1] / "kernels"
MODULES = conv, norms, ffn, mlstm_gates, mlstm_step_kernel, mlstm_chunk_kernels, mlstm_long_kernels, mlstm_chunk_gradients, mlstm_replay, slstm, training_kernels
KERNELS = sorted({k for m in MODULES for k in vars(m).values() if isinstance(k, metal.Kernel)}, key=lambda k: k.name)
NAMES = [k.name for k in KERNELS]
DISPATCHED = {f"{m.__name__.rpartition('.')[2]}.{n}": f for m in MODULES for n, f in vars(m).items() if hasattr(f, "tested") and f.__module__ == m.__name__}


def mlstm_args(S, DQK=9, DV=34, NH=2):
    *inputs, C, n, m = metal.samples(*[(1, NH, *s) for s in ((S, DQK), (S, DQK), (S, DV), (S,), (S,), (DQK, DV), (DQK,), (1,))])
    return *inputs, (C, n, m)


def log_args(T=5, DQK=9, DV=34, NH=2):
    *new, state = mlstm_args(1, DQK, DV, NH)
    return *new, (*state, *metal.samples((1, NH, T, DQK), (1, NH, T, DV), (1, NH, T), (1, NH, T)), mx.arange(T)[None] > 1)


def slstm_args(S, B=2, NH=2, DH=9):
    x, R, b, y, c, n, m = metal.samples((B, NH, S, 4, DH), (NH, 4, DH, DH), (NH, 4, DH), *[(B, NH, DH)] * 4)
    return x, R, b, (y, c, 1 + mx.abs(n), m)


def adamw_args():
    g, w, m, v = metal.samples(*[(3, 400)] * 4)
    return g, w, m, mx.abs(v), mx.array([.1, .2, 3., .9, .1, .8, .2, .01, .1, 1., 4.])


# public function -> arguments, and a kernel that it must have launched
PUBLIC = {
    "mlstm_step": (mlstm_args(1), "mlstm_step"),
    "mlstm_log_read": (log_args(), "mlstm_log_read"),
    "mlstm_recurrent": (mlstm_args(5), "mlstm_recurrent"),
    "mlstm_chunkwise": (mlstm_args(70), "mlstm_chunk_output"),
    "mlstm_long_chunks": ((*mlstm_args(70), None, 40), "mlstm_long_output"),
    "slstm_step": (slstm_args(1), "slstm_sequence"),
    "slstm_sequence": (slstm_args(5), "slstm_sequence"),
    "causal_conv1d": (metal.samples((2, 9, 5), (5, 1, 4), (5,)), "causal_conv1d"),
    "head_norm_gate": (metal.samples((1, 2, 5, 33), (1, 5, 66), (66,)), "head_norm_gate"),
    "add_rms_norm": (metal.samples((2, 1, 300), (2, 1, 300), (300,)), "add_rms_norm"),
    "rms_norm_gates": (metal.samples((2, 1, 300), (300,), (6, 300), (6,)), "rms_norm_gates"),
    "gated_silu": (metal.samples((2, 3, 400), (2, 3, 400)), "gated_silu"),
    "gate_maps": (metal.samples((2, 5, 40), (3, 40), (3,), (3, 40), (3,)), "gate_maps"),
    "capped_cross_entropy": ((3 * metal.samples((60, 7))[0], mx.arange(60) % 7, 3.), "capped_cross_entropy"),
    "add_squares": ([.05 * x for x in metal.samples((3000,), (256,))], "add_squares"),
    "adamw": ((*adamw_args(),), "adamw"),
}


def public(name): return getattr(next(m for m in (ffn, training_kernels, cells) if name in m.__all__), name)


@pytest.fixture
def host(monkeypatch):
    monkeypatch.setenv("XLSTM_METAL_KERNELS", "host")
    metal.launch_counts.clear()


def test_public_functions_have_definitions():
    names = {*cells.__all__, *ffn.__all__, *training_kernels.__all__}
    assert {n for n in names if f"{n}_plain" in names} == PUBLIC.keys()
    assert {n.removesuffix("_plain") for n in names if n.endswith("_plain")} == PUBLIC.keys()


@pytest.mark.parametrize("name", PUBLIC)
def test_public_functions_run_by_kernel(host, monkeypatch, name):
    function, plain, (args, kernel) = public(name), public(f"{name}_plain"), PUBLIC[name]
    by_kernel = tree_flatten(function(*args))
    assert metal.kernel_report()[kernel] == {"host": 1}
    for (_, a), (_, b) in zip(by_kernel, tree_flatten(plain(*args)), strict=True):
        assert mx.linalg.norm((a - b).flatten()) < 1e-5 * mx.linalg.norm(b.flatten())
    monkeypatch.setenv("XLSTM_METAL_KERNELS", "off")
    metal.launch_counts.clear()
    function(*args)
    assert {where for report in metal.kernel_report().values() for where in report} == {"plain"}


@pytest.mark.parametrize("name", PUBLIC)
def test_public_functions_keep_the_signature_of_their_definition(name):
    from inspect import signature
    function, plain = public(name), public(f"{name}_plain")
    assert signature(function) == signature(plain) and function.__name__ == name
    assert f"`{name}_plain` is the definition" in function.__doc__
    with pytest.raises(TypeError, match="missing"): function()


def test_generation_with_kernels_is_the_same_text(host, monkeypatch):
    model, tokenizer = xm.load(dtype=mx.float32)
    ids = tokenizer.encode("class Queue:\n")
    def write(): return [t for t, _ in islice(tokens(State(model).read([0, *ids]), Sampling()), 12)]
    with_kernels = write()
    report = metal.kernel_report()
    assert report["mlstm_step"] == {"host": 7 * 12} and report["head_norm_gate"] == {"host": 7 * 13} # seven blocks; the prompt is one pass
    monkeypatch.setenv("XLSTM_METAL_KERNELS", "off")
    assert write() == with_kernels
    assert metal.kernel_report()["mlstm_step"]["plain"] == 7 * 12


def test_the_step_with_merged_maps_is_the_same(host):
    from xlstm_metal.generation.compiled_step import CompiledStep, step_choices
    model, _ = xm.load(dtype=mx.float32)
    for rows in (1, 2):
        caches = [model.make_cache() for _ in range(2)]
        for c in caches: mx.eval(model(mx.array([[1, 2, 3]] * rows), c))
        metal.launch_counts.clear()
        with step_choices(model, "merged"):
            (step := CompiledStep()).record(model)
            for t in range(3): got, want = step(model, mx.full((rows, 1), 5 + t), caches[0]), model(mx.full((rows, 1), 5 + t), caches[1])
        assert mx.allclose(got, want, atol=1e-4)
        assert metal.kernel_report()["rms_norm_gates"] == {"host": 3 * 7} and metal.kernel_report()["add_rms_norm"]["host"] == 7 * 7 # one of them to see what could be merged


def test_training_with_kernels_is_the_same_curve(host, monkeypatch):
    c = xLSTMConfig.from_dict(vocab_size=40, hidden_size=32, num_hidden_layers=2, num_heads=2)
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
    monkeypatch.setattr(metal, "_compile_kernel", lambda kernel, header, text, where: launch)
    metal.launch_counts.clear()
    model = init_weights(Model(xLSTMConfig.from_dict(vocab_size=40, hidden_size=32, num_hidden_layers=2, num_heads=2)))
    for k in KERNELS: monkeypatch.setattr(k, "compiled", {})
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
    def compile_on_host(kernel, header, text, where):
        def launch(inputs, output_shapes, output_dtypes, grid, threadgroup, template):
            outputs = dict(zip(kernel.outputs, zip(output_shapes, output_dtypes)))
            return run(kernel.name, text, dict(zip(kernel.inputs, inputs)), outputs, grid, threadgroup, dict(template), kernel.includes)
        return launch
    monkeypatch.setattr(metal, "backend", lambda: "metal")
    monkeypatch.setattr(metal, "_compile_kernel", compile_on_host)
    for k in KERNELS:
        monkeypatch.setattr(k, "compiled", {})
    for f in DISPATCHED.values(): f.tested.clear()
    metal.launch_counts.clear()


def floats(args): return [a for _, a in tree_flatten(args) if isinstance(a, mx.array) and mx.issubdtype(a.dtype, mx.floating)]


def grads(f, args):
    "Gradients of everything that a cell computes, by all of its floats."
    weights = metal.tree_map(lambda x: mx.ones_like(x), f(*args))
    return floats(metal.gradients(f, args, weights)[1])


def test_self_tests_come_once_for_each_type_and_constant(as_if_metal):
    assert DISPATCHED.keys() == {"conv._unmasked", "norms.head_norm_gate", "norms.add_rms_norm", "norms.rms_norm_gates", "ffn.gated_silu", "mlstm_gates.gate_maps",
                                 "training_kernels.capped_cross_entropy", "training_kernels.add_squares", "training_kernels.adamw", "mlstm_step_kernel.mlstm_step", "mlstm_replay.mlstm_log_read", "mlstm_chunk_kernels.mlstm_recurrent",
                                 "mlstm_chunk_gradients._short", "mlstm_chunk_gradients._long", "mlstm_long_kernels.mlstm_long_chunks",
                                 "slstm.slstm_step", "slstm.slstm_sequence"}
    for name, (args, _) in PUBLIC.items(): grads(public(name), args)
    assert {name for name, ran in metal.kernel_report().items() if "metal" in ran} == set(NAMES)
    there_and_back = {name for name, f in DISPATCHED.items() if list(f.tested.values()) == [True, True]}
    assert there_and_back == {"conv._unmasked", "norms.head_norm_gate", "ffn.gated_silu", "mlstm_gates.gate_maps", "training_kernels.capped_cross_entropy", "mlstm_chunk_gradients._long", "mlstm_long_kernels.mlstm_long_chunks", "slstm.slstm_step", "slstm.slstm_sequence"}
    assert all(list(DISPATCHED[name].tested.values()) == [True] for name in ("mlstm_step_kernel.mlstm_step", "mlstm_chunk_kernels.mlstm_recurrent"))
    before = metal.kernel_report()
    q, k, v, *rest = PUBLIC["mlstm_step"][0]
    cells.mlstm_step(q, k, v, *rest)
    assert metal.kernel_report()["mlstm_step"]["metal"] == before["mlstm_step"]["metal"] + 1
    cells.mlstm_step(*(a.astype(mx.bfloat16) for a in (q, k, v)), *rest) # another kernel, as a compiler sees it
    assert len(mlstm_step_kernel.mlstm_step.tested) == 2
    for DH in (9, 10): cells.slstm_step(*slstm_args(1, DH=DH)) # units are a constant of the text
    assert len(slstm.slstm_step.tested) == 3
    for S in (5, 6): cells.mlstm_chunkwise(*mlstm_args(S))
    assert len(mlstm_chunk_gradients._short.tested) == 1


def test_no_self_tests_where_kernels_were_measured(as_if_metal, monkeypatch):
    monkeypatch.setattr(metal, "backend", lambda: "cuda")
    for name, (args, _) in PUBLIC.items(): public(name)(*args)
    assert not any(f.tested for f in DISPATCHED.values())


# kernel, what is changed, the function whose self-test must notice, and whether only its gradient suffers
FAULTS = [("mlstm_log_read", "uint s = own + 1; s <= places", "uint s = own; s <= places", "mlstm_replay.mlstm_log_read", False),
          ("mlstm_chunk_input_grad", "l < length && c < DQK", "l < 7 && c < DQK", "mlstm_chunk_gradients._long", True),
          ("mlstm_step", "F * total[j]", "total[j]", "mlstm_step_kernel.mlstm_step", False),
          ("slstm_sequence", "threadgroup float hidden[DH];", "no such text", "slstm.slstm_sequence", False),
          ("slstm_sequence", "is_empty[row]", "is_empty[0]", "slstm.slstm_sequence", False),
          ("mlstm_step", "log_sigmoid(static_cast<float>(f[head]))", "-metal::log(1.0f + metal::exp(-static_cast<float>(f[head])))", "mlstm_step_kernel.mlstm_step", False)]


@pytest.mark.parametrize("name, old, new, function, there", FAULTS, ids=[f'{f[0]}, {f[1]}' for f in FAULTS])
def test_a_kernel_that_fails_its_self_test_is_not_used(as_if_metal, monkeypatch, name, old, new, function, there):
    text = kernel_source(f"{name}.metal")
    monkeypatch.setitem(metal.live_sources, f"{name}.metal", text.replace(old, new))
    assert text.count(old) == 1
    f = DISPATCHED[function]
    public = f.__name__
    args, plain = PUBLIC[public][0], getattr(cells, f"{public}_plain")
    with pytest.warns(UserWarning, match=f"{'the gradient of ' * there}kernel .* stays unused on this machine") as caught:
        for _ in range(2): got = grads(getattr(cells, public), args)
    assert len(caught) == 1 and list(f.tested.values()) == ([True, False] if there else [False])
    for a, b in zip(got, grads(plain, args), strict=True): assert metal._distance(a, b) < 1e-4 # the definition answers


def fails_when_evaluated(shapes, dtypes):
    "Arrays as of a kernel that a compiler refuses: nobody knows before they are needed."
    broken = mx.linalg.inv(mx.zeros((2, 2)), stream=mx.cpu)[0, 0]
    return [mx.broadcast_to(broken.astype(t), s) for s, t in zip(shapes, dtypes)]


@pytest.fixture
def refusing(as_if_metal, monkeypatch):
    "A compiler that refuses launches: of a kernel, with inputs of a type, or with a constant."
    refused, on_host = [], metal._compile_kernel
    def compile_kernel(kernel, *how):
        launch = on_host(kernel, *how)
        def maybe(inputs, output_shapes, output_dtypes, grid, threadgroup, template):
            if any(r(kernel.name, [a.dtype for a in inputs], dict(template)) for r in refused): return fails_when_evaluated(output_shapes, output_dtypes)
            return launch(inputs, output_shapes, output_dtypes, grid, threadgroup, template)
        return maybe
    monkeypatch.setattr(metal, "_compile_kernel", compile_kernel)
    return refused


REFUSALS = {"a type": lambda name, types, constants: name == "head_norm_gate" and constants["T"] == mx.bfloat16,
            "a constant": lambda name, types, constants: name == "mlstm_recurrent" and constants.get("ROWS") == 8, # an eighth of the heads' keys
            "a kernel": lambda name, types, constants: name == "mlstm_step"}


@pytest.mark.parametrize("what", REFUSALS)
def test_generation_goes_on_where_a_kernel_does_not_compile(refusing, monkeypatch, what):
    model, _ = xm.load(dtype=mx.bfloat16 if what == "a type" else mx.float32)
    with pytest.raises(RuntimeError): mx.eval(fails_when_evaluated([(2,)], [mx.float32]))
    def write(): return [t for t, _ in islice(tokens(State(model).read([0, 5, 6, 7]), Sampling()), 4)]
    refusing.append(REFUSALS[what])
    with pytest.warns(UserWarning, match="stays unused on this machine") as caught: got = write()
    assert len(caught) == 1
    monkeypatch.setattr(metal, "backend", lambda: None)
    assert write() == got


@pytest.mark.parametrize("what", REFUSALS)
def test_the_app_goes_on_where_a_kernel_does_not_compile(refusing, monkeypatch, what):
    import asyncio
    model, tokenizer = xm.load(dtype=mx.bfloat16 if what == "a type" else mx.float32)
    async def write():
        app = xm.Playground(model, tokenizer, max_tokens=4)
        app.view.prompt.value = "class"
        app.view.generate.click()
        await app.wait()
        return app.run.continuation, app.view.status.value
    refusing.append(REFUSALS[what])
    with pytest.warns(UserWarning, match="stays unused on this machine") as caught: text, status = asyncio.run(write())
    assert len([w for w in caught if "unused" in str(w.message)]) == 1 and text and "rror" not in status
    monkeypatch.setattr(metal, "backend", lambda: None)
    assert asyncio.run(write())[0] == text


@pytest.mark.parametrize("name", ["mlstm_chunk_state", "mlstm_chunk_weights_grad", "head_norm_gate_grad"])
def test_training_goes_on_where_a_kernel_does_not_compile(refusing, monkeypatch, name):
    model = init_weights(Model(xLSTMConfig.from_dict(vocab_size=40, hidden_size=32, num_hidden_layers=1, num_heads=2)))
    ids = mx.array(np.random.default_rng(0).integers(0, 40, (2, 70)))
    def step(): return nn.value_and_grad(model, partial(lm_loss, model))(ids)
    refusing.append(lambda kernel, types, constants: kernel == name)
    with pytest.warns(UserWarning, match="stays unused on this machine") as caught: loss, grads = step()
    assert len(caught) == 1
    monkeypatch.setattr(metal, "backend", lambda: None)
    for (_, a), (_, b) in zip(tree_flatten((loss, grads)), tree_flatten(step())): assert metal._distance(a, b) < 1e-3


def second_order(f, args):
    "Gradient of a gradient, derivative along a direction, and derivative of a gradient."
    values = floats(args)
    directions, every = [mx.cos(mx.arange(a.size)).reshape(a.shape) for a in values], list(range(len(values)))
    def flat(*v): return floats(f(*metal._nest(list(v), args, lambda a: a)))
    def loss(*v): return sum((mx.sin(o) * mx.cos(mx.arange(o.size)).reshape(o.shape)).sum() for o in flat(*v))
    slope = mx.grad(loss, argnums=every)
    yield mx.grad(lambda *v: sum((a * d).sum() for a, d in zip(slope(*v), directions)), argnums=every)(*values)
    yield mx.jvp(flat, values, directions)[1]
    yield mx.jvp(slope, values, directions)[1]


@pytest.mark.parametrize("name", PUBLIC)
def test_derivatives_of_any_order_are_those_of_the_definition(host, name):
    args = mlstm_args(70, 5, 6) if name == "mlstm_chunkwise" else PUBLIC[name][0]
    for got, want in zip(second_order(public(name), args), second_order(public(f"{name}_plain"), args)):
        assert len(got) == len(want) and max(mx.linalg.norm(a.flatten()).item() for a in want) > .1 # not silently zero
        for a, b in zip(got, want): assert metal._distance(a, b) < 1e-4


def test_derivatives_do_not_look_into_launches():
    "A kernel has no derivatives of its own on a GPU: an operation that has none either stands for it."
    def opaque(x): return mx.view(mx.view(x, mx.uint32), mx.float32)
    def sine(x): return mx.sin(x)
    f = metal.dispatch(metal.Kernel("none", [], []), sine, lambda x: (opaque(mx.sin(x)), (opaque(x),)), lambda args, y, kept, dy: (opaque(dy * mx.cos(args[0])),))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(metal, "backend", lambda: "cuda")
        x = mx.array([.1, .2])
        with pytest.raises(ValueError): mx.jvp(opaque, [x], [x])
        for got, want in zip(second_order(f, (x,)), second_order(mx.sin, (x,))): assert mx.allclose(got[0], want[0])


def test_every_kernel_file_is_used():
    assert {f.stem for f in FOLDER.glob("*.metal")} == set(NAMES)
    assert {f.stem for f in FOLDER.glob("*.h")} - {"cuda", "nvrtc", "host", "types"} == {h for k in KERNELS for h in k.includes}


CUDA_TYPES = {mx.float32: "float", mx.float16: "__half", mx.bfloat16: "__nv_bfloat16", mx.bool_: "bool", mx.int32: "int"}
# arguments of the self-tests that may have 16 bits
MLSTM = {0: mx.bfloat16, 1: mx.float16, 2: mx.bfloat16}
SHORTER = {"head_norm_gate": dict.fromkeys((1, 2, 3), mx.float16), "causal_conv1d": dict.fromkeys((0, 3), mx.bfloat16),
           "add_rms_norm": dict.fromkeys((0, 1, 2), mx.bfloat16), "rms_norm_gates": dict.fromkeys((0, 1), mx.bfloat16), "gated_silu": dict.fromkeys((0, 1), mx.float16),
           "gate_maps": {0: mx.bfloat16}, "capped_cross_entropy": {0: mx.bfloat16}, "add_squares": {0: mx.float16}, "adamw": dict.fromkeys((0, 1), mx.bfloat16),
           "mlstm_step": MLSTM, "mlstm_recurrent": MLSTM, "mlstm_chunkwise": MLSTM}


@pytest.fixture(scope="module")
def launches():
    "Distinct launches of all self-tests, there and back, by kernel: types of inputs and outputs, constants."
    found = {name: [] for name in NAMES}
    def record(name, text, inputs, outputs, grid, threads, template, includes):
        launch = {n: a.dtype for n, a in inputs.items()}, {n: t for n, (_, t) in outputs.items()}, template
        if launch not in found[name]: found[name].append(launch)
        return run(name, text, inputs, outputs, grid, threads, template, includes)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XLSTM_METAL_KERNELS", "host")
        patch.setattr(host_module, "run", record)
        cases = [(public(name), public(f"{name}_plain"), args, SHORTER.get(name, {})) for name, (args, _) in PUBLIC.items()]
        cases.append((cells.slstm_sequence, cells.slstm_sequence_plain, slstm_args(2, 1, 1, 130), {})) # R does not fit registers
        for function, plain, args, shorter in cases:
            args = [a.astype(shorter[j]) if j in shorter else a for j, a in enumerate(args)]
            mx.eval(metal.gradients(function, args, plain(*args)))
    return found


def as_functions_of_the_gpu(header):
    "MLX compiles at run time with all functions on the device; nvcc wants to be told, by a word that `#define device` would change."
    header = header.replace("#define device\n", "")
    return re.sub(r"^(\s*)(template <[^>]*> )?(inline )?(\w+\*? \w+\()(?=.*\{|$)",
                  lambda m: m[1] + (m[2] or "") + "__device__ " + (m[3] or "") + m[4] if "return" not in m[0] else m[0], header, flags=re.M)


def cuda_function(kernel, inputs, outputs, constants):
    text = kernel_source(f"{kernel.name}.metal")
    args = [f"const {CUDA_TYPES[t]}* {n}" for n, t in inputs.items()] + [f"{CUDA_TYPES[t]}* {n}" for n, t in outputs.items()]
    args += [f"const cuda::std::array<int, 10> {n}_shape" for n in inputs if f"{n}_shape" in text]
    sizes = [f"using {n} = {CUDA_TYPES[v]};" if isinstance(v, mx.Dtype) else f"constexpr {'bool' if isinstance(v, bool) else 'int'} {n} = {int(v)};"
             for n, v in constants.items()]
    return [*sizes, f"__global__ void {kernel.name}({', '.join(args)}) {{", text, "}"]


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no CUDA compiler")
@pytest.mark.parametrize("kernel", KERNELS, ids=NAMES)
def test_the_text_is_cuda_too(kernel, launches, tmp_path):
    headers = [as_functions_of_the_gpu(kernel_source(f"{h}.h")) for h in ("cuda", *kernel.includes)]
    whole = ["#include <cuda_fp16.h>", "#include <cuda_bf16.h>", "#include <cuda/std/array>", *headers]
    assert launches[kernel.name]
    for j, launch in enumerate(launches[kernel.name]): whole += [f"namespace launch{j} {{", *cuda_function(kernel, *launch), "}"]
    (tmp_path / "k.cu").write_text("\n".join(whole))
    r = subprocess.run(["nvcc", "-std=c++17", "-arch=sm_90a", "-ptx", "-o", tmp_path / "k.ptx", tmp_path / "k.cu"], capture_output=True, text=True)
    assert r.returncode == 0, r.stdout + r.stderr


@pytest.mark.skipif(nvrtc._library() is None, reason="no NVRTC")
@pytest.mark.parametrize("kernel", KERNELS, ids=NAMES)
def test_the_text_is_a_program(kernel, launches):
    headers = tuple(kernel_source(f"{h}.h") for h in kernel.includes)
    for inputs, outputs, constants in launches[kernel.name]:
        source = nvrtc.cuda_source(kernel_source(f"{kernel.name}.metal"), headers, tuple((n, t, 5) for n, t in inputs.items()), tuple(outputs.items()), tuple(constants.items()))
        assert nvrtc.compile_cuda(source, "sm_90")
    with pytest.raises(RuntimeError, match="is undefined"): nvrtc.compile_cuda(source.replace("void NAME(", "void NAME(nothing* x, "), "sm_90")


@pytest.fixture(params=["clang++", "g++"])
def compiler(request, monkeypatch):
    "One of the compilers that the host may find."
    if shutil.which(request.param) is None: pytest.skip(f"no {request.param}")
    path = shutil.which(request.param)
    monkeypatch.setattr(host_module.shutil, "which", lambda name: path if name == request.param else None)
    monkeypatch.setattr(host_module, "_loaded", {})


FEW = "thread_index_in_simdgroup < 16"
TO_Y = "y[thread_position_in_grid.x] ="
LOOPS = "float sum = 0.0f;\nuint n = {} ? 3 : 2;\nfor (uint i = 0; i < 6 / n; i++)\nfor (uint j = 0; j < n; j++) sum += simd_sum(1.0f);\n" + f"{TO_Y} sum;"
BARRIERS = "if ({}) threadgroup_barrier(mem_flags::mem_device); else threadgroup_barrier(mem_flags::mem_device);\n" + f"{TO_Y} 0.0f;"


@pytest.mark.parametrize("text, says, right", [
    (f"{TO_Y} {{}} ? simd_sum(1.0f) : simd_max(1.0f);", "thread 16 is in a SIMD function of line 1 too, in another call", 32),
    (f"{TO_Y} {{}} ? simd_sum(1.0f) : simd_sum(2.0f);", "thread 16 is in a SIMD function of line 1 too, in another call", 32),
    (BARRIERS, "thread 16 waits at the barrier of line 1 too, in another call", 0),
    (LOOPS, "round 3 of the loop of line 4, round 1 of the loop of line 3; thread 16", 192),
])
def test_every_compiler_tells_calls_apart(compiler, text, says, right):
    def go(text): return run("turn", text, dict(x=mx.ones(32)), dict(y=((32,), mx.float32)), (32, 1, 1), (32, 1, 1), {})[0]
    with pytest.raises(host_module.KernelFault, match=says): go(text.format(FEW))
    assert mx.array_equal(go(text.format("true")), mx.full((32,), right))


BARRIER = "threadgroup_barrier(mem_flags::mem_threadgroup);"


@pytest.mark.parametrize("function, name, old, new, says", [
    ("mlstm_recurrent", "mlstm_recurrent", f"{BARRIER}\n    if", f"if (slice) {BARRIER} else {BARRIER}\n    if", r"thread \d+ waits at the barrier of line (\d+), round 1 of the loop of line 18; .* line \1, round 1 .* too, in another call"),
    ("mlstm_chunkwise", "mlstm_chunk_output", "store_tile(acc, stage + 0, group);", "if (group < 4) {0} else {0}", r"barrier of line \d+ of tiles.h, called from line (\d+); thread 128 .* called from line \1 too, in another call"),
    ("head_norm_gate", "head_norm_gate", "h_shape[3]", "eps_shape[1]", r"line 2: eps_shape\[1\] is out of bounds: eps has 1 dimension$"),
    ("mlstm_chunkwise", "mlstm_chunk_weights", "simd_max(metal::max(p0 ? e0 : -1e9f, p1 ? e1 : -1e9f))", "(p0 ? {0} : m0)", r"thread \d+ is in a SIMD function of line 40, round 1 of the loop of line 34"),
    ("mlstm_chunkwise", "mlstm_chunk_state", "float total =", "double total =", "Metal has no `double`"),
    ("causal_conv1d", "causal_conv1d", "uint ", "static uint ", "Metal has no `static` variables"),
])
def test_faults_in_our_own_texts(host, monkeypatch, function, name, old, new, says):
    text = kernel_source(f"{name}.metal")
    monkeypatch.setitem(metal.live_sources, f"{name}.metal", text.replace(old, new.format(old), 1))
    assert old in text
    with pytest.raises(host_module.KernelFault, match=says): mx.eval(getattr(cells, function)(*PUBLIC[function][0]))


def test_mutants_of_kernels_are_noticed():
    "A sample; `python tests/mutate.py` tries all."
    r = subprocess.run([sys.executable, Path(__file__).with_name("mutate.py"), "mlstm_step", "causal_conv1d", "--sample", "3"], capture_output=True, text=True)
    assert r.returncode == 0 and "caught: 100.0 %" in r.stdout, r.stdout + r.stderr


def test_a_mutant_that_nobody_notices_is_an_error(tmp_path, capsys, monkeypatch):
    for name in ("XLSTM_METAL_KERNELS", "MLX_DISABLE_COMPILE"): monkeypatch.setenv(name, "") # put back afterwards: this module sets them
    import mutate
    m = next(m for m in mutate.mutants("mlstm_step.metal") if m.kind == "cast")
    assert not mutate.report([(m, "self-test", None), (m, None, 0.0)], {mutate.key(m): "changes nothing"}, complete=True)
    assert mutate.report([(m, None, 0.5)], {}, complete=False) == 1 and f"does not explain: {mutate.key(m)}" in capsys.readouterr().out
    assert mutate.report([(m, "executor", None)], {mutate.key(m): "changes nothing"}, complete=True) == 1 # stale


def narrow_numbers(text):
    "Lines where a number has 16 bits, by declaration or by cast; lanes of a shuffle may."
    lanes = re.sub(r"simd_shuffle(_xor)?\(\w+, static_cast<ushort>\(", "", text)
    return [j for j, line in enumerate(lanes.split("\n"), 1) if re.search(r"\b(u?short|int16_t|uint16_t|u?char)\b", line)]


@pytest.mark.parametrize("name", NAMES)
def test_no_index_has_16_bits(name, monkeypatch):
    "A 7B model wraps 16 bits at 8,192 tokens: longer than tests are. Narrowing is an error by name, a cast is found in the text."
    kernel, text = next(k for k in KERNELS if k.name == name), kernel_source(f"{name}.metal")
    texts = [text, *(kernel_source(f"{h}.h") for h in kernel.includes)]
    assert not any(map(narrow_numbers, texts))
    sizes = dict(T=mx.float32, M=mx.float32, GATES=8, BIAS=True, TRANSPOSE=False, SLICES=8, ROWS=4, K=4, DH=9, THREADS=64, PER=1, RESIDENT=True, COLUMNS=4, BOUNDED=True)
    types = dict(mask=mx.bool_, real=mx.bool_, marks=mx.int32, is_empty=mx.bool_)
    assert host_module.metal_diagnostics(kernel, types, **sizes) == []
    m = re.search(r"\buint (\w+ = )([^;,]*\w [*+] [^;,]*)([;,])", text)
    line = text.count("\n", 0, m.start()) + 1
    monkeypatch.setitem(metal.live_sources, f"{name}.metal", text[:m.start()] + f"ushort {m[1]}{m[2]}{m[3]}" + text[m.end():])
    assert any(re.match(f"kernel {name}, line {line}: implicit conversion loses integer precision", d) for d in host_module.metal_diagnostics(kernel, types, **sizes))
    assert narrow_numbers(text[:m.start()] + f"uint {m[1]}static_cast<ushort>({m[2]}){m[3]}" + text[m.end():]) == [line]


def test_a_matrix_that_nobody_filled_shows(host, monkeypatch):
    text = kernel_source("mlstm_chunk_output.metal")
    args = PUBLIC["mlstm_chunkwise"][0]
    assert not mx.isnan(cells.mlstm_chunkwise(*args)[0]).any()
    assert text.count("clear_tile(acc);") == 1
    monkeypatch.setitem(metal.live_sources, "mlstm_chunk_output.metal", text.replace("clear_tile(acc);", ""))
    assert mx.isnan(cells.mlstm_chunkwise(*args)[0]).all()


def test_compiler_options_do_not_depend_on_defaults(monkeypatch):
    asked = []
    monkeypatch.setattr(mx.fast, "metal_kernel", lambda **how: asked.append(how))
    for k in KERNELS: metal._compile_kernel(k, tuple(kernel_source(f"{h}.h") for h in k.includes), kernel_source(f"{k.name}.metal"), "metal")
    assert [how["compile_options"] for how in asked] == [{"math_mode": "safe"}] * len(KERNELS)
    assert all("log_sigmoid" in how["header"] for how, k in zip(asked, KERNELS) if "gates" in k.includes)


def test_a_report_of_a_gpu(tmp_path, monkeypatch):
    "As `make gpu-report` makes it, from launches on the host; a kernel that fails is a row, and the others follow."
    import json
    import sys
    from runpy import run_path
    monkeypatch.setenv("XLSTM_METAL_KERNELS", "host")
    texts = {"rms_norm": "", "head_norm_gate": "no such text;", "mlstm_step": kernel_source("mlstm_step.metal").replace("F * total[j]", "total[j]")}
    for name, text in texts.items(): monkeypatch.setitem(metal.live_sources, f"{name}.metal", text) # the first is of gpu.py itself
    monkeypatch.setattr(sys, "argv", ["gpu.py", "norm", "step", "conv", "--quick", "--report", str(tmp_path)])
    assert run_path(str(FOLDER.parent / "tests" / "gpu.py"))["main"]() == 1
    report = json.loads((tmp_path / "gpu.json").read_text())
    rows = {r["name"]: r for r in report["rows"]}
    assert report["mlx"] == mx.__version__ and report["failed"] == 4 and len(rows) == 6
    assert all(("error" in r) == (r["part"] == "norm") and bool(r.get("failed")) == (r["part"] != "conv") for r in rows.values())
    page = (tmp_path / "gpu.md").read_text()
    assert "6 rows, 4 failed" in page and page.count("FAIL") == 2 and "does not compile" in page
