"The teacher of a real network."
import io

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from networks import build, images, relative_gap, same_weights
from sgdrop.split import split_model
from sgdrop.teacher import EMATeacher, warm_decay


def steps(model, n, lr=0.01):
    "Train `model` on noise, and stop after each step"
    opt = torch.optim.SGD(model.parameters(), lr)
    for i in range(n):
        model.train()(images(4, 64, seed=i)).square().mean().backward()
        opt.step(); opt.zero_grad()
        yield i


def test_a_teacher_of_resnet18_equals_torchs_averaged_model():
    model = build('resnet18')
    ours, theirs = EMATeacher(model, 0.7, warmup=False), AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.7))
    theirs.update_parameters(model)  # its first update is a copy
    for _ in steps(model, 4): ours.update(model); theirs.update_parameters(model)
    for p, q, student in zip(ours.module.parameters(), theirs.module.parameters(), model.parameters()):
        assert relative_gap(p, q) < 1e-6
        assert not p.equal(student)


def test_a_teacher_that_warms_up_equals_an_average_in_float64():
    model = build('resnet18')
    teacher, slow = EMATeacher(model, 0.3), [p.detach().double() for p in model.parameters()]
    for t in steps(model, 5):
        teacher.update(model)
        decay = min(0.3, (1 + t) / (10 + t))
        slow = [decay * s + (1 - decay) * p.detach().double() for s, p in zip(slow, model.parameters())]
    assert warm_decay(0.3, 2) < 0.3 == warm_decay(0.3, 3)  # so that both sides of the warm-up were there
    for p, s in zip(teacher.module.parameters(), slow): assert relative_gap(p.double(), s) < 1e-6


def test_batchnorm_statistics_and_counters_are_carried():
    model = build('resnet18')
    teacher = EMATeacher(model, 0.9)
    for _ in steps(model, 3): teacher.update(model)
    assert teacher.module.bn1.num_batches_tracked == 3 and teacher.module.bn1.num_batches_tracked.dtype == torch.long
    assert all(b.equal(s) for b, s in zip(teacher.module.buffers(), model.buffers(), strict=True))


def test_a_teacher_of_a_head_follows_the_head_alone():
    model = build('resnet18')
    _, psi = split_model(model)
    teacher = EMATeacher(psi, 0.)
    for _ in steps(model, 2): teacher.update(psi)
    assert [tuple(p.shape) for p in teacher.module.parameters()] == [(10, 512), (10,)]
    assert all(p.allclose(q) for p, q in zip(teacher.module.parameters(), model.fc.parameters()))


def test_the_student_is_never_written_to():
    model, other = build('resnet18'), build('resnet18')
    teacher = EMATeacher(model, 0.5)
    for p in teacher.module.parameters(): p.add_(1)
    teacher.update(model)
    assert same_weights(model, other) and model.training and all(p.requires_grad for p in model.parameters())


def test_a_saved_teacher_goes_on_where_it_stopped():
    model = build('resnet18')
    teacher, file = EMATeacher(model, 0.9), io.BytesIO()
    for _ in steps(model, 3): teacher.update(model)
    torch.save(teacher.state_dict(), file)
    file.seek(0)
    other = EMATeacher(build('resnet18', seed=1), 0.9)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert other.n_updates == 3 and same_weights(other.module, teacher.module)
    for t in (teacher, other):
        for p in t.module.parameters(): assert not p.requires_grad
        t.update(build('resnet18', seed=2))
    assert same_weights(other.module, teacher.module)


def test_a_student_of_another_structure_is_refused():
    teacher = EMATeacher(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)), 0.9)
    with pytest.raises((ValueError, RuntimeError)): teacher.update(nn.Sequential(nn.Linear(3, 4)))
    with pytest.raises((ValueError, RuntimeError)): teacher.update(nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 2)))
    with_buffers = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    with pytest.raises((ValueError, RuntimeError)): EMATeacher(with_buffers).update(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4, track_running_stats=False)))
    with pytest.raises(RuntimeError, match='size mismatch'): teacher.load_state_dict(EMATeacher(nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 2))).state_dict())
