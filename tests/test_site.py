"What nbdev leaves for Quarto becomes what Sphinx understands, and the built site works in a browser, offline."
import functools
import http.server
import re
import threading
from pathlib import Path
from urllib.parse import unquote, urldefrag, urljoin, urlparse

import nbformat
import pytest
from bs4 import BeautifulSoup
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from site_tools import FLAGS, HTML, ROOT, browser_path, out_of_date, website

# The processor


@pytest.fixture
def page(tmp_path, monkeypatch):
    "A function from cells to those of the page they make; code is (source, outputs), prose is text"
    monkeypatch.setattr(website, 'NBS', tmp_path)
    def make(*cells, path='01_one.ipynb'):
        made = [new_markdown_cell(c) if isinstance(c, str) else new_code_cell(c[0], outputs=c[1]) for c in cells]
        (tmp_path / path).parent.mkdir(exist_ok=True)
        nbformat.write(new_notebook(cells=made, metadata=dict(kernelspec=dict(name='python3', language='python', display_name='python3'))), tmp_path / path)
        return website.page(tmp_path / path).cells
    return make


def picture(**data): return new_output('display_data', {'image/png': 'aGk=', 'text/plain': '<Figure>'}, metadata={'image/png': {'width': 321, 'height': 123}})
def printed(text): return new_output('stream', text=text)


def test_front_matter_becomes_the_title(page):
    title, text = page('# Masks\n\n> What is `dropped`.', 'Text.')
    assert title.source.startswith('# Masks\n\n{.lead}\nWhat is `dropped`.') and text.source == 'Text.'


def test_offers_the_notebook_and_says_how_to_run_it(page):
    title = page('# One\n> About.', path='tutorials/01_one.ipynb')[0].source
    assert '{download}`' in title and 'make nbs NB=nbs/tutorials/01_one.ipynb' in title
    assert '{download}' not in page('# Home\n> About.', path='index.ipynb')[0].source


@pytest.mark.parametrize('directive,tag', [('echo: false', 'remove-input'), ('output: false', 'remove-output'), ('code-fold: true', 'hide-input')])
def test_directives_become_tags(page, directive, tag):
    cell, = page((f'#| {directive}\n1 + 1', [printed('2')]))
    assert cell.metadata.tags == [tag] and cell.source == '1 + 1'


def test_what_is_not_shown(page):
    assert page(('#| hide\n1', []), ('#| include: false\n1', []), ('#| default_exp mask', [])) == []
    cell, = page(('#| warning: false\nf()', [new_output('stream', name='stderr', text='careful'), printed('1%\r100%\ndone')]))
    assert [o.text for o in cell.outputs] == ['100%\ndone']
    cell, = page(('#| output: asis\nf()', [printed('**bold**')]))
    assert cell.outputs[0].data == {'text/markdown': '**bold**'}


def test_figures(page):
    cell, = page(('#| fig-cap: A *caption*.\n#| fig-alt: "What is seen: a line."\nplot()', [picture()]))
    assert cell.metadata.mystnb == dict(image=dict(alt='What is seen: a line.', width='321px'), figure=dict(caption='A *caption*.'))
    cell, = page(('#| fig-alt: A line.\nplot()', [picture()]))
    assert cell.metadata.mystnb == dict(image=dict(alt='A line.', width='321px'))


@pytest.mark.parametrize('md,want', [
    ('::: {.callout-note title="Deviations"}\nText.\n\n- one\n:::\n', ':::{admonition} Deviations\n:class: note\n\nText.\n\n- one\n:::\n'),
    ('::: {.callout-tip collapse="true"}\n## Look\nText.\n:::\nAfter', ':::{admonition} Look\n:class: tip dropdown\n\nText.\n:::\nAfter'),
    (':::: {.callout-warning}\nText.\n::::', '::::{admonition} Warning\n:class: warning\n\nText.\n::::'),
    ('::: {.border .p-3}\nText.\n:::\n', ':::{div} border p-3\nText.\n:::\n'),
    ('[a](b.html){target="_blank"} [c](https://d.e)', '[a](b.html) [c](https://d.e)'),
    ('as shown [@one2024; @two2025]', 'as shown {cite:p}`one2024,two2025`'),
    ('`[@one2024](../x)`', '`[@one2024](../x)`'),
    ('[`zero_fill`](/mask.html#zero_fill) fills', '{py:obj}`zero_fill <sgdrop.mask.zero_fill>` fills')])
def test_prose(md, want): assert website.prose(md, '') == want


@pytest.mark.parametrize('target,folder,want', [
    ('01_mask.ipynb#a', '', '01_mask.ipynb#a'), ('../index.ipynb', 'tutorials', '../index.ipynb'), ('#here', '', '#here'), ('https://a.b/c', '', 'https://a.b/c'),
    ('../CONTRIBUTING.md', '', 'contributing.md'), ('../../CHANGELOG.md#x', 'tutorials', '../changelog.md#x'), ('../LICENSE', '', '../../../LICENSE'),
    ('../../LICENSE', 'tutorials', '../../../../LICENSE')])
