"""Claims about the training run, against float64, Hugging Face's loss, PEFT and the run that nobody
killed.

promise                                     held by
a kill and --resume give the unkilled run   test_a_killed_run_resumes_bit_for_bit
other flags or other data do not resume     test_resume_is_refused
nothing is unpickled, no file stays open    test_a_checkpoint_runs_no_code_and_is_closed_again
a loss that is not finite ends the run      test_a_run_that_stops_being_finite_keeps_...
response and end token alone train          test_the_path_and_the_end_token_train
prompt at training = prompt at test         test_a_student_is_trained_and_tested_on_one_prompt
the loss is the model's, or it is refused   test_loss_..., test_forward_..., test_a_head_...
LoRA is PEFT's, on disk and in 4 bit too    test_lora_..., test_a_saved_..., test_a_4_bit_...
no held-out question trains                 test_copies_of_test_questions_do_not_train
all others do, and all are counted          test_other_questions_train, test_what_is_empty_...
bad input is one sentence, exit code 2      test_bad_input_is_one_sentence
logging never ends a run                    test_a_run_outlives_its_logging
"""
import copy
import functools
import importlib.util
import json
import math
import os
import pathlib
import pickle
import re
import shutil
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import peft
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import distill
import eval as tasks
import judge
import router as qr

CPU = torch.device("cpu")
NO_SCALER = torch.amp.GradScaler("cpu", enabled=False)
CHATML = ("{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
          "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
GROUPED = {"num_key_value_heads": 1, "head_dim": 8}
KINDS = {  # of tiny students: a family, and what is special about it
    "llama": ("llama", {**GROUPED, "tie_word_embeddings": True}),
    "gpt2": ("gpt2", {}),
    "neox": ("gpt_neox", {"attention_bias": False, "tie_word_embeddings": False}),
    "dropout": ("gpt_neox", {"attention_bias": False, "hidden_dropout": 0.1}),
    "gemma2": ("gemma2", {**GROUPED, "sliding_window": 8, "final_logit_softcapping": 2.0}),
    "gemma3": ("gemma3_text", {**GROUPED, "sliding_window": 8}),
    "cohere": ("cohere", {"num_key_value_heads": 1, "logit_scale": 0.0625}),
    "granite": ("granite", {"num_key_value_heads": 1, "logits_scaling": 8.0}),
}


# ---------------------------------------- tiny students, a pool, runs
def tiny_model(kind, vocab=60):
    """A random causal LM with weights so large that its logits are far from uniform."""
    torch.manual_seed(len(kind))
    family, special = KINDS[kind]
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(
        family, vocab_size=vocab, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=24, max_position_embeddings=1024, initializer_range=0.3,
        bos_token_id=None, eos_token_id=1, pad_token_id=2, **special))
    for name, p in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(p, std=0.3)  # zero at birth, so that nobody would miss them
    return model.eval()


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A pool of 24 demo questions with six paths each, and the folders of five random students."""
    folder = tmp_path_factory.mktemp("world")
    rows = judge.demo_paths(judge.demo_questions(24, 0), 0)
    for row in rows:
        row["valid"] = judge.rule_judge(row)[0]
    corpus = [text for row in rows for text in (tasks.student_prompt(row), row["path"])]
    students = {}
    for name, kind, whole_words in (("words", "llama", True), ("pieces", "neox", False),
                                    ("dropout", "dropout", False), ("chat", "gemma3", True),
                                    ("pad_is_eos", "llama", True)):
        tokenizer = distill.demo_tokenizer(corpus, whole_words)
        if name == "chat":
            tokenizer.add_tokens(["<|im_start|>", "<|im_end|>", "user\n", "assistant\n"], True)
            tokenizer.chat_template = CHATML
        if name == "pad_is_eos":
            tokenizer.pad_token = "<eos>"
        students[name] = str(folder / name)
        tiny_model(kind, len(tokenizer)).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return SimpleNamespace(rows=rows, students=students, pool=pool_of(folder / "pool.jsonl", rows))


def pool_of(file, rows):
    distill.write_jsonl(file, rows)
    return str(file)


def flags_of(world, out, *flags, students=("words", "pieces")):
    """A run of three steps; of a flag that stands twice the last one counts."""
    return ["--lora_rank", "0", "--lr", "1e-2", "--max_steps", "3", "--batch_size", "4",
            "--eval_limit", "3", "--eval_max_new_tokens", "3", "--device", "cpu",
            "--dtype", "float32", "--paths", world.pool, "--out_dir", str(out),
            "--students", *(world.students.get(s, str(s)) for s in students), *map(str, flags)]


def files_of(out):
    """What a run leaves, without its clocks."""
    results = json.loads((out / "results.json").read_text())
    log = tasks.read_jsonl(out / "log.jsonl")
    for line in (results, *log):
        line.pop("seconds", None), line.pop("tokens_per_s", None)
    files = sorted(out.glob("student_*/*.safetensors"))
    return {"results": results, "log": log, "weights": {f.parent.name: load_file(f) for f in files},
            "decisions": tasks.read_jsonl(out / "decisions.jsonl"),
            "predictions": tasks.read_jsonl(out / "predictions.jsonl")}


def same_tensors(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def assert_same_run(a, b):
    for part in ("results", "log", "decisions", "predictions"):
        assert a[part] == b[part], part
    assert a["weights"] and a["weights"].keys() == b["weights"].keys()
    assert all(same_tensors(a["weights"][s], b["weights"][s]) for s in a["weights"])


@pytest.fixture
def train(world, tmp_path, monkeypatch):
    """train(*flags) runs main in a folder of its own -> its files and what it held in memory."""
    held, plain = {}, distill.make_optimizers
    monkeypatch.setattr(distill, "make_optimizers", lambda *args: (
        held.update(zip(("students", "collab", "router"), args)), plain(*args))[1])

    def run(*flags, students=("words", "pieces"), name="run"):
        distill.main(flags_of(world, tmp_path / name, *flags, students=students))
        return SimpleNamespace(out=tmp_path / name, **held, **files_of(tmp_path / name))

    return run


def refused(capsys, argv):
    """main must end with code 2 and one sentence, which is returned."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        distill.main([str(word) for word in argv])
    lines = capsys.readouterr().err.replace("\r", "\n").splitlines()
    error, = [line for line in lines if line.startswith("error:") or "Error" in line]
    assert end.value.code == 2 and error.startswith("error: ") and len(error) < 600
    return error


