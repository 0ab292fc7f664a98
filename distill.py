"""QR-Distill, the training run: students train together on the paths that a router gives them.

    python distill.py                                    # the demo: laptop CPU, offline
    python distill.py --paths POOL.jsonl --students A B  # real paths, real students

Read main() first: it is the run, top to bottom, and its loop is the method (Lei et al., EMNLP
2025), with the paper's equation numbers. The equations are in router.py, the path pool in judge.py,
the tasks in eval.py. "departs (Eq N)" marks where we leave the paper, "open point N" refers to
the list in tests/experiments/README.md. Shapes: P paths of the step's Q questions, S students. """
import argparse
import hashlib
import importlib.util
import inspect
import json
import math
import os
import random
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import save_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

import eval as tasks  # "eval" is a function of Python's
import judge
import router as qr  # "router" is the network in main
from eval import stop, within

WARMUP = 0.05  # share of the steps with a rising learning rate; then a cosine down to a tenth
WEIGHT_DECAY = 0.01  # AdamW's, of the students
LOGITS = 2**26  # numbers of the logits that are held at a time: 256 MiB in float32
CLIP = 1.0  # largest gradient norm of a student, the collaboration or the router
ROUTER_BETAS = (0.5, 0.95)  # AdamW's, of the router: it must turn round quickly
ROUTER_DECAY = 0.1

# What nobody set. The demo's tiny students train in full and fast, those of --students with LoRA;
# short paths, which the router prefers on the demo, ruin a student that can already reason.
DEFAULTS = {"gate": "categorical", "reward": "posterior", "probe": 0.125, "router_lr": 0.3}
DEMO = {"lora_rank": 0, "lr": [2e-3], "epochs": 4, "eval_max_new_tokens": 96, "length_penalty": 0}
REAL = {"lora_rank": 32, "lr": [2e-4], "epochs": 3, "eval_max_new_tokens": 512, "length_penalty": 1}
# --as_printed: the equations that can take the paper's form, and what two of them set.
PRINTED = ("eq1", "eq2", "eq3", "eq5", "eq6", "eq8", "eq9")
PRINTED_DEFAULTS = {"eq2": {"gate": "onehot", "router_lr": 0.01},
                    "eq9": {"reward": "loss", "probe": 0.0}}
PRINTED_HIDDEN = 256  # Eq 2: width of the paper's MLP


# ---------------------------------------- flags: every ablation is one, README.md lists them
def make_parser():
    """The flags. None: see DEFAULTS, DEMO, REAL and PRINTED_DEFAULTS."""
    count = within(int, 1)
    share = within(float, 0, 1)
    weight = within(float, 0)
    p = argparse.ArgumentParser(usage="python distill.py [flags]",
                                description=__doc__.split("\n\n")[0],
                                epilog="Defaults in brackets. README.md has the ablations.")
    p.error = stop  # one sentence and exit code 2
    g = p.add_argument_group("run")
    g.add_argument("--out_dir", help="run folder (out/ and the time)")
    g.add_argument("--resume", metavar="DIR", help="go on with the run in DIR, with its flags")
    g.add_argument("--seed", type=within(int, 0, 2**31), default=0,
                   help="of weights, gates, data order and split (0)")
    g.add_argument("--device", help="cpu, cuda, cuda:1, mps ... (cuda where there is one)")
    g.add_argument("--dtype", default="auto", choices=["auto", "float32", "bf16", "fp16"],
                   help="of the products (AMP) and of a frozen base; auto: bf16 on cuda, and on a "
                        "CPU that has it if the base is frozen (auto)")
    g.add_argument("--compile", action="store_true", help="torch.compile: slow start, fast steps")
    g.add_argument("--checkpointing", action="store_true", help="less memory, a third more work")
    g.add_argument("--save_every", type=count, default=100, help="steps between checkpoints (100)")
    g.add_argument("--wandb", metavar="PROJECT", help="log to Weights & Biases, too")
    g = p.add_argument_group("data")
    g.add_argument("--paths", metavar="POOL", help="path pool of judge.py (the demo's)")
    g.add_argument("--filter", default="full", choices=["full", "answer", "none"],
                   help="full: right answer, and each judge that read it calls it valid; answer: "
                        "right answer; none: all that are whole (full)")
    g.add_argument("--styles", nargs="+", help="train on these reasoning styles only (all)")
    g.add_argument("--max_len", type=count, default=1024,
                   help="longest prompt and path in tokens; others are left out (1024)")
    g = p.add_argument_group("students")
    g.add_argument("--students", nargs="+", metavar="MODEL", help="causal LMs (two tiny ones)")
    g.add_argument("--lora_rank", type=within(int, 0),
                   help="LoRA's rank, alpha is twice that; 0: train all weights (32; demo: 0)")
    g.add_argument("--quantize", choices=["nf4"], help="frozen base in 4 bit under LoRA (QLoRA)")
    g.add_argument("--lr", nargs="+", type=weight,
                   help="learning rate: one, or one per student; 0: it does not learn (2e-4; demo: "
                        "2e-3)")
    g = p.add_argument_group("routing")
    g.add_argument("--route", default="learned",
                   choices=["learned", "all", "random", "short", "nll"],
                   help="all: every path to every student; one path of a question: learned by the "
                        "router, random, the shortest, or (nll) the likeliest by its mean over "
                        "tokens for the untrained student (learned)")
    g.add_argument("--as_printed", nargs="+", choices=["all", *PRINTED], default=[], dest="printed",
                   metavar="EQ",
                   help=f"all, or some of {', '.join(PRINTED)} in the paper's form. eq2 sets "
                        "--gate onehot, which shares no path, so that Eq 5 to 8 never run, eq9 "
                        "--reward loss --probe 0; these two go together; flags beside it count. "
                        "Not undone: the sign of Eq 4, standardised embeddings")
    g.add_argument("--encoder", default="hash", metavar="MODEL",
                   help="Eq 1: hash, or a Hugging Face encoder; the paper's is roberta-base (hash)")
    g.add_argument("--router_lr", type=weight, help="learning rate of the router (0.3; eq2: 0.01)")
    g.add_argument("--gate", choices=list(qr.GATES),
                   help="Eq 2: categorical: a student gets one path of each question; binary: any "
                        "number of them; onehot: a path goes to one student (categorical)")
    g.add_argument("--reward", choices=["posterior", "sum", "loss"],
                   help="posterior: learn to choose the path that the student is nearest to "
                        "writing itself; sum, loss: to lower a path's total loss, or its mean over "
                        "tokens, through the gates, as in Eq 9 (posterior)")
    g.add_argument("--length_penalty", type=share, metavar="A",
                   help="of --reward posterior: 0 compares log-probabilities of whole paths, so "
                        "that short ones win; 1 their means over tokens (1; demo: 0)")
    g.add_argument("--probe", type=share,
                   help="share of a step's questions, rounded up, whose other paths are run "
                        "forward, so that the router hears about what it did not choose (0.125)")
    g.add_argument("--entropy_weight", type=weight, default=0.01,
                   help="Eq 9: l1; no effect on the categorical gate, whose rates are equal (0.01)")
    g.add_argument("--mutual_weight", type=weight, default=0.1, help="Eq 9: l2 (0.1)")
    g = p.add_argument_group("optimisation")
    g.add_argument("--batch_size", type=count, default=8, help="questions per step (8)")
    g.add_argument("--micro_batch_size", type=count,
                   help="questions per backward pass: memory, not results (all)")
    g.add_argument("--epochs", type=count, help="passes over the training questions (3; demo: 4)")
    g.add_argument("--max_steps", type=count, help="optimiser steps, instead of --epochs")
    g = p.add_argument_group("evaluation")
    g.add_argument("--eval_questions", metavar="FILE",
                   help="test set in any format of eval.py (a fifth of the pool's questions)")
    g.add_argument("--eval_limit", type=count, help="only the first N test questions (all)")
    g.add_argument("--eval_max_new_tokens", type=count,
                   help="longest answer in tokens (512; demo: 96)")
    return p


