from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer
from torch import Tensor

from hope_runtime.config import HopeConfig, Rule, Variant
from hope_runtime.layers.attention import frequencies
from hope_runtime.weights.default import SMOLLM2, default_cache
from hope_runtime.weights.random import CHATML, SPECIAL

TEXT = [
    "The quick brown fox jumps over the lazy dog, again and again.",
    "It was the best of times, it was the worst of times; the age of wisdom.",
    "Straße, naïve café, 東京, 1234567890, x = y + 1",
]


@pytest.fixture(scope="session")
def default_file() -> Path:
    """Return the default model's file, where it was fetched."""
    file = default_cache() / SMOLLM2.file
    if not file.is_file():
        pytest.skip(f"{file} is not there; make weights fetches it")
    return file


@pytest.fixture(scope="session")
def hf_directory(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Return a function that saves a tiny random model of a family as transformers does.

    `hf_directory("llama")`, `"mistral"`, `"qwen2"` or `"qwen3"`; keyword arguments change its
    configuration, and `dtype=torch.bfloat16` or `max_shard_size="20KB"` how it is saved.
    """

    def make(
        family: str,
        *,
        dtype: torch.dtype = torch.float32,
        max_shard_size: str = "5GB",
        **changes: Any,
    ) -> Path:
        path = tmp_path_factory.mktemp(family) / f"tiny-{family}"
        model = _model(family, changes).to(dtype)
        model.save_pretrained(path, max_shard_size=max_shard_size)
        _tokenizer().save_pretrained(path)
        return path

    return make


def _model(family: str, changes: dict[str, Any]) -> Any:
    import transformers

    name = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}[family]
    config = getattr(transformers, f"{name}Config")(
        **{
            "vocab_size": 400,
            "hidden_size": 32,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "intermediate_size": 48,
            "rms_norm_eps": 1e-5,
            "max_position_embeddings": 4096,
            "bos_token_id": 0,
            "eos_token_id": 2,
            "pad_token_id": None,
            **changes,
        }
    )
    torch.manual_seed(1)
    model = getattr(transformers, f"{name}ForCausalLM")(config)
    with torch.no_grad():
        for parameter in model.parameters():
            centre = 1.0 if bool((parameter == 1.0).all()) else 0.0
            parameter.normal_(centre, 0.2)
    return model


def _tokenizer() -> Any:
    import transformers

    backend = tokenizers.Tokenizer(BPE())
    backend.pre_tokenizer = ByteLevel(add_prefix_space=False)
    backend.decoder = ByteLevelDecoder()
    trainer = BpeTrainer(
        vocab_size=380,
        special_tokens=list(SPECIAL),
        initial_alphabet=ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(TEXT, trainer)
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<|endoftext|>", eos_token="<|im_end|>"
    )
    tokenizer.chat_template = CHATML
    return tokenizer


class Plain:
    """The model as its definition says it: float64, one token after another, key by key.

    No window cache, no batch, no matrix of scores; every memory of a head is a matrix of its own,
    written by its own target. It is what the efficient form must agree with.
    `history` holds, for every block and token read, the key (before rotation) and value, or the
    convolution's input and the memories after the token.
    """

    def __init__(self, config: HopeConfig, weights: Mapping[str, Tensor]) -> None:
        self.config = config
        self.weights = {name: tensor.double() for name, tensor in weights.items()}
        self.frequency = frequencies(config, torch.device("cpu"))
        self.history: list[list[tuple[Any, ...]]] = [[] for _ in range(config.blocks)]

    def read(self, tokens: Sequence[int], deltas: Mapping[str, Tensor]) -> Tensor:
        """Read tokens, each after all that came before it; return their logits."""
        return torch.stack([self._token(token, deltas) for token in tokens])

    def forget(self, position: int) -> None:
        """Take back what was read from `position` on, and hold the rest as constants."""
        self.history = [[_detached(token) for token in block[:position]] for block in self.history]

    def _token(self, token: int, deltas: Mapping[str, Tensor]) -> Tensor:
        x = self.weights["embedding"][token]
        for i, history in enumerate(self.history):
            mixes = self._remember if i in self.config.memory_blocks else self._mix
            x = self._think(i, x + mixes(i, x, history), deltas)
        head = self.weights["embedding" if self.config.tied_head else "head"]
        return head @ self._norm(x, self.weights["norm"])

    def _mix(self, i: int, x: Tensor, history: list[tuple[Any, ...]]) -> Tensor:
        config = self.config
        h = self._norm(x, self.weights[f"blocks.{i}.attention_norm"])
        query, key, value = (
            (self.weights[f"blocks.{i}.{part}"] @ h).view(-1, config.head_width)
            for part in ("query", "key", "value")
        )
        history.append((key, value))
        return self.weights[f"blocks.{i}.output"] @ self.attend(query, history)

    def attend(self, query: Tensor, history: Sequence[tuple[Any, ...]]) -> Tensor:
        """Let the last token of `history` look at what it may, with all its query heads."""
        config, now = self.config, len(history) - 1
        shared = [head // (config.heads // config.key_heads) for head in range(config.heads)]
        scores, values = [], []
        for position, (key, value) in enumerate(history):
            distance = now - position
            if distance >= config.window:
                if position >= config.sinks:
                    continue
                distance = min(now, config.window + config.sinks - 1) - position
            turned = self.rotate(query, distance)
            scores.append((turned * key[shared]).sum(-1) / config.head_width**0.5)
            values.append(value[shared])
        weights = torch.softmax(torch.stack(scores), 0)  # [keys, heads]
        return (weights[..., None] * torch.stack(values)).sum(0).flatten()

    def rotate(self, x: Tensor, distance: int) -> Tensor:
        """Turn each pair (n, n + N/2) of a head as one complex number."""
        pairs = torch.complex(*x.chunk(2, -1))
        turned = pairs * torch.polar(torch.ones_like(self.frequency), distance * self.frequency)
        return torch.cat([turned.real, turned.imag], -1)

    def _remember(self, i: int, x: Tensor, history: list[tuple[Any, ...]]) -> Tensor:
        memory, now = self.config.memory, len(history)
        assert memory is not None
        weight = {
            name.removeprefix(f"blocks.{i}.memory_"): tensor
            for name, tensor in self.weights.items()
            if name.startswith(f"blocks.{i}.memory_")
        }
        h = self._norm(x, weight["norm"])
        seen = torch.cat([weight["input"] @ h, weight["query"] @ h])
        mixed = weight["convolution"][:, -1] * seen
        for ago in range(1, min(memory.taps, now + 1)):
            mixed = mixed + weight["convolution"][:, -1 - ago] * history[now - ago][0]
        x, query = (mixed * torch.sigmoid(mixed)).view(2, memory.heads, memory.head_width)
        starts = _starts(weight["start"])
        _, live, anchor = history[-1] if history else (None, starts, starts)
        y, live = _step(memory.rule, weight, live, anchor, x, _unit(query))
        if (now + 1) % memory.rule.chunk == 0:
            live = anchor = _bounded(memory.rule, live, starts)
        history.append((seen, live, anchor))
        y = y / torch.sqrt((y * y).mean(-1, keepdim=True) + 1e-6) * weight["head_norm"]
        gate = weight["gate"] @ h
        return weight["output"] @ (y.flatten() * gate * torch.sigmoid(gate))

    def _think(self, i: int, x: Tensor, deltas: Mapping[str, Tensor]) -> Tensor:
        names = [f"blocks.{i}", *(f"blocks.{i}.mlps.{n}" for n in range(1, self.config.chain))]
        if self.config.variant is Variant.INDEPENDENT:
            shares = self.weights[f"blocks.{i}.mlp_shares"]
            return x + sum(s * self._mlp(n, x, deltas) for s, n in zip(shares, names, strict=True))
        for name in names:
            x = x + self._mlp(name, x, deltas)
        return x

    def _mlp(self, name: str, x: Tensor, deltas: Mapping[str, Tensor]) -> Tensor:
        weights = self.weights
        h = self._norm(x, weights[f"{name}.mlp_norm"])
        gate_up = torch.cat([weights[f"{name}.gate"], weights[f"{name}.up"]])
        down = weights[f"{name}.down"]
        if f"{name}.down" in deltas:
            gate_up = gate_up + deltas[f"{name}.gate_up"].double()
            down = down + deltas[f"{name}.down"].double()
        gate, up = (gate_up @ h).chunk(2)
        return down @ (gate / (1 + torch.exp(-gate)) * up)

    def _norm(self, x: Tensor, gain: Tensor) -> Tensor:
        return x / torch.sqrt((x * x).mean() + self.config.norm_eps) * gain


Boxes = dict[str, Tensor]  # each [heads, rows, head width]


def _starts(start: Tensor) -> Boxes:
    """Return the learned starts of a block's memories.

    Beside those of the paper there is one that starts as the identity. Nothing is recalled from
    it: it says what the memories of a head have in common, to be measured and scaled.
    """
    width = start.shape[-1]
    names = ("key", "value", "memory")
    boxes = {name: start[:, n * width : (n + 1) * width] for n, name in enumerate(names)}
    boxes["rate"] = start[:, 3 * width : 3 * width + 1]
    boxes["retain"] = start[:, 3 * width + 1 : 3 * width + 2]
    if start.shape[1] > 3 * width + 2:
        boxes["query"] = start[:, 3 * width + 2 :]
    boxes["common"] = torch.eye(width, dtype=start.dtype).expand(len(start), -1, -1)
    return boxes


def _step(
    rule: Rule, weight: Mapping[str, Tensor], live: Boxes, anchor: Boxes, x: Tensor, query: Tensor
) -> tuple[Tensor, Boxes]:
    """Recall, then let every memory write the target that it makes itself (eq. 83 to 88)."""
    starts = _starts(weight["start"])
    follows, passes = (weight[part][:, None, None] for part in ("modification", "passage"))

    def made(name: str, u: Tensor) -> Tensor:
        """Apply a memory as it was at the chunk's start, as far as projections follow it."""
        return ((1 - follows) * starts[name] + follows * anchor[name]) @ u[..., None]

    def recalled(name: str, u: Tensor) -> Tensor:
        """Apply a memory as it is now, with as much of its start as is passed on."""
        return (live[name] - (1 - passes) * starts[name]) @ u[..., None]

    key, value = _unit(made("key", x)[..., 0]), _unit(made("value", x)[..., 0])
    rate = rule.rate_max * torch.sigmoid(made("rate", x)[:, 0, 0] + weight["rate_bias"])
    forgets = torch.sigmoid(made("retain", x)[:, 0, 0] + weight["retain_bias"])
    retain = (1 - (1 - rule.retain_min) * forgets).clamp(max=rule.retain_max)
    rate, retain = rate[:, None, None], retain[:, None, None]
    if "query" in live:
        query = _unit(made("query", x)[..., 0])
    size = torch.sqrt((made("common", value) ** 2).sum(1, keepdim=True) + 1e-12)
    scale = (rule.target_norm / size).clamp(max=1.0)
    after = {
        name: retain * box
        + (1 - retain) * starts[name]
        + rate * (scale * made(name, value) - 2 * recalled(name, key)) * key[:, None]
        for name, box in live.items()
    }
    return recalled("memory", query)[..., 0], after


def _bounded(rule: Rule, live: Boxes, starts: Boxes) -> Boxes:
    size = torch.sqrt(((live["common"] - starts["common"]) ** 2).sum((1, 2), keepdim=True))
    scale = (rule.memory_norm / size).clamp(max=1.0)
    return {name: starts[name] + scale * (box - starts[name]) for name, box in live.items()}


def _unit(x: Tensor) -> Tensor:
    return x / torch.sqrt((x * x).sum(-1, keepdim=True) + 1e-12)


def _detached(token: Any) -> Any:
    if isinstance(token, Tensor):
        return token.detach()
    if isinstance(token, dict):
        return {name: tensor.detach() for name, tensor in token.items()}
    return tuple(_detached(part) for part in token)


@pytest.fixture(scope="session")
def plain() -> type[Plain]:
    """Return the reference model: `plain(config, weights).read(tokens, deltas)`."""
    return Plain
