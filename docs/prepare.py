"""`prepare.py OUT` runs every notebook under nbs/ and rewrites it for Sphinx."""
import os, re, sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from posixpath import normpath, relpath
from shutil import copytree, ignore_patterns

from execnb.nbio import mk_cell, nb2str
from execnb.shell import CaptureShell, format_exc
from fastcore.xtras import working_directory
from nbdev.config import get_config
from nbdev.doclinks import _nbpath2html, nbglob
from nbdev.frontmatter import _fm2dict
from nbdev.process import NBProcessor, Processor
from nbdev.processors import add_show_docs, clean_magics, hide_, hide_line, rm_export, rm_header_dash, strip_ansi
from nbdev.showdoc import show_doc

cfg = get_config()
repo = f'{cfg.git_url}/blob/{cfg.branch}'
widget = 'application/vnd.jupyter.widget-view+json'
tags = {'echo: false': 'remove-input', 'include: false': 'remove-cell',
        'output: false': 'remove-output', 'code-fold: true': 'hide-input'}

class CellFailed(Exception): "A cell raised; the message says which"

def page(path):
    "Where the site has the notebook at `path`: without numbers and suffix"
    return _nbpath2html(Path(path).relative_to(cfg.nbs_path)).with_suffix('').as_posix()

def label(page, name):
    "Sphinx's labels know no capitals, yet `Info` and `info` need one each"
    return f"{page.replace('/', '.')}{':' if name.islower() else '::'}{name.lower()}"

def prose(f, text):
    "`text` with `f` applied outside of fenced code"
    return ''.join(o if o.startswith('```') else f(o) for o in re.split(r'(?ms)(^```.*?^``` *$)', text))

def fence(text, info, *options): return '\n'.join([f'````{{code-block}} {info}', *options, '', text.strip('\n'), '````'])

def to_md(cell, text):
    "Turn `cell` into markdown"
    cell.cell_type, cell.source = 'markdown', text
    for k in 'outputs', 'execution_count': cell.pop(k, None)

class Title(Processor):
    "Front matter as a heading; a quoted line below the first heading is the subtitle"
    def begin(self):
        head = self.nb.cells[0]
        self.nb.frontmatter_ = fm = _fm2dict(head.source) if head.cell_type == 'raw' else {}
        if fm: to_md(head, f"# {fm.get('title', '')}\n\n> {fm.get('description', '')}")
        name = Path(self.nb.path_).relative_to(cfg.config_path).as_posix()
        def lead(m):
            text = re.sub('(?m)^> ?', '', m[2])
            return f'{m[1]}{{.nb-source}}\n[{name}]({repo}/{name})\n\n' + (f'{{.subtitle}}\n{text}' if text else '')
        for c in self.nb.cells:
            if c.cell_type == 'markdown' and c.source.startswith('# '):
                c.source = re.sub(r'\A(# .*\n+)((?:>.*\n)*)', lead, c.source.rstrip() + '\n')
                break

class RunAll(Processor):
    "Run the notebook where it lies; cells that `nbdev_test` skips keep their recorded output"
    def skipped(self, cell):
        return (cell.cell_type != 'code' or 'nbdev_export(' in cell.source or cell.directives_.get('eval:') == ['false']
                or cell.directives_.keys() & set(cfg.tst_flags.split()))

    def begin(self):
        if self.nb.frontmatter_.get('skip_exec'): return
        path = Path(self.nb.path_)
        shell = CaptureShell(path, mpl_format='png')
        shell.set_path(cfg.config_path)
        shell.user_ns['show_doc'] = show_doc
        with working_directory(path.parent):
            for cell in self.nb.cells:
                if self.skipped(cell): continue
                cell.outputs = []
                shell.cell(cell)
                if shell.exc: raise CellFailed(f"{path.relative_to(cfg.config_path)}, cell {cell.id}:\n\n{cell.source}\n\n"
                                               + ''.join(format_exc(shell.exc)))

class ShowDoc(Processor):
    "A section for each documented symbol; where its source is shown too, that and the heading say it all"
    def parse(self, cell):
        md = next(''.join(o.data['text/markdown']) for o in cell.outputs if 'text/markdown' in o.get('data', {}))
        return re.match(r'---\n+(?:\[source\]\((\S+)\)\{.*\}\n+)?(#+) (\S+)\n(.*)', md, re.S).groups()

    def section(self, cells, body=True):
        links, levels, names, docs = zip(*map(self.parse, cells))
        self.nb.symbols_ += names
        text = [f'({label(page(self.nb.path_), o)})=' for o in names]
        text.append(levels[0] + ' ' + ', '.join(f'`{o}`' for o in names) + '\n')
        if links[0]: text.append(f'{{.nb-source}}\n[source]({links[0]})\n')
        return mk_cell('\n'.join([*text, *(docs if body else ())]), 'markdown')

    def begin(self): # from the end, since `add_show_docs` puts the last symbol of a cell first
        cells, docs, self.nb.symbols_ = [], [], []
        for c in reversed(self.nb.cells):
            if c.cell_type == 'code' and c.source.startswith('show_doc('):
                if not c.outputs: continue # not run
                if 'has_sd' in c: docs.append(c)
                else: cells.insert(0, self.section([c]))
            else:
                new = [self.section(docs, False)] if docs and 'exports' in c.directives_ else [self.section([d]) for d in docs]
                cells, docs = [*new, c, *cells], []
        self.nb.cells = cells

