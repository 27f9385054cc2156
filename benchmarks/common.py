"""What the benchmarks share: the model, its twin in transformers, and where and when they ran."""

from __future__ import annotations

import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from rich.console import Console

from hope_runtime import weights
from hope_runtime.engine import Consolidation, Engine, Turn
from hope_runtime.model import Hope
from hope_runtime.report import Fact, Finished
from hope_runtime.sampling import Sampling
from hope_runtime.state import State
from hope_runtime.tokenizer import Message, Role
from hope_runtime.weights.checkpoint import Checkpoint
from hope_runtime.weights.default import default_cache, fetch_default

console = Console(highlight=False, soft_wrap=True)
GREEDY = Sampling(temperature=0)

NAMES = {
    "attention_norm": "input_layernorm",
    "query": "self_attn.q_proj",
    "key": "self_attn.k_proj",
    "value": "self_attn.v_proj",
    "output": "self_attn.o_proj",
    "mlp_norm": "post_attention_layernorm",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}


def where() -> str:
    """Return machine and commit, for the head of every table."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()
    processor = platform.processor() or platform.machine()
    return (
        f"commit {commit or 'unknown'}, {processor}, {os.cpu_count()} cores, "
        f"{torch.get_num_threads()} threads, torch {torch.__version__}, "
        f"load {os.getloadavg()[0]:.1f}"
    )


def checkpoint() -> Checkpoint:
    return weights.read(fetch_default(default_cache(), lambda text: console.log(text)))


def engine(found: Checkpoint, dtype: torch.dtype, lanes: int = 16) -> Engine:
    config = found.config if found.config.levels else found.config.stacked()
    model = Hope(config, found.weights, dtype=dtype)
    return Engine(model, found.tokenizer, lanes=lanes, clock=time.perf_counter)


def prompt(found: Checkpoint, text: str) -> tuple[tuple[int, float], ...]:
    """Return the opening of a session, its user tokens learnable."""
    spans = found.tokenizer.opening([Message(Role.USER, text)])
    return tuple((id, float(span.role is Role.USER)) for span in spans for id in span.ids)


def turn(
    id: str, state: State, given: Sequence[tuple[int, float]], most: int, *, learn: bool = False
) -> Turn:
    return Turn(
        id=id,
        state=state,
        given=tuple(given),
        closing=(),
        most=most,
        said_weight=0.0,
        sampling=GREEDY,
        stops=(),
        learn=learn,
    )


def run(engine: Engine, *jobs: Turn | Consolidation) -> list[Fact]:
    for job in jobs:
        engine.submit(job)
    facts: list[Fact] = []
    while not engine.idle:
        facts += engine.step()
    return facts


def end(facts: Sequence[Fact]) -> Finished:
    return next(fact for fact in facts if isinstance(fact, Finished))


def timed(action: Callable[[], Any]) -> float:
    began = time.perf_counter()
    action()
    return time.perf_counter() - began


def interleaved(rounds: int, *actions: Callable[[], Any]) -> list[float]:
    """Return each action's median seconds; they take turns, so that drift hits all of them."""
    for action in actions:
        action()
    taken = [[timed(action) for action in actions] for _ in range(rounds)]
    return [statistics.median(column) for column in zip(*taken, strict=True)]


def transformers_twin(found: Checkpoint, dtype: torch.dtype) -> Any:
    """Return transformers' model with the same weights and precision."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = found.config
    twin = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=config.vocabulary,
            hidden_size=config.width,
            intermediate_size=config.hidden,
            num_hidden_layers=config.blocks,
            num_attention_heads=config.heads,
            num_key_value_heads=config.key_heads,
            head_dim=config.head_width,
            rms_norm_eps=config.norm_eps,
            rope_parameters={"rope_type": "default", "rope_theta": config.rotary_base},
            max_position_embeddings=found.context,
            tie_word_embeddings=True,
        )
    )
    named = {
        "model.embed_tokens.weight": found.weights["embedding"],
        "lm_head.weight": found.weights["embedding"],
        "model.norm.weight": found.weights["norm"],
    }
    for i in range(config.blocks):
        for ours, theirs in NAMES.items():
            named[f"model.layers.{i}.{theirs}.weight"] = found.weights[f"blocks.{i}.{ours}"]
    twin.load_state_dict(named)
    return twin.to(dtype).eval()
