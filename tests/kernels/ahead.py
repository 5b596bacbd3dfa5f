"""Compile every kernel ahead of time, for GPUs that need not be there, and print what it takes: `python tests/kernels/ahead.py`.

It prints one JSON object, {kernel: {target: {"registers": ..., "spills": ..., "shared": ...}}}, which is the form of `budgets.json`:
registers of a thread, its bytes (NVIDIA) or registers (AMD) that do not fit, bytes of shared memory of a program. Of some kernels it
looks at the innermost loop, too: "mma" is its matrix instruction, "loop" the number of its instructions. It is a process of its own,
because a process that interprets kernels cannot compile them. A new kernel is one row of `KERNELS` and one of the budgets.
"""

import json
from dataclasses import dataclass, field
from typing import Any

import torch
import triton
from compiled import resources
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonASTSource

from kvstack.codecs.polar import PolarCodec
from kvstack.codecs.rotation import rotation
from kvstack.kernels import (
    encode,
    encode_hopper,
    encode_step,
    exact,
    hopper,
    linear,
    linear_hopper,
    lowrank_hopper,
    merge,
    move,
    plain,
    portable,
    prefill,
    prefill_hopper,
    rotate,
    top,
)
from kvstack.kernels.book import Book, book, cells
from kvstack.kernels.pages import PAGE, Format

NVIDIA = {f"sm_{arch}": GPUTarget("cuda", arch, 32) for arch in (80, 89, 90, 100)}
EVERY = {**NVIDIA, "gfx942": GPUTarget("hip", "gfx942", 64)}


@dataclass(frozen=True)
class Kernel:
    """A kernel with its arguments. pointers, scalars: their types, in Triton's words; those not named are `i32`."""

    fn: Any
    pointers: dict[str, str]
    constants: dict[str, Any]
    scalars: dict[str, str] = field(default_factory=dict)
    aligned: tuple[str, ...] = ()  # integers that are multiples of 16, as Triton finds out when it launches; pointers all are
    options: dict[str, Any] = field(default_factory=lambda: {"num_warps": 4, "num_stages": 1})  # as it is launched with
    targets: dict[str, GPUTarget] = field(default_factory=lambda: EVERY)
    loop: bool = False  # whether to look at its innermost loop

    def compile(self, target: GPUTarget) -> Any:
        """What Triton makes of it."""
        names = self.fn.arg_names
        types = {**dict.fromkeys(names, "i32"), **self.pointers, **self.scalars, **dict.fromkeys(self.constants, "constexpr")}
        assert set(types) == set(names), set(types) ^ set(names)
        attributes = {(names.index(n),): [["tt.divisibility", 16]] for n in (*self.pointers, *self.aligned)}
        source = GluonASTSource if self.fn.is_gluon() else ASTSource
        code = source(fn=self.fn, signature=types, constexprs=self.constants, attrs=attributes)
        return triton.compile(code, target=target, options=self.options)


def pages_kernel(k: int, v: int, head_dim: int, capped: bool = False, num_warps: int = portable.WARPS, **more: Any) -> Kernel:
    """`portable.decode_kernel` for `k` and `v` bits."""
    f = Format(head_dim, k, v)
    floats = ("q", "bias", "k_levels", "v_levels", "out", "lse2")
    return Kernel(
        portable.decode_kernel,
        {**dict.fromkeys(floats, "*fp32"), "pool": "*u8", "table": "*i32", "lengths": "*i32", "cum": "*i32"},
        dict(
            BATCH=8, M=portable.ROWS, D=head_dim, K_BITS=k, V_BITS=v, K_BYTES=f.value_offset, V_BYTES=f.scale_offset - f.value_offset,
            PAGE=PAGE, CAPPED=capped,
        ),
        {"cap": "fp32"}, options={"num_warps": num_warps, "num_stages": 1}, **more,
    )  # fmt: skip


