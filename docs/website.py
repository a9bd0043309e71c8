"Make the site in docs/_build/html: notebooks as nbdev processes them, pages about the package's names, rendered by Sphinx. With --source, stop before Sphinx."
import ast,inspect,io,os,posixpath,re,subprocess,sys
from dataclasses import is_dataclass
from functools import lru_cache
from importlib import import_module
from pathlib import Path
from shutil import rmtree

import nbformat
from fastcore.docments import docments
from fastcore.nbio import nb2str,read_nb
from nbdev.process import NBProcessor,Processor
from nbdev.processors import FilterDefaults
from nbformat.v4 import new_markdown_cell,new_output
from PIL import Image
from yaml import safe_load

DOCS = Path(__file__).resolve().parent
sys.path.append(str(DOCS))
from readme import outside_code,plain_html

ROOT,BUILD,PACKAGE = DOCS.parent,DOCS/'_build','sgdrop'
NBS = ROOT/'nbs'
SOURCE,HTML,DOCTREES = BUILD/'source',BUILD/'html',BUILD/'doctrees'
PAGES = {'CONTRIBUTING.md': 'contributing.md', 'CHANGELOG.md': 'changelog.md', 'CITATION.cff': 'references.md'}  # files of the project that are pages here
SECTIONS = {  # the sidebar: notebooks under nbs/ and other pages, in the order of their file names
    'Tutorials': ['tutorials/*.ipynb'],
    'How-to guides': ['howto/*.ipynb'],
    'Explanation': ['explanation/*.ipynb'],
    'The parts': ['[0-9]*.ipynb'],
    'Reference': ['api/index.md', 'glossary.md'],
    'Results': ['*_bench.ipynb', '*card.ipynb'],
    'About': ['changelog.md', 'contributing.md', 'references.md']}
FIRST_NAMES = {  # what most users need, by what they want to do
    'Train': ['callback.SGDropCallback', 'lightning.SGDropLightning', 'dropout.SGDrop'],
    'Monitor': ['monitor.MaskMonitor', 'monitor.LeakWarning', 'monitor.StarvationWarning', 'monitor.NotFiniteWarning', 'monitor.NoEffectWarning'],
    'Measure': ['focus.FocusRecorder', 'focus.occlusion_accuracy', 'interpret.AttributionInterpretation'],
    'Compare': ['compare.paired_table', 'compare.paired_difference'],
    'Build on the parts': ['split.find_layer', 'split.split_model', 'attribution.attribute', 'mask.saliency_mask', 'mask.fill_function',
        'teacher.EMATeacher'],
    'Try it': ['data.shortcut_digits', 'data.imagenette', 'data.flowers17']}

missing = set()  # links that lead nowhere

# Names of the package

def empty(o): return o is inspect.Parameter.empty

def shown_default(o):
    "A default as one writes it"
    if callable(o): return o.__name__
    return '...' if re.search('<[a-z]', repr(o)) else repr(o)  # such as `<function f at 0x7f…>`

def arguments(o):
    "The documented arguments of a function, or of what makes an object of a class: {name: docment, anno and default}"
    if inspect.isclass(o) and not made_here(o): return {}
    try: found = docments(o, full=True, returns=True, eval_str=False, args_kwargs=True)
    except (TypeError, ValueError): return {}
    return {k: v for k,v in found.items() if k not in ('self', 'cls')}

def made_here(cls):
    "Does the package say how an object of this class is made?"
    return is_dataclass(cls) or getattr(cls.__init__, '__module__', '').startswith(PACKAGE)

def signature(o):
    "How to call `o`: names and defaults alone"
    if inspect.isclass(o) and not made_here(o): return ''
    try: sig = inspect.signature(o)
    except (TypeError, ValueError): return '()'
    ps = [p.replace(annotation=p.empty, default=p.default if p.default is p.empty else _Name(shown_default(p.default)))
          for p in sig.parameters.values() if p.name!='self']
    return str(inspect.Signature(ps))

class _Name(str):
    __repr__ = str.__str__

def code(s): return '`' + str(s).replace('|', r'\|') + '`'

def anno_text(v):
    "The type of an argument as it is written, or that of its default"
    if empty(v.anno) or callable(v.default) and v.anno is type(v.default): return ''
    return code(v.anno if isinstance(v.anno, str) else getattr(v.anno, '__name__', str(v.anno)))

