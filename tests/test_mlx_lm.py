"What mlx-lm does with a model, done with ours: batches, pieces, quantisation, adapters, copies; and its commands, one by one."
import copy
import json
from pathlib import Path
import math
import os
import pickle
import subprocess
import sys

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest
from mlx.utils import tree_flatten

import xlstm_metal as xm
from xlstm_metal.apps.cli import main
from xlstm_metal.model.config import xLSTMConfig
from xlstm_metal.model.convert import convert, save
from xlstm_metal.model.model import Model
from xlstm_metal.model.tokenizer import encode
from xlstm_metal.wiring.wiring import AutoNCPxLSTMWiring, Neuron, xLSTMWiring

PROMPTS = ["class A:\n", "import os\nimport sys\n\ndef main(argv):\n    for name in", "x", "def read(path, mode='r'):\n    with open("]


@pytest.fixture(scope="module")
def bundled(): return xm.load(dtype=mx.float32)


@pytest.fixture(scope="module")
def alone(bundled):
    "Greedy tokens of each prompt by itself."
    from mlx_lm.generate import generate_step
    model, tokenizer = bundled
    return [[t for t, _ in generate_step(mx.array(encode(tokenizer, p, model.args)), model, max_tokens=12)] for p in PROMPTS]


@pytest.mark.parametrize("settings", [{}, dict(prefill_step_size=3), dict(prefill_batch_size=2)], ids=["plain", "pieces of 3", "two at once"])
def test_batches_of_uneven_prompts_equal_single_runs(bundled, alone, settings):
    from mlx_lm.generate import batch_generate
    model, tokenizer = bundled
    r = batch_generate(model, tokenizer, [encode(tokenizer, p, model.args) for p in PROMPTS], max_tokens=12, return_token_ids=True, **settings)
    assert [list(t)[:12] for t in r.token_ids] == alone


def test_stream_equals_generate_step(bundled, alone):
    model, tokenizer = bundled
    assert [[p.token for p in xm.stream(model, tokenizer, p, max_tokens=12)] for p in PROMPTS] == alone


