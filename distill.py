"""QR-Distill, the training run: students trained together on the teacher paths that a router gives them.

    python distill.py                                     # the embedded demo: laptop CPU, offline, a few minutes
    python distill.py --paths POOL.jsonl --students A B    # real paths, real students

main() is the run, top to bottom, with the paper's equation numbers beside their lines. The equations are in router.py,
the path pool in judge.py, the tasks in eval.py. "departs" marks where this leaves the paper (Lei et al., EMNLP 2025).
"""
import argparse
import contextlib
import hashlib
import importlib.util
import itertools
import json
import math
import os
import random
import sys
import time
from collections import Counter, defaultdict
from datetime import timedelta
from functools import partialmethod
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from tqdm import tqdm
from transformers import (
    AutoModel,
    AutoTokenizer,
    BitsAndBytesConfig,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)
from transformers.pytorch_utils import Conv1D

import eval as tasks
import judge
import router as qr
from eval import stop, within


# ---------------------------------------------------------------- flags
def parse_args(argv=None):
    """The run's flags. With --resume: the saved ones, and a flag that contradicts them is refused."""
    count, natural, share, positive, weight = (within(int, 1), within(int, 0), within(float, 0, 1), within(float, 1e-9),
                                               within(float, 0))
    p = argparse.ArgumentParser(usage="python distill.py [flags]", description=__doc__.split("\n")[0],
                                epilog="Defaults in brackets. Every ablation is a flag: see README.md.")
    p.error = stop  # one sentence and exit code 2
    g = p.add_argument_group("run")
    g.add_argument("--out_dir", help="run folder (default: out/ and the time)")
    g.add_argument("--resume", metavar="DIR", help="go on with the run in DIR, with its own flags")
    g.add_argument("--seed", type=within(int, 0, 2**31), default=0, help="seeds weights, gates, data order, split (0)")
    g.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps ... (auto)")
    g.add_argument("--dtype", default="auto", choices=["auto", "float32", "bf16", "fp16"],
                   help="type of the matrix products (AMP); auto: bf16 on cuda, else float32")
    g.add_argument("--compile", action="store_true", help="torch.compile the students")
    g.add_argument("--checkpointing", action="store_true", help="recompute activations: less memory, a third more work")
    g.add_argument("--save_every", type=count, default=100, help="steps between checkpoints (100)")
    g = p.add_argument_group("data")
    g.add_argument("--paths", metavar="POOL", help="path pool, from judge.py or not yet graded (default: the demo)")
    g.add_argument("--filter", default="full", choices=["full", "answer", "none"],
                   help="full: right answer and not judged invalid; answer: right answer; none: keep all (full)")
    g.add_argument("--styles", nargs="+", help="train on these reasoning styles only (all)")
    g.add_argument("--train_frac", type=within(float, 1e-6, 1), default=1.0, help="share of the questions used (1)")
    g.add_argument("--test_frac", type=within(float, 1e-6, 1), default=0.2, help="share of questions held out (0.2)")
    g.add_argument("--max_len", type=count, default=1024,
                   help="longest prompt and path in tokens; longer ones are left out (1024)")
    g = p.add_argument_group("students")
    g.add_argument("--students", nargs="+", metavar="MODEL", help="Hugging Face causal LMs (default: two tiny ones)")
    g.add_argument("--freeze", nargs="+", type=natural, default=[], metavar="I", help="students that do not learn")
    g.add_argument("--lora_rank", type=natural, help="LoRA on the blocks' linear layers, 0: train all (32; demo: 0)")
    g.add_argument("--lora_alpha", type=positive, default=64.0, help="LoRA's scale is alpha / rank (64)")
    g.add_argument("--quantize", choices=["nf4"], help="frozen base in 4 bit under LoRA (QLoRA); needs bitsandbytes")
    g.add_argument("--lr", nargs="+", type=positive, help="learning rate: one, or one per student (2e-4; demo: 2e-3)")
    g = p.add_argument_group("routing")
    g.add_argument("--route", default="learned", choices=["learned", "all", "random", *qr.SCORES],
                   help="the trained router; all paths to all; at random; or one path of each question by a score of "
                        "the untrained student (learned)")
    g.add_argument("--route_rate", type=share, default=0.5, help="selection rate of --route random --gate binary (0.5)")
    g.add_argument("--encoder", default="hash", metavar="MODEL", help="Eq 1: 'hash' or a Hugging Face encoder (hash)")
    g.add_argument("--router_hidden", type=natural, default=0, help="Eq 2: width of the paper's MLP, 0: linear (0)")
    g.add_argument("--router_lr", type=weight, default=0.1, help="learning rate of the router (0.1)")
    g.add_argument("--style_input", action=argparse.BooleanOptionalAction, default=True,
                   help="Eq 2: the router also sees the pool's `style` field, one-hot (on)")
    g.add_argument("--gate", default="categorical", choices=[*qr.GATES],
                   help="Eq 2: categorical: a student gets one path of each question; binary: any number of them; "
                        "onehot: a path goes to one student (categorical)")
    g.add_argument("--reward", default="sum", choices=["sum", "loss", "interaction"],
                   help="what the router lowers: sum: a path's total loss; loss: its mean over tokens, as in Eq 9; "
                        "interaction: that mean less its average over students (sum)")
    g.add_argument("--explore", type=share, default=0.2, help="first share of the steps: all paths go to all "
                   "students, while the router learns from losses that its choices did not shape (0.2)")
    g.add_argument("--tau", type=within(float, 0.2), default=1.0, help="Eq 2: Gumbel temperature (1)")
    g.add_argument("--entropy_weight", type=weight, default=0.01, help="Eq 9: l1 (0.01)")
    g.add_argument("--entropy", default="student", choices=["student", "literal"],
                   help="Eq 3: a rate for each student, or one for all as printed (student)")
    g.add_argument("--normalize", default="question", choices=["question", "batch"],
                   help="Eq 9: every question weighs the same, or every path (question)")
    g = p.add_argument_group("collaboration")
    g.add_argument("--mutual_weight", type=weight, default=0.1, help="Eq 9: l2, 0: no collaboration (0.1)")
    g.add_argument("--shared_dim", type=count, default=64, help="Eq 5: d (64)")
    g.add_argument("--projection", default="random", choices=["random", "trained"],
                   help="Eq 5: frozen random, or trained, which loses rank (random)")
    g.add_argument("--standardize", action=argparse.BooleanOptionalAction, default=True,
                   help="Eq 8: compare states of mean 0 and variance 1 (on)")
    g.add_argument("--competence", default="target", choices=["target", "eq8"],
                   help="Eq 6: learned from the students' losses, or from Eq 8 as printed (target)")
    g = p.add_argument_group("optimisation")
    g.add_argument("--batch_size", type=count, default=8, help="questions per step, with all their paths (8)")
    g.add_argument("--micro_batch_size", type=count, help="questions per backward pass: memory, not results (all)")
    g.add_argument("--forward_tokens", type=count, help="padded tokens per forward pass: memory (4096; CPU: 1024)")
    g.add_argument("--share_prompts", action="store_true",
                   help="one sequence for a question's paths, its prompt once: faster where many paths run")
    g.add_argument("--epochs", type=count, help="passes over the training questions (3; demo: 8)")
    g.add_argument("--max_steps", type=count, help="optimiser steps, instead of --epochs")
    g.add_argument("--warmup", type=share, default=0.05,
                   help="share of steps with a rising rate, then cosine to a tenth (0.05)")
    g.add_argument("--weight_decay", type=weight, default=0.01, help="AdamW's (0.01)")
    g.add_argument("--clip", type=positive, default=1.0, help="largest gradient norm of student or router (1)")
    g = p.add_argument_group("evaluation")
    g.add_argument("--eval_questions", metavar="FILE", help="test set in any format of eval.py (default: held out)")
    g.add_argument("--eval_limit", type=natural, default=0, help="only the first N test questions, 0: all (0)")
    g.add_argument("--eval_max_new_tokens", type=count, help="longest answer in tokens (512; demo: 96)")
    g.add_argument("--eval_batch_size", type=count, default=32, help="questions per generation batch (32)")
    g.add_argument("--samples", type=count, default=1, help="answers per student, above 1: sampled, majority vote (1)")
    args = p.parse_args(argv)

    if args.resume:  # a contradiction would give a result that is neither run's
        file = Path(args.resume) / "args.json"
        if not file.is_file():
            stop(f"--resume {args.resume}: no args.json there; pass the --out_dir of an earlier run")
        try:
            saved = json.loads(file.read_text())
        except ValueError:
            stop(f"--resume {args.resume}: its args.json is damaged; start the run again in another folder")
        for action in p._actions:
            action.default = argparse.SUPPRESS
        for name, value in vars(p.parse_args(argv)).items():
            if name not in ("resume", "out_dir") and saved.get(name) != value:
                stop(f"--resume {args.resume}: that run has --{name} {saved.get(name)}, not {value}; "
                     "leave the flag out, or start a new run")
        return argparse.Namespace(**{**saved, "resume": args.resume, "out_dir": args.resume})
    # What nobody set: the demo's tiny students train in full and fast, real ones with LoRA.
    real = {"lora_rank": 32, "lr": [2e-4], "epochs": 3, "eval_max_new_tokens": 512}
    demo = {"lora_rank": 0, "lr": [2e-3], "epochs": 8, "eval_max_new_tokens": 96}
    for name, value in (real if args.students else demo).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if not args.out_dir and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        stop("torchrun needs --out_dir, so that all processes mean the same folder")
    args.out_dir = args.out_dir or time.strftime("out/%Y%m%d-%H%M%S")
    n = len(args.students or [0, 0])
    if args.quantize and not (args.students and args.lora_rank):
        stop(f"--quantize {args.quantize}: a 4-bit base stays frozen, so it needs --students and --lora_rank above 0")
    if max(args.freeze, default=0) >= n:
        stop(f"--freeze {max(args.freeze)}: the students are numbered 0 to {n - 1}")
    categorical = args.route == "learned" and args.gate == "categorical"
    if categorical and args.normalize == "batch":
        stop("--normalize batch: with one path of each question all weigh the same anyway; pass --gate binary too")
    if categorical and not args.explore:
        stop("--explore 0: a student that gets one path of a question has nothing to compare it with, and the router "
             "never learns; pass a share above 0, or --gate binary")
    if args.reward == "interaction" and n == 1:
        stop("--reward interaction compares students: it needs two or more")
    if len(args.lr) not in (1, n):
        stop(f"--lr has {len(args.lr)} values for {n} students: pass one, or one per student")
    if Path(args.out_dir).is_file():
        stop(f"--out_dir {args.out_dir} is a file: pass a folder")
    if any((Path(args.out_dir) / name).exists() for name in ("args.json", "results.json", "log.jsonl")):
        stop(f"--out_dir {args.out_dir} holds a run already: pass --resume {args.out_dir}, or another folder")
    return args


