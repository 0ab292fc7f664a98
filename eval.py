"""Tasks and evaluation: the student's prompt, answer extraction and grading, readers, generation, tables.

    python eval.py --students out/student_0 out/student_1 --questions test.jsonl

A row is a flat dict {"id", "task", "question", "answer"} with, where the task has them, "choices" {"A": text, ...}, "level"
and "prompt" (which overrides the student prompt).
"""
import argparse
import inspect
import json
import math
import os
import re
import sys
import zlib
from fractions import Fraction

import mpmath
import torch
from safetensors.torch import load_file
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

# task -> kind of answer: decides the end of the prompt, how an answer is found in a text, and when two answers are equal
TASKS = {"gsm8k": "number", "math": "math", "strategyqa": "yesno", "arc": "choice", "commonsense_qa": "choice",
         "anli": "choice", "date": "choice", "demo": "number"}
ASK = {"number": 'Reason step by step and end with "The answer is N." where N is a number.',
       "math": 'Reason step by step and end with "The answer is $\\boxed{X}$." where X is the result in LaTeX.',
       "yesno": 'Reason step by step and end with "The answer is yes." or "The answer is no."',
       "choice": 'Reason step by step and end with "The answer is (X)." where X is the letter of one choice.'}
ANLI = {"A": "entailment", "B": "neutral", "C": "contradiction"}


def stop(message):
    """End the program with one sentence on stderr and exit code 2 (raises SystemExit)."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


def read_jsonl(path, required=()):
    """Rows of a JSON Lines file. Stops with FILE:LINE on malformed JSON, a non-object, or a missing or empty required field
    (required fields are strings). Blank lines are skipped."""
    rows = []
    try:
        with open(path, encoding="utf-8") as f:
            for number, line in enumerate(f, 1):
                if not line.strip():
                    continue
                try:
                    row = json.loads(line)
                except json.JSONDecodeError as e:
                    stop(f"{path}:{number}: not valid JSON ({e.msg}); expected one JSON object a line")
                if not isinstance(row, dict):
                    stop(f"{path}:{number}: expected a JSON object, found {type(row).__name__}")
                for key in required:
                    if not isinstance(row.get(key), str) or not row[key].strip():
                        stop(f"{path}:{number}: field {key!r} is missing, empty or not a string")
                rows.append(row)
    except (OSError, UnicodeDecodeError) as e:
        stop(f"cannot read {path}: {e}")
    return rows


# ---------------------------------------------------------------- prompts

def student_prompt(row):
    """What a student sees of a row, the same in training and at test time (METHOD 8.11)."""
    if row.get("prompt"):
        return row["prompt"]
    if row["task"] == "demo":  # tiny students with a word-level vocabulary: nothing but the question
        return f"Question: {row['question']}\nAnswer:\n"
    choices = "".join(f"\n({letter}) {text}" for letter, text in (row.get("choices") or {}).items())
    return f"Answer the question.\n\n{row['question']}{choices}\n\n{ASK[TASKS[row['task']]]}\n"


def encode_prompt(tokenizer, prompt):
    """Token ids of a prompt: one user turn with generation prompt if the tokenizer has a chat template, else plain text with
    the tokenizer's own BOS; never a trailing EOS."""
    if tokenizer.chat_template:
        turn = [{"role": "user", "content": prompt.strip()}]
        return list(tokenizer.apply_chat_template(turn, add_generation_prompt=True, return_dict=False))
    ids = list(tokenizer(prompt)["input_ids"])
    return ids[:-1] if len(ids) > 1 and ids[-1] == tokenizer.eos_token_id else ids


def end_token(tokenizer):
    """Id of the token that ends a response: the first special token after the assistant's text in the rendered chat template,
    else eos_token_id."""
    if tokenizer.chat_template:
        turns = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "MARK"}]
        tail = tokenizer.apply_chat_template(turns, tokenize=False).rsplit("MARK", 1)[1]
        for token in tokenizer(tail, add_special_tokens=False)["input_ids"]:
            if token in tokenizer.added_tokens_decoder and tokenizer.added_tokens_decoder[token].special:
                return token
    if tokenizer.eos_token_id is None:
        stop(f"{tokenizer.name_or_path}: the tokenizer has no token that ends a response; set its eos_token")
    return tokenizer.eos_token_id


