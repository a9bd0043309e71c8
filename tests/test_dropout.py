"`SGDrop` in a plain loop, and its two adapters."
import io
import subprocess
import sys
from functools import partial
from itertools import combinations

import pytest
import torch
from captum.attr import LayerGradientXActivation
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader as FastaiLoader
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from fastai.optimizer import OptimWrapper
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.nn.functional import cross_entropy

from networks import (Compares, Recomputed, build, hooked, images, relative_gap,
                      same_weights, small_network)
from sgdrop.attribution import random_attribution
from sgdrop.callback import SGDropCallback
from sgdrop.dropout import SGDrop
from sgdrop.mask import SaliencyWarning

BATCHES = [(images(8, 8, seed), torch.arange(8) % 4) for seed in range(6)]
X, Y = BATCHES[0]


def net():
    "The small network without dropout, whose random numbers loaders would change"
    return nn.Sequential(*[m for m in small_network() if not isinstance(m, nn.Dropout)])


def step(sgdrop, x=X, y=Y):
    "Do a training step, but for the optimizer's"
    masked, clean = sgdrop(x, y=y)
    sgdrop.loss(cross_entropy, masked, clean, y).backward()
    sgdrop.step()


def train(sgdrop, batches=BATCHES):
    opt = torch.optim.SGD(sgdrop.model.parameters(), 0.05)
    for x, y in batches:
        masked, clean = sgdrop(x, y=y)
        loss = sgdrop.loss(cross_entropy, masked, clean, y)
        opt.zero_grad()
        loss.backward()
        opt.step()
        sgdrop.step()
    return sgdrop.model


def test_evaluation_is_one_pass_without_a_mask():
    model, passes = net().eval(), []
    model.register_forward_hook(lambda *_: passes.append(1))
    sgdrop = SGDrop(model, X)
    passes.clear()
    masked, clean = sgdrop(X)
    assert masked is clean and len(passes) == 1
    assert sgdrop.loss(cross_entropy, masked, clean, Y) == cross_entropy(clean, Y)


# A step does not wait for the device

def to_fake(mode, sgdrop):
    "Replace the tensors that a step needs by tensors without values"
    for module in (sgdrop.model, sgdrop.teacher or nn.Identity()):
        for m in module.modules():
            for k, v in m._parameters.items():
                fake = mode.from_tensor(v.data)
                m._parameters[k] = nn.Parameter(fake, v.requires_grad)
            for k, v in m._buffers.items(): m._buffers[k] = mode.from_tensor(v)
    sgdrop.monitor.sums = mode.from_tensor(sgdrop.monitor.sums)


def fake_step(**settings):
    "Do a first step, in which labels may be checked, and one without values"
    sgdrop, mode = SGDrop(small_network(), X, **settings), FakeTensorMode()
    step(sgdrop)
    sgdrop.model.zero_grad()
    to_fake(mode, sgdrop)
    with mode: step(sgdrop, mode.from_tensor(X), mode.from_tensor(Y))


@pytest.mark.parametrize('settings', [
    {}, dict(target='label', p=0.5), dict(teacher='head', target='label'),
    dict(teacher='full', p=0.5), dict(rounds=2)])
def test_a_step_reads_no_value(settings): fake_step(**settings)


def test_a_step_that_reads_a_value_is_found():
    def reads(z, M): return z * M.float().mean().item()
    with pytest.raises(DataDependentOutputException): fake_step(fill=reads)


# Rounds

def masks(cut=True, **settings):
    sgdrop, steps = SGDrop(net().train(), X, **settings), []
    if not cut: sgdrop.heads = []
    sgdrop.observers.append(steps.append)
    step(sgdrop)
    return steps[0].Ms


@pytest.mark.parametrize('settings', [
    {}, dict(teacher='full'), dict(teacher='head'),
    dict(attribution=LayerGradientXActivation)])
