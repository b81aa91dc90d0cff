"""How long running generations stall while the server reads other prompts.

    python -m benchmarks.stalls

Seven clients are each being sent a text; then one prompt of 1,500 words arrives, or eight of 200.
Prompts are read whole, as they once were, or in pieces.
"""

import json
import random
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import pairwise

import httpx

from benchmarks.harness import ROOT, results_folder
from benchmarks.prepare import SMOLLM2

N_BEFORE, N_NEW = 7, 250
WORDS = (
    *("the", "a", "river", "house", "stone", "bird", "sky", "deep"),
    *("old", "new", "runs", "falls", "under", "over", "green", "light"),
)
CASES = {"one prompt of 1,500 words": [1500], "eight prompts of 200 words": [200] * 8}
PIECES = {"whole": 10**9, "pieces of 128": 128, "pieces of 256": 256, "pieces of 512": 512}
SERVE = """
import sys
from pipeline.__main__ import main
from pipeline.serving import engine
engine.READ_AT_A_TIME = int(sys.argv[1])
sys.exit(main(["serve", "--ckpt", sys.argv[2], "--name=it", "--port=0"]))
"""


@contextmanager
def server(read_at_a_time: int) -> Iterator[str]:
    """Starts a server and yields its address."""
    words = [sys.executable, "-c", SERVE, str(read_at_a_time), SMOLLM2]
    pipe, nowhere = subprocess.PIPE, subprocess.DEVNULL
    with subprocess.Popen(words, cwd=ROOT, stdout=pipe, stderr=nowhere, text=True) as process:
        assert process.stdout
        try:
            yield process.stdout.readline().strip()
        finally:
            process.kill()


def token_times(url: str, prompt: str, n_new: int) -> list[float]:
    """When each token arrived; with log-probabilities, none is held back."""
    asked = {"model": "it", "prompt": prompt, "max_tokens": n_new, "temperature": 1, "seed": 0}
    times = []
    with httpx.stream(
        "POST", f"{url}/v1/completions", json={**asked, "logprobs": 0, "stream": True}, timeout=600
    ) as reply:
        for line in reply.iter_lines():
            if line.startswith("data: {"):
                times.append(time.perf_counter())
    return times


def measure(url: str, lengths: Sequence[int]) -> dict[str, float]:
    """Seconds: the longest stall of the old clients, and until the first and last new one start."""
    draw = random.Random(0)
    prompts = [" ".join(draw.choices(WORDS, k=n)) for n in lengths]
    with ThreadPoolExecutor(N_BEFORE + len(lengths)) as pool:
        stories = [f"Story number {i}: once upon a time" for i in range(N_BEFORE)]
        before = [pool.submit(token_times, url, story, N_NEW) for story in stories]
        time.sleep(5)  # all are written by now
        start = time.perf_counter()
        new = [pool.submit(token_times, url, prompt, 1) for prompt in prompts]
        firsts = sorted(future.result()[0] - start for future in new)
        end = time.perf_counter()
        pairs = [pair for future in before for pair in pairwise(future.result())]
    waits = [b - a for a, b in pairs if b > start and a < end]
    return {"longest_wait": max(waits), "first_new": firsts[0], "last_new": firsts[-1]}


def main() -> None:
    results: dict[str, dict[str, dict[str, float]]] = {}
    for how, read_at_a_time in PIECES.items():
        for case, lengths in CASES.items():
            with server(read_at_a_time) as url:
                found = measure(url, lengths)
            results.setdefault(case, {})[how] = found
            shown = ", ".join(f"{name} {seconds:.2f} s" for name, seconds in found.items())
            print(f"{case:28} {how:14} {shown}", flush=True)
    path = results_folder() / "stalls.json"
    path.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
