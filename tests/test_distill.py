"""Claims about the training run, against F.cross_entropy, Hugging Face's loss, PEFT and the run that nobody killed."""
import copy
import json
import os
import pathlib
import random
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from functools import partial
from types import SimpleNamespace

import numpy as np
import peft
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    BertModel,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    PhiConfig,
    PreTrainedTokenizerFast,
)

import distill
import eval as tasks
import judge

ROOT = pathlib.Path(distill.__file__).parent
CHATML = ("{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
          "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
WORDS, PIECES = r" ?\d+| ?[^\W\d]+|\n *| ?[^\w\s]", r" ?\d| ?[^\W\d]{1,3}|\s|[^\w\s]"


class Killed(BaseException):
    """What a test raises where the process dies."""


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# ---------------------------------------------------------------- tiny students and a pool
def tiny_model(kind, vocab=60, n_positions=1024, **more):
    """A random causal LM with weights large enough that its logits are far from uniform."""
    torch.manual_seed(len(kind))
    small = {
        "vocab_size": vocab, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
        "intermediate_size": 24, "max_position_embeddings": 1024, "initializer_range": 0.3, "bos_token_id": None,
        "eos_token_id": 1, "pad_token_id": 2,
    }
    grouped = {"num_key_value_heads": 1, "head_dim": 8}
    config = {
        "llama": lambda: LlamaConfig(**small, **grouped, tie_word_embeddings=True, **more),
        "untied": lambda: LlamaConfig(**small, **grouped, tie_word_embeddings=False, **more),
        "neox": lambda: GPTNeoXConfig(**small, attention_bias=False, tie_word_embeddings=False, **more),
        "gpt2": lambda: GPT2Config(
            vocab_size=vocab, n_embd=16, n_layer=2, n_head=2, n_positions=n_positions, initializer_range=0.3,
            bos_token_id=None, eos_token_id=1, pad_token_id=2, **more,
        ),
        "gemma2": lambda: Gemma2Config(**small, **grouped, final_logit_softcapping=2.0, sliding_window=8, **more),
        "gemma3": lambda: Gemma3TextConfig(**small, **grouped, sliding_window=8, **more),
        "phi": lambda: PhiConfig(**small, **more),
    }[kind]()
    model = AutoModelForCausalLM.from_config(config)
    for name, p in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(p, std=0.3)  # zero at birth, so that nobody would miss them
    return model.eval()


def tiny_tokenizer(corpus, pattern=WORDS, template=None, pad="<pad>"):
    tokenizer = Tokenizer(models.WordLevel(unk_token="<unk>"))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Split(Regex(pattern), "isolated"), decoders.Fuse()
    special = ["<unk>", "<eos>", "<pad>", "<|im_start|>", "<|im_end|>"]
    tokenizer.train_from_iterator(
        corpus, trainers.WordLevelTrainer(vocab_size=9999, special_tokens=special, show_progress=False)
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<eos>", pad_token=pad,
                                        additional_special_tokens=special[3:])
    tokenizer.chat_template = template
    return tokenizer


def write_jsonl(file, rows):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A pool of 24 demo questions with six paths each and, by name, the folders of five tiny random students."""
    folder = tmp_path_factory.mktemp("world")
    rows = judge.demo_paths(judge.demo_questions(24, 0), 0)
    corpus = [text for row in rows for text in (tasks.student_prompt(row), row["path"])] + [
        "user\n", "assistant\n", "Q", "MARK", "\n",
    ]
    students = {}
    for name, kind, tokenizer in (
        ("words", "llama", tiny_tokenizer(corpus)), ("pieces", "neox", tiny_tokenizer(corpus, PIECES)),
        ("dropout", "gpt2", tiny_tokenizer(corpus, PIECES)),
        ("chat", "gemma3", tiny_tokenizer(corpus, WORDS, CHATML)),
        ("pad_is_eos", "untied", tiny_tokenizer(corpus, WORDS, None, "<eos>")),
    ):
        students[name] = str(folder / name)
        tiny_model(kind, len(tokenizer)).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return SimpleNamespace(rows=rows, students=students, pool=write_jsonl(folder / "pool.jsonl", rows))


@pytest.fixture
def train(world, tmp_path, monkeypatch):
    """train(*flags, students=...) runs distill.main in its own folder -> that folder, and the students in memory."""
    memory, load = [], distill.load_students

    def load_and_keep(*a):
        memory[:] = load(*a)
        return memory

    monkeypatch.setattr(distill, "load_students", load_and_keep)

    def run(*flags, students=("words", "pieces"), name="run"):
        distill.main(flags_of(world, tmp_path / name, *flags, students=students))
        return SimpleNamespace(out=tmp_path / name, students=list(memory), **files_of(tmp_path / name))

    return run


BINARY = ("--gate", "binary", "--reward", "loss", "--no-style_input", "--probe", "0", "--router_lr", "0.1")


def flags_of(world, out, *flags, students=("words", "pieces")):
    return [
        "--lora_rank", "0", "--lr", "1e-2", "--max_steps", "3", "--batch_size", "4", "--eval_limit", "3",
        "--eval_max_new_tokens", "3", "--device", "cpu", "--dtype", "float32", "--paths", world.pool, "--students",
        *(world.students.get(s, s) for s in students), "--out_dir", str(out), *map(str, flags),
    ]


def files_of(out):
    """What a run leaves: results and log without their clocks, and every student's tensors."""
    results = json.loads((out / "results.json").read_text())
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    for line in log:
        del line["tokens_per_s"]
    del results["seconds"], results["versions"]
    weights = {str(f.relative_to(out)): load_file(f) for f in sorted(out.glob("student_*/*.safetensors"))}
    return {"results": results, "log": log, "weights": weights, "predictions": (out / "predictions.jsonl").read_text()}


def same_tensors(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def same_run(a, b):
    assert a["results"] == b["results"] and a["log"] == b["log"] and a["predictions"] == b["predictions"]
    assert a["weights"] and a["weights"].keys() == b["weights"].keys()
    assert all(same_tensors(a["weights"][k], b["weights"][k]) for k in a["weights"])


# ---------------------------------------------------------------- the loss is cross-entropy
def loss_and_gradients(nll, h, weight, bias, g):
    """g . nll, and its gradient with respect to whatever is trained."""
    nll.backward(g)
    return [nll.detach()] + [x.grad for x in (h, weight, bias) if x is not None and x.grad is not None]


def in_chunks(monkeypatch, size=None):
    """Chunks of `size` positions instead of at least 16 -> a list that gets the positions of each chunk's logits."""
    if size:
        monkeypatch.setattr(distill, "max", lambda *a: size, raising=False)
    mm, seen = torch.mm, []
    monkeypatch.setattr(torch, "mm", lambda weight, h, out: seen.append(h.shape[1]) or mm(weight, h, out=out))
    return seen


@pytest.mark.parametrize("n", [1, 6, 7, 8, 14, 15])  # around chunks of 7
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("trained", [False, True])
def test_chunked_loss_equals_cross_entropy_in_value_and_gradient(monkeypatch, n, softcap, bias, trained):
    chunks = in_chunks(monkeypatch, 7)
    r = torch.Generator().manual_seed(n)
    h, weight, b, g = (torch.randn(*shape, generator=r) for shape in ((n, 5), (11, 5), (11,), (n,)))
    target = torch.randint(11, (n,), generator=r)

    def leaves(dtype):
        return (h.detach().to(dtype, copy=True).requires_grad_(), weight.to(dtype, copy=True).requires_grad_(trained),
                b.to(dtype, copy=True).requires_grad_(trained) if bias else None)

    ours = leaves(torch.float32)
    got = loss_and_gradients(distill.ChunkedNLL.apply(*ours, target, softcap), *ours, g)
    assert chunks == [min(7, n - a) for a in range(0, n, 7)] * (1 + trained)  # a trained head computes its logits twice
    theirs = leaves(torch.float64)
    logits = F.linear(*theirs)
    logits = softcap * torch.tanh(logits / softcap) if softcap else logits
    expected = loss_and_gradients(F.cross_entropy(logits, target, reduction="none"), *theirs, g.double())
    assert len(got) == len(expected) == 2 + trained * (1 + bias)
    for x, y in zip(got, expected):
        assert x.dtype == torch.float32 and torch.allclose(x.double(), y, rtol=1e-5, atol=1e-6)


def test_chunked_loss_in_float64_is_as_exact_as_its_float32_logits():
    r = torch.Generator().manual_seed(0)
    h, weight = (
        torch.randn(*shape, generator=r, dtype=torch.float64, requires_grad=True) for shape in ((9, 4), (30, 4))
    )
    target = torch.randint(30, (9,), generator=r)
    ours = torch.autograd.grad(distill.ChunkedNLL.apply(h, weight, None, target, None).sum(), (h, weight))
    theirs = torch.autograd.grad(F.cross_entropy(h @ weight.T, target, reduction="sum"), (h, weight))
    assert all(x.dtype == torch.float64 and torch.allclose(x, y, rtol=1e-6, atol=1e-6) for x, y in zip(ours, theirs))


def test_a_vocabulary_of_262k_takes_several_chunks_and_still_equals_cross_entropy(monkeypatch):
    r = torch.Generator().manual_seed(0)
    h, weight = torch.randn(260, 2, generator=r), torch.randn(262_144, 2, generator=r)
    target = torch.randint(262_144, (260,), generator=r)
    chunks = in_chunks(monkeypatch)
    h.requires_grad_()
    nll = distill.ChunkedNLL.apply(h, weight, None, target, None)
    nll.sum().backward()
    assert chunks == [256, 4]
    for i in (0, 1, 254, 255, 256, 259):
        x = h[i].detach().double().requires_grad_()
        expected = F.cross_entropy((weight.double() @ x)[None], target[i:i + 1])
        assert torch.allclose(nll[i].double(), expected, atol=1e-5)
        assert torch.allclose(h.grad[i].double(), torch.autograd.grad(expected, x)[0], atol=1e-5)


@pytest.mark.parametrize("trained", [False, True])
def test_no_tensor_ever_holds_all_logits(monkeypatch, trained):
    in_chunks(monkeypatch, 7)
    sizes = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            sizes.extend(
                x.numel() for x in (out if isinstance(out, (tuple, list)) else [out]) if isinstance(x, torch.Tensor)
            )
            return out

    h, weight = torch.randn(70, 3, requires_grad=True), torch.randn(90, 3, requires_grad=trained)
    with Watch():
        distill.ChunkedNLL.apply(h, weight, None, torch.arange(70), None).sum().backward()
    assert max(sizes) == 7 * 90


def fake_rows(lengths, vocab, students=1):
    """Tokenised rows with random ids, every token its own segment: (prompt, response) lengths; the end token is 1."""
    r = np.random.default_rng(0)
    return [{"prompts": [r.integers(3, vocab, p) for _ in range(students)], "n_segments": n - 1,
             "responses": [np.append(r.integers(3, vocab, n - 1), 1) for _ in range(students)],
             "segments": [np.arange(n - 1, dtype=np.int32) for _ in range(students)]} for p, n in lengths]


def as_student(model):
    return SimpleNamespace(model=model, blocks=model.base_model, frozen=False, amp_dtype=None, end=1, source="X")


ARCHITECTURES = ["llama", "untied", "gpt2", "neox", "gemma2", "gemma3", "phi"]
LENGTHS = [(5, 9), (1, 2), (12, 20), (3, 3), (30, 4), (2, 31), (7, 1)]


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_path_loss_equals_hugging_face_loss_with_labels_in_value_and_gradient(monkeypatch, kind):
    monkeypatch.setattr(distill, "batches", partial(small_batches, distill.batches))
    model = tiny_model(kind)
    rows = fake_rows(LENGTHS, 60)
    nll, _, _ = distill.forward_paths(as_student(model), 0, rows, [-1] * len(rows))
    weight = torch.linspace(0.5, 2, len(rows))
    (weight * nll).sum().backward()
    ours = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    for i, row in enumerate(rows):  # alone, so without padding; -100 is Hugging Face's "not supervised"
        prompt, response = (torch.from_numpy(row[k][0]) for k in ("prompts", "responses"))
        labels = torch.cat([torch.full_like(prompt, -100), response])
        loss = model(input_ids=torch.cat([prompt, response])[None], labels=labels[None]).loss * len(response)
        assert torch.allclose(nll[i], loss, rtol=1e-4, atol=1e-4)
        (weight[i] * loss).backward()
    assert len(ours) > 10
    for name, p in model.named_parameters():
        assert torch.allclose(ours[name], p.grad, rtol=1e-3, atol=1e-3 * float(p.grad.abs().max()) + 1e-5), name


def small_batches(batches, lengths, _):
    """Several padded batches, one of them a single row."""
    return batches(lengths, 60)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma3"])
def test_collaboration_gets_the_states_on_the_text_tokens_of_co_routed_paths_only(kind):
    model = tiny_model(kind)
    rows = fake_rows(LENGTHS, 60)
    base = [0, -1, 8, 27, -1, 29, -1]  # paths 0, 2, 3 and 5; each response's end token is no text
    _, z, segment = distill.forward_paths(as_student(model), 0, rows, base)
    assert len(z) == len(segment) == 8 + 19 + 2 + 30 and sorted(segment.tolist()) == list(range(59))
    for i, start in enumerate(base):
        if start >= 0:
            prompt, response = (torch.from_numpy(rows[i][k][0]) for k in ("prompts", "responses"))
            ids = torch.cat([prompt, response])[None]
            states = model(input_ids=ids, output_hidden_states=True).hidden_states[-1][0]
            where = ((segment >= start) & (segment < start + len(response) - 1)).nonzero().squeeze(1)
            assert torch.allclose(z[where], states[len(prompt):-1], atol=1e-4)


def tiny(kind, **more):
    """A tiny random model of any family."""
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(
        kind, vocab_size=60, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
        intermediate_size=24, initializer_range=1.0, pad_token_id=2, bos_token_id=None, eos_token_id=1, **more)).eval()


def test_students_with_capped_or_scaled_logits_are_accepted():
    for model in (*map(tiny_model, ARCHITECTURES), tiny("cohere", logit_scale=0.0625), tiny("granite", logits_scaling=8.0)):
        distill.check_student(as_student(model))


def test_student_whose_head_does_something_else_is_refused(capsys):
    model = tiny("cohere", logit_scale=0.0625)
    model.config.logit_scale = 1.0  # the module keeps its own
    with pytest.raises(SystemExit) as e:
        distill.check_student(as_student(model))
    assert e.value.code == 2 and "head" in capsys.readouterr().err


def test_lora_says_where_it_does_not_reach(capsys):
    for kind, reached in (("llama", True), ("mixtral", False)):
        model = tiny(kind, **({} if reached else {"num_local_experts": 4}))
        distill.add_lora(model, 2, 4)
        distill.say_reach_of_lora(model, "X")
        assert ("LoRA reaches" in capsys.readouterr().out) != reached


@pytest.mark.parametrize("max_tokens", [1, 10, 64, 10_000])
def test_batches_hold_every_row_once_within_the_padded_budget(max_tokens):
    lengths = np.random.default_rng(0).integers(1, 40, 50).tolist()
    parts = list(distill.batches(lengths, max_tokens))
    assert sorted(i for part in parts for i in part) == list(range(50))
    assert all(len(part) == 1 or len(part) * max(lengths[i] for i in part) <= max_tokens for part in parts)


# ---------------------------------------------------------------- LoRA is PEFT's
def ours_and_pefts(kind, rank=4, alpha=6):
    """The same model adapted by us and by PEFT ("all-linear": every linear layer but the output head), same weights."""
    model = tiny_model(kind, attn_pdrop=0, resid_pdrop=0, embd_pdrop=0) if kind == "gpt2" else tiny_model(kind)
    theirs = peft.get_peft_model(
        copy.deepcopy(model),
        peft.LoraConfig(
            r=rank, lora_alpha=alpha, target_modules="all-linear", lora_dropout=0.0, task_type="CAUSAL_LM",
            fan_in_fan_out=kind == "gpt2",
        ),
    )
    distill.add_lora(model, rank, alpha)
    layers = {name: m for name, m in model.named_modules() if isinstance(m, distill.LoRA)}
    adapted = {name.removeprefix("base_model.model."): m for name, m in theirs.named_modules() if hasattr(m, "lora_A")
               and isinstance(m, peft.tuners.lora.LoraLayer)}
    assert layers.keys() == adapted.keys() and len(layers) >= 8
    for name, m in layers.items():
        torch.nn.init.normal_(m.B, std=0.3)  # zero at birth
        adapted[name].lora_A["default"].weight.data = m.A.data.clone()
        adapted[name].lora_B["default"].weight.data = m.B.data.clone()
    return model, theirs, layers, adapted


@pytest.mark.parametrize("kind", ["llama", "untied", "gpt2", "neox", "gemma3"])
def test_lora_output_and_gradients_equal_pefts(kind):
    model, theirs, layers, adapted = ours_and_pefts(kind)
    ids = torch.randint(60, (3, 9), generator=torch.Generator().manual_seed(0))
    a, b = model(input_ids=ids, labels=ids), theirs(input_ids=ids, labels=ids)
    assert torch.allclose(a.logits, b.logits, atol=1e-5)
    a.loss.backward(), b.loss.backward()
    for name, m in layers.items():
        for x, y in ((m.A, adapted[name].lora_A), (m.B, adapted[name].lora_B)):
            assert y["default"].weight.grad.abs().max() > 0
            assert torch.allclose(x.grad, y["default"].weight.grad, rtol=1e-4, atol=1e-6), name


@pytest.mark.parametrize("kind", ["llama", "untied", "gpt2", "neox", "gemma3"])
def test_lora_changes_nothing_at_birth_and_trains_nothing_but_its_two_matrices(kind):
    model = tiny_model(kind)
    ids = torch.arange(3, 20)[None]
    before = model(input_ids=ids).logits
    distill.add_lora(model, 4, 8)
    assert torch.equal(before, model(input_ids=ids).logits)
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trained and all(name.rpartition(".")[2] in "AB" for name in trained)
    assert not isinstance(model.get_output_embeddings(), distill.LoRA) and not isinstance(
        model.get_input_embeddings(), distill.LoRA
    )
    linear = (torch.nn.Linear, distill.Conv1D)
    assert [m for m in model.modules() if isinstance(m, linear) and not any(
        m is x.base for x in model.modules() if isinstance(x, distill.LoRA))] == [model.get_output_embeddings()]


@pytest.mark.parametrize("students", [("words", "dropout"), ("chat", "pieces")])
def test_saved_adapter_loads_in_peft_with_identical_logits(train, students):
    run = train("--lora_rank", 4, "--lr", 0.05, students=students)
    ids = torch.arange(5, 45).view(2, 20)
    for i, name in enumerate(students):
        folder, memory = run.out / f"student_{i}", run.students[i].model.eval()
        with torch.no_grad():
            trained = memory(input_ids=ids).logits
        base = AutoModelForCausalLM.from_pretrained(run.students[i].source)
        assert not torch.allclose(trained, base(input_ids=ids).logits, atol=1e-2)
        model = peft.PeftModel.from_pretrained(base, folder)
        assert torch.equal(model(input_ids=ids).logits, trained)
        saved = load_file(folder / "adapter_model.safetensors")
        assert saved.keys() == peft.get_peft_model_state_dict(model).keys()  # PEFT would write the very same names
        report = peft.set_peft_model_state_dict(model, saved)
        assert not report.unexpected_keys and not [k for k in report.missing_keys if "lora_" in k]
        merged, tokenizer = tasks.load_student(str(folder))
        assert torch.allclose(merged(input_ids=ids).logits, trained, atol=1e-3)
        assert tokenizer("We get 3").input_ids == run.students[i].tokenizer("We get 3").input_ids
        assert tokenizer.chat_template == run.students[i].tokenizer.chat_template


def test_adapter_that_peft_would_load_otherwise_is_saved_with_a_warning(tmp_path, capsys):
    for kind, warned in (("llama", False), ("deepseek_v3", True)):
        model = tiny_model("llama")
        distill.add_lora(model, 2, 4)
        model.config.model_type = kind
        layers = {name: m for name, m in model.named_modules() if isinstance(m, distill.LoRA)}
        distill.save_adapter(layers, SimpleNamespace(model=model, source="X", fingerprint=None), tmp_path)
        assert ("PEFT" in capsys.readouterr().out) == warned


def test_fully_trained_student_loads_with_from_pretrained_and_identical_logits(train):
    run = train(students=("words", "pad_is_eos"))
    ids = torch.arange(5, 45).view(2, 20)
    for i, student in enumerate(run.students):
        with torch.no_grad():
            trained = student.model.eval()(input_ids=ids).logits
        for model in (
            AutoModelForCausalLM.from_pretrained(run.out / f"student_{i}"),
            tasks.load_student(str(run.out / f"student_{i}"))[0],
        ):
            assert torch.equal(model(input_ids=ids).logits, trained)


# ---------------------------------------------------------------- what is supervised
def supervised(monkeypatch, tokenizer, rows, end, model=None):
    """For each path, what one student reads and what it's asked to predict: [(prompt ids, predicted ids)]."""
    student = SimpleNamespace(
        model=model or tiny_model("llama", len(tokenizer)), tokenizer=tokenizer, end=end, frozen=False, max_len=10_000,
        amp_dtype=None,
    )
    student.blocks, seen = student.model.base_model, []
    coded = distill.encode(rows, [student])
    assert [row["path"] for row in coded] == [row["path"] for row in rows]
    plain = distill.response_nll

    def record(student, h, target):
        seen[-1]["target"] = target.tolist()
        return plain(student, h, target)

    def read(module, args, kwargs):
        seen.append({"ids": kwargs["input_ids"][0].tolist()})

    monkeypatch.setattr(distill, "response_nll", record)
    handle = student.model.base_model.register_forward_pre_hook(read, with_kwargs=True)
    for row in coded:  # one at a time: the input is the row and nothing else
        distill.forward_paths(student, 0, [row], [-1])
    seen, one_by_one = [], seen
    handle.remove()
    whole = []
    monkeypatch.setattr(
        distill, "response_nll", lambda s, h, target: whole.append(target.tolist()) or h.new_zeros(len(h))
    )
    distill.forward_paths(student, 0, coded, [-1] * len(coded))
    assert Counter(whole[0]) == Counter(t for one in one_by_one for t in one["target"])  # padding adds no target
    out = []
    for one in one_by_one:
        n = len(one["target"])
        assert one["ids"][len(one["ids"]) - n + 1:] == one["target"][:-1]  # teacher forcing, the end token is not read
        out.append((one["ids"][:len(one["ids"]) - n + 1], one["target"]))
    return out


def check_supervision(monkeypatch, tokenizer, rows, end, model=None):
    for row, (prompt, target) in zip(rows, supervised(monkeypatch, tokenizer, rows, end, model), strict=True):
        assert target[-1] == end and target.count(end) == 1
        assert (
            tokenizer.decode(target[:-1], skip_special_tokens=False, clean_up_tokenization_spaces=False)
            == row["path"].strip()
        )
        assert prompt == tasks.encode_prompt(tokenizer, tasks.student_prompt(row))


def test_base_student_predicts_the_path_and_eos_and_nothing_else(monkeypatch, world):
    tokenizer = AutoTokenizer.from_pretrained(world.students["words"])
    assert tasks.end_token(tokenizer) == tokenizer.eos_token_id
    check_supervision(monkeypatch, tokenizer, world.rows, tokenizer.eos_token_id)


def test_eos_is_supervised_also_where_it_is_the_pad_token(monkeypatch, world):
    tokenizer = AutoTokenizer.from_pretrained(world.students["pad_is_eos"])
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == tasks.end_token(tokenizer)
    check_supervision(monkeypatch, tokenizer, world.rows, tokenizer.eos_token_id)


def test_chat_student_predicts_the_path_and_the_end_of_its_turn(monkeypatch, world):
    tokenizer = AutoTokenizer.from_pretrained(world.students["chat"])
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert end != tokenizer.eos_token_id and end == tasks.end_token(tokenizer)
    check_supervision(monkeypatch, tokenizer, world.rows, end)
    prompt, target = supervised(monkeypatch, tokenizer, world.rows[:1], end)[0]
    whole = tokenizer.apply_chat_template([{"role": "user", "content": tasks.student_prompt(world.rows[0]).strip()},
                                           {"role": "assistant", "content": world.rows[0]["path"]}], tokenize=False)
    assert tokenizer.decode(prompt + target) == whole.rstrip()  # the template's own idea of this conversation


@pytest.mark.parametrize("name, end", [("smollm2", "<|im_end|>"), ("gemma3", "<eos>")])
def test_pretrained_students_predict_the_path_and_their_end_token(monkeypatch, models_dir, name, end):
    tokenizer = AutoTokenizer.from_pretrained(models_dir / name)
    rows = [
        {"id": str(i), "task": "gsm8k", "question": "How many?", "answer": "4", "path": path}
        for i, path in enumerate(
            [
                "2 + 2 = 4\nThe answer is 4", "  Naïve 数学 🙂🙂, so 12,345.67%.\n\n\tThe answer is 4 ",
                "<<2*2=4>>4\n#### 4", "four",
            ]
        )
    ]
    model = tiny_model("llama", len(tokenizer))
    check_supervision(monkeypatch, tokenizer, rows, tokenizer.convert_tokens_to_ids(end), model)
    prompt = tasks.encode_prompt(tokenizer, tasks.student_prompt(rows[0]))
    assert tokenizer.decode(prompt).startswith({"smollm2": "<|im_start|>", "gemma3": "<bos>"}[name])


def test_prompt_of_a_row_overrides_the_task_prompt_in_training_too(monkeypatch, world):
    tokenizer = AutoTokenizer.from_pretrained(world.students["words"])
    rows = [{**world.rows[0], "prompt": "Facts: Tom has 3 apples"}]
    prompt, _ = supervised(monkeypatch, tokenizer, rows, tokenizer.eos_token_id)[0]
    assert prompt == tokenizer("Facts: Tom has 3 apples")["input_ids"]


def test_a_row_longer_than_max_len_is_left_out_and_said_so(world, capsys):
    tokenizer = AutoTokenizer.from_pretrained(world.students["words"])
    lengths = [
        len(tokenizer(tasks.student_prompt(r))["input_ids"]) + len(tokenizer(r["path"])["input_ids"]) + 1
        for r in world.rows
    ]
    limit = sorted(lengths)[len(lengths) // 2]
    kept = distill.encode(world.rows, [SimpleNamespace(tokenizer=tokenizer, end=1, max_len=limit)])
    assert [r["path"] for r in kept] == [r["path"] for r, n in zip(world.rows, lengths) if n <= limit]
    assert f"left out {len(lengths) - len(kept)} of {len(lengths)}" in capsys.readouterr().out


def test_a_row_longer_than_a_students_context_is_left_out(world, tmp_path, train):
    tokenizer = AutoTokenizer.from_pretrained(world.students["words"])
    longest = max(len(tasks.encode_prompt(tokenizer, tasks.student_prompt(r))) for r in world.rows)
    tiny_model("gpt2", len(tokenizer), n_positions=longest + 32).save_pretrained(tmp_path / "short")
    tokenizer.save_pretrained(tmp_path / "short")
    counts = train("--filter", "none", "--max_steps", 8, students=(str(tmp_path / "short"), "words")).results["counts"]
    assert 0 < counts["training_paths"] < 6 * counts["training_questions"]


# ---------------------------------------------------------------- what is not routed is not run
def watch_forwards(monkeypatch, world, run_flags, train, students=("words", "pieces")):
    """-> the run, and for each student the (id, style) of every path that went through its blocks in training."""
    load, seen = distill.load_students, []

    def note(into, module, args, kwargs):
        if module.training:
            into.extend(kwargs["input_ids"].tolist())

    def load_and_watch(*a):
        loaded = load(*a)
        for s in loaded:
            seen.append([])
            s.model.base_model.register_forward_pre_hook(partial(note, seen[-1]), with_kwargs=True)
        return loaded

    monkeypatch.setattr(distill, "load_students", load_and_watch)
    run = train(*run_flags, students=students)
    named = []
    for student, rows in zip(run.students, seen):
        known = {}
        for row in world.rows:
            prompt = tasks.encode_prompt(student.tokenizer, tasks.student_prompt(row))
            known[tuple(prompt + student.tokenizer(row["path"])["input_ids"])] = row["id"], row["style"]
        named.append([known.get(tuple(i for i in ids if i != 0)) for ids in rows])  # 0, <unk>, stands where padding is
    return run, named


def test_an_unrouted_pair_costs_no_forward_and_a_path_nobody_got_costs_none(monkeypatch, world, train):
    flags = (
        "--route", "random", "--max_steps", 4, "--filter", "none", "--batch_size", 5,
        "--test_frac", 1 / 6, "--gate", "binary",
    )
    run, ran = watch_forwards(monkeypatch, world, flags, train)
    paths = 6 * 5
    for s, mine in enumerate(ran):
        mine = [x for x in mine if x]
        assert len(mine) == len(set(mine)) == round(sum(line["rate"][s] for line in run.log) * paths)
        assert len({i for i, _ in mine}) == run.results["counts"]["training_questions"] == 4 * 5  # none starves
    routed = {x for mine in ran for x in mine}
    both = set(ran[0]) & set(ran[1])
    assert len(routed) < 0.9 * run.results["counts"]["training_paths"]
    assert len(both) == round(sum(line["co_routed"] for line in run.log) * paths)


def test_a_learned_gate_at_zero_for_everybody_costs_one_path_per_question(monkeypatch, world, train):
    monkeypatch.setattr(distill.qr, "uniform", lambda like, generator: torch.full_like(like, 1e-6))
    run, ran = watch_forwards(monkeypatch, world, (*BINARY, "--filter", "none", "--max_steps", 2), train)
    assert [len(x) for x in ran] == [2 * 4, 2 * 4]
    assert all(line["rate"] == [pytest.approx(1 / 6)] * 2 for line in run.log)


def test_route_all_runs_every_path_of_every_student(monkeypatch, world, train):
    run, ran = watch_forwards(
        monkeypatch, world, ("--route", "all", "--filter", "none", "--batch_size", 50, "--max_steps", 1), train
    )
    assert sorted(ran[0]) == sorted(ran[1]) and len(ran[0]) == run.results["counts"]["training_paths"]
    assert run.log[0]["rate"] == [1, 1] and run.log[0]["co_routed"] == 1
    for s, student in enumerate(run.students):
        chosen = [r for r in world.rows if (r["id"], r["style"]) in set(ran[0])]
        tokens = sum(len(student.tokenizer(r["path"])["input_ids"]) + 1 for r in chosen)
        assert run.results["tokens_trained"][s] == tokens


# ---------------------------------------------------------------- accumulation
def test_micro_batches_change_nothing(monkeypatch, train):
    runs = [train("--mutual_weight", 0.5, "--batch_size", 5, "--lr", 1e-3, *flags, name=f"micro{n}",
                  students=("words", "pieces", "pad_is_eos"))
            for n, flags in enumerate([("--micro_batch_size", 1), ("--micro_batch_size", 2), []])]
    monkeypatch.setattr(distill, "WEIGHT_DECAY", 0)
    start = train(
        "--max_steps", 1, "--lr", 1e-9, name="start", students=("words", "pieces", "pad_is_eos")
    )
    for run in runs[:2]:
        for a, b in zip(run.log, runs[2].log):
            for key in ("loss", "rate", "mutual", "gamma", "entropy", "grad_norm", "router_grad_norm", "co_routed"):
                assert np.allclose(a[key], b[key], rtol=1e-3, atol=1e-5), key
        for file, tensors in run.weights.items():
            for name, w in tensors.items():
                moved = (runs[2].weights[file][name] - start.weights[file][name]).abs().max()
                assert torch.allclose(w, runs[2].weights[file][name], atol=max(1e-6, 0.02 * float(moved))), name
    assert any(line["co_routed"] for line in runs[0].log)


def sgd(groups):
    """Instead of AdamW: a step of lr 1 moves the weights by minus the gradient."""
    if isinstance(groups[0], dict):
        groups = [{**group, "weight_decay": 0} for group in groups]
    return torch.optim.SGD(groups, lr=1)


def test_loss_of_a_step_is_the_mean_over_questions_of_the_mean_over_their_routed_paths(monkeypatch, world, train):
    """Eq 9 as one number: SGD with lr 1 moves the weights by minus the gradient of the loss that we write down here."""
    monkeypatch.setattr(distill.torch.optim, "AdamW", lambda groups, **k: sgd(list(groups)))
    monkeypatch.setattr(distill, "CLIP", 1e9)
    flags = (
        "--mutual_weight", 0, "--route", "all", "--filter", "none", "--max_steps", 1, "--batch_size", 50, "--lr", 1,
        "--train_frac", 0.2,
    )
    run, ran = watch_forwards(monkeypatch, world, flags, train, students=("words",))
    model, tokenizer = tasks.load_student(world.students["words"])
    loss, per_question = 0, Counter(i for i, _ in ran[0])
    for row in world.rows:
        if (row["id"], row["style"]) in ran[0]:
            prompt = tasks.encode_prompt(tokenizer, tasks.student_prompt(row))
            ids = torch.tensor([prompt + tokenizer(row["path"])["input_ids"] + [tokenizer.eos_token_id]])
            labels = ids.clone()
            labels[0, :len(prompt)] = -100
            loss = loss + model(input_ids=ids, labels=labels).loss / per_question[row["id"]] / len(per_question)
    assert run.log[0]["loss"][0] == pytest.approx(float(loss.detach()), rel=1e-4)
    loss.backward()
    trained = run.students[0].model.state_dict()
    for name, p in model.named_parameters():
        assert torch.allclose(trained[name], p.detach() - p.grad, atol=1e-4), name


# ---------------------------------------------------------------- kill and resume
LONG = "--max_steps", 9, "--save_every", 4, "--router_lr", 0.05
KINDS = {"full": (), "lora": ("--lora_rank", 2, "--lr", 0.05)}


@pytest.fixture(scope="module")
def unkilled(world, tmp_path_factory):
    """The runs that nobody killed: dropout in one student, sampled gates, mutual loss."""
    out = {}
    for kind, flags in KINDS.items():
        folder = tmp_path_factory.mktemp("unkilled") / kind
        distill.main(flags_of(world, folder, *LONG, *flags, students=("words", "dropout")))
        out[kind] = files_of(folder)
    return out


def die_after(monkeypatch, where, name, calls):
    """The process dies on entering where.name for the calls-th time."""
    original, count = getattr(where, name), iter(range(1, 10**6))

    def dies(*a, **k):
        if next(count) >= calls:
            raise Killed(name)
        return original(*a, **k)

    monkeypatch.setattr(where, name, dies)


MOMENTS = {
    "before the first checkpoint": (distill.tasks, "evaluate", 1), "in the first step": (distill, "clip_gradients", 1),
    "between checkpoints": (distill, "clip_gradients", 6 * 2),
    "just before a checkpoint": (distill, "save_checkpoint", 3),
    "before the checkpoint replaces the old one": (distill.os, "replace", 3 + 2),  # flags, test and log come first
    "saving a student": (distill, "save_student", 2), "in the final evaluation": (distill.tasks, "evaluate", 2),
    "before the table": (distill, "print_results", 1),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("moment", MOMENTS)
def test_killed_run_resumes_to_exactly_the_unkilled_one(world, tmp_path, unkilled, moment, kind):
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        die_after(patch, *MOMENTS[moment])
        distill.main(flags_of(world, tmp_path / "run", *LONG, *KINDS[kind], students=("words", "dropout")))
    torch.manual_seed(99), random.seed(99)  # nothing may hang on the state of this process
    distill.main(["--resume", str(tmp_path / "run")])
    same_run(files_of(tmp_path / "run"), unkilled[kind])


def test_loss_scale_of_fp16_is_part_of_the_checkpoint(world, tmp_path):
    flags = *LONG, "--dtype", "fp16", "--reward", "loss"
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    distill.main(flags_of(world, whole, *flags))
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        die_after(patch, distill, "clip_gradients", 6 * 2)
        distill.main(flags_of(world, killed, *flags))
    with distill.safe_open(killed / "checkpoint.safetensors", "pt") as f:
        state = json.loads(f.metadata()["run"])["scaler"]
    assert state["_growth_tracker"] or state["scale"] < 65536  # another scaler than a new one
    distill.main(["--resume", str(killed)])
    same_run(files_of(killed), files_of(whole))


@pytest.mark.parametrize("flags", [("--freeze", 0, 1, "--mutual_weight", 0), ("--freeze", 0, 1)])
def test_a_step_without_any_gradient_passes_in_fp16(train, flags):
    assert len(train("--dtype", "fp16", *flags).log) == 3


def test_encoder_that_draws_its_missing_pooler_changes_nothing_by_being_loaded(world, tmp_path):
    torch.manual_seed(0)
    config = BertConfig(vocab_size=500, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    model = BertModel(config)
    whole = model.state_dict()
    runs = []
    for name in ("all weights", "no pooler"):
        folder = tmp_path / name
        weights = {key: x for key, x in whole.items() if name == "all weights" or "pooler" not in key}
        model.save_pretrained(folder, state_dict=dict(weights))
        assert load_file(folder / "model.safetensors").keys() == weights.keys()
        AutoTokenizer.from_pretrained(world.students["words"]).save_pretrained(folder)
        run = tmp_path / f"run, {name}"
        distill.main(flags_of(world, run, "--encoder", folder, "--router_hidden", 4))
        runs.append(files_of(run))
    same_run(*runs)


def test_half_written_checkpoint_leaves_the_old_one_valid(world, tmp_path, unkilled, monkeypatch):
    save, calls = distill.save_file, iter(range(9))

    def dies_in_the_middle(tensors, file, **k):
        save(tensors, file, **k)
        if next(calls) == 2:
            whole = pathlib.Path(file).read_bytes()
            pathlib.Path(file).write_bytes(whole[:len(whole) // 2])
            raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(distill, "save_file", dies_in_the_middle)
        distill.main(flags_of(world, tmp_path / "run", *LONG, students=("words", "dropout")))
    with distill.safe_open(tmp_path / "run" / "checkpoint.safetensors", "pt") as f:
        assert json.loads(f.metadata()["run"])["step"] == 4 and f.get_tensor("router.net.weight").abs().sum() > 0
    distill.main(["--resume", str(tmp_path / "run")])
    same_run(files_of(tmp_path / "run"), unkilled["full"])


def test_sigkill_at_a_random_moment_then_resume_ends_bit_for_bit_the_same(world, tmp_path, unkilled):
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    killed = {}
    for kind, flags in KINDS.items():  # side by side: most of the time goes into imports
        command = [
            sys.executable, ROOT / "distill.py",
            *flags_of(world, tmp_path / kind, *LONG, *flags, students=("words", "dropout")),
        ]
        killed[kind] = subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    waiting, moments = dict(killed), {kind: random.SystemRandom().randrange(8) for kind in KINDS}
    end = time.time() + 120
    while waiting and time.time() < end:
        for kind, process in list(waiting.items()):
            log = tmp_path / kind / "log.jsonl"
            if process.poll() is not None or (log.is_file() and log.read_text().count("\n") >= moments[kind]):
                process.send_signal(signal.SIGKILL)
                process.wait()
                del waiting[kind]
        time.sleep(0.002)
    for kind in KINDS:
        assert killed[kind].returncode == -signal.SIGKILL, (kind, moments)
        assert not (tmp_path / kind / "results.json").exists()
        distill.main(["--resume", str(tmp_path / kind)])
        same_run(files_of(tmp_path / kind), unkilled[kind])


@pytest.mark.parametrize("test, goes_on", [(1, False), (2, True)])  # before the first step, after the last one
def test_ctrl_c_in_a_test_names_the_command_that_goes_on_where_there_is_a_checkpoint(
        world, tmp_path, monkeypatch, capsys, test, goes_on):
    evaluate, count = distill.tasks.evaluate, iter(range(1, 9))

    def interrupted(*a, **k):
        if next(count) == test:
            raise KeyboardInterrupt
        return evaluate(*a, **k)

    monkeypatch.setattr(distill.tasks, "evaluate", interrupted)
    monkeypatch.setattr(distill, "FLAGS", distill.parse_args(flags_of(world, tmp_path / "run")), raising=False)
    with pytest.raises(KeyboardInterrupt):
        distill.command()
    assert (f"python distill.py --resume {tmp_path / 'run'}" in capsys.readouterr().err) == goes_on


def test_resume_of_a_finished_run_repeats_its_results(world, tmp_path, unkilled):
    distill.main(flags_of(world, tmp_path / "run", *LONG, students=("words", "dropout")))
    distill.main(["--resume", str(tmp_path / "run")])
    same_run(files_of(tmp_path / "run"), unkilled["full"])


def test_a_run_is_reproducible_and_hangs_on_the_seed(train):
    a, b, c = (train("--seed", seed, name=f"run{i}") for i, seed in enumerate((3, 3, 4)))
    same_run(vars(a), vars(b))
    assert a.log != c.log and not all(same_tensors(a.weights[k], c.weights[k]) for k in a.weights)


def test_checkpoint_is_safetensors_and_nothing_is_pickled(train):
    run = train(name="run")
    assert load_file(run.out / "checkpoint.safetensors")
    files = [f for f in run.out.rglob("*") if f.is_file()]
    assert {f.suffix for f in files} <= {".safetensors", ".json", ".jsonl", ".jinja", ".txt", ".md", ""}, files
    assert not [f for f in files if f.read_bytes()[:2] in (b"\x80\x02", b"PK")]


def test_checkpoint_does_not_grow_with_the_answers_to_the_test(monkeypatch, train):
    """They would stand in the header of the file, and that has a limit."""
    evaluate = distill.tasks.evaluate

    def wordy(*a, **k):
        result = evaluate(*a, **k)
        return {**result, "predictions": [*result["predictions"], {"text": "so " * 10**6}]}

    monkeypatch.setattr(distill.tasks, "evaluate", wordy)
    assert (train("--max_steps", 1).out / "checkpoint.safetensors").stat().st_size < 10**6


# ---------------------------------------------------------------- students, routes, gates
@pytest.mark.parametrize("students", [("words",), ("words", "pieces"), ("words", "pieces", "chat")])
def test_one_two_and_three_students_train_end_to_end(world, train, students):
    run = train("--max_steps", 12, "--batch_size", 10, "--lr", 2e-2, students=students)
    for i, name in enumerate(students):
        assert run.log[-1]["loss"][i] < 0.8 * run.log[0]["loss"][i]
        before = load_file(pathlib.Path(world.students[name]) / "model.safetensors")
        assert not same_tensors(before, run.weights[f"student_{i}/model.safetensors"])
    assert all(len(run.results[when]["accuracy"]) == len(students) for when in ("before", "after"))
    assert ("mutual" in run.log[0]) == (len(students) > 1)
    for line in run.log:
        assert all(len(line[key]) == len(students) for key in ("loss", "rate", "grad_norm"))
        if "gamma" in line:
            assert len(line["gamma"]) == len(line["spread"]) == len(line["rank"]) == len(students) and sum(
                line["gamma"]
            ) == pytest.approx(1)
    assert set(run.results["selection_rate"]) == set(judge.STYLES)


def test_log_line_has_what_others_read(train):
    line = train().log[0]
    assert {
        "step", "loss", "rate", "rate_style", "entropy", "mutual", "gamma", "spread", "grad_norm", "router_grad_norm",
    } <= line.keys()


@pytest.mark.parametrize("rank", [0, 4])
def test_frozen_student_keeps_every_bit_while_the_other_learns(world, train, rank):
    run = train("--freeze", 0, "--lora_rank", rank, "--mutual_weight", 1)
    before = load_file(pathlib.Path(world.students["words"]) / "model.safetensors")
    after = {k: v for k, v in run.students[0].model.state_dict().items() if ".A" not in k and ".B" not in k}
    assert all(
        torch.equal(before[k], v) for k, v in ((k.replace(".base.", "."), v) for k, v in after.items()) if k in before
    )
    if rank:
        assert all(
            v.abs().max() == 0 for k, v in run.weights["student_0/adapter_model.safetensors"].items() if "lora_B" in k
        )
        assert any(
            v.abs().max() > 0 for k, v in run.weights["student_1/adapter_model.safetensors"].items() if "lora_B" in k
        )
    else:
        assert same_tensors(before, run.weights["student_0/model.safetensors"])
        other = load_file(pathlib.Path(world.students["pieces"]) / "model.safetensors")
        assert not same_tensors(other, run.weights["student_1/model.safetensors"])
    assert run.results["tokens_trained"][0] == 0 < run.results["tokens_trained"][1]
    assert all(line["grad_norm"][0] == 0 < line["grad_norm"][1] for line in run.log) and run.log[0]["mutual"] > 0


def test_frozen_student_teaches(train):
    """What the other one learns hangs on the frozen one's states, through the mutual loss alone."""
    flags = "--freeze", 0, "--route", "all", "--max_steps", 1
    alone, taught = (
        train(*flags, "--mutual_weight", 0, name="alone"),
        train(*flags, "--mutual_weight", 5, name="taught"),
    )
    assert (
        alone.log[0]["loss"] == taught.log[0]["loss"] and alone.log[0]["grad_norm"][1] != taught.log[0]["grad_norm"][1]
    )


def router_weight(run):
    return load_file(run.out / "checkpoint.safetensors")["router.net.weight"]


@pytest.mark.parametrize("gate", ["binary", "onehot"])
def test_learned_router_feels_the_students_losses_from_the_first_steps(train, gate):
    run = train("--entropy_weight", 0, "--gate", gate, "--reward", "sum", "--router_lr", 0.01)
    assert all(line["router_grad_norm"] > 1e-4 for line in run.log)
    assert (router_weight(run).abs().amax(1) > 1e-3).all()  # zero at birth


def test_router_gets_no_gradient_from_the_students_in_all_and_random(train):
    for route in ("all", "random"):
        run = train("--route", route, "--entropy_weight", 5, name=route)
        assert all(line["router_grad_norm"] == 0 for line in run.log) and router_weight(run).abs().max() == 0


def test_learned_router_comes_to_prefer_cheap_paths_and_the_entropy_holds_it_back(monkeypatch, train):
    """An oracle that we plant: paths of one style cost next to nothing."""
    plain = distill.forward_paths

    def planted(student, s, rows, first=None):
        nll, z, segment = plain(student, s, rows, first)
        return nll * torch.tensor([0.01 if row.get("style") == "program" else 1.0 for row in rows]), z, segment

    monkeypatch.setattr(distill, "forward_paths", planted)
    log = {
        weight: train(
            *BINARY, "--style_input", "--max_steps", 25, "--batch_size", 10, "--entropy_weight", weight,
            "--mutual_weight", 0, "--filter", "none", name=f"weight{weight}",
        ).log
        for weight in (0, 5)
    }
    rate = log[0][-1]["rate_style"]
    assert all(
        rate["program"][s] > 1.3 * np.mean([rate[style][s] for style in rate if style != "program"]) for s in (0, 1)
    )
    assert log[0][0]["entropy"] == log[5][0]["entropy"] == pytest.approx(np.log(2))  # every gate starts at 1/2
    assert log[5][-1]["entropy"] > log[0][-1]["entropy"] + 0.01


def test_onehot_gate_drops_no_path_and_binary_gate_does(train):
    onehot, binary = train(*BINARY, "--gate", "onehot", name="a"), train(*BINARY, name="b")
    assert all(sum(line["rate"]) == pytest.approx(1 + line["co_routed"]) for line in onehot.log)
    assert all(sum(line["rate"]) < 0.999 + line["co_routed"] for line in binary.log)


@pytest.mark.parametrize(
    "flags",
    [
        ["--normalize", "batch"], ["--entropy", "literal", "--entropy_weight", 1],
        ["--router_hidden", 8], ["--router_lr", 30], ["--projection", "trained"], ["--no-standardize"],
        ["--mutual_weight", 0], ["--mutual_weight", 2], ["--entropy_weight", 50], ["--as_printed"], ["--gate", "categorical", "--probe", 0.2], ["--style_input"],
        ["--reward", "sum", "--max_steps", 8], ["--probe", 0.5],
    ],
)
def test_every_training_flag_changes_the_run_and_ends_well(train, flags):
    more = [*BINARY, "--max_steps", 4, "--router_lr", 1]
    flags = [*more, *flags]
    a, b = train(*more, name="a"), train(*flags, name="b")
    assert not all(same_tensors(a.weights[k], b.weights[k]) for k in a.weights)
    assert all(np.isfinite(w).all() for k in b.weights for w in b.weights[k].values())


def test_as_printed_is_every_equation_as_the_paper_prints_it(monkeypatch, train):
    made = {}

    def watch(name):
        original = getattr(distill.qr, name)
        monkeypatch.setattr(distill.qr, name, lambda *a, **k: made.setdefault(name, []).append((a, k)) or original(*a, **k))

    for name in ("path_weights", "balance_entropy", "fill_skipped"):
        watch(name)
    states = []
    original = distill.State.tensors
    monkeypatch.setattr(distill.State, "tensors", lambda state: states.append(state) or original(state))
    run = train("--as_printed", "--batch_size", 8)
    router, collab = states[-1].router, states[-1].collab
    for line in run.log:  # Eq 2: one student per path, and nobody is given a path that the gate did not
        assert sum(line["rate"]) == pytest.approx(1) and line["co_routed"] == 0
        assert line["entropy"] == pytest.approx(np.log(2), abs=1e-4)  # so Eq 3 is 1/S and Eq 4 is constant
    assert [type(layer) for layer in router.net] == [torch.nn.Linear, torch.nn.ReLU, torch.nn.Linear]
    assert router.net[0].in_features == 512  # the embedding and no style
    assert all(p.requires_grad for p in collab.proj.parameters())  # Eq 5
    assert not collab.standardized and not collab.fit_competence  # Eq 8, Eq 6
    assert all(a[2] == "batch" for a, _ in made["path_weights"])  # Eq 9: every path weighs the same
    assert all(a[2] is False for a, _ in made["balance_entropy"])  # Eq 3: over students, too
    nll = torch.stack([torch.tensor(line["loss"]) for line in run.log])
    assert max(a[0].max() for a, _ in made["fill_skipped"]) < 3 * nll.max()  # a mean over tokens, not a path's sum


def test_flag_beside_as_printed_still_counts():
    args = distill.parse_args(["--as_printed", "--gate", "binary", "--style_input"])
    assert args.gate == "binary" and args.style_input and args.normalize == "batch" and args.probe == 0


def test_gate_of_the_readme_is_added_by_its_own_lines_and_trains(monkeypatch, train):
    text = (ROOT / "README.md").read_text()
    code = text.split("```python\n# router.py\n")[1].split("```")[0]
    monkeypatch.setattr(distill.qr, "GATES", dict(distill.qr.GATES))
    monkeypatch.setattr(distill.qr, "ONE_PATH", set(distill.qr.ONE_PATH))
    exec(code, vars(distill.qr))  # noqa: S102
    name = re.search(r"python distill.py --gate (\w+)", text)[1]
    run = train("--gate", name, "--filter", "none")
    assert all(line["rate"] == [pytest.approx(1 / 6)] * 2 for line in run.log)  # one path of each question
    assert run.log[0]["router_grad_norm"] > 0


def test_shortest_route_trains_the_path_with_the_fewest_tokens_of_each_student(monkeypatch, world, train):
    run, ran = watch_forwards(monkeypatch, world, ("--route", "short", "--filter", "none", "--max_steps", 2), train)
    for student, mine in zip(run.students, ran):
        length = {(r["id"], r["style"]): len(student.tokenizer(r["path"].strip())["input_ids"]) for r in world.rows}
        for i, style in mine:
            assert length[i, style] == min(n for (question, _), n in length.items() if question == i)
    assert all(len(mine) == 2 * 4 for mine in ran)


def test_likeliest_route_trains_the_path_with_the_lowest_loss_per_token_before_training(monkeypatch, world, train):
    _, ran = watch_forwards(monkeypatch, world, ("--route", "nll", "--filter", "none", "--max_steps", 2), train)
    for name, mine in zip(("words", "pieces"), ran):
        model, tokenizer = tasks.load_student(world.students[name])
        loss = {}
        for r in world.rows:
            if r["id"] in {i for i, _ in mine}:
                prompt = tasks.encode_prompt(tokenizer, tasks.student_prompt(r))
                ids = torch.tensor([prompt + tokenizer(r["path"].strip())["input_ids"] + [tokenizer.eos_token_id]])
                labels = ids.clone()
                labels[0, :len(prompt)] = -100
                with torch.no_grad():
                    loss[r["id"], r["style"]] = float(model(input_ids=ids, labels=labels).loss)
        for i, style in mine:
            assert loss[i, style] < min(x for (question, _), x in loss.items() if question == i) + 1e-4


@pytest.mark.parametrize("flags, width", [([], 512 + 6 + 2), (["--no-score_input"], 512 + 6)])
def test_router_sees_embedding_style_and_the_losses_of_two_untrained_students(monkeypatch, train, flags, width):
    seen, plain = [], distill.qr.Router.forward
    monkeypatch.setattr(distill.qr.Router, "forward", lambda router, h: seen.append(h) or plain(router, h))
    train("--max_steps", 1, *flags)
    assert seen[0].shape[1] == width


def test_scores_are_the_mean_losses_of_the_untrained_students_standardised(monkeypatch, world, tmp_path):
    kept = {}
    plain_embed, plain_losses = distill.embed, distill.path_losses

    def embed(rows, students, lengths, args, device):
        kept["h"] = plain_embed(rows, students, lengths, args, device)
        kept["rows"] = rows
        return kept["h"]

    monkeypatch.setattr(distill, "embed", embed)
    monkeypatch.setattr(distill, "path_losses", lambda *a: kept.setdefault("nll", plain_losses(*a)))
    distill.main(flags_of(world, tmp_path / "run", "--max_steps", 1))
    score = np.array([[float(x) / len(tokens) for x, tokens in zip(nll, row["responses"])]
                      for nll, row in zip(kept["nll"].double(), kept["rows"])])
    want = distill.SCORE_SCALE * (score - score.mean(0)) / score.std(0)
    assert np.abs(kept["h"][:, -2:].numpy() - want).max() < 1e-4


def test_a_loss_before_training_that_is_not_finite_ends_the_run_in_a_sentence(monkeypatch, world, tmp_path, capsys):
    monkeypatch.setattr(distill, "check_student", lambda student: None)  # which would have seen it, too
    monkeypatch.setattr(distill, "forward_paths", lambda student, s, rows: [torch.full((len(rows),), torch.inf)])
    with pytest.raises(SystemExit) as end:
        distill.main(flags_of(world, tmp_path / "run"))
    assert end.value.code == 2 and "student 0: its loss on a path of the pool is not finite" in capsys.readouterr().err


@pytest.mark.parametrize("penalty", [0, 0.5, 1])
def test_router_learns_from_probed_losses_under_the_length_penalty(monkeypatch, train, penalty):
    heard, plain = [], distill.qr.posterior_loss
    monkeypatch.setattr(distill.qr, "posterior_loss", lambda *a: heard.append(a) or plain(*a))
    stepped, router_step = [], distill.router_step
    monkeypatch.setattr(distill, "router_step", lambda *a: stepped.append(a) or router_step(*a))
    train("--max_steps", 1, "--length_penalty", penalty, "--posterior_temperature", 3)
    _, cost, question, temperature = heard[0]
    _, _, _, _, nll, probed, length, _, _ = stepped[0]
    nll, length = nll[probed].double(), length[probed].double()
    assert temperature == 3 and len(nll) > 1 and (question == 0).all()  # one question is probed
    assert torch.allclose(cost.double(), nll * (length.mean(0) / length) ** penalty)


def test_compiled_students_learn_what_plain_ones_do(monkeypatch, train):
    same = ("words", "words")
    compiled = []
    compile_plainly = torch.compile

    def compile_without_a_compiler(blocks, **more):
        compiled.append(blocks)
        return compile_plainly(blocks, backend="eager", **more)

    monkeypatch.setattr(torch, "compile", compile_without_a_compiler)
    plain = train("--max_steps", 3, students=same, name="plain")
    assert not compiled
    fast = train("--max_steps", 3, "--compile", students=same, name="fast")
    assert len(compiled) == 2
    assert np.allclose([line["loss"] for line in plain.log], [line["loss"] for line in fast.log], rtol=1e-4)


@pytest.mark.parametrize("frozen", [[], ["--freeze", 0, 1]])
def test_a_compiler_that_is_missing_ends_a_run_in_a_sentence(monkeypatch, world, tmp_path, capsys, frozen):
    def no_compiler(blocks, **more):
        def fails(*args, **kwargs):
            raise RuntimeError("InvalidCxxCompiler: no working C++ compiler")
        return fails

    monkeypatch.setattr(torch, "compile", no_compiler)
    error = refused(capsys, flags_of(world, tmp_path / "run", "--compile", *frozen))
    assert "no working C++ compiler" in error and "leave --compile out" in error


@pytest.mark.parametrize("flags", [["--route", "random"], ["--route", "all"], ["--no-score_input"], ["--as_printed"]])
def test_no_path_is_scored_where_no_router_looks(monkeypatch, train, flags):
    monkeypatch.setattr(distill, "path_losses", lambda *a: pytest.fail("scored"))
    train("--max_steps", 1, *flags)


def test_an_mlp_router_sees_features_of_variance_one_and_learns_more_slowly(monkeypatch, train):
    seen, plain = [], distill.qr.Router.forward
    monkeypatch.setattr(distill.qr.Router, "forward", lambda router, h: seen.append(h) or plain(router, h))
    train("--max_steps", 1)
    train("--max_steps", 1, "--router_hidden", 8, name="mlp")
    linear, mlp = (h[:, :512].std(0).mean() for h in seen)
    assert mlp > 0.5 and abs(float(mlp / linear) - 512) < 1
    rate = [distill.parse_args(flags).router_lr for flags in ([], ["--router_hidden", "8"], ["--as_printed"])]
    assert rate == [0.3, 0.01, 0.01]


def test_lora_is_refused_on_the_demo(capsys):
    assert "train in full" in refused(capsys, ["--lora_rank", "2"])


def test_a_pretrained_students_router_compares_by_the_token_the_demos_by_the_path(world, tmp_path):
    real, demo = distill.parse_args(flags_of(world, tmp_path / "run")), distill.parse_args([])
    assert (real.length_penalty, real.score_input, demo.length_penalty, demo.score_input) == (1, True, 0, False)


@pytest.mark.parametrize("better", [0, 1])
def test_competence_comes_to_prefer_the_student_with_the_lower_loss(monkeypatch, train, better):
    plain = distill.forward_paths

    def planted(student, s, rows, first=None):
        nll, z, segment = plain(student, s, rows, first)
        return nll * (0.1 if s == better else 1), z, segment

    monkeypatch.setattr(distill, "forward_paths", planted)
    gamma = [line["gamma"][better] for line in train("--max_steps", 20, "--route", "all").log]
    assert gamma[0] == pytest.approx(0.5) and gamma[-1] > 0.65


def test_learning_rates_are_one_per_student(world, train):
    run = train("--lr", 1e-9, 1e-2)
    moved = [
        max(
            (v - load_file(pathlib.Path(world.students[name]) / "model.safetensors")[k]).abs().max()
            for k, v in run.weights[f"student_{i}/model.safetensors"].items()
        )
        for i, name in enumerate(("words", "pieces"))
    ]
    assert moved[0] < 1e-6 and moved[1] > 1e-3


def test_student_trains_one_path_of_each_question_and_the_probe_runs_the_others_without_gradient(monkeypatch, world, train):
    gradient, plain = [], distill.forward_paths

    def watch(student, s, rows, first=None):
        if rows and student.model.training:
            gradient.append((s, torch.is_grad_enabled(), len(rows)))
        return plain(student, s, rows, first)

    monkeypatch.setattr(distill, "forward_paths", watch)
    flags = "--filter", "none", "--max_steps", 4, "--batch_size", 4, "--probe", 0.25
    run, ran = watch_forwards(monkeypatch, world, flags, train)
    assert [line["rate"] for line in run.log] == [[pytest.approx(1 / 6)] * 2] * 4
    assert [len(x) for x in ran] == [4 * (4 + 5)] * 2
    for s in (0, 1):  # one path of four questions trains, five more of the first question are only read
        assert [(g, n) for k, g, n in gradient if k == s and n > 1] == [(True, 4), (False, 5)] * 4
        assert run.results["tokens_trained"][s] < sum(len(r["path"]) for r in world.rows)
    assert all(line["router_grad_norm"] > 0 for line in run.log)  # to the end


# ---------------------------------------------------------------- ablations of the data
@pytest.fixture
def data_of(world, tmp_path, monkeypatch):
    """data_of(*flags) -> the rows that the students would train on and the questions of the test, by way of main."""
    encode, got = distill.encode, {}

    def look(rows, *a):
        got["rows"] = encode(rows, *a)
        return got["rows"]

    def test_set(students, rows, *a, **k):
        got["test"] = rows
        raise Killed

    monkeypatch.setattr(distill, "encode", look)
    monkeypatch.setattr(distill.tasks, "evaluate", test_set)

    def run(*flags, pool=world.pool):
        with pytest.raises(Killed):
            distill.main(
                flags_of(world, tmp_path / str(len(os.listdir(tmp_path))), "--eval_limit", 0, *flags, "--paths", pool)
            )
        return got["rows"], got["test"]

    return run


def pairs(rows):
    return {(r["id"], r["style"]) for r in rows}


def test_filter_none_trains_wrong_paths_answer_drops_them_and_full_drops_wrong_steps_too(world, data_of):
    rows = {mode: data_of("--filter", mode)[0] for mode in ("none", "answer", "full")}
    train_ids = {r["id"] for r in rows["none"]}
    truth = [r for r in world.rows if r["id"] in train_ids]
    assert pairs(rows["none"]) == pairs(truth)
    assert pairs(rows["answer"]) == pairs(r for r in truth if r["source_correct"]) < pairs(rows["none"])
    assert pairs(rows["full"]) == pairs(r for r in truth if r["source_valid"]) < pairs(rows["answer"])


def test_styles_flag_trains_one_style_only(data_of):
    rows, _ = data_of("--styles", "program")
    assert {r["style"] for r in rows} == {"program"} and len(rows) == len({r["id"] for r in rows})
    assert {r["style"] for r in data_of("--styles", "program", "backward")[0]} == {"program", "backward"}


def test_train_frac_halves_the_questions_and_smaller_shares_lie_in_larger_ones(data_of):
    ids = {frac: {r["id"] for r in data_of("--train_frac", frac, "--filter", "none")[0]} for frac in (1, 0.5, 0.25)}
    tests = [tuple(q["id"] for q in data_of("--train_frac", frac)[1]) for frac in (1, 0.5)]
    assert abs(len(ids[0.5]) - len(ids[1]) / 2) <= 1 and ids[0.25] < ids[0.5] < ids[1] and tests[0] == tests[1]


def test_no_question_is_on_both_sides_and_all_are_on_one(world, data_of):
    for frac in (0.2, 0.5):
        rows, test = data_of("--test_frac", frac, "--filter", "none")
        trained, tested = {r["id"] for r in rows}, {q["id"] for q in test}
        assert (
            not trained & tested
            and trained | tested == {r["id"] for r in world.rows}
            and len(tested) == round(24 * frac)
        )
        assert not {r["question"] for r in rows} & {q["question"] for q in test}


def test_held_out_questions_do_not_hang_on_the_styles_that_train(world, tmp_path, data_of):
    """Else an ablation of one style would be tested on other questions."""
    pool = write_jsonl(
        tmp_path / "uneven.jsonl", [r for k, r in enumerate(world.rows) if k % 7 and (r["style"] != "program" or k % 4)]
    )
    everything, program = data_of(pool=pool)[1], data_of("--styles", "program", pool=pool)[1]
    assert {q["id"] for q in everything} == {q["id"] for q in program}


def test_test_question_in_the_pool_under_another_id_is_not_trained(world, tmp_path, data_of):
    questions = {r["id"]: r for r in world.rows}
    again = [
        {
            "id": f"other-{i}", "task": "demo", "question": f"  {q['question'].upper()} ".replace(" ", "  "),
            "answer": q["answer"],
        }
        for i, q in enumerate(list(questions.values())[:5])
    ]
    seventh, eighth = list(questions)[6:8]
    chance = {"id": seventh, "task": "demo", "question": "How many?", "answer": "1000"}  # ids of two files say nothing
    typo = {"id": eighth, "task": "demo", "question": "How mnay?", "answer": questions[eighth]["answer"]}
    file = write_jsonl(tmp_path / "test.jsonl", [*again, chance, typo])
    for limit in (0, 1):  # a test question that --eval_limit leaves out is none to train on either
        rows, test = data_of("--eval_questions", file, "--filter", "none", "--eval_limit", limit)
        assert len(test) == (limit or 7)
        assert {r["id"] for r in rows} == set(questions) - set(list(questions)[:5]) - {eighth}


def test_duplicated_question_under_two_ids_is_not_split_over_both_sides(world, tmp_path, data_of):
    twins = [{**r, "id": "twin-" + r["id"]} for r in world.rows]
    rows, test = data_of("--filter", "none", pool=write_jsonl(tmp_path / "twins.jsonl", world.rows + twins))
    assert rows and not {r["question"] for r in rows} & {q["question"] for q in test}


def annotated(row, valid):
    return {
        **row, "prediction": row["answer"], "correct": True, "valid": valid,
        "verdict": {"J": "valid" if valid else "invalid: x"},
    }


def test_annotated_pool_is_believed(world, tmp_path, data_of):
    rows = [annotated(r, r["style"] == "backward") for r in world.rows]
    assert {r["style"] for r in data_of(pool=write_jsonl(tmp_path / "annotated.jsonl", rows))[0]} == {"backward"}


def test_partly_annotated_pool_keeps_the_verdicts_that_were_paid_for(world, tmp_path, data_of):
    rows = [{**r, "task": "gsm8k"} for r in world.rows if r["source_correct"]]  # no rule judge knows this task
    rows = [annotated(r, False) if r["style"] == "backward" else r for r in rows]
    styles = {r["style"] for r in data_of(pool=write_jsonl(tmp_path / "partly.jsonl", rows))[0]}
    assert styles == set(judge.STYLES) - {"backward"}


def test_run_says_once_how_many_right_answers_no_judge_has_read(world, tmp_path, data_of, capsys):
    rows = [{**r, "task": "gsm8k"} for r in world.rows]
    pool = write_jsonl(tmp_path / "gsm.jsonl", rows)
    data_of(pool=pool)
    right = sum(judge.fate(r, "answer") == "kept" for r in judge.grade_paths(rows))
    assert capsys.readouterr().out.count(f"no judge has read {right} paths") == 1
    data_of("--filter", "answer", pool=pool)
    assert "no judge" not in capsys.readouterr().out


def test_of_a_judged_pool_wrong_answers_are_not_missed(world, tmp_path, data_of, capsys):
    """A judge is not asked about them."""
    rows = [annotated({**r, "task": "gsm8k"}, True) for r in world.rows]
    rows[0] |= {"correct": False, "valid": None, "verdict": None}
    data_of(pool=write_jsonl(tmp_path / "judged.jsonl", rows))
    assert "no judge" not in capsys.readouterr().out


# ---------------------------------------------------------------- the default: python distill.py
def test_default_run_on_the_embedded_demo(tmp_path, monkeypatch, capsys):
    bar = distill.tqdm

    def short(it, *a, **k):  # two steps of warm start instead of hundreds
        return range(2) if "warm start" in k.get("desc", "") else bar(it, *a, **k)

    monkeypatch.setattr(distill, "tqdm", short)
    monkeypatch.chdir(tmp_path)
    distill.main(["--max_steps", "2", "--eval_limit", "4", "--eval_max_new_tokens", "4"])
    out, = (tmp_path / "out").iterdir()
    results = json.loads((out / "results.json").read_text())
    assert {"before", "after", "selection_rate", "tokens_trained", "seconds", "counts"} <= results.keys()
    for when in ("before", "after"):
        assert len(results[when]["accuracy"]) == 2 and {"ensemble", "upper_bound", "questions"} <= results[when].keys()
    printed = capsys.readouterr().out
    assert all(
        word in printed
        for word in ("before", "after", "ensemble", "upper bound", "selection rate", "wrong", "invalid", *judge.STYLES)
    )
    kinds = {json.loads((out / f"student_{i}" / "config.json").read_text())["model_type"] for i in (0, 1)}
    assert len(kinds) == 2
    for i in (0, 1):
        model, tokenizer = tasks.load_student(str(out / f"student_{i}"))
        assert 2e5 < model.num_parameters() < 1e6
        assert [len(tokenizer(f" {n}", add_special_tokens=False)["input_ids"]) for n in (7, 42, 199)] == [1, 1, 1]


def test_cached_demo_students_are_kept_whole_and_made_again_where_a_part_is_missing(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(distill, "warm_start", lambda *args: torch.rand(7))
    monkeypatch.setattr(distill.inspect, "getsource", str)
    first = distill.demo_students(0)
    folder, = (tmp_path / "qr-distill").iterdir()
    for file in [*folder.glob("*/tokenizer.json"), *folder.glob("*/model.safetensors")]:
        whole = file.read_bytes()
        file.unlink()
        again = distill.demo_students(0)
        assert file.read_bytes() == whole and len(list((tmp_path / "qr-distill").iterdir())) == 1
        for (a, words), (b, pieces) in zip(first, again):
            assert same_tensors(a.state_dict(), b.state_dict()) and words.get_vocab() == pieces.get_vocab()


def test_demo_test_questions_are_not_trained(monkeypatch):
    kept, test, _ = distill.load_data(distill.parse_args([]))
    assert len(test) == 300 and not {r["question"] for r in kept} & {q["question"] for q in test}
    assert len({r["id"] for r in kept}) > 250 and {r["style"] for r in kept} == set(judge.STYLES)


# ---------------------------------------------------------------- bad input: one sentence, exit code 2
def refused(capsys, argv):
    """Run main, which must end with code 2 and one sentence -> that sentence."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as e:
        distill.main([str(a) for a in argv])
    assert e.value.code == 2
    lines = [
        line
        for line in capsys.readouterr().err.replace("\r", "\n").splitlines()
        if line.startswith("error:") or "Error" in line
    ]
    assert len(lines) == 1 and lines[0].startswith("error: ")
    return lines[0]


def spoiled(world, tmp_path, number, line):
    lines = pathlib.Path(world.pool).read_text().splitlines()
    lines[number - 1] = line if isinstance(line, str) else json.dumps({**json.loads(lines[number - 1]), **line})
    file = tmp_path / "spoiled.jsonl"
    file.write_text("\n".join(lines) + "\n")
    return file


@pytest.mark.parametrize(
    "line, says",
    [
        ('{"id": "x", "task": ', "not valid JSON"), ("[1, 2]", "object"), ({"path": None}, "path"),
        ({"question": ""}, "question"), ({"answer": 3}, "answer"), ({"task": "sudoku"}, "sudoku"),
        ({"task": "arc", "choices": {"A": "x"}, "answer": "Z"}, "choices"),
    ],
)
def test_bad_line_of_a_pool_is_named_by_file_and_number(world, tmp_path, capsys, line, says):
    file = spoiled(world, tmp_path, 17, line)
    error = refused(capsys, flags_of(world, tmp_path / "run", "--paths", file))
    assert f"{file}:17" in error and says in error and not (tmp_path / "run").exists()


@pytest.mark.parametrize("written", ["checkpoint.safetensors", "log.jsonl", "student_1", "predictions.jsonl"])
def test_full_disk_ends_a_run_in_a_sentence_that_says_how_to_go_on(world, tmp_path, capsys, written):
    out, full = tmp_path / "my run", OSError(28, "No space left on device")
    flags = flags_of(world, out, "--save_every", 2)

    def fails(plain):
        def write(*args, **more):
            if any(written in str(x) for x in args) and (out / "checkpoint.safetensors").exists():
                raise full
            return plain(*args, **more)
        return write

    with pytest.MonkeyPatch.context() as patch:
        for where, name in ((distill, "save_file"), (distill.Path, "write_text"), (distill, "save_student")):
            patch.setattr(where, name, fails(getattr(where, name)))
        patch.setattr("builtins.open", fails(open))
        error = refused(capsys, flags)
    assert "No space left on device" in error and f"--resume '{out}'" in error
    distill.main(["--resume", str(out)])
    assert (out / "results.json").exists()


def test_full_disk_at_the_start_names_no_resume(world, tmp_path, monkeypatch, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "args.json").write_text("{}")  # of a run that never got to its start

    def full(*args, **more):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(distill.Path, "write_text", full)
    error = refused(capsys, flags_of(world, tmp_path / "run"))
    assert "No space left on device" in error and "start again" in error and "--resume" not in error


def test_table_stands_on_the_screen_before_the_results_are_written(monkeypatch, world, tmp_path, capsys):
    def write(text, file):
        assert "results.json" not in str(file)
        plain(text, file)

    plain = distill.write_atomic
    monkeypatch.setattr(distill, "write_atomic", write)
    with pytest.raises(AssertionError):
        distill.main(flags_of(world, tmp_path / "run"))
    assert "upper bound" in capsys.readouterr().out


def test_missing_field_is_named(world, tmp_path, capsys):
    row = {k: v for k, v in world.rows[4].items() if k != "style"}
    error = refused(capsys, flags_of(world, tmp_path / "run", "--paths", spoiled(world, tmp_path, 5, json.dumps(row))))
    assert "spoiled.jsonl:5" in error and "style" in error


BAD_FLAGS = [
    "--train_frac 0", "--train_frac 1.5", "--test_frac -0.1", "--test_frac nan", "--gate ajar",
    "--lr 0", "--lr nan", "--lr 1 2 3", "--freeze 2", "--freeze -1", "--lora_rank -1",
    "--batch_size 0", "--micro_batch_size 0", "--epochs 0", "--max_steps 0", "--seed -1",
    "--mutual_weight -1", "--entropy_weight -1", "--eval_limit -1", "--eval_every -1",
    "--eval_max_new_tokens 0", "--max_len 0", "--save_every 0", "--router_lr -1",
    "--styles limerick", "--max_len 9", "--device nonsense", "--encoder no/such/folder",
]


@pytest.mark.parametrize("flags", BAD_FLAGS)
def test_flag_out_of_range_is_refused_by_name(world, tmp_path, capsys, flags):
    error = refused(capsys, flags_of(world, tmp_path / "run", *flags.split()))
    assert flags.split()[0] in error and len(error) < 500 and not (tmp_path / "run").exists()


def test_device_that_is_not_there_is_refused(world, tmp_path, capsys):
    if torch.cuda.is_available():
        pytest.skip("needs a machine without CUDA")
    assert "cuda" in refused(capsys, flags_of(world, tmp_path / "run", "--device", "cuda"))


def test_files_that_are_not_there_are_refused_by_name(world, tmp_path, capsys):
    assert "no-pool" in refused(capsys, flags_of(world, tmp_path / "run", "--paths", "no-pool.jsonl"))
    assert "no-test" in refused(capsys, flags_of(world, tmp_path / "run", "--eval_questions", "no-test.jsonl"))


def test_empty_pool_is_refused_by_name(world, tmp_path, capsys):
    (tmp_path / "empty.jsonl").write_text("\n")
    assert "empty.jsonl" in refused(capsys, flags_of(world, tmp_path / "run", "--paths", tmp_path / "empty.jsonl"))


def test_out_dir_that_is_a_file_is_refused(world, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert "file" in refused(capsys, flags_of(world, tmp_path / "file"))


def test_folder_that_is_no_model_is_refused_by_name(world, tmp_path, capsys, train):
    (tmp_path / "nothing").mkdir()
    assert str(tmp_path / "nothing") in refused(
        capsys, flags_of(world, tmp_path / "run", students=("words", str(tmp_path / "nothing")))
    )
    broken = tmp_path / "broken"
    broken.mkdir()
    for f in pathlib.Path(world.students["words"]).iterdir():
        (broken / f.name).write_bytes(f.read_bytes()[:100])
    assert str(broken) in refused(capsys, flags_of(world, tmp_path / "run", students=(str(broken), "words")))
    adapter = train("--lora_rank", 2, "--max_steps", 1, name="adapter").out / "student_0"
    assert "adapter" in refused(capsys, flags_of(world, tmp_path / "run", students=("words", str(adapter))))


def test_pool_of_which_the_filter_leaves_nothing_is_refused(world, tmp_path, capsys):
    wrong = write_jsonl(tmp_path / "wrong.jsonl", [r for r in world.rows if not r["source_correct"]])
    assert "no path is left" in refused(capsys, flags_of(world, tmp_path / "run", "--paths", wrong))
    assert "left to train on" in refused(capsys, flags_of(world, tmp_path / "run", "--test_frac", 1))


def test_demo_students_refuse_another_task(world, tmp_path, capsys):
    pool = write_jsonl(tmp_path / "gsm.jsonl", [{**r, "task": "gsm8k"} for r in world.rows])
    assert "--students" in refused(capsys, ["--paths", pool, "--out_dir", tmp_path / "run"])


def test_pool_graded_but_never_judged_is_read_or_refused_but_does_not_crash(world, tmp_path, data_of):
    rows = [{**r, "correct": r["source_correct"]} for r in world.rows]
    kept, _ = data_of(pool=write_jsonl(tmp_path / "graded.jsonl", rows))
    assert {r["source_correct"] for r in kept} == {True}


def test_resume_refuses_other_flags_other_data_and_folders_that_are_no_run(world, tmp_path, capsys, train):
    run = train("--max_steps", 2)
    for more in (["--seed", 5], ["--max_steps", 3], ["--seed=5"], ["--no-standardize"], ["--out_dir", tmp_path / "other"]):
        assert "own flags" in refused(capsys, [f"--resume={run.out}", *more])
    assert "args.json" in refused(capsys, ["--resume", tmp_path])
    assert "args.json" in refused(capsys, ["--resume", tmp_path / "nowhere"])
    error = refused(capsys, flags_of(world, run.out))  # a new run does not write over an old one
    assert str(run.out) in error and "--resume" in error
    before = vars(run)["weights"]
    distill.main([f"--resume={run.out}"])
    assert all(same_tensors(before[k], v) for k, v in files_of(run.out)["weights"].items())
    args = json.loads((run.out / "args.json").read_text())
    pool = write_jsonl(tmp_path / "pool.jsonl", world.rows[:-6])
    (run.out / "args.json").write_text(json.dumps({**args, "paths": pool}))
    assert "pool" in refused(capsys, ["--resume", run.out])


def test_resume_of_a_run_killed_while_it_wrote_its_flags_is_refused(tmp_path, capsys):
    (tmp_path / "args.json").write_text('{"seed": 0, "dev')
    assert "args.json" in refused(capsys, ["--resume", tmp_path])


def test_bad_input_from_the_command_line_has_no_traceback(world, tmp_path):
    command = [
        sys.executable, ROOT / "distill.py",
        *flags_of(world, tmp_path / "run", "--paths", spoiled(world, tmp_path, 3, "{")),
    ]
    done = subprocess.run(
        command, check=False, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 2 and done.stdout == ""
    assert "Traceback" not in done.stderr and len(done.stderr.splitlines()) == 1 and "spoiled.jsonl:3" in done.stderr
