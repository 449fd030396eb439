# SPDX-License-Identifier: Apache-2.0
"""Watching, asking and training on a device that is not the CPU and holds its numbers there.

What else only a GPU would refuse, tensors of two devices in one operation, is refused without one, and what would make
the host wait is written down.

A process of its own, since torch has one such device: ``python other_device.py FOLDER`` prints one JSON object.
"""

import json
import shutil
import sys
import traceback
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

_setup_privateuseone_for_python_backend("elsewhere")
DEVICE = torch.device("elsewhere", 0)
PACKAGE = str(Path(__file__).resolve().parents[1] / "python")
# Of tensors on two devices at once, these take one side to the other.
CROSSING = ("aten::copy_", "aten::_to_copy", "aten::index.Tensor", "aten::index_put", "aten::_index_put")
WAITING = ("aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::equal", "aten::_unique2")
waits: set[tuple[str, str]] = (
    set()
)  # what the host would have to wait for, and the file of the package that asked for it


def wait_for(what: str) -> None:
    files = (frame.filename for frame in reversed(traceback.extract_stack()) if frame.filename.startswith(PACKAGE))
    waits.add((what, Path(next(files, "")).name))


def is_here(device: Any) -> bool:
    return isinstance(device, str | torch.device) and str(device).partition(":")[0] == DEVICE.type


class There(Tensor):
    """A tensor that says it is on the other device."""

    host: Tensor

    @staticmethod
    def __new__(cls, host: Tensor) -> "There":
        layout = {"strides": host.stride(), "storage_offset": host.storage_offset(), "dtype": host.dtype}
        there = Tensor._make_wrapper_subclass(cls, host.size(), device=DEVICE, **layout)
        there.host = host
        return there

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = dict(kwargs or {}), func.name()
        mixed = [t for t in tensors(args, kwargs) if not isinstance(t, There) and t.dim() > 0]
        if mixed and not name.startswith(CROSSING):
            raise RuntimeError(f"{name}: tensors of {[tuple(t.shape) for t in mixed]} are on the CPU")
        if mixed or name in WAITING:
            wait_for(name)
        to_cpu = kwargs.get("device") is not None and not is_here(kwargs["device"])
        if to_cpu:
            wait_for(name)
        inner = {key: torch.device("cpu") if is_here(value) else value for key, value in kwargs.items()}
        out = func(*tree_map(host_of, args), **tree_map(host_of, inner))
        if to_cpu:
            return tree_map(lambda t: t.clone() if isinstance(t, Tensor) else t, out)
        if name.startswith("aten::copy_") and not isinstance(args[0], There):
            return args[0]
        out = put(out)
        return return_and_correct_aliasing(func, args, kwargs, out) if name.startswith("aten::") else out


def tensors(*given: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(given) if isinstance(leaf, Tensor)]


def host_of(value: Any) -> Any:
    return value.host if isinstance(value, There) else value


def put(value: Any) -> Any:
    return tree_map(lambda t: There(t) if isinstance(t, Tensor) and not isinstance(t, There) else t, value)


