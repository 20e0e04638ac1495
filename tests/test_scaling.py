"Small models of five architectures: that all are trained alike, by the step of the trainer, and that a run may be killed."
import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models import cache as _ # it compiles functions of its own when it is imported

import xlstm_metal as xm
from xlstm_metal.model.convert import save
from xlstm_metal.train import scaling
from xlstm_metal.train.data import DataError
from xlstm_metal.train.datasets import Batch
from xlstm_metal.train.scaling import Corpus, Size, architectures, main, new_model, read_corpus, size_for, train_all, train_one
from xlstm_metal.train.train import lm_loss
from xlstm_metal.train.trainer import Log, TrainConfig, Trainer, TrainingStep, make_model

SMALL = {name: size_for(name, 6e4) for name in architectures}
TINY = dict(batch=3, length=24)


@pytest.fixture(scope="module")
def stream(tmp_path_factory):
    "A file of ids as the bundled model is made from; 50 ids, some more likely behind others."
    rng, folder = np.random.default_rng(0), tmp_path_factory.mktemp("stream")
    def text(n): return [0, *(1 + np.cumsum(rng.integers(0, 3, n)) % 49)]
    parts = {part: np.array(sum((text(rng.integers(5, 90)) for _ in range(n)), []) + [0], np.uint16) for part, n in (("train", 60), ("test", 6))}
    np.savez(folder / "ids.npz", **parts)
    (folder / "corpus.json").write_text(json.dumps({part: 2 * len(a) for part, a in parts.items()}))
    return folder / "ids.npz"


def without_times(line):
    return {k: v for k, v in line.items() if k not in ("seconds", "tokens_per_second", "memory", "curve")} | dict(curve=[[n, nats] for n, _, nats in line["curve"]])


# A step that is not compiled

@pytest.fixture
def no_compiler(monkeypatch):
    def refuse(*args, **kwargs): raise AssertionError("something is compiled")
    monkeypatch.setattr(mx, "compile", refuse)


def settings(**kw):
    return TrainConfig(data="", out="", dims=16, blocks=1, heads=2, length=12, batch=2, steps=4, dtype="float32", **kw)


def test_a_step_is_compiled_unless_that_is_switched_off(no_compiler):
    rows = Batch(np.arange(26).reshape(2, 13), np.arange(13)[None] == np.zeros((2, 1)), np.ones((2, 13), bool))
    for accumulate in (1, 2):
        off = settings(compile=False, accumulate=accumulate)
        step = TrainingStep(make_model(off, 30), off)
        before = step.model.lm_head.weight
        step([rows] * accumulate, 1)
        assert mx.abs(step.model.lm_head.weight - before).max() > 1e-6
        with pytest.raises(AssertionError, match="something is compiled"): TrainingStep(make_model(off, 30), settings(accumulate=accumulate))


def test_a_compiler_runs_only_when_asked(stream, no_compiler, monkeypatch):
    corpus = read_corpus(stream)
    for where, compile, fine in (("cuda", None, True), ("cuda", True, False), (None, None, True), ("metal", None, False), ("metal", False, True)):
        monkeypatch.setattr(scaling, "backend", lambda: where)
        if fine: assert train_one(corpus, SMALL["transformer"], 150, compile=compile, **TINY)["step"] == 2
        else:
            with pytest.raises(AssertionError, match="something is compiled"): train_one(corpus, SMALL["transformer"], 150, compile=compile, **TINY)


# All alike

def test_it_is_the_training_of_the_trainer(tmp_path, monkeypatch):
    "The same model, text and settings give the same losses in a run of `Trainer`."
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "texts").mkdir()
    for j in range(20): (tmp_path / "texts" / f"{j}.txt").write_text(" ".join(random.Random(j).choices(["a", "bee", "sea", "dee"], k=60)))
    size = Size("xlstm-7b", 0, 32, 2, 128, 0)
    steps, lr = 12, scaling.rate_for(32)
    config = TrainConfig(data=str(tmp_path / "texts"), out=str(tmp_path / "run"), vocab_size=270, dims=32, blocks=2, heads=4, steps=steps, lr=lr, warmup=1,
                         log_every=1, dtype="float32", **TINY)
    trainer = Trainer(config)
    trainer.run()
    data, V = trainer.data, trainer.model.args.vocab_size
    line = train_one(Corpus(data.train, data.test, V, "texts"), size, steps * 72, **TINY)
    want = [(s["tokens"], s["loss"]) for s in trainer.log.read() if "loss" in s]
    assert [n for n, _, _ in line["curve"]] == [n for n, _ in want] and len(want) == steps
    assert np.allclose([nats for _, _, nats in line["curve"]], [loss for _, loss in want], atol=2e-4)
    assert line["curve"][0][2] > line["curve"][-1][2] + .2


@pytest.mark.parametrize("name", architectures)
def test_texts_in_a_row_know_nothing_of_each_other(name):
    model, ids = new_model(SMALL[name], 50), mx.array(np.random.default_rng(1).integers(1, 50, (1, 40)))
    model.apply(lambda a: a + .05 * mx.random.normal(a.shape)) # so that all that begins with zeros counts
    cuts = [0, 9, 23]
    reset = mx.array([[t in cuts for t in range(40)]])
    alone = sum(lm_loss(model, ids[:, a:b]) * (b - a - 1) for a, b in zip(cuts, (9, 23, 40))) / 37
    assert abs(lm_loss(model, ids, reset=reset) - alone).item() < 1e-5
    assert abs(lm_loss(model, ids) - alone).item() > 1e-4 # without resets it is another loss


