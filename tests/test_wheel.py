"The wheel works outside the repository: names, tables and the command `sgdrop`."
import json
import os
import shutil
import subprocess
import sys

import pytest

from site_tools import ROOT

SOURCES = ('pyproject.toml', 'setup.py', 'settings.ini', 'MANIFEST.in', 'README.md',
           'LICENSE')


@pytest.fixture(scope='module')
def installed(tmp_path_factory):
    "A function that runs a command where only the wheel is installed"
    folder = tmp_path_factory.mktemp('wheel')
    source, target = folder / 'source', folder / 'installed'
    shutil.copytree(ROOT / 'sgdrop', source / 'sgdrop')
    for name in SOURCES: shutil.copy(ROOT / name, source)
    pip = [sys.executable, '-m', 'pip', '--quiet', '--disable-pip-version-check']
    # setuptools, which builds the wheel, is one of the development tools
    subprocess.run([*pip, 'wheel', '--no-deps', '--no-build-isolation', '-w', folder,
                    source], check=True)
    wheel, = folder.glob('*.whl')
    subprocess.run([*pip, 'install', '--no-deps', '--no-index', '--target', target,
                    wheel], check=True)
    def run(*command):
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True,
                              env={**os.environ, 'PYTHONPATH': str(target)})
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout
    run.folder, run.target = folder, target
    return run


def test_names_and_tables_are_in_the_wheel(installed):
    code = '''if True:
        import sgdrop
        from sgdrop.all import *
        from sgdrop.experiments.runner import rows
        print(sgdrop.__file__, SGDropCallback.__name__, len(rows('changes')))'''
    path, name, n_rows = installed(sys.executable, '-c', code).split()
    assert path.startswith(str(installed.target)) and name == 'SGDropCallback'
    assert int(n_rows) > 0


def test_the_demo_runs_from_the_wheel(installed):
    out = installed.folder / 'demo'
    installed(sys.executable, installed.target / 'bin/sgdrop', 'demo', '--seeds', '1',
              '--epochs', '1', '--out', out)
    records = json.loads((out / 'demo.json').read_text())
    assert [r['method'] for r in records] == ['plain', 'random', 'sgdrop']
