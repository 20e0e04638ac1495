"Forecasts held against NX-AI's package (by a fixture), pandas, polars, utilsforecast; the command; what is refused."
import csv
import pickle
import subprocess
import sys
import zipfile
from pathlib import Path

import mlx.core as mx
import numpy as np
import pandas as pd
import pytest

import xlstm_metal as xm
from xlstm_metal.files import CheckpointError
from xlstm_metal.forecast.files import load_tirex, read_lightning
from xlstm_metal.forecast.fit import backtest, fit_forecaster, mase, seasonal_naive, statsforecast_method, wql
from xlstm_metal.forecast.series import SeriesError, as_series, read_csv
from xlstm_metal.forecast.stream import Stream
from xlstm_metal.forecast.tirex import TiRex, TiRexConfig, forecast_quantiles, scale_of, windows

TINY = Path(__file__).parent / "fixtures" / "tirex_tiny"


@pytest.fixture(scope="module")
def tiny():
    return xm.load_forecaster(TINY)


@pytest.mark.parametrize("at_once", [1, 2, 5])
def test_quantiles_are_those_of_the_package(tiny, at_once):
    answers = np.load(TINY / "answers.npz")
    series = [answers[f"series_{j}"] for j in range(int(answers["count"]))]
    f = tiny.forecast(series, 37, at_once=at_once)
    distance = abs(f.quantiles - answers[f"float32_{at_once}"]) / answers["size"][:, None, None]
    assert distance.max() < 2e-5
    assert (abs(f.quantiles - answers[f"bfloat16_{at_once}"]) / answers["size"][:, None, None]).max() > 100 * distance.max()  # the two are told apart


@pytest.mark.parametrize("sizes", [dict(dims=16, patch=4, L=16), dict(dims=24, patch=8, L=8), dict(dims=32, patch=6, L=60)])
@pytest.mark.parametrize("every", ["patch", 1, 2])
def test_a_stream_is_the_whole_sequence(sizes, every):
    P, L, rng = sizes["patch"], sizes["L"], np.random.default_rng(0)
    mx.random.seed(1)
    model = TiRex(TiRexConfig(sizes["dims"], 4, 2, input_patch_size=P, input_ff_dim=16, train_ctx_len=L))
    for b in model.blocks: b.slstm_layer.slstm_cell.recurrent_kernel = mx.random.normal(b.slstm_layer.slstm_cell.recurrent_kernel.shape) / 2
    x = rng.normal(size=(3, L + 40)).cumsum(1)
    x[1, L:L + 7] = np.nan
    stream = Stream(model, x[:, :L], P if every == "patch" else every)
    for n in range(L + 1, L + 40):
        stream.push(x[:, n - 1])
        if stream.waiting: continue
        z = stream.scale.apply(x[:, (n - L) % P:n])
        ahead = np.full((3, P), np.nan)
        want = np.array(model(mx.array(np.hstack([z, ahead]).astype(np.float32)), last=2)).swapaxes(2, 3).reshape(3, 2 * P, 9)
        want = stream.scale.undo(want.reshape(3, -1)).reshape(want.shape)
        assert abs(stream.forecast(2 * P) - want).max() < 1e-4 * (1 + abs(want).max()), n


def test_a_stream_stays_as_it_is_when_asked(tiny):
    x = np.random.default_rng(0).normal(size=200).cumsum()
    stream = Stream(tiny, x[:100], 2)
    first = stream.forecast(50)
    assert np.array_equal(first, stream.forecast(50)) and np.array_equal(stream.push([]).forecast(50), first)
    before = stream.nbytes
    stream.push(x[100:])
    assert stream.nbytes - before <= 4 * 9 * 8 * 3  # answers of the cuts that had none yet
    full = stream.nbytes
    assert stream.push(x).nbytes == full


def test_a_large_offset_keeps_its_digits(tiny):
    x = np.random.default_rng(0).normal(size=90).cumsum()
    near, far = tiny.forecast(x, 12).quantiles, tiny.forecast(x + 2.0**30, 12).quantiles - 2.0**30
    assert abs(near - far).max() < 1e-3  # float32 has steps of 64 there


