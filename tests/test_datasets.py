"Token datasets: what is refused, whole or not at all, done once, and sizes that a notebook has no time for."
import gzip
import json
import os
import random
import signal
import subprocess
import sys
import time
import warnings
from importlib.util import find_spec
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from xlstm_metal.train import datasets as module
from xlstm_metal.train.data import DataError, corpus, held_out
from xlstm_metal.train.datasets import TokenDataset, batches_per_epoch, documents, packed, prepare_in_background

CHAT = "{% for m in messages %}<{{ m.role }}> {{ m.content }} {% endfor %}<end>"


def numbers(n, **kw):
    "A tokenizer of numbers below n; id 0 ends a text."
    words = Tokenizer(models.WordLevel({"<end>": 0} | {str(i): i for i in range(1, n)}, unk_token="<end>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, **{"eos_token": "<end>", **kw})


def lines(path, rows):
    "Rows as a file of JSON lines, packed by gzip if its name says so."
    data = "".join(json.dumps(r) + "\n" for r in rows).encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def whole(folder, tokenizer, texts):
    "Check that a folder holds these texts, and nothing beside it."
    data = TokenDataset(folder)
    got = {name: view[i].tolist() for view in (data.train, data.test) for i, name in enumerate(view.names)}
    assert got == {n: [*tokenizer.encode(t, add_special_tokens=False), 0] for n, t in texts.items()}
    return data


@pytest.fixture(scope="module")
def toy(): return numbers(1000)


# --- documents

@pytest.mark.parametrize("data, why", [
    (b'{"text": "a"}\n{"text": \n', "line 2 is not JSON"),
    (b'{"text": "a"}\n\n["b"]\n', "line 3 is not a JSON object"),
    (b'{"text": "a"}\n{"txt": "b", "id": 3}\n', "line 2 has no text and no messages, only txt, id"),
    (b'{}\n', "line 1 has no text and no messages, only an empty object"),
    (b'{"text": 3}\n', "line 1: text is neither a text nor a list of messages"),
    (b'{"text": "a"}\n{"text": "\xff"}\n', "line 2 is not UTF-8 text"),
    (b'{"text": "\\ud800"}\n', r"line 1: the text is not Unicode, it has '\ud800' at position 0"),
    (b'{"messages": [{"role": "user", "content": "1"}]}\n', "line 1 holds messages, and the tokenizer has no chat template"),
    (b'\n\n', "holds no text"),
    (b'{"text": ""}\n', "holds no text (left out: 1 empty)"),
])
def test_a_bad_line_is_named(tmp_path, toy, data, why):
    (f := tmp_path / "rows.jsonl").write_bytes(data)
    with pytest.raises(DataError) as e: list(documents(f, tokenizer=toy))
    assert str(f) in str(e.value) and why in str(e.value) and "\n" not in str(e.value)
    if f"{f}, line 1" in str(e.value) or "holds no" in str(e.value): # before anything is written
        with pytest.raises(DataError, match="rows.jsonl"): TokenDataset.prepare(f, toy, tmp_path / "out")
    with pytest.raises(DataError, match="rows.jsonl"): TokenDataset.prepare(f, toy, tmp_path / "out", held_out=0)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["rows.jsonl"]


def test_a_field_of_that_name(tmp_path, toy):
    f = lines(tmp_path / "rows.json", [{"text": "1", "body": "2"}, {"body": "3"}])
    assert list(documents(f, "body")) == [("rows.json:1", "2"), ("rows.json:2", "3")]
    with pytest.raises(DataError, match="rows.json, line 2 has no text"): list(documents(f, "text"))


@pytest.mark.parametrize("make, why", [
    (lambda t: t / "none", "there is no file or folder"),
    (lambda t: (t / "x.txt", (t / "x.txt").write_bytes(b"ab\xff"))[0], "is not UTF-8 text (invalid start byte at byte 2)"),
    (lambda t: (t / "x.txt", (t / "x.txt").write_bytes(b""))[0], "holds no text (left out: 1 empty)"),
    (lambda t: (t / "sub", (t / "sub").mkdir())[0], "holds no text"),
    (lambda t: (t / "pipe", os.mkfifo(t / "pipe"))[0], "is neither a file nor a folder"),
    (lambda t: (t / "x.jsonl.gz", (t / "x.jsonl.gz").write_bytes(gzip.compress(b'{"text": "1"}\n' * 9)[:-9]))[0], "is damaged behind line"),
    (lambda t: (t / "x.jsonl.gz", (t / "x.jsonl.gz").write_bytes(b'{"text": "1"}\n'))[0], "is damaged behind line 0"),
])
def test_a_bad_source_is_named(tmp_path, toy, make, why):
    source = make(tmp_path)
    for attempt in (lambda: list(documents(source)), lambda: TokenDataset.prepare([source], toy, tmp_path / "out")):
        with pytest.raises(DataError) as e: attempt()
        assert str(source) in str(e.value) and why in str(e.value)
    assert not (tmp_path / "out").exists()


def test_files_that_may_not_be_read(tmp_path, toy, monkeypatch):
    (tmp_path / "a.txt").write_text("1")
    def refuse(*_): raise PermissionError(13, "Permission denied", str(tmp_path / "a.txt"))
    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(DataError, match="a.txt cannot be read: Permission denied"): list(documents(tmp_path / "a.txt"))


def test_gz_is_the_same(tmp_path):
    rows = [{"text": f"{i} " * 50} for i in range(500)]
    plain, packed_ = lines(tmp_path / "rows.jsonl", rows), lines(tmp_path / "rows.jsonl.gz", rows)
    assert [t for _, t in documents(plain)] == [t for _, t in documents(packed_)] == [r["text"] for r in rows]


def test_messages_are_written_by_the_chat_template(tmp_path):
    toy = numbers(99, chat_template=CHAT)
    f = lines(tmp_path / "chat.jsonl", [{"messages": [{"role": "5", "content": "7 8"}]}, {"messages": [{"role": "6", "content": "9"}]}])
    assert list(documents(f, tokenizer=toy)) == [("chat.jsonl:1", "<5> 7 8 <end>"), ("chat.jsonl:2", "<6> 9 <end>")]
    data = TokenDataset.prepare(f, toy, tmp_path / "out", held_out=0)
    assert [d.tolist() for d in data.train] == [[0, 7, 8, 0], [0, 9, 0]] # <5> is unknown; one end, not two
    assert data.train.sizes.tolist() == [13, 11]
    with pytest.raises(DataError, match="chat.jsonl, line 1: the chat template refuses"):
        list(documents(f, tokenizer=numbers(99, chat_template="{{ raise_exception('no user') }}")))
    other = numbers(99, chat_template=CHAT.replace("} {", "}{"))
    assert TokenDataset.prepare(f, other, tmp_path / "out", held_out=0).fingerprint != data.fingerprint


def test_hugging_face_folders(tmp_path, toy, monkeypatch):
    folder, rows = tmp_path / "hf", [f"{i}" for i in range(1, 40)]
    if find_spec("datasets"):
        from datasets import Dataset, DatasetDict
        table = Dataset.from_dict({"id": list(range(39)), "text": rows})
        table.save_to_disk(str(folder))
        assert list(documents(folder)) == [(f"hf:{i}", t) for i, t in enumerate(rows)]
        assert TokenDataset.prepare(folder, toy, tmp_path / "out").train.documents > 30
        with pytest.raises(DataError, match="hf, row 0 has no body, only id, text"): list(documents(folder, "body"))
        DatasetDict(train=table, test=table).save_to_disk(str(tmp_path / "two"))
        with pytest.raises(DataError, match=r"two has several splits: name the folder of one of them \(train, test\)"): list(documents(tmp_path / "two"))
        assert len(list(documents(tmp_path / "two" / "train"))) == 39
        Dataset.from_dict({"messages": [[{"role": "5", "content": "7"}]]}).save_to_disk(str(tmp_path / "chat"))
        assert [t for _, t in documents(tmp_path / "chat", tokenizer=numbers(99, chat_template=CHAT))] == ["<5> 7 <end>"]
        next(folder.glob("*.arrow")).write_bytes(b"x")
        with pytest.raises(DataError, match="hf cannot be read as a Hugging Face dataset"): list(documents(folder))
    else:
        folder.mkdir()
        for f in ("state.json", "dataset_info.json"): (folder / f).write_text("{}")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match="hf is a Hugging Face dataset, and the library that reads it is not installed"): list(documents(folder))


def test_a_folder_says_what_it_left_out_once(tmp_path):
    for name in ("a/1.txt", "a/.cache/x", "b/2.txt", "b/.hidden"): (tmp_path / name).parent.mkdir(parents=True, exist_ok=True), (tmp_path / name).write_text("1")
    (tmp_path / "nul.txt").write_bytes(b"1" * 9000 + b"\0")
    (tmp_path / "gone").symlink_to(tmp_path / "nothing")
    (tmp_path / "link").symlink_to(tmp_path)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert [n for n, _ in documents(tmp_path)] == ["a/1.txt", "b/2.txt"]
    assert [str(w.message) for w in caught] == [f"left out of {tmp_path}: 2 hidden, 1 links to folders, 1 not files, 1 not UTF-8 text"]


# --- what is prepared

def test_no_tokenizer_of_the_right_kind(tmp_path, toy):
    f = lines(tmp_path / "rows.jsonl", [{"text": "1"}])
    with pytest.raises(DataError, match="no token for the end of a text"): TokenDataset.prepare(f, numbers(9, eos_token=None))
    with pytest.raises(DataError, match="no token for the beginning of a text"): TokenDataset.prepare(f, toy, bos=True)
    with pytest.raises(DataError, match="object is not one of Hugging Face's fast tokenizers"): TokenDataset.prepare(f, object())
    with pytest.raises(DataError, match="the bos id 5000 is outside the vocabulary of 1000"): TokenDataset.prepare(f, toy, bos=5000)
    with pytest.raises(DataError, match="held_out must be a share between 0 and 0.5, got 5"): TokenDataset.prepare(f, toy, held_out=5)
    with pytest.raises(DataError, match="there is no source of data"): TokenDataset.prepare([], toy)


def test_limits_of_a_tokenizer_have_no_effect(tmp_path):
    toy, text = numbers(1000), " ".join(str(i) for i in range(1, 500))
    f = lines(tmp_path / "rows.jsonl", [{"text": text}, {"text": "7"}])
    want = TokenDataset.prepare(f, toy, tmp_path / "one", held_out=0)
    toy.backend_tokenizer.enable_truncation(9)
    toy.backend_tokenizer.enable_padding(length=20)
    got = TokenDataset.prepare(f, toy, tmp_path / "two", held_out=0)
    assert got.fingerprint == want.fingerprint and got.train[0].tolist() == [*range(1, 500), 0]


def test_ids_above_65535(tmp_path):
    big = numbers(70_000)
    f = lines(tmp_path / "rows.jsonl", [{"text": "65535 65536 69999"}, {"text": "1 65536"}])
    data = TokenDataset.prepare(f, big, tmp_path / "out", held_out=0)
    assert data.tokens.dtype == np.uint32 and [d.tolist() for d in data.train] == [[65535, 65536, 69999, 0], [1, 65536, 0]]
    batch = next(packed(data.train, 6, 1))
    assert batch.ids.dtype == np.int32 and sorted(batch.ids[0].tolist()) == [0, 0, 1, 65535, 65536, 65536, 69999]
    with pytest.raises(DataError, match="rows.jsonl, line 1 has id 69999, which is outside the vocabulary of 69999"): TokenDataset.prepare(f, big, vocab_size=69_999)
    assert TokenDataset.prepare(f, numbers(65_536), tmp_path / "less", held_out=0).tokens.dtype == np.uint16


@pytest.mark.parametrize("n", [2, 3, 10, 400])
def test_documents_on_both_sides(tmp_path, toy, n):
    names = [f"rows.jsonl:{i + 1}" for i in range(n)]
    f = lines(tmp_path / "rows.jsonl", [{"text": "1"}] * n)
    for share in (.05, .5):
        data = TokenDataset.prepare(f, toy, tmp_path / "out", held_out=share)
        want = {name for name in names if held_out(name, round(1 / share))}
        assert data.train and data.test and {*data.train.names} | {*data.test.names} == {*names}
        if 0 < len(want) < n: assert {*data.test.names} == want
    assert len(TokenDataset.prepare(f, toy, tmp_path / "out", held_out=0).train) == n


def test_begins_with_bos(tmp_path):
    toy, f = numbers(99, bos_token="<end>"), lines(tmp_path / "rows.jsonl", [{"text": "1"}, {"text": "<end> 2"}])
    def ids(**kw): return [d.tolist() for d in TokenDataset.prepare(f, toy, tmp_path / "out", held_out=0, **kw).train]
    assert ids() == ids(bos=False) == [[1, 0], [0, 2, 0]]
    assert ids(bos=True) == [[0, 1, 0], [0, 2, 0]] and ids(bos=5) == [[5, 1, 0], [5, 0, 2, 0]]


def test_tokenised_once(tmp_path, toy, monkeypatch):
    f, calls, real = lines(tmp_path / "rows.jsonl", [{"text": "1 2"}, {"text": "3"}]), [], module._encoded
    def counted(*args):
        calls.append(1)
        return real(*args)
    monkeypatch.setattr(module, "_encoded", counted)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    data = [TokenDataset.prepare(f, toy) for _ in range(3)][-1]
    assert len(calls) == 1 and data.folder.parent == tmp_path / "xlstm-metal" / "datasets"
    TokenDataset.prepare([str(f)], numbers(1000)) # an equal tokenizer
    assert len(calls) == 1
    os.utime(f, (1, 1))
    assert TokenDataset.prepare(f, toy).folder != data.folder and len(calls) == 2
    TokenDataset.prepare(f, numbers(1001))
    TokenDataset.prepare(f, toy, bos=3)
    assert len(calls) == 4
    (TokenDataset.prepare(f, toy).folder / "tokens.bin").write_bytes(b"12") # damaged: made again
    assert whole(TokenDataset.prepare(f, toy).folder, toy, {"rows.jsonl:1": "1 2", "rows.jsonl:2": "3"}) and len(calls) == 5


@pytest.mark.parametrize("spoil, why", [
    (lambda d: (d / "meta.json").unlink(), "there is no file meta.json"),
    (lambda d: (d / "meta.json").write_text("{"), "is damaged"),
    (lambda d: (d / "meta.json").write_text('{"format": "x", "version": 1}'), "is not a token dataset of version 1"),
    (lambda d: os.truncate(d / "tokens.bin", 4), "is damaged: its files do not fit together"),
    (lambda d: os.truncate(d / "tokens.bin", 3), "is damaged"),
    (lambda d: os.truncate(d / "documents.npy", 100), "is damaged"),
    (lambda d: np.save(d / "bytes.npy", np.zeros(1, int)), "is damaged: its files do not fit together"),
])
def test_a_damaged_dataset_is_named(tmp_path, toy, spoil, why):
    f, out = lines(tmp_path / "rows.jsonl", [{"text": "1 2"}, {"text": "3"}]), tmp_path / "out"
    TokenDataset.prepare(f, toy, out)
    spoil(out)
    with pytest.raises(DataError) as e: TokenDataset(out)
    assert str(out) in str(e.value) and why in str(e.value)
    TokenDataset.prepare(f, toy, out)
    whole(out, toy, {"rows.jsonl:1": "1 2", "rows.jsonl:2": "3"})


def test_nothing_else_is_overwritten(tmp_path, toy):
    f = lines(tmp_path / "rows.jsonl", [{"text": "1 2"}, {"text": "3"}])
    TokenDataset.prepare(f, toy, out := tmp_path / "out")
    (out / "notes.md").write_text("mine")
    with pytest.raises(DataError, match="out is not overwritten: it is no token dataset, it holds notes.md"): TokenDataset.prepare(f, toy, out, bos=3)
    with pytest.raises(DataError, match="rows.jsonl is not overwritten"): TokenDataset.prepare(f, toy, f)
    with pytest.raises(DataError, match="is inside of"): TokenDataset.prepare(tmp_path, toy, tmp_path / "new")
    with pytest.raises(DataError, match="new cannot be written: .*rows.jsonl is not a folder"): TokenDataset.prepare(f, toy, f / "new")


def test_a_full_disk_loses_nothing(tmp_path, toy, monkeypatch):
    f, out = lines(tmp_path / "rows.jsonl", [{"text": "1 2"}, {"text": "3"}]), tmp_path / "out"
    TokenDataset.prepare(f, toy, out)
    def full(*_): raise OSError(28, "No space left on device")
    monkeypatch.setattr(module.np, "save", full)
    with pytest.raises(DataError, match="out cannot be written: No space left on device"): TokenDataset.prepare(f, toy, out, bos=3)
    whole(out, toy, {"rows.jsonl:1": "1 2", "rows.jsonl:2": "3"})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "rows.jsonl"]


