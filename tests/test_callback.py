"`SGDropCallback` in fastai's training loop."
import copy
import math
import random
import warnings

import pytest
import torch
from captum.attr import LayerGradientXActivation
from fastai.callback.core import Callback, CancelFitException, CancelStepException
from fastai.callback.mixup import CutMix, MixUp
from fastai.callback.schedule import Learner, SchedLin  # the first with `lr_find`
from fastai.callback.training import GradientAccumulation
from fastai.data.core import Datasets
from fastai.data.transforms import Categorize
from fastai.learner import load_learner
from fastai.losses import BCEWithLogitsLossFlat, CrossEntropyLossFlat
from fastai.optimizer import SGD
from fastai.torch_core import TensorImage
from torch import nn
from torch.nn.functional import cross_entropy

from networks import bare_loss, build, hooked, images, same_weights, spies
from sgdrop.callback import SGDropCallback
from sgdrop.experiments.training import BFloat16
from sgdrop.mask import SaliencyWarning
from sgdrop.monitor import NoEffectWarning


def fitted(make_learner, net, cb, epochs=2, **kwargs):
    learn = make_learner(net, **kwargs)
    learn.fit(epochs, cbs=cb)
    return learn


def finite(net): return all(v.isfinite().all() for v in net.state_dict().values())
def batches_counted(net):
    norms = [m for m in net.modules() if isinstance(m, nn.BatchNorm2d)]
    return [m.num_batches_tracked.item() for m in norms]


# What is refused

@pytest.mark.parametrize('settings, said', [
    (dict(start=-0.1), r'start must be in \[0, 1\]'),
    (dict(end=50), r'end must be in \[0, 1\]'),
    (dict(target='labels'), "target must be one of 'predicted', 'label'; got 'labels'"),
])
def test_a_wrong_setting_is_refused_at_once(settings, said):
    with pytest.raises(ValueError, match=said): SGDropCallback(**settings)


def test_two_callbacks_on_one_learner_are_refused(small_net, make_learner):
    learn = make_learner(small_net(), [SGDropCallback(), SGDropCallback(rho=0.1)])
    with pytest.raises(ValueError, match='two SGDropCallbacks'): learn.fit(1)


def test_targets_that_are_not_classes_are_not_diagnosed(small_net, make_learner):
    def loss(logits, y): return logits.exp()[:, 0].sub(y).square().mean()
    amounts = dict(labels=torch.randn(32), loss_func=loss)
    cb = SGDropCallback(rho=0.3)
    with pytest.warns(SaliencyWarning, match='cannot watch') as warned:
        net = fitted(make_learner, small_net(), cb, **amounts).model
    assert sum(issubclass(w.category, SaliencyWarning) for w in warned) == 1
    assert all(math.isnan(row['clean']) for row in cb.history)
    assert not same_weights(net, small_net())
    learn = make_learner(small_net(), SGDropCallback(target='label'), **amounts)
    with pytest.raises(ValueError, match="target='label' cannot use"): learn.fit(1)
    assert not hooked(learn.model)


# What does not change

def test_validation_has_no_mask(small_net, make_learner):
    cb = SGDropCallback(rho=0.5, granularity='element')
    learn = fitted(make_learner, small_net(), None, cbs=cb)
    bare = pytest.approx(bare_loss(learn), abs=1e-6)
    assert learn.recorder.values[-1][1] == bare  # within the fit
    assert learn.validate()[0] == bare  # and after it
    logits, _ = learn.get_preds(act=nn.Identity())
    x = torch.stack([x for x, _ in learn.dls.valid_ds])
    assert logits.allclose(learn.model.eval()(x), atol=1e-6)


def test_a_second_fit_has_a_new_engine(small_net, make_learner):
    cb = SGDropCallback(rho=0.3, p=0.5, teacher='full', granularity='element')
    first = fitted(make_learner, small_net(), cb)
    teacher = cb.engine.teacher
    second = fitted(make_learner, small_net(), cb)
    assert same_weights(first.model, second.model)
    assert cb.engine.teacher is not teacher and cb.engine.teacher.n_updates == 8
    assert [row['epoch'] for row in cb.history] == [0, 1]


