"""Claims about --route nll, lalp, rsr, lark: written-out numbers, the papers' properties, and Hugging Face's logits."""
import itertools
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_distill import (  # noqa: F401
    Killed,
    as_student,
    die_after,
    fake_rows,
    files_of,
    flags_of,
    one_thread,
    same_run,
    tiny_model,
    train,
    world,
)
from torch.utils._python_dispatch import TorchDispatchMode

import distill
import router as qr

ROUTES = ("nll", "lalp", "rsr", "lark")


def paths(*cost):
    """Arguments of a score for whole paths: (mean surprisal, mean rank, mean Brier, question) of each."""
    cost = torch.tensor(cost, dtype=torch.float64)
    return cost[:, :3], torch.arange(len(cost)), cost[:, 3].long()


def close(a, b):
    return torch.allclose(torch.as_tensor(a).double(), torch.tensor(b, dtype=torch.float64), atol=1e-6)


# ---------------------------------------------------------------- the scores
def test_costs_of_a_token_are_surprisal_rank_and_brier():
    p = torch.tensor([0.5, 0.25, 0.125, 0.125])
    costs = qr.token_costs(p.log().expand(4, 4) + 7, torch.arange(4))
    ln2 = math.log(2)
    # Brier: (1 - p)^2 + sum of the others' squares, for instance .75^2 + .5^2 + 2 * .125^2 = .84375
    assert close(costs, [[ln2, 1, 0.34375], [2 * ln2, 2, 0.84375], [3 * ln2, 3, 1.09375], [3 * ln2, 3, 1.09375]])
    assert qr.token_costs(p.log().expand(4, 4), torch.arange(4), clip=2)[:, 1].tolist() == [1, 2, 2, 2]


def test_rank_is_clipped_at_100():
    logits = -torch.arange(1000.0).expand(3, 1000)
    assert qr.token_costs(logits, torch.tensor([98, 99, 900]))[:, 1].tolist() == [99, 100, 100]


def test_nll_prefers_the_likeliest_path_per_token():
    assert close(qr.score_nll(*paths((0.5, 1, 0.1, 0), (0.25, 9, 0.9, 0))), [-0.5, -0.25])


def test_lalp_weighs_steps_alike_however_long_they_are():
    # A path of steps with surprisal 1 and 3, another of 2, 2 and 5: minus 2 and minus 3.
    cost = torch.tensor([[1.0, 0, 0], [3, 0, 0], [2, 0, 0], [2, 0, 0], [5, 0, 0]])
    assert close(qr.score_lalp(cost, torch.tensor([0, 0, 1, 1, 1]), torch.tensor([0, 0])), [-2, -3])


def test_rsr_is_mean_rank_over_mean_surprisal():
    # Tokens of surprisal .1 and 2.9, rank 1 and 3: 4 / 3, not the mean of 1 / .1 and 3 / 2.9.
    tokens = torch.tensor([[0.1, 1, 0], [2.9, 3, 0]])
    assert close(qr.score_rsr(tokens.mean(0, keepdim=True), *paths((0, 0, 0, 0))[1:]), [-4 / 3])
    # Of two paths with all tokens first choice the surprising one wins; of two as surprising, the better ranked.
    sure, unsure, far = -qr.score_rsr(*paths((0.1, 1, 0, 0), (1.5, 1, 0, 0), (1.5, 6, 0, 0)))
    assert unsure < far < sure


def test_lark_is_the_published_formula():
    # Losses 1 and 3, Brier .5 and .9, so rates .5 and .3, their mean by loss (.5 + .9) / 4 = .35:
    # 1/4 (2 * .5 - .35) = .1625 and 3/4 (2 * .3 - .35) = .1875. A question's only path has its own rate, 1 / 2.
    score = qr.score_lark(*paths((1, 9, 0.5, 0), (2, 9, 1.0, 1), (3, 9, 0.9, 0)))
    assert close(score, [0.1625, 0.5, 0.1875])


