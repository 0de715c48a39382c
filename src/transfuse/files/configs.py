"""Configs of transformers, completed by what their classes take where a file says nothing. No model class is built."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from huggingface_hub import errors as hub_errors


class Unavailable(Exception):
    """There is no model class here to run this checkpoint with; the message says what is missing."""


def complete_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """A transformers config with the defaults of its class, which files leave out; others as they are."""
    if not config.get("model_type"):
        return config
    try:
        defaults = transformers_config(config).to_dict()
    except Unavailable:
        return config
    nested = {
        key: {**value, **config.get(key, {})} for key, value in defaults.items() if key.endswith("_config") and value
    }
    return {**defaults, **config, **nested}


def transformers_config(config: Mapping[str, Any]) -> Any:
    """The config object of transformers for what a config file says.

    Raises:
        Unavailable: no `model_type`, or one that transformers does not know, or values that it refuses.
    """
    import transformers

    model_type = config.get("model_type")
    if not model_type:
        raise Unavailable("the config does not name a model_type, so its class is unknown")
    try:
        plain = {key: value for key, value in config.items() if key not in ("axes", "prefix", "auto_map")}
        return transformers.AutoConfig.for_model(**plain)
    except (ValueError, TypeError, LookupError, AttributeError, BAD_CONFIG) as error:
        raise Unavailable(f"transformers cannot read this config of model_type {model_type!r}: {error!r}") from error


# What the config classes of newer transformers raise for values that are of a wrong type or do not go together: no
# ValueError.
BAD_CONFIG: type[Exception] = getattr(hub_errors, "StrictDataclassError", ValueError)


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silences transformers' progress bars and advice; what matters when it loads is in the loading info."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
