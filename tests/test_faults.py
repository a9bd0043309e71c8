"`SGDropCallback` where something goes wrong, or is unusual: what is dropped then, and what is left behind."
import copy
import gc
import pickle
import random
import resource
import warnings
from contextlib import nullcontext
from itertools import product
from pathlib import Path

import pytest
import torch
from fastai.callback.core import (Callback, CancelBackwardException, CancelBatchException, CancelEpochException, CancelFitException,
                                  CancelStepException, CancelTrainException, CancelValidException, event)
from fastai.callback.tracker import TerminateOnNaNCallback
from fastai.data.core import DataLoaders
from fastai.learner import Recorder, SkipToEpoch
from fastai.torch_core import params
from torch import Tensor, nn

from networks import Autocast, Compares, bare_loss, conv, hooked, masked_images, same_weights, spies
from sgdrop.callback import SGDropCallback
from sgdrop.experiments.runner import read_rows
from sgdrop.mask import SaliencyWarning, zero_fill
from sgdrop.monitor import STATS, NoEffectWarning
from sgdrop.split import unwrapped

TEACHERS = pytest.mark.parametrize('teacher', [None, 'head', 'full'])


def finite(net): return all(v.isfinite().all() for v in net.state_dict().values())


# Errors, at every event of fastai's loop

CANCELS = dict(backward=CancelBackwardException, batch=CancelBatchException, epoch=CancelEpochException, fit=CancelFitException,
               step=CancelStepException, train=CancelTrainException, validate=CancelValidException)
EVENTS = [name for name in vars(event) if name.startswith(('before_', 'after_')) and name != 'after_create']
ERRORS = {e.__name__: e for e in (RuntimeError, KeyboardInterrupt, CancelFitException)}


def fails_at(name, error, order):
    "Callbacks that raise an error the second time that an event comes, or the first where it comes once; and how often it came"
    came = []
    def fail(self):
        came.append(name)
        if len(came) == (1 if name.endswith('fit') else 2): raise error
    def cancel(self): raise CANCELS[name.removeprefix('after_cancel_')]
    failing, bringing = Callback(**{name: fail}), Callback(**{name.replace('after_cancel', 'before'): cancel})
    failing.order, bringing.order = order, SkipToEpoch.order  # fastai's own callbacks have begun by then
    return ([failing, bringing] if name.startswith('after_cancel') else [failing]), came


def in_use(learn, loss_func):
    "Does everything work as if nothing had happened?"
    assert learn.validate()[0] == pytest.approx(bare_loss(learn), abs=1e-6)
    assert not hooked(learn.model) and learn.loss_func is loss_func
    before = copy.deepcopy(learn.model)
    learn.fit(1)
    assert learn.sg_drop.history and not same_weights(before, learn.model) and finite(learn.model)
    assert not hooked(learn.model) and learn.loss_func is loss_func and learn.validate()[0] == pytest.approx(bare_loss(learn), abs=1e-6)


def test_all_events_are_tried(): assert len(EVENTS) == 23


@pytest.mark.parametrize('order', [SGDropCallback.order - 1, SGDropCallback.order + 1])
@pytest.mark.parametrize('error', ERRORS)
@pytest.mark.parametrize('name', EVENTS)
def test_training_goes_on_after_an_error_at_any_event(name, error, order, small_net, make_learner):
    learn = make_learner(small_net(), SGDropCallback(rho=0.3, teacher='full', clean_weight=0.5), n=16)
    loss_func, (failing, came) = learn.loss_func, fails_at(name, ERRORS[error]('no'), order)
    with pytest.raises(ERRORS[error]) if error != 'CancelFitException' or name in ('after_cancel_fit', 'after_fit') else nullcontext():
        learn.fit(2, cbs=failing)
    assert came
    # fastai says that a cancelled fit is over; after any other error the next use of the network clears up
    if error == 'CancelFitException': assert not hooked(learn.model) and learn.loss_func is loss_func and learn.sg_drop.runs is None
    in_use(learn, loss_func)


