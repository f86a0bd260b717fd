"""The bytes on disk: fixed for ever, read back as they were written, refused when one bit is off.

An accidental change of the format fails here first. If one of these digests must change, so must
the version number, and docs/format.md with it.
"""

from __future__ import annotations

from dataclasses import replace

import hypothesis.strategies as st
import pytest
import xxhash
from hypothesis import given

from vsnapfs.backing import Identity
from vsnapfs.diffarea.descriptors import (
    BLOCK_MASK,
    SECTOR_DTYPE,
    Descriptor,
    SectorImage,
    area_id_of,
    empty_table,
    sector_is_valid,
)
from vsnapfs.diffarea.layout import (
    MAX_POINTS,
    SECTOR_SIZE,
    SLOTS_PER_SECTOR,
    SUPERBLOCK_SIZE,
    Layout,
)
from vsnapfs.diffarea.superblock import (
    MAX_LABEL,
    NO_RING,
    RecoveryPoint,
    RingName,
    Superblock,
    decode,
)
from vsnapfs.errors import Fault, FaultCode, FormatError
from vsnapfs.volume.statefile import COPY_SIZE, SavedState, _decode, _encode

VOLUME_ID = bytes(range(16))
LAYOUT = Layout(16384)
FAULT = Fault(
    FaultCode.DIFF_AREA_FULL,
    28,
    "the maximum of 64 MiB is reached",
    1_795_332_000_123_456_789,
    block=12,
    offset=196_608,
    length=4096,
    needed=1,
    used=67_000_000,
    allocated=67_108_864,
    maximum=67_108_864,
    diff_area="/disk2/diff-area",
)
SUPERBLOCK = Superblock(
    volume_id=VOLUME_ID,
    block_size=16384,
    replica_size=10**9 + 1,
    maximum=LAYOUT.size_of(5120),
    allocated=LAYOUT.size_of(2592),
    generation=0x0102030405060708,
    barrier=0x1112131415161718,
    epoch=7,
    restoring=3,
    clean=True,
    replica=Identity(1, 2, 10**9 + 1, 4),
    fault=FAULT,
    points=(RecoveryPoint(3, 1_795_332_000_000_000_000, "夜間"), RecoveryPoint(7, -1, "")),
)
RING = RingName(bytes(range(16, 32)), 0xFD01, 2**40, 27)
STATE = SavedState(True, FAULT, 3, 67_108_864, 16384, 7, 99, RING, bytes(range(32, 48)))


def _digest(data: bytes) -> int:
    return xxhash.xxh3_64_intdigest(data)


def _sector() -> SectorImage:
    image = SectorImage.empty()
    image.put(0, Descriptor(0x1122334455667788, 5, 7))
    image.put(19, Descriptor(2**64 - 1, 2**48 - 1, 2**30 - 1))
    image.seal(area_id_of(VOLUME_ID), 0x99, 130, 0x80001)
    return image


# --- golden bytes --------------------------------------------------------------------------------


def test_the_bytes_of_a_superblock() -> None:
    """Magic, version 1, size, id, counters, sizes, points: little endian, at fixed places."""
    data = SUPERBLOCK.encode()
    assert len(data) == SUPERBLOCK_SIZE
    assert data[:128].hex(" ", 8) == (
        "56534e4150465300 0100000000000100 0001020304050607 08090a0b0c0d0e0f "
        "0807060504030201 1817161514131211 0040000001000000 01ca9a3b00000000 "
        "0000060500000000 00008e0200000000 0700000003000000 02000000000a0000 "
        "0100000000000000 0200000000000000 01ca9a3b00000000 0400000000000000"
    )
    assert data[512:520] == (0x129).to_bytes(4, "little") + b'{"co'
    assert data[4096:4128].hex() == (
        "03000000060000000040e421f14cea18e5a49ce9969300000000000000000000"
    )
    assert data[4208:4224].hex() == "0700000000000000ffffffffffffffff"
    assert data[-8:].hex() == "cb9565cf18c32a4f"
    assert _digest(data) == 0xCD2A11A4A8E6D31A


