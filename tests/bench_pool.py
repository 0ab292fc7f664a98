"""100,000 rows: memory while sampling and grading, and how soon a resumed run asks its first question.

    python tests/bench_pool.py [--rows 100000] [--fresh 5000]      # Linux; a loopback server answers at once
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

JUDGE = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "judge.py")
TEXT = "We add the numbers of the question one by one. " * 6 + "\nThe answer is 2"
parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--rows", type=int, default=100_000, help="rows of the pool at the end")
parser.add_argument("--fresh", type=int, default=5_000, help="of these, rows that the resumed run samples")
args = parser.parse_args()
first_call = []


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def do_POST(self):
        first_call.append(time.time()) if not first_call else None
        self.rfile.read(int(self.headers["Content-Length"]))
        body = json.dumps({"choices": [{"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": TEXT}}],
                           "usage": {"prompt_tokens": 60, "completion_tokens": 70}}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def watch(*argv):
    """Run judge.py; returns its seconds and its resident memory in MB every half second."""
    start, memory = time.time(), []
    process = subprocess.Popen([sys.executable, JUDGE, *argv], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                               env={**os.environ, "HF_HUB_OFFLINE": "0"})
    while process.poll() is None:
        time.sleep(0.5)
        try:
            with open(f"/proc/{process.pid}/status") as file:
                memory += [int(line.split()[1]) // 1024 for line in file if line.startswith("VmRSS")]
        except OSError:
            pass
    assert process.returncode == 0
    return start, time.time() - start, memory


server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
server.daemon_threads = True
threading.Thread(target=server.serve_forever, daemon=True).start()
with tempfile.TemporaryDirectory() as folder:
    os.chdir(folder)
    questions = [{"id": f"q{i}", "task": "gsm8k", "question": f"What is 1 + 1, time {i}? " + "It is easy. " * 15, "answer": "2"}
                 for i in range(args.rows // 50)]
    with open("q.jsonl", "w") as file:
        file.writelines(json.dumps(row) + "\n" for row in questions)
    for rows in (args.fresh, args.rows):
        with open("p.jsonl", "w") as file:
            done = [(row, s) for row in questions for s in range(50)][:rows - args.fresh]
            file.writelines(json.dumps({**row, "style": "vanilla", "teacher": "m", "sample": s, "path": TEXT, "finish_reason": "stop",
                                        "usage": {"prompt_tokens": 60, "completion_tokens": 70}}) + "\n" for row, s in done)
        first_call.clear()
        start, seconds, memory = watch("--questions", "q.jsonl", "--teacher", f"m@http://127.0.0.1:{server.server_port}", "--styles",
                                       "vanilla", "--samples", "50", "--concurrency", "16", "--max_calls", str(args.fresh),
                                       "--out", "p.jsonl")
        late = memory[int((first_call[0] - start) * 2) + 1:]
        quarters = [late[min(len(late) - 1, len(late) * k // 4)] for k in range(5)]
        print(f"sampling on from {rows - args.fresh:>7} rows: first call after {first_call[0] - start:5.1f} s (imports included), "
              f"{args.fresh / (start + seconds - first_call[0]):.0f} calls/s, MB resident at 0, 25, 50, 75, 100 %: {quarters}")
        os.path.exists("g.jsonl") and os.remove("g.jsonl")
        start, seconds, memory = watch("--paths", "p.jsonl", "--out", "g.jsonl")
        print(f"grading {rows:>7} rows: {seconds:5.1f} s, MB resident at most {max(memory)}")
