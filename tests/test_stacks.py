"""Stacks of mLSTM and sLSTM blocks against fixtures made by NX-AI's package (`tests/fixtures/make.py`).

Folders with a config.json of the first paper and a reference.safetensors under $XLSTM_METAL_FIXTURES are tested too.
"""
import json
import os
from functools import partial
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from safetensors.numpy import load_file, save_file

import xlstm_metal as xm
from xlstm_metal import metal
from xlstm_metal.generation.generate import Sampling, tokens
from xlstm_metal.generation.state import State
from xlstm_metal.blocks import block
from xlstm_metal.blocks.mlstm import mLSTMBlock
from xlstm_metal.files import CheckpointError, read_json
from xlstm_metal.model.checkpoint import info, load
from xlstm_metal.model.config import StackLayout
from xlstm_metal.train.train import lm_loss
from xlstm_metal.wiring.wiring import Neuron

HERE = Path(__file__).parent / "fixtures"
MORE = Path(os.environ.get("XLSTM_METAL_FIXTURES", HERE))
FOLDERS = sorted({f.parent for root in (HERE, MORE) for f in root.resolve().rglob("reference.safetensors")
                  if StackLayout().detect(read_json(f.parent / "config.json"))})
TINY = HERE / "stack_tiny"


def read(folder):
    "A model and the answers it has to give."
    return load(folder, mx.float32)[0], mx.load(str(folder / "reference.safetensors"))


@pytest.fixture(params=FOLDERS, ids=lambda f: f.name, scope="module")
def case(request): return read(request.param)


@pytest.fixture
def on_the_host(monkeypatch):
    "Kernels run by the CPU from their Metal text; none may fall back to its plain form unseen."
    monkeypatch.setenv("XLSTM_METAL_KERNELS", "host")
    metal.launch_counts.clear()
    yield
    assert {where for _, where in metal.launch_counts} == {"host"}
    assert {"causal_conv1d", "slstm_sequence"} < {name for name, _ in metal.launch_counts}


def as_stored(slot):
    """The states of a block with upstream's names, scales and shapes.

    Upstream scales keys before it stores them, this package scales queries. Upstream keeps one input of the
    convolution more than the next token needs: the oldest, which cannot be compared."""
    conv = {"conv_state.0": slot[-1]}
    if slot[0].ndim == 4:
        C, n, m, _ = slot
        scale = C.shape[2] ** -0.5
        return {"mlstm_state.0": C * scale, "mlstm_state.1": n[..., None] * scale, "mlstm_state.2": m[..., None]} | conv
    return {"slstm_state.0": mx.stack([s.flatten(1) for s in slot[:4]])} | conv


def check(ref, logits, cache):
    "Logits, and all states after the last token."
    assert mx.abs(logits - ref["logits"]).max() < 1e-4
    ours = {f"state.block_{b}.{name}": s for b, slot in enumerate(cache) for name, s in as_stored(slot.cache).items()}
    assert ours.keys() == {name for name in ref if name.startswith("state.")}
    for name, s in ours.items():
        want = ref[name][:, 1:] if "conv_state" in name else ref[name]
        assert s.shape == want.shape and mx.abs(s - want).max() < 1e-4, name


def check_gradients(model, ref):
    "The loss, and its gradient in every parameter."
    loss, grads = nn.value_and_grad(model, partial(lm_loss, model))(ref["input_ids"])
    assert abs(loss.item() - ref["loss"].item()) < 1e-4
    ours = {"_recurrent_kernel_": "recurrent_kernel", "_bias_": "bias"}
    want = {".".join(ours.get(part, part) for part in name.split(".")[1:]): g
            for name, g in ref.items() if name.startswith("grad.")}
    grads = dict(tree_flatten(grads))
    assert grads.keys() == want.keys()
    for name, g in grads.items():
        assert g.shape == want[name].shape, name
        assert mx.abs(g - want[name]).max() <= 1e-3 * mx.abs(want[name]).max(), name