PREPARE = """
import sys
from runpy import run_path
numbers = run_path({test!r})["numbers"]
from xlstm_metal.train.datasets import TokenDataset
print("begins", flush=True)
for n in range(10**6): TokenDataset.prepare({source!r}, numbers(1000), {out!r}, bos=100 + n % 900)
"""


def test_killed_at_any_moment(tmp_path, toy):
    "The process rebuilds a dataset again and again, with another id at the start each time; whenever it dies, one of them is there, or none."
    source, out, rng, states = lines(tmp_path / "rows.jsonl", [{"text": "1 2 3 " * (i % 50 + 1)} for i in range(3000)]), tmp_path / "out", random.Random(0), []
    code = PREPARE.format(test=__file__, source=str(source), out=str(out))
    for _ in range(int(os.environ.get("XLSTM_METAL_KILLS", 8))):
        p = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
        assert p.stdout.readline() == "begins\n"
        time.sleep(rng.uniform(0, .6))
        p.send_signal(signal.SIGKILL)
        p.wait()
        beside = {f.name for f in tmp_path.iterdir()} - {"rows.jsonl"}
        assert beside <= {"out", ".out.partial", ".out.replaced"}
        states.append(" ".join(sorted(beside)))
        if out.exists():
            data = TokenDataset(out)
            n = np.diff(data.offsets)
            assert n.tolist() == [3 * (i % 50 + 1) + 2 for i in range(3000)]
            assert (data.tokens[data.offsets[:-1]] == data.bos).all() and (data.tokens[data.offsets[1:] - 1] == 0).all()
        if rng.random() < .5:
            again = TokenDataset.prepare(source, toy, out, bos=5 + len(states)) # not one that is there
            assert again.tokens.size == 3000 * 2 + 3 * sum(i % 50 + 1 for i in range(3000))
            assert {f.name for f in tmp_path.iterdir()} == {"out", "rows.jsonl"}
    print(states)
    assert any(".out.partial" in s for s in states)


