"Drafts change how long a text takes, and nothing else."
import itertools
import json
import os
import socket
import subprocess
import sys
import sysconfig
import time
import urllib.request
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

import xlstm_metal as xm
from xlstm_metal.blocks import discovery # registers the kinds of blocks
from xlstm_metal.generation import speculative
from xlstm_metal.generation.generate import GenerationError, Sampling, generate, stream, tokens
from xlstm_metal.generation.speculative import Choice, Drafter, DraftError, DraftModel, LookUp, Pass, drafter_for, speculate
from xlstm_metal.generation.state import State, batch
from xlstm_metal.model.tokenizer import encode
from xlstm_metal.wiring import ablate
from xlstm_metal.wiring.run import layer_wiring
from xlstm_metal.wiring.wiring import Neuron, SkipWiring, xLSTMWiring

D, V = 32, 40
ROOT = Path(__file__).parents[1]


def delays():
    w = xLSTMWiring([Neuron("mlstm", 0, D), Neuron("slstm", 1, D), Neuron("conv", 2, D)])
    w.add_synapse(1, 1, -1, delay=1), w.add_synapse(0, 2, 1, delay=1)
    return w


WIRINGS = {"7B": lambda: layer_wiring(["mlstm"] * 2, D), "slstm": lambda: layer_wiring(["slstm", "mlstm"], D), "delays": delays,
           "first paper": lambda: xLSTMWiring([Neuron("mlstm", 0, D, dict(num_heads=2, inner_dims=64, qkv_size=4, kernel_size=4))]),
           "all": lambda: SkipWiring([Neuron(k, j, D) for j, k in enumerate(["mlstm", "slstm", "attention", "conv", "ffn", "mamba2"])])}


def random_model(wiring, seed=0, vocab=V):
    mx.random.seed(seed)
    model = xm.Model(WIRINGS[wiring](), vocab).eval()
    for name, w in model.named_modules(): # memories that matter
        for key in ("weight", "bias"):
            if key in w and isinstance(w[key], mx.array) and ("gate" in name or "conv" in name): w[key] = w[key] + .3 * mx.random.normal(w[key].shape)
    return model


@pytest.fixture(params=WIRINGS)
def model(request): return random_model(request.param)


@pytest.fixture(scope="module")
def bundled(): return xm.load(dtype=mx.float32)


@pytest.fixture(scope="module")
def texts():
    "Beginnings of files of Python's library."
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    return [t for f in files if len(t := f.read_text(encoding="utf-8", errors="ignore")) > 400]


class Known(Drafter):
    "Drafts a text that is known, with every so many tokens wrong."
    def __init__(self, text, wrong=0, most=4, margin=None):
        super().__init__(most, margin)
        self.text, self.wrong = text, wrong

    def forget(self): self.at = 0
    def read(self, ids): self.at = getattr(self, "at", 0) + len(ids)

    def draft(self, first, choose):
        new = self.text[self.at + 1:self.at + 1 + self.most]
        return [t if not self.wrong or (self.at + j) % self.wrong else (t + 1) % 7 for j, t in enumerate(new)], None


def take(source, n): return [t for t, *_ in itertools.islice(source, n)]
def written(model, ids, n, drafter, **sampling): return take(speculate(State(model).read(ids), Sampling(**sampling), drafter, ids), n)
def plain(model, ids, n, **sampling): return take(tokens(State(model).read(ids), Sampling(**sampling), ids), n)
def random_ids(seed, n, vocab=V): return np.random.default_rng(seed).integers(0, vocab, n).tolist()


def check_state(state, ids):
    "A state that has read these tokens, whichever way."
    want = State(state.model).read(ids)
    assert state.tokens == len(ids) and mx.abs(state.logits - want.logits).max() < 2e-4 * (1 + mx.abs(want.logits).max())
    for a, b in zip(state.cache, want.cache):
        for x, y in zip(a.cache, b.cache, strict=True): assert x.shape == y.shape and mx.abs(x - y).max() < 1e-3 * (1 + mx.abs(y).max())


