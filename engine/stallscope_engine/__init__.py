"""A continuous-batching engine, small enough to read in an afternoon, instrumented to the last block.

``config`` and ``request`` say what is served; ``block_manager`` owns the KV blocks; ``scheduler`` chooses each
batch; ``executors`` run it (torch, or virtual time); ``engine`` is the loop that ties them to a clock and to
telemetry; ``models`` holds the networks. Scheduler and virtual executor need no torch.
"""
