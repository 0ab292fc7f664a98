"""Speed and memory against the plain way, TRL and generate: one process, alternating sides, medians.

    python tests/bench/speed.py [--only trl flops] [--dtypes float32 bf16] [--repeats 3] [--device cuda] [--json FILE]

Every side of a row has the same models, paths, device, type and threads (OMP_NUM_THREADS). ratio = ours / other: speeds
are better above 1, seconds and memory below. Ours is what the loop of distill.py calls: route, student_step, router_step.
With QRD_MODELS and QRD_DATA: SmolLM2 135M, Gemma 3 270M, MiniLM and the GSM8K pool, 16 GB and a quarter of an hour on two
cores; else random small models and the demo's pool, which show that it runs, not how fast. Memory needs Linux.

plain   a step of both students, routed, against the plain way: every row padded to --max_len, full logits, every pair
        forwarded, the encoder run in every step
trl     one student on all paths, against TRL's SFTTrainer with PEFT LoRA at its best settings
apart   both students with routing, against one after the other on all paths
memory  peak memory of these steps, and of the loss alone
flops   share of the measured matrix-product peak that a step reaches
types   each student on all paths, bf16 against float32 (where the device multiplies both fast), and bf16 with --compile
        against both, whose first step takes minutes and needs a C++ compiler
answers greedy answers of up to 100 tokens in batches of 32, against transformers' generate (generation.py has more)
method  a step of both students, against the same forwards and backwards without router and collaboration
start   a start over N paths, and over four times as many

Flags that are not the bench's are distill.py's. Half of the pairs are routed here, all are known to the router and
none is probed (--gate binary --reward sum --probe 0); the default routes one path of each question.
"""
import argparse
import contextlib
import importlib.util
import json
import multiprocessing
import os
import random
import re
import shutil
import statistics
import sys
import tempfile
import time
import warnings
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import generation

import distill
import eval as tasks
import judge
import router as qr

NAMES = ["smollm2", "gemma3"]
KINDS = {"float32": torch.float32, "bf16": torch.bfloat16}
# memory first: this process is empty then
SECTIONS = ["memory", "start", "types", "trl", "answers", "plain", "apart", "flops", "method"]


# ---------------------------------------------------------------- models and paths
def random_models(folder):
    """Save a small random Llama and Gemma 3 with the large vocabularies of the real ones and a byte-level tokenizer."""
    torch.manual_seed(0)
    coder = Tokenizer(models.BPE())
    coder.pre_tokenizer, coder.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=2000, special_tokens=["<pad>", "<eos>"], show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    coder.train_from_iterator(judge.demo_sentences(2000, 0), trainer)
    shape = {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4, "num_attention_heads": 4,
             "num_key_value_heads": 1, "head_dim": 32, "pad_token_id": 0, "bos_token_id": None, "eos_token_id": 1,
             "tie_word_embeddings": True}
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=coder, pad_token="<pad>", eos_token="<eos>")
    for name, config in (("smollm2", transformers.LlamaConfig(vocab_size=49152, **shape)),
                         ("gemma3", transformers.Gemma3TextConfig(vocab_size=262144, **shape))):
        transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)


def pick(rows, n):
    """n paths of whole random questions: the last question may lose some."""
    ids = sorted({row["id"] for row in rows})
    random.Random(0).shuffle(ids)
    of_id = {i: [row for row in rows if row["id"] == i] for i in ids[:n]}
    return [row for i in ids[:n] for row in of_id[i]][:n]


