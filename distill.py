"""QR-Distill, the training run: students trained together on the paths that a router gives them.

    python distill.py                                            # the embedded demo: laptop CPU, offline, minutes
    python distill.py --paths POOL.jsonl --students A B          # real paths, real students

Read it from the bottom: main() is the run, top to bottom, with the paper's equation numbers beside their lines
(router.py holds the equations, judge.py the path pool, eval.py the tasks). "departs" marks where we leave the paper.
"""
import argparse
import contextlib
import hashlib
import json
import math
import os
import random
import sys
import time
from collections import Counter, defaultdict
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from tqdm import tqdm
from transformers import (AutoModel, AutoTokenizer, GPTNeoXConfig, GPTNeoXForCausalLM, LlamaConfig, LlamaForCausalLM,
                          PreTrainedTokenizerFast)
from transformers.pytorch_utils import Conv1D

import eval as tasks
import judge
import router as qr
from eval import stop


# ---------------------------------------------------------------- flags
def parse_args(argv=None):
    """Flags of the run; with --resume the saved ones, and a flag that contradicts them is refused."""
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    g = p.add_argument_group("run")
    g.add_argument("--out_dir", help="run folder (default: out/ and the time)")
    g.add_argument("--resume", metavar="DIR", help="go on with the run in DIR, with its own flags")
    g.add_argument("--seed", type=int, default=0, help="seeds everything: weights, gates, data order, split")
    g.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    g.add_argument("--dtype", default="auto", choices=["auto", "float32", "bf16", "fp16"], help="AMP type; auto: bf16 on cuda, else float32")
    g.add_argument("--compile", action="store_true", help="torch.compile the students' blocks")
    g.add_argument("--save_every", type=int, default=100, help="steps between checkpoints")
    g = p.add_argument_group("data")
    g.add_argument("--paths", help="path pool (JSONL, from judge.py or unannotated); default: the embedded demo")
    g.add_argument("--filter", default="full", choices=["full", "answer", "none"], help="quality filter: answer check and judge, answer check only, none")
    g.add_argument("--styles", nargs="+", help="train on these reasoning styles only")
    g.add_argument("--train_frac", type=float, default=1.0, help="share of the training questions to use")
    g.add_argument("--test_frac", type=float, default=0.2, help="share of the pool's questions held out, if no --eval_questions")
    g.add_argument("--max_len", type=int, default=1024, help="longest prompt + path in tokens; longer paths are left out")
    g = p.add_argument_group("students")
    g.add_argument("--students", nargs="+", help="Hugging Face causal LMs, names or folders; default: two tiny demo students")
    g.add_argument("--freeze", nargs="+", type=int, default=[], metavar="I", help="students (0, 1, ...) that teach but do not learn")
    g.add_argument("--lora_rank", type=int, help="rank of LoRA on all linear layers of the blocks, 0: train everything (default: 32; demo students: 0)")
    g.add_argument("--lora_alpha", type=float, default=64, help="LoRA scale: alpha / rank")
    g.add_argument("--lr", nargs="+", type=float, help="learning rate, one for all or one per student (default: 2e-4; demo students: 2e-3)")
    g = p.add_argument_group("routing")
    g.add_argument("--route", default="learned", choices=["learned", "all", "random"], help="who gets which path: the router, everybody everything, chance")
    g.add_argument("--route_rate", type=float, default=0.5, help="selection rate of --route random")
    g.add_argument("--encoder", default="hash", help="path encoder (Eq 1): 'hash' or a Hugging Face model such as roberta-base")
    g.add_argument("--router_hidden", type=int, default=0, help="width of the router's MLP (Eq 2), 0: linear")
    g.add_argument("--router_lr", type=float, default=1e-3, help="learning rate of router and collaboration")
    g.add_argument("--gate", default="binary", choices=["binary", "onehot"], help="one gate per student, or the one-hot form whose Eq 4 has no gradient")
    g.add_argument("--tau", type=float, default=1.0, help="Gumbel temperature")
    g.add_argument("--entropy_weight", type=float, default=0.01, help="l1 of Eq 9")
    g.add_argument("--entropy", default="student", choices=["student", "literal"], help="Eq 3 for each student, or as printed")
    g.add_argument("--normalize", default="question", choices=["question", "batch"], help="what L_distill averages over first")
    g = p.add_argument_group("collaboration")
    g.add_argument("--mutual_weight", type=float, default=0.1, help="l2 of Eq 9, 0: no collaboration")
    g.add_argument("--shared_dim", type=int, default=64, help="d of Eq 5")
    g.add_argument("--projection", default="random", choices=["random", "trained"], help="Eq 5: frozen random, or trained (loses rank)")
    g.add_argument("--standardize", action=argparse.BooleanOptionalAction, default=True, help="standardise the projected states (without it trained ones vanish)")
    g.add_argument("--competence", default="target", choices=["target", "eq8"], help="what teaches Eq 6: the students' losses, or Eq 8 as printed")
    g = p.add_argument_group("optimisation")
    g.add_argument("--batch_size", type=int, default=8, help="questions per optimiser step, with all their paths")
    g.add_argument("--micro_batch_size", type=int, help="questions per backward pass (default: all of the step); changes memory, not the result")
    g.add_argument("--forward_tokens", type=int, default=4096, help="padded tokens per forward pass; rows are sorted by length first")
    g.add_argument("--epochs", type=int, help="passes over the training questions (default: 3; demo: 8)")
    g.add_argument("--max_steps", type=int, help="stop after this many steps (the schedule ends there)")
    g.add_argument("--warmup", type=float, default=0.05, help="share of the steps with a rising learning rate, then cosine to a tenth")
    g.add_argument("--weight_decay", type=float, default=0.01, help="AdamW")
    g.add_argument("--clip", type=float, default=1.0, help="largest gradient norm, per student and for the router")
    g = p.add_argument_group("evaluation")
    g.add_argument("--eval_questions", help="test questions (any format eval.py reads); default: held out from the pool")
    g.add_argument("--eval_limit", type=int, default=0, help="use the first N test questions only, 0: all")
    g.add_argument("--eval_max_new_tokens", type=int, help="longest answer (default: 512; demo: 96)")
    g.add_argument("--eval_batch_size", type=int, default=32, help="questions per generation batch")
    g.add_argument("--samples", type=int, default=1, help="answers per student and question, above 1: sampled, majority vote")
    args = p.parse_args(argv)

    if args.resume:  # the saved flags win; one given now must agree, else the result would be neither run's
        file = Path(args.resume) / "args.json"
        if not file.is_file():
            stop(f"--resume {args.resume}: no args.json there, so it is not a run folder; pass the --out_dir of an earlier run")
        saved = json.loads(file.read_text())
        for action in p._actions:
            action.default = argparse.SUPPRESS
        for name, value in vars(p.parse_args(argv)).items():
            if name not in ("resume", "out_dir") and saved.get(name) != value:
                stop(f"--resume {args.resume}: that run has --{name} {saved.get(name)}, not {value}; leave the flag out or start a new run")
        args = argparse.Namespace(**{**saved, "resume": args.resume, "out_dir": args.resume})
    check_args(args)
    return args


