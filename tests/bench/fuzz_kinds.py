"""The cases of fuzz.py: good files, ways to damage them, and what is right for each.

A generator draws one case of its kind. `refuse` says that the command has to end with one sentence; else it has to
accept, and `check()` returns what it read in another way than is right, or nothing. Where several answers could be
defended (a question that is a number, a level that is a list) there is no case.
"""
import contextlib
import dataclasses
import gzip
import io
import json
import os
import shutil
import struct
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

import distill
import eval as tasks
import judge

KEY = "sk-0123456789abcdefghij"


@dataclasses.dataclass
class Case:
    command: str               # distill, judge or eval
    argv: list
    what: str                  # the damage, in words
    refuse: bool = True        # None: to refuse and to accept are both right
    check: callable = None     # called after the command -> what is wrong, or nothing
    env: dict = dataclasses.field(default_factory=dict)
    secrets: tuple = (KEY,)    # must not be printed
    kind: str = ""


KINDS = {}  # name -> (weight, generator)


def kind(weight):
    """Register a generator(rng, box, folder) -> Case under its name; `weight` is its share of the cases."""
    def register(generator):
        KINDS[generator.__name__] = weight, generator
        return generator
    return register


def make(rng, box, folder, kinds):
    """Draw a case of one of these kinds in an empty folder."""
    weights = [KINDS[name][0] for name in kinds]
    [name] = rng.choices(kinds, weights)
    case = KINDS[name][1](rng, box, folder)
    case.kind = name
    return case


# ---------------------------------------------------------------- good files
@contextlib.contextmanager
def quiet():
    """What is printed here is lost."""
    text = io.StringIO()
    with contextlib.redirect_stdout(text), contextlib.redirect_stderr(text):
        yield


def write(file, rows):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def save_tiny_model(folder, config, corpus):
    """A random model with a byte-level tokenizer."""
    coder = Tokenizer(models.BPE())
    coder.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    coder.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<pad>", "<eos>"], show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    coder.train_from_iterator(corpus, trainer)
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=coder, pad_token="<pad>", eos_token="<eos>")
    auto = transformers.AutoModel if isinstance(config, transformers.BertConfig) else transformers.AutoModelForCausalLM
    auto.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


class Box:
    """What cases start from: models, pools, questions, runs, a server; all tiny, all good."""

    def __init__(self, folder):
        torch.manual_seed(0)
        self.folder = folder
        self.fresh = judge.demo_paths(judge.demo_questions(6, 0), 0)
        self.graded = judge.grade_paths([dict(row) for row in self.fresh])
        for row in self.graded:
            row["valid"], said = judge.rule_judge(row)
            row["verdict"] = {"rule": said}
        self.arc = [{"id": f"a{i}", "task": "arc", "question": f"Which of these is blue, number {i}?", "answer": "B",
                     "choices": {"A": "grass", "B": "the sky"}, "style": style, "teacher": "t",
                     "path": "Grass is green. So it is the sky.\nThe answer is (B)."}
                    for i in range(3) for style in ("vanilla", "program")]
        self.kept = len(judge.filter_pool(self.graded, "full"))
        questions = judge.demo_questions(4, 1)
        self.questions = [{key: row[key] for key in ("id", "task", "question", "answer")} for row in questions]
        self.test = write(folder / "test.jsonl", self.questions)
        self.pool = write(folder / "pool.jsonl", self.graded)
        self.arc_test = write(folder / "arc_test.jsonl", [{**row, "id": f"t{i}", "question": f"Blue, {i}?"}
                                                          for i, row in enumerate(self.arc[:2])])
        corpus = [row["path"] for row in self.fresh]
        shape = {"vocab_size": 300, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
                 "intermediate_size": 24, "max_position_embeddings": 4096, "bos_token_id": None, "eos_token_id": 1,
                 "pad_token_id": 0}
        self.students = [
            save_tiny_model(folder / "llama", transformers.LlamaConfig(**shape, num_key_value_heads=1), corpus),
            save_tiny_model(folder / "neox", transformers.GPTNeoXConfig(**shape), corpus)]
        self.encoder = save_tiny_model(folder / "bert", transformers.BertConfig(**shape), corpus)
        self.run = self.stopped_run(folder / "stopped")
        self.finished = folder / "finished"
        with quiet():
            distill.main(self.training(self.finished))
        self.adapter = str(self.finished / "student_0")
        self.server = Server()

    def training(self, out, *more, students=None, pool=None, test=None):
        """The flags of a run of a second."""
        return ["--students", *(students or self.students), "--paths", str(pool or self.pool), "--eval_questions",
                str(test or self.test), "--max_steps", "2", "--batch_size", "2", "--eval_limit", "1", "--device", "cpu",
                "--eval_max_new_tokens", "3", "--lora_rank", "2", "--out_dir", str(out), *more]

    def stopped_run(self, out):
        """The folder of a run that died after its last checkpoint, in the final test."""
        calls, evaluate = [], tasks.evaluate

        def die(*args, **more):
            calls.append(1)
            if len(calls) == 2:
                raise KeyboardInterrupt
            return evaluate(*args, **more)

        tasks.evaluate = die
        try:
            with quiet():
                distill.main(self.training(out, "--save_every", "1", "--seed", "5"))
        except (KeyboardInterrupt, SystemExit):
            pass
        finally:
            tasks.evaluate = evaluate
        return out


