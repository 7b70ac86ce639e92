"""Values that llama.cpp's loader, or its first forward pass, would abort the process for.

Each rule is an assertion of the pinned version (llama-model.cpp, models/*.cpp, llama-vocab.cpp, ggml) that
a damaged or made-up file can fail. What llama.cpp refuses by itself, with an error, needs no rule here.
Not here: what the values mean for memory (shape.py).
"""

import math
import os
import re
from struct import Struct
from typing import Final

from drivers.llamacpp.header import GGML_TYPES, Header, Skipped
from drivers.llamacpp.keys import MAX_LAYERS, Keys
from kernel.errors import ModelInvalid

_U64: Final = Struct("<Q")
MAX_EXPERTS: Final = 1024
MAX_VOCABULARY_BYTES: Final = 1 << 26
_ROPE_SCALING: Final = frozenset({"none", "linear", "yarn", "longrope"})
_DRAFTS: Final = frozenset({"dflash", "eagle3", "gemma4-assistant"})  # compute beside a larger model only
_NEEDS_EXPERTS: Final = frozenset(
    {"bailingmoe2", "glm4moe", "grovemoe", "lfm2moe", "llada-moe", "smallthinker"}
)
_INNER_IS_TWICE: Final = frozenset({"jamba", "granitehybrid"})
_INNER_IS_HEADS: Final = frozenset({"qwen3next", "qwen35", "qwen35moe"})
_HYBRID: Final = """
    bailingmoe3 falcon-h1 glm5-next granitehybrid jamba kimi-k3 kimi-linear lfm2 lfm2moe minimax-01 nemotron_h
    nemotron_h_moe plamo2 qwen35 qwen35moe qwen3next qwen4exp
"""  # architectures with layers of both kinds; with one kind only, the other's inputs are never made
_NO_ROTATION: Final = """
    bloom glm5-next gpt2 gptj granitehybrid jais jamba kimi-k3 kimi-linear mpt nemotron_h nemotron_h_moe
    refact
"""  # the others hang in their first forward pass if nothing is to be rotated
_WHOLE_HEAD: Final = """
    apertus arcee arctic baichuan chameleon codeshell cogvlm cohere2moe dbrx deci deepseek dots1 dream
    ernie4_5 ernie4_5-moe exaone exaone-moe exaone4 falcon gpt-oss granite granite_swa granitemoe
    graniteswitch grok grovemoe hunyuan-moe hunyuan_vl hy_v3 internlm2 jais2 llada llada-moe llama
    llama-embed llama4 maincoder mellum mistral3 olmo olmo2 olmoe orion paddleocr pangu-embedded plamo
    pockettts qwen2 qwen2moe qwen2vl qwen3 qwen3moe qwen3tts qwen3vl qwen3vlmoe rnd1 seed_oss smallthinker
    smollm3 starcoder2 talkie xverse
"""  # architectures that rotate a whole head
_KEY_IS_VALUE: Final = """
    afmoe apertus arcee arctic baichuan bailingmoe2 bitnet bloom chameleon chatglm codeshell cogvlm cohere2
    cohere2moe command-r dbrx deci deepseek dots1 dream ernie4_5 ernie4_5-moe exaone falcon glm4 glm4moe
    gpt-oss gpt2 gptneox granite granite_swa granitehybrid granitemoe graniteswitch grok grovemoe
    hunyuan-moe hunyuan_vl hy_v3 internlm2 jais jais2 laguna lfm2 lfm2moe llada llada-moe llama llama-embed
    llama4 maincoder mellum minimax-01 minimax-m2 minimax-m3 mistral3 mpt muse-glimmer nanbeige nemotron
    nemotron_h nemotron_h_moe olmo olmo2 olmoe openelm orion paddleocr pangu-embedded phi2 phi3 plamo
    pockettts qwen qwen2 qwen2moe qwen2vl qwen3 qwen35 qwen35moe qwen3moe qwen3next qwen3tts qwen3vl
    qwen3vlmoe qwen4exp refact rnd1 seed_oss smallthinker smollm3 spark2_5 stablelm starcoder starcoder2
    xverse
"""  # whose keys and values have one length
_PLAIN_TYPES: Final = frozenset({0, 24, 25, 26, 27})  # 32-bit floats, integers
_MUST_BE_PLAIN: Final = re.compile(
    r"blk\.\d+\.(ssm_(a|d|conv1d)|shortconv\.conv|time_mix_(first|lerp_\w+)|channel_mix_lerp_\w+)(\.weight)?"
)


