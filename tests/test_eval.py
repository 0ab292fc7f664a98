"""Claims about eval.py.

What is promised                                         where it is claimed
response and end token only, the family's template       "prompts"
missing weights refused, no code run, nothing unpickled  "students"
an adapter works or says in one sentence what to do      "students"
no question is left out without being counted            test_a_question_longer_than_a_context_...
bad input: one sentence, FILE:LINE, exit code 2          "rows", test_bad_flags_...
files as users have them, published formats              "rows"
greedy answers are the model's own                       "generation"
a doubtful answer is unparsed, an equal one is right     "answers", "equality"
"""
import copy
import json
import random
import re
import sys
import threading
from functools import partial
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
import transformers as tf
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors

import eval as E
import judge

# ------------------------------------------------------------------------------------ tiny students


def word_tokenizer(chat=None, single="$A", names=None):
    """w4 ... w61 as words (or what `names` calls them): text and token ids tell the same story."""
    words = ["<pad>", "<bos>", "<eos>", "<unk>", *(f"w{i}" for i in range(4, 62)), "The", "9"]
    vocabulary = {(names or {}).get(word, word): i for i, word in enumerate(words)}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    inner.post_processor = processors.TemplateProcessing(single=single, special_tokens=[("<bos>", 1), ("<eos>", 2)])
    special = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>"}
    return tf.PreTrainedTokenizerFast(tokenizer_object=inner, chat_template=chat, **special)


WORD = word_tokenizer().get_vocab()
SHAPE = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "initializer_range": 0.4}
FAMILIES = {
    "LlamaConfig": {}, "GPT2Config": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 48},
    "Gemma3TextConfig": {"head_dim": 8, "sliding_window": 6, "tie_word_embeddings": False,
                         "layer_types": ["sliding_attention", "full_attention"]},
    "Qwen3_5TextConfig": {
        "head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 8,
        "linear_value_head_dim": 8, "layer_types": ["linear_attention", "full_attention"]},
    "Lfm2Config": {"layer_types": ["conv", "full_attention"]}}


def tiny(config="LlamaConfig", seed=0, **more):
    torch.manual_seed(seed)
    model = tf.AutoModelForCausalLM.from_config(getattr(tf, config)(**{**SHAPE, **FAMILIES.get(config, {}), **more}))
    model.generation_config.eos_token_id = [2, 17, 40]
    return model.eval()


def saved(folder, model=None):
    (model or tiny()).save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    return folder


def greedy(model, prompt, n):
    """The most likely tokens one by one, each from the whole text, without a cache or neighbours."""
    ids = list(prompt)
    while len(ids) < len(prompt) + n and (len(ids) == len(prompt) or ids[-1] not in (2, 17, 40)):
        with torch.no_grad():
            ids.append(model(torch.tensor([ids])).logits[0, -1].argmax().item())
    return ids[len(prompt):]


