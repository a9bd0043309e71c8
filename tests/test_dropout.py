"`SGDrop` in a plain loop, its two adapters beside it, and what all three refuse."
import io
import subprocess
import sys
from functools import partial

import pytest
import torch
from captum.attr import LayerGradientXActivation
from fastai.callback.core import Callback
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader as FastaiLoader
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from fastai.optimizer import OptimWrapper
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.nn.functional import cross_entropy
from torchvision.models.resnet import BasicBlock

from networks import (Compares, Recomputed, build, hooked, images, relative_gap,
                      same_weights, small_network)
from sgdrop.callback import SGDropCallback
from sgdrop.dropout import SGDrop
from sgdrop.mask import SaliencyWarning

BATCHES = [(images(8, 8, seed), torch.arange(8) % 4) for seed in range(6)]
X, Y = BATCHES[0]
STEPS = pytest.mark.parametrize('teacher', [None, 'head', 'full'])


def net():
    "Without dropout, which draws from the random state that loaders draw from, too"
    return nn.Sequential(*[m for m in small_network() if not isinstance(m, nn.Dropout)])


def step(sgdrop, x=X, y=Y):
    "A training step, but for the optimizer's"
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


def test_in_evaluation_there_is_one_pass_without_a_mask():
    model, passes = net().eval(), []
    model.register_forward_hook(lambda *_: passes.append(1))
    sgdrop = SGDrop(model, X)
    passes.clear()
    masked, clean = sgdrop(X)
    assert masked is clean and len(passes) == 1
    assert sgdrop.loss(cross_entropy, masked, clean, Y) == cross_entropy(clean, Y)


# A step waits for no value on the device

def to_fake(mode, sgdrop):
    "Give everything that a step needs the shape of a tensor and no values"
    for module in (sgdrop.model, sgdrop.teacher or nn.Identity()):
        for m in module.modules():
            for k, v in m._parameters.items():
                fake = mode.from_tensor(v.data)
                m._parameters[k] = nn.Parameter(fake, v.requires_grad)
            for k, v in m._buffers.items(): m._buffers[k] = mode.from_tensor(v)
    sgdrop.monitor.sums = mode.from_tensor(sgdrop.monitor.sums)


def fake_step(**settings):
    "A step as it is, in which labels may be checked, and one without values"
    sgdrop, mode = SGDrop(small_network(), X, **settings), FakeTensorMode()
    step(sgdrop)
    sgdrop.model.zero_grad()
    to_fake(mode, sgdrop)
    with mode: step(sgdrop, mode.from_tensor(X), mode.from_tensor(Y))


@STEPS
@pytest.mark.parametrize('target', ['predicted', 'label'])
@pytest.mark.parametrize('p', [1., 0.5])
def test_a_step_reads_no_value(teacher, target, p):
    fake_step(teacher=teacher, target=target, p=p)


def test_a_step_that_reads_a_value_is_found():
    def reads(z, M): return z * M.float().mean().item()
    with pytest.raises(DataDependentOutputException): fake_step(fill=reads)


# The loop, fastai and Lightning do the same

SETTINGS = dict(
    defaults={}, two_layers=dict(layer=['0', '1']), early_layer=dict(layer='0'),
    half=dict(p=0.5), label=dict(target='label'), head=dict(teacher='head'),
    full=dict(teacher='full'), zero=dict(granularity='element', fill='zero'),
    masked_only=dict(clean_weight=0.))
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


def by_lightning(*callbacks, **kwargs):
    from lightning import Trainer
    module = lightning_module()
    torch.manual_seed(7)
    trainer = Trainer(
        max_epochs=1, callbacks=list(callbacks), accelerator='cpu', logger=False,
        enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False)
    trainer.fit(module, torch.utils.data.DataLoader(ITEMS, 8), **kwargs)
    return module.net, trainer


@pytest.fixture
def lightning_callback():
    pytest.importorskip('lightning')
    from sgdrop.lightning import SGDropLightning
    return SGDropLightning


def by_hand(**settings):
    model = net()
    torch.manual_seed(7)  # from which the engine's own random numbers start
    return train(SGDrop(model, X, **settings))


def plain():
    model = net()
    return train(SGDrop(model, X, rho=0.))


@pytest.mark.parametrize('name', SETTINGS)
def test_fastai_ends_where_the_loop_ends(name):
    ours = by_hand(**SETTINGS[name])
    assert same_weights(ours, by_fastai(**SETTINGS[name]))
    assert not same_weights(ours, plain())


@pytest.mark.filterwarnings('ignore::UserWarning:lightning')
@pytest.mark.parametrize('name', SETTINGS)
def test_lightning_ends_where_the_loop_ends(name, lightning_callback):
    model, _ = by_lightning(lightning_callback(**SETTINGS[name]))
    assert same_weights(by_hand(**SETTINGS[name]), model)


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


# A training that is resumed

