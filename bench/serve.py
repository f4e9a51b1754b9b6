"""The served model under load: clients that ask at the same time, through the OpenAI client.

    python -m bench serve ROWS.jsonl --adapter DIR

`descgen serve` starts the engine in a process of its own. A client asks for the next title when it has its answer.
Answers are greedy. The first request warms the engine up and does not count. Then one client asks alone, then all of
them at once.
"""
import os
import signal
import socket
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Thread

from .markdown import circumstances, markdown_table
from .measure import ROOT, read_jsonl, save_result

def add_options(parser):
    parser.add_argument("rows", type=Path)
    parser.add_argument("--adapter", type=Path, required=True, help="of the embedded model, trained without sources")
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--requests", type=int, default=64, help="of all clients together")
    parser.add_argument("--alone", type=int, default=8, help="requests of one client alone")
    parser.add_argument("--new-tokens", type=int, default=128, help="most tokens of a text")

def free_port():
    "A port that no program listens at"
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return probe.getsockname()[1]

@contextmanager
def served(adapter, folder):
    "The address of a served model"
    port = free_port()
    words = ["serve", "--adapter", str(adapter.resolve()), "--out", f"{folder}/merged", "--port", str(port)]
    command = [sys.executable, "-c", "from descgen.cli import app; app()", *words]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True,
                               env=os.environ | {"HF_HUB_OFFLINE": "1"})
    try:
        # the last line that it prints when it is ready
        if not any(line.startswith("print(") for line in process.stdout):
            raise SystemExit("The server ended.")
        Thread(target=process.stdout.read, daemon=True).start() # a full pipe would stop it
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait()

def ask(api, title, tokens):
    "Seconds, tokens and the error, if any, of one request"
    from descgen.formatting import chat_messages
    start = time.perf_counter()
    try:
        answer = api.chat.completions.create(model="merged", messages=chat_messages(title),
                                             max_tokens=tokens, temperature=0)
    except Exception as error:
        return time.perf_counter() - start, 0, repr(error)
    return time.perf_counter() - start, answer.usage.completion_tokens, None

def load(api, titles, clients, tokens):
    "What so many clients get"
    start = time.perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        waited, written, errors = zip(*pool.map(lambda title: ask(api, title, tokens), titles))
    took = time.perf_counter() - start
    return {"clients": clients, "requests": len(titles), "failed": len([e for e in errors if e]),
            "per_minute": 60*len(titles)/took, "tokens_per_second": sum(written)/took,
            "median_seconds": statistics.median(waited), "longest_seconds": max(waited)}

def run(args):
    from openai import OpenAI
    titles = [row["title"] for row in read_jsonl(args.rows)[:args.requests]]
    with TemporaryDirectory() as folder, served(args.adapter, folder) as address:
        api = OpenAI(base_url=address, api_key="none", max_retries=0, timeout=1800)
        ask(api, titles[0], args.new_tokens)
        found = [load(api, titles[:args.alone], 1, args.new_tokens), load(api, titles, args.clients, args.new_tokens)]
    save_result(args.results, "serve", {"new_tokens": args.new_tokens, "loads": found})

def tables(read):
    record = read("serve")
    if not record:
        return {}
    s = record["summary"]
    rows = [[one["clients"], one["requests"], one["failed"], f"{one['per_minute']:.1f}",
             f"{one['tokens_per_second']:.0f}", f"{one['median_seconds']:.1f} s", f"{one['longest_seconds']:.1f} s"]
            for one in s["loads"]]
    head = ["clients", "requests", "failed", "answers per minute", "tokens per second", "median wait", "longest wait"]
    about = f"Greedy, at most {s['new_tokens']} tokens. {circumstances(record, 'torch', 'transformers')}"
    return {"serve": [about, "", *markdown_table(head, rows)]}
