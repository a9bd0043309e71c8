"The runner of experiments, interrupted and in several processes"
import json
import os
import signal
import subprocess
import sys
import time

import pytest

from sgdrop.experiments.runner import Experiment, complete, read_rows

WORKER = '''
import sys, time
from pathlib import Path
from sgdrop.experiments.runner import Experiment, complete

def run(settings):
    (Path(sys.argv[1]) / f"started_{settings['i']}").touch()
    time.sleep(60 if settings['i'] == 2 else 0)
    return dict(by='first')

complete(Experiment('table', [dict(i=i) for i in range(4)], run, ''), Path(sys.argv[1]))
'''


def plan_of(n): return [dict(i=i) for i in range(n)]


def square(settings): return dict(accuracy=settings['i'] ** 2, process=os.getpid())


def fail_at_two(settings):
    if settings['i'] == 2: raise RuntimeError('out of memory')
    time.sleep(0.2 * settings['i'])
    return {}


def wait_for(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f'nothing happened in {seconds} s'
        time.sleep(0.05)


@pytest.fixture
def busy(tmp_path):
    "A process in the middle of its third run"
    process = subprocess.Popen([sys.executable, '-c', WORKER, str(tmp_path)])
    wait_for((tmp_path / 'started_2').exists)
    yield process
    process.kill()
    process.wait()


def test_a_killed_process_loses_only_the_run_in_the_middle(busy, tmp_path):
    again = []
    def run(settings): return again.append(settings['i']) or dict(by='second')
    busy.send_signal(signal.SIGKILL)
    busy.wait()
    table = complete(Experiment('table', plan_of(4), run, ''), tmp_path)
    assert again == [2, 3]
    assert table.by.tolist() == ['first', 'first', 'second', 'second']
    assert not (tmp_path / 'table.jsonl.lock').exists()


def test_a_second_process_on_the_same_table_is_refused(busy, tmp_path):
    with pytest.raises(OSError, match='another process is writing .*table.jsonl'):
        complete(Experiment('table', plan_of(4), square, ''), tmp_path)
    assert [row['i'] for row in read_rows(tmp_path / 'table.jsonl')] == [0, 1]


def test_processes_share_a_plan(tmp_path):
    table = complete(Experiment('table', plan_of(6), square, ''), tmp_path, jobs=2)
    assert table.i.tolist() == list(range(6))
    assert table.accuracy.tolist() == [0, 1, 4, 9, 16, 25]
    assert os.getpid() not in table.process.tolist()


@pytest.mark.parametrize('jobs', [1, 2])
def test_a_run_that_fails_ends_the_plan_and_keeps_the_rest(jobs, tmp_path):
    failing = Experiment('table', plan_of(40), fail_at_two, '')
    began = time.monotonic()
    with pytest.raises(RuntimeError, match='out of memory'):
        complete(failing, tmp_path, jobs=jobs)
    assert time.monotonic() - began < 60
    found = {row['i'] for row in read_rows(tmp_path / 'table.jsonl')}
    assert found <= {0, 1, 3, 4, 5} and (jobs == 2 or found == {0, 1})


def test_a_table_torn_anywhere_in_its_last_line(tmp_path):
    path, last = tmp_path / 'table.jsonl', Experiment('table', plan_of(3), square, '')
    complete(last, tmp_path)
    whole = path.read_bytes()
    begins = whole[:-1].rindex(b'\n') + 1
    for end in range(begins, len(whole), 40):
        path.write_bytes(whole[:end])
        assert [row['i'] for row in read_rows(path)] == [0, 1]
        assert complete(last, tmp_path).i.tolist() == [0, 1, 2]


def test_a_broken_line_is_named(tmp_path):
    (tmp_path / 'table.jsonl').write_bytes(b'{"i": 0}\n{"i": 1\n{"i": 2}\n')
    with pytest.raises(ValueError, match='table.jsonl has a line that is not JSON'):
        read_rows(tmp_path / 'table.jsonl')


def test_the_rows_tell_their_versions(tmp_path):
    complete(Experiment('table', plan_of(1), square, ''), tmp_path)
    row, = read_rows(tmp_path / 'table.jsonl')
    assert set(row['versions']) == {'sgdrop', 'torch', 'fastai'}
    assert json.loads(row['key']) == dict(i=0)
