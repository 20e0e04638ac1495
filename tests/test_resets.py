"""Texts that begin within a row: every block, wiring and form against the same texts one by one."""
import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

import xlstm_metal as xm
from xlstm_metal import metal
from xlstm_metal.blocks.block import Block, block, kinds, make_block, BlockSpec
from xlstm_metal.cells.mlstm_long_kernels import mlstm_long_chunks
from xlstm_metal.cells.mlstm import forget_before, mlstm_recurrent_plain
from xlstm_metal.train.train import init_weights, lm_loss, recomputed
from xlstm_metal.wiring import Neuron, WiringError, xLSTMWiring
from xlstm_metal.wiring.run import BlockStack

D, CUTS = 16, [0, 1, 9, 64, 66, 98, 100]
BLOCKS = {"mlstm": ("mlstm", {}), "first paper's mlstm": ("mlstm", dict(inner_dims=32)), "slstm": ("slstm", {}), "slstm without a convolution": ("slstm", dict(kernel_size=0)),
          "conv": ("conv", {}), "attention": ("attention", dict(num_heads=4, kv_heads=2)), "ffn": ("ffn", {})}


@pytest.fixture(autouse=True, params=[0])
def seed(request): mx.random.seed(request.param)


def noise(*shape, seed=0):
    return mx.array(np.random.default_rng(seed).normal(size=shape).astype(np.float32))


def shaken(module, seed=0): # weights that are not those of the start: gates that do something
    r = np.random.default_rng(seed)
    module.update(nn.utils.tree_map(lambda w: w + .3 * mx.array(r.normal(size=w.shape).astype(np.float32)), module.parameters()))
    return module


def begins(cuts=CUTS, rows=1):
    return mx.array([[t in cuts for t in range(cuts[-1])]] * rows)


def close(a, b, bound=2e-5):
    assert mx.abs(a - b).max().item() <= bound * max(1, mx.abs(b).max().item())


def same_gradients(f, g, module, *args):
    (a, da), (b, db) = (nn.value_and_grad(module, h)(*args) for h in (f, g))
    close(a, b)
    size = mx.sqrt(sum((y**2).sum() for _, y in tree_flatten(db)))
    for (name, x), (_, y) in zip(tree_flatten(da), tree_flatten(db)):
        assert mx.linalg.norm(x - y) <= 1e-4 * mx.linalg.norm(y) + 1e-4 * size, name


@pytest.mark.parametrize("kernels", ["off", "host"])
@pytest.mark.parametrize("name", BLOCKS)
def test_a_block_reads_texts_of_a_row_as_if_they_were_alone(name, kernels, monkeypatch):
    monkeypatch.setenv("XLSTM_METAL_KERNELS", kernels)
    kind, kwargs = BLOCKS[name]
    b, x = shaken(make_block(BlockSpec(kind, D, kwargs))), noise(2, 100, D)
    given = [b(x[:, a:e]) for a, e in zip(CUTS, CUTS[1:])]
    alone, state = mx.concatenate([y for y, _ in given], 1), given[-1][1]
    used = b(noise(2, 7, D, seed=3))[1] # of another text, that was here before
    resets = {} if kind == "ffn" else dict(reset=begins(rows=2))
    for before in (None, used):
        y, after = b(x, before, None, **resets)
        close(y, alone)
        more = noise(2, 5, D, seed=9)
        close(b(more, after)[0], b(more, state)[0]) # also where the state is in another unit
    weights = noise(2, 100, D, seed=5)
    def parts(x): return sum((weights[:, a:e] * b(x[:, a:e])[0]).sum() for a, e in zip(CUTS, CUTS[1:]))
    same_gradients(lambda x: (weights * b(x, used, None, **resets)[0]).sum(), parts, b, x)
    close(mx.grad(lambda x: (weights * b(x, None, None, **resets)[0]).sum())(x), mx.grad(parts)(x), 1e-4)


@pytest.mark.parametrize("name", [n for n in BLOCKS if n != "ffn"])
def test_masked_positions_between_texts_change_nothing(name):
    kind, kwargs = BLOCKS[name]
    b, x = shaken(make_block(BlockSpec(kind, D, kwargs))), noise(1, 30, D)
    mask, cuts = np.ones((1, 30), bool), [0, 8, 20, 30]
    mask[0, [0, 1, 6, 7, 12, 28, 29]] = False
    reset = np.zeros((1, 30), bool)
    for a, e in zip(cuts, cuts[1:]): reset[0, a + int(np.argmax(mask[0, a:e]))] = True # at the first token that counts
    y, after = b(x, None, mx.array(mask), mx.array(reset))
    for a, e in zip(cuts, cuts[1:]):
        at = mx.array(a + np.flatnonzero(mask[0, a:e]))
        want, state = b(x[:, at])
        close(y[:, at], want)
    more = noise(1, 3, D, seed=2)
    close(b(more, after)[0], b(more, state)[0])


