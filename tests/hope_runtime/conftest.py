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

from hope_runtime.config import HopeConfig
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

    No window cache, no batch, no matrix of scores: what the efficient form must agree with.
    `history` holds, for every block, the key (before rotation) and value of each token read.
    """

    def __init__(self, config: HopeConfig, weights: Mapping[str, Tensor]) -> None:
        self.config = config
        self.weights = {name: tensor.double() for name, tensor in weights.items()}
        self.frequency = frequencies(config, torch.device("cpu"))
        self.history: list[list[tuple[Tensor, Tensor]]] = [[] for _ in range(config.blocks)]

    def read(self, tokens: Sequence[int], deltas: Mapping[str, Tensor]) -> Tensor:
        """Read tokens, each after all that came before it; return their logits."""
        return torch.stack([self._token(token, deltas) for token in tokens])

    def forget(self, position: int) -> None:
        """Take back what was read from `position` on, and hold the rest as constants."""
        self.history = [
            [(key.detach(), value.detach()) for key, value in block[:position]]
            for block in self.history
        ]

    def _token(self, token: int, deltas: Mapping[str, Tensor]) -> Tensor:
        x = self.weights["embedding"][token]
        for i, history in enumerate(self.history):
            x = x + self._mix(i, x, history)
            x = x + self._mlp(i, x, deltas)
        head = self.weights["embedding" if self.config.tied_head else "head"]
        return head @ self._norm(x, self.weights["norm"])

    def _mix(self, i: int, x: Tensor, history: list[tuple[Tensor, Tensor]]) -> Tensor:
        config = self.config
        h = self._norm(x, self.weights[f"blocks.{i}.attention_norm"])
        query, key, value = (
            (self.weights[f"blocks.{i}.{part}"] @ h).view(-1, config.head_width)
            for part in ("query", "key", "value")
        )
        history.append((key, value))
        return self.weights[f"blocks.{i}.output"] @ self.attend(query, history)

    def attend(self, query: Tensor, history: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
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

    def _mlp(self, i: int, x: Tensor, deltas: Mapping[str, Tensor]) -> Tensor:
        weights, name = self.weights, f"blocks.{i}"
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


@pytest.fixture(scope="session")
def plain() -> type[Plain]:
    """Return the reference model: `plain(config, weights).read(tokens, deltas)`."""
    return Plain
