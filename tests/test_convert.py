"Pickles, and folders that the original packages read: where PyTorch and they are installed (`make parity` runs this file too)."
import json
import os
import pickle
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from xlstm_metal.apps.cli import main
from xlstm_metal.files import CheckpointError
from xlstm_metal.model.checkpoint import load
from xlstm_metal.model.convert import convert

torch = pytest.importorskip("torch", reason="pickles are read by PyTorch")
HERE = Path(__file__).parent / "fixtures"
TINY = HERE / "hf_tiny"


def state_dict(folder, dtype=torch.float32):
    return {n: torch.tensor(np.array(w.astype(mx.float32))).to(dtype) for n, w in mx.load(str(folder / "model.safetensors")).items()}


def logits(folder):
    model, _ = load(folder, mx.float32)
    return model(mx.array([[1, 5, 7, 2, 9]]))


@pytest.mark.parametrize("wrap", [lambda d: d, lambda d: {"state_dict": d, "step": 3}, lambda d: {f"module.{n}": w for n, w in d.items()}],
                         ids=["plain", "trainer", "data parallel"])
def test_pickle(tmp_path, wrap):
    torch.save(wrap(state_dict(TINY)), tmp_path / "weights.pt")
    out = convert(tmp_path / "weights.pt", tmp_path / "out", config=TINY / "config.json")
    assert mx.array_equal(logits(out), logits(TINY))


def test_pickle_in_a_folder_keeps_bfloat16(tmp_path):
    torch.save(state_dict(TINY, torch.bfloat16), tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_text((TINY / "config.json").read_text())
    out = convert(tmp_path, tmp_path / "out")
    got = mx.load(str(out / "model.safetensors"))
    for n, w in mx.load(str(TINY / "model.safetensors")).items():
        assert got[n].dtype == mx.bfloat16 and mx.array_equal(got[n], w.astype(mx.bfloat16))


class Command:
    def __reduce__(self): return os.system, ("touch executed",)


def test_a_pickle_is_never_executed(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    torch.save(state_dict(TINY) | {"surprise": Command()}, tmp_path / "evil.pt")
    (tmp_path / "raw.pt").write_bytes(pickle.dumps(Command()))
    for name in ("evil.pt", "raw.pt"):
        with pytest.raises(CheckpointError, match=f"{name} holds more than plain tensors, so it was not opened"):
            convert(tmp_path / name, tmp_path / "out", config=TINY / "config.json")
        assert main(["convert", name, "out", "--config", str(TINY / "config.json")]) == 2
        assert f"xlstm-metal: {name} holds more than plain tensors" in capsys.readouterr().err
    assert not (tmp_path / "executed").exists() and not (tmp_path / "out").exists()


def test_other_pickles(tmp_path):
    torch.save({"a": torch.zeros(2), "b": 3}, tmp_path / "mixed.pt")
    torch.save([torch.zeros(2)], tmp_path / "list.pt")
    whole = tmp_path / "short.pt"
    torch.save(state_dict(TINY), whole)
    whole.write_bytes(whole.read_bytes()[:5000])
    for name, says in (("mixed.pt", "b is not a tensor"), ("list.pt", "list is not a tensor"), ("short.pt", "is cut short")):
        with pytest.raises(CheckpointError, match=says): convert(tmp_path / name, tmp_path / "out", config=TINY / "config.json")


def test_nxai_reads_its_form(tmp_path):
    pytest.importorskip("xlstm")
    from xlstm.xlstm_large.from_pretrained import load_from_pretrained
    out = convert(TINY, tmp_path / "out", to="nxai")
    theirs = load_from_pretrained(out, chunkwise_kernel_name="chunkwise--native_autograd", sequence_kernel_name="native_sequence__native",
                                  step_kernel_name="native", return_last_states=True)
    with torch.no_grad(): want = theirs(torch.tensor([[1, 5, 7, 2, 9]]))[0].float().numpy()
    assert np.abs(np.array(logits(out)) - want).max() < 1e-4


@pytest.mark.parametrize("recurrent", ["vanilla", "cuda"])
def test_nxai_reads_a_stack(tmp_path, recurrent):
    xlstm = pytest.importorskip("xlstm")
    folders = [f.parent for f in HERE.rglob("config.json") if "slstm_block" in json.loads(f.read_text())]
    if not folders: pytest.skip("no stack among the fixtures")
    from dacite import Config, from_dict
    out = convert(folders[0], tmp_path / "out", to="nxai", recurrent=recurrent)
    again = convert(out, tmp_path / "again")
    assert mx.array_equal(logits(again), logits(folders[0]))
    if recurrent == "cuda": return # needs CUDA
    import yaml
    c = from_dict(xlstm.xLSTMLMModelConfig, yaml.safe_load((out / "config.yaml").read_text()), Config(check_types=False))
    theirs = xlstm.xLSTMLMModel(c)
    theirs.load_state_dict(state_dict(out))
    with torch.no_grad(): want = theirs.eval()(torch.tensor([[1, 5, 7, 2, 9]])).numpy()
    assert np.abs(np.array(logits(out)) - want).max() < 1e-4