def test_each_round_drops_a_share_of_what_is_left(settings):
    one, two, three = (masks(rho=0.5, rounds=n, **settings)[0].flatten(1)
                       for n in (1, 2, 3))
    n = one.shape[1]
    for M, share in ((one, 1 / 2), (two, 3 / 4), (three, 7 / 8)):
        assert (~M).sum(1).le(share * n).all() and (~M).sum(1).max() > 0
    assert not (two & ~one).any() and not (three & ~two).any() and not two.equal(one)


def test_several_layers_have_rounds_of_their_own():
    cut = masks(layer=['0', '1'], rounds=2)
    for once, twice in zip(masks(layer=['0', '1']), cut):
        assert not (twice & ~once).any() and not twice.equal(once)


def test_rounds_without_a_cut_are_those_with_one():
    assert masks(rounds=2)[0].equal(masks(rounds=2, cut=False)[0])


# The loop, fastai and Lightning train the same weights

SETTINGS = dict(
    defaults={}, two_layers=dict(layer=['0', '1'], teacher='head', clean_weight=0.),
    early_layer=dict(layer='0', p=0.5), full=dict(teacher='full'),
    label=dict(target='label', granularity='element', fill='zero'),
    rounds=dict(rounds=3, rho=0.3))
ITEMS = [(image, label) for x, y in BATCHES for image, label in zip(x, y)]


def by_fastai(**settings):
    dls = DataLoaders(*(FastaiLoader(ITEMS, bs=8) for _ in range(2)), device='cpu')
    sgd = partial(OptimWrapper, opt=torch.optim.SGD)
    learn = Learner(dls, net(), loss_func=CrossEntropyLossFlat(), opt_func=sgd)
    torch.manual_seed(7)
    with learn.no_bar(), learn.no_logging():
        learn.fit(1, 0.05, cbs=SGDropCallback(**settings))
    return learn.model


