"`FocusRecorder` in fastai's training loop, and what shows its record."
import copy
import gc
import math
import pickle
import random
import time
import weakref

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from fastai.callback.core import Callback, CancelValidException
from fastai.callback.mixup import MixUp
from fastai.callback.progress import CSVLogger
from fastai.callback.schedule import Learner  # brings `lr_find`
from fastai.callback.tracker import SaveModelCallback
from fastai.data.core import DataLoaders, Datasets
from fastai.data.transforms import Categorize
from fastai.layers import ConvLayer, ResBlock
from fastai.learner import Recorder, load_learner
from fastai.losses import BCEWithLogitsLossFlat, CrossEntropyLossFlat
from fastai.metrics import accuracy, error_rate
from fastai.optimizer import SGD
from fastai.torch_core import TensorImage
from fastai.vision.augment import RandTransform
from torch import nn
from torch.utils.data import DataLoader

from networks import build, hooked, images, same_weights, small_network
from sgdrop.callback import SGDropCallback
from sgdrop.data import imagenette
from sgdrop.metrics import attribution_ratio, effective_area, model_attribution
from sgdrop.recorder import FocusRecorder, denormalize


class Jitter(RandTransform):
    "Augmentation that draws from all three generators"
    split_idx = 0
    def encodes(self, x: TensorImage):
        noise = 0.5 * torch.randn(x.shape)
        return x + noise + 0.2 * np.random.randn() + 0.2 * random.random()


N_TRAIN, N_VALID = 40, 16
COLUMNS = ['attribution_ratio', 'effective_area', 'generalization_gap']
KIND = torch.arange(56) % 4
# each kind has a colour, not always plain to see
PHOTOS = images(56, 8) + 0.3 * torch.eye(4)[KIND][:, :3, None, None]


def photo(i): return TensorImage(PHOTOS[i])
def kind(i): return str(KIND[i].item())
def spread(size, n, first=0): return first + torch.linspace(0, size - 1, n).long()


def loaders(where='after_batch', num_workers=0, n_valid=N_VALID):
    "Images that are augmented in training: one by one, in batches, or in the set"
    ranges = [range(N_TRAIN), range(N_TRAIN, N_TRAIN + n_valid)]
    image = [photo, Jitter(p=1.)] if where == 'dataset' else [photo]
    label = [kind, Categorize(['0', '1', '2', '3'])]
    items = Datasets(range(N_TRAIN + n_valid), [image, label], splits=ranges)
    transforms = {} if where == 'dataset' else {where: [Jitter(p=1.)]}
    return items.dataloaders(bs=8, device='cpu', num_workers=num_workers, **transforms)


def learner(net, path, cbs=None, metrics=accuracy, lr=0.2, **kwargs):
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)
    learn = Learner(loaders(**kwargs), net, loss_func=CrossEntropyLossFlat(), lr=lr,
                    opt_func=SGD, path=path, cbs=cbs, metrics=metrics)
    learn.remove_cb(learn.progress)
    learn.logger = lambda row: None
    return learn


@pytest.fixture
def recorded(tmp_path):
    "A recorder, and a learner of the small network that has it"
    recorder = FocusRecorder(n_images=10)
    return recorder, learner(small_network(), tmp_path, recorder)


def by_hand(net, recorder, part='valid'):
    "The last row, from the images themselves, without the recorder's loaders"
    first, size = dict(train=(0, N_TRAIN), valid=(N_TRAIN, N_VALID))[part]
    chosen = spread(size, min(recorder.n_images, size), first)
    A = model_attribution(net, PHOTOS[chosen], layer=recorder.layer,
                          method=recorder.method)
    right = copy.deepcopy(net).eval()(PHOTOS[chosen]).argmax(1) == KIND[chosen]
    measures = dict(attribution_ratio=attribution_ratio, effective_area=effective_area)
    row = {name: measure(A).mean().item() for name, measure in measures.items()}
    return row | dict(accuracy=right.float().mean().item())