def parse_args(argv=None):
    """The run's flags; with --resume those that the run was started with."""
    p = make_parser()
    args = p.parse_args(argv)
    if args.resume:
        file = Path(args.resume) / "args.json"
        if args != p.parse_args(["--resume", args.resume]):
            stop(f"--resume goes on with the run's own flags: leave all others out, or edit {file}")
        if not file.is_file():
            stop(f"--resume {args.resume}: no {file}; pass the --out_dir of an earlier run")
        saved = json.loads(file.read_text())
        return argparse.Namespace(**saved | {"resume": args.resume, "out_dir": args.resume})
    if "all" in args.printed:
        args.printed = list(PRINTED)
    defaults = DEFAULTS | (REAL if args.students else DEMO)
    for equation in args.printed:
        defaults |= PRINTED_DEFAULTS.get(equation, {})
    for name, value in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    check(args)
    args.out_dir = args.out_dir or time.strftime(f"out/%Y%m%d-%H%M%S-seed{args.seed}-{os.getpid()}")
    return args


def check(args):
    """stop() at flags that contradict one another."""
    n = len(args.students or [0, 0])
    if args.out_dir and (Path(args.out_dir) / "args.json").exists():
        stop(f"--out_dir {args.out_dir} holds a run already: pass another folder, or only "
             f"--resume {args.out_dir}")
    if (args.lora_rank or args.quantize) and not args.students:
        stop("--lora_rank, --quantize: the demo's tiny students train in full; pass --students")
    if args.quantize and not args.lora_rank:
        stop("--quantize: a 4-bit base stays frozen, so it needs a --lora_rank above 0")
    if len(args.lr) not in (1, n):
        stop(f"--lr has {len(args.lr)} values for {n} students: pass one, or one per student")
    if args.wandb and not importlib.util.find_spec("wandb"):
        stop("--wandb needs one more package: pip install wandb")
    one_path = args.gate in qr.ONE_PATH
    learned = args.route == "learned"
    if learned and args.reward == "posterior" and not one_path:
        stop(f"--gate {args.gate}: --reward posterior is about the choice of one path of each "
             "question; pass --reward sum or loss, or --as_printed eq9, too")
    if learned and one_path and (not args.probe or "eq9" in args.printed):
        stop(f"--gate {args.gate} needs a --probe above 0 and no eq9: a student that gets one path "
             "of a question has nothing to compare it with; pass --gate binary, or eq2 too")


# ---------------------------------------- the run: read this first
def main(argv=None):
    """One run: filter, students, router, training, test, table. argv: the flags as words."""
    args = parse_args(argv)
    out, device, amp_dtype = set_up(args)

    # The pool: filtered, split by question, tokenised and embedded once.
    kept, test, unfiltered = load_data(args)
    print("\nquality filter (training questions)")
    judge.filter_table(unfiltered, args.filter)
    students = load_students(args, device, amp_dtype)
    rows = encode(kept, students)
    questions, question_of = by_question(rows)  # row numbers of each question; (all paths,)
    lengths = torch.tensor([list(map(len, row["responses"])) for row in rows])  # (all paths, S)
    h = embed(rows, args, device)  # (all paths, d), Eq 1
    fixed = fixed_route(args.route, rows, question_of, lengths, students)  # (all paths, S), or None

    # What trains: the students, the collaboration beside them, and the router.
    torch.manual_seed(args.seed)  # the same numbers from here on, whatever was cached
    router = qr.Router(h.shape[1], len(students), PRINTED_HIDDEN if "eq2" in args.printed else 0)
    dims = [student.model.get_output_embeddings().weight.shape[1] for student in students]
    collab = qr.Collaboration(dims, printed=args.printed).to(device)
    optimizer, router_optimizer = make_optimizers(students, collab, router, args.router_lr)
    scaler = torch.amp.GradScaler(device.type, enabled=amp_dtype == torch.float16)
    gate = qr.GATES[args.gate]
    gate_rng = torch.Generator().manual_seed(args.seed)
    steps = args.max_steps or args.epochs * math.ceil(len(questions) / args.batch_size)

    # Start, or go on where a killed run stopped.
    parts = {"router": router, "collab": collab, "optimizer": optimizer,
             "router_optimizer": router_optimizer, "scaler": scaler}
    for s, student in enumerate(students):
        parts[f"student_{s}"] = nn.ParameterList(trainable(student.model))
    data = hash_of(rows, test)
    run = load_checkpoint(out, parts, gate_rng, data) if args.resume else None
    if run is None:
        start_run_folder(out, args, test)
        run = {"step": 0, "seconds": 0.0, "tokens": torch.zeros_like(lengths[0]), "data": data,
               "drawn": torch.zeros_like(lengths), "before": answer(students, test, args)[0]}
        save_checkpoint(out, parts, gate_rng, run)
    wandb = start_wandb(args.wandb, out, args) if args.wandb else None
    for student in students:
        student.model.train(student.lr > 0)

    bar = tqdm(range(run["step"], steps), "train", initial=run["step"], total=steps)
    for step in bar:
        began = time.time()
        numbers, question = step_paths(questions, step, args.batch_size, args.seed)  # (P,) each
        paths = [rows[i] for i in numbers]
        length = lengths[numbers]  # (P, S), tokens
        batches = micro_batches(question, args.micro_batch_size or args.batch_size)

        # Eq 2: the gates decide for the whole step before any student runs.
        logits = router(h[numbers])  # (P, S)
        if fixed is None:
            alpha, p = gate(logits, question, gate_rng)  # (P, S): 0 or 1; the odds of 1
        else:
            alpha = fixed[numbers]
        routed = alpha.detach() > 0.5  # student s trains on the paths of routed[:, s], on no other
        weight = qr.path_weights(alpha, question, args.printed)  # (P, S) of the losses in Eq 9

        # Eq 5 to Eq 9: each student learns from its paths, and on shared ones from the ensemble.
        nats, figures = student_step(students, collab, paths, batches, routed,
                                     weight.detach() / length, scaler, args.mutual_weight)

        # The router learns from the probed questions, all of whose pairs are run. By default the
        # others teach it nothing, so the logit of a pair that was not run gets no gradient.
        if args.route == "learned":
            probed = question < math.ceil(args.probe * (int(question.max()) + 1))  # (P,)
            known = nats + probe(students, paths, batches, probed[:, None] & ~routed)  # (P, S)
            l_router = router_loss(args.reward, logits, weight, known.cpu(), routed, probed, length,
                                   question, args.length_penalty, args.printed)
            chosen = alpha if "eq3" in args.printed else p
            entropy = qr.balance_entropy(chosen, question, args.printed)  # Eq 3 and 4
            # departs (Eq 9): Eq 4 is maximised, so subtracted (open point 2).
            (l_router - args.entropy_weight * entropy).backward()
            figures["entropy"] = entropy.item()

        # AdamW for all of them.
        norms = update(optimizer, router_optimizer, scaler, lr_scale(step, steps), nats, step, out)

        # One line is logged, a checkpoint is written.
        trained = (length * routed).sum(0)  # (S,), response tokens
        seconds = time.time() - began
        run["step"] = step + 1
        run["seconds"] += seconds
        run["tokens"] += trained
        run["drawn"][numbers] += routed
        line = {"step": step + 1, **rates(paths, nats.cpu() / length, routed), **figures,
                **flat("grad_norm", norms[:len(students)]), "router_grad_norm": norms[-1],
                "tokens_per_s": round(trained.sum().item() / seconds, 1)}
        log_step(line, out, bar, wandb)
        if (step + 1) % args.save_every == 0 or step + 1 == steps:
            save_checkpoint(out, parts, gate_rng, run)

    # The students on disk, the test, and what the router decided.
    for s, student in enumerate(students):
        save_student(student, out / f"student_{s}")
    after, predictions = answer(students, test, args)
    write_jsonl(out / "predictions.jsonl", predictions)
    p = gate(router(h), question_of, gate_rng)[1] if fixed is None else fixed  # (all paths, S)
    write_results(out, run, after, students, rows, p)
    write_decisions(out, rows, questions, lengths, p, run["drawn"])
    print(f"\n{out}/ holds all of this; to test the students again:\npython eval.py --students "
          f"{out}/student_* --questions {out}/test.jsonl "
          f"--max_new_tokens {args.eval_max_new_tokens}")


