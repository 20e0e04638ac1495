"Gradients and edge cases of the cells, in all their forms: against float64, with planted faults."
import mlx.core as mx
import numpy as np
import pytest

from xlstm_metal import cells
from xlstm_metal.cells import mlstm_chunk_gradients as chunks

NAMES = "q k v i f C n m".split()
LONG = cells.mlstm_recurrent, cells.mlstm_recurrent_plain, cells.mlstm_parallel, cells.mlstm_chunkwise, cells.mlstm_chunkwise_plain
STEP = cells.mlstm_step, cells.mlstm_step_plain


@pytest.fixture(autouse=True)
def host(monkeypatch): monkeypatch.setenv("XLSTM_METAL_KERNELS", "host")


def name(f): return f"{f.__module__.split('.')[-1]}.{f.__name__}"


def exp(x):
    "MLX's own exp of a float64 is right to float32 only."
    return mx.power(mx.array(np.array(np.e), mx.float64), x) if x.dtype == mx.float64 else mx.exp(x)


def definition(q, k, v, i, f, state, mask=None, eps=1e-6):
    (C, n, m), hs, log_f = state, [], -mx.log1p(exp(-f))
    if mask is not None: i, log_f = mx.where(mask[:, None], i, -1e9), mx.where(mask[:, None], log_f, 0)
    for t in range(q.shape[2]):
        m1 = mx.maximum(log_f[..., t:t + 1] + m, i[..., t:t + 1])
        F, I, m = exp(log_f[..., t:t + 1] + m - m1), exp(i[..., t:t + 1] - m1), m1
        C = F[..., None] * C + (I * k[:, :, t])[..., None] * v[:, :, t, None]
        n, x = F * n + I * k[:, :, t], q[:, :, t] * q.shape[-1]**-.5
        den = mx.maximum(mx.abs((x * n).sum(-1)), exp(-m)[..., 0]) + eps
        hs.append((x[..., None] * C).sum(-2) / den[..., None])
    return mx.stack(hs, 2), (C, n, m)


def case(S=130, B=1, NH=2, DQK=16, DV=32, seed=0, i=(-2, 2), f=(3, 2), first=None, m=None, kept=None, empty=False):
    r = np.random.default_rng(seed)
    a = lambda *s: r.normal(size=(B, NH, *s)).astype(np.float32)
    x = [a(S, DQK), a(S, DQK), a(S, DV), i[0] + i[1] * a(S), f[0] + f[1] * a(S), a(DQK, DV), a(DQK), a(1)]
    if empty: x[5:] = [0 * v for v in x[5:]]
    if first is not None: x[3][:, :, 0] = first
    if m is not None: x[7][:] = m
    mask = None if kept is None else r.random((B, S)) < kept
    if mask is not None: mask[:, 0] = True
    return [v.astype(np.float32) for v in x], mask, [a(S, DV), a(DQK, DV), a(DQK), a(1)]


def grads(form, x, mask, weights, last, dtype=mx.float32):
    "Gradients of a loss of the read-outs behind a LayerNorm and, with `last`, of the last state."
    mask = None if mask is None else mx.array(mask)
    with mx.stream(mx.cpu):
        x, (w, *ws) = ([mx.array(v, dtype) for v in a] for a in (x, weights))
        def loss(*z):
            h, state = form(*z[:5], tuple(z[5:]), mask)
            h = h - h.mean(-1, keepdims=True)
            h = w * h / mx.sqrt((h * h).mean(-1, keepdims=True) + 1e-6)
            if mask is not None: h = mx.where(mask[:, None, :, None], h, 0)
            return h.sum() + sum((a * b).sum() for a, b in zip(state, ws) if last)
        return [np.array(g, np.float64) for g in mx.grad(loss, argnums=list(range(8)))(*x)]


def errors(form, last=False, **kw):
    x, mask, weights = case(**kw)
    pairs = zip(NAMES, grads(form, x, mask, weights, last), grads(definition, x, mask, weights, last, mx.float64))
    return {n: np.linalg.norm(a - b) / max(np.linalg.norm(b), 1e-30) for n, a, b in pairs}


TOKEN = dict(i=(-10, 0), f=(6, 0), first=15, empty=True)
MEMORY = dict(i=(-10, 0), f=(6, 0), m=15)


@pytest.mark.parametrize("last", (False, True))
@pytest.mark.parametrize("kw", (TOKEN, TOKEN | dict(S=64), TOKEN | dict(S=17), TOKEN | dict(kept=.6, S=200), MEMORY, MEMORY | dict(f=(4.5, 1), kept=.7)))
def test_gates_where_one_token_dominates(kw, last):
    e = errors(cells.mlstm_chunkwise, last, **kw)
    assert all(e[n] < 1e-4 for n in "vif"), e
    if "m" in kw: assert e["m"] < 1e-4 and e["C"] < 1e-4, e


