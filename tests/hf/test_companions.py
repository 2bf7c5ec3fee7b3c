"""What stands beside the weights: what load_hf reads and save_hf writes is a folder that transformers can use."""

import dataclasses
import json
import shutil

import jax.numpy as jnp
import numpy as np
import pytest

from gqa_jax import DecoderConfig, checkpoint, generate
from tests.hf.hf_models import build

pytestmark = pytest.mark.torch
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

TEMPLATE = "{% for m in messages %}<{{ m.role }}> {{ m.content }} {% endfor %}"
PROMPT = "w3 w14 w15 w9"


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A folder with all that an author publishes; the model ends after three tokens, says generation_config.json."""
    folder = tmp_path_factory.mktemp("published")
    model = build("llama", seed=9, max_position_embeddings=123, bos_token_id=1, eos_token_id=60)
    words = {f"w{i}": i for i in range(61)}
    plain = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w0"))
    plain.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=plain, eos_token="w2", pad_token="w4", model_max_length=77
    )
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    tokens = torch.tensor([tokenizer(PROMPT)["input_ids"]])
    greedy = model.generate(tokens, do_sample=False, max_new_tokens=8, eos_token_id=None)[0, 4:]
    end = greedy[2].item()
    model.generation_config.update(
        eos_token_id=[end, 2], pad_token_id=4, temperature=0.6, do_sample=True
    )
    model.save_pretrained(folder)
    (folder / "merges.txt").write_text("#version\n")
    (folder / "secret.txt").write_text("not ours, not theirs")
    assert end not in greedy[:2].tolist()
    return folder, greedy[:3].tolist(), end


def test_a_copy_is_a_usable_folder(published, tmp_path):
    folder, expected, end = published
    decoder = checkpoint.load_hf(folder)
    assert decoder.config.stop_tokens == (end, 2)
    assert decoder.config.pad_token == 4
    checkpoint.save_hf(decoder, tmp_path)
    kept = {p.name for p in folder.iterdir()} - {"secret.txt"}
    assert {p.name for p in tmp_path.iterdir()} == kept
    for name in kept - {"config.json", "model.safetensors"}:
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes(), name
    fields = json.loads((tmp_path / "config.json").read_text())
    assert fields["max_position_embeddings"] == 123
    assert fields["bos_token_id"] == 1
    assert fields["dtype"] == "float32"

    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer.model_max_length == 77
    message = [{"role": "w5", "content": "w6"}]
    assert tokenizer.apply_chat_template(message, tokenize=False) == "<w5> w6 "
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    tokens = torch.tensor([tokenizer(PROMPT)["input_ids"]])
    theirs = model.generate(tokens, do_sample=False, max_new_tokens=8)[0, 4:].tolist()
    assert theirs == expected
    again = checkpoint.load_hf(tmp_path)
    ours = generate(again, tokens.numpy(), 8)
    assert ours.to_lists() == [expected]
    assert ours.tokens[0].tolist() == expected + [4] * 5
    assert dataclasses.replace(again.config, source=None) == dataclasses.replace(
        decoder.config, source=None
    )


def test_what_the_user_says_wins(published, tmp_path):
    folder, _, end = published
    config = dataclasses.replace(DecoderConfig.from_hf(folder), stop_tokens=(5,), pad_token=None)
    decoder = checkpoint.load_hf(folder, config=config)
    checkpoint.save_hf(decoder, tmp_path / "changed")
    read = DecoderConfig.from_hf(tmp_path / "changed")
    assert (read.stop_tokens, read.pad_token) == ((5,), None)
    generation = json.loads((tmp_path / "changed/generation_config.json").read_text())
    assert generation["temperature"] == 0.6
    extra = {"eos_token_id": [7, 8], "max_position_embeddings": 9}
    checkpoint.save_hf(decoder, tmp_path / "told", extra_config=extra)
    assert DecoderConfig.from_hf(tmp_path / "told").stop_tokens == (7, 8)
    fields = json.loads((tmp_path / "told/config.json").read_text())
    assert fields["max_position_embeddings"] == 9
    assert end not in (5, 7, 8)


def test_sources_that_are_gone_given_or_the_same(published, tmp_path):
    moved = shutil.copytree(published[0], tmp_path / "moved")
    decoder = checkpoint.load_hf(moved)
    checkpoint.save_hf(decoder, moved)  # onto itself
    assert (moved / "tokenizer.json").is_file()
    shutil.rmtree(moved)
    with pytest.warns(UserWarning, match="moved, which the decoder was loaded from, is gone"):
        checkpoint.save_hf(decoder, tmp_path / "bare")
    assert not (tmp_path / "bare/tokenizer.json").exists()
    assert DecoderConfig.from_hf(tmp_path / "bare").stop_tokens == decoder.config.stop_tokens
    checkpoint.save_hf(decoder, tmp_path / "again", source=published[0])
    assert (tmp_path / "again/tokenizer.json").is_file()
    with pytest.raises(ValueError, match="must be a config.json or a folder that holds one"):
        checkpoint.save_hf(decoder, tmp_path / "none", source=tmp_path)
    with pytest.raises(ValueError, match=r"`ignore` must be empty when `config` is given"):
        checkpoint.load_hf(tmp_path / "bare", config=decoder.config, ignore=("a",))
    loaded = checkpoint.load_hf(tmp_path / "again", dtype=jnp.bfloat16)
    assert loaded.config.source == str(tmp_path / "again")
    assert np.asarray(loaded.norm.scale[...]).dtype == jnp.bfloat16