def set_up(args):
    """-> the run folder, the device and AMP's type (None: float32); seeds torch."""
    device = torch.device(tasks.usable_device(args.device))
    if args.dtype == "auto":  # a small student that trains in full is faster in float32
        pays = device.type == "cuda" or args.lora_rank
        args.dtype = "bf16" if pays and tasks.has_bfloat16(device) else "float32"
    torch.manual_seed(args.seed)
    amp_dtype = {"float32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[args.dtype]
    return Path(args.out_dir), device, amp_dtype


# ---------------------------------------- the method's steps, in the order of the equations
def step_paths(questions, step, batch_size, seed):
    """The step's paths (P,), as numbers of rows, and their questions (P,), as 0..Q-1. The order of
    the questions hangs on seed and epoch."""
    epoch, k = divmod(step, math.ceil(len(questions) / batch_size))
    shuffle = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    order = torch.randperm(len(questions), generator=shuffle)
    chosen = [questions[i] for i in order[k * batch_size:(k + 1) * batch_size]]
    question = torch.arange(len(chosen)).repeat_interleave(torch.tensor([*map(len, chosen)]))
    return torch.cat(chosen), question


def micro_batches(question, size):
    """The numbers (p,) of the paths of `size` questions at a time: that changes the memory that a
    step needs, not its results."""
    starts = range(0, int(question.max()) + 1, size)
    return [((question >= q) & (question < q + size)).nonzero().squeeze(1) for q in starts]


def student_step(students, collab, paths, batches, routed, token_weight, scaler, mutual_weight):
    """Eq 5 to Eq 9 for the students: run every routed pair, and send the losses' gradients back.

    paths: P rows of `encode`; routed (P, S) bool; token_weight (P, S): a path's weight in Eq 9 by
    its length -> nats (P, S) of whole paths, 0 where none was run; figures for the log. """
    device = students[0].model.device
    nats = torch.zeros(routed.shape, device=device)
    shared = routed.sum(1) > 1  # (P,), paths that several students got
    mutual = []
    gammas = []
    for batch in batches:  # (p,) numbers of paths
        loss = torch.zeros((), device=device)
        states = []  # of each student: {number of a path: (T, D)}
        for s, student in enumerate(students):
            mine = batch[routed[batch, s]]
            mine_nats, mine_states = forward(student, s, paths, mine.tolist())
            nats[mine, s] = mine_nats.detach()
            states.append(mine_states)
            loss = loss + (token_weight[mine, s].to(device) * mine_nats).sum()  # Eq 9: L_distill
        both = batch[shared[batch]]
        if len(both) and mutual_weight:
            l_mutual, l_competence, gamma = collaborate(collab, states, paths, both,
                                                        routed[both].to(device), nats[both])
            # departs (Eq 9): a mean over the step's shared paths.
            together = mutual_weight * l_mutual.sum() + l_competence.sum()
            loss = loss + together / shared.sum()
            mutual.append(l_mutual.detach())
            gammas.append(gamma.detach())
        if loss.requires_grad:
            scaler.scale(loss).backward()
    figures = {"co_routed": shared.float().mean().item()}
    if mutual:
        figures["mutual"] = torch.cat(mutual).mean().item()
        figures |= flat("gamma", torch.cat(gammas).mean(0))
    return nats, figures


def collaborate(collab, states, paths, both, routed, nats):
    """Eq 5 to Eq 8 on the C paths, numbers `both`, that several students got -> L_mutual (C,),
    L_competence (C,), gamma (C, S). states: see student_step; routed, nats (C, S). """
    n_segments = torch.tensor([paths[i]["n_segments"] for i in both])  # (C,)
    # All segments are numbered in one row: after a path with 3 of them the next one's begin at 3.
    first = dict(zip(both.tolist(), (n_segments.cumsum(0) - n_segments).tolist()))
    z = []
    segment = []
    for s, states_of in enumerate(states):
        mine = [i for i in states_of if i in first]
        # Begun with no token, for a student that got none of these paths.
        tokens = [nats.new_zeros(0, collab.proj[s].in_features)]
        numbers = [torch.zeros(0, dtype=torch.long)]
        for i in mine:
            tokens.append(states_of[i].float())
            numbers.append(torch.from_numpy(paths[i]["segments"][s] + first[i]))
        z.append(torch.cat(tokens))
        segment.append(torch.cat(numbers).to(nats.device))
    path = torch.arange(len(both)).repeat_interleave(n_segments).to(nats.device)  # (N,) 0..C-1
    # Nats per segment can be compared across tokenizers, nats per token can't.
    per_segment = nats / n_segments[:, None].to(nats.device)
    return collab(z, segment, path, routed, per_segment)[:3]


@torch.no_grad()
def probe(students, paths, batches, wanted):
    """Run the pairs `wanted` (P, S) bool, forward only -> their nats (P, S), 0 elsewhere. departs
    (Eq 9): the paper has no such passes."""
    nats = torch.zeros(wanted.shape, device=students[0].model.device)
    for batch in batches:
        for s, student in enumerate(students):
            rest = batch[wanted[batch, s]]
            nats[rest, s], _ = forward(student, s, paths, rest.tolist())
    return nats


def router_loss(reward, logits, weight, nats, routed, probed, length, question, length_penalty,
                printed):
    """What the router learns from, scalar; the students' losses are constants here.

    logits, and weight (P, S) with the gates' gradient; nats (P, S) of paths routed (P, S) or probed
    (P,); length (P, S), tokens. posterior: only probed questions count, all of whose pairs were
    run. sum, loss: L_distill reaches the router through the gates; a pair that was not run gets the
    mean cost of the routed ones, so that it gives its gate no gradient. """
    if reward == "posterior":  # departs (Eq 9), see posterior_loss
        cost = qr.normalize_length(nats, length, question, length_penalty)
        return qr.posterior_loss(logits[probed], cost[probed], question[probed])
    cost = nats if reward == "sum" else nats / length
    return (weight * qr.fill_skipped(cost, routed, question, printed, probed[:, None])).sum()


def fixed_route(route, rows, question, lengths, students):
    """alpha (all paths, S) of the routes that are fixed before training, None for those that draw.
    short: in the student's tokens; nll: GRAPE (Zhang et al., 2025, arXiv 2502.04194)."""
    if route in ("learned", "random"):
        return None
    every_pair = torch.ones(lengths.shape)
    if route == "all":
        return every_pair
    cost = lengths
    if route == "nll":
        batches = tqdm(torch.arange(len(rows)).split(64), "score paths", leave=False)
        cost = probe(students, rows, batches, every_pair.bool()).cpu() / lengths
    return qr.keep_best(-cost.float(), question)


# ---------------------------------------- optimisation
def trainable(module):
    return [p for p in module.parameters() if p.requires_grad]


def make_optimizers(students, collab, router, router_lr):
    """AdamW of the students and the collaboration, a group each, and AdamW of the router, whose
    gradients AMP leaves alone and whose rate stays: the students never stop changing."""
    groups = [{"params": trainable(student.model), "peak": student.lr, "weight_decay": WEIGHT_DECAY}
              for student in students]
    groups.append({"params": trainable(collab), "peak": 1e-3, "weight_decay": 0.0})
    router_optimizer = torch.optim.AdamW(router.parameters(), lr=router_lr, betas=ROUTER_BETAS,
                                         weight_decay=ROUTER_DECAY)
    return torch.optim.AdamW(groups), router_optimizer


def lr_scale(step, steps):
    """Learning rate as a share of its peak: linear warm-up, then a cosine down to a tenth."""
    rising = max(1, round(WARMUP * steps))
    if step < rising:
        return (step + 1) / rising
    return 0.1 + 0.45 * (1 + math.cos(math.pi * (step - rising) / max(1, steps - rising)))


def update(optimizer, router_optimizer, scaler, scale, nats, step, out):
    """A step of AdamW for all, at `scale` times the peak rates (the router's rate stays) -> the
    norms of the gradients, before they are clipped, of the students, the collaboration and the
    router. stop() before weights that are not finite."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * scale
    scaler.unscale_(optimizer)
    norms = []
    for group in optimizer.param_groups + router_optimizer.param_groups:
        norms.append(float(nn.utils.clip_grad_norm_(group["params"], CLIP)))
    guarded = norms[-1:] if scaler.is_enabled() else norms  # the scaler skips all but the router's
    if not (all(map(math.isfinite, guarded)) and nats.isfinite().all()):
        stop(f"step {step + 1}: a loss or gradient is not finite; the last good checkpoint stays "
             f"in {out}; start again with a smaller --lr or --router_lr")
    scaler.step(optimizer)
    scaler.update()
    router_optimizer.step()
    optimizer.zero_grad()
    router_optimizer.zero_grad()
    return norms


# ---------------------------------------- forward: one student over the paths that it got
def forward(student, s, paths, mine):
    """Run student number s over its paths, the numbers `mine` -> nats (mine,), the summed loss of
    each, and {number: its states (T, D) on the text tokens}."""
    texts = [(paths[i]["prompts"][s], paths[i]["responses"][s]) for i in mine]
    n_read = [len(prompt) + len(response) - 1 for prompt, response in texts]
    device = student.model.device
    nats = torch.zeros(len(mine), device=device)
    states = []
    order = []
    for batch in batches_of(n_read, max_tokens=1024 if device.type == "cpu" else 4096):
        states.append(predicting_states(student, [texts[i] for i in batch]))
        order += batch
    if not order:
        return nats, {}
    states = torch.cat(states)  # (N, D), row after row in this order
    sizes = [len(texts[i][1]) for i in order]
    target = torch.cat([texts[i][1] for i in order])
    nll = response_nll(student, states, target.to(device))  # (N,)
    row_of = torch.tensor(order).repeat_interleave(torch.tensor(sizes))
    nats = nats.index_add(0, row_of.to(device), nll)
    # Left out is the state that predicts a response's first token: it has read none of its text.
    # The others have read one more of the text's own tokens each; the end token is never read.
    return nats, {mine[i]: its[1:] for i, its in zip(order, states.split(sizes))}


def batches_of(lengths, max_tokens):
    """Yield row numbers, shortest rows first, in batches of at most `max_tokens` padded tokens (or
    of one row): small ones pad less, a GPU wants them larger."""
    batch = []
    for i in sorted(range(len(lengths)), key=lengths.__getitem__):
        if batch and (len(batch) + 1) * lengths[i] > max_tokens:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


def predicting_states(student, texts):
    """The states (N, D) that predict the response tokens of texts (prompt, response), in order.
    Padded on the right, where a causal model's real tokens cannot look, so that no attention mask
    is needed. The last token is predicted, never read."""
    ids = []
    predicts = []
    for prompt, response in texts:
        ids.append(torch.cat([prompt, response[:-1]]))
        # The prompt's last token predicts the response's first.
        predicts.append(torch.arange(len(ids[-1])) >= len(prompt) - 1)
    device = student.model.device
    ids = pad_sequence(ids, batch_first=True).to(device)  # (batch, T)
    with autocast(student):
        hidden = student.blocks(input_ids=ids, use_cache=False).last_hidden_state  # (batch, T, D)
    return hidden[pad_sequence(predicts, batch_first=True).to(device)]


def autocast(student):
    """AMP for one student; float32 without it."""
    return torch.autocast(student.model.device.type, student.amp_dtype,
                          enabled=student.amp_dtype is not None)


# ---------------------------------------- next-token loss, without ever holding all logits
def response_nll(student, states, target):
    """The next-token losses (N,) of Eq 9, in nats, from the states (N, D) that predict the tokens
    target (N,)."""
    head = student.model.get_output_embeddings()
    config = student.model.config.get_text_config()
    factor = tasks.logit_factor(config)  # Cohere's, Granite's: 1 in most families
    softcap = getattr(config, "final_logit_softcapping", None)  # Gemma 2's
    if factor != 1:
        states = states * factor
    return ChunkedNLL.apply(states, head.weight, target, softcap)


class ChunkedNLL(torch.autograd.Function):
    """-log p(target) at each position: states (N, D), weight (V, D), target (N,) -> (N,)
    float32, nats. A 262k-token vocabulary's logits would need gigabytes, so a chunk of them
    lives at a time, and gives the states' gradient at once: a frozen head runs once."""

    @staticmethod
    def forward(ctx, states, weight, target, softcap):
        nll = states.new_empty(len(states), dtype=torch.float32)
        dstates = torch.empty_like(states) if ctx.needs_input_grad[0] else None
        for chunk, nll_chunk, dlogits in nll_chunks(states, weight, target, softcap):
            nll[chunk] = nll_chunk
            if dstates is not None:
                dstates[chunk] = dlogits.T @ weight
        ctx.save_for_backward(states, weight, target, dstates)
        ctx.softcap = softcap
        return nll

    @staticmethod
    def backward(ctx, g):
        states, weight, target, dstates = ctx.saved_tensors
        dweight = None
        if dstates is not None:
            dstates = dstates * g[:, None].to(dstates.dtype)
        # A trained head needs each position's weight g, known only now: the logits again.
        if ctx.needs_input_grad[1]:
            dweight = torch.zeros_like(weight)
            for chunk, _, dlogits in nll_chunks(states, weight, target, ctx.softcap):
                dlogits.mul_(g[chunk])
                dweight.addmm_(dlogits, states[chunk].to(weight.dtype))
        return dstates, dweight, None, None


def nll_chunks(states, weight, target, softcap):
    """Yield (slice, nll (n,), d nll / d logits (V, n) in the weight's type) of n positions at a
    time, whose logits take 256 MiB. Vocabulary first, a fifth faster on a CPU; in the same memory
    for all chunks, since fresh memory costs it as much as the arithmetic."""
    size = min(len(states), max(16, LOGITS // len(weight)))
    low = weight.new_empty(len(weight) * size)
    exact = low
    if weight.dtype != torch.float32:
        exact = torch.empty_like(low, dtype=torch.float32)
    for start in range(0, len(states), size):
        chunk = slice(start, min(start + size, len(states)))
        used = len(weight) * (chunk.stop - start)
        dlogits = low[:used].view(len(weight), -1)
        logits = exact[:used].view(len(weight), -1)
        torch.mm(weight, states[chunk].to(weight.dtype).T, out=dlogits)  # the logits, for now
        logits.copy_(dlogits)
        if softcap:
            logits.div_(softcap).tanh_()
            slope = 1 - logits.square()
            logits.mul_(softcap)
        of_target = logits.gather(0, target[None, chunk])  # (1, n)
        top = logits.amax(0)  # (n,)
        p = logits.sub_(top).exp_()
        total = p.sum(0)
        p.div_(total).scatter_add_(0, target[None, chunk], -torch.ones_like(of_target))
        if softcap:
            p.mul_(slope)
        dlogits.copy_(p)
        yield chunk, total.log() + top - of_target[0], dlogits


# ---------------------------------------- students
@dataclass
class Student:
    """A student in memory."""
    model: nn.Module
    blocks: nn.Module  # the model without its output head, compiled with --compile
    tokenizer: object
    amp_dtype: torch.dtype | None
    source: str  # name or folder
    end: int  # the token that ends a response
    lr: float
    max_len: int  # tokens of prompt and path


def load_students(args, device, amp_dtype):
    """The students in memory, each with LoRA or as a whole, and tried."""
    if args.students:
        loaded = [load_base(name, args, device, amp_dtype) for name in args.students]
    else:
        loaded = [(model.to(device), tokenizer) for model, tokenizer in demo_students(args.seed)]
    if args.compile:  # students of one family share the compiler's limit of graphs
        torch._dynamo.config.recompile_limit = 16 * len(loaded)
    students = []
    for i, (model, tokenizer) in enumerate(loaded):
        if args.lora_rank:
            add_lora(model, args.lora_rank, 2 * args.lora_rank)
        if args.checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        blocks = torch.compile(model.base_model, dynamic=True) if args.compile else model.base_model
        student = Student(model, blocks, tokenizer, amp_dtype,
                          source=args.students[i] if args.students else "demo",
                          end=tasks.end_token(tokenizer), lr=args.lr[i % len(args.lr)],
                          max_len=min(args.max_len, tasks.context_of(model)))
        if not trainable(model):
            stop(f"student {student.source}: no linear layer for LoRA; pass --lora_rank 0")
        check_student(student)
        students.append(student)
    return students


def load_base(name, args, device, amp_dtype):
    """-> model, tokenizer; a base that LoRA leaves frozen is in AMP's type or in 4 bit."""
    if tasks.file_of(name, "adapter_config.json"):
        stop(f"--students {name}: this is a saved adapter; pass its base model, or merge it first")
    dtype = amp_dtype if args.lora_rank and amp_dtype else torch.float32
    if not args.quantize:
        return tasks.load_student(name, device, dtype)
    # Linear layers in 4-bit NormalFloat, their scales in 8 bit (Dettmers et al., 2023, QLoRA): .516
    # bytes a weight. Embeddings, norms, output head and the products keep `dtype`.
    nf4 = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4",
                                          bnb_4bit_use_double_quant=True,
                                          bnb_4bit_compute_dtype=dtype)
    return tasks.load_student(name, device, dtype, device_map={"": device},
                              quantization_config=nf4)


def check_student(student):
    """stop() where the model does more between last hidden states and logits than response_nll
    knows of. The backward pass shows what can't be trained before the first test does."""
    ids = torch.tensor([[student.end, 1, 2, 3]], device=student.model.device)
    path = {"prompts": [ids[0, :1].cpu()], "responses": [ids[0, 1:].cpu()]}
    with torch.no_grad(), autocast(student):
        logits = student.model(input_ids=ids).logits[0, :-1].float()
    nats, _ = forward(student, 0, [path], [0])
    wanted = F.cross_entropy(logits, ids[0, 1:], reduction="sum")
    has_bias = student.model.get_output_embeddings().bias is not None
    if has_bias or not torch.allclose(nats[0], wanted, rtol=0.05, atol=0.05):
        stop(f"student {student.source}: its output head changes the logits in a way that is not "
             "supported here")
    nats.sum().backward()
    student.model.zero_grad()


# ---------------------------------------- LoRA (Hu et al., 2021), in PEFT's format on disk
class LoRA(nn.Module):
    """base(x) + alpha / rank * B A x, base frozen; A (rank, d_in) and B (d_out, rank) learn."""

    def __init__(self, base, rank, alpha):
        super().__init__()
        self.base, self.rank, self.alpha = base, rank, alpha
        device = base.weight.device
        self.A = nn.Parameter(torch.empty(rank, base.in_features, device=device))
        # Zero: LoRA starts as the base alone.
        self.B = nn.Parameter(torch.zeros(base.out_features, rank, device=device))
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))

    def forward(self, x):
        # Scaled where it is small, and x itself is not copied: under AMP all layers that read x
        # keep the same x for their gradients.
        y = self.base(x)
        low = F.linear(x, self.A) * (self.alpha / self.rank)
        return y + F.linear(low, self.B)