def docments_table(o):
    "The table of `o`'s arguments and of what it returns"
    rows = []
    for k,v in arguments(o).items():
        returns = k=='return'
        if returns and (empty(v.anno) or inspect.isclass(o)): continue
        rows.append(['**Returns**' if returns else code(k), anno_text(v),
                     '' if returns or empty(v.default) else code(shown_default(v.default)),
                     '' if not v.docment or empty(v.docment) else re.sub(r'\s+', ' ', v.docment).replace('|', r'\|')])
    if not rows: return ''
    table = [c for c in zip(['Argument', 'Type', 'Default', 'Details'], ['---']*4, *rows) if any(c[2:])]
    return '\n'.join('| ' + ' | '.join(r) + ' |' for r in zip(*table))

@lru_cache
def comments(module):
    "The comments behind or above a module's assignments, by name"
    src = inspect.getsource(module)
    lines,found = src.splitlines(),{}
    for n in ast.parse(src).body:
        if not isinstance(n, (ast.Assign, ast.AnnAssign)): continue
        above,behind = lines[n.lineno-2],lines[n.end_lineno-1][n.end_col_offset:]
        text = behind.strip(' #') or ('' if not above.startswith('# ') or above.startswith('# %%') else above.strip(' #'))
        found |= {t.id: text for target in getattr(n, 'targets', None) or [n.target] for t in ast.walk(target) if isinstance(t, ast.Name)}
    return found

def docstring(o, module, name):
    "What `o` says about itself; a constant, in the comment behind or above it"
    if inspect.isroutine(o) or inspect.isclass(o) or isinstance(o, property): return inspect.getdoc(o) or ''
    return comments(module).get(name, '')

def methods(cls):
    "The public, documented methods that the package gives to a class"
    def own(o): return getattr(getattr(o, 'fget', None) or getattr(o, '__func__', o), '__module__', '') or ''
    return {k: o for k,o in vars(cls).items() if k[0]!='_' and inspect.getdoc(o) and (inspect.isroutine(o) or isinstance(o, property)) and own(o).startswith(PACKAGE)}

def modules():
    "The package's modules that export names: {module: path of its notebook relative to nbs/}"
    found = {}
    for path in sorted(NBS.glob('[0-9]*.ipynb')):
        exported = re.search(r'#\| *default_exp +(\w+)', path.read_text(encoding='utf-8'))
        if exported: found[import_module(f'{PACKAGE}.{exported[1]}')] = path.name
    return found

# Notebooks

def described(name, module, up, level):
    "What stands on a notebook's page in the place of `show_doc(name)`"
    o = module
    for part in name.split('.'): o = inspect.getattr_static(o, part)
    o = getattr(o, '__func__', o)
    known = '.' not in name or docstring(o, module, name) and name.split('.')[1][0]!='_'
    source = f'{up}_modules/{module.__name__.replace(".", "/")}.html#{name if known else name.split(".")[0]}'
    links = f'<a href="{source}">source</a> · {{py:obj}}`reference <{module.__name__}.{name if known else name.split(".")[0]}>`'
    sig = '' if isinstance(o, property) else signature(o)
    return '\n\n'.join(s for s in ['#'*level + f' {name}', f'{{.sd}}\n{links}', f'```python\n{name}{sig}\n```', docstring(o, module, name), docments_table(o)] if s)

class fill_show_docs(Processor):
    "Put what `show_doc` is to show in its cell's place, from the package: nothing of the notebook is run"
    def begin(self):
        name = next((c.directives_['default_exp'] for c in self.nb.cells if 'default_exp' in c.directives_), '')
        self.module = name and import_module(f'{PACKAGE}.{name}')
        self.level,self.up = 2,'../' * (len(Path(self.nb.path_).relative_to(NBS).parts) - 1)

    def cell(self, cell):
        if cell.cell_type=='markdown' and re.search('^## ', cell.source, re.M): self.level = 3
        called = re.search(r'^show_doc\(([\w.]+)', cell.source, re.M)
        if cell.cell_type!='code' or not called: return
        cell.cell_type,cell.source,cell.has_sd_ = 'markdown',described(called[1], self.module, self.up, self.level),True
        for k in ('outputs', 'execution_count'): cell.pop(k, None)

