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
from mlx.utils import tree_flatten
from mlx_lm.models.cache import ArraysCache

import xlstm_metal as xm
from xlstm_metal import cells, host as host_module, metal
from xlstm_metal.cells import conv, mlstm_chunk_gradients, mlstm_chunk_kernels, mlstm_step_kernel, norms, slstm
from xlstm_metal.cells.mlstm_step_kernel import cell_example
from xlstm_metal.generation.generate import Sampling, tokens
from xlstm_metal.generation.state import State
from xlstm_metal.host import run
from xlstm_metal.metal import kernel_source
from xlstm_metal.model.config import xLSTMConfig
from xlstm_metal.model.model import Model
from xlstm_metal.train.train import fit, init_weights, lm_loss, make_optimizer

FOLDER = Path(__file__).parents[1] / "kernels"
MODULES = conv, norms, mlstm_step_kernel, mlstm_chunk_kernels, mlstm_chunk_gradients, slstm
KERNELS = sorted({k for m in MODULES for k in vars(m).values() if isinstance(k, metal.Kernel)}, key=lambda k: k.name)
NAMES = [k.name for k in KERNELS]
# public function -> arguments, and a kernel that it must have launched
PUBLIC = {
    "mlstm_step": (cell_example(1), "mlstm_step"),
    "mlstm_recurrent": (cell_example(5), "mlstm_recurrent"),
    "mlstm_chunkwise": (cell_example(70), "mlstm_chunk_output"),
    "slstm_step": (slstm._slstm_example(S=1), "slstm_sequence"),
    "slstm_sequence": (slstm._slstm_example(), "slstm_sequence"),
    "causal_conv1d": (metal.samples((2, 9, 5), (5, 1, 4), (5,)), "causal_conv1d"),
    "head_norm_gate": (metal.samples((1, 2, 5, 33), (1, 5, 66), (66,)), "head_norm_gate"),
}


@pytest.fixture
def host(monkeypatch):
    monkeypatch.setenv("XLSTM_METAL_KERNELS", "host")
    metal.launch_counts.clear()


def test_public_functions_have_definitions():
    assert {n for n in cells.__all__ if f"{n}_plain" in cells.__all__} == PUBLIC.keys()
    assert {n.removesuffix("_plain") for n in cells.__all__ if n.endswith("_plain")} == PUBLIC.keys()


@pytest.mark.parametrize("name", PUBLIC)
def test_public_functions_run_by_kernel(host, monkeypatch, name):
    function, plain, (args, kernel) = getattr(cells, name), getattr(cells, f"{name}_plain"), PUBLIC[name]
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
    function, plain = getattr(cells, name), getattr(cells, f"{name}_plain")
    assert signature(function) == signature(plain) and function.__name__ == name
    assert f"`{name}_plain` is the definition" in function.__doc__
    with pytest.raises(TypeError, match="missing"): function()


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
        monkeypatch.setattr(k, "passed", None)
    metal.launch_counts.clear()


def test_self_tests_run_once_on_a_mac(as_if_metal):
    tried = [k for k in KERNELS if k.self_test]
    assert {k.name for k in tried} == {"head_norm_gate", "mlstm_step", "mlstm_recurrent", "mlstm_chunk_state", "causal_conv1d", "slstm_sequence"}
    assert all(k.use() == "metal" for k in tried)
    before = metal.kernel_report()
    assert {name for name, ran in before.items() if "metal" in ran} == set(NAMES) # self-tests launch every kernel
    assert all(k.use() == "metal" for k in tried) and metal.kernel_report() == before


def test_no_self_tests_where_kernels_were_measured(as_if_metal, monkeypatch):
    monkeypatch.setattr(metal, "backend", lambda: "cuda")
    assert {k.use() for k in KERNELS} == {"cuda"}
    assert not any(k.passed for k in KERNELS)