def add_lora(model, rank, alpha):
    """Freeze `model`; put LoRA on every linear layer of its blocks, not on the output head, and not
    on subclasses, such as some routers of experts, which compute something else."""
    model.requires_grad_(False)
    for name, module in list(model.named_modules()):
        is_linear = type(module) is nn.Linear or type(module).__name__ == "Linear4bit"
        if is_linear and module is not model.get_output_embeddings():
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, LoRA(module, rank, alpha))


def save_student(student, folder):
    """A folder that from_pretrained loads: tokenizer, and PEFT adapter or whole model."""
    student.tokenizer.save_pretrained(folder)
    modules = student.model.named_modules()
    layers = {name: module for name, module in modules if isinstance(module, LoRA)}
    if not layers:
        student.model.save_pretrained(folder)
        return
    base = student.source
    if os.path.isdir(base):
        base = os.path.abspath(base)  # an adapter may be loaded from anywhere
    some = next(iter(layers.values()))
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": some.rank,
        "lora_alpha": some.alpha,
        "base_model_name_or_path": base,
        "target_modules": sorted({name.rpartition(".")[2] for name in layers})}
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=1))
    tensors = {}
    for name, layer in layers.items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = layer.A
        tensors[f"base_model.model.{name}.lora_B.weight"] = layer.B
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})


