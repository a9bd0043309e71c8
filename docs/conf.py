"Sphinx's settings. docs/website.py makes what it reads."
import ast,os,re
from html import escape
from pathlib import Path
from urllib.parse import urlparse

from docutils import nodes
from latex2mathml.converter import convert
from nbdev.showdoc import showdoc_nm
from sphinx.pycode import ModuleAnalyzer

ROOT = Path(__file__).resolve().parent.parent
ini = dict(re.findall(r'^(\w+) *= *(.*)', (ROOT/'settings.ini').read_text(encoding='utf-8'), flags=re.M))
project,author = ini['lib_name'],ini['author']
copyright = author
release = version = re.search(r"__version__ *= *['\"](.+)['\"]", (ROOT/'sgdrop/__init__.py').read_text())[1]

extensions = ['myst_nb', 'sphinx.ext.viewcode', 'sphinx_copybutton', 'sphinx_design', 'sphinxcontrib.bibtex', 'notfound.extension']
language = 'en'
nb_execution_mode = 'off'
nb_render_markdown_format = 'myst'
nb_ipywidgets_js = {}  # nothing from other hosts
nb_merge_streams = True
nb_code_prompt_show,nb_code_prompt_hide = 'Show the code','Hide the code'
myst_enable_extensions = ['amsmath', 'attrs_block', 'attrs_inline', 'colon_fence', 'deflist', 'dollarmath', 'smartquotes']
myst_heading_anchors = 4
bibtex_bibfiles = [str(ROOT/'docs/references.bib')]
bibtex_default_style = 'plain'
toc_object_entries = False
viewcode_follow_imported_members = False
add_module_names = False
python_display_short_literal_types = True
maximum_signature_line_length = 80
copybutton_exclude = '.linenos, .gp, .go'

html_favicon = 'favicon.svg'  # browsers that find none ask for /favicon.ico
html_theme = 'furo'
html_title = project
html_static_path = ['_static']
html_css_files = ['site.css']
html_extra_path = ['_build/source/social.png']
html_math_renderer = 'mathml'
html_copy_source = False
html_domain_indices = False  # api/index has every name
html_show_sphinx = False
html_baseurl = os.environ.get('SITE_URL', '')  # where the site will be, if known: social previews want whole addresses
notfound_urls_prefix = urlparse(html_baseurl).path.rstrip('/') + '/'
notfound_context = dict(title='Not here', body='<h1>Not here</h1><p>There is no such page. The search, the contents and the <a href="index.html">home page</a> know what there is.</p>')
pygments_dark_style = 'github-dark'

def mathml(display):
    "Math as MathML, which browsers draw without a script or a font from elsewhere"
    def visit(self, node):
        self.body.append(convert(node.astext(), display=display))
        raise nodes.SkipNode
    return visit, None

def social(app, pagename, templatename, context, doctree):
    "What search engines and other sites show of a link to this page"
    lead = [n.astext() for n in doctree.findall(nodes.paragraph) if 'lead' in n['classes']] if doctree else []
    about = escape((lead or [ini['description']])[0], quote=True)
    tags = dict(title=re.sub('<[^>]*>', '', context.get('title') or project), type='website', site_name=project, description=about, image=f'{html_baseurl}social.png')
    context['metatags'] = f'<meta name="description" content="{about}">' + ''.join(f'<meta property="og:{k}" content="{v}">' for k,v in tags.items())

def module_source(app, name):
    "A module's source and where its names are, also those patched into a class, without importing it"
    analyzer = ModuleAnalyzer.for_file(str(ROOT/f"{name.replace('.', '/')}.py"), name)
    analyzer.find_tags()
    patches = [n for n in ast.parse(analyzer.code).body if isinstance(n, ast.FunctionDef) and n.decorator_list]
    patched = {showdoc_nm(n): ('def', n.decorator_list[0].lineno, n.end_lineno) for n in patches}
    return analyzer.code, analyzer.tags | {k: v for k,v in patched.items() if isinstance(k, str)}

def setup(app):
    app.connect('viewcode-find-source', module_source)
    app.add_html_math_renderer('mathml', inline_renderers=mathml('inline'), block_renderers=mathml('block'))
    app.connect('html-page-context', social)
