"""Choosing diffusers' attention backend by name."""

from __future__ import annotations

from typing import Any

INFERENCE_ONLY = ("sage",)
"""Prefixes of backends without a backward pass."""


def set_attention(transformer: Any, name: str) -> None:
    """Sets the backend of every attention layer.

    Raises:
        ValueError: diffusers knows no such backend, or the package behind it is missing.
    """
    from diffusers.models.attention_dispatch import AttentionBackendName
    from diffusers.utils import logging

    known = sorted(backend.value for backend in AttentionBackendName)
    if name not in known:
        raise ValueError(f"attention: got {name!r}; expected one of {', '.join(known)}")
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # diffusers warns at every call that the interface may change
    try:
        transformer.set_attention_backend(name)
    except (RuntimeError, ImportError) as error:
        raise ValueError(f"attention: {name!r} cannot be used here: {error}") from error
    finally:
        logging.set_verbosity(verbosity)


def supports_backward(name: str) -> bool:
    """Whether a network with this backend can be trained."""
    return not name.lstrip("_").startswith(INFERENCE_ONLY)
