"""QR-Distill, the training run: students trained together on the teacher paths that a router gives
them.

    python distill.py                                    # the demo: laptop CPU, offline, minutes
    python distill.py --paths POOL.jsonl --students A B  # real paths, real students

Read main() first: it is the run, top to bottom, and its loop is the method (Lei et al., EMNLP
2025), with the paper's equation numbers. The equations are in router.py, the path pool in judge.py,
the tasks in eval.py. "departs (Eq N)" marks where we leave the paper, "open point N" refers to
the list in tests/experiments/README.md. Shapes: P paths of the step's Q questions, S students. """
import argparse
import contextlib
import hashlib
import importlib.util
import inspect
import json
import math
import os
import platform
import random
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path

from eval import stop, within

# What --as_printed sets: the paper's own form of what is a flag here, but for the encoder, which
# would be a download. The entropy in Eq 9 is still subtracted: the paper's text says that it is
# maximised. With one-hot gates a path has one student, so Eq 5 to 8 never run; with --gate binary
# beside it they do.
AS_PRINTED = {"style_input": False, "score_input": False, "router_hidden": 256, "gate": "onehot",
              "reward": "loss", "probe": 0.0, "entropy": "literal", "normalize": "batch",
              "competence": "eq8", "projection": "trained", "standardize": False}
# What nobody set: the demo's tiny students train in full and fast, those of --students with LoRA.
# What the router prefers on the demo, short paths, ruins a student that can already reason.
DEMO = {"lora_rank": 0, "lr": [2e-3], "epochs": 8, "eval_max_new_tokens": 96,
        "length_penalty": 0.0, "score_input": False}
REAL = {"lora_rank": 32, "lr": [2e-4], "epochs": 3, "eval_max_new_tokens": 512,
        "length_penalty": 1.0, "score_input": True}


# ---------------------------------------- flags
def make_parser():
    """The flags. Every ablation is one: README.md lists them."""
    count, natural = within(int, 1), within(int, 0)
    share, weight, positive = within(float, 0, 1), within(float, 0), within(float, 1e-9)
    p = argparse.ArgumentParser(
        usage="python distill.py [flags]", description=__doc__.split("\n\n")[0],
        epilog="Defaults in brackets. Every ablation is a flag: see README.md.")
    p.error = stop  # one sentence and exit code 2

    g = p.add_argument_group("run")
    g.add_argument("--out_dir", help="run folder (default: out/ and the time)")
    g.add_argument("--resume", metavar="DIR",
                   help="go on with the run in DIR, with its own flags; --micro_batch_size and "
                        "--checkpointing may be new, if it ran out of memory")
    g.add_argument("--seed", type=within(int, 0, 2**31), default=0,
                   help="seeds weights, gates, data order and split (0)")
    g.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps ... (auto)")
    g.add_argument("--dtype", default="auto", choices=["auto", "float32", "bf16", "fp16"],
                   help="type of the matrix products (AMP) and of a frozen base; auto: bf16 on "
                        "cuda, and on a CPU with instructions for it where the base is frozen, "
                        "else float32")
    g.add_argument("--compile", action="store_true",
                   help="torch.compile the students: minutes at the start, then faster steps on a "
                        "CPU, which needs a C++ compiler")
    g.add_argument("--checkpointing", action="store_true",
                   help="recompute activations: less memory, a third more work")
    g.add_argument("--save_every", type=count, default=100, help="steps between checkpoints (100)")
    g.add_argument("--wandb", metavar="PROJECT",
                   help="log to Weights & Biases, too (pip install wandb)")

    g = p.add_argument_group("data")
    g.add_argument("--paths", metavar="POOL",
                   help="path pool, from judge.py or not yet graded (default: the demo)")
    g.add_argument("--filter", default="full", choices=["full", "answer", "none"],
                   help="full: right answer and not judged invalid; answer: right answer; "
                        "none: all that are whole (full)")
    g.add_argument("--styles", nargs="+", help="train on these reasoning styles only (all)")
    g.add_argument("--train_frac", type=within(float, 1e-6, 1), default=1.0,
                   help="share of the training questions that is used (1)")
    g.add_argument("--test_frac", type=within(float, 1e-6, 1), default=0.2,
                   help="share of the pool's questions that is held out; the demo has test "
                        "questions of its own (0.2)")
    g.add_argument("--max_len", type=count, default=1024,
                   help="longest prompt and path in tokens; longer ones are left out (1024)")

    g = p.add_argument_group("students")
    g.add_argument("--students", nargs="+", metavar="MODEL",
                   help="Hugging Face causal LMs (default: two tiny ones)")
    g.add_argument("--freeze", nargs="+", type=natural, default=[], metavar="I",
                   help="students that do not learn, by number")
    g.add_argument("--lora_rank", type=natural,
                   help="LoRA on the blocks' linear layers, alpha = 2 x rank; 0: train all "
                        "(32; demo: 0)")
    g.add_argument("--quantize", choices=["nf4"],
                   help="frozen base in 4 bit under LoRA (QLoRA); needs bitsandbytes")
    g.add_argument("--lr", nargs="+", type=positive,
                   help="learning rate: one, or one per student (2e-4; demo: 2e-3)")

    g = p.add_argument_group("routing")
    g.add_argument("--route", default="learned",
                   choices=["learned", "all", "random", "short", "nll"],
                   help="the trained router; all paths to all students; random: the gate with "
                        "equal odds; or of each question the shortest path, or (nll) the likeliest "
                        "by the token for the untrained student (learned)")
    printed = ", ".join(f"{name} {value}" for name, value in AS_PRINTED.items())
    g.add_argument("--as_printed", action="store_true",
                   help="the paper's own form of what is a flag here; with its one-hot gates no "
                        "path is shared, so Eq 5 to 8 run only with --gate binary beside it; "
                        f"sets {printed}; a flag beside it still counts")
    g.add_argument("--encoder", default="hash", metavar="MODEL",
                   help="Eq 1: 'hash' or a Hugging Face encoder; the paper's is roberta-base "
                        "(hash)")
    g.add_argument("--router_hidden", type=natural, default=0,
                   help="Eq 2: width of the paper's MLP, 0: linear (0)")
    g.add_argument("--router_lr", type=weight,
                   help="learning rate of the router (0.3; with --router_hidden 0.01)")
    g.add_argument("--style_input", action=argparse.BooleanOptionalAction, default=True,
                   help="Eq 2: the router also sees the pool's `style` field, one-hot (on)")
    g.add_argument("--score_input", action=argparse.BooleanOptionalAction,
                   help="Eq 1: the router also sees each student's mean loss on a path before "
                        "training, for a forward pass over the pool (on; demo: off)")
    g.add_argument("--gate", default="categorical",
                   help="Eq 2, from router.GATES: categorical: a student gets one path of each "
                        "question; binary: any number of them; onehot: a path goes to one student "
                        "(categorical)")
    g.add_argument("--reward", default="posterior", choices=["posterior", "sum", "loss"],
                   help="what the router learns: posterior: to choose the path that the student is "
                        "nearest to writing by itself; sum, loss: to lower a path's total loss, or "
                        "its mean over tokens, through the gates, as in Eq 9 (posterior)")
    g.add_argument("--posterior_temperature", type=positive, default=1.0, metavar="T",
                   help="of --reward posterior: the choice's temperature, in nats; larger draws "
                        "the paths more evenly (1)")
    g.add_argument("--length_penalty", type=share, metavar="A",
                   help="of --reward posterior: a path's nats are divided by its relative length "
                        "to the power A; 0: the likeliest whole path wins, often the shortest; 1: "
                        "the likeliest by the token (1; demo: 0)")
    g.add_argument("--probe", type=share, default=0.125,
                   help="share of a step's questions, at least one, all of whose paths are run, "
                        "those not drawn forward only, so that the router hears about what it "
                        "does not choose (0.125)")
    g.add_argument("--entropy_weight", type=weight, default=0.01,
                   help="Eq 9: l1; no effect with --gate categorical, whose rates are equal (0.01)")
    g.add_argument("--entropy", default="student", choices=["student", "literal"],
                   help="Eq 3: a rate for each student, or one for all as printed (student)")
    g.add_argument("--normalize", default="question", choices=["question", "batch"],
                   help="Eq 9: every question weighs the same, or every path (question)")

    g = p.add_argument_group("collaboration")
    g.add_argument("--mutual_weight", type=weight, default=0.1,
                   help="Eq 9: l2, 0: no collaboration (0.1)")
    g.add_argument("--projection", default="random", choices=["random", "trained"],
                   help="Eq 5: frozen random, or trained, which loses rank (random)")
    g.add_argument("--standardize", action=argparse.BooleanOptionalAction, default=True,
                   help="Eq 8: compare states of mean 0 and variance 1 (on)")
    g.add_argument("--competence", default="target", choices=["target", "eq8"],
                   help="Eq 6: learned from the students' losses, or from Eq 8 as printed (target)")

    g = p.add_argument_group("optimisation")
    g.add_argument("--batch_size", type=count, default=8,
                   help="questions per step, with all their paths (8)")
    g.add_argument("--micro_batch_size", type=count,
                   help="questions per backward pass: memory, not results (all)")
    g.add_argument("--epochs", type=count, help="passes over the training questions (3; demo: 8)")
    g.add_argument("--max_steps", type=count, help="optimiser steps, instead of --epochs")

    g = p.add_argument_group("evaluation")
    g.add_argument("--eval_questions", metavar="FILE",
                   help="test set in any format of eval.py (default: questions held out)")
    g.add_argument("--eval_limit", type=natural, default=0,
                   help="only the first N test questions, 0: all (0)")
    g.add_argument("--eval_every", type=natural, default=0,
                   help="steps between tests during training, 0: only before and after (0)")
    g.add_argument("--eval_max_new_tokens", type=count,
                   help="longest answer in tokens (512; demo: 96)")
    return p


