# ruff: noqa: E501 (one line per fault)
"""Faults put into the library by hand, one at a time, and the tests that must notice each.

    python -m tests.mutants               every fault; exits with 1 if one survives
    python -m tests.mutants gate mask     those whose name holds one of these words

A fault is caught when its tests fail (not when they cannot be collected). `tests/test_mutants.py` runs a sample.
"""

import os
import pathlib
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from typing import NamedTuple

ROOT = pathlib.Path(__file__).parents[1]
FAILED = 1  # pytest's exit status for tests that ran and failed


class Fault(NamedTuple):
    """One wrong edit.

    Attributes:
      name: what is wrong, in a few words.
      file: of the project.
      old, new: text that stands exactly once in the file, and what takes its place.
      tests: pytest arguments, relative to `tests/`, that must fail.
    """

    name: str
    file: str
    old: str
    new: str
    tests: str


ATTENTION, GDN, MASKS = (
    "gqa_jax/layers/attention.py",
    "gqa_jax/layers/gated_deltanet.py",
    "gqa_jax/layers/masks.py",
)
NORMS, ROTARY, MOE = "gqa_jax/layers/norms.py", "gqa_jax/layers/rotary.py", "gqa_jax/layers/moe.py"
CACHE, LAYOUT = "gqa_jax/cache", "gqa_jax/layout"
ALGEBRA, CLIP = "pallas_kernels/attention/algebra.py", "gqa_jax/train/qk_clip.py"
REFERENCE = "pallas_kernels/attention/reference.py"
BLOCKWISE = "pallas_kernels/attention/blockwise"
DELTA, CONV = "pallas_kernels/delta_rule", "pallas_kernels/causal_conv/reference.py"
GATES = "pallas_kernels/deltanet/algebra.py"
TRUTH = "layers/test_self_attention_truth.py"
RECURRENCE = "layers/test_gated_deltanet.py -k float64_recurrence"
OPERATOR = "attention/test_properties.py -k each_option_alone"