class Server(ThreadingHTTPServer):
    """A chat endpoint that gives every call `reply`: (status, body)."""
    daemon_threads = True
    reply = 200, b"{}"

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *args):
            pass

        def do_POST(self):
            self.rfile.read(int(self.headers["Content-Length"]))
            status, body = self.server.reply
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("Content-Type", "application/json")
            self.end_headers()
            self.wfile.write(body)

    def __init__(self):
        super().__init__(("127.0.0.1", 0), self.Handler)
        threading.Thread(target=self.serve_forever, daemon=True).start()


# ---------------------------------------------------------------- how a file gets into a command
def with_pool(rng, box, folder, file, what, refuse, kept=None, test=None):
    """A case that gives a pool to distill.py or judge.py; kept: how many paths have to train."""
    if rng.random() < 0.5:
        out = folder / "judged.jsonl"

        def check():
            rows = [json.loads(line) for line in out.read_text().splitlines()]
            # nobody but distill.py judges the demo's fresh rows, so only right answers can be compared
            right = sum(judge.fate(row, "answer") == "kept" for row in rows)
            wanted = kept_on_answers(box, kept)
            return right != wanted and f"{right} right answers instead of {wanted}"
        return Case("judge", ["--paths", str(file), "--out", str(out)], what, refuse,
                    None if refuse or kept is None else check)

    def check():
        results = json.loads((folder / "run" / "results.json").read_text())
        found = results["counts"]["filter"].get("kept")
        return found != kept and f"{found} kept paths instead of {kept}"
    argv = box.training(folder / "run", pool=file, test=test)
    return Case("distill", argv, what, refuse, None if refuse or kept is None else check)


def kept_on_answers(box, kept):
    """The right answers among the paths of which the whole filter keeps `kept`."""
    return len(judge.filter_pool(box.graded, "answer")) - (box.kept - kept)


def with_questions(rng, box, folder, file, what, refuse, n=None):
    """A case that gives a file of questions to eval.py, judge.py or distill.py; n: how many it has."""
    which = rng.choice(["eval", "judge", "distill"])
    if which == "eval":
        out = folder / "answers.json"

        def check():
            found = json.loads(out.read_text())["questions"]
            return found != n and f"{found} questions instead of {n}"
        return Case("eval", ["--students", box.students[0], "--questions", str(file), "--max_new_tokens", "2", "--out",
                             str(out), "--device", "cpu"], what, refuse, None if refuse or n is None else check)
    if which == "judge":
        return Case("judge", ["--questions", str(file), "--teacher", box.students[0], "--dry_run", "--device", "cpu",
                              "--out", str(folder / "pool.jsonl")], what, refuse)
    return Case("distill", box.training(folder / "run", test=file), what, refuse)


# ---------------------------------------------------------------- rows
NOT_TRUTH = ["yes", "", 2, -1, 0.5, [], {}, "true"]
REFUSED = {
    "id": [None, "", [], {}, ["q"]], "task": [None, "", "nosuch", [], "DEMO"],
    "question": [None, "", " \n", [], {"text": "x"}], "answer": [None, "", [], {}], "style": [None, "", [], {}],
    "teacher": [None, "", [], {}], "path": [None, 5, [], {}, ["a", "b"]], "correct": NOT_TRUTH, "valid": NOT_TRUTH,
    "verdict": ["valid", 3, ["valid"], True], "choices": ["A", 3, {"A": []}, {"A": {}, "B": {}}, {"A": True}],
    "prompt": [3, True, {"content": "x"}, [{"role": "system", "content": "x"}], [{"content": "x"}], [[]], ["x"],
               [{"role": "user", "content": 3}]],
}
ACCEPTED = {
    "id": [17, 0, "q~1", "../x", " spaces in it", "é", "a/b", "-1", 10**30, "x" * 3000, "~", "%s {id}"],
    "prompt": [None, "Own prompt?", [{"role": "user", "content": "Own prompt?"}]], "verdict": [None],
    "level": [1, "1", 2.5, None, True, "é"], "sample": [None, 0], "finish_reason": [None, "stop"], "usage": [None, {}],
    "more": [None, [1, [2]], {"a": {"b": None}}, "x" * 10000, 1e300], "choices": [None],
}


@kind(16)
def rows(rng, box, folder):
    """One field of one row of a pool has another type or value."""
    bad = rng.random() < 0.6
    field = rng.choice(list(REFUSED if bad else ACCEPTED))
    value = rng.choice((REFUSED if bad else ACCEPTED)[field])
    arc = field == "choices" and bad
    some = [dict(row) for row in (box.arc if arc else box.graded)]
    some[rng.randrange(len(some))][field] = value
    file = write(folder / "pool.jsonl", some)
    what = f"{field} = {json.dumps(value)[:60]}"
    return with_pool(rng, box, folder, file, what, bad, None if bad else box.kept, box.arc_test if arc else None)


@kind(6)
def missing(rng, box, folder):
    """A pool's row lacks a field, or contradicts another row."""
    some = [dict(row) for row in box.graded]
    row = rng.choice(some)
    how = rng.choice(["id", "task", "question", "answer", "style", "teacher", "path", "question differs", "answer differs", "baseline"])
    if how == "question differs":
        row["question"] += " Really?"
    elif how == "answer differs":
        row["answer"] = "123"
    elif how == "baseline":  # claims to be made from graded rows, and was never graded
        row["baseline"] = "revthink"
        for field in ("correct", "prediction", "valid", "verdict"):
            del row[field]
    else:
        del row[how]
    return with_pool(rng, box, folder, write(folder / "pool.jsonl", some), how, True)


