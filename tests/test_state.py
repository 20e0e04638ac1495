"States as values: wherever one is copied, saved, put beside others or interrupted, the text goes on as if nothing had happened."
import io
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

from xlstm_metal.generation.state_files import StateError, read_arrays, write_arrays
from xlstm_metal.generation.runner import xLSTMRunner
from xlstm_metal.generation.score import score
from xlstm_metal.generation.state import Source, State, batch, unbatch
from xlstm_metal.model.checkpoint import load
from xlstm_metal.model.config import xLSTMConfig
from xlstm_metal.model.convert import convert
from xlstm_metal.model.tokenizer import encode, encode_pieces

HERE = Path(__file__).parent
STACK = HERE / "fixtures" / "stack_tiny"
FIXTURES = {"bundled": (None, mx.float32), "stack": (STACK, mx.float32), "stack in bfloat16": (STACK, mx.bfloat16)}


@pytest.fixture(params=FIXTURES, scope="module")
def model(request): return load(*FIXTURES[request.param])[0]


@pytest.fixture(scope="module")
def bundled(): return load(dtype=mx.float32)


def prompts(model, n, length=9, seed=0):
    return np.random.default_rng(seed).integers(2, model.args.vocab_size, (n, length)).tolist()


def greedy(state, n):
    "The n likeliest tokens of each row, fed one by one."
    got = []
    for _ in range(n):
        got.append(state.logits.argmax(-1))
        state.feed(got[-1])
    return mx.stack(got, 1).tolist() if n else [[]] * state.rows


def same(a, b):
    "Whether two states are the same to the last bit."
    arrays = lambda s: [x for slot in s.cache for x in slot.cache] + [s.logits]
    return a.counts == b.counts and all(mx.array_equal(x, y) for x, y in zip(arrays(a), arrays(b), strict=True))


def there_and_back(state, path):
    state.save(path)
    return State.load(path, state.model)


@pytest.mark.parametrize("at", [0, 1, 17])
def test_forked_and_saved_states_go_on_to_the_last_bit(model, at, tmp_path):
    ids, = prompts(model, 1)
    straight = State(model).read(ids)
    tokens = greedy(straight, 40)[0]
    state = State(model).read(ids)
    greedy(state, at)
    fork, back = state.fork(), there_and_back(state, tmp_path / "a.state")
    state.read([5, 6, 7])  # elsewhere
    for other in (fork, back):
        assert greedy(other, 40 - at)[0] == tokens[at:] and same(other, straight)


def test_not_even_assigning_to_an_array_reaches_a_fork(model):
    state = State(model).read([3, 4, 5])
    again = State(model).read([3, 4, 5])
    for slot in state.fork().cache:
        for a in slot.cache: a[...] = 0
    assert same(state, again)


def test_batched_and_unbatched_states_write_what_each_writes_alone(model, tmp_path):
    ids = [p[:n] for p, n in zip(prompts(model, 4), (9, 5, 8, 2))]
    alone = [State(model).read(p) for p in ids]
    tokens = [greedy(s, 40)[0] for s in alone]
    states = [State(model).read(p) for p in ids]
    parted = unbatch(there_and_back(batch([s.fork() for s in states]), tmp_path / "four"))
    assert all(same(a, b) for a, b in zip(parted, states, strict=True))  # nothing has happened to any
    rows = batch(parted)
    first = greedy(rows, 15)
    assert first == [t[:15] for t in tokens] and rows.counts == [24, 20, 23, 17] and rows.tokens == 84
    a, b, c, d = unbatch(rows)
    later = greedy(batch([d, b]), 25)  # two of them in another order, one alone, one not at all
    assert later == [tokens[3][15:], tokens[1][15:]] and greedy(a, 25)[0] == tokens[0][15:]
    assert c.counts == [23] and mx.abs(a.logits - alone[0].logits).max() < 2e-4


