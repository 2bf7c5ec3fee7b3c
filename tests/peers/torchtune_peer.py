"""torchtune's `MultiHeadAttention` and `KVCache` replaced by `interop`'s, wherever torchtune holds their names."""

import importlib

from interop.torch_modules import multi_head_attention as ours

for _module in ("torchtune.modules", "torchtune.modules.attention", "torchtune.modules.kv_cache"):
    _theirs = importlib.import_module(_module)
    for _name in ("MultiHeadAttention", "KVCache"):
        if hasattr(_theirs, _name):
            setattr(_theirs, _name, getattr(ours, _name))