# ---------------------------------------------------------------- extraction: text -> canonical prediction or None

ANSWER = re.compile(r"(?:answer|result)\s*(?:\([^)\n]*\))?\s*(?:choice\s*)?(?:is|was|would be|should be|will be|are|=|:)+\s*:?|####|\\(?:boxed|fbox)\s*(?={)|^\s*A:", re.I | re.M)
NUMBER = re.compile(r"[-−]?\s?[$€£]?\s?(?:\d[\d,]*(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d+)?(?:\s*/\s*\d+)?")


def braces(text, start):
    """The content of the balanced {...} that opens at or after `start`; to the end of the text if it never closes."""
    depth = 0
    for i in range(text.find("{", start), len(text)):
        depth += (text[i] == "{") - (text[i] == "}")
        if depth == 0:
            return text[text.find("{", start) + 1:i]
    return text[text.find("{", start) + 1:]


def to_number(text):
    text = re.sub(r"[\s$€£,]", "", text.replace("−", "-"))
    try:
        return Fraction(text) if len(text) < 60 else None
    except (ValueError, ZeroDivisionError):
        return None


def number_in(text):
    text = text.split("=")[-1] if "=" in text else text
    for m in NUMBER.finditer(text):
        value = to_number(m.group())
        if value is not None:
            return str(value) if value.denominator == 1 else str(float(value))
    return None


def extract_answer(task, text, choices=None):
    """The final answer stated in a text in canonical form (a number, LaTeX, a letter of `choices`, "yes" or "no"), or None."""
    kind = TASKS[task]
    text = text.replace("**", "").replace("__", "")
    statements = []
    for m in ANSWER.finditer(text):
        if m.group().startswith("\\"):
            statements.append(braces(text, m.end()))
        else:
            statements.append(re.split(r"\n\s*\n|(?<=[^\s.])\.(?=\s|$)", text[m.end():].strip(), maxsplit=1)[0])
    for statement in reversed(statements):
        found = read_statement(kind, statement, choices)
        if found is not None:
            return found
    if kind == "number":
        numbers = [m.group() for m in NUMBER.finditer(text)]
        return number_in(numbers[-1]) if numbers else None
    if kind == "yesno":
        m = re.match(r"\W*(yes|no)\b", text, re.I)
        return m.group(1).lower() if m and not statements else None
    if kind == "choice":
        letters = [c for c in re.findall(r"\(([A-Z])\)", text) if c in (choices or {})]
        if not letters and text.strip(" ().") in (choices or {}):
            letters = [text.strip(" ().")]
        return letters[-1] if letters else None
    return None


def read_statement(kind, statement, choices):
    if kind == "number":
        return number_in(statement)
    if kind == "math":
        if "\\boxed" in statement:
            statement = braces(statement, statement.find("\\boxed"))
        return statement.strip().strip("$").strip() or None
    if kind == "yesno":
        m = re.match(r"\W*(yes|no|true|false)\b", statement, re.I)
        return {"yes": "yes", "true": "yes", "no": "no", "false": "no"}[m.group(1).lower()] if m else None
    m = re.match(r"\W*(?:option |choice )?\(?([A-Z])\b", statement)
    if m and m.group(1) in (choices or {}):
        return m.group(1)
    hits = [c for c, t in (choices or {}).items() if t.lower() in statement.lower()]
    return hits[0] if len(hits) == 1 else None


def grade(task, prediction, answer, choices=None):
    """True if a prediction means the same as the answer. An unparsed prediction (None) is wrong."""
    if prediction is None:
        return False
    kind = TASKS[task]
    if kind == "number":
        a, b = to_number(str(prediction)), to_number(str(answer))
        return a is not None and b is not None and abs(a - b) <= abs(b) * Fraction(1, 10**6)
    return str(prediction).strip().lower() == str(answer).strip().lower()


# ---------------------------------------------------------------- readers

