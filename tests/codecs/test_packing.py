"""Packed integers: nothing is lost, nothing is wasted, and the layout is the documented one."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvstack.codecs.packing import pack, packed_size, unpack
from kvstack.errors import RecipeError


@given(st.integers(1, 8), st.integers(1, 32), st.lists(st.integers(0, 3), max_size=3), st.integers(0, 2**31))
def test_round_trip_without_waste(bits: int, eighths: int, batch: list[int], seed: int) -> None:
    codes = torch.randint(2**bits, (*batch, 8 * eighths), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    packed = pack(codes, bits)
    assert packed.dtype == torch.uint8 and packed.shape == (*batch, packed_size(8 * eighths, bits)) == (*batch, eighths * bits)
    assert torch.equal(unpack(packed, bits), codes)


@given(st.integers(1, 8), st.integers(0, 2**31))
def test_every_byte_string_is_used(bits: int, seed: int) -> None:
    packed = torch.randint(256, (3, 5 * bits), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    assert torch.equal(pack(unpack(packed, bits), bits), packed)


def test_layout() -> None:
    codes = torch.arange(16)
    assert pack(codes, 4).tolist() == [i | (i + 8) << 4 for i in range(8)]
    assert pack(codes % 4, 2).tolist() == [i | i << 2 | i << 4 | i << 6 for i in range(4)]
    assert pack(codes % 2, 1).tolist() == [0b00000000, 0b11111111]
    five = pack(codes + 9, 5)
    assert torch.equal(five, torch.cat([pack((codes + 9) % 16, 4), pack((codes + 9) // 16, 1)]))
    assert torch.equal(pack(codes % 8, 3), torch.cat([pack(codes % 4, 2), pack(codes % 8 // 4, 1)]))


def test_a_head_size_that_does_not_fit_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"100 is no multiple of 8.*Use bf16 or fp8"):
        packed_size(100, 4)
