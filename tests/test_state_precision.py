"States in fewer bits: against float64, in files that plain safetensors reads, through checkpoints, named states, batches and the server."
import json

import mlx.core as mx
import numpy as np
import pytest
from test_states_server import Served
from safetensors.numpy import load_file, save_file
from mlx_lm.generate import batch_generate, generate_step

import xlstm_metal as xm
from xlstm_metal.apps.cli import main
from xlstm_metal.blocks import discovery # noqa: F401 registers the kinds of blocks
from xlstm_metal.generation import state_files
from xlstm_metal.generation.checkpoints import Checkpoints, Store, state_bytes
from xlstm_metal.generation.compiled_step import step_choices
from xlstm_metal.generation.named_states import NamedStates, NoRoom
from xlstm_metal.generation.state import State, batch, unbatch
from xlstm_metal.generation.state_files import StateError, read_arrays, read_notes, write_arrays
from xlstm_metal.generation.state_precision import Variant, state_drift
from xlstm_metal.wiring.precision import LowPrecisionCache, from_int4, from_int8, to_int4, to_int8
from xlstm_metal.wiring.run import BlockStack, layer_wiring
from xlstm_metal.wiring.wiring import Neuron, xLSTMWiring


@pytest.fixture(scope="module")
def small():
    mx.random.seed(0)
    w = xLSTMWiring([Neuron("mlstm", 0, 64, dict(num_heads=2)), Neuron("mlstm", 1, 64, dict(inner_dims=128, num_heads=2)), Neuron("slstm", 2, 64), Neuron("mamba2", 3, 64)])
    w.add_synapse(0, 2, 1, delay=1)
    model = xm.Model(w, 50).eval()
    mx.eval(model.parameters())
    return model


def rounded64(x): # in float64: q, scale, kept error, what is given back
    n = x.shape[-1]
    g = x.astype(np.float64).reshape(*x.shape[:-1], -1, 64 if n % 64 == 0 else n)
    s = np.abs(g).max(-1, keepdims=True) / 127
    unit = np.where(s == 0, 1, s)
    q = np.rint(g / unit)
    e = np.rint(14 * (g - q * s) / unit)
    return q.reshape(x.shape), s[..., 0], e.reshape(x.shape), (q * s + e * s / 14).reshape(x.shape)