class Fences(Processor):
    "`%%bash`, `%%metal` and `%%header` cells as code blocks of their language"
    def body(self, cell): return '\n'.join(l for l in cell.source.splitlines() if not l.startswith(('#|', '%%')))
    def _metal_(self, cell, name, *_):
        to_md(cell, fence(self.body(cell), 'cpp', *([] if name == '--example' else [f':caption: kernels/{name}.metal'])))
    def _header_(self, cell, name, *_): to_md(cell, fence(self.body(cell), 'cpp', f':caption: kernels/{name}.h'))
    def _bash_(self, cell, *_):
        out = ''.join(l for o in cell.outputs if o.get('name') == 'stdout' for l in o.text)
        to_md(cell, fence(self.body(cell), 'sh') + ('\n\n' + fence(out, 'text', ':class: output') if out else ''))

class ToSphinx(Processor):
    "Directives as tags, Quarto's markdown as MyST's; no progress bars, warnings or widgets"
    def cell(self, cell):
        if cell.cell_type == 'markdown': cell.source = prose(self.myst, cell.source)
        if cell.cell_type != 'code': return
        opts = {k: ' '.join(v) for k, v in cell.directives_.items()}
        cell.source = '\n'.join(l for l in cell.source.splitlines() if not l.startswith('#|'))
        cell.metadata = {'tags': [t for d, t in tags.items() if opts.get(d.split()[0]) == d.split()[1]]}
        if s := opts.get('code-summary:'): cell.metadata['mystnb'] = {'code_prompt_show': s.strip('"\'')}
        cell.outputs = [o for o in cell.outputs if o.get('name') != 'stderr' and widget not in o.get('data', {})]

    def myst(self, text):
        def callout(m): return f':::{{admonition}} {m[2] or m[1].capitalize()}\n:class: {m[1]}\n'
        text = re.sub(r'(?m)^::: *\{\.callout-(\w+).*\}\n+(?:#+ (.*)\n)?', callout, text)
        text = re.sub(r'\$\$ *\{#(eq-[\w-]+)\}', r'$$ (\1)', text)
        text = re.sub(r'(?<![\w`])@(eq-[\w-]+)', r'{eq}`\1`', text)
        return re.sub(r'\]\((?![a-z]+:|#)([^)\s#]+)', self.link, text)

    def link(self, m):
        "A relative link leads to a page, to something beside it, or to a file in the repository"
        here = Path(self.nb.path_).parent
        path = Path(normpath((here/m[1]).as_posix()))
        if path.suffix == '.ipynb': return f"]({relpath(_nbpath2html(path).with_suffix('.ipynb'), here)}"
        return m[0] if cfg.nbs_path in path.parents else f']({repo}/{relpath(path, cfg.config_path)}'

def convert(path):
    "The notebook at `path`, run and rewritten"
    procs = [Title, add_show_docs, RunAll, strip_ansi, hide_line, hide_, rm_export, rm_header_dash,
             ShowDoc, Fences, clean_magics, ToSphinx]
    nb = NBProcessor(path, procs, process=True).nb
    nb.metadata = {'language_info': {'name': 'python', 'pygments_lexer': 'ipython3'}}
    for i, c in enumerate(nb.cells): c.id = f'cell-{i}' # the same in every build
    return nb

def link_symbols(nb, symbols):
    "`name` in backticks links to its section: on this page, else on the only page that has one"
    here = page(nb.path_)
    def link(m):
        name = m[1] if m[1] in symbols else m[1].split('.')[0] # a method without a section: its class
        pages = symbols.get(name, [])
        if here not in pages and len(pages) != 1: return m[0]
        return f'[{m[0]}](#{label(here if here in pages else pages[0], name)})'
    def line(m): return m[0] if m[0].startswith('#') else re.sub(r'(?<![`\[])`([\w.]+)(?:\(\))?`(?![`\]])', link, m[0])
    for c in nb.cells:
        if c.cell_type == 'markdown': c.source = prose(lambda s: re.sub('(?m)^.*$', line, s), c.source)

def notebooks():
    "All notebooks by number; a folder stands where its first one does, what has no number comes last"
    files = nbglob(as_path=True)
    num = {p: int(m[0]) if (m := re.match(r'\d+', p.name)) else 1000 for p in files}
    first = {p.parent: min(num[o] for o in files if o.parent == p.parent) for p in files}
    return sorted(files, key=lambda p: (first[p.parent], p.parent, num[p], p.name))

def contents(pages):
    "The sidebar: a part for each folder"
    parts = {}
    for p in pages: parts.setdefault(p.rpartition('/')[0].replace('_', ' ').capitalize() or 'Foundations', []).append(p)
    return '\n\n'.join('\n'.join(['```{toctree}', ':hidden:', f':caption: {k}', '', *v, '```']) for k, v in parts.items())

def main(out):
    os.environ.update(IN_TEST='1', PATH=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    with ProcessPoolExecutor(mp_context=get_context('spawn'), max_tasks_per_child=1) as pool: # one for each notebook
        try: nbs = {page(nb.path_): nb for nb in pool.map(convert, notebooks())}
        except CellFailed as e: pool.shutdown(cancel_futures=True); sys.exit(f'{e}')
    nbs['index'].cells.append(mk_cell(contents([p for p in nbs if p != 'index']), 'markdown', id='contents'))
    symbols = {}
    for p, nb in nbs.items():
        for s in nb.symbols_: symbols.setdefault(s, []).append(p)
    copytree(cfg.nbs_path, out, ignore=ignore_patterns('*.ipynb', '.*', '_*'), dirs_exist_ok=True) # pictures
    for p, nb in nbs.items():
        link_symbols(nb, symbols)
        (out/f'{p}.ipynb').write_text(nb2str(nb), encoding='utf-8')
    for old in set(out.rglob('*.ipynb')) - {out/f'{p}.ipynb' for p in nbs}: old.unlink() # pages whose notebook is gone

if __name__ == '__main__': main(Path(sys.argv[1]).resolve())