# ---------------------------------------------------------------- LoRA (Hu et al., 2021), in PEFT's format on disk
class LoRA(nn.Module):
    """base(x) + alpha / rank * B A x: A (rank, d_in) and B (d_out, rank) in float32 over a frozen linear layer."""

    def __init__(self, base, rank, alpha):
        super().__init__()
        # not of a 4-bit weight, which is packed; GPT-2's Conv1D keeps (d_in, d_out)
        d_in, d_out = base.weight.shape if isinstance(base, Conv1D) else (base.in_features, base.out_features)
        self.base, self.rank, self.alpha = base, rank, alpha
        self.A = nn.Parameter(torch.empty(rank, d_in, device=base.weight.device))
        self.B = nn.Parameter(torch.zeros(d_out, rank, device=base.weight.device))  # the student starts as it was
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))

    def forward(self, x):  # under AMP all layers that read x keep the same x for their gradients: no copy of it here
        return self.base(x) + F.linear(F.linear(x, self.A) * (self.alpha / self.rank), self.B)  # scaled where small


def add_lora(model, rank, alpha):
    """Freeze `model`; put LoRA on every linear layer of its blocks, not on embeddings and output head."""
    model.requires_grad_(False)
    for name, module in list(model.named_modules()):
        if isinstance(module, (nn.Linear, Conv1D)) and module is not model.get_output_embeddings():
            # bitsandbytes on some CPUs: the first answer repacks the weights for good, and they give no gradient then
            module.support_avx512bf16_for_cpu = False
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, LoRA(module, rank, alpha))


def save_student(student, folder):
    """Write a student that from_pretrained loads: a PEFT adapter that names its base, or the whole model."""
    folder, layers = Path(folder), {name: m for name, m in student.model.named_modules() if isinstance(m, LoRA)}
    folder.mkdir(parents=True, exist_ok=True)
    student.tokenizer.save_pretrained(folder)
    if not layers:
        student.model.save_pretrained(folder)
        return
    some = next(iter(layers.values()))
    kind = getattr(some.base, "source_cls", type(some.base))  # of a 4-bit layer: what it is in the full base
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": student.source, "r": some.rank,
              "lora_alpha": some.alpha, "target_modules": sorted({name.rpartition(".")[2] for name in layers}),
              "lora_dropout": 0.0, "bias": "none", "fan_in_fan_out": issubclass(kind, Conv1D), "inference_mode": True}
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=1))
    save_atomic({f"base_model.model.{name}.lora_{x}.weight": getattr(m, x) for name, m in layers.items() for x in "AB"},
                folder / "adapter_model.safetensors", {"format": "pt"})


