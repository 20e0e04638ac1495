"The command line as a process: what people type, what goes wrong, and how it ends."
import ctypes
import fcntl
import json
import re
import resource
import os
import pty
import select
import shutil
import signal
import struct
import subprocess
import sys
import termios
import time
from math import prod
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from xlstm_metal.apps.cli import main, parser
from xlstm_metal.generation.runner import xLSTMRunner
from xlstm_metal.generation.score import score
from xlstm_metal.generation.state import State
from xlstm_metal.files import bundled
from xlstm_metal.model.checkpoint import load
from xlstm_metal.model.config import xLSTMConfig
from xlstm_metal.model.model import Model
from xlstm_metal.model.tokenizer import encode

ENV = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
FIXTURES = Path(__file__).parent / "fixtures"
XLSTM = [sys.executable, "-m", "xlstm_metal"]


def run(*args, **kw):
    return subprocess.run([*XLSTM, *map(str, args)], capture_output=True, text=True, env=ENV | kw.pop("env", {}), timeout=120, **kw)


def test_generate_streams_and_reports():
    r = run("generate", "-p", "def f(x):", "--max-tokens", 20)
    assert r.returncode == 0 and r.stdout.startswith("def f(x):") and len(r.stdout) > 20
    assert "prompt" in r.stderr and "tokens/s" in r.stderr and "peak memory" in r.stderr
    assert r.stderr.count("\n") == 1


def test_generate_is_the_default_command():
    "Options without a command are those of `generate`; no arguments, or --help, show the usage."
    options = ["--model", FIXTURES.parent.parent / "xlstm_metal/bundled", "--prompt", "def f(x):", "--max-tokens", 6]
    assert run(*options).stdout == run("generate", *options).stdout == run(*options[2:]).stdout != ""
    assert "--max-tokens" in run("-p", "x", "--help").stdout and "--max-tokens" not in run("--help").stdout
    nothing = run()
    assert nothing.returncode == 2 and nothing.stderr.startswith("usage: xlstm-metal ") and "generate" in nothing.stderr
    assert run("paint").returncode == 2 and "invalid choice: 'paint'" in run("paint").stderr


def test_every_option_has_a_help_text():
    def commands(p, path=()):
        for name, command in p._subparsers._group_actions[0].choices.items() if p._subparsers else ():
            yield from [((*path, name), command), *commands(command, (*path, name))]
    for path, command in (found := list(commands(parser()))):
        for action in command._actions: assert path == ("mlx",) or action.help, (path, action.dest)
    assert ("state", "ask") in dict(found)


def few_open_files():
    "Run in a child before it starts: at most 1,024 open files, and no right to more."
    resource.setrlimit(resource.RLIMIT_NOFILE, (1024, 1024))
    if os.geteuid() == 0: ctypes.CDLL(None).prctl(24, 24, 0, 0, 0) # root without CAP_SYS_RESOURCE


@pytest.mark.parametrize("command", [
    ["generate", "-p", "x", "--max-tokens", "1"], ["chat", "--max-tokens", "1"], ["score", "-f", "-"], ["info"],
    ["mlx", "generate", "-p", "x", "-m", "1"], ["mlx", "server", "--help"]], ids=lambda c: "-".join(c[:2]))
def test_commands_with_few_open_files(command):
    "mlx-lm asks for a limit of 4,096 when it is imported."
    if sys.platform != "linux" and os.geteuid() == 0: pytest.skip("root may raise any limit")
    raises = subprocess.run([sys.executable, "-c", "import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (2048, 4096))"],
                            preexec_fn=few_open_files, capture_output=True, text=True)
    assert "not allowed to raise maximum limit" in raises.stderr
    r = run(*command, input="import os\n", preexec_fn=few_open_files)
    assert r.returncode == 0 and r.stdout, r.stderr


def test_imports_with_few_open_files():
    for code in ("import xlstm_metal, mlx_lm", "import xlstm_metal.apps.server", "import xlstm_metal, mlx_lm.models.xlstm"):
        check = f"import resource; before = resource.setrlimit; {code}; assert resource.setrlimit is before; print(resource.getrlimit(resource.RLIMIT_NOFILE))"
        r = subprocess.run([sys.executable, "-c", check], preexec_fn=few_open_files, capture_output=True, text=True, env=ENV)
        assert r.stdout == "(1024, 1024)\n", r.stderr