def test_the_bytes_that_name_a_write_buffer() -> None:
    """Its id, the boot id, the last suspect point; then the replica and the tmpfs, by number."""
    data = replace(SUPERBLOCK, ring=RING, boot=bytes(range(32, 48)), suspect=5).encode()
    assert data[256:320].hex(" ", 8) == (
        "1011121314151617 18191a1b1c1d1e1f 2021222324252627 28292a2b2c2d2e2f "
        "0500000000000000 01fd000000000000 0000000000010000 1b00000000000000"
    )


def test_the_bytes_of_a_descriptor_sector() -> None:
    """Checksum, area, barrier, number, fresh mask, then twenty descriptors of 24 bytes."""
    data = bytes(_sector().data)
    assert len(data) == SECTOR_SIZE == 32 + SLOTS_PER_SECTOR * 24
    assert data[:56].hex(" ", 8) == (
        "a9eeb4e002b65e61 0001020304050607 9900000000000000 8200000001000800 "
        "8877665544332211 0500000000000080 0700000000000000"
    )
    assert data[-24:].hex(" ", 8) == "ffffffffffffffff ffffffffffff0080 ffffff3f00000000"
    assert _digest(data) == 0xA9FA5DBE130E27B5


def test_the_bytes_of_a_state_file() -> None:
    """Magic, version 1, length, id, sequence, then JSON, then the checksum."""
    data = _encode(STATE, VOLUME_ID, 5)
    assert len(data) == COPY_SIZE
    assert data[:40].hex(" ", 8) == (
        "56534e4150535400 0100000010020000 0001020304050607 08090a0b0c0d0e0f 0500000000000000"
    )
    assert _digest(data) == 0xE960B3CE51F2F27


def test_the_bytes_of_a_new_table() -> None:
    """A group starts with 128 sealed, empty sectors: none of them can be taken for rot."""
    table = empty_table(area_id_of(VOLUME_ID), 6, 256, 128)
    assert len(table) == 128 * SECTOR_SIZE
    assert _digest(table) == 0xA967E245C6B6E578
    for index in range(128):
        part = memoryview(table)[index * SECTOR_SIZE : (index + 1) * SECTOR_SIZE]
        assert sector_is_valid(part, area_id_of(VOLUME_ID), 256 + index)
        assert SectorImage(bytearray(part)).barrier == 6
        assert [SectorImage(bytearray(part)).get(place) for place in range(20)] == [None] * 20


# --- there and back ------------------------------------------------------------------------------

labels = st.text(max_size=40).filter(
    lambda text: "\0" not in text and len(text.encode(errors="replace")) <= MAX_LABEL
)
numbers = st.lists(st.integers(1, 2**30 - 1), unique=True, max_size=20).map(sorted)


@st.composite
def superblocks(draw: st.DrawFn) -> Superblock:
    block_size = 4096 << draw(st.integers(0, 8))
    layout = Layout(block_size)
    found = draw(numbers)
    slots = layout.valid_slots(draw(st.integers(1, 1 << 22)))
    allocated = layout.size_of(slots)
    texts = [draw(labels.filter(lambda text: text.isprintable())) for _ in found]
    return Superblock(
        volume_id=draw(st.binary(min_size=16, max_size=16)),
        block_size=block_size,
        replica_size=draw(st.integers(1, 1 << 46)),
        maximum=allocated + draw(st.integers(0, 1 << 30)),
        allocated=allocated,
        generation=draw(st.integers(0, 2**63 - 1)),
        barrier=draw(st.integers(0, 2**63 - 1)),
        epoch=max([draw(st.integers(0, 2**30 - 1)), *found]),
        restoring=draw(st.sampled_from([0, *found])),
        clean=draw(st.booleans()),
        replica=Identity(*(draw(st.integers(0, 2**64 - 1)) for _ in range(4))),
        fault=draw(st.sampled_from([None, FAULT, replace(FAULT, block=None, diff_area=None)])),
        points=tuple(
            RecoveryPoint(number, draw(st.integers(-(2**63), 2**63 - 1)), text)
            for number, text in zip(found, texts, strict=True)
        ),
        ring=draw(st.sampled_from([NO_RING, RING])),
        boot=draw(st.binary(min_size=16, max_size=16)),
    )


