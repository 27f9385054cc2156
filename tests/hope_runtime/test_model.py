"""The model without memory is the checkpoint's model, as transformers computes it."""

from __future__ import annotations

from dataclasses import replace

import gguf
import pytest
import torch
import transformers

from hope_runtime.lanes import Lanes
from hope_runtime.layers.attention import Past
from hope_runtime.model import Hope
from hope_runtime.weights import read

FAMILIES = {
    "llama": ("llama", {}),
    "llama, tied": ("llama", {"tie_word_embeddings": True}),
    "llama 3.1": (
        "llama",
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 500.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            }
        },
    ),
    "mistral": ("mistral", {}),
    "mistral, sliding": ("mistral", {"sliding_window": 24}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {}),
}
# the oracle's names of what the file calls by llama.cpp's names
TENSORS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
PROMPT = "The lighthouse keeper wrote down every ship that passed in the night; " * 4


def whole(model: Hope, tokens: torch.Tensor) -> torch.Tensor:
    """Return the logits of tokens read in one call, with nothing before them."""
    config = model.config
    nothing = torch.zeros(config.blocks, 1, config.key_heads, 0, config.head_width)
    past = Past(nothing, nothing, torch.zeros(1, 0, dtype=torch.long))
    read = model.run(model.embed(tokens[None]), torch.tensor([0]), past, [{}])
    return model.logits(read.hidden[0])


def in_parts(model: Hope, tokens: torch.Tensor, *ends: int) -> torch.Tensor:
    """Return the logits of tokens read through a lane, in calls that end at `ends`."""
    lanes, said, start = Lanes(model, 1), [], 0
    for end in (*ends, len(tokens)):
        at = torch.tensor([start])
        found = model.run(model.embed(tokens[None, start:end]), at, lanes.view(0, 1, start), [{}])
        lanes.append(0, at, found)
        said.append(model.logits(found.hidden[0]))
        start = end
    return torch.cat(said)


@pytest.mark.parametrize(("family", "changes"), FAMILIES.values(), ids=FAMILIES.keys())
def test_logits_of_a_random_model_equal_those_of_transformers(hf_directory, family, changes):
    directory = hf_directory(family, **changes)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(directory).eval()
    checkpoint = read(directory)
    # a model trained to slide forgets its first tokens too
    ours = Hope(replace(checkpoint.config, sinks=0), checkpoint.weights)
    tokens = torch.randint(0, 400, (72,), generator=torch.Generator().manual_seed(2))

    with torch.no_grad():
        expected = theirs(tokens[None]).logits[0]

    assert float(expected.std()) > 0.1  # a model that says something
    found = in_parts(ours, tokens, 20, 40, 60)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)


@pytest.fixture(scope="module")
def real(default_file):
    checkpoint = read(default_file)
    return checkpoint, Hope(checkpoint.config, checkpoint.weights)


@pytest.fixture(scope="module")
def prompt(real):
    return torch.tensor(real[0].tokenizer.encode(PROMPT))


@pytest.fixture(scope="module")
def said_whole(real, prompt):
    with torch.no_grad():
        return whole(real[1], prompt)


@pytest.fixture(scope="module")
def oracle(default_file):
    """Return transformers' Llama with the file's numbers, read by the `gguf` package."""
    file = gguf.GGUFReader(default_file)

    def fact(name):
        return file.fields[f"llama.{name}"].contents()

    heads, key_heads = fact("attention.head_count"), fact("attention.head_count_kv")
    config = transformers.LlamaConfig(
        vocab_size=fact("vocab_size"),
        hidden_size=fact("embedding_length"),
        intermediate_size=fact("feed_forward_length"),
        num_hidden_layers=fact("block_count"),
        num_attention_heads=heads,
        num_key_value_heads=key_heads,
        rms_norm_eps=fact("attention.layer_norm_rms_epsilon"),
        rope_parameters={"rope_type": "default", "rope_theta": fact("rope.freq_base")},
        max_position_embeddings=fact("context_length"),
        tie_word_embeddings=True,
    )
    weights = {}
    for tensor in file.tensors:
        numbers = gguf.dequantize(tensor.data, tensor.tensor_type)
        found = torch.from_numpy(numbers.copy()).float()
        match tensor.name.removesuffix(".weight").split("."):
            case ["token_embd"]:
                weights["model.embed_tokens.weight"] = weights["lm_head.weight"] = found
            case ["output_norm"]:
                weights["model.norm.weight"] = found
            case ["blk", number, part]:
                if part in ("attn_q", "attn_k"):
                    # the file pairs neighbouring rows for rotation, transformers both halves
                    count = heads if part == "attn_q" else key_heads
                    rows = found.view(count, -1, 2, found.shape[1])
                    found = rows.transpose(1, 2).reshape(found.shape)
                weights[f"model.layers.{number}.{TENSORS[part]}.weight"] = found
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    model.load_state_dict(weights, assign=True)
    model.model.rotary_emb = type(model.model.rotary_emb)(config)  # its buffers are not stored
    return model.eval()


@pytest.mark.weights
def test_logits_of_the_default_model_equal_those_of_transformers(oracle, prompt, said_whole):
    with torch.no_grad():
        expected = oracle(prompt[None]).logits[0]

    error = float((said_whole - expected).abs().max())

    print(f"default model, {len(prompt)} tokens: max abs error {error:.1e}")  # noqa: T201 - for -s
    assert error < 1e-3
    assert torch.equal(said_whole.argmax(-1), expected.argmax(-1))


@pytest.mark.weights
@pytest.mark.parametrize(
    "ends", [(1, 2, 3, 40), (17,), (33, 34, 51)], ids=["ones first", "two parts", "four parts"]
)
def test_the_default_model_reads_a_prompt_the_same_in_any_split(real, prompt, said_whole, ends):
    with torch.no_grad():
        found = in_parts(real[1], prompt, *ends)

    torch.testing.assert_close(found, said_whole, rtol=1e-4, atol=2e-4)


@pytest.mark.weights
def test_the_default_model_reads_a_prompt_the_same_token_by_token(real, prompt, said_whole):
    with torch.no_grad():
        found = in_parts(real[1], prompt[:24], *range(1, 24))

    torch.testing.assert_close(found, said_whole[:24], rtol=1e-4, atol=2e-4)
