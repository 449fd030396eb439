# SPDX-License-Identifier: Apache-2.0
"""Mixtures: which entries are taken, from where, and what a YAML file must not say."""

import numpy as np
import pytest
from conversations import talk, write_lines
from memories import SmallWriter, make_frames

from hourllava.data.failures import FailureLog
from hourllava.data.mixture import choose, load_mixture
from hourllava.data.samples import memory_name
from hourllava.errors import DataError
from hourllava.memory import Repository


def numbered(path, count, **fields):
    return write_lines(path, *(talk("a", "b", id=f"{path.stem}{i}", **fields) for i in range(count)))


def ids(path, **options):
    return [sample.id for sample in load_mixture(path, **options)]


@pytest.mark.parametrize(
    ("strategy", "taken"),
    [
        ("all", [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]),
        ("first:20%", [0, 1]),
        ("first : 21 %", [0, 1, 2]),
        ("end:0.5%", [9]),
        ("end:3", [7, 8, 9]),
        ("first:30", [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]),
        ("random:100%", [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]),
    ],
)
def test_strategies(strategy, taken):
    assert choose(10, strategy, np.random.default_rng(0), "x") == taken


def test_shares_are_rounded_up_from_what_they_are():
    """7 % of 100 are 7, whatever floating point makes of it."""
    counts = [len(choose(100, f"first:{p}%", np.random.default_rng(0), "x")) for p in range(1, 101)]
    assert counts == list(range(1, 101))


def test_random_is_a_function_of_the_seed(tmp_path):
    numbered(tmp_path / "a.jsonl", 40)
    numbered(tmp_path / "b.jsonl", 40)
    mixture = tmp_path / "mix.yaml"
    mixture.write_text(
        "datasets:\n"
        "  - {json_path: a.jsonl, sampling_strategy: 'random:25%'}\n"
        "  - {json_path: b.jsonl, sampling_strategy: 'random:10'}\n"
    )
    taken = ids(mixture, seed=3)
    assert taken == ids(mixture, seed=3) != ids(mixture, seed=4)
    first, second = [int(i[1:]) for i in taken[:10]], [int(i[1:]) for i in taken[10:]]
    assert first == sorted(set(first))
    assert second == sorted(set(second))
    assert len(second) == 10
    assert first != second


def test_a_mixture(tmp_path):
    (tmp_path / "inner").mkdir()
    numbered(tmp_path / "inner/a.jsonl", 3, image="a.png")
    numbered(tmp_path / "b.jsonl", 3, video="x/b.mp4")
    (tmp_path / "mix.yml").write_text(
        "datasets:\n"
        "  - json_path: inner/a.jsonl\n"
        "    stream: short\n"
        "  - json_path: b.jsonl\n"
        "    sampling_strategy: end:1\n"
        "    media_root: videos\n"
        "  - json_path: b.jsonl\n"
        "    sampling_strategy: first:1\n"
        "    features: pt\n"
    )
    samples = load_mixture(tmp_path / "mix.yml")
    assert [(s.id, s.stream) for s in samples] == [(f"a{i}", "short") for i in range(3)] + [("b2", ""), ("b0", "")]
    assert [s.media[0].path.relative_to(tmp_path).as_posix() for s in samples[2:]] == [
        "inner/a.png",
        "videos/x/b.mp4",
        "pt/x/b.pt",
    ]


def test_places_for_all_and_for_one(tmp_path):
    numbered(tmp_path / "a.jsonl", 1, image="a.png")
    (tmp_path / "mix.yaml").write_text(
        f"media_root: {tmp_path / 'elsewhere'}\ndatasets:\n  - json_path: a.jsonl\n"
        "  - json_path: a.jsonl\n    media_root: here\n"
    )
    paths = [s.media[0].path for s in load_mixture(tmp_path / "mix.yaml")]
    assert paths == [tmp_path / "elsewhere/a.png", tmp_path / "here/a.png"]


def test_videos_of_a_repository(tmp_path):
    numbered(tmp_path / "a.jsonl", 1, video="a.mp4", data_source="ego4d")
    memory = Repository(tmp_path / "memories").add(memory_name("ego4d/a.mp4"), SmallWriter())
    memory.append(make_frames(3))
    (tmp_path / "mix.yaml").write_text("features: memories\ndatasets: [{json_path: a.jsonl}]\n")
    medium = load_mixture(tmp_path / "mix.yaml")[0].media[0]
    assert (medium.kind, medium.path) == ("features", tmp_path / "memories" / "ego4d%2Fa.mp4")
    assert medium.path.is_dir()


