"""What is measured, and against which peers."""

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks import prepare
from benchmarks.contestants.serve_load import N_CLIENTS
from benchmarks.harness import Contestant, Precision, Workload
from benchmarks.peers import (
    HUGGING_FACE,
    LITGPT,
    LLAMA_CPP,
    LLAMA_SERVER,
    VLLM,
    Environment,
    python_with,
)
from pipeline.gpt import GPT, GPTConfig
from pipeline.hardware import default_device, multiplies_bf16, multiplies_f16_weights
from pipeline.lora import LoRAConfig, attach, is_adapter_key
from pipeline.models import load
from pipeline.training.flops import flops_per_token

# bf16 where the hardware multiplies it: emulated, it would say nothing about anyone
HAS_BF16 = multiplies_bf16(default_device())
ON_GPU = default_device().type == "cuda"
PRECISIONS: tuple[Precision, ...] = ("bf16", "float32") if HAS_BF16 else ("float32",)
# of what decodes with ours: with weights in float16 too where there are such products
OF_OURS: tuple[Precision, ...] = (
    (*PRECISIONS, "float16") if multiplies_f16_weights(default_device()) else PRECISIONS
)
# Lightning's names; litgpt's bf16-true was slower than its bf16-mixed where both were measured
FABRIC: dict[Precision, str] = {"bf16": "bf16-mixed", "float32": "32-true"}
ANSWERING: dict[Precision, str] = {
    "float32": "32-true",
    "bf16": "bf16-true",
    "float16": "f16-weights",
}
TRANSFORMERS, TRL, PEFT = "transformers Trainer", "TRL", "transformers + PEFT"
GGUF: dict[Precision, str] = {"float32": "f32", "float16": "f16", "q8_0": "q8_0"}
N_NEW = 64  # tokens of every prompt in P5


def pretraining(key: str, title: str, config: GPTConfig, n_rows: int, n_steps: int) -> Workload:
    """P1 and P2: `fit` against the naive loop and transformers."""
    weights = prepare.gpt2(config, key)
    steps = prepare.pretraining_steps(config.block_size, n_rows, n_steps)
    peer_words = ("{record}", str(weights), str(steps), str(n_steps))

    def contestants() -> Iterator[Contestant]:
        for precision in PRECISIONS:
            yield _pretraining_fit(config, weights, n_rows, n_steps, precision)
        for precision in PRECISIONS if ON_GPU else ("float32",):
            words = (*peer_words, precision)
            yield _with_our_python("plain PyTorch loop", precision, "plain_loop", *words)
        for precision in PRECISIONS:
            yield _peer(TRANSFORMERS, precision, "transformers_pretrain", *peer_words, precision)

    flops = flops_per_token(GPT.skeleton(config), config.block_size)
    n_warmup = 10 if ON_GPU else 2  # what is compiled and captured there is once for all
    title = f"{title}, {n_rows} x {config.block_size} tokens a step"
    return Workload(key, title, list(contestants()), n_warmup, flops, 0.02, steps)


def small_pretraining() -> Workload:
    """P1."""
    config = prepare.gpt2_config(**prepare.SMALL, block_size=256)
    return pretraining("P1", "pretrain 6 layers x 384", config, 32, 40 if ON_GPU else 8)


def gpt2_pretraining() -> Workload:
    """P2."""
    config = prepare.gpt2_config(**prepare.GPT2, block_size=1024 if ON_GPU else 512)
    n_rows, n_steps = (16, 25) if ON_GPU else (4, 6)
    return pretraining("P2", "pretrain GPT-2 124M", config, n_rows, n_steps)


def small_steps() -> Workload:
    """P6: steps of 50 to 100 ms, short enough for a framework's overhead to show."""
    config = prepare.gpt2_config(n_layer=2, n_head=4, n_embd=256, block_size=128, vocab_size=4096)
    weights, n_steps = prepare.gpt2(config, "P6"), 300
    n_rows = 8 if "bf16" in PRECISIONS else 2
    words = ("{record}", str(weights), str(n_rows), str(n_steps))

    def contestants() -> Iterator[Contestant]:
        for precision in PRECISIONS:
            yield _pretraining_fit(config, weights, n_rows, n_steps, precision)
            yield _with_our_python("a bare loop", precision, "bare_loop", *words, precision)

    flops = flops_per_token(GPT.skeleton(config), config.block_size)
    title = f"small steps (2 layers x 256, {n_rows} x 128 tokens)"
    return Workload("P6", title, list(contestants()), 40, flops, 0.02, prepare.vocabulary())


def instruction_tuning() -> Workload:
    """P3; its peak memory is P9."""
    return _instructions(
        "P3", "LoRA (r 8, q and v) on instructions", 8, ["q", "v"], "q_proj,v_proj"
    )


def instruction_tuning_all() -> Workload:
    """P3 with adapters on all linear layers."""
    names = ["all-linear"]
    return _instructions("P3b", "LoRA (r 16, all linears) on instructions", 16, names, "all-linear")


