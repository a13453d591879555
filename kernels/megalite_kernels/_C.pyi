"""The native library, where it was built (csrc/bindings.cpp); checked at run time, so untyped here."""

from typing import Any

def __getattr__(name: str) -> Any: ...