@pytest.mark.parametrize('skip', [CancelBatchException, CancelTrainException, CancelEpochException])
@pytest.mark.parametrize('name', ['before_batch', 'after_pred', 'after_backward', 'before_step'])
def test_validation_after_a_part_of_the_training_was_skipped_is_plain(name, skip, small_net, make_learner):
    learn, seen = make_learner(small_net(), SGDropCallback(rho=0.3, clean_weight=0.5), n=16), []
    loss_func, (failing, _) = learn.loss_func, fails_at(name, skip, SGDropCallback.order + 1)
    compare = Callback(after_validate=lambda self: seen.append((self.recorder.log[-1], bare_loss(self.learn))))
    compare.order = Recorder.order + 1
    learn.fit(2, cbs=[*failing, compare])
    assert seen
    for ours, bare in seen: assert ours == pytest.approx(bare, abs=1e-6)
    in_use(learn, loss_func)


class Bomb(nn.Module):
    "Passes on what it gets, until it is armed"
    error = None
    def forward(self, x):
        if self.error: raise self.error
        return x


@pytest.mark.parametrize('error', [RuntimeError('out of memory'), KeyboardInterrupt()])
@pytest.mark.parametrize('at', [0, 2])  # before the layer, and after it
def test_no_hook_is_left_when_the_network_fails(at, error, small_net, make_learner):
    bomb, layers = Bomb(), list(small_net())
    learn = make_learner(nn.Sequential(*layers[:at], bomb, *layers[at:]), SGDropCallback(rho=0.3))
    def arm(self): bomb.error = error if self.train_iter == 1 else None
    with pytest.raises(type(error)): learn.fit(1, cbs=Callback(before_batch=arm))
    assert not hooked(learn.model)
    bomb.error = None
    in_use(learn, learn.loss_func)


@pytest.mark.parametrize('error', [RuntimeError('no'), KeyboardInterrupt()])
@TEACHERS
def test_an_error_in_the_attribution_leaves_nothing_behind(teacher, error, small_net, make_learner):
    def fails(head, z, classes):
        torch.rand(3)
        if len(seen) == 1: raise error
        seen.append(torch.get_rng_state())
        return z.abs()
    seen, learn = [], make_learner(small_net(), SGDropCallback(rho=0.3, teacher=teacher, attribution=fails))
    with pytest.raises(type(error)): learn.fit(1)
    assert not hooked(learn.model) and all(m.training for m in learn.model.modules()) and all(p.grad is None or not p.grad.any() for p in learn.model.parameters())
    seen.clear()
    learn.sg_drop.settings['attribution'] = 'grad_x_act'
    in_use(learn, learn.loss_func)


def test_the_loss_function_comes_back_when_it_fails_itself(small_net, make_learner):
    def fails(scores, y): raise ZeroDivisionError
    learn = make_learner(small_net(), loss_func=fails)
    with pytest.raises(ZeroDivisionError): learn.fit(1, cbs=SGDropCallback(rho=0.3, clean_weight=0.5))
    assert learn.loss_func is fails


def test_what_a_validation_finds_is_not_what_the_training_found(small_net, make_learner):
    "fastai begins and ends a fit for a validation too"
    learn = make_learner(small_net(), SGDropCallback(rho=0.3, p=0.))
    with pytest.warns(NoEffectWarning): learn.fit(1)
    with warnings.catch_warnings():
        warnings.simplefilter('error', SaliencyWarning)
        learn.validate(), learn.get_preds()


# Numbers that are none

class Spoils(nn.Module):
    "Puts a value into the first image of a training batch: into a channel of a map, or one of the scores"
    def __init__(self, value):
        super().__init__()
        self.value = value
    def forward(self, x):
        if not self.training: return x
        x = x.clone()
        x[0, -1] = self.value
        return x


