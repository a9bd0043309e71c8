"Attribution on real networks against captum, and against slow derivations in float64."
from copy import deepcopy

import pytest
import torch
from captum.attr import (DeepLift, InputXGradient, IntegratedGradients, LayerDeepLift, LayerGradCam, LayerGradientXActivation,
                         LayerIntegratedGradients)
from torch import nn

from networks import NETWORKS, build, images, relative_gap
from sgdrop.attribution import attribute, captum_attribution
from sgdrop.split import split_model

METHODS = [pytest.param(m, id=name) for name, m in {'grad_x_act': 'grad_x_act', 'gradcam': 'gradcam', 'captum class': LayerGradientXActivation,
           'captum with options': captum_attribution(LayerIntegratedGradients, n_steps=3)}.items()]

# None is the last feature map; the others lie further in
PLACES = [('resnet18', None), ('resnet18', 'layer3.0'), ('vgg11_bn', None), ('vgg11_bn', 'features.18'), ('densenet121', None),
          ('densenet121', 'features.denseblock3'), ('convnext_tiny', None), ('convnext_tiny', 'features.5.4'), ('fastai xresnet18', None),
          ('fastai xresnet18', '6'), ('fastai vision_learner', None), ('fastai vision_learner', '0.6.1')]


class Copy(nn.Module):
    def forward(self, z): return z.clone()


def shielded(model, layer):
    "A copy of `model` in which nothing after `layer` writes into its output, since captum looks at it afterwards; and the layer itself"
    model = deepcopy(model)
    inner = model.get_submodule(layer)
    parent, _, name = layer.rpartition('.')
    setattr(model.get_submodule(parent), name, nn.Sequential(inner, Copy()))
    return model, inner


@pytest.mark.parametrize('name, layer', PLACES)
def test_attribution_equals_captum_on_the_whole_network(name, layer):
    model, x, labels = build(name).eval(), images(3, NETWORKS[name].size), torch.tensor([1, 0, 7])
    phi, psi = split_model(model, layer, x)
    whole, inner = shielded(model, layer or NETWORKS[name].layer)
    z = phi(x)
    theirs = LayerGradientXActivation(whole, inner).attribute(x, target=labels).clamp(min=0)
    assert relative_gap(attribute(psi, z, labels), theirs) < 1e-5
    their_cam = LayerGradCam(whole, inner).attribute(x, target=labels, relu_attributions=True)
    assert relative_gap(attribute(psi, z, labels, 'gradcam'), their_cam) < 1e-5


@pytest.mark.filterwarnings('ignore::UserWarning:captum')  # of setting gradients and hooks, which it takes back
@pytest.mark.parametrize('ours, theirs', [(LayerIntegratedGradients, IntegratedGradients), (LayerGradientXActivation, InputXGradient), (LayerDeepLift, DeepLift)])
def test_a_captum_layer_method_equals_its_input_twin_on_psi_alone(ours, theirs):
    phi, psi = split_model(build('fastai vision_learner').eval())
    z, labels = phi(images(2, 64)).detach(), torch.tensor([3, 4])
    psi = nn.Sequential(*[m for part in psi for m in (part if isinstance(part, nn.Sequential) else [part])])
    for m in psi.modules():
        if isinstance(m, nn.ReLU): m.inplace = False
    options = dict(n_steps=7) if ours is LayerIntegratedGradients else {}
    direct = theirs(psi).attribute(z, target=labels, **options).clamp(min=0).detach()
    assert relative_gap(attribute(psi, z, labels, captum_attribution(ours, **options)), direct) < 1e-5


def smooth_psi(): return nn.Sequential(nn.Conv2d(4, 6, 3), nn.Tanh(), nn.Flatten(), nn.Linear(6 * 9, 5))


def test_attribution_equals_the_jacobian_in_float64():
    psi, z, labels = smooth_psi(), torch.randn(3, 4, 5, 5), torch.tensor([4, 0, 2])
    A, cam = attribute(psi, z, labels), attribute(psi, z, labels, 'gradcam')
    slow = deepcopy(psi).double()
    for i, c in enumerate(labels):
        jacobian = torch.autograd.functional.jacobian(slow, z[i:i + 1].double())[0, :, 0]
        assert jacobian.shape == (5, 4, 5, 5)
        torch.testing.assert_close(A[i].double(), (jacobian[c] * z[i].double()).clamp(min=0), rtol=1e-5, atol=1e-7)
        weights = jacobian[c].mean((1, 2))
        by_hand = sum(w * channel for w, channel in zip(weights, z[i].double())).clamp(min=0)
        torch.testing.assert_close(cam[i, 0].double(), by_hand, rtol=1e-5, atol=1e-7)


def test_for_a_linear_psi_attribution_is_how_much_the_score_falls_without_the_element():
    psi = nn.Sequential(nn.AvgPool2d(2), nn.Flatten(), nn.Linear(3 * 4, 5)).double()
    z, c = torch.randn(1, 3, 4, 4).double(), 2
    falls = torch.empty_like(z)
    for i in range(z.numel()):
        without = z.clone().flatten()
        without[i] = 0
        falls.view(-1)[i] = psi(z)[0, c].item() - psi(without.view_as(z))[0, c].item()
    assert (falls < 0).any() and (falls > 0).any()
    torch.testing.assert_close(attribute(psi, z, c).double(), falls.clamp(min=0), rtol=1e-5, atol=1e-7)


