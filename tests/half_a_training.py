"""The second half of a training, in a process of its own: `half_a_training.py FOLDER`.
Imported, it has functions for either half and for the whole."""
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
    loaders = (TfmdDL(part, bs=8, num_workers=0) for part in (items, items[:8]))
    dls = DataLoaders(*loaders, device='cpu')
    return Learner(dls, network(), loss_func=CrossEntropyLossFlat(), path=folder)


def fit(learn, cb, *others, **kwargs):
    with learn.no_bar(), learn.no_logging(), warnings.catch_warnings():
        warnings.simplefilter('ignore')
        learn.fit_one_cycle(4, 1e-2, cbs=[cb, *others], **kwargs)
    return learn


def first_half(folder):
    cb = SGDropCallback(**SETTINGS)
    fit(learner(folder), cb, StopAfter(2)).save('half')
    torch.save(cb.state_dict(), folder / 'sgdrop.pth')


def second_half(folder, *others, **changes):
    "Resume from the files in `folder`, with `changes` to the state of SGDrop"
    learn, cb = learner(folder), SGDropCallback(**SETTINGS)
    learn.load('half')
    state = torch.load(folder / 'sgdrop.pth', weights_only=True)
    cb.load_state_dict(state | changes)
    return fit(learn, cb, *others, start_epoch=2)


if __name__ == '__main__':
    folder = Path(sys.argv[1])
    torch.save(second_half(folder).model.state_dict(), folder / 'end.pth')
