"Set before MLX is imported anywhere: its CPU compiler takes seconds per kernel, and its own matrix products are slow."
import ctypes
import os
import signal
import threading
import time
from pathlib import Path

import pytest

os.environ.setdefault("MLX_DISABLE_COMPILE", "1")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1") # tests run side by side
os.environ["XLSTM_METAL_TUNED"] = os.devnull + "/none" # what this machine's owner has measured is not what is tested
from xlstm_metal.blas import use_openblas # noqa: E402

use_openblas()


@pytest.fixture(scope="session")
def original(tmp_path_factory):
    "A folder with the bundled model as bfloat16 numbers, to be quantised or converted: the bundled one is stored in 4 bits, which is refused."
    from xlstm_metal.model.convert import convert
    return convert("bundled", tmp_path_factory.mktemp("original") / "model", dequantize=True, dtype="bfloat16")


def _wake_threads():
    "The C library of many Linux systems (glibc before 2.41, bug 25847) can lose the signal that ends a thread's waiting, and MLX waits for ever: any interruption mends it."
    libc, threads = ctypes.CDLL(None), Path("/proc/self/task")
    while True:
        time.sleep(15)
        for t in threads.iterdir(): libc.tgkill(os.getpid(), int(t.name), signal.SIGURG)


def pytest_sessionstart(session):
    if not Path("/proc/self/task").exists() or not hasattr(ctypes.CDLL(None), "tgkill"): return
    signal.signal(signal.SIGURG, lambda *_: None)
    threading.Thread(target=_wake_threads, daemon=True).start()
