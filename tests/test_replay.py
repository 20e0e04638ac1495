"Tokens that are taken back have never been read; mlx-lm's speculative decoding says what plain decoding says."
import mlx.core as mx
import pytest
from mlx_lm.generate import generate_step, speculative_generate_step
from mlx_lm.models.cache import can_trim_prompt_cache, trim_prompt_cache

import xlstm_metal as xm
from xlstm_metal.blocks import discovery # registers the kinds of blocks
from xlstm_metal.generation.compiled_step import step_choices
from xlstm_metal.generation.state import State
from xlstm_metal.wiring.cache import CacheError
from xlstm_metal.wiring.run import layer_wiring
from xlstm_metal.wiring import ablate
from xlstm_metal.wiring.wiring import AutoNCPxLSTMWiring, Neuron, SkipWiring, xLSTMWiring

D, V, L = 32, 60, 6
KINDS = ["mlstm", "slstm", "attention", "conv", "ffn", "mamba2"]


def first_paper(): # the mLSTM with a convolution
    return Neuron("mlstm", 0, D, dict(num_heads=2, inner_dims=64, qkv_size=4, kernel_size=4))


def delays():
    w = xLSTMWiring([Neuron("mlstm", 0, D), Neuron("slstm", 1, D), Neuron("slstm", 1, D), Neuron("conv", 2, D)])
    w.add_synapse(2, 1, -1, delay=1), w.add_synapse(3, 3, 1, delay=1), w.add_synapse(0, 3, 1, delay=1)
    return w


WIRINGS = {kind: lambda kind=kind: layer_wiring([kind, kind], D) for kind in KINDS if kind != "ffn"} | {
    "first paper": lambda: xLSTMWiring([first_paper()]), "all": lambda: SkipWiring([Neuron(k, j, D, {}, "channel") for j, k in enumerate(KINDS)]),
    "delays": delays, "circuit": lambda: AutoNCPxLSTMWiring(9, 2, .3, 3, kinds={"inter": "conv", "command": "slstm", "motor": "attention"}, dims=D)}


@pytest.fixture(params=WIRINGS)
def model(request):
    mx.random.seed(0)
    model = xm.Model(WIRINGS[request.param](), V).eval()
    for name, w in model.named_modules(): # memories that matter
        for key in ("weight", "bias"):
            if key in w and isinstance(w[key], mx.array) and ("gate" in name or "conv" in name): w[key] = w[key] + .3 * mx.random.normal(w[key].shape)
    return model


def close(a, b): return mx.abs(a - b).max().item() < 2e-4 * (1 + mx.abs(b).max().item())


def trimmed(cache, n): # all slots
    for slot in cache: slot.trim(n)


def ids(*shape): return mx.random.randint(0, V, shape)


@pytest.mark.parametrize("before", [[3], [1, 4, 1, 1, 6], [40], [6, 6, 6, 1, 1, 1, 1, 1, 1, 1]], ids=str)
def test_trim_and_continue(model, before):
    "After pieces of these lengths, up to L tokens are taken back at a time, and others are read."
    mx.random.seed(1)
    cache, kept, plain = model.make_cache(replay=L), [], model.make_cache()
    pieces = [ids(1, n) for n in before]
    for piece in pieces: assert close(model(piece, cache), model(piece, plain))
    text = mx.concatenate(pieces, 1)
    for n, more in ((0, 1), (1, 3), (2, 2), (3, 6), (5, 5), (6, 9), (2, 1)):
        n = min(n, text.shape[1])
        trimmed(cache, n)
        new = ids(1, more)
        text = mx.concatenate([text[:, :text.shape[1] - n], new], 1)
        want = model(text)[:, -more:]
        assert close(model(new, cache), want)
    whole = model.make_cache()
    model(text, whole)
    for slot, other in zip(cache, whole):
        for a, b in zip(slot.plain().cache, other.cache, strict=True): assert a.shape == b.shape and close(a, b)
    ordinary = [slot.plain() for slot in cache]
    assert close(model(new, ordinary), model(new, whole))