def test_inputs_of_pandas_and_polars_agree(tiny):
    days = pd.date_range("2024-02-27", periods=30, freq="D")
    values = np.random.default_rng(0).normal(size=30)
    table = pd.DataFrame({"day": days, "load": values, "place": "A"}).drop(index=[7, 8])
    want = tiny.forecast(np.where(np.isin(np.arange(30), [7, 8]), np.nan, values), 5).quantiles
    forms = [table, table.set_index("day"), table.set_index("day").load, {"load": table.set_index("day").load}]
    try: import polars
    except ImportError: pass
    else: forms += [polars.DataFrame(table), polars.DataFrame({"day": days.to_numpy(), "load": [None if j in (7, 8) else v for j, v in enumerate(values)]}),
                    polars.Series("load", [None if j in (7, 8) else v for j, v in enumerate(values)])]
    for form in forms:
        f = tiny.forecast(form, 5)
        assert f.names == ["load"] and np.allclose(f.quantiles, want)
        if f.times[0] is not None: assert [str(t)[:10] for t in f.times[0]] == [str(d.date()) for d in pd.date_range("2024-03-28", periods=5)]


@pytest.mark.parametrize("freq", ["h", "15min", "D", "W", "2W", "MS", "ME", "QS", "QE", "YS", "YE", "2ME", "s"])
@pytest.mark.parametrize("start", ["2023-12-31", "2024-02-29", "2024-01-15"])
def test_times_are_those_of_pandas(tiny, freq, start):
    times = pd.date_range(start, periods=20, freq=freq)
    s, = as_series(pd.Series(np.arange(15.), times[:15]).drop(times[[3, 4]]))
    assert np.array_equal(s.times, times[:15].to_numpy().astype("M8[us]")) and np.isnan(s.values[3:5]).all() and s.values[5] == 5
    assert np.array_equal(tiny.forecast(pd.Series(np.arange(15.), times[:15]), 5).times[0], times[15:].to_numpy().astype("M8[us]"))


def test_measures_are_those_of_utilsforecast():
    losses = pytest.importorskip("utilsforecast.losses")
    rng, levels = np.random.default_rng(0), [.1, .3, .5, .9]
    history, y, q = rng.normal(size=60).cumsum(), rng.normal(size=12) + 3, np.sort(rng.normal(size=(12, 4)) + 3, -1)
    frame = pd.DataFrame({"unique_id": "a", "ds": range(60, 72), "y": y, "m": q[:, 2], **{f"q{j}": q[:, j] for j in range(4)}})
    past = pd.DataFrame({"unique_id": "a", "ds": range(60), "y": history})
    assert np.isclose(mase(y, q[:, 2], history, 7), losses.mase(frame, ["m"], 7, past)["m"].item())
    scaled = losses.scaled_crps(frame, {"q": [f"q{j}" for j in range(4)]}, np.array(levels))["q"].item()
    assert np.isclose(wql(y, q, levels), scaled)


def test_classical_methods_stand_beside():
    pytest.importorskip("statsforecast")
    x = 10 + np.sin(np.arange(80) / 12 * 2 * np.pi) + .1 * np.random.default_rng(0).normal(size=80)
    result = backtest({"AutoETS": statsforecast_method("AutoETS", 12), "again": seasonal_naive(12)}, [x], 12, 2, season=12).mean()
    assert result["again"] == result["seasonal naive"] and result["AutoETS"]["mase"] < 1.2


def test_seasonal_naive_is_statsforecasts():
    models = pytest.importorskip("statsforecast.models")
    x = np.random.default_rng(0).normal(size=60).cumsum()
    theirs = models.SeasonalNaive(7).forecast(y=x, h=20, level=[80])
    ours = seasonal_naive(7)([x], 20, [.1, .5, .9])[0]
    assert np.allclose(ours[:, 1], theirs["mean"])
    assert np.allclose(ours[:, 2] - ours[:, 1], theirs["hi-80"] - theirs["mean"], rtol=.1)  # they divide by other counts