def check_args(args):
    """Refuse values outside their range with one sentence."""
    ranges = {"train_frac": (0, 1), "test_frac": (0, 1), "route_rate": (0, 1), "warmup": (0, 1), "tau": (1e-3, 100), "clip": (1e-9, math.inf),
              "entropy_weight": (0, math.inf), "mutual_weight": (0, math.inf), "weight_decay": (0, math.inf), "router_lr": (0, math.inf),
              "batch_size": (1, math.inf), "micro_batch_size": (1, math.inf), "forward_tokens": (1, math.inf), "epochs": (1, math.inf),
              "max_steps": (1, math.inf), "max_len": (8, math.inf), "save_every": (1, math.inf), "shared_dim": (1, math.inf),
              "lora_rank": (0, math.inf), "lora_alpha": (1e-9, math.inf), "router_hidden": (0, math.inf), "eval_limit": (0, math.inf),
              "eval_max_new_tokens": (1, math.inf), "eval_batch_size": (1, math.inf), "samples": (1, math.inf), "seed": (0, 2**32 - 1)}
    for name, (low, high) in ranges.items():
        value = getattr(args, name)
        if value is not None and not low <= value <= high:
            stop(f"--{name} {value}: must be between {low:g} and {high:g}")
    if args.train_frac == 0:
        stop("--train_frac 0: no question would be left to train on; pass a share above 0")
    count = len(args.students) if args.students else 2
    if any(not 0 <= i < count for i in args.freeze):
        stop(f"--freeze {' '.join(map(str, args.freeze))}: students are numbered 0 to {count - 1}")
    if args.lr and len(args.lr) not in (1, count):
        stop(f"--lr has {len(args.lr)} values for {count} students: pass one, or one per student")
    if args.lr and min(args.lr) <= 0:
        stop("--lr must be above 0 (use --freeze I for a student that does not learn)")


# ---------------------------------------------------------------- LoRA (Hu et al., 2021), in PEFT's format on disk
class LoRA(nn.Module):
    """base(x) + (alpha / rank) B A x, with A (rank, d_in) and B (d_out, rank) in float32 over a frozen base layer."""

    def __init__(self, base, rank, alpha):
        super().__init__()
        d_in, d_out = base.weight.shape if isinstance(base, Conv1D) else base.weight.shape[::-1]  # GPT-2 stores (in, out)
        self.base, self.scale = base, alpha / rank
        self.A = nn.Parameter(torch.empty(rank, d_in, device=base.weight.device))
        self.B = nn.Parameter(torch.zeros(d_out, rank, device=base.weight.device))  # so the student starts as it was
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))

    def forward(self, x):
        return self.base(x) + F.linear(F.linear(x.to(self.A.dtype), self.A), self.B) * self.scale


def add_lora(model, rank, alpha):
    """Freeze `model` and put LoRA on every linear layer of its blocks (not on embeddings or the output head)."""
    model.requires_grad_(False)
    head = model.get_output_embeddings()
    for name, module in list(model.named_modules()):
        if isinstance(module, (nn.Linear, Conv1D)) and module is not head:
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, LoRA(module, rank, alpha))


def save_student(student, folder):
    """Write a student that from_pretrained loads: a PEFT adapter with its base's name, or the whole model."""
    folder = Path(folder)
    layers = {name: m for name, m in student.model.named_modules() if isinstance(m, LoRA)}
    if layers:
        folder.mkdir(parents=True, exist_ok=True)
        state = {f"base_model.model.{name}.lora_{x}.weight": getattr(m, x).detach().cpu().contiguous() for name, m in layers.items() for x in "AB"}
        save_file(state, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        some = next(iter(layers.values()))
        config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": student.source, "r": some.A.shape[0],
                  "lora_alpha": some.scale * some.A.shape[0], "target_modules": sorted({name.rpartition(".")[2] for name in layers}),
                  "lora_dropout": 0.0, "bias": "none", "fan_in_fan_out": isinstance(some.base, Conv1D), "inference_mode": True}
        (folder / "adapter_config.json").write_text(json.dumps(config, indent=1))
    else:
        student.model.save_pretrained(folder)
    student.tokenizer.save_pretrained(folder)


