"Terms of the glossary in the text of pages: links that show the definition."
import re

from docutils import nodes
from docutils.nodes import make_id

from website import NBS


def read():
    "Return entry and definition of each term that links"
    text, terms = (NBS/'glossary.md').read_text(encoding='utf-8'), {}
    for names, about in re.findall(r'^(\w.*)\n: (.+)', text, flags=re.M):
        first, *others = names.lower().split(', ')
        without_links = re.sub(r'\[([^]]*)\]\([^)]*\)', r'\1', about)
        without_page = re.sub(r' \([^()]*\)\.$', '.', without_links)
        named = [first, *(name for name in others if ' ' in name)]
        terms |= {name: (first, without_page) for name in named}
    return {name: entry for name, entry in terms.items() if len(name) > 2}


def anchor(app, doctree):
    "Make the entries of the glossary places that links lead to"
    if app.env.docname != 'glossary': return
    for term in doctree.findall(nodes.term):
        term['ids'].append(make_id(f'term {term.astext().split(", ")[0]}'))


def link(app, doctree, docname):
    "Link the first mention of each term in the paragraphs of a page"
    if docname in ('glossary', 'changelog', 'references'): return
    left = read()
    glossary = app.builder.get_relative_uri(docname, 'glossary')
    def linked(text):
        terms = '|'.join(sorted(map(re.escape, left), key=len, reverse=True))
        found = re.search(rf'\b({terms})s?\b', text, flags=re.I) if left else None
        if not found: return [nodes.Text(text)]
        entry, about = left.pop(found[1].lower())
        uri = f'{glossary}#{make_id(f"term {entry}")}'
        reference = nodes.reference('', found[0], refuri=uri, internal=True,
                                    reftitle=about, classes=['term'])
        return [nodes.Text(text[:found.start()]), reference,
                *linked(text[found.end():])]
    for text in [*doctree.findall(nodes.Text)]:
        if type(text.parent) is nodes.paragraph: text.parent.replace(text, linked(text))
