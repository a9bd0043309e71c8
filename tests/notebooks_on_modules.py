"""Run the notebooks, or those named, with modules in place of their exported cells.

So coverage counts the lines that their examples run."""
import json
import shutil
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from fastcore.nbio import read_nb
from nbdev.test import nbdev_test

from sgdrop.data import missing_sets
from site_tools import ROOT, exports

SKIPPED = '.*', 'docs', '_build', '__pycache__', 'demo', 'bench'
IMPORT = '''import {} as _module
globals().update({{k: v for k, v in vars(_module).items() if k[:2] != '__'}})
'''


def on_module(
    path: Path,  # of a notebook
) -> str:  # the notebook, importing all names of its module where it defined some
    "Replace exported cells by an import"
    module, notebook = exports(path)[0], json.loads(path.read_text(encoding='utf-8'))
    for cell, parsed in zip(notebook['cells'], read_nb(path).cells):
        if cell['cell_type'] == 'code' and 'export' in parsed.directives:
            cell['source'] = IMPORT.format(module).splitlines(True)
    return json.dumps(notebook)


def main(*names):
    flags = '' if missing_sets() else 'photographs'
    with TemporaryDirectory() as folder:
        copy = Path(folder)/'repository'
        shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(*SKIPPED))
        for path in (copy/'nbs').rglob('*.ipynb'):
            path.write_text(on_module(path), encoding='utf-8')
        for path in [copy/'nbs'/name for name in names] or [copy/'nbs']:
            nbdev_test(path, flags=flags, n_workers=0, timing=True)


if __name__ == '__main__': sys.exit(main(*sys.argv[1:]))
