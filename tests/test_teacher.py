"A teacher follows a network in training."
import io

import pytest
import torch
from torch import nn

from networks import build, images, same_weights, small_network
from sgdrop.split import split_model
from sgdrop.teacher import EMATeacher


def steps(model, n, size=16):
    "Train a network on noise, and stop after each step"
    opt = torch.optim.SGD(model.parameters(), 0.01)
    for i in range(n):
        model.train()(images(4, size, seed=i)).square().mean().backward()
        opt.step()
        opt.zero_grad()
        yield i


def test_teacher_of_a_head_follows_the_head_only():
    model = build('resnet18')
    _, head = split_model(model)
    teacher = EMATeacher(head, 0.)
    for _ in steps(model, 2, size=64): teacher.update(head)
    shapes = [tuple(p.shape) for p in teacher.module.parameters()]
    assert shapes == [(10, 512), (10,)]
    for p, q in zip(teacher.module.parameters(), model.fc.parameters()):
        assert p.allclose(q)


def test_student_is_never_written_to():
    model, other = small_network(), small_network()
    teacher = EMATeacher(model, 0.5)
    for p in teacher.module.parameters(): p.add_(1)
    teacher.update(model)
    assert same_weights(model, other) and model.training
    assert all(p.requires_grad for p in model.parameters())


def test_saved_teacher_goes_on_where_it_stopped():
    model = small_network()
    teacher, file = EMATeacher(model, 0.9), io.BytesIO()
    for _ in steps(model, 3): teacher.update(model)
    torch.save(teacher.state_dict(), file)
    file.seek(0)
    other = EMATeacher(small_network(), 0.9)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert other.n_updates == 3 and same_weights(other.module, teacher.module)
    for p in model.parameters(): p.data.add_(1)
    for each in (teacher, other):
        assert not any(p.requires_grad for p in each.parameters())
        each.update(model)
    assert same_weights(other.module, teacher.module)


def linear(*sizes): return nn.Sequential(*[nn.Linear(3, n) for n in sizes])


@pytest.mark.parametrize('other', [
    linear(4), linear(4, 5),
    nn.Sequential(*linear(4, 2), nn.BatchNorm1d(2, affine=False))])
def test_student_of_another_structure_is_refused(other):
    teacher = EMATeacher(linear(4, 2), 0.9)
    with pytest.raises((ValueError, RuntimeError)): teacher.update(other)
