"States as a service, through OpenAI's client: what was read is not read again, a name keeps what it was given, and nobody sees what another one has read."
import http.client
import json
import os
import random
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import mlx.core as mx
import pytest
from openai import APIError, APIStatusError, OpenAI
from test_server import Running

import xlstm_metal as xm
from xlstm_metal.generation.state import State
from xlstm_metal.generation.named_states import NamedStates
from xlstm_metal.model.convert import convert
from xlstm_metal.model.tokenizer import encode

SOURCE = Path(xm.__file__).parent / "generation" / "state.py"
DOCUMENT = SOURCE.read_text()[:2500].rstrip()
QUESTIONS = ["How is a state saved?", "Which of these methods raises an error if the file is damaged, and why?", "Who?"]
STATE = 944_000 # bytes of a file, a little more


class Served(Running):
    "With routes for states."
    def states(self, method, name="", **kw):
        return getattr(self.client, method)(f"/states/{name}".rstrip("/"), cast_to=object, **kw)

    def names(self): return {s["id"]: s for s in self.states("get")["data"]}
    def create(self, name, text=None, after=None):
        return self.states("post", body={k: v for k, v in dict(name=name, text=text).items() if v is not None} | ({"from": after} if after else {}))

    def ask(self, prompt, state=None, save=None, n=12, **kw):
        body = {k: v for k, v in dict(state=state, save_state=save).items() if v}
        return self.write(prompt, n, extra_body=body, **kw)

    def raw(self, method, path, body=None, **headers):
        c = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        c.request(method, path, body, headers)
        r = c.getresponse()
        return r.status, r.read()

    def kill(self):
        self.process.kill()
        self.process.wait()


def refused(status, says, f, *args, **kw):
    with pytest.raises(APIStatusError) as e: f(*args, **kw)
    assert e.value.status_code == status and says in str(e.value), e.value
    assert "/tmp" not in str(e.value)


@pytest.fixture(scope="module")
def folder(tmp_path_factory): return convert(None, tmp_path_factory.mktemp("states") / "copy", to="mlx", dequantize=True, dtype="float32")


@pytest.fixture(scope="module")
def loaded(folder): return xm.load(folder, mx.float32)


@pytest.fixture(scope="module")
def server(folder, tmp_path_factory):
    running = Served("--model", folder, "--state-folder", tmp_path_factory.mktemp("named"))
    yield running
    said = running.stop()
    assert "Traceback" not in said, said


def alone(loaded, prompt, n=12, state=None):
    model, tokenizer = loaded
    return xm.generate(model, tokenizer, prompt, state=state, max_tokens=n).strip()


def known(usage, document): # the share of a document's tokens that were not read
    return min(1, usage.prompt_tokens_details.cached_tokens / document)


def test_second_question_about_a_document(server, loaded):
    model, tokenizer = loaded
    document = len(encode(tokenizer, DOCUMENT, model.args))
    for n, question in enumerate(QUESTIONS):
        prompt = f"{DOCUMENT}\n\nQuestion: {question}\nAnswer:"
        r = server.ask(prompt)
        assert r.choices[0].text.strip() == alone(loaded, prompt)
        assert known(r.usage, document) >= (.95 if n else 0)
    assert known(r.usage, document) == 1 # its end is known by now


@pytest.mark.parametrize("before", ["", "You answer in one word."])
def test_second_question_in_a_chat(server, loaded, before):
    "The document in one message with the question, with and without a system prompt; the model has no chat template."
    model, tokenizer = loaded
    text = SOURCE.read_text()[2500:4700] + before
    document = len(encode(tokenizer, text, model.args))
    for n, question in enumerate(QUESTIONS):
        messages = [dict(role="system", content=before)] * bool(before) + [dict(role="user", content=f"{text} {question}")]
        r = server.client.chat.completions.create(model="copy", messages=messages, max_tokens=8, temperature=0)
        assert known(r.usage, document) >= (.95 if n else 0)