def fit_and_note_holes(learn, **settings):
    "Which images of each batch had a hole"
    holes = []
    def note(z, M):
        holes.append((~M).flatten(1).any(1).tolist())
        return zero_fill(z, M)
    learn.fit(1, cbs=SGDropCallback(rho=0.3, fill=note, **settings))
    return holes


def spoiled_net(net, where, value):
    "`net` with `Spoils` behind its last feature map, or behind the scores"
    if where == 'scores': return nn.Sequential(*net, Spoils(value))
    return nn.Sequential(*net[:2], Spoils(value), nn.Hardtanh(), *net[2:])  # which makes finite scores of infinity


def saliency_warnings(warned): return [str(w.message) for w in warned if issubclass(w.category, SaliencyWarning)]


@pytest.mark.parametrize('value, teacher', [
    *product([float('nan'), float('inf'), -float('inf')], [None, 'head']), (float('nan'), 'full')])  # which looks at a map of its own
def test_nothing_is_dropped_where_the_feature_map_is_not_finite(value, teacher, small_net, make_learner):
    learn = make_learner(spoiled_net(small_net(), 'features', value), n=8)
    with pytest.warns(SaliencyWarning, match='an image had NaN or infinity') as warned: holes, = fit_and_note_holes(learn, layer='2', teacher=teacher)
    assert holes == [False, *[True] * 7] and len(saliency_warnings(warned)) == 1


@TEACHERS
@pytest.mark.parametrize('value', [float('nan'), float('inf')])
def test_nothing_is_dropped_where_the_scores_are_not_finite(value, teacher, small_net, make_learner):
    learn = make_learner(spoiled_net(small_net(), 'scores', value), n=8)
    with pytest.warns(SaliencyWarning, match='an image had NaN or infinity') as warned: holes, = fit_and_note_holes(learn, teacher=teacher)
    assert holes == [False, *[True] * 7] and len(saliency_warnings(warned)) == 1


@TEACHERS
@pytest.mark.parametrize('value', [float('nan'), float('inf')])
def test_nothing_is_dropped_where_the_attribution_is_not_finite(value, teacher, small_net, make_learner):
    def attribution(head, z, classes): return Spoils(value)(z.abs())
    net = small_net()
    with pytest.warns(SaliencyWarning, match='an image had NaN or infinity') as warned: holes = fit_and_note_holes(make_learner(net), attribution=attribution, teacher=teacher)
    assert holes == [[False, *[True] * 7]] * 4 and len(saliency_warnings(warned)) == 1  # not one in each batch
    assert finite(net) and not same_weights(net, small_net())


@TEACHERS
def test_a_class_that_the_network_rules_out_is_no_reason_to_drop_nothing(teacher, small_net, make_learner):
    class RulesOut(nn.Module):
        def forward(self, scores): return scores.masked_fill(torch.arange(4) == 3, -float('inf'))
    net = nn.Sequential(*small_net(), RulesOut())
    with warnings.catch_warnings():
        warnings.simplefilter('error', SaliencyWarning)
        holes = fit_and_note_holes(make_learner(net, classes=3), teacher=teacher)
    assert holes == [[True] * 8] * 4 and finite(net)


def test_a_training_that_ends_at_nan_leaves_nothing_behind(small_net, make_learner):
    "fastai ends it before SGDrop's own end of the batch"
    cb = SGDropCallback(rho=0.3, clean_weight=0.5)
    learn = make_learner(spoiled_net(small_net(), 'scores', float('nan')))
    loss_func = learn.loss_func
    with pytest.warns(SaliencyWarning): learn.fit(1, cbs=[cb, TerminateOnNaNCallback()])
    assert cb.runs is None and learn.loss_func is loss_func and not hooked(learn.model)


# Data and networks that are unusual