def test_it_draws_no_random_numbers_of_the_training(small_net, make_learner):
    def state_after(cb):
        fitted(make_learner, small_net(), cb, epochs=1)
        return torch.get_rng_state().tolist(), random.getstate()
    cb = SGDropCallback(rho=0.3, p=0.5, teacher='full', layer='0')
    assert state_after(cb) == state_after(None)


@pytest.mark.parametrize('teacher', [None, 'full'])
def test_batchnorm_behind_the_mask_counts_once(teacher, small_net, make_learner):
    cb = SGDropCallback(rho=0.3, teacher=teacher, layer='0')
    assert batches_counted(fitted(make_learner, small_net(), cb).model) == [8, 8]


def test_rho_zero_is_plain_training_without_warnings(small_net, make_learner):
    with warnings.catch_warnings():
        warnings.simplefilter('error', SaliencyWarning)
        learn = fitted(make_learner, small_net(), SGDropCallback(rho=0.))
    assert same_weights(learn.model, fitted(make_learner, small_net(), None).model)


# Which images and batches are masked

def masked_batches(before, after):
    pairs = zip(before.preds, after.preds, strict=True)
    return [i for i, (clean, masked) in enumerate(pairs) if clean is not masked]


@pytest.mark.parametrize('start, end, n, expected', [
    (0.25, 0.75, 64, range(2, 6)),
    (0.3, 0.8, 80, range(3, 8))])  # fastai's sums of 0.1 fall short of 0.3 and 0.8
def test_masking_has_a_window(start, end, n, expected, small_net, make_learner):
    before, after = spies()
    cb = SGDropCallback(rho=0.3, start=start, end=end)
    fitted(make_learner, small_net(), [before, after, cb], epochs=1, n=n)
    assert masked_batches(before, after) == [*expected]


def test_p_is_the_share_of_masked_images(small_net, make_learner):
    before, after = spies()
    net = small_net()
    net[4].p = 0.  # dropout would change all logits
    cbs = [before, after, SGDropCallback(rho=0.3, p=0.5)]
    fitted(make_learner, net, cbs, n=256, bs=64, epochs=1)
    pairs = zip(before.preds, after.preds)
    same = torch.cat([(b - a).abs().amax(1) < 1e-6 for b, a in pairs])
    assert 0.3 < same.float().mean() < 0.7


def test_a_schedule_of_rho_is_followed(small_net, make_learner):
    cb = SGDropCallback(rho=SchedLin(0., 0.8))
    fitted(make_learner, small_net(), cb, epochs=4, n=512, bs=64)
    dropped = [row['dropped'] for row in cb.history]
    assert dropped == sorted(dropped) and dropped[0] < 0.2 < dropped[-1]


@pytest.mark.parametrize('settings, said', [
    (dict(start=0.9), 'no step was masked'),
    (dict(rho=0.2), 'rho=0.2 of 4 is less than one')])
def test_a_fit_without_a_mask_warns(settings, said, small_net, make_learner):
    with pytest.warns(NoEffectWarning, match=f'dropped nothing: .*{said}'):
        fitted(make_learner, small_net(), SGDropCallback(**settings), epochs=1, size=2)


def test_the_learning_rate_finder_does_not_warn(small_net, make_learner):
    learn = make_learner(small_net(), SGDropCallback(rho=0.3, start=0.9))
    with warnings.catch_warnings():
        warnings.simplefilter('error', SaliencyWarning)
        learn.lr_find(num_it=5, show_plot=False)
    assert same_weights(learn.model, small_net()) and not hooked(learn.model)


# What the teacher follows

class SkipsSteps(Callback):
    "Skips steps, as mixed precision does when gradients overflow"
    def before_step(self):
        if self.train_iter % 3 == 0: raise CancelStepException


