"`SGDropCallback` beside whatever else people train with in fastai: one table, one test."
import copy
import random
from collections.abc import Callable
from importlib.util import find_spec
from itertools import product
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
from fastai.callback.schedule import Learner  # brings `fine_tune` and `lr_find`
from fastai.callback.tracker import EarlyStoppingCallback, ReduceLROnPlateau, SaveModelCallback, TerminateOnNaNCallback
from fastai.callback.training import BnFreeze, GradientAccumulation, GradientClip, ShortEpochCallback
from fastai.data.core import Datasets
from fastai.data.transforms import Categorize
from fastai.interpret import Interpretation
from fastai.learner import Recorder
from fastai.losses import BCEWithLogitsLossFlat, CrossEntropyLossFlat, LabelSmoothingCrossEntropyFlat
from fastai.optimizer import SGD
from fastai.torch_core import TensorImage, params
from fastai.vision.augment import RandomErasing
from torch import nn

from networks import Recomputed, bare_loss, conv, hooked, images, masked_images, small_network
from sgdrop.experiments.benchmark import AverageWeights
from sgdrop.callback import SGDropCallback
from sgdrop.split import unwrapped

VARIANTS = {f'{teacher}-{name}': dict(teacher=teacher, **settings) for teacher, (name, settings) in product((None, 'head', 'full'), dict(
    element=dict(granularity='element', target='predicted'),
    spatial=dict(granularity='spatial', target='label'),
    channel=dict(granularity='channel', target='predicted', fill='kept_mean', clean_weight=0.5)).items())}
VARIANTS['head-two_layers'] = dict(teacher='head', layer=['0', '1'], clean_weight=0.)  # with a second pass, a BatchNorm under a checkpoint counts that one too


class MixedOnCPU(MixedPrecision):
    "fastai's mixed precision, which by itself does nothing where there is no GPU"
    def before_fit(self):
        half = self.amp_mode == AMPMode.FP16
        self.autocast = torch.autocast('cpu', torch.float16 if half else torch.bfloat16)
        self.learn.scaler, self.scales = torch.amp.GradScaler('cpu', enabled=half), []


class TwoViews(nn.Sequential):
    "A network of two inputs"
    def forward(self, a, b): return super().forward(torch.maximum(a, b))


def recomputed_body():
    net = small_network()
    return nn.Sequential(net[0], Recomputed(net[1]), *net[2:])


def recomputed_head(): return nn.Sequential(*small_network()[:2], Recomputed(small_network()[2:]))
def body_and_head(model): return [params(part) for part in (unwrapped(model)[:2], unwrapped(model)[2:])]


class Partner(NamedTuple):
    "What people train with, and how they do it"
    cbs: Callable[[], list] = list                                             # callbacks of the learner
    train: Callable[[Learner], None] = lambda learn: learn.fit(1)
    use: Callable[[Learner], torch.Tensor] = lambda learn: learn.get_preds()[0]  # what the trained learner is asked for
    net: Callable[[], nn.Module] = small_network
    loss: Callable[[], Callable] = CrossEntropyLossFlat
    n_inp: int = 1
    tfms: Callable[[], list] = list                                            # of a batch
    gap: float = 1e-5                                                          # between losses in different precision