def as_student(model, tokenizer=None):
    """A student as a run holds it."""
    end = tasks.end_token(tokenizer) if tokenizer else 1
    return distill.Student(model, model.base_model, tokenizer, None, "X", end, 1e-3, 10**6)


def random_rows(lengths, students=1):
    """Tokenised rows of random ids from (prompt, response) lengths. Each further student has one
    token more, in a segment that has two."""
    r, rows = np.random.default_rng(0), []
    for p, n in lengths:
        segments = [np.sort([*range(n - 1), *r.integers(0, n - 1, s)]) for s in range(students)]
        responses = [torch.tensor([*r.integers(3, 60, len(x)), 1]) for x in segments]
        rows.append({"prompts": [torch.tensor(r.integers(3, 60, p)) for _ in range(students)],
                     "responses": responses, "segments": segments, "n_segments": n - 1})
    return rows


def alone(model, row, s=0):
    """The oracle: Hugging Face's own forward pass over one row, without padding -> the response's
    summed loss, and the states on its text (T, D)."""
    prompt, response = row["prompts"][s], row["responses"][s]
    out = model(input_ids=torch.cat([prompt, response])[None], output_hidden_states=True)
    logits = out.logits[0, len(prompt) - 1:-1]
    return (F.cross_entropy(logits, response, reduction="sum"),
            out.hidden_states[-1][0, len(prompt):-1])


def close(x, exact, terms):
    """x, in float32, is `exact` up to rounding: each of `terms` roundings in a row adds at most one
    part in 2**24 of the largest number."""
    limit = terms * 2**-24 * exact.abs().max().item() if exact.numel() else 0
    return torch.allclose(x.double(), exact.double(), rtol=0, atol=limit)


# ---------------------------------------- the loss
def exact_loss(states, weight, target, g, softcap):
    """In float64: the losses, the gradients of g . losses, and the sizes of the sums that they are:
    (loss, its size), (d states, size), (d weight, size)."""
    x, w = (t.detach().double().requires_grad_() for t in (states, weight))
    logits = x @ w.T
    capped = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    nll = F.cross_entropy(capped, target, reduction="none")
    grads = torch.autograd.grad((g.double() * nll).sum(), (x, w))
    # |d nll / d logits| is at most this, and so are the terms that are subtracted in it.
    p = capped.softmax(1).detach() + F.one_hot(target, len(w))
    gp = g.double().abs()[:, None] * p
    sizes = [gp @ w.detach().abs(), gp.T @ x.detach().abs()]
    return [(nll.detach(), 1 + nll.detach().abs()), *zip(grads, sizes)]


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("n, d, vocabulary, softcap", [
    (1, 5, 11, None), (15, 5, 11, None), (16, 5, 11, 3.0), (17, 5, 11, 3.0), (32, 5, 11, None),
    (70, 64, 500, 30.0), (18, 2, 262_144, None)])
def test_loss_equals_float64(monkeypatch, trained, n, d, vocabulary, softcap):
    """Gradients too, with the logits of 16 positions at a time. A float32 sum of k
    terms, in whatever order a processor takes them, is off by at most k parts in 2**24 of the sum
    of their sizes (Higham, 2002, section 4.2)."""
    seen, plain = [], distill.nll_chunks

    def chunks(*args):
        for rows, *rest in plain(*args):
            seen.append(rows.stop - rows.start)
            yield rows, *rest

    monkeypatch.setattr(distill, "LOGITS", 1)
    monkeypatch.setattr(distill, "nll_chunks", chunks)
    r = torch.Generator().manual_seed(n)
    states, weight = torch.randn(n, d, generator=r), torch.randn(vocabulary, d, generator=r)
    target, g = torch.randint(vocabulary, (n,), generator=r), torch.randn(n, generator=r)
    exact = exact_loss(states, weight, target, g, softcap)
    largest = (states.abs() @ weight.abs().T).max().item()  # of a logit's sum
    leaves = [states.requires_grad_(), weight.requires_grad_(trained)]
    nll = distill.ChunkedNLL.apply(states, weight, target, softcap)
    nll.backward(g)
    assert max(seen) <= 16 and sum(seen) == n * (1 + trained)  # a trained head runs twice
    # Terms in a row: a logit, its softmax, the sum over the vocabulary, the sum over positions.
    roundings = 2 * vocabulary + (d + 20) * (1 + largest) + n
    got = [nll.detach(), *(x.grad for x in leaves if x.requires_grad)]
    assert len(got) == (len(exact) if trained else 2)
    for ours, (theirs, size) in zip(got, exact):
        assert ours.dtype == torch.float32
        assert ((ours - theirs).abs() <= roundings * 2**-24 * size).all()


# ---------------------------------------- forward: the model's own loss and states
@pytest.mark.parametrize("kind", KINDS)
def test_forward_equals_the_model(monkeypatch, kind):
    """Losses, gradients and states of padded batches are those of each path alone."""
    plain = distill.batches_of
    monkeypatch.setattr(distill, "batches_of", lambda lengths, max_tokens: plain(lengths, 60))
    lengths = [(5, 9), (1, 2), (12, 20), (3, 3), (30, 4), (2, 31), (7, 1)]
    model, rows = tiny_model(kind), random_rows(lengths)
    exact, weight = copy.deepcopy(model).double(), torch.linspace(0.5, 2, len(rows))
    distill.check_student(as_student(model))  # accepts it
    nats, states = distill.forward(as_student(model), 0, rows, [*range(len(rows))])
    (weight * nats).sum().backward()
    terms = 200 * sum(n for _, n in lengths)  # a dozen products of 16 to 24 terms, by position
    for i, row in enumerate(rows):
        nll, its_states = alone(exact, row)
        (weight[i] * nll).backward()
        assert close(nats[i], nll, terms) and close(states[i], its_states, terms)
    for (name, ours), theirs in zip(model.named_parameters(), exact.parameters()):
        assert close(ours.grad, theirs.grad, terms), name


