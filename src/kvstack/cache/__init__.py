"""The store: what is kept of every token of a layer, in tiers. It knows recipes and codecs, and no engine."""

from kvstack.cache.store import LayerStore, plan_bytes
from kvstack.cache.tier import Tier

__all__ = ["LayerStore", "Tier", "plan_bytes"]