def exact_kernel(dtype: str, head_dim: int, precision: str, **more: Any) -> Kernel:
    """`exact.exact_kernel` for tiers of `dtype`."""
    return Kernel(
        exact.exact_kernel,
        {**dict.fromkeys("qkv", f"*{dtype}"), "seen": "*i1", "out": "*fp32", "lse2": "*fp32"},
        dict(M=portable.ROWS, D=head_dim, BLOCK=exact.BLOCK, CAPPED=False, SHORT=dtype != "fp32", PRECISION=precision),
        {"scale": "fp32", "cap": "fp32"},
        tuple(f"{x}_{y}" for x, ys in (("q", "bht"), ("k", "bhs"), ("v", "bhs")) for y in ys),
        **more,
    )


def prefill_kernel(k: int, v: int, head_dim: int, capped: bool = False, **more: Any) -> Kernel:
    """`prefill.prefill_kernel` for `k` and `v` bits and many query rows."""
    f = Format(head_dim, k, v)
    floats = ("q", "bias", "k_levels", "v_levels", "out", "lse2")
    return Kernel(
        prefill.prefill_kernel,
        {**dict.fromkeys(floats, "*fp32"), "pool": "*u8", "table": "*i32", "lengths": "*i32"},
        dict(
            M=prefill.block(8192, head_dim), D=head_dim, K_BITS=k, V_BITS=v, K_BYTES=f.value_offset,
            V_BYTES=f.scale_offset - f.value_offset, PAGE=PAGE, CAPPED=capped,
        ),
        {"cap": "fp32"}, options={"num_warps": prefill.WARPS, "num_stages": 1}, **more,
    )  # fmt: skip


def prefill_hopper_kernel(k: int, v: int, head_dim: int, capped: bool = False) -> Kernel:
    """`prefill_hopper.prefill_kernel` for `k` and `v` bits, with centres."""
    return Kernel(
        prefill_hopper.prefill_kernel,
        {
            "q": "*bf16", "out": "*bf16", "pool": "*u8",
            **dict.fromkeys(("k_signs", "v_signs", "k_centre", "v_centre", "powers", "lse"), "*fp32"),
            **dict.fromkeys(("table", "lengths", "folded", "k_table", "v_table", "flags"), "*i32"),
        },
        dict(
            D=head_dim, BITS=head_dim.bit_length() - 1, K=k, V=v, CAPPED=capped, ROTATE=(k < 8, v < 8), CENTRE=(k < 8, v < 8),
            **prefill_hopper.configuration(Format(head_dim, k, v)),
        ),
        {"factor": "fp32", "softcap": "fp32"}, ("stride_b", "stride_h", "stride_t"), {"num_warps": 4}, one("sm_90"), loop=True,
    )  # fmt: skip


def linear_hopper_kernel(bits: int, head_dim: int, centre: bool, rows: int = 4) -> Kernel:
    """`linear_hopper.linear_kernel` for keys of `bits` bits and as many query rows of a KV head, padded."""
    f = Format(head_dim, bits, bits)
    half = "*bf16" if bits == 16 else "*fp16"
    return Kernel(
        linear_hopper.linear_kernel,
        {
            **dict.fromkeys(("latent", "bias", "c", "centre", "out"), "*fp32"), **dict.fromkeys(("table", "lengths", "levels"), "*i32"),
            "basis": half, "pool": "*u8",
        },
        dict(
            D=head_dim, K=bits, R=rows, SCALES=f.scale_offset, NBYTES=f.nbytes, HALF=gl.bfloat16 if bits == 16 else gl.float16,
            CENTRE=centre,
        ),
        options={"num_warps": 4, "maxnreg": linear_hopper.REGISTERS}, targets=one("sm_90"),
    )  # fmt: skip