@pytest.mark.parametrize("what", ["factor", "bias"])
def test_a_head_that_changes_the_logits_otherwise_is_refused(capsys, what):
    model = tiny_model("cohere")
    if what == "factor":
        model.config.logit_scale = 1.0  # the module keeps its own
    else:
        model.lm_head.bias = torch.nn.Parameter(torch.full((60,), 1e-3))
    with pytest.raises(SystemExit):
        distill.check_student(as_student(model))
    assert "output head" in capsys.readouterr().err


# ---------------------------------------- what trains: the path and the end token
TEXTS = ["2 + 2 = 4\nThe answer is 4", "  Naïve 数学 🙂🙂, so 12,345.67%.\n\n\tThe answer 4 ",
         "<<2*2=4>>4\n#### 4", "four", "It ends with <|im_end|> or <eos>. The answer is 4"]


@pytest.mark.parametrize("name, end", [
    ("words", "<eos>"), ("pieces", "<eos>"), ("pad_is_eos", "<eos>"), ("chat", "<|im_end|>"),
    ("smollm2", "<|im_end|>"), ("gemma3", "<eos>")])
def test_the_path_and_the_end_token_train(world, request, name, end):
    folder, rows = world.students.get(name), world.rows
    if folder is None:  # a real one reads any text
        folder = request.getfixturevalue("models_dir") / name
        rows = [{**rows[0], "id": text, "path": text} for text in TEXTS]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    student = SimpleNamespace(tokenizer=tokenizer, end=tasks.end_token(tokenizer), max_len=10**6)
    encoded = distill.encode(rows, [student])
    assert len(encoded) == len(rows)
    for row, coded in zip(rows, encoded):
        *response, last = coded["responses"][0].tolist()
        assert tokenizer.convert_ids_to_tokens(last) == end and last not in response
        text = tokenizer.decode(response, clean_up_tokenization_spaces=False)
        assert text == row["path"].strip()


@pytest.mark.parametrize("name", ["words", "chat"])
def test_a_student_is_trained_and_tested_on_one_prompt(world, monkeypatch, name):
    student = as_student(*tasks.load_student(world.students[name]))
    asked, generate = [], tasks.generate
    questions = [world.rows[0], {**world.rows[6], "prompt": "Facts: Tom has 3 apples"}]
    monkeypatch.setattr(tasks, "generate", lambda model, tokenizer, prompts, *a, **k: (
        asked.extend(prompts), generate(model, tokenizer, prompts, *a, **k))[1])
    tasks.evaluate([(student.model, student.tokenizer)], questions, 1)
    trained = distill.encode(questions, [student])
    assert [row["prompts"][0].tolist() for row in trained] == asked
    assert "Facts" in student.tokenizer.decode(asked[1])


