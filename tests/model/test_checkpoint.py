# SPDX-License-Identifier: Apache-2.0
"""The original's checkpoints at full depth: every tensor arrives, goes back bit for bit, and what is wrong is named."""

import json
import subprocess
import sys

import pytest
import torch
from original_checkpoint import (
    FLAT,
    LAYERS,
    TOWER,
    TOWER_LAYERS,
    VOCAB,
    WIDTH,
    original_tensors,
    write_checkpoint,
    write_tower_repository,
)
from safetensors.torch import load_file, save_file
from tiny_model import make_tokenizer
from transformers import AutoConfig, AutoModelForImageTextToText, configuration_utils

import hourllava
from hourllava.cli import main
from hourllava.errors import ModelError
from hourllava.model import HourLlavaConfig, HourLlavaForConditionalGeneration, convert_to_original

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
TOWER_NAME = "model.vision_tower.vision_tower.vision_model."


@pytest.fixture(scope="session")
def tensors():
    return original_tensors()


@pytest.fixture(scope="session")
def folder(tmp_path_factory, tensors):
    return write_checkpoint(tmp_path_factory.mktemp("original"), tensors, FLAT)


@pytest.fixture
def broken(tmp_path, tensors):
    """A checkpoint of its own that a test may break."""
    return write_checkpoint(tmp_path / "broken", tensors, FLAT)


def load(folder, **options):
    return HourLlavaForConditionalGeneration.from_pretrained(folder, **options)


def read_all(folder):
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def same_bits(ours, theirs):
    assert set(ours) == set(theirs)
    assert [name for name in theirs if not torch.equal(ours[name], theirs[name])] == []
    assert all(ours[name].dtype == theirs[name].dtype for name in theirs)


@pytest.mark.parametrize("model_type", ["hour_llava_qwen", "llava", "qwen2", None])
def test_every_tensor_arrives(tmp_path, tensors, model_type):
    config = {name: value for name, value in FLAT.items() if name != "model_type"}
    config |= {} if model_type is None else {"model_type": model_type}
    model = load(write_checkpoint(tmp_path / "original", tensors, config))
    same_bits(model.state_dict(), tensors | {HEAD: tensors[EMBEDDING]})
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert len(model.model.layers) == LAYERS
    assert model.config.vision_config.num_hidden_layers == TOWER_LAYERS
    assert model.config.vision_config.image_size == 384
    assert model.config.vision_config.num_attention_heads == 16


