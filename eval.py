"""Tasks and evaluation: rows, the student's prompt, answers, grading, generation, pictures.

    python eval.py --students out/student_0 out/student_1 --questions test.jsonl
    python eval.py --plot out/run_a out/run_b

A row is a flat dict {"id", "task", "question", "answer"} and, where there are any, "choices"
{"A": text, ...}, "level" and "prompt" (which overrides the student prompt).
"""
import argparse
import contextlib
import itertools
import json
import math
import os
import re
import sys
import zlib
from collections import defaultdict
from fractions import Fraction
from functools import lru_cache

import numpy as np
import torch
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.generation import GenerationConfig, StoppingCriteria
from transformers.utils import cached_file

# One line per task, and no more is needed for a new one: which kind of answer it has.
TASKS = {
    "gsm8k": "number",
    "math": "math",
    "strategyqa": "yesno",
    "arc": "choice",
    "commonsense_qa": "choice",
    "anli": "choice",
    "date": "choice",
    "demo": "number",
}
# Kind of answer -> how a student's prompt ends, and what a text says that does as it is asked.
KINDS = {
    "number": ('"The answer is N." where N is a number.', r"[$€£]?-?\d(?:[\d,.]{0,29}\d)?"),
    "math": ('"The answer is $\\boxed{X}$." where X is the result.', r"\$[^$\n]+\$"),
    "yesno": ('"The answer is yes." or "The answer is no."', r"yes|no"),
    "choice": ('"The answer is (X)." where X is the letter of one choice.', r"\([A-Z]\)"),
}
# That sentence (not "If the answer is (B), then"), once something follows it: it may end there.
ASKED = {kind: re.compile(r"(?im)(?:^|(?<=[.!>]))\W{0,9}(?:(?:so|thus|therefore|hence)\W{1,9})?"
                          rf"the answer is (?:{answer})(?!\w)[^\n]{{0,300}}?(?:\.(?=\s)|(?=\n))")
         for kind, (_, answer) in KINDS.items()}
LETTERS = [*"ABCDEFGHIJKLMNOPQRSTUVWXYZ"]
YESNO = {"yes": "yes", "true": "yes", "no": "no", "false": "no"}
ANLI = {"A": "entailment", "B": "neutral", "C": "contradiction"}
BOX = re.compile(r"\\(?:boxed|fbox)\s*\{((?:[^{}]|\{(?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})*\})*)\}")


# ---------------------------------------------------------------- commands: how they end
def stop(message):
    """End the program with one sentence on stderr and exit code 2 (raises SystemExit)."""
    tqdm.write(f"error: {message}", file=sys.stderr)  # on a line of its own, whatever bar is there
    raise SystemExit(2)


def in_a_line(error):
    """An exception as a part of such a sentence."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def within(kind, low, high=math.inf):
    """An argparse type: a finite number of `kind` (int or float) from low to high."""
    def number(text):
        value = kind(text)
        if not low <= value <= high or value == math.inf:
            raise argparse.ArgumentTypeError(f"{text} is not between {low:g} and {high:g}")
        return value
    return number  # argparse says "invalid number value: 'x'"


# ---------------------------------------------------------------- rows: one door for every file
def read_jsonl(path):
    """The rows of a file as a list; see numbered_rows."""
    return [row for _, row in numbered_rows(path)]


def numbered_rows(path):
    """Yield ("FILE:LINE", row) for each object of a JSON Lines file, or ("FILE:NUMBER", row) of a
    JSON list; the content decides which it is. Stops with the place at anything but an object."""
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            text = file.read()
    except (OSError, UnicodeDecodeError) as e:
        stop(f"cannot read {path} ({in_a_line(e)})")
    try:
        value = parse_json(text)
        rows = enumerate(value if isinstance(value, list) else [value], 1)
    except ValueError:
        rows = numbered_lines(path, text)
    for number, row in rows:
        if not isinstance(row, dict):
            stop(f"{path}:{number}: expected a JSON object, found {type(row).__name__}")
        yield f"{path}:{number}", row


def numbered_lines(path, text):
    """(number, value) of each line of JSON that is not blank."""
    for number, line in enumerate(text.split("\n"), 1):  # U+2028 ends no line
        try:
            if line.strip():
                yield number, parse_json(line)
        except ValueError as e:
            stop(f"{path}:{number}: not valid JSON ({e})")


def parse_json(text):
    """The value of a JSON text. A field that is null or NaN is absent and half a surrogate pair is
    a question mark, at every depth."""
    value = json.loads(text, parse_constant=lambda name: None, object_hook=without_nulls)
    return json.loads(json.dumps(value, ensure_ascii=False).encode("utf-8", "replace"))


def without_nulls(row):
    return {key: value for key, value in row.items() if value is not None}


def require_text(row, keys, where):
    """Stop with FILE:LINE unless each row[key] is a string that is not blank."""
    for key in keys:
        if not isinstance(row.get(key), str) or not row[key].strip():
            stop(f"{where}: field {key!r} is missing, empty or not a string")


def as_text(value):
    """A string as it is, a number as text (18.0, as pandas writes 18, is "18"), else None."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        value = str(value)
    return value if isinstance(value, str) else None


def clean_row(row, where):
    """Check the fields that questions and paths share and bring them into canonical form.

    Changes the row in place and returns it. A number may be an id, a choice or an answer, choices
    may be a list, and an answer the text of a choice. Stops with FILE:LINE at the rest.
    """
    task = row.get("task")
    if task not in [*TASKS]:
        stop(f"{where}: unknown task {task!r}; known are {', '.join(TASKS)} (--task names the task "
             "of a file of questions)")
    row["id"] = as_text(row.get("id"))
    require_text(row, ["id", "question"] + ["prompt"] * ("prompt" in row), where)
    choices = row.pop("choices", {})
    if isinstance(choices, list):
        choices = dict(zip(LETTERS, choices))
    if not isinstance(choices, dict) or not choices.keys() <= {*LETTERS}:
        stop(f"{where}: field 'choices' is not an object of letters and texts, nor a list of texts")
    choices = {c: as_text(text) for c, text in choices.items() if text not in (None, "")}
    require_text(choices, choices, where)
    if choices:
        row["choices"] = choices
    answer, kind = row.get("answer"), TASKS[task]
    if isinstance(answer, bool):
        answer = "yes" if answer else "no"
    row["answer"] = canonical_answer(kind, (as_text(answer) or "").strip(), choices)
    if not row["answer"]:
        stop(f"{where}: field 'answer' is {str(answer)[:80]!r}, no answer of task {task} ({kind}"
             f"{' of two or more choices' * (kind == 'choice')})")
    return row


def canonical_answer(kind, text, choices):
    """A gold answer as the grader knows it, or None where it is none of its kind."""
    if kind == "number":
        return text if number_in(text) is not None else None
    if kind == "yesno":
        return YESNO.get(text.lower())
    if kind == "choice":
        by_text = {choice: letter for letter, choice in choices.items()}
        letter = text.strip("()") if text.strip("()") in choices else by_text.get(text)
        return letter if len(choices) > 1 else None
    return text


# ---------------------------------------------------------------- readers: published questions
def read_questions(path, task=None):
    """Rows of a file of questions, each id once, clean (see clean_row).

    The file is in a published format (GSM8K, MATH, BIG-bench, BBH, CommonsenseQA, ARC, ANLI,
    StrategyQA), flat rows, or a path pool. `task` overrides what the file says.
    """
    stem = os.path.splitext(os.path.basename(path))[0]
    guess = next((t for t in TASKS if re.search(rf"(?<![a-z]){t}(?![a-z])", stem.lower())), None)
    questions = {}
    for i, (where, record) in enumerate(records(path)):
        try:
            row = without_nulls(flatten(record, guess))
        except (KeyError, TypeError, AttributeError) as e:
            stop(f"{where}: not a question in a format that I know ({in_a_line(e)})")
        ids = [record[key] for key in ("id", "qid", "uid") if key in record]
        row["id"] = ids[0] if ids else f"{stem}-{i:05d}"
        row = clean_row({**row, "task": task or row.get("task")}, where)
        if question_of(questions.setdefault(row["id"], row)) != question_of(row):
            stop(f"{where}: the id {row['id']!r} belongs to another question already; give each "
                 "question its own")
    if not questions:
        stop(f"{path}: no questions in it")
    return list(questions.values())


def records(path):
    """(place, record) of the rows of a file, or of the "examples" in BIG-bench's one object."""
    for where, row in numbered_rows(path):
        examples = row.get("examples")
        yield from ((where, r) for r in examples) if isinstance(examples, list) else [(where, row)]


def boxed(solution):
    """The answer of a MATH solution: its last box, and those to which an "and" or "or" joins it."""
    parts = BOX.split(solution)  # text, box, text, ..., box, text
    values = []
    for before, value in zip(parts[-3::-2], parts[-2::-2]):
        if not any(grade("math", value, other) for other in values):  # "x + 1, or 1 + x"
            values.insert(0, value)
        if not re.fullmatch(r"[^.]{0,20}\b(?:and|or)\b[^.]{0,20}", before):
            break
    return ", ".join(values)


