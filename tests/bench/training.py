"""Speed and memory of distill.py and eval.py against the plain way and TRL: one process, alternating sides, medians.

    python tests/bench/training.py [--json FILE] [--only a,c,e] [--device cuda] [--rows 6] [--repeats 3]

Every side of a row has the same models, paths, device, type and threads (OMP_NUM_THREADS). ratio = ours / other: speeds
are better above 1, seconds and memory below. With QRD_MODELS and QRD_DATA: SmolLM2 135M, Gemma 3 270M, MiniLM and the
GSM8K pool, 16 GB and a quarter of an hour on two cores; else random small models and the demo's pool, which show that
it runs, not how fast. Memory needs Linux.

a  training step of both students, routed, against the plain way: every row padded to --max_len, full logits, every
   pair forwarded, the encoder run in every step       b  one student on all paths, against TRL's SFTTrainer with LoRA
c  both students with routing, against one after the other on all paths           d  peak memory of a, b, c, of a loss
e  greedy answers of up to --eval_max_new_tokens tokens, against model.generate in file order
f  share of the measured matrix-product peak that a step reaches
g  share of a step that router, alignment, mutual loss and the collapse log cost
h  rows packed into one sequence behind a dense mask, against our batches of rows of similar length       i  a prompt once
   for all its paths (--share_prompts), against our batches; then on half of the paths   k  a start over N paths, and again
l  a step with more paths, more students

Flags that are not the bench's are distill.py's: --gate categorical, --checkpointing ... Half of the pairs are routed here
(--gate binary); the default routes them all in its first phase and then one of each question.
"""
import argparse
import contextlib
import importlib.util
import json
import multiprocessing
import os
import random
import re
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
import distill
import eval as tasks
import judge
import router as qr


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


def load(args, rows, device):
    """What one step needs, as distill.main() sets it up -> a namespace."""
    students = distill.load_students(args, device)
    rows = distill.encode(rows, students)
    ids = list(dict.fromkeys(row["id"] for row in rows))
    question = torch.tensor([ids.index(row["id"]) for row in rows])
    length = torch.tensor([[len(x) for x in row["responses"]] for row in rows])  # (P, S) response tokens
    h = distill.embed(rows, args, device)
    router = qr.Router(h.shape[1], len(students))
    dims = [student.model.get_output_embeddings().weight.shape[1] for student in students]
    collab = qr.Collaboration(dims, args.shared_dim).to(device)
    for student in students:
        student.model.train()
    optimizers = [torch.optim.AdamW([p for p in m.parameters() if p.requires_grad], lr=1e-4)
                  for m in [*(s.model for s in students), collab, router]]
    encoder = None
    if args.encoder != "hash":
        encoder = (transformers.AutoModel.from_pretrained(args.encoder).to(device).eval(),
                   transformers.AutoTokenizer.from_pretrained(args.encoder))
    return SimpleNamespace(args=args, device=device, students=students, rows=rows, question=question, length=length,
                           h=h, router=router, collab=collab, optimizers=optimizers, encoder=encoder, method=[])


def amp(device):
    return torch.autocast("cuda", torch.bfloat16) if device.type == "cuda" else contextlib.nullcontext()


def now(device):
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


# ---------------------------------------------------------------- the sides: each makes one step and returns its units
def gates(b, repeat):
    """The router's part of a step; a repeat's seed gives all sides the same routed pairs."""
    logits = b.router(b.h)
    alpha, soft = qr.GATES[b.args.gate](logits, b.args.tau, torch.Generator().manual_seed(max(repeat, 0)), b.question)
    alpha = qr.at_least_one(alpha, soft, b.question)
    return logits, alpha, qr.path_weights(alpha, b.question), alpha.detach() > 0.5


def router_step(b, logits, alpha, weight, cost):
    p = torch.sigmoid(logits) if b.args.gate == "binary" else alpha
    entropy = qr.balance_entropy(p, b.question)
    ((weight * qr.fill_skipped(cost, alpha, b.question)).sum() - b.args.entropy_weight * entropy).backward()
    distill.clip_and_step(b.optimizers[-1], b.args.clip)


