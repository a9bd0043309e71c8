"Two processes on a CPU train as one process does on the joined batch."
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
from two_processes import TOGETHER, VARIANTS, items, joined, trained


@pytest.fixture(scope='module')
def ranks(tmp_path_factory):
    "What each of two processes ended with, for every variant"
    pytest.importorskip('accelerate', reason='fastai needs it for several processes')
    folder = tmp_path_factory.mktemp('ranks')
    script = Path(__file__).with_name('two_processes.py')
    torchrun = [sys.executable, '-m', 'torch.distributed.run', '--standalone']
    done = subprocess.run(
        [*torchrun, '--nproc-per-node', '2', script, folder], capture_output=True,
        text=True, timeout=300, env=os.environ | dict(OMP_NUM_THREADS='1'))
    assert done.returncode == 0, done.stderr[-3000:]
    return [torch.load(folder / f'{rank}.pt', weights_only=True) for rank in (0, 1)]


def gap(a, b): return max((a[k] - b[k]).abs().max().item() for k in a)


@pytest.mark.parametrize('name', VARIANTS)
def test_two_processes_train_as_one(name, ranks):
    one, other = (rank[name] for rank in ranks)
    for part in ('weights', 'teacher'):
        assert all(v.equal(other[part][k]) for k, v in one[part].items())
    assert (one['dropped'] > 0) == (name != 'plain')
    if name == 'half': return  # each process draws its own random numbers
    single = trained(name, joined(items()), TOGETHER)
    assert gap(single['weights'], one['weights']) < 1e-5
    if single['teacher']: assert gap(single['teacher'], one['teacher']) < 1e-5
    if name != 'plain': assert gap(one['weights'], ranks[0]['plain']['weights']) > 1e-3
    assert one['dropped'] + other['dropped'] == single['dropped']


class ToSyncBatchNorm(Callback):
    "Replaces BatchNorm layers at the start of a fit, as DistributedTrainer does"
    order = 11
    def before_fit(self):
        self.learn.model = nn.SyncBatchNorm.convert_sync_batchnorm(self.learn.model)


@pytest.mark.parametrize('teacher, layer', [('head', None), ('full', '0.1')])
def test_batchnorm_layers_may_be_replaced(teacher, layer, small_net, make_learner):
    "The layer '0.1' is itself a BatchNorm"
    nets = []
    for others in ([], [ToSyncBatchNorm()]):
        cb = SGDropCallback(0.3, layer=layer, teacher=teacher)
        learn = make_learner(small_net(), [cb, *others])
        learn.fit(1)
        assert masked_images(cb) > 0
        nets.append(learn.model)
    assert any(isinstance(m, nn.SyncBatchNorm) for m in nets[1].modules())
    assert same_weights(*nets)