def wired(i, j):
    w = xLSTMWiring([Neuron("mlstm", 0, D), Neuron("slstm", 1, D), Neuron("conv", 2, D, {}, "gated")])
    w.add_synapse(i, j, 1, delay=1)
    return w


@pytest.mark.parametrize("make", [lambda: xm.Model(xLSTMWiring([Neuron(k, j, D) for j, k in enumerate(("mlstm", "slstm", "attention", "conv", "ffn"))]), 40),
                                  lambda: xm.Model(wired(0, 2), 40), lambda: xm.Model(wired(2, 0), 40)], ids=["chain", "a delay", "a cycle with a delay"])
def test_a_model_learns_from_packed_rows_as_from_single_ones(make):
    model = shaken(make())
    cuts = [0, 1, 6, 14, 15, 20]
    ids = mx.array(np.random.default_rng(1).integers(0, 40, (1, 20)))
    logits = model(ids, reset=begins(cuts))
    close(logits, mx.concatenate([model(ids[:, a:e]) for a, e in zip(cuts, cuts[1:])], 1), 1e-4)
    def packed(ids): return lm_loss(model, ids, reset=begins(cuts))
    def single(ids):
        longer = [(a, e) for a, e in zip(cuts, cuts[1:]) if e - a > 1]
        return sum(lm_loss(model, ids[:, a:e]) * (e - a - 1) for a, e in longer) / sum(e - a - 1 for a, e in longer)
    same_gradients(packed, single, model, ids)
    with recomputed(model.eval()): again = nn.value_and_grad(model, packed)(ids)
    close(again[0], packed(ids))


def test_a_carried_cache_and_a_row_that_begins_anew():
    model = shaken(xm.Model(xLSTMWiring([Neuron(k, j, D) for j, k in enumerate(("mlstm", "slstm", "conv"))]), 40))
    ids = mx.array(np.random.default_rng(1).integers(0, 40, (2, 12)))
    cache, fresh = model.make_cache(), model.make_cache()
    model(ids, cache)
    reset = mx.array([[True] + [False] * 11, [False] * 12]) # of two rows, one goes on
    together = model(ids, cache, reset=reset)
    close(together[:1], model(ids[:1], fresh), 1e-4)
    close(together[1:], model(mx.concatenate([ids, ids], 1)[1:])[:, 12:], 1e-4)


@pytest.mark.parametrize("kernels", ["off", "host"])
def test_many_texts_in_a_long_chunk_of_16_bits(kernels, monkeypatch):
    monkeypatch.setenv("XLSTM_METAL_KERNELS", kernels)
    q, k, v = (noise(1, 2, 256, d, seed=s) for s, d in enumerate((16, 16, 24)))
    i, f = 3 * noise(1, 2, 256, seed=3) - 2, noise(1, 2, 256, seed=4) + 3
    for length in (3, 50): # of the texts
        cuts = [*range(0, 256, length), 256]
        def single(t): return mx.concatenate([mlstm_recurrent_plain(*(x[:, :, a:e].astype(t) for x in (q, k, v)), i[:, :, a:e], f[:, :, a:e])[0] for a, e in zip(cuts, cuts[1:])], 2)
        reset = begins(cuts)
        def long(t, f, *where): return mlstm_long_chunks(*(x[where].astype(t) for x in (q, k, v)), i[where], f[where], None, None, 128, 1e-6)[0]
        def error(h, t): return (mx.linalg.norm(h - single(t)) / mx.linalg.norm(h)).item()
        assert error(long(mx.float32, forget_before(f, reset), ...), mx.float32) < 1e-3
        alone = mx.concatenate([long(mx.bfloat16, f, slice(None), slice(None), slice(a, e)) for a, e in zip(cuts, cuts[1:])], 2)
        assert error(long(mx.bfloat16, forget_before(f, reset), ...), mx.bfloat16) < 1.2 * error(alone, mx.bfloat16)


def test_a_bidirectional_layer():
    layer = shaken(xm.xLSTM(5, 8, cell="mixed", num_layers=2, bidirectional=True))
    x, cuts = noise(2, 20, 5), [0, 3, 4, 20]
    y, _ = layer(x, reset=begins(cuts, 2))
    close(y, mx.concatenate([layer(x[:, a:e])[0] for a, e in zip(cuts, cuts[1:])], 1), 1e-4)


def test_a_block_that_knows_no_resets_is_refused_by_name():
    known = list(kinds)
    try:
        @block("forgetful", "a test")
        class Forgetful(Block):
            state_size = 1
            def __init__(self, dims): super().__init__()
            def __call__(self, x, state=None, mask=None): return x, (x[:, -1],)
        stack = BlockStack([make_block(BlockSpec("forgetful", D, {}))])
        stack(noise(1, 4, D))
        with pytest.raises(WiringError, match=r"block 0 \(forgetful\) cannot begin a text within a row: its __call__ has no argument reset"):
            stack(noise(1, 4, D), reset=begins([0, 2, 4]))
    finally: kinds[:] = known
