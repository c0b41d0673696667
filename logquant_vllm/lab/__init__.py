"""The accuracy laboratory: which tokens to keep in full precision, and how to quantize the others, told apart.

A *method* is a selection (:mod:`.selection`) and a quantizer (:mod:`.quantizers`); one cache (:mod:`.cache`) runs every
method on a transformers model, and :mod:`.experiment` crosses methods with tasks. Nothing here is needed to serve.
"""