def parse_args(argv=None):
    """The run's flags; with --resume those that the run was started with."""
    argv = sys.argv[1:] if argv is None else argv
    p = make_parser()
    args = p.parse_args(argv)
    if args.resume is not None:
        given = {word.partition("=")[0] for word in argv if word.startswith("--")}
        if given - {"--resume", "--micro_batch_size", "--checkpointing"}:
            stop("--resume goes on with the run's own flags: leave all others out, but for "
                 "--micro_batch_size and --checkpointing")
        saved = resumed_args(args.resume, vars(args).keys() - {"resume"})
        saved.micro_batch_size = args.micro_batch_size or saved.micro_batch_size
        saved.checkpointing = args.checkpointing or saved.checkpointing
        return saved
    if args.as_printed:
        p.set_defaults(**AS_PRINTED)
        args = p.parse_args(argv)
    for name, value in (REAL if args.students else DEMO).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.router_lr is None:
        args.router_lr = 0.01 if args.router_hidden else 0.3
    check_flags(args)
    # The run can be resumed from any folder.
    args.out_dir = os.path.abspath(args.out_dir or time.strftime("out/%Y%m%d-%H%M%S"))
    args.paths = args.paths and os.path.abspath(args.paths)
    args.eval_questions = args.eval_questions and os.path.abspath(args.eval_questions)
    args.students = args.students and [absolute_folder(name) for name in args.students]
    args.encoder = absolute_folder(args.encoder)
    check_out_dir(args.out_dir)
    return args


def absolute_folder(name):
    """A folder's absolute path; any other name, such as one on the hub, as it is."""
    return os.path.abspath(name) if os.path.isdir(name) else name


def resumed_args(folder, flags):
    """The saved values of the flags (names) of the run in `folder`."""
    file = Path(folder) / "args.json"
    if not folder or not file.is_file():
        stop(f"--resume {folder!r}: no args.json there; pass the --out_dir of an earlier run")
    try:
        saved = {**json.loads(file.read_text(encoding="utf-8"))}
    except (ValueError, TypeError, OSError, RecursionError):
        stop(f"--resume {folder}: its args.json is damaged; start the run again in another folder")
    if missing := sorted(flags - saved.keys()):
        stop(f"--resume {folder}: its args.json lacks --{missing[0]}; it was written by another "
             "version, start the run again in another folder")
    args = argparse.Namespace(**{name: saved[name] for name in flags})
    args.resume = args.out_dir = os.path.abspath(folder)
    check_flags(args)
    return args


def check_flags(args):
    """stop() at flags that contradict one another, or that are empty."""
    n = len(args.students or [0, 0])
    for name in ("out_dir", "paths", "eval_questions", "encoder", "wandb", "device"):
        if getattr(args, name) == "":
            stop(f"--{name} is empty: pass a value, or leave the flag out")
    if "" in (args.students or []):
        stop("--students: one of the names is empty")
    if args.quantize and not (args.students and args.lora_rank):
        stop(f"--quantize {args.quantize}: a 4-bit base stays frozen, so it needs --students and "
             "--lora_rank above 0")
    if args.lora_rank and not args.students:
        stop(f"--lora_rank {args.lora_rank}: the demo's tiny students train in full; pass "
             "--students")
    if max(args.freeze, default=0) >= n:
        stop(f"--freeze {max(args.freeze)}: the students are numbered 0 to {n - 1}")
    if len(args.lr) not in (1, n):
        stop(f"--lr has {len(args.lr)} values for {n} students: pass one, or one per student")
    if args.wandb and not importlib.util.find_spec("wandb"):
        stop("--wandb needs one more package: pip install wandb")


def check_out_dir(folder):
    """stop() where a run folder can't be written, or holds a run that got to its start."""
    out = Path(folder)
    if any(os.path.exists(out / name) for name in ("checkpoint.safetensors", "results.json")):
        stop(f"--out_dir {folder} holds a run already: pass another folder, or only --resume "
             f"{folder}")
    for name in ("test.jsonl", "log.jsonl", "predictions.jsonl"):
        if (out / name).exists() and not (out / "args.json").exists():
            stop(f"--out_dir {folder} holds a {name} that is no run's, which a run would write "
                 "over: pass another folder")
    new = not os.path.exists(out)
    try:
        out.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=out).close()
        if new:
            out.rmdir()
    except OSError as e:
        stop(f"--out_dir {folder}: can't be written ({e.strerror})")


# Before the imports below, which take seconds: --help and wrong flags answer at once.
if __name__ == "__main__":
    FLAGS = parse_args()

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from tqdm import tqdm
from transformers.pytorch_utils import Conv1D

import eval as tasks  # the README's eval.X: "eval" is a function of Python's
import judge
import router as qr  # the README's router.X: "router" is the network in main

WARMUP = 0.05  # share of the steps with a rising learning rate; then a cosine down to a tenth
WEIGHT_DECAY = 0.01  # AdamW's, of the students
CLIP = 1.0  # largest gradient norm of a student, the collaboration or the router
SCORE_SCALE = 3  # Eq 1: a loss one deviation off weighs about as much as a style, 6**0.5 of six
SHARED_DIM = 64  # Eq 5: d
ROUTER_BETAS, ROUTER_DECAY = (0.5, 0.95), 0.1  # AdamW's, of the router: it must turn round quickly


# ---------------------------------------- the run
def main(args=None):
    """One run: filter, students, router, training, test, table. args: flags as words, or parsed."""
    args = args if isinstance(args, argparse.Namespace) else parse_args(args)
    out = Path(args.out_dir)
    device, amp_dtype = set_up(args)
    check_gate(args)

    # The pool: filtered, split by question, tokenised and embedded once.
    kept, test, pool = load_data(args)
    print("\nquality filter (training questions)")
    judge.filter_table(pool, args.filter)
    students = load_students(args, device, amp_dtype)
    rows = encode(kept, students)
    questions = paths_by_question(rows)  # for each question the numbers of its paths in `rows`
    lengths = response_lengths(rows)  # (all paths, S), tokens
    began = time.time()
    h = embed(rows, students, lengths, args, device)  # (all paths, d), Eq 1
    fixed = fixed_route(rows, questions, lengths, students, args)  # (all paths, S), or None
    prepared = time.time() - began  # counted as training: a route pays for what it looks at
    tested = test[:args.eval_limit or None]

    # What trains: the students, the collaboration beside them, and the router.
    torch.manual_seed(args.seed)  # the same numbers from here on, whatever was loaded from a cache
    router = qr.Router(h.shape[1], len(students), args.router_hidden)
    collab = qr.Collaboration([hidden_size(student) for student in students], SHARED_DIM,
                              trained=args.projection == "trained", standardized=args.standardize,
                              fit_competence=args.competence == "target").to(device)
    optimizer, router_optimizer = make_optimizers(students, collab, router, args)
    scaler = torch.amp.GradScaler(device.type, enabled=amp_dtype == torch.float16)
    gate_rng = torch.Generator().manual_seed(args.seed)  # the gates' own random numbers
    per_epoch = math.ceil(len(questions) / args.batch_size)
    steps = args.max_steps or args.epochs * per_epoch

    # Start, or go on where a killed run stopped.
    lock = lock_run_folder(out)
    if not args.resume:
        check_out_dir(out)  # again: another run may have been there since
    state = State(students, router, collab, optimizer, router_optimizer, scaler, gate_rng)
    digest = digest_of(rows, test, students)
    run = resume(out, state, digest) if args.resume else None
    if run:
        write_flags(out, args)  # --micro_batch_size and --checkpointing may be new
    else:
        run = {"step": 0, "tokens": [0] * len(students), "seconds": prepared, "digest": digest,
               "wandb": args.wandb and uuid.uuid4().hex}
        start_run_folder(out, args, test)
        run["before"] = answer(students, tested, args)["summary"]
        save_checkpoint(out, state, run)
    board = start_wandb(out, run, args)
    pressed = note_ctrl_c()
    for student in students:
        student.model.train(not student.frozen)

    learns = torch.tensor([not student.frozen for student in students])  # (S,)
    bar = tqdm(range(run["step"], steps), "train", initial=run["step"], total=steps, unit="step")
    for step in bar:
        began = time.time()
        scale = lr_scale(step, steps)
        scale_learning_rates(optimizer, scale)
        epoch, numbers, question = step_paths(questions, step, args)  # (P,) each
        paths = [rows[i] for i in numbers]
        length = lengths[numbers]  # (P, S)

        # Eq 2: the gates decide for the whole step before any student runs.
        fixed_here = None if fixed is None else fixed[numbers]  # (P, S)
        logits = router(h[numbers])  # (P, S)
        alpha, p = route(logits, question, fixed_here, gate_rng, args)  # (P, S) each
        routed = alpha.detach() > 0.5  # a student does not train on the other pairs
        weight = qr.path_weights(alpha, question, args.normalize)  # (P, S) of the losses in Eq 9

        # Eq 5 to Eq 9: each student learns from its paths, and from the ensemble on those that
        # another student got too.
        nll, figures = student_step(students, collab, paths, question, routed, weight.detach(),
                                    scaler, args)

        # The probe: of a few questions the other paths run too, forward only, so that the router
        # hears about what it did not choose.
        probed = probed_paths(question, args)  # (P,) bool
        probed_nll = probe(students, paths, question, probed, routed, args)  # (P, S)
        known_nll = torch.where(routed.to(nll.device), nll, probed_nll).cpu()  # 0 if neither ran
        nll = nll.cpu()

        # The router learns. By default from probed questions alone: its choice is pulled to the
        # student's own. With --reward sum or loss by Eq 9, through alpha. Eq 3 and 4 join in.
        entropy = None
        if args.route == "learned":
            entropy = router_step(logits, alpha, p, weight, known_nll, probed, length, question,
                                  args)

        # AdamW for all of them.
        norms = clip_gradients(optimizer, scaler) + clip_gradients(router_optimizer)
        stop_if_not_finite(nll, norms, step, out, scaler)
        if has_gradient(optimizer):  # else fp16's scaler has seen no loss, and complains
            scaler.step(optimizer)
            scaler.update()
        router_optimizer.step()
        optimizer.zero_grad()
        router_optimizer.zero_grad()

        # One line is logged, a checkpoint is written.
        trained = ((length * routed).sum(0) * learns).tolist()  # response tokens of each student
        seconds = time.time() - began
        run["step"] = step + 1
        run["seconds"] += seconds
        run["tokens"] = [a + b for a, b in zip(run["tokens"], trained)]
        line = {"step": step + 1, "epoch": epoch, "lr_scale": scale,
                **step_numbers(paths, nll / length, routed), "entropy": entropy, **figures,
                "grad_norm": [x if math.isfinite(x) else None for x in norms[:len(students)]],
                "router_grad_norm": norms[-1],
                "tokens_per_s": round(sum(trained) / seconds, 1)}
        if args.eval_every and (step + 1) % args.eval_every == 0:
            line["accuracy"] = answer(students, tested, args)["summary"]["accuracy"]
        log_step(line, out, bar, board)
        if (step + 1) % args.save_every == 0 or step + 1 == steps or pressed:
            save_checkpoint(out, state, run)
        if pressed:
            raise KeyboardInterrupt
    signal.signal(signal.SIGINT, signal.default_int_handler)

    # The students on disk, the test, the table.
    for number, student in enumerate(students):
        with writing(out):
            save_student(student, out / f"student_{number}")
    after = answer(students, tested, args)
    write_results(out, args, run, after, students, per_epoch, pool, rows, questions)
    if board:
        board.finish()
    lock.release()