def hopper_kernel(k: int, v: int, head_dim: int, rows: int = 4) -> Kernel:
    """`hopper._decode` for `k` and `v` bits and as many query rows of a KV head, as `hopper.decode_pages` launches it."""
    f = Format(head_dim, k, v)
    return Kernel(
        hopper._decode,
        {
            "q_ptr": "*bf16", "pool_ptr": "*u8",
            **dict.fromkeys(("signs_ptr", "centre_ptr", "out_ptr", "lse_ptr"), "*fp32"),
            **dict.fromkeys(("table_ptr", "lengths_ptr", "cum_ptr", "k_table_ptr", "v_table_ptr"), "*i32"),
        },
        dict(
            D=head_dim, LOG2_D=head_dim.bit_length() - 1, K=k, V=v, R=hopper._padded(rows), BATCH=32, ROTATE=k < 8, CENTRE=False,
            SOFTCAP=False, HALF=gl.bfloat16, STAGES=hopper._stages(f),
        ),
        {"factor": "fp32", "softcap": "fp32"}, ("stride_b", "stride_h", "stride_t"),
        {"num_warps": 4, "maxnreg": hopper.occupancy(f, rows)[1]}, one("sm_90"), loop=True,
    )  # fmt: skip


def encode_hopper_kernel(k: int, v: int, head_dim: int) -> Kernel:
    """`encode_hopper.encode_kernel` for `k` and `v` bits of E4M3 codebooks, as `encode_hopper.launch` launches it."""
    f = Format(head_dim, k, v)
    key, value = (cells(PolarCodec(rotation(head_dim, 0, torch.device("cpu")), bits))[0] for bits in (k, v))
    return Kernel(
        encode_hopper.encode_kernel,
        {
            **dict.fromkeys(("k_ptr", "v_ptr", "k_matrix", "v_matrix"), "*bf16"), **dict.fromkeys(("k_shift", "v_shift"), "*fp32"),
            **dict.fromkeys(("k_table", "v_table", "table", "starts", "counts"), "*i32"), "pool": "*u8",
        },
        dict(
            D=head_dim, KEY=key, VALUE=value, VALUES_AT=f.value_offset, SCALES_AT=f.scale_offset, PAGE_BYTES=f.nbytes,
        ),
        aligned=("k_b", "k_h", "k_n", "v_b", "v_h", "v_n"),
        options={"num_warps": 4, "maxnreg": encode_hopper.REGISTERS[head_dim]}, targets=one("sm_90"),
    )  # fmt: skip


def constants(bits: int, head_dim: int) -> Book:
    """What is compiled in of a codec."""
    return Book(8) if bits == 8 else book(PolarCodec(rotation(head_dim, 0, torch.device("cpu")), bits))


ENCODE = {
    **dict.fromkeys(("k_ptr", "v_ptr", "k_matrix", "v_matrix"), "*bf16"), "k_shift": "*fp32", "v_shift": "*fp32", "pool": "*u8",
    **dict.fromkeys(("table", "starts", "counts"), "*i32"),
}  # fmt: skip


def encode_kernel(k: int, v: int, head_dim: int, tokens: int, machine: encode.Machine, target: str) -> Kernel:
    """`encode.encode_kernel` for `k` and `v` bits and as many bf16 tokens, as `encode.launch` launches it on `machine`."""
    f, how = Format(head_dim, k, v), encode.config(tokens, head_dim, torch.bfloat16, machine)
    return Kernel(
        encode.encode_kernel, ENCODE,
        dict(
            D=head_dim, KEY=constants(k, head_dim), VALUE=constants(v, head_dim), VALUES_AT=f.value_offset, SCALES_AT=f.scale_offset,
            PAGE_BYTES=f.nbytes, TILE=how.tile, SPAN=how.span, CHUNK=how.chunk, FRAGMENT=how.fragment, PRECISION="tf32x3",
        ),
        {}, ("k_b", "k_h", "k_n", "v_b", "v_h", "v_n"),
        {"num_warps": how.warps, "num_stages": 1} | ({} if how.registers is None else {"maxnreg": how.registers}), one(target),
    )  # fmt: skip