def our_step(b, repeat):
    """The loop of distill.main() for one batch, in one micro-batch -> trained response tokens.

    A copy, to be timed by parts: b.method gets the seconds of all that fine-tuning has not, L_mutual is differentiated
    up to z first. It has main()'s forwards, losses and backward passes; where main() gets others, a, c, d, g and l
    measure a step that nobody trains with.
    """
    began = now(b.device)
    logits, alpha, weight, routed = gates(b, repeat)
    segments, co = torch.tensor([row["n_segments"] for row in b.rows]), (routed.sum(1) > 1).nonzero().squeeze(1)
    base = torch.full((len(b.rows),), -1)
    base[co] = segments[co].cumsum(0) - segments[co]
    method = now(b.device) - began
    loss, z, segment, total = 0.0, [], [], torch.zeros(len(b.rows), len(b.students), device=b.device)
    for s, student in enumerate(b.students):
        mine = routed[:, s].nonzero().squeeze(1)
        with amp(b.device):
            nll, z_s, segment_s = distill.forward_paths(student, s, [b.rows[p] for p in mine], base[mine].tolist(),
                                                        b.args)
        total[mine.to(b.device), s] = nll.detach()
        loss = loss + (nll * (weight.detach() / b.length)[mine, s].to(b.device)).sum()
        z.append(z_s)
        segment.append(segment_s)
    began = now(b.device)
    leaves = [x.detach().requires_grad_() for x in z]
    if len(co):
        path = torch.repeat_interleave(torch.arange(len(co)), segments[co]).to(b.device)
        per_segment = total[co.to(b.device)] / segments[co, None].to(b.device)
        mutual, competence, _, _, zt = b.collab(leaves, segment, path, routed[co].to(b.device), per_segment)
        ((b.args.mutual_weight * mutual.sum() + competence.sum()) / len(co)).backward()
        torch.stack([qr.effective_rank(x.detach()) for x in zt])  # the collapse log of every step
    method += now(b.device) - began
    torch.autograd.backward([loss, *(x for x in z if len(co))], [None, *(x.grad for x in leaves if len(co))])
    for optimizer in b.optimizers[:-2]:
        distill.clip_and_step(optimizer, b.args.clip)
    began = now(b.device)
    distill.clip_and_step(b.optimizers[-2], b.args.clip)
    router_step(b, logits, alpha, weight, total.cpu())
    b.method.append(method + now(b.device) - began)
    return int(b.length[routed].sum())


def plain_step(b, repeat):
    """The step as it is first written: see the head of this file. Two rows per forward, a backward pass
    after each. It has no mutual loss, which is to its favour. -> the same trained response tokens."""
    pairs = [(row["question"], row["text"]) for row in b.rows]
    qr.encoder_embed(*b.encoder, pairs) if b.encoder else qr.hash_embed([f"{q}\n{p}" for q, p in pairs])
    logits, alpha, weight, routed = gates(b, repeat)  # from the cached embeddings: the very same pairs
    nll = torch.zeros(len(b.rows), len(b.students))
    width = b.args.max_len
    for s, student in enumerate(b.students):
        for part in torch.arange(len(b.rows)).split(2):
            ids, mask = np.zeros((len(part), width), np.int64), np.zeros((len(part), width), np.int64)
            labels = np.full((len(part), width), -100)
            for i, p in enumerate(part):
                prompt, response = b.rows[p]["prompts"][s], b.rows[p]["responses"][s]
                end = len(prompt) + len(response)
                ids[i, :end], mask[i, :end] = np.concatenate([prompt, response]), 1
                labels[i, len(prompt) - 1:end - 1] = response
            ids, mask, labels = (torch.from_numpy(x).to(b.device) for x in (ids, mask, labels))
            with amp(b.device):
                out = student.model(input_ids=ids, attention_mask=mask, use_cache=False).logits
            loss = F.cross_entropy(out.float().flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="none")
            loss = loss.view(labels.shape).sum(1) / (labels >= 0).sum(1)
            (loss * weight.detach()[part, s].to(b.device)).sum().backward()
            nll[part, s] = loss.detach().cpu()
            del out, loss
        distill.clip_and_step(b.optimizers[s], b.args.clip)
    router_step(b, logits, alpha, weight, nll * b.length)
    return int(b.length[routed].sum())


def alone_nll(b, s, share_prompts=False, packed=False):
    """Losses (P,) of all paths under student number s. packed: see packed_nll."""
    args = argparse.Namespace(**{**vars(b.args), "share_prompts": share_prompts})
    with amp(b.device):
        return packed_nll(b.students[s], s, b.rows, args) if packed else \
            distill.forward_paths(b.students[s], s, b.rows, [-1] * len(b.rows), args)[0]