class code_after_docs(Processor):
    "Move exported code behind what is said about its names"
    def begin(self):
        cells = self.nb.cells
        for cell in [c for c in cells if 'exports' in c.directives_]:
            i = cells.index(cell)
            while i+1<len(cells) and getattr(cells[i+1], 'has_sd_', False): cells[i],cells[i+1] = cells[i+1],cells[i]; i += 1

def processed(path):
    "The notebook after nbdev's steps, its exported code shown, and nothing executed"
    nb = read_nb(path)
    for c in nb.cells:
        if c.cell_type!='code' or not re.search(r'^(@|def |class )', c.source, re.M): continue
        # An event of a callback takes and returns nothing: its code says more than its signature.
        names = re.findall(r'^(?:def|class) (\w+)', c.source, re.M)
        events = [n.startswith(('before_', 'after_')) for n in names]
        plain = any(events) and all(e or n.startswith('_') for e, n in zip(events, names))
        c.source = re.sub(r'^#\| *export *$\n?', '' if plain else '#| exports\n', c.source, flags=re.M)
    ours = dict(exec_show_docs=fill_show_docs, mv_exports=code_after_docs, insert_warning=None)
    procs = [ours.get(o.__name__, o) for o in FilterDefaults().procs()]
    NBProcessor(nb=nb, procs=[o for o in procs if o], rm_directives='quarto').process()
    return nbformat.reads(nb2str(nb), 4)

def callout(m):
    "A Quarto callout as an admonition"
    colons,kind,attrs,body = m.groups()
    heading,body = re.match(r'\s*(?:#+\s+(.+)\n)?([\s\S]*)', body).groups()
    named = re.search(r'title="([^"]*)"', attrs)
    title = heading or (named and named[1]) or kind.capitalize()
    folded = ' dropdown' if 'collapse="true"' in attrs else ''
    return f'{colons}{{admonition}} {title}\n:class: {kind}{folded}\n\n{body.strip()}\n{colons}'

def link(target, folder):
    "`target` of a link on a notebook in `folder` of nbs/, as the site has it"
    if re.match(r'[a-z]+:|[#/]', target): return target
    path,*anchor = re.split('(?=#)', target, maxsplit=1)
    path = posixpath.normpath(posixpath.join('nbs', folder, path))
    if not (ROOT/path).exists(): missing.add(f'nbs/{folder}: {target}')
    if path.startswith('nbs/'): return target
    to = SOURCE/PAGES[path] if path in PAGES else ROOT/path
    return os.path.relpath(to, SOURCE/folder) + ''.join(anchor)

def prose(md, folder):
    "Markdown as Quarto reads it, as MyST does"
    md = re.sub(r'^(:{3,}) *\{\.callout-(\w+)([^}]*)\} *\n([\s\S]*?)^:{3,} *$', callout, md, flags=re.M)
    md = re.sub(r'^(:{3,}) *\{(\.[^}]*)\} *$', lambda m: f'{m[1]}{{div}} ' + ' '.join(re.findall(r'\.([\w-]+)', m[2])), md, flags=re.M)
    def f(s):
        s = re.sub(r'(\]\()([^\s)]+)', lambda m: m[1] + link(m[2], folder), s)
        s = re.sub(r'\[((?:@[\w-]+;? *)+)\]', lambda m: '{cite:p}`' + ','.join(re.findall(r'@([\w-]+)', m[1])) + '`', s)
        return re.sub(r'(\]\([^)\n]*\))\{[^}\n]*\}', r'\1', s)
    md = outside_code(f, md)
    return re.sub(r'\[`([^`]+)`\]\(/(\w+)\.html#[^)]*\)', rf'{{py:obj}}`\1 <{PACKAGE}.\2.\1>`', md)  # nbdev's links

def opening(cell, rel):
    "The front matter cell as the page's title, what it is about, and how to run it"
    front = safe_load(cell.source.strip().strip('-'))
    about = front.get('description', '')
    up = os.path.relpath(NBS/rel, (SOURCE/rel).parent)
    run = '' if rel=='index.ipynb' else f'{{.run}}\n{{download}}`Download this notebook <{up}>` · Run it yourself: `make nbs NB=nbs/{rel}` in a clone, or the download in Jupyter'
    return '\n\n'.join(s for s in [f"# {front['title']}", about and f'{{.lead}}\n{about}', run] if s)