def test_second_question_behind_a_state(server, loaded):
    "What continues a state has checkpoints, too, and a state that is made again finds them."
    server.create("before", "import os\n")
    for n, question in enumerate(QUESTIONS):
        r = server.ask(f"{DOCUMENT}\n\nQuestion: {question}", "before")
        assert r.usage.prompt_tokens_details.cached_tokens > (.95 * (r.usage.prompt_tokens - 25) if n else 0)
        assert r.choices[0].text.strip() == alone(loaded, f"import os\n{DOCUMENT}\n\nQuestion: {question}")
        server.states("delete", "before")
        server.create("before", "import os\n")
    server.states("delete", "before")


def test_one_system_prompt_for_different_messages(server, loaded):
    model, tokenizer = loaded
    system = SOURCE.read_text()[5000:7000]
    length = len(encode(tokenizer, system, model.args))
    for n, content in enumerate(("hello", SOURCE.read_text()[9000:10500], "why")):
        messages = [dict(role="system", content=system), dict(role="user", content=content)]
        r = server.client.chat.completions.create(model="copy", messages=messages, max_tokens=4, temperature=0)
        assert known(r.usage, length) >= (.98 if n else 0)


def test_killed_and_started_again(folder, loaded, tmp_path):
    "Checkpoints and named states are there after kill -9, and give the same answers."
    model, tokenizer = loaded
    document = len(encode(tokenizer, DOCUMENT, model.args))
    prompts = [f"{DOCUMENT}\n\nQuestion: {q}\nAnswer:" for q in QUESTIONS]
    running = Served("--model", folder, "--state-folder", tmp_path)
    running.ask(prompts[0])
    running.create("book", DOCUMENT)
    running.ask("\n\nQuestion: Why?\nAnswer:", "book", "talk")
    before = running.names()
    written, since = 0, time.time()
    while written < 4 or time.time() < since + 5: # an idle server writes one after the other
        if (n := len(list(tmp_path.glob("checkpoints/*.state")))) != written: written, since = n, time.time()
        assert time.time() < since + 60
        time.sleep(.1)
    running.kill()
    running = Served("--model", folder, "--state-folder", tmp_path)
    r = running.ask(prompts[1])
    assert known(r.usage, document) >= .95 and r.choices[0].text.strip() == alone(loaded, prompts[1])
    assert {n: s["tokens"] for n, s in running.names().items()} == {n: s["tokens"] for n, s in before.items()}
    r = running.ask("\n\nQuestion: Who?\nAnswer:", "book")
    assert r.choices[0].text.strip() == alone(loaded, f"{DOCUMENT}\n\nQuestion: Who?\nAnswer:") and known(r.usage, document) == 1
    running.kill()
    for f in tmp_path.glob("checkpoints/*.state"): f.write_bytes(f.read_bytes()[:-1]) # all that is lost is time
    running = Served("--model", folder, "--state-folder", tmp_path, "--log-level", "WARNING")
    r = running.ask(prompts[1])
    assert r.choices[0].text.strip() == alone(loaded, prompts[1]) and not r.usage.prompt_tokens_details.cached_tokens
    said = running.stop()
    assert "is corrupt" in said or "is cut short" in said, said


def test_two_hundred_states(folder, loaded, tmp_path):
    "All within the budget, each for what it was made of; then there is no room, until there is."
    running = Served("--model", folder, "--state-folder", tmp_path, "--state-bytes", 200 * STATE, "--prompt-cache-bytes", 5 * STATE)
    texts = [f"class Number{n}:\n    value = {n}\n" for n in range(200)]
    with ThreadPoolExecutor(8) as pool: list(pool.map(lambda n: running.create(f"n{n}", texts[n]), range(200)))
    names = running.names()
    assert len(names) == 200 and sum(s["bytes"] for s in names.values()) <= 200 * STATE
    assert sum(f.stat().st_size for f in tmp_path.glob("*.state")) <= 200 * STATE
    for n in range(0, 200, 37): assert running.ask("\n    def", f"n{n}").choices[0].text.strip() == alone(loaded, texts[n] + "\n    def")
    for f, args in (running.create, ("more", "x")), (running.create, ("more", None, "n7")), (running.ask, ("x", None, "more")):
        refused(403, "there is no room for 'more'", f, *args)
    running.ask("\n    x", "n3", "n3") # in place of one there is room
    running.states("delete", "n7")
    running.create("more", "x")
    assert running.names().keys() == names.keys() - {"n7"} | {"more"}
    running.stop()
    running = Served("--model", folder, "--state-folder", tmp_path, "--state-count", 200)
    refused(403, "200 states of at most 200", running.create, "another", "x")
    running.stop()


