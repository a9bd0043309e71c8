"`SGDropCallback` in fastai's training loop: what it says, what it leaves alone, and whom it gets along with."
import copy
import math
import random
import warnings

import pytest
import torch
from captum.attr import LayerGradientXActivation
from fastai.callback.core import Callback, CancelFitException, CancelStepException
from fastai.callback.mixup import CutMix, MixUp
from fastai.callback.schedule import Learner, SchedLin  # brings `fit_one_cycle` and `lr_find`
from fastai.callback.training import GradientAccumulation
from fastai.data.core import Datasets
from fastai.data.transforms import Categorize
from fastai.learner import load_learner
from fastai.losses import BCEWithLogitsLossFlat, CrossEntropyLossFlat, MSELossFlat
from fastai.optimizer import SGD
from fastai.torch_core import TensorImage
from fastai.vision.learner import create_body
from fastai.vision.models import resnet18
from fastai.vision.models.unet import DynamicUnet
from torch import nn

from networks import Autocast, bare_loss, build, hooked, images, same_weights, spies
from sgdrop.callback import SGDropCallback
from sgdrop.mask import SaliencyWarning
from sgdrop.monitor import NoEffectWarning


# What it says to wrong settings

@pytest.mark.parametrize('settings, said', [
    *((dict(rho=rho), r'rho must lie in \[0, 1\)') for rho in (-0.1, 1, 1.5, 20, math.nan, 'much')),
    *((dict(ema=ema), r'ema must lie in \[0, 1\)') for ema in (-0.1, 1, 99, None)),
    *(({name: value}, rf'{name} must lie in \[0, 1\]') for name in ('p', 'start', 'end') for value in (-0.1, 1.1, 50)),
    (dict(start=0.6, end=0.4), 'start must come before end'),
    (dict(target='labels'), "target must be one of 'predicted', 'label'; got 'labels'"),
    (dict(teacher='Full'), "teacher must be one of 'full', 'head', None; got 'Full'"),
    *((dict(clean_weight=w), r'clean_weight must lie in \[0, 1\)') for w in (-0.1, 1, 50)),
    (dict(rho=lambda done: done), r'rho must lie in \[0, 1\), got 1'),
    (dict(fill='noise'), "fill must be one of .*'mean'.*or a function of .*got 'noise'"),
    (dict(granularity='pixel'), "granularity must be one of 'element', 'spatial', 'channel'; got 'pixel'"),
    (dict(attribution='grad-cam'), "attribution must be one of .*'grad_x_act'.*'gradcam'.*got 'grad-cam'"),
    (dict(attribution=nn.Conv2d), 'attribution must be one of'),
])
def test_a_setting_that_means_nothing_is_named_at_once(settings, said):
    with pytest.raises(ValueError, match=said): SGDropCallback(**settings)


def fit_fails_with(learn, said, error=ValueError):
    before = hooked(learn.model)  # a U-Net holds hooks of its own
    with pytest.raises(error, match=said): learn.fit(1)
    assert hooked(learn.model) == before


def test_two_callbacks_on_one_learner_are_refused(small_net, make_learner):
    fit_fails_with(make_learner(small_net(), [SGDropCallback(rho=0.3), SGDropCallback(rho=0.1)]), 'two SGDropCallbacks')


def test_labels_that_are_no_classes_are_trained_on_unwatched(small_net, make_learner):
    amounts = torch.randn(32)
    by_amount = lambda scores, y: scores.exp()[:, 0].sub(y).square().mean()
    cb = SGDropCallback(rho=0.3)
    with pytest.warns(SaliencyWarning, match='cannot watch') as warned:
        net = fitted(make_learner, small_net(), cb, labels=amounts, loss_func=by_amount).model
    assert len([w for w in warned if issubclass(w.category, SaliencyWarning)]) == 1
    assert all(math.isnan(row['clean']) for row in cb.history) and not same_weights(net, small_net())
    learn = make_learner(small_net(), SGDropCallback(rho=0.3, target='label'), labels=amounts, loss_func=by_amount)
    fit_fails_with(learn, "target='label' cannot use these labels")


