"""NeMo Automodel's `CombinedProjectionStateDictAdapter` converts with `layout.split_state` and `fuse_state`.

For checkouts that still have it: until 2026-04-10, commit 134d3066.
"""

import re

from nemo_automodel.components.models.common.combined_projection.state_dict_adapter import (
    CombinedProjectionStateDictAdapter as Theirs,
)

from gqa_jax import layout


def to_hf(self, state_dict, exclude_key_regex=None, **_):
    sizes = dict(q_per_kv=self.group_size, head_dim=self.head_dim)
    split = dict(layout.split_state(state_dict.items(), **sizes))
    if exclude_key_regex:
        split = {name: x for name, x in split.items() if not re.match(exclude_key_regex, name)}
    return split


def from_hf(self, hf_state_dict, **_):
    """Tied output weights, which files may leave out, are those of the embedding."""
    sizes = dict(q_per_kv=self.group_size, head_dim=self.head_dim)
    state = dict(layout.fuse_state(hf_state_dict.items(), **sizes))
    embedding = next((name for name in state if name.endswith("embed_tokens.weight")), None)
    if embedding and getattr(self.config, "tie_word_embeddings", True):
        state.setdefault("lm_head.weight", state[embedding])
    return state


Theirs.to_hf, Theirs.from_hf = to_hf, from_hf


def pytest_collection_modifyitems(items):
    """Their modules of models ask for a GPU; conversion needs none."""
    for item in items:
        for node in item.listchain():
            node.own_markers = [mark for mark in node.own_markers if mark.name != "skipif"]
