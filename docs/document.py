"""`document.py` copies the comments beside arguments into docstrings of the exported package, where `help` finds them.

Notebooks document a signature as nbdev reads it: `x: mx.array, # (B, S, D)` an argument, or several on one line;
`) -> tuple: # h, new state` what is returned. In a signature of one line the comment is about what is returned, or where
no type is given the last argument, unless it says otherwise: `# x: (B, S); w: (V, D)`, `# (B, S) -> (B, S, V)`,
`# x: (B, S); returns (B, S, V)`. Behind a whole signature, "as for `f`" copies what `f` says of the same arguments, and
"as for `Class`" what its method of the same name says; what is different follows: "as for `f`; y: (B, S)".
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

def referred(names, method, text, known):
    "Arguments and result as for another function, and what a comment says otherwise"
    target, _, rest = text.removeprefix('as for ').partition('; ')
    docs, result = known.get(f'{target.strip("`")}.{method}') or known.get(target.strip('`')) or ([], '')
    own = described(names, rest) if rest else []
    if len(own) == 1 and own[0] == (names, rest): own, result = [], rest # about what is returned
    said = {n: text for group, text in [*docs, *own] for n in group}
    rest = [n for n in names if n not in said]
    return [([n], said[n]) for n in names if n in said] + [(rest, text)] * bool(rest), result

def one_line(names, text, returns):
    "Arguments and result from the comment of a signature that is one line"
    text, verb, result = re.match('(.*?)(?:; (returns|yields) (.*))?$', text).groups('')
    if verb == 'yields': result = f'yields {result}'
    if (docs := described(names, text)) != [(names, text)]: return docs, result
    if names and (m := re.match(r'(?:(\w+) )?(\(.*) -> (.*)', text)):
        return [([m[1]] if m[1] in names else names[:1], m[2])], m[3]
    return ([], text) if returns or not names or text.startswith('yields ') else ([(names[-1:], text)], '')

def signature(node, end, comments, known={}):
    "What comments say of the arguments of a function, and of what it returns"
    args, last = arguments(node), comments.get(end, '') if node.body[0].lineno > end else '' # not about the body
    if last.startswith('as for ') and args: return referred([n for _, n in args], node.name, last, known)
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

def parse(source):
    "Tree, tokens, and line -> comment"
    tokens = list(generate_tokens(StringIO(source).readline))
    return ast.parse(source), tokens, {t.start[0]: t.string.lstrip('# ') for t in tokens if t.type == COMMENT}

def collect(*sources):
    "What modules say of the arguments and results of functions, methods, and of classes, which stand for their constructors"
    known = {}
    for tree, tokens, comments in map(parse, sources):
        for node in tree.body:
            for o in node.body if isinstance(node, ast.ClassDef) else [node]:
                if isinstance(o, Function):
                    name = o.name if o is node else node.name if o.name == '__init__' else f'{node.name}.{o.name}'
                    known[name] = signature(o, colon(tokens, o)[0], comments)
    return known

def document(source, known={}):
    "The text of a module, with longer docstrings for what is public in it"
    (tree, tokens, comments), lines, todo = parse(source), source.split('\n'), []
    def visit(body):
        for node in body:
            if not isinstance(node, Function | ast.ClassDef) or private(node.name): continue
            docs, fields, result = [], [], ''
            if isinstance(node, ast.ClassDef):
                for o in node.body:
                    if isinstance(o, Function) and o.name == '__init__': docs = signature(o, colon(tokens, o)[0], comments, known)[0]
                    if isinstance(o, ast.AnnAssign) and (c := comments.get(o.end_lineno)): fields.append(([o.target.id], c))
                visit(node.body)
            else: docs, result = signature(node, colon(tokens, node)[0], comments, known)
            plain = any('property' in ast.unparse(d) for d in node.decorator_list) or not (getattr(node, 'returns', None) or docs)
            if plain and result and not result.startswith('yields '): below = ['', result]
            else: below = sections(docs, fields, result)
            there = [line.strip() for line in (ast.get_docstring(node) or '').splitlines()]
            if below and below[-1].strip() not in there: todo.append((node, colon(tokens, node), below))
    visit(tree.body)
    for node, at, below in sorted(todo, key=lambda t: t[1], reverse=True): lines = docstring(lines, node, at, below)
    return '\n'.join(lines)

def main():
    paths = [p for p in sorted(get_config().lib_path.rglob('*.py')) if p.name not in ('__init__.py', '__main__.py', '_modidx.py')]
    sources = {p: p.read_text(encoding='utf-8') for p in paths}
    known = collect(*sources.values())
    for p, source in sources.items(): p.write_text(document(source, known), encoding='utf-8')

if __name__ == '__main__': main()
