# SPDX-License-Identifier: Apache-2.0
"""Every bad input: one line on stderr, an exit code, no traceback. And the commands that only hand over."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from clips import CLIP_SECONDS, SIDE, board, cut, damage, write_tone

import hourllava.cli.doctor
from hourllava.cli import main
from hourllava.errors import HourLlavaError
from hourllava.memory import Repository, VideoMemory
from hourllava.video import write_video

QUESTION = "Which colour was the star?"


def refused(arguments: list[str], capfd: pytest.CaptureFixture[str], code: int = 1) -> str:
    """Run the command and return the one line that it prints."""
    assert main(arguments) == code
    out, err = capfd.readouterr()
    assert out == ""
    assert err.startswith("hourllava: ")
    assert err.endswith("\n")
    assert err.count("\n") == 1
    return err


@pytest.fixture
def bad_file(request: pytest.FixtureRequest, tmp_path: Path, clip: str) -> str:
    path = tmp_path / "film.mp4"
    match request.param:
        case "directory":
            path.mkdir()
        case "pipe":
            os.mkfifo(path)
        case "text":
            path.write_text("Dear diary.\n" * 100)
        case "empty":
            path.touch()
        case "sound":
            write_tone(path)
        case "no index":
            data = Path(clip).read_bytes()
            path.write_bytes(data[: data.index(b"moov") - 4])
    return str(path)


BAD_FILES = {
    "missing": "there is no such file",
    "directory": "is a directory",
    "pipe": "is not a regular file",
    "text": "is not a video",
    "empty": "is empty",
    "sound": "no video, only audio",
    "no index": "moov",
}


@pytest.mark.parametrize("bad_file", BAD_FILES, indirect=True)
@pytest.mark.parametrize("command", ["ask", "watch"])
def test_what_is_no_video(
    bad_file: str,
    command: str,
    model: str,
    tmp_path: Path,
    request: pytest.FixtureRequest,
    capfd: pytest.CaptureFixture[str],
) -> None:
    rest = [QUESTION] if command == "ask" else ["-o", str(tmp_path / "film.memory")]
    line = refused([command, bad_file, *rest, "--model", model], capfd)
    assert bad_file in line
    assert BAD_FILES[request.node.callspec.params["bad_file"]] in line
    assert not (tmp_path / "film.memory").exists()


@pytest.mark.parametrize("how", ["cut", "damaged"])
def test_what_is_left_of_a_video_is_used(
    how: str, clip: str, model: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "film.mp4"
    if how == "cut":
        cut(Path(clip), path, 0.7)
    else:
        damage(Path(clip), path, Path(clip).stat().st_size // 5)
    assert main(["ask", str(path), QUESTION, "--model", model]) == 3
    out, err = capfd.readouterr()
    assert QUESTION in out
    assert err.count("\n") == 1
    assert f"of {CLIP_SECONDS} seconds are lost" in err
    memory = tmp_path / "film.memory"
    assert main(["watch", str(path), "-o", str(memory), "--model", model]) == 3
    capfd.readouterr()
    assert main(["ask", str(memory), QUESTION, "--model", model]) == 3  # the memory remembers what is missing
    assert f"of {CLIP_SECONDS} seconds are lost" in capfd.readouterr().err


def test_a_single_picture_is_a_video_of_one_second(
    model: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "film.mp4"
    write_video(path, [board(7)], 4, SIDE)
    assert main(["ask", str(path), QUESTION, "--model", model]) == 0
    out, err = capfd.readouterr()
    assert "rests on 00:00 (100%)" in out
    assert err == ""


@pytest.mark.parametrize("where", [0.0, 0.001, 0.5, 0.999])
def test_memory_with_a_flipped_byte(
    where: float, clip: str, model: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "film.memory"
    assert main(["watch", clip, "-o", str(path), "--model", model]) == 0
    capfd.readouterr()
    data = bytearray(path.read_bytes())
    data[int(where * len(data))] ^= 4
    path.write_bytes(data)
    assert str(path) in refused(["ask", str(path), QUESTION, "--model", model], capfd)


def test_memory_of_another_model(
    clip: str, model: str, other_model: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "film.memory"
    assert main(["watch", clip, "-o", str(path), "--model", model]) == 0
    capfd.readouterr()
    assert "another model" in refused(["ask", str(path), QUESTION, "--model", other_model], capfd)


@pytest.mark.parametrize("question", ["", "  \n"])
def test_empty_question(question: str, clip: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert "question 2: it is empty" in refused(["ask", clip, QUESTION, question], capfd)


@pytest.mark.parametrize(("place", "why"), [("absent/a", "no folder"), (".", "is a directory"), ("a.jpg", "PNG")])
def test_bad_place_for_a_picture(
    place: str, why: str, clip: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert why in refused(["ask", clip, QUESTION, "--plot", str(tmp_path / place)], capfd)


@pytest.mark.parametrize(("place", "why"), [("absent/a", "no folder"), (".", "is a directory")])
def test_bad_place_for_a_memory(
    place: str, why: str, clip: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert why in refused(["watch", clip, "-o", str(tmp_path / place)], capfd)


def test_model_that_is_not_there(clip: str, model: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert "no such model" in refused(["ask", clip, QUESTION, "--model", str(tmp_path / "absent")], capfd)
    part = shutil.copytree(model, tmp_path / "part")
    (part / "model.safetensors").unlink()
    assert "model.safetensors is missing" in refused(["ask", clip, QUESTION, "--model", str(part)], capfd)


def test_unknown_recipe(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    line = refused(["train", "gigantic", "-o", str(tmp_path / "out")], capfd)
    assert "gigantic" in line
    assert "tiny" in line


@pytest.mark.parametrize(
    "arguments",
    [[], ["sing"], ["ask"], ["ask", "film.mp4"], ["watch", "film.mp4"], ["train"], ["evaluate", "--videos", "0"]],
)
def test_wrong_usage(arguments: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    out, err = capfd.readouterr()
    assert out == ""
    assert "usage: hourllava" in err


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (KeyboardInterrupt(), 130, "interrupted"),
        (OSError(28, "No space left on device", "film.memory"), 1, "film.memory: No space left on device"),
        (MemoryError(), 1, "too little"),
        (ImportError("hourllava_ext: not compiled"), 1, "hourllava doctor"),
    ],
)
def test_trouble_on_the_way(
    error: BaseException,
    code: int,
    said: str,
    clip: str,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("hourllava.model.load_model", fail)
    assert said in refused(["ask", clip, QUESTION], capfd, code)


def test_train_and_evaluate_hand_over(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    calls = []
    monkeypatch.setattr(
        "hourllava.train.engine.run_recipe", lambda recipe, out: calls.append((recipe.name, out)) or out
    )
    monkeypatch.setattr("hourllava.evaluate.main", lambda **given: calls.append(given) or 0)
    assert main(["train", "tiny", "-o", str(tmp_path)]) == 0
    assert capsys.readouterr().out == f"{tmp_path}\n"
    assert main(["evaluate", "--videos", "3"]) == 0
    assert calls == [("tiny", tmp_path), {"videos": 3, "model": "tiny"}]


def test_doctor(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    for word in (
        "torch",
        "transformers",
        "CPU kernels",
        "paged_attention",
        "H.264",
        "video decoder     pyav (the pictures are wanted on the CPU",
        "flash-attn",
        "nvcc",
        "CUDA device",
        "ok      serving           fastapi",
        "ok      benchmarks        pyarrow",
    ):
        assert word in out
    assert "the core works" in out
    monkeypatch.setitem(sys.modules, "hourllava_ext", None)  # as if it had not been compiled
    found = hourllava.cli.doctor._version
    monkeypatch.setattr("hourllava.cli.doctor._version", lambda name: None if name == "uvicorn" else found(name))
    assert main(["doctor"]) == 1
    out = capsys.readouterr().out
    assert "MISSING hourllava_ext" in out
    assert "no      serving           get it: pip install 'hourllava[serve]'" in out


def test_doctor_tells_what_a_gpu_would_run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A library with CUDA kernels does not make a torch without CUDA run them."""
    live = torch._C._dispatch_has_kernel_for_dispatch_key
    monkeypatch.setattr(
        torch._C, "_dispatch_has_kernel_for_dispatch_key", lambda name, key: key == "CUDA" or live(name, key)
    )
    monkeypatch.setattr(torch.version, "hip", None)
    for cuda, said in (
        (None, "no      CUDA kernels      get it: a torch built"),
        ("13.0", "ok      CUDA kernels      add_norm, "),
    ):
        monkeypatch.setattr(torch.version, "cuda", cuda)
        assert main(["doctor"]) == 0
        assert said in capsys.readouterr().out


