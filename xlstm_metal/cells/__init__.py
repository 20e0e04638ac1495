"""What computes: cells as functions of arrays, their definitions and their kernels."""
from importlib import import_module as _import_module

_home = {"empty_state": "mlstm", "mlstm_step": "mlstm", "mlstm_recurrent": "mlstm", "mlstm_parallel": "mlstm",
         "mlstm_chunkwise": "mlstm_chunks", "slstm_step": "slstm", "slstm_sequence": "slstm", "causal_conv1d": "conv"}
__all__ = list(_home)


def __getattr__(name):
    if name not in _home: raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(_import_module(f"{__name__}.{_home[name]}"), name)
