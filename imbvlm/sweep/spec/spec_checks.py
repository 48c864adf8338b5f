"""The check of a specification before a sweep starts, which reports all mistakes at once."""

from __future__ import annotations

from imbvlm.base import storage
from imbvlm.base.errors import ConfigError, Problem, suggest_name
from imbvlm.base.formatting import join_limited
from imbvlm.base.plugin_files import use_plugins
from imbvlm.base.yaml_file import YamlTree
from imbvlm.config.method_registry import METHODS, optional_sections
from imbvlm.config.trial_config import TrialConfig, trial_class
from imbvlm.sweep.spec.objectives import ACCURACIES, SECONDS
from imbvlm.sweep.spec.sampler_registry import SAMPLERS
from imbvlm.sweep.spec.search_space import MISSING, ListedSpace, Params, SearchSpace, get_dotted, is_active
from imbvlm.sweep.spec.spec_overrides import with_settings
from imbvlm.sweep.spec.sweep_spec import NoSchedulerConfig, ResolvedSweep, SweepSpec, base_mistakes


def check_spec(spec: SweepSpec) -> ResolvedSweep:
    """Resolve a specification; raises ConfigError with all mistakes that show without data and cluster."""
    with use_plugins(*spec.plugins):
        return _check_spec(spec)


def _check_spec(spec: SweepSpec) -> ResolvedSweep:
    try:
        sweep = spec.resolve()
    except ConfigError as error:
        outside = [*_check_objective(spec), *_check_limits(spec), *base_mistakes(spec.located("base", spec.base))]
        raise ConfigError(dict.fromkeys([*error.problems, *outside])) from None
    space = sweep.space
    of_conditions = [*space.boundary_params(spec.base)[1], *_check_conditions(spec, space)]
    of_base, of_trials = _check_base(spec, space), _check_boundary(spec, space)
    problems = [*_check_objective(spec), *of_conditions, *_check_continuous(spec, space), *_check_stratify(spec, space)]
    problems += [*_check_warm_start(spec, space), *_check_study(spec, space), *of_base, *_check_limits(spec)]
    problems += [*of_trials, *_check_smoke(spec)]
    if not of_conditions and not of_base:
        # These mistakes may put a first trial outside the space.
        problems += _check_first_trials(spec, space)
    if not of_conditions and not of_base and not of_trials:
        # The check reads a seed of the base, which is valid here.
        problems += _check_confirm_seeds(spec)
    if problems:
        raise ConfigError(dict.fromkeys(problems))
    return sweep


def _check_objective(spec: SweepSpec) -> list[Problem]:
    problems = []
    if spec.objective not in ACCURACIES:
        message = f"objective {spec.objective!r} is not measured; {suggest_name(spec.objective, ACCURACIES)}"
        problems.append(Problem(message, spec.where("objective")))
    metrics = (*ACCURACIES, SECONDS)
    for index, metric in enumerate(spec.other_objectives):
        if metric not in metrics:
            message = f"{metric!r} is not measured; {suggest_name(metric, metrics)}"
        elif metric == spec.objective or metric in spec.other_objectives[:index]:
            message = f"{metric} is an objective already; remove it"
        else:
            continue
        problems.append(Problem(f"other_objectives: {message}", spec.where("other_objectives", index)))
    for metric, limit in spec.constraints.items():
        if metric not in metrics:
            message = f"{metric!r} is not measured; {suggest_name(metric, metrics)}"
        elif metric != SECONDS and not 0 <= limit <= 1:
            message = f"{metric} is a fraction from 0 to 1, and its limit is {limit:g}"
        elif limit < 0:
            message = f"{metric} can't be below 0, and its limit is {limit:g}"
        else:
            continue
        problems.append(Problem(f"constraints: {message}", spec.where("constraints", metric)))
    return [*problems, *_check_objectives_together(spec)]


def _check_objectives_together(spec: SweepSpec) -> list[Problem]:
    problems = []
    if SECONDS in spec.other_objectives and not isinstance(spec.trial_scheduler, NoSchedulerConfig):
        message = (
            f"{SECONDS} is an objective, and a trial that ASHA stops would seem inexpensive; set trial_scheduler.name: "
            "none, or make it a constraint"
        )
        problems.append(Problem(message, spec.where("other_objectives")))
    if spec.study and (spec.other_objectives or spec.constraints or spec.warm_start or spec.confirm_trials):
        message = (
            "a study searches nothing: other_objectives, constraints, warm_start and confirm_trials have no effect; "
            "remove them"
        )
        problems.append(Problem(message, spec.where("study")))
    if spec.select_by == "log_likelihood" and (spec.study or spec.other_objectives):
        message = (
            "select_by log_likelihood selects one winner, and a study and a search of several objectives have others; "
            "remove it"
        )
        problems.append(Problem(message, spec.where("select_by")))
    return [*problems, *_check_sampler(spec)]


