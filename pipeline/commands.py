"""The commands that are plain functions; signature and docstring define their options.

Nothing heavy is imported until a command runs, so that `--help` is instant.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from datamodules.files import expanded
from pipeline.console import say
from pipeline.evaluation.judge_config import JudgeConfig
from pipeline.precision import Precision


def run(*, config: str, set: list[str], resume: Literal["auto", "must", "never"] = "auto") -> int:
    """Run a chain of stages; skips finished ones and resumes an interrupted one.

    Args:
        config: YAML file of the chain; configs/run/quickstart.yaml explains the format.
        set: `stage.key=value` each; overrides the chain's YAML.
        resume: auto resumes an earlier run, if any; must requires one; never starts anew.

    Returns:
        The exit code.
    """
    from pipeline.stages.chain import run_chain

    return run_chain(expanded(config), set, resume)


def tokenizer_train(
    *,
    source: list[str] | str,
    vocab_size: int,
    min_frequency: int,
    text_column: str = "text",
    output: str | None = None,
) -> None:
    """Train a byte-level BPE tokenizer on text.

    Prints the path of the tokenizer.

    Args:
        source: text files, folders, globs, tables (.jsonl, .parquet, .csv, .tsv), or
            bundled:python-docs; one or a list.
        vocab_size: number of ids, including the 256 bytes and the special tokens.
        min_frequency: how often a pair must occur to be merged.
        text_column: field of JSONL, or column of Parquet, CSV or TSV, that holds the text.
        output: file to write a copy of the vocabulary to.
    """
    from pipeline.stages.tokenizer_stage import train_stage

    train_stage(
        [source] if isinstance(source, str) else source,
        text_column=text_column,
        vocab_size=vocab_size,
        min_frequency=min_frequency,
        output=_path(output),
    )


def generate(
    *,
    ckpt: str,
    prompt: str,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    num_beams: int = 1,
    seed: int = 0,
    precision: Precision = "auto",
    chat: bool = False,
    system: str = "",
) -> None:
    """Continue a text, or answer a message with --chat; prints tokens as they are generated.

    Nothing but the new text goes to stdout.

    Args:
        ckpt: checkpoint directory, or any source that `import` takes.
        prompt: the text to continue; - reads it from stdin (with --chat less the final line end).
        max_new_tokens: maximum length of the continuation, in tokens.
        temperature: sampling temperature; 0 always takes the likeliest token.
        top_k: sample only from the k likeliest tokens; 0 for all.
        top_p: sample only from the likeliest tokens that together reach this probability.
        num_beams: beams of beam search, which prints its text when done; 1 for none.
        seed: random seed of sampling.
        precision: 32-true, bf16-true, f16-weights (float32, but weights held in float16), or auto:
            bf16-true where hardware multiplies bf16, else f16-weights if supported, else 32-true.
        chat: take the prompt as a user's message, in the checkpoint's prompt style.
        system: system message before that message.
    """
    draws = _draws(temperature, top_k, top_p, seed)
    if system and not chat:
        raise ValueError("--system comes before a user's message; add --chat.")
    from pipeline.inference import print_continuation

    if prompt == "-":
        prompt = sys.stdin.read().removesuffix("\n" if chat else "")
    print_continuation(
        ckpt,
        prompt,
        precision=precision,
        is_message=chat,
        system=system,
        max_new_tokens=max_new_tokens,
        num_beams=num_beams,
        **draws,
    )


def chat(
    *,
    ckpt: str,
    system: str = "",
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    precision: Precision = "auto",
) -> None:
    """Chat with an instruction-tuned checkpoint; an empty line or Ctrl-D ends the chat.

    Ctrl-C stops an answer. Messages that no longer fit into the context are dropped, oldest first.

    Args:
        ckpt: checkpoint directory, or any source that `import` takes.
        system: system message before the conversation.
        max_new_tokens: maximum length of each answer, in tokens.
        temperature: sampling temperature; 0 always takes the likeliest token.
        top_k: sample only from the k likeliest tokens; 0 for all.
        top_p: sample only from the likeliest tokens that together reach this probability.
        seed: random seed of sampling.
        precision: 32-true, bf16-true, f16-weights (float32, but weights held in float16), or auto:
            bf16-true where hardware multiplies bf16, else f16-weights if supported, else 32-true.
    """
    draws = _draws(temperature, top_k, top_p, seed)
    from pipeline.inference import converse

    converse(
        ckpt,
        precision=precision,
        system=system,
        max_new_tokens=max_new_tokens,
        **draws,
    )


def classify(
    *,
    ckpt: str,
    text: str = "",
    file: str | None = None,
    column: str = "text",
    output: str | None = None,
    threshold: float | None = None,
    batch_size: int = 32,
) -> None:
    """Classify a text, or every text in a column of a table.

    Args:
        ckpt: checkpoint directory of a classifier.
        text: text to label; - reads it from stdin.
        file: a .csv, .tsv, .jsonl or .parquet table to label instead.
        column: name of the column that holds the texts.
        output: new file for the table with labels and probabilities. A .csv from a .csv keeps its
            separator (with semicolons, a decimal comma), line ends and byte-order mark.
        threshold: probability from which on the second of two labels is given; null: the likelier.
        batch_size: texts per batch.
    """
    if bool(text) == (file is not None):
        raise ValueError("give either --text, which is not empty, or --file.")
    if (file is None) != (output is None):
        raise ValueError("--file and --output belong together: give both, or --text.")
    if threshold is not None and not 0 < threshold < 1:
        raise ValueError(f"threshold is {threshold}; give a probability between 0 and 1.")
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; give at least 1.")
    if file is not None and output is not None:
        from pipeline.stages.classify_stage import classify_stage

        classify_stage(
            ckpt,
            file=expanded(file),
            column=column,
            output=expanded(output),
            threshold=threshold,
            batch_size=batch_size,
        )
    else:
        from pipeline.inference import print_label

        given = sys.stdin.read().removesuffix("\n") if text == "-" else text
        print_label(ckpt, given, threshold)


def score(
    *,
    ckpt: str | None = None,
    before: str | None = None,
    responses: str | None = None,
    data: dict[str, Any] | None = None,
    split: Literal["train", "val", "test"] = "test",
    max_new_tokens: int = 256,
    batch_size: int = 32,
    precision: Precision = "auto",
    judge: JudgeConfig | None = None,
) -> None:
    """Score a model's responses to held-out instructions, or responses from a file.

    Args:
        ckpt: checkpoint directory of the tuned model, or published weights (--data.test_source).
        before: model to compare with, likewise; by default the one that ckpt was tuned from.
        responses: a responses.jsonl file to score instead of a checkpoint's responses.
        data: arguments of InstructionDataModule; by default those that ckpt was tuned with. A file
            given as test_source is answered whole.
        split: which split to answer: train, val or test.
        max_new_tokens: maximum length of each response, in tokens.
        batch_size: responses generated at a time.
        precision: 32-true, bf16-true, f16-weights (float32, but weights held in float16), or auto:
            bf16-true where hardware multiplies bf16, else f16-weights if supported, else 32-true.
        judge: language model that grades from 0 to 100; null for text metrics alone.
    """
    if (ckpt is None) == (responses is None):
        raise ValueError("give either --ckpt or --responses.")
    if ckpt is None and before is not None:
        raise ValueError("--before compares with --ckpt; give both.")
    for name, value in (("max_new_tokens", max_new_tokens), ("batch_size", batch_size)):
        if value < 1:
            raise ValueError(f"{name} is {value}; give at least 1.")
    from pipeline.hardware import inference_precision
    from pipeline.stages.answering import Answering
    from pipeline.stages.score_stage import score_stage

    score_stage(
        ckpt=ckpt,
        before=before,
        responses=_path(responses),
        data=data,
        answering=Answering(split, max_new_tokens, batch_size, inference_precision(precision)),
        judge=judge,
    )


def import_(*, source: str, output: str | None = None) -> None:
    """Import published weights as a checkpoint: from Hugging Face, or from a .gguf file.

    Prints its path; stderr says how many tensors were read, and which were left out.

    Args:
        source: a directory, a .gguf file, a repository of the hub (owner/name or
            owner/name@revision), or smollm2-135m-instruct, which comes with pip.
        output: directory of the checkpoint; by default in the directory of the run.
    """
    from pipeline.stages.import_stage import import_stage

    import_stage(source, output=_path(output))


def export(
    *,
    ckpt: str,
    format: Literal["huggingface", "peft", "gguf"],
    dtype: Literal["float32", "bfloat16", "f32", "f16", "q8_0"] | None = None,
    output: str | None = None,
) -> None:
    """Export a model for transformers, vLLM, PEFT, llama.cpp or Ollama, with a model card.

    Prints the path of the directory. An earlier export there is replaced, whatever its format.

    Args:
        ckpt: checkpoint directory, or any source that `import` takes.
        format: huggingface (adapters merged), peft (the adapter alone, for the exported base), or
            gguf (with a Modelfile for Ollama).
        dtype: of the weights: float32 (default) or bfloat16; for gguf f32 (default), f16 or q8_0.
        output: the directory; by default in the directory of the run.
    """
    from pipeline.stages.export_stage import export_stage

    export_stage(ckpt, form=format, dtype=dtype, output=_path(output))


def merge(*, ckpt: str, data: dict[str, Any] | None = None, output: str | None = None) -> None:
    """Merge a LoRA adapter into its base, with a certificate that outputs are unchanged.

    Prints the path of the merged checkpoint. If logits, greedy texts or decisions on the test set
    differ, nothing is written.

    Args:
        ckpt: checkpoint directory of a LoRA run.
        data: arguments of its data module to change, if the data has moved.
        output: directory of the merged checkpoint; by default in the directory of the run.
    """
    from pipeline.stages.merge_stage import merge_stage

    merge_stage(ckpt, data=data, output=_path(output))


def serve(
    *,
    ckpt: str,
    name: str = "",
    host: str = "127.0.0.1",
    port: int = 8000,
    api_key_env: str = "",
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    precision: Precision = "auto",
    max_rows: int = 16,
    max_tokens: int = 16384,
) -> None:
    """Serve a language model over HTTP with OpenAI's API, or a classifier with vLLM's.

    Requests are batched continuously: each gets a token per step, and may join or leave between.

    Args:
        ckpt: checkpoint directory, or any source that `import` takes.
        name: what clients call the model; by default its run's name, or the one given as ckpt.
        host: address to listen on; on loopback without a key, requests must name localhost or an
            address as their host.
        port: port to listen on; 0 takes a free one.
        api_key_env: environment variable with the key that clients must send; empty for none.
        max_new_tokens: maximum length of answers to requests that set none, in tokens.
        temperature: sampling temperature of requests that set none; 0 takes the likeliest token.
        precision: 32-true, bf16-true, f16-weights (float32, but weights held in float16), or auto:
            bf16-true where the hardware multiplies bf16, else f16-weights if supported, else
            32-true. A classifier answers in float32.
        max_rows: how many texts are generated at the same time.
        max_tokens: token limit over these texts (each counted as the longest) and cached ones.
    """
    from pipeline.decoding.sampling import Sampling
    from pipeline.serving.engine import Limits
    from pipeline.serving.serve import serve

    serve(
        ckpt,
        name=name,
        address=(host, port),
        api_key_env=api_key_env,
        precision=precision,
        limits=Limits(max_rows, max_tokens),
        defaults=Sampling(max_new_tokens, temperature),
    )


def ui(*, host: str = "127.0.0.1", port: int = 5000, sync: bool = False) -> None:
    """Browse the runs in MLflow's UI, after bringing its store up to date.

    Args:
        host: address to listen on; whoever reaches it sees everything.
        port: port to listen on.
        sync: only bring the store up to date.
    """
    if not 0 < port < 65536:
        raise ValueError(f"port is {port}; give one from 1 to 65535.")
    from pipeline.runs.stage_run import mlruns_root
    from pipeline.runs.tracking import open_ui, sync_all

    if sync:
        counts = sync_all(mlruns_root(), ask=True)
        say(f"{counts['runs']} runs, {counts['lines']} lines sent")
    else:
        open_ui(mlruns_root(), host, port)


def _path(given: str | None) -> Path | None:
    return expanded(given) if given else None


def _draws(temperature: float, top_k: int, top_p: float, seed: int) -> dict[str, Any]:
    if not 0 <= seed < 2**63:
        raise ValueError(f"seed is {seed}; give a whole number from 0 to 2^63 - 1.")
    if temperature == 0 and (top_k > 0 or top_p < 1):
        raise ValueError(
            f"top_k {top_k} and top_p {top_p} shape draws, but temperature 0 draws nothing; "
            "give a temperature above 0."
        )
    return {"temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": seed}


_NAMED = (run, tokenizer_train, score, generate, chat, classify, import_, export, merge, serve, ui)
FUNCTIONS: dict[str, Callable[..., int | None]] = {
    function.__name__.rstrip("_").replace("_", " "): function for function in _NAMED
}
