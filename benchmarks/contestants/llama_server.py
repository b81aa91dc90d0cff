"""llama.cpp's own server, as the package xllamacpp builds it.

    python -m benchmarks.contestants.llama_server MODEL PORT PRECISION PLACES

PLACES texts are written at a time; all else is as llama.cpp has it, but that float32 is float32.
"""

import sys
import threading

import xllamacpp

CONTEXT = 2048  # tokens of a text


def main(model: str, port: str, precision: str, places: str) -> None:
    params = xllamacpp.CommonParams()
    params.model.path, params.model_alias = model, {"it"}
    params.port, params.n_parallel = int(port), int(places)
    params.n_ctx = CONTEXT * params.n_parallel
    if precision == "float32":
        params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    server = xllamacpp.Server(params)
    print(server.listening_address, flush=True)
    threading.Event().wait()


if __name__ == "__main__":
    main(*sys.argv[1:])