def test_training_learns_and_goes_on_to_the_same_place():
    x = [np.sin(np.arange(100) / 8 * 2 * np.pi + p) for p in range(6)]
    def run():
        mx.random.seed(0)
        f = xm.Forecaster(TiRexConfig(16, 4, 1, input_patch_size=8, input_ff_dim=16, train_ctx_len=32))
        return fit_forecaster(f, x, 30, 1e-2, every=10, report=None), f.forecast(x, 8).quantiles
    (losses, q), (again, _) = run(), run()
    assert losses == again and losses[-1] < .5 * losses[0]
    with pytest.raises(ValueError, match="lower learning rate"):
        f = xm.Forecaster(TiRexConfig(16, 4, 1, input_patch_size=8, input_ff_dim=16, train_ctx_len=32))
        f.model.out_norm.weight = f.model.out_norm.weight * float("nan")
        fit_forecaster(f, x, 2, report=None)


def archive(folder, obj):
    with zipfile.ZipFile(folder / "model.ckpt", "w") as z: z.writestr("a/data.pkl", pickle.dumps(obj, 2))
    return folder / "model.ckpt"


class Runs:
    def __init__(self, file): self.file = file
    def __reduce__(self): return Path.touch, (self.file,)


def test_a_pickle_cannot_run_anything(tmp_path):
    with pytest.raises(CheckpointError, match="which is no tensor"): read_lightning(archive(tmp_path, {"state_dict": {"w": Runs(tmp_path / "ran")}}))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("change, text", [
    (lambda s, w: w.pop("out_norm.weight"), "out_norm.weight is missing"),
    (lambda s, w: w.update(extra=w["out_norm.weight"]), "extra in model.safetensors is not part of the model"),
    (lambda s, w: w.update({"out_norm.weight": mx.zeros(5)}), r"out_norm.weight in model.safetensors has shape \(5,\)"),
    (lambda s, w: s.pop("num_heads"), "is no TiRex: the settings are missing num_heads"),
    (lambda s, w: s.update(quantiles=[.1, .9]), "quantiles must have 0.5"),
    (lambda s, w: s.update(embedding_dim=30), "embedding_dim must be divisible by num_heads, got 30 and 4"),
])
def test_a_wrong_checkpoint_is_named(tiny, tmp_path, change, text):
    import json
    folder = tiny.save(tmp_path / "f")
    settings, weights = json.loads((folder / "config.json").read_text()), dict(mx.load(str(folder / "model.safetensors")))
    change(settings, weights)
    (folder / "config.json").write_text(json.dumps(settings))
    mx.save_safetensors(str(folder / "model.safetensors"), weights)
    with pytest.raises(CheckpointError, match=text): load_tirex(folder)


def run(*argv, **kwargs):
    return subprocess.run([sys.executable, "-m", "xlstm_metal", *map(str, argv)], capture_output=True, text=True, **kwargs)


def test_command(tiny, tmp_path):
    table = tmp_path / "power.csv"
    lines = [f"2024-01-01 {h:02d}:00,{h % 7},{'' if h == 5 else h / 3}" for h in range(24)]
    table.write_text("\n".join(["hour,load,solar", *lines]))
    r = run("forecast", table, "--horizon", 10, "--model", TINY, "--plot", tmp_path / "p.png", "--quantiles", .1, .5, .9)
    assert r.returncode == 0, r.stderr
    rows = list(csv.reader(r.stdout.splitlines()))
    assert rows[0] == ["series", "time", "median", "0.1", "0.5", "0.9"] and len(rows) == 21 and rows[1][:2] == ["load", "2024-01-02 00:00:00"]
    want = tiny.forecast(read_csv(table), 10, [.1, .5, .9])
    assert np.allclose([[float(v) for v in row[2:]] for row in rows[11:]], np.c_[want.median[1], want.quantiles[1]], rtol=1e-6)
    assert (tmp_path / "p.png").read_bytes()[:4] == b"\x89PNG"
    assert run("forecast", table, "-n", 3, "-m", TINY, "--columns", "solar", "-o", tmp_path / "out.csv").returncode == 0
    assert len((tmp_path / "out.csv").read_text().splitlines()) == 4