def test_text_is_printed_while_it_is_generated():
    p = subprocess.Popen([*XLSTM, "generate", "-p", "import os\n", "--max-tokens", "2000"], stdout=subprocess.PIPE, env=ENV)
    seen = [os.read(p.stdout.fileno(), 65536) for _ in range(30)]
    early = p.poll() is None
    p.send_signal(signal.SIGINT)
    assert early and all(seen) and p.wait(20) == 130


def test_greedy_and_seeded_runs_repeat():
    a, b = (run("generate", "-p", "class A", "--max-tokens", 12).stdout for _ in "ab")
    assert a == b
    wild = ["generate", "-p", "class A", "--max-tokens", 12, "-t", 1.2, "--top-k", 50, "--top-p", .95, "--min-p", .01, "--repetition-penalty", 1.1, "--seed"]
    x, y, z = (run(*wild, s).stdout for s in (1, 1, 2))
    assert x == y != z


def test_stop_texts_and_prompt_from_standard_input():
    r = run("generate", "-p", "-", "--max-tokens", 60, "--stop", "\n", "--stop", "(", input="import ")
    assert r.returncode == 0 and "(" not in r.stdout and r.stdout.count("\n") == 1


def refused(*args, **kw):
    r = run(*args, **kw)
    assert r.returncode == 2 and r.stdout == "" and r.stderr.count("\n") == 1 and "Traceback" not in r.stderr, r.stderr
    return r.stderr


@pytest.mark.parametrize("args, says", [
    (["generate", "-p", ""], "the prompt is empty"),
    (["generate"], "there is no prompt"),
    (["generate", "-p", "x", "--max-tokens", -1], "max_tokens must be 0 or more, not -1"),
    (["generate", "-p", "x", "--seed", -1], "seed must be a whole number, 0 or more and below 2**64, not -1"),
    (["generate", "-p", "x", "-m", "nobody", "--skip", 5], "--skip needs --file"),
    (["generate", "-p", "x", "--seed", 2**64], "seed must be a whole number"),
    (["generate", "-p", "x", "-m", "nobody", "--save-state", "/dev/null"], "/dev/null is not a file"),
    (["generate", "-p", "x", "-m", "nobody", "--save-state", __file__], "test_cli.py is not a state file, so it is not overwritten"),
    (["generate", "-p", "x", "-t", "-0.1"], "temperature must be 0 or above, not -0.1"),
    (["generate", "-p", "x", "--top-p", 1.5], "top_p must be above 0 and at most 1, not 1.5"),
    (["generate", "-p", "x", "-m", "./no/such/folder"], "there is no folder ./no/such/folder"),
    (["generate", "-p", "x", "-m", "nobody"], "a hub id looks like owner/name"),
    (["generate", "-p", "x", "-m", "nobody/nothing"], "not in the local cache, and the hub cannot be reached"),
    (["info", "-m", "nobody/nothing"], "not in the local cache, and the hub cannot be reached"),
    (["generate", "-p", "x", "-m", "nobody", "--load-state", "./nothing"], "there is no file nothing"),
    (["generate", "-m", "nobody", "--load-state", __file__], "test_cli.py is not a state file"),
    (["generate", "-p", "x", "-m", "nobody", "--save-state", "/no/such/state"], "there is no folder /no/such"),
    (["generate", "-m", "nobody", "-f", "./nothing"], "there is no file nothing"),
    (["score", "-m", "nobody", "-f", "./nothing"], "there is no file nothing"),
    (["score", "-m", "nobody", "-f", __file__, "--load-state", __file__], "test_cli.py is not a state file"),
], ids=lambda v: v if isinstance(v, str) else v[0])
def test_bad_input(args, says, tmp_path):
    assert says in refused(*args, env={"HF_HOME": str(tmp_path)})