def test_an_unknown_layer_is_answered_with_the_nearest_names(make_learner):
    learn = make_learner(build('resnet18'), SGDropCallback(rho=0.1, layer='layer5'), n=8, size=64, classes=10)
    fit_fails_with(learn, "ResNet has no layer 'layer5'; the nearest names are .*'layer4'")


def test_a_layer_without_a_feature_map_is_told_where_the_last_one_is(small_net, make_learner):
    fit_fails_with(make_learner(small_net(), SGDropCallback(rho=0.1, layer='3')), r"'3' puts out a tensor of shape \(2, 8\).*last such layer is '1'")


def test_a_module_of_another_network_is_refused(small_net, make_learner):
    fit_fails_with(make_learner(small_net(), SGDropCallback(rho=0.1, layer=small_net()[1])), 'not a part of Sequential')


def fully_convolutional(): return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 4, 1))
def unet(): return DynamicUnet(create_body(resnet18(weights=None), pretrained=False), 4, (32, 32))


@pytest.mark.parametrize('make, size', [(fully_convolutional, 8), (unet, 32)])
def test_a_segmentation_network_is_told_that_it_has_no_class_scores(make, size, make_learner):
    learn = make_learner(make(), SGDropCallback(rho=0.1), n=4, bs=2, size=size, labels=torch.randint(4, (4, size, size)), loss_func=CrossEntropyLossFlat(axis=1))
    fit_fails_with(learn, rf'expected class scores of shape B×K.*\(2, 4, {size}, {size}\).*segmentation')


def test_a_regression_network_is_told_that_it_has_no_class_scores(small_net, make_learner):
    net = nn.Sequential(*small_net()[:-1], nn.Linear(8, 1))
    learn = make_learner(net, SGDropCallback(rho=0.1), labels=torch.randn(32, 1), loss_func=MSELossFlat())
    fit_fails_with(learn, r'expected class scores of shape B×K.*\(8, 1\).*regression')


def test_channels_cannot_be_ranked_by_gradcam(small_net, make_learner):
    fit_fails_with(make_learner(small_net(), SGDropCallback(rho=0.3, granularity='channel', attribution='gradcam')), "needs an attribution with channels.*'spatial'")


# What it leaves alone

def acted(before, after): return [b is not a for b, a in zip(before.preds, after.preds, strict=True)]


def fitted(make_learner, net, cb, epochs=2, **kwargs):
    learn = make_learner(net, **kwargs)
    learn.fit(epochs, cbs=cb)
    return learn


def test_validation_sees_no_mask(small_net, make_learner):
    learn = fitted(make_learner, small_net(), None, cbs=SGDropCallback(rho=0.5, granularity='element'))
    assert learn.recorder.values[-1][1] == pytest.approx(bare_loss(learn), abs=1e-6)  # within the fit
    assert learn.validate()[0] == pytest.approx(bare_loss(learn), abs=1e-6)           # and with the callback still attached
    scores, _ = learn.get_preds(act=nn.Identity())
    x = torch.stack([x for x, _ in learn.dls.valid_ds])
    assert scores.allclose(learn.model.eval()(x), atol=1e-6)


def test_a_second_fit_does_what_the_first_did(small_net, make_learner):
    cb = SGDropCallback(rho=0.3, p=0.5, teacher='full', granularity='element')
    first, second = fitted(make_learner, small_net(), cb), fitted(make_learner, small_net(), cb)
    assert same_weights(first.model, second.model) and not same_weights(first.model, fitted(make_learner, small_net(), None).model)


def test_it_draws_no_random_numbers_that_plain_training_would_not(small_net, make_learner):
    def state_after(cb):
        fitted(make_learner, small_net(), cb)
        return torch.get_rng_state(), random.getstate()
    rng, shuffling = state_after(None)
    for teacher in (None, 'head', 'full'):
        with_cb, shuffling_too = state_after(SGDropCallback(rho=0.3, p=0.5, teacher=teacher, layer='0'))
        assert with_cb.equal(rng) and shuffling_too == shuffling


@pytest.mark.parametrize('teacher', [None, 'head', 'full'])
def test_batchnorm_behind_the_mask_counts_every_batch_once(teacher, small_net, make_learner):
    learn = fitted(make_learner, small_net(), SGDropCallback(rho=0.3, teacher=teacher, layer='0'))
    assert [m.num_batches_tracked.item() for m in learn.model.modules() if isinstance(m, nn.BatchNorm2d)] == [8, 8]


