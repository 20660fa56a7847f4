"""setuptools' build backend, which asks for what this machine lacks and its build will use.

Why not scikit-build-core: by its documentation (1.1), a wheel's tag and a build's requirements come
from pyproject.toml, whose conditions cannot ask whether there is a compiler. A wheel without
libraries would be tagged as the platform's, or every compile error would end in such a wheel.
"""

from __future__ import annotations

from setuptools.build_meta import (
    build_editable,
    build_sdist,
    build_wheel,
    get_requires_for_build_sdist,
    prepare_metadata_for_build_editable,
    prepare_metadata_for_build_wheel,
)

from buildtools import machine

__all__ = [
    "build_editable",
    "build_sdist",
    "build_wheel",
    "get_requires_for_build_editable",
    "get_requires_for_build_sdist",
    "get_requires_for_build_wheel",
    "prepare_metadata_for_build_editable",
    "prepare_metadata_for_build_wheel",
]


def get_requires_for_build_wheel(config_settings: object = None) -> list[str]:
    return [] if machine.why_pure() else machine.missing()


get_requires_for_build_editable = get_requires_for_build_wheel
