"""Attention architectures, the axis of *what* is cached per token, and a decoder whose config chooses one."""

from kvstack.attention.config import DecoderConfig
from kvstack.attention.decoder import DecoderForCausalLM, DecoderModel

__all__ = ["DecoderConfig", "DecoderForCausalLM", "DecoderModel"]
