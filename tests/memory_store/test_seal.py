"""Encryption at rest, on real keys and real files."""

import base64
import json
import os
import resource
import stat
import traceback

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memory_store.errors import StoreError
from memory_store.seal import OVERHEAD, BadKeyring, Keyring, Sealed, Tampered, key_of

HERE = "acme:user-7/5f/0"
KEYS = {name: bytes([number]) * 32 for number, name in enumerate(["k1", "k2", "other"])}
ENCODED = {name: base64.b64encode(key).decode() for name, key in KEYS.items()}
TEXT = json.dumps(
    {
        "acme": {"current": "k2", "keys": {"k1": ENCODED["k1"], "k2": ENCODED["k2"]}},
        "umbrella": {"current": "k2", "keys": {"k2": ENCODED["other"]}},
    }
)
RING = Keyring.parse(TEXT)
SEALED = RING.seal("acme", HERE, b"hello")
REGIONS = {
    "magic": range(3),
    "version": range(3, 4),
    "id length": range(4, 5),
    "key id": range(5, 7),
    "nonce": range(7, 19),
    "ciphertext": range(19, 24),
    "tag": range(24, 40),
}


def only(current="k1", keys=None):
    """Return a keyring's text with one tenant, acme."""
    keys = {"k1": ENCODED["k1"]} if keys is None else keys
    return json.dumps({"acme": {"current": current, "keys": keys}})


def leaks(text):
    """Tell whether key material is in a text, in any of the ways one would print it."""
    ways = [ENCODED.values(), map(repr, KEYS.values()), map(bytes.hex, KEYS.values())]
    return any(key in text for keys in ways for key in keys)


@given(st.binary(max_size=300), st.text())
def test_what_is_sealed_opens_to_itself_in_its_place(data, context):
    sealed = RING.seal("acme", context, data)

    assert RING.open("acme", context, sealed) == data
    assert RING.open("acme", context, memoryview(sealed)) == data
    assert len(sealed) <= len(data) + OVERHEAD


def test_a_context_may_hold_any_string():
    sealed = RING.seal("acme", "\ud800\0", b"hello")

    assert RING.open("acme", "\ud800\0", sealed) == b"hello"


def test_a_slice_of_a_larger_value_can_be_sealed():
    data = memoryview(os.urandom(1 << 20))

    sealed = RING.seal("acme", HERE, data[1000:5000])

    assert RING.open("acme", HERE, sealed) == data[1000:5000]


def test_a_sealed_value_does_not_show_what_is_in_it():
    assert b"hello" not in SEALED


def test_sealing_the_same_twice_gives_nothing_in_common_but_the_header():
    again = RING.seal("acme", HERE, b"hello")

    assert again[:7] == SEALED[:7]
    assert again[7:19] != SEALED[7:19]
    assert again[19:] != SEALED[19:]


def test_sealing_adds_no_more_than_the_overhead_even_with_the_longest_id():
    ring = Keyring.parse(only("k" * 32, {"k" * 32: ENCODED["k1"]}))

    sealed = ring.seal("acme", HERE, b"hello")

    assert len(sealed) == len(b"hello") + OVERHEAD
    assert key_of(sealed) == "k" * 32
    assert ring.open("acme", HERE, sealed) == b"hello"


def test_a_value_moved_to_another_place_is_tampered_and_the_place_is_named():
    with pytest.raises(Tampered, match="'acme:user-8/5f/0'") as caught:
        RING.open("acme", "acme:user-8/5f/0", SEALED)

    assert caught.value.context == "acme:user-8/5f/0"


def test_a_value_of_another_tenant_is_tampered_though_both_have_a_key_of_that_name():
    with pytest.raises(Tampered):
        RING.open("umbrella", HERE, SEALED)


def test_not_even_the_right_key_opens_a_value_for_another_tenant():
    thief = Keyring.parse(TEXT.replace("acme", "zeta"))

    with pytest.raises(Tampered):
        thief.open("zeta", HERE, SEALED)


def test_tenant_and_context_do_not_run_into_each_other():
    longer = Keyring.parse(TEXT.replace("acme", "acmeX"))

    with pytest.raises(Tampered):
        longer.open("acmeX", "Y", RING.seal("acme", "XY", b"hello"))


def test_another_key_of_the_same_name_is_tampered():
    swapped = Keyring.parse(only("k2", {"k2": ENCODED["other"]}))

    with pytest.raises(Tampered):
        swapped.open("acme", HERE, SEALED)


def test_the_regions_cover_the_whole_envelope():
    assert [at for region in REGIONS.values() for at in region] == [*range(len(SEALED))]