def check_gate(args):
    """stop() at a gate that there is none of, and at flags that contradict it. Not in check_flags:
    a gate is added in router.py, which takes seconds to import."""
    if args.gate not in qr.GATES:
        stop(f"--gate {args.gate}: router.GATES has {', '.join(qr.GATES)}")
    if args.route != "learned":
        return
    one_path = args.gate in qr.ONE_PATH
    if args.reward == "posterior" and not one_path:
        stop(f"--gate {args.gate}: --reward posterior is about the choice of one path of each "
             "question; pass --reward sum or loss too")
    if one_path and not args.probe:
        stop("--probe 0: a student that gets one path of a question has nothing to compare it "
             "with, and the router never learns; pass a share above 0, or --gate binary")
    if one_path and args.normalize == "batch":
        stop("--normalize batch: with one path of each question all weigh the same anyway; "
             "pass --gate binary and --reward sum too")


def set_up(args):
    """-> the device and AMP's type (None: float32); seeds torch."""
    name = tasks.usable_device(None if args.device == "auto" else args.device)
    device = torch.empty(0, device=name).device  # "cuda" is "cuda:0"
    if device.type == "cuda":
        torch.cuda.set_device(device)  # so that the checkpoint's random state is this device's
    if args.dtype == "auto":  # a small student that trains in full is faster in float32
        pays = device.type == "cuda" or args.lora_rank
        args.dtype = "bf16" if pays and tasks.has_bfloat16(device) else "float32"
    torch.manual_seed(args.seed)
    amp_dtype = {"float32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[args.dtype]
    return device, amp_dtype


# ---------------------------------------- the method's steps
def route(logits, question, fixed, gate_rng, args):
    """Eq 2: which students train on which of the step's paths.

    logits (P, S); question (P,); fixed (P, S): see fixed_route, None where the gates draw;
    gate_rng: of the gates' noise -> alpha (P, S), 0 or 1 with the gradient of the gates; p (P, S),
    the gates' probabilities. """
    if fixed is not None:
        return fixed, fixed
    if args.route == "random":  # the same gates, with the same odds for all paths
        logits = torch.zeros_like(logits)
    return qr.GATES[args.gate](logits, question, gate_rng)


def student_step(students, collab, paths, question, routed, weight, scaler, args):
    """Eq 5 to Eq 9 for the students: run every routed pair, and send the losses' gradients back.

    paths: the P rows of `encode`; question (P,); routed (P, S) bool; weight (P, S) of the losses in
    Eq 9 -> nll (P, S), the nats of a whole path, 0 where it was not run; figures of the
    collaboration for the log. """
    device = students[0].model.device
    nll = torch.zeros(routed.shape, device=device)
    token_weight = weight / response_lengths(paths)  # (P, S): Eq 9 has a path's mean over tokens
    n_segments = torch.tensor([row["n_segments"] for row in paths])  # (P,)
    co_routed = routed.sum(1) > 1  # (P,)
    figures = defaultdict(list)
    for batch in micro_batches(question, args):  # (p,) numbers of paths
        # (C,) those that several students got; without Eq 8 none matters
        shared = batch[co_routed[batch] & (args.mutual_weight > 0)]
        # The segments of shared paths are numbered through the batch: of two with 3 and 2 segments
        # the first begins at 0, the second at 3. -1: a path is not shared.
        first_segment = torch.full_like(question, -1)  # (P,)
        first_segment[shared] = n_segments[shared].cumsum(0) - n_segments[shared]
        loss = torch.zeros((), device=device)
        z, segment = [], []
        for s, student in enumerate(students):
            mine = batch[routed[batch, s]]  # numbers of the paths that the student got
            rows = [paths[i] for i in mine]
            with torch.set_grad_enabled(not student.frozen):
                nll_s, z_s, segment_s = forward_paths(student, s, rows,
                                                      first_segment[mine].tolist())
            nll[mine, s] = nll_s.detach()
            z.append(z_s)
            segment.append(segment_s)
            if not student.frozen:  # Eq 9: L_distill^(s)
                loss = loss + (token_weight[mine, s].to(device) * nll_s).sum()
        if len(shared):
            together = collaborate(collab, z, segment, n_segments[shared], routed[shared],
                                   nll[shared], figures, args)
            # departs (Eq 9): a mean over the step's shared paths.
            loss = loss + together / co_routed.sum()
        if loss.requires_grad:
            scaler.scale(loss).backward()
    figures = {name: torch.cat(values).mean(0).tolist() for name, values in figures.items()}
    return nll, {"co_routed": float(co_routed.float().mean()), **figures}


def collaborate(collab, z, segment, n_segments, routed, nll, figures, args):
    """Eq 5 to Eq 8 on C co-routed paths -> l2 L_mutual + L_competence, summed over them.

    z, segment: see Collaboration; n_segments (C,): how many shared segments a path has; routed, nll
    (C, S). Adds to the figures of the log. """
    device = nll.device
    path = torch.arange(len(n_segments)).repeat_interleave(n_segments).to(device)  # (N,) 0..C-1
    routed = routed.to(device)
    # Nats per segment can be compared across tokenizers, nats per token can't.
    per_segment = nll / n_segments[:, None].to(device)
    l_mutual, l_competence, gamma, raw, zt = collab(z, segment, path, routed, per_segment)
    figures["mutual"].append(l_mutual.detach())
    figures["gamma"].append(gamma.detach())
    if "spread" not in figures:  # on a step's first micro-batch, to see a collapse (open point 8)
        spread, rank = collapse_figures(raw.detach(), zt.detach(), routed[path])
        figures["spread"].append(spread[None])
        figures["rank"].append(rank[None])
    return args.mutual_weight * l_mutual.sum() + l_competence.sum()


def collapse_figures(raw, zt, own):
    """Spread (S,) of each student's projected states raw (S, N, d), and effective rank (S,) of the
    standardised ones, zt, over its own segments: own (N, S) bool."""
    spread, rank = [], []
    for s in range(len(raw)):
        its_raw = raw[s, own[:, s]]
        # Not std(): it warns where the student shares no path, which is nan here.
        deviation = (its_raw - its_raw.mean(0)).square().mean(0).sqrt()
        spread.append(deviation.nan_to_num().mean())
        rank.append(qr.effective_rank(zt[s, own[:, s]]))
    return torch.stack(spread), torch.stack(rank)


def probed_paths(question, args):
    """(P,) bool: all paths of the step's first few questions, whose order is random anyway."""
    share = args.probe if args.route == "learned" else 0
    return question < math.ceil(share * (int(question.max()) + 1))


@torch.no_grad()
def probe(students, paths, question, probed, routed, args):
    """Run the paths of probed questions (P,) that a student did not get (routed (P, S) bool) ->
    their nats (P, S), 0 elsewhere. departs (Eq 9): the paper has no such forward passes."""
    nll = torch.zeros(routed.shape, device=students[0].model.device)
    for here in micro_batches(question, args):
        for s, student in enumerate(students):
            rest = here[probed[here] & ~routed[here, s]]
            some = [paths[i] for i in rest]
            nll[rest, s], _, _ = forward_paths(student, s, some)
    return nll


def router_step(logits, alpha, p, weight, known_nll, probed, length, question, args):
    """The router learns, with the students' losses as constants: by default from posterior_loss,
    which compares paths as --length_penalty says, with --reward sum or loss by Eq 9; Eq 3 and 4
    join in.

    logits, and alpha, p, weight (P, S) of the gates; known_nll (P, S), nats of a path where it was
    routed or probed (P,); length (P, S), tokens -> the entropy of Eq 4. By default only probed
    questions count, all of whose pairs were run. With --reward sum or loss L_distill reaches the
    router through alpha; a pair that was not run gets the mean cost of the routed ones, so that
    L_distill gives its alpha no gradient. """
    if args.reward == "posterior":  # departs (Eq 9), see posterior_loss
        cost = qr.normalize_length(known_nll, length, question, args.length_penalty)
        loss = qr.posterior_loss(logits[probed], cost[probed], question[probed],
                                 args.posterior_temperature)
    else:
        cost = known_nll if args.reward == "sum" else known_nll / length
        routed = alpha.detach() > 0.5
        cost = qr.fill_skipped(cost, routed, question, args.normalize, probed[:, None])
        loss = (weight * cost).sum()
    per_student = args.entropy == "student"
    entropy = qr.balance_entropy(p if per_student else alpha, question, per_student)
    # departs (Eq 9): Eq 4 is maximised, so subtracted.
    (loss - args.entropy_weight * entropy).backward()
    return float(entropy.detach())


def step_paths(questions, step, args):
    """-> the epoch; the step's paths (P,), as numbers of rows; their questions (P,), as 0..Q-1.

    The order of the questions hangs on seed and epoch. """
    epoch, k = divmod(step, math.ceil(len(questions) / args.batch_size))
    shuffle = torch.Generator().manual_seed(args.seed * 1_000_003 + epoch)
    order = torch.randperm(len(questions), generator=shuffle)
    numbers, question = [], []
    for q, i in enumerate(order[k * args.batch_size:(k + 1) * args.batch_size]):
        numbers += questions[i]
        question += [q] * len(questions[i])
    return epoch, torch.tensor(numbers), torch.tensor(question)


def micro_batches(question, args):
    """Yield the numbers (p,) of the paths of --micro_batch_size questions of the step: that changes
    the memory that it needs, not its results."""
    size = args.micro_batch_size or args.batch_size
    for q in range(0, int(question.max()) + 1, size):
        yield ((question >= q) & (question < q + size)).nonzero().squeeze(1)


def fixed_route(rows, questions, lengths, students, args):
    """alpha (all paths, S) of the routes that are fixed before training; None for learned and
    random, which draw in every step.

    all: every path; short: a question's shortest path in the student's tokens; nll: the one that
    the untrained student finds likeliest by the token (GRAPE, Zhang et al., 2025, arXiv
    2502.04194). """
    if args.route in ("learned", "random"):
        return None
    if args.route == "all":
        return torch.ones(lengths.shape)
    question = torch.empty(len(rows), dtype=torch.long)
    for q, paths in enumerate(questions):
        question[paths] = q
    cost = lengths if args.route == "short" else path_losses(rows, students) / lengths
    return qr.keep_best(-cost.float(), question)


@torch.no_grad()
def path_losses(rows, students):
    """The nats (all paths, S) of every path for the students as they are."""
    nll = torch.empty(len(rows), len(students))
    for s, student in enumerate(students):
        for start in tqdm(range(0, len(rows), 64), desc=f"score paths, student {s}", leave=False):
            part = rows[start:start + 64]
            nll[start:start + 64, s] = forward_paths(student, s, part)[0].cpu()
        if not nll[:, s].isfinite().all():
            stop(f"student {s}: its loss on a path of the pool is not finite before training; try "
                 "--dtype float32")
    return nll


# ---------------------------------------- optimisation
def make_optimizers(students, collab, router, args):
    """AdamW of the students and the collaboration, a group each, and AdamW of the router, whose
    gradients AMP leaves alone and whose rate stays: the students never stop changing. A frozen
    student's group is empty."""
    groups = [{"params": trainable(student.model), "peak": student.lr, "weight_decay": WEIGHT_DECAY}
              for student in students]
    groups.append({"params": trainable(collab), "peak": 1e-3, "weight_decay": 0.0})
    router_optimizer = torch.optim.AdamW(router.parameters(), lr=args.router_lr, betas=ROUTER_BETAS,
                                         weight_decay=ROUTER_DECAY)
    return torch.optim.AdamW(groups), router_optimizer


def trainable(module):
    return [p for p in module.parameters() if p.requires_grad]


def lr_scale(step, steps):
    """Learning rate as a share of its peak: linear warm-up, then a cosine down to a tenth."""
    rising = max(1, round(WARMUP * steps))
    if step < rising:
        return (step + 1) / rising
    return 0.1 + 0.45 * (1 + math.cos(math.pi * (step - rising) / max(1, steps - rising)))


def scale_learning_rates(optimizer, scale):
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * scale


def has_gradient(optimizer):
    """Whether anything learned in this step: not where all paths went to frozen students."""
    return any(p.grad is not None for group in optimizer.param_groups for p in group["params"])


def clip_gradients(optimizer, scaler=None):
    """Clip each group's gradients to CLIP -> their norms before that (0 where there is none)."""
    if scaler and has_gradient(optimizer):
        scaler.unscale_(optimizer)
    norms = []
    for group in optimizer.param_groups:
        params = [p for p in group["params"] if p.grad is not None]
        norms.append(float(nn.utils.clip_grad_norm_(params, CLIP)) if params else 0.0)
    return norms


def stop_if_not_finite(nll, norms, step, out, scaler):
    """stop() before a step that would leave anything that trains without finite weights; the last
    checkpoint stays. norms: of the students, the collaboration and the router."""
    names = [f"student {s}" for s in range(nll.shape[1])]
    lost = [name for name, losses in zip(names, nll.T) if not losses.isfinite().all()]
    names += ["the collaboration", "the router"]
    for name, norm in zip(names, norms):
        skipped = scaler.is_enabled() and name != "the router"  # fp16's scaler skips such a step
        if not math.isfinite(norm) and not skipped:
            lost.append(name)
    if lost:
        stop(f"step {step + 1}: the loss or gradient of {lost[0]} is not finite, so nothing good "
             f"can follow; the last good checkpoint stays in {out}; start again with a smaller "
             "--lr or --router_lr")


# ---------------------------------------- one student's forward pass over the paths that it got
def forward_paths(student, s, rows, first_segment=None):
    """Run student number s over its rows -> nll (rows,), each one's summed loss in nats; z (T, D)
    and segment (T,), the states on the text tokens of the co-routed rows and the shared segments
    that these tokens lie in.

    first_segment: for each row the number of its first shared segment, -1 if it is not co-routed;
    None: no row is. """
    first_segment = first_segment or [-1] * len(rows)
    states, target, row_of, read_text, segment = [], [], [], [], []
    prompts = [row["prompts"][s] for row in rows]
    responses = [row["responses"][s] for row in rows]
    for batch, its_states in response_states(student, prompts, responses):
        states.append(its_states)
        for i in batch:
            n = len(responses[i])
            target.append(responses[i])
            row_of.append(np.full(n, i))
            shared = first_segment[i] >= 0
            # State k has read token k - 1 of the response, so state 0 has read none of its text;
            # the end token is predicted, not read. So the rest are the text's own tokens, in order.
            read_text.append((np.arange(n) > 0) & shared)
            segment.append(rows[i]["segments"][s] + first_segment[i] if shared else [])
    if not states:
        none = torch.zeros(0, device=student.model.device)
        return none, none.view(0, hidden_size(student)), none.long()
    states = torch.cat(states)  # (N, D), response positions only
    target, row_of, segment = (put(np.concatenate(x), states.device)
                               for x in (target, row_of, segment))
    # Numbers and not a mask, whose size a GPU would be asked for.
    read_text = put(np.flatnonzero(np.concatenate(read_text)), states.device)  # (T,)
    nll = torch.zeros(len(rows), device=states.device)
    nll = nll.index_add(0, row_of, response_nll(student, states, target))
    return nll, states[read_text].float(), segment


def response_states(student, prompts, responses):
    """Yield (batch, states): numbers of rows, and the states (N, D) that predict their response
    tokens, row after row.

    Sequences are padded on the right, where a causal model's real tokens cannot look: no attention
    mask is needed. The last token is predicted, never read. """
    device = student.model.device
    multiple = 64 if device.type == "cuda" else 1
    # Small passes pad less, a GPU wants them larger.
    max_tokens = 1024 if device.type == "cpu" else 4096
    lengths = [len(prompt) + len(response) - 1 for prompt, response in zip(prompts, responses)]
    for batch in batches(lengths, max_tokens):
        longest = max(lengths[i] for i in batch)
        width = math.ceil(longest / multiple) * multiple
        ids = np.zeros((len(batch), width), np.int64)
        predicting = []  # positions in the flattened batch
        for b, i in enumerate(batch):
            ids[b, :lengths[i]] = np.concatenate([prompts[i], responses[i][:-1]])
            # The prompt's last token predicts the response's first.
            predicting.append(b * width + np.arange(len(prompts[i]) - 1, lengths[i]))
        with autocast(student):
            hidden = student.blocks(input_ids=put(ids, device), use_cache=False).last_hidden_state
        yield batch, hidden.flatten(0, 1)[put(np.concatenate(predicting), device)]


def batches(lengths, max_tokens):
    """Yield row numbers, shortest rows first, in batches of at most `max_tokens` padded tokens (or
    of one row)."""
    batch = []
    for i in sorted(range(len(lengths)), key=lengths.__getitem__):
        if batch and (len(batch) + 1) * lengths[i] > max_tokens:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


def put(array, device):
    """Whole numbers on the device, to a GPU from pinned memory: nothing waits, the next batch is
    built meanwhile."""
    x = torch.from_numpy(array.astype(np.int64))
    if device.type == "cuda":
        return x.pin_memory().to(device, non_blocking=True)
    return x.to(device)


# ---------------------------------------- next-token loss, without ever holding all logits
def nll_chunks(states, weight, bias, target, softcap):
    """Yield (rows, nll (n,), d nll / d logits (V, n)) for n of the N states at a time: about 256
    MiB of float32.

    Vocabulary first: with so few rows a CPU makes this product a fifth faster than the one that
    gives (n, V). The gradient is in the weight's type, and lost when the next one comes. """
    size = min(len(states), max(16, 2**26 // len(weight)))
    # Two buffers for all chunks, one in the weight's type and one in float32 (the same one if that
    # is its type; a soft cap takes one more), and in place what can be: fresh memory costs a CPU as
    # much as the arithmetic.
    low = weight.new_empty(len(weight) * size)
    exact = low
    if weight.dtype != torch.float32:
        exact = torch.empty_like(low, dtype=torch.float32)
    for rows in torch.arange(len(states), device=states.device).split(size):
        low_here = low[:len(weight) * len(rows)].view(len(weight), -1)  # (V, n)
        logits = exact[:len(weight) * len(rows)].view(len(weight), -1)  # (V, n)
        torch.mm(weight, states[rows].to(weight.dtype).T, out=low_here)
        logits.copy_(low_here)
        if bias is not None:
            logits.add_(bias[:, None])
        if softcap:
            logits.div_(softcap).tanh_()
            slope = 1 - logits.square()
            logits.mul_(softcap)
        of_target = logits.gather(0, target[None, rows])  # (1, n)
        top = logits.amax(0)  # (n,)
        p = logits.sub_(top).exp_()  # in place: logits, then softmax, then softmax less the one-hot
        total = p.sum(0)
        p.div_(total).scatter_add_(0, target[None, rows], -torch.ones_like(of_target))
        if softcap:
            p.mul_(slope)
        nll = total.log() + top - of_target[0]
        low_here.copy_(p)
        yield rows, nll, low_here


class ChunkedNLL(torch.autograd.Function):
    """-log p(target) at each position. A 262k-token vocabulary's logits would need gigabytes, so
    one chunk of them lives at a time.

    states (N, D), weight (V, D), bias (V) or None, target (N,) -> (N,) float32, nats. The states'
    gradient is computed while a chunk's logits exist: with a frozen head they are computed once.
    """

    @staticmethod
    def forward(ctx, states, weight, bias, target, softcap):
        nll = states.new_empty(len(states), dtype=torch.float32)
        dstates = torch.empty_like(states) if ctx.needs_input_grad[0] else None
        for rows, chunk_nll, dlogits in nll_chunks(states, weight, bias, target, softcap):
            nll[rows] = chunk_nll
            if dstates is not None:
                dstates[rows] = (dlogits.T @ weight).to(dstates.dtype)
        ctx.save_for_backward(states, weight, bias, target, dstates)
        ctx.softcap = softcap
        return nll

    @staticmethod
    def backward(ctx, g):
        states, weight, bias, target, dstates = ctx.saved_tensors
        dweight = dbias = None
        if dstates is not None:
            dstates = dstates * g[:, None].to(dstates.dtype)
        # A trained head needs each position's weight g, known only now: the logits again.
        if ctx.needs_input_grad[1]:
            dweight = torch.zeros_like(weight)
            dbias = None if bias is None else torch.zeros_like(bias)
            for rows, _, dlogits in nll_chunks(states, weight, bias, target, ctx.softcap):
                dlogits.mul_(g[rows])
                dweight.addmm_(dlogits, states[rows].to(weight.dtype))
                if dbias is not None:
                    dbias += dlogits.sum(1)
        return dstates, dweight, dbias, None, None


def response_nll(student, states, target):
    """The next-token losses (N,) of Eq 9, in nats, from the states (N, D) that predict the tokens
    target (N,)."""
    head, config = student.model.get_output_embeddings(), student.model.config.get_text_config()
    factor = tasks.logit_factor(config)  # Cohere's, Granite's: 1 in most families
    softcap = getattr(config, "final_logit_softcapping", None)  # Gemma 2's
    if factor != 1:
        states = states * factor
    bias = head.bias if head.bias is None or factor == 1 else head.bias * factor
    with autocast(student):
        return ChunkedNLL.apply(states, head.weight, bias, target, softcap)


def autocast(student):
    """AMP for one student; float32 without it."""
    dtype = student.amp_dtype
    return torch.autocast(student.model.device.type, dtype, enabled=dtype is not None)


# ---------------------------------------- students
@dataclass
class Student:
    """A student in memory."""
    model: nn.Module
    blocks: nn.Module  # the model without its output head, compiled with --compile
    tokenizer: object
    source: str  # name or folder
    fingerprint: str | None  # of its weights before LoRA
    end: int  # the token that ends a response
    lr: float
    frozen: bool
    max_len: int  # tokens of prompt and path
    amp_dtype: torch.dtype | None


def hidden_size(student):
    return student.model.get_output_embeddings().weight.shape[1]


def load_students(args, device, amp_dtype):
    """The students in memory."""
    if args.students:
        loaded = [load_base(name, args, device, amp_dtype) for name in args.students]
    else:
        demo = demo_students(args.seed)
        loaded = [(model.to(device), tokenizer, "demo") for model, tokenizer in demo]
    if args.compile:  # students of one family share the compiler's limit of graphs
        torch._dynamo.config.recompile_limit = 16 * len(loaded)
    students = []
    for i, (model, tokenizer, source) in enumerate(loaded):
        fingerprint = tasks.fingerprint(model)
        if args.lora_rank:
            add_lora(model, args.lora_rank, 2 * args.lora_rank)
            say_reach_of_lora(model, source)
        if i in args.freeze:
            model.requires_grad_(False)
        config = model.config.get_text_config()
        context = getattr(config, "max_position_embeddings", None) or args.max_len
        student = Student(model, model.base_model, tokenizer, source, fingerprint,
                          end=tasks.end_token(tokenizer), lr=args.lr[i % len(args.lr)],
                          frozen=i in args.freeze, max_len=min(args.max_len, context),
                          amp_dtype=amp_dtype)
        if args.checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        if args.compile:
            student.blocks = torch.compile(model.base_model, dynamic=True)
        check_student(student)
        students.append(student)
    return students


def load_base(name, args, device, amp_dtype):
    """-> model, tokenizer, source; a base that LoRA leaves frozen in AMP's type or in 4 bit."""
    if os.path.isfile(os.path.join(name, "adapter_config.json")):
        stop(f"--students {name}: this is a saved adapter; pass its base model, or merge it first")
    frozen_in_half = args.lora_rank and (device.type == "cuda" or amp_dtype == torch.bfloat16)
    dtype = (amp_dtype if frozen_in_half else None) or torch.float32
    more = nf4(device, dtype) if args.quantize else {}
    model, tokenizer = tasks.load_student(name, device, dtype, **more)
    return model, tokenizer, name


def nf4(device, dtype):
    """from_pretrained's options for linear layers in 4-bit NormalFloat, their scales in 8 bit
    (Dettmers et al., 2023, QLoRA): 0.516 bytes a weight. Embeddings, norms and output head keep
    `dtype`, in which the products are made too."""
    if not (importlib.util.find_spec("bitsandbytes") and importlib.util.find_spec("accelerate")):
        stop("--quantize nf4 needs two more packages: pip install bitsandbytes accelerate")
    config = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype)
    return {"device_map": {"": device}, "quantization_config": config}


def check_student(student):
    """A trial forward, and for a student that learns a backward; stop() where the model does more
    between last hidden states and logits than response_nll knows of, or where it can't be run."""
    device = student.model.device
    ids = torch.tensor([[student.end, 1, 2, 3]], device=device)
    with torch.no_grad(), autocast(student):
        logits = student.model(input_ids=ids).logits[0, :-1].float()
        states = student.model.base_model(input_ids=ids).last_hidden_state[0, :-1]
        nll = response_nll(student, states, ids[0, 1:])
    wanted = F.cross_entropy(logits, ids[0, 1:], reduction="none")
    if not torch.allclose(nll, wanted, rtol=0.05, atol=0.05):
        stop(f"student {student.source}: its output head changes the logits in a way that is not "
             "supported here")
    try:
        with torch.random.fork_rng():  # dropout draws no number of the run's
            student.model.train(not student.frozen)
            row = {"prompts": [np.array([student.end])], "responses": [np.array([1, 2, 3])]}
            nll, _, _ = forward_paths(student, 0, [row])
            if not student.frozen:
                nll.sum().backward()
    except (RuntimeError, AttributeError, TypeError, ValueError) as e:
        stop(f"student {student.source}: it can't be run here as training needs it "
             f"({tasks.in_a_line(e)}); pass another model, or try --lora_rank 0, or leave "
             "--compile out")
    finally:
        student.model.eval()
    if not all(p.grad.isfinite().all() for p in trainable(student.model) if p.grad is not None):
        stop(f"student {student.source}: its gradients are not finite; try --dtype float32")
    student.model.zero_grad()


# ---------------------------------------- LoRA (Hu et al., 2021), in PEFT's format on disk
# Families whose gate, up and down projections PEFT maps onto fused experts when it loads them.
REMAPPED_BY_PEFT = {"deepseek_v2", "deepseek_v3", "glm4_moe", "ernie4_5_moe", "qwen3_next"}


class LoRA(nn.Module):
    """base(x) + alpha / rank * B A x: A (rank, d_in) and B (d_out, rank) in float32 over a frozen
    linear layer."""

    def __init__(self, base, rank, alpha):
        super().__init__()
        if isinstance(base, Conv1D):  # GPT-2's
            d_in, d_out = base.weight.shape
        else:  # not the shape of the weight, which is packed in 4 bit
            d_in, d_out = base.in_features, base.out_features
        self.base, self.rank, self.alpha = base, rank, alpha
        device = base.weight.device
        self.A = nn.Parameter(torch.empty(rank, d_in, device=device))
        self.B = nn.Parameter(torch.zeros(d_out, rank, device=device))  # starts as the base alone
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))

    def forward(self, x):
        # Scaled where it is small, and x itself is not copied: under AMP all layers that read x
        # keep the same x for their gradients.
        y = self.base(x)
        low = F.linear(x, self.A) * (self.alpha / self.rank)
        return y + F.linear(low, self.B)