FAULTS = tuple(Fault(*fault) for fault in (
    # Self-attention
    ("float32 gate inverted", ATTENTION, "jax.nn.sigmoid(gate.astype(jnp.float32))", "jax.nn.sigmoid(-gate.astype(jnp.float32))", f"{TRUTH} -k gate_dtype"),
    ("gate inverted", ATTENTION, "return out * jax.nn.sigmoid(gate)", "return out * jax.nn.sigmoid(-gate)", f"{TRUTH} -k output_gate"),
    ("gate is the query", ATTENTION, "fused[..., per_group : 2 * per_group, :]", "fused[..., :per_group, :]", f"{TRUTH} -k output_gate"),
    ("key not normalised", ATTENTION, "self.q_norm(query), self.k_norm(key)", "self.q_norm(query), key", f"{TRUTH} -k qk_norm"),
    ("no norm after the rotation", ATTENTION, 'if config.qk_norm_position == "after_rope":', 'if config.qk_norm_position == "never":', f"{TRUTH} -k qk_norm_position"),
    ("sinks of zero are 5", ATTENTION, "sinks = jnp.zeros((config.num_heads,), jnp.float32)", "sinks = jnp.full((config.num_heads,), 5.0, jnp.float32)", f"{TRUTH} -k sinks"),
    ("sinks of other heads", ATTENTION, "sinks = self.sinks[...].reshape(config.num_heads)", "sinks = self.sinks[...].T.reshape(config.num_heads)", f"{TRUTH} -k sinks"),
    ("scale times three", ATTENTION, "return dict(\n            scale=config.scale,", "return dict(\n            scale=3 * (config.scale or config.head_dim**-0.5),", f"{TRUTH} -k scale"),
    ("keys and values exchanged", ATTENTION, "fused[..., -2, :], fused[..., -1, :]", "fused[..., -1, :], fused[..., -2, :]", f"{TRUTH} -k model_dim"),
    ("keys rotated by the other pairing", ATTENTION, "key = apply_rotary(key, cos, sin, pairing=config.rope.pairing)", 'key = apply_rotary(key, cos, sin, pairing="half")', f"{TRUTH} -k adjacent"),
    ("steps count from 0", ATTENTION, "positions = start[:, None] + jnp.arange", "positions = 0 * start[:, None] + jnp.arange", "layers/test_self_attention.py -k any_split"),
    ("cross-attention ignores the mask", "gqa_jax/layers/cross_attention.py", "            mask=mask,\n            query_segment_ids", "            mask=None,\n            query_segment_ids", "layers/test_cross_attention.py -k explicit_sums"),
    # Norms
    ("zero-centred norm is plain", NORMS, "weight = weight + jnp.ones((), normed.dtype)", "weight = weight + jnp.zeros((), normed.dtype)", "layers/test_norms.py"),
    ("norm without epsilon", NORMS, "jnp.asarray(eps, wide.dtype)", "jnp.asarray(0.0 * eps, wide.dtype)", "layers/test_norms.py"),
    ("norm by the sum of squares", NORMS, "jnp.mean(wide * wide", "jnp.sum(wide * wide", "layers/test_norms.py"),
    ("gated norm with a sigmoid", NORMS, "jax.nn.silu(gate", "jax.nn.sigmoid(gate", "layers/test_norms.py"),
    ("l2 norm by the mean of squares", "pallas_kernels/_precision.py", "jnp.sum(wide * wide", "jnp.mean(wide * wide", "delta_rule/test_hugging_face.py -k values"),
    # Rotary embedding
    ("rotation with a wrong sign", ROTARY, "first * cos - second * sin", "first * cos + second * sin", "layers/test_rotary.py -k complex"),
    ("adjacent pairs exchanged", ROTARY, "wide[..., 0::2], wide[..., 1::2]", "wide[..., 1::2], wide[..., 0::2]", "layers/test_rotary.py -k complex"),
    ("linear scaling the wrong way", ROTARY, "frequencies = plain / factor", "frequencies = plain * factor", f"{TRUTH} -k rope"),
    ("llama 3 forgets its factor", ROTARY, "(1 - keep) * plain / scaling.factor", "(1 - keep) * plain", "layers/test_rotary.py -k scaling"),
    ("yarn ramp inverted", ROTARY, "interpolate * plain / scaling.factor + (1 - interpolate) * plain", "(1 - interpolate) * plain / scaling.factor + interpolate * plain", "layers/test_rotary.py -k scaling"),
    ("yarn without concentration", ROTARY, "return magnitude(scaling.mscale) / magnitude(scaling.mscale_all_dim)", "return 1.0", "layers/test_rotary.py -k scaling"),
    ("yarn sine without concentration", ROTARY, "jnp.sin(angles) * concentration", "jnp.sin(angles)", "layers/test_rotary.py -k concentration"),
    ("interleaved sections run over", ROTARY, "axis[which : 3 * sections[which] : 3] = which", "axis[which::3] = which", "layers/test_rotary.py -k interleaved"),
    # Masks
    ("documents end a token late", MASKS, "index[None, :, None] >= ends[:, None, :]", "index[None, :, None] > ends[:, None, :]", "layers/test_self_attention_options.py -k document_ids"),
    ("window of the picture one too wide", MASKS, "visible & (distance < sliding_window)", "visible & (distance <= sliding_window)", "layers/test_self_attention_options.py -k pictures"),
    ("padding sees padding in the picture", MASKS, "visible & same & (query_segment_ids >= 0)[:, :, None]", "visible & same", "layers/test_self_attention_options.py -k pictures"),
    ("prefix one too long", MASKS, "of_keys < prefix_length", "of_keys <= prefix_length", "layers/test_self_attention_options.py -k prefix"),
    # Attention operator
    ("window one too wide", ALGEBRA, "seen & (distance < options.sliding_window)", "seen & (distance <= options.sliding_window)", f"{OPERATOR}"),
    ("causal excludes the token itself", ALGEBRA, "seen = distance >= 0", "seen = distance > 0", f"{OPERATOR}"),
    ("padding sees padding", ALGEBRA, "(query.segment >= 0)[", "(query.segment >= -9)[", "attention/test_properties.py -k rows_that_see_nothing"),
    ("packed positions go on", ALGEBRA, "(index - cu_seqlens[segment])[None]", "index[None]", "attention/test_contract.py -k packed_sequences"),
    ("dropout forgets its scale", f"{BLOCKWISE}/tile.py", "weights / (1.0 - options.dropout_rate)", "weights", "attention/test_properties.py -k 'each_option_alone and dropout'"),
    ("dropout the same in every head", ALGEBRA, "(word(heads) + seeds[3])[None]", "(0 * word(heads) + seeds[3])[None]", "attention/test_contract.py -k bits_are_independent"),
    ("dropout depends on the shard", ALGEBRA, "word(rows) + seeds[2]", "word(rows)", "attention/test_contract.py -k sharding_or_order"),
    ("soft cap without its slope", f"{BLOCKWISE}/tile.py", "1.0 - bounded * bounded", "jnp.ones_like(bounded)", f"{OPERATOR}"),
    ("gradient of sinks has a wrong sign", f"{BLOCKWISE}/passes.py", "d_sinks = -(share * delta)", "d_sinks = (share * delta)", f"{OPERATOR}"),
    ("gradient forgets the lse", f"{BLOCKWISE}/passes.py", "* out).sum(-1) - d_lse.astype(compute)", "* out).sum(-1)", f"{OPERATOR}"),
    ("a tile too few is read", f"{BLOCKWISE}/plan.py", "needed & (q_high >= k_low), full", "needed & (q_high > k_low), full", "attention/test_contract.py -k first_key_of_a_tile"),
    # Decode
    ("decode reads a slot too many", "pallas_kernels/decode/algebra.py", "seen = distance >= 0", "seen = distance >= -1", "decode/test_decode.py -k filled_cache"),
    ("decode window one too wide", "pallas_kernels/decode/algebra.py", "seen & (distance < sliding_window)", "seen & (distance <= sliding_window)", "decode/test_decode.py -k filled_cache"),
    # Delta rule
    ("state is read before the write", f"{DELTA}/reference.py", "scale * product(_read, state, q)", "scale * product(_read, state - _outer(k, update), q)", "delta_rule/test_hugging_face.py"),
    ("residual without the decay", f"{DELTA}/reference.py", "v - product(_read, state, k)", "v - 0.5 * product(_read, state, k)", "delta_rule/test_hugging_face.py"),
    ("convolution reversed", CONV, "weight[width - 1 - lag]", "weight[lag]", "causal_conv/test_causal_conv.py -k values"),
    ("convolution leaks between documents", CONV, "window = jnp.where((same & rows.real)[..., None], window, 0)", "window = jnp.where(rows.real[..., None], window, 0)", "causal_conv/test_causal_conv.py -k values"),
    ("beta stays below 1", GATES, "beta = 2.0 * beta", "beta = 1.0 * beta", RECURRENCE),
    ("decay with a wrong sign of A", GATES, "product(-jnp.exp(A_log)", "product(-jnp.exp(-A_log)", RECURRENCE),
    ("beta and decay exchanged", GATES, "logits[..., :group],\n        logits[..., group:],", "logits[..., group:],\n        logits[..., :group],", RECURRENCE),
    # Caches
    ("ring written before it is read", f"{CACHE}/ring.py", "in_place = num_new <= self.capacity", "in_place = num_new <= 9 * self.capacity", "cache/test_policies.py -k ring_equals"),
    ("ring rewinds too far", f"{CACHE}/ring.py", "self.written - position <=", "self.length - position <=", "cache/test_policies.py -k rewind_of_a_ring"),
    ("ring forgets what it wrote", f"{CACHE}/ring.py", "newest - (newest - slot) % self.capacity", "slot", "cache/test_policies.py -k ring"),
    ("codes are cut, not rounded", f"{CACHE}/quantized.py", "jnp.round(codes) if whole", "jnp.trunc(codes) if whole", "cache/test_policies.py -k half_a_code"),
    ("common prefix leaves nothing to run", f"{CACHE}/prefix.py", "new.size - 1)", "new.size)", "cache/test_policies.py -k common_prefix"),
    # Layouts
    ("gate before query on disk", f"{LAYOUT}/qkv.py", "query, gate = (flatten(part, axis, 2)", "gate, query = (flatten(part, axis, 2)", "layout/test_qkv.py -k index_formula"),
    ("fused gate before query", f"{LAYOUT}/qkv.py", "query, gate, key, value = parts", "gate, query, key, value = parts", "layout/test_qkv.py -k index_formula"),
    # Mixtures
    ("weights of experts not divided by their sum", MOE, "weights = weights / weights.sum(axis=-1, keepdims=True)", "weights = weights", "models/test_moe.py -k loop_over_experts"),
    ("shared expert without its gate", MOE, "jax.nn.sigmoid(self.shared_gate(flat)) * self.shared(flat)", "self.shared(flat)", "models/test_moe.py -k loop_over_experts"),
    ("padding is counted by the router", MOE, "counted = real.reshape(-1).astype(jnp.float32)", "counted = counted", "models/test_moe.py -k padding"),
    ("gate and up exchanged", "gqa_jax/layers/mlp.py", "jax.nn.silu(gate_up[..., 0]) * gate_up[..., 1]", "jax.nn.silu(gate_up[..., 1]) * gate_up[..., 0]", "models/test_moe.py -k loop_over_experts"),
    # Training and generation
    ("clip is not shared by query and key", CLIP, "ClipFactors(eta**alpha, eta ** (1.0 - alpha))", "ClipFactors(eta, eta)", "train/test_training_aids.py -k threshold"),
    ("clip stretches small logits", CLIP, "eta = jnp.minimum(1.0, ", "eta = jnp.maximum(1.0, ", "train/test_training_aids.py -k threshold"),
    ("top p keeps a token too few", "gqa_jax/models/sampling.py", "before < sampling.top_p", "before + probability < sampling.top_p", "models/test_sampling.py"),
    ("temperature multiplies", "gqa_jax/models/sampling.py", "keepdims=True)) / sampling.temperature", "keepdims=True)) * sampling.temperature", "models/test_sampling.py"),
    ("rank stabilised scaling is plain", "gqa_jax/train/lora.py", "(self.rank**0.5 if self.use_rslora else self.rank)", "self.rank", "train/test_lora.py -k rank_stabilised"),
    ("adapter without its scaling", "gqa_jax/train/lora.py", "jnp.asarray(self.scaling, dtype)", "jnp.asarray(1.0, dtype)", "train/test_lora.py -k merge"),
    ("every layer has a window", "gqa_jax/models/layer_pattern.py", "tuple(not skipped for skipped in full)", "tuple(True for skipped in full)", "layers/test_self_attention_options.py -k layer_patterns"),
))  # fmt: skip


