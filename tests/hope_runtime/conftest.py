from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer

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
