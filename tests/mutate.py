"""Faults in kernel texts, one at a time: `python tests/mutate.py [KERNEL ...]` tells which ones nobody notices.

A fault is noticed if the text no longer compiles or a Metal compiler would refuse it, if the host's executor
objects while the self-tests run, or if a self-test fails: what a Mac does before it first uses a kernel.
Those that nobody notices stand in survivors.json, each with the reason why it changes no result.
"""
import argparse
import json
import multiprocessing
import os
import random
import re
import sys
import tempfile
from collections import Counter
from functools import cache
from pathlib import Path
from typing import NamedTuple

os.environ.update(XLSTM_METAL_KERNELS="host", MLX_DISABLE_COMPILE="1")
FOLDER = Path(__file__).parents[1] / "kernels"
KNOWN = Path(__file__).with_name("survivors.json")
ROUNDING = 1e-6 # a relative difference below is one of rounding


class Mutant(NamedTuple):
    "A fault: what stands in a line of a file, and what stands there instead."
    file: str
    line: int # from 1
    column: int # of the text of the line, from 0
    kind: str
    old: str
    new: str

    def __str__(self): return f"{self.file}:{self.line}:{self.column} {self.kind}: {self.old} -> {self.new}"


def closing(text, at): # of a bracket
    depth = 0
    for j in range(at, len(text)):
        depth += (text[j] in "([{") - (text[j] in ")]}")
        if depth == 0: return j


def operands(text, start, end): # of an operator: where the comparison begins and ends
    depth, a, b = 0, start, end
    while a:
        c = text[a - 1]
        if c in "([{" and depth == 0 or depth == 0 and (c in ";,?:&|" or c == "=" and text[a - 2] not in "<>=!"): break
        depth += (c in ")]}") - (c in "([{")
        a -= 1
    while b < len(text):
        c = text[b]
        if c in ")]}" and depth == 0 or depth == 0 and c in ";,?:&|": break
        depth += (c in "([{") - (c in ")]}")
        b += 1
    lead = len(text[a:start]) - len(text[a:start].lstrip())
    return a + lead, len(text[:b].rstrip())


