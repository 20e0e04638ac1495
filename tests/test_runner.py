"The runner and `generate`: text and ids, several prompts, arguments that are refused; and what is reachable from `xm`."
import ast
import random
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest

import xlstm_metal as xm
from xlstm_metal.generation.generate import GenerationError, Sampling, stream
from xlstm_metal.generation.state import chunks
from xlstm_metal.wiring.wiring import Neuron, xLSTMWiring

ROOT = Path(__file__).parents[1]
BUNDLED, STACK, TINY = ROOT / "xlstm_metal" / "bundled", ROOT / "tests" / "fixtures" / "stack_tiny", ROOT / "tests" / "fixtures" / "hf_tiny"


@pytest.fixture(scope="module")
def bundled(): return xm.load(dtype=mx.float32)


def greedy(model, ids, n):
    "The n likeliest tokens, each from a pass over the whole text."
    ids = list(ids)
    for _ in range(n): ids.append(model(mx.array([ids]))[0, -1].argmax().item())
    return ids[-n:]


@pytest.mark.parametrize("path", [BUNDLED, STACK, TINY], ids=lambda p: p.name)
def test_ids_in_ids_out(path):
    "Also where a checkpoint has no tokenizer."
    runner = xm.xLSTMRunner.from_pretrained(path, "float32")
    want = greedy(runner.model, [1, 2, 3], 9)
    eos = runner.tokenizer.eos_token_ids if runner.tokenizer else {runner.model.args.eos_token_id}
    assert not eos & set(want)
    got = runner.generate([1, 2, 3], max_tokens=9)
    assert got == want and all(type(t) is int for t in got)
    assert runner.generate(mx.array([[5]]), max_tokens=2) == greedy(runner.model, [1, 2, 3, *got, 5], 2)  # the state was carried


def test_ids_end_where_the_config_says():
    model, _ = xm.load(TINY, mx.float32)
    want = greedy(model, [1, 2, 3], 5)
    for eos in (want[2], [want[2], 1]):
        model.args.eos_token_id = eos
        assert xm.xLSTMRunner(model).generate([1, 2, 3], max_tokens=9) == want[:want.index(want[2]) + 1]


def test_text_in_text_out(bundled):
    model, tokenizer = bundled
    text = xm.xLSTMRunner(model, tokenizer).generate("import os\n", max_tokens=8)
    assert isinstance(text, str) and text == xm.generate(model, tokenizer, "import os\n", max_tokens=8)


@pytest.mark.parametrize("ids", [[1, 2], mx.array([1, 2]), mx.array([[1, 2]]), np.array([[1, 2]])])
def test_next_token(bundled, ids):
    model, tokenizer = bundled
    runner = xm.xLSTMRunner(model, tokenizer)
    want = greedy(model, [1, 2], 3)
    assert [runner.generate_next_token(ids), runner.generate_next_token(), runner.generate_next_token(temperature=0)] == want
    assert runner.state.tokens == 5
    assert runner.generate_next_token(mx.array([[7]])) == greedy(model, [1, 2, *want, 7], 1)[0]


def test_next_token_is_sampled(bundled):
    draws = set()
    for seed in range(12):
        mx.random.seed(seed)
        draws.add(xm.xLSTMRunner(*bundled).generate_next_token(mx.array([[1, 2]]), temperature=.8))
    assert len(draws) > 2 and all(type(t) is int for t in draws)


@pytest.mark.parametrize("path", [BUNDLED, str(BUNDLED)], ids=["Path", "str"])
def test_a_runner_loads_a_folder(path, bundled):
    runner = xm.xLSTMRunner(path)
    assert runner.tokenizer.decode([300]) == bundled[1].decode([300]) and runner.generate([0, 300], max_tokens=3)
    other = object()
    assert xm.xLSTMRunner(path, other).tokenizer is other


def test_a_runner_without_a_checkpoint_says_so(tmp_path):
    with pytest.raises(ValueError, match="config.json") as e: xm.xLSTMRunner(tmp_path)
    assert "\n" not in str(e.value)


def test_model_info(bundled):
    info = xm.xLSTMRunner(*bundled).get_model_info()
    assert info["embedding_dim"] == info["hidden_size"] == 512 and info["chunk_size"] == 64 and info["num_blocks"] == 7
    assert xm.xLSTMRunner(STACK).get_model_info()["embedding_dim"] == xm.load(STACK)[0].args.hidden_size
    without = xm.Model(xLSTMWiring([Neuron("conv", 0, 16)]), 40)
    assert xm.xLSTMRunner(without).get_model_info()["chunk_size"] is None


PROMPTS = ["import os\n", "class Stack:\n", "x = [1,"]


@pytest.mark.parametrize("options", [dict(), dict(temperature=.9, seed=3), dict(stop="\n")], ids=["greedy", "sampled", "stop"])
def test_several_prompts(bundled, options):
    texts = xm.generate(*bundled, PROMPTS, max_tokens=10, **options)
    assert texts == [xm.generate(*bundled, p, max_tokens=10, **options) for p in PROMPTS] and len(set(texts)) > 1


