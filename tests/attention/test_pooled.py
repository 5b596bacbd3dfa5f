"""CSA and HCA: against a slow reference, causality, decoding by steps and chunks, gradients, bytes, and what is refused."""

import copy
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from kvstack.attention.pooled import PooledAttention, top
from kvstack.attention.pooled_cache import PooledCache
from kvstack.errors import BadInputError, UnsupportedModelError

torch.set_num_threads(1)

CSA = dict(pool=4, entries=3, window=6, index_heads=2, index_dim=8, rope_dim=8)
HCA = dict(pool=8, entries=0, window=5, rope_dim=8)
KINDS = {
    "csa": CSA,
    "csa-all": CSA | dict(entries=99),
    "csa-one": CSA | dict(entries=1, window=1, index_heads=4),
    "hca": HCA,
    "hca-turned": HCA | dict(rope_dim=16, pool=3),
}
kinds = pytest.mark.parametrize("kind", KINDS)


class Config(hf.LlamaConfig):
    pool: int = 0
    entries: int = 0
    window: int = 0
    index_heads: int = 0
    index_dim: int = 0
    rope_dim: int = 0


def config(layers: int = 1, **fields: Any) -> Config:
    sizes = dict(vocab_size=32, hidden_size=24, intermediate_size=32, num_hidden_layers=layers, num_attention_heads=3, head_dim=16)
    return Config(**sizes, **fields)


def attention(dtype: torch.dtype = torch.float32, **fields: Any) -> PooledAttention:
    """One whose parameters are all of some size, and whose weights are not small."""
    torch.manual_seed(0)
    module = PooledAttention(config(**fields), 0).to(dtype)
    with torch.no_grad():
        for name, p in module.named_parameters():
            p.copy_(1 + 0.3 * torch.randn_like(p) if "norm" in name else torch.randn_like(p) * (1 if "bias" in name else 0.3))
    return module