def agrees(net, recorder):
    theirs, train = by_hand(net, recorder), by_hand(net, recorder, 'train')
    accuracies = train['accuracy'], theirs.pop('accuracy')
    theirs['train_accuracy'], theirs['valid_accuracy'] = accuracies
    theirs['generalization_gap'] = accuracies[0] - accuracies[1]
    ours = {name: recorder.history[-1][name] for name in theirs}
    return ours == pytest.approx(theirs, abs=1e-5)


def aligned(learn, recorder):
    "Do the rows of fastai's `Recorder` have the columns where its names say?"
    names, rows = list(learn.recorder.metric_names)[1:], learn.recorder.values
    names = names[:-1] if learn.recorder.add_time else names
    assert len(rows) == len(recorder.history)
    assert all(len(row) == len(names) for row in rows)
    return all(row[names.index(c)] == r[c] or math.isnan(r[c])
               for row, r in zip(rows, recorder.history) for c in recorder.columns)


def epochs(recorder): return [row['epoch'] for row in recorder.history]


# A training with it

class Generators(Callback):
    "The state of all generators at the end of each epoch"
    order = 90
    def before_fit(self): self.states = []
    def after_epoch(self):
        self.states.append((torch.get_rng_state().tolist(), random.getstate(),
                            np.random.get_state()[1].tolist()))


@pytest.mark.parametrize('other, num_workers', [
    (lambda: MixUp(0.4), 1), (lambda: SGDropCallback(rho=0.3, p=0.5), 0)],
    ids=['MixUp and a worker', 'SGDrop'])
def test_it_leaves_the_training_as_it_is(other, num_workers, tmp_path):
    def run(*recorder):
        where = 'after_item' if num_workers else 'after_batch'
        learn = learner(small_network(), tmp_path, num_workers=num_workers, where=where)
        learn.fit(2, cbs=[other(), *recorder, generators := Generators()])
        return learn, generators.states
    recorder = FocusRecorder(n_images=10)
    (plain, plain_states), (followed, states) = run(), run(recorder)
    assert same_weights(plain.model, followed.model) and states == plain_states
    modes = [[m.training for m in learn.model.modules()] for learn in (plain, followed)]
    assert modes[0] == modes[1] and not hooked(followed.model)
    rows = [[row[:3] for row in learn.recorder.values] for learn in (plain, followed)]
    assert rows[0] == rows[1] and torch.backends.cudnn.deterministic is False
    assert epochs(recorder) == [0, 1] and agrees(followed.model, recorder)


def test_another_augmentation_changes_the_training(tmp_path):
    "Otherwise the test above would show nothing"
    def trained(seed):
        learn = learner(small_network(), tmp_path)
        torch.manual_seed(seed)
        learn.fit(1)
        return learn.model
    assert not same_weights(trained(0), trained(1))


class Seen(Callback):
    "The sample of a recorder"
    order = 70
    def __init__(self, recorder): self.recorder = recorder
    def after_epoch(self):
        self.train, self.valid = (torch.cat([x.as_subclass(torch.Tensor) for x, _ in s])
                                  for s in self.recorder.samples)


def test_training_images_are_seen_without_augmentation(tmp_path):
    for where in ('after_item', 'after_batch', 'dataset'):
        recorder = FocusRecorder(n_images=10)
        learn = learner(small_network(), tmp_path, recorder, where=where)
        learn.fit(2, cbs=(seen := Seen(recorder)))
        assert seen.valid.equal(PHOTOS[spread(N_VALID, 10, N_TRAIN)])
        assert seen.train.equal(PHOTOS[spread(N_TRAIN, 10)])
        assert agrees(learn.model, recorder)
        batch = learn.dls.train.new(shuffle=False).one_batch()[0]  # still augmented
        assert not batch.as_subclass(torch.Tensor).equal(PHOTOS[:8])


def test_training_images_are_seen_with_augmentation_if_you_ask_for_it(tmp_path):
    recorder = FocusRecorder(n_images=10, augmented=True)
    learn = learner(small_network(), tmp_path, recorder)
    learn.fit(1, cbs=(seen := Seen(recorder)))
    assert not seen.train.equal(PHOTOS[spread(N_TRAIN, 10)])
    assert seen.valid.equal(PHOTOS[spread(N_VALID, 10, N_TRAIN)])


