"Notebooks as pages of the site: conf.py connects `read`."
import ast
import json
import re
from functools import partial
from pathlib import Path

import nbformat
from nbdev.processors import add_links
from nbformat.v4 import new_markdown_cell, new_notebook

from notebooks import (
    callouts, cells, definitions, exports, option, outside_code, with_install)

DOCS = Path(__file__).resolve().parent
ROOT, NBS = DOCS.parent, DOCS.parent/'nbs'
HTML = '```{{raw}} html\n{}\n```'


def read(app, docname, source, links):
    "Give Sphinx a page's text"
    path = Path(app.env.doc2path(docname))
    if path.suffix == '.ipynb': source[0] = nbformat.writes(page(path, links), 4)


def page(path, links):
    "Return the notebook at `path` as MyST-NB wants it, with the project's addresses"
    made, module = [], exports(path)[0]
    for cell, directives in cells(path, prose, [add_links]):
        if cell.cell_type == 'markdown':
            cell.source = with_install(one_page(cell.source, path), links)
        if cell.cell_type == 'code':
            if 'export' in directives: made += targets(module, cell)
            figure(cell, directives)
        made.append(cell)
        if 'touch' in directives: made.append(data_of(directives['touch']))
    made[0].source = opening(made[0].source, path, links)
    if path == NBS/'index.ipynb':
        below = next(i for i, c in enumerate(made) if c.source[:3] == '## ')
        made.insert(below, new_markdown_cell(home(links)))
    kernel = dict(name='python3', display_name='Python 3', language='python')
    return new_notebook(cells=made, metadata=dict(kernelspec=kernel))


def home(links):
    "Return the buttons and the contents of the site"
    text = (DOCS/'home.md').read_text(encoding='utf-8')
    if links: return text.replace('REPOSITORY', links['repository'])
    return re.sub(r'```{button-link} REPOSITORY\n.*?```\n', '', text, flags=re.S)


def targets(module, cell):
    "Make an exported cell's names places that links, search and index lead to"
    imports = ast.Import, ast.ImportFrom
    if all(isinstance(o, imports) for o in ast.parse(cell.source).body):
        cell.metadata.tags.append('hide-input')
        prompts = dict.fromkeys(['code_prompt_show', 'code_prompt_hide'], 'Imports')
        cell.metadata.mystnb = prompts
    target = '```{{py:{}}} {}.{}\n:no-typesetting:\n```'
    named = [target.format(kind, module, name)
             for name, kind, _ in definitions(cell.source)]
    return [new_markdown_cell('\n\n'.join(named))] if named else []


def figure(cell, directives):
    "Give a cell's image its alternative text and caption"
    alt, caption = option(directives, 'fig-alt'), option(directives, 'fig-cap')
    if alt or caption: cell.metadata.mystnb = dict(image=dict(alt=alt or caption))
    if caption: cell.metadata.mystnb['figure'] = dict(caption=caption)


def data_of(name):
    "Return the data of an interactive figure, which touch.js makes of a cell's image"
    table = ROOT/'sgdrop/experiments/results/touch.jsonl'
    rows = [json.loads(line) for line in table.read_text(encoding='utf-8').splitlines()]
    data = {key: rows[0][key] for key in ('classes', 'photographs')}
    data['rows'] = [row[name] for row in rows]
    text = json.dumps(data, separators=(',', ':'))
    return new_markdown_cell(HTML.format(
        f'<script type="application/json" class="touch" data-figure="{name}">{text}'
        '</script>'))


def opening(md, path, links):
    "Set a page's promise in larger type, and offer the notebook"
    name = path.relative_to(NBS).as_posix()
    run = (f'\n\n{{.run}}\n{{download}}`Download this notebook <{path.name}>` and open '
           f'it in Jupyter, or run `make nbs NB=nbs/{name}` in a clone.')
    if links: run += (f' Or [open it in Colab]({links["colab"]}{name}) and run '
                      f'`%{links["install"]}` first.')
    below = '' if name == 'index.ipynb' else run
    front = re.compile(r'(# .*)\n+> (.*)')
    return front.sub(lambda m: f'{m[1]}\n\n{{.lead}}\n{m[2]}{below}', md, count=1)


def one_page(md, path):
    "Lead links to any experiment to their one page, where each is a download"
    if path.parent.name == 'experiments':
        return re.sub(r'\[([^]]+)\]\((0\d_\w+\.ipynb)\)', r'{download}`\1 <\2>`', md)
    return re.sub(r'(experiments/)0\d_\w+\.ipynb(#[\w-]+)?', r'\g<1>07_main.ipynb', md)


def prose(md):
    "Convert Markdown as nbdev leaves it for Quarto to MyST"
    box = ':::::{{admonition}} {1}\n:class: {0}\n\n{2}\n:::::'.format
    pages = r'(?<=\]\()(?:\.\./)+(CONTRIBUTING|CHANGELOG)\.md'
    to_page = partial(re.sub, pages, lambda m: f'/{m[1].lower()}.md')
    md = outside_code(to_page, callouts(box, md))
    link = re.compile(r'\[`([^`]+)`\]\(/([\w/]+)\.html#[^)]*\)')  # by add_links
    def to_name(m):
        module, name = m[2].replace('/', '.'), m[1].removesuffix('()').split('.')[0]
        if module.startswith('experiments.'): return f'`{m[1]}`'
        return f'{{py:obj}}`{m[1]} <sgdrop.{module}.{name}>`'
    return outside_code(inline_drawings, link.sub(to_name, md))


def inline_drawings(md):
    "Put drawings into the page itself, where they follow its colours and width"
    def text(m): return (ROOT/'nbs/images'/m[1]).read_text(encoding='utf-8').strip()
    image = r'^!\[[^]]*\]\((?:\.\./)*images/(\w+\.svg)\)$'
    return re.sub(image, lambda m: HTML.format(text(m)), md, flags=re.M)
