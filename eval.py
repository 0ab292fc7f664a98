"""Tasks and evaluation: rows, the student's prompt, answers, grading, generation, pictures.

    python eval.py --students out/student_0 out/student_1 --questions test.jsonl
    python eval.py --plot out/run_a out/run_b

A row is a flat dict {"id", "task", "question", "answer"} and, where there are any, "choices"
{"A": text, ...}, "level" and "prompt" (which overrides the student prompt).
"""
import argparse
import ast
import contextlib
import itertools
import json
import math
import operator
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

from mpmath import MPContext

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


# ---------------------------------------------------------------- answers: what a text says
# Thoughts are cut off. What the text announces last counts (a box, ####, "the answer is",
# "Answer:"), and it must be one value. A number, and only a number, may be read from the end of a
# text that announces nothing. All else is unparsed: rather lose an answer than take a wrong one.
LONGEST = 5000  # characters, from a text's end; so no pattern takes more than milliseconds
# The marks of thoughts in the families' outputs; a decoder may leave <|channel|> and the like out.
THOUGHT = re.compile(r"""(?ix)
    (?P<closes> </(?:\w+:)?(?:think|thinking|thoughts?|reasoning)> | \[/think\] | ◁/think▷
      | <\|end_(?:thinking|of_thought)\|> | <\|channel\|>final(?:<\|message\|>)? | assistantfinal )
    | <(?:\w+:)?(?:think|thinking|thoughts?|reasoning)> | \[think\] | ◁think▷
    | <\|(?:start_thinking|begin_of_thought|channel)\|> | \A(?-i:analysis(?=[A-Z]))""")
# Answer: 5, {"answer": 5}, <answer>5 and "the answer (in eggs) is 5", but neither "the answer is
# correct" nor "the other answers are wrong".
ANNOUNCED = re.compile(r"""(?ix) \#{4} | (?P<box>\\(?:boxed|fbox)\b)
    | (?<!/)(?<!other\ )\b(?:answers?|(?:correct|right|best)\ (?:option|choice))\b
      (?: ["'`]?\s?[:=>] | \s*\n
        | [^.:=?!\n]{0,80}? (?:\b(?:is|are|was|were|be|equals?)\b | n['’]t\b) (?!\ correct) )""")
CLAUSE_END = re.compile(r"[.,:;!?\n]|\b(?:so|thus|therefore|hence)\b")
SENTENCE_END = re.compile(r"[!\n]|</|\.(?!\s?\d)(?=\s|$)")  # not that of "4 hrs. 30 min"
# Such a clause announces nothing: it is denied, asked, or supposed ("If the answer is 4, then").
DENIED = re.compile(r"(?i)\?|n['’]t\b|\b(?:not|never|neither|nor|cannot|wrong|false|incorrect"
                    r"|unlikely|least likely|if|suppose|assum\w+|whether|unless|might|either)\b")
# What may stand between an announcement and its value.
LEAD = re.compile(r"""(?ix) (?: [\s:*"'`“>] | -\ | \.\s | \b(?: (?!hardly|unlikely|nearly)\w+ly
    | most | about | therefore | thus | hence | indeed | it['’]s | it\ is | is | option )\b )*""")
# -1234.5, .5 or 3/4, but neither 2nd nor a part of x2 or 1.2.3
NUMBER = re.compile(r"""(?x) (?<![\w.,/^]) (?:(?<![)}%])-)?
    (?:\d{1,30} (?:\ ?/\ ?[1-9]\d{0,29} | \.\d{1,30})? | \.\d{1,30})
    (?! \d | \.\d | \ ?/\ ?\d | st\b | nd\b | rd\b | th\b)""")
# Beside a number it says that this is not the whole value: 5 million, 3 quarters, 5 or more, 2π.
UNREAD = re.compile(r"""(?ix) \b(?: (?:hundred|thousand|[mbtr]+illion|dozen|third|quarter|fourth
      |fifth|sixth|eighth|tenth)s? | hal(?:f|ves) | squared | cubed | plus | minus | negative
    | times | than | or | and | multiplied | divided | added | equals )\b
    | \d(?:[KMB]\b|e[-+]?\d|[:,]\d) | [²³½⅓⅔¼¾√π^×÷+*|(] | [-/]\s
    | \\(?:sqrt|frac|pi|times|cdot|div)""")