def lightning_module():
    import lightning

    class Classifier(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = net()

        def configure_optimizers(self):
            return torch.optim.SGD(self.net.parameters(), 0.05)

        def training_step(self, batch, _):
            x, y = batch
            masked, clean = self.sgdrop(x, y=y)
            return self.sgdrop.loss(cross_entropy, masked, clean, y)
    return Classifier()


def by_lightning(*callbacks, items=ITEMS, epochs=1):
    from lightning import Trainer
    module = lightning_module()
    torch.manual_seed(7)
    trainer = Trainer(
        max_epochs=epochs, callbacks=list(callbacks), accelerator='cpu', logger=False,
        enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False)
    trainer.fit(module, torch.utils.data.DataLoader(items, 8))
    return module.net


@pytest.fixture
def lightning_callback():
    pytest.importorskip('lightning')
    from sgdrop.lightning import SGDropLightning
    return SGDropLightning


def by_hand(**settings):
    model = net()
    torch.manual_seed(7)  # the engine's own random numbers start from it
    return train(SGDrop(model, X, **settings))


@pytest.mark.parametrize('name', SETTINGS)
def test_fastai_trains_as_the_loop(name):
    ours = by_hand(**SETTINGS[name])
    assert same_weights(ours, by_fastai(**SETTINGS[name]))
    assert not same_weights(ours, by_hand(rho=0.))


@pytest.mark.filterwarnings('ignore::UserWarning:lightning')
@pytest.mark.parametrize('name', ['two_layers', 'full'])
def test_lightning_trains_as_the_loop(name, lightning_callback):
    model = by_lightning(lightning_callback(**SETTINGS[name]))
    assert same_weights(by_hand(**SETTINGS[name]), model)


class Stream(torch.utils.data.IterableDataset):
    "Items without a length"
    def __iter__(self): return iter(ITEMS)


@pytest.mark.filterwarnings('ignore::UserWarning:lightning')
@pytest.mark.parametrize('items, accumulate', [(Stream(), {}), (ITEMS, {0: 1, 1: 2})],
                         ids=['a stream', 'accumulation'])
def test_lightning_masks_to_the_end_of_a_fit(items, accumulate, lightning_callback):
    from lightning.pytorch import callbacks
    cb, shares = lightning_callback(), []
    def note(*args): shares.append(cb.engine.rho)
    others = [callbacks.LambdaCallback(on_train_batch_end=note)]
    if accumulate: others.append(callbacks.GradientAccumulationScheduler(accumulate))
    by_lightning(cb, *others, items=items, epochs=2)
    assert shares == [0.5] * 2 * (len(ITEMS) // 8)


class ReturnsNothing(nn.Module):
    "Its `train` is overridden, as to freeze BatchNorm, and returns nothing"
    def __init__(self):
        super().__init__()
        self.net = net()

    def forward(self, x): return self.net(x)
    def train(self, mode=True): super().train(mode)


@pytest.mark.parametrize('teacher', [None, 'head', 'full'])
def test_train_of_a_network_may_return_nothing(teacher):
    sgdrop = SGDrop(ReturnsNothing(), X, teacher=teacher)
    assert sgdrop.heads
    step(sgdrop)


def test_only_the_adapters_need_their_framework(lightning_callback):
    for names, absent in [
        ('dropout monitor teacher split mask attribution', 'fastai fastcore lightning'),
        ('lightning', 'fastai fastcore'),
    ]:
        imports = ', '.join(f'sgdrop.{name}' for name in names.split())
        code = (f'import sys, {imports}; '
                f'print([n for n in {absent.split()} if n in sys.modules])')
        python = [sys.executable, '-c', code]
        done = subprocess.run(python, capture_output=True, text=True)
        assert done.stdout == '[]\n', done.stderr + done.stdout


# Save and resume

def reloaded(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def test_a_resumed_loop_ends_as_an_uninterrupted_one():
    settings = dict(teacher='full', p=0.5)
    whole = SGDrop(net(), X, **settings)
    train(whole)
    whole.monitor.report()
    first = SGDrop(net(), X, **settings)
    train(first, BATCHES[:3])
    first.monitor.report()
    weights, state = reloaded([first.model.state_dict(), first.state_dict()])
    model = net()
    model.load_state_dict(weights)
    torch.manual_seed(5)  # as in another process
    second = SGDrop(model, X, **settings)
    second.load_state_dict(state)
    train(second, BATCHES[3:])
    second.monitor.report()
    assert same_weights(whole.model, model)
    assert same_weights(whole.teacher.module, second.teacher.module)
    assert second.monitor.totals == pytest.approx(whole.monitor.totals)


def test_adapters_keep_a_loaded_state_until_the_first_step(lightning_callback):
    state = SGDrop(net(), X, teacher='head').state_dict()
    for cb in (SGDropCallback(teacher='head'), lightning_callback(teacher='head')):
        cb.load_state_dict(state)
        assert cb.state_dict() is state


# Networks that run in another way

def as_usual():
    "The small network with GroupNorm: a BatchNorm counts a batch that is recomputed"
    model = small_network()
    for block in model[:2]: block[1] = nn.GroupNorm(2, 8)
    return model


def body_recomputed():
    a, b, *rest = as_usual()
    return nn.Sequential(a, Recomputed(b), *rest)


def head_recomputed(): return nn.Sequential(*as_usual()[:2], Recomputed(as_usual()[2:]))
def compiled(): return torch.compile(as_usual(), backend='eager')


@pytest.mark.parametrize('make, teacher', [
    (body_recomputed, 'full'), (head_recomputed, None), (compiled, 'head')])
def test_checkpoints_and_compilation_do_not_change_training(make, teacher):
    def weights(model):
        torch.manual_seed(0)
        return list(train(SGDrop(model, X, teacher=teacher)).parameters())
    torch.testing.assert_close(weights(make()), weights(as_usual()))


def layer_in_a_checkpoint():
    first, *rest = small_network()
    return nn.Sequential(first, Recomputed(nn.Sequential(*rest), reentrant=True))


def head_in_a_checkpoint():
    head = Recomputed(small_network()[2:], reentrant=True)
    return nn.Sequential(*small_network()[:2], head)


@pytest.mark.filterwarnings('ignore:None of the inputs have requires_grad')
@pytest.mark.parametrize('make, layer, teacher', [
    (layer_in_a_checkpoint, '1.part.0', 'full'), (head_in_a_checkpoint, None, None)])
def test_a_reentrant_checkpoint_is_refused(make, layer, teacher):
    model = make()
    sgdrop = SGDrop(model, X, layer=layer, teacher=teacher)
    with pytest.raises(RuntimeError, match='use_reentrant=False'): step(sgdrop)
    assert not hooked(model)


def test_attribution_without_a_cut_is_that_of_captum():
    model, layer, seen = build('resnet18').eval(), 'layer4.1.conv1', []
    model.training = True  # of the network alone: BatchNorm is as captum finds it
    x, y = images(3, 64), torch.tensor([3, 0, 7])
    with pytest.warns(SaliencyWarning, match='runs the whole network twice'):
        sgdrop = SGDrop(model, x, layer=layer, target='label', granularity='element')
    sgdrop.observers.append(lambda step: seen.append(step))
    masked, clean = sgdrop(x, y=y)
    for m in model.modules():
        if isinstance(m, nn.ReLU): m.inplace = False  # captum reads the map later
    captum = LayerGradientXActivation(model, model.get_submodule(layer))
    theirs = captum.attribute(x, target=y).clamp(min=0)
    assert relative_gap(seen[0].As[0], theirs) < 1e-5
    assert clean.allclose(model(x), atol=1e-5) and not clean.allclose(masked, atol=1e-3)


def test_of_two_runs_the_last_is_masked():
    model, (a, b) = Compares(), (images(4, 8), images(4, 8, 1))
    with pytest.warns(SaliencyWarning, match='cannot be cut'):
        sgdrop = SGDrop(model, a, b, fill=lambda z, M: torch.zeros_like(z))
    masked, clean = sgdrop(a, b)
    first = model.encoder(a).relu().mean((2, 3))
    assert masked.allclose(model.fc(torch.cat([first, torch.zeros(4, 8)], 1)))
    assert clean.equal(model(a, b))


# What is refused, with what was found, what was expected and what to do

class Spare(nn.Module):
    "A network with a layer that runs only in evaluation"
    def __init__(self):
        super().__init__()
        self.spare, self.rest = nn.Conv2d(3, 3, 1), net()

    def forward(self, x):
        return self.rest(x if self.training else self.spare(x))


class InHalves(nn.Sequential):
    "Runs the halves of a batch apart, as `nn.DataParallel` does"
    def forward(self, x):
        return torch.cat([super(InHalves, self).forward(half) for half in x.chunk(2)])


def fully_convolutional(): return nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1))
def regression(): return nn.Sequential(*net()[:-1], nn.Linear(8, 1))
def in_halves(): return InHalves(*net())
def reused():
    twice = nn.Conv2d(8, 8, 1)
    return nn.Sequential(net()[0], twice, twice, *net()[1:])


@pytest.mark.parametrize('make, settings, said', [
    (net, dict(rho=30), r'rho must be in \[0, 1\), got 30; did you mean 0.3'),
    (net, dict(ema=1), r'ema must be in \[0, 1\), got 1'),
    (net, dict(clean_weight=1), r'clean_weight must be in \[0, 1\), got 1'),
    (net, dict(p=1.5), r'p must be in \[0, 1\], got 1.5'),
    (net, dict(fill='other'), "fill must be one of .*'swap'.*got 'other'"),
    (net, dict(teacher='ema'), "teacher must be one of 'full', .*; got 'ema'"),
    (net, dict(granularity='pixel'), "granularity must be one of 'element', 'spatial'"),
    (net, dict(attribution='cam'), "attribution must be one of .*'gradcam'.*got 'cam'"),
])
def test_a_wrong_setting_is_refused(make, settings, said):
    with pytest.raises(ValueError, match=said): SGDrop(make(), X, **settings)


@pytest.mark.filterwarnings('ignore:.*cannot be cut')
@pytest.mark.parametrize('make, settings, y, error, said', [
    (Spare, dict(layer='spare'), Y, RuntimeError,
     "'spare' ran in evaluation but not in training, .*choose another layer"),
    (in_halves, dict(layer='1'), Y, RuntimeError,
     'returned 4 feature maps for 8 images; .* DistributedDataParallel'),
    (reused, dict(layer=['0', '1']), Y, RuntimeError, 'several times .* name it alone'),
    (fully_convolutional, {}, Y, ValueError, r'returned \(8, 4, 6, 6\); .* B×K'),
    (regression, {}, Y, ValueError, r'returned \(8, 1\); expected .* B×K.*regression'),
    (net, dict(target='label'), None, ValueError, 'cannot use these labels.*got None'),
    (net, dict(target='label'), Y + 1, ValueError, 'cannot use .* 4.* 0 to 3'),
    (net, dict(target='label'), torch.randn(8, 4), ValueError, 'regression targets'),
    (net, dict(granularity='channel', attribution='gradcam'), Y, ValueError,
     "needs an attribution with channels.*use 'spatial'"),
])
def test_a_wrong_step_is_refused(make, settings, y, error, said):
    model = make().train()
    sgdrop = SGDrop(model, X, **settings)
    with pytest.raises(error, match=said): sgdrop(X, y=y)
    assert not hooked(model)


@pytest.mark.parametrize('settings', [
    dict(teacher='head'), dict(attribution=LayerGradientXActivation)])
def test_settings_that_need_a_head_are_refused_without_one(settings):
    said = "cannot be cut after 'encoder'.*teacher=None or 'full'.*'grad_x_act'"
    with pytest.raises(ValueError, match=said): SGDrop(Compares(), X, X, **settings)


def test_an_old_name_is_refused_with_the_new_one(lightning_callback):
    for callback in (SGDropCallback, lightning_callback):
        for old, new in dict(share='p', unmasked='clean_weight').items():
            said = f"no setting '{old}'; it is now '{new}'"
            with pytest.raises(TypeError, match=said): callback(**{old: 0.5})
        with pytest.raises(TypeError, match="no setting 'noise'; it has .*'fill'"):
            callback(noise=1)


def test_inputs_must_be_tensors():
    with pytest.raises(TypeError, match='input 0 of the network is a list'):
        SGDrop(net(), [X])


@pytest.mark.parametrize('saved, here', [('full', None), (None, 'full')])
def test_a_state_with_another_teacher_is_refused(saved, here, lightning_callback):
    state = SGDrop(net(), X, teacher=saved).state_dict()
    words = {'full': 'with', None: 'without'}
    said = (f'saved {words[saved]} a teacher, and this training is {words[here]} one; '
            'use the same settings')
    for loads in (SGDrop(net(), X, teacher=here), SGDropCallback(teacher=here),
                  lightning_callback(teacher=here)):
        with pytest.raises(ValueError, match=said): loads.load_state_dict(state)


@pytest.mark.filterwarnings('ignore::UserWarning:lightning')
def test_lightning_refuses_two_callbacks(lightning_callback):
    with pytest.raises(RuntimeError, match='more than one stateful callback'):
        by_lightning(lightning_callback(), lightning_callback(rho=0.3))


def test_random_masks_differ_from_step_to_step_and_draw_nothing_outside():
    sgdrop, found = SGDrop(net(), X, attribution=random_attribution), []
    sgdrop.observers.append(lambda step: found.append(step.Ms[0]))
    before = torch.get_rng_state()
    for _ in range(3): step(sgdrop)
    assert before.equal(torch.get_rng_state())
    assert not any(a.equal(b) for a, b in combinations(found, 2))


def test_targets_that_are_not_classes_stay_without_labels():
    sgdrop, found = SGDrop(net(), X), []
    sgdrop.observers.append(lambda step: found.append(step.labels))
    with pytest.warns(SaliencyWarning, match='labels are not class targets'):
        sgdrop(X, y=torch.full((8,), -100))
    sgdrop(X, y=Y)
    assert found == [None, None]


def test_a_network_compiled_in_place_and_run_before_has_its_layer_found():
    model = net()
    model.compile(backend='eager')
    with torch.no_grad(): model.eval()(X[:2])  # the search runs two images, too
    assert SGDrop(model.train(), X).layers == SGDrop(net(), X).layers


def test_a_lightning_training_without_steps_ends(lightning_callback):
    lightning_callback().on_train_end(None, None)  # as after a resumed, finished one