def load(args, rows):
    """What one step needs, as distill.main() sets it up -> a namespace."""
    device, amp_dtype = distill.set_up(args)
    students = distill.load_students(args, device, amp_dtype)
    rows = distill.encode(rows, students)
    ids = list(dict.fromkeys(row["id"] for row in rows))
    length = distill.response_lengths(rows)
    h = distill.embed(rows, students, length, args, device)
    router = qr.Router(h.shape[1], len(students))
    collab = qr.Collaboration([distill.hidden_size(student) for student in students]).to(device)
    optimizer, router_optimizer = distill.make_optimizers(students, collab, router, args)
    for student in students:
        student.model.train()
    encoder = None
    if args.encoder != "hash":
        encoder = (transformers.AutoModel.from_pretrained(args.encoder).to(device).eval(),
                   transformers.AutoTokenizer.from_pretrained(args.encoder))
    return SimpleNamespace(
        args=args, device=device, students=students, rows=rows, h=h, router=router, collab=collab, encoder=encoder,
        question=torch.tensor([ids.index(row["id"]) for row in rows]), optimizer=optimizer, length=length,
        router_optimizer=router_optimizer, scaler=torch.amp.GradScaler(device.type, enabled=False))


def now(device):
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


# ---------------------------------------------------------------- the sides: each makes one step and returns its units
def gates(b, repeat):
    """The router's part of a step -> logits, alpha, p, weight, routed; a repeat's seed gives all sides the same pairs."""
    generator = torch.Generator().manual_seed(max(repeat, 0))
    logits = b.router(b.h)
    alpha, p = distill.route(logits, b.question, None, generator, b.args)
    return logits, alpha, p, qr.path_weights(alpha, b.question), alpha.detach() > 0.5


def probed(b):
    return distill.probed_paths(b.question, b.args)


def finish(b):
    """The end of a step: gradients are clipped, the optimisers step."""
    for optimizer in (b.optimizer, b.router_optimizer):
        distill.clip_gradients(optimizer)
        optimizer.step()
        optimizer.zero_grad()


def our_step(b, repeat, collaborate=True):
    """A step of the loop -> trained response tokens. collaborate=False: its forwards and backwards alone."""
    logits, alpha, p, weight, routed = gates(b, repeat)
    args = b.args if collaborate else argparse.Namespace(**{**vars(b.args), "mutual_weight": 0})
    nll, _ = distill.student_step(b.students, b.collab, b.rows, b.question, routed, weight.detach(), b.scaler, args)
    if collaborate:
        distill.router_step(logits, alpha, p, weight, nll.cpu(), probed(b), b.length, b.question, args)
    finish(b)
    return int(b.length[routed].sum())


def alone_step(b, s):
    """A step of student number s alone on all paths -> trained response tokens."""
    routed = torch.zeros(b.length.shape, dtype=torch.bool)
    routed[:, s] = True
    distill.student_step(b.students, b.collab, b.rows, b.question, routed, routed / len(b.rows), b.scaler, b.args)
    finish(b)
    return int(b.length[:, s].sum())


def plain_step(b, repeat):
    """The step as it is first written: see the head of this file. Two rows per forward, a backward pass
    after each. It has no mutual loss, which is to its favour. -> the same trained response tokens."""
    pairs = [(row["question"], row["text"]) for row in b.rows]
    qr.encoder_embed(*b.encoder, pairs) if b.encoder else qr.hash_embed([f"{q}\n{p}" for q, p in pairs])
    logits, alpha, p, weight, routed = gates(b, repeat)  # from the cached embeddings: the very same pairs
    nll = torch.zeros(b.length.shape)
    for s, student in enumerate(b.students):
        for part in torch.arange(len(b.rows)).split(2):
            loss = plain_nll(student, s, [b.rows[p] for p in part], b.args.max_len)
            ((loss / b.length[part, s].to(b.device)) * weight.detach()[part, s].to(b.device)).sum().backward()
            nll[part, s] = loss.detach().cpu()
    distill.router_step(logits, alpha, p, weight, nll, probed(b), b.length, b.question, b.args)
    finish(b)
    return int(b.length[routed].sum())