def test_the_network_ends_in_the_mode_it_would_end_in_without(small_net, make_learner):
    modes = lambda cb: [m.training for m in fitted(make_learner, small_net(), cb).model.modules()]
    assert modes(SGDropCallback(rho=0.3, layer='0')) == modes(None)


# Which images and batches it acts on

@pytest.mark.parametrize('start, end, active', [(0., 1., range(8)), (0.25, 0.75, range(2, 6)), (0.5, 1., range(4, 8)), (0., 0.125, range(1))])
def test_outside_its_window_training_is_plain(start, end, active, small_net, make_learner):
    before, after = spies()
    fitted(make_learner, small_net(), [before, after, SGDropCallback(rho=0.3, start=start, end=end)])
    assert [i for i, a in enumerate(acted(before, after)) if a] == list(active)


def test_a_window_that_no_power_of_two_divides_is_kept_to_the_batch(small_net, make_learner):
    before, after = spies()
    fitted(make_learner, small_net(), [before, after, SGDropCallback(rho=0.3, start=0.3, end=0.8)], epochs=1, n=80)
    assert [i for i, a in enumerate(acted(before, after)) if a] == [3, 4, 5, 6, 7]


def test_only_some_of_the_images_are_masked(small_net, make_learner):
    before, after = spies()
    net = small_net()
    net[4].p = 0.  # dropout would tell all scores apart
    fitted(make_learner, net, [before, after, SGDropCallback(rho=0.3, p=0.5)], n=256, bs=64, epochs=1)
    same = torch.cat([(b - a).abs().amax(1) < 1e-6 for b, a in zip(before.preds, after.preds)])
    assert 0.3 < same.float().mean() < 0.7


@pytest.mark.parametrize('settings, said', [
    (dict(start=0.9), 'no step was masked'), (dict(p=0.), 'no step was masked'),
    (dict(attribution=lambda head, z, classes: torch.zeros_like(z)), 'attribution was zero')])
def test_a_callback_that_never_acted_says_so(settings, said, small_net, make_learner):
    with pytest.warns(NoEffectWarning, match=f'dropped nothing: .*{said}'): fitted(make_learner, small_net(), SGDropCallback(rho=0.3, **settings), epochs=1)


def test_a_map_too_small_for_the_share_is_told_so(small_net, make_learner):
    cb = SGDropCallback(rho=0.2, granularity='spatial')  # a fifth of four positions is none at all
    with pytest.warns(NoEffectWarning, match='rho=0.2 of 4 is less than one'): fitted(make_learner, small_net(), cb, epochs=1, size=2)


def test_a_share_of_zero_warns_of_nothing(small_net, make_learner):
    with warnings.catch_warnings():
        warnings.simplefilter('error', SaliencyWarning)
        fitted(make_learner, small_net(), SGDropCallback(rho=0.))


def test_the_learning_rate_finder_is_no_training_that_never_acted(small_net, make_learner):
    net = small_net()
    learn = make_learner(net, SGDropCallback(rho=0.3, start=0.9))
    with warnings.catch_warnings():
        warnings.simplefilter('error', SaliencyWarning)
        learn.lr_find(num_it=5, show_plot=False)
    assert same_weights(learn.model, small_net()) and not hooked(net)


def counted(learn):
    "A list that grows with each step of the optimizer"
    learn.create_opt()
    steps, step = [], learn.opt.step
    learn.opt.step = lambda *a, **k: (steps.append(1), step(*a, **k))
    return steps


class SkipsSteps(Callback):
    "As mixed precision does when gradients overflow"
    def before_step(self):
        if self.train_iter % 3 == 0: raise CancelStepException


@pytest.mark.parametrize('teacher', ['head', 'full'])
@pytest.mark.parametrize('other, n', [(lambda: GradientAccumulation(16), 4), (lambda: GradientAccumulation(24), 2), (SkipsSteps, 5), (Callback, 8)])
def test_the_teacher_follows_the_steps_of_the_optimizer(other, n, teacher, small_net, make_learner):
    cb, learn = SGDropCallback(rho=0.3, teacher=teacher), make_learner(small_net())
    steps = counted(learn)
    learn.fit(2, cbs=[cb, other()])
    assert cb.engine.teacher.n_updates == len(steps) == n


