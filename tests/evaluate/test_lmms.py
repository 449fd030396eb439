# SPDX-License-Identifier: Apache-2.0
"""The model in lmms-eval: found by its entry point, asked by video, held to the real base class where that is there."""

import importlib
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import EntryPoint
from pathlib import Path
from types import ModuleType
from typing import Any

import benchmark_folders as folders
import pytest
from tiny_model import make_model

from hourllava.errors import HourLlavaError, InputError, VideoError
from hourllava.model import HourLlavaForConditionalGeneration

ROOT = Path(__file__).resolve().parents[2]
ADAPTER = "hourllava.evaluate.lmms"


@dataclass
class TokenCounts:
    output_tokens: int | None = None


@dataclass
class GenerationResult:
    text: str
    token_counts: TokenCounts | None = None


@dataclass
class Instance:
    """What the adapter reads of lmms-eval's own."""

    request_type: str
    arguments: tuple
    idx: int
    metadata: dict

    @property
    def args(self) -> tuple:
        return self.arguments


class Lmms:
    """What the adapter uses of lmms-eval's base class."""

    is_simple = True

    def __init__(self) -> None:
        self._rank, self._world_size, self.task_dict = 0, 1, {}
        self.cache_hook = type("CacheHook", (), {"add_partial": lambda *args: None})()

    @property
    def rank(self) -> int:
        return self._rank


@dataclass(frozen=True)
class ModelManifest:
    model_id: str
    chat_class_path: str | None = None


def stand_in() -> dict[str, ModuleType]:
    """lmms-eval's modules with no more in them than the adapter takes from them."""
    held: dict[str, dict[str, Any]] = {
        "lmms_eval": {},
        "lmms_eval.api": {},
        "lmms_eval.api.instance": {
            "GenerationResult": GenerationResult,
            "Instance": Instance,
            "TokenCounts": TokenCounts,
        },
        "lmms_eval.api.model": {"lmms": Lmms},
        "lmms_eval.models": {},
        "lmms_eval.models.registry_v2": {"ModelManifest": ModelManifest},
        "lmms_eval.models.model_utils": {},
        "lmms_eval.models.model_utils.gen_metrics": {"log_metrics": lambda *args: None},
    }
    modules = {name: ModuleType(name) for name in held}
    for name, contents in held.items():
        vars(modules[name]).update(contents)
    return modules


@pytest.fixture(params=["stand-in", "real"])
def harness(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The modules that the adapter imports: small ones of our own, or lmms-eval's."""
    if request.param == "real":
        pytest.importorskip("lmms_eval.api.model", reason="NOT TESTED: lmms-eval is not installed")
    else:
        for name, module in stand_in().items():
            monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, ADAPTER, raising=False)
    monkeypatch.setattr("hourllava.evaluate.lmms", None, raising=False)
    return request.param


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder, model = tmp_path_factory.mktemp("model"), make_model()
    model.save_pretrained(folder)
    model.tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("videos")
    folders.write_videos(folder, ["one", "two"])
    return {name: str(folder / f"{name}.mp4") for name in ("one", "two")}


@pytest.fixture
def make(harness: str, saved: str) -> Callable[..., Any]:
    """The adapter as lmms-eval makes it: of an argument string, and its own options."""

    def build(**options: Any) -> Any:
        adapter = importlib.import_module(ADAPTER).HourLlava
        given = {"pretrained": saved, **options}
        if harness == "real":
            text = ",".join(f"{name}={value}" for name, value in given.items())
            own = {"batch_size": 1, "max_batch_size": None, "device": "cpu"}
            return adapter.create_from_arg_string(text, own)
        return adapter(**{"batch_size": 1, "device": "cpu", **given})

    return build


def instance(number: int, options: dict[str, Any] | None = None) -> Any:
    """A request as lmms-eval builds it: the context, the messages' maker, options, document, task and split."""
    cls = importlib.import_module("lmms_eval.api.instance").Instance
    chosen = {"max_new_tokens": 4, "temperature": 0, "do_sample": False} if options is None else options
    arguments = ("context", lambda doc: doc["messages"], chosen, number, "films", "test")
    return cls("generate_until", arguments, 0, {"task": "films", "doc_id": number, "repeats": 1})


def turn(video: str | None, text: str, **more: Any) -> dict[str, Any]:
    content: list[dict[str, Any]] = [] if video is None else [{"type": "video", "url": video, **more}]
    return {"messages": [{"role": "user", "content": [*content, {"type": "text", "text": text}]}]}


