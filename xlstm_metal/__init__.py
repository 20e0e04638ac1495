"""xLSTM language models on Apple's MLX, written as notebooks.

The names below are imported when they are first used, so that `import xlstm_metal` stays light.
"""
__version__ = "0.1.0"

from importlib import import_module as _import_module

_home = {
    "load": "model.checkpoint", "info": "model.checkpoint",
    "Model": "model.model", "xLSTMConfig": "model.config",
    "generate": "generation.generate", "stream": "generation.generate",
    "xLSTMRunner": "generation.runner", "Playground": "apps.playground",
    "State": "generation.state", "batch": "generation.state", "unbatch": "generation.state", "score": "generation.score",
    "Checkpoints": "generation.checkpoints", "NamedStates": "generation.named_states",
    "record": "generation.memory_plots", "plot_gates": "generation.memory_plots", "plot_memory": "generation.memory_plots",
    "plot_surprise": "generation.memory_plots", "plot_state_norms": "generation.memory_plots",
    "convert": "model.convert", "save": "model.convert", "xLSTM": "model.lstm_layer",
    "fit": "train.train", "init_weights": "train.train", "lm_loss": "train.train", "make_optimizer": "train.train",
    "Trainer": "train.trainer", "TrainConfig": "train.trainer",
    "Forecaster": "forecast.forecaster", "load_forecaster": "forecast.forecaster",
}
__all__ = ["__version__", *_home]


def _modules():
    from pkgutil import iter_modules # not light
    return [m.name for m in iter_modules(__path__) if not m.name.startswith("_")]


def __getattr__(name):
    if name in _home: value = getattr(_import_module(f"{__name__}.{_home[name]}"), name)
    elif name in _modules(): value = _import_module(f"{__name__}.{name}")
    else: raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__(): return sorted({*globals(), *__all__, *_modules()})


from .apps.mlx_tools import register as _register  # imports nothing of mlx-lm's

_register()