@kind(12)
def frames(rng, box, folder):
    """A pool that went through pandas or datasets: the same rows, other types."""
    some, test, kept = [dict(row) for row in box.graded], None, box.kept
    how = rng.choice(["truth as floats", "truth as ints", "union of fields", "fresh rows among graded ones", "choices padded",
                      "verdict padded", "half graded", "reordered", "levels as floats", "deep nulls"])
    if how in ("truth as floats", "truth as ints"):
        number = float if how.endswith("floats") else int
        for row in some:
            row |= {key: number(row[key]) for key in ("correct", "valid")}
    elif how in ("union of fields", "fresh rows among graded ones"):
        if how.startswith("fresh"):
            some = [dict(rng.choice(pair)) for pair in zip(box.graded, box.fresh)]
        fields = {field for row in box.graded for field in row} | {"choices", "prompt", "usage", "sample"}
        some = [{field: row.get(field) for field in sorted(fields)} for row in some]
    elif how == "choices padded":
        some, test, kept = [dict(row) for row in box.arc], box.arc_test, None
        for row in some:
            row["choices"] = {**row["choices"], "C": None, "D": None}
    elif how == "verdict padded":
        for row in some:
            row["verdict"] = {**row["verdict"], "other judge": None}
    elif how == "half graded":
        for row in rng.sample(some, 5):
            del row[rng.choice(["prediction", "correct"])]
    elif how == "reordered":
        rng.shuffle(some)
        some = [dict(sorted(row.items())) for row in some]
    elif how == "levels as floats":
        for row in some:
            row["level"] = float(row["level"])
    else:
        for row in some:
            row |= {"usage": {"prompt_tokens": None}, "meta": {"a": [None, {"b": None}]}}
    return with_pool(rng, box, folder, write(folder / "pool.jsonl", some), how, False, kept, test)


# ---------------------------------------------------------------- bytes
def damaged_bytes(rng, lines):
    """(bytes, what, refuse) of a JSON Lines file."""
    lines = list(lines)
    k = rng.randrange(len(lines))
    line, whole = lines[k], b"\n".join(lines) + b"\n"
    bad = {
        "cut line": line[:rng.randrange(1, len(line))], "trailing comma": line[:-1] + b",}",
        "single quotes": line.replace(b'"', b"'"), "array": b"[" + line + b"]", "string": b'"text"', "number": b"12",
        "null": b"null", "two objects": line + line, "no colon": line.replace(b":", b"", 1),
        "nested 10,000 deep": b'{"id": ' + b"[" * 10000 + b"]" * 10000 + b"}",
        "5,000-digit number": line[:-1] + b', "level": ' + b"9" * 5000 + b"}", "Latin-1": line[:-1] + b', "x": "\xe9"}',
        "NUL": line[:20] + b"\0" + line[20:], "control character": line.replace(b'"id": "', b'"id": "\x01', 1),
        "unquoted": line.replace(b'"id"', b"id", 1), "HTML": b"<html><body>Not found</body></html>",
        "lone bracket": b"}", "comment": b"# comment",
    }
    files = {
        "gzip": gzip.compress(whole), "UTF-16": whole.decode().encode("utf-16"), "empty": b"", "blank lines only": b"\n\n",
        "random bytes": rng.randbytes(300), "one list": b"[" + b",".join(lines) + b"]",
    }
    good = {
        "BOM": b"\xef\xbb\xbf" + whole, "CRLF": whole.replace(b"\n", b"\r\n"), "blank lines": whole.replace(b"\n", b"\n\n \n"),
        "no last newline": whole[:-1], "spaces around": b"\n".join(b"  " + line + b"\t" for line in lines),
        "unicode escapes": whole.replace(b"a", b"\\u0061") if b"\\" not in whole else whole,
    }
    how = rng.choice([*bad, *files, *good])
    if how in bad:
        lines[k] = bad[how]
        return b"\n".join(lines) + b"\n", f"{how} in line {k + 1}", True
    return files.get(how) or good.get(how) or b"", how, how in files


@kind(14)
def text(rng, box, folder):
    """The bytes of a pool or of a file of questions are damaged."""
    pool = rng.random() < 0.5
    source = box.pool if pool else box.test
    with open(source, "rb") as file:
        content, what, refuse = damaged_bytes(rng, file.read().splitlines())
    path = folder / "file.jsonl"
    path.write_bytes(content)
    if pool:
        return with_pool(rng, box, folder, path, f"pool, {what}", refuse, None if refuse else box.kept)
    return with_questions(rng, box, folder, path, f"questions, {what}", refuse, len(box.questions))


@kind(4)
def odd_text(rng, box, folder):
    """Paths that are text, but odd: surrogates, control tokens, a megabyte, patterns that are slow to match."""
    odd = ["\ud800", "x\udfff y", "<|im_end|>", "<eos>", "</s>", "\0", "\x1b[31m", "e\u0301" * 50, "\u202e", "𝕏" * 30, "%s%d{}",
           '"answer"' + " " * 4000 + "x", "The answer is " * 2000, "(" * 5000, "9" * 5000, "\\boxed{" * 3000,
           "**" * 5000, "1,000," * 3000, "a" * 10**6, "VERDICT: VALID", "<think>", "```output\n" * 500]
    some = [dict(row) for row in box.graded]
    row = rng.choice(some)
    extra = rng.choice(odd)
    row["path"] = extra + "\n" + row["path"] if rng.random() < 0.5 else row["path"] + "\n" + extra
    for field in ("correct", "prediction", "valid", "verdict"):
        del row[field]
    file = write(folder / "pool.jsonl", some)
    return with_pool(rng, box, folder, file, f"path with {ascii(extra)[:40]} ({len(extra)} characters)", False)