def test_blended_and_multiple_labels_pick_the_classes_they_should():
    model, x = build('resnet18').eval(), images(6, 64)
    phi, psi = split_model(model)
    weights = torch.zeros(6, 10)
    weights[0, [2, 5]] = torch.tensor([0.7, 0.3])    # MixUp
    weights[1, [2, 5]] = torch.tensor([0.3, 0.7])
    weights[2, [2, 5]] = 0.5                         # MixUp half and half: both weigh most
    weights[3, 8] = 1.                               # CutMix of two images of one class
    weights[4, [1, 4, 9]] = 1.                       # several labels
    chosen = [[2], [5], [2, 5], [8], [1, 4, 9], []]  # and none
    signed = lambda i, c: LayerGradientXActivation(model, model.layer4).attribute(x[i:i + 1], target=c)
    theirs = torch.cat([sum((signed(i, c) for c in cs), torch.zeros(1, 512, 2, 2)).clamp(min=0) for i, cs in enumerate(chosen)])
    ours = attribute(psi, phi(x), weights)
    assert relative_gap(ours, theirs) < 1e-5
    assert ours[5].eq(0).all()


def test_the_predicted_class_is_predicted_from_the_map():
    phi, psi = split_model(build('resnet18').eval())
    z = phi(images(4, 64))
    classes = psi(z).argmax(1)
    assert attribute(psi, z).equal(attribute(psi, z, classes))
    assert not attribute(psi, z).equal(attribute(psi, z, (classes + 1) % 10))


def state(model):
    return dict(values={k: v.clone() for k, v in model.state_dict().items()}, grads={k: p.grad for k, p in model.named_parameters()},
                modes=[m.training for m in model.modules()], rng=torch.get_rng_state())


@pytest.mark.parametrize('method', METHODS)
@pytest.mark.parametrize('name, layer', [('fastai vision_learner', None), ('resnet18', 'layer3'), ('efficientnet_b0', 'features.6')])
def test_attribution_in_training_mode_leaves_no_trace(name, layer, method):
    model, x = build(name).train(), images(4, 64)
    phi, psi = split_model(model, layer, x)
    [m for m in psi.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)][0].eval()  # a frozen layer
    for p in list(psi.parameters())[::2]: p.grad = torch.ones_like(p)
    z = phi(x).detach()
    before, map_before = state(model), z.clone()
    A = attribute(psi, z, 'predicted', method)
    after = state(model)
    assert A.sum() > 0 and not A.requires_grad and not z.requires_grad and z.equal(map_before)
    assert all(torch.equal(before['values'][k], v) for k, v in after['values'].items())
    assert all(before['grads'][k] is g for k, g in after['grads'].items())
    assert all(g is None or g.eq(1).all() for g in after['grads'].values())
    assert before['modes'] == after['modes'] and before['rng'].equal(after['rng'])


def test_a_graph_that_waits_for_its_backward_pass_survives_an_attribution():
    model, x = build('resnet18').train(), images(4, 64)
    phi, psi = split_model(model, 'layer3', x)
    loss = psi(phi(x)).square().mean()
    attribute(psi, phi(x))
    loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize('method', METHODS)
@pytest.mark.parametrize('name', ['resnet18', 'convnext_tiny'])
def test_attribution_under_autocast_is_finite_and_in_float32(name, method):
    phi, psi = split_model(build(name).eval())
    with torch.autocast('cpu', torch.bfloat16):
        z = phi(images(2, 64))
        A = attribute(psi, z, 3, method)
    assert A.dtype == torch.float32 and A.isfinite().all() and A.sum() > 0


def test_gradients_that_are_switched_off_outside_do_not_matter():
    phi, psi = split_model(build('resnet18').eval())
    z = phi(images(2, 64))
    with torch.no_grad(): assert attribute(psi, z).equal(attribute(psi, z.detach()))


def test_a_target_that_is_no_class_is_named():
    phi, psi = split_model(build('resnet18').eval())
    z = phi(images(2, 64))
    with pytest.raises(ValueError, match='target holds class 10; the network scores classes 0 to 9'): attribute(psi, z, 10)
    with pytest.raises(ValueError, match='are these regression targets'): attribute(psi, z, 7 * torch.ones(2, 10))
    with pytest.raises(ValueError, match="got 'labels'"): attribute(psi, z, 'labels')


def test_what_makes_no_class_scores_is_named():
    with pytest.raises(ValueError, match=r'\(2, 10, 2, 2\).*segmentation'): attribute(nn.Conv2d(4, 10, 1), torch.randn(2, 4, 2, 2))
    with pytest.raises(ValueError, match=r'\(2, 1\)'): attribute(nn.Sequential(nn.Flatten(), nn.Linear(16, 1)), torch.randn(2, 4, 2, 2))


def test_a_map_made_in_inference_mode_will_do():
    psi = nn.Sequential(nn.Flatten(), nn.Linear(48, 3))
    with torch.inference_mode(): z = torch.rand(2, 3, 4, 4)
    assert attribute(psi, z).equal(attribute(psi, z.clone()))


def test_a_buffer_that_is_replaced_in_the_pass_comes_back():
    class Counts(nn.Module):
        def __init__(self): super().__init__(); self.register_buffer('n', torch.zeros(()))
        def forward(self, x): self.n = self.n + 1; return x
    net = nn.Sequential(Counts(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    buffer = net[0].n
    attribute(net, torch.randn(2, 3, 4, 4))
    assert net[0].n is buffer and buffer == 0
