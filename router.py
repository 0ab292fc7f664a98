"""QR-Distill, Eq 1 to Eq 9: the path encoder, the router and the collaboration of the students.

Pure functions and tiny modules without files or flags. Shapes in this file: P paths, Q questions,
S students, d features, T tokens, N shared segments, C co-routed paths; `question` (P,) holds each
path's question as 0..Q-1. The paper is Lei et al., EMNLP 2025 (arXiv 2508.16861). "departs (Eq N)"
marks where we leave it; `printed` names the equations that take the paper's form all the same, such
as {"eq3", "eq9"}; "open point N" refers to the reasons in tests/experiments/README.md. """
import itertools
import math
import re
import zlib

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn


# ---------------------------------------- Eq 1: h_ij = Enc(Q_i, R_ij), frozen
def hash_embed(texts, d=512):
    """departs (Eq 1): the default's stand-in for a text encoder, which needs no model: signed
    feature hashing (Weinberger et al., 2009) of word 1- and 2-grams.

    texts: P strings -> (P, d) float32 rows of unit length (zero for an empty text). The same on
    every machine. """
    h = torch.zeros(len(texts), d)
    for row, text in zip(h.numpy(), texts):  # what is added to a row is added to h
        words = re.findall(r"\d+|\w+|[^\w\s]|\n", text.lower())
        grams = words + [a + " " + b for a, b in itertools.pairwise(words)]
        # crc32 and not hash(): that one changes with every process
        code = np.fromiter((zlib.crc32(gram.encode()) for gram in grams), np.uint32, len(grams))
        row += np.bincount(code % d, np.where(code >> 31, 1.0, -1.0), d)
    # The logarithm: a word that stands there ten times says little more than one.
    return F.normalize(h.abs().log1p_().copysign_(h), dim=-1)


@torch.no_grad()
def encoder_embed(model, tokenizer, pairs, max_length=512):
    """One batch of Eq 1 with a Hugging Face encoder: the mean of its last hidden states over real
    tokens.

    pairs: P tuples (question, path), cut to `max_length` tokens together -> (P, d) float32 on the
    CPU. """
    batch = tokenizer([q for q, _ in pairs], [p for _, p in pairs], truncation="longest_first",
                      max_length=max_length, padding=True, return_tensors="pt").to(model.device)
    hidden = model(**batch).last_hidden_state.float()  # (P, T, d)
    mask = batch["attention_mask"].unsqueeze(-1)
    return ((hidden * mask).sum(1) / mask.sum(1).clamp(min=1)).cpu()


# ---------------------------------------- Eq 2: alpha_ij = Gumbel(MLP(h_ij))
class Router(nn.Module):
    """Logits (P, S) of the gates from path embeddings h (P, d): departs (Eq 2): linear; with a
    `hidden` width the paper's MLP."""

    def __init__(self, d, students, hidden=0):
        super().__init__()
        last = nn.Linear(hidden or d, students)
        nn.init.zeros_(last.weight)  # all paths start with the same odds: no style is favoured
        nn.init.zeros_(last.bias)
        self.net = last
        if hidden:
            self.net = nn.Sequential(nn.Linear(d, hidden), nn.ReLU(), last)

    def forward(self, h):
        return self.net(h)


# A gate takes logits (P, S), question (P,) and the generator of its noise. It gives alpha (P, S), 0
# or 1 with the gradient of the soft sample (at the paper's temperature of 1), and the probabilities
# p (P, S) of its logits without noise. Add your own to GATES, and to ONE_PATH if a student gets one
# path of each question.
def categorical_gate(logits, question, generator=None):
    """Eq 2: Gumbel-softmax over a question's paths, student by student: one path each.

    departs (Eq 2): over paths, not over students. A path is compared with the question's other
    paths and not with easier questions, so the gate cannot learn "easy", and every question is
    kept. A student's rate (Eq 3) is always 1 / paths, so Eq 4 has no gradient. """
    noisy = logits + gumbel_noise(logits, generator)
    soft = softmax_per_question(noisy, question)
    alpha = straight_through(keep_best(soft.detach(), question), soft)
    return alpha, softmax_per_question(logits, question)


