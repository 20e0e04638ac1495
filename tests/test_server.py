"The server as people use it: the official client, many at once, bad requests, and clients that leave."
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import mlx.core as mx
import pytest
from openai import APIStatusError, OpenAI

import xlstm_metal as xm
from xlstm_metal.model.convert import convert

NAMES = "copy open walk load save split join merge".split()
PROMPTS = [f"import os\n\ndef {name}_{n}(path{n}, other):\n    " for n in range(8) for name in NAMES]


class Running:
    "A server in a process of its own."
    def __init__(self, *argv):
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            self.port = s.getsockname()[1]
        self.process = subprocess.Popen([sys.executable, "-m", "xlstm_metal", "mlx", "server", "--port", str(self.port), "--log-level", "ERROR", *map(str, argv)],
                                        env=os.environ | dict(HF_HUB_OFFLINE="1"), stderr=subprocess.PIPE, text=True)
        self.client = OpenAI(base_url=f"http://127.0.0.1:{self.port}/v1", api_key="none", max_retries=0, timeout=120)
        end = time.time() + 60
        while self.health() != 200:
            assert self.process.poll() is None and time.time() < end, self.process.stderr.read()
            time.sleep(.1)

    def health(self):
        try: return urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=10).status
        except OSError: return None

    def write(self, prompt, max_tokens=8, **kw):
        return self.client.completions.create(model="default_model", prompt=prompt, max_tokens=max_tokens, temperature=0, **kw)

    def stream(self, prompt, max_tokens=8):
        return "".join(c.choices[0].text for c in self.write(prompt, max_tokens, stream=True))

    def post(self, body, path="/v1/completions"):
        c = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        c.request("POST", path, body if isinstance(body, bytes) else json.dumps(body))
        r = c.getresponse()
        return r.status, r.read()

    def stop(self):
        self.process.terminate()
        return self.process.communicate(timeout=30)[1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return convert(None, tmp_path_factory.mktemp("server") / "copy", to="mlx", dequantize=True, dtype="float32")


@pytest.fixture(scope="module")
def server(folder):
    running = Running("--model", folder)
    yield running
    said = running.stop()
    assert "Traceback" not in said, said


@pytest.fixture(scope="module")
def single(folder):
    "What each prompt gets from a model that nobody else uses."
    model, tokenizer = xm.load(folder, mx.float32)
    answers = [xm.generate(model, tokenizer, p, max_tokens=8) for p in PROMPTS]
    assert len(set(answers)) > 30 # or a mix-up would not be seen
    return answers


def test_64_concurrent_streams_equal_single_runs(server, single):
    with ThreadPoolExecutor(64) as pool: together = list(pool.map(server.stream, PROMPTS))
    # mlx-lm's detokenizer leaves out the space at the very start of a text
    assert [t.strip() for t in together] == [t.strip() for t in single]


def test_answers_do_not_depend_on_other_clients(server, single):
    "Answers stay the same while others leave midway, or send what cannot be served."
    def leave(n):
        c = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
        c.request("POST", "/v1/completions", json.dumps(dict(prompt=PROMPTS[n], max_tokens=5000, stream=n % 2 == 0)))
        time.sleep(.05 * n)
        c.sock.close()
        c.close()
    def fail(n): return server.post([b"{", dict(prompt=["a"]), dict(prompt="x", stop=5), dict(prompt="x", model="gpt")][n % 4])[0]
    jobs = [(server.stream, PROMPTS[n]) if n % 3 == 0 else (leave, n) if n % 3 == 1 else (fail, n) for n in range(36)]
    with ThreadPoolExecutor(36) as pool: results = list(pool.map(lambda job: job[0](job[1]), jobs))
    assert [r.strip() for r in results[::3]] == [t.strip() for t in single[:36:3]]
    assert set(results[2::3]) == {400, 404}
    assert server.health() == 200


def test_generation_stops_when_the_client_disconnects(server):
    if not os.path.exists("/proc/self/stat"): pytest.skip("processor times are read from /proc")
    def busy():
        fields = open(f"/proc/{server.process.pid}/stat").read().split()
        return (int(fields[13]) + int(fields[14])) / os.sysconf("SC_CLK_TCK")
    for stream in (True, False):
        c = http.client.HTTPConnection("127.0.0.1", server.port)
        c.request("POST", "/v1/completions", json.dumps(dict(prompt="class A:", max_tokens=10**6, stream=stream)))
        time.sleep(.7)
        c.sock.close()
        c.close()
        time.sleep(1)
        before = busy()
        time.sleep(.7)
        assert busy() - before < .35, stream


def test_conversations_reuse_the_prompt_cache(server):
    messages, read = [], []
    for turn in range(4):
        messages.append(dict(role="user", content=f"please write the function number {turn} of this module"))
        r = server.client.chat.completions.create(model="copy", messages=messages, max_tokens=10, temperature=0)
        messages.append(dict(role="assistant", content=r.choices[0].message.content))
        read.append(r.usage.prompt_tokens - r.usage.prompt_tokens_details.cached_tokens)
        assert r.model == "copy"
    assert max(read[1:]) < read[0] + 25 and r.usage.prompt_tokens > 3 * max(read), (read, r.usage)


def test_prompt_that_is_completely_cached(server):
    first = server.write("def walk(top):\n    for name in ", 8)
    text = "def walk(top):\n    for name in "
    for prompt in (text, text[:-1], text + first.choices[0].text, text): assert server.write(prompt, 4).usage.completion_tokens > 0
    assert server.health() == 200


def nested(levels): return b'{"prompt": "x", "max_tokens": 1, "metadata": ' + b"[" * levels + b"]" * levels + b"}"
def label(value): return value if isinstance(value, str) else str(value)[:70] if value is not None else "completions"
fine, chat = dict(prompt="x", max_tokens=1), "/v1/chat/completions"
@pytest.mark.parametrize("status, body, path", [
    (400, b"", None), (400, b"{", None), (400, b"\xff\xfe{}", None), (400, b"[" * 100_000, None), (400, nested(100), None), (200, nested(99), None),
    (400, [1], None), (400, {}, None), (400, b'{"prompt": "x", "temperature": NaN}', None),
    (400, dict(prompt=""), None), (400, dict(prompt=["a", "b"]), None), (400, dict(prompt=[1, 2]), None), (400, dict(prompt=None), None),
    (400, fine | dict(stop=5), None), (400, fine | dict(stop=[1]), None), (400, fine | dict(stop=[""]), None),
    (400, fine | dict(logit_bias={"99999999": 1}), None), (400, fine | dict(logit_bias={"x": 1}), None), (400, fine | dict(logit_bias=[1]), None),
    (400, fine | dict(top_k=4096, temperature=1.), None), (400, fine | dict(top_k="x"), None), (400, fine | dict(xtc_threshold=.9, xtc_probability=.5), None),
    (400, fine | dict(seed=-1), None), (400, fine | dict(seed=2**70), None), (400, fine | dict(temperature="hot"), None), (400, fine | dict(max_tokens=0), None),
    (400, fine | dict(stream=True, stream_options=5), None), (400, fine | dict(adapters="/tmp"), None), (400, fine | dict(draft_model="x/y"), None),
    (404, fine | dict(model="nobody/nothing"), None), (404, fine | dict(model=["x"]), None), (404, fine, "/v1/embeddings"),
    (400, b'{"prompt": "\\ud800"}', None), (400, b'{"prompt": "x", "stop": "\\ud800"}', None), (400, fine | dict(stop=["x"] * 101), None),
    (400, fine | dict(temperature=10**400), None), (400, fine | dict(repetition_penalty=10**400), None), (400, b'{"prompt": "x", "presence_penalty": 1e999}', None),
    (400, fine | dict(repetition_penalty=1.1, repetition_context_size=2**62), None), (400, fine | dict(top_logprobs=True), None), (400, fine | dict(logit_bias={"5": None}), None),
    (400, fine | dict(logit_bias={"5": 10**400}), None), (400, fine | dict(n=2), None), (400, fine | dict(echo=True), None), (400, fine | dict(suffix="y"), None),
    (400, dict(messages=[]), chat), (400, dict(messages=[dict(role="user", content="hi")], role_mapping=5), chat),
    (400, dict(messages=[dict(role="user", content="hi")], chat_template_kwargs=dict(chat_template="")), chat),
    (200, fine | dict(temperature=None, stop=None, seed=None, n=1, logit_bias=None, stream_options=None), None),
    (400, dict(messages="hi"), chat), (400, dict(messages=["hi"]), chat), (400, dict(messages=[dict(content="hi")]), chat), (400, dict(messages=[dict(role="user", content=5)]), chat),
    (400, dict(messages=[dict(role="user", content=[dict(type="image_url", image_url=dict(url="http://127.0.0.1:1/x.png"))])]), chat),
    (200, fine, None), (200, fine | dict(model="copy"), None), (200, fine | dict(top_k=4095, temperature=1.), None), (200, fine | dict(seed=1), None),
    (200, fine | dict(stream=True, stream_options={}), None), (200, dict(messages=[dict(role="user", content=[dict(type="text", text="hi")])], max_tokens=1), chat),
], ids=label)
def test_status_of_requests(server, status, body, path):
    got, said = server.post(body, path or "/v1/completions")
    assert got == status, said
    if status != 200: assert json.loads(said)["error"]
    assert server.health() == 200


def test_deeply_nested_bodies(server):
    "Whatever the depth, at the limit of Python's stack too, there is an answer and no traceback."
    for levels in (101, 500, *range(940, 1000), 5000):
        status, said = server.post(nested(levels))
        assert status == 400 and json.loads(said)["error"]["message"] == "the request body is nested deeper than 100 levels", levels


def test_content_length(server):
    def ask(head, body=b"{}"):
        with socket.create_connection(("127.0.0.1", server.port), timeout=20) as s:
            s.sendall(b"POST /v1/completions HTTP/1.1\r\n" + head + b"\r\n\r\n" + body)
            return int(s.recv(4096).split()[1])
    assert ask(b"Host: x") == 411 and ask(b"Content-Length: -1") == 400 and ask(b"Content-Length: ten") == 400
    assert ask(b"Content-Length: 99999999999") == 413 and ask(b"Content-Length: 99999999999", bytes(1 << 22)) == 413
    big = json.dumps(dict(prompt="x" * 200_000, max_tokens=1)).encode()
    assert len(big) < 32 << 20 and server.post(b" " * (33 << 20))[0] == 413


def test_errors_shown_by_the_client(server):
    with pytest.raises(APIStatusError) as e: server.client.completions.create(model="gpt-9", prompt="x")
    assert e.value.status_code == 404 and "there is no model 'gpt-9' here: this server has copy" in str(e.value)
    chat = server.client.chat.completions.create
    for wrong, says in ((dict(logprobs=3), "the number of alternatives is top_logprobs"), (dict(top_logprobs=3), "top_logprobs needs logprobs: true"),
                        (dict(logprobs=True, top_logprobs=21), "top_logprobs must be an integer from 0 to 20")):
        with pytest.raises(APIStatusError) as e: chat(model="copy", messages=[dict(role="user", content="x")], **wrong)
        assert e.value.status_code == 400 and says in str(e.value)
    for wrong, says in (dict(logprobs=True), "must be an integer from 0 to 20"), (dict(logprobs=21), "must be an integer from 0 to 20"), (dict(n=3), "n must be 1"), (dict(max_tokens=0), "max_tokens must be at least 1"):
        with pytest.raises(APIStatusError) as e: server.client.completions.create(model="copy", prompt="x", **wrong)
        assert e.value.status_code == 400 and says in str(e.value)
    assert [m.id for m in server.client.models.list()] == ["copy"] == [server.client.models.retrieve("copy").id]
    with pytest.raises(APIStatusError) as e: server.client.models.retrieve("gpt-9")
    assert e.value.status_code == 404


def test_message_parts_are_joined(server):
    def ask(content): return server.client.chat.completions.create(model="copy", messages=[dict(role="user", content=content)], max_tokens=8, temperature=0)
    whole, parts = ask("write a class"), ask([dict(type="text", text="write "), dict(type="text", text="a class")])
    assert parts.usage.prompt_tokens == whole.usage.prompt_tokens and parts.choices[0].message.content == whole.choices[0].message.content


def test_server_ends(folder, tmp_path, server):
    "Nothing waits for ever: a taken port, a model that is none, and Ctrl-C while somebody is served."
    def run(*argv): return subprocess.run([sys.executable, "-m", "xlstm_metal", "mlx", "server", *map(str, argv)], capture_output=True, text=True,
                                          env=os.environ | dict(HF_HUB_OFFLINE="1"), timeout=60)
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    for argv, reason in ((("--model", folder, "--port", server.port), "in use"),
                         (("--model", tmp_path, "--port", 0), "the generation thread has ended")):
        r = run(*argv)
        assert r.returncode == 2 and reason in r.stderr.splitlines()[-1], r.stderr
    running = Running("--model", folder)
    for seed in ({}, dict(seed=1)): # in a batch, and alone
        c = http.client.HTTPConnection("127.0.0.1", running.port, timeout=60)
        c.request("POST", "/v1/completions", json.dumps(dict(prompt="class A:", max_tokens=10**6, stream=True) | seed))
        answer = c.getresponse()
        assert answer.readline().startswith(b":")
        if not seed: answer.close()
    running.process.send_signal(signal.SIGINT)
    said = running.process.communicate(timeout=20)[1]
    assert running.process.returncode == 0 and "Traceback" not in said, said


def test_more_connections_than_select_supports():
    import fcntl, resource, types
    from xlstm_metal.apps.server import CancelOnDisconnect
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if 0 <= soft < 2000: resource.setrlimit(resource.RLIMIT_NOFILE, (2000, hard))
    here, there = socket.socketpair()
    watcher = CancelOnDisconnect(types.SimpleNamespace(_stop=False), socket.socket(fileno=fcntl.fcntl(here.fileno(), fcntl.F_DUPFD, 1500)))
    watcher.check()
    there.close()
    with pytest.raises(ConnectionAbortedError): watcher.check()


def test_serving_a_stack(tmp_path):
    import shutil
    from mlx.utils import tree_flatten
    from xlstm_metal.files import bundled
    from xlstm_metal.model.config import xLSTMConfig
    from xlstm_metal.model.model import Model
    cell = dict(num_heads=2)
    d = dict(model_type="xlstm", embedding_dim=32, num_blocks=2, vocab_size=4096, slstm_at=[1], bos_token_id=0, mlstm_block=dict(mlstm=cell), slstm_block=dict(slstm=cell, feedforward={}))
    mx.random.seed(0)
    mx.save_safetensors(str(tmp_path / "model.safetensors"), dict(tree_flatten(Model(xLSTMConfig.from_dict(d)).parameters())))
    (tmp_path / "config.json").write_text(json.dumps(d))
    for f in bundled.glob("tokenizer*"): shutil.copy(f, tmp_path)
    running = Running("--model", tmp_path)
    prompts = PROMPTS[:9]
    alone = [running.stream(p, 8) for p in prompts]
    with ThreadPoolExecutor(9) as pool: together = list(pool.map(lambda p: running.stream(p, 8), prompts))
    said = running.stop()
    assert together == alone and len(set(alone)) > 3 and "Traceback" not in said, said
