"""Eq 2 to Eq 9, to be read beside router.py: each against the paper's formula in float64, and each
departure against the paper's form. Eq 1, and Eq 5 to 8 across tokenizers: test_router.py."""
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import router as qr

QUESTION = torch.tensor([0, 0, 0, 1, 1, 2, 2, 2, 2])  # nine paths of three questions


def randn(*shape, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape))


def descend(loss, parameters, lr, steps):
    optimizer = torch.optim.Adam(parameters, lr)
    for _ in range(steps):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()


@pytest.mark.parametrize(("gate", "odds"), [  # onehot is the paper's form, the others depart
    ("onehot", lambda x: torch.softmax(x, 1)), ("binary", torch.sigmoid),
    ("categorical", lambda x: torch.cat([torch.softmax(x[QUESTION == q], 0) for q in range(3)]))])
def test_eq_2_draws_with_the_odds_of_its_softmax(gate, odds):
    logits, n = 4 + randn(9, 2), 10_000  # 4: a question whose binary gates are all shut is rare
    question = QUESTION.repeat(n) + 3 * torch.arange(n).repeat_interleave(9)
    alpha, p = qr.GATES[gate](logits.repeat(n, 1), question, torch.Generator().manual_seed(0))
    assert torch.allclose(p[:9], odds(logits))
    assert (alpha.view(n, 9, 2).mean(0) - odds(logits)).abs().max() < 4 * 0.5 / n ** 0.5


@pytest.mark.parametrize("printed", [(), {"eq3"}])
def test_eq_3_and_4_are_the_entropy_of_a_students_rate_or_as_printed_of_all(printed):
    p, terms = torch.sigmoid(2 * randn(9, 3)), []
    for q in range(3):
        mine = p[QUESTION == q].numpy()
        rates = [mine.mean()] if printed else mine.mean(0)
        terms += [-r * math.log(r) - (1 - r) * math.log(1 - r) for r in rates]
    assert abs(qr.balance_entropy(p, QUESTION, printed) - np.mean(terms)) < 2e-5  # rates move 1e-6
    one_takes_all = torch.tensor([[1.0, 0.0]]).expand(9, 2)  # the printed optimum
    entropy = qr.balance_entropy(one_takes_all, QUESTION, printed)
    assert abs(entropy - len(printed) * math.log(2)) < 2e-5


@pytest.mark.parametrize(("gate", "learns"), [("onehot", False), ("binary", True)])
def test_one_hot_gates_make_eq_3_constant_and_eq_4_without_gradient(gate, learns):
    values, slopes = [], []
    for seed in range(5):
        logits = randn(9, 3, seed=seed).requires_grad_()  # of two, Eq 4 would be flat at 1/2 anyway
        alpha, _ = qr.GATES[gate](logits, QUESTION, torch.Generator().manual_seed(seed))
        values.append(qr.balance_entropy(alpha, QUESTION, {"eq3"}))
        slopes.append(torch.autograd.grad(values[-1], logits)[0].abs().max())
    assert (max(values) - min(values) > 1e-9) == (max(slopes) > 1e-9) == learns


@pytest.mark.parametrize(("sign", "rate"), [(-1, 0.5), (1, 1.0)])  # subtracted; as printed, added
def test_eq_4_balances_only_if_it_is_maximised(sign, rate):
    logits = torch.ones(9, 2, requires_grad=True)
    descend(lambda: sign * qr.balance_entropy(torch.sigmoid(logits), QUESTION), [logits], 0.1, 100)
    assert (torch.sigmoid(logits) - rate).abs().max() < 0.05


@pytest.mark.parametrize("printed", [(), {"eq9"}])
def test_eq_9_is_a_mean_over_the_routed_paths_of_each_question_or_as_printed_of_all(printed):
    alpha, nll, loss = (randn(9, 2, seed=1) < 0.3).double(), randn(9, 2).exp(), 0.0
    for s in range(2):
        costs = [nll[(QUESTION == q) & (alpha[:, s] > 0), s] for q in range(3)]
        costs = [torch.cat(costs)] if printed else costs
        loss += np.mean([cost.mean() for cost in costs if len(cost)])
    assert abs((qr.path_weights(alpha, QUESTION, printed) * nll).sum() - loss) < 1e-12


def two_students(printed):
    """Ten tokens of one path; student 0 is better by a nat a token, but has the lower gamma."""
    torch.manual_seed(0)
    token, z = torch.arange(10), [randn(10, 6).requires_grad_(), randn(10, 7, seed=1)]
    collab = qr.Collaboration([6, 7], 8, printed).double()
    collab.w.data = -0.3 * randn(2, 8)
    routed = torch.ones(1, 2, dtype=torch.bool)
    return collab, (z, [token, token], 0 * token, routed, torch.tensor([[0.5, 1.5]]).double())


