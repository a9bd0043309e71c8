"Paired comparisons, once more in plain Python, and what they refuse"
import subprocess
import sys
from collections import defaultdict
from math import sqrt
from statistics import mean, stdev

import numpy as np
import pandas as pd
import pytest
from scipy.stats import t

from sgdrop.stats import (
    differences_over_cells, differences_to, paired_difference, paired_table)

PAIR = ['data', 'arch', 'seed']
METHODS = ['plain', 'sgdrop', 'cutout']


def made_rows(seed=0):
    "Three methods in four cells with five seeds, in any order"
    rng = np.random.default_rng(seed)
    rows = [dict(data=data, arch=arch, seed=s, method=m,
                 accuracy=rng.integers(50, 60) / 100, nll=rng.normal())
            for data in 'ab' for arch in ('resnet', 'vgg') for s in range(5)
            for m in METHODS]
    return [rows[i] for i in rng.permutation(len(rows))]


def slow_differences(rows, value, against='plain'):
    "Method → the differences of its pairs"
    def pair(row): return tuple(row[k] for k in PAIR)
    reference = {pair(r): r[value] for r in rows if r['method'] == against}
    found = defaultdict(list)
    for r in rows:
        if r['method'] != against:
            found[r['method']].append(r[value] - reference[pair(r)])
    return found


def slow_summary(d):
    half = t.ppf(0.975, len(d) - 1) * stdev(d) / sqrt(len(d))
    wins, ties = sum(x > 0 for x in d), sum(x == 0 for x in d)
    return [mean(d), mean(d) - half, mean(d) + half, wins, ties, len(d)]


@pytest.mark.parametrize('value, against', [('accuracy', 'plain'), ('nll', 'cutout')])
def test_differences_agree_with_plain_python(value, against):
    rows = made_rows()
    table = differences_to(pd.DataFrame(rows), value, PAIR, against)
    slow = slow_differences(rows, value, against)
    assert set(table.index) == set(slow) == set(METHODS) - {against}
    for method, d in slow.items():
        expected = slow_summary(d)
        assert table.loc[method].tolist() == pytest.approx(expected, abs=1e-12)
        one = paired_table(pd.DataFrame(rows), [value], method, against, PAIR)
        assert one.loc[value].tolist() == pytest.approx(expected, abs=1e-12)


def test_another_column_can_name_the_methods():
    rows = pd.DataFrame(made_rows())
    expected = paired_difference(rows, 'nll', 'sgdrop', 'plain', PAIR)
    renamed = rows.rename(columns=dict(method='course'))
    found = paired_difference(renamed, 'nll', 'sgdrop', 'plain', PAIR, 'course')
    pd.testing.assert_series_equal(found, expected)


# Several cells

CELLS = ['data', 'arch']


def rows_with_splits(n_methods=3, n_splits=3):
    "Five seeds on three splits; the cells with data b lack two seeds"
    rows = pd.DataFrame(made_rows())
    rows = rows[rows.method.isin(METHODS[:n_methods])]
    rows = rows[(rows.data == 'a') | (rows.seed < 3)]
    return rows.assign(split=rows.seed % n_splits)


def over_cells(rows): return differences_over_cells(rows, 'nll', PAIR, CELLS, ['split'])


def slow_over_cells(rows, method):
    "Return the mean of cell means and its standard error, in plain Python"
    runs = {(r.data, r.arch, r.split, r.seed, r.method): r.nll
            for r in rows.itertuples()}
    in_cells = defaultdict(list)
    for (data, arch, split, seed, name), nll in runs.items():
        if name != method: continue
        d = nll - runs[data, arch, split, seed, 'plain']
        in_cells[data, arch].append((split, d))
    of_split, means = defaultdict(float), []
    for pairs in in_cells.values():
        n = len({split for split, _ in pairs})
        means.append(mean(d for _, d in pairs))
        for split, d in pairs:
            of_split[split] += sqrt(n / (n - 1)) * (d - means[-1]) / len(pairs)
    return mean(means), sqrt(sum(x ** 2 for x in of_split.values())) / len(means)


def test_intervals_over_cells_agree_with_plain_python():
    rows = rows_with_splits()
    for method, found in over_cells(rows).iterrows():
        expected, error = slow_over_cells(rows, method)
        half = t.ppf(0.975, 2) * error
        assert found[['mean', 'low', 'high']].tolist() == pytest.approx(
            [expected, expected - half, expected + half], abs=1e-12)
        assert found.p == pytest.approx(2 * t.sf(abs(expected) / error, 2), abs=1e-12)
        assert found[['n', 'cells', 'clusters']].tolist() == [16, 4, 3]


def test_intervals_are_missing_where_nothing_varies():
    rows = rows_with_splits(n_methods=2)
    one_cell = over_cells(rows[(rows.data == 'a') & (rows.arch == 'vgg')]).iloc[0]
    missing = ['low_new', 'high_new', 'cells_differ']
    assert set(one_cell.index[one_cell.isna()]) == set(missing)
    one_split = over_cells(rows.assign(split=0)).iloc[0]
    missing = ['low', 'high', 'p', 'p_holm']
    assert set(one_split.index[one_split.isna()]) == set(missing)
    # One cell with a single split has an unknown part in the error of all.
    some = over_cells(rows[(rows.data == 'a') | (rows.split == 0)]).iloc[0]
    assert set(some.index[some.isna()]) == set(missing) and some.clusters == 3


def test_it_needs_neither_torch_nor_fastai_nor_the_package():
    code = '''import sys, sgdrop.stats
ours = {m for m in sys.modules if m.startswith('sgdrop')}
assert ours == {'sgdrop', 'sgdrop.stats'}, ours
assert not {'torch', 'fastai'} & sys.modules.keys()
'''
    subprocess.run([sys.executable, '-c', code], check=True)