def plain(md): return re.sub(r'[`*$]', '', re.sub(r'\[([^]]*)\]\([^)]*\)', r'\1', md))

def shown(cell, rel):
    "`cell` as its directives want it shown, or None"
    if cell.cell_type=='raw':
        return new_markdown_cell(opening(cell, rel)) if cell.source.startswith('---') else None
    if cell.cell_type=='markdown': return new_markdown_cell(prose(cell.source, posixpath.dirname(rel)))
    opts = dict(re.findall(r'^#\|\s*([\w-]+):\s*(.*?)\s*$', cell.source, flags=re.M))
    if opts.get('include')=='false': return
    cell.source = re.sub(r'^#\|.*\n?', '', cell.source, flags=re.M).strip()
    tags = {'remove-input': opts.get('echo')=='false' or not cell.source, 'remove-output': opts.get('output')=='false', 'hide-input': opts.get('code-fold', 'false')!='false'}
    text = {k: opts.get(k, '').strip('"\'') for k in ('fig-alt', 'fig-cap')}
    outputs = [o for o in cell.outputs if not (opts.get('warning')=='false' and o.get('name')=='stderr')]
    if opts.get('output')=='asis': outputs = [new_output('display_data', {'text/markdown': o.text}) if o.output_type=='stream' else o for o in outputs]
    cell.metadata = dict(tags=[k for k,v in tags.items() if v])
    myst = {}
    for o in outputs:
        if 'text' in o: o.text = re.sub(r'[^\n]*\r(?!\n)', '', o.text)  # what a terminal shows of a progress bar
        if 'data' not in o: continue
        if 'text/html' in o.data: o.data['text/html'] = plain_html(o.data['text/html'])
        for mime in o.data:
            if not mime.startswith('image/'): continue
            myst['image'] = dict(alt=text['fig-alt'] or text['fig-cap'])
            if width := o.metadata.get(mime, {}).get('width'): myst['image']['width'] = f'{width}px'
            if text['fig-cap']: myst['figure'] = dict(caption=text['fig-cap'])
    cell.outputs = outputs
    if myst: cell.metadata['mystnb'] = myst
    return cell

def page(path):
    "A notebook as a page of the site"
    rel = path.relative_to(NBS).as_posix()
    nb = processed(path)
    nb.cells = [s for c in nb.cells if (s := shown(c, rel))]
    nb.metadata = dict(language_info=dict(name='python'), kernelspec=dict(name='python3', display_name='Python 3', language='python'))
    for i,c in enumerate(nb.cells): c['id'] = f'c{i}'
    return nb

# The API reference

def entry(name, o, module, notebook, role, depth=4):
    "A name with its signature, docstring, arguments and methods, as a block of MyST"
    inner = [entry(f'{name}.{k}', getattr(m, '__func__', m), module, notebook, 'property' if isinstance(m, property) else 'method', depth-1) for k,m in methods(o).items()] if role=='class' else []
    sig = '' if role in ('data', 'property') else signature(o)
    value = [f':value: {shown_default(o)}'] if role=='data' and len(repr(o))<80 else []
    told = '' if role in ('data', 'method', 'property') else f'Explained in [{title(notebook)}](../{notebook}#{name.lower()}).'
    about = re.sub(r'(\]\()(?=[^):]+\.ipynb)', r'\1../', docstring(o, module, name))
    body = [about, '' if role=='data' else docments_table(o), told, *inner]
    fence = '`' * depth
    return '\n'.join([f'{fence}{{py:{role}}} {name}{sig}', *value, '', *(f'{b}\n' for b in body if b), fence])

def title(notebook): return re.search(r'"# ([^"\\]+)', (NBS/notebook).read_text(encoding='utf-8'))[1]

def role(o): return 'class' if inspect.isclass(o) else 'function' if inspect.isroutine(o) else 'data'