# ---------------------------------------------------------------- questions in published formats
FORMATS = {
    "gsm8k_test.jsonl": ({"question": "How many?", "answer": "2 + 2 = 4\n#### 4"}, ["question", "answer"]),
    "math.jsonl": ({"problem": "What is $x$?", "solution": "So \\boxed{3}.", "level": "Level 1"}, ["problem", "solution"]),
    "csqa.jsonl": ({"id": "1", "question": {"stem": "Where?", "question_concept": "c", "choices": [
        {"label": "A", "text": "here"}, {"label": "B", "text": "there"}]}, "answerKey": "B"}, ["question", "answerKey"]),
    "arc.jsonl": ({"id": "2", "question": "Where?", "choices": {"label": ["1", "2"], "text": ["here", "there"]},
                   "answerKey": "2"}, ["question", "choices", "answerKey"]),
    "anli.jsonl": ({"uid": "3", "context": "It rains.", "hypothesis": "It is wet.", "label": "e"},
                   ["context", "hypothesis", "label"]),
    "strategyqa.jsonl": ({"qid": "4", "question": "Is it?", "answer": True}, ["question", "answer"]),
    "date_bbh.json": ({"input": "Which?\nOptions:\n(A) today\n(B) tomorrow", "target": "(A)"}, ["input", "target"]),
    "date.json": ({"input": "Which?", "target_scores": {"today": 1, "tomorrow": 0}}, ["input", "target_scores"]),
}
WRONG_ANSWERS = {"answer": ["#### ", "#### blue", "", []], "answerKey": ["Z", "", 7, []], "label": ["x", 7, [], {}],
                 "target": ["(Q)", "", 3], "solution": ["no box", "", 5], "target_scores": [{}, [], 3]}


@kind(8)
def formats(rng, box, folder):
    """A record of a published data set lacks something, or its answer can be none."""
    name = rng.choice(list(FORMATS))
    record, needed = FORMATS[name]
    record, refuse, what = dict(record), True, "whole"
    how = rng.choice(["drop", "null", "list", "answer", "whole"])
    field = rng.choice(needed)
    if how == "drop":
        del record[field]
    elif how in ("null", "list"):
        record[field] = None if how == "null" else [3]
    elif how == "answer":
        field = next(x for x in needed if x in WRONG_ANSWERS)
        record[field] = rng.choice(WRONG_ANSWERS[field])
    else:
        refuse = False
    if refuse:
        what = f"{field} = {json.dumps(record.get(field, 'missing'))[:40]}"
    file = folder / name
    content = {"examples": [record]} if name.endswith(".json") else record
    file.write_text(json.dumps(content))
    return with_questions(rng, box, folder, file, f"{name}, {what}", refuse, 1)


# ---------------------------------------------------------------- models
def tensors_of(folder):
    file = f"{folder}/model.safetensors"
    return file, load_file(file)


def damage_weights(rng, folder):
    """Damage a saved model's weights -> what was done."""
    how = rng.choice(["deleted", "cut", "empty", "garbage", "header", "renamed", "all renamed", "dropped", "NaN", "inf", "shape"])
    file = f"{folder}/model.safetensors"
    size = os.path.getsize(file)
    if how == "deleted":
        os.remove(file)
    elif how == "cut":
        os.truncate(file, rng.randrange(1, size))
    elif how == "empty":
        os.truncate(file, 0)
    elif how == "garbage":
        with open(file, "wb") as f:
            f.write(rng.randbytes(1000))
    elif how == "header":
        with open(file, "r+b") as f:
            f.write(struct.pack("<Q", rng.choice([0, 2**40, 5])))
    else:
        tensors = load_file(file)
        name = rng.choice([x for x in sorted(tensors) if x.endswith("weight")])
        if how == "renamed":
            tensors[name + "s"] = tensors.pop(name)
        elif how == "all renamed":
            tensors = {f"module.{key}": value for key, value in tensors.items()}
        elif how == "dropped":
            del tensors[name]
        elif how == "shape":
            tensors[name] = torch.zeros(3, 5)
        else:
            tensors[name].view(-1)[rng.randrange(tensors[name].numel())] = float(how)
        save_file(tensors, file, {"format": "pt"})
        how += f" {name}"
    return f"weights {how}"


def damage_config(rng, folder, marker):
    """Damage a saved model's config.json, or make it ask for code -> what was done."""
    file = folder / "config.json"
    config = json.loads(file.read_text())
    how = rng.choice(["deleted", "garbage", "empty object", "list", "unknown type", "one more layer", "wider", "small vocabulary",
                      "no type", "text for a number", "own code"])
    if how == "deleted":
        file.unlink()
        return f"config {how}"
    if how == "own code":
        (folder / "modeling_own.py").write_text(f"open({str(marker)!r}, 'w').write('ran')\n")
        config |= {"model_type": "own", "auto_map": {"AutoConfig": "modeling_own.Own", "AutoModelForCausalLM":
                                                     "modeling_own.Own", "AutoModel": "modeling_own.Own"}}
    changes = {"unknown type": {"model_type": "nosuch"}, "one more layer": {"num_hidden_layers": 3}, "wider":
               {"hidden_size": 32}, "small vocabulary": {"vocab_size": 100}, "text for a number": {"hidden_size": "wide"}}
    config |= changes.get(how, {})
    if how == "no type":
        config.pop("model_type")
        config.pop("architectures", None)
    texts = {"garbage": "{not json", "empty object": "{}", "list": "[1]"}
    file.write_text(texts.get(how) or json.dumps(config))
    return f"config {how}"


