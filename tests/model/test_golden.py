# SPDX-License-Identifier: Apache-2.0
"""The original system's tensors: given its weights and its picks, our numbers are its numbers."""

import json
from itertools import count
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from hourllava.memory.pages import PAGE_SIZE
from hourllava.model import HourLlavaConfig, HourLlavaForConditionalGeneration

FOLDER = Path(__file__).resolve().parents[3] / "shared" / "golden"
CASES = sorted(path for path in FOLDER.glob("*.safetensors") if path.stem != "checkpoint")


def metadata(path):
    with safe_open(path, "pt") as file:
        return file.metadata()


def relative_error(ours, theirs):
    assert ours.shape == theirs.shape
    # What the original computed as zero must be zero.
    return float(((ours - theirs).norm() / theirs.norm().clamp(min=1e-30)).detach())


def arguments_of(path, case):
    """The case as arguments of `forward`: lists go by <image> marks, where the original's go by samples and calls."""
    notes = metadata(path)
    sizes = json.loads(notes["image_sizes"])
    entries, calls = iter(zip(json.loads(notes["modalities"]), sizes, count())), count()
    forward = {"vision_features": [], "modalities": [], "image_sizes": [], "spatial_picks": []}

    def picks():
        return case[f"spatial_picks.{next(calls)}"].long()

    for ids in case["input_ids"]:
        marks = int((ids == -200).sum())
        group = [next(entries, ("text", None, 0)) for _ in range(max(marks, 1))]
        if marks == 0:
            # The original looks at a black picture with every prompt of text, and throws away what it sees.
            next(calls)
            continue
        features = [case[f"features.{index}"] for _, _, index in group]
        forward["vision_features"] += features
        forward["modalities"] += [modality for modality, _, _ in group]
        # They write (width, height).
        tiled = marks == 1 and group[0][0] == "image" and len(features[0]) > 1
        forward["image_sizes"] += [tuple(group[0][1][::-1])] if tiled else [None] * marks
        chosen = [picks()] if group[0][0] == "video" else list(picks())
        forward["spatial_picks"] += [torch.cat([chosen[0], features[0].shape[1] + picks()[0]])] if tiled else chosen
    mask = case.get("attention_mask")
    return {"input_ids": case["input_ids"], "labels": case["labels"], "attention_mask": mask, **forward}


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

    def assert_call_is(self, number, theirs):
        """What sample `number` of the batch gave MemAug, and got, is what the original did."""
        rows = slice(*self.stream.cu_seqlens[number : number + 2].tolist())
        assert torch.equal(self.stream.position_ids[rows], theirs["query_positions"].long())
        page = self.layout.slots // PAGE_SIZE
        mine = torch.isin(page, self.layout.page_table[number].long()).nonzero()[:, 0]
        # The memory lies in pages: its rows are the original's in another order, and ids may occur more than once.
        ids, order = self.layout.position_ids[mine].sort(stable=True)
        their_ids, their_order = theirs["memory_positions"].long().sort(stable=True)
        assert torch.equal(ids, their_ids)
        if "memory" in theirs:
            assert relative_error(self.tokens[mine[order]], theirs["memory"][their_order]) < 2e-5
        assert relative_error(self.query[rows], theirs["query"]) < 2e-5
        assert relative_error(self.output[rows], theirs["output"]) < 2e-5


@pytest.fixture
def model():
    config = HourLlavaConfig.from_original(json.loads((FOLDER / "config.json").read_text()))
    model = HourLlavaForConditionalGeneration(config)
    model.load_state_dict(load_file(FOLDER / "checkpoint.safetensors"))
    return model


def test_cases_were_found():
    if not FOLDER.is_dir():
        pytest.skip(f"NOT TESTED AGAINST THE ORIGINAL: there is no {FOLDER}")
    seen = {modality for path in CASES for modality in json.loads(metadata(path)["modalities"])}
    assert {"video", "image"} <= seen


@pytest.mark.parametrize("path", CASES, ids=lambda path: path.stem)
def test_case(model, path):
    case = load_file(path)
    recorder = Recorder(model.model.vision_resampler)
    result = model.train()(**arguments_of(path, case))
    result.loss.backward()

    assert relative_error(result.logits, case["logits"]) < 2e-5
    assert abs(float(result.loss.detach()) - float(case["loss"])) < 1e-6
    with_marks = [number for number, ids in enumerate(case["input_ids"]) if (ids == -200).any()]
    for number in with_marks:
        recorder.assert_call_is(number, {k.split(".", 2)[2]: v for k, v in case.items() if f"memaug.{number}." in k})
    parameters = dict(model.named_parameters())
    gradients = {name.removeprefix("grad."): value for name, value in case.items() if name.startswith("grad.")}
    assert gradients
    for name, gradient in gradients.items():
        assert relative_error(parameters[name].grad, gradient) < 1e-4, name


@pytest.mark.parametrize("path", CASES, ids=lambda path: path.stem)
def test_our_uniform_picks_are_the_originals(model, path):
    if metadata(path)["spatial_forgetting"] != "uniform":
        pytest.skip("the original drew this case's picks at random; ours are seeded")
    arguments = arguments_of(path, load_file(path))
    given = model(**arguments)
    del arguments["spatial_picks"]
    assert torch.equal(model(**arguments, spatial_forgetting="uniform").logits, given.logits)
