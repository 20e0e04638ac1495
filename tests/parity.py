"""Random models of transformers and of NX-AI's `xlstm`, saved by their own code, loaded by this package, and compared.

    pip install torch==2.13.0 && pip install -e '.[parity]'
    python tests/parity.py [--seed N] [--draws N] [--only TEXT]

Prints one row per configuration and exits with 1 if any is out of its limits: fp32 logits 1e-4 absolute,
states 1e-4 absolute or of a state's largest number where that is above 1, loss 1e-5, gradients 1e-3 of each tensor's largest entry, greedy tokens identical. In the rows of cells the column of
logits is h over 1 + |h|, and the references work in float64. A bfloat16 model has no exact answer: its logits may be
twice as far from the fp32 reference as those of transformers' own bfloat16 model, its fp32 states no further.
Rows of stacks are the first paper's models (`xlstm.xLSTMLMModel`), held against its full pass and against its steps.
Rows of TiRex are forecasters of `tirex-ts` with its sLSTM in float32 (it rounds to bfloat16): quantiles, in standard deviations of the window,
and the gradient of their weighted sum.
"""
import argparse
import json
import os
import sys
import tempfile
import time
import traceback
import unittest.mock
from dataclasses import asdict, dataclass, field
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from zlib import crc32

from xlstm_metal.blas import use_openblas

os.environ["MLX_DISABLE_COMPILE"] = "1"  # hundreds of shapes, each used once: compiling costs more than it saves
use_openblas()  # before MLX is imported, whose own products take ten times as long

import mlx.core as mx  # noqa: E402
import mlx.nn as nn  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
import yaml  # noqa: E402
from mlx.utils import tree_flatten  # noqa: E402
from safetensors.torch import save_file  # noqa: E402
from transformers.utils import logging  # noqa: E402

from fixtures.make import hf_gradients, hf_greedy, hf_model, hf_run, randomise, xLSTMForCausalLM  # noqa: E402
from fixtures.make import stack_gradients, stack_greedy, stack_model, stack_steps  # noqa: E402

import xlstm_metal as xm  # noqa: E402
from xlstm_metal.cells import mlstm_chunk_gradients as chunk_gradients  # noqa: E402
from xlstm_metal.cells.mlstm_chunks import mlstm_chunkwise_plain  # noqa: E402
from xlstm_metal.cells.mlstm import mlstm_parallel, mlstm_recurrent_plain, mlstm_step_plain  # noqa: E402
from xlstm_metal.generation.score import score  # noqa: E402
from xlstm_metal.model.convert import convert  # noqa: E402
from xlstm_metal.train.train import lm_loss  # noqa: E402

LIMITS = dict(logits=1e-4, state=1e-4, loss=1e-5, grad=1e-3)  # of a state: of its largest number where that is above 1, sums of many tokens grow
STEPS = 12  # tokens fed one by one, and tokens generated


def to_mx(x):
    "A torch tensor as an mlx array."
    return mx.array(x.detach().float().numpy() if x.is_floating_point() else x.numpy())


def distance(ours, theirs):
    "Largest absolute difference, infinite where the shapes differ or a value is not finite."
    a, b = np.array(ours.astype(mx.float32), np.float64), theirs.detach().double().numpy()
    if a.shape != b.shape: return np.inf
    d = np.abs(a - b)
    return float(d.max()) if np.isfinite(d).all() else np.inf


def relative(ours, theirs, floor=1e-12):
    "Largest absolute difference over the largest entry of the reference, or over the floor where that is larger."
    return distance(ours, theirs) / max(theirs.abs().max().item(), floor)


@dataclass
class Answer:
    "What a reference computes from `ids`, which are vectors where there is no vocabulary."
    ids: torch.Tensor
    logits: torch.Tensor
    states: list
    greedy: torch.Tensor | None = None  # its first `prompt` tokens are those of ids
    prompt: int = 0
    loss: torch.Tensor | None = None
    grads: dict = field(default_factory=dict)
    steps: torch.Tensor | None = None  # logits of its own token-by-token form
    weights: torch.Tensor | None = None  # the loss is their weighted mean of the output instead of a cross entropy


@dataclass
class Row:
    "One line of the table; `notes` say what is out of its limits."
    name: str
    config: dict
    values: dict = field(default_factory=dict)
    notes: list = field(default_factory=list)
    seconds: float = 0.0

    def put(self, key, value, what="", limits=LIMITS):
        "Keep the worst value of a column, and a note if it is beyond the limit."
        self.values[key] = max(value, self.values.get(key, 0.0))
        if not value <= limits[key]: self.notes.append(f"{key} {what}: {value:.2e} > {limits[key]:.1e}")

    def __str__(self):
        cell = lambda key: f"{self.values[key]:>9.1e}" if key in self.values else f"{'-':>9}"
        greedy = {True: "equal", False: "DIFFER", None: "-"}[self.values.get("greedy")]
        return (f"{self.name:<28}{sizes_text(self.config):<31}{self.config['length']:>4}{cell('logits')}{cell('state')}"
                f"{greedy:>8}{cell('loss')}{cell('grad')}{self.seconds:>6.1f}  {'FAIL' if self.notes else 'OK'}")


HEADER = (f"{'configuration':<28}{'sizes':<31}{'S':>4}{'|dlogit|':>9}{'|dstate|':>9}{'greedy':>8}"
          f"{'|dloss|':>9}{'rel grad':>9}{'s':>6}")


# ---------------------------------------------------------------- the two references

def tokens(seed, vocab, batch, length):
    "Random ids without the special tokens."
    return torch.randint(3, vocab, (batch, length), generator=torch.Generator().manual_seed(seed))