def test_identical_text(model):
    for seed in range(20):
        ids = random_ids(seed, 3 + seed)
        want = plain(model, ids, 24)
        other = random_model("7B", 1)
        for drafter in (LookUp(1 + seed % 7, shortest=1), Known([*ids, *want], wrong=1 + seed % 5), DraftModel(other, 3)):
            assert written(model, ids, 24, drafter) == want, (seed, drafter)


@pytest.mark.parametrize("wiring", ["7B", "slstm"])
def test_identical_text_quantised(wiring):
    model = random_model(wiring)
    nn.quantize(model, 32, 4, class_predicate=model.quant_predicate)
    accepted = 0
    for seed in range(20):
        ids = random_ids(seed, 9)
        want = plain(model, ids, 20)
        assert written(model, ids, 20, drafter := Known([*ids, *want], wrong=3)) == want
        accepted += drafter.accepted
    assert accepted > 100


@pytest.mark.parametrize("part", range(4))
def test_identical_text_of_the_bundled_model(bundled, texts, part):
    model, tokenizer = bundled
    accepted = proposed = 0
    for text in texts[part:80:4]:
        ids = encode(tokenizer, text[:60 + 7 * part], model.args)
        want = plain(model, ids, 16)
        assert written(model, ids, 16, drafter := LookUp(4, shortest=1)) == want
        accepted, proposed = accepted + drafter.accepted, proposed + drafter.proposed
    assert 10 < accepted < proposed


def test_sixteen_bits(bundled, texts):
    "With an unlimited margin the same by construction; else the likeliest up to rounding, by the logits of plain steps."
    model, tokenizer = xm.load(dtype="bfloat16")
    for text in texts[:3]:
        ids = encode(tokenizer, text[:80], model.args)
        want = plain(model, ids, 10)
        assert written(model, ids, 10, Known([*ids, *want], wrong=4, margin=float("inf"))) == want
        got, state = written(model, ids, 10, LookUp(3, shortest=1)), State(model).read(ids)
        for t in got:
            assert state.logits.max() - state.logits[0, t] < .3
            state.feed(mx.array([t]))


def test_near_ties_are_decided_by_plain_steps(monkeypatch):
    "Passes whose logits are off by less than half the margin: without it other tokens come out."
    model, exact = random_model("7B"), Pass.__init__
    for m in (model.lm_head,) if "lm_head" in model else (model.embeddings,): m.weight = m.weight * .05 # near ties everywhere
    def off(self, state, ids):
        exact(self, state, ids)
        self.logits = self.logits + .004 * mx.random.uniform(-1, 1, self.logits.shape)
    monkeypatch.setattr(Pass, "__init__", off)
    differs = False
    for seed in range(12):
        ids = random_ids(seed, 8)
        want = plain(model, ids, 20)
        assert written(model, ids, 20, Known([*ids, *want], margin=.01)) == want
        differs |= written(model, ids, 20, Known([*ids, *want], margin=0)) != want
    assert differs


def test_repetition_penalty(model):
    for seed in range(5):
        ids, how = random_ids(seed, 12), dict(repetition_penalty=1.4)
        want = plain(model, ids, 24, **how)
        assert want != plain(model, ids, 24)
        for drafter in (Known([*ids, *want], wrong=5), LookUp(4, shortest=1), DraftModel(model, 3, margin=0)): assert written(model, ids, 24, drafter, **how) == want
        assert drafter.accepted == drafter.proposed # the model itself drafts what it writes, with the penalty


def test_the_model_itself_is_always_right(model):
    ids = random_ids(0, 9)
    drafter = DraftModel(model, 4)
    written(model, ids, 25, drafter) # five passes of one and four
    assert (drafter.accepted, drafter.proposed) == (20, 20)
    written(model, ids, 25, drafter := DraftModel(model, 4), temperature=.9, seed=3)
    assert drafter.accepted == drafter.proposed == 20