class Elsewhere(TorchFunctionMode):
    """Makes tensors on the other device, for which torch has no kernels."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = dict(kwargs or {}), getattr(func, "__name__", "")
        kwargs.pop("pin_memory", None)
        if name == "tolist" and isinstance(args[0], There):
            wait_for(name)
            return args[0].host.tolist()
        if name == "to" and any(is_here(given) for given in (*args[1:], *kwargs.values())):
            rest = [given for given in args[1:] if not is_here(given)]
            kwargs = {key: given for key, given in kwargs.items() if not is_here(given)}
            if not isinstance(args[0], There):
                wait_for(name)
                args = (There(args[0].detach().clone()),)
            return func(args[0], *rest, **kwargs) if rest or kwargs else args[0]
        if is_here(kwargs.get("device")) and not tensors(args):
            if name in ("tensor", "as_tensor"):
                wait_for(name)
            return put(func(*args, **kwargs | {"device": "cpu"}))
        return func(*args, **kwargs)


def move(model: torch.nn.Module) -> None:
    for module in model.modules():
        for name, weight in module._parameters.items():
            if weight is not None:
                module._parameters[name] = torch.nn.Parameter(There(weight.detach().clone()), requires_grad=False)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = There(buffer.clone())


def empty(size: Any, **kwargs: Any) -> Tensor:
    return There(torch.empty(size, dtype=kwargs.get("dtype")))


def empty_strided(size: Any, stride: Any, **kwargs: Any) -> Tensor:
    return There(torch.empty_strided(size, stride, dtype=kwargs.get("dtype")))


def watch_and_ask(model: Any, pictures: Tensor, folder: Path) -> list[Any]:
    """Answers to a question, asked of a memory in every place and in every way."""
    from hourllava.memory import MemoryPool, Repository, VideoMemory
    from hourllava.model import Budget
    from hourllava.model.watching import FrameWriter

    budgets = ["all", "1/2", Budget(pages=3, tile=8), Budget(pages=150, keep=((2, 5),))]
    options: list[dict[str, Any]] = [{}, *({"budget": budget} for budget in budgets), {"memaug": False}]
    options += [{"use_memory": False}, {"temporal_forgetting": "random"}, {"temporal_forgetting": "question"}]
    ask = partial(model.ask, question="Which colour was the triangle?")
    memory = model.watch(pictures, progress=False)
    answers = [ask(memory, **some) for some in [*options, {"spatial_forgetting": "random"}]]
    answers.append(ask(model.watch(pictures[:3], progress=False)))
    memory.save(folder / "pictures.memory")
    answers += [ask(VideoMemory.load(folder / "pictures.memory", device)) for device in ("cpu", model.device)]
    writer, repository = FrameWriter(model), Repository(folder / "videos")
    repository.add("pictures", writer, pages=True).append(pictures)
    answers.append(ask(repository.open("pictures")))
    repository.export("pictures", folder / "exported.memory", writer)
    answers.append(ask(VideoMemory.load(folder / "exported.memory")))
    budget = 100 * writer.shape.page_bytes
    for host_budget in (None, budget):
        with MemoryPool(repository, writer, budget, host_budget).use("pictures") as held:
            answers.append(ask(held))
    return answers


def train_and_generate(model: Any, pictures: Tensor, device: torch.device) -> list[Any]:
    """A loss and the size of a gradient, of a batch of a video and an image in tiles, and what is written about it."""
    image, side = model.config.image_token_id, model.config.tile_size
    ids = torch.tensor([[5, image, 7, 8, 9], [5, 6, image, 8, 9]]).to(device)
    seen = {"modalities": ["video", "image"], "image_sizes": [None, (2 * side, 2 * side)]}
    seen["pixel_values"] = [pictures[:20].to(device), pictures[20:25].to(device)]
    model.requires_grad_(True)
    loss = model(ids, labels=torch.where(ids == 9, ids, -100), **seen).loss
    (gradient,) = torch.autograd.grad(loss, [model.model.vision_resampler.layers[0].cross_attn.Wkv.weight])
    model.requires_grad_(False)
    written = model.generate(ids, attention_mask=torch.ones_like(ids), **seen, max_new_tokens=3, do_sample=False)
    return [loss.item(), gradient.norm().item(), *written.flatten().tolist()]


def evaluate_films(model: Any, folder: Path) -> list[Any]:
    """What a film's questions are answered, and what the parts of its memory give of attention and of right answers."""
    from hourllava.evaluate import HourTest, evaluate, measure_retrieval

    test = HourTest(videos=1, seconds=60, per_topic=1)
    _, answers = evaluate(model, test, folder)
    rows = measure_retrieval(model, test, folder, progress=False).parts
    numbers = [number for row in rows for number in (row.pages, row.recall, row.worst, row.agreement, row.right)]
    return [answers, numbers]


def main(folder: Path) -> None:
    from hourllava import load_model

    factories = torch.library.Library("aten", "IMPL")
    factories.impl("empty.memory_format", empty, "PrivateUse1")
    factories.impl("empty_strided", empty_strided, "PrivateUse1")
    model = load_model("tiny")
    pictures = torch.randint(0, 256, (150, 3, model.config.tile_size, model.config.tile_size), dtype=torch.uint8)
    (folder / "here").mkdir()
    (folder / "there").mkdir()
    expected = watch_and_ask(model, pictures, folder / "here")
    learnt = train_and_generate(model, pictures, torch.device("cpu"))
    replies, numbers = evaluate_films(model, folder / "films")
    shutil.rmtree(folder / "films" / "memories")
    move(model)
    with Elsewhere():
        answers = watch_and_ask(model, pictures, folder / "there")
        same = [pytest.approx(learnt, rel=1e-4) == train_and_generate(model, pictures, DEVICE)]
        same.append([replies, pytest.approx(numbers, abs=1e-5)] == evaluate_films(model, folder / "films"))
    pairs = zip(answers, expected, strict=True)
    same += [a.text == e.text and torch.allclose(a.mass, e.mass, atol=1e-6) for a, e in pairs]
    print(json.dumps({"same": same, "waits": sorted(waits)}))


if __name__ == "__main__":
    torch.manual_seed(0)
    main(Path(sys.argv[1]))
