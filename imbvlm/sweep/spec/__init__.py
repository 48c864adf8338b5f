"""What a sweep is."""

from imbvlm.sweep.spec.sweep_spec import SweepSpec as SweepSpec