TEMPLATES = {"raises": "{{ raise_exception('no') }}", "syntax": "{% for %}", "says nothing": "", "forgets": "Hello.",
             "undefined": "{{ nosuch.field.of.it }}"}


def damage_tokenizer(rng, folder):
    """Damage a saved tokenizer -> what was done."""
    how = rng.choice(["deleted", "garbage", "empty object", "cut", *(x for x in TEMPLATES if x != "says nothing"), "too large"])
    file = folder / "tokenizer.json"
    if how == "deleted":
        file.unlink()
    elif how == "cut":
        os.truncate(file, rng.randrange(1, os.path.getsize(file)))
    elif how == "too large":  # more tokens than the model has embeddings
        data = json.loads(file.read_text())
        data["model"]["vocab"] = {token: i + 5000 if i > 5 else i for token, i in data["model"]["vocab"].items()}
        file.write_text(json.dumps(data))
    elif how in TEMPLATES:
        (folder / "chat_template.jinja").write_text(TEMPLATES[how])
        how = f"template {how}"
    else:
        file.write_text({"garbage": "{not json", "empty object": "{}"}[how])
    return f"tokenizer {how}"


@kind(16)
def students(rng, box, folder):
    """A student, teacher or judge is damaged, is no causal model, or brings code."""
    marker, copy = folder / "marker", folder / "model"
    which = rng.choice(["weights", "weights", "config", "tokenizer", "pickle", "encoder", "empty", "absent", "adapter"])
    if which in ("weights", "config", "tokenizer", "pickle"):
        shutil.copytree(rng.choice(box.students), copy)
    if which == "weights":
        what = damage_weights(rng, copy)
    elif which == "config":
        what = damage_config(rng, copy, marker)
    elif which == "tokenizer":
        what = damage_tokenizer(rng, copy)
    elif which == "pickle":
        torch.save(tensors_of(copy)[1], copy / "pytorch_model.bin")
        (copy / "model.safetensors").unlink()
        what = "weights in a pickle"
    elif which == "encoder":
        copy, what = box.encoder, "an encoder"
    elif which == "empty":
        copy.mkdir()
        what = "an empty folder"
    elif which == "adapter":
        shutil.copytree(box.adapter, copy)
        what = damage_adapter(rng, copy)
    else:
        copy, what = rng.choice([folder / "nosuch", "", " ", "no/such/model", "nosuch-model", box.pool]), "no model"

    def check():
        return marker.exists() and "code of the folder ran"
    command = "eval" if which == "adapter" else rng.choice(["distill", "eval", "judge"])
    if command == "distill":
        argv = box.training(folder / "run", students=[box.students[1], str(copy)])
    elif command == "eval":
        argv = ["--students", str(copy), "--questions", box.test, "--max_new_tokens", "2", "--limit", "1", "--device", "cpu"]
    else:
        argv = ["--paths", box.pool, "--judge", str(copy), "--max_new_tokens", "2", "--device", "cpu", "--retries", "0",
                "--out", str(folder / "out.jsonl")]
    return Case(command, argv, what, check=check)


def damage_adapter(rng, folder):
    """Damage a saved LoRA adapter -> what was done."""
    config_file, file = folder / "adapter_config.json", folder / "adapter_model.safetensors"
    config, tensors = json.loads(config_file.read_text()), load_file(file)
    name = rng.choice(sorted(tensors))
    how = rng.choice(["no weights", "cut", "NaN", "one matrix less", "one layer less", "unknown layer", "shape", "no base",
                      "other base", "garbage config", "DoRA", "no alpha", "alpha as text", "list config"])
    if how == "no weights":
        file.unlink()
    elif how == "cut":
        os.truncate(file, rng.randrange(1, os.path.getsize(file)))
    elif how in ("no base", "other base", "DoRA", "no alpha", "alpha as text", "garbage config", "list config"):
        config |= {"no base": {"base_model_name_or_path": str(folder / "nosuch")}, "DoRA": {"use_dora": True}, "alpha as text":
                   {"lora_alpha": "x"}, "other base": {"base_model_name_or_path": str(folder.parents[1] / "neox")}}.get(how, {})
        if how == "no alpha":
            del config["lora_alpha"]
        config_file.write_text({"garbage config": "{not", "list config": "[]"}.get(how) or json.dumps(config))
    else:
        if how == "NaN":
            tensors[name].view(-1)[0] = float("nan")
        elif how == "one matrix less":
            del tensors[name]
        elif how == "one layer less":
            layer = name.rpartition(".lora_")[0]
            tensors = {key: value for key, value in tensors.items() if not key.startswith(layer)}
        elif how == "unknown layer":
            tensors[name.replace("layers.0", "layers.7").replace("layers.1", "layers.8")] = tensors.pop(name)
        else:
            tensors[name] = torch.zeros(2, 3)
        save_file(tensors, file, {"format": "pt"})
    return f"adapter, {how}"