# ---------------------------------------- data: pool, split, tokens
def load_data(args):
    """-> training rows (graded, filtered), test questions, and the training rows before the filter.
    The split is by question."""
    rows = graded_pool(args.paths, args.seed)
    if args.filter == "full":  # a judge reads right answers only
        unread = sum("valid" not in row and judge.fate(row) == "kept" for row in rows)
        if unread:
            print(f"{unread} right answers were read by no judge, so those with wrong steps stay")
    if args.eval_questions is not None:
        test = tasks.read_questions(args.eval_questions)
    elif args.paths:
        test = held_out(rows, args.seed)  # before --styles: ablations share their test questions
    else:  # question sets of neighbouring seeds share no question
        test = judge.demo_questions(300, args.seed + 1)
    test_texts = {text_of(row) for row in test}  # not ids: those of two files say nothing
    train = [row for row in rows if text_of(row) not in test_texts]
    n_pool = len({text_of(row) for row in rows})
    n_train = len({text_of(row) for row in train})
    if len({row["id"] for row in rows}) < n_pool:  # as of two pools in one file
        stop(f"{args.paths}: one id stands for two questions; give each its own")
    print(f"{n_train} questions train, {len(test)} test; {n_pool - n_train} of the pool do not, "
          "since they stand in the test")

    styles = sorted({row["style"] for row in train})
    for unknown in set(args.styles or []) - set(styles):
        stop(f"--styles {unknown}: the pool's styles are {', '.join(styles)}")
    train = [row for row in train if row["style"] in (args.styles or styles)]
    kept = judge.filter_pool(train, args.filter)
    if not kept:
        stop(f"no path is left to train on: of {len(train)} beside the {len(test)} test questions "
             f"none passes --filter {args.filter}; judge.py --paths POOL --out FILE shows why")
    if not args.students and any(row["task"] != "demo" for row in kept + test):
        stop("the demo's tiny students know no other task: pass --students for this pool")
    return kept, test[:args.eval_limit], train


