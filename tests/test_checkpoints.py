"Checkpoints: whatever was read, evicted, killed or damaged in between, a text goes on as if it had been read from its beginning."
import json
import os
import random
import subprocess
import sys
import time

import mlx.core as mx
import numpy as np
import pytest

from xlstm_metal.generation.checkpoints import Checkpoints, Origin, Store, StateFiles, common_prefix, places
from xlstm_metal.generation.state import State
from xlstm_metal.generation.state_files import StateError
from xlstm_metal.model.checkpoint import load
from xlstm_metal.model.model import Model
from xlstm_metal.wiring.run import layer_wiring


@pytest.fixture(scope="module")
def model(): return load(dtype=mx.float32)[0]


@pytest.fixture(scope="module")
def small():
    "One that takes no time, with attention, so that its states grow."
    mx.random.seed(0)
    small = Model(layer_wiring(["mlstm", "full_attention", "conv"], 32), 50).eval()
    mx.eval(small.parameters())
    return small


def branching(rng, n, vocab_size, length=40):
    "Texts that begin alike, here and there."
    texts = [rng.integers(0, vocab_size, length).tolist()]
    while len(texts) < n:
        old = texts[rng.integers(len(texts))]
        texts.append(old[:len(old) if rng.random() < .5 else rng.integers(len(old) + 1)] + rng.integers(0, vocab_size, rng.integers(1, length)).tolist())
    return texts


def test_the_longest_beginning_is_found(small):
    "Against a list of all texts that were kept."
    rng, kept = np.random.default_rng(0), {}
    checkpoints = Checkpoints(small)
    for text in branching(rng, 200, 50):
        origin = [Origin(), Origin("a", 3), Origin("b", 3)][rng.integers(3)]
        for leave in (0, 1, 5):
            found = checkpoints.find(text, leave, origin)
            want = max((len(k) for start, k in kept if start == origin and text[:len(k)] == list(k) and len(k) <= len(text) - leave), default=0)
            assert (found.tokens - origin.tokens if found else 0) == want
            if found: assert found.last == kept[origin, tuple(text[:want])]
        if not text: continue
        state = State(small)
        state.counts, state.logits, state.last = [origin.tokens + len(text)], mx.zeros((1, 50)), len(kept)
        checkpoints.keep(text, state, origin=origin)
        kept[origin, tuple(text)] = len(kept)
    assert len(kept) > 150


@pytest.mark.parametrize("on_disk", [False, True])
def test_reading_from_checkpoints_is_reading(small, on_disk, tmp_path):
    "With budgets so small that most checkpoints are lost again."
    rng, reused = np.random.default_rng(1), 0
    size = State(small).read([1] * 60).nbytes
    checkpoints = Checkpoints(small, tmp_path if on_disk else None, 3 * size, 5 * size, every=16)
    for text in branching(rng, 40, 50, 80):
        progress = []
        state = checkpoints.read(text, progress=progress.append)
        reused += len(text) - sum(b - a for a, b in zip([0, *progress], progress)) if progress else len(text)
        cold = State(small).read(text)
        assert state.counts == cold.counts and mx.allclose(state.logits, cold.logits, atol=1e-4)
        assert checkpoints.store.nbytes <= 3 * size
        if on_disk: assert sum(f.stat().st_size for f in tmp_path.iterdir()) <= 5 * size and list(tmp_path.glob("*.state"))


def test_use_decides_what_gives_way(small):
    "Against a list in order of use."
    rng, order = random.Random(0), []
    state = State(small).read([1, 2, 3])
    store = Store(small, max_bytes=5 * state.nbytes)
    for _ in range(300):
        key = rng.choice("abcdefghij")
        if rng.random() < .5:
            store.put(key, state)
            order = ([k for k in order if k != key] + [key])[-5:]
        else:
            assert (store.get(key) is not None) == (key in order)
            if key in order: order = [k for k in order if k != key] + [key]
        assert list(store.states) == order and store.nbytes == len(order) * state.nbytes
    store.shrink(2 * state.nbytes)
    assert list(store.states) == order[-2:]


