"""What computes: cells as functions of arrays, their definitions and their kernels."""
from importlib import import_module as _import_module

_home = {
    "empty_state": "mlstm", "mlstm_parallel": "mlstm",
    "mlstm_step": "mlstm_step_kernel", "mlstm_step_plain": "mlstm",
    "mlstm_log_read": "mlstm_replay", "mlstm_log_read_plain": "mlstm_replay",
    "mlstm_recurrent": "mlstm_chunk_kernels", "mlstm_recurrent_plain": "mlstm",
    "mlstm_chunkwise": "mlstm_chunk_gradients", "mlstm_chunkwise_plain": "mlstm_chunks",
    "mlstm_long_chunks": "mlstm_long_kernels", "mlstm_long_chunks_plain": "mlstm_chunks",
    "empty_slstm_state": "slstm", "slstm_step": "slstm", "slstm_step_plain": "slstm",
    "slstm_sequence": "slstm", "slstm_sequence_plain": "slstm",
    "causal_conv1d": "conv", "causal_conv1d_plain": "conv",
    "gate_maps": "mlstm_gates", "gate_maps_plain": "mlstm_gates",
    "head_norm_gate": "norms", "head_norm_gate_plain": "norms",
    "add_rms_norm": "norms", "add_rms_norm_plain": "norms", "rms_norm_gates": "norms", "rms_norm_gates_plain": "norms",
}
__all__ = list(_home)


def __getattr__(name):
    if name not in _home: raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(_import_module(f"{__name__}.{_home[name]}"), name)


def __dir__(): return sorted({*globals(), *__all__})
