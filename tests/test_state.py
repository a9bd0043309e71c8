"A training that was stopped goes on, in a new process, as if it had never stopped."
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fastai.callback.core import Callback

from half_a_training import SETTINGS, first_half, fit, learner, second_half
from networks import same_weights
from sgdrop.callback import SGDropCallback


def test_four_epochs_are_two_and_two_in_a_new_process(tmp_path):
    whole = fit(learner(tmp_path), SGDropCallback(**SETTINGS)).model
    first_half(tmp_path)
    done = subprocess.run([sys.executable, Path(__file__).with_name('half_a_training.py'), tmp_path], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    end = torch.load(tmp_path / 'end.pth', weights_only=True)
    assert all(torch.equal(v, end[k]) for k, v in whole.state_dict().items())


@pytest.mark.parametrize('forgotten', ['teacher', 'rng'])
def test_what_is_saved_is_needed(forgotten, tmp_path):
    whole = fit(learner(tmp_path), SGDropCallback(**SETTINGS)).model
    first_half(tmp_path)
    state = torch.load(tmp_path / 'sgdrop.pth', weights_only=True)
    if forgotten == 'rng': state['rng'] = torch.Generator().manual_seed(0).get_state()
    else: state['teacher'] = {k: torch.zeros_like(v) if isinstance(v, torch.Tensor) else v for k, v in state['teacher'].items()}
    torch.save(state, tmp_path / 'sgdrop.pth')
    assert not same_weights(whole, second_half(tmp_path).model)


def test_a_state_for_other_settings_is_refused(tmp_path):
    first_half(tmp_path)
    state = torch.load(tmp_path / 'sgdrop.pth', weights_only=True)
    with pytest.raises(ValueError, match='saved with a teacher, and this training is without one'): SGDropCallback(teacher=None).load_state_dict(state)
    with pytest.raises(ValueError, match='there is no state yet'): SGDropCallback().state_dict()


def test_the_state_of_skipped_epochs_is_the_one_to_resume_from(tmp_path):
    first_half(tmp_path)
    state = torch.load(tmp_path / 'sgdrop.pth', weights_only=True)
    cb = SGDropCallback(**SETTINGS)
    cb.load_state_dict(state)
    assert cb.state_dict() is state
    noted = []
    learn = learner(tmp_path)
    learn.load('half')
    fit(learn, cb, Callback(after_epoch=lambda _: noted.append(cb.state_dict()['teacher']['_extra_state']['n_updates'])), start_epoch=2)
    assert noted == [8, 8, 12, 16]