# A box beside it holds a part of an answer: -\boxed{3}, 2\boxed{3}, \frac{1}{\boxed{3}},
# \boxed{2} and \boxed{3}, \boxed{3}^2, \boxed{3} million.
BEFORE_PART = re.compile(r"""(?x) (?: (?<![-\w})])[-−–] | [$=(\[]\ ?[-−–]\ | \d(?:\ ?[*/]\ ?)? | \^
    | \\(?:sqrt|cdot|times|div|pm)\ ? )\{?\Z | \\[dtc]?frac(?:\{[^$=)\n]{1,60}\})?\{\Z
    | \\boxed\{[^{}]{1,50}\}[\s$,;&]*(?:and|or)?[\s$]*(?:[A-Za-z]\ ?=\ ?)?\Z""")
AFTER_PART = re.compile(r"[\s$]*(?:[*/]|\^(?!\{?\\circ)|\\(?:sqrt|cdot|times|div|frac|pi)|\}\{|or\b"
                        r"|hundred|thousand|[mbtr]+illion)")


def after_thought(text):
    """What a text says after its thoughts: all that follows the last </think> or the like, or the
    mark of the final channel. A thought that is not closed leaves nothing ("")."""
    marks = list(THOUGHT.finditer(text))
    if not marks:
        return text
    return text[marks[-1].end():] if marks[-1]["closes"] else ""


def extract_answer(task, text, choices=None):
    """The answer that a text states, or None where it states none or more than one.

    It is a number ("-1234.5", "3/4"), LaTeX, a letter of `choices`, "yes" or "no".
    """
    kind = TASKS[task]
    text = re.sub(r"[ \t\xa0\u2009\u202f]+", " ", after_thought(text)[-LONGEST:])
    text = re.sub(r"(?<!\w)\*{2,3}|\*{2,3}(?!\w)", "", text)  # bold, but not Python's 2**3
    announced = list(ANNOUNCED.finditer(text))
    if not announced:
        return last_number(text) if kind == "number" else None
    last = announced[-1]
    before, statement = text[:last.start()][-80:], text[last.end():][:1000]
    clause = CLAUSE_END.split(before)[-1] + last[0]
    if last["box"]:
        statement, after = in_braces(statement)
        clause = before[-16:]  # "It cannot be $"
        if BEFORE_PART.search(before) or AFTER_PART.match(after):
            return None
    if DENIED.search(clause):
        return None
    if kind == "math" and last["box"]:
        return statement.strip() or None
    if kind != "math":
        statement = without_latex(statement)
    statement = statement[LEAD.match(statement).end():]
    claim = SENTENCE_END.split(statement, maxsplit=1)[0]
    if kind == "yesno":
        m = re.match(r"(yes|no|true|false)\b(?:[^\w?]*$|[,.;:)](?! (?:or |and )?(?:yes|no)\b)| - )",
                     claim.lower())
        return m and YESNO[m[1]]
    if DENIED.search(claim):
        return None
    if kind == "math":
        formula = re.fullmatch(r"\$*([^$]+?)\$*\s*", claim)  # $5$ or 5, but not "$5$ or $6$"
        return formula and formula[1]
    return number_in(claim) if kind == "number" else read_choice(statement, claim, choices or {})


def in_braces(text):
    """(content, rest) of a text that begins with {...}; two "" if they never close: it was cut."""
    depths = list(itertools.accumulate((c == "{") - (c == "}") for c in text))
    end = depths.index(0) if 0 in depths else 0
    return text[1:end], text[end + 1:]


def without_latex(text):
    """A text with plain numbers: without currency, LaTeX's marks and thousands separators."""
    text = re.sub(r"[−–]", "-", text.replace("{,}", ","))
    text = re.sub(r"\\(?:text\w*|math\w+|[()\[\]$%!, ])|(?<=\d)\$", " ", text)
    return re.sub(r"[{}]|[$€£]\s?|(?<=\d)[, ](?=\d{3}\b)", "", text)