# ---------------------------------------------------------------- next-token loss on response positions, in chunks
class ChunkedNLL(torch.autograd.Function):
    """-log p(target) of each position, without ever holding all logits: a 262k-token vocabulary would need gigabytes.

    h (N, D), weight (V, D), bias (V) or None, target (N,) -> (N,) float32. With the head frozen, d nll / d h is
    computed in the forward pass while the chunk's logits exist, so that the logits are never computed twice.
    """

    @staticmethod
    def forward(ctx, h, weight, bias, target, softcap):
        nll = h.new_empty(len(h), dtype=torch.float32)
        dh = torch.empty_like(h) if ctx.needs_input_grad[0] else None
        for a, b, _, p in ChunkedNLL.chunks(h, weight, bias, target, softcap, nll):
            if dh is not None:
                dh[a:b] = p.to(weight.dtype) @ weight
        ctx.save_for_backward(h, weight, bias, target, dh)
        ctx.softcap = softcap
        return nll

    @staticmethod
    def chunks(h, weight, bias, target, softcap, nll):
        """For each chunk fill nll and yield (start, end, rows, d nll / d logits before the softcap)."""
        size = max(16, 2**25 // len(weight))  # about 128 MiB of float32 logits
        for a in range(0, len(h), size):
            b = min(a + size, len(h))
            rows = torch.arange(b - a, device=h.device)
            logits = F.linear(h[a:b].to(weight.dtype), weight, bias).float()
            slope = None
            if softcap:
                logits = torch.tanh(logits / softcap)
                slope, logits = 1 - logits.square(), logits * softcap
            lse = torch.logsumexp(logits, -1, keepdim=True)
            nll[a:b] = (lse - logits.gather(1, target[a:b, None])).squeeze(1)
            p = logits.sub_(lse).exp_()
            p[rows, target[a:b]] -= 1
            yield a, b, rows, p if slope is None else p * slope

    @staticmethod
    def backward(ctx, g):
        h, weight, bias, target, dh = ctx.saved_tensors
        dw = db = None
        if ctx.needs_input_grad[1]:  # a trained head needs each position's weight g, known only now: logits again
            dw, db = torch.zeros_like(weight), None if bias is None else torch.zeros_like(bias)
            for a, b, _, p in ChunkedNLL.chunks(h, weight, bias, target, ctx.softcap, torch.empty_like(g)):
                p = (p * g[a:b, None]).to(weight.dtype)
                dw.addmm_(p.T, h[a:b].to(weight.dtype))
                if db is not None:
                    db += p.sum(0)
        return None if dh is None else dh * g[:, None].to(dh.dtype), dw, db, None, None


def response_nll(student, h, target):
    """Eq 9's next-token loss (N,) in nats from the states h (N, D) that predict the tokens target (N,)."""
    head = student.model.get_output_embeddings()
    return ChunkedNLL.apply(h, head.weight, head.bias, target, getattr(student.model.config.get_text_config(), "final_logit_softcapping", None))


# ---------------------------------------------------------------- students
def load_students(args, device):
    """The students in memory as a list of namespaces (model, tokenizer, source, end, lr, frozen); every one trainable
    where it should be. stop() if one cannot be a student."""
    loaded = []
    for name in args.students or []:
        if os.path.isfile(os.path.join(name, "adapter_config.json")):
            stop(f"--students {name}: this is a saved adapter; pass its base model, or merge it first")
        frozen_base = torch.bfloat16 if device.type == "cuda" and args.lora_rank else torch.float32
        model, tokenizer = tasks.load_student(name, device, frozen_base)
        loaded.append((model, tokenizer, os.path.abspath(name) if os.path.isdir(name) else name))
    if not args.students:
        loaded = [(model.to(device), tokenizer, "demo") for model, tokenizer in demo_students(args.seed)]
    students = []
    for i, (model, tokenizer, source) in enumerate(loaded):
        if args.lora_rank:
            add_lora(model, args.lora_rank, args.lora_alpha)
        if i in args.freeze:
            model.requires_grad_(False)
        student = SimpleNamespace(model=model, tokenizer=tokenizer, source=source, end=tasks.end_token(tokenizer), frozen=i in args.freeze,
                                  lr=args.lr[i % len(args.lr)])
        check_head(student)
        student.blocks = torch.compile(model.base_model, dynamic=True) if args.compile else model.base_model
        students.append(student)
    return students


@torch.no_grad()
def check_head(student):
    """stop() if the model does more between its last hidden state and its logits than response_nll knows."""
    ids = torch.tensor([[student.end, 1, 2, 3]], device=student.model.device)
    with torch.autocast(ids.device.type, torch.bfloat16, enabled=ids.device.type == "cuda"):
        theirs = F.cross_entropy(student.model(input_ids=ids).logits[0, :-1].float(), ids[0, 1:], reduction="none")
        ours = response_nll(student, student.model.base_model(input_ids=ids).last_hidden_state[0, :-1], ids[0, 1:])
    if not torch.allclose(ours, theirs, rtol=0.05, atol=0.05):
        stop(f"student {student.source}: its output head scales or shifts its logits in a way that is not supported here")


def demo_students(seed):
    """Two tiny students of different architecture and tokenizer, "pretrained" on plain arithmetic sentences.

    A Llama with whole words and a GPT-NeoX with BPE pieces, 0.4M parameters each; numbers are one token in both. From
    scratch nothing is learned in minutes; after this warm start, training them means distilling.
    """
    torch.manual_seed(seed)
    sentences = judge.demo_sentences(8000, seed)
    questions = judge.demo_questions(200, seed)
    corpus = sentences + [tasks.student_prompt(q) for q in questions] + [r["path"] for r in judge.demo_paths(questions, seed)]
    numbers = [f" {n}" for n in range(200)]
    pieces = pre_tokenizers.Split(Regex(r" ?\d+| ?\w+|\n *| ?[^\w\s]"), "isolated")
    special = ["<unk>", "<pad>", "<eos>"]
    shape = {"initializer_range": 0.05, "bos_token_id": None, "eos_token_id": 2, "pad_token_id": 1}
    students = []
    for name in ("words", "pieces"):
        tokenizer = Tokenizer(models.WordLevel(unk_token="<unk>") if name == "words" else models.BPE(unk_token="<unk>"))
        tokenizer.pre_tokenizer, tokenizer.decoder = pieces, decoders.Fuse()
        trainer = trainers.WordLevelTrainer if name == "words" else trainers.BpeTrainer
        vocabulary = 2000 if name == "words" else 160
        tokenizer.train_from_iterator(corpus + numbers, trainer(vocab_size=vocabulary, special_tokens=special, show_progress=False))
        if name == "pieces":
            tokenizer.add_tokens([AddedToken(n, normalized=False) for n in numbers])
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", pad_token="<pad>", eos_token="<eos>")
        if name == "words":
            model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), hidden_size=96, intermediate_size=256, num_hidden_layers=3,
                                                 num_attention_heads=4, max_position_embeddings=512, tie_word_embeddings=True, **shape))
        else:
            model = GPTNeoXForCausalLM(GPTNeoXConfig(vocab_size=len(tokenizer), hidden_size=96, intermediate_size=384, num_hidden_layers=3,
                                                     num_attention_heads=4, max_position_embeddings=512, tie_word_embeddings=True, **shape))
        ids = [tokenizer(t)["input_ids"] + [tokenizer.eos_token_id] for t in sentences]
        steps, batch, peak = 400, 32, 4e-3
        opt = torch.optim.AdamW(model.parameters(), lr=peak, betas=(0.9, 0.98), weight_decay=0.01)
        for step in tqdm(range(steps), desc=f"warm start of student {len(students)}", unit="step", leave=False):
            rows = [torch.tensor(ids[i]) for i in torch.randint(len(ids), (batch,)).tolist()]
            x = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-100)
            loss = F.cross_entropy(model(input_ids=x.clamp(min=0)).logits[:, :-1].flatten(0, 1), x[:, 1:].flatten(), ignore_index=-100)
            for group in opt.param_groups:
                group["lr"] = peak * lr_scale(step, steps, 0.05)
            opt.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            opt.step()
        students.append((model, tokenizer))
    return students


