"""Record the self-modifying Titans of the port `nested-learning`: `python` this file.

Without its convolution, and without its projected skip into the gates, which the paper does not
have. One chunk size for all memories: 1, and 4.
"""

from __future__ import annotations

from pathlib import Path

WIDTH, SESSIONS, TOKENS = 8, 2, 8
NAMES = ("k", "v", "memory", "eta", "alpha")


def record(out: Path) -> None:
    import torch
    from nested_learning.titan.self_modifying import (
        SelfModifyingTitans,
        SelfModifyingTitansConfig,
    )
    from safetensors.torch import save_file

    torch.manual_seed(0)
    config = SelfModifyingTitansConfig(
        dim=WIDTH, eta_scale=0.05, local_conv_window=None, use_skip=False
    )
    port = SelfModifyingTitans(config)
    with torch.no_grad():
        for name in NAMES:
            getattr(port, f"m_{name}").w2.weight.mul_(2.0)
            getattr(port, f"m_{name}").w1.weight.mul_(4.0 if name == "alpha" else 2.0)
    x = torch.randn(SESSIONS, TOKENS, WIDTH)
    tensors = {
        "x": x,
        "eta_scale": torch.tensor(config.eta_scale),
        "w_q": port.w_q.weight.detach().clone(),
    }
    first = port.init_fast_state()
    for name in NAMES:
        tensors[f"start.{name}.w1"] = getattr(first, name).w1
        tensors[f"start.{name}.w2"] = getattr(first, name).w2
    for chunk in (1, 4):
        y, after = port.forward_with_updates(
            x, port.init_fast_state(), chunk_size_other=chunk, chunk_size_memory=chunk
        )
        tensors[f"y.{chunk}"] = y
        for name in NAMES:
            tensors[f"after.{chunk}.{name}.w1"] = getattr(after, name).w1
            tensors[f"after.{chunk}.{name}.w2"] = getattr(after, name).w2
    save_file({name: value.detach().contiguous() for name, value in tensors.items()}, out)


if __name__ == "__main__":
    from environment import VECTORS, recording, run

    if out := recording():
        record(out)
    else:
        run(
            __file__,
            VECTORS / "nested_learning.safetensors",
            needs=["torch", "numpy", "safetensors"],
            alone=["nested-learning==0.2.0"],
        )