def number_in(text):
    """The one number that a text gives, or that its equation comes to ("18", "2.5", "1/3"); None
    for several, for open arithmetic and for a scale or a measure that is not read."""
    text = without_latex(text)
    if "=" in text and re.search(r"[,;]\s|\b(?:and|or|because|since)\b", text):  # x = 3, y = 5
        return None
    value = text.rsplit("=", 1)[-1]
    m = NUMBER.match(value, LEAD.match(value).end())
    others = {other[0] for other in NUMBER.finditer(value)}
    if not m or len(others) > 1 or UNREAD.search(value):
        return None
    return m[0].replace(" ", "")


def last_number(text):
    """The number that a text which announces nothing ends with, or None."""
    text = without_latex(text)
    numbers = list(NUMBER.finditer(text))
    if not numbers:
        return None
    before, after = text[:numbers[-1].start()][-80:], text[numbers[-1].end():][:80]
    several = re.search(r"\d(?: ?[A-Za-z]+,?)? (?:(?:or|to|and) )?$", before)  # 4 hours 30
    if several or DENIED.search(CLAUSE_END.split(before)[-1]) or UNREAD.match(after.lstrip()):
        return None
    return numbers[-1][0].replace(" ", "")


def read_choice(statement, claim, choices):
    """The letter of the one choice that a claim names by letter or by exact text, or None."""
    choices = {letter: without_latex(text).lower() for letter, text in choices.items()}
    m = re.match(r"[(\[]?([A-Z])(?:[)\].,:;\"'”]|$)", claim)
    if not m or m[1] not in choices:
        hits = [letter for letter, text in choices.items()
                if re.match(rf"(?i)(?:the |an? )?{re.escape(text)}\W*(?:$|\n)", statement)]
        return hits[0] if len(hits) == 1 else None
    letters = {*re.findall(r"(?<![\w'’])[A-Z](?!\w)", claim)} & {*choices}
    rest = SENTENCE_END.split(statement[m.end():].lstrip(" .):"))[0].lower()
    texts = [text for text in choices.values() if text in rest and text not in choices[m[1]]]
    several = letters != {m[1]} or texts or rest.startswith(("or ", "and "))  # "B. or C", "B: bank"
    return None if several else m[1]


def grade(task, prediction, answer):
    """True if a prediction means the same as the answer; None (unparsed) is wrong."""
    if prediction is None or max(len(prediction), len(answer)) > 500:
        return False
    if TASKS[task] == "math":
        return same_math(spelled(prediction), spelled(answer))
    if TASKS[task] != "number":
        return prediction.strip("() .").lower() == answer.strip("() .").lower()
    a, b = number_in(prediction), number_in(answer)
    if a is None or b is None:
        return False
    a, b = Fraction(a), Fraction(b)
    # a program's 137.99999999999997 is 138, but 1000001 isn't 1000000
    return a == b or (a.denominator > 1 and abs(a - b) <= abs(b) / 10**6)