def edits(text): # text without comments -> (kind, start, end, replacement)
    def each(pattern): return re.finditer(pattern, text)
    for m in each(r"\w\["):
        at, end = m.end() - 1, closing(text, m.end() - 1)
        inside, declared = text[at + 1:end], re.search(r"\b(?!return\b|else\b)\w+\s+\w+$", text[:at])
        yield ("size", at + 1, end, f"({inside}) - 1") if declared else ("index", at + 1, end, f"({inside}) + 1")
        if not declared:
            for v in re.finditer(r"\b[a-zA-Z_]\w*\b(?!\()", inside): yield "index", at + 1 + v.start(), at + 1 + v.end(), "0"
    for m in each(r" (<=|>=|<|>|==|!=) "):
        if text[:m.start()].endswith("template"): continue
        other = {"<": "<=", "<=": "<", ">": ">=", ">=": ">", "==": "!=", "!=": "=="}[m[1]]
        yield "bound", m.start(1), m.end(1), other
        a, b = operands(text, m.start(), m.end())
        for value in ("true", "false"): yield "bound", a, b, value
    for m in each(r" (&&|\|\|) "): yield "bound", m.start(1), m.end(1), "||" if m[1] == "&&" else "&&"
    for m in each(r"\bmetal::(min|max)\("):
        end = closing(text, m.end() - 1)
        comma = next(j for j in range(m.end(), end) if text[j] == "," and text[m.end():j].count("(") == text[m.end():j].count(")"))
        yield "bound", m.start(), end + 1, f"({text[m.end():comma]})"
        yield "bound", m.start(), end + 1, f"({text[comma + 1:end].strip()})"
    for m in each(r"(?<=[=?:] )-?\d[\w.]*(?=\s*[;,)?:])"): # what variables begin with, and what stands for missing elements
        yield "initialiser", m.start(), m.end(), "0.0f" if m[0] == "-1e9f" else "1.0f" if m[0] == "0.0f" else f"{m[0]} + 1"
    for m in each(r"\b(?:uint|float) \w+ = ([a-z]\w*)(?=[;,])"): yield "initialiser", m.start(1), m.end(1), f"{m[1]} + 1"
    for m in each(r"\b(threadgroup|simdgroup)_barrier\([^)]*\);"):
        yield "barrier", m.start(), m.end(), ";"
        yield "barrier", m.start(), m.end(), m[0].replace("mem_threadgroup", "mem_none")
    for m in each(r"\bstatic_cast<(float|T)>\("):
        end = closing(text, m.end() - 1)
        yield "cast", m.start(), end + 1, f"static_cast<{m[1]}>(static_cast<float>(static_cast<int>({text[m.end():end]})))"
        if m[1] == "float" and "width" not in text[m.end():end] and "DV)" not in text[m.end():end + 1]:
            yield "cast", m.start(), end + 1, f"static_cast<float>(static_cast<half>({text[m.start():end + 1]}))"
    for m in each(r"\buint (\w+) = ([^;]*[^;,][*+][^;]*);"): # a narrow index
        if "for (" not in text[m.start() - 6:m.start()]: yield "cast", m.start(), m.start() + 4, "ushort"
    for m in each(r"\bsimd_(sum|max)\("):
        if text[:m.start()].endswith("float "): continue
        end = closing(text, m.end() - 1)
        yield "reduction", m.start(), m.start() + len("simd_sum"), "simd_max" if m[1] == "sum" else "simd_sum"
        yield "reduction", m.start(), end + 1, text[m.end() - 1:end + 1]
    for m in each(r" ([+*-])= "):
        yield "reduction", m.start(), m.end(), " = "
        yield "reduction", m.start(1), m.end(1), {"+": "-", "-": "+", "*": "/"}[m[1]]
    for m in each(r"\blog_sigmoid\((?!float x)"):
        end = closing(text, m.end() - 1)
        yield "cast", m.start(), end + 1, f"-metal::log(1.0f + metal::exp(-{text[m.end() - 1:end + 1]}))"


def mutants(file): # name of a kernel or header
    "All faults of a file, in the order of its text."
    from xlstm_metal.host import _blank_comments
    text = _blank_comments((FOLDER / file).read_text())
    def place(kind, a, b, new):
        start = text.rfind("\n", 0, a) + 1
        indent = len(text[start:]) - len(text[start:].lstrip())
        return Mutant(file, text.count("\n", 0, a) + 1, a - start - indent, kind, text[a:b], new)
    return [place(*e) for e in sorted(set(edits(text)), key=lambda e: e[1:])]


