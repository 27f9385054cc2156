"""The forms in which what a session learned is written, and what each makes of the numbers.

Pure functions of tensors; they know no blob and no session. What is read back is what `rounded`
says, bit for bit, and rounding it again changes nothing.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from enum import StrEnum

import torch
from torch import Tensor

MEMORY = "memory"  # what the fast memory is called where levels are called by their names


class Form(StrEnum):
    """How numbers are written."""

    FP32 = "fp32"  # as they are
    BF16 = "bf16"
    INT8 = "int8"  # multiples of a scale that each row has for itself


@dataclass(frozen=True, slots=True)
class Storage:
    """Which part of a session is written in which form."""

    memory: Form = Form.FP32  # of the memory blocks: what they hold, and held at the marks
    every: Form = Form.FP32  # of each level that `levels` does not name
    levels: Mapping[str, Form] = field(default_factory=dict)

    def level(self, name: str) -> Form:
        """Return the form of a level."""
        return self.levels.get(name, self.every)

    @classmethod
    def parse(cls, text: str, levels: Collection[str]) -> Storage:
        """Read a setting: `NAME=FORM`, separated by commas, a form alone being every level's.

        The fast memory is no level: it is always named.

        >>> found = Storage.parse("bf16, slow=int8, memory=bf16", ["fast", "slow"])
        >>> [str(form) for form in (found.level("fast"), found.level("slow"), found.memory)]
        ['bf16', 'int8', 'bf16']

        Args:
            text: the setting; empty: everything in fp32.
            levels: the names of the model's levels.

        Raises:
            ValueError: a name or a form is unknown, or said twice.
        """
        forms: dict[str, Form] = {}
        for part in filter(None, map(str.strip, text.split(","))):
            name, named, form = (each.strip() for each in part.rpartition("="))
            if named and name not in {*levels, MEMORY}:
                known = ", ".join([*levels, MEMORY])
                raise ValueError(f"storage {part!r}: there is no {name!r}; known: {known}")
            if form not in set(Form):
                raise ValueError(f"storage {part!r}: no form {form!r}; known: {', '.join(Form)}")
            if name in forms:
                raise ValueError(f"storage {text!r} says twice what {name or 'every level'} is in")
            forms[name] = Form(form)
        return cls(
            memory=forms.pop(MEMORY, Form.FP32), every=forms.pop("", Form.FP32), levels=forms
        )


EXACT = Storage()


def packed(name: str, tensor: Tensor, form: Form) -> dict[str, Tensor]:
    """Return what is written of a tensor: itself, or codes and the scale of every row.

    Rows are along the last axis. The largest number of each has the code 127 or -127, so that what
    was read back has the same scale and the same codes, bit for bit.

    >>> packed("down", torch.tensor([[63.5, -31.75], [0.0, 0.0]]), Form.INT8)
    {'down': tensor([[127, -64],
            [  0,   0]], dtype=torch.int8), 'down.scale': tensor([0.5000, 0.0000])}
    """
    if form is Form.FP32:
        return {name: tensor}
    if form is Form.BF16:
        return {name: tensor.bfloat16()}
    numbers = tensor.float()
    scale = _scale(numbers)
    codes = numbers / scale.masked_fill(scale == 0.0, 1.0)[..., None]
    return {name: codes.round_().to(torch.int8), scale_name(name): scale}


def unpacked(name: str, tensors: Mapping[str, Tensor]) -> Tensor:
    """Return the tensor that was packed as `tensors`, in whichever form, as float32.

    What was not packed at all but is float64 stays it.
    """
    tensor = tensors[name]
    if tensor.dtype is torch.int8:
        return tensor * tensors[scale_name(name)][..., None]
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def rounded(tensor: Tensor, form: Form) -> Tensor:
    """Return what is read back of a tensor that is written in this form, in its own dtype.

    >>> rounded(torch.tensor([1.0, 0.3]), Form.BF16)
    tensor([1.0000, 0.3008])
    """
    return unpacked("", packed("", tensor, form)).to(tensor.dtype)


def scale_name(name: str) -> str:
    """Name the tensor of a packed tensor's scales."""
    return f"{name}.scale"


def _scale(numbers: Tensor) -> Tensor:
    """Return the largest number of each row over 127; 0 where that is too small to be exact."""
    scale: Tensor = torch.linalg.vector_norm(numbers, torch.inf, -1) / 127
    return scale.masked_fill(scale < torch.finfo(torch.float32).tiny, 0.0)
