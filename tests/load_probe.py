"""Really loads GGUF files and computes two tokens, each in a child of its own that may die of it.

Reads a path from each line of standard input; says "ok", "refused" or the signal's number on a line.
Forked, not spawned, for speed: the parent has never computed anything, so there are no threads to lose.
"""

import ctypes
import os
import resource
import sys

from drivers.llamacpp import native

_WINDOW = 256
_LIMIT_S = 10  # a good one takes some 20 ms
_TEXT = b"Hello, <|bos|>\n\xc3\xa4\xf0\x9f\x98\x80 1"


def _try(path: str) -> int:
    """0: it computes; 3: llama.cpp says no."""
    lib = native.lib
    params = lib.llama_model_default_params()
    params.n_gpu_layers = 0
    model = lib.llama_model_load_from_file(path.encode(), params)
    if not model or lib.llama_model_has_encoder(model) or not lib.llama_model_has_decoder(model):
        return 3
    params = lib.llama_context_default_params()
    params.n_ctx, params.n_batch, params.n_ubatch, params.n_threads, params.n_threads_batch = (
        _WINDOW,
        32,
        32,
        1,
        1,
    )
    params.flash_attn_type = 0
    context = lib.llama_init_from_model(model, params)
    if not context:
        return 3
    vocabulary = lib.llama_model_get_vocab(model)
    for token in range(lib.llama_vocab_n_tokens(vocabulary)):
        native.token_is_eog(vocabulary, token)
        native.token_to_piece(vocabulary, token, ctypes.create_string_buffer(256), 256, 0, False)
    lib.llama_tokenize(vocabulary, _TEXT, len(_TEXT), (ctypes.c_int32 * 64)(), 64, True, True)
    batch = lib.llama_batch_init(32, 0, 1)
    for begin, count in ((0, 2), (2, 1)):
        batch.n_tokens = count
        for row in range(count):
            batch.token[row], batch.pos[row], batch.n_seq_id[row] = 65, begin + row, 1
            batch.seq_id[row][0], batch.logits[row] = 0, 1
        if lib.llama_decode(context, batch):
            return 3
    return 0


def _in_a_child(path: str) -> str:
    child = os.fork()
    if not child:
        resource.setrlimit(resource.RLIMIT_CPU, (_LIMIT_S, _LIMIT_S))  # one that hangs dies of it
        os._exit(_try(path))
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return {0: "ok", 3: "refused"}.get(status, str(status))


if __name__ == "__main__":
    native.start(lambda _level, _line: None, lambda _level, _line: None)
    for line in sys.stdin:
        print(_in_a_child(line.rstrip("\n")), flush=True)
