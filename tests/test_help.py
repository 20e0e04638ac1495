"What `help`, `?` and `repr` say: every argument of what is public, under its own name, and the sizes of modules."
import inspect
import pkgutil
import pydoc
import re
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from runpy import run_path

import mlx.nn as nn

import xlstm_metal as xm

ROOT = Path(__file__).parents[1]
document, collect = (run_path(ROOT / "docs" / "document.py")[name] for name in ("document", "collect"))
MODULES = [m.name for m in pkgutil.walk_packages(xm.__path__, "xlstm_metal.") if not m.ispkg and m.name not in ("xlstm_metal.__main__", "xlstm_metal._modidx")]


def public():
    "Functions and classes that are offered, each where it is defined, and those of `xm`."
    found = {}
    for module in ["xlstm_metal", *MODULES]:
        for name in getattr(import_module(module), "__all__", []):
            value = getattr(import_module(module), name)
            if inspect.isclass(value) or inspect.isfunction(inspect.unwrap(value)):
                if value.__module__.startswith("xlstm_metal."): found[f"{value.__module__[12:]}.{value.__qualname__}"] = value
    return found


def methods(cls):
    "The methods that a class has of its own, by the name under which they are called."
    for name, value in vars(cls).items():
        f = inspect.unwrap(value.__func__ if isinstance(value, (classmethod, staticmethod)) else value)
        if inspect.isfunction(f) and f.__module__.startswith("xlstm_metal.") and (name == "__call__" or not name.startswith("_")):
            yield name, f, list(inspect.signature(f).parameters.values())[not isinstance(value, staticmethod):]


def constructor(cls):
    "The parameters that the constructor of a class has of its own; a dataclass also takes those of its bases."
    if "__init__" not in vars(cls) and "__new__" not in vars(cls): return []
    parameters = inspect.signature(cls).parameters.values()
    made = "__dataclass_fields__" in vars(cls) or hasattr(cls, "_fields")
    return [p for p in parameters if not made or p.name in vars(cls).get("__annotations__", {})]


def undocumented(value, names):
    "The parameters without a description of their own, or shared with others, in a docstring."
    doc = inspect.getdoc(value) or ""
    def described(p):
        if re.search(rf"(?m)^ +(\*{{0,2}}\w+, )*\*{{0,2}}{p.name}(, \*{{0,2}}\w+)*: \S", doc): return True
        if p.kind is p.VAR_KEYWORD: return re.search(rf"\b{p.name}\b", doc) # where they go is said in the summary
        return re.search(rf":param {p.name}: \S", doc) # a method of `ncps` that is written anew
    return [p.name for p in names if p.name != "cls" and not described(p)]


def without_help():
    for path, value in public().items():
        if not inspect.isclass(value):
            yield path, undocumented(value, inspect.signature(value).parameters.values())
            continue
        yield path, undocumented(value, constructor(value))
        for name, f, names in methods(value):
            if not (issubclass(value, nn.Module) and name == "__call__" and [p.name for p in names] == ["x"]):
                yield f"{path}.{name}", undocumented(getattr(value, name), names)


SAMPLE = '''
class Cell: # of a kind
    r"One \\d."
    def __init__(self, # nothing of this
        dims: int = 4, # D
        sizes=(1,
               2), # several
    ): self.dims = dims

    @property
    def size(self) -> int: # "B"
        # why
        return 1

    def __call__(self, x, state=None): # (B, S) -> (B, D)
        "Run."
        return x

    def _hidden(self, x): # (B,)
        return x

def f(
    q, k, *more, # a \\d; k: b
    **kwargs, # as for `g`
) -> int: return 1 # not this

def g(a, b): # a: one; b: two; three
    yield a

def h(a): # yields a
    yield a

def i(a, b, c): # as for `g`; b: four
    return a

class Other(Cell):
    def __call__(self, x): # as for `Cell`
        return x
'''


def test_comments_become_docstrings():
    text = document(SAMPLE, known := collect(SAMPLE))
    exec(text, space := {})
    Cell, f, g, h = (space[n] for n in ("Cell", "f", "g", "h"))
    assert inspect.getdoc(Cell) == "One \\d.\n\nArgs:\n    dims: D\n    sizes: several"
    assert inspect.getdoc(Cell.size) == '"B"' and Cell().size == f(1, 2) == 1 and Cell._hidden.__doc__ is None
    assert inspect.getdoc(Cell.__call__) == "Run.\n\nArgs:\n    x: (B, S)\n\nReturns:\n    (B, D)"
    assert inspect.getdoc(f) == "Args:\n    q, k, *more: a \\d; k: b\n    **kwargs: as for `g`"
    assert inspect.getdoc(g) == "Args:\n    a: one\n    b: two; three" and inspect.getdoc(h) == "Yields:\n    a"
    assert inspect.getdoc(space["i"]) == "Args:\n    a: one\n    b: four\n    c: as for `g`; b: four"
    assert inspect.getdoc(space["Other"].__call__) == inspect.getdoc(Cell.__call__).removeprefix("Run.\n\n")
    comments = [re.findall("# .*", s) for s in (text, SAMPLE)]
    assert comments[0] == comments[1] and document(text, known) == text
    sources = {name: Path(find_spec(name).origin).read_text() for name in MODULES}
    known = collect(*sources.values())
    for name, source in sources.items(): assert document(source, known) == source, f"{name}: run make export"


def test_every_argument_is_documented():
    assert len(list(public())) > 150
    assert [(path, missing) for path, missing in without_help() if missing] == []


def test_help_shows_what_load_takes():
    text = pydoc.plain(pydoc.render_doc(xm.load))
    assert re.search(r"dtype: .*float32.*bfloat16", text) and re.search(r"path: folder or hub id", text)
    assert "model, tokenizer" in text.split("Returns:")[1]


def test_methods_are_named_after_their_class():
    wrong = [f"{path}.{name}" for path, value in public().items() if inspect.isclass(value)
             for name, _, _ in methods(value) if getattr(value, name).__qualname__ != f"{value.__qualname__}.{name}"]
    assert wrong == []
    assert "read in xlstm_metal.State" in pydoc.plain(pydoc.render_doc("xlstm_metal.State.read"))


def test_repr_shows_sizes():
    models = [xm.load(path)[0] for path in (None, ROOT / "tests/fixtures/stack_tiny")]
    leaves = {type(m): m for model in models for _, m in model.named_modules() if not m.leaf_modules() and type(m).__module__.startswith("xlstm_metal.")}
    assert len(leaves) > 4
    assert [cls.__name__ for cls, m in leaves.items() if repr(m) == f"{cls.__name__}()"] == []