def test_prefill_in_bounded_memory_and_without_logits(bundled, monkeypatch):
    model, _ = bundled
    shapes = []
    head = type(model).head
    monkeypatch.setattr(model.args, "max_inference_chunksize", 128)
    monkeypatch.setattr(type(model), "head", lambda self, x: shapes.append(x.shape) or head(self, x))
    peaks, last = [], None
    ids = mx.array(np.random.default_rng(0).integers(2, 4096, (1, 2048)))
    for S in (256, 2048):
        mx.clear_cache(); mx.reset_peak_memory(); base = mx.get_active_memory()
        last = xm.State(model).read(ids[:, :S]).logits; mx.eval(last)
        peaks.append(mx.get_peak_memory() - base)
    assert shapes == [(1, model.args.hidden_size)] * (256 // 128 + 2048 // 128) # of the last token of each piece
    assert peaks[1] < 1.3 * peaks[0], peaks
    cache = model.make_cache()
    h = mx.concatenate([model.hidden(ids[:, t:t + 700], cache) for t in range(0, 2048, 700)], 1)
    assert mx.abs(head(model, h[:, -1]) - last).max() < 1e-3


def test_quantised_model_saved_by_mlx_lm(bundled, tmp_path):
    from mlx_lm.utils import quantize_model, save_config, save_model
    model, _ = xm.load(dtype=mx.float32)
    q, config = quantize_model(model, model.args.to_dict(), 64, 4)
    save_model(tmp_path, q); save_config(config, tmp_path / "config.json")
    back, _ = xm.load(tmp_path, dtype=mx.float32, quantize="stored")
    ids = mx.array([[0, 5, 9, 300, 301]])
    assert mx.array_equal(back(ids), q(ids))
    assert "scales" in back.lm_head and all("scales" not in b.mlstm_layer.fgate_preact for b in back.layers)
    assert {str(s.dtype) for b in back.layers for s in [b.mlstm_layer.fgate_preact.weight]} == {"mlx.core.float32"}


def test_lora_adapters_train(bundled):
    from mlx_lm.tuner.utils import linear_to_lora_layers
    model, _ = xm.load(dtype=mx.float32)
    model.freeze()
    linear_to_lora_layers(model, len(model.layers), dict(rank=4, scale=10., dropout=0.))
    names = [n for n, _ in tree_flatten(model.trainable_parameters())]
    assert names and all("lora" in n for n in names)
    from xlstm_metal.train.train import lm_loss
    ids, optimizer = mx.array(np.random.default_rng(0).integers(2, 400, (2, 24))), optim.Adam(1e-3)
    step = nn.value_and_grad(model, lambda: lm_loss(model, ids))
    losses = []
    for _ in range(8):
        loss, grads = step()
        optimizer.update(model, grads); mx.eval(model.parameters()); losses.append(loss.item())
    assert losses[-1] < losses[0] - .3, losses


def test_deepcopy_and_pickle(bundled):
    model, _ = bundled
    ids = mx.array([[0, 5, 9]])
    assert mx.array_equal(copy.deepcopy(model)(ids), model(ids))
    assert mx.array_equal(pickle.loads(pickle.dumps(model))(ids), model(ids))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_weight_dtypes(bundled, dtype):
    model, _ = xm.load(dtype=dtype)
    cache = model.make_cache()
    ids = mx.array([[0, 5, 9, 77, 78, 79, 80]])
    logits = model(ids, cache)
    assert logits.dtype == mx.float32 and {a.dtype for slot in cache for a in slot.cache} == {mx.float32}
    assert mx.abs(logits - bundled[0](ids)).max() < {"float32": 1e-6, "bfloat16": .4, "float16": .05}[dtype]


def small(kind):
    "A small model of any family whose gates matter, untrained."
    mx.random.seed(1)
    bos = dict(bos_token_id=0, force_bos_token_insert=True)
    if kind == "7B": model = Model(xLSTMConfig.from_dict(vocab_size=4096, hidden_size=64, num_hidden_layers=2, num_heads=2, **bos))
    elif kind == "circuit":
        heads = dict(num_heads=2)
        model = Model(AutoNCPxLSTMWiring(9, 3, kinds=dict(inter="mlstm", command="slstm", motor="conv"), dims=32, combine="scalar",
                                              kwargs=dict(mlstm=heads, slstm=heads)), 4096, **bos)
    elif kind == "hybrid": model = Model(xLSTMWiring([Neuron(k, j, 64, {}) for j, k in enumerate(("mlstm", "attention", "conv", "slstm"))]), 4096, **bos)
    else:
        cell = dict(num_heads=2)
        model = Model(xLSTMConfig.from_dict(dict(embedding_dim=64, num_blocks=3, vocab_size=4096, slstm_at=[1], bos_token_id=0,
                                                     mlstm_block=dict(mlstm=cell), slstm_block=dict(slstm=cell, feedforward={}))))
    model.update(dict(model.parameters()))
    model.load_weights([(n, a + .2 * mx.random.normal(a.shape)) for n, a in tree_flatten(model.parameters())])
    return model


@pytest.mark.parametrize("kind", ["7B", "stack", "circuit", "hybrid"])
def test_batches_and_prompt_cache_files_of_all_families(kind, tmp_path, bundled):
    from mlx_lm.generate import batch_generate, generate_step
    from mlx_lm.models.cache import load_prompt_cache, save_prompt_cache
    model, tokenizer = small(kind), bundled[1]
    prompts = [tokenizer.encode(p) for p in PROMPTS]
    def greedy(ids, **kw): return [t for t, _ in generate_step(mx.array(ids), model, max_tokens=10, **kw)]
    alone = [greedy(ids) for ids in prompts]
    assert len({tuple(a) for a in alone}) == len(alone) # else a mix-up would not be seen
    r = batch_generate(model, tokenizer, prompts, max_tokens=10, return_token_ids=True, return_prompt_caches=True, prefill_step_size=3)
    assert [list(t) for t in r.token_ids] == alone
    for ids, first, cache in zip(prompts, alone, r.caches): # what a batch leaves behind goes on, also through a file
        save_prompt_cache(str(tmp_path / "c.safetensors"), cache)
        again = [greedy([5], prompt_cache=c) for c in (load_prompt_cache(str(tmp_path / "c.safetensors")), cache)]
        assert again == [greedy([*ids, *first, 5])] * 2


def test_extracted_rows_free_the_batch(bundled):
    model, _ = bundled
    rows = [model.make_cache() for _ in range(16)]
    for n, cache in enumerate(rows): mx.eval(model(mx.array([[0, n + 2]]), cache), [s.state for s in cache])
    slots = [type(s[0]).merge(list(s)) for s in zip(*rows)]
    del rows, cache
    mx.eval([s.state for s in slots]); mx.clear_cache()
    full = mx.get_active_memory()
    one = [s.extract(7) for s in slots]
    del slots
    mx.synchronize(); mx.clear_cache()
    freed, whole = full - mx.get_active_memory(), 16 * sum(s.nbytes for s in one)
    assert freed > .85 * whole, (freed, whole)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    "A folder with text for tools that want some, and a float32 copy of the bundled model."
    folder = tmp_path_factory.mktemp("mlx")
    convert("bundled", folder / "model", to="mlx", dequantize=True, dtype="float32")
    files = [f"def f{n}(x, y):\n    'Add {n}.'\n    total = x + y + {n}\n    return total\n" for n in range(160)]
    (folder / "data").mkdir()
    for name, part in (("train", files[:140]), ("valid", files[140:150]), ("test", files[150:])):
        (folder / "data" / f"{name}.jsonl").write_text("".join(json.dumps(dict(text=t)) + "\n" for t in part))
    (folder / ".cache/mlx-lm").mkdir(parents=True)
    (folder / ".cache/mlx-lm/calibration_v5.txt").write_text("".join(files[:50])) # where mlx-lm keeps what it would download
    (folder / "few").mkdir()
    (folder / "few/train.jsonl").write_text("".join(json.dumps(dict(text=t)) + "\n" for t in files[:8]))
    return folder


@pytest.fixture
def mlx(home, monkeypatch, capfd):
    "Run `xlstm-metal mlx` in that folder; what it printed."
    monkeypatch.chdir(home)
    for name, value in dict(HOME=home, HF_HOME=home / "hf", HF_HUB_OFFLINE=1, HF_DATASETS_OFFLINE=1).items(): monkeypatch.setenv(name, str(value))
    def run(*argv, status=0):
        code = main(["mlx", *map(str, argv)])
        out, err = capfd.readouterr()
        assert code == status, (out, err)
        return out if status == 0 else err
    return run


def spoken(out):
    "The text between mlx-lm's two lines of ten =, which may hold such a line itself."
    return out.split("=" * 10 + "\n", 1)[1].rsplit("=" * 10 + "\n", 1)[0].strip()


def test_mlx_generate_and_cache_prompt(mlx):
    out = mlx("generate", "--model", "model", "-p", "class Stack:\n    def push(self,", "-m", 12)
    ours = xm.generate(*xm.load("model"), "class Stack:\n    def push(self,", max_tokens=12)
    assert spoken(out) == ours.strip()
    mlx("cache_prompt", "--model", "model", "--prompt", "class Stack:\n    def push(", "--prompt-cache-file", "p.safetensors")
    assert spoken(mlx("generate", "--prompt-cache-file", "p.safetensors", "-p", "self,", "-m", 12)) == ours.strip()


def test_options_of_growing_caches_are_ignored(mlx, capfd):
    for options, says in (([], ""), (["--max-kv-size", "9"], "--max-kv-size is ignored")):
        assert main(["mlx", "generate", "--model", "model", "-p", "x", "-m", "1", *options]) == 0
        err = capfd.readouterr().err
        assert says in err and ("is ignored" in err) == bool(options)


def test_mlx_help(mlx):
    assert "--prefill-step-size" in mlx("generate", "--help") and "xlstm-metal mlx generate" in mlx("generate", "--help")
    overview = mlx("--help")
    assert all(word in overview for word in "generate chat server convert lora fuse evaluate perplexity benchmark cache_prompt enable disable".split())


def test_mlx_convert(mlx, home):
    mlx("convert", "--hf-path", "model", "--mlx-path", "q4", "-q")
    config = json.loads((home / "q4/config.json").read_text())
    assert config["quantization"]["bits"] == 4 and config["model_file"] == "xlstm.py" and (home / "q4/xlstm.py").exists()
    model, _ = xm.load("q4", quantize="stored")
    assert {n.split(".")[-2] for n, a in tree_flatten(model.parameters()) if n.endswith("scales")} & {"igate_preact", "fgate_preact"} == set()
    ours, _ = xm.load("model", quantize=4)
    ids = mx.array([[0, 5, 9, 300]])
    assert mx.array_equal(model(ids), ours(ids))


def test_convert_quantize(original, tmp_path, capsys):
    assert main(["convert", str(original), str(tmp_path / "q"), "--quantize", "mixed", "--measure", "4000"]) == 0
    out, err = capsys.readouterr()
    assert out.strip() == str(tmp_path / "q") and [line.split()[0] for line in err.splitlines()] == ["weights", "before", "after"]
    before, after = (float(line.split()[-1]) for line in err.splitlines()[1:])
    assert 1 < after / before < 1.05
    assert main(["convert", str(original), str(tmp_path / "small"), "--quantize", "4", "--measure", "64"]) == 0
    assert len(capsys.readouterr().err.splitlines()) == 3
    assert main(["convert", str(original), str(tmp_path / "none"), "--quantize", "4"]) == 0 and capsys.readouterr().err == "" # nothing is measured
    assert (tmp_path / "q/model.safetensors").stat().st_size < .35 * (original / "model.safetensors").stat().st_size
    texts = []
    for argv in (["-m", str(original), "--quantize", "mixed", "--dtype", "bfloat16"], ["-m", str(tmp_path / "q"), "--dtype", "bfloat16"]):
        assert main(["generate", "-p", "class Tree:", "--max-tokens", "8", *argv]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]
    assert main(["info", "-m", str(tmp_path / "q")]) == 0
    assert "quantised to 4 and 5 bits" in (said := capsys.readouterr().out) and "26,713,144" in said
    assert main(["convert", str(tmp_path / "q"), str(tmp_path / "r"), "--quantize", "4"]) == 2 and "is quantised" in capsys.readouterr().err
    assert main(["generate", "-p", "x", "-m", str(tmp_path / "q"), "--quantize", "4"]) == 2 and "quantised already" in capsys.readouterr().err


@pytest.fixture
def adapters(mlx):
    "In that folder: adapters, and the model that they are fused with."
    if Path("fused").exists(): return
    mlx("lora", "--model", "model", "--train", "--data", "data", "--iters", 6, "--batch-size", 2, "--num-layers", 2, "--max-seq-length", 48,
        "--learning-rate", "3e-3", "--adapter-path", "adapters", "--steps-per-report", 3, "--steps-per-eval", 6, "--val-batches", 1)
    mlx("fuse", "--model", "model", "--adapter-path", "adapters", "--save-path", "fused")


def test_mlx_lora_and_fuse(adapters):
    from mlx_lm.utils import load
    adapted, fused, plain = load("model", adapter_path="adapters")[0], xm.load("fused")[0], xm.load("model")[0]
    ids = mx.array([[0, 5, 9, 300]])
    assert mx.abs(adapted(ids) - fused(ids)).max() < 1e-3 < mx.abs(adapted(ids) - plain(ids)).max()


def test_commands_take_adapters(adapters, capfd, tmp_path):
    from xlstm_metal.apps.cli import main
    from xlstm_metal.wiring.run import layer_wiring
    (tmp_path / "text").write_text("import os\nimport sys\n" * 8)
    def score(*options):
        code = main(["score", "-f", str(tmp_path / "text"), "--dtype", "float32", *options])
        return code, capfd.readouterr()
    got, fused, plain = (score(*o)[1].out for o in (("-m", "model", "--adapter-path", "adapters"), ("-m", "fused"), ("-m", "model")))
    def bits(line): return float(line.split(" bits")[0].split()[-1])
    assert abs(bits(got) - bits(fused)) <= .002 < abs(bits(got) - bits(plain))
    assert main(["generate", "-m", "model", "--adapter-path", "adapters", "-p", "import", "--max-tokens", "3"]) == 0
    capfd.readouterr()
    code, said = score("-m", "model", "--adapter-path", str(tmp_path))
    assert code == 2 and said.err == f"xlstm-metal: {tmp_path} holds no adapters: there is no adapter_config.json\n"
    tokenizer = xm.load("model")[1]
    xm.save(xm.Model(layer_wiring(["mlstm"], 32), 4096), tmp_path / "other", tokenizer)
    code, said = score("-m", str(tmp_path / "other"), "--adapter-path", "adapters")
    assert code == 2 and said.err.startswith("xlstm-metal: the adapters in adapters are not of this model: ") and said.err.count("\n") == 1


def test_mlx_evaluate(mlx, home):
    (home / "texts.yaml").write_text(f"""task: texts
dataset_path: json
dataset_kwargs: {{data_files: {{test: {home}/data/test.jsonl}}}}
output_type: loglikelihood_rolling
test_split: test
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list: [{{metric: bits_per_byte}}]
""")
    mlx("evaluate", "--model", "model", "--tasks", "texts.yaml", "--limit", 4)
    said = json.loads(next(home.glob("eval_model_*")).read_text())["texts"]["bits_per_byte,none"]
    model, tokenizer = xm.load("model")
    texts = [json.loads(line)["text"] for line in (home / "data/test.jsonl").read_text().splitlines()[:4]]
    nats = 0
    for t in texts:
        ids = mx.array([encode(tokenizer, t, model.args)])
        nats += nn.losses.cross_entropy(model(ids[:, :-1]), ids[:, 1:], reduction="sum").item()
    assert abs(said - nats / math.log(2) / sum(len(t.encode()) for t in texts)) < 1e-4


def test_mlx_perplexity_and_benchmark(mlx):
    assert "Perplexity:" in mlx("perplexity", "--model", "model", "--data-path", "data", "--num-samples", 4, "--sequence-length", 40)
    for batch in (1, 2): assert "generation_tps" in mlx("benchmark", "--model", "model", "-p", 12, "-g", 6, "-n", 1, "-b", batch)


def plain(*argv, block=(), **kw):
    "mlx-lm's own command in a process that cannot import some packages."
    code = f"import sys\nfor m in {list(block)}: sys.modules[m] = None\nfrom mlx_lm.cli import main\nmain()"
    env = os.environ | dict(HF_HUB_OFFLINE="1", MLX_DISABLE_COMPILE="1")
    return subprocess.run([sys.executable, "-c", code, *map(str, argv)], capture_output=True, text=True, env=env, timeout=120, **kw)


@pytest.fixture(scope="module")
def chatty(home):
    convert(home / "model", home / "chatty", quantize="mixed", chat_template="plain", dtype="float32")
    return home / "chatty"


def test_quantised_copy_with_plain_mlx_lm(chatty, mlx):
    argv = "generate", "--model", chatty, "-p", "class Queue:", "-m", 10, "--ignore-chat-template"
    assert "requires importing" in plain(*argv).stderr # nothing is run unless its user says so
    r = plain(*argv, "--trust-remote-code", block=["xlstm_metal"])
    assert r.returncode == 0, r.stderr
    ours = xm.generate(*xm.load(chatty), "class Queue:", max_tokens=10)
    assert spoken(r.stdout) == spoken(mlx(*argv)) == ours.strip()


PLAIN_BATCH = """
import sys
sys.modules["xlstm_metal"] = None
import mlx.core as mx, mlx_lm
from mlx_lm.generate import batch_generate, generate_step
model, tokenizer = mlx_lm.load(sys.argv[1], trust_remote_code=True)
def alone(ids): return [t for t, _ in generate_step(mx.array(ids), model, max_tokens=5)]
def batch(rows, **kw): return batch_generate(model, tokenizer, rows, max_tokens=5, return_token_ids=True, return_prompt_caches=True, **kw)
prompts = [tokenizer.encode(p) for p in ("class A:", "import os\\nimport sys", "x")]
r = batch(prompts)
first = [alone(ids) for ids in prompts]
assert [list(t) for t in r.token_ids] == first
again = batch([[5], [6, 7], [8]], prompt_caches=r.caches)
assert [list(t) for t in again.token_ids] == [alone(p + a + m) for p, a, m in zip(prompts, first, ([5], [6, 7], [8]))]
"""


def test_batches_with_plain_mlx_lm(home):
    r = subprocess.run([sys.executable, "-c", PLAIN_BATCH, str(home / "model")], capture_output=True, text=True, env=os.environ | dict(HF_HUB_OFFLINE="1", MLX_DISABLE_COMPILE="1"), timeout=120)
    assert r.returncode == 0, r.stderr


def test_mlx_chat(chatty, mlx):
    assert "no chat template" in mlx("chat", "--model", "model", status=2)
    code = "import sys; from xlstm_metal.apps.cli import main; sys.exit(main())"
    r = subprocess.run([sys.executable, "-c", code, "mlx", "chat", "--model", chatty, "-m", "8"], input="write a class\nq\n", capture_output=True, text=True,
                       env=os.environ | dict(HF_HUB_OFFLINE="1"), timeout=120)
    assert r.returncode == 0, r.stderr
    tokenizer = xm.load(chatty)[1]
    prompt = tokenizer.apply_chat_template([dict(role="user", content="write a class")], add_generation_prompt=True, tokenize=False)
    assert prompt == "<|endoftext|>User: write a class\n\nAssistant:"
    answer = xm.generate(*xm.load(chatty), prompt, max_tokens=8)
    assert answer.split()[0] in r.stdout


@pytest.mark.parametrize("options", [(), ("--num-draft-tokens", 12)], ids=["3 at a time", "12 at a time"])
@pytest.mark.parametrize("kind", ["7B", "stack", "circuit", "hybrid"])
def test_drafts(kind, options, mlx, tmp_path, bundled):
    "The text of the larger model alone, whatever drafts it: another model, or itself."
    save(small(kind), tmp_path / "large", bundled[1])
    def said(*more): return spoken(mlx("generate", "--model", tmp_path / "large", "-p", "def f(", "-m", 20, "--temp", 0, *more))
    want = said()
    save(small("stack"), tmp_path / "small", bundled[1])
    for drafter in ("small", "large"): assert said("--draft-model", tmp_path / drafter, *options) == want


def test_unsupported_arguments(mlx):
    assert "the server drafts with --draft" in mlx("server", "--model", "model", "--draft-model", "model", status=2)
    assert "--quantize mixed" in mlx("convert", "--model", "model", "-q", "--quant-predicate", "mixed_4_6", status=2)
    assert "there is no folder ./nowhere" in mlx("perplexity", "--model", "./nowhere", status=2)
    assert "unknown command" in mlx("paint", status=2)
    assert "port must be 0 to 65535, got 99999" in mlx("server", "--port", 99999, status=2)
    assert "there is no folder no for --prompt-cache-file" in mlx("cache_prompt", "--prompt", "x", "--prompt-cache-file", "no/such.safetensors", status=2)


def test_missing_and_corrupt_files(mlx, home, tmp_path):
    import shutil
    shutil.copytree(home / "model", home / "mute", ignore=shutil.ignore_patterns("tokenizer*"))
    (tmp_path / "spoilt.safetensors").write_text("junk")
    for argv, reason in ((("--model", "mute"), "has no tokenizer"), (("--model", "model", "--prompt-cache-file", tmp_path / "spoilt.safetensors"), "Unable to read"),
                         (("--model", "model", "--prompt-cache-file", tmp_path / "nowhere.safetensors"), "Failed to open")):
        said = mlx("generate", "-p", "x", "-m", 2, *argv, status=2)
        assert reason in said.splitlines()[-1] and "Traceback" not in said


@pytest.fixture(scope="module")
def tiny(home, bundled):
    return save(small("7B"), home / "tiny", bundled[1])


@pytest.mark.parametrize("argv", [
    ("awq", "--num-samples", 4, "--sequence-length", 32, "--n-grid", 4), ("gptq", "--num-samples", 4, "--sequence-length", 32),
    ("dwq", "--data-path", "few", "--num-samples", 4, "--max-seq-length", 32, "--batch-size", 2), ("dynamic_quant", "--target-bpw", 4.9)], ids=lambda a: a[0])
def test_data_driven_quantisation(argv, tiny, mlx, home):
    out = home / argv[0]
    mlx(argv[0], "-m", "tiny", "--mlx-path", out, *argv[1:])
    before, after = xm.load("tiny", dtype=mx.float32)[0], xm.load(out, dtype=mx.float32, quantize="stored")[0]
    packed = {n.removesuffix(".scales").split(".")[-1] for n, _ in tree_flatten(after.parameters()) if n.endswith("scales")}
    assert {"q", "proj_down", "lm_head"} <= packed and not {"igate_preact", "fgate_preact"} & packed
    a, b = (dict(tree_flatten(m.parameters())) for m in (before, after))
    gates = [n for n in a if "igate" in n or "fgate" in n]
    assert gates and all(b[n].dtype == mx.float32 for n in gates)
    ids = mx.array([[0, 5, 9, 300, 17, 40]])
    off = mx.abs(mx.softmax(before(ids)) - mx.softmax(after(ids))).sum(-1).max().item()
    assert 0 < off < .9


@pytest.mark.parametrize("kind", ["stack", "circuit", "hybrid"])
def test_commands_with_other_families(kind, mlx, home, bundled):
    model, tokenizer = small(kind), bundled[1]
    save(model, home / kind, tokenizer)
    assert spoken(mlx("generate", "--model", kind, "-p", "def f(", "-m", 6)) == xm.generate(model, tokenizer, "def f(", max_tokens=6).strip()
    assert "models of the 7B form only" in mlx("awq", "--model", kind, status=2) # the others do:
    mlx("convert", "--hf-path", kind, "--mlx-path", home / f"{kind}4", "-q")
    want = xm.generate(*xm.load(home / f"{kind}4"), "def f(", max_tokens=6)
    assert spoken(mlx("generate", "--model", f"{kind}4", "-p", "def f(", "-m", 6)) == want.strip()
    config = json.loads((home / kind / "config.json").read_text())
    del config["model_type"]
    (home / kind / "config.json").write_text(json.dumps(config))
    assert "config.json is missing model_type" in mlx("generate", "--model", kind, "-p", "x", status=2)


def test_bos_and_eos_of_a_copy(original, tmp_path):
    "xLSTM 7B's traps: a tokenizer without BOS in a class that rebuilds itself, and an end that is an exclamation mark."
    from tokenizers import Tokenizer
    import shutil
    source = tmp_path / "source"
    shutil.copytree(original, source)
    config = json.loads((source / "config.json").read_text()) | dict(eos_token_id=2)
    (source / "config.json").write_text(json.dumps(config))
    (source / "generation_config.json").write_text(json.dumps(dict(eos_token_id=2, bos_token_id=0)))
    about = json.loads((source / "tokenizer_config.json").read_text()) | dict(tokenizer_class="GPTNeoXTokenizer")
    (source / "tokenizer_config.json").write_text(json.dumps(about))
    convert(source, tmp_path / "copy", to="mlx")
    from mlx_lm.tokenizer_utils import load
    from mlx_lm.utils import load_config
    eos = load_config(tmp_path / "copy")["eos_token_id"]
    tokenizer = load(tmp_path / "copy", eos_token_ids=eos) # as plain mlx-lm calls it
    assert tokenizer.eos_token_ids == {0}
    raw = Tokenizer.from_file(str(source / "tokenizer.json"))
    for text in ("def f(x):\n    return x", " a", "\n\n", ""):
        assert tokenizer.encode(text) == [0, *raw.encode(text).ids]
        assert tokenizer.encode(text, add_special_tokens=False) == raw.encode(text).ids
    model, ours = xm.load(tmp_path / "copy")
    assert encode(ours, "x", model.args) == tokenizer.encode("x") # not two


def test_changed_wiring_is_saved(mlx, home, bundled):
    from xlstm_metal.wiring import ablate
    model, tokenizer = xm.load("model")
    model.wiring = ablate(model.wiring, 3)
    save(model, home / "rewired", tokenizer)
    want = xm.generate(model, tokenizer, "class A:\n", max_tokens=8)
    assert spoken(mlx("generate", "--model", "rewired", "-p", "class A:\n", "-m", 8)) == want.strip()
    assert want != xm.generate(*xm.load("model"), "class A:\n", max_tokens=8)
