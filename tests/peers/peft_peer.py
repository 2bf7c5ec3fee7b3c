"""Every kind of LoRA adapter that PEFT writes for a Llama: read exactly, or refused with the name of its setting.

PEFT makes the adapter, fills it with random values and saves it; what it computes after reading it again is right.
"""

import peft
import pytest
import torch
from flax import nnx
from peft.tuners.lora import config as settings
from transformers import LlamaConfig, LlamaForCausalLM

from gqa_jax import checkpoint, lora
from gqa_jax.train import lora_peft

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
ALL = [*ATTENTION, "gate_proj", "up_proj", "down_proj"]
RANKS = {"k_proj": 5, "layers.1.mlp.gate_proj": 2}
ALPHAS = {"q_proj": 20, "up_proj": 3, "^model.layers.0.self_attn.v_proj": 1}
BLOCKS = settings.BdLoraConfig(
    target_modules_bd_a=["o_proj"], target_modules_bd_b=["q_proj"], nblocks=2
)
TOKENS = torch.randint(40, (2, 9), generator=torch.Generator().manual_seed(0))

# Where nothing else is said, `target_modules` is ATTENTION.
EXACT = {
    "plain": {},
    "defaults": dict(target_modules=None),
    "q and v": dict(target_modules=["q_proj", "v_proj"]),
    "k": dict(target_modules=["k_proj"]),
    "mlp": dict(target_modules=ALL[4:]),
    "gate": dict(target_modules=["gate_proj"]),
    "all": dict(target_modules=ALL),
    "all-linear": dict(target_modules="all-linear"),
    "pattern": dict(target_modules=r".*\.(q|o)_proj"),
    "exclude": dict(exclude_modules=["o_proj"]),
    "layers": dict(layers_to_transform=[1], layers_pattern="layers"),
    "one layer": dict(layers_to_transform=2),
    "rank 1": dict(r=1),
    "alpha 0.5": dict(lora_alpha=0.5),
    "rank pattern": dict(target_modules=ALL, rank_pattern=RANKS),
    "alpha pattern": dict(target_modules=ALL, alpha_pattern=ALPHAS),
    "rslora": dict(use_rslora=True),
    "dora": dict(use_dora=True),
    "dora q and v": dict(target_modules=["q_proj", "v_proj"], use_dora=True),
    "dora up": dict(target_modules=["up_proj"], use_dora=True),
    "dora all": dict(target_modules=ALL, use_dora=True),
    "rslora dora": dict(target_modules=ALL, use_rslora=True, use_dora=True),
    "patterns, rslora, dora": dict(
        target_modules=ALL, rank_pattern=RANKS, alpha_pattern=ALPHAS, use_rslora=True, use_dora=True
    ),
    "dropout": dict(lora_dropout=0.1),
    "gaussian": dict(init_lora_weights="gaussian"),
    "random": dict(init_lora_weights=False),
    "orthogonal": dict(init_lora_weights="orthogonal", r=4),
    "mica": dict(init_lora_weights="mica"),
    "eva": dict(init_lora_weights="eva"),
    "fan_in_fan_out": dict(fan_in_fan_out=True),
    "qalora_group_size": dict(qalora_group_size=4),
    "ensure_weight_tying": dict(ensure_weight_tying=True),
    "megatron_core": dict(megatron_core="x"),
    "revision": dict(revision="main", task_type="CAUSAL_LM"),
    "pissa, converted": dict(init_lora_weights="pissa"),
    "olora, converted": dict(init_lora_weights="olora"),
    "pissa, rslora, converted": dict(init_lora_weights="pissa", use_rslora=True),
}
# They change more of the model than the sums of B A, or are another function than B A.
REFUSED = {
    "init_lora_weights": [
        dict(init_lora_weights=name) for name in ("pissa", "pissa_niter_4", "olora", "lora_ga")
    ],
    "bias": [dict(bias="all"), dict(bias="lora_only")],
    "lora_bias": [dict(lora_bias=True)],
    "modules_to_save": [dict(modules_to_save=["lm_head"])],
    "embed_tokens": [dict(target_modules=[*ATTENTION, "embed_tokens"])],
    "lm_head": [dict(target_modules=[*ATTENTION, "lm_head"])],
    "trainable_token_indices": [dict(trainable_token_indices=[1, 2])],
    "layer_replication": [dict(layer_replication=[[0, 2], [1, 3]])],
    "alora_invocation_tokens": [dict(alora_invocation_tokens=[5, 6], task_type="CAUSAL_LM")],
    "velora_config": [dict(velora_config=settings.VeloraConfig())],
    "kasa_config": [dict(kasa_config=settings.KasaConfig())],
    "monteclora_config": [dict(monteclora_config=settings.MontecloraConfig())],
    "use_bdlora": [dict(target_modules=["q_proj", "o_proj"], r=4, use_bdlora=BLOCKS)],
    "use_qalora": [dict(use_qalora=True, qalora_group_size=16)],
    "target_parameters": [dict(target_modules=[], target_parameters=["up_proj.weight"])],
}
forward = nnx.jit(lambda model, tokens: model(tokens))


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    sizes = dict(hidden_size=32, intermediate_size=24, num_hidden_layers=3, vocab_size=40)
    heads = dict(num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=32)
    config = LlamaConfig(**sizes, **heads, tie_word_embeddings=False, initializer_range=0.2)
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def write(base, folder, *, converted=False, **options):
    """PEFT's adapter in `folder`, and the logits of the model that PEFT reads from there."""
    load = lambda: LlamaForCausalLM.from_pretrained(base, dtype=torch.float32)
    options = dict(target_modules=ATTENTION, r=3, lora_alpha=6) | options
    model = peft.get_peft_model(load(), peft.LoraConfig(**options))
    way = {}
    if converted:
        config, start = model.peft_config["default"], folder / "start"
        config.init_lora_weights = True
        model.save_pretrained(start)
        config.init_lora_weights = options["init_lora_weights"]
        way = dict(path_initial_model_for_weight_conversion=str(start))
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            noise = torch.randn_like(parameter)
            parameter.data += (0.1 if "magnitude" in name else 0.2) * noise
    model.save_pretrained(folder, **way)
    return peft.PeftModel.from_pretrained(load(), folder).eval()(TOKENS).logits.detach()


@pytest.mark.parametrize("kind", EXACT)
def test_exact(kind, base, tmp_path):
    right = write(base, tmp_path, converted="converted" in kind, **EXACT[kind])
    model = checkpoint.load_hf(base, dtype="float32")
    lora_peft.load(model, tmp_path)
    for step in (lambda: None, lambda: lora.merge(model)):
        step()
        logits = torch.from_dlpack(forward(model, TOKENS.numpy()))
        torch.testing.assert_close(logits, right, rtol=0, atol=2e-5 * right.abs().max().item())


@pytest.mark.parametrize(
    ("setting", "options"), [(name, kind) for name, kinds in REFUSED.items() for kind in kinds]
)
def test_refused(setting, options, base, tmp_path):
    write(base, tmp_path, **options)
    with pytest.raises(ValueError, match=setting):
        lora_peft.load(checkpoint.load_hf(base, dtype="float32"), tmp_path)
