"""Speed and memory of two versions of this code, and of TRL, measured turn and turn about in one run.

    python tests/bench/speed.py --against FOLDER --model smollm2 --dtype float32
    python tests/bench/speed.py --trl --model gemma3 --dtype bf16 --parts train --json speed.jsonl

FOLDER is another checkout of this repository (git worktree add FOLDER COMMIT). Every measurement is a
process of its own, which loads the code of one side; the sides take turns, --repeats times. Printed are
the median of each side, and this checkout's divided by the other's: speeds are better above 1, seconds
and memory below. --json FILE adds a line for each measurement. Nothing else may run on the machine.

train    one student with LoRA on six GSM8K paths a step: trained response tokens a second (median of
         five steps after two), and the process's highest memory
method   the same with both students, the learned router and the collaboration
answers  up to 100 tokens to each of 64 GSM8K questions, untrained, 32 at a time: tokens a second
demo     `python distill.py --max_steps 152` as a command, its students in the cache: seconds

QRD_MODELS holds the folders smollm2 and gemma3, QRD_DATA the folders paths and original. TRL (pip install
trl peft datasets) trains the same LoRA on the same tokens with its own fused loss, grouped by length.
"""
import argparse
import contextlib
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve()
PARTS = ["train", "method", "answers", "demo"]
WARM_UP, STEPS, PATHS = 2, 5, 6
LORA_RANK = 32


# ---------------------------------------- one measurement, in a process of its own
def train(args, folder):
    """Steps of distill.py -> trained response tokens a second."""
    import distill

    pool, test = six_paths(folder)
    flags = ["--paths", pool, "--eval_questions", test, "--filter", "answer", "--dtype", args.dtype,
             "--max_steps", str(WARM_UP + STEPS), "--eval_max_new_tokens", "1", "--device", args.device,
             "--lora_rank", str(LORA_RANK), "--out_dir", f"{folder}/run"]
    if args.part == "train":
        flags += ["--students", str(model_folder(args.model)), "--route", "all", "--mutual_weight", "0"]
    else:
        flags += ["--students", str(model_folder("smollm2")), str(model_folder("gemma3"))]
    with contextlib.redirect_stdout(None):
        distill.main(flags)
    log = [json.loads(line) for line in Path(f"{folder}/run/log.jsonl").read_text().splitlines()]
    return statistics.median(line["tokens_per_s"] for line in log[WARM_UP:])


def six_paths(folder):
    """Files of six right GSM8K paths, and of a question that none of them answers."""
    import judge

    data = Path(os.environ["QRD_DATA"])
    with open(data / "paths" / "gsm8k.jsonl", encoding="utf-8") as file:
        rows = judge.grade_paths([json.loads(next(file)) for _ in range(100)])
    right = [row for row in rows if row["correct"]][:PATHS]
    pool, test = Path(folder) / "pool.jsonl", Path(folder) / "test.jsonl"
    pool.write_text("".join(json.dumps(row) + "\n" for row in right))
    other = {key: rows[-1][key] for key in ("id", "task", "question", "answer")}
    test.write_text(json.dumps(other) + "\n")
    return str(pool), str(test)


def answers(args, folder):
    """Answers of the untrained student -> new tokens a second, of the call alone."""
    import torch

    import eval as tasks

    dtype = {"float32": torch.float32, "bf16": torch.bfloat16}[args.dtype]
    model, tokenizer = tasks.load_student(str(model_folder(args.model)), args.device, dtype)
    file = Path(os.environ["QRD_DATA"]) / "original" / "gsm8k_test.jsonl"
    questions = tasks.read_questions(str(file), "gsm8k")[:64]
    prompts = [tasks.encode_prompt(tokenizer, tasks.student_prompt(row)) for row in questions]
    began = time.perf_counter()
    found = tasks.generate(model, tokenizer, prompts, 100, batch_size=32)
    seconds = time.perf_counter() - began
    # Up to commit e4ba344 each prompt had a list of samples.
    return sum((x[0] if isinstance(x, list) else x)["tokens"] for x in found) / seconds