def test_links(target, folder, want): assert website.link(target, folder) == want


def test_links_to_nothing_are_noticed(monkeypatch):
    monkeypatch.setattr(website, 'missing', set())
    website.link('no_such.ipynb', 'tutorials')
    assert website.missing == {'nbs/tutorials: no_such.ipynb'}


def test_show_doc_and_code_without_running(page):
    cells = page('# One\n> About.', ('#| default_exp mask', []), ('#| export\nimport no_such_library', []), '## Fill',
                 ('#| export\ndef zero_fill(z, M): raise Exception', []), ('raise Exception("run")', []))
    _, _, doc, code, example = [c.source for c in cells]
    assert doc.startswith('### zero_fill\n') and '_modules/sgdrop/mask.html#zero_fill"' in doc
    assert 'Put zeros into the holes: z ⊙ M, as in the paper' in doc and '| `z` | `Tensor` | feature map' in doc and '| **Returns** | `Tensor`' in doc
    assert code.startswith('def zero_fill') and 'hide-input' in cells[3].metadata.tags and example.startswith('raise')


def f(
    a: 'int | None' = None,  # what
    b: object = object(),  # a thing
    c=print,  # how | why
) -> str:  # a text
    "Documented"


def test_arguments_table():
    assert website.docments_table(f).splitlines()[2:] == [
        r'| `a` | `int \| None` | `None` | what |', '| `b` | `object` | `...` | a thing |', r'| `c` |  | `print` | how \| why |', '| **Returns** | `str` |  | a text |']
    assert website.signature(f) == '(a=None, b=..., c=print)'


def test_reference_has_every_name():
    pages = website.reference()
    for module in website.modules():
        for name in getattr(module, '__all__', []):
            assert re.search(rf'^`+\{{py:\w+\}} {name}\b', pages[f'api/{module.__name__.split(".")[-1]}.md'], re.M)
            assert f'`{name} <{module.__name__}.{name}>`' in pages['api/index.md']


def test_every_notebook_is_in_the_sidebar():
    notebooks = {p.relative_to(ROOT / 'nbs').as_posix() for p in (ROOT / 'nbs').rglob('[!.]*.ipynb')} - {'index.ipynb'}
    listed = website.toctrees([*notebooks, 'howto/01_a.ipynb', 'explanation/02_b.ipynb']).splitlines()
    assert all(listed.count(n) == 1 for n in [*notebooks, 'howto/01_a.ipynb', 'explanation/02_b.ipynb'])


def test_citations_agree():
    cff, bib = [re.sub(r'[{}"]', '', (ROOT / p).read_text(encoding='utf-8')) for p in ('CITATION.cff', 'docs/references.bib')]
    for fact in (r'title: (The Overfocusing.*)', r'year: (\d+)', r'url: (https://arxiv.*)'): assert re.search(fact, cff)[1] in bib


# The site

built = pytest.mark.skipif(bool(out_of_date()), reason=out_of_date() or 'the site is there')
PAGES = [] if out_of_date() else sorted(p.relative_to(HTML).as_posix() for p in HTML.rglob('*.html') if '_static' not in p.parts)
MEGABYTE = 1_000_000


@functools.lru_cache(None)
def soup(page): return BeautifulSoup((HTML / page).read_text(encoding='utf-8'), 'html.parser')


@functools.lru_cache(None)
def anchors(page): return {o.get('id') for o in soup(page).find_all(id=True)} | {o.get('name') for o in soup(page)('a')} | {'', 'top'}


@built
@pytest.mark.parametrize('page', PAGES)
def test_links_resolve(page):
    wrong = []
    for tag, attr in ('a', 'href'), ('link', 'href'), ('img', 'src'), ('script', 'src'):
        for o in soup(page).find_all(tag, attrs={attr: True}):
            url, anchor = urldefrag(urljoin(f'http://site/{page}', o[attr]))
            if urlparse(url).netloc != 'site' or not url.startswith('http'): continue
            path = unquote(urlparse(url).path).lstrip('/') or 'index.html'
            if not (HTML / path).is_file() or (path.endswith('.html') and unquote(anchor) not in anchors(path)): wrong.append(o[attr])
    assert not wrong


@built
@pytest.mark.parametrize('page', PAGES)
def test_figures_have_alternative_text(page):
    silent = [o['src'] for o in soup(page).select('main img, article img') if len(o.get('alt', '')) < 10]
    assert not silent


@built
def test_every_page_is_in_the_sidebar():
    listed = {urldefrag(urljoin('http://site/', o['href']))[0].removeprefix('http://site/') for o in soup('index.html').select('.sidebar-tree a')}
    own = {p for p in PAGES if not p.startswith('_modules/')} - {'index.html', '404.html', 'genindex.html', 'py-modindex.html', 'search.html'}
    assert own <= listed


