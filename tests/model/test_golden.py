# SPDX-License-Identifier: Apache-2.0
"""The original system's tensors: given its weights and its picks, our numbers are its numbers."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from hourllava.model import HourLlavaConfig, HourLlavaForConditionalGeneration

FOLDER = Path(__file__).resolve().parents[3] / "shared" / "golden"
CASES = sorted(path for path in FOLDER.glob("*.safetensors") if path.stem != "checkpoint")


def metadata(path):
    with safe_open(path, "pt") as file:
        return file.metadata()


def is_video(path):
    return json.loads(metadata(path)["modalities"]) == ["video"]


VIDEO_CASES = [path for path in CASES if is_video(path)]
OTHER_CASES = [path for path in CASES if path not in VIDEO_CASES]


def relative_error(ours, theirs):
    assert ours.shape == theirs.shape
    return float(((ours - theirs).norm() / theirs.norm()).detach())


class Recorder:
    """What goes into MemAug and what comes out."""

    def __init__(self, memaug):
        write = memaug.write

        def recorded_write(tokens, layout):
            self.tokens, self.layout = tokens, layout
            return write(tokens, layout)

        memaug.write = recorded_write
        memaug.register_forward_hook(self.record)

    def record(self, module, arguments, result):
        self.query, self.stream = arguments[:2]
        self.output = result[0]


@pytest.fixture
def model():
    config = HourLlavaConfig.from_original(json.loads((FOLDER / "config.json").read_text()))
    model = HourLlavaForConditionalGeneration(config)
    model.load_state_dict(load_file(FOLDER / "checkpoint.safetensors"))
    return model


def test_cases_were_found():
    if not FOLDER.is_dir():
        pytest.skip(f"NOT TESTED AGAINST THE ORIGINAL: there is no {FOLDER}")
    assert VIDEO_CASES, f"{FOLDER} holds no video case"


@pytest.mark.parametrize("path", VIDEO_CASES, ids=lambda path: path.stem)
def test_video_case(model, path):
    case = load_file(path)
    recorder = Recorder(model.model.vision_resampler)
    result = model(
        case["input_ids"],
        labels=case["labels"],
        video_features=[case["features.0"]],
        picks=[case["spatial_picks.0"].long()],
    )
    result.loss.backward()

    assert torch.equal(recorder.stream.position_ids, case["memaug.0.query_positions"].long())
    # The memory lies in pages, visual tokens first: its rows are the original's in another order.
    memory_positions, order = recorder.layout.position_ids.sort()
    assert torch.equal(memory_positions, case["memaug.0.memory_positions"].long())
    if "memaug.0.memory" in case:
        assert relative_error(recorder.tokens[order], case["memaug.0.memory"]) < 2e-5
    assert relative_error(recorder.query, case["memaug.0.query"]) < 2e-5
    assert relative_error(recorder.output, case["memaug.0.output"]) < 2e-5
    assert relative_error(result.logits, case["logits"]) < 2e-5
    assert abs(float(result.loss.detach()) - float(case["loss"])) < 1e-6
    parameters = dict(model.named_parameters())
    gradients = {name.removeprefix("grad."): value for name, value in case.items() if name.startswith("grad.")}
    assert gradients
    for name, gradient in gradients.items():
        assert relative_error(parameters[name].grad, gradient) < 1e-4, name


@pytest.mark.parametrize("path", VIDEO_CASES, ids=lambda path: path.stem)
def test_our_uniform_picks_are_the_originals(model, path):
    if metadata(path)["spatial_forgetting"] != "uniform":
        pytest.skip("the original drew this case's picks at random; ours are seeded")
    case = load_file(path)
    model.config.spatial_forgetting = "uniform"
    arguments = {"labels": case["labels"], "video_features": [case["features.0"]]}
    given = model(case["input_ids"], **arguments, picks=[case["spatial_picks.0"].long()])
    assert torch.equal(model(case["input_ids"], **arguments).logits, given.logits)


@pytest.mark.parametrize("path", OTHER_CASES, ids=lambda path: path.stem)
def test_other_case(path):
    pytest.skip(f"NOT COVERED YET: {path.stem} holds {metadata(path)['modalities']}; only the video path exists")
