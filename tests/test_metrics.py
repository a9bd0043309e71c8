"The measures of focus against other libraries and against slow derivations."
import copy
import random
import weakref
from contextlib import contextmanager, nullcontext

import numpy as np
import pytest
import torch
from fastai.torch_core import TensorImage
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy import integrate, ndimage
from torch import nn

from attributions import made
from networks import build, hooked, images, small_network
from sgdrop.attribution import grad_x_act
from sgdrop.metrics import (
    _blurred, _covered_layers, _pixel_ranks, _shuffled_positions, attributed,
    attribution_ratio, curve_auc, deletion_curve, effective_area, gini,
    insertion_curve, model_attribution, neuron_coverage, occlusion_accuracy,
    pixel_shares, pointing_game, region_iou, relevance_mass)


# Any attribution, any region

def made_region(A, share, seed, size=None):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(len(A), 1, *(size or A.shape[2:]), generator=generator) < share


KINDS = ['ties', 'sparse', 'zero', 'flat', 'spread', 'distinct']
sizes = st.integers(1, 7)
image_sizes = st.tuples(st.integers(7, 12), st.integers(7, 12))
seeds = st.integers(0, 2**20)
region_shares = st.floats(0.05, 0.95)
some = settings(max_examples=60)


def attributions(kinds=KINDS, channels=st.integers(1, 4)):
    shapes = st.tuples(st.integers(1, 4), channels, sizes, sizes)
    return st.builds(made, shapes, st.sampled_from(kinds), seeds)


# Against quantus

@pytest.fixture(scope='module')
def quantus(): return pytest.importorskip('quantus')


def by_quantus(metric, A, region=None):
    "A metric of quantus; its checks before it refuse maps with a side of one pixel"
    maps = A.double().sum(1, keepdim=True).numpy()
    maps = maps / maps.max((1, 2, 3), keepdims=True)
    masks = None if region is None else region.numpy()
    found = metric(disable_warnings=True).evaluate_batch(
        x_batch=None, a_batch=maps, s_batch=masks)
    return np.array(found, dtype=float)


@some
@given(A=attributions(['ties', 'sparse', 'spread', 'distinct']), share=region_shares,
       seed=seeds)
def test_gini_area_and_mass_are_those_of_quantus(quantus, A, share, seed):
    region = made_region(A, share, seed)
    assume(A.flatten(1).amax(1).min() > 0 and region.flatten(1).any(1).all())
    sparseness, complexity = (by_quantus(m, A)
                              for m in (quantus.Sparseness, quantus.Complexity))
    mass = by_quantus(quantus.RelevanceMassAccuracy, A, region)
    assert gini(A).numpy() == pytest.approx(sparseness, abs=2e-5)
    area = np.exp(complexity) / A[0, 0].numel()
    assert effective_area(A).numpy() == pytest.approx(area, rel=1e-5)
    assert relevance_mass(A, region).numpy() == pytest.approx(mass, abs=1e-6)


@some
@given(A=attributions(['distinct'], st.just(1)), share=region_shares, seed=seeds)
def test_iou_and_pointing_game_are_those_of_quantus(quantus, A, share, seed):
    region = made_region(A, share, seed)
    assume(region.flatten(1).any(1).all())
    both = by_quantus(quantus.RelevanceRankAccuracy, A, region)  # sets of one size
    assert region_iou(A, region).numpy() == pytest.approx(both / (2 - both), abs=1e-6)
    hits = by_quantus(quantus.PointingGame, A, region).astype(bool)
    assert pointing_game(A, region).tolist() == hits.tolist()


def tiny_net(channels=3, classes=3):
    return nn.Sequential(
        nn.Conv2d(channels, 4, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1),
        nn.Flatten(), nn.Linear(4, classes))


def test_the_deletion_curve_is_the_pixel_flipping_of_quantus(quantus):
    A = made((5, 1, 6, 6), 'distinct', 0)
    for channels, steps in ((1, 36), (3, 9)):
        net, x = tiny_net(channels).eval(), torch.randn(5, channels, 6, 6)
        for target in (torch.tensor([0, 1, 2, 1, 0]), net(x).argmax(1)):
            flipping = quantus.PixelFlipping(
                features_in_step=36 * channels // steps, perturb_baseline=0.,
                disable_warnings=True)
            theirs = flipping(net, x.numpy(), target.numpy(), A.numpy(),
                              channel_first=True, softmax=True, device='cpu')
            ours = deletion_curve(net, x, A, target, steps=steps)[:, 1:].numpy()
            assert ours == pytest.approx(np.array(theirs), abs=1e-6)


