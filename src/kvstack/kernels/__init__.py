"""Attention that reads codes. This version has the torch reference only; the compiled kernels will stand beside it."""