@cache
def functions(): # name -> (f, arguments that choose types and constants)
    "What the self-tests of all kernels are asked for: 32 and 16 bits, and what else is a constant of a text."
    import mlx.core as mx
    from test_kernels import DISPATCHED, adamw_args, log_args, mlstm_args, slstm_args
    from xlstm_metal import metal
    def short(args, t=mx.bfloat16): return [a.astype(t) for a in args]
    def mlstm(S, **kw):
        q, k, v, i, f, state = mlstm_args(S, **kw)
        return [(q, k, v, i, f, state), (*short((q, k, v)), i, f, state, mask(S))]
    def mask(S): return mx.ones((1, S), mx.bool_)
    def log(**kw):
        q, k, v, i, f, state = log_args(**kw)
        *of_state, old_k, old_v, old_i, old_f, real = state
        return [(q, k, v, i, f, state), (*short((q, k, v)), i, f, (*of_state, *short((old_k, old_v)), old_i, old_f, real), mask(1))]
    def slstm(S): return [(*slstm_args(S), None, mask(S)), (*slstm_args(S, DH=70), mask(S))] # with resets, and with a mask
    def conv(K): return metal.samples((2, 9, 5), (5, 1, K), (5,), (2, K - 1, 5))
    def token(args, t=mx.float32): return [a if a.ndim == 2 or a.shape == (6,) else a.astype(t) for a in args] # gates stay in 32 bits
    h, o, w, b = metal.samples((1, 2, 5, 33), (1, 5, 66), (66,), (66,))
    x, t, silu = metal.samples((2, 1, 30), (2, 1, 30), (30,)), metal.samples((2, 1, 30), (30,), (6, 30), (6,)), metal.samples((2, 3, 400), (2, 3, 400))
    maps, squares = metal.samples((2, 5, 40), (3, 40), (3,), (3, 40), (3,)), metal.samples((3000,), (256,))
    logits = metal.samples((3, 300))[0], mx.array([0, 7, 299])
    calls = {"_unmasked": [conv(4), short(conv(4)), conv(2)], "head_norm_gate": [(h, o, w), (h, o, w, b), (h, *short((o, w, b), mx.float16))],
             "add_rms_norm": [token(x), token(x, mx.bfloat16)], "rms_norm_gates": [(*token(t), 15.), (*token(t, mx.bfloat16), None)],
             "gated_silu": [silu, short(silu)], "gate_maps": [(*maps, 15.), (*short(maps[:1]), *maps[1:], None)],
             "capped_cross_entropy": [(*logits, 30.), (*short(logits[:1]), logits[1], None)], "add_squares": [squares, [squares[0].astype(mx.float16), squares[1]]],
             "adamw": [adamw_args(), (*short(adamw_args()[:2]), *adamw_args()[2:])],
             "mlstm_step": mlstm(1) + mlstm(1, NH=64), "mlstm_log_read": log() + log(NH=64), "mlstm_recurrent": mlstm(5), "_short": mlstm(5), "_long": mlstm(70), "mlstm_long_chunks": mlstm(70),
             "slstm_step": slstm(1), "slstm_sequence": slstm(5)}
    return {name: (f, calls[name.rpartition(".")[2]]) for name, f in DISPATCHED.items()}