def alone_step(b, s, **how):
    """Our step of student number s alone, on all paths, the losses by alone_nll -> trained response tokens."""
    (alone_nll(b, s, **how) / b.length[:, s].to(b.device)).mean().backward()
    distill.clip_and_step(b.optimizers[s], b.args.clip)
    return int(b.length[:, s].sum())


def packed_nll(student, s, rows, args):
    """Losses (P,) of rows that are concatenated into sequences of --forward_tokens behind a block mask: no padding.
    Not for layers with a sliding window."""
    sequences, size = [[]], 0
    for row in rows:
        n = len(row["prompts"][s]) + len(row["responses"][s]) - 1
        if size and size + n > args.forward_tokens:
            sequences.append([])
            size = 0
        sequences[-1].append(row)
        size += n
    losses = []
    for sequence in sequences:
        tokens = [np.concatenate([row["prompts"][s], row["responses"][s][:-1]]) for row in sequence]
        lengths = [len(x) for x in tokens]
        start = np.cumsum(lengths) - lengths
        where = [i + n - len(row["responses"][s]) + np.arange(len(row["responses"][s]))
                 for i, n, row in zip(start, lengths, sequence)]
        ids, position, owner, where, target = (torch.from_numpy(np.concatenate(x)).to(student.model.device) for x in (
            tokens, [np.arange(n) for n in lengths], [np.full(n, i) for i, n in enumerate(lengths)], where,
            [row["responses"][s] for row in sequence]))
        seen = (owner[:, None] == owner).tril()
        h = student.blocks(input_ids=ids[None], position_ids=position[None], attention_mask=seen[None, None],
                           use_cache=False).last_hidden_state[0, where]
        nll = distill.response_nll(student, h, target)
        losses += [x.sum() for x in nll.split([len(row["responses"][s]) for row in sequence])]
    return torch.stack(losses)


class Watch(transformers.TrainerCallback):
    """Seconds of TRL's optimiser step alone: not of train()'s start and end."""

    def on_step_begin(self, *args, **kwargs):
        self.began = now(self.device)

    def on_step_end(self, *args, **kwargs):
        self.seconds = now(self.device) - self.began


def trl_side(b, s):
    """TRL's SFTTrainer with PEFT LoRA on the same rows at its best settings -> a function that makes one step.

    Its own fused head (no full logits), length groups, no checkpointing, padding-free where FlashAttention is."""
    import datasets
    from peft import LoraConfig
    from trl import SFTConfig, SFTTrainer
    datasets.disable_progress_bars()
    cuda, student = b.device.type == "cuda", b.students[s]
    flash = cuda and transformers.utils.is_flash_attn_2_available()
    tokens = [(row["prompts"][s].tolist(), row["responses"][s].tolist()) for row in b.rows]
    data = datasets.Dataset.from_dict({"input_ids": [p + r for p, r in tokens],
                                       "labels": [[-100] * len(p) + r for p, r in tokens]})
    model = transformers.AutoModelForCausalLM.from_pretrained(
        student.source, dtype=torch.bfloat16 if cuda else torch.float32,
        attn_implementation="flash_attention_2" if flash else "sdpa")
    small = len(b.rows) if cuda else max(n for n in (1, 2, 3, 4) if len(b.rows) % n == 0)  # a CPU: less padding
    config = SFTConfig(
        output_dir=tempfile.gettempdir(), max_steps=1, per_device_train_batch_size=small,
        gradient_accumulation_steps=len(b.rows) // small, train_sampling_strategy="group_by_length", max_length=None,
        padding_free=flash, gradient_checkpointing=False, bf16=cuda, use_cpu=not cuda, learning_rate=1e-4,
        logging_strategy="no", save_strategy="no", report_to="none", disable_tqdm=True)
    watch = Watch()
    watch.device = b.device
    lora = LoraConfig(r=b.args.lora_rank, lora_alpha=b.args.lora_alpha, target_modules="all-linear",
                      task_type="CAUSAL_LM")
    trainer = SFTTrainer(model, config, train_dataset=data, processing_class=student.tokenizer, peft_config=lora,
                         callbacks=[watch])

    def step(repeat):
        with contextlib.redirect_stdout(None):
            trainer.train()
        return int(b.length[:, s].sum()), watch.seconds
    return step


def our_generate(student, prompts, max_new_tokens, batch_size, until=None):
    with amp(student.model.device):
        return len(tasks.generate(student.model, student.tokenizer, prompts, max_new_tokens, batch_size, until=until))


