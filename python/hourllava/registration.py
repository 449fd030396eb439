# SPDX-License-Identifier: Apache-2.0
"""Lets transformers' Auto classes know the model once both packages are imported, whichever comes first.

transformers has no entry points, and importing it takes seconds, which `hourllava --help` should not: so the model is
registered at once where transformers is there already, and else right after it has been imported.
"""

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType

_MODEL = "hourllava.model"  # registers itself when it is imported


class _AfterTransformers(MetaPathFinder):
    """Finds transformers as the other finders do, and imports the model behind it."""

    def __init__(self) -> None:
        self._searching = False

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != "transformers" or self._searching:
            return None
        self._searching = True
        try:
            spec = find_spec(fullname)
        finally:
            self._searching = False
        if spec is not None and isinstance(spec.loader, Loader):
            self._continue(spec.loader)
        return spec

    def _continue(self, loader: Loader) -> None:
        run = loader.exec_module

        def exec_module(module: ModuleType) -> None:
            run(module)
            if self in sys.meta_path:
                sys.meta_path.remove(self)
                import_module(_MODEL)

        loader.exec_module = exec_module  # type: ignore[method-assign]


if "transformers" in sys.modules:
    import_module(_MODEL)
else:
    sys.meta_path.insert(0, _AfterTransformers())
