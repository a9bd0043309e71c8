"A training that several processes share: `torchrun --nproc-per-node 2 two_processes.py FOLDER`; imported, the same training in one process."
import sys
import warnings
from pathlib import Path

import torch
from fastai.callback.training import GradientAccumulation
from fastai.data.core import DataLoaders, TfmdDL
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from fastai.optimizer import SGD
from fastai.torch_core import default_device, set_seed
from torch import nn

from networks import masked_images
from sgdrop.callback import SGDropCallback
from sgdrop.recorder import FocusRecorder

ALONE, TOGETHER = 4, 8  # images per batch, of one of two processes and of both
WHOLE = dict(granularity='element')  # no mask depends on what the rest of the batch is
VARIANTS = dict(
    plain=None, student=dict(teacher=None, **WHOLE), head=dict(teacher='head', **WHOLE), full=dict(teacher='full', **WHOLE),
    both=dict(clean_weight=0.5, fill='kept_mean', **WHOLE), several=dict(layer=['0', '2'], **WHOLE), late=dict(start=0.5, **WHOLE),
    half=dict(p=0.5), accumulated=dict(teacher='full', **WHOLE), followed=dict(**WHOLE))


def network():
    set_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))


def items():
    x = torch.randn(32, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    return list(zip(x, torch.arange(32) % 4))


def joined(rows):
    "In the order in which two processes, each with a half, meet them"
    halves = torch.arange(len(rows)).view(2, -1, ALONE)
    return [rows[i] for i in halves.transpose(0, 1).flatten().tolist()]


def trained(name, rows, bs, around=None):
    "The learner after two epochs, and its SGDrop"
    loaders = DataLoaders(TfmdDL(rows, bs=bs, num_workers=0), TfmdDL(rows[:bs], bs=bs, num_workers=0), device='cpu')
    learn = Learner(loaders, network(), loss_func=CrossEntropyLossFlat(), opt_func=SGD)
    cb = None if VARIANTS[name] is None else SGDropCallback(0.3, **VARIANTS[name])
    others = dict(accumulated=[GradientAccumulation(2 * bs)], followed=[FocusRecorder(8)]).get(name, [])
    fit = lambda: learn.fit(2, 0.1, cbs=others + ([] if cb is None else [cb]))
    with learn.no_bar(), learn.no_logging(), warnings.catch_warnings():
        warnings.simplefilter('ignore')
        if around is None: fit()
        else:
            with around(learn): fit()
    return learn, cb


def state(learn, cb):
    teacher = cb.engine.teacher.state_dict() if cb is not None and cb.engine.teacher else {}
    return dict(weights=learn.model.state_dict(), teacher={k: v for k, v in teacher.items() if isinstance(v, torch.Tensor)},
                dropped=masked_images(cb) if cb is not None else 0)


def main(folder):
    from fastai.distributed import DistributedDL, rank_distrib  # needs accelerate

    def broadcast(self, order, rank):  # fastai's goes through a GPU
        order = torch.LongTensor(order)
        torch.distributed.broadcast(order, rank)
        return order.tolist()
    DistributedDL._broadcast = broadcast
    default_device(False)
    around = lambda learn: learn.distrib_ctx(sync_bn=False, cpu=True)
    ends = {name: state(*trained(name, items(), ALONE, around)) for name in VARIANTS}
    torch.save(ends, Path(folder) / f'{rank_distrib()}.pt')


if __name__ == '__main__': main(sys.argv[1])