def test_lark_adds_up_to_the_rate_of_the_question_and_prefers_loss_that_falls_fast():
    cost, path, question = paths(*((1 + k % 3, 1, 0.3 + 0.1 * k, k // 4) for k in range(8)))
    total = qr.per_question(cost, question)
    assert torch.allclose(qr.per_question(qr.score_lark(cost, path, question), question), total[:, 2] / total[:, 0])
    slow, fast = qr.score_lark(*paths((2, 1, 0.5, 0), (2, 1, 0.9, 0)))  # as much loss, at another rate
    little, much = qr.score_lark(*paths((1, 1, 0.3, 0), (2, 1, 0.6, 0)))  # another loss, at the same rate
    assert fast > slow and much > little


# ---------------------------------------------------------------- steps
TEXT = ("We add 3.5 and 2. That gives 5.5!\n\n1. Check: is it so? Yes.\n2) Done.\nx = 1\n  y = 2\nThe answer is 5.5",
        ["We add 3.5 and 2. ", "That gives 5.5!\n\n", "1. Check: is it so? ", "Yes.\n", "2) Done.\n", "x = 1\n  ",
         "y = 2\n", "The answer is 5.5"])


@pytest.mark.parametrize("piece", [1, 2, 3, 7])
def test_steps_are_sentences_and_lines_and_a_token_across_two_belongs_to_the_second(piece):
    text, steps = TEXT
    assert "".join(steps) == text
    spans = [(a, min(a + piece, len(text))) for a in range(0, len(text), piece)]
    ends = np.cumsum([len(step) for step in steps])
    expected = sorted({next(t for t, (_, end) in enumerate(spans) if end > start) for start in [0, *ends[:-1]]})
    assert qr.step_starts(text, spans) == expected
    if piece == 1:
        cuts = [*qr.step_starts(text, spans), len(text)]
        assert [text[a:b] for a, b in itertools.pairwise(cuts)] == steps


def test_a_path_of_one_step_has_one_step():
    assert qr.step_starts("so 7", [(0, 2), (2, 4)]) == [0]


# ---------------------------------------------------------------- the selection
def test_best_path_is_one_per_question_and_student_and_the_first_of_equals():
    question = torch.tensor([0, 1, 0, 1, 0, 2])
    score = torch.tensor([[1.0, 5], [2, -1], [3, 5], [2, -1], [2, 4], [-9, -9]])
    alpha = qr.keep_best(score, question)
    assert alpha.tolist() == [[0, 1], [1, 1], [1, 0], [0, 0], [0, 0], [1, 1]]
    assert torch.equal(qr.per_question(alpha, question), torch.ones(3, 2))


@pytest.mark.parametrize("kind", ["llama", "neox", "gemma2"])  # gemma2: capped logits
def test_costs_equal_those_of_hugging_faces_logits(kind):
    model = tiny_model(kind)
    rows = fake_rows([(5, 9), (1, 2), (12, 20), (30, 4), (2, 31), (7, 1)], 60)
    prompts, responses = ([row[name][0] for row in rows] for name in ("prompts", "responses"))
    student, seen = as_student(model), []
    with torch.no_grad():
        for batch, h in distill.response_states(student, prompts, responses, SimpleNamespace(forward_tokens=60, compile=False, share_prompts=False)):
            costs = distill.response_costs(student, h, torch.from_numpy(np.concatenate([responses[i] for i in batch])))
            for i, got in zip(batch, costs.split([len(responses[i]) for i in batch])):
                ids = torch.from_numpy(np.concatenate([prompts[i], responses[i]]))
                p = torch.softmax(model(input_ids=ids[None]).logits[0, len(prompts[i]) - 1:-1].double(), -1).numpy()
                for row, y, cost in zip(p, responses[i], got.tolist()):
                    onehot = np.arange(60) == y
                    assert np.allclose(cost, [-np.log(row[y]), 1 + (row > row[y]).sum(), ((row - onehot) ** 2).sum()], atol=1e-4)
                seen.append(i)
    assert sorted(seen) == list(range(len(rows)))


def test_no_tensor_ever_holds_all_logits(monkeypatch):
    monkeypatch.setattr(distill, "max", lambda *a: 7, raising=False)
    model, sizes = tiny_model("untied", vocab=90), []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            sizes.extend(x.numel() for x in (out if isinstance(out, (tuple, list)) else [out]) if isinstance(x, torch.Tensor))
            return out

    h = torch.randn(700, 16)
    with torch.no_grad(), Watch():
        distill.response_costs(as_student(model), h, torch.arange(700) % 90)
    assert max(sizes) < 700 * 90 / 4


@pytest.fixture
def select(world, monkeypatch):  # noqa: F811
    """select.run(route) -> scores (P, S) and alpha of untrained students; and the rows and students behind them."""
    args = distill.parse_args(flags_of(world, "nowhere", students=("words", "dropout")))
    args.forward_tokens = 500
    students = distill.load_students(args, torch.device("cpu"))
    rows = distill.encode(world.rows[:24], students)  # four questions
    ids = list(dict.fromkeys(row["id"] for row in rows))
    questions = [[p for p, row in enumerate(rows) if row["id"] == i] for i in ids]
    keep = qr.keep_best

    def run(route, rank=0, processes=1, rows=rows):
        got = []
        for student in students:
            student.model.train()  # dropout has no say in a score
        monkeypatch.setattr(qr, "keep_best", lambda score, question: got.append(score) or keep(score, question))
        alpha = distill.best_paths(rows, questions, students, SimpleNamespace(**{**vars(args), "route": route}), rank, processes)
        return got[0], alpha

    return SimpleNamespace(run=run, rows=rows, questions=questions, students=students)


def surprisal(student, context, tokens):
    """Of `tokens` after `context`, alone and without padding -> (T,) and the probabilities (T, V)."""
    ids = torch.from_numpy(np.concatenate([context, tokens]).astype(np.int64))
    with torch.no_grad():
        p = torch.softmax(student.model(input_ids=ids[None]).logits[0, len(context) - 1:-1].double(), -1)
    return -p.gather(1, ids[len(context):, None])[:, 0].log(), p


def published(route, select, s):
    """Scores (P,) of a student path by path, from the papers' formulas over Hugging Face's logits."""
    student, score, parts = select.students[s], [], []
    for row in select.rows:
        prompt, response = row["prompts"][s], row["responses"][s]
        nll, p = surprisal(student, prompt, response)
        if route == "lalp":  # the steps' texts, found again among the tokens' texts
            pieces = [student.tokenizer.decode([i]) for i in response[:-1]]
            starts = qr.step_starts(row["text"], [(0, len("".join(pieces[:t + 1]))) for t in range(len(pieces))])
            ends = [*starts[1:], len(response)]
            means = [surprisal(student, np.concatenate([prompt, response[starts[max(0, k - 4)]:start]]), response[start:end])[0].mean()
                     for k, (start, end) in enumerate(zip(starts, ends))]
            score.append(-sum(means) / len(means))
        else:
            own = p.gather(1, torch.from_numpy(response.astype(np.int64))[:, None])
            rank = (1 + (p > own).sum(1)).clamp(max=100).sum()
            parts.append((nll.mean(), (1 - 2 * own[:, 0] + (p ** 2).sum(1)).mean()))
            score.append({"nll": -nll.mean(), "rsr": -rank / nll.sum(), "lark": 0}[route])
    if route == "lark":
        for mine in select.questions:
            total = sum(parts[p][0] for p in mine)
            mixed = sum(parts[p][1] for p in mine) / total
            for p in mine:
                loss, brier = parts[p]
                score[p] = loss / total * (2 * brier / loss - mixed)
    return torch.stack(score)


@pytest.mark.parametrize("route", ROUTES)
def test_students_keep_the_path_that_the_published_formula_puts_first(select, route):
    scores, alpha = select.run(route)
    assert alpha.sum() == len(select.questions) * 2
    for s in range(2):
        expected = published(route, select, s)
        assert torch.allclose(scores[:, s].double(), expected, rtol=1e-4, atol=1e-5)
        for mine in select.questions:
            assert alpha[mine, s].tolist() == [float(p == max(mine, key=expected.__getitem__)) for p in mine]


def test_lalp_forgets_what_lies_more_than_four_steps_back_and_nll_does_not(select, monkeypatch):
    text = "We get 6. " * 7 + "The answer is 7"
    rows = [{**select.rows[p], "path": text.replace("We get", first, 1)} for p, first in ((0, "We get"), (0, "Facts:"))]
    rows = distill.encode(rows, select.students)
    seen = []
    monkeypatch.setitem(qr.SCORES, "lalp", lambda cost, path, question: seen.append((cost, path)) or torch.zeros(2))
    distill.best_paths(rows, [[0, 1]], select.students, SimpleNamespace(route="lalp", forward_tokens=500, compile=False, share_prompts=False))
    for cost, path in seen:
        a, b = (cost[path == p, 0] for p in (0, 1))
        changed = ((a - b).abs() > 1e-5).tolist()
        assert changed == [True] * 5 + [False] * 3  # the step itself and the four that see it
    s = select.students[0]
    nll = [surprisal(s, row["prompts"][0], row["responses"][0])[0] for row in rows]
    assert (nll[0] - nll[1]).abs()[-3:].max() > 1e-5


def test_a_path_of_one_step_has_the_same_score_in_lalp_and_nll(select):
    rows = distill.encode([{**row, "path": "The answer is 7"} for row in select.rows], select.students)
    assert torch.allclose(select.run("lalp", rows=rows)[0], select.run("nll", rows=rows)[0], atol=1e-5)


@pytest.mark.parametrize("route", ["lalp", "lark"])
def test_processes_score_a_share_each_and_all_get_all_scores(select, monkeypatch, route):
    alone, alpha = select.run(route)
    shares = {0: [], 1: []}
    for rank in (0, 1):
        monkeypatch.setattr(distill.dist, "all_reduce", lambda x, rank=rank: shares[rank].append(x.clone()))
        select.run(route, rank, 2)
    for a, b in zip(*shares.values()):
        assert ((a[:, 0] > 0) ^ (b[:, 0] > 0)).all()
    for rank in (0, 1):
        other = iter(shares[1 - rank])
        monkeypatch.setattr(distill.dist, "all_reduce", lambda x, other=other: x.add_(next(other)))
        scores, same = select.run(route, rank, 2)
        assert torch.allclose(scores, alone, atol=1e-5) and torch.equal(same, alpha)


# ---------------------------------------------------------------- whole runs
@pytest.mark.parametrize("route", ROUTES)
def test_a_run_trains_the_chosen_path_of_each_question_and_no_other(world, train, monkeypatch, route):  # noqa: F811
    chosen, trained = {}, {0: set(), 1: set()}
    best, forward = distill.best_paths, distill.forward_paths

    def note(rows, questions, students, *a):
        alpha = best(rows, questions, students, *a)
        chosen.update({s: {(rows[p]["id"], rows[p]["style"]) for p in alpha[:, s].nonzero()[:, 0].tolist()} for s in (0, 1)})
        return alpha

    monkeypatch.setattr(distill, "best_paths", note)
    monkeypatch.setattr(distill, "forward_paths", lambda student, s, rows, *a: trained[s].update(
        (row["id"], row["style"]) for row in rows) or forward(student, s, rows, *a))
    run = train("--route", route, "--max_steps", 10)  # 19 questions, four a step: two epochs
    assert trained == chosen and all(len({i for i, _ in kept}) == len(kept) for kept in chosen.values())
    assert all(abs(sum(line["rate"]) / 2 - 1 / 6) < 0.1 and line["entropy"] is None for line in run.log)
    assert set(run.results["selection_rate"]) == {row["style"] for row in world.rows}


def test_a_resumed_run_goes_on_with_the_untrained_students_selection(world, train, tmp_path, monkeypatch):  # noqa: F811
    best, made = distill.best_paths, []

    def note(*a):
        made.append((best(*a), a))
        return made[-1][0]

    monkeypatch.setattr(distill, "best_paths", note)
    flags = ("--route", "lark", "--save_every", 1, "--max_steps", 5)
    whole = train(*flags, name="whole")
    with monkeypatch.context() as patch, pytest.raises(Killed):
        die_after(patch, distill, "clip_and_step", 4 * 3)
        distill.main(flags_of(world, tmp_path / "killed", *flags))
    distill.main(["--resume", str(tmp_path / "killed")])
    same_run(files_of(tmp_path / "killed"), {k: vars(whole)[k] for k in ("results", "log", "weights", "predictions")})
    (a, call), (b, _), (c, _) = made
    assert torch.equal(a, b) and torch.equal(a, c)
    assert not torch.equal(best(*call[:2], whole.students, *call[3:]), a)  # the trained ones would choose otherwise


def test_learned_runs_score_nothing(train, monkeypatch):  # noqa: F811
    monkeypatch.setattr(distill, "best_paths", lambda *a: 1 / 0)
    train("--route", "learned")


def test_an_unknown_route_is_refused_with_those_there_are(world, tmp_path, capsys):  # noqa: F811
    with pytest.raises(SystemExit) as e:
        distill.main(flags_of(world, tmp_path / "run", "--route", "surprise"))
    said = capsys.readouterr().err
    assert e.value.code == 2 and said.count("\n") == 1 and all(route in said for route in ROUTES)
