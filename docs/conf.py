"Sphinx's settings. The pages are the notebooks in nbs/, which website.py reads."
import os
import re
import sys
from functools import partial
from html import escape
from pathlib import Path
from urllib.parse import urlparse

from docutils import nodes
from latex2mathml.converter import convert

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT/'docs'))
import terms
import website
from addresses import addresses, settings

ini = settings()
repository = os.environ.get('REPOSITORY', ini['repository'])  # for a test
links = addresses(repository)
project, author = ini['lib_name'], ini['author']
copyright = author
init = (ROOT/'sgdrop/__init__.py').read_text(encoding='utf-8')
release = version = re.search(r"__version__ *= *['\"](.+)['\"]", init)[1]

extensions = ['myst_nb', 'sphinx_copybutton', 'sphinx_design', 'sphinxcontrib.bibtex',
              'notfound.extension']
exclude_patterns = ['**/.*', '**/_*', 'experiments/0[!7]*']  # 07 is their one page
language = 'en'
nb_execution_mode = 'off'
nb_render_markdown_format = 'myst'
nb_ipywidgets_js = {}  # nothing from other hosts
nb_merge_streams = True
nb_code_prompt_show, nb_code_prompt_hide = 'Show the code', 'Hide the code'
myst_enable_extensions = ['amsmath', 'attrs_block', 'colon_fence', 'deflist',
                          'dollarmath', 'smartquotes']
myst_heading_anchors = 4
bibtex_bibfiles = [str(ROOT/'docs/references.bib')]
bibtex_default_style = 'plain'
toc_object_entries = False

html_theme = 'furo'
html_title = f'{project} {version}'
html_theme_options = dict(
    source_repository=repository, source_branch='main', source_directory='nbs/',
    footer_icons=[{'name': name, 'url': url, 'html': name} for name, url in {
        'Repository': repository, f'Version {version}': links['releases']}.items()],
) if repository else {}
html_favicon = 'favicon.svg'  # browsers that find none ask for /favicon.ico
html_static_path = ['_static']
html_css_files = ['site.css', 'touch.css']
html_js_files = [('touch.js', dict(defer='defer'))]
html_extra_path = ['images']  # for previews of links
html_math_renderer = 'mathml'
html_copy_source = html_show_sphinx = False
html_use_index = html_domain_indices = False
html_baseurl = links.get('site', '')  # previews of links need whole addresses
notfound_urls_prefix = urlparse(html_baseurl).path.rstrip('/') + '/'
notfound_context = dict(title='Page not found', body=(
    '<h1>Page not found</h1><p>There is no such page. Try the search, the contents or '
    'the <a href="index.html">home page</a>.</p>'))
pygments_dark_style = 'github-dark'


def mathml(display):
    "Draw math as MathML, which needs no script and no font from elsewhere"
    def visit(self, node):
        self.body.append(convert(node.astext(), display=display))
        raise nodes.SkipNode
    return visit, None


def describe(app, pagename, templatename, context, doctree):
    "Describe a page to search engines, and to sites that show a preview of a link"
    leads = [n.astext() for n in doctree.findall(nodes.paragraph)
             if 'lead' in n['classes']] if doctree else []
    about = escape((leads or [ini['description']])[0])
    title = re.sub('<[^>]*>', '', context.get('title') or project)
    tags = dict(title=title, type='website', site_name=project, description=about,
                image=f'{html_baseurl}index_1.png')
    context['metatags'] = f'<meta name="description" content="{about}">' + ''.join(
        f'<meta property="og:{k}" content="{v}">' for k, v in tags.items())


def setup(app):
    app.add_html_math_renderer('mathml', mathml('inline'), mathml('block'))
    app.connect('source-read', partial(website.read, links=links))
    app.connect('html-page-context', describe)
    app.connect('doctree-read', terms.anchor)
    app.connect('doctree-resolved', terms.link)