def test_what_is_empty_or_too_long_is_left_out_and_counted(world, capsys):
    student = as_student(*tasks.load_student(world.students["words"]))
    sizes = [len(row["prompts"][0]) + len(row["responses"][0])
             for row in distill.encode(world.rows, [student])]
    student.max_len = sorted(sizes)[len(sizes) // 2]
    kept = distill.encode([*world.rows, {**world.rows[0], "path": " \n"}], [student])
    assert len(kept) == sum(n <= student.max_len for n in sizes) < len(sizes)
    assert f"left out {145 - len(kept)} of 145 paths" in capsys.readouterr().out
    assert {row["label"] for row in kept} == set(judge.STYLES)  # with a second teacher's name only
    kept = distill.encode([*kept, {**kept[0], "style": "program", "teacher": "B"}], [student])
    assert kept[-1]["label"] == "program, B" and "vanilla, demo-teacher" in kept[0]["label"]


# ---------------------------------------- the steps of the method
@pytest.mark.parametrize("route", ["all", "short", "nll", "random"])
def test_a_route_is_every_the_shortest_the_likeliest_or_any_path_of_each_student(world, route):
    students = [as_student(*tasks.load_student(world.students[name]))
                for name in ("words", "pieces")]
    rows = distill.encode(world.rows[:12], students)
    _, question = distill.by_question(rows)
    lengths = torch.tensor([[len(response) for response in row["responses"]] for row in rows])
    fixed = distill.fixed_route(route, rows, question, lengths, students)
    assert (fixed is None) == (route == "random")  # which the router draws, untrained
    if route == "all":
        assert (fixed == 1).all()
    for s, q in ((0, 0), (0, 1), (1, 0), (1, 1)) if route in ("short", "nll") else ():
        cost = {i: float(lengths[i, s]) for i in range(12) if question[i] == q}
        if route == "nll":
            cost = {i: float(alone(students[s].model, rows[i], s)[0].detach()) / n
                    for i, n in cost.items()}
        assert [i for i in cost if fixed[i, s]] == [min(cost, key=cost.get)]


ROUTED = torch.tensor([[1, 1, 0], [1, 0, 0], [0, 1, 1], [1, 1, 1], [0, 0, 1], [0, 0, 0]]).bool()
LENGTHS = [(4, 5), (3, 9), (2, 7), (6, 4), (5, 5), (3, 6)]


def one_graph(exact, collab, rows, weight, mutual_weight):
    """Eq 5 to 9 in float64 and in one graph, path by path -> the loss, nats (P, S)."""
    loss, nats, states = 0, torch.zeros(6, 3, dtype=torch.float64), {}
    for i, s in ROUTED.nonzero().tolist():
        nll, states[i, s] = alone(exact[s], rows[i], s)
        nats[i, s] = nll.detach()
        loss = loss + weight[i, s] * nll
    shared = [i for i in range(6) if ROUTED[i].sum() > 1]
    for i in shared:
        n, segments = rows[i]["n_segments"], rows[i]["segments"]
        none = torch.zeros(0, 16, dtype=torch.float64)
        z = [states.get((i, s), none) for s in range(3)]
        segment = [torch.tensor(segments[s])[:len(z[s])] for s in range(3)]
        l_mutual, l_competence, *_ = collab(z, segment, torch.zeros(n, dtype=torch.long),
                                            ROUTED[i:i + 1], nats[i:i + 1] / n)
        loss = loss + (mutual_weight * l_mutual.sum() + l_competence.sum()) / len(shared)
    return loss, nats


@pytest.mark.parametrize("size, printed", [(3, ()), (2, ()), (1, ()), (2, ("eq5", "eq6", "eq8"))])
def test_gradients_of_a_step_are_those_of_one_graph_in_float64(monkeypatch, size, printed):
    """Of any micro-batch size; what is not routed does not run; each segment of the ensemble is of
    one path."""
    rows, kinds = random_rows(LENGTHS, students=3), ("llama", "neox", "gemma3")
    students = [as_student(tiny_model(kind)) for kind in kinds]
    torch.manual_seed(0)
    collab = qr.Collaboration([16] * 3, 8, printed)
    torch.nn.init.normal_(collab.w)
    exact = [copy.deepcopy(student.model).double() for student in students]
    exact_collab = copy.deepcopy(collab).double()
    ran, forward = [], distill.forward
    monkeypatch.setattr(distill, "forward", lambda student, s, paths, mine: (
        ran.extend((i, s) for i in mine), forward(student, s, paths, mine))[1])
    question, weight = torch.tensor([0, 0, 1, 1, 2, 2]), torch.rand(6, 3)
    batches = distill.micro_batches(question, size)
    nats, figures = distill.student_step(students, collab, rows, batches, ROUTED, weight,
                                         NO_SCALER, 0.7)
    assert sorted(ran) == sorted(map(tuple, ROUTED.nonzero().tolist()))
    loss, exact_nats = one_graph(exact, exact_collab, rows, weight.double(), 0.7)
    loss.backward()
    terms = 200 * sum(n for _, n in LENGTHS)
    assert close(nats, exact_nats, terms) and figures["co_routed"] == 0.5
    probed = distill.probe(students, rows, batches, ROUTED)
    assert close(probed, exact_nats, terms) and not probed.requires_grad
    ours = [*(student.model for student in students), collab]
    for a, b in zip(ours, [*exact, exact_collab]):
        for (name, x), y in zip(a.named_parameters(), b.parameters()):
            assert (x.grad is None) == (y.grad is None), name
            assert x.grad is None or close(x.grad, y.grad, terms), name


# ---------------------------------------- LoRA is PEFT's
def assert_lora_is_pefts(model, same):
    """Logits, gradients, what has a gradient: LoRA of ours on `model`, of PEFT's on `same`."""
    theirs = peft.get_peft_model(same, peft.LoraConfig(
        r=4, lora_alpha=6, target_modules="all-linear", lora_dropout=0.0, task_type="CAUSAL_LM")).eval()
    distill.add_lora(model, 4, 6)
    layers = {name: m for name, m in model.named_modules() if isinstance(m, distill.LoRA)}
    wrapped = {name.removeprefix("base_model.model."): m for name, m in theirs.named_modules()
               if isinstance(m, peft.tuners.lora.LoraLayer)}
    assert layers.keys() == wrapped.keys() and len(layers) >= 8
    pairs = []
    for name, layer in layers.items():
        torch.nn.init.normal_(layer.B, std=0.3)  # zero at birth
        pairs += [(layer.A, wrapped[name].lora_A["default"].weight),
                  (layer.B, wrapped[name].lora_B["default"].weight)]
    for ours, peft_weight in pairs:
        peft_weight.data = ours.data.clone()
    ids = torch.randint(60, (3, 9), generator=torch.Generator().manual_seed(0))
    a, b = model(input_ids=ids, labels=ids), theirs(input_ids=ids, labels=ids)
    assert close(a.logits, b.logits, 500)
    a.loss.backward(), b.loss.backward()
    trained = {id(p) for p in model.parameters() if p.grad is not None}
    assert trained == {id(ours) for ours, _ in pairs}
    for ours, peft_weight in pairs:
        assert ours.grad.abs().max() > 0 and close(ours.grad, peft_weight.grad, 500)


@pytest.mark.parametrize("kind", ["llama", "neox", "gemma3"])
def test_lora_changes_nothing_at_birth_and_then_is_pefts(kind):
    model, newborn, ids = tiny_model(kind), tiny_model(kind), torch.arange(3, 20)[None]
    distill.add_lora(newborn, 4, 6)
    assert torch.equal(newborn(input_ids=ids).logits, model(input_ids=ids).logits)
    assert_lora_is_pefts(model, copy.deepcopy(model))


@pytest.mark.parametrize("rank", [0, 4])
@pytest.mark.parametrize("students", [("words", "dropout"), ("chat", "pad_is_eos")])
def test_a_saved_adapter_or_student_is_loaded_with_the_same_logits(train, students, rank):
    """By PEFT, and merged by eval.py."""
    run = train("--lora_rank", rank, "--lr", 0.05, students=students)
    ids = torch.arange(5, 45).view(2, 20)
    for s, student in enumerate(run.students):
        folder = run.out / f"student_{s}"
        with torch.no_grad():
            trained = student.model.eval()(input_ids=ids).logits
            base = AutoModelForCausalLM.from_pretrained(student.source if rank else folder)
            model, tokenizer = tasks.load_student(str(folder))
            if rank:
                assert not close(base(input_ids=ids).logits, trained, 10**5)
                base = peft.PeftModel.from_pretrained(base, folder)
                names = load_file(folder / "adapter_model.safetensors").keys()
                assert names == peft.get_peft_model_state_dict(base).keys()
            assert torch.equal(base(input_ids=ids).logits, trained)
            assert close(model(input_ids=ids).logits, trained, 500)
        assert tokenizer.chat_template == student.tokenizer.chat_template
        assert tokenizer("We get 3").input_ids == student.tokenizer("We get 3").input_ids


@pytest.mark.parametrize("name", ["words", "dropout", "pieces", "chat"])
def test_a_4_bit_base_keeps_its_head_and_its_adapters_are_pefts(world, name):
    bnb = pytest.importorskip("bitsandbytes", reason="needs pip install bitsandbytes accelerate")
    args = SimpleNamespace(lora_rank=2, quantize="nf4")
    full = tasks.load_student(world.students[name])[0]
    model, same = (distill.load_base(world.students[name], args, CPU, None)[0] for _ in "ab")
    linear = {name for name, m in full.named_modules() if isinstance(m, torch.nn.Linear)}
    packed = {name for name, m in model.named_modules() if isinstance(m, bnb.nn.Linear4bit)}
    assert packed == linear - {"lm_head"} and len(packed) >= 8
    assert torch.equal(model.get_output_embeddings().weight, full.get_output_embeddings().weight)
    assert_lora_is_pefts(model, same)


# ---------------------------------------- --as_printed: the paper's form, equation by equation
PRINTED = {  # what can be seen of an equation from outside
    "eq1": lambda run: getattr(run.router.net, "in_features", 0) == 512,  # no style
    "eq2": lambda run: re.findall(r"Linear|ReLU", str(run.router)) == ["Linear", "ReLU", "Linear"],
    "eq3": lambda run: run.log[0]["entropy"] < math.log(2) - 1e-4,  # of draws, not of their odds
    "eq5": lambda run: all(p.requires_grad for p in run.collab.proj.parameters()),
    "eq6": lambda run: "eq6" in run.collab.printed,
    "eq8": lambda run: "eq8" in run.collab.printed,
    # The weights of the losses, before the first step.
    "eq9": lambda run: run.log[0]["grad_norm/1"] != run.plain.log[0]["grad_norm/1"]}
SEEN = ("--gate", "binary", "--reward", "sum", "--probe", 0.5, "--router_lr", 0.1, "--max_steps", 2,
        "--entropy_weight", 1, "--mutual_weight", 1)


def test_each_equation_as_printed_does_what_it_says_and_no_other_does(train):
    plain = train(*SEEN, name="plain")
    plain.plain = plain
    for equation, seen in PRINTED.items():
        run = train(*SEEN, "--as_printed", equation, name=equation)
        run.plain = plain
        assert seen(run) and not seen(plain), equation
        assert run.log != plain.log, equation


def test_eq_4_is_maximised(train):
    free, held = (train(*SEEN, "--max_steps", 8, "--entropy_weight", weight, name=f"{weight}")
                  for weight in (0, 50))
    assert held.log[-1]["entropy"] > free.log[-1]["entropy"]


def test_all_as_printed_is_every_equation_and_the_flags_that_they_set(train):
    flags = {"gate": "onehot", "router_lr": 0.01, "reward": "loss", "probe": 0.0}
    every = ["--as_printed", *distill.PRINTED]
    spelled = every + [word for name, x in flags.items() for word in (f"--{name}", str(x))]
    every, everything, spelled = (vars(distill.parse_args([*way, "--out_dir", "x"]))
                                  for way in (every, ["--as_printed", "all"], spelled))
    assert every == everything == spelled and flags.items() <= every.items()
    beside = distill.parse_args(["--as_printed", "all", "--gate", "binary", "--router_lr", "0.5"])
    assert (beside.gate, beside.router_lr, beside.probe) == ("binary", 0.5, 0.0)
    for line in train("--as_printed", "all").log:  # Eq 2: every path goes to exactly one student
        assert line["rate/0"] + line["rate/1"] == pytest.approx(1) and line["co_routed"] == 0
        assert line["entropy"] == pytest.approx(math.log(2), abs=1e-4)  # so Eq 4 is a constant


# ---------------------------------------- flags and bad input: one sentence, exit code 2
BAD = [  # flags, and what the sentence must name; {...} are files of bad_files
    *((flags, flags.split()[0]) for flags in (
        "--gate ajar", "--lr nan", "--lr -1", "--lr 1 2 3",
        "--lora_rank -1", "--batch_size 0", "--micro_batch_size 0", "--epochs 0", "--max_steps 0",
        "--max_steps inf", "--seed -1", "--mutual_weight -1", "--entropy_weight -1",
        "--eval_limit 0", "--eval_max_new_tokens 0", "--max_len 0",
        "--max_len 9", "--save_every 0", "--router_lr -1", "--probe 1.5", "--length_penalty 2",
        "--styles limerick", "--device nonsense", "--quantize nf4", "--reward most",
        "--as_printed eq4", "--filter some", "--wandb p", "--no_such_flag")),
    ("--students {gpt2} --lora_rank 2", "pass --lora_rank 0"),  # no linear layers but its own kind
    # Contradictions: a gate and what its router learns from.
    ("--as_printed eq2", "--reward sum or loss"), ("--as_printed eq9", "--gate binary"),
    ("--gate binary", "--reward sum or loss"), ("--probe 0", "--probe above 0"),
    ("--as_printed all --gate categorical", "--gate categorical needs"),
    ("--resume nowhere", "leave all others out"),
    # Files and folders.
    ("--paths no-pool", "no-pool"), ("--paths=", "cannot read"), ("--eval_questions=", "cannot read"),
    ("--paths {clash}", "one id stands for two"), ("--paths {torn}", "torn.jsonl:2"),
    ("--paths {empty}", "no path is left"), ("--paths {wrong}", "no path is left"),
    ("--eval_questions no-test", "no-test"),
    ("--students {adapter}", "saved adapter"), ("--students me/adapter", "saved adapter"),
    ("--students {broken}", "broken")]


@pytest.fixture(scope="module")
def bad_files(world, tmp_path_factory):
    folder = tmp_path_factory.mktemp("bad")
    files = {name: str(folder / f"{name}.jsonl") for name in ("torn", "empty", "wrong", "clash")}
    pool_of(folder / "wrong.jsonl", [row for row in world.rows if not row["source_correct"]])
    pool_of(folder / "torn.jsonl", world.rows[:1])
    pool_of(folder / "clash.jsonl", [*world.rows, {**world.rows[0], "question": "2 + 2 ?"}])
    (folder / "torn.jsonl").open("a").write('{"id": "x", ')
    (folder / "empty.jsonl").write_text("\n")
    for name in ("adapter", "broken"):
        files[name] = shutil.copytree(world.students["words"], str(folder / name))
    adapter = json.dumps({"base_model_name_or_path": "words", "peft_type": "LORA"})
    (folder / "adapter" / "adapter_config.json").write_text(adapter)
    (folder / "broken" / "model.safetensors").write_text("torn")
    files["gpt2"] = shutil.copytree(world.students["words"], str(folder / "gpt2"))
    vocabulary = len(AutoTokenizer.from_pretrained(files["gpt2"]))
    tiny_model("gpt2", vocabulary).save_pretrained(folder / "gpt2")
    return files


@pytest.mark.parametrize("flags, says", BAD)
def test_bad_input_is_one_sentence(world, bad_files, tmp_path, capsys, monkeypatch, flags, says):
    """Before a run folder is made. (The hub and packages that are missing are stand-ins.)"""
    monkeypatch.setattr(distill.importlib.util, "find_spec", lambda name: None)
    look = tasks.file_of
    monkeypatch.setattr(tasks, "file_of", lambda name, *file: name == "me/adapter" or look(name, *file))
    words = flags.format(**bad_files).split()
    error = refused(capsys, flags_of(world, tmp_path / "run", *words))
    assert says in error and not (tmp_path / "run").exists()


# ---------------------------------------- data: the split and the filter
@pytest.fixture
def data_of(world, capsys):
    """data_of(pool, *flags) -> rows that train, test questions, what was said of them."""
    def load(pool=world.pool, *flags):
        capsys.readouterr()
        args = distill.parse_args(flags_of(world, "x", "--filter", "none", "--eval_limit", 999,
                                           "--paths", pool, *flags))
        rows, test, _ = distill.load_data(args)
        return rows, test, capsys.readouterr().out

    return load


def ids_of(rows):
    return {row["id"] for row in rows}


def test_copies_of_test_questions_do_not_train(world, tmp_path, data_of):
    """Under another id, in capitals, with other blanks; nor those that --eval_limit leaves out."""
    known = {row["id"]: row for row in world.rows}
    copies = [{**known[i], "id": f"other-{i}",
               "question": f"  {known[i]['question'].upper()} ".replace(" ", " \n ")}
              for i in list(known)[:5]]
    file = pool_of(tmp_path / "test.jsonl", copies)
    for limit in (1, 999):
        rows, test, said = data_of(world.pool, "--eval_limit", limit, "--eval_questions", file)
        assert ids_of(rows) == set(list(known)[5:]) and len(test) == min(limit, 5)
        assert "19 questions train, " in said and "; 5 of the pool do not" in said
    twins = [{**row, "id": "twin-" + row["id"]} for row in world.rows]
    rows, test, _ = data_of(pool_of(tmp_path / "twins.jsonl", world.rows + twins))
    assert rows and not {r["question"] for r in rows} & {q["question"] for q in test}


def test_other_questions_train(tmp_path, data_of):
    """Ids of two files say nothing, nor does a stem without its choices."""
    def rows_of(n, **fields):
        return [{"id": str(i), "task": "strategyqa", "question": f"Is {i} odd?", "answer": "yes",
                 "style": "s", "teacher": "t", "path": f"It is {i}. The answer is yes.",
                 **{key: form.format(i) for key, form in fields.items()}} for i in range(n)]

    pool = pool_of(tmp_path / "pool.jsonl", rows_of(40))
    test = pool_of(tmp_path / "test.jsonl", rows_of(40, question="Is {} even?", answer="no"))
    rows, _, said = data_of(pool, "--eval_questions", test, "--filter", "full")
    assert len(ids_of(rows)) == 40 and "40 right answers were read by no judge" in said
    arc = rows_of(20, task="arc", answer="A", path="The answer is (A).")
    for i, row in enumerate(arc):
        row["question"] = "Which of these statements is true?" if i < 10 else f"Which is {i}?"
        row["choices"] = {"A": f"one {i}", "B": f"two {i}"}
    rows, test, said = data_of(pool_of(tmp_path / "arc.jsonl", arc))
    assert len(ids_of(rows)) == 16 and len(test) == 4 and "16 questions train, 4 test; 4 of" in said


@pytest.mark.parametrize("mode, field", [("none", None), ("answer", "source_correct"),
                                         ("full", "source_valid")])
def test_all_but_a_fifth_of_the_questions_train_as_filtered(world, data_of, mode, field):
    rows, test, _ = data_of(world.pool, "--filter", mode)
    wanted = [(row["id"], row["style"]) for row in world.rows
              if row["id"] not in ids_of(test) and (field is None or row[field])]
    assert [(row["id"], row["style"]) for row in rows] == wanted and len(test) == 5
    assert test == data_of(world.pool, "--styles", "program")[1]


# ---------------------------------------- whole runs
@pytest.mark.parametrize("students", [("words",), ("words", "pieces", "chat")])
def test_one_and_three_students_train_end_to_end_and_at_rate_0_one_stays(world, train, students):
    rates = [2e-2, 0, 2e-2][:len(students)]
    run = train("--max_steps", 12, "--batch_size", 10, "--lr", *rates, students=students)
    assert [student.model.training for student in run.students] == [rate > 0 for rate in rates]
    first, last = run.log[0], run.log[-1]
    for s, name in enumerate(students):
        before = load_file(pathlib.Path(world.students[name]) / "model.safetensors")
        assert same_tensors(before, run.weights[f"student_{s}"]) == (s == 1)
        assert s == 1 or last[f"loss/{s}"] < 0.8 * first[f"loss/{s}"]
        assert {f"rate/{s}", f"grad_norm/{s}", f"rate_style/program/{s}"} <= first.keys()
    assert ("mutual" in first) == ("gamma/0" in first) == (len(students) > 1)
    assert {"step", "entropy", "router_grad_norm", "co_routed"} <= first.keys()
    assert run.results["selection_rate"].keys() == set(judge.STYLES)


@pytest.mark.parametrize("flag", ["--compile", "--checkpointing"])
def test_flags_about_speed_and_memory_change_no_result(monkeypatch, train, flag):
    compiled, plain_compile = [], torch.compile
    monkeypatch.setattr(torch, "compile", lambda blocks, **more: (
        compiled.append(blocks), plain_compile(blocks, backend="eager", **more))[1])
    plain, other = (train("--max_steps", 1, *more, students=("words",), name=f"run{len(more)}")
                    for more in ((), (flag,)))
    assert len(compiled) == (flag == "--compile")
    for key in ("loss/0", "grad_norm/0", "rate/0"):
        assert plain.log[0][key] == pytest.approx(other.log[0][key], rel=1e-4), key


def test_a_random_route_is_that_of_a_router_that_never_learns(train):
    run = train("--route", "random", "--filter", "none")
    assert not any(p.any() for p in run.router.parameters())
    assert run.results["selection_rate"]["program"] == pytest.approx([1 / 6, 1 / 6])


def test_what_the_router_decided_explains_the_rates(train):
    """Draws, tokens and probabilities in decisions.jsonl are those of the log and the results."""
    run = train("--filter", "none", "--max_steps", 5)  # one epoch of 19 questions
    trained = np.zeros(2)
    for decision in run.decisions:
        p, draws, tokens = (np.array([path[key] for path in decision["paths"]])
                            for key in ("probability", "drawn", "tokens"))
        assert np.abs(p.sum(0) - 1).max() < 6 * 5e-5  # four digits
        assert (draws.sum(0) == 1).all()  # one path
        trained += (draws * tokens).sum(0)
    assert len(run.decisions) == 19 and trained.tolist() == run.results["tokens_trained"]
    for label, rate in run.results["selection_rate"].items():
        mean = np.mean([path["probability"] for decision in run.decisions
                        for path in decision["paths"] if path["label"] == label], 0)
        assert np.abs(mean - rate).max() < 1e-4
    rates = [line[f"rate/{s}"] for line in run.log for s in (0, 1)]
    assert rates == [pytest.approx(1 / 6)] * 10


def test_the_router_hears_of_every_path_of_a_probed_question(monkeypatch, train):
    heard, plain = [], qr.posterior_loss
    monkeypatch.setattr(qr, "posterior_loss", lambda *a: (heard.append(a), plain(*a))[1])
    train("--filter", "none", "--max_steps", 1, "--probe", 0.5)
    _, cost, question = heard[0]
    assert question.tolist() == [0] * 6 + [1] * 6  # of four questions
    assert cost.shape == (12, 2) and (cost > 0).all()


def test_a_run_outlives_its_logging(monkeypatch, capsys, train):
    """--wandb gets every line of log.jsonl, flat, and may fail."""
    lines = []

    def log(line, step):
        lines.append(line)
        if step == 2:
            raise RuntimeError("no\nnetwork")

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(
        __spec__="found", init=lambda **more: None, log=log))
    run = train("--wandb", "p")
    assert [line["step"] for line in lines] == [line["step"] for line in run.log] == [1, 2, 3]
    assert all(isinstance(x, (int, float)) for line in lines for x in line.values())
    said = capsys.readouterr()
    assert "RuntimeError: no network" in said.out + said.err


