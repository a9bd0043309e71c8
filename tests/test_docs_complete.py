"Every exported name says what it is, what its arguments are, and is used in its notebook."
import ast
import json
import re

import pytest

from site_tools import ROOT, website

modules = website.modules()
names = [(m, n) for m in modules for n in getattr(m, '__all__', [])]
everything = pytest.mark.parametrize('module,name', names, ids=[f'{m.__name__}.{n}' for m, n in names])


def code_cells(notebook):
    cells = json.loads((ROOT / 'nbs' / notebook).read_text(encoding='utf-8'))['cells']
    return [''.join(c['source']) for c in cells if c['cell_type'] == 'code']


def defines(source, name):
    "Is `name` made in this code?"
    if not re.search(r'^#\| *exports?', source, re.M): return False
    targets = lambda node: [t for t in [*getattr(node, 'targets', []), getattr(node, 'target', None)] if t]
    made = lambda node: {getattr(node, 'name', None), *[o.id for t in targets(node) for o in ast.walk(t) if isinstance(o, ast.Name)]}
    return any(name in made(node) for node in ast.parse(source).body)


@everything
def test_docstring(module, name): assert website.docstring(getattr(module, name), module, name)


@everything
def test_arguments(module, name):
    o = getattr(module, name)
    if website.role(o) == 'data': return
    silent = [k for k, v in website.arguments(o).items() if k != 'return' and not isinstance(v.docment, str)]
    assert not silent, f'no description of {", ".join(silent)}'


@everything
def test_example(module, name):
    cells = [c for c in code_cells(modules[module]) if not defines(c, name)]
    assert any(re.search(rf'\b{name}\b', c) for c in cells), f'no cell of nbs/{modules[module]} uses it'
