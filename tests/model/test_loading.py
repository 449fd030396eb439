# SPDX-License-Identifier: Apache-2.0
"""Models from directories: what is saved comes back, and what is not whole says so in one line."""

import subprocess
import sys

import pytest
import torch
from tiny_model import make_model
from transformers import AutoModelForImageTextToText

import hourllava
from hourllava.errors import HourLlavaError, ModelError
from hourllava.model import best_device, load_model


@pytest.fixture
def folder(tmp_path):
    make_model().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_saved_model_comes_back_with_its_tokenizer(folder):
    frames = torch.randint(0, 256, (9, 3, 64, 64), dtype=torch.uint8)
    answers = []
    for model in (make_model(), hourllava.load_model(folder), AutoModelForImageTextToText.from_pretrained(folder)):
        answers.append(model.ask(model.watch(frames, progress=False), "What is it?"))
    assert answers[0].top_tokens == answers[1].top_tokens == answers[2].top_tokens


def test_no_such_model(tmp_path):
    with pytest.raises(ModelError, match="there is no such model") as caught:
        hourllava.load_model(tmp_path / "none")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("file", ["config.json", "model.safetensors", "tokenizer.json"])
def test_file_is_missing(folder, file):
    (folder / file).unlink()
    with pytest.raises(ModelError, match=f"{file} is missing"):
        hourllava.load_model(folder)


@pytest.mark.parametrize("file", ["config.json", "model.safetensors"])
def test_file_is_damaged(folder, file):
    whole = (folder / file).read_bytes()
    (folder / file).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ModelError) as caught:
        hourllava.load_model(folder)
    assert "\n" not in str(caught.value)


def test_exports_are_lazy_and_whole():
    code = "import hourllava, sys; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": ":".join(sys.path)})
    assert [getattr(hourllava, name).__name__ for name in hourllava.__all__] == hourllava.__all__
    assert issubclass(ModelError, HourLlavaError)
    with pytest.raises(AttributeError, match="has no attribute"):
        hourllava.nothing  # noqa: B018


def test_best_device_is_a_gpu_if_there_is_one(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert best_device() == best_device(3) == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert best_device() == torch.device("cuda", 0)
    assert best_device(3) == torch.device("cuda", 1)
    monkeypatch.setenv("LOCAL_RANK", "1")  # as torchrun says it
    assert best_device() == torch.device("cuda", 1)
    assert best_device(0) == torch.device("cuda", 0)


def test_a_model_is_where_it_is_wanted():
    assert load_model("tiny").device.type == "cpu"
    assert load_model("tiny", device="meta").device.type == "meta"