# What quantus does not have: slowly, and in float64

@given(attributions(), st.integers(0, 99))
def test_the_attribution_ratio_counts_elements(A, hundredths):
    # whole numbers, so that no threshold is rounded
    rows = [[int(v * 2**7) for v in row] for row in A.flatten(1).tolist()]
    slowly = [sum(100 * v > hundredths * max(row) for v in row) / len(row)
              for row in rows]
    # a tie with the threshold, which float32 may round either way
    near = any(100 * v == hundredths * max(row) and v for row in rows for v in row)
    assume(not near)
    ours = attribution_ratio(A, hundredths / 100).tolist()
    assert ours == pytest.approx(slowly, abs=1e-6)


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
            top, bottom, v = ends(i, h, height)
            left, right, u = ends(j, w, width)
            upper = (1 - u) * plane[top, left] + u * plane[top, right]
            lower = (1 - u) * plane[bottom, left] + u * plane[bottom, right]
            out[i, j] = (1 - v) * upper + v * lower
    return out


@some
@given(attributions(), image_sizes)
def test_pixel_shares_are_the_enlarged_sum_of_the_channels(A, size):
    for a, ours in zip(A.double().numpy(), pixel_shares(A, size)):
        slowly = enlarged(a.sum(0), *size)
        slowly = slowly / max(slowly.sum(), 1e-9)
        assert ours.shape == (1, *size)
        assert ours[0].numpy() == pytest.approx(slowly, abs=1e-6)


@given(attributions())
def test_ranks_are_places_in_a_sorted_list_and_ties_keep_the_order_of_reading(A):
    sums = A.double().sum(1).flatten(1).tolist()
    orders = [sorted(range(len(row)), key=lambda i: (-row[i], i)) for row in sums]
    slowly = [[order.index(i) for i in range(len(order))] for order in orders]
    ranks = _pixel_ranks(A, A.shape[2:])
    assert ranks.shape == (len(A), 1, *A.shape[2:])
    assert ranks.flatten(1).tolist() == slowly


@some
@given(attributions(['spread', 'sparse', 'distinct']), image_sizes, region_shares,
       seeds)
def test_a_region_is_compared_at_the_size_of_the_image(A, size, share, seed):
    region, shares = made_region(A, share, seed, size), pixel_shares(A, size)
    measures = [m(A, region) for m in (relevance_mass, pointing_game, region_iou)]
    for r, e, mass, hit, iou in zip(region.flatten(1).tolist(),
                                    shares.double().flatten(1).tolist(), *measures):
        best = sorted(range(len(e)), key=lambda k: (-e[k], k))
        salient, inside = set(best[:sum(r)]), {k for k, v in enumerate(r) if v}
        assert mass.item() == pytest.approx(sum(e[k] for k in inside), abs=1e-5)
        assert hit.item() == (r[best[0]] and e[best[0]] > 0)
        overlap = len(salient & inside) / len(salient | inside) if inside else np.nan
        assert iou.item() == pytest.approx(overlap, nan_ok=True)


def touchy_net(height, width):
    "Untrained, and yet its prediction changes when a part of the image is covered"
    return nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Flatten(),
                         nn.Linear(4 * height * width, 3))


def slow_curve(net, before, after, A, c, steps):
    "One image at a time, one pixel at a time, in float64"
    net, curves = copy.deepcopy(net).double().eval(), []
    all_ranks = _pixel_ranks(A, before.shape[2:]).flatten(1).tolist()
    for b, a, ranks, k in zip(before.double(), after.double(), all_ranks, c.tolist()):
        n, canvas, curve = len(ranks), b.clone(), []
        for step in range(steps + 1):
            for pixel in range(n):
                if ranks[pixel] < round(n * step / steps):
                    canvas.flatten(1)[:, pixel] = a.flatten(1)[:, pixel]
            curve.append(net(canvas[None]).softmax(1)[0, k].item())
        curves.append(curve)
    return curves