def graded_pool(file, seed):
    """The rows of a pool, or of the demo; what nobody graded is graded here."""
    if file is not None:
        rows = judge.read_pool(file)
        judge.grade_paths(tqdm(rows, "grade paths", leave=False))
        return rows
    rows = judge.grade_paths(judge.demo_paths(judge.demo_questions(300, seed), seed))
    for row in rows:
        row["valid"], verdict = judge.rule_judge(row)
        row["verdict"] = {"rule": verdict}
    return rows


def text_of(row):
    """A question with its choices, whatever its case and blanks: what makes two questions one."""
    return " ".join(tasks.question_of(row).lower().split())


def held_out(rows, seed):
    """Test questions from the pool itself: a fifth of them."""
    # Not `prompt`: the test has the plain one.
    fields = {"id", "task", "question", "choices", "answer"}
    questions = {}
    for row in rows:
        questions[text_of(row)] = {field: row[field] for field in sorted(row.keys() & fields)}
    questions = sorted(questions.values(), key=lambda question: question["id"])
    random.Random(seed).shuffle(questions)
    return questions[:max(1, round(0.2 * len(questions)))]


def encode(rows, students):
    """Tokenise the pool -> rows with `text`, `label` and, for each student, `prompts`, `responses`
    and `segments`, less the paths that do not fit into a student's context.

    Prompt and response are tokenised apart, so that generation starts from the very tokens trained
    on (open point 11). The student's end token ends a response and is trained (open point 10). """
    several = len({row["teacher"] for row in rows}) > 1
    encoded = []
    for row in tqdm(rows, desc="tokenise", leave=False):
        prompt = tasks.student_prompt(row)
        text = row["path"].strip()
        prompts = []
        responses = []
        offsets = []
        for student in students:
            # split_special_tokens: what looks like a special token in a path is text
            tokens = student.tokenizer(text, return_offsets_mapping=True, add_special_tokens=False,
                                       split_special_tokens=True)
            prompts.append(torch.tensor(tasks.encode_prompt(student.tokenizer, prompt)))
            responses.append(torch.tensor([*tokens["input_ids"], student.end]))
            offsets.append(tokens["offset_mapping"])
        fits = all(len(p) + len(r) <= student.max_len
                   for p, r, student in zip(prompts, responses, students))
        if all(offsets) and fits:  # an empty path has nothing to train on
            label = f"{row['style']}, {row['teacher']}" if several else row["style"]
            segments, n_segments = qr.shared_segments(offsets)
            encoded.append({**row, "text": text, "label": label, "prompts": prompts,
                            "responses": responses, "segments": segments, "n_segments": n_segments})
    if len(encoded) < len(rows):
        print(f"left out {len(rows) - len(encoded)} of {len(rows)} paths: empty, or longer, "
              "with their prompt, than --max_len or a student's context")
    if not encoded:
        stop("no path and its prompt fit into --max_len and the students' contexts")
    return encoded


