# SPDX-License-Identifier: Apache-2.0
"""`hourllava shards`: what cannot be read is left out and told, up to a share."""

import json
from pathlib import Path

import pytest
import torch

from hourllava.cli import main
from hourllava.data.shards import ShardDataset


def write_manifest(folder: Path) -> Path:
    """Ten conversations, of which one is none and one shows features that are not there."""
    talk = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "That."}]
    torch.save({"vid_feat": torch.ones(4, 16, 12), "duration": 4.0}, folder / "there.pt")
    entries = [{"id": f"s{number}", "conversations": talk, "features": "there.pt"} for number in range(10)]
    entries[2]["features"] = "gone.pt"
    entries[5]["conversations"] = talk[1:]
    path = folder / "data.jsonl"
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return path


def test_what_is_left_out_is_told(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    manifest, out = write_manifest(tmp_path), tmp_path / "shards"
    command = ["shards", str(manifest), "-o", str(out)]
    assert main(command) == 1
    told = capfd.readouterr().err
    assert told.count("\n") == 1
    assert f"{manifest}:6 (id s5): an answer has no question" in told
    assert "1 of 10 samples could not be used, more than 2.0%" in told
    assert not (out / "index.json").exists()
    assert main([*command, "--failure-limit", "0.2"]) == 3
    said = capfd.readouterr()
    assert "8 samples in 1 shards" in said.out
    shown = "".join(said.err.split())
    assert "2sampleswereleftout" in shown
    assert "itcannotberead" in shown
    entries = [json.loads(line) for line in (out / "failures.jsonl").read_text().splitlines()]
    assert [entry["what"] for entry in entries] == [f"{manifest}:6 (id s5)", f"{manifest}:3 (id s2)"]
    assert [found.sample.id for found in ShardDataset(out)] == ["s0", "s1", "s3", "s4", "s6", "s7", "s8", "s9"]
    assert main([*command, "--failure-limit", "0.2"]) == 1
    assert "holds shards already" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("option", "why"),
    [
        ("--size-limit=nan", "nan is no size above 0"),
        ("--size-limit=-1", "-1 is no size above 0"),
        ("--size-limit=inf", "inf is no size above 0"),
        ("--failure-limit=-1", "-1 is no share from 0 to 1"),
        ("--failure-limit=much", "much"),
    ],
)
def test_numbers_that_are_none(option: str, why: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["shards", str(write_manifest(tmp_path)), "-o", str(tmp_path / "shards"), option])
    assert ended.value.code == 2
    last = capfd.readouterr().err.splitlines()[-1]
    assert option.partition("=")[0] in last
    assert why in last
    assert not (tmp_path / "shards").exists()


def test_nothing_is_told_where_nothing_fails(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    manifest, out = write_manifest(tmp_path), tmp_path / "shards"
    whole = [line for number, line in enumerate(manifest.read_text().splitlines(True)) if number not in (2, 5)]
    manifest.write_text("".join(whole))
    assert main(["shards", str(manifest), "-o", str(out)]) == 0
    assert sorted(path.name for path in out.iterdir()) == ["index.json", "shard.00000.mds"]