def plain_nll(student, s, rows, width):
    """The summed losses (P,) of rows that are padded to `width`, from the logits of all positions."""
    ids, mask = np.zeros((2, len(rows), width), np.int64)
    labels = np.full((len(rows), width), -100)
    for i, row in enumerate(rows):
        prompt, response = row["prompts"][s], row["responses"][s]
        end = len(prompt) + len(response)
        ids[i, :end], mask[i, :end] = np.concatenate([prompt, response]), 1
        labels[i, len(prompt) - 1:end - 1] = response
    ids, mask, labels = (torch.from_numpy(x).to(student.model.device) for x in (ids, mask, labels))
    with distill.autocast(student):
        logits = student.model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    loss = F.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="none")
    return loss.view(labels.shape).sum(1)


class Watch(transformers.TrainerCallback):
    """Seconds of TRL's optimiser step alone: not of train()'s start and end."""

    def on_step_begin(self, *args, **kwargs):
        self.began = now(self.device)

    def on_step_end(self, *args, **kwargs):
        self.seconds = now(self.device) - self.began


def trl_side(b, s):
    """TRL's SFTTrainer with PEFT LoRA on the same rows at its best settings -> a function that makes one step.

    Its own fused head (no full logits), length groups, no checkpointing, padding-free where FlashAttention is, its
    weights in bf16 on a GPU and where its products are."""
    import datasets
    from peft import LoraConfig
    from trl import SFTConfig, SFTTrainer
    datasets.disable_progress_bars()
    student = b.students[s]
    cuda, bf16 = b.device.type == "cuda", student.amp_dtype == torch.bfloat16
    flash = cuda and transformers.utils.is_flash_attn_2_available()
    tokens = [(row["prompts"][s].tolist(), row["responses"][s].tolist()) for row in b.rows]
    data = datasets.Dataset.from_dict({"input_ids": [p + r for p, r in tokens],
                                       "labels": [[-100] * len(p) + r for p, r in tokens]})
    model = transformers.AutoModelForCausalLM.from_pretrained(
        student.source, dtype=torch.bfloat16 if cuda or bf16 else torch.float32,
        attn_implementation="flash_attention_2" if flash else "sdpa")
    small = len(b.rows) if cuda else max(n for n in (1, 2, 3, 4) if len(b.rows) % n == 0)  # a CPU: less padding
    config = SFTConfig(
        output_dir=tempfile.gettempdir(), max_steps=1, per_device_train_batch_size=small,
        gradient_accumulation_steps=len(b.rows) // small, train_sampling_strategy="group_by_length", max_length=None,
        padding_free=flash, gradient_checkpointing=False, bf16=bf16, use_cpu=not cuda, learning_rate=1e-4,
        logging_strategy="no", save_strategy="no", report_to="none", disable_tqdm=True)
    watch = Watch()
    watch.device = b.device
    lora = LoraConfig(r=b.args.lora_rank, lora_alpha=2 * b.args.lora_rank, target_modules="all-linear",
                      task_type="CAUSAL_LM")
    trainer = SFTTrainer(model, config, train_dataset=data, processing_class=student.tokenizer, peft_config=lora,
                         callbacks=[watch])

    def step(repeat):
        with contextlib.redirect_stdout(None):
            trainer.train()
        return int(b.length[:, s].sum()), watch.seconds
    return step


# ---------------------------------------------------------------- measuring
def alternate(repeats, device, *sides):
    """Run the sides in turn -> the median rate of each, in the units per second that it returns. A GPU warms up."""
    rates = [[] for _ in sides]
    for repeat in range(-1 if device.type == "cuda" else 0, repeats):
        for side, kept in zip(sides, rates):
            began = now(device)
            units = side(repeat)
            units, seconds = units if isinstance(units, tuple) else (units, now(device) - began)
            kept += [units / seconds] * (repeat >= 0)
    return [statistics.median(kept) for kept in rates]


