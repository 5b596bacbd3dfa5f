"""What every codec owes: bytes as declared, zeros, no NaN, the identities of latent space, records that do not know each other."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvstack.codecs import Codec, Context, Exact, Fp8, Kivi, MinMax, Polar, Precision, Side, TurboQuant, TurboQuant4bitNC
from kvstack.errors import BadInputError, RecipeError

torch.set_num_threads(1)

CPU = torch.device("cpu")
HEAD_DIMS = [64, 80, 96, 128, 256]
B, H, N = 2, 3, 32

EXACT = [Exact(), Exact("bf16"), Exact("fp16")]
CODED = [
    Fp8(),
    Polar(1, 5),
    Polar(2, 3),
    Polar(4, 4),
    Polar(4, 2, scale="unbiased"),
    Polar(4, 3, scale="plain", search=True),
    Polar(3, 5, scale="plain", codebook="exact", seed=7),
    MinMax(),
    MinMax(3),
    MinMax(8),
    Kivi(group=16),
    Kivi(4, group=8),
    TurboQuant(),
    TurboQuant(2, sketch="orthogonal"),
    TurboQuant4bitNC(),
]
CENTRED = [Polar(centre=True), Polar(2, 2, scale="unbiased", centre=True)]

every_head_dim = pytest.mark.parametrize("head_dim", HEAD_DIMS)
both_sides = pytest.mark.parametrize("side", ["key", "value"])


def every(precisions: list[Precision]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("precision", precisions, ids=repr)


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def build(precision: Precision, side: Side, head_dim: int, dtype: torch.dtype = torch.float32) -> Codec:
    return precision.build(side, Context(head_dim, H, dtype, CPU, centre=gaussian(H, head_dim, seed=9)))


@every(EXACT + CODED + CENTRED)
@every_head_dim
@both_sides
def test_bytes_are_as_declared(precision: Precision, side: Side, head_dim: int) -> None:
    codec = build(precision, side, head_dim)
    codes = codec.encode(gaussian(B, H, N, head_dim))
    for code, field in zip(codes, codec.fields, strict=True):
        assert code.dtype == field.dtype and code.shape == (B, H, N // codec.block, *field.shape)
        assert code.is_contiguous()
    assert sum(c.nbytes for c in codes) == B * H * N * codec.bytes_per_token
    assert codec.decode(codes).shape == (B, H, N, head_dim) and codec.decode(codes).dtype == torch.float32


@pytest.mark.parametrize(
    ("precision", "key", "value"),
    [
        (Exact("bf16"), 256, 256),
        (Fp8(), 130, 130),
        (Polar(4, 2), 66, 34),
        (Polar(5, 3), 82, 50),
        (MinMax(), 68, 68),
        (Kivi(), 32 + 4 * 128 / 32, 32 + 4 * 128 / 32),
        (TurboQuant(4), 68, 68),
        (TurboQuant4bitNC(), 66, 68),
    ],
    ids=repr,
)
def test_bytes_at_128(precision: Precision, key: float, value: float) -> None:
    assert build(precision, "key", 128).bytes_per_token == key
    assert build(precision, "value", 128).bytes_per_token == value


@every(EXACT + CODED)
@every_head_dim
@both_sides
def test_zeros_stay_zeros(precision: Precision, side: Side, head_dim: int) -> None:
    codec = build(precision, side, head_dim)
    assert not codec.decode(codec.encode(torch.zeros(B, H, N, head_dim))).any()


@every(EXACT + CODED + CENTRED)
@both_sides
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_nan_and_inf_are_refused(precision: Precision, side: Side, bad: float) -> None:
    x = gaussian(B, H, N, 64)
    x[1, 2, 3, 4] = bad
    with pytest.raises(BadInputError, match=r"NaN or Inf.*bfloat16"):
        build(precision, side, 64).encode(x)


@every(EXACT + CODED + CENTRED)
@every_head_dim
@both_sides
def test_attention_in_latent_space_is_attention(precision: Precision, side: Side, head_dim: int) -> None:
    codec = build(precision, side, head_dim)
    codes = codec.encode(3 * gaussian(B, H, N, head_dim) + 1)
    x, latent, q = codec.decode(codes), codec.latent(codes), gaussian(B, H, 5, head_dim, seed=1)
    assert codec.project(q).shape[-1] == latent.shape[-1] and latent.dtype == torch.float32
    logits = codec.project(q) @ latent.mT
    if codec.centre is not None:
        logits = logits + (q * codec.centre[:, None]).sum(-1, keepdim=True)
    assert torch.allclose(logits, q @ x.mT, atol=2e-3)
    p = gaussian(B, H, 5, N, seed=2).softmax(-1)
    assert torch.allclose(codec.unproject(p @ latent), p @ x, atol=2e-4)


@every(EXACT + CODED + CENTRED)
@both_sides
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_any_float_dtype(precision: Precision, side: Side, dtype: torch.dtype) -> None:
    codec, x = build(precision, side, 64), gaussian(B, H, N, 64).to(dtype)
    for a, b in zip(codec.encode(x), codec.encode(x.float()), strict=True):
        assert torch.equal(a.view(torch.uint8), b.view(torch.uint8))


@every(EXACT + CODED + CENTRED)
@both_sides
def test_a_record_depends_on_its_own_block_only(precision: Precision, side: Side) -> None:
    codec, x = build(precision, side, 96), gaussian(B, H, 4 * N, 96)
    whole = codec.encode(x)
    parts = [codec.encode(x[:, :, i : i + codec.block]) for i in range(0, 4 * N, codec.block)]
    for i, code in enumerate(whole):
        joined = torch.cat([p[i] for p in parts], 2)
        if codec.transform is None:
            assert torch.equal(joined.view(torch.uint8), code.view(torch.uint8))
        else:  # the matrix product of another batch size may round differently
            assert (joined.float() != code.float()).float().mean() < 1e-3


@every(CODED)
@both_sides
@settings(max_examples=10, deadline=None)
@given(exponent=st.integers(-100, 100), seed=st.integers(0, 1000))
def test_distortion_does_not_depend_on_the_norm(precision: Precision, side: Side, exponent: int, seed: int) -> None:
    codec, x = build(precision, side, 64), gaussian(1, H, 16, 64, seed=seed)
    assert torch.equal(codec.decode(codec.encode(x * 2.0**exponent)), codec.decode(codec.encode(x)) * 2.0**exponent)


@every(CODED)
@every_head_dim
@both_sides
def test_structured_vectors_stay_finite(precision: Precision, side: Side, head_dim: int) -> None:
    codec, eye = build(precision, side, head_dim), torch.eye(head_dim)
    x = torch.cat([eye[:N], -eye[:N], torch.ones(N, head_dim), gaussian(N, head_dim) * (1 + 999 * eye[5])])
    x_hat = codec.decode(codec.encode(x.expand(1, H, -1, -1)))
    error = ((x - x_hat).square().sum(-1) / x.square().sum(-1)).mean()
    coarsest = 1.6 if isinstance(precision, TurboQuant) or precision == Polar(1, 5) else 0.5
    assert error < coarsest


@every(EXACT + CODED + CENTRED)
@both_sides
def test_no_tokens_are_no_tokens(precision: Precision, side: Side) -> None:
    codec = build(precision, side, 64)
    assert codec.decode(codec.encode(torch.empty(B, H, 0, 64))).shape == (B, H, 0, 64)


@every([Polar(), MinMax(), TurboQuant(), TurboQuant4bitNC(), Kivi(group=5)])
@both_sides
def test_odd_head_sizes_are_refused(precision: Precision, side: Side) -> None:
    with pytest.raises(RecipeError, match="100 is no multiple of 8"):
        build(precision, side, 100)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_exact_is_lossless(dtype: torch.dtype) -> None:
    x = gaussian(B, H, N, 64).to(dtype)
    codec = build(Exact(), "key", 64, dtype)
    assert torch.equal(codec.encode(x)[0], x) and torch.equal(codec.decode(codec.encode(x)), x.float())


def test_fp16_refuses_what_it_cannot_hold() -> None:
    with pytest.raises(BadInputError, match=r"beyond the range of torch\.float16: use `bf16`"):
        build(Exact("fp16"), "key", 64).encode(torch.full((1, H, 1, 64), 1e5))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Exact("fp61"), "`dtype` cannot be 'fp61'. Give one of model, bf16, fp16"),
        (lambda: Polar(k=0), "`k` cannot be 0. Give a whole number from 1 to 5"),
        (lambda: Polar(v=6), "`v` cannot be 6. Give a whole number from 1 to 5"),
        (lambda: Polar(k=True), "`k` cannot be True"),
        (lambda: Polar(scale="best"), "`scale` cannot be 'best'. Give one of matched, plain, unbiased"),
        (lambda: Polar(codebook="fp4"), "`codebook` cannot be 'fp4'"),
        (lambda: Polar(seed=-1), "`seed` cannot be -1"),
        (lambda: Polar(seed=2**32), "`seed` cannot be 4294967296"),
        (lambda: MinMax(1), "`bits` cannot be 1. Give a whole number from 2 to 8"),
        (lambda: Kivi(9), "`bits` cannot be 9"),
        (lambda: Kivi(group=1), "`group` cannot be 1"),
        (lambda: Kivi(group=32).build("key", Context(80, 1, torch.float32, CPU)), "32 does not divide the head size 80"),
        (lambda: TurboQuant(1), "`bits` cannot be 1. Give a whole number from 2 to 5"),
        (lambda: TurboQuant(sketch="sparse"), "`sketch` cannot be 'sparse'"),
        (lambda: TurboQuant(seed=2**32), "`seed` cannot be"),
        (lambda: Polar(centre=True).build("key", Context(64, 1, torch.float32, CPU)), "needs a profile.*kvstack.calibrate.calibrate"),
    ],
)
def test_refused(make: object, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        make()  # type: ignore[operator]