# ---------------------------------------------------------------- mathematical equality
# Two formulas are equal in one spelling, or part by part, or if their values agree to 80 digits
# wherever we put their letters. No eval() runs and nothing can hang, in whatever thread.
SPELLINGS = [(re.compile(pattern), new) for pattern, new in (
    # layout, thousands, currency, degrees, an approximation behind a value
    (r"\\\\(?!\s*\\end)", "),("), (r"\\(?:left|right|[bB]igg?[lr]?|q?quad)(?![a-z])|\\[;: ]", " "),
    (r",\s*\\!\s*|\{,\}|\\[!,]|\\?[$%]|\^\s*\{?\s*\\circ\s*\}?|\\[()\[\]]|°", ""),
    (r"(?<=[\d}])\s*\\approx.*", ""), (r"[−–]", "-"), (r"\\(?:cdot|times)(?![a-z])|[×·]", "*"),
    # \frac12 and 3\frac12, \sqrt2 and sqrt(2), \mathbf{i}, x_{1}
    (r"\\[dtc]frac", r"\\frac"), (r"\\frac\s*(\d)\s*(\d)", r"\\frac{\1}{\2}"),
    (r"(?<![\w.^}])(\d+) *\\frac *\{(\d+)\} *\{(\d+)\}", r"(\1+\2/\3)"),
    (r"\\?\bsqrt\s*(?:\((\w+)\)|(\w))", r"\\sqrt{\1\2}"), (r"\\math\w+\s*\{(\w)\}", r"\1"),
    (r"_\s*\{\s*(?:\\text\s*\{\s*)?(\w+)\s*\}+", r"_\1"),
    # lists, sets, and matrices as tuples of their rows
    (r"\\cup(?![a-z])|(?:\\text\s*\{)?,?\s(?:and|or)\s\}?(?![^,]*[<>])", ","), (r",\s*,", ","),
    (r"^\s*[A-Za-z]\s*\\in(?![a-z])", ""), (r"^\s*\\\{(.*)\\\}\s*$", r"\1"),
    (r"\[?\s*\\begin\{(?:[pb]matrix|array)\}\s*(?:\{[clr|]*\})?", "(("), ("&", ","),
    (r"(?:\\\\)?\s*\\end\{(?:[pb]matrix|array)\}\s*\]?", "))"))]
TEXT = re.compile(r"\\(?:text(?:bf|it|rm)?|[mh]box|math(?:rm|bf))\s*\{([^{}]*)\}(?:\^\{?\d\}?)?")
# Units behind a number go ("10 cm", "5 apples"), but not the words that change its value.
UNITS = re.compile(r"(?<=[\d})i])(?:\s*\b(?:[a-z]{4,}|[ckm]m|kg|ft|mph|sq)\b)+(?:\^\{?\d\}?)?\s*$")
VALUED = re.compile(r"(?i)\b(?:hundred|[mb]illion|thousand|dozen|not|negative|minus|than|more|less"
                    r"|fewer|at|[ap]\.?m)\b")
THOUSANDS = re.compile(r"(?<![\d.,(\[])\d{1,3}(?:,\d{3})+(?![\d,])")  # (1,000) is a pair
# x = 5, f(x) = 5, (a, b) = (2, 9)
NAMED = re.compile(r"(?:[A-Za-z](?:_\w+)?(?:\([a-z]\))?|\([a-z](?:,[a-z])+\))=([^=]+)")
# Fractions, powers and roots of what has no braces inside
BRACES = [(re.compile(pattern), new) for pattern, new in (
    (r"\\frac\{([^{}]*)\}\{([^{}]*)\}", r"((\1)/(\2))"), (r"\^\{([^{}]*)\}", r"^(\1)"),
    (r"\\sqrt\{([^{}]*)\}", r"((\1)^(1/2))"), (r"\\sqrt\[(\w+)\]\{([^{}]*)\}", r"((\2)^(1/\1))"))]
# A word is a name of its own: "east" is not "seat".
TOKEN = re.compile(r"\d+\.?\d*|\.\d+|\\?[A-Za-z]{3,}|\\[a-z]+|[A-Za-z](?:_\w+)?|.")
SYMBOL = re.compile(r"[A-Za-z]\w*|\\(?:alpha|beta|gamma|delta|theta|lambda|mu|phi|omega|infty)")
OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul,
             ast.Div: operator.truediv, ast.Pow: operator.pow}


def spelled(s):
    """A formula in one spelling: without layout, currency, units and thousands separators."""
    for pattern, new in SPELLINGS:
        s = pattern.sub(new, s)
    bare = TEXT.sub(" ", s)
    keep_words = VALUED.search(s) or not re.search(r"\w", bare)
    s = TEXT.sub(r" \1 ", s) if keep_words else UNITS.sub("", bare)
    s = re.sub(r"(?<!\d)\s+|\s+(?!\d)", "", s).rstrip(".")  # "1 2" is not 12
    return THOUSANDS.sub(lambda m: m[0].replace(",", ""), s)


