"Hub ids, against a hub of our own on this machine: download, cache, revision, token, offline, and info from headers alone."
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent / "fixtures" / "hf_tiny"
COMMITS = {"main": "a" * 40, "v2": "b" * 40}


class Hub(BaseHTTPRequestHandler):
    "As much of the hub's protocol as a download needs; `someone/private` wants the token `secret`."
    protocol_version = "HTTP/1.1"

    def do_HEAD(self): self.do_GET()

    def do_GET(self):
        self.server.asked.append((self.command, self.path))
        path = self.path.split("?")[0]
        if m := re.fullmatch(r"/api/models/someone/(tiny|private)(?:/revision/([^/]+))?", path):
            if m[1] == "private" and self.headers.get("authorization") != "Bearer secret": return self.refuse(401, "RepoNotFound")
            commit = self.commit(m[2] or "main")
            if commit is None: return self.refuse(404, "RevisionNotFound")
            files = [dict(rfilename=f.name) for f in sorted(FOLDER.iterdir()) if f.name != "reference.safetensors"]
            return self.answer(json.dumps(dict(id=f"someone/{m[1]}", sha=commit, siblings=files, private=False, tags=[], downloads=0)).encode())
        if m := re.fullmatch(r"/api/models/someone/(tiny|private)/tree/([^/]+)", path):
            return self.answer(json.dumps([dict(type="file", path=f.name, size=f.stat().st_size, oid="0" * 40) for f in sorted(FOLDER.iterdir())]).encode())
        if m := re.fullmatch(r"/someone/(tiny|private)/resolve/([^/]+)/(.+)", path):
            if m[1] == "private" and self.headers.get("authorization") != "Bearer secret": return self.refuse(401, "RepoNotFound")
            f, commit = FOLDER / m[3], self.commit(m[2])
            if commit is None: return self.refuse(404, "RevisionNotFound")
            if not f.exists(): return self.refuse(404, "EntryNotFound", {"X-Repo-Commit": commit})
            return self.answer(f.read_bytes(), {"X-Repo-Commit": commit, "ETag": f'"{f.name}-{commit[:1]}"'})
        self.refuse(404, "RepoNotFound")

    def commit(self, revision): return COMMITS.get(revision, revision if revision in COMMITS.values() else None)

    def refuse(self, code, why, headers={}): self.answer(b"{}", {"X-Error-Code": why, **headers}, code)

    def answer(self, body, headers={}, code=200):
        if code == 200 and (r := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))):
            first, last = int(r[1]), min(int(r[2] or len(body) - 1), len(body) - 1)
            headers = headers | {"Content-Range": f"bytes {first}-{last}/{len(body)}"}
            body, code = body[first:last + 1], 206
        self.send_response(code)
        for k, v in {"Content-Length": str(len(body)), **headers}.items(): self.send_header(k, v)
        self.end_headers()
        if self.command == "GET":
            name = self.path.split("/")[-1]
            if name in self.server.drop:
                self.server.drop.remove(name)
                self.wfile.write(body[:len(body) // 2])
                self.close_connection = True
                return
            self.wfile.write(body)
            self.server.sent += len(body)

    def log_message(self, *_): pass


@pytest.fixture
def hub(tmp_path):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.asked, server.sent, server.drop = [], 0, set()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    server.env = os.environ | {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HOME": str(tmp_path), "HF_HUB_DISABLE_XET": "1",
                               "HF_HUB_DISABLE_PROGRESS_BARS": "0", "HF_HUB_OFFLINE": "0"}
    yield server
    server.shutdown()


def python(hub, code, **env):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, env=hub.env | env)


LOAD = "import xlstm_metal as xm; m, _ = xm.load({0!r}, 'float32'{1}); print(m.args.vocab_size, sum(a.size for _, a in __import__('mlx.utils').utils.tree_flatten(m.parameters())))"
SAYS = "import xlstm_metal as xm\ntry: xm.load({0!r}{1})\nexcept ValueError as e: print(type(e).__name__, e)"


def test_download_then_cache_then_offline(hub):
    first = python(hub, LOAD.format("someone/tiny", ""))
    assert first.returncode == 0, first.stderr
    assert first.stdout.startswith("80 ") and "%" in first.stderr # a progress bar
    sent = hub.sent
    assert sent > (FOLDER / "model.safetensors").stat().st_size
    assert python(hub, LOAD.format("someone/tiny", "")).stdout == first.stdout and hub.sent < sent + 10_000 # the cache
    assert python(hub, LOAD.format("someone/tiny", ""), HF_HUB_OFFLINE="1").stdout == first.stdout
    assert not any("reference.safetensors" in path for _, path in hub.asked) # only what a model needs


def test_a_broken_connection_is_tried_again(hub):
    hub.drop = {"model.safetensors"} # the first time, only half arrives
    assert python(hub, LOAD.format("someone/tiny", "")).returncode == 0
    assert sum(command == "GET" and "model.safetensors" in path for command, path in hub.asked) == 2


def test_only_what_is_missing_is_downloaded_again(hub, tmp_path):
    assert python(hub, LOAD.format("someone/tiny", "")).returncode == 0
    next(tmp_path.rglob("snapshots/*/config.json")).resolve().unlink()
    hub.asked.clear()
    assert python(hub, LOAD.format("someone/tiny", "")).returncode == 0
    assert {path.split("/")[-1] for command, path in hub.asked if command == "GET" and "resolve" in path} == {"config.json"}


def test_revision_and_token(hub):
    assert python(hub, LOAD.format("someone/tiny", ", revision='v2'")).returncode == 0
    assert any("/v2" in path or COMMITS["v2"] in path for _, path in hub.asked)
    assert "CheckpointError someone/tiny has no revision 'nope'" in python(hub, SAYS.format("someone/tiny", ", revision='nope'")).stdout
    assert "needs a token" in python(hub, SAYS.format("someone/private", "")).stdout
    assert python(hub, LOAD.format("someone/private", ", token='secret'")).returncode == 0


def test_no_such_model_and_no_hub(hub):
    assert "no such model on the hub" in python(hub, SAYS.format("someone/else", "")).stdout
    assert "hub cannot be reached" in python(hub, SAYS.format("someone/tiny", ""), HF_HUB_OFFLINE="1").stdout
    hub.shutdown(); hub.server_close()
    assert "hub cannot be reached" in python(hub, SAYS.format("someone/tiny", "")).stdout


@pytest.mark.parametrize("argv", [("generate", "-p", "x", "-m", "someone/tiny"), ("info", "-m", "someone/tiny"), ("convert", "someone/tiny", "out")], ids=lambda a: a[0])
def test_without_a_hub_there_is_one_sentence_at_once(tmp_path, argv):
    with socket.socket() as s: # nobody listens there afterwards
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    env = os.environ | {"HF_ENDPOINT": f"http://127.0.0.1:{port}", "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0"}
    def timed(*argv):
        start = time.perf_counter()
        return subprocess.run([sys.executable, "-m", "xlstm_metal", *argv], capture_output=True, text=True, env=env, timeout=120, cwd=tmp_path), time.perf_counter() - start
    _, known = timed("info", "-m", "bundled") # most of it is imports
    r, took = timed(*argv)
    assert (r.returncode, r.stdout) == (2, "") and r.stderr.count("\n") == 1 and "the hub cannot be reached" in r.stderr, r.stderr
    assert took < known + 2, (took, known)


def test_a_cached_model_needs_no_hub(hub):
    assert python(hub, LOAD.format("someone/tiny", "")).returncode == 0
    hub.shutdown(); hub.server_close()
    start = time.perf_counter()
    r = python(hub, LOAD.format("someone/tiny", ""))
    assert r.returncode == 0 and r.stdout.startswith("80 ") and "Retrying" not in r.stderr and time.perf_counter() - start < 10, r.stderr


def test_info_takes_headers_only(hub):
    def info(*more):
        return subprocess.run([sys.executable, "-m", "xlstm_metal", "info", "-m", "someone/tiny", *more], capture_output=True, text=True, env=hub.env, timeout=60)
    for _ in range(2): # the second time the config is in the cache, and still no weights are fetched
        r = info()
        assert r.returncode == 0, r.stderr
        assert "2 mLSTM" in r.stdout and "Hugging Face" in r.stdout
    assert hub.sent < 300_000 < (FOLDER / "model.safetensors").stat().st_size
    assert "no revision 'nope'" in info("--revision", "nope").stderr
    assert info("--revision", "v2").returncode == 0
    assert python(hub, LOAD.format("someone/tiny", "")).returncode == 0
    hub.shutdown(); hub.server_close()
    assert info().returncode == 0 # all of it is in the cache now


def test_wiring_takes_headers_only(hub):
    r = subprocess.run([sys.executable, "-m", "xlstm_metal", "info", "-m", "someone/tiny", "--show-wiring"], capture_output=True, text=True, env=hub.env, timeout=60)
    assert r.returncode == 0, r.stderr
    assert "blocks 0-1 ── 2 x mLSTM of " in r.stdout and "lm_head ── logits " in r.stdout
    assert hub.sent < 300_000 < (FOLDER / "model.safetensors").stat().st_size