def flatten(r, guess):
    """A published record as a flat row without id; `guess` is the task that its file's name has."""
    if "problem" in r:  # MATH
        answer = r["answer"] if "answer" in r else boxed(r["solution"])
        return {"task": "math", "question": r["problem"], "level": r.get("level"), "answer": answer}
    if "target_scores" in r:  # BIG-bench
        scores = r["target_scores"]
        right = max(scores, key=scores.get)
        if {t.lower() for t in scores} == {"yes", "no"}:
            return {"task": guess or "strategyqa", "question": r["input"], "answer": right}
        # it may list the right choice first: our order hangs on the texts alone
        texts = sorted(scores, key=lambda text: zlib.crc32(f"{r['input']} {text}".encode()))
        return {"task": guess, "question": r["input"], "answer": right, "choices": texts}
    if "input" in r and "target" in r:  # BIG-Bench Hard
        question, _, options = r["input"].partition("\nOptions:\n")
        choices = dict(re.findall(r"\(([A-Z])\) (.+)", options))
        return {"task": guess, "question": question, "answer": r["target"], "choices": choices}
    if "hypothesis" in r:  # ANLI
        answer = {"e": "A", "n": "B", "c": "C", 0: "A", 1: "B", 2: "C"}[r["label"]]
        question = (f"Premise: {r.get('premise') or r['context']}\nHypothesis: {r['hypothesis']}\n"
                    "What is the hypothesis, given the premise?")
        return {"task": "anli", "question": question, "answer": answer, "choices": ANLI}
    if "answerKey" in r:  # CommonsenseQA and ARC, as published and as on the Hugging Face hub
        stem = r["question"] if isinstance(r["question"], dict) else {**r, "stem": r["question"]}
        choices = stem["choices"]
        if isinstance(choices, list):
            choices = {key: [choice[key] for choice in choices] for key in ("label", "text")}
        letters = dict(zip(choices["label"], LETTERS))  # some labels of ARC are 1, 2, 3, 4
        task = guess or ("commonsense_qa" if "question_concept" in stem else "arc")
        return {"task": task, "question": stem["stem"], "answer": letters[r["answerKey"]],
                "choices": choices["text"]}
    row = {key: r.get(key) for key in ("question", "answer", "choices", "level", "prompt")}
    task = guess
    if isinstance(r["answer"], bool):
        task = guess or "strategyqa"
    elif "####" in str(r["answer"]):  # GSM8K
        row["answer"] = r["answer"].rsplit("####", 1)[1].strip()
        task = guess or "gsm8k"
    return {**row, "task": r.get("task", task)}


# ---------------------------------------------------------------- prompts: what a student reads
def question_of(row):
    """The question with its choices, a line "(A) text" each."""
    choices = row.get("choices") or {}
    return row["question"] + "".join(f"\n({letter}) {text}" for letter, text in choices.items())


def student_prompt(row):
    """What a student sees of a row, in training and at test time: its own `prompt`, or the
    question and how the answer is to end."""
    if row.get("prompt"):
        return row["prompt"]
    if row["task"] == "demo":  # tiny students with a word-level vocabulary: the question alone
        return f"Question: {row['question']}\nAnswer:\n"
    end, _ = KINDS[TASKS[row["task"]]]
    return (f"Answer the question.\n\n{question_of(row)}\n\n"
            f"Reason step by step and end with {end}\n")


# Set before a chat template, so that one that writes today's date writes the same tomorrow. It is a
# macro, since transformers hands no function of ours to a template.
FIXED_DATE = ("{% macro strftime_now(format) %}{{ format | replace('%Y', '2024')"
              " | replace('%B', 'July') | replace('%b', 'Jul') | replace('%m', '07')"
              " | replace('%d', '26') }}{% endmacro %}\n")


def encode_prompt(tokenizer, prompt):
    """Token ids of a prompt, in which the names of control tokens are text.

    With a chat template: one user turn, then what the template writes before any answer (a header,
    an empty thought). Without: the text with the tokenizer's own BOS, never a trailing EOS.
    """
    if tokenizer.chat_template:
        return os.path.commonprefix(two_chats(tokenizer, prompt.strip()))
    ids = list(tokenizer(prompt, split_special_tokens=True)["input_ids"])
    return ids[:-1] if len(ids) > 1 and ids[-1] == tokenizer.eos_token_id else ids


def end_token(tokenizer):
    """Id of the token that ends a response: the first special token that the chat template writes
    after any answer, else eos_token_id. Stops if there is none."""
    if tokenizer.chat_template:
        backwards = [ids[::-1] for ids in two_chats(tokenizer, "Q")]
        for token in reversed(os.path.commonprefix(backwards)):
            added = tokenizer.added_tokens_decoder.get(token)
            if added and added.special:
                return token
    if tokenizer.eos_token_id is None:
        stop(f"{tokenizer.name_or_path}: the tokenizer needs an eos_token, which ends a response")
    return tokenizer.eos_token_id


def two_chats(tokenizer, prompt):
    """Token ids of a user's turn and an answer's, for two answers that have no token in common."""
    chats = [list(tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}],
        chat_template=FIXED_DATE + tokenizer.get_chat_template(),
        sanitize_control_tokens=True, return_dict=False)) for answer in ("The", "9")]
    if chats[0] == chats[1]:
        stop(f"{tokenizer.name_or_path}: its chat template does not write what the assistant says")
    return chats


# ---------------------------------------------------------------- answers
# A filter would rather lose an answer than take a wrong one: what names several, denies one or
# stops short of one is unparsed. Texts are cut to their end and their blanks to one, so that no
# pattern below takes more than milliseconds on any of them.
LONGEST = 5000  # characters of a text that are read, from its end
# The marks of thoughts in the families' outputs; a decoder may leave <|channel|> and the like out.
THOUGHT = re.compile(r"""(?ix)
    (?P<closes> </(?:\w+:)?(?:think|thinking|thoughts?|reasoning)> | \[/think\] | ◁/think▷
      | <\|end_(?:thinking|of_thought)\|> | <\|channel\|>final(?:<\|message\|>)? | assistantfinal )
    | <(?:\w+:)?(?:think|thinking|thoughts?|reasoning)> | \[think\] | ◁think▷
    | <\|(?:start_thinking|begin_of_thought|channel)\|> | \A(?-i:analysis(?=[A-Z]))""")
# What announces an answer: #### 5, \boxed{5}, "So the best option (of the four) is", "Answer: 5";
# "the answer is correct" doesn't. "The answer isn't 5" announces "isn't 5", which is denied. `A:`
# opens only GSM8K's answers.
ANNOUNCED = re.compile(r"""(?imx) \#{4} | \\(?:boxed|fbox)\b | ```output\n | (?P<colon>^A:)
    | <(?:final_)?answer> | \bfinal\ answer\s*\n
    | \b(?:answers?|ans|(?:correct|right|best)\ (?:option|choice))\b ["'`]?\s?
      (?:\([^()\n]{1,80}\)\s?)? (?:(?:to|of|for)\ [^.:=\n]{1,80}?\s)? (?:,[^,.\n]{1,30},\s?)?
      (?:choice\b|option\b|letter\b)? \s?
      (?: (?:is|are|was|(?:would|should|must|will)\ be|seems\ to\ be)\b | [:=]
        | (?= (?P<denial>(?:is|are|was)n['’]t | (?:\w+n['’]t|cannot|\w+\ not)\ be)
              \b[^\w\n]{1,3}\d ) )
      (?!\s(?:\w+ly\s)?(?:correct|verified|confirmed|consistent|reasonable)\b)""")
# "If the answer is ..." announces nothing, nor does "A common wrong answer is ...".
SUPPOSED = re.compile(r"""(?ix)(?: \b(?:if|suppose|whether|assum\w+|unless|check)\b [^.,:!?\n]{0,30}
    | (?: \b(?:might|wrong|incorrect|unlikely|least\ likely|not\ true|others?)\b | n['’]t\b )
      (?: (?!\b(?:so|thus|therefore|hence|hand|words)\b) [^.,:!?\n] ){0,30} )\Z""")
DENIED = re.compile(r"(?i)\b(?:not|never|neither|nor|cannot|wrong|incorrect|false|eliminated?"
                    r"|except|rule[sd]? out|unlikely|least likely)\b|n['’]t\b")
# A box right behind it is no answer, but a part of one: -\boxed{3}, 2\boxed{3}, \frac{1}{\boxed{3}}
PARTLY = re.compile(r"(?:(?<![-\w})])[-−–]|[$=(\[] ?[-−–] |\d(?: ?[*/] ?)?|\^"
                    r"|\\(?:sqrt|cdot|times|div|pm) ?)\{?\Z"
                    r"|\\[dtc]?frac(?:\{[^$=)\n]{1,60}\})?\{\Z")
# What is right behind it is no answer: "It cannot be $\boxed{5}$".
NOT_BE = re.compile(r"(?i)(?:\bnot|\bcannot|n['’]t)\s(?:be\s|equal\s)?\W*\Z")
BUT = re.compile(r"(?i)\b(?:but|rather|instead)\b(?! than)")
# Such a sentence weighs an option and does not choose it.
LOOK_AT = re.compile(r"(?i)\b(?:consider|examine|evaluate|check|look|let['’]?s|let us)\b")
# How a line of a list of choices begins: (A), B. or - C:
OPTION = re.compile(r"(?:[-*•] )?\(?[A-Z][).:]")


def after_thought(text):
    """What a text says after its thoughts: all that follows the last </think> or the like, or the
    mark of the final channel. A thought that is not closed leaves nothing ("")."""
    marks = list(THOUGHT.finditer(text))
    if not marks:
        return text
    return text[marks[-1].end():] if marks[-1]["closes"] else ""


