"`SGDropCallback` together with the rest of fastai: a table of partners, and one test."
import copy
import random
from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import numpy as np
import pytest
import torch
from fastai.callback.channelslast import ChannelsLast
from fastai.callback.core import Callback
from fastai.callback.fp16 import AMPMode, MixedPrecision
from fastai.callback.hook import ActivationStats
from fastai.callback.mixup import CutMix, MixUp
from fastai.callback.preds import MCDropoutCallback
from fastai.callback.progress import CSVLogger
from fastai.callback.schedule import Learner  # with `fine_tune` and `lr_find`
from fastai.callback.tracker import (EarlyStoppingCallback, ReduceLROnPlateau,
                                     SaveModelCallback, TerminateOnNaNCallback)
from fastai.callback.training import (BnFreeze, GradientAccumulation, GradientClip,
                                      ShortEpochCallback)
from fastai.data.core import Datasets
from fastai.data.transforms import Categorize
from fastai.interpret import Interpretation
from fastai.learner import Recorder
from fastai.losses import (BCEWithLogitsLossFlat, CrossEntropyLossFlat,
                           LabelSmoothingCrossEntropyFlat)
from fastai.optimizer import SGD
from fastai.torch_core import TensorImage, params
from fastai.vision.augment import RandomErasing
from torch import nn
from torch.nn.functional import one_hot

from networks import Recomputed, bare_loss, hooked, images, masked_images, small_network
from sgdrop.callback import SGDropCallback
from sgdrop.experiments.training import AverageWeights
from sgdrop.split import unwrapped

# every teacher, target, granularity and fill, one layer and two, every clean_weight
VARIANTS = dict(
    defaults={}, element=dict(granularity='element', clean_weight=0.),
    label=dict(target='label', fill='zero'),
    channel=dict(granularity='channel', fill='mean'),
    head=dict(teacher='head', granularity='element'),
    full=dict(teacher='full', target='label', p=0.5),
    # with a clean loss, a BatchNorm in a checkpoint would count the second pass, too
    two_layers=dict(teacher='head', layer=['0', '1'], clean_weight=0.))


class MixedOnCPU(MixedPrecision):
    "fastai's mixed precision, which does nothing where there is no GPU"
    def before_fit(self):
        half = self.amp_mode == AMPMode.FP16
        self.autocast = torch.autocast('cpu', torch.float16 if half else torch.bfloat16)
        self.learn.scaler = torch.amp.GradScaler('cpu', enabled=half)
        self.scales = []


class TwoViews(nn.Sequential):
    "A network of two inputs"
    def forward(self, a, b): return super().forward(torch.maximum(a, b))


def recomputed_body():
    first, second, *rest = small_network()
    return nn.Sequential(first, Recomputed(second), *rest)


def recomputed_head():
    return nn.Sequential(*small_network()[:2], Recomputed(small_network()[2:]))


def body_and_head(model):
    return [params(part) for part in (unwrapped(model)[:2], unwrapped(model)[2:])]


def find_rate(learn): learn.lr_find(num_it=4, show_plot=False, suggest_funcs=None)


def with_trackers(learn):
    "Several callbacks that watch a training, with hooks and files of their own"
    learn.fit(3, cbs=[
        SaveModelCallback(), EarlyStoppingCallback(min_delta=10, patience=2),
        ReduceLROnPlateau(patience=1, min_delta=10), TerminateOnNaNCallback(),
        CSVLogger(), ActivationStats()])


def in_other_ways(learn):
    "Predictions with dropout and with augmentation, and an interpretation's losses"
    with_dropout = learn.get_preds(cbs=MCDropoutCallback())[0]
    losses = Interpretation.from_learner(learn).losses
    return torch.cat([t.flatten() for t in (with_dropout, losses, learn.tta(n=2)[0])])


