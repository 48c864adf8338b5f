"""The check of a cluster's file before any machine costs money: missing values, and what Ray's check misses."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from imbvlm.base.errors import ConfigError, Problem
from imbvlm.base.schema import Tree
from imbvlm.base.yaml_file import YamlTree, read_foreign_yaml
from imbvlm.ray_runtime.cluster_launcher import launcher_problem
from imbvlm.ray_runtime.cluster_resources import AUTOSCALER_SETTING

# The form of a value, and an example.
PATTERNS = {
    "region": (re.compile(r"[a-z]{2}(-[a-z]+)+-\d"), "us-east-1"),
    "zone": (re.compile(r"[a-z]{2}(-[a-z]+)+-\d[a-z](,[a-z]{2}(-[a-z]+)+-\d[a-z])*"), "us-east-1a"),
    "image": (re.compile(r"ami-[0-9a-f]{8,17}"), "ami-0123456789abcdef0"),
}
KUBERAY_PREFIX = "imbvlm/"


def check_cluster_file(path: str | Path) -> None:
    """Check a file for Ray's cluster launcher or KubeRay; raises ConfigError with all mistakes and their lines."""
    located = read_foreign_yaml(path)
    tree = located.data
    if not isinstance(tree, dict):
        raise ConfigError(
            [Problem("a cluster's file must be a section of keys. cluster/gpu.yaml is one.", located.file)]
        )
    problems = list(_check_kuberay(located, tree) if "apiVersion" in tree else _check_launcher(located, tree))
    if problems:
        raise ConfigError(problems)


# ------------------------------------------------------------------------------------------- `ray up`'s files


def _check_launcher(located: YamlTree, tree: Tree) -> Iterator[Problem]:
    settings = tree.get("metadata")
    yield from _check_settings(located, settings if isinstance(settings, dict) else {}, ("metadata",))
    shape = launcher_problem(tree)
    if shape is not None:
        yield Problem(shape, located.file)
        return
    if tree["provider"].get("type") == "aws":
        yield from _check_aws(located, tree)
    yield from _check_node_types(located, tree)
    yield from _check_mounts(located, tree)


def _check_settings(located: YamlTree, settings: Tree, path: tuple[str, ...]) -> Iterator[Problem]:
    """Check that the values at the top of the file are set and have the right form."""
    for key, value in settings.items():
        name = key.removeprefix(KUBERAY_PREFIX)
        pattern, example = PATTERNS.get(name, (None, "")) if path == ("metadata",) else (None, "")
        where = located.where((*path, key))
        if value is None:
            yield Problem(f"{name} must be set{f', such as {example}' if example else ''}", where)
        elif pattern is not None and not pattern.fullmatch(str(value)):
            yield Problem(f"{name} is {value!r}, which doesn't look like one; an example is {example}", where)


def _check_aws(located: YamlTree, tree: Tree) -> Iterator[Problem]:
    provider = tree["provider"]
    if "region" not in provider:
        yield Problem("provider.region must be set: Ray would take us-west-2", located.where(("provider",)))
    region, zones = provider.get("region"), provider.get("availability_zone")
    if region and zones and not all(zone.strip().startswith(region) for zone in str(zones).split(",")):
        message = f"the zone {zones} is not in the region {region}; name one such as {region}a"
        yield Problem(message, located.where(("metadata", "zone")))
    for name, node_type in tree.get("available_node_types", {}).items():
        for key in ("InstanceType", "ImageId"):
            if key not in node_type["node_config"]:
                where = located.where(("available_node_types", name, "node_config"))
                yield Problem(
                    f"node type {name} must have {key}: Ray would choose one that has no GPU or is too old", where
                )


