# SPDX-License-Identifier: Apache-2.0
"""The order in which the stages and flows of the four sub-networks run."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, TypeVar

Feature = TypeVar("Feature")
"""A feature map of one level, or a list of maps of several levels."""


class Lists(Protocol):
    """Lists of convolutions by the name of a sub-network: a mapping or an `nn.ModuleDict`."""

    def __getitem__(self, name: str, /) -> Any: ...


def run_subnets(
    features: Mapping[str, Feature],
    stages: Lists,
    flows: Lists,
    source: str,
    run_stage: Callable[[Any, Any, Feature, Feature, Feature | None], Feature],
    run_flow: Callable[[Any, Feature, Feature], Feature],
    add: Callable[[Feature, Feature], Feature],
) -> dict[str, Feature]:
    """Run the stages and flows of the sub-networks in the order of the paper's equations 1 to 3.

    In every stage the source is computed first. Its new feature then flows into the same stage of the other detection
    sub-network and of stuff. After the last stage of the source, its final feature is used. The stages of thing run
    last; they also take the semantic flow from the final feature of stuff. The output of a sub-network without stages
    is its input plus the first flow of its list, if there is one; for thing, plus the first semantic flow, too.

    Args:
        features: the input of each sub-network, by name: "cls" and "reg", or these with "stuff" and "thing".
        stages: the convolutions of each sub-network, by name, of the type that `run_stage` takes.
        flows: the flow convolutions into each sub-network except the source, by name; "semantic" has those from stuff
            into thing. A stage beyond the end of a list, or with None there, has no flow.
        source: "cls" or "reg", the sub-network from which the other flows come.
        run_stage: (stage, flow convolution or None, input, source feature, semantic flow or None) -> the output of a
            stage. For stages of the source the flow convolution is None.
        run_flow: (flow convolution, feature, like) -> the flow, for the levels of `like`.
        add: the sum of two features.

    Returns:
        The final feature of each sub-network in `features`.

    Source: SpatialFlow (Chen et al.), equations 1 to 3.
    """
    features = dict(features)
    follower = "cls" if source == "reg" else "reg"
    tasks = [name for name in (source, follower, "stuff") if name in features]
    for s in range(max(len(stages[name]) for name in tasks)):
        for name in tasks:
            if s < len(stages[name]):
                flow = None if name == source else _flow_of_stage(flows[name], s)
                features[name] = run_stage(stages[name][s], flow, features[name], features[source], None)

    def add_flow(name: str, flow: Any, origin: str) -> None:
        if flow is not None:
            features[name] = add(features[name], run_flow(flow, features[origin], features[name]))

    for name in tasks[1:]:
        if not stages[name]:
            add_flow(name, _flow_of_stage(flows[name], 0), source)
    if "thing" not in features:
        return features
    for s, stage in enumerate(stages["thing"]):
        conv, thing = _flow_of_stage(flows["semantic"], s), features["thing"]
        semantic = None if conv is None else run_flow(conv, features["stuff"], thing)
        features["thing"] = run_stage(stage, _flow_of_stage(flows["thing"], s), thing, features[source], semantic)
    if not stages["thing"]:
        add_flow("thing", _flow_of_stage(flows["semantic"], 0), "stuff")
        add_flow("thing", _flow_of_stage(flows["thing"], 0), source)
    return features


def _flow_of_stage(flows: Sequence[Any], stage: int) -> Any:
    return flows[stage] if stage < len(flows) else None
