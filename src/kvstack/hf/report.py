"""What a cache holds, tier by tier, as data and as a table of plain text."""

from dataclasses import dataclass


@dataclass(frozen=True)
class TierReport:
    """tokens: of all rows, in one layer. nbytes: measured, all layers."""

    name: str
    tokens: int
    nbytes: int


@dataclass(frozen=True)
class Report:
    """nbytes: all that is held. bf16_nbytes: what the same tokens take in bf16."""

    recipe: str
    tiers: tuple[TierReport, ...]
    nbytes: int
    bf16_nbytes: int

    def __str__(self) -> str:
        ratio = f"ratio {self.bf16_nbytes / self.nbytes:.2f} to bf16" if self.nbytes and self.bf16_nbytes else "empty"
        lines = [f"{self.recipe}: {self.nbytes:,} bytes, {ratio}", f"{'':12}{'tokens':>12}{'bytes':>16}"]
        lines += [f"{t.name:12}{t.tokens or '-':>12}{t.nbytes:>16,}" for t in self.tiers]
        return "\n".join(lines)