@kind(4)
def encoders(rng, box, folder):
    """The encoder is damaged, or is of another kind."""
    how = rng.choice(["weights", "tokenizer", "absent", "a causal student"])
    copy, refuse = folder / "encoder", True
    shutil.copytree(box.encoder, copy)
    what = how
    if how == "weights":
        what = damage_weights(rng, copy)
    elif how == "tokenizer":
        (copy / "tokenizer.json").write_text("{}")
    elif how == "absent":
        copy = folder / "nosuch"
    else:  # a causal student has hidden states as well
        copy, refuse = box.students[0], False
    return Case("distill", box.training(folder / "run", "--encoder", str(copy)), f"encoder, {what}", refuse)


# ---------------------------------------------------------------- run folders
RUN_DAMAGE = ["args garbage", "args list", "args empty", "args lacks a flag", "args deleted", "args null", "args type",
              "checkpoint cut", "checkpoint empty", "checkpoint garbage", "checkpoint of another run", "log deleted",
              "log torn within", "log shorter", "log torn after", "pool changed", "test changed", "pool deleted",
              "student changed", "tokenizer changed", "contradiction", "nothing"]


@kind(12)
def resumes(rng, box, folder):
    """A run is resumed after something in its folder, or that it hangs on, has changed."""
    own = SimpleNamespace(pool=folder / "pool.jsonl", test=folder / "test.jsonl", student=folder / "student")
    shutil.copy(box.pool, own.pool)
    shutil.copy(box.test, own.test)
    shutil.copytree(box.students[0], own.student)
    run = folder / "run"
    how = rng.choice(RUN_DAMAGE)
    stopped = Box.stopped_run
    training = box.training(run, "--save_every", "2", students=[str(own.student), box.students[1]], pool=own.pool, test=own.test)
    stopped(SimpleNamespace(training=lambda out, *more: training), run)
    more, refuse = [], True
    args, checkpoint, log = run / "args.json", run / "checkpoint.safetensors", run / "log.jsonl"
    if how.startswith("args"):
        saved = json.loads(args.read_text())
        saved.pop(rng.choice(sorted(saved)))
        texts = {"garbage": "{not", "list": "[1]", "empty": "", "null": "null", "type": json.dumps({**saved, "batch_size": "x"})}
        args.write_text(texts.get(how.split()[1], json.dumps(saved)))
        if how == "args deleted":
            args.unlink()
    elif how == "checkpoint of another run":
        shutil.copy(box.run / "checkpoint.safetensors", checkpoint)
    elif how == "checkpoint garbage":
        checkpoint.write_bytes(rng.randbytes(2000))
    elif how.startswith("checkpoint"):
        os.truncate(checkpoint, 0 if how.endswith("empty") else rng.randrange(1, os.path.getsize(checkpoint)))
    elif how == "log deleted":
        log.unlink()
    elif how.startswith("log"):
        lines = log.read_text().splitlines()
        refuse = how != "log torn after"  # what a kill leaves behind the last checkpoint
        log.write_text({"log torn within": lines[0][:20] + "\n" + lines[1], "log shorter": lines[0]}.get(
            how, log.read_text() + lines[0][:30]))
    elif how in ("pool changed", "test changed"):
        file = own.pool if how.startswith("pool") else own.test
        file.write_text(file.read_text().replace("has", "had", 1).replace("many", "few"))
    elif how == "pool deleted":
        own.pool.unlink()
    elif how == "student changed":
        file, tensors = tensors_of(own.student)
        next(iter(tensors.values())).add_(0.1)
        save_file(tensors, file, {"format": "pt"})
    elif how == "tokenizer changed":
        (own.student / "chat_template.jinja").write_text("{% for m in messages %}<{{ m.role }}>{{ m.content }}<eos>{% endfor %}")
    elif how == "contradiction":
        more = rng.choice([["--batch_size", "3"], ["--seed", "5"], ["--lr", "1"], ["--gate", "binary"]])
    else:
        refuse = False
    return Case("distill", ["--resume", str(run), *more], f"resume, {how}", refuse)


@kind(4)
def plots(rng, box, folder):
    """eval.py --plot of a folder that is damaged or no run."""
    run = folder / "run"
    shutil.copytree(box.finished, run)
    how = rng.choice(["whole", "log garbage", "log empty", "args list", "results list", "no log", "no args", "rates differ",
                      "rates text", "absent", "a file", "step text"])
    log = run / "log.jsonl"
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    if how.startswith("rates"):
        lines[-1] |= {"rate": [1.0] * 5 if how.endswith("differ") else "x"}
    elif how == "step text":
        lines[0]["step"] = "first"
    elif how == "log garbage":
        log.write_text("{not\n")
    elif how == "log empty":
        log.write_text("")
    elif how in ("args list", "results list"):
        (run / f"{how.split()[0]}.json").write_text("[]")
    elif how in ("no log", "no args"):
        (run / ("log.jsonl" if how.endswith("log") else "args.json")).unlink()
    if how.startswith(("rates", "step")):
        write(log, lines)
    target = {"absent": folder / "nosuch", "a file": log}.get(how, run)
    return Case("eval", ["--plot", str(target)], f"plot, {how}", how != "whole")