def add_lora(model, rank, alpha):
    """Freeze `model`; put LoRA on every linear layer of its blocks, not on embeddings and output
    head."""
    model.requires_grad_(False)
    for name, module in list(model.named_modules()):
        if is_linear(module) and module is not model.get_output_embeddings():
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, LoRA(module, rank, alpha))


def say_reach_of_lora(model, source):
    """Print the share of the blocks' weights that LoRA reaches where it is not nearly all: experts
    that are no linear layers of their own are left as they are."""
    outside = {id(model.get_input_embeddings().weight), id(model.get_output_embeddings().weight)}
    weights = {id(p): p.numel() for p in model.parameters() if p.dim() > 1 and not p.requires_grad}
    reached = sum(m.base.weight.numel() for m in model.modules() if isinstance(m, LoRA))
    share = reached / max(1, sum(n for key, n in weights.items() if key not in outside))
    if share < 0.9:
        print(f"student {source}: LoRA reaches {share:.0%} of its blocks' weights")


def is_linear(module):
    """A plain linear layer: subclasses, such as some routers of experts, compute something else."""
    return type(module) in (nn.Linear, Conv1D) or type(module).__name__ == "Linear4bit"


def save_student(student, folder):
    """Write a student that from_pretrained loads: a PEFT adapter that names its base, or the whole
    model; its tokenizer; and a model card."""
    student.tokenizer.save_pretrained(folder)
    modules = student.model.named_modules()
    layers = {name: module for name, module in modules if isinstance(module, LoRA)}
    if layers:
        save_adapter(layers, student, folder)
    else:
        student.model.save_pretrained(folder)
    (folder / "README.md").write_text(model_card(student, bool(layers)), encoding="utf-8")


