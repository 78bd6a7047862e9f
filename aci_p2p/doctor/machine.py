"""What the doctor checks on this machine, without the network."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from time import monotonic
from typing import Final

import trio

from aci_p2p.config import unknown_variables
from aci_p2p.control.process import file_descriptor_limit
from aci_p2p.doctor.findings import Finding, ok, problem, problem_of, warning
from aci_p2p.doctor.subject import Subject
from aci_p2p.executor import ModelStore, ModelUnavailable, Progress, WeightsMismatch
from aci_p2p.executor.manifest import is_model_name
from aci_p2p.keys import KeyFileError, KeyRing

HASH_S: Final = 3.0
"""Seconds for hashing a model that changed since it was checked: a gigabyte or two."""
LITTLE_DISK: Final = 1 << 30
"""Free bytes under which there is a warning: a small model needs more."""
FULL_DISK: Final = 64 << 20
"""Free bytes under which jobs soon cannot be stored."""
NVIDIA_S: Final = 5.0
"""Seconds for nvidia-smi, which hangs with a broken driver."""
MANY_FILES: Final = 0.8
"""Share of the file descriptors that may be open from which on there is a warning."""
FILES_BESIDE: Final = 320
"""File descriptors that a node may need beside its connections: 256 handshakes under way, and 64 of its own."""
GROUP_OR_OTHERS_WRITE: Final = 0o022
"""Mode bits with which others can replace what lies in a folder."""

_NVIDIA_DEVICE: Final = Path("/dev/nvidiactl")


class _TooLarge(Exception):
    """Hashing takes too long here."""


async def check_node(subject: Subject) -> list[Finding]:
    """Whether the node runs, and what it complains about."""
    await trio.lowlevel.checkpoint()
    status = subject.status
    if status is None:
        if subject.silence:
            return [problem_of("node", subject.silence, "restart the node")]
        return [ok("node", "it does not run; start it with: aci-p2p join")]
    log, node = status["log"], status["node"]
    name = f"{node['id']} runs, process {status['process']['pid']}"
    if log["errors"]:
        last = next(entry for entry in reversed(log["last"]) if entry["level"] != "warning")
        text = f"{name}, and has logged {log['errors']} errors, the last at {last['at']}: {last['message']}"
        return [warning("node", text, "see its log, and report what is a bug")]
    return [ok("node", name)]


async def check_configuration(subject: Subject) -> list[Finding]:
    """Whether everything that is set is a setting. A value that cannot be is an error before we get here."""
    await trio.lowlevel.checkpoint()
    unknown = list(unknown_variables())
    if unknown:
        return [warning("configuration", "; ".join(unknown), "unset it, or see: aci-p2p config show")]
    exists = subject.config_file.exists()
    return [ok("configuration", f"{subject.config_file}" + ("" if exists else " does not exist; defaults are used"))]


async def check_key(subject: Subject) -> list[Finding]:
    """Whether the node's key can be read, by its owner alone."""
    return await trio.to_thread.run_sync(_look_at_key, subject, abandon_on_cancel=True)


def _look_at_key(subject: Subject) -> list[Finding]:
    folder, name = subject.config.keys_path, subject.config.key
    try:
        mode = folder.stat().st_mode
        key = KeyRing(folder).load(name)
    except FileNotFoundError:
        return [ok("key", f"the key {name!r} does not exist; it is made when the node first runs")]
    except KeyFileError as error:
        if not error.path.exists() and not error.path.is_symlink():
            return [ok("key", f"the key {name!r} does not exist; it is made when the node first runs")]
        return [problem_of("key", error, "move the file away; the node then gets another identity")]
    except OSError as error:
        return [problem("key", f"{folder}: {error.strerror}", "give the folder to the user that runs the node")]
    if mode & GROUP_OR_OTHERS_WRITE:
        return [problem("key", f"others may write to {folder}", f"chmod 700 {folder}")]
    return [ok("key", f"the key {name!r} is {key.node_id}, readable by its owner alone")]


async def check_models(subject: Subject) -> list[Finding]:
    """Whether each model is there, whole and unaltered."""
    return await trio.to_thread.run_sync(_look_at_models, subject, abandon_on_cancel=True)


def _look_at_models(subject: Subject) -> list[Finding]:
    path, provider = subject.config.models_path, subject.config.provider
    store = ModelStore(path)
    present = sorted(entry.name for entry in path.iterdir() if is_model_name(entry.name)) if path.is_dir() else []
    wanted = provider.models if provider and provider.serve else ()
    missing = [
        problem("models", f"{name} is to be served and is not in {path}", "add it, or serve others: --serve-model")
        for name in wanted
        if name not in present
    ]
    if not present and not missing:
        nothing = f"none in {path}"
        if provider is None or not provider.serve:
            return [ok("models", f"{nothing}, and none is to be served")]
        return [warning("models", f"{nothing}: the node serves nothing", "aci-p2p models pull")]
    return missing + [_look_at_model(store, name) for name in present]


