"""Judgements on the host and the data set: cores, memory, limits, disks, clock, shards; pure functions of the facts."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime

from fastssl.doctor.facts import Facts
from fastssl.doctor.finding import Finding
from shards.commands.progress import human_size

GB = 10**9


def check_shared_memory(facts: Facts) -> Iterator[Finding]:
    """/dev/shm holds what DataLoader workers and NCCL put there."""
    if facts.shm_bytes is None:
        return
    found = f"/dev/shm has {human_size(facts.shm_bytes)}"
    if facts.shm_bytes < GB:
        way_out = "start the container with --shm-size 8g (or --ipc host): NCCL and the peers of `bench loader` need it"
        yield Finding("shared memory", "warn", found, way_out)
    else:
        yield Finding("shared memory", "ok", found)


def check_open_files(facts: Facts) -> Iterator[Finding]:
    """Every shard is a mapped file; the soft limit is raised as needed, the hard one is the system's."""
    if facts.open_files is None:
        return
    soft, hard = facts.open_files
    needed = (facts.data.num_shards if facts.data else 0) + 512
    found = f"{_limit(soft)} (at most {_limit(hard)})"
    if hard != -1 and hard < needed:
        way_out = "raise the hard limit (ulimit -Hn, limits.conf, or --ulimit nofile), or convert to fewer, larger shards"
        yield Finding("open files", "bad", f"{found}, {needed:,} are needed", way_out)
    elif hard != -1 and hard < 4096:
        yield Finding(
            "open files",
            "warn",
            found,
            "raise the hard limit before there are thousands of shards: ulimit -Hn 65536",
        )
    else:
        yield Finding("open files", "ok", found)


def check_disks(facts: Facts) -> Iterator[Finding]:
    """There is room for checkpoints (a few GB each for large models) where a run writes."""
    for folder, free in facts.disks.items():
        found = f"{human_size(free)} free in '{folder}'"
        if free < GB:
            yield Finding("disk", "bad", found, "make room: one checkpoint of a ViT-B takes 1.5 GB")
        elif free < 20 * GB:
            yield Finding("disk", "warn", found, "lower train.keep, or write elsewhere: --train.out")
        else:
            yield Finding("disk", "ok", found)


def check_cores(facts: Facts) -> Iterator[Finding]:
    """The control group allows as much time as there are cores, and there are some for each GPU."""
    found = f"{facts.cpus} cores" + ("" if facts.cpu_quota is None else f", a quota of {facts.cpu_quota:g}")
    usable = min(facts.cpus, facts.cpu_quota or facts.cpus)
    if facts.cpu_quota is not None and facts.cpu_quota < facts.cpus - 0.5:
        way_out = f"OMP_NUM_THREADS={max(1, int(facts.cpu_quota))}: more threads than quota stall each other; ours keep to it"
        yield Finding("cores", "warn", found, way_out)
    elif facts.gpus and usable < 4 * len(facts.gpus):
        way_out = "decoding may limit: convert with --short-side 256, or set --data.augment-on gpu"
        yield Finding("cores", "warn", f"{found} for {len(facts.gpus)} GPUs", way_out)
    else:
        yield Finding("cores", "ok", found)


def check_memory(facts: Facts) -> Iterator[Finding]:
    """The host has memory for batches on their way and, better, for the shards in the page cache."""
    found = human_size(facts.memory_bytes)
    data = facts.data.bytes if facts.data else 0
    if facts.memory_bytes < 4 * GB:
        yield Finding(
            "memory", "warn", found, "keep train.batch small: three batches of views wait in host memory"
        )
    elif data > 0.8 * facts.memory_bytes:
        way_out = "fast local disks, --data.order blocks, or smaller images (--short-side 256)"
        yield Finding("memory", "warn", f"{found}; the shards' {human_size(data)} do not fit in it", way_out)
    else:
        yield Finding("memory", "ok", found)


def check_numa(facts: Facts) -> Iterator[Finding]:
    """Where there are several memory nodes, a process that serves one GPU runs beside it."""
    if facts.numa_nodes < 2:
        return
    homes = sorted({gpu.numa_node for gpu in facts.gpus if gpu.numa_node is not None})
    found = f"{facts.numa_nodes} nodes, GPUs on {', '.join(map(str, homes)) or 'unknown'}"
    if len(facts.gpus) == 1 and homes and facts.process_node not in homes:
        command = f"numactl --cpunodebind {homes[0]} --membind {homes[0]} fastssl pretrain ..."
        yield Finding("NUMA", "warn", f"{found}, this process on {_node(facts.process_node)}", command)
    else:
        yield Finding("NUMA", "ok", found)


def check_clock(facts: Facts) -> Iterator[Finding]:
    """The clock is not before what has already happened: certificates, signatures of S3 and `--resume` go by it."""
    found = f"{datetime.fromtimestamp(facts.now_s, UTC):%Y-%m-%d %H:%M} UTC"
    past = {"packages were installed": facts.newest_package_s}
    if facts.data:
        past["the shards were written"] = facts.data.written_s
    for what, when_s in past.items():
        if facts.now_s < when_s - 300:
            later = f"{datetime.fromtimestamp(when_s, UTC):%Y-%m-%d %H:%M}"
            yield Finding(
                "clock",
                "bad",
                f"{found}, but {what} at {later}",
                "set it (chronyd, timedatectl): S3 and TLS refuse a wrong one",
            )
            return
    yield Finding("clock", "ok", found)


def check_data(facts: Facts) -> Iterator[Finding]:
    """The shards are as their manifest says; images are not read."""
    data = facts.data
    if data is None:
        return
    if data.fault:
        yield Finding("shards", "bad", data.fault, "give the folder that `fastssl shard` made")
        return
    again = "run the same `fastssl shard` command again"
    if data.wrong:
        yield Finding("shards", "bad", f"missing or of another size: {_some(data.wrong)}", again)
    if data.table_rows != data.num_samples:
        found = f"samples.parquet has {data.table_rows:,} rows, the manifest {data.num_samples:,} samples"
        yield Finding("shards", "bad", found, again)
    if data.no_index:
        yield Finding(
            "shards", "warn", f"no index: {_some(data.no_index)}", f"DALI's own reader needs it: {again}"
        )
    if data.max_pixels > 64_000_000:
        found = f"the largest image has {data.max_pixels / 1e6:,.0f} million pixels"
        yield Finding(
            "shards",
            "warn",
            found,
            "decoding it takes long and much memory: convert with --short-side or --max-pixels",
        )
    if not (data.wrong or data.table_rows != data.num_samples):
        found = f"{data.num_samples:,} images in {data.num_shards:,} shards, {human_size(data.bytes)}; every file has its size"
        yield Finding("shards", "ok", found)


def _limit(count: int) -> str:
    return "no limit" if count == -1 else f"{count:,}"


def _node(node: int | None) -> str:
    return "several" if node is None else f"node {node}"


def _some(names: tuple[str, ...]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more