def by_question(rows):
    """-> the numbers of each question's rows, a tensor each; the question of each row (all
    paths,)."""
    number_of = {}  # a new text gets the next number
    question_of = torch.tensor([number_of.setdefault(text_of(row), len(number_of)) for row in rows])
    sizes = question_of.bincount().tolist()
    return question_of.argsort(stable=True).split(sizes), question_of


# ---------------------------------------- Eq 1 for the whole pool
def embed(rows, args, device):
    """What the router sees of every path, (all paths, d) on the CPU: the embedding of question and
    path. departs (Eq 1): standardised and scaled; appended is the path's label, one-hot: its style
    and, of several teachers, the teacher."""
    if args.route != "learned":
        return torch.zeros(len(rows), 1)
    pairs = [(row["question"], row["text"]) for row in rows]
    if args.encoder == "hash":
        texts = [f"{question}\n{path}" for question, path in pairs]
        h = qr.hash_embed(tqdm(texts, desc="embed paths", leave=False))
    else:
        h = encode_pairs(pairs, args.encoder, device)
    h = (h - h.mean(0)) / h.std(0, correction=0).clamp(min=1e-3)
    if "eq2" not in args.printed:
        # A step of Adam moves every weight alike, and so a linear router's logit by the sum of
        # its features: the d of the embedding shall not outweigh the label.
        h = h / h.shape[1]
    if "eq1" in args.printed:
        return h
    labels = sorted({row["label"] for row in rows})
    one_hot = F.one_hot(torch.tensor([labels.index(row["label"]) for row in rows]))
    return torch.cat([h, one_hot * len(labels) ** 0.5], 1)


def encode_pairs(pairs, encoder, device):
    """Eq 1 for pairs (question, path) -> (P, d)."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(encoder, trust_remote_code=False)
    model = transformers.AutoModel.from_pretrained(encoder, dtype=torch.float32,
                                                   use_safetensors=True, trust_remote_code=False)
    model = model.to(device).eval()
    limit = min(512, tokenizer.model_max_length)
    starts = tqdm(range(0, len(pairs), 32), "embed paths", leave=False)
    return torch.cat([qr.encoder_embed(model, tokenizer, pairs[start:start + 32], limit)
                      for start in starts])


# ---------------------------------------- the run folder: flags, checkpoint, log
def start_run_folder(out, args, test):
    """args.json, test.jsonl and an empty log.jsonl."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "args.json").write_text(json.dumps(vars(args), indent=1))
    write_jsonl(out / "test.jsonl", test)
    write_jsonl(out / "log.jsonl", [])


def write_jsonl(file, rows):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def hash_of(rows, test):
    """A hash of what training hangs on beside the flags: the paths and their tokens, the test."""
    digest = hashlib.sha256(json.dumps(test).encode())
    for row in rows:
        tokens = [ids.tolist() for ids in row["prompts"] + row["responses"]]
        digest.update(json.dumps([row["label"], text_of(row), row["text"], tokens]).encode())
    return digest.hexdigest()


def save_checkpoint(out, parts, gate_rng, run):
    """checkpoint.pt: all that the rest of a run hangs on beside flags and data. A kill leaves the
    old file or the new one."""
    saved = {name: part.state_dict() for name, part in parts.items()}
    saved |= {"run": run, "gate_rng": gate_rng.get_state(), "rng": torch.get_rng_state(),
              "cuda_rng": torch.cuda.get_rng_state_all()}  # [] without a GPU
    torch.save(saved, out / "checkpoint.pt.part")
    os.replace(out / "checkpoint.pt.part", out / "checkpoint.pt")


def load_checkpoint(out, parts, gate_rng, data):
    """Put everything of save_checkpoint back in place -> its run; None if none was written yet."""
    if not (out / "checkpoint.pt").exists():
        return None
    saved = torch.load(out / "checkpoint.pt", map_location="cpu", weights_only=True)
    run = saved["run"]
    if run["data"] != data:
        stop(f"--resume {out}: pool, test questions, prompts or tokenizers have changed since that "
             "run; start a new one")
    for name, part in parts.items():
        part.load_state_dict(saved[name])
    gate_rng.set_state(saved["gate_rng"])
    torch.set_rng_state(saved["rng"])
    torch.cuda.set_rng_state_all(saved["cuda_rng"])
    log = (out / "log.jsonl").read_text().splitlines()[:run["step"]]  # the rest is done again
    write_jsonl(out / "log.jsonl", map(json.loads, log))
    return run


def start_wandb(project, out, args):
    import wandb  # installed: check() has looked

    wandb.init(project=project, name=out.name, dir=str(out), config=vars(args))
    return wandb


def log_step(line, out, bar, wandb):
    """A step's line goes to log.jsonl, the progress bar and Weights & Biases."""
    # JSON has no infinity, which is a gradient's norm where fp16 skips a step.
    line = {name: x for name, x in line.items() if math.isfinite(x)}
    with open(out / "log.jsonl", "a") as file:
        file.write(json.dumps(line) + "\n")
    bar.set_postfix({name: f"{x:.3f}" for name, x in line.items() if name.startswith("loss")})
    if wandb:
        try:
            wandb.log(line, step=line["step"])
        except Exception as e:  # noqa: BLE001 (logging never ends a run; log.jsonl has the line)
            bar.write(f"--wandb: step {line['step']} was not logged there ({tasks.in_a_line(e)})")


def flat(name, values):
    """{"name/0": ...} of a tensor or list: Weights & Biases draws flat lines."""
    return {f"{name}/{i}": float(value) for i, value in enumerate(values)}


def by_label(rows, x):
    """{label: the mean (S,) of its paths' x}, x (rows, S)."""
    means = {}
    for label in sorted({row["label"] for row in rows}):
        means[label] = x[[row["label"] == label for row in rows]].float().mean(0)
    return means


def rates(paths, per_token, routed):
    """Of one step's P paths, for each student: loss (nats per response token), share of the paths
    that it got, and the same of each label's. per_token (P, S): 0 where a path was not run."""
    line = flat("loss", per_token.sum(0) / routed.sum(0).clamp(min=1))
    line |= flat("rate", routed.float().mean(0))
    for label, rate in by_label(paths, routed).items():
        line |= flat(f"rate_style/{label}", rate)
    return line


# ---------------------------------------- the test and the table
def answer(students, test, args):
    """Greedy answers of all students to the test questions -> shares, predictions."""
    pairs = [(student.model, student.tokenizer) for student in students]
    with autocast(students[0]):
        return tasks.evaluate(pairs, test, args.eval_max_new_tokens)