@pytest.mark.parametrize("text, options, message", [
    ("a,b\n1,2\n2,3\n", ["--columns", "c"], "has no column 'c', only a, b"),
    ("a\nx\ny\n", [], "has no column of numbers, only a"),
    ("t,a\n2024-01-02,1\n2024-01-01,2\n", [], "a is not sorted by time: 2024-01-02 comes before 2024-01-01"),
    ("t,a\n2024-01-02,1\n2024-01-02,2\n", [], "a has the time stamp 2024-01-02 twice"),
    ("t,a\n2024-01-02,1\n2024-01-03,inf\n", [], "a has an infinite value, at position 1"),
    ("t,a\n2024-01-02,\n2024-01-03,NA\n", [], "a has no value: all 2 are missing"),
    ("", [], "has no rows below its heading"),
    ("a\n1\n2\n", ["--quantiles", ".99"], "quantiles must be between 0.1 and 0.9"),
    ("a\n1\n2\n", ["--plot", "p.txt"], "p.txt must end with .png, .svg or .pdf"),
    ("a\n1\n2\n", ["--out", "no/such/out.csv"], "out.csv cannot be written"),
    ("a\n1\n2\n", ["--out", "t.csv"], "t.csv is the table itself"),
    ("a\n1\n2\n", ["--model", "nowhere"], "there is no folder nowhere"),
])
def test_command_refuses(tmp_path, text, options, message):
    from xlstm_metal.apps.cli import main
    (tmp_path / "t.csv").write_text(text)
    r = run("forecast", "t.csv", "-n", 3, *([] if "--model" in options else ["-m", TINY]), *options, cwd=tmp_path)
    assert r.returncode == 2 and message in r.stderr and len(r.stderr.splitlines()) == 1, r.stderr
    assert (tmp_path / "t.csv").read_text() == text and callable(main)


def test_without_pandas(tiny, monkeypatch):
    f = tiny.forecast([1, 2, 3.], 2)
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ImportError, match="a frame needs pandas: pip install pandas"): f.frame()
    monkeypatch.setitem(sys.modules, "statsforecast", None)
    with pytest.raises(ImportError, match="AutoETS needs statsforecast"): statsforecast_method("AutoETS", 12)
    assert len(list(f.rows())) == 2


def test_levels_between_are_on_straight_lines(tiny):
    f, q = tiny.forecast([1, 2, 3, 5.], 6), tiny.forecast([1, 2, 3, 5.], 6, [.15, .5, .62]).quantiles
    for got, row in zip(q[0], f.quantiles[0]): assert np.allclose(got, np.interp([.15, .5, .62], f.levels, row))


@pytest.mark.parametrize("diff", [False, True])
def test_several_series_are_those_of_the_second_package(diff):
    from xlstm_metal.forecast.tirex2 import forecast_groups, load_tirex2
    folder = TINY.with_name("tirex2_tiny")
    answers = np.load(folder / "answers.npz")
    groups = [tuple(answers[f"{kind}_{j}"] for kind in ("target", "past", "future")) for j in range(int(answers["count"]))]
    for j, q in enumerate(forecast_groups(load_tirex2(folder), groups, 20, diff)):
        assert abs(q - answers[f"quantiles_{diff}_{j}"]).max() < 1e-4 * (1 + np.nanstd(groups[j][0]))


def test_scale_of_a_window(tiny):
    for x in (np.array([[3., 3, 3]]), np.array([[np.nan, 0, 0]]), np.array([[np.nan] * 3])):
        s = scale_of(x)
        assert np.isfinite(s.loc).all() and (s.size > 0).all()
    with pytest.raises(SeriesError, match="no value among its last 96"): tiny.forecast([5.] + [np.nan] * 96, 2)
    assert forecast_quantiles(tiny.model, windows([[5.]], 96), 3).shape == (1, 3, 9)
