"""A server under load, on loopback: throughput, latency and memory, against a loop of `generate` and against LitServe.

Clients and server share the processor, as on a machine of one's own. What a processor computes in batches is measured
beside, in one process: it bounds what batching can bring.
"""

import http.client
import io
import itertools
import json
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
from omegaconf import DictConfig

from foley.cli.command import command
from foley.core.config import PROJECT_ROOT, relative_to_checkout
from foley.core.files import write_json
from foley.generation.prompts import Clip
from foley.generation.settings import GenerationSettings
from foley.generation.text_to_audio import TextToAudio
from foley.metrics.latency import measure_rounds
from foley.reporting.tables import provenance

try:  # a worker of LitServe is a new process, which finds its class by the name of this module
    from litserve import LitAPI, LitServer
except ModuleNotFoundError:
    LitAPI, LitServer = object, None

Row = dict[str, Any]
_START_SECONDS, _STOP_SECONDS, _ANSWER_SECONDS = 300.0, 60.0, 300.0
_WARMUP_SEED = 1_000_000


# ---------------------------------------------------------------- what is asked for


@dataclass(frozen=True)
class Ask:
    """A clip that a client wants; `patience_seconds` after which it closes its connection, None where it stays."""

    prompt: str
    seed: int
    duration_seconds: float
    patience_seconds: float | None = None


@dataclass(frozen=True)
class Answer:
    """What came: a status, 0 for none; the sound; and how many clips LitServe computed together, where it said."""

    ask: Ask
    status: int
    seconds: float
    content: bytes = b""
    batch: int | None = None

    @property
    def is_lost(self) -> bool:
        """Whether a client that waited got no sound."""
        return self.ask.patience_seconds is None and self.status != 200


def plain_load(cfg: DictConfig, prompts: Sequence[str]) -> list[Ask]:
    """Each request a prompt of its own, as far as there are so many."""
    cycle = itertools.islice(itertools.cycle(prompts), cfg.requests)
    return [Ask(prompt, seed, cfg.duration_seconds) for seed, prompt in enumerate(cycle)]


def mixed_load(cfg: DictConfig, prompts: Sequence[str]) -> list[Ask]:
    """Durations that are drawn, and some clients that go away."""
    mixed, rng = cfg.mixed, random.Random(cfg.mixed.seed)
    asks = []
    for seed, prompt in enumerate(itertools.islice(itertools.cycle(prompts), mixed.requests)):
        duration = rng.choice(list(mixed.durations_seconds))
        patience = rng.uniform(0, mixed.most_patience_seconds) if rng.random() < mixed.share_gone else None
        asks.append(Ask(prompt, seed, duration, patience))
    return asks


# ---------------------------------------------------------------- clients


class Client:
    """One that asks again and again on one connection."""

    def __init__(self, port: int, path: str, facts: Mapping[str, Any]) -> None:
        self._port, self._path, self._facts = port, path, facts
        self._connection = self._connect()

    def _connect(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self._port, timeout=_ANSWER_SECONDS)

    def ask(self, ask: Ask) -> Answer:
        what = {"prompt": ask.prompt, "seed": ask.seed, "duration_seconds": ask.duration_seconds, **self._facts}
        start = time.perf_counter()
        try:
            self._connection.request("POST", self._path, json.dumps(what), {"Content-Type": "application/json"})
            if ask.patience_seconds is not None:
                time.sleep(ask.patience_seconds)
                self.close()
                return Answer(ask, 0, time.perf_counter() - start)
            answer = self._connection.getresponse()
            content, batch = answer.read(), answer.getheader("X-Batch")
        except (OSError, http.client.HTTPException):
            self.close()
            return Answer(ask, 0, time.perf_counter() - start)
        return Answer(ask, answer.status, time.perf_counter() - start, content, int(batch) if batch else None)

    def close(self) -> None:
        """The next request opens a connection anew."""
        self._connection.close()


def run_clients(clients: Sequence[Client], asks: Sequence[Ask], after: Callable[[int], None]) -> list[Answer]:
    """All answers, in the order in which they came; `after` is told how many there are at each."""
    left, lock, answers = iter(asks), threading.Lock(), list[Answer]()

    def work(client: Client) -> None:
        while True:
            with lock:
                ask = next(left, None)
            if ask is None:
                return client.close()
            answer = client.ask(ask)
            with lock:
                answers.append(answer)
                after(len(answers))

    threads = [threading.Thread(target=work, args=(client,)) for client in clients]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return answers


