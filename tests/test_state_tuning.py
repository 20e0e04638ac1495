"A learned initial state: its gradients, what stays as it was, LoRA and 4 bits beside it, and the state as a file, a name, a server's."
import subprocess
import sys

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from test_states_server import Served

import xlstm_metal as xm
from xlstm_metal.blocks import discovery # noqa: F401 registers the kinds of blocks
from xlstm_metal.generation.named_states import NamedStates
from xlstm_metal.generation.state import State
from xlstm_metal.generation.state_files import StateError, fingerprint
from xlstm_metal.model.config import xLSTMConfig
from xlstm_metal.train.datasets import Batch
from xlstm_metal.train.state_tuning import one_text, StateTuning, VirtualTokens
from xlstm_metal.train.train import add_adapters, fit, init_weights, lm_loss, make_optimizer
from xlstm_metal.train.trainer import evaluate
from xlstm_metal.wiring.run import layer_wiring


def stack(kinds=("mlstm", "slstm"), **kwargs):
    mx.random.seed(0)
    model = init_weights(xm.Model(layer_wiring(list(kinds), 32, kwargs), 40)).eval()
    for b in model.layers:
        if b.kind == "slstm": b.xlstm.slstm_cell.recurrent_kernel = .3 * mx.random.normal(b.xlstm.slstm_cell.recurrent_kernel.shape) # zero in a new one, where the output is forgotten
    return model


def ids_of(*shape, seed=0): return mx.array(np.random.default_rng(seed).integers(0, 40, shape))


def cell64(q, k, v, i, f, C, n, m): # one head in float64, C, n, m before the first token; returns h
    hs = []
    for t in range(len(q)):
        log_f = -np.log1p(np.exp(-f[t]))
        new = max(log_f + m, i[t])
        F, I, m = np.exp(log_f + m - new), np.exp(i[t] - new), new
        C, n = F * C + I * np.outer(k[t], v[t]), F * n + I * k[t]
        u = q[t] * len(q[t])**-.5
        hs.append(u @ C / (max(abs(u @ n), np.exp(-m)) + 1e-6))
    return np.array(hs)


def test_gradients_of_virtual_tokens_are_those_of_float64():
    "Of the read-out of some tokens, by central differences of a loop; k, v and w of two heads."
    r = np.random.default_rng(0)
    k, v, w = r.normal(size=(2, 3, 8)), r.normal(size=(2, 3, 4)), r.normal(size=(2, 3)) - 1
    given = [r.normal(size=(2, 5, n)) for n in (8, 8, 4)] + [r.normal(size=(2, 5)) - 1, r.normal(size=(2, 5)) + 2]
    aim = r.normal(size=(2, 5, 4))
    def state64(k, v, w):
        m = w.max(-1)
        I = np.exp(w - m[:, None])
        return np.einsum("hr,hrk,hrv->hkv", I, k, v), np.einsum("hr,hrk->hk", I, k), m
    def loss64(*x):
        C, n, m = state64(*x)
        return sum((cell64(*(a[h] for a in given), C[h], n[h], m[h]) * aim[h]).sum() for h in range(2))
    cell = xm.blocks.mlstm.mLSTMCell(chunk_size=16)
    def loss(tokens):
        h, _ = cell(*(mx.array(a[None].astype(np.float32)) for a in given), tuple(a[None] for a in tokens()))
        return (h[0] * mx.array(aim.astype(np.float32))).sum()
    tokens = VirtualTokens(*(mx.array(a.astype(np.float32)) for a in (k, v, w)))
    value, grads = nn.value_and_grad(tokens, loss)(tokens)
    assert abs(value.item() - loss64(k, v, w)) < 1e-3
    x = dict(k=k, v=v, w=w)
    for name, a in x.items():
        want = np.zeros_like(a)
        for at in np.ndindex(a.shape):
            shift = np.zeros_like(a)
            shift[at] = 1e-5
            want[at] = (loss64(*(x | {name: a + shift}).values()) - loss64(*(x | {name: a - shift}).values())) / 2e-5
        assert np.abs(np.array(grads[name]) - want).max() < 1e-3 * np.abs(want).max(), name


@pytest.mark.parametrize("kinds, kwargs", [(("mlstm", "slstm"), {}), (("slstm",), {}), (("mlstm",), dict(mlstm=dict(inner_dims=64, num_heads=2))), (("conv", "mamba2", "mlstm"), {})])
def test_it_begins_as_the_tokens_it_was_given(kinds, kwargs):
    model = stack(kinds, **kwargs)
    tuned, begin, more = StateTuning(model, [5, 6, 7]), mx.array([[5, 6, 7]]), ids_of(3, 9)
    want = model(mx.concatenate([mx.repeat(begin, 3, 0), more], 1))[:, 3:]
    assert mx.abs(tuned(more) - want).max() < 1e-4 * mx.abs(want).max() + 1e-5
    for row in range(3): assert mx.abs(tuned.to_state().forward(more[row:row + 1]) - want[row]).max() < 1e-3