@pytest.mark.parametrize("name", architectures)
def test_every_parameter_learns(name):
    model, ids = new_model(SMALL[name], 50).train(), mx.array(np.random.default_rng(1).integers(1, 50, (2, 40)))
    model.apply(lambda a: a + .05 * mx.random.normal(a.shape))
    grads = nn.value_and_grad(model, lambda m: lm_loss(m, ids))(model)[1]
    assert [n for n, g in tree_flatten(grads) if not mx.abs(g).max() > 0] == []


def test_sizes_grow_alike():
    for target in (1e5, 5e5, 2e6, 8e6, 3e7, 1e8):
        found = {name: size_for(name, target) for name in architectures}
        for name, s in found.items():
            total = sum(w.size for n, w in tree_flatten(xm.Model(s.config(10)).parameters())) - 20 * s.width
            assert total == s.parameters and abs(total / target - 1) <= .03, s
            kinds = [b.kind for b in s.config(10).blocks]
            assert len(kinds) == s.depth and len(set(kinds)) == (2 if name == "xlstm-7:1" else 1)
        assert abs(found["xlstm-7b"].width / found["transformer"].width - 1) < .2


def test_all_read_the_same_rows(stream, monkeypatch):
    corpus, seen = read_corpus(stream), {}
    class Noted(TrainingStep):
        def __call__(self, batches, number): seen.setdefault(self.config.lr, []).append(batches[0].ids.tobytes()); super().__call__(batches, number)
    monkeypatch.setattr(scaling, "TrainingStep", Noted)
    for factor in (1., .5): train_one(corpus, SMALL["mlstm"], 400, factor, **TINY)
    a, b = seen.values()
    assert a == b and len(set(a)) == 5


# What is left behind

def test_a_mamba_checkpoint(tmp_path):
    model = new_model(SMALL["mamba-2"], 50)
    again, _ = xm.load(save(model, tmp_path / "model"), mx.float32)
    ids = mx.array([[1, 2, 3, 4, 5]])
    assert mx.array_equal(again(ids), model(ids)) and again.layers[0].kind == "mamba2"
    gate = xm.load(tmp_path / "model", mx.bfloat16)[0].layers[0].mixer
    assert (gate.fgate.A_log.dtype, gate.in_proj.weight.dtype) == (mx.float32, mx.bfloat16)


def test_killed_and_begun_again(stream, tmp_path):
    command = [sys.executable, "-m", "xlstm_metal.train.scaling", str(stream), "--sizes", "6e4", "--architectures", "transformer", "mamba-2", "xlstm-7b",
               "--tokens", "800", "--batch", "3", "--length", "24", "--check", "0", "--out"]
    env = os.environ | {"MLX_DISABLE_COMPILE": "1", "OPENBLAS_NUM_THREADS": "1"}
    whole = subprocess.run([*command, str(tmp_path / "whole")], env=env, capture_output=True, text=True)
    assert whole.returncode == 0 and whole.stdout.count("bits per byte held out") == 3, whole.stderr
    out = tmp_path / "killed"
    process = subprocess.Popen([*command, str(out)], env=env, stdout=subprocess.DEVNULL)
    while not (out.exists() and out.stat().st_size): time.sleep(.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    n = len(out.read_bytes().splitlines())
    with open(out, "a") as f: f.write('{"step": 11, "archi')
    again = subprocess.run([*command, str(out)], env=env, capture_output=True, text=True)
    assert again.returncode == 0 and again.stdout.count("bits per byte held out") == 3 - n < 3, again.stderr
    assert [*map(without_times, Log(out).read())] == [*map(without_times, Log(tmp_path / "whole").read())]


def test_one_failure_is_told_and_the_others_go_on(stream, tmp_path, monkeypatch, capsys):
    def small(corpus, size, *args, **kw):
        if size.architecture == "mlstm": raise RuntimeError("[malloc] Unable to allocate 99 bytes.")
        return train_one(corpus, size, *args, **kw)
    monkeypatch.setattr(scaling, "train_one", small)
    args = [str(stream), "--out", str(tmp_path / "out"), *"--sizes 6e4 --architectures mlstm transformer --tokens 200 --batch 3 --length 24 --check 0".split()]
    assert main(args) == 1
    assert "mLSTM stack          " in (said := capsys.readouterr().out) and "Unable to allocate 99 bytes" in said
    assert [line["architecture"] for line in Log(tmp_path / "out").read()] == ["transformer"]


@pytest.mark.parametrize("args, why", [
    (["none"], "none is not a token dataset"), (["none.npz"], "cannot be read"), (["{}", "--tokens", "100"], "100 tokens are less than two steps of 64 rows of 512"),
    (["{}", "--sizes", "10", "--tokens", "1e6"], "has 10 parameters within 3%"), (["{}", "--architectures", "lstm"], "invalid choice: 'lstm'")])
def test_mistakes_are_one_sentence(args, why, stream, tmp_path, capsys):
    with pytest.raises(SystemExit) as e: main([a.format(stream) for a in args] + ["--out", str(tmp_path / "out")])
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert e.value.code == 2 and why in error and not (tmp_path / "out").exists()


def test_a_broken_stream_is_named(tmp_path, stream):
    (tmp_path / "ids.npz").write_bytes(stream.read_bytes()[:200])
    (tmp_path / "corpus.json").write_text("{}")
    with pytest.raises(DataError, match="ids.npz cannot be read"): read_corpus(tmp_path / "ids.npz")
    (tmp_path / "ids.npz").write_bytes(stream.read_bytes())
    with pytest.raises(DataError, match="has no 'train'"): read_corpus(tmp_path / "ids.npz")
