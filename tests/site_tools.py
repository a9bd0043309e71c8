"docs/website.py as a module, and the browser for the site's tests"
import importlib.util
import os
import shutil
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
HTML = ROOT / 'docs/_build/html'
FLAGS = ('--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking '
         '--disable-component-update --disable-sync').split()

spec = importlib.util.spec_from_file_location('website', ROOT / 'docs/website.py')
website = importlib.util.module_from_spec(spec)
spec.loader.exec_module(website)


def browser_path():
    "A Chromium of this machine, or None"
    return os.environ.get('CHROMIUM') or shutil.which('chromium') or shutil.which('google-chrome')


def out_of_date():
    "Why the site in docs/_build/html cannot be checked, if so"
    if not (HTML / 'index.html').exists(): return 'no site: run make docs'
    sources = [*(ROOT / 'nbs').rglob('*.ipynb'), *(ROOT / 'sgdrop').glob('*.py'), *(ROOT / 'docs').glob('*.py'), *(ROOT / 'docs/pages').glob('*')]
    newest = max(sources, key=lambda p: p.stat().st_mtime)
    if newest.stat().st_mtime > (HTML / '.built').stat().st_mtime: return f'the site is older than {newest.relative_to(ROOT)}: run make docs'
