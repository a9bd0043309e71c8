"Properties of the mask, for any shape, share and attribution."
import math

import pytest
import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from attributions import made
from sgdrop.mask import FILLS, kept_attribution, saliency_mask

GRANULARITIES = ['element', 'spatial', 'channel']
SUMMED = dict(element=(), spatial=(1,), channel=(2, 3))


sizes = st.integers(1, 6)
shapes = st.tuples(st.integers(1, 4), st.integers(2, 6), sizes, sizes)
attributions = st.builds(made, shapes, st.sampled_from(['ties', 'sparse', 'zero', 'flat', 'spread']), st.integers(0, 2**20))
shares = st.floats(0, 0.999)
granularities = st.sampled_from(GRANULARITIES)


def grouped(A, granularity):
    "B lists of float64: the attribution of each thing that is dropped as one"
    dims = SUMMED[granularity]
    return (A.double().sum(dims) if dims else A.double()).flatten(1).tolist()


def slow_mask(row, thousandths):
    "Sort, count from the top, and spare what is tied with the first that stays; in whole numbers, so that no share is rounded"
    may_go = thousandths * len(row) // 1000
    first_that_stays = sorted(row, reverse=True)[may_go]
    return [not v > max(first_that_stays, 0) for v in row]


@given(attributions, st.integers(0, 999), granularities)
def test_the_mask_equals_a_slow_derivation(A, thousandths, granularity):
    M = saliency_mask(A, thousandths / 1000, granularity)
    assert M.flatten(1).tolist() == [slow_mask(row, thousandths) for row in grouped(A, granularity)]


@given(attributions, shares, granularities)
def test_the_mask_has_a_one_where_a_decision_is_shared(A, rho, granularity):
    b, c, h, w = A.shape
    assert saliency_mask(A, rho, granularity).shape == dict(element=(b, c, h, w), spatial=(b, 1, h, w), channel=(b, c, 1, 1))[granularity]


@given(attributions, shares, granularities)
def test_no_more_than_the_share_is_dropped(A, rho, granularity):
    dropped = (~saliency_mask(A, rho, granularity)).flatten(1)
    assert dropped.sum(1).max().item() <= rho * dropped.shape[1] + 1e-6


@given(attributions, shares, granularities)
def test_without_ties_the_whole_share_is_dropped(A, rho, granularity):
    distinct = torch.arange(1., A.numel() + 1)[torch.randperm(A.numel(), generator=torch.Generator().manual_seed(0))].view_as(A)
    sums = torch.tensor(grouped(distinct, granularity))
    dropped = (~saliency_mask(distinct, rho, granularity)).flatten(1).sum(1)
    for row, n in zip(sums, dropped):
        if len(row.unique()) == len(row): assert n == math.floor(rho * len(row) + 1e-6)


@given(attributions, shares, granularities)
def test_what_has_no_attribution_is_kept(A, rho, granularity):
    zero = torch.tensor(grouped(A, granularity)) == 0
    assert saliency_mask(A, rho, granularity).flatten(1)[zero].all()


@given(attributions, shares, granularities)
def test_all_that_is_dropped_exceeds_all_that_is_kept(A, rho, granularity):
    M = saliency_mask(A, rho, granularity).flatten(1)
    for row, keep in zip(torch.tensor(grouped(A, granularity)), M):
        if not keep.all(): assert row[~keep].min() > row[keep].max()


@given(attributions, shares, shares, granularities)
def test_a_larger_share_drops_all_that_a_smaller_one_does(A, one, other, granularity):
    less, more = (saliency_mask(A, rho, granularity) for rho in sorted((one, other)))
    assert (less | ~more).all()


@given(attributions, shares, granularities, st.randoms(use_true_random=False))
def test_each_image_is_masked_by_itself(A, rho, granularity, random):
    order = list(range(len(A)))
    random.shuffle(order)
    M = saliency_mask(A, rho, granularity)
    assert saliency_mask(A[order], rho, granularity).equal(M[order])
    assert saliency_mask(A[:1], rho, granularity).equal(M[:1])


@given(attributions, shares, granularities)
def test_a_scale_changes_nothing(A, rho, granularity):
    assert saliency_mask(1024 * A, rho, granularity).equal(saliency_mask(A, rho, granularity))


@given(attributions, shares, granularities)
def test_the_layout_in_memory_changes_nothing(A, rho, granularity):
    M = saliency_mask(A, rho, granularity)
    padded = torch.full((*A.shape[:3], 2 * A.shape[3]), 9.)
    padded[..., ::2] = A
    for same in (A.contiguous(memory_format=torch.channels_last), A.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0), padded[..., ::2]):
        assert same.equal(A) and saliency_mask(same, rho, granularity).equal(M)