def test_several_prompts_after_a_state(bundled):
    model, tokenizer = bundled
    state = xm.State(model).prefill("import os\n", tokenizer, None)
    texts = xm.generate(model, tokenizer, ["for ", "def "], max_tokens=6, state=state)
    assert texts == [xm.generate(model, tokenizer, p, max_tokens=6, state=state.fork()) for p in ("for ", "def ")]
    assert state.tokens == xm.State(model).prefill("import os\n", tokenizer, None).tokens  # it stays where it is


@pytest.mark.parametrize("prompt, says", [
    (None, "expected text or token ids, got None"), (["a", 5], "expected text or token ids, got 'a'"), ([.5], "expected text or token ids, got 0.5"),
    ({}, "expected text or token ids, got {}"), (Path("a"), "expected text or token ids, got .*Path"), (5, r"ids must have shape \(1, S\), got \(\)"),
    ([[1], [2]], r"ids must have shape \(1, S\), got \(2, 1\)"), ([[1], [2, 3]], "must have the same length"), ([4096], "token id 4096 is outside the vocabulary of 4096"),
    ([], "the prompt is empty"), ("", "the prompt is empty"), (["a", ""], "the prompt is empty"), (["a", "b\udcff"], "the text is not UTF-8")])
def test_prompts_that_are_refused_before_any_work(bundled, monkeypatch, prompt, says):
    model, tokenizer = bundled
    monkeypatch.setattr(type(model), "hidden", lambda *args: pytest.fail("something was computed"))
    with pytest.raises(GenerationError, match=says) as e: xm.generate(model, tokenizer, prompt)
    assert "\n" not in str(e.value)
    if not isinstance(prompt, list) or not all(isinstance(p, str) for p in prompt):
        with pytest.raises(GenerationError, match=says): xm.xLSTMRunner(model, tokenizer).generate(prompt)


def test_text_needs_a_tokenizer(bundled):
    model, tokenizer = bundled
    for call in (lambda: xm.generate(model, None, [1]), lambda: stream(model, None, "a"), lambda: stream(model, None, [1], stop="x"), lambda: xm.xLSTMRunner(model).generate("a")):
        with pytest.raises(GenerationError, match="no tokenizer, so it cannot read or write text"): call()


@pytest.mark.parametrize("name, value", [("max_tokens", 1.5), ("max_tokens", -1), ("temperature", "hot"), ("temperature", float("nan")), ("top_k", None), ("top_p", 0),
                                         ("min_p", 2), ("repetition_penalty", 0), ("seed", 2**64), ("seed", "x"), ("stop", [5]), ("stop", [""])])
def test_sampling_arguments_are_checked(name, value):
    with pytest.raises(GenerationError, match=f"{name} must be"): Sampling(**{name: value})


def test_numbers_of_numpy_are_numbers():
    s = Sampling(max_tokens=np.int64(5), temperature=np.float32(.5), top_k=np.int32(3))
    assert (s.max_tokens, s.top_k) == (5, 3)


def test_chunks_are_cut_at_the_same_places_however_ids_arrive():
    draw = random.Random(0)
    for _ in range(200):
        n, length, skip = draw.randint(1, 60), draw.randint(1, 20), draw.randint(0, 10)
        ids, at = np.arange(2 * n).reshape(2, n), sorted(draw.choices(range(n + 1), k=draw.randint(0, 5)))
        pieces = [(ids[:, a:b], b - a) for a, b in zip([0, *at], [*at, n])]
        got = list(chunks(SimpleNamespace(prefill_chunk_size=length), pieces, skip))
        want = [ids[:, t:t + length] for t in range(skip, n, length)]
        assert len(got) == len(want) and all(np.array_equal(a, b) for (a, _), b in zip(got, want))
        if want: assert sum(size for _, size in got) == n  # what was skipped counts as read


# ---------------------------------------------------------------- names

def test_rooms_and_researchers_names_are_reachable():
    code = ("import xlstm_metal as xm, types\n"
            "rooms = ('apps', 'blocks', 'cells', 'generation', 'model', 'train', 'wiring', 'numerics')\n"
            "assert all(isinstance(getattr(xm, r), types.ModuleType) and r in dir(xm) for r in rooms)\n"
            "assert all(callable(f) for f in (xm.batch, xm.unbatch, xm.fit, xm.init_weights, xm.lm_loss, xm.make_optimizer))\n"
            "assert isinstance(xm.train, types.ModuleType) and not hasattr(xm, 'bundled') and not hasattr(xm, 'nothing')")
    r = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert r.returncode == 0, r.stderr


@pytest.mark.parametrize("cls", [xm.State, xm.xLSTMRunner], ids=lambda c: c.__name__)
def test_methods_live_in_their_class(cls):
    for name, f in vars(cls).items():
        f = getattr(f, "__func__", getattr(f, "fget", None) or f)
        if callable(f) and hasattr(f, "__qualname__"): assert f.__qualname__ == f"{cls.__name__}.{name}"


def test_quantisation_imports_nothing_above_it():
    tree = ast.parse((ROOT / "xlstm_metal" / "model" / "quantize.py").read_text())
    assert not [n for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and (n.level or n.module.startswith("xlstm_metal"))]