def read_questions(path, task=None):
    """Questions as flat rows from a file in any of the published formats or flat JSONL."""
    seen, rows = set(), []
    for row in read_jsonl(path, ("id", "question", "answer")):
        row = {k: row[k] for k in ("id", "task", "question", "answer", "choices", "level", "prompt") if row.get(k)}
        row["task"] = task or row.get("task")
        if row["task"] not in TASKS:
            stop(f"{path}: unknown task {row['task']!r}; one of {', '.join(TASKS)}")
        if row["id"] not in seen:
            seen.add(row["id"])
            rows.append(row)
    return rows


# ---------------------------------------------------------------- students

def load_student(name, device="cpu", dtype=torch.float32):
    """(model, tokenizer) of a Hugging Face causal LM, or of a folder with a LoRA adapter in PEFT's format, merged."""
    adapter = os.path.join(name, "adapter_config.json")
    base = json.load(open(adapter))["base_model_name_or_path"] if os.path.isfile(adapter) else name
    try:
        has_tokenizer = base != name and os.path.isfile(os.path.join(name, "tokenizer.json"))
        tokenizer = AutoTokenizer.from_pretrained(name if has_tokenizer else base)
        model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype, use_safetensors=True)
    except Exception as e:
        stop(f"{name}: not a Hugging Face causal LM that can be loaded ({str(e).strip().splitlines()[0]})")
    if not tokenizer.is_fast:
        stop(f"{name}: its tokenizer is not a fast one, and character offsets are needed")
    if base != name:
        merge_adapter(model, name)
    return model.to(device).eval(), tokenizer


@torch.no_grad()
def merge_adapter(model, folder):
    config = json.load(open(os.path.join(folder, "adapter_config.json")))
    weights = load_file(os.path.join(folder, "adapter_model.safetensors"))
    scale = config["lora_alpha"] / (math.sqrt(config["r"]) if config.get("use_rslora") else config["r"])
    for key, A in weights.items():
        if key.endswith(".lora_A.weight"):
            module = model.get_submodule(key.removeprefix("base_model.model.").removesuffix(".lora_A.weight"))
            delta = scale * weights[key.replace("lora_A", "lora_B")].float() @ A.float()  # (out, in)
            delta = delta.T if type(module).__name__ == "Conv1D" else delta
            module.weight.data += delta.to(module.weight)


# ---------------------------------------------------------------- generation

