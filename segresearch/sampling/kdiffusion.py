"""The only import of k-diffusion.

segresearch calls k-diffusion's samplers and denoisers: its modules `sampling` and `external`, and `utils` that both
import. `k_diffusion/__init__.py` would import its training and evaluation too, and with them clip-anytorch, clean-fid,
kornia and jsonmerge; `clip` fails where setuptools no longer ships `pkg_resources`. So the package is located without
being executed, and the three modules are imported below a private package object of the same path. They import torch,
torchvision, torchdiffeq, torchsde, scipy, pillow and tqdm.

The two modules are checked by content, not by version: 0.0.16 to 0.1.1.post1 have these two modules byte for byte.
"""

import functools
import hashlib
import importlib
import importlib.machinery
import importlib.metadata
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

from segresearch.errors import PackageError

VERSION = "0.0.16"  # the one to install: from 0.1.0 on k-diffusion requires dctorch, which holds numpy below 2
PRIVATE = "_segresearch_k_diffusion"  # not "k_diffusion": a caller's own import of that name stays what it is
MODULES = ("utils", "sampling", "external")  # in the order in which they import one another
CONTENT = {  # SHA-256; of utils only append_dims is called, by these two
    "sampling.py": "4c5c2d92ddc2a07f9964440979430908d47a09634ac79f4a4e97c4f4682560bc",
    "external.py": "422e6f3e35cac7d59974053dbd24977e773dc5a7cdb96ef0254caf5611f83995",
}
INSTALL = f"install it with: pip install k-diffusion=={VERSION}"


@functools.cache
def k_diffusion() -> ModuleType:
    """k-diffusion's `sampling`, `external` and `utils`, as attributes of one private package.

    `k_diffusion/__init__.py` is never executed and `sys.modules["k_diffusion"]` is left as it is.
    ImportError, in one line, where the package is absent, of other content, or lacks something it needs.
    """
    spec = importlib.util.find_spec("k_diffusion")
    if spec is None or not spec.submodule_search_locations:
        raise PackageError(f"k-diffusion is not installed; {INSTALL}")
    folders = list(spec.submodule_search_locations)
    for file, sha256 in CONTENT.items():
        if _sha256(Path(folders[0], file)) != sha256:
            other = f"k-diffusion {_version()} has another {file} than {VERSION}, which segresearch wraps"
            raise PackageError(f"{other}; {INSTALL}")

    private = importlib.machinery.ModuleSpec(PRIVATE, None, is_package=True)
    private.submodule_search_locations = folders
    package = importlib.util.module_from_spec(private)
    sys.modules[PRIVATE] = package  # so that `from . import utils` inside resolves here
    try:
        for name in MODULES:
            importlib.import_module(f"{PRIVATE}.{name}")
    except ImportError as error:
        for name in (PRIVATE, *(f"{PRIVATE}.{module}" for module in MODULES)):
            sys.modules.pop(name, None)
        raise PackageError(f"k-diffusion {_version()} does not load: {error}; {INSTALL}") from error
    return package


def _sha256(path: Path) -> str | None:
    """The digest of a file in hexadecimal, of its lines as Unix ends them; None where there is no such file."""
    try:
        return hashlib.sha256(path.read_bytes().replace(b"\r\n", b"\n")).hexdigest()
    except OSError:
        return None


def _version() -> str:
    """The installed version, for messages."""
    try:
        return importlib.metadata.version("k-diffusion")
    except importlib.metadata.PackageNotFoundError:
        return "of an unknown version"