# What it trains on

class ByHand:
    "The same steps without a callback: gradient × activation of the predicted class, positions dropped, SGD"
    def __init__(self, net, rho, fill, clean_weight):
        self.net, self.rho, self.fill, self.clean_weight = net, rho, fill, clean_weight

    def loss(self, x, y):
        z = self.net[1](self.net[0](x))
        scores = self.net[2:](z)
        gradient, = torch.autograd.grad(scores.max(1).values.sum(), z, retain_graph=True)
        A = (gradient * z.detach()).clamp(min=0).sum(1).flatten(1)
        k = int(self.rho * A.shape[1])
        keep = torch.ones_like(A).scatter(1, A.topk(k).indices, 0.).view(len(z), 1, *z.shape[2:])
        holes = (1 - keep) * (z.mean((2, 3), keepdim=True) if self.fill == 'mean' else 0)
        loss = nn.functional.cross_entropy
        return (1 - self.clean_weight) * loss(self.net[2:](z * keep + holes), y) + self.clean_weight * loss(scores, y)


@pytest.mark.parametrize('accumulate', [None, 16])
@pytest.mark.parametrize('fill', ['zero', 'mean'])
@pytest.mark.parametrize('clean_weight', [0., 0.3])
def test_the_gradients_are_those_of_the_blended_loss(clean_weight, fill, accumulate, small_net, make_learner):
    "Also under gradient accumulation, which scales the loss before SGDrop's events come"
    def net():  # no dropout: the two scores of a step would draw different numbers by hand
        return nn.Sequential(*[m for m in small_net() if not isinstance(m, nn.Dropout)])
    learn, hand = make_learner(net()), ByHand(net().train(), 0.3, fill, clean_weight)
    seen, grads = [], []
    class Note(Callback):
        order = SGDropCallback.order + 3
        def after_backward(self):
            seen.append((self.x.clone(), self.y.clone()))
            grads.append([p.grad.clone() for p in self.learn.model.parameters()])
            if len(grads) == 2: raise CancelFitException
    cb = SGDropCallback(rho=0.3, teacher=None, granularity='spatial', fill=fill, clean_weight=clean_weight)
    learn.fit(1, 0., cbs=[cb, Note(), *([GradientAccumulation(accumulate)] if accumulate else [])])
    x, y = seen[0]
    hand.loss(x, y).backward()
    scale = len(y) / accumulate if accumulate else 1.
    for ours, p in zip(grads[0], hand.net.parameters(), strict=True): torch.testing.assert_close(ours, p.grad * scale, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize('mix', [MixUp, CutMix])
def test_both_losses_are_those_of_blended_labels(mix, small_net, make_learner):
    learn, losses = make_learner(small_net()), []
    class Note(Callback):
        order = SGDropCallback.order + 3
        def after_pred(self): self.masked, self.plain = self.pred.detach(), before.preds[-1].detach()
        def after_loss(self):
            loss = lambda scores: torch.lerp(*(nn.functional.cross_entropy(scores, y, reduction='none') for y in (mixer.yb1[0], self.y)), mixer.lam).mean()
            losses.append((self.loss.item(), (0.6 * loss(self.masked) + 0.4 * loss(self.plain)).item()))
    mixer, note, (before, _) = mix(0.5), Note(), spies()
    note.run_valid = False
    learn.fit(2, cbs=[mixer, before, note, SGDropCallback(rho=0.3, clean_weight=0.4)])
    assert len(losses) == 8 and all(ours == pytest.approx(theirs, abs=1e-5) for ours, theirs in losses)


def test_a_schedule_of_rho_is_followed(small_net, make_learner):
    cb = SGDropCallback(rho=SchedLin(0., 0.8), granularity='element', teacher='head', clean_weight=0.)
    fitted(make_learner, small_net(), cb, epochs=4, n=512, bs=64)
    shares = [h['dropped'] for h in cb.history]
    assert len(shares) == 4 and shares == sorted(shares) and shares[0] < 0.2 < shares[-1]


# Whom it gets along with

ATTRIBUTIONS = {'grad_x_act': 'grad_x_act', 'gradcam': 'gradcam', 'captum': LayerGradientXActivation, 'function': lambda head, z, classes: z.abs()}
PAIRS = [pytest.param(g, A, id=f'{g}-{name}') for g in ('element', 'spatial', 'channel') for name, A in ATTRIBUTIONS.items()
         if (g, name) != ('channel', 'gradcam')]  # which is refused, see above


@pytest.mark.parametrize('granularity, attribution', PAIRS)
@pytest.mark.parametrize('teacher', [None, 'head', 'full'])
def test_every_combination_trains(teacher, granularity, attribution, small_net, make_learner):
    cb = SGDropCallback(rho=0.3, teacher=teacher, granularity=granularity, attribution=attribution)
    net = fitted(make_learner, small_net(), cb, epochs=1).model
    report, = cb.history
    assert 0 < report['dropped'] <= 0.3 and 0 <= report['kept'] < 1 and 0 < report['images'] <= 32
    assert all(v.isfinite().all() for v in net.state_dict().values()) and not hooked(net) and not same_weights(net, small_net())


class Stronger(Callback):
    "The stronger label of each image, by what MixUp and CutMix keep of the batch"
    order, run_valid = SGDropCallback.order - 1, False
    def __init__(self, mix): self.mix, self.labels = mix, []
    def before_batch(self):
        lam = self.mix.lam.expand(len(self.y))
        self.labels.append([a if l >= 0.5 else b for l, a, b in zip(lam.tolist(), self.y.tolist(), self.mix.yb1[0].tolist())])


@pytest.mark.parametrize('mix', [MixUp, CutMix])
def test_the_label_of_a_blended_image_is_the_stronger_one(mix, small_net, make_learner):
    mix, asked = mix(1.), []
    def note(head, z, classes): asked.append(classes.int().argmax(1).tolist()); return z.abs()
    stronger = Stronger(mix)
    fitted(make_learner, small_net(), [mix, stronger, SGDropCallback(rho=0.3, target='label', attribution=note)], epochs=8)
    assert asked == stronger.labels and len(asked) == 32


@pytest.mark.parametrize('mix', [None, MixUp, CutMix])
def test_it_trains_on_several_labels_per_image(mix, small_net, make_learner):
    labels = (torch.rand(32, 4) < 0.4).float()
    cb = SGDropCallback(rho=0.3, target='label')
    fitted(make_learner, small_net(), [cb] if mix is None else [cb, mix(0.5)], labels=labels, loss_func=BCEWithLogitsLossFlat())
    assert cb.history


def test_a_second_fit_starts_with_a_new_teacher_and_a_new_history(small_net, make_learner):
    cb = SGDropCallback(rho=0.3, teacher='head')
    learn = fitted(make_learner, small_net(), cb, epochs=3)
    first = cb.engine.teacher
    learn.fit(1, cbs=cb)
    assert cb.engine.teacher is not first and cb.engine.teacher.n_updates == 4 and [h['epoch'] for h in cb.history] == [0]


@pytest.mark.parametrize('teacher', [None, 'head', 'full'])
def test_a_head_without_weights_will_do(teacher, make_learner):
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())  # all-convolutional
    cb = SGDropCallback(rho=0.3, teacher=teacher)
    fitted(make_learner, net, cb)
    assert cb.history