def test_a_real_encoder_is_what_the_router_sees(models_dir, train):
    run = train("--encoder", models_dir / "minilm", "--max_steps", 1, "--styles", "program")
    assert run.router.net.in_features == 384 + 1  # and the style


# ---------------------------------------- kill and resume
LONG = ("--max_steps", 5, "--save_every", 2, "--router_lr", 0.05)
NOISY = ("words", "dropout")  # the second one draws random numbers
RUNS = {"float32": (), "lora": ("--lora_rank", 2, "--lr", 0.05), "bf16": ("--dtype", "bf16"),
        "nf4": ("--quantize", "nf4", "--lora_rank", 2, "--lr", 0.05),
        "fp16": ("--dtype", "fp16", "--route", "all", "--mutual_weight", 100)}  # overflows once
MOMENTS = {  # a function, and the call of it that the process does not survive
    "before the first checkpoint": ("answer", 1), "between checkpoints": ("update", 4),
    "before one replaces the last": ("replace", 3), "saving a student": ("save_student", 2),
    "before the table": ("write_results", 1), "never": ("answer", 99)}
if not importlib.util.find_spec("bitsandbytes") or not importlib.util.find_spec("accelerate"):
    del RUNS["nf4"]
KILLS = [(moment, kind) for moment in MOMENTS for kind in RUNS
         if kind == "float32" or moment in ("between checkpoints", "never")]
