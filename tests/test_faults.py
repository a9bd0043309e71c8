"Errors, interrupts, unusual numbers and unusual networks in fastai's training loop."
import copy
import gc
import random
import resource
import warnings
from collections import Counter
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from fastai.callback.core import (
    Callback, CancelBatchException, CancelEpochException, CancelFitException,
    CancelStepException, CancelTrainException)
from fastai.callback.mixup import MixUp
from fastai.callback.tracker import TerminateOnNaNCallback
from fastai.learner import Recorder
from fastai.torch_core import params
from torch import Tensor, nn

from networks import (bare_loss, conv, hooked, images, masked_images,
                      same_weights, spies)
from sgdrop.callback import SGDropCallback
from sgdrop.experiments.training import BFloat16
from sgdrop.mask import FILLS, SaliencyWarning
from sgdrop.monitor import STATS, NoEffectWarning
from sgdrop.split import unwrapped

BEFORE, AFTER = SGDropCallback.order - 1, SGDropCallback.order + 1


def finite(net): return all(v.isfinite().all() for v in net.state_dict().values())


# Errors and interrupts

def raises(event, error, order=AFTER, when=2):
    "Return a callback that raises `error` when an event comes for the second time"
    came = []
    def fail(self):
        came.append(event)
        if len(came) == when: raise error
    failing = Callback(**{event: fail})
    failing.order = order
    return failing


class SkipsSteps(Callback):
    def before_step(self): raise CancelStepException


def works(learn, loss_func):
    "Assert that validation and training work, and leave nothing behind"
    def intact():
        assert learn.validate()[0] == pytest.approx(bare_loss(learn), abs=1e-6)
        assert not hooked(learn.model) and learn.loss_func is loss_func
    intact()
    before = copy.deepcopy(learn.model)
    learn.fit(1)
    assert learn.sg_drop.history and finite(learn.model)
    assert not same_weights(before, learn.model)
    intact()


@pytest.mark.parametrize('event, error, order', [
    ('before_fit', RuntimeError, AFTER), ('before_train', KeyboardInterrupt, AFTER),
    ('before_batch', KeyboardInterrupt, AFTER), ('after_pred', RuntimeError, AFTER),
    ('after_loss', KeyboardInterrupt, BEFORE), ('after_backward', RuntimeError, BEFORE),
    ('after_cancel_step', RuntimeError, BEFORE), ('after_batch', RuntimeError, BEFORE),
    ('before_validate', KeyboardInterrupt, BEFORE),
    *((event, CancelFitException, AFTER)
      for event in ('before_batch', 'after_pred', 'before_step', 'after_epoch'))])
def test_training_works_after_an_error(event, error, order, small_net, make_learner):
    cb = SGDropCallback(rho=0.3, teacher='full')
    learn = make_learner(small_net(), cb, n=16)
    loss_func, cbs = learn.loss_func, [raises(event, error('no'), order)]
    if event == 'before_fit': cbs = [raises(event, error('no'), when=1)]
    if event == 'after_cancel_step': cbs.append(SkipsSteps())
    cancels = error is CancelFitException
    with nullcontext() if cancels else pytest.raises(error): learn.fit(2, cbs=cbs)
    # fastai ends a cancelled fit; after any other error the next use restores all
    if cancels:
        assert not hooked(learn.model) and learn.loss_func is loss_func
        assert cb.runs is None
    works(learn, loss_func)


@pytest.mark.parametrize('event, skip, others', [
    ('before_batch', CancelTrainException, []),
    ('after_pred', CancelTrainException, [MixUp]),  # restores the loss function, too
    ('after_pred', CancelEpochException, []),
    ('after_backward', CancelBatchException, [])])
def test_validation_after_skipped_training_is_plain(
    event, skip, others, small_net, make_learner):
    learn, seen = make_learner(small_net(), SGDropCallback(rho=0.3), n=16), []
    def note(self): seen.append((self.recorder.log[-1], bare_loss(self.learn)))
    noting, loss_func = Callback(after_validate=note), learn.loss_func
    noting.order = Recorder.order + 1
    learn.fit(2, cbs=[raises(event, skip), noting, *(cb() for cb in others)])
    assert seen
    for ours, bare in seen: assert ours == pytest.approx(bare, abs=1e-6)
    works(learn, loss_func)