def reference():
    "The pages of the API reference: {path: text}"
    pages,rows = {},{}
    for module,notebook in modules().items():
        names,short = getattr(module, '__all__', []),module.__name__.split('.')[-1]
        if not names: continue
        entries = [entry(n, getattr(module, n), module, notebook, role(getattr(module, n))) for n in names]
        about = f'Made in the notebook [{title(notebook)}](../{notebook}), which explains it.'
        pages[f'api/{short}.md'] = '\n\n'.join([f'# {module.__name__}', f'{{.lead}}\n{about}', f'```{{py:module}} {module.__name__}\n```', *entries]) + '\n'
        rows |= {f'{short}.{n}': f'| {{py:obj}}`{n} <{module.__name__}.{n}>` | [{short}]({short}.md) | {plain(docstring(getattr(module, n), module, n).split(chr(10))[0]).replace("|", chr(92)+"|")} |' for n in names}
    toc = '\n'.join(p.removeprefix('api/') for p in pages)
    head = '\n| Name | Module | |\n| --- | --- | --- |\n'
    first = '\n\n'.join(f'**{purpose}**\n{head}' + '\n'.join(rows[n] for n in names) for purpose,names in FIRST_NAMES.items())
    pages['api/index.md'] = '\n'.join(['# API reference', '', '{.lead}', 'Every name the package exports. `from sgdrop.all import *` gives those of the modules that users need.', '',
        '```{toctree}', ':hidden:', toc, '```', '', '## The names to begin with', '', first, '', '## All names', head + '\n'.join(rows[n] for n in sorted(rows, key=lambda n: n.split('.')[1].lower()))]) + '\n'
    return pages

# All of it

def toctrees(files):
    "The sidebar's contents as hidden toctrees; a page belongs to the last section that asks for it"
    where = {f: s for s,globs in SECTIONS.items() for g in globs for f in files if Path(f).match(g) and f.count('/')==g.count('/')}
    parts = {s: sorted((f for f in where if where[f]==s), key=lambda f: (f in PAGES.values(), f)) for s in SECTIONS}
    return '\n\n'.join(f'```{{toctree}}\n:hidden:\n:caption: {s}\n\n' + '\n'.join(fs) + '\n```' for s,fs in parts.items() if fs)

def social():
    "The preview image: the home page's picture on a card"
    card,picture = Image.new('RGB', (1200, 630), 'white'),Image.open(next((DOCS/'images').glob('index_*.png'))).convert('RGB')
    picture.thumbnail((1120, 550))
    card.paste(picture, tuple((a-b)//2 for a,b in zip(card.size, picture.size)))
    card.save(out := io.BytesIO(), 'PNG', optimize=True)
    return out.getvalue()

def pages():
    "All files that Sphinx reads: {path: text or bytes}"
    found = reference()
    found |= {p.name: p.read_text(encoding='utf-8') for p in (DOCS/'pages').glob('*.md')}
    found |= {new: (ROOT/old).read_text(encoding='utf-8') for old,new in PAGES.items() if new not in found}
    notebooks = {p.relative_to(NBS).as_posix(): page(p) for p in sorted(NBS.rglob('*.ipynb')) if not any(o[0] in '._' for o in p.relative_to(NBS).parts)}
    home = notebooks['index.ipynb'].cells
    first_section = next(i for i,c in enumerate(home) if c.cell_type=='markdown' and c.source.startswith('## '))
    home.insert(first_section, new_markdown_cell(found.pop('doors.md'), id='doors'))
    home.append(new_markdown_cell(toctrees([*found, *notebooks]), id='sidebar'))
    return found | {k: nbformat.writes(nb, 4) for k,nb in notebooks.items()} | {'social.png': social()}

def write(files):
    "Make SOURCE hold `files` and nothing else, touching only what changed"
    for p in SOURCE.rglob('*'):
        if p.is_file() and p.relative_to(SOURCE).as_posix() not in files: p.unlink()
    for name,text in files.items():
        path,data = SOURCE/name,text if isinstance(text, bytes) else text.encode()
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists() or path.read_bytes()!=data: path.write_bytes(data)

def main(args):
    os.chdir(ROOT)
    write(pages())
    if '--source' in args: return
    for o in HTML,DOCTREES: rmtree(o, ignore_errors=True)  # so that nothing old stays, and every warning comes
    rc = subprocess.run([sys.executable, '-m', 'sphinx', '-W', '--keep-going', '-q', '-c', DOCS, '-d', DOCTREES, SOURCE, HTML]).returncode
    for o in sorted(missing): print('Link to nothing:', o, file=sys.stderr)
    rc = rc or bool(missing)
    if not rc: (HTML/'.built').touch()
    sys.exit(rc)

if __name__=='__main__': main(sys.argv[1:])