def _instructions(key: str, title: str, rank: int, ours: list[str], theirs: str) -> Workload:
    n_steps = len(list(prepare.steps_of(prepare.instructions())))
    entries, weights = prepare.instruction_entries(n_steps), prepare.smollm2()

    def contestants() -> Iterator[Contestant]:
        for precision in PRECISIONS:
            lora = {"rank": rank, "alpha": 2 * rank, "dropout": 0.0, "targets": ours}
            options = {
                "model.init_from": prepare.SMOLLM2,
                "model.lora": {**lora, "rslora": False, "dora": False},
                "data.source": prepare.INSTRUCTIONS,
                "data.max_length": 512,
                "trainer.max_epochs": 1,
                **_steady("adamw", lr=2e-4, betas=[0.9, 0.999]),
            }
            yield _fit("instruct.yaml", precision, options)
        for precision in PRECISIONS:
            words = ("{record}", str(weights), str(entries), precision, str(rank), theirs)
            yield _peer(TRL, precision, "trl_sft", *words)
        converted = prepare.smollm2_for_litgpt(python_with(LITGPT))
        for precision in PRECISIONS:
            words = ("{record}", str(converted), str(entries), FABRIC[precision], str(rank), theirs)
            yield _peer("litgpt", precision, "litgpt_lora", *words, of=LITGPT)

    flops = _adapted_flops(rank, ours)
    return Workload(key, title, list(contestants()), 2, flops, 0.05, entries)


def spam_tuning() -> Workload:
    """P4: the rate over the first steps of an epoch."""
    n_steps = 40
    steps, weights = prepare.spam_steps(n_steps), prepare.smollm2()

    def contestants() -> Iterator[Contestant]:
        for precision in PRECISIONS:
            options = {
                "model.init_from": prepare.SMOLLM2,
                "model.trainable": "lora",
                "model.lora": {
                    **{"rank": 16, "alpha": 32, "dropout": 0.0, "targets": ["all-linear"]},
                    **{"rslora": False, "dora": False},
                },
                "data.source": prepare.SMS,
                "data.suffix": "\n",
                "data.balance": True,
                "data.batch_size": 8,
                "trainer.max_steps": n_steps,
                **_steady("adamw", lr=2e-4, betas=[0.9, 0.999]),
            }
            yield _fit("spam.yaml", precision, options)
        for precision in PRECISIONS:
            words = ("{record}", str(weights), str(steps), precision)
            yield _peer(PEFT, precision, "transformers_classify", *words)

    flops = _adapted_flops(16, ["all-linear"])
    title = f"LoRA (r 16, all linears) on messages, {n_steps} steps of 8"
    # heads begin at random, each its own: losses agree step by step, but roughly
    return Workload("P4", title, list(contestants()), 2, flops, 0.2, steps)


def generation(n_prompts: int) -> Workload:
    """P5."""
    prompts = prepare.prompts(n_prompts)
    words = ("{record}", str(prepare.smollm2()), str(prompts), str(N_NEW))

    def contestants() -> Iterator[Contestant]:
        for precision in OF_OURS:
            own = (*words, ANSWERING[precision])
            yield _with_our_python("ours", precision, "generate_ours", *own, ours=True)
        for precision in PRECISIONS:
            yield _peer("transformers", precision, "generate_transformers", *words, precision)
        if not ON_GPU:  # on a CPU, which pip has vLLM and builds llama.cpp
            for precision in PRECISIONS:
                yield _peer("vLLM", precision, "generate_vllm", *words, precision, of=VLLM)
            for precision, kind in GGUF.items():
                llama = ("{record}", str(prepare.smollm2_gguf(kind)), *words[2:], precision)
                yield _peer("llama.cpp", precision, "generate_llama_cpp", *llama, of=LLAMA_CPP)

    asked = "1 prompt" if n_prompts == 1 else f"{n_prompts} prompts"
    title = f"greedy generation, {asked}, {N_NEW} tokens each"
    return Workload(f"P5-{n_prompts}", title, list(contestants()), 1, None, 0.0, prompts)


