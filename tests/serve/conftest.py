# SPDX-License-Identifier: Apache-2.0
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from clips import write_clip
from libraries import SECONDS, Gate, gated, kept_content
from servers import Client, Scripted, scripted, serving
from tiny_model import make_model
from torch import Tensor

from hourllava.model import HourLlavaForConditionalGeneration, Prepared
from hourllava.serve.answering import Service

MASS = torch.tensor([0.0, 0.0, 0.5, 0.25, 0.0, 0.0, 0.0, 0.25] + [0.0] * 52)


@pytest.fixture(scope="module")
def model() -> HourLlavaForConditionalGeneration:
    return make_model()


@pytest.fixture(scope="module")
def film(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """In a format that can be followed, too."""
    return write_clip(tmp_path_factory.mktemp("films") / "film.ts", range(SECONDS), Fraction(1), options={"g": "5"})


@pytest.fixture(scope="module")
def wanted(
    model: HourLlavaForConditionalGeneration, film: Path, tmp_path_factory: pytest.TempPathFactory
) -> list[Tensor]:
    """What a memory of the film holds."""
    return kept_content(model, film, tmp_path_factory.mktemp("wanted"))


@pytest.fixture
def gate() -> Iterator[Gate]:
    with gated() as gate:
        yield gate


@pytest.fixture(scope="session")
def running() -> Iterator[tuple[Service, Client]]:
    """One server for all tests: starting and stopping takes a while."""
    service = scripted().service
    with serving(service) as address:
        yield service, Client(address)


@pytest.fixture
def scene(monkeypatch: pytest.MonkeyPatch) -> Scripted:
    """A service that is scripted, and knows the video "film", of a minute."""
    scene = scripted()
    scene.library.add("film")

    def prepare(*given: object) -> Prepared:
        scene.prepared.append(given[1:])
        return Prepared(torch.zeros(1, 7, 4), MASS if len(given) == 4 else None)

    for name in ("prepare", "prepare_pictures"):
        monkeypatch.setattr(f"hourllava.serve.answering.{name}", prepare)
    return scene


@pytest.fixture
def client(scene: Scripted, running: tuple[Service, Client]) -> Client:
    """Asks a server of the scene's service, which listens to this machine only and asks for no key."""
    service, client = running
    fresh = scene.service
    service.engine, service.library, service.metrics = fresh.engine, fresh.library, fresh.metrics
    service.key, service.local, service.policy = fresh.key, fresh.local, fresh.policy
    scene.service = service
    return client