def demo(args, folder):
    """The demo as a command -> seconds."""
    began = time.perf_counter()
    subprocess.run([sys.executable, Path(args.code) / "distill.py", "--max_steps", "152",
                    "--out_dir", f"{folder}/run"], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - began


def trl(args, folder):
    """Steps of TRL's SFTTrainer with PEFT's LoRA -> trained response tokens a second. Under bf16 its
    weights are in bfloat16, too."""
    import datasets
    import torch
    import transformers
    from peft import LoraConfig
    from trl import SFTConfig, SFTTrainer

    import eval as tasks

    seconds = []  # of the optimiser steps alone, not of train()'s start and end
    class Watch(transformers.TrainerCallback):
        def on_step_begin(self, *_, **__):
            self.began = time.perf_counter()

        def on_step_end(self, *_, **__):
            seconds.append(time.perf_counter() - self.began)

    source, bf16 = str(model_folder(args.model)), args.dtype == "bf16"
    model = transformers.AutoModelForCausalLM.from_pretrained(
        source, dtype=torch.bfloat16 if bf16 else torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    rows, tokens = [], 0
    for row in tasks.read_jsonl(six_paths(folder)[0]):
        prompt = tasks.encode_prompt(tokenizer, tasks.student_prompt(row))
        text = tokenizer(row["path"], add_special_tokens=False).input_ids
        response = [*text, tasks.end_token(tokenizer)]
        rows.append({"input_ids": prompt + response, "labels": [-100] * len(prompt) + response})
        tokens += len(response)
    config = SFTConfig(
        output_dir=f"{folder}/run", max_steps=WARM_UP + STEPS, per_device_train_batch_size=3,
        gradient_accumulation_steps=PATHS // 3, train_sampling_strategy="group_by_length", max_length=None,
        gradient_checkpointing=False, bf16=bf16, use_cpu=args.device == "cpu", learning_rate=2e-4,
        logging_strategy="no", save_strategy="no", report_to="none", disable_tqdm=True)
    lora = LoraConfig(r=LORA_RANK, lora_alpha=2 * LORA_RANK, target_modules="all-linear", task_type="CAUSAL_LM")
    # A name of its own: datasets 5.2 cannot hash a table of pyarrow 24 and later under Python 3.11.
    data = datasets.Dataset(datasets.table.InMemoryTable.from_pylist(rows), fingerprint="six_paths")
    with contextlib.redirect_stdout(None):
        SFTTrainer(model, config, train_dataset=data, processing_class=tokenizer, peft_config=lora,
                   callbacks=[Watch()]).train()
    return tokens / statistics.median(seconds[WARM_UP:])


def model_folder(name):
    return Path(os.environ["QRD_MODELS"]) / name


def measure(args):
    """In a child: what was measured is the last line of its text, {name: [value, unit]}."""
    sys.path.insert(0, args.code)
    with tempfile.TemporaryDirectory() as folder:
        function = trl if args.side == "TRL" else {**globals(), "method": train}[args.part]
        value = function(args, folder)
    unit = "s" if args.part == "demo" else "tokens/s"
    measured = {f"{args.part}, {unit}": [value, unit]}
    if args.part in ("train", "method"):
        gigabytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9  # Linux: KB
        measured[f"{args.part}, GB"] = [gigabytes, "GB"]
    print(json.dumps(measured))


# ---------------------------------------- all of them
def child(args, part, side, code):
    """One measurement -> {name: [value, unit]}."""
    command = [sys.executable, HERE, "--part", part, "--side", side, "--code", code, *sys.argv[1:]]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{part} of {side} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def compare(args, part, sides):
    """Measure a part of all sides in turn, print medians and ratios, and keep the values."""
    values = {}  # name -> side -> [values]
    for _ in range(args.repeats + (part == "demo")):  # the demo's first run fills the cache
        for side, code in sides.items():
            for name, (value, unit) in child(args, part, side, code).items():
                values.setdefault((name, unit), {}).setdefault(side, []).append(value)
    for (name, unit), by_side in values.items():
        by_side = {side: found[-args.repeats:] for side, found in by_side.items()}
        medians = {side: statistics.median(found) for side, found in by_side.items()}
        ratios = [f"here / {side} {medians['here'] / medians[side]:.2f}" for side in medians if side != "here"]
        texts = [f"{side} {median:.4g}" for side, median in medians.items()] + ratios
        print(f"{name}, {args.model}, {args.dtype}: {', '.join(texts)}", flush=True)
        for side, found in by_side.items():
            line = {"name": name, "side": side, "model": args.model, "dtype": args.dtype, "unit": unit,
                    "median": medians[side], "values": found, "threads": os.environ.get("OMP_NUM_THREADS", os.cpu_count())}
            if args.json:
                with open(args.json, "a", encoding="utf-8") as file:
                    file.write(json.dumps(line) + "\n")


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--against", metavar="FOLDER", help="another checkout (none)")
    p.add_argument("--trl", action="store_true", help="compare train with TRL, too")
    p.add_argument("--model", choices=["smollm2", "gemma3"], default="smollm2", help="(smollm2)")
    p.add_argument("--dtype", choices=["float32", "bf16"], default="float32", help="(float32)")
    p.add_argument("--device", default="cpu", help="(cpu)")
    p.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="(all)")
    p.add_argument("--repeats", type=int, default=5, help="of each side (5)")
    p.add_argument("--json", metavar="FILE", help="add a line for each measurement")
    for name in ("part", "side", "code"):
        p.add_argument(f"--{name}", help=argparse.SUPPRESS)
    args = p.parse_args()
    if args.part:
        measure(args)
        return
    sides = {"here": str(HERE.parents[2])}
    if args.against:
        sides["there"] = os.path.abspath(args.against)
    for part in args.parts:
        compare(args, part, sides | ({"TRL": sides["here"]} if args.trl and part == "train" else {}))


if __name__ == "__main__":
    main()