@pytest.mark.parametrize("kept", [False, True])
def test_questions_are_asked_by_video_and_answered_in_order(
    kept: bool, make: Callable[..., Any], videos: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = make(budget="1/2", **({"memories": str(tmp_path / "memories")} if kept else {}))
    assert adapter.is_simple is False
    watched: list[str] = []
    owner, name = (adapter._watched, "memory") if kept else (adapter.model, "watch")
    watch = getattr(owner, name)
    monkeypatch.setattr(
        owner, name, lambda video, *args, **kwargs: watched.append(str(video)) or watch(video, *args, **kwargs)
    )
    asked: list[tuple[str, int, Any]] = []
    ask = HourLlavaForConditionalGeneration.ask

    def spy(model: Any, memory: Any, text: str, limit: int, budget: Any) -> Any:
        asked.append((text, limit, budget))
        return ask(model, memory, text, limit, budget=budget)

    monkeypatch.setattr(HourLlavaForConditionalGeneration, "ask", spy)
    order = ["one", "two", "one", "two", "one"]
    adapter.task_dict = {"films": {"test": [turn(videos[video], f"q{i}") for i, video in enumerate(order)]}}
    requests = [instance(number) for number in range(5)]
    results = adapter.generate_until(requests)
    assert watched == [videos["one"], videos["two"]]
    assert asked == [(text, 4, "1/2") for text in ("q0", "q2", "q4", "q1", "q3")]
    memory = adapter.model.watch(videos["two"], progress=False)
    expected = ask(adapter.model, memory, "q3", 4, budget="1/2").text
    assert results[3].text == expected
    assert results[3].token_counts.output_tokens == len(adapter.model.tokenizer.encode(expected))
    assert all(result is not None for result in results)


def test_an_answer_ends_before_the_texts_that_end_it(
    make: Callable[..., Any], videos: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = make()
    bird = folders.Parrot("B. red\n\nUser: and now? STOP")
    monkeypatch.setattr(HourLlavaForConditionalGeneration, "ask", lambda *args, **kwargs: bird(*args, **kwargs))
    adapter.task_dict = {"films": {"test": [turn(videos["one"], "q")]}}
    for until, text in [(["STOP", "\n\n"], "B. red"), ("STOP", "B. red\n\nUser: and now? "), ([], bird.reply(""))]:
        (result,) = adapter.generate_until([instance(0, {"until": until})])
        assert result.text == text
        assert result.token_counts.output_tokens == len(bird.reply(""))
    assert {options["max_new_tokens"] for _, _, options in bird.asked} == {128}


def said(*content: dict[str, Any]) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": list(content)}]}


BAD = {
    "two videos": lambda video: said({"type": "video", "url": video}, {"type": "video", "url": video}),
    "no video": lambda video: turn(None, "q"),
    "an image": lambda video: said({"type": "video", "url": video}, {"type": "image", "url": video}),
    "frames": lambda video: said({"type": "video", "url": [video, video]}),
    "two turns": lambda video: {"messages": turn(video, "q")["messages"] * 2},
}


@pytest.mark.parametrize("what", BAD)
def test_what_is_no_question_about_one_video(what: str, make: Callable[..., Any], videos: dict[str, str]) -> None:
    adapter = make()
    adapter.task_dict = {"films": {"test": [BAD[what](videos["one"])]}}
    with pytest.raises(InputError, match="films 0: it is not one question about one video file"):
        adapter.generate_until([instance(0)])


def test_what_it_does_not_do(make: Callable[..., Any], videos: dict[str, str], tmp_path: Path) -> None:
    adapter = make()
    adapter.task_dict = {"films": {"test": [turn(videos["one"], "q"), turn(videos["one"], "q", start_time=2.0)]}}
    for options in ({"do_sample": True}, {"temperature": 0.7}, {"num_beams": 4}):
        with pytest.raises(InputError, match="it wants sampling or beams"):
            adapter.generate_until([instance(0, options)])
    with pytest.raises(InputError, match="it is about a part of a video"):
        adapter.generate_until([instance(1)])
    adapter.task_dict["films"]["test"][0] = turn(str(tmp_path / "none.mp4"), "q")
    with pytest.raises(VideoError, match="there is no such file"):
        adapter.generate_until([instance(0)])
    for offered in (adapter.loglikelihood, adapter.generate_until_multi_round):
        with pytest.raises(NotImplementedError, match="hourllava answers generate_until tasks"):
            offered([])
    with pytest.raises(HourLlavaError, match="8 is not 1; leave it out"):
        importlib.import_module(ADAPTER).HourLlava(batch_size=8)
    with pytest.raises(InputError, match="'half' is no budget"):
        make(budget="half")


def test_the_entry_point_names_the_class(harness: str) -> None:
    """As pip writes it down: `manifest` gives the model's name and the path of its class."""
    tomllib = pytest.importorskip("tomllib", reason="NOT TESTED: Python 3.10 reads no TOML")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    ((name, value),) = project["entry-points"]["lmms_eval.models"].items()
    found = EntryPoint(name, value, "lmms_eval.models").load()()
    assert found.model_id == "hourllava"
    module, _, cls = found.chat_class_path.rpartition(".")
    assert getattr(importlib.import_module(module), cls).is_simple is False
    if harness == "real":
        registry = importlib.import_module("lmms_eval.models.registry_v2").ModelRegistryV2()
        registry.register_manifest(found)
        assert registry.get_model_class("hourllava").__name__ == "HourLlava"


def test_nothing_heavy_is_imported_for_the_entry_point() -> None:
    code = "import sys, hourllava.evaluate.lmms_manifest; assert not {'torch', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
