import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from hope_runtime.config import RotaryScaling
from hope_runtime.tokenizer import Message, Role
from hope_runtime.weights import CheckpointError, read
from hope_runtime.weights.random import random_checkpoint, tiny_config
from hope_runtime.weights.shapes import shapes

Make = Callable[..., Path]
LLAMA3 = {
    "rope_theta": 500000.0,
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 1024,
}
CONFIG = {
    "model_type": "llama",
    "vocab_size": 259,
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "max_position_embeddings": 4096,
    "eos_token_id": [258, 256],
}
THEIRS = {
    "attention_norm": "input_layernorm.weight",
    "query": "self_attn.q_proj.weight",
    "key": "self_attn.k_proj.weight",
    "value": "self_attn.v_proj.weight",
    "output": "self_attn.o_proj.weight",
    "query_bias": "self_attn.q_proj.bias",
    "key_bias": "self_attn.k_proj.bias",
    "value_bias": "self_attn.v_proj.bias",
    "query_norm": "self_attn.q_norm.weight",
    "key_norm": "self_attn.k_norm.weight",
    "mlp_norm": "post_attention_layernorm.weight",
    "gate": "mlp.gate_proj.weight",
    "up": "mlp.up_proj.weight",
    "down": "mlp.down_proj.weight",
    "embedding": "model.embed_tokens.weight",
    "norm": "model.norm.weight",
    "head": "lm_head.weight",
}


def theirs(name: str) -> str:
    if match := re.fullmatch(r"blocks\.(\d+)\.(\w+)", name):
        return f"model.layers.{match[1]}.{THEIRS[match[2]]}"
    return THEIRS[name]


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """Return a model's directory written by hand."""
    path = tmp_path / "by-hand"
    path.mkdir()
    checkpoint = random_checkpoint(tiny_config(blocks=1, levels=()))
    save_file(
        {theirs(n): t.bfloat16() for n, t in checkpoint.weights.items()}, path / "model.safetensors"
    )
    (path / "tokenizer.json").write_text(checkpoint.tokenizer.to_json())
    write(path / "config.json", CONFIG)
    return path


def write(file: Path, values: object) -> None:
    file.write_text(json.dumps(values))


def change(path: Path, **changes: object) -> None:
    write(path / "config.json", {**CONFIG, **changes})


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_what_transformers_saves_is_read_tensor_by_tensor(hf_directory: Make, family: str) -> None:
    sliding = {"sliding_window": 64} if family == "mistral" else {}
    path = hf_directory(family, tie_word_embeddings=family == "qwen3", **sliding)

    checkpoint = read(path)

    stored = load_file(path / "model.safetensors")
    assert {theirs(name) for name in checkpoint.weights} == stored.keys()
    for name, tensor in checkpoint.weights.items():
        torch.testing.assert_close(tensor, stored[theirs(name)], rtol=0, atol=0)
    config = checkpoint.config
    assert dict(shapes(config)) == {n: tuple(t.shape) for n, t in checkpoint.weights.items()}
    assert config.attention_bias == (family == "qwen2")
    assert config.query_key_norm == (family == "qwen3")
    assert config.tied_head == (family == "qwen3")
    assert config.window == (64 if family == "mistral" else 1024)
    assert (config.head_width, config.norm_eps, checkpoint.context) == (8, 1e-5, 4096)
    assert checkpoint.name == f"tiny-{family}"


def test_shards_scaling_and_half_precision_as_transformers_saves_them(hf_directory: Make) -> None:
    path = hf_directory(
        "llama", dtype=torch.bfloat16, max_shard_size="20KB", rope_parameters=LLAMA3
    )

    checkpoint = read(path)

    shards = sorted(path.glob("*.safetensors"))
    stored = {name: t for shard in shards for name, t in load_file(shard).items()}
    assert len(shards) > 1
    assert {theirs(name) for name in checkpoint.weights} == stored.keys()
    for name, tensor in checkpoint.weights.items():
        torch.testing.assert_close(tensor, stored[theirs(name)], rtol=0, atol=0)
        assert tensor.dtype is torch.bfloat16
    assert checkpoint.config.rotary_base == 500000.0
    assert checkpoint.config.rotary_scaling == RotaryScaling("llama3", 8.0, 1.0, 4.0, 1024)


