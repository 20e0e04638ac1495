"What is recorded of a model's cells, against fixtures of transformers and NX-AI's package and against loops in float64."
from pathlib import Path

import matplotlib
import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from xlstm_metal.blocks.slstm import sLSTMCell, trace_slstm
from xlstm_metal.generation.memory_plots import horizon, plot_gates, plot_memory, plot_state_norms, plot_surprise
from xlstm_metal.generation.memory_plots import record, Trace, watch
from xlstm_metal.generation.score import score
from xlstm_metal.generation.state import State, batch
from xlstm_metal.apps.playground import memories_html
from xlstm_metal.model.checkpoint import load
from xlstm_metal.numerics import soft_cap
from xlstm_metal.model.model import Model
from xlstm_metal.wiring.wiring import Neuron, xLSTMWiring

FIXTURES = Path(__file__).parent / "fixtures"


@pytest.fixture(params=["hf_tiny", "stack_tiny"])
def case(request):
    folder = FIXTURES / request.param
    return load(folder, mx.float32)[0], mx.load(str(folder / "reference.safetensors"))


def last_sizes(ref, kinds):
    "Logarithms of the sizes of C and c after the last token, from states that the original packages computed."
    for b, kind in enumerate(kinds):
        if f"state.{b}.c" in ref: C, m = ref[f"state.{b}.c"], ref[f"state.{b}.m"]
        elif kind == "mlstm":
            C, _, m = (ref[f"state.block_{b}.mlstm_state.{j}"] for j in range(3))
            C, m = C * C.shape[2] ** .5, m[..., 0]  # upstream scales keys before it stores them
        else:
            _, C, _, m = ref[f"state.block_{b}.slstm_state.0"].reshape(4, len(ref["input_ids"]), 3, -1)
        C, m = (np.array(a, np.float64) for a in (C, m))
        B, NH = C.shape[:2]
        yield np.log(np.linalg.norm((C.reshape(B, NH, -1) * np.exp(m.reshape(B, NH, -1))), axis=-1))


def test_memories_are_those_of_the_originals(case):
    model, ref = case
    with watch(model) as trace: logits = model(ref["input_ids"])
    assert mx.abs(logits - ref["logits"]).max() < 1e-4
    for ours, want in zip(trace["memory"], last_sizes(ref, [n.kind for n in trace.neurons]), strict=True):
        assert np.abs(ours[..., -1] - want).max() < 1e-4


def test_watching_changes_nothing(case):
    model, ref = case
    ids = ref["input_ids"][:, :33]
    classes = lambda: [type(m) for m in model.modules()]
    before, names, kinds = model(ids), [n for n, _ in tree_flatten(model.parameters())], classes()
    with watch(model) as trace:
        assert mx.array_equal(model(ids), before)
        assert [n for n, _ in tree_flatten(model.parameters())] == names
    with pytest.raises(ZeroDivisionError), watch(model): 1 / 0
    assert classes() == kinds and mx.array_equal(model(ids), before) and len(trace) == 33  # nothing is added any more


def test_an_interrupted_pass_leaves_no_trace(case, monkeypatch):
    model, ref = case
    ids = ref["input_ids"][:1, :20]
    last = type(model.layers[-1])
    whole = record(model, None, ids)
    call = last.__call__

    def stop(self, *args):
        if self is model.layers[-1]: raise KeyboardInterrupt
        return call(self, *args)
    with watch(model) as trace:
        monkeypatch.setattr(last, "__call__", stop)
        with pytest.raises(KeyboardInterrupt): model(ids)
        monkeypatch.undo()
        model(ids)
    for name in Trace.names:
        for a, b in zip(trace[name], whole[name]): assert np.array_equal(a, b)


def sigmoid(x): return 1 / (1 + np.exp(-x))


def test_gates_of_an_slstm_by_its_definition():
    "Step by step in float64 and without stabiliser (arXiv 2405.04517, eq. 8-14), from an initial state."
    mx.random.seed(0)
    B, NH, S, DH = 2, 3, 21, 5
    cell = sLSTMCell(NH * DH, NH)
    cell.recurrent_kernel = .5 * mx.random.normal(cell.recurrent_kernel.shape)
    x = mx.random.normal((B, NH, S, 4, DH))
    _, state = cell(mx.random.normal((B, NH, 4, 4, DH)))
    i, log_f, memory, read = map(np.array, trace_slstm(cell, x, state).values())

    X, R, b = (np.array(a, np.float64) for a in (x, cell.recurrent_kernel.reshape(NH, 4, DH, DH), cell.bias.reshape(4, NH, DH).swapaxes(0, 1)))
    y, c, n, m = (np.array(a, np.float64) for a in state)
    c, n = c * np.exp(m), n * np.exp(m)
    for t in range(S):
        gates = X[:, :, t] + np.einsum("hgij,bhj->bhgi", R, y) + b
        gi, gf, gz, go = (gates[:, :, g] for g in range(4))
        c, n = sigmoid(gf) * c + np.exp(gi) * np.tanh(gz), sigmoid(gf) * n + np.exp(gi)
        y = sigmoid(go) * c / n
        for ours, want in ((i, gi.mean(-1)), (log_f, np.log(sigmoid(gf)).mean(-1)), (memory, np.log(np.linalg.norm(c, axis=-1))), (read, np.sqrt((y**2).mean(-1)))):
            assert np.abs(ours[..., t] - want).max() < 1e-4, t


