# SPDX-License-Identifier: Apache-2.0
"""A server under load: `python -m benchmarks.serving [--minutes 60] [--clients 1 4 16] [--questions 96]`.

`hourllava serve` is given the demo's film and is then asked about it by a number of clients at once, each of which asks
again when it has its answer. Beside it, in the same run: what a server without a memory does for every question,
transformers' `generate` on the film itself. The small model answers in a word or two, so that a second table says what
long answers would gain: tokens a second when 1, 4 or 16 are written together.
"""

import argparse
import contextlib
import http.client
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median, quantiles

import torch
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from benchmarks.keep import keep
from benchmarks.whole_path import make
from hourllava.model import HourLlavaProcessor, load_model
from hourllava.serve.batch import DecodingBatch

SHAPES = ("star", "heart", "circle", "square", "triangle", "ring", "moon", "diamond")
QUESTIONS = [f"{what} the {shape}?" for shape in SHAPES for what in ("Which colour was", "Where was")]
MOST = 16  # tokens of an answer
LONG = 64  # and of a long one
NAME = "film"


@dataclass(frozen=True)
class Load:
    """What clients saw, in seconds."""

    way: str
    clients: int
    rate: float  # answers a second, of all clients together
    first_text: float  # from the question to the first text of its answer, median
    answer: float  # to its end, median
    slowest: float  # the same, the 95th of a hundred
    watched: float  # from the film's first byte sent until it could be asked


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=int, default=60)
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--questions", type=int, default=96, help="of all clients together, in each row")
    parser.add_argument("--folder", type=Path, default=Path("build/whole_path"))
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    film = make(given.folder, 128, given.minutes)
    results = [without_memory(film)]
    with serving() as port:
        watched = watch(port, film)
        load(port, 1, 8, watched)  # the first ones are slower
        results += [load(port, clients, given.questions, watched) for clients in given.clients]
    written = {batch: writing(batch) for batch in given.clients}
    show(results, written)
    print(keep("serving", [*map(asdict, results), {"way": "tokens a second, written together", **written}]))


def without_memory(film: Path) -> Load:
    """The film is watched for one question, by transformers' own interface."""
    model = load_model("tiny")
    processor = HourLlavaProcessor.for_config(model.tokenizer, model.config)
    parts = [{"type": "video", "video": str(film)}, {"type": "text", "text": QUESTIONS[0]}]
    began = time.perf_counter()
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": parts}], tokenize=True, add_generation_prompt=True
    )
    end = model.tokenizer.convert_tokens_to_ids("<|im_end|>")
    model.generate(**inputs, max_new_tokens=MOST, do_sample=False, eos_token_id=end, pad_token_id=end)
    took = time.perf_counter() - began
    return Load("generate, film watched each time", 1, 1 / took, took, took, took, 0.0)


@contextlib.contextmanager
def serving() -> Iterator[int]:
    """`hourllava serve` in a process of its own, as long as the block lasts: its port."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "hourllava", "serve", "--port", "0", "--memories", folder, "--budget", "1GiB"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            port = next((int(line.rpartition(":")[2]) for line in process.stdout if line.startswith("serving at")), 0)
            if not port:
                sys.exit(f"benchmarks: `hourllava serve` ended with exit code {process.wait()}")
            try:
                yield port
            finally:
                process.terminate()


def watch(port: int, film: Path) -> float:
    """Send a film, and wait until it has been watched: seconds."""
    began = time.perf_counter()
    connection = http.client.HTTPConnection("127.0.0.1", port)
    with film.open("rb") as file:
        connection.request("PUT", f"/v1/memories/{NAME}", file, {"Content-Length": str(film.stat().st_size)})
        connection.getresponse().read()
    while True:
        connection.request("GET", f"/v1/memories/{NAME}")
        state = json.loads(connection.getresponse().read())["state"]
        if state == "ready":
            return time.perf_counter() - began
        if state == "failed":
            sys.exit(f"benchmarks: {film} could not be watched")
        time.sleep(0.05)


def load(port: int, clients: int, questions: int, watched: float) -> Load:
    """Let clients ask at once, each one question after the other."""
    with ThreadPoolExecutor(clients) as pool:
        began = time.perf_counter()
        asked = pool.map(lambda number: ask(port, QUESTIONS[number % len(QUESTIONS)]), range(questions))
        times = list(tqdm(asked, f"{clients} clients", questions, unit="question"))
        took = time.perf_counter() - began
    first, whole = zip(*times, strict=True)
    slowest = quantiles(whole, n=20)[-1]
    return Load("hourllava serve", clients, questions / took, median(first), median(whole), slowest, watched)


def ask(port: int, question: str) -> tuple[float, float]:
    """Seconds until the first text of an answer, and until its end."""
    part = {"type": "video_url", "video_url": None, "uuid": NAME}
    messages = [{"role": "user", "content": [part, {"type": "text", "text": question}]}]
    body = {"messages": messages, "max_tokens": MOST, "stream": True}
    began, first = time.perf_counter(), None
    connection = http.client.HTTPConnection("127.0.0.1", port)
    connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
    for line in connection.getresponse():
        if not line.startswith(b"data: {"):
            continue
        event = json.loads(line.removeprefix(b"data: "))
        if "error" in event:
            sys.exit(f"benchmarks: {event['error']['message']}")
        if first is None and event["choices"][0]["delta"].get("content"):
            first = time.perf_counter() - began
    whole = time.perf_counter() - began
    connection.close()
    return whole if first is None else first, whole


@torch.no_grad()
def writing(batch: int) -> float:
    """Tokens a second of so many answers that are written together, each behind a prompt of 570 rows."""
    model = load_model("tiny")
    together = DecodingBatch(model)
    for _ in range(batch):
        together.add(torch.randn(1, 570, model.config.text_config.hidden_size))
    tokens = torch.zeros(batch, dtype=torch.int64)
    for _ in range(LONG):  # the first ones are slower
        together.step(tokens)
    began = time.perf_counter()
    for _ in range(LONG):
        tokens = together.step(tokens).argmax(-1)
    return batch * LONG / (time.perf_counter() - began)


def show(results: list[Load], written: dict[int, float]) -> None:
    table = Table("way", "clients", "answers a second", "", "first text", "answer", "95 %", "film ready after")
    for r in results:
        more = f"{r.rate / results[0].rate:.0f}x"
        times = (f"{seconds:.3f} s" for seconds in (r.first_text, r.answer, r.slowest))
        table.add_row(r.way, str(r.clients), f"{r.rate:.2f}", more, *times, f"{r.watched:.1f} s" if r.watched else "")
    console = Console(width=None if sys.stdout.isatty() else 140)
    console.print(table)
    table = Table("answers written together", "tokens a second", "")
    alone = next(iter(written.values()))
    for batch, rate in written.items():
        table.add_row(str(batch), f"{rate:.0f}", f"{rate / alone:.1f}x")
    console.print(table)


if __name__ == "__main__":
    main()
