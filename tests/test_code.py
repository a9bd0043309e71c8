"The code as a reader of it meets it: nothing a linter would complain of, every public function annotated, requirements that fit each other."
import inspect
import subprocess
import sys

import pytest

from site_tools import ROOT, website

EVENTS = 'before_', 'after_'  # of fastai's callbacks, which take and return nothing


def public_functions():
    "Exported functions, and the public methods of exported classes that are the package's own"
    for module in website.modules():
        for name in getattr(module, '__all__', []):
            o = getattr(module, name)
            if inspect.isfunction(o): yield name, o
            if not inspect.isclass(o): continue
            for k, method in vars(o).items():
                ours = inspect.isfunction(method) and method.__module__.startswith('sgdrop') and '<' not in method.__qualname__
                if ours and (k == '__init__' or not k.startswith(('_', *EVENTS))): yield f'{name}.{k}', method


FUNCTIONS = dict(public_functions())


@pytest.mark.parametrize('name', FUNCTIONS)
def test_annotated(name):
    signature = inspect.signature(FUNCTIONS[name])
    silent = [k for k, p in signature.parameters.items() if p.annotation is p.empty and k not in ('self', 'cls')]
    assert not silent, f'no type for {", ".join(silent)}'
    assert name.endswith('__init__') or signature.return_annotation is not inspect.Signature.empty, 'no type for what it returns'


def clean(*command):
    done = subprocess.run([sys.executable, '-m', *command], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_ruff(): clean('ruff', 'check', '--no-cache', 'sgdrop', 'tests', 'docs')
def test_requirements_fit_each_other(): clean('pip', 'check')
