"""QR-Distill, Eq 1 to Eq 8: the path encoder, the router and the collaboration of the students.

Pure functions and tiny modules, tensors in and tensors out: no files, no flags. Shapes in this file:
P paths, Q questions, S students, d features; `question` (P,) holds each path's question as 0..Q-1. The paper
is Lei et al., EMNLP 2025 (arXiv 2508.16861); "departs" marks where its equations are open or degenerate, and
"open point N" the list of these places in README.md.
"""
import bisect
import itertools
import math
import re
import zlib

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn


# ---------------------------------------------------------------- Eq 1: h_ij = Enc(Q_i, R_ij), frozen
def hash_embed(texts, d=512):
    """Offline stand-in for a text encoder: signed feature hashing (Weinberger et al., 2009) of word 1- and 2-grams.

    texts: P strings -> (P, d) float32 rows of unit length (zero for an empty text). The same on every machine.
    """
    h = torch.zeros(len(texts), d)
    for row, text in zip(h.numpy(), texts):
        words = re.findall(r"\d+|\w+|[^\w\s]|\n", text.lower())
        grams = words + [a + " " + b for a, b in itertools.pairwise(words)]
        # crc32 and not hash(): that one changes with every process
        code = np.fromiter((zlib.crc32(gram.encode()) for gram in grams), np.uint32, len(grams))
        row += np.bincount(code % d, np.where(code >> 31, 1.0, -1.0), d)
    return F.normalize(h.abs().log1p_().copysign_(h), dim=-1)


@torch.no_grad()
def encoder_embed(model, tokenizer, pairs, max_length=512):
    """One batch of Eq 1 with a Hugging Face encoder: the mean of its last hidden states over real tokens.

    pairs: P tuples (question, path), cut to `max_length` tokens together -> (P, d) float32 on the CPU.
    """
    batch = tokenizer([q for q, _ in pairs], [p for _, p in pairs], truncation="longest_first",
                      max_length=max_length, padding=True, return_tensors="pt").to(model.device)
    hidden = model(**batch).last_hidden_state.float()  # (P, T, d)
    mask = batch["attention_mask"].unsqueeze(-1)
    return ((hidden * mask).sum(1) / mask.sum(1).clamp(min=1)).cpu()


# ---------------------------------------------------------------- Eq 2: alpha_ij = Gumbel(MLP(h_ij))
class Router(nn.Module):
    """Logits (P, S) of the gates from path embeddings h (P, d): linear, or the paper's MLP with a `hidden` width."""

    def __init__(self, d, students, hidden=0, bound=4.0):
        super().__init__()
        self.net = nn.Linear(d, students) if hidden == 0 else nn.Sequential(
            nn.Linear(d, hidden), nn.ReLU(), nn.Linear(hidden, students))
        self.bound = bound
        last = self.net if hidden == 0 else self.net[-1]
        nn.init.zeros_(last.weight)  # all paths start with the same odds: no style is favoured by the initialisation
        nn.init.zeros_(last.bias)

    def forward(self, h):
        # Bounded, so that no gate saturates for good: p stays within [.018, .982] at bound 4 (open point 5).
        return self.bound * torch.tanh(self.net(h) / self.bound)


def binary_gate(logits, tau=1.0, generator=None, question=None):
    """Eq 2, departs: one straight-through binary gate per student, so a path may reach one, several or no student.

    logits (P, S) -> alpha (P, S) and its soft value. The difference of two Gumbels is logistic noise, hence
    P(alpha = 1) = sigmoid(logits) at every tau; the value is 0 or 1, the gradient that of the soft sample.
    """
    u = torch.rand(logits.shape, generator=generator).to(logits).clamp(1e-6, 1 - 1e-6)
    soft = torch.sigmoid((logits + u.logit()) / tau)
    return straight_through(soft > 0.5, soft), soft


def onehot_gate(logits, tau=1.0, generator=None, question=None):
    """Eq 2 to the letter: Gumbel-softmax over the students, exactly one student per path.

    Same shapes as `binary_gate`. Its rows sum to 1, so Eq 3 is 1/S whatever the router does and Eq 4 has no gradient;
    at_least_one may open a second gate afterwards.
    """
    u = torch.rand(logits.shape, generator=generator).to(logits).clamp(1e-6, 1 - 1e-6)
    soft = torch.softmax((logits - (-u.log()).log()) / tau, -1)
    return straight_through(F.one_hot(soft.argmax(-1), logits.shape[1]), soft), soft


