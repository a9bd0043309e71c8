"The experiments: each kind of run on tiny images, the committed tables, the command"
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from functools import partial
from inspect import signature
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from sgdrop.data import CUES
from sgdrop.dropout import SGDrop
from sgdrop.experiments import benchmark, shortcuts, touch, training, tutorials
from sgdrop.experiments.benchmark import chosen
from sgdrop.experiments.main import experiments, main
from sgdrop.experiments.runner import TABLES, read_rows, rows, settings_key
from sgdrop.experiments.training import ratios, take_turns

ROOT = Path(__file__).resolve().parent.parent
FIELDS = ['method', 'seed', 'acc_present', 'acc_absent', 'acc_misleading', 'cue_share',
          'epoch_ratio']


# Tables

@pytest.mark.parametrize('name', experiments())
def test_committed_tables_are_their_plans(name):
    "Each planned run is there once, and no other"
    planned = [settings_key(s) for s in experiments()[name].planned(TABLES)]
    found = read_rows(TABLES / f'{name}.jsonl')
    assert sorted(row['key'] for row in found) == sorted(planned)
    for row in found:
        settings = json.loads(row['key'])
        assert all(row[k] == v or v is None and pd.isna(row[k])
                   for k, v in settings.items())


def test_the_defaults_are_the_chosen_settings():
    settings = chosen(rows('tuning'))['sgdrop']['sgdrop']
    parameters = signature(SGDrop).parameters
    assert {name: parameters[name].default for name in settings} == settings


def test_the_chosen_settings_have_the_best_mean_of_their_tries():
    tries = defaultdict(list)
    for row in rows('tuning').to_dict('records'):
        tries[row['method'], settings_key(row['recipe'])].append(row['accuracy'])
    best = {}
    for (method, recipe), found in tries.items():
        mean = statistics.mean(found)
        if mean > best.get(method, (0, None))[0]:
            best[method] = mean, json.loads(recipe)
    assert chosen(rows('tuning')) == {m: recipe for m, (_, recipe) in best.items()}


def test_pages_quote_the_headline_table():
    table, quoted = 100 * shortcuts.headline().round(4), set()
    for cue in ('absent', 'present'):
        quoted.add(f'{table[cue].plain:.0f} → {table[cue].sgdrop:.0f} %')
    paths = [ROOT / 'README.md', *(ROOT / 'nbs').rglob('*.ipynb')]
    pages = {str(path.relative_to(ROOT)): path.read_text('utf-8') for path in paths}
    found = {name: set(re.findall(r'\*\*(\d+ → \d+ %)\*\*', text))
             for name, text in pages.items()}
    for name in ('README.md', 'nbs/index.ipynb', 'nbs/method_card.ipynb'):
        assert found[name] == quoted and f'{table.absent.cutmix:.0f} %' in pages[name]
    assert set.union(*found.values()) == quoted


# Runs

@pytest.fixture
def tiny_images(tiny_sets, monkeypatch):
    "Let the experiments train on few small images of noise"
    for module in ('data', 'experiments.training'):
        monkeypatch.setattr(f'sgdrop.{module}.fetch_set', lambda name: tiny_sets / name)
    for name in ('imagenette', 'flowers17'):
        few = partial(getattr(tutorials, name), size=32)
        def loaders(n_per_class=8, few=few, **kwargs):
            return few(n_per_class=8, **kwargs)
        monkeypatch.setattr(tutorials, name, loaders)
    fewer = partial(tutorials._focus_measures, n=20)
    monkeypatch.setattr(tutorials, '_focus_measures', fewer)


def stored(results):
    return json.loads(json.dumps(results, default=lambda a: a.tolist()))


@pytest.mark.parametrize('name', ['overfocusing', 'traps', 'changes', 'transfer'])
def test_a_run_of_each_tutorial(name, tiny_images):
    experiment = experiments()[name]
    row = stored(experiment.run(experiment.plan[-1] | dict(epochs=1)))
    assert experiment.value in row
    assert all(0 <= v <= 1 for k, v in row.items() if k.endswith('accuracy'))