def hf_case(folder, seed, batch, length, vocab, shard=None, store=None, grads=True, **sizes):
    "A transformers checkpoint in `folder` and what transformers computes from it."
    model = hf_model(seed, vocab_size=vocab, **sizes)
    if store: model = model.to(store)
    model.save_pretrained(folder, **({"max_shard_size": shard} if shard else {}))
    model = model.float()  # the reference computes in fp32 on exactly the stored weights
    ids = tokens(seed + 1, vocab, batch, length)
    logits, cache = hf_run(model, ids)
    answer = Answer(ids, logits, list(cache.rnn_state.values()), prompt=max(1, length - STEPS))
    answer.greedy = hf_greedy(model, ids[:, :answer.prompt], STEPS)
    if grads and length > 1: answer.loss, answer.grads = hf_gradients(model, ids)
    return answer


def xlstm_case(folder, seed, batch, length, vocab, files=1, store=None, weight_mode="single", **sizes):
    """An NX-AI folder (config.yaml, model_0.safetensors ...) and what `xLSTMLarge` computes.

    The package reads this layout but has no writer; `xlstm_files` writes what its reader takes."""
    from xlstm.xlstm_large.from_pretrained import load_from_pretrained
    from xlstm.xlstm_large.model import xLSTMLarge, xLSTMLargeConfig
    from xlstm.xlstm_large.utils import convert_single_weights_to_fused_weights

    config = xLSTMLargeConfig(vocab_size=vocab, mode="inference", return_last_states=True,
                              chunkwise_kernel="chunkwise--native_autograd", step_kernel="native",
                              sequence_kernel="native_sequence__native", autocast_kernel_dtype="float32", **sizes)
    model = single = randomise(xLSTMLarge(config).eval(), seed)
    if store: single.to(store).float()  # rounded in place: the reference computes in fp32 on the stored weights
    if weight_mode == "fused":  # gradients stay with the single twin: its names are ours
        config = xLSTMLargeConfig(**{**asdict(config), "weight_mode": "fused"})
        model = xLSTMLarge(config).eval()
        model.load_state_dict(convert_single_weights_to_fused_weights(dict(single.state_dict())))
    xlstm_files(folder, model, files, store)
    if weight_mode == "single": model = single = load_from_pretrained(folder).eval()  # its reader takes the folder

    ids = tokens(seed + 1, vocab, batch, length)
    with torch.no_grad():
        logits, state = model(ids)
        answer = Answer(ids, logits, list(state.values()), prompt=max(1, length - STEPS))
        new, _ = model.generate(ids[:, :answer.prompt], STEPS)
    answer.greedy = torch.cat([ids[:, :answer.prompt], new], 1)
    if length > 1:
        out = single(ids)[0]
        answer.loss = torch.nn.functional.cross_entropy(out[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        answer.loss.backward()
        answer.grads = {name.replace("embedding.", "backbone.embeddings.") if name.startswith("embedding.") else name:
                        p.grad for name, p in single.named_parameters()}
    return answer


def xlstm_files(folder, model, files, store=None):
    "Write a folder in NX-AI's layout with its weights in so many files."
    tensors = [(name, t.to(store or t.dtype)) for name, t in model.state_dict().items()]
    per_file = -(-len(tensors) // files)
    for n in range(files):
        part = tensors[n * per_file:(n + 1) * per_file]
        save_file({name: t.contiguous() for name, t in part}, Path(folder) / f"model_{n}.safetensors")
    (Path(folder) / "config.yaml").write_text(yaml.safe_dump(asdict(model.config)))


def stack_case(folder, seed, batch, length, vocab=None, context=None, store=None, backend="vanilla", files=1,
               suffix="json", short=False, head=True, **sizes):
    """A folder with one of NX-AI's models of the first paper and what that model computes, at once and step by step.

    `context` is the longest sequence its full pass reads: beyond it a twin without that limit gives the full pass and
    the gradients. `short` writes only the settings that were asked for, as a person would."""
    build = lambda context: stack_model(seed, vocab_size=vocab, context_length=context, **sizes)
    model = full = build(context or length)
    if store: model.to(store).float()  # rounded in place: the reference computes in fp32 on the stored weights
    if context and context < length:
        full = build(length)
        full.load_state_dict(model.state_dict())
    tensors = {name: t.clone() for name, t in model.state_dict().items() if head or name != "lm_head.weight"}
    if backend == "cuda": tensors |= cuda_layout(model)
    stack_files(folder, tensors, settings(model, vocab, backend, short, sizes), files, suffix, store)

    draw = torch.Generator().manual_seed(seed + 1)
    if vocab: ids = tokens(seed + 1, vocab, batch, length)
    else: ids = torch.randn(batch, length, model.config.embedding_dim, generator=draw)
    steps, state = stack_steps(model, ids)
    with torch.no_grad():
        answer = Answer(ids, full(ids), stack_states(state, model.config), steps=steps)
    answer.prompt = max(1, length - STEPS)
    if vocab: answer.greedy = stack_greedy(model, ids[:, :answer.prompt], STEPS)
    else: answer.weights = torch.randn(steps.shape, generator=draw)
    if length > 1 or not vocab:
        answer.loss, grads = stack_gradients(full, ids, answer.weights)
        ours = {"_recurrent_kernel_": "recurrent_kernel", "_bias_": "bias"}
        answer.grads = {".".join(ours.get(part, part) for part in name.split(".")): g for name, g in grads.items()}
    return answer


def settings(model, vocab, backend, short, sizes):
    "What the config file of a stack says."
    if not short:
        said = asdict(model.config)
        if said["slstm_block"]: said["slstm_block"]["slstm"]["backend"] = backend
        return said
    mlstm, slstm, feedforward = (sizes.get(kind) for kind in ("mlstm", "slstm", "feedforward"))
    said = {name: x for name, x in sizes.items() if name not in ("blocks", "mlstm", "slstm", "feedforward")}
    if vocab: said["vocab_size"] = vocab
    if mlstm is not None: said["mlstm_block"] = {"mlstm": mlstm}
    if slstm is not None: said["slstm_block"] = {"slstm": slstm, "feedforward": feedforward or {}}
    at = [n for n, kind in enumerate(sizes["blocks"]) if kind == "s"]
    return said | dict(num_blocks=len(sizes["blocks"]), slstm_at="all" if len(at) == len(sizes["blocks"]) else at)


def cuda_layout(model):
    "Recurrent kernels and their biases as a model on a GPU stores them, turned by the package itself."
    from xlstm.blocks.slstm.cell import sLSTMCell_cuda

    out = {}
    for name, cell in model.named_modules():
        if not name.endswith("slstm_cell"): continue
        twin = sLSTMCell_cuda(cell.config, skip_backend_init=True)
        out[f"{name}._recurrent_kernel_"] = twin._recurrent_kernel_ext2int(cell.recurrent_kernel.clone()).detach()
        out[f"{name}._bias_"] = twin._bias_ext2int(cell.bias.clone()).detach()
    return out


def stack_files(folder, tensors, said, files, suffix, store):
    "Write config.json or config.yaml, and the weights in so many files: a cell's tensors may lie in two."
    names = ["model.safetensors"] if files == 1 else [f"model_{n}.safetensors" for n in range(files)]
    for n, file in enumerate(names):
        part = {name: tensors[name].to(store or torch.float32).contiguous() for name in list(tensors)[n::files]}
        save_file(part, Path(folder) / file)
    (Path(folder) / f"config.{suffix}").write_text((json.dumps if suffix == "json" else yaml.safe_dump)(said))


def stack_states(state, config):
    "NX-AI's states as this package keeps them: C and n of unscaled keys, one input of the convolution less."
    out = []
    for block in state.values():
        kept = () if block["conv_state"] is None else (block["conv_state"][0][:, 1:],)
        if "mlstm_state" in block:
            C, n, m = block["mlstm_state"]
            out.append((C * C.shape[-1] ** 0.5, n[..., 0] * C.shape[-1] ** 0.5, m[..., 0], *kept))
        else: out.append((*block["slstm_state"].unflatten(-1, (config.slstm_block.slstm.num_heads, -1)), *kept))
    return out


# ---------------------------------------------------------------- this package

def run(model, ids, pieces):
    "Feed ids in pieces through one cache; all logits and the states after the last."
    cache, logits, at = model.make_cache(), [], 0
    for n in pieces:
        logits.append(model(ids[:, at:at + n], cache=cache))
        mx.eval(logits[-1], [c.cache for c in cache])
        at += n
    return mx.concatenate(logits, 1), [c.cache for c in cache]


def greedy(model, prompt, new):
    "The prompt and `new` greedy tokens after it."
    cache, out = model.make_cache(), [prompt]
    for _ in range(new):
        out.append(mx.argmax(model(out[-1], cache=cache)[:, -1:], -1))
        mx.eval(out[-1])
    return mx.concatenate([x.astype(mx.int32) for x in out], 1)


def splits(length, one_by_one=False):
    "The ways to feed a sequence: at once, in two uneven pieces with the last tokens one by one, or all one by one."
    yield "at once", [length]
    if one_by_one: yield "one by one", [1] * length
    tail = min(STEPS, length - 1)
    head = length - tail
    cut = head * 2 // 3
    if length > 1: yield "in pieces", [n for n in (cut, head - cut) if n] + [1] * tail


def compare(row, folder, answer, dtype=mx.float32, limits=LIMITS):
    "Load the folder with this package and put all differences into the row."
    model, tokenizer = xm.load(str(folder), dtype=dtype)
    assert (tokenizer is None) != (Path(folder) / "tokenizer.json").exists(), "a tokenizer where there is none, or none where there is one"
    ids = to_mx(answer.ids)
    row.put("logits", distance(model(ids), answer.logits), "without cache", limits)
    for what, pieces in splits(ids.shape[1], answer.steps is not None):
        logits, states = run(model, ids, pieces)
        row.put("logits", distance(logits, answer.logits), what, limits)
        if answer.steps is not None: row.put("logits", distance(logits, answer.steps), f"{what} vs steps", limits)
        assert len(states) == len(answer.states), f"{len(states)} states for {len(answer.states)} blocks"
        for block, (ours, theirs) in enumerate(zip(states, answer.states)):
            assert len(ours) == len(theirs), f"block {block} has {len(ours)} states for {len(theirs)}"
            names = ("C", "n", "m", "conv") if theirs[0].ndim == 4 else ("y", "c", "n", "m", "conv")
            for name, a, b in zip(names, ours, theirs):
                assert a.dtype == mx.float32, f"state {name} is {a.dtype}"
                row.put("state", relative(a, b, 1), f"{name} of block {block} {what}", limits)
    if dtype != mx.float32: return

    if answer.greedy is not None:
        same = np.array(greedy(model, ids[:, :answer.prompt], STEPS)) == answer.greedy.numpy()
        row.values["greedy"] = bool(same.all())
        if not row.values["greedy"]: row.notes.append("greedy tokens differ")
    if answer.loss is not None:
        model.train()
        weighted = lambda m: (m(ids) * to_mx(answer.weights)).mean()
        objective = weighted if answer.weights is not None else lambda m: lm_loss(m, ids)
        loss, grads = nn.value_and_grad(model, objective)(model)
        grads = dict(tree_flatten(grads))
        row.put("loss", distance(loss.reshape(1), answer.loss.reshape(1)))
        if answer.weights is None:
            model.eval()
            judged = np.mean([-score(model, None, one).logprobs[1:] for one in np.array(ids)], dtype=np.float64)
            row.put("loss", abs(judged - answer.loss.item()), "of score")
        if different := set(grads) ^ set(answer.grads): row.notes.append(f"parameters differ: {sorted(different)}")
        # the head norm takes the scale out that an input-gate bias shifts: its gradient may cancel to almost nothing
        floor = 1e-3 * max(g.abs().max().item() for g in answer.grads.values())
        for name in sorted(set(grads) & set(answer.grads)):
            row.put("grad", relative(grads[name], answer.grads[name], floor), name)


# ---------------------------------------------------------------- cells

def cell_inputs(seed, batch, heads, length, dqk, dv, igate, fgate):
    "Float32 inputs of one mLSTM cell, with a state that is not empty."
    rng = np.random.default_rng(seed)
    draw = lambda *shape, mean=0.0, std=1.0: rng.normal(mean, std, (batch, heads, *shape)).astype(np.float32)
    return dict(q=draw(length, dqk), k=draw(length, dqk), v=draw(length, dv), i=draw(length, mean=igate, std=2.0),
                f=draw(length, mean=fgate, std=2.0), C=draw(dqk, dv), n=draw(dqk), m=draw(1))


def cell_weights(seed, batch, heads, length, dqk, dv):
    "Random weights that make a loss of h and of the state; exp(m_T) makes C_T and n_T independent of the stabiliser."
    rng = np.random.default_rng(seed)
    shapes = (length, dv), (dqk, dv), (dqk,)
    return [rng.normal(size=(batch, heads, *shape)).astype(np.float32) for shape in shapes]


def cell_loss(lib, h, state, weights):
    "The loss of a cell in torch or mlx."
    C, n, m = state
    w, wC, wn = weights
    return (h * w).sum() + (C * lib.exp(m)[..., None] * wC).sum() + (n * lib.exp(m) * wn).sum()


def torch_cell(kernel, x, weights, **kwargs):
    "h, state and gradients of an mlstm_kernels form in float64."
    leaves = {name: torch.tensor(a, dtype=torch.float64, requires_grad=True) for name, a in x.items()}
    q, k, v, i, f, C, n, m = leaves.values()
    h, state = kernel(q=q, k=k, v=v, i=i, f=f, c_initial=C, n_initial=n, m_initial=m, return_last_states=True, **kwargs)
    loss = cell_loss(torch, h, state, [torch.tensor(w, dtype=torch.float64) for w in weights])
    return h, state, dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values()))))


