"""`imbvlm doctor`: checks this machine for everything that a sweep needs, and suggests fixes."""

from __future__ import annotations

import os
import shutil
import sys
import uuid
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

from packaging.requirements import Requirement

from imbvlm.base import storage
from imbvlm.base.errors import ImbvlmError
from imbvlm.base.formatting import pluralize
from imbvlm.base.version import __version__
from imbvlm.config.encoder_entries import find_entry
from imbvlm.config.encoder_info import EncoderInfo
from imbvlm.config.input_sections import MAX_IMAGE_SIZE, EncoderConfig
from imbvlm.sweep.spec.sampler_registry import SAMPLERS

State = Literal["ok", "warning", "broken"]
SHOWN = ("torch", "ray", "optuna", "open_clip_torch", "pyarrow")
# Settings to check if an object store denies access, or does not answer.
DENIED = "AWS_PROFILE, the keys and the bucket's policy"
UNREACHABLE = "the bucket's name, AWS_ENDPOINT_URL, AWS_REGION and the network"
# Free space below which a check warns, and below which it fails.
LOW_DISK_GB, MIN_DISK_GB = 10.0, 1.0
# Ray keeps its object store in shared memory; containers have 64 MB of it by default.
LOW_SHARED_MEMORY_GB = 1.0


@dataclass(frozen=True)
class Check:
    """The result of one check, with a suggested fix if it isn't ok."""

    name: str
    state: State
    result: str
    fix: str = ""


def run_checks(locations: Sequence[str], encoders: Sequence[str]) -> list[Check]:
    """Check packages, machine, Ray, locations for sweeps and weights of encoders."""
    checks = [check_packages(), _samplers(), _cpus(), _gpus(), _ray(), _shared_memory()]
    checks += [check_storage(location) for location in locations]
    return checks + [check_encoder(name) for name in encoders]


def describe(checks: Sequence[Check]) -> str:
    """A line per check, followed by its fix."""
    width = max(len(check.name) for check in checks)
    lines = []
    for check in checks:
        lines.append(f"{check.state:<7}  {check.name:<{width}}  {check.result}")
        lines += [f"{'':<7}  {'':<{width}}  -> {check.fix}"] if check.fix else []
    broken = sum(check.state == "broken" for check in checks)
    lines.append(f"{broken} broken" if broken else "nothing is broken")
    return "\n".join(lines)


def to_dicts(checks: Sequence[Check]) -> list[dict[str, str]]:
    """Plain data for JSON; scripts written for version 0.1 read the fix as `mend`."""
    return [
        {"name": check.name, "state": check.state, "found": check.result, "fix": check.fix, "mend": check.fix}
        for check in checks
    ]


# -------------------------------------------------------------------------------------------------- the machine


def check_packages() -> Check:
    """Check Python and the installed versions of this package's requirements."""
    python = f"Python {sys.version.split()[0]}, imbvlm {__version__}"
    try:
        declared = [Requirement(text) for text in metadata.requires("imbvlm") or []]
    except metadata.PackageNotFoundError:
        return Check("packages", "broken", f"{python} is not installed", "pip install -e . in the clone")
    problems = []
    for requirement in declared:
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        version = _version(requirement.name)
        if version is None:
            problems.append(f"{requirement.name} is missing")
        elif version.partition("+")[0] not in requirement.specifier:
            problems.append(f"{requirement.name} is {version}, and must be {requirement.specifier}")
    if problems:
        return Check("packages", "broken", f"{python}: {'; '.join(problems)}", "pip install --upgrade imbvlm, or -e .")
    return Check("packages", "ok", ", ".join([python, *(f"{name} {_version(name)}" for name in SHOWN)]))


def _samplers() -> Check:
    """The samplers that run here, and the packages that the others need."""
    missing = {name: sampler.missing_packages() for name, sampler in SAMPLERS.items()}
    available = ", ".join(name for name, packages in missing.items() if not packages)
    others = [f"{name} needs {' and '.join(packages)}" for name, packages in missing.items() if packages]
    fix = "pip install 'imbvlm[samplers]'" if others else ""
    return Check("samplers", "ok", "; ".join([available, *others]), fix)


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _cpus() -> Check:
    num_bytes = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return Check("CPUs", "ok", f"{len(os.sched_getaffinity(0))}, {num_bytes / 1e9:.0f} GB of memory")


def _gpus() -> Check:
    import torch

    if torch.cuda.is_available():
        devices = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
        text = ", ".join(f"{device.name} ({device.total_memory / 1e9:.0f} GB)" for device in devices)
        return Check("GPUs", "ok", f"{text}; CUDA {torch.version.cuda}")
    if shutil.which("nvidia-smi") is None:
        return Check("GPUs", "ok", "none; trials on stored features run on CPUs")
    if torch.version.cuda is None:
        fix = "install torch with CUDA: https://pytorch.org/get-started/locally"
        return Check("GPUs", "broken", "there is an NVIDIA driver, and torch was built without CUDA", fix)
    text = f"there is an NVIDIA driver, and torch's CUDA {torch.version.cuda} finds no device"
    return Check("GPUs", "broken", text, "look at nvidia-smi and CUDA_VISIBLE_DEVICES; the driver may be too old")