def test_a_row_is_what_you_measure_by_hand(tmp_path):
    net, sizes = small_network(), []
    net = nn.Sequential(net[0], nn.MaxPool2d(2), *net[1:])
    def largest(A):
        sizes.append(len(A))
        return A.amax((1, 2, 3))
    for settings in (dict(n_images=7, layer='0', method='gradcam'),
                     dict(n_images=1000, layer=net[0])):
        recorder = FocusRecorder(**settings, measures=dict(largest=largest))
        learner(net, tmp_path, recorder).fit(2)
        assert agrees(net, recorder) and epochs(recorder) == [0, 1]
        assert recorder.maps[1].shape == (4, 1, 8, 8)
        assert recorder.history[-1]['largest'] > 0
    assert sum(sizes) == 2 * 7 + 2 * N_VALID  # each image once an epoch


# Its columns

def test_values_stand_under_their_names(tmp_path):
    for metrics, recording in (([], dict(add_time=False)),
                               (accuracy, dict(train_metrics=True)),
                               ([accuracy, error_rate], dict(valid_metrics=False))):
        recorder = FocusRecorder(n_images=10, measures=dict(again=attribution_ratio))
        learn = learner(small_network(), tmp_path, recorder, metrics)
        learn.remove_cb(Recorder)
        learn.add_cb(Recorder(**recording))
        learn.fit(2)
        names = list(learn.recorder.metric_names)
        assert aligned(learn, recorder)
        assert [n for n in names if n in recorder.columns] == recorder.columns
        assert (names[-1] == 'time') == recording.get('add_time', True)


class CancelsValidation(Callback):
    def before_validate(self): raise CancelValidException


def test_a_cancelled_validation_leaves_the_columns_of_metrics_empty(recorded):
    recorder, learn = recorded
    learn.fit(2, cbs=CancelsValidation())
    assert aligned(learn, recorder) and agrees(learn.model, recorder)
    assert all(row[1:3] == [None] * 2 for row in learn.recorder.values)


def test_other_callbacks_find_the_columns(tmp_path, capsys):
    recorder = FocusRecorder(n_images=10)
    learn = learner(small_network(), tmp_path, recorder, lr=0.5)
    best = SaveModelCallback(monitor='effective_area', comp=np.less)
    learn.fit(4, cbs=[CSVLogger(), best])
    logged = type('Logged', (), dict(path=tmp_path, fname='history.csv'))
    table = CSVLogger.read_log(logged)
    fastai_names = ['epoch', 'train_loss', 'valid_loss', 'accuracy']
    assert list(table.columns) == [*fastai_names, *COLUMNS, 'time']
    for c in COLUMNS:
        assert table[c].tolist() == pytest.approx([row[c] for row in recorder.history])
    areas = [row['effective_area'] for row in recorder.history]
    kept = by_hand(learn.model, recorder)['effective_area']
    assert kept == pytest.approx(min(areas), abs=1e-5) and np.ptp(areas) > 1e-4


# When it records, and when not

def test_only_a_fit_makes_a_record_and_each_fit_its_own(recorded):
    recorder, learn = recorded
    logits = learn.validate()
    learn.get_preds()
    assert not recorder.history and len(logits) == 2
    learn.fit(2)
    kept, maps = copy.deepcopy(recorder.history), dict(recorder.maps)
    learn.lr_find(num_it=3, show_plot=False, suggest_funcs=None)
    assert len(learn.validate()) == 2
    learn.validate(ds_idx=0)
    learn.get_preds(ds_idx=0, with_loss=True)
    learn.predict(TensorImage(PHOTOS[0]))
    assert recorder.history == kept and recorder.maps == maps
    for n in (3, 1):
        learn.fit(n)
        assert epochs(recorder) == list(recorder.maps) == list(range(n))
        assert aligned(learn, recorder) and agrees(learn.model, recorder)


class Failure(Exception): pass


class Stops(Callback):
    order = 80
    def __init__(self, error, event, epoch=1):
        self.error, self.at_epoch = error, epoch
        setattr(self, event, self.stop)
    def stop(self):
        if self.epoch == self.at_epoch: raise self.error


@pytest.mark.parametrize('error, event, n', [
    (KeyboardInterrupt(), 'after_batch', 1), (Failure('stop'), 'after_validate', 2)])