@TEACHERS
def test_a_batch_of_one_will_do(teacher, make_learner):
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))
    cb = SGDropCallback(rho=0.3, teacher=teacher)
    make_learner(net, bs=1, n=3).fit(1, cbs=cb)
    assert cb.history and finite(net)


@TEACHERS
@pytest.mark.parametrize('layer', ['0', None])  # with a BatchNorm behind the mask, and without
def test_a_last_batch_of_one_will_do_under_batchnorm(layer, teacher, small_net, make_learner):
    net, cb = small_net(), SGDropCallback(rho=0.3, layer=layer, teacher=teacher)
    learn = make_learner(net, n=9, bs=4)
    learn.dls.train.drop_last = False
    learn.fit(1, cbs=cb)
    assert cb.history[0]['images'] == 9 and finite(net) and net[1][1].num_batches_tracked == 3


def test_a_batch_too_small_for_batchnorm_fails_as_it_would_without(small_net, make_learner):
    def says(cbs):
        net = nn.Sequential(*small_net()[:-1], nn.BatchNorm1d(8), nn.Linear(8, 4))
        learn = make_learner(net, n=9, bs=4)
        learn.dls.train.drop_last = False
        with pytest.raises(ValueError) as said: learn.fit(1, cbs=cbs)
        assert not hooked(net)
        return str(said.value)
    assert says(None) == says(SGDropCallback(rho=0.3))


@TEACHERS
@pytest.mark.parametrize('target', ['predicted', 'label'])
def test_a_class_without_images_will_do(target, teacher, small_net, make_learner):
    net, cb = small_net(), SGDropCallback(rho=0.3, target=target, teacher=teacher)
    make_learner(net, classes=3).fit(1, cbs=cb)
    assert cb.history[0]['images'] > 0 and finite(net)


@pytest.mark.parametrize('teacher', ['head', 'full'])
def test_the_teacher_sees_through_the_dropout_of_the_head(teacher, small_net, make_learner):
    net, cb = small_net(), SGDropCallback(rho=0.3, teacher=teacher)
    net[4].p = 1.  # so the student has no evidence at all
    make_learner(net).fit(1, cbs=cb)
    assert cb.history[0]['images'] == 32


@TEACHERS
@pytest.mark.parametrize('frozen', [False, True])
def test_a_relu_in_place_behind_the_layer_does_not_write_into_the_map(frozen, teacher, make_learner):
    net, lowest = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)), []
    net[0].requires_grad_(not frozen)
    def note(head, z, classes): lowest.append(z.min().item()); return z.abs()
    make_learner(net).fit(1, cbs=SGDropCallback(rho=0.3, layer='0', teacher=teacher, attribution=note))
    assert max(lowest) < 0


class Reused(nn.Module):
    "The same part of a network, twice"
    def __init__(self):
        super().__init__()
        self.first, self.again, self.head = conv(3, 8), conv(8, 8), nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))
    def forward(self, x): return self.head(self.again(self.again(self.first(x))))


def reused_in_a_row():
    again = conv(8, 8)
    return nn.Sequential(conv(3, 8), again, again, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))


@TEACHERS
@pytest.mark.parametrize('make, layer', [(Reused, None), (Reused, 'again'), (reused_in_a_row, None), (reused_in_a_row, '1')])
def test_a_part_that_runs_twice_is_masked_behind_its_last_run(make, layer, teacher, make_learner):
    before, after = spies()
    nothing = lambda z, M: z  # what comes after the mask must then make of the map what it made of it before
    make_learner(make()).fit(1, cbs=[before, after, SGDropCallback(rho=0.3, layer=layer, teacher=teacher, fill=nothing)])
    assert len(before.preds) == 4
    for own, masked in zip(before.preds, after.preds, strict=True): torch.testing.assert_close(own, masked)


def body_and_head(model): return [params(model[:2]), params(model[2:])]


