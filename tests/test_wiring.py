"""Wirings and whole checkpoints: the fixtures, the bundled model, and what a chain costs.

Folders with a config.json and a reference.safetensors anywhere under $XLSTM_METAL_FIXTURES are tested too.
"""
import io
import json
import os
import re
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten

from xlstm_metal.files import bundled
from xlstm_metal.model.checkpoint import load
from xlstm_metal.model.layout import same_blocks
from xlstm_metal.wiring import AutoWiring, WiringError, ablate, xLSTMWiring

HERE = Path(__file__).parent / "fixtures"
MORE = Path(os.environ.get("XLSTM_METAL_FIXTURES", HERE))
FOLDERS = [bundled, *sorted({f.parent for root in (HERE, MORE) for f in root.resolve().rglob("reference.safetensors")})]


@pytest.fixture(params=FOLDERS, ids=lambda f: f.name, scope="module")
def case(request): return request.param, load(request.param, mx.float32)[0]


def loop(model, ids, cache, order=None):
    "The model without its wiring: a loop over blocks."
    x = model.embeddings(ids)
    for slot, j in zip(cache, order or range(len(model.layers))):
        x, state = model.layers[j](x, tuple(slot.cache) if slot.cache[0] is not None else None)
        slot.cache = list(state)
    return model.head(model.backbone[model.args.layout.norm](x))


def ids_for(model, n): return mx.random.randint(0, model.args.vocab_size, (2, n), key=mx.random.key(n))


def test_a_wired_model_is_the_loop(case):
    _, model = case
    ours, theirs = model.make_cache(), model.make_cache()
    for n in (70, 1, 5): # a piece of several chunks, a token, a few
        assert mx.array_equal(model(ids_for(model, n), ours), loop(model, ids_for(model, n), theirs))
    for a, b in zip(ours, theirs): assert all(mx.array_equal(x, y) for x, y in zip(a.cache, b.cache))


def graph(model, forward):
    cache = model.make_cache()
    model(ids_for(model, 3), cache)
    mx.eval([slot.cache for slot in cache])
    text = io.StringIO()
    mx.export_to_dot(text, forward(mx.array([[1], [2]]), cache), *(a for slot in cache for a in slot.cache))
    return Counter(re.findall(r'label ?="([A-Za-z]+)', text.getvalue()))


def test_a_chain_costs_nothing(case):
    "A decode step through the wiring is made of the same operations, as many of each, as one without."
    _, model = case
    ours, theirs = graph(model, model), graph(model, lambda ids, cache: loop(model, ids, cache))
    assert ours == theirs and sum(ours.values()) > 20 * len(model.layers)
    def twice(ids, cache): return loop(model, ids, cache) + loop(model, ids, cache)
    assert graph(model, twice) != ours # the count would see more work


@pytest.mark.parametrize("order", [lambda n: [0] + list(range(n)), lambda n: list(range(n))[::-1], lambda n: list(range(1, n)), lambda n: [n - 1] * 2],
                         ids=["first twice", "reversed", "without the first", "last twice"])
def test_another_order(case, order):
    _, model = case
    chain, order = model.wiring, order(len(model.layers))
    if not order: return
    model.wiring = xLSTMWiring([chain.neurons[j] for j in order])
    try:
        ids, empty = ids_for(model, 20), model.make_cache()
        assert mx.array_equal(model(ids), loop(model, ids, empty, order))
    finally: model.wiring = chain


def test_without_a_block(case):
    _, model = case
    chain, n = model.wiring, len(model.layers)
    if n < 2: return
    for gone in range(n):
        model.wiring = ablate(chain, gone)
        want = loop(model, ids_for(model, 20), [*model.make_cache()], [j for j in range(n) if j != gone])
        assert mx.array_equal(model(ids_for(model, 20)), want)
    model.wiring = chain


def without_training(neurons):
    "What shapes cannot show and what plays a part in training alone."
    return [replace(n, kwargs={k: v for k, v in n.kwargs.items() if k not in ("block", "num_blocks", "dropout", "ffn_dropout", "chunk_size")}) for n in neurons]


def test_discovery_agrees_with_the_config(case, tmp_path):
    folder, model = case
    for f in folder.glob("model*.safetensors"): shutil.copy(f, tmp_path) # and no config
    with pytest.warns(UserWarning, match="assuming"): auto = AutoWiring.from_safetensors(tmp_path)
    assert same_blocks(without_training(auto.neurons), without_training(model.wiring.neurons)) and auto.unknown == []
    assert auto.vocab_size == model.args.vocab_size and auto.tied == model.args.tie_word_embeddings
    assert AutoWiring.from_config(json.loads(json.dumps(auto.get_config()))) == auto
    x = mx.random.normal((1, 20, model.args.hidden_size))
    for j, n in enumerate(auto.neurons):
        block, info = auto.create_block_cell(j), auto.get_block_info(j)
        assert info["parameters"] == sum(w.size for _, w in tree_flatten(model.layers[j].parameters()))
        block.apply(lambda a: a.astype(mx.float32) if mx.issubdtype(a.dtype, mx.floating) else a)
        got, want = block(x)[0], model.layers[j](x)[0] # eps and caps are the usual ones here
        assert mx.abs(got - want).max() < 1e-5 * mx.maximum(1, mx.abs(want).max())


def test_every_tensor_is_looked_at(case):
    "A tensor more, or a block's tensors under another name, do not go unnoticed."
    folder, _ = case
    auto = AutoWiring.from_safetensors(folder)
    name, t = next((n, t) for n, t in auto.tensors.items() if ".blocks.0." in n)
    assert AutoWiring({**auto.tensors, name + "_copy": t}).unknown == [name + "_copy"]
    renamed = {re.sub(r"blocks\.0\..*?\.", "blocks.0.part.", n) if ".blocks.0." in n else n: t for n, t in auto.tensors.items()}
    with pytest.raises(WiringError, match="block 0 is of no known kind: it has part"): AutoWiring(renamed)
