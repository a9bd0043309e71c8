"Every promised network is cut by itself, and its halves compute what it does to the bit."
from copy import deepcopy

import pytest
import timm
import torch
from fastai.layers import MergeLayer, SequentialEx
from torch import nn
from torchvision import models as tv

from networks import NETWORKS, Compares, build, hooked, images
from sgdrop.attribution import main_output
from sgdrop.split import find_layer, split_model


@pytest.fixture(scope='module', params=NETWORKS)
def cut(request):
    "A network, its halves and its entry in the table"
    model = build(request.param).eval()
    return model, *split_model(model), NETWORKS[request.param]


def fresh(network, seed=1): return images(3, network.size, seed)


def test_the_last_feature_map_is_found(cut):
    model, _, _, network = cut
    assert find_layer(model) == find_layer(model, fresh(network)) == network.layer


def test_psi_after_phi_equals_the_network_to_the_bit(cut):
    model, phi, psi, network = cut
    x = fresh(network)
    with torch.no_grad(): assert psi(phi(x)).equal(model(x))
    assert phi(x).ndim == 4


def test_the_halves_hold_the_networks_own_parameters(cut):
    model, phi, psi, network = cut
    own, halves = ({id(p) for m in ms for p in m.parameters()} for ms in ([model], [phi, psi]))
    assert halves <= own and (halves == own or network.has_aux)
    assert next(phi.parameters()).data_ptr() == next(model.parameters()).data_ptr()


def test_a_deep_copy_of_psi_computes_the_same_with_weights_of_its_own(cut):
    model, phi, psi, network = cut
    x = fresh(network)
    with torch.no_grad():
        z = phi(x)
        teacher = deepcopy(psi)
        assert teacher(z).equal(psi(z))
    assert not {p.data_ptr() for p in teacher.parameters()} & {p.data_ptr() for p in model.parameters()}
    assert len(list(teacher.parameters())) == len(list(psi.parameters())) and len(list(teacher.buffers())) == len(list(psi.buffers()))


@pytest.mark.parametrize('name', NETWORKS)
def test_splitting_leaves_no_trace_and_training_mode_computes_the_same_too(name):
    model, network = build(name).train(), NETWORKS[name]
    frozen = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)][:1]
    for m in frozen: m.eval()
    x = images(2, network.train_size)
    before, modes, rng = {k: v.clone() for k, v in model.state_dict().items()}, [m.training for m in model.modules()], torch.get_rng_state()
    phi, psi = split_model(model, None, x)
    assert [m.training for m in model.modules()] == modes and torch.get_rng_state().equal(rng) and not hooked(model)
    assert all(v.equal(before[k]) for k, v in model.state_dict().items())
    with torch.no_grad():
        whole = main_output(model(x))
        torch.set_rng_state(rng)
        assert psi(phi(x)).equal(whole)


INNER = [('resnet18', 'layer3'), ('resnet18', 'layer2.0'), ('vgg11_bn', 'features.21'), ('densenet121', 'features.transition2'), ('convnext_tiny', 'features.5'),
         ('convnext_tiny', 'features.5.4'), ('efficientnet_b0', 'features.5.1'), ('mobilenet_v2', 'features.13'), ('mobilenet_v3_small', 'features.8'),
         ('fastai xresnet18', '6.0'), ('fastai vision_learner', '0.6.1'), ('regnet_y_400mf', 'trunk_output.block3.block3-1'), ('shufflenet_v2_x0_5', 'stage3.2'),
         ('squeezenet1_1', 'features.12'), ('mnasnet0_5', 'layers.10.0'), ('timm regnetx_002', 's3.b2'), ('timm convnext_atto', 'stages.2.blocks.3'),
         ('timm resnetv2_50', 'stages.2.blocks.1'), ('timm efficientnet_lite0', 'blocks.4.1'), ('timm resnet10t', 'layer3.0')]


