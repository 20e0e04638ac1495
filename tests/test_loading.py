"Loading: how much memory it takes, and that a loaded model needs nothing from the thread that loaded it."
import json
import threading

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from safetensors.numpy import save_file

from xlstm_metal.model import convert
from xlstm_metal.model.checkpoint import load
from xlstm_metal.model.config import xLSTMConfig
from xlstm_metal.model.model import Model
from xlstm_metal.train.train import init_weights


def write_shards(folder, config, shards):
    weights = {n: np.array(a) for n, a in tree_flatten(init_weights(Model(config)).parameters())}
    where = {n: f"model-{1 + j * shards // len(weights):05d}-of-{shards:05d}.safetensors" for j, n in enumerate(weights)}
    for f in set(where.values()): save_file({n: weights[n] for n in weights if where[n] == f}, folder / f)
    (folder / "model.safetensors.index.json").write_text(json.dumps(dict(metadata={}, weight_map=where)))
    (folder / "config.json").write_text(json.dumps(config.to_dict()))
    return sum(a.nbytes for a in weights.values()), max((folder / f).stat().st_size for f in set(where.values()))


def test_peak_is_the_model_and_one_shard(tmp_path):
    stored, shard = write_shards(tmp_path, xLSTMConfig.from_dict(vocab_size=2000, hidden_size=512, num_hidden_layers=8, num_heads=4), 8)
    mx.clear_cache(); mx.reset_peak_memory()
    before = mx.get_active_memory()
    model, _ = load(tmp_path, mx.bfloat16)
    after, peak = mx.get_active_memory() - before, mx.get_peak_memory() - before
    assert after < .55 * stored             # bfloat16 of float32, and gates
    assert peak < after + 1.1 * shard, (after, peak, shard)


@pytest.mark.parametrize("options", [dict(), dict(dtype="bfloat16"), dict(to="nxai", fused=True), dict(quantize=4)], ids=str)
def test_conversion_holds_one_file_and_one_tensor(tmp_path, monkeypatch, options):
    "Of 85 MB in one file; what is written has files of 5 MB."
    (tmp_path / "in").mkdir()
    stored, _ = write_shards(tmp_path / "in", xLSTMConfig.from_dict(vocab_size=2000, hidden_size=512, num_hidden_layers=8, num_heads=4), 1)
    write, limit = convert.write_shards, 5e6
    monkeypatch.setattr(convert, "write_shards", lambda *args: write(*args, limit=limit))
    mx.clear_cache(); mx.reset_peak_memory()
    before = mx.get_active_memory()
    out = convert.convert(tmp_path / "in", tmp_path / "out", **options)
    assert max(f.stat().st_size for f in out.glob("*.safetensors")) < 1.5 * limit < sum(f.stat().st_size for f in out.glob("*.safetensors"))
    assert (peak := mx.get_peak_memory() - before) < 20e6 < stored / 4, peak


def test_another_thread_can_use_the_model(tmp_path):
    write_shards(tmp_path, xLSTMConfig.from_dict(vocab_size=50, hidden_size=64, num_hidden_layers=2, num_heads=4), 2)
    model, _ = load(tmp_path, mx.float32)
    got = []
    def work(): got.append(np.array(model(mx.array([[1, 2, 3]]), model.make_cache())))
    t = threading.Thread(target=work); t.start(); t.join()
    assert np.allclose(got[0], np.array(model(mx.array([[1, 2, 3]]))), atol=1e-5)
