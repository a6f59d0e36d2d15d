"""Makes `in2nect.kernels` importable from a checkout, where its files are in kernels/ beside this package.

A wheel holds them inside the package, and then there is nothing to do. Costs two looks at the file system.
"""

import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

_NAME = "in2nect.kernels"


class _KernelsFinder:
    """Finds the one name `in2nect.kernels` in a folder; everything below it is found through its own path."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != _NAME:
            return None
        from importlib.util import spec_from_file_location

        folder = str(self.folder)
        return spec_from_file_location(name, self.folder / "__init__.py", submodule_search_locations=[folder])


def register() -> None:
    """Lets `import in2nect.kernels` find ../kernels where this package lies in a checkout; once is enough."""
    package = Path(__file__).parent
    folder = package.parent / "kernels"
    # An installed package holds its own kernels; a folder of that name beside it would be someone else's.
    installed = (package / "kernels").is_dir() or package.parent.name in ("site-packages", "dist-packages")
    if installed or not (folder / "__init__.py").is_file():
        return
    if not any(isinstance(finder, _KernelsFinder) for finder in sys.meta_path):
        sys.meta_path.append(_KernelsFinder(folder))