def extract_answer(task, text, choices=None):
    """The answer that a text states, in canonical form, or None where it states none.

    It is a number, LaTeX, a letter of `choices`, "yes" or "no". What the text announces last
    counts ("the answer is unclear" takes back what came before). Only a text that announces
    nothing is read from its end.
    """
    kind, choices = TASKS[task], choices or {}
    text = plain(after_thought(text))
    found = [m for m in ANNOUNCED.finditer(text)
             if not (kind == "choice" and (m["colon"] or m["denial"]))]
    announced = [m for m in found if not is_taken_back(text, m)]
    if not announced:
        if found:  # what follows the sentence: "The wrong answer is 5. It is 6."
            text = text[found[-1].end():]
            text = text[len(first_sentence(text)):].lstrip(".!?")
        return read_end(kind, text.strip(), choices)
    statement = statement_after(text, announced[-1])
    if re.match(r"[^.!\n]{0,80}\?", statement):  # "The answer is 5? Let me see."
        return None
    in_box = announced[-1][0].startswith("\\")
    before = text[:announced[-1].start()][-80:]
    if in_box and kind in ("number", "math") and PARTLY.search(before):
        return None
    if kind == "math":
        return read_math(text, announced)
    return READERS[kind](statement, choices)


def is_taken_back(text, m):
    """Whether what stands before an announcement says that it is none."""
    before = text[:m.start()][-60:]
    return bool((SUPPOSED if m[0][0].isalpha() else NOT_BE).search(before))


def plain(text):
    """The end of a text without markdown's bold and with single blanks (Python's ** stays)."""
    text = re.sub(r"[ \t\xa0\u2009\u202f]+", " ", text[-LONGEST:])
    text = re.sub(r"\s*\n\s*\n\s*", "\n\n", text)
    return re.sub(r"(?<![^\s(\"'>:])(\*{1,3}|__)(?=\S)(.{1,200}?)(?<=\S)\1(?![\w*(])", r"\2", text)


def statement_after(text, m):
    """What is announced: the braces of \\boxed, the last line of a program's output, the content
    of a tag, else the paragraph."""
    rest = text[m.end():m.end() + 1000]
    if m[0].startswith("\\"):
        return braces(rest)
    if m[0].startswith("```"):
        return rest.split("```")[0].strip().rsplit("\n", 1)[-1]
    if m[0].startswith("<"):
        return rest.split("</")[0].strip()
    return re.sub(r"^(?:\n-\s|[\s:*]|\.(?!\d))+", "", rest).split("\n\n", 1)[0]


def braces(text):
    """The content of the balanced {...} at the start of a text, "" if they never close (the text
    was cut); without any, a word."""
    text = text.lstrip()
    if not text.startswith("{"):
        return re.match(r"[^\s$]*", text)[0]
    depth = list(itertools.accumulate((c == "{") - (c == "}") for c in text))
    return text[1:depth.index(0)] if 0 in depth else ""


def first_sentence(text):
    """A text up to the dot (or !, ?) that ends its first sentence ("4 hrs. 30" has none)."""
    return re.split(r"(?<!\\)(?:(?<![a-z])\.|[!?]|\.(?!\s\d))(?=\$?(?:\s|$))", text, maxsplit=1)[0]


def read_end(kind, text, choices):
    """The answer of a text that announces none: its last number, formula or sentence, if that
    leaves no doubt."""
    *before, line = re.split(r"\n+", text)[-2:]
    if kind == "number":
        text = text.translate(SIGNS)
        numbers = [m for m in NUMBER.finditer(text) if canonical(m) is not None]
        if not numbers or NOT_BE.search(text[:numbers[-1].start()]):
            return None
        return canonical(numbers[-1])
    if kind == "math":
        formulas = [m for m in FORMULA.finditer(text) if m.end() > len(text) - len(line)]
        if formulas:
            return (formulas[-1][1] or formulas[-1][2]).strip() or None
        if "\\" in line:
            return line.rstrip(".")
        numbers = list(NUMBER.finditer(line))
        return numbers[-1][0].strip() if numbers else None
    sentence = line if OPTION.match(line) else re.split(r"[.!?]\s+(?=\S)", line)[-1]
    if kind == "yesno":
        starts = re.compile(r"(?i)(?:so|thus|therefore|hence)?\W*(yes|no)\s*(?:[,.;:!]|$)")
        m = starts.match(sentence) or starts.match(text)
        return m[1].lower() if m else None
    must_be = re.split(r"\b(?:must|has to) be\b", sentence)  # "it can't be A, so it must be B"
    if len(must_be) == 2:
        return read_choice(must_be[1], choices)
    # the end of the question's list of choices, or of a text that was cut while it weighed one
    echo = OPTION.match(line) and before and OPTION.match(before[0])
    if echo or DENIED.search(sentence) or LOOK_AT.search(sentence):
        return None
    named = {a or b for a, b in re.findall(r"\(([A-Z])\)|(?i:option|choice) ([A-Z])\b", sentence)}
    named &= set(choices)
    if named:
        return named.pop() if len(named) == 1 else None
    return read_choice(sentence, choices)


# ---- numbers
# Not a part of a word or of another number: money, sign, 2 1/2, 1,234.5 or 70 000, 1e3 or 3 x 10^8,
# 3/4, 2 million, but not 2nd.
NUMBER = re.compile(r"""(?x) (?<![A-Za-z_\d])(?<!\d[.,])
    (?P<minus>(?<![\w).}%])-)? [$€£₹]?\ ?(?P<minus2>-)?
    (?:(?P<whole>\d+)\ {1,2}(?=\d+/\d))?
    (?P<digits>\d{1,3}(?:(?:,\d{2,3})*,\d{3}|(?:\ \d{3})+)(?!\d)|\d+|(?=\.\d)) (?P<decimals>\.\d+)?
    (?: [eE](?P<e>[-+]?\d{1,2})\b
      | \ ?(?:[x×*·]|\\times|\\cdot)\ ?10\ ?\^\ ?\{?(?P<e10>-?\d{1,2})(?!\d)\}? )?
    (?:\ ?/\ ?(?P<under>\d+))? (?!\d|st\b|nd\b|rd\b|th\b)
    (?:\ (?P<scale>hundred|thousand|million|billion|trillion)\b)?""")
# After a number it says that this was a term of open arithmetic ("36 + 48"), or of a share
# ("5 of 7").
OPERATOR = re.compile(
    r"(?: [a-z]+){1,3} (?:[-+*/x×÷]|\\times) [$€£]?\d"  # 12 eggs - 4
    r"|(?: ?%| percent) of [$€£]?\d|,? (?:squared|cubed|multiplied by|added to)\b"
    r"|[(^²³⁴-⁹√π]| ?%? ?(?:=|(?:[-/]|\*\*?)(?= ?[\d$(])|[+×÷](?= ?[\w$(])"
    r"|\\(?:times|cdot|div|sqrt|pi)"
    r"|(?:[a-z]+ )?(?:x|of|out of|times|plus|minus|(?:more|less|fewer) than|divided by|equals)\b)")
# Before a number it says that this is not the value: more than 5, sqrt(16), -(5), half of 10.
INSIDE = re.compile(
    r"(?i)(?:\bthan(?: or equal to)?\s|√|sqrt\s?[({]?|[\^_][({]?|-\s?\(|\|"
    r"|\b(?:minus|over|under|twice|double|triple|(?:half|third|quarter|square|root|cube) of)\s)\Z")
SCALE = {"": 1, "hundred": 10**2, "thousand": 10**3, "million": 10**6, "billion": 10**9,
         "trillion": 10**12}
ONES = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten",
        "eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen",
        "nineteen"]
