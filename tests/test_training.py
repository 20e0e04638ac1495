"Training: what changes time or memory changes no loss."
from functools import partial

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.tuner.lora import LoRALinear

from xlstm_metal.model.config import xLSTMConfig
from xlstm_metal.model.model import Model
from xlstm_metal.train import train
from xlstm_metal.train.train import fit, init_weights, lm_loss, make_optimizer, train_step
from xlstm_metal.wiring import Neuron, SkipWiring


def test_training_with_less_memory_is_the_same(monkeypatch):
    "Blocks that run again, and logits in parts: the same losses, step by step, through blocks of several kinds and a wiring that skips."
    neurons = [Neuron("mlstm", 0, 32, {"num_heads": 2}), Neuron("slstm", 1, 32, {}, "scalar"), Neuron("mlstm", 2, 32, {"num_heads": 2, "inner_dims": 64})]
    wiring = SkipWiring(neurons)
    rng = np.random.default_rng(0)
    ids = [rng.integers(0, 40, (3, 20))] * 5

    def losses(**how):
        mx.random.seed(0)
        model = init_weights(Model(wiring, 40))
        return fit(model, ids, make_optimizer(5, 1e-2, 1), 5, every=1, report=None, **how)
    usual = losses()
    assert np.allclose(losses(recompute=True), usual, atol=1e-5) and usual[-1] < usual[0]
    monkeypatch.setattr(train, "lm_loss", partial(lm_loss, most=40 * 7))
    assert np.allclose(losses(), usual, atol=1e-5) and np.allclose(losses(recompute=True), usual, atol=1e-5)


def test_dropout_is_another_one_at_each_step():
    model = init_weights(Model(xLSTMConfig.from_dict(vocab_size=40, hidden_size=32, num_hidden_layers=1, num_heads=2)))
    model.embedding_dropout = nn.Dropout(.5)
    ids = [np.random.default_rng(0).integers(0, 40, (2, 12))] * 3
    mx.enable_compile()
    try: losses = fit(model, ids, optim.SGD(0.), 3, every=1, report=None)
    finally: mx.disable_compile()
    assert len({round(x, 4) for x in losses}) == 3
    with pytest.raises(ValueError, match="dropout"): # blocks that drop cannot run again
        model.layers[0].ffn.proj_down = nn.Sequential(nn.Dropout(.1), model.layers[0].ffn.proj_down)
        fit(model, ids, optim.SGD(0.), 1, recompute=True)


def small_model(**more):
    mx.random.seed(0)
    return init_weights(Model(xLSTMConfig.from_dict(vocab_size=40, hidden_size=32, num_hidden_layers=2, num_heads=2, **more)))


@pytest.mark.parametrize("kernels", ["off", "host"])
@pytest.mark.parametrize("how", [{}, {"recompute": True}, {"tied": True}, {"biases": True}])
def test_a_step_is_what_mlx_computes(monkeypatch, kernels, how):
    "Maps that share a gradient, the loss, the norm and the clipping, against MLX's own parts."
    how = dict(how)
    model = small_model(tie_word_embeddings=how.pop("tied", False), use_bias=how.pop("biases", False))
    ids = mx.array(np.random.default_rng(0).integers(0, 40, (3, 20)))
    def loss(m): return nn.losses.cross_entropy(m(ids[:, :-1]), ids[:, 1:]).mean()
    monkeypatch.setenv("XLSTM_METAL_KERNELS", "off")
    value, g = nn.value_and_grad(model, loss)(model.train())
    want = {n: w - .5 * d for (n, w), (_, d) in zip(tree_flatten(model.parameters()), tree_flatten(optim.clip_grad_norm(g, .1)[0]), strict=True)}
    mx.eval(value, want)
    monkeypatch.setenv("XLSTM_METAL_KERNELS", kernels)
    assert abs(train_step(model, optim.SGD(.5), max_norm=.1, **how)(ids) - value).item() < 1e-5
    for name, w in tree_flatten(model.parameters()): assert mx.allclose(w, want[name], rtol=1e-4, atol=1e-5), name


@pytest.mark.parametrize("bits", [None, 4])
def test_adapters_learn_and_the_rest_stays(bits):
    model = small_model()
    if bits: nn.quantize(model, group_size=32, bits=bits, class_predicate=model.quant_predicate)
    model.freeze()
    for block in model.layers:
        for owner, name in ((block.mlstm_layer, "q"), (block.mlstm_layer, "v"), (block.ffn, "proj_up")): owner[name] = LoRALinear.from_base(owner[name], r=4)
    before, ids = dict(tree_flatten(model.parameters())), mx.array(np.random.default_rng(0).integers(0, 40, (3, 20)))
    step = train_step(model, make_optimizer(20, .02, 1))
    losses = [step(ids).item() for _ in range(15)]
    after = dict(tree_flatten(model.parameters()))
    changed = {n for n, w in after.items() if not mx.array_equal(w, before[n])}
    assert changed == {n for n, _ in tree_flatten(model.trainable_parameters())} and len(changed) == 12 and losses[-1] < losses[0]
