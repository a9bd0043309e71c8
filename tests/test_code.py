"Rules for the code: what is documented, what is used, what may import what."
import ast
import functools
import inspect
import re
import subprocess
import sys

from fastcore.docments import docments
from fastcore.nbio import read_nb

from site_tools import ROOT, definitions, exports, module_names, notebooks, public

WIDTH = 88
LIBRARY = 'sgdrop'
WING = 'sgdrop.experiments'
WITH_FASTAI = {f'{LIBRARY}.{m}' for m in ('callback', 'recorder', 'interpret', 'data')}
BELOW = {f'{WING}.training', f'{WING}.runner'}  # what every experiment may import
TOP = f'{WING}.main'
EVENTS = 'before_', 'after_'  # of fastai's callbacks, which take and return nothing


def source(module):
    return (ROOT / f'{module.replace(".", "/")}.py').read_text(encoding='utf-8')


@functools.cache
def imports(module):
    "Return the full names of the modules that `module` imports, inside functions too"
    found = set()
    for node in ast.walk(ast.parse(source(module))):
        if isinstance(node, ast.Import): found |= {a.name for a in node.names}
        if isinstance(node, ast.ImportFrom):
            package = module.split('.')[:-node.level] if node.level else []
            base = '.'.join([*package, *filter(None, [node.module])])
            found |= {base} | {f'{base}.{a.name}' for a in node.names}
    return found


def ours(module): return imports(module) & set(module_names())
def is_experiment(module): return module.startswith(WING)


def code_cells(path):
    return [c for c in read_nb(path).cells if c.cell_type == 'code']


def names_in_all():
    tree = ast.parse(source('sgdrop.all')).body
    return {a.name for n in tree if isinstance(n, ast.ImportFrom) for a in n.names}


def assert_none(found):
    "Fail with one offender a line"
    if isinstance(found, dict): found = [f'{k}: {v}' for k, v in found.items()]
    assert not found, '\n'.join([f'{len(found)} found', *found])


# Documentation

def test_public_names_have_one_line_of_documentation():
    missing = [f'{module}: {name}' for module, code in map(exports, notebooks())
               for cell in code for name, _, about in definitions(cell) if not about]
    long = [f'{module}.{name}' for module, name, o in public()
            if inspect.isclass(o) or inspect.isfunction(o)
            if '\n' in (inspect.getdoc(o) or '')]
    assert_none(missing + long)


def test_public_arguments_have_a_comment():
    silent = {}
    for module, name, o in public():
        if not inspect.isfunction(o):
            if not inspect.isclass(o) or '__init__' not in vars(o): continue
        found = docments(o, full=True, eval_str=False, args_kwargs=True)
        found = [k for k, v in found.items()
                 if k not in ('self', 'return') and not v.docment]
        if found: silent[f'{module}.{name}'] = found
    assert_none(silent)


def public_functions():
    "Yield name and function of public functions, and of public methods"
    for module, name, o in public():
        if inspect.isfunction(o): yield f'{module}.{name}', o
        for k, method in vars(o).items() if inspect.isclass(o) else ():
            own = (inspect.isfunction(method) and method.__module__ == module
                   and '<' not in method.__qualname__)
            if own and (k == '__init__' or not k.startswith(('_', *EVENTS))):
                yield f'{module}.{name}.{k}', method


def test_public_functions_have_types():
    silent = []
    for name, f in public_functions():
        signature = inspect.signature(f)
        without = [k for k, p in signature.parameters.items()
                   if p.annotation is p.empty and k not in ('self', 'cls')]
        returns = signature.return_annotation is not inspect.Signature.empty
        if without or not returns and not name.endswith('__init__'): silent.append(name)
    assert_none(silent)


def test_public_names_are_used_on_their_page():
    unused = []
    for path in notebooks():
        module, exported = exports(path)
        code = '\n'.join(c.source for c in code_cells(path))
        unused += [f'{module}.{name}' for cell in exported
                   for name, _, _ in definitions(cell)
                   if not re.search(rf'\b{name}\b', code.replace(cell, ''))]
    assert_none(unused)


# Names

def test_sgdrop_all_is_short():
    assert len(names_in_all()) <= 45


def single_caller():
    "Yield public functions that only one other function of the package uses"
    users = {}  # name: the functions, classes and modules that use it
    for module in module_names():
        for o in ast.parse(source(module)).body:
            user = getattr(o, 'name', module)
            for node in ast.walk(o):
                used = getattr(node, 'id', getattr(node, 'attr', None))
                if used != user: users.setdefault(used, set()).add(user)
    pages = {exports(p)[0] or p: '\n'.join(c.source for c in code_cells(p))
             for p in notebooks()}
    shared = names_in_all()
    for module, name, o in public():
        if not inspect.isfunction(o) or name in shared: continue
        elsewhere = any(re.search(rf'\b{name}\b', code)
                        for page, code in pages.items() if page != module)
        callers = users.get(name, set())
        if len(callers) == 1 and module not in callers and not elsewhere:
            yield f'{module}.{name}', *callers


def test_helpers_of_one_function_are_private():
    assert_none(dict(single_caller()))


# Imports

def test_experiments_do_not_import_each_other():
    wrong = {}
    for module in filter(is_experiment, module_names()):
        allowed = set(module_names()) if module == TOP else BELOW
        up = {i for i in ours(module) if is_experiment(i)} - allowed
        if up: wrong[module] = up
    assert_none(wrong)


def test_modules_import_from_lower_numbers_only():
    order = [module for path in notebooks() if (module := exports(path)[0])]
    wrong = {m: up for m in order if not is_experiment(m)
             if (up := ours(m) - set(order[:order.index(m)]))}
    assert_none(wrong)


def test_only_some_modules_need_fastai():
    wrong = {}
    for module in module_names():
        if is_experiment(module) or module in WITH_FASTAI: continue
        found = {i for i in imports(module) if i.startswith(('fastai', 'fastcore'))}
        found |= ours(module) & WITH_FASTAI
        if found: wrong[module] = found
    assert_none(wrong)


# Format

def wide(name, text):
    "Yield lines of code that are too wide, but for those with an address"
    for i, line in enumerate(text.splitlines(), 1):
        if len(line) > WIDTH and not line.startswith('#|') and '://' not in line:
            yield f'{name}:{i}: {line}'


def test_lines_fit_the_page():
    # Modules are what the notebooks export, and nbdev's own lines.
    files = [*(ROOT / 'tests').glob('*.py'), *(ROOT / 'docs').glob('*.py'),
             ROOT / 'sgdrop/all.py', ROOT / 'setup.py']
    texts = {p.name: p.read_text(encoding='utf-8') for p in files}
    texts |= {f'{p.stem} {c.id}': c.source for p in notebooks() for c in code_cells(p)
              if 'hide' not in c.directives}
    assert_none([line for name, text in texts.items() for line in wide(name, text)])


def succeeds(command):
    done = subprocess.run([sys.executable, '-m', *command.split()], cwd=ROOT,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_ruff_finds_nothing(): succeeds('ruff check --no-cache sgdrop tests docs')
def test_requirements_fit_each_other(): succeeds('pip check')



def test_workflows_are_valid():
    schema = '--builtin-schema', 'vendor.github-workflows'
    files = [*(ROOT / '.github/workflows').glob('*.yml')]
    done = subprocess.run([sys.executable, '-m', 'check_jsonschema', *schema, *files],
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