@TEACHERS
def test_a_frozen_learner_trains_its_head(teacher, small_net, make_learner):
    learn, cb = make_learner(small_net(), splitter=body_and_head, train_bn=False), SGDropCallback(rho=0.3, teacher=teacher)
    learn.freeze()
    learn.fit(1, cbs=cb)
    frozen, head = small_net()[0][0].weight, small_net()[-1].weight
    assert learn.model[0][0].weight.equal(frozen) and not learn.model[-1].weight.equal(head) and cb.history


class Ungraded(nn.Sequential):
    "A body that is never trained"
    def forward(self, x):
        with torch.no_grad(): return super().forward(x)


@TEACHERS
@pytest.mark.parametrize('freeze', [lambda body: body.requires_grad_(False), lambda body: Ungraded(*body)])
def test_a_body_without_gradients_trains_its_head(freeze, teacher, small_net, make_learner):
    body, cb = freeze(small_net()[:2]), SGDropCallback(rho=0.3, layer='0.1', teacher=teacher)
    net = nn.Sequential(body, *small_net()[2:])
    make_learner(net).fit(1, cbs=cb)
    assert all(p.equal(q) and p.grad is None for p, q in zip(body.parameters(), small_net()[:2].parameters()))
    assert not net[-1].weight.equal(small_net()[-1].weight) and cb.history


# Unusual networks and loops

def test_a_network_compiled_in_plain_training_is_masked(small_net, make_learner):
    learn = make_learner(torch.compile(small_net(), backend='eager'))
    learn.fit(1)
    cb = SGDropCallback(rho=0.3, start=0.5)
    learn.fit(2, cbs=cb)
    assert masked_images(cb) == 32
    eager, late = make_learner(small_net()), SGDropCallback(rho=0.3, start=0.5)
    eager.fit(1)
    eager.fit(2, cbs=late)
    assert same_weights(eager.model, unwrapped(learn.model))


class ValidatesBetween(Callback):
    "Asks for a validation itself, after every epoch"
    busy = False
    def after_epoch(self):
        if self.busy: return
        self.busy, draws = True, random.getstate()
        with torch.random.fork_rng(devices=[]): self.learn.validate()
        random.setstate(draws)  # for the same batches afterwards
        self.busy = False


@TEACHERS
def test_a_validation_in_the_middle_of_a_fit_does_not_begin_it_anew(teacher, small_net, make_learner):
    nets, states = [], []
    for others in ([], [ValidatesBetween()]):
        cb = SGDropCallback(rho=0.3, teacher=teacher, p=0.5)
        learn = make_learner(small_net(), [cb, *others])
        learn.fit(3)
        nets.append(learn.model)
        states.append((cb.history, getattr(cb.engine.teacher, 'n_updates', 12)))
    assert states[0] == states[1] and states[0][1] == 12 and same_weights(*nets)
    learn.fit(1)
    assert [row['epoch'] for row in cb.history] == [0]


class HalfBody(nn.Module):
    "A frozen part in half precision, as autocast allows"
    def __init__(self, part): super().__init__(); self.part = part.bfloat16().requires_grad_(False)
    def forward(self, x): return self.part(x)


@TEACHERS
def test_a_body_in_half_precision_trains_its_head_under_autocast(teacher, small_net, make_learner):
    net = small_net()
    cb = SGDropCallback(rho=0.3, teacher=teacher, layer='0')
    make_learner(nn.Sequential(HalfBody(net[:2]), *net[2:]), [Autocast(), cb]).fit(1)
    assert cb.engine.monitor.totals[STATS.index('changed')] > 0


@pytest.mark.filterwarnings('ignore:.*cannot be cut')
@pytest.mark.parametrize('teacher', [None, 'full'])
def test_a_network_that_compares_two_images_learns(teacher, make_learner):
    "With two different images in place of one twice: the logits without a mask are the network's own"
    before, after = spies()
    learn = make_learner(Compares(), [before, SGDropCallback(teacher=teacher, fill=lambda z, M: z), after])
    x, y = learn.dls.one_batch()
    items = list(zip(x, x.flip(0), y))
    learn.dls = DataLoaders.from_dsets(items, items, bs=4, device='cpu', num_workers=0, n_inp=2)
    with pytest.warns(NoEffectWarning): learn.fit(1)
    assert before.preds
    for own, masked in zip(before.preds, after.preds, strict=True): torch.testing.assert_close(own, masked)


