"The measures of focus against other derivations, and `FocusRecorder` in fastai's training loop."
import copy
import gc
import math
import pickle
import random
import time
import weakref
from contextlib import contextmanager, nullcontext

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from fastai.callback.core import Callback, CancelValidException
from fastai.callback.mixup import MixUp
from fastai.callback.progress import CSVLogger
from fastai.callback.schedule import Learner  # brings `lr_find`
from fastai.callback.tracker import EarlyStoppingCallback, SaveModelCallback
from fastai.data.core import DataLoaders, Datasets
from fastai.data.transforms import Categorize
from fastai.learner import Recorder, load_learner
from fastai.losses import BCEWithLogitsLossFlat, CrossEntropyLossFlat
from fastai.metrics import accuracy, error_rate
from fastai.optimizer import SGD
from fastai.torch_core import TensorImage
from fastai.vision.augment import RandTransform
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy import integrate, ndimage
from torch import nn

from attributions import made
from networks import NETWORKS, build, hooked, images, same_weights
from sgdrop.callback import SGDropCallback
from sgdrop.data import imagenette
from sgdrop.experiments.demo import small_resnet
from sgdrop.metrics import (
    attributed, attribution_ratio, blurred, covered_layers, curve_auc,
    deletion_curve, effective_area, pixel_shares, gini, insertion_curve,
    model_attribution, neuron_coverage, occlusion_accuracy, pixel_ranks,
    pointing_game, region_iou, relevance_mass, shuffled_positions)
from sgdrop.plots import plot_focus, plot_attribution_history
from sgdrop.recorder import FocusRecorder, denormalize


# Any attribution, any region

def made_region(A, share, seed, size=None):
    return torch.rand(len(A), 1, *(size or A.shape[2:]), generator=torch.Generator().manual_seed(seed)) < share


sizes = st.integers(1, 7)
KINDS = ['ties', 'sparse', 'zero', 'flat', 'spread', 'distinct']
def attributions(kinds=KINDS, channels=st.integers(1, 4), side=sizes):
    return st.builds(made, st.tuples(st.integers(1, 4), channels, side, side), st.sampled_from(kinds), st.integers(0, 2**20))
seeds = st.integers(0, 2**20)
region_shares = st.floats(0.05, 0.95)


@pytest.fixture(scope='module')
def quantus(): return pytest.importorskip('quantus')


def by_quantus(metric, A, region=None):
    "A metric of quantus; its checks before it refuse maps with a side of one pixel"
    maps = A.double().sum(1, keepdim=True).numpy()
    maps = maps / maps.max((1, 2, 3), keepdims=True)
    return np.array(metric(disable_warnings=True).evaluate_batch(x_batch=None, a_batch=maps, s_batch=None if region is None else region.numpy()), dtype=float)


some = settings(max_examples=60)


@some
@given(A=attributions(['ties', 'sparse', 'spread', 'distinct']))
def test_gini_is_the_sparseness_of_quantus(quantus, A):
    assume(A.flatten(1).amax(1).min() > 0)
    assert gini(A).numpy() == pytest.approx(by_quantus(quantus.Sparseness, A), abs=2e-5)


@some
@given(A=attributions(['ties', 'sparse', 'spread', 'distinct']))
def test_the_effective_area_is_the_exponential_of_the_complexity_of_quantus(quantus, A):
    assume(A.flatten(1).amax(1).min() > 0)
    n = A[0, 0].numel()
    assert effective_area(A).numpy() == pytest.approx(np.exp(by_quantus(quantus.Complexity, A)) / n, rel=1e-5)


@some
@given(A=attributions(['ties', 'sparse', 'spread', 'distinct']), share=region_shares, seed=seeds)
def test_the_region_share_is_the_relevance_mass_accuracy_of_quantus(quantus, A, share, seed):
    region = made_region(A, share, seed)
    assume(A.flatten(1).amax(1).min() > 0 and region.flatten(1).any(1).all())
    assert relevance_mass(A, region).numpy() == pytest.approx(by_quantus(quantus.RelevanceMassAccuracy, A, region=region), abs=1e-6)


@some
@given(A=attributions(['distinct'], channels=st.just(1)), share=region_shares, seed=seeds)
def test_the_iou_is_the_relevance_rank_accuracy_of_quantus(quantus, A, share, seed):
    region = made_region(A, share, seed)
    assume(region.flatten(1).any(1).all())
    hits = by_quantus(quantus.RelevanceRankAccuracy, A, region=region)  # of two sets of one size
    assert region_iou(A, region).numpy() == pytest.approx(hits / (2 - hits), abs=1e-6)


@some
@given(A=attributions(['distinct'], channels=st.just(1)), share=region_shares, seed=seeds)
def test_the_pointing_game_is_that_of_quantus(quantus, A, share, seed):
    region = made_region(A, share, seed)
    assume(region.flatten(1).any(1).all())
    assert pointing_game(A, region).tolist() == by_quantus(quantus.PointingGame, A, region=region).astype(bool).tolist()