KILLER = """
import json, os, sys
import torch
import distill
torch.set_num_threads(1)

def die(plain, call):
    def wrapped(*args, **more):
        calls.append(0)
        return os.kill(os.getpid(), 9) if len(calls) == call else plain(*args, **more)
    calls = []
    return wrapped

students, jobs = json.load(sys.stdin)
for folder in students:  # loads what a student needs once for all
    distill.tasks.load_student(folder)
for where, call, argv in jobs:
    child = os.fork()
    if not child:
        module = os if where == "replace" else distill
        setattr(module, where, die(getattr(module, where), call))
        distill.main(argv)
        os._exit(0)
    print("status", os.waitpid(child, 0)[1], flush=True)
"""


@pytest.fixture(scope="module")
def runs(world, tmp_path_factory):
    """Runs that were killed by SIGKILL, in processes of their own, or never -> {(moment, kind):
    folder}."""
    if not hasattr(os, "fork"):
        pytest.skip("needs os.fork")
    out, jobs = {}, []
    for moment, kind in KILLS:
        out[moment, kind] = tmp_path_factory.mktemp("runs") / "run"
        flags = flags_of(world, out[moment, kind], *LONG, *RUNS[kind], students=NOISY)
        jobs.append([*MOMENTS[moment], flags])
    students = [world.students[name] for name in NOISY]
    done = subprocess.run([sys.executable, "-c", KILLER], input=json.dumps([students, jobs]),
                          text=True, capture_output=True, check=True,
                          cwd=pathlib.Path(distill.__file__).parent)
    wanted = ["0" if moment == "never" else "9" for moment, _ in KILLS]  # died of signal 9
    assert re.findall(r"status (\d+)", done.stdout) == wanted, done.stderr
    return out


