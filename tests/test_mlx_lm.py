"What mlx-lm does with a model, done with ours: batches, pieces, quantisation, adapters, copies."
import copy
import pickle

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest
from mlx.utils import tree_flatten

import xlstm_metal as xm
from xlstm_metal.model.tokenizer import encode

PROMPTS = ["class A:\n", "import os\nimport sys\n\ndef main(argv):\n    for name in", "x", "def read(path, mode='r'):\n    with open("]


@pytest.fixture(scope="module")
def bundled(): return xm.load(dtype=mx.float32)


@pytest.fixture(scope="module")
def alone(bundled):
    "Greedy tokens of each prompt by itself."
    from mlx_lm.generate import generate_step
    model, tokenizer = bundled
    return [[t for t, _ in generate_step(mx.array(encode(tokenizer, p, model.args)), model, max_tokens=12)] for p in PROMPTS]


@pytest.mark.parametrize("settings", [{}, dict(prefill_step_size=3), dict(prefill_batch_size=2)], ids=["plain", "pieces of 3", "two at once"])
def test_batches_of_uneven_prompts_equal_single_runs(bundled, alone, settings):
    from mlx_lm.generate import batch_generate
    model, tokenizer = bundled
    r = batch_generate(model, tokenizer, [encode(tokenizer, p, model.args) for p in PROMPTS], max_tokens=12, return_token_ids=True, **settings)
    assert [list(t)[:12] for t in r.token_ids] == alone


def test_our_stream_equals_theirs(bundled, alone):
    model, tokenizer = bundled
    assert [[p.token for p in xm.stream(model, tokenizer, p, max_tokens=12)] for p in PROMPTS] == alone


def test_long_inputs_are_read_in_bounded_memory_and_without_logits(bundled, monkeypatch):
    model, _ = bundled
    shapes = []
    head = type(model).head
    monkeypatch.setattr(type(model), "head", lambda self, x: shapes.append(x.shape) or head(self, x))
    peaks, last = [], None
    ids = mx.array(np.random.default_rng(0).integers(2, 4096, (1, 2048)))
    for S in (256, 2048):
        mx.clear_cache(); mx.reset_peak_memory(); base = mx.get_active_memory()
        last = model.prefill(ids[:, :S], model.make_cache(), piece=128); mx.eval(last)
        peaks.append(mx.get_peak_memory() - base)
    assert shapes == [(1, 256)] * 2
    assert peaks[1] < 1.3 * peaks[0], peaks
    cache = model.make_cache()
    h = mx.concatenate([model.backbone(ids[:, t:t + 700], cache) for t in range(0, 2048, 700)], 1)
    assert mx.abs(head(model, h[:, -1]) - last).max() < 1e-3


def test_quantised_and_saved(bundled, tmp_path):
    from mlx_lm.utils import quantize_model, save_config, save_model
    model, _ = xm.load(dtype=mx.float32)
    q, config = quantize_model(model, model.args.to_dict(), 64, 4)
    save_model(tmp_path, q); save_config(config, tmp_path / "config.json")
    back, _ = xm.load(tmp_path, dtype=mx.float32)
    ids = mx.array([[0, 5, 9, 300, 301]])
    assert mx.array_equal(back(ids), q(ids))
    assert "scales" in back.lm_head and all("scales" not in b.mlstm_layer.fgate_preact for b in back.layers)
    assert {str(s.dtype) for b in back.layers for s in [b.mlstm_layer.fgate_preact.weight]} == {"mlx.core.float32"}


def test_adapters_train(bundled):
    from mlx_lm.tuner.utils import linear_to_lora_layers
    model, _ = xm.load(dtype=mx.float32)
    model.freeze()
    linear_to_lora_layers(model, len(model.layers), dict(rank=4, scale=10., dropout=0.))
    names = [n for n, _ in tree_flatten(model.trainable_parameters())]
    assert names and all("lora" in n for n in names)
    from xlstm_metal.train.train import lm_loss
    ids, optimizer = mx.array(np.random.default_rng(0).integers(2, 400, (2, 24))), optim.Adam(1e-3)
    step = nn.value_and_grad(model, lambda: lm_loss(model, ids))
    losses = []
    for _ in range(8):
        loss, grads = step()
        optimizer.update(model, grads); mx.eval(model.parameters()); losses.append(loss.item())
    assert losses[-1] < losses[0] - .3, losses


def test_copies(bundled):
    model, _ = bundled
    ids = mx.array([[0, 5, 9]])
    assert mx.array_equal(copy.deepcopy(model)(ids), model(ids))
    assert mx.array_equal(pickle.loads(pickle.dumps(model))(ids), model(ids))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_storage_types(bundled, dtype):
    model, _ = xm.load(dtype=dtype)
    cache = model.make_cache()
    ids = mx.array([[0, 5, 9, 77, 78, 79, 80]])
    logits = model(ids, cache)
    assert logits.dtype == mx.float32 and {a.dtype for slot in cache for a in slot.cache} == {mx.float32}
    assert mx.abs(logits - bundled[0](ids)).max() < {"float32": 1e-6, "bfloat16": .4, "float16": .05}[dtype]