def _check_node_types(located: YamlTree, tree: Tree) -> Iterator[Problem]:
    """Check the numbers of workers; Ray does not, and would start without ever getting workers."""
    types, max_workers = tree.get("available_node_types", {}), tree.get("max_workers")
    if not types or max_workers is None:
        if tree["provider"].get("type") == "aws":
            yield Problem("max_workers and available_node_types must be set. cluster/gpu.yaml has both.", located.file)
        return
    head = tree["head_node_type"]
    for name, node_type in types.items():
        where = located.where(("available_node_types", name, "max_workers"))
        min_workers = node_type.get("min_workers", 0)
        own_max = node_type.get("max_workers", 0 if name == head else max_workers)
        if own_max > max_workers:
            message = f"node type {name} may have {own_max} workers, and all together {max_workers}; raise max_workers"
            yield Problem(message, where)
        if min_workers > own_max:
            yield Problem(
                f"min_workers of {name} must be at most its max_workers, {own_max}, got {min_workers}. Lower it.",
                where,
            )
    worker_types = [node_type for name, node_type in types.items() if name != head]
    if max_workers < 1 or not any(node_type.get("max_workers", max_workers) for node_type in worker_types):
        yield Problem(
            "no node type may have workers, so trials would wait forever. Raise max_workers.",
            located.where(("max_workers",)),
        )


def _check_mounts(located: YamlTree, tree: Tree) -> Iterator[Problem]:
    for remote, local in tree.get("file_mounts", {}).items():
        if not Path(str(local)).expanduser().exists():
            where = located.where(("file_mounts", remote))
            yield Problem(f"{local} does not exist in {Path.cwd()}; start in the repository's root", where)


# --------------------------------------------------------------------------------------------------- KubeRay


def _check_kuberay(located: YamlTree, tree: Tree) -> Iterator[Problem]:
    if tree.get("kind") != "RayJob" or not str(tree["apiVersion"]).startswith("ray.io/"):
        yield Problem(
            f"kind must be RayJob of ray.io, got {tree.get('kind')} of {tree['apiVersion']}. See cluster/kuberay.yaml.",
            located.file,
        )
        return
    annotations = (tree.get("metadata") or {}).get("annotations") or {}
    yield from _check_settings(located, annotations, ("metadata", "annotations"))
    cluster = (tree.get("spec") or {}).get("rayClusterSpec") or {}
    for index, group in enumerate(cluster.get("workerGroupSpecs") or []):
        min_replicas, replicas, max_replicas = (group.get(key, 0) for key in ("minReplicas", "replicas", "maxReplicas"))
        if not min_replicas <= replicas <= max_replicas or max_replicas < 1:
            where = located.where(("spec", "rayClusterSpec", "workerGroupSpecs", index))
            counts = f"minReplicas {min_replicas}, replicas {replicas} and maxReplicas {max_replicas}"
            yield Problem(f"worker group {group.get('groupName')}: {counts} must not decrease, nor end at 0.", where)
    yield from _check_head_setting(located, cluster)
    if not cluster.get("workerGroupSpecs"):
        where = located.where(("spec", "rayClusterSpec"))
        yield Problem("there is no worker group, so trials would wait forever. Add one to workerGroupSpecs.", where)


def _check_head_setting(located: YamlTree, cluster: Tree) -> Iterator[Problem]:
    """Check the setting that tells a sweep on the head, which has no GPU, which workers may come."""
    where = located.where(("spec", "rayClusterSpec", "headGroupSpec"))
    worker_groups = []
    for group in cluster.get("workerGroupSpecs") or []:
        limits = _container(group).get("resources", {}).get("limits", {})
        cpus, gpus = limits.get("cpu", 0), limits.get("nvidia.com/gpu", 0)
        worker_groups.append([int(group.get("maxReplicas", 0)), _number(cpus), _number(gpus)])
    variables = _container(cluster.get("headGroupSpec") or {}).get("env") or []
    given = {variable.get("name"): variable.get("value") for variable in variables}.get(AUTOSCALER_SETTING)
    try:
        is_same = json.loads(given or "null") == worker_groups
    except ValueError:
        is_same = False
    if not is_same:
        expected = json.dumps(worker_groups)
        yield Problem(
            f"the head's {AUTOSCALER_SETTING} must be that of the workers, got {given!r}. Set it to '{expected}'.",
            where,
        )


def _container(group: Tree) -> Tree:
    containers = ((group.get("template") or {}).get("spec") or {}).get("containers") or [{}]
    return dict(containers[0])


def _number(quantity: Any) -> float:
    """A count as Kubernetes writes it: 8, "8", "500m"."""
    text = str(quantity)
    value = float(text[:-1]) / 1000 if text.endswith("m") else float(text)
    return int(value) if value == int(value) else value