@given(superblocks())
def test_a_superblock_is_read_as_it_was_written(superblock: Superblock) -> None:
    """decode(encode(x)) == x for every possible superblock."""
    assert decode(superblock.encode()) == superblock


def test_512_points_with_the_longest_labels_fit() -> None:
    """The catalog is as large as the limit of points."""
    points = tuple(
        RecoveryPoint(number, number, f"{number:0{MAX_LABEL}d}")
        for number in range(1, MAX_POINTS + 1)
    )
    superblock = replace(SUPERBLOCK, points=points, epoch=MAX_POINTS, restoring=0)
    assert decode(superblock.encode()) == superblock


@pytest.mark.parametrize(
    "text", ["x" * 100_000, "\x01" * 5000, "\udcff" * 5000, "夜" * 5000, '"' * 9000]
)
def test_a_fault_with_hostile_texts_keeps_its_numbers(text: str) -> None:
    """However long or strange the message and the path are, superblock and state can be read."""
    fault = replace(FAULT, message=text, diff_area=text)
    for found in (
        decode(replace(SUPERBLOCK, fault=fault).encode()).fault,
        _decode(_encode(replace(STATE, fault=fault), VOLUME_ID, 1), VOLUME_ID)[1].fault,  # type: ignore[index]
    ):
        assert found is not None
        assert replace(found, message="", diff_area="") == replace(FAULT, message="", diff_area="")
        assert text.startswith(found.message)
        assert found.message


@given(
    st.lists(
        st.one_of(
            st.none(),
            st.builds(
                Descriptor,
                st.integers(0, 2**64 - 1),
                st.integers(0, BLOCK_MASK),
                st.integers(0, 2**30 - 1),
            ),
        ),
        min_size=SLOTS_PER_SECTOR,
        max_size=SLOTS_PER_SECTOR,
    ),
    st.integers(0, 2**63 - 1),
    st.integers(0, 2**32 - 1),
    st.integers(0, 2**20 - 1),
)
def test_a_sector_is_read_as_it_was_written(
    descriptors: list[Descriptor | None], barrier: int, sector: int, fresh: int
) -> None:
    """Through `SectorImage` and through the array that the scan reads it with."""
    import numpy as np

    image = SectorImage.empty()
    for place, descriptor in enumerate(descriptors):
        image.put(place, descriptor)
    image.seal(77, barrier, sector, fresh)
    assert sector_is_valid(memoryview(image.data), 77, sector)
    assert not sector_is_valid(memoryview(image.data), 78, sector)
    assert not sector_is_valid(memoryview(image.data), 77, sector ^ 1)
    read = SectorImage(bytearray(image.data))
    assert [read.get(place) for place in range(SLOTS_PER_SECTOR)] == descriptors
    assert (read.barrier, read.fresh) == (barrier, fresh)
    (row,) = np.frombuffer(bytes(image.data), dtype=SECTOR_DTYPE)
    assert (int(row["barrier"]), int(row["sector"]), int(row["fresh"])) == (barrier, sector, fresh)
    for descriptor, entry in zip(descriptors, row["entries"], strict=True):
        assert bool(int(entry["block"]) >> 63) == (descriptor is not None)
        if descriptor is not None:
            assert int(entry["hash"]) == descriptor.hash
            assert int(entry["block"]) & BLOCK_MASK == descriptor.block
            assert int(entry["epoch"]) == descriptor.epoch
    read.put(3, None)
    assert read.get(3) is None


# --- one bit -------------------------------------------------------------------------------------


def test_no_flipped_bit_of_a_superblock_goes_unnoticed() -> None:
    """Every bit of what is used, and one bit of each other byte."""
    good = SUPERBLOCK.encode()
    data = bytearray(good)
    for byte in range(SUPERBLOCK_SIZE):
        used = byte < 1024 or 4096 <= byte < 4400 or byte >= SUPERBLOCK_SIZE - 16
        for bit in range(8) if used else [byte % 8]:
            data[byte] ^= 1 << bit
            with pytest.raises(FormatError):
                decode(data)
            data[byte] = good[byte]
    assert decode(data) == SUPERBLOCK


