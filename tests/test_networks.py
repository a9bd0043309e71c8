"`SGDropCallback()` trains every promised network, and trains it through the masked map."
import warnings
from copy import deepcopy

import pytest
import torch
from fastai.callback.core import Callback
from fastai.callback.schedule import Learner  # noqa: F401, with its method fit_one_cycle
from torch import nn
from torch.nn.functional import cross_entropy

from networks import NETWORKS, build, hooked, relative_gap, same_weights
from sgdrop.attribution import main_output
from sgdrop.callback import SGDropCallback
from sgdrop.monitor import NoEffectWarning


def loss_with_aux(out, y):
    "The loss of GoogLeNet and Inception, which return further scores in training mode"
    aux = out[1:] if isinstance(out, tuple) else ()
    return cross_entropy(main_output(out), y) + 0.3 * sum(cross_entropy(a, y) for a in aux)


def trained(make_learner, name, size, cbs):
    "The network after one epoch of two batches"
    bs = 2 if size > 200 else 4
    learn = make_learner(build(name), n=2 * bs, bs=bs, size=size, classes=10, loss_func=loss_with_aux)
    learn.fit_one_cycle(1, 1e-3, cbs=cbs)
    return learn.model


@pytest.mark.parametrize('name', NETWORKS)
def test_one_line_trains_it(name, make_learner):
    cb, untrained = SGDropCallback(), build(name)
    with warnings.catch_warnings():
        warnings.simplefilter('error', NoEffectWarning)
        model = trained(make_learner, name, max(96, NETWORKS[name].train_size), cb)  # at 96 pixels and more, maps have nine positions and more
    assert cb.engine.layers == [NETWORKS[name].layer] and len(cb.history) == 1 and cb.history[0]['dropped'] > 0
    assert all(v.isfinite().all() for v in model.state_dict().values())
    assert not hooked(model)
    old, new = list(untrained.parameters()), list(model.parameters())
    assert not new[0].equal(old[0]) and not new[-1].equal(old[-1])


@pytest.mark.parametrize('name', ['fastai vision_learner', 'mobilenet_v3_small', 'timm convnext_atto', 'googlenet'])
def test_a_share_of_zero_is_plain_training_to_the_bit(name, make_learner):
    assert same_weights(trained(make_learner, name, 64, SGDropCallback(rho=0.)), trained(make_learner, name, 64, None))


@pytest.mark.parametrize('name', ['resnet18', 'mobilenet_v3_small'])
def test_the_same_seed_gives_the_same_weights(name, make_learner):
    first, second = (trained(make_learner, name, 96, SGDropCallback(p=0.5)) for _ in range(2))
    assert same_weights(first, second)


class Batches(Callback):
    "Keeps what the network is trained on"
    run_valid = False
    def __init__(self): self.seen = []
    def before_batch(self): self.seen.append((self.x.clone(), self.y.clone()))


def net():
    torch.manual_seed(0)
    phi = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 8, 3)
    return nn.Sequential(*phi, nn.ReLU(inplace=True), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(8 * 4, 4))


DIMS = dict(element=(), spatial=(1,), channel=(2, 3))


def slow_training(net, batches, rho, teacher, target, ema, granularity, lr):
    "SGDrop as one would write it down from the paper: no hooks, no shared passes, whole networks"
    mean = deepcopy(net).eval()
    for t, (x, y) in enumerate(batches):
        student = (net[:4], net[4:])
        z = student[0](x)
        phi, psi = dict(full=(mean[:4], mean[4:]), head=(None, mean[4:])).get(teacher, (None, deepcopy(net)[4:]))
        seen = (phi(x) if phi else z).detach().requires_grad_()
        scores = psi(seen.clone())
        classes = y if target == 'label' else scores.argmax(1)
        gradient, = torch.autograd.grad(scores.gather(1, classes[:, None]).sum(), seen)
        A = (gradient * seen).clamp(min=0).detach()
        if DIMS[granularity]: A = A.sum(DIMS[granularity], keepdim=True)
        k = int(rho * A[0].numel())
        threshold = A.flatten(1).sort(1, descending=True).values[:, k].view(-1, 1, 1, 1)
        loss = cross_entropy(student[1](z * (A <= threshold)), y)
        net.zero_grad()
        loss.backward()
        decay = min(ema, (1 + t) / (10 + t))
        with torch.no_grad():
            for p in net.parameters(): p -= lr * p.grad
            for m, p in zip(mean.parameters(), net.parameters()): m.copy_(decay * m + (1 - decay) * p)
            for m, b in zip(mean.buffers(), net.buffers()): m.copy_(b)
    return net


@pytest.mark.parametrize('granularity', DIMS)
@pytest.mark.parametrize('target', ['predicted', 'label'])
@pytest.mark.parametrize('teacher', [None, 'head', 'full'])
def test_training_equals_a_slow_derivation(teacher, target, granularity, make_learner, monkeypatch):
    monkeypatch.setattr('sgdrop.teacher.fast_dtype', lambda device: torch.float32)  # a full teacher is in bfloat16 where that is fast
    settings, batches = dict(rho=0.3, teacher=teacher, target=target, ema=0.8, granularity=granularity), Batches()
    learn = make_learner(net(), n=48)
    learn.fit(2, 0.1, cbs=[batches, SGDropCallback(layer='3', fill='zero', clean_weight=0., **settings)])
    assert len(batches.seen) == 12
    slow = slow_training(net(), batches.seen, **settings, lr=0.1)
    unmasked = slow_training(net(), batches.seen, **{**settings, 'rho': 0.}, lr=0.1)
    for p, s, u in zip(learn.model.parameters(), slow.parameters(), unmasked.parameters()):
        if s.shape != (6,) and s.shape != (8,): assert relative_gap(p, s) < 1e-4 < 1e-2 < relative_gap(u, s)
    assert learn.model[1].running_mean.allclose(slow[1].running_mean, atol=1e-6) and learn.model[1].num_batches_tracked == 12