@pytest.mark.parametrize("locale", ["C.UTF-8", "C"])
@pytest.mark.parametrize("args", [["generate", "-p", "-"], ["score", "-f", "-"], ["chat"]], ids=lambda args: args[0])
def test_input_that_is_not_utf8(args, locale, tmp_path):
    for mode in "01":
        with open(tmp_path / "noise", "wb+") as f:
            f.write(b"a\xff\xfeb\n")
            f.seek(0)
            assert "not UTF-8" in refused(*args, stdin=f, env=dict(LC_ALL=locale, PYTHONUTF8=mode))


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="only Linux has /dev/full")
def test_output_to_a_full_disk():
    with open("/dev/full", "w") as full:
        r = subprocess.run([*XLSTM, "generate", "-p", "x", "--max-tokens", "2"], stdout=full, stderr=subprocess.PIPE, text=True, env=ENV, timeout=60)
    assert (r.returncode, r.stderr) == (2, "xlstm-metal: the output cannot be written: No space left on device\n")


def test_prompt_that_is_not_unicode(): assert "it has '\\udcff' at position 1" in refused("generate", "-p", b"a\xff".decode(errors="surrogateescape"))


def test_missing_gpu_is_refused():
    import mlx.core as mx
    if mx.is_available(mx.gpu): pytest.skip("this machine has a GPU")
    assert "there is no GPU" in refused("generate", "-p", "x", "--device", "gpu")


def test_bad_input_is_refused_at_once():
    start = time.perf_counter()
    refused("generate", "-p", "x", "-m", "./no/such/folder", "--max-tokens", -1)
    assert time.perf_counter() - start < 5


def test_checkpoint_of_another_model_type(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(dict(model_type="llama")))
    assert "model_type 'llama' is not an xLSTM" in refused("info", "-m", tmp_path)


def sparse_7b(folder: Path):
    "The headers of xLSTM 7B in six shards, three of 32 blocks with real tensors, the rest holes in the files."
    D, F, V, NH, QK = 4096, 10944, 50304, 8, 2048
    block = {"norm_mlstm.weight": [D], "norm_ffn.weight": [D], "mlstm_layer.q.weight": [QK, D], "mlstm_layer.k.weight": [QK, D],
             "mlstm_layer.v.weight": [D, D], "mlstm_layer.ogate_preact.weight": [D, D], "mlstm_layer.out_proj.weight": [D, D],
             "mlstm_layer.igate_preact.weight": [NH, D], "mlstm_layer.igate_preact.bias": [NH], "mlstm_layer.fgate_preact.weight": [NH, D],
             "mlstm_layer.fgate_preact.bias": [NH], "mlstm_layer.multihead_norm.weight": [D],
             "ffn.proj_up_gate.weight": [F, D], "ffn.proj_up.weight": [F, D], "ffn.proj_down.weight": [D, F]}
    shapes = {"backbone.embeddings.weight": [V, D], "backbone.out_norm.weight": [D], "lm_head.weight": [V, D]}
    shapes |= {f"backbone.blocks.{b}.{n}": s for b in range(32) for n, s in block.items()}
    names, where = list(shapes), {}
    for s in range(6):
        header, at, file = {}, 0, f"model-{s + 1:05d}-of-00006.safetensors"
        for n in names[s::6]:
            end = at + 4 * prod(shapes[n])
            header[n], at, where[n] = dict(dtype="F32", shape=shapes[n], data_offsets=[at, end]), end, file
        text = json.dumps(header).encode()
        with open(folder / file, "wb") as f:
            f.write(struct.pack("<Q", len(text)) + text)
            f.write(os.urandom(1 << 20))
            f.truncate(8 + len(text) + at)
    (folder / "model.safetensors.index.json").write_text(json.dumps(dict(metadata={}, weight_map=where)))
    config = dict(model_type="xlstm", embedding_dim=D, num_blocks=32, num_heads=NH, head_dim=512, vocab_size=V, force_bos_token_insert=True, eos_token_id=2)
    (folder / "config.json").write_text(json.dumps(config))


