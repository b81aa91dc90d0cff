"""vLLM's server, at most PLACES texts at a time.

python -m benchmarks.contestants.vllm_server WEIGHTS PORT PLACES
"""

import os
import sys

from benchmarks.contestants.generate_vllm import CONTEXT, settings


def main(weights: str, port: str, places: str) -> None:
    words = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", f"--model={weights}"]
    words += ["--served-model-name=it", "--dtype=float32", f"--port={port}", "--host=127.0.0.1"]
    words += [f"--max-num-seqs={places}", f"--max-model-len={CONTEXT}"]
    os.execve(sys.executable, words, {**os.environ, **settings()})


if __name__ == "__main__":
    main(*sys.argv[1:])