@pytest.mark.parametrize('error, attached', [
    (RuntimeError('no'), True), (KeyboardInterrupt(), False)])
def test_an_error_before_the_network_runs(error, attached, small_net, make_learner):
    "The replaced `forward` acts on the images of its batch only"
    cb = SGDropCallback(teacher='full')
    learn = make_learner(small_net(), [cb] if attached else [])
    loss_func, x = learn.loss_func, images(2, 8, seed=3)
    failing = raises('before_batch', error, when=3)
    with pytest.raises(type(error)):
        learn.fit(1, cbs=[failing] if attached else [failing, cb])
    assert (cb in learn.cbs) == attached
    bare = small_net()
    bare.load_state_dict(learn.model.state_dict())
    for net in (learn.model, bare): net[4].p = 0.
    assert learn.model.train()(x).equal(bare.train()(x))
    assert learn.model.eval()(x).equal(bare.eval()(x))
    assert same_weights(learn.model, bare)
    assert not hooked(learn.model) and learn.loss_func is loss_func


class Bomb(nn.Module):
    "Returns its input, until it is given an error to raise"
    error = None
    def forward(self, x):
        if self.error: raise self.error
        return x


@pytest.mark.parametrize('at, error', [
    (0, KeyboardInterrupt()),  # before the layer
    (2, RuntimeError('out of memory'))])  # behind it
def test_a_network_that_fails_keeps_no_hook(at, error, small_net, make_learner):
    bomb, layers = Bomb(), list(small_net())
    net = nn.Sequential(*layers[:at], bomb, *layers[at:])
    learn = make_learner(net, SGDropCallback(rho=0.3))
    def arm(self): bomb.error = error if self.train_iter == 1 else None
    with pytest.raises(type(error)): learn.fit(1, cbs=Callback(before_batch=arm))
    assert not hooked(learn.model)
    bomb.error = None
    works(learn, learn.loss_func)


@pytest.mark.parametrize('teacher, error', [
    (None, KeyboardInterrupt()), ('full', RuntimeError('no'))])
def test_an_attribution_that_fails(teacher, error, small_net, make_learner):
    calls = []
    def fails(head, z, classes):
        calls.append(torch.rand(3))
        if len(calls) == 2: raise error
        return z.abs()
    cb = SGDropCallback(rho=0.3, teacher=teacher, attribution=fails)
    learn = make_learner(small_net(), cb)
    with pytest.raises(type(error)): learn.fit(1)
    assert not hooked(learn.model) and all(m.training for m in learn.model.modules())
    assert not any(p.grad.any() for p in learn.model.parameters() if p.grad is not None)
    works(learn, learn.loss_func)


def test_a_loss_function_that_fails(small_net, make_learner):
    def fails(logits, y): raise ZeroDivisionError
    learn = make_learner(small_net(), loss_func=fails)
    with pytest.raises(ZeroDivisionError): learn.fit(1, cbs=SGDropCallback(rho=0.3))
    assert learn.loss_func is fails


def test_a_validation_does_not_repeat_the_warning(small_net, make_learner):
    "fastai begins and ends a fit for a validation, too"
    learn = make_learner(small_net(), SGDropCallback(rho=0.3, p=0.))
    with pytest.warns(NoEffectWarning): learn.fit(1)
    with warnings.catch_warnings():
        warnings.simplefilter('error', SaliencyWarning)
        learn.validate()
        learn.get_preds()


# NaN and infinity

class Spoils(nn.Module):
    "Puts a value into the last channel, or logit, of the first image in training"
    def __init__(self, value):
        super().__init__()
        self.value = value
    def forward(self, x):
        if not self.training: return x
        x = x.clone()
        x[0, -1] = self.value
        return x


def behind_features(net, value):
    "Hardtanh makes finite logits of infinity"
    return nn.Sequential(*net[:2], Spoils(value), nn.Hardtanh(), *net[2:])


def behind_logits(net, value): return nn.Sequential(*net, Spoils(value))


def nan_attribution(head, z, classes): return Spoils(float('nan'))(z.abs())


@pytest.mark.parametrize('spoiled, value, settings', [
    (behind_features, float('inf'), dict(layer='2')),
    (behind_features, float('nan'), dict(layer='2', teacher='full')),
    (behind_logits, float('nan'), {}),
    (behind_logits, float('inf'), dict(teacher='head')),
    (None, None, dict(attribution=nan_attribution))])
