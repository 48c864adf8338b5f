"""The specification of a sweep: search space, sampler, limits and checks."""

from imbvlm.sweep.spec.sweep_spec import SweepSpec as SweepSpec