PARTNERS = dict(
    plain=Partner(),
    bf16=Partner(lambda: [MixedOnCPU('bf16')], gap=0.02),
    fp16=Partner(lambda: [MixedOnCPU('fp16')], gap=0.02),
    mixup=Partner(lambda: [MixUp(0.5)]),
    cutmix=Partner(lambda: [CutMix(0.5)]),
    random_erasing=Partner(tfms=lambda: [RandomErasing(p=1.)]),
    label_smoothing=Partner(loss=LabelSmoothingCrossEntropyFlat),
    accumulation=Partner(lambda: [GradientAccumulation(8)]),
    clip=Partner(lambda: [GradientClip(0.1)]),
    channels_last=Partner(lambda: [ChannelsLast()]),
    averaged_weights=Partner(lambda: [AverageWeights(0.5)]),
    fine_tune=Partner(train=lambda learn: learn.fine_tune(1)),
    lr_find=Partner(train=lambda learn: learn.lr_find(num_it=4, show_plot=False, suggest_funcs=None)),
    discriminative=Partner(train=lambda learn: learn.fit_one_cycle(1, slice(0.01, 0.1))),
    save_model=Partner(train=lambda learn: learn.fit(2, cbs=SaveModelCallback())),
    early_stopping=Partner(train=lambda learn: learn.fit(3, cbs=EarlyStoppingCallback(min_delta=10))),
    csv_logger=Partner(train=lambda learn: learn.fit(1, cbs=CSVLogger())),
    hooks_and_files=Partner(train=lambda learn: learn.fit(1, cbs=[ActivationStats(), CSVLogger()])),  # its hooks hold the learner and an open file
    frozen_statistics=Partner(lambda: [BnFreeze()]),
    half_an_epoch=Partner(lambda: [ShortEpochCallback(0.5, short_valid=False)]),
    flat_then_cosine=Partner(train=lambda learn: learn.fit_flat_cos(2)),
    restarts=Partner(train=lambda learn: learn.fit_sgdr(1, 1)),
    smaller_steps=Partner(train=lambda learn: learn.fit(3, cbs=[ReduceLROnPlateau(patience=1, min_delta=10), TerminateOnNaNCallback()])),
    guesses=Partner(use=lambda learn: torch.stack([learn.get_preds(cbs=MCDropoutCallback())[0] for _ in range(2)])),
    tensorboard=Partner(train=lambda learn: learn.fit(1, cbs=tensorboard(learn))),
    interpretation=Partner(use=lambda learn: Interpretation.from_learner(learn).losses),
    augmented_at_test=Partner(use=lambda learn: learn.tta(n=2)[0], tfms=lambda: [RandomErasing(p=1.)]),
    compiled=Partner(net=lambda: torch.compile(small_network(), backend='eager')),
    recomputed_body=Partner(net=recomputed_body),
    recomputed_head=Partner(net=recomputed_head),
    two_inputs=Partner(net=lambda: TwoViews(*small_network()), n_inp=2),
    many_labels=Partner(loss=BCEWithLogitsLossFlat),
)


def tensorboard(learn):
    from fastai.callback.tensorboard import TensorBoardCallback
    return TensorBoardCallback(learn.path / 'tensorboard', log_preds=False)


class BareLoss(Callback):
    "Notes each epoch's validation loss, and what the network by itself makes of the same images"
    order = Recorder.order + 1
    def before_fit(self): self.losses = []
    def after_epoch(self):
        if not hasattr(self, 'lr_finder'): self.losses.append((self.recorder.values[-1][-1], bare_loss(self.learn)))


def make_learner(partner, path, *cbs):
    x, y = images(12, 8), torch.arange(12) % 4
    label = [lambda i: str(y[i].item()), Categorize(list('0123'))] if partner.loss is not BCEWithLogitsLossFlat else [lambda i: nn.functional.one_hot(y[i], 4).float()]
    items = Datasets(range(12), [*[[lambda i: TensorImage(x[i])], [lambda i: TensorImage(x[i].flip(-1))]][:partner.n_inp], label], splits=[range(8), range(8, 12)], n_inp=partner.n_inp)
    dls = items.dataloaders(bs=4, device='cpu', num_workers=0, after_batch=partner.tfms())
    return Learner(dls, partner.net(), partner.loss(), opt_func=SGD, lr=0.05, splitter=body_and_head, cbs=[*partner.cbs(), *cbs], path=path)


def seed():
    for seed_it in (torch.manual_seed, random.seed, np.random.seed): seed_it(0)


class Trained(NamedTuple):
    "A learner after its training, what came of it, and what else it left"
    learn: Learner
    losses: list      # of the batches
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
    rest = dict(hooks=hooked(learn.model), same_loss=learn.loss_func is loss_func, modes=[m.training for m in net.modules()],
                grads=[p.grad is not None for p in net.parameters()], statistics=[m.num_batches_tracked.item() for m in net.modules() if isinstance(m, nn.BatchNorm2d)],
                random=(torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()))
    return Trained(learn, learn.recorder.losses, bare.losses, copy.deepcopy(net.state_dict()), rest)


@pytest.fixture(scope='module')
def plain(tmp_path_factory):
    "A function that trains without SGDrop, once beside each partner"
    made = {}
    def plain(name):
        if name not in made: made[name] = trained(name, tmp_path_factory.mktemp(name))
        return made[name]
    return plain


