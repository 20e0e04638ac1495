"""Two local processes on a ring of sockets compute and learn what one does."""
import json
import socket
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import pytest

import distributed

HERE = Path(__file__).parent
pytestmark = pytest.mark.skipif(not mx.distributed.is_available("ring"), reason="this build of MLX has no ring of sockets")


def launch(folder, n, *parts):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1] % 20000 + 20000
    done = subprocess.run([str(Path(sys.executable).parent / "mlx.launch"), "-n", str(n), "--backend", "ring", "--starting-port", str(port), "--",
                           sys.executable, str(HERE / "distributed.py"), str(folder), *parts], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0 and "exited with" not in done.stderr + done.stdout, done.stderr + done.stdout
    return {part: [mx.load(str(folder / f"{part}-{r}.safetensors")) for r in range(n)] for part in parts}


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("two")
    distributed.write_texts(made / "texts")
    return made


@pytest.fixture(scope="module")
def two(folder): return launch(folder, 2, "forward", "backward", "batches", "trainer")


def close(a, b, bound):
    assert a.shape == b.shape and (mx.linalg.norm((a - b).flatten()) <= bound * mx.linalg.norm(b.flatten()) + 1e-9).item()


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch):
    with mx.stream(mx.cpu): yield


def test_two_shares_of_a_model_answer_as_one(two):
    alone, both = distributed.forward(None), two["forward"]
    for r in both:
        for name in ("logits None", "logits 4"): close(r[name], alone[name], 1e-4)
        assert bytes(r["text"].tolist()) == bytes(alone["text"].tolist())


def test_three_shares_of_four_heads(tmp_path):
    alone, all_of_them = distributed.forward(None), launch(tmp_path, 3, "forward")["forward"]
    for r in all_of_them: close(r["logits None"], alone["logits None"], 1e-4)


def test_gradients_of_shares_are_those_of_the_whole(two):
    alone, both = distributed.backward(None), two["backward"]
    for name, whole in alone.items():
        parts = [r[name] for r in both]
        if parts[0].shape == whole.shape: # what every process has
            for p in parts: close(p, whole, 1e-3)
            continue
        axis = next(j for j, (a, b) in enumerate(zip(parts[0].shape, whole.shape)) if a != b)
        close(mx.concatenate(parts, axis), whole, 1e-3)
    assert sum(r.shape != both[0][n].shape for n, r in alone.items()) > 20 # the shares really are shares


def test_two_processes_train_as_one(two):
    alone, both = distributed.batches(None), two["batches"]
    for r in both:
        close(r["losses"], alone["losses"], 1e-4)
        for name, w in alone.items():
            if name != "losses": close(r[name], w, 2e-3)
    for name in alone: assert mx.array_equal(both[0][name], both[1][name]), name


def test_a_trainer_on_two_processes_is_one_run(two, folder, tmp_path):
    "Rows of a batch in two processes, five of them, and again after a checkpoint."
    distributed.write_texts(tmp_path / "texts")
    alone, both = distributed.trainer(None, tmp_path), two["trainer"]
    def log(out): return [json.loads(line) for line in (out / "run" / "log.jsonl").read_text().splitlines()]
    for a, b in zip(log(tmp_path), log(folder), strict=True):
        for key in ("loss", "gradient_norm", "bits_per_byte", "tokens"): assert a.get(key, 0) == pytest.approx(b.get(key, 0), rel=1e-4), (key, a, b)
    for name, w in alone.items():
        if name != "files":
            for r in both: close(r[name], w, 2e-3)
            assert mx.array_equal(both[0][name], both[1][name]), name
    assert [r["files"].item() for r in both] == [2, 0] # the second process wrote nothing
    assert {f.name for f in (folder / "run").iterdir()} == {f.name for f in (tmp_path / "run").iterdir()}


def test_what_cannot_be_divided_is_refused(tmp_path):
    from xlstm_metal.train.trainer import TrainConfig, TrainError, TrainingStep, make_model

    class Three:
        def size(self): return 3
        def rank(self): return 0
    config = TrainConfig(data="x", out="y", dims=32, blocks=1, heads=2, batch=2, dtype="float32")
    with pytest.raises(TrainError, match="a batch of 2 rows cannot be divided among 3 machines"): TrainingStep(make_model(config, 300), config, Three())
    with pytest.raises(TrainError, match="carry keeps the states of all rows"):
        TrainingStep(make_model(config, 300), TrainConfig(**vars(config) | dict(batch=3, carry=True)), Three())