def in_child(function, *args):
    """Call it in a fork of this process, which has loaded no model and started no thread or CUDA context yet."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("fork")) as pool:
        return pool.submit(function, *args).result()


def memory(what):
    return int(re.search(what + r":\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024 / 1e9


def loss_alone(side, device):
    """A function that makes the loss of 2048 positions at the head of Gemma 3 270M alone, and its gradient."""
    target = torch.randint(2**18, (2048,), device=device)
    weight, h = torch.randn(2**18, 640, device=device), torch.randn(2048, 640, device=device, requires_grad=True)
    if side == "our loss":
        return lambda: distill.ChunkedNLL.apply(h, weight, None, target, None).sum().backward()
    return lambda: F.cross_entropy(F.linear(h, weight), target, reduction="sum").backward()


def peak(side, args, rows):
    """GB at the height of one step, weights included, libraries not (a GPU's, or this process's). Called in a child."""
    if side == "trl":
        importlib.import_module("trl")
    at_rest = memory("VmRSS")
    device = distill.set_up(args)[0]
    if side.endswith("loss"):
        step = loss_alone(side, device)
    else:
        b = load(args, rows)
        trl = trl_side(b, 0) if side == "trl" else None
        step = {"joint": lambda: our_step(b, 0), "plain": lambda: plain_step(b, 0), "trl": lambda: trl(0),
                "alone": lambda: [alone_step(b, s) for s in range(len(b.students))]}[side]
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        step()
        return torch.cuda.max_memory_allocated() / 1e9
    Path("/proc/self/clear_refs").write_text("5")  # forget the height of loading
    step()
    return memory("VmHWM") - at_rest


def start(args, n, file):
    """A start up to the first step, without the models, over n training paths written to `file`, graded as judge.py
    leaves them: the pool's again and again, with ids and questions of their own. Called in a child -> seconds, MB that
    this process grew by, and MB of the paths' tokens, segments, texts and embeddings."""
    rows = judge.read_pool(args.paths) if args.paths else judge.demo_paths(judge.demo_questions(300, 0), 0)
    rows = [{**row, "valid": None, "verdict": None} for row in judge.grade_paths(rows)]
    with open(file, "w") as out:
        for i in range(n):
            row, k = rows[i % len(rows)], i // len(rows)
            row = {**row, "id": f"{row['id']} {k}", "question": f"{row['question']} ({k})"}
            out.write(json.dumps(row) + "\n")
    os.environ["TOKENIZERS_PARALLELISM"] = "true"  # as in a run
    args = argparse.Namespace(**{**vars(args), "paths": file, "filter": "none", "test_frac": 1e-6,
                                 "score_input": False})  # the students are their tokenizers alone
    students = [SimpleNamespace(tokenizer=tokenizer, end=tasks.end_token(tokenizer), max_len=args.max_len)
                for tokenizer in map(transformers.AutoTokenizer.from_pretrained, args.students)]
    at_rest, began = memory("VmRSS"), time.perf_counter()
    with contextlib.redirect_stdout(None):
        rows = distill.encode(distill.load_data(args)[0], students)
    h = distill.embed(rows, students, distill.response_lengths(rows), args, torch.device("cpu"))
    seconds = time.perf_counter() - began
    held = h.nbytes + sum(len(row["question"] + row["text"]) + sum(x.nbytes for key in ("responses", "segments")
                                                                   for x in row[key]) for row in rows)
    return seconds, (memory("VmRSS") - at_rest) * 1e3, held / 1e6


def step_flops(student, s, rows):
    """Model FLOPs of alone_step: real tokens only. Per weight and token 2 forward and 2 for the input's gradient, LoRA
    2 more for its own; attention 4 T^2 per head feature forward (Chowdhery et al., 2022: no causal half), 8 backward;
    the frozen head 2 and 2 per response token."""
    loras = [m for m in student.model.modules() if isinstance(m, distill.LoRA)]
    config, head = student.model.config.get_text_config(), student.model.get_output_embeddings().weight.numel()
    lengths = [len(row["prompts"][s]) + len(row["responses"][s]) - 1 for row in rows]
    base, lora = sum(m.base.weight.numel() for m in loras), sum(m.A.numel() + m.B.numel() for m in loras)
    features = config.num_hidden_layers * config.num_attention_heads * config.head_dim
    attention = 12 * features * sum(n * n for n in lengths)
    return sum(lengths) * (4 * base + 6 * lora) + attention + 4 * head * sum(len(row["responses"][s]) for row in rows)


