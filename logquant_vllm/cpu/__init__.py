"""The operations in C++, for machines without a GPU."""
