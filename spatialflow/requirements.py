# SPDX-License-Identifier: Apache-2.0
"""The packages that panoptic segmentation needs and the operators do not."""

import importlib.util

_PACKAGE_BY_MODULE = {
    "PIL": "pillow",
    "cv2": "opencv-python-headless",
    "deflate": "deflate",
    "pycocotools": "pycocotools",
    "safetensors": "safetensors",
    "tqdm": "tqdm",
    "yaml": "pyyaml",
}


def require_packages(*modules: str) -> None:
    """Raise ImportError, with the command that installs all of them, if a module cannot be found.

    Args:
        modules: keys of `_PACKAGE_BY_MODULE`; none: all of them.
    """
    missing = [module for module in modules or _PACKAGE_BY_MODULE if importlib.util.find_spec(module) is None]
    if missing:
        packages = ", ".join(_PACKAGE_BY_MODULE[module] for module in missing)
        raise ImportError(
            f"panoptic segmentation needs packages that are not installed: {packages}; "
            f"`pip install 'spatialflow[panoptic]'` installs them",
            name=missing[0],
        )
