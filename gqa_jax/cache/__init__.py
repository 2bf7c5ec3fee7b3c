"""Decoding state as explicit pytrees: hand them to a jitted step, donate them, use what comes back.

Every row of a batch has its own length. Caches of keys and values are head-major, `[B, K, S, D]`, because XLA then
reads them with one einsum and writes them in place. All of them answer to

  `append_and_attend(query, key, value, lengths, **logit options) -> Attended(out, cache)`
  `overflowed()`, `reset()`, `rewind(position) -> Rewound(cache, accepted)`

`rewind` and `select_rows` of this package do the same for all layers' caches at once.
"""

from gqa_jax.cache.checks import check_step as check_step
from gqa_jax.cache.full import Attended as Attended
from gqa_jax.cache.full import KVCache as KVCache
from gqa_jax.cache.policy import POLICIES as POLICIES
from gqa_jax.cache.policy import AttentionCache as AttentionCache
from gqa_jax.cache.policy import Policy as Policy
from gqa_jax.cache.policy import allocate as allocate
from gqa_jax.cache.prefix import common_prefix as common_prefix
from gqa_jax.cache.prefix import rewind as rewind
from gqa_jax.cache.quantized import QuantizedKVCache as QuantizedKVCache
from gqa_jax.cache.recurrent import GatedDeltaNetState as GatedDeltaNetState
from gqa_jax.cache.rewinding import Rewound as Rewound
from gqa_jax.cache.ring import RingKVCache as RingKVCache
from gqa_jax.cache.rows import select_rows as select_rows
