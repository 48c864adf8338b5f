"""`imbvlm doctor`: what a sweep will find on this machine, and the mend for what is missing."""

from __future__ import annotations

import os
import shutil
import sys
import uuid
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

from packaging.requirements import Requirement

from imbvlm.base import storage
from imbvlm.base.errors import ImbvlmError
from imbvlm.base.version import __version__
from imbvlm.config.input_sections import EncoderConfig
from imbvlm.sweep.spec.sampler_registry import SAMPLERS

State = Literal["ok", "warning", "broken"]
SHOWN = ("torch", "ray", "optuna", "open_clip_torch", "pyarrow")
REFUSED = "AWS_PROFILE, the keys and the bucket's policy"
UNREACHED = "the bucket's name, AWS_ENDPOINT_URL, AWS_REGION and the network"
LITTLE_DISK_GB = 10.0
NO_DISK_GB = 1.0
# Ray keeps its object store in shared memory; containers have 64 MB of it by default.
LITTLE_SHARED_MEMORY_GB = 1.0


@dataclass(frozen=True)
class Check:
    """One thing that was looked at; `mend` says what to do where it isn't ok."""

    name: str
    state: State
    found: str
    mend: str = ""


def examine(places: Sequence[str], encoders: Sequence[str]) -> list[Check]:
    """Everything: packages, machine, Ray, the places for sweeps and the weights of the towers."""
    checks = [_packages(), _samplers(), _cpus(), _gpus(), _ray(), _shared_memory()]
    checks += [_place(place) for place in places]
    return checks + [_tower(name) for name in encoders]


def describe(checks: Sequence[Check]) -> str:
    """A line a check, the mend below it."""
    width = max(len(check.name) for check in checks)
    lines = []
    for check in checks:
        lines.append(f"{check.state:<7}  {check.name:<{width}}  {check.found}")
        lines += [f"{'':<7}  {'':<{width}}  -> {check.mend}"] if check.mend else []
    broken = sum(check.state == "broken" for check in checks)
    lines.append(f"{broken} broken" if broken else "nothing is broken")
    return "\n".join(lines)


def to_dicts(checks: Sequence[Check]) -> list[dict[str, str]]:
    """Plain data for JSON."""
    return [asdict(check) for check in checks]


# -------------------------------------------------------------------------------------------------- the machine


def _packages() -> Check:
    """Python and our requirements, as far as they are installed otherwise than declared."""
    python = f"Python {sys.version.split()[0]}, imbvlm {__version__}"
    try:
        declared = [Requirement(text) for text in metadata.requires("imbvlm") or []]
    except metadata.PackageNotFoundError:
        return Check("packages", "broken", f"{python} is not installed", "pip install -e . in the clone")
    wrong = []
    for requirement in declared:
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        version = _version(requirement.name)
        if version is None:
            wrong.append(f"{requirement.name} is missing")
        elif version.partition("+")[0] not in requirement.specifier:
            wrong.append(f"{requirement.name} is {version}, and must be {requirement.specifier}")
    if wrong:
        return Check("packages", "broken", f"{python}: {'; '.join(wrong)}", "pip install --upgrade imbvlm, or -e .")
    return Check("packages", "ok", ", ".join([python, *(f"{name} {_version(name)}" for name in SHOWN)]))


def _samplers() -> Check:
    """The samplers that run here, and the packages that the others need."""
    missing = {name: sampler.missing_packages() for name, sampler in SAMPLERS.items()}
    found = ", ".join(name for name, packages in missing.items() if not packages)
    lacking = [f"{name} needs {' and '.join(packages)}" for name, packages in missing.items() if packages]
    mend = "pip install 'imbvlm[samplers]'" if lacking else ""
    return Check("samplers", "ok", "; ".join([found, *lacking]), mend)


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _cpus() -> Check:
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    memory = ""
    if "SC_PHYS_PAGES" in os.sysconf_names:
        memory = f", {os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') / 1e9:.0f} GB of memory"
    return Check("CPUs", "ok", f"{usable}{memory}")


def _gpus() -> Check:
    import torch

    if torch.cuda.is_available():
        names = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
        found = ", ".join(f"{one.name} ({one.total_memory / 1e9:.0f} GB)" for one in names)
        return Check("GPUs", "ok", f"{found}; CUDA {torch.version.cuda}")
    if shutil.which("nvidia-smi") is None:
        return Check("GPUs", "ok", "none; trials on stored features run on CPUs")
    if torch.version.cuda is None:
        mend = "install torch with CUDA: https://pytorch.org/get-started/locally"
        return Check("GPUs", "broken", "there is an NVIDIA driver, and torch was built without CUDA", mend)
    found = f"there is an NVIDIA driver, and torch's CUDA {torch.version.cuda} finds no device"
    return Check("GPUs", "broken", found, "look at nvidia-smi and CUDA_VISIBLE_DEVICES; the driver may be too old")