def test_an_image_that_is_not_finite_has_no_hole(
    spoiled, value, settings, small_net, make_learner):
    holes, net = [], small_net()
    def note(z, M):
        holes.append((~M).flatten(1).any(1).tolist())
        return FILLS['zero'](z, M)
    n_batches = 1 if spoiled else 2  # spoiled weights spoil all that follows
    if spoiled: net = spoiled(net, value)
    cb = SGDropCallback(rho=0.3, fill=note, **settings)
    with pytest.warns(SaliencyWarning, match='found NaN or infinity') as warned:
        make_learner(net, n=8 * n_batches).fit(1, cbs=cb)
    assert holes == [[False, *[True] * 7]] * n_batches
    assert sum(issubclass(w.category, SaliencyWarning) for w in warned) == 1
    assert spoiled or finite(net)


def test_a_class_that_is_ruled_out_does_not_count(small_net, make_learner):
    class RulesOut(nn.Module):
        "Gives the last class a logit of -∞"
        def forward(self, x): return x.masked_fill(torch.arange(4) == 3, -float('inf'))
    cb = SGDropCallback(rho=0.3, teacher='head')
    net = nn.Sequential(*small_net(), RulesOut())
    with warnings.catch_warnings():
        warnings.simplefilter('error', SaliencyWarning)
        make_learner(net, classes=3).fit(1, cbs=cb)
    assert masked_images(cb) == 32 and finite(net)


def test_a_training_that_ends_at_nan_leaves_nothing_behind(small_net, make_learner):
    "fastai ends it before SGDrop's own end of the batch"
    cb = SGDropCallback(rho=0.3)
    learn = make_learner(behind_logits(small_net(), float('nan')))
    loss_func = learn.loss_func
    with pytest.warns(SaliencyWarning): learn.fit(1, cbs=[cb, TerminateOnNaNCallback()])
    assert cb.runs is None and learn.loss_func is loss_func and not hooked(learn.model)


# Unusual batches, networks and loops

def test_a_last_batch_may_have_one_image(small_net, make_learner):
    "With a BatchNorm behind the mask"
    net, cb = small_net(), SGDropCallback(rho=0.3, layer='0', teacher='full')
    learn = make_learner(net, n=9, bs=4)
    learn.dls.train.drop_last = False
    learn.fit(1, cbs=cb)
    assert masked_images(cb) == 9 and finite(net) and net[1][1].num_batches_tracked == 3


def test_a_teacher_has_no_dropout(small_net, make_learner):
    net, cb = small_net(), SGDropCallback(rho=0.3, teacher='head')
    net[4].p = 1.  # the student itself has no attribution
    make_learner(net).fit(1, cbs=cb)
    assert masked_images(cb) == 32


@pytest.mark.parametrize('frozen, teacher', [(False, None), (True, 'full')])
def test_a_relu_in_place_does_not_change_the_map(frozen, teacher, make_learner):
    lowest = []
    def note(head, z, classes):
        lowest.append(z.min().item())
        return z.abs()
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(inplace=True),
                        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))
    net[0].requires_grad_(not frozen)
    cb = SGDropCallback(rho=0.3, layer='0', teacher=teacher, attribution=note)
    make_learner(net).fit(1, cbs=cb)
    assert len(lowest) == 4 and max(lowest) < 0


class Reused(nn.Module):
    "A network that runs one part twice"
    def __init__(self):
        super().__init__()
        self.first, self.again, self.fc = conv(3, 8), conv(8, 8), nn.Linear(8, 4)
    def forward(self, x):
        return self.fc(self.again(self.again(self.first(x))).mean((2, 3)))


def reused_in_a_row():
    again = conv(8, 8)
    return nn.Sequential(conv(3, 8), again, again, nn.AdaptiveAvgPool2d(1),
                         nn.Flatten(), nn.Linear(8, 4))


@pytest.mark.parametrize('make, layer, teacher', [
    (Reused, 'again', None), (reused_in_a_row, None, 'full')])