def lr_scale(step, steps, warmup):
    """Learning rate as a share of its maximum: linear warm-up, then a cosine down to a tenth."""
    rising = max(1, round(warmup * steps))
    if step < rising:
        return (step + 1) / rising
    return 0.1 + 0.45 * (1 + math.cos(math.pi * (step - rising) / max(1, steps - rising)))


# ---------------------------------------------------------------- data
def load_data(args):
    """-> training rows (graded and filtered), test questions, and the rows before the filter.

    The split is by question, so that none is on both sides. stop() if nothing is left to train on or to test.
    """
    test = tasks.read_questions(args.eval_questions) if args.eval_questions else None
    if args.paths:
        rows = judge.read_pool(args.paths)
    else:  # question sets of neighbouring seeds share no question
        rows = judge.demo_paths(judge.demo_questions(300, args.seed), args.seed)
        test = test or judge.demo_questions(300, args.seed + 1)
    if not all("correct" in row for row in rows):
        rows = list(judge.grade_paths(tqdm(rows, desc="grade paths", unit="path", leave=False)))
        for row in rows:
            row["valid"], verdict = judge.rule_judge(row) if row["task"] == "demo" else (None, None)
            row["verdict"] = {"rule": verdict} if verdict else None
    if args.filter == "full" and any(row["valid"] is None for row in rows):
        print("filter: step 2 (a judge) was not run on this pool; run judge.py --judge to drop right answers with wrong steps")
    styles = sorted({row["style"] for row in rows})
    if args.styles:
        if unknown := set(args.styles) - set(styles):
            stop(f"--styles {' '.join(sorted(unknown))}: not in the pool, whose styles are {', '.join(styles)}")
        rows = [row for row in rows if row["style"] in args.styles]
    ids = sorted({row["id"] for row in rows})
    random.Random(args.seed).shuffle(ids)
    if test is None:
        held_out = set(ids[:max(1, round(args.test_frac * len(ids)))])
        fields = ("id", "task", "question", "choices", "answer", "level")  # not the prompt: the test has the plain one
        test = list({row["id"]: {k: row[k] for k in fields if k in row} for row in rows if row["id"] in held_out}.values())
    seen = {row["id"] for row in test}, {" ".join(row["question"].lower().split()) for row in test}
    rows = [row for row in rows if row["id"] not in seen[0] and " ".join(row["question"].lower().split()) not in seen[1]]
    ids = [i for i in ids if i in {row["id"] for row in rows}]
    used = set(ids[:math.ceil(args.train_frac * len(ids))])
    rows = [row for row in rows if row["id"] in used]
    kept = judge.filter_pool(rows, args.filter)
    if not kept:
        stop(f"no path is left to train on: {len(rows)} training paths, none passes --filter {args.filter}; look at the pool with judge.py")
    return kept, test[:args.eval_limit or None], rows