@pytest.mark.parametrize("name, old, new", [("mlstm_chunk_input_grad", "l < length && c < DQK", "l < 7 && c < DQK"), ("mlstm_step", "F * total[j]", "total[j]"),
                                            ("slstm_sequence", "threadgroup float hidden[DH];", "no such text")])
def test_a_kernel_that_fails_its_self_test_is_not_used(as_if_metal, monkeypatch, name, old, new):
    text = kernel_source(f"{name}.metal")
    monkeypatch.setitem(metal.live_sources, f"{name}.metal", text.replace(old, new))
    assert text.count(old) == 1
    first = {"mlstm_chunk_input_grad": "mlstm_chunk_state"}.get(name, name)
    kernel = next(k for k in KERNELS if k.name == first)
    with pytest.warns(UserWarning, match=f"kernel {first} stays unused on this machine"): assert kernel.use() is None
    assert kernel.use() is None and metal.kernel_report()[first]["plain"] == 2
    x = mx.random.normal((1, 2, 70, 8))
    gates = x[..., 0], x[..., 1]
    with_it, _ = cells.mlstm_chunkwise(x, x, x, *gates) # and the plain form answers
    assert mx.allclose(with_it, cells.mlstm_chunkwise_plain(x, x, x, *gates)[0], atol=1e-3)


def test_every_kernel_file_is_used():
    assert {f.stem for f in FOLDER.glob("*.metal")} == set(NAMES)
    assert {f.stem for f in FOLDER.glob("*.h")} - {"cuda", "host", "types"} == {h for k in KERNELS for h in k.includes}


CUDA_TYPES = {mx.float32: "float", mx.float16: "__half", mx.bfloat16: "__nv_bfloat16", mx.bool_: "bool"}
# arguments of the self-tests that may have 16 bits
MLSTM = {0: mx.bfloat16, 1: mx.float16, 2: mx.bfloat16}
SHORTER = {"head_norm_gate": dict.fromkeys((1, 2, 3), mx.float16), "causal_conv1d": dict.fromkeys((0, 3), mx.bfloat16),
           "mlstm_step": MLSTM, "mlstm_recurrent": MLSTM, "mlstm_chunk_state": MLSTM}


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
        cases = [(f, plain, list(example()), SHORTER.get(k.name, {})) for k in KERNELS if k.self_test for f, plain, example in [k.self_test]]
        cases.append((cells.slstm_sequence, cells.slstm_sequence_plain, slstm._slstm_example(1, 1, 2, 130), {})) # R does not fit registers
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
    ("head_norm_gate", "head_norm_gate", "h_shape[3]", "eps_shape[1]", r"line 3: eps_shape\[1\] is out of bounds: eps has 1 dimension$"),
    ("mlstm_chunkwise", "mlstm_chunk_state", "float total =", "double total =", "Metal has no `double`"),
    ("causal_conv1d", "causal_conv1d", "uint ", "static uint ", "Metal has no `static` variables"),
])
def test_faults_in_our_own_texts(host, monkeypatch, function, name, old, new, says):
    text = kernel_source(f"{name}.metal")
    monkeypatch.setitem(metal.live_sources, f"{name}.metal", text.replace(old, new.format(old), 1))
    assert old in text
    with pytest.raises(host_module.KernelFault, match=says): mx.eval(getattr(cells, function)(*PUBLIC[function][0]))


def test_a_matrix_that_nobody_filled_shows(host, monkeypatch):
    text = kernel_source("mlstm_chunk_output.metal")
    args = PUBLIC["mlstm_chunkwise"][0]
    assert not mx.isnan(cells.mlstm_chunkwise(*args)[0]).any()
    assert text.count("clear_tile(acc);") == 1
    monkeypatch.setitem(metal.live_sources, "mlstm_chunk_output.metal", text.replace("clear_tile(acc);", ""))
    assert mx.isnan(cells.mlstm_chunkwise(*args)[0]).all()