def test_any_order_of_everything(model, tmp_path):
    ids = prompts(model, 3, seed=4)
    tokens = [greedy(State(model).read(p), 40)[0] for p in ids]
    states, got, draw = [State(model).read(p) for p in ids], [[], [], []], random.Random(1)
    while min(map(len, got)) < 30:
        who, n = draw.sample(range(3), draw.randint(1, 3)), draw.randint(1, 6)
        how = draw.choice(["plain", "fork", "save", "batch"])
        if how == "batch":
            rows = batch([states[r] for r in who])
            for r, t in zip(who, greedy(rows, n)): got[r] += t
            for r, s in zip(who, unbatch(rows)): states[r] = s
            continue
        for r in who:
            if how == "fork": states[r] = states[r].fork()
            if how == "save": states[r] = there_and_back(states[r], tmp_path / "s")
            got[r] += greedy(states[r], n)[0]
    assert [g[:30] for g in got] == [t[:30] for t in tokens]


def test_rows_do_not_hold_the_batch(bundled):
    model, _ = bundled
    one = State(model).read([1, 2, 3])
    rows = batch([one] * 64)
    mx.eval(rows.logits, [slot.state for slot in rows.cache])
    row = unbatch(rows)[9]
    mx.clear_cache()
    before = mx.get_active_memory()
    del rows
    assert before - mx.get_active_memory() > 60 * one.nbytes and row.nbytes == one.nbytes


# ---------------------------------------------------------------- refusals

@pytest.fixture
def saved(bundled, tmp_path):
    "A state in use, and its file."
    state = State(bundled[0]).read([3, 4, 5])
    state.save(tmp_path / "a.state")
    return state, tmp_path / "a.state"


def refused(path, model, says, in_use):
    "A load that fails with one sentence and leaves the state in use alone."
    before = in_use.fork()
    with pytest.raises(StateError, match=says) as e: State.load(path, model)
    assert "\n" not in str(e.value) and path.name in str(e.value)
    assert same(in_use, before)


def test_states_of_other_models(saved, tmp_path):
    state, path = saved
    for name in ("stack_tiny", "hf_tiny"):
        other, _ = load(HERE / "fixtures" / name, mx.float32)
        refused(path, other, "is the state of another model", state)
        State(other).read([1, 2]).save(tmp_path / "other")
        refused(tmp_path / "other", state.model, "is the state of another model", state)
    tuned, _ = load(dtype=mx.float32)
    tuned.lm_head.weight = tuned.lm_head.weight * (1 + 1e-6)
    refused(path, tuned, "another model: its weights do not match", state)


def test_packed_and_unpacked_weights_share_their_states(original, tmp_path):
    "A state of one is used by the other, and a state of the model before it was quantised by neither."
    convert(original, tmp_path / "q", quantize="mixed")
    packed, floats = (load(tmp_path / "q", mx.float32, quantize=how)[0] for how in ("stored", False))
    unrounded, _ = load(original, dtype=mx.float32)
    for model, other in ((packed, floats), (floats, packed)):
        state = State(model).read([0, 5, 9, 300, 301])
        state.save(tmp_path / "state")
        again = State.load(tmp_path / "state", other)
        for s in (again, state): s.feed(mx.array([7]))
        assert mx.abs(again.logits - state.logits).max() < 1e-3
        refused(tmp_path / "state", unrounded, "another model: its weights do not match", state)


def test_other_layouts(saved):
    state, path = saved
    arrays, notes = read_arrays(path)
    for change, says in ((dict(logits=mx.zeros((1, 7))), r"array logits is \(1, 7\) there and \(1, 4096\)"),
                         ({"7.0": arrays["6.0"]}, r"array 7.0 is \(1, 4, 64, 128\) there and None"),
                         ({"2.1": None}, r"array 2.1 is None there")):
        write_arrays(path, {n: a for n, a in (arrays | change).items() if a is not None}, notes)
        refused(path, state.model, "another layout: " + says, state)
    write_arrays(path, arrays, notes | {"tokens": "[3, 4]"})  # two rows are promised
    refused(path, state.model, "another layout", state)