def plain_generate(student, prompts, max_new_tokens, batch_size):
    """model.generate in file order, left-padded to the batch's longest prompt -> number of questions."""
    model, device = student.model.eval(), student.model.device
    for start in range(0, len(prompts), batch_size):
        batch = prompts[start:start + batch_size]
        longest = max(map(len, batch))
        ids = torch.tensor([[0] * (longest - len(p)) + p for p in batch], device=device)
        mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in batch], device=device)
        with torch.no_grad(), amp(device):
            out = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=max_new_tokens, do_sample=False,
                                 eos_token_id=sorted({student.end, student.tokenizer.eos_token_id}), pad_token_id=0)
        student.tokenizer.batch_decode(out[:, longest:], skip_special_tokens=True)
    model.train()
    return len(prompts)


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


def peak(side, args, rows, device):
    """GB at the height of one step, weights included, libraries not (a GPU's, or this process's). Called in a child."""
    if side == "trl":
        importlib.import_module("trl")
    at_rest = memory("VmRSS")
    if side in ("our loss", "plain loss"):  # the head of Gemma 3 270M alone, 2048 response positions
        rows = torch.randint(2**18, (2048,), device=device)
        weight, h = torch.randn(2**18, 640, device=device), torch.randn(2048, 640, device=device, requires_grad=True)
        step = (lambda: distill.ChunkedNLL.apply(h, weight, None, rows, None).sum().backward()) if side == "our loss" \
            else lambda: F.cross_entropy(F.linear(h, weight), rows, reduction="sum").backward()
    else:
        b = load(args, rows, device)
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
    with open(file, "w") as f:
        for i in range(n):
            row, k = rows[i % len(rows)], i // len(rows)
            row = {**row, "id": f"{row['id']} {k}", "question": f"{row['question']} ({k})"}
            f.write(json.dumps(row) + "\n")
    os.environ["TOKENIZERS_PARALLELISM"] = "true"  # as in a run
    args = argparse.Namespace(**{**vars(args), "paths": file, "filter": "none", "test_frac": 1e-6})
    students = [SimpleNamespace(tokenizer=tokenizer, end=tasks.end_token(tokenizer), max_len=args.max_len)
                for tokenizer in map(transformers.AutoTokenizer.from_pretrained, args.students)]
    at_rest, began = memory("VmRSS"), time.perf_counter()
    with contextlib.redirect_stdout(None):
        rows = distill.encode(distill.load_data(args)[0], students)
    h = distill.embed(rows, args, torch.device("cpu"))
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
    one = SimpleNamespace(**{**vars(b), "rows": b.rows[:1], "length": b.length[:1]})
    b.students[s].model.set_attn_implementation("eager")
    with FlopCounterMode(display=False) as counter:
        alone_step(one, s)
    b.students[s].model.set_attn_implementation("sdpa")
    return counter.get_total_flops()


def matrix_product(device):
    """FLOPs of one large product, and its seconds at best of five."""
    n, dtype = (8192, torch.bfloat16) if device.type == "cuda" else (2048, torch.float32)
    x, y, seconds = torch.randn(n, n, dtype=dtype, device=device), torch.randn(n, n, dtype=dtype, device=device), []
    for _ in range(5):
        began = now(device)
        x @ y
        seconds.append(now(device) - began)
    return 2 * n**3, min(seconds)