def test_answers_on_states_equal_single_runs(server, loaded):
    "64 streams at once on eight states; others leave, fail, make and delete states in between."
    model, tokenizer = loaded
    texts = {f"s{n}": f"import m{n}\n\ndef read_{n}(path_{n}):\n    return open(path_{n}, '{'rwab'[n % 4]}')\n" for n in range(8)}
    for name, text in texts.items(): server.create(name, text)
    prompts = [(name, f"\ndef {verb}_{name}(") for name in texts for verb in "copy walk load save join split close merge".split()]
    want = [alone(loaded, prompt, 12, State(model).prefill(texts[name], tokenizer, None)) for name, prompt in prompts]
    assert len(set(want)) > 40

    def stream(n):
        time.sleep(.002 * n)
        name, prompt = prompts[n]
        return "".join(c.choices[0].text for c in server.ask(prompt, name, n=12, stream=True)).strip()

    def leave(n):
        c = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
        c.request("POST", "/v1/completions", json.dumps(dict(prompt="\ndef", max_tokens=5000, stream=n % 2 == 0, state=f"s{n % 8}", save_state=f"left{n}")))
        time.sleep(.05 * n)
        c.sock.close(), c.close()

    def make(n):
        server.create(f"new{n}", f"x = {n}\n" * 50)
        server.ask("y", f"new{n}", f"new{n}")
        server.states("delete", f"new{n}")

    def fail(n):
        with pytest.raises(APIStatusError): server.ask("x", f"none{n}")

    with ThreadPoolExecutor(64 + 24) as pool:
        others = [pool.submit((leave, make, fail)[n % 3], n) for n in range(24)]
        got = list(pool.map(stream, range(64)))
    for o in others: o.result()
    assert got == want
    for name, text in texts.items(): # nobody has moved a state
        assert server.names()[name]["tokens"] == len(encode(tokenizer, text, model.args))
    deadline = time.time() + 20
    while any(n.startswith(("left", "new")) for n in server.names()): assert time.time() < deadline or time.sleep(.2)
    assert not [f for f in server.folder.iterdir() if f.name.endswith((".lock", ".safetensors"))]
    for name in texts: server.states("delete", name)


@pytest.fixture(autouse=True)
def remember_folder(server, request):
    args = server.process.args
    server.folder = Path(args[args.index("--state-folder") + 1])


@pytest.mark.parametrize("stream", [False, True])
def test_a_conversation_under_a_name(server, loaded, stream):
    "Turn by turn, only what is new is sent; the state is what reading everything gives."
    model, tokenizer = loaded
    server.create("talk", "# A talk about files\n")
    cold = State(model).prefill("# A talk about files\n", tokenizer, None)
    for turn in range(3):
        r = server.ask(f"\n# question {turn}\n", "talk", "talk", n=8, stream=stream)
        text = "".join(c.choices[0].text for c in r) if stream else r.choices[0].text
        assert text.strip() == alone(loaded, f"\n# question {turn}\n", 8, cold)
        assert server.names()["talk"]["tokens"] == cold.tokens
    saved = State.load(server.folder / "talk.state", model)
    assert saved.counts == cold.counts and mx.abs(saved.logits - cold.logits).max() < 1e-3
    server.states("delete", "talk")