def test_the_same_settings_make_the_same_row(tiny_images):
    experiment = experiments()['traps']
    settings = experiment.plan[-1] | dict(epochs=1)
    assert experiment.run(settings) == experiment.run(settings)


def test_kept_maps_are_of_the_images_that_are_named(tiny_images, tiny_sets):
    settings = dict(method='plain', seed=0, epochs=2)
    row = stored(experiments()['overfocusing'].run(settings))
    assert len(row['history']) == len(row['gradcam_history']) == 2
    assert np.array(row['maps']['1']).shape == (20, 4, 4)
    assert np.array(row['gradcam_maps']['1']).shape == (20, 4, 4)
    assert len({name.split('/')[0] for name in row['images']}) == 10
    folder = tiny_sets / 'imagenette' / 'val'
    assert all((folder / name).exists() for name in row['images'])


def test_a_run_of_the_benchmark(tiny_images):
    settings = dict(dataset='flowers17', share=0.2, arch='resnet', part='tuning',
                    split_seed=0, seed=0, epochs=1, recipe=dict(sgdrop={}))
    row = stored(benchmark._run(settings))
    assert 0 <= row['accuracy'] <= 1 and 'step_ratio' not in row


@pytest.fixture
def tiny_shares(tiny_images, monkeypatch):
    "Let a share of a set be a few of its tiny images"
    monkeypatch.setattr(training, 'PHOTOGRAPHS', {
        name: data._replace(n_tuning=1, per_class=1000)
        for name, data in training.PHOTOGRAPHS.items()})


SMALL_RUN = dict(seed=0, split_seed=0, part='test', share=0.007, size=32, epochs=1,
                 correlation=None, train_correlation=None, arch='resnet')


@pytest.mark.parametrize('dataset, cue, recipe', [
    ('imagenette', 'watermark', dict(sgdrop=dict(rounds=2))),
    ('imagenette', 'frame', dict(rsc={})), ('bar', 'place', dict(jtt=dict(epochs=1))),
    ('pacs/sketch', 'style', dict(decoupling=dict(penalty=0.1))),
    ('flowers17', None, dict(weight_decay=dict(wd=0.1)))])
def test_a_run_with_each_kind_of_shortcut(
        dataset, cue, recipe, tiny_shares):
    painted = cue in ('watermark', 'frame')
    if painted: correlation = dict(correlation=0.95, train_correlation=0.95)
    settings = SMALL_RUN | dict(dataset=dataset, cue=cue, recipe=recipe)
    row = stored(shortcuts._run(settings | (correlation if painted else {})))
    assert list(row)[:3] == ['present', 'absent', 'misleading']
    assert [row[cue] is None for cue in row if cue in CUES] == [
        not cue, False, not painted]
    assert ('on_cue' in row) == painted
    assert (row['kept'] is not None) == ('sgdrop' in recipe)


def test_a_whole_map_has_the_accuracy_of_the_network(tiny_shares):
    settings = SMALL_RUN | dict(dataset='imagenette', cue='watermark', recipe={},
                                correlation=1., train_correlation=1.)
    row = shortcuts._run_spread(settings)
    assert row['misleading'] == pytest.approx(shortcuts._run(settings)['misleading'])
    assert 0 < row['dropped'] <= 1


def test_a_run_for_the_interactive_figures(tiny_shares):
    settings = dict(recipe=dict(sgdrop={}), seed=0, share=0.007, size=32, epochs=1)
    row = stored(touch._run(settings))
    assert row['absent'] == pytest.approx(row['training']['absent'][0] / 100, abs=0.006)
    assert np.array(row['training']['maps']).shape == (1, 4, 4 * 4)
    assert np.array(row['cover']).shape == (5 * 5, 4, 10)
    dropped = [mask['dropped'] for mask in row['rho']['masks']]
    assert dropped[0] == [0] * 4 and max(dropped[10]) <= 8
    assert sorted(row['rho']['order'][0]) == list(range(4 * 4))


def test_a_refused_network_makes_a_row_that_says_why():
    row = tutorials.run_network(dict(library='torchvision', name='vit_b_32', size=224))
    assert not row['trained'] and 'transformers are not supported' in row['refused']