def test_after_a_fit_that_broke_off_the_next_one_is_recorded(error, event, n, recorded):
    recorder, learn = recorded
    with pytest.raises(type(error)): learn.fit(3, cbs=Stops(error, event))
    learn.validate()
    learn.get_preds()
    assert len(recorder.history) == len(recorder.maps) == n
    stop = Stops(KeyboardInterrupt(), 'after_batch', epoch=0)
    learn.add_cb(stop)
    with pytest.raises(KeyboardInterrupt):
        learn.lr_find(num_it=3, show_plot=False, suggest_funcs=None)
    learn.remove_cb(stop)
    learn.fit(2)
    assert epochs(recorder) == [0, 1] and aligned(learn, recorder)
    assert agrees(learn.model, recorder)


def test_an_interrupt_while_measuring_leaves_everything_in_order(tmp_path):
    def interrupted(head, z, classes):
        random.random()
        np.random.rand()
        torch.rand(3)
        raise KeyboardInterrupt
    recorder = FocusRecorder(n_images=10, method=interrupted)
    learn = learner(small_network(), tmp_path, recorder)
    class States(Generators):
        order = 45  # before it measures
        def after_validate(self): self.after_epoch()
    with pytest.raises(KeyboardInterrupt): learn.fit(1, cbs=(before := States()))
    now = (torch.get_rng_state().tolist(), random.getstate(),
           np.random.get_state()[1].tolist())
    assert before.states[-1] == now
    assert not hooked(learn.model) and torch.is_grad_enabled()


def test_a_fit_that_starts_at_a_later_epoch_is_recorded_from_there(recorded):
    recorder, learn = recorded
    learn.fit(4, start_epoch=2)
    assert epochs(recorder) == [2, 3]
    for chosen, titles in ((None, ['', 'epoch 3', 'epoch 4']), ([3], ['', 'epoch 4'])):
        axes = recorder.plot_maps(chosen)
        assert [ax.get_title() for ax in axes[0]] == titles
    plt.close('all')


# Which sets, labels and networks

def test_without_validation_images_the_training_images_are_measured(tmp_path):
    recorder = FocusRecorder(n_images=10)
    learn = learner(small_network(), tmp_path, recorder, n_valid=0)
    learn.fit(2)
    row, theirs = recorder.history[-1], by_hand(learn.model, recorder, 'train')
    assert aligned(learn, recorder) and math.isnan(row['generalization_gap'])
    assert row['effective_area'] == pytest.approx(theirs['effective_area'], abs=1e-5)
    assert row['train_accuracy'] == pytest.approx(theirs['accuracy'], abs=1e-5)
    assert len(recorder.plot_maps()) == 4 and recorder.plot()
    plt.close('all')


def test_of_several_labels_the_predicted_class_must_be_one(make_learner):
    generator = torch.Generator().manual_seed(2)
    labels = (torch.rand(32, 4, generator=generator) < 0.5).float()
    recorder = FocusRecorder(n_images=1000)
    learn = make_learner(small_network(), recorder, labels=labels,
                         loss_func=BCEWithLogitsLossFlat())
    learn.fit(1)
    best = learn.model.eval()(images(32, 8)).argmax(1)
    right, row = labels.gather(1, best[:, None])[:, 0], recorder.history[-1]
    assert row['train_accuracy'] == pytest.approx(right.mean().item())
    assert row['valid_accuracy'] == pytest.approx(right[:16].mean().item())


def test_a_network_within_data_parallel_is_followed(tmp_path):
    recorder = FocusRecorder(n_images=10, layer='1')
    net = nn.DataParallel(small_network(), device_ids=[])  # on the CPU
    learner(net, tmp_path, recorder).fit(2)
    assert agrees(net.module, recorder)


def test_a_layer_within_a_residual_block_is_followed(make_learner):
    recorder = FocusRecorder(n_images=5, layer='layer4.1.conv1')
    learn = make_learner(build('resnet18'), recorder, n=8, bs=4, size=64, classes=10)
    learn.fit(1, 1e-3)
    x = images(8, 64)[spread(8, 5)]
    ratio = attribution_ratio(model_attribution(learn.model, x, layer=recorder.layer))
    # the sample comes in batches of four, which rounds values near zero otherwise
    ours = recorder.history[0]['attribution_ratio']
    assert ours == pytest.approx(ratio.mean().item(), abs=2e-3)
    assert not hooked(learn.model)