@given(attributions, shares, st.sampled_from([torch.float16, torch.bfloat16, torch.float64]))
def test_any_floating_point_precision_will_do(A, rho, dtype):
    A = A.to(dtype)
    assert saliency_mask(A, rho).equal(saliency_mask(A.double(), rho))


@given(attributions, shares, granularities, st.sampled_from([math.nan, math.inf]), st.integers(0, 2**20))
def test_the_others_do_not_notice_an_image_that_is_not_finite(A, rho, granularity, bad, at):
    broken = A.clone()
    rows = sorted({at % len(A), (at // 7) % len(A)})
    for i in rows: broken[i].view(-1)[at % A[0].numel()] = bad
    others = [i for i in range(len(A)) if i not in rows]
    assert saliency_mask(broken, rho, granularity)[others].equal(saliency_mask(A, rho, granularity)[others])


@given(attributions, shares, granularities)
def test_the_attribution_itself_is_not_written_to(A, rho, granularity):
    before = A.clone()
    saliency_mask(A, rho, granularity)
    assert A.equal(before)


@given(attributions, shares, granularities)
def test_the_evidence_kept_is_what_the_mask_leaves(A, rho, granularity):
    M = saliency_mask(A, rho, granularity)
    kept = kept_attribution(A, M)
    for a, m, share in zip(A.double(), M.expand_as(A), kept):
        if a.sum() == 0: assert share.isnan()
        else: assert share.item() == pytest.approx((a[m].sum() / a.sum()).item(), abs=1e-6)


@pytest.mark.parametrize('granularity', GRANULARITIES)
@pytest.mark.parametrize('rho', [0.999999, 1 - 1e-9, math.nextafter(1, 0)])
def test_a_share_just_below_one_keeps_at_least_one_thing(rho, granularity):
    M = saliency_mask(torch.rand(2, 4, 5, 5) + 0.1, rho, granularity)
    assert M.flatten(1).any(1).all()


def test_a_tied_threshold_drops_nothing():
    assert saliency_mask(torch.ones(2, 3, 4, 4), 0.5).all()


def test_what_speaks_against_the_class_is_kept():
    assert saliency_mask(torch.tensor([-3., -2., -1., 1.]).view(1, 1, 2, 2), 0.9).flatten().tolist() == [True, True, True, False]


@pytest.mark.parametrize('rho', [-0.1, 1, 1.0, 10, math.nan, math.inf, '0.1', None])
def test_a_share_outside_zero_and_one_is_named(rho):
    with pytest.raises(ValueError, match=r'rho must lie in \[0, 1\)'): saliency_mask(torch.rand(1, 2, 3, 3), rho)


def test_rho_may_be_a_numpy_number():
    A = torch.rand(2, 3, 4, 4)
    assert saliency_mask(A, np.float64(0.3)).equal(saliency_mask(A, 0.3))


def slow_fill(z, M, fill):
    "One number after the other, in float64"
    z, M, out = z.double(), M.expand_as(z), z.double().clone()
    for b, c, i, j in zip(*torch.where(~M)):
        kept = z[b, c][M[b, c]]
        out[b, c, i, j] = dict(zero=0., rescale=0., mean=z[b, c].mean(), kept_mean=kept.mean() if len(kept) else 0., swap=z[b - 1, c, i, j])[fill]
    if fill != 'rescale': return out
    for b in range(len(z)):
        if out[b].abs().sum() > 0: out[b] *= z[b].abs().sum() / out[b].abs().sum()
    return out


@pytest.mark.parametrize('fill', list(FILLS))
@given(attributions, st.integers(0, 999), granularities)
def test_a_hole_is_filled_as_a_slow_derivation_fills_it(fill, A, thousandths, granularity):
    z = A - A.mean()  # maps have negative values, too
    M = saliency_mask(A, thousandths / 1000, granularity)
    torch.testing.assert_close(FILLS[fill](z, M).double(), slow_fill(z, M, fill), atol=1e-5, rtol=1e-4)


def test_in_half_precision_the_mean_of_a_large_map_does_not_overflow():
    z, M = torch.full((1, 2, 112, 112), 25., dtype=torch.float16), torch.ones(1, 1, 112, 112, dtype=torch.bool)
    M[..., :50] = False
    filled = FILLS['kept_mean'](z, M)
    assert filled.dtype is torch.float16 and filled.equal(z)