def test_several_at_the_same_time(tmp_path, toy, monkeypatch):
    f, calls, real = lines(tmp_path / "rows.jsonl", [{"text": "1 2 3 " * 9}] * 200), [], module._encoded
    def counted(*args):
        calls.append(1)
        return real(*args)
    monkeypatch.setattr(module, "_encoded", counted)
    for n in range(1, 41):
        handles = [prepare_in_background(f, toy, tmp_path / "out", bos=n + 5) for _ in range(6)]
        assert len({h.result(60).fingerprint for h in handles}) == 1 and len(calls) == n
        assert {p.name for p in tmp_path.iterdir()} == {"out", "rows.jsonl"}


def test_progress(tmp_path, toy, capsys):
    f = lines(tmp_path / "rows.jsonl", [{"text": "1 2 3 " * 10}] * 500)
    seen = []
    TokenDataset.prepare(f, toy, tmp_path / "one", progress=lambda n, total: seen.append((n, total)))
    assert seen == sorted(seen) and seen[-1] == (f.stat().st_size,) * 2 and len(seen) == 500
    TokenDataset.prepare(f, toy, tmp_path / "two", progress=True)
    assert "tokenising: 100%" in capsys.readouterr().err


# --- sizes

def test_ten_thousand_tiny_documents(tmp_path, toy):
    folder = tmp_path / "many"
    folder.mkdir()
    for i in range(10_000): (folder / f"{i:05}.txt").write_text(str(i % 999 + 1))
    start = time.perf_counter()
    data = TokenDataset.prepare(folder, toy, tmp_path / "out")
    assert time.perf_counter() - start < 20 and data.train.documents + data.test.documents == 10_000
    start = time.perf_counter()
    for b in islice(packed(data.train, 512, 16), 20): assert b.reset[:, 0].all() and .4 < b.reset[b.mask].mean() < .6
    assert time.perf_counter() - start < 5