def test_no_flipped_bit_of_a_sector_goes_unnoticed() -> None:
    """All 4096 of them: a descriptor that rotted is never taken for an empty one."""
    data = _sector().data
    area_id = area_id_of(VOLUME_ID)
    assert sector_is_valid(memoryview(data), area_id, 130)
    for bit in range(8 * SECTOR_SIZE):
        data[bit >> 3] ^= 1 << (bit & 7)
        assert not sector_is_valid(memoryview(data), area_id, 130), bit
        data[bit >> 3] ^= 1 << (bit & 7)


def test_no_flipped_bit_of_a_state_file_goes_unnoticed() -> None:
    """All 32768 of a copy; nor is one of another volume taken for ours."""
    data = bytearray(_encode(STATE, VOLUME_ID, 5))
    assert _decode(bytes(data), VOLUME_ID) == (5, STATE)
    assert _decode(bytes(data), bytes(16)) is None
    for bit in range(8 * COPY_SIZE):
        data[bit >> 3] ^= 1 << (bit & 7)
        assert _decode(bytes(data), VOLUME_ID) is None, bit
        data[bit >> 3] ^= 1 << (bit & 7)


def test_a_state_that_none_could_follow_is_none() -> None:
    """Its number is forged: the next one saved would have to be found, too."""
    assert _decode(_encode(STATE, VOLUME_ID, 2**63 - 1), VOLUME_ID) is None


def test_others_are_in_a_state_file_only_once_there_were_any() -> None:
    """Without them an earlier version can read it; with them nothing else changes."""
    assert b"others" not in _encode(STATE, VOLUME_ID, 5)
    assert b"spoilt" not in _encode(STATE, VOLUME_ID, 5)
    state = replace(STATE, others_at=2**63 - 1, others_point=2**30 - 1, spoilt=2**30 - 1)
    assert _decode(_encode(state, VOLUME_ID, 5), VOLUME_ID) == (5, state)


@pytest.mark.parametrize("value", [-1, 2**63, "1", True, 1.5])
@pytest.mark.parametrize("name", ["others_at", "others_point", "spoilt"])
def test_impossible_others_are_no_valid_state(name: str, value: object) -> None:
    """A right checksum does not make them right."""
    state = replace(STATE, others_at=1, others_point=1, spoilt=1)
    changed = replace(state, **{name: value})  # type: ignore[arg-type]
    assert _decode(_encode(changed, VOLUME_ID, 5), VOLUME_ID) is None


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"block_size": 12288}, "inconsistent"),
        ({"replica_size": 0}, "inconsistent"),
        ({"replica_size": 2**63 - 1}, "inconsistent"),
        ({"maximum": SUPERBLOCK.allocated - 1}, "inconsistent"),
        ({"allocated": SUPERBLOCK.allocated + 1}, "inconsistent"),
        ({"allocated": 0}, "inconsistent"),
        ({"epoch": 6}, "inconsistent"),
        ({"epoch": 2**30}, "inconsistent"),
        ({"restoring": 4}, "inconsistent"),
        ({"points": SUPERBLOCK.points[::-1]}, "inconsistent"),
        ({"points": SUPERBLOCK.points[:1] * 2}, "inconsistent"),
        ({"points": (RecoveryPoint(0, 0, ""),), "restoring": 0}, "inconsistent"),
    ],
)
def test_a_superblock_that_contradicts_itself_is_refused(change: dict, code: str) -> None:
    """Though its checksum is right: somebody made it by hand, or a bug did."""
    with pytest.raises(FormatError) as caught:
        decode(replace(SUPERBLOCK, **change).encode())
    assert caught.value.code == code


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (b"", "not-a-diff-area"),
        (bytes(SUPERBLOCK_SIZE), "not-a-diff-area"),
        (SUPERBLOCK.encode()[:-1], "not-a-diff-area"),
        (b"VSNAPFS\0\2" + SUPERBLOCK.encode()[9:], "foreign-version"),
        (SUPERBLOCK.encode()[:-8] + bytes(8), "checksum"),
    ],
)
def test_what_is_no_superblock_is_told_apart(data: bytes, code: str) -> None:
    """Foreign, of another version, rotted: the code says which."""
    with pytest.raises(FormatError) as caught:
        decode(data)
    assert caught.value.code == code