@pytest.mark.parametrize("shape", [(2, 3, 128), (1, 64), (4, 7), (5, 1), (2, 2, 3, 192)])
@pytest.mark.parametrize("scale", [1e-20, 1., 1e20])
def test_rounding_is_that_of_float64(shape, scale):
    x = (np.random.default_rng(0).standard_t(2, shape) * scale).astype(np.float32)
    x.reshape(-1)[:shape[-1]] *= shape[0] > 1 # a group of zeros
    q, s = to_int8(mx.array(x))
    want_q, want_s, want_e, want = rounded64(x)
    assert np.allclose(s, want_s, rtol=1e-6) and (np.array(q) != want_q).mean() < .01 and np.abs(np.array(q) - want_q).max() <= 1
    whole = np.array(from_int8(q, s) + from_int4(to_int4(mx.array(x), q, s), s, shape[-1]))
    assert (np.abs(whole - x) <= np.repeat(want_s, x.size // want_s.size).reshape(shape) / 28 * 1.01).all()
    assert np.abs(whole - want).max() <= want_s.max() / 14 * 1.01


def test_a_running_cell_is_that_of_float64(small):
    "Feedback over many tokens: the recurrence of an mLSTM in float64 whose C is rounded by hand after each token."
    net, x = small.layers[0], mx.random.normal((1, 60, 64))
    stack, seen = BlockStack([net]), []
    cache = stack.make_cache(precision="int8")
    q, k, v, i, f = (np.array(a, np.float64)[0] for a in net.mlstm_layer.inputs(net.norm_mlstm(x)))
    C, n, m = np.zeros((2, 16, 32)), np.zeros((2, 16)), np.zeros((2, 1))
    for t in range(60):
        stack(x[:, t:t + 1], cache)
        log_f = -np.log1p(np.exp(-f[:, t:t + 1]))
        new = np.maximum(log_f + m, i[:, t:t + 1])
        F, I, m = np.exp(log_f + m - new), np.exp(i[:, t:t + 1] - new), new
        C = rounded64(F[..., None] * C + (I * k[:, t])[..., None] * v[:, t, None])[3]
        n = F * n + I * k[:, t]
        seen.append(np.abs(np.array(cache[0].arrays[0])[0] - C).max() / np.abs(C).max())
    assert np.median(seen) < 2e-4 and max(seen) < 2 / 127 / 14 * 2, seen # a tie that falls the other way is a step of 1 / 127 / 14
    assert np.allclose(np.array(cache[0].arrays[1])[0], n, rtol=1e-4, atol=1e-5)


def test_what_stays_float32(small):
    state = State(small).read([1, 2, 3])
    low = state.astype("int8")
    for j, slot in enumerate(low.cache):
        kinds = "".join("8" if a.dtype == mx.int8 else "f" for a in slot.cache[:slot.own])
        assert kinds == ("8fff", "8ff8", "88ff8", "88")[j], (j, kinds) # C, n, m, inputs or what a delay needs; y, c, n, m, inputs; matrices, inputs
        assert all(mx.array_equal(a, b) for a, b, k in zip(slot.cache, state.cache[j].cache, kinds) if k == "f")
    assert [[a.dtype for a in s.cache] for s in low.astype("float32").cache] == [[a.dtype for a in s.cache] for s in state.cache]


@pytest.mark.parametrize("precision, most", [("bfloat16", 2**-8), ("int8", 1 / 254)])
def test_plain_safetensors_reads_the_file(small, tmp_path, precision, most):
    state = State(small).read([1, 2, 3, 4])
    state.save(tmp_path / "s", precision)
    notes = read_notes(tmp_path / "s")
    assert (notes["precision"], notes["version"]) == (precision, "3")
    if precision == "int8":
        held = load_file(tmp_path / "s")
        C = held["0.0"] * np.repeat(held["0.0.scale"], held["0.0"].shape[-1], -1)
    else: # which NumPy does not know
        raw = (tmp_path / "s").read_bytes()
        n = int.from_bytes(raw[:8], "little")
        about = json.loads(raw[8:8 + n])["0.0"]
        assert about["dtype"] == "BF16"
        C = (np.frombuffer(raw[8 + n:][slice(*about["data_offsets"])], "<u2").astype(np.uint32) << 16).view(np.float32).reshape(about["shape"])
    want = np.array(state.cache[0][0])
    assert 0 < np.abs(C - want).max() <= most * np.abs(want).max() * 1.01
    back = State.load(tmp_path / "s", small)
    assert back.precision == "float32" and np.array_equal(np.array(back.cache[0][0]), C.astype(np.float32)) and mx.array_equal(back.logits, state.logits)
    state.save(tmp_path / "plain")
    assert read_notes(tmp_path / "plain")["version"] == "2" and "precision" not in read_notes(tmp_path / "plain") # as it was before there were precisions
    assert (tmp_path / "s").stat().st_size < .75 * (tmp_path / "plain").stat().st_size


def test_older_readers_refuse(small, tmp_path, monkeypatch):
    State(small).read([1]).save(tmp_path / "s", "bfloat16")
    monkeypatch.setattr(state_files, "_versions", ("2",))
    with pytest.raises(StateError, match="has version 3 of the format; this package reads versions 2"): State.load(tmp_path / "s", small)


@pytest.mark.parametrize("change, says", [
    (lambda a, n: a.pop("0.0.scale"), r"array 0.0.scale should be \(1, 2, 16, 1\) float32, and is missing"),
    (lambda a, n: a.update({"0.0": a["0.0"][..., :16]}), "another layout"),
    (lambda a, n: a.update({"0.0": a["0.0"].astype(mx.float32)}), "array 0.0 should be .* int8, and is .* float32"),
    (lambda a, n: a.update({"9.9.scale": a["0.0.scale"]}), "no array that 9.9.scale belongs to"),
    (lambda a, n: n.update(precision="int3"), "precision must be one of float32, bfloat16, int8, not 'int3'")])
def test_files_that_do_not_fit_are_refused(small, tmp_path, change, says):
    State(small).read([1, 2]).save(tmp_path / "s", "int8")
    arrays, notes = read_arrays(tmp_path / "s")
    change(arrays, notes)
    write_arrays(tmp_path / "s", arrays, notes)
    with pytest.raises(StateError, match=says): State.load(tmp_path / "s", small)


def test_a_bit_that_flips_is_noticed(small, tmp_path):
    State(small).read([1, 2]).save(tmp_path / "s", "int8")
    good = (tmp_path / "s").read_bytes()
    rng = np.random.default_rng(0)
    for at in rng.integers(0, len(good), 40):
        bad = bytearray(good)
        bad[at] ^= 1 << int(rng.integers(8))
        (tmp_path / "s").write_bytes(bad)
        with pytest.raises(StateError): State.load(tmp_path / "s", small)


def test_more_of_them_in_a_budget(small, tmp_path):
    ids = np.random.default_rng(0).integers(0, 50, 400).tolist()
    size, kept = state_bytes(small) + 200, {}
    assert state_bytes(small, "int8") < .5 * state_bytes(small)
    for precision in "float32", "int8":
        c = Checkpoints(small, tmp_path / precision, 4 * size, 5 * size, every=32, precision=precision)
        state = c.read(ids)
        kept[precision] = len(c.store.states), len(c.store.files.tokens)
        assert c.store.nbytes == sum(s.nbytes for s in c.store.states.values()) <= 4 * size
        again = Checkpoints(small, tmp_path / precision, every=32, precision=precision).find(ids + [1], 1)
        assert again.tokens == 400 and again.precision == "float32" and mx.array_equal(again.logits, state.logits)
    assert kept["int8"][0] > 2 * kept["float32"][0] and kept["int8"][1] > 1.5 * kept["float32"][1]


def test_a_checkpoint_is_the_same_in_memory_and_in_its_file(small, tmp_path):
    store = Store(small, tmp_path, precision="int8")
    store.put("a", State(small).read([1, 2, 3]))
    first = store.get("a")
    store.flush()
    later = Store(small, tmp_path, precision="int8").get("a")
    for a, b in zip(first.cache, later.cache): assert all(mx.allclose(x, y, rtol=1e-6, atol=0) for x, y in zip(a.cache, b.cache, strict=True))
    assert all(mx.array_equal(x, y) for a, b in zip(store.states["a"].cache, store.get("a").astype("int8").cache) for x, y in zip(a.cache, b.cache) if x.dtype == mx.int8)


def test_named_states(small, tmp_path):
    plain, named = NamedStates(small, tmp_path / "plain"), NamedStates(small, tmp_path / "low", precision="int8")
    for states in plain, named: states.create("a", [1, 2, 3])
    assert named.info("a").bytes < .75 * plain.info("a").bytes and named.least < plain.least
    assert mx.abs(named.get("a").read([4]).logits - plain.get("a").read([4]).logits).max() < .05
    assert mx.array_equal(named.get("a").cache[0][0], NamedStates(small, tmp_path / "low").get("a").cache[0][0]) # whoever reads it
    limit = 2 * named.info("a").bytes + 1000
    NamedStates(small, tmp_path / "low", max_bytes=limit, precision="int8").create("b", [1])
    with pytest.raises(NoRoom): NamedStates(small, tmp_path / "low", max_bytes=limit, precision="float32").create("c", [1])
    with pytest.raises(StateError, match="precision must be one of"): NamedStates(small, tmp_path / "low", precision="int7")


def test_running_states_batch_and_part(small):
    texts = [1, 2, 3], [4, 5, 6, 7]
    states = [State(small).astype("int8", feedback=True).read(t) for t in texts]
    both = batch(states)
    both.read([[8, 9]] * 2)
    assert both.precision == "int8" and both.nbytes == sum(s.nbytes for s in states)
    for one, t in zip(unbatch(both), texts):
        assert mx.abs(one.logits - State(small).astype("int8", feedback=True).read(t + [8, 9]).logits).max() < .02
        assert mx.abs(one.read([3]).logits - State(small).read(t + [8, 9, 3]).logits).max() < .02 < mx.abs(one.logits - State(small).read([3]).logits).max()
    with pytest.raises(StateError, match="different precision"): batch([states[0], State(small).read([1])])
    with pytest.raises(StateError, match="different precision"): batch([states[0], State(small).astype("int8").read([1])])


def test_mlx_lm_generates_with_it():
    model, tokenizer = xm.load(dtype=mx.float32)
    prompts = [tokenizer.encode(t) for t in ("import os\n", "class Stack:\n    def push(self, x):")]
    def texts(**how): return batch_generate(model, tokenizer, prompts, max_tokens=10, prompt_caches=[model.make_cache(**how) for _ in prompts]).texts
    assert texts(precision="int8") == texts(precision="bfloat16") == texts()
    tokens = [[t for t, _ in generate_step(mx.array(prompts[1]), model, max_tokens=10, prompt_cache=model.make_cache(**how))] for how in ({}, {"precision": "int8"})]
    assert tokens[0] == tokens[1]


def test_feedback_is_what_keeps_it_near(small):
    ids = np.random.default_rng(1).integers(0, 50, 130).tolist()
    found = state_drift(small, ids, {"without": Variant("int8"), "with": Variant("int8", True)}, [30, 120])
    for j in range(2): assert found["with"][j].state < .3 * found["without"][j].state and found["with"][j].logits < .5 * found["without"][j].logits


def test_attention_keeps_its_keys():
    mx.random.seed(0)
    hybrid = xm.Model(layer_wiring(["mlstm", "full_attention"], 32), 50).eval()
    state = State(hybrid).read([1, 2, 3])
    low = state.astype("int8")
    assert isinstance(low.cache[0], LowPrecisionCache) and all(mx.array_equal(a, b) for a, b in zip(low.cache[1].cache, state.cache[1].cache))
    both = batch([low, State(hybrid).read([5]).astype("int8")])
    assert [s.tokens for s in unbatch(both)] == [3, 1] and unbatch(both)[1].nbytes < unbatch(both)[0].nbytes


def test_the_server_holds_them_so(original, tmp_path):
    "Named states and checkpoints in 8 bits answer as those in float32; and after a restart."
    server = Served("--model", original, "--state-folder", tmp_path, "--state-precision", "int8")
    text, prompt = "class Stack:\n    def push(self, x):\n        self.items.append(x)\n", "\n    def pop(self):"
    server.create("book", text)
    first = server.ask(prompt, "book")
    assert server.names()["book"]["bytes"] < 300_000
    server.stop()
    assert read_notes(tmp_path / "book.state")["precision"] == "int8" and {read_notes(f)["precision"] for f in (tmp_path / "checkpoints").glob("*.state")} <= {"int8"}
    model, tokenizer = xm.load(original)
    assert xm.generate(model, tokenizer, prompt, state=State(model).prefill(text, tokenizer, None), max_tokens=12).strip() == first.choices[0].text.strip()
    server = Served("--model", original, "--state-folder", tmp_path)
    assert server.ask(prompt, "book").choices[0].text == first.choices[0].text
    assert "Traceback" not in server.stop()


def test_the_server_knows_which(original, capsys):
    assert main(["mlx", "server", "--model", str(original), "--state-precision", "int9"]) == 2
    assert "invalid choice: 'int9'" in capsys.readouterr().err


def test_the_command_line_keeps_them_so(original, tmp_path, capsys):
    def say(*words):
        assert main([*map(str, words)]) == 0, capsys.readouterr().err
        return capsys.readouterr().out
    for precision in "float32", "int8":
        say("generate", "--model", original, "-p", "import os\n", "--max-tokens", 0, "--save-state", tmp_path / precision, "--state-precision", precision)
        say("state", "create", precision, "--model", original, "--folder", tmp_path / "named", "--text", "import os\n", "--state-precision", precision)
    assert (tmp_path / "int8").stat().st_size < .35 * (tmp_path / "float32").stat().st_size and read_notes(tmp_path / "named" / "int8.state")["precision"] == "int8"
    want = say("generate", "--model", original, "--load-state", tmp_path / "float32", "-p", "def walk(", "--max-tokens", 8)
    assert say("generate", "--model", original, "--load-state", tmp_path / "int8", "-p", "def walk(", "--max-tokens", 8) == want
    say("state", "ask", "int8", "--model", original, "--folder", tmp_path / "named", "-p", "def walk(", "--max-tokens", 4, "--save-as", "later", "--state-precision", "bfloat16")
    assert read_notes(tmp_path / "named" / "later.state")["precision"] == "bfloat16"


def test_a_compiled_step_leaves_it_alone(small):
    "It is made for the arrays of a float32 cache."
    with step_choices(small, "compiled"):
        low, plain = State(small).astype("int8", feedback=True).read([1, 2]), State(small).read([1, 2])
        for t in range(9):
            for s in low, plain: s.feed(mx.array([t]))
        assert low.precision == "int8" and mx.abs(low.logits - plain.logits).max() < .03
