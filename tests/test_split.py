"Each supported network is cut without help; body and head compute the same as it does."
from copy import deepcopy

import pytest
import timm
import torch
from fastai.layers import MergeLayer, SequentialEx
from torch import nn

from networks import NETWORKS, Compares, build, hooked, images
from sgdrop.attribution import main_output
from sgdrop.split import find_layer, split_model


def parameters(*modules): return {p.data_ptr() for m in modules for p in m.parameters()}


def check_evaluation(model, body, head, x):
    "Body and head compute the same as the network, and a copy of the head does, too"
    for m in (model, body, head): m.eval()
    z, copy = body(x), deepcopy(head)
    assert z.ndim == 4 and head(z.clone()).equal(model(x))
    assert copy(z.clone()).equal(model(x))
    assert not parameters(copy) & parameters(model)
    assert copy.state_dict().keys() == head.state_dict().keys()


def check_inner_layer(model, layer, x):
    "An earlier layer can be named, or given as a module"
    module, seen = model.get_submodule(layer), []
    body, head = split_model(model, layer, x)
    with module.register_forward_hook(lambda m, i, out: seen.append(out.clone())):
        model(x)
    assert body(x).equal(seen[0])
    check_evaluation(model, body, head, x)
    check_evaluation(model, *split_model(model, module, x), x)


@pytest.mark.parametrize('name', NETWORKS)
@torch.no_grad()
def test_network_is_cut(name):
    network, model = NETWORKS[name], build(name).train()
    next(m for m in model.modules() if isinstance(m, nn.BatchNorm2d | nn.Conv2d)).eval()
    x, modes = images(2, network.train_size), [m.training for m in model.modules()]
    before, rng = deepcopy(model.state_dict()), torch.get_rng_state()

    assert find_layer(model, x) == network.layer
    body, head = split_model(model, None, x)

    # no side effects
    assert [m.training for m in model.modules()] == modes and not hooked(model)
    assert all(v.equal(before[k]) for k, v in model.state_dict().items())
    assert torch.get_rng_state().equal(rng)
    assert parameters(body, head) == parameters(model)  # not copies of them

    whole = main_output(model(x))
    torch.set_rng_state(rng)
    model.load_state_dict(before)
    assert head(body(x)).equal(whole)  # in training mode
    x = images(3, network.size, seed=1)
    check_evaluation(model, body, head, x)
    if network.inner: check_inner_layer(model, network.inner, x)


def head_of(*modules, n=8):
    pool = nn.AdaptiveAvgPool2d(1)
    return nn.Sequential(*modules, pool, nn.Flatten(), nn.Linear(n, 4))


def test_layer_that_runs_twice_is_cut_behind_its_last_run():
    layer, x = nn.Conv2d(3, 3, 3, padding=1), images(2, 8)
    net = head_of(layer, layer, n=3)
    body, head = split_model(net, '0', x)
    assert body(x).equal(layer(layer(x))) and head(body(x)).equal(net(x))


class AlwaysDrops(nn.Module):
    def forward(self, x): return nn.functional.dropout(x, 0.5, training=True)


def test_dropout_in_evaluation_mode_does_not_prevent_a_cut():
    net, x = head_of(nn.Conv2d(3, 8, 3), AlwaysDrops()), images(2, 8)
    state = torch.get_rng_state()
    body, head = split_model(net, None, x)
    assert torch.get_rng_state().equal(state)
    assert head(body(x)).shape == (2, 4)


class DropsByFunction(nn.Module):
    "Dropout as a function call, whose mode a trace fixes"
    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 8, 3), head_of()

    def forward(self, x):
        z = self.conv(nn.functional.dropout(x, 0.3, self.training))
        return self.head(nn.functional.dropout(z, 0.5, self.training))


@pytest.mark.parametrize('cut_in_training', [True, False])
def test_cut_network_follows_its_mode(cut_in_training):
    model, x = DropsByFunction().train(cut_in_training), images(4, 16)
    body, head = split_model(model, 'conv', x)

    def twice(f):
        torch.manual_seed(0)
        return f(), f()
    for training in (True, False, True):
        for m in (model, body, head): m.train(training)
        whole, other = twice(lambda: model(x))
        ours, _ = twice(lambda: head(body(x)))
        assert ours.equal(whole) and whole.equal(other) is not training


@pytest.mark.parametrize('name, size', [('inception_v3', 96), ('resnet18', 32)])
def test_in_small_images_the_last_map_is_one_that_can_be_cut(name, size):
    split_model(build(name).eval(), None, images(2, size))


