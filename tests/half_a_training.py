"The second half of a training, in a process of its own: `half_a_training.py FOLDER`; imported, either half or the whole of it."
import sys
import warnings
from pathlib import Path

import torch
from fastai.callback.core import Callback, CancelFitException
from fastai.callback.schedule import Learner  # with its method fit_one_cycle
from fastai.data.core import DataLoaders, TfmdDL
from fastai.losses import CrossEntropyLossFlat

from networks import images
from sgdrop.callback import SGDropCallback
from two_processes import network

SETTINGS = dict(rho=0.3, teacher='full', p=0.5, clean_weight=0.3)


class StopAfter(Callback):
    "Ends a fit after some epochs"
    def __init__(self, n): self.n = n
    def after_epoch(self):
        if self.epoch + 1 == self.n: raise CancelFitException


def learner(folder):
    items = list(zip(images(32, 8), torch.arange(32) % 4))
    loaders = DataLoaders(TfmdDL(items, bs=8, num_workers=0), TfmdDL(items[:8], bs=8, num_workers=0), device='cpu')
    return Learner(loaders, network(), loss_func=CrossEntropyLossFlat(), path=folder)


def fit(learn, cb, *others, **kwargs):
    with learn.no_bar(), learn.no_logging(), warnings.catch_warnings():
        warnings.simplefilter('ignore')
        learn.fit_one_cycle(4, 1e-2, cbs=[cb, *others], **kwargs)
    return learn


def first_half(folder):
    cb = SGDropCallback(**SETTINGS)
    fit(learner(folder), cb, StopAfter(2)).save('half')
    torch.save(cb.state_dict(), folder / 'sgdrop.pth')


def second_half(folder):
    learn, cb = learner(folder), SGDropCallback(**SETTINGS)
    learn.load('half')
    cb.load_state_dict(torch.load(folder / 'sgdrop.pth', weights_only=True))
    return fit(learn, cb, start_epoch=2)


if __name__ == '__main__': torch.save(second_half(Path(sys.argv[1])).model.state_dict(), Path(sys.argv[1]) / 'end.pth')
