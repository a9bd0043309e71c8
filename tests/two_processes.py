"""A training that several processes share: `torchrun --nproc-per-node 2 FILE FOLDER`.
Imported, it has the same training in one process."""
import sys
import warnings
from contextlib import nullcontext
from pathlib import Path

import torch
from fastai.callback.training import GradientAccumulation
from fastai.data.core import DataLoaders, TfmdDL
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from fastai.optimizer import SGD
from fastai.torch_core import default_device, set_seed
from torch import Tensor, nn

from networks import images, masked_images
from sgdrop.callback import SGDropCallback
from sgdrop.recorder import FocusRecorder

ALONE, TOGETHER = 4, 8  # images per batch, of one of two processes and of both
VARIANTS = dict(
    plain=None, student=dict(start=0.5), head=dict(teacher='head', layer=['0', '2']),
    full=dict(teacher='full', granularity='element'), half=dict(p=0.5), recorded={})


def others(name, bs):
    "Return further callbacks of a variant"
    if name == 'full': return [GradientAccumulation(2 * bs)]
    return [FocusRecorder(8)] if name == 'recorded' else []


def network():
    set_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8), nn.Conv2d(8, 8, 3), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))


def items(): return list(zip(images(32, 8), torch.arange(32) % 4))


def joined(rows):
    "Return rows in the order in which two processes, each with a half, use them"
    halves = torch.arange(len(rows)).view(2, -1, ALONE)
    return [rows[i] for i in halves.transpose(0, 1).flatten().tolist()]


def trained(name, rows, bs, around=None):
    "Return what two epochs end with: weights, the teacher's, and images with holes"
    loaders = (TfmdDL(part, bs=bs, num_workers=0) for part in (rows, rows[:bs]))
    learn = Learner(DataLoaders(*loaders, device='cpu'), network(), opt_func=SGD,
                    loss_func=CrossEntropyLossFlat())
    settings = VARIANTS[name]
    cb = None if settings is None else SGDropCallback(0.3, **settings)
    cbs = others(name, bs) + ([cb] if cb else [])
    context = around(learn) if around else nullcontext()
    with learn.no_bar(), learn.no_logging(), warnings.catch_warnings(), context:
        warnings.simplefilter('ignore')
        learn.fit(2, 0.1, cbs=cbs)
    teacher = cb.engine.teacher.state_dict() if cb and cb.engine.teacher else {}
    teacher = {k: v for k, v in teacher.items() if isinstance(v, Tensor)}
    return dict(weights=learn.model.state_dict(), teacher=teacher,
                dropped=masked_images(cb) if cb else 0)


def main(folder):
    from fastai.distributed import DistributedDL, rank_distrib  # needs accelerate

    def broadcast(self, order, rank):  # fastai's goes through a GPU
        order = torch.LongTensor(order)
        torch.distributed.broadcast(order, rank)
        return order.tolist()
    DistributedDL._broadcast = broadcast
    default_device(False)
    def around(learn): return learn.distrib_ctx(sync_bn=False, cpu=True)
    ends = {name: trained(name, items(), ALONE, around) for name in VARIANTS}
    torch.save(ends, Path(folder) / f'{rank_distrib()}.pt')


if __name__ == '__main__': main(sys.argv[1])
