"""Compile every kernel ahead of time, for GPUs that need not be there, and print what it takes: `python tests/kernels/ahead.py`.

It prints one JSON object, {kernel: {target: {"registers": ..., "spills": ..., "shared": ...}}}, which is the form of `budgets.json`:
registers of a thread, its bytes (NVIDIA) or registers (AMD) that do not fit, bytes of shared memory of a program. It is a process of
its own, because a process that interprets kernels cannot compile them. A new kernel is one row of `KERNELS` and one of the budgets.
"""

import json
import re
import subprocess
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource

from kvstack.kernels import exact, portable, prefill, prefill_hopper
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
    """`prefill_hopper.prefill_kernel` for `k` and `v` bits."""
    return Kernel(
        prefill_hopper.prefill_kernel,
        {
            **dict.fromkeys(("q", "bias", "powers", "out", "lse2"), "*fp32"), "pool": "*u8",
            **dict.fromkeys(("table", "lengths", "folded", "k_table", "v_table"), "*i32"),
        },
        dict(D=head_dim, K=k, V=v, CAPPED=capped, **prefill_hopper.configuration(Format(head_dim, k, v))),
        {"softcap": "fp32"}, options={"num_warps": 4}, targets=one("sm_90"),
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
}


def resources(kernel: Any) -> dict[str, int]:
    """What a compiled kernel takes."""
    if "cubin" in kernel.asm:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "kernel.cubin")
            path.write_bytes(kernel.asm["cubin"])
            text = subprocess.run([knobs.nvidia.cuobjdump.path, "-res-usage", path], capture_output=True, text=True, check=True).stdout
        registers, (stack, local) = _number(r"REG:(\d+)", text), (_number(rf"{x}:(\d+)", text) for x in ("STACK", "LOCAL"))
        spills = stack + local
    else:
        text = kernel.asm["amdgcn"]
        registers = _number(r"\.vgpr_count:\s+(\d+)", text)
        spills = sum(_number(rf"\.{x}gpr_spill_count:\s+(\d+)", text) for x in "sv")
    return {"registers": registers, "spills": spills, "shared": kernel.metadata.shared}


def _number(pattern: str, text: str) -> int:
    match = re.search(pattern, text)
    assert match is not None, f"no {pattern} in {text}"
    return int(match[1])


if __name__ == "__main__":
    print(json.dumps({name: {t: resources(k.compile(x)) for t, x in k.targets.items()} for name, k in KERNELS.items()}, indent=1))
