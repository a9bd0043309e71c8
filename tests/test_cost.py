"The step-cost table: turns, ratios, memory, the rivals' mask, and the command"
import sys

import pandas as pd
import pytest
import torch
from torch import nn

from sgdrop import cost, dropout
from sgdrop.callback import SGDropCallback
from sgdrop.experiments.demo import main
from sgdrop.experiments.overhead import (
    VARIANTS, WholeModelMask, captum_saliency, cost_plan, cost_table,
    grad_cam_saliency, input_saliency, mask_agreement, part_steps, parts_table,
    peak_memory, ratios, step_learner, take_turns, training_step, variant_steps)


@pytest.fixture
def net(small_net):
    "Of ten classes, as the noise has; no dropout, so that one step is like another"
    torch.manual_seed(0)
    return nn.Sequential(*small_net()[:4], nn.Linear(8, 10))


def test_each_turn_has_every_step_once_and_neighbours_change():
    order = []
    seconds = take_turns({name: lambda name=name: order.append(name) for name in 'abcd'}, turns=8, warmup=2)
    turns = [order[i:i + 4] for i in range(0, 40, 4)]
    assert len(order) == 40 and all(sorted(turn) == list('abcd') for turn in turns)
    assert seconds.shape == (8, 4) and list(seconds) == list('abcd')
    assert {turn[0] for turn in turns} == set('abcd')
    before_b = {turn[turn.index('b') - 1] for turn in turns if turn[0] != 'b'}
    assert before_b == {'a', 'c'}


def test_warmup_is_not_timed():
    "The first call of each step works hard, the others do nothing"
    calls = dict(plain=0, other=0)
    def step(name):
        calls[name] += 1
        if calls[name] == 1: torch.randn(300, 300).matrix_power(200)
    seconds = take_turns({name: lambda name=name: step(name) for name in calls}, turns=3)
    assert seconds.to_numpy().max() < 0.02


def test_ratios_are_of_the_same_turn():
    "A machine that is ten times slower for a while changes no ratio"
    slow = [1., 10., 1., 10., 1.]
    seconds = pd.DataFrame(dict(plain=slow, dear=[1.5 * s for s in slow], noisy=[1., 20., 3., 40., 5.]))
    table = ratios(seconds)
    assert table.loc['plain'].eq(1).all() and table.loc['dear'].eq(1.5).all()
    assert table.loc['noisy'].tolist() == [2, 3, 4]
    assert ratios(seconds, to='dear').loc['plain', 'median'] == pytest.approx(1 / 1.5)


def test_peak_memory_counts_what_was_freed_and_not_what_was_there():
    there = torch.empty(50, 2**18)
    def step():
        a = torch.empty(30, 2**18)
        del a
        return torch.empty(10, 2**18) + there[:10]
    assert peak_memory(step) == 30 * 2**20
    assert peak_memory(lambda: None) == 0


def test_captums_mask_is_ours(net, monkeypatch):
    "The whole-model attribution and the one from the step's own graph, on the same weights and batch"
    masks, original = [], dropout.saliency_mask
    monkeypatch.setattr(dropout, 'saliency_mask', lambda *args: masks.append(original(*args)) or masks[-1])
    weights = {k: v.clone() for k, v in net.state_dict().items()}
    rival = WholeModelMask(captum_saliency)
    training_step(step_learner(net, 8), rival)()
    after = {k: v.clone() for k, v in net.state_dict().items()}
    net.load_state_dict(weights)
    training_step(step_learner(net, 8), SGDropCallback(0.2, granularity='element', fill='zero', clean_weight=0.))()
    assert len(masks) == 1 and rival.M.equal(masks[0]) and 0.05 < 1 - rival.M.float().mean() <= 0.2
    for k, v in net.state_dict().items(): torch.testing.assert_close(v, after[k], msg=k)


