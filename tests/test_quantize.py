"""Claims about --quantize nf4, against PEFT on the same quantised base, and about the memory that it saves."""
import json
import sys
from types import SimpleNamespace

import memory
import peft
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from test_distill import (  # noqa: F401
    Killed,
    as_student,
    die_after,
    files_of,
    flags_of,
    one_thread,
    refused,
    same_run,
    tiny_model,
    world,
)
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForCausalLM, LlamaConfig

import distill
import eval as tasks

CPU, KINDS = torch.device("cpu"), ["llama", "untied", "gpt2", "neox", "gemma3"]
NO_DROPOUT = {"gpt2": {"attn_pdrop": 0, "resid_pdrop": 0, "embd_pdrop": 0}}


@pytest.fixture
def bnb():
    pytest.importorskip("accelerate", reason="needs pip install accelerate")
    return pytest.importorskip("bitsandbytes", reason="needs pip install bitsandbytes")


def four_bit(folder):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **distill.nf4(CPU, torch.float32))
    for module in model.modules():
        module.support_avx512bf16_for_cpu = False  # as eval.load_student
    return model


def linears(model):
    return {name: m for name, m in model.named_modules() if isinstance(m, (torch.nn.Linear, distill.Conv1D))}


def ids_of(n=9):
    return torch.randint(60, (3, n), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("kind", KINDS)
def test_every_linear_layer_but_the_head_is_in_4_bit_and_the_loss_stays_near(bnb, tmp_path, kind):
    full = tiny_model(kind)
    full.save_pretrained(tmp_path)
    model, head = four_bit(tmp_path), "lm_head"
    assert linears(model).keys() == linears(full).keys() and head in linears(model)
    assert {name for name, m in linears(model).items() if not isinstance(m, bnb.nn.Linear4bit)} == {head}
    assert torch.equal(model.get_output_embeddings().weight, full.get_output_embeddings().weight)
    assert torch.equal(model.get_input_embeddings().weight, full.get_input_embeddings().weight)
    distill.add_lora(model, 4, 8)
    student = as_student(model.eval())
    distill.check_student(student)
    ids = ids_of()
    with torch.no_grad():
        h = model.base_model(input_ids=ids).last_hidden_state[:, :-1].flatten(0, 1)
        loss = distill.response_nll(student, h, ids[:, 1:].flatten()).mean()
        assert abs(loss - full(input_ids=ids, labels=ids).loss) < 0.3


@pytest.mark.parametrize("kind", KINDS)
def test_adapters_alone_get_gradients_and_they_equal_pefts_on_the_same_quantised_base(bnb, tmp_path, kind):
    tiny_model(kind, **NO_DROPOUT.get(kind, {})).save_pretrained(tmp_path)
    model, ids = four_bit(tmp_path), ids_of()
    theirs = peft.get_peft_model(four_bit(tmp_path), peft.LoraConfig(
        r=4, lora_alpha=6, target_modules="all-linear", lora_dropout=0.0, task_type="CAUSAL_LM"))
    distill.add_lora(model, 4, 6)
    pairs = []
    for name, m in model.named_modules():
        if isinstance(m, distill.LoRA):
            other = theirs.base_model.model.get_submodule(name)
            assert isinstance(m.base, bnb.nn.Linear4bit) and torch.equal(m.base.weight, other.base_layer.weight)
            torch.nn.init.normal_(m.B, std=0.3)  # zero at birth
            pairs += [(m.A, other.lora_A["default"].weight), (m.B, other.lora_B["default"].weight)]
    for ours, other in pairs:
        other.data = ours.data.clone()
    a, b = (m.train()(input_ids=ids, labels=ids) for m in (model, theirs))
    assert torch.allclose(a.logits, b.logits, atol=1e-5)
    a.loss.backward(), b.loss.backward()
    assert len(pairs) >= 16 and {id(p) for p in model.parameters() if p.grad is not None} == {id(x) for x, _ in pairs}
    for ours, other in pairs:
        assert ours.dtype == torch.float32 and ours.grad.abs().max() > 0
        assert torch.allclose(ours.grad, other.grad, rtol=1e-4, atol=1e-6)


def wide_llama(folder):
    """Wide enough for the kernels that bitsandbytes has on some CPUs, and for its constants to weigh little."""
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(LlamaConfig(
        vocab_size=60, hidden_size=256, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=512, initializer_range=0.1, bos_token_id=None, eos_token_id=1)).save_pretrained(folder)
    return folder


def gradients(model, ids):
    loss = model.train()(input_ids=ids, labels=ids).loss
    model.zero_grad()
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


def test_neither_an_answer_before_the_step_nor_checkpointing_changes_a_gradient(bnb, tmp_path):
    model, ids = four_bit(wide_llama(tmp_path)), ids_of(20)
    distill.add_lora(model, 4, 8)
    for m in model.modules():
        if isinstance(m, distill.LoRA):
            torch.nn.init.normal_(m.B, std=0.1)
    before = gradients(model, ids)
    assert len(before) == 1 + 2 * 14
    with torch.no_grad():
        model.eval()(input_ids=ids)
    after = gradients(model, ids)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    for other in (after, gradients(model, ids)):
        assert len(other) == len(before) and all(torch.equal(x, y) for x, y in zip(before, other))


def bytes_of(layer):
    state = layer.weight.quant_state
    tensors = (layer.weight, state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code)
    return sum(x.numel() * x.element_size() for x in tensors)


def test_linear_weights_take_a_quarter_of_their_bf16_memory(bnb, tmp_path):
    layers = [m for m in four_bit(wide_llama(tmp_path)).modules() if isinstance(m, bnb.nn.Linear4bit)]
    weights, used = sum(m.in_features * m.out_features for m in layers), sum(map(bytes_of, layers))
    constants = sum(4 * (16 + 256 + 1) for _ in layers)  # the codes: the same for a layer of any size
    assert len(layers) == 14 and (used - constants) / weights == pytest.approx(memory.NF4, rel=0.01)
    assert memory.NF4 / 2 == pytest.approx(0.25, abs=0.01)


# ---------------------------------------------------------------- whole runs
FLAGS = ("--quantize", "nf4", "--lora_rank", 2, "--lr", 0.05, "--save_every", 2, "--max_steps", 4,
         "--checkpointing", "--gate", "binary", "--reward", "sum")
STUDENTS = ("words", "dropout")


@pytest.fixture(scope="module")
def quantised(world, tmp_path_factory):  # noqa: F811
    """A run of a Llama and a GPT-2 on 4-bit bases -> its folder, and the students in memory."""
    for name in ("accelerate", "bitsandbytes"):
        pytest.importorskip(name, reason=f"needs pip install {name}")
    out, load, memory = tmp_path_factory.mktemp("quantised") / "run", distill.load_students, []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distill, "load_students", lambda *a: memory.extend(load(*a)) or memory)
        distill.main(flags_of(world, out, *FLAGS, students=STUDENTS))
    return SimpleNamespace(out=out, students=memory)