def categorical_gate(logits, tau=1.0, generator=None, question=None):
    """Eq 2, departs: Gumbel-softmax over the paths of a question, student by student: one path of each question.

    A gate that is compared with the question's other paths and not with easier questions learns no difficulty, and
    every question is kept. The balance of Eq 3 and 4 holds by construction: a student's rate is 1 / paths.
    """
    u = torch.rand(logits.shape, generator=generator).to(logits).clamp(1e-6, 1 - 1e-6)
    x = (logits - (-u.log()).log()) / tau
    e = (x - per_question_max(x.detach(), question)[question]).exp()
    soft = e / per_question(e, question)[question]
    return straight_through(keep_best(soft.detach(), question), soft), soft


GATES = {"categorical": categorical_gate, "binary": binary_gate, "onehot": onehot_gate}


def straight_through(hard, soft):
    """Value of `hard`, gradient of `soft` (Bengio et al., 2013)."""
    return hard.to(soft) + (soft - soft.detach())


def at_least_one(alpha, soft, question):
    """Give each student one path of every question: where all of a question's gates are shut, the likeliest opens.

    alpha, soft (P, S), question (P,) -> alpha (P, S). Without it hard questions starve (open point 5).
    """
    open_gates = per_question(alpha.detach(), question)  # (Q, S)
    best = keep_best(soft.detach(), question)
    return alpha + best * (open_gates[question] == 0)


def per_question(x, question):
    """Sum of x (P, ...) over the paths of each question -> (Q, ...)."""
    return x.new_zeros(int(question.max()) + 1, *x.shape[1:]).index_add(0, question, x)


def per_question_max(x, question):
    """Largest x (P, S) over the paths of each question -> (Q, S)."""
    rows = question.unsqueeze(1).expand_as(x)
    return x.new_full((int(question.max()) + 1, x.shape[1]), -math.inf).scatter_reduce(0, rows, x, "amax")


def keep_best(score, question):
    """alpha (P, S): 1 for the path with a question's highest score (P, S), for each student; the first of equals."""
    place = -torch.arange(len(score)).to(score).unsqueeze(1)
    place = torch.where(score == per_question_max(score, question)[question], place, -math.inf)
    return (place == per_question_max(place, question)[question]).to(score)


# ---------------------------------------------------------------- Eq 3 and Eq 4: balance
def balance_entropy(p, question, per_student=True):
    """Eq 3 and Eq 4: the binary entropy (nats, at most ln 2) of a question's selection rate, mean over questions.

    p (P, S): gate probabilities (sampled alpha for the literal form and for categorical gates), question (P,) ->
    scalar. It is MAXIMISED: Eq 9 departs and subtracts it. Eq 3 departs: each student has its own rate, else
    "everything to one student, nothing to the other" would be the optimum (open point 3). per_student=False is Eq 3 as
    printed.
    """
    rate = per_question(p, question) / per_question(torch.ones_like(p), question)  # (Q, S), Eq 3
    if not per_student:
        rate = rate.mean(1, keepdim=True)
    rate = 1e-6 + (1 - 2e-6) * rate  # finite at 0 and 1, where a clamp would take the gradient away
    return -(rate * rate.log() + (1 - rate) * (1 - rate).log()).mean()  # Eq 4


# ---------------------------------------------------------------- Eq 9: how a path's loss enters L_distill
def path_weights(alpha, question, normalize="question"):
    """Weights (P, S) of the path losses in L_distill^(s) = sum_ij weight_ij nll_ij; each student's add up to 1.

    "question": the mean over a question's routed paths, then over questions, so each question weighs the same
    (open point 5). "batch": the mean over all routed paths, which lets the gate starve hard questions.
    The gate multiplies the loss here: this is where the router feels the students (open point 4).
    """
    if normalize == "batch":
        return alpha / alpha.sum(0).clamp(min=1)
    routed = per_question(alpha, question)  # (Q, S)
    seen = (routed.detach() > 0).sum(0).clamp(min=1)  # questions that reach the student
    return alpha / routed.clamp(min=1)[question] / seen


def fill_skipped(nll, alpha, question, normalize="question"):
    """Losses (P, S) with the skipped pairs filled in by the mean that the routed ones have.

    A pair that was not routed was not run, so its loss is unknown. Under this estimate its gate's gradient,
    (nll_ij - mean_i) / n_i, is zero; and a routed path is judged against its question's other routed paths.
    """
    alpha = alpha.detach().to(nll)  # the sum of a mask would be a mask
    if normalize == "batch":
        question = torch.zeros_like(question)
    mean = per_question(alpha * nll, question) / per_question(alpha, question).clamp(min=1)
    return torch.where(alpha > 0, nll, mean[question])