def test_info_of_7b_is_fast_and_needs_little_memory(tmp_path):
    sparse_7b(tmp_path)
    def timed(*argv):
        start = time.perf_counter()
        return run(*argv), time.perf_counter() - start
    _, small = min((timed("info", "--show-wiring") for _ in range(2)), key=lambda x: x[1]) # of the bundled model: most of it is imports
    r, took = min((timed("info", "-m", tmp_path, "--show-wiring") for _ in range(3)), key=lambda x: x[1]) # of three: others may use the machine
    assert r.returncode == 0, r.stderr
    for fact in ("6,865,424,896", "27.5 GB stored", "134 MB per sequence", "8 of 256 (query, key) by 512 (value)", "32 mLSTM", "6 files"): assert fact in r.stdout
    assert r.stdout.endswith("\n  ↓\n".join(["ids ── embeddings 50304 x 4096", "blocks 0-31 ── 32 x mLSTM of 4096, 8 heads of 256 x 512, FFN 10944",
                                              "out_norm", "lm_head ── logits 50304"]) + "\n")
    assert took < small + 1, (took, small)
    measured = "import resource, subprocess, sys; subprocess.run(sys.argv[1:]); print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)" # of this child alone
    alone = subprocess.run([sys.executable, "-c", measured, *XLSTM, "info", "-m", str(tmp_path)], capture_output=True, text=True, env=ENV, timeout=120)
    assert int(alone.stdout.split()[-1]) / 1024 < 2000, alone.stderr # MB


def test_help_is_fast():
    best = 9
    for _ in range(3):
        start = time.perf_counter(); assert run("generate", "--help").returncode == 0
        best = min(best, time.perf_counter() - start)
    assert best < .5, best


def test_streamed_text_equals_decoded_tokens():
    import xlstm_metal as xm
    model, tokenizer = xm.load()
    prompt = "class Point:\n    def __init__(self, x, y):\n"
    pieces = list(xm.stream(model, tokenizer, prompt, max_tokens=30))
    whole = "".join(p.text for p in pieces)
    assert whole == tokenizer.decode([p.token for p in pieces]) and whole.startswith("    ") # indented: no space is lost
    assert run("generate", "-p", prompt, "--max-tokens", 30).stdout == prompt + whole + "\n"


def test_chat_keeps_state_and_ends_at_end_of_file():
    one = run("chat", "--max-tokens", 16, input="class Box:\nimport re\n")
    two = run("chat", "--max-tokens", 16, input="class Box:\n/reset\nimport re\n")
    assert one.returncode == two.returncode == 0 and one.stdout != two.stdout


def terminal(*args):
    "Start a command on a terminal of its own; its process id and a function that reads until a text appears."
    pid, fd = pty.fork()
    if pid == 0: os.execve(sys.executable, [*XLSTM, *args], ENV)
    fcntl.ioctl(fd, termios.TIOCSWINSZ, struct.pack("4H", 24, 100, 0, 0)) # a bar needs some width
    text = bytearray()

    def until(want, within=60, after=0):
        end = time.time() + within
        while want.encode() not in text[after:]:
            assert time.time() < end and select.select([fd], [], [], end - time.time())[0], text.decode(errors="replace")
            try: text.extend(os.read(fd, 4096))
            except OSError: break # the terminal is closed
        return len(text)
    return pid, fd, until


