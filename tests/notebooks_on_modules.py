"Run the notebooks (or those named) with the modules in place of their exported cells, so that coverage counts what their examples run"
import json
import shutil
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from nbdev.test import nbdev_test

from sgdrop.data import missing_sets
from site_tools import ROOT


def on_module(
    notebook: dict,  # as read from its file
) -> dict:  # with the names of the module where a cell was exported to it
    code = [cell for cell in notebook['cells'] if cell['cell_type'] == 'code']
    targets = [line.split()[-1] for cell in code for line in cell['source'] if line.startswith('#| default_exp')]
    for cell in code:
        exported = any(line.startswith(('#| export', '#|export')) for line in cell['source'])
        if exported: cell['source'] = [f'import sgdrop.{targets[0]} as _module\n', "globals().update({k: v for k, v in vars(_module).items() if not k.startswith('__')})"]
    return notebook


def main(*names):
    flags = '' if missing_sets() else 'photographs'
    with TemporaryDirectory() as folder:
        copy = Path(folder)/'repository'
        shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns('.*', 'docs', '_build', '__pycache__', 'demo', 'bench'))
        for path in (copy/'nbs').rglob('*.ipynb'): path.write_text(json.dumps(on_module(json.loads(path.read_text()))))
        for path in [copy/'nbs'/name for name in names] or [copy/'nbs']: nbdev_test(path, flags=flags, n_workers=0, timing=True)


if __name__ == '__main__': sys.exit(main(*sys.argv[1:]))
