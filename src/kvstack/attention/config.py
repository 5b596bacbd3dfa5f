"""The config of the decoder: transformers' Llama, and which attention it has.

    mha, gqa, mqa   keys and values of `num_key_value_heads` heads: all, some, one
    mla             one latent of `latent_dim` for keys and values of all heads, and one key of `rope_dim` that carries position
    lrkv            one shared head, and per head a residual of `rank` numbers; `variant` says how position enters the residual
    csa, hca        one head, `pool` tokens an entry, beside a window of single tokens; csa reads the best `entries` of them, hca all

`qk_norm`: queries and keys of every head go through an RMS norm before RoPE, as in Qwen3. Of LRKV's keys that is the shared part, so
that the rest stays linear in what is cached. MLA, CSA and HCA have norms of their own.

It holds no defaults for sizes of a trained model; those are in `kvstack.lab`.
"""

from typing import Any

from transformers import LlamaConfig

from kvstack.errors import BadInputError

KINDS: tuple[str, ...] = ("mha", "gqa", "mqa", "mla", "lrkv", "csa", "hca")
VARIANTS = ("exact", "nope")
NORMED = ("mha", "gqa", "mqa", "lrkv")  # those that `qk_norm` is for


class DecoderConfig(LlamaConfig):  # type: ignore[misc]
    """See the module. Raises BadInputError for a kind that does not exist and for sizes that do not go together."""

    model_type = "kvstack"

    attention: str = "mha"
    qk_norm: bool = False
    rank: int = 0
    variant: str = "exact"
    latent_dim: int = 0
    rope_dim: int = 0
    pool: int = 0
    entries: int = 0
    window: int = 0
    index_heads: int = 0
    index_dim: int = 0

    def __post_init__(self, **kwargs: Any) -> None:
        """Fill in what the kind decides, and check what it asks for."""
        if self.attention not in KINDS:
            raise BadInputError(f"There is no attention {self.attention!r}. Choose one of {', '.join(KINDS)}.")
        if self.attention != "gqa":
            self.num_key_value_heads = self.num_attention_heads if self.attention == "mha" else 1
        super().__post_init__(**kwargs)
        self._check()

    def _check(self) -> None:
        half = self.head_dim // 2
        if self.qk_norm and self.attention not in NORMED:
            raise BadInputError(f"qk_norm is for {', '.join(NORMED)}; {self.attention} has norms of its own. Leave it away.")
        if self.attention == "gqa" and self.num_attention_heads % self.num_key_value_heads:
            raise BadInputError(
                f"{self.num_attention_heads} query heads do not share {self.num_key_value_heads} KV heads evenly. Give a divisor."
            )
        if self.attention == "lrkv" and not 0 <= self.rank <= self.head_dim:
            raise BadInputError(f"A residual of rank {self.rank} does not fit heads of {self.head_dim}. Give 0 to {self.head_dim}.")
        if self.attention == "lrkv" and self.variant not in VARIANTS:
            raise BadInputError(f"There is no LRKV variant {self.variant!r}. Choose one of {', '.join(VARIANTS)}.")
        if self.attention == "mla" and (self.latent_dim < 1 or self.rope_dim < 2 or half % (self.rope_dim // 2) or self.rope_dim % 2):
            raise BadInputError(
                f"MLA needs latent_dim and an even rope_dim that divides the head of {self.head_dim}; "
                f"they are {self.latent_dim} and {self.rope_dim}."
            )
        if self.attention in ("csa", "hca") and (self.pool < 1 or self.window < 1):
            raise BadInputError(f"{self.attention} needs pool and window; they are {self.pool} and {self.window}. Give at least 1.")
        if self.attention == "csa" and min(self.entries, self.index_heads, self.index_dim) < 1:
            raise BadInputError("csa needs entries, index_heads and index_dim. Give at least 1 of each.")

    @property
    def record_dim(self) -> int:
        """Size of what is cached as the key of one head: of LRKV a record, else a head."""
        return int(self.head_dim + (self.num_attention_heads * self.rank if self.attention == "lrkv" else 0))

    @property
    def rebuilds_keys(self) -> bool:
        """Whether logits are more than products of a query and what is cached as a key; no scorer and no kernel of keys serves then."""
        return self.attention == "mla" or (self.attention == "lrkv" and self.variant == "exact")

    @property
    def cache_numbers(self) -> float:
        """Numbers that a token adds to the cache of one layer. CSA and HCA: in the limit of long contexts."""
        d = self.head_dim
        if self.attention == "lrkv":
            return float(2 * self.record_dim)
        if self.attention == "mla":
            return float(self.latent_dim + self.rope_dim)
        if self.attention in ("csa", "hca"):
            return float(d + (self.index_dim if self.entries else 0)) / self.pool
        return float(2 * self.num_key_value_heads * d)
