"""`readme.py` writes README.md from nbs/index.ipynb, with the outputs that are recorded there."""
import re
from posixpath import normpath

from nbdev.config import get_config
from nbdev.process import NBProcessor
from nbdev.processors import clean_magics, hide_, hide_line, rm_export, strip_ansi

cfg = get_config()

def block(text, lang=''): return '\n'.join([f'```{lang}', text.strip('\n'), '```'])

def markdown(text):
    "The subtitle as plain text, callouts as GitHub's, links relative to the repository's root"
    def link(m): return f'{m[1]}({normpath(f"{cfg.nbs_path.name}/{m[2]}")}'
    def callout(m):
        title = f'**{m[2]}**\n\n' if m[2] else ''
        return re.sub('(?m)^(?=.)', '> ', f'[!{m[1].upper()}]\n{title}{m[3]}').replace('\n\n', '\n>\n')
    text = re.sub(r'\A# .*\n+(>.*\n?)+', lambda m: re.sub('(?m)^> ?', '', m[0]), text)
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
        data = o.get('data', {})
        if 'text/markdown' in data: yield ''.join(data['text/markdown'])
        elif o.get('name') == 'stdout': yield block(''.join(o.text))
        elif 'text/plain' in data and 'image/png' not in data: yield block(''.join(data['text/plain']))

def main():
    nb = NBProcessor(cfg.nbs_path/'index.ipynb', [strip_ansi, hide_line, hide_, rm_export, clean_magics], process=True).nb
    parts = []
    for c in nb.cells: parts += [markdown(c.source)] if c.cell_type == 'markdown' else code(c)
    (cfg.config_path/'README.md').write_text('\n\n'.join(parts) + '\n', encoding='utf-8')

if __name__ == '__main__': main()