def same(a, b): return all(torch.equal(a[k], b[k]) for k in a)


# each partner with each teacher, target, granularity and weight of the clean loss; each variant; and the pairs that share something
PAIRS = dict.fromkeys([
    *product(['plain'], VARIANTS), *product(PARTNERS, ['None-channel', 'head-element', 'full-spatial']),
    *product(['bf16', 'fp16', 'accumulation', 'compiled', 'recomputed_body', 'recomputed_head', 'many_labels'], ['head-two_layers']),
    *product(['mixup', 'cutmix', 'many_labels', 'label_smoothing'], ['None-spatial'])])


@pytest.mark.parametrize('name, variant', PAIRS)
def test_it_masks_in_training_and_leaves_everything_else_alone(name, variant, plain, tmp_path):
    if name == 'tensorboard' and not find_spec('tensorboard'): pytest.skip('tensorboard is not installed')
    partner, cb = PARTNERS[name], SGDropCallback(0.3, ema=0.5, **VARIANTS[variant])
    ours, theirs = trained(name, tmp_path, cb), plain(name)
    learn, history = ours.learn, cb.history

    # it trained, and not as it would have without
    assert masked_images(cb) > 0 and ours.losses != theirs.losses and all(v.isfinite().all() for v in ours.weights.values())
    back = name == 'lr_find'  # which puts the first weights back
    assert same(ours.weights, theirs.weights) == same(ours.weights, unwrapped(partner.net()).state_dict()) == back

    assert ours.rest == theirs.rest
    assert ours.rest['same_loss']

    # validation during the training and after it, and whatever else the learner is asked for, see no mask
    assert len(ours.validations) == len(theirs.validations)
    for seen, bare in ours.validations: assert seen == pytest.approx(bare, rel=partner.gap)
    assert learn.validate()[0] == pytest.approx(bare_loss(learn), rel=partner.gap)
    seed()
    with_it = partner.use(learn)
    with learn.removed_cbs(cb):
        seed()
        assert partner.use(learn).equal(with_it)
    assert cb.history == history


def test_it_acts_after_all_that_change_the_prediction_and_before_the_loss_is_noted(tmp_path):
    learn = make_learner(Partner(), tmp_path, SGDropCallback(), GradientClip(), MixedPrecision(), GradientAccumulation(), MixUp())
    order = [type(cb) for cb in learn.ordered_cbs('order')]  # which all have
    at = order.index(SGDropCallback)
    assert {MixUp, GradientAccumulation, MixedPrecision, GradientClip} <= {*order[:at]} and Recorder in order[at:]


@pytest.mark.parametrize('name', ['compiled', 'recomputed_body', 'recomputed_head'])
def test_a_network_that_is_run_in_another_way_learns_the_same(name, tmp_path):
    def weights(partner):
        seed()
        learn = make_learner(partner, tmp_path, SGDropCallback(0.3, clean_weight=0.5))
        learn.fit(8)  # more batches than the compiler would compile anew for
        return list(learn.model.parameters())
    torch.testing.assert_close(weights(PARTNERS[name]), weights(PARTNERS['plain']))


def layer_in_a_checkpoint(): return nn.Sequential(conv(3, 8), Recomputed(nn.Sequential(conv(8, 8), conv(8, 8)), True), *small_network()[2:])
def head_in_a_checkpoint(): return nn.Sequential(*small_network()[:2], Recomputed(small_network()[2:], True))


@pytest.mark.filterwarnings('ignore:None of the inputs have requires_grad')
@pytest.mark.parametrize('teacher', [None, 'head', 'full'])
@pytest.mark.parametrize('net, layer', [(layer_in_a_checkpoint, '1.part.0'), (head_in_a_checkpoint, None)])
def test_a_checkpoint_that_hides_the_gradients_is_refused(net, layer, teacher, tmp_path):
    "With `use_reentrant=True`, what lies before the layer would learn nothing under the mask, or there is no attribution"
    learn = make_learner(Partner(net=net), tmp_path, SGDropCallback(0.3, layer=layer, teacher=teacher))
    with pytest.raises(RuntimeError, match='use_reentrant=False'): learn.fit(1)
    assert not hooked(learn.model)