def binary_gate(logits, question, generator=None):
    """Eq 2: one gate per path and student, so a path may reach one, several or no student.

    departs (Eq 2): no softmax over students. The difference of two Gumbels is logistic noise, hence
    a gate opens with probability sigmoid(logits). Where all of a question's gates are shut for a
    student, the one nearest to opening opens too: else hard questions starve (open point 5). """
    noisy = logits + uniform(logits, generator).logit()
    soft = torch.sigmoid(noisy)
    hard = (soft > 0.5).to(soft)
    shut = per_question(hard, question) == 0  # (Q, S)
    hard = hard + keep_best(soft.detach(), question) * shut[question]
    return straight_through(hard, soft), torch.sigmoid(logits)


def onehot_gate(logits, question, generator=None):
    """Eq 2 to the letter: Gumbel-softmax over the students, exactly one student per path.

    alpha's rows sum to 1, so Eq 3 as printed is 1/S whatever the router does and Eq 4 has no
    gradient (open point 1). """
    noisy = logits + gumbel_noise(logits, generator)
    soft = torch.softmax(noisy, dim=1)
    hard = F.one_hot(soft.argmax(1), logits.shape[1])
    return straight_through(hard, soft), torch.softmax(logits, dim=1)


GATES = {"categorical": categorical_gate, "binary": binary_gate, "onehot": onehot_gate}
ONE_PATH = {"categorical"}


def uniform(like, generator):
    """Random numbers in (0, 1), of the shape and type of `like`."""
    return torch.rand(like.shape, generator=generator).to(like).clamp(1e-6, 1 - 1e-6)


def gumbel_noise(like, generator):
    """Noise, shaped as `like`, with which an argmax is a draw from the softmax (Gumbel, 1954)."""
    return -(-uniform(like, generator).log()).log()


def straight_through(hard, soft):
    """Value of `hard`, gradient of `soft` (Bengio et al., 2013)."""
    return hard.to(soft) + (soft - soft.detach())


def per_question(x, question):
    """Sum of x (P, ...) over the paths of each question -> (Q, ...)."""
    return x.new_zeros(int(question.max()) + 1, *x.shape[1:]).index_add(0, question, x)


def max_per_question(x, question):
    """Largest x (P, S) over the paths of each question -> (Q, S)."""
    rows = question.unsqueeze(1).expand_as(x)
    lowest = x.new_full((int(question.max()) + 1, x.shape[1]), -math.inf)
    return lowest.scatter_reduce(0, rows, x, "amax")


def log_softmax_per_question(x, question):
    """Log-softmax of x (P, S) over the paths of each question, student by student."""
    x = x - max_per_question(x.detach(), question)[question]
    return x - per_question(x.exp(), question).log()[question]


def softmax_per_question(x, question):
    """Softmax of x (P, S) over the paths of each question, student by student."""
    return log_softmax_per_question(x, question).exp()


def keep_best(score, question):
    """alpha (P, S): 1 for a question's path with the highest score (P, S), the first of equals,
    student by student."""
    is_top = score == max_per_question(score, question)[question]
    number = torch.arange(len(score)).to(score).unsqueeze(1)  # of equals, the smallest is kept
    earliest = torch.where(is_top, -number, -math.inf)
    return (earliest == max_per_question(earliest, question)[question]).to(score)


# ---------------------------------------- Eq 3 and Eq 4: balance
def balance_entropy(p, question, printed=()):
    """Eq 3 and Eq 4: binary entropy (nats, at most ln 2) of a question's selection rate, averaged.

    p (P, S): gate probabilities, or the sampled alpha for the printed form; question (P,) ->
    scalar. It is MAXIMISED: departs (Eq 9), which adds it (open point 2). departs (Eq 3): each
    student has its own rate, else "everything to one student, nothing to the other" would be the
    optimum (open point 3). """
    rate = per_question(p, question) / per_question(torch.ones_like(p), question)  # (Q, S), Eq 3
    if "eq3" in printed:
        rate = rate.mean(1, keepdim=True)
    # Finite at 0 and 1, where a clamp would take the gradient away.
    rate = 1e-6 + (1 - 2e-6) * rate
    return -(rate * rate.log() + (1 - rate) * (1 - rate).log()).mean()  # Eq 4


# ---------------------------------------- Eq 9: how a path's loss enters L_distill
def path_weights(alpha, question, printed=()):
    """Weights (P, S) in L_distill^(s) = sum_ij weight_ij nll_ij / length_ij; each student's add up
    to 1, or to 0 if it got no path.

    departs (Eq 9): the mean over a question's routed paths, then over questions, so that each
    question weighs the same. As printed, the mean over all routed paths, a gate starves hard
    questions (open point 5). With --reward sum or loss the router feels the students through this
    product (open point 4); by default these are weights and no more. """
    if "eq9" in printed:
        return alpha / alpha.sum(0).clamp(min=1)
    routed = per_question(alpha, question)  # (Q, S)
    seen = (routed.detach() > 0).sum(0).clamp(min=1)  # questions that reach the student
    return alpha / routed.clamp(min=1)[question] / seen


