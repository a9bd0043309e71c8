"Notebooks become pages, and the built site works in a browser without a network."
import functools
import http.server
import os
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from urllib.parse import unquote, urldefrag, urljoin, urlparse

import nbformat
import pytest
from bs4 import BeautifulSoup
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from site_tools import (
    HTML, ROOT, addresses, out_of_date, readme, settings, website)

CHROMIUM = os.environ.get('CHROMIUM') or shutil.which('chromium') \
    or shutil.which('google-chrome')
FLAGS = ('--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-sync '
         '--disable-background-networking --disable-component-update').split()


@pytest.fixture
def page(tmp_path, monkeypatch):
    "A function from cells to those of their page: text, or (code, *outputs)"
    monkeypatch.setattr(website, 'NBS', tmp_path)
    def make(*cells):
        made = [new_markdown_cell('# Masks\n\n> What is `dropped`.')]
        made += [new_markdown_cell(c) if isinstance(c, str)
                 else new_code_cell(c[0], outputs=list(c[1:])) for c in cells]
        path = tmp_path / 'howto' / '01_masks.ipynb'
        path.parent.mkdir(exist_ok=True)
        nbformat.write(new_notebook(cells=made), path)
        title, *rest = website.page(path, {}).cells
        start = '# Masks\n\n{.lead}\nWhat is `dropped`.\n\n{.run}\n'
        assert title.source.startswith(start)
        assert 'make nbs NB=nbs/howto/01_masks.ipynb' in title.source
        return rest
    return make


def printed(text, name='stdout'): return new_output('stream', name=name, text=text)


def test_directives(page):
    hidden = '#| hide\n1', '#| include: false\n1', '#| default_exp mask'
    assert page(*((code,) for code in hidden)) == []
    cells = page(('#| echo: false\n1', printed('1')), ('#| output: false\n1',),
                 ('#| code-fold: true\n1',), ('#| code-fold: false\n1',))
    assert [c.metadata.tags for c in cells] == [
        ['remove-input'], ['remove-output'], ['hide-input'], []]
    assert {c.source for c in cells} == {'1'}
    cell, = page(('#| warning: false\nf()', printed('careful', 'stderr'),
                  printed('1%\r100%\ndone')))
    assert [o.text for o in cell.outputs] == ['100%\ndone']


def test_figures_have_alternative_text_and_caption(page):
    image = new_output('display_data', {'image/png': 'aGk='})
    alt = '#| fig-alt: "What is seen: a line."\n'
    with_caption, without = page((f'{alt}#| fig-cap: A *caption*.\nplot()', image),
                                 (f'{alt}plot()', image))
    assert with_caption.metadata.mystnb == dict(
        image=dict(alt='What is seen: a line.'), figure=dict(caption='A *caption*.'))
    assert without.metadata.mystnb == dict(image=dict(alt='What is seen: a line.'))


def test_exported_code_is_shown_where_links_to_its_names_lead(page):
    imports, target, code = page(
        ('#| default_exp runs.mask',), ('#| export\nimport torch',),
        ('#| export\ndef fill(z): raise Exception\ndef _part(z): pass',))
    assert imports.metadata.tags == ['hide-input'] and code.metadata.tags == []
    directive = '{py:function} sgdrop.runs.mask.fill\n:no-typesetting:\n'
    assert target.source == f'```{directive}```'
    assert code.source.startswith('def fill')


@pytest.mark.parametrize('md, want', [
    ('::: {.callout-note title="Deviations"}\nText.\n\n- one\n:::\n',
     ':::::{admonition} Deviations\n:class: note\n\nText.\n\n- one\n:::::\n'),
    ('See [it](../../CONTRIBUTING.md) and [a](01_a.ipynb).',
     'See [it](/contributing.md) and [a](01_a.ipynb).'),
    ('[`rows`](/experiments/runner.html#rows) and [`SGDrop.step`](/dropout.html#x)',
     '`rows` and {py:obj}`SGDrop.step <sgdrop.dropout.SGDrop>`')])
def test_markdown_of_the_site(md, want): assert website.prose(md) == want


def test_a_drawing_is_in_the_page_itself():
    text = website.prose('A step:\n\n![One step.](../images/method.svg)')
    assert text.startswith('A step:\n\n```{raw} html\n<svg ')
    drawing = BeautifulSoup(text, 'html.parser').svg
    assert drawing.title.text and len(drawing.desc.text) > 100
    targets = {o['href'] for o in drawing.find_all('use')}
    assert targets <= {f'#{o["id"]}' for o in drawing.find_all(id=True)}


def test_data_of_a_figure_follows_its_picture(page):
    cell, data = page(('#| touch: rho\nplot_rho()',))
    assert cell.source == 'plot_rho()'
    assert data.source.startswith('```{raw} html\n<script type="application/json"')
    assert len(data.source) < 300_000


@pytest.mark.parametrize('md, want', [
    ('::: {.callout-note title="Deviations"}\nText.\n\n- one\n:::\n',
     '> **Deviations**\n>\n> Text.\n>\n> - one\n'),
    ('[a](howto/01_a.ipynb#b), [c](../LICENSE), [d](https://e.f), `[g](h)`',
     '[a](nbs/howto/01_a.ipynb#b), [c](LICENSE), [d](https://e.f), `[g](h)`')])