# ---------------------------------------------------------------- next-token loss on response positions, in chunks
def logit_chunks(h, weight, bias, softcap):
    """Yield (rows, logits (V, n)) for n of the N rows of h at a time: about 256 MiB of float32, to be overwritten.

    Vocabulary first: with so few rows a CPU makes this product a fifth faster than the one that gives (n, V).
    """
    for rows in torch.arange(len(h), device=h.device).split(max(16, 2**26 // len(weight))):
        logits = F.linear(weight, h[rows].to(weight.dtype)).float()
        logits = logits if bias is None else logits + bias[:, None]
        yield rows, softcap * torch.tanh(logits / softcap) if softcap else logits


class ChunkedNLL(torch.autograd.Function):
    """-log p(target) at each position without ever holding all logits: a 262k-token vocabulary would need gigabytes.

    h (N, D), weight (V, D), bias (V) or None, target (N,) -> (N,) float32, nats. d nll / d h is computed while a
    chunk's logits exist, so that with a frozen head they are computed once.
    """

    @staticmethod
    def forward(ctx, h, weight, bias, target, softcap):
        nll = h.new_empty(len(h), dtype=torch.float32)
        dh = torch.empty_like(h) if ctx.needs_input_grad[0] else None
        for rows, chunk_nll, dlogits in ChunkedNLL.chunks(h, weight, bias, target, softcap):
            nll[rows] = chunk_nll
            if dh is not None:
                dh[rows] = (dlogits.T.to(weight.dtype) @ weight).to(dh.dtype)
        ctx.save_for_backward(h, weight, bias, target, dh)
        ctx.softcap = softcap
        return nll

    @staticmethod
    def chunks(h, weight, bias, target, softcap):
        """Yield (rows, nll (n,), d nll / d logits (V, n)) for n rows at a time."""
        for rows, logits in logit_chunks(h, weight, bias, softcap):
            slope = 1 - (logits / softcap).square() if softcap else None
            own, top = logits.gather(0, target[None, rows]), logits.amax(0)
            p = logits.sub_(top).exp_()  # in place from here on: a CPU is as long at fresh memory as at the arithmetic
            total = p.sum(0)
            p.div_(total).scatter_add_(0, target[None, rows], -torch.ones_like(own))
            yield rows, total.log() + top - own[0], p if slope is None else p.mul_(slope)

    @staticmethod
    def backward(ctx, g):
        h, weight, bias, target, dh = ctx.saved_tensors
        dweight = dbias = None
        if ctx.needs_input_grad[1]:  # a trained head needs each position's weight g, known only now: logits again
            dweight, dbias = torch.zeros_like(weight), None if bias is None else torch.zeros_like(bias)
            for rows, _, dlogits in ChunkedNLL.chunks(h, weight, bias, target, ctx.softcap):
                dlogits = (dlogits * g[rows]).to(weight.dtype)
                dweight.addmm_(dlogits, h[rows].to(weight.dtype))
                if dbias is not None:
                    dbias += dlogits.sum(1)
        return None if dh is None else dh * g[:, None].to(dh.dtype), dweight, dbias, None, None


def output_head(student):
    """-> weight (V, D), bias (V) or None, and the softcap of the logits, Gemma 2's, or None."""
    head = student.model.get_output_embeddings()
    return head.weight, head.bias, getattr(student.model.config.get_text_config(), "final_logit_softcapping", None)


def response_nll(student, h, target):
    """The next-token losses (N,) of Eq 9, in nats, from the states h (N, D) that predict the tokens target (N,)."""
    weight, bias, softcap = output_head(student)
    return ChunkedNLL.apply(h, weight, bias, target, softcap)


def response_costs(student, h, target):
    """router.token_costs (N, 3) from the same, for the offline routes."""
    return torch.cat([qr.token_costs(x.T, target[rows]) for rows, x in logit_chunks(h, *output_head(student))])


# ---------------------------------------------------------------- students
def load_students(args, device):
    """The students in memory: namespaces (model, blocks, tokenizer, source, end, lr, frozen, max_len)."""
    loaded = []
    for name in args.students or []:
        if os.path.isfile(os.path.join(name, "adapter_config.json")):
            stop(f"--students {name}: this is a saved adapter; pass its base model, or merge it first")
        half = device.type == "cuda" and args.lora_rank and args.dtype != "float32"
        dtype = torch.float32 if not half else torch.float16 if args.dtype == "fp16" else torch.bfloat16  # of the base
        source = os.path.abspath(name) if os.path.isdir(name) else name
        more = nf4(device, dtype) if args.quantize else {}
        loaded.append((*tasks.load_student(name, device, dtype, **more), source))
    if not args.students:
        loaded = [(model.to(device), tokenizer, "demo") for model, tokenizer in demo_students(args.seed)]
    students = []
    for i, (model, tokenizer, source) in enumerate(loaded):
        if args.lora_rank:
            add_lora(model, args.lora_rank, args.lora_alpha)
        if i in args.freeze:
            model.requires_grad_(False)
        context = getattr(model.config.get_text_config(), "max_position_embeddings", None) or args.max_len
        student = SimpleNamespace(model=model, tokenizer=tokenizer, source=source, end=tasks.end_token(tokenizer),
                                  lr=args.lr[i % len(args.lr)], frozen=i in args.freeze,
                                  max_len=min(args.max_len, context))
        check_head(student)
        student.blocks = model.base_model
        if args.share_prompts:
            check_sharing(student)
        if args.checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        if args.compile:
            student.blocks = torch.compile(model.base_model, dynamic=True)
        students.append(student)
    return students


def nf4(device, dtype):
    """from_pretrained's options for linear layers in 4-bit NormalFloat, their scales in 8 bit (Dettmers et al., 2023,
    QLoRA): 0.516 bytes a weight. Embeddings, norms and output head keep `dtype`, in which the products are made too."""
    if not (importlib.util.find_spec("bitsandbytes") and importlib.util.find_spec("accelerate")):
        stop("--quantize nf4 needs two more packages: pip install bitsandbytes accelerate")
    return {"device_map": {"": device}, "quantization_config": BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype)}


@torch.no_grad()
def check_head(student):
    """stop() if the model does more between last hidden states and logits than response_nll knows of."""
    ids = torch.tensor([[student.end, 1, 2, 3]], device=student.model.device)
    with torch.autocast(ids.device.type, torch.bfloat16, enabled=ids.device.type == "cuda"):
        logits = student.model(input_ids=ids).logits[0, :-1].float()
        nll = response_nll(student, student.model.base_model(input_ids=ids).last_hidden_state[0, :-1], ids[0, 1:])
    if not torch.allclose(nll, F.cross_entropy(logits, ids[0, 1:], reduction="none"), rtol=0.05, atol=0.05):
        stop(f"student {student.source}: its output head changes the logits in a way that is not supported here")


@torch.no_grad()
def check_sharing(student):
    """stop() if six paths in one sequence get other states than alone: not every model heeds positions and masks, and
    some cut the sequence into windows."""
    prompt, paths = np.arange(8), [3 + (np.arange(56 + k) * (2 * k + 1)) % 29 for k in range(6)]
    states = []
    for share in (False, True):
        args = SimpleNamespace(forward_tokens=1024, compile=False, share_prompts=share)
        with contextlib.suppress(TypeError, ValueError, RuntimeError), \
                torch.autocast(student.model.device.type, torch.bfloat16, enabled=student.model.device.type == "cuda"):
            states += [h.float() for _, h in response_states(student, [prompt] * len(paths), paths, args)]
    # a token's error: bf16 in two attention kernels gives a tenth at most, a path that sees another one half and more
    if len(states) < 2 or ((states[0] - states[1]).norm(dim=1) > 0.25 * states[0].norm(dim=1)).any():
        stop(f"--share_prompts: student {student.source} can't keep the paths of one prompt apart; leave the flag out")


def demo_students(seed):
    """Two tiny students, (model, tokenizer) each, "pretrained" on plain arithmetic sentences: a Llama with whole words
    and a GPT-NeoX with BPE pieces, 0.4M parameters each, numbers being one token in both. From scratch nothing is
    learned in minutes; after this warm start, training them means distilling."""
    torch.manual_seed(seed)
    sentences, questions = judge.demo_sentences(8000, seed), judge.demo_questions(200, seed)
    numbers = [f" {n}" for n in range(200)]
    corpus = sentences + numbers + [tasks.student_prompt(q) for q in questions]
    corpus += [row["path"] for row in judge.demo_paths(questions, seed)]
    shape = {"hidden_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4, "max_position_embeddings": 512,
             "initializer_range": 0.05, "tie_word_embeddings": True,
             "pad_token_id": 1, "bos_token_id": None, "eos_token_id": 2}
    special, students = ["<unk>", "<pad>", "<eos>"], []
    for words in (True, False):
        tokenizer = Tokenizer(models.WordLevel(unk_token="<unk>") if words else models.BPE(unk_token="<unk>"))
        tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r" ?\d+| ?\w+|\n *| ?[^\w\s]"), "isolated")
        tokenizer.decoder = decoders.Fuse()
        kind, size = (trainers.WordLevelTrainer, 2000) if words else (trainers.BpeTrainer, 160)
        tokenizer.train_from_iterator(corpus, kind(vocab_size=size, special_tokens=special, show_progress=False))
        if not words:
            tokenizer.add_tokens([AddedToken(n, normalized=False) for n in numbers])
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", pad_token="<pad>",
                                            eos_token="<eos>")
        model = (LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), intermediate_size=256, **shape)) if words else
                 GPTNeoXForCausalLM(GPTNeoXConfig(vocab_size=len(tokenizer), intermediate_size=384, **shape)))
        ids = [torch.tensor([*tokenizer(text)["input_ids"], tokenizer.eos_token_id]) for text in sentences]
        optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, betas=(0.9, 0.98), weight_decay=0.01)
        for step in tqdm(range(400), desc=f"warm start of student {len(students)}", unit="step", leave=False):
            batch = [ids[i] for i in torch.randint(len(ids), (32,)).tolist()]
            x = nn.utils.rnn.pad_sequence(batch, batch_first=True, padding_value=-100)
            optimizer.param_groups[0]["lr"] = 4e-3 * lr_scale(step, 400, 0.05)
            model(input_ids=x.clamp(min=0), labels=x).loss.backward()
            clip_and_step(optimizer, 1.0)
        students.append((model, tokenizer))
    return students


