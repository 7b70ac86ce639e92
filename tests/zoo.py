"""Small models of many architectures, with random weights, for tests of what a header means.

Each keeper yields the tensors of one architecture as llama.cpp names them, and the metadata it reads.
Not here: a llama of any size (drivers.llamacpp.writer.Recipe).
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from drivers.llamacpp.writer import Draft, DType, Metadata, vocabulary, write_model, write_parts

Tensors = Iterator[Draft]


@dataclass(frozen=True, slots=True)
class Size:
    """Of a model. What an architecture has no use for is left out."""

    width: int = 64
    layers: int = 4
    heads: int = 4
    kv_heads: int = 2
    head: int = 32  # is not width / heads where an architecture allows it
    ffn: int = 160
    vocabulary: int = 288
    context_tokens: int = 4096
    sliding_tokens: int = 256
    experts: int = 4
    state: int = 16


def _norm(name: str, width: int, bias: bool = False) -> Tensors:
    yield Draft(name + ".weight", (width,))
    if bias:
        yield Draft(name + ".bias", (width,), fill=0.0)


def _matrix(name: str, rows: int, columns: int, bias: bool = False) -> Tensors:
    yield Draft(name + ".weight", (rows, columns), columns**-0.5)
    if bias:
        yield Draft(name + ".bias", (rows,), fill=0.0)


def _ends(size: Size, *, tied: bool = False, bias: bool = False, norm: str = "output_norm") -> Tensors:
    yield Draft("token_embd.weight", (size.vocabulary, size.width), 1.0)
    yield from _norm(norm, size.width, bias)
    if not tied:
        yield Draft("output.weight", (size.vocabulary, size.width), 3 * size.width**-0.5)


def _attention(at: str, size: Size, head: int, bias: bool = False, norms: bool = False) -> Tensors:
    yield from _norm(at + "attn_norm", size.width, bias and not norms)
    yield from _matrix(at + "attn_q", size.heads * head, size.width, bias)
    yield from _matrix(at + "attn_k", size.kv_heads * head, size.width, bias)
    yield from _matrix(at + "attn_v", size.kv_heads * head, size.width, bias)
    yield from _matrix(at + "attn_output", size.width, size.heads * head)
    if norms:
        yield from _norm(at + "attn_q_norm", head)
        yield from _norm(at + "attn_k_norm", head)


def _ffn(at: str, size: Size, gate: bool = True, bias: bool = False) -> Tensors:
    yield from _norm(at + "ffn_norm", size.width, bias)
    if gate:
        yield from _matrix(at + "ffn_gate", size.ffn, size.width)
    yield from _matrix(at + "ffn_up", size.ffn, size.width, bias)
    yield from _matrix(at + "ffn_down", size.width, size.ffn, bias)


def _experts(at: str, size: Size, ffn: int, shared: int = 0) -> Tensors:
    yield from _norm(at + "ffn_norm", size.width)
    yield from _matrix(at + "ffn_gate_inp", size.experts, size.width)
    yield Draft(at + "ffn_gate_exps.weight", (size.experts, ffn, size.width), size.width**-0.5)
    yield Draft(at + "ffn_up_exps.weight", (size.experts, ffn, size.width), size.width**-0.5)
    yield Draft(at + "ffn_down_exps.weight", (size.experts, size.width, ffn), ffn**-0.5)
    if shared:
        yield from _matrix(at + "ffn_gate_shexp", shared, size.width)
        yield from _matrix(at + "ffn_up_shexp", shared, size.width)
        yield from _matrix(at + "ffn_down_shexp", size.width, shared)


def _mamba(at: str, size: Size, norms: bool = False) -> Tensors:
    inner, rank = 2 * size.width, 8
    yield from _norm(at + "attn_norm", size.width)
    yield from _matrix(at + "ssm_in", 2 * inner, size.width)
    yield Draft(at + "ssm_conv1d.weight", (inner, 4))
    yield Draft(at + "ssm_conv1d.bias", (inner,), fill=0.0)
    yield from _matrix(at + "ssm_x", rank + 2 * size.state, inner)
    yield Draft(at + "ssm_dt.weight", (inner, rank))
    yield Draft(at + "ssm_dt.bias", (inner,), fill=0.0)
    yield Draft(at + "ssm_a", (inner, size.state), fill=-1.0)
    yield Draft(at + "ssm_d", (inner,))
    yield from _matrix(at + "ssm_out", size.width, inner)
    if norms:
        for name, width in (("ssm_dt_norm", rank), ("ssm_b_norm", size.state), ("ssm_c_norm", size.state)):
            yield from _norm(at + name, width)


def _mamba2(at: str, size: Size) -> Tensors:
    inner, heads = 2 * size.width, 4
    mixed = inner + 2 * size.state
    yield from _norm(at + "attn_norm", size.width)
    yield from _matrix(at + "ssm_in", inner + mixed + heads, size.width)
    yield Draft(at + "ssm_conv1d.weight", (mixed, 4))
    yield Draft(at + "ssm_conv1d.bias", (mixed,), fill=0.0)
    yield Draft(at + "ssm_dt.bias", (heads,), fill=0.0)
    yield Draft(at + "ssm_a", (heads, 1), fill=-1.0)
    yield Draft(at + "ssm_d", (heads, 1))
    yield Draft(at + "ssm_norm.weight", (1, inner))
    yield from _matrix(at + "ssm_out", size.width, inner)


_RMS = {"attention.layer_norm_rms_epsilon": 1e-5}
_NORM = {"attention.layer_norm_epsilon": 1e-5}
_MAMBA = {"ssm.conv_kernel": 4, "ssm.time_step_rank": 8}
_MAMBA2 = {"ssm.conv_kernel": 4, "ssm.time_step_rank": 4, "ssm.group_count": 1}


def _blocks(size: Size) -> list[str]:
    return [f"blk.{layer}." for layer in range(size.layers)]


def _keys(size: Size, head: int) -> Metadata:
    return {"attention.key_length": head, "attention.value_length": head, "rope.dimension_count": head}


def llama(size: Size) -> tuple[Metadata, list[Draft]]:
    head = size.width // size.heads
    tensors = [*_ends(size)]
    for at in _blocks(size):
        tensors += [*_attention(at, size, head), *_ffn(at, size)]
    return {**_RMS, **_keys(size, head)}, tensors


def mixtral(size: Size) -> tuple[Metadata, list[Draft]]:
    """Written as a llama with experts."""
    tensors = [*_ends(size)]
    for at in _blocks(size):
        tensors += [*_attention(at, size, size.width // size.heads), *_experts(at, size, size.ffn)]
    return {**_RMS, "expert_count": size.experts, "expert_used_count": 2}, tensors


def qwen2(size: Size) -> tuple[Metadata, list[Draft]]:
    tensors = [*_ends(size)]
    for at in _blocks(size):
        attention = _attention(at, size, size.width // size.heads, bias=True)
        tensors += [*(t for t in attention if t.name != at + "attn_norm.bias"), *_ffn(at, size)]
    return {**_RMS}, tensors


def qwen3(size: Size) -> tuple[Metadata, list[Draft]]:
    tensors = [*_ends(size, tied=True)]
    for at in _blocks(size):
        tensors += [*_attention(at, size, size.head, norms=True), *_ffn(at, size)]
    return {**_RMS, **_keys(size, size.head)}, tensors


def gemma2(size: Size) -> tuple[Metadata, list[Draft]]:
    tensors = [*_ends(size, tied=True)]
    for at in _blocks(size):
        tensors += [*_attention(at, size, size.head), *_ffn(at, size)]
        tensors += [*_norm(at + "post_attention_norm", size.width), *_norm(at + "post_ffw_norm", size.width)]
    soft = {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}
    return {
        **_RMS,
        **_keys(size, size.head),
        **soft,
        "attention.sliding_window": size.sliding_tokens,
    }, tensors


def gemma3(size: Size) -> tuple[Metadata, list[Draft]]:
    tensors = [*_ends(size)]
    for at in _blocks(size):
        tensors += [*_attention(at, size, size.head, norms=True), *_ffn(at, size)]
        tensors += [*_norm(at + "post_attention_norm", size.width), *_norm(at + "post_ffw_norm", size.width)]
    return {**_RMS, **_keys(size, size.head), "attention.sliding_window": size.sliding_tokens}, tensors


def phi3(size: Size) -> tuple[Metadata, list[Draft]]:
    head = size.width // size.heads
    tensors = [*_ends(size)]
    for at in _blocks(size):
        tensors += [*_norm(at + "attn_norm", size.width)]
        tensors += [*_matrix(at + "attn_qkv", (size.heads + 2 * size.kv_heads) * head, size.width)]
        tensors += [*_matrix(at + "attn_output", size.width, size.width), *_norm(at + "ffn_norm", size.width)]
        tensors += [*_matrix(at + "ffn_up", 2 * size.ffn, size.width)]
        tensors += [*_matrix(at + "ffn_down", size.width, size.ffn)]
    return {**_RMS, "attention.sliding_window": size.sliding_tokens, "rope.dimension_count": head}, tensors


def starcoder2(size: Size) -> tuple[Metadata, list[Draft]]:
    tensors = [*_ends(size, bias=True)]
    for at in _blocks(size):
        tensors += [*_attention(at, size, size.width // size.heads, bias=True)]
        tensors += [Draft(at + "attn_output.bias", (size.width,), fill=0.0)]
        tensors += [*_ffn(at, size, gate=False, bias=True)]
    return {**_NORM}, tensors


def gpt2(size: Size) -> tuple[Metadata, list[Draft]]:
    tensors = [*_ends(size, bias=True)]
    tensors += [Draft("position_embd.weight", (size.context_tokens, size.width), 0.1)]
    for at in _blocks(size):
        tensors += [*_norm(at + "attn_norm", size.width, bias=True)]
        tensors += [*_matrix(at + "attn_qkv", 3 * size.width, size.width, bias=True)]
        tensors += [*_matrix(at + "attn_output", size.width, size.width, bias=True)]
        tensors += [*_ffn(at, size, gate=False, bias=True)]
    return {**_NORM, "attention.head_count_kv": size.heads}, tensors


def olmoe(size: Size) -> tuple[Metadata, list[Draft]]:
    tensors = [*_ends(size)]
    for at in _blocks(size):
        tensors += [*_attention(at, size, size.width // size.heads), *_experts(at, size, size.ffn)]
        tensors += [*_norm(at + "attn_q_norm", size.width), *_norm(at + "attn_k_norm", size.width)]
    more = {"expert_count": size.experts, "expert_used_count": 2, "attention.head_count_kv": size.heads}
    return {**_RMS, **more}, _with_full_heads(tensors, size)


def _with_full_heads(tensors: list[Draft], size: Size) -> list[Draft]:
    """As many key and value heads as query heads."""
    wide = ("attn_k.weight", "attn_v.weight")
    return [t._replace(dims=(size.width, size.width)) if t.name.endswith(wide) else t for t in tensors]


def deepseek2(size: Size) -> tuple[Metadata, list[Draft]]:
    """Multi-head latent attention: keys and values are one compressed row per token."""
    latent, rope, plain = 32, 16, 32
    tensors = [*_ends(size)]
    for layer, at in enumerate(_blocks(size)):
        tensors += [*_norm(at + "attn_norm", size.width), *_norm(at + "attn_q_a_norm", 32)]
        tensors += [*_norm(at + "attn_kv_a_norm", latent), *_matrix(at + "attn_q_a", 32, size.width)]
        tensors += [*_matrix(at + "attn_q_b", size.heads * (plain + rope), 32)]
        tensors += [*_matrix(at + "attn_kv_a_mqa", latent + rope, size.width)]
        tensors += [Draft(at + "attn_k_b.weight", (size.heads, latent, plain), latent**-0.5)]
        tensors += [Draft(at + "attn_v_b.weight", (size.heads, plain, latent), latent**-0.5)]
        tensors += [*_matrix(at + "attn_output", size.width, size.heads * plain)]
        tensors += [*(_experts(at, size, 64, 64) if layer else _ffn(at, size))]
    more: Metadata = {
        "attention.head_count_kv": 1,
        "attention.key_length": latent + rope,
        "attention.value_length": latent,
        "attention.key_length_mla": plain + rope,
        "attention.value_length_mla": plain,
        "attention.q_lora_rank": 32,
        "attention.kv_lora_rank": latent,
        "rope.dimension_count": rope,
        "leading_dense_block_count": 1,
        "expert_count": size.experts,
        "expert_used_count": 2,
        "expert_feed_forward_length": 64,
        "expert_shared_count": 1,
    }
    return {**_RMS, **more}, tensors


def mamba(size: Size) -> tuple[Metadata, list[Draft]]:
    tensors = [*_ends(size)]
    for at in _blocks(size):
        tensors += [*_mamba(at, size)]
    more = {"ssm.inner_size": 2 * size.width, "ssm.state_size": size.state}
    return {**_RMS, **_MAMBA, **more, "attention.head_count": 0, "feed_forward_length": 0}, tensors


def mamba2(size: Size) -> tuple[Metadata, list[Draft]]:
    tensors = [*_ends(size)]
    for at in _blocks(size):
        tensors += [*_mamba2(at, size)]
    more = {"ssm.inner_size": 2 * size.width, "ssm.state_size": size.state}
    return {**_RMS, **_MAMBA2, **more, "attention.head_count": 0, "feed_forward_length": 0}, tensors


def rwkv6(size: Size) -> tuple[Metadata, list[Draft]]:
    width, low = size.width, 32
    tensors = [*_ends(size, bias=True), *_norm("token_embd_norm", width, bias=True)]
    for at in _blocks(size):
        tensors += [*_norm(at + "attn_norm", width, bias=True), *_norm(at + "attn_norm_2", width, bias=True)]
        tensors += [*_matrix(at + "time_mix_w1", 5 * low, width)]
        tensors += [Draft(at + "time_mix_w2.weight", (5, width, low), low**-0.5)]
        tensors += [Draft(at + "time_mix_lerp_x.weight", (1, 1, width), fill=0.5)]
        tensors += [Draft(at + "time_mix_lerp_fused.weight", (5, 1, 1, width), fill=0.5)]
        tensors += [Draft(at + "time_mix_first.weight", (width // 32, 32), fill=0.5)]
        tensors += [Draft(at + "time_mix_decay.weight", (width,), fill=0.5)]
        tensors += [
            *_matrix(at + "time_mix_decay_w1", low, width),
            *_matrix(at + "time_mix_decay_w2", width, low),
        ]
        for name in ("key", "value", "receptance", "gate", "output"):
            tensors += [*_matrix(at + "time_mix_" + name, width, width)]
        tensors += [*_norm(at + "time_mix_ln", width, bias=True)]
        tensors += [Draft(at + f"channel_mix_lerp_{name}.weight", (1, 1, width), fill=0.5) for name in "kr"]
        tensors += [*_matrix(at + "channel_mix_key", size.ffn, width)]
        tensors += [*_matrix(at + "channel_mix_value", width, size.ffn)]
        tensors += [*_matrix(at + "channel_mix_receptance", width, width)]
    more = {"wkv.head_size": 32, "time_mix_extra_dim": low, "time_decay_extra_dim": low}
    return {**_NORM, **more, "attention.head_count": 0}, tensors


def _some_attention(size: Size) -> list[int]:
    """Key and value heads by layer: every other layer has none."""
    return [size.kv_heads if layer % 2 else 0 for layer in range(size.layers)]


def jamba(size: Size) -> tuple[Metadata, list[Draft]]:
    tensors = [*_ends(size)]
    for at, heads in zip(_blocks(size), _some_attention(size), strict=True):
        head = size.width // size.heads
        tensors += [*(_attention(at, size, head) if heads else _mamba(at, size, norms=True))]
        tensors += [*_ffn(at, size)]
    more = {"ssm.inner_size": 2 * size.width, "ssm.state_size": size.state}
    return {**_RMS, **_MAMBA, **more, "attention.head_count_kv": _some_attention(size)}, tensors


def granitehybrid(size: Size) -> tuple[Metadata, list[Draft]]:
    tensors = [*_ends(size)]
    for at, heads in zip(_blocks(size), _some_attention(size), strict=True):
        tensors += [*(_attention(at, size, size.width // size.heads) if heads else _mamba2(at, size))]
        tensors += [*_ffn(at, size)]
    more = {"ssm.inner_size": 2 * size.width, "ssm.state_size": size.state}
    return {**_RMS, **_MAMBA2, **more, "attention.head_count_kv": _some_attention(size)}, tensors


def falcon_h1(size: Size) -> tuple[Metadata, list[Draft]]:
    """Attention and a state-space part in every layer."""
    tensors = [*_ends(size)]
    for at in _blocks(size):
        tensors += [*_attention(at, size, size.head), *list(_mamba2(at, size))[1:], *_ffn(at, size)]
    named = [t._replace(name=t.name.removesuffix(".weight")) if "ffn_norm" in t.name else t for t in tensors]
    more = {"ssm.inner_size": 2 * size.width, "ssm.state_size": size.state}
    return {**_RMS, **_MAMBA2, **more, **_keys(size, size.head)}, named


def lfm2(size: Size) -> tuple[Metadata, list[Draft]]:
    tensors = [*_ends(size, norm="token_embd_norm")]
    for at, heads in zip(_blocks(size), _some_attention(size), strict=True):
        if heads:
            tensors += [*_attention(at, size, size.width // size.heads, norms=True)]
        else:
            tensors += [*_norm(at + "attn_norm", size.width)]
            tensors += [Draft(at + "shortconv.conv.weight", (size.width, 3))]
            tensors += [*_matrix(at + "shortconv.in_proj", 3 * size.width, size.width)]
            tensors += [*_matrix(at + "shortconv.out_proj", size.width, size.width)]
        tensors += [*_ffn(at, size)]
    return {**_RMS, "shortconv.l_cache": 3, "attention.head_count_kv": _some_attention(size)}, tensors


def gpt_oss(size: Size) -> tuple[Metadata, list[Draft]]:
    """Experts with biases, attention with sinks, every other layer slides."""
    tensors = [*_ends(size)]
    for at in _blocks(size):
        tensors += [*_attention(at, size, size.head, bias=True), *_experts(at, size, size.ffn)]
        tensors += [
            *_norm(at + "post_attention_norm", size.width),
            Draft(at + "attn_sinks.weight", (size.heads,)),
        ]
        tensors += [
            Draft(at + "attn_output.bias", (size.width,)),
            Draft(at + "ffn_gate_inp.bias", (size.experts,)),
        ]
        for name, width in (("gate", size.ffn), ("up", size.ffn), ("down", size.width)):
            tensors += [Draft(at + f"ffn_{name}_exps.bias", (size.experts, width), fill=0.0)]
    unused = ("attn_norm.bias", "ffn_norm.weight")
    more = {"expert_count": size.experts, "expert_used_count": 2, "expert_feed_forward_length": size.ffn}
    window = {"attention.sliding_window": size.sliding_tokens}
    return {**_RMS, **_keys(size, size.head), **more, **window}, [
        tensor for tensor in tensors if not tensor.name.endswith(unused)
    ]


def qwen3next(size: Size) -> tuple[Metadata, list[Draft]]:
    """Layers of gated linear attention, every other one of attention with a gate; experts in each."""
    head, keys, values = 32, 2, 4
    mixed = (2 * keys + values) * head
    tensors = [*_ends(size)]
    for layer, at in enumerate(_blocks(size)):
        if layer % 2:
            attention = _attention(at, size, size.head, norms=True)
            wide = (2 * size.heads * size.head, size.width)
            tensors += [t._replace(dims=wide) if t.name == at + "attn_q.weight" else t for t in attention]
        else:
            tensors += [*_norm(at + "attn_norm", size.width), *_matrix(at + "attn_qkv", mixed, size.width)]
            tensors += [*_matrix(at + "attn_gate", values * head, size.width)]
            tensors += [
                Draft(at + "ssm_conv1d.weight", (mixed, 4)),
                Draft(at + "ssm_dt.bias", (values,), fill=0.0),
            ]
            tensors += [
                Draft(at + "ssm_a", (values,), fill=-1.0),
                *_matrix(at + "ssm_ba", 2 * values, size.width),
            ]
            tensors += [*_norm(at + "ssm_norm", head), *_matrix(at + "ssm_out", size.width, values * head)]
        tensors += [*_norm(at + "post_attention_norm", size.width), *_experts(at, size, 64, 64)]
        tensors += [Draft(at + "ffn_gate_inp_shexp.weight", (size.width,))]
    more = {"expert_count": size.experts, "expert_used_count": 2, "expert_feed_forward_length": 64}
    state = {
        "full_attention_interval": 2,
        "ssm.inner_size": values * head,
        "ssm.state_size": head,
        "ssm.conv_kernel": 4,
    }
    heads = {"ssm.time_step_rank": values, "ssm.group_count": keys, "expert_shared_feed_forward_length": 64}
    return {**_RMS, **_keys(size, size.head), **more, **state, **heads}, [
        tensor for tensor in tensors if not tensor.name.endswith("ffn_norm.weight")
    ]


KEEPERS: dict[str, Callable[[Size], tuple[Metadata, list[Draft]]]] = {
    "llama": llama,
    "mixtral": mixtral,
    "qwen2": qwen2,
    "qwen3": qwen3,
    "gemma2": gemma2,
    "gemma3": gemma3,
    "phi3": phi3,
    "starcoder2": starcoder2,
    "gpt2": gpt2,
    "olmoe": olmoe,
    "deepseek2": deepseek2,
    "mamba": mamba,
    "mamba2": mamba2,
    "rwkv6": rwkv6,
    "jamba": jamba,
    "granitehybrid": granitehybrid,
    "falcon-h1": falcon_h1,
    "lfm2": lfm2,
    "gpt-oss": gpt_oss,
    "qwen3next": qwen3next,
}
_WRITTEN_AS = {"mixtral": "llama"}


def model(kind: str, size: Size) -> tuple[Metadata, list[Draft]]:
    """Metadata and tensors of a model of this kind."""
    own, tensors = KEEPERS[kind](size)
    name = _WRITTEN_AS.get(kind, kind)
    common: Metadata = {
        "vocab_size": size.vocabulary,
        "context_length": size.context_tokens,
        "embedding_length": size.width,
        "block_count": size.layers,
        "feed_forward_length": size.ffn,
        "attention.head_count": size.heads,
        "attention.head_count_kv": size.kv_heads,
    }
    if own.get("attention.head_count") == 0:
        del common["attention.head_count_kv"]
    metadata: Metadata = {"general.architecture": name, "general.name": "random"}
    metadata |= {f"{name}.{key}": value for key, value in {**common, **own}.items()}
    return {**metadata, **vocabulary(size.vocabulary)}, tensors


def write(folder: Path, kind: str, size: Size = Size(), dtype: DType = "Q8_0") -> Path:
    """Write it; returns where."""
    path = folder / f"{kind}.gguf"
    write_model(path, *model(kind, size), dtype)
    return path


def write_split(folder: Path, kind: str, parts: int, size: Size = Size()) -> Sequence[Path]:
    """Write it as several files; returns where, in order."""
    return write_parts(folder / f"{kind}.gguf", parts, *model(kind, size))
