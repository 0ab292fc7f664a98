"""Claims about Eq 1 to Eq 8, against brute force in float64 numpy, torch's own functions and closed forms."""
import itertools
import json
import math
import os
import pathlib
import subprocess
import sys
import unicodedata

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModel, AutoTokenizer, BertConfig, BertModel, PreTrainedTokenizerFast

import router as qr

ROOT = pathlib.Path(qr.__file__).parent
QUESTION = torch.tensor([0, 0, 0, 1, 1, 2, 2, 2, 2])  # nine paths of three questions
GATES = (qr.binary_gate, qr.onehot_gate)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=seeded(seed), dtype=torch.float64)


def sigmoid(x):
    return 1 / (1 + np.exp(-np.asarray(x, float)))


# ---------------------------------------------------------------- Eq 1
def test_hash_embedding_is_the_same_in_another_process():
    code = "import router; print(router.hash_embed(['12 + 7 = 19, so it is nineteen']).numpy().tobytes().hex())"
    here = qr.hash_embed(["12 + 7 = 19, so it is nineteen"]).numpy().tobytes().hex()
    env = {**os.environ, "PYTHONHASHSEED": "1"}  # Python's own hash() depends on it
    assert subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, env=env, text=True).strip() == here


def test_hash_embedding_has_unit_length_and_puts_similar_texts_closer():
    h = qr.hash_embed(["Tom has 3 apples and buys 4 more, so 7.", "Tom has 5 apples and buys 4 more, so 9.",
                       "def solve():\n    return x * y", ""])
    assert torch.allclose(h.norm(dim=1), torch.tensor([1.0, 1.0, 1.0, 0.0]), atol=1e-6)
    assert h[0] @ h[1] > 0.5 > h[0] @ h[2] + 0.3
    assert torch.equal(qr.hash_embed(["a", "b c"])[1], qr.hash_embed(["b c"])[0])  # no text depends on its neighbours


def check_encoder(model, tokenizer):
    pairs = [("one two", "three"), ("four", "five six seven one two three four five"), ("two", "one")]
    together = qr.encoder_embed(model, tokenizer, pairs)
    for row, (q, p) in zip(together, pairs):
        with torch.no_grad():  # alone, so that there is no padding, and without a mask
            states = model(**tokenizer(q, p, return_tensors="pt")).last_hidden_state[0].double().numpy()
        assert np.abs(row.numpy() - states.mean(0)).max() < 1e-5