def step_kernel(k: int, v: int, head_dim: int, precision: str = "tf32x3", **more: Any) -> Kernel:
    """`encode_step.step_kernel` for `k` and `v` bits, for bf16 tokens."""
    f = Format(head_dim, k, v)
    return Kernel(
        encode_step.step_kernel, ENCODE,
        dict(
            D=head_dim, KEY=constants(k, head_dim), VALUE=constants(v, head_dim), VALUES_AT=f.value_offset, SCALES_AT=f.scale_offset,
            PAGE_BYTES=f.nbytes, PAIRS=encode_step.PAIRS, CHUNK=encode_step.chunk(head_dim, torch.bfloat16), PRECISION=precision,
        ),
        {}, ("k_b", "k_h", "k_n", "v_b", "v_h", "v_n"), {"num_warps": encode_step.WARPS, "num_stages": 1}, **more,
    )  # fmt: skip


def lowrank_kernel(rank: int, tile: lowrank_hopper.Tile, exact: bool, head_dim: int = 128) -> Kernel:
    """`lowrank_hopper.lowrank_kernel` for 32 heads, as `lowrank_hopper.attend` launches it."""
    group, columns, padded, places = lowrank_hopper.shape(32, head_dim, rank, tile)
    return Kernel(
        lowrank_hopper.lowrank_kernel,
        {
            **dict.fromkeys(("q", "residual", "keys", "values"), "*bf16"), **dict.fromkeys(("offsets", "lengths"), "*i32"),
            **dict.fromkeys(("cos", "sin"), "*fp16" if exact else "*fp32"), **dict.fromkeys(("out", "lse2"), "*fp32"),
        },
        dict(
            M=lowrank_hopper.ROWS, D=head_dim, R=rank, G=group, W=head_dim + 32 * rank, COLUMNS=columns, PADDED=padded, P=places,
            TOKENS=tile.tokens, EXACT=exact, STAGES=tile.stages,
        ),
        {"scale": "fp32"}, ("keys_b", "values_b", "heads"), {"num_warps": tile.warps}, one("sm_90"), loop=True,
    )  # fmt: skip


def merge_kernel(block: int, num_warps: int, **more: Any) -> Kernel:
    """`merge._merge` of all that can be merged."""
    floats = ("body_ptr", "body_lse_ptr", "signs_ptr", "centre_ptr", "exact_ptr", "exact_lse_ptr")
    return Kernel(
        merge._merge,
        {**dict.fromkeys(floats, "*fp32"), "cum_ptr": "*i32", "sink_ptr": "*bf16", "out_ptr": "*bf16"},
        dict(D=128, LOG2_D=7, BLOCK=block, **dict.fromkeys(("BODY", "ROTATE", "CENTRE", "EXACT", "SINK"), True)),
        options={"num_warps": num_warps},
        **more,
    )


def project_kernel() -> Kernel:
    """`rotate._project` with rotation and centre."""
    return Kernel(
        rotate._project,
        {"q_ptr": "*bf16", **dict.fromkeys(("signs_ptr", "centre_ptr", "out_ptr", "bias_ptr"), "*fp32")},
        dict(D=128, LOG2_D=7, ROWS=4, ROTATE=True, CENTRE=True),
        {"factor": "fp32"}, ("stride_b", "stride_h", "stride_t"), {"num_warps": 4},
    )  # fmt: skip


def store_kernel() -> Kernel:
    """`plain.store_kernel`."""
    return Kernel(
        plain.store_kernel,
        {**dict.fromkeys(("k", "v", "pool"), "*bf16"), **dict.fromkeys(("table", "starts", "counts"), "*i32")},
        dict(D=128, PAGE=PAGE, BLOCK=plain.BLOCK),
        {}, tuple(f"{x}_{y}" for x in "kv" for y in "bhn"), {"num_warps": 4},
    )  # fmt: skip


def move_kernel(k: int, v: int, head_dim: int, ordered: bool = True, **more: Any) -> Kernel:
    """`move.move_kernel` for `k` and `v` bits."""
    f = Format(head_dim, k, v)
    return Kernel(
        move.move_kernel,
        {"pool": "*u8", **dict.fromkeys(("table", "keep", "counts"), "*i32")},
        dict(
            D=head_dim, K_BITS=k, V_BITS=v, VALUES_AT=f.value_offset, SCALES_AT=f.scale_offset, PAGE_BYTES=f.nbytes, PAGE=PAGE,
            SPAN=min(move.SPAN, head_dim), FEW=move.FEW if ordered else PAGE,
        ),
        **more,
    )  # fmt: skip