@pytest.mark.parametrize('steps', [36, 9, 3])
@pytest.mark.parametrize('channels', [1, 3])
def test_the_deletion_curve_is_the_pixel_flipping_of_quantus(quantus, channels, steps):
    net = nn.Sequential(nn.Conv2d(channels, 4, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)).eval()
    x, A = torch.randn(5, channels, 6, 6), made((5, 1, 6, 6), 'distinct', 0)
    for target in (torch.tensor([0, 1, 2, 1, 0]), net(x).argmax(1)):
        flipping = quantus.PixelFlipping(features_in_step=36 * channels // steps, perturb_baseline=0., disable_warnings=True)
        theirs = flipping(net, x.numpy(), target.numpy(), A.numpy(), channel_first=True, softmax=True, device='cpu')
        assert deletion_curve(net, x, A, target, steps=steps)[:, 1:].numpy() == pytest.approx(np.array(theirs), abs=1e-6)


# What quantus has not: slowly, and in float64

@given(attributions(), st.integers(0, 99))
def test_the_attribution_ratio_counts_elements(A, hundredths):
    rows = [[int(v * 2**7) for v in row] for row in A.flatten(1).tolist()]  # whole numbers, so that no threshold is rounded
    slowly = [sum(100 * v > hundredths * max(row) for v in row) / len(row) for row in rows]
    near = any(100 * v == hundredths * max(row) and v for row in rows for v in row)  # a tie with the threshold, which float32 may round either way
    assume(not near)
    assert attribution_ratio(A, hundredths / 100).tolist() == pytest.approx(slowly, abs=1e-6)


def enlarged(plane, height, width):
    "Bilinear enlargement of a map, pixel by pixel"
    h, w = plane.shape
    def ends(i, n, size):
        at = min(max((i + 0.5) * n / size - 0.5, 0), n - 1)
        low = min(int(at), n - 1)
        return low, min(low + 1, n - 1), at - low
    out = np.zeros((height, width))
    for i in range(height):
        for j in range(width):
            (top, bottom, v), (left, right, u) = ends(i, h, height), ends(j, w, width)
            out[i, j] = ((1 - v) * (1 - u) * plane[top, left] + (1 - v) * u * plane[top, right]
                         + v * (1 - u) * plane[bottom, left] + v * u * plane[bottom, right])
    return out


@some
@given(attributions(), st.tuples(st.integers(7, 12), st.integers(7, 12)))
def test_the_evidence_map_is_the_enlarged_sum_of_the_channels(A, size):
    for a, ours in zip(A.double().numpy(), pixel_shares(A, size)):
        slowly = enlarged(a.sum(0), *size)
        assert ours.shape == (1, *size) and ours[0].numpy() == pytest.approx(slowly / max(slowly.sum(), 1e-9), abs=1e-6)


@given(attributions())
def test_ranks_are_the_places_in_a_sorted_list_and_ties_keep_the_order_of_reading(A):
    sums = A.double().sum(1).flatten(1).tolist()
    slowly = [[sorted(range(len(row)), key=lambda i: (-row[i], i)).index(i) for i in range(len(row))] for row in sums]
    ranks = pixel_ranks(A, A.shape[2:])
    assert ranks.shape == (len(A), 1, *A.shape[2:]) and ranks.flatten(1).tolist() == slowly


@some
@given(attributions(['spread', 'sparse', 'distinct']), st.tuples(st.integers(7, 12), st.integers(7, 12)), region_shares, seeds)
def test_a_region_is_compared_at_the_size_of_the_image(A, size, share, seed):
    region, evidence = made_region(A, share, seed, size), pixel_shares(A, size)
    for i, (r, e) in enumerate(zip(region.flatten(1).tolist(), evidence.double().flatten(1).tolist())):
        best = sorted(range(len(e)), key=lambda k: (-e[k], k))
        salient, inside = set(best[:sum(r)]), {k for k, v in enumerate(r) if v}
        assert relevance_mass(A, region)[i].item() == pytest.approx(sum(e[k] for k in inside), abs=1e-5)
        assert pointing_game(A, region)[i].item() == (r[best[0]] and e[best[0]] > 0)
        if inside: assert region_iou(A, region)[i].item() == pytest.approx(len(salient & inside) / len(salient | inside))


def tiny_net(channels=3, classes=3): return nn.Sequential(nn.Conv2d(channels, 4, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, classes))


def slow_curve(net, before, after, A, c, steps):
    "One image at a time, one pixel at a time, in float64"
    net, curves = copy.deepcopy(net).double().eval(), []
    for b, a, ranks, k in zip(before.double(), after.double(), pixel_ranks(A, before.shape[2:]).flatten(1).tolist(), c.tolist()):
        n, canvas, curve = len(ranks), b.clone(), []
        for step in range(steps + 1):
            for pixel in range(n):
                if ranks[pixel] < round(n * step / steps): canvas.flatten(1)[:, pixel] = a.flatten(1)[:, pixel]
            curve.append(net(canvas[None]).softmax(1)[0, k].item())
        curves.append(curve)
    return curves


@pytest.mark.parametrize('steps', [1, 5, 16, 30])
@pytest.mark.parametrize('size', [(5, 6), (8, 4)])
def test_curves_equal_a_slow_derivation(size, steps):
    net, x, A, canvas = tiny_net(), torch.randn(4, 3, *size), torch.rand(4, 2, 3, 3), torch.randn(4, 3, *size)
    c = torch.tensor([0, 1, 2, 0])
    close = lambda ours, *theirs: ours.tolist() == [pytest.approx(row, abs=1e-5) for row in slow_curve(net, *theirs, steps)]
    assert close(deletion_curve(net, x, A, c, steps), x, torch.zeros_like(x), A, c)
    assert close(deletion_curve(net, x, A, c, steps, fill=0.7), x, torch.full_like(x, 0.7), A, c)
    assert close(deletion_curve(net, x, A, c, steps, fill=canvas.mean((0, 2, 3), keepdim=True)), x, canvas.mean((0, 2, 3), keepdim=True).expand_as(x), A, c)
    assert close(deletion_curve(net, x, A, steps=steps), x, torch.zeros_like(x), A, net(x).argmax(1))
    assert close(deletion_curve(net, x, A, 1, steps), x, torch.zeros_like(x), A, torch.ones(4).long())
    assert close(insertion_curve(net, x, A, c, steps, canvas), canvas, x, A, c)
    assert close(insertion_curve(net, x, A, steps=steps), blurred(x), x, A, net(x).argmax(1))


@pytest.mark.parametrize('size, sigma', [((20, 20), None), ((20, 12), 1.5), ((5, 9), 4.)])
def test_the_blur_is_that_of_scipy(size, sigma):
    x = torch.randn(2, 3, *size)
    used = sigma or size[0] / 10
    radius = min(int(3 * used), min(size) - 1)
    theirs = ndimage.gaussian_filter(x.double().numpy(), (0, 0, used, used), mode='mirror', radius=(0, 0, radius, radius))
    assert blurred(x, sigma).numpy() == pytest.approx(theirs, abs=1e-5)


@given(st.lists(st.lists(st.floats(0, 1, width=32), min_size=4, max_size=4), min_size=1, max_size=4))
def test_the_area_under_a_curve_is_that_of_scipy(rows):
    theirs = integrate.trapezoid(rows, np.linspace(0, 1, 4), axis=1)
    assert curve_auc(torch.tensor(rows)).numpy() == pytest.approx(theirs, abs=1e-6)


def touchy_net(height, width):
    "Untrained, and yet its decision changes when a part of the image is covered"
    return nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(4 * height * width, 3))


def batches_of(x, y, bs): return list(zip(x.split(bs), y.split(bs)))


@pytest.mark.parametrize('fill', [0., torch.tensor([1., 0., -1.])[:, None, None]])
@pytest.mark.parametrize('seed', [0, 3])
def test_occlusion_equals_a_derivation_by_hand(seed, fill):
    net, x = touchy_net(8, 6), torch.randn(30, 3, 8, 6)
    y = torch.where(torch.rand(30) < 0.7, net(x).argmax(1), torch.randint(3, (30,)))
    shares, right, order = (0., 0.1, 0.25, 1.), [], torch.Generator().manual_seed(seed)
    for xs, ys in batches_of(x, y, 8):
        z = net[1](net[0](xs)).detach().requires_grad_()
        scores = net[2:](z)
        scores.amax(1).sum().backward()
        A = (z.grad * z).clamp(min=0).detach().sum(1).flatten(1)
        elsewhere = torch.stack([row[o] for row, o in zip(A, torch.rand(A.shape, generator=order).argsort(1))])
        for maps in (A, elsewhere):
            for image, label, row in zip(xs, ys, maps):
                by_rank = row.tolist()
                by_rank = sorted(range(48), key=lambda i: (-by_rank[i], i))
                for share in shares:
                    covered, colour = image.clone().flatten(1), torch.as_tensor(fill).expand(3, 1, 1)[:, :, 0]
                    covered[:, by_rank[:round(48 * share)]] = colour
                    right.append((net(covered.view(1, 3, 8, 6)).argmax() == label).item())
    # the batches are of 8, 8, 8 and 6 images
    hand = np.concatenate([np.array(right[2 * 4 * a:2 * 4 * b]).reshape(2, b - a, 4) for a, b in ((0, 8), (8, 16), (16, 24), (24, 30))], 1).mean(1)
    ours = occlusion_accuracy(net, batches_of(x, y, 8), shares, fill=fill, seed=seed)
    assert ours['salient'].tolist() == pytest.approx(hand[0], abs=1e-6) and ours['random'].tolist() == pytest.approx(hand[1], abs=1e-6)
    assert ours.index.tolist() == list(shares) and ours['salient'].nunique() > 2 and not ours['salient'].equals(ours['random'])