@pytest.mark.parametrize('teacher', [None, 'full'])
def test_a_layer_that_no_cut_is_possible_behind_trains(teacher, make_learner):
    cb = SGDropCallback(rho=0.1, teacher=teacher, layer='layer4.1.conv1', granularity='element')
    learn = make_learner(build('resnet18'), n=8, bs=4, size=64, classes=10)
    with pytest.warns(SaliencyWarning, match='cannot be cut.*runs the whole network twice'): learn.fit(1, cbs=cb)
    assert cb.history and not hooked(learn.model) and all(v.isfinite().all() for v in learn.model.state_dict().values())
    assert [m.num_batches_tracked.item() for m in learn.model.modules() if isinstance(m, nn.BatchNorm2d)] == [2] * 20


@pytest.mark.parametrize('teacher', [None, 'head', 'full'])
def test_a_network_in_bfloat16_trains(teacher, small_net, make_learner):
    class ToHalf(Callback):
        "What NonNativeMixedPrecision does on a GPU"
        order = 10
        def before_batch(self): self.learn.xb = tuple(x.bfloat16() for x in self.xb)
        def after_pred(self): self.learn.pred = self.pred.float()
    cb = SGDropCallback(rho=0.3, teacher=teacher)
    net = fitted(make_learner, small_net().bfloat16(), [ToHalf(), cb]).model
    assert cb.history and all(v.isfinite().all() for v in net.state_dict().values())