def test_chat_on_a_terminal():
    pid, fd, until = terminal("chat", "--max-tokens", "100000")
    until("> ")
    os.write(fd, b"import os\n"); at = until("import os"); until("\n", after=at)
    time.sleep(1)
    os.write(fd, b"\x03")           # Ctrl-C: the answer stops, the conversation goes on
    at = until("> ", after=at)
    os.write(fd, b"import sys\n"); at = until("import sys", after=at)
    time.sleep(1)
    os.write(fd, b"\x03"); until("> ", after=at)
    os.write(fd, b"\x04")           # Ctrl-D: leave
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def test_commands_with_a_stack(tmp_path, capsys):
    "A mixed stack of the first paper: described, converted to the original's layouts and back, and generating the same text."
    cell = dict(num_heads=4)
    d = dict(embedding_dim=32, num_blocks=3, vocab_size=4096, slstm_at=[1], bos_token_id=0, mlstm_block=dict(mlstm=cell),
             slstm_block=dict(slstm=cell, feedforward={}))
    folder = tmp_path / "stack"
    folder.mkdir()
    mx.random.seed(0)
    mx.save_safetensors(str(folder / "model.safetensors"), dict(tree_flatten(Model(xLSTMConfig.from_dict(d)).parameters())))
    (folder / "config.json").write_text(json.dumps(d))
    for f in bundled.glob("tokenizer*"): shutil.copy(f, folder)
    assert main(["convert", str(folder), f"{folder}2", "--to", "nxai", "--recurrent", "cuda"]) == 0
    assert main(["convert", f"{folder}2", f"{folder}3"]) == 0
    capsys.readouterr()
    texts = []
    for f in (folder, f"{folder}2", f"{folder}3"):
        assert main(["generate", "-m", str(f), "-p", "def f(", "--max-tokens", "8"]) == 0
        texts.append(capsys.readouterr().out)
    assert len(set(texts)) == 1 and texts[0].startswith("def f(")
    sizes = xLSTMRunner.from_pretrained(folder, "float32").get_model_info()
    assert (sizes["num_blocks"], sizes["num_heads"]) == (3, 4) and sizes["parameters"] > 4096 * 64
    assert main(["info", "-m", str(folder), "--show-wiring", "--wiring-style", "ascii"]) == 0
    out = capsys.readouterr().out
    assert "2 mLSTM, 1 sLSTM (msm)" in out and out.isascii()
    drawn = out[out.index("ids --"):].rstrip().split("\n  v\n")
    assert [l.split(" -- ")[0] for l in drawn] == ["ids", "block 0", "block 1", "block 2", "post_blocks_norm", "lm_head"]
    assert drawn[0].endswith("embeddings 4096 x 32") and drawn[1].replace(" 0 ", " 2 ") == drawn[3] and "mLSTM of 32, 4 heads of 16 x 16" in drawn[1]
    assert drawn[2] == "block 1 -- sLSTM of 32, 4 heads of 8, FFN 64, kernel 4" and drawn[5].endswith("logits 4096")
    assert main(["convert", str(folder), f"{folder}2"]) == 2
    assert "exists already" in capsys.readouterr().err


def test_wiring_with_tied_head_and_without_head(tmp_path, capsys):
    d = dict(embedding_dim=32, num_blocks=2, vocab_size=50, mlstm_block=dict(mlstm=dict(num_heads=4)), tie_weights=True)
    weights = dict(tree_flatten(Model(xLSTMConfig.from_dict(d)).parameters()))
    ends = {"tied": (weights | {"lm_head.weight": weights["token_embedding.weight"]}, d, "ids -- embeddings 50 x 32", "the embeddings again -- logits 50"),
            "none": ({n.removeprefix("xlstm_block_stack."): w for n, w in weights.items() if n != "token_embedding.weight"},
                     {k: v for k, v in d.items() if k not in ("vocab_size", "tie_weights")}, "input", "output")}
    for name, (tensors, config, first, last) in ends.items(): # upstream stores a tied head a second time
        (tmp_path / name).mkdir()
        mx.save_safetensors(str(tmp_path / name / "model.safetensors"), tensors)
        (tmp_path / name / "config.json").write_text(json.dumps(config))
        assert main(["info", "-m", str(tmp_path / name), "--show-wiring", "--wiring-style", "ascii"]) == 0
        drawn = capsys.readouterr().out.split("\n  v\n")
        assert drawn[0].endswith("\n" + first) and drawn[1].startswith("blocks 0-1 -- 2 x mLSTM of 32, 4 heads of 16 x 16") and drawn[2:] == ["post_blocks_norm", last + "\n"]


