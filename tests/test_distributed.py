"""Two local processes on a ring of sockets compute and learn what one does."""
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


@pytest.fixture(scope="module")
def two(tmp_path_factory): return launch(tmp_path_factory.mktemp("two"), 2, "forward", "backward", "batches")


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