@pytest.mark.parametrize("n", range(1, 8))
def test_a_state_is_where_the_text_is(model, n):
    ids = random_ids(n, 7)
    text = [*ids, *plain(model, ids, 16)]
    state = State(model).read(ids)
    source = speculate(state, Sampling(), Known(text, wrong=5), ids)
    got = take(source, n)
    check_state(state, [*ids, *got]) # while the generator is in the middle of a draft
    rest = take(source, 4)
    check_state(state, [*ids, *got, *rest])
    assert [*ids, *got, *rest, *take(tokens(state, Sampling()), 4)] == text[:len(ids) + n + 8]


def test_interrupts_leave_a_state_that_goes_on(model, monkeypatch):
    ids = random_ids(1, 7)
    want, rule, calls = plain(model, ids, 16), speculative.judge, itertools.count()
    def interrupted(*args):
        if next(calls) == 2: raise KeyboardInterrupt
        return rule(*args)
    monkeypatch.setattr(speculative, "judge", interrupted)
    state, got = State(model).read(ids), []
    with pytest.raises(KeyboardInterrupt):
        for t, *_ in speculate(state, Sampling(), Known([*ids, *want]), ids): got.append(t)
    assert got == want[:10]
    check_state(state, [*ids, *got])
    assert got + take(speculate(state, Sampling(), Known([*ids, *want]), [*ids, *got]), 6) == want


def test_saved_loaded_continued(bundled, tmp_path):
    model, tokenizer = bundled
    state, text = State(model), "class Node:\n    def __init__(self, left, right):\n"
    whole = generate(model, tokenizer, text, max_tokens=40)
    part = generate(model, tokenizer, text, state=state, max_tokens=21, draft="lookup")
    state.save(tmp_path / "state")
    back = State.load(tmp_path / "state", model)
    assert back.tokens == state.tokens
    assert part + generate(model, tokenizer, "", state=back, max_tokens=19, draft=LookUp(5)) == whole
    assert part + generate(model, tokenizer, "", state=state, max_tokens=19) == whole


def test_ends(bundled, monkeypatch):
    "Stop texts, the number of tokens and the end of a text, in the middle of a draft that is all right."
    model, tokenizer = bundled
    prompt = "class Node:\n    def __init__(self, left, right):\n"
    ids = encode(tokenizer, prompt, model.args)
    want = plain(model, ids, 40)
    def both(**how):
        results = []
        for drafter in (None, Known([*ids, *want], most=7)):
            state = State(model)
            pieces = list(stream(model, tokenizer, prompt, state=state, draft=drafter, **how))
            results.append(("".join(p.text for p in pieces), [p.token for p in pieces], pieces[-1].finish_reason, state.tokens))
            assert np.allclose([p.logprob for p in pieces], [p.logprob for p in stream(model, tokenizer, prompt, **how)], atol=1e-4)
        assert results[0] == results[1]
        assert any(p.from_draft for p in pieces)
        check_state(state, [*ids, *results[0][1]])
        return results[0]
    for n in (2, 8, 9, 13): assert len(both(max_tokens=n)[1]) == n
    assert generate(model, tokenizer, prompt, max_tokens=0, draft="lookup") == ""
    text = both(max_tokens=30)[0]
    assert both(max_tokens=30, stop=text[20:23])[2] == "stop"
    monkeypatch.setattr(type(tokenizer), "eos_token_ids", property(lambda _: {want[11]}))
    ended = both(max_tokens=30)
    assert ended[2] == "stop" and len(ended[1]) <= 12


# Sampling

TINY = 5


def distribution(model, ids, n, **how):
    "Probabilities of all continuations by n tokens, from the model's logits and the filters as they are defined, in numpy."
    result = {(): 1.}
    for _ in range(n):
        new = {}
        for text, chance in result.items():
            logits = np.array(State(model).read([*ids, *text]).logits[0], np.float64)
            logp = logits - np.log(np.exp(logits).sum())
            keep = np.ones(TINY, bool)
            if "top_p" in how:
                order = np.argsort(-logp)
                before = np.cumsum(np.exp(logp[order])) - np.exp(logp[order])
                keep[order[before >= how["top_p"]]] = False
            if "top_k" in how: keep[np.argsort(-logp)[how["top_k"]:]] = False
            p = np.where(keep, np.exp(logp / how["temperature"]), 0)
            for t, x in enumerate(p / p.sum()):
                if x: new[*text, t] = chance * x
        result = new
    return result