TENS = ["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]
SPELLED = {word: number for number, word in enumerate(ONES)}  # up to "nine hundred ninety nine"
SPELLED |= {f"{ten} {one}".strip(): 20 + 10 * t + o for t, ten in enumerate(TENS)
            for o, one in enumerate(["", *ONES[1:10]])}
SPELLED |= {f"{ONES[h]} hundred {rest}".strip(): 100 * h + n for h in range(1, 10)
            for rest, n in [("", 0), *SPELLED.items()] if rest != "zero"}
_WORD = f"(?:{'|'.join([*ONES, *TENS, *list(SCALE)[1:]])})"
SPELLED_NUMBER = re.compile(rf"(?i)\W*(?:(?:\w+ly|about|just|therefore|thus|a total of)\s)*"
                            rf"((?:an?\s)?{_WORD}(?:[\s-](?:and\s)?{_WORD})*)\b")
# After a number it says that this was one of several, or a part of a measure: 5 or 6, 4 hours and
# 30 minutes, 4:30, 2 and a half, x = 3 and y = 5; or that it is in thousands: $10K.
_PART = r"(?:half|halves|thirds?|quarters?|fourths?|fifths?|sixths?|eighths?|tenths?)\b"
ONE_OF_SEVERAL = re.compile(
    rf"(?i):\d|h\d|[\s-]{_PART}"
    r"|[^.;:=()\d\n]{0,40}\b(?:and|or)\s(?:about\s|only\s)?"
    rf"(?:[$€£]?-?\d|an?\s{_PART}|{_WORD}\b)"
    r"|,?\s(?:to|through)\s[$€£]?-?\d|\s[A-Za-z]+[.,]?\s\d|,\s?-?\d|(?:,|\sand)\s[A-Za-z]\s?="
    r"|(?-i:[kKMB])\b")
SIGNS = str.maketrans("−–‒﹣－‐‑", "-------")
SIGNS |= str.maketrans({"½": " 1/2", "⅓": " 1/3", "⅔": " 2/3", "¼": " 1/4", "¾": " 3/4"})


def read_number(statement, choices=None):
    """The number that the first sentence of a statement gives, or None."""
    text = TEXT.sub(r"\1", statement.replace("{,}", ",").replace("\\!", "").replace("\\,", " "))
    text = re.sub(r"\\[dtc]?frac\s*(?:\{(\d+)\}|(\d))\s*(?:\{(\d+)\}|(\d))", r" \1\2/\3\4", text)
    return number_in(first_sentence(text))


def number_in(text):
    """The one number that a text gives: its first, or what its last equation comes to. None for
    open arithmetic, several numbers, and one that is denied."""
    text = digits_for_words(text.translate(SIGNS))
    text = re.sub(r"(?i)(?:^\W*minus|(?<!-)\bnegative)\s(?=[$€£]?\d)", "-", text)
    m = NUMBER.search(text)
    if not m:
        return None
    before, rest = text[:m.start()], text[m.end():]
    if DENIED.search(before):
        positive = BUT.split(text, maxsplit=1)[1:]  # "not 5 but 6"
        return number_in(positive[0]) if positive else None
    operator = OPERATOR.match(rest)
    if operator and (equation := re.split(r"=|\bequals\b", rest))[1:]:
        return number_in(equation[-1])
    open_ended = operator and not operator[0].endswith("of")
    if open_ended or INSIDE.search(before) or ONE_OF_SEVERAL.match(rest) or "\\frac" in text:
        return None
    return canonical(m)


def canonical(m):
    """The exact value of a NUMBER match as a string ("18", "2.5", "1/3"); None for a division by
    zero and for what is too long."""
    digits = (re.sub("[, ]", "", m["digits"]) or "0") + (m["decimals"] or "")
    try:
        value = Fraction(digits) / int(m["under"] or 1) + int(m["whole"] or 0)
        value *= Fraction(10) ** int(m["e"] or m["e10"] or 0) * SCALE[m["scale"] or ""]
        value = -value if m["minus"] or m["minus2"] else value
        decimal = str(float(value))
        exact = value.denominator > 1 and Fraction(decimal) == value
        return decimal if exact else str(value)
    except (ValueError, ArithmeticError):
        return None


def digits_for_words(text):
    """A text that begins with a number in words, with digits for it ("forty-two eggs"); nothing is
    left of one that begins with no clear number ("five six", "one of them")."""
    m = SPELLED_NUMBER.match(text)
    if not m:
        return text
    words, rest = re.sub(r"[\s-]+(?:and\s)?", " ", m[1].lower()), text[m.end():]
    words = re.sub(r"^an? ", "one ", words)
    value, smallest = 0, math.inf
    for part, scale in re.findall(r"(\S.*?)(?: (thousand|million|billion|trillion)|$)", words):
        if part not in SPELLED or SCALE[scale] >= smallest:
            return ""
        smallest = SCALE[scale]
        value += SPELLED[part] * smallest
    return "" if words == "one" and re.match(r"\s*\w", rest) else f"{value}{rest}"


# ---- yes or no
def read_yesno(statement, choices=None):
    """The "yes" or "no" that begins a statement ("most likely No", "technically, yes"), or None."""
    m = re.match(r"(?i)(?:\W|(?!hardly|unlikely)\w+ly\b|most\b|very\b|a\b|therefore\b|thus\b"
                 r"|hence\b|indeed\b|\\text\b)*(yes|no|true|false)\b", statement)
    both = r"\W{0,3}(?:(?:or|and|but)\W+)?(?:yes|no|true|false)\b(?!\sone)"
    phrase = r"\s(?:longer|one|idea|doubt|way|such|more|(?:\w+\s)?(?:answer|consensus|evidence))\b"
    if not m or re.match(f"(?i){both}|{phrase}", statement[m.end():]):
        return None  # "yes/no", "yes and no", "no clear answer"
    return YESNO[m[1].lower()]


# ---- one of several choices
REASON = re.compile(r"\b(?:because|since|as|given|which|while|whereas|although|though|not"
                    r"|rather than|instead of|unlike|due to|Explanation|Reason(?:ing)?)\b")
NOUN = r"(?!because|since|as\b|or\b|and\b|which|is\b|for\b|with\b)[a-z]"  # after the article "A"


def read_choice(statement, choices):
    """The letter of the one choice that a statement names by letter or by text, or None: never the
    article "a", never one that is denied, never one of several."""
    s = re.sub(r"\\(?:text|mathrm|mathbf|textbf)\b|[{}$*`\"'“”]", "", statement).strip()
    if re.match(r"(?i)(?:not|neither|never)\b", s):
        s = "".join(BUT.split(s, maxsplit=1)[1:])
    m = re.match(r"(?:[\s:,-]|\b(?:its?|is|most|likely|probably|definitely|clearly|therefore|thus"
                 r"|hence|indeed|simply|option|choice|letter)\b)*"
                 r"(?:[(\[]\s*([A-Za-z])\s*[)\]]|([A-Z])(?!\w)|([a-z])(?=[.,:;)]?\s*$))", s)
    if m and (letter := (m[1] or m[2] or m[3]).upper()) in choices:
        rest = s[m.end():]
        article = m[2] in ("A", "I") and re.match(f" {NOUN}", rest)
        if not article:
            return None if names_another(rest, letter, choices) else letter
    return choice_by_text(s, choices)


def names_another(rest, letter, choices):
    """Whether what follows a letter names another choice as well, by letter or by text."""
    after = numeric_dates(rest).lstrip("().:, \n").lower()  # "B. bank"
    rest = re.sub(r"[):,\s]*(?:\.\s*(?=(?:or|and)\b))?", "", rest, count=1)  # "B. or C."
    claim = REASON.split(first_sentence(rest), maxsplit=1)[0].lstrip("( ")
    own = choices[letter].lower()
    if claim.lower().startswith(own):
        claim = claim[len(own):]
    else:
        claim = re.sub(rf"^A (?={NOUN})", "", claim)  # "(B): A library lends books"
    said = claim.lower()
    begun = [text.lower() for text in choices.values()
             if said.startswith(text.lower()) or after.startswith(numeric_dates(text).lower())]
    if begun and max(begun, key=len) != own:
        return True
    letters = set(re.findall(r"(?<![\w'’])([A-Z])\b(?!['’]\w)", claim)) & set(choices)
    letters |= {letter.upper() for letter in re.findall(r"\(([a-z])\)", claim)} & set(choices)
    texts = "|".join(re.escape(text.lower()) for c, text in choices.items() if c != letter)
    return bool(letters - {letter} or re.search(rf"(?:\b(?:or|and)\s|[/&]\s?)(?:{texts})\b", said))


def choice_by_text(statement, choices):
    """The letter of the one choice whose text a statement gives, or None."""
    texts = {letter: normal(text) for letter, text in choices.items() if normal(text)}
    said = normal(statement)
    claim = normal(REASON.split(first_sentence(numeric_dates(statement)), maxsplit=1)[0])
    # not the 5 of 2.5, 1/5 or 5.2, nor "no contradiction"
    whole = {letter: rf"(?<!\w)(?<!\bno )(?<![./,-](?=\d)){re.escape(text)}(?!\w|[./,]\d)"
             for letter, text in texts.items()}
    hits = [c for c, text in whole.items() if re.match(text, said) or re.search(text, claim)]
    # "park" in "car park"
    hits = [c for c in hits if not any(texts[c] in texts[d] for d in hits if d != c)]
    if len(hits) != 1 or DENIED.search(claim.replace(texts[hits[0]], "")):
        return None
    return hits[0]


MONTHS = ["jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec"]
# March 3, 1987 and 3rd of March 1987, 3/3/1987, 1987-03-03
_MONTH = rf"(?:{'|'.join(MONTHS)})[a-z]*\.?"
DATE = re.compile(rf"""(?ix)\b(?: (?P<month>{_MONTH})\ (?P<day>\d\d?)(?:st|nd|rd|th)?,?\s
      | (?P<day2>\d\d?)(?:st|nd|rd|th)?\ (?:of\ )?(?P<month2>{_MONTH}),?\s
      | (?P<month3>\d\d?)/(?P<day3>\d\d?)/ ) (?P<year>\d{{4}})\b
    | \b(?P<year4>\d{{4}})-(?P<month4>\d\d)-(?P<day4>\d\d)\b""")


def normal(text):
    """A text in lower case, without articles and punctuation (but 1,500), dates as MM/DD/YYYY."""
    text = numeric_dates(text).lower()
    return re.sub(r"(?:\b(?:the|an|a)\b(?=\s+\w)|,(?!\d)|[^\w/.,%$-])+", " ", text).strip(" .,")


def numeric_dates(text):
    """A text with MM/DD/YYYY for each date in words or without leading zeros."""
    def numeric(m):
        found = {key.rstrip("234"): part for key, part in m.groupdict().items() if part}
        month = found["month"].lower()
        month = int(month) if month.isdigit() else MONTHS.index(month[:3]) + 1
        return f"{month:02}/{int(found['day']):02}/{found['year']}"
    return DATE.sub(numeric, text)


# ---- mathematics
FORMULA = re.compile(r"(?s)\$\$?([^$]{1,500})\$|\\[(\[](.{1,500}?)\\[)\]]")
# Between boxes that make one answer: "}$ and $y = ".
JOINT = re.compile(r"(?:[\s$,;{}&]|\\[()\[\],;]|\\q?quad|\\text|\b(?:and|or)\b"
                   r"|[A-Za-z](?:_\w)?\s?=)*")


def read_math(text, announced):
    """The LaTeX that a text announces last: a box (with those beside it: "\\boxed{1} and
    \\boxed{2}"), or the formulas of a sentence, or the sentence; None if it is empty."""
    boxes = [m for m in announced if m[0].startswith("\\")][-20:]
    if announced[-1] not in boxes:
        sentence = first_sentence(statement_after(text, announced[-1])).strip()
        # "$5$ because $2+3=5$"
        sentence = re.split(rf"(?<=[$)\]])[a-z ]{{0,20}},? {REASON.pattern}", sentence)[0]
        formulas = [(a or b).strip() for a, b in FORMULA.findall(sentence)]
        before = FORMULA.split(sentence)[0]
        if formulas and (DENIED.search(before) or VALUED.search(before)):
            return None
        if formulas or not boxes or re.search(r"\d", sentence):
            return ", ".join(formulas) or sentence or None
    found = [braces(text[boxes[-1].end():][:1000]).strip()]
    for left, right in zip(boxes[-2::-1], boxes[::-1]):
        content = braces(text[left.end():][:1000])
        between = text[left.end():right.start()].split(content or "}", maxsplit=1)[-1]
        if not content.strip() or not JOINT.fullmatch(between):
            break
        found.insert(0, content.strip())
    if all(same_math(clean_latex(found[0]), clean_latex(other)) for other in found[1:]):
        found = found[-1:]  # one answer in two forms
    return ", ".join(found) or None


READERS = {"number": read_number, "yesno": read_yesno, "choice": read_choice}


def grade(task, prediction, answer):
    """True if a prediction means the same as the answer; None (unparsed) is wrong."""
    if prediction is None:
        return False
    kind, prediction, answer = TASKS[task], prediction.strip(), answer.strip()
    if kind == "math":
        return len(prediction) < 500 and same_math(clean_latex(prediction), clean_latex(answer))
    if kind != "number":
        return prediction.strip("() .").lower() == answer.strip("() .").lower()
    a, b = number_in(prediction), number_in(answer)
    if a is None or b is None:
        return False
    # a program's 137.99999999999997 is 138, but 1000001 isn't 1000000
    a, b = Fraction(a), Fraction(b)
    return a == b or (a.denominator > 1 and abs(a - b) <= abs(b) / 10**6)


# ---------------------------------------------------------------- mathematical equality
# Two formulas are equal if their values agree to 80 digits wherever we put their variables. That
# needs neither eval() nor a simplifier, and its time is bounded by the length of the text: nothing
# can hang, in whatever thread.
FUNCTIONS = {"sin": "sin", "cos": "cos", "tan": "tan", "sec": "sec", "csc": "csc", "cot": "cot",
             "arcsin": "asin", "arccos": "acos", "arctan": "atan", "exp": "exp", "ln": "ln",
             "log": "log10"}
GREEK = ("alpha", "beta", "gamma", "delta", "epsilon", "theta", "lambda", "mu", "nu", "rho",
         "sigma", "tau", "phi", "varphi", "psi", "omega", "infty")
UNICODE = str.maketrans({"−": "-", "–": "-", "×": "*", "·": "*", "÷": "/", "°": "",
                         "≤": "<=", "≥": ">=", "≠": "!=", "√": r"\sqrt", "π": r"\pi ",
                         "∞": r"\infty "})
COMMANDS = {"cdot": "*", "times": "*", "div": "/", "cup": "∪", "approx": "≈", "lt": "<",
            "gt": ">", "le": "<=", "leq": "<=", "leqslant": "<=", "ge": ">=", "geq": ">=",
            "geqslant": ">=", "ne": "!=", "neq": "!=", "dfrac": r"\frac", "tfrac": r"\frac",
            "cfrac": r"\frac"}
COMMAND = re.compile(rf"\\({'|'.join(COMMANDS)})(?![a-z])")
REWRITES = [(re.compile(pattern), new) for pattern, new in (
    # layout, currency and degrees
    (r",\s*\\!\s*|\{,\}", ""),  # 11,\!111 and 11{,}111
    (r"\\(?:left|right|[bB]igg?[lr]?|displaystyle|q?quad|allowbreak)(?![A-Za-z])|\\[!,;: ]|~", " "),
    (r"\\?[$%]|\^\s*\{?\s*\\circ\s*\}?|\^?\\degree|\\[()\[\]]", ""),
    (r"[(\[]?\s*\\begin\{array\}\s*(?:\{[^{}]*\})?", r"\\begin{matrix}"),
    (r"\\end\{array\}\s*[)\]]?", r"\\end{matrix}"),
    # one spelling of powers, commands, names and lists: \mathrm{e}, x_{1}, sqrt(2)
    (r"\*\s*\*", "^"), (r"_\{\s*(?:\\text\s*\{\s*(\w+)\s*\}|(\w+))\s*\}", r"_\1\2"),
    (r"\\(?:math(?:rm|bf|it)|operatorname|boldsymbol)\s*\{(\w)\}", r"\1"),
    (r"\\operatorname\s*\{(\w+)\}", r"\\\1"),
    (rf"(?<![\\A-Za-z])({'|'.join(FUNCTIONS)}|sqrt|pi|infty)(?![A-Za-z])", r"\\\1"),
    (r"([<>]=?[^<>,;]{1,40}?)(?:\\(?:text|mbox)\s*\{\s*,?\s*or\s*\}|,?\sor\s)", r"\1∪"),
    (r"\\(?:text|mbox)\s*\{\s*,?\s*(?:and|or)\s*\}|,?\s(?:and|or)\s", ","), (r",\s*,", ","),
    # mixed numbers: 3\frac12, 3\frac{1}{2} and 3 1/2; the set that x is in; {1,2} in plain braces
    (r"\\frac\s*(\d)\s*(\d)", r"\\frac{\1}{\2}"), (r"\\frac\s*(\d)\s*\{", r"\\frac{\1}{"),
    (r"(?<![\w.^}])(\d+) *\\frac *\{(\d+)\} *\{(\d+)\}", r"(\1+\2/\3)"),
    (r"(?<![\w.^}])(\d+) +(\d+) ?/ ?(\d+)(?![\d.])", r"(\1+\2/\3)"),
    (r"^\s*[A-Za-z]\s*\\in(?![a-z])", ""), (r"^\s*\{([^{}]*)\}\s*$", r"\1"))]
# words in a formula (but "a.m." and "p.m." are part of an answer), and plain units after it
TEXT = re.compile(r"\\(?:text(?:bf|it|rm|normal)?|[mh]box|emph|mathrm|mathbf|bold)\s*"
                  r"\{(?!\s*[ap]\.?m\b)([^{}]*)\}(?:\^\{?\d\}?)?")
UNITS = re.compile(r"(?<=\S)(?:\s+(?:[a-z]{4,}|cm|mm|km|kg|ft|mph|sq|per)\b\.?)+"
                   r"(?:\^\{?\d\}?)?\s*$")
# But not the words that change a value, nor those between two numbers: they stay, as letters.
VALUED = re.compile(r"(?i)\b(?:hundred|thousand|million|billion|trillion|dozen|not|negative|minus"
                    r"|than|more|less|fewer|at (?:least|most))\b|\d\s*" + TEXT.pattern + r"\s*\d")
_SYMBOL = rf"(?:[A-Za-z]'?(?:_\w+)?'?|\\(?:{'|'.join(GREEK)})(?:_\w+)?)"
SYMBOL = re.compile(_SYMBOL)
# What may stand before "=" without being a part of the answer: x, f(x), (a, b), AB, \angle ABC.
NAME = re.compile(rf"(?:{_SYMBOL}(?:\^\{{?-1\}}?)?(?:\([^()=]{{1,20}}\))?"
                  rf"|\(\s*{_SYMBOL}(?:\s*,\s*{_SYMBOL})+\s*\)|\|?[A-Z]{{2,3}}\|?"
                  r"|m?\s*\\(?:angle|overline)\s*\{?[A-Z]+\}?)")


def clean_latex(s):
    """LaTeX or plain mathematics without layout, currency, units, thousands separators and an
    approximation after the exact value."""
    s = s.translate(UNICODE).replace(r"\\", "\n")  # which ends the row of a matrix
    s = COMMAND.sub(lambda m: COMMANDS[m[1]], s)
    for pattern, new in REWRITES:
        s = pattern.sub(new, s)
    exact, approximately, rest = s.partition("≈")
    if approximately:
        s = exact if re.search(r"\d|\\pi", exact) else f"{exact}={rest}".strip(" =")
    if VALUED.search(s):
        s = TEXT.sub(r"\1", s)
    else:
        bare = TEXT.sub(" ", s)
        s = UNITS.sub("", bare if re.search(r"\w", bare) else TEXT.sub(r"\1", s))
    s = s.strip().rstrip(".").strip()
    if s[:1] in ("(", "[", "\\"):  # (1,000) is a pair
        return s
    return re.sub(r"(?<![\d.,])\d{1,3}(?:,\d{3})+(?![\d,])", lambda m: m[0].replace(",", ""), s)


def depths(s):
    return list(itertools.accumulate((c in "([{") - (c in ")]}") for c in s))


def split_top(s, separators):
    """Split at the separators outside of all brackets."""
    cuts = [i for i, (c, depth) in enumerate(zip(s, depths(s))) if c in separators and depth == 0]
    return [s[i + 1:j].strip() for i, j in zip([-1] + cuts, cuts + [len(s)])]


def structure(s):
    """(kind, parts) of a formula: a matrix, a union, a set or list, a tuple or interval, or the
    formula alone."""
    if m := re.fullmatch(r"(?s)\\begin\{([pb]?)matrix\}(.*)\\end\{\1matrix\}", s):
        rows = m[2].strip().split("\n")
        return f"matrix of {len(rows)} rows", [c.strip() for row in rows for c in row.split("&")]
    for kind, separators in (("union", "∪"), ("set", ",;")):
        if len(parts := split_top(s, separators)) > 1:
            return kind, [q for p in parts for q in (structure(p)[1] if "\\pm" in p else [p])]
    m = re.fullmatch(r"(?s)(\\\{|[(\[])(.*?)(\\\}|[)\]])", s)
    if m and 0 not in depths(s)[len(m[1]) - 1:-1]:
        kind, parts = structure(m[2].strip())
        ordered = kind == "set" and m[1] != "\\{" and len(split_top(m[2], ",;")) > 1
        return m[1] + m[3] if ordered else kind, parts
    if "\\pm" in s:
        return "set", [s.replace("\\pm", "+"), s.replace("\\pm", "-")]
    return "formula", [s]


def named(s):
    """(name, value) of "x = 5" or "f(x) = ... = 2x"; (None, s) of anything else."""
    name, equals, rest = s.partition("=")
    parts = split_top(rest, ",;")
    if not equals or not NAME.fullmatch(name.strip()) or any("=" in part for part in parts[1:]):
        return None, s
    return "".join(name.split()), rest.rsplit("=", 1)[1].strip() if "=" in rest else rest.strip()


def interval(s):
    """(variable, interval) of an inequality such as x > 3 or 3 < x <= 5; (None, s) of others."""
    parts = [part.strip() for part in re.split(r"([<>]=?)", s)]
    if len(parts) in (3, 5) and parts[1][0] == ">":  # from the smallest to the largest
        parts = [part.replace(">", "<") for part in reversed(parts)]
    if len(parts) == 3:
        rising = SYMBOL.fullmatch(parts[0])  # x < 3, else 3 < x
        parts = ["-\\infty", "<", *parts] if rising else [*parts, "<", "\\infty"]
    if len(parts) != 5 or not parts[1][0] == parts[3][0] == "<" or not SYMBOL.fullmatch(parts[2]):
        return None, s
    low, first, name, second, high = parts
    return name, f"{'[' if '=' in first else '('}{low},{high}{']' if '=' in second else ')'}"


def same_math(a, b):
    """Whether two cleaned formulas are equal: sets and lists in any order, tuples, intervals and
    matrices part by part; a name before "=" and an inequality's variable may lack in one."""
    x, y = (re.sub(r"\\text|\s|\.(?!\d)", "", s) for s in (a, b))
    word = "\\" not in x and re.search("[A-Za-z]{2}|^[A-Za-z]$", x)
    if x == y or (x.lower() == y.lower() and word):
        return x != ""
    for read in (named, interval):
        (name, value), (name_b, value_b) = read(a), read(b)
        alike = (name or name_b) and (name is None or name_b is None or name == name_b)
        if alike and same_math(value, value_b):
            return True
    (kind, parts), (kind_b, parts_b) = structure(a), structure(b)
    if kind != kind_b or len(parts) != len(parts_b):
        return False
    if kind == "formula":
        return same_formula(parts[0], parts_b[0])
    for part in parts:
        candidates = parts_b if kind in ("set", "union") else parts_b[:1]
        twin = next((other for other in candidates if same_math(part, other)), None)
        if twin is None:
            return False
        parts_b.remove(twin)
    return True


def same_formula(a, b):
    """Whether two LaTeX formulas have the same values; equations up to a factor."""
    if not a.count("=") == b.count("=") == 1:
        x, y = values(a), values(b)
        return bool(x and y) and all(close(p, q) for p, q in zip(x, y))
    if gives_a_number(a) or gives_a_number(b):  # x = 5 and 2x = 10 are not the same answer
        return False
    x, y = (values("({})-({})".format(*s.split("="))) for s in (a, b))
    return bool(x and y) and all(p and q and close(p * y[0], q * x[0]) for p, q in zip(x, y))


def gives_a_number(equation):
    """Whether it is a name = a value without variables."""
    name, value = named(equation)
    at_points = values(value) if name else None
    return bool(at_points) and at_points[0] == at_points[1]


def close(x, y):
    size, gap = max(abs(x), abs(y)), abs(x - y) * 10**80
    return gap <= size or (min(abs(x), abs(y)) == 0 and gap < 1)


@lru_cache(maxsize=4096)
def values(formula):
    """The values of a formula with its variables at three arbitrary points (100 digits), None if it
    can't be read."""
    from mpmath import MPContext

    mp = MPContext()  # our own: the precision of mpmath.mp is global, threads would share it
    mp.dps = 100
    try:
        return tuple(evaluate_formula(mp, formula, point) for point in range(3))
    except (ValueError, ArithmeticError, IndexError, RecursionError, TypeError):
        return None


def evaluate_formula(mp, formula, point):
    """Recursive descent over LaTeX; raises ValueError or IndexError where it can't read on."""
    tokens = re.findall(r"\d+\.?\d*|\.\d+|\\[A-Za-z]+|[A-Za-z](?:_\w)?|\S", formula)
    tokens.reverse()  # a stack

    def take(*expected):
        return tokens.pop() if tokens and tokens[-1] in expected else None

    def bounded(x):  # nobody computes 9^(9^9)
        if not abs(x) <= 10**4:
            raise ValueError("too large")
        return x

    def power(x):
        return mp.power(x, bounded(power(-atom() if take("-") else atom()))) if take("^") else x

    def atom():
        token = tokens.pop()
        if token[-1].isdigit() and token[0] in ".0123456789":
            return mp.mpf(token)
        if token in "([{":
            x = total()
            if not take(")", "]", "}"):
                raise ValueError("not closed")
            return x
        if token == "\\frac":
            return atom() / atom()
        if token == "\\sqrt":
            n = atom() if tokens[-1] == "[" else 2
            return mp.power(atom(), 1 / mp.mpf(n))
        if token[1:] in FUNCTIONS:
            n = bounded(atom()) if take("^") else 1
            x = getattr(mp, FUNCTIONS[token[1:]])(bounded(product(of_function=True)))
            return mp.power(x, n)
        if token in ("e", "i", "\\pi"):
            return {"e": mp.e, "i": mp.j, "\\pi": mp.pi}[token] * 1
        if not token[0].isalpha() and token[1:] not in GREEK:
            raise ValueError(f"unexpected {token}")
        # a variable; > 0, where sqrt(1/n) is 1/sqrt(n)
        return mp.mpf(zlib.crc32(f"{token} {point}".encode())) / 2**32 + 0.5

    def factor():
        x = power(atom())
        while take("!"):
            x = power(mp.factorial(bounded(x)))
        if x and not abs(mp.mag(x)) < 10**5:  # bits: longer sums and logarithms take seconds
            raise ValueError("too large")
        return x

    def product(of_function=False):
        # signs may lack, as in 2x(x+1); a function's argument ends early: sin 2x cos x
        bracket = of_function and tokens[-1] == "("
        take("+")
        x = -factor() if take("-") else atom() if bracket else factor()
        while tokens and not bracket:
            sign = None if of_function else take("*", "/")
            follows = tokens[-1][0].isalpha() or tokens[-1][1:] in ("frac", "sqrt", "pi", *GREEK)
            opens = tokens[-1] in "([{" or tokens[-1][1:] in FUNCTIONS
            if not sign and not follows and (of_function or not opens):
                break
            y = -factor() if sign and take("-") else factor()
            x = x / y if sign == "/" else x * y
        return x

    def total():
        x = product()
        while sign := take("+", "-"):
            x = x + product() if sign == "+" else x - product()
        return x

    x = total()
    if tokens or not mp.isfinite(x):
        raise ValueError("not a formula to its end")
    return x


# ---------------------------------------------------------------- students: load, merge adapters
def load_student(name, device="cpu", dtype=None, **more):
    """(model, tokenizer) of a Hugging Face causal LM, or of a LoRA adapter in PEFT's format
    (merged), by folder or name on the hub. dtype: of the weights (None: float32); `more` goes to
    from_pretrained. Code that comes with a model is never run. Stops with one sentence at what is
    no such model, lacks weights, is saved quantised, or is an adapter without its base."""
    base, revision, adapter = name, "main", None
    try:
        if file := file_of(name, "adapter_config.json"):
            with open(file, encoding="utf-8") as f:
                adapter = json.load(f)
            base, revision = adapter["base_model_name_or_path"], adapter.get("revision") or "main"
            if not file_of(base, "config.json", revision):
                stop(f"{name}: the base of this adapter, {base}, is not there; if it has moved, "
                     "write its place into adapter_config.json")
        config = AutoConfig.from_pretrained(base, revision=revision, trust_remote_code=False)
        if getattr(config, "quantization_config", None):
            stop(f"{name}: the weights of {base} are saved quantised, where LoRA can't be merged: "
                 "take the model that was quantised")
        own = file_of(name, "tokenizer_config.json")
        tokenizer = AutoTokenizer.from_pretrained(
            name if own else base, revision="main" if own else revision, trust_remote_code=False)
        model, report = AutoModelForCausalLM.from_pretrained(
            base, revision=revision, dtype=dtype or torch.float32, use_safetensors=True,
            trust_remote_code=False, output_loading_info=True, **more)
        if wrong := sorted({*report["missing_keys"], *report["unexpected_keys"]}):
            stop(f"{name}: {len(wrong)} weights are missing or left over, as {wrong[0]}")
        if adapter:
            merge_adapter(model, adapter, load_file(file_of(name, "adapter_model.safetensors")))
    except Exception as e:  # noqa: BLE001 (whatever libraries raise at a folder that is no model)
        stop(f"{name}: can't be loaded as a causal language model ({in_a_line(e)})")
    for module in model.modules():
        module.support_avx512bf16_for_cpu = False  # bitsandbytes would repack weights for good
    return model.to(device).eval(), tokenizer


def file_of(name, file, revision=None):
    """Path of a file of a model, in its folder or from the hub; None where there is none."""
    try:
        return cached_file(name, file, revision=revision, _raise_exceptions_for_gated_repo=False,
                           _raise_exceptions_for_missing_entries=False,
                           _raise_exceptions_for_connection_errors=False)
    except (OSError, ValueError):  # no name of a repository
        return None


def merge_adapter(model, config, weights):
    """W += scale B A for every pair in an adapter's weights; ValueError at more than plain LoRA.
    (Initial weights such as pissa's change those of the base.)"""
    pairs = defaultdict(dict)  # name of a module -> {"A": (rank, in), "B": (out, rank)}
    for key, weight in weights.items():
        m = re.fullmatch(r"base_model\.model\.(.+)\.lora_([AB])\.weight", key)
        plain_lora = config.get("init_lora_weights", True) in (True, False, None, "gaussian")
        if not m or not plain_lora or config.get("alpha_pattern"):
            raise ValueError(f"only plain LoRA can be merged, see {key} and adapter_config.json")
        pairs[m[1]][m[2]] = weight.float()
    for name, pair in pairs.items():
        rank = len(pair["A"])
        scale = config["lora_alpha"] / (rank ** 0.5 if config.get("use_rslora") else rank)
        delta = scale * (pair["B"] @ pair["A"])
        weight = model.get_submodule(name).weight
        weight.data += (delta.T if config.get("fan_in_fan_out") else delta).to(weight)


def logit_factor(config):
    """What a family multiplies its logits with (Cohere, Falcon-H1; Granite and MiniCPM3 divide)."""
    config = config.get_text_config()
    factor = 1.0
    for key in ("logit_scale", "lm_head_multiplier", "output_multiplier"):
        factor *= getattr(config, key, None) or 1.0
    scaling = getattr(config, "logits_scaling", None) or 1.0
    return factor * scaling if config.model_type.startswith("hyperclovax") else factor / scaling


def context_of(model):
    """How many tokens a model can read; infinity where its config names no limit."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None) or math.inf


# ---------------------------------------------------------------- generation: answers to prompts
def generate(model, tokenizer, prompts, max_new_tokens, batch_size=None, temperature=0.0,
             until=None, desc=None):
    """One response to each prompt (a list of token ids), in their order: {"text", "ids": its
    tokens, "tokens": their number, "stopped": it ended by itself}. Greedy at temperature 0.

    It ends with an end token (which counts, but is not in the text), after max_new_tokens, at the
    end of the model's context, or with the first match of `until`, a pattern for each prompt.
    batch_size prompts are answered together (None: see rows_at_once).
    """
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    longest, context = max(map(len, prompts), default=0), context_of(model)
    if longest >= context:
        stop(f"a prompt of {longest} tokens leaves no room in the model's context of {context}")
    eos = model.generation_config.eos_token_id
    ends = [end_token(tokenizer), tokenizer.eos_token_id]
    ends += eos if isinstance(eos, list) else [eos]
    ends = [token for token in ends if token is not None]
    sampling = {"temperature": temperature, "top_k": 0} if temperature else {}
    results = [None] * len(prompts)
    with answering(model), tqdm(total=len(order), desc=desc, disable=not desc, leave=False) as bar:
        size = batch_size or rows_at_once(model, longest + max_new_tokens)
        for start in range(0, len(order), size):
            batch = order[start:start + size]
            ids = [torch.tensor(prompts[i], device=model.device) for i in batch]
            left = {"batch_first": True, "padding_side": "left"}
            mask = pad_sequence([torch.ones_like(own) for own in ids], **left)
            ids = pad_sequence(ids, padding_value=ends[0], **left)  # (batch, width)
            width = ids.shape[1]
            said = AnswerSaid(tokenizer, ends, width, until and [until[i] for i in batch])
            ids = model.generate(
                ids, attention_mask=mask, max_new_tokens=min(max_new_tokens, context + 1 - width),
                do_sample=temperature > 0, **sampling, eos_token_id=ends, pad_token_id=ends[0],
                stopping_criteria=[said] if until else [])
            for j, (i, tokens) in enumerate(zip(batch, ids[:, width:].tolist())):
                tokens = tokens[:said.length.get(j)]
                results[i] = response(tokenizer, tokens, ends, until and until[i])
            bar.update(len(batch))
    return results


class AnswerSaid(StoppingCriteria):
    """Ends the responses of a batch in which their patterns match; looks every 16 tokens."""

    def __init__(self, tokenizer, ends, width, until):
        self.tokenizer, self.ends, self.width, self.until = tokenizer, ends, width, until
        self.length = {}  # place in the batch of a response that was ended -> its tokens

    def __call__(self, ids, scores, **kwargs):
        new = ids.shape[1] - self.width
        if new % 16 == 0:
            for j, tokens in enumerate(ids[:, self.width:].tolist()):
                is_open = j not in self.length and not {*self.ends} & {*tokens}
                if is_open and read(self.tokenizer, tokens, self.until[j])[1]:
                    self.length[j] = new
        return torch.tensor([j in self.length for j in range(len(ids))], device=ids.device)


def read(tokenizer, tokens, pattern):
    """The text of tokens, and the first match of a pattern outside its thoughts, or None."""
    text = tokenizer.decode(tokens, skip_special_tokens=True)
    thought = len(text) - len(after_thought(text))  # what is said in it is no answer yet
    return text, pattern and pattern.search(text, thought)


def response(tokenizer, tokens, ends, pattern):
    """What generate returns, from new tokens; what follows an end token is padding."""
    n = next((n for n, token in enumerate(tokens, 1) if token in ends), len(tokens))
    stopped = tokens[n - 1] in ends
    text, said = read(tokenizer, tokens[:n - stopped], pattern)
    if said and said.end() < len(text):  # what follows the answer does not count
        text = text[:said.end()]
        n = next(n for n in range(1, n + 1) if read(tokenizer, tokens[:n], pattern)[1])
    return {"text": text, "ids": tokens[:n], "tokens": n, "stopped": stopped}


def rows_at_once(model, length):
    """How many responses of so many tokens, prompts included, are written together: as many, from 8
    to 256, as have their keys and values in 2 GB of a CPU's memory, or in a quarter of what a GPU
    has free. More are faster: the weights are read once for all of them."""
    config = model.config.get_text_config()
    heads = getattr(config, "num_attention_heads", None) or 1
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    heads = getattr(config, "num_key_value_heads", None) or heads
    row = 2 * config.num_hidden_layers * heads * width * length * model.dtype.itemsize  # bytes
    is_gpu = model.device.type == "cuda"
    room = torch.cuda.mem_get_info(model.device)[0] / 4 if is_gpu else 2e9
    return int(min(256, max(8, room // row)))


# ---------------------------------------------------------------- weights while answers are written
def usable_device(name):
    """The device that --device names, or the default; stop() where this machine has none such."""
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as e:
        stop(f"--device {name} can't be used ({in_a_line(e)})")
    return name


def has_bfloat16(device="cpu"):
    """Whether the device multiplies bfloat16 itself; emulated it is a hundred times slower."""
    if torch.device(device).type == "cpu":
        known = torch.cpu.get_capabilities()
        return bool(known.get("avx512_bf16") or known.get("amx_bf16"))
    return torch.device(device).type == "cuda" and torch.cuda.is_bf16_supported(False)


@contextlib.contextmanager
def answering(model):
    """Inside, distill.LoRA is merged, weights are bfloat16 where has_bfloat16 and the model is no
    toy, and generate has the library's settings; afterwards all is as before, bit for bit."""
    was_training, settings = model.training, model.generation_config
    model.eval().generation_config = GenerationConfig()  # some models' own penalise repetitions
    weights = [*model.parameters()]
    lora = [m for m in model.modules() if hasattr(m, "base") and hasattr(m, "A")]
    is_large = sum(weight.numel() for weight in weights) > 10**7
    dtype = torch.bfloat16 if is_large and has_bfloat16(model.device) else model.dtype
    is_plain = all(weight.is_floating_point() for weight in weights)  # not quantised
    if not is_plain or (dtype == model.dtype and not lora):
        weights, lora = [], []  # nothing is cast or merged
    kept = [weight.data.cpu() for weight in weights]  # a GPU might have no room for both
    try:
        for module in lora:
            delta = module.alpha / module.rank * (module.B.float() @ module.A.float())
            is_linear = isinstance(module.base, torch.nn.Linear)  # GPT-2's Conv1D keeps (in, out)
            weight = module.base.weight
            weight.data = weight.data.float() + (delta if is_linear else delta.T)
            module.forward = module.base.__call__
        for weight in weights:
            weight.data = weight.data.to(dtype)
        with torch.no_grad(), torch.autocast(model.device.type, enabled=False):
            yield
    finally:
        for weight, data in zip(weights, kept):
            weight.data = data.to(weight.device)
        for module in lora:
            vars(module).pop("forward", None)
        model.train(was_training).generation_config = settings


# ---------------------------------------------------------------- evaluation: accuracy and ensemble
def evaluate(students, rows, max_new_tokens, batch_size=None):
    """Students [(model, tokenizer), ...] on rows, in shares of 1, from greedy answers.

    -> {"questions": their number without those that exceed a context, "accuracy", "unparsed",
    "stopped": a share per student, "ensemble": accuracy of the answer that its student finds
    likeliest, "upper_bound": share of questions with any right response, "predictions": per
    question {"id", "question", "answer", "ensemble", "ensemble_correct", "responses": per student
    what generate returns, without "ids", "prediction", "correct" and, where needed, "logprob"}}.
    """
    asked, prompts = [], []  # prompts: [question][student]
    for row in rows:
        ids = [encode_prompt(tokenizer, student_prompt(row)) for _, tokenizer in students]
        if all(len(own) < context_of(model) for own, (model, _) in zip(ids, students)):
            asked.append(row)
            prompts.append(ids)
    if len(asked) < len(rows):
        tqdm.write(f"{len(rows) - len(asked)} of {len(rows)} questions are left out: they are "
                   "longer than a student's context")
    until = [ASKED[TASKS[row["task"]]] for row in asked]
    responses = []  # [student][question]
    for s, (model, tokenizer) in enumerate(students):
        responses.append(generate(model, tokenizer, [ids[s] for ids in prompts], max_new_tokens,
                                  batch_size, until=until, desc=f"student {s} answers"))
        for row, r in zip(asked, responses[s]):
            r["prediction"] = extract_answer(row["task"], r["text"], row.get("choices"))
            r["correct"] = grade(row["task"], r["prediction"], row["answer"])
    answers = [*zip(*responses)]  # [question][student]
    disputed = [i for i, given in enumerate(answers)
                if len({r["prediction"] for r in given} - {None}) > 1]
    for s, (model, _) in enumerate(students):
        add_logprobs(model, [prompts[i][s] for i in disputed], [answers[i][s] for i in disputed])
    predictions = []
    for row, given in zip(asked, answers):
        parsed = [r for r in given if r["prediction"] is not None]
        surest = max(parsed, key=lambda r: r.get("logprob", 0), default=given[0])
        predictions.append({"id": row["id"], "question": row["question"], "answer": row["answer"],
                            "ensemble": surest["prediction"],
                            "ensemble_correct": surest["correct"],
                            "responses": given})
        for r in given:
            del r["ids"]

    def share(flags):
        return sum(flags) / max(len(flags), 1)

    return {"questions": len(asked),
            "accuracy": [share([r["correct"] for r in own]) for own in responses],
            "unparsed": [share([r["prediction"] is None for r in own]) for own in responses],
            "stopped": [share([r["stopped"] for r in own]) for own in responses],
            "ensemble": share([p["ensemble_correct"] for p in predictions]),
            "upper_bound": share([any(r["correct"] for r in given) for given in answers]),
            "predictions": predictions}


def add_logprobs(model, prompts, responses):
    """Give each response "logprob", the mean log-probability of its tokens after its prompt."""
    size = max(1, 2**20 // model.config.get_text_config().vocab_size)  # logits are large
    with answering(model):
        for start in range(0, len(prompts), size):
            batch = [*zip(prompts[start:start + size], responses[start:start + size])]
            ids = [torch.tensor(prompt + r["ids"]) for prompt, r in batch]
            ids = pad_sequence(ids, batch_first=True).to(model.device)  # (batch, T)
            logits = model(ids).logits[:, :-1].float()  # (batch, T - 1, V)
            nats = cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
            for (prompt, r), own in zip(batch, nats):
                r["logprob"] = -own[len(prompt) - 1:][:len(r["ids"])].mean().item()


# ---------------------------------------------------------------- pictures of run folders (--plot)
PANELS = {"loss/": "loss (nats per response token)", "accuracy/": "right answers (share)",
          "rate/": "paths selected (share)"}


def plot(folder):
    """Draw training.png into a run folder of distill.py, from its log.jsonl."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        stop("--plot needs matplotlib: pip install matplotlib")
    log = read_jsonl(os.path.join(folder, "log.jsonl"))
    names = sorted({name for line in log for name in line})
    panels = [start for start in PANELS if any(name.startswith(start) for name in names)]
    if not panels:
        stop(f"{folder}/log.jsonl: no step of distill.py in it yet")
    figure = Figure((5 * len(panels), 3.6), layout="constrained")
    figure.suptitle(os.path.basename(os.path.abspath(folder)), parse_math=False)
    for ax, start in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels):
        lines = [name for name in names if name.startswith(start)]
        for name, look in zip(lines, itertools.cycle(["-", "--", ":", "-."])):
            points = np.array([(line["step"], line[name]) for line in log if name in line])
            width = 1 + len(points) // 10  # a running mean over a tenth of the points
            steps, values = (np.convolve(x, np.full(width, 1 / width), "valid") for x in points.T)
            ax.plot(steps, values, look, label=f"student {name.removeprefix(start)}")
        ax.set(xlabel="optimiser step", ylabel=PANELS[start])
        ax.legend(frameon=False)
    file = os.path.join(folder, "training.png")
    figure.savefig(file, dpi=150)
    print(file)


# ---------------------------------------------------------------- the command
def parse_args():
    p = argparse.ArgumentParser(description="Evaluate saved students on a file of questions "
                                            "(--students --questions), or draw runs (--plot).")
    p.error = stop  # one sentence and exit code 2
    p.add_argument("--students", nargs="+", metavar="NAME",
                   help="models or PEFT LoRA adapters, by folder or name")
    p.add_argument("--questions", metavar="FILE",
                   help="a dataset's own file, a pool, or rows with id, task, question, answer")
    p.add_argument("--task", choices=TASKS, help="overrides the task that the file names")
    p.add_argument("--limit", type=within(int, 1), help="use only the first questions (all)")
    p.add_argument("--plot", nargs="+", metavar="RUN_DIR",
                   help="draw runs of distill.py instead: training.png in each folder")
    p.add_argument("--max_new_tokens", type=within(int, 1), default=512,
                   help="longest response in tokens (512)")
    p.add_argument("--batch_size", type=within(int, 1),
                   help="responses written at a time (up to 256, as memory allows)")
    p.add_argument("--device", help="cpu, cuda, cuda:1, mps ... (cuda where there is one)")
    p.add_argument("--out", metavar="FILE", help="write the results and every response as JSON")
    args = p.parse_args()
    if not args.plot and not (args.students and args.questions):
        stop("pass --students and --questions to test students, or --plot RUN_DIR to draw runs")
    return args


def main():
    args = parse_args()
    if args.plot:
        for folder in args.plot:
            plot(folder)
        return
    rows = read_questions(args.questions, args.task)[:args.limit]
    if args.out and os.path.exists(args.out) and os.path.samefile(args.out, args.questions):
        stop(f"--out {args.out} would overwrite the questions: choose another place")
    if args.out:
        open(args.out, "a").close()  # raises now, and not after the answers
    device = usable_device(args.device)
    half = device.startswith("cuda") and has_bfloat16(device)
    dtype = torch.bfloat16 if half else torch.float32
    students = [load_student(name, device, dtype) for name in args.students]
    results = evaluate(students, rows, args.max_new_tokens, args.batch_size)
    for p in results["predictions"][:3]:
        for name, r in zip(args.students, p["responses"]):
            print(f"--- {p['id']}, {name}: {r['prediction']} (right: {p['answer']})")
            print(r["text"].strip())
    print_table(args.students, results)
    if args.out:
        with open(args.out, "w", encoding="utf-8") as file:
            json.dump({"args": vars(args), **results}, file, indent=1)


def print_table(names, results):
    """Print shares per student, ensemble and upper bound; s.e. is the accuracy's standard error."""
    n, width = results["questions"], max(map(len, (*names, "upper bound (any right)")))
    print(f"\n{f'{n} questions':{width}} accuracy (s.e.) unparsed  stopped")
    lines = [*zip(names, results["accuracy"], results["unparsed"], results["stopped"]),
             ("ensemble", results["ensemble"]), ("upper bound (any right)", results["upper_bound"])]
    for name, accuracy, *more in lines:
        error = math.sqrt(accuracy * (1 - accuracy) / max(n, 1))  # binomial
        shares = "".join(f"{share:9.1%}" for share in more)
        print(f"{name:{width}} {accuracy:8.1%} {error:6.1%}{shares}")


if __name__ == "__main__":
    main()