def linear_kernel(bits: int, head_dim: int, num_warps: int = linear.WARPS, **more: Any) -> Kernel:
    """`linear.linear_kernel` for keys of `bits` bits with a centre."""
    f = Format(head_dim, bits, bits)
    return Kernel(
        linear.linear_kernel,
        {
            **dict.fromkeys(("latent", "bias", "c", "centre", "out"), "*fp32"), **dict.fromkeys(("table", "lengths"), "*i32"),
            "basis": "*bf16" if bits == 16 else "*fp16", "levels": "*fp16" if bits == 4 else "*fp32", "pool": "*u8",
        },
        dict(
            D=head_dim, BITS=bits, SCALES_AT=f.scale_offset, PAGE_BYTES=f.nbytes, PAGE=PAGE, M=linear.ROWS,
            CHUNK=linear.CHUNK, CENTRE=True,
        ),
        options={"num_warps": num_warps, "num_stages": 1}, **more,
    )  # fmt: skip


def top_kernel(groups: int, block: int, num_warps: int, standardise: bool = True, ordered: bool = False, **more: Any) -> Kernel:
    """`top.top_kernel` for as many query heads of a KV head, padded."""
    return Kernel(
        top.top_kernel,
        {"raw": "*fp32", **dict.fromkeys(("lengths", "keys", "out"), "*i32")},
        dict(GROUPS=groups, STANDARDISE=standardise, ORDERED=ordered, BLOCK=block),
        {}, ("slots",), {"num_warps": num_warps}, **more,
    )  # fmt: skip


def one(target: str) -> dict[str, GPUTarget]:
    """That target alone."""
    return {target: EVERY[target]}