@pytest.mark.parametrize('saliency', [captum_saliency, grad_cam_saliency, input_saliency])
def test_a_rival_leaves_the_network_as_it_was(net, saliency):
    if saliency is grad_cam_saliency: pytest.importorskip('pytorch_grad_cam')
    x = torch.randn(4, 3, 8, 8)
    net(x).sum().backward()
    net.eval()[0].train()
    modes = [m.training for m in net.modules()]
    state, grads = {k: v.clone() for k, v in net.state_dict().items()}, [p.grad.clone() for p in net.parameters()]
    A = saliency(net, x, net[1])
    assert A.min() >= 0 and A.max() > 0 and len(A) == 4 and not A.requires_grad
    assert [m.training for m in net.modules()] == modes
    assert all(v.equal(state[k]) for k, v in net.state_dict().items())
    assert all(p.grad.equal(g) for p, g in zip(net.parameters(), grads))
    assert not any(m._forward_hooks for m in net.modules())


def test_parts_find_the_same_mask(net):
    parts = part_steps(net, torch.randn(4, 3, 8, 8), None)
    assert parts['mask']().flatten(1).equal(parts['sort']())
    assert (parts['quantile']() != parts['sort']()).sum() <= 4  # it interpolates between two elements of a row


def test_all_variants_train_one_network(net):
    steps, learners = variant_steps(net, 8, 4)
    assert list(steps) == list(VARIANTS)
    for name, step in steps.items():
        before = [p.detach().clone() for p in net.parameters()]
        step()
        assert any(not p.equal(b) for p, b in zip(net.parameters(), before)), name
        assert all(p.isfinite().all() for p in net.parameters())
    full = learners['full teacher'].sg_drop
    assert full.engine.teacher.n_updates == 1
    assert mask_agreement(full, torch.randn(4, 3, 8, 8)) > 0.9


@pytest.fixture
def row():
    "Made up: the plain step takes a second"
    seconds = {name: [1., 1., 1.] for name in VARIANTS} | {
        'full teacher': [1.2, 1.3, 1.4], 'ψ': [0.01] * 3, 'ψ back to z': [0.02] * 3,
        'ψ back': [0.03] * 3, 'forward': [0.3] * 3, 'mask': [0.01] * 3}
    peak = {name: 100 for name in VARIANTS} | {'grad-cam': 300}
    return dict(network='net', size=96, seconds=seconds, peak=peak, resting=300, teacher={'full teacher': 80})


def test_tables(row):
    table = cost_table([row, row | dict(size=160)])
    full, gradcam = table.loc['net', 96, 'full teacher'], table.loc['net', 160, 'grad-cam']
    limits = table.loc['net', 96].limit[['defaults', 'head teacher', 'full teacher']]
    assert full['median'] == 1.3 and limits.tolist() == pytest.approx([1.06, 1.07, 1.36])
    assert full.memory == 1 and full.with_teacher == 480 / 400 and gradcam.memory == 600 / 400
    parts = {'ψ': 0.01, 'ψ back to z': 0.02, 'ψ back': 0.03, 'forward': 0.3, 'mask': 0.01}
    assert parts_table([row]).loc['net', 96].to_dict() == parts


def test_the_command_says_what_is_missing(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    assert main(['--device', 'cuda', '--out', str(tmp_path)]) == 1
    assert capsys.readouterr().err == 'sgdrop-cost: PyTorch finds no GPU here, as --device cuda needs\n'
    monkeypatch.setitem(sys.modules, 'pytorch_grad_cam', None)
    assert main(['--out', str(tmp_path)]) == 1
    assert capsys.readouterr().err == "sgdrop-cost: pytorch-grad-cam is missing; run: pip install 'sgdrop[cost]'\n"
    with pytest.raises(SystemExit) as stopped: main(['--device', 'abacus'])
    assert stopped.value.code == 2 and capsys.readouterr().err.count('\n') == 1


def test_the_command_goes_on_where_it_was_stopped(row, tmp_path, capsys, monkeypatch):
    pytest.importorskip('pytorch_grad_cam')
    done, results = [], {k: v for k, v in row.items() if k not in ('network', 'size')}
    def run(settings):
        done.append((settings['network'], settings['size']))
        if len(done) == 3: raise KeyboardInterrupt
        return results
    monkeypatch.setattr(cost, 'run_cost', run)
    assert main(['--out', str(tmp_path)]) == 130 and 'interrupted; what was measured is in' in capsys.readouterr().err
    assert main(['--out', str(tmp_path)]) == 0 and f'{len(cost_plan())} rows in' in capsys.readouterr().out
    assert len(done) == len(cost_plan()) + 1 and done[2] == done[3]
