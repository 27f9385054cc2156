import pytest
import torch

from hope_runtime.config import ConfigError
from hope_runtime.tokenizer import Message, Role
from hope_runtime.weights.random import byte_tokenizer, random_checkpoint, tiny_config
from hope_runtime.weights.shapes import shapes


def test_equal_seeds_give_equal_models_and_others_do_not() -> None:
    first, again, other = (random_checkpoint(tiny_config(), seed) for seed in (0, 0, 1))

    assert first.fingerprint == again.fingerprint != other.fingerprint
    for name, tensor in first.weights.items():
        torch.testing.assert_close(tensor, again.weights[name], rtol=0, atol=0)
        assert not torch.equal(tensor, other.weights[name])


def test_a_model_has_every_tensor_of_its_shape() -> None:
    config = tiny_config(attention_bias=True, query_key_norm=True, tied_head=False)

    checkpoint = random_checkpoint(config)

    assert {n: tuple(t.shape) for n, t in checkpoint.weights.items()} == dict(shapes(config))
    assert {tensor.dtype for tensor in checkpoint.weights.values()} == {torch.float32}
    assert checkpoint.config is config
    assert checkpoint.tokenizer.vocabulary == config.vocabulary


def test_any_field_of_the_tiny_shape_can_change_and_is_checked() -> None:
    assert tiny_config(window=64, sinks=0).window == 64
    with pytest.raises(ConfigError, match="block 3 is not one of"):
        tiny_config(blocks=3)


def test_the_first_256_tokens_are_the_bytes() -> None:
    tokenizer = byte_tokenizer()
    text = "".join(map(chr, range(0x250))) + "東😀"

    assert tokenizer.encode(text) == list(text.encode())
    assert tokenizer.decode(list(text.encode())) == text


def test_the_byte_tokenizer_speaks_chatml() -> None:
    tokenizer = byte_tokenizer()

    spans = tokenizer.opening([Message(Role.USER, "<|im_end|>")])

    assert [span.ids for span in spans] == [
        (257, *b"user\n"),
        tuple(b"<|im_end|>"),
        (258, 10, 257, *b"assistant\n"),
    ]
    assert tokenizer.closing().ids == (258, 10)
    assert tokenizer.stop_ids == {256, 258}


def test_greedy_replies_of_a_random_model_are_varied() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    checkpoint = random_checkpoint(tiny_config())
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=259,
            hidden_size=32,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            intermediate_size=64,
            rms_norm_eps=1e-5,
            tie_word_embeddings=True,
        )
    )
    theirs = {
        "attention_norm": "input_layernorm",
        "query": "self_attn.q_proj",
        "key": "self_attn.k_proj",
        "value": "self_attn.v_proj",
        "output": "self_attn.o_proj",
        "mlp_norm": "post_attention_layernorm",
        "gate": "mlp.gate_proj",
        "up": "mlp.up_proj",
        "down": "mlp.down_proj",
        "embedding": "embed_tokens",
        "norm": "norm",
    }
    model.model.load_state_dict(
        {
            f"{name.replace('blocks', 'layers').rpartition('.')[0]}."
            f"{theirs[name.rpartition('.')[2]]}.weight".lstrip("."): tensor
            for name, tensor in checkpoint.weights.items()
        }
    )

    ids = torch.tensor([list(b"hello world")])
    for _ in range(60):
        with torch.no_grad():
            ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], dim=1)

    assert len(set(ids[0, 11:].tolist())) > 20
