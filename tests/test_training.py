"Training: what changes time or memory changes no loss."
from functools import partial

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest

from xlstm_metal.model.config import xLSTMConfig
from xlstm_metal.model.model import Model
from xlstm_metal.train import train
from xlstm_metal.train.train import fit, init_weights, lm_loss, make_optimizer
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
