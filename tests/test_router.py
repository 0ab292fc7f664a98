"""Claims about router.py beside its equations (test_equations.py): Eq 1, gates, costs, segments,
and the collaboration of students with different tokenizers."""
import itertools
import json
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModel, AutoTokenizer, BatchEncoding

import router as qr

QUESTION = torch.tensor([0, 0, 0, 1, 1, 2, 2, 2, 2])  # nine paths of three questions
PAIRS = list(itertools.product(range(9), range(2)))  # of a path and a student
PRINTED = pytest.mark.parametrize("printed", [(), {"eq9"}])


def randn(*shape, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape))


def peers(path, printed=()):
    """Numbers of the paths of the path's question, as printed of all."""
    return [k for k in range(9) if printed or QUESTION[k] == QUESTION[path]]


def slope(function, x, eps=1e-5):
    """Gradient of a number, function(x), by central differences."""
    steps = (eps * np.eye(x.size)).reshape(-1, *x.shape)
    return np.array([function(x + e) - function(x - e) for e in steps]).reshape(x.shape) / 2 / eps


# ------ Eq 1: path embeddings
def test_hash_embedding_is_the_same_in_every_process():
    pinned = {4: 0.4883, 5: 0.4883, 7: -0.3081, 9: -0.3081, 10: 0.3081, 13: -0.4883}
    h = qr.hash_embed(["To be or not to be"], 16)[0]  # Python's own hash() would change
    assert torch.allclose(h, torch.tensor([pinned.get(k, 0.0) for k in range(16)]), atol=1e-4)


def test_eq_1_is_the_mean_of_the_states_of_real_tokens():
    states, mask = randn(2, 3, 4), torch.tensor([[1, 1, 1], [1, 0, 0]])
    encoder = Mock(device="cpu", return_value=SimpleNamespace(last_hidden_state=states))
    tokenizer = Mock(return_value=BatchEncoding({"attention_mask": mask}))
    h = qr.encoder_embed(encoder, tokenizer, [("question", "path"), ("question", "")])
    assert torch.allclose(h.double(), torch.stack([states[0].mean(0), states[1, 0]]), atol=1e-6)


def test_a_path_is_embedded_the_same_beside_a_longer_one(models_dir):
    model = AutoModel.from_pretrained(models_dir / "minilm").eval()
    tokenizer = AutoTokenizer.from_pretrained(models_dir / "minilm")
    pairs = [("one two", "three"), ("four", "five six seven one two three"), ("two", "one")]
    alone = torch.cat([qr.encoder_embed(model, tokenizer, [pair]) for pair in pairs])
    assert torch.allclose(qr.encoder_embed(model, tokenizer, pairs), alone, atol=1e-5)


# ------ Eq 2: gates
@pytest.mark.parametrize("hidden", [0, 8])
def test_router_and_competence_start_without_a_favourite(hidden):
    assert torch.equal(qr.Router(5, 3, hidden)(randn(7, 5).float()), torch.zeros(7, 3))
    assert not qr.Collaboration([5, 6]).w.any()


def soft_sample(gate, logits, u):
    """A gate's soft sample of uniform numbers u and whether it is 1, pair by pair."""
    x = np.exp(logits) * (u / (1 - u) if gate == "binary" else 1 / -np.log(u))
    soft, hard = np.empty_like(x), np.empty_like(x)
    for p, s in PAIRS:
        mine = x[peers(p), s]
        rivals = {"onehot": x[p], "categorical": mine, "binary": [x[p, s], 1]}[gate]
        all_shut = gate == "binary" and max(mine) < 1  # then the nearest to opening opens
        soft[p, s] = x[p, s] / sum(rivals)
        hard[p, s] = x[p, s] == max(mine if all_shut else rivals)
    return soft, hard


@pytest.mark.parametrize("gate", qr.GATES)
def test_a_gate_has_the_value_of_the_hard_and_the_gradient_of_the_soft_sample(gate):
    logits, g = (randn(9, 2) - 1).requires_grad_(), randn(9, 2, seed=1).numpy()
    u = torch.rand(9, 2, generator=torch.Generator().manual_seed(0)).double().numpy()
    alpha, _ = qr.GATES[gate](logits, QUESTION, torch.Generator().manual_seed(0))
    (alpha * torch.tensor(g)).sum().backward()
    x = logits.detach().numpy()
    assert np.array_equal(alpha.detach(), soft_sample(gate, x, u)[1])
    assert np.allclose(logits.grad, slope(lambda y: (soft_sample(gate, y, u)[0] * g).sum(), x))


