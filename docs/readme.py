"Make README.md, and its pictures in docs/images, from the executed nbs/index.ipynb."
import posixpath
import re
from base64 import b64decode
from html import escape
from pathlib import Path

from nbconvert import MarkdownExporter
from nbformat.v4 import new_notebook
from traitlets.config import Config

from addresses import addresses, settings
from notebooks import callouts, cells, option, outside_code, with_install

ROOT = Path(__file__).resolve().parent.parent
NOTE = '<!-- Made from nbs/index.ipynb by docs/readme.py: edit the notebook. -->'
EXPORTER = MarkdownExporter(config=Config(
    NbConvertBase=dict(
        display_data_priority=['text/markdown', 'text/html', 'text/plain']),
    TagRemovePreprocessor=dict(
        enabled=True, remove_input_tags={'remove-input', 'hide-input'},
        remove_all_outputs_tags={'remove-output'})))


def prose(md):
    "Set callouts as quotes, and make links start from the project's folder"
    def quote(kind, title, body):
        lines = [f'**{title}**', '', *body.splitlines()]
        return '\n'.join(f'> {line}'.rstrip() for line in lines)
    def relink(m):
        inside = not re.match(r'[a-z]+:|[#/]', m[0])
        return posixpath.normpath(posixpath.join('nbs', m[0])) if inside else m[0]
    links = r'(?:(?<=\]\()|(?<=href=")|(?<=src="))[^\s)">]+'
    return outside_code(lambda s: re.sub(links, relink, s), callouts(quote, md))


def picture(out, alt, pictures):
    "Move a PNG of `out` to `pictures`, and link it"
    path = f'docs/images/index_{len(pictures) + 1}.png'
    pictures[path] = b64decode(out.data['image/png'])
    width = out.metadata.get('image/png', {}).get('width')
    size = f' width="{width}"' if width else ''
    out.data['text/markdown'] = f'<img src="{path}" alt="{escape(alt)}"{size}>'


def badges(links):
    "Return a line of badges under the title, or nothing"
    return (f'[![tests]({links["tests"]}/badge.svg)]({links["tests"]}) '
            f'[documentation]({links["site"]})\n\n') if links else ''


def render(links):
    "Return the README's text, and its pictures as {path: bytes}"
    made, pictures = [], {}
    for cell, directives in cells(ROOT/'nbs/index.ipynb', prose):
        alt = option(directives, 'fig-alt') or option(directives, 'fig-cap')
        for out in cell.get('outputs', []):
            if 'image/png' in out.get('data', {}): picture(out, alt, pictures)
        made.append(cell)
    if not pictures: raise SystemExit('nbs/index.ipynb has no pictures: run make nbs')
    language = dict(language_info=dict(name='python'))
    text, _ = EXPORTER.from_notebook_node(new_notebook(cells=made, metadata=language))
    text = outside_code(lambda s: re.sub(r'\n\s*\n(?=\s*\n)', '\n', s), text)
    title, rest = with_install(text.strip(), links).split('\n\n', 1)
    if links:
        page = rf']({links["site"]}\1.html'
        rest = re.sub(r'\]\(nbs/([^)#]+)\.ipynb', page, rest)
    return f'{NOTE}\n\n{title}\n\n{badges(links)}{rest}\n', pictures


if __name__ == '__main__':
    text, pictures = render(addresses(settings()['repository']))
    for old in (ROOT/'docs/images').glob('index_*'): old.unlink()
    for path, data in {'README.md': text.encode(), **pictures}.items():
        (ROOT/path).parent.mkdir(parents=True, exist_ok=True)
        (ROOT/path).write_bytes(data)