def save_adapter(layers, student, folder):
    """adapter_config.json and adapter_model.safetensors, as PEFT writes them, with the fingerprint
    of the base, so that eval.py notices another one."""
    some = next(iter(layers.values()))
    # Of a 4-bit layer: what it is in the full base.
    kind = getattr(some.base, "source_cls", type(some.base))
    targets = sorted({name.rpartition(".")[2] for name in layers})
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM",
              "base_model_name_or_path": student.source, "r": some.rank,
              "lora_alpha": some.alpha, "target_modules": targets,
              "lora_dropout": 0.0, "bias": "none", "fan_in_fan_out": issubclass(kind, Conv1D),
              "inference_mode": True}
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=1))
    tensors = {}
    for name, layer in layers.items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = layer.A
        tensors[f"base_model.model.{name}.lora_B.weight"] = layer.B
    if student.model.config.get_text_config().model_type in REMAPPED_BY_PEFT:
        print(f"{folder}: PEFT renames parts of this family's adapters and would load others; "
              "load it with eval.py")
    metadata = {"format": "pt"} | ({"base": student.fingerprint} if student.fingerprint else {})
    save_file(tensors, folder / "adapter_model.safetensors", metadata)


def model_card(student, adapter):
    """The README.md of a student's folder, which `hf upload` shows as its page."""
    on_hub = student.source != "demo" and not os.path.isdir(student.source)
    base = f"base_model: {student.source}\n" if on_hub else ""
    library = "peft" if adapter else "transformers"
    return (f"---\nlibrary_name: {library}\npipeline_tag: text-generation\n{base}"
            "tags:\n- qr-distill\n---\n"
            "# A student of QR-Distill\n\n"
            f"Trained from `{os.path.basename(student.source)}` on a teacher's reasoning paths, "
            "by routing and collaboration (Lei et al., EMNLP 2025, arXiv 2508.16861).\n")