def _check_sampler(spec: SweepSpec) -> list[Problem]:
    """Return problems where the sampler lacks a package or can't do what the sweep needs."""
    name, sampler = spec.searcher.name, SAMPLERS[spec.searcher.name]
    problems = []
    if missing := sampler.missing_packages():
        message = f"searcher {name} needs {' and '.join(missing)}. Run `pip install {' '.join(missing)}`."
        problems.append(Problem(message, spec.where("searcher", "name")))
    lacks = [
        ("warm_start", spec.warm_start, not sampler.independent, "ignores results"),
        ("other_objectives", spec.other_objectives, sampler.multi_objective, "optimizes one objective"),
        ("constraints", spec.constraints, sampler.constraints, "ignores constraints"),
    ]
    for key, value, is_supported, reason in lacks:
        if value and not is_supported:
            message = f"searcher {name} {reason}, and {key} is set. Set searcher.name to tpe, or remove {key}."
            problems.append(Problem(message, spec.where(key)))
    return problems


def _check_continuous(spec: SweepSpec, space: SearchSpace) -> list[Problem]:
    if SAMPLERS[spec.searcher.name].continuous:
        return []
    return [
        Problem(
            f"searcher {spec.searcher.name} needs a finite space, and {parameter.key} is {parameter.describe()}. "
            "Set searcher.name to random, or give the values as a choice.",
            parameter.where,
        )
        for parameter in space.parameters
        if parameter.kind in ("uniform", "loguniform")
    ]


def sampler_notes(sweep: ResolvedSweep) -> list[str]:
    """Return a sentence on the keys that the sampler can't model and samples at random; none without such keys."""
    spec, space = sweep.spec, sweep.space
    sampler = SAMPLERS[spec.searcher.name]
    if isinstance(space, ListedSpace):
        return []
    boundary = space.boundary_params(spec.base)[0]
    keys = [
        parameter.key
        for parameter in space.parameters
        if (not sampler.categorical and parameter.kind == "choice")
        or (not sampler.conditional and not all(is_active(parameter, params, spec.base) for params in boundary))
    ]
    if not keys:
        return []
    kinds = [*([] if sampler.categorical else ["choices"]), *([] if sampler.conditional else ["keys under `when`"])]
    names = join_limited(list(dict.fromkeys(keys)))
    return [f"searcher {spec.searcher.name} samples {' and '.join(kinds)} at random: {names}"]


def _check_confirm_seeds(spec: SweepSpec) -> list[Problem]:
    if not spec.confirm_trials or spec.more_seeds:
        return []
    message = f"confirm_seeds has only {spec.own_seed}, with which every trial runs already (train.seed); add another"
    return [Problem(message, spec.where("confirm_seeds"))]


def _check_limits(spec: SweepSpec) -> list[Problem]:
    per_gpu, per_machine = spec.price_per_gpu_hour, spec.price_per_machine_hour
    if per_gpu is not None and per_machine is not None:
        message = (
            f"price_per_gpu_hour is {per_gpu:g} and price_per_machine_hour {per_machine:g}: a machine's price has its "
            "GPUs in it; set one of them"
        )
        return [Problem(message, spec.where("price_per_machine_hour"))]
    if spec.max_cost is None or per_gpu is not None or per_machine is not None:
        return []
    message = (
        f"max_cost is {spec.max_cost:g}, and without a price nothing has a cost; set price_per_machine_hour or "
        "price_per_gpu_hour too"
    )
    return [Problem(message, spec.where("max_cost"))]


def _check_conditions(spec: SweepSpec, space: SearchSpace) -> list[Problem]:
    return [
        Problem(
            f"the condition of {parameter.key} names {key}, which neither base nor space sets; set it in base",
            parameter.where,
        )
        for parameter in space.parameters
        for key in parameter.when
        if not space.of(key) and get_dotted(spec.base, key) is MISSING
    ]


def _check_stratify(spec: SweepSpec, space: SearchSpace) -> list[Problem]:
    if spec.stratify and isinstance(space, ListedSpace):
        message = "stratify divides the trials of a search, and the space lists its configurations; remove it"
        return [Problem(message, spec.where("stratify"))]
    problems = []
    for index, key in enumerate(spec.stratify):
        ranges = space.of(key)
        if not ranges or any(parameter.finite_values() is None for parameter in ranges):
            fix = suggest_name(key, [parameter.key for parameter in space.parameters if parameter.kind == "choice"])
            message = f"stratify names {key!r}, which the space doesn't choose from a list; {fix}"
            problems.append(Problem(message, spec.where("stratify", index)))
    return problems


