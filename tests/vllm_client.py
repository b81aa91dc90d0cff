"""Runs vLLM on an exported directory and prints what comes out, as JSON; needs vLLM.

stdin: {"model", "adapter": str | null, "classifies": bool, "rows": [[id]], "chats", "n_new"}
stdout, of a classifier: {"probabilities": [[p]]}, of the tokens as they are; of a language model:
{"greedy": [[id]], "logprobs": [[p]] of these, "chats": [{...}]}
"""

import json
import os
import sys

from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest


def main() -> None:
    asked = json.load(sys.stdin)
    answers_to = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # vLLM's processes write to stdout too
    rows = [{"prompt_token_ids": row} for row in asked["rows"]]
    adapter = LoRARequest("tuned", 1, asked["adapter"]) if asked["adapter"] else None
    llm = LLM(
        asked["model"],
        runner="pooling" if asked["classifies"] else "generate",
        dtype="float32",
        enforce_eager=True,
        enable_lora=adapter is not None,
        max_lora_rank=16,
        enable_prefix_caching=False,
    )
    if asked["classifies"]:
        found = {"probabilities": [o.outputs.probs for o in llm.classify(rows)]}
    else:
        settings = SamplingParams(
            temperature=0, max_tokens=asked["n_new"], ignore_eos=True, logprobs=0
        )
        outputs = [o.outputs[0] for o in llm.generate(rows, settings, lora_request=adapter)]
        found = {
            "greedy": [list(output.token_ids) for output in outputs],
            "logprobs": [logprobs(output) for output in outputs],
            "chats": chats(llm, asked["chats"]),
        }
    json.dump(found, answers_to)
    answers_to.close()


def logprobs(output) -> list[float]:
    return [of[id].logprob for id, of in zip(output.token_ids, output.logprobs, strict=True)]


def chats(llm: LLM, conversations: list) -> list[dict]:
    if not conversations:
        return []
    answers = llm.chat(conversations, SamplingParams(temperature=0, max_tokens=200))
    return [
        {
            "text": answer.outputs[0].text,
            "finish": answer.outputs[0].finish_reason,
            "prompt": list(answer.prompt_token_ids),
        }
        for answer in answers
    ]


if __name__ == "__main__":
    main()