def test_checkpoint_of_a_quantised_run_holds_only_what_trains(quantised):
    with safe_open(quantised.out / "checkpoint.safetensors", "pt") as f:
        saved = {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118
    weights = {name: x for name, x in saved.items() if name.startswith("student_")}
    assert len(weights) == 2 * (2 * 7 + 2 * 4) and all(name.rpartition(".")[2] in "AB" for name in weights)
    assert all(x.dtype == torch.float32 for name, x in saved.items() if not name.startswith("rng."))


def test_adapter_of_a_quantised_run_loads_with_peft_and_with_eval_onto_the_full_base(quantised):
    ids = torch.arange(5, 45).view(2, 20)
    for i, student in enumerate(quantised.students):
        folder = quantised.out / f"student_{i}"
        base = AutoModelForCausalLM.from_pretrained(json.loads((folder / "adapter_config.json").read_text())[
            "base_model_name_or_path"])
        assert not getattr(base, "is_quantized", False)
        with torch.no_grad():
            plain = base(input_ids=ids).logits
            model = peft.PeftModel.from_pretrained(base, folder)
            logits = model(input_ids=ids).logits
            assert torch.allclose(tasks.load_student(str(folder))[0](input_ids=ids).logits, logits, atol=1e-3)
            trained = student.model.eval()(input_ids=ids).logits
        saved = load_file(folder / "adapter_model.safetensors")
        assert saved.keys() == peft.get_peft_model_state_dict(model).keys()
        for name, m in student.model.named_modules():
            if isinstance(m, distill.LoRA):
                assert torch.equal(saved[f"base_model.model.{name}.lora_B.weight"], m.B) and m.B.abs().max() > 0
        # what was learned on the 4-bit base is there on the full one
        assert (logits - trained).square().mean() < (plain - trained).square().mean()


def test_killed_quantised_run_resumes_to_exactly_the_unkilled_one(world, tmp_path, quantised):  # noqa: F811
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        die_after(patch, distill, "clip_gradients", 2 * 3 + 1)  # in the fourth step; the checkpoint is of the second
        distill.main(flags_of(world, tmp_path / "run", *FLAGS, students=STUDENTS))
    torch.manual_seed(99)
    distill.main(["--resume", str(tmp_path / "run")])
    same_run(files_of(tmp_path / "run"), files_of(quantised.out))


# ---------------------------------------------------------------- bad input: one sentence, exit code 2
@pytest.mark.parametrize("more", [(), ("--students", "A", "--lora_rank", 0)])
def test_quantize_is_refused_where_the_base_would_train(tmp_path, capsys, more):
    assert "--lora_rank above 0" in refused(capsys, ["--quantize", "nf4", "--out_dir", tmp_path / "run", *more])


@pytest.mark.parametrize("missing", ["bitsandbytes", "accelerate"])
def test_a_missing_package_is_named(world, tmp_path, capsys, monkeypatch, missing):  # noqa: F811
    monkeypatch.setitem(sys.modules, missing, None)
    said = refused(capsys, flags_of(world, tmp_path / "run", "--quantize", "nf4", "--lora_rank", 2))
    assert "pip install bitsandbytes accelerate" in said


# ---------------------------------------------------------------- tests/bench/memory.py
@pytest.mark.parametrize("name, k", [("Mistral-7B-v0.3", 4), ("Gemma-7B", 8)])
def test_memory_predicted_from_small_models_and_counted_in_fake_tensors_is_that_of_a_real_step(monkeypatch, name, k):
    real = memory.count([memory.student(name, k, 4)], 3, 96)
    assert memory.predict(name, k, 4, 3, 96) == pytest.approx(real[0], rel=0.02)
    monkeypatch.setattr("transformers.masking_utils.find_packed_sequence_indices", lambda positions: None)
    for checkpointing in (False, True):
        real = memory.count([memory.student(name, k, 4, checkpointing=checkpointing)], 3, 96)
        with FakeTensorMode(allow_non_fake_inputs=True):
            fake = memory.count([memory.student(name, k, 4, checkpointing=checkpointing)], 3, 96)
        assert fake == pytest.approx(real, rel=0.01)


def test_a_4_bit_base_keeps_no_more_activations_than_a_bf16_one(bnb):
    bf16, nf4 = (memory.count([memory.student("Gemma-7B", 8, 2, nf4=quantised)], 2, 64) for quantised in (False, True))
    assert nf4[0] == bf16[0]


def test_memory_script_quantises_as_from_pretrained_does(bnb, tmp_path):
    full = AutoModelForCausalLM.from_pretrained(wide_llama(tmp_path))
    memory.quantize(full)
    theirs = linears(four_bit(tmp_path))
    for name, m in linears(full).items():
        assert type(m) is type(theirs[name]) and torch.equal(m.weight, theirs[name].weight), name
        assert m is full.get_output_embeddings() or bytes_of(m) == bytes_of(theirs[name])
