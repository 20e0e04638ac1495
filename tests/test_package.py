"The package as a whole: what the wheel holds, how light the import is, and that texts and notebooks are in order."
import json
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted(p for p in (ROOT / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts)


def python(code, **kw): return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, **kw)


def test_import_is_light():
    code = ("import sys, time; t = time.perf_counter(); import xlstm_metal as xm; took = time.perf_counter() - t\n"
            "print(took); print([m for m in ('transformers', 'mlx_lm', 'torch', 'nbdev', 'matplotlib', 'ipywidgets', 'huggingface_hub', 'fastcore') if m in sys.modules])")
    took, heavy = python(code).stdout.split("\n")[:2]
    assert float(took) < .5 and heavy == "[]"


def test_package_needs_no_notebook_tools():
    modules = [str(p.relative_to(ROOT).with_suffix("")).replace("/", ".") for p in (ROOT / "xlstm_metal").rglob("*.py") if p.name != "__main__.py"]
    block = "import sys\nfor m in ('nbdev', 'fastcore', 'IPython', 'matplotlib', 'ipywidgets', 'torch'): sys.modules[m] = None\n"
    optional = "_modidx", "sktime_adapter"
    r = python(block + "\n".join(f"import {m}" for m in modules if not m.endswith(optional)))
    assert r.returncode == 0, r.stderr


def test_public_names():
    import xlstm_metal as xm
    for name in xm.__all__: assert getattr(xm, name) is not None
    with pytest.raises(AttributeError): xm.nothing


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    out = tmp_path_factory.mktemp("wheel")
    r = subprocess.run([sys.executable, "-m", "build", "-q", "--wheel", "--no-isolation", "--outdir", out, ROOT], capture_output=True, text=True)
    assert r.returncode == 0, r.stderr
    return next(out.glob("*.whl"))


def test_wheel_holds_everything(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    tracked = subprocess.run(["git", "ls-files", "xlstm_metal"], capture_output=True, text=True, cwd=ROOT).stdout.split()
    assert tracked and set(tracked) <= names
    kernels = [f.name for f in (ROOT / "kernels").iterdir() if f.suffix in (".metal", ".h")]
    assert kernels and {f"xlstm_metal/kernels/{f}" for f in kernels} <= names
    assert {"xlstm_metal/bundled/model.safetensors", "xlstm_metal/bundled/tokenizer.json", "xlstm_metal/apps/cli.py"} <= names
    assert not [n for n in names if n.endswith(".ipynb") or n.startswith(("tests", "nbs"))]


def test_every_kernel_file_has_its_cell():
    cells = [("".join(c["source"]).split("\n")[0]) for nb in NOTEBOOKS for c in json.loads(nb.read_text())["cells"] if c["cell_type"] == "code"]
    from_cells = {f"{l.split()[1]}.metal" for l in cells if l.startswith("%%metal ") and "--example" not in l} | {f"{l.split()[1]}.h" for l in cells if l.startswith("%%header ")}
    assert from_cells == {f.name for f in (ROOT / "kernels").iterdir() if f.suffix in (".metal", ".h")}


def test_wheel_runs_on_its_own(wheel, tmp_path):
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    code = f"import sys; sys.path.insert(0, {str(tmp_path / 'site')!r}); import xlstm_metal as xm; from xlstm_metal.metal import kernel_source; assert 'metal' in kernel_source('host.h'); m, t = xm.load(); print(xm.__file__); print(xm.generate(m, t, 'def f(', max_tokens=5))"
    r = python(code, cwd=tmp_path)
    assert r.returncode == 0 and str(tmp_path) in r.stdout and len(r.stdout.splitlines()) > 1, r.stderr


def test_bundled_model_is_small_and_described():
    folder = ROOT / "xlstm_metal" / "bundled"
    assert sum(f.stat().st_size for f in folder.iterdir()) <= 16e6
    text = (folder / "README.md").read_text()
    for word in ("standard library", "parameters", "steps", "bits per byte", "held-out"): assert word in text, word


def test_readme_commands_exist():
    text = (ROOT / "README.md").read_text()
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    assert set(re.findall(r"make ([a-z]+(?:-[a-z]+)*)", text)) <= targets
    from xlstm_metal.apps.cli import parser
    commands = re.findall(r"^xlstm-metal (.+)$", text, re.M)
    assert len(commands) >= 3
    for line in commands:
        import shlex
        parser().parse_args(shlex.split(line))


@pytest.mark.parametrize("nb", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook_is_in_order(nb):
    cells = json.loads(nb.read_text())["cells"]
    ids = [c["id"] for c in cells]
    assert len(ids) == len(set(ids))
    first = "".join(cells[0]["source"])
    assert re.match(r"# .+\n\n> .+", first), "a notebook begins with a title and a subtitle"
    assert cells[-1]["cell_type"] == "markdown"
    outputs = [o for c in cells for o in c.get("outputs", [])]
    assert not [o for o in outputs if o["output_type"] == "error"]
    assert nb.stat().st_size < 500_000
