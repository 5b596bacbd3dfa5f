"""What a kernel that Triton has compiled takes of a GPU, read off its machine code; and barriers whose memory others would get."""

import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from triton import knobs


def resources(kernel: Any, loop: bool = False) -> dict[str, int | str]:
    """What a compiled kernel takes. loop: look at its innermost loop, too."""
    assert not (lone := lone_barriers(kernel.asm["ttgir"], kernel.asm.get("ptx", ""))), f"others get the memory of the barriers {lone}"
    if "cubin" in kernel.asm:
        text = _of_cubin(kernel, knobs.nvidia.cuobjdump.path, "-res-usage")
        registers, (stack, local) = _number(r"REG:(\d+)", text), (_number(rf"{x}:(\d+)", text) for x in ("STACK", "LOCAL"))
        spills = stack + local
    else:
        text = kernel.asm["amdgcn"]
        registers = _number(r"\.vgpr_count:\s+(\d+)", text)
        spills = sum(_number(rf"\.{x}gpr_spill_count:\s+(\d+)", text) for x in "sv")
    found = {"registers": registers, "spills": spills, "shared": kernel.metadata.shared}
    return {**found, **innermost(_of_cubin(kernel, knobs.nvidia.nvdisasm.path, "-c"))} if loop else found


def lone_barriers(ttgir: str, ptx: str) -> set[str]:
    """Barriers in shared memory that are neither ended nor handed to groups of warps. The compiler gives their memory to others, and
    the hardware writes them back there when it switches from one process to another."""
    of = dict(re.findall(r"(%\w+) = ttg\.memdesc_index (%\w+)\[", ttgir))
    handed = re.findall(r"%\w+", "".join(re.findall(r"ttg\.warp_specialize\(([^)]*)\)", ttgir)))
    made, ended = (re.findall(rf"ttng\.{what}_barrier (%\w+)", ttgir) for what in ("init", "inval"))
    assert len(made) == ptx.count("mbarrier.init"), "barriers are written in another way; look for them anew"
    return {of.get(x, x) for x in made} - {of.get(x, x) for x in (*handed, *ended)}


def innermost(sass: str) -> dict[str, int | str]:
    """The matrix instructions and the number of instructions of the shortest loop that has such instructions."""
    code: list[str] = []
    labels: dict[str, int] = {}
    loops = []
    for line in sass.splitlines():
        if label := re.match(r"(\.L_x_\d+):", line):
            labels[label[1]] = len(code)
        elif instruction := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\S+\s+)?(\S.*);", line):
            code.append(instruction[1])
            back = re.match(r"BRA.*`\((\.L_x_\d+)\)", code[-1])
            if back and back[1] in labels:
                loops.append(code[labels[back[1]] :])
    kinds, length = min(
        (({op.split()[0] for op in body if re.match(r"[HQI]G?MMA", op)}, len(body)) for body in loops), key=lambda x: (not x[0], x[1])
    )
    return {"mma": ", ".join(sorted(kinds)), "loop": length}


def _of_cubin(kernel: Any, tool: str, option: str) -> str:
    """What one of NVIDIA's tools says of a compiled kernel."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(kernel.asm["cubin"])
        return subprocess.run([tool, option, path], capture_output=True, text=True, check=True).stdout


def _number(pattern: str, text: str) -> int:
    match = re.search(pattern, text)
    assert match is not None, f"no {pattern} in {text}"
    return int(match[1])