def test_another_seed_covers_other_random_parts_and_the_same_salient_ones():
    net, x = touchy_net(8, 8), torch.randn(40, 3, 8, 8)
    y = net(x).argmax(1)  # so that covering costs
    one, other = (occlusion_accuracy(net, batches_of(x, y, 40), seed=seed) for seed in (0, 1))
    assert one['salient'].equals(other['salient']) and not one['random'].equals(other['random'])


@given(attributions(), seeds)
def test_shuffled_positions_are_the_same_positions_elsewhere(A, seed):
    shuffled = shuffled_positions(A, torch.Generator().manual_seed(seed))
    assert shuffled.shape == (len(A), 1, *A.shape[2:])
    assert shuffled.flatten(1).sort(1).values.equal(A.sum(1).flatten(1).sort(1).values)


# Neuron coverage

def slow_coverage(outs, threshold):
    "Which neurons of a layer are covered, from its outputs for one image after the other"
    hit = set()
    for image in torch.cat(outs).double():
        means = [channel.mean().item() for channel in image]
        low, high = min(means), max(means)
        hit |= {c for c, v in enumerate(means) if high > low and (v - low) / (high - low) > threshold}
    return hit, len(means)


class Twice(nn.Module):
    "Runs one ReLU twice, as the blocks of torchvision's ResNet do"
    def __init__(self):
        super().__init__()
        self.first, self.bn, self.second, self.relu, self.head = nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.Conv2d(5, 9, 3), nn.ReLU(), nn.Linear(9, 3)
    def between(self, x):
        once = self.bn(self.first(x)).relu()
        return once, self.second(once).relu()
    def forward(self, x): return self.head(self.relu(self.second(self.relu(self.bn(self.first(x))))).mean((2, 3)))


@pytest.mark.parametrize('threshold', [0., 0.5, 0.9])
def test_coverage_equals_loops_and_counts_a_layer_that_runs_twice_twice(threshold):
    net, x = Twice(), torch.randn(10, 3, 8, 8)
    covered = neuron_coverage(net.train(), batches_of(x, x, 4), threshold=threshold)
    once, again = zip(*(net.eval().between(part) for part in x.split(4)))
    (hit, n), (hit_again, m) = slow_coverage(once, threshold), slow_coverage(again, threshold)
    assert covered.to_dict() == pytest.approx({'relu': len(hit) / n, 'relu (2)': len(hit_again) / m, 'all': len(hit | {c + n for c in hit_again}) / (n + m)})


def test_coverage_of_torchvisions_resnet_counts_every_run_of_a_relu():
    net, x = build('resnet18'), images(4, 64)
    covered = neuron_coverage(net, batches_of(x, x, 2))
    blocks = [f'layer{i}.{j}.relu{run}' for i in (1, 2, 3, 4) for j in (0, 1) for run in ('', ' (2)')]
    assert list(covered.index) == ['relu', *blocks, 'all']
    named = neuron_coverage(net, batches_of(x, x, 2), [net.layer1[0], 'layer4.1', net.fc])  # a block ends in its ReLU
    assert list(named.index) == ['layer1.0', 'layer4.1', 'fc', 'all']
    assert named['layer1.0'] == covered['layer1.0.relu (2)'] and named['layer4.1'] == covered['layer4.1.relu (2)']
    scores = torch.cat([net.eval()(part).detach() for part in x.split(2)])
    assert named['fc'] == pytest.approx(len(slow_coverage([scores[..., None]], 0.5)[0]) / 10)


def test_without_activation_modules_the_feature_maps_are_covered():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)).eval()
    x = torch.randn(6, 3, 8, 8)
    hit, n = slow_coverage([net[:2](x).detach()], 0.5)
    covered = neuron_coverage(net, batches_of(x, x, 3))
    assert list(covered_layers(net)) == ['0', '1'] and covered['1'] == pytest.approx(len(hit) / n)


def test_without_activation_modules_a_network_for_one_size_of_image_is_covered():
    net, x = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.Flatten(), nn.Linear(256, 3)), torch.randn(6, 3, 8, 8)
    hit, n = slow_coverage([net[0](x).detach()], 0.5)
    assert neuron_coverage(net, batches_of(x, x, 3))['0'] == pytest.approx(len(hit) / n)


@given(attributions(['spread', 'sparse'], channels=st.integers(2, 6)), st.floats(0, 0.99), st.floats(0, 0.99))
def test_more_neurons_are_covered_by_more_images_and_by_a_lower_threshold(x, one, other):
    net = nn.Sequential(nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    covered = lambda images, threshold: neuron_coverage(net, [(images, None)], threshold=threshold)['all']
    assert 0 <= covered(x, max(one, other)) <= covered(x, min(one, other)) <= 1
    assert covered(x[:1], one) <= covered(x, one)


# What changes nothing, and what bounds hold

MEASURES = dict(ratio=attribution_ratio, higher_ratio=lambda A: attribution_ratio(A, 0.25), area=effective_area, gini=gini)
measures = pytest.mark.parametrize('name', MEASURES)


@measures
@given(A=attributions())
def test_a_scale_changes_no_measure(name, A):
    for scale in (2.**-12, 2.**10): torch.testing.assert_close(MEASURES[name](scale * A), MEASURES[name](A), rtol=0, atol=0, equal_nan=True)


@measures
@given(A=attributions(), seed=seeds)
def test_the_order_of_positions_changes_no_measure(name, A, seed):
    order = torch.randperm(A[0, 0].numel(), generator=torch.Generator().manual_seed(seed))
    shuffled = A.flatten(2)[..., order].view_as(A)
    torch.testing.assert_close(MEASURES[name](shuffled), MEASURES[name](A), rtol=1e-5, atol=1e-6, equal_nan=True)


@given(attributions())
def test_every_measure_keeps_to_its_range(A):
    n, empty = A[0, 0].numel(), A.sum((1, 2, 3)) == 0
    area, g, r = effective_area(A), gini(A), attribution_ratio(A)
    slack = 1e-5
    assert (area[empty] == 0).all() and (1 / n - slack <= area[~empty]).all() and (area <= 1 + slack).all()
    assert g[empty].isnan().all() and (-slack <= g[~empty]).all() and (g[~empty] <= 1 - 1 / n + slack).all()
    assert (r[empty] == 0).all() and (0 < r[~empty]).all() and (r <= 1).all()
    assert pixel_shares(A, (9, 8)).sum((1, 2, 3)).tolist() == pytest.approx((~empty).float().tolist(), abs=1e-5)


@given(attributions(['zero']), region_shares, seeds)
def test_an_image_without_evidence_has_none_in_any_region(A, share, seed):
    region = made_region(A, share, seed)
    assert (relevance_mass(A, region) == 0).all() and not pointing_game(A, region).any()


@given(attributions(KINDS[:5]), region_shares, seeds)
def test_evidence_in_a_region_and_in_the_rest_make_one(A, share, seed):
    region = made_region(A, share, seed)
    assume(A.flatten(1).amax(1).min() > 0)
    assert (relevance_mass(A, region) + relevance_mass(A, ~region)).tolist() == pytest.approx([1] * len(A), abs=1e-5)
    assert (pointing_game(A, region) ^ pointing_game(A, ~region)).all()
    assert (region_iou(A, torch.ones_like(region)) == 1).all() and region_iou(A, torch.zeros_like(region)).isnan().all()


def all_measures(A, region):
    return [*(measure(A).float() for measure in MEASURES.values()), relevance_mass(A, region), pointing_game(A, region).float(),
            region_iou(A, region), pixel_shares(A, region.shape[2:]), pixel_ranks(A, region.shape[2:]).float()]


@given(attributions(), region_shares, seeds)
def test_a_batch_is_its_images_one_by_one(A, share, seed):
    region = made_region(A, share, seed, (9, 8))
    one_by_one = zip(*(all_measures(a[None], r[None]) for a, r in zip(A, region)))
    for whole, parts in zip(all_measures(A, region), one_by_one): torch.testing.assert_close(whole, torch.cat(parts), rtol=1e-6, atol=1e-7, equal_nan=True)


@given(attributions(), region_shares, seeds)
def test_channels_may_be_summed_beforehand(A, share, seed):
    region = made_region(A, share, seed, (9, 8))
    of_elements = 2 if A.shape[1] > 1 else 0  # the two attribution ratios are of elements, not of positions
    for ours, theirs in [*zip(all_measures(A, region), all_measures(A.sum(1, keepdim=True), region))][of_elements:]:
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)