@torch.no_grad()
def generate(model, tokenizer, prompts, max_new_tokens, batch_size, samples=1, temperature=None, seed=0, desc=None):
    """Greedy decoding (one sample and no temperature) or sampling. prompts: lists of token ids. Returns, per prompt, a list of
    `samples` dicts {"text", "logprob": mean log-probability of the response's tokens (EOS included), "tokens", "stopped"}."""
    temperature = temperature if temperature is not None else (0.8 if samples > 1 else 0)
    ends = model.generation_config.eos_token_id
    ends = {end_token(tokenizer), tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])} - {None}
    ends = torch.tensor(sorted(ends), device=model.device)
    takes = inspect.signature(model.forward).parameters
    jobs = sorted(((i, k) for i in range(len(prompts)) for k in range(samples)), key=lambda j: -len(prompts[j[0]]))
    out = [[None] * samples for _ in prompts]
    was_training = model.training
    model.eval()
    bar = tqdm(total=len(jobs), desc=desc, disable=desc is None, leave=False)
    try:
        for start in range(0, len(jobs), batch_size):
            batch = jobs[start:start + batch_size]
            width = max(len(prompts[i]) for i, _ in batch)
            ids = torch.zeros(len(batch), width, dtype=torch.long)
            mask = torch.ones(len(batch), width + max_new_tokens, dtype=torch.long)
            noise = torch.zeros(len(batch), max_new_tokens)
            for b, (i, k) in enumerate(batch):
                ids[b, width - len(prompts[i]):] = torch.tensor(prompts[i])
                mask[b, :width - len(prompts[i])] = 0
                generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {i} {k}".encode()))
                noise[b] = torch.rand(max_new_tokens, generator=generator)
            ids, mask, noise = ids.to(model.device), mask.to(model.device), noise.to(model.device)
            position = (mask.cumsum(1) - 1).clamp(min=0)
            rows = torch.arange(len(batch), device=model.device)
            tokens = torch.zeros(len(batch), max_new_tokens, dtype=torch.long, device=model.device)
            total = torch.zeros(len(batch), device=model.device)
            length = torch.zeros(len(batch), dtype=torch.long, device=model.device)
            stopped = torch.zeros(len(batch), dtype=torch.bool, device=model.device)
            cache, inputs = None, ids
            for t in range(max_new_tokens):
                extra = {"position_ids": position[rows, width + t - inputs.shape[1]:width + t], "logits_to_keep": 1}
                o = model(input_ids=inputs, attention_mask=mask[rows, :width + t], past_key_values=cache, use_cache=True,
                          **{k: v for k, v in extra.items() if k in takes})
                cache = o.past_key_values
                logp = o.logits[:, -1].float().log_softmax(-1)
                if temperature == 0:
                    new = logp.argmax(-1)
                else:
                    cdf = (logp / temperature).softmax(-1).cumsum(-1)
                    new = torch.searchsorted(cdf, noise[rows, t, None] * cdf[:, -1:], right=True).squeeze(1).clamp(max=logp.shape[1] - 1)
                tokens[rows, t] = new
                total[rows] += logp.gather(1, new[:, None]).squeeze(1)
                length[rows] += 1
                done = torch.isin(new, ends)
                stopped[rows] = done
                if done.all():
                    break
                if done.any():
                    keep = (~done).nonzero().squeeze(1)
                    cache.batch_select_indices(keep)
                    rows, new = rows[keep], new[keep]
                inputs = new[:, None]
            for b, (i, k) in enumerate(batch):
                n = int(length[b])
                response = tokens[b, :n - int(stopped[b])].tolist()
                out[i][k] = {"text": tokenizer.decode(response, skip_special_tokens=True), "tokens": n,
                             "logprob": float(total[b]) / max(n, 1), "stopped": bool(stopped[b])}
            bar.update(len(batch))
    finally:
        bar.close()
        model.train(was_training)
    return out


def evaluate(students, rows, max_new_tokens, batch_size, samples=1, temperature=None, seed=0):
    """Accuracy of students [(model, tokenizer), ...] on rows, each alone and together. All fractions in 0..1."""
    results = []  # [student][question][sample]
    for s, (model, tokenizer) in enumerate(students):
        prompts = [encode_prompt(tokenizer, student_prompt(row)) for row in rows]
        results.append(generate(model, tokenizer, prompts, max_new_tokens, batch_size, samples, temperature,
                                seed=seed + s, desc=f"student {s}"))
        for row, outs in zip(rows, results[-1]):
            for o in outs:
                o["prediction"] = extract_answer(row["task"], o["text"], row.get("choices"))
                o["correct"] = grade(row["task"], o["prediction"], row["answer"], row.get("choices"))
    predictions = []
    for q, row in enumerate(rows):
        votes = []  # [prediction, number of votes, best log-probability]
        for o in (o for r in results for o in r[q] if o["prediction"] is not None):
            for vote in votes:
                if grade(row["task"], o["prediction"], vote[0], row.get("choices")):
                    vote[1:] = vote[1] + 1, max(vote[2], o["logprob"])
                    break
            else:
                votes.append([o["prediction"], 1, o["logprob"]])
        best = max(votes, key=lambda v: (v[1] if samples > 1 else 0, v[2]), default=[None])[0]
        predictions.append({"id": row["id"], "answer": row["answer"], "students": [r[q] for r in results], "ensemble": best,
                            "ensemble_correct": grade(row["task"], best, row["answer"], row.get("choices"))})

    def share(values):
        values = list(values)
        return sum(values) / max(len(values), 1)
    return {"questions": len(rows),
            "accuracy": [share(o["correct"] for outs in r for o in outs) for r in results],
            "unparsed": [share(o["prediction"] is None for outs in r for o in outs) for r in results],
            "ensemble": share(p["ensemble_correct"] for p in predictions),
            "upper_bound": share(any(o["correct"] for outs in p["students"] for o in outs) for p in predictions),
            "stopped": [share(o["stopped"] for outs in r for o in outs) for r in results],
            "predictions": predictions}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
