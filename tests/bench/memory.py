"""GPU memory of a training step of two 7B-class students (Mistral-7B-v0.3 and Gemma-7B, LoRA of rank 32).

    python tests/bench/memory.py                  # counted at the real shapes in fake tensors, in a minute
    python tests/bench/memory.py --device cuda    # and beside it the same step run with random weights

A step's tensors are counted as PyTorch makes and frees them (bf16 AMP, fused attention). Not counted: what kernels take
inside, the CUDA context, fragmentation (together below 1.5 GB).
"""
import argparse
import sys
import time
import weakref
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, GemmaConfig, MistralConfig

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import distill

SHAPES = [MistralConfig(vocab_size=32768, head_dim=128, sliding_window=None), GemmaConfig()]
RANK, WIDTH, FORWARD_PATHS, GB = 32, 768, 5, 1e9


def students(device, checkpointing):
    """Both students, random, as distill.py lays them out: a bf16 base under LoRA in float32."""
    made = []
    for config in reversed(SHAPES):  # the larger one is made first
        with torch.device(device):
            model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).train()
        distill.add_lora(model, RANK, 2.0 * RANK)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        made.append(SimpleNamespace(model=model, amp_dtype=torch.bfloat16))
    return made[::-1]


def step(students, paths):
    """distill's step without its bookkeeping: `paths` of 768 tokens (3/4 of them response) at each student, forward
    passes of 5 paths, the chunked loss, the states for the collaboration, one backward pass for all."""
    loss, shared = 0.0, []
    for s in students:
        ids, states = torch.zeros(paths, WIDTH, dtype=torch.long, device=s.model.device), []
        with torch.autocast(ids.device.type, torch.bfloat16):
            for batch in ids.split(FORWARD_PATHS):
                hidden = s.model.base_model(input_ids=batch, use_cache=False).last_hidden_state
                states.append(hidden[:, -(3 * WIDTH // 4):].flatten(0, 1))
            states = torch.cat(states)
            nll = distill.response_nll(s, states, ids[:, :3 * WIDTH // 4].flatten())
        shared.append(states.float())
        loss = loss + nll.mean() + shared[-1][:, :64].square().mean()
    del hidden, states
    loss.backward()


class Live(TorchDispatchMode):
    """Counts the bytes of all tensors made under it: `now`, and at their `peak`."""
    now, peak = 0, 0

    def free(self, key):
        self.now -= self.known.pop(key)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        given = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if torch.is_tensor(x)}
        for storage in (x.untyped_storage() for x in tree_leaves(out) if torch.is_tensor(x)):
            key = storage._cdata
            if key not in self.known and key not in given:  # else a view
                self.known[key] = storage.nbytes()
                self.now += storage.nbytes()
                weakref.finalize(storage, self.free, key)
        self.peak = max(self.peak, self.now)
        return out


def count(paths, checkpointing):
    """Bytes -> (of the frozen weights, of LoRA and AdamW's moments, of a step at its height beside these)."""
    # From fake positions nobody can see that rows are not packed.
    with mock.patch("transformers.masking_utils.find_packed_sequence_indices", lambda positions: None), \
            FakeTensorMode(allow_non_fake_inputs=True):
        both, live = students("cpu", checkpointing), Live()
        live.known = {}  # bytes of each storage that lives
        with live:
            step(both, paths)
        weights = [p for s in both for p in s.model.parameters()]
        lora = sum(3 * p.nbytes for p in weights if p.requires_grad)
        return sum(p.nbytes for p in weights if not p.requires_grad), lora, live.peak


def measure(device, paths, checkpointing):
    """GB at the height of three steps on a GPU, seconds of the last."""
    both = students(device, checkpointing)
    optimizer = torch.optim.AdamW([p for s in both for p in s.model.parameters() if p.requires_grad])
    torch.cuda.reset_peak_memory_stats(device)
    for _ in range(3):
        torch.cuda.synchronize(device)
        began = time.perf_counter()
        step(both, paths)
        optimizer.step()
        optimizer.zero_grad()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) / GB, time.perf_counter() - began


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--device", default="cpu", help="cuda: also run the steps there (cpu)")
    device = p.parse_args().device
    print("                   paths |  GB: base   LoRA   step    sum |    run seconds")
    for paths, checkpointing in ((2, False), (8, True)):
        sizes = count(paths, checkpointing)
        numbers = [size / GB for size in (*sizes, sum(sizes))]
        if device != "cpu":
            numbers += measure(device, paths, checkpointing)
        name = "--checkpointing" if checkpointing else "without"
        print(f"{name:18} {paths:5}    " + "".join(f"{x:7.1f}" for x in numbers), flush=True)


if __name__ == "__main__":
    main()
