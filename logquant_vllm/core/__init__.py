"""The algorithm in plain torch: selection, rotation, quantizer, block format, and the reference operations."""
