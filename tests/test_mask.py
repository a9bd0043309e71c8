"Properties of the mask, for any shape, share and attribution."
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from attributions import made
from sgdrop.mask import FILLS, kept_attribution, saliency_mask

SUMMED = dict(element=(), spatial=(1,), channel=(2, 3))

sizes = st.integers(1, 6)
shapes = st.tuples(st.integers(1, 4), st.integers(2, 6), sizes, sizes)
kinds = st.sampled_from(['ties', 'sparse', 'zero', 'flat', 'spread'])
attributions = st.builds(made, shapes, kinds, st.integers(0, 2**20))
shares = st.floats(0, 0.999)
granularities = st.sampled_from(list(SUMMED))


def slow_mask(A, thousandths, granularity):
    "Sort in float64, count whole numbers from the top, and keep what is tied"
    A = A.double()
    if SUMMED[granularity]: A = A.sum(SUMMED[granularity], keepdim=True)
    M = torch.ones_like(A, dtype=torch.bool)
    for row, keep in zip(A.flatten(1), M.flatten(1)):
        k = thousandths * len(row) // 1000
        first_that_stays = row.sort(descending=True).values[k]
        keep &= row <= max(first_that_stays.item(), 0)
    return M


@given(attributions, st.integers(0, 999), granularities)
def test_mask_equals_a_slow_derivation(A, thousandths, granularity):
    before = A.clone()
    M = saliency_mask(A, thousandths / 1000, granularity)
    assert M.equal(slow_mask(A, thousandths, granularity))  # which has the shape, too
    assert A.equal(before)


@given(attributions, shares, granularities)
def test_at_most_the_share_is_dropped(A, rho, granularity):
    dropped = (~saliency_mask(A, rho, granularity)).flatten(1)
    assert dropped.sum(1).max().item() <= rho * dropped.shape[1] + 1e-6


@given(attributions, shares, granularities)
def test_layout_in_memory_changes_nothing(A, rho, granularity):
    M = saliency_mask(A, rho, granularity)
    padded = torch.full((*A.shape[:3], 2 * A.shape[3]), 9.)
    padded[..., ::2] = A
    turned = A.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)
    channels_last = A.contiguous(memory_format=torch.channels_last)
    for same in (channels_last, turned, padded[..., ::2]):
        assert same.equal(A) and saliency_mask(same, rho, granularity).equal(M)


@given(attributions, shares, st.sampled_from([torch.float16, torch.bfloat16]))
def test_half_precision_is_enough(A, rho, dtype):
    A = A.to(dtype)
    assert saliency_mask(A, rho).equal(saliency_mask(A.double(), rho))


@given(attributions, shares, granularities, st.sampled_from([math.nan, math.inf]),
       st.integers(0, 2**20))
def test_image_that_is_not_finite_does_not_affect_others(A, rho, granularity, bad, at):
    broken, i = A.clone(), at % len(A)
    broken[i].view(-1)[at % A[0].numel()] = bad
    others = [j for j in range(len(A)) if j != i]
    ours, theirs = (saliency_mask(t, rho, granularity)[others] for t in (broken, A))
    assert ours.equal(theirs)


@given(attributions, shares, granularities)
def test_kept_attribution_is_what_the_mask_keeps(A, rho, granularity):
    M = saliency_mask(A, rho, granularity)
    for a, m, share in zip(A.double(), M.expand_as(A), kept_attribution(A, M)):
        by_hand = (a[m].sum() / a.sum()).item()
        assert share.item() == pytest.approx(by_hand, abs=1e-6, nan_ok=True)


@pytest.mark.parametrize('granularity', SUMMED)
def test_share_just_below_one_keeps_at_least_one_thing(granularity):
    A = torch.rand(2, 4, 5, 5) + 0.1
    for rho in (1 - 1e-9, math.nextafter(1, 0)):
        assert saliency_mask(A, rho, granularity).flatten(1).any(1).all()


def test_negative_attribution_is_kept():
    A = torch.tensor([-3., -2., -1., 1.]).view(1, 1, 2, 2)
    assert saliency_mask(A, 0.9).flatten().tolist() == [True, True, True, False]


@pytest.mark.parametrize('rho', [-0.1, 1.0, 10, math.nan, '0.1', None])
def test_share_outside_zero_and_one_is_refused(rho):
    with pytest.raises(ValueError, match=r'rho must be in \[0, 1\)'):
        saliency_mask(torch.rand(1, 2, 3, 3), rho)


def test_rho_can_be_a_numpy_number():
    A = torch.rand(2, 3, 4, 4)
    assert saliency_mask(A, np.float64(0.3)).equal(saliency_mask(A, 0.3))


def slow_value(z, M, fill, b, c, i, j):
    "Return what one hole is filled with"
    kept = z[b, c][M[b, c]]
    if fill == 'mean': return z[b, c].mean()
    if fill == 'kept_mean': return kept.mean() if len(kept) else 0.
    if fill == 'swap': return z[b - 1, c, i, j]
    return 0.


def slow_fill(z, M, fill):
    "Fill one hole after the other, in float64"
    z, M = z.double(), M.expand_as(z)
    out = z.clone()
    for at in zip(*torch.where(~M)): out[at] = slow_value(z, M, fill, *at)
    if fill == 'rescale':
        for before, after in zip(z, out):
            if after.abs().sum() > 0: after *= before.abs().sum() / after.abs().sum()
    return out


@pytest.mark.parametrize('fill', list(FILLS))
@given(attributions, st.integers(0, 999), granularities)
def test_fill_equals_a_slow_derivation(fill, A, thousandths, granularity):
    z = A - A.mean()  # maps have negative values, too
    M = saliency_mask(A, thousandths / 1000, granularity)
    ours, theirs = FILLS[fill](z, M).double(), slow_fill(z, M, fill)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


def test_mean_of_a_large_map_does_not_overflow_in_half_precision():
    z = torch.full((1, 2, 112, 112), 25., dtype=torch.float16)
    M = torch.ones(1, 1, 112, 112, dtype=torch.bool)
    M[..., :50] = False
    filled = FILLS['kept_mean'](z, M)
    assert filled.dtype is torch.float16 and filled.equal(z)
