import contextlib
import re
import struct
import unicodedata
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Type
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor

from hope_runtime.config import HopeConfig, RotaryScaling
from hope_runtime.tokenizer import Message, Role
from hope_runtime.weights import Checkpoint, CheckpointError, read
from hope_runtime.weights.fingerprint import MIB, file_parts
from hope_runtime.weights.gguf import llama3_factors, read_gguf
from hope_runtime.weights.gguf_format import open_gguf
from hope_runtime.weights.quants import FORMATS
from hope_runtime.weights.random import CHATML, SPECIAL, random_checkpoint, tiny_config

THEIRS = {
    "embedding": "token_embd.weight",
    "norm": "output_norm.weight",
    "head": "output.weight",
    "attention_norm": "attn_norm.weight",
    "query": "attn_q.weight",
    "key": "attn_k.weight",
    "value": "attn_v.weight",
    "output": "attn_output.weight",
    "query_bias": "attn_q.bias",
    "key_bias": "attn_k.bias",
    "value_bias": "attn_v.bias",
    "query_norm": "attn_q_norm.weight",
    "key_norm": "attn_k_norm.weight",
    "mlp_norm": "ffn_norm.weight",
    "gate": "ffn_gate.weight",
    "up": "ffn_up.weight",
    "down": "ffn_down.weight",
    "factors": "rope_freqs.weight",
    "output_bias": "blk.0.attn_output.bias",
}
Write = Callable[..., Path]


def theirs(name: str) -> str:
    if match := re.fullmatch(r"blocks\.(\d+)\.(\w+)", name):
        return f"blk.{match[1]}.{THEIRS[match[2]]}"
    return THEIRS[name]


