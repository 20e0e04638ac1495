"""Which block feeds which, and how that runs."""
from importlib import import_module as _import_module

from . import draw as _draw  # gives wirings their pictures; loads neither matplotlib nor networkx before one is drawn

_home = {name: "wiring" for name in ("Neuron", "Wiring", "WiringError", "xLSTMWiring", "SkipWiring", "ParallelWiring",
                                     "AutoNCPxLSTMWiring", "ablate", "wiring_from_config")} | {"BlockStack": "run", "layer_wiring": "run", "AutoWiring": "..model.auto_wiring"}
__all__ = list(_home)


def __getattr__(name):
    if name not in _home: raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = _home[name]
    return getattr(_import_module(module if module.startswith(".") else f".{module}", __name__), name)
