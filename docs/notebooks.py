"Turn stored notebooks into what readers of the site and of the README see; run none."
import ast
import re

import nbformat
from bs4 import BeautifulSoup
from fastcore.nbio import nb2str, read_nb
from nbdev.process import NBProcessor
from nbdev.processors import (
    clean_magics, filter_stream_, hide_, hide_line, rm_header_dash, strip_ansi)
from nbdev.showdoc import showdoc_nm

STEPS = [strip_ansi, hide_line, filter_stream_, rm_header_dash, clean_magics, hide_]
TAGS = {  # of MyST-NB and nbconvert, for Quarto's directives
    ('echo', 'false'): 'remove-input', ('output', 'false'): 'remove-output',
    ('code-fold', ''): 'hide-input'}
KINDS = {ast.FunctionDef: 'function', ast.ClassDef: 'class'}


def cells(path, text, steps=()):
    "Yield (cell, directives) for what is shown; `text` converts Markdown"
    nb = read_nb(path)
    for cell in nb.cells:  # a directive may go on in the next line, indented
        cell.source = re.sub(r'\n#\| {2,}', ' ', cell.source)
    processor = NBProcessor(nb=nb, procs=[*STEPS, *steps])
    processor.process()
    directives = [c.directives_ for c in processor.nb.cells]
    for cell in processor.nb.cells: cell.metadata = {}
    shown = nbformat.reads(nb2str(processor.nb), 4).cells
    for cell, d in zip(shown, directives):
        empty = not cell.source.strip() and not cell.get('outputs')
        if empty or d.get('include') == 'false': continue
        if cell.cell_type == 'markdown': cell.source = text(cell.source)
        if cell.cell_type == 'code':
            cell.metadata.tags = [tag for (k, v), tag in TAGS.items() if d.get(k) == v]
            if d.get('warning') == 'false':
                cell.outputs = [o for o in cell.outputs if o.get('name') != 'stderr']
            for out in cell.outputs: clean(out)
        yield cell, d


def clean(out):
    "Leave one line of a progress bar, and plain rows of an HTML table"
    if 'text' in out: out.text = re.sub(r'[^\n]*\r(?!\n)', '', out.text)
    if 'text/html' not in out.get('data', {}): return
    soup = BeautifulSoup(out.data['text/html'], 'html.parser')
    for o in soup(['style', 'script', 'progress']): o.decompose()
    for o in soup('div'): o.unwrap()
    kept = 'colspan', 'rowspan', 'href', 'src', 'alt', 'width'
    for o in soup(True): o.attrs = {k: v for k, v in o.attrs.items() if k in kept}
    html = re.sub(r'\s*\n\s*', '\n', str(soup))
    out.data['text/html'] = re.sub(r'\n(<t[dh]|</tr)', r'\1', html).strip()


def option(directives, name):
    "Return the text of a directive without quotes, or an empty one"
    return directives.get(name, '').strip('"\'')


def outside_code(convert, md):
    "Apply `convert` to what is not code in `md`"
    parts = re.split(r'(^```.*?^```|`[^`\n]+`)', md, flags=re.M | re.S)
    return ''.join(p if i % 2 else convert(p) for i, p in enumerate(parts))


def with_install(md, links):
    "Replace the line that installs a clone by the one that needs none"
    return md.replace('pip install -e .', links['install']) if links else md


def callouts(convert, md):
    "Replace Quarto's callouts by `convert(kind, title, body)`"
    def replace(m):
        kind, attrs, body = m.groups()
        title = re.search(r'title="([^"]*)"', attrs)
        return convert(kind, title[1] if title else kind.capitalize(), body.strip())
    block = r'^:{3,} *\{\.callout-(\w+)([^}]*)\} *\n(.*?)^:{3,} *$'
    return re.sub(block, replace, md, flags=re.M | re.S)


def definitions(code):
    "Yield name, kind and first line of documentation of what `code` defines in public"
    lines = code.splitlines()
    for o in ast.parse(code).body:
        if type(o) in KINDS:
            found = [(showdoc_nm(o), KINDS[type(o)], ast.get_docstring(o) or '')]
        elif isinstance(o, (ast.Assign, ast.AnnAssign)):
            above = lines[o.lineno - 2] if o.lineno > 1 else ''
            about = lines[o.lineno - 1].partition('  # ')[2] or above.partition('# ')[2]
            targets = getattr(o, 'targets', None) or [o.target]
            found = [(t.id, 'data', about) for n in targets for t in ast.walk(n)
                     if isinstance(t, ast.Name)]
        else: found = []
        for name, kind, about in found:
            public = isinstance(name, str) and '.' not in name and name[0] != '_'
            if public: yield name, kind, about.partition('\n')[0]


def exports(path):
    "Return the name of the module that a notebook makes, and the code it exports"
    code = [c for c in read_nb(path).cells if c.cell_type == 'code']
    named = [c.directives.get('default_exp') for c in code]
    module = next(filter(None, named), None)
    exported = [c.source for c in code if 'export' in c.directives]
    return module and f'sgdrop.{module}', exported