def test_one_format_everywhere(server, loaded, folder, tmp_path):
    "A state goes from Python to the server, from there to a file, from there to the terminal, and back."
    model, tokenizer = loaded
    book = State(model).prefill(DOCUMENT, tokenizer, None)
    book.save(tmp_path / "mine")
    status, said = server.raw("PUT", "/v1/states/theirs", (tmp_path / "mine").read_bytes())
    assert status == 200 and json.loads(said)["tokens"] == book.tokens
    want = alone(loaded, "\n\ndef", 12, book.fork())
    assert server.ask("\n\ndef", "theirs").choices[0].text.strip() == want
    status, file = server.raw("GET", "/v1/states/theirs/content")
    assert status == 200 and file == (server.folder / "theirs.state").read_bytes()
    (tmp_path / "back").write_bytes(file)
    assert alone(loaded, "\n\ndef", 12, State.load(tmp_path / "back", model)) == want
    NamedStates(model, server.folder).fork("theirs", "python") # in the folder, while the server runs
    assert server.ask("\n\ndef", "python").choices[0].text.strip() == want
    NamedStates(model, server.folder).put("python", State(model).prefill("import os\n", tokenizer, None), replace=True)
    assert server.ask("\n\ndef", "python").choices[0].text.strip() == alone(loaded, "import os\n\n\ndef")
    def terminal(*argv): return subprocess.run([sys.executable, "-m", "xlstm_metal", "state", *argv, "--folder", server.folder], capture_output=True, text=True, timeout=60)
    listed = [line.split("\t") for line in terminal("list").stdout.splitlines()]
    assert {n: (int(tokens), int(size)) for n, tokens, size in listed} == {n: (s["tokens"], s["bytes"]) for n, s in server.names().items()}
    r = terminal("ask", "theirs", "--prompt", "\n\ndef", "--max-tokens", "12", "--model", folder, "--dtype", "float32", "--save-as", "terminal")
    assert r.stdout.strip() == want and server.names()["terminal"]["tokens"] > book.tokens + 12, r.stderr
    for name in ("theirs", "python", "terminal"): server.states("delete", name)
    assert terminal("ask", "theirs", "-p", "x").stderr == "xlstm-metal: there is no state 'theirs'\n"


def test_bad_input(server, loaded, tmp_path):
    "One clear error each, and nothing is lost."
    model, tokenizer = loaded
    server.create("kept", "import os\n")
    before = {f.name: f.read_bytes() for f in server.folder.glob("*.state")}
    refused(404, "there is no state 'none'", server.ask, "x", "none")
    refused(404, "there is no state 'none'", server.create, "new", "x", "none")
    refused(404, "there is no state 'none'", server.states, "delete", "none")
    for name in ("../kept", "a/b", "/etc/passwd", ".x", "Kept", "x" * 65, "a b"):
        refused(400, "name must be", server.ask, "x", name)
        refused(400, "name must be", server.ask, "x", None, name)
        refused(400, "name must be", server.create, name, "x")
    assert server.raw("GET", "/v1/states/..%2f..%2fetc%2fpasswd")[0] == 400
    refused(400, "name must be", server.ask, "x", 5)
    refused(409, "there is a state 'kept' already", server.create, "kept", "x")
    refused(409, "there is a state 'kept' already", server.ask, "x", None, "kept")
    for body, says in (dict(name="new"), "needs a text"), (dict(name="new", text=""), "needs a text"), (dict(name="new", text=5), "needs a text"), \
                      (dict(name="new", text="x", path="/etc"), "not of path"), (dict(text="x"), "name must be"):
        refused(400, says, server.states, "post", body=body)
    cousin, _ = xm.load(dtype=mx.float32)
    cousin.lm_head.weight *= 2
    State(cousin).read([1, 2]).save(tmp_path / "cousin")
    file = (tmp_path / "cousin").read_bytes()
    for upload, says in (file, "the uploaded file is the state of another model"), (before["kept.state"][:-9], "the uploaded file is cut short or corrupt"), \
                        (b"", "the text is empty"), (b"\xff\xfe", "neither UTF-8 text nor a state file"), (b"x", None):
        status, said = server.raw("PUT", "/v1/states/" + ("new" if says else "kept"), upload)
        assert status == (400 if says else 409) and (says or "already") in said.decode() and "/tmp" not in said.decode()
    (server.folder / "cousin.state").write_bytes(file)
    refused(400, "the state 'cousin' is of another model", server.ask, "x", "cousin")
    assert "another model" in server.names()["cousin"]["error"]
    (server.folder / "cousin.state").unlink()
    assert {f.name: f.read_bytes() for f in server.folder.glob("*.state")} == before
    assert not list(server.folder.glob(".*"))
    (server.folder / "kept.state").write_bytes(before["kept.state"][:-1]) # cut while the server runs
    refused(400, "the state 'kept' is cut short or corrupt", server.ask, "x", "kept")
    (server.folder / "kept.state").write_bytes(before["kept.state"])
    assert server.ask("x", "kept").usage.completion_tokens == 12
    server.states("delete", "kept")


