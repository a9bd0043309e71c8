"Networks that sgdrop works with, one of each kind, and other parts that tests share."
from collections.abc import Callable
from typing import NamedTuple

import timm
import torch
from fastai.callback.core import Callback
from fastai.learner import Learner
from fastai.vision.learner import create_vision_model
from fastai.vision.models import resnet18
from fastai.vision.models.xresnet import xresnet18
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torchvision import models as tv

from sgdrop.callback import SGDropCallback
from sgdrop.split import unwrapped
from sgdrop.teacher import _clone_without_hooks


class Network(NamedTuple):
    make: Callable[[], nn.Module]  # with random weights and ten classes
    layer: str  # the last feature map
    inner: str | None = None  # an earlier layer that it can be cut behind
    size: int = 64  # pixels
    train_size: int = 64  # pixels it needs in training mode
    has_aux: bool = False  # does it return several outputs in training mode?


def torchvision(arch, layer, inner=None, **kwargs):
    options = dict(init_weights=False) if kwargs.get('has_aux') else {}
    make = getattr(tv, arch)
    return Network(lambda: make(num_classes=10, **options), layer, inner, **kwargs)


def vgg11_bn():
    "torchvision's VGG-11, its head with fewer units: 120 million weights would be slow"
    with torch.device('meta'): net = tv.VGG(nn.Identity(), 10, init_weights=False)
    net.features = tv.vgg.make_layers(tv.vgg.cfgs['A'], batch_norm=True)
    for i, (n_in, n_out) in {0: (512 * 49, 64), 3: (64, 64), 6: (64, 10)}.items():
        net.classifier[i] = nn.Linear(n_in, n_out)
    return net


def from_timm(arch, layer, inner=None):
    return Network(lambda: timm.create_model(arch, num_classes=10), layer, inner)


def vision_learner_body(): return create_vision_model(resnet18, 10, pretrained=False)


NETWORKS = {
    'fastai vision_learner': Network(vision_learner_body, '0', '0.6.1'),
    'fastai xresnet18': Network(lambda: xresnet18(n_out=10), '7', '6.0'),
    'resnet18': torchvision('resnet18', 'layer4', 'layer2.0'),
    'vgg11_bn': Network(vgg11_bn, 'features', 'features.21'),
    'densenet121': torchvision('densenet121', 'features', 'features.transition2'),
    'efficientnet_b0': torchvision('efficientnet_b0', 'features', 'features.5.1'),
    'mobilenet_v3_small': torchvision('mobilenet_v3_small', 'features', 'features.8'),
    'convnext_tiny': torchvision('convnext_tiny', 'features', 'features.5.4'),
    'regnet_y_400mf': torchvision('regnet_y_400mf', 'trunk_output',
                                  'trunk_output.block3.block3-1'),
    'shufflenet_v2_x0_5': torchvision('shufflenet_v2_x0_5', 'conv5', 'stage3.2'),
    'squeezenet1_1': torchvision('squeezenet1_1', 'classifier.2', 'features.12'),
    'googlenet': torchvision('googlenet', 'inception5b', has_aux=True),
    # its auxiliary head needs large images; below 107 pixels its map is one position
    'inception_v3': torchvision('inception_v3', 'Mixed_7c', size=128, train_size=299,
                                has_aux=True),
    'timm convnext_atto': from_timm('convnext_atto', 'stages', 'stages.2.blocks.3'),
    'timm regnetx_002': from_timm('regnetx_002', 's4', 's3.b2'),
    'timm resnetv2_50': from_timm('resnetv2_50', 'norm', 'stages.2.blocks.1'),
    'timm efficientnet_lite0': from_timm('efficientnet_lite0', 'bn2', 'blocks.4.1'),
    'timm dla34': from_timm('dla34', 'level5'),
    'timm hrnet_w18_small': from_timm('hrnet_w18_small', 'final_layer'),
}


def build(name: str, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return NETWORKS[name].make()


def images(n: int, size: int, seed: int = 0) -> Tensor:
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(seed))


def relative_gap(ours: Tensor, theirs: Tensor) -> float:
    return ((ours - theirs).norm() / theirs.norm()).item()


def hooked(model: nn.Module) -> list[str]:
    "Return the names of modules with a hook, or with a `forward` of their own"
    kinds = 'forward_hooks', 'forward_pre_hooks', 'backward_hooks', 'backward_pre_hooks'
    return [name for name, m in model.named_modules()
            if 'forward' in vars(m) or any(getattr(m, f'_{kind}') for kind in kinds)]


def same_weights(a: nn.Module, b: nn.Module) -> bool:
    ours, theirs = a.state_dict(), b.state_dict()
    return ours.keys() == theirs.keys() and all(ours[k].equal(theirs[k]) for k in ours)


def conv(n_in: int, n_out: int) -> nn.Module:
    layer = nn.Conv2d(n_in, n_out, 3, padding=1)
    return nn.Sequential(layer, nn.BatchNorm2d(n_out), nn.ReLU(inplace=True))


def small_network() -> nn.Module:
    "Return a network of four classes, always the same; its last feature map is '1'"
    torch.manual_seed(0)
    return nn.Sequential(conv(3, 8), conv(8, 8), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                         nn.Dropout(0.2), nn.Linear(8, 4))


class Compares(nn.Module):
    "A network with one encoder for two images"
    def __init__(self):
        super().__init__()
        self.encoder, self.fc = nn.Conv2d(3, 8, 3), nn.Linear(16, 4)

    def forward(self, a, b):
        features = [self.encoder(t).relu().mean((2, 3)) for t in (a, b)]
        return self.fc(torch.cat(features, 1))


class Recomputed(nn.Module):
    "A part of a network under gradient checkpointing"
    def __init__(self, part, reentrant=False):
        super().__init__()
        self.part, self.reentrant = part, reentrant

    def forward(self, x): return checkpoint(self.part, x, use_reentrant=self.reentrant)


class Spy(Callback):
    "Notes the logits just before SGDrop's `after_pred`, or just after it"
    def __init__(self, order): self.order, self.preds = order, []

    def after_pred(self):
        if self.training: self.preds.append(self.pred)


def spies() -> tuple[Spy, Spy]:
    return Spy(SGDropCallback.order - 0.5), Spy(SGDropCallback.order + 0.5)


def masked_images(cb: Callback) -> int:
    "Return how many images an SGDropCallback made holes in, in its last fit"
    return sum(row['images'] for row in cb.history)


def bare_loss(learn: Learner) -> float:
    "Return the loss of a learner's network, by itself, on the validation images"
    *xb, y = map(torch.stack, zip(*learn.dls.valid_ds))
    network = _clone_without_hooks(unwrapped(learn.model)).eval()
    with torch.no_grad(): return learn.loss_func(network(*xb), y).item()
