"What the notebook tells badly of `AttributionInterpretation`: other learners, other loaders, and that it leaves no trace"
import random

import captum.attr
import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from fastai.data.core import Datasets
from fastai.data.transforms import Categorize, IntToFloatTensor, Normalize, ToTensor
from fastai.learner import Learner
from fastai.losses import BCEWithLogitsLossFlat
from fastai.torch_core import TensorImage
from fastai.vision.augment import RandTransform
from fastai.vision.core import PILImage, imagenet_stats
from fastai.vision.learner import vision_learner
from torchvision.models import resnet18

from sgdrop.attribution import attribute
from sgdrop.metrics import effective_area, pixel_shares
from sgdrop.interpret import AttributionInterpretation, class_names, common_scale, total_variation
from sgdrop.split import eval_mode, split_model

matplotlib.use('agg')


@pytest.fixture
def learn(make_learner, small_net): return make_learner(small_net())


@pytest.fixture(autouse=True)
def no_open_figures():
    yield
    plt.close('all')


def photographs(n=12, size=40, bs=4, after_batch=()):
    "Loaders of three classes of PIL images, with their class, no augmentation unless it is given"
    rng = np.random.default_rng(0)
    files = [PILImage.create(rng.integers(0, 255, (size, size, 3), dtype=np.uint8)) for _ in range(n)]
    names = ['horn', 'golf ball', 'church']
    items = Datasets(range(n), [[lambda i: files[i]], [lambda i: names[i % 3], Categorize()]], splits=[range(n), range(n)])
    return items.dataloaders(bs=bs, after_item=[ToTensor()], after_batch=[IntToFloatTensor(), *after_batch, Normalize.from_stats(*imagenet_stats)], num_workers=0, device='cpu')


def test_every_image_is_measured_as_by_hand(learn):
    interp = AttributionInterpretation.from_learner(learn)
    x = torch.stack([item[0] for item in learn.dls.valid_ds])
    phi, psi = split_model(learn.model, None, x[:2])
    with eval_mode(learn.model): A = attribute(psi, phi(x))
    torch.testing.assert_close(interp.maps, A.sum(1, keepdim=True))
    torch.testing.assert_close(torch.tensor(interp.images.effective_area.tolist()), effective_area(A))
    torch.testing.assert_close(interp.shares([3, 5], (8, 8)), pixel_shares(A[[3, 5]], (8, 8)))


def test_losses_and_predictions_are_fastais(learn):
    interp = AttributionInterpretation.from_learner(learn)
    preds, y, losses = learn.get_preds(with_loss=True)
    torch.testing.assert_close(torch.tensor(interp.images.loss.tolist()), losses.as_subclass(torch.Tensor))
    assert interp.images.predicted.tolist() == [str(c) for c in preds.argmax(1).tolist()]
    assert interp.images.label.tolist() == [str(c) for c in y.tolist()]


def test_training_images_are_seen_whole_and_in_order(learn):
    interp = AttributionInterpretation.from_learner(learn, ds_idx=0)
    assert len(interp) == len(learn.dls.train_ds)
    assert interp.images.label.tolist() == [str(y.item()) for _, y in learn.dls.train_ds]


@pytest.mark.parametrize('make', [lambda dls: vision_learner(dls, resnet18, pretrained=False, n_out=3),
                                  lambda dls: Learner(dls, resnet18(num_classes=3))], ids=['vision_learner', 'traced ResNet'])
def test_photographs_with_other_networks(make):
    torch.manual_seed(0)
    learn = make(photographs())
    interp = AttributionInterpretation.from_learner(learn)
    table = interp.focus_table()
    assert table.index.tolist() == ['church', 'golf ball', 'horn', 'all'] and table.images.tolist() == [4, 4, 4, 12]
    axes = interp.plot_attributions([0, 7], vmax=3)
    assert axes.shape == (2, 2) and axes[0, 0].get_title() == 'horn' and axes[1, 0].images[-1].norm.vmax == 3
    assert interp.deletion_curve(n=5, steps=4).get_ylabel() == 'probability of the class'


def test_pictures_are_what_went_in():
    learn = Learner(photographs(), resnet18(num_classes=3))
    pictures = AttributionInterpretation.from_learner(learn).pictures([4, 0])
    for picture, i in zip(pictures, (4, 0)):
        original = torch.from_numpy(np.array(learn.dls.valid_ds[i][0])).permute(2, 0, 1) / 255
        torch.testing.assert_close(picture, original, atol=0.006, rtol=0)


@pytest.mark.parametrize('settings', [dict(method='gradcam'), dict(method=captum.attr.LayerGradCam), dict(layer='0'), dict(target='label'), dict(target=2)],
                         ids=str)
