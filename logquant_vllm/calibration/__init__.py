"""A model's calibration on disk, and the text that it is measured on.

- ``file``: what a calibration's file holds, and what it must fit;
- ``lookup``: where a model's is found: given, beside the model, or measured by an engine at an earlier start;
- ``text``: what an engine reads to measure one.

Importing this does not import torch: the command line looks for files.
"""

from logquant_vllm.calibration.file import FILE_NAME, encoded, load, save
from logquant_vllm.calibration.lookup import find, identity, is_measured, keep, measured_path, origin

__all__ = ["FILE_NAME", "encoded", "find", "identity", "is_measured", "keep", "load", "measured_path", "origin", "save"]
