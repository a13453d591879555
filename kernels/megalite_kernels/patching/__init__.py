"""Parts of `megalite_kernels.patch`: how a module is changed, recognised, and checked."""

from __future__ import annotations