def test_markdown_of_the_readme(md, want): assert readme.prose(md) == want


README = (ROOT / 'README.md').read_text(encoding='utf-8')


def test_the_readme_is_the_home_notebook():
    text, pictures = readme.render(addresses(settings()['repository']))
    assert text == README, 'run make readme'
    for path, data in pictures.items():
        assert data == (ROOT / path).read_bytes(), f'{path} is old: run make readme'


SOMEWHERE = 'https://github.com/someone/sgdrop'
MADE = {*addresses(SOMEWHERE).values()} - {addresses(SOMEWHERE)['colab']}


def test_the_repository_s_address_makes_the_links_of_the_readme():
    text, _ = readme.render(addresses(SOMEWHERE))
    for name in 'tests', 'site', 'install': assert addresses(SOMEWHERE)[name] in text
    assert '.ipynb)' not in text and not any(link in README for link in MADE)
    with pytest.raises(ValueError, match='expected https://github.com/OWNER/NAME'):
        addresses('github.com/someone/sgdrop')


def test_the_repository_s_address_makes_the_links_of_the_site(tmp_path):
    left_out = '0[02-9]*,1*,experiments,explanation,howto,results,tutorials'
    command = [sys.executable, '-m', 'sphinx', '-Q', '-c', ROOT / 'docs', '-d',
               tmp_path / 'trees', '-D', f'exclude_patterns={left_out}', ROOT / 'nbs']
    subprocess.run([*command, tmp_path / 'html'], check=True,
                   env=os.environ | dict(REPOSITORY=SOMEWHERE))
    def made(page): return (tmp_path / 'html' / page).read_text(encoding='utf-8')
    links = addresses(SOMEWHERE)
    for link in (links['colab'] + '01_mask.ipynb', links['releases'],
                 f'href="{SOMEWHERE}"', f'{SOMEWHERE}/edit/main/nbs/01_mask.ipynb'):
        assert link in made('01_mask.html')
    for page in '01_mask.html', 'index.html':
        text = BeautifulSoup(made(page), 'html.parser').get_text()
        assert links['install'] in text
    assert f'content="{links["site"]}' in made('index.html')


def test_citations_agree():
    files = [(ROOT / p).read_text(encoding='utf-8')
             for p in ('CITATION.cff', 'docs/references.bib')]
    cff, bib = [re.sub(r'[{}"]', '', text) for text in files]
    bib = ' '.join(bib.split())
    for fact in 'title: (The Overfocusing.*)', r'year: (\d+)', 'url: (https://arxiv.*)':
        assert re.search(fact, cff)[1] in bib


# The built site

built = pytest.mark.skipif(bool(out_of_date()), reason=out_of_date() or '')
PAGES = sorted(p.relative_to(HTML).as_posix() for p in HTML.rglob('*.html')
               if '_static' not in p.parts)


@functools.cache
def soup(page):
    return BeautifulSoup((HTML / page).read_text(encoding='utf-8'), 'html.parser')


@functools.cache
def anchors(page): return {o['id'] for o in soup(page).find_all(id=True)} | {'', 'top'}


def broken_links(page):
    "Yield the links of a page to what the site does not have"
    for tag, attr in dict(a='href', link='href', img='src', script='src').items():
        for o in soup(page).find_all(tag, attrs={attr: True}):
            url, anchor = urldefrag(urljoin(f'http://site/{page}', o[attr]))
            if not url.startswith('http://site'): continue
            path = unquote(urlparse(url).path).lstrip('/') or 'index.html'
            is_page = path.endswith('.html')
            if (not (HTML / path).is_file()
                    or is_page and unquote(anchor) not in anchors(path)): yield o[attr]


@built
def test_links_resolve():
    wrong = {page: bad for page in PAGES if (bad := list(broken_links(page)))}
    assert not wrong


@built
def test_figures_on_pages_have_alternative_text():
    silent = {page: o['src'] for page in PAGES for o in soup(page).select('article img')
              if len(o.get('alt', '')) < 10}
    assert not silent


@pytest.fixture(scope='module')
def server():
    "The site's address"
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args): pass
    handler = functools.partial(Quiet, directory=HTML)
    with http.server.ThreadingHTTPServer(('127.0.0.1', 0), handler) as served:
        threading.Thread(target=served.serve_forever, daemon=True).start()
        yield f'http://127.0.0.1:{served.server_port}/'
        served.shutdown()


@pytest.fixture(scope='module')
def tab(server):
    "A browser's tab; `.trouble` lists errors and requests to other hosts"
    playwright = pytest.importorskip('playwright.sync_api')
    with playwright.sync_playwright() as p:
        path = CHROMIUM or p.chromium.executable_path
        if not Path(path).exists():
            pytest.skip('no Chromium: playwright install chromium')
        with p.chromium.launch(executable_path=path, args=FLAGS) as browser:
            tab, trouble = browser.new_page(), []
            here = server, 'data:', 'blob:'
            tab.on('console', lambda m: m.type == 'error' and trouble.append(m.text))
            tab.on('pageerror', lambda e: trouble.append(str(e)))
            tab.on('request', lambda r: r.url.startswith(here) or trouble.append(r.url))
            tab.trouble = trouble
            yield tab


