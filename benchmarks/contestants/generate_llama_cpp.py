"""Greedy decoding with llama.cpp: all prompts in one batch, by the functions of its C library.

    python -m benchmarks.contestants.generate_llama_cpp RECORD GGUF PROMPTS N_NEW PRECISION

Where PRECISION is float32, keys and values are too, and flash attention, which rounds, is off; else
both are as by default.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import llama_cpp as c
import numpy as np

from benchmarks.record import Record

N_REPEATS = 2  # the first warms up


def make_context(model: Any, n_rows: int, n_tokens: int, longest: int, precision: str) -> Any:
    """A context for so many rows, whose prompts have so many tokens together."""
    params = c.llama_context_default_params()
    params.n_seq_max, params.n_batch = n_rows, n_tokens
    params.n_ctx = n_rows * (-(-longest // 256) * 256)  # rows get whole pieces of 256
    params.n_threads = params.n_threads_batch = len(os.sched_getaffinity(0))
    if precision == "float32":
        params.type_k = params.type_v = c.GGML_TYPE_F32
        params.flash_attn_type = c.LLAMA_FLASH_ATTN_TYPE_DISABLED
    return c.llama_init_from_model(model, params)


def greedy(context: Any, batch: Any, prompts: list[list[int]], n_new: int) -> list[list[int]]:
    n_vocab = c.llama_vocab_n_tokens(c.llama_model_get_vocab(c.llama_get_model(context)))
    c.llama_memory_clear(c.llama_get_memory(context), True)
    answers: list[list[int]] = [[] for _ in prompts]
    new, positions = prompts, [0] * len(prompts)
    for _ in range(n_new):
        ends, i = [], 0
        for row, tokens in enumerate(new):
            for token in tokens:
                batch.token[i], batch.pos[i], batch.logits[i] = token, positions[row], False
                batch.seq_id[i][0], batch.n_seq_id[i] = row, 1
                positions[row], i = positions[row] + 1, i + 1
            batch.logits[i - 1] = True
            ends.append(i - 1)
        batch.n_tokens = i
        if failure := c.llama_decode(context, batch):
            raise RuntimeError(f"llama_decode returned {failure}")
        logits = (c.llama_get_logits_ith(context, end) for end in ends)
        new = [[int(np.ctypeslib.as_array(row, (n_vocab,)).argmax())] for row in logits]
        answers = [answer + token for answer, token in zip(answers, new, strict=True)]
    return answers


def main(record_path: str, weights: str, prompts: str, n_new: str, precision: str) -> None:
    ids = json.loads(Path(prompts).read_text())
    model = c.llama_model_load_from_file(weights.encode(), c.llama_model_default_params())
    n_tokens, longest = sum(map(len, ids)), max(map(len, ids)) + int(n_new)
    context = make_context(model, len(ids), n_tokens, longest, precision)
    batch = c.llama_batch_init(n_tokens, 0, 1)
    record = Record(record_path)
    for _ in range(N_REPEATS):
        record.start()
        rows = greedy(context, batch, ids, int(n_new))
        record.step(sum(map(len, rows)), None)
    record.facts["outputs"] = rows
    record.save()


if __name__ == "__main__":
    main(*sys.argv[1:])