def reloaded(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def test_a_resumed_loop_ends_where_an_uninterrupted_one_ends():
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
    torch.manual_seed(5)  # in another process
    second = SGDrop(model, X, **settings)
    second.load_state_dict(state)
    train(second, BATCHES[3:])
    second.monitor.report()
    assert same_weights(whole.model, model)
    assert same_weights(whole.teacher.module, second.teacher.module)
    assert second.monitor.totals == pytest.approx(whole.monitor.totals)
    for forgotten in ('teacher', 'rng'):  # all of it is needed
        model.load_state_dict(weights)
        third = SGDrop(model, X, **settings)
        part = reloaded(third.state_dict())[forgotten]
        third.load_state_dict(state | {forgotten: part})
        train(third, BATCHES[3:])
        assert not same_weights(whole.model, model)


def test_a_state_may_be_saved_again_before_the_first_step(lightning_callback):
    state = SGDrop(net(), X, teacher='head').state_dict()
    for cb in (SGDropCallback(teacher='head'), lightning_callback(teacher='head')):
        cb.load_state_dict(state)
        assert cb.state_dict() is state


# Networks that run in another way

def as_usual():
    "Without BatchNorm, which counts a batch again when it is recomputed"
    model = small_network()
    for block in model[:2]: block[1] = nn.GroupNorm(2, 8)
    return model


def body_recomputed():
    a, b, *rest = as_usual()
    return nn.Sequential(a, Recomputed(b), *rest)


def head_recomputed(): return nn.Sequential(*as_usual()[:2], Recomputed(as_usual()[2:]))
def compiled(): return torch.compile(as_usual(), backend='eager')


@STEPS
@pytest.mark.parametrize('make', [body_recomputed, head_recomputed, compiled])
def test_a_network_that_runs_in_another_way_learns_the_same(make, teacher):
    def weights(model):
        torch.manual_seed(0)
        return list(train(SGDrop(model, X, teacher=teacher)).parameters())
    torch.testing.assert_close(weights(make()), weights(as_usual()))


def hides_the_layer():
    first, *rest = small_network()
    return nn.Sequential(first, Recomputed(nn.Sequential(*rest), reentrant=True))


@pytest.mark.filterwarnings('ignore:None of the inputs have requires_grad')
def test_a_reentrant_checkpoint_is_refused():
    model = hides_the_layer()
    sgdrop = SGDrop(model, X, layer='1.part.0')
    with pytest.raises(RuntimeError, match='use_reentrant=False'): step(sgdrop)
    assert not hooked(model)


def test_attribution_where_no_cut_is_possible_is_that_of_captum():
    model, layer, seen = build('resnet18').eval(), 'layer4.1.conv1', []
    model.training = True  # of the network alone, so BatchNorm is as captum meets it
    x, y = images(3, 64), torch.tensor([3, 0, 7])
    with pytest.warns(SaliencyWarning, match='runs the whole network twice'):
        sgdrop = SGDrop(model, x, layer=layer, target='label', granularity='element')
    sgdrop.observers.append(lambda step: seen.append(step))
    masked, clean = sgdrop(x, y=y)
    for m in model.modules():
        if isinstance(m, nn.ReLU): m.inplace = False  # captum looks at the map later
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


# In fastai: an error before the network runs, and a loss that others add to

def fails_at(i, error):
    "Raises an error between the moment at which SGDrop arms and the network's call"
    def fail(self):
        if self.train_iter == i: raise error
    failing = Callback(before_batch=fail)
    failing.order, failing.run_valid = SGDropCallback.order + 1, False
    return failing


@pytest.mark.parametrize('error', [RuntimeError('no'), KeyboardInterrupt()])
@pytest.mark.parametrize('attached', [True, False])
def test_an_error_after_arming_leaves_a_whole_network(attached, error, make_learner):
    cb = SGDropCallback(teacher='full')
    learn = make_learner(net(), [cb] if attached else [])
    loss_func, x = learn.loss_func, images(2, 8, seed=3)
    with pytest.raises(type(error)):
        learn.fit(1, cbs=[fails_at(2, error)] + ([] if attached else [cb]))
    assert (cb in learn.cbs) == attached
    bare = net()
    bare.load_state_dict(learn.model.state_dict())
    assert learn.model.train()(x).equal(bare.train()(x))
    assert learn.model.eval()(x).equal(bare.eval()(x))
    assert same_weights(learn.model, bare)
    assert not hooked(learn.model) and 'forward' not in vars(learn.model)
    assert learn.loss_func is loss_func


class Penalty(Callback):
    "Adds to the loss, as fastai's RNNRegularizer does"
    run_valid = False
    def __init__(self, order): self.order = order
    def after_loss(self):
        self.learn.loss_grad += sum(p.square().sum() for p in self.model.parameters())


@pytest.mark.parametrize('beside', [-1, 1])
def test_what_others_add_to_the_loss_is_not_scaled(beside, make_learner):
    def gradients(*others):
        grads, learn = [], make_learner(net(), n=8)
        def note(self): grads.extend(p.grad.clone() for p in self.model.parameters())
        learn.fit(1, 0., cbs=[SGDropCallback(clean_weight=0.3), *others,
                              Callback(after_backward=note)])
        return grads
    penalty = Penalty(SGDropCallback.order + beside)
    added = [a - b for a, b in zip(gradients(penalty), gradients(), strict=True)]
    by_hand = [2 * p.detach() for p in net().parameters()]
    torch.testing.assert_close(added, by_hand, atol=1e-5, rtol=1e-4)


# What is refused, with what was found, what was expected and what to do

class Spare(nn.Module):
    "A layer that runs only in evaluation, or never"
    def __init__(self, never=False):
        super().__init__()
        self.never, self.spare, self.rest = never, nn.Conv2d(3, 3, 1), net()

    def forward(self, x):
        return self.rest(x if self.never or self.training else self.spare(x))


def with_block(): return nn.Sequential(nn.Conv2d(3, 8, 3), BasicBlock(8, 8), *net()[2:])
def fully_convolutional(): return nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1))