@pytest.mark.parametrize('size, steps', [((5, 6), 5), ((8, 4), 16)])
def test_curves_equal_a_slow_derivation(size, steps):
    net, x, A = touchy_net(*size), torch.randn(9, 3, *size), torch.rand(9, 2, 3, 3)
    canvas, c = torch.randn(9, 3, *size), torch.arange(9) % 3
    colour, zeros = canvas.mean((0, 2, 3), keepdim=True), torch.zeros_like(x)
    best, ones = net(x).argmax(1), torch.ones(9).long()
    assert not net(_blurred(x)).argmax(1).equal(best)
    pairs = [
        (deletion_curve(net, x, A, c, steps), (x, zeros, A, c)),
        (deletion_curve(net, x, A, c, steps, 0.7), (x, zeros + 0.7, A, c)),
        (deletion_curve(net, x, A, c, steps, colour), (x, zeros + colour, A, c)),
        (deletion_curve(net, x, A, steps=steps), (x, zeros, A, best)),
        (deletion_curve(net, x, A, 1, steps), (x, zeros, A, ones)),
        (insertion_curve(net, x, A, c, steps, canvas), (canvas, x, A, c)),
        (insertion_curve(net, x, A, steps=steps), (_blurred(x), x, A, best))]
    for ours, arguments in pairs:
        theirs = slow_curve(net, *arguments, steps)
        assert ours.tolist() == [pytest.approx(row, abs=1e-5) for row in theirs]


def test_the_blur_is_that_of_scipy():
    for size in ((20, 20), (20, 12), (5, 9)):
        x, sigma = torch.randn(2, 3, *size), size[0] / 10
        radius = min(int(3 * sigma), min(size) - 1)
        theirs = ndimage.gaussian_filter(
            x.double().numpy(), (0, 0, sigma, sigma), mode='mirror',
            radius=(0, 0, radius, radius))
        assert _blurred(x).numpy() == pytest.approx(theirs, abs=1e-5)


@given(st.lists(st.tuples(*[st.floats(0, 1, width=32)] * 4), min_size=1))
def test_the_area_under_a_curve_is_that_of_scipy(rows):
    theirs = integrate.trapezoid(rows, np.linspace(0, 1, 4), axis=1)
    assert curve_auc(torch.tensor(rows)).numpy() == pytest.approx(theirs, abs=1e-6)


# Occlusion

def batches_of(x, y, bs): return list(zip(x.split(bs), y.split(bs)))


def slow_attribution(net, x):
    "The attribution of each position behind the second layer, a row per image"
    z = net[:2](x).detach().requires_grad_()
    net[2:](z).amax(1).sum().backward()
    return (z.grad * z).clamp(min=0).detach().sum(1).flatten(1)


@pytest.mark.parametrize('fill, seed', [
    (0., 0), (torch.tensor([1., 0., -1.])[:, None, None], 3)])
def test_occlusion_equals_a_derivation_by_hand(fill, seed):
    net, x = touchy_net(8, 6), torch.randn(30, 3, 8, 6)
    y = torch.where(torch.rand(30) < 0.7, net(x).argmax(1), torch.randint(3, (30,)))
    shares, order = (0., 0.1, 0.25, 1.), torch.Generator().manual_seed(seed)
    right = {(kind, share): [] for kind in ('salient', 'random') for share in shares}
    colour = torch.as_tensor(fill).expand(3, 1, 1)[:, :, 0]
    for xs, ys in batches_of(x, y, 8):
        A = slow_attribution(net, xs)
        orders = torch.rand(A.shape, generator=order).argsort(1)
        moved = torch.stack([row[o] for row, o in zip(A, orders)])
        for kind, maps in dict(salient=A, random=moved).items():
            for image, label, row in zip(xs, ys, maps.tolist()):
                by_rank = sorted(range(48), key=lambda i: (-row[i], i))
                for share in shares:
                    covered = image.clone().flatten(1)
                    covered[:, by_rank[:round(48 * share)]] = colour
                    predicted = net(covered.view(1, 3, 8, 6)).argmax()
                    right[kind, share].append((predicted == label).item())
    ours = occlusion_accuracy(net, batches_of(x, y, 8), shares, fill=fill, seed=seed)
    for (kind, share), hits in right.items():
        assert ours[kind][share] == pytest.approx(np.mean(hits), abs=1e-6)
    assert ours['salient'].nunique() > 2 and not ours['salient'].equals(ours['random'])


def test_another_seed_covers_other_random_parts_and_the_same_salient_ones():
    net, x = touchy_net(8, 8), torch.randn(40, 3, 8, 8)
    batches = batches_of(x, net(x).argmax(1), 40)  # all are correct, so covering costs
    one, other = (occlusion_accuracy(net, batches, seed=seed) for seed in (0, 1))
    assert one['salient'].equals(other['salient'])
    assert not one['random'].equals(other['random'])
    with pytest.raises(ValueError, match='did you mean 0.1'):
        occlusion_accuracy(net, batches, (10,))