@pytest.fixture(scope='module')
def server():
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args): pass
    with http.server.ThreadingHTTPServer(('127.0.0.1', 0), functools.partial(Quiet, directory=HTML)) as served:
        threading.Thread(target=served.serve_forever, daemon=True).start()
        yield f'http://127.0.0.1:{served.server_port}/'
        served.shutdown()


@pytest.fixture(scope='module')
def tab(server):
    "One tab for all tests; `.trouble` has what went wrong since the last visit"
    playwright = pytest.importorskip('playwright.sync_api', reason='playwright is not installed')
    with playwright.sync_playwright() as p:
        path = browser_path() or p.chromium.executable_path
        if not Path(path).exists(): pytest.skip('no Chromium: apt-get install chromium, or playwright install chromium')
        with p.chromium.launch(executable_path=path, args=FLAGS) as browser:
            context = browser.new_context(permissions=['clipboard-read', 'clipboard-write'])
            tab = context.new_page()
            tab.trouble = []
            tab.on('console', lambda m: m.type == 'error' and tab.trouble.append(m.text))
            tab.on('pageerror', lambda e: tab.trouble.append(str(e)))
            tab.on('requestfailed', lambda r: tab.trouble.append(f'failed: {r.url}'))
            tab.on('request', lambda r: r.url.startswith((server, 'data:', 'blob:')) or tab.trouble.append(f'leaves the machine: {r.url}'))
            yield tab


@pytest.fixture
def visit(tab, server):
    "A function that opens a page of the site"
    def go(page):
        tab.trouble.clear()
        tab.set_viewport_size(dict(width=1280, height=900))
        tab.goto(server + page, wait_until='load')
        return tab
    return go


@built
@pytest.mark.parametrize('page', PAGES)
def test_page_in_a_browser(visit, page):
    tab = visit(page)
    assert not tab.trouble
    assert tab.evaluate("[...document.images].filter(o => o.loading != 'lazy' && !o.naturalWidth).map(o => o.src)") == []
    math = tab.evaluate("[...document.querySelectorAll('math')].map(o => [o.textContent, o.getBoundingClientRect().width])")
    assert all(width > 0 and '\\' not in text for text, width in math)
    prose = tab.evaluate("[...document.querySelectorAll('article p, article li')].map(o => { o = o.cloneNode(true); o.querySelectorAll('code').forEach(c => c.remove()); return o.textContent })")
    assert not [p for p in prose if re.search(r'\$[^$]+\$|\\\(|:::|\{\.', p)]
    size = tab.evaluate("[...performance.getEntriesByType('resource'), ...performance.getEntriesByType('navigation')].reduce((n, o) => n + o.encodedBodySize, 0)")
    assert size < (1 if page == 'index.html' else 3) * MEGABYTE
    tab.set_viewport_size(dict(width=390, height=844))
    assert tab.evaluate('document.documentElement.scrollWidth') <= 390


@built
def test_search(visit):
    tab = visit('index.html')
    tab.fill('.sidebar-search', 'SGDropCallback')
    tab.press('.sidebar-search', 'Enter')
    tab.wait_for_selector('#search-results li a')
    found = tab.eval_on_selector_all('#search-results li a', 'os => os.map(o => o.getAttribute("href"))')
    assert any('api/callback.html#sgdrop.callback.SGDropCallback' in o for o in found) and not tab.trouble


@built
def test_copy_button(visit):
    tab = visit('index.html')
    tab.hover('div.highlight >> nth=0')
    tab.click('button.copybtn >> nth=0')
    tab.wait_for_selector('button.copybtn.success')
    copied = tab.evaluate('navigator.clipboard.readText()')
    assert copied.strip() == tab.inner_text('div.highlight pre >> nth=0').strip()


@built
def test_keyboard(visit):
    tab = visit('index.html')
    seen = []
    for _ in range(12):
        tab.keyboard.press('Tab')
        seen.append(tab.evaluate("document.activeElement.getAttribute('href') || document.activeElement.className"))
    assert any('sidebar-search' in o for o in seen) and any('tutorials/' in o for o in seen)


@built
def test_dark_and_light(visit):
    tab = visit('index.html')
    tone = lambda: tab.evaluate("getComputedStyle(document.body).backgroundColor")
    tab.emulate_media(color_scheme='light')
    light = tone()
    tab.emulate_media(color_scheme='dark')
    assert tone() != light


@built
def test_missing_page_of_any_depth_looks_right():
    assert soup('404.html').find('link', rel='stylesheet')['href'].startswith('/')


@built
def test_links_to_the_site_are_described():
    for page in ('index.html', '06_callback.html'):
        tags = {o['property']: o['content'] for o in soup(page).find_all('meta', property=re.compile('^og:'))}
        assert {'og:title', 'og:description', 'og:image'} <= {*tags} and all(tags.values())
    assert (HTML / 'social.png').exists()
