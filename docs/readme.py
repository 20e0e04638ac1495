"""`readme.py` writes README.md from nbs/index.ipynb, with the outputs that are recorded there."""
import re
from posixpath import normpath

from nbdev.config import get_config
from nbdev.process import NBProcessor
from nbdev.processors import clean_magics, hide_, hide_line, rm_export, strip_ansi

cfg = get_config()

def block(text, lang=''): return f'```{lang}\n{text.strip()}\n```'

def markdown(text):
    "The subtitle as plain text, callouts as GitHub's, links relative to the repository's root"
    def link(m): return f'{m[1]}({normpath(f"{cfg.nbs_path.name}/{m[2]}")}'
    def callout(m): return '\n'.join(f'> {l}'.rstrip() for l in [f'[!{m[1].upper()}]', *([f'**{m[2]}**', ''] if m[2] else []), *m[3].splitlines()])
    text = re.sub(r'\A(# .*\n+)> ', r'\1', text)
    text = re.sub(r'(?ms)^::: *\{\.callout-(\w+)[^\n]*\}\n+(?:#+ ([^\n]*)\n+)?(.*?)\n:::$', callout, text)
    text = re.sub(r'\$\$ *\{#eq-[\w-]+\}', '$$', text)
    return re.sub(r'(\])\((?![a-z]+:|#)([^)\s#]+)', link, text)

def code(cell):
    "Source and recorded text of a code cell, as its directives want them shown"
    off = {k for k, v in cell.directives_.items() if v == ['false']}
    if 'include:' in off: return
    source = '\n'.join(l for l in cell.source.splitlines() if not l.startswith('#|'))
    if 'echo:' not in off and source.strip(): yield block(source, 'sh' if 'bash' in cell.directives_ else 'python')
    for o in () if 'output:' in off else cell.outputs:
        text = o.text if o.get('name') == 'stdout' else o.get('data', {}).get('text/plain', [])
        if text and not any(k.startswith('image/') for k in o.get('data', {})): yield block(''.join(text))

def main():
    nb = NBProcessor(cfg.nbs_path/'index.ipynb', [strip_ansi, hide_line, hide_, rm_export, clean_magics], process=True).nb
    parts = [p for c in nb.cells for p in ([markdown(c.source)] if c.cell_type == 'markdown' else code(c) if c.cell_type == 'code' else [])]
    (cfg.config_path/'README.md').write_text('\n\n'.join(parts) + '\n', encoding='utf-8')

if __name__ == '__main__': main()
