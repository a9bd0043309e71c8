"The project's addresses: all follow from `repository` in settings.ini."
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def settings():
    "Return the one-line settings of settings.ini"
    text = (ROOT/'settings.ini').read_text(encoding='utf-8')
    return dict(re.findall(r'^(\w+) *= *(.*)', text, flags=re.M))


def addresses(repository):
    "Return the addresses by name; none if there is no repository yet"
    if not repository: return {}
    found = re.fullmatch(r'https://github\.com/([\w.-]+)/([\w.-]+)', repository)
    if not found: raise ValueError(f'repository = {repository} in settings.ini, '
                                   'expected https://github.com/OWNER/NAME')
    owner, name = found.groups()
    return dict(
        repository=repository, site=f'https://{owner}.github.io/{name}/',
        colab=f'https://colab.research.google.com/github/{owner}/{name}/blob/main/nbs/',
        releases=f'{repository}/releases', install=f'pip install git+{repository}',
        tests=f'{repository}/actions/workflows/test.yml')