@given(attributions(), st.sampled_from([torch.float16, torch.bfloat16, torch.float64]), seeds)
def test_any_floating_point_precision_will_do(A, dtype, seed):
    A, region = A.to(dtype), made_region(A, 0.4, seed, (9, 8))
    for ours, theirs in zip(all_measures(A, region), all_measures(A.float(), region)): torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)


def test_images_need_not_be_square_nor_plain_tensors(small_net):
    net, x, y = small_net(), TensorImage(images(4, 12)[..., :8]), torch.tensor([0, 1, 2, 3])
    A = model_attribution(net, x)
    assert A.shape == (4, 8, 12, 8) and type(A) is torch.Tensor
    region = torch.zeros(4, 1, 12, 8, dtype=torch.bool)
    region[:, :, 6:] = True
    low = A.sum(1)[:, 6:].sum((1, 2)) / A.sum((1, 2, 3))
    assert relevance_mass(A, region).tolist() == pytest.approx(low.tolist(), abs=1e-5)
    assert deletion_curve(net, x, A, y).shape == insertion_curve(net, x, A, y).shape == (4, 17)
    assert occlusion_accuracy(net, [(x, y)]).shape == (6, 2)
    plain = x.as_subclass(torch.Tensor)
    assert deletion_curve(net, x, A, y).as_subclass(torch.Tensor).equal(deletion_curve(net, plain, A, y))


# The network is left as it was

@contextmanager
def untouched(net):
    "Nothing of a network, nor any random state, changes within"
    def state():
        return dict(modes=[m.training for m in net.modules()], tensors={k: v.clone() for k, v in net.state_dict().items()},
                    learning=[p.requires_grad for p in net.parameters()], grads=[None if p.grad is None else p.grad.clone() for p in net.parameters()],
                    hooked=hooked(net), drawn=(torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()), recording=torch.is_grad_enabled())
    before = state()
    yield
    after = state()
    for part in before:
        if part == 'tensors': assert all(v.equal(after[part][k]) for k, v in before[part].items())
        elif part == 'grads': assert all(a is b is None or a.equal(b) for a, b in zip(before[part], after[part], strict=True))
        elif part == 'drawn': assert before[part][0].equal(after[part][0]) and before[part][1:] == after[part][1:]
        else: assert before[part] == after[part], part


def in_use(net):
    "In the midst of a training: some layers frozen, some gradients there, a hook of somebody else's"
    norms = [m for m in net.train().modules() if isinstance(m, nn.BatchNorm2d)]
    norms[0].eval()
    norms[1].requires_grad_(False)
    for p in list(net.parameters())[-2:]: p.grad = torch.ones_like(p)
    norms[-1].register_forward_hook(lambda module, inputs, out: None)
    return net


class Unlucky(Exception): pass


def broken(batches):
    yield from batches
    raise Unlucky


def failing(psi, z, classes): raise Unlucky


def broken_off(net, layer, xb, y):
    for _ in attributed([(xb, y)] * 3, net, layer): break


def consumer_fails(net, layer, xb, y):
    for _ in attributed([(xb, y)] * 3, net, layer): raise Unlucky


USES = {
    'model_attribution': lambda net, layer, xb, y: model_attribution(net, xb, layer=layer),
    'attributed': lambda net, layer, xb, y: list(attributed([(xb, y)] * 2, net, layer, 'label', 'gradcam')),
    'attributed, broken off': broken_off,
    'attributed, consumer fails': consumer_fails,
    'attributed, loader fails': lambda net, layer, xb, y: list(attributed(broken([(xb, y)]), net, layer)),
    'attributed, method fails': lambda net, layer, xb, y: list(attributed([(xb, y)], net, layer, method=failing)),
    'neuron_coverage': lambda net, layer, xb, y: neuron_coverage(net, [(xb, y)] * 2),
    'neuron_coverage, loader fails': lambda net, layer, xb, y: neuron_coverage(net, broken([(xb, y)])),
    'neuron_coverage, network fails': lambda net, layer, xb, y: neuron_coverage(net, [(xb[:, :1], y)]),
    'deletion_curve': lambda net, layer, xb, y: deletion_curve(net, xb, torch.ones(len(xb), 1, 2, 2), steps=2),
    'deletion_curve, network fails': lambda net, layer, xb, y: deletion_curve(net, xb[:, :1], torch.ones(len(xb), 1, 2, 2), steps=2),
    'insertion_curve': lambda net, layer, xb, y: insertion_curve(net, xb, torch.ones(len(xb), 1, 2, 2), y, steps=2),
    'occlusion_accuracy': lambda net, layer, xb, y: occlusion_accuracy(net, [(xb, y)], (0., 0.5), layer),
    'occlusion_accuracy, loader fails': lambda net, layer, xb, y: occlusion_accuracy(net, broken([(xb, y)]), (0.1,), layer),
}
WAYS = {'a Sequential': ('fastai vision_learner', None), 'traced': ('resnet18', None), 'beside a shortcut': ('resnet18', 'layer4.1.conv1')}


NEEDS_LAYER = 'model_attribution', 'attributed', 'occlusion_accuracy'


@pytest.mark.parametrize('use, way', [(use, way) for way in WAYS for use in USES if way != 'beside a shortcut' or use.startswith(NEEDS_LAYER)])
def test_a_measure_leaves_no_trace(use, way):
    name, layer = WAYS[way]
    net, xb, y = in_use(build(name)), images(2, NETWORKS[name].size), torch.tensor([1, 7])
    fails = pytest.raises((Unlucky, RuntimeError)) if 'fails' in use else nullcontext()
    if layer and 'method fails' in use: fails = pytest.raises(ValueError, match='cannot be cut')  # as a function needs
    with untouched(net), fails: USES[use](net, layer, xb, y)


def test_a_network_between_batches_is_in_the_mode_it_was_in(small_net):
    net, x = in_use(small_net()), images(4, 8)
    modes = [m.training for m in net.modules()]
    for _ in attributed([(x, None)] * 2, net): assert [m.training for m in net.modules()] == modes and torch.is_grad_enabled()