def test_a_long_document_is_tokenised_in_parts(tmp_path):
    import xlstm_metal as xm
    tokenizer, text = xm.load()[1], "# größer 日本\n" + "".join(corpus().values())[:2_500_000]
    (f := tmp_path / "long.txt").write_bytes(text.encode())
    data = TokenDataset.prepare(f, tokenizer, tmp_path / "out", held_out=0)
    assert data.train[0].tolist() == [*tokenizer.encode(text, add_special_tokens=False), 0]
    assert data.train.bytes == len(text.encode())


LARGE = """
import time
from xlstm_metal.train.datasets import TokenDataset, packed
def used(): return int(next(l for l in open("/proc/self/status") if l.startswith("RssAnon")).split()[1]) / 1000
for carry in (False, True):
    before, start = used(), time.perf_counter()
    b = packed(TokenDataset({out!r}).train, 1024, 32, carry=carry)
    next(b)
    first = time.perf_counter() - start
    for _ in range(20): next(b)
    print(first, used() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory of a process is read as Linux has it")
def test_a_large_dataset_stays_on_the_disk(tmp_path, toy):
    "400 million tokens in 400 thousand documents: a sparse file of 800 MB."
    data, n = TokenDataset.prepare(lines(tmp_path / "rows.jsonl", [{"text": "1"}, {"text": "2"}]), toy, tmp_path / "out", held_out=0), 400_000
    for name, a in dict(documents=np.arange(n + 1) * 1000, bytes=np.full(n, 4000), held_out=np.zeros(n, bool)).items(): np.save(data.folder / f"{name}.npy", a)
    os.truncate(data.folder / "tokens.bin", 2 * 1000 * n)
    (data.folder / "meta.json").write_text(json.dumps(data.meta | dict(train=[n, 1000 * n, 4000 * n])))
    r = subprocess.run([sys.executable, "-c", LARGE.format(out=str(data.folder))], capture_output=True, text=True)
    assert r.returncode == 0, r.stderr
    for line in r.stdout.split("\n")[:2]:
        seconds, megabytes = map(float, line.split())
        print(f"first batch after {seconds:.2f} s, {megabytes:.0f} MB")
        assert seconds < 1 and megabytes < 100


# --- batches

def test_a_carried_text_goes_on(tmp_path, toy):
    "With carry, each lane of the batches of an epoch is a stretch of the stream, and every reset but the first is a beginning."
    rng = random.Random(3)
    rows = [{"text": " ".join(str(rng.randrange(1, 1000)) for _ in range(rng.randrange(1, 40)))} for _ in range(60)]
    data = TokenDataset.prepare(lines(tmp_path / "rows.jsonl", rows), toy, tmp_path / "out", held_out=0)
    for length, B in ((16, 4), (7, 3), (50, 64)):
        some, stream = list(islice(packed(data.train, length, B, carry=True), batches_per_epoch(data.train, length, B))), []
        for lane in range(B):
            for a, b in zip(some, some[1:]): assert not b.mask[lane, 0] or (b.ids[lane, 0], b.reset[lane, 0]) == (a.ids[lane, -1], a.reset[lane, -1])
            ids, reset, mask = (np.concatenate([x[0][lane, :1], *(a[lane, 1:] for a in x)]) for x in zip(*some))
            assert reset[0] and not reset[1:][~mask[1:]].any()
            assert np.array_equal(reset[1:][mask[1:]], ids[mask][:-1] == 0) # behind the end of a text
            stream += ids[mask].tolist()[lane > 0:]
        begins = {tuple(d.tolist()) for d in data.train}
        assert {(*map(int, d.split()), 0) for d in " ".join(map(str, stream)).split(" 0")[:-1]} == begins and len(stream) == data.train.tokens


@pytest.mark.parametrize("wrong, why", [
    (dict(length=0), "length must be at least 1, got 0"), (dict(batch=0), "batch must be at least 1"),
    (dict(seed=-1), "seed must be at least 0"), (dict(start=-1), "start must be at least 0")])
def test_numbers_that_make_no_batches(tmp_path, toy, wrong, why):
    data = TokenDataset.prepare(lines(tmp_path / "rows.jsonl", [{"text": "1 2"}, {"text": "3"}]), toy, tmp_path / "out", held_out=0)
    with pytest.raises(DataError, match=why): packed(data.train, **(dict(length=4, batch=2) | wrong))
    with pytest.raises(DataError, match="out has 0 tokens held out, and a prediction needs two"): packed(data.test, 4, 2)


def test_other_seeds_and_epochs_are_other_orders(tmp_path, toy):
    data = TokenDataset.prepare(lines(tmp_path / "rows.jsonl", [{"text": str(i)} for i in range(1, 900)]), toy, tmp_path / "out")
    K = batches_per_epoch(data.train, 64, 4)
    assert len({next(packed(data.train, 64, 4, seed, start)).ids.tobytes() for seed in (0, 1, 2) for start in (0, K, 2 * K)}) == 9