# ---------------------------------------------------------------- data
def load_data(args):
    """-> training rows (graded, filtered), test questions, and the training rows before the filter.

    The split is by question, none is on both sides. stop() if nothing is left to train on.
    """
    test = tasks.read_questions(args.eval_questions) if args.eval_questions else None
    if args.paths:
        rows = judge.read_pool(args.paths)
    else:  # question sets of neighbouring seeds share no question
        rows = judge.demo_paths(judge.demo_questions(300, args.seed), args.seed)
        test = test or judge.demo_questions(300, args.seed + 1)
    raw = [row for row in rows if not {"prediction", "correct", "valid", "verdict"} <= row.keys()]
    judge.grade_paths(tqdm(raw, desc="grade paths", unit="path", leave=False, disable=not raw))
    for row in raw:
        row["valid"], verdict = judge.rule_judge(row) if row["task"] == "demo" else (None, None)
        row["verdict"] = verdict and {"rule": verdict}
    if args.filter == "full" and any(row["valid"] is None for row in rows):
        print("filter: step 2 was not run on this pool; judge.py --judge drops right answers with wrong steps")

    def source(row):  # rows that judge.py made from another question ("ID~...") stand on that question's side
        return row["id"].split("~")[0] if row.get("train_only") else row["id"]

    def text(row):
        return " ".join(row["question"].lower().split())
    ids = sorted({source(row) for row in rows})
    random.Random(args.seed).shuffle(ids)  # before --styles, so that ablations share their test questions
    if test is None:
        held_out = set(ids[:max(1, round(args.test_frac * len(ids)))])
        fields = ("id", "task", "question", "choices", "answer", "level")  # not `prompt`: the test has the plain one
        test = list({row["id"]: {k: row[k] for k in fields if k in row} for row in rows
                     if row["id"] in held_out and not row.get("train_only")}.values())
    if args.styles:
        styles = sorted({row["style"] for row in rows})
        if unknown := sorted(set(args.styles) - set(styles)):
            stop(f"--styles {' '.join(unknown)}: not in the pool, whose styles are {', '.join(styles)}")
        rows = [row for row in rows if row["style"] in args.styles]
    if not test:
        stop(f"{args.eval_questions or args.paths}: no test question; pass --eval_questions, or a larger --test_frac")
    test_ids, test_texts = {row["id"] for row in test}, {text(row) for row in test}
    tested = {source(row) for row in rows if source(row) in test_ids or text(row) in test_texts}
    if tested and args.eval_questions:
        print(f"left out {len(tested)} questions of the pool whose id or text stands in {args.eval_questions}")
    rows = [row for row in rows if source(row) not in tested]
    left = {source(row) for row in rows}
    ids = [i for i in ids if i in left]
    used = set(ids[:math.ceil(args.train_frac * len(ids))])
    rows = [row for row in rows if source(row) in used]
    if not rows:
        stop(f"{args.paths or 'the demo'}: no question is left to train on beside the {len(test)} test questions")
    kept = judge.filter_pool(rows, args.filter)
    if not kept:
        stop(f"no path is left to train on: of {len(rows)} training paths none passes --filter {args.filter}; "
             "judge.py --paths shows why")
    if not args.students and any(row["task"] != "demo" for row in kept + test):
        stop("the demo's tiny students know no other task: pass --students with Hugging Face models for this pool")
    return kept, test[:args.eval_limit or None], rows


def encode(rows, students):
    """Tokenise the pool once -> rows with `text` and, for each student, `prompts`, `responses` and `segments`.

    Prompt and response are tokenised apart and joined, so that generation starts from the very tokens trained on
    (open point 11). The response ends with the student's end token, which is trained (10).
    """
    out, prompts = [], [{} for _ in students]
    for start in tqdm(range(0, len(rows), 256), desc="tokenise", leave=False):
        part = [{**row, "text": row["path"].strip(), "prompts": [], "responses": []} for row in rows[start:start + 256]]
        spans = []
        for student, known in zip(students, prompts):
            # split_special_tokens: what looks like a special token in a path is text
            coded = student.tokenizer([row["text"] for row in part], return_offsets_mapping=True,
                                      return_attention_mask=False, return_token_type_ids=False,
                                      add_special_tokens=False, split_special_tokens=True)
            spans.append(coded["offset_mapping"])
            for row, ids in zip(part, coded["input_ids"]):
                prompt = tasks.student_prompt(row)
                if prompt not in known:
                    known[prompt] = np.array(tasks.encode_prompt(student.tokenizer, prompt), np.int32)
                row["prompts"].append(known[prompt])
                row["responses"].append(np.array([*ids, student.end], np.int32))
        for row, offsets in zip(part, zip(*spans)):
            fits = all(len(p) + len(r) <= s.max_len for p, r, s in zip(row["prompts"], row["responses"], students))
            if all(offsets) and fits:  # whole and with something to train on, else left out
                row["segments"], row["n_segments"] = qr.shared_segments(offsets)
                out.append(row)
    if len(out) < len(rows):
        print(f"left out {len(rows) - len(out)} of {len(rows)} paths: longer, with their prompt, than --max_len "
              "or a student's context")
    if not out:
        stop("no path and its prompt fit into --max_len tokens and the students' contexts: raise --max_len")
    return out