@pytest.mark.parametrize("printed", [set(), {"eq5"}, {"eq6"}, {"eq8"}, {"eq5", "eq6", "eq8"}])
def test_eq_5_to_8_go_token_by_token_where_tokenizers_are_equal(printed):
    collab, inputs = two_students(printed)
    zt = [states @ layer.weight.T for states, layer in zip(inputs[0], collab.proj)]  # Eq 5
    mean = [F.layer_norm(x.mean(0), (8,)) for x in zt]
    gamma = torch.softmax((collab.w * torch.stack(mean)).sum(1), 0)  # Eq 6
    if "eq8" not in printed:
        zt = [F.batch_norm(x, None, None, training=True) for x in zt]
    z_ens = gamma[0] * zt[0] + gamma[1] * zt[1]  # Eq 7
    squares = sum((x - z_ens).square().sum() for x in zt)  # Eq 8, here a mean over 10 tokens x 8
    target = -(torch.softmax(-inputs[4][0], 0) * gamma.log()).sum() * ("eq6" not in printed)
    for ours, wanted in zip(collab(*inputs), (squares / 80, target, gamma)):
        assert torch.allclose(ours, wanted)


@pytest.mark.parametrize(("printed", "learners"), [
    (set(), {"z"}), ({"eq5"}, {"z", "proj"}), ({"eq6"}, {"z", "w"}), ({"eq8"}, {"z"})])
def test_eq_8_teaches_the_students_and_as_printed_projections_and_competence(printed, learners):
    collab, inputs = two_students(printed)
    collab(*inputs)[0].sum().backward()
    grads = {"z": inputs[0][0].grad, "proj": collab.proj[0].weight.grad, "w": collab.w.grad}
    assert {name for name, grad in grads.items() if grad is not None and grad.any()} == learners


@pytest.mark.parametrize("printed", [set(), {"eq6"}])
def test_eq_8_pulls_the_weaker_student_harder_and_as_printed_both_alike(printed):
    collab, inputs = two_students(printed)
    mutual, _, gamma, _, zt = collab(*inputs)
    apart, g = zt[:, 0] - zt[:, 1], gamma[0]
    force = g.square().sum().expand(2) if printed else 1 - g
    pull = torch.stack([force[0] * apart, -force[1] * apart], 1) * 2 / 80
    assert torch.allclose(torch.autograd.grad(mutual.sum(), zt)[0], pull)


@pytest.mark.parametrize(("printed", "end"), [(set(), 1 / (1 + math.exp(-1))), ({"eq6"}, 0.5)])
def test_competence_finds_the_better_student_and_as_printed_evens_out(printed, end):
    collab, inputs = two_students(printed)
    assert collab(*inputs)[2][0, 0] < 0.3
    descend(lambda: sum(collab(*inputs)[:2]).sum(), [collab.w], 0.03, 200)
    assert abs(collab(*inputs)[2][0, 0] - end) < 0.03


def effective_rank(x):
    """exp of the entropy of each direction's share of the variance (Roy and Vetterli, 2007)."""
    variance = torch.linalg.svdvals(x - x.mean(0)).square()
    return torch.special.entr(variance / variance.sum()).sum().exp()


@pytest.mark.parametrize(("printed", "vanishes", "loses_rank"), [
    (set(), False, False), ({"eq8"}, False, False), ({"eq5"}, False, True),
    ({"eq5", "eq8"}, True, True)])
def test_trained_projections_lose_rank_and_not_standardised_vanish(printed, vanishes, loses_rank):
    latent, token = randn(400, 20) * torch.linspace(1, 0.2, 20), torch.arange(400)
    z = [latent @ randn(20, k, seed=k) / 4.5 + 0.3 * randn(400, k, seed=k + 1) for k in (48, 64)]
    torch.manual_seed(0)
    collab = qr.Collaboration([48, 64], 32, printed).double()
    inputs = z, [token, token], token // 20, torch.ones(20, 2, dtype=torch.bool), torch.zeros(20, 2)
    if "eq5" in printed:
        descend(lambda: collab(*inputs)[0].sum(), collab.proj.parameters(), 0.01, 200)
    for zt in collab(*inputs)[4].unbind(1):  # (400, 32)
        assert (zt.std(0).mean() < 0.1) == vanishes
        assert (effective_rank(zt) < 10) == loses_rank  # of the 20 directions of `latent`