@pytest.mark.parametrize("region", REGIONS)
def test_every_flipped_bit_is_refused(region):
    for at in REGIONS[region]:
        for bit in range(8):
            flipped = bytearray(SEALED)
            flipped[at] ^= 1 << bit

            # Another name, or another length of it, may read as a key that is not there.
            with pytest.raises((Tampered, Sealed) if "id" in region else Tampered):
                RING.open("acme", HERE, bytes(flipped))


def test_a_flip_that_names_another_key_that_is_there_is_tampered():
    with pytest.raises(Tampered):
        RING.open("acme", HERE, SEALED.replace(b"k2", b"k1"))


def test_a_value_under_another_name_is_tampered_even_if_that_names_the_same_key():
    renamed = Keyring.parse(only("k1", {"k1": ENCODED["k2"]}))

    with pytest.raises(Tampered):
        renamed.open("acme", HERE, SEALED.replace(b"k2", b"k1"))


def test_a_value_cut_at_any_length_is_tampered():
    for length in range(len(SEALED)):
        with pytest.raises(Tampered):
            RING.open("acme", HERE, SEALED[:length])


def test_a_value_with_something_after_it_is_tampered():
    with pytest.raises(Tampered):
        RING.open("acme", HERE, SEALED + b"\0")


@pytest.mark.parametrize("plain", [b"", b"hello", b"{}", bytes(100), b"\x28\xb5\x2f\xfd" * 20])
def test_plain_data_is_never_returned(plain):
    assert key_of(plain) is None
    with pytest.raises(Tampered, match="not sealed"):
        RING.open("acme", HERE, plain)


@given(st.binary(max_size=100))
def test_no_bytes_at_all_break_the_reading_of_an_envelope(data):
    with pytest.raises((Tampered, Sealed)):
        RING.open("acme", HERE, b"\x89HS\x01" + data)


def test_the_key_of_a_value_is_told_without_the_keyring():
    assert key_of(SEALED) == key_of(memoryview(SEALED)) == "k2"


def test_after_a_rotation_the_old_still_opens_and_the_new_is_sealed_with_the_new_key():
    rotated = RING.with_new_key("acme")
    sealed = rotated.seal("acme", HERE, b"newer")

    assert rotated.open("acme", HERE, SEALED) == b"hello"
    assert rotated.open("acme", HERE, sealed) == b"newer"
    assert key_of(sealed) == rotated.current("acme") != "k2"
    with pytest.raises(Sealed):
        RING.open("acme", HERE, sealed)


def test_a_rotation_leaves_the_ring_it_started_from_and_other_tenants_alone():
    before = RING.dump()

    rotated = RING.with_new_key("acme")

    assert RING.dump() == before
    assert rotated.current("umbrella") == "k2"
    with pytest.raises(AttributeError):
        RING._tenants = {}


def test_key_ids_count_up():
    ring = Keyring().with_new_key("acme")
    first = ring.current("acme")
    ring = ring.with_new_key("acme").without_key("acme", first).with_new_key("acme")

    assert first.startswith("k1-")
    assert ring.current("acme").startswith("k3-")
    assert RING.with_new_key("acme").current("acme").startswith("k3-")


def test_a_key_id_of_huge_numbers_can_be_rotated():
    ring = Keyring.parse(only("k" + "9" * 31, {"k" + "9" * 31: ENCODED["k1"]}))

    rotated = ring.with_new_key("acme")

    assert Keyring.parse(rotated.dump()) == rotated


def test_each_new_key_is_another():
    ring = Keyring().with_new_key("acme").with_new_key("acme").with_new_key("umbrella")

    keys = [key for entry in json.loads(ring.dump()).values() for key in entry["keys"].values()]

    assert len(set(keys)) == len(keys) == 3


def test_a_retired_key_can_be_forgotten_and_what_it_sealed_is_then_sealed_for_ever():
    rotated = RING.with_new_key("acme")

    ring = rotated.without_key("acme", "k2")

    with pytest.raises(Sealed, match="tenant 'acme' has no key 'k2'") as caught:
        ring.open("acme", HERE, SEALED)
    assert (caught.value.tenant, caught.value.key_id) == ("acme", "k2")


def test_the_current_key_cannot_be_forgotten_alone():
    with pytest.raises(BadKeyring, match="'k2' of tenant 'acme' is in use; add a new one first"):
        RING.without_key("acme", "k2")


def test_forgetting_what_is_not_there_is_refused_lest_a_typo_pass_for_an_erasure():
    with pytest.raises(BadKeyring, match="'acme' has no key 'k7'"):
        RING.without_key("acme", "k7")
    with pytest.raises(BadKeyring, match="'acne' has no key"):
        RING.without("acne")