@pytest.mark.parametrize('other, teacher, n', [
    (lambda: GradientAccumulation(24), 'head', 2), (SkipsSteps, 'full', 5)])
def test_the_teacher_follows_the_optimizer(other, teacher, n, small_net, make_learner):
    cb, learn = SGDropCallback(rho=0.3, teacher=teacher), make_learner(small_net())
    learn.create_opt()
    steps, step = [], learn.opt.step
    def counted():
        steps.append(1)
        step()
    learn.opt.step = counted
    learn.fit(2, cbs=[cb, other()])
    assert cb.engine.teacher.n_updates == len(steps) == n


# The loss

def loss_by_hand(net, x, y, rho, fill, clean_weight):
    "SGDrop on the predicted class, position by position, without the package"
    z = net[1](net[0](x))
    clean = net[2:](z)
    best = clean.max(1).values.sum()
    gradient, = torch.autograd.grad(best, z, retain_graph=True)
    A = (gradient * z.detach()).clamp(min=0).sum(1).flatten(1)
    top = A.topk(int(rho * A.shape[1])).indices
    keep = torch.ones_like(A).scatter(1, top, 0.).view(len(z), 1, *z.shape[2:])
    holes = (1 - keep) * (z.mean((2, 3), keepdim=True) if fill == 'mean' else 0)
    masked = net[2:](z * keep + holes)
    loss = (1 - clean_weight) * cross_entropy(masked, y)
    return loss + clean_weight * cross_entropy(clean, y)


@pytest.mark.parametrize('fill, clean_weight, accumulate', [
    ('zero', 0., None), ('mean', 0.3, None), ('zero', 0.3, 16)])