def permuted(tensor: Tensor, heads: int) -> Tensor:
    """Do what llama.cpp's converter does to query and key of llama models."""
    rows = tensor.reshape(heads, 2, tensor.shape[0] // heads // 2, -1)
    return rows.swapaxes(1, 2).reshape(tensor.shape)


def as_llama(name: str, tensor: Tensor, config: HopeConfig) -> Tensor:
    if name.endswith((".query", ".query_bias")):
        return permuted(tensor, config.heads)
    return permuted(tensor, config.key_heads) if name.endswith((".key", ".key_bias")) else tensor


TOKENS = [*sorted(ByteLevel.alphabet()), *SPECIAL, "th"]
METADATA = {
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "smollm",
    "tokenizer.ggml.tokens": TOKENS,
    "tokenizer.ggml.token_type": [3 if token in SPECIAL else 1 for token in TOKENS],
    "tokenizer.ggml.merges": ["t h"],
    "tokenizer.ggml.bos_token_id": 256,
    "tokenizer.ggml.eos_token_id": 258,
    "tokenizer.chat_template": CHATML,
}


def described(config: HopeConfig) -> dict[str, Any]:
    return {
        "context_length": 4096,
        "embedding_length": config.width,
        "block_count": config.blocks,
        "feed_forward_length": config.hidden,
        "attention.head_count": config.heads,
        "attention.head_count_kv": config.key_heads,
        "attention.layer_norm_rms_epsilon": config.norm_eps,
        "rope.freq_base": config.rotary_base,
        "rope.dimension_count": config.head_width,
    }


def source(**changes: Any) -> Checkpoint:
    return random_checkpoint(tiny_config(vocabulary=len(TOKENS), levels=(), **changes))


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Return a function that writes a model as llama.cpp's converter does.

    Keyword arguments with a value of None take a pair out of the metadata; `LLM_` stands for
    the family's prefix.
    """

    def make(
        model: Checkpoint,
        family: str = "llama",
        kind: Type = Type.F32,
        extra: dict[str, Tensor] | None = None,
        **changes: Any,
    ) -> Path:
        path = tmp_path / "tiny.gguf"
        writer = gguf.GGUFWriter(path, family)
        shape = {f"{family}.{key}": value for key, value in described(model.config).items()}
        changes = {key.replace("LLM_", f"{family}."): value for key, value in changes.items()}
        for key, value in {**shape, **METADATA, **changes}.items():
            if value is not None:
                writer.add_key_value(key, value, kind_of(value))
        for name, tensor in {**model.weights, **(extra or {})}.items():
            if family == "llama":
                tensor = as_llama(name, tensor, model.config)
            stored = kind if tensor.dim() == 2 else Type.F32
            numbers = gguf.quantize(tensor.numpy(), stored)
            writer.add_tensor(theirs(name), numbers, raw_dtype=stored)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path

    return make


def kind_of(value: Any) -> gguf.GGUFValueType:
    if isinstance(value, int) and not isinstance(value, bool):
        return gguf.GGUFValueType.UINT32
    return gguf.GGUFValueType.get_type(value)


@pytest.mark.parametrize("kind", FORMATS, ids=lambda kind: FORMATS[kind].name)
def test_every_format_decodes_to_the_same_bits_as_the_gguf_package(kind: int) -> None:
    stored = FORMATS[kind]
    blocks = np.random.default_rng(kind).integers(0, 256, (500, stored.size), np.uint8)

    with np.errstate(all="ignore"):
        ours, oracle = stored.decode(blocks), gguf.dequantize(blocks, Type(kind))

    assert Type(kind).name == stored.name
    assert ours.dtype == np.float32
    np.testing.assert_array_equal(np.isnan(ours), np.isnan(oracle))
    usual = ~np.isnan(ours)
    np.testing.assert_array_equal(ours[usual].view(np.uint32), oracle[usual].view(np.uint32))


@pytest.mark.parametrize("kind", [Type.F32, Type.F16, Type.BF16, Type.Q8_0, Type.Q4_0, Type.Q4_1])
def test_a_file_gives_the_numbers_that_were_written(write: Write, kind: Type) -> None:
    model = source()

    checkpoint = read(write(model, kind=kind))

    assert checkpoint.config == replace(model.config, window=1024, sinks=4)
    assert checkpoint.weights.keys() == model.weights.keys()
    for name, tensor in checkpoint.weights.items():
        stored = kind if tensor.dim() == 2 else Type.F32
        expected = gguf.dequantize(gguf.quantize(model.weights[name].numpy(), stored), stored)
        torch.testing.assert_close(tensor, torch.from_numpy(expected), rtol=0, atol=0)
    assert (checkpoint.name, checkpoint.context) == ("tiny", 4096)


@pytest.mark.parametrize(
    ("family", "shape"),
    [
        ("llama", {"attention_bias": True, "tied_head": False}),
        ("qwen2", {"attention_bias": True}),
        ("qwen3", {"query_key_norm": True, "tied_head": False}),
    ],
)
def test_only_llama_files_have_query_and_key_interleaved(
    write: Write, family: str, shape: dict[str, bool]
) -> None:
    model = source(**shape)

    checkpoint = read(write(model, family))

    assert checkpoint.config == replace(model.config, window=1024, sinks=4)
    assert checkpoint.weights.keys() == model.weights.keys()
    for name, tensor in checkpoint.weights.items():
        torch.testing.assert_close(tensor, model.weights[name], rtol=0, atol=0)


def test_the_tokenizer_comes_from_the_metadata(write: Write) -> None:
    tokenizer = read(write(source(), **{"tokenizer.ggml.add_bos_token": True})).tokenizer

    spans = tokenizer.opening([Message(Role.USER, "the\n")])

    assert tokenizer.decode(tokenizer.encode("the naïve 12")) == "the naïve 12"
    assert tokenizer.encode("th") == [259]
    assert tokenizer.stop_ids == {256, 258}
    assert [id for span in spans for id in span.ids if id in range(256, 259)] == [
        256,
        257,
        258,
        257,
    ]


@pytest.mark.parametrize("pre", ["gpt-2", "smollm", "llama-bpe", "qwen2"])
def test_every_family_splits_in_its_own_way(write: Write, pre: str) -> None:
    tokenizer = read(write(source(), **{"tokenizer.ggml.pre": pre})).tokenizer

    text = "It's 12345 naïve\n\n  tests, e\u0301!"

    composed = unicodedata.normalize("NFC", text) if pre == "qwen2" else text
    assert tokenizer.decode(tokenizer.encode(text)) == composed
    assert (tokenizer.bos_id == 256) == (pre == "llama-bpe")


def test_rotary_scaling_is_recognised(write: Write) -> None:
    linear = {"LLM_rope.scaling.type": "linear", "LLM_rope.scaling.factor": 4.0}
    assert read(write(source(), **linear)).config.rotary_scaling == RotaryScaling("linear", 4.0)

    slow = source(rotary_base=500000.0)
    scaling = RotaryScaling("llama3", 8.0, 1.0, 4.0, 8192)
    factors = torch.from_numpy(llama3_factors(slow.config, scaling))
    assert read(write(slow, extra={"factors": factors})).config.rotary_scaling == scaling

    assert read(write(slow, extra={"factors": torch.ones(4)})).config.rotary_scaling is None


def test_the_factors_of_llama_3_are_those_of_transformers() -> None:
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = replace(tiny_config(), head_width=64, rotary_base=500000.0)
    scaling = RotaryScaling("llama3", 32.0, 1.0, 4.0, 8192)
    parameters = {
        "rope_theta": 500000.0,
        "rope_type": "llama3",
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    theirs = LlamaConfig(hidden_size=64, num_attention_heads=1, rope_parameters=parameters)

    frequencies, _ = ROPE_INIT_FUNCTIONS["llama3"](theirs, torch.device("cpu"))

    plain = 500000.0 ** -(torch.arange(0, 64, 2) / 64)
    ours = torch.from_numpy(llama3_factors(config, scaling))
    torch.testing.assert_close(plain / ours, frequencies)


def test_progress_is_told_and_reading_twice_gives_the_same_fingerprint(write: Write) -> None:
    path = write(source())
    heard: list[tuple[int, int]] = []

    first, second = read_gguf(path, lambda done, all: heard.append((done, all))), read_gguf(path)

    assert heard == [(n, 38) for n in range(1, 39)]
    assert first.fingerprint == second.fingerprint
    assert re.fullmatch(r"tiny@[0-9a-f]{16}", first.fingerprint)


def test_a_large_file_is_known_by_its_ends_and_its_header(tmp_path: Path) -> None:
    path = tmp_path / "large"

    def parts(at: int) -> list[bytes]:
        content = bytearray(10 * MIB)
        content[at] = 1
        path.write_bytes(content)
        return list(file_parts(path, header=3 * MIB, whole=9 * MIB))

    assert len({tuple(parts(n * MIB)) for n in (0, 2, 9)}) == 3
    assert parts(5 * MIB) == parts(6 * MIB)
    assert sum(map(len, parts(0))) == 5 * MIB + len(str(10 * MIB))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"general.architecture": "gemma"}, "its architecture 'gemma' is not supported"),
        ({"LLM_expert_count": 8}, "mixtures of experts are not supported"),
        ({"split.count": 2}, "it is one part of several; join them"),
        ({"LLM_embedding_length": None}, "the metadata lacks 'llama.embedding_length'"),
        ({"LLM_embedding_length": "32"}, "'llama.embedding_length' is '32', which no supported"),
        ({"LLM_attention.head_count": [4, 4]}, "'llama.attention.head_count' is '[4, 4]'"),
        (
            {"LLM_attention.head_count": 0, "LLM_rope.dimension_count": 32},
            "heads must be at least 1, not 0",
        ),
        ({"LLM_rope.dimension_count": 4}, "llama.rope.dimension_count is 4, but only"),
        ({"LLM_rope.scaling.type": "yarn", "LLM_rope.scaling.factor": 2.0}, "'yarn' is not"),
        ({"LLM_block_count": 2**32 - 1}, "'blocks.4.attention_norm' is missing"),
        ({"LLM_block_count": 3}, "no place for the tensor 'blocks.3.attention_norm'"),
        ({"LLM_feed_forward_length": 65}, "'blocks.0.gate' has shape [64, 32], but"),
        ({"general.alignment": 0}, "its alignment is 0"),
        ({"tokenizer.ggml.model": "llama"}, "its tokenizer is 'llama' with pre-tokenizer"),
        ({"tokenizer.ggml.pre": None}, "with pre-tokenizer 'default'; supported are"),
        ({"tokenizer.ggml.tokens": ["a"] * len(TOKENS)}, "the vocabulary of 260 tokens is incon"),
        ({"tokenizer.ggml.token_type": [1]}, "the vocabulary of 260 tokens is inconsistent"),
        ({"tokenizer.ggml.merges": ["t x"]}, "the vocabulary of 260 tokens is inconsistent"),
        ({"tokenizer.ggml.merges": ["th"]}, "the vocabulary of 260 tokens is inconsistent"),
        ({"tokenizer.ggml.merges": [1]}, "'tokenizer.ggml.merges' is '[1]', which no"),
        ({"tokenizer.chat_template": "{% for %}"}, "the chat template cannot be parsed"),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
)
def test_metadata_that_cannot_be_served_is_refused_with_a_remedy(
    write: Write, changes: dict[str, Any], sentence: str
) -> None:
    path = write(source(), **changes)

    with pytest.raises(CheckpointError, match=re.escape(sentence)) as refused:
        read(path)

    assert str(refused.value).startswith(f"{path}: ")


@pytest.mark.parametrize(
    ("name", "tensor", "sentence"),
    [
        ("output_bias", torch.zeros(32), "the tensor 'blk.0.attn_output.bias' belongs to no"),
        ("factors", torch.full((4,), 3.0), "the rotary factors of 'rope_freqs.weight' are not"),
        ("factors", torch.full((3,), 8.0), "the rotary factors of 'rope_freqs.weight' are not"),
    ],
)
def test_a_tensor_whose_arithmetic_would_be_lost_is_refused(
    write: Write, name: str, tensor: Tensor, sentence: str
) -> None:
    path = write(source(), extra={name: tensor})

    with pytest.raises(CheckpointError, match=re.escape(sentence)):
        read(path)


def test_a_file_cut_anywhere_is_refused_in_a_sentence(write: Write) -> None:
    path = write(source())
    whole = path.read_bytes()

    for size in [*range(200), *range(200, len(whole), 997), len(whole) - 64]:
        path.write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match="not a readable GGUF file"):
            read(path)


def test_a_damaged_header_is_refused_or_read_but_never_crashes(write: Write) -> None:
    path = write(source())
    whole, header = path.read_bytes(), open_gguf(path).header
    random = np.random.default_rng(0)

    for _ in range(150):
        damaged = bytearray(whole)
        for at in random.integers(0, header, 3):
            damaged[at] = random.integers(0, 256)
        path.write_bytes(damaged)
        with contextlib.suppress(CheckpointError):
            read(path)


HEADER = struct.Struct("<4sIQQ")


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", "it does not begin with 'GGUF'"),
        (b"PK\3\4" + bytes(60), "it does not begin with 'GGUF'"),
        (HEADER.pack(b"GGUF", 1, 0, 0), "its version 1 is not supported"),
        (HEADER.pack(b"GGUF", 3 << 24, 0, 0), "its version 50331648 is not supported"),
        (HEADER.pack(b"GGUF", 3, 1 << 60, 0), "announces 1152921504606846976 entries"),
        (HEADER.pack(b"GGUF", 3, 0, 1 << 60), "announces 1152921504606846976 entries"),
        (HEADER.pack(b"GGUF", 3, 0, 1) + struct.pack("<Q", 1 << 62) + b"name ", "ends too early"),
        (
            HEADER.pack(b"GGUF", 3, 0, 1) + struct.pack("<Q1sIIQ", 1, b"k", 9, 8, 1 << 50),
            "announces 1125899906842624 entries",
        ),
        (
            HEADER.pack(b"GGUF", 3, 0, 1) + struct.pack("<Q1sIIQ", 1, b"k", 9, 4, 1 << 50),
            "it ends too early",
        ),
        (
            HEADER.pack(b"GGUF", 3, 0, 1) + struct.pack("<Q1sIIQ", 1, b"k", 9, 9, 1),
            "a value of unknown type 9",
        ),
        (
            HEADER.pack(b"GGUF", 3, 0, 1) + struct.pack("<Q1sIQ1s", 1, b"k", 8, 1, b"\xff"),
            "a text that is not UTF-8",
        ),
        (
            HEADER.pack(b"GGUF", 3, 1, 0) + struct.pack("<Q1sIQIQ", 1, b"t", 1, 1 << 62, 0, 0),
            "it ends before the tensor 't' does",
        ),
        (
            HEADER.pack(b"GGUF", 3, 1, 0) + struct.pack("<Q1sIQIQ", 1, b"t", 1, 33, 2, 0),
            "the tensor 't' has the impossible shape [33]",
        ),
        (
            HEADER.pack(b"GGUF", 3, 1, 0) + struct.pack("<Q1sIQIQ", 1, b"t", 1, 0, 0, 0),
            "the tensor 't' has the impossible shape [0]",
        ),
        (
            HEADER.pack(b"GGUF", 3, 1, 0) + struct.pack("<Q1sIQIQ", 1, b"t", 9, 1, 0, 0),
            "the tensor 't' has 9 axes",
        ),
        (
            HEADER.pack(b"GGUF", 3, 1, 0) + struct.pack("<Q1sIQIQ", 1, b"t", 1, 32, 99, 0),
            "the tensor 't' is stored in format 99; supported are F32, F16",
        ),
    ],
)
def test_a_crafted_header_is_refused_before_anything_is_allocated(
    tmp_path: Path, content: bytes, sentence: str
) -> None:
    path = tmp_path / "crafted.gguf"
    path.write_bytes(content)

    with pytest.raises(CheckpointError, match=re.escape(sentence)) as refused:
        read(path)

    assert str(refused.value).startswith(f"{path}: ")


@pytest.mark.weights
def test_the_default_model_equals_the_gguf_package_in_every_bit(default_file: Path) -> None:
    ours, oracle = open_gguf(default_file), gguf.GGUFReader(default_file)

    for tensor in oracle.tensors:
        expected = gguf.dequantize(tensor.data, tensor.tensor_type)
        np.testing.assert_array_equal(
            ours.read(tensor.name).view(np.uint32), expected.view(np.uint32)
        )
    assert len(oracle.tensors) == len(ours.tensors) == 272


@pytest.mark.weights
def test_the_default_model_has_the_shape_of_smollm2(default_file: Path) -> None:
    checkpoint = read(default_file)

    assert checkpoint.config == HopeConfig(
        vocabulary=49152,
        width=576,
        blocks=30,
        heads=9,
        key_heads=3,
        head_width=64,
        hidden=1536,
        norm_eps=1e-5,
        rotary_base=100000.0,
    )
    assert checkpoint.name == "SmolLM2-135M-Instruct"
    assert checkpoint.context == 8192
    assert sum(tensor.numel() for tensor in checkpoint.weights.values()) == 134_515_008
