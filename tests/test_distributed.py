"Two processes on a CPU, as torchrun starts them: they end with equal networks and teachers, and do what one process does with the joined batch."
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fastai.callback.core import Callback
from torch import nn

from networks import masked_images, same_weights
from sgdrop.callback import SGDropCallback
from two_processes import TOGETHER, VARIANTS, items, joined, state, trained


@pytest.fixture(scope='module')
def ranks(tmp_path_factory):
    "What each of two processes ended with, for every variant"
    pytest.importorskip('accelerate', reason='fastai needs accelerate for several processes')
    folder = tmp_path_factory.mktemp('ranks')
    command = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', '2', Path(__file__).with_name('two_processes.py'), folder]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=os.environ | dict(OMP_NUM_THREADS='1'))
    assert done.returncode == 0, done.stderr[-3000:]
    return [torch.load(folder / f'{rank}.pt', weights_only=True) for rank in (0, 1)]


def gap(a, b): return max((a[k] - b[k]).abs().max().item() for k in a)


@pytest.mark.parametrize('name', VARIANTS)
def test_processes_end_with_equal_networks_and_teachers(name, ranks):
    one, other = (rank[name] for rank in ranks)
    for part in ('weights', 'teacher'): assert all(v.equal(other[part][k]) for k, v in one[part].items())
    assert (one['dropped'] > 0) == (name != 'plain')


@pytest.mark.parametrize('name', [n for n in VARIANTS if n != 'half'])
def test_two_processes_do_what_one_does_with_the_joined_batch(name, ranks):
    single, plain = (state(*trained(n, joined(items()), TOGETHER)) for n in (name, 'plain'))
    ends = [rank[name] for rank in ranks]
    assert gap(single['weights'], ends[0]['weights']) < 1e-5
    if single['teacher']: assert gap(single['teacher'], ends[0]['teacher']) < 1e-5
    if name != 'plain': assert gap(single['weights'], plain['weights']) > 1e-3
    assert sum(end['dropped'] for end in ends) == single['dropped']


class ToSyncBatchNorm(Callback):
    "Replaces BatchNorm layers when the fit begins, as fastai's DistributedTrainer does, at its place in the order"
    order = 11
    def before_fit(self): self.learn.model = nn.SyncBatchNorm.convert_sync_batchnorm(self.learn.model)


@pytest.mark.parametrize('teacher', [None, 'head', 'full'])
@pytest.mark.parametrize('layer', [None, '0.1'])  # behind the last map, and behind a layer that is replaced
def test_batchnorm_layers_may_be_replaced_when_the_fit_begins(layer, teacher, small_net, make_learner):
    nets = []
    for others in ([], [ToSyncBatchNorm()]):
        learn = make_learner(small_net(), [SGDropCallback(0.3, layer=layer, teacher=teacher), *others])
        learn.fit(2)
        assert masked_images(learn.sg_drop) > 0
        nets.append(learn.model)
    assert any(isinstance(m, nn.SyncBatchNorm) for m in nets[1].modules()) and same_weights(*nets)