def counted_flops(b, s):
    """The same of the first row alone, counted by PyTorch, which does not see a CPU's fused attention."""
    one = SimpleNamespace(**{**vars(b), "rows": b.rows[:1], "length": b.length[:1], "question": b.question[:1]})
    b.students[s].model.set_attn_implementation("eager")
    with FlopCounterMode(display=False) as counter:
        alone_step(one, s)
    b.students[s].model.set_attn_implementation("sdpa")
    return counter.get_total_flops()


def matrix_product(device, dtype):
    """FLOPs of one large product, and its seconds at best of five."""
    n = 8192 if device.type == "cuda" else 2048
    x, y = (torch.randn(n, n, dtype=dtype, device=device) for _ in range(2))
    seconds = []
    for _ in range(5):
        began = now(device)
        x @ y
        seconds.append(now(device) - began)
    return 2 * n**3, min(seconds)


# ---------------------------------------------------------------- the sections of the table
class Bench:
    """Flags, rows, and the table: report() adds to it."""

    def __init__(self, flags, more, folder, temporary, where):
        self.flags, self.more, self.folder, self.temporary, self.where = flags, more, folder, temporary, where
        self.data, self.table = os.environ.get("QRD_DATA"), []
        self.has_trl = all(importlib.util.find_spec(x) for x in ("trl", "peft", "datasets"))
        with contextlib.redirect_stdout(None):
            self.rows = pick(distill.load_data(self.arguments(*NAMES))[0], flags.rows)

    def arguments(self, *names, dtype="float32", compiled=False):
        """The flags of a run of these models. max_len: so that the plain way pads as much as the published code, 77 %;
        binary: half of the pairs are routed."""
        pool = ["--paths", f"{self.data}/paths/gsm8k.jsonl", "--max_len", "1024"] if self.data else ["--max_len", "256"]
        encoder = str(self.folder / "minilm") if (self.folder / "minilm").exists() else "hash"
        demo = [] if self.data else ["--paths", self.demo_pool()]
        return distill.parse_args([
            *pool, *demo, "--students", *(str(self.folder / name) for name in names), "--out_dir", f"{self.temporary}/run",
            "--filter", "answer", "--encoder", encoder, "--gate", "binary", "--reward", "sum", "--probe", "0", "--device", self.flags.device, "--dtype", dtype,
            *(["--compile"] if compiled else []), *self.more])

    def demo_pool(self):
        file = Path(self.temporary) / "demo.jsonl"
        if not file.exists():
            rows = judge.demo_paths(judge.demo_questions(60, 0), 0)
            file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(file)

    def report(self, name, ours, other, unit):
        self.table.append({"name": name, "ours": ours, "other": other, "ratio": ours / other, "unit": unit,
                           "device": self.where})
        print(f"{name:70}{ours:9.4g}{other:9.4g}{ours / other:8.3f}  {unit}", flush=True)
        if self.flags.json:  # row by row: a run that is stopped keeps what it has
            Path(self.flags.json).write_text(json.dumps(self.table, indent=1))

    def alternate(self, b, *sides):
        return alternate(self.flags.repeats, b.device, *sides)

    def memory(self, dtype):
        few = self.rows[:2]  # the plain way's peak is that of one of its forwards
        for name in NAMES:
            one = self.arguments(name, dtype=dtype)
            ours = in_child(peak, "alone", one, self.rows)
            self.report(f"peak, {name}, {dtype}: our step on all paths / plain", ours, in_child(peak, "plain", one, few), "GB")
            if self.has_trl:
                trl = in_child(peak, "trl", one, self.rows)
                self.report(f"peak, {name}, {dtype}: our step on all paths / TRL", ours, trl, "GB")
        both = self.arguments(*NAMES, dtype=dtype)
        joint, apart = (in_child(peak, side, both, self.rows) for side in ("joint", "alone"))
        self.report(f"peak, both, {dtype}: routed / plain", joint, in_child(peak, "plain", both, few), "GB")
        self.report(f"peak, both, {dtype}: routed / one after the other", joint, apart, "GB")
        ours, plain = (in_child(peak, side, both, None) for side in ("our loss", "plain loss"))
        self.report("peak, loss of 2048 tokens, vocabulary 262k: ours / plain", ours, plain, "GB")

    def start(self, dtype):
        if dtype != self.flags.dtypes[0]:
            return
        n, args, file = self.flags.start_paths, self.arguments(*NAMES), f"{self.temporary}/pool.jsonl"
        hashed = argparse.Namespace(**{**vars(args), "encoder": "hash"})
        few, many = (in_child(start, hashed, k * n, file) for k in (1, 4))
        self.report(f"start over {4 * n} paths / {n}", many[0] / n / 0.004, few[0] / n / 0.001, "s per 1000 paths")
        grown, held = ((x - y) / n / 0.003 for x, y in zip(many[1:], few[1:]))
        self.report("memory of a path / bytes of its tokens, segments, text, embedding", grown, held, "MB per 1000 paths")

    def trl(self, dtype):
        if not self.has_trl:
            print("no comparison with TRL: pip install trl peft datasets")
            return
        for name in NAMES:
            b = load(self.arguments(name, dtype=dtype), self.rows)
            ours, other = self.alternate(b, lambda r, b=b: alone_step(b, 0), trl_side(b, 0))
            self.report(f"{name} alone, {dtype}: ours / TRL", ours, other, "trained response tokens/s")

    def types(self, dtype):
        if dtype != self.flags.dtypes[-1] or len(self.flags.dtypes) < 2:
            return
        for name in NAMES:
            sides = [load(self.arguments(name, dtype=kind), self.rows) for kind in ("bf16", "float32")]
            if self.flags.device != "cpu" or shutil.which("g++"):
                sides.append(load(self.arguments(name, dtype="bf16", compiled=True), self.rows))
                alone_step(sides[-1], 0)  # compiles, before the clock runs
            bf16, float32, *compiled = self.alternate(sides[0], *(lambda r, b=b: alone_step(b, 0) for b in sides))
            self.report(f"{name} alone: ours in bf16 / ours in float32", bf16, float32, "trained response tokens/s")
            for rate in compiled:
                self.report(f"{name} alone: ours in bf16 with --compile / in float32", rate, float32, "trained response tokens/s")
                self.report(f"{name} alone: ours in bf16 with --compile / in bf16", rate, bf16, "trained response tokens/s")

    def answers(self, dtype):
        for name in NAMES:
            model, tokenizer = tasks.load_student(str(self.folder / name), self.flags.device, KINDS[dtype])
            prompts = [tasks.encode_prompt(tokenizer, tasks.student_prompt(row)) for row in generation.QUESTIONS[:64]]
            what = model, tokenizer, prompts, 32, 100
            sides = (lambda r, side=side, what=what: side(*what)[0] for side in (generation.ours, generation.theirs))
            ours, other = self.alternate(SimpleNamespace(device=model.device), *sides)
            self.report(f"{name}, {dtype}, answers to 64 questions: ours / generate", ours, other, "new tokens/s")

    def plain(self, dtype):
        b = load(self.arguments(*NAMES, dtype=dtype), self.rows)
        ours, other = self.alternate(b, lambda r: our_step(b, r), lambda r: plain_step(b, r))
        share = statistics.mean(float(gates(b, r)[3].float().mean()) for r in range(self.flags.repeats))
        self.report(f"both, {dtype}, {share:.0%} of pairs routed: ours / plain", ours, other, "trained response tokens/s")

    def apart(self, dtype):
        b = load(self.arguments(*NAMES, dtype=dtype), self.rows)
        ours, other = self.alternate(b, lambda r: our_step(b, r) and 1, lambda r: [alone_step(b, s) for s in range(2)] and 1)
        self.report(f"both, {dtype}: routed together / one after the other", 1 / ours, 1 / other, "s/step")

    def flops(self, dtype):
        b = load(self.arguments(*NAMES, dtype=dtype), self.rows)
        for s, name in enumerate(NAMES):
            n = step_flops(b.students[s], s, b.rows)
            ours, best = self.alternate(b, lambda r, s=s, n=n: alone_step(b, s) and n, lambda r: matrix_product(b.device, KINDS[dtype]))
            self.report(f"{name} alone, {dtype}: FLOPs of a step / of a matrix product", ours / 1e9, best / 1e9, "GFLOP/s")
            recipe = step_flops(b.students[s], s, b.rows[:1])
            self.report(f"{name}: FLOPs of one path by the recipe / as PyTorch counts them", recipe / 1e9,
                        counted_flops(b, s) / 1e9, "GFLOP")

    def method(self, dtype):
        b = load(self.arguments(*NAMES, dtype=dtype), self.rows)
        whole, bare = self.alternate(b, lambda r: our_step(b, r) and 1, lambda r: our_step(b, r, collaborate=False) and 1)
        self.report(f"both, {dtype}: a step / without router, alignment, mutual loss", 1 / whole, 1 / bare, "s/step")


