"""Data, loss, initial weights, optimiser and loop."""
from importlib import import_module as _import_module

_home = {name: "train" for name in ("lm_loss", "init_weights", "make_optimizer", "fit", "bits_per_byte")} | {
    name: "data" for name in ("corpus", "held_out", "train_tokenizer", "tokenize", "line_starts", "windows")} | {
    name: "datasets" for name in ("documents", "TokenDataset", "prepare_in_background", "packed", "batches_per_epoch")} | {
    name: "trainer" for name in ("Trainer", "TrainConfig")}
__all__ = list(_home)


def __getattr__(name):
    if name not in _home: raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(_import_module(f"{__name__}.{_home[name]}"), name)
