"The forecaster of sktime: sktime's own tests, and the quantiles of the fixture."
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import xlstm_metal as xm

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from sktime.base import BaseObject
    from sktime.utils.estimator_checks import check_estimator

    from xlstm_metal.forecast.sktime_adapter import with_tails, xLSTMForecaster
from xlstm_metal.forecast.tirex import TiRexConfig

pytestmark = pytest.mark.filterwarnings("ignore")
TINY = Path(__file__).parent / "fixtures" / "tirex_tiny"
SMALL = TiRexConfig(16, 2, 1, input_patch_size=4, input_ff_dim=16, train_ctx_len=16)
INDICES = dict(range=pd.RangeIndex(90), shifted=pd.RangeIndex(7, 97), days=pd.date_range("2024-02-20", periods=90, freq="D"),
               months=pd.period_range("1999-11", periods=90, freq="M"), hours=pd.date_range("2024-03-30", periods=90, freq="h", tz="Europe/Berlin"))


def walk(n=90, columns=2, index="range", seed=0):
    x = np.random.default_rng(seed).normal(size=(n, columns)).cumsum(0)
    return pd.DataFrame(x, INDICES[index][:n], list("abcd")[:columns])


def test_tests_of_sktime():
    results = check_estimator(xLSTMForecaster, raise_exceptions=False, verbose=False)
    assert len(results) > 500 and not {name: r for name, r in results.items() if r != "PASSED"}


@pytest.mark.parametrize("index", INDICES)
@pytest.mark.parametrize("columns", [1, 3])
def test_what_the_model_says(index, columns):
    y = walk(columns=columns, index=index)
    y.iloc[70:75, 0] = np.nan
    f = xLSTMForecaster(str(TINY)).fit(y)
    want = xm.load_forecaster(TINY).forecast({c: y[c].to_numpy() for c in y}, 9, quantiles=[.1, .25, .5, .9])
    fh = [1, 4, 9]
    assert np.allclose(f.predict(fh), want.median[:, [0, 3, 8]].T, rtol=1e-5, atol=1e-6)
    q = f.predict_quantiles(fh, alpha=[.1, .25, .9])
    for j, c in enumerate(y):
        for a, k in ((.1, 0), (.25, 1), (.9, 3)): assert np.allclose(q[c, a], want.quantiles[j, [0, 3, 8], k], rtol=1e-5, atol=1e-6)
    later = walk(9, columns, "range").set_axis(pd.date_range(y.index[-1], periods=10, freq=y.index.freq)[1:] if hasattr(y.index, "tz") else
                                               y.index[-1] + np.arange(1, 10) if index != "months" else pd.period_range(y.index[-1] + 1, periods=9, freq="M"))
    assert f.predict(fh).index.equals(later.index[[0, 3, 8]])


def test_wider_intervals_hold_narrower_ones():
    f = xLSTMForecaster(str(TINY)).fit(walk())
    bands = f.predict_interval(range(1, 20), coverage=[.5, .8, .9, .99, .9999])
    for c in "ab":
        wide = np.stack([bands[c, k, "upper"] - bands[c, k, "lower"] for k in (.5, .8, .9, .99, .9999)])
        assert (np.diff(wide[1:], axis=0) >= 0).all() and np.isfinite(wide).all()


def test_told_later_is_known():
    y = walk()
    for cut in (20, 60, 89):
        a, b = (xLSTMForecaster(str(TINY)).fit(part) for part in (y, y[:cut]))
        assert np.allclose(b.update(y[cut:]).predict([1, 2, 7]), a.predict([1, 2, 7]), rtol=1e-5)
        assert len(b.context_) <= b.forecaster_.config.train_ctx_len
    corrected = y.copy()
    corrected.iloc[80:85] += 3 # values that were known otherwise
    assert np.allclose(xLSTMForecaster(str(TINY)).fit(y).update(corrected[80:]).predict([1]), xLSTMForecaster(str(TINY)).fit(corrected).predict([1]), rtol=1e-5)


def test_training_is_seeded_and_leaves_shared_weights():
    y = walk()
    twice = [xLSTMForecaster(SMALL, steps=5, batch=4, seed=s).fit(y).predict([1, 2]) for s in (0, 0, 1)]
    assert twice[0].equals(twice[1]) and not np.allclose(twice[0], twice[2], rtol=1e-6)
    before = xLSTMForecaster(str(TINY)).fit(y).predict([1, 2])
    trained = xLSTMForecaster(str(TINY), steps=3, batch=4).fit(y).predict([1, 2])
    assert xLSTMForecaster(str(TINY)).fit(y).predict([1, 2]).equals(before) and not np.allclose(before, trained, rtol=1e-6)


def test_what_is_refused(tmp_path):
    y = walk()
    for make, text in ((lambda: xLSTMForecaster(SMALL).fit(y), "steps must be an integer of at least 1 here, not 0"),
                       (lambda: xLSTMForecaster(str(TINY), steps=-1).fit(y), "steps must be an integer of at least 0 here"),
                       (lambda: xLSTMForecaster(str(tmp_path)).fit(y), "holds no model.safetensors"),
                       (lambda: xLSTMForecaster(str(TINY)).fit(y).predict([0, 1]), "in-sample prediction"),
                       (lambda: xLSTMForecaster(str(TINY)).fit(y * np.nan).predict([1]), "a has no value"),
                       (lambda: xLSTMForecaster(str(TINY)).fit(y).predict_quantiles([1], alpha=[1.2]), "must lie in the open interval"),
                       (lambda: with_tails(np.zeros((1, 2)), [.1, .9], [0.]), "between 0 and 1")):
        with pytest.raises((ValueError, NotImplementedError), match=text): make()
    assert isinstance(xLSTMForecaster(SMALL, steps=1).clone(), BaseObject)
