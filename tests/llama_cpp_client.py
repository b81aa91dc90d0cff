"""Runs llama.cpp on a GGUF file and prints what comes out, as JSON; needs llama-cpp-python.

stdin: {"model", "prompts": [[id]], "n_new", "rows": [[id]], "texts": [str], "chats", "logits"}
stdout: {"greedy": [[id]], "ids": [[id]], "chats": [{...}]}; logits of rows go to the .npy named.
"""

import json
import sys

import numpy as np
from llama_cpp import Llama

asked = json.load(sys.stdin)
IN_FLOAT32 = 0  # keys and values, which llama.cpp would otherwise keep in float16
llama = Llama(
    asked["model"],
    n_ctx=512,
    n_threads=1,
    type_k=IN_FLOAT32,
    type_v=IN_FLOAT32,
    logits_all=True,
    verbose=False,
)
greedy = []
for prompt in asked["prompts"]:
    llama.reset()
    new: list[int] = []
    for token in llama.generate(prompt, temp=0.0, repeat_penalty=1.0):
        new.append(int(token))
        if len(new) == asked["n_new"]:
            break
    greedy.append(new)
rows = []
for row in asked["rows"]:
    llama.reset()
    llama.eval(row)
    rows.append(np.array(llama.scores[: len(row)], dtype=np.float32))
np.save(asked["logits"], np.concatenate(rows))
# BOS where the file says so
ids = [llama.tokenize(t.encode(), add_bos=True, special=False) for t in asked["texts"]]
chats = []
for messages in asked["chats"]:
    llama.reset()
    answer = llama.create_chat_completion(
        messages, temperature=0.0, repeat_penalty=1.0, max_tokens=200
    )
    choice = answer["choices"][0]
    chats.append(
        {
            "text": choice["message"]["content"],
            "finish": choice["finish_reason"],
            "n_prompt": answer["usage"]["prompt_tokens"],
        }
    )
json.dump({"greedy": greedy, "ids": ids, "chats": chats}, sys.stdout)