def test_cut_short_and_corrupt(saved):
    state, path = saved
    good, draw = path.read_bytes(), random.Random(0)
    for n in (*range(8), 9, 100, *draw.sample(range(101, len(good)), 20), len(good) - 1):
        path.write_bytes(good[:n])
        refused(path, state.model, "is cut short" if n > 8 else "is not a state file", state)
    path.write_bytes(good + b"\0")
    refused(path, state.model, "is cut short or corrupt", state)
    for at in draw.sample(range(len(good)), 60):
        path.write_bytes(good[:at] + bytes([good[at] ^ 1 << draw.randrange(8)]) + good[at + 1:])
        refused(path, state.model, "corrupt|not a state file|version", state)
    path.write_bytes(good)
    assert same(State.load(path, state.model), state)


def test_what_is_no_state_file(saved, tmp_path):
    state, path = saved
    (tmp_path / "empty").touch()
    (tmp_path / "text").write_text("# a text\n" * 100)
    (tmp_path / "noise").write_bytes(os.urandom(5000))
    mx.save_safetensors(str(tmp_path / "x.safetensors"), {"logits": mx.zeros((1, 4096))})
    for name in ("empty", "text", "noise", "x.safetensors"): refused(tmp_path / name, state.model, "is not a state file", state)
    refused(tmp_path / "none", state.model, "there is no file", state)
    refused(tmp_path, state.model, "cannot be read", state)
    arrays, notes = read_arrays(path)
    mx.save_safetensors(str(tmp_path / "later.safetensors"), arrays, notes | {"version": "4"})
    refused(tmp_path / "later.safetensors", state.model, "has version 4 of the format; this package reads versions 2 and 3", state)


def run(code, *args, **kw):
    return subprocess.run([sys.executable, "-c", code, *map(str, args)], capture_output=True, text=True, timeout=300, **kw)


def test_a_write_that_fails_leaves_the_old_file(saved):
    "A full disk, which here is a limit on the size of files, in a process of its own."
    state, path = saved
    good = path.read_bytes()
    r = run("import resource, sys; from xlstm_metal.model.checkpoint import load; from xlstm_metal.generation.state import State\n"
            "state = State(load(dtype='float32')[0]).read([7])\n"
            "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
            "try: state.save(sys.argv[1])\n"
            "except ValueError as e: print(e)", path)
    assert "a.state cannot be written" in r.stdout, r.stderr
    assert path.read_bytes() == good and [f.name for f in path.parent.iterdir()] == ["a.state"]


def test_a_process_that_dies_while_writing_leaves_a_whole_file(saved):
    state, path = saved
    code = ("import sys; from xlstm_metal.model.checkpoint import load; from xlstm_metal.generation.state import State\n"
            "state = State(load(dtype='float32')[0]).read([7]); print('go', flush=True)\n"
            "while True: state.save(sys.argv[1]); state.read([8])")
    p = subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE)
    p.stdout.readline()
    time.sleep(random.uniform(.1, .5))
    p.kill()
    assert p.wait() == -signal.SIGKILL
    assert State.load(path, state.model).tokens > 0


def test_links_stay_links(saved, tmp_path):
    state, path = saved
    (tmp_path / "link").symlink_to(path)
    state.read([9])
    state.save(tmp_path / "link")
    assert (tmp_path / "link").is_symlink() and State.load(path, state.model).tokens == 4


# ---------------------------------------------------------------- long inputs, and Ctrl-C

INTERRUPTED = """
import os, random, signal, sys, threading, time
from pathlib import Path
import mlx.core as mx
from xlstm_metal.generation.generate import Sampling, tokens
from xlstm_metal.generation.state import State
from xlstm_metal.model.checkpoint import load

def until_done(work): # interrupted at any moment, less and less soon, so that a slow machine gets on: how often, and how often it was said where
    stops = said = 0
    while True:
        thread = threading.Thread(target=lambda: (time.sleep(random.uniform(0, .2 + .03 * stops)), os.kill(os.getpid(), signal.SIGINT)))
        try:
            thread.start()
            work()
            time.sleep(9)
        except KeyboardInterrupt as e:
            stops, said = stops + 1, said + (f"stopped after {state.tokens} tokens" in str(e))
        thread.join()
        if finished(): return stops, said

model, tokenizer = load(dtype='float32')
model.args.max_inference_chunksize = 16
text = Path(sys.argv[1])
whole = State(model).prefill(text, tokenizer, None)
state, finished = State(model), lambda: state.tokens == whole.tokens
def read():
    if not finished(): state.prefill(text, tokenizer, None, skip=state.tokens)
print(*until_done(read), mx.array_equal(state.logits, whole.logits).item(), flush=True)

straight = [t for _, (t, _) in zip(range(60), tokens(whole, Sampling()))]
got, finished = [], lambda: len(got) >= 60
def write():
    for t, _ in tokens(state, Sampling()):
        got.append(t)
        if finished(): return
print(*until_done(write), got == straight and mx.array_equal(state.logits, whole.logits).item())
"""