# ---------------------------------------------------------------- a server's processes


def family(pid: int) -> list[int]:
    """A process and all that it started; of Linux, as all that reads /proc."""
    children: dict[int, list[int]] = {}
    for file in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # it has ended
            children.setdefault(int(_stat(file)[1]), []).append(int(file.parent.name))
    found = [pid]
    for one in found:
        found += children.get(one, [])
    return found


def _stat(file: Path) -> list[str]:
    """Fields of /proc/PID/stat from the third on: the second, a name in brackets, may hold spaces."""
    return file.read_text().rpartition(") ")[2].split()


def resident_megabytes(pid: int) -> float:
    """Of a process and its children."""
    pages = sum(int(Path(f"/proc/{one}/statm").read_text().split()[1]) for one in family(pid))
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def processor_seconds(pid: int) -> float:
    """Of a process and its children."""
    ticks = sum(sum(map(int, _stat(Path(f"/proc/{one}/stat"))[11:13])) for one in family(pid))
    return ticks / os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Server:
    """One that answers; `path` takes requests, which say `facts` besides."""

    pid: int
    port: int
    path: str
    facts: Mapping[str, Any]

    def clients(self, count: int) -> list[Client]:
        return [Client(self.port, self.path, self.facts) for _ in range(count)]

    def get(self, path: str) -> tuple[int, str]:
        """Status, 0 for none, and text of an answer."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=_ANSWER_SECONDS)
        try:
            connection.request("GET", path)
            answer = connection.getresponse()
            return answer.status, answer.read().decode()
        except OSError:
            return 0, ""
        finally:
            connection.close()


@contextmanager
def started(
    words: Sequence[str], environment: Mapping[str, str], log: Path, server: Callable[[int, int], Server], health: str
) -> Iterator[Server]:
    """A server of its own, on a port of the end of `words`, from when it is healthy; SIGTERM ends it.

    Raises RuntimeError where it ends by itself, or does not become healthy.
    """
    port = free_port()
    with log.open("w") as file:
        command = [sys.executable, *words[:-1], f"{words[-1]}{port}"]
        env = {**os.environ, **environment}
        process = subprocess.Popen(command, stdout=file, stderr=file, env=env, start_new_session=True)
    try:
        found, until = server(process.pid, port), time.monotonic() + _START_SECONDS
        while found.get(health)[0] != 200:
            if process.poll() is not None or time.monotonic() > until:
                raise RuntimeError(f"{words[0]} did not start; {log} says why")
            time.sleep(0.2)
        yield found
        process.send_signal(signal.SIGTERM)
        process.wait(_STOP_SECONDS)
    finally:
        with suppress(ProcessLookupError):  # whatever is left of it
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def free_port() -> int:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        port: int = bound.getsockname()[1]
        return port


@contextmanager
def ours(cfg: DictConfig, name: str, options: Sequence[str], environment: Mapping[str, str]) -> Iterator[Server]:
    """`foley serve`."""
    folder = Path(cfg.work_dir)
    waiting = [f"batch_size={cfg.batch_size}", f"batch_wait_seconds={cfg.batch_wait_seconds}"]
    words = [
        str(PROJECT_ROOT / "scripts/serve.py"),
        f"system={cfg.system}",
        "student=false",
        "device=cpu",
        *waiting,
        *options,
    ]
    words += [f"hydra.run.dir={folder / name}", "port="]
    env = {"OMP_NUM_THREADS": str(cfg.num_threads), **environment}

    def server(pid: int, port: int) -> Server:
        return Server(pid, port, "/v1/audio/generate", {"steps": cfg.steps})

    with started(words, env, folder / f"{name}.log", server, "/healthz") as found:
        yield found


@contextmanager
def rival(cfg: DictConfig) -> Iterator[Server]:
    """LitServe around the same generator."""
    folder = Path(cfg.work_dir)
    same = [f"{name}={cfg[name]}" for name in ("system", "steps", "batch_size", "batch_wait_seconds")]
    words = [__file__, *same, f"work_dir={folder / 'litserve'}", "litserve_port="]
    env = {"OMP_NUM_THREADS": str(cfg.num_threads)}

    def server(pid: int, port: int) -> Server:
        return Server(pid, port, "/predict", {})

    with started(words, env, folder / "litserve.log", server, "/health") as found:
        yield found


class Rival(LitAPI):  # type: ignore[misc]
    """`TextToAudio.generate` as LitServe wants it."""

    def __init__(self, folder: str, steps: int, **waiting: Any) -> None:
        super().__init__(**waiting)
        self.folder, self.steps = folder, steps

    def setup(self, device: str) -> None:
        self.system = TextToAudio.load(self.folder, device)

    def decode_request(self, request: dict[str, Any]) -> tuple[Clip, float]:
        return Clip(request["prompt"], request["seed"]), request["duration_seconds"]

    def batch(self, inputs: list[Any]) -> list[Any]:
        return inputs

    def predict(self, asked: list[tuple[Clip, float]]) -> Any:
        """Of one duration: LitServe puts together what comes."""
        settings = GenerationSettings(asked[0][1], num_steps=self.steps, batch_size=len(asked))
        return self.system.generate_clips([clip for clip, _ in asked], settings)

    def unbatch(self, made: Any) -> list[Any]:
        return [(made, row) for row in range(len(made.clips))]

    def encode_response(self, output: tuple[Any, int]) -> Any:
        from fastapi import Response

        made, row = output
        return Response(made.encode(row), media_type="audio/wav", headers={"X-Batch": str(len(made.clips))})


def serve_by_litserve(cfg: DictConfig) -> None:
    waiting = {"max_batch_size": cfg.batch_size, "batch_timeout": cfg.batch_wait_seconds}
    server = LitServer(Rival(str(cfg.system), cfg.steps, **waiting), accelerator="cpu", timeout=_ANSWER_SECONDS)
    server.run(host="127.0.0.1", port=cfg.litserve_port, generate_client_file=False, log_level="warning")


# ---------------------------------------------------------------- what is counted


def described(answers: Sequence[Answer]) -> Row:
    """Latency of those who waited, and how many of them got nothing."""
    waited = [answer for answer in answers if answer.ask.patience_seconds is None]
    seconds = [answer.seconds for answer in waited if not answer.is_lost]
    p50, p95 = np.percentile(seconds, [50, 95]).tolist() if seconds else (None, None)
    lost = sum(answer.is_lost for answer in waited)
    return {
        "n": len(answers),
        "lost": lost,
        "p50_seconds": p50,
        "p95_seconds": p95,
        "max_seconds": max(seconds, default=None),
    }


def read_metrics(server: Server) -> dict[str, float]:
    """The counters of `foley serve`, such as `foley_jobs_total{outcome="done"}`; none where there are none."""
    status, text = server.get("/metrics")
    lines = text.splitlines() if status == 200 else []
    return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines if line[:1] != "#")}


def gained(after: Mapping[str, float], before: Mapping[str, float]) -> dict[str, float]:
    """What was counted meanwhile.

    >>> gained({"jobs": 5.0, "bytes": 1.0}, {"jobs": 3.0, "bytes": 1.0})
    {'jobs': 2.0}
    """
    found = {name: value - before.get(name, 0.0) for name, value in after.items()}
    return {name: value for name, value in found.items() if value}


def outcomes(counted: Mapping[str, float]) -> dict[str, int]:
    """Jobs by how they ended, out of what `gained` found."""
    start = 'foley_jobs_total{outcome="'
    return {name.removeprefix(start)[:-2]: round(value) for name, value in counted.items() if name.startswith(start)}


def mean_batch(counted: Mapping[str, float], answers: Sequence[Answer]) -> float | None:
    """Clips computed together, in the mean over batches: of our counters, or of what LitServe said of each clip."""
    if batches := counted.get("foley_batch_clips_count"):
        return counted["foley_batch_clips_sum"] / batches
    shares = [1 / answer.batch for answer in answers if answer.batch]  # each clip is such a share of a batch
    return len(shares) / sum(shares) if shares else None


def loaded(cfg: DictConfig, server: Server, asks: Sequence[Ask], warmup: bool = True) -> tuple[Row, list[Answer]]:
    """A row of a server under load."""
    clients, memory = server.clients(cfg.clients), dict[str, float]()
    first = [Ask(ask.prompt, _WARMUP_SEED + ask.seed, ask.duration_seconds) for ask in asks[-cfg.warmup :]]
    if warmup:
        run_clients(clients, first, lambda count: None)

    def after(count: int) -> None:
        if count in cfg.memory_after:
            memory[str(count)] = resident_megabytes(server.pid)

    before, processor, start = read_metrics(server), processor_seconds(server.pid), time.perf_counter()
    answers = run_clients(clients, asks, after)
    seconds = time.perf_counter() - start
    row = rated(answers, seconds, processor_seconds(server.pid) - processor)
    counted = gained(settled(server), before)
    row |= {"mean_batch": mean_batch(counted, answers), "memory_megabytes": memory, "outcomes": outcomes(counted)}
    return row, answers


def settled(server: Server) -> dict[str, float]:
    """The counters, once nothing waits or runs any more, or after some seconds."""
    until = time.monotonic() + _STOP_SECONDS
    while (found := read_metrics(server)).get("foley_waiting_jobs", 0) + found.get("foley_running_jobs", 0):
        if time.monotonic() > until:
            break
        time.sleep(0.05)
    return found


def rated(answers: Sequence[Answer], seconds: float, processor: float) -> Row:
    made = sum(answer.status == 200 for answer in answers)
    rates = {"seconds": seconds, "clips_per_second": made / seconds, "processor_seconds_per_clip": processor / made}
    return {**described(answers), **rates}


# ---------------------------------------------------------------- one process


def loop(system: TextToAudio, steps: int, asks: Sequence[Ask]) -> tuple[list[Answer], float, float]:
    """A clip a call, one after the other, each encoded as the server does; wall-clock and processor seconds of all."""
    answers = []
    start, processor_start = time.perf_counter(), time.process_time()
    for ask in asks:
        began = time.perf_counter()
        settings = GenerationSettings(ask.duration_seconds, num_steps=steps)
        content = system.generate_clips([Clip(ask.prompt, ask.seed)], settings).encode(0)
        answers.append(Answer(ask, 200, time.perf_counter() - began, content))
    return answers, time.perf_counter() - start, time.process_time() - processor_start


def stages(system: TextToAudio, cfg: DictConfig, prompts: Sequence[str]) -> list[Row]:
    """Seconds of a clip, alone and in a batch, on one thread and on all; taken in turns."""
    rows = []
    for threads in sorted({1, cfg.num_threads}):
        torch.set_num_threads(threads)
        found: dict[int, list[Row]] = {1: [], cfg.batch_size: []}

        def run(size: int, kept: dict[int, list[Row]] = found) -> None:
            kept[size].append(staged(system, cfg, prompts[:size]))

        measured = measure_rounds({size: partial(run, size) for size in found}, cfg.rounds)
        for size, runs in found.items():
            clip = {
                "seconds": measured.median_seconds(size) / size,
                "processor_seconds": measured.median_processor_seconds(size) / size,
                "batch_speedup": measured.speedup(size, 1) * size,
                "batch_processor_speedup": measured.processor_speedup(size, 1) * size,
            }
            each = {name: statistics.median(run[name] for run in runs[-cfg.rounds :]) / size for name in runs[0]}
            rows.append({"threads": threads, "batch": size, **clip, **each})
    return rows


def staged(system: TextToAudio, cfg: DictConfig, prompts: Sequence[str]) -> Row:
    """Seconds of each stage of a batch, texts encoded anew, and of writing its WAVs."""
    system.forget_prompts()
    clips = [Clip(prompt, seed) for seed, prompt in enumerate(prompts)]
    made = system.generate_clips(clips, GenerationSettings(cfg.duration_seconds, num_steps=cfg.steps))
    start = time.perf_counter()
    for row in range(len(clips)):
        made.encode(row)
    times = {name: value for name, value in asdict(made.timings).items() if name != "encode_seconds"}
    return {**times, "wav_seconds": time.perf_counter() - start}


def largest_difference(answers: Sequence[Answer], expected: Mapping[int, bytes]) -> float:
    """Between samples of sounds of the same seed, full scale being 1."""
    found = [answer for answer in answers if answer.ask.seed in expected and answer.status == 200]
    pairs = [(soundfile.read(io.BytesIO(one))[0] for one in (a.content, expected[a.ask.seed])) for a in found]
    return max(float(np.abs(served - own).max()) for served, own in pairs)


# ---------------------------------------------------------------- all of it


def measure(cfg: DictConfig, system: TextToAudio, prompts: Sequence[str]) -> Row:
    """All rows. The loop is run in halves, before and after the servers, so that a busy machine is busy for it too."""
    cost, asks = stages(system, cfg, prompts), plain_load(cfg, prompts)
    loop(system, cfg.steps, asks[-2:])
    halves = [loop(system, cfg.steps, asks[: len(asks) // 2])]
    expected = {answer.ask.seed: answer.content for answer in halves[0][0][: cfg.compared]}
    rows: list[Row] = []
    mixed: Row = {}
    with ExitStack() as stack:
        for name, how in cfg.servers.items():
            with ours(cfg, str(name), how.options, how.environment) as server:
                rows.append({"way": name, **compared(*loaded(cfg, server, asks), expected)})
                mixed = mixed or mixed_row(cfg, server, prompts)
        if cfg.litserve is True or (cfg.litserve == "auto" and LitServer is not None):
            server = stack.enter_context(rival(cfg))
            rows.append({"way": "litserve", **compared(*loaded(cfg, server, asks), expected)})
    halves.append(loop(system, cfg.steps, asks[len(asks) // 2 :]))
    answers, seconds, processor = zip(*halves, strict=True)
    plain = {"way": "loop", **rated([*answers[0], *answers[1]], sum(seconds), sum(processor)), "mean_batch": 1.0}
    return {"stages": cost, "rows": against(plain, rows), "mixed": [mixed]}


def compared(row: Row, answers: Sequence[Answer], expected: Mapping[int, bytes]) -> Row:
    return {**row, "compared": len(expected), "largest_difference": largest_difference(answers, expected)}


def against(plain: Row, rows: Sequence[Row]) -> list[Row]:
    """All rows, each with its throughput over that of the loop, and the loop's processor time over its own."""
    keys = {"throughput_ratio": "clips_per_second", "processor_ratio": "processor_seconds_per_clip"}
    found = []
    for row in (plain, *rows):
        rate, processor = (row[key] / plain[key] for key in keys.values())
        found.append({**row, "throughput_ratio": rate, "processor_ratio": 1 / processor})
    return found


