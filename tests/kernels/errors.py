"""Errors of the decode kernels against float64 on the same codes, up to a million tokens, as a results file:

python tests/kernels/errors.py results/error_h200.json

{N, Hq, Hkv, D, bits, error}    error: RMS of the difference over RMS of the output, of random queries and random codes
"""

import sys
from dataclasses import replace

import torch

from kvstack.bench import own
from kvstack.bench.problem import Problem
from kvstack.environment import write_results

TOKENS = (1 << 12, 1 << 14, 1 << 17, 1 << 20)
WIDTHS = {64: "4", 128: "4, 3, 2, k4v2, 8, 16", 256: "4"}


def main(path: str) -> None:
    torch.manual_seed(0)
    rows = []
    for d, bits in WIDTHS.items():
        for n in TOKENS:
            p = Problem((n,), heads=8, kv_heads=2, head_dim=d)
            for c in own.contenders(bits, d):
                error = replace(c, lengths=(n,)).error(p, torch.device("cuda"))
                rows.append({"N": n, "Hq": 8, "Hkv": 2, "D": d, "bits": c.bits, "error": error})
                print(rows[-1], flush=True)
    write_results(path, f"python tests/kernels/errors.py {path}", rows)


if __name__ == "__main__":
    main(sys.argv[1])
