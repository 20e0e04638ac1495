"""Which block feeds which, and how that runs."""
from importlib import import_module as _import_module

_home = {name: "wiring" for name in ("Neuron", "Wiring", "WiringError", "xLSTMWiring", "SkipWiring", "ParallelWiring",
                                     "AutoNCPxLSTMWiring", "without", "wiring_from_config")} | {"AutoWiring": "auto"}
__all__ = list(_home)


def __getattr__(name):
    if name not in _home: raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(_import_module(f"{__name__}.{_home[name]}"), name)