def embed(rows, args, device):
    """Eq 1 for the whole pool, once: (P, d) on the CPU, embeddings standardised and divided by their size, styles
    one-hot. The embeddings are kept on disk, path by path."""
    pairs = [(row["question"], row["text"]) for row in rows]
    if args.encoder == "hash":
        h = qr.hash_embed(tqdm([f"{question}\n{path}" for question, path in pairs], desc="embed paths", leave=False))
    else:
        keys = [hashlib.sha256(json.dumps(pair).encode()).digest() for pair in pairs]
        version = f"{args.encoder} {os.path.getmtime(args.encoder) if os.path.isdir(args.encoder) else ''}"
        cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "qr-distill"
        cache /= hashlib.sha256(version.encode()).hexdigest()[:20] + ".safetensors"
        saved = load_file(cache) if cache.is_file() else {}
        known = [bytes(key) for key in saved["keys"].numpy()] if saved else []
        new = dict(zip(keys, pairs))
        for key in known:
            new.pop(key, None)
        cache.parent.mkdir(parents=True, exist_ok=True)
        for start in range(0, len(new), 8192):  # saved as it grows: a kill does not cost hours
            some = [*new][start:start + 8192]
            parts = {"keys": torch.tensor([list(key) for key in some], dtype=torch.uint8),
                     "h": encode_new([new[key] for key in some], args, device)}
            saved = {name: torch.cat([saved[name], part]) if saved else part for name, part in parts.items()}
            save_atomic(saved, cache)
        row_of = {key: i for i, key in enumerate([*known, *new])}
        h = saved["h"][[row_of[key] for key in keys]]
    # / d: Adam moves all weights alike, so that d features together weigh about as much in a logit as the one style
    h = (h - h.mean(0)) / h.std(0, correction=0).clamp(min=1e-3) / h.shape[1]
    if args.style_input:
        styles = sorted({row["style"] for row in rows})
        one_hot = torch.tensor([[row["style"] == style for style in styles] for row in rows]).float()
        h = torch.cat([h, one_hot * len(styles) ** 0.5], 1)
    return h


