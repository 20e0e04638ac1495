"Set before MLX is imported anywhere: its CPU compiler takes seconds per kernel."
import os
os.environ.setdefault("MLX_DISABLE_COMPILE", "1")
