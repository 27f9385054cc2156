"""Text is read from its folder, and no byte that is judged was trained on."""

from __future__ import annotations

import io
import lzma
import tarfile

import numpy as np
import pytest

from hope_runtime.evaluation import text
from hope_runtime.evaluation.text import TextError


def test_the_last_tenth_is_held_out(tmp_path):
    (tmp_path / "tinyshakespeare.txt").write_bytes(bytes(range(100)))

    found = text.shakespeare(tmp_path)

    assert found.train.tolist() == list(range(90))
    assert found.held_out.tolist() == list(range(90, 100))


def test_a_packed_text_is_the_same(tmp_path):
    (tmp_path / "tinyshakespeare.txt.xz").write_bytes(lzma.compress(b"to be or not to be"))

    assert bytes(text.shakespeare(tmp_path).held_out) == b"be"


def test_wikitext_is_trained_on_one_part_and_judged_by_another(tmp_path):
    with tarfile.open(tmp_path / "wikitext2.tar.xz", "w:xz") as archive:
        for name, content in (("wikitext2/valid.txt", b"valid"), ("wikitext2/test.txt", b"test")):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))

    found = text.wikitext(tmp_path)

    assert (bytes(found.train), bytes(found.held_out)) == (b"valid", b"test")


@pytest.mark.parametrize("name", list(text.TEXTS))
def test_a_missing_text_names_the_remedy(tmp_path, name):
    with pytest.raises(TextError, match="--data"):
        text.TEXTS[name](tmp_path)


def test_rows_in_order_hold_each_byte_once():
    whole = np.arange(100, dtype=np.uint8)

    drawn = text.in_order(np.random.default_rng(0), 50, text=whole, length=11)

    assert drawn.tokens.shape == (9, 12)
    assert drawn.tokens[drawn.scored].tolist() == list(range(1, 100))
