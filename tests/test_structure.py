"How modules depend on each other, and what each of them offers."
import ast
import json
import pkgutil
import re
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import networkx as nx
import pytest

import xlstm_metal

ROOT = Path(__file__).parents[1]
PACKAGES = ["xlstm_metal", *(m.name for m in pkgutil.walk_packages(xlstm_metal.__path__, "xlstm_metal.") if m.ispkg)]
LEAVES = [m.name for m in pkgutil.walk_packages(xlstm_metal.__path__, "xlstm_metal.") if not m.ispkg and m.name != "xlstm_metal._modidx"]
MODULES = PACKAGES + LEAVES


def imported(name, text, is_package=False):
    "The modules of this package that the text of one imports, anywhere in it; parent packages, which come first in any case, aside."
    here = name.split(".") if is_package else name.split(".")[:-1]
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import): yield from (a.name for a in node.names if a.name in MODULES)
        if not isinstance(node, ast.ImportFrom): continue
        base = ".".join(here[:len(here) - node.level + 1] * (node.level > 0) + ([node.module] if node.module else []))
        if base not in MODULES: continue
        for a in node.names: # a module, or what a module has, perhaps by way of the table in a package's __init__
            if f"{base}.{a.name}" in MODULES: yield f"{base}.{a.name}"
            elif base in PACKAGES: yield getattr(getattr(import_module(base), a.name), "__module__", base)
            else: yield base


def cycles(edges):
    return [sorted(c) for c in nx.strongly_connected_components(nx.DiGraph(edges)) if len(c) > 1]


def test_imports_are_found():
    text = ("import numpy, xlstm_metal.host\nfrom ..numerics import soft_cap\nfrom xlstm_metal import metal, Model\nfrom typing import TYPE_CHECKING\n"
            "if TYPE_CHECKING: from .conv import Conv1dCell\ndef f():\n    from ..wiring import AutoWiring\n    from . import norms\n")
    assert {m.removeprefix("xlstm_metal.") for m in imported("xlstm_metal.cells.new", text)} == {
        "host", "numerics", "metal", "model.model", "cells.conv", "model.auto_wiring", "cells.norms"}
    assert cycles([("a", "b"), ("b", "c"), ("c", "a"), ("c", "d")]) == [["a", "b", "c"]]


def test_no_import_cycles():
    edges = set()
    for name in MODULES:
        path = Path(find_spec(name).origin)
        edges |= {(name, other) for other in imported(name, path.read_text(), path.name == "__init__.py")}
    assert len(edges) > 50
    found = cycles(edges)
    assert not found, "\n".join(", ".join(c) + "".join(f"\n  {a} -> {b}" for a, b in sorted(edges) if a in c and b in c) for c in found)


def test_private_names_are_not_exported(record_property):
    exported = {name: getattr(import_module(name), "__all__", []) for name in MODULES if name != "xlstm_metal.__main__"}
    private = sum(n.startswith("_") and not n.startswith("__") for name in exported for n in vars(import_module(name)))
    record_property("exported", public := sum(map(len, exported.values())))
    record_property("private", private)
    print(f"{public} names in all __all__, {private} names with an underscore")
    assert not [f"{name}.{n}" for name, names in exported.items() for n in names if n.startswith("_") and n != "__version__"]


def test_a_notebook_exports_one_module():
    exported = []
    for nb in (p for p in (ROOT / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts):
        names = re.findall(r"(?m)^#\| default_exp (\S+)", "\n".join("".join(c["source"]) for c in json.loads(nb.read_text())["cells"]))
        assert len(names) == 1 or not names and (nb.parent.name == "tutorials" or nb.stem in ("index", "79_bundled")), f"{nb} exports {names}"
        exported += [f"xlstm_metal.{n}" for n in names]
    assert sorted(exported) == sorted(set(LEAVES) - {"xlstm_metal.__main__"})
