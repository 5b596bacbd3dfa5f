"""Muon against torch's and against what orthogonal means, and which parameters it gets."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from kvstack.attention import DecoderForCausalLM, words
from kvstack.lab.optim import ADAMW, MUON, Muon, head_updates, optimizers, orthogonalised, schedule
from kvstack.lab.pretrain import small

torch.set_num_threads(1)
ATTENTIONS = (
    "mha", "gqa(kv_heads=2)", "mqa", "mla(latent=24, rope=8)", "lrkv(rank=3)", "lrkv(rank=3, variant=nope)", "csa(4, 4, 8, 8, 2, 8)",
    "hca(4, 8, 8)",
)  # fmt: skip
SHAPES = [(24, 8), (24, 8), (8, 24), (16, 16)]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def trained(params: list[nn.Parameter], opt: torch.optim.Optimizer, steps: int = 8) -> None:
    """Steps with gradients that the step and the parameter's place decide."""
    for step in range(steps):
        for i, p in enumerate(params):
            p.grad = random(*p.shape, seed=100 * step + i)
        opt.step()


def test_muon_is_that_of_torch() -> None:
    ours, theirs = ([nn.Parameter(random(*shape, seed=i)) for i, shape in enumerate(SHAPES)] for _ in range(2))
    trained(ours, Muon(ours, lr=0.02, scale="rms"))
    trained(theirs, torch.optim.Muon(theirs, lr=0.02, adjust_lr_fn="match_rms_adamw"))
    for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        start = random(*a.shape, seed=i)
        assert (a - b).norm() < 0.015 * (b - start).norm(), "sums in bfloat16, in another order, round differently"


@pytest.mark.parametrize("shape", [(3, 16, 48), (2, 48, 16), (1, 64, 40), (2, 96, 4), (1, 1, 7)])
def test_singular_values_become_about_one_and_vectors_stay(shape: tuple[int, int, int]) -> None:
    x = random(*shape)
    u, _, v = torch.linalg.svd(x, full_matrices=False)
    y = orthogonalised(1e-4 * x).float()
    found = torch.linalg.svdvals(y)
    assert found.min() > 0.6 and found.max() < 1.3
    inside = u.mT @ y @ v.mT  # diagonal, where left and right vectors are those of x
    off = inside - torch.diag_embed(inside.diagonal(dim1=-2, dim2=-1))
    assert off.norm() < 0.03 * inside.norm()
    assert not orthogonalised(torch.zeros(shape)).any(), "no gradient, no update, and no NaN"


def test_scales_are_what_their_papers_say() -> None:
    for shape in {(24, 8), (8, 24), (16, 16)}:
        p, q = (nn.Parameter(torch.zeros(shape)) for _ in range(2))
        for param, scale in ((p, "rms"), (q, "spectral")):
            param.grad = random(*shape)
            Muon([param], lr=1.0, scale=scale).step()
        # AdamW's updates have entries of about 0.2 (arXiv:2502.16982, section 2.2).
        assert p.square().mean().sqrt().item() == pytest.approx(0.2, rel=0.3)
        assert torch.linalg.matrix_norm(q, 2).item() == pytest.approx((shape[0] / shape[1]) ** 0.5, rel=0.3)


@pytest.mark.parametrize("shape", [(24, 8), (8, 24), (64, 3)])
def test_heads_are_orthogonalised_one_by_one(shape: tuple[int, int]) -> None:
    """One head's gradient is a thousand times another's; of the whole it would be all of the update."""
    p, q = (nn.Parameter(torch.zeros(shape)) for _ in range(2))
    gradient = random(*shape).unflatten(0, (4, -1)) * torch.tensor([1e3, 1.0, 1.0, 1.0])[:, None, None]
    p.grad, q.grad = gradient.flatten(0, 1), random(*shape)
    Muon([p], lr=1.0, scale="spectral", updates={p: (4, 0.5)}).step()
    Muon([q], lr=1.0, scale="spectral").step()
    heads = p.detach().unflatten(0, (4, -1))
    norms = torch.linalg.matrix_norm(heads)
    assert norms.max() < 1.4 * norms.min(), "heads move alike"
    assert torch.linalg.svdvals(heads).min() > 0.4 * torch.linalg.svdvals(heads).max()
    assert p.norm().item() == pytest.approx(0.5 * q.norm().item(), rel=0.2), "half as far as the whole"


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_attentions_say_how_their_heads_move(attention: str) -> None:
    model = DecoderForCausalLM(replace(small(), attention=words.read(attention)).model())
    said, names = head_updates(model), {p: n for n, p in model.named_parameters()}
    assert {p for p, n in names.items() if n.endswith("self_attn.q_proj.weight")} <= said.keys(), "queries always have heads"
    assert all(p.shape[0] % heads == 0 and names[p].split(".")[-2] != "o_proj" for p, (heads, _) in said.items())
    muons = [optimizers(model, MUON, 0.1, 0.1, per_head=per_head)[0] for per_head in (True, False)]
    assert [m.updates for m in muons if isinstance(m, Muon)] == [said, {}]


class Toy(nn.Module):
    """Names and shapes as the decoder has them, and a residual of rank 0."""

    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens, self.norm, self.k_down = nn.Embedding(9, 4), nn.LayerNorm(4, bias=False), nn.Linear(4, 6, bias=False)
        self.k_up, self.lm_head = nn.Linear(0, 6, bias=False), nn.Linear(4, 9, bias=False)


@pytest.mark.parametrize("name", [MUON, ADAMW])
def test_matrices_are_apart_from_the_rest(name: str) -> None:
    model = Toy()
    opts = optimizers(model, name, matrix_lr=0.5, other_lr=0.25)
    names = {id(p): n for n, p in model.named_parameters()}
    matrices, others = ([names[id(p)] for p in opt.param_groups[0]["params"]] for opt in opts)
    assert matrices == ["k_down.weight"]
    assert others == ["embed_tokens.weight", "norm.weight", "lm_head.weight"], "an empty matrix has nothing to learn"
    assert isinstance(opts[0], Muon) == (name == MUON)
    assert [opt.param_groups[0]["weight_decay"] for opt in opts] == [0.1, 0.0]
    for factor in (0.5, 0.1):  # of the peak, not of what was last
        schedule(opts, factor)
        assert [opt.param_groups[0]["lr"] for opt in opts] == pytest.approx([0.5 * factor, 0.25 * factor])
