"Attribution on real networks against captum, and against slow derivations in float64."
from copy import deepcopy

import pytest
import torch
from captum.attr import (DeepLift, IntegratedGradients, LayerDeepLift, LayerGradCam,
                         LayerGradientXActivation, LayerIntegratedGradients)
from torch import nn

from networks import NETWORKS, build, images, relative_gap
from sgdrop.attribution import attribute, captum_attribution
from sgdrop.split import split_model

INTEGRATED = captum_attribution(LayerIntegratedGradients, n_steps=3)


class Copy(nn.Module):
    def forward(self, z): return z.clone()


def shielded(model, layer):
    "Copy a network so that nothing after a layer writes into its output; return both"
    model = deepcopy(model)
    inner = model.get_submodule(layer)
    parent, _, name = layer.rpartition('.')
    setattr(model.get_submodule(parent), name, nn.Sequential(inner, Copy()))
    return model, inner


@pytest.mark.parametrize('name, layer', [
    ('fastai vision_learner', None), ('fastai xresnet18', '6'),
    ('resnet18', 'layer3.0'), ('vgg11_bn', None), ('densenet121', None),
    ('convnext_tiny', 'features.5.4')])
def test_attribution_equals_captum_on_the_whole_network(name, layer):
    model, x, labels = build(name).eval(), images(3, 64), torch.tensor([1, 0, 7])
    body, head = split_model(model, layer, x)
    whole, inner = shielded(model, layer or NETWORKS[name].layer)
    z, by_captum = body(x), LayerGradientXActivation(whole, inner)
    theirs = by_captum.attribute(x, target=labels).clamp(min=0)
    assert relative_gap(attribute(head, z, labels), theirs) < 1e-5
    cam = LayerGradCam(whole, inner).attribute(x, target=labels, relu_attributions=True)
    assert relative_gap(attribute(head, z, labels, 'gradcam'), cam) < 1e-5


@pytest.mark.filterwarnings('ignore::UserWarning:captum')  # of hooks that it removes
@pytest.mark.parametrize('ours, theirs, options', [
    (LayerIntegratedGradients, IntegratedGradients, dict(n_steps=7)),
    (LayerDeepLift, DeepLift, {})])
def test_captum_layer_method_equals_its_input_method_on_the_head(ours, theirs, options):
    body, head = split_model(build('fastai vision_learner').eval())
    z, labels = body(images(2, 64)).detach(), torch.tensor([3, 4])
    for m in head.modules():
        if isinstance(m, nn.ReLU): m.inplace = False
    direct = theirs(head).attribute(z, target=labels, **options).clamp(min=0).detach()
    A = attribute(head, z, labels, captum_attribution(ours, **options))
    assert relative_gap(A, direct) < 1e-5


def test_attribution_equals_the_jacobian_in_float64():
    conv, linear = nn.Conv2d(4, 6, 3), nn.Linear(6 * 9, 5)
    head = nn.Sequential(conv, nn.Tanh(), nn.Flatten(), linear)
    z, labels = torch.randn(3, 4, 5, 5), torch.tensor([4, 0, 2])
    A, cam = attribute(head, z, labels), attribute(head, z, labels, 'gradcam')
    slow, tolerance = deepcopy(head).double(), dict(rtol=1e-5, atol=1e-7)
    for i, c in enumerate(labels):
        zi = z[i].double()
        jacobian = torch.autograd.functional.jacobian(slow, zi[None])[0, c, 0]
        by_hand = (jacobian * zi).clamp(min=0)
        torch.testing.assert_close(A[i].double(), by_hand, **tolerance)
        weights = jacobian.mean((1, 2))
        by_hand = sum(w * channel for w, channel in zip(weights, zi)).clamp(min=0)
        torch.testing.assert_close(cam[i, 0].double(), by_hand, **tolerance)


def test_for_a_linear_head_attribution_is_how_much_the_logit_falls_without_an_element():
    head = nn.Sequential(nn.AvgPool2d(2), nn.Flatten(), nn.Linear(3 * 4, 5)).double()
    z, c = torch.randn(1, 3, 4, 4).double(), 2
    falls = torch.empty(z.numel()).double()
    for i in range(z.numel()):
        without = z.clone()
        without.view(-1)[i] = 0
        falls[i] = head(z)[0, c].item() - head(without)[0, c].item()
    assert (falls < 0).any() and (falls > 0).any()
    A = attribute(head, z, c).double().flatten()
    torch.testing.assert_close(A, falls.clamp(min=0), rtol=1e-5, atol=1e-7)


WEIGHTS = {  # class → weight; which classes count
    'MixUp': ({2: 0.7, 5: 0.3}, [2]), 'MixUp, second': ({2: 0.3, 5: 0.7}, [5]),
    'MixUp, half and half': ({2: 0.5, 5: 0.5}, [2, 5]),
    'CutMix of one class': ({8: 1.}, [8]),
    'several labels': ({1: 1., 4: 1., 9: 1.}, [1, 4, 9]), 'none': ({}, [])}