def test_ctrl_c_at_any_moment(tmp_path):
    "Real signals: what was read and written until then is exact, and it goes on to the last bit."
    text = tmp_path / "text"
    text.write_text("def area(width, height):\n    return width * height\n\n" * 25)
    r = run(INTERRUPTED, text)
    assert r.returncode == 0, r.stderr
    (stops, said, right), (more, _, right_too) = (line.split() for line in r.stdout.splitlines())
    assert right == right_too == "True" and int(stops) > 2 and int(said) > 1 and int(more) > 1


def test_memory_is_flat_and_the_end_is_the_same():
    model, _ = load(HERE / "fixtures" / "hf_tiny", mx.float32)
    model.args.max_inference_chunksize = 64
    mx.clear_cache()  # a buffer left by another test may be taken for a smaller array, and counts whole
    ids = np.random.default_rng(0).integers(0, model.args.vocab_size, 64 * 40)
    log = []

    def memory(tokens):
        log.append((mx.get_peak_memory(), mx.get_active_memory()))
        mx.reset_peak_memory()

    state = State(model).prefill(ids, progress=memory)
    peaks, active = np.array(log).T[:, 1:]
    assert len(log) == 40 and np.ptp(peaks) < 2**20 and np.ptp(active) < 2**12
    assert same(state, State(model).read(ids.tolist()))


# ---------------------------------------------------------------- tokens of a text in pieces

PARTS = ["it's  x = 1\n", "    def f(a):\n\n\n        return a*b  # ok\n", "日本語のテキスト。改行\n\n", "Привет, мир!\r\n\r\n", "नमस्ते\n",
         "مرحبا بالعالم\n\t\t", "e\u0301a\u0308 \ufb01\n", "👩\u200d👩\u200d👧 🏳️\u200d🌈\n\n", "\u2028\x0b\x0c \xa0\u3000", "<|endoftext|>", "12.5e-7\n",
         "a;\n}\n", "\n" * 150, " " * 130, "x" * 250, "สวัสดี", "!!!\n?\n", "\ufeff", "\0\x01\n", "'s'S'LL\n", "\r\r\n"]
LLAMA = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
BYTES = pre_tokenizers.ByteLevel
KINDS = {"gpt2": (BYTES(add_prefix_space=False), None, []),
         "neox": (BYTES(add_prefix_space=False), normalizers.NFC(), [" " * n for n in range(2, 25)]),
         "llama3": (pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(LLAMA), "isolated"), BYTES(add_prefix_space=False, use_regex=False)]), None, []),
         "space in front": (pre_tokenizers.Metaspace(), None, [])}


class Trained:
    "A tokenizer of each kind, trained on the text that it has to cut."
    bos_token, bos_token_id = "<|endoftext|>", 0

    def __init__(self, split, normalizer, added, text):
        self.tok = Tokenizer(models.BPE())
        self.tok.pre_tokenizer = split
        if normalizer: self.tok.normalizer = normalizer
        self.tok.train_from_iterator([text], trainers.BpeTrainer(vocab_size=900, special_tokens=["<|endoftext|>"], show_progress=False,
                                                                 initial_alphabet=BYTES.alphabet()))
        self.tok.add_tokens(added)

    def encode(self, text, add_special_tokens=False): return self.tok.encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize("kind", [*KINDS, "bundled"])