def test_other_attributions(learn, settings):
    interp = AttributionInterpretation.from_learner(learn, **settings)
    default = AttributionInterpretation.from_learner(learn)
    assert interp.maps.shape == default.maps.shape and not interp.maps.equal(default.maps)
    assert interp.compare(default, k=2).shape == (3, 2)


def test_maps_of_different_sizes_can_be_compared(make_learner, small_net):
    narrow, wide = make_learner(small_net()), make_learner(small_net(), size=8)
    narrow.model[1][0].stride = (2, 2)
    one, other = (AttributionInterpretation.from_learner(l) for l in (narrow, wide))
    assert one.maps.shape != other.maps.shape
    assert one.compare(other, k=3).shape == (3, 3)


def test_several_labels_per_image(make_learner, small_net):
    labels = (torch.rand(32, 4, generator=torch.Generator().manual_seed(0)) > 0.5).float()
    labels[:, 0] = 1
    interp = AttributionInterpretation.from_learner(make_learner(small_net(), labels=labels, loss_func=BCEWithLogitsLossFlat()))
    assert interp.images.label.tolist() == class_names(labels[:16].bool())
    assert interp.images.right.tolist() == [labels[i, int(p)] == 1 for i, p in enumerate(interp.images.predicted)]


def test_fastais_own_methods_work():
    learn = Learner(photographs(), resnet18(num_classes=3))
    interp = AttributionInterpretation.from_learner(learn)
    interp.plot_top_losses(2)
    interp.show_results([0, 1])
    losses, numbers = interp.top_losses(4)
    assert losses.tolist() == sorted(interp.images.loss, reverse=True)[:4]
    assert numbers.tolist() == interp.chosen('top_losses', 4)


def test_it_leaves_no_trace(learn):
    learn.model.train()
    learn.model[1][1].eval()
    before = {k: v.clone() for k, v in learn.model.state_dict().items()}
    modes = [m.training for m in learn.model.modules()]
    torch_state, python_state = torch.random.get_rng_state(), random.getstate()
    interp = AttributionInterpretation.from_learner(learn)
    interp.plot_attributions(k=2)
    interp.deletion_curve(n=4, steps=2)
    interp.compare(interp, k=2)
    assert torch.random.get_rng_state().equal(torch_state) and random.getstate() == python_state
    assert [m.training for m in learn.model.modules()] == modes
    assert all(v.equal(before[k]) for k, v in learn.model.state_dict().items())
    assert all(p.grad is None for p in learn.model.parameters())
    assert not any(m._forward_hooks for m in learn.model.modules())


def test_own_axes_are_used(learn):
    interp = AttributionInterpretation.from_learner(learn)
    _, axes = plt.subplots(3, 2, squeeze=False)
    assert interp.plot_attributions(k=2, axes=axes[:2])[0, 0] is axes[0, 0]
    assert interp.compare(interp, k=2, axes=axes)[2, 1] is axes[2, 1]
    assert interp.deletion_curve(n=4, steps=2, ax=axes[0, 0]) is axes[0, 0]


def test_different_labels_are_not_compared(make_learner, small_net):
    one, other = (AttributionInterpretation.from_learner(make_learner(small_net(), labels=torch.arange(32) % k)) for k in (4, 3))
    with pytest.raises(ValueError, match='labels of the two differ'): one.compare(other)


def test_disagreement_is_the_distance_between_distributions():
    one, other = torch.rand(5, 1, 4, 4).double(), torch.rand(5, 1, 4, 4).double()
    one, other = one / one.sum((1, 2, 3), keepdim=True), other / other.sum((1, 2, 3), keepdim=True)
    slowly = [sum(max(a - b, 0.) for a, b in zip(p.flatten().tolist(), q.flatten().tolist())) for p, q in zip(one, other)]
    assert total_variation(one, other).tolist() == pytest.approx(slowly)


def test_the_scale_leaves_out_one_pixel_in_a_hundred():
    shares = torch.arange(1000.).view(10, 1, 10, 10) / 1000
    assert common_scale(shares) == pytest.approx(98.9)
    assert common_scale(torch.full((1, 1, 10, 10), 0.01)) == 2.


def test_training_images_are_seen_without_augmentation():
    class Black(RandTransform):
        "Black images, in training only"
        split_idx, order = 0, IntToFloatTensor.order + 1
        def encodes(self, x: TensorImage): return x * 0

    learn = Learner(photographs(after_batch=[Black(p=1.)]), resnet18(num_classes=3))
    assert learn.dls.train.one_batch()[0].std((2, 3)).max() < 1e-6
    pictures = [AttributionInterpretation.from_learner(learn, ds_idx=i).pictures([0, 1]) for i in (0, 1)]
    assert pictures[0].equal(pictures[1]) and pictures[0].std() > 0.1