def test_a_state_in_the_store_is_a_value(small):
    store = Store(small)
    state = State(small).read([1, 2, 3])
    want = state.logits
    store.put("a", state)
    state.read([4, 5])
    store.get("a").read([6])
    assert mx.array_equal(store.get("a").logits, want) and store.get("a").tokens == 3


WRITER = """
import sys, numpy as np
from xlstm_metal.generation.checkpoints import Checkpoints
from xlstm_metal.model.checkpoint import load
checkpoints = Checkpoints(load(dtype="float32")[0], sys.argv[1], every=32)
rng = np.random.default_rng(int(sys.argv[2]))
print("ready", flush=True)
while True: checkpoints.read([0] * 40 + rng.integers(2, 4096, 90).tolist())
"""


def test_killed_while_writing(model, tmp_path):
    "Two processes that write into one folder, killed at any moment: every file is whole, and worth what it says."
    for round_ in range(4):
        writers = [subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path), str(2 * round_ + n)], stdout=subprocess.PIPE, text=True) for n in range(2)]
        for w in writers: assert w.stdout.readline() == "ready\n"
        end = time.monotonic() + 60 # by the clock of a busy machine too few would be there
        while len([*tmp_path.glob("*.state")]) <= 4 * (round_ + 1) and time.monotonic() < end: time.sleep(.01)
        time.sleep(.17 * round_)
        for w in writers: w.kill(), w.wait()
    files = StateFiles(model, tmp_path)
    assert len(files.tokens) > 8 and not files.damaged
    for key in list(files.tokens): assert files.load(key).tokens == files.tokens[key]
    checkpoints = Checkpoints(model, tmp_path)
    assert checkpoints.find([0] * 40 + [5] * 40).tokens == 32
    parts = [tmp_path / ".0123.safetensors", tmp_path / ".4567.safetensors"]
    for p in parts: p.write_bytes(b"half")
    os.utime(parts[0], (0, 0))
    StateFiles(model, tmp_path)
    assert [p.exists() for p in parts] == [False, True] # an old one is nobody's


def test_what_cannot_be_written_stays_in_memory(model, tmp_path, caplog):
    checkpoints = Checkpoints(model, tmp_path / "a")
    (tmp_path / "a").rename(tmp_path / "b")
    checkpoints.read(list(range(2, 60)))
    assert "cannot be written" in caplog.text and checkpoints.find(list(range(2, 61)), 1).tokens == 58
    with pytest.raises(StateError, match="cannot be used for states"): Checkpoints(model, os.devnull + "/x")


def test_files_of_others_stay(model, small, tmp_path, caplog):
    (tmp_path / "note.state").write_text("Dear diary")
    Checkpoints(small, tmp_path).read([1] * 20)
    mine = Checkpoints(model, tmp_path)
    assert mine.find([1] * 30) is None and not caplog.text and len(list(tmp_path.iterdir())) == 2


def test_places_of_a_long_text_are_few_and_shared():
    long, longer = places(10**6), places(10**6 + 1000)
    assert len(long) < 40
    shared = {p for p, kind in long.items() if kind == "every"} & set(longer)
    assert len(shared) > 10
    assert common_prefix(np.array([1, 2, 3]), np.array([1, 2])) == 2 and common_prefix(np.array([1]), np.array([2])) == 0


def test_many_prompts_are_looked_up_quickly(small):
    checkpoints = Checkpoints(small, max_bytes=10**12)
    state = State(small).read([1])
    for n in range(2, 2000):
        state.counts = [n]
        checkpoints.keep([n] * n, state)
    ids = [7] * 100_000
    start = time.perf_counter()
    checkpoints.find(ids)
    assert time.perf_counter() - start < .5
    assert json.dumps(checkpoints.notes)