def encode_new(pairs, args, device):
    """Eq 1 with a Hugging Face encoder for pairs (question, path) -> (P, d)."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(args.encoder)
        model = AutoModel.from_pretrained(args.encoder, dtype=torch.float32, use_safetensors=True).to(device).eval()
    except (OSError, ValueError) as e:
        stop(f"--encoder {args.encoder}: not an encoder that transformers can load ({' '.join(str(e).split())[:200]})")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    positions = getattr(model.config, "max_position_embeddings", 514) - 2  # RoBERTa has 514 for 512 tokens
    limit = min(512, tokenizer.model_max_length, positions)
    order = sorted(range(len(pairs)), key=lambda i: sum(map(len, pairs[i])))
    h = torch.empty(len(pairs), model.config.hidden_size)
    for part in tqdm([order[a:a + 32] for a in range(0, len(order), 32)], desc="embed paths", leave=False):
        h[part] = qr.encoder_embed(model, tokenizer, [pairs[i] for i in part], limit)
    return h


# ---------------------------------------------------------------- one student's forward pass over the paths that it got
def batches(lengths, max_tokens):
    """Yield row numbers, shortest rows first, in batches of at most `max_tokens` padded tokens (or of one row)."""
    batch = []
    for i in sorted(range(len(lengths)), key=lengths.__getitem__):
        if batch and (len(batch) + 1) * lengths[i] > max_tokens:
            yield batch
            batch = []
        batch.append(i)
    yield batch


def put(array, device):
    """Whole numbers on the device, to a GPU from pinned memory: nothing waits, the next batch is built meanwhile."""
    x = torch.from_numpy(array.astype(np.int64))
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x.to(device)


def response_states(student, prompts, responses, args):
    """Yield (batch, h): numbers of rows, and the states (N, D) that predict their response tokens, row after row.

    Sequences are padded on the right, where a causal model's real tokens cannot look: no attention mask is needed. The
    last token is predicted, never read. With --share_prompts the rows of one prompt are one sequence: the prompt once,
    then each response at the positions that it has alone, seeing the prompt and itself.
    """
    device, pad_to = student.model.device, 64 if args.compile or student.model.device.type == "cuda" else 1
    longest = max(len(prompt) + len(response) for prompt, response in zip(prompts, responses))
    window = getattr(student.model.config.get_text_config(), "sliding_window", None) or longest
    share = args.share_prompts and longest <= window  # one mask is right for all layers where no window cuts it
    groups, lengths, last = [], [], {}  # sequences: row numbers, tokens; the last one of each prompt
    for i, (prompt, response) in enumerate(zip(prompts, responses)):
        g = last.get(prompt.tobytes()) if share else None
        if g is None or lengths[g] + len(response) - 1 > args.forward_tokens:
            g = last[prompt.tobytes()] = len(groups)
            groups.append([])
            lengths.append(len(prompt))
        groups[g].append(i)
        lengths[g] += len(response) - 1
    for batch in batches(lengths, args.forward_tokens):
        width, more = -(-max(lengths[g] for g in batch) // pad_to) * pad_to, {}
        ids, position, own = np.zeros((3, len(batch), width), np.int64)  # own: 0 in a prompt, a response's number
        rows, where = [i for g in batch for i in groups[g]], []
        for b, g in enumerate(batch):
            n = end = len(prompts[groups[g][0]])
            ids[b, :n], position[b, :n] = prompts[groups[g][0]], np.arange(n)
            for k, i in enumerate(groups[g], 1):
                start, end = end, end + len(responses[i]) - 1
                ids[b, start:end], own[b, start:end] = responses[i][:-1], k
                position[b, start:end] = n + np.arange(end - start)
                where.append(b * width + np.r_[n - 1, start:end])  # prompt[-1] predicts [0]
        if len(rows) > len(batch):
            own = put(own, device)
            seen = ((own[:, None] == 0) | (own[:, None] == own[:, :, None])).tril()  # (B, query, key)
            mask = torch.zeros(seen.shape, dtype=student.model.dtype, device=device)  # added to the attention scores
            mask.masked_fill_(~seen, torch.finfo(mask.dtype).min)
            more = {"position_ids": put(position, device), "attention_mask": mask[:, None]}
        hidden = student.blocks(input_ids=put(ids, device), use_cache=False, **more).last_hidden_state
        yield rows, hidden.flatten(0, 1)[put(np.concatenate(where), device)]


def forward_paths(student, s, rows, base, args):
    """Run student number s over P rows -> nll (P,), a row's summed loss in nats; z (T, D) and segment (T,), the states
    on the text tokens of the co-routed rows and the shared segments that these tokens lie in.

    base (P,): number of a row's first shared segment, -1 if it is not co-routed.
    """
    h, target, owner, text, segment = [], [], [], [], []
    prompts, responses = ([row[name][s] for row in rows] for name in ("prompts", "responses"))
    for batch, states in response_states(student, prompts, responses, args):
        h.append(states)
        for i in batch:
            response = responses[i]
            target.append(response)
            owner.append(np.full(len(response), i))
            text.append((np.arange(len(response)) > 0) & (base[i] >= 0))  # state k has read response[k - 1]
            segment.append(rows[i]["segments"][s] + base[i] if base[i] >= 0 else [])
    h = torch.cat(h)  # (N, D), response positions only
    text = [np.flatnonzero(np.concatenate(text))]  # numbers and not a mask, whose size a GPU would be asked for
    target, owner, text, segment = (put(np.concatenate(x), h.device) for x in (target, owner, text, segment))
    nll = h.new_zeros(len(rows), dtype=torch.float32).index_add(0, owner, response_nll(student, h, target))
    return nll, h[text].float(), segment


@torch.no_grad()
def best_paths(rows, questions, students, args, rank=0, world=1):
    """--route nll, lalp, rsr, lark: alpha (P, S) with one path per question and student, by the students as they are.

    questions: for each the numbers of its rows. Each of `world` processes scores its share and all get all scores.
    """
    question = torch.empty(len(rows), dtype=torch.long)
    for q, paths in enumerate(questions):
        question[paths] = q
    scores = []
    for s, student in enumerate(students):
        student.model.eval()
        units = []  # (path, context, tokens to score): whole responses, or for lalp each step after the few before it
        for p, row in enumerate(rows):
            response, starts = row["responses"][s], [0]
            if args.route == "lalp":
                coded = student.tokenizer(row["text"], return_offsets_mapping=True, add_special_tokens=False,
                                          split_special_tokens=True)  # as in encode
                starts = qr.step_starts(row["text"], coded["offset_mapping"])
            for k, (start, end) in enumerate(itertools.pairwise([*starts, len(response)])):
                before = response[starts[max(0, k - qr.WINDOW)]:start]
                units.append((p, np.concatenate([row["prompts"][s], before]), response[start:end]))
        cost = torch.zeros(len(units), 3)
        _, context, scored = zip(*units[rank::world])
        share = cost[rank::world]  # a view
        with tqdm(total=len(share), desc=f"score paths, student {s}", leave=False) as bar:
            for batch, h in response_states(student, context, scored, args):
                target = put(np.concatenate([scored[i] for i in batch]), h.device)
                tokens = response_costs(student, h, target).cpu().split([len(scored[i]) for i in batch])
                share[batch] = torch.stack([x.mean(0) for x in tokens])
                bar.update(len(batch))
        if world > 1:  # so that all processes select alike
            cost = cost.to(student.model.device)
            dist.all_reduce(cost)
        path = torch.tensor([p for p, _, _ in units])
        scores.append(qr.SCORES[args.route](cost.cpu(), path, question))
    return qr.keep_best(torch.stack(scores, 1), question)


# ---------------------------------------------------------------- checkpoints: tensors and JSON, replaced atomically
def save_atomic(tensors, file, metadata=None):
    """Write a safetensors file such that a kill leaves the old one or the new one, never half of one."""
    part = Path(f"{file}.{os.getpid()}.part")  # several runs may fill the cache of embeddings
    save_file({k: v.detach().contiguous() for k, v in tensors.items()}, part, metadata=metadata)
    with open(part, "rb") as f:
        os.fsync(f.fileno())
    os.replace(part, file)


def write_atomic(text, file):
    """The same for text."""
    Path(f"{file}.part").write_text(text)
    os.replace(f"{file}.part", file)


def run_state(students, router, collab, optimizers, generator):
    """Every tensor that the rest of the run depends on, by name: weights, optimiser moments, random states."""
    modules = {"router": router, "collab": collab, **{f"student_{i}": s.model for i, s in enumerate(students)}}
    state = {f"{m}.{name}": p.data for m, module in modules.items() for name, p in module.named_parameters()
             if p.requires_grad or m == "collab"}
    for k, optimizer in enumerate(optimizers):
        for i, moments in optimizer.state_dict()["state"].items():
            state |= {f"optimizer_{k}.{i}.{name}": tensor for name, tensor in moments.items()}
    state |= {"rng.gates": generator.get_state(), "rng.cpu": torch.get_rng_state()}
    return state | ({"rng.cuda": torch.cuda.get_rng_state()} if torch.cuda.is_available() else {})


def load_state(file, students, router, collab, optimizers, generator):
    """Put a checkpoint back in place -> its metadata. It is safetensors: nothing is unpickled."""
    with safe_open(file, "pt") as f:
        saved, meta = {k: f.get_tensor(k) for k in f.keys()}, json.loads(f.metadata()["run"])  # noqa: SIM118
    moments = [{} for _ in optimizers]
    for name, tensor in saved.items():
        if name.startswith("optimizer_"):
            k, i, key = name.removeprefix("optimizer_").split(".")
            moments[int(k)].setdefault(int(i), {})[key] = tensor
    for optimizer, state in zip(optimizers, moments):
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    for name, tensor in run_state(students, router, collab, [], generator).items():
        if not name.startswith("rng."):
            tensor.copy_(saved[name])
    generator.set_state(saved["rng.gates"])
    torch.set_rng_state(saved["rng.cpu"])
    if "rng.cuda" in saved and torch.cuda.is_available():
        torch.cuda.set_rng_state(saved["rng.cuda"])
    return meta


# ---------------------------------------------------------------- the run
def lr_scale(step, steps, warmup):
    """Learning rate as a share of its maximum: linear warm-up, then a cosine down to a tenth."""
    rising = max(1, round(warmup * steps))
    if step < rising:
        return (step + 1) / rising
    return 0.1 + 0.45 * (1 + math.cos(math.pi * (step - rising) / max(1, steps - rising)))


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


def main(argv=None):
    """One run: filter, students, router, training, test, table. --out_dir gets everything but cached embeddings."""
    args = parse_args(argv)
    out = Path(args.out_dir)
    rank, local, world = (int(os.environ.get(name, "0")) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"))
    world = max(world, 1)  # torchrun sets all three
    try:
        auto = "cuda" if torch.cuda.is_available() else "cpu"
        device = torch.device(auto if args.device == "auto" else args.device)
        if device.type == "cuda" and (world > 1 or device.index is None):
            device = torch.device("cuda", local)  # under torchrun each process has a card of its own
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as e:
        stop(f"--device {args.device}: not a device of this machine ({str(e).splitlines()[0][:100]})")
    # Rows are sorted by length, so smaller passes pad less; a GPU wants them larger.
    args.forward_tokens = args.forward_tokens or (1024 if device.type == "cpu" else 4096)
    if device.type == "cuda":
        torch.cuda.set_device(device)  # so that the checkpoint's random state is this device's
    name = args.dtype if args.dtype != "auto" else "bf16" if device.type == "cuda" else "float32"
    amp_dtype = {"float32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[name]
    amp = contextlib.nullcontext() if amp_dtype is None else torch.autocast(device.type, amp_dtype)
    torch.manual_seed(args.seed)
    if world > 1:  # under torchrun all ranks route alike, each runs its share of the questions, rank 0 speaks and saves
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(hours=24))
        if rank:
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115
            tqdm.__init__ = partialmethod(tqdm.__init__, disable=True)

    # ---- the pool: filter, split, students in memory, everything tokenised and embedded once
    kept, test, before_filter = load_data(args)
    print("\nquality filter (training questions)")
    judge.filter_table(before_filter, args.filter)
    fates = dict(Counter(judge.fate(row, args.filter) for row in before_filter))
    digest = hashlib.sha256(json.dumps([kept, test]).encode()).hexdigest()
    students = load_students(args, device)
    S = len(students)
    rows = encode(kept, students)
    del before_filter, kept  # `rows` has what training needs
    styles = sorted({row["style"] for row in rows})
    questions = defaultdict(list)
    for p, row in enumerate(rows):
        questions[row["id"]].append(p)
    questions = list(questions.values())  # each a list of its paths' numbers in `rows`
    if rank:
        dist.barrier()  # rank 0 fills the cache
    with torch.random.fork_rng(devices=[]):  # a loaded encoder may draw numbers, a cache draws none
        h = embed(rows, args, device) if args.route == "learned" else torch.zeros(len(rows), 1)  # (P, d), Eq 1
    if world > 1 and not rank:
        dist.barrier()

    # ---- what trains: the students, the collaboration beside them, and the router
    router = qr.Router(h.shape[1], S, args.router_hidden)  # on the CPU: it decides which forwards are launched
    dims = [student.model.get_output_embeddings().weight.shape[1] for student in students]
    collab = qr.Collaboration(dims, args.shared_dim, args.projection == "trained", args.standardize, args.competence)
    collab = collab.to(device)
    collaborate = args.mutual_weight > 0 and S > 1
    trained = [([p for p in s.model.parameters() if p.requires_grad], s.lr, args.weight_decay) for s in students]
    trained += [([p for p in m.parameters() if p.requires_grad], lr, 0.0)
                for m, lr in ((collab, 1e-3), (router, args.router_lr))]
    optimizers = [torch.optim.AdamW(params or [torch.zeros(())], lr=lr, weight_decay=decay)  # a frozen student has none
                  for params, lr, decay in trained]
    scaler = torch.amp.GradScaler(device.type, enabled=amp_dtype == torch.float16)
    generator = torch.Generator().manual_seed(args.seed)  # of the gates
    reduced = [p for params, _, _ in trained[:-1] for p in params]  # what has a gradient of its own on every rank
    for p in reduced if world > 1 else ():
        dist.broadcast(p.data, 0)
    per_epoch = math.ceil(len(questions) / args.batch_size)
    steps = args.max_steps or args.epochs * per_epoch

    def evaluate():
        with amp:
            result = tasks.evaluate([(s.model, s.tokenizer) for s in students], test, args.eval_max_new_tokens,
                                    args.eval_batch_size, args.samples, seed=args.seed)
        return {k: v for k, v in result.items() if k != "predictions"}, result["predictions"]

    chosen = torch.ones(len(rows), S)  # --route all
    if args.route in qr.SCORES:  # here, where the students are untrained in a resumed run too
        with amp:
            chosen = best_paths(rows, questions, students, args, rank, world)  # (P, S)

    # ---- start, or go on where a killed run stopped
    checkpoint, log_file = out / "checkpoint.safetensors", out / "log.jsonl"
    state = (students, router, collab, optimizers, generator)
    run = {"step": 0, "tokens": [0] * S, "seconds": 0.0, "data": digest}
    if args.resume and checkpoint.is_file():
        run = load_state(checkpoint, *state)
        scaler.load_state_dict(run.pop("scaler", {}))
        if run["data"] != digest:
            stop(f"--resume {out}: pool or test questions have changed since that run; start a new one")
        if rank == 0:
            done = log_file.read_text().splitlines(keepends=True)[:run["step"]]  # what came after is done again
            write_atomic("".join(done), log_file)
    elif rank == 0:
        out.mkdir(parents=True, exist_ok=True)
        write_atomic(json.dumps({k: v for k, v in vars(args).items() if k != "resume"}, indent=1), out / "args.json")
        log_file.write_text("")
        run["before"] = evaluate()[0]
        save_atomic(run_state(*state), checkpoint, {"run": json.dumps(run)})

    for student in students:
        student.model.train(not student.frozen)
    bar = tqdm(range(run["step"], steps), desc="train", unit="step", initial=run["step"], total=steps)
    for step in bar:
        began = time.time()
        for optimizer, (_, lr, _) in zip(optimizers, trained):
            optimizer.param_groups[0]["lr"] = lr * lr_scale(step, steps, args.warmup)

        # the step's questions, each with all its paths
        epoch, k = divmod(step, per_epoch)
        order = torch.randperm(len(questions), generator=torch.Generator().manual_seed(args.seed * 1_000_003 + epoch))
        batch = [questions[i] for i in order[k * args.batch_size:(k + 1) * args.batch_size]]
        index = torch.tensor([p for paths in batch for p in paths])  # (P,) numbers in rows and h
        question = torch.tensor([q for q, paths in enumerate(batch) for _ in paths])  # (P,)

        # the router decides for the whole step before any student runs
        logits = router(h[index])  # (P, S)
        if args.route in ("learned", "random"):  # random: the same gates, all with the same odds
            odds = logits if args.route == "learned" else torch.full_like(logits, args.route_rate).logit(1e-6)
            alpha, soft = qr.GATES[args.gate](odds, args.tau, generator, question)  # Eq 2
        else:
            alpha = soft = chosen[index]
        drawn = alpha
        if args.route == "learned" and step < args.explore * steps:  # all to all: losses that no choice has shaped
            alpha = qr.straight_through(torch.ones_like(soft), soft)
        alpha = qr.at_least_one(alpha, soft, question)
        weight = qr.path_weights(alpha, question, args.normalize)  # (P, S): how a path's loss enters Eq 9
        routed = alpha.detach() > 0.5  # a pair that is not routed costs nothing from here on
        shared = (routed.sum(1) > 1) & collaborate  # (P,) co-routed
        length = torch.tensor([[len(r) for r in rows[p]["responses"]] for p in index])  # (P, S) response tokens

        # the students, a few questions at a time; the weights are the whole step's, so accumulation changes nothing
        size = args.micro_batch_size or math.ceil(args.batch_size / world)
        losses, logged = [], defaultdict(list)
        for q in range(rank * size, len(batch), world * size):
            here = ((question >= q) & (question < q + size)).nonzero().squeeze(1)  # this micro-batch's paths
            segments = torch.tensor([rows[p]["n_segments"] for p in index[here]])
            co = shared[here].nonzero().squeeze(1)  # C of them are co-routed
            base = torch.full((len(here),), -1)  # number of a co-routed path's first shared segment
            base[co] = segments[co].cumsum(0) - segments[co]
            loss, z, segment = torch.zeros((), device=device), [], []
            total = torch.zeros(len(here), S, device=device)  # summed losses, for the competence
            for s, student in enumerate(students):
                mine = routed[here, s].nonzero().squeeze(1)
                with amp, torch.set_grad_enabled(not student.frozen):
                    nll, z_s, segment_s = forward_paths(student, s, [rows[p] for p in index[here[mine]]],
                                                        base[mine].tolist(), args)
                mean = nll / length[here[mine], s].to(device)  # nll_ij of student s: nats per response token
                losses.append((here[mine], s, nll.detach()))
                total[mine.to(device), s] = nll.detach()
                z.append(z_s)
                segment.append(segment_s)
                if not student.frozen:
                    loss = loss + (weight.detach()[here[mine], s].to(device) * mean).sum()  # Eq 9: L_distill^(s)
            if len(co):
                path = torch.repeat_interleave(torch.arange(len(co)), segments[co]).to(device)
                per_segment = total[co.to(device)] / segments[co, None].to(device)  # comparable across tokenizers
                mutual, competence, gamma, raw, zt = collab(z, segment, path, routed[here[co]].to(device), per_segment)
                # l2 L_mutual of Eq 9, and what Eq 6 learns from
                loss = loss + (args.mutual_weight * mutual.sum() + competence.sum()) / shared.sum()
                chars = torch.tensor([len(rows[p]["text"]) for p in index[here[co]]])
                for name, value in (("mutual", mutual), ("gamma", gamma), ("segment_chars", chars / segments[co])):
                    logged[name].append(value.detach())
                if q == rank * size:  # so that neither collapse goes unseen (open point 8)
                    on = routed[here[co]][path.cpu()].to(device)  # (N, S)
                    states = [(raw[s, on[:, s]].detach(), zt[s, on[:, s]].detach()) for s in range(S)]
                    spread = [x.std(0, correction=0).nan_to_num().mean() for x, _ in states]  # nan: not a path of it
                    logged["spread"].append(torch.stack(spread)[None])
                    logged["rank"].append(torch.stack([qr.effective_rank(x) for _, x in states])[None])
            if loss.requires_grad:
                scaler.scale(loss).backward()

        # the router: the other half of the product rule, d L_distill / d alpha with the path losses as constants
        cost = torch.zeros(len(index), S, device=device)  # nats per path
        for where, s, nll in losses:
            cost[where.to(device), s] = nll
        if world > 1:  # the weights are the whole step's, so the sum over ranks is the gradient of one process
            dist.all_reduce(cost)
            flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in reduced])
            dist.all_reduce(flat)
            for p, grad in zip(reduced, flat.split([p.numel() for p in reduced])):
                p.grad = grad.view_as(p)
            if not shared.any():  # as in one process: no gradient, not a zero one, which Adam's momentum would follow
                collab.zero_grad()
        cost = cost.cpu()
        nll = cost / length  # per token
        p = {"binary": torch.sigmoid(logits), "onehot": torch.softmax(logits, -1), "categorical": drawn}[args.gate]
        per_student = args.entropy == "student"
        entropy = qr.balance_entropy(p if per_student else drawn, question, per_student)  # Eq 3 and Eq 4
        if args.route == "learned":
            cost = qr.fill_skipped(cost if args.reward == "sum" else nll, routed, question, args.normalize)  # (P, S)
            l_distill = (weight * (qr.interaction(cost) if args.reward == "interaction" else cost)).sum()
            (l_distill - args.entropy_weight * entropy).backward()  # Eq 9 departs: Eq 4 is maximised, so subtracted

        norms = [clip_and_step(optimizer, args.clip, scaler) for optimizer in optimizers[:-1]]
        router_norm = clip_and_step(optimizers[-1], args.clip)
        scaler.update()

        # one line per step
        seconds = time.time() - began
        tokens = (length * routed).sum(0).tolist()
        run["step"], run["seconds"] = step + 1, run["seconds"] + seconds
        run["tokens"] = [n + k * (not student.frozen) for n, k, student in zip(run["tokens"], tokens, students)]
        if rank:
            continue

        def over(rows, values):
            return (values[rows].sum(0) / routed[rows].sum(0).clamp(min=1)).tolist()  # noqa: B023
        of = {"style": defaultdict(list), "level": defaultdict(list)}  # numbers of the step's paths, by what rows have
        for i, p in enumerate(index):
            for key in of.keys() & rows[p].keys():
                of[key][str(rows[p][key])].append(i)
        line = {"step": step + 1, "epoch": epoch, "lr_scale": lr_scale(step, steps, args.warmup),
                "loss": over(slice(None), nll), "rate": routed.float().mean(0).tolist(),
                "co_routed": float(shared.float().mean()),
                "entropy": float(entropy.detach()) if args.route == "learned" else None,
                **{f"rate_{key}": {x: routed[i].float().mean(0).tolist() for x, i in sorted(paths.items())}
                   for key, paths in of.items()},
                "loss_style": {style: over(i, nll) for style, i in sorted(of["style"].items())},
                **{name: torch.cat(values).mean(0).tolist() for name, values in logged.items()},
                "grad_norm": norms[:S], "router_grad_norm": router_norm,
                "tokens_per_s": round(sum(tokens) / seconds, 1)}
        with open(log_file, "a") as f:
            f.write(json.dumps(line) + "\n")
        bar.set_postfix_str("loss " + " ".join(f"{x:.3f}" for x in line["loss"])
                            + ", rate " + " ".join(f"{x:.2f}" for x in line["rate"]))
        if (step + 1) % args.save_every == 0 or step + 1 == steps:
            save_atomic(run_state(*state), checkpoint, {"run": json.dumps(run | {"scaler": scaler.state_dict()})})

    # ---- the students on disk, the test, the table
    if rank:
        return
    (out / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in test))
    for i, student in enumerate(students):
        save_student(student, out / f"student_{i}")
    after, predictions = evaluate()
    (out / "predictions.jsonl").write_text("".join(json.dumps(prediction) + "\n" for prediction in predictions))
    last = [json.loads(line)["rate_style"] for line in log_file.read_text().splitlines()[-per_epoch:]]  # the last epoch
    results = {"students": [student.source for student in students],
               "before": run["before"], "after": after,
               "selection_rate": {style: np.mean([x[style] for x in last if style in x], 0).tolist() for style in styles
                                  if any(style in x for x in last)},
               "tokens_trained": run["tokens"], "seconds": round(run["seconds"], 1),
               "counts": {"steps": steps, "training_questions": len(questions), "training_paths": len(rows),
                          "filter": fates}}
    write_atomic(json.dumps(results, indent=1), out / "results.json")
    print_results(results, out)


def print_results(results, out):
    """The run's table: accuracy before and after, who got what, and where everything is."""
    before, after, counts = results["before"], results["after"], results["counts"]
    title = f"% right of {after['questions']} test questions"
    print(f"\n{title:40}{'before':>9}{'after':>9}{'unparsed':>10}{'stopped':>9}")
    for i, name in enumerate(results["students"]):
        print(f"{f'student {i} ({os.path.basename(name)})':40}{100 * before['accuracy'][i]:9.1f}"
              f"{100 * after['accuracy'][i]:9.1f}{100 * after['unparsed'][i]:10.1f}{100 * after['stopped'][i]:9.1f}")
    for key, label in (("ensemble", "ensemble of the students"), ("upper_bound", "upper bound: any student right")):
        print(f"{label:40}{100 * before[key]:9.1f}{100 * after[key]:9.1f}")
    columns = "".join(f"{f'student {i}':>11}" for i in range(len(results["students"])))
    print(f"\n{'selection rate in the last epoch':40}{columns}")
    for style, rates in results["selection_rate"].items():
        print(f"{style:40}" + "".join(f"{rate:11.2f}" for rate in rates))
    print(f"\n{counts['steps']} steps in {results['seconds']:.0f} s on {counts['training_questions']} questions with "
          f"{counts['training_paths']} paths; response tokens trained: "
          + ", ".join(f"{n:,}" for n in results["tokens_trained"])
          + f"\n{out}/ has results.json, log.jsonl, predictions.jsonl and the students")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        print("\nstopped; go on with: python distill.py --resume RUN_FOLDER", file=sys.stderr)
        raise SystemExit(130) from None
