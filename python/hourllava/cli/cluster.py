# SPDX-License-Identifier: Apache-2.0
"""`hourllava embed --ray`: the work on the machines of a Ray cluster, by Ray Data."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hourllava.errors import HourLlavaError

if TYPE_CHECKING:
    from hourllava.data.embedding import Job, Outcome
    from hourllava.memory import MemoryWriter, Repository

LOCAL = "local"  # Ray's own word for a cluster of this machine, as long as the command runs
MOST_BLOCKS = 10_000  # that Ray Data keeps books of; a block is what an actor takes at a time


class Embedder:
    """Takes videos into the repository, in a process of its own that keeps the model."""

    def __init__(self, repository: str, model: str, precision: str, imported: bool) -> None:
        self.repository, self.model, self.precision, self.imported = repository, model, precision, imported
        self._opened: tuple[Repository, MemoryWriter, int | None] | None = None

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """What became of a job, or in `fault` the parts of the error that nothing can be done after."""
        from hourllava.data.embedding import Job, take_in

        job = Job(row["id"], row["path"], tuple(row["names"]), row["fps"])
        try:
            repository, writer, size = self._open()
            outcome = take_in(job, repository, writer, size, self.precision)
        except HourLlavaError as error:
            return {**row, "state": "", "frames": 0, "reason": "", "fault": [error.what, error.why, error.todo]}
        told = {"state": outcome.state, "frames": outcome.frames, "reason": outcome.reason}
        return {**row, **told, "fault": ["", "", ""]}

    def _open(self) -> "tuple[Repository, MemoryWriter, int | None]":
        from hourllava.memory import Repository
        from hourllava.model import FrameWriter, best_device, load_model

        if self._opened is None:
            model = load_model(self.model, device=best_device(0))  # Ray shows a process its own GPU alone
            size = None if self.imported else model.config.vision_config.image_size
            self._opened = Repository(self.repository), FrameWriter(model), size
        return self._opened


def work_on_ray(
    address: str,
    processes: int,
    jobs: "list[Job]",
    common: tuple[Path, str, str, bool],
    tell: "Callable[[Outcome], None]",
) -> HourLlavaError | None:
    """Do jobs on a cluster; tell what became of each as it is done.

    Args:
        address: of the cluster, as `ray.init` takes it; "local" starts one on this machine.
        processes: how many work at the same time, each with a GPU where the cluster has any.
        common: repository, model, precision, and whether the jobs are the original's files; all see the same paths.

    Returns:
        why it had to stop before the end, or None.

    Raises:
        HourLlavaError: Ray is not installed, or there is no such cluster.
    """
    ray = _start(address)
    from hourllava.data.embedding import Job, Outcome

    try:
        gpus = bool(ray.cluster_resources().get("GPU"))
        rows = [{"id": job.id, "path": job.path, "names": list(job.names), "fps": job.fps} for job in jobs]
        repository, model, precision, imported = common
        model = str(Path(model).resolve()) if Path(model).is_dir() else model
        done = ray.data.from_items(rows, override_num_blocks=min(len(rows), MOST_BLOCKS)).map(
            Embedder,
            fn_constructor_args=[str(repository.resolve()), model, precision, imported],
            compute=ray.data.ActorPoolStrategy(size=min(processes, len(rows))),
            # Half a processor, so that what hands out the work always finds one.
            **({"num_gpus": 1} if gpus else {"num_cpus": 0.5}),
        )
        for row in done.iter_rows():
            if row["fault"][0]:
                return HourLlavaError(*row["fault"])
            job = Job(row["id"], row["path"], tuple(row["names"]), row["fps"])
            tell(Outcome(job, row["state"], int(row["frames"]), row["reason"]))
    finally:
        ray.shutdown()
    return None


def _start(address: str) -> Any:
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise HourLlavaError("--ray", "Ray is not installed", "pip install 'hourllava[ray]'") from error
    options = {"include_dashboard": False} if address == LOCAL else {}
    try:
        ray.init(address=address, log_to_driver=False, logging_level="ERROR", **options)
    except (ConnectionError, ValueError, RuntimeError, TimeoutError) as error:
        why = f"no cluster answers there ({str(error).partition(chr(10))[0]})"
        raise HourLlavaError(
            f"--ray {address}", why, "start one with `ray start --head`, or check the address"
        ) from error
    ray.data.DataContext.get_current().enable_progress_bars = False  # the command has its own
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    return ray
