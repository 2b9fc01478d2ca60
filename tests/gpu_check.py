"""The benchmark ladder in one go: `python -m tests.gpu_check --out DIR`, by `make gpu-check`, on the machine at hand.

Makes JPEGs of ImageNet's size, converts them, and measures the loader and the training step of ResNet-50, ViT-S and ViT-B, with the
peers beside them. Results are dated JSON files. Each job is a process of its own, because a CUDA fault spoils all further work of
the process it happens in; jobs that fail are listed at the end.
"""

from __future__ import annotations

import argparse
import datetime
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.pictures import photo

# Images per step that an 80 GB card holds.
MODELS = (("moco_v3_resnet50", 256), ("moco_v3_vit_small", 512), ("moco_v3_vit_base", 256))


def make_photos(folder: Path, count: int) -> None:
    """`count` JPEGs of 500 x 375 pixels; every 50th picture is new, the rest are its crops and flips."""
    folder.mkdir(parents=True)
    for i in range(count):
        if i % 50 == 0:
            base = photo(1000, 750, seed=i)
        x, y = i * 37 % 500, i * 53 % 375
        base.crop((x, y, x + 500, y + 375)).save(folder / f"{i:05d}.jpg", quality=90)


def gpu_name() -> str:
    """The GPU in use, or an empty text; asked in another process, so that this one holds none of its memory."""
    code = "import torch; print(torch.cuda.get_device_name() if torch.cuda.is_available() else '')"
    done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, check=True)
    return done.stdout.strip()


def run_jobs(jobs: list[list[str]]) -> list[str]:
    """Run `fastssl` with each list of arguments, one after the other; returns a line for each that failed."""
    failed = []
    for job in jobs:
        print(f"\n$ fastssl {' '.join(job)}", flush=True)
        code = subprocess.run([sys.executable, "-m", "fastssl", *job]).returncode
        if code:
            how = f"signal {-code}" if code < 0 else f"exit code {code}"
            failed.append(f"fastssl {' '.join(job)} ({how})")
    return failed


def main() -> int:
    """Run everything; the exit code is 1 where a job failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("docs/benchmarks"))
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument(
        "--scale", type=float, default=1.0, help="share of each batch size; small for a trial on a CPU"
    )
    parser.add_argument("--models", nargs="*", default=[name for name, _ in MODELS])
    args = parser.parse_args()
    gpu = gpu_name()
    stamp = f"{datetime.date.today():%Y-%m-%d}-{'-'.join((gpu or 'cpu').lower().split())}"
    args.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as tmp:
        shards = Path(tmp) / "shards"
        make_photos(Path(tmp) / "photos", args.images)
        jobs = [
            ["shard", str(Path(tmp) / "photos"), str(shards)],
            ["bench", "loader", str(shards), "--json", str(args.out / f"{stamp}-loader.json")],
        ]
        for name, batch in MODELS:
            if name in args.models:
                size = max(4, int(batch * args.scale))
                flags = ["--train.batch", str(size), "--data.shards", str(shards)]
                out = ["--json", str(args.out / f"{stamp}-step-{name}.json")]
                jobs.append(["bench", "step", f"configs/{name}.yaml", *flags, *out])
                if gpu:
                    out = ["--json", str(args.out / f"{stamp}-step-{name}-compiled.json")]
                    jobs.append(
                        ["bench", "step", f"configs/{name}.yaml", *flags, "--train.compile", "True", *out]
                    )
        failed = run_jobs(jobs)
    for line in failed:
        print(f"failed: {line}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