def serving() -> Workload:
    """P10: everyone in float32, for identical texts, and with the smaller weights that many use."""
    weights, questions = prepare.smollm2(), prepare.questions(64)

    def contestants() -> Iterator[Contestant]:
        ours = ["pipeline", "serve", f"--ckpt={weights}", "--name=it", "--port={port}"]
        it = {"model": "it"}
        for precision in OF_OURS:
            own = [*ours, f"--precision={ANSWERING[precision]}"]
            yield _server("ours", precision, questions, it, *own, ours=True)
        transformers = ["transformers.cli.transformers", "serve", str(weights), "--port={port}"]
        words = [*transformers, "--device=cpu", "--dtype=float32"]
        yield _server("transformers serve", "float32", questions, {"model": str(weights)}, *words)
        words = [_module("vllm_server")[1], str(weights), "{port}", str(N_CLIENTS)]
        yield _server("vLLM's server", "float32", questions, it, *words, of=VLLM)
        for precision, kind in GGUF.items():
            words = ["llama_cpp.server", f"--model={prepare.smollm2_gguf(kind)}", "--port={port}"]
            words += ["--model_alias=it", "--n_ctx=2048"]
            words += ["--type_k=0", "--type_v=0"] if precision == "float32" else []  # float32 too
            plainly = {**it, "repeat_penalty": 1.0}  # by default it is 1.1 there
            yield _server("llama-cpp-python", precision, questions, plainly, *words, of=LLAMA_CPP)
        for precision, kind in GGUF.items():
            llama = [str(prepare.smollm2_gguf(kind)), "{port}", precision, str(N_CLIENTS)]
            words = [_module("llama_server")[1], *llama]
            yield _server("llama.cpp's server", precision, questions, it, *words, of=LLAMA_SERVER)

    title = "a server that 16 ask at a time, 64 questions, 64 tokens at most"
    return Workload("P10", title, list(contestants()), 0, None, 0.0, questions, ends_freely=True)


WORKLOADS: dict[str, Callable[[], Workload]] = {
    "P1": small_pretraining,
    "P2": gpt2_pretraining,
    "P3": instruction_tuning,
    "P3b": instruction_tuning_all,
    "P4": spam_tuning,
    "P5-1": lambda: generation(1),
    "P5-16": lambda: generation(16),
    "P5-64": lambda: generation(64),
    "P6": small_steps,
    "P10": serving,
}


def _steady(name: str, *, lr: float, betas: list[float]) -> dict[str, object]:
    """The same optimizer for all, at a constant learning rate; the run does nothing but train."""
    values = {"name": name, "lr": lr, "betas": betas, "weight_decay": 0.0, "max_grad_norm": 1.0}
    return {
        "model.optimizer": {**values, "warmup_steps": 0, "final_lr_fraction": 1.0},
        "trainer.limit_val_batches": 0,
        "trainer.callbacks": [
            {"class_path": "benchmarks.clock.StepClock", "init_args": {"path": "{record}"}}
        ],
        "seed_everything": prepare.SEED,
    }


def _pretraining_fit(
    config: GPTConfig, weights: Path, n_rows: int, n_steps: int, precision: Precision
) -> Contestant:
    options = {
        "model.gpt": "null",
        "model.init_from": str(weights),
        "data.block_size": config.block_size,
        "data.batch_size": n_rows,
        "data.max_tokens": n_rows * config.block_size,
        "trainer.max_steps": n_steps,
        **({"model.compile": True} if ON_GPU else {}),
        **_steady("adamw", lr=1e-3, betas=[0.9, 0.95]),
    }
    return _fit("pretrain.yaml", precision, options)


def _fit(config: str, precision: Precision, options: dict[str, object]) -> Contestant:
    words = [sys.executable, "-m", "pipeline", "fit", "-c", f"configs/{config}"]
    words += [f"--precision={FABRIC[precision]}", "--run.name=bench"]
    words += [f"--{key}={_word(value)}" for key, value in options.items()]
    return Contestant("ours, through fit", precision, words, is_ours=True)


def _word(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _with_our_python(
    name: str, precision: Precision, module: str, *words: str, ours: bool = False
) -> Contestant:
    return Contestant(name, precision, [sys.executable, *_module(module), *words], is_ours=ours)


def _peer(
    name: str,
    precision: Precision,
    module: str,
    *words: str,
    of: Environment = HUGGING_FACE,
) -> Contestant:
    python = python_with(of)
    return Contestant(name, precision, [python, *_module(module), *words])


def _server(
    name: str,
    precision: Precision,
    questions: Path,
    asked: dict[str, Any],
    *words: str,
    of: Environment = HUGGING_FACE,
    ours: bool = False,
) -> Contestant:
    load = [*_module("serve_load"), "{record}", str(questions), json.dumps(asked)]
    python = sys.executable if ours else python_with(of)
    command = [sys.executable, *load, python, "-m", *words]
    return Contestant(name, precision, command, is_ours=ours)


def _module(name: str) -> tuple[str, str]:
    return "-m", f"benchmarks.contestants.{name}"


def _adapted_flops(rank: int, targets: list[str]) -> float:
    """Forward and backward FLOPs of SmolLM2 with adapters, per token without logits."""
    model = load(prepare.SMOLLM2, torch.bfloat16).gpt
    attach(model, LoRAConfig(rank, 2 * rank, 0.0, targets, rslora=False, dora=False))
    plain = sum(
        p.numel()
        for name, p in model.named_parameters()
        if name.startswith("blocks") and p.dim() == 2 and not is_adapter_key(name)
    )
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return 4.0 * plain + 6.0 * trained
