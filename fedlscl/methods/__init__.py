"""The methods: each a file or a folder, with a client and, where averaging will not do, a server.

Every class of a method can be imported from here, `from fedlscl.methods import FedLSCL, ExactO2D`, and only its own
module is then imported.
"""

from importlib import import_module
from typing import Any

from fedlscl.classes import defined


def __getattr__(name: str) -> Any:
    """A class of a method, wherever in this folder it is defined."""
    for module in defined().get(name, ()):
        if module.startswith(f"{__name__}."):
            return getattr(import_module(module), name)
    raise AttributeError(f"module '{__name__}' has no class '{name}'")


def __dir__() -> list[str]:
    """All of these classes."""
    return sorted(name for name, modules in defined().items() if any(m.startswith(f"{__name__}.") for m in modules))