def positions(module: PooledAttention, tokens: int, start: int = 0, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    return LlamaRotaryEmbedding(module.config)(torch.empty(0, dtype=dtype), torch.arange(start, start + tokens)[None])


def run(module: PooledAttention, x: Tensor, start: int = 0) -> Tensor:
    return module(x, positions(module, x.shape[1], start, x.dtype))[0]


def slow(module: PooledAttention, x: Tensor) -> Tensor:
    """Query by query and entry by entry, as the equations say; `x [T, d]`."""
    cfg = module.config
    cos, sin = (c[0] for c in positions(module, len(x), dtype=x.dtype))
    h, m, sparse = cfg.rope_dim // 2, cfg.pool, cfg.entries > 0

    def turned(v: Tensor, t: int, sign: int = 1) -> Tensor:
        z = torch.complex(v[..., -2 * h : -h], v[..., -h:]) * torch.complex(cos[t, :h], sign * sin[t, :h])
        return torch.cat([v[..., : -2 * h], z.real, z.imag], -1)

    def entry(compressor: Any, i: int) -> Tensor:
        kv, gate = compressor.kv_proj(x), compressor.gate_proj(x)
        c = kv.shape[1] // (2 if sparse else 1)
        rows = [(kv[m * i + j, :c], gate[m * i + j, :c] + compressor.bias[j, :c]) for j in range(m)]
        if sparse and i > 0:
            rows += [(kv[m * (i - 1) + j, c:], gate[m * (i - 1) + j, c:] + compressor.bias[j, c:]) for j in range(m)]
        weights = torch.stack([z for _, z in rows]).softmax(0)
        return turned(compressor.norm((weights * torch.stack([v for v, _ in rows])).sum(0)), i * m)

    out = []
    for t in range(len(x)):
        ids = list(range((t + 1) // m))
        gates = torch.zeros(len(ids), dtype=x.dtype)
        if sparse and ids:
            index = module.indexer
            q = turned(index.q_proj(x[t]).view(cfg.index_heads, cfg.index_dim), t)
            w = index.weights_proj(x[t])
            scale = (cfg.index_heads * cfg.index_dim) ** -0.5
            scores = torch.stack([(w * (q @ entry(index.compressor, i)).relu()).sum() * scale for i in ids])
            ids = sorted(ids, key=lambda i: (-scores[i].item(), i))[: cfg.entries]
            gates = scores.sigmoid().log()[ids]
        near = [turned(module.kv_norm(module.kv_proj(x[s])), s) for s in range(max(0, t - cfg.window + 1), t + 1)]
        both = torch.stack(near + [entry(module.compressor, i) for i in ids])
        q = module.q_proj(x[t]).view(cfg.num_attention_heads, -1)
        q = turned(q / (q.square().mean(-1, keepdim=True) + cfg.rms_norm_eps).sqrt(), t)
        weights = (q @ both.mT / cfg.head_dim**0.5 + torch.cat([gates.new_zeros(len(near)), gates])).exp()
        o = weights @ both / (weights.sum(-1) + module.sinks.exp())[:, None]
        out.append(module.o_proj(turned(o, t, -1).flatten()))
    return torch.stack(out)


@kinds
@torch.inference_mode()
def test_it_is_what_the_equations_say(kind: str) -> None:
    module = attention(torch.float64, **KINDS[kind])
    x = torch.randn(2, 29, 24, dtype=torch.float64)
    torch.testing.assert_close(run(module, x), torch.stack([slow(module, row) for row in x]), rtol=1e-6, atol=1e-6)


@kinds
@torch.inference_mode()
def test_no_token_changes_what_comes_before_it(kind: str) -> None:
    module, x = attention(**KINDS[kind]), torch.randn(1, 40, 24)
    plain = run(module, x)
    for t in range(40):
        changed = x.clone()
        changed[:, t] = 10 * torch.randn(24)
        found = run(module, changed)
        assert torch.equal(found[:, :t], plain[:, :t]) and not torch.allclose(found[:, t], plain[:, t])


@kinds
@torch.inference_mode()
def test_only_distances_count(kind: str) -> None:
    module, x = attention(**KINDS[kind]), torch.randn(1, 40, 24)
    torch.testing.assert_close(run(module, x, 100), run(module, x), rtol=1e-4, atol=1e-4)


@kinds
@pytest.mark.parametrize("chunks", [[1] * 40, [13, 1, 1, 1, 9, 2, 13], [40], [8, 16, 16], [39, 1]], ids=str)
@torch.inference_mode()
def test_decoding_in_chunks_is_the_full_forward(kind: str, chunks: list[int]) -> None:
    module, x, done, out = attention(**KINDS[kind]), torch.randn(2, 40, 24), 0, []
    cache = PooledCache(module.config)
    for n in chunks:
        assert cache.get_seq_length() == done
        out.append(module(x[:, done : done + n], positions(module, n, done), past_key_values=cache)[0])
        done += n
    torch.testing.assert_close(torch.cat(out, 1), run(module, x), rtol=1e-5, atol=1e-5)


@kinds
def test_every_parameter_learns(kind: str) -> None:
    module = attention(**KINDS[kind])
    run(module, torch.randn(2, 40, 24)).square().sum().backward()
    for name, p in module.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all() and p.grad.abs().amax() > 1e-6, name


def test_the_loss_of_the_attention_trains_the_indexer() -> None:
    """The student's indexer has to find the one window that the teacher's, set by hand, reads; all else is the teacher's and fixed."""
    student = attention(pool=4, entries=1, window=1, rope_dim=0, index_heads=4, index_dim=8)
    teacher = copy.deepcopy(student)
    with torch.no_grad():  # queries ask, by the constant coordinate 0, for tokens marked in coordinate 1 of their own window
        index = teacher.indexer
        for p in (index.compressor.gate_proj, index.compressor.kv_proj, index.q_proj, index.weights_proj):
            p.weight.zero_()
        index.compressor.bias.zero_()[:, 8:] = -50
        index.compressor.kv_proj.weight[0, 1], index.q_proj.weight[0, 0], index.weights_proj.weight[:, 0] = 1, 3, 1
    adam = torch.optim.Adam(student.indexer.parameters(), 1e-2)

    def batch(rows: int) -> tuple[Tensor, Tensor]:
        x, marked = torch.randn(rows, 64, 24), torch.randint(16, (rows,))
        x[..., 0], x[..., 1] = 1, 4 * (torch.arange(64) // 4 == marked[:, None])
        return x, marked

    @torch.no_grad()
    def found(module: PooledAttention) -> float:
        x, marked = batch(64)
        still = x.new_empty(64, 64, 0), x.new_empty(64, 64, 0)
        scores = module.indexer(x, *still, module.indexer.compressor(x, *still, None).entries)
        return (scores[:, -1].argmax(-1) == marked).float().mean().item()

    assert found(teacher) == 1 and found(student) < 0.3
    for _ in range(150):
        x, _ = batch(8)
        with torch.no_grad():
            target = run(teacher, x)
        adam.zero_grad()
        (run(student, x) - target).square().mean().backward()
        adam.step()
    assert found(student) > 0.8


@pytest.mark.parametrize("fields", [CSA, HCA], ids=["csa", "hca"])
@torch.inference_mode()
def test_even_gates_make_means(fields: dict[str, int]) -> None:
    module, x, m = attention(**fields).compressor, torch.randn(1, 24, 24), fields["pool"]
    module.gate_proj.weight.zero_(), module.bias.fill_(0.7)
    still = torch.ones(1, 24, 4), torch.zeros(1, 24, 4)
    windows = module.kv_proj(x).unflatten(1, (-1, m))
    if module.overlap:
        own, other = windows.chunk(2, -1)
        first, later = own[:, :1].mean(2), torch.cat([own[:, 1:], other[:, :-1]], 2).mean(2)
        mean = torch.cat([first, later], 1)
    else:
        mean = windows.mean(2)
    torch.testing.assert_close(module(x, *still, None).entries, module.norm(mean))


@torch.inference_mode()
def test_windows_of_one_token_are_records() -> None:
    """With pool 1 an entry is its token's record, so that entries alone make full attention."""
    module, x = attention(pool=1, entries=0, window=1, rope_dim=16), torch.randn(1, 20, 24)
    module.compressor.kv_proj, module.compressor.norm = module.kv_proj, module.kv_norm
    cache = PooledCache(module.config)
    module(x, positions(module, 20), past_key_values=cache)
    cos, sin = positions(module, 20)
    records = module.kv_norm(module.kv_proj(x))
    torch.testing.assert_close(cache.layers[0].main.entries, apply_rotary_pos_emb(records, records, cos, sin, 0)[0][0])


@torch.inference_mode()
def test_without_entries_it_is_multi_query_attention_in_a_sliding_window() -> None:
    module, x = attention(pool=99, entries=0, window=7, rope_dim=16), torch.randn(2, 30, 24)
    module.sinks.fill_(-torch.inf)
    cos, sin = positions(module, 30)
    q = F.rms_norm(module.q_proj(x).view(2, 30, 3, 16), (16,), eps=module.config.rms_norm_eps).transpose(1, 2)
    k = module.kv_norm(module.kv_proj(x))[:, None]
    q, k = apply_rotary_pos_emb(q, k, cos, sin)
    seen = torch.ones(30, 30, dtype=torch.bool).tril().triu(-6)
    o = F.scaled_dot_product_attention(q, k.expand_as(q), k.expand_as(q), seen)
    o, _ = apply_rotary_pos_emb(o, o, cos, -sin)
    torch.testing.assert_close(run(module, x), module.o_proj(o.transpose(1, 2).flatten(2)), rtol=1e-5, atol=1e-5)


@torch.inference_mode()
def test_a_large_sink_takes_all() -> None:
    module, x = attention(**HCA), torch.randn(1, 12, 24)
    module.sinks.fill_(50.0)
    assert run(module, x).abs().max() < 1e-12


def test_the_highest_scores_are_read_and_of_equal_ones_the_oldest() -> None:
    scores = torch.tensor([[[0.0, 3.0, 0.0, 1.0, 9.0]]])
    closed = torch.tensor([[True, True, True, True, False]])
    for k, read in ((1, [1]), (3, [0, 1, 3]), (4, [0, 1, 2, 3]), (9, [0, 1, 2, 3])):
        assert top(scores, closed, k)[0, 0].nonzero().flatten().tolist() == read


@kinds
@torch.inference_mode()
def test_bytes_are_those_of_the_formula(kind: str) -> None:
    fields, measured = KINDS[kind], {}
    module, m, sparse = attention(**fields), fields["pool"], fields["entries"] > 0
    sizes = [16, fields["index_dim"]] if sparse else [16]
    for n in (48, 53, 240):
        cache = PooledCache(module.config)
        module(torch.randn(2, n, 24), positions(module, n), past_key_values=cache)
        rows = sum(2 * c * (m + 2 * (n % m) if sparse else n % m) for c in sizes)  # kv and gate; stream b of the closed window
        start = len(sizes) * fields["rope_dim"] * (n % m > 0)
        values = (fields["window"] - 1) * 16 + (n // m) * sum(sizes) + rows + start
        assert cache.nbytes == 2 * 4 * values  # two rows, float32
        measured[n] = cache.nbytes / 8
    assert (measured[240] - measured[48]) / 192 == sum(sizes) / m  # a token


def model(kind: str) -> Any:
    torch.manual_seed(0)
    net = hf.LlamaForCausalLM(config(2, **KINDS[kind])).eval()
    for i, layer in enumerate(net.model.layers):
        layer.self_attn = PooledAttention(net.config, i)
        for p in layer.self_attn.parameters():
            nn.init.normal_(p, std=0.3)
    return net


@kinds
@torch.inference_mode()
def test_a_llama_with_it_generates(kind: str) -> None:
    net, ids = model(kind), torch.randint(3, 32, (2, 11))
    options = dict(max_new_tokens=20, do_sample=False, eos_token_id=None, pad_token_id=0)
    full = net.generate(ids, **options, use_cache=False)
    assert torch.equal(net.generate(ids, **options, past_key_values=PooledCache(net.config)), full)


@torch.inference_mode()
def test_rows_can_be_reordered_and_forgotten() -> None:
    net, ids, order = model("csa"), torch.randint(3, 32, (3, 13)), torch.tensor([2, 0, 0])
    cache = PooledCache(net.config)
    net(ids[:, :10], past_key_values=cache)
    cache.reorder_cache(order)
    end = net(ids[order][:, 10:], past_key_values=cache).logits
    torch.testing.assert_close(end, net(ids[order], use_cache=False).logits[:, 10:], rtol=1e-5, atol=1e-5)
    cache.reset()
    assert cache.nbytes == 0 and cache.get_seq_length() == 0
    torch.testing.assert_close(net(ids, past_key_values=cache).logits, net(ids, use_cache=False).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@torch.inference_mode()
def test_padding_on_the_right_is_taken_and_on_the_left_is_refused(implementation: str) -> None:
    net, ids = model("csa"), torch.randint(3, 32, (2, 12))
    net.set_attn_implementation(implementation)
    right, left = torch.ones(2, 12, dtype=torch.long), torch.ones(2, 12, dtype=torch.long)
    right[1, 9:], left[1, :3] = 0, 0
    found = net(ids, attention_mask=right, use_cache=False).logits
    torch.testing.assert_close(found[1, :9], net(ids[1:, :9], use_cache=False).logits[0], rtol=1e-5, atol=1e-5)
    with pytest.raises(UnsupportedModelError, match="Pad on the right"):
        net(ids, attention_mask=left, use_cache=False)
    with pytest.raises(UnsupportedModelError, match="Pad on the right"):
        net.model.layers[0].self_attn(torch.randn(2, 12, 24), positions(net.model.layers[0].self_attn, 12), attention_mask=left)
    cache = PooledCache(net.config)
    net(ids, attention_mask=right, past_key_values=cache)
    with pytest.raises(UnsupportedModelError, match="Pad on the right"):  # the gap is now before a token
        net(ids[:, :1], attention_mask=F.pad(right, (0, 1), value=1), past_key_values=cache)
    with pytest.raises(UnsupportedModelError, match="packed"):
        net(ids, position_ids=torch.arange(12)[None] % 6, use_cache=False)


@torch.inference_mode()
def test_other_caches_and_sizes_are_refused() -> None:
    net, ids = model("hca"), torch.randint(3, 32, (1, 5))
    for cache in (hf.DynamicCache(), hf.DynamicCache(config=net.config)):
        with pytest.raises(BadInputError, match=r"DynamicCache.*past_key_values=PooledCache"):
            net(ids, past_key_values=cache)
    for change, least in ((dict(rope_dim=7), 16), (dict(rope_dim=18), 16), (CSA | dict(rope_dim=10), 8)):
        with pytest.raises(BadInputError, match=f"rope_dim is {change['rope_dim']}. Choose an even number up to {least}"):
            PooledAttention(config(**HCA | change), 0)
