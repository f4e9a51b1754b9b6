"""The real `transformers serve` gives the texts of `Describer`, to many clients at once.

The model is random and has two layers, so its texts mean nothing. What is compared is the whole way: command, export, chat
template, tokens, greedy choice, streaming, and the end of the process. Speed and quality of a real model are not tested.
"""
import re, shlex, signal, socket, subprocess, sys, time, urllib.request
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from types import SimpleNamespace

import psutil, pytest
from openai import OpenAI

from bench.serve import free_port
from conftest import ROOT, start_descgen
from descgen.chapter import HOSTILE_TEXTS

pytestmark = pytest.mark.slow
CLIENTS, REQUESTS, TOKENS = 32, 128, 24
TITLES = ["Red Ceramic Mug 350 ml", "  Garden Hose, 20 m ", "Küchenmesser", "…", "杯子"]

def random_adapter(folder, base):
    "Save an adapter with random weights and an index of sources"
    import torch
    from descgen.checkpoints import save_adapter
    from descgen.dataset import load_data
    from descgen.model import LoraSettings, add_lora, load_model
    from descgen.sources import Sources, write_sources
    from descgen.targets import Grounding
    index = Sources(write_sources(load_data(ROOT/"data/sample.jsonl").train, folder.parent/"index"))
    model, tokenizer = load_model(base, dtype="float32")
    model = add_lora(model, LoraSettings(r=2, gradient_checkpointing=False))
    generator = torch.Generator().manual_seed(1)
    for name, weights in model.named_parameters():
        if "lora_B" in name:
            weights.data.normal_(0, 0.1, generator=generator)
    return save_adapter(model, tokenizer, folder, base, "float32", Grounding(index, n_sources=2, language="en"))

def read_until_usage(process):
    "What a server prints until the lines that say how to ask it are complete"
    lines = []
    for line in process.stdout:
        lines.append(line)
        if line.startswith("print("):
            return "".join(lines)
    pytest.fail("the server ended: " + "".join(lines)[-2000:])

def stop(process):
    "End a server, and return its exit status"
    children = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert not psutil.wait_procs(children, timeout=10)[1], "the engine lives on"
    return process.returncode

@pytest.fixture(scope="module")
def adapter(small, tmp_path_factory):
    return random_adapter(tmp_path_factory.mktemp("run")/"adapter", small["model_id"])

@pytest.fixture(scope="module")
def server(adapter):
    "A served float32 model; the adapter's own default would be a 16-bit type"
    from descgen.export import export
    export(adapter, "merged", adapter.parent/"merged", dtype="float32")
    port = free_port()
    process = start_descgen("serve", "--adapter", adapter, "--port", port, "--engine", "transformers")
    printed = read_until_usage(process)
    api = OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0, timeout=300)
    yield SimpleNamespace(port=port, printed=printed, api=api)
    assert stop(process) == 128 + signal.SIGTERM
    with socket.create_server(("127.0.0.1", port)): # the port is free again
        pass

@pytest.fixture(scope="module")
def describer(adapter):
    "Leaves sentences out as a client does, and does not write them again"
    from descgen.describer import Describer
    loaded = Describer(adapter, load_in_4bit=False)
    loaded.checks = replace(loaded.checks, attempts=0)
    return loaded

def ask(server, title, tokens=TOKENS, **options):
    "A greedy answer, or a stream of it"
    from descgen.formatting import chat_messages
    return server.api.chat.completions.create(
        model="merged", messages=chat_messages(title.strip()), max_tokens=tokens, temperature=0, **options)

def text_of(answer):
    return answer.choices[0].message.content.strip()

@pytest.fixture(scope="module")
def expected(describer):
    "The greedy texts from titles alone"
    from descgen.inference import Sampling, describe
    texts = describe(describer.model, describer.tokenizer, TITLES, describer.parts,
                     Sampling(TOKENS, greedy=True), progress=False)
    assert len(set(texts)) > 1
    return texts

def test_greedy_texts_are_those_of_the_adapter(server, expected):
    answers = [ask(server, title) for title in TITLES]
    assert [text_of(answer) for answer in answers] == expected
    assert {answer.choices[0].finish_reason for answer in answers} <= {"stop", "length"}

