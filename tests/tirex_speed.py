"""NX-AI's `tirex-ts` beside this package at the sizes of TiRex, on one GPU or on a CPU.

    pip install scikit-learn, PyTorch; without their dependencies tirex-ts==1.4.2, and xlstm==2.0.6 for its CUDA kernels
    python tests/tirex_speed.py [blocks]

Random weights; a window of 2,048 values for each of B series, two patches of 32 foretold in one pass. A row is a program and its form of the
sLSTM: seconds of a forecast (median of at least five) and the greatest distance of a quantile from ours in float32, in standard deviations of
the window. A form that does not run there says why in a line.
"""
import sys
import time
from functools import partial

from xlstm_metal.blas import use_openblas

use_openblas()
import mlx.core as mx # noqa: E402
import numpy as np # noqa: E402
import torch # noqa: E402
from fixtures.make_tirex import tirex_model, tirex_run # noqa: E402

from xlstm_metal.forecast.files import load_tirex # noqa: E402
from xlstm_metal.forecast.tirex import forecast_quantiles, scale_of, windows # noqa: E402

CONTEXT, AHEAD = 2048, 64
GPU = torch.cuda.is_available()


def median_seconds(work, budget=4.):
    work()
    times, end = [], time.perf_counter() + budget
    while len(times) < 5 or time.perf_counter() < end and len(times) < 30:
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return float(np.median(times))


def forms_of(theirs, folder):
    "Name -> function of windows (B, CONTEXT) that returns quantiles (B, AHEAD, Q)."
    yield "ours, float32", partial(forecast_quantiles, load_tirex(folder), horizon=AHEAD, at_once=2)
    def run(float32, x): return tirex_run(theirs, x, AHEAD, 2, float32)
    yield "tirex-ts, torch", partial(run, False)
    yield "tirex-ts, torch, float32", partial(run, True)
    if not GPU: return
    cells, eager = [m for m in theirs.modules() if hasattr(m, "_recurrent_kernel_")], theirs._forward_model_tokenized
    try:
        for c in cells: c.backend = "cuda"
        yield "tirex-ts, CUDA", partial(run, False)
        for c in cells: c.backend = "torch"
        theirs._forward_model_tokenized = torch.compile(eager)
        yield "tirex-ts, torch.compile", partial(run, False)
    finally:
        for c in cells: c.backend = "torch"
        theirs._forward_model_tokenized = eager


def main(blocks=12):
    import tempfile
    from pathlib import Path
    folder = Path(tempfile.mkdtemp())
    theirs, settings = tirex_model(0, dims=512, heads=4, blocks=blocks, patch=32, hidden=2048, context=CONTEXT)
    torch.save({"hyper_parameters": settings, "state_dict": theirs.state_dict(), "epoch": 0}, folder / "model.ckpt")
    if GPU: theirs = theirs.to("cuda")
    print(f"{blocks} blocks, {torch.cuda.get_device_name() if GPU else f'{torch.get_num_threads()} threads'}, MLX {mx.__version__} on {mx.default_device()}, PyTorch {torch.__version__}")
    for B in (1, 32, 512) if GPU else (1, 32):
        x, want = np.random.default_rng(B).normal(size=(B, CONTEXT)).cumsum(1), None
        size = scale_of(windows(x, CONTEXT)).size[..., None]
        for name, form in forms_of(theirs, folder):
            try: got = np.asarray(form(x=x))
            except Exception as e:
                print(f"B {B:4d}  {name:26s} does not run: {type(e).__name__}: {str(e).splitlines()[0][:120] if str(e) else ''}", flush=True)
                continue
            want = got if want is None else want
            print(f"B {B:4d}  {name:26s} {1e3 * median_seconds(partial(form, x=x)):9.2f} ms   {abs((got - want) / size).max():.0e}", flush=True)


if __name__ == "__main__": main(*map(int, sys.argv[1:]))