def test_back_to_nothing(model):
    cache = model.make_cache(replay=L)
    model(ids(1, 4), cache)
    trimmed(cache, 4)
    new = ids(1, 5)
    assert close(model(new, cache), model(new))


def test_rows_take_back_different_numbers(model):
    mx.random.seed(2)
    text, lengths, lost, more = ids(3, 20), [20, 2, 11], [0, 2, 5], ids(3, 9)
    cache = model.make_cache(replay=L)
    for slot in cache: slot.prepare(lengths=lengths)
    model(text, cache)
    for slot in cache: slot.finalize()
    trimmed(cache, lost)
    got = model(more[:, :4], cache)
    rows = [mx.concatenate([text[r:r + 1, :lengths[r] - lost[r]], more[r:r + 1, :4]], 1) for r in range(3)]
    for r in range(3): assert close(got[r], model(rows[r])[0, -4:])
    trimmed(cache, [4, 1, 3])
    rows = [mx.concatenate([row[:, :row.shape[1] - n], more[r:r + 1, 4:]], 1) for r, (row, n) in enumerate(zip(rows, (4, 1, 3)))]
    got = model(more[:, 4:], cache)
    for r in range(3): assert close(got[r], model(rows[r])[0, -5:])
    # one leaves, the others go on; then they meet again
    alone = [slot.extract(1) for slot in cache]
    for slot in cache: slot.filter(mx.array([0, 2]))
    trimmed(alone, 3)
    trimmed(cache, [1, 0])
    rows[1], rows[0] = rows[1][:, :-3], rows[0][:, :-1]
    rows = [rows[0], rows[2], rows[1]]
    for slot, other in zip(cache, alone): slot.extend(other)
    singles = [[slot.extract(r) for slot in cache] for r in range(3)]
    merged = [type(slots[0]).merge(list(slots)) for slots in zip(*singles)]
    for batch in (cache, merged):
        got = model(more[:, :3], batch)
        for r in range(3): assert close(got[r], model(mx.concatenate([rows[r], more[r:r + 1, :3]], 1))[0, -3:])
        trimmed(batch, 2)
        got = model(more[:, 5:7], batch)
        for r in range(3): assert close(got[r], model(mx.concatenate([rows[r], more[r:r + 1, :1], more[r:r + 1, 5:7]], 1))[0, -2:])


def test_padded_pieces_between_others(model):
    "Short and long pieces whose rows have different lengths, some none, behind tokens that are kept."
    mx.random.seed(3)
    cache, rows = model.make_cache(replay=L), [mx.zeros((1, 0), mx.int32)] * 3
    def read(n, lengths):
        new = ids(3, n)
        for slot in cache: slot.prepare(lengths=lengths)
        got = model(new, cache)
        for slot in cache: slot.finalize()
        for r, m in enumerate(lengths):
            rows[r] = mx.concatenate([rows[r], new[r:r + 1, :m]], 1)
            if m: assert close(got[r, :m], model(rows[r])[0, -m:])
    def take(lost):
        trimmed(cache, lost)
        rows[:] = [row[:, :row.shape[1] - n] for row, n in zip(rows, lost)]
    read(5, [5, 5, 5])
    read(4, [4, 1, 0])
    take([2, 3, 4])
    read(3, [2, 3, 1])
    for _ in range(3):
        read(5, [5, 1, 0])
        take([4, 0, 0])
    take([1, 5, 0])
    read(12, [12, 2, 9])
    assert [slot.cache[-1].tolist() for slot in cache] == [[6, 2, 6]] * len(cache)
    with pytest.raises(CacheError): trimmed(cache, [6, 3, 6])
    take([6, 2, 6])
    read(2, [2, 2, 2])