class Reconstructs(nn.Module):
    "Logits and a reconstruction, whose layer runs last"
    def __init__(self):
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 8, 3), nn.Linear(8, 5)
        self.decoder = nn.ConvTranspose2d(8, 3, 3)

    def forward(self, x):
        z = self.conv(x)
        return self.fc(z.mean((2, 3))), self.decoder(z)


@pytest.mark.parametrize('trainable', [True, False])
def test_last_map_is_one_that_the_logits_depend_on(trainable):
    assert find_layer(Reconstructs().requires_grad_(trainable), images(2, 8)) == 'conv'


class DependsOnData(nn.Module):
    "A forward pass that no trace can follow"
    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 8, 3), head_of()

    def forward(self, x):
        z = self.conv(x)
        return self.head(-z if z.mean() > 0 else z)


def merge_layer():
    "fastai's skip connection, which a trace records but cannot run"
    block = SequentialEx(nn.Conv2d(3, 3, 3, padding=1), nn.ReLU(), MergeLayer())
    return head_of(nn.Conv2d(3, 3, 1), block, n=3)


def one_position():
    return nn.Sequential(nn.Conv2d(3, 8, 8), nn.Flatten(), nn.Linear(8, 4))


def vit():
    return timm.create_model('vit_tiny_patch16_224', img_size=64, depth=1)


def swin(): return timm.create_model('swin_tiny_patch4_window7_224')


REFUSED = {
    'skip connection': ('resnet18', 'layer4.1.conv1', 'ResNet cannot be cut after'),
    'layer scale': ('convnext_tiny', 'features.5.1.block.0', 'ConvNeXt cannot be cut'),
    'dense block': ('densenet121', 'features.denseblock4.denselayer3', 'cannot be cut'),
    'depends on data': (DependsOnData, None, 'DependsOnData cannot be cut'),
    'trace fails': (merge_layer, '1.layers.0', 'cannot be cut after'),
    'no logits': (Reconstructs, 'decoder', "do not depend on the layer 'decoder'"),
    'unknown layer': ('resnet18', 'layer5', "no layer 'layer5'; .* are 'layer4'"),
    'deep layer': ('densenet121', 'denseblock4', "nearest .*'features.denseblock4'"),
    'other network': ('resnet18', nn.ReLU(), 'the layer ReLU is not a part of ResNet'),
    'no map': ('resnet18', 'fc', r"'fc' returns .*\(2, 10\).*last such .*'layer4'"),
    'does not run': ('googlenet', 'aux1', "'aux1' returns no tensor, or does not run"),
    'no map at all': (one_position, '2', "'2' returns a tensor of shape .*B×C×H×W.$"),
    'small images': (one_position, None, 'are the images too small'),
    'transformer': (vit, None, 'VisionTransformer works on tokens.*not supported'),
    'channels last': (swin, None, 'SwinTransformer have their channels last'),
    'channels last inside': (lambda: nn.Sequential(swin()), '0.layers.3',
                             'SwinTransformer have their channels last'),
    'no convolution': (nn.Flatten, None, 'Flatten has no Conv2d layer'),
}
SIZES = {'channels last': 224, 'channels last inside': 224, 'small images': 8,
         'no map at all': 8}


@pytest.mark.parametrize('case', REFUSED)
def test_refusal_names_what_was_found(case):
    make, layer, message = REFUSED[case]
    model = build(make) if isinstance(make, str) else make()
    xb = [] if case == 'no convolution' else [images(2, SIZES.get(case, 64))]
    with pytest.raises(ValueError, match=message): split_model(model.eval(), layer, *xb)
    assert not hooked(model)


def test_a_second_image_bypasses_the_cut():
    pair = images(4, 8), images(4, 8, seed=1)
    with pytest.raises(ValueError, match='Compares cannot be cut'):
        split_model(Compares(), None, *pair)


class ConvPool(nn.Sequential):
    "A block with a name like that of a pooling layer"


def test_a_block_with_convolutions_has_a_map_whatever_its_name():
    def block(n_in, n_out):
        conv = nn.Conv2d(n_in, n_out, 3, padding=1)
        return ConvPool(conv, nn.ReLU(), nn.MaxPool2d(2))
    net = nn.Sequential(block(3, 8), block(8, 16), nn.AdaptiveAvgPool2d(1),
                        nn.Flatten(), nn.Linear(16, 4))
    assert find_layer(net, images(2, 16, 0)) == '1'