def test_loaders_of_plain_torch_are_refused(tmp_path):
    dl = DataLoader(list(zip(PHOTOS, KIND)), batch_size=8)
    learn = Learner(DataLoaders(dl, dl), small_network(), path=tmp_path,
                    loss_func=CrossEntropyLossFlat(), cbs=FocusRecorder())
    with pytest.raises(TypeError, match='from_dsets'), learn.no_bar(): learn.fit(1)


# What it holds and what is exported

def test_after_the_fit_it_holds_neither_the_network_nor_the_sample(tmp_path):
    class Refs(Callback):
        order = 70
        def after_epoch(self):
            batches = sum(recorder.samples, [])
            self.sample = [weakref.ref(t) for batch in batches for t in batch]
    recorder, learn = FocusRecorder(n_images=10), learner(small_network(), tmp_path)
    learn.fit(1, cbs=[recorder, refs := Refs()])
    gone = [weakref.ref(o) for o in (learn, learn.model, learn.model[0])] + refs.sample
    del learn
    gc.collect()
    assert [ref() for ref in gone] == [None] * len(gone) and len(gone) > 6
    assert len(recorder.history) == 1


def test_an_exported_learner_comes_back_and_records_on(tmp_path):
    net = small_network()
    recorder = FocusRecorder(n_images=10, layer=net[0], n_maps=2)
    learn = learner(net, tmp_path, recorder)
    learn.logger = print  # can be pickled
    for epochs_before in (0, 2):
        if epochs_before: learn.fit(epochs_before)
        learn.export()
        loaded = load_learner(tmp_path / 'export.pkl')
        cb, = [cb for cb in loaded.cbs if isinstance(cb, FocusRecorder)]
        assert same_weights(loaded.model, net) and cb.history == recorder.history
        loaded.predict(TensorImage(PHOTOS[0]))
        loaded.dls = learn.dls
        loaded.fit(1)
        assert aligned(loaded, cb) and cb.maps[0].shape == (2, 1, 8, 8)


def test_an_export_holds_neither_a_second_network_nor_the_sample(tmp_path):
    def size(cb):
        large = nn.Linear(8, 5000), nn.Linear(5000, 4)
        net = nn.Sequential(*small_network()[:-1], *large)
        learn = learner(net, tmp_path, cb)
        learn.logger = print
        stop = Stops(Failure('stop'), 'after_train')  # so that there is no `after_fit`
        with pytest.raises(Failure): learn.fit(3, cbs=stop)
        learn.export()
        return (tmp_path / 'export.pkl').stat().st_size
    # the sample would be 56 images of 768 bytes
    assert size(FocusRecorder()) < size(None) + 20_000


def test_a_copy_does_the_same(tmp_path):
    def fit(cb, n): learner(small_network(), tmp_path).fit(n, cbs=cb)
    recorder = FocusRecorder(n_images=10)
    fit(recorder, 2)
    twins = copy.deepcopy(recorder), pickle.loads(pickle.dumps(recorder))
    for twin in twins:
        assert twin.history == recorder.history and len(twin.maps) == 2
        assert twin.plot() is not None and twin.plot_maps() is not None
    plt.close('all')
    for cb in (recorder, *twins): fit(cb, 1)
    for twin in twins:
        assert twin.history == recorder.history
        assert twin.maps[0].equal(recorder.maps[0]) and len(twin.maps) == 1


# Its pictures

def test_a_single_epoch_is_drawn(recorded):
    recorder, learn = recorded
    for draw in (recorder.plot, recorder.plot_maps):
        with pytest.raises(ValueError, match='fit first'): draw()
    learn.fit(1)
    ax = plt.subplots()[1]
    assert recorder.plot(ax) is ax
    twin, = [a for a in ax.figure.axes if a is not ax]
    for line, column in ((ax.lines[0], COLUMNS[0]), (twin.lines[0], COLUMNS[2])):
        assert line.get_ydata().tolist() == [recorder.history[0][column]]
        assert line.get_marker() != 'None'
    plt.close('all')