def mixed_row(cfg: DictConfig, server: Server, prompts: Sequence[str]) -> Row:
    """The other load on a server that has had the first."""
    asks, before = mixed_load(cfg, prompts), resident_megabytes(server.pid)
    row, _ = loaded(cfg, server, asks, warmup=False)
    gone = sum(ask.patience_seconds is not None for ask in asks)
    status = json.loads(server.get("/healthz")[1])
    left = {"waiting": status["waiting"], "running": status["running"]}
    memory = {"megabytes_before": before, "megabytes_after": resident_megabytes(server.pid)}
    adds_up = "yes" if sum(row["outcomes"].values()) == len(asks) else "no"
    return {**row, "gone": gone, **left, **memory, "adds_up": adds_up}


@command("bench/serving")
def main(cfg: DictConfig) -> None:
    if cfg.litserve_port is not None:
        return serve_by_litserve(cfg)
    cfg.num_threads = cfg.num_threads or len(os.sched_getaffinity(0))
    prompts = Path(cfg.prompts).read_text(encoding="utf-8").splitlines()
    found = measure(cfg, TextToAudio.load(cfg.system, "cpu"), prompts)
    names = ("requests", "clients", "steps", "duration_seconds", "num_threads", "batch_size", "batch_wait_seconds")
    settings = {"system": relative_to_checkout(str(cfg.system)), **{name: cfg[name] for name in names}}
    write_json(Path(cfg.output_dir) / "serving.json", {"settings": settings, **found, "provenance": provenance()})
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