# ---------------------------------------------------------------- flags and outputs
BAD = {
    "count": ["0", "-1", "x", "", "1.5", "nan", "inf", "1e3", " "], "natural": ["-1", "x", "", "1.5", "nan", "inf"],
    "share": ["-0.1", "1.1", "x", "", "nan", "inf", "-inf"], "positive": ["-1", "0", "x", "", "nan", "inf", "1e999"],
    "weight": ["-1", "x", "", "nan", "inf", "-inf"], "choice": ["nosuch", "", "ALL", "0"], "file": ["", "nosuch.jsonl", "/", "x" * 300],
}
FLAGS = {
    "distill": {"count": ["--batch_size", "--max_steps", "--epochs", "--save_every", "--max_len", "--eval_max_new_tokens",
                          "--micro_batch_size"],
                "natural": ["--seed", "--lora_rank", "--eval_limit", "--router_hidden"], "share": ["--probe", "--train_frac"],
                "positive": ["--lr"], "weight": ["--mutual_weight", "--entropy_weight", "--router_lr"],
                "choice": ["--route", "--gate", "--reward", "--filter", "--normalize", "--competence", "--projection", "--entropy",
                           "--dtype", "--styles", "--device"],
                "file": ["--paths", "--eval_questions", "--resume", "--encoder"]},
    "judge": {"count": ["--samples", "--max_new_tokens", "--concurrency", "--batch_size"],
              "natural": ["--canaries", "--retries", "--max_calls", "--max_tokens_total"], "weight": ["--temperature"],
              "positive": ["--timeout"], "choice": ["--styles", "--task"], "file": ["--paths"]},
    "eval": {"count": ["--samples", "--max_new_tokens", "--batch_size", "--limit"], "natural": ["--show"],
             "weight": ["--temperature"], "choice": ["--task", "--device"], "file": ["--questions"]},
}


def good_argv(command, box, folder):
    if command == "distill":
        return box.training(folder / "run")
    if command == "judge":
        return ["--paths", box.pool, "--judge", "none", "--out", str(folder / "out.jsonl")]
    return ["--students", box.students[0], "--questions", box.test, "--max_new_tokens", "2", "--limit", "1", "--device", "cpu"]


@kind(16)
def flags(rng, box, folder):
    """A flag's value is out of range, of another type or empty."""
    command = rng.choice(list(FLAGS))
    sort = rng.choice(list(FLAGS[command]))
    flag, value = rng.choice(FLAGS[command][sort]), rng.choice(BAD[sort])
    argv = [*good_argv(command, box, folder), flag, value]
    if flag == "--resume":
        argv = [flag, value]
    return Case(command, argv, f"{flag} {value[:20]!r}")


@kind(8)
def combinations(rng, box, folder):
    """Flags that contradict each other, lack their value, or are unknown."""
    demo, out = ["--demo", "5", "--out", str(folder / "o.jsonl")], ["--out", str(folder / "o.jsonl")]
    train, student = box.training(folder / "run"), box.students[0]
    command, argv, env = rng.choice([
        ("distill", [*train, "--nosuch"], {}), ("distill", [*train, "--seed"], {}), ("distill", [*train, "--freeze", "2"], {}),
        ("distill", [*train, "--lr", "1e-3", "1e-3", "1e-3"], {}), ("distill", [*train, "--probe", "0"], {}),
        ("distill", [*train, "--normalize", "batch"], {}), ("distill", [*train, "stray"], {}),
        ("distill", [*train, "--quantize", "nf4", "--lora_rank", "0"], {}), ("distill", [*train, "--styles"], {}),
        ("distill", ["--paths", box.arc_test, "--out_dir", str(folder / "run")], {}),
        ("distill", [*train, "--styles", "nosuch"], {}), ("distill", [*train, "--max_len", "3"], {}),
        ("judge", demo[:2], {}), ("judge", out, {}), ("judge", [*demo, "--paths", box.pool], {}),
        ("judge", [*demo, "--judge", "rule", "--accept", "2"], {}), ("judge", [*demo, "--judge", "rule", "--judge", "rule"], {}),
        ("judge", ["--questions", box.test, *out], {}), ("judge", ["--paths", box.pool, "--out", box.pool], {}),
        ("judge", ["--questions", box.test, "--teacher", student, "--judge", "rule", *out], {}),
        ("judge", ["--paths", box.arc_test, "--judge", "rule", *out], {}), ("judge", ["--demo", "0", *out], {}),
        ("judge", ["--demo", "10000000", *out], {}), ("judge", [*demo, "--canaries"], {}), ("judge", [*demo, "--nosuch", "1"], {}),
        ("eval", [], {}), ("eval", ["--students", student], {}), ("eval", ["--questions", box.test], {}), ("eval", ["--plot"], {}),
        ("eval", ["--students", student, "--questions", box.test, "--samples", "3", "--temperature", "0"], {}),
        ("eval", ["--students", "--questions", box.test], {}), ("eval", ["--nosuch"], {}),
    ])
    return Case(command, argv, f"{' '.join(map(str, argv[-4:]))[-80:]} {env or ''}", env=env)


@kind(5)
def specs(rng, box, folder):
    """A teacher or judge whose MODEL@URL cannot be right, or bears a credential."""
    secret = "s3cret-0123456789"
    spec = rng.choice([
        "@http://localhost:1/v1", "m@http://", "m@http://[::1", "m@http://h:notaport/v1", "m@http://h:99999/v1", "m@http:///v1",
        f"m@http://u:{secret}@127.0.0.1:1/v1", *(f"m@http://127.0.0.1:1/v1?{name}={secret}" for name in (
            "key", "apikey", "api-key", "api_key", "access_token", "subscription-key", "token", "sig", "code")),
        f"m@http://127.0.0.1:1/v1#key={secret}", "m@http://127.0.0.1:1/v1"])
    role = rng.choice(["teacher", "judge"])
    source = ["--questions", box.test] if role == "teacher" else ["--paths", box.pool]
    argv = [*source, f"--{role}", spec, "--retries", "0", "--timeout", "5", "--out", str(folder / "o.jsonl")]
    return Case("judge", argv, spec.replace(secret, "SECRET"), secrets=(secret,))


