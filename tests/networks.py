"The networks that sgdrop promises to work with: how to make each with random weights and ten classes, and where its last feature map is."
from collections.abc import Callable
from typing import NamedTuple

import timm
import torch
from fastai.callback.core import Callback
from fastai.callback.fp16 import MixedPrecision
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
    make: Callable[[], nn.Module]
    layer: str             # the last feature map
    size: int = 64         # pixels
    train_size: int = 64   # pixels it needs in training mode
    has_aux: bool = False  # does it return several outputs in training mode?


def vision(arch, layer, **options):
    return Network(lambda: getattr(tv, arch)(num_classes=10, **options), layer)


def vgg11(batch_norm):
    "torchvision's VGG-11, its head with fewer units, since 120 million weights would make for slow tests"
    with torch.device('meta'): net = tv.VGG(nn.Identity(), num_classes=10, init_weights=False)
    net.features = tv.vgg.make_layers(tv.vgg.cfgs['A'], batch_norm)
    for i, (n_in, n_out) in {0: (512 * 49, 64), 3: (64, 64), 6: (64, 10)}.items(): net.classifier[i] = nn.Linear(n_in, n_out)
    return net


def from_timm(arch, layer):
    return Network(lambda: timm.create_model(arch, num_classes=10), layer)


NETWORKS = {
    'fastai vision_learner': Network(lambda: create_vision_model(resnet18, 10, pretrained=False), '0'),
    'fastai xresnet18': Network(lambda: xresnet18(n_out=10), '7'),
    'resnet18': vision('resnet18', 'layer4'),
    'vgg11': Network(lambda: vgg11(False), 'features'),
    'vgg11_bn': Network(lambda: vgg11(True), 'features'),
    'densenet121': vision('densenet121', 'features'),
    'efficientnet_b0': vision('efficientnet_b0', 'features'),
    'mobilenet_v2': vision('mobilenet_v2', 'features'),
    'mobilenet_v3_small': vision('mobilenet_v3_small', 'features'),
    'convnext_tiny': vision('convnext_tiny', 'features'),
    'regnet_y_400mf': vision('regnet_y_400mf', 'trunk_output'),
    'shufflenet_v2_x0_5': vision('shufflenet_v2_x0_5', 'conv5'),
    'mnasnet0_5': vision('mnasnet0_5', 'layers'),
    'squeezenet1_1': vision('squeezenet1_1', 'classifier.2'),
    'googlenet': vision('googlenet', 'inception5b', init_weights=False)._replace(has_aux=True),
    # its auxiliary head has no room for a smaller image, and at less than 107 pixels its last map is a single position
    'inception_v3': vision('inception_v3', 'Mixed_7c', init_weights=False)._replace(size=128, train_size=299, has_aux=True),
    'timm convnext_atto': from_timm('convnext_atto', 'stages'),
    'timm regnetx_002': from_timm('regnetx_002', 's4'),
    'timm resnetv2_50': from_timm('resnetv2_50', 'norm'),
    'timm resnet10t': from_timm('resnet10t', 'layer4'),
    'timm efficientnet_lite0': from_timm('efficientnet_lite0', 'bn2'),
    'timm mobilenetv3_small_050': from_timm('mobilenetv3_small_050', 'blocks'),
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
    "Names of the modules that still hold a hook, or a `forward` that is not their class's"
    kinds = '_forward_hooks', '_forward_pre_hooks', '_backward_hooks', '_backward_pre_hooks'
    return [name for name, m in model.named_modules() if 'forward' in vars(m) or any(getattr(m, kind) for kind in kinds)]


def same_weights(a: nn.Module, b: nn.Module) -> bool:
    ours, theirs = a.state_dict(), b.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)


def conv(n_in: int, n_out: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(n_in, n_out, 3, padding=1), nn.BatchNorm2d(n_out), nn.ReLU(inplace=True))


def small_network() -> nn.Module:
    "A small network of four classes, always with the same weights; its last feature map is '1'"
    torch.manual_seed(0)
    return nn.Sequential(conv(3, 8), conv(8, 8), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.2), nn.Linear(8, 4))


class Compares(nn.Module):
    "Two images, or one twice, through one encoder"
    def __init__(self): super().__init__(); self.encoder, self.fc = nn.Conv2d(3, 8, 3), nn.Linear(16, 4)
    def forward(self, a, b): return self.fc(torch.cat([self.encoder(t).relu().mean((2, 3)) for t in (a, b)], 1))


class Recomputed(nn.Module):
    "A part of a network under gradient checkpointing"
    def __init__(self, part, reentrant=False):
        super().__init__()
        self.part, self.reentrant = part, reentrant
    def forward(self, x): return checkpoint(self.part, x, use_reentrant=self.reentrant)


class Autocast(Callback):
    "What MixedPrecision does on a GPU, in bfloat16 on the CPU"
    order = MixedPrecision.order
    def before_batch(self): self.cast = torch.autocast('cpu', torch.bfloat16); self.cast.__enter__()
    def after_pred(self): self.learn.pred = self.pred.float()
    def after_loss(self): self.cast.__exit__(None, None, None)


class Spy(Callback):
    "Notes the logits before SGDrop saw them (`order` just below its own) or after"
    def __init__(self, order): self.order, self.preds = order, []
    def after_pred(self):
        if self.training: self.preds.append(self.pred)


def spies() -> tuple[Spy, Spy]: return Spy(SGDropCallback.order - 0.5), Spy(SGDropCallback.order + 0.5)


def masked_images(cb: Callback) -> int:
    "How many images an SGDropCallback made holes in, in its last fit"
    return sum(row['images'] for row in cb.history)


def bare_loss(learn: Learner) -> float:
    "What a learner's network, by itself and in evaluation mode, makes of the validation images"
    *xb, y = map(torch.stack, zip(*learn.dls.valid_ds))
    with torch.no_grad(): return learn.loss_func(_clone_without_hooks(unwrapped(learn.model)).eval()(*xb), y).item()