def wider(name, seed):
    "Arguments that no self-test has: other shapes, larger numbers, masks, states."
    import mlx.core as mx
    import numpy as np
    rng = np.random.default_rng(seed)
    def r(*shape, scale=1.0): return mx.array(rng.standard_normal(shape) * scale).astype(mx.float32)
    B, NH, S, DQK, DV = (int(rng.integers(1, n)) for n in (3, 3, 80, 90, 90))
    scale, t = float(rng.choice([.3, 1, 10])), [mx.float32, mx.bfloat16, mx.float16][seed % 3]
    mask = mx.array(np.arange(S) >= rng.integers(0, S + 1, (B, 1))) if seed % 2 else None
    if name == "_unmasked":
        K = int(rng.integers(2, 9))
        return tuple(a.astype(t) for a in (r(B, S, DV, scale=scale), r(DV, 1, K), r(DV), r(B, K - 1, DV)))
    if name == "head_norm_gate":
        return r(B, NH, S, DV, scale=scale), *(a.astype(t) for a in (r(B, S, NH * DV, scale=scale), r(NH * DV))), r(NH * DV).astype(t) if seed % 2 else None
    if name == "gate_maps": return r(B, S, DV).astype(t), r(NH, DV), r(NH), r(NH, DV), r(NH), 15. * scale if seed % 2 else None
    if name == "capped_cross_entropy": return r(S, DV * 40, scale=scale).astype(t), mx.array(rng.integers(0, DV * 40, S).astype(np.int32)), 3 * scale if seed % 2 else None
    if name == "add_squares": return r(DV * 7000, scale=scale).astype(t), r(256)
    if name == "adamw":
        settings = mx.array(rng.random(11).astype(np.float32))
        return *(r(S, DV, scale=scale).astype(t) for _ in range(3)), mx.abs(r(S, DV)).astype(t), settings
    if name == "gated_silu": return tuple(r(B, S, DV * 9, scale=scale).astype(t) for _ in range(2))
    if name == "add_rms_norm": return *(r(B, 1, DV * 9, scale=scale).astype(t) for _ in range(2)), r(DV * 9).astype(t)
    if name == "rms_norm_gates": return r(B, 1, DV * 9, scale=scale).astype(t), r(DV * 9).astype(t), r(2 * DQK, DV * 9) / DV**.5, r(2 * DQK), 15. if seed % 2 else None
    if name.startswith("slstm"):
        S, DH = (1 if name == "slstm_step" else min(S, 30)), [DQK, DV + 70][seed % 2]
        state = None if seed % 4 == 0 else (r(B, NH, DH), r(B, NH, DH, scale=scale), 1 + mx.abs(r(B, NH, DH)), r(B, NH, DH, scale=scale))
        return r(B, NH, S, 4, DH, scale=scale), r(NH, 4, DH, DH) / DH**.5, r(NH, 4, DH), state, None if mask is None else mask[:, :S], mx.array(rng.random((B, S)) < .3) if seed % 3 else None
    if name == "mlstm_log_read":
        if seed % 3 == 0: NH, DV = 64, 2 * DV
        new, T, shapes = [(B, NH, 1, DQK), (B, NH, 1, DQK), (B, NH, 1, DV), (B, NH, 1), (B, NH, 1)], 1 + S % 20, [(DQK, DV), (DQK,), (1,)]
        q, k, v, i, f = (r(*s, scale=1 if len(s) > 3 else 3 * scale) for s in new)
        old = r(B, NH, T, DQK).astype(t), r(B, NH, T, DV).astype(t), r(B, NH, T, scale=3 * scale), r(B, NH, T, scale=3 * scale)
        state = (*(r(B, NH, *s) for s in shapes), *old, mx.array(rng.random((B, T)) < .7))
        return *(a.astype(t) for a in (q, k, v)), i, f, state, mx.array(rng.random((B, 1)) < .7) if seed % 2 else None
    S = {"mlstm_step": 1, "_long": S + 16, "mlstm_long_chunks": S + 16}.get(name, 1 + S % 16)
    if name == "mlstm_step" and seed % 3 == 0: NH, DV = 64, 2 * DV
    state = None if seed % 4 == 0 else (r(B, NH, DQK, DV), r(B, NH, DQK), r(B, NH, 1, scale=5 * scale)[..., 0:1])
    mask = mx.array(np.arange(S) >= rng.integers(0, S + 1, (B, 1))) if seed % 2 else None
    return *(a.astype(t) for a in (r(B, NH, S, DQK), r(B, NH, S, DQK), r(B, NH, S, DV))), r(B, NH, S, scale=scale * 3), r(B, NH, S, scale=scale * 3), state, mask