def test_the_tokenizer_of_a_directory_agrees_with_transformers(hf_directory: Make) -> None:
    from transformers import AutoTokenizer

    path = hf_directory("llama")
    ours, oracle = read(path).tokenizer, AutoTokenizer.from_pretrained(path)
    messages = [Message(Role.SYSTEM, "Be brief."), Message(Role.USER, "the fox\n\nin 東京?")]

    spans = ours.opening(messages)

    expected = oracle.apply_chat_template(
        [{"role": m.role.value, "content": m.text} for m in messages], add_generation_prompt=True
    )
    assert [id for span in spans for id in span.ids] == expected["input_ids"]
    assert ours.encode("again 42") == oracle.encode("again 42", add_special_tokens=False)
    assert ours.stop_ids == {0, 2}


def test_the_way_of_saying_rotation_does_not_matter(directory: Path) -> None:
    old = {key: value for key, value in LLAMA3.items() if key != "rope_theta"}
    change(directory, rope_theta=500000.0, rope_scaling=old)
    before = read(directory).config

    change(directory, rope_theta=None, rope_parameters=LLAMA3)
    since = read(directory).config

    assert before == since
    assert before.rotary_scaling == RotaryScaling("llama3", 8.0, 1.0, 4.0, 1024)


def test_the_window_never_passes_what_the_model_was_trained_for(directory: Path) -> None:
    change(directory, max_position_embeddings=512)
    assert read(directory).config.window == 512

    change(directory, sliding_window=256)
    assert read(directory).config.window == 256

    change(directory, sliding_window=256, use_sliding_window=False)
    assert read(directory).config.window == 1024


def test_a_head_that_is_stored_but_tied_is_left_aside(directory: Path) -> None:
    weights = load_file(directory / "model.safetensors")
    head = weights["model.embed_tokens.weight"] + 1
    save_file({**weights, "lm_head.weight": head}, directory / "model.safetensors")

    untied = read(directory)
    change(directory, tie_word_embeddings=True)
    tied = read(directory)

    torch.testing.assert_close(untied.weights["head"], head)
    assert "head" not in tied.weights