def interaction(nll):
    """Losses (P, S) less each path's mean over students: what is left says whom a path suits, not that it is easy.

    A gate rewarded for low loss learns "easy", the same paths for every student (open point 6). With the centring per
    question that path_weights does anyway, this is the two-way interaction of path and student.
    """
    return nll - nll.mean(1, keepdim=True)


# ---------------------------------------------------------------- routes to compare with: each question keeps one path
WINDOW = 4  # of LALP: steps before a step that the student reads


def token_costs(logits, target, clip=100):
    """What the scores below read: surprisal (nats), rank (1 is the likeliest, at most `clip`) and Brier score
    |p - onehot|^2 of each token target (N,) under logits (N, V) -> (N, 3)."""
    own = logits.gather(1, target[:, None])
    logp, p = own - logits.logsumexp(1, keepdim=True), torch.softmax(logits, 1)
    rank = (1 + (logits > own).sum(1)).clamp(max=clip)
    return torch.stack([-logp[:, 0], rank.to(p), 1 - 2 * logp[:, 0].exp() + p.square().sum(1)], 1)


def score_nll(cost, path, question):
    """The likeliest path: minus the mean surprisal (GRAPE, Zhang et al., 2025, arXiv 2502.04194).

    cost (P, 3): token_costs, averaged over a path's tokens; path (P,) 0..P-1; question (P,) -> (P,), high is good.
    """
    return -cost[:, 0]


def score_lalp(cost, path, question):
    """Local average log-probability (Just et al., 2025, arXiv 2510.03988): the mean over a path's steps of each step's
    mean log-probability given the question and the WINDOW steps before it. Long steps weigh no more than short ones.

    cost (U, 3): averages over each step's tokens; path (U,): the step's path. departs: the paper has an LLM cut the
    steps, here they are sentences and lines. Uncertain: that the question stays in sight and that WINDOW is 4 come from
    reimplementations. A path of at most five steps is all in sight: then only the equal weight of steps differs.
    """
    return segment_mean(-cost[:, :1], path, len(question)).squeeze(1)


def score_rsr(cost, path, question):
    """Minus the rank-surprisal ratio (Yang et al., 2026, arXiv 2601.14249; github.com/UmeanNever/RankSurprisalRatio):
    the mean rank, clipped at 100, over the mean surprisal. Low: unexpected, yet among the student's next choices.

    Arguments and result as in score_nll.
    """
    return -cost[:, 1] / cost[:, 0].clamp(min=1e-12)


def score_lark(cost, path, question):
    """Learnability (Yu et al., 2026, arXiv 2605.30651; github.com/Tianrun-Yu/LARK, score_lark.py): l_k / sum l *
    (2 rho_k - sum rho l / sum l) over a question's paths, with loss l_k and rate rho_k = Brier_k / l_k.

    Arguments and result as in score_nll. departs: the Brier score is exact and not over the 50 likeliest tokens; and
    one path per question is kept, where its chi^2 policy is the argmax, while the authors weight several.
    """
    loss, brier = cost[:, 0].clamp(min=1e-12), cost[:, 2]
    share = loss / per_question(loss, question)[question]
    rho = brier / loss
    return share * (2 * rho - per_question(share * rho, question)[question])


SCORES = {"nll": score_nll, "lalp": score_lalp, "rsr": score_rsr, "lark": score_lark}


def step_starts(text, spans):
    """Numbers of the tokens that begin a step of `text`, a sentence or a line; spans: the tokens' (start, end)."""
    ends = [m.end() for m in re.finditer(r"(?:\d+[.)]\s)?.+?(?:[.!?](?=\s)|$)\s*", text, re.MULTILINE)]
    step = [bisect.bisect_left(ends, end) for _, end in spans]  # " The" ends in the step that it begins
    return [t for t in range(len(step)) if t == 0 or step[t] > step[t - 1]]


# ---------------------------------------------------------------- Eq 5 to Eq 8: collaboration across tokenizers
def shared_segments(offsets):
    """Cut one path where all tokenizers end a token, so that states of different tokenizers can be compared.

    offsets: for each student the (start, end) characters of its T_s tokens -> (segments, n): for each student the
    segment numbers 0..n-1 of its tokens (T_s,). Equal tokenizers give a segment per token, and Eq 8 is token by token.
    A token is a cut only if the next one starts at or after its end: byte pieces of a character stay together.
    """
    spans = [np.array(x, np.int32) for x in offsets]  # (T_s, 2)
    cut = np.ones(1 + max(x.max() for x in spans), bool)  # by character
    for x in spans:
        clean = np.zeros_like(cut)
        clean[x[:-1, 1][x[1:, 0] >= x[:-1, 1]]] = True
        cut &= clean
    before = np.cumsum(cut, dtype=np.int32) - cut  # cuts before a token's end
    return [before[x[:, 1]] for x in spans], int(cut.sum()) + 1


