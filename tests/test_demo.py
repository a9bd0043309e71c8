"The command `sgdrop-demo`, as a user meets it: what it writes, and what it says when it cannot"
import json, os, signal, subprocess, sys, time
from pathlib import Path

import pytest

from sgdrop import demo

FIELDS = {'method', 'seed', 'acc_present', 'acc_absent', 'acc_misleading', 'cue_share', 'epoch_ratio'}


def quick(out, *more): return demo.main(['--epochs', '1', '--seeds', '1', '--jobs', '1', '--out', str(out), *more])


def test_it_writes_a_record_per_method_and_seed_and_a_picture(tmp_path, capsys):
    assert quick(tmp_path / 'new' / 'folder') == 0
    records = json.loads((tmp_path / 'new' / 'folder' / 'demo.json').read_text())
    assert [(r['method'], r['seed']) for r in records] == [('plain', 0), ('random', 0), ('sgdrop', 0)]
    assert all(set(r) == FIELDS for r in records)
    assert all(0 <= r[k] <= 1 for r in records for k in FIELDS - {'method', 'seed', 'epoch_ratio'})
    assert records[0]['epoch_ratio'] == 1
    assert (tmp_path / 'new' / 'folder' / 'demo.png').read_bytes().startswith(b'\x89PNG')
    assert 'cue misleading' in capsys.readouterr().out


def test_the_same_seed_gives_the_same_result(tmp_path):
    for out in 'ab': quick(tmp_path / out)
    first, second = (json.loads((tmp_path / out / 'demo.json').read_text()) for out in 'ab')
    timeless = lambda records: [{k: v for k, v in r.items() if k != 'epoch_ratio'} for r in records]
    assert timeless(first) == timeless(second)


@pytest.mark.parametrize('args, said', [
    (['--data', 'cats'], "invalid choice: 'cats'"), (['--seeds', '0'], "got '0'"), (['--epochs', 'two'], "got 'two'"), (['--colour'], 'unrecognized arguments: --colour')])
def test_a_wrong_option_is_one_line(args, said, capsys):
    with pytest.raises(SystemExit) as stopped: demo.main(args)
    err = capsys.readouterr().err
    assert stopped.value.code == 2 and err.count('\n') == 1 and said in err


def fails_with_one_line(status, said, capsys, tmp_path):
    err = capsys.readouterr().err
    return status == 1 and err.count('\n') == 1 and said in err and not list(tmp_path.rglob('demo.*'))


def test_a_folder_that_cannot_be_written_is_told_before_training(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(demo, 'run_demo', lambda *a, **k: pytest.fail('trained before looking at the folder'))
    (tmp_path / 'file').write_text('')
    assert fails_with_one_line(quick(tmp_path / 'file' / 'deeper'), 'is not a folder', capsys, tmp_path)


def test_a_read_only_folder_is_told_before_training(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(demo, 'run_demo', lambda *a, **k: pytest.fail('trained before looking at the folder'))
    monkeypatch.setattr(demo.os, 'access', lambda *a: False)  # root may write anywhere, so a real read-only folder would not do
    assert fails_with_one_line(quick(tmp_path), 'no permission', capsys, tmp_path)


def test_a_missing_set_without_network_is_one_line(tmp_path, capsys, empty_machine, no_network):
    assert fails_with_one_line(quick(tmp_path, '--data', 'imagenette'), 'could not be downloaded', capsys, tmp_path)


def test_a_failed_write_leaves_nothing_half_written(tmp_path, monkeypatch):
    def full(self, content): raise OSError('no space left on device')
    monkeypatch.setattr(demo.Path, 'write_bytes', full)
    with pytest.raises(OSError): demo.write_whole(tmp_path / 'demo.json', b'[]')
    assert not list(tmp_path.iterdir())


def group_lives(leader):
    try: os.killpg(leader, 0)
    except ProcessLookupError: return False
    return True


def wait_for(happened, seconds=120):
    until = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < until, f'nothing happened in {seconds} s'
        time.sleep(0.2)


@pytest.mark.skipif(not sys.platform.startswith('linux'), reason='looks at processes through /proc')
def test_an_interrupt_ends_every_process_and_writes_nothing(tmp_path):
    call = 'import sys; from sgdrop.cli import demo\nif __name__ == "__main__": sys.argv[0] = "sgdrop-demo"; sys.exit(demo())'
    # a shell starts background jobs, and so perhaps these tests, with SIGINT ignored; a user's terminal does not
    process = subprocess.Popen([sys.executable, '-c', call, '--epochs', '500', '--seeds', '2', '--jobs', '2', '--out', str(tmp_path / 'out')],
                               stderr=subprocess.PIPE, text=True, start_new_session=True, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    try:
        wait_for(lambda: len(Path(f'/proc/{process.pid}/task/{process.pid}/children').read_text().split()) >= 3)  # two workers and their tracker
        time.sleep(2)
        os.killpg(process.pid, signal.SIGINT)  # as Ctrl-C does: to the whole group
        _, err = process.communicate(timeout=120)
    except BaseException:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    assert process.returncode == 130 and err == 'sgdrop-demo: interrupted; nothing was written\n'
    assert not (tmp_path / 'out').exists()
    wait_for(lambda: not group_lives(process.pid), seconds=30)


@pytest.mark.photographs
def test_photographs_are_measured_too(tmp_path):
    learn, record = demo.train('imagenette', 'sgdrop', seed=0, epochs=1)
    assert {'acc_valid', 'nll_valid', 'attribution_ratio', 'seconds'} <= set(record)
    assert len(learn.dls.valid_ds) == 3925 and list(learn.dls.vocab)[-1] == 'tench'