@given(attributions(), seeds)
def test_shuffled_positions_are_the_same_positions_elsewhere(A, seed):
    shuffled = _shuffled_positions(A, torch.Generator().manual_seed(seed))
    assert shuffled.shape == (len(A), 1, *A.shape[2:])
    before, after = (t.sum(1).flatten(1).sort(1).values for t in (A, shuffled))
    assert after.equal(before)


# Neuron coverage

def slow_coverage(outs, threshold=0.5):
    "Which neurons of a layer are covered, from its outputs, image by image"
    hit = set()
    for image in torch.cat(outs).double():
        means = [channel.mean().item() for channel in image]
        low, high = min(means), max(means)
        hit |= {c for c, v in enumerate(means)
                if high > low and (v - low) / (high - low) > threshold}
    return hit, len(means)


class Twice(nn.Module):
    "Runs one ReLU twice, as the blocks of torchvision's ResNet do"
    def __init__(self):
        super().__init__()
        self.first, self.bn = nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5)
        self.second, self.relu = nn.Conv2d(5, 9, 3), nn.ReLU()
        self.head = nn.Linear(9, 3)
    def between(self, x):
        once = self.bn(self.first(x)).relu()
        return once, self.second(once).relu()
    def forward(self, x):
        once = self.relu(self.bn(self.first(x)))
        return self.head(self.relu(self.second(once)).mean((2, 3)))


def test_coverage_equals_loops_and_counts_a_layer_that_runs_twice_twice():
    net, x = Twice(), torch.randn(10, 3, 8, 8)
    once, again = zip(*(net.eval().between(part) for part in x.split(4)))
    for threshold in (0., 0.5, 0.9):
        ours = neuron_coverage(net.train(), batches_of(x, x, 4), threshold=threshold)
        (a, n), (b, m) = (slow_coverage(outs, threshold) for outs in (once, again))
        theirs = {'relu': len(a) / n, 'relu (2)': len(b) / m,
                  'all': (len(a) + len(b)) / (n + m)}
        assert ours.to_dict() == pytest.approx(theirs)


@pytest.fixture(scope='module')
def resnet(): return build('resnet18')


def test_coverage_of_a_resnet_counts_every_run_of_a_relu(resnet):
    x = images(4, 64)
    covered = neuron_coverage(resnet, batches_of(x, x, 2))
    blocks = [f'layer{i}.{j}.relu{run}'
              for i in (1, 2, 3, 4) for j in (0, 1) for run in ('', ' (2)')]
    assert list(covered.index) == ['relu', *blocks, 'all']
    layers = [resnet.layer1[0], 'layer4.1', resnet.fc]  # a block ends in its ReLU
    named = neuron_coverage(resnet, batches_of(x, x, 2), layers)
    assert list(named.index) == ['layer1.0', 'layer4.1', 'fc', 'all']
    for block in ('layer1.0', 'layer4.1'):
        assert named[block] == covered[f'{block}.relu (2)']
    with torch.no_grad(): logits = torch.cat([resnet.eval()(p) for p in x.split(2)])
    assert named['fc'] == pytest.approx(len(slow_coverage([logits[..., None]])[0]) / 10)


def test_without_activation_modules_the_feature_maps_are_covered():
    x, conv = torch.randn(6, 3, 8, 8), nn.Conv2d(3, 4, 3, padding=1)
    for_one_size = nn.Sequential(conv, nn.Flatten(), nn.Linear(256, 3))
    norm, pool = nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1)
    any_size = nn.Sequential(conv, norm, pool, nn.Flatten(), nn.Linear(4, 3)).eval()
    assert _covered_layers(any_size, None) == ['0', '1']
    for net, last in ((for_one_size, 0), (any_size, 1)):
        hit, n = slow_coverage([net[:last + 1](x).detach()])
        assert neuron_coverage(net, batches_of(x, x, 3))[str(last)] == len(hit) / n


@given(attributions(['spread', 'sparse'], st.integers(2, 6)), st.floats(0, 0.99),
       st.floats(0, 0.99))
