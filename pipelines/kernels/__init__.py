"""The operations themselves: compiled for the CPU, batched in torch and Triton, as DALI graphs, and the slow reference."""
