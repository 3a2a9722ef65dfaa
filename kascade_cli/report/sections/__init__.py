"""One file per part of the page: `build(content)` gives a Section, or None where no file feeds it."""

from kascade_cli.report.sections import (
    importance,
    latency,
    model,
    oracle,
    pareto,
    pooling,
    remap,
    roles,
    similarity,
    strategies,
    top_mass,
)

# In the order of the page: what it gives, why, how fast, and where the numbers come from.
BUILDERS = (
    strategies.build,
    roles.build,
    pareto.build,
    top_mass.build,
    oracle.build,
    similarity.build,
    importance.build,
    pooling.build,
    remap.build,
    latency.build,
    model.build,
)