def test_more_images_and_a_lower_threshold_cover_more_neurons(x, one, other):
    net = nn.Sequential(nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    def covered(x, threshold):
        return neuron_coverage(net, [(x, None)], threshold=threshold)['all']
    low, high = sorted((one, other))
    assert 0 <= covered(x, high) <= covered(x, low) <= 1
    assert covered(x[:1], one) <= covered(x, one)


# What changes no measure, and which bounds hold

def measures_of(A):
    "The measures that need an attribution only"
    ratios = attribution_ratio(A), attribution_ratio(A, 0.25)
    return [*ratios, effective_area(A), gini(A)]


def all_measures(A, region):
    of_region = [m(A, region) for m in (relevance_mass, pointing_game, region_iou)]
    size = region.shape[2:]
    of_pixels = [pixel_shares(A, size), _pixel_ranks(A, size)]
    return [m.float() for m in (*measures_of(A), *of_region, *of_pixels)]


def assert_same(ours, theirs, rtol=0., atol=0.):
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=atol, equal_nan=True)


@given(A=attributions(), seed=seeds)
def test_neither_scale_nor_the_order_of_positions_changes_a_measure(A, seed):
    for scale in (2.**-12, 2.**10): assert_same(measures_of(scale * A), measures_of(A))
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(A[0, 0].numel(), generator=generator)
    shuffled = A.flatten(2)[..., order].view_as(A)
    assert_same(measures_of(shuffled), measures_of(A), 1e-5, 1e-6)


@given(attributions(), region_shares, seeds)
def test_every_measure_keeps_to_its_range(A, share, seed):
    n, empty, slack = A[0, 0].numel(), A.sum((1, 2, 3)) == 0, 1e-5
    area, g, r = effective_area(A), gini(A), attribution_ratio(A)
    assert (area[empty] == 0).all() and (area <= 1 + slack).all()
    assert (1 / n - slack <= area[~empty]).all()
    assert g[empty].isnan().all() and (-slack <= g[~empty]).all()
    assert (g[~empty] <= 1 - 1 / n + slack).all()
    assert (r[empty] == 0).all() and (0 < r[~empty]).all() and (r <= 1).all()
    total, some_left = pixel_shares(A, (9, 8)).sum((1, 2, 3)), (~empty).float()
    torch.testing.assert_close(total, some_left, rtol=0, atol=slack)
    region = made_region(A, share, seed)
    both = relevance_mass(A, region) + relevance_mass(A, ~region)
    torch.testing.assert_close(both, some_left, rtol=0, atol=slack)
    assert (pointing_game(A, region) ^ pointing_game(A, ~region)).equal(~empty)
    assert (region_iou(A, torch.ones_like(region)) == 1).all()
    assert region_iou(A, torch.zeros_like(region)).isnan().all()


@given(attributions(), region_shares, seeds)
def test_a_batch_is_its_images_one_by_one(A, share, seed):
    region = made_region(A, share, seed, (9, 8))
    pairs = zip(A[:, None], region[:, None])
    one_by_one = [torch.cat(m) for m in zip(*(all_measures(a, r) for a, r in pairs))]
    assert_same(all_measures(A, region), one_by_one, 1e-6, 1e-7)


@given(attributions(), st.sampled_from([torch.float16, torch.bfloat16, torch.float64]),
       seeds)
def test_neither_precision_nor_a_sum_over_channels_matters(A, dtype, seed):
    region, A = made_region(A, 0.4, seed, (9, 8)), A.to(dtype)
    assert_same(all_measures(A, region), all_measures(A.float(), region))
    summed = all_measures(A.float().sum(1, keepdim=True), region)
    assert_same(all_measures(A, region)[2:], summed[2:])  # but for ratios of elements


def test_images_need_not_be_square_nor_plain_tensors():
    net, y = small_network(), torch.tensor([0, 1, 2, 3])
    x = TensorImage(images(4, 12)[..., :8])
    A = model_attribution(net, x)
    assert A.shape == (4, 8, 12, 8) and type(A) is torch.Tensor
    region = torch.zeros(4, 1, 12, 8, dtype=torch.bool)
    region[:, :, 6:] = True
    low = A.sum(1)[:, 6:].sum((1, 2)) / A.sum((1, 2, 3))
    torch.testing.assert_close(relevance_mass(A, region), low, rtol=0, atol=1e-5)
    assert insertion_curve(net, x, A, y).shape == (4, 17)
    assert occlusion_accuracy(net, [(x, y)]).shape == (6, 2)
    ours = deletion_curve(net, x, A, y).as_subclass(torch.Tensor)
    assert ours.equal(deletion_curve(net, x.as_subclass(torch.Tensor), A, y))


# The network is left as it was