@pytest.mark.parametrize('name, layer', INNER)
def test_a_layer_further_in_is_cut_by_name_and_by_module(name, layer):
    model, x = build(name).eval(), images(3, NETWORKS[name].size)
    seen = []
    with torch.no_grad():
        by_name, by_module = split_model(model, layer), split_model(model, model.get_submodule(layer))
        with model.get_submodule(layer).register_forward_hook(lambda m, i, out: seen.append(out.clone())): scores = model(x)
        for phi, psi in (by_name, by_module): assert phi(x).equal(seen[0]) and psi(seen[0].clone()).equal(scores)


# a branch beside the layer: nothing can be cut behind it
BYPASSED = [('resnet18', 'layer4.1.conv1'), ('densenet121', 'features.denseblock4.denselayer3'), ('convnext_tiny', 'features.5.1.block.0'),
            ('mobilenet_v2', 'features.3.conv.0')]


@pytest.mark.parametrize('name, layer', BYPASSED)
def test_where_no_cut_is_possible_the_network_and_the_layer_are_named(name, layer):
    model = build(name).eval()
    with pytest.raises(ValueError, match=f'{type(model).__name__} cannot be cut behind {layer!r}'): split_model(model, layer)
    assert not hooked(model)


def test_two_images_side_by_side_cannot_be_cut_behind_the_second():
    with pytest.raises(ValueError, match='Compares cannot be cut'): split_model(Compares(), None, images(4, 8), images(4, 8, 1))


class Draws(nn.Module):
    "Scores, and a picture that is drawn after them"
    def __init__(self): super().__init__(); self.look, self.judge, self.draw = nn.Conv2d(3, 8, 3), nn.Linear(8, 5), nn.ConvTranspose2d(8, 3, 3)
    def forward(self, x):
        z = self.look(x)
        return self.judge(z.mean((2, 3))), self.draw(z)


def test_a_map_that_does_not_lead_to_the_scores_is_not_taken():
    x = images(2, 8)
    assert find_layer(Draws(), x) == 'look'
    with pytest.raises(ValueError, match="scores of Draws do not depend on the layer 'draw'"): split_model(Draws(), 'draw', x)
    assert find_layer(Draws().requires_grad_(False), x) == 'look'


def test_dropout_that_is_always_on_does_not_stand_in_the_way():
    class Always(nn.Module):
        def forward(self, x): return nn.functional.dropout(x, 0.5, training=True)
    net, x = nn.Sequential(nn.Conv2d(3, 8, 3), Always(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)), images(2, 8)
    state = torch.get_rng_state()
    phi, psi = split_model(net, None, x)
    assert torch.get_rng_state().equal(state)
    assert psi(phi(x)).shape == (2, 4)


class Chooses(nn.Module):
    "A forward pass that depends on its data, which no trace can follow"
    def __init__(self): super().__init__(); self.conv, self.pool, self.fc = nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Linear(8, 4)
    def forward(self, x):
        z = self.conv(x)
        if z.mean() > 0: z = -z
        return self.fc(self.pool(z).flatten(1))


def test_a_network_that_cannot_be_traced_is_not_cut():
    with pytest.raises(ValueError, match='Chooses cannot be cut'): split_model(Chooses(), None, images(2, 16))


def test_a_trace_that_does_not_run_is_not_taken():
    shortcut = SequentialEx(nn.Conv2d(3, 3, 3, padding=1), nn.ReLU(), MergeLayer())  # which hangs its input on a tensor, unseen by a trace
    model, x = nn.Sequential(nn.Conv2d(3, 3, 1), shortcut, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 4)), images(2, 16)
    with pytest.raises(ValueError, match='cannot be cut behind'): split_model(model, '1.layers.0', x)