# ---------------------------------------------------------------- the table
def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--json", metavar="FILE", help="write the table: a list of {name, ours, other, ratio, unit, device}")
    p.add_argument("--only", default="a,b,c,d,e,f,g,h,i,k,l", help="sections (all)")
    p.add_argument("--device", default="cpu", help="cpu, cuda (cpu)")
    p.add_argument("--rows", type=int, default=6, help="paths in a step (6)")
    p.add_argument("--repeats", type=int, default=3, help="times that each side runs (3)")
    p.add_argument("--questions", type=int, default=64, help="e: questions answered (64)")
    p.add_argument("--start_paths", type=int, default=4000, help="k: a start over N paths, and over 4 N (4000)")
    flags, more = p.parse_known_args()
    if not set(flags.only.split(",")) <= set("abcdefghikl"):
        tasks.stop(f"--only {flags.only}: the sections are a to i, k, l, with commas between")
    device, only, repeats = torch.device(flags.device), flags.only.split(","), flags.repeats
    names = ["smollm2", "gemma3"]
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    warnings.simplefilter("ignore", FutureWarning)  # TRL's own
    tmp = tempfile.TemporaryDirectory()
    os.environ |= {"TOKENIZERS_PARALLELISM": "false", "XDG_CACHE_HOME": tmp.name}  # forks; distill.embed's cache
    folder, data = Path(os.environ.get("QRD_MODELS") or tmp.name), os.environ.get("QRD_DATA")
    real = folder != Path(tmp.name)
    if not real:
        in_child(random_models, folder)
    try:
        where = f"cpu, {torch.get_num_threads()} threads"
        if device.type == "cuda":
            where = in_child(torch.cuda.get_device_name)
    except (RuntimeError, AssertionError) as e:
        tasks.stop(f"--device {flags.device}: not a device of this machine ({str(e).splitlines()[0][:100]})")

    def arguments(*names, paths=data and f"{data}/paths/gsm8k.jsonl"):
        # max_len: so that the plain way pads as much as the published code, 77 %; binary: half of the pairs are routed
        tokens = "1024" if device.type == "cpu" else "4096"
        pool = ["--paths", paths, "--max_len", "1024"] if data else ["--max_len", "256"]
        return distill.parse_args([
            *pool, "--students", *(str(folder / name) for name in names), "--out_dir", f"{tmp.name}/run", "--filter",
            "answer", "--encoder", str(folder / "minilm") if real else "hash", "--forward_tokens", tokens,
            "--gate", "binary", *more])
    args, table = arguments(*names), []
    kept, test, _ = distill.load_data(args)
    rows = pick(kept, flags.rows)
    has_trl = all(importlib.util.find_spec(x) for x in ("trl", "peft", "datasets"))
    if not has_trl:
        print("no comparison with TRL: pip install trl peft")
    questions = len({row["id"] for row in rows})
    print(f"{where}; {'real' if real else 'random small'} models; {len(rows)} paths of {questions} questions; "
          f"median of {repeats}\n{'':66}{'ours':>9}{'other':>9}{'ratio':>8}")

    def report(name, ours, other, unit):
        table.append({"name": name, "ours": ours, "other": other, "ratio": ours / other, "unit": unit, "device": where})
        print(f"{name:66}{ours:9.4g}{other:9.4g}{ours / other:8.3f}  {unit}", flush=True)
        if flags.json:  # row by row: a run that is stopped keeps what it has
            Path(flags.json).write_text(json.dumps(table, indent=1))

    if "d" in only:  # first, while this process is still empty
        few = rows[:2]  # the plain way's peak is that of one of its forwards
        for name in names:
            one = arguments(name)
            ours, plain = in_child(peak, "alone", one, rows, device), in_child(peak, "plain", one, few, device)
            report(f"d  peak, {name}: our step on all paths / plain", ours, plain, "GB")
            if has_trl:
                trl = in_child(peak, "trl", one, rows, device)
                report(f"d  peak, {name}: our step on all paths / TRL", ours, trl, "GB")
        joint = in_child(peak, "joint", args, rows, device)
        report("d  peak, both students: routed / plain", joint, in_child(peak, "plain", args, few, device), "GB")
        apart = in_child(peak, "alone", args, rows, device)
        report("d  peak, both students: routed / one after the other", joint, apart, "GB")
        report("d  peak, loss of 2048 tokens, vocabulary 262k: ours / plain",
               *(in_child(peak, side, args, None, device) for side in ("our loss", "plain loss")), "GB")
    if "k" in only:
        n, hashed = flags.start_paths / 1000, argparse.Namespace(**{**vars(args), "encoder": "hash"})
        few, many = (in_child(start, hashed, k * flags.start_paths, f"{tmp.name}/pool.jsonl") for k in (1, 4))
        report(f"k  start over {4 * n:g} thousand paths / {n:g}", many[0] / n / 4, few[0] / n, "s per 1000 paths")
        report("k  memory of a path / bytes of its tokens, segments, text, embedding",
               *((x - y) / n / 3 for x, y in zip(many[1:], few[1:])), "MB per 1000 paths")
        first, second = (in_child(start, args, 500, f"{tmp.name}/pool.jsonl")[0] for _ in range(2))
        report("k  second start over 500 paths with the encoder / first", second, first, "s")
    for name in names if "b" in only and has_trl else []:
        one = load(arguments(name), rows, device)
        plain, shared, other = alternate(repeats, device, lambda r, one=one: alone_step(one, 0),
                                         lambda r, one=one: alone_step(one, 0, share_prompts=True), trl_side(one, 0))
        report(f"b  {name} alone on all paths: ours / TRL", plain, other, "trained response tokens/s")
        report(f"b  {name} alone on all paths: --share_prompts / TRL", shared, other, "trained response tokens/s")
        del one

    def compare(label, rows, pool=args.paths, **how):  # with another forward pass, which gives the same losses
        one = load(arguments("smollm2", paths=pool), rows, device)
        with torch.no_grad():
            off = ((alone_nll(one, 0, **how) - alone_nll(one, 0)).cpu() / one.length[:, 0]).abs().max()
        assert off < (1e-4 if device.type == "cpu" else 0.1), f"{label}: another loss, by {off} nats per token"
        report(label, *alternate(repeats, device, lambda r: alone_step(one, 0, **how), lambda r: alone_step(one, 0)),
               "trained response tokens/s")
    if "h" in only:
        compare("h  smollm2: rows packed / our batches", rows, packed=True)
    for task in (("gsm8k", "strategyqa") if data else ("demo",)) if "i" in only else ():
        pool = data and f"{data}/paths/{task}.jsonl"
        some = pick(distill.load_data(arguments("smollm2", paths=pool))[0], 2 * flags.rows)
        for routed in (some, some[::2]):
            n = len({row["id"] for row in routed})
            compare(f"i  smollm2, {len(routed)} {task} paths of {n} questions: --share_prompts / not", routed, pool,
                    share_prompts=True)
    if "l" in only:
        again = [{**row, "id": row["id"] + " again"} for row in rows]
        sides = [load(arguments(*names), x, device) for names, x in (
            (["smollm2"], rows), (["smollm2"], rows + again), (["smollm2", "smollm2"], rows))]
        one, paths, twins = alternate(repeats, device, *(lambda r, b=b: our_step(b, r) for b in sides))
        report("l  smollm2: a step on twice the paths / on them", paths, one, "trained response tokens/s")
        report("l  smollm2 twice as two students / one student", twins, one, "trained response tokens/s")
        del sides
    if not {"a", "c", "e", "f", "g"} & set(only):
        return
    b = load(args, rows, device)
    if "a" in only:
        ours, other = alternate(repeats, device, lambda r: our_step(b, r), lambda r: plain_step(b, r))
        share = torch.stack([gates(b, r)[3].float().mean() for r in range(repeats)]).mean()
        report(f"a  both students, {share:.0%} of pairs routed: ours / plain", ours, other, "trained response tokens/s")
    if "c" in only:
        ours, other = alternate(repeats, device, lambda r: our_step(b, r) and 1,
                                lambda r: [alone_step(b, s) for s in range(2)] and 1)
        report("c  both students: routed together / one after the other", 1 / ours, 1 / other, "s/step")
    if "e" in only:
        student, rows_of, new = b.students[0], test[:flags.questions], args.eval_max_new_tokens if real else 64
        prompts = [tasks.encode_prompt(student.tokenizer, tasks.student_prompt(row)) for row in rows_of]
        until, n = [tasks.ASKED[tasks.TASKS[row["task"]]] for row in rows_of], args.eval_batch_size
        sides = [lambda r: our_generate(student, prompts, new, n, until),
                 lambda r: plain_generate(student, prompts, new, n), lambda r: plain_generate(student, prompts, new, 8)]
        ours, same, eight = alternate(repeats, device, *sides)
        report(f"e  smollm2 answers, {n} at a time / generate, {n}", ours, same, "questions/s")
        report(f"e  smollm2 answers, {n} at a time / generate, 8, as transformers has it", ours, eight, "questions/s")
    for s, name in enumerate(names if "f" in only else []):
        flops = step_flops(b.students[s], s, b.rows)
        ours, best = alternate(repeats, device, lambda r, s=s, n=flops: alone_step(b, s) and n,
                               lambda r: matrix_product(device))
        report(f"f  {name} alone: model FLOPs of a step / of a matrix product", ours / 1e9, best / 1e9, "GFLOP/s")
        report(f"f  {name}: FLOPs of one path by the recipe / as PyTorch counts them",
               step_flops(b.students[s], s, b.rows[:1]) / 1e9, counted_flops(b, s) / 1e9, "GFLOP")
    if "g" in only:
        b.method.clear()
        rate, = alternate(repeats, device, lambda r: our_step(b, r) and 1)
        report("g  router, alignment, mutual loss, collapse log / whole step", statistics.median(b.method[-repeats:]),
               1 / rate, "s/step")


if __name__ == "__main__":
    main()
