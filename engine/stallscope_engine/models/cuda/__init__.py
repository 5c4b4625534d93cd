"""The network on a GPU: attention over a paged KV cache in torch's own kernels (``attention``), and the decoder around
it (``decoder``). ``executors.torch_cuda`` runs it; both also run on a CPU, where they are checked.
"""
