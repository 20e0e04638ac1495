"""Whole models and the cell against fixtures made by transformers, PyTorch and float64 (`tests/fixtures/make.py`).

Folders with a config.json and a reference.safetensors anywhere under $XLSTM_METAL_FIXTURES are tested too.
"""
import os
from functools import partial
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from safetensors.numpy import load_file

from xlstm_metal.cells import mlstm_chunkwise, mlstm_chunkwise_plain, mlstm_parallel, mlstm_recurrent, mlstm_recurrent_plain
from xlstm_metal.generation.generate import Sampling, tokens
from xlstm_metal.generation.state import State
from xlstm_metal.model.checkpoint import load
from xlstm_metal.files import read_json
from xlstm_metal.train.train import lm_loss

HERE = Path(__file__).parent / "fixtures"
MORE = Path(os.environ.get("XLSTM_METAL_FIXTURES", HERE))
FOLDERS = sorted({f.parent for root in (HERE, MORE) for f in root.resolve().rglob("reference.safetensors")
                  if read_json(f.parent / "config.json").get("model_type") == "xlstm"})


@pytest.fixture(params=FOLDERS, ids=lambda f: f.name, scope="module")
def case(request):
    model, _ = load(request.param, mx.float32)
    return model, mx.load(str(request.param / "reference.safetensors"))


def errors(ref, logits, cache):
    "Largest deviation of logits and of all states."
    states = [mx.abs(slot[j] - ref[f"state.{b}.{s}"]).max().item() for b, slot in enumerate(cache) for j, s in enumerate("cnm")]
    return max(mx.abs(logits - ref["logits"]).max().item(), *states)


@pytest.mark.parametrize("chunk_size", [1, 2, 7, 16, 64, 100, 128])
def test_full_pass(case, chunk_size):
    model, ref = case
    for block in model.layers: block.mlstm_layer.cell.chunk_size = chunk_size
    cache = model.make_cache()
    assert errors(ref, model(ref["input_ids"], cache), cache) < 1e-4


@pytest.mark.parametrize("step", [1, 13, 64])
def test_in_pieces(case, step):
    model, ref = case
    ids, cache = ref["input_ids"], model.make_cache()
    out = [model(ids[:, t:t + step], cache) for t in range(0, ids.shape[1], step)]
    assert errors(ref, mx.concatenate(out, 1), cache) < 1e-4


def test_greedy(case):
    model, ref = case
    for row in ref["greedy"].tolist():
        n = len(row) - 20
        state = State(model).read(row[:n])
        assert [t for _, (t, _) in zip(range(20), tokens(state, Sampling()))] == row[n:]


def test_loss_and_gradients(case):
    model, ref = case
    loss, grads = nn.value_and_grad(model, partial(lm_loss, model))(ref["input_ids"])
    assert abs(loss.item() - ref["loss"].item()) < 1e-4
    grads = dict(tree_flatten(grads))
    assert grads.keys() == {n[5:] for n in ref if n.startswith("grad.")}
    for n, g in grads.items():
        want = ref["grad." + n]
        assert mx.abs(g - want).max().item() <= 1e-3 * mx.abs(want).max().item(), n


# A cell in float64, with an initial state, a padding mask, and gradients of everything.
FORMS = {"recurrent": mlstm_recurrent_plain, "parallel": mlstm_parallel} | {f"chunk {L}": partial(mlstm_chunkwise_plain, chunk_size=L) for L in (1, 3, 16, 64, 128)}


def on_the_host(form):
    "A form by its kernels, run by the CPU from their Metal text."
    def run(*args):
        before = os.environ.get("XLSTM_METAL_KERNELS")
        os.environ["XLSTM_METAL_KERNELS"] = "host"
        try: return form(*args) # a kernel on the host runs at once
        finally: os.environ.pop("XLSTM_METAL_KERNELS") if before is None else os.environ.update(XLSTM_METAL_KERNELS=before)
    return run


FORMS |= {"recurrent kernel": on_the_host(mlstm_recurrent), "chunk kernels": on_the_host(mlstm_chunkwise)}


@pytest.fixture(scope="module")
def cell():
    return {n: mx.array(a.astype(np.float32)) for n, a in load_file(HERE / "mlstm_fp64.safetensors").items()}


def relative(a, b): return (mx.linalg.norm((a - b).flatten()) / mx.linalg.norm(b.flatten())).item()


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS.keys())
def test_cell(cell, form):
    x = cell
    mask = x["mask"].astype(mx.bool_)
    state = (x["c0"], x["n0"], x["m0"])
    h, (C, n, m) = form(x["q"], x["k"], x["v"], x["i"], x["f"], state, mask)
    keep = mask[:, None, :, None]
    for name, got, want in (("h", h * keep, x["h"] * keep), ("C", C, x["c"]), ("n", n, x["n"]), ("m", m, x["m"])):
        assert relative(got, want) < 1e-5, name


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS.keys())
def test_cell_gradients(cell, form):
    x = cell
    mask = x["mask"].astype(mx.bool_)

    def loss(q, k, v, i, f, c0, n0, m0):
        h, (C, n, _) = form(q, k, v, i, f, (c0, n0, m0), mask)
        return (h * x["w"]).sum() + (C * x["wc"]).sum() + (n * x["wn"]).sum()

    names = ["q", "k", "v", "i", "f", "c0", "n0", "m0"]
    grads = mx.grad(loss, argnums=list(range(8)))(*[x[n] for n in names])
    for name, g in zip(names, grads): assert relative(g, x["grad_full." + name]) < 1e-4, name