def chi_square(model, drafter, ids, n, draws, **how):
    "How far what comes out is from what it should be distributed as, in standard deviations."
    want, seen, start = distribution(model, ids, n, **how), {}, State(model).read(ids)
    mx.random.seed(6)
    for _ in range(draws):
        drafter.forget()
        text = tuple(take(speculate(start.fork(), Sampling(**how), drafter, ids), n))
        seen[text] = seen.get(text, 0) + 1
    assert seen.keys() <= want.keys()
    common = {t for t in want if draws * want[t] >= 10}
    pairs = [(seen.get(t, 0), draws * want[t]) for t in common] + [(sum(c for t, c in seen.items() if t not in common), draws * (1 - sum(want[t] for t in common)))]
    pairs = [(a, b) for a, b in pairs if b >= 1]
    df = len(pairs) - 1
    return (sum((a - b)**2 / b for a, b in pairs) - df) / (2 * df)**.5


def tiny(seed):
    mx.random.seed(seed)
    model = xm.Model(layer_wiring(["mlstm"], 16), TINY).eval()
    for m in (model.lm_head,) if "lm_head" in model else (model.embeddings,): m.weight = m.weight * 2
    return model


def broken_accepts_all(choose, logprobs, drafted, q=None): return len(drafted), [*drafted, choose.draw(logprobs).tolist()[-1]], []


def broken_residual(choose, logprobs, drafted, q=None, rule=speculative.judge):
    n, _, gaps = rule(choose, logprobs, drafted, q)
    return n, choose.draw(logprobs).tolist(), gaps # from p, where it must be from what q does not cover


HOWS = [dict(temperature=1.), dict(temperature=1.4, top_p=.95, top_k=4)]


@pytest.mark.parametrize("how", HOWS, ids=str)
@pytest.mark.parametrize("who", ["lookup", "model"])
def test_sampling_keeps_the_distribution(who, how):
    model, ids = tiny(0), [1, 4, 2, 4, 4, 4, 4, 4] # what is likely stands there, so that drafts are accepted and refused
    drafter = LookUp(2, shortest=1) if who == "lookup" else DraftModel(tiny(1), 2)
    assert chi_square(model, drafter, ids, 3, 700, **how) < 5
    assert .02 < drafter.accepted / drafter.proposed < .98


@pytest.mark.parametrize("who,broken", [("lookup", broken_accepts_all), ("lookup", broken_residual), ("model", broken_accepts_all),
                                        ("model", broken_residual)])
def test_a_broken_rule_is_noticed(who, broken, monkeypatch):
    monkeypatch.setattr(speculative, "judge", broken)
    drafter = LookUp(2, shortest=1) if who == "lookup" else DraftModel(tiny(1), 2)
    assert chi_square(tiny(0), drafter, [1, 4, 2, 4, 4, 4, 4, 4], 3, 300 if broken is broken_accepts_all else 1000, temperature=1.) > 7


def test_filters_are_those_of_the_sampler(monkeypatch):
    "What is drawn from is to the bit what mlx-lm's sampler draws from."
    from mlx_lm import sample_utils
    mx.random.seed(0)
    logits = 3 * mx.random.normal((3, 50))
    for how in (dict(temperature=.7), dict(temperature=1.3, top_p=.8), dict(temperature=1., top_k=7), dict(temperature=.9, top_p=.95, min_p=.1, top_k=5)):
        choose, seen = Choice(Sampling(**how)), []
        monkeypatch.setattr(sample_utils, "categorical_sampling", lambda x, temp: seen.append(x / temp))
        x = choose.logprobs(logits)
        sample_utils.make_sampler(how["temperature"], how.get("top_p", 0.), how.get("min_p", 0.), top_k=how.get("top_k", 0))(x)
        assert mx.allclose(choose.probabilities(x), mx.softmax(seen[0], -1), atol=1e-7)