# FocusRecorder: a training with it

class Jitter(RandTransform):
    "Augmentation that draws from all three generators"
    split_idx = 0
    def encodes(self, x: TensorImage): return x + 0.5 * torch.randn(x.shape) + 0.2 * np.random.randn() + 0.2 * random.random()


def photo(i): return TensorImage(PHOTOS[i])
def kind(i): return str(KIND[i].item())
KIND = torch.arange(56) % 4
PHOTOS = images(56, 8) + 0.3 * torch.eye(4)[KIND][:, :3, None, None]  # each kind has a colour, not always plain to see
N_TRAIN, N_VALID = 40, 16


def loaders(where='after_batch', num_workers=0, n_valid=N_VALID, bs=8):
    "Pictures that are augmented in training: each by itself, in batches, or as a part of the set"
    ranges = [range(N_TRAIN), range(N_TRAIN, N_TRAIN + n_valid)]
    image = [photo, Jitter(p=1.)] if where == 'dataset' else [photo]
    items = Datasets(range(N_TRAIN + n_valid), [image, [kind, Categorize(['0', '1', '2', '3'])]], splits=ranges)
    return items.dataloaders(bs=bs, device='cpu', num_workers=num_workers, **({where: [Jitter(p=1.)]} if where != 'dataset' else {}))


def learner(net, path, cbs=None, metrics=accuracy, lr=0.2, **kwargs):
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)
    learn = Learner(loaders(**kwargs), net, loss_func=CrossEntropyLossFlat(), opt_func=SGD, lr=lr, path=path, cbs=cbs, metrics=metrics)
    learn.remove_cb(learn.progress)
    learn.logger = lambda row: None
    return learn


def by_hand(net, recorder, part='valid', n=None):
    "The last row of a record: from the images themselves, one loader and one network away from what the recorder uses"
    first, size = dict(train=(0, N_TRAIN), valid=(N_TRAIN, N_VALID))[part]
    chosen = first + torch.linspace(0, size - 1, min(recorder.n_images, size)).long()
    A = model_attribution(net, PHOTOS[chosen], layer=recorder.layer, method=recorder.method)
    right = (copy.deepcopy(net).eval()(PHOTOS[chosen]).argmax(1) == KIND[chosen]).float().mean().item()
    return dict(attribution_ratio=attribution_ratio(A, recorder.threshold).mean().item(), effective_area=effective_area(A).mean().item(), accuracy=right)


def agrees(net, recorder):
    row, valid, train = recorder.history[-1], by_hand(net, recorder), by_hand(net, recorder, 'train')
    theirs = dict(attribution_ratio=valid['attribution_ratio'], effective_area=valid['effective_area'], valid_accuracy=valid['accuracy'],
                  train_accuracy=train['accuracy'], generalization_gap=train['accuracy'] - valid['accuracy'])
    return {k: row[k] for k in theirs} == pytest.approx(theirs, abs=1e-5)


def aligned(learn, recorder):
    "Do the rows of fastai's `Recorder` have the columns where its names say?"
    names, rows = list(learn.recorder.metric_names)[1:], learn.recorder.values
    names = names[:-1] if learn.recorder.add_time else names
    assert len(rows) == len(recorder.history) and all(len(row) == len(names) for row in rows)
    return all(row[names.index(c)] == r[c] for row, r in zip(rows, recorder.history) for c in FocusRecorder.columns)


class Generators(Callback):
    "The state of all generators at the end of each epoch"
    order = 90
    def before_fit(self): self.states = []
    def after_epoch(self): self.states.append((torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()))


@pytest.mark.parametrize('beside, num_workers', [(None, 0), (SGDropCallback, 0), (MixUp, 0), (None, 1)])
def test_the_training_does_not_notice(beside, num_workers, small_net, tmp_path):
    def run(*recorder):
        others = [beside(rho=0.3, p=0.5) if beside is SGDropCallback else beside(0.4)] if beside else []
        learn = learner(small_net(), tmp_path, num_workers=num_workers, where='after_item' if num_workers else 'after_batch')
        learn.fit(2, cbs=[*others, *recorder, generators := Generators()])
        return learn, generators.states
    (plain, plain_states), (followed, states) = run(), run(recorder := FocusRecorder(n_images=10))
    assert same_weights(plain.model, followed.model) and states == plain_states and len(recorder.history) == 2
    assert [m.training for m in plain.model.modules()] == [m.training for m in followed.model.modules()]
    assert [row[:3] for row in plain.recorder.values] == [row[:3] for row in followed.recorder.values]
    assert torch.backends.cudnn.deterministic is False and not hooked(followed.model)
    assert agrees(followed.model, recorder)


def test_the_training_notices_the_jitter(small_net, tmp_path):
    "Else the test before this one would show nothing"
    def trained(seed):
        learn = learner(small_net(), tmp_path)
        torch.manual_seed(seed)
        learn.fit(1)
        return learn.model
    assert not same_weights(trained(0), trained(1))


@pytest.mark.parametrize('where', ['after_item', 'after_batch', 'dataset'])
def test_training_images_are_seen_as_in_validation(where, small_net, tmp_path):
    class Spy(Callback):
        order = 70
        def after_epoch(self): self.seen = {part: torch.cat([x.as_subclass(torch.Tensor) for x, _ in batches]) for part, batches in recorder.samples.items()}
    learn = learner(small_net(), tmp_path, recorder := FocusRecorder(n_images=10), where=where)
    learn.fit(2, cbs=(spy := Spy()))
    assert spy.seen['valid'].equal(PHOTOS[N_TRAIN + torch.linspace(0, N_VALID - 1, 10).long()])
    assert spy.seen['train'].equal(PHOTOS[torch.linspace(0, N_TRAIN - 1, 10).long()])
    assert agrees(learn.model, recorder)
    assert not learn.dls.train.new(shuffle=False).one_batch()[0].as_subclass(torch.Tensor).equal(PHOTOS[:8])  # the training goes on as before


def test_augmented_images_are_seen_as_training_shows_them_if_asked_for(small_net, tmp_path):
    class Spy(Callback):
        order = 70
        def after_epoch(self): self.seen = torch.cat([x.as_subclass(torch.Tensor) for x, _ in recorder.samples['train']])
    learn = learner(small_net(), tmp_path, recorder := FocusRecorder(n_images=10, augmented=True))
    learn.fit(2, cbs=(spy := Spy()))
    assert not spy.seen.equal(PHOTOS[torch.linspace(0, N_TRAIN - 1, 10).long()])


@pytest.mark.parametrize('settings', [
    dict(), dict(layer='0'), dict(layer='the module'), dict(threshold=0.3), dict(method='gradcam'), dict(n_images=1), dict(n_images=7), dict(n_images=1000)])
def test_a_row_is_what_one_measures_by_hand(settings, small_net, tmp_path):
    net = nn.Sequential(*small_net()[:1], nn.MaxPool2d(2), *small_net()[1:])
    recorder = FocusRecorder(**{**settings, **({'layer': net[0]} if settings.get('layer') == 'the module' else {})})
    learner(net, tmp_path, recorder).fit(2)
    assert agrees(net, recorder) and [row['epoch'] for row in recorder.history] == [0, 1]
    assert recorder.maps[-1].shape[1:] == ((1, 8, 8) if 'layer' in settings else (1, 4, 4))


