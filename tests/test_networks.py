"`SGDropCallback()` trains each kind of network, and trains it through the masked map."
import warnings
from copy import deepcopy

import pytest
import torch
from fastai.callback.core import Callback
from fastai.callback.schedule import Learner  # noqa: F401, with fit_one_cycle
from torch import nn
from torch.nn.functional import cross_entropy

from networks import NETWORKS, build, hooked, relative_gap
from sgdrop.attribution import main_output
from sgdrop.callback import SGDropCallback
from sgdrop.monitor import NoEffectWarning


def loss_with_aux(out, y):
    "The loss of networks that return further logits in training mode"
    aux = out[1:] if isinstance(out, tuple) else ()
    losses = [cross_entropy(main_output(out), y)]
    return sum(losses + [0.3 * cross_entropy(a, y) for a in aux])


def trained(make_learner, name, size, cbs):
    "Return the network after one epoch of two batches"
    learn = make_learner(build(name), n=8, bs=4, size=size, classes=10,
                         loss_func=loss_with_aux)
    learn.fit_one_cycle(1, 1e-3, cbs=cbs)
    return learn.model


# one of each kind: Sequentials, residual, in-place ReLU, concatenation, layer scale,
# a map in the classifier, auxiliary heads, normalization last, a tree of blocks
TRAINED = [
    'fastai vision_learner', 'fastai xresnet18', 'resnet18', 'vgg11_bn', 'densenet121',
    'convnext_tiny', 'squeezenet1_1', 'googlenet', 'timm efficientnet_lite0',
    'timm dla34']


@pytest.mark.parametrize('name', TRAINED)
def test_one_line_trains_it(name, make_learner):
    cb, untrained = SGDropCallback(), build(name)
    with warnings.catch_warnings():
        warnings.simplefilter('error', NoEffectWarning)
        model = trained(make_learner, name, 96, cb)  # pixels: at least nine positions
    assert cb.engine.layers == [NETWORKS[name].layer]
    assert len(cb.history) == 1 and cb.history[0]['dropped'] > 0
    assert all(v.isfinite().all() for v in model.state_dict().values())
    assert not hooked(model)
    old, new = list(untrained.parameters()), list(model.parameters())
    assert not new[0].equal(old[0]) and not new[-1].equal(old[-1])


class Batches(Callback):
    "Keeps the batches of a training"
    run_valid = False
    def __init__(self): self.seen = []
    def before_batch(self): self.seen.append((self.x.clone(), self.y.clone()))


def net():
    torch.manual_seed(0)
    body = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 8, 3)
    head = nn.ReLU(inplace=True), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(8 * 4, 4)
    return nn.Sequential(*body, *head)


DIMS = dict(element=(), spatial=(1,), channel=(2, 3))


def slow_mask(z, head, y, rho, target, granularity):
    "The mask as in the paper, by sorting"
    z = z.detach().requires_grad_()
    logits = head(z.clone())
    classes = y if target == 'label' else logits.argmax(1)
    gradient, = torch.autograd.grad(logits.gather(1, classes[:, None]).sum(), z)
    A = (gradient * z).clamp(min=0).detach()
    if DIMS[granularity]: A = A.sum(DIMS[granularity], keepdim=True)
    k = int(rho * A[0].numel())
    values = A.flatten(1).sort(1, descending=True).values
    return values[:, k].view(-1, 1, 1, 1) >= A


def slow_training(net, batches, rho, teacher, target, ema, granularity, lr):
    "SGDrop as in the paper, written without hooks, shared passes or views"
    mean = deepcopy(net).eval()
    for t, (x, y) in enumerate(batches):
        z = net[:4](x)
        head = mean[4:] if teacher else deepcopy(net)[4:]
        explained = mean[:4](x) if teacher == 'full' else z
        M = slow_mask(explained, head, y, rho, target, granularity)
        net.zero_grad()
        cross_entropy(net[4:](z * M), y).backward()
        decay = min(ema, (1 + t) / (10 + t))
        with torch.no_grad():
            for p in net.parameters(): p -= lr * p.grad
            for m, p in zip(mean.parameters(), net.parameters()):
                m.copy_(decay * m + (1 - decay) * p)
            for m, b in zip(mean.buffers(), net.buffers()): m.copy_(b)
    return net


@pytest.mark.parametrize('teacher, target, granularity', [
    (None, 'predicted', 'element'), (None, 'label', 'spatial'),
    ('head', 'predicted', 'channel'), ('head', 'label', 'element'),
    ('full', 'predicted', 'spatial'), ('full', 'label', 'channel')])
def test_training_equals_a_slow_derivation(
        teacher, target, granularity, make_learner, monkeypatch):
    monkeypatch.setattr('sgdrop.teacher._fast_dtype', lambda device: torch.float32)
    settings = dict(rho=0.3, teacher=teacher, target=target, ema=0.8,
                    granularity=granularity)
    batches, learn = Batches(), make_learner(net(), n=48)
    cb = SGDropCallback(layer='3', fill='zero', clean_weight=0., **settings)
    learn.fit(2, 0.1, cbs=[batches, cb])
    assert len(batches.seen) == 12
    slow = slow_training(net(), batches.seen, **settings, lr=0.1)
    clean = slow_training(net(), batches.seen, **settings | dict(rho=0.), lr=0.1)
    for p, s, c in zip(learn.model.parameters(), slow.parameters(), clean.parameters()):
        if s.shape not in ((6,), (8,)):  # biases before BatchNorm, and its own
            assert relative_gap(p, s) < 1e-4 < 1e-2 < relative_gap(c, s)
    assert learn.model[1].running_mean.allclose(slow[1].running_mean, atol=1e-6)
    assert learn.model[1].num_batches_tracked == 12
