"""The way into transformers: a cache and an attention function, both through its public interfaces. No mathematics here."""

from kvstack.hf.cache import Cache

__all__ = ["Cache"]
