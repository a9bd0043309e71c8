"What is left out without the image sets, and the command that fetches them"
import ast
import json
import tarfile

import pytest

from sgdrop import cli
from sgdrop import data as sgdrop_data
from sgdrop.data import IMAGE_SETS, flower_name, found_set, missing_sets
from site_tools import ROOT

READERS = set('''untar_data fetch_set
    imagenette_path imagenette flowers17_path flowers17
    benchmark_files benchmark_loaders benchmark_learner run_benchmark reproduced
    run_overfocusing run_traps run_changes run_transfer'''.split())
FUNCTIONS = ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda


def code_cells(notebook):
    cells = json.loads(notebook.read_text(encoding='utf-8'))['cells']
    sources = (''.join(c['source']) for c in cells if c['cell_type'] == 'code')
    return [(s, ast.parse(s)) for s in sources if not s.startswith(('%', '!'))]


def name_of(call): return getattr(call.func, 'id', getattr(call.func, 'attr', None))


def fails_before(node):
    "Detect `with expect_fail(...)`: such a call fails before it reads a set"
    if not isinstance(node, ast.With): return False
    calls = [i.context_expr for i in node.items if isinstance(i.context_expr, ast.Call)]
    return 'expect_fail' in map(name_of, calls)


def executed(node):
    "Yield the nodes that run with a cell: not the bodies of functions"
    yield node
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, FUNCTIONS) and not fails_before(child):
            yield from executed(child)


def reads_sets(nodes, readers):
    "Check for a call that reads an image set"
    for node in nodes:
        if not isinstance(node, ast.Call): continue
        if name_of(node) in readers: return True
        first = getattr(node.args[0], 'value', None) if node.args else None
        if name_of(node) in ('new_learner', 'train') and first in list(IMAGE_SETS):
            return True
    return False


def bound(tree):
    "Return the names that a cell makes"
    stored = {n.id for n in executed(tree)
              if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    return stored | {n.name for n in tree.body if hasattr(n, 'name')}


def wrong_cells(cells):
    "Return cells that need photographs and are not marked so, or the reverse"
    readers, of_flagged, wrong = set(READERS), set(), []
    for source, tree in cells:
        loaded = {n.id for n in executed(tree)
                  if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)}
        makes, flagged = bound(tree), '#| photographs' in source.splitlines()
        uses = bool((loaded - makes) & of_flagged)
        needs = uses or reads_sets(executed(tree), readers)
        if needs != flagged: wrong.append(source)
        of_flagged = of_flagged | makes if flagged else of_flagged - makes
        for f in tree.body:
            if isinstance(f, ast.FunctionDef) and reads_sets(ast.walk(f), readers):
                readers.add(f.name)
    return wrong


NOTEBOOKS = sorted(p.relative_to(ROOT) for p in (ROOT / 'nbs').rglob('[!.]*.ipynb'))


@pytest.mark.parametrize('notebook', NOTEBOOKS, ids=str)
def test_cells_that_need_photographs_are_marked_and_no_others(notebook):
    assert not wrong_cells(code_cells(ROOT / notebook))


@pytest.mark.parametrize('cells, wrong', [
    (['dls = imagenette()'], [0]),
    (['#| photographs\ndls = imagenette()'], []),
    (['#| photographs\nx = 1'], [0]),
    (['#| photographs\ndls = flowers17()', 'len(dls)'], [1]),
    (['#| photographs\nx = flowers17()', 'x = 1', 'x + 1'], []),
    (['def f(): return imagenette()', 'f()'], [1]),
    (["new_learner('imagenette', 0)"], [0]),
    (['with expect_fail(ValueError): flowers17(80)'], [])])
def test_the_check_of_cells(cells, wrong):
    assert wrong_cells([(c, ast.parse(c)) for c in cells]) == [cells[i] for i in wrong]


@pytest.fixture
def archives(tmp_path, empty_machine, monkeypatch):
    "Small archives in place of those on the network"
    def pack(name, *files):
        with tarfile.open(tmp_path / name, 'w:gz') as tar:
            for file in files:
                (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
                (tmp_path / file).write_bytes(b'an image')
                tar.add(tmp_path / file, file)
        return (tmp_path / name).as_uri()
    image = 'imagenette2-160/train/n01440764/a.JPEG'
    urls = dict(imagenette=pack('imagenette2-160.tgz', image),
                flowers17=pack('17flowers.tgz', 'jpg/image_0081.jpg', 'jpg/files.txt'))
    local = {name: (urls[name], *rest[1:]) for name, rest in IMAGE_SETS.items()}
    monkeypatch.setattr(sgdrop_data, 'IMAGE_SETS', local)


def test_the_sets_are_fetched_once(archives, empty_machine, capfd):
    assert missing_sets() == ['imagenette', 'flowers17']
    assert cli.data([]) == 0
    said = capfd.readouterr().out
    assert 'imagenette2-160 (fetched)' in said and '17flowers (fetched)' in said
    assert missing_sets() == []
    flowers = found_set('flowers17')
    assert flowers == empty_machine / '17flowers'
    assert [flower_name(f) for f in flowers.glob('*.jpg')] == ['snowdrop']
    assert (found_set('imagenette') / 'train/n01440764/a.JPEG').exists()
    assert cli.data([]) == 0
    assert capfd.readouterr().out.count('(already there)') == 2


def test_one_set_is_fetched_by_name(archives, capfd):
    assert cli.data(['flowers17']) == 0 and missing_sets() == ['imagenette']
    capfd.readouterr()
    assert cli.data(['--missing']) == 0 and capfd.readouterr().out == 'imagenette\n'


def test_a_failed_download_is_one_line_with_the_set_and_its_address(
        empty_machine, no_network, capsys):
    assert cli.data(['flowers17']) == 1
    said = capsys.readouterr()
    assert said.out == '' and said.err.count('\n') == 1
    assert 'flowers17 is not on this machine' in said.err
    assert IMAGE_SETS['flowers17'][0] in said.err


def test_a_broken_archive_is_one_line(archives, tmp_path, capsys):
    (tmp_path / '17flowers.tgz').write_bytes(b'<html>moved</html>')
    assert cli.data([]) == 1 and missing_sets() == ['flowers17']
    assert capsys.readouterr().err.count('\n') == 1