class Net:
    """Runs mutants of one file against the self-tests that launch it; what a mutant does not change is computed once.

    Args:
        file: a name in kernels/
    """
    def __init__(self, file):
        import mlx.core as mx
        from test_kernels import KERNELS
        from xlstm_metal import host, metal
        self.mx, self.metal, self.file, self.text, self.run = mx, metal, file, (FOLDER / file).read_text(), host.run
        self.changed = {k.name: k for k in KERNELS if file in (f"{k.name}.metal", *(f"{h}.h" for h in k.includes))}
        self.kept, self.launches, self.tests, self.calls, self.healthy = {}, {}, [], {}, {}
        self.of_tests, self.of_wider, self.recorded = [], {}, None # launches of what changes, and their results
        host.run = self.remember
        metal.live_sources["host.h"] = metal.kernel_source("host.h").replace("1 << 18", "1 << 12") # loops that never end, sooner
        for name, (f, variants) in functions().items():
            self.launches.clear()
            mx.eval(metal.gradients(f, tuple(variants[0]), f(*variants[0])))
            if not self.changed.keys() & self.launches.keys(): continue
            found = [t for args in variants for t in self.asked(f, args)]
            self.tests = sorted(self.tests + found, key=lambda t: sum(a.size for a in t[1] if isinstance(a, mx.array))) # small ones first
            self.calls[name.rpartition(".")[2]] = f, found[0][0]
            self.seen = {n: self.launches[n] for n in self.changed if n in self.launches}
        self.recorded = self.of_tests
        for t in self.tests: self.values(t)
        self.recorded = None

    def same(self, launches): # to the last bit, by the kernel as it is now
        return all(self.mx.array_equal(a, b, equal_nan=True) for (name, *args), results in launches
                   for a, b in zip(self.run(name, self.metal.kernel_source(f"{name}.metal"), *args), results, strict=True))

    def remember(self, name, text, inputs, outputs, grid, threads, template, includes=()):
        self.launches[name] = {n: a.dtype for n, a in inputs.items()} | {n: t for n, (_, t) in outputs.items()}, template
        if name in self.changed:
            results = self.run(name, text, inputs, outputs, grid, threads, template, includes)
            if self.recorded is not None: self.recorded.append(((name, inputs, outputs, grid, threads, template, includes), results))
            return results
        key = name, repr((template, outputs, grid)), *(bytes(memoryview(a.flatten().view(self.mx.uint8))) for a in inputs.values())
        if key in self.kept: return self.kept[key]
        results = self.run(name, text, inputs, outputs, grid, threads, template, includes)
        if self.file not in self.metal.live_sources: self.kept[key] = results # what follows a fault is of no use again
        return results

    def asked(self, f, args): # -> what the self-test of a call compares: by kernel, arguments, weights of the results, the plain form's values
        import inspect
        tests, mx, metal = [], self.mx, self.metal
        def note(by_kernel, plain, example, with_gradients=True, tolerance=None):
            weights = metal._weights(plain(*example))
            want = metal._values(plain, example, weights, True)
            mx.eval(want)
            return tests.append((by_kernel, example, weights, want, tolerance)) or True
        kept, metal.matches_reference = metal.matches_reference, note
        try: f.self_test(*metal._bind(inspect.unwrap(f), args, {}))
        finally: metal.matches_reference = kept
        return tests

    def passes(self, test): # results first: gradients take thirty times as long, for nothing if results are wrong
        by_kernel, args, _, want, tolerance = test
        got = self.metal._floats(by_kernel(*args))
        return self.metal._agree(got, want[:len(got)], tolerance) and self.metal._agree(self.values(test), want, tolerance)

    def values(self, test): return self.metal._values(*test[:3], True)

    def plant(self, m):
        lines = self.text.split("\n")
        start = sum(map(len, lines[:m.line - 1])) + m.line - 1 + len(lines[m.line - 1]) - len(lines[m.line - 1].lstrip()) + m.column
        self.metal.live_sources[self.file] = self.text[:start] + m.new + self.text[start + len(m.old):]

    def notices(self, m): # who; None: nobody
        from xlstm_metal.host import KernelFault, metal_diagnostics
        self.plant(m)
        try:
            if m.new == "ushort" and any(metal_diagnostics(self.changed[n], types, **template) for n, (types, template) in self.seen.items()):
                return "compiler"
            if self.same(self.of_tests): return None
            return next(("self-test" for t in self.tests if not self.passes(t)), None)
        except KernelFault as e: return "compiler" if "does not compile" in str(e) else "executor"
        finally: del self.metal.live_sources[self.file]

    def difference(self, m, trials=5): # of its results from those of the kernel, relative; 0: not a bit
        import inspect
        from xlstm_metal.host import KernelFault
        largest = 0.0
        for name, (f, by_kernel) in self.calls.items():
            for seed in range(trials):
                if (name, seed) not in self.healthy:
                    self.recorded = self.of_wider[name, seed] = []
                    args = self.metal._bind(inspect.unwrap(f), wider(name, seed), {})
                    weights = self.metal._weights(by_kernel(*args))
                    self.healthy[name, seed] = test = by_kernel, args, weights, self.metal._values(by_kernel, args, weights, True)
                    self.recorded = None
                test = self.healthy[name, seed]
                self.plant(m)
                try: got = test[3] if self.same(self.of_wider[name, seed]) else self.values(test)
                except KernelFault: return float("inf")
                finally: del self.metal.live_sources[self.file]
                for a, b in zip(got, test[3], strict=True):
                    if not self.mx.array_equal(a, b, equal_nan=True): largest = max(largest, self.metal._distance(a, b), 1e-12)
                if not largest < 1e-3: return largest
        return largest


