"Image sets: the same seed gives the same images, and splits keep their promises"
import gc
import random
import weakref

import pytest
import torch
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from torch import Tensor, nn

from sgdrop.data import (
    CUES, FLOWERS17_CLASSES, IMAGENETTE_CLASSES, SHORTCUTS, class_colours, cue_regions,
    fetch_set, flowers17, imagenette, memory_loader, noisy_digits, shortcut_digits,
    shortcut_photographs, squares, with_cue)

MEANS = dict(present=(.343959, .344455, .345330), absent=(.326632, .326732, .326941),
             misleading=(.344583, .345079, .343997))  # of red, green and blue


@pytest.fixture(scope='module')
def digits(): return shortcut_digits()


@pytest.fixture
def with_tiny_sets(tiny_sets, monkeypatch):
    monkeypatch.setattr('sgdrop.data.fetch_set', lambda name: tiny_sets / name)


def whole(dl):
    "All images of a loader, from 0 to 1, and their digits"
    xs, ys = zip(*dl)
    x, y = (torch.cat(parts).as_subclass(Tensor).cpu() for parts in (xs, ys))
    return x / 2 + 0.5, y


def test_the_default_images_never_change(digits):
    "Committed tables were made with these images, so their figures are fixed here"
    position = torch.arange(1, 798)
    assert (digits.cue_regions[:, 0, 2, 2] * position).sum() == 76835
    for cue in CUES:
        x, y = whole(digits.tests[cue])
        assert (y * position).sum() == 1460683
        assert x.mean((0, 2, 3)).tolist() == pytest.approx(MEANS[cue], abs=1e-5)


def test_all_digits_are_used_once(digits):
    _, y = noisy_digits()
    order = torch.randperm(1797, generator=torch.Generator().manual_seed(0))
    labels = [int(digits.vocab[i]) for _, i in digits.train_ds]
    assert labels == y[order[:1000]].tolist()
    assert whole(digits.valid)[1].tolist() == y[order[1000:]].tolist()


def test_a_patch_stays_within_its_size_and_off_the_edge():
    for size, patch in ((32, 7), (64, 14), (16, 3)):
        regions = cue_regions(20, size, patch)[:, 0]
        assert regions.sum((1, 2)).eq(patch ** 2).all()
        assert not regions[:, [0, -1]].any() and not regions[:, :, [0, -1]].any()
    assert not cue_regions(20, patch=0).any()


def test_a_misleading_cue_shows_each_wrong_colour_equally_often():
    y = torch.zeros(9000, dtype=torch.long)
    x, region = torch.zeros(9000, 3, 1, 1), torch.ones(9000, 1, 1, 1, dtype=torch.bool)
    shown = with_cue(x, y, region, 'misleading')
    shown, counts = shown.unique(dim=0, return_counts=True)
    assert len(shown) == 9 and counts.min() > 850 and counts.max() < 1150


def test_the_global_random_state_is_left_alone():
    before = torch.random.get_rng_state()
    shortcut_digits(seed=3)
    assert torch.random.get_rng_state().equal(before)


def test_a_learner_predicts_single_digits(digits):
    net = nn.Sequential(nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(48, 10))
    learn = Learner(digits, net, loss_func=CrossEntropyLossFlat())
    label, index, probabilities = learn.predict(digits.valid_ds[0][0])
    assert label in digits.vocab and 0 <= index < 10 and len(probabilities) == 10


def test_most_training_images_have_the_cue_of_their_class(tiny_sets):
    files = sorted((tiny_sets / 'imagenette' / 'train').rglob('*.JPEG'))
    found = {}
    for correlation in (1., 0.5, None):
        dls = shortcut_photographs(files, files, correlation=correlation, size=32, bs=8)
        (x, y), whole = dls.train.dataset.tensors, squares(tuple(files), 40)
        painted = (x != whole).any(1, keepdim=True)
        colours = (class_colours(10)[y] * 255).byte()[:, :, None, None]
        found[correlation] = [m.any((1, 2, 3)).float().mean().item() for m in
                              (painted, (x == colours).all(1, keepdim=True) & painted)]
    assert found[1.] == [1, 1] and found[None] == [0, 0]
    assert found[0.5][0] == 1 and 0.3 < found[0.5][1] < 0.7


def test_the_cue_does_not_depend_on_the_random_state(tiny_sets):
    files = sorted((tiny_sets / 'imagenette' / 'val').rglob('*.JPEG'))
    def images(cue, **kwargs):
        dls = shortcut_photographs(files, files, cue=cue, size=32, bs=8, **kwargs)
        return dls.train.dataset.tensors[0]
    for cue in SHORTCUTS:
        assert images(cue).equal(images(cue))
        assert not images(cue).equal(images(cue, seed=1))


def test_flowers17_uses_each_photograph_once(with_tiny_sets):
    splits = [flowers17(40, seed=seed, num_workers=0, size=32) for seed in (0, 0, 1)]
    train = [[f.name for f in dls.train_ds.items] for dls in splits]
    assert train[0] == train[1] != train[2]
    first = splits[0]
    assert len(first.train_ds) == len(first.valid_ds) == 680
    assert not set(first.train_ds.items) & set(first.valid_ds.items)
    assert set(first.vocab) == set(FLOWERS17_CLASSES)
    labels = [label for _, label in first.train_ds]
    assert torch.stack(labels).bincount().tolist() == [40] * 17


def test_imagenette_validates_on_whole_official_images(with_tiny_sets, tiny_sets):
    random.seed(0)
    dls = imagenette(n_per_class=5, size=16, bs=50, num_workers=0)
    folders = [f.parent.parent.name for f in (*dls.train_ds.items, *dls.valid_ds.items)]
    assert folders == ['train'] * 50 + ['val'] * 40
    assert set(dls.vocab) == set(IMAGENETTE_CLASSES.values())
    once, again = (dls.valid.one_batch()[0] for _ in range(2))
    assert once.equal(again)


def test_a_missing_set_without_a_network_names_its_folder(empty_machine, no_network):
    with pytest.raises(FileNotFoundError, match='put its folder at .*17flowers'):
        fetch_set('flowers17')


def test_a_loader_frees_its_images():
    x, y = torch.zeros(4, 3, 8, 8, dtype=torch.uint8), torch.zeros(4, dtype=torch.long)
    loader, images = memory_loader(x, y, ['a'], bs=2), weakref.ref(x)
    loader.one_batch()
    del x, loader
    gc.collect()
    assert images() is None