class Partner(NamedTuple):
    "What else a training uses"
    cbs: Callable[[], list] = list  # makes callbacks of the learner
    train: Callable[[Learner], None] = lambda learn: learn.fit(1)
    use: Callable[[Learner], torch.Tensor] = lambda learn: learn.get_preds()[0]
    net: Callable[[], nn.Module] = small_network
    loss: Callable[[], Callable] = CrossEntropyLossFlat
    n_inp: int = 1
    tfms: Callable[[], list] = list  # makes transforms of a batch
    gap: float = 1e-5  # between validation losses in different precision


PARTNERS = dict(
    plain=Partner(),
    bf16=Partner(lambda: [MixedOnCPU('bf16')], gap=0.02),
    fp16=Partner(lambda: [MixedOnCPU('fp16')], gap=0.02),
    mixup=Partner(lambda: [MixUp(0.5)]),
    cutmix=Partner(lambda: [CutMix(0.5)]),
    augmented=Partner(tfms=lambda: [RandomErasing(p=1.)], use=in_other_ways),
    label_smoothing=Partner(loss=LabelSmoothingCrossEntropyFlat),
    accumulation=Partner(lambda: [GradientAccumulation(8)]),
    clip=Partner(lambda: [GradientClip(0.1)]),
    channels_last=Partner(lambda: [ChannelsLast()]),
    averaged_weights=Partner(lambda: [AverageWeights(0.5)]),
    frozen_statistics=Partner(lambda: [BnFreeze()]),
    half_an_epoch=Partner(lambda: [ShortEpochCallback(0.5, short_valid=False)]),
    fine_tune=Partner(train=lambda learn: learn.fine_tune(1)),
    lr_find=Partner(train=find_rate),
    restarts=Partner(train=lambda learn: learn.fit_sgdr(1, 1)),
    trackers=Partner(train=with_trackers),
    compiled=Partner(net=lambda: torch.compile(small_network(), backend='eager')),
    recomputed_body=Partner(net=recomputed_body),
    recomputed_head=Partner(net=recomputed_head),
    two_inputs=Partner(net=lambda: TwoViews(*small_network()), n_inp=2),
    many_labels=Partner(loss=BCEWithLogitsLossFlat),
)
# every partner and every variant, and pairs that act on the same thing
PAIRS = [
    ('plain', 'defaults'), ('plain', 'channel'), ('bf16', 'defaults'),
    ('bf16', 'two_layers'), ('fp16', 'full'), ('mixup', 'label'), ('cutmix', 'full'),
    ('augmented', 'element'), ('label_smoothing', 'label'), ('accumulation', 'head'),
    ('accumulation', 'two_layers'), ('clip', 'channel'), ('channels_last', 'full'),
    ('averaged_weights', 'full'), ('frozen_statistics', 'full'),
    ('half_an_epoch', 'defaults'), ('fine_tune', 'head'), ('fine_tune', 'full'),
    ('lr_find', 'full'), ('restarts', 'head'), ('trackers', 'channel'),
    ('compiled', 'full'), ('compiled', 'two_layers'), ('recomputed_body', 'two_layers'),
    ('recomputed_body', 'full'), ('recomputed_head', 'defaults'),
    ('recomputed_head', 'two_layers'), ('two_inputs', 'full'),
    ('many_labels', 'label'), ('many_labels', 'two_layers')]


def test_the_pairs_cover_all_partners_and_variants():
    assert [{*names} for names in zip(*PAIRS)] == [{*PARTNERS}, {*VARIANTS}]


class BareLoss(Callback):
    "Notes the validation loss of each epoch, and that of the network alone"
    order = Recorder.order + 1
    def before_fit(self): self.losses = []
    def after_epoch(self):
        if hasattr(self, 'lr_finder'): return
        self.losses.append((self.recorder.values[-1][-1], bare_loss(self.learn)))