def fast_types(device):
    """The types that a processor multiplies fast."""
    if device.startswith("cuda"):
        return ["bf16"]
    able = torch.cpu.get_capabilities()
    return ["float32", "bf16"] if able.get("avx512_bf16") or able.get("amx_bf16") else ["float32"]


def parse_flags():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.error = tasks.stop
    p.add_argument("--json", metavar="FILE", help="write the table: a list of {name, ours, other, ratio, unit, device}")
    p.add_argument("--only", nargs="+", choices=SECTIONS, default=SECTIONS, help="sections (all)")
    p.add_argument("--device", default="cpu", help="cpu, cuda (cpu)")
    p.add_argument("--dtypes", nargs="+", choices=["float32", "bf16"], help="types (those that the device multiplies fast)")
    p.add_argument("--rows", type=int, default=6, help="paths in a step (6)")
    p.add_argument("--repeats", type=int, default=3, help="times that each side runs (3)")
    p.add_argument("--start_paths", type=int, default=4000, help="start: over N paths, and over 4 N (4000)")
    flags, more = p.parse_known_args()
    flags.dtypes = flags.dtypes or fast_types(flags.device)
    return flags, more


def describe(device):
    """The device in words; called in a child, so that this process stays free of it."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    able = [name for name, there in torch.cpu.get_capabilities().items() if there is True and name.startswith(("avx", "amx"))]
    return f"cpu, {torch.get_num_threads()} threads, {', '.join(able)}"


def main():
    flags, more = parse_flags()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    warnings.simplefilter("ignore", FutureWarning)  # TRL's own
    with tempfile.TemporaryDirectory() as temporary:
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # forks
        folder = Path(os.environ.get("QRD_MODELS") or temporary)
        real = folder != Path(temporary)
        if not real:
            in_child(random_models, folder)
        try:
            where = in_child(describe, flags.device)
        except (RuntimeError, AssertionError) as e:
            tasks.stop(f"--device {flags.device}: not a device of this machine ({str(e).splitlines()[0][:100]})")
        bench = Bench(flags, more, folder, temporary, where)
        print(f"{where}; {'real' if real else 'random small'} models; {len(bench.rows)} paths of "
              f"{len({row['id'] for row in bench.rows})} questions; median of {flags.repeats}\n"
              f"{'':70}{'ours':>9}{'other':>9}{'ratio':>8}")
        for section in (section for section in SECTIONS if section in flags.only):
            for dtype in flags.dtypes:
                getattr(bench, section)(dtype)


if __name__ == "__main__":
    main()