def test_the_last_run_of_a_part_is_masked(make, layer, teacher, make_learner):
    "A fill that changes nothing must then give the logits of the network"
    before, after = spies()
    cb = SGDropCallback(rho=0.3, layer=layer, teacher=teacher, fill=lambda z, M: z)
    make_learner(make()).fit(1, cbs=[before, after, cb])
    assert len(before.preds) == 4
    for clean, masked in zip(before.preds, after.preds, strict=True):
        torch.testing.assert_close(clean, masked)


def body_and_head(model): return [params(model[:2]), params(model[2:])]


def test_a_frozen_learner_trains_its_head(small_net, make_learner):
    cb = SGDropCallback(rho=0.3, teacher='full')
    learn = make_learner(small_net(), cb, splitter=body_and_head, train_bn=False)
    learn.freeze()
    learn.fit(1)
    assert learn.model[0][0].weight.equal(small_net()[0][0].weight)
    assert not learn.model[-1].weight.equal(small_net()[-1].weight) and cb.history


class Ungraded(nn.Sequential):
    "A body that is never trained"
    def forward(self, x):
        with torch.no_grad(): return super().forward(x)


def test_a_body_without_gradients_trains_its_head(small_net, make_learner):
    body, *head = Ungraded(*small_net()[:2]), *small_net()[2:]
    net, cb = nn.Sequential(body, *head), SGDropCallback(rho=0.3, layer='0.1')
    make_learner(net).fit(1, cbs=cb)
    assert all(p.grad is None for p in body.parameters()) and cb.history
    assert not net[-1].weight.equal(small_net()[-1].weight)


class HalfBody(nn.Module):
    "A frozen part in half precision, as autocast allows"
    def __init__(self, part):
        super().__init__()
        self.part = part.bfloat16().requires_grad_(False)
    def forward(self, x): return self.part(x)


def test_a_body_in_half_precision_trains_its_head(small_net, make_learner):
    net, cb = small_net(), SGDropCallback(rho=0.3, teacher='full', layer='0')
    make_learner(nn.Sequential(HalfBody(net[:2]), *net[2:]), [BFloat16(), cb]).fit(1)
    assert cb.engine.monitor.totals[STATS.index('changed')] > 0


def test_a_network_compiled_in_plain_training_is_masked(small_net, make_learner):
    def trained(net):
        learn, cb = make_learner(net), SGDropCallback(rho=0.3, start=0.5)
        learn.fit(1)
        learn.fit(2, cbs=cb)
        assert masked_images(cb) == 32
        return unwrapped(learn.model)
    compiled = torch.compile(small_net(), backend='eager')
    assert same_weights(trained(small_net()), trained(compiled))


class ValidatesBetween(Callback):
    "Validates once more after every epoch"
    busy = False
    def after_epoch(self):
        if self.busy: return
        self.busy, draws = True, random.getstate()
        with torch.random.fork_rng(devices=[]): self.learn.validate()
        random.setstate(draws)  # for the same batches afterwards
        self.busy = False


def test_a_validation_within_a_fit_does_not_restart_it(small_net, make_learner):
    nets, states = [], []
    for others in ([], [ValidatesBetween()]):
        cb = SGDropCallback(rho=0.3, teacher='full', p=0.5)
        learn = make_learner(small_net(), [cb, *others])
        learn.fit(3)
        nets.append(learn.model)
        states.append((cb.history, cb.engine.teacher.n_updates))
    assert states[0] == states[1] and states[0][1] == 12 and same_weights(*nets)


# Memory

def alive():
    "Return the numbers of all objects, tensors and modules"
    gc.collect()
    types = Counter(map(type, gc.get_objects()))
    return [sum(n for t, n in types.items() if issubclass(t, kind))
            for kind in (object, Tensor, nn.Module)]


def memory():
    pages = Path('/proc/self/statm').read_text().split()[1]
    return int(pages) * resource.getpagesize()


def test_fits_leave_nothing_behind(small_net, make_learner):
    learn = make_learner(small_net(), n=8)
    def fits(n):
        with learn.no_bar(), learn.no_logging():
            for i in range(n):
                teacher = (None, 'head', 'full')[i % 3]
                learn.fit(1, cbs=SGDropCallback(rho=0.3, teacher=teacher))
        return alive()
    fits(3)  # fills caches
    (objects, *few), used = fits(3), memory()
    more_objects, *more = fits(12)
    assert more == few and more_objects - objects < 50
    assert memory() - used < 20_000_000
