"""`kvstack serve`: an OpenAI-compatible server that answers, streams and survives its clients; restarted, and on two processes, it says
the same."""

import json
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from engines import MODEL, SPACE

import kvstack

SOURCE = Path(kvstack.__file__).with_name("recipe.py").read_text("utf-8")
PROMPTS = [SOURCE[:900], SOURCE[:900] + "A", SOURCE[:1200]]
OPTIONS = [
    "--dtype",
    "float32",
    "--max-model-len",
    "1024",
    "--max-num-seqs",
    "16",
    "--kv-cache-memory-bytes",
    str(SPACE),
    "--enforce-eager",
]


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


@contextmanager
def server(log: Path, *options: str, **variables: str) -> Iterator[httpx.Client]:
    """A client of a server that is up."""
    port = str(free_port())
    environment = os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_LOGGING_LEVEL": "INFO"} | variables
    environment.pop("KVSTACK_RECIPE", None)
    command = [sys.executable, "-m", "kvstack.cli.main", "serve", MODEL, "--recipe", "polar4", "--port", port, *OPTIONS, *options]
    with log.open("w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=environment, start_new_session=True)
    client = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=240)
    try:
        deadline = time.monotonic() + 240
        while True:
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()[-3000:]
            try:
                if client.get("/health").status_code == 200:
                    break
            except httpx.TransportError:
                time.sleep(0.5)
        yield client
    finally:
        client.close()
        process.terminate()
        process.wait(60)


def complete(client: httpx.Client, prompt: str, tokens: int = 8) -> str:
    body = {"model": MODEL, "prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True}
    found = client.post("/v1/completions", json=body)
    assert found.status_code == 200, found.text
    return str(found.json()["choices"][0]["text"])


def number(client: httpx.Client, name: str) -> float:
    found = re.search(rf"^{name}{{[^}}]*}} (\S+)", client.get("/metrics").text, re.MULTILINE)
    assert found, name
    return float(found[1])


def asked_in_turn(client: httpx.Client) -> tuple[list[str], float]:
    """What it says to the prompts, again and again, and how many of their tokens were there already."""
    texts = [complete(client, p) for p in PROMPTS * 3]
    return texts, number(client, "vllm:prefix_cache_hits_total")


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What one server says to all that is asked of it."""
    log, said = tmp_path_factory.mktemp("server") / "log", {}
    with server(log) as client:
        said["in turn"] = asked_in_turn(client)
        said["metrics"] = {n: number(client, f"kvstack_{n}") for n in ("cache_tokens", "tokens_per_gib", "ratio")}
        body = {"model": MODEL, "prompt": PROMPTS[0], "max_tokens": 8, "temperature": 0, "ignore_eos": True, "stream": True}
        with client.stream("POST", "/v1/completions", json=body) as stream:
            lines = [line.removeprefix("data: ") for line in stream.iter_lines() if line]
        said["streamed"] = lines[-1], "".join(json.loads(line)["choices"][0]["text"] for line in lines[:-1])
        with client.stream("POST", "/v1/completions", json=body | {"max_tokens": 700}) as stream:
            next(stream.iter_lines())  # and hang up
        said["malformed"] = [
            client.post("/v1/completions", content=b'{"model": ').status_code,
            client.post("/v1/completions", json={"model": MODEL, "prompt": "x", "max_tokens": -1}).status_code,
            client.post("/v1/completions", json={"model": "another", "prompt": "x"}).status_code,
            client.post("/v1/completions", json={"model": MODEL, "prompt": "x " * 5000, "max_tokens": 1}).status_code,
        ]
        with ThreadPoolExecutor(64) as pool:
            said["parallel"] = list(pool.map(lambda i: complete(client, f"{PROMPTS[0]}{i % 4}", 4), range(64)))
        said["after"] = complete(client, PROMPTS[0]), client.get("/health").status_code
        for _ in range(60):
            if not (running := number(client, "vllm:num_requests_running")):
                break
            time.sleep(0.5)
        said["running"] = running
    said["log"] = log.read_text()
    return said


def test_it_answers_and_says_what_it_serves(first: dict[str, Any]) -> None:
    texts, hits = first["in turn"]
    # The first time a prompt sees itself exact, and then as it is stored.
    assert texts[3:6] == texts[6:] and hits > 0
    assert first["metrics"]["ratio"] == pytest.approx(512 / 132)
    assert first["metrics"]["tokens_per_gib"] == pytest.approx(2**30 / (6 * 2 * 132))
    line = next(line for line in first["log"].splitlines() if "tokens fit" in line)
    assert "polar4" in line and "6 of 6 layers" in line and f"{int(first['metrics']['cache_tokens']):,} tokens fit" in line


def test_it_streams_and_survives_clients_that_hang_up_or_talk_nonsense(first: dict[str, Any]) -> None:
    assert first["streamed"] == ("[DONE]", first["in turn"][0][3])
    assert first["malformed"] == [400, 400, 404, 400]
    assert len(first["parallel"]) == 64 and len(set(first["parallel"])) <= 4 + 4  # a chunk that ends elsewhere may say something else
    assert first["after"] == (first["in turn"][0][3], 200) and first["running"] == 0


def test_another_start_on_two_processes_says_the_same(first: dict[str, Any], tmp_path: Path) -> None:
    cores = "|".join(map(str, sorted(os.sched_getaffinity(0))[:2]))  # vLLM wants to be told where there is one NUMA node
    with server(tmp_path / "log", "--tensor-parallel-size", "2", VLLM_CPU_OMP_THREADS_BIND=cores) as client:
        assert asked_in_turn(client) == first["in turn"]


def test_what_cannot_be_served_is_said_at_once() -> None:
    for arguments, says in (
        ([MODEL, "--recipe", "balanced"], "one format for all of its tokens"),
        ([MODEL, "--recipe", "tri(256)+polar4"], "needs a profile"),
        ([MODEL, "--profile", "/nowhere.safetensors"], "does not exist"),
    ):
        done = subprocess.run([sys.executable, "-m", "kvstack.cli.main", "serve", *arguments], capture_output=True, text=True)
        assert done.returncode == 2 and says in done.stderr