@pytest.mark.parametrize("recompute", [False, True])
def test_only_the_state_learns(recompute):
    model = stack(("mlstm", "slstm", "mlstm"))
    before, tuned = dict(tree_flatten(model.parameters())), StateTuning(model, [1, 2, 3, 4])
    started = tuned.initial_parameters()
    losses = fit(tuned, [ids_of(4, 20)] * 25, make_optimizer(25, 3e-2, 3, weight_decay=0.), 25, every=5, report=None, recompute=recompute)
    assert losses[-1] < losses[0] - .1
    for n, a in tree_flatten(model.parameters()): assert mx.array_equal(a, before[n]), n
    assert all(not mx.array_equal(a, started[n]) for n, a in tuned.initial_parameters().items())
    assert len(started) == 3 + 3 + 3 + 1 # of the sLSTM the inputs of its convolution, too


def test_what_it_learned_is_in_the_state():
    "The model that reads on from the saved state, and the one that was trained, say the same; another text does worse."
    model = stack()
    tuned = StateTuning(model, [1, 2])
    fit(tuned, [ids_of(4, 20)] * 30, make_optimizer(30, 3e-2, 3, weight_decay=0.), 30, report=None)
    logits = tuned.to_state().forward(ids_of(4, 20)[:1])
    assert mx.abs(logits - tuned(ids_of(4, 20)[:1])).max() < 1e-4
    own, other = (lm_loss(tuned, ids_of(4, 20, seed=s)).item() for s in (0, 1))
    assert own < lm_loss(model, ids_of(4, 20)).item() and own < other


def test_rates_that_are_far_too_high_leave_a_state():
    "Whatever the numbers become, it is one that could have been read: finite, weights of at most one, means between -1 and 1."
    model = stack(("mlstm", "slstm"))
    tuned = StateTuning(model, [1, 2, 3])
    fit(tuned, [ids_of(2, 12)] * 12, make_optimizer(12, 3., 1, weight_decay=0.), 12, report=None)
    mlstm, slstm = (slot.cache for slot in tuned.to_state().cache)
    k, v = tuned.initial[0][0].k, tuned.initial[0][0].v
    assert all(mx.isfinite(a).all() for a in (*mlstm, *slstm)) and mx.isfinite(tuned(ids_of(2, 12))).all()
    assert (mx.abs(mlstm[1][0]) <= mx.abs(k).sum(1) + 1e-4).all()
    assert (mx.abs(mlstm[0][0]) <= mx.abs(k).swapaxes(1, 2) @ mx.abs(v) + 1e-3).all()
    assert (mx.abs(slstm[0]) <= 1).all() and (mx.abs(slstm[1] / slstm[2]) <= 1 + 1e-5).all()


def test_adapters_and_four_bits():
    "LoRA on packed weights and a state learn together; the file belongs to the model with these adapters."
    model = init_weights(xm.Model(xLSTMConfig.from_dict(vocab_size=40, hidden_size=64, num_hidden_layers=2, num_heads=2))).eval()
    nn.quantize(model, group_size=32, bits=4, class_predicate=model.quant_predicate)
    weights = {n: a for n, a in tree_flatten(model.parameters()) if a.dtype == mx.uint32}
    alone = StateTuning(model, [1, 2])
    losses = fit(alone, [ids_of(4, 16)] * 10, make_optimizer(10, 3e-2, 1, weight_decay=0.), 10, every=5, report=None)
    assert losses[-1] < losses[0]
    both = StateTuning(add_adapters(model), [1, 2], freeze=False)
    names = {n.split(".")[-1] for n, _ in tree_flatten(both.trainable_parameters())}
    assert names == {"lora_a", "lora_b", "k", "v", "w"}
    old = {n: a for n, a in tree_flatten(both.trainable_parameters())}
    fit(both, [ids_of(4, 16)] * 6, make_optimizer(6, 1e-2, 1), 6, report=None)
    assert all(not mx.array_equal(a, old[n]) for n, a in tree_flatten(both.trainable_parameters()))
    now = dict(tree_flatten(model.parameters()))
    assert sum(mx.array_equal(a, b) for a in weights.values() for b in now.values() if a.shape == b.shape and b.dtype == mx.uint32) >= len(weights)
    assert fingerprint(both.to_state().model) == fingerprint(model) != fingerprint(stack())