def check(header: Header, keys: Keys, layers: int) -> int:
    """Raises ModelInvalid. Returns the most experts that compute a token."""
    if keys.architecture == "clip" or keys.architecture in _DRAFTS:
        raise ModelInvalid(f"{header.path}: {keys.architecture} is no text generation model by itself")
    _check_numbers(keys)
    _check_heads(keys)
    _check_tensors(header, keys)
    _check_compressed(header, keys)
    _check_state(keys)
    return _experts(keys, layers)


def _check_numbers(keys: Keys) -> None:
    """A norm epsilon that is no number loads, and aborts the process at the first decode."""
    for key in ("layer_norm_rms_epsilon", "layer_norm_epsilon", "group_norm_epsilon"):
        epsilon = keys.value("attention." + key)
        if epsilon is not None and not (
            isinstance(epsilon, float) and math.isfinite(epsilon) and epsilon >= 0
        ):
            raise ModelInvalid(f"{keys.architecture}.attention.{key} is {str(epsilon)[:40]}")
    scaling = keys.value("rope.scaling.type")
    if scaling is not None and scaling not in _ROPE_SCALING:
        raise ModelInvalid(f"{keys.architecture}.rope.scaling.type is {str(scaling)[:40]!r}")


def _check_heads(keys: Keys) -> None:
    """No more of a head can be rotated than there is, and in pairs."""
    heads = max(keys.per_layer("attention.head_count", 1, 1 << 16, default=0))
    if not heads:
        return
    key = value = keys.whole("embedding_length", 1, 1 << 20) // heads
    for suffix in ("", "_swa"):
        key = keys.whole("attention.key_length" + suffix, 1, 1 << 16, key)
        value = keys.whole("attention.value_length" + suffix, 1, 1 << 16, value)
        rotated = keys.whole("rope.dimension_count" + suffix, 0, key, default=key)
        is_wrong = rotated % 2 or not rotated or (keys.architecture in _WHOLE_HEAD.split() and rotated != key)
        if is_wrong and keys.architecture not in _NO_ROTATION.split():
            raise ModelInvalid(f"{keys.architecture}.rope.dimension_count{suffix} is {rotated} of {key}")
        if keys.architecture in _KEY_IS_VALUE.split() and key != value:
            raise ModelInvalid(f"{keys.architecture}: keys of {key} and values of {value} numbers")


def _check_state(keys: Keys) -> None:
    """Recurrent layers divide their width among heads and groups, without a remainder."""
    width, inner = keys.whole("embedding_length", 1, 1 << 20), keys.whole("ssm.inner_size", 0, 1 << 24)
    if keys.architecture in _INNER_IS_TWICE and inner != 2 * width:
        raise ModelInvalid(
            f"{keys.architecture}.ssm.inner_size is not {2 * width}, twice the embedding's length"
        )
    groups, heads = keys.whole("ssm.group_count", 0, inner), keys.whole("ssm.time_step_rank", 0, 1 << 24)
    if groups and (not heads or inner % heads or inner % groups):
        raise ModelInvalid(f"{keys.architecture}.ssm.inner_size is no multiple of its heads or groups")
    if keys.architecture in _INNER_IS_HEADS and inner != heads * keys.whole("ssm.state_size", 0, 1 << 24):
        raise ModelInvalid(f"{keys.architecture}.ssm.inner_size is not that of its {heads} heads")
    if (head := keys.whole("wkv.head_size", 0, 1 << 20)) and width % head:
        raise ModelInvalid(f"{keys.architecture}.wkv.head_size does not divide {width}")


