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

from sgdrop.stats import differences_to, paired_difference, paired_table

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


@pytest.mark.parametrize('change, message', [
    (lambda rows: rows[(rows.seed != 3) | (rows.method != 'plain')],
     "'plain' has no nll with data=a, arch=resnet, seed=3; data=a, arch=vgg, seed=3"),
    (lambda rows: rows.assign(nll=rows.nll.where(rows.method != 'cutout')),
     "'cutout' has no nll with"),
    (lambda rows: pd.concat([rows, rows[rows.method == 'sgdrop'].iloc[:1]]),
     "'sgdrop' has several rows with"),
    (lambda rows: rows[rows.method != 'plain'], "no row has method='plain'")],
    ids=['missing partner', 'NaN', 'duplicate', 'unknown method'])
def test_incomplete_tables_are_refused(change, message):
    rows = change(pd.DataFrame(made_rows()).sort_values(PAIR))
    with pytest.raises(ValueError, match=message): differences_to(rows, 'nll', PAIR)


def test_it_needs_neither_torch_nor_fastai_nor_the_package():
    code = '''import sys, sgdrop.stats
ours = {m for m in sys.modules if m.startswith('sgdrop')}
assert ours == {'sgdrop', 'sgdrop.stats'}, ours
assert not {'torch', 'fastai'} & sys.modules.keys()
'''
    subprocess.run([sys.executable, '-c', code], check=True)
