# SPDX-License-Identifier: Apache-2.0
"""`hourllava shards`: a data set as MDS shards, for training that streams them."""

import argparse
import math
import sys
from pathlib import Path

DESCRIPTION = """\
Write the samples of MANIFEST, a data set's JSON, JSONL, parquet or mixture YAML, to MDS shards in DIR, which training
reads from there, or from an object store that DIR is copied to. A mixture's `features` say which repository, made by
`hourllava embed`, or which folder of .pt files holds the features of its videos. A sample that cannot be read is
left out, and told in DIR/failures.jsonl and a table; the exit code is then 3."""

EXIT_OK, EXIT_LOSS = 0, 3  # as of every command


def add_shards(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Declare `hourllava shards MANIFEST -o DIR`."""
    raw = argparse.RawDescriptionHelpFormatter
    shards = commands.add_parser(
        "shards", help="write a data set to shards", description=DESCRIPTION, formatter_class=raw
    )
    shards.add_argument("manifest", metavar="MANIFEST", type=Path, help="which samples")
    shards.add_argument("-o", "--output", metavar="DIR", type=Path, required=True, help="a folder without shards")
    shards.add_argument(
        "--features",
        choices=("inside", "path"),
        default="inside",
        help="hold features and images, or only their paths (default: inside)",
    )
    shards.add_argument(
        "--size-limit", metavar="MB", type=_size, default=64.0, help="after which a shard is full (default: 64)"
    )
    shards.add_argument(
        "--failure-limit",
        metavar="SHARE",
        type=_share,
        default=0.02,
        help="of the samples that may be left out; more of them are an error (default: 0.02)",
    )
    shards.add_argument("--progress", action="store_true", help="show the progress bar even if stderr is no terminal")
    shards.set_defaults(run=run)


def _size(text: str) -> float:
    if not 0 < float(text) < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is no size above 0")
    return float(text)


def _share(text: str) -> float:
    if not 0 <= float(text) <= 1:
        raise argparse.ArgumentTypeError(f"{text} is no share from 0 to 1")
    return float(text)


def run(args: argparse.Namespace) -> int:
    """Write the shards and return the exit code.

    Raises:
        HourLlavaError: too many samples cannot be used, or the shards cannot be written.
    """
    from rich.console import Console
    from tqdm import tqdm

    from hourllava.data.failures import FailureLog
    from hourllava.data.mds import INDEX
    from hourllava.data.mixture import load_mixture
    from hourllava.data.shards import write_shards

    log = args.output / "failures.jsonl"
    if not (args.output / INDEX).exists():
        log.unlink(missing_ok=True)  # of an attempt that did not come to its end
    failures = FailureLog(log, args.failure_limit)
    samples = load_mixture(args.manifest, failures=failures)
    failures.expect(len(samples))
    shown = tqdm(samples, "writing", unit="sample", disable=not (args.progress or sys.stderr.isatty()))
    count = write_shards(shown, args.output, args.features, int(args.size_limit * 1e6), failures)
    files = list(args.output.glob("*.mds"))
    size = sum(path.stat().st_size for path in files)
    print(f"{args.output}: {count} samples in {len(files)} shards, {size / 1e6:.1f} MB")
    left_out = failures.summary()
    if left_out is None:
        log.unlink()
        return EXIT_OK
    Console(stderr=True).print(left_out)
    return EXIT_LOSS