@pytest.mark.parametrize("moment, kind", KILLS)
def test_a_killed_run_resumes_bit_for_bit(runs, tmp_path, moment, kind):
    """A finished one, too."""
    out = shutil.copytree(runs[moment, kind], tmp_path / "run")
    assert (out / "results.json").exists() == (moment == "never")
    torch.manual_seed(99)  # nothing may hang on the state of this process
    distill.main(["--resume", str(out)])
    assert_same_run(files_of(out), files_of(runs["never", kind]))


def test_resume_is_refused(world, runs, tmp_path, capsys):
    """With other flags or data, and where there is no run; a new run is, where there is one."""
    out = shutil.copytree(runs["never", "float32"], tmp_path / "run")
    for flags in (["--seed", 5], ["--max_steps=3"], ["--lr", 0], ["--out_dir", "x"]):
        assert "own flags" in refused(capsys, [f"--resume={out}", *flags])
    assert "args.json" in refused(capsys, ["--resume", tmp_path])
    assert f"--resume {out}" in refused(capsys, flags_of(world, out))
    args = json.loads((out / "args.json").read_text())
    other = shutil.copytree(world.students["words"], tmp_path / "other")
    tokens = (other / "tokenizer.json").read_text()
    (other / "tokenizer.json").write_text(tokens.replace('" apples"', '" oranges"'))
    shorter = pool_of(tmp_path / "shorter.jsonl", world.rows[:-6])
    for change in ({"paths": shorter}, {"seed": 1}, {"filter": "none"},
                   {"students": [str(other), world.students["dropout"]]}):
        (out / "args.json").write_text(json.dumps({**args, **change}))
        assert "have changed" in refused(capsys, ["--resume", out]), change


