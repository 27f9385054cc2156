"""Record the gated delta rule of flash-linear-attention: `python` this file.

It takes the package's reference in plain PyTorch; what the rest of the package needs a GPU for is
not imported.
"""

from __future__ import annotations

from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path

SESSIONS, TOKENS, HEADS, KEY, VALUE = 2, 37, 2, 8, 6


def record(out: Path) -> None:
    import torch
    from safetensors.torch import save_file

    package = find_spec("fla")
    assert package is not None
    assert package.submodule_search_locations
    file = Path(package.submodule_search_locations[0]) / "ops/gated_delta_rule/naive.py"
    spec = spec_from_file_location("reference", file)
    assert spec is not None
    assert spec.loader is not None
    reference = module_from_spec(spec)
    spec.loader.exec_module(reference)

    torch.manual_seed(0)
    tensors = {
        "q": torch.nn.functional.normalize(torch.randn(SESSIONS, TOKENS, HEADS, KEY), dim=-1),
        "k": torch.nn.functional.normalize(torch.randn(SESSIONS, TOKENS, HEADS, KEY), dim=-1),
        "v": torch.randn(SESSIONS, TOKENS, HEADS, VALUE),
        "beta": torch.rand(SESSIONS, TOKENS, HEADS),
        "g": torch.nn.functional.logsigmoid(torch.randn(SESSIONS, TOKENS, HEADS) + 3.0),
        "initial_state": torch.randn(SESSIONS, HEADS, KEY, VALUE),
    }
    o, final = reference.naive_recurrent_gated_delta_rule(
        **tensors, scale=1.0, output_final_state=True
    )
    save_file(tensors | {"o": o, "final_state": final.contiguous()}, out)


if __name__ == "__main__":
    from environment import VECTORS, recording, run

    if out := recording():
        record(out)
    else:
        run(
            __file__,
            VECTORS / "gated_delta_rule.safetensors",
            needs=["torch", "numpy", "safetensors", "einops"],
            alone=["fla-core==0.6.0"],
        )