def test_pieces_have_the_tokens_of_the_whole(kind, bundled):
    draw = random.Random(7)
    text = "".join(draw.choices(PARTS, k=1500))
    tokenizer = bundled[1] if kind == "bundled" else Trained(*KINDS[kind], text)
    c = xLSTMConfig(5000, 64, 1, 1, bos_token_id=0, force_bos_token_insert=True)
    whole, most = [0, *tokenizer.encode(text, add_special_tokens=False)], 0
    for size in (8192, 900, 300, 120):
        some = io.StringIO(text, newline="")
        pieces = list(encode_pieces(tokenizer, lambda n: some.read(draw.randint(1, n)), c, size=size))
        assert sum((ids for ids, _ in pieces), []) == whole and "".join(t for _, t in pieces) == text
        most = max(most, len(pieces))
    assert most > 50  # it does cut


def test_line_ends_of_a_file_are_kept(bundled, tmp_path):
    model, tokenizer = bundled
    text = "a = 1\r\nb = 2\r\n\r\nc\rd\n"
    (tmp_path / "dos").write_bytes(text.encode())
    assert same(State(model).prefill(tmp_path / "dos", tokenizer, None), State(model).prefill(text, tokenizer, None))


@pytest.mark.parametrize("more, says", [(b"y = 2\n", None), (b"y\xff\n", "text has changed, and is not UTF-8 text now")])
def test_a_file_that_is_written_to_while_it_is_read(bundled, tmp_path, more, says):
    (model, tokenizer), text, n = bundled, tmp_path / "text", 0
    text.write_text("x = 1\n" * 2000)
    source = Source(text, tokenizer, model.args, True)
    try:
        for ids, _ in source:
            if not n: text.write_bytes(text.read_bytes() + more * 2000)
            n += ids.size
        assert not says and n == len(encode(tokenizer, text.read_text(), model.args))
    except StateError as e: assert says and says in str(e)


# ---------------------------------------------------------------- scores

def test_score_is_the_loss_of_transformers():
    folder = HERE / "fixtures" / "hf_tiny"
    model, ref = load(folder, mx.float32)[0], mx.load(str(folder / "reference.safetensors"))
    model.args.max_inference_chunksize = 33
    scores = [score(model, None, row.tolist()) for row in ref["input_ids"]]
    assert abs(-np.mean([s.logprobs[1:].mean() for s in scores]) - ref["loss"].item()) < 1e-5
    for s, ids, z in zip(scores, np.array(ref["input_ids"]), np.array(ref["logits"]).astype(np.float64)):
        want = z[np.arange(len(ids) - 1), ids[1:]] - np.log(np.exp(z[:-1]).sum(-1))
        assert np.isnan(s.logprobs[0]) and np.abs(s.logprobs[1:] - want).max() < 1e-4
        assert abs(s.perplexity / np.exp(-want.mean()) - 1) < 1e-5


def test_score_of_a_stack_after_a_saved_state(tmp_path):
    model, _ = load(STACK, mx.float32)
    ids = np.random.default_rng(0).integers(0, 60, 600).tolist()
    whole = score(model, None, ids)
    State(model).read(ids[:123]).save(tmp_path / "s")
    begin = State.load(tmp_path / "s", model)
    rest = score(model, None, ids[123:], begin)
    assert np.abs(rest.logprobs - whole.logprobs[123:]).max() < 1e-4 and begin.tokens == 123 and rest.state.tokens == 600
    with pytest.raises(StateError, match="batch size must be 1, got 2"): score(model, None, ids, batch([begin, begin]))


def test_a_runner_goes_on_from_a_file(bundled, tmp_path):
    model, tokenizer = bundled
    a, b = xLSTMRunner(model, tokenizer), xLSTMRunner(model, tokenizer)
    a.generate("import os\n", max_tokens=5)
    a.state.save(tmp_path / "s")
    b.state = State.load(tmp_path / "s", model)
    assert a.generate("def main(", max_tokens=20) == b.generate("def main(", max_tokens=20) and same(a.state, b.state)