def test_seeds(model):
    ids = random_ids(0, 9)
    def some(seed): return written(model, ids, 20, LookUp(3, shortest=1), temperature=1., seed=seed)
    assert some(1) == some(1) != some(2)


# What is refused

def test_refused(bundled):
    model, tokenizer = bundled
    small = random_model("7B")
    for bad, says in ((small, "vocabulary of 40 tokens, the model one of 4096"), ("./nowhere", "there is no folder ./nowhere")):
        with pytest.raises((DraftError, GenerationError, ValueError), match=says): drafter_for(bad, model, tokenizer)
    with pytest.raises(GenerationError, match="vocabulary of 40 tokens"): stream(model, tokenizer, "x", draft=small)
    for n in (0, 65): # nothing is read before
        with pytest.raises(GenerationError, match=f"from 1 to 64, got {n}"): stream(model, tokenizer, "x", draft="lookup", draft_tokens=n)
    with pytest.raises(GenerationError, match="made with replay"): stream(model, tokenizer, "x", state=State(model, replay=2), draft="lookup")
    rows = batch([State(small).read([1]), State(small).read([2])])
    with pytest.raises(DraftError, match="batch size must be 1, got 2"): next(speculate(rows, Sampling(), LookUp()))
    with pytest.raises(GenerationError, match="batch size must be 1, got 2"): stream(small, None, [1], state=rows, draft="lookup")


def test_other_tokenizer(bundled, tmp_path):
    "As many ids, and other texts."
    from shutil import copytree
    from xlstm_metal.files import bundled as folder
    copytree(folder, tmp_path / "other")
    file = tmp_path / "other/tokenizer.json"
    settings = json.loads(file.read_text())
    vocab = settings["model"]["vocab"]
    a, b = (t for t in vocab if vocab[t] in (300, 301))
    vocab[a], vocab[b] = vocab[b], vocab[a]
    file.write_text(json.dumps(settings))
    with pytest.raises(DraftError, match="another vocabulary"): drafter_for(str(tmp_path / "other"), *bundled)
    assert isinstance(drafter_for(str(folder), *bundled), DraftModel)


# The server

@pytest.mark.parametrize("draft", ["lookup", "bundled"])
def test_server(draft, bundled):
    from xlstm_metal.files import bundled as folder
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    argv = "mlx", "server", "--port", str(port), "--log-level", "ERROR", "--draft", draft.replace("bundled", str(folder)), "--draft-tokens", "3"
    process = subprocess.Popen([sys.executable, "-c", "import sys; from xlstm_metal.apps.cli import main; sys.exit(main())", *argv],
                               env=os.environ | dict(PYTHONPATH=str(ROOT), HF_HUB_OFFLINE="1"))
    def ask(path, **body):
        data = json.dumps(dict(model="bundled", temperature=0, max_tokens=24) | body).encode()
        request = urllib.request.Request(f"http://127.0.0.1:{port}/v1/{path}", data, {"Content-Type": "application/json"})
        return json.load(urllib.request.urlopen(request, timeout=120))
    try:
        while process.poll() is None:
            try: urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5)
            except OSError: time.sleep(.2)
            else: break
        prompt = "class Node:\n    def __init__(self, left, right):\n"
        for more in ({}, dict(stop=["="]), dict(max_tokens=1), dict(repetition_penalty=1.3)):
            drafted = ask("completions", prompt=prompt, **more)
            as_ever = ask("completions", prompt=prompt, presence_penalty=1e-9, **more) # which drafts do not know
            assert drafted["choices"] == as_ever["choices"] and drafted["usage"]["completion_tokens"] == as_ever["usage"]["completion_tokens"]
        assert drafted["usage"]["prompt_tokens_details"]["cached_tokens"] > 10
        chat = ask("chat/completions", messages=[dict(role="user", content="class Queue:")], temperature=.8, seed=1, logprobs=True, top_logprobs=2)
        assert chat == ask("chat/completions", messages=[dict(role="user", content="class Queue:")], temperature=.8, seed=1, logprobs=True, top_logprobs=2) | {
            key: chat[key] for key in ("id", "created", "usage")}
    finally: process.terminate(), process.wait()