def fill_skipped(cost, routed, question, printed=(), probed=False):
    """The costs (P, S); a pair that was not run gets the mean of the routed ones of its question,
    or as printed of the batch. routed (P, S) and probed, which broadcasts to it: bool, or 0 and 1.

    departs (Eq 9), whose gradient needs the cost of every pair. d L_distill / d alpha_ij is
    proportional to cost_ij - mean: zero for a pair that was not run, or of whose question the
    student got no path. Its logit moves only through a softmax that ties it to others, or Eq 4. """
    was_run = (routed.detach() > 0) | probed
    routed = routed.detach().to(cost)  # the sum of a mask would be a mask
    if "eq9" in printed:
        question = torch.zeros_like(question)
    count = per_question(routed, question)
    mean = per_question(routed * cost, question) / count.clamp(min=1)
    return torch.where(was_run & (count > 0)[question], cost, mean[question])


def normalize_length(nll, length, question, penalty):
    """nll (P, S), nats of paths, each divided by (its length / the mean length of its question's
    paths) ** penalty. length (P, S), tokens; question (P,).

    0 compares whole paths; 1 compares their means over tokens, and the mean length keeps the unit:
    nats of a path. As in beam search (Wu et al., 2016, arXiv 1609.08144). """
    mean = segment_mean(length.float(), question, int(question.max()) + 1)  # (Q, S)
    return nll / (length / mean[question]) ** penalty


def posterior_loss(logits, cost, question):
    """Cross-entropy of the router's softmax over a question's paths to the student's own,
    softmax_j(-cost_j): how likely it would write path j and not one of the others, if a cost is the
    nats of a whole path.

    logits, cost (P, S), see normalize_length, of questions all of whose paths were run; question
    (P,) -> scalar: a mean over questions, a sum over students.

    departs (Eq 9): the gradient of a logit is the router's probability p_j less the student's own.
    That of an expected loss is p_j (cost_j - sum_k p_k cost_k): almost zero for every path once the
    router is sure of one, so that it would hardly leave a path that turns bad. """
    wanted = softmax_per_question(-cost, question)
    log_p = log_softmax_per_question(logits, question)
    return -(wanted * log_p).sum() / (int(question.max()) + 1)


# ---------------------------------------- Eq 5 to Eq 8: collaboration across tokenizers
def shared_segments(offsets):
    """Cut one path where all tokenizers end a token, so that their states can be compared.

    offsets: for each student the (start, end) characters of its T_s tokens -> (segments, n): for
    each student the segment numbers 0..n-1 of its tokens (T_s,). "ab|c" and "a|b|c" have n = 2
    segments, "ab" and "c", and the numbers [0, 1] and [0, 0, 1]. Equal tokenizers give a segment
    per token. A text is cut only where the next token starts at or after the end of the one before:
    byte pieces of a character stay together. """
    spans = [np.array(x, np.int32) for x in offsets]  # (T_s, 2)
    # By character: all students end a token here, and another one follows. A token's segment is
    # the number of cuts before its end.
    cut = np.ones(1 + max(x.max() for x in spans), bool)
    for x in spans:
        next_start, end = x[1:, 0], x[:-1, 1]
        cut_here = np.zeros_like(cut)
        cut_here[end[next_start >= end]] = True
        cut &= cut_here
    cuts_before = np.cumsum(cut, dtype=np.int32) - cut  # by character
    return [cuts_before[x[:, 1]] for x in spans], int(cut.sum()) + 1  # n cuts, n + 1 segments


def segment_mean(x, segment, n):
    """Mean of x (T, ...) in each segment, segment (T,) in 0..n-1 -> (n, ...); 0 if empty."""
    count = x.new_zeros(n).index_add(0, segment, torch.ones_like(segment, dtype=x.dtype))
    total = x.new_zeros(n, *x.shape[1:]).index_add(0, segment, x)
    return total / count.clamp(min=1).view(n, *[1] * (x.dim() - 1))