def test_bfloat16_by_autocast_trains_on_float32_scores(small_net, make_learner):
    learn, cb, (before, after) = make_learner(small_net()), SGDropCallback(rho=0.3), spies()
    learn.fit(1, cbs=[Autocast(), before, after, cb])
    assert any(acted(before, after)) and all(p.dtype == torch.float32 for p in after.preds)
    assert cb.history and all(v.isfinite().all() for v in learn.model.state_dict().values())


# Saving and copying

def named_learner(net, path, cb):
    x, y = images(32, 8), torch.arange(32) % 4
    items = Datasets(range(32), [[lambda i: TensorImage(x[i])], [lambda i: str(y[i].item()), Categorize(['0', '1', '2', '3'])]], splits=[range(24), range(24, 32)])
    return Learner(items.dataloaders(bs=8, device='cpu', num_workers=0), net, loss_func=CrossEntropyLossFlat(), opt_func=SGD, cbs=cb, path=path)


@pytest.mark.parametrize('layer', ['0', None, 'the module itself'])
@pytest.mark.parametrize('when', ['before', 'after'])
def test_an_exported_learner_comes_back_and_trains_on(when, layer, small_net, tmp_path):
    net = small_net()
    settings = dict(rho=0.4, layer=net[0] if layer == 'the module itself' else layer, teacher='full', granularity='element', p=0.7, ema=0.5, target='label')
    learn = named_learner(net, tmp_path, SGDropCallback(**settings))
    if when == 'after': learn.fit(2)
    learn.export()
    loaded = load_learner(tmp_path / 'export.pkl')
    assert same_weights(loaded.model, net)
    cb, = [cb for cb in loaded.cbs if isinstance(cb, SGDropCallback)]
    assert cb.engine is None and cb.rho == settings.pop('rho')
    assert cb.settings | dict(layer=None) == settings | dict(layer=None)
    image = images(1, 8, seed=3)[0]
    assert loaded.predict(TensorImage(image))[2].allclose(net.eval()(image[None]).softmax(1)[0], atol=1e-6)
    loaded.dls = learn.dls
    loaded.fit(1)
    assert cb.history and not same_weights(loaded.model, net) and not hooked(loaded.model)


def test_an_export_holds_no_second_network(small_net, tmp_path):
    def size(cb):
        learn = named_learner(nn.Sequential(*small_net()[:-1], nn.Linear(8, 5000), nn.Linear(5000, 4)), tmp_path, cb)
        learn.fit(1)
        learn.export()
        return (tmp_path / 'export.pkl').stat().st_size
    assert size(SGDropCallback(rho=0.3, teacher='full')) < size(None) + 20_000


@pytest.mark.parametrize('used', [False, True])
def test_a_copy_of_the_callback_does_the_same(used, small_net, make_learner):
    cb = SGDropCallback(rho=0.3, p=0.5, teacher='head', granularity='element')
    if used: fitted(make_learner, small_net(), cb)
    twin = copy.deepcopy(cb)
    assert same_weights(fitted(make_learner, small_net(), twin).model, fitted(make_learner, small_net(), cb).model)


def test_a_copied_learner_trains_by_itself(small_net, make_learner):
    learn = make_learner(small_net(), SGDropCallback(rho=0.3, layer='1'))
    learn.fit(1)
    twin, before = copy.deepcopy(learn), copy.deepcopy(learn.model)
    twin.fit(1)
    assert same_weights(learn.model, before) and not same_weights(twin.model, before)


def test_saved_weights_load_without_the_callback(small_net, make_learner):
    learn = fitted(make_learner, small_net(), SGDropCallback(rho=0.3))
    learn.save('weights')
    other = make_learner(small_net())
    other.load('weights')
    assert same_weights(other.model, learn.model)
