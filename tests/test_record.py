"The recorded runs: each kind on tiny pictures, and the committed tables"
import json
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from sgdrop import data, record
from sgdrop.experiments.runner import read_rows, settings_key
from sgdrop.data import FLOWERS17_CLASSES, flowers17, flowers17_path, imagenette
from sgdrop.experiments.demo import main
from sgdrop.experiments.tutorials import RECORDINGS, recorded

RESULTS = Path(__file__).parents[1] / 'results'


@pytest.fixture
def with_tiny_sets(tiny_sets, monkeypatch):
    monkeypatch.setattr(data, 'imagenette_path', lambda: tiny_sets / 'imagenette')
    monkeypatch.setattr(data, 'flowers17_path', lambda: tiny_sets / 'flowers17')
    few = lambda seed, n_per_class=8, **kwargs: imagenette(n_per_class=8, seed=seed, size=32, **kwargs)
    monkeypatch.setattr(record, 'PHOTOGRAPHS', dict(imagenette=few, flowers17=partial(flowers17, n_per_class=8, size=32)))
    monkeypatch.setattr(record, 'focus_measures', partial(record.focus_measures, n=20))


@pytest.mark.parametrize('name', [n for n in RECORDINGS if n != 'networks'])
def test_a_run_of_each_kind(name, with_tiny_sets):
    "The last settings of each plan, for one epoch: a row that can be stored"
    row = RECORDINGS[name].run(RECORDINGS[name].plan[-1] | dict(epochs=1))
    assert json.loads(json.dumps(row)) == row
    accuracies = [v for k, v in row.items() if k.endswith('accuracy')]
    assert accuracies and all(0 <= a <= 1 for a in accuracies)


def test_a_refused_network_makes_a_row_that_says_why():
    row = record.run_network(dict(library='torchvision', name='vit_b_32', size=224))
    assert json.loads(json.dumps(row)) == row and not row['trained'] and 'transformers are not supported' in row['refused']


def test_the_same_settings_make_the_same_row(with_tiny_sets):
    settings = record.TRAPS[-1] | dict(epochs=2)
    assert record.run_traps(settings) == record.run_traps(settings)


def test_kept_maps_are_of_the_images_that_are_named(with_tiny_sets, tiny_sets):
    row = record.run_overfocusing(dict(method='plain', seed=0, epochs=2))
    assert len(row['history']) == 2 and [e for e in row['maps']] == ['0', '1']
    assert np.array(row['maps']['1']).shape == np.array(row['gradcam_maps']['1']).shape == (20, 4, 4)
    assert len({name.split('/')[0] for name in row['images']}) == 10
    assert all((tiny_sets / 'imagenette' / 'val' / name).exists() for name in row['images'])


@pytest.mark.parametrize('name', RECORDINGS)
def test_plans_are_what_can_be_stored(name):
    keys = [settings_key(settings) for settings in RECORDINGS[name].plan]
    assert len(set(keys)) == len(keys)


@pytest.mark.parametrize('name', RECORDINGS)
def test_committed_tables_are_complete(name):
    "No run is missing, none is there twice or outside the plan"
    rows = read_rows(RESULTS / f'{name}.jsonl')
    assert sorted(row['key'] for row in rows) == sorted(map(settings_key, RECORDINGS[name].plan))
    table = recorded(name, RESULTS)
    assert table.key.tolist() == [settings_key(s) for s in RECORDINGS[name].plan]
    for row, settings in zip(table.to_dict('records'), RECORDINGS[name].plan):
        assert all(row[k] == v or (v is None and pd.isna(row[k])) for k, v in settings.items())


def test_flowers_are_divided_as_promised(with_tiny_sets):
    splits = [flowers17(40, seed=seed, num_workers=0, size=32) for seed in (0, 0, 1)]
    train = [sorted(f.name for f in dls.train_ds.items) for dls in splits]
    assert train[0] == train[1] != train[2]
    assert len(splits[0].train_ds) == len(splits[0].valid_ds) == 680
    assert set(splits[0].vocab) == set(FLOWERS17_CLASSES)
    assert not set(splits[0].train_ds.items) & set(splits[0].valid_ds.items)


def test_missing_sets_are_one_line(empty_machine, no_network, tmp_path, capsys):
    with pytest.raises(FileNotFoundError, match='its folder belongs at .*flowers17'): flowers17_path()
    assert main(['changes', '--out', str(tmp_path / 'results')]) == 1
    error = capsys.readouterr().err
    assert error.count('\n') == 1 and 'imagenette2-160.tgz (<urlopen error no network>)' in error


def test_an_interruption_is_told_and_keeps_what_is_done(monkeypatch, tmp_path, capsys):
    def run(settings):
        if settings['n'] == 2: raise KeyboardInterrupt
        return dict(accuracy=0.5)
    monkeypatch.setitem(RECORDINGS, 'traps', record._Recording([dict(n=n) for n in range(4)], run, 1, ()))
    assert main(['traps', '--out', str(tmp_path)]) == 130
    assert 'interrupted' in capsys.readouterr().err
    assert [row['n'] for row in read_rows(tmp_path / 'traps.jsonl')] == [0, 1]