def _look_at_model(store: ModelStore, name: str) -> Finding:
    deadline = monotonic() + HASH_S

    def give_up(_: Progress) -> None:
        if monotonic() > deadline:
            raise _TooLarge

    try:
        model = store.open(name)
        model.verify(give_up)
    except _TooLarge:
        text = f"{name} changed since it was checked, and is too large to check it here"
        return warning("models", text, f"aci-p2p models verify {name}")
    except (ModelUnavailable, WeightsMismatch) as error:
        again = f"aci-p2p models remove {name}, then fetch or add it again"
        return problem("models", error.message, again)
    return ok("models", f"{name} is intact: {model.size / 1e6:.0f} MB, weights root {model.root.hex()[:16]}")


async def check_disk(subject: Subject) -> list[Finding]:
    """Whether there is room for jobs and models."""
    await trio.lowlevel.checkpoint()
    places: dict[int, Path] = {}
    for path in (subject.config.home, subject.config.models_path, subject.config.state_path):
        place = next(folder for folder in (path.absolute(), *path.absolute().parents) if folder.exists())
        places.setdefault(place.stat().st_dev, place)
    return [_look_at_disk(place) for place in places.values()]


def _look_at_disk(place: Path) -> Finding:
    free = shutil.disk_usage(place).free
    text = f"{free / 1e9:.1f} GB free at {place}"
    if not os.access(place, os.W_OK | os.X_OK):
        return problem("disk", f"{place} cannot be written", "give it to the user that runs the node, or set --home")
    if free < FULL_DISK:
        return problem("disk", f"{text}: jobs soon cannot be stored", "make room, or move --home")
    if free < LITTLE_DISK:
        return warning("disk", f"{text}: too little for another model", "make room, or move --model-store")
    return ok("disk", text)


async def check_files(subject: Subject) -> list[Finding]:
    """Whether the node may open as many files as it needs: each connection takes one."""
    await trio.lowlevel.checkpoint()
    action = "raise it: LimitNOFILE= in the systemd unit, or ulimit -n before it is started; or lower --high-water"
    if subject.status is None:
        limit, opened = file_descriptor_limit(), None
        text = f"a node that is started from here may open {limit} files"
    else:
        process = subject.status["process"]
        limit, opened = process["file_descriptor_limit"], process["file_descriptors"]
        text = f"the running node has {'an unknown number' if opened is None else opened} of {limit} files open"
    if opened is not None and opened >= limit:
        return [problem("files", f"{text}: it can take no more connections", action)]
    if opened is not None and opened >= MANY_FILES * limit:
        return [warning("files", f"{text}: soon it can take no more connections", action)]
    needed = subject.config.p2p.high_water + FILES_BESIDE
    if limit < needed:
        return [warning("files", f"{text}; with many connections it needs up to {needed}", action)]
    return [ok("files", text)]


async def check_compute(subject: Subject) -> list[Finding]:
    """What models are computed with."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = subject.config.provider.threads if subject.config.provider else None
    text = f"models are computed by {threads or max(cores - 1, 1)} of {cores} CPU cores"
    findings = [
        warning("CPU", f"{threads} threads on {cores} cores hinder each other", f"--threads {max(cores - 1, 1)}")
        if threads and threads > cores
        else ok("CPU", text)
    ]
    return [*findings, await _look_at_gpu()]


async def _look_at_gpu() -> Finding:
    program = shutil.which("nvidia-smi")
    if program is None and not _NVIDIA_DEVICE.exists():
        return ok("GPU", "none found, and none is needed: models are computed by the CPU")
    if program is None:
        text = "there is an NVIDIA driver but no nvidia-smi; no GPU is used: models are computed by the CPU"
        return ok("GPU", text)
    try:
        with trio.fail_after(NVIDIA_S):
            asked = await trio.run_process(
                [program, "--query-gpu=name", "--format=csv,noheader"],
                capture_stdout=True,
                stderr=subprocess.DEVNULL,
                check=False,
            )
    except (OSError, trio.TooSlowError):
        return warning("GPU", "nvidia-smi does not answer; no GPU is used", "repair the driver, if one is to be used")
    names = list(_lines(asked.stdout))
    if asked.returncode or not names:
        return warning("GPU", "nvidia-smi finds no GPU; none is used", "repair the driver, if one is to be used")
    return ok("GPU", f"{', '.join(names)}; not used: this version computes with the CPU")


def _lines(output: bytes) -> Iterator[str]:
    for line in output.decode("utf-8", "replace").splitlines():
        if line.strip():
            yield line.strip()


async def check_chain(_: Subject) -> list[Finding]:
    """Nothing is paid on a chain yet."""
    await trio.lowlevel.checkpoint()
    return [ok("chain", "no endpoint is configured, and none is needed yet: jobs are not settled on a chain")]