def test_state_saved_and_loaded_by_another_process(tmp_path, capsys):
    place, text = tmp_path / "place", tmp_path / "text"
    text.write_text("class Queue:\n    def __init__(self):\n        self.items = []\n\n")
    r = run("generate", "-f", text, "-p", "    def put(", "--max-tokens", 12, "--save-state", place)
    assert r.returncode == 0 and r.stdout.startswith("    def put(") and "saved a state of" in r.stderr
    assert main(["generate", "--load-state", str(place), "--max-tokens", "12"]) == 0
    later = capsys.readouterr().out
    assert main(["generate", "-f", str(text), "-p", "    def put(", "--max-tokens", "24"]) == 0
    assert capsys.readouterr().out == r.stdout[:-1] + later
    assert main(["generate", "-m", str(FIXTURES / "hf_tiny"), "--load-state", str(place)]) == 2  # it has no tokenizer
    other = tmp_path / "other"
    shutil.copytree(bundled, other)
    config = json.loads((other / "config.json").read_text()) | dict(norm_eps=1e-5)
    (other / "config.json").write_text(json.dumps(config))
    capsys.readouterr()
    assert main(["generate", "-m", str(other), "--load-state", str(place)]) == 2
    assert "place is the state of another model: its settings do not match" in capsys.readouterr().err


def test_ctrl_c_saves_the_state(tmp_path):
    "A long file, on a terminal with a bar, stopped while it is read; and an answer, stopped while it is written."
    small, text, place = tmp_path / "small", tmp_path / "text", tmp_path / "place"
    shutil.copytree(bundled, small)
    config = json.loads((small / "config.json").read_text()) | dict(max_inference_chunksize=64) # pieces that take a moment
    (small / "config.json").write_text(json.dumps(config))
    text.write_text("def f(x):\n    return x + 1\n\n" * 40_000)
    pid, fd, until = terminal("generate", "-m", str(small), "-f", str(text), "--save-state", str(place))
    until(" tokens]")
    os.write(fd, b"\x03")
    until("stopped after")
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 130
    model, tokenizer = load(small)
    state = State.load(place, model)
    n = state.tokens
    assert n % 64 == 0 and n > 0
    ids = encode(tokenizer, text.read_text()[:20 * n], model.args)
    assert mx.array_equal(state.logits, State(model).read(ids[:n]).logits)
    text.write_text(text.read_text()[:20 * n]) # no more than this, to read on from there
    assert main(["generate", "-m", str(small), "-f", str(text), "--skip", str(n), "--load-state", str(place), "--save-state", str(place),
                 "--max-tokens", "0"]) == 0
    assert mx.array_equal(State.load(place, model).logits, State(model).read(ids).logits)
    p = subprocess.Popen([*XLSTM, "generate", "--load-state", place, "--save-state", tmp_path / "later", "--max-tokens", "9999"],
                         stdout=subprocess.PIPE, env=ENV)
    for _ in range(12): os.read(p.stdout.fileno(), 4096)
    p.send_signal(signal.SIGINT)
    p.communicate(timeout=30)
    assert p.returncode == 130 and State.load(tmp_path / "later", model).tokens > n + 10


def test_score(tmp_path, capsys):
    text = tmp_path / "text"
    text.write_text("import os\nimport sys\n")
    assert main(["score", "-f", str(text), "--tokens"]) == 0
    *rows, last = capsys.readouterr().out.splitlines()
    rows = [(int(t), float(p), json.loads(s)) for t, p, s in (row.split("\t") for row in rows)]
    assert "".join(s for *_, s in rows[1:]) == text.read_text()
    assert last == str(score(*load(), text)) and f"{len(rows)} tokens" in last
    perplexity, bits = (float(x) for x in re.search(r"perplexity ([\d.]+), ([\d.]+) bits per byte", last).groups())
    assert abs(np.exp(-np.mean([p for _, p, _ in rows[1:]])) / perplexity - 1) < 1e-3
    assert abs(-sum(p for _, p, _ in rows[1:]) / np.log(2) / len(text.read_bytes()) / bits - 1) < 1e-3
    r = run("score", "-f", "-", input=text.read_text())
    assert (r.stdout, r.stderr) == (last + "\n", "")
    assert "the text is empty" in refused("score", "-f", "-", input="")