@kind(6)
def outputs(rng, box, folder):
    """What is to be written cannot be written there."""
    (folder / "file").write_text("x")
    (folder / "full").mkdir()
    where = rng.choice([folder / "file" / "x", folder / "full", "/proc/nosuch/x", "x" * 300, "/dev/full", "", folder / "file",
                        folder / "nosuch" / "deep" / "x"])
    command = rng.choice(["distill", "judge", "eval"])
    # distill.py makes its folders; a file that is there is no output of judge.py's and one of eval.py's
    refuse = {"distill": where not in (folder / "full", folder / "nosuch" / "deep" / "x"),
              "judge": True, "eval": where != folder / "file"}[command]
    flag = "--out_dir" if command == "distill" else "--out"
    argv = good_argv(command, box, folder)
    if command == "eval":
        argv += ["--out", ""]
    else:
        argv[argv.index(flag)] = flag
    argv[argv.index(flag) + 1] = str(where)
    if str(where) == "/dev/full" and command == "judge":  # its lock file would lie beside the device
        argv[argv.index(flag) + 1] = str(folder / "full")
    return Case(command, argv, f"{flag} {str(where)[-30:]}", refuse)


# ---------------------------------------------------------------- servers
def reply(content="2 + 2 = 4. This is a whole solution.\nThe answer is 4", reason="stop", **more):
    return {"choices": [{"index": 0, "message": {"role": "assistant", "content": content}, "finish_reason": reason}],
            "usage": {"prompt_tokens": 5, "completion_tokens": 7}, **more}


PARTS = [{"type": "thinking", "thinking": "It may be 5. The answer is 5"}, {"type": "text", "text": "Two and two are 4.\n"},
         {"type": "text", "text": "The answer is 4"}]
WHOLE = {
    "plain": reply(), "content as parts": reply(PARTS), "no usage": reply(usage=None), "usage as a list": reply(usage=[3, 4]),
    "negative usage": reply(usage={"prompt_tokens": -5, "completion_tokens": -7}), "usage as text": reply(usage="many"),
    "more fields": reply(id=None, system_fingerprint={"a": 1}, extra=[None]), "reason eos": reply(reason="eos"),
    "reason end_turn": reply(reason="end_turn"), "reason STOP": reply(reason="STOP"), "huge usage": reply(usage={
        "prompt_tokens": 10**30, "completion_tokens": 1e300}), "surrogate": reply("2 + 2 = 4 \ud800\nThe answer is 4"),
}
CUT = {f"reason {reason}": reply(reason=reason) for reason in (
    "length", "max_tokens", "MAX_TOKENS", "model_length", "error", "abort", "incomplete", "SAFETY", "RECITATION", "tool_calls",
    "model_context_window_exceeded", "content_filter", "nosuch")} | {
    "empty": reply(""), "null content": reply(None), "empty and length": reply("", "length"), "only thinking": reply(PARTS[:1])}
FAULTS = {
    "error object": {"error": {"message": "overloaded"}}, "no choices": {"choices": []}, "null": None, "list": [], "text": "hello",
    "choices null": {"choices": None}, "choice without a message": {"choices": [{"index": 0}]}, "message null":
    {"choices": [{"index": 0, "message": None, "finish_reason": "stop"}]},
}


@kind(8)
def replies(rng, box, folder):
    """A server answers in odd ways: whole replies train, cut and refused ones do not, faults end the run."""
    write(folder / "q.jsonl", [{"id": "1", "task": "gsm8k", "question": "What is 2 + 2?", "answer": "4"}])
    out, status = folder / "out.jsonl", 200
    sort, table = rng.choice([("whole", WHOLE), ("cut", CUT), ("fault", FAULTS), ("bytes", None), ("status", None)])
    if table:
        name = rng.choice(list(table))
        body = json.dumps(table[name]).encode()
    elif sort == "bytes":
        name, body = rng.choice([("HTML", b"<html>"), ("nothing", b""), ("cut", json.dumps(reply()).encode()[:50]),
                                 ("random", rng.randbytes(100)), ("BOM", b"\xef\xbb\xbf" + json.dumps(reply()).encode())])
        sort = "whole" if name == "BOM" else "fault"
    else:
        status = rng.choice([401, 403, 404, 429, 500, 503])
        name, body, sort = str(status), f'{{"error": {{"message": "bad key {KEY}"}}}}'.encode(), "fault"
    box.server.reply = status, body

    def check():
        if any(KEY in file.read_text(errors="replace") for file in folder.rglob("*") if file.is_file()):
            return "the key is on disk"
        rows = list(judge.pool_rows(str(out))) if out.exists() else []
        if sort == "fault":
            return None
        if len(rows) != 1:
            return f"{len(rows)} rows instead of 1"
        fate = judge.fate(judge.grade_paths(rows)[0], "answer")
        return (fate == "kept") != (sort == "whole") and f"{fate}, but the reply is {sort}"
    argv = ["--questions", str(folder / "q.jsonl"), "--teacher", f"m@http://127.0.0.1:{box.server.server_port}/v1", "--styles",
            "vanilla", "--retries", "0", "--timeout", "20", "--out", str(out)]
    return Case("judge", argv, f"{sort} reply, {name}", sort == "fault", check, {"OPENAI_API_KEY": KEY})
