"Terms of the glossary in the text of pages: links that show the definition."
import re

from docutils import nodes
from docutils.nodes import make_id

from website import NBS, plain


def read():
    "Return the definition of each term; the first of several names is the term"
    text = (NBS/'glossary.md').read_text(encoding='utf-8')
    found = re.findall(r'^(\w.*)\n: (.+)', text, flags=re.M)
    return {names.split(', ')[0].lower(): re.sub(r' \([^()]*\)\.$', '.', plain(about))
            for names, about in found}


def anchor(app, doctree):
    "Make the entries of the glossary places that links lead to"
    if app.env.docname != 'glossary': return
    for term in doctree.findall(nodes.term):
        term['ids'].append(make_id(f'term {term.astext().split(", ")[0]}'))


def link(app, doctree, docname):
    "Link the first mention of each term in the paragraphs of a page"
    if docname in ('glossary', 'changelog', 'references'): return
    about = {term: text for term, text in read().items() if len(term) > 2}
    glossary = app.builder.get_relative_uri(docname, 'glossary')
    def linked(text):
        terms = '|'.join(sorted(map(re.escape, about), key=len, reverse=True))
        found = re.search(rf'\b({terms})s?\b', text, flags=re.I) if about else None
        if not found: return [nodes.Text(text)]
        term = found[1].lower()
        uri = f'{glossary}#{make_id(f"term {term}")}'
        reference = nodes.reference('', found[0], refuri=uri, internal=True,
                                    reftitle=about.pop(term), classes=['term'])
        return [nodes.Text(text[:found.start()]), reference,
                *linked(text[found.end():])]
    for text in [*doctree.findall(nodes.Text)]:
        if type(text.parent) is nodes.paragraph: text.parent.replace(text, linked(text))
