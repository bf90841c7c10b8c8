"""A server under full load for a long time: does it grow, and how long do answers take?

    python benchmarks/soak.py --minutes 60

Starts `butterfly serve` with an untrained `micro` model and keeps more clients than slots busy: completions
and chats, whole and streamed, contexts made, continued and dropped, clients that vanish or read slowly, and
requests that must be refused. Every few seconds memory, file handles and threads of the server are read from
/proc. Prints a table and, as its last line, one JSON object; exit code 1 where something grew, an answer had
a status that its request does not allow, or the server died.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import platform
import random
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path

import torch

from butterfly_llm.checkpoint import save_model
from butterfly_llm.config import ButterflyConfig
from butterfly_llm.model import Butterfly

TOKEN = "soak-token"
WARM_UP = 0.25  # share of the time after which nothing may grow any more
MOST_GROWTH = {"rss_mb": 8.0, "handles": 2.0, "threads": 0.0}  # of a median, over the rest of the time
KEPT_TIMES = 20_000  # answers of a kind whose time is kept, a random choice


class Tally:
    """What all clients have seen."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.statuses: Counter[int] = Counter()
        self.counts: Counter[str] = Counter()
        self.wrong: list[str] = []
        self.times: defaultdict[str, list[float]] = defaultdict(list)

    def add(self, kind: str, status: int, allowed: set[int], seconds: float) -> None:
        with self.lock:
            self.statuses[status] += 1
            if status not in allowed and len(self.wrong) < 20:
                self.wrong.append(f"{kind}: {status}")
            if status != 200:
                return
            self.counts[kind] += 1
            times = self.times[kind]
            if len(times) < KEPT_TIMES:
                times.append(seconds)
            elif (place := random.randrange(self.counts[kind])) < KEPT_TIMES:
                times[place] = seconds


class Client(threading.Thread):
    """One client after another, each with a connection of its own, until told to stop."""

    def __init__(self, port: int, seed: int, tally: Tally, stop: threading.Event) -> None:
        super().__init__(daemon=True)
        self.port, self.random, self.tally, self.stop = port, random.Random(seed), tally, stop
        self.kinds: list[tuple[int, Callable[[], None]]] = [
            (6, self.complete), (4, self.stream), (3, self.chat), (3, self.vanish), (1, self.read_slowly),
            (2, self.use_context), (2, self.be_wrong), (1, self.look),
        ]  # fmt: skip

    def run(self) -> None:
        weights, kinds = zip(*self.kinds, strict=True)
        while not self.stop.is_set():
            try:
                self.random.choices(kinds, weights)[0]()
            except (OSError, http.client.HTTPException) as failure:
                if not self.stop.is_set():
                    self.tally.add(f"{type(failure).__name__}: {failure}", 0, set(), 0.0)
                    time.sleep(0.5)

    def text(self, most: int) -> str:
        return "".join(self.random.choices("abc def(x):\n\u00e9", k=self.random.randint(1, most)))

    def ask(
        self, kind: str, method: str, path: str, body: object = None, *, allowed: set[int], token: str = TOKEN
    ) -> dict[str, object]:
        """A whole request; -> its JSON, {} unless it is 200."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)
        raw = body if isinstance(body, bytes) else None if body is None else json.dumps(body).encode()
        started = time.monotonic()
        try:
            connection.request(method, path, raw, {"Authorization": f"Bearer {token}"})
            answer = connection.getresponse()
            data = answer.read()
        finally:
            connection.close()
        self.tally.add(kind, answer.status, allowed, time.monotonic() - started)
        if answer.status == 429:
            self.stop.wait(self.random.uniform(0.05, 0.5))
        if answer.status != 200 or not data.startswith(b"{"):
            return {}
        found: dict[str, object] = json.loads(data)
        return found

    def complete(self) -> None:
        body = {"prompt": self.text(300), "max_tokens": self.random.randint(1, 60), "logprobs": 2}
        self.ask("completion", "POST", "/v1/completions", body, allowed={200, 429})

    def stream(self) -> None:
        body = {"prompt": self.text(300), "max_tokens": self.random.randint(1, 60), "stream": True}
        self.ask("stream", "POST", "/v1/completions", body, allowed={200, 429})

    def chat(self) -> None:
        body = {"messages": [{"role": "user", "content": self.text(100)}], "max_tokens": 30}
        self.ask("chat", "POST", "/v1/chat/completions", body, allowed={200, 429})

    def partly(self, kind: str, pauses: tuple[float, ...]) -> None:
        """Read a little of a long stream, wait, read more ...; then leave."""
        body = json.dumps({"prompt": self.text(100), "max_tokens": 5000, "stream": True, "temperature": 2})
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)
        started = time.monotonic()
        try:
            connection.request("POST", "/v1/completions", body, {"Authorization": f"Bearer {TOKEN}"})
            answer = connection.getresponse()
            if answer.status == 200:
                for pause in pauses:
                    answer.read(400)
                    self.stop.wait(pause)
            self.tally.add(kind, answer.status, {200, 429}, time.monotonic() - started)
        finally:
            connection.close()
        if answer.status == 429:
            self.stop.wait(self.random.uniform(0.05, 0.5))

    def vanish(self) -> None:
        self.partly("vanishing", (0.0, 0.0))

    def read_slowly(self) -> None:
        self.partly("slow", (1.0, 1.0, 0.0))

    def use_context(self) -> None:
        made = self.ask("context", "POST", "/v1/contexts", {"text": self.text(1500)}, allowed={200, 429})
        if name := made.get("id"):
            body = {"context": name, "prompt": "x", "max_tokens": 10}
            self.ask("in context", "POST", "/v1/completions", body, allowed={200, 429})
            self.ask("drop", "DELETE", f"/v1/contexts/{name}", allowed={200})

    def be_wrong(self) -> None:
        big = b" " * 70_000
        number = self.random.randrange(5)
        if number == 0:
            self.ask("bad JSON", "POST", "/v1/completions", b'{"prompt": \xff', allowed={422})
        elif number == 1:
            self.ask("unknown field", "POST", "/v1/completions", {"prompt": "a", "beam": 3}, allowed={422})
        elif number == 2:
            self.ask("large body", "POST", "/v1/completions", big, allowed={413})
        elif number == 3:
            self.ask("no token", "GET", "/v1/models", allowed={401}, token="wrong")
        else:
            self.ask("no context", "DELETE", "/v1/contexts/ctx-none", allowed={404})

    def look(self) -> None:
        self.ask("metrics", "GET", "/metrics", allowed={200})


def vitals(process: int) -> dict[str, float]:
    """Memory in MB, file handles and threads of a process, by Linux's /proc."""
    status = Path(f"/proc/{process}/status").read_text()

    def field(name: str) -> float:
        return float(re.search(rf"^{name}:\s+(\d+)", status, re.M)[1])  # type: ignore[index]

    handles = len(os.listdir(f"/proc/{process}/fd"))
    return {"rss_mb": field("VmRSS") / 1024, "handles": float(handles), "threads": field("Threads")}


