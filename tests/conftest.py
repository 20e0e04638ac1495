"Set before MLX is imported anywhere: its CPU compiler takes seconds per kernel, and its own matrix products are slow."
import os

os.environ.setdefault("MLX_DISABLE_COMPILE", "1")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1") # tests run side by side
os.environ["XLSTM_METAL_TUNED"] = os.devnull + "/none" # what this machine's owner has measured is not what is tested
from xlstm_metal.blas import use_openblas # noqa: E402

use_openblas()