def encode(rows, students, max_len):
    """Tokenise the pool once -> rows with, for each student, `prompt` and `response` ids and `segments`.

    Prompt and response are tokenised apart and joined: no token spans both, and generation starts from the same
    prompt tokens. The response ends with the student's end token, which is trained. Too long rows are left out.
    """
    out, prompts = [], [{} for _ in students]
    for start in tqdm(range(0, len(rows), 256), desc="tokenise", leave=False):
        part = [{**row, "text": row["path"].strip(), "prompts": [], "responses": []} for row in rows[start:start + 256]]
        spans = []
        for student, known in zip(students, prompts):
            coded = student.tokenizer([row["text"] for row in part], add_special_tokens=False, return_offsets_mapping=True)
            spans.append(coded["offset_mapping"])
            for row, ids in zip(part, coded["input_ids"]):
                text = tasks.student_prompt(row)
                if text not in known:
                    known[text] = np.array(tasks.encode_prompt(student.tokenizer, text), np.int32)
                row["prompts"].append(known[text])
                row["responses"].append(np.array([*ids, student.end], np.int32))
        for row, offsets in zip(part, zip(*spans)):
            if all(offsets) and max(len(p) + len(r) for p, r in zip(row["prompts"], row["responses"])) <= max_len:
                segments, row["n_segments"] = qr.shared_segments(offsets)
                row["segments"] = [np.array(x, np.int32) for x in segments]
                out.append(row)
    if not out:
        stop(f"no path fits into --max_len {max_len} tokens with its prompt; raise it")
    if len(out) < len(rows):
        print(f"left out {len(rows) - len(out)} of {len(rows)} paths: prompt and path are longer than --max_len {max_len} tokens")
    return out


def embed(rows, args, device):
    """Eq 1 for the whole pool, once: (P, d) on the CPU, standardised per feature. Kept on disk by content."""
    pairs = [(row["question"], row["text"]) for row in rows]
    if args.encoder == "hash":
        h = qr.hash_embed([f"{q}\n{p}" for q, p in pairs])
    else:
        key = hashlib.sha256(json.dumps([args.encoder, pairs]).encode()).hexdigest()[:20]
        cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "qr-distill" / f"{key}.safetensors"
        if cache.is_file():
            h = load_file(cache)["h"]
        else:
            try:
                tokenizer = AutoTokenizer.from_pretrained(args.encoder)
                model = AutoModel.from_pretrained(args.encoder, dtype=torch.float32, use_safetensors=True).to(device).eval()
            except (OSError, ValueError) as e:
                stop(f"--encoder {args.encoder}: not a Hugging Face encoder that can be loaded ({str(e).strip().splitlines()[0]})")
            tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
            order = sorted(range(len(pairs)), key=lambda i: len(pairs[i][0]) + len(pairs[i][1]))
            h = torch.empty(len(pairs), model.config.hidden_size)
            for a in tqdm(range(0, len(order), 32), desc="embed paths", leave=False):
                part = order[a:a + 32]
                h[part] = qr.encoder_embed(model, tokenizer, [pairs[i] for i in part], min(512, tokenizer.model_max_length))
            cache.parent.mkdir(parents=True, exist_ok=True)
            save_atomic({"h": h}, cache)
    return (h - h.mean(0)) / h.std(0, correction=0).clamp(min=1e-3)


# ---------------------------------------------------------------- one student's forward pass over the paths that it got
def batches(lengths, max_tokens):
    """Yield row numbers, shortest rows first, in batches of at most `max_tokens` padded tokens (or a single row)."""
    batch = []
    for i in sorted(range(len(lengths)), key=lengths.__getitem__):
        if batch and (len(batch) + 1) * lengths[i] > max_tokens:
            yield batch
            batch = []
        batch.append(i)
    yield batch