def test_encoder_averages_real_tokens_only():
    words = ["[PAD]", "[UNK]", "one", "two", "three", "four", "five", "six", "seven"]
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="[PAD]", unk_token="[UNK]")
    torch.manual_seed(0)
    config = BertConfig(vocab_size=9, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
    check_encoder(BertModel(config).eval(), tokenizer)


def test_a_real_encoder_averages_real_tokens_only(models_dir):
    minilm = models_dir / "minilm"
    check_encoder(AutoModel.from_pretrained(minilm).eval(), AutoTokenizer.from_pretrained(minilm))


# ---------------------------------------------------------------- Eq 2
def test_router_starts_without_a_favourite():
    for hidden in (0, 8):
        assert torch.equal(qr.Router(5, 3, hidden)(randn(7, 5).float()), torch.zeros(7, 3))


def test_gates_open_with_the_probability_of_their_logit():
    logits = torch.tensor([-4.0, -1.0, 0.0, 0.5, 3.0])
    many, each = logits.expand(100_000, 5), torch.arange(100_000)
    p = sigmoid(logits)
    alpha, probability = qr.binary_gate(many.T.contiguous().T, torch.arange(50_000).repeat(2), seeded())
    assert set(alpha.unique().tolist()) == {0.0, 1.0} and np.abs(probability[0].numpy() - p).max() < 1e-6
    # of two paths of a question one opens in any case: the likeliest, so a gate stays shut if it is shut and not that one
    shut_both = (1 - p) ** 2
    assert (np.abs(alpha.numpy().mean(0) - (p + shut_both / 2)) < 4 * np.sqrt(0.25 / 1e5)).all()
    alpha, probability = qr.onehot_gate(many, each, seeded())
    softmax = torch.softmax(logits, 0).numpy()
    assert torch.equal(alpha.sum(1), torch.ones(100_000)) and np.abs(probability[0].numpy() - softmax).max() < 1e-6
    assert np.abs(alpha.numpy().mean(0) - softmax).max() < 0.01


def noise_of(seed, shape=(9, 2)):
    """The uniform numbers behind a gate."""
    return torch.rand(shape, generator=seeded(seed)).double().numpy()


def test_straight_through_gradient_is_that_of_the_soft_sample():
    logits, g, u = randn(9, 2).requires_grad_(), randn(9, 2, seed=1), noise_of(0)
    alpha, _ = qr.binary_gate(logits, QUESTION, seeded())
    soft = sigmoid(logits.detach().numpy() + np.log(u / (1 - u)))  # the binary concrete distribution
    closed = g.numpy() * soft * (1 - soft)
    assert np.abs(torch.autograd.grad((alpha * g).sum(), logits)[0].numpy() - closed).max() < 1e-6
    alpha, _ = qr.onehot_gate(logits, QUESTION, seeded())
    x = np.exp(logits.detach().numpy() - np.log(-np.log(u)))
    soft = x / x.sum(1, keepdims=True)
    closed = soft * (g.numpy() - (soft * g.numpy()).sum(1, keepdims=True))
    assert np.abs(torch.autograd.grad((alpha * g).sum(), logits)[0].numpy() - closed).max() < 1e-6


def test_every_student_gets_exactly_one_path_of_a_question_whose_gates_are_all_shut():
    for seed in range(50):
        logits, u = torch.full((9, 2), -1.5, requires_grad=True), noise_of(seed)
        alpha, _ = qr.binary_gate(logits, QUESTION, seeded(seed))
        drawn = -1.5 + np.log(u / (1 - u)) > 0
        for q, s in itertools.product(range(3), range(2)):
            mine = [p for p in range(9) if QUESTION[p] == q]
            before, after = drawn[mine, s].tolist(), alpha.detach()[mine, s].tolist()
            if sum(before):
                assert after == before
            else:
                assert sum(after) == 1 and u[mine, s].argmax() == after.index(1)  # the likeliest
        gradient = torch.autograd.grad(alpha.sum(), logits)[0]
        assert gradient.all()  # a forced path keeps its gate's gradient


def test_printed_gate_may_leave_a_student_without_a_path_of_a_question():
    alpha, _ = qr.onehot_gate(torch.tensor([[9.0, -9.0]] * 9), QUESTION, seeded())
    assert torch.equal(alpha, torch.tensor([[1.0, 0.0]] * 9))


# ---------------------------------------------------------------- Eq 3 and Eq 4
def entropy_by_hand(p, per_student):
    total, terms = 0.0, 0
    for q in range(int(QUESTION.max()) + 1):
        mine = [p[j] for j in range(len(p)) if QUESTION[j] == q]
        rates = [sum(row[s] for row in mine) / len(mine) for s in range(len(p[0]))]
        for r in rates if per_student else [sum(rates) / len(rates)]:
            total, terms = total - sum(x * math.log(x) for x in (r, 1 - r) if x > 0), terms + 1
    return total / terms


def test_entropy_matches_brute_force():
    for students in (1, 2, 3):
        p = torch.sigmoid(2 * randn(9, students))
        for x, per_student in itertools.product((p, (p > 0.5).double()), (True, False)):
            assert abs(qr.balance_entropy(x, QUESTION, per_student) - entropy_by_hand(x.tolist(), per_student)) < 3e-5


def test_literal_entropy_is_blind_to_one_student_taking_everything():
    p = torch.tensor([[1.0, 0.0]]).expand(9, 2)
    assert abs(qr.balance_entropy(p, QUESTION, per_student=False) - math.log(2)) < 1e-6
    assert qr.balance_entropy(p, QUESTION) < 1e-4


def test_onehot_gates_leave_literal_entropy_without_gradient():
    for students in (2, 3):
        largest = {}
        for gate in GATES:
            logits = (randn(9, students).float() / 2).requires_grad_()
            alpha, _ = gate(logits, QUESTION, seeded(1))
            qr.balance_entropy(alpha, QUESTION, per_student=False).backward()
            largest[gate] = logits.grad.abs().max()
        assert largest[qr.onehot_gate] < 1e-7 and largest[qr.binary_gate] > 1e-3


def test_literal_entropy_pulls_back_when_every_gate_is_open():
    alpha = torch.ones(9, 2, requires_grad=True)
    qr.balance_entropy(alpha, QUESTION, per_student=False).backward()
    assert (alpha.grad < 0).all()


def test_maximising_entropy_balances_an_unbalanced_router():
    router, h = qr.Router(9, 2), torch.eye(9)
    with torch.no_grad():
        router.net.bias.copy_(torch.tensor([5.0, -5.0]))  # one student gets nearly everything, the other nearly nothing
    optimizer = torch.optim.Adam(router.parameters(), lr=0.1)
    for _ in range(150):
        optimizer.zero_grad()
        (-qr.balance_entropy(torch.sigmoid(router(h)), QUESTION)).backward()
        optimizer.step()
    rate = torch.sigmoid(router(h)).detach().numpy()
    assert all(np.abs(rate[(QUESTION == q).numpy()].mean(0) - 0.5).max() < 0.05 for q in range(3))


# ---------------------------------------------------------------- Eq 9: the gate inside the loss
def distill_loss_by_hand(alpha, nll, normalize):
    """sum_s L_distill^(s): mean over questions of the mean loss of a question's paths; or one mean over all."""
    total = 0.0
    for s in range(alpha.shape[1]):
        means = []
        for q in range(3) if normalize == "question" else [None]:
            mine = [p for p in range(9) if q is None or QUESTION[p] == q]
            if weight := sum(alpha[p, s] for p in mine):
                means.append(sum(alpha[p, s] * nll[p, s] for p in mine) / weight)
        total += sum(means) / len(means)
    return total


@pytest.mark.parametrize("normalize", ["question", "batch"])
def test_path_weights_are_means_over_routed_paths(normalize):
    nll = randn(9, 2).exp()
    for seed in range(20):
        alpha = (torch.rand(9, 2, generator=seeded(seed)) < 0.4).double()
        weight = qr.path_weights(alpha, QUESTION, normalize)
        assert torch.allclose(weight.sum(0), torch.ones(2, dtype=torch.float64))
        assert not weight[alpha == 0].any()
        assert abs((weight * nll).sum() - distill_loss_by_hand(alpha.numpy(), nll.numpy(), normalize)) < 1e-12


def test_categorical_gate_draws_one_path_of_each_question_with_the_odds_of_its_softmax():
    logits, generator = randn(9, 2), seeded()
    want = torch.cat([torch.softmax(logits[QUESTION == q], 0) for q in range(3)])
    draws = torch.stack([qr.categorical_gate(logits, QUESTION, generator)[0] for _ in range(4000)])
    for q in range(3):
        assert torch.equal(draws[:, QUESTION == q].sum(1), torch.ones(4000, 2, dtype=torch.float64))
    assert ((draws.mean(0) - want).abs() < 4 * (want * (1 - want) / 4000).sqrt()).all()


def test_categorical_gate_has_the_gradient_of_the_soft_draw_within_a_question():
    logits, g, u = randn(9, 2).requires_grad_(), randn(9, 2, seed=1), torch.from_numpy(noise_of(0))
    alpha, p = qr.categorical_gate(logits, QUESTION, seeded())
    noisy = (logits - (-u.log()).log()).detach()
    for q in range(3):
        mine = QUESTION == q
        soft = torch.softmax(noisy[mine], 0)
        closed = soft * (g[mine] - (soft * g[mine]).sum(0))
        gradient = torch.autograd.grad((alpha * g).sum(), logits, retain_graph=True)[0]
        assert torch.allclose(gradient[mine], closed, atol=1e-6)
        assert torch.allclose(p[mine], torch.softmax(logits[mine], 0))


def test_best_path_is_the_first_of_the_highest():
    score = torch.tensor([[1.0, 5], [3, 5], [3, 2], [0, 0], [-2, -1], [-1, -1], [7, 7], [7, 8], [1, 8]])
    kept = qr.keep_best(score, QUESTION)
    for q, s in itertools.product(range(3), range(2)):
        mine = [p for p in range(9) if QUESTION[p] == q]
        best = max(mine, key=lambda p: (score[p, s], -p))
        assert [p for p in mine if kept[p, s]] == [best]


def test_skipped_losses_are_the_mean_of_the_known_ones():
    nll, known = randn(9, 2), torch.rand(9, 2, generator=seeded()) < 0.6
    filled = qr.fill_skipped(torch.where(known, nll, 1e9), known, QUESTION)  # a bool mask: sums of bools are no counts
    for p, s in itertools.product(range(9), range(2)):
        peers = [k for k in range(9) if QUESTION[k] == QUESTION[p] and known[k, s]]
        want = nll[p, s] if known[p, s] else nll[peers, s].mean() if peers else 0
        assert abs(filled[p, s] - want) < 1e-12


@pytest.mark.parametrize("temperature", [1, 4])
def test_posterior_loss_is_the_cross_entropy_of_the_choice_to_the_students_own(temperature):
    logits, nll = randn(9, 2).requires_grad_(), 30 + 3 * randn(9, 2, seed=1)
    loss = qr.posterior_loss(logits, nll, QUESTION, temperature)
    by_hand, gradient = 0, np.zeros((9, 2))
    for q, s in itertools.product(range(3), range(2)):
        mine = np.flatnonzero(QUESTION == q)
        p = np.exp(logits.detach().numpy()[mine, s])
        wanted = np.exp((30 - nll.numpy()[mine, s]) / temperature)
        p, wanted = p / p.sum(), wanted / wanted.sum()
        by_hand -= (wanted * np.log(p)).sum() / 3
        gradient[mine, s] = (p - wanted) / 3  # it does not vanish where p is sure of the wrong path
    assert abs(loss.detach() - by_hand) < 1e-12
    assert np.abs(torch.autograd.grad(loss, logits)[0].numpy() - gradient).max() < 1e-12


@pytest.mark.parametrize("temperature", [1, 4])
def test_posterior_is_where_eq_9_with_the_entropy_over_a_questions_paths_is_least(temperature):
    nll = 10 + 2 * randn(9, 2)
    least = qr.softmax_per_question(-nll / temperature, QUESTION)

    def free_energy(logits):
        p = qr.softmax_per_question(logits, QUESTION)
        return (p * nll + temperature * p * p.log()).sum()

    logits = randn(9, 2, seed=3).requires_grad_()
    optimizer = torch.optim.LBFGS([logits], max_iter=200, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = free_energy(logits)
        loss.backward()
        return loss

    optimizer.step(closure)
    assert torch.allclose(qr.softmax_per_question(logits.detach(), QUESTION), least, atol=1e-4)


@pytest.mark.parametrize("penalty", [0, 0.3, 1])
def test_a_length_penalty_compares_whole_paths_or_paths_by_the_token(penalty):
    nll, length = 30 + 3 * randn(9, 2), torch.randint(5, 50, (9, 2), generator=seeded())
    cost = qr.normalize_length(nll, length, QUESTION, penalty)
    for p, s in itertools.product(range(9), range(2)):
        mean = np.mean([int(length[k, s]) for k in range(9) if QUESTION[k] == QUESTION[p]])
        want = float(nll[p, s]) / (int(length[p, s]) / mean) ** penalty
        assert abs(cost[p, s] - want) < 1e-5  # a length is float32
    if penalty == 0:
        assert torch.equal(cost, nll)
    if penalty == 1:  # a path written down twice is as likely by the token
        a, b = torch.tensor([[12.0], [24.0]]), torch.tensor([[10], [20]])
        once, twice = qr.normalize_length(a, b, torch.zeros(2, dtype=torch.long), penalty)
        assert once == twice == 18  # 1.2 nats a token, 15 tokens on average


STYLES = torch.eye(4).repeat(8, 1)  # eight questions in four styles
EIGHT = torch.arange(8).repeat_interleave(4)


def follow(costs, reward, steps=150, betas=(0.5, 0.95), decay=0.1, lr=0.3):
    """The rate (steps, style, S) of a router that hears of one question's costs (style, S) in each step."""
    router, generator, rates = qr.Router(4, 2), seeded(), []
    optimizer = torch.optim.AdamW(router.parameters(), lr=lr, betas=betas, weight_decay=decay)
    for step in range(steps):
        noise = torch.exp(0.2 * torch.randn(32, 2, generator=generator))
        logits, nll = router(STYLES), costs(step).repeat(8, 1) * noise
        probed = EIGHT == 0
        optimizer.zero_grad()
        if reward == "posterior":
            qr.posterior_loss(logits[probed], nll[probed], EIGHT[probed]).backward()
        else:  # a first phase in which all is known, then one path of each question, which has no peer
            alpha, _ = qr.categorical_gate(logits, EIGHT, generator)
            alpha = alpha + (1 - alpha.detach()) if step < 0.2 * steps else alpha
            weight = qr.path_weights(alpha, EIGHT)
            (weight * qr.fill_skipped(nll, alpha, EIGHT)).sum().backward()
        optimizer.step()
        rates.append(torch.softmax(router(torch.eye(4)), 0).detach())
    return torch.stack(rates)


def test_router_finds_each_students_cheapest_path():
    cost = torch.tensor([[20.0, 30], [25, 20], [60, 25], [200, 90]])  # per style and student, nats a path
    rate = follow(lambda step: cost, "posterior")[-30:].mean(0)
    assert rate[0, 0] > 0.7 and rate[1, 1] > 0.7 and rate[3].max() < 0.05


def test_router_leaves_a_style_that_becomes_bad_within_a_tenth_of_the_run_and_the_one_of_before_stays():
    good = torch.tensor([[20.0, 20], [30, 30], [35, 35], [50, 50]])
    scrambled = good.clone()
    scrambled[0] = 150  # what the students were on, from the middle on
    turn = {"posterior": {}, "first phase": {"betas": (0.9, 0.999), "decay": 0.0, "lr": 0.1}}
    rates = {name: follow(lambda step: good if step < 75 else scrambled, name, **more) for name, more in turn.items()}
    for name, rate in rates.items():
        assert rate[74, 0].min() > 0.8, name
    assert rates["posterior"][90, 0].max() < 0.1
    assert rates["first phase"][-1, 0].min() > 0.8


def test_router_finds_a_style_that_was_bad_at_first_and_the_one_of_before_does_not():
    clean = torch.tensor([[20.0, 20], [30, 30], [35, 35], [50, 50]])
    scrambled = clean.clone()
    scrambled[0] = 150
    turn = {"posterior": {}, "first phase": {"betas": (0.9, 0.999), "decay": 0.0, "lr": 0.1}}
    rates = {name: follow(lambda step: scrambled if step < 30 else clean, name, **more) for name, more in turn.items()}
    assert rates["posterior"][29, 0].max() < 0.1 and rates["posterior"][45:].mean(0)[0].min() > 0.8
    assert rates["first phase"][-1, 0].max() < 0.2


@pytest.mark.parametrize("normalize", ["question", "batch"])
def test_gate_receives_the_full_information_derivative_of_the_student_losses(normalize):
    nll, alpha, eps = randn(9, 2).exp(), torch.ones(9, 2, dtype=torch.float64, requires_grad=True), 1e-5
    (qr.path_weights(alpha, QUESTION, normalize) * qr.fill_skipped(nll, alpha, QUESTION, normalize)).sum().backward()
    for p, s in itertools.product(range(9), range(2)):  # finite differences over a relaxed gate
        moved = [alpha.detach().numpy().copy() for _ in range(2)]
        moved[0][p, s] += eps
        moved[1][p, s] -= eps
        up, down = (distill_loss_by_hand(a, nll.numpy(), normalize) for a in moved)
        assert abs(alpha.grad[p, s] - (up - down) / (2 * eps)) < 1e-8


@pytest.mark.parametrize("normalize", ["question", "batch"])
def test_skipped_pairs_get_no_gradient_and_a_path_above_its_peers_loses_rate(normalize):
    nll, router = randn(9, 2).exp(), qr.Router(9, 2).double()
    alpha, _ = qr.binary_gate(router(torch.eye(9).double()), QUESTION, seeded(3))  # a weight for each path
    alpha.retain_grad()
    # Whatever stands where no student was run plays no part.
    losses = qr.fill_skipped(torch.where(alpha > 0, nll, 1e9), alpha, QUESTION, normalize)
    (qr.path_weights(alpha, QUESTION, normalize) * losses).sum().backward()
    on = alpha.detach() > 0
    assert (~on).any() and alpha.grad[~on].abs().max() < 1e-15
    for p, s in on.nonzero().tolist():
        peers = [k for k in range(9) if on[k, s] and (normalize == "batch" or QUESTION[k] == QUESTION[p])]
        above = float(nll[p, s] - nll[peers, s].mean())
        pull = float(router.net.weight.grad[s, p])  # positive: a step of descent lowers the rate
        assert pull * above > 0 if len(peers) > 1 else abs(pull) < 1e-12


@pytest.mark.parametrize("normalize", ["question", "batch"])
def test_skipped_pairs_get_no_gradient_beside_a_probe_either(normalize):
    nll, alpha = randn(9, 2).exp(), (randn(9, 2, seed=1) < 0).double().requires_grad_()
    probed = (QUESTION == 0)[:, None]  # all of its paths are run
    losses = qr.fill_skipped(torch.where((alpha > 0) | probed, nll, 1e9), alpha, QUESTION, normalize, probed)
    (qr.path_weights(alpha, QUESTION, normalize) * losses).sum().backward()
    skipped = ~((alpha.detach() > 0) | probed)
    assert skipped.any() and alpha.grad[skipped].abs().max() < 1e-15


def test_a_student_without_a_path_of_a_probed_question_learns_nothing_from_it():
    """As with one-hot gates: there is no routed path to compare a probed one with."""
    nll, alpha = randn(9, 2).exp(), torch.ones(9, 2, dtype=torch.float64)
    alpha[QUESTION == 0, 1] = 0
    alpha.requires_grad_()
    losses = qr.fill_skipped(nll, alpha, QUESTION, "question", (QUESTION == 0)[:, None])
    (qr.path_weights(alpha, QUESTION) * losses).sum().backward()
    assert not alpha.grad[QUESTION == 0, 1].any() and alpha.grad[QUESTION == 0, 0].any()


def test_batch_normalisation_starves_hard_questions_and_question_normalisation_does_not():
    question = torch.tensor([0] * 6 + [1] * 6)
    nll = torch.tensor([1.0] * 6 + [3.0] * 6).unsqueeze(1).repeat(1, 2)  # an easy and a hard question
    nll[[0, 6]] += 0.6  # and in each of them a path worse than its peers
    rates = {}
    for normalize in ("question", "batch"):
        router, generator = qr.Router(12, 2), seeded()
        optimizer = torch.optim.Adam(router.parameters(), lr=0.02)
        for _ in range(250):
            alpha, _ = qr.binary_gate(router(torch.eye(12)), question, generator)
            losses = qr.fill_skipped(nll, alpha, question, normalize)
            optimizer.zero_grad()
            (qr.path_weights(alpha, question, normalize) * losses).sum().backward()
            optimizer.step()
        rates[normalize] = torch.sigmoid(router(torch.eye(12))).detach().reshape(2, 6, 2).mean(2)  # (question, path)
    assert rates["batch"][1].mean() < 0.15 and rates["batch"][0, 1:].mean() > 0.6
    assert (rates["question"][:, 1:].mean(1) > 0.4).all()
    assert (rates["question"][:, 0] < 0.3).all()


# ---------------------------------------------------------------- alignment by characters
def segments_by_hand(offsets):
    """Cut between two characters wherever no token of any tokenizer lies across: the finest common segmentation."""
    length = max(end for spans in offsets for _, end in spans)
    cuts = [c for c in range(1, length) if not any(start < c < end for spans in offsets for start, end in spans)]
    return [[sum(c <= start for c in cuts) for start, _ in spans] for spans in offsets], len(cuts) + 1


def segments_of(offsets):
    segments, n = qr.shared_segments(offsets)
    return [x.tolist() for x in segments], n


def test_segments_of_hand_made_spans():
    one, two = [(0, 2), (2, 5), (5, 6)], [(0, 1), (1, 2), (2, 3), (3, 6)]
    assert segments_of([one, two]) == ([[0, 1, 1], [0, 0, 1, 1]], 2)
    assert segments_of([one, one]) == ([[0, 1, 2], [0, 1, 2]], 3)  # equal tokenizers: token by token
    assert segments_of([one, two, [(0, 6)]]) == ([[0, 0, 0], [0, 0, 0, 0], [0]], 1)
    pieces = [(0, 1), (1, 2), (1, 2), (1, 2), (2, 3)]  # the second character is an emoji in three byte pieces
    assert segments_of([pieces, [(0, 1), (1, 3)]]) == ([[0, 1, 1, 1, 1], [0, 1]], 2)
    assert segments_of([pieces, pieces]) == ([[0, 1, 1, 1, 2]] * 2, 3)


def test_segments_match_brute_force_on_random_tokenisations():
    rng = np.random.default_rng(0)
    for _ in range(300):
        offsets = []
        for _ in range(rng.integers(1, 4)):
            cuts, spans = [0, *np.flatnonzero(rng.random(12) < 0.5).tolist(), 12], []
            for a, b in itertools.pairwise(sorted(set(cuts))):  # byte pieces, and pairs across a border
                spans += [(a, b)] * (int(rng.integers(1, 4)) if b == a + 1 else 1)
                if b < 12 and rng.random() < 0.1:
                    spans.append((b - 1, b + 1))
            offsets.append(spans)
        assert segments_of(offsets) == segments_by_hand(offsets), offsets


TEXTS = ["Natalia sold 48/2 = 24 clips.\n\nSo 1,234.50 + 9999999 = 10001233.50\n",
         "   leading\n\n\n\tand    inner  spaces",
         "family 👩‍👩‍👧‍👦 flag 🏳️‍🌈 thumb 👍🏽🎉", "日本語の文章です。漢字と12個の例", "rare 𓀀𓁀 𝟙𝟚𝟛 ꙮ",
         unicodedata.normalize("NFD", "café, niño, Ångström, 한국어"), "Ελληνικά, русский, हिन्दी, ไทย, עברית",
         "a\r\nb\u200dc\u00a0d\u3000e"]


def check_segments(text, offsets, ignore=""):
    segments, n = segments_of(offsets)
    owned = []
    for spans, segment in zip(offsets, segments):
        assert segment == sorted(segment) and set(segment) == set(range(n))  # monotone, none empty
        owned.append({(c, k) for (a, b), k in zip(spans, segment) for c in range(a, b) if text[c] not in ignore})
    assert all(x == owned[0] for x in owned)  # the same characters for every tokenizer
    assert [c for c, _ in sorted(owned[0])] == [c for c, x in enumerate(text) if x not in ignore]  # each in one segment
    return segments, n


def test_segments_of_real_tokenizers_hold_the_same_characters(models_dir, data_dir):
    names = ("smollm2", "gemma3", "minilm")
    smollm2, gemma3, minilm = (AutoTokenizer.from_pretrained(models_dir / name) for name in names)

    def spans(tokenizer, text):
        return tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]

    with open(data_dir / "paths" / "gsm8k.jsonl") as f:
        paths = [json.loads(next(f))["path"].strip() for _ in range(64)]
    for text in TEXTS + paths:
        offsets = [spans(smollm2, text), spans(gemma3, text)]
        assert check_segments(text, offsets) == segments_by_hand(offsets)
        check_segments(text, [*offsets, [(i, i + 1) for i in range(len(text))]])  # a third: one token per character
    offsets = [spans(t, TEXTS[0]) for t in (smollm2, gemma3, minilm)]
    check_segments(TEXTS[0], offsets, ignore=" \n")  # WordPiece skips white space
    for text in paths:
        assert segments_of([spans(smollm2, text)] * 2)[1] == len({end for _, end in spans(smollm2, text)})


# ---------------------------------------------------------------- Eq 5 to Eq 8
def example(students, seed=0):
    """Three co-routed paths of 5, 1 and 4 segments, as many students: z, segment, path, routed, nll."""
    rng, path = np.random.default_rng(seed), torch.tensor([0] * 5 + [1] + [2] * 4)
    segment = [torch.tensor(np.repeat(np.arange(10), rng.integers(1, 4, 10))) for _ in range(students)]
    z = [randn(len(x), 6 + s, seed=seed + s).requires_grad_() for s, x in enumerate(segment)]
    routed = torch.ones(3, students, dtype=torch.bool)
    if students == 3:
        routed[0, 2] = routed[2, 0] = False
    return z, segment, path, routed, randn(3, students, seed=9).exp()


def collaboration(students, skew=0.5, **options):
    torch.manual_seed(0)
    collab = qr.Collaboration([6 + s for s in range(students)], 8, **options).double()
    with torch.no_grad():
        collab.w.copy_(skew * randn(students, 8))
    return collab


def collaborate_by_hand(collab, z, segment, path, routed, nll):
    """Eq 5 to Eq 8 path by path -> L_mutual, L_competence and gamma of each path."""
    w, rows = collab.w.detach().numpy(), []
    for c in range(len(routed)):
        mine, score, zt = [i for i in range(len(path)) if path[i] == c], {}, {}
        for s in (s for s in range(len(z)) if routed[c, s]):
            states, matrix = z[s].detach().numpy(), collab.proj[s].weight.detach().numpy()
            zt[s] = np.stack([np.mean([matrix @ x for x, k in zip(states, segment[s]) if k == i], 0) for i in mine])
            mean = zt[s].mean(0)
            score[s] = w[s] @ ((mean - mean.mean()) / np.sqrt(mean.var() + 1e-5))
            if collab.standardized:
                zt[s] = (zt[s] - zt[s].mean(0)) / np.sqrt(zt[s].var(0) + 1e-5)
        cost = {s: -float(nll[c, s]) for s in zt}
        gamma, target = ({s: math.exp(x[s]) / sum(map(math.exp, x.values())) for s in zt} for x in (score, cost))
        z_ens = sum(gamma[s] * zt[s] for s in zt)
        mutual = sum(np.mean([np.mean((zt[s][i] - z_ens[i]) ** 2) for i in range(len(mine))]) for s in zt)
        l_competence = -sum(target[s] * math.log(gamma[s]) for s in zt)
        rows.append((mutual, l_competence, [gamma.get(s, 0.0) for s in range(len(z))]))
    return [np.array(x) for x in zip(*rows)]


@pytest.mark.parametrize("standardized", [True, False])
@pytest.mark.parametrize("students", [1, 2, 3])
def test_collaboration_matches_brute_force(students, standardized):
    for target in (True, False):
        collab = collaboration(students, standardized=standardized, fit_competence=target)
        inputs = example(students)
        mutual, l_competence, gamma, _, _ = collab(*inputs)
        expected = collaborate_by_hand(collab, *inputs)
        expected[1] = expected[1] * target
        for ours, theirs in zip((mutual, l_competence, gamma), expected):
            assert np.abs(ours.detach().numpy() - theirs).max() < 1e-12


def test_equal_tokenizers_give_eq_8_token_by_token():
    z, token, collab = [randn(10, 6), randn(10, 7, seed=1)], torch.arange(10), collaboration(2, 0.0, standardized=False)
    mutual = collab(z, [token, token], token * 0, torch.ones(1, 2, dtype=torch.bool), torch.zeros(1, 2))[0]
    zt = [x @ layer.weight.T for x, layer in zip(z, collab.proj)]
    assert torch.allclose(mutual[0], sum(F.mse_loss(x, (zt[0] + zt[1]) / 2) for x in zt))


@pytest.mark.parametrize("target", [True, False])
def test_unrouted_students_contribute_nothing_and_get_no_gradient(target):
    collab, (z, segment, path, routed, nll) = collaboration(3, trained=True, fit_competence=target), example(3)
    results = []
    for factor in (1.0, -50.0):  # whatever the states of the unrouted pairs are
        on = [routed[path[s], k] for k, s in enumerate(segment)]
        inputs = [(x.detach() * torch.where(o, 1.0, factor)[:, None]).requires_grad_() for x, o in zip(z, on)]
        mutual, l_competence, gamma, _, _ = collab(inputs, segment, path, routed, nll)
        assert not gamma[~routed].any() and torch.allclose(gamma.sum(1), torch.ones(3, dtype=torch.float64))
        gradients = torch.autograd.grad((mutual + l_competence).sum(), [*inputs, *collab.parameters()])
        assert all(g.isfinite().all() for g in gradients)
        for g, o, s in zip(gradients, on, segment):
            assert not g[~o].any()
            assert g[o & (path[s] != 1)].any(1).all()  # the second path is a single segment: standardised to 0
        results.append([mutual, l_competence, *gradients[3:]])
    assert all(torch.allclose(a, b, atol=1e-12) for a, b in zip(*results))


def test_pull_towards_the_ensemble_has_its_closed_form_for_two_students():
    for target in (True, False):
        collab, inputs = collaboration(2, fit_competence=target), example(2)
        mutual, l_competence, gamma, _, zt = collab(*inputs)
        if target:  # the target teaches the regressor, not the students
            assert set(torch.autograd.grad(l_competence.sum(), inputs[0], allow_unused=True)) == {None}
        pull = torch.autograd.grad(mutual.sum(), zt)[0]  # (S, N, d)
        path = inputs[2]
        difference, scale = zt[0] - zt[1], 2 / (path.bincount()[path] * 8)[:, None]
        g = gamma[path].T.unsqueeze(-1)
        # The weaker a student, the more it is pulled; undetached, Eq 8 is (g1^2 + g2^2) ||zt_1 - zt_2||^2 for both.
        force = 1 - g if target else (g**2).sum(0).expand(2, -1, -1)
        assert torch.allclose(pull, torch.stack([difference, -difference]) * force * scale, atol=1e-12)


@pytest.mark.parametrize(("target", "end"), [(True, sigmoid(1.0)), (False, 0.5)])
def test_competence_follows_the_better_student_with_a_target_and_only_evens_out_with_eq_8(target, end):
    z, token, routed = [randn(10, 6), randn(10, 7, seed=1)], torch.arange(10), torch.ones(1, 2, dtype=torch.bool)
    inputs = (z, [token, token], token * 0, routed, torch.tensor([[0.5, 1.5]]))  # student 0 is better by one nat
    collab = collaboration(2, standardized=False, fit_competence=target)
    mean = F.layer_norm(collab(*inputs)[3][1].mean(0), (8,))
    with torch.no_grad():
        collab.w.copy_(torch.stack([0 * mean, 1.5 * mean / mean.square().sum()]))
    assert abs(collab(*inputs)[2][0, 1] - sigmoid(1.5)) < 1e-6  # and the worse one starts at .82
    optimizer = torch.optim.Adam([collab.w], lr=0.03)
    for _ in range(100):
        optimizer.zero_grad()
        mutual, l_competence, *_ = collab(*inputs)
        (mutual + l_competence).sum().backward()
        optimizer.step()
    assert abs(collab(*inputs)[2][0, 0] - end) < 0.03


# ---------------------------------------------------------------- collapse
def minimise_mutual(trained, standardized, steps=200):
    """Fixed states of two students that share some of what they say -> compared states (S, N, d) after training."""
    latent, token = randn(400, 20).float() * torch.linspace(1, 0.2, 20), torch.arange(400)
    z = [latent @ randn(20, k, seed=k).float() / 4.5 + 0.3 * randn(400, k, seed=k + 1).float() for k in (48, 64)]
    inputs = (z, [token, token], token // 20, torch.ones(20, 2, dtype=torch.bool), torch.zeros(20, 2))
    torch.manual_seed(0)
    collab = qr.Collaboration([48, 64], 32, trained, standardized)
    optimizer = torch.optim.Adam([p for p in collab.parameters() if p.requires_grad], lr=0.01)
    for _ in range(steps if trained else 0):
        optimizer.zero_grad()
        collab(*inputs)[0].sum().backward()
        optimizer.step()
    return collab(*inputs)[4].detach()


def test_trained_projections_vanish_without_standardisation_and_lose_rank_with_it():
    assert minimise_mutual(True, False).std(1).mean() < 0.1 * minimise_mutual(False, False).std(1).mean()
    frozen, flat = minimise_mutual(False, True), minimise_mutual(True, True)
    for s in range(2):
        assert abs(flat[s].std(0).mean() - 1) < 0.01  # the spread looks healthy
        assert qr.effective_rank(flat[s]) < 0.5 * qr.effective_rank(frozen[s])


def test_frozen_projections_are_frozen_and_keep_the_scale_of_a_feature():
    collab = qr.Collaboration([512], 256)
    assert not any(p.requires_grad for p in collab.proj.parameters()) and collab.w.requires_grad
    assert abs(collab.proj[0](randn(100, 512).float()).std() - 1) < 0.05


def test_effective_rank_matches_numpy_and_known_cases():
    x = randn(50, 6) * torch.tensor([3.0, 2.0, 1.0, 0.5, 0.1, 0.0]) + 7  # an offset is no direction
    share = np.linalg.eigvalsh(np.cov(x.numpy().T)).clip(1e-300)
    share = share / share.sum()
    assert abs(qr.effective_rank(x) - np.exp(-(share * np.log(share)).sum())) < 1e-4
    assert abs(qr.effective_rank(torch.outer(randn(20), randn(5, seed=1))) - 1) < 1e-4
    assert abs(qr.effective_rank(torch.cat([torch.eye(5), -torch.eye(5)])) - 5) < 1e-4
    assert abs(qr.effective_rank(torch.ones(4, 3)) - 1) < 1e-4