def test_full_pass(case):
    model, ref = case
    cache = model.make_cache()
    check(ref, model(ref["input_ids"], cache), cache)
    assert mx.abs(model(ref["input_ids"]) - ref["logits"]).max() < 1e-4


@pytest.mark.parametrize("step", [1, 13, 64])
def test_in_pieces(case, step):
    model, ref = case
    ids, cache = ref["input_ids"], model.make_cache()
    out = [model(ids[:, t:t + step], cache) for t in range(0, ids.shape[1], step)]
    check(ref, mx.concatenate(out, 1), cache)


def test_greedy(case):
    model, ref = case
    if "greedy" not in ref: pytest.skip("this reference has no greedy tokens")
    for row in ref["greedy"].tolist():
        n = len(row) - 20
        state = State(model).read(row[:n])
        assert [t for _, (t, _) in zip(range(20), tokens(state, Sampling()))] == row[n:]


def test_loss_and_gradients(case): check_gradients(*case)


@pytest.mark.parametrize("step", [1, 67])
def test_kernels(on_the_host, step):
    model, ref = read(TINY)
    ids, cache = ref["input_ids"], model.make_cache()
    out = [model(ids[:, t:t + step], cache) for t in range(0, ids.shape[1], step)]
    check(ref, mx.concatenate(out, 1), cache)


def test_kernels_gradients(on_the_host): check_gradients(*read(TINY))


# Loading: the other layout, and folders that are not what they say.
@pytest.fixture
def rewritten(tmp_path):
    "Write the tiny stack anew after a change to its tensors or settings."
    def write(change=lambda tensors: None, **settings):
        tensors = load_file(TINY / "model.safetensors")
        change(tensors)
        save_file({name: np.ascontiguousarray(a) for name, a in tensors.items()}, tmp_path / "model.safetensors")
        (tmp_path / "config.json").write_text(json.dumps(read_json(TINY / "config.json") | settings))
        return tmp_path
    return write


def refusal(folder):
    "The message that loading ends with."
    with pytest.raises(CheckpointError) as error: load(folder, mx.float32)
    return str(error.value)


BLOCK = "xlstm_block_stack.blocks.0.xlstm."
KERNEL, BIAS = (BLOCK + "slstm_cell." + name for name in ("_recurrent_kernel_", "_bias_"))


def turn(tensors):
    "Recurrent kernels (H, in, gate and out) and biases by head, gate, unit: upstream's CUDA layout."
    for name in [name for name in tensors if name.endswith("_recurrent_kernel_")]:
        heads, rows, size = tensors[name].shape
        tensors[name] = tensors[name].swapaxes(1, 2)
        bias = name.replace("_recurrent_kernel_", "_bias_")
        tensors[bias] = tensors[bias].reshape(4, heads, size).swapaxes(0, 1).flatten()


@pytest.mark.parametrize("files", [1, 2])
def test_cuda_layout_is_the_same_model(rewritten, files):
    folder, (_, ref) = rewritten(turn), read(TINY)
    if files == 2:  # a bias must know its kernel's layout from another file
        tensors = load_file(folder / "model.safetensors")
        (folder / "model.safetensors").unlink()
        for n, bias in enumerate((True, False)):
            part = {name: a for name, a in tensors.items() if name.endswith("_bias_") is bias}
            save_file(part, folder / f"model-{n + 1:05d}-of-00002.safetensors")
    model, _ = load(folder, mx.float32)
    assert model.args.layout.name == "stack"
    assert mx.abs(model(ref["input_ids"]) - ref["logits"]).max() < 1e-4


def test_kernel_of_neither_layout(rewritten):
    def change(tensors): tensors[KERNEL] = tensors[KERNEL].reshape(3, 16, 16)[:, :, :12]
    message = refusal(rewritten(change))
    assert f"{KERNEL} has shape (3, 16, 12): neither (H, 4 DH, DH) nor (H, DH, 4 DH)" in message