def test_rows_end_where_another_text_begins():
    ids, mask = np.arange(24).reshape(3, 8), np.ones((3, 8), bool)
    reset = np.zeros((3, 8), bool)
    reset[:, 0], reset[0, 5], reset[1, 1], mask[2, 6:] = True, True, True, False
    batch, = one_text([Batch(ids, reset, mask)])
    assert batch.mask.sum(1).tolist() == [5, 1, 6] and not batch.reset.any() and reset.any()
    tuned = StateTuning(stack(), [1, 2])
    a, b = (lm_loss(tuned, mx.array(ids % 40), mx.array(batch.mask), reset=r) for r in (mx.array(batch.reset), mx.array(reset & (np.arange(8) == 0))))
    assert b.item() != 0 and abs(a - b).item() < 1e-6 # a mark in front of a row does not take the state away
    assert abs(lm_loss(tuned, mx.array(ids[:1, :5])) * 4 + lm_loss(tuned, mx.array(ids[2:, :6])) * 5 - a * 9).item() < 1e-4


def test_evaluation_begins_each_document_with_it():
    model, docs = stack(), [(np.array(ids_of(7, seed=s)), 7) for s in range(3)]
    tuned = StateTuning(model, [3, 4])
    got = evaluate(tuned, docs, 21, length=4, bos=0)
    nats = sum(lm_loss(tuned, mx.array(d[None])).item() * 6 for d, _ in docs)
    assert abs(got.bits_per_byte - nats / np.log(2) / 21) < 1e-4


def test_what_cannot_be():
    for kinds, ids, says in ((("mlstm",), [], "one token at least"), (("mlstm",), [99], "outside the vocabulary"), (("full_attention",), [1], "no initial state to learn")):
        model = stack(kinds)
        with pytest.raises(StateError, match=says): StateTuning(model, ids)
        assert model.backbone.observer is None


def test_the_state_is_one_like_others(original, tmp_path):
    "Saved, loaded by the command line, named, forked, in 8 bits, and by a server: always what Python writes from it."
    model, tokenizer = xm.load(original)
    tuned = StateTuning(model, tokenizer.encode("def test_one(self):\n    self.assert"))
    for parts in tuned.initial: parts[0].v = -4 * parts[0].v
    state, prompt = tuned.to_state(), "class Test"
    state.save(tmp_path / "tuned.state")
    want = xm.generate(model, tokenizer, prompt, state=tuned.to_state(), max_tokens=12)
    assert want != xm.generate(model, tokenizer, prompt, max_tokens=12)
    back = State.load(tmp_path / "tuned.state", model)
    assert (back.tokens, back.logits, back.nbytes) == (0, None, state.nbytes) and xm.generate(model, tokenizer, prompt, state=back.fork(), max_tokens=12) == want
    r = subprocess.run([sys.executable, "-m", "xlstm_metal", "generate", "--model", str(original), "--load-state", str(tmp_path / "tuned.state"), "-p", prompt, "--max-tokens", "12"],
                       capture_output=True, text=True, timeout=100)
    assert r.stdout.strip().removeprefix(prompt).strip() == want.strip(), r
    named = NamedStates(model, tmp_path / "named", precision="int8")
    named.put("tuned", state)
    named.fork("tuned", "copy")
    assert xm.generate(model, tokenizer, prompt, state=named.get("copy"), max_tokens=12) == want
    with pytest.raises(StateError, match="cannot save an empty state"): State(model).save(tmp_path / "none")
    server = Served("--model", original, "--state-folder", tmp_path / "named")
    assert server.ask(prompt, "tuned").choices[0].text.strip() == want.strip()
    server.create("read", prompt, "tuned")
    assert server.names()["read"]["tokens"] == len(tokenizer.encode(prompt)) + 1 # with the first token of a text
    assert "Traceback" not in server.stop()


def test_a_compiled_run_is_the_plain_one():
    "Where it is compiled, the state that is learned is among what a step returns."
    def learned():
        tuned = StateTuning(stack(), [1, 2, 3])
        fit(tuned, iter([ids_of(2, 12, seed=s) for s in range(3)]), make_optimizer(3, 1e-2, 1), 3, report=None)
        return tuned
    plain = learned().initial_parameters()
    mx.enable_compile()
    try: compiled = learned()
    finally: mx.disable_compile()
    assert mx.isfinite(compiled(ids_of(1, 5))).all()
    for name, a in compiled.initial_parameters().items(): assert mx.allclose(a, plain[name], atol=1e-4), name