@pytest.mark.parametrize('make, settings, said', [
    (net, dict(layer='10'), "no layer '10'; the nearest names are .*'1'"),
    (with_block, dict(layer=['1', '1.conv2']),
     "'1' and '1.conv2' overlap; name layers that follow one another"),
    (net, dict(layer=[]), 'empty list; name at least one layer, or give None'),
    (net, dict(layer='3'),
     r"'3' puts out a tensor of shape \(2, 8\).*needs a feature map.* last .*is '1'"),
    (partial(Spare, True), dict(layer='spare'),
     "'spare' puts out no tensor, or does not run; .*feature map.* last .*is 'rest.1'"),
    (net, dict(rho=1), r'rho must lie in \[0, 1\), got 1'),
    (net, dict(rho=30), r'rho must lie in \[0, 1\), got 30; did you mean 0.3'),
    (net, dict(ema=1), r'ema must lie in \[0, 1\), got 1'),
    (net, dict(clean_weight=1), r'clean_weight must lie in \[0, 1\), got 1'),
    (net, dict(p=1.5), r'p must lie in \[0, 1\], got 1.5'),
    (net, dict(fill='other'), "fill must be one of .*'swap'.*got 'other'"),
    (net, dict(teacher='ema'), "teacher must be one of 'full', .*; got 'ema'"),
    (net, dict(attribution='cam'), "attribution must be one of .*'gradcam'.*got 'cam'"),
])
def test_what_an_engine_cannot_be_made_of_is_refused(make, settings, said):
    with pytest.raises(ValueError, match=said): SGDrop(make(), X, **settings)


@pytest.mark.filterwarnings('ignore:.*cannot be cut')
@pytest.mark.parametrize('make, settings, y, error, said', [
    (Spare, dict(layer='spare'), Y, RuntimeError,
     "'spare' ran in evaluation but not in training, .*choose another layer"),
    (fully_convolutional, {}, Y, ValueError,
     r'expected class scores of shape B×K .* returned .*\(8, 4, 6, 6\)'),
    (net, dict(target='label'), None, ValueError, 'cannot use these labels.*got None'),
    (net, dict(target='label'), Y + 1, ValueError, 'class 4; .* scores classes 0 to 3'),
    (net, dict(target='label'), torch.randn(8), ValueError, '8 class numbers.*; got .a'),
    (net, dict(target='label'), torch.randn(8, 4), ValueError, 'regression targets'),
    (net, dict(granularity='channel', attribution='gradcam'), Y, ValueError,
     "needs an attribution with channels.*use 'spatial'"),
])
def test_what_a_step_cannot_be_made_of_is_refused(make, settings, y, error, said):
    model = make().train()
    sgdrop = SGDrop(model, X, **settings)
    with pytest.raises(error, match=said): sgdrop(X, y=y)
    assert not hooked(model)


@pytest.mark.parametrize('settings', [
    dict(teacher='head'), dict(attribution=LayerGradientXActivation),
    dict(attribution=lambda head, z, classes: z.abs())])
def test_what_needs_a_head_is_refused_where_there_is_none(settings):
    said = "cannot be cut behind 'encoder'.*teacher=None or 'full'.*'grad_x_act'"
    with pytest.raises(ValueError, match=said): SGDrop(Compares(), X, X, **settings)


@pytest.mark.parametrize('old, new', [('share', 'p'), ('unmasked', 'clean_weight')])
def test_an_old_name_is_told_the_new_one(old, new, lightning_callback):
    for callback in (SGDropCallback, lightning_callback):
        with pytest.raises(TypeError, match=f"no setting '{old}'; it is now '{new}'"):
            callback(**{old: 0.5})
        with pytest.raises(TypeError, match="no setting 'noise'; it has .*'fill'"):
            callback(noise=1)


def test_inputs_that_are_no_tensors_are_refused():
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
def test_lightning_refuses_two(lightning_callback):
    with pytest.raises(RuntimeError, match='more than one stateful callback'):
        by_lightning(lightning_callback(), lightning_callback(rho=0.3))