@pytest.mark.parametrize(("gate", "least"), [("categorical", 1), ("binary", 1), ("onehot", 0)])
def test_each_student_gets_a_path_of_every_question_but_from_the_printed_gate(gate, least):
    logits, generator = randn(9, 2), torch.Generator().manual_seed(0)
    draws = [qr.GATES[gate](logits, QUESTION, generator)[0] for _ in range(200)]
    assert min(qr.per_question(alpha, QUESTION).min() for alpha in draws) == least


def test_softmax_per_question_is_that_of_torch_and_survives_large_logits():
    for x in (randn(9, 2), 1e4 * randn(9, 2)):
        wanted = torch.cat([torch.softmax(x[QUESTION == q], 0) for q in range(3)])
        assert torch.allclose(qr.softmax_per_question(x, QUESTION), wanted)


def test_the_best_path_is_the_first_of_the_highest():
    score = torch.tensor([[1, 3, 3, 0, -2, -1, 7, 7, 1.0], [5, 5, 2, 0, -1, -1, 7, 8, 8]]).T
    kept = qr.keep_best(score, QUESTION)
    for p, s in PAIRS:
        assert kept[p, s] == (p == max(peers(p), key=lambda k: (score[k, s], -k)))


# ------ Eq 9: what the router is paid
def test_posterior_loss_has_the_gradient_p_minus_the_students_own_choice():
    logits, cost = randn(9, 2).requires_grad_(), 30 + 3 * randn(9, 2, seed=1)
    qr.posterior_loss(logits, cost, QUESTION).backward()
    for q in range(3):
        mine = QUESTION == q
        p, own = torch.softmax(logits[mine], 0), torch.softmax(-cost[mine], 0)
        assert torch.allclose(logits.grad[mine], (p - own) / 3)


@pytest.mark.parametrize("penalty", [0, 0.3, 1])
def test_a_length_penalty_compares_whole_paths_or_paths_by_the_token(penalty):
    nll, length = 30 + 3 * randn(9, 2), torch.arange(5, 23).view(9, 2)
    cost = qr.normalize_length(nll, length, QUESTION, penalty)
    for p, s in PAIRS:
        ratio = length[p, s] / np.mean(length[peers(p), s].tolist())
        assert abs(cost[p, s] - nll[p, s] / ratio ** penalty) < 1e-5  # a length is float32


@PRINTED
@pytest.mark.parametrize("kind", [torch.bool, torch.float64])
def test_a_pair_that_was_not_run_costs_the_mean_of_the_routed_ones(kind, printed):
    cost, routed, probed = randn(9, 2), randn(9, 2, seed=1) < 0, (QUESTION == 1)[:, None]
    run = routed | probed
    known = torch.where(run, cost, 1e9)
    filled = qr.fill_skipped(known, routed.to(kind), QUESTION, printed, probed)
    for p, s in PAIRS:
        theirs = [cost[k, s] for k in peers(p, printed) if routed[k, s]]
        wanted = cost[p, s] if run[p, s] and theirs else np.mean(theirs or 0)
        assert abs(filled[p, s] - wanted) < 1e-12


def l_distill(alpha, nll, printed):
    """Eq 9's first term: a mean over routed paths, question by question, as printed of all."""
    total, groups = 0.0, [peers(p, printed) for p in ([0] if printed else [0, 3, 5])]
    for s in range(2):
        routed = [group for group in groups if alpha[group, s].any()]
        total += np.mean([np.average(nll[group, s], weights=alpha[group, s]) for group in routed])
    return total


def gate_gradient(alpha, nll, printed, probed=False):
    alpha = torch.tensor(alpha, requires_grad=True)
    known = torch.where((alpha > 0) | probed, nll, 1e9)  # whatever was not run plays no part
    cost = qr.fill_skipped(known, alpha, QUESTION, printed, probed)
    (qr.path_weights(alpha, QUESTION, printed) * cost).sum().backward()
    return alpha.grad.numpy()