def forward_paths(student, s, rows, base, args):
    """Run student number s over P rows -> nll (P,), each row's summed loss in nats; z (T, D) and segment (T,), the
    states on the text tokens of the rows that are co-routed and the shared segments that they lie in.

    base (P,): number of a row's first shared segment, -1 if the row is not co-routed. Rows are padded on the right,
    where a causal model's real tokens cannot look: no attention mask is needed. The end token is predicted, not read.
    """
    device, pad_to = student.model.device, 64 if args.compile or student.model.device.type == "cuda" else 1
    h, target, owner, text, segment = [], [], [], [], []
    for batch in batches([len(row["prompts"][s]) + len(row["responses"][s]) - 1 for row in rows], args.forward_tokens):
        width = max(len(rows[i]["prompts"][s]) + len(rows[i]["responses"][s]) - 1 for i in batch)
        width = -(-width // pad_to) * pad_to
        ids, where = np.zeros((len(batch), width), np.int64), []
        for b, i in enumerate(batch):
            prompt, response = rows[i]["prompts"][s], rows[i]["responses"][s]
            first, n = len(prompt) - 1, len(response)  # the state on prompt[-1] predicts response[0]
            ids[b, :first + n] = np.concatenate([prompt, response[:-1]])
            where.append(b * width + np.arange(first, first + n))
            target.append(response)
            owner.append(np.full(n, i))
            text.append((np.arange(n) > 0) & (base[i] >= 0))  # the first row is the prompt's last token: not text
            segment.append(rows[i]["segments"][s] + base[i] if base[i] >= 0 else [])
        hidden = student.blocks(input_ids=torch.from_numpy(ids).to(device), use_cache=False).last_hidden_state
        h.append(hidden.flatten(0, 1)[torch.from_numpy(np.concatenate(where)).to(device)])  # (N, D): response positions only
    h = torch.cat(h)
    target, owner, text, segment = (torch.from_numpy(np.concatenate(x).astype(np.int64)).to(device) for x in (target, owner, text, segment))
    nll = h.new_zeros(len(rows), dtype=torch.float32).index_add(0, owner, response_nll(student, h, target))
    return nll, h[text.nonzero().squeeze(1)].float(), segment


# ---------------------------------------------------------------- checkpoints: tensors and JSON only, replaced atomically
def save_atomic(tensors, file, metadata=None):
    """Write a safetensors file such that a kill leaves the old file or the new one, never half of one."""
    part = Path(f"{file}.part")
    save_file({k: v.detach().contiguous() for k, v in tensors.items()}, part, metadata=metadata)
    with open(part, "rb") as f:
        os.fsync(f.fileno())
    os.replace(part, file)


def run_state(students, router, collab, optimizers, generator):
    """Every tensor that the run's future depends on, by name: trained weights, optimiser moments, random states."""
    modules = {"router": router, "collab": collab, **{f"student_{i}": s.model for i, s in enumerate(students)}}
    state = {f"{m}.{name}": p.data for m, module in modules.items() for name, p in module.named_parameters()
             if p.requires_grad or m == "collab"}
    for k, opt in enumerate(optimizers):
        for i, moments in opt.state_dict()["state"].items():
            state |= {f"optimizer_{k}.{i}.{name}": t for name, t in moments.items()}
    state |= {"rng.gates": generator.get_state(), "rng.cpu": torch.get_rng_state()}
    return state | ({"rng.cuda": torch.cuda.get_rng_state()} if torch.cuda.is_available() else {})


def load_state(file, students, router, collab, optimizers, generator):
    """Put a checkpoint back in place; -> its metadata. Reads safetensors, so nothing is unpickled."""
    with safe_open(file, "pt") as f:
        saved, meta = {k: f.get_tensor(k) for k in f.keys()}, json.loads(f.metadata()["run"])  # noqa: SIM118
    moments = [{} for _ in optimizers]
    for name, tensor in saved.items():
        if name.startswith("optimizer_"):
            k, i, key = name.removeprefix("optimizer_").split(".")
            moments[int(k)].setdefault(int(i), {})[key] = tensor
    for opt, state in zip(optimizers, moments):
        opt.load_state_dict({"state": state, "param_groups": opt.state_dict()["param_groups"]})
    for name, tensor in run_state(students, router, collab, [], generator).items():
        if not name.startswith("rng."):
            tensor.copy_(saved[name])
    generator.set_state(saved["rng.gates"])
    torch.set_rng_state(saved["rng.cpu"])
    if "rng.cuda" in saved and torch.cuda.is_available():
        torch.cuda.set_rng_state(saved["rng.cuda"])
    return meta


# ---------------------------------------------------------------- the run
def main(argv=None):
    args = parse_args(argv)
    demo = not args.students
    # What nobody set: the demo's tiny students train in full and fast, real ones with LoRA.
    args.lora_rank = (0 if demo else 32) if args.lora_rank is None else args.lora_rank
    args.lr = args.lr or ([2e-3] if demo else [2e-4])
    args.epochs = args.epochs or (8 if demo else 3)
    args.eval_max_new_tokens = args.eval_max_new_tokens or (96 if demo else 512)
    args.out_dir = args.out_dir or time.strftime("out/%Y%m%d-%H%M%S")
    out = Path(args.out_dir)
    if not args.resume and any((out / name).exists() for name in ("args.json", "results.json", "log.jsonl")):
        stop(f"--out_dir {out} holds a run already; pass --resume {out} to go on with it, or another folder")
    device = torch.device(args.device if args.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu")
    amp_dtype = {"auto": torch.bfloat16 if device.type == "cuda" else None, "float32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[args.dtype]
    amp = contextlib.nullcontext() if amp_dtype is None else torch.autocast(device.type, amp_dtype)
    random.seed(args.seed)
    torch.manual_seed(args.seed)

    # ---- the pool, filtered (step 1 and step 2), split by question
    kept, test, before_filter = load_data(args)
    if demo and any(row["task"] != "demo" for row in kept + test):
        stop("the demo's tiny students know the demo task only; pass --students with Hugging Face models for this pool")
    print("\nquality filter, training questions only:")
    judge.filter_table(before_filter, args.filter)

    # ---- students in memory, together with the router
    students = load_students(args, device)
    S = len(students)
    rows = encode(kept, students, args.max_len)
    questions = defaultdict(list)  # id -> its paths
    for p, row in enumerate(rows):
        questions[row["id"]].append(p)
    questions = list(questions.values())
    styles = sorted({row["style"] for row in rows})
    h = embed(rows, args, device)  # (P, d), Eq 1
    router = qr.Router(h.shape[1], S, args.router_hidden)  # on the CPU: it decides which rows exist, before any is run
    collab = qr.Collaboration([s.model.get_output_embeddings().weight.shape[1] for s in students], args.shared_dim,
                              args.projection == "trained", args.standardize, args.competence).to(device)
    collaborate = args.mutual_weight > 0 and S > 1
    trainable = [([p for p in s.model.parameters() if p.requires_grad], s.lr, args.weight_decay) for s in students]
    trainable.append(([p for p in collab.parameters() if p.requires_grad], args.router_lr, 0.0))
    optimizers = [torch.optim.AdamW(params or [torch.zeros(())], lr=lr, weight_decay=wd) for params, lr, wd in trainable]
    router_optimizer = torch.optim.AdamW(router.parameters(), lr=args.router_lr, weight_decay=0.0)
    base_lr = [lr for _, lr, _ in trainable] + [args.router_lr]
    scaler = torch.amp.GradScaler(device.type, enabled=amp_dtype == torch.float16)
    generator = torch.Generator().manual_seed(args.seed)  # of the gates
    per_epoch = math.ceil(len(questions) / args.batch_size)
    steps = args.max_steps or args.epochs * per_epoch

    def evaluate():
        with amp:
            return tasks.evaluate([(s.model, s.tokenizer) for s in students], test, args.eval_max_new_tokens, args.eval_batch_size,
                                  args.samples, seed=args.seed)

    run = {"step": 0, "tokens": [0] * S, "seconds": 0.0, "pool": hashlib.sha256(json.dumps([kept, test]).encode()).hexdigest()}
    checkpoint, log_file = out / "checkpoint.safetensors", out / "log.jsonl"
    state = (students, router, collab, [*optimizers, router_optimizer], generator)
    if args.resume and checkpoint.is_file():
        saved = load_state(checkpoint, *state)
        if saved["pool"] != run["pool"]:
            stop(f"--resume {out}: the pool or the test questions have changed since that run; start a new run in another folder")
        run = saved
        lines = log_file.read_text().splitlines(keepends=True)[:run["step"]]  # steps after the checkpoint are done again
        log_file.write_text("".join(lines))
    else:
        out.mkdir(parents=True, exist_ok=True)
        (out / "args.json").write_text(json.dumps({k: v for k, v in vars(args).items() if k != "resume"}, indent=1))
        log_file.write_text("")
        run["before"] = evaluate()
        save_atomic(run_state(*state), checkpoint, {"run": json.dumps(run)})

    # ---- training
    for s in students:
        s.model.train(not s.frozen)
    log = open(log_file, "a")
    bar = tqdm(range(run["step"], steps), desc="train", unit="step", initial=run["step"], total=steps)
    for step in bar:
        began = time.time()
        scale = lr_scale(step, steps, args.warmup)
        for opt, lr in zip([*optimizers, router_optimizer], base_lr):
            opt.param_groups[0]["lr"] = lr * scale

        # the questions of this step, with all their paths
        epoch, k = divmod(step, per_epoch)
        order = torch.randperm(len(questions), generator=torch.Generator().manual_seed(args.seed * 1_000_003 + epoch))
        batch = [questions[i] for i in order[k * args.batch_size:(k + 1) * args.batch_size]]
        index = torch.tensor([p for paths in batch for p in paths])  # (P,) into rows and h
        question = torch.repeat_interleave(torch.arange(len(batch)), torch.tensor([len(paths) for paths in batch]))  # (P,)

        # routing of the whole step, before any student runs
        logits = router(h[index])  # (P, S)
        if args.route == "learned":
            alpha, soft = (qr.binary_gate if args.gate == "binary" else qr.onehot_gate)(logits, args.tau, generator)  # Eq 2
            alpha = qr.at_least_one(alpha, soft, question)
        elif args.route == "random":
            u = torch.rand(logits.shape, generator=generator)
            alpha = qr.at_least_one((u < args.route_rate).float(), 1 - u, question)
        else:
            alpha = torch.ones_like(logits)
        routed = alpha.detach() > 0.5  # (P, S)
        weight = qr.path_weights(alpha, question, args.normalize)  # (P, S)
        shared = (routed.sum(1) > 1) if collaborate else torch.zeros(len(index), dtype=torch.bool)  # co-routed paths

        # students: forward and backward, a few questions at a time; the weights are those of the whole step
        size = args.micro_batch_size or args.batch_size
        losses, logged = [], defaultdict(list)
        for q in range(0, len(batch), size):
            here = ((question >= q) & (question < q + size)).nonzero().squeeze(1)  # this micro-batch's paths
            lengths = torch.tensor([rows[p]["n_segments"] for p in index[here]])
            co = shared[here].nonzero().squeeze(1)  # its C co-routed paths
            base = torch.full((len(here),), -1)
            base[co] = lengths[co].cumsum(0) - lengths[co]
            loss, z, segment = torch.zeros((), device=device), [], []
            sums = torch.zeros(len(here), S, device=device)
            for s, student in enumerate(students):
                mine = routed[here, s].nonzero().squeeze(1)
                with amp, torch.set_grad_enabled(not student.frozen):
                    total, z_s, segment_s = forward_paths(student, s, [rows[p] for p in index[here[mine]]], base[mine].tolist(), args)
                tokens = torch.tensor([len(rows[p]["responses"][s]) for p in index[here[mine]]])
                mean = total / tokens.to(device)  # nll_ij of student s: nats per response token
                losses.append((here[mine], s, mean.detach()))
                sums[mine, s] = total.detach()
                z.append(z_s)
                segment.append(segment_s)
                if not student.frozen:
                    loss = loss + (weight.detach()[here[mine], s].to(device) * mean).sum()  # L_distill^(s), Eq 9
                    run["tokens"][s] += int(tokens.sum())
            if len(co):
                path = torch.repeat_interleave(torch.arange(len(co)), lengths[co]).to(device)
                per_segment = sums[co] / lengths[co, None].to(device)  # comparable between tokenizers, unlike per token
                mutual, competence, gamma, raw, zt = collab(z, segment, path, routed[here[co]].to(device), per_segment)
                loss = loss + (args.mutual_weight * mutual.sum() + competence.sum()) / shared.sum()
                chars = torch.tensor([len(rows[p]["text"]) for p in index[here[co]]])
                logged["mutual"].append(mutual.detach())
                logged["gamma"].append(gamma.detach())
                logged["segment_chars"].append(chars / lengths[co])
                if q == 0:  # on the first micro-batch, so that neither collapse goes unseen (METHOD 8.8)
                    logged["spread"].append(torch.stack([x.detach().std(0).mean() for x in raw])[None])
                    logged["rank"].append(torch.stack([qr.effective_rank(x.detach()) for x in zt])[None])
            if loss.requires_grad:
                scaler.scale(loss).backward()

        # router: the other half of the product rule, with the path losses as constants
        nll = torch.zeros(len(index), S)
        for where, s, mean in losses:
            nll[where, s] = mean.cpu()
        entropy = qr.balance_entropy(torch.sigmoid(logits) if args.entropy == "student" else alpha, question, args.entropy == "student")
        if args.route == "learned":
            l_router = (weight * qr.fill_skipped(nll, alpha, question, args.normalize)).sum()  # the gate multiplies the loss
            (l_router - args.entropy_weight * entropy).backward()  # Eq 9 departs: Eq 4 is maximised, so subtracted

        norms = [clip_and_step(opt, args.clip, scaler) for opt in optimizers]
        router_norm = clip_and_step(router_optimizer, args.clip)
        scaler.update()

        # one line per step
        seconds = time.time() - began
        run["step"], run["seconds"] = step + 1, run["seconds"] + seconds
        counts = torch.tensor([[len(rows[p]["responses"][s]) for s in range(S)] for p in index]) * routed  # (P, S) tokens
        of_style = {style: [i for i, p in enumerate(index) if rows[p]["style"] == style] for style in styles}
        by_style = {style: (nll[i], routed[i].float()) for style, i in of_style.items() if i}
        line = {"step": step + 1, "epoch": epoch, "lr_scale": scale,
                "loss": ((nll * routed).sum(0) / routed.sum(0).clamp(min=1)).tolist(),
                "rate": routed.float().mean(0).tolist(), "co_routed": float(shared.float().mean()),
                "rate_style": {style: on.mean(0).tolist() for style, (_, on) in by_style.items()},
                "loss_style": {style: ((x * on).sum(0) / on.sum(0).clamp(min=1)).tolist() for style, (x, on) in by_style.items()},
                "entropy": float(entropy.detach()), "grad_norm": norms[:S], "router_grad_norm": router_norm,
                **{name: torch.cat(values).mean(0).tolist() for name, values in logged.items()},
                "tokens_per_s": round(int(counts.sum()) / seconds, 1)}
        log.write(json.dumps(line) + "\n")
        log.flush()
        bar.set_postfix_str(" ".join(f"student {i}: loss {line['loss'][i]:.3f} rate {line['rate'][i]:.2f}" for i in range(S)))
        if (step + 1) % args.save_every == 0 or step + 1 == steps:
            save_atomic(run_state(*state), checkpoint, {"run": json.dumps(run)})
    log.close()

    # ---- the students on disk, the test, the table
    for i, student in enumerate(students):
        save_student(student, out / f"student_{i}")
    after = evaluate()
    last = [json.loads(line)["rate_style"] for line in log_file.read_text().splitlines()[-per_epoch:]]  # the last epoch
    rates = {style: np.mean([x[style] for x in last if style in x], 0).tolist() for style in styles if any(style in x for x in last)}
    results = {"students": [s.source for s in students],
               **{when: {k: v for k, v in r.items() if k != "predictions"} for when, r in (("before", run["before"]), ("after", after))},
               "selection_rate": rates, "tokens_trained": run["tokens"], "seconds": round(run["seconds"], 1),
               "counts": {"steps": run["step"], "training_questions": len(questions), "training_paths": len(rows), "test_questions": len(test),
                          "filter": dict(Counter(judge.fate(row, args.filter) for row in before_filter))}}
    (out / "results.json").write_text(json.dumps(results, indent=1))
    with open(out / "predictions.jsonl", "w") as f:
        f.writelines(json.dumps(p) + "\n" for p in after["predictions"])
    print_results(results, out)


def clip_and_step(optimizer, clip, scaler=None):
    """Clip the gradients that are there, step, clear -> their norm before clipping (0 where there is none)."""
    params = [p for p in optimizer.param_groups[0]["params"] if p.grad is not None]
    if not params:
        return 0.0
    if scaler:
        scaler.unscale_(optimizer)
    norm = float(nn.utils.clip_grad_norm_(params, clip))
    scaler.step(optimizer) if scaler else optimizer.step()
    optimizer.zero_grad()
    return norm


def print_results(results, out):
    """The run's table: accuracy before and after, and who got what."""
    before, after = results["before"], results["after"]
    print(f"\n{'accuracy, % of ' + str(after['questions']) + ' test questions':40}{'before':>9}{'after':>9}{'unparsed':>10}{'stopped':>9}")
    for i, name in enumerate(results["students"]):
        print(f"{f'student {i} ({os.path.basename(name)})':40}{100 * before['accuracy'][i]:9.1f}{100 * after['accuracy'][i]:9.1f}"
              f"{100 * after['unparsed'][i]:10.1f}{100 * after['stopped'][i]:9.1f}")
    for key, label in (("ensemble", "ensemble of the students"), ("upper_bound", "upper bound: any student right")):
        print(f"{label:40}{100 * before[key]:9.1f}{100 * after[key]:9.1f}")
    print(f"\n{'selection rate, last epoch':40}" + "".join(f"{f'student {i}':>12}" for i in range(len(results["students"]))))
    for style, rate in results["selection_rate"].items():
        print(f"{style:40}" + "".join(f"{r:12.2f}" for r in rate))
    c = results["counts"]
    print(f"\n{c['steps']} steps on {c['training_questions']} questions and {c['training_paths']} paths in {results['seconds']:.0f} s; response tokens "
          f"trained: {', '.join(f'{t:,}' for t in results['tokens_trained'])}\neverything is in {out}/: results.json, log.jsonl, student_0/ ...")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        print("\nstopped; go on with: python distill.py --resume OUT_DIR", file=sys.stderr)
        raise SystemExit(130) from None
