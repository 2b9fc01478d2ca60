"""The operations themselves for whole batches: in torch and Triton, as DALI graphs; decoding, and the slow reference."""