def test_block_map_that_disagrees_with_the_tensors(rewritten):
    message = refusal(rewritten(_block_map="0,1,0", slstm_at=[1]))
    assert message.startswith("config.json says block 0 is of kind mlstm, but ") and "makes it slstm" in message


def test_block_map_that_disagrees_with_slstm_at(rewritten):
    assert "_block_map '1,0,1' and slstm_at [1] describe different stacks" in refusal(rewritten(slstm_at=[1]))


@pytest.mark.parametrize("name", [BIAS, BLOCK + "group_norm.weight", "xlstm_block_stack.blocks.1.xlstm.learnable_skip",
                                  "lm_head.weight", "xlstm_block_stack.post_blocks_norm.weight"])
def test_missing_tensor(rewritten, name):
    message = refusal(rewritten(lambda tensors: tensors.pop(name)))
    ours = name.replace("_bias_", "bias")  # the model's own name: MLX takes a leading underscore for private
    assert message.replace("_bias_", "bias") == f"{ours} is missing from the checkpoint"


def test_bias_without_its_kernel(rewritten):
    message = refusal(rewritten(lambda tensors: tensors.pop(KERNEL)))
    assert message == f"{BIAS} is stored without {KERNEL} (in model.safetensors)"


def test_misshapen_tensor(rewritten):
    name = BLOCK + "zgate.weight"
    def change(tensors): tensors[name] = tensors[name][:, :4]
    assert refusal(rewritten(change)) == f"{name} in model.safetensors has shape (3, 4, 8), the model needs (3, 8, 8)"


def test_unexpected_tensor(rewritten):
    name = BLOCK + "zgate.bias"
    folder = rewritten(lambda tensors: tensors.update({name: np.zeros(24, np.float32)}))
    assert refusal(folder) == f"{name} in model.safetensors is not part of the model"
    load(folder, mx.float32, strict=False)


def test_a_tied_head_is_counted_once(tmp_path):
    "Upstream's state dict holds a tied head a second time."
    config = json.loads((HERE / "stack_tiny/config.json").read_text()) | {"tie_weights": True}
    weights = mx.load(str(HERE / "stack_tiny/model.safetensors"))
    mx.save_safetensors(str(tmp_path / "model.safetensors"), weights)
    (tmp_path / "config.json").write_text(json.dumps(config))
    i = info(tmp_path)
    model, _ = load(tmp_path, mx.float32)
    assert i.parameters == sum(a.size for _, a in tree_flatten(model.parameters())) and "tied" in i.layout


def test_a_cell_that_defines_a_kind_anew(monkeypatch, tmp_path):
    "Its class is made from then on, where that of the package was; a model file that holds modules of the package says so."
    monkeypatch.setattr(block, "kinds", list(block.kinds))
    old = block.find_kind(Neuron("mlstm", 0, 16))
    class mLSTMBlock2(mLSTMBlock): pass
    block.block("mlstm", "xLSTM 7B", old.defaults, old.prefix, old.tensors, old.flags, old.derive)(mLSTMBlock2)
    assert type(block.make_block(Neuron("mlstm", 0, 16))) is mLSTMBlock2 and len(block.kinds) == len({(k.name, k.form) for k in block.kinds})
    with pytest.warns(UserWarning, match="blocks of kind mlstm were defined anew"): xm.convert(None, tmp_path / "copy", to="mlx", dequantize=True)
    monkeypatch.setattr(block, "functions", dict(block.functions))
    for factor in (1, 2):
        @block.block_function
        def scaled(x): return factor * x
    assert block.make_block(Neuron("scaled", 0, 2))(mx.ones((1, 1, 2)))[0].tolist() == [[[2, 2]]]
    def other(x): return x
    other.__name__, other.__module__ = "scaled", "elsewhere"
    with pytest.raises(block.BlockError, match="another function named scaled"): block.block_function(other)