def standardize(x, path, n):
    """Each feature of x (N, S, d) to mean 0 and variance 1 over the segments of its path (N,).

    Shrinking zt then no longer lowers Eq 8. Per path and not per batch, so that the micro-batch
    size changes nothing. One segment alone becomes 0. """
    centred = x - segment_mean(x, path, n)[path]
    return centred * (segment_mean(centred.square(), path, n) + 1e-5).rsqrt()[path]


def competence_target(per_segment, routed):
    """What gamma of Eq 6 is fitted to, (C, S): softmax over the routed students of minus their
    loss, detached. per_segment (C, S): nats per shared segment, a unit that all tokenizers have in
    common. """
    cost = per_segment.detach().masked_fill(~routed, math.inf)
    return torch.softmax(-cost, -1)


class Collaboration(nn.Module):
    """Eq 5 to Eq 8 for C co-routed paths with N shared segments in all.

    dims: hidden size of each student; d: the shared size. By default L_mutual teaches the students
    alone, through zt, and L_competence w alone.
    departs (Eq 5): the projections are frozen and random. Trained ones (printed) reach a low Eq 8
    by losing rank, with plain MSE by vanishing (open point 8).
    departs (Eq 6): the mean is over segments and layer-normed; only the students that got a path
    compete; w is fitted to their losses. Eq 8 would teach it (printed) nothing, or to be uniform
    (open point 9).
    departs (Eq 7): a constant but where Eq 6 is as printed. Of two students the more competent one
    moves less: its distance to z_ens is (1 - gamma_s) (zt_s - zt_other).
    departs (Eq 8): tokenizers share segments, not tokens (open point 7); zt is standardised, else
    (printed) shrinking it would lower the loss; a mean over features and segments, so that its
    weight does not depend on d and length. """

    def __init__(self, dims, d=64, printed=()):
        super().__init__()
        self.printed = printed
        self.proj = nn.ModuleList(nn.Linear(k, d, bias=False) for k in dims)
        for layer in self.proj:
            # Keeps the scale of a feature.
            nn.init.normal_(layer.weight, std=layer.in_features ** -0.5)
            layer.requires_grad_("eq5" in printed)
        self.w = nn.Parameter(torch.zeros(len(dims), d))  # Eq 6 regressor, one row per student

    def forward(self, z, segment, path, routed, per_segment):
        """-> L_mutual (C,) and L_competence (C,) per path, gamma (C, S), zt before (raw) and after
        it is standardised (N, S, d).

        z: per student (T_s, d_s) states on the tokens of all co-routed paths that it got; segment:
        per student (T_s,) in 0..N-1; path (N,): the path of each segment, 0..C-1; routed (C, S)
        bool; per_segment (C, S): nats per segment. """
        n, c = len(path), len(routed)
        projected = [proj(states) for proj, states in zip(self.proj, z)]
        raw = torch.stack([segment_mean(x, numbers, n)
                           for x, numbers in zip(projected, segment)], 1)  # (N, S, d), Eq 5
        score = self.competence(raw, path, c).masked_fill(~routed, -math.inf)  # (C, S)
        gamma = torch.softmax(score, -1)  # Eq 6
        zt = raw if "eq8" in self.printed else standardize(raw, path, c)
        z_ens = (gamma[path].unsqueeze(-1) * zt).sum(1, keepdim=True)  # (N, 1, d), Eq 7
        l_competence = torch.zeros_like(gamma[:, 0])  # (C,)
        if "eq6" not in self.printed:
            z_ens = z_ens.detach()
            wanted = competence_target(per_segment, routed)  # (C, S)
            log_gamma = torch.log_softmax(score, -1).masked_fill(~routed, 0)  # 0 * -inf is nan
            l_competence = -(wanted * log_gamma).sum(-1)
        distance = (zt - z_ens).square().mean(-1) * routed[path]  # (N, S)
        l_mutual = segment_mean(distance.sum(1), path, c)  # (C,), Eq 8
        return l_mutual, l_competence, gamma, raw, zt

    def competence(self, raw, path, c):
        """Eq 6 before its softmax, w_s . mean_t zt_s, from raw (N, S, d) of c paths -> (c, S). Not
        from the standardised states, whose every mean is zero."""
        if "eq6" not in self.printed:
            raw = raw.detach()
        mean = segment_mean(raw, path, c)  # (c, S, d)
        normed = F.layer_norm(mean, mean.shape[-1:])
        return (normed * self.w).sum(-1)
