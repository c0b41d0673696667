"""``python -m logquant_vllm.cli``: the same as the ``logquant-vllm`` command."""

from logquant_vllm.cli import main

if __name__ == "__main__":
    main()