def test_a_checkpoint_runs_no_code_and_is_closed_again(runs, tmp_path):
    out = shutil.copytree(runs["never", "float32"], tmp_path / "run")
    saved = torch.load(out / "checkpoint.pt", weights_only=True)
    load = functools.partial(distill.load_checkpoint, out, {}, torch.Generator(),
                             saved["run"]["data"])
    assert load()["step"] == 5
    if pathlib.Path("/proc/self/maps").exists():  # Windows can't replace an open or a mapped file
        assert "checkpoint.pt" not in pathlib.Path("/proc/self/maps").read_text()
        handles = pathlib.Path("/proc/self/fd").iterdir()
        assert not [handle for handle in handles if "checkpoint" in os.path.realpath(handle)]
    torch.save({**saved, "run": SimpleNamespace()}, out / "checkpoint.pt")  # needs code to load
    with pytest.raises(pickle.UnpicklingError):
        load()


def test_a_run_that_stops_being_finite_keeps_its_last_good_checkpoint(world, tmp_path, capsys):
    flags = "--lr", 1e30, "--max_steps", 12, "--save_every", 1, "--route", "all"
    error = refused(capsys, flags_of(world, tmp_path / "run", *flags))
    assert "is not finite" in error and str(tmp_path / "run") in error
    saved = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)
    assert all(x.isfinite().all() for s in (0, 1) for x in saved[f"student_{s}"].values())
    log = tasks.read_jsonl(tmp_path / "run" / "log.jsonl")
    assert len(log) == saved["run"]["step"] and f"step {len(log) + 1}:" in error


@pytest.mark.parametrize("what", ["student", "router", "loss"])
def test_a_gradient_that_is_not_finite_stops_before_anything_is_trained(tmp_path, capsys, what):
    parts = {name: torch.nn.Parameter(torch.ones(2)) for name in ("student", "router")}
    for name, p in parts.items():
        p.grad = torch.full((2,), math.nan if name == what else 1.0)
    nats = torch.full((3, 2), math.inf if what == "loss" else 1.0)
    with pytest.raises(SystemExit):
        distill.update(torch.optim.AdamW([{"params": [parts["student"]], "peak": 1.0}]),
                       torch.optim.AdamW([parts["router"]]), NO_SCALER, 1.0, nats, 6, tmp_path)
    assert "step 7: a loss or gradient is not finite" in capsys.readouterr().err
    assert all((p == 1).all() for p in parts.values())


# ---------------------------------------- the demo: python distill.py
def test_the_demo_runs_to_its_table_and_its_cache_changes_nothing(tmp_path, monkeypatch, capsys):
    bar, warmed = distill.tqdm, []

    def short(it, *args, **more):  # two steps of warm start instead of hundreds
        if "warm start" in more.get("desc", ""):
            warmed.append(more["desc"])
            return range(2)
        return bar(it, *args, **more)

    monkeypatch.setattr(distill, "tqdm", short)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    flags = ["--max_steps", "2", "--eval_limit", "4", "--eval_max_new_tokens", "4"]
    distill.main(flags)
    printed = capsys.readouterr().out
    for word in ("before", "a path's chance", "drawn", *judge.STYLES):
        assert word in printed, word
    out, = (tmp_path / "out").iterdir()
    distill.main([*flags, "--out_dir", "again"])
    assert len(warmed) == 2 and list((tmp_path / "cache" / "qr-distill").iterdir())
    assert_same_run(files_of(pathlib.Path("again")), files_of(out))