def test_too_many_are_refused(model):
    cache = model.make_cache(replay=L)
    assert can_trim_prompt_cache(cache) and trim_prompt_cache(cache, 0) == 0
    model(ids(1, 3), cache)
    with pytest.raises(CacheError, match=r"cannot take back 4 tokens: of the last 6 .* \[3\] are there"): trim_prompt_cache(cache, 4)
    assert trim_prompt_cache(cache, 2) == 2
    with pytest.raises(CacheError): trim_prompt_cache(cache, 2)
    model(ids(1, 20), cache)
    with pytest.raises(CacheError): trim_prompt_cache(cache, 7)
    assert trim_prompt_cache(cache, 6) == 6


def test_default_is_off(model):
    assert not any(slot.is_trimmable() for slot in model.make_cache())
    assert {type(slot).__name__ for slot in model.make_cache()} == {"ArraysCache"}


@pytest.fixture(scope="module")
def bundled(): return xm.load(dtype=mx.float32)


PROMPTS = ["class A:\n", "x", "def read(path, mode='r'):\n    with open(", "import os\nimport sys\n\ndef main(argv):\n    for name in"]


@pytest.mark.parametrize("drafted", [1, 4, 7])
def test_speculative_decoding_of_the_bundled_model(bundled, drafted):
    "mlx-lm's function, with a draft that is right often and not always."
    model, tokenizer = bundled
    draft, _ = xm.load(dtype=mx.float32)
    draft.wiring = ablate(draft.wiring, 3)
    accepted = 0
    for text in PROMPTS:
        prompt = mx.array(tokenizer.encode(text))
        want = [t for t, _ in generate_step(prompt, model, max_tokens=30)]
        cache = model.make_cache(replay=drafted) + draft.make_cache(replay=drafted)
        got = list(speculative_generate_step(prompt, model, draft, num_draft_tokens=drafted, max_tokens=30, prompt_cache=cache, prefill_step_size=5))
        assert [t for t, *_ in got] == want
        accepted += sum(by_draft for *_, by_draft in got)
        # and the cache is where the text ends: a last token that was drafted has been read, one of the model's own has not
        whole, plain, read = model.make_cache(), [slot.plain() for slot in cache[:len(model.layers)]], want if got[-1][2] else want[:-1]
        model(mx.concatenate([prompt, mx.array(read)])[None], whole)
        assert close(model(mx.array([[300]]), plain), model(mx.array([[300]]), whole))
    assert 10 < accepted < 115


def test_observers_see_states_as_blocks_have_them(bundled):
    from xlstm_metal.wiring.run import Observer
    model, _ = bundled
    class Shapes(Observer):
        def begin(self): self.seen = []
        def after_block(self, j, block, given, returned): self.seen.append((j, type(block), [a.shape for a in returned[1]]))
    seen = []
    for cache in (model.make_cache(), model.make_cache(replay=L)):
        model.backbone.observer = Shapes()
        model(ids(1, 3), cache)
        seen.append(model.backbone.observer.seen)
        model.backbone.observer = None
    assert seen[0] == seen[1] and len(seen[0]) == len(model.layers)


def test_a_compiled_step_keeps_a_log():
    "Recorded once for each length of the log; what is taken back is as it is without."
    mx.random.seed(3)
    model = xm.Model(layer_wiring(["mlstm", "slstm"], 16, dict(num_heads=2)), V).eval()
    def run(how, most):
        logits, state = [], State(model, replay=most).read([1, 2, 3])
        def feed(ids):
            for t in ids:
                state.feed(mx.array([t]))
                logits.append(state.logits)
        with step_choices(model, how):
            feed(range(6 + 4 * most))
            state.trim(most)
            feed(range(10, 14))
            recorded = getattr(vars(model).get("_step"), "function", None) is not None
        assert recorded == (how != "eager")
        return mx.stack(logits)
    mx.enable_compile()
    try:
        for most in (1, 3): assert mx.abs(run("compiled", most) - run("eager", most)).max() < 1e-5
    finally: mx.disable_compile()
