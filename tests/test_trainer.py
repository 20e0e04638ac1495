"The training loop: what it computes, and what becomes of a run that is killed, whose disk is full, whose numbers are none."
import errno
import json
import math
import os
import random
import signal
import subprocess
import sys
import time
import warnings
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

import xlstm_metal as xm
from xlstm_metal.apps.cli import main
from xlstm_metal.model.config import xLSTMConfig
from xlstm_metal.model.model import Model
from xlstm_metal.train import trainer as module
from xlstm_metal.train.datasets import Batch
from xlstm_metal.train.train import init_weights, lm_loss
from xlstm_metal.train.trainer import Log, TrainConfig, Trainer, TrainError, TrainingStep, checkpoints, damage, in_dtype, make_model

KILLS = int(os.environ.get("XLSTM_METAL_KILLS", 8))
ENV = os.environ | {"MLX_DISABLE_COMPILE": "1", "OPENBLAS_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    "Token datasets of these tests go with them."
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        ENV["XDG_CACHE_HOME"] = os.environ["XDG_CACHE_HOME"]
        yield


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    for j in range(24):
        words = random.Random(j).choices(["def", "class", "return", "import", "self", "(x):", "\n    ", " = 0\n", "été", "for i in"], k=300)
        (folder / f"{j}.py").write_text(" ".join(words))
    return folder


@pytest.fixture
def small(texts, tmp_path):
    return TrainConfig(data=str(texts), out=str(tmp_path / "run"), vocab_size=280, dims=32, blocks=1, heads=2, length=24, batch=3, steps=12, warmup=2, lr=5e-3,
                       log_every=1, evaluate_every=4, evaluate_tokens=200, save_every=3, keep=2, sample_every=6, dtype="float32")


def curve(out):
    "A log without what depends on the machine."
    return [{k: v for k, v in line.items() if k not in ("tokens_per_second", "memory")} for line in Log(Path(out) / "log.jsonl").read()]


def quietly(config, *steps):
    trainer = Trainer(config)
    trainer.run(*steps)
    return trainer


def rows(seed=0, n=6, length=24):
    rng = np.random.default_rng(seed)
    mask = np.arange(length + 1)[None] < rng.integers(4, length + 2, (n, 1))
    return Batch(rng.integers(0, 280, (n, length + 1)).astype(np.int32), np.arange(length + 1)[None] == np.zeros((n, 1)), mask)


# What a step computes

def test_steps_are_those_of_adamw_in_float64(small):
    "Loss, clipping, moments, bias correction, decay of matrices and the schedule, against NumPy."
    config = replace(small, max_norm=.05, weight_decay=.3, betas=[.8, .9])
    model, other = make_model(config, 280), make_model(config, 280)
    step, rates = TrainingStep(model, config), [2.5e-3, 5e-3, 5e-4 + 4.5e-3 * (1 + math.cos(math.pi / 10)) / 2] # two steps of warm-up, ten of a cosine
    want = {n: np.array(w, np.float64) for n, w in tree_flatten(other.parameters())}
    (m, v), nats = ({n: np.zeros_like(w) for n, w in want.items()} for _ in range(2)), 0.
    for t in (1, 2, 3):
        b = rows(t)
        other.load_weights([(n, mx.array(w.astype(np.float32))) for n, w in want.items()])
        loss, g = nn.value_and_grad(other, lambda ids, mask: lm_loss(other, ids, mask))(mx.array(b.ids), mx.array(b.mask))
        g = {n: np.array(a, np.float64) for n, a in tree_flatten(g)}
        norm, lr = math.sqrt(sum((a**2).sum() for a in g.values())), rates[t - 1]
        assert norm > .05
        nats += loss.item() * b.mask[:, 1:].sum()
        step([b], t)
        assert abs(step.tally["nats"].item() - nats) < 1e-4 * nats
        assert abs(step.tally["norm"].item() - norm) < 1e-4 * norm
        for n, a in g.items():
            a = a * .05 / (norm + 1e-6)
            m[n], v[n] = .8 * m[n] + .2 * a, .9 * v[n] + .1 * a**2
            want[n] = want[n] * (1 - lr * .3 * (want[n].ndim > 1)) - lr * m[n] / (1 - .8**t) / (np.sqrt(v[n] / (1 - .9**t)) + 1e-8)
        have = dict(tree_flatten(model.parameters()))
        for n, w in want.items(): assert np.allclose(np.array(have[n]), w, rtol=1e-4, atol=2e-5), (t, n)


@pytest.mark.parametrize("parts", [2, 3, 6])
def test_accumulated_batches_are_one_large_batch(small, parts):
    "Also with masks of unequal counts, in one of which nothing counts."
    b = rows()
    b.mask[-1] = False
    done = {}
    for n in (1, parts):
        step = TrainingStep(make_model(small, 280), small)
        step([Batch(*x) for x in zip(*(np.split(a, n) for a in b))], 1)
        done[n] = module._arrays(step)
    assert done[1]["tally.tokens"].item() == b.mask[:, 1:].sum()
    for name, a in done[1].items():
        scale = mx.abs(a).max().item() if a.dtype == mx.float32 else 0
        assert mx.allclose(a, done[parts][name], rtol=1e-3, atol=1e-5 + 1e-4 * scale), name


def test_weights_and_moments_are_float32_under_products_of_16_bits(small):
    config = replace(small, dtype="bfloat16", lr=1e-5, weight_decay=0.)
    step = TrainingStep(model := make_model(config, 280), config)
    before = dict(tree_flatten(model.parameters()))
    with in_dtype(model, mx.bfloat16): assert model.hidden(mx.zeros((1, 4), mx.int32)).dtype == mx.bfloat16
    for t in range(3): step([rows(t)], t + 1)
    arrays = module._arrays(step)
    assert {a.dtype for n, a in arrays.items() if n.startswith(("weights", "optimizer")) and not n.endswith("step")} == {mx.float32}
    moved = [mx.abs(w - before[n]).max().item() for n, w in tree_flatten(model.parameters())]
    assert all(0 < x < 1e-4 for x in moved) # much less than bfloat16 could note
    exact = TrainingStep(make_model(config, 280), replace(config, dtype="float32"))
    for t in range(3): exact([rows(t)], t + 1)
    assert abs(exact.tally["nats"].item() / step.tally["nats"].item() - 1) < .01 and exact.tally["nats"].item() != step.tally["nats"].item()


def test_carried_states_are_those_of_one_long_row(small):
    "Rows go on: with a rate of nearly 0, the losses of two halves are those of the whole."
    config = replace(small, carry=True, lr=1e-12, min_lr=0., weight_decay=0.)
    b = rows(length=48)
    b.mask[:] = True
    whole, halves = (TrainingStep(make_model(config, 280), replace(config, batch=6)) for _ in range(2))
    whole([b], 1)
    cut = Batch(*(a[:, 24:] for a in b))
    cut.reset[:] = False
    halves([Batch(*(a[:, :25] for a in b))], 1)
    first = halves.tally["nats"].item()
    halves([cut], 2)
    assert abs(halves.tally["nats"].item() - whole.tally["nats"].item()) < 1e-3 * whole.tally["nats"].item()
    alone = TrainingStep(make_model(config, 280), replace(config, carry=False, batch=6))
    alone([cut], 1)
    assert abs(first + alone.tally["nats"].item() - whole.tally["nats"].item()) > 1e-4 * first # a state matters


@pytest.mark.parametrize("carry", [False, True])
def test_texts_in_a_row_do_not_know_of_each_other(small, carry):
    "Two texts in one row are two rows, whatever was read before; their first tokens do not count."
    config = replace(small, carry=carry, batch=4, lr=1e-12, min_lr=0., weight_decay=0.)
    b, before = rows(1, n=4), rows(2, n=4)
    b.mask[:], b.reset[:, 12] = True, True

    def read(*batches): # nats, tokens
        step = TrainingStep(make_model(config, 280), config)
        for n, batch in enumerate(batches): step([batch], n + 1)
        return np.array([step.tally[k].item() for k in ("nats", "tokens")])
    parts = sum(read(Batch(*(a[:, at] for a in b))) for at in (slice(12), slice(12, None)))
    assert parts[1] == 4 * 23
    for found in (read(b), read(before, b) - read(before)): assert np.allclose(found, parts, rtol=1e-5)
    b.reset[:, 12] = False
    assert not np.allclose(read(b)[0] * 23 / 24, parts[0], rtol=1e-3)


def test_carry_needs_states_of_a_fixed_size(small):
    with pytest.raises(TrainError, match="carry.*attention"): Trainer(replace(small, carry=True, layer_types=["mlstm", "full_attention"]))


# Kill and go on

@pytest.mark.parametrize("how", [{}, {"accumulate": 2, "carry": True}, {"dtype": "bfloat16", "schedule": "wsd"}, {"layer_types": ["slstm", "mlstm"], "recompute": True}, {"drops": True}],
                         ids=lambda how: "-".join(how) or "usual")
def test_a_run_in_parts_is_the_run_in_one(small, tmp_path, how):
    "The same log to the last digit, and the same weights."
    how = dict(how)
    if how.pop("drops", False):
        xm.save(init_weights(Model(xLSTMConfig.from_dict(vocab_size=280, hidden_size=32, num_hidden_layers=1, num_heads=2))), tmp_path / "drops")
        settings = json.loads((tmp_path / "drops/config.json").read_text())
        how |= {"model": str(tmp_path / "drops"), "tokenizer": "train"}
        assert settings["vocab_size"] == 280
    config = replace(small, **how)
    one = replace(config, out=str(tmp_path / "one"))
    def drop(trainer): # random numbers at each step
        if "model" in how: trainer.model.embedding_dropout = nn.Dropout(.3)
        return trainer
    whole = drop(Trainer(one))
    whole.run()
    for n in (2, 5, 1, None):
        mx.random.seed(n or 7) # of others in this process
        part = drop(Trainer(config))
        part.run(n)
    assert part.done == 12 and curve(part.out) == curve(whole.out)
    for (name, a), (_, b) in zip(tree_flatten(part.model.parameters()), tree_flatten(whole.model.parameters()), strict=True): assert mx.array_equal(a, b), name
    assert (part.out / "best").read_text() == (whole.out / "best").read_text()


def test_a_compiled_run_is_the_plain_one_and_goes_on(small):
    "What is recorded once takes the arrays of a checkpoint, of both kinds of step."
    config = replace(small, evaluate_every=0, sample_every=0, save_every=5)
    want = curve(quietly(replace(config, out=small.out + "-plain")).out)
    mx.enable_compile()
    try:
        for n in (3, 4, None): trainer = quietly(config, n)
        split = [quietly(replace(config, accumulate=2, steps=4, out=f"{small.out}-{n}"), n) for n in (4, 2)]
        split[1] = quietly(split[1].config)
    finally: mx.disable_compile()
    for a, b in zip(curve(trainer.out), want, strict=True): assert all(abs(a[k] - b[k]) < 1e-4 * (1 + abs(b[k])) for k in b), (a, b)
    assert curve(split[0].out) == curve(split[1].out)


CODE = "import json, sys; from xlstm_metal.train.trainer import *; Trainer(TrainConfig(**json.loads(sys.argv[1]))).run()"


def start(config, **kw):
    settings = json.dumps({k: v for k, v in vars(config).items() if v is not None})
    return subprocess.Popen([sys.executable, "-c", "from xlstm_metal.blas import use_openblas; use_openblas(); " + CODE, settings], env=ENV, stderr=subprocess.PIPE, text=True, **kw)


def test_killed_at_any_moment(small, tmp_path):
    "SIGKILL, again and again: whoever goes on writes the log of a run that nobody stopped."
    seed = int(os.environ.get("XLSTM_METAL_SEED", time.time()))
    print("seed", seed)
    rng, left, n = random.Random(seed), KILLS, 0
    config = replace(small, steps=40, save_every=3, evaluate_every=10, sample_every=20)
    process = start(replace(config, out=str(tmp_path / "whole")))
    assert process.wait() == 0, process.stderr.read()
    want = curve(tmp_path / "whole")
    while left:
        out = tmp_path / f"killed{n}"
        log, n = out / "log.jsonl", n + 1
        while left:
            process = start(replace(config, out=str(out)))
            def size(): return log.stat().st_size if log.exists() else 0
            steps, begin = rng.choice(["early", 0, 1, 2, 3, 5]), size()
            if steps == "early": time.sleep(rng.uniform(.3, 2)) # perhaps before there is a tokenizer
            else:
                while process.poll() is None and not size() or size() - begin < steps * 150 and process.poll() is None: time.sleep(.002)
                time.sleep(rng.uniform(0, .08))
            if process.poll() is not None: break
            process.kill()
            process.wait()
            left -= 1
        if process.poll() != 0:
            process = start(replace(config, out=str(out)))
            assert process.wait() == 0, process.stderr.read()
        assert curve(out) == want, f"seed {seed}"
        assert all(damage(f) is None for f in checkpoints(out)) and not [*out.glob("*.partial")]


def test_ctrl_c_saves_and_says_how_to_go_on(small, tmp_path):
    config = tmp_path / "c.toml"
    config.write_text(f'data = "{small.data[0]}"\nout = "{small.out}"\nvocab_size = 280\ndims = 32\nblocks = 1\nheads = 2\nlength = 24\nbatch = 3\nsteps = 100000\nwarmup = 2\n')
    process = subprocess.Popen([sys.executable, "-m", "xlstm_metal", "train", str(config)], env=ENV, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while not Log(Path(small.out) / "log.jsonl").read(): time.sleep(.05)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "stopped after step" in err.splitlines()[-1] and f"xlstm-metal train {small.out} goes on" in err.splitlines()[-1], err
    [last] = checkpoints(Path(small.out))[-1:]
    assert damage(last) is None and Trainer.resume(small.out).done == int(last.name[5:])


# What goes wrong

def test_a_damaged_checkpoint_is_skipped(small):
    want = curve(quietly(small).out)
    for break_it in (lambda f: os.truncate(f, f.stat().st_size // 2), lambda f: f.write_bytes(f.read_bytes()[:-1] + b"?"), lambda f: f.unlink()):
        newest = checkpoints(Path(small.out))[-1]
        break_it(newest / "training.safetensors")
        with pytest.warns(UserWarning) as said: trainer = Trainer(small)
        [sentence] = [str(w.message) for w in said]
        assert newest.name in sentence and f"step-{trainer.done:06d}" in sentence and trainer.done < 12
        trainer.run()
        assert curve(small.out) == want and damage(newest) is None
    for folder in checkpoints(Path(small.out)): (folder / "training.json").write_text("{")
    with pytest.raises(TrainError, match="no older checkpoint"): Trainer(small)


def test_a_full_disk_stops_nothing(small, monkeypatch):
    "Lines of the log wait, a save is tried again later, earlier checkpoints are as they were."
    want = curve(quietly(replace(small, out=small.out + "-whole")).out)
    trainer = quietly(small, 3)
    before = {f: f.read_bytes() for f in checkpoints(trainer.out)[0].rglob("*") if f.is_file()}
    def full(*args, **kw): raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with monkeypatch.context() as patch, pytest.warns(UserWarning, match="No space left on device") as said:
        patch.setattr(module.mx, "save_safetensors", full)
        patch.setattr(module.os, "fsync", full)
        with pytest.raises(TrainError, match="make room"): trainer.run(4)
    assert {f: f.read_bytes() for f in before} == before and [f.name for f in trainer.out.glob("step*")] == ["step-000003"]
    assert len([w for w in said if "step-000006" in str(w.message)]) == 1
    trainer.run()
    assert curve(small.out) == want


@pytest.mark.skipif(os.getuid() != 0 or sys.platform != "linux", reason="mounts a small file system")
def test_a_real_full_disk(small, tmp_path):
    (disk := tmp_path / "disk").mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", disk], capture_output=True).returncode: pytest.skip("mount is not allowed")
    try:
        trainer = quietly(replace(small, out=str(disk / "run"), save_every=0, evaluate_every=0), 3)
        ballast = disk / "ballast"
        with open(ballast, "wb", buffering=0) as f, pytest.raises(OSError):
            while True: f.write(bytes(1024))
        with pytest.warns(UserWarning, match="could not be written"), pytest.raises(TrainError): trainer.run(3)
        assert [f.name for f in checkpoints(trainer.out)] == ["step-000003"] and damage(checkpoints(trainer.out)[0]) is None
        ballast.unlink()
        trainer.run()
        assert [line["step"] for line in Log(trainer.out / "log.jsonl").read() if "loss" in line] == [*range(1, 13)]
        assert Trainer.resume(trainer.out).done == 12
    finally: subprocess.run(["umount", "-l", disk])


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_loss_that_is_no_number_stops_the_run(small, accumulate):
    "Noted at the first bad step, told at the next line of the log; the last good checkpoint stays."
    trainer = quietly(replace(small, log_every=6, save_every=0, evaluate_every=0, sample_every=0, accumulate=accumulate), 3)
    trainer.model.backbone.out_norm.weight = trainer.model.backbone.out_norm.weight * math.nan
    with pytest.raises(TrainError, match=r"step 4 \(batch 3 of" if accumulate == 1 else r"step 4 \(batches 6 to 7 of"): trainer.run()
    assert [f.name for f in checkpoints(trainer.out)] == ["step-000003"] and trainer.done == 6
    with pytest.raises(TrainError, match="not a finite number"): trainer.save()
    assert all(damage(f) is None for f in checkpoints(trainer.out))
    resumed = Trainer.resume(trainer.out)
    assert resumed.done == 3
    resumed.run()


def test_an_enormous_rate_is_noted(small):
    with pytest.raises(TrainError, match="not a finite number") as e: quietly(replace(small, lr=1e38, warmup=0, log_every=5, save_every=0, sample_every=0, evaluate_every=0))
    assert "there is no checkpoint yet" in str(e.value) and not checkpoints(Path(small.out))


@pytest.mark.parametrize("key, value", [("length", 30), ("seed", 1), ("dims", 64), ("vocab_size", 300), ("batch", 2), ("carry", True), ("dtype", "bfloat16"), ("data", None)])
def test_a_change_of_what_must_not_change_is_refused_by_name(small, tmp_path, key, value):
    quietly(small, 3)
    if key == "data": (tmp_path / "other.txt").write_text("other words " * 900)
    with pytest.raises(TrainError, match=f"^{key}"): Trainer(replace(small, **{key: value or str(tmp_path / "other.txt")}))
    assert Trainer(replace(small, steps=20, lr=1e-3, log_every=2, keep=5)).done == 3


def test_settings_are_refused_by_name_and_place(small, tmp_path, capsys, monkeypatch):
    file = tmp_path / "c.toml"
    for text, words in {"lenght = 3": ["c.toml", "lenght", "length"], "steps = 1.5": ["steps", "int", "1.5"], "steps = ": ["c.toml", "not TOML"], "x.y = 1": ["'x'"],
                        "steps = 3": ["c.toml", "data"], "schedule = 'x'": ["wsd"], "log_to = ['wandb']\ndata = 'x'\nout = 'y'": ["wandb", "pip install"],
                        "data = 'nowhere'\nout = 'out'": ["nowhere"], f"data = '{small.data[0]}'\nout = '{file}/x'": ["out", "cannot be made"],
                        f"data = '{small.data[0]}'\nout = '{tmp_path}/o'\ntokenizer='nowhere'": ["tokenizer", "nowhere"],
                        f"data = '{small.data[0]}'\nout = '{tmp_path}/o'\nbatch = 100000": ["batch", "tokens"], f"data = '{small.data[0]}'\nout = '{tmp_path}/o'\nheads = 3": ["num_heads"]}.items():
        file.write_text(text)
        monkeypatch.chdir(tmp_path)
        code = main(["train", str(file)])
        err = capsys.readouterr().err
        assert code == 2 and err.count("\n") == 1 and all(w in err for w in words), err
    assert not (tmp_path / "out").exists() or not any((tmp_path / "out").iterdir())


def test_one_process_at_a_time(small):
    trainer = Trainer(small)
    with module._alone(trainer.out), pytest.raises(TrainError, match="another process"): trainer.run()
    trainer.run(1)


# What comes out

def test_a_checkpoint_is_a_model(small):
    trainer = quietly(replace(small, dtype="bfloat16", sample_prompt="def "))
    for folder in [f / "model" for f in checkpoints(trainer.out)]:
        model, tokenizer = xm.load(folder, "bfloat16")
        stored = mx.load(str(folder / "model.safetensors"))
        assert {str(a.dtype)[9:] for n, a in stored.items() if "igate" not in n and "fgate" not in n} == {"bfloat16"}
        assert xm.generate(model, tokenizer, "def ", max_tokens=4) is not None
    want = dict(tree_flatten(model.parameters()))
    for n, w in tree_flatten(trainer.model.parameters()): assert mx.array_equal(w.astype(want[n].dtype), want[n]), n
    from mlx_lm import load
    theirs, words = load(str(folder))
    ids = mx.array([tokenizer.encode("def f(x)")])
    assert mx.array_equal(theirs(ids), model(ids)) and words.decode(words.encode("été", add_special_tokens=False)) == "été"
    best = min((line for line in curve(trainer.out) if "bits_per_byte" in line), key=lambda line: line["bits_per_byte"])
    assert (trainer.out / "best").read_text().strip() == f"step-{best['step']:06d}" and (trainer.out / (trainer.out / "best").read_text().strip()).is_dir()
    assert [line["sample"][:4] for line in curve(trainer.out) if "sample" in line] == ["def ", "def "]


def test_the_best_is_kept(small, monkeypatch):
    values = iter([3., 1., 2., 2.5, 2.6, 2.7])
    monkeypatch.setattr(Trainer, "evaluate", lambda self: module.Evaluation(next(values), 1., 1))
    trainer = quietly(replace(small, evaluate_every=2, save_every=1, keep=1))
    assert [f.name for f in checkpoints(trainer.out)] == ["step-000004", "step-000012"] and (trainer.out / "best").read_text() == "step-000004\n"


def test_fine_tuning_keeps_the_models_own_words(small, tmp_path):
    first = quietly(small)
    model, tokenizer = xm.load(folder := checkpoints(first.out)[-1] / "model", "float32")
    second = Trainer(replace(small, model=str(folder), out=str(tmp_path / "second"), steps=3))
    assert second.tokenizer.get_vocab() == tokenizer.get_vocab() and second.data.bos == first.data.bos == 0
    for (n, a), (_, b) in zip(tree_flatten(second.model.parameters()), tree_flatten(model.parameters()), strict=True): assert mx.array_equal(a, b), n
    second.run()
    assert [line["loss"] for line in curve(second.out) if "loss" in line][-1] < [line["loss"] for line in curve(first.out) if "loss" in line][0] - .5


def test_a_folder_of_text_is_enough(texts, tmp_path):
    began = time.perf_counter()
    r = subprocess.run([sys.executable, "-m", "xlstm_metal", "train", str(texts), "--set", "steps=40", "--set", "batch=4", "--device", "cpu"], env=ENV, cwd=tmp_path, capture_output=True, text=True)
    assert r.returncode == 0 and time.perf_counter() - began < 60, r.stderr
    out = f"{texts.name}-model"
    for words in (f"xlstm-metal generate --model {out}/step-000040/model", f"xlstm-metal train {out} --set steps=80", "parameters in float32"): assert words in r.stdout
    losses = [line["loss"] for line in curve(tmp_path / out) if "loss" in line]
    assert losses[-1] < losses[0] - .5 and "bits per byte" in r.stderr
    again = subprocess.run([sys.executable, "-m", "xlstm_metal", "train", out, "--set", "steps=42"], env=ENV, cwd=tmp_path, capture_output=True, text=True)
    assert again.returncode == 0 and "step 40 of 42" in again.stdout and [line["step"] for line in curve(tmp_path / out) if "loss" in line] == [10, 20, 30, 40, 42]


@pytest.fixture(scope="module")
def base(texts, tmp_path_factory):
    "A model to fine-tune, and the same one with 4 bits."
    folder = tmp_path_factory.mktemp("base")
    Trainer(TrainConfig(data=str(texts), out=str(folder / "run"), vocab_size=280, dims=64, blocks=2, heads=2, length=24, batch=3, steps=3, log_every=1, evaluate_every=0, dtype="float32")).run()
    whole = checkpoints(folder / "run")[-1] / "model"
    xm.convert(whole, folder / "packed", to="mlx", quantize=4)
    return whole, folder / "packed"


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_adapters_learn_as_in_a_loop_of_mlx_lms_parts(kind, base, small):
    "Five steps beside adapters, AdamW and clipping that were put together by hand, on the same batches; the checkpoint is read by mlx-lm."
    from mlx_lm.tuner.utils import linear_to_lora_layers, load_adapters
    config = replace(small, model=str(base[0]), fine_tune=kind, adapter_rank=4, adapter_scale=10., steps=5, weight_decay=0.05, save_every=5)
    trainer = Trainer(config)
    taken, before = [], {n: np.array(w) for n, w in tree_flatten(xm.load(base[0])[0].parameters())}
    trainer.batches = _Noted(trainer.batches, taken)
    trainer.run()
    model = xm.load(base[0], mx.float32)[0]
    model.freeze()
    mx.random.seed(config.seed)
    linear_to_lora_layers(model, 2, dict(rank=4, scale=10., dropout=0.), use_dora=kind == "dora")
    weights = dict(tree_flatten(model.trainable_parameters()))
    m, v = ({n: np.zeros(w.shape) for n, w in weights.items()} for _ in range(2))
    for t, b in enumerate(taken[:5]):
        lr = trainer.step.schedule(mx.array(t)).item()
        g = nn.value_and_grad(model, lambda model: lm_loss(model, *map(mx.array, (b.ids, b.mask)), reset=mx.array(b.reset)))(model)[1]
        g = {n: np.array(a, np.float64) for n, a in tree_flatten(g)}
        norm = math.sqrt(sum((a * a).sum() for a in g.values()))
        for n, a in g.items():
            a = a * min(1, config.max_norm / norm)
            m[n], v[n] = .9 * m[n] + .1 * a, .95 * v[n] + .05 * a * a
            w = np.array(weights[n], np.float64) * (1 - lr * config.weight_decay * (a.ndim > 1))
            weights[n] = mx.array((w - lr * m[n] / (1 - .9 ** (t + 1)) / (np.sqrt(v[n] / (1 - .95 ** (t + 1))) + 1e-8)).astype(np.float32))
        model.load_weights([*weights.items()], strict=False)
    ours = dict(tree_flatten(trainer.model.trainable_parameters()))
    assert ours.keys() == weights.keys() and any("lora_b" in n and np.abs(np.array(w)).max() > 1e-4 for n, w in ours.items())
    for n, w in weights.items(): assert np.abs(np.array(w) - np.array(ours[n])).max() < 2e-5, n
    for n, w in tree_flatten(xm.load(base[0])[0].parameters()): assert np.array_equal(before[n], w), n
    ids = mx.array([[0, 5, 9, 20]])
    folder = checkpoints(Path(small.out))[-1] / "adapters"
    assert mx.allclose(load_adapters(xm.load(base[0], mx.float32)[0], folder)(ids), trainer.model.eval()(ids), atol=1e-5)
    assert not (folder.parent / "model").exists() and str(folder) in trainer.advice()


class _Noted:
    "Batches, and which they were."
    def __init__(self, batches, taken): self.batches, self.taken = batches, taken
    @property
    def position(self): return self.batches.position
    def __iter__(self): return self
    def __next__(self):
        self.taken.append(next(self.batches))
        return self.taken[-1]


def test_adapters_go_on_from_a_checkpoint(base, small, tmp_path, monkeypatch):
    "Adapters beside 4 bits: in two sittings and another folder as in one, then read by the command line; the model beside them stays as it is."
    monkeypatch.chdir(base[1].parent)
    config = replace(small, model="packed", fine_tune="lora", out=str(tmp_path / "two"))
    kept = (base[1] / "model.safetensors").read_bytes()
    Trainer(config).run(steps=5)
    monkeypatch.chdir(tmp_path)
    Trainer.resume("two").run()
    Trainer(replace(config, model=str(base[1]), out=str(tmp_path / "one"))).run()
    assert curve(tmp_path / "one") == curve(tmp_path / "two") and len(curve(tmp_path / "one")) > 12
    a, b = (mx.load(str(checkpoints(tmp_path / o)[-1] / "adapters/adapters.safetensors")) for o in ("one", "two"))
    assert a.keys() == b.keys() and all(mx.array_equal(a[n], b[n]) for n in a)
    assert (base[1] / "model.safetensors").read_bytes() == kept
    with pytest.raises(TrainError, match="adapter_rank is 3"): Trainer.resume("two", adapter_rank=3)


def test_adapters_need_a_model(small):
    with pytest.raises(TrainError, match="fine_tune is 'lora'.* model must say which"): replace(small, fine_tune="lora")
    with pytest.raises(TrainError, match="fine_tune must be one of full, lora, dora"): replace(small, fine_tune="qlora")
    with pytest.raises(TrainError, match="adapter_rank must be at least 1"): replace(small, adapter_rank=0)
