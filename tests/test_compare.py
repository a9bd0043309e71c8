"The runner of experiments under kills and competition: every run exactly once, whatever happens"
import json, signal, subprocess, sys, tempfile, threading, time
from pathlib import Path

import pytest
from filelock import FileLock, Timeout
from hypothesis import given, settings as hypothesis_settings, strategies as st

from sgdrop import compare
from sgdrop.experiments.runner import append_row, read_rows, run_plan, settings_key

WORKER = '''
import os, sys, time
from pathlib import Path
from sgdrop.experiments.runner import run_plan

folder, name, n, sleep, stuck_at = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), float(sys.argv[4]), int(sys.argv[5])

def run(settings):
    with open(folder / 'log', 'a') as log: log.write(f"{name} {settings['i']}\\n")
    time.sleep(60 if settings['i'] == stuck_at else sleep)
    return dict(by=name)

(folder / f'{name}.ready').touch()
while not (folder / 'go').exists(): time.sleep(0.01)
run_plan([dict(i=i) for i in range(n)], run, folder / 'rows.jsonl')
'''


def plan_of(n): return [dict(i=i) for i in range(n)]


def wait_for(condition, seconds=30):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, 'waited in vain'
        time.sleep(0.01)


class Workers:
    "Processes at work on one plan of `n` runs"
    def __init__(self, folder): self.folder, self.path, self.processes = folder, folder / 'rows.jsonl', []

    def start(self, *names, n, sleep=0., stuck_at=-1):
        "One process per name, beginning together"
        new = [subprocess.Popen([sys.executable, '-c', WORKER, str(self.folder), name, str(n), str(sleep), str(stuck_at)]) for name in names]
        self.processes += new
        wait_for(lambda: all((self.folder / f'{name}.ready').exists() for name in names))
        (self.folder / 'go').touch()
        return new

    def log(self):
        "(name of process, run) of each start"
        lines = (self.folder / 'log').read_text().splitlines() if (self.folder / 'log').exists() else []
        return [(name, int(i)) for name, i in map(str.split, lines)]

    def nothing_is_left(self): return not list(self.folder.glob('rows.jsonl?*'))


@pytest.fixture
def workers(tmp_path):
    w = Workers(tmp_path)
    yield w
    for process in w.processes: process.kill(); process.wait()


def each_once(path, n): return sorted(row['i'] for row in read_rows(path)) == list(range(n))


def test_a_killed_process_loses_only_the_run_in_the_middle(workers):
    process, = workers.start('first', n=6, stuck_at=3)
    wait_for(lambda: ('first', 3) in workers.log())
    process.send_signal(signal.SIGKILL)
    process.wait()

    run_again = []
    rows = run_plan(plan_of(6), lambda settings: run_again.append(settings['i']) or dict(by='second'), workers.path)
    assert run_again == [3, 4, 5]
    assert [(row['i'], row['by']) for row in rows] == [*((i, 'first') for i in range(3)), *((i, 'second') for i in range(3, 6))]
    assert each_once(workers.path, 6) and workers.nothing_is_left()


def test_two_processes_share_a_plan(workers):
    processes = workers.start('one', 'two', n=12, sleep=0.05)
    assert [process.wait(30) for process in processes] == [0, 0]
    assert sorted(i for _, i in workers.log()) == list(range(12))
    assert each_once(workers.path, 12) and workers.nothing_is_left()
    assert {row['by'] for row in read_rows(workers.path)} == {'one', 'two'}


def test_the_run_of_a_process_that_dies_is_taken_over(workers):
    process, = workers.start('dies', n=1, stuck_at=0)
    wait_for(lambda: ('dies', 0) in workers.log())
    done = []

    def run(settings):
        if settings['i'] == 2: threading.Timer(0.3, process.kill).start()  # now only the claimed run is left
        done.append((settings['i'], process.poll()))
        return {}

    rows = run_plan(plan_of(3), run, workers.path)
    assert done == [(1, None), (2, None), (0, -signal.SIGKILL)] and [row['i'] for row in rows] == [0, 1, 2]
    assert each_once(workers.path, 3) and workers.nothing_is_left()


def test_many_at_once_on_overlapping_plans(tmp_path, monkeypatch):
    monkeypatch.setattr(compare, '_POLL_SECONDS', 0.01)
    path, started, failed = tmp_path / 'rows.jsonl', [], []

    def run(settings):
        started.append(settings['i'])
        time.sleep(0.002)
        return dict(square=settings['i']**2)

    def work(plan):
        try: assert [row['square'] for row in run_plan(plan, run, path)] == [s['i']**2 for s in plan]
        except BaseException as e: failed.append(e)

    threads = [threading.Thread(target=work, args=[plan]) for plan in (plan_of(24), plan_of(8), plan_of(24)[::-1], plan_of(24)[4:20:2])]
    for thread in threads: thread.start()
    for thread in threads: thread.join(30)
    assert not failed and sorted(started) == list(range(24)) and each_once(path, 24)
    assert [p.name for p in tmp_path.iterdir()] == ['rows.jsonl']


