"Make README.md, and the pictures in docs/images, from the executed nbs/index.ipynb. With --check, only say whether they would change."
import os,posixpath,re,sys
from base64 import b64decode
from html import escape
from pathlib import Path

import nbformat
from bs4 import BeautifulSoup
from fastcore.nbio import nb2str,nb_frontmatter,read_nb
from nbconvert import MarkdownExporter
from nbdev.process import NBProcessor
from nbdev.processors import FilterDefaults
from nbformat.v4 import new_markdown_cell,new_output
from traitlets.config import Config

ROOT,IMAGES = Path(__file__).resolve().parent.parent,'docs/images'
NOTE = '<!-- Made from nbs/index.ipynb by docs/readme.py: edit the notebook. -->'

def processed(path):
    "The notebook after those of nbdev's steps that suit a page without a site: none that link, execute or add to it"
    skip = 'FrontmatterProc insert_warning add_show_docs exec_show_docs add_links'.split()
    nb = read_nb(path)
    procs = [o for o in FilterDefaults().procs() if o.__name__ not in skip]
    NBProcessor(nb=nb, procs=procs, rm_directives='quarto').process()
    return nb

def quote(m):
    "A Quarto callout as a Markdown quote"
    kind,attrs,body = m.groups()
    title,body = re.match(r'\s*(?:#+\s+(.+)\n)?([\s\S]*)', body).groups()
    named = re.search(r'title="([^"]*)"', attrs)
    lines = [f"**{title or (named and named[1]) or kind.capitalize()}**", '', *body.strip().splitlines()]
    return '\n'.join(f'> {l}'.rstrip() for l in lines) + '\n'

def outside_code(f, md):
    return ''.join(s if i%2 else f(s) for i,s in enumerate(re.split(r'(^```.*?^```|`[^`\n]+`)', md, flags=re.M|re.S)))

def relinked(md):
    "`md` with links relative to nbs/ made relative to the project, and without Quarto's attributes"
    def f(m): return m[1] + (m[2] if re.match(r'[a-z]+:|[#/]', m[2]) else posixpath.normpath(posixpath.join('nbs', m[2])))
    md = re.sub(r'(\]\(|^\[[^\]]+\]:\s*|(?:href|src)=")([^\s)">]+)', f, md, flags=re.M)
    return re.sub(r'(\]\([^)\n]*\))\{[^}\n]*\}', r'\1', md)

def prose(md):
    md = re.sub(r'^:{3,} *\{\.callout-(\w+)([^}]*)\} *\n([\s\S]*?)^:{3,} *$', quote, md, flags=re.M)
    return outside_code(relinked, re.sub(r'^:{3,}.*\n?', '', md, flags=re.M))

def plain_html(html):
    "A table, say, without what a code host strips or shows as text: one row a line"
    soup = BeautifulSoup(html, 'html.parser')
    for o in soup(['style', 'script', 'progress']): o.decompose()
    for o in soup('div'): o.unwrap()
    for o in soup(True): o.attrs = {k:v for k,v in o.attrs.items() if k in ('colspan', 'rowspan', 'href', 'src', 'alt', 'width')}
    return re.sub(r'\s*\n\s*(<t[dh]|</tr)', r'\1', re.sub(r'\s*\n\s*', '\n', str(soup))).strip()

def as_picture(out, alt, pictures):
    "Move an image output of `out` to `pictures`, leaving a link to it"
    for mime,ext in {'image/svg+xml': 'svg', 'image/png': 'png', 'image/jpeg': 'jpg'}.items():
        if mime not in out.data or 'text/markdown' in out.data: continue
        path,data = f'{IMAGES}/index_{len(pictures)+1}.{ext}',out.data[mime]
        pictures[path] = data.encode() if ext=='svg' else b64decode(data)
        width = out.metadata.get(mime, {}).get('width')
        out.data['text/markdown'] = f'<img src="{path}" alt="{alt}"' + (f' width="{width}"' if width else '') + '>'

def shown(cell, pictures):
    "`cell` as its directives want it shown, or None"
    if cell.cell_type=='raw': return
    if cell.cell_type=='markdown':
        cell.source = prose(cell.source)
        return cell
    opts = dict(re.findall(r'^#\|\s*([\w-]+):\s*(.*?)\s*$', cell.source, flags=re.M))
    if opts.get('include')=='false': return
    cell.source = re.sub(r'^#\|.*\n?', '', cell.source, flags=re.M).strip()
    cell.metadata.transient = dict(remove_source=opts.get('echo')=='false' or not cell.source)
    if opts.get('output')=='false': cell.outputs = []
    if opts.get('warning')=='false': cell.outputs = [o for o in cell.outputs if o.get('name')!='stderr']
    if opts.get('output')=='asis':
        cell.outputs = [new_output('display_data', {'text/markdown': o.text}) if o.output_type=='stream' else o for o in cell.outputs]
    for o in cell.outputs:
        if 'text' in o: o.text = re.sub(r'[^\n]*\r(?!\n)', '', o.text)  # what a terminal shows of a progress bar
        if 'data' not in o: continue
        as_picture(o, escape(opts.get('fig-alt', opts.get('fig-cap', '')).strip('"\'')), pictures)
        if 'text/html' in o.data: o.data['text/html'] = plain_html(o.data['text/html'])
    return cell

def render():
    "The README's text, and its pictures as a dict from path to bytes"
    nb,pictures = processed('nbs/index.ipynb'),{}
    front,nb = nb_frontmatter(nb),nbformat.reads(nb2str(nb), 4)
    if not any(c.get('outputs') for c in nb.cells): sys.exit('nbs/index.ipynb has no outputs: run make nbs')
    nb.cells = [s for c in nb.cells if (s := shown(c, pictures))]
    nb.metadata.language_info = dict(name='python')  # nbdev-clean removes it
    first = nb.cells[0]
    if first.source.startswith('# '): first.source = re.sub(r'^- [\w-]+: .*\n?', '', first.source, flags=re.M)
    elif 'title' in front: nb.cells.insert(0, new_markdown_cell(f"# {front['title']}\n\n> {front.get('description', '')}"))
    order = ['text/markdown', 'text/html', 'text/plain']
    md,_ = MarkdownExporter(config=Config(NbConvertBase=dict(display_data_priority=order))).from_notebook_node(nb)
    md = outside_code(lambda s: re.sub(r'\n\s*\n(?=\s*\n)', '\n', s), md)
    return f'{NOTE}\n\n{md.strip()}\n', pictures

def main(check):
    os.chdir(ROOT)
    text,pictures = render()
    want = {'README.md': text.encode(), **pictures}
    have = {str(p): p.read_bytes() for p in [Path('README.md'), *Path(IMAGES).glob('index_*')] if p.exists()}
    if check:
        off = sorted(k for k in {*want, *have} if want.get(k)!=have.get(k))
        if off: sys.exit(f"Not what nbs/index.ipynb makes: {', '.join(off)}. Run make readme.")
        return
    for p in {*have} - {*want}: Path(p).unlink()
    for p,data in want.items():
        Path(p).parent.mkdir(parents=True, exist_ok=True)
        Path(p).write_bytes(data)

if __name__=='__main__': main('--check' in sys.argv[1:])