def test_an_erased_tenant_is_sealed_for_ever_and_the_others_are_not():
    theirs = RING.seal("umbrella", HERE, b"theirs")

    erased = RING.without("acme")

    assert erased.tenants == {"umbrella"}
    assert ENCODED["k1"] not in erased.dump()
    assert ENCODED["k2"] not in erased.dump()
    assert erased.open("umbrella", HERE, theirs) == b"theirs"
    with pytest.raises(Sealed, match="tenant 'acme' has no key 'k2'"):
        erased.open("acme", HERE, SEALED)


def test_an_erased_tenant_that_comes_back_finds_its_old_data_sealed_and_not_tampered():
    first = Keyring().with_new_key("acme")
    old = first.seal("acme", HERE, b"old")

    back = first.without("acme").with_new_key("acme")

    with pytest.raises(Sealed):
        back.open("acme", HERE, old)
    assert back.open("acme", HERE, back.seal("acme", HERE, b"new")) == b"new"


def test_without_keys_nothing_is_sealed():
    with pytest.raises(BadKeyring, match="tenant 'zeta' has no key; add one"):
        RING.seal("zeta", HERE, b"hello")
    with pytest.raises(BadKeyring, match="tenant 'zeta' has no key; add one"):
        RING.current("zeta")


def test_a_keyring_is_written_as_it_is_read_in_a_stable_order():
    backwards = Keyring.parse(json.dumps(dict(reversed(json.loads(TEXT).items()))))

    assert backwards.dump() == RING.dump() == json.dumps(json.loads(TEXT), indent=2) + "\n"
    assert Keyring.parse(RING.dump()) == RING


def test_a_ring_without_tenants_can_be_kept_too():
    assert Keyring.parse(Keyring().dump()) == Keyring()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not JSON"),
        ("{", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("[]", "not a JSON object"),
        ("null", "not a JSON object"),
        (TEXT[:-1] + ', "acme": {}}', "a name stands twice"),
        (only().replace('{"k1"', '{"k1": "AA==", "k1"'), "a name stands twice"),
        ('{"": {}}', "tenant ''"),
        (only().replace("acme", "a:b"), "tenant 'a:b': use 1 to 64"),
        ('{"acme": "k1"}', "'acme': its entry is not"),
        ('{"acme": {}}', "'acme': its entry is not"),
        ('{"acme": {"current": "k1"}}', "'acme': its entry is not"),
        ('{"acme": {"current": "k1", "keys": ["k1"]}}', "'acme': its entry is not"),
        (only(keys={}), "with at least one key"),
        (only(current=1), "'acme': its entry is not"),
        (only().replace('"current"', '"note": "", "current"'), "'acme': its entry is not"),
        (only(current="k2"), r"'acme': its current key is not among \['k1'\]"),
        (only("", {"": ENCODED["k1"]}), "'acme': use 1 to 32 of"),
        (only("k 1", {"k 1": ENCODED["k1"]}), "'acme': use 1 to 32 of"),
        (only("kä", {"kä": ENCODED["k1"]}), "'acme': use 1 to 32 of"),
        (only("k" * 33, {"k" * 33: ENCODED["k1"]}), "'acme': use 1 to 32 of"),
        (only(keys={"k1": 7}), "'acme': key 'k1' is not base64 of 32 bytes"),
        (only(keys={"k1": ""}), "'acme': key 'k1' is not base64 of 32 bytes"),
        (only(keys={"k1": ENCODED["k1"][:-1]}), "'acme': key 'k1' is not base64 of 32 bytes"),
        (only(keys={"k1": ENCODED["k1"] + "\n"}), "'acme': key 'k1' is not base64 of 32 bytes"),
        (only(keys={"k1": "ä" * 44}), "'acme': key 'k1' is not base64 of 32 bytes"),
        (only(keys={"k1": "AA" * 8}), "openssl rand -base64 32"),
        (only(keys={"k1": ENCODED["k1"], "k2": ENCODED["k1"]}), "'k1' .* 'k2' .* are the same"),
        (TEXT.replace(ENCODED["other"], ENCODED["k1"]), "'k1' of tenant 'acme' and 'k2' of ten"),
    ],
)
def test_what_is_not_a_keyring_is_refused_with_the_reason(text, message):
    with pytest.raises(BadKeyring, match=message) as caught:
        Keyring.parse(text)

    assert isinstance(caught.value, StoreError)