def state_of(net):
    numpy_state = np.random.get_state()[1].tolist()
    return dict(
        modes=[m.training for m in net.modules()], hooked=hooked(net),
        tensors={k: v.clone() for k, v in net.state_dict().items()},
        learning=[p.requires_grad for p in net.parameters()],
        grads=[p.grad if p.grad is None else p.grad.clone() for p in net.parameters()],
        recording=torch.is_grad_enabled(), drawn=torch.get_rng_state(),
        others=(random.getstate(), numpy_state))


@contextmanager
def untouched(net):
    "Nothing of a network, nor any random state, changes within"
    before = state_of(net)
    yield
    assert_equal(state_of(net), before)


def assert_equal(a, b):
    if isinstance(a, torch.Tensor): assert a.equal(b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for k in a: assert_equal(a[k], b[k])
    elif isinstance(a, list):
        assert len(a) == len(b)
        for pair in zip(a, b): assert_equal(*pair)
    else: assert a == b


def in_training(net):
    "Some layers frozen, some gradients there, a hook of someone else's"
    net = copy.deepcopy(net).train()
    norms = [m for m in net.modules() if isinstance(m, nn.BatchNorm2d)]
    norms[0].eval()
    norms[1].requires_grad_(False)
    for p in list(net.parameters())[-2:]: p.grad = torch.ones_like(p)
    norms[-1].register_forward_hook(lambda module, inputs, out: None)
    return net


class Failure(Exception): pass


def failing(*args): raise Failure


def broken(batches):
    yield from batches
    raise Failure


def left_early(net, layer, x, y):
    for _ in attributed([(x, y)] * 3, net, layer): break


def attributed_by_label(net, layer, x, y):
    return list(attributed([(x, y)] * 2, net, layer, 'label', 'gradcam'))


def method_fails(net, layer, x, y):
    return list(attributed([(x, y)], net, layer, method=failing))


def coverage_fails(net, layer, x, y): neuron_coverage(net, broken([(x, y)]))
def deletion_fails(net, layer, x, y): deletion_curve(net, x[:, :1], x)


BYPASSED = 'layer4.1.conv1'  # of a ResNet


@pytest.mark.parametrize('use, layer', [
    (attributed_by_label, BYPASSED), (left_early, None), (method_fails, None),
    (coverage_fails, None), (deletion_fails, None)])
def test_a_measure_leaves_no_trace(use, layer, resnet):
    net, x, y = in_training(resnet), images(2, 64), torch.tensor([1, 7])
    fails = pytest.raises((Failure, RuntimeError))
    with untouched(net), fails if 'fails' in use.__name__ else nullcontext():
        use(net, layer, x, y)


class Functional(nn.Module):
    "Traced, it has another graph in training"
    def __init__(self):
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 8, 3), nn.Linear(8, 4)
    def forward(self, x):
        means = self.conv(x).relu().mean((2, 3))
        return self.fc(nn.functional.dropout(means, 0.5, self.training))


def test_a_function_as_method_sees_the_head_in_evaluation_mode():
    net, x = Functional().train(), images(4, 8)
    def method(head, z, classes): return grad_x_act(head(z), z, classes)
    ours, theirs = (model_attribution(net, x, method=m) for m in (method, 'grad_x_act'))
    assert_same([ours], [theirs], 1e-5, 1e-7)


def test_a_function_as_method_needs_a_cut(resnet):
    with pytest.raises(ValueError, match='cannot be cut'):
        model_attribution(resnet, images(2, 64), layer=BYPASSED, method=failing)


def test_between_batches_a_network_is_in_the_mode_it_was_in():
    net, x = in_training(small_network()), images(4, 8)
    modes = [m.training for m in net.modules()]
    for _ in attributed([(x, None)] * 2, net):
        assert [m.training for m in net.modules()] == modes and torch.is_grad_enabled()


def test_attribution_that_is_not_finite_has_no_area():
    A = torch.ones(3, 2, 4, 4)
    A[0, 0, 0, 0], A[1, 1, 2, 2] = torch.nan, torch.inf
    for measure in (effective_area, attribution_ratio):
        assert measure(A).isnan().tolist() == [True, True, False]


def test_no_graph_is_kept_while_the_attribution_is_used():
    class Saved:
        def __init__(self, t): self.t = t
    saved, batch = [], (images(2, 8, 0), torch.zeros(2))
    def pack(t):
        kept = Saved(t.detach())  # with its graph, it would keep itself alive
        saved.append(weakref.ref(kept))
        return kept
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda kept: kept.t):
        for _ in attributed([batch, batch], small_network()):
            assert saved and not any(ref() for ref in saved)