def segment_mean(x, segment, n):
    """Mean of x (T, d) over the tokens of each segment, segment (T,) in 0..n-1 -> (n, d); empty segments are 0."""
    count = x.new_zeros(n).index_add(0, segment, torch.ones_like(segment, dtype=x.dtype))
    return x.new_zeros(n, x.shape[1]).index_add(0, segment, x) / count.clamp(min=1).unsqueeze(1)


def standardize(x, path, n):
    """Each feature of x (N, d) to mean 0 and variance 1 over the segments of its path (N,).

    Shrinking zt then no longer lowers Eq 8. Per path and not per batch, so that the micro-batch size changes nothing.
    One segment alone becomes 0.
    """
    centred = x - segment_mean(x, path, n)[path]
    return centred * (segment_mean(centred.square(), path, n) + 1e-5).rsqrt()[path]


def competence_target(nll, routed):
    """Target of Eq 6 (C, S): softmax over the routed students of minus their loss (nats per shared segment), detached.

    Eq 6 departs: Eq 8 alone gives the competence no signal, or one toward 1/S (open point 9).
    """
    return torch.softmax((-nll.detach()).masked_fill(~routed, -math.inf), -1)


class Collaboration(nn.Module):
    """Eq 5 to Eq 8 for C co-routed paths with N shared segments in all.

    dims: hidden size of each student; d: the shared size. Frozen random projections by default: trained ones
    reach a low loss by losing rank (open point 8), with plain MSE by vanishing.
    """

    def __init__(self, dims, d=64, trained=False, standardized=True, competence="target"):
        super().__init__()
        self.proj = nn.ModuleList(nn.Linear(k, d, bias=False) for k in dims)
        for layer in self.proj:
            nn.init.normal_(layer.weight, std=layer.in_features ** -0.5)  # keeps the scale of a feature
            layer.requires_grad_(trained)
        self.w = nn.Parameter(torch.zeros(len(dims), d))  # Eq 6 regressor, one row per student
        self.standardized, self.competence = standardized, competence

    def forward(self, z, segment, path, routed, nll):
        """Eq 8 departs: a mean over features and segments, so that --mutual_weight does not depend on d and length.

        -> L_mutual (C,) per path, L_competence (C,) per path, gamma (C, S), zt raw (S, N, d), zt as compared.

        z: per student (T_s, d_s) states on the tokens of all co-routed paths it got; segment: per student (T_s,)
        in 0..N-1; path (N,): the path of each segment, 0..C-1; routed (C, S) bool; nll (C, S): nats per segment.
        """
        n, c = len(path), len(routed)
        raw = torch.stack([segment_mean(proj(x), seg, n) for proj, x, seg in zip(self.proj, z, segment)])  # Eq 5
        zt = torch.stack([standardize(x, path, c) for x in raw]) if self.standardized else raw  # (S, N, d)
        # Eq 6 reads the unstandardised states (standardised ones average to zero), scaled to unit variance.
        mean = torch.stack([F.layer_norm(segment_mean(x.detach() if self.competence == "target" else x, path, c),
                                         x.shape[-1:]) for x in raw], 1)  # (C, S, d)
        score = (mean * self.w).sum(-1).masked_fill(~routed, -math.inf)
        gamma = torch.softmax(score, -1)  # (C, S), Eq 6
        target = competence_target(nll, routed)
        l_comp = -(target * torch.log_softmax(score, -1).masked_fill(~routed, 0)).sum(-1)
        weight = gamma.detach() if self.competence == "target" else gamma
        z_ens = (weight[path].T.unsqueeze(-1) * zt).sum(0)  # (N, d), Eq 7
        if self.competence == "target":
            z_ens = z_ens.detach()  # the ensemble teaches: student s is pulled by 1 - gamma_s, the weaker one more
        else:
            l_comp = l_comp * 0  # Eq 6 as printed: gradient from Eq 8 alone
        distance = (zt - z_ens).square().mean(-1) * routed[path].T  # (S, N)
        return segment_mean(distance.sum(0).unsqueeze(1), path, c).squeeze(1), l_comp, gamma, raw, zt  # Eq 8


def effective_rank(x):
    """exp of the entropy of x's share of variance per direction, x (N, d) centred (after Roy and Vetterli, 2007)."""
    s = torch.linalg.svdvals((x - x.mean(0)).float()).square()
    p = s / s.sum().clamp(min=1e-12)
    return torch.exp(-(p * p.clamp(min=1e-12).log()).sum())
