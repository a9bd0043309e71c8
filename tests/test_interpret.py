"`AttributionInterpretation` with other learners and loaders, and without side effects"
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
from sgdrop.interpret import (
    AttributionInterpretation, _class_names, total_variation)
from sgdrop.metrics import effective_area
from sgdrop.plots import common_scale
from sgdrop.split import eval_mode, split_model

matplotlib.use('agg')
from_learner = AttributionInterpretation.from_learner


@pytest.fixture
def learn(make_learner, small_net): return make_learner(small_net())


@pytest.fixture(autouse=True)
def no_open_figures():
    yield
    plt.close('all')


class Black(RandTransform):
    "Black images, in training only"
    split_idx, order = 0, IntToFloatTensor.order + 1
    def encodes(self, x: TensorImage): return x * 0


def photographs(n=12, size=40, bs=4):
    "Loaders of noise, as PIL images of three classes; in training they are blackened"
    rng = np.random.default_rng(0)
    pixels = [rng.integers(0, 255, (size, size, 3), dtype=np.uint8) for _ in range(n)]
    names = ['horn', 'golf ball', 'church']
    def image(i): return PILImage.create(pixels[i])
    def label(i): return names[i % 3]
    items = Datasets(range(n), [[image], [label, Categorize()]], splits=[range(n)] * 2)
    normalize = Normalize.from_stats(*imagenet_stats)
    return items.dataloaders(
        bs=bs, after_item=[ToTensor()], num_workers=0, device='cpu',
        after_batch=[IntToFloatTensor(), Black(p=1.), normalize])


@pytest.fixture(scope='module')
def of_photographs():
    "An interpretation of a ResNet that has to be traced"
    torch.manual_seed(0)
    return from_learner(Learner(photographs(), resnet18(num_classes=3)))


def test_each_image_is_measured_as_by_hand(learn):
    interp = from_learner(learn)
    x = torch.stack([item[0] for item in learn.dls.valid_ds])
    body, head = split_model(learn.model, None, x[:2])
    with eval_mode(learn.model): A = attribute(head, body(x))
    torch.testing.assert_close(interp.maps, A.sum(1, keepdim=True))
    area = torch.tensor(interp.images.effective_area.tolist())
    torch.testing.assert_close(area, effective_area(A))


def test_losses_and_predictions_are_those_of_fastai(learn):
    images = from_learner(learn).images
    preds, y, losses = learn.get_preds(with_loss=True)
    assert images.loss.tolist() == pytest.approx(losses.tolist(), rel=1e-5)
    assert images.predicted.tolist() == [str(c) for c in preds.argmax(1).tolist()]
    assert images.label.tolist() == [str(c) for c in y.tolist()]


def test_the_methods_of_fastai_work(of_photographs):
    of_photographs.plot_top_losses(2)
    of_photographs.show_results([0, 1])
    losses, numbers = of_photographs.top_losses(4)
    assert losses.tolist() == sorted(of_photographs.images.loss, reverse=True)[:4]
    assert numbers.tolist() == of_photographs.chosen('top_losses', 4)


def test_a_vision_learner_is_measured_and_plotted():
    learn = vision_learner(photographs(), resnet18, pretrained=False, n_out=3)
    interp = from_learner(learn)
    table = interp.focus_table()
    assert table.index.tolist() == ['church', 'golf ball', 'horn', 'all']
    assert table.images.tolist() == [4, 4, 4, 12]
    axes = interp.plot_attributions([0, 7], vmax=3)
    assert axes.shape == (2, 2) and axes[0, 0].get_title() == 'true: horn'
    assert axes[1, 0].images[-1].norm.vmax == 3
    assert len(interp.deletion_curve(n=5, steps=4).lines) == 2


def test_pictures_are_the_original_images(of_photographs):
    for picture, i in zip(of_photographs.pictures([4, 0]), (4, 0)):
        pixels = np.array(of_photographs.dl.dataset[i][0])
        original = torch.from_numpy(pixels).permute(2, 0, 1) / 255
        torch.testing.assert_close(picture, original, atol=0.006, rtol=0)


def test_training_images_are_whole_unaugmented_and_in_order(of_photographs):
    learn = of_photographs.learn
    assert learn.dls.train.one_batch()[0].std((2, 3)).max() < 1e-6  # blackened
    of_training = from_learner(learn, ds_idx=0)
    assert of_training.images.label.tolist() == ['horn', 'golf ball', 'church'] * 4
    assert of_training.pictures([0, 1]).equal(of_photographs.pictures([0, 1]))
    assert of_training.maps.equal(of_photographs.maps)


@pytest.mark.parametrize('settings', [
    dict(method='gradcam', layer='0'), dict(target=2),
    dict(method=captum.attr.LayerGradCam, target='label')], ids=str)
