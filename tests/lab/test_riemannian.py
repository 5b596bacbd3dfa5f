"""Least gradients against those they stand for, the nearest low-rank matrix against the SVD, and LRKV that learns as MHA does."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from kvstack.attention import DecoderForCausalLM, words
from kvstack.attention.equality import full_precision
from kvstack.lab.optim import MUON, Muon, Sum, head_sums, optimizers
from kvstack.lab.pretrain import TextLoss, small
from kvstack.lab.riemannian import _whitening, least_gradients, nearest

torch.set_num_threads(1)
N, H, D, WIDTH = 2, 4, 16, 48


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def factors(rank: int) -> tuple[Tensor, Tensor]:
    """Of every head: an orthonormal `up`, as steps leave it, and a `down`."""
    return torch.linalg.qr(random(N, H, D, rank))[0], random(N, H, rank, WIDTH, seed=1)


def error(a: Tensor, b: Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


@pytest.mark.parametrize("rank", [1, 3, 8, 16])
def test_least_gradients_explain_those_of_the_factors(rank: int) -> None:
    (up, down), gradient = factors(rank), random(N, H, D, WIDTH, seed=2)
    found = least_gradients(up, down, gradient @ down.mT, up.mT @ gradient, gradient.sum(1))
    assert error(found.sum(1), gradient.sum(1)) < 1e-5
    of_latents = gradient @ torch.linalg.pinv(down) @ down
    followed = of_latents + up @ up.mT @ (gradient - of_latents)
    share = (gradient - followed).mean(1, keepdim=True).expand_as(found)
    assert error(found, followed + share) < 1e-4, "what factors can follow, and of the rest the same for all heads"
    assert error(least_gradients(up, down, followed @ down.mT, up.mT @ followed, followed.sum(1)), followed) < 1e-4
    if rank == D:
        assert error(found, gradient) < 1e-4


@pytest.mark.parametrize("rank", [1, 3, 8, 16])
def test_the_nearest_matrix_is_that_of_the_svd(rank: int) -> None:
    up, down = factors(rank)
    moved = up @ down + 0.05 * random(N, H, D, WIDTH, seed=5)
    u, s, v = torch.linalg.svd(moved, full_matrices=False)
    best = u[..., :rank] * s[..., None, :rank] @ v[..., :rank, :]
    new_up, new_down = nearest(moved, up)
    assert error(new_up @ new_down, best) < 0.01
    assert torch.allclose(new_up.mT @ new_up, torch.eye(rank), atol=1e-3)
    assert error(new_up, up) < 0.2, "a basis turns little, so that means over time are of one basis"
    again = nearest(new_up @ new_down, new_up)
    assert error(again[0], new_up) < 1e-3 and error(again[0] @ again[1], new_up @ new_down) < 1e-4


def test_precision_is_full_only_inside() -> None:
    was = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        with pytest.raises(KeyError), full_precision():
            assert torch.get_float32_matmul_precision() == "highest"
            raise KeyError
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(was)


def test_nothing_is_divided_by_what_is_not_there() -> None:
    up, nothing = factors(3)[0], torch.zeros(N, H, 3, WIDTH)
    gradient = random(N, H, D, WIDTH, seed=2)
    followed = up @ (up.mT @ gradient)
    found = least_gradients(up, nothing, torch.zeros(N, H, D, 3), up.mT @ gradient, followed.sum(1))
    assert error(found, followed) < 1e-4, "without latents only they have a gradient"
    assert all(x.isfinite().all() for x in nearest(torch.zeros(N, H, D, WIDTH), up))


def test_a_factorisation_that_fails_is_seen() -> None:
    found = _whitening(torch.stack((torch.eye(3), torch.diag(torch.tensor([3.0, 3.0, -1.0])))))
    assert found[0].isfinite().all() and found[1].isnan().all()


def like(mha: DecoderForCausalLM, rank: int) -> DecoderForCausalLM:
    """LRKV of full rank with the weights of `mha`: the shared part is the mean head."""
    out = DecoderForCausalLM(replace(small(), attention={"attention": "lrkv", "rank": rank}).model())
    out.load_state_dict(mha.state_dict(), strict=False)
    with torch.no_grad():
        for new, old in zip(out.model.layers, mha.model.layers, strict=True):
            for name in "kv":
                heads = getattr(old.self_attn, f"{name}_proj").weight.unflatten(0, (4, -1))
                mean = heads.mean(0)
                up = torch.linalg.qr(random(4, 16, rank))[0]
                for part, x in (("shared", mean), ("up", up.flatten(0, 1)), ("down", (up.mT @ (heads - mean)).flatten(0, 1))):
                    getattr(new.self_attn, f"{name}_{part}").weight.copy_(x)
    return out


def losses(model: DecoderForCausalLM, per_head: bool = True) -> list[float]:
    x, out = torch.randint(5, 4000, (4, 65), generator=torch.Generator().manual_seed(0)), []
    opts = optimizers(model, MUON, 0.05, 3e-3, per_head=per_head)
    for _ in range(8):
        loss = TextLoss(model)(x)
        loss.backward()
        out.append(loss.item())
        for opt in opts:
            opt.step()
            opt.zero_grad()
    return out


def test_at_full_rank_lrkv_learns_as_mha_does() -> None:
    torch.manual_seed(0)
    mha = DecoderForCausalLM(small().model())
    ours, whole = like(mha, 16), like(mha, 16)
    wanted = losses(mha)
    assert wanted[0] - wanted[-1] > 1
    assert losses(ours) == pytest.approx(wanted, abs=5e-4), "sums in bfloat16 round differently"
    assert max(abs(a - b) for a, b in zip(losses(whole, per_head=False), wanted, strict=True)) > 2e-3, "which is no matter of course"


def whole(common: Tensor, up: Tensor, down: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The factors of heads, and the heads, whose shared part is `common`."""
    u, z = up.detach().unflatten(0, (H, D)), down.detach().unflatten(0, (H, 3))
    return u, z, common.detach() + u @ z