def test_a_finished_plan_leaves_the_claims_of_others(tmp_path):
    path = tmp_path / 'rows.jsonl'
    with FileLock(compare._claim_file(path, settings_key(dict(i=5)))):
        run_plan(plan_of(2), lambda settings: {}, path)
        with pytest.raises(Timeout): FileLock(compare._claim_file(path, settings_key(dict(i=5)))).acquire(timeout=0)


@pytest.mark.parametrize('error', [RuntimeError, KeyboardInterrupt])
def test_a_run_that_fails_gives_its_claim_back_and_leaves_no_row(error, tmp_path):
    def run(settings):
        if settings['i'] == 1: raise error('out of memory')
        return {}
    path = tmp_path / 'rows.jsonl'
    with pytest.raises(error, match='out of memory'): run_plan(plan_of(3), run, path)
    assert [row['i'] for row in read_rows(path)] == [0]
    assert [row['i'] for row in run_plan(plan_of(3), lambda settings: {}, path)] == [0, 1, 2]


def test_a_run_cannot_change_the_plan(tmp_path):
    plan = [dict(i=0, widths=[1, 2])]
    row, = run_plan(plan, lambda settings: settings['widths'].append(settings.pop('i')) or {}, tmp_path / 'rows.jsonl')
    assert plan == [dict(i=0, widths=[1, 2])] and row['i'] == 0 and row['widths'] == [1, 2]


def test_errors_in_the_plan_come_before_any_run(tmp_path):
    def never(settings): pytest.fail('it ran')
    for plan, said in [(plan_of(2) + plan_of(1), 'twice'), ([dict(key=1)], "'key'"), ([*plan_of(1), dict(i=(1,))], 'did you mean')]:
        with pytest.raises((TypeError, ValueError), match=said): run_plan(plan, never, tmp_path / 'rows.jsonl')
    assert run_plan([], never, tmp_path / 'rows.jsonl') == []


def test_the_bar_counts_rows(tmp_path, monkeypatch):
    seen = []
    def bar(gen, total, leave):
        for row in gen: seen.append(total); yield row
    monkeypatch.setattr(compare, 'progress_bar', bar)
    path = tmp_path / 'new' / 'folder' / 'rows.jsonl'
    run_plan(plan_of(2), lambda settings: {}, path)
    assert not seen
    run_plan(plan_of(5), lambda settings: {}, path, show_bar=True)
    assert seen == [5] * 5


any_text = st.text(st.characters(exclude_categories=[]), max_size=8)  # surrogates and control characters too
json_values = st.recursive(st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | any_text | st.just('a\nb\r\u2028c'),
                           lambda inner: st.lists(inner, max_size=3) | st.dictionaries(any_text, inner, max_size=3), max_leaves=6)


@hypothesis_settings(max_examples=60)
@given(st.lists(st.dictionaries(any_text, json_values, max_size=4), min_size=1, max_size=3))
def test_rows_come_back_as_they_were_written(rows):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / 'rows.jsonl'
        for row in rows: append_row(path, row)
        assert read_rows(path) == rows
        assert path.read_bytes().count(b'\n') == len(rows)


def test_a_file_torn_anywhere_in_its_last_line(tmp_path):
    path, first, last, new = tmp_path / 'rows.jsonl', [dict(i=0), dict(i=1)], dict(i=12, text='né\n', more=[1, {'a': None}]), dict(i=2)
    for row in (*first, last): append_row(path, row)
    whole = path.read_bytes()
    begins = whole[:-1].rindex(b'\n') + 1
    for end in range(begins, len(whole)):
        path.write_bytes(whole[:end])
        assert read_rows(path) == first
        append_row(path, new)
        assert read_rows(path) == [*first, new]
    path.write_bytes(whole[:begins] + b'\0' * 20 + b'\n')  # as after a power cut
    append_row(path, new)
    assert read_rows(path) == [*first, new]


@pytest.mark.parametrize('broken', [b'{"i": 1', b'', b'7', b'\xff\xfe', b'{"i": 1}{"i": 2}'])
def test_a_broken_line_in_the_middle_is_named(broken, tmp_path):
    path = tmp_path / 'rows.jsonl'
    path.write_bytes(b'{"i": 0}\n' + broken + b'\n{"i": 2}\n')
    with pytest.raises(ValueError, match=r'rows\.jsonl, line 2: .*mend'): read_rows(path)


def test_what_is_not_finite_is_null_in_the_file(tmp_path):
    path = tmp_path / 'rows.jsonl'
    append_row(path, dict(loss=float('nan'), deep=[dict(x=float('-inf'))]))

    def refuse(literal): raise AssertionError(f'{literal} is not JSON')
    assert json.loads(path.read_text(), parse_constant=refuse) == dict(loss=None, deep=[dict(x=None)])


def test_neither_torch_nor_fastai_is_imported():
    code = "import sys, sgdrop.compare; sys.exit(bool({'torch', 'fastai'} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, '-c', code]).returncode == 0