def test_a_fingerprint_follows_weights_shape_and_tokenizer(directory: Path) -> None:
    first = read(directory).fingerprint
    assert re.fullmatch(r"by-hand@[0-9a-f]{16}", first)
    assert read(directory).fingerprint == first

    change(directory, rms_norm_eps=1e-6)
    second = read(directory).fingerprint
    weights = load_file(directory / "model.safetensors")
    weights["model.norm.weight"][0] += 1
    save_file(weights, directory / "model.safetensors")
    third = read(directory).fingerprint
    tokenizer = (directory / "tokenizer.json").read_text()
    (directory / "tokenizer.json").write_text(tokenizer.replace("<|im_start|>", "<|im_begin|>"))

    assert len({first, second, third, read(directory).fingerprint}) == 4


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"model_type": "gemma"}, "the model_type 'gemma' is not supported; choose a model of"),
        ({"model_type": None}, "the model_type '' is not supported"),
        ({"quantization_config": {"bits": 4}}, "the model is quantised"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported"),
        ({"hidden_size": None}, "'hidden_size' is missing; download the file again"),
        ({"hidden_size": "32"}, "'hidden_size' is '32', which no supported model has"),
        ({"num_attention_heads": 0}, "heads must be at least 1, not 0"),
        ({"num_attention_heads": 3}, "3 heads cannot share 2 key heads"),
        ({"rope_scaling": {"type": "yarn", "factor": 2.0}}, "'yarn' is not supported"),
        ({"rope_scaling": {"type": "llama3"}}, "'low_freq_factor' is missing"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "rotated in part"),
        ({"num_hidden_layers": 2}, "'blocks.1.attention_norm' is missing"),
        ({"num_hidden_layers": 10**12}, "'blocks.1.attention_norm' is missing"),
        ({"intermediate_size": 63}, "'blocks.0.gate' has shape [64, 32], but"),
        ({"tie_word_embeddings": False}, "the tensor for 'head' is missing"),
        ({"vocab_size": 258}, "'embedding' has shape [259, 32], but"),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
)
def test_a_config_that_cannot_be_served_is_refused_with_a_remedy(
    directory: Path, changes: dict[str, object], sentence: str
) -> None:
    change(directory, **changes)

    with pytest.raises(CheckpointError, match=re.escape(sentence)) as refused:
        read(directory)

    assert str(directory) in str(refused.value)
    assert "; " in str(refused.value)


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("config.json", None, "cannot be read: No such file or directory; download it"),
        ("config.json", "{", "not valid JSON"),
        ("config.json", "[" * 200_000, "not valid JSON"),
        ("config.json", "[]", "does not hold a JSON object"),
        ("model.safetensors", None, "model.safetensors is missing; download it"),
        ("model.safetensors", "", "not a readable safetensors file"),
        ("model.safetensors", "x" * 100, "not a readable safetensors file"),
        ("tokenizer.json", None, "is missing; download it"),
        ("tokenizer.json", "{}", "not a tokenizer"),
        ("tokenizer_config.json", '{"chat_template": "{% if %}"}', "cannot be parsed"),
        ("chat_template.jinja", "nothing", "leaves out what the assistant said"),
        (
            "model.safetensors.index.json",
            '{"weight_map": {"x": "../other.safetensors"}}',
            "the file '../other.safetensors', which model.safetensors.index.json names, is missing",
        ),
    ],
)
def test_a_broken_file_is_named_with_what_is_wrong(
    directory: Path, name: str, content: str | None, sentence: str
) -> None:
    (directory / name).unlink(missing_ok=True)
    if content is not None:
        (directory / name).write_text(content)

    with pytest.raises(CheckpointError, match=re.escape(sentence)) as refused:
        read(directory)

    assert str(directory) in str(refused.value)


def test_a_truncated_weight_file_is_refused(directory: Path) -> None:
    file = directory / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])

    with pytest.raises(CheckpointError, match="not a readable safetensors file"):
        read(directory)


@pytest.mark.parametrize(
    ("name", "tensor", "sentence"),
    [
        ("model.layers.0.self_attn.o_proj.bias", torch.zeros(32), "belongs to no supported family"),
        ("model.layers.1.mlp.up_proj.weight", torch.zeros(64, 32), "no place for the tensor"),
        ("model.layers.0.self_attn.k_proj.bias", torch.zeros(16), "no place for the tensor"),
        ("model.norm.weight", torch.zeros(32, dtype=torch.int32), "is of type I32"),
    ],
)
def test_a_tensor_whose_arithmetic_would_be_lost_is_refused(
    directory: Path, name: str, tensor: torch.Tensor, sentence: str
) -> None:
    weights = load_file(directory / "model.safetensors")
    save_file({**weights, name: tensor}, directory / "model.safetensors")

    with pytest.raises(CheckpointError, match=sentence):
        read(directory)


def test_a_vocabulary_larger_than_the_embedding_is_refused(directory: Path) -> None:
    tokenizer = json.loads((directory / "tokenizer.json").read_text())
    tokenizer["added_tokens"].append({**tokenizer["added_tokens"][0], "id": 259, "content": "<x>"})
    write(directory / "tokenizer.json", tokenizer)

    with pytest.raises(CheckpointError, match="has 260 tokens, but the model embeds only 259"):
        read(directory)


def test_a_path_that_is_no_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"does not exist; name a \.gguf file"):
        read(tmp_path / "missing")

    (tmp_path / "model.bin").touch()
    with pytest.raises(CheckpointError, match=r"is neither a \.gguf file nor a model's directory"):
        read(tmp_path / "model.bin")