def test_heads_move_by_a_step_whatever_their_factors_are() -> None:
    """Factors of a hundredth and of a hundred times the size are the same heads, and move alike, also by what they remember."""
    displaced = []
    for size in (0.01, 1.0, 100.0):
        common, (up, down) = nn.Parameter(random(D, WIDTH, seed=6)), (nn.Parameter(x[0].flatten(0, 1)) for x in factors(3))
        with torch.no_grad():
            up.mul_(size)
            down.div_(size)
        opt = Muon([common, up, down], lr=0.1, scale="spectral", weight_decay=0.0, sums=[Sum(common, up, down, H)])
        for step in range(3):
            gradient, (u, z, before) = random(H, D, WIDTH, seed=20 + step), whole(common, up, down)
            up.grad, down.grad = (gradient @ z.mT).flatten(0, 1), (u.mT @ gradient).flatten(0, 1)
            common.grad = gradient.sum(0)
            opt.step()
            displaced.append(whole(common, up, down)[2] - before)
            if step == 0:
                assert ((displaced[-1] * gradient).sum((1, 2)) < 0).all(), "downhill"
    wanted = 0.1 * (H * D / WIDTH) ** 0.5 * (min(H * D, WIDTH) / (H * D)) ** 0.5
    for step in range(3):
        small_ones, plain, large_ones = displaced[step::3]
        assert error(small_ones, plain) < 0.03 and error(large_ones, plain) < 0.03
        assert 0.5 * wanted < torch.linalg.matrix_norm(plain, 2).max() < 1.5 * wanted


@pytest.mark.parametrize("attention", ["mha", "gqa(kv_heads=2)", "lrkv(rank=0)", "lrkv(rank=3)", "lrkv(rank=3, variant=nope)"])
def test_lrkv_says_which_parts_are_one_head(attention: str) -> None:
    model = DecoderForCausalLM(replace(small(), attention=words.read(attention)).model())
    sums, layers = head_sums(model), len(model.model.layers)
    # With RoPE on one part alone, keys are no sum of both.
    assert len(sums) == (0 if "rank=3" not in attention else layers if "nope" in attention else 2 * layers)
    for s in sums:
        assert s.up.shape == (s.heads * 16, 3) and s.down.shape == (s.heads * 3, 64)
        assert s.shared.shape == (16, 64)
    muons = [optimizers(model, MUON, 0.1, 0.1, per_head=per_head)[0] for per_head in (True, False)]
    assert [len(m.sums) for m in muons if isinstance(m, Muon)] == [len(sums), 0]