def test_it_sees_as_many_images_as_it_was_asked_to_each_once(small_net, tmp_path):
    def counted(n_images):
        sizes = []
        def method(psi, z, classes): sizes.append(len(z)); return z.abs()
        learner(small_net(), tmp_path, FocusRecorder(n_images=n_images, method=method)).fit(2)
        return sum(sizes)
    assert counted(10) == 2 * 20 and counted(1) == 2 * 2 and counted(1000) == 2 * (N_TRAIN + N_VALID)


@pytest.mark.parametrize('wrong', [dict(n_images=0), dict(threshold=1.), dict(threshold=-0.1)])
def test_a_setting_that_means_nothing_is_named_at_once(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))): FocusRecorder(**wrong)


# Its columns

@pytest.mark.parametrize('metrics', [[], accuracy, [accuracy, error_rate]])
@pytest.mark.parametrize('recording', [dict(), dict(add_time=False), dict(train_metrics=True), dict(valid_metrics=False), dict(train_metrics=True, valid_metrics=False)])
def test_values_stand_under_their_names(recording, metrics, small_net, tmp_path):
    recorder = FocusRecorder(n_images=10)
    learn = learner(small_net(), tmp_path, recorder, metrics)
    learn.remove_cb(Recorder)
    learn.add_cb(Recorder(**recording))
    learn.fit(2)
    names = list(learn.recorder.metric_names)
    assert aligned(learn, recorder) and [n for n in names if n in FocusRecorder.columns] == FocusRecorder.columns
    assert (names[-1] == 'time') == recording.get('add_time', True)


class CancelsValidation(Callback):
    def before_validate(self): raise CancelValidException


def test_a_cancelled_validation_leaves_its_columns_empty_and_the_others_in_place(small_net, tmp_path):
    recorder = FocusRecorder(n_images=10)
    learn = learner(small_net(), tmp_path, [recorder, CancelsValidation()], [accuracy, error_rate])
    learn.fit(2)
    assert aligned(learn, recorder) and agrees(learn.model, recorder)
    assert all(row[1:4] == [None] * 3 for row in learn.recorder.values)


def test_the_csv_file_has_the_columns(small_net, tmp_path):
    recorder = FocusRecorder(n_images=10)
    learn = learner(small_net(), tmp_path, recorder)
    learn.fit(3, cbs=CSVLogger())
    table = CSVLogger.read_log(type('Logged', (), dict(path=tmp_path, fname='history.csv')))
    assert list(table.columns) == list(learn.recorder.metric_names) == ['epoch', 'train_loss', 'valid_loss', 'accuracy', *FocusRecorder.columns, 'time']
    for c in FocusRecorder.columns: assert table[c].tolist() == pytest.approx([row[c] for row in recorder.history])


def test_the_logger_is_given_the_values(small_net, tmp_path):
    recorder = FocusRecorder(n_images=10)
    learn = learner(small_net(), tmp_path, recorder)
    shown = []
    learn.logger = shown.append
    learn.fit(1)
    assert shown[-1][-4:-1] == [recorder.history[-1][c] for c in FocusRecorder.columns]


def test_the_model_of_the_narrowest_epoch_can_be_kept(small_net, tmp_path, capsys):
    recorder = FocusRecorder(n_images=10)
    learn = learner(small_net(), tmp_path, recorder, lr=0.5)
    learn.fit(4, cbs=SaveModelCallback(monitor='effective_area', comp=np.less))
    areas = [row['effective_area'] for row in recorder.history]
    assert by_hand(learn.model, recorder)['effective_area'] == pytest.approx(min(areas), abs=1e-5) and max(areas) > min(areas) + 1e-4


def test_a_gap_that_does_not_grow_can_stop_a_training(tmp_path, capsys):
    recorder = FocusRecorder(n_images=10)
    learner(tiny_net(classes=4), tmp_path, recorder, lr=0.).fit(9, cbs=EarlyStoppingCallback(monitor='generalization_gap'))
    assert len(recorder.history) == 2


# When it records, and when not

def test_looking_around_between_fits_records_nothing_and_forgets_nothing(small_net, tmp_path):
    recorder = FocusRecorder(n_images=10)
    learn = learner(small_net(), tmp_path, recorder)
    scores = learn.validate()
    learn.get_preds()
    assert not recorder.history and len(scores) == 2
    learn.fit(2)
    kept, maps = copy.deepcopy(recorder.history), list(recorder.maps)
    learn.lr_find(num_it=3, show_plot=False, suggest_funcs=None)
    assert len(learn.validate()) == 2
    learn.validate(ds_idx=0)
    learn.get_preds()
    learn.get_preds(ds_idx=0, with_loss=True)
    learn.predict(TensorImage(PHOTOS[0]))
    assert recorder.history == kept and recorder.maps == maps and recorder.samples is None
    learn.fit(1)
    assert len(recorder.history) == 1 and aligned(learn, recorder) and agrees(learn.model, recorder)


def test_each_fit_makes_its_own_record(small_net, tmp_path):
    recorder = FocusRecorder(n_images=10)
    learn = learner(small_net(), tmp_path, recorder)
    for n in (2, 3, 1):
        learn.fit(n)
        assert [row['epoch'] for row in recorder.history] == list(range(n)) and len(recorder.maps) == n
        assert aligned(learn, recorder) and agrees(learn.model, recorder)


class Stops(Callback):
    order = 80
    def __init__(self, error, event, epoch=1): setattr(self, event, self.stop); self.error, self.at_epoch = error, epoch
    def stop(self):
        if self.epoch == self.at_epoch: raise self.error


@pytest.mark.parametrize('error', [Unlucky('no luck'), KeyboardInterrupt()], ids=['error', 'interrupt'])
@pytest.mark.parametrize('event', ['after_batch', 'after_train', 'before_validate', 'after_validate', 'after_epoch'])
def test_after_a_fit_that_broke_off_the_next_one_is_recorded(event, error, small_net, tmp_path):
    recorder = FocusRecorder(n_images=10)
    learn = learner(small_net(), tmp_path, recorder)
    with pytest.raises(type(error)): learn.fit(3, cbs=Stops(error, event))
    assert len(recorder.history) == len(recorder.maps) == (2 if event in ('after_validate', 'after_epoch') else 1)
    learn.validate()
    learn.get_preds()
    assert len(recorder.history) in (1, 2)
    learn.fit(2)
    assert [row['epoch'] for row in recorder.history] == [0, 1] and aligned(learn, recorder) and agrees(learn.model, recorder)


def test_an_interrupt_in_the_midst_of_measuring_leaves_everything_in_order(small_net, tmp_path):
    def interrupted(psi, z, classes): random.random(); np.random.rand(); torch.rand(3); raise KeyboardInterrupt
    learn = learner(small_net(), tmp_path, FocusRecorder(n_images=10, method=interrupted))
    class States(Generators):
        order = 45  # before it measures
        def after_validate(self): self.after_epoch()
    with pytest.raises(KeyboardInterrupt): learn.fit(1, cbs=(before := States()))
    assert before.states[-1] == (torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist())
    assert not hooked(learn.model) and torch.is_grad_enabled()


