"""Readers of model files: GGUF and Hugging Face directories, without transformers.

Every reader returns a `Checkpoint`: the model's shape, its tensors under our names
(in torch's `[out, in]` layout, rotary weights in rotate-half order), and its tokenizer.

Names: `embedding`, `norm`, `head` (absent when tied), and for every block i
`blocks.{i}.` + `attention_norm, query, key, value, output, mlp_norm, gate, up, down`,
with `query_bias, key_bias, value_bias` and `query_norm, key_norm` where the family has them.
"""