SHOWN = '''() => {
    const text = o => {
        o = o.cloneNode(true)
        o.querySelectorAll('code').forEach(c => c.remove())
        return o.textContent
    }
    const all = (selector) => [...document.querySelectorAll(selector)]
    return {
        prose: all('article p, article li').map(text),
        formulas: all('math').map(o => [text(o), o.getBoundingClientRect().width]),
        width: document.documentElement.scrollWidth,
    }
}'''


@built
def test_pages_on_a_phone(tab, server):
    tab.set_viewport_size(dict(width=390, height=844))
    wrong = {}
    for page in PAGES:
        tab.trouble.clear()
        tab.goto(server + page, wait_until='load')
        shown, found = tab.evaluate(SHOWN), [*tab.trouble]
        if shown['width'] > 390: found.append(f'{shown["width"]} pixels wide')
        found += [f for f, width in shown['formulas'] if not width or '\\' in f]
        found += [p for p in shown['prose'] if re.search(r'\$[^$]+\$|:::|\{\.', p)]
        if found: wrong[page] = found
    assert not wrong


STATE = "o => [o.innerText, o.querySelector('.view').innerHTML + " \
    "[...o.querySelectorAll('canvas')].map(c => c.toDataURL())]"


@pytest.mark.parametrize('name, controls', [
    ('rho', ['select', 'select', 'input']), ('cover', ['select', '.cover']),
    ('training', ['select', 'input', 'button'])])
def test_figures_react_to_keys(name, controls, tab):
    "Each control changes the text and the picture, on a phone, without a network"
    keys = dict(select='End', input='ArrowLeft', button='Enter')
    tab.set_viewport_size(dict(width=390, height=844))
    tab.trouble.clear()
    data = BeautifulSoup(website.data_of(name).source, 'html.parser').script
    tab.set_content(f'<div class="cell_output"><img alt="still"></div>{data}')
    tab.add_style_tag(path=ROOT / 'docs/_static/touch.css')
    tab.add_script_tag(path=ROOT / 'docs/_static/touch.js')
    figure = tab.locator('div.touch')
    found = figure.locator(':is(select, input, button)')
    assert found.count() == len(controls) and not tab.locator('[alt=still]').count()
    for i, control in enumerate(controls):
        before = figure.evaluate(STATE)
        for _ in range(9 if control == '.cover' else 1):  # percents are whole
            found.nth(i).press(keys.get(control, 'ArrowDown'))
        tab.wait_for_timeout(500 if control == 'button' else 0)
        after = figure.evaluate(STATE)
        assert [a != b for a, b in zip(before, after)] == [True, True], control
    assert tab.evaluate('document.documentElement.scrollWidth') == 390
    assert not tab.trouble


@built
def test_pages_on_a_desktop(tab, server):
    "Code fits its column, and a page with all it loads has at most 1.5 MB"
    tab.set_viewport_size(dict(width=1280, height=900))
    wrong = {}
    for page in PAGES:
        tab.goto(server + page, wait_until='load')
        wide, weight = tab.evaluate("""() => [
            [...document.querySelectorAll('pre')]
                .filter(o => o.scrollWidth > o.clientWidth).map(o => o.textContent),
            performance.getEntries().reduce((n, o) => n + (o.decodedBodySize || 0), 0)
        ]""")
        found = [code[:60] for code in wide]
        if weight > 1.5e6: found.append(f'{weight / 1e6:.1f} MB')
        if found: wrong[page] = found
    assert not wrong


@built
def test_the_home_page_begins_with_a_picture(tab, server):
    tab.set_viewport_size(dict(width=1280, height=900))
    tab.goto(server, wait_until='load')
    top = 'document.querySelector("article img").getBoundingClientRect().top'
    assert tab.evaluate(top) < 500 and len(PAGES) <= 45


@built
@pytest.mark.parametrize('word', ['install', 'dropout', 'shortcut', 'background'])
def test_search_finds(word, tab, server):
    tab.goto(f'{server}search.html?q={word}')
    tab.wait_for_selector('#search-results li a')


@built
def test_terms_lead_to_the_glossary():
    term = soup('05_dropout.html').select_one('article a.term')
    url, anchor = urldefrag(term['href'])
    entry = soup(url).find(id=anchor)
    about = entry.find_next('dd').text
    assert entry.name == 'dt' and term['title'].split('.')[0] in about


@built
def test_search_leads_to_a_name_s_code(tab, server):
    tab.goto(f'{server}search.html?q=SGDropCallback')
    tab.wait_for_selector('#search-results li a')
    links = '#search-results li a'
    found = tab.eval_on_selector_all(links, 'found => found.map(o => o.href)')
    assert f'{server}06_callback.html#sgdrop.callback.SGDropCallback' in found
