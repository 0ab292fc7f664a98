"""GPU memory of a training step of two 7B-class students (Mistral-7B-v0.3 and Gemma-7B, LoRA of rank 32), term by term.

    python tests/bench/memory.py                   # counted at the real shapes in fake tensors: no weights, no GPU, 2 minutes
    python tests/bench/memory.py --device cuda     # and beside it the same step run on a GPU with random weights

A step's tensors are counted as PyTorch makes and frees them (bf16 AMP, fused attention); a fake tensor has a shape and
no data. Not counted: what kernels take inside, the CUDA context, fragmentation; 1.5 GB are kept free for these. The
activations are also predicted from real tensors: those of small models of both architectures, scaled up.
"""
import argparse
import copy
import functools
import sys
import time
import weakref
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, GemmaConfig, MistralConfig

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import distill
import eval as tasks

SHAPES = {"Mistral-7B-v0.3": MistralConfig(vocab_size=32768, head_dim=128, sliding_window=None),
          "Gemma-7B": GemmaConfig()}  # the classes' defaults are these models
SMALL = {"Mistral-7B-v0.3": 8, "Gemma-7B": 16}  # what the small models' widths are divided by: one head for keys stays
NF4 = 0.5 + 1 / 64 + 4 / (64 * 256)  # bytes a weight: 4 bit, a scale of 8 bit for 64, one of 32 bit for 256 of these
RANK, FORWARD_TOKENS, FREE, GB = 32, 4096, 1.5, 1e9


def student(name, k=1, layers=None, device="cpu", checkpointing=False, nf4=False):
    """A random student of a shape whose widths and LoRA rank are divided by k, its base in bf16 or nf4."""
    config = copy.deepcopy(SHAPES[name])
    for x in ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads"):
        setattr(config, x, getattr(config, x) // k)
    config.num_hidden_layers = layers or config.num_hidden_layers
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).train()
    if nf4:
        quantize(model)
    distill.add_lora(model, RANK // k, 2.0 * RANK // k)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return SimpleNamespace(model=model, amp_dtype=torch.bfloat16)


def quantize(model):
    """What from_pretrained does with distill.nf4, for weights that are on no disk: layer by layer, in place."""
    from bitsandbytes.nn import Linear4bit, Params4bit
    for name, m in list(model.named_modules()):
        if type(m) is nn.Linear and m is not model.get_output_embeddings():
            new = Linear4bit(m.in_features, m.out_features, False, torch.bfloat16, quant_type="nf4", device="meta")
            new.weight = Params4bit(m.weight.data, quant_type="nf4", module=new).to(m.weight.device)
            m.weight = None  # free now, not at the end
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, new)


