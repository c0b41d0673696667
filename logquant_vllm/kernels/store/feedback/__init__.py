"""Key codes chosen with error feedback (``core.quantizer.round_with_feedback``): in Triton, and in Gluon."""
