"""`document.py` copies the comments beside arguments into docstrings of the exported package, where `help` finds them.

Notebooks document a signature as nbdev reads it: `x: mx.array, # (B, S, D)` an argument, or several on one line;
`) -> tuple: # h, new state` what is returned. In a signature of one line the comment is about what is returned, or where
no type is given the last argument, unless it says otherwise: `# x: (B, S); w: (V, D)`, `# (B, S) -> (B, S, V)`, `# as for Model`.
"""
import ast, re
from io import StringIO
from tokenize import COMMENT, generate_tokens

from nbdev.config import get_config

Function = ast.FunctionDef | ast.AsyncFunctionDef

def private(name): return name.startswith('_') and name != '__call__'

def colon(tokens, node):
    "Where the line with the name of a function or class ends and its body begins"
    depth = 0
    for t in tokens:
        if t.start < (node.lineno, node.col_offset): continue
        depth += (t.string in ('(', '[', '{')) - (t.string in (')', ']', '}'))
        if t.string == ':' and not depth: return t.end

def arguments(node):
    "Line and name of each argument, as one writes it"
    a = node.args
    named = [(o.lineno, o.arg) for o in a.posonlyargs + a.args + a.kwonlyargs]
    starred = [(o.lineno, stars + o.arg) for stars, o in (('*', a.vararg), ('**', a.kwarg)) if o]
    return sorted((o for o in named + starred if o[1] not in ('self', 'cls')), key=lambda o: o[0])

def described(names, text):
    "What a comment says of some arguments: of all, or of those that it names"
    docs = []
    for part in text.split('; '):
        head, _, rest = part.partition(': ')
        if rest and set(head.split(', ')) <= set(names): docs.append((head.split(', '), rest))
        elif docs: docs[-1] = docs[-1][0], f'{docs[-1][1]}; {part}'
        else: return [(names, text)]
    return docs

def one_line(names, text, returns):
    "Arguments and result from the comment of a signature that is one line"
    if text.startswith('as for '): return [(names, text)], ''
    if (docs := described(names, text)) != [(names, text)]: return docs, ''
    if names and (m := re.match(r'(?:(\w+) )?(\(.*) -> (.*)', text)):
        return [([m[1]] if m[1] in names else names[:1], m[2])], m[3]
    return ([], text) if returns or not names or text.startswith('yields ') else ([(names[-1:], text)], '')

def signature(node, end, comments):
    "What comments say of the arguments of a function, and of what it returns"
    args, last = arguments(node), comments.get(end, '') if node.body[0].lineno > end else '' # not about the body
    if node.lineno == end: return one_line([n for _, n in args], last, node.returns) if last else ([], '')
    docs, names = [], []
    for line in range(node.lineno, end):
        names = [n for l, n in args if l == line] or names[-1:] # a long default ends on a later line
        if names and line in comments: docs += described(names, comments[line])
    return docs, last

def sections(docs, fields, result):
    "The lines of a docstring below its summary"
    def named(docs): return [f"    {', '.join(names)}: {text}" for names, text in docs]
    title = 'Yields' if result.startswith('yields ') else 'Returns'
    parts = [('Args', named(docs)), ('Attributes', named(fields)), (title, [f"    {result.removeprefix('yields ')}"] if result else [])]
    return [line for name, lines in parts if lines for line in ('', f'{name}:', *lines)]

def docstring(lines, node, at, below):
    "`lines` with the docstring of a function or class made longer by `below`"
    pad, first = ' ' * (node.col_offset + 4), node.body[0]
    has = ast.get_docstring(node, clean=False) is not None
    prefix, text = '', ''
    if has: prefix, _, text = re.match(r'''(?s)(\w*)("""|"|')(.*)\2$''', ast.get_source_segment('\n'.join(lines), first)).groups()
    if 'r' not in prefix.lower(): below = [line.replace('\\', '\\\\') for line in below]
    if not text and len(below) == 2: new = [pad + '"' + below[1].replace('"', '\\"') + '"']
    else: new = [f'{pad}{prefix}"""{text}', *(line and pad + line for line in below[not text:]), f'{pad}"""']
    line, column = at
    if first.lineno > line: start, stop, body = *((first.lineno - 1, first.end_lineno) if has else (line, line)), []
    else: # a body on the line of the colon moves below the docstring
        new.insert(0, lines[line - 1][:column])
        start, stop, body = line - 1, first.end_lineno if has else line, [] if has else [pad + lines[line - 1][column:].strip()]
    return lines[:start] + new + body + lines[stop:]

def document(source):
    "The text of a module, with longer docstrings for what is public in it"
    tree, lines = ast.parse(source), source.split('\n')
    tokens = list(generate_tokens(StringIO(source).readline))
    comments = {t.start[0]: t.string.lstrip('# ') for t in tokens if t.type == COMMENT}
    todo = []
    def visit(body):
        for node in body:
            if not isinstance(node, Function | ast.ClassDef) or private(node.name): continue
            docs, fields, result = [], [], ''
            if isinstance(node, ast.ClassDef):
                for o in node.body:
                    if isinstance(o, Function) and o.name == '__init__': docs = signature(o, colon(tokens, o)[0], comments)[0]
                    if isinstance(o, ast.AnnAssign) and (c := comments.get(o.end_lineno)): fields.append(([o.target.id], c))
                visit(node.body)
            else: docs, result = signature(node, colon(tokens, node)[0], comments)
            plain = any('property' in ast.unparse(d) for d in node.decorator_list) or not (getattr(node, 'returns', None) or docs)
            if plain and result and not result.startswith('yields '): below = ['', result]
            else: below = sections(docs, fields, result)
            there = [line.strip() for line in (ast.get_docstring(node) or '').splitlines()]
            if below and below[-1].strip() not in there: todo.append((node, colon(tokens, node), below))
    visit(tree.body)
    for node, at, below in sorted(todo, key=lambda t: t[1], reverse=True): lines = docstring(lines, node, at, below)
    return '\n'.join(lines)

def main():
    for path in sorted(get_config().lib_path.rglob('*.py')):
        if path.name in ('__init__.py', '__main__.py', '_modidx.py'): continue
        path.write_text(document(path.read_text(encoding='utf-8')), encoding='utf-8')

if __name__ == '__main__': main()
