import random
from urllib.error import URLError

import hypothesis
import numpy as np
import pytest
import torch
from fastai.data.core import DataLoaders
from fastai.data.external import Config
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from fastai.optimizer import SGD
from PIL import Image

from networks import images, small_network
from sgdrop.data import DOMAINS, IMAGENETTE_CLASSES, missing_sets

# the same examples in every run, and no folder of examples left behind
hypothesis.settings.register_profile(
    'sgdrop', max_examples=150, deadline=None, derandomize=True, database=None)
hypothesis.settings.load_profile('sgdrop')


def pytest_runtest_setup(item):
    "Skip tests marked photographs where the image sets are missing"
    if item.get_closest_marker('photographs') and (missing := missing_sets()):
        names = ', '.join(missing)
        pytest.skip(f'image sets are missing ({names}); to fetch them: sgdrop data')


@pytest.fixture(autouse=True)
def seeded(): torch.manual_seed(0)


@pytest.fixture
def small_net():
    "A function that makes the small network"
    return small_network


@pytest.fixture
def make_learner(tmp_path):
    "A function that makes a `Learner` on synthetic images"
    def make(net, cbs=None, n=32, bs=8, size=8, classes=4, seed=0, loss_func=None,
             labels=None, device='cpu', **kwargs):
        x, g = images(n, size), torch.Generator().manual_seed(1)
        y = torch.randint(classes, (n,), generator=g) if labels is None else labels
        items = list(zip(x, y))
        torch.manual_seed(seed)
        random.seed(seed)  # fastai shuffles with it
        dls = DataLoaders.from_dsets(
            items, items[:2 * bs], bs=bs, device=device, num_workers=0)
        return Learner(dls, net, loss_func=loss_func or CrossEntropyLossFlat(),
                       opt_func=SGD, lr=0.05, path=tmp_path, cbs=cbs, **kwargs)
    return make


@pytest.fixture
def empty_machine(tmp_path, monkeypatch):
    "Have fastai look for image sets in an empty folder; returns its data folder"
    file = tmp_path / 'fastai' / 'config.ini'
    file.parent.mkdir()
    file.write_text('[DEFAULT]\ndata = data\narchive = archive\n')
    config = Config(file.parent, file.name)
    monkeypatch.setattr('sgdrop.data.fastai_cfg', lambda: config)
    monkeypatch.setattr('fastai.data.external.fastai_cfg', lambda: config)
    return tmp_path / 'fastai' / 'data'


@pytest.fixture
def no_network(monkeypatch):
    "Make every download of an image set fail"
    def unreachable(url, **kwargs): raise URLError('no network')
    monkeypatch.setattr('sgdrop.data.untar_data', unreachable)


def noise_picture(path, rng, size=24):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = rng.integers(0, 255, (size, size, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path, quality=60)


@pytest.fixture(scope='session')
def tiny_sets(tmp_path_factory):
    "Folders with the structure of the image sets, filled with noise"
    folder, rng = tmp_path_factory.mktemp('sets'), np.random.default_rng(0)
    for wnid in IMAGENETTE_CLASSES:
        for part, n in dict(train=8, val=4).items():
            for i in range(n):
                path = folder / 'imagenette' / part / wnid / f'{wnid}_{i}.JPEG'
                noise_picture(path, rng)
    for i in range(1360):
        noise_picture(folder / 'flowers17' / 'jpg' / f'image_{i + 1:04}.jpg', rng)
    for part, n in dict(train=40, test=104).items():
        for i in range(n):
            for action in ('diving', 'pole_vaulting'):
                noise_picture(folder / 'bar' / part / f'{action}_{i}.jpg', rng)
    for domain in DOMAINS:
        for i in range(40):
            noise_picture(folder / 'pacs' / domain / f'dog{i % 2}' / f'{i}.jpg', rng)
    return folder