def test_inputs_that_are_no_tensors_are_refused(small_net, make_learner):
    learn = make_learner(small_net(), SGDropCallback())
    class Wrapped(Callback):
        def before_batch(self): self.learn.xb = (tuple(self.xb),)
    learn.add_cb(Wrapped())
    with pytest.raises(TypeError, match='input 0 of the network is a tuple'): learn.fit(1)


def test_replicas_that_share_a_batch_are_refused(small_net, make_learner):
    class InHalves(nn.Sequential):
        "What `nn.DataParallel` does, on one device"
        def forward(self, x): return torch.cat([super(InHalves, self).forward(half) for half in x.chunk(2)])
    with pytest.raises(RuntimeError, match='put out 4 feature maps for 8 images; .* DistributedDataParallel'):
        make_learner(InHalves(*small_net()), SGDropCallback(layer='1')).fit(1)


def test_a_layer_that_runs_twice_is_none_of_several(small_net, make_learner):
    net, twice = small_net(), nn.Conv2d(8, 8, 1)
    with pytest.raises(RuntimeError, match='runs several times in a pass'):
        make_learner(nn.Sequential(net[0], twice, twice, *net[1:]), SGDropCallback(layer=['0', '1'])).fit(1)


# Many times, and from elsewhere

def alive(kind):
    gc.collect()
    return sum(issubclass(type(o), kind) for o in gc.get_objects())


def memory(): return int(Path('/proc/self/statm').read_text().split()[1]) * resource.getpagesize()


@TEACHERS
def test_short_fits_leave_nothing_behind(teacher, small_net, make_learner):
    "Two hundred of them, with the three teachers together"
    learn = make_learner(small_net(), n=8)
    def fits(n):
        with learn.no_bar(), learn.no_logging():
            for _ in range(n): learn.fit(1, cbs=SGDropCallback(rho=0.3, teacher=teacher, clean_weight=0.5))
        return [alive(Tensor), alive(nn.Module), sum(len(m._forward_hooks) for m in learn.model.modules())]
    after_few, objects, bytes_used = fits(5), alive(object), memory()
    assert fits(65) == after_few
    assert alive(object) - objects < 50 and memory() - bytes_used < 20_000_000


class Marks:
    "Leaves a file behind where it is unpickled as code"
    def __init__(self, path): self.path = path
    def __reduce__(self): return Path.touch, (self.path,)


@pytest.mark.parametrize('load', [read_rows, lambda file: torch.load(file, weights_only=True)])
def test_a_file_from_elsewhere_runs_no_code(load, tmp_path):
    mark, file = tmp_path / 'mark', tmp_path / 'file'
    torch.save(dict(weight=Marks(mark)), file)
    with pytest.raises((ValueError, pickle.UnpicklingError)): load(file)
    assert not mark.exists()
    torch.load(file, weights_only=False)
    assert mark.exists()


def test_the_state_of_a_training_goes_to_a_file_without_code(small_net, make_learner, tmp_path):
    cb, file = SGDropCallback(rho=0.3, teacher='full'), tmp_path / 'state.pth'
    learn = make_learner(small_net(), cb)
    learn.fit(1)
    learn.validate()  # which trains nothing
    torch.save(cb.state_dict(), file)
    state = torch.load(file, weights_only=True)
    assert state['teacher'].keys() == cb.engine.teacher.state_dict().keys() and state['totals'][0] == masked_images(cb) > 0
    SGDropCallback(teacher='full').load_state_dict(state)