def mx_cell(form, x, weights):
    "h, state and gradients of one of our forms."
    weights = [mx.array(w) for w in weights]

    def loss(x):
        h, state = form(*[x[name] for name in "qkvif"], state=(x["C"], x["n"], x["m"]))
        return cell_loss(mx, h, state, weights), h, state

    (_, h, state), grads = mx.value_and_grad(loss)({name: mx.array(a) for name, a in x.items()})
    return h, state, grads


def stepped(q, k, v, i, f, state):
    "`mlstm_step_plain` over a sequence."
    hs = []
    for t in range(q.shape[2]):
        h, state = mlstm_step_plain(*[x[:, :, t:t + 1] for x in (q, k, v, i, f)], state)
        hs.append(h)
    return mx.concatenate(hs, 2), state


def compare_cell(row, seed, batch, heads, length, dqk, dv, chunk, igate=-2.0, fgate=3.0):
    "Our four forms of the cell against mlstm_kernels' native recurrent and chunkwise forms in float64."
    from mlstm_kernels.torch.chunkwise.native import mlstm_chunkwise__native_autograd
    from mlstm_kernels.torch.kernel_wrappers import wrap_chunkwise__arbitrary_sequence_length_with_padding as padded
    from mlstm_kernels.torch.recurrent import mlstm_recurrent_sequence__native_fw

    x = cell_inputs(seed, batch, heads, length, dqk, dv, igate, fgate)
    weights = cell_weights(seed + 1, batch, heads, length, dqk, dv)
    references = {"recurrent": torch_cell(mlstm_recurrent_sequence__native_fw, x, weights, dtype_state=torch.float64)}
    if length > 1:  # one token takes the step kernel, which works in fp32
        references["chunkwise"] = torch_cell(padded, x, weights, chunk_size=chunk, dtype_state=torch.float64,
                                             mlstm_chunkwise_kernel=mlstm_chunkwise__native_autograd,
                                             mlstm_sequence_kernel=None, mlstm_step_kernel=None)
    forms = {"recurrent": mlstm_recurrent_plain, "parallel": mlstm_parallel, "step": stepped,
             "chunkwise": lambda *a, state: mlstm_chunkwise_plain(*a, state=state, chunk_size=chunk),
             "chunkwise 64": lambda *a, state: mlstm_chunkwise_plain(*a, state=state)}
    if length > 80: forms.pop("step")  # the loop is that of the recurrent form
    for form, fn in forms.items():
        h, state, grads = mx_cell(fn, x, weights)
        for reference, (h_ref, state_ref, grads_ref) in references.items():
            what = f"{form} vs {reference}"
            scale = 1 + h_ref.abs()  # h reaches 1e2 where |q.n| is small
            row.put("logits", distance(h / to_mx(scale), h_ref / scale), f"h {what}")
            for name, a, b in zip("Cnm", state, state_ref): row.put("state", relative(a, b, 1), f"{name} {what}")
            for name, g in grads_ref.items(): row.put("grad", relative(grads[name], g), f"{name} {what}")