# ---------------------------------------- data
def load_data(args):
    """-> training rows (graded, filtered), test questions, and the training rows before the filter.

    The split is by question, none is on both sides. stop() if nothing is left to train on.
    """
    rows = graded_pool(args)
    # Before --styles, so that ablations share their test questions.
    ids = sorted({source_of(row) for row in rows})
    random.Random(args.seed).shuffle(ids)
    if args.eval_questions:
        test = tasks.read_questions(args.eval_questions)
    elif args.paths:
        test = held_out_questions(rows, ids, args)
    else:  # question sets of neighbouring seeds share no question
        test = judge.demo_questions(300, args.seed + 1)
    if args.styles:
        styles = sorted({row["style"] for row in rows})
        if unknown := sorted(set(args.styles) - set(styles)):
            stop(f"--styles {' '.join(unknown)}: not in the pool, whose styles are "
                 f"{', '.join(styles)}")
        rows = [row for row in rows if row["style"] in args.styles]

    rows = without_test_questions(rows, test, args)
    left = {source_of(row) for row in rows}
    ids = [i for i in ids if i in left]
    used = set(ids[:math.ceil(args.train_frac * len(ids))])
    rows = [row for row in rows if source_of(row) in used]
    if not rows:
        stop(f"{args.paths or 'the demo'}: no question is left to train on beside the {len(test)} "
             "test questions")
    kept = judge.filter_pool(rows, args.filter)
    if not kept:
        stop(f"no path is left to train on: of {len(rows)} training paths none passes --filter "
             f"{args.filter}; judge.py --paths shows why")
    if not args.students and any(row["task"] != "demo" for row in kept + test):
        stop("the demo's tiny students know no other task: pass --students with Hugging Face "
             "models for this pool")
    return kept, test, rows


def source_of(row):
    """The id of the question that a row goes with in the split: rows that a baseline made of
    another question carry that one's id."""
    return row.get("made_from", row["id"])


def graded_pool(args):
    """The rows of --paths, or of the demo; what nobody graded is graded here."""
    if args.paths:
        rows = judge.read_pool(args.paths)
    else:
        rows = judge.demo_paths(judge.demo_questions(300, args.seed), args.seed)
    raw = [row for row in rows if not {"prediction", "correct", "valid", "verdict"} <= row.keys()]
    judge.grade_paths(tqdm(raw, desc="grade paths", unit="path", leave=False, disable=not raw))
    for row in raw:
        row["valid"], verdict = judge.rule_judge(row) if row["task"] == "demo" else (None, None)
        row["verdict"] = verdict and {"rule": verdict}
    # A judge reads right answers only.
    unread = sum(row["valid"] is None and judge.fate(row) == "kept" for row in rows)
    if args.filter == "full" and unread:
        print(f"filter: no judge has read {unread} paths with a right answer, so those with wrong "
              "steps stay; judge.py --judge finds them")
    return rows


def held_out_questions(rows, ids, args):
    """Test questions from the pool itself: --test_frac of the shuffled ids."""
    held_out = set(ids[:max(1, round(args.test_frac * len(ids)))])
    # Not `prompt`: the test has the plain one.
    fields = ("id", "task", "question", "choices", "answer", "level")
    test = {}
    for row in rows:
        # Ids are those of source_of: what a baseline made of another question is not among them.
        if row["id"] in held_out:
            test[row["id"]] = {field: row[field] for field in fields if field in row}
    if not test:
        stop(f"{args.paths}: no test question; pass --eval_questions, or a larger --test_frac")
    return list(test.values())


def without_test_questions(rows, test, args):
    """The rows whose question is not in the test set, by text or by id."""
    def text(row):
        return " ".join(row["question"].lower().split())

    answers = {row["id"]: row["answer"] for row in test}
    texts = {text(row) for row in test}
    leaked = set()
    for row in rows:
        same_id = source_of(row) in answers
        if args.eval_questions and "made_from" not in row:  # ids of two files: chance, or a typo
            same_id = same_id and row["answer"] == answers[row["id"]]
        if same_id or text(row) in texts:
            leaked.add(source_of(row))
    if leaked and args.eval_questions:
        print(f"left out {len(leaked)} questions of the pool that stand in {args.eval_questions}")
    return [row for row in rows if source_of(row) not in leaked]


def encode(rows, students):
    """Tokenise the pool once -> rows with `text` and, for each student, `prompts`, `responses` and
    `segments`. Paths that do not fit into a student's context are left out.

    Prompt and response are tokenised apart and joined, so that generation starts from the very
    tokens trained on (open point 11). The response ends with the student's end token, which is
    trained (open point 10). """
    encoded = []
    known = [{} for _ in students]  # a student's prompts, which many paths share
    for start in tqdm(range(0, len(rows), 256), desc="tokenise", leave=False):
        part = [{**row, "text": row["path"].strip(), "prompts": [], "responses": []}
                for row in rows[start:start + 256]]
        spans = [encode_for(student, part, prompts) for student, prompts in zip(students, known)]
        for row, offsets in zip(part, zip(*spans)):
            lengths = [len(p) + len(r) for p, r in zip(row["prompts"], row["responses"])]
            fits = all(n <= student.max_len for n, student in zip(lengths, students))
            if all(offsets) and fits:  # an empty path has nothing to train on
                row["segments"], row["n_segments"] = qr.shared_segments(offsets)
                encoded.append(row)
    if len(encoded) < len(rows):
        print(f"left out {len(rows) - len(encoded)} of {len(rows)} paths: empty, or longer, "
              "with their prompt, than --max_len or a student's context")
    if not encoded:
        stop("no path and its prompt fit into --max_len tokens and the students' contexts: raise "
             "--max_len")
    return encoded


def encode_for(student, rows, known):
    """Add one student's tokens to `prompts` and `responses` of the rows -> for each row the
    characters (start, end) of its text tokens. known: {prompt: token ids}."""
    # split_special_tokens: what looks like a special token in a path is text
    tokens = student.tokenizer([row["text"] for row in rows], return_offsets_mapping=True,
                               return_attention_mask=False, return_token_type_ids=False,
                               add_special_tokens=False, split_special_tokens=True)
    for row, ids in zip(rows, tokens["input_ids"]):
        prompt = tasks.student_prompt(row)
        if prompt not in known:
            known[prompt] = np.array(tasks.encode_prompt(student.tokenizer, prompt), np.int32)
        row["prompts"].append(known[prompt])
        row["responses"].append(np.array([*ids, student.end], np.int32))
    return tokens["offset_mapping"]


def paths_by_question(rows):
    """For each question, in the pool's order, the numbers of its rows."""
    numbers = defaultdict(list)
    for number, row in enumerate(rows):
        numbers[row["id"]].append(number)
    return list(numbers.values())


def response_lengths(rows):
    """The response tokens (P, S) of every path, for each student."""
    return torch.tensor([[len(tokens) for tokens in row["responses"]] for row in rows])