def test_gradients_are_those_of_the_blended_loss(
    fill, clean_weight, accumulate, small_net, make_learner):
    "Gradient accumulation scales the loss before SGDrop's events come"
    def net():  # without dropout, which draws for each pass by hand
        return nn.Sequential(*[m for m in small_net() if not isinstance(m, nn.Dropout)])
    seen, grads = [], []
    class Note(Callback):
        order = SGDropCallback.order + 3
        def after_backward(self):
            seen.extend((self.x.clone(), self.y.clone()))
            grads.extend(p.grad.clone() for p in self.model.parameters())
            raise CancelFitException
    cb = SGDropCallback(rho=0.3, fill=fill, clean_weight=clean_weight)
    others = [GradientAccumulation(accumulate)] if accumulate else []
    learn, hand, scale = make_learner(net()), net().train(), 8 / (accumulate or 8)
    learn.fit(1, 0., cbs=[cb, Note(), *others])
    (scale * loss_by_hand(hand, *seen, 0.3, fill, clean_weight)).backward()
    expected = [p.grad for p in hand.parameters()]
    torch.testing.assert_close(grads, expected, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize('kind', [MixUp, CutMix])
def test_both_losses_are_those_of_blended_labels(kind, small_net, make_learner):
    mix, (before, after), losses = kind(0.5), spies(), []
    def blended(cb, logits):
        theirs, ours = (cross_entropy(logits, y, reduction='none')
                        for y in (mix.yb1[0], cb.y))
        return torch.lerp(theirs, ours, mix.lam).mean().item()
    def note(self):
        masked, clean = (blended(self, spy.preds[-1]) for spy in (after, before))
        losses.append((self.loss.item(), 0.6 * masked + 0.4 * clean))
    noting = Callback(after_loss=note)
    noting.order, noting.run_valid = SGDropCallback.order + 3, False
    cb = SGDropCallback(rho=0.3, clean_weight=0.4)
    make_learner(small_net()).fit(1, cbs=[mix, before, after, noting, cb])
    assert len(losses) == 4
    for ours, expected in losses: assert ours == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize('kind', [MixUp, CutMix])
def test_the_label_of_a_blended_image_is_the_stronger(kind, small_net, make_learner):
    mix, stronger, asked = kind(1.), [], []
    def note(self):
        for l, ours, theirs in zip(mix.lam.expand(8), self.y, mix.yb1[0]):
            stronger.append(int(ours if l >= 0.5 else theirs))
    noting = Callback(before_batch=note)
    noting.order, noting.run_valid = SGDropCallback.order - 1, False
    def attribution(head, z, classes):
        asked.extend(classes.int().argmax(1).tolist())
        return z.abs()
    cb = SGDropCallback(rho=0.3, target='label', attribution=attribution)
    fitted(make_learner, small_net(), [mix, noting, cb], epochs=4)
    assert asked == stronger and len(asked) == 128


def test_several_labels_per_image_may_be_blended(small_net, make_learner):
    cb, labels = SGDropCallback(rho=0.3, target='label'), torch.rand(32, 4) < 0.4
    fitted(make_learner, small_net(), [cb, MixUp(0.5)], labels=labels.float(),
           loss_func=BCEWithLogitsLossFlat())
    assert cb.history


@pytest.mark.parametrize('place', [-1, 1])
def test_what_others_add_to_the_loss_is_not_scaled(place, small_net, make_learner):
    "As fastai's RNNRegularizer does, before SGDrop or after it"
    def penalty(self):
        self.learn.loss_grad += sum(p.square().sum() for p in self.model.parameters())
    def gradients(*others):
        grads, learn = [], make_learner(small_net(), n=8)
        def note(self): grads.extend(p.grad.clone() for p in self.model.parameters())
        cbs = [SGDropCallback(clean_weight=0.3), Callback(after_backward=note), *others]
        learn.fit(1, 0., cbs=cbs)
        return grads
    other = Callback(after_loss=penalty)
    other.order, other.run_valid = SGDropCallback.order + place, False
    added = [a - b for a, b in zip(gradients(other), gradients(), strict=True)]
    expected = [2 * p.detach() for p in small_net().parameters()]
    torch.testing.assert_close(added, expected, atol=1e-5, rtol=1e-4)


# Combinations of settings, and precision

def size(head, z, classes): return z.abs()


@pytest.mark.parametrize('teacher, granularity, attribution', [
    (None, 'spatial', 'gradcam'), (None, 'element', LayerGradientXActivation),
    ('head', 'channel', 'grad_x_act'), ('head', 'spatial', size),
    ('full', 'channel', LayerGradientXActivation), ('full', 'element', size)])
def test_settings_combine(teacher, granularity, attribution, small_net, make_learner):
    cb = SGDropCallback(
        rho=0.3, teacher=teacher, granularity=granularity, attribution=attribution)
    net = fitted(make_learner, small_net(), cb, epochs=1).model
    row, = cb.history
    assert 0 < row['dropped'] <= 0.3 and 0 <= row['kept'] < 1
    assert 0 < row['images'] <= 32
    assert finite(net) and not hooked(net) and not same_weights(net, small_net())


def test_a_head_may_have_no_weights(make_learner):
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1),
                        nn.AdaptiveAvgPool2d(1), nn.Flatten())
    cb = SGDropCallback(rho=0.3, teacher='head')
    fitted(make_learner, net, cb, epochs=1)
    assert cb.history


def test_a_network_that_cannot_be_cut_trains(make_learner):
    settings = dict(teacher='full', layer='layer4.1.conv1', granularity='element')
    cb = SGDropCallback(rho=0.1, **settings)
    learn = make_learner(build('resnet18'), n=8, bs=4, size=64, classes=10)
    said = 'cannot be cut.*runs the whole network twice'
    with pytest.warns(SaliencyWarning, match=said): learn.fit(1, cbs=cb)
    assert cb.history and finite(learn.model) and not hooked(learn.model)
    assert batches_counted(learn.model) == [2] * 20


def test_a_network_in_bfloat16_trains(small_net, make_learner):
    class ToHalf(Callback):
        "What NonNativeMixedPrecision does on a GPU"
        order = 10
        def before_batch(self): self.learn.xb = tuple(x.bfloat16() for x in self.xb)
        def after_pred(self): self.learn.pred = self.pred.float()
    cb = SGDropCallback(rho=0.3, teacher='full')
    assert finite(fitted(make_learner, small_net().bfloat16(), [ToHalf(), cb]).model)
    assert cb.history


