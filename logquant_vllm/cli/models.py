"""Models that have a name here and need no hub: the demo model of this package, and a real one from a package of PyPI.

Light to import, like all of the command line; what is made is made when it is first asked for.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import logquant_vllm
from logquant_vllm.config import shown

DEMO = "demo"
SMOLLM2 = "smollm2"
NAMES = (DEMO, SMOLLM2)
CONFIGURATIONS = ("config.json", "params.json")
"""Files of which a model's directory has one, for vLLM: the second is Mistral's."""

HUB_SECONDS = 5
"""To wait for the hub's answer."""
NAMED = 'or "demo" or "smollm2", which need no hub'
"""Ends the help of an argument that takes a model."""

DEMO_MODEL = Path(logquant_vllm.__file__).parent / "demo" / "model"


def smollm2_directory() -> Path:
    """Where SmolLM2 is kept once it has been made."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "logquant" / SMOLLM2


def named_model(name: str) -> Path:
    """The directory of one of :data:`NAMES`; SmolLM2's is made if there is none.

    Raises:
        ValueError: if the demo model is missing, or the package that SmolLM2 is made from.
    """
    if name == DEMO:
        if not (DEMO_MODEL / "config.json").is_file():
            raise ValueError(f"the demo model is missing from this installation: no config.json in {DEMO_MODEL}")
        return DEMO_MODEL
    directory = smollm2_directory()
    if not (directory / "config.json").is_file():
        from logquant_vllm.hf import smollm2

        source = smollm2.gguf_file()
        print(f"making {directory} from the package {smollm2.PACKAGE}, once", file=sys.stderr, flush=True)
        smollm2.make(directory, source)
    return directory


def model_directory(model: str) -> str:
    """The directory or hub name behind a MODEL argument.

    Raises:
        ValueError: if it is a path and no model is there, a name and the hub cannot be reached, or what
            :func:`named_model` says.
    """
    if model in NAMES:
        return str(named_model(model))
    if not is_path(model):
        _find_on_hub(model)
    elif not (Path(model) / "config.json").is_file():
        raise ValueError(f"no config.json in {model}: name the model's directory, or its name on the hub")
    return model


def is_path(model: str) -> bool:
    """Whether a MODEL argument is a path, and no name on the hub."""
    return model.startswith(("/", ".", "~")) or Path(model).is_dir()


def check_path(model: str) -> None:
    """Say at once what vLLM would say after half a minute: that there is no model.

    Raises:
        ValueError: if a MODEL argument is a path, and neither a file nor a directory with a configuration.
    """
    path = Path(model)
    if is_path(model) and not path.is_file() and not any((path / name).is_file() for name in CONFIGURATIONS):
        raise ValueError(
            f"no {' or '.join(CONFIGURATIONS)} in {model}: name the model's directory, or its name on the hub"
        )


def _find_on_hub(name: str) -> None:
    """Ask the hub once for a model that is not in its cache here; transformers would ask again for half a minute.

    Raises:
        ValueError: if the hub cannot be reached, or this is no name of a model.
    """
    import huggingface_hub as hub
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        if not isinstance(hub.try_to_load_from_cache(name, "config.json"), str):
            hub.get_hf_file_metadata(hub.hf_hub_url(name, "config.json"), timeout=HUB_SECONDS)
    except HfHubHTTPError:
        return  # it answers, and whoever loads the model tells what
    except HFValidationError:
        raise ValueError(f"there is no directory {shown(name)}, and it is no name of a model on the hub") from None
    except Exception as error:  # of the library for HTTP, which differs between versions
        raise ValueError(
            f"model {shown(name)} is not on this machine, and the hub cannot be reached ({error}): give a directory "
            f"with its config.json, name a mirror in HF_ENDPOINT, or take {DEMO} or {SMOLLM2}, which need no hub"
        ) from None