def step(students, rows, width):
    """distill's step without its bookkeeping: `rows` paths of `width` tokens (3/4 of them response) at each student,
    forward passes of 4096 tokens, the chunked loss, the states for the collaboration, one backward pass for all."""
    loss, states = 0.0, []
    for s in students:
        device, h = s.model.device, []
        with torch.autocast(device.type, torch.bfloat16):
            for ids in torch.zeros(rows, width, dtype=torch.long, device=device).split(max(1, FORWARD_TOKENS // width)):
                hidden = s.model.base_model(input_ids=ids, use_cache=False).last_hidden_state
                h.append(hidden[:, -(3 * width // 4):].flatten(0, 1))
            h = torch.cat(h)
            nll = distill.response_nll(s, h, torch.zeros(len(h), dtype=torch.long, device=device))
        states.append(h.float())
        loss = loss + nll.mean() + (states[-1] @ torch.ones(h.shape[1], 64, device=device)).square().mean()
    del hidden, h
    loss.backward()


class Live(TorchDispatchMode):
    """Counts the bytes of all tensors made under it: `now`, and at their `peak`."""

    def __init__(self):
        super().__init__()
        self.now, self.peak, self.bytes = 0, 0, {}

    def free(self, key):
        self.now -= self.bytes.pop(key)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        given, made = ([x.untyped_storage() for x in tree_leaves(tree) if isinstance(x, torch.Tensor)]
                       for tree in ((args, kwargs), out))
        for x in made:
            if x._cdata not in self.bytes and all(x._cdata != y._cdata for y in given):  # not a view
                self.bytes[x._cdata] = x.nbytes()
                self.now += x.nbytes()
                weakref.finalize(x, self.free, x._cdata)
        self.peak = max(self.peak, self.now)
        return out


def count(students, rows, width):
    """A step's bytes -> (activations kept for the backward pass, peak of all that is not weights and optimiser)."""
    weights = {x.untyped_storage()._cdata for s in students for x in (*s.model.parameters(), *s.model.buffers())}
    saved = {}

    def pack(x):
        if x.untyped_storage()._cdata not in weights:
            saved[x.untyped_storage()._cdata] = x.untyped_storage().nbytes()
        return x
    with Live() as live, torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        step(students, rows, width)
    return sum(saved.values()), live.peak


def predict(name, k, layers, rows, width):
    """Activations (bytes) at widths divided by k, from steps of real small models: what a token and a layer keep grows
    with the widths, what a layer keeps for any number of tokens (LoRA's weights in bf16) with their square."""
    (a, b), (c, d) = ([count([student(name, SMALL[name], n)], r, 64)[0] for r in (2, 4)] for n in (1, 2))
    token_layer, layer = (a - b - c + d) / 128, 2 * (c - a) - (d - b)
    token, rest = (b - a) / 128 - token_layer, 2 * a - b - layer
    grow, tokens = SMALL[name] / k, rows * width
    return rest + grow * tokens * token + layers * (grow**2 * layer + grow * tokens * token_layer)


@functools.cache
def counted(names, rows, width, checkpointing=False):
    """count() at the real shapes, in fake tensors; from their positions nobody can see that rows are not packed."""
    with mock.patch("transformers.masking_utils.find_packed_sequence_indices", lambda positions: None), \
            FakeTensorMode(allow_non_fake_inputs=True):
        return count([student(name, checkpointing=checkpointing) for name in names], rows, width)


def measure(device, *size, **more):
    """GB at the height of three steps on a GPU, all but the first with the optimiser's moments in place, and the seconds
    of the last."""
    students = [student(name, device=device, **more) for name in reversed(SHAPES)][::-1]  # the larger one first
    optimizers = [torch.optim.AdamW([p for p in s.model.parameters() if p.requires_grad]) for s in students]
    torch.cuda.reset_peak_memory_stats(device)
    for _ in range(3):
        torch.cuda.synchronize(device)
        began = time.perf_counter()
        step(students, *size)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) / GB, time.perf_counter() - began


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--device", default="cpu", help="cuda: also run the rows of the table that fit there (cpu)")
    p.add_argument("--batch", type=int, default=8, help="paths that each student gets in a step (8)")
    p.add_argument("--tokens", type=int, default=768, help="tokens of a path with its prompt (768)")
    flags = p.parse_args()
    gpu = flags.device != "cpu"
    if gpu and not torch.cuda.is_available():
        tasks.stop(f"--device {flags.device}: there is no GPU here; without the flag the step is counted")
    with FakeTensorMode():
        models = [student(name).model for name in SHAPES]
    linear = [m.base.weight.numel() for model in models for m in model.modules() if isinstance(m, distill.LoRA)]
    lora = sum(x.numel() for model in models for x in model.parameters() if x.requires_grad)
    whole = sum(x.numel() for model in models for x in model.parameters()) - lora
    print(f"GB for {' and '.join(SHAPES)}, {whole / 1e9:.1f}e9 frozen weights; LoRA: {lora / 1e6:.0f}e6, float32, with\n"
          f"AdamW's moments; a step of {flags.batch} paths of {flags.tokens} tokens at each student; fits: {FREE} GB left\n"
          f"\n{'':20}{'micro-batch':>13}{'base':>7}{'LoRA':>6}{'activations':>13}{'others':>8}{'sum':>7}{'80 GB':>7}"
          f"{'24 GB':>7}" + f"{'run':>7}{'s':>7}" * gpu)
    for nf4, checkpointing in ((False, False), (False, True), (True, False), (True, True)):
        base, n = 2 * (whole - nf4 * sum(linear)) + nf4 * NF4 * sum(linear), 2 * flags.batch
        fits = [False, False]
        # smaller micro-batches, until it fits where the base alone does
        while n > 1 and not all(fit or base / GB > card for fit, card in zip(fits, (80, 24))):
            n //= 2
            saved, peak = counted(tuple(SHAPES), n, flags.tokens, checkpointing)
            others = peak - saved + nf4 * 2 * max(linear)  # nf4: one layer's weights at a time in bf16
            total = (base + 12 * lora + saved + others) / GB
            fits = [total + FREE <= card for card in (80, 24)]
            run = ""
            if gpu and total + FREE < torch.cuda.mem_get_info(flags.device)[1] / GB:
                height, seconds = measure(flags.device, n, flags.tokens, checkpointing=checkpointing, nf4=nf4)
                run = f"{height:7.1f}{seconds:7.2f}"
            print(f"{('nf4' if nf4 else 'bf16') + ' --checkpointing' * checkpointing:20}{n:13}{base / GB:7.1f}"
                  f"{12 * lora / GB:6.1f}{saved / GB:13.1f}{others / GB:8.1f}{total:7.1f}"
                  + "".join(f"{'fits' if fit else '-':>7}" for fit in fits) + run, flush=True)
    for name, config in SHAPES.items():
        layers, saved = config.num_hidden_layers, counted((name,), flags.batch, flags.tokens)[0]
        print(f"{name}: {saved / flags.batch / flags.tokens / layers / 1e3:.0f} KB of activations per token and layer; "
              f"predicted from small models / counted: "
              f"{predict(name, 1, layers, flags.batch, flags.tokens) / saved:.3f}", flush=True)


if __name__ == "__main__":
    main()