def test_there_and_back(folder, tensors, tmp_path, capsys):
    model = load(folder)
    model.save_pretrained(tmp_path / "ours", max_shard_size="200KB")
    assert json.loads((tmp_path / "ours" / "config.json").read_text())["model_type"] == "hour_llava"
    assert len(list((tmp_path / "ours").glob("*.safetensors"))) > 1
    same_bits(load(tmp_path / "ours").state_dict(), model.state_dict())
    assert main(["convert", str(tmp_path / "ours"), "-o", str(tmp_path / "back")]) == 0
    assert "model.safetensors" in capsys.readouterr().out
    same_bits(read_all(tmp_path / "back"), tensors)
    assert json.loads((tmp_path / "back" / "config.json").read_text()) == FLAT
    convert_to_original(tmp_path / "ours", tmp_path / "shards", shard=200_000)
    index = json.loads((tmp_path / "shards" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(tensors)
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    same_bits(read_all(tmp_path / "shards"), tensors)
    same_bits(load(tmp_path / "shards").state_dict(), model.state_dict())


HEADS = {
    "tied": (True, None, True),
    "tied and stored": (True, "equal", True),
    "told tied, stored otherwise": (True, "other", False),
    "stored": (False, "other", False),
    "not told, absent": (None, None, True),
    "not told, stored": (None, "other", False),
}


@pytest.mark.parametrize("case", HEADS)
def test_head(tmp_path, tensors, case):
    told, stored, tied = HEADS[case]
    config = {k: v for k, v in FLAT.items() if k != "tie_word_embeddings"}
    config |= {} if told is None else {"tie_word_embeddings": told}
    given = dict(tensors)
    if stored:
        given[HEAD] = tensors[EMBEDDING].clone() if stored == "equal" else torch.randn(VOCAB, WIDTH).bfloat16()
    model = load(write_checkpoint(tmp_path / "original", given, config))
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    assert torch.equal(model.lm_head.weight, given.get(HEAD, given[EMBEDDING]))
    model.save_pretrained(tmp_path / "ours")
    again = load(tmp_path / "ours")
    assert (again.lm_head.weight is again.model.embed_tokens.weight) == tied
    convert_to_original(tmp_path / "ours", tmp_path / "back")
    same_bits(read_all(tmp_path / "back"), given)


def test_untied_head_is_missing(tmp_path, tensors):
    folder = write_checkpoint(tmp_path / "original", tensors, FLAT | {"tie_word_embeddings": False})
    with pytest.raises(ModelError, match=f"1 missing \\({HEAD}\\)"):
        load(folder)


@pytest.mark.parametrize("how", ["argument", "config", "beside"])
def test_tower_from_its_own_repository(tmp_path, how):
    tower = write_tower_repository(tmp_path / "original" / "siglip")
    named = {"argument": "google/siglip-so400m-patch14-384", "config": str(tmp_path / "original" / "siglip")}
    config = FLAT | {"mm_vision_tower": named.get(how, "siglip")}
    tensors = original_tensors(tower=False)
    folder = write_checkpoint(tmp_path / "original", tensors, config)
    options = {"vision_tower": tmp_path / "original" / "siglip"} if how == "argument" else {}
    model = load(folder, **options)
    state = model.state_dict()
    ours = {name.removeprefix(TOWER_NAME): tensor for name, tensor in state.items() if name.startswith(TOWER_NAME)}
    theirs = {name.removeprefix("vision_model."): t for name, t in tower.items() if name.startswith("vision_model.")}
    run = {n: t for n, t in theirs.items() if not n.startswith((f"encoder.layers.{TOWER_LAYERS}.", "head."))}
    same_bits(ours, {name: tensor.bfloat16() for name, tensor in run.items()})
    assert model.config.vision_config.num_attention_heads == 4
    model.save_pretrained(tmp_path / "ours")
    again = load(tmp_path / "ours")
    same_bits(again.state_dict(), state)
    assert again.config.vision_config.num_attention_heads == 4


def test_no_tower_anywhere(tmp_path):
    folder = write_checkpoint(tmp_path / "original", original_tensors(tower=False), FLAT)
    with pytest.raises(ModelError, match=r"holds no vision tower.*vision_tower=") as caught:
        load(folder)
    assert "\n" not in str(caught.value)


def test_all_that_does_not_fit_is_named_at_once(tmp_path, tensors):
    wrong = dict(tensors)
    missing = ["model.norm.weight", "model.vision_resampler.layers.3.norm2.bias", f"{TOWER_NAME}post_layernorm.bias"]
    for name in missing:
        del wrong[name]
    wrong["model.faster_token"] = torch.zeros(WIDTH)
    wrong["model.image_newline"] = torch.zeros(WIDTH + 1)
    with pytest.raises(ModelError) as caught:
        load(write_checkpoint(tmp_path / "original", wrong, FLAT))
    line = str(caught.value)
    assert "\n" not in line
    assert "3 missing" in line
    assert "1 unexpected (model.faster_token)" in line
    assert f"1 mis-shaped (model.image_newline is [{WIDTH + 1}] and should be [{WIDTH}])" in line
    assert all(name in line for name in missing)


def test_many_that_are_missing_are_counted(tmp_path, tensors):
    few = {name: tensor for name, tensor in tensors.items() if ".mlp." not in name or TOWER_NAME in name}
    with pytest.raises(ModelError, match=r"\d+ missing \(.* and \d+ more\)") as caught:
        load(write_checkpoint(tmp_path / "original", few, FLAT))
    assert len(str(caught.value)) < 2000


SECOND = "model-00002-of-00003.safetensors"
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 4932307584\n"


def cut_in_half(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip_header(path):
    whole = bytearray(path.read_bytes())
    whole[20] ^= 0x55
    path.write_bytes(whole)


BREAKS = {
    "shard missing": (SECOND, lambda path: path.unlink(), "is missing"),
    "shard cut short": (SECOND, cut_in_half, "damaged or cut short"),
    "shard's header": (SECOND, flip_header, "damaged or cut short"),
    "shard is a pointer": (SECOND, lambda path: path.write_bytes(POINTER), "Git LFS pointer"),
    "shard is empty": (SECOND, lambda path: path.write_bytes(b""), "is empty"),
    "index cut short": ("model.safetensors.index.json", cut_in_half, "damaged"),
    "index missing": ("model.safetensors.index.json", lambda path: path.unlink(), "is missing"),
    "config missing": ("config.json", lambda path: path.unlink(), "is missing"),
    "config cut short": ("config.json", cut_in_half, "damaged"),
    "config is a list": ("config.json", lambda path: path.write_text("[]"), "no JSON object"),
    "config without sizes": ("config.json", lambda path: path.write_text('{"hidden_size": 32}'), "vocab_size"),
}


@pytest.mark.parametrize("case", BREAKS)
def test_broken_file(broken, case):
    file, damage, said = BREAKS[case]
    damage(broken / file)
    with pytest.raises(ModelError, match=said) as caught:
        load(broken)
    line = str(caught.value)
    assert "\n" not in line
    assert str(broken) in line or "config.json" in line
    assert file in line or said == "vocab_size" or file.startswith("model.safetensors")


def test_convert_refuses(folder, tmp_path, capsys):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "note.txt").write_text("mine")
    assert main(["convert", str(folder), "-o", str(tmp_path / "full")]) == 1
    assert "something already" in capsys.readouterr().err
    assert main(["convert", str(tmp_path / "absent"), "-o", str(tmp_path / "new")]) == 1
    assert "no such model" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_a_model_of_ours_goes_to_the_originals_layout(tmp_path):
    model = HourLlavaForConditionalGeneration(hourllava.model.tiny_config(vocab_size=64))
    model.save_pretrained(tmp_path / "ours")
    convert_to_original(tmp_path / "ours", tmp_path / "original")
    flat = json.loads((tmp_path / "original" / "config.json").read_text())
    assert flat["model_type"] == "hour_llava_qwen"
    assert flat["hidden_size"] == 96
    assert "text_config" not in flat
    again = load(tmp_path / "original")
    same_bits(again.state_dict(), model.state_dict())
    assert again.config.vision_config.num_attention_heads == 2


def test_what_the_originals_config_cannot_say_is_told(folder, tmp_path, capsys):
    fields = {"video_grid": 4, "time_instruction": False, "max_kept_frames": 32, "memory_budget": "1/64,32p"}
    config = hourllava.model.tiny_config(vocab_size=64, **(fields | {"min_frames": 128}))
    HourLlavaForConditionalGeneration(config).save_pretrained(tmp_path / "ours")
    assert main(["convert", str(tmp_path / "ours"), "-o", str(tmp_path / "flat")]) == 0
    told = capsys.readouterr().out.splitlines()
    assert told[1].endswith("config: max_kept_frames 512 (here 32), memory_budget all (here 1/64,32p)")
    assert told[2].endswith("flat', max_kept_frames=32, memory_budget='1/64,32p')")
    again = load(tmp_path / "flat", max_kept_frames=32, memory_budget="1/64,32p").config
    assert {name: getattr(again, name) for name in fields} == fields
    assert main(["convert", str(folder), "-o", str(tmp_path / "same")]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 1  # what was the original's loses nothing


def test_fields_can_be_changed_while_loading(folder):
    model = load(folder, min_frames=4, spatial_forgetting="uniform", dtype=torch.float32)
    assert (model.config.min_frames, model.config.spatial_forgetting) == (4, "uniform")
    assert model.model.image_newline.dtype == torch.float32
    assert model.config.vision_config.hidden_size == TOWER


def test_auto_classes_know_the_originals_name(folder, tensors):
    assert type(AutoConfig.from_pretrained(folder)) is HourLlavaConfig
    model = AutoModelForImageTextToText.from_pretrained(folder)
    assert torch.equal(model.model.image_newline, tensors["model.image_newline"])


def test_a_config_of_the_originals_is_read_without_a_warning(folder, monkeypatch):
    said = []
    monkeypatch.setattr(configuration_utils.logger, "warning", lambda *words: said.append(words))
    config = HourLlavaConfig.from_pretrained(folder)
    assert not said
    assert type(config) is HourLlavaConfig
    assert config.to_dict() == HourLlavaConfig.from_original(FLAT).to_dict()


def test_the_originals_tokenizer(broken):
    """Its Qwen2 tokenizer is vocabulary and merges, without a token for the image."""
    letters = make_tokenizer().get_vocab()
    for number, token in enumerate(["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>"]):
        letters.pop(token)
        assert number >= 0
    (broken / "vocab.json").write_text(json.dumps({letter: number for number, letter in enumerate(letters)}))
    (broken / "merges.txt").write_text("#version: 0.2\n")
    added = {"<|endoftext|>": 256, "<|im_start|>": 257, "<|im_end|>": 258, "<image>": 259}
    (broken / "added_tokens.json").write_text(json.dumps(added))
    named = {"tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    named["additional_special_tokens"] = ["<|im_start|>", "<|im_end|>"]
    (broken / "tokenizer_config.json").write_text(json.dumps(named))
    model = hourllava.load_model(broken)
    assert model.tokenizer.convert_tokens_to_ids("<image>") == model.config.image_token_id
    assert 256 <= model.config.image_token_id < VOCAB
    ids = model.tokenizer.encode("<|im_start|>user\n<image>\nWho?<|im_end|>")
    assert model.image_tokens(torch.tensor([ids])).sum() == 1
    assert model.tokenizer.decode(ids) == "<|im_start|>user\n<image>\nWho?<|im_end|>"
    assert model.config.time_instruction


SIZES = {
    "3B": (2048, 11008, 36, 16, 2, 151936, True, 3_700_088_352),
    "3B with its head stored": (2048, 11008, 36, 16, 2, 151936, False, 4_011_253_280),
    "7B": (3584, 18944, 28, 28, 4, 152064, False, 8_676_494_880),
}


@pytest.mark.parametrize("name", SIZES)
def test_parameters_of_the_released_models(name):
    width, inner, layers, heads, kv_heads, vocab, tied, total = SIZES[name]
    flat = FLAT | {"hidden_size": width, "intermediate_size": inner, "num_hidden_layers": layers, "vocab_size": vocab}
    flat |= {"num_attention_heads": heads, "num_key_value_heads": kv_heads, "tie_word_embeddings": tied}
    config = HourLlavaConfig.from_original(flat | {"mm_hidden_size": 1152})
    with torch.device("meta"):
        model = HourLlavaForConditionalGeneration(config)
    assert sum(parameter.numel() for parameter in model.parameters()) == total


PEAK = """
import os, sys, threading, time, torch
from hourllava.model import HourLlavaForConditionalGeneration

def resident():
    told = dict(line.split(":") for line in open("/proc/self/status") if ":" in line)
    return [int(told[name].split()[0]) * 1024 for name in ("VmRSS", "RssAnon")]

before, peak, done = resident(), [0, 0], False
def sample():
    while not done:
        peak[:] = map(max, peak, resident())
        time.sleep(0.002)
thread = threading.Thread(target=sample)
thread.start()
model = HourLlavaForConditionalGeneration.from_pretrained(sys.argv[1], dtype=getattr(torch, sys.argv[2]))
for parameter in model.parameters():
    parameter.sum()
done = True
thread.join()
print(peak[0] - before[0], peak[1] - before[1], sum(p.nbytes for p in model.parameters()))
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """200 MB of bfloat16 weights in files of 40 MB."""
    decoder = {"vocab_size": 8000, "hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 18}
    decoder |= {"num_attention_heads": 8, "num_key_value_heads": 2}
    with torch.device("meta"):
        model = HourLlavaForConditionalGeneration(HourLlavaConfig(text_config=decoder)).to(torch.bfloat16)
    model = model.to_empty(device="cpu")
    folder = tmp_path_factory.mktemp("large")
    model.save_pretrained(folder, max_shard_size="40MB")
    return folder


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="NOT TESTED: only Linux tells memory by kind")
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_loading_takes_one_copy_of_the_weights(large, dtype):
    """What is mapped from a file is not counted where it is converted: the system may drop it at any time."""
    run = [sys.executable, "-c", PEAK, str(large), dtype]
    done = subprocess.run(run, capture_output=True, text=True, check=True, env={"PYTHONPATH": ":".join(sys.path)})
    resident, own, weights = map(int, done.stdout.split())
    assert weights > 150e6
    assert (resident if dtype == "bfloat16" else own) < 1.2 * weights


def test_a_shard_without_its_format_note(broken):
    """Files of other tools hold no note that says "pt"."""
    path = broken / SECOND
    save_file(load_file(path), path)
    assert load(broken).config.memaug_depth == 4


def test_a_repository_in_the_hubs_cache(tmp_path, tensors):
    commit = "0123456789abcdef0123456789abcdef01234567"
    place = tmp_path / "models--jylins--narrow"
    write_checkpoint(place / "snapshots" / commit, tensors, FLAT)
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text(commit)
    hub = {"cache_dir": tmp_path, "local_files_only": True}
    assert torch.equal(load("jylins/narrow", **hub).model.image_newline, tensors["model.image_newline"])
    with pytest.raises(ModelError, match="jylins/absent: there is no such model"):
        load("jylins/absent", **hub)