def test_an_upload_that_breaks_off(server):
    file = (SOURCE.read_bytes() * 50)[:1_000_000]
    for head in (b"", b"\x10\0\0\0\0\0\0\0{"): # a text, a state file
        with socket.create_connection(("127.0.0.1", server.port), timeout=20) as s:
            s.sendall(b"PUT /v1/states/broken HTTP/1.1\r\nContent-Length: 1000000\r\n\r\n" + head + file[:400_000])
            s.shutdown(socket.SHUT_WR)
            assert s.recv(100).split()[1] == b"400"
    c = http.client.HTTPConnection("127.0.0.1", server.port)
    c.request("POST", "/v1/states", json.dumps(dict(name="broken", text="word " * 100_000)))
    time.sleep(.3)
    c.sock.close(), c.close() # who leaves gets no state
    end = time.time() + 30
    while list(server.folder.glob(".broken.lock")): assert time.time() < end or time.sleep(.1)
    assert "broken" not in server.names() and not list(server.folder.glob(".*"))


@pytest.mark.parametrize("stream", [False, True])
def test_a_state_that_cannot_be_written(folder, tmp_path, stream):
    "The disk fails between question and answer: the client hears of it, and the old state is there."
    running = Served("--model", folder, "--state-folder", tmp_path / "a")
    running.create("talk", "import os\n")
    before, move = (tmp_path / "a" / "talk.state").read_bytes(), threading.Timer(.7, lambda: (tmp_path / "a").rename(tmp_path / "b"))
    move.start()
    with pytest.raises(APIError) as e:
        r = running.ask("\ndef", "talk", "talk", n=600, stream=stream)
        for chunk in r if stream else (): pass
    assert "'talk'" in str(e.value) and "written" in str(e.value) and str(tmp_path) not in str(e.value)
    assert (tmp_path / "b" / "talk.state").read_bytes() == before
    refused(400, "the state 'new' cannot be written: No such file", running.create, "new", "x")
    status, said = running.raw("PUT", "/v1/states/new", before)
    assert status == 400 and "the state 'new' cannot be written: No such file" in said.decode()
    refused(404, "there is no state 'talk'", running.ask, "x", "talk")
    (tmp_path / "b").rename(tmp_path / "a")
    assert running.ask("\ndef", "talk", "talk").usage.completion_tokens == 12
    assert "Traceback" not in running.stop()


def test_two_writers(server, loaded):
    "Of several that write to one name at once one does, and the others are told."
    client = OpenAI(base_url=server.client.base_url, api_key="none", max_retries=0)
    def create(n):
        try: return client.post("/states", cast_to=object, body=dict(name="one", text=f"number = {n}\n" * 40))["tokens"]
        except APIStatusError as e: return e.status_code
    with ThreadPoolExecutor(8) as pool: got = list(pool.map(create, range(8)))
    assert got.count(409) == 7 and server.names()["one"]["tokens"] in got
    def save(n):
        try: return server.ask(f"# {n}\n", "one", "one", n=20).usage.total_tokens
        except APIStatusError as e: return (e.status_code, str(e))
    with ThreadPoolExecutor(8) as pool: got = list(pool.map(save, range(8)))
    told = [g for g in got if isinstance(g, tuple)]
    assert told and all(g[0] == 409 and "'one' is being written by somebody else" in g[1] for g in told)
    assert server.names()["one"]["tokens"] in [g for g in got if isinstance(g, int)]
    server.states("delete", "one")


def test_killed_while_states_are_written(folder, loaded, tmp_path):
    "Every state is whole or not there, whenever the server is killed; those that were confirmed are there."
    model, tokenizer = loaded
    for round_ in range(2):
        running, confirmed = Served("--model", folder, "--state-folder", tmp_path), []
        def work(n):
            for k in range(1000):
                try: confirmed.append((f"r{round_}.{n}.{k}", running.create(f"r{round_}.{n}.{k}", f"x = {k}\n")["tokens"]))
                except Exception: return
        threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
        for t in threads: t.start()
        end = time.monotonic() + 60
        while len(confirmed) <= 8 and time.monotonic() < end: time.sleep(.01)
        time.sleep(random.random())
        running.kill()
        for t in threads: t.join()
        assert len(confirmed) > 8
        states = NamedStates(model, tmp_path)
        for name, tokens in confirmed: assert states.info(name).tokens == tokens
        for name in states: states.get(name)
        states.create(f"again{round_}", "x", tokenizer) # no lock is left behind
    running = Served("--model", folder, "--state-folder", tmp_path)
    assert not [s for s in running.names().values() if "error" in s]
    running.stop()


