"""Sphinx builds the site from what prepare.py wrote; the pages need no network."""
from pathlib import Path

project = html_title = 'xlstm-metal'
html_show_copyright = False
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
html_copy_source = False
html_show_search_summary = False # a summary is fetched, which a browser refuses for local files
pygments_style, pygments_dark_style = 'friendly', 'native'
copybutton_selector = ':not(.output) > div.highlight > pre'

katex = Path(__file__).parent.parent/'build/npm/node_modules/katex/dist'
if katex.is_dir(): # maths becomes HTML here; otherwise MathJax renders it in the reader's browser, from the network
    import sphinxcontrib.katex as renderer
    renderer.KaTeXServer.start_server_process = renderer.KaTeXServer.start_network_socket # which waits until node listens
    renderer.STARTUP_TIMEOUT = renderer.RENDER_TIMEOUT = 60
    renderer.KATEX_DEFAULT_OPTIONS['throwOnError'] = True # a formula that cannot be read stops the build
    extensions.append('sphinxcontrib.katex')
    katex_prerender, katex_css_path = True, 'katex.min.css'
    html_static_path.append(str(katex))
    exclude_patterns = ['**/contrib', '**/*.js', '**/*.mjs', '**/katex.css', '**/README.md', '**/*.ttf', '**/*.woff'] # of KaTeX, not needed