def copy_of_the_project(folder: pathlib.Path) -> pathlib.Path:
    """The tracked files as they are now, in `folder`, where faults do no harm."""
    listed = subprocess.run(
        ["git", "-C", ROOT, "ls-files"], capture_output=True, text=True, check=True
    )
    for name in listed.stdout.splitlines():
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    return folder


def survives(fault: Fault, copy: pathlib.Path) -> str:
    """ "" if its tests caught the fault, else what happened; the copy is as before afterwards."""
    path = copy / fault.file
    sound = path.read_text()
    path.write_text(sound.replace(fault.old, fault.new))
    chosen = shlex.split(f"tests/{fault.tests}")
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *chosen]
    try:
        environment = {**os.environ, "GQA_JAX_ALL": "1", "PYTHONDONTWRITEBYTECODE": "1"}
        ran = subprocess.run(
            command, cwd=copy, capture_output=True, text=True, env=environment, check=False
        )
    finally:
        path.write_text(sound)
    if ran.returncode == FAILED:
        return ""
    return f"pytest ended with {ran.returncode}: {' '.join(ran.stdout.splitlines()[-1:])}"


def main(words: list[str]) -> int:
    """Runs the faults whose name holds one of `words` (all without words); the exit status."""
    chosen = [f for f in FAULTS if not words or any(word in f.name for word in words)]
    survivors = 0
    with tempfile.TemporaryDirectory() as folder:
        copy = copy_of_the_project(pathlib.Path(folder))
        for fault in chosen:
            start = time.monotonic()
            what = survives(fault, copy)
            survivors += bool(what)
            verdict = f"SURVIVES ({what})" if what else "caught"
            print(f"{time.monotonic() - start:5.1f} s  {verdict:8}  {fault.name}", flush=True)
    print(f"{len(chosen) - survivors} of {len(chosen)} faults caught")
    return int(survivors > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
