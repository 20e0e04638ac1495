"LoRA and QLoRA: the commands of the tutorial as processes, bench's rows, and the same step by kernels and without."
import json
import os
import subprocess
import sys

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.tuner.lora import LoRALinear

import xlstm_metal as xm
from xlstm_metal.apps import bench
from xlstm_metal.apps.cli import main
from xlstm_metal.model.config import xLSTMConfig
from xlstm_metal.model.model import Model
from xlstm_metal.train import train
from xlstm_metal.train.train import add_adapters, init_weights, make_optimizer, recomputed, train_step


def run(*words, cwd=None):
    r = subprocess.run([sys.executable, "-m", "xlstm_metal", *map(str, words)], capture_output=True, text=True, cwd=cwd, timeout=300,
                       env=os.environ | {"HF_HUB_OFFLINE": "1", "MLX_DISABLE_COMPILE": "1"})
    assert r.returncode == 0, r.stderr
    return r.stdout


def test_three_commands(tmp_path):
    "A copy in 4 bits, adapters beside it with blocks that run again, and text of both: another one than without."
    model = init_weights(Model(xLSTMConfig.from_dict(vocab_size=4096, hidden_size=64, num_hidden_layers=2, num_heads=2, bos_token_id=0)))
    xm.save(model, tmp_path / "model", xm.load(dtype=mx.float32)[1])
    (tmp_path / "data").mkdir()
    (tmp_path / "data/train.jsonl").write_text("".join(json.dumps({"text": f"def times_{n}(x): return {n} * x"}) + "\n" for n in range(8)))
    run("convert", "model", "packed", "--quantize", 4, cwd=tmp_path)
    run("mlx", "lora", "--model", "packed", "--train", "--data", "data", "--adapter-path", "adapters", "--num-layers", -1, "--grad-checkpoint", "--batch-size", 1,
        "--grad-accumulation-steps", 2, "--max-seq-length", 32, "--learning-rate", "1e-2", "--iters", 4, cwd=tmp_path)
    learned = mx.load(str(tmp_path / "adapters/adapters.safetensors"))
    assert len(learned) == 2 * 2 * 10 and all(mx.abs(w).max() > 0 for w in learned.values())
    def text(*more): return run("generate", "--model", "packed", "--prompt", "def times_3", "--max-tokens", 8, *more, cwd=tmp_path)
    assert text("--adapter-path", "adapters") != text()


def test_a_step_by_kernels_is_the_same(monkeypatch):
    "Weights in 4 bits, blocks that run again."
    ids, after = mx.array(np.random.default_rng(0).integers(0, 40, (1, 71))), []
    for kernels in "off", "host":
        monkeypatch.setenv("XLSTM_METAL_KERNELS", kernels)
        mx.random.seed(0)
        model = init_weights(Model(xLSTMConfig.from_dict(vocab_size=40, hidden_size=32, num_hidden_layers=2, num_heads=2)))
        nn.quantize(model, group_size=32, bits=4, class_predicate=model.quant_predicate)
        step = train_step(add_adapters(model), make_optimizer(9, 1e-2, 1), recompute=True)
        losses = [step(ids).item() for _ in range(3)]
        after.append((losses, dict(tree_flatten(model.trainable_parameters()))))
    (a, mine), (b, want) = after
    assert np.allclose(a, b, atol=2e-4) and a[-1] < a[0]
    for name, w in want.items(): assert mx.linalg.norm(mine[name] - w) < 2e-2 * mx.linalg.norm(w), name


def test_in_a_step_adapters_have_the_type_of_the_weights(monkeypatch):
    "Else each of them keeps its own float32 copy of what its layer is given."
    seen, call = set(), LoRALinear.__call__
    def note(self, x):
        seen.add((self.linear.weight.dtype, self.lora_a.dtype, self.lora_b.dtype, self.linear.weight.shape[0] == 2))
        return call(self, x)
    model = add_adapters(bench.random_model(32, 1, 2))
    step = train_step(model, make_optimizer(9, 1e-2, 1), recompute=True)
    monkeypatch.setattr(LoRALinear, "__call__", note)
    step(mx.array([[1, 2, 3]])).item()
    assert seen == {(*[mx.float32] * 3, True), (*[mx.bfloat16] * 3, False)} # gates are float32
    assert {w.dtype for _, w in tree_flatten(model.trainable_parameters())} == {mx.float32}


def test_bench_measures_adapters(tmp_path, capsys, monkeypatch):
    ran_again = []
    monkeypatch.setattr(train, "recomputed", lambda model: ran_again.append(model) or recomputed(model))
    words = ["bench", "--sizes", "64", "2", "2", "--quantize", "4", "--prompts", "16", "--batches", "1", "--tokens", "2", "--lora", "1", "2", "4", "--recompute"]
    assert main([*words, "--json", str(tmp_path / "b.json")]) == 0
    rows = [r for r in json.loads((tmp_path / "b.json").read_text())["rows"] if r["part"] == "training"]
    assert [(r["rows"], r["tokens"]) for r in rows] == [(1, 2), (1, 4)] and "LoRA of 0.0236 M, blocks again" in capsys.readouterr().out
    assert all(min(r["first_step"], r["tokens_per_second"], r["peak_memory"]) > 0 and r["trained"] == 23616 for r in rows) and len(set(map(id, ran_again))) == 2


def test_what_was_measured_is_kept_when_memory_ends(monkeypatch):
    measured = bench.time_training
    def measure(model, n, rows, **how):
        if n > 8: raise RuntimeError("[malloc] Unable to allocate 9 bytes.\nmore")
        return measured(model, n, rows, 1, **how)
    monkeypatch.setattr(bench, "time_training", measure)
    report = bench.bench(bench.random_model(64, 2, 2), prompts=[4], batches=[1], n=2, adapters=[(1, 8), (1, 9)], size=64)
    text = str(report)
    assert "training, 1 rows of 8, LoRA" in text and "LoRA, 1 rows of 9: not measured: [malloc] Unable to allocate 9 bytes." in text
    assert len([*report.rows()]) == 3


@pytest.mark.parametrize("words, says", [(["--lora", "1"], "--lora needs rows and tokens"), (["--recompute"], "needs --training or --lora"), (["--lora", "1", "0"], "must be a whole number")])
def test_bench_refuses(words, says, capsys):
    try: code = main(["bench", *words])
    except SystemExit as e: code = e.code
    assert code == 2 and says in capsys.readouterr().err