@pytest.mark.parametrize("kw, broken", ((TOKEN, "if"), (MEMORY, "fm")))
def test_sums_that_cancel_would_be_noticed(monkeypatch, kw, broken):
    right = chunks._gate_gradients
    monkeypatch.setattr(chunks, "_gate_gradients", lambda *a: right(*a[:5], 0 * a[5], a[6]))
    e = errors(cells.mlstm_chunkwise, **kw)
    assert all(e[n] > .1 for n in broken), e


@pytest.mark.parametrize("last", (False, True))
@pytest.mark.parametrize("kw", (dict(), dict(S=300), dict(S=65), dict(kept=.7), dict(i=(-10, 1), f=(4.5, 1), S=200), dict(i=(-10, 1), f=(4.5, 1), empty=True),
                                dict(i=(0, 6), f=(0, 8)), dict(i=(-30, 1), f=(-2, 1), empty=True)))
def test_gradients_elsewhere(kw, last):
    e = errors(cells.mlstm_chunkwise, last, **kw)
    assert all(e[n] < 1e-5 for n in "qkviC"), e
    assert max(e["f"], e["m"]) < 2e-4, e # next to nothing behind a norm in some of the cases, as n is in all


@pytest.mark.parametrize("form", (*LONG, *STEP), ids=name)
def test_no_token_is_refused(form):
    x = [mx.zeros((1, 2, 0, 4))] * 2 + [mx.zeros((1, 2, 0, 6))] + [mx.zeros((1, 2, 0))] * 2
    with pytest.raises(ValueError, match="one token"): form(*x)
    if form in STEP:
        with pytest.raises(ValueError, match="takes one token, got 2"): form(*[mx.zeros((1, 2, 2, *a.shape[3:])) for a in x])


@pytest.mark.parametrize("form", (cells.causal_conv1d, cells.causal_conv1d_plain), ids=name)
def test_a_convolution_of_no_token_is_refused(form):
    with pytest.raises(ValueError, match="one token"): form(mx.zeros((1, 0, 5)), mx.zeros((5, 1, 4)), mx.zeros((5,)))


@pytest.mark.parametrize("S", (1, 9, 70))
@pytest.mark.parametrize("form", (*LONG, *STEP), ids=name)
def test_what_is_masked_stays_where_it_is(form, S):
    if (form in STEP) != (S == 1): pytest.skip("another form's length")
    x, mask, _ = case(S, B=2, kept=.6)
    mask[0, 0] = mask[1, -1] = False
    x, mask = [mx.array(v) for v in x], mx.array(mask)
    def dirty(a): return mx.where(mask.reshape(2, 1, S, *[1] * (a.ndim - 3)), a, mx.nan)
    h, state = form(*x[:5], tuple(x[5:]), mask)
    for j in range(5):
        got, last = form(*[dirty(a) if n == j else a for n, a in enumerate(x[:5])], tuple(x[5:]), mask)
        for a, b in zip(last, state): assert mx.array_equal(a, b), NAMES[j]
        kept = mask[:, None, :, None]
        assert mx.array_equal(mx.where(kept, got, 0), mx.where(kept, h, 0)), NAMES[j]
        if j: assert mx.array_equal(got, h), NAMES[j] # a query is read where it stands
    def loss(k, v, i, f):
        h, state = form(x[0], k, v, i, f, tuple(x[5:]), mask)
        return (h * h).sum() + sum(a.sum() for a in state)
    for g in mx.grad(loss, argnums=[0, 1, 2, 3])(*map(dirty, x[1:5])): assert mx.isfinite(g).all()


@pytest.mark.parametrize("form", (*LONG, *STEP), ids=name)
def test_small_stabilisers(form):
    "exp(-m) leaves the range of float32 at m = -88; h is right as far as numbers go that are not subnormal."
    for m in (-1, -60, -79, -81, -85, -87, -90, -100, -130, -300):
        x, _, _ = case(1 if form in STEP else 40, i=(m - 10, 1), f=(15, 0), m=m)
        with mx.stream(mx.cpu): want = np.array(definition(*(wide := [mx.array(v, mx.float64) for v in x])[:5], tuple(wide[5:]))[0])
        x = [mx.array(v) for v in x]
        h, _ = form(*x[:5], tuple(x[5:]))
        assert np.abs(np.array(h, np.float64) - want).max() < 2e-5 * np.abs(want).max() + 1.2e-38 * 50, m
        for g in mx.grad(lambda *z: form(*z[:5], tuple(z[5:]))[0].sum(), argnums=list(range(8)))(*x): assert mx.isfinite(g).all(), m
