"""Bad input, generated: what distill.py, judge.py and eval.py do with 1,000 inputs of which most are damaged.

    python tests/bench/fuzz.py [--cases 1000] [--seed 0] [--workers 2] [--kinds rows flags]
    python tests/bench/fuzz.py --only 17        # one case again, with all that it printed

fuzz_kinds.py makes the cases; each says what is right for it: to be refused, which is exit code 2 and one
line on stderr that begins with "error:", or to be accepted and read in a certain way. Counted are tracebacks,
cases accepted that are wrong, cases refused that are right, cases read in another way, unclean refusals, and
cases that take longer than a minute. All commands run in this process's children, on tiny random models.
"""
import argparse
import contextlib
import io
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from unittest import mock

# before any library is imported, in the workers too; a server on this machine is not the hub
os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import fuzz_kinds

import eval as tasks

SECONDS = 60  # that a case may take
CLEAN = {"refused", "accepted"}
box = None  # of a worker: the good files that cases damage


class Hangs(Exception):
    """A case took longer than SECONDS."""


def hangs(*_):
    raise Hangs


# ---------------------------------------------------------------- one case
def call(case):
    """Run a case's command -> (exit code, or None after a traceback; its output with any traceback)."""
    import distill
    import judge
    commands = {"distill": distill.main, "judge": judge.main, "eval": tasks.main}
    out = io.TextIOWrapper(io.BytesIO(), "utf-8")
    code = 0
    signal.alarm(SECONDS)
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out), mock.patch.dict(os.environ, case.env), \
            mock.patch.object(sys, "argv", [f"{case.command}.py", *case.argv]):
        try:
            commands[case.command]()
        except SystemExit as e:
            code = e.code if isinstance(e.code, int) else int(e.code is not None)
        except BaseException:  # noqa: BLE001 (a traceback is what is looked for)
            traceback.print_exc()
            code = None
        finally:
            signal.alarm(0)
    out.flush()
    return code, out.buffer.getvalue().decode()


def verdict(case, code, text):
    """What a case came to -> (one or two words, more on it)."""
    errors = [line for line in text.splitlines() if line.startswith("error:")]
    if code is None:
        last = text.strip().splitlines()[-1]
        return "hangs" if "Hangs" in last else "traceback", last
    if any(secret in text for secret in case.secrets):
        return "key printed", ""
    if code == 0:
        if case.refuse:
            return "wrongly accepted", ""
        wrong = case.check() if case.check else None
        return ("read in another way", wrong) if wrong else ("accepted", "")
    if code != 2 or len(errors) != 1 or len(errors[0]) > 1000:
        return "unclean refusal", f"exit code {code}, {len(errors)} error lines"
    if case.refuse is False:
        return "wrongly refused", errors[0]
    wrong = case.check() if case.check else None
    return ("read in another way", wrong) if wrong else ("refused", errors[0])


def begin(folder):
    """Start of a worker: quiet libraries, good files."""
    global box
    os.environ["XDG_CACHE_HOME"] = f"{folder}/cache"
    import transformers
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    signal.signal(signal.SIGALRM, hangs)
    path = Path(tempfile.mkdtemp(dir=folder))
    os.chdir(path)
    box = fuzz_kinds.Box(path)


def run_case(number, seed, kinds):
    """-> (number, kind, what, verdict, more, output, seconds)."""
    rng = random.Random(f"{seed} {number}")
    folder = Path("case").absolute()
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    case = fuzz_kinds.make(rng, box, folder, kinds)
    began = time.time()
    code, text = call(case)
    result, more = verdict(case, code, text)
    return number, case.kind, f"{case.command}: {case.what}", result, more, text, time.time() - began


# ---------------------------------------------------------------- all
def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.error = tasks.stop
    p.add_argument("--cases", type=int, default=1000, help="how many (1000)")
    p.add_argument("--seed", type=int, default=0, help="of the cases (0)")
    p.add_argument("--workers", type=int, default=os.cpu_count(), help="processes (one a core)")
    p.add_argument("--kinds", nargs="+", choices=fuzz_kinds.KINDS, default=list(fuzz_kinds.KINDS), help="(all)")
    p.add_argument("--only", type=int, metavar="N", help="case N alone, with its output")
    args = p.parse_args()
    numbers = range(args.cases) if args.only is None else [args.only]
    counts, seconds, failed = {kind: Counter() for kind in args.kinds}, Counter(), []
    began = time.time()
    with tempfile.TemporaryDirectory() as folder, ProcessPoolExecutor(
            args.workers, multiprocessing.get_context("spawn"), initializer=begin, initargs=(folder,)) as pool:
        waiting = [pool.submit(run_case, number, args.seed, tuple(args.kinds)) for number in numbers]
        for done in waiting:
            number, kind, what, result, more, text, took = done.result()
            counts[kind][result] += 1
            seconds[kind] += took
            if result not in CLEAN or args.only is not None:
                failed.append(f"{number:5} {kind}, {what}: {result}; {more}"[:400])
            if args.only is not None:
                print(text)
    print("\n".join(failed))
    names = ["refused", "accepted", *sorted({name for c in counts.values() for name in c} - CLEAN)]
    print(f"\n{'kind':12}{'cases':>7}" + "".join(f"{name:>21}" for name in names) + f"{'seconds':>9}")
    counts["all"], seconds["all"] = sum(counts.values(), Counter()), time.time() - began
    for kind, count in counts.items():
        print(f"{kind:12}{count.total():7}" + "".join(f"{count[name]:21}" for name in names) + f"{seconds[kind]:9.0f}")
    raise SystemExit(any(name not in CLEAN for name in counts["all"]))


if __name__ == "__main__":
    main()
