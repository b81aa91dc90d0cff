"""Greedy decoding with ours.

python -m benchmarks.contestants.generate_ours RECORD WEIGHTS PROMPTS N_NEW PRECISION
"""

import json
import sys
from pathlib import Path
from typing import cast

from pipeline.__main__ import choose_waiting

choose_waiting()  # as the command line does, before torch is loaded

from benchmarks.record import Record  # noqa: E402
from pipeline.decoding.generate import generate  # noqa: E402
from pipeline.decoding.sampling import Sampling  # noqa: E402
from pipeline.inference import load_language_model  # noqa: E402
from pipeline.precision import Precision  # noqa: E402

N_REPEATS = 2  # the first warms up


def main(record_path: str, weights: str, prompts: str, n_new: str, precision: str) -> None:
    model = load_language_model(weights, cast(Precision, precision)).gpt
    ids = json.loads(Path(prompts).read_text())
    record = Record(record_path)
    for _ in range(N_REPEATS):
        record.start()
        rows = generate(model, ids, Sampling(max_new_tokens=int(n_new)))
        record.step(sum(map(len, rows)), None)
    record.facts["outputs"] = rows
    record.save()


if __name__ == "__main__":
    main(*sys.argv[1:])
