"""Sphinx builds the site from what prepare.py wrote; its pages need no network."""
import json
from pathlib import Path
from subprocess import PIPE, Popen

from docutils.nodes import SkipNode
from sphinx.errors import ExtensionError
from sphinx.util.math import get_node_equation_number

project = html_title = 'xlstm-metal'
extensions = ['myst_nb', 'sphinx_copybutton']

nb_execution_mode = 'off' # prepare.py ran the notebooks
nb_merge_streams = True
nb_render_markdown_format = 'myst'
nb_ipywidgets_js = {} # pages show pictures of widgets, not live ones
myst_enable_extensions = ['dollarmath', 'amsmath', 'colon_fence', 'attrs_block', 'html_image']
myst_heading_anchors = 3
suppress_warnings = ['myst.header'] # a symbol's heading is at level 3 wherever it stands

html_theme = 'furo'
html_static_path = ['static']
html_css_files = ['nb.css']
html_copy_source = html_show_copyright = False
html_show_search_summary = False # a summary is fetched, which a browser refuses for local files
pygments_style, pygments_dark_style = 'friendly', 'github-dark'
copybutton_selector = ':not(.output) > div.highlight > pre'

katex = Path(__file__).parent.parent/'build/npm/node_modules/katex/dist'
if katex.is_dir(): # else MathJax renders in the reader's browser, from the network
    html_css_files.insert(0, 'katex.min.css')
    html_static_path.append(str(katex))
    exclude_patterns = [f'**/{o}' for o in 'contrib *.js *.mjs katex.css README.md *.ttf *.woff'.split()] # css and woff2 will do

js = '''const katex = require(process.argv[1])
function html(args) { try { return [katex.renderToString(...args), null] } catch (e) { return [null, e.message] } }
require('readline').createInterface({input: process.stdin}).on('line', l => console.log(JSON.stringify(html(JSON.parse(l)))))'''
node = [] # one process renders all formulas; it ends when our end of its input closes

def render(self, tex, display=False):
    "HTML of a formula; one that KaTeX cannot read stops the build"
    if not node: node.append(Popen(['node', '-e', js, str(katex/'katex.js')], stdin=PIPE, stdout=PIPE, text=True, encoding='utf-8'))
    print(json.dumps([tex, {'displayMode': display}]), file=node[0].stdin, flush=True)
    html, error = json.loads(node[0].stdout.readline())
    if error: raise ExtensionError(f'{self.builder.current_docname}: {error}')
    return html

def inline(self, formula):
    self.body.append(f'<span class="math">{render(self, formula.astext())}</span>')
    raise SkipNode

def block(self, formula):
    self.body.append(self.starttag(formula, 'div', CLASS='math'))
    if formula['number']:
        self.body.append(f'<span class="eqno">({get_node_equation_number(self, formula)})')
        self.add_permalink_ref(formula, 'Link to this equation')
        self.body.append('</span>')
    self.body.append(render(self, formula.astext(), display=True) + '</div>')
    raise SkipNode

def setup(app):
    if katex.is_dir(): app.add_html_math_renderer('katex', (inline, None), (block, None))