# Timing

def test_each_turn_has_every_step_once_and_neighbours_change():
    order = []
    steps = {name: partial(order.append, name) for name in 'abc'}
    seconds = take_turns(steps, turns=4)
    turns = [''.join(order[i:i + 3]) for i in range(0, 15, 3)]
    assert all(sorted(turn) == list('abc') for turn in turns)
    assert len(set(turns)) == 5 and seconds.shape == (4, 3)  # the first is not timed


def test_of_two_steps_each_comes_first_equally_often():
    order = []
    take_turns({name: partial(order.append, name) for name in 'ab'}, turns=3)
    assert [''.join(order[i:i + 2]) for i in range(0, 8, 2)] == ['ab', 'ba', 'ba', 'ab']


def test_ratios_are_of_the_same_turn():
    seconds = pd.DataFrame(dict(plain=[1., 10., 1.], other=[2., 20., 2.]))
    assert ratios(seconds).loc['other'].tolist() == [2, 2, 2]


# The command

def test_the_demo_writes_a_record_per_method_and_a_picture(tmp_path, capsys):
    options = ['--epochs', '1', '--seeds', '1', '--out', str(tmp_path / 'new')]
    assert main(['demo', *options]) == 0
    records = json.loads((tmp_path / 'new' / 'demo.json').read_text())
    assert [r['method'] for r in records] == ['plain', 'random', 'sgdrop']
    assert all(list(r) == FIELDS for r in records) and records[0]['epoch_ratio'] == 1
    assert (tmp_path / 'new' / 'demo.png').read_bytes().startswith(b'\x89PNG')
    assert 'cue misleading' in capsys.readouterr().out


def test_an_unwritable_folder_is_told_before_training(tmp_path, capsys, monkeypatch):
    from sgdrop.experiments import demo
    monkeypatch.setattr(demo, 'run_demo', lambda *a, **k: pytest.fail('it trained'))
    (tmp_path / 'file').write_text('')
    assert main(['demo', '--out', str(tmp_path / 'file' / 'deeper')]) == 1
    error = capsys.readouterr().err
    assert error.startswith('sgdrop demo: ') and error.count('\n') == 1


def test_a_missing_set_is_told_before_training(
        empty_machine, no_network, tmp_path, capsys):
    assert main(['run', 'changes', '--out', str(tmp_path / 'results')]) == 1
    error = capsys.readouterr().err
    assert error.count('\n') == 1 and 'could not be downloaded' in error


@pytest.mark.parametrize('argv, said', [
    ([], 'required'), (['dance'], 'invalid choice'), (['demo', '--seeds', 'x'], 'x'),
    (['demo', '--seeds', '0'], 'from 1'), (['demo', '--colour'], 'unrecognized')])
def test_a_wrong_option_is_one_line(argv, said, capsys):
    with pytest.raises(SystemExit) as stopped: main(argv)
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and error.count('\n') == 1 and said in error


def children(pid):
    return Path(f'/proc/{pid}/task/{pid}/children').read_text().split()


@pytest.mark.skipif(not sys.platform.startswith('linux'), reason='looks into /proc')
def test_an_interrupt_ends_every_process_and_writes_nothing(tmp_path):
    command = [str(Path(sys.executable).parent / 'sgdrop'), 'demo', '--epochs', '500',
               '--seeds', '2', '--jobs', '2', '--out', str(tmp_path)]
    def heed_interrupts(): signal.signal(signal.SIGINT, signal.SIG_DFL)
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True,
                               start_new_session=True, preexec_fn=heed_interrupts)
    try:
        end = time.monotonic() + 100
        while len(children(process.pid)) < 3 and time.monotonic() < end: time.sleep(0.2)
        time.sleep(2)
        os.killpg(process.pid, signal.SIGINT)  # as Ctrl-C does: to the whole group
        _, error = process.communicate(timeout=60)
    finally:
        if process.poll() is None: os.killpg(process.pid, signal.SIGKILL)
    assert (process.returncode, error) == (130, 'sgdrop demo: interrupted\n')
    assert not list(tmp_path.iterdir())