def _ray() -> Check:
    from imbvlm.ray_runtime.connection import find_cluster

    try:
        cluster = find_cluster()
    except (ImbvlmError, RuntimeError, OSError) as error:
        cause = str(error).splitlines()[0]
        fix = "stop it with `ray stop`, unset RAY_ADDRESS, or use its versions of Ray and Python"
        return Check("Ray", "broken", f"a cluster can't be joined: {cause}", fix)
    if cluster is None:
        return Check("Ray", "ok", "no cluster runs here; a sweep starts one on this machine")
    counts = ((len(cluster.nodes), "machine"), (cluster.num_cpus, "CPU"), (cluster.num_gpus, "GPU"))
    sizes = ", ".join(pluralize(count, noun) for count, noun in counts)
    return Check("Ray", "ok", f"a cluster runs: {sizes}; a sweep joins it")


def _shared_memory() -> Check:
    folder = Path("/dev/shm")
    if not folder.exists():
        return Check("shared memory", "ok", "not used on this system")
    free = shutil.disk_usage(folder).free / 1e9
    if free < LOW_SHARED_MEMORY_GB:
        fix = "give the container more, for example docker run --shm-size=4g"
        return Check("shared memory", "warning", f"{free:.2f} GB free: Ray will use the disk, which is slow", fix)
    return Check("shared memory", "ok", f"{free:.1f} GB free")


# ----------------------------------------------------------------------------------------- storage and encoders


def check_storage(location: str) -> Check:
    """Check that a folder or bucket for sweeps can be listed, written and read."""
    name = f"storage {location}"
    problem = storage.folder_problem(location)
    if problem is not None:
        return Check(name, "broken", problem, "choose a folder or s3://BUCKET/... with --storage")
    if storage.is_local(location):
        return check_local_folder(name, Path(storage.absolute(location)))
    steps: list[tuple[str, Callable[[str], object]]] = [
        # A check reports that a store doesn't answer, and doesn't wait until it does.
        ("list", lambda uri: storage.list_files(uri, waits=False)),
        ("write", lambda uri: storage.write_bytes(uri, b"imbvlm")),
        ("read", storage.read_bytes),
        ("remove", storage.delete),
    ]
    probe = storage.join(location, f".imbvlm-doctor-{uuid.uuid4().hex}")
    for action, step in steps:
        try:
            step(location if action == "list" else probe)
        except ImbvlmError as error:
            problem = str(error)
            fix = f"check {DENIED if 'denied' in problem else UNREACHABLE}"
            return Check(name, "broken", problem if problem.startswith("can't") else f"can't {action}: {problem}", fix)
    return Check(name, "ok", "can be listed, written and read")


def check_local_folder(name: str, path: Path) -> Check:
    """Check that a folder can be written, or created, and that its disk has space."""
    existing = next(folder for folder in (path, *path.parents) if folder.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        return Check(name, "broken", f"{existing} can't be written", "choose another folder with --storage")
    free = shutil.disk_usage(existing).free / 1e9
    if free >= LOW_DISK_GB:
        return Check(name, "ok", f"{free:,.0f} GB free")
    fix = "free some, or keep sweeps elsewhere with --storage; --dry-run shows what the features will take"
    return Check(name, "broken" if free < MIN_DISK_GB else "warning", f"{free:.1f} GB free", fix)


def check_encoder(name: str) -> Check:
    """Check that an encoder exists and that its files are here or can be downloaded; describe it and its sizes."""
    from imbvlm.models.encoders.encoder_factory import describe_encoder
    from imbvlm.models.encoders.encoder_registry import resolve_encoder

    title, config = f"encoder {name}", EncoderConfig(name=name)
    try:
        state, info = resolve_encoder(config).weights_state(), describe_encoder(config)
    except ImbvlmError as error:
        result = "; ".join([str(error).removesuffix("."), *_facts(name)])
        return Check(title, "broken", result, 'see docs/guides/choosing.md, "An encoder"')
    text = "its files are here" if state.present else f"its files will be fetched from {state.address}"
    result = "; ".join([(state.problem or text).removesuffix("."), *_sizes(config, info), *_facts(name)])
    return Check(title, "ok" if state.problem is None else "broken", result, state.fix)


def _sizes(config: EncoderConfig, info: EncoderInfo) -> list[str]:
    """The encoder's own image size, and the tokens and the time of one about half as large again."""
    from imbvlm.models.encoders.encoder_factory import describe_encoder

    own = f"{info.image_size} px of its own, {info.num_tokens} tokens, {info.num_parameters / 1e6:,.0f} M parameters"
    # Patches have 14, 16 or 32 pixels.
    for step in (32, 28) if info.kind == "convolution" else (28, 32):
        size = min(MAX_IMAGE_SIZE, step * round(1.5 * info.image_size / step))
        with suppress(ImbvlmError):
            larger = describe_encoder(config.model_copy(update={"image_size": size})).num_tokens
            times = larger / info.num_tokens
            return [own, f"encoder.image_size {size} gives {larger} tokens, at {times:.1f} times the cost"]
    return [own, "no larger encoder.image_size was found"]


def _facts(name: str) -> list[str]:
    entry = find_entry(name)
    if entry is None:
        return []
    facts = {"license": entry.license_text, "pretrained on": entry.pretraining, "has seen": ", ".join(entry.seen)}
    return [f"{label} {value}" for label, value in facts.items() if value]
