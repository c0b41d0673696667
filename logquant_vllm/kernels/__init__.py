"""The operations of ``core`` on a GPU: Triton, and Gluon where registers are worth laying out by hand.

=====================  ==============================  ========  =======================================================
operation              file                            launches  which GPUs and formats
=====================  ==============================  ========  =======================================================
basis of q, k and v    ``rotate``                      1         all; outputs back: ``combine``, prompts' here
decode attention       ``decode.gluon.kernel``         2         ``decode.choice``: heads of 64 to 512 channels, 8-bit
                                                                 scales, groups of 64 and more
                       ``decode.triton_kernel``        2         all others, and the interpreter
combine                ``decode.combine``              (second)  all: the second launch of either decode kernel
store, one token each  ``store.step``                  1         all
quantize a prompt      ``store.prompt``                1         all
window of a prompt     ``store.prompt``                1         all
error feedback         ``store.feedback.gluon_kernel`` 1         Hopper and data-center Blackwell; heads of 64 and 128
                       ``store.quantize``              (within)  all others: part of the launch that quantizes
read the past          ``prefill.gather``              1 a slice all; FlashAttention does the rest
                                                                 (``prefill.attention``)
=====================  ==============================  ========  =======================================================

``operations`` has the names of ``core.operations``; ``step`` is all of a layer. Every launch takes the objects of
``arguments`` and goes through ``launcher``; device helpers shared by all lie in ``cache`` (requests, slots, pages),
``codes`` and ``scales``; what differs between GPUs is in ``architecture``. A slower kernel that serves for want of a
faster one is logged once, with the reason, and shown by ``logquant-vllm doctor MODEL``.

A decode step overlaps its launches (programmatic dependent launch, from Hopper on); who waits for whom is written in
``docs/design.md`` and where each kernel waits.
"""