def _check_warm_start(spec: SweepSpec, space: SearchSpace) -> list[Problem]:
    if spec.warm_start and isinstance(space, ListedSpace) and not spec.study:
        message = "warm_start guides a search, and the space lists its configurations; remove it"
        return [Problem(message, spec.where("warm_start"))]
    return []


def _check_study(spec: SweepSpec, space: SearchSpace) -> list[Problem]:
    """Return problems of rows that no listed configuration has."""
    if not spec.study:
        return []
    if not isinstance(space, ListedSpace):
        message = "a study's rows are listed configurations; give the space as a section 'configurations'"
        return [Problem(message, spec.where("study"))]
    return [
        Problem(
            f"row {row.label!r} of table {table.name} shows {row.configuration!r}, which the space doesn't list; "
            f"{suggest_name(row.configuration, space.configurations)}",
            spec.where("study", index),
        )
        for index, table in enumerate(spec.study)
        for row in table.rows
        if row.configuration not in space.configurations
    ]


def _check_base(spec: SweepSpec, space: SearchSpace) -> list[Problem]:
    """Return problems of unknown sections, and of sections that no method of the space reads."""
    methods = [str(method) for method in space.values_of("method", spec.base) if method in METHODS]
    read = frozenset[str]().union(*(METHODS[method].sections for method in methods))
    problems = []
    for key in spec.base:
        if key not in trial_class().model_fields:
            message = f"unknown key {key!r}; {suggest_name(key, trial_class().model_fields)}"
            problems.append(Problem(message, spec.where("base", key)))
        elif key in optional_sections() and methods and key not in read:
            message = f"section {key!r} is read by no method of the space ({', '.join(methods)}); remove it"
            problems.append(Problem(message, spec.where("base", key)))
    manifest = get_dotted(spec.base, "data.manifest")
    problem = storage.location_problem(manifest) if isinstance(manifest, str) else None
    if problem is not None:
        problems.append(Problem(f"data.manifest: {problem}", spec.where("base", "data", "manifest")))
    return problems


def _check_boundary(spec: SweepSpec, space: SearchSpace) -> list[Problem]:
    """Return the mistakes of trials at the boundary of the space: all structural choices, both ends of other ranges."""
    problems: dict[Problem, None] = {}
    base = spec.located("base", spec.base)
    for params in space.boundary_params(spec.base)[0]:
        unread = _unread_keys(params, space, str(params.get("method", spec.base.get("method"))))
        if unread:
            problems |= dict.fromkeys(unread)
            continue
        # A mistake at a sampled key stands in the space.
        places = dict(base.places) | {(*key.split("."),): space.of(key)[0].where for key in params}
        try:
            TrialConfig.from_tree(YamlTree(spec.trial_tree(params), base.file, places))
        except ConfigError as error:
            problems |= dict.fromkeys(error.problems)
    return list(problems)


def _unread_keys(params: Params, space: SearchSpace, method: str) -> list[Problem]:
    problems = []
    for key in params:
        section = key.split(".")[0]
        if method in METHODS and section in optional_sections() - METHODS[method].sections:
            readers = [name for name, entry in METHODS.items() if section in entry.sections]
            names = readers[0] if len(readers) == 1 else f"[{', '.join(readers)}]"
            fix = "remove it" if isinstance(space, ListedSpace) else f"add when: {{method: {names}}}"
            message = f"{key} is searched when method = {method}, which doesn't read {section!r}; {fix}"
            problems.append(Problem(message, space.of(key)[0].where))
    return problems


def _check_first_trials(spec: SweepSpec, space: SearchSpace) -> list[Problem]:
    problems = []
    for index, params in enumerate(spec.first_trials):
        try:
            space.to_optuna_params(params, spec.base)
        except ConfigError as error:
            where = spec.where("first_trials", index)
            problems += [Problem(f"first_trials[{index}]: {problem.message}", where) for problem in error.problems]
    return problems


def _check_smoke(spec: SweepSpec) -> list[Problem]:
    """Return the mistakes of `--smoke`'s settings, which then show in every run."""
    try:
        smoke = with_settings(spec, spec.smoke, "smoke")
        return [] if smoke == spec else _check_boundary(smoke, smoke.read_space())
    except ConfigError as error:
        return list(error.problems)