# ---------------------------------------- Eq 1 for the whole pool
def embed(rows, students, lengths, args, device):
    """What the router sees of every path, (all paths, d) on the CPU: the embedding of question and
    path. departs (Eq 1): it is standardised and scaled; appended are the path's style and each
    student's loss on it before training, nats per token. lengths (all paths, S): response tokens.
    """
    if args.route != "learned":
        return torch.zeros(len(rows), 1)
    pairs = [(row["question"], row["text"]) for row in rows]
    if args.encoder == "hash":
        texts = [f"{question}\n{path}" for question, path in pairs]
        h = qr.hash_embed(tqdm(texts, desc="embed paths", leave=False))
    else:
        h = encode_pairs(pairs, args.encoder, device)
    h = unit_variance(h)
    if not args.router_hidden:
        # A step of Adam moves every weight alike, and so a linear router's logit by the sum of a
        # path's features: the d of the embedding shall not outweigh style and score.
        h = h / h.shape[1]
    if args.style_input:
        styles = sorted({row["style"] for row in rows})
        number = torch.tensor([styles.index(row["style"]) for row in rows])
        one_hot = F.one_hot(number, len(styles)).float()
        h = torch.cat([h, one_hot * len(styles) ** 0.5], 1)
    if args.score_input:  # no text encoder knows what a student finds likely
        score = path_losses(rows, students) / lengths  # (all paths, S), nats per token
        h = torch.cat([h, unit_variance(score) * SCORE_SCALE], 1)
    return h


def unit_variance(h):
    """Each feature of h (all paths, d) to mean 0 and variance 1; one that is the same on all paths
    becomes 0."""
    return (h - h.mean(0)) / h.std(0, correction=0).clamp(min=1e-3)


def encode_pairs(pairs, encoder, device):
    """Eq 1 for pairs (question, path) -> (P, d)."""
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(encoder, trust_remote_code=False)
        model, report = transformers.AutoModel.from_pretrained(
            encoder, dtype=torch.float32, use_safetensors=True, trust_remote_code=False,
            output_loading_info=True)
        model = model.to(device).eval()
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
        qr.encoder_embed(model, tokenizer, [("question", "path")])  # a T5 wants more input
    except Exception as e:  # noqa: BLE001 (what the libraries raise at a folder of something else)
        stop(f"--encoder {encoder}: not an encoder that transformers can load "
             f"({tasks.in_a_line(e)})")
    if missing := sorted(key for key in report["missing_keys"] if "pooler" not in key):
        stop(f"--encoder {encoder}: its file of weights lacks {missing[0]}; it is damaged")
    # RoBERTa has 514 positions for 512 tokens.
    positions = getattr(model.config, "max_position_embeddings", 514) - 2
    limit = min(512, tokenizer.model_max_length, positions)
    # Pairs of like length together: less padding.
    order = sorted(range(len(pairs)), key=lambda i: sum(map(len, pairs[i])))
    h = torch.empty(len(pairs), model.config.hidden_size)
    for start in tqdm(range(0, len(order), 32), desc="embed paths", leave=False):
        part = order[start:start + 32]
        h[part] = qr.encoder_embed(model, tokenizer, [pairs[i] for i in part], limit)
    if not h.isfinite().all():
        stop(f"--encoder {encoder}: its embeddings are not finite; its weights are damaged")
    return h


# ---------------------------------------- the run folder: checkpoint, log, results
@dataclass
class State:
    """Everything that the rest of a run depends on, beside its flags and its data."""
    students: list
    router: nn.Module
    collab: nn.Module
    optimizer: torch.optim.Optimizer
    router_optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    gate_rng: torch.Generator

    def weights(self):
        """{name: tensor}: the weights that train, and the collaboration's frozen projections."""
        modules = {"router": self.router, "collab": self.collab}
        for i, student in enumerate(self.students):
            modules[f"student_{i}"] = student.model
        named = nn.ModuleDict(modules).named_parameters()
        return {name: p.data for name, p in named
                if p.requires_grad or name.startswith("collab.")}

    def optimizers(self):
        return {"optimizer": self.optimizer, "router_optimizer": self.router_optimizer}

    def tensors(self):
        """{name: tensor}: weights, optimiser moments, random states."""
        tensors = self.weights()
        for name, optimizer in self.optimizers().items():
            for i, moments in optimizer.state_dict()["state"].items():
                for moment, tensor in moments.items():
                    tensors[f"{name}.{i}.{moment}"] = tensor
        tensors["rng.gates"] = self.gate_rng.get_state()
        tensors["rng.cpu"] = torch.get_rng_state()
        if torch.cuda.is_available():
            tensors["rng.cuda"] = torch.cuda.get_rng_state()
        return tensors

    def load(self, saved):
        """Put the tensors of a checkpoint back in place; KeyError or RuntimeError if they are
        another run's."""
        for name, optimizer in self.optimizers().items():
            whole = optimizer.state_dict()  # without moments yet
            for key, tensor in saved.items():
                if key.startswith(f"{name}."):
                    _, i, moment = key.split(".")
                    whole["state"].setdefault(int(i), {})[moment] = tensor
            optimizer.load_state_dict(whole)
        for name, tensor in self.weights().items():
            tensor.copy_(saved[name])
        self.gate_rng.set_state(saved["rng.gates"])
        torch.set_rng_state(saved["rng.cpu"])
        if "rng.cuda" in saved and torch.cuda.is_available():
            torch.cuda.set_rng_state(saved["rng.cuda"])


# By bytes per number: a weight's bits read as whole numbers, whose sum is exact in any order.
INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def digest_of(rows, test, students):
    """A hash of what training hangs on beside the flags: token ids, styles, test set, the students'
    weights at the start. Not of the embeddings, whose last bits hang on the machine."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps([row["id"], row["style"], row["question"], row["text"]]).encode())
        for tokens in (*row["prompts"], *row["responses"]):
            digest.update(tokens.tobytes() + b";")
    digest.update(json.dumps(test).encode())
    for student in students:
        for name, p in student.model.state_dict().items():
            bits = p.contiguous().view(INTEGERS[p.element_size()])
            total = int(bits.sum(dtype=torch.int64))
            digest.update(f"{name} {tuple(p.shape)} {total}".encode())
    return digest.hexdigest()


def lock_run_folder(out):
    """Keep a second run out of the folder; the system frees the lock, even after kill -9."""
    out.mkdir(parents=True, exist_ok=True)
    try:
        lock = FileLock(out / ".lock", is_singleton=True)
        lock.acquire(timeout=0)
    except Timeout:
        stop(f"--out_dir {out}: another run is writing there; wait for it, or choose another "
             "folder")
    except OSError as e:  # a network file system may know no locks
        stop(f"--out_dir {out}: can't be locked ({e.strerror}); choose a folder on another disk")
    return lock


def write_flags(out, args):
    """args.json."""
    flags = {name: value for name, value in vars(args).items() if name != "resume"}
    write_atomic(json.dumps(flags, indent=1), out / "args.json")


def start_run_folder(out, args, test):
    """args.json, test.jsonl and an empty log."""
    write_flags(out, args)
    write_atomic("".join(json.dumps(row) + "\n" for row in test), out / "test.jsonl")
    write_atomic("", out / "log.jsonl")


def save_checkpoint(out, state, run):
    """checkpoint.safetensors: a kill leaves the old one or the new one, never half of one."""
    tensors = {name: x.contiguous() for name, x in state.tensors().items()}
    meta = json.dumps(run | {"scaler": state.scaler.state_dict()})
    part = out / "checkpoint.safetensors.part"
    with writing(out):
        save_file(tensors, part, metadata={"run": meta})
        with open(part, "rb") as f:
            os.fsync(f.fileno())
        os.replace(part, out / "checkpoint.safetensors")


def resume(out, state, digest):
    """Go on from the checkpoint -> its run's step, tokens, seconds, first test; None if none was
    written yet."""
    file, log = out / "checkpoint.safetensors", out / "log.jsonl"
    if not file.is_file():
        return None
    try:
        with safe_open(file, "pt") as f:
            run = json.loads(f.metadata()["run"])
            saved = {key: f.get_tensor(key) for key in f.keys()}  # noqa: SIM118
        done = log.read_text(encoding="utf-8").splitlines(keepends=True)[:run["step"]]
        if run["digest"] != digest:
            stop(f"--resume {out}: pool, test questions, prompts, tokenizers or students have "
                 "changed since that run; start a new one")
        if [json.loads(line)["step"] for line in done] != list(range(1, run["step"] + 1)):
            stop(f"--resume {out}: log.jsonl is not whole up to the checkpoint's step "
                 f"{run['step']}; start a new run")
        state.load(saved)
        if scaler := run.pop("scaler"):
            state.scaler.load_state_dict(scaler)
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, RuntimeError) as e:
        stop(f"--resume {out}: its checkpoint or log is damaged or another run's "
             f"({tasks.in_a_line(e)}); start a new run")
    write_atomic("".join(done), log)  # what came after is done again
    return run


def how_to_go_on(out):
    """What to do after the run in a folder has ended early, as the end of a sentence."""
    if not (out / "checkpoint.safetensors").exists():
        return "start again"
    return f"go on with: python distill.py --resume {shlex.quote(str(out))}"


def write_atomic(text, file):
    """Write a text file such that a kill leaves the old one or the new one."""
    with writing(file.parent):
        Path(f"{file}.part").write_text(text, encoding="utf-8")
        os.replace(f"{file}.part", file)


@contextlib.contextmanager
def writing(out):
    """stop() at what can't be written to the run folder, such as on a full disk."""
    try:
        yield
    except (OSError, SafetensorError) as e:
        stop(f"{out} can't be written ({tasks.in_a_line(e)}): make room, then {how_to_go_on(out)}")


def start_wandb(out, run, args):
    """A run of Weights & Biases, None without --wandb; a resumed run goes on with its page."""
    if not args.wandb:
        return None
    import wandb  # installed: check_flags has looked

    try:
        return wandb.init(project=args.wandb, name=out.name, config=vars(args), dir=str(out),
                          resume="allow", id=run.get("wandb"))
    except wandb.Error as e:
        stop(f"--wandb {args.wandb} ({tasks.in_a_line(e)}): run `wandb login`, or set "
             f"WANDB_MODE=offline, then {how_to_go_on(out)}")


