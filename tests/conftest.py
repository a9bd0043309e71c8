import random

import hypothesis
import pytest
import torch
from fastai.data.core import DataLoaders
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from fastai.optimizer import SGD

from networks import images, small_network

# the same examples at every run, and no folder of found ones left behind
hypothesis.settings.register_profile('sgdrop', max_examples=150, deadline=None, derandomize=True, database=None)
hypothesis.settings.load_profile('sgdrop')


@pytest.fixture(autouse=True)
def seeded(): torch.manual_seed(0)


@pytest.fixture
def small_net():
    "A function that makes the small network"
    return small_network


@pytest.fixture
def make_learner(tmp_path):
    "A function that makes a `Learner` on synthetic images"
    def make(net, cbs=None, n=32, bs=8, size=8, classes=4, seed=0, loss_func=None, labels=None, device='cpu', **kwargs):
        x = images(n, size)
        y = torch.randint(classes, (n,), generator=torch.Generator().manual_seed(1)) if labels is None else labels
        items = list(zip(x, y))
        torch.manual_seed(seed)
        random.seed(seed)  # which fastai shuffles by
        dls = DataLoaders.from_dsets(items, items[:2 * bs], bs=bs, device=device, num_workers=0)
        return Learner(dls, net, loss_func=loss_func or CrossEntropyLossFlat(), opt_func=SGD, lr=0.05, path=tmp_path, cbs=cbs, **kwargs)
    return make