@given(
    st.recursive(
        st.none() | st.integers() | st.text(),
        lambda inner: (
            st.lists(inner)
            | st.dictionaries(st.sampled_from(["acme", "current", "keys", "k1"]), inner)
        ),
    )
)
def test_no_json_at_all_breaks_the_reading_of_a_keyring(content):
    try:
        ring = Keyring.parse(json.dumps(content))
    except BadKeyring:
        return
    assert ring == Keyring()


@pytest.mark.parametrize(
    "text",
    [
        TEXT[:-1],
        only(current=ENCODED["k1"]),
        only(keys={ENCODED["k1"]: "k1"}),
        only(keys={"k1": ENCODED["k1"] + "="}),
        only(keys={"k1": [ENCODED["k1"]]}),
        json.dumps({"acme": {"current": "k1", ENCODED["k1"]: "keys"}}),
        json.dumps({"acme": ENCODED["k1"]}),
        json.dumps(ENCODED["k1"]),
        only(keys={"k1": ENCODED["k1"], "k2": ENCODED["k1"]}),
    ],
)
def test_no_error_tells_a_key_not_even_one_that_stands_in_the_wrong_place(text, tmp_path):
    path = tmp_path / "keyring.json"
    path.touch(mode=0o600)
    path.write_text(text)

    with pytest.raises(BadKeyring) as caught:
        Keyring.read(path)

    assert not leaks("".join(traceback.format_exception(caught.value)))


def test_a_shown_keyring_tells_tenants_and_ids_and_no_key():
    assert repr(RING) == str(RING) == "Keyring({'acme': ['k1', 'k2'], 'umbrella': ['k2']})"
    assert not leaks(repr(RING._tenants))
    assert leaks(RING.dump())


def test_a_saved_keyring_is_read_back_and_is_its_owners_alone(tmp_path):
    path = tmp_path / "keyring.json"

    RING.save(path)

    assert Keyring.read(path) == RING
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_saving_replaces_the_file_and_leaves_nothing_beside_it(tmp_path):
    path = tmp_path / "keyring.json"
    path.write_text("old")
    path.chmod(0o644)
    before = path.stat().st_ino

    RING.save(path)

    assert path.stat().st_ino != before
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [*tmp_path.iterdir()] == [path]


def test_saving_through_a_link_leaves_no_forgotten_key_behind_it(tmp_path):
    target, link = tmp_path / "secret" / "keyring.json", tmp_path / "keyring.json"
    target.parent.mkdir()
    RING.save(target)
    link.symlink_to(target)

    RING.without("acme").save(link)

    assert link.is_symlink()
    assert Keyring.read(target).tenants == {"umbrella"}


def test_a_save_that_fails_leaves_nothing_beside_the_path(tmp_path):
    path = tmp_path / "keyring.json"
    path.mkdir()

    with pytest.raises(BadKeyring, match=f"keyring {path} cannot be saved: Is a directory"):
        RING.save(path)

    assert [*tmp_path.iterdir()] == [path]
    with pytest.raises(BadKeyring, match="cannot be saved: No such file"):
        RING.save(tmp_path / "nowhere" / "keyring.json")


def test_a_save_that_fails_halfway_leaves_the_file_as_it_was(tmp_path):
    path = tmp_path / "keyring.json"
    RING.save(path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    try:
        with pytest.raises(BadKeyring, match="cannot be saved: File too large"):
            RING.with_new_key("acme").save(path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    assert Keyring.read(path) == RING
    assert [*tmp_path.iterdir()] == [path]


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o602, 0o644, 0o660, 0o666])
def test_a_keyring_that_others_may_read_or_write_is_refused_with_the_remedy(mode, tmp_path):
    path = tmp_path / "keyring.json"
    RING.save(path)
    path.chmod(mode)

    with pytest.raises(BadKeyring, match=f"chmod 600 {path}$"):
        Keyring.read(path)


@pytest.mark.parametrize("mode", [0o400, 0o600, 0o700])
def test_a_keyring_that_only_its_owner_may_read_is_read(mode, tmp_path):
    path = tmp_path / "keyring.json"
    RING.save(path)
    path.chmod(mode)

    assert Keyring.read(path) == RING


def test_a_keyring_that_is_not_there_or_not_one_is_refused_by_its_path(tmp_path):
    path = tmp_path / "keyring.json"
    with pytest.raises(BadKeyring, match=f"keyring {path} cannot be read: No such file"):
        Keyring.read(path)

    path.touch(mode=0o600)
    with pytest.raises(BadKeyring, match=f"keyring {path}: it is not JSON"):
        Keyring.read(path)

    path.write_bytes(b"\xff")
    with pytest.raises(BadKeyring, match=f"keyring {path} is not UTF-8 text"):
        Keyring.read(path)