def log_step(line, out, bar, board):
    """A step's line goes to log.jsonl, the progress bar and Weights & Biases."""
    with writing(out), open(out / "log.jsonl", "a", encoding="utf-8") as f:
        f.write(json.dumps(line) + "\n")
    loss = " ".join(f"{x:.3f}" for x in line["loss"])
    rate = " ".join(f"{x:.2f}" for x in line["rate"])
    bar.set_postfix_str(f"loss {loss}, rate {rate}")
    if "accuracy" in line:
        accuracy = " / ".join(f"{100 * x:.1f}" for x in line["accuracy"])
        bar.write(f"step {line['step']}: {accuracy} % right")
    if board:
        board.log(flat(line), step=line["step"])


def flat(value, name=""):
    """{"loss/0": ...} of nested lists and dicts: Weights & Biases draws numbers only."""
    if not isinstance(value, (dict, list)):
        return {name: value}
    parts = {}
    for key, part in value.items() if isinstance(value, dict) else enumerate(value):
        parts |= flat(part, f"{name}/{key}" if name else str(key))
    return parts


def note_ctrl_c():
    """-> a list that the first Ctrl-C puts something into, so that the step is finished and a
    checkpoint written; a second one ends the run at once."""
    pressed = []

    def note(number, frame):
        pressed.append(number)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    signal.signal(signal.SIGINT, note)
    return pressed


def step_numbers(paths, per_token, routed):
    """Of one step, for each student: loss (nats per response token), share of the paths that it
    got, and the same share of each style's.

    paths: P rows; per_token (P, S): nats, 0 where a path was not run; routed (P, S). """
    loss = per_token.sum(0) / routed.sum(0).clamp(min=1)
    rate_style = {}
    for style in sorted({row["style"] for row in paths}):
        of_style = torch.tensor([row["style"] == style for row in paths])  # (P,)
        rate_style[style] = routed[of_style].float().mean(0).tolist()
    return {"loss": loss.tolist(), "rate": routed.float().mean(0).tolist(),
            "rate_style": rate_style}


# ---------------------------------------- the test and the table
def answer(students, test, args):
    """Greedy answers of all students to the test questions -> {"summary": shares, "predictions":
    every answer}."""
    pairs = [(student.model, student.tokenizer) for student in students]
    with autocast(students[0]):
        summary = tasks.evaluate(pairs, test, args.eval_max_new_tokens, seed=args.seed)
    predictions = summary.pop("predictions")
    return {"summary": summary, "predictions": predictions}


def write_results(out, args, run, after, students, per_epoch, pool, rows, questions):
    """The table on the screen, predictions.jsonl and results.json."""
    log = tasks.read_jsonl(out / "log.jsonl")
    last = log[-per_epoch:]  # the selection rates are of the last epoch
    rates = {}
    for style in sorted({row["style"] for row in rows}):
        of_steps = [line["rate_style"][style] for line in last if style in line["rate_style"]]
        if of_steps:
            rates[style] = np.mean(of_steps, 0).tolist()
    results = {
        "students": [student.source for student in students],
        "before": run["before"], "after": after["summary"],
        "selection_rate": rates, "selection_steps": [last[0]["step"], last[-1]["step"]],
        "tokens_trained": run["tokens"], "seconds": round(run["seconds"], 1),
        "counts": {"steps": len(log), "training_questions": len(questions),
                   "training_paths": len(rows),
                   "filter": dict(Counter(judge.fate(row, args.filter) for row in pool))},
        "versions": {"python": platform.python_version(), "torch": torch.__version__,
                     "transformers": transformers.__version__, "commit": commit(),
                     "device": device_name(students[0].model.device)}}
    print_samples(after["predictions"])
    print_results(results, out, args)  # first: nothing that was computed is lost on a full disk
    lines = [json.dumps(line) + "\n" for line in after["predictions"]]
    write_atomic("".join(lines), out / "predictions.jsonl")
    write_atomic(json.dumps(results, indent=1), out / "results.json")


def device_name(device):
    """A GPU's name, or the kind of device, such as cpu."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def commit():
    """The commit of this code, "unknown" outside of a checkout."""
    folder = Path(__file__).resolve().parent
    command = ["git", "-C", folder, "rev-parse", "HEAD"]
    try:
        return subprocess.check_output(command, stderr=subprocess.DEVNULL, text=True).strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def print_samples(predictions):
    """The first three questions with what each student says."""
    for line in predictions[:3]:
        print(f"\n{line['question']}")
        for s, answers in enumerate(line["responses"]):
            verdict = "right" if answers[0]["correct"] else f"wrong, it is {line['answer']}"
            text = "\n    ".join(answers[0]["text"].strip().splitlines())
            print(f"  student {s} ({verdict}): {text}")


def print_results(results, out, args):
    """The run's table: accuracy before and after, who got what, and where everything is."""
    before, after, counts = results["before"], results["after"], results["counts"]
    names = results["students"]
    title = f"% right of {after['questions']} test questions"
    print(f"\n{title:40}{'before':>9}{'after':>9}{'unparsed':>10}{'stopped':>9}")
    for i, name in enumerate(names):
        label = f"student {i} ({os.path.basename(name)})"
        print(f"{label:40}{100 * before['accuracy'][i]:9.1f}{100 * after['accuracy'][i]:9.1f}"
              f"{100 * after['unparsed'][i]:10.1f}{100 * after['stopped'][i]:9.1f}")
    labels = {"ensemble": "ensemble of the students",
              "upper_bound": "upper bound: any student right"}
    for key, label in labels.items():
        print(f"{label:40}{100 * before[key]:9.1f}{100 * after[key]:9.1f}")
    first, last = results["selection_steps"]
    title = f"selection rate in steps {first} to {last}"
    print(f"\n{title:40}" + "".join(f"{f'student {i}':>11}" for i in range(len(names))))
    for style, rates in results["selection_rate"].items():
        print(f"{style:40}" + "".join(f"{rate:11.2f}" for rate in rates))
    tokens = ", ".join(f"{n:,}" for n in results["tokens_trained"])
    print(f"\n{counts['steps']} steps in {results['seconds']:.0f} s on "
          f"{counts['training_questions']} questions with {counts['training_paths']} paths; "
          f"response tokens trained: {tokens}")
    folders = shlex.join(str(out / f"student_{i}") for i in range(len(names)))
    questions = shlex.quote(str(out / "test.jsonl"))
    limit = f" --limit {args.eval_limit}" if args.eval_limit else ""
    print(f"{out}/ has results.json, log.jsonl, predictions.jsonl and the students; test them "
          f"again with\npython eval.py --students {folders} --questions {questions} "
          f"--max_new_tokens {args.eval_max_new_tokens}{limit}")


# ---------------------------------------- the demo's students
def demo_students(seed):
    """The two students of make_demo_students, (model, tokenizer) each, from the user's cache after
    the first time."""
    parts = (make_demo_students, demo_tokenizer, warm_start, judge.demo_sentences, judge.demo_paths)
    recipe = "".join(map(inspect.getsource, parts)) + torch.__version__
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "qr-distill"
    folder = cache / f"demo-{seed}-{hashlib.sha256(recipe.encode()).hexdigest()[:16]}"
    try:
        return [load_demo_student(folder / str(number)) for number in range(2)]
    except (OSError, ValueError, SafetensorError, RuntimeError):  # none yet, or a damaged one
        students = make_demo_students(seed)
    # Where nothing can be written, nothing is kept; a kill leaves no half of it.
    with contextlib.suppress(OSError, SafetensorError):
        cache.mkdir(parents=True, exist_ok=True)
        part = Path(tempfile.mkdtemp(dir=cache))
        for number, (model, tokenizer) in enumerate(students):
            model.save_pretrained(part / str(number))
            tokenizer.save_pretrained(part / str(number))
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(part, folder)
    return students


def load_demo_student(folder):
    """(model, tokenizer) of a folder; an error unless it holds all weights and tokens."""
    model, report = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, trust_remote_code=False, local_files_only=True,
        output_loading_info=True)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    is_whole = not report["missing_keys"] and len(tokenizer) == model.config.vocab_size
    if not is_whole or not all(p.isfinite().all() for p in model.parameters()):
        raise ValueError(f"{folder} is damaged")
    return model, tokenizer


def make_demo_students(seed):
    """Two tiny students, "pretrained" on plain arithmetic sentences: a Llama with whole words and a
    GPT-NeoX with BPE pieces, 0.4M parameters each, numbers being one token in both. From scratch
    nothing is learned in minutes; after this warm start, training them means distilling."""
    torch.manual_seed(seed)
    sentences, questions = judge.demo_sentences(8000, seed), judge.demo_questions(200, seed)
    corpus = sentences + [f" {n}" for n in range(200)]
    corpus += [tasks.student_prompt(question) for question in questions]
    corpus += [row["path"] for row in judge.demo_paths(questions, seed)]
    shape = {"hidden_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4,
             "max_position_embeddings": 512, "initializer_range": 0.05, "tie_word_embeddings": True,
             "pad_token_id": 1, "bos_token_id": None, "eos_token_id": 2}
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
    for step in tqdm(range(400), desc=label, unit="step", leave=False):
        batch = [ids[i] for i in torch.randint(len(ids), (32,)).tolist()]
        x = nn.utils.rnn.pad_sequence(batch, batch_first=True, padding_value=-100)
        optimizer.param_groups[0]["lr"] = 4e-3 * lr_scale(step, 400)
        model(input_ids=x.clamp(min=0), labels=x).loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()


def command():
    """main() as a command: Ctrl-C and a full memory say how to go on."""
    out = Path(FLAGS.out_dir)
    try:
        main(FLAGS)
    except KeyboardInterrupt:
        print(f"\nstopped; {how_to_go_on(out)}", file=sys.stderr)
        raise
    except torch.OutOfMemoryError:
        stop("out of memory: with --micro_batch_size 1 and --checkpointing a step needs less; "
             f"{how_to_go_on(out)}")


if __name__ == "__main__":
    tasks.run_command(command)
