"""The page: how the codes of 128 tokens of one KV head lie in memory, in the order in which a tensor core wants to eat them.

    page = [K codes][V codes][scales]        uint8, `Format.nbytes` bytes, 16-byte aligned parts, one page per 128 tokens and head

K is a matrix `[128 tokens, D]`, V is stored transposed, `[D, 128 tokens]`, so that for both the columns are what the inner product runs
over. A matrix `[rows, C]` of b-bit codes is packed row by row. Column c = 32 s + 16 h + 4 t + i (step s, half h, thread t < 4, i < 4)
belongs to thread t of a quad, and the codes of one thread in one row are neighbours in memory: that is the fragment of an A operand of
`m64nNk32` that thread t must hold, so that a thread loads up to 16 bytes at once and never exchanges anything with its neighbours.
Inside a thread's run the codes are packed in little-endian 32-bit words; code n = 4 h + i of a word has the nibble at bit 4 n:

    32 bits  a number of float32, row by row, which no kernel reads
    16 bits  a number of bfloat16 or float16; here c = 16 s + 8 h + 2 t + i with i < 2, as in `m64nNk16`, in the order (s, h, i)
    8 bits   one byte per code, an E4M3 number, in the order (s, h, i)
    4 bits   word s: the low 3 bits of nibble n are the magnitude; the sign of code (h, i) is bit 8 i + 7 - 4 h (1 is negative)
    2 bits   word s // 2: bits 2 (s % 2) and up of nibble n are the index
    3 bits   a plane of the low 2 bits of every index, as above, then a plane of the high bits: word s // 4, bit s % 4 of nibble n

so one mask turns a word into selectors of the byte permutation `prmt`, whose table holds the levels as E4M3 numbers: the eight positive
magnitudes at 4 bits, all levels at 2 and 3 bits. Scales are interleaved, `[128, (k, v)]` bfloat16.

A record of one token is its row of K, its column of V and its pair of scales: appending a token writes its own bits and no others, and
a page does not depend on what else is in it. This module is the reference of that format, in torch; kernels do not call it.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from kvstack.errors import RecipeError

PAGE = 128  # tokens
WIDTHS = (2, 3, 4, 8, 16)  # that kernels know; here there are 32, too


@dataclass(frozen=True)
class Format:
    """Sizes and offsets, in bytes, of a page. Raises RecipeError for a head size or widths that have no page format."""

    head_dim: int
    k: int
    v: int

    def __post_init__(self) -> None:
        if self.head_dim not in (64, 128, 256) or {self.k, self.v} - {*WIDTHS, 32} or (self.head_dim == 64 and self.k == 3):
            raise RecipeError(
                f"There is no page format for {self.k}-bit keys and {self.v}-bit values of size {self.head_dim}. "
                "Pages hold 2, 3, 4, 8, 16 or 32 bits and head sizes of 64, 128 and 256, without 3-bit keys of size 64."
            )

    @property
    def value_offset(self) -> int:
        """Where the V codes begin."""
        return PAGE * self.head_dim * self.k // 8

    @property
    def scale_offset(self) -> int:
        """Where the scales begin."""
        return self.value_offset + PAGE * self.head_dim * self.v // 8

    @property
    def nbytes(self) -> int:
        """Bytes of a page."""
        return self.scale_offset + PAGE * 4


@dataclass(frozen=True)
class Pages:
    """Codes of one tier in pages.

    pool: `[P, H, format.nbytes]` uint8. table: `[B, pages]` int32, the page of the pool that holds tokens 128 p and up of row b; any
    number below P behind the end of a row. lengths: `[B]` int32, tokens of every row, on the device. What lies behind a row's end in
    its last page may be anything, but with 8 and 16 bits no NaN.
    """

    format: Format
    pool: Tensor
    table: Tensor
    lengths: Tensor


def read(pages: Pages) -> tuple[Tensor, Tensor, Tensor]:
    """Codes of K and V `[B, H, N, D]` (see `unpack`) and scales `[B, H, N, 2]` bfloat16, for all N = 128 * pages slots of the table."""
    f = pages.format
    held = pages.pool[pages.table.long()].transpose(1, 2)  # [B, H, pages, bytes]
    k = unpack(held[..., : f.value_offset], f.k, PAGE)
    v = unpack(held[..., f.value_offset : f.scale_offset], f.v, f.head_dim).transpose(-1, -2)
    scales = held[..., f.scale_offset :].contiguous().view(torch.bfloat16).unflatten(-1, (PAGE, 2))
    return k.flatten(2, 3), v.flatten(2, 3), scales.flatten(2, 3)


def write(pages: Pages, k: Tensor, v: Tensor, scales: Tensor, starts: Tensor, counts: Tensor) -> None:
    """Put the first `counts[b]` tokens of `k, v [B, H, n, D]` and `scales [B, H, n, 2]` at token `starts[b]` of row b.

    The lengths are the caller's. Slow: it unpacks and packs whole pages.
    """
    f = pages.format
    for b, (start, count) in enumerate(zip(starts.tolist(), counts.tolist(), strict=True)):
        if not count:
            continue
        first, last = start // PAGE, -(-(start + count) // PAGE)
        ids = pages.table[b, first:last]
        row = Pages(f, pages.pool, ids[None], pages.lengths)
        held = [t[0] for t in read(row)]  # [H, n, ...]
        at = slice(start - first * PAGE, start - first * PAGE + count)
        for old, new in zip(held, (k, v, scales), strict=True):
            old[:, at] = new[b, :, :count]
        k_page, v_page, s_page = (t.unflatten(1, (-1, PAGE)).transpose(0, 1) for t in held)  # [pages, H, 128, ...]
        raw = s_page.contiguous().view(torch.uint8).flatten(-2)
        pages.pool[ids.long()] = torch.cat([pack(k_page, f.k), pack(v_page.transpose(-1, -2), f.v), raw], -1)


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack a matrix of codes `[..., R, C]` uint8 into `[..., R * C * bits / 8]`.

    Codes are ascending level indices below `2 ** bits`, with 8 bits E4M3 bytes, and with 16 and 32 bits the numbers' bits, in int16 or
    int32.
    """
    *batch, rows, columns = codes.shape
    if bits == 32:
        return codes.contiguous().view(torch.uint8).flatten(-2)
    if bits == 16:
        x = codes.reshape(*batch, rows, columns // 16, 2, 4, 2).movedim(-2, -4)  # [..., R, t, s, h, i]
        return x.reshape(*batch, -1).contiguous().view(torch.uint8)
    x = codes.reshape(*batch, rows, columns // 32, 2, 4, 4).movedim(-2, -4)  # [..., R, t, s, h, i]
    if bits == 8:
        return x.reshape(*batch, -1)
    x = x.flatten(-2).to(torch.int64)  # [..., R, t, s, n]
    if bits == 4:
        magnitude, negative = torch.where(x < 8, 7 - x, x - 8), (x < 8).long()
        n = torch.arange(8, device=x.device)
        sign_bit = 8 * (n % 4) + 7 - 4 * (n // 4)
        words = ((magnitude << (4 * n)) | (negative << sign_bit)).sum(-1)  # [..., R, t, s]
        return _bytes(words).reshape(*batch, -1)
    low = _interleave(x & 3, 2)
    if bits == 2:
        return _bytes(low).reshape(*batch, -1)
    planes = (low, _interleave(x >> 2, 4))
    return torch.cat([_bytes(words).reshape(*batch, -1) for words in planes], -1)


def unpack(packed: Tensor, bits: int, rows: int) -> Tensor:
    """The codes `[..., R, C]` uint8 (with 16 bits int16, with 32 int32) of what `pack` made of them."""
    *batch, size = packed.shape
    columns = size * 8 // bits // rows
    if bits == 32:
        return packed.contiguous().view(torch.int32).reshape(*batch, rows, columns)
    if bits == 16:
        x = packed.contiguous().view(torch.int16).reshape(*batch, rows, 4, columns // 16, 2, 2).movedim(-4, -2)
        return x.reshape(*batch, rows, columns)
    if bits == 8:
        x = packed.reshape(*batch, rows, 4, columns // 32, 2, 4)
    elif bits == 4:
        words = _words(packed).reshape(*batch, rows, 4, columns // 32, 1)
        n = torch.arange(8, device=packed.device)
        magnitude, negative = (words >> (4 * n)) & 7, (words >> (8 * (n % 4) + 7 - 4 * (n // 4))) & 1
        x = torch.where(negative == 1, 7 - magnitude, magnitude + 8)
    else:
        low = packed[..., : rows * columns // 4]
        x = _separate(_words(low).reshape(*batch, rows, 4, columns // 64), 2)
        if bits == 3:
            high = packed[..., rows * columns // 4 :]
            x = x | (_separate(_words(high).reshape(*batch, rows, 4, columns // 128), 4) << 2)
    x = x.reshape(*batch, rows, 4, columns // 32, 2, 4).movedim(-4, -2)
    return x.reshape(*batch, rows, columns).to(torch.uint8)


def _interleave(x: Tensor, steps: int) -> Tensor:
    """Fields `[..., s, n]` of 4 / steps bits into words `[..., s / steps]`, as the module says."""
    x = x.unflatten(-2, (-1, steps))
    words: Tensor = (x << _shifts(steps, x.device)).sum((-2, -1))
    return words


def _separate(words: Tensor, steps: int) -> Tensor:
    """The inverse of `_interleave`."""
    fields: Tensor = (words[..., None, None] >> _shifts(steps, words.device)) & (2 ** (4 // steps) - 1)
    return fields.flatten(-3, -2)


def _shifts(steps: int, device: torch.device) -> Tensor:
    """Bit position `[s, n]` of the field of step s in nibble n."""
    return 4 * torch.arange(8, device=device) + (4 // steps) * torch.arange(steps, device=device)[:, None]


def _bytes(words: Tensor) -> Tensor:
    shift = 8 * torch.arange(4, device=words.device)
    return ((words[..., None] >> shift) & 255).to(torch.uint8)


def _words(packed: Tensor) -> Tensor:
    shift = 8 * torch.arange(4, device=packed.device)
    words: Tensor = (packed.unflatten(-1, (-1, 4)).long() << shift).sum(-1)
    return words