BAD = {
    "datasets: [": r":1: it is no YAML|:2: it is no YAML",
    "- a": r"\['a'\] stands where a mapping belongs",
    "": "None stands where a mapping belongs",
    "dataset: []": r":1: there is no key 'dataset'; choose from media_root, features, datasets",
    "datasets: []": "its datasets are empty",
    "media_root: x": ":1: it has no datasets",
    "datasets: a": ":1: datasets is 'a', not a list",
    "datasets:\n- a": "'a' stands where a mapping belongs",
    "datasets:\n- json_path: a.jsonl\n  sampling: all": r":2: there is no key 'sampling'; choose from json_path, sampl",
    "datasets:\n- sampling_strategy: all": ":2: it has no json_path",
    "datasets:\n- json_path: 3": ":2: json_path is 3, not a text",
    "datasets:\n- json_path: a.jsonl\n  fps: fast": ":2: fps is 'fast', not a number above 0",
    "datasets:\n- json_path: a.jsonl\n  fps: 0": ":2: fps is 0, not a number above 0",
    "datasets:\n- json_path: a.jsonl\n  fps: true": ":2: fps is True, not a number above 0",
    "datasets:\n- json_path: a.jsonl\n- json_path: a.jsonl\n  sampling_strategy: some": (
        r":3: there is no sampling_strategy 'some'; choose all, or first, end or random"
    ),
    "datasets:\n- {json_path: a.jsonl, sampling_strategy: 'first:0%'}": "'first:0%' takes no such share",
    "datasets:\n- {json_path: a.jsonl, sampling_strategy: 'end:101%'}": "'end:101%' takes no such share",
    "datasets:\n- {json_path: a.jsonl, sampling_strategy: 'random:1.5'}": "'random:1.5' takes no such share",
    "datasets:\n- {json_path: a.jsonl, sampling_strategy: random}": "there is no sampling_strategy 'random'",
    "datasets:\n- json_path: gone.jsonl": r"gone\.jsonl: it cannot be read",
}


@pytest.mark.parametrize("text", BAD)
def test_bad_mixtures_are_named(tmp_path, text):
    numbered(tmp_path / "a.jsonl", 2)
    (tmp_path / "mix.yaml").write_text(text)
    with pytest.raises(DataError, match=BAD[text]) as caught:
        load_mixture(tmp_path / "mix.yaml")
    assert str(tmp_path) in str(caught.value)


def test_no_mixture(tmp_path):
    with pytest.raises(DataError, match=r"mix\.yaml: it cannot be read"):
        load_mixture(tmp_path / "mix.yaml")


def test_bad_entries_are_left_out_and_written_down(tmp_path):
    good = [talk("a", "b", id=i) for i in range(8)]
    path = write_lines(tmp_path / "m.jsonl", *good[:4], "{", *good[4:], talk("a", id="odd"))
    failures = FailureLog(tmp_path / "run/failures.jsonl", limit=0.2)
    assert ids(path, failures=failures) == [str(i) for i in range(8)]
    assert [entry["what"] for entry in failures.entries()] == [f"{path}:5", f"{path}:10 (id odd)"]
    assert failures.entries()[1]["why"] == "its last question has no answer"
    assert (failures.tried, failures.failed) == (0, 0)  # of the samples, which are tried later


def test_too_many_bad_entries(tmp_path):
    path = write_lines(tmp_path / "m.jsonl", *(talk("a", "b") for _ in range(7)), "{", "{")
    failures = FailureLog(tmp_path / "failures.jsonl", limit=0.2)
    with pytest.raises(DataError, match=r"m\.jsonl:9: it is no JSON .*2 of 9 samples could not be used, more than 20"):
        load_mixture(path, failures=failures)


def test_nothing_left(tmp_path):
    path = write_lines(tmp_path / "m.jsonl", "{")
    with pytest.raises(DataError, match="not one of its entries can be used"):
        load_mixture(path, failures=FailureLog(tmp_path / "failures.jsonl", limit=1.0))