def make_learner(partner, path, *cbs):
    x, y = images(12, 8), torch.arange(12) % 4
    views = [[lambda i: TensorImage(x[i])], [lambda i: TensorImage(x[i].flip(-1))]]
    label = [lambda i: str(y[i].item()), Categorize(list('0123'))]
    several = partner.loss is BCEWithLogitsLossFlat
    if several: label = [lambda i: one_hot(y[i], 4).float()]
    items = Datasets(range(12), [*views[:partner.n_inp], label], n_inp=partner.n_inp,
                     splits=[range(8), range(8, 12)])
    dls = items.dataloaders(
        bs=4, device='cpu', num_workers=0, after_batch=partner.tfms())
    return Learner(dls, partner.net(), partner.loss(), opt_func=SGD, lr=0.05, path=path,
                   splitter=body_and_head, cbs=[*partner.cbs(), *cbs])


def seed():
    for seed_it in (torch.manual_seed, random.seed, np.random.seed): seed_it(0)


class Trained(NamedTuple):
    "A learner after its training, what the training computed, and what else it left"
    learn: Learner
    losses: list  # of the batches
    validations: list  # losses in validation, and what they should be
    weights: dict
    rest: dict


def trained(name, path, *cbs):
    seed()
    bare = BareLoss()
    learn = make_learner(PARTNERS[name], path, bare, *cbs)
    loss_func = learn.loss_func
    PARTNERS[name].train(learn)
    learn.remove_cb(bare)
    net = unwrapped(learn.model)
    norms = [m for m in net.modules() if isinstance(m, nn.BatchNorm2d)]
    rest = dict(
        hooks=hooked(learn.model), same_loss=learn.loss_func is loss_func,
        modes=[m.training for m in net.modules()],
        grads=[p.grad is not None for p in net.parameters()],
        statistics=[m.num_batches_tracked.item() for m in norms],
        random=(torch.get_rng_state().tolist(), random.getstate(),
                np.random.get_state()[1].tolist()))
    weights = copy.deepcopy(net.state_dict())
    return Trained(learn, learn.recorder.losses, bare.losses, weights, rest)


@pytest.fixture(scope='module')
def plain(tmp_path_factory):
    "A function that trains without SGDrop, once with each partner"
    return cache(lambda name: trained(name, tmp_path_factory.mktemp(name)))


def same(a, b): return all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize('name, variant', PAIRS)
def test_it_masks_in_training_and_changes_nothing_else(name, variant, plain, tmp_path):
    partner, cb = PARTNERS[name], SGDropCallback(0.3, ema=0.5, **VARIANTS[variant])
    ours, theirs = trained(name, tmp_path, cb), plain(name)
    learn, history = ours.learn, cb.history

    # it trained, with other weights than without SGDrop
    assert masked_images(cb) > 0 and ours.losses != theirs.losses
    assert all(v.isfinite().all() for v in ours.weights.values())
    first = unwrapped(partner.net()).state_dict()
    restored = name == 'lr_find'  # which puts the first weights back
    assert same(ours.weights, theirs.weights) == same(ours.weights, first) == restored

    assert ours.rest == theirs.rest
    assert ours.rest['same_loss']

    # neither validation nor any other use of the learner has a mask
    assert len(ours.validations) == len(theirs.validations)
    for seen, bare in ours.validations:
        assert seen == pytest.approx(bare, rel=partner.gap)
    assert learn.validate()[0] == pytest.approx(bare_loss(learn), rel=partner.gap)
    seed()
    with_it = partner.use(learn)
    with learn.removed_cbs(cb):
        seed()
        assert partner.use(learn).equal(with_it)
    assert cb.history == history


def test_it_acts_after_all_that_change_the_prediction(tmp_path):
    "And before the loss is noted"
    learn = make_learner(Partner(), tmp_path, SGDropCallback(), GradientClip(),
                         MixedPrecision(), GradientAccumulation(), MixUp())
    order = [type(cb) for cb in learn.ordered_cbs('order')]  # of an event that all have
    at = order.index(SGDropCallback)
    assert {MixUp, GradientAccumulation, MixedPrecision, GradientClip} <= {*order[:at]}
    assert Recorder in order[at:]