def write_results(out, run, after, students, rows, p):
    """results.json, and on the screen accuracy and who gets what: the mean of the gates'
    probabilities p (all paths, S)."""
    rate = {label: mean.tolist() for label, mean in by_label(rows, p).items()}
    before = run["before"]
    tokens = run["tokens"].tolist()
    results = {
        "students": [student.source for student in students],
        "before": before,
        "after": after,
        "selection_rate": rate,
        "tokens_trained": tokens,
        "seconds": round(run["seconds"], 1),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__}}
    (out / "results.json").write_text(json.dumps(results, indent=1))

    title = f"% right of {after['questions']} test questions"
    print(f"\n{title:40}{'before':>10}{'after':>10}{'no answer':>10}{'ended':>10}")
    for s, student in enumerate(students):
        name = f"student {s} ({os.path.basename(student.source)})"
        shares = before["accuracy"], after["accuracy"], after["unparsed"], after["stopped"]
        print(f"{name:40}" + "".join(f"{100 * share[s]:10.1f}" for share in shares))
    names = "".join(f"{f'student {s}':>10}" for s in range(len(students)))
    title = "a path's chance to be drawn, by style"
    print(f"\n{title:40}{names}")
    for label, shares in rate.items():
        print(f"{label:40}" + "".join(f"{share:10.2f}" for share in shares))
    print(f"\n{run['step']} steps in {run['seconds']:.0f} s on {len(rows)} paths; response tokens "
          f"trained: {', '.join(f'{n:,}' for n in tokens)}")


def write_decisions(out, rows, questions, lengths, p, drawn):
    """decisions.jsonl: what the router made of each training question's paths; one on the screen.
    lengths, tokens; p: the gates' probabilities at the end; drawn: how often each student trained
    on a path; all (all paths, S)."""
    paths = [{"label": row["label"], "tokens": lengths[i].tolist(), "probability": p[i].tolist(),
              "drawn": drawn[i].tolist(), "path": row["text"]} for i, row in enumerate(rows)]
    decisions = []
    for numbers in questions:
        its_paths = [paths[i] for i in numbers]
        decisions.append({"question": rows[numbers[0]]["question"], "paths": its_paths})
    write_jsonl(out / "decisions.jsonl", decisions)
    some = max(questions, key=len)  # the first of those that have most paths
    question = " ".join(rows[some[0]]["question"].split())[:200]
    print(f"\nwhat the router decided, for one: {question}")
    print(f"{'a value for each student':28}{'tokens':>12}{'probability':>14}{'drawn':>10}   path")
    for i in some:
        tokens, drawn_i = ("/".join(map(str, paths[i][key])) for key in ("tokens", "drawn"))
        odds = "/".join(f"{x:.2f}" for x in paths[i]["probability"])
        text = " ".join(rows[i]["text"].split())[:40]
        print(f"{rows[i]['label'][:28]:28}{tokens:>12}{odds:>14}{drawn_i:>10}   {text}")


# ---------------------------------------- the demo's students
def demo_students(seed):
    """The two students of make_demo_students, (model, tokenizer) each, from the user's cache after
    the first time."""
    parts = (judge, tasks.student_prompt, make_demo_students, demo_tokenizer, warm_start, lr_scale)
    recipe = "".join(map(inspect.getsource, parts)) + torch.__version__
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "qr-distill"
    folder = cache / f"demo-{seed}-{hashlib.sha256(recipe.encode()).hexdigest()[:16]}"
    if not folder.exists():
        students = make_demo_students(seed)
        try:
            cache.mkdir(parents=True, exist_ok=True)
            part = Path(tempfile.mkdtemp(dir=cache))  # a kill leaves no half of a student
            for number, (model, tokenizer) in enumerate(students):
                model.save_pretrained(part / str(number))
                tokenizer.save_pretrained(part / str(number))
            os.replace(part, folder)
        except OSError:  # where nothing can be written, nothing is kept
            return students
    return [tasks.load_student(str(folder / str(number))) for number in range(2)]


def make_demo_students(seed):
    """Two tiny students, a Llama with whole words and a GPT-NeoX with BPE pieces, 0.4M parameters
    each, "pretrained" on plain arithmetic: from scratch nothing is learned in minutes."""
    torch.manual_seed(seed)
    sentences = judge.demo_sentences(8000, seed)
    questions = judge.demo_questions(200, seed)
    corpus = sentences + [f" {n}" for n in range(200)]
    corpus += [tasks.student_prompt(question) for question in questions]
    corpus += [row["path"] for row in judge.demo_paths(questions, seed)]
    shape = {
        "hidden_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "max_position_embeddings": 512,
        "initializer_range": 0.05,
        "tie_word_embeddings": True,
        "pad_token_id": 1,
        "bos_token_id": None,
        "eos_token_id": 2}
    students = []
    for number, whole_words in enumerate((True, False)):
        tokenizer = demo_tokenizer(corpus, whole_words)
        shape["vocab_size"] = len(tokenizer)
        if whole_words:
            config = transformers.LlamaConfig(intermediate_size=256, **shape)
            model = transformers.LlamaForCausalLM(config)
        else:
            config = transformers.GPTNeoXConfig(intermediate_size=384, **shape)
            model = transformers.GPTNeoXForCausalLM(config)
        warm_start(model, tokenizer, sentences, f"warm start of student {number}")
        students.append((model, tokenizer))
    return students


def demo_tokenizer(corpus, whole_words):
    """A tokenizer of whole words, or of BPE pieces; the numbers 0 to 199 are one token in both."""
    kind = models.WordLevel if whole_words else models.BPE
    tokenizer = Tokenizer(kind(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r" ?\d+| ?\w+|\n *| ?[^\w\s]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    options = {"special_tokens": ["<unk>", "<pad>", "<eos>"], "show_progress": False}
    if whole_words:
        tokenizer.train_from_iterator(corpus, trainers.WordLevelTrainer(vocab_size=2000, **options))
    else:
        tokenizer.train_from_iterator(corpus, trainers.BpeTrainer(vocab_size=160, **options))
        tokenizer.add_tokens([AddedToken(f" {n}", normalized=False) for n in range(200)])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", pad_token="<pad>", eos_token="<eos>")


def warm_start(model, tokenizer, sentences, label):
    """400 plain language-model steps of 32 sentences."""
    ids = [torch.tensor([*tokenizer(text)["input_ids"], tokenizer.eos_token_id])
           for text in sentences]
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, betas=(0.9, 0.98), weight_decay=0.01)
    for step in tqdm(range(400), desc=label, leave=False):
        batch = [ids[i] for i in torch.randint(len(ids), (32,)).tolist()]
        x = pad_sequence(batch, batch_first=True, padding_value=-100)
        optimizer.param_groups[0]["lr"] = 4e-3 * lr_scale(step, 400)
        model(input_ids=x.clamp(min=0), labels=x).loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()


if __name__ == "__main__":
    main()