def test_maps_are_of_the_images_and_epochs_they_say(tmp_path):
    recorder, net = FocusRecorder(n_images=10, n_maps=3), small_network()
    learner(net, tmp_path, recorder).fit(6)
    photos = PHOTOS[spread(N_VALID, 10, N_TRAIN)[spread(10, 3)]]
    A = model_attribution(net, photos).sum(1, keepdim=True)
    torch.testing.assert_close(recorder.maps[5], A, rtol=1e-4, atol=1e-5)
    # the loader does not know how they were normalized
    low, high = (f(photos, (1, 2, 3), keepdim=True) for f in (torch.amin, torch.amax))
    torch.testing.assert_close(recorder.images, (photos - low) / (high - low))
    axes = recorder.plot_maps(vmax=7.)
    titles = [ax.get_title() for ax in axes[0]]
    assert titles == ['', 'epoch 1', 'epoch 2', 'epoch 4', 'epoch 6']
    assert axes[0, -1].images[-1].get_clim() == (0, 7)
    assert recorder.plot_maps([0, 5], axes=axes[:, :3]).shape == (3, 3)
    plt.close('all')


def test_as_many_maps_as_asked_for_are_kept(tmp_path):
    for n_maps, kept in ((0, 0), (100, 10)):
        recorder = FocusRecorder(n_images=10, n_maps=n_maps)
        learner(small_network(), tmp_path, recorder).fit(1)
        assert len(recorder.maps[0]) == len(recorder.images) == kept


def test_images_are_shown_between_0_and_1_on_any_scale(tmp_path):
    dl = learner(small_network(), tmp_path).dls.valid
    x = torch.rand(2, 3, 4, 4)
    assert denormalize(dl, x).equal(x)
    bytes_of = denormalize(dl, (255 * x).round())
    torch.testing.assert_close(bytes_of, x, atol=0.01, rtol=0)
    for strange in (10 * x - 5, torch.zeros(2, 3, 4, 4) - 3):
        shown = denormalize(dl, strange)
        assert 0 <= shown.min() and shown.max() <= 1


# What it costs

@pytest.fixture
def one_thread():
    "`process_time` adds up the time of all threads"
    n = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n)


def small_resnet(n_out):
    blocks = [ConvLayer(3, 32, stride=2), ResBlock(1, 32, 64, stride=2),
              ResBlock(1, 64, 128, stride=2)]
    return nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                         nn.Linear(128, n_out))


@pytest.mark.photographs
def test_it_adds_at_most_a_twentieth_to_an_epoch_of_imagenette(one_thread, tmp_path):
    """Extrapolate from 320 training and 200 validation images to the whole set.
    It has 9,469 and 3,925. The recorder's own cost does not depend on the set's size.
    What counts is the time of the processor, at 64 pixels."""
    dls = imagenette(n_per_class=32, num_workers=0)
    few = spread(len(dls.valid_ds), 200).tolist()
    dls = DataLoaders(dls.train, dls.valid.new(get_idxs=lambda: few, n=200))
    cost = dict(train=[], valid=[], recorder=[])
    class Timed(FocusRecorder):
        def after_validate(self):
            began = time.process_time()
            super().after_validate()
            cost['recorder'].append(time.process_time() - began)
    class Clock(Callback):
        order = FocusRecorder.order - 0.5  # stops before the recorder begins
        def before_train(self): self.began = time.process_time()
        def after_train(self): cost['train'].append(time.process_time() - self.began)
        def before_validate(self): self.began = time.process_time()
        def after_validate(self): cost['valid'].append(time.process_time() - self.began)
    learn = Learner(dls, small_resnet(10), loss_func=CrossEntropyLossFlat(),
                    metrics=accuracy, path=tmp_path)
    with learn.no_bar(), learn.no_logging(): learn.fit(2, cbs=[Timed(), Clock()])
    epoch = min(cost['train']) * 9469 / 320 + min(cost['valid']) * 3925 / 200
    first, later = (1 + seconds / epoch for seconds in cost['recorder'])
    assert first <= 1.05 and later <= 1.03