def growth(samples: list[dict[str, float]], name: str) -> float:
    """Median of the last quarter less that of the second: what the load itself needs is there by then."""
    values = [sample[name] for sample in samples[int(len(samples) * WARM_UP) :]]
    part = max(1, len(values) // 3)
    return statistics.median(values[-part:]) - statistics.median(values[:part])


def quantile(times: list[float], share: float) -> float:
    return sorted(times)[min(len(times) - 1, int(share * len(times)))]


def main() -> int:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--minutes", type=float, default=60.0)
    options.add_argument("--clients", type=int, default=12)
    options.add_argument("--slots", type=int, default=8)
    options.add_argument("--every", type=float, default=10.0, help="seconds between two looks at the server")
    arguments = options.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        save_model(Butterfly(ButterflyConfig.preset("micro")), Path(folder) / "micro")
        log = (Path(folder) / "log").open("w+")
        command = [
            sys.executable, "-m", "butterfly_llm", "serve", "--port", "0", "--slots", str(arguments.slots),
            "--contexts", "8", "--max-body-bytes", "65536", "--device", "cpu", "--model", f"{folder}/micro",
        ]  # fmt: skip
        server = subprocess.Popen(command, stderr=log, env={**os.environ, "BUTTERFLY_TOKEN": TOKEN})
        port = None
        while port is None:
            if server.poll() is not None:
                raise SystemExit(Path(log.name).read_text())
            time.sleep(0.2)
            port = re.search(r"http://127.0.0.1:(\d+)", Path(log.name).read_text())
        tally, stop = Tally(), threading.Event()
        clients = [Client(int(port[1]), seed, tally, stop) for seed in range(arguments.clients)]
        for client in clients:
            client.start()
        samples: list[dict[str, float]] = []
        started = time.monotonic()
        while (elapsed := time.monotonic() - started) < arguments.minutes * 60 and server.poll() is None:
            samples.append(vitals(server.pid))
            if len(samples) % max(1, round(60 / arguments.every)) == 1:
                figures = "  ".join(f"{name} {value:.1f}" for name, value in samples[-1].items())
                print(
                    f"{elapsed / 60:5.1f} min  {sum(tally.counts.values()):7,} answers  {figures}", flush=True
                )
            time.sleep(arguments.every)
        stop.set()
        for client in clients:
            client.join(30)
        alive = server.poll() is None
        server.send_signal(signal.SIGTERM)
        code = server.wait(30)
        log.seek(0)
        said = log.read().splitlines()[1:]
    grown = {name: round(growth(samples, name), 2) for name in MOST_GROWTH}
    seconds = {
        kind: {"answers": tally.counts[kind], "p50": round(quantile(times, 0.5), 4),
               "p99": round(quantile(times, 0.99), 4), "max": round(max(times), 4)}
        for kind, times in sorted(tally.times.items())
    }  # fmt: skip
    for kind, each in seconds.items():
        print(f"{kind:12}" + "".join(f"  {name} {value:,}" for name, value in each.items()))
    steady = all(grown[name] <= most for name, most in MOST_GROWTH.items())
    result = {
        "minutes": round(elapsed / 60, 1), "clients": arguments.clients, "slots": arguments.slots,
        "statuses": dict(sorted(tally.statuses.items())), "wrong": tally.wrong, "seconds": seconds,
        "growth": grown, "first": samples[0], "last": samples[-1], "samples": len(samples), "alive": alive,
        "exit": code, "log": said[:20], "torch": torch.__version__, "python": platform.python_version(),
    }  # fmt: skip
    print(json.dumps(result))
    return 0 if steady and alive and not tally.wrong and not said else 1


if __name__ == "__main__":
    raise SystemExit(main())