@PRINTED
def test_a_gate_gets_the_derivative_of_the_student_losses(printed):
    nll, alpha = randn(9, 2).exp(), np.ones((9, 2))
    wanted = slope(lambda a: l_distill(a, nll.numpy(), printed), alpha)
    assert np.allclose(gate_gradient(alpha, nll, printed), wanted)


@PRINTED
@pytest.mark.parametrize("probed", [False, (QUESTION == 0)[:, None]])
def test_a_pair_that_was_not_run_gives_its_gate_no_gradient(printed, probed):
    alpha = (randn(9, 2, seed=1).numpy() < 0).astype(float)
    alpha[:3, 1] = 0
    skipped = (alpha == 0) & ~np.asarray(probed)
    skipped[:3, 1] |= not printed  # probed, but no routed path of the question to compare with
    gradient = gate_gradient(alpha, randn(9, 2).exp(), printed, probed)
    assert np.abs(gradient[skipped]).max() < 1e-15 and gradient.any()


@PRINTED
def test_printed_eq_9_shuts_every_gate_of_a_hard_question_and_ours_compares_its_paths(printed):
    nll = randn(9, 2).exp() + 10 * (QUESTION == 2)[:, None]
    of_hard = gate_gradient(np.ones((9, 2)), nll, printed)[5:]
    assert (of_hard > 0).all() if printed else np.abs(of_hard.sum(0)).max() < 1e-12


# ------ Eq 5 to Eq 8: segments
def segments_of(offsets):
    segments, n = qr.shared_segments(offsets)
    return [x.tolist() for x in segments], n


def segments_by_hand(offsets):
    """Cut between two characters wherever no token of any tokenizer lies across."""
    spans = [span for of_student in offsets for span in of_student]
    cuts = [c for c in range(1, max(spans)[1]) if not any(a < c < b for a, b in spans)]
    return [[sum(c <= a for c in cuts) for a, _ in x] for x in offsets], len(cuts) + 1


ONE, TWO = [(0, 2), (2, 5), (5, 6)], [(0, 1), (1, 2), (2, 3), (3, 6)]
EMOJI = [(0, 1), (1, 2), (1, 2), (1, 2), (2, 3)]  # the second character in three byte pieces


@pytest.mark.parametrize(("offsets", "segments"), [
    ([ONE, TWO], [[0, 1, 1], [0, 0, 1, 1]]),
    ([ONE, ONE], [[0, 1, 2], [0, 1, 2]]),  # equal tokenizers: token by token
    ([ONE, TWO, [(0, 6)]], [[0, 0, 0], [0, 0, 0, 0], [0]]),
    ([EMOJI, EMOJI], [[0, 1, 1, 1, 2]] * 2),
    ([EMOJI, [(0, 1), (1, 3)]], [[0, 1, 1, 1, 1], [0, 1]])])
def test_segments_of_hand_made_spans(offsets, segments):
    assert segments_of(offsets) == segments_by_hand(offsets) == (segments, segments[0][-1] + 1)


def test_segments_match_brute_force_on_random_tokenisations():
    rng = np.random.default_rng(0)
    for _ in range(300):
        offsets = []
        for _ in range(rng.integers(1, 4)):
            cuts = [0, *(1 + np.flatnonzero(rng.random(11) < 0.5)).tolist(), 12]
            spans = list(itertools.pairwise(cuts))
            offsets.append(sorted(spans + [(a, b) for a, b in spans if b == a + 1]))  # byte pieces
        assert segments_of(offsets) == segments_by_hand(offsets), offsets


TEXTS = ["So 1,234.50 + 9999999 = 10001233.50\n\n", "   leading\n\n\n\tand    inner  spaces",
         "family 👩‍👩‍👧‍👦 flag 🏳️‍🌈 thumb 👍🏽🎉", "日本語の文章です。漢字と12個の例", "a\r\nb\u200dc\u00a0d",
         "cafe\u0301 \u1112\u1161\u11ab, русский, हिन्दी, עברית", "𓀀𓁀 𝟙𝟚𝟛 ꙮ"]


def test_segments_match_brute_force_on_real_tokenizers(models_dir, data_dir):
    with open(data_dir / "paths" / "gsm8k.jsonl") as file:
        paths = [json.loads(next(file))["path"].strip() for _ in range(8)]
    tokenizers = [AutoTokenizer.from_pretrained(models_dir / x) for x in ("smollm2", "gemma3")]
    for text in TEXTS + paths:
        offsets = [tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
                   ["offset_mapping"] for tokenizer in tokenizers]
        assert segments_of(offsets) == segments_by_hand(offsets), text


