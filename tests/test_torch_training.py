"Steps of training beside PyTorch: the same model of transformers, gradients, clipping and AdamW. Runs with `make parity`."
from functools import partial
from pathlib import Path

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np
import pytest
from mlx.utils import tree_flatten

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from xlstm_metal.model.checkpoint import load
from xlstm_metal.train.train import AdamW, train_step

FOLDER = Path(__file__).parent / "fixtures" / "hf_tiny"


@pytest.mark.parametrize("max_norm", [.05, 1e3])
def test_five_steps_are_those_of_torch(max_norm):
    theirs = transformers.AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32).train()
    model, _ = load(FOLDER, mx.float32)
    ids = np.random.default_rng(0).integers(2, 60, (5, 3, 20))
    matrices = [p for p in theirs.parameters() if p.ndim > 1]
    others = [p for p in theirs.parameters() if p.ndim <= 1]
    how = dict(lr=1e-3, betas=(.9, .95), eps=1e-8)
    update = torch.optim.AdamW([dict(params=matrices, weight_decay=.1), dict(params=others, weight_decay=0.)], **how)
    want = []
    for rows in ids:
        rows = torch.tensor(rows)
        logits = theirs(rows, use_cache=False).logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), max_norm)
        update.step()
        update.zero_grad()
        want.append(loss.item())
    make = partial(AdamW, 1e-3, betas=[.9, .95], eps=1e-8, bias_correction=True)
    step = train_step(model, optim.MultiOptimizer([make(weight_decay=.1), make(weight_decay=0.)], [lambda path, w: w.ndim > 1]), max_norm)
    np.testing.assert_allclose([step(mx.array(rows)).item() for rows in ids], want, rtol=2e-5)
    after = {n: p.detach().numpy() for n, p in theirs.named_parameters()}
    for name, w in tree_flatten(model.parameters()):
        # a component whose gradient is rounding alone may take its step the other way
        assert np.linalg.norm(np.array(w) - after[name]) <= 2e-3 * 5e-3 * w.size**.5, name