def test_autocast_leaves_float32_logits_and_all_gradients(small_net, make_learner):
    "Also in the first batch, of which SGDrop makes its engine"
    missing = []
    def note(self): missing.extend(p for p in self.model.parameters() if p.grad is None)
    cb, (before, after) = SGDropCallback(rho=0.3), spies()
    cbs = [BFloat16(), before, after, cb, Callback(after_backward=note)]
    learn = fitted(make_learner, small_net(), cbs, epochs=1)
    assert masked_batches(before, after) and not missing
    assert all(p.dtype == torch.float32 for p in after.preds)
    assert cb.history and finite(learn.model)


# Saving and copying

def named_learner(net, path, cb):
    "A learner that can be exported"
    x, y = images(32, 8), torch.arange(32) % 4
    tfms = [[lambda i: TensorImage(x[i])],
            [lambda i: str(y[i].item()), Categorize(['0', '1', '2', '3'])]]
    items = Datasets(range(32), tfms, splits=[range(24), range(24, 32)])
    return Learner(items.dataloaders(bs=8, device='cpu', num_workers=0), net, path=path,
                   loss_func=CrossEntropyLossFlat(), opt_func=SGD, cbs=cb)


@pytest.mark.parametrize('epochs, layer', [(0, None), (2, 0)])
def test_an_exported_learner_predicts_and_trains(epochs, layer, small_net, tmp_path):
    net = small_net()
    settings = dict(teacher='full', granularity='element', p=0.7, target='label')
    layer = None if layer is None else net[layer]  # the module itself
    learn = named_learner(net, tmp_path, SGDropCallback(0.4, layer=layer, **settings))
    if epochs: learn.fit(epochs)
    learn.export()
    loaded = load_learner(tmp_path / 'export.pkl')
    assert same_weights(loaded.model, net)
    cb, = [cb for cb in loaded.cbs if isinstance(cb, SGDropCallback)]
    assert cb.engine is None
    assert cb.rho == 0.4 and settings.items() <= cb.settings.items()
    image = images(1, 8, seed=3)[0]
    expected = net.eval()(image[None]).softmax(1)[0]
    assert loaded.predict(TensorImage(image))[2].allclose(expected, atol=1e-6)
    loaded.dls = learn.dls
    loaded.fit(1)
    assert cb.history and not same_weights(loaded.model, net)
    assert not hooked(loaded.model)


def test_an_export_has_no_second_network(small_net, tmp_path):
    def size(cb):
        wide = nn.Linear(8, 5000), nn.Linear(5000, 4)
        learn = named_learner(nn.Sequential(*small_net()[:-1], *wide), tmp_path, cb)
        learn.fit(1)
        learn.export()
        return (tmp_path / 'export.pkl').stat().st_size
    assert size(SGDropCallback(rho=0.3, teacher='full')) < size(None) + 20_000


def test_a_copy_of_the_callback_does_the_same(small_net, make_learner):
    cb = SGDropCallback(rho=0.3, p=0.5, teacher='head', granularity='element')
    first = fitted(make_learner, small_net(), cb).model
    twin = copy.deepcopy(cb)
    assert same_weights(fitted(make_learner, small_net(), twin).model, first)


def test_a_copied_learner_trains_by_itself(small_net, make_learner):
    learn = fitted(make_learner, small_net(), None, cbs=SGDropCallback(layer='1'))
    twin, before = copy.deepcopy(learn), copy.deepcopy(learn.model)
    twin.fit(1)
    assert same_weights(learn.model, before) and not same_weights(twin.model, before)


def test_saved_weights_load_without_the_callback(small_net, make_learner):
    learn = fitted(make_learner, small_net(), SGDropCallback(rho=0.3), epochs=1)
    learn.save('weights')
    other = make_learner(small_net())
    other.load('weights')
    assert same_weights(other.model, learn.model)