def work(file, wanted, results): # wanted: mutants of a file
    with tempfile.TemporaryDirectory() as folder: # compiled mutants are of no use to anybody
        tempfile.tempdir = folder
        net = Net(file)
        for m in wanted:
            who = net.notices(m)
            results.put((m, who, None if who else net.difference(m)))
    results.put((file, None, None))


def key(m): # as in the list of survivors, where lines may move
    line = (FOLDER / m.file).read_text().split("\n")[m.line - 1].strip()
    return f"{m.file}: {line} [{m.column}] {m.old} -> {m.new}"


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("files", nargs="*", help="names without suffix; all, if none are given")
    parser.add_argument("--sample", type=int, help="so many mutants of each file")
    parser.add_argument("--seed", type=int, default=0, help="of the sample")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--to", type=Path, help="write what became of every mutant, as JSON lines; what stands there is not run again")
    a = parser.parse_args()
    files = [f.name for f in sorted(FOLDER.glob("*")) if f.stem not in ("host", "cuda", "nvrtc", "types") and (not a.files or f.stem in a.files)]
    chosen = {f: mutants(f) for f in files}
    if a.sample: chosen = {f: random.Random(a.seed).sample(ms, min(a.sample, len(ms))) for f, ms in chosen.items()}
    found = [(Mutant(*m), who, d) for *m, who, d in map(json.loads, a.to.open())] if a.to and a.to.exists() else []
    done = {m for m, _, _ in found}
    chosen = {f: [m for m in ms if m not in done] for f, ms in chosen.items()}
    spawn = multiprocessing.get_context("spawn") # MLX does not survive a fork
    results, waiting, at_work = spawn.Queue(), sorted(files, key=lambda f: len(chosen[f])), 0
    def start(file): spawn.Process(target=work, args=(file, chosen[file], results), daemon=True).start()
    while waiting or at_work:
        while waiting and at_work < a.processes: start(waiting.pop()); at_work += 1
        m, who, difference = results.get()
        if isinstance(m, str): at_work -= 1; continue
        found.append((m, who, difference))
        if a.to: a.to.open("a").write(json.dumps([*m, who, difference]) + "\n")
    return report(found, json.loads(KNOWN.read_text()) if KNOWN.exists() else {}, complete=not (a.files or a.sample))


def report(found, known, complete):
    print(f"{'':28}{'mutants':>8}{'compiler':>10}{'executor':>10}{'self-test':>11}{'no change':>11}{'missed':>8}")
    rows = {}
    for m, who, difference in found:
        row = rows.setdefault(m.file, Counter()), rows.setdefault("all", Counter())
        for r in row: r.update(["mutants", who or ("missed" if difference > ROUNDING else "no change")])
    for file, r in sorted(rows.items(), key=lambda kv: kv[0] == "all"):
        print(f"{file:28}{r['mutants']:8}{r['compiler']:10}{r['executor']:10}{r['self-test']:11}{r['no change']:11}{r['missed']:8}")
    r = rows["all"]
    print(f"caught: {100 * (1 - r['missed'] / (r['mutants'] - r['no change'])):.1f} % of those that change a result")
    survivors = {key(m) for m, who, _ in found if not who}
    new = sorted(survivors - known.keys())
    stale = sorted(known.keys() - survivors) if complete else []
    for what, names in ("nobody notices, and survivors.json does not explain", new), ("is in survivors.json, but does not survive", stale):
        for name in names: print(f"{what}: {name}")
    return bool(new or stale)


if __name__ == "__main__": sys.exit(main())
