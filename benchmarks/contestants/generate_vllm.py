"""Greedy decoding with vLLM.

python -m benchmarks.contestants.generate_vllm RECORD WEIGHTS PROMPTS N_NEW PRECISION

All cores compute (one would be left for a server), and its compiler is on, as by default.
"""

import json
import os
import sys
from pathlib import Path

from benchmarks.record import Record, peak_memory

N_REPEATS = 2  # the first warms up
DTYPES = {"bf16": "bfloat16", "float32": "float32"}
CONTEXT = 2048  # tokens of a text


def settings() -> dict[str, str]:
    """The environment: all cores, room for some 20,000 tokens, and nobody is told."""
    cores = ",".join(str(core) for core in sorted(os.sched_getaffinity(0)))
    return {
        **{"VLLM_CPU_OMP_THREADS_BIND": cores, "VLLM_CPU_KVCACHE_SPACE": "1"},
        **{"VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"},
    }


def main(record_path: str, weights: str, prompts: str, n_new: str, precision: str) -> None:
    os.environ.update(settings())
    from vllm import LLM, SamplingParams  # reads the environment

    ids = [{"prompt_token_ids": row} for row in json.loads(Path(prompts).read_text())]
    llm = LLM(weights, dtype=DTYPES[precision], max_model_len=CONTEXT, enable_prefix_caching=False)
    params = SamplingParams(temperature=0, max_tokens=int(n_new), ignore_eos=True)
    record = Record(record_path)
    for _ in range(N_REPEATS):
        record.start()
        outputs = llm.generate(ids, params, use_tqdm=False)
        rows = [list(output.outputs[0].token_ids) for output in outputs]
        record.step(sum(map(len, rows)), None)
    record.facts |= {"outputs": rows, "rss": peak_memory(os.getpid())}
    record.save()


if __name__ == "__main__":
    main(*sys.argv[1:])