# ---------------------------------------------------------------- the configurations

HF = {  # transformers needs head sizes whose totals are multiples of 64
    "plain":          dict(batch=2, length=200, vocab=97, hidden_size=128, num_heads=4, num_hidden_layers=2, chunk_size=16),
    "one head":       dict(batch=1, length=64, vocab=33, hidden_size=128, num_heads=1, num_hidden_layers=1),
    "biases":         dict(batch=2, length=65, vocab=64, hidden_size=128, num_heads=8, num_hidden_layers=2, use_bias=True,
                           chunk_size=32),
    "wide values":    dict(batch=1, length=127, vocab=50, hidden_size=64, num_heads=2, num_hidden_layers=3, qk_dim_factor=1.0,
                           v_dim_factor=2.0, ffn_proj_factor=1.3, chunk_size=64),
    "caps and eps":   dict(batch=3, length=15, vocab=40, hidden_size=128, num_heads=2, num_hidden_layers=2, gate_soft_cap=4.0,
                           output_logit_soft_cap=8.0, norm_eps=1e-3, eps=1e-2, ffn_round_up_to_multiple_of=32),
    "three heads":    dict(batch=2, length=63, vocab=71, hidden_size=192, num_heads=3, num_hidden_layers=1, qk_dim_factor=1.0),
    "one token":      dict(batch=2, length=1, vocab=64, hidden_size=128, num_heads=2, num_hidden_layers=2),
    "sharded":        dict(batch=1, length=16, vocab=64, hidden_size=128, num_heads=2, num_hidden_layers=2, shard="300KB",
                           chunk_size=16),
    # two switches that transformers writes into the config and ignores: the tensors are there and count
    "tied":           dict(batch=1, length=16, vocab=64, hidden_size=64, num_heads=2, num_hidden_layers=1, qk_dim_factor=1.0,
                           tie_word_embeddings=True),
    "no out norm":    dict(batch=1, length=16, vocab=64, hidden_size=64, num_heads=2, num_hidden_layers=1, qk_dim_factor=1.0,
                           add_out_norm=False),
    "short prefill":  dict(batch=1, length=200, vocab=64, hidden_size=128, num_heads=4, num_hidden_layers=1, chunk_size=16,
                           max_inference_chunksize=48, grads=False),
    "bf16 file":      dict(batch=2, length=65, vocab=64, hidden_size=128, num_heads=4, num_hidden_layers=2, store=torch.bfloat16),
}
XLSTM = {
    "single":         dict(batch=2, length=65, vocab=50, embedding_dim=96, num_heads=3, num_blocks=2, chunk_size=16),
    "fused":          dict(batch=1, length=127, vocab=64, embedding_dim=60, num_heads=5, num_blocks=2, weight_mode="fused",
                           chunk_size=32),
    "biases":         dict(batch=2, length=63, vocab=40, embedding_dim=64, num_heads=2, num_blocks=2, use_bias=True,
                           chunk_size=16),
    "fused biases":   dict(batch=3, length=16, vocab=40, embedding_dim=64, num_heads=4, num_blocks=1, use_bias=True,
                           weight_mode="fused"),
    "bf16 file":      dict(batch=2, length=15, vocab=40, embedding_dim=64, num_heads=2, num_blocks=2, store=torch.bfloat16),
    "three files":    dict(batch=1, length=200, vocab=30, embedding_dim=80, num_heads=2, num_blocks=3, qk_dim_factor=1.0,
                           v_dim_factor=0.5, ffn_proj_factor=1.7, ffn_round_up_to_multiple_of=16, files=3),
    "no caps":        dict(batch=2, length=16, vocab=30, embedding_dim=48, num_heads=2, num_blocks=1, gate_soft_cap=None,
                           output_logit_soft_cap=None),
    "caps, no norm":  dict(batch=2, length=64, vocab=30, embedding_dim=48, num_heads=2, num_blocks=2, gate_soft_cap=3.0,
                           output_logit_soft_cap=5.0, add_out_norm=False, norm_eps=1e-4, eps=1e-3),
}
STACK = {  # blocks of the first paper: m is mLSTM, s is sLSTM
    "m": dict(
        batch=2, length=65, vocab=50, blocks="mm", embedding_dim=48,
        mlstm=dict(num_heads=3, proj_factor=2.5, qkv_proj_blocksize=8, round_proj_up_to_multiple_of=24)),
    "s": dict(
        batch=2, length=63, vocab=50, blocks="ss", embedding_dim=60, mlstm={}, slstm=dict(num_heads=4)),
    "msm": dict(
        batch=2, length=130, vocab=64, blocks="msm", embedding_dim=64, mlstm=dict(num_heads=4),
        slstm=dict(num_heads=4), feedforward=dict(proj_factor=1.3, act_fn="gelu"), context=256),
    "biases": dict(
        batch=2, length=64, vocab=40, blocks="sm", embedding_dim=40, mlstm=dict(num_heads=1, qkv_proj_blocksize=16),
        slstm=dict(num_heads=2), feedforward=dict(bias=True, act_fn="swish", proj_factor=2.0), bias=True),
    "other taps": dict(
        batch=2, length=16, vocab=40, blocks="mss", embedding_dim=36, mlstm=dict(conv1d_kernel_size=7),
        slstm=dict(num_heads=3, conv1d_kernel_size=2), feedforward=dict(act_fn="relu^2")),
    "no convolution": dict(
        batch=2, length=33, vocab=40, blocks="smsm", embedding_dim=32, mlstm=dict(conv1d_kernel_size=2),
        slstm=dict(num_heads=1, conv1d_kernel_size=0), feedforward=dict(act_fn="selu")),
    "no norm behind": dict(
        batch=2, length=20, vocab=40, blocks="mms", embedding_dim=32, mlstm=dict(num_heads=2, qkv_proj_blocksize=2),
        slstm=dict(num_heads=2), add_post_blocks_norm=False,
        feedforward=dict(act_fn="relu", round_proj_up_dim_up=False, round_proj_up_to_multiple_of=16)),
    "tied": dict(
        batch=2, length=16, vocab=40, blocks="ms", embedding_dim=32, tie_weights=True, head=False,
        mlstm=dict(round_proj_up_dim_up=False, proj_factor=2.7), slstm={}, feedforward=dict(act_fn="sigmoid")),
    "tied, head kept": dict(
        batch=2, length=15, vocab=40, blocks="m", embedding_dim=32, tie_weights=True,
        mlstm=dict(qkv_proj_blocksize=1)),
    "all": dict(
        batch=2, length=40, vocab=40, blocks="sss", embedding_dim=30, slstm=dict(num_heads=2),
        feedforward=dict(proj_factor=1.7), short=True, suffix="yaml"),
    "short config": dict(
        batch=3, length=31, vocab=40, blocks="mmsm", embedding_dim=32, mlstm={}, slstm={}, feedforward={},
        short=True, suffix="yaml"),
    "one token": dict(
        batch=2, length=1, vocab=40, blocks="sm", embedding_dim=32, mlstm={}, slstm=dict(num_heads=2)),
    "cuda layout": dict(
        batch=2, length=50, vocab=40, blocks="sms", embedding_dim=48, mlstm={}, slstm=dict(num_heads=3),
        backend="cuda", files=5),
    "bare": dict(
        batch=2, length=48, blocks="msm", embedding_dim=40, mlstm={}, slstm=dict(num_heads=2)),
    "bare, no norm": dict(
        batch=2, length=24, blocks="sm", embedding_dim=40, mlstm={}, slstm={}, bias=True,
        add_post_blocks_norm=False, backend="cuda"),
    "past its context": dict(
        batch=2, length=100, vocab=40, blocks="smm", embedding_dim=48, mlstm={}, slstm=dict(num_heads=2), context=24),
    "bf16 file": dict(
        batch=2, length=65, vocab=40, blocks="ms", embedding_dim=32, mlstm={}, slstm=dict(num_heads=2),
        store=torch.bfloat16),
}
CELLS = {
    "odd sizes":      dict(batch=2, heads=3, length=70, dqk=8, dv=12, chunk=16),
    "one token":      dict(batch=3, heads=2, length=1, dqk=5, dv=7, chunk=16),
    "chunk and one":  dict(batch=1, heads=2, length=65, dqk=16, dv=32, chunk=32),
    "long":           dict(batch=1, heads=1, length=200, dqk=24, dv=40, chunk=128),
    "small gates":    dict(batch=2, heads=2, length=127, dqk=16, dv=16, chunk=32, igate=-10.0, fgate=4.5),
    "fast forgetting": dict(batch=2, heads=2, length=64, dqk=9, dv=33, chunk=64, igate=0.0, fgate=-6.0),
}
BF16 = dict(batch=2, length=64, vocab=64, hidden_size=128, num_heads=4, num_hidden_layers=2, store=torch.bfloat16,
            grads=False)

