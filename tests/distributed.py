"""What each of several processes does; tests/test_distributed.py starts them: mlx.launch -n 2 python tests/distributed.py FOLDER PART ..."""
import random
import sys
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

import xlstm_metal as xm
from xlstm_metal.apps.bench import random_model
from xlstm_metal.train.train import init_weights, lm_loss, make_optimizer, train_step

mx.set_default_device(mx.cpu)
IDS = np.random.default_rng(0).integers(2, 60, (4, 33))


def small(quantize=None):
    mx.random.seed(0)
    model = random_model(128, 2, 4, mx.float32, quantize)
    if not quantize: init_weights(model, 1)
    return model


def forward(group):
    out = {}
    for bits in (None, 4) if group is None or group.size() == 2 else (None,):
        model = small(bits)
        if group: model.shard(group)
        out[f"logits {bits}"] = model(mx.array(IDS))
    model, tokenizer = xm.load(dtype=mx.float32)
    if group: model.shard(group)
    out["text"] = mx.array(list(xm.generate(model, tokenizer, "class Queue:\n", max_tokens=40).encode()))
    return out


def backward(group):
    model = small()
    if group: model.shard(group)
    loss, grads = nn.value_and_grad(model, lambda m, ids: lm_loss(m, ids))(model, mx.array(IDS))
    return dict(tree_flatten(grads)) | {"loss": loss}


def batches(group):
    model, rows = small(), IDS if group is None else IDS[group.rank()::group.size()]
    step = train_step(model, make_optimizer(10, 1e-2, 1), group=group)
    losses = mx.stack([step(mx.array(rows)) for _ in range(4)])
    return dict(tree_flatten(model.parameters())) | {"losses": losses}


def write_texts(folder):
    folder.mkdir()
    for j in range(24):
        words = random.Random(j).choices(["def", "class", "return", "import", "self", "(x):", "\n    ", " = 0\n", "for i in"], k=300)
        (folder / f"{j}.py").write_text(" ".join(words))


def trainer(group, folder=None):
    from xlstm_metal.train.trainer import TrainConfig, Trainer
    folder = Path(folder or sys.argv[1])
    config = TrainConfig(data=str(folder / "texts"), out=str(folder / "run"), vocab_size=280, dims=32, blocks=1, heads=2, length=24, batch=5, steps=10, warmup=2,
                         lr=5e-3, log_every=1, evaluate_every=5, evaluate_tokens=200, save_every=5, dtype="float32", accumulate=2)
    Trainer(config).run(5)
    run = Trainer(config) # goes on from the checkpoint
    assert run.done == 5
    run.run()
    return dict(tree_flatten(run.model.parameters())) | {"files": mx.array(len(list(run.out.glob("step-*"))))}


if __name__ == "__main__":
    group = mx.distributed.init(strict=True, backend="ring")
    for part in sys.argv[2:]:
        result = {k: mx.array(v) for k, v in globals()[part](group).items()}
        mx.save_safetensors(str(Path(sys.argv[1]) / f"{part}-{group.rank()}.safetensors"), result)