def test_other_attributions(learn, settings):
    interp, default = from_learner(learn, **settings), from_learner(learn)
    assert interp.maps.shape == default.maps.shape
    assert not interp.maps.equal(default.maps)
    assert interp.compare(default, k=2).shape == (3, 2)


def test_maps_of_different_sizes_are_compared(make_learner, small_net):
    coarse, fine = make_learner(small_net()), make_learner(small_net())
    coarse.model[1][0].stride = (2, 2)
    one, other = from_learner(coarse), from_learner(fine)
    assert one.maps.shape != other.maps.shape
    assert one.compare(other, k=3).shape == (3, 3)


def test_several_labels_per_image(make_learner, small_net):
    g = torch.Generator().manual_seed(0)
    labels = (torch.rand(32, 4, generator=g) > 0.5).float()
    labels[:, 0] = 1
    learn = make_learner(small_net(), labels=labels, loss_func=BCEWithLogitsLossFlat())
    images = from_learner(learn).images
    assert images.label.tolist() == _class_names(labels[:16].bool())
    right = [labels[i, int(p)] == 1 for i, p in enumerate(images.predicted)]
    assert images.right.tolist() == right
    probable = learn.get_preds()[0].amax(1)
    assert images.probability.tolist() == pytest.approx(probable.tolist(), rel=1e-5)


def test_different_labels_are_not_compared(make_learner, small_net):
    learners = [make_learner(small_net(), labels=torch.arange(32) % k) for k in (4, 3)]
    one, other = map(from_learner, learners)
    with pytest.raises(ValueError, match='16 and 16 with different labels'):
        one.compare(other)


def test_it_leaves_no_trace(learn):
    learn.model.train()
    learn.model[1][1].eval()
    before = {k: v.clone() for k, v in learn.model.state_dict().items()}
    modes = [m.training for m in learn.model.modules()]
    torch_state, python_state = torch.random.get_rng_state(), random.getstate()
    interp = from_learner(learn)
    interp.plot_attributions(k=2)
    interp.deletion_curve(n=4, steps=2)
    interp.compare(interp, k=2)
    assert torch.random.get_rng_state().equal(torch_state)
    assert random.getstate() == python_state
    assert [m.training for m in learn.model.modules()] == modes
    assert all(v.equal(before[k]) for k, v in learn.model.state_dict().items())
    assert all(p.grad is None for p in learn.model.parameters())
    assert not any(m._forward_hooks for m in learn.model.modules())


def test_given_axes_are_used(learn):
    interp = from_learner(learn)
    _, axes = plt.subplots(3, 2, squeeze=False)
    plt.figure()  # another figure is the current one
    assert interp.plot_attributions(k=2, axes=axes[:2])[0, 0] is axes[0, 0]
    assert interp.compare(interp, k=2, axes=axes)[2, 1] is axes[2, 1]
    assert interp.deletion_curve(n=4, steps=2, ax=axes[0, 0]) is axes[0, 0]
    with pytest.raises(ValueError, match='axes must be 3×2'):
        interp.compare(interp, k=2, axes=axes[:2])


def test_networks_share_a_scale_and_images_of_one_network_do_not(learn):
    interp = from_learner(learn)
    def scales(axes): return {ax.images[-1].norm.vmax for ax in axes[1:].flat}
    assert len(scales(interp.compare(interp, k=4))) == 1
    assert len(scales(interp.plot_attributions(k=4))) > 1
    assert scales(interp.plot_attributions(k=4, vmax=3)) == {3}


def test_long_class_names_are_wrapped(learn):
    interp = from_learner(learn)
    interp.images['label'] = interp.images['predicted'] = 'black-and-tan coonhound'
    axes = interp.plot_attributions(k=2)
    for ax in axes.flat:
        assert max(map(len, ax.get_title().splitlines())) <= 20
        assert 'coonhound' in ax.get_title()


def test_total_variation_is_the_distance_between_distributions():
    one, other = (torch.rand(5, 1, 4, 4).double().softmax(3) / 4 for _ in range(2))
    pairs = zip(one.flatten(1).tolist(), other.flatten(1).tolist())
    slowly = [sum(max(a - b, 0.) for a, b in zip(p, q)) for p, q in pairs]
    assert total_variation(one, other).tolist() == pytest.approx(slowly)


def test_the_scale_leaves_out_one_pixel_in_a_hundred():
    shares = torch.arange(1000.).view(10, 1, 10, 10) / 1000
    assert common_scale(shares) == pytest.approx(98.9)
    assert common_scale(torch.full((1, 1, 10, 10), 0.01)) == 2.


def test_pictures_are_those_of_the_rows_where_the_loader_is_a_subset(of_photographs):
    dl = of_photographs.dl.new(get_idxs=lambda: [5, 2, 7], n=3)
    part = from_learner(of_photographs.learn, dl=dl)
    assert part.maps.allclose(of_photographs.maps[[5, 2, 7]])
    assert part.pictures([1, 2]).equal(of_photographs.pictures([2, 7]))
