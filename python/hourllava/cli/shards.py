# SPDX-License-Identifier: Apache-2.0
"""`hourllava shards`: a data set as MDS shards, for training that streams them."""

import argparse
import sys
from pathlib import Path

DESCRIPTION = """\
Write the samples of MANIFEST, a data set's JSON, JSONL, parquet or mixture YAML, to MDS shards in DIR, which training
reads from there, or from an object store that DIR is copied to. A mixture's `features` say which repository, made by
`hourllava embed`, or which folder of .pt files holds the features of its videos."""


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
        "--size-limit", metavar="MB", type=float, default=64.0, help="after which a shard is full (default: 64)"
    )
    shards.add_argument("--progress", action="store_true", help="show the progress bar even if stderr is no terminal")
    shards.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Write the shards and return the exit code.

    Raises:
        HourLlavaError: a sample cannot be used, or the shards cannot be written.
    """
    from tqdm import tqdm

    from hourllava.data.mixture import load_mixture
    from hourllava.data.shards import write_shards

    samples = load_mixture(args.manifest)
    shown = tqdm(samples, "writing", unit="sample", disable=not (args.progress or sys.stderr.isatty()))
    count = write_shards(shown, args.output, args.features, int(args.size_limit * 1e6))
    files = list(args.output.glob("*.mds"))
    size = sum(path.stat().st_size for path in files)
    print(f"{args.output}: {count} samples in {len(files)} shards, {size / 1e6:.1f} MB")
    return 0