def test_label_weights_select_the_right_classes():
    model, x = build('resnet18').eval(), images(len(WEIGHTS), 64)
    body, head = split_model(model)
    weights, theirs = torch.zeros(len(x), 10), []
    by_captum = LayerGradientXActivation(model, model.layer4)
    for i, (given, chosen) in enumerate(WEIGHTS.values()):
        for c, weight in given.items(): weights[i, c] = weight
        signed = [by_captum.attribute(x[i:i + 1], target=c) for c in chosen]
        theirs.append(sum(signed, torch.zeros(1, 512, 2, 2)).clamp(min=0))
    ours = attribute(head, body(x), weights)
    assert relative_gap(ours, torch.cat(theirs)) < 1e-5
    assert ours[-1].eq(0).all()


def test_predicted_class_is_predicted_from_the_map():
    body, head = split_model(build('resnet18').eval())
    z = body(images(4, 64))
    classes = head(z).argmax(1)
    assert attribute(head, z).equal(attribute(head, z, classes))
    assert not attribute(head, z).equal(attribute(head, z, (classes + 1) % 10))


@pytest.mark.parametrize('name, layer, method', [
    ('fastai vision_learner', None, 'grad_x_act'), ('resnet18', 'layer3', 'gradcam'),
    ('efficientnet_b0', 'features.6', LayerGradientXActivation),
    ('resnet18', 'layer3', INTEGRATED)])
def test_attribution_in_training_mode_has_no_side_effects(name, layer, method):
    model, x = build(name).train(), images(4, 64)
    body, head = split_model(model, layer, x)
    norms = nn.BatchNorm1d, nn.BatchNorm2d
    next(m for m in head.modules() if isinstance(m, norms)).eval()  # a frozen layer
    for p in list(head.parameters())[::2]: p.grad = torch.ones_like(p)
    z = body(x).detach()
    values, rng = deepcopy(model.state_dict()), torch.get_rng_state()
    z_before = z.clone()
    modes = [m.training for m in model.modules()]
    grads = [p.grad for p in model.parameters()]
    A = attribute(head, z, 'predicted', method)
    assert A.sum() > 0 and not A.requires_grad
    assert z.equal(z_before) and not z.requires_grad
    assert all(values[k].equal(v) for k, v in model.state_dict().items())
    assert all(p.grad is g for p, g in zip(model.parameters(), grads))
    assert all(g is None or g.eq(1).all() for g in grads)
    assert modes == [m.training for m in model.modules()]
    assert rng.equal(torch.get_rng_state())


def test_graph_that_waits_for_its_backward_pass_survives_an_attribution():
    model, x = build('resnet18').train(), images(4, 64)
    body, head = split_model(model, 'layer3', x)
    loss = head(body(x)).square().mean()
    attribute(head, body(x))
    loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize('name, method', [
    ('convnext_tiny', 'grad_x_act'), ('resnet18', 'gradcam'), ('resnet18', INTEGRATED)])
def test_attribution_under_autocast_is_finite_and_in_float32(name, method):
    body, head = split_model(build(name).eval())
    with torch.autocast('cpu', torch.bfloat16):
        z = body(images(2, 64))
        A = attribute(head, z, 3, method)
    assert A.dtype == torch.float32 and A.isfinite().all() and A.sum() > 0


def linear_head(n=3): return nn.Sequential(nn.Flatten(), nn.Linear(48, n))


@pytest.mark.parametrize('outside', [torch.no_grad, torch.inference_mode])
def test_gradients_can_be_off_outside(outside):
    head, z = linear_head(), torch.rand(2, 3, 4, 4)
    theirs = attribute(head, z)
    with outside(): given = z.clone()
    if outside is torch.no_grad:
        with outside(): assert attribute(head, given).equal(theirs)
    assert attribute(head, given).equal(theirs)


@pytest.mark.parametrize('target, message', [
    (10, 'target has class 10; expected 0 to 2, as the network has 3 classes'),
    (7 * torch.ones(2, 3), 'Are these regression targets'), ('labels', "got 'labels'"),
    (torch.zeros(5).long(), r'got a torch.int64 tensor of \(5,\)'),
    (True, 'got True')])
def test_target_that_is_no_class_is_refused(target, message):
    with pytest.raises(ValueError, match=message):
        attribute(linear_head(), torch.rand(2, 3, 4, 4), target)


@pytest.mark.parametrize('head, message', [
    (nn.Conv2d(3, 10, 1), r'returned \(2, 10, 4, 4\); expected .*B×K.*Segmentation'),
    (linear_head(1), r'\(2, 1\).*regression')])
def test_head_without_logits_is_refused(head, message):
    with pytest.raises(ValueError, match=message):
        attribute(head, torch.rand(2, 3, 4, 4))


def test_buffer_that_is_replaced_in_the_pass_comes_back():
    class Counts(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer('n', torch.zeros(()))

        def forward(self, x):
            self.n = self.n + 1
            return x
    net = nn.Sequential(Counts(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    buffer = net[0].n
    attribute(net, torch.randn(2, 3, 4, 4))
    assert net[0].n is buffer and buffer == 0
