"Set before MLX is imported anywhere: its CPU compiler takes seconds per kernel, and its own matrix products are slow."
import os

os.environ.setdefault("MLX_DISABLE_COMPILE", "1")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1") # tests run side by side
from xlstm_metal.blas import use_openblas # noqa: E402

use_openblas()