def _ray() -> Check:
    from imbvlm.ray_runtime.connection import find_cluster

    try:
        cluster = find_cluster()
    except (ImbvlmError, RuntimeError, OSError) as error:
        cause = str(error).splitlines()[0]
        mend = "stop it with `ray stop`, unset RAY_ADDRESS, or use its versions of Ray and Python"
        return Check("Ray", "broken", f"a cluster can't be joined: {cause}", mend)
    if cluster is None:
        return Check("Ray", "ok", "no cluster runs here; a sweep starts one on this machine")
    sizes = ", ".join(
        f"{count:g} {word}{'' if count == 1 else 's'}"
        for count, word in ((len(cluster.nodes), "machine"), (cluster.num_cpus, "CPU"), (cluster.num_gpus, "GPU"))
    )
    found = f"a cluster runs: {sizes}; a sweep joins it"
    return Check("Ray", "ok", found)


def _shared_memory() -> Check:
    folder = Path("/dev/shm")
    if not folder.exists():
        return Check("shared memory", "ok", "not used on this system")
    free = shutil.disk_usage(folder).free / 1e9
    if free < LITTLE_SHARED_MEMORY_GB:
        mend = "give the container more, for example docker run --shm-size=4g"
        return Check("shared memory", "warning", f"{free:.2f} GB free: Ray will use the disk, which is slow", mend)
    return Check("shared memory", "ok", f"{free:.1f} GB free")


# --------------------------------------------------------------------------------------------- places and towers


def _place(place: str) -> Check:
    """A folder or bucket for sweeps: it can be listed, written and read."""
    name = f"storage {place}"
    problem = storage.location_problem(place)
    if problem is not None:
        return Check(name, "broken", problem, "choose a folder or s3://BUCKET/... with --storage")
    if storage.is_local(place):
        return _local_place(name, Path(storage.absolute(place)))
    steps: list[tuple[str, Callable[[str], object]]] = [
        # Who asks whether a store answers doesn't want to wait until it does.
        ("list", lambda uri: storage.list_files(uri, waits=False)),
        ("write", lambda uri: storage.write_bytes(uri, b"imbvlm")),
        ("read", storage.read_bytes),
        ("remove", storage.delete),
    ]
    probe = storage.join(place, f".imbvlm-doctor-{uuid.uuid4().hex}")
    for what, step in steps:
        try:
            step(place if what == "list" else probe)
        except ImbvlmError as error:
            is_refused = "denied" in str(error)
            mend = f"look at {REFUSED if is_refused else UNREACHED}"
            found = str(error)
            return Check(name, "broken", found if found.startswith("can't") else f"can't {what}: {found}", mend)
    return Check(name, "ok", "can be listed, written and read")


def _local_place(name: str, path: Path) -> Check:
    there = next(one for one in (path, *path.parents) if one.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        return Check(name, "broken", f"{there} can't be written", "choose another folder with --storage")
    free = shutil.disk_usage(there).free / 1e9
    found = f"{free:,.0f} GB free" if free >= LITTLE_DISK_GB else f"{free:.1f} GB free"
    if free < LITTLE_DISK_GB:
        mend = "free some, or keep sweeps elsewhere with --storage; --dry-run shows what the features will take"
        return Check(name, "broken" if free < NO_DISK_GB else "warning", found, mend)
    return Check(name, "ok", found)


def _tower(name: str) -> Check:
    from imbvlm.models.encoders.encoder_registry import resolve_encoder

    title = f"tower {name}"
    try:
        state = resolve_encoder(EncoderConfig(name=name)).weights_state()
    except ImbvlmError as error:
        return Check(title, "broken", str(error), 'see README, "A tower of your own"')
    if state.present:
        return Check(title, "ok", "weights are here")
    if state.cause is None:
        return Check(title, "ok", f"weights will be fetched from {state.address}")
    mend = (
        "fetch the weights where there is a network and name them as encoder.weights or local-dir:PATH; "
        "behind a mirror or proxy set HF_ENDPOINT or HTTPS_PROXY"
    )
    return Check(title, "broken", f"weights are not here, and {state.address} doesn't answer ({state.cause})", mend)
