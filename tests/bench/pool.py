"""100,000 rows: memory while sampling and grading, and how soon a resumed run asks its first question.

    python tests/bench/pool.py [--rows 100000] [--fresh 5000]   # Linux; a loopback server answers at once
"""
import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

JUDGE = Path(__file__).resolve().parents[2] / "judge.py"
SAMPLES = 50  # paths of a question
TEXT = "We add the numbers of the question one by one. " * 6 + "\nThe answer is 2"
REPLY = {"choices": [{"index": 0, "finish_reason": "stop",
                      "message": {"role": "assistant", "content": TEXT}}],
         "usage": {"prompt_tokens": 60, "completion_tokens": 70}}


class Server(ThreadingHTTPServer):
    """A chat endpoint on a free port that gives one reply; first_call: when it was first asked."""
    daemon_threads = True
    first_call = None

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args):
            pass

        def do_POST(self):
            self.server.first_call = self.server.first_call or time.time()
            self.rfile.read(int(self.headers["Content-Length"]))
            body = json.dumps(REPLY).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    def __init__(self):
        super().__init__(("127.0.0.1", 0), self.Handler)
        threading.Thread(target=self.serve_forever, daemon=True).start()


def watch(*argv):
    """Run judge.py -> when it started, its seconds, and [(time, resident MB)] every half second."""
    start, memory = time.time(), []
    process = subprocess.Popen([sys.executable, JUDGE, *argv], env={**os.environ, "HF_HUB_OFFLINE": "0"},
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None:
        time.sleep(0.5)
        try:
            status = Path(f"/proc/{process.pid}/status").read_text()
        except OSError:  # it has ended
            continue
        memory += [(time.time(), int(line.split()[1]) // 1024) for line in status.splitlines()
                   if line.startswith("VmRSS")]
    assert process.returncode == 0
    return start, time.time() - start, memory


def question(i):
    return {"id": f"q{i}", "task": "gsm8k", "answer": "2",
            "question": f"What is 1 + 1, time {i}? " + "It is easy. " * 15}


def write_pool(file, questions, rows):
    """A pool of the first `rows` replies, as a run that was stopped leaves it."""
    jobs = [(row, sample) for row in questions for sample in range(SAMPLES)][:rows]
    with open(file, "w") as out:
        for row, sample in jobs:  # noqa: FURB122
            out.write(json.dumps({**row, "style": "vanilla", "teacher": "m", "sample": sample, "path": TEXT,
                                  "finish_reason": "stop", "usage": REPLY["usage"]}) + "\n")


def measure(server, questions, rows, fresh):
    """Sample the last `fresh` of `rows` paths, then grade them all; print both."""
    write_pool("p.jsonl", questions, rows - fresh)
    Path("p.jsonl.calls.jsonl").unlink(missing_ok=True)  # the book of the calls of another pool
    server.first_call = None
    start, seconds, memory = watch(
        "--questions", "q.jsonl", "--teacher", f"m@http://127.0.0.1:{server.server_port}", "--styles", "vanilla",
        "--samples", str(SAMPLES), "--concurrency", "16", "--max_calls", str(rows), "--out", "p.jsonl")
    waited = server.first_call - start
    late = [size for when, size in memory if when > server.first_call]
    quarters = [late[min(len(late) - 1, len(late) * k // 4)] for k in range(5)]
    print(f"sampling on from {rows - fresh:>7} rows: first call after {waited:5.1f} s (imports included), "
          f"{fresh / (seconds - waited):.0f} calls/s, MB resident at 0, 25, 50, 75, 100 %: {quarters}")
    Path("g.jsonl").unlink(missing_ok=True)
    _, seconds, memory = watch("--paths", "p.jsonl", "--out", "g.jsonl")
    print(f"grading {rows:>7} rows: {seconds:5.1f} s, MB resident at most {max(size for _, size in memory)}")


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--rows", type=int, default=100_000, help="rows of the pool at the end (100000)")
    p.add_argument("--fresh", type=int, default=5_000, help="of these, rows that the resumed run samples (5000)")
    args = p.parse_args()
    server = Server()
    questions = [question(i) for i in range(args.rows // SAMPLES)]
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        Path("q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in questions))
        for rows in (args.fresh, args.rows):
            measure(server, questions, rows, args.fresh)


if __name__ == "__main__":
    main()