def test_after_an_lr_find_that_was_interrupted_the_next_fit_is_recorded(small_net, tmp_path):
    recorder = FocusRecorder(n_images=10)
    learn = learner(small_net(), tmp_path, [recorder, stop := Stops(KeyboardInterrupt(), 'after_batch', epoch=0)])
    with pytest.raises(KeyboardInterrupt): learn.lr_find(num_it=3, show_plot=False, suggest_funcs=None)
    learn.remove_cb(stop)
    learn.fit(1)
    assert len(recorder.history) == 1 and aligned(learn, recorder)


def test_a_fit_that_starts_at_a_later_epoch_is_recorded_and_drawn_from_there(small_net, tmp_path):
    recorder = FocusRecorder(n_images=10)
    learner(small_net(), tmp_path, recorder).fit(4, start_epoch=2)
    assert [row['epoch'] for row in recorder.history] == [2, 3]
    assert [ax.get_title() for ax in recorder.plot_maps()[0]] == ['', 'epoch 3', 'epoch 4']
    assert [ax.get_title() for ax in recorder.plot_maps([3])[0]] == ['', 'epoch 4']
    plt.close('all')


# Which sets, labels and networks

@pytest.mark.parametrize('made_by', ['Datasets', 'lists'])
def test_without_validation_images_the_training_images_are_measured(made_by, small_net, tmp_path):
    recorder = FocusRecorder(n_images=10)
    learn = learner(small_net(), tmp_path, recorder, n_valid=0)
    if made_by == 'lists': learn.dls = DataLoaders.from_dsets(list(zip(PHOTOS[:N_TRAIN], KIND)), [], bs=8, device='cpu', num_workers=0)
    learn.fit(2)
    row, theirs = recorder.history[-1], by_hand(learn.model, recorder, 'train')
    assert aligned_but_for_nan(learn, recorder) and math.isnan(row['generalization_gap'])
    assert row['effective_area'] == pytest.approx(theirs['effective_area'], abs=1e-5) and row['train_accuracy'] == pytest.approx(theirs['accuracy'], abs=1e-5)
    assert len(recorder.plot_maps()) == 4 and recorder.plot()
    plt.close('all')


def aligned_but_for_nan(learn, recorder):
    names = list(learn.recorder.metric_names)
    return all(row[names.index(c) - 1] == r[c] for row, r in zip(learn.recorder.values, recorder.history) for c in FocusRecorder.columns[:2])


def test_with_several_labels_an_image_is_right_if_its_strongest_class_is_one_of_them(small_net, make_learner):
    labels = (torch.rand(32, 4, generator=torch.Generator().manual_seed(2)) < 0.5).float()
    recorder = FocusRecorder(n_images=1000)
    learn = make_learner(small_net(), recorder, labels=labels, loss_func=BCEWithLogitsLossFlat())
    learn.fit(2)
    best = learn.model.eval()(images(32, 8)).argmax(1)
    right = labels.gather(1, best[:, None])[:, 0]
    assert recorder.history[-1]['train_accuracy'] == pytest.approx(right.mean().item())
    assert recorder.history[-1]['valid_accuracy'] == pytest.approx(right[:16].mean().item())


def test_a_network_within_data_parallel_is_followed(small_net, tmp_path):
    recorder = FocusRecorder(n_images=10, layer='1')
    net = nn.DataParallel(small_net(), device_ids=[])  # on the CPU, wherever there is a GPU
    learner(net, tmp_path, recorder).fit(2)
    assert agrees(net.module, recorder)


@pytest.mark.parametrize('name, layer', [('resnet18', None), ('resnet18', 'layer4.1.conv1'), ('vgg11_bn', None)])
def test_any_network_is_followed(name, layer, make_learner):
    recorder = FocusRecorder(n_images=5, layer=layer)
    learn = make_learner(build(name), recorder, n=8, bs=4, size=64, classes=10)
    learn.fit(1, 1e-3)
    A = model_attribution(learn.model, images(8, 64)[torch.linspace(0, 7, 5).long()], layer=layer or NETWORKS[name].layer)
    # the sample comes in batches of four, which rounds what is next to zero otherwise
    assert recorder.history[0]['attribution_ratio'] == pytest.approx(attribution_ratio(A).mean().item(), abs=2e-3) and not hooked(learn.model)


def test_a_network_in_bfloat16_is_followed(small_net, make_learner):
    class ToHalf(Callback):
        "What NonNativeMixedPrecision does on a GPU"
        order = 10
        def before_batch(self): self.learn.xb = tuple(x.bfloat16() for x in self.xb)
        def after_pred(self): self.learn.pred = self.pred.float()
    recorder = FocusRecorder(n_images=10)
    make_learner(small_net().bfloat16(), [ToHalf(), recorder]).fit(2)
    assert len(recorder.history) == 2 and 0 < recorder.history[-1]['effective_area'] <= 1


# Keeping and letting go

def test_after_the_fit_it_holds_neither_the_network_nor_the_sample(small_net, tmp_path):
    class Refs(Callback):
        order = 70
        def after_epoch(self): self.sample = [weakref.ref(t) for batches in recorder.samples.values() for batch in batches for t in batch]
    recorder, learn = FocusRecorder(n_images=10), learner(small_net(), tmp_path)
    learn.fit(1, cbs=[recorder, refs := Refs()])
    gone = [weakref.ref(learn), weakref.ref(learn.model), weakref.ref(learn.model[0]), *refs.sample]
    assert recorder.samples is None
    del learn
    gc.collect()
    assert [ref() for ref in gone] == [None] * len(gone) and len(gone) > 6 and len(recorder.history) == 1


@pytest.mark.parametrize('layer', [None, '0', 'the module'])
@pytest.mark.parametrize('when', ['before', 'after'])
def test_an_exported_learner_comes_back_and_records_on(when, layer, small_net, tmp_path):
    net = small_net()
    recorder = FocusRecorder(n_images=10, layer=net[0] if layer == 'the module' else layer, threshold=0.1, n_maps=2)
    learn = learner(net, tmp_path, recorder)
    learn.logger = print  # can be pickled
    if when == 'after': learn.fit(2)
    learn.export()
    loaded = load_learner(tmp_path / 'export.pkl')
    cb, = [cb for cb in loaded.cbs if isinstance(cb, FocusRecorder)]
    assert same_weights(loaded.model, net) and cb.history == recorder.history and (cb.n_images, cb.threshold, cb.n_maps) == (10, 0.1, 2)
    loaded.predict(TensorImage(PHOTOS[0]))
    loaded.dls = learn.dls
    loaded.fit(1)
    assert aligned(loaded, cb) and cb.maps[0].shape == (2, 1, 8, 8)


def test_an_export_holds_neither_a_second_network_nor_the_sample(small_net, tmp_path):
    def size(cb):
        learn = learner(nn.Sequential(*small_net()[:-1], nn.Linear(8, 5000), nn.Linear(5000, 4)), tmp_path, cb)
        learn.logger = print
        with pytest.raises(Unlucky): learn.fit(3, cbs=Stops(Unlucky('no luck'), 'after_train'))  # nobody told it that the fit is over
        learn.export()
        return (tmp_path / 'export.pkl').stat().st_size
    assert size(FocusRecorder()) < size(None) + 20_000  # the sample would be 56 images of 768 bytes