def test_access(folder, tmp_path):
    env = os.environ | dict(HF_HUB_OFFLINE="1")
    def start(*argv, **more): return subprocess.run([sys.executable, "-m", "xlstm_metal", "mlx", "server", "--port", "0", *argv], capture_output=True, text=True, env=env | more, timeout=60)
    for host in ("0.0.0.0", "::", "somewhere.example"):
        r = start("--host", host)
        assert r.returncode == 2 and r.stderr.strip().count("\n") == 0 and "needs --api-key" in r.stderr
    (tmp_path / "file").touch()
    r = start("--state-folder", str(tmp_path / "file" / "x"))
    assert r.returncode == 2 and "cannot be used for states: Not a directory" in r.stderr
    r = start("--checkpoint-every", "0")
    assert r.returncode == 2 and "must be a whole number" in r.stderr
    running = Served("--model", folder, "--state-folder", tmp_path / "s", "--host", "0.0.0.0", "--api-key", "secret")
    for key in ("none", "", "secret2", "secre"):
        client = OpenAI(base_url=running.client.base_url, api_key=key or "x", max_retries=0)
        for ask in (lambda: client.models.list(), lambda: client.get("/states", cast_to=object), lambda: client.completions.create(model="copy", prompt="x")):
            refused(401, "the API key is missing or wrong", ask)
    for method, path in ("GET", "/v1/states"), ("PUT", "/v1/states/x"), ("DELETE", "/v1/states/x"), ("POST", "/v1/completions"), ("GET", "/v1/models"):
        assert running.raw(method, path)[0] == 401
    assert running.raw("GET", "/health")[0] == 200 and running.raw("OPTIONS", "/v1/states")[0] == 204
    running.client = OpenAI(base_url=running.client.base_url, api_key="secret", max_retries=0)
    assert running.create("x", "import os\n")["tokens"] and running.ask("x", "x").usage.completion_tokens
    assert running.raw("GET", "/v1/states", Authorization="Bearer secret", Origin="http://page.example")[0] == 200
    running.stop()


def test_pages_of_others_and_servers_without_a_folder(server, folder):
    assert server.raw("GET", "/v1/states", Origin="http://page.example")[0] == 403
    assert server.raw("POST", "/v1/completions", json.dumps(dict(prompt="x", max_tokens=1, state="x")), Origin="http://page.example")[0] == 403
    running = Served("--model", folder, "--allowed-origins", "http://page.example")
    assert running.raw("GET", "/v1/states", Origin="http://page.example")[0] == 404
    refused(404, "this server keeps no states", running.ask, "x", "x")
    refused(404, "this server keeps no states", running.ask, "x", None, "x")
    refused(404, "this server keeps no states", running.create, "x", "x")
    running.ask(f"{DOCUMENT}\n\nWhy?")
    assert running.ask(f"{DOCUMENT}\n\nWho?").usage.prompt_tokens_details.cached_tokens > 500 # checkpoints in memory
    running.stop()


def test_seeded_requests_use_states(server, loaded):
    "They are served one by one, by another part of mlx-lm."
    server.create("seeded", DOCUMENT)
    r = server.ask("\n\ndef", "seeded", "after", seed=1)
    assert r.choices[0].text.strip() == alone(loaded, DOCUMENT + "\n\ndef") and r.usage.prompt_tokens_details.cached_tokens > 500
    assert server.names()["after"]["tokens"] == r.usage.total_tokens
    model, tokenizer = loaded
    cold, saved = State(model).prefill(DOCUMENT, tokenizer, None), State.load(server.folder / "after.state", model)
    xm.generate(model, tokenizer, "\n\ndef", state=cold, max_tokens=12)
    assert saved.counts == cold.counts and mx.abs(saved.logits - cold.logits).max() < 1e-3
    for name in ("seeded", "after"): server.states("delete", name)
