"A training that stops and resumes in a new process ends as if it had never stopped."
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fastai.callback.core import Callback

from half_a_training import SETTINGS, first_half, fit, learner, second_half
from networks import same_weights
from sgdrop.callback import SGDropCallback


@pytest.fixture(scope='module')
def half(tmp_path_factory):
    "A folder with the files of the first half of a training, and its state"
    folder = tmp_path_factory.mktemp('half')
    first_half(folder)
    return folder, torch.load(folder / 'sgdrop.pth', weights_only=True)


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
    "The network after a training without interruption"
    folder = tmp_path_factory.mktemp('whole')
    return fit(learner(folder), SGDropCallback(**SETTINGS)).model


def test_a_new_process_resumes(half, whole):
    folder, _ = half
    script = Path(__file__).with_name('half_a_training.py')
    done = subprocess.run(
        [sys.executable, script, folder], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    end = torch.load(folder / 'end.pth', weights_only=True)
    assert all(torch.equal(v, end[k]) for k, v in whole.state_dict().items())


def zeros(state):
    return {k: torch.zeros_like(v) if isinstance(v, torch.Tensor) else v
            for k, v in state.items()}


@pytest.mark.parametrize('part', ['teacher', 'rng'])
def test_teacher_and_random_state_are_needed(part, half, whole):
    folder, state = half
    changed = dict(teacher=zeros(state['teacher']),
                   rng=torch.Generator().manual_seed(0).get_state())
    assert not same_weights(whole, second_half(folder, **{part: changed[part]}).model)


def test_without_a_fit_there_is_no_state():
    with pytest.raises(ValueError, match='no state yet: fit first'):
        SGDropCallback().state_dict()


def test_the_state_of_skipped_epochs_is_the_loaded_one(half):
    folder, state = half
    noted = []
    def note(self): noted.append(self.sg_drop.state_dict()['teacher']['_extra_state'])
    second_half(folder, Callback(after_epoch=note))
    assert [extra['n_updates'] for extra in noted] == [8, 8, 12, 16]
