"""The only door to k-diffusion.

The package k_diffusion 0.1.1.post1 cannot be imported today: its `__init__` imports `clip`, which needs
`pkg_resources`, which setuptools no longer ships. Its samplers and denoisers are sound. So the package is located
without being executed and three of its modules are imported below a private package object of the same path.
"""

import functools
import importlib
import importlib.machinery
import importlib.metadata
import importlib.util
import sys
from types import ModuleType

VERSION = "0.0.16"
PRIVATE = "_segresearch_k_diffusion"  # not "k_diffusion": a caller's own import of that name stays what it is
MODULES = ("utils", "sampling", "external")  # in the order in which they import one another
INSTALL = f"install it with: pip install k-diffusion=={VERSION}"


@functools.cache
def k_diffusion() -> ModuleType:
    """k-diffusion's `sampling`, `external` and `utils`, as attributes of one private package.

    `k_diffusion/__init__.py` is never executed and `sys.modules["k_diffusion"]` is left as it is.
    ImportError, in one line, where the package is absent, of another version, or lacks something it needs.
    """
    spec = importlib.util.find_spec("k_diffusion")
    if spec is None or not spec.submodule_search_locations:
        raise ImportError(f"k-diffusion is not installed; {INSTALL}")
    try:
        version = importlib.metadata.version("k-diffusion")
    except importlib.metadata.PackageNotFoundError:
        version = "of an unknown version"
    if version != VERSION:
        raise ImportError(f"k-diffusion {version} is installed, but segresearch wraps {VERSION}; {INSTALL}")

    private = importlib.machinery.ModuleSpec(PRIVATE, None, is_package=True)
    private.submodule_search_locations = list(spec.submodule_search_locations)
    package = importlib.util.module_from_spec(private)
    sys.modules[PRIVATE] = package  # so that `from . import utils` inside resolves here
    try:
        for name in MODULES:
            importlib.import_module(f"{PRIVATE}.{name}")
    except ImportError as error:
        for name in (PRIVATE, *(f"{PRIVATE}.{module}" for module in MODULES)):
            sys.modules.pop(name, None)
        raise ImportError(f"k-diffusion {VERSION} does not load: {error}; {INSTALL}") from error
    return package
