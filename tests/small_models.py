# SPDX-License-Identifier: Apache-2.0
"""Settings that make any configuration's network small enough for a test that builds, runs or trains it."""


def channels(base: int, others: int) -> dict:
    """Backbone base channels, and the channels of everything behind it."""
    return dict(
        backbone_base_channels=base,
        fpn_channels=others,
        head_channels=others,
        thing_head_channels=others,
        stuff_head_channels=others,
    )


SMALL = channels(4, 8) | dict(norm_groups=4, num_things=3, num_stuff=4, categories=None)