def test_streamed_text_is_the_whole_text(server, expected):
    for title, text in zip(TITLES, expected):
        pieces = [chunk.choices[0].delta.content or "" for chunk in ask(server, title, stream=True)]
        assert len(pieces) > 3
        assert "".join(pieces).strip() == text

def test_client_with_sources_writes_what_the_describer_writes(server, adapter, describer):
    from descgen.inference import Sampling
    from descgen.server import Client
    client, titles = Client(adapter, server.api), ["Kettlewick 8-Cup Coffeemaker", *TITLES]
    described = describer.describe(titles, Sampling(TOKENS, greedy=True), progress=False)
    assert [len(one.sources) for one in described].count(2) >= 2
    assert [client.describe(title, max_tokens=TOKENS, temperature=0) for title in titles] == described

def test_hostile_titles_stay_text(server, adapter, describer):
    "A title is text for the server too; text with control tokens is answered with a space in them"
    from descgen.inference import Sampling
    from descgen.server import Client, without_control
    client, titles = Client(adapter, server.api), [f"Red Mug {text}" for text in HOSTILE_TEXTS]
    described = describer.describe(titles, Sampling(8, greedy=True), progress=False)
    answered = [client.describe(title, max_tokens=8, temperature=0) for title in titles]
    plain = [title == without_control(title, client.control_tokens) for title in titles]
    assert 0 < sum(plain) < len(titles)
    for title, one, other, is_plain in zip(titles, answered, described, plain):
        assert one.sources == other.sources
        assert not is_plain or one == other, title

def test_printed_requests_work(server):
    curl = next(line for line in server.printed.splitlines() if line.startswith("curl "))
    words = shlex.split(curl)
    body, headers = words[words.index("-d") + 1], dict([words[words.index("-H") + 1].split(": ")])
    url = next(word for word in words if word.startswith("http"))
    with urllib.request.urlopen(urllib.request.Request(url, body.encode(), headers), timeout=300) as answer:
        assert answer.status == 200
    program = server.printed[server.printed.index("from openai"):]
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and done.stdout.strip(), done.stderr[-2000:]

def test_many_clients_at_once(server, expected, capsys):
    def ask_one(n):
        try:
            return text_of(ask(server, TITLES[n % len(TITLES)])) == expected[n % len(TITLES)]
        except Exception as e:
            return repr(e)
    begin = time.perf_counter()
    with ThreadPoolExecutor(CLIENTS) as pool:
        results = list(pool.map(ask_one, range(REQUESTS)))
    rate, failures = REQUESTS/(time.perf_counter() - begin), [r for r in results if r is not True]
    with capsys.disabled():
        print(f"\n{CLIENTS} clients, {REQUESTS} requests of {TOKENS} tokens: "
              f"{rate:.1f} requests per second, failures {len(failures)}")
    assert not failures, failures[:3]

def test_clients_that_leave_do_not_hurt_the_next(server, expected):
    for _ in range(4):
        stream = ask(server, TITLES[0], tokens=1500, stream=True)
        for _, piece in zip(range(3), stream):
            pass
        stream.close()
    impatient = server.api.with_options(timeout=0.05)
    with pytest.raises(Exception, match="timed out"):
        ask(SimpleNamespace(api=impatient), TITLES[0], tokens=200)
    assert text_of(ask(server, TITLES[0])) == expected[0]

def test_second_server_at_the_same_port_is_refused(server, adapter):
    process = start_descgen("serve", "--adapter", adapter, "--port", server.port)
    printed = process.communicate(timeout=120)[0]
    assert process.returncode == 1
    assert re.search(rf"Port {server.port} .*another program.*--port", printed), printed[-2000:]

def test_ctrl_c_ends_the_engine(adapter, server):
    process = start_descgen("serve", "--adapter", adapter, "--port", free_port())
    read_until_usage(process)
    children = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode == 130
    assert not psutil.wait_procs(children, timeout=10)[1], "the engine lives on"