KERNELS = {
    "portable, 4 and 4 bits of 128": pages_kernel(4, 4, 128, targets=NVIDIA),
    "portable, 4 and 4 bits of 128, AMD": pages_kernel(4, 4, 128, num_warps=4, targets=one("gfx942")),
    "portable, 8 and 2 bits of 64, soft cap": pages_kernel(8, 2, 64, capped=True, targets=one("sm_80")),
    "portable, 3 and 4 bits of 256": pages_kernel(3, 4, 256, targets=one("sm_89")),
    "exact, bf16 of 128": exact_kernel("bf16", 128, "tf32", targets=NVIDIA),
    "exact, bf16 of 128, AMD": exact_kernel("bf16", 128, "ieee", targets=one("gfx942")),
    "exact, fp32 of 128": exact_kernel("fp32", 128, "tf32x3", targets=one("sm_80")),
    "prefill, 4 and 4 bits of 128": prefill_kernel(4, 4, 128, targets=EVERY),
    "prefill, 3 and 4 bits of 256, soft cap": prefill_kernel(3, 4, 256, capped=True, targets=one("sm_80")),
    "prefill on Hopper, 4 and 4 bits of 128": prefill_hopper_kernel(4, 4, 128),
    "prefill on Hopper, 3 and 2 bits of 128, soft cap": prefill_hopper_kernel(3, 2, 128, capped=True),
    "prefill on Hopper, 8 and 8 bits of 256": prefill_hopper_kernel(8, 8, 256),
    "encode on Hopper, 4 and 4 bits of 128": encode_hopper_kernel(4, 4, 128),
    "Hopper, 4 and 4 bits of 128": hopper_kernel(4, 4, 128),
    "Hopper, 3 and 3 bits of 128": hopper_kernel(3, 3, 128),
    "Hopper, 2 and 2 bits of 128": hopper_kernel(2, 2, 128),
    "Hopper, 8 and 8 bits of 128": hopper_kernel(8, 8, 128),
    "Hopper, 16 and 16 bits of 128": hopper_kernel(16, 16, 128),
    "Hopper, 4 and 4 bits of 64": hopper_kernel(4, 4, 64),
    "Hopper, 4 and 4 bits of 256": hopper_kernel(4, 4, 256),
    "Hopper, 4 and 4 bits of 128, 16 rows": hopper_kernel(4, 4, 128, rows=16),
    "encode, a prompt, 4 and 4 bits of 128": encode_kernel(4, 4, 128, 8192, encode.Machine(227 * 1024, "wgmma"), "sm_90"),
    "encode, a prompt, 8 and 8 bits of 128": encode_kernel(8, 8, 128, 8192, encode.Machine(227 * 1024, "wgmma"), "sm_90"),
    "encode, ten tokens, 3 and 2 bits of 128": encode_kernel(3, 2, 128, 10, encode.Machine(227 * 1024, "wgmma"), "sm_90"),
    "encode, a token, 4 and 4 bits of 128": step_kernel(4, 4, 128, targets=NVIDIA),
    "encode, a token, 4 and 4 bits of 128, AMD": step_kernel(4, 4, 128, "ieee", targets=one("gfx942")),
    "encode, a token, 3 and 8 bits of 256": step_kernel(3, 8, 256, targets=one("sm_89")),
    "encode, a prompt, 4 and 4 bits of 128, Ada": encode_kernel(4, 4, 128, 8192, encode.Machine(99 * 1024, "mma"), "sm_89"),
    "encode, a prompt, 4 and 4 bits of 128, AMD": encode_kernel(4, 4, 128, 8192, encode.Machine(64 * 1024, "mfma"), "gfx942"),
    "merge, few programs": merge_kernel(4, 1, targets=one("sm_90")),
    "merge, many programs": merge_kernel(64, 4),
    "project": project_kernel(),
    "store": store_kernel(),
    "move, 4 and 4 bits of 128": move_kernel(4, 4, 128),
    "move, 4 and 4 bits of 128, no order": move_kernel(4, 4, 128, ordered=False),
    "move, 3 and 3 bits of 128": move_kernel(3, 3, 128, targets=one("sm_90")),
    "move, 16 and 16 bits of 256": move_kernel(16, 16, 256, targets=one("sm_90")),
    "linear, 4 bits of 128": linear_kernel(4, 128, targets=NVIDIA),
    "linear, 4 bits of 128, AMD": linear_kernel(4, 128, num_warps=4, targets=one("gfx942")),
    "linear, 3 bits of 256": linear_kernel(3, 256, targets=one("sm_89")),
    "linear, 4 bits of 64": linear_kernel(4, 64, targets=one("sm_90")),
    "linear, 8 bits of 256": linear_kernel(8, 256, targets=one("sm_90")),
    "linear, 16 bits of 128": linear_kernel(16, 128, targets=one("sm_90")),
    "linear, 16 bits of 256": linear_kernel(16, 256, targets=one("sm_90")),
    "linear on Hopper, 4 bits of 128": linear_hopper_kernel(4, 128, False),
    "linear on Hopper, 3 bits of 128, 16 query heads": linear_hopper_kernel(3, 128, True, 16),
    "linear on Hopper, 8 bits of 64": linear_hopper_kernel(8, 64, True),
    "linear on Hopper, 16 bits of 128": linear_hopper_kernel(16, 128, False),
    **{f"low rank of {rank}": lowrank_kernel(rank, lowrank_hopper.NOPE, False) for rank in (56, 60, 64)},
    "low rank of 60, exact": lowrank_kernel(60, lowrank_hopper.EXACT, True),
    "low rank of 64, exact, heads of 256": lowrank_kernel(64, lowrank_hopper.EXACT, True, 256),
    "top, 4 query heads": top_kernel(4, *top.SHORT),
    "top, 16 query heads": top_kernel(16, *top.SHORT, targets=one("sm_90")),
    "top, long rows of scores": top_kernel(1, *top.LONG, standardise=False, ordered=True, targets=NVIDIA),
}


if __name__ == "__main__":
    print(
        json.dumps({name: {t: resources(k.compile(x), k.loop) for t, x in k.targets.items()} for name, k in KERNELS.items()}, indent=1)
    )