@pytest.mark.parametrize('twin_of', [copy.deepcopy, lambda cb: pickle.loads(pickle.dumps(cb))], ids=['deepcopy', 'pickle'])
@pytest.mark.parametrize('used', [False, True])
def test_a_copy_does_the_same(used, twin_of, small_net, tmp_path):
    recorder = FocusRecorder(n_images=10, threshold=0.2)
    if used: learner(small_net(), tmp_path).fit(2, cbs=recorder)
    twin = twin_of(recorder)
    assert twin.history == recorder.history and len(twin.maps) == len(recorder.maps)
    if used: assert twin.plot() is not None and twin.plot_maps() is not None
    plt.close('all')
    for cb in (recorder, twin): learner(small_net(), tmp_path).fit(1, cbs=cb)
    assert twin.history == recorder.history and all(a.equal(b) for a, b in zip(twin.maps, recorder.maps))


# Its pictures

@pytest.fixture(scope='module')
def followed(tmp_path_factory):
    "A recorder after a fit of six epochs, and the network"
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))
    recorder = FocusRecorder(n_images=10, n_maps=3)
    learner(net, tmp_path_factory.mktemp('followed')).fit(6, cbs=recorder)
    return recorder, net


@pytest.fixture
def figures():
    plt.close('all')
    yield
    plt.close('all')


def test_a_plot_draws_the_record_on_the_axes_it_is_given(followed, figures):
    recorder, _ = followed
    ax = plt.subplots()[1]
    assert recorder.plot(ax) is ax and plot_focus(recorder.history, plt.subplots()[1]).figure is not ax.figure and len(plt.get_fignums()) == 2
    gap_ax, = [a for a in ax.figure.axes if a is not ax]
    (ratio,), (gap,) = ax.lines, gap_ax.lines
    assert ratio.get_xdata().tolist() == gap.get_xdata().tolist() == [1, 2, 3, 4, 5, 6]
    assert ratio.get_ydata().tolist() == [r['attribution_ratio'] for r in recorder.history]
    assert gap.get_ydata().tolist() == [r['generalization_gap'] for r in recorder.history]
    assert (ax.get_ylabel(), gap_ax.get_ylabel(), ax.get_xlabel()) == ('attribution ratio', 'generalization gap', 'epoch')
    assert recorder.plot() is not ax


def test_maps_are_of_the_images_and_epochs_they_say(followed, figures):
    recorder, net = followed
    chosen = N_TRAIN + torch.linspace(0, N_VALID - 1, 10).long()[torch.linspace(0, 9, 3).long()]
    A = model_attribution(net, PHOTOS[chosen])
    torch.testing.assert_close(recorder.maps[-1], A.sum(1, keepdim=True), rtol=1e-4, atol=1e-5)
    low, high = (f(PHOTOS[chosen], (1, 2, 3), keepdim=True) for f in (torch.amin, torch.amax))
    torch.testing.assert_close(recorder.images, (PHOTOS[chosen] - low) / (high - low))  # nobody told how they were normalized
    axes = recorder.plot_maps()
    assert axes.shape == (3, 5) and [ax.get_title() for ax in axes[0]] == ['', 'epoch 1', 'epoch 3', 'epoch 4', 'epoch 6']
    for row, share in zip(axes, pixel_shares(recorder.maps[-1], (8, 8))):
        assert np.asarray(row[-1].images[-1].get_array()) == pytest.approx((64 * share[0]).numpy(), abs=1e-5)


def test_maps_are_drawn_on_the_axes_and_the_scale_they_are_given(followed, figures):
    recorder, _ = followed
    given = plt.subplots(3, 3, squeeze=False)[1]
    axes = recorder.plot_maps([0, 5], vmax=4., axes=given)
    assert axes is given and len(plt.get_fignums()) == 1 and [ax.get_title() for ax in axes[0]] == ['', 'epoch 1', 'epoch 6']
    assert {ax.images[-1].get_clim() for ax in axes[:, 1:].flat} == {(0., 4.)}
    assert plot_attribution_history(recorder.images, {0: recorder.maps[0]}).shape == (3, 2)


@pytest.mark.parametrize('n_maps, kept', [(0, 0), (1, 1), (100, 10)])
def test_as_many_maps_as_asked_for_are_kept(n_maps, kept, small_net, tmp_path, figures):
    recorder = FocusRecorder(n_images=10, n_maps=n_maps)
    learner(small_net(), tmp_path, recorder).fit(2)
    assert [len(m) for m in recorder.maps] == [kept] * 2 and len(recorder.history) == 2
    if kept: assert recorder.plot_maps().shape == (kept, 3)


def test_before_a_fit_there_is_nothing_to_draw():
    for draw in (FocusRecorder().plot, FocusRecorder().plot_maps):
        with pytest.raises(ValueError, match='fit first'): draw()


def test_images_are_shown_within_bounds_whatever_their_scale(small_net, tmp_path):
    dl = learner(small_net(), tmp_path).dls.valid
    x = torch.rand(2, 3, 4, 4)
    assert denormalize(dl, x).equal(x) and denormalize(object(), x).equal(x)
    torch.testing.assert_close(denormalize(dl, (255 * x).round()), x, atol=0.01, rtol=0)
    for strange in (10 * x - 5, torch.zeros(2, 3, 4, 4) - 3): assert 0 <= denormalize(dl, strange).min() and denormalize(dl, strange).max() <= 1


# What it costs

@pytest.fixture
def one_thread():
    "`process_time` adds up the time of all threads"
    n = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n)


@pytest.mark.photographs
def test_it_adds_at_most_a_twentieth_to_an_epoch_of_imagenette(one_thread, tmp_path):
    """Extrapolated: training on 640 images and validation on 400 is timed, and taken to last as much longer as the whole of
    Imagenette (9,469 and 3,925 images) is larger. The recorder's own cost does not depend on the size of the set. Time of the processor, at 64 pixels."""
    dls = imagenette(n_per_class=64, num_workers=0)
    few = torch.linspace(0, len(dls.valid_ds) - 1, 400).long().tolist()
    dls = DataLoaders(dls.train, dls.valid.new(get_idxs=lambda: few, n=400))
    cost = dict(train=[], valid=[], recorder=[])
    class Timed(FocusRecorder):
        def after_validate(self):
            began = time.process_time()
            super().after_validate()
            cost['recorder'].append(time.process_time() - began)
    class Clock(Callback):
        order = FocusRecorder.order - 0.5  # stops before the recorder begins
        def before_train(self): self.began = time.process_time()
        def after_train(self): cost['train'].append(time.process_time() - self.began)
        def before_validate(self): self.began = time.process_time()
        def after_validate(self): cost['valid'].append(time.process_time() - self.began)
    learn = Learner(dls, small_resnet((32, 2), (64, 2), (128, 2)), loss_func=CrossEntropyLossFlat(), metrics=accuracy, path=tmp_path)
    with learn.no_bar(), learn.no_logging(): learn.fit(2, cbs=[recorder := Timed(), Clock()])
    assert len(recorder.history) == 2
    epoch = min(cost['train']) * 9469 / 640 + min(cost['valid']) * 3925 / 400
    first, later = (1 + seconds / epoch for seconds in cost['recorder'])
    print(f'\nan epoch {epoch:.1f} s; with the recorder: the first {first:.3f} times as long, a later one {later:.3f}')
    assert first <= 1.05 and later <= 1.03