@pytest.mark.skipif(sys.platform != "linux", reason="a Mac multiplies with Accelerate")
def test_slow_products_are_told_once(tmp_path):
    (tmp_path / "long.txt").write_text("def f(x): return x\n" * 60)
    slow = subprocess.run([*XLSTM, "generate", "-f", tmp_path / "long.txt", "-p", "x", "--max-tokens", "2"], capture_output=True, text=True,
                          env={k: v for k, v in ENV.items() if k != "LD_PRELOAD"} | {"XLSTM_METAL_OPENBLAS": "0"})
    assert slow.returncode == 0 and slow.stderr.count("matrix products are slow") == 1, slow.stderr
    short = run("generate", "-p", "x", "--max-tokens", "2")
    assert "matrix products" not in short.stderr


def test_bench(tmp_path):
    r = run("bench", "-m", FIXTURES / "hf_tiny", "--prompts", "64", "--batches", "1", "2", "--tokens", "4", "--training", "1", "16", "--json", tmp_path / "b.json", "--picture", tmp_path / "b.png")
    report = json.loads((tmp_path / "b.json").read_text())
    assert r.returncode == 0 and [x["part"] for x in report["rows"]] == ["decode", "decode", "prefill", "training"] and "tokens/s" in r.stdout
    assert all(x["tokens_per_second"] > 0 for x in report["rows"]) and (tmp_path / "b.png").stat().st_size > 5000
    r = run("bench", "--sizes", "4096", "32", "8", "--predict")
    assert r.returncode == 0 and "M4 Max" in r.stdout


@pytest.mark.parametrize("words, says", [
    (["--sizes", "64", "2", "3"], "there is no model of 64 2 3"), (["--sizes", "64", "2", "2", "-m", "x"], "leave out --model"),
    (["--json", "/no/such/folder/b.json"], "cannot be written"), (["--tokens", "0"], "must be a whole number"), (["--picture", "b.txt"], "must end with"),
    (["-m", "/no/such/model"], "/no/such/model"), (["-m", str(FIXTURES / "stack_tiny"), "--compare", "nxai", "--tokens", "100000"], "xLSTM 7B only"), (["--sizes", "64", "2", "2", "--quantize", "4", "--training", "1", "16"], "quantised model cannot be trained")])
def test_bench_refuses(words, says):
    r = run("bench", *words)
    assert r.returncode == 2 and says in r.stderr and "Traceback" not in r.stderr, r.stderr


def test_tune(tmp_path):
    "What was measured is kept, used by the next process, and forgotten on demand; the greedy text stays what it was."
    tuned = tmp_path / "cache" / "tuned.json"
    env = dict(XLSTM_METAL_TUNED=str(tuned))
    r = run("tune", "-m", FIXTURES / "hf_tiny", "--device", "cpu", env=env)
    assert r.returncode == 0 and "tokens read at once: " in r.stdout and r.stdout.count("*") == 2 and str(tuned) in r.stdout, r.stderr
    (choices,) = json.loads(tuned.read_text()).values()
    assert choices["step"] in ("eager", "compiled", "merged")
    tuned.write_text(json.dumps({machine: c | {"step": "merged"} for machine, c in json.loads(tuned.read_text()).items()}))
    texts = [run("generate", "-p", "def f(x):", "--max-tokens", "20", env=e).stdout for e in (env, {})]
    assert texts[0] == texts[1] != ""
    assert run("tune", "--forget", env=env).returncode == 0 and list(json.loads(tuned.read_text()).values()) == [{}]


def test_tune_refuses(tmp_path):
    (tmp_path / "file").write_text("")
    r = run("tune", env=dict(XLSTM_METAL_TUNED=str(tmp_path / "file" / "tuned.json")))
    assert r.returncode == 2 and "cannot be written" in r.stderr and r.stderr.count("\n") == 1
    r = run("tune", "--sizes", "64", "2", "2", "-m", "x")
    assert r.returncode == 2 and "leave out --model" in r.stderr
    (tmp_path / "tuned.json").write_text("[1, 2")
    r = run("generate", "-p", "x", "--max-tokens", "2", env=dict(XLSTM_METAL_TUNED=str(tmp_path / "tuned.json")))
    assert r.returncode == 0 and "is damaged and is not used" in r.stderr