BUNDLED = dict(batch=1, length=150, vocab=4096, hidden_size=512, num_heads=4, num_hidden_layers=7)


def draw_sizes(rng, family):
    "A random configuration that the reference can run."
    pick = lambda *choices: choices[rng.integers(len(choices))]
    heads, blocks, batch = (int(n) for n in (pick(1, 2, 3, 4), rng.integers(1, 4), rng.integers(1, 4)))
    width = pick(64, 128, 192) if family == "transformers" else heads * 2 * int(rng.integers(6, 20))
    unit = 64 if family == "transformers" else 1  # transformers sizes its states in multiples of 64
    factors = [(qk, v) for qk in (0.5, 1.0, 1.5, 2.0) for v in (0.5, 1.0, 1.5, 2.0)
               if all(width * f % unit == 0 and width * f % heads == 0 for f in (qk, v))]
    if not factors: return draw_sizes(rng, family)
    qk, v = pick(*factors)
    sizes = dict(batch=batch, length=pick(1, 15, 16, 63, 64, 65, 127, 200, int(rng.integers(2, 100))),
                 vocab=int(rng.integers(16, 120)), num_heads=heads, qk_dim_factor=qk, v_dim_factor=v,
                 chunk_size=pick(16, 32, 64), ffn_proj_factor=round(float(rng.uniform(1, 3)), 3),
                 ffn_round_up_to_multiple_of=pick(8, 64), use_bias=pick(False, True), store=pick(None, torch.bfloat16),
                 gate_soft_cap=pick(5.0, 15.0), output_logit_soft_cap=pick(10.0, 30.0), eps=pick(1e-6, 1e-3),
                 norm_eps=pick(1e-6, 1e-4))
    if family == "transformers":
        return sizes | dict(hidden_size=width, num_hidden_layers=blocks, shard=pick(None, "200KB"))
    return sizes | dict(embedding_dim=width, num_blocks=blocks, files=pick(1, 2), add_out_norm=pick(True, False),
                        weight_mode=pick("single", "fused"))