# ------ Eq 5 to Eq 8: collaboration
def example(students, printed):
    """Three co-routed paths of 5, 1 and 4 segments, of different tokens for each student."""
    torch.manual_seed(0)
    collab = qr.Collaboration([6 + s for s in range(students)], 8, printed).double()
    collab.w.data = randn(students, 8)
    path, routed = torch.tensor([0] * 5 + [1] + [2] * 4), torch.ones(3, students, dtype=torch.bool)
    routed[0, 2:] = False  # of three students, the last and the first miss a path each
    routed[2, :students - 2] = False
    z, segment = [], []
    for s in range(students):
        tokens = torch.arange(10).repeat_interleave(torch.randint(1, 4, (10,)))
        segment.append(tokens[routed[path[tokens], s]])
        z.append(randn(len(segment[s]), 6 + s, seed=s).requires_grad_())
    return collab, (z, segment, path, routed, randn(3, students, seed=9).exp())


def by_hand(collab, z, segment, path, routed, nll):
    """L_mutual, L_competence and gamma, path by path."""
    rows, fitted = [], "eq6" not in collab.printed
    for c in range(len(routed)):
        own, its = np.flatnonzero(routed[c]), np.flatnonzero(path == c)
        zt = torch.stack([torch.stack([z[s][segment[s] == i].mean(0) for i in its])
                          @ collab.proj[s].weight.T for s in own])  # (S, N, d), Eq 5
        mean = zt.mean(1).detach() if fitted else zt.mean(1)
        own_gamma = torch.softmax((collab.w[own] * F.layer_norm(mean, (8,))).sum(1), 0)  # Eq 6
        if "eq8" not in collab.printed:
            zt = zt - zt.mean(1, keepdim=True)
            zt = zt / (zt.square().mean(1, keepdim=True) + 1e-5).sqrt()
        z_ens = torch.tensordot(own_gamma, zt, 1)  # Eq 7
        mutual = (zt - (z_ens.detach() if fitted else z_ens)).square().mean((1, 2)).sum()  # Eq 8
        competence = -(torch.softmax(-nll[c, own], 0) * own_gamma.log()).sum() * fitted
        gamma = torch.zeros_like(nll[c]).index_put((torch.tensor(own),), own_gamma)
        rows.append((mutual, competence, gamma))
    return [torch.stack(column) for column in zip(*rows)]


@pytest.mark.parametrize("printed", [set(), {"eq5"}, {"eq6"}, {"eq8"}, {"eq5", "eq6", "eq8"}])
@pytest.mark.parametrize("students", [1, 2, 3])
def test_collaboration_and_its_gradients_match_brute_force(students, printed):
    collab, inputs = example(students, printed)
    ours, wanted = collab(*inputs)[:3], by_hand(collab, *inputs)
    leaves = [*inputs[0], *(x for x in collab.parameters() if x.requires_grad)]
    slopes = [torch.autograd.grad((mutual + competence).sum(), leaves, materialize_grads=True)
              for mutual, competence, _ in (ours, wanted)]
    for x, y in zip([*ours, *slopes[0]], [*wanted, *slopes[1]]):
        assert torch.allclose(x, y)


def test_micro_batches_of_paths_change_nothing():
    collab, (z, segment, path, routed, nll) = example(3, ())
    together = collab(z, segment, path, routed, nll)
    for c in range(3):
        own, first = [path[x] == c for x in segment], int((path < c).sum())
        alone = collab([x[mine] for x, mine in zip(z, own)],
                       [x[mine] - first for x, mine in zip(segment, own)],
                       0 * path[path == c], routed[[c]], nll[[c]])
        for x, y in zip(together[:3], alone):
            assert torch.allclose(x[c], y[0])


def test_the_competences_target_is_a_softmax_over_the_routed_students_alone():
    target = qr.competence_target(torch.tensor([[1.0, 2, 0]]), torch.tensor([[True, True, False]]))
    assert target[0].tolist() == pytest.approx([0.7311, 0.2689, 0], abs=1e-4)