def test_a_block_that_is_used_twice():
    "A wiring in which two neurons share the weights of one block: each has its own record."
    model, _ = load(FIXTURES / "hf_tiny", mx.float32)
    ids = mx.array([[3, 1, 4, 1, 5, 9]])
    size = model.wiring.neurons[0].dims
    model.wiring = xLSTMWiring([Neuron("mlstm", w, size) for w in (0, 1, 0)])
    trace = record(model, None, ids)
    assert len(trace["input"]) == 3 and not np.allclose(trace["input"][0], trace["input"][2])
    x, seen = model.backbone.embeddings(ids), []
    for w in (0, 1, 0):
        seen.append(model.layers[w].mlstm_layer.igate_preact(model.layers[w].norm_mlstm(x)))
        x, _ = model.layers[w](x)
    for ours, want in zip(trace["input"], seen): assert np.abs(ours - np.array(soft_cap(want, model.layers[0].mlstm_layer.gate_soft_cap).swapaxes(1, 2))).max() < 1e-5


def test_pictures_show_the_numbers(case):
    model, ref = case
    matplotlib.use("agg")
    ids = ref["input_ids"][0, :40].tolist()
    trace = record(model, None, ids)
    rows = lambda values: np.concatenate([v[0] for v in values])
    shown = [ax.images[0].get_array() for ax in (*plot_gates(trace).axes, *plot_memory(trace, [f"t{j}" for j in ids]).axes) if ax.images]
    for image, want in zip(shown, (rows([horizon(f) for f in trace["log_forget"]]), *(rows(trace[n]) for n in ("input", "memory", "read"))), strict=True):
        assert np.allclose(image, want, atol=1e-6)
    state = State(model).read(ids)
    C = plot_state_norms(state).axes[0].images[0].get_array()
    for j, memory in enumerate(trace["memory"]): assert np.abs(C[:memory.shape[1], j] - memory[0, :, -1]).max() < 1e-4
    both = plot_state_norms(batch([State(model).read([1]), state]), row=1).axes[0].images[0].get_array()
    assert np.allclose(both, C, equal_nan=True)
    with pytest.raises(ValueError, match="cannot plot an empty state"): plot_state_norms(State(model))
    matplotlib.pyplot.close("all")


def test_surprise_of_any_text():
    "Line breaks, tabs, half characters, formulas and the end of the page."
    matplotlib.use("agg")
    model, tokenizer = load(dtype=mx.float32)
    text = "# Gruße, naïve $x_1$ \\alpha\n\n\tif x:\r\n" + "x = 1; " * 30 + "\n" * 30 + "end"
    s = score(model, tokenizer, text)
    fig = plot_surprise(s, tokenizer, lines=30)
    drawn = [t.get_text() for t in fig.axes[0].texts]
    assert "".join(drawn).startswith("<|endoftext|># Gruße, naïve $x_1$ \\alpha    if x:") and "end" not in drawn[-1]
    fig.savefig("/dev/null", format="png")
    assert len(plot_surprise(s, tokenizer, lines=99).axes[0].texts) > len(drawn)
    matplotlib.pyplot.close("all")


def test_wirings_of_any_kind():
    "Blocks without a cell, two cells in a circle that take turns, and learned sums: watched, and not changed by it."
    mx.random.seed(0)
    neurons = [Neuron(kind, j, 16, {}, "gated") for j, kind in enumerate(("conv", "mlstm", "slstm", "attention"))]
    wiring = xLSTMWiring(neurons)
    wiring.add_synapse(2, 1, -1, delay=1)
    model = Model(wiring, 40).eval()
    ids = mx.random.randint(0, 40, (2, 9))
    before = model(ids)
    with watch(model) as trace: assert mx.array_equal(model(ids), before)
    assert trace.indices == [1, 2] and len(trace) == 9
    assert [a.shape for a in trace["memory"]] == [(2, 4, 9)] * 2 and np.ptp(trace["memory"][0], axis=-1).min() > 0
    names = lambda ticks: [t.get_text() for t in ticks]
    for fig in (plot_gates(trace), plot_memory(trace)): assert names(fig.axes[0].get_yticklabels()) == ["mlstm 1", "slstm 2"]
    assert names(plot_state_norms(State(model).read(ids[0].tolist())).axes[0].get_xticklabels()) == ["1", "2"]
    page = memories_html(trace)
    assert page.count(">mlstm 1<") == page.count(">slstm 2<") == 4


def test_models_without_a_cell_say_so():
    model = Model(xLSTMWiring([Neuron("attention", 0, 16), Neuron("conv", 1, 16)]), 40).eval()
    trace, state = record(model, None, [1, 2, 3]), State(model).read([1, 2, 3])
    assert len(trace) == 0 and "no mLSTM and no sLSTM" in memories_html(trace)
    for draw in (lambda: plot_gates(trace), lambda: plot_memory(trace), lambda: plot_state_norms(state)):
        with pytest.raises(ValueError, match="cannot plot a model without mLSTM and sLSTM blocks"): draw()


def test_nothing_recorded_and_states_of_others():
    model, other = (load(FIXTURES / name, mx.float32)[0] for name in ("hf_tiny", "stack_tiny"))
    with watch(model) as trace: pass
    for draw in (plot_gates, plot_memory):
        with pytest.raises(ValueError, match="nothing was recorded"): draw(trace)
    with pytest.raises(ValueError, match="the state of another model"): record(model, None, [1, 2], State(other).read([1]))