def draw_stack(rng, kind):
    "A random stack of mLSTM blocks (m), of sLSTM blocks (s), or of both."
    pick = lambda *choices: choices[rng.integers(len(choices))]
    some = kind * int(rng.integers(1, 4)) if kind in ("m", "s") else "ms" + pick("", "m", "s", "ms")
    heads, mheads, qkv = (int(n) for n in (pick(1, 2, 3, 4), pick(1, 2, 3, 4), pick(1, 2, 4, 8)))
    width, unit = heads * int(rng.integers(12 // heads, 20)), mheads * qkv * pick(1, 2)  # upstream rounds sizes to units
    round_mlstm, round_ffn = (dict(proj_factor=round(float(rng.uniform(1, 3)), 3), round_proj_up_to_multiple_of=to,
                                   round_proj_up_dim_up=pick(True, to > width)) for to in (unit, pick(1, 8, 64)))
    bare, length = pick(True, False, False, False), pick(1, 2, 15, 63, 64, 65, 100, int(rng.integers(2, 100)))
    sizes = dict(
        batch=int(rng.integers(1, 4)), length=length, blocks="".join(rng.permutation(list(some))), embedding_dim=width,
        vocab=None if bare else int(rng.integers(16, 120)), context=pick(None, 128, max(1, length // 3)),
        mlstm=dict(num_heads=mheads, qkv_proj_blocksize=qkv, conv1d_kernel_size=pick(4, 4, 2, 3, 5), **round_mlstm),
        slstm=dict(num_heads=heads, conv1d_kernel_size=pick(4, 4, 0, 2, 3)), bias=pick(False, True),
        feedforward=dict(act_fn=pick("gelu", "relu", "relu^2", "sigmoid", "swish", "selu"), bias=pick(False, True),
                         **round_ffn),
        add_post_blocks_norm=pick(True, True, False), store=pick(None, None, torch.bfloat16), files=pick(1, 3),
        backend=pick("vanilla", "cuda"), suffix=pick("json", "yaml"), short=pick(False, True))
    return sizes if bare else sizes | pick({}, dict(tie_weights=True), dict(tie_weights=True, head=False))


def model_row(row, folder, make, seed):
    "A checkpoint of a reference against this package in fp32."
    compare(row, folder, make(folder, seed, **row.config))


def bf16_row(row, folder, seed):
    "A bfloat16 model against fp32, measured by how far off transformers' own bfloat16 model is."
    answer = hf_case(folder, seed, **row.config)
    half = xLSTMForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    logits, cache = hf_run(half, answer.ids)
    far = lambda a, b: (a.float() - b).abs().max().item()
    states = [relative(to_mx(a), b, 1) for ours, theirs in zip(cache.rnn_state.values(), answer.states) for a, b in zip(ours, theirs)]
    limits = dict(logits=2 * far(logits, answer.logits), state=max(states))
    compare(row, folder, answer, dtype=mx.bfloat16, limits=limits)


def long_chunks_row(row, folder, seed):
    "The same with the cell's form for long texts on a GPU: products in 16 bits, gates and states in float32."
    kept, chunk_gradients._chunk_length = chunk_gradients._chunk_length, lambda q, v: 16 if q.dtype == mx.bfloat16 and q.shape[2] > 16 else 0
    try: bf16_row(row, folder, seed)
    finally: chunk_gradients._chunk_length = kept


def bundled_row(row, folder, seed):
    "The model that comes with the package, its 4-bit weights as the numbers they stand for: transformers reads that copy."
    convert(None, (floats := Path(folder) / "floats"), dequantize=True, dtype="float32")
    model = xLSTMForCausalLM.from_pretrained(floats, dtype=torch.float32, autocast_kernel_dtype="float32").eval()
    ids = tokens(seed, row.config["vocab"], row.config["batch"], row.config["length"])
    logits, cache = hf_run(model, ids)
    answer = Answer(ids, logits, list(cache.rnn_state.values()), prompt=row.config["length"] - STEPS)
    answer.greedy = hf_greedy(model, ids[:, :answer.prompt], STEPS)
    answer.loss, answer.grads = hf_gradients(model, ids)
    compare(row, floats, answer)
    row.put("logits", distance(xm.load(dtype=mx.float32, quantize=False)[0](to_mx(ids)), logits), "of the file itself")


def cell_row(row, folder, seed):
    "A cell of mlstm_kernels against the four forms of this package."
    compare_cell(row, seed, **row.config)


TIREX = {
    "short": dict(batch=7, dims=32, heads=4, blocks=2, patch=8, hidden=24, context=96, length=5, at_once=1),
    "one head": dict(batch=7, dims=16, heads=1, blocks=1, patch=4, hidden=8, context=32, length=4, at_once=1),
    "patches one by one": dict(batch=7, dims=48, heads=2, blocks=3, patch=16, hidden=40, context=256, length=70, at_once=1),
    "patches at once": dict(batch=7, dims=48, heads=2, blocks=3, patch=16, hidden=40, context=256, length=70, at_once=5),
    "some at once": dict(batch=7, dims=64, heads=8, blocks=2, patch=8, hidden=64, context=64, length=61, at_once=3),
    "beyond the context": dict(batch=7, dims=32, heads=4, blocks=2, patch=8, hidden=32, context=32, length=60, at_once=2),
    "deep": dict(batch=7, dims=32, heads=4, blocks=10, patch=32, hidden=32, context=512, length=40, at_once=1),
    "published sizes": dict(batch=7, dims=512, heads=4, blocks=12, patch=32, hidden=2048, context=2048, length=64, at_once=2),
}


def tirex_row(row, folder, seed):
    "A forecaster of NX-AI's `tirex-ts` with random weights, through its own checkpoint."
    from fixtures.make_tirex import tirex_model, tirex_run, tirex_series
    from xlstm_metal.forecast.files import load_tirex
    from xlstm_metal.forecast.tirex import forecast_quantiles, scale_of, windows
    sizes = dict(row.config)
    length, at_once, context = sizes.pop("length"), sizes.pop("at_once"), sizes["context"]
    sizes.pop("batch")
    theirs, settings = tirex_model(seed, **sizes)
    torch.save({"hyper_parameters": settings, "state_dict": theirs.state_dict(), "epoch": 3}, Path(folder) / "model.ckpt")
    series = [s.astype(np.float32).astype(np.float64) for s in tirex_series(seed, context)]
    model, x = load_tirex(folder), windows(series, context)
    size = scale_of(x).size[..., None]
    got, want = forecast_quantiles(model, x, length, at_once), tirex_run(theirs, series, length, at_once)
    row.put("logits", distance(mx.array((got / size).astype(np.float32)), torch.tensor(want / size)), "quantiles")
    if sizes["dims"] > 256: return # minutes

    w = np.random.default_rng(seed).normal(size=(2, context // sizes["patch"], 9, sizes["patch"])).astype(np.float32)
    scaled = scale_of(x[:2]).apply(x[:2]).astype(np.float32)
    with unittest.mock.patch.object(torch, "bfloat16", torch.float32):
        (theirs._forward_model_tokenized(torch.tensor(scaled).unflatten(1, (-1, sizes["patch"]))).swapaxes(1, 2) * torch.tensor(w)).sum().backward()
    _, grads = nn.value_and_grad(model, lambda x: (model(x) * mx.array(w)).sum())(mx.array(scaled))
    theirs = model.sanitize({n: to_mx(p.grad) for n, p in theirs.named_parameters()})
    for name, g in tree_flatten(grads): row.put("grad", relative(g, torch.tensor(np.array(theirs[name]))), name)


def sizes_text(sizes):
    "D heads x blocks, vocabulary and chunk of a model, or the sizes of a cell."
    if "patch" in sizes: return "B{batch} D{dims} H{heads} L{blocks} P{patch} of {context}".format(**sizes)
    if "dqk" in sizes: return "B{batch} NH{heads} {dqk}x{dv} chunk {chunk}".format(**sizes)
    if "blocks" in sizes:
        parts = [sizes[kind] for kind in ("mlstm", "slstm") if sizes.get(kind) is not None]
        heads = "/".join(str(part.get("num_heads", 4)) for part in parts)
        vocab = f" V{sizes['vocab']}" if sizes.get("vocab") else ""
        return "B{batch} D{embedding_dim} H{heads} {blocks}".format(heads=heads, **sizes) + vocab
    width = sizes.get("hidden_size") or sizes.get("embedding_dim")
    blocks = sizes.get("num_hidden_layers") or sizes.get("num_blocks")
    return f"B{sizes['batch']} D{width} H{sizes['num_heads']} L{blocks} V{sizes['vocab']} chunk {sizes.get('chunk_size', 64)}"


def rows(seed, draws):
    "Every configuration: its row and the function that fills it. Seeds hang on names: a new row leaves the others alone."
    rng = np.random.default_rng(seed)
    own = lambda name: 1000 * seed + crc32(name.encode()) % 1000
    for family, make, table in (("transformers", hf_case, HF), ("xlstm", xlstm_case, XLSTM)):
        for name, sizes in {**table, **{f"drawn {n}": draw_sizes(rng, family) for n in range(draws)}}.items():
            yield Row(f"{family} {name}", sizes), partial(model_row, make=make, seed=own(name))
    kinds = [(kind, n) for kind in ("m", "s", "mixed") for n in range(draws)]
    for name, sizes in {**STACK, **{f"drawn {kind} {n}": draw_stack(rng, kind) for kind, n in kinds}}.items():
        yield Row(f"stack {name}", sizes), partial(model_row, make=stack_case, seed=own(name))
    yield Row("transformers bundled", BUNDLED), partial(bundled_row, seed=own("bundled"))
    yield Row("transformers bf16", BF16), partial(bf16_row, seed=own("bf16"))
    yield Row("transformers bf16 chunks", BF16), partial(long_chunks_row, seed=own("bf16"))
    for name, sizes in TIREX.items() if find_spec("tirex") else ():
        yield Row(f"tirex {name}", sizes), partial(tirex_row, seed=own(name))
    for name, sizes in CELLS.items():
        yield Row(f"cell {name}", sizes), partial(cell_row, seed=own(name))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0, help="of weights, tokens and cell inputs")
    parser.add_argument("--only", default="", help="rows whose name holds this text")
    parser.add_argument("--draws", type=int, default=3, help="random configurations of each reference beside the listed")
    parser.add_argument("--trace", action="store_true", help="show the traceback of an error")
    args = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()

    if not find_spec("tirex"): print("no rows of TiRex: pip install scikit-learn, and --no-deps tirex-ts==1.4.2")
    print(HEADER)
    failed = total = 0
    for row, fill in rows(args.seed, args.draws):
        if args.only not in row.name: continue
        start = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            try: fill(row, folder)
            except Exception as error:  # one broken configuration must not hide the others
                if args.trace: traceback.print_exc()
                row.notes.append(f"{type(error).__name__}: {error}")
        row.seconds = time.perf_counter() - start
        notes = [*row.notes[:6], f"configuration: {row.config}"] if row.notes else []
        print(row, *[f"    {note}" for note in notes], sep="\n", flush=True)
        total, failed = total + 1, failed + bool(row.notes)
    print(f"{total - failed} of {total} configurations agree")
    return int(failed > 0 or total == 0)


if __name__ == "__main__":
    sys.exit(main())