class DropsByFunction(nn.Module):
    "Dropout as a function call, which a trace answers once and for all"
    def __init__(self): super().__init__(); self.conv, self.pool, self.fc = nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Linear(8, 4)
    def forward(self, x):
        x = nn.functional.dropout(x, 0.3, self.training)
        return self.fc(nn.functional.dropout(self.pool(self.conv(x)).flatten(1), 0.5, self.training))


@pytest.mark.parametrize('cut_in_training', [True, False])
def test_a_cut_network_follows_the_mode_it_is_in(cut_in_training):
    model, x = DropsByFunction().train(cut_in_training), images(4, 16)
    phi, psi = split_model(model, 'conv', x)
    def twice(f): torch.manual_seed(0); return f(), f()
    for training in (True, False, True):
        for m in (model, phi, psi): m.train(training)
        (whole, other), (ours, _) = twice(lambda: model(x)), twice(lambda: psi(phi(x)))
        assert ours.equal(whole) and whole.equal(other) is not training


@pytest.mark.parametrize('name, size', [('inception_v3', 96), ('resnet50', 32), ('resnet18', 32)])
def test_in_small_images_the_last_map_is_one_that_can_be_cut_behind(name, size):
    model = build(name) if name in NETWORKS else getattr(tv, name)(num_classes=10)
    split_model(model.eval(), None, images(2, size))


@pytest.mark.parametrize('name, layer, nearest', [('resnet18', 'layer5', 'layer4'), ('convnext_tiny', 'feature.7', 'features.7'),
                                                  ('densenet121', 'denseblock4', 'features.denseblock4'), ('timm regnetx_002', 's5', 's4')])
def test_an_unknown_layer_is_answered_with_the_nearest_names(name, layer, nearest):
    with pytest.raises(ValueError, match=f"has no layer {layer!r}; the nearest names are .*'{nearest}'"): split_model(build(name), layer)


@pytest.mark.parametrize('name, layer, shape', [('resnet18', 'fc', r'\(2, 10\)'), ('mobilenet_v2', 'classifier', r'\(2, 10\)'), ('timm regnetx_002', 'head', r'\(2, 10\)')])
def test_a_layer_without_a_feature_map_is_told_what_it_makes_and_where_the_last_map_is(name, layer, shape):
    with pytest.raises(ValueError, match=f'{layer!r} puts out a tensor of shape {shape}.*The last such layer is {NETWORKS[name].layer!r}'): split_model(build(name), layer)


def test_a_layer_that_does_not_run_is_told_so():
    with pytest.raises(ValueError, match="'aux1' puts out no tensor, or does not run"): split_model(build('googlenet').eval(), 'aux1')


def test_a_wrong_layer_is_told_so_where_no_layer_at_all_makes_a_map():
    model = nn.Sequential(nn.Conv2d(3, 8, 16), nn.Flatten(), nn.Linear(8, 4))
    with pytest.raises(ValueError, match="'2' puts out a tensor of shape"): split_model(model, '2', images(2, 16))


def test_a_transformer_is_refused():
    model = timm.create_model('vit_tiny_patch16_224', num_classes=10, img_size=64, depth=2)
    with pytest.raises(ValueError, match='VisionTransformer works on tokens.*transformers are not supported'): split_model(model, None, images(2, 64))


def test_a_network_without_convolutions_is_refused():
    with pytest.raises(ValueError, match='Sequential has no Conv2d layer'): split_model(nn.Sequential(nn.Flatten(), nn.Linear(12, 4)))


def test_images_too_small_for_a_map_are_suspected():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8, 4))
    with pytest.raises(ValueError, match='are the images too small'): split_model(model, None, images(2, 3))


def test_a_module_of_another_network_is_refused():
    with pytest.raises(ValueError, match='the layer Sequential is not a part of ResNet'): split_model(build('resnet18'), build('resnet18').layer4)


def test_channels_last_maps_are_refused():
    model = timm.create_model('swin_tiny_patch4_window7_224', num_classes=10)
    with pytest.raises(ValueError, match='channels last'): find_layer(model, images(2, 224))