def _check_tensors(header: Header, keys: Keys) -> None:
    """What is added or multiplied number by number is not quantised."""
    for tensor in header.tensors:
        is_row = (
            len(tensor.dims) == 1 or tensor.name.endswith(".bias") or _MUST_BE_PLAIN.fullmatch(tensor.name)
        )
        if is_row and tensor.type not in _PLAIN_TYPES:
            raise ModelInvalid(f"tensor {tensor.name!r} is {GGML_TYPES[tensor.type][0]}, not F32")
    if keys.architecture == "rwkv6":
        names = {tensor.name for tensor in header.tensors}
        for layer in range(keys.whole("block_count", 1, MAX_LAYERS)):
            at = f"blk.{layer}.time_mix_lerp_"
            if not names & {at + "fused.weight", at + "w.weight"}:
                raise ModelInvalid(f"tensor '{at}fused.weight' is missing")


def _check_compressed(header: Header, keys: Keys) -> None:
    """Latent attention caches one row per token, as wide as the matrix that makes it."""
    whole = keys.whole("attention.key_length_mla", 1, 1 << 16)
    if not whole or keys.value("attention.value_length_mla") is None:
        return
    if keys.whole("rope.dimension_count", 0, 1 << 16, default=-1) not in range(whole):
        raise ModelInvalid(f"{keys.architecture}.rope.dimension_count is not below key_length_mla")
    row = keys.whole("attention.key_length", 1, 1 << 16)
    made = {tensor.dims[1] for tensor in header.tensors if tensor.name.endswith(".attn_kv_a_mqa.weight")}
    heads = keys.per_layer("attention.head_count", 1, 1 << 16, default=0)
    own = keys.per_layer("attention.head_count_kv", 1, 1 << 16, default=max(heads))
    if max(own) > 1 or made - {row}:
        raise ModelInvalid(f"{keys.architecture}.attention.key_length is not the width of a compressed key")


def _experts(keys: Keys, layers: int) -> int:
    experts = keys.whole("expert_count", 0, MAX_EXPERTS)
    used = max(keys.per_layer("expert_used_count", layers, MAX_EXPERTS, default=0))
    groups, groups_used = keys.whole("expert_group_count", 0, MAX_EXPERTS), 0
    if groups > 1:
        groups_used = keys.whole("expert_group_used_count", 1, groups - 1, default=-1)
    if used > experts or (experts and not used) or groups_used < 0:
        raise ModelInvalid(f"{used} of {experts} experts cannot compute a token")
    if groups and (groups >= experts or experts % groups):
        raise ModelInvalid(f"{experts} experts cannot make {groups} groups")
    if not experts and keys.architecture in _NEEDS_EXPERTS:
        raise ModelInvalid(f"{keys.architecture}.expert_count is missing")
    return used


def check_kinds(architecture: str, attends: bool, recurs: bool) -> None:
    """Whether any layer has attention, and any is recurrent."""
    if architecture in _HYBRID.split() and not (attends and recurs):
        raise ModelInvalid(f"{architecture}: no layer {'is recurrent' if attends else 'has attention'}")


def check_vocabulary(header: Header) -> None:
    """No token may occur twice. Takes some 50 ms for 128k tokens, so it is left for the load."""
    tokens = header.metadata.get("tokenizer.ggml.tokens")
    if not isinstance(tokens, Skipped) or not tokens.is_text or tokens.size_bytes > MAX_VOCABULARY_BYTES:
        raise ModelInvalid(f"{header.path}: no vocabulary, or one without end")
    fd = os.open(header.path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        raw = os.pread(fd, tokens.size_bytes, tokens.offset)
    finally:
        os.close(fd)
    words: list[bytes] = []
    length = _U64.unpack_from
    at = 0
    for _ in range(tokens.items):
        begin = at + 8
        at = begin + length(raw, at)[0]
        words.append(raw[begin:at].partition(b"\0")[0])  # the loader takes them up to there
    spoken = [word for word in words if word]  # the empty ones get names of their own
    if twice := len(spoken) - len(set(spoken)):
        raise ModelInvalid(f"{header.path}: {twice} tokens of its vocabulary occur twice")
