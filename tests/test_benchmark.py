"The benchmark's summaries, from its rows once more: plain Python, without pandas and without the package's own statistics."
import json
from collections import Counter, defaultdict
from inspect import signature
from math import sqrt
from pathlib import Path
from statistics import mean, stdev

import pandas as pd
import pytest
from scipy.stats import t

from sgdrop import bench
from sgdrop.experiments.benchmark import (
    CELL, PAIR, benchmark_plan, by_cell, chosen, differences_to, tuned_in)
from sgdrop.experiments.runner import settings_key
from sgdrop.dropout import SGDrop

RESULTS = Path(__file__).parents[1] / 'results'


def rows_of(name): return [json.loads(line) for line in (RESULTS / f'{name}.jsonl').read_text().splitlines()]
def pair_of(row): return tuple(row[k] for k in PAIR)


@pytest.fixture(scope='module')
def rows(): return rows_of('benchmark')


def slow_differences(rows, value):
    "Method → the differences of its pairs to plain training"
    plain = {pair_of(r): r[value] for r in rows if r['method'] == 'none'}
    found = defaultdict(list)
    for r in rows:
        if r['method'] != 'none' and pair_of(r) in plain: found[r['method']].append(r[value] - plain[pair_of(r)])
    return found


@pytest.mark.parametrize('value', ['accuracy', 'nll', 'calibration_error'])
def test_the_pooled_table_is_what_the_rows_say(rows, value):
    table, slow = differences_to(pd.DataFrame(rows), value), slow_differences(rows, value)
    assert set(table.index) == set(slow)
    for method, d in slow.items():
        half = t.ppf(0.975, len(d) - 1) * stdev(d) / sqrt(len(d))
        expected = [mean(d), mean(d) - half, mean(d) + half, len(d), sum(x > 0 for x in d)]
        assert table.loc[method, ['mean', 'low', 'high', 'n', 'wins']].tolist() == pytest.approx(expected, abs=1e-9)


def test_the_table_of_cells_is_what_the_rows_say(rows):
    table = by_cell(pd.DataFrame(rows), 'accuracy')
    for cell in table:
        part = [r for r in rows if tuple(r[k] for k in CELL) == cell]
        for method, d in slow_differences(part, 'accuracy').items(): assert table.loc[method, cell] == pytest.approx(mean(d), abs=1e-9)


def test_the_rows_are_those_of_the_plan_each_once(rows):
    planned = {settings_key(s) for s in benchmark_plan(tuned_in(RESULTS))}
    counts = Counter(r['key'] for r in rows)
    assert counts.keys() <= planned and set(counts.values()) == {1}
    assert all(0 < r['accuracy'] < 1 and r['nll'] > 0 for r in rows)


def test_the_chosen_settings_have_the_best_mean_of_their_tries():
    tries = defaultdict(list)
    for r in rows_of('tuning'): tries[r['method'], json.dumps(r['settings'], sort_keys=True)].append(r['accuracy'])
    best = {}
    for (method, settings), accuracies in tries.items():
        if mean(accuracies) > best.get(method, (0, None))[0]: best[method] = mean(accuracies), json.loads(settings)
    assert chosen(pd.DataFrame(rows_of('tuning'))) == {method: settings for method, (_, settings) in best.items()}


def test_the_defaults_are_the_chosen_settings():
    chosen_settings, parameters = tuned_in(RESULTS)['sgdrop']['sgdrop'], signature(SGDrop).parameters
    assert {name: parameters[name].default for name in chosen_settings} == chosen_settings


def test_a_run_on_tiny_flowers(tiny_sets, monkeypatch):
    monkeypatch.setattr(bench, 'flowers17_path', lambda: tiny_sets / 'flowers17')
    train, shown = bench.benchmark_files('flowers17', 'test', 0.2, 0)
    assert (len(train), len(shown)) == (17 * 16, 17 * 44) and not set(train) & set(shown)
    settings = dict(dataset='flowers17', share=0.2, arch='resnet', part='tuning',
                    split_seed=0, seed=0, epochs=1, settings=dict(sgdrop={}))
    row = bench.run_benchmark(settings)
    assert json.loads(json.dumps(row)) == row and 0 <= row['accuracy'] <= 1