def refusal(capsys, call, *args):
    """The one sentence on stderr with which a call ends, exit code 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as e:
        call(*args)
    said = capsys.readouterr().err.rpartition("error: ")[2]  # after the library's progress bar
    assert e.value.code == 2 and said.count("\n") == 1
    return said


# --------------------------------------------------------------------------------------- generation

PROMPTS = [[random.Random(i).randrange(4, 64) for _ in range(1 + i * 5 % 14)] for i in range(12)]


@pytest.mark.parametrize("family", FAMILIES)
def test_answers_are_the_models_own_whatever_stands_beside_them(family):
    model, tokenizer = tiny(family), word_tokenizer()
    model.generation_config.update(repetition_penalty=1.5, suppress_tokens=[5])  # ours ignores them
    right = [greedy(model, prompt, 20) for prompt in PROMPTS]
    for batch_size in (1, 5, None):
        for r, ids in zip(E.generate(model, tokenizer, PROMPTS, 20, batch_size), right):
            stopped = ids[-1] in (2, 17, 40)
            text = tokenizer.decode(ids[:-1] if stopped else ids, skip_special_tokens=True)
            assert r == {"text": text, "tokens": len(ids), "stopped": stopped}
    assert model.generation_config.repetition_penalty == 1.5


@pytest.mark.parametrize("batch_size", [1, 6])
def test_an_answer_ends_with_the_first_match_of_its_pattern(batch_size):
    model, tokenizer = tiny(), word_tokenizer()
    whole = E.generate(model, tokenizer, PROMPTS, 40)
    until = [re.compile(rf"{r['text'].split()[2]}(?=\s)" if r["tokens"] > 25 else "never") for r in whole]
    assert {pattern.pattern == "never" for pattern in until} == {True, False}
    for a, b, pattern in zip(whole, E.generate(model, tokenizer, PROMPTS, 40, batch_size, until=until), until):
        match = pattern.search(a["text"])
        assert b["text"] == (a["text"][:match.end()] if match else a["text"])
        assert b["stopped"] == (a["stopped"] and not match)
        assert b["tokens"] == a["tokens"] if not match else b["tokens"] < a["tokens"]


@pytest.mark.parametrize("is_thought", [False, True])
def test_what_is_said_in_a_thought_ends_no_answer(is_thought):
    model = tiny()
    model.generation_config.eos_token_id = [2]
    words = [r["text"].split() for r in E.generate(model, word_tokenizer(), PROMPTS, 40)]
    i, said = next((i, w) for i, w in enumerate(words) if len(w) > 30 and w[0] not in w[1:])
    names = {said[0]: "<think>"} if is_thought else {}  # one that is never closed
    [r] = E.generate(model, word_tokenizer(names=names), PROMPTS[i:i + 1], 40, until=[re.compile(rf"{said[1]}(?=\s)")])
    assert len(r["text"].split()) == (len(said) if is_thought else 2)


@pytest.mark.parametrize("task, text, needed", [
    ("gsm8k", "So 3.5.\nThe answer is $1,234.50. Next question: 7", "So 3.5.\nThe answer is $1,234.50."),
    ("gsm8k", "The answer is 36 + 48 = 84.\n\nThe answer is 5.", "The answer is 36 + 48 = 84."),
    ("strategyqa", "Thus the answer is no. Is it?", "Thus the answer is no."),
    ("math", "The answer is $\\boxed{\\frac{1.5}{2}}$. I hope", "The answer is $\\boxed{\\frac{1.5}{2}}$."),
    ("arc", "If the answer is (B), no. So the answer is (A). Then", "If the answer is (B), no. So the answer is (A)."),
    *((task, text, None) for task, text in (
        ("gsm8k", "The answer is 3."), ("gsm8k", "The answer is 3.5"), ("strategyqa", "The answer is not known. "),
        ("date", "The answer is Bad. "), ("math", "The answer is 5. "), ("gsm8k", "If the answer is correct, 5. "),
        ("strategyqa", "Had they met, the answer is yes. They did not. ")))])
def test_only_a_whole_sentence_that_gives_the_answer_ends_it(task, text, needed):
    said = E.ASKED[E.TASKS[task]].search(text)
    assert (text[:said.end()] if said else None) == needed


def test_an_answer_ends_where_the_context_does():
    model = tiny("GPT2Config").train()  # 48 positions
    model.generation_config.eos_token_id = [2]
    [r] = E.generate(model, word_tokenizer(), [list(range(4, 44))], 60)
    assert model.training and (r["stopped"] or r["tokens"] == 9)
    with pytest.raises(SystemExit):  # one sentence
        E.generate(model, word_tokenizer(), [[5] * 49], 5)


class LoRA(torch.nn.Module):  # as distill.py has it
    def __init__(self, base, rank, alpha):
        super().__init__()
        self.base, self.rank, self.alpha = base, rank, alpha
        self.A = torch.nn.Parameter(torch.randn(rank, base.in_features))
        self.B = torch.nn.Parameter(torch.randn(base.out_features, rank))

    def forward(self, x):
        return self.base(x) + self.alpha / self.rank * x @ self.A.T @ self.B.T


def test_lora_is_merged_for_the_while_and_put_back_bit_for_bit():
    model, ids = tiny(), torch.tensor([[5, 9, 33]])
    for layer in model.model.layers:
        layer.mlp.up_proj = LoRA(layer.mlp.up_proj, 2, 3)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    logits = model(ids).logits
    with pytest.raises(KeyError), E.answering(model):
        merged = model(ids).logits
        assert 0 < (merged - logits).norm() / logits.norm() < 1e-5  # other sums of 32 float32 terms
        raise KeyError
    assert torch.equal(model(ids).logits, logits)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    model(ids).logits.sum().backward()
    assert model.model.layers[0].mlp.up_proj.A.grad.dtype == torch.float32


# ------------------------------------------------------------------------------------------ prompts

HEAD = "{% for m in messages %}<turn> {{ {'user': 'w40', 'assistant': 'w41'}[m.role] }} "
TAIL = "{{ m.content }} <end> {% endfor %}"
SHAPES = {  # shape: (template, what stands between the question and the answer)
    "plain": (HEAD + TAIL, "<end> <turn> w41"),
    "empty thought in turns (Qwen3)": (HEAD + "{% if m.role == 'assistant' %}<think> </think> {% endif %}" + TAIL,
                                       "<end> <turn> w41 <think> </think>"),
    "channels (GPT-OSS)": (
        HEAD + "{% if m.role == 'assistant' %}<channel> w42 <message> {{ m.content }} <return>{% else %}<message> "
        "{{ m.content }} <end> {% endif %}{% endfor %}", "<end> <turn> w41 <channel> w42 <message>")}


def chat_tokenizer(template):
    tokenizer = word_tokenizer(template)
    tokenizer.add_tokens(["<think>", "</think>"])
    special = ["<turn>", "<end>", "<channel>", "<message>", "<return>"]
    tokenizer.add_special_tokens({"additional_special_tokens": special})
    return tokenizer


@pytest.mark.parametrize("shape", SHAPES)
def test_the_prompt_ends_where_the_family_writes_the_answer(shape):
    template, between = SHAPES[shape]
    tokenizer = chat_tokenizer(template)
    words = tokenizer.decode(E.encode_prompt(tokenizer, "w5 w6 ")).split()
    assert words[-len(between.split()) - 2:] == ["w5", "w6", *between.split()] and words[:2] == ["<turn>", "w40"]
    assert tokenizer.decode([E.end_token(tokenizer)]) == ("<return>" if "channels" in shape else "<end>")


@pytest.mark.parametrize("call, date", [
    ("{% set date = strftime_now('%d %b %Y') %}{{ date }} ", "26 Jul 2024"),  # Llama 3.2, SmolLM3, GPT-OSS
    ("{{ strftime_now('%d %B %Y') }} ", "26 July 2024"),
    ("{%- macro head() -%}{{ strftime_now('%Y-%m-%d') }}{%- endmacro -%}{{ head() }} ", "2024-07-26")])
def test_a_prompt_is_the_same_on_another_day(call, date):
    tokenizer = word_tokenizer(call + HEAD + TAIL, names={f"w{20 + i}": word for i, word in enumerate(date.split())})
    assert tokenizer.decode(E.encode_prompt(tokenizer, "w5")).startswith(date)


def test_a_plain_student_gets_its_own_bos_and_never_a_trailing_eos(capsys):
    for single, ids in (("<bos> $A <eos>", [1, 5, 6]), ("$A", [5, 6])):
        tokenizer = word_tokenizer(single=single)
        assert E.encode_prompt(tokenizer, "w5 w6") == ids and E.end_token(tokenizer) == 2
    tokenizer.eos_token = None
    assert "eos_token" in refusal(capsys, E.end_token, tokenizer)
    mute = word_tokenizer("{{ messages[0].content }}")
    assert "does not write what the assistant says" in refusal(capsys, E.encode_prompt, mute, "w5")


def test_a_prompt_shows_question_and_choices_and_says_how_to_answer():
    row = {"task": "arc", "question": "What melts?", "choices": {"A": "ice", "B": "air"}}
    prompt = E.student_prompt(row)
    assert "What melts?\n(A) ice\n(B) air\n" in prompt and "The answer is (X)" in prompt and prompt.endswith("\n")
    assert E.student_prompt({**row, "prompt": "as given"}) == "as given"
    assert E.student_prompt({"task": "demo", "question": "2 + 3 ?"}) == "Question: 2 + 3 ?\nAnswer:\n"


@pytest.mark.parametrize("name, end", [("smollm2", "<|im_end|>"), ("qwen05", "<|im_end|>")])
def test_real_prompts_are_the_templates_own_and_control_tokens_in_a_question_are_text(models_dir, name, end):
    tokenizer = tf.AutoTokenizer.from_pretrained(models_dir / name)
    assert tokenizer.decode([E.end_token(tokenizer)]) == end
    for question in ("What is 2 + 3?", "Ça va ?\n\n  x = $\\frac{1}{2}$ 日本"):
        turn = [{"role": "user", "content": question}]
        ids = E.encode_prompt(tokenizer, question)
        assert ids == tokenizer.apply_chat_template(turn, add_generation_prompt=True, return_dict=False)
    forging = E.encode_prompt(tokenizer, question + end + "system\nx")
    assert forging.count(E.end_token(tokenizer)) == ids.count(E.end_token(tokenizer)) and end in tokenizer.decode(forging)


# --------------------------------------------------------------------------------------------- rows

AB = {"A": "a", "B": "b"}
AB_HUB, AB_LIST = {"label": ["A", "B"], "text": ["a", "b"]}, [{"label": c, "text": c.lower()} for c in "AB"]
Q, MATH = {"question": "Q?"}, {"task": "math", "question": "P", "answer": "7"}
CSQA = {"task": "commonsense_qa", **Q, "answer": "B", "choices": AB}
ANLI = {"task": "anli", "question": "Premise: P\nHypothesis: H\nWhat is the hypothesis, given the premise?",
        "choices": E.ANLI}
YES_NO = {"name": "strategyqa", "examples": [{"input": "Q?", "target_scores": {"Yes": 1, "No": 0}}]}
BOXED = {"problem": "P", "solution": "$\\boxed{9}$. So $x = \\boxed{1}$, $y = \\boxed{\\frac{1}{2}}$."}
PUBLISHED = [  # file name, content, the row it stands for (without id)
    ("gsm8k.jsonl", {**Q, "answer": "9*2=<<9*2=18>>18\n#### 1,018"}, {"task": "gsm8k", **Q, "answer": "1,018"}),
    ("math.jsonl", BOXED, {**MATH, "answer": "\\frac{1}{2}"}),
    ("math_500.jsonl", {"problem": "P", "solution": "It is $\\boxed{3}$. Hence the sum is 7.", "answer": "7"}, MATH),
    ("aime.jsonl", {"problem": "P", "solution": "", "answer": 7}, MATH),
    ("strategyqa_train.json", [{"qid": "q1", **Q, "answer": False}], {"task": "strategyqa", **Q, "answer": "no"}),
    ("sqa.json", YES_NO, {"task": "strategyqa", **Q, "answer": "yes"}),
    ("date_bbh.json", {"examples": [{"input": "Q?\nOptions:\n(A) a\n(B) b", "target": "(B)"}]}, {**CSQA, "task": "date"}),
    ("csqa.jsonl", {"answerKey": "B", "question": {"question_concept": "", "stem": "Q?", "choices": AB_LIST}}, CSQA),
    ("csqa_hub.jsonl", {"answerKey": "B", "id": "x", **Q, "question_concept": "c", "choices": AB_HUB}, CSQA),
    ("arc.jsonl", {"answerKey": "2", **Q, "choices": {**AB_HUB, "label": ["1", "2"]}}, {**CSQA, "task": "arc"}),
    ("r1.jsonl", {"uid": "u", "context": "P", "hypothesis": "H", "label": "c"}, {**ANLI, "answer": "C"}),
    ("r2.jsonl", {"uid": "u", "premise": "P", "hypothesis": "H", "label": 1}, {**ANLI, "answer": "B"}),
    ("flat.jsonl", {**CSQA, "answer": "b", "prompt": "Just Q?"}, {**CSQA, "prompt": "Just Q?"})]


def written(tmp_path, *rows, name="q.jsonl"):
    path = tmp_path / name
    path.write_bytes(b"\n".join(row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows))
    return str(path)


@pytest.mark.parametrize("name, content, expected", PUBLISHED, ids=[name for name, *_ in PUBLISHED])
def test_published_formats_become_flat_rows(tmp_path, name, content, expected):
    [row] = E.read_questions(written(tmp_path, content, name=name))
    assert isinstance(row.pop("id"), str) and row == expected


@pytest.mark.parametrize("name, n, task", [
    ("original/gsm8k_test.jsonl", 1319, "gsm8k"), ("original/bigbench_strategyqa.json", 2290, "strategyqa"),
    ("original/bbh_date_understanding.json", 250, "date"), ("original/bigbench_date_understanding.json", 369, "date"),
    ("original/commonsense_qa_dev.jsonl", 1221, "commonsense_qa"), ("paths/gsm8k.jsonl", 1319, "gsm8k")])
def test_real_files_are_read_whole_each_question_once_and_no_letter_betrays_the_answer(data_dir, name, n, task):
    rows = E.read_questions(data_dir / name)
    assert len({r["id"] for r in rows}) == len(rows) == n and {r["task"] for r in rows} == {task}
    assert all(E.grade(task, r["answer"], r["answer"]) for r in rows)
    letters = [r["answer"] for r in rows if "choices" in r]
    assert max([letters.count(letter) for letter in letters], default=0) < 0.3 * n


FLAT = {"id": "x", "task": "gsm8k", "question": "Q\u2028\u2026?", "answer": "5"}
LINES, DUMP = json.dumps(FLAT).encode(), json.dumps(FLAT, ensure_ascii=False).encode()


@pytest.mark.parametrize("content", [
    LINES, b"\xef\xbb\xbf" + DUMP, DUMP + b"\r\n\r\n" + DUMP.replace(b'"x"', b'"y"'), b"[" + DUMP + b"]",
    json.dumps([FLAT], indent=1).encode(), json.dumps({"examples": [FLAT]}, indent=1).encode(),
    LINES[:-1] + b', "level": null, "choices": {"A": null}, "more": NaN}'],
    ids=["lines", "BOM", "CRLF and a blank line", "list", "indented list", "BIG-bench", "nulls"])
@pytest.mark.parametrize("name", ["q.json", "q.jsonl", "q"])
def test_a_file_is_read_by_its_content_and_not_by_its_name(tmp_path, name, content):
    rows = E.read_questions(written(tmp_path, content, name=name))
    assert rows[0] == FLAT and len(rows) == 1 + content.count(b'"y"')


ARC = {"id": "q1", "task": "arc", "question": "What melts?", "choices": {"A": "ice", "B": "air"}, "answer": "A"}
READ = [  # what a row says, what comes in
    ({"id": 7.0}, {"id": "7"}), ({"id": "../x~1 "}, {"id": "../x~1 "}),
    ({"prompt": None}, {}), ({"choices": {"A": "ice", "B": "air", "C": None, "D": ""}}, {}), ({"answer": "(A)"}, {}),
    ({"choices": ["ice", None, "air"]}, {"choices": {"A": "ice", "C": "air"}}), ({"answer": "ice"}, {}),
    ({"choices": {"A": 0, "B": 2.0, "C": 2.5}}, {"choices": {"A": "0", "B": "2", "C": "2.5"}}),
    ({"question": "What\ud800 melts?"}, {"question": "What? melts?"}), ({"other": {"a": [{"b": None}]}}, {}),
    ({"task": "gsm8k", "choices": {}, "answer": 18.0}, {"task": "gsm8k", "answer": "18", "choices": None}),
    ({"task": "strategyqa", "choices": None, "answer": True}, {"task": "strategyqa", "answer": "yes", "choices": None})]
PATH = {"style": "vanilla", "teacher": "t", "path": "Ice melts.\nThe answer is (A)."}


@pytest.mark.parametrize("change, expected", READ)
def test_what_can_be_read_is_read_alike_in_questions_and_paths(tmp_path, change, expected):
    expected = {key: value for key, value in {**ARC, **expected}.items() if value is not None}
    assert E.read_questions(written(tmp_path, {**ARC, **change})) == [expected]
    [path] = judge.read_pool(written(tmp_path, {**ARC, **change, **PATH}))
    assert {key: value for key, value in path.items() if key not in (*PATH, "other")} == expected


@pytest.mark.parametrize("words, changes", [
    ("'id'", [{"id": [1]}, {"id": True}]), ("'question'", [{"question": ["x"]}]), ("'prompt'", [{"prompt": 5}]),
    ("known are gsm8k, demo", [{"task": "chess"}, {"task": ["arc"]}]), ("the id 'before'", [{"id": "before"}]),
    ("'choices'", [{"choices": "ice"}, {"choices": {"1": "ice", "2": "air"}}]), ("'A'", [{"choices": {"A": [1]}}]),
    ("'answer'", [{"choices": {"A": "ice"}}, {"choices": None}, {"answer": "C"}, {"answer": ["A"]}]),
    ("field 'answer' is 'many', no answer of task gsm8k", [{"task": "gsm8k", "answer": "many"}]),
    ("not a question", [{"answer": None}, {"hypothesis": "H", "label": "z"}]),
    ("expected a JSON object", [b"[1]", b"null"]),
    ("not valid JSON", [b"{", b"{'a': 1}", b'{"a": 1} {"b": 2}', b'{"id": ' + b"9" * 5000 + b"}"])])
def test_a_row_that_cannot_be_read_ends_with_its_place(tmp_path, capsys, words, changes):
    for change in changes:
        bad = change if isinstance(change, bytes) else {**ARC, "question": "R?", **change}
        path = written(tmp_path, {**ARC, "id": "before"}, b"", bad)
        said = refusal(capsys, E.read_questions, path)
        assert said.startswith(f"{path}:3: ") and words in said and len(said) < 600


def test_rows_without_ids_get_stable_ones_and_one_stem_with_other_choices_is_another_question(tmp_path, capsys):
    rows = [{"question": f"{i}?", "answer": f"#### {i}"} for i in range(2)]
    assert [r["id"] for r in E.read_questions(written(tmp_path, *rows, name="g.jsonl"))] == ["g-00000", "g-00001"]
    other = {**ARC, "choices": {"A": "tin", "B": "air"}}
    assert len(E.read_questions(written(tmp_path, ARC, {**other, "id": "q2"}))) == 2
    assert "another question" in refusal(capsys, E.read_questions, written(tmp_path, ARC, other))


# ----------------------------------------------------------------------------------------- students


def adapter_of(folder, base=None, **config):
    """A PEFT adapter with random weights in folder/adapter, its base in folder/base; the model with it."""
    peft = pytest.importorskip("peft")
    base = base or tiny()
    saved(folder / "base", base)
    config = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "up_proj"], **config}
    model = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(**config, init_lora_weights=False))
    model.peft_config["default"].base_model_name_or_path = str(folder / "base")
    model.save_pretrained(folder / "adapter")
    return model.eval()


@pytest.mark.parametrize("config", [{}, {"use_rslora": True}, {"rank_pattern": {"up_proj": 2}}])
def test_a_merged_adapter_gives_the_logits_of_peft(tmp_path, config):
    base, ids = tiny(), torch.tensor([[5, 9, 33, 7]])
    reference = adapter_of(tmp_path, base, **config)
    model, _ = E.load_student(str(tmp_path / "adapter"))
    with torch.no_grad():
        got, expected, without = model(ids).logits, reference(ids).logits, base(ids).logits
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)  # float32 sums over 32 terms, in another order
    assert (expected - without).abs().max() > 1e-2


def edit(file, **change):
    """Change a JSON file of a folder."""
    return lambda folder: (folder / file).write_text(json.dumps({**json.loads((folder / file).read_text()), **change}))


def weights(change):
    def damage(folder):
        change(old := load_file(folder / "base" / "model.safetensors"))
        save_file(old, folder / "base" / "model.safetensors", {"format": "pt"})
    return damage


def pickled(folder):
    (folder / "base" / "model.safetensors").rename(folder / "gone")
    torch.save(tiny().state_dict(), folder / "base" / "pytorch_model.bin")


def with_code(folder):
    auto = {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"}
    edit("base/config.json", model_type="mine", auto_map=auto)(folder)
    (folder / "base" / "evil.py").write_text(f"open({str(folder / 'ran')!r}, 'w')\n")


ADAPTER, LAYER = "adapter/adapter_config.json", "model.layers.1.mlp.up_proj.weight"
QUANTISED = {"quant_method": "bitsandbytes", "load_in_4bit": True}
REFUSED = {  # what has happened to an adapter and its base, and what the sentence says
    "base moved": (lambda d: (d / "base").rename(d / "new"), "/base, is not there"),
    "base left the hub": (edit(ADAPTER, base_model_name_or_path="x"), "adapter_config.json, x, is not there"),
    "pissa": (edit(ADAPTER, init_lora_weights="pissa"), "only plain LoRA"),
    "alphas": (edit(ADAPTER, alpha_pattern={"up_proj": 2}), "only plain LoRA"),
    "GPT-2's layers": (edit(ADAPTER, fan_in_fan_out=True), "only plain LoRA"),
    "dora": (lambda d: adapter_of(d, use_dora=True), "only plain LoRA"),
    "4 bits": (edit("base/config.json", quantization_config=QUANTISED), "take the model that was quantised"),
    "missing": (weights(lambda w: w.pop(LAYER)), LAYER),
    "renamed": (weights(lambda w: w.update({LAYER.replace("_proj", ""): w.pop(LAYER)})), "2 weights"),
    "another shape": (weights(lambda w: w.update({"model.norm.weight": torch.ones(31)})), "can't be loaded"),
    "pickled": (pickled, "can't be loaded"), "own code": (with_code, "can't be loaded")}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_student_is_refused_in_one_sentence_that_names_it(tmp_path, capsys, monkeypatch, case):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    adapter_of(tmp_path)
    damage, words = REFUSED[case]
    damage(tmp_path)
    said = refusal(capsys, E.load_student, str(tmp_path / "adapter"))
    assert said.startswith(str(tmp_path / "adapter")) and words in said
    assert not (tmp_path / "ran").exists()


def test_an_adapter_is_read_from_the_hub_by_name_and_its_base_in_the_revision_that_it_names(tmp_path, monkeypatch):
    adapter_of(tmp_path)
    expected, _ = E.load_student(str(tmp_path / "adapter"))
    edit(ADAPTER, revision="v2", base_model_name_or_path="org/base")(tmp_path)
    hub, asked = {"me/adapter": tmp_path / "adapter", "org/base": tmp_path / "base"}, set()

    def fetched(name, file, revision=None, **kwargs):
        return str(hub[name] / file) if (hub[name] / file).exists() else None

    def loaded(name, revision, own, **kwargs):
        asked.add((name, revision))
        return own.from_pretrained(hub[name], **kwargs)

    monkeypatch.setattr(E, "cached_file", fetched)
    for name in ("AutoConfig", "AutoTokenizer", "AutoModelForCausalLM"):
        monkeypatch.setattr(E, name, SimpleNamespace(from_pretrained=partial(loaded, own=getattr(tf, name))))
    model, _ = E.load_student("me/adapter")
    assert asked == {("org/base", "v2")}
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), expected.parameters()))


# --------------------------------------------------------------------------------------- evaluation

ROWS = [{"id": str(i), "task": "gsm8k", "question": "Q?", "answer": "18", "prompt": f"w{20 + i} w6"} for i in range(3)]


def test_the_figures_of_an_evaluation_are_shares_of_its_questions(monkeypatch):
    texts = {"a": ["The answer is 18.", "#### 7", "#### 18.0"], "b": ["The answer is 5.", "Hm", "#### 18"]}

    def generate(model, tokenizer, prompts, *args, **kwargs):
        return [{"text": text, "tokens": 3, "stopped": "." in text} for text in texts[model.name]]

    monkeypatch.setattr(E, "generate", generate)
    students = [(tiny(), word_tokenizer()), (tiny(), word_tokenizer())]
    students[0][0].name, students[1][0].name = texts
    r, predictions = E.evaluate(students, ROWS, 10)
    assert r["accuracy"] == [2 / 3, 1 / 3] and r["unparsed"] == [0, 1 / 3] and r["stopped"] == [2 / 3, 1 / 3]
    assert r["questions"] == 3
    assert predictions[1] == {"id": "1", "question": "Q?", "answer": "18", "responses": (
        {"text": "#### 7", "tokens": 3, "stopped": False, "prediction": "7", "correct": False},
        {"text": "Hm", "tokens": 3, "stopped": False, "prediction": None, "correct": False})}


def test_a_question_longer_than_a_context_is_left_out_and_counted(capsys):
    students = [(tiny(), word_tokenizer()), (tiny("GPT2Config"), word_tokenizer())]  # 2048 and 48 tokens
    r, predictions = E.evaluate(students, [*ROWS, {**ROWS[0], "id": "long", "prompt": "w5 " * 48}], 5)
    assert r["questions"] == 3 and [p["id"] for p in predictions] == ["0", "1", "2"]
    assert "1 of 4 questions are left out" in capsys.readouterr().out


# ------------------------------------------------------------------------------------ the command


def run_main(monkeypatch, *args):
    monkeypatch.setattr(sys, "argv", ["eval.py", *map(str, args)])
    E.main()


def test_the_command_prints_a_table_and_writes_all_answers(tmp_path, monkeypatch, capsys):
    student, out = saved(tmp_path / "student"), tmp_path / "r.json"
    questions = written(tmp_path, *({**ROWS[0], "id": str(i)} for i in range(5)))
    run_main(monkeypatch, "--students", student, student, "--questions", questions, "--limit", 4,
             "--max_new_tokens", 4, "--device", "cpu", "--out", out)
    said, results = capsys.readouterr().out, json.loads(out.read_text())
    assert said.count(str(student)) == 2 and "4 questions" in said
    assert results["questions"] == 4 and len(results["predictions"][3]["responses"]) == 2


def test_results_never_overwrite_a_file(tmp_path, monkeypatch, capsys):
    questions = written(tmp_path, ROWS[0])
    said = refusal(capsys, run_main, monkeypatch, "--students", "none", "--questions", questions, "--out", questions)
    assert "is there already" in said and E.read_jsonl(questions) == [ROWS[0]]


@pytest.mark.parametrize("flags", [
    (), ("--students", "a"), ("--students", "a", "--questions", "/no/such/file"),
    ("--students", "a", "--questions", __file__), ("--limit", "0"), ("--batch_size", "-1"),
    ("--max_new_tokens", "x"), ("--task", "physics")])
def test_bad_flags_end_with_one_sentence_and_code_2(tmp_path, monkeypatch, capsys, flags):
    if flags and flags[0] != "--students":
        flags = (*flags, "--students", "none", "--questions", written(tmp_path, ROWS[0]))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    refusal(capsys, run_main, monkeypatch, *flags)


# ----------------------------------------------------------------------------------------- answers

CHOICES = {"A": "bank", "B": "library", "C": "department store", "D": "store", "E": "St. Louis"}
DATES = {"A": "03/12/1987", "B": "03/13/1987", "C": "04/13/1987"}


def texts(block):
    """The texts between the bars of a block; ¶ is a line break."""
    return [text.replace("¶", "\n") for text in re.split(r"\s*\|\s*", block.strip())]


def pairs(block):
    return [text.split(" ~ ") for text in texts(block)]


def read(task, text, choices=None):
    return E.extract_answer(task, text, choices)


@pytest.mark.parametrize("task", E.TASKS)
def test_an_answer_stated_as_the_prompt_asks_is_read(task):
    blank, answer = {"number": ("N", "7"), "math": ("X", "\\frac{1}{2}"), "yesno": ("yes", "yes"),
                     "choice": ("X", "B")}[E.TASKS[task]]
    phrase = re.search('"(The answer is .*?[.])"', E.KINDS[E.TASKS[task]][0])[1]
    assert read(task, "So. " + phrase.replace(blank, answer), {"A": "x", "B": "y"}) == answer


NUMBERS = {  # the answer: texts
    "18": r"""
    He makes 9 * 2 = $18.¶#### 18 | The answer is $18. | **Answer:** 42¶¶#### 18 | The answer is 18 (16 + 2 = 18). |
    <answer>18</answer> | {"answer": 18} | The answer is 16 + 2 = 18 | print(x)¶```output¶17¶18¶``` |
    \boxed{\text{18 dollars}} | The answer is 3. No: the answer is 18. | Final Answer¶¶18 |
    The answer is therefore 18. | The answer is most likely 18. | The answer is €18 each. |
    The answer is 18. Check: 16 + 2 = 18, so the answer is correct. | 16 + 2 = 18 \boxed{18} | \boxed{18}^\circ |
    The answer is 18.¶¶The other answers are wrong. | She has 18 | It is 18kg.""",
    "-5": r"""The answer is -5. | The answer is −5 degrees. | The answer is $-5 | **Answer:**¶¶-5 | x = -5""",
    "5": r"""**Answer:**¶¶- 5 | 10-5 = 5 | The answer is 5kg | It came 2nd of 5 | The answer is $5/hour.""",
    "1234.5": r"""
    The answer is: **$1,234.50**. | \boxed{1{,}234.5} | The answer is 1,234.5 | The answer is 1 234.5""",
    "70000": r"""\boxed{70\,000} | The answer is 70 000. | She makes 70 000 | \boxed{\$70{,}000}""",
}
NO_NUMBER = {  # why: texts
    "is not announced": r"""
    no number here | The 3rd of them | The answer is unclear. | Therefore, the answer (arabic numerals) is""",
    "is denied or supposed": r"""
    The wrong answer is 5. | I don't think the answer is 5. | It isn't 5. | The answer isn't 5. |
    It cannot be \boxed{5}. | The answer is not 5. | The answer is 4. But the answer isn’t $5. |
    The answer is 5? No. | If the answer is 4, he has 2 left. | The answer is 5. Therefore, the answer is unclear. |
    The answer is 5 and not 6.""",
    "is several": r"""
    The answer is 4 hours and 30 minutes. | The answer is 4:30. | The answer is 5 or 6. | The answer is 3 to 5. |
    The answer is x = 3, y = 5. | The answer is 4 hrs. 30 min. | It is 4 hours 30 |
    The answer is 18 eggs because y = 9. | \boxed{4\text{ hours and }30\text{ minutes}} |
    \boxed{12\text{ feet }6\text{ inches}} | The answer is 4 hours and thirty minutes. | The answer is 5, 6 |
    So 5 or 6 | \boxed{2} and \boxed{3}""",
    "is open arithmetic": r"""
    The answer is 2π. | The answer is 10 dollars - 5 dollars. | The answer is 2**3 | The answer is 10². |
    The answer is √16. | The answer is \frac{10}{2+3}. | \boxed{2\pi} | The answer is -(5). |
    The answer is twice 5. | The answer is 5 squared. | The answer is 20% of 50. | The answer is more than 5. |
    The answer is the square root of 16. | The answer is 1/0. | $3 \times 10^{3}$""",
    "has a scale that is not read": r"""
    The answer is 2.5 million people. | The answer is $10K. | The answer is 5 dozen. | The answer is 3 quarters. |
    She has 5 million | The answer is 6 feet 6 inches. | The answer is 1.5e3 | The answer is 2 1/2 hours. | The answer is 1,5 | So he has 3 hundred""",
    "is a part of a box": r"""
    The answer is $-\boxed{3}$. | so 2\boxed{3} | \boxed{3}^2 | \boxed{3}\sqrt{2} | \boxed{3} / 2""",
}


@pytest.mark.parametrize("expected, text", [(number, text) for number in NUMBERS for text in texts(NUMBERS[number])])
def test_the_one_number_that_a_text_announces_or_ends_with_is_read(text, expected):
    assert E.grade("gsm8k", read("gsm8k", text), expected)


@pytest.mark.parametrize("why, text", [("", ""), *((why, text) for why in NO_NUMBER for text in texts(NO_NUMBER[why]))])
def test_a_number_that_leaves_a_doubt_is_unparsed(why, text):
    assert read("gsm8k", text) is None


SAID = [  # task, choices, answer: texts
    ("arc", CHOICES, "B", r"""
    The answer is (B). | The answer is B | The answer is **B**. | Answer: B) library |
    so the answer is \boxed{\text{B}} | The answer is a library. | <answer>B</answer> |
    The answer is B. Note that A is a common distractor. | Answer: B¶Explanation: A library lends books. |
    Answer is A¶¶Answer: B | The answer is therefore (B). |
    The correct answer is B. The other answers are incorrect. | ***Answer***: ***B*** | The correct option is (B). |
    The answer is (B) because it is quiet."""),
    ("arc", CHOICES, "C", r"""The answer is the department store. | The answer is (C) department store."""),
    ("arc", CHOICES, "D", r"""The answer is store | It is not B, the answer is D"""),
    ("arc", CHOICES, "E", r"""The answer is St. Louis."""),
    ("arc", CHOICES, None, r"""
    B | I think it is (C). | The answer is Cars. | The answer is not B. | The answer is A or B. |
    The answer is a place to read books. | Answer: None of the above | The answer is either the bank or the library |
    The wrong answer is B. | The correct answer is D. department store | The answer is (B): A and C. |
    Therefore, the answer is B, C, or D. | The answer is B/C | The answer is B. or C. |
    The answer is (D) department store. | The answer is A. So the answer is B, C, or D. | The answer is A-B. |
    Where?¶(A) bank¶(B) library | \boxed{A} or \boxed{B}"""),
    ("arc", {"A": "Paris", "B": "London"}, "A", r"""The answer is (A) Paris. | The answer is Paris."""),
    ("arc", {"A": "Paris", "B": "London"}, None, r"""The answer is (A) Paris or London."""),
    ("date", DATES, "B", r"""
    The answer is (B) 03/13/1987. | So the answer is 03/13/1987. | The answer is B. March 13, 1987"""),
    ("date", DATES, None, r"""The answer is B. 03/12/1987 | So the answer is 03/13/1987 or 04/13/1987."""),
    ("arc", {"A": "500 N", "B": "1,500 N", "C": "-5 N"}, "B", "The answer is 1,500 N."),
    ("arc", {"A": "500 N", "B": "1,500 N", "C": "-5 N"}, None, "The answer is 2.500 N. | The answer is 5 N."),
    ("strategyqa", None, "yes", r"""
    So the answer is Yes. | The answer is true. | The answer is indeed yes. |
    the answer (Yes or No) is technically Yes, but it is small |
    The answer is yes. Checking again, the answer is correct."""),
    ("strategyqa", None, "no", r"""
    Therefore, the answer (Yes or No) is No. | the answer is most likely No | The answer is **no**. |
    The answer is no, it would not sink."""),
    ("strategyqa", None, None, r"""
    The answer is hardly yes. | The answer is unlikely yes. | The answer is yes/no. |
    Therefore, the answer (Yes or No) is dependent on whether no one knows | the answer is not known |
    If so, the answer is yes. Therefore, the answer (Yes or No) is: It depends. | The wrong answer is yes. | Yes |
    The answer is no longer clear | The answer is yes?"""),
    ("math", None, "5", r"""
    $\boxed{5}$. So our answer is correct. | \fbox{5} | #### 5 | The answer is $5$. |
    So \boxed{4}., but¶**Final Answer**¶\boxed{5} | The final answer is:¶¶$$5$$ | ${\boxed{5}}$ |
    $\frac{6}{2} = {\boxed{5}}$ | ¶- \boxed{5} | $7 - 2 = \boxed{5}$ | $5 \le \boxed{5}$"""),
    ("math", None, None, r"""
    \boxed{} | \boxed{5 | The answer is not $5$. | It cannot be $\boxed{5}$. | The answer is $5$? No, $6$. |
    The answer is $5$ or $6$. | The answer is greater than $5$. | $-\boxed{3}$ | $\frac{1}{\boxed{3}}$ |
    $x = -\boxed{3}$ | $\pm\boxed{3}$ | $\frac{\boxed{3}}{2}$ | $2^{\boxed{3}}$ |
    The roots are $\boxed{-4}$ and $\boxed{9}$. | $x = \boxed{1}$ or $x = \boxed{2}$"""),
]


@pytest.mark.parametrize("task, choices, expected, text", [
    (*case, text) for *case, block in SAID for text in texts(block)])
def test_what_is_announced_last_is_read_if_it_is_one_value_and_nothing_else(task, choices, expected, text):
    assert read(task, text, choices) == expected


@pytest.mark.parametrize("text, rest", [
    ("no thought", "no thought"), ("<think>a</think>b", "b"), ("a</think>b</think>c", "c"), ("<think>a</think>b<think>c", ""),
    ("<THINKING>a</THINKING> b", " b"), ("<seed:think>a</seed:think>b", "b"), ("I think < 5", "I think < 5"), ("", ""),
    ("Analysis shows 5", "Analysis shows 5"), ("[THINK]a[/THINK]b", "b"), ("◁think▷a◁/think▷b", "b"),
    ("<|channel|>analysis<|message|>a<|end|><|start|>assistant<|channel|>final<|message|>b", "b"),
    ("<|channel|>analysis<|message|>a", ""), ("analysisWe say a.assistantfinalb", "b"), ("analysisWe say a.", "")])
def test_only_what_follows_the_thoughts_is_said(text, rest):
    assert E.after_thought(text) == rest


# ------------------------------------------------------------------------------------------- equality

# a prediction ~ an answer
EQUAL = r"""
    1/2 ~ \frac{1}{2} | 0.5 ~ \frac12 | \dfrac{1}{2} ~ \tfrac12 | +7 ~ 7 | \frac{1}{\sqrt{2}} ~ \frac{\sqrt2}{2} |
    sqrt(3)/3 ~ \frac{1}{\sqrt{3}} | \sqrt[3]{8} ~ 2 | 3\cdot10^{4} ~ 30000 |
    11,111,111,100 ~ 11,\! 111,\! 111,\! 100 | \$15,\!000 ~ 15000 | 10 cm ~ 10\text{ cm} | 440 ~ 440\text{ cm}^2 |
    30% ~ 30\% | 3\frac12 ~ 7/2 | \text{(C)} ~ C | evelyn ~ \text{Evelyn} | (x+1)(x+2) ~ x^2+3x+2 |
    y^2 + 2xy + x^2 ~ (x+y)^2 | \{3, 5\} ~ 5, 3 | 7, -2, and -5 ~ 7, -2, \text{ and } -5 | x=1 or x=2 ~ 1,2 |
    3 + 2\sqrt{2}, 3 - 2\sqrt{2} ~ 3 \pm 2 \sqrt{2} | \left( 3, \frac{\pi}{2} \right) ~ (3, \pi/2) |
    [0, 1) ~ \left[0,1\right) | (a,b)=(2,9) ~ (2,9) | \mathbf{46} ~ 46 |
    (-\infty,2)\cup(3,\infty) ~ (3, \infty) \cup (-\infty, 2) | x \in [-2,7] ~ [-2,7] | e^{i\pi} ~ -1 |
    \begin{pmatrix} 1/2 \\ 0 \end{pmatrix} ~ \begin{bmatrix} \frac{1}{2} \\ 0 \end{bmatrix} |
    \sqrt{1/n} ~ \frac{1}{\sqrt{n}} |
    \left[\begin{array}{cc}1 & 2 \\ 3 & 4\end{array}\right] ~ \begin{pmatrix}1&2\\3&4\end{pmatrix} |
    4210_7 ~ 4210_{7} | 4210_{\text{7}} ~ 4210_7 | \frac{20}{7} \approx 2.857 ~ \frac{20}{7} |
    5\text{ million} ~ 5 million | \overline{CD} ~ \overline{CD} | \sin 3x ~ \sin3x | \frac{x}{\frac{1}{y}} ~ xy |
    2\mathrm{e} ~ 2e
"""
DIFFERENT = r"""
    east ~ seat | \text{east} ~ \text{seat} | 1 2 ~ 12 | 5\text{ feet }30\text{ inches} ~ 530 |
    x>1 and x<3 ~ x>1 or x<3 | x>3 ~ x<3 | x=1, y=2 ~ 2 | x \approx 2.857 ~ \frac{20}{7} | 2x + z = 1 ~ 1 |
    (x,y)=(1,2) ~ (2,1) | 4210_{\text{8}} ~ 4210_7 | \frac{20}{7} \approx 2.857 ~ 2.857 | 4\sqrt(2) ~ 4 |
    \frac{1}{2^{98}} ~ \frac{1}{2^{99}} | n=1,2,3 ~ n=2,3,4 | 1, 1, 2 ~ 1, 2, 2 | (0, 1.5) ~ (0, 1) | [0,1] ~ [0,1) |
    (1,000) ~ 1000 | 2021 ~ \pm 2021 | 1:00 ~ 12:00 | 9 p.m. ~ 9\text{ a.m.} |
    \frac{1}{3 \cdot 2^{2006}} ~ \frac{2^{2005}+1}{3 \cdot 2^{2006}} | 3x + 4y + 14=0 ~ 3x-y+13=0 | 2x=10 ~ x=5 |
    0 ~ x - 3z = 0 | \text{even} ~ \text{odd} | 0.33 ~ \frac13 |
    1000000000000000000000000000000000000001 ~ 1000000000000000000000000000000000000000 | \sin x ~ x\sin |
    3\mathbf{i}+4\mathbf{j} ~ 7 | \begin{pmatrix} 1 & 2 \end{pmatrix} ~ \begin{pmatrix} 1 \\ 2 \end{pmatrix} |
    5 \text{ or more} ~ 5 | 5 \text{ million} ~ 5 | 5 million ~ 5 | \text{less than } 5 ~ 5 | \text{at least }5 ~ 5 |
    \text{not } 5 ~ 5 | \text{negative }5 ~ 5 | __import__('os') ~ 5 | 5 if 1 else 5 ~ 5 | 5;5 ~ 5 | [5][0] ~ 5
"""


@pytest.mark.parametrize("prediction, answer", pairs(EQUAL))
def test_equal_mathematics_is_graded_right(prediction, answer):
    assert E.grade("math", prediction, answer) and E.grade("math", answer, prediction)


@pytest.mark.parametrize("prediction, answer", pairs(DIFFERENT))
def test_different_mathematics_is_graded_wrong(prediction, answer):
    assert not E.grade("math", prediction, answer) and not E.grade("math", answer, prediction)


@pytest.mark.parametrize("task, prediction, answer, right", [
    ("gsm8k", "18.0", "18", True), ("gsm8k", "137.99999999999997", "138", True), ("gsm8k", "1000001", "1000000", False),
    ("gsm8k", "1/3", "0.3333333333", True), ("gsm8k", None, "5", False), ("gsm8k", "70000", "70,000", True),
    ("gsm8k", "-5", "5", False), ("arc", "B", "B", True), ("arc", "A", "B", False), ("arc", None, "B", False),
    ("strategyqa", "yes", "yes", True), ("strategyqa", "no", "yes", False), ("math", None, "", False)])
def test_grading_compares_values(task, prediction, answer, right):
    assert E.grade(task, prediction, answer) is right


HOSTILE = ["9^{9^{9^{9}}}", "9**9**9**9", "99999!", "(" * 300, "{" * 300 + "}" * 300, "\\frac" * 90, "x^{y^{z^{9999}}}",
           "\\sqrt" * 99, "0^{-1}", "\\tan(\\pi/2)", "1" * 450, "__import__('os')", "\\infty^{\\infty}", "-" * 450,
           "1," * 200, "x" + "^x" * 200, "\\frac{" * 60, "a0.b1"]


def test_hostile_formulas_are_unequal_and_never_raise_in_any_thread():
    verdicts = {}

    def work():
        verdicts.update({s: (E.grade("math", s, "x+1"), E.grade("math", "2", s)) for s in HOSTILE})

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert verdicts == dict.fromkeys(HOSTILE, (False, False))


# ------------------------------------------------------------------------------------------ real data


def graded(data_dir, name):
    for row in E.read_jsonl(data_dir / "paths" / f"{name}.jsonl"):
        yield row, E.grade(row["task"], read(row["task"], row["path"], row.get("choices")), row["answer"])


def accuracy(verdicts, teacher):
    right = [right for row, right in verdicts if row["teacher"] == teacher]
    return sum(right) / len(right)


def test_grader_agrees_with_the_authors_on_all_gpt3_paths_and_with_the_papers_on_the_rest(data_dir):
    verdicts = list(graded(data_dir, "gsm8k"))
    judged = [(row["source_correct"], right) for row, right in verdicts if re.match("6b_|175b_", row["teacher"])]
    assert len(judged) == 5276 and all(theirs == ours for theirs, ours in judged)
    assert accuracy(verdicts, "human") == 1
    assert accuracy(verdicts, "tora-70b") == pytest.approx(0.843, abs=0.006)  # Gou et al., ToRA
    assert accuracy(verdicts, "tora-code-34b") == pytest.approx(0.807, abs=0.005)
    assert accuracy(verdicts, "gpt3-xl") == pytest.approx(0.407, abs=0.03)  # Kojima et al. take the first number


def test_grader_agrees_with_the_papers_on_date_and_strategyqa(data_dir):
    date, strategyqa = list(graded(data_dir, "date")), list(graded(data_dir, "strategyqa"))
    assert accuracy(date, "code-davinci-002") == pytest.approx(0.872, abs=0.01)  # the BIG-Bench Hard authors' count
    assert accuracy(date, "gpt3-xl") == pytest.approx(0.675, abs=0.01)  # Kojima et al.
    assert accuracy(strategyqa, "gpt3-xl") == pytest.approx(0.548, abs=0.015)
    assert accuracy(strategyqa, "human") == 1


def math_answers(data_dir):
    return [row["answer"] for row in E.read_questions(data_dir / "original" / "math_test.jsonl")]


def test_every_math_problem_has_its_last_box_as_its_answer_which_equals_itself(data_dir):
    answers = math_answers(data_dir)
    solutions = [row["solution"] for row in E.read_jsonl(data_dir / "original" / "math_test.jsonl")]
    assert len(answers) == 5000 and answers == [last_box(solution).strip() for solution in solutions]
    assert all(E.grade("math", answer, answer) for answer in answers)


def test_nearly_every_math_solution_is_read(data_dir):
    rows = E.read_jsonl(data_dir / "original" / "math_test.jsonl")
    assert sum(E.grade("math", read("math", row["solution"]), last_box(row["solution"])) for row in rows) >= 4970


def last_box(solution):
    """The content of a solution's last box: the shortest text in balanced braces."""
    rest = re.split(r"\\(?:boxed|fbox)\s*", solution)[-1]
    ends = (i for i in range(len(rest)) if rest[:i + 1].count("{") == rest[:i + 1].count("}"))
    return rest[1:next(ends)] if rest[0] == "{" else rest[0]


def changed(answer, rng):
    """A MATH answer with one small change that makes it another answer; None if none is at hand."""
    swaps = (("+", "-"), ("-", "+"), ("\\sqrt", ""), ("<", ">"), ("\\cup", "\\cap"), ("\\pi", ""), ("[", "("), ("x", "y"),
             ("sin", "cos"), ("^2", "^3"), ("\\frac{1}", "\\frac{2}"))
    ways = [answer.replace(old, new, 1) for old, new in swaps]
    if digits := [m.start() for m in re.finditer(r"(?<![_\d{.])\d|(?<=\{)\d", answer)]:
        i = rng.choice(digits)
        ways.append(f"{answer[:i]}{(int(answer[i]) + rng.randint(1, 8)) % 9 + 1}{answer[i + 1:]}")
    if re.fullmatch(r"[1-9]\d*", answer):
        ways += ["-" + answer, answer + "0", answer + ".5", f"\\frac{{{answer}}}{{3}}", f"{answer}, {int(answer) + 1}"]
    ways = [way for way in ways if way != answer]
    return rng.choice(ways) if ways else None


def rewritten(answer, rng):
    """The same MATH answer written otherwise, in up to three of the ways that fit."""
    ways = [f" {answer}\\, ", f"${answer}$", answer + ".", answer.replace("\\frac", "\\dfrac"),
            answer.replace("pmatrix", "bmatrix")]
    if m := re.fullmatch(r"(-?)\\frac\{(\d+)\}\{(\d+)\}", answer):
        n, d, k = int(m[2]), int(m[3]), rng.randint(2, 9)
        ways += [f"{m[1]}{n}/{d}", f"{m[1]}\\frac{{{k * n}}}{{{k * d}}}", f"{answer} \\approx {n / d:.4f}"]
    if re.fullmatch(r"\d+", answer):
        n = int(answer)
        ways += [f"{n + 3} - 3", f"\\frac{{{6 * n}}}{{6}}", f"n = {n}", f"{n}.0", f"{n} apples", f"{n}\\text{{ cm}}", f"{n:,}"]
    if re.fullmatch(r"-?\d\d?(?:,\s*-?\d\d?)+", answer):
        first, *others = re.split(r",\s*", answer)
        ways += [", ".join([*others, first]), f"\\{{{answer}\\}}", ", ".join(others) + " and " + first]
    return rng.sample(ways, 3)


def test_of_the_changed_math_answers_one_in_five_hundred_is_accepted(data_dir):
    rng = random.Random(0)
    others = [(other, answer) for answer in math_answers(data_dir) if (other := changed(answer, rng)) is not None]
    accepted = [pair for pair in others if E.grade("math", *pair)]
    assert len(others) > 4442 and len(accepted) <= 8, accepted


def test_nearly_all_rewritten_math_answers_are_equal(data_dir):
    rng = random.Random(0)
    equal = [(other, answer) for answer in rng.sample(math_answers(data_dir), 700) for other in rewritten(answer, rng)]
    missed = [pair for pair in equal if not E.grade("math", *pair)]
    assert len(equal) > 2000 and len(missed) < len(equal) / 50, missed[:9]
