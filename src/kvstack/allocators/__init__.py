"""The allocation axis: scores and a budget in, what each token-head gets out. Pure torch, tensors in, tensors out.

topk     all or nothing: which tokens stay
"""

from kvstack.allocators.topk import indices, kept

__all__ = ["indices", "kept"]