@pytest.mark.parametrize(
    ("capability", "said"),
    [
        ((7, 5), "no      CUDA device       get it: a GPU of compute capability 8.0 or newer; Tesla T4 has 7.5"),
        ((8, 0), "ok      CUDA device       Tesla T4, CUDA "),
    ],
)
def test_doctor_names_a_gpu_that_is_too_old(
    capability: tuple[int, int],
    said: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla T4")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr("hourllava.cli.doctor._decoder", list)
    assert main(["doctor"]) == 0
    assert said in capsys.readouterr().out


def test_help_comes_at_once() -> None:
    """Help needs neither torch nor PyAV."""
    code = (
        "import sys; from hourllava.cli import main\n"
        "try: main(['ask', '--help'])\n"
        "except SystemExit as ended: assert ended.code == 0\n"
        "assert not {'torch', 'av', 'transformers', 'matplotlib'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "exit codes: 0" in done.stdout


def test_as_a_program(tmp_path: Path) -> None:
    """A reader that has gone away is not an error worth a message."""
    program = f"{sys.executable} -m hourllava"
    piped = subprocess.run(f"{program} ask --help | true", shell=True, capture_output=True, text=True, check=False)
    assert piped.stderr == ""
    missing = subprocess.run(
        [*program.split(), "ask", str(tmp_path / "film.mp4"), ""], capture_output=True, text=True, check=False
    )
    assert (missing.returncode, missing.stdout) == (1, "")
    assert missing.stderr == "hourllava: question 1: it is empty; ask something about the video\n"


@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&- >&- 2>&-"])
def test_as_a_program_that_may_say_nothing(closed: str, tmp_path: Path) -> None:
    Repository(tmp_path)
    program = f"{sys.executable} -m hourllava memory list {tmp_path} {closed}"
    silent = subprocess.run(program, shell=True, capture_output=True, text=True, check=False)
    assert (silent.returncode, silent.stdout, silent.stderr) == (0, "", "")


def test_a_memory_of_a_film_whose_name_is_no_utf_8(
    clip: str, model: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    film, memory = tmp_path / os.fsdecode(b"caf\xe9.mp4"), tmp_path / "café.memory"
    shutil.copy(clip, film)
    line = refused(["watch", clip, "-o", str(film.with_suffix(".memory")), "--model", model], capfd)
    assert "can be read only under a name in UTF-8" in line
    assert main(["watch", str(film), "-o", str(memory), "--model", model]) == 0
    assert main(["ask", str(memory), QUESTION, "--model", model]) == 0
    assert VideoMemory.load(memory).source == f"{tmp_path}/caf\\udce9.mp4"


@pytest.mark.parametrize("command", ["ask", "watch", "watch into", "serve", "evaluate"])
def test_models_run_on_the_best_device(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def here(number: int | None = None) -> torch.device:
        raise HourLlavaError("device", "it was asked for", "go on")

    monkeypatch.setattr("hourllava.model.best_device", here)
    commands = {
        "ask": ["ask", "film.mp4", "What?"],
        "watch": ["watch", "film.mp4", "-o", str(tmp_path / "film.memory")],
        "watch into": ["watch", "film.mp4", "--into", str(tmp_path / "memories")],
        "serve": ["serve", "--port", "0", "--memories", str(tmp_path / "memories")],
        "evaluate": ["evaluate", "lvbench", "--data", str(tmp_path), "-o", str(tmp_path / "lvbench.json")],
    }
    assert main(commands[command]) == 1
    assert capsys.readouterr().err == "hourllava: device: it was asked for; go on\n"