def same_math(a, b):
    """Whether two formulas, as spelled() writes them, are equal: sets and lists in any order,
    tuples, intervals, matrices and equations part by part; "x=5" is 5."""
    if a == b or (a.isalpha() and len(a) > 2 and a.lower() == b.lower()):
        return a != ""
    a_is, b_is = NAMED.fullmatch(a), NAMED.fullmatch(b)
    if bool(a_is) != bool(b_is):
        return same_math(a_is[1] if a_is else a, b_is[1] if b_is else b)
    (kind, parts), (kind_b, others) = parts_of(a), parts_of(b)
    if kind != kind_b or len(parts) != len(others) or len(parts) > 20:
        return False
    if kind == "formula":
        x, y = values(a), values(b)
        return bool(x and y) and all(abs(p - q) * 10**80 <= abs(p) for p, q in zip(x, y))
    if kind != "list":
        return all(map(same_math, parts, others))
    for part in parts:
        twin = next((other for other in others if same_math(part, other)), None)
        if twin is None:
            return False
        others.remove(twin)
    return True


def parts_of(s):
    """(kind, parts) of a formula: a list, set or union, the sides of an equation, a tuple, interval
    or matrix, or the formula alone."""
    if "\\pm" in s:
        s = s.replace("\\pm", "+") + "," + s.replace("\\pm", "-")
    for kind, separator in (("list", ","), ("equation", "=")):
        if len(parts := split_top(s, separator)) > 1:
            return kind, parts
    if s[:1] in ("(", "[") and s[-1] in ")]" and len(parts := split_top(s[1:-1], ",")) > 1:
        return s[0] + s[-1], parts
    return "formula", [s]


def split_top(s, separator):
    """Split at the separators outside of all brackets."""
    depths = itertools.accumulate((c in "([{") - (c in ")]}") for c in s)
    marked = ["\n" if c == separator and depth == 0 else c for c, depth in zip(s, depths)]
    return "".join(marked).split("\n")


@lru_cache(maxsize=4096)
def values(formula):
    """A formula's values with its letters at three arbitrary points; None if it can't be read.

    Python's parser reads it with n0, a1, ... for its numbers and letters, by their place among the
    tokens: 2x(x+1) is n0 * a1 * ( a3 + n5 ).
    """
    for _ in range(9):  # from the innermost braces outwards
        for pattern, new in BRACES:
            formula = pattern.sub(new, formula)
    tokens = TOKEN.findall(formula)
    names = [*tokens]
    for i, token in enumerate(tokens):
        if token not in "+-*/()^":
            names[i] = f"n{i}" if token[0].isdigit() else f"a{i}"
    expression = re.sub(r"(?<=[\w)]) (?=[a(])", " * ", " ".join(names)).replace("^", "**")
    mp = MPContext()  # our own: threads would share the precision of mpmath.mp
    mp.dps = 100
    try:
        tree = ast.parse(expression, mode="eval").body
        return [value_of(mp, tree, tokens, point) for point in range(3)]
    except (ValueError, SyntaxError, ArithmeticError, AttributeError, LookupError, RecursionError,
            MemoryError):  # the last two: too deep
        return None


def value_of(mp, node, tokens, point):
    """The value of a tree of names, signs and OPERATORS; some error for all others."""
    if isinstance(node, ast.Name):
        token = tokens[int(node.id[1:])]
        if token in ("e", "i", "\\pi"):
            return {"e": mp.e, "i": mp.j, "\\pi": mp.pi}[token] * 1
        if SYMBOL.fullmatch(token):  # > 0, where sqrt(1/n) is 1/sqrt(n)
            return mp.mpf(zlib.crc32(f"{token} {point}".encode())) / 2**32 + 0.5
        return mp.mpf(token)
    if isinstance(node, ast.UnaryOp):
        x = value_of(mp, node.operand, tokens, point)
        return -x if isinstance(node.op, ast.USub) else x
    x = value_of(mp, node.left, tokens, point)
    y = value_of(mp, node.right, tokens, point)
    if isinstance(node.op, ast.Pow) and abs(y) > 10**4:  # nobody computes 9^(9^9)
        raise ValueError("too large")
    return OPERATORS[type(node.op)](x, y)


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
